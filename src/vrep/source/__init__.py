"""The source appliance: drains a group's ring, seals it, ships it to its target.

It talks to the filter through shared memory and a control socket, and to the target through
`vrep.wire`. It may crash, restart or be upgraded: the guest does not notice.
"""
