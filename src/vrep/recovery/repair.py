"""Repair: what of a damaged store can be made again from what is whole.

Indexes at the ends of segments are made again out of the records before them, merged runs are
dropped (the target merges them anew), and one manifest names what stands now. Records are made by
their source alone: a segment of which some are damaged or missing is named, with its positions, and
nothing is changed; `start_over` sets the whole store aside, so that the source sends every block
again into a new one, and no point is offered before that has ended.

It holds the store's lock: the target's process must not have the group open. Each step can be
repeated: a crash leaves a store that is damaged as before, or less. Sizes are bytes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vrep import errors
from vrep._core import layout, record
from vrep._core import segment as native
from vrep._core.index import Index, IndexBuilder
from vrep.durable import make_private_directory, sync_directory
from vrep.paths import SitePaths
from vrep.recovery.held import held_groups
from vrep.target import runs
from vrep.target.files import Files
from vrep.target.lease import Lease
from vrep.target.manifest import Manifest, Position
from vrep.target.segment import (
    entry_path,
    index_tail,
    run_path,
    scan_tail,
    write_footer,
)

__all__ = ["Lost", "RepairReport", "repair"]


class Lost(msgspec.Struct, frozen=True):
    """A file of which records are lost, and the positions that it held."""

    object: str
    first: str
    last: str
    text: str


class RepairReport(msgspec.Struct, frozen=True):
    """What was repaired, and what cannot be."""

    group: str
    group_id: str
    repaired: list[str]
    """names of files that were made again, or are not needed any more"""
    lost: list[Lost]
    set_aside: str
    """where the damaged store is now; empty: where it was"""


def repair(paths: SitePaths, group: str, *, start_over: bool = False) -> RepairReport:
    """Repair the store of a group (its name or id). LockedError while the target has it open."""
    group_id, name = _find(paths, group)
    directory = paths.store / group_id.hex()
    try:
        lease = Lease(directory, group_id, Files(), time.time_ns)
    except errors.LockedError:
        raise errors.LockedError(
            f"the target's process has {name!r} open: stop it, repair, and start it again"
        ) from None
    try:
        repaired: list[str] = []
        try:
            lost = _repair(directory, group_id, lease, repaired)
        except errors.IntegrityError as error:  # the manifest: nothing says what there should be
            lost = [Lost("manifest", "", "", error.detail)]
        except OSError as error:
            raise errors.StorageError(f"{directory}: {error.strerror or error}") from None
        aside = _set_aside(paths, directory) if lost and start_over else ""
    finally:
        lease.close()
    return RepairReport(name, group_id.hex(), repaired, lost, aside)


def _find(paths: SitePaths, group: str) -> tuple[bytes, str]:
    """A group that may be too damaged to tell its name: then its id is asked for."""
    unknown = []
    for group_id, held in held_groups(paths):
        if isinstance(held, errors.IntegrityError):
            unknown.append(group_id.hex())
        elif held.name == group:
            return group_id, held.name
        if group_id.hex() == group:
            return group_id, group
    more = f"; of these the name cannot be read: {', '.join(unknown)}" if unknown else ""
    raise errors.NotFoundError(f"this site holds no history of a group {group!r}{more}")


def _repair(directory: Path, group_id: bytes, lease: Lease, repaired: list[str]) -> list[Lost]:
    manifest = lease.load()
    lost: list[Lost] = []
    rows = manifest.segments.copy()
    broken = []
    for at, entry in enumerate(manifest.segments):
        path = entry_path(directory, entry)
        try:
            data = _records(path, group_id, entry)
        except (errors.IntegrityError, OSError) as error:
            first, last = Position.of(entry["first"]), Position.of(entry["last"])
            text = str(error) if isinstance(error, OSError) else error.detail
            lost.append(Lost(path.name, f"pos:{first}", f"pos:{last}", text))
            continue
        if not _index_whole(path, entry):
            broken.append((at, path, data))
    lost += _open_segment(directory, group_id, manifest)
    kept = np.array([_run_whole(directory, row) for row in manifest.runs], bool)
    if lost or (not broken and kept.all()):
        return lost  # what is lost is not made good by halves
    for at, path, data in broken:
        stream = _stream_before(directory, rows, at)
        rows[at] = _write_index(path, data, group_id, rows[at], manifest, stream)
        repaired.append(path.name)
    repaired += [run_path(directory, int(r["run"])).name for r in manifest.runs[~kept]]
    lease.publish(segments=rows, runs=manifest.runs[kept])
    return []


def _records(path: Path, group_id: bytes, entry: Any) -> bytes:
    """The records of a closed segment, every digest checked; CorruptError, OSError."""
    end = int(entry["data_end"])
    with path.open("rb") as file:
        data = file.read(end)
    if len(data) < end:
        raise errors.CorruptError(f"it has {len(data)} bytes, not {end}")
    result, _commits = native.scan(data, group_id, int(entry["segment"]))
    if result["end"] != end:
        raise errors.CorruptError(f"damaged at byte {result['wrong_at']} of {end}")
    if Position(result["last"][0], 0, result["last"][1]) > Position.of(entry["last"]):
        raise errors.CorruptError("it is another segment")
    return data


def _index_whole(path: Path, entry: Any) -> bool:
    try:
        runs.check_file(path, int(entry["file_bytes"]))
        index = Index.open(path, verify=True)
    except errors.IntegrityError:
        return False
    return bool(index.digest == entry["index_digest"].tobytes())


def _run_whole(directory: Path, row: Any) -> bool:
    path = run_path(directory, int(row["run"]))
    try:
        runs.check_file(path, int(row["file_bytes"]))
        return bool(Index.open(path, verify=True).digest == row["index_digest"].tobytes())
    except (errors.IntegrityError, OSError):
        return False


def _open_segment(directory: Path, group_id: bytes, manifest: Manifest) -> list[Lost]:
    """The segment that is being appended needs no index; its records must be there."""
    if not manifest.active_segment:
        return []
    path = directory / f"seg-{manifest.active_segment:08x}"
    after = Position.of(manifest.segments[-1]["last"]) if len(manifest.segments) else Position()
    try:
        scan_tail(memoryview(path.read_bytes()), group_id, manifest.active_segment)
    except (errors.IntegrityError, OSError) as error:
        text = str(error) if isinstance(error, OSError) else error.detail
        return [Lost(path.name, f"pos:{after}", "", text)]
    return []


def _stream_before(directory: Path, rows: Any, at: int) -> Any:
    """The stream in force at the end of the segment before: its index is whole, or made again."""
    if not at:
        return None
    index = Index.open(entry_path(directory, rows[at - 1]))
    return index.streams[-1].copy() if len(index.streams) else None


def _write_index(
    path: Path, data: bytes, group_id: bytes, entry: Any, manifest: Manifest, stream: Any
) -> Any:
    """A new file in the place of a segment's: its records, and their index made again. Its entry
    in the manifest."""
    files, number = Files(), int(entry["segment"])
    view = memoryview(data)
    if int(entry["generation"]):
        builder = _folded_builder(view, group_id, number, manifest.horizon)
    else:
        scan = scan_tail(view, group_id, number)
        builder = index_tail(
            view, scan, group_id, stream if scan.header["stream_id"].any() else None
        )
    aside = path.with_name(f".{path.name}.repair.tmp")
    aside.unlink(missing_ok=True)
    fd = files.create(aside)
    try:
        files.write(fd, [view], 0)
        made = write_footer(files, fd, builder, Position.of(entry["last"]), len(data))
    finally:
        os.close(fd)
    aside.replace(path)
    files.sync_directory(path.parent)
    made["generation"] = entry["generation"]
    made["first"] = entry["first"]
    return made


def _folded_builder(
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


def _set_aside(paths: SitePaths, directory: Path) -> str:
    """Move a store away; its group's source finds none, and sends everything again."""
    if runs.pinned(directory):
        raise errors.BusyError("a recovery reads the history of this group: end it first")
    where = make_private_directory(paths.root / "damaged")
    target = where / f"{directory.name}-{time.time_ns()}"
    try:
        directory.rename(target)
    except OSError as error:
        raise errors.StorageError(f"{target}: {error.strerror or error}") from None
    sync_directory(where)
    sync_directory(directory.parent)
    return str(target)
