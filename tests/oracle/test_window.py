"""Window and quota of a store: what is kept by time, what goes for want of room, what is said."""

from __future__ import annotations

import errno
import os
import random
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_records as records

from vrep._core import layout
from vrep.errors import StoreFullError, TimeLimitError
from vrep.target.aging import Steady
from vrep.target.files import Buffer, Files
from vrep.target.manifest import EpochState, Manifest, Position
from vrep.target.store import GroupStore, StoreOptions, StoreReader
from vrep.target.window import Growth, common_point

NS = 1_000_000_000
SEGMENT = 1 << 15


class Rig:
    """A store, its source, and their clocks: what passes, and what each site's wall shows."""

    def __init__(self, directory: Path, group: bytes = records.GROUP, **options: Any) -> None:
        self.directory, self.group = directory, group
        self.held: list[Position] = []
        self.files = options.pop("files", None)
        self.now_ns = 1_700_000_000 * NS
        self.ahead_ns = 0
        """the target's wall clock, of what it should show"""
        self.boot, self.booted_ns = 1, self.now_ns - 1000 * NS
        self.options = StoreOptions(
            **{
                "commit_s": 0.0005,
                "segment_bytes": SEGMENT,
                "reserve_bytes": 0,
                "merge": False,
                "held": lambda _group: self.held,
                **options,
            }
        )
        self.feed = records.Feed()
        self.store: GroupStore
        self.open(create=records.spec())
        self.walls: dict[int, int] = {}
        self.put(self.feed.stream() + self.feed.mark_gap(layout.KIND_GAP_BEGIN))
        self.put(self.feed.mark_gap(layout.KIND_GAP_END))

    def open(self, **options: Any) -> None:
        self.store = GroupStore.open(
            self.directory,
            self.group,
            options=self.options,
            files=self.files,
            wall_ns=lambda: self.now_ns + self.ahead_ns,
            steady=lambda: Steady(self.boot, self.now_ns - self.booted_ns),
            **options,
        )

    def passes(self, seconds: float) -> None:
        self.now_ns += int(seconds * NS)
        self.feed.wall_ns += int(seconds * NS)

    def put(self, batch: bytes) -> None:
        self.store.append(batch)
        try:
            self.store.commit(3.0)
        except TimeLimitError:  # it is not full, but its disk is busy
            self.store.commit()

    def write(self, at: int = 0, count: int = 1, step_s: float = 1.0) -> None:
        """Writes of neighbouring blocks, some time later."""
        self.passes(step_s)
        self.put(self.feed.writes(count, 4096, at * 4096))
        self.walls[self.feed.seq] = self.feed.wall_ns

    def keep_up(self) -> None:
        """What the store's thread would do by now."""
        while self.store._upkeep.step():
            continue

    @property
    def horizon(self) -> Position:
        return self.store.manifest.horizon

    def conditions(self) -> list[str]:
        return self.store.usage().conditions

    def newest(self, block: int, seq: int) -> int:
        """The seq of the write that a block shows at a point."""
        with StoreReader(self.directory, self.group) as reader:
            extents = reader.extent_map(Position(1, 0, seq))
            return int(extents.lookup(0, block * 4096, 4096)[0]["seq"])


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.store.close()


def test_the_window_moves_with_time(rig: Rig) -> None:
    """At every moment all that is younger than the window is kept, and little more."""
    rig.store.set_limits(100, 0)
    used = []
    for number in range(400):
        rig.write(number % 6)
        if number % 10 == 0:
            rig.keep_up()
            used.append(rig.store.used_bytes())
            points = rig.store.points()
            assert points is not None
            if not rig.horizon.seq:
                assert number < 140
                continue
            age_s = (rig.feed.wall_ns - points[0].wall_ns) / NS
            assert 100 <= age_s <= 130  # a segment holds some 7 writes
            assert rig.conditions() == []
            assert rig.newest(number % 6, rig.feed.seq) == rig.feed.seq
    assert max(used[20:]) < 1.2 * min(used[20:])
    status = rig.store.status()
    assert 1 < status["write_amplification"] < 2
    assert 0 <= status["dead_share"] < 0.5
    assert status["window_s"] == 100


