"""Seal a base: ``python -m vrep.recovery.base DIR``, with a `BasePlan` on its standard input.

What the old disks of a group hold and its store here does not show becomes SYNC records of the
site's last epoch, at positions behind what the store has and before the fork, in a gap. What they
are for, and why none of it is a recovery point, is said in `vrep.target.base`, which runs this
program and appends what it writes.

There are as many positions as the site used up to the fork, which is as many as it takes to write
that again in one piece each. Where they are not enough, neighbours become one record with what lies
between them, and at last the end is left out: it is sent. What the store shows is compared with the
disk's bytes, not with hashes; what cannot be read there differs.

This process holds the data key, and nobody else at the site does. Memory: 16 bytes for each run of
blocks that is sealed, 24 for each record, some records at a time, and one window of what is
compared. Sizes are bytes.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from vrep import errors
from vrep._core import layout, record
from vrep._core.seal import Sealer
from vrep.keys.datakey import DataKey, inspect_wrapped, unwrap_data_key
from vrep.keys.tenant import TenantKeyring
from vrep.lanes import lane_of
from vrep.paths import SitePaths
from vrep.recovery.access import KeyAccess
from vrep.recovery.fetch import Fetcher
from vrep.target.base import BASE_FRAME, FRAME_END, BaseDisk, BasePlan
from vrep.target.reader import StoreReader

__all__ = ["seal_base"]

UNIT: Final = layout.HASH_BLOCK_BYTES
WINDOW_BYTES: Final = 4 << 20
"""compared at once"""
APART_BYTES: Final = 64 << 10
"""runs that are nearer than this to each other are one"""
RECORD_BYTES: Final = 1 << 20
"""a hash piece is of one record, so that a large one would cost an answer much"""
BATCH_BYTES: Final = 8 << 20
BATCH_RECORDS: Final = 256
TALLY_BYTES: Final = 256
NICE: Final = 10
"""guests of this site go first; but the VM that waits for this runs unprotected"""

Runs = NDArray[np.int64]
"""rows of (start, end), rising, in whole units but for the end of a disk"""

log = logging.getLogger("vrep.recovery")


@dataclass
class Batch:
    """Records that are sealed; `done` of `total` bytes of the work are behind."""

    done: int
    total: int
    data: memoryview


def seal_base(paths: SitePaths, plan: BasePlan) -> Iterator[Batch]:
    """The records of a base, some at a time; batches without data tell how far it is.
    TenantKeyError without the tenant's key; StorageError when a disk cannot be read."""
    key = _newest_key(paths, plan)
    files = {disk.index: _open(disk) for disk in plan.disks}
    try:
        sizes = {disk.index: min(disk.bytes, _size(files[disk.index])) for disk in plan.disks}
        found: dict[int, Runs] = {}
        with StoreReader(paths.store, bytes.fromhex(plan.group_id)) as reader:
            fetcher = _fetcher(paths, plan, reader)
            total, behind = sum(sizes.values()), 0
            for disk, size in sizes.items():
                rows = array("q")
                for start, end in _differing(files[disk], disk, size, fetcher):
                    if end > start:
                        _join(rows, start, end)
                    yield Batch(behind + end, 2 * total, memoryview(b""))
                found[disk] = np.array(rows, np.int64).reshape(-1, 2)
                behind += size
        pieces = _fit(found, plan.last - plan.after - 2)
        yield from _seal(plan, key, files, pieces)
    finally:
        for fd in files.values():
            os.close(fd)


def _newest_key(paths: SitePaths, plan: BasePlan) -> DataKey:
    """The newest data key that the new writer holds."""
    blob = max(plan.wrapped_keys, key=lambda blob: inspect_wrapped(blob).generation)
    tenant = TenantKeyring(paths.root).find(inspect_wrapped(blob).tenant_key_id)
    return unwrap_data_key(blob, tenant, group_id=bytes.fromhex(plan.group_id))


