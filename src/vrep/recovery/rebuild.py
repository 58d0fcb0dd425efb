"""Rebuild: a damaged or lost newest manifest made again, from the one before it and the segments.

Two manifests are kept, and one change lies between them. What the newest one named is found in the
files of the segments: what was being appended, and what a fold put in the place of others. Names,
disks, epochs and wrapped keys come from the manifest before. Whether the change was one of epochs
cannot be told from files: if a record, or a failover of this site, is of an epoch that the older
manifest does not know, nothing is rebuilt, since a writer that was replaced would be heard again.
The source hands over keys, window and quota when its next session opens. The damaged manifest is
kept in DIR/damaged.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from vrep import errors
from vrep._core import layout, record
from vrep._core import segment as native
from vrep._core.index import Index, IndexBuilder
from vrep.durable import make_private_directory, sync_directory
from vrep.paths import SitePaths
from vrep.recovery.resend import aside_directory
from vrep.recovery.view import view_directories
from vrep.target.aging import Aging, host_steady
from vrep.target.closing import close_open_segment
from vrep.target.files import Files
from vrep.target.lease import Lease
from vrep.target.manifest import Manifest, Position, manifest_numbers, manifest_path
from vrep.target.segment import digest, segment_path

__all__ = ["folded_builder", "rebuild_manifest"]

_SEGMENT: Final = re.compile(r"seg-([0-9a-f]{8})(?:-([0-9a-f]+))?")


def rebuild_manifest(
    paths: SitePaths, directory: Path, group_id: bytes, lease: Lease, why: errors.VrepError
) -> str:
    """Make the newest manifest of a store again; the name of the damaged or lost one. `why`,
    again, when that cannot be."""
    numbers = manifest_numbers(directory)
    if not numbers:
        raise why
    number = numbers[-1]
    before = _whole(directory, group_id, number)
    if before is not None:  # the one behind it is lost
        number += 1
    damaged = manifest_path(directory, number)
    try:
        if before is None and (len(numbers) < 2 or numbers[-2] != number - 1):
            raise errors.CorruptError("the manifest before it is not there")
        before = before or _whole(directory, group_id, number - 1)
        if before is None:
            raise errors.CorruptError("so is the manifest before it")
    except OSError as error:
        raise errors.CorruptError(f"{damaged.name} is damaged; {error}") from why
    except errors.CorruptError as error:
        raise errors.CorruptError(f"{damaged.name} is damaged; {error.detail}") from why
    lease.aging = Aging(host_steady, before.count)
    found = _with_folds(directory, before)
    found = _with_open(directory, group_id, found, lease)
    _require_epochs(paths, directory, found, damaged.name)
    aside = make_private_directory(aside_directory(paths, group_id))
    lease.manifest = replace(found, number=number, lease=before.lease + 1)
    lease.publish()
    if damaged.exists():
        damaged.replace(aside / damaged.name)
    sync_directory(aside)
    sync_directory(directory)
    return damaged.name


def _whole(directory: Path, group_id: bytes, number: int) -> Manifest | None:
    """A manifest of this group; None when it is not whole. OSError."""
    try:
        found = Manifest.decode(manifest_path(directory, number).read_bytes())
    except errors.IntegrityError:
        return None
    return found if found.number == number and found.group_id == group_id else None


def _with_folds(directory: Path, before: Manifest) -> Manifest:
    """The closed segments: as the older manifest has them, or, where those files are gone, as a
    fold replaced them."""
    rows = before.segments
    gone = [not segment_path(directory, *_name(row)).exists() for row in rows]
    if not any(gone):
        return replace(before, runs=before.runs[:0])
    known = {_name(row) for row in rows}
    made = []
    for path in sorted(directory.glob("seg-*-*")):
        match = _SEGMENT.fullmatch(path.name)
        if match is None or (int(match[1], 16), int(match[2], 16)) in known:
            continue
        made.append(_folded_row(path, int(match[1], 16), int(match[2], 16), before))
    for row in made:
        covered = (rows["segment"] >= row["segment"]) & np.array(
            [Position.of(r["last"]) <= Position.of(row["last"]) for r in rows], bool
        )
        rows = np.append(rows[~covered], row.reshape(1))
        rows = rows[np.argsort(rows["segment"], kind="stable")]
    return replace(before, segments=rows, runs=before.runs[:0])


def _name(row: Any) -> tuple[int, int]:
    return int(row["segment"]), int(row["generation"])


def _folded_row(path: Path, number: int, generation: int, manifest: Manifest) -> Any:
    """What a manifest says of a file of a fold. CorruptError where the file is damaged."""
    index = Index.open(path, verify=True)
    end = int(index.trailer["segment_bytes"])
    data = memoryview(path.read_bytes())
    if native.scan(data[:end], manifest.group_id, number)[0]["end"] != end:
        raise errors.CorruptError(f"{path.name} is damaged too")
    block = native.parse_fold(data[:end])
    if block is None or int(block["generation"]) != generation:
        raise errors.CorruptError(f"{path.name} is no fold")
    horizon = Position.of(block["horizon"])
    if horizon > manifest.horizon:
        raise errors.CorruptError(f"{path.name} was folded past the horizon that is known")
    builder = folded_builder(data[:end], manifest.group_id, number, horizon)
    entry = np.zeros((), layout.MANIFEST_SEGMENT)
    entry["segment"], entry["generation"], entry["records"] = number, generation, builder.records
    entry["file_bytes"], entry["data_end"] = len(data), end
    last = Position.of(block["end"])
    first = Position(*builder.first) if builder.records else last
    entry["first"], entry["last"] = first.raw, last.raw
    entry["data_bytes"] = builder.data_bytes
    trailer = bytes(data[-layout.INDEX_TRAILER.itemsize :])
    entry["index_digest"] = np.frombuffer(digest(trailer), np.uint8)
    return entry


def _with_open(directory: Path, group_id: bytes, manifest: Manifest, lease: Lease) -> Manifest:
    """The segments that were appended since, each closed, cut behind its last whole commit. Numbers
    may be missing: a segment without records is not kept."""
    files, first = Files(), manifest.active_segment or manifest.next_segment
    found = (_SEGMENT.fullmatch(path.name) for path in directory.glob("seg-*"))
    numbers = sorted(int(m[1], 16) for m in found if m and not m[2] and int(m[1], 16) >= first)
    if manifest.active_segment and not numbers:
        raise errors.CorruptError(f"segment {first:08x}, which was appended to, is missing too")
    for number in numbers:
        last = Position.of(manifest.segments[-1]["last"]) if len(manifest.segments) else Position()
        with segment_path(directory, number).open("rb") as file:
            head = file.read(layout.SEGMENT_HEADER.itemsize)
        after = Position.of(native.parse_header(head)["after"])
        if after != last:
            raise errors.CorruptError(
                f"segment {number:08x} goes on from {after}, but {last} is the last before it"
            )
        here = replace(manifest, active_segment=number, next_segment=number + 1)
        rows, _last, _stream = close_open_segment(
            directory, group_id, here, files, lease.aging.now_ns()
        )
        manifest = replace(here, segments=rows)
    return replace(manifest, active_segment=0)


def _require_epochs(paths: SitePaths, directory: Path, manifest: Manifest, name: str) -> None:
    known = {entry.epoch for entry in manifest.epochs}
    ids = {entry.epoch_id.hex() for entry in manifest.epochs}
    used = {int(row["last"]["epoch"]) for row in manifest.segments}
    for view in view_directories(paths):
        record = view.load()
        of_this = record.group_id == manifest.group_id.hex() and record.kind == "failover"
        if of_this and record.epoch_id not in ids:
            used.add(0)
    if used - known:
        raise errors.CorruptError(
            f"{name} is damaged, and an epoch of {directory.name} may stand in it alone: who may "
            "write is not known without it"
        )


def folded_builder(
    data: memoryview, group_id: bytes, number: int, horizon: Position
) -> IndexBuilder:
    """As a fold makes it: of all times only that of the horizon's own record is kept."""
    builder = IndexBuilder(number, group_id, None)
    _result, commits = native.scan(data, group_id, number, commits=True)
    for commit in commits:
        start, end = int(commit["start"]), int(commit["end"])
        if end == start:
            continue
        builder.add(data[start:end], start)
        headers = record.scan(data[start:end])[0]["header"]
        here = headers[(headers["epoch"] == horizon.epoch) & (headers["seq"] == horizon.seq)]
        here = here[~np.isin(here["kind"], (layout.KIND_STREAM, layout.KIND_TALLY))]
        if len(here):
            builder.time(int(here[0]["wall_ns"]), *horizon)
    return builder
