"""Changes: which blocks of a group's disks may differ between two recovery points.

They come from the indexes of the history alone: no data are read, no key is needed, and the cost
grows with what was written between the points (map/changes.h says by which rule). What is not
told is equal at both points. What is told may be equal all the same: a change is told in whole
blocks of `BLOCK_BYTES`, and a write or a sync copy that changed nothing counts.

The indexes are checked as they are read; that the target left nothing out of its history is for
`vrep points` and `vrep export`, which check all of it.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from vrep import errors
from vrep._core.changes import BLOCK_BYTES, Changes
from vrep.paths import SitePaths
from vrep.recovery.access import KeyAccess
from vrep.recovery.held import find_group
from vrep.recovery.history import Found, format_time, needs_key, resolve
from vrep.recovery.points import PointInfo
from vrep.target.manifest import Position
from vrep.target.reader import StoreReader

__all__ = [
    "BLOCK_BYTES",
    "ChangeList",
    "DiskChanges",
    "Extent",
    "changed",
    "changes_between",
    "list_changes",
]


class Extent(msgspec.Struct, frozen=True, gc=False):
    """Bytes of a disk that may differ."""

    offset: int
    length: int


class DiskChanges(msgspec.Struct, frozen=True):
    """What may differ of one disk: extents, rising and apart."""

    name: str
    bytes: int
    """of the disk at the second point: what only the first has is not told"""
    changed_bytes: int
    extents: list[Extent]


class ChangeList(msgspec.Struct, frozen=True):
    """What `vrep changes` shows."""

    group: str
    group_id: str
    since: PointInfo
    at: PointInfo
    block_bytes: int
    disks: list[DiskChanges]


def changes_between(reader: StoreReader, since: Position, at: Position) -> Changes:
    """What may differ between two positions, of one line of history or of two.
    PointNotFoundError for one that is not kept: what a fold dropped is in no index."""
    for point in (since, at):
        if not reader.manifest.keeps(point):
            raise errors.PointNotFoundError(f"pos:{point} was folded away")
    return Changes(
        reader.indexes, reader.ancestry(since), reader.ancestry(at), group_id=reader.group_id
    )


def changed(
    reader: StoreReader, changes: Changes, disk: int, since: Position, at: Position
) -> NDArray[Any]:
    """Ranges of a disk, as it was at the second point, that may differ from the first: (offset,
    length), rising and apart. What the first does not have at all may differ."""
    before, size = (
        next(d.bytes for d in reader.disks_at(point) if d.index == disk) for point in (since, at)
    )
    if size <= before:
        return changes.list(disk, 0, size)
    start = before - before % BLOCK_BYTES
    rows = changes.list(disk, 0, start)
    if len(rows) and int(rows[-1]["offset"] + rows[-1]["length"]) == start:
        start = int(rows[-1]["offset"])
        rows = rows[:-1]
    return np.append(rows, np.array([(start, size - start)], rows.dtype))


def list_changes(
    paths: SitePaths, group: str, since: str, at: str = "latest", disk: str | None = None
) -> ChangeList:
    """What may differ between two points of a group (its name or id), whatever their order; of
    one disk or of all. NotFoundError for a disk that it has not, and what a POINT raises."""
    held = find_group(paths, group)
    with StoreReader(paths.store, held.group_id) as reader:
        names = [entry.name for entry in reader.disks]
        if disk not in (None, *names):
            raise errors.NotFoundError(f"group {group!r} has no disk {disk!r}: {', '.join(names)}")
        access: KeyAccess | None = None
        if needs_key(since) or needs_key(at):
            access = KeyAccess.open(paths, held.group_id, reader.wrapped_keys)
        now_ns = time.time_ns()
        first, last = (resolve(reader, text, access, now_ns) for text in (since, at))
        changes = changes_between(reader, first.position, last.position)
        return ChangeList(
            group=held.name,
            group_id=held.hex,
            since=_info(first),
            at=_info(last),
            block_bytes=BLOCK_BYTES,
            disks=[
                _disk(
                    entry.name,
                    entry.bytes,
                    changed(reader, changes, entry.index, first.position, last.position),
                )
                for entry in reader.disks_at(last.position)
                if disk in (None, entry.name)
            ],
        )


def _info(found: Found) -> PointInfo:
    return PointInfo(f"pos:{found.position}", format_time(found.wall_ns))


def _disk(name: str, size: int, rows: NDArray[Any]) -> DiskChanges:
    return DiskChanges(
        name=name,
        bytes=size,
        changed_bytes=int(rows["length"].sum()),
        extents=[Extent(offset, length) for offset, length in rows.tolist()],
    )
