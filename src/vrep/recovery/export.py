"""Export: a group's disks at a point, as files that need nothing of vrep.

The whole history is checked first (see `check`), and the point is read through the indexes that
this check compared with their records, so an index that leaves something out is noticed; every
piece is authenticated as it is read. Files are sparse and only their owner's (mode 0600); each
gets its name only when it is whole and synced, and an existing file is never replaced. Sizes are
bytes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from vrep import errors
from vrep._core.index import ExtentMap, Index
from vrep.durable import sync_directory
from vrep.paths import SitePaths
from vrep.recovery.access import KeyAccess
from vrep.recovery.check import Verdict, check_history
from vrep.recovery.fetch import Fetcher
from vrep.recovery.held import find_group
from vrep.recovery.history import format_time, resolve
from vrep.recovery.object_records import objects_at, write_objects
from vrep.target.manifest import DiskEntry, Position
from vrep.target.reader import StoreReader

__all__ = ["ExportResult", "ExportedDisk", "ExportedObject", "export"]

FORMATS: Final = ("raw", "qcow2")
CHUNK_BYTES: Final = 4 << 20
OBJECTS: Final = "objects"
"""directory of the objects, beside the disks; not there when there are none"""
HOLE_BYTES: Final = 4 << 10
WORKERS: Final = 2
Progress = Callable[[str, int, int], None]
"""what is done ("check" or a disk's name), bytes so far, bytes in all"""


class ExportedDisk(msgspec.Struct, frozen=True):
    """A disk that was written."""

    name: str
    path: str
    bytes: int
    """size of the disk"""
    data_bytes: int
    """of it that are not holes in a raw file"""
    sha256: str | None


class ExportedObject(msgspec.Struct, frozen=True):
    """An object that was written."""

    name: str
    path: str
    bytes: int


class ExportResult(msgspec.Struct, frozen=True):
    """What was exported."""

    group: str
    group_id: str
    point: str
    time: str
    format: str
    disks: list[ExportedDisk]
    objects: list[ExportedObject]
    bytes: int
    seconds: float
    verdict: Verdict


def export(
    paths: SitePaths,
    group: str,
    at: str,
    out: Path,
    format: str = "raw",
    *,
    progress: Progress | None = None,
    sha256: bool = False,
) -> ExportResult:
    """Write every disk of a group at a point into the directory `out`."""
    if format not in FORMATS:
        raise errors.InvalidError(f"the format {format!r}: use {' or '.join(FORMATS)}")
    if format == "qcow2" and shutil.which("qemu-img") is None:
        raise errors.UnsupportedError("qcow2 needs qemu-img (package qemu-utils): it is missing")
    began = time.monotonic()
    held = find_group(paths, group)
    with StoreReader(paths.store, held.group_id) as reader:
        access = KeyAccess.open(paths, held.group_id, reader.wrapped_keys)
        point = resolve(reader, at, access, time.time_ns())
        targets = [
            (disk, out / f"{disk.name}.{format}") for disk in reader.disks_at(point.position)
        ]
        beside = out / OBJECTS
        for path in (*(path for _disk, path in targets), beside):
            if path.exists() or path.is_symlink():
                raise errors.ExistsError(f"{path}: an export never replaces a file")
        verdict = check_history(
            paths,
            reader,
            access,
            progress=None if progress is None else lambda d, t: progress("check", d, t),
        )
        objects = objects_at(reader, access, point.position)
        fetcher = Fetcher(reader, _checked_map(reader, point.position), access)
        disks = []
        with _storage(out):
            out.mkdir(parents=True, exist_ok=True)
            for disk, path in targets:
                disks.append(_export_disk(fetcher, disk, path, format, progress, sha256))
            written = write_objects(objects, beside)
            sync_directory(out)
    return ExportResult(
        group=held.name,
        group_id=held.hex,
        point=f"pos:{point.position}",
        time=format_time(point.wall_ns),
        format=format,
        disks=disks,
        objects=[ExportedObject(info.name, str(path), info.bytes) for info, path in written],
        bytes=sum(disk.bytes for disk in disks),
        seconds=round(time.monotonic() - began, 3),
        verdict=verdict,
    )


def _checked_map(reader: StoreReader, point: Position) -> ExtentMap:
    """The map of a point out of the segments' own indexes: runs are only a short cut."""
    active = reader.manifest.active_segment
    indexes = [Index.open(reader.path(int(entry["segment"]))) for entry in reader.manifest.segments]
    indexes += [index for index in reader.indexes if active and index.segment == active]
    return ExtentMap(indexes, reader.ancestry(point), group_id=reader.group_id)


@contextlib.contextmanager
def _storage(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise errors.StorageError(f"{out}: there is no space left") from None
        raise errors.StorageError(f"{out}: {error.strerror or error}") from None


def _export_disk(
    fetcher: Fetcher,
    disk: DiskEntry,
    path: Path,
    format: str,
    progress: Progress | None,
    sha256: bool,
) -> ExportedDisk:
    """Write one disk. On any error nothing of it is left."""
    raw = path.parent / f".{disk.name}.{secrets.token_hex(6)}.raw.partial"
    final = raw
    try:
        fd = os.open(raw, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, disk.bytes)
            data_bytes = _copy(fetcher, disk, fd, progress)
            os.fsync(fd)
        finally:
            os.close(fd)
        digest = _digest(raw) if sha256 else None
        if format == "qcow2":
            final = raw.with_suffix(".qcow2")
            _convert(raw, final)
        try:
            os.link(final, path)
        except FileExistsError:
            raise errors.ExistsError(f"{path}: an export never replaces a file") from None
    finally:
        raw.unlink(missing_ok=True)
        final.unlink(missing_ok=True)
    return ExportedDisk(disk.name, str(path), disk.bytes, data_bytes, digest)


def _copy(fetcher: Fetcher, disk: DiskEntry, fd: int, progress: Progress | None) -> int:
    """Every written range of a disk into a file that reads zero; bytes written."""
    total = 0
    window: deque[tuple[int, Future[int]]] = deque()

    def finish() -> int:
        at, future = window.popleft()
        written = future.result()
        if progress is not None:
            progress(disk.name, at, disk.bytes)
        return written

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="export") as pool:
        try:
            at = fetcher.next_written(disk.index, 0)
            while at is not None and at < disk.bytes:
                length = min(CHUNK_BYTES - at % CHUNK_BYTES, disk.bytes - at)
                window.append((at + length, pool.submit(_chunk, fetcher, disk, fd, at, length)))
                if len(window) > 2 * WORKERS:
                    total += finish()
                at = fetcher.next_written(disk.index, at + length)
            while window:
                total += finish()
        except BaseException:
            for _at, future in window:
                future.cancel()
            raise
    if progress is not None:
        progress(disk.name, disk.bytes, disk.bytes)
    return total


def _chunk(fetcher: Fetcher, disk: DiskEntry, fd: int, at: int, length: int) -> int:
    data = fetcher.read(disk.index, at, length)
    if data is None:
        return 0
    written = 0
    with memoryview(data) as view:
        for start, end in _solid(data):
            _write(fd, view[start:end], at + start)
            written += end - start
    return written


def _solid(data: bytearray) -> list[tuple[int, int]]:
    """Where a chunk is not zero, by blocks of HOLE_BYTES."""
    whole = len(data) - len(data) % HOLE_BYTES
    blocks = np.frombuffer(data, np.uint64, whole // 8).reshape(-1, HOLE_BYTES // 8)
    solid = np.concatenate([[False], blocks.any(axis=1), [any(data[whole:]), False]])
    edges = np.flatnonzero(solid[1:] != solid[:-1]).reshape(-1, 2) * HOLE_BYTES
    return [(int(start), min(int(end), len(data))) for start, end in edges]


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(raw: Path, final: Path) -> None:
    """A sparse raw file into qcow2."""
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(final)]
    # What it makes is the tenant's plaintext, nobody else's from its first byte on.
    done = subprocess.run(command, capture_output=True, text=True, check=False, umask=0o077)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise errors.StorageError(f"qemu-img convert failed: {lines[-1]}")
    fd = os.open(final, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