def _fetcher(paths: SitePaths, plan: BasePlan, reader: StoreReader) -> Fetcher | None:
    """Reads what the store shows at its end; None when it is empty."""
    if not reader.durable.epoch:
        return None
    access = KeyAccess.open(paths, reader.group_id, reader.wrapped_keys)
    return Fetcher(reader, reader.extent_map(reader.durable_of(plan.epoch)), access)


def _open(disk: BaseDisk) -> int:
    try:
        fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    except OSError as error:
        raise errors.StorageError(f"{disk.path}: {error.strerror or error}") from None
    return fd


def _size(fd: int) -> int:
    return os.lseek(fd, 0, os.SEEK_END)


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a disk holds data, in whole units."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            start, end = at, size  # a device does not say
        start = max(at, start // UNIT * UNIT)
        at = min(-(-end // UNIT) * UNIT, size)
        if start < at:
            yield start, at


def _differing(fd: int, disk: int, size: int, fetcher: Fetcher | None) -> Iterator[tuple[int, int]]:
    """Runs of units in which a disk's data are not what the store shows; empty ones tell where
    the comparing is."""
    for start, end in _extents(fd, size):
        if fetcher is None:
            yield start, end
            continue
        for at in range(start, end, WINDOW_BYTES):
            length = min(WINDOW_BYTES, end - at)
            yield from _compare(fd, disk, at, length, fetcher)
            yield at + length, at + length


def _compare(
    fd: int, disk: int, at: int, length: int, fetcher: Fetcher
) -> Iterator[tuple[int, int]]:
    held = _units(_read(fd, at, length))
    try:
        shown = fetcher.read(disk, at, length)
    except errors.IntegrityError as error:
        log.warning("the store is damaged: %s", error)
        yield at, at + length
        return
    wrong = held if shown is None else held ^ _units(shown)
    differs = wrong.any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], differs, [False]))))
    for first, last in edges.reshape(-1, 2).tolist():
        yield at + first * UNIT, min(at + last * UNIT, at + length)


