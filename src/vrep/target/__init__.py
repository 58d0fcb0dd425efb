"""The target appliance: receives records, makes them durable in order, keeps their history.

Reading order: `files` (the I/O that a test may replace), `manifest`, `segment`, `journal`
(group commit), `lease`, `store` (writer), `reader` (snapshots), `epochs` (who may write),
`session`, `receive` (groups and their sessions), `daemon`.
Nothing here ever needs or holds a key.
"""
