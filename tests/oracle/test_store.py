"""The store against a plain list of what was appended, and against damage of each part."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_records as records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vrep._core import layout
from vrep._core.seal import Opener
from vrep.errors import (
    CorruptError,
    ExistsError,
    FencedError,
    InvalidError,
    NotFoundError,
    StateError,
    VrepError,
)
from vrep.target import journal, runs
from vrep.target.manifest import (
    EpochState,
    Manifest,
    Position,
    load_newest,
    manifest_numbers,
    manifest_path,
)
from vrep.target.store import GroupStore, StoreOptions, StoreReader, store_path

GROUP: bytes = records.GROUP
SMALL = StoreOptions(commit_s=0.0005, segment_bytes=1 << 15, reserve_bytes=0, merge=False)
BLOCK = 4096


def content(reader: StoreReader) -> bytes:
    out = bytearray()
    for span in reader.records():
        last = span.found[-1]
        end = int(last["position"]) + 64 + int(last["header"]["body_bytes"])
        out += reader.read(span.segment, span.start, end)
    return bytes(out)


def block(reader: StoreReader, point: Position, index: int) -> int:
    """What a block holds at a point: the seq that filled it, 0 for nothing or zeroes."""
    extents = reader.extent_map(point)
    found = extents.lookup(0, index * BLOCK, BLOCK)
    assert len(found) == 1
    if found[0]["kind"] != layout.KIND_WRITE:
        return 0
    raw = reader.record(int(found[0]["segment"]), int(found[0]["position"]))
    row = extents.streams[int(found[0]["stream"])]
    plain = bytearray(len(raw))
    stream_id = row["stream_id"].tobytes()
    size = Opener(records.KEY, stream_id).record(raw, plain)
    assert size == BLOCK
    return int.from_bytes(plain[:8], "little")


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_history_at_every_position(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Random writes, zeroes, streams, rotations, merges and reopenings: the block that is
    read at any position is the one that a list of all changes names."""
    directory = tmp_path_factory.mktemp("store")
    draw = data.draw
    feed = records.Feed()
    model: list[dict[int, int]] = [{}]
    sent = feed.stream()
    store = GroupStore.open(directory, GROUP, create=records.spec(), options=SMALL)
    store.append(sent)
    try:
        for _ in range(draw(st.integers(3, 25))):
            step = draw(st.sampled_from(["write", "write", "zeroes", "commit", "stream", "reopen"]))
            at = draw(st.integers(0, 7))
            if step == "write":
                count = draw(st.integers(1, 6))
                batch = feed.writes(count, BLOCK, at * BLOCK)
                for i in range(count):
                    model.append({**model[-1], at + i: len(model)})
            elif step == "zeroes":
                count = draw(st.integers(1, 6))
                batch = feed.zeroes(at * BLOCK, count * BLOCK)
                model.append({**model[-1], **{at + i: 0 for i in range(count)}})
            elif step == "stream":
                feed.restart()
                batch = feed.stream()
            else:
                assert store.commit().seq == feed.seq
                batch = feed.tally()
                if step == "reopen":
                    store.close()
                    store = GroupStore.open(directory, GROUP, options=SMALL)
            store.append(batch)
            sent += batch
        store.commit()
        while store.merge_once():
            continue
        with StoreReader(directory, GROUP) as reader:
            assert content(reader) == sent
            assert reader.durable.seq == len(model) - 1
            assert reader.verify() > 0
            for seq in {draw(st.integers(0, len(model) - 1)) for _ in range(4)}:
                for index in range(14):
                    assert block(reader, Position(1, 0, seq), index) == model[seq].get(index, 0)
    finally:
        store.close()


def filled(directory: Path, batches: int = 12, options: StoreOptions = SMALL) -> Any:
    """A store of a few closed segments and an open one, closed; its feed."""
    feed = records.Feed()
    with GroupStore.open(directory, GROUP, create=records.spec(), options=options) as store:
        store.append(feed.stream())
        for _ in range(batches):
            store.append(feed.writes(3))
            store.commit()
    return feed


