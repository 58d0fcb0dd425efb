"""`vrep.Site`: everything that the command line does, from Python.

A `Site` is a directory with its identity, peers, keys, groups, store and views. Its methods
work whether or not the site's processes run: they change durable files and then tell the
processes that listen. All raise subclasses of `vrep.errors.VrepError`.

    site = vrep.Site("/var/lib/vrep")
    site.protect("web", {"root": "file:/srv/web.raw"}, to="backup", key="acme")
    print(site.status("web"))
"""

from __future__ import annotations

from vrep.site.keys import Keys
from vrep.site.machine import Machine
from vrep.site.protection import Protection
from vrep.site.recovery import Recovery
from vrep.site.trust import Trust

__all__ = ["Site"]


class Site(Trust, Machine, Protection, Recovery, Keys):
    """One site, by its directory (default: ``VREP_DIR``, then /var/lib/vrep)."""
