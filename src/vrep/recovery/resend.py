"""Resend: what is left of a store when records are lost in its middle, for its source to go on.

Nobody but the source can make records again. What stands before the first loss is sound, and every
point of it recovers. What stands behind it is no point without what was lost, but the most of it is
what the source's disks hold still: it is salvaged (`vrep.recovery.salvage`). The source compares
every block with what is left here, and sends what differs: what was lost. So the span that does not
recover is a gap of the history like any other, from the first lost position to the gap's end.

When the loss is in the folded base, or anywhere else before the oldest point, no point is left:
then the whole history becomes what the source compares with.

One manifest is the step: before it the store is as damaged as it was (the file of a segment whose
front is kept is replaced before, by that front), after it the store is whole. Sizes are bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from vrep import errors
from vrep._core import segment as native
from vrep._core.index import Index
from vrep.durable import make_private_directory, sync_directory
from vrep.paths import SitePaths
from vrep.recovery.salvage import Salvage, Source, index_of
from vrep.recovery.unreadable import read_sound
from vrep.recovery.view import points_in_use
from vrep.target import runs
from vrep.target.files import Files
from vrep.target.lease import Lease
from vrep.target.lost import write_lost
from vrep.target.manifest import Manifest, Position
from vrep.target.segment import entry_path, index_tail, scan_tail, segment_path, write_footer

__all__ = ["Kept", "aside_directory", "keep_sound", "sound_front"]

_STEP: Final = 64


def aside_directory(paths: SitePaths, group_id: bytes) -> Path:
    """A new place for files of a damaged store: they are never deleted here."""
    where = make_private_directory(paths.root / "damaged")
    return where / f"{group_id.hex()}-{time.time_ns()}"


def _asides(paths: SitePaths, group_id: bytes) -> list[Path]:
    """Where files of a damaged store were put, oldest first."""
    return sorted((paths.root / "damaged").glob(f"{group_id.hex()}-*"))


def sound_front(data: memoryview, group_id: bytes, number: int) -> int:
    """Up to where the bytes of a segment are whole commits, whatever follows; 0: none is."""
    low, high, end = 0, len(data) // _STEP, 0
    while low <= high:
        middle = (low + high) // 2
        try:
            end = int(native.scan(data[: middle * _STEP], group_id, number)[0]["end"])
        except errors.TornError:  # not even a header
            low = middle + 1
        except errors.IntegrityError:
            high = middle - 1
        else:
            low = middle + 1
    return end


class Kept(NamedTuple):
    """What of a store is left."""

    end: Position
    """up to here every point recovers; seq 0: none does"""
    salvaged_bytes: int
    """data that the source need not send, if its disks still hold them"""
    aside: Path
    """where the rest is"""
    compared_bytes: int | None
    """of the disks, that the source compares; None: all"""


def keep_sound(
    paths: SitePaths,
    group_id: bytes,
    lease: Lease,
    first_lost: int,
    stream_before: Callable[[int], Any],
) -> Kept:
    """End a store before its first loss: the closed segment in row `first_lost` of its manifest,
    or, behind them all, the open one; and salvage what stands behind it.

    StateError when nothing would be gained: nothing of the present epoch is left. BusyError while
    something reads a point that goes."""
    manifest, directory = lease.manifest, lease.directory
    rows = manifest.segments[:first_lost].copy()
    number, generation = manifest.active_segment, 0
    if first_lost < len(manifest.segments):
        number = int(manifest.segments[first_lost]["segment"])
        generation = int(manifest.segments[first_lost]["generation"])
    path = segment_path(directory, number, generation)
    front = b"" if generation else _front(path, group_id, number)
    end = Position.of(rows[-1]["last"]) if len(rows) else Position()
    if front:
        end = scan_tail(memoryview(front), group_id, number).last
    if not end.seq or not manifest.keeps(end):
        # The oldest point is lost, and no other can be had without it.
        rows, front, end, first_lost = rows[:0], b"", Position(), 0
    salvage = Salvage(group_id, lease, *_behind(paths, group_id, lease, first_lost))
    # Else its source goes on from there by itself: nothing that it was told of stands behind it.
    # So it does behind the STREAM of an epoch that has no record yet: no position is its own.
    current = manifest.current_epoch
    told = salvage.end > end and salvage.end.epoch == current.epoch
    told = told and salvage.end.seq > current.parent.seq
    found = salvage.find(end) if told else 0
    if not told:
        _require_end(manifest, end)
    _require_unused(paths, group_id, manifest, end)
    aside = aside_directory(paths, group_id)
    make_private_directory(aside)
    if path.exists():
        os.link(path, aside / path.name)
        sync_directory(aside)
    made, lost = manifest.segments[:0], None
    if told:
        made, lost = salvage.write(end, manifest.next_segment), salvage.lost(end)
        write_lost(directory, group_id, manifest.store_id, salvage.end, lost)
    if front:
        stream = stream_before(first_lost)
        entry = _write_front(directory, group_id, number, front, stream, lease)
        rows = np.append(rows, entry.reshape(1))
    kept = {int(row["segment"]) for row in rows}
    behind = [s for s in (*manifest.segments["segment"], manifest.active_segment) if s not in kept]
    gone = manifest.runs["last_segment"] >= (number if len(rows) else 0)
    lease.publish(
        segments=np.append(rows, made),
        runs=manifest.runs[~gone],
        active_segment=0,
        next_segment=manifest.next_segment + len(made),
        horizon=manifest.horizon if end.seq else Position(),
    )
    for row in manifest.segments[np.isin(manifest.segments["segment"], behind)]:
        _move(entry_path(directory, row), aside)
    if manifest.active_segment in behind:
        _move(segment_path(directory, manifest.active_segment), aside)
    sync_directory(aside)
    sync_directory(directory)
    return Kept(end, found, aside, None if lost is None else sum(one.length for one in lost))


def _behind(
    paths: SitePaths, group_id: bytes, lease: Lease, first_lost: int
) -> tuple[list[Source], Index | None]:
    """The segments from the first loss on, and the index of the one before them."""
    manifest, directory = lease.manifest, lease.directory

    def source(row: Any) -> Source:
        path = entry_path(directory, row)
        index = index_of(path, row)
        # Of a repair that was killed when its front stood in this place: as it was before.
        for where in _asides(paths, group_id) if index is None else ():
            if (before := index_of(where / path.name, row)) is not None:
                path, index = where / path.name, before
        return Source(path, int(row["segment"]), index, Position.of(row["last"]))

    rows = manifest.segments
    sources = [source(row) for row in rows[first_lost:]]
    if manifest.active_segment:
        number = manifest.active_segment
        sources.append(Source(segment_path(directory, number), number, None))
    before = rows[first_lost - 1] if first_lost else None
    return sources, None if before is None else index_of(entry_path(directory, before), before)


def _require_end(manifest: Manifest, end: Position) -> None:
    """StateError when a source could not go on from there."""
    current = manifest.current_epoch
    began = Position(current.parent.epoch, manifest.lane, current.parent.seq)
    if not end.seq:
        raise errors.StateError(
            "the oldest point that is kept is lost, and nothing of the present epoch can be "
            "salvaged: only --start-over helps"
        )
    if end.epoch != current.epoch and end != began:
        raise errors.StateError(
            f"what is sound ends at {end}, before epoch {current.epoch} began: only --start-over "
            "helps"
        )


def _require_unused(paths: SitePaths, group_id: bytes, manifest: Manifest, end: Position) -> None:
    line = dict(manifest.ancestry(end)) if end.seq else {}
    for point in points_in_use(paths, group_id):
        if point.seq > line.get(point.epoch, 0):
            raise errors.BusyError(f"a test or failover uses pos:{point}, which is lost: end it")
    if runs.pinned(paths.store / group_id.hex()):
        raise errors.BusyError("a recovery reads the history of this group: end it first")


def _front(path: Path, group_id: bytes, number: int) -> bytes:
    """The sound commits of a segment that was received; empty when there are none with records."""
    data = bytes(read_sound(path))
    end = sound_front(memoryview(data), group_id, number)
    if not end or not native.scan(data[:end], group_id, number)[0]["records"]:
        return b""
    return data[:end]


def _write_front(
    directory: Path, group_id: bytes, number: int, front: bytes, stream: Any, lease: Lease
) -> Any:
    """A segment's file replaced by its front, with an index; the manifest's entry."""
    files, view = Files(), memoryview(front)
    scan = scan_tail(view, group_id, number)
    builder = index_tail(view, scan, group_id, stream if scan.header["stream_id"].any() else None)
    builder.aged(lease.aging.now_ns())
    path = segment_path(directory, number)
    aside = path.with_name(f".{path.name}.repair.tmp")
    fd = files.create(aside)
    try:
        files.write(fd, [view], 0)
        made = write_footer(files, fd, builder, scan.last, len(front))
    finally:
        os.close(fd)
    aside.replace(path)
    files.sync_directory(directory)
    return made


def _move(path: Path, aside: Path) -> None:
    """What another process could not remove meanwhile: the lock is held."""
    if path.exists():
        path.replace(aside / path.name)