def test_discards_are_accounted_and_let_go_of(rig: Rig) -> None:
    """A guest that discards for ever: each takes a header of room and counts, and the window lets
    go of what they erased as of what was written."""
    rig.put(rig.feed.writes(64, 4096, 0))
    before = rig.store.used_bytes()
    for _ in range(200):
        rig.passes(1)
        rig.put(rig.feed.zeroes(0, 64 * 4096))
    grown = rig.store.used_bytes() - before
    assert 200 * 64 <= grown <= 200 * 512  # a header, and the commit that it came in
    assert rig.store.usage().used_bytes == rig.store.used_bytes()
    rig.store.set_limits(50, 0)
    used = []
    for number in range(300):
        rig.passes(1)
        rig.put(rig.feed.writes(8, 4096, number % 8 * 8 * 4096))
        rig.passes(1)
        rig.put(rig.feed.zeroes(number % 8 * 8 * 4096, 8 * 4096))
        rig.keep_up()
        used.append(rig.store.used_bytes())
    assert max(used[100:]) < 25 * 9 * 4096 + 4 * SEGMENT  # of the window, not of all that came


def test_a_window_is_kept_when_the_store_is_opened_again(rig: Rig) -> None:
    rig.store.set_limits(100, 1 << 30)
    rig.store.close()
    rig.open()
    assert (rig.store.manifest.window_s, rig.store.manifest.quota_bytes) == (100, 1 << 30)
    rig.store.set_limits(0, 0)
    assert rig.store.status()["window_s"] == 0


@pytest.mark.parametrize("jump_s", [10**3, 10**9, -(10**3), -(10**9)])
def test_a_clock_that_jumps_drops_nothing_young(rig: Rig, jump_s: int) -> None:
    """That of the target or of the source, ahead by far more than the window or back, while the
    target runs, while it is down, and while its host starts: what is younger than the window stays,
    and the rest goes as if nothing had been."""
    rig.store.set_limits(100, 0)
    for number in range(60):
        rig.write(number % 6)
    rig.ahead_ns = jump_s * NS
    rig.keep_up()
    assert not rig.horizon.seq
    rig.store.close()
    rig.open()
    rig.keep_up()
    assert not rig.horizon.seq
    rig.store.close()
    rig.ahead_ns, rig.boot, rig.booted_ns = -rig.ahead_ns, rig.boot + 1, rig.now_ns
    rig.open()
    rig.keep_up()
    assert not rig.horizon.seq
    rig.feed.wall_ns = max(1, rig.feed.wall_ns + jump_s * NS)
    for number in range(20):
        rig.write(number % 6)
    rig.keep_up()
    assert not rig.horizon.seq
    assert rig.conditions() == []
    assert rig.newest(5, rig.feed.seq) > 0
    rig.passes(99)
    rig.keep_up()
    assert rig.horizon.seq > 40
    assert rig.conditions() == []


