"""What a repair lost: the ranges that a history may show otherwise than it was.

A repair keeps what is sound behind a loss (`vrep.recovery.salvage`), and ends the history with a
gap-begin of its own. The file `lost` says which ranges of the disks the records covered that are
not there any more; the target tells them its source, which compares these and no others. The file
counts for that one gap-begin. A store without it, or with another's or a damaged one, knows
nothing: then all of every disk is compared. Bytes as in layout.h; sizes are bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from vrep._core import layout
from vrep.checksum import CHECKSUM_BYTES, checksum32
from vrep.durable import write_atomic
from vrep.errors import CorruptError, VrepError
from vrep.target.manifest import Position
from vrep.target.segment import digest

__all__ = ["Range", "decode", "encode", "lost_path", "read_lost", "united", "write_lost"]

_HEADER: Final = layout.LOST_HEADER.itemsize
_BIT: Final = layout.MAP_BIT_BYTES

log = logging.getLogger("vrep.target")


class Range(NamedTuple):
    """Of a disk; never empty."""

    disk: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


def lost_path(directory: Path) -> Path:
    """Of a group's store."""
    return directory / "lost"


def united(ranges: Iterable[Range], most: int = layout.LOST_RANGES_MAX) -> list[Range]:
    """What some ranges cover, in whole bits of a change map, since a source marks no less: rising
    and apart. Where there are too many the nearest become one."""
    found: list[Range] = []
    for one in sorted(ranges):
        start, end = one.offset // _BIT * _BIT, -(-one.end // _BIT) * _BIT
        last = found[-1] if found else None
        if last is not None and last.disk == one.disk and start <= last.end:
            found[-1] = last._replace(length=max(end, last.end) - last.offset)
        else:
            found.append(Range(one.disk, start, end - start))
    if len(found) <= most:
        return found
    gaps = [
        (after.offset - before.end, at)
        for at, (before, after) in enumerate(pairwise(found))
        if before.disk == after.disk
    ]
    closed = {at for _gap, at in sorted(gaps)[: len(found) - most]}
    fewer = [found[0]]
    for at, one in enumerate(found[1:]):
        if at in closed:
            fewer[-1] = fewer[-1]._replace(length=one.end - fewer[-1].offset)
        else:
            fewer.append(one)
    return fewer


def encode(group_id: bytes, store_id: bytes, at: Position, ranges: Iterable[Range] | None) -> bytes:
    """The file; None: no range is known."""
    rows = list(ranges or ())
    body = np.zeros(len(rows), layout.LOST_RANGE)
    for row, one in zip(body, rows, strict=True):
        row["disk"], row["offset"], row["length"] = one
    head = np.zeros((), layout.LOST_HEADER)
    head["magic"], head["version"] = layout.LOST_MAGIC, layout.LOST_VERSION
    head["flags"] = layout.LOST_UNKNOWN if ranges is None else 0
    head["group_id"] = np.frombuffer(group_id, np.uint8)
    head["store_id"] = np.frombuffer(store_id, np.uint8)
    head["at"], head["ranges"] = at.raw, len(rows)
    head["digest"] = np.frombuffer(digest(body.tobytes()), np.uint8)
    head["checksum"] = checksum32(head.tobytes()[:-CHECKSUM_BYTES])
    return head.tobytes() + body.tobytes()


def decode(data: bytes, group_id: bytes, store_id: bytes, at: Position) -> list[Range] | None:
    """The ranges; None when they are not known. CorruptError when it is damaged, of a later
    version, or of another history."""
    if len(data) < _HEADER:
        raise CorruptError("it ends within its header")
    head = np.frombuffer(data, layout.LOST_HEADER, 1)[0]
    if int(head["magic"]) != layout.LOST_MAGIC or int(head["checksum"]) != checksum32(
        data[: _HEADER - CHECKSUM_BYTES]
    ):
        raise CorruptError("its header is damaged")
    flags, count, body = int(head["flags"]), int(head["ranges"]), data[_HEADER:]
    if int(head["version"]) != layout.LOST_VERSION or flags & ~layout.LOST_UNKNOWN:
        raise CorruptError("it is of a later version")
    of = (head["group_id"].tobytes(), head["store_id"].tobytes(), Position.of(head["at"]))
    if of != (group_id, store_id, at):
        raise CorruptError("it is of another history")
    if (
        count > layout.LOST_RANGES_MAX
        or len(body) != count * layout.LOST_RANGE.itemsize
        or digest(body) != head["digest"].tobytes()
    ):
        raise CorruptError("its ranges are damaged")
    if flags & layout.LOST_UNKNOWN:
        return None
    rows = np.frombuffer(body, layout.LOST_RANGE)
    return [Range(int(r["disk"]), int(r["offset"]), int(r["length"])) for r in rows]


def write_lost(
    directory: Path,
    group_id: bytes,
    store_id: bytes,
    at: Position,
    ranges: Iterable[Range] | None,
) -> None:
    """Durably, in the place of what an earlier repair said. OSError."""
    write_atomic(lost_path(directory), encode(group_id, store_id, at, ranges))


def read_lost(
    directory: Path, group_id: bytes, store_id: bytes, at: Position
) -> list[Range] | None:
    """What the repair lost that ended the history at a position; None: that is not known."""
    try:
        return decode(lost_path(directory).read_bytes(), group_id, store_id, at)
    except FileNotFoundError:
        return None
    except (VrepError, OSError) as error:
        log.warning("%s: everything is compared: %s", lost_path(directory), error)
        return None