def test_a_reader_sees_what_is_committed_beside_the_writer(tmp_path: Path) -> None:
    feed = records.Feed()
    with (
        GroupStore.open(tmp_path, GROUP, create=records.spec(), options=SMALL) as store,
        StoreReader(tmp_path, GROUP) as reader,
    ):
        assert reader.durable == Position()
        assert reader.name == "shop"
        assert reader.wrapped_keys == (b"wrapped",)
        store.append(feed.stream())
        for _ in range(30):
            store.append(feed.writes(2))
            done = store.commit()
            reader.refresh()
            assert reader.durable == done
            assert reader.oldest == Position(1, 0, 1)
        times = reader.times()
        assert times["at"]["seq"][-1] == feed.seq
        assert (np.diff(times["wall_ns"].astype(np.int64)) > 0).all()
        spans = list(reader.records(Position(1, 0, 31), Position(1, 0, 31)))
        held = [int(s) for span in spans for s in span.found["header"]["seq"]]
        assert 31 in held
        assert len(held) < feed.seq


def test_readers_beside_a_busy_writer_never_see_damage(tmp_path: Path) -> None:
    feed = records.Feed()
    options = StoreOptions(commit_s=0.0001, segment_bytes=1 << 15, reserve_bytes=0)
    with GroupStore.open(tmp_path, GROUP, create=records.spec(), options=options) as store:
        store.append(feed.stream() + feed.writes(2))
        store.commit()  # there is a point before anybody asks for one
        stop = threading.Event()
        failed: list[BaseException] = []

        def read() -> None:
            try:
                last = Position()
                with StoreReader(tmp_path, GROUP) as reader:
                    while not stop.is_set():
                        reader.refresh()
                        assert reader.durable >= last
                        last = reader.durable
                        reader.extent_map(last).lookup(0, 0, 1 << 20)
            except BaseException as error:  # noqa: BLE001 - shown by the test
                failed.append(error)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for thread in readers:
            thread.start()
        for _ in range(300):
            store.append(feed.writes(2))
            if feed.seq % 20 == 0:
                store.commit()
        stop.set()
        for thread in readers:
            thread.join()
        assert not failed
        store.commit()
    with StoreReader(tmp_path, GROUP) as reader:
        assert records.seqs(content(reader)) == list(range(1, feed.seq + 1))


def test_runs_are_merged_and_pinned_files_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The mark of a quiet second would begin another segment, on a slow machine.
    monkeypatch.setattr(journal, "IDLE_S", 3600.0)
    options = StoreOptions(commit_s=0.0005, segment_bytes=4096, reserve_bytes=0, merge=False)
    feed = records.Feed()
    with GroupStore.open(tmp_path, GROUP, create=records.spec(), options=options) as store:
        store.append(feed.stream())
        for _ in range(8 * 8 + 3):
            store.append(feed.writes(1))
            store.commit()
        assert len(runs.units(store.manifest)) == 66
        for _ in range(7):
            assert store.merge_once()
        reader = StoreReader(tmp_path, GROUP)
        before = content(reader)
        old = runs.run_numbers(store.directory)
        while store.merge_once():
            continue
        assert [unit.level for unit in runs.units(store.manifest)] == [2, 0, 0]
        assert set(old) <= set(runs.run_numbers(store.directory))
        reader.close()
        assert not list(store.directory.glob("pin-*"))
    with GroupStore.open(tmp_path, GROUP, options=options) as store:
        assert len(runs.run_numbers(store.directory)) == 1
        with StoreReader(tmp_path, GROUP) as reader:
            assert content(reader) == before
            assert len(reader.indexes) == 4
            assert len(reader.extent_map(reader.durable).lookup(0, 0, BLOCK)) == 1
        assert len(manifest_numbers(store.directory)) == 2