def test_all_that_is_younger_than_the_window_is_kept(tmp_path: Path, rng: random.Random) -> None:
    """Whatever the wall clocks do, and however often the target and its host start anew; and what
    is older goes, but for what its host was down."""
    rig = Rig(tmp_path)
    rig.store.set_limits(100, 0)
    came: dict[int, int] = {}
    for _ in range(250):
        step = rng.random()
        if step < 0.7:
            rig.write(rng.randrange(6), step_s=rng.uniform(0, 6))
            came[rig.feed.seq] = rig.now_ns
        elif step < 0.8:
            rig.ahead_ns = rng.choice([0, rng.randrange(-(10**6), 10**6) * NS])
        elif step < 0.85:
            rig.feed.wall_ns = rig.now_ns + rng.choice([0, rng.randrange(-(10**6), 10**6) * NS])
        elif step < 0.95:
            rig.store.close()
            rig.passes(rng.uniform(0, 20))
            rig.open()
        else:
            rig.store.close()
            rig.passes(rng.uniform(0, 500))
            rig.boot, rig.booted_ns = rig.boot + 1, rig.now_ns
            rig.open()
        rig.keep_up()
        young = min((s for s, at in came.items() if rig.now_ns - at < 100 * NS), default=0)
        assert rig.horizon.seq <= young or not young
    rig.ahead_ns = 0
    for number in range(40):
        rig.write(number % 6, step_s=4)
        came[rig.feed.seq] = rig.now_ns
        rig.keep_up()
    old = max(seq for seq, at in came.items() if rig.now_ns - at > 140 * NS)
    assert rig.horizon.seq >= old  # a segment holds some 7 writes
    rig.store.close()


def test_a_quiet_store_writes_down_what_passed(rig: Rig) -> None:
    """So that a start of its host costs little of it; not on a disk that is full."""
    rig.store.set_limits(10**6, 0)
    rig.keep_up()
    number = rig.store.manifest.number
    rig.passes(3500)
    rig.keep_up()
    assert rig.store.manifest.number == number
    rig.passes(200)
    rig.keep_up()
    assert rig.store.manifest.number == number + 1
    assert rig.store.manifest.count.aged_ns >= 3700 * NS


def test_the_horizon_is_never_in_a_gap(rig: Rig) -> None:
    rig.store.set_limits(50, 0)
    for number in range(20):
        rig.write(number % 6)
    rig.put(rig.feed.mark_gap(layout.KIND_GAP_BEGIN))
    begun = rig.feed.seq
    for number in range(200):
        rig.write(number % 6)
    rig.keep_up()
    assert 0 < rig.horizon.seq < begun
    rig.put(rig.feed.mark_gap(layout.KIND_GAP_END))
    ended = rig.feed.seq
    for number in range(100):
        rig.write(number % 6)
    rig.keep_up()
    assert rig.horizon.seq >= ended


def test_a_failover_that_is_not_decided_holds_the_window(rig: Rig) -> None:
    rig.store.set_limits(50, 0)
    for number in range(40):
        rig.write(number % 6)
    raised = rig.store.add_epoch(
        writer=bytes(16), parent=Position(1, 0, 10), state=EpochState.PROVISIONAL
    )
    rig.passes(1000)
    rig.keep_up()
    assert not rig.horizon.seq
    rig.store.roll_back_epoch(raised.epoch)
    rig.keep_up()
    assert rig.horizon.seq > 10


def test_a_quota_shortens_the_window_and_says_so(rig: Rig) -> None:
    """First a warning with the time left, then a second one and a shorter window; nothing stops,
    and the quota is never exceeded."""
    quota = 16 * SEGMENT
    rig.store.set_limits(100_000, quota)
    seen: list[tuple[str, ...]] = []
    for number in range(600):
        rig.write(number % 6)
        now = tuple(rig.conditions())
        if not seen or seen[-1] != now:
            seen.append(now)
        if now == ("quota-80",):
            assert not rig.horizon.seq
            assert rig.store.usage().left_s is not None
        rig.keep_up()
        assert rig.store.used_bytes() <= quota + SEGMENT
        assert not rig.store.full
    assert seen[:3] == [(), ("quota-80",), ("quota-95",)]
    assert "window-short" in rig.conditions()
    usage = rig.store.usage()
    assert usage.real_window_s is not None
    points = rig.store.points()
    assert points is not None
    assert usage.real_window_s == (rig.now_ns - points[0].wall_ns) / NS
    assert 50 < usage.real_window_s < 200
    assert rig.newest(5, rig.feed.seq) >= rig.feed.seq - 6
    # More room, and in time the window is what was asked for.
    rig.store.set_limits(300, 100 * quota)
    for number in range(320):
        rig.write(number % 6)
        rig.keep_up()
    assert rig.conditions() == []


