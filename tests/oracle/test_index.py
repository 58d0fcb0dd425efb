"""Index builder, footer, reader and merge against the records that went in."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import index_history as oracle
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from vrep._core import layout
from vrep._core.index import EXTENT, ExtentMap, Index, IndexBuilder, merge
from vrep.errors import (
    BusyError,
    CorruptError,
    InvalidError,
    StoreFullError,
    TornError,
    VersionError,
)

DATA, ZEROES, GROUP, PIECE = oracle.DATA, oracle.ZEROES, oracle.GROUP, oracle.PIECE
Change = oracle.Change
EVENTS = {layout.KIND_MARK, layout.KIND_GAP_BEGIN, layout.KIND_GAP_END}


def expected(changes: list[oracle.Change]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Short and long entries of some changes, in the order of a footer."""
    rows = []
    for c in changes:
        if c.kind in DATA:
            for piece, at in enumerate(range(0, c.length, PIECE)):
                size = min(PIECE, c.length - at)
                rows.append((c.disk, c.offset + at, -c.epoch, -c.seq, size, piece, c))
        elif c.kind in ZEROES:
            rows.append((c.disk, c.offset, -c.epoch, -c.seq, c.length, 0, c))
    rows.sort(key=lambda row: row[:4])
    found = [
        (disk, offset, c.epoch, c.seq, size, piece, c.kind, c.segment, c.position, c.stream_id)
        for disk, offset, _, _, size, piece, c in rows
    ]
    return [row for row in found if row[4] <= PIECE], [row for row in found if row[4] > PIECE]


def listed(index: Index, entries: np.ndarray) -> list[tuple[int, ...]]:
    names = ("disk", "offset", "epoch", "seq", "length", "piece", "kind", "segment", "position")
    return [
        (
            *(int(entry[name]) for name in names),
            index.streams[entry["stream"]]["stream_id"].tobytes(),
        )
        for entry in entries
    ]


def check(index: Index, changes: list[oracle.Change]) -> None:
    shorts, longs = expected(changes)
    assert listed(index, index.short_entries) == shorts
    assert listed(index, index.long_entries) == longs
    events = [c for c in changes if c.kind in EVENTS]
    events.sort(key=lambda c: (c.epoch, c.seq))
    assert [(e["at"]["epoch"], e["at"]["seq"], e["kind"]) for e in index.events] == [
        (c.epoch, c.seq, c.kind) for c in events
    ]
    for event, change in zip(index.events, events, strict=True):
        assert (event["segment"], event["position"]) == (change.segment, change.position)
        assert index.streams[event["stream"]]["stream_id"].tobytes() == change.stream_id
    trailer = index.trailer
    places = [(c.epoch, c.seq) for c in changes] or [(0, 0)]
    assert trailer["first"] == (min(places)[0], 0, min(places)[1])
    assert trailer["last"] == (max(places)[0], 0, max(places)[1])
    assert trailer["data_bytes"] == sum(c.length for c in changes)