def test_order_and_epochs_are_kept_by_the_store_itself(tmp_path: Path) -> None:
    feed = records.Feed()
    with GroupStore.open(tmp_path, GROUP, create=records.spec(), options=SMALL) as store:
        early = feed.writes(1)
        with pytest.raises(CorruptError):
            store.append(early)  # before any stream
        feed.restart(0)
        store.append(feed.stream() + feed.writes(2))
        feed.writes(1)
        with pytest.raises(CorruptError):
            store.append(feed.writes(1))  # a hole
        with pytest.raises(CorruptError):
            store.append(feed.writes(1)[:-5])
        assert store.commit() == Position(1, 0, 2)
        raised = store.add_epoch(
            writer=bytes(16), parent=Position(1, 0, 1), state=EpochState.PROVISIONAL
        )
        feed.restart(2)
        with pytest.raises(FencedError):
            store.append(feed.stream())
        with pytest.raises(InvalidError, match="not durable"):
            store.add_epoch(writer=bytes(16), parent=Position(1, 0, 9))
        assert store.received == Position(1, 0, 2)
        back = store.roll_back_epoch(raised.epoch)
        assert store.resume_position() == Position(3, 0, 2)
        with pytest.raises(StateError):
            store.roll_back_epoch(back.epoch)
        feed = records.Feed(epoch=back, seq=2)
        store.append(feed.stream() + feed.writes(1))
        assert store.commit() == Position(3, 0, 3)
        other = feed.headers(1, layout.KIND_WRITE, 0, 4096, 0)
        other["disk"] = 1
        with pytest.raises(CorruptError, match="has not"):
            store.append(feed._seal(other, [bytes(4096)]))
    with GroupStore.open(tmp_path, GROUP) as store:
        assert [entry.state for entry in store.epochs] == [
            EpochState.ACCEPTED,
            EpochState.ABANDONED,
            EpochState.ACCEPTED,
        ]
        assert store.resume_position() == Position(3, 0, 3)


def test_opening_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        GroupStore.open(tmp_path, GROUP)
    with pytest.raises(NotFoundError):
        StoreReader(tmp_path, GROUP)
    filled(tmp_path)
    with pytest.raises(ExistsError):
        GroupStore.open(tmp_path, GROUP, create=records.spec())
    with GroupStore.open(tmp_path, GROUP) as store:
        first = store.lease
    with GroupStore.open(tmp_path, GROUP) as store:
        assert store.lease == first + 1


def test_each_position_has_its_size(tmp_path: Path) -> None:
    """Of the line of a point, also when another line left it; and after a restart."""
    feed = records.Feed()
    with GroupStore.open(tmp_path, GROUP, create=records.spec(), options=SMALL) as store:
        store.append(feed.stream() + feed.writes(1) + feed.resize(4096) + feed.writes(1))
        store.append(feed.resize(8192))
        store.commit()
        assert [disk.bytes for disk in store.disks_now()] == [8192]
        taken = store.add_epoch(writer=bytes(16), parent=Position(1, 0, 3))
        assert [disk.bytes for disk in store.disks_now()] == [4096]
        other = records.Feed(epoch=taken, seq=3)
        store.append(other.stream() + other.resize(512))
        store.commit()
    with GroupStore.open(tmp_path, GROUP, options=SMALL) as store:
        assert [disk.bytes for disk in store.disks_now()] == [512]
        assert [disk.bytes for disk in store.disks] == [records.DISK_BYTES]
    sizes = {
        Position(1, 0, 1): records.DISK_BYTES,
        Position(1, 0, 2): 4096,
        Position(1, 0, 3): 4096,
        Position(1, 0, 4): 8192,
        Position(2, 0, 3): 4096,
        Position(2, 0, 4): 512,
    }
    with StoreReader(tmp_path, GROUP) as reader:
        assert {p: reader.disks_at(p)[0].bytes for p in sizes} == sizes


# ---- damage ------------------------------------------------------------------------------


def recovered(directory: Path) -> Position | VrepError:
    """The last position of a store that opens, or why it does not."""
    try:
        with GroupStore.open(directory, GROUP, options=SMALL) as store:
            return store.durable
    except VrepError as error:
        return error


def damage_of(directory: Path) -> VrepError | None:
    """What a full check of a store finds."""
    try:
        with StoreReader(directory, GROUP) as reader:
            reader.verify()
    except VrepError as error:
        return error
    return None


