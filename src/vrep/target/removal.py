"""The end of a store: it goes at once and for good, wherever a deletion is cut off.

Its directory gets another name first, which is no group's; what a deletion that was cut off left
under such a name goes when the target starts.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vrep.durable import sync_directory

__all__ = ["finish_removals", "remove_store"]


def remove_store(directory: Path) -> None:
    """Delete a store that nobody uses. OSError."""
    doomed = directory.with_name(f".{directory.name}.deleted")
    if doomed.exists():
        shutil.rmtree(doomed)
    directory.rename(doomed)
    sync_directory(directory.parent)
    shutil.rmtree(doomed)


def finish_removals(stores: Path) -> None:
    """Delete what earlier deletions left; what cannot be is tried again at the next start."""
    for doomed in stores.glob(".*.deleted"):
        shutil.rmtree(doomed, ignore_errors=True)
