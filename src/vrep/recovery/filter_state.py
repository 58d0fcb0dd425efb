"""What the durable state of a filter says, for whoever reads the group's change map without it.

The map in shared memory names every block that was written through the filter, and no other. That
nothing was written past it is for the filter to find out when it opens the group; who reads the
map of a group that it does not serve, and may never serve again, must look as it does
(src/_native/filter/recover.c).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

from vrep._core import layout
from vrep.checksum import CHECKSUM_BYTES, checksum32
from vrep.groups import GroupDefinition
from vrep.paths import SitePaths

__all__ = ["written_past"]

_PAST: Final = layout.STATE_PAST | layout.STATE_BLIND | layout.STATE_MIRROR
"""a VM may write past the filter, a pass-through did, or the VM writes its image itself"""


def written_past(paths: SitePaths, definition: GroupDefinition) -> bool:
    """Whether the disks of a group may have been written without its change map being told, as far
    as its files say: also when they do not say at all."""
    if definition.detached:
        return True
    state = _newest(paths.groups / definition.name / "state")
    if state is None or state["group_id"].tobytes().hex() != definition.group_id:
        return True
    flags = int(state["flags"])
    if flags & _PAST or int(state["disks"]) != len(definition.disks):
        return True
    if flags & layout.STATE_OPEN:
        return False  # as long as it is, nobody else had the disks' locks
    return any(
        _changed(Path(disk.uri.partition(":")[2]), known)
        for disk, known in zip(definition.disks, state["disk"], strict=False)
    )


def _newest(path: Path) -> Any:
    """The newest whole slot of a state file; None: there is none."""
    found = None
    try:
        data = path.read_bytes()
    except OSError:
        return None
    for at in range(0, len(data) - layout.STATE.itemsize + 1, layout.STATE.itemsize):
        raw = data[at : at + layout.STATE.itemsize]
        slot = np.frombuffer(raw, layout.STATE)[0]
        wanted = checksum32(raw[:-CHECKSUM_BYTES])
        whole = slot["magic"] == layout.STATE_MAGIC and slot["version"] == layout.STATE_VERSION
        if whole and int(slot["checksum"]) == wanted:
            found = slot if found is None or slot["counter"] > found["counter"] else found
    return found


def _changed(path: Path, known: Any) -> bool:
    """Whether a disk is not as the last clean stop left it. A device's times say nothing."""
    try:
        now = path.stat()
    except OSError:
        return True
    if path.is_block_device():
        return False
    stamps = (now.st_ino, now.st_mtime_ns, now.st_ctime_ns)
    return stamps != (int(known["inode"]), int(known["mtime_ns"]), int(known["ctime_ns"]))