def _units(data: bytes | bytearray) -> NDArray[np.uint64]:
    """As rows of one unit; the last one is filled up with zeroes."""
    if len(data) % UNIT:
        data = bytes(data) + bytes(-len(data) % UNIT)
    return np.frombuffer(data, np.uint64).reshape(-1, UNIT // 8)


def _read(fd: int, at: int, length: int) -> bytes:
    try:
        data = os.pread(fd, length, at)
    except OSError as error:
        raise errors.StorageError(f"the old disk at {at}: {error.strerror or error}") from None
    if len(data) != length:
        raise errors.StorageError(f"the old disk ends at {at + len(data)}")
    return data


def _join(rows: array[int], start: int, end: int) -> None:
    if rows and start - rows[-1] < APART_BYTES:
        rows[-1] = end
    else:
        rows.extend((start, end))


# ---- records ------------------------------------------------------------------------------


def _merged(runs: Runs, apart: int) -> Runs:
    """Runs of which neighbours nearer than some bytes are one."""
    if not len(runs):
        return runs
    far = runs[1:, 0] - runs[:-1, 1] >= apart
    starts = np.concatenate((runs[:1, 0], runs[1:, 0][far]))
    ends = np.concatenate((runs[:-1, 1][far], runs[-1:, 1]))
    return np.stack((starts, ends), 1)


def _fit(found: dict[int, Runs], most: int) -> Runs:
    """Rows of disk, offset and length, one for each record, so many at most."""
    apart, size = APART_BYTES, RECORD_BYTES
    while True:
        merged = {disk: _merged(runs, apart) for disk, runs in found.items()}
        count = sum(int(-(-(runs[:, 1] - runs[:, 0]) // size).sum()) for runs in merged.values())
        if count <= most or size == layout.WRITE_BYTES_MAX:
            break
        apart, size = 2 * apart, 2 * size
    parts = [_cut(disk, runs, size) for disk, runs in merged.items()]
    return np.concatenate([np.zeros((0, 3), np.int64), *parts])[: max(most, 0)]


def _cut(disk: int, runs: Runs, size: int) -> Runs:
    """Rows of disk, offset and length that cover some runs, none longer than `size`."""
    counts = -(-(runs[:, 1] - runs[:, 0]) // size)
    inside = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(runs[:, 0], counts) + size * inside
    ends = np.minimum(starts + size, np.repeat(runs[:, 1], counts))
    return np.stack((np.full(len(starts), disk), starts, ends - starts), 1)


def _seal(plan: BasePlan, key: DataKey, files: dict[int, int], pieces: Runs) -> Iterator[Batch]:
    """A stream with its gap-begin, the copies and tallies; nothing when there is no copy."""
    if not len(pieces):
        return
    stream_id = secrets.token_bytes(16)
    sealer = Sealer(
        key.stream_key(stream_id),
        stream_id,
        epoch=plan.epoch,
        lane=lane_of(plan.name),
        resume_seq=plan.after,
        secret=key.hash_secret(),
        level=plan.compression,
    )
    total, behind = int(pieces[:, 2].sum()), 0
    body = np.zeros((), layout.STREAM)
    body["epoch_id"] = np.frombuffer(bytes.fromhex(plan.epoch_id), np.uint8)
    body["key_generation"], body["wall_ns"] = key.generation, plan.wall_ns
    body["parent"] = plan.parent.raw
    room = memoryview(bytearray(1024))
    written = sealer.stream(body, room)
    begin = _headers(plan, np.zeros((1, 3), np.int64), layout.KIND_GAP_BEGIN, plan.after + 1)
    size, _done = sealer.seal(begin, [None], room[written:])
    yield Batch(total, 2 * total, room[: written + size])
    at = 0
    while at < len(pieces):
        chosen = pieces[at : at + _count(pieces, at)]
        headers = _headers(plan, chosen, layout.KIND_SYNC, plan.after + 2 + at)
        rows = chosen.tolist()
        bound = sum(
            record.bound(layout.KIND_SYNC, offset, length) for _disk, offset, length in rows
        )
        room = memoryview(bytearray(bound + TALLY_BYTES))
        data = [_read(files[disk], offset, length) for disk, offset, length in rows]
        written, done = sealer.seal(headers, data, room)
        if done != len(rows):
            raise errors.StateError(f"{done} of {len(rows)} records could be sealed")
        written += sealer.tally(room[written:], wall_ns=plan.wall_ns)
        at += done
        behind += int(chosen[:, 2].sum())
        yield Batch(total + behind, 2 * total, room[:written])


def _count(pieces: Runs, at: int) -> int:
    """How many of what comes next are sealed at once: one at least."""
    sizes = np.cumsum(pieces[at : at + BATCH_RECORDS, 2])
    return max(1, int(np.searchsorted(sizes, BATCH_BYTES, "right")))


def _headers(plan: BasePlan, pieces: Runs, kind: int, seq: int) -> Any:
    rows = np.zeros(len(pieces), layout.RECORD)
    rows["kind"] = kind
    rows["disk"], rows["offset"], rows["length"] = pieces.T
    rows["seq"] = seq + np.arange(len(pieces))
    rows["wall_ns"] = plan.wall_ns
    return rows


# ---- the program ---------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Write the base of the plan on standard input to standard output."""
    paths = SitePaths.of(arguments[0])
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=BasePlan)
    os.nice(NICE)
    out = sys.stdout.buffer
    for batch in seal_base(paths, plan):
        out.write(BASE_FRAME.pack(batch.done, batch.total, len(batch.data)))
        out.write(batch.data)
        out.flush()
    out.write(BASE_FRAME.pack(1, 1, FRAME_END))
    out.flush()
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:
        os._exit(1)  # nobody listens any more
    except errors.VrepError as error:
        log.error("the old disks are not sealed: %s", error)
        sys.exit(error.exit_code)
