"""Extent map against a map of every byte."""

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
from vrep._core.index import ExtentMap, Index, IndexBuilder, merge
from vrep.errors import InvalidError, RangeError

DATA, DISK_BYTES, GROUP, PIECE = oracle.DATA, oracle.DISK_BYTES, oracle.GROUP, oracle.PIECE
histories = oracle.histories


def check(
    history: oracle.History, extents: ExtentMap, disk: int, ancestry: list[tuple[int, int]]
) -> None:
    """One lookup of the whole disk, byte for byte."""
    winners = history.winners(disk, ancestry)
    streams = extents.streams
    at = 0
    for extent in extents.lookup(disk, 0, DISK_BYTES):
        length = int(extent["length"])
        assert extent["offset"] == at
        assert length > 0
        rows = winners[at : at + length]
        assert (rows == rows[0]).all()
        if rows[0] < 0:
            assert extent["kind"] == 0
        else:
            change = history.changes[rows[0]]
            inside = at - change.offset
            piece = inside // PIECE if change.kind in DATA else 0
            assert extent["kind"] == (
                layout.KIND_WRITE if change.kind in DATA else layout.KIND_ZEROES
            )
            assert (extent["epoch"], extent["seq"]) == (change.epoch, change.seq)
            assert (extent["segment"], extent["position"]) == (change.segment, change.position)
            assert (extent["piece"], extent["skip"]) == (piece, inside - piece * PIECE)
            assert streams[extent["stream"]]["stream_id"].tobytes() == change.stream_id
        at += length
    assert at == DISK_BYTES


