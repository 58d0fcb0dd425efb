"""Lost: of a history that was repaired what was lost is compared, and no more where it is known.

A target of which records were lost and whose history was repaired names the ranges of the disks
that they covered (GROUP_OPENED `lost`). They become unshipped, as a range does that may differ
for any other reason; what the target never acknowledged is unshipped by the loss of the ring. Where
it names none, or does not hold what it acknowledged, everything becomes unshipped. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from msgspec import UnsetType

from vrep.errors import UnsupportedError
from vrep.groups import GroupDefinition
from vrep.source.attach import RingHold
from vrep.wire import messages as m

__all__ = ["Ranges", "mark_lost", "ranges_lost"]

Ranges = Mapping[int, Sequence[tuple[int, int]]]
"""(offset, length) by disk"""

log = structlog.get_logger("vrep.source")


def ranges_lost(
    opened: m.GroupOpened, definition: GroupDefinition, status: Mapping[str, Any]
) -> Ranges | None:
    """What the target says that it lost, within the disks as they are; None: it does not say."""
    if isinstance(opened.lost, UnsetType):
        return None
    now = status.get("disks", {})
    sizes = {disk.index: int(now.get(disk.name, disk.bytes)) for disk in definition.disks}
    found: dict[int, list[tuple[int, int]]] = {}
    for one in opened.lost:
        if one.disk not in sizes:
            return None
        end = min(one.offset + one.length, sizes[one.disk])
        if one.offset < end:  # else the disk was made smaller since
            found.setdefault(one.disk, []).append((one.offset, end - one.offset))
    return found


def mark_lost(hold: RingHold, ranges: Ranges | None) -> int | None:
    """Make ranges unshipped, or everything with None; of how many bytes they are, None: all."""
    if ranges is not None:
        try:
            for disk, parts in ranges.items():
                hold.compare(disk, parts)
        except UnsupportedError:  # a filter of an older release
            log.info("all is compared, since the filter cannot be told less", group=hold.group)
        else:
            return sum(length for parts in ranges.values() for _offset, length in parts)
    hold.resync_all()
    return None
