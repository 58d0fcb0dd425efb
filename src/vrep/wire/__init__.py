"""How two sites talk: sans-I/O protocol, TLS transport, peers and invitations.

Reading order: `frames` (the header), `messages`, `credits`, `protocol` (what
may be said when), `stream` and `transport` (bytes and threads), `peers`,
`invite`, `site` (connecting, listening, joining).
"""