def check_next(
    history: oracle.History, extents: ExtentMap, ancestry: list[tuple[int, int]]
) -> None:
    for disk in (0, 1):
        written = np.flatnonzero(history.winners(disk, ancestry) >= 0)
        for offset in (0, 1, 4095, PIECE, DISK_BYTES // 2, DISK_BYTES - 1):
            later = written[written >= offset]
            assert extents.next_written(disk, offset) == (int(later[0]) if len(later) else None)


def shuffled_runs(indexes: list[Index], folder: Path, choice: random.Random) -> list[Index]:
    """Merges random groups of indexes, several levels deep; every path and descriptor kind."""
    number = 0
    while len(indexes) > 1 and choice.random() < 0.8:
        choice.shuffle(indexes)
        some = choice.randint(1, len(indexes))
        path = folder / f"run-{number:08x}"
        number += 1
        trailer = merge(indexes[:some], path, number)
        run = Index.open(path, verify=True)
        assert run.trailer == {
            k: v for k, v in trailer.items() if k not in ("digest", "file_bytes")
        }
        assert (run.digest, run.file_bytes) == (trailer["digest"], trailer["file_bytes"])
        indexes = [run, *indexes[some:]]
    choice.shuffle(indexes)
    return indexes


@settings(max_examples=120, deadline=None)
@given(history=histories(), data=st.data())
def test_every_byte_at_any_point(history: oracle.History, data: st.DataObject) -> None:
    choice = random.Random(data.draw(st.integers(0, 2**32)))
    points = [(c.epoch, c.seq) for c in history.changes]
    with tempfile.TemporaryDirectory() as folder:
        indexes = shuffled_runs(history.indexes(), Path(folder), choice)
        chosen = [*choice.sample(points, min(4, len(points))), (1, 0), (99, 99)]
        for epoch, seq in chosen:
            ancestry = history.ancestry(epoch, seq)
            choice.shuffle(ancestry)
            extents = ExtentMap(indexes, ancestry, group_id=GROUP)
            check(history, extents, 0, ancestry)
            check(history, extents, 1, ancestry)
            check_next(history, extents, ancestry)


@settings(max_examples=60, deadline=None)
@given(history=histories(), data=st.data())
def test_parts_of_a_lookup_agree_with_the_whole(
    history: oracle.History, data: st.DataObject
) -> None:
    if not history.changes:
        return
    last = history.changes[-1]
    extents = ExtentMap(history.indexes(), history.ancestry(last.epoch, last.seq))
    whole = extents.lookup(0, 0, DISK_BYTES)
    source = np.repeat(np.arange(len(whole)), whole["length"])
    for _ in range(20):
        offset = data.draw(st.integers(0, DISK_BYTES - 1))
        length = data.draw(st.integers(0, min(DISK_BYTES - offset, 200_000)))
        at = offset
        for extent in extents.lookup(0, offset, length):
            mother = whole[source[at]]
            for name in ("kind", "seq", "epoch", "segment", "position", "piece", "stream"):
                assert extent[name] == mother[name]
            assert extent["offset"] == at
            if mother["kind"]:
                assert int(extent["skip"]) == int(mother["skip"]) + at - int(mother["offset"])
            at += int(extent["length"])
        assert at == offset + length


def test_nothing_written_is_tiled_too() -> None:
    extents = ExtentMap([], [(1, 10)])
    rows = extents.lookup(3, 512, 5 << 30)
    assert rows["length"].tolist() == [1 << 31, 1 << 31, 1 << 30]
    assert rows["offset"].tolist() == [512, 512 + (1 << 31), 512 + (2 << 31)]
    assert not rows["kind"].any()
    assert len(extents.lookup(3, 512, 0)) == 0
    assert extents.next_written(3, 0) is None


def test_bounds_are_checked() -> None:
    extents = ExtentMap([], [])
    for disk, offset, length in [(64, 0, 1), (0, 2**63 - 1, 1), (0, 2**63, 0), (0, 1, 2**63 - 1)]:
        with pytest.raises(RangeError):
            extents.lookup(disk, offset, length)
    with pytest.raises(InvalidError):
        ExtentMap([], [(1, 5), (1, 6)])
    index = IndexBuilder(1, bytes(16)).freeze()
    other = IndexBuilder(1, GROUP).freeze()
    with pytest.raises(InvalidError):
        ExtentMap([index, other], [(1, 5)])
    with pytest.raises(InvalidError):
        ExtentMap([index], [(1, 5)], group_id=GROUP)


def test_long_zeroes_that_lie_over_each_other(seed: int) -> None:
    """Thousands of ranges of up to 4 GiB over a large disk: the newest at any byte and point."""
    rng = np.random.default_rng(seed)
    count, disk = 9000, 1 << 40
    offset = rng.integers(0, disk - (1 << 32), count)
    length = np.minimum(1 << rng.integers(12, 33, count), (1 << 32) - 1)
    builders = []
    for first in range(0, count, 2500):
        some = slice(first, min(count, first + 2500))
        headers = np.zeros(some.stop - first, layout.RECORD)
        headers["magic"], headers["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
        headers["kind"], headers["epoch"] = layout.KIND_ZEROES, 1
        headers["seq"] = np.arange(first + 1, some.stop + 1)
        headers["offset"], headers["length"] = offset[some], length[some]
        record.finish(headers)
        builder = IndexBuilder(len(builders) + 1, GROUP)
        builder.add(oracle.stream_record(1, bytes(16), first), 128)
        assert builder.add(headers, 1024) == len(headers)
        builders.append(builder)
    indexes = [builder.freeze() for builder in builders]
    for point in (count, count // 2, 10):
        extents = ExtentMap(indexes, [(1, point)])
        seen = np.arange(count) < point
        places = np.concatenate([rng.integers(0, disk, 150), offset[rng.integers(0, count, 150)]])
        for place in places.tolist():
            covers = np.flatnonzero(seen & (offset <= place) & (place < offset + length))
            (extent,) = extents.lookup(0, place, 1)
            assert extent["seq"] == (covers[-1] + 1 if len(covers) else 0)
            if len(covers):
                assert extent["skip"] == place - offset[covers[-1]]
