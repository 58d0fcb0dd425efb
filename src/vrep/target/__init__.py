"""The target appliance: receives records, makes them durable in order, keeps their history.

Reading order: `files` (the I/O that a test may replace), `manifest`, `segment`, `journal`
(group commit), `store` (writer), `reader` (snapshots), `receive` (sessions), `daemon`.
Nothing here ever needs or holds a key.
"""
