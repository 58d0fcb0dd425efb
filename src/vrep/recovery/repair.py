"""Repair: what of a damaged store can be made again from what is whole.

Indexes at the ends of segments are made again out of the records before them, merged runs are
dropped (the target merges them anew), a damaged manifest is made again from the one before it and
the segments (`rebuild`), and one manifest names what stands now. Records are made by their source
alone: a segment of which some are damaged or missing is named, with its positions, and nothing is
changed. Then `resend` keeps the points before the first loss, salvages what is sound behind it, and
lets the source send again what differs from both; `start_over` sets the whole store aside, so that
the source sends every block again into a new one, and no point is offered before that has ended.

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
from vrep._core import segment as native
from vrep._core.index import Index
from vrep.durable import sync_directory
from vrep.paths import SitePaths
from vrep.recovery.held import held_groups
from vrep.recovery.rebuild import folded_builder, rebuild_manifest
from vrep.recovery.resend import aside_directory, keep_sound
from vrep.recovery.unreadable import require_readable
from vrep.target import runs
from vrep.target.files import Files
from vrep.target.lease import Lease
from vrep.target.manifest import Manifest, Position
from vrep.target.segment import (
    aged_at,
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
    """where the damaged store, or what of it is not used any more, is now; empty: where it was"""
    kept_to: str = ""
    """every point up to here was kept, and the source sends again what differs; empty: all, or
    none"""
    salvaged_bytes: int = 0
    """data behind the first loss that were kept: the source need not send them, if its disks still
    hold them"""
    compared_bytes: int | None = None
    """of its disks, that the source will read and compare; None: all, since what was lost is not
    known, or nothing was"""


def repair(
    paths: SitePaths, group: str, *, resend: bool = False, start_over: bool = False
) -> RepairReport:
    """Repair the store of a group (its name or id). LockedError while the target has it open;
    StateError when `resend` would keep nothing that its source can go on from."""
    if resend and start_over:
        raise errors.InvalidError("what is sound is kept, or all is begun anew: not both")
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
        kept_to = aside = ""
        salvaged, compared = 0, None
        try:
            lease = _loaded(paths, directory, group_id, lease, repaired)
            lost, first = _repair(directory, group_id, lease, repaired, anyway=resend)
            if lost and resend:
                kept = keep_sound(
                    paths,
                    group_id,
                    lease,
                    first,
                    lambda at: _stream_before(directory, lease.manifest.segments, at),
                )
                _forget_checks(paths, group_id)
                kept_to = f"pos:{kept.end}" if kept.end.seq else ""
                salvaged, compared = kept.salvaged_bytes, kept.compared_bytes
                aside = str(kept.aside)
        except errors.IntegrityError as error:  # the manifest: nothing says what there should be
            lost = [Lost("manifest", "", "", error.detail)]
        except OSError as error:
            raise errors.StorageError(f"{directory}: {error.strerror or error}") from None
        if lost and start_over:
            aside = _set_aside(paths, directory)
    finally:
        lease.close()
    return RepairReport(name, group_id.hex(), repaired, lost, aside, kept_to, salvaged, compared)


def _loaded(
    paths: SitePaths, directory: Path, group_id: bytes, lease: Lease, repaired: list[str]
) -> Lease:
    """The lease with its newest manifest, made again if need be."""
    try:
        lease.load()
    except errors.IntegrityError as error:
        repaired.append(rebuild_manifest(paths, directory, group_id, lease, error))
    return lease


def _forget_checks(paths: SitePaths, group_id: bytes) -> None:
    """How far the history was checked before: it ends earlier now, with the operator's will."""
    for path in (paths.root / "checked").glob(f"{group_id.hex()}.*.json"):
        path.unlink(missing_ok=True)


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


def _repair(
    directory: Path, group_id: bytes, lease: Lease, repaired: list[str], *, anyway: bool
) -> tuple[list[Lost], int]:
    """What is lost, and the row of the first of it; `anyway`: what stands before it is repaired."""
    manifest = lease.manifest
    first = len(manifest.segments)
    lost: list[Lost] = []
    rows = manifest.segments.copy()
    broken = []
    for at, entry in enumerate(manifest.segments):
        path = entry_path(directory, entry)
        try:
            data = _records(path, group_id, entry)
        except (errors.IntegrityError, OSError) as error:
            begins, ends = Position.of(entry["first"]), Position.of(entry["last"])
            text = str(error) if isinstance(error, OSError) else error.detail
            lost.append(Lost(path.name, f"pos:{begins}", f"pos:{ends}", text))
            first = min(first, at)
            continue
        if not _index_whole(path, entry):
            broken.append((at, path, data))
    lost += _open_segment(directory, group_id, manifest)
    kept = np.array([_run_whole(directory, row) for row in manifest.runs], bool)
    broken = [each for each in broken if each[0] < first]
    if (lost and not anyway) or (not broken and kept.all()):
        return lost, first  # what is lost is not made good by halves
    for at, path, data in broken:
        stream = _stream_before(directory, rows, at)
        rows[at] = _write_index(path, data, group_id, rows[at], lease, stream)
        repaired.append(path.name)
    repaired += [run_path(directory, int(r["run"])).name for r in manifest.runs[~kept]]
    lease.publish(segments=rows, runs=manifest.runs[kept])
    return lost, first


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
        require_readable(path, int(entry["data_end"]))
        index = Index.open(path, verify=True)
    except (errors.IntegrityError, OSError):
        return False
    return bool(index.digest == entry["index_digest"].tobytes())


def _run_whole(directory: Path, row: Any) -> bool:
    path = run_path(directory, int(row["run"]))
    try:
        runs.check_file(path, int(row["file_bytes"]))
        require_readable(path)
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
    path: Path, data: bytes, group_id: bytes, entry: Any, lease: Lease, stream: Any
) -> Any:
    """A new file in the place of a segment's: its records, and their index made again. Its entry
    in the manifest."""
    files, number = Files(), int(entry["segment"])
    view = memoryview(data)
    if int(entry["generation"]):
        builder = folded_builder(view, group_id, number, lease.manifest.horizon)
    else:
        scan = scan_tail(view, group_id, number)
        builder = index_tail(
            view, scan, group_id, stream if scan.header["stream_id"].any() else None
        )
    builder.aged(_aged(path, entry, lease))
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


def _aged(path: Path, entry: Any, lease: Lease) -> int:
    """When a segment was closed, as the trailer of its index still says; else now: it is kept for
    longer then."""
    now_ns = lease.aging.now_ns()
    try:
        return min(now_ns, aged_at(path.parent, entry) or now_ns)
    except (errors.IntegrityError, OSError):
        return now_ns


def _set_aside(paths: SitePaths, directory: Path) -> str:
    """Move a store away; its group's source finds none, and sends everything again."""
    if runs.pinned(directory):
        raise errors.BusyError("a recovery reads the history of this group: end it first")
    target = aside_directory(paths, bytes.fromhex(directory.name))
    where = target.parent
    try:
        directory.rename(target)
    except OSError as error:
        raise errors.StorageError(f"{target}: {error.strerror or error}") from None
    sync_directory(where)
    sync_directory(directory.parent)
    return str(target)