@settings(max_examples=60, deadline=None)
@given(history=oracle.histories(), data=st.data())
def test_footers_and_runs_hold_what_went_in(history: oracle.History, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        indexes = []
        for builder in history.builders:
            changes = [c for c in history.changes if c.segment == builder.segment]
            assert builder.records == len(changes)
            footer = builder.finish(1 << 12)
            path = folder / f"seg-{builder.segment:08x}"
            path.write_bytes(bytes(1 << 12) + footer)
            index = Index.open(path, verify=True)
            assert index.trailer["segment_bytes"] == 1 << 12
            check(index, changes)
            check(builder.freeze(), changes)
            indexes.append(index)
        order = data.draw(st.permutations(indexes))
        with (folder / "run").open("xb+") as file:
            merge(order, file.fileno(), 3)
        run = Index.open(folder / "run", verify=True)
        check(run, history.changes)
        assert (run.segment, run.trailer["level"]) == (0, 3)
        times = [(t["at"]["epoch"], t["at"]["seq"]) for t in run.times]
        assert times == sorted((c.epoch, c.seq) for c in history.changes if c.seq % 5 == 0)


def small_builder() -> IndexBuilder:
    builder = IndexBuilder(1, GROUP)
    builder.add(oracle.stream_record(1, bytes(16), 0), 128)
    for seq in range(1, 200):
        raw = Change(layout.KIND_WRITE, 1, seq, offset=seq * 512, length=4096).raw()
        builder.add(raw, 1000 + 100 * seq)
    return builder


def test_the_stream_in_force_goes_on_in_the_next_segment() -> None:
    builder = IndexBuilder(1, GROUP)
    assert builder.stream is None
    write = Change(layout.KIND_WRITE, 1, 1, length=9).raw()
    with pytest.raises(CorruptError):
        builder.add(write, 0)
    builder.add(oracle.stream_record(1, b"s" * 16, 0), 128)
    following = IndexBuilder(2, GROUP, builder.stream)
    assert following.add(write, 0) == 1
    assert following.freeze().streams[0] == builder.stream
    assert (following.first, following.last) == ((1, 0, 1), (1, 0, 1))


def test_the_last_row_is_the_stream_in_force() -> None:
    builder = IndexBuilder(1, GROUP)
    for position, name in enumerate([b"a", b"b", b"a", b"a"]):
        builder.add(oracle.stream_record(1, name * 16, 0), 192 * position)
    index = builder.freeze()
    assert index.streams["stream_id"][:, 0].tolist() == [ord(name) for name in "aba"]
    assert index.streams[-1] == builder.stream


def test_damage_is_named() -> None:
    builder = small_builder()
    write = Change(layout.KIND_WRITE, 1, 200, length=9).raw()
    with pytest.raises(TornError, match="segment 1, byte 7, record 1"):
        builder.add(write + write[:-1], 7)
    footer = bytearray(builder.finish(0))
    with pytest.raises(InvalidError, match="segment 1"):
        builder.finish(1)
    footer[3] ^= 1
    with pytest.raises(CorruptError):
        Index.from_bytes(footer, verify=True)
    index = Index.from_bytes(footer)
    with pytest.raises(CorruptError):
        ExtentMap([index], [(1, 1000)]).lookup(0, 0, 1 << 20)
    footer[-8] ^= 1
    with pytest.raises(CorruptError):
        Index.from_bytes(footer)
    with pytest.raises(TornError):
        Index.from_bytes(footer[:100])


def test_a_later_version_is_named(tmp_path: Path) -> None:
    footer = np.frombuffer(bytearray(small_builder().finish(0)), np.uint8)
    trailer = footer[-layout.INDEX_TRAILER.itemsize :].view(layout.INDEX_TRAILER)
    trailer["version"] = 2
    raw = trailer.tobytes()[:-4]
    trailer["checksum"] = xxhash.xxh3_64_intdigest(raw, seed=0x76726570) & 0xFFFFFFFF
    path = tmp_path / "seg"
    path.write_bytes(footer.tobytes())
    with pytest.raises(VersionError, match="seg"):
        Index.open(path)


def test_arrays_are_views_that_keep_the_file_mapped(tmp_path: Path) -> None:
    path = tmp_path / "run"
    merge([small_builder().freeze()], path, 1)
    entries = Index.open(path).short_entries
    path.unlink()
    assert not entries.flags.writeable
    assert entries["offset"].tolist() == [512 * seq for seq in range(1, 200)]


def test_a_failed_merge_leaves_no_file(tmp_path: Path) -> None:
    bad = small_builder().freeze()
    other = IndexBuilder(1, bytes(16)).freeze()
    path = tmp_path / "run"
    with pytest.raises(InvalidError):
        merge([bad, other], path, 1)
    assert not path.exists()
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        merge([bad], path, 1)
    assert path.read_bytes() == b"mine"
    with pytest.raises(InvalidError):
        merge([], tmp_path / "none", 1)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(StoreFullError):
            merge([bad], full, 1)
    finally:
        os.close(full)


def test_the_gil_is_free_while_an_index_is_built() -> None:
    """Another thread runs during one long call: the builder then answers BusyError."""
    raw = Change(layout.KIND_WRITE, 1, 1, offset=0, length=512).raw()
    stream = oracle.stream_record(1, bytes(16), 0)
    records = 300_000
    for _ in range(20):
        builder = IndexBuilder(1, GROUP)
        builder.add(stream, 0)
        thread = threading.Thread(target=builder.add, args=(raw * records, 128))
        refused = 0
        thread.start()
        while thread.is_alive():
            try:
                builder.time(1, 1, 0, 1)
            except BusyError:
                refused += 1
        thread.join()
        assert builder.records == records
        if refused:
            return
    pytest.fail("no other thread ever ran during the call")


def test_extent_has_no_padding() -> None:
    assert EXTENT.itemsize == 48