def test_a_commit_larger_than_what_is_left_waits_for_nothing(rig: Rig) -> None:
    """It is taken, and then room is made; refused without want of room it would wait for ever."""
    quota = 16 * SEGMENT
    rig.store.set_limits(100_000, quota)
    while rig.store.usage().share < 0.85:
        rig.write(rig.feed.seq % 6)
    for _ in range(4):
        rig.passes(1)
        rig.put(b"".join(rig.feed.writes(6, 4096) for _ in range(5)))
        rig.keep_up()
    assert rig.store.usage().share < 1
    assert rig.horizon.seq
    assert not rig.store.full


def write_on(rig: Rig) -> None:
    """Ever more blocks."""
    for at in range(60, 1000, 4):
        rig.write(at, 4)
        rig.keep_up()


def test_a_quota_stops_its_own_group_only(tmp_path: Path) -> None:
    """Data that nothing supersedes: no fold helps, the noisy group waits, the other goes on."""
    noisy = Rig(tmp_path, bytes([1]) * 16)
    quiet = Rig(tmp_path, bytes([2]) * 16)
    try:
        noisy.store.set_limits(0, 12 * SEGMENT)
        quiet.store.set_limits(0, 12 * SEGMENT)
        for at in range(0, 60, 4):
            noisy.write(at, 4)
            noisy.keep_up()
        with pytest.raises(StoreFullError):
            write_on(noisy)
        assert noisy.store.full
        assert noisy.store.used_bytes() <= 13 * SEGMENT  # one commit more
        assert "quota-95" in noisy.conditions()
        for number in range(20):
            quiet.write(number % 4)
        assert not quiet.store.full
        noisy.store.set_limits(0, 0)
        assert noisy.store.commit(60).seq == noisy.feed.seq
    finally:
        noisy.store.close()
        quiet.store.close()


def test_points_in_use_are_not_folded_away(rig: Rig) -> None:
    """A view reads its point as long as it is there, though it is not offered any more."""
    rig.store.set_limits(50, 0)
    for number in range(30):
        rig.write(number % 6)
    used = rig.feed.seq
    want = [rig.newest(block, used) for block in range(6)]
    rig.held.append(Position(1, 0, used))
    for number in range(200):
        rig.write(number % 6)
        rig.keep_up()
    assert rig.horizon.seq > used
    assert rig.store.status()["held_at"] == f"1/0/{used}"
    assert [rig.newest(block, used) for block in range(6)] == want
    before = rig.store.used_bytes()
    rig.held.clear()
    rig.keep_up()
    assert rig.store.status()["held_at"] is None
    assert rig.store.used_bytes() < before
    assert not rig.store.manifest.keeps(Position(1, 0, used))


def test_a_reader_keeps_what_it_reads(rig: Rig) -> None:
    """Files that a fold replaced stay while somebody may read them, and are reported."""
    for number in range(60):
        rig.write(number % 6)
    want = [rig.newest(block, 40) for block in range(6)]
    with StoreReader(rig.directory, rig.group) as reader:
        rig.store.fold(Position(1, 0, 55))
        assert rig.store.status()["stale_bytes"] > 0
        extents = reader.extent_map(Position(1, 0, 40))
        found = [extents.lookup(0, block * 4096, 4096)[0] for block in range(6)]
        assert [int(row["seq"]) for row in found] == want
        for row in found:
            header = np.frombuffer(
                reader.record(int(row["segment"]), int(row["position"]))[:64], layout.RECORD
            )
            assert int(header[0]["seq"]) == int(row["seq"])
        reader.refresh()
        assert reader.manifest.horizon.seq == 55
        extents = reader.extent_map(Position(1, 0, 57))
        row = extents.lookup(0, 0, 4096)[0]
        reader.record(int(row["segment"]), int(row["position"]))
    rig.keep_up()
    assert rig.store.status()["stale_bytes"] == 0


