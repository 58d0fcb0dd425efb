"""Continuous replication of virtual machine disks, with recovery at any write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vrep.site import Site as Site

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Site":  # imported when asked for: recovery starts in a fresh process
        from vrep.site import Site

        return Site
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Site", "__version__"]
