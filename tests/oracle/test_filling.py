"""Disks that are filled in place, against the laboratory's plain model: what is neither fetched nor
written was compared, what is fetched is little, and the disk is right whatever it held."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recovery_lab as lab_module

from vrep._core import layout
from vrep.recovery import compare, filling
from vrep.recovery.access import KeyAccess
from vrep.recovery.compare import Comparer
from vrep.recovery.fetch import Fetcher
from vrep.recovery.filling import FillCount, InPlace
from vrep.target.hashes import hash_piece
from vrep.target.manifest import DiskEntry, EpochState, Position
from vrep.target.reader import StoreReader
from vrep.target.segment import entry_path

UNIT = 4096
BLOCK = 65536
SIZE = 2 << 20
# Not multiples of a view's block, and one that is smaller than a record may be.
DISKS = [DiskEntry("root", (1 << 20) + 512, 0), DiskEntry("data", 300 * 1024 + 1536, 1)]


@dataclass
class Cost:
    """What filling a disk took."""

    count: FillCount
    read_bytes: int
    hash_bytes: int


@contextlib.contextmanager
def opened(lab: Any, point: Position) -> Iterator[tuple[Fetcher, Comparer]]:
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        access = KeyAccess.open(lab.paths, reader.group_id, reader.wrapped_keys)
        extents = reader.extent_map(point)
        yield Fetcher(reader, extents, access), Comparer(reader, extents, access)


def windows(rng: random.Random, size: int) -> Iterator[tuple[int, int]]:
    """As a view asks: ranges of whole blocks, in any order, each once."""
    at, ranges = 0, []
    while at < size:
        length = min(BLOCK * rng.choice([1, 1, 2, 5, 16]), size - at)
        ranges.append((at, length))
        at += length
    rng.shuffle(ranges)
    yield from ranges


def fill(lab: Any, point: Position, disk: int, path: Path) -> Cost:
    """Fill a file, as the filter writes what it is told to."""
    before = path.read_bytes()
    with opened(lab, point) as (fetcher, comparer):
        old = InPlace(disk, f"file:{path}", fetcher, comparer)
        fd = os.open(path, os.O_RDWR)
        try:
            for offset, length in windows(lab.rng, len(before)):
                data, parts = old.open(offset, length, old.find(offset, length))
                for at, size in parts:
                    assert offset <= at <= at + size <= offset + length
                    there = slice(at - offset, at - offset + size)
                    os.pwrite(fd, bytes(size) if data is None else data[there], at)
        finally:
            os.close(fd)
            old.close()
        return Cost(old.count, fetcher.read_bytes, comparer.hash_bytes)


def units(first: bytes | bytearray, second: bytes | bytearray) -> list[int]:
    """Where units begin that differ."""
    size = len(first)
    return [at for at in range(0, size, UNIT) if first[at : at + UNIT] != second[at : at + UNIT]]


def bytes_in(starts: list[int], size: int) -> int:
    return sum(min(UNIT, size - at) for at in starts)


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path, DISKS, rng, level=rng.choice([0, 1]))
    yield lab
    lab.close()


@pytest.mark.parametrize("old", ["older", "abandoned", "random", "empty", "torn"])
def test_a_disk_is_right_whatever_it_held(lab: Any, tmp_path: Path, old: str) -> None:
    good = lab_module.grow(lab)
    for point in [*lab.rng.sample(good, 3), good[-1]]:
        for disk, wanted in enumerate(lab.at(point)):
            held = bytearray(wanted)
            if old in ("older", "abandoned", "torn"):
                other = lab.rng.choice(good) if old == "abandoned" else good[len(good) // 3]
                found = lab.at(other)[disk][: len(wanted)]
                held[: len(found)] = found
            if old == "random":
                held = bytearray(lab.rng.randbytes(len(wanted)))
            if old == "empty":
                held = bytearray(len(wanted))
            if old == "torn":  # in sectors
                for at in range(0, len(held), 512):
                    if lab.rng.random() < 0.2:
                        held[at : at + 512] = wanted[at : at + 512]
            path = tmp_path / "old.raw"
            path.write_bytes(held)
            cost = fill(lab, point, disk, path)
            assert path.read_bytes() == wanted
            assert cost.count.written_bytes == bytes_in(units(held, wanted), len(wanted))
            again = fill(lab, point, disk, path)
            assert path.read_bytes() == wanted
            assert again.count.written_bytes == 0


def test_no_unit_is_right_that_differs(lab: Any) -> None:
    """By one bit anywhere, against what was compared."""
    lab_module.grow(lab)
    for disk in range(len(DISKS)):  # which may have left one with a few sectors, and no hash
        lab.resize(disk, max(lab.bytes_of(disk), 16 * UNIT + 512))
        lab.write(disk, 0, lab.rng.randbytes(8 * UNIT))
    point = lab.commit()
    for disk, wanted in enumerate(lab.at(point)):
        with opened(lab, point) as (_fetcher, comparer):
            proven = len(wanted) - sum(n for _at, n in comparer.differing(disk, 0, bytes(wanted)))
            assert proven >= 8 * UNIT
            for at in range(0, len(wanted), UNIT):
                held = bytearray(wanted)
                held[at + lab.rng.randrange(min(UNIT, len(wanted) - at))] ^= 1 << (at // UNIT % 8)
                runs = comparer.differing(disk, 0, held)
                assert any(start <= at < start + size for start, size in runs)


def away(lab: Any, changes: int, most: int = 256) -> tuple[bytes, bytes, Position]:
    """A disk as it was left and as it comes back, changed in single units elsewhere meanwhile. It
    came here in records of every size; what its own site wrote and nobody took is another thing."""
    lab.gap_begin()
    at = 0
    while at < SIZE:
        length = min(min(most, lab.rng.choice([1, 2, 16, 64, 256])) * UNIT, SIZE - at)
        lab.write(0, at, lab.rng.randbytes(length), layout.KIND_SYNC)
        at += length
    lab.gap_end()
    left = bytearray(lab.at(lab.commit())[0])
    for _ in range(10):  # left behind at the fork
        lab.write(0, lab.rng.randrange(SIZE // UNIT) * UNIT, lab.rng.randbytes(UNIT))
    abandoned = bytes(lab.at(lab.commit())[0])
    parent = Position(lab.epoch.epoch, 0, lab.seq - 10)
    assert lab.at(parent)[0] == left
    lab.new_epoch(lab.store.add_epoch(writer=b"n" * 16, parent=parent, state=EpochState.ACCEPTED))
    for at in lab.rng.sample(range(SIZE // UNIT), changes):
        lab.write(0, at * UNIT, lab.rng.randbytes(UNIT))
    point = lab.commit()
    return abandoned, bytes(lab.at(point)[0]), point


@pytest.fixture
def wide(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    disk = DiskEntry("root", SIZE, 0)
    lab = lab_module.Lab(tmp_path, [disk], rng, level=1)
    yield lab
    lab.close()


def test_what_is_fetched_is_what_differs(wide: Any, tmp_path: Path) -> None:
    """Bytes that are read of the history, and written, beside 4 KiB for each unit that differs.
    What was written to the old disk and not taken over comes out of a larger record."""
    held, wanted, point = away(wide, 48)
    meanwhile = {c.offset for c in wide.changes if c.position.epoch == point.epoch}
    differing = units(held, wanted)
    held = bytearray(held)
    for at in differing:
        if at not in meanwhile:  # of those below
            held[at : at + UNIT] = wanted[at : at + UNIT]
    path = tmp_path / "old.raw"
    path.write_bytes(held)
    changed = bytes_in(units(held, wanted), SIZE)
    assert changed >= 40 * UNIT
    cost = fill(wide, point, 0, path)
    assert path.read_bytes() == wanted
    assert cost.count.written_bytes == cost.count.fetched_bytes == changed
    assert cost.count.right_bytes == SIZE - changed
    assert cost.read_bytes <= 1.05 * changed, cost
    assert cost.hash_bytes <= SIZE // 16, cost
    # Those that were not taken over: each costs the piece that it lies in.
    for at in differing:
        held[at : at + UNIT] = wide.rng.randbytes(UNIT)
    path.write_bytes(held)
    cost = fill(wide, point, 0, path)
    assert path.read_bytes() == wanted
    assert cost.count.written_bytes == cost.count.fetched_bytes == len(differing) * UNIT


def test_a_disk_that_is_right_is_not_fetched(wide: Any, tmp_path: Path) -> None:
    _held, wanted, point = away(wide, 20)
    path = tmp_path / "old.raw"
    path.write_bytes(wanted)
    stamp = path.stat().st_mtime_ns
    cost = fill(wide, point, 0, path)
    assert (cost.read_bytes, cost.count.written_bytes) == (0, 0)
    assert path.stat().st_mtime_ns == stamp


def places(lab: Any, point: Position) -> list[tuple[int, int]]:
    """Segment and byte of each record that shows."""
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        found = reader.extent_map(point).lookup(0, 0, SIZE)
        return sorted({(int(e["segment"]), int(e["position"])) for e in found})


def test_hashes_that_rot_prove_nothing(tmp_path: Path, rng: random.Random) -> None:
    disk = DiskEntry("root", SIZE, 0)
    lab = lab_module.Lab(tmp_path, [disk], rng, level=0, segment_bytes=1 << 18, merge=False)
    _held, wanted, point = away(lab, 20, most=16)
    path = tmp_path / "old.raw"
    path.write_bytes(wanted)
    rotten = 0
    with StoreReader(lab.paths.store, lab.group_id) as reader:
        sealed = {int(entry["segment"]): entry for entry in reader.manifest.segments}
        pieces = [
            (segment, position, hash_piece(reader, segment, position, SIZE))
            for segment, position in places(lab, point)
            if segment in sealed
        ]
        for segment, position, piece in pieces:
            assert piece is not None
            body = int(np.frombuffer(piece.header, layout.RECORD)[0]["body_bytes"])
            start = position + len(piece.header) + body - len(piece.piece)
            with entry_path(reader.directory, sealed[segment]).open("r+b") as file:
                file.seek(start + rng.randrange(len(piece.piece)))
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1 << rng.randrange(8)]))
            rotten += 1
    assert rotten > 10
    cost = fill(lab, point, 0, path)
    assert path.read_bytes() == wanted
    assert cost.count.written_bytes == 0
    assert cost.count.fetched_bytes > SIZE // 2
    lab.close()


def test_an_authentic_piece_of_another_record_proves_nothing(
    wide: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the index believed in what the record says itself: an older record of the same unit, one
    of another unit or disk with the same content."""
    wide.sync()
    older, newer = wide.rng.randbytes(UNIT), wide.rng.randbytes(UNIT)
    wide.write(0, 0, older)
    wide.write(0, UNIT, older)
    wide.write(0, 0, newer)
    point = wide.commit()
    with StoreReader(wide.paths.store, wide.group_id) as reader:
        headers = [
            (segment, span.start + int(found["position"]))
            for segment in reader.numbers()
            for span in reader.spans(segment)
            for found in span.found
            if int(found["header"]["kind"]) == layout.KIND_WRITE
        ]
        pieces = [hash_piece(reader, *place, UNIT) for place in headers]
    assert len(pieces) == 3
    with opened(wide, point) as (_fetcher, comparer):
        assert comparer.differing(0, 0, newer + older) == []
    for piece in pieces[:2]:
        monkeypatch.setattr(compare, "hash_piece", lambda *_place, piece=piece: piece)
        with opened(wide, point) as (_fetcher, comparer):
            assert comparer.differing(0, 0, older) == [(0, UNIT)]
        monkeypatch.undo()


def test_a_disk_that_cannot_be_read_is_written_whole(
    wide: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _held, wanted, point = away(wide, 20)
    path = tmp_path / "old.raw"
    path.write_bytes(wanted)

    def broken(*_arguments: object) -> int:
        raise OSError(errno.EIO, "bad sector")

    mine = types.SimpleNamespace(**vars(os))
    monkeypatch.setattr(filling, "os", mine)
    mine.preadv = broken
    cost = fill(wide, point, 0, path)
    assert cost.count.written_bytes == SIZE
    assert cost.count.right_bytes == 0
    mine.preadv, mine.fdatasync = os.preadv, broken  # what the cache holds may be nowhere else
    cost = fill(wide, point, 0, path)
    assert cost.count.written_bytes == SIZE
    assert path.read_bytes() == wanted