class SmallDisk(Files):
    """A disk of so many bytes, below one directory."""

    def __init__(self, root: Path, size: int) -> None:
        self.root, self.size = root, size

    def free_bytes(self, path: Path) -> int:
        used = 0
        for each in self.root.rglob("*"):
            try:
                found = each.stat()
            except FileNotFoundError:
                continue  # a fold, on another thread, removed it since the listing
            if stat.S_ISREG(found.st_mode) and each.name != "spare":
                used += found.st_size
        return max(0, self.size - used)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        end = offset + sum(len(b) for b in buffers)
        if end - os.fstat(fd).st_size > self.free_bytes(self.root):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(fd, buffers, offset)

    def write_direct(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        self.write(fd, buffers, offset)


def test_a_full_disk_is_folded_out_of_its_reserve(tmp_path: Path) -> None:
    """Appending stops at the reserve; the fold works in it, and appending goes on by itself."""
    disk = SmallDisk(tmp_path, (12 << 20) + 20 * SEGMENT)
    rig = Rig(tmp_path, files=disk, reserve_bytes=6 << 20)
    try:
        filler = tmp_path / "filler"
        filler.write_bytes(b"")
        for number in range(100):
            rig.write(number % 6)
        # Somebody else fills the disk to below the reserve.
        os.truncate(filler, disk.free_bytes(tmp_path) - (5 << 20))
        with pytest.raises(StoreFullError):
            rig.write(0)
        assert rig.store.full
        before = rig.store.used_bytes()
        rig.keep_up()  # without a window nothing is given up
        assert not rig.horizon.seq
        rig.store.set_limits(10_000, 0)
        rig.keep_up()
        assert rig.store.used_bytes() < before / 2
        assert "window-short" in rig.conditions()
        os.truncate(filler, 0)
        deadline = time.monotonic() + 60
        while rig.store.durable.seq < rig.feed.seq and time.monotonic() < deadline:
            time.sleep(0.05)
        assert rig.store.durable.seq == rig.feed.seq
    finally:
        rig.store.close()


def test_where_a_fold_must_stop_for_points_in_use(rng: random.Random) -> None:
    """Against a walk over both lines, position by position."""
    epochs: list[tuple[int, Position]] = [(1, Position())]
    for epoch in range(2, 7):
        parent, begins_at = rng.choice(epochs)
        epochs.append((epoch, Position(parent, 0, rng.randrange(begins_at.seq, 30))))
    manifest = Manifest.__new__(Manifest)
    entries = tuple(_entry(epoch, parent) for epoch, parent in epochs)
    object.__setattr__(manifest, "epochs", entries)
    object.__setattr__(manifest, "name", "web")

    def line(point: Position) -> set[tuple[int, int]]:
        found = set()
        begins = dict(epochs)
        epoch, seq = point.epoch, point.seq
        while epoch:
            low = begins[epoch].seq
            found |= {(epoch, s) for s in range(low + 1, seq + 1)}
            epoch, seq = begins[epoch].epoch, min(begins[epoch].seq, seq)
        return found

    for _ in range(50):
        points = [Position(rng.randrange(1, 7), 0, rng.randrange(40, 50)) for _ in range(3)]
        object.__setattr__(manifest, "horizon", points[0])
        both = line(points[0]) & line(points[1]) & line(points[2])
        found = common_point(manifest, points[1:])
        assert line(found) == both


def _entry(epoch: int, parent: Position) -> Any:
    from vrep.target.manifest import EpochEntry

    return EpochEntry(epoch, EpochState.ACCEPTED, bytes([epoch]) * 16, bytes(16), parent)


def test_growth_tells_when_room_is_used_up() -> None:
    growth = Growth()
    assert growth.left_s(100) is None
    for second in range(400):
        growth.note(second, 10 * second)
    assert growth.left_s(1000) == pytest.approx(100)
    assert growth.left_s(-5) == 0
    for second in range(400, 900):
        growth.note(second, 4000)
    assert growth.left_s(1000) is None
