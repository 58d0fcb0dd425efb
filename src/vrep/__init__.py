"""Continuous replication of virtual machine disks, with recovery at any write."""

__version__ = "0.1.0"
