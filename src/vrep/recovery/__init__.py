"""Recovery: what can be recovered, views of it, failover and export.

`held` finds the groups whose history this site holds, `history` knows their points,
`check` verifies that nothing was changed or left out, `access` is the tenant's key at work,
`fetch` reads disks at a point; `points`, `view`, `failover` and `export` are what users call.
`process` is a view's own process.
"""