def test_damage_of_every_file_is_named_never_cut(tmp_path: Path, rng: random.Random) -> None:
    """Flips in all files of a store. What a later commit block, the manifest or an index
    vouches for is an error that names the file; only the last commit may end the prefix."""
    feed = filled(tmp_path / "good", batches=10)
    good = store_path(tmp_path / "good", GROUP)
    manifest = load_newest(good, GROUP)
    newest = manifest_path(good, manifest.number).name
    active = f"seg-{manifest.active_segment:08x}"
    before_last = Position(1, 0, feed.seq - 3)
    with StoreReader(tmp_path / "good", GROUP) as reader:
        everything = content(reader)
    for number in range(80):
        there = tmp_path / f"bad-{number}"
        shutil.copytree(good, store_path(there, GROUP))
        names = [p.name for p in store_path(there, GROUP).iterdir()]
        name = rng.choice(sorted(n for n in names if n.startswith(("seg", "manifest"))))
        path = store_path(there, GROUP) / name
        raw = bytearray(path.read_bytes())
        at = rng.randrange(len(raw))
        raw[at] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        found = recovered(there)
        if name == newest:
            assert isinstance(found, CorruptError | VrepError), (name, at)
            assert name in str(found)
        elif name == active:
            if isinstance(found, VrepError):
                assert isinstance(found, CorruptError) or "version" in str(found)
                assert name in str(found)
            else:
                assert found in (before_last, feed.position)
        elif name.startswith("seg"):
            data_end = int(manifest.segments["data_end"][int(name[4:], 16) - 1])
            error = damage_of(there)
            if error is None:  # zeroes between the arrays of an index mean nothing
                assert at >= data_end
                with StoreReader(there, GROUP) as reader:
                    assert content(reader) == everything
            else:
                assert at < data_end or name in str(error) or "run" in str(error)
        else:
            assert found == feed.position
        shutil.rmtree(there)


def test_the_last_commit_before_a_clean_stop_is_no_torn_tail(tmp_path: Path) -> None:
    """The store is closed before its second of quiet is over: what was durable stays vouched
    for."""
    filled(tmp_path)
    with StoreReader(tmp_path, GROUP) as reader:
        last = list(reader.records())[-1]
    at = last.start + int(last.found[-1]["position"]) + layout.RECORD.itemsize
    (path,) = store_path(tmp_path, GROUP).glob(f"seg-{last.segment:08x}")
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    found = damage_of(tmp_path)
    assert isinstance(found, CorruptError), found
    assert path.name.removeprefix("seg-") in str(found)


@pytest.mark.parametrize("how", ["missing", "short", "empty"])
def test_a_lost_file_is_an_error_with_its_name(tmp_path: Path, how: str) -> None:
    filled(tmp_path, batches=10)
    directory = store_path(tmp_path, GROUP)
    manifest = load_newest(directory, GROUP)
    for number in (int(manifest.segments[0]["segment"]), manifest.active_segment):
        path = directory / f"seg-{number:08x}"
        raw = path.read_bytes()
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes(raw[:-100] if how == "short" else b"")
        found = recovered(tmp_path)
        if number == manifest.active_segment and how == "short":
            assert isinstance(found, Position)  # nothing proves the last commit
            continue
        assert isinstance(found, CorruptError)
        assert path.name in str(found)
        path.write_bytes(raw)


def test_a_damaged_manifest_never_falls_back_to_an_older_one(tmp_path: Path) -> None:
    filled(tmp_path, batches=10)
    directory = store_path(tmp_path, GROUP)
    numbers = manifest_numbers(directory)
    assert len(numbers) == 2
    newest = manifest_path(directory, numbers[-1])
    raw = newest.read_bytes()
    for broken in (b"", raw[:100], raw[:-1], raw + b"\0"):
        newest.write_bytes(broken)
        found = recovered(tmp_path)
        assert isinstance(found, CorruptError)
        assert newest.name in str(found)
    newest.write_bytes(raw)
    # One that never got its name was never complete: it is ignored, and removed.
    leftover = directory / f".manifest-{numbers[-1] + 1:016x}.0011223344556677.tmp"
    leftover.write_bytes(raw[:77])
    assert isinstance(recovered(tmp_path), Position)
    assert not leftover.exists()


def test_manifest_bytes_round_trip(tmp_path: Path) -> None:
    filled(tmp_path)
    manifest = load_newest(store_path(tmp_path, GROUP), GROUP)
    assert Manifest.decode(manifest.encode()).encode() == manifest.encode()
    with pytest.raises(InvalidError):
        manifest.next(0, name="x" * 64).encode()
    with pytest.raises(InvalidError):
        manifest.next(0, epochs=()).encode()
