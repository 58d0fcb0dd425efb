"""Changed blocks between two points against what every byte comes from."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import index_history as oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vrep._core import layout, record
from vrep._core.changes import BLOCK_BYTES, Changes
from vrep._core.index import Index, IndexBuilder, merge
from vrep.errors import CorruptError, InvalidError, RangeError

DISK_BYTES, GROUP = oracle.DISK_BYTES, oracle.GROUP
histories = oracle.histories

Line = list[tuple[int, int]]


def marked(changes: Changes, disk: int, offset: int = 0, length: int = DISK_BYTES) -> np.ndarray:
    """A flag for each byte of the disk, from a list whose form is checked."""
    flags = np.zeros(DISK_BYTES, bool)
    last = -1
    for row in changes.list(disk, offset, length):
        begin, end = int(row["offset"]), int(row["offset"] + row["length"])
        assert offset <= begin < end <= offset + length
        assert begin > last  # apart: neighbours are one
        assert begin % BLOCK_BYTES == 0 or begin == offset
        assert end % BLOCK_BYTES == 0 or end == offset + length
        flags[begin:end] = True
        last = end
    return flags


def due(history: oracle.History, disk: int, since: Line, at: Line) -> np.ndarray:
    """The blocks that some record covers which one of the points shows and the other does not."""
    seen = [{(c.epoch, c.seq) for c in history.visible(line)} for line in (since, at)]
    flags = np.zeros(DISK_BYTES, bool)
    for change in history.changes:
        if change.disk == disk and ((change.epoch, change.seq) in seen[0]) != (
            (change.epoch, change.seq) in seen[1]
        ):
            first = change.offset // BLOCK_BYTES * BLOCK_BYTES
            end = -(-(change.offset + change.length) // BLOCK_BYTES) * BLOCK_BYTES
            flags[first : end if change.length else first] = True
    return flags


def merged(indexes: list[Index], folder: Path, choice: random.Random) -> list[Index]:
    """The same in fewer indexes, some of them runs."""
    for number in range(choice.randrange(3)):
        choice.shuffle(indexes)
        some = choice.randint(1, len(indexes))
        path = folder / f"run-{number:08x}"
        merge(indexes[:some], path, number + 1)
        indexes = [Index.open(path), *indexes[some:]]
    return indexes


@settings(max_examples=80, deadline=None)
@given(history=histories(), data=st.data())
def test_what_is_not_told_is_equal(history: oracle.History, data: st.DataObject) -> None:
    """Points of one line or of two, either way round: bytes outside come from the same record at
    both, and no block is told that no record between covers."""
    choice = random.Random(data.draw(st.integers(0, 2**32)))
    points = [(c.epoch, c.seq) for c in history.changes] + [(1, 0)]
    with tempfile.TemporaryDirectory() as folder:
        indexes = merged(history.indexes(), Path(folder), choice)
        for _ in range(8):
            since, at = (history.ancestry(*choice.choice(points)) for _ in range(2))
            changes = Changes(indexes, since, at, group_id=GROUP)
            for disk in (0, 1):
                flags = marked(changes, disk)
                here, there = (history.winners(disk, line) for line in (since, at))
                assert not ((here != there) & ~flags).any()
                assert (flags == due(history, disk, since, at)).all()
                offset = choice.randrange(DISK_BYTES)
                length = choice.randrange(DISK_BYTES - offset + 1)
                part = marked(changes, disk, offset, length)
                assert (part[offset : offset + length] == flags[offset : offset + length]).all()


def zeroes(first_seq: int, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    headers = np.zeros(len(offsets), layout.RECORD)
    headers["magic"], headers["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
    headers["kind"], headers["epoch"] = layout.KIND_ZEROES, 1
    headers["seq"] = np.arange(first_seq, first_seq + len(offsets))
    headers["offset"], headers["length"] = offsets, lengths
    record.finish(headers)
    return headers


def test_a_large_disk(seed: int) -> None:
    """16 TiB, ranges of up to 4 GiB, lists that do not fit their first room."""
    rng = np.random.default_rng(seed)
    count, disk = 6000, 1 << 44
    offsets = rng.integers(0, disk >> 12, count) << 12
    lengths = np.minimum(1 << rng.integers(9, 33, count), (1 << 32) - 1)
    lengths = np.minimum(lengths, disk - offsets)
    indexes = []
    for first in range(0, count, 1000):
        builder = IndexBuilder(len(indexes) + 1, GROUP)
        builder.add(oracle.stream_record(1, bytes(16), first), 128)
        some = slice(first, first + 1000)
        builder.add(zeroes(first + 1, offsets[some], lengths[some]), 1024)
        indexes.append(builder.freeze())
    for since, at in ((0, count), (1500, 4700), (2999, 3000), (5999, 6000)):
        rows = Changes(indexes, [(1, since)], [(1, at)]).list(0, 0, disk)
        ranges = zip(offsets[since:at].tolist(), lengths[since:at].tolist(), strict=True)
        wanted: list[list[int]] = []
        for offset, length in sorted(ranges):
            end = -(-(offset + length) // 4096) * 4096
            if wanted and offset <= wanted[-1][1]:
                wanted[-1][1] = max(wanted[-1][1], end)
            else:
                wanted.append([offset, end])
        assert rows.tolist() == [(offset, end - offset) for offset, end in wanted]


def test_points_that_are_the_same_differ_in_nothing() -> None:
    builder = IndexBuilder(1, GROUP)
    builder.add(oracle.stream_record(1, bytes(16), 0), 128)
    builder.add(zeroes(1, np.array([0, 8192]), np.array([4096, 1])), 1024)
    index = builder.freeze()
    assert len(Changes([index], [(1, 2)], [(1, 2)]).list(0, 0, 1 << 30)) == 0
    # An epoch that has written nothing stands where it left its parent.
    assert len(Changes([index], [(1, 2)], [(2, 2), (1, 2)]).list(0, 0, 1 << 30)) == 0
    assert Changes([index], [(1, 1)], [(1, 2)]).list(0, 0, 1 << 30).tolist() == [(8192, 4096)]
    assert Changes([index], [(1, 1)], [(1, 2)]).list(0, 0, 8193).tolist() == [(8192, 1)]
    assert len(Changes([index], [(1, 1)], [(1, 2)]).list(1, 0, 1 << 30)) == 0
    assert len(Changes([], [(1, 1)], [(1, 2)]).list(0, 0, 1 << 30)) == 0
    assert len(Changes([index], [], [(1, 2)]).list(0, 0, 0)) == 0


def test_bounds_are_checked() -> None:
    changes = Changes([], [(1, 1)], [(1, 2)])
    for disk, offset, length in [(64, 0, 1), (0, 2**63 - 1, 1), (0, 2**63, 0), (0, 1, 2**63 - 1)]:
        with pytest.raises(RangeError):
            changes.list(disk, offset, length)
    with pytest.raises(InvalidError):
        Changes([], [(1, 5), (1, 6)], [(1, 7)])
    with pytest.raises(InvalidError):
        Changes([], [(1, 7)], [(2, 5), (2, 6)])
    index, other = IndexBuilder(1, bytes(16)).freeze(), IndexBuilder(1, GROUP).freeze()
    with pytest.raises(InvalidError):
        Changes([index, other], [(1, 5)], [(1, 6)])
    with pytest.raises(InvalidError):
        Changes([index], [(1, 5)], [(1, 6)], group_id=GROUP)


def test_damage_is_an_error_and_what_is_not_read_costs_nothing(tmp_path: Path) -> None:
    """Old records of a large run are passed over: damage there is not even seen, while any byte
    of what counts ends the list."""
    count = 20_000
    builder = IndexBuilder(1, GROUP)
    builder.add(oracle.stream_record(1, bytes(16), 0), 128)
    builder.add(zeroes(1, np.arange(count) * 8192, np.full(count, 4096)), 1024)
    builder.add(zeroes(count + 1, np.array([4096 * 9001]), np.array([4096])), 1024 + count * 64)
    data = bytearray(builder.finish(0))
    path = tmp_path / "index"
    path.write_bytes(data)
    index = Index.open(path)
    at = index.trailer["short_at"]
    size = layout.INDEX_ENTRY.itemsize
    place = int(np.flatnonzero(index.short_entries["seq"] == count + 1)[0])

    def listed() -> list[tuple[int, int]]:
        path.write_bytes(data)
        changes = Changes([Index.open(path)], [(1, count)], [(1, count + 1)])
        rows: list[tuple[int, int]] = changes.list(0, 0, 1 << 40).tolist()
        return rows

    assert listed() == [(4096 * 9001, 4096)]
    for number in range(count + 1):
        if number // 64 != place // 64:
            data[at + number * size] ^= 1
    assert listed() == [(4096 * 9001, 4096)]
    data[at + place * size] ^= 1
    with pytest.raises(CorruptError, match=str(path)):  # which of the indexes
        listed()
