"""Running VMs: their QEMU through QMP or libvirt, their guest through its agent.

Imports nothing of the stages; the filter is reached through its control socket. What is changed
in a VM is written down in the group's directory before, and put back from there.
"""
