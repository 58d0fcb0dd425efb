"""Resend: what is left of a store when records are lost in its middle, for its source to go on.

Nobody but the source can make records again. What stands before the first loss is sound, and every
point of it recovers; what stands behind it is no point without what was lost, so it is set aside.
The store then ends where it was sound. Its source finds that the target lost what it had
acknowledged, begins a gap, compares every block with what is left here, and sends what differs. So
the span that does not recover is a gap of the history like any other, from the first lost position
to the gap's end.

One manifest is the step: before it the store is as damaged as it was (the file of a segment whose
front is kept is replaced before, by that front), after it the store is whole. Sizes are bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from vrep import errors
from vrep._core import segment as native
from vrep.durable import make_private_directory, sync_directory
from vrep.paths import SitePaths
from vrep.recovery.view import points_in_use
from vrep.target import runs
from vrep.target.files import Files
from vrep.target.lease import Lease
from vrep.target.manifest import Manifest, Position
from vrep.target.segment import entry_path, index_tail, scan_tail, segment_path, write_footer

__all__ = ["aside_directory", "keep_sound", "sound_front"]

_STEP: Final = 64


def aside_directory(paths: SitePaths, group_id: bytes) -> Path:
    """A new place for files of a damaged store: they are never deleted here."""
    where = make_private_directory(paths.root / "damaged")
    return where / f"{group_id.hex()}-{time.time_ns()}"


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


def keep_sound(
    paths: SitePaths,
    group_id: bytes,
    lease: Lease,
    first_lost: int,
    stream_before: Callable[[int], Any],
) -> tuple[Position, Path]:
    """End a store before its first loss: the closed segment in row `first_lost` of its manifest,
    or, behind them all, the open one. Where it ends now, and where the rest was put.

    StateError when nothing would be gained: the oldest point that is kept, or the place where the
    current epoch began, is lost too. BusyError while something reads a point that goes."""
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
    _require(paths, group_id, manifest, end)
    aside = aside_directory(paths, group_id)
    make_private_directory(aside)
    if path.exists():
        os.link(path, aside / path.name)
        sync_directory(aside)
    if front:
        stream = stream_before(first_lost)
        made = _write_front(directory, group_id, number, front, stream, lease)
        rows = np.append(rows, made.reshape(1))
    kept = {int(row["segment"]) for row in rows}
    behind = [s for s in (*manifest.segments["segment"], manifest.active_segment) if s not in kept]
    gone = manifest.runs["last_segment"] >= number
    lease.publish(segments=rows, runs=manifest.runs[~gone], active_segment=0)
    for row in manifest.segments[np.isin(manifest.segments["segment"], behind)]:
        _move(entry_path(directory, row), aside)
    if manifest.active_segment in behind:
        _move(segment_path(directory, manifest.active_segment), aside)
    sync_directory(aside)
    sync_directory(directory)
    return end, aside


def _require(paths: SitePaths, group_id: bytes, manifest: Manifest, end: Position) -> None:
    current = manifest.current_epoch
    began = Position(current.parent.epoch, manifest.lane, current.parent.seq)
    if not end.seq or (end.epoch != current.epoch and end != began):
        raise errors.StateError(
            f"what is sound ends at {end}, before epoch {current.epoch} began: only --start-over "
            "helps"
        )
    if not manifest.keeps(end):
        raise errors.StateError(
            f"what is sound ends at {end}, before the oldest point that is kept, "
            f"{manifest.horizon}: only --start-over helps"
        )
    line = dict(manifest.ancestry(end))
    for point in points_in_use(paths, group_id):
        if point.seq > line.get(point.epoch, 0):
            raise errors.BusyError(f"a test or failover uses pos:{point}, which is lost: end it")
    if runs.pinned(paths.store / group_id.hex()):
        raise errors.BusyError("a recovery reads the history of this group: end it first")


def _front(path: Path, group_id: bytes, number: int) -> bytes:
    """The sound commits of a segment that was received; empty when there are none with records."""
    try:
        data = path.read_bytes()
    except OSError:
        return b""
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
