"""The oldest and newest recovery point that a store follows, against a walk of its history."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import store_records as records

from vrep import errors
from vrep._core import layout
from vrep.recovery.history import History
from vrep.target.files import Files
from vrep.target.manifest import EpochEntry, EpochState, Position
from vrep.target.reader import StoreReader
from vrep.target.segment import segment_path
from vrep.target.store import GroupStore, StoreOptions

OTHER = b"o" * 16


BEGIN, END = layout.KIND_GAP_BEGIN, layout.KIND_GAP_END
Shown = tuple[Position, Position] | None


class Rig:
    """One store, and who writes it."""

    def __init__(
        self, where: Path, *, segment_bytes: int = 64 << 20, files: Files | None = None
    ) -> None:
        self.where = where
        self.options = StoreOptions(
            commit_s=0.001, segment_bytes=segment_bytes, reserve_bytes=0, merge=False
        )
        self.feed = records.Feed()
        self.store = GroupStore.open(
            where, records.GROUP, create=records.spec(), options=self.options, files=files
        )
        self.store.append(self.feed.stream())

    def reopen(self) -> None:
        self.store.commit()
        self.store.close()
        self.open()

    def open(self) -> None:
        self.store = GroupStore.open(self.where, records.GROUP, options=self.options)
        self.feed.restart()
        self.store.append(self.feed.stream())

    def append(self, *parts: bytes) -> Position:
        self.store.append(b"".join(parts))
        position: Position = self.feed.position
        return position

    def write(self, count: int = 1) -> Position:
        return self.append(self.feed.writes(count, length=512))

    def turn(self, kind: int, jump: int = 0) -> Position:
        to = self.feed.seq + 1 + jump if jump else None
        return self.append(self.feed.mark_gap(kind, jump_to=to))

    def enter(self, entry: EpochEntry) -> None:
        """Write this epoch from here on; its stream comes with its first records."""
        self.feed = records.Feed(entry, entry.parent.seq)
        self.store.append(self.feed.stream())

    def shown(self) -> Shown:
        points = self.store.points()
        return (points[0].position, points[1].position) if points else None

    def walked(self) -> Shown:
        """The same, by a walk; the times that are shown are checked against it."""
        with StoreReader(self.where, records.GROUP) as reader:
            history = History(reader)
            if history.oldest is None or history.newest is None:
                return None
            found = history.locate(history.newest)
            assert found is not None
            points = self.store.points()
            assert points is not None
            assert points[0].wall_ns == history.ranges[0].first_wall_ns
            assert points[1].wall_ns in (0, found.wall_ns)
            return history.oldest, found.position


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path)
    yield rig
    rig.store.close()


def test_random_histories(tmp_path: Path, rng: random.Random) -> None:
    """Gaps with and without jumps, restarts, small segments, failovers kept and rolled back."""
    rig = Rig(tmp_path, segment_bytes=4096)

    def batch() -> None:
        """Several records in one go: a gap may begin and end inside of it."""
        parts = []
        for _ in range(rng.randrange(1, 6)):
            jump = rig.feed.seq + rng.randrange(2, 9) if rng.random() < 0.3 else None
            parts.append(
                rng.choice(
                    [
                        lambda: rig.feed.writes(rng.randrange(1, 4), length=512),
                        lambda: rig.feed.zeroes(0, 4096),
                        lambda jump=jump: rig.feed.mark_gap(BEGIN, jump_to=jump),
                        lambda: rig.feed.mark_gap(END),
                        rig.feed.tally,
                    ]
                )()
            )
        if any(parts):
            rig.append(*parts)

    def failover() -> None:
        rig.store.commit()
        here = rig.store.durable
        parent = Position(here.epoch, 0, max(here.seq - rng.randrange(4), 0))
        with StoreReader(rig.where, records.GROUP) as reader:
            points = [
                Position.of(header)
                for span in reader.records()
                for header in span.found["header"]
                if header["kind"] not in (layout.KIND_STREAM, layout.KIND_TALLY)
                and Position.of(header) <= parent
                and header["epoch"] == here.epoch
            ]
        if not points:
            return
        state = rng.choice([EpochState.ACCEPTED, EpochState.PROVISIONAL])
        entry = rig.store.add_epoch(writer=OTHER, parent=points[-1], state=state)
        if state is EpochState.PROVISIONAL and rng.random() < 0.7:
            if rng.random() < 0.3:
                rig.enter(entry)
                rig.write(2)
                rig.store.commit()
                assert rig.shown() == rig.walked()
            # Provisional epochs that wrote records cannot be rolled back.
            wrote = rig.store.durable.epoch > max(
                each.epoch for each in rig.store.epochs if each.state is EpochState.ACCEPTED
            )
            if rng.random() < 0.5 or wrote:
                rig.store.accept_epoch(entry.epoch)
            else:
                entry = rig.store.roll_back_epoch(entry.epoch)
        if rig.feed.epoch.epoch != entry.epoch:
            assert rig.shown() == rig.walked()
            rig.enter(entry)

    steps: list[Callable[[], Any]] = [batch] * 12 + [rig.reopen, failover]
    steps.append(lambda: rig.store.merge_once())
    try:
        for _ in range(120):
            rng.choice(steps)()
            if rng.random() < 0.5:
                rig.store.commit()
                assert rig.shown() == rig.walked()
    finally:
        rig.store.close()


class HeldFiles(Files):
    """While `held`, no sync ends."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.free.set()
        self.waiting = threading.Event()

    def sync(self, fd: int) -> None:
        if not self.free.is_set():
            self.waiting.set()
            assert self.free.wait(30)
        super().sync(fd)


def test_what_is_not_durable_makes_no_point(tmp_path: Path) -> None:
    files = HeldFiles()
    rig = Rig(tmp_path, files=files)
    try:
        rig.turn(BEGIN)
        rig.write()
        rig.store.commit()
        assert rig.shown() is None
        files.free.clear()
        end = rig.turn(END)
        assert files.waiting.wait(30)
        assert rig.store.received == end
        assert rig.shown() is None
        files.free.set()
        rig.store.commit()
        assert rig.shown() == (end, end)
        files.waiting.clear()
        files.free.clear()
        last = rig.write(3)
        assert files.waiting.wait(30)
        assert rig.shown() == (end, end)
        files.free.set()
        rig.store.commit()
        assert rig.shown() == (end, last)
    finally:
        files.free.set()
        rig.store.close()


def test_a_gap_holds_the_newest_point_at_the_record_before_it(rig: Rig) -> None:
    rig.turn(BEGIN)
    first = rig.turn(END)
    before = rig.write(5)
    rig.turn(BEGIN, jump=100)
    rig.write(5)
    rig.store.commit()
    assert rig.shown() == (first, before) == rig.walked()
    rig.reopen()
    assert rig.shown() == (first, before) == rig.walked()
    points = rig.store.points()
    assert points is not None
    assert points[1].wall_ns  # read back from the store
    after = rig.turn(END)
    rig.store.commit()
    assert rig.shown() == (first, after)


def test_points_are_those_of_the_accepted_line(rig: Rig) -> None:
    """What a failover writes counts from when it is kept; what it left behind counts no more."""
    rig.turn(BEGIN)
    first = rig.turn(END)
    last = rig.write(4)
    rig.store.commit()
    parent = Position(1, 0, last.seq - 2)
    given_up = rig.store.add_epoch(writer=OTHER, parent=parent, state=EpochState.PROVISIONAL)
    assert rig.shown() == (first, last)
    rig.enter(rig.store.roll_back_epoch(given_up.epoch))
    last = rig.write()
    rig.store.commit()
    assert rig.shown() == (first, last)
    parent = Position(1, 0, first.seq + 1)
    kept = rig.store.add_epoch(writer=OTHER, parent=parent, state=EpochState.PROVISIONAL)
    rig.enter(kept)
    rig.turn(BEGIN)
    rig.write(9)
    rig.store.commit()
    assert rig.shown() == (first, last)
    rig.store.accept_epoch(kept.epoch)
    assert rig.shown() == (first, parent) == rig.walked()
    rig.reopen()
    assert rig.shown() == (first, parent)
    end = rig.turn(END)
    rig.store.commit()
    assert rig.shown() == (first, end) == rig.walked()


def test_a_gap_behind_a_fold_is_noticed(tmp_path: Path) -> None:
    """As many records of gaps come as the fold took away, and nobody asked in between."""
    rig = Rig(tmp_path, segment_bytes=4096)
    try:
        rig.turn(BEGIN)
        rig.write(16)
        rig.turn(BEGIN)  # again, by a source that started anew
        end = rig.turn(END)
        for _ in range(3):
            rig.store.commit()
            rig.write(16)
        rig.store.commit()
        rig.store.set_horizon(end)
        assert rig.shown() == (end, rig.store.durable)
        assert rig.store.fold(end)
        rig.turn(BEGIN)
        inside = rig.write()
        rig.turn(END)
        last = rig.write()
        rig.turn(BEGIN)
        rig.write()
        rig.store.commit()
        assert rig.shown() == (end, last)
        assert rig.store.in_gap
        with pytest.raises(errors.StateError, match="not a recovery point"):
            rig.store.set_horizon(inside)
    finally:
        rig.store.close()


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Rig]:
    """A store whose oldest index is damaged, opened again."""
    rig = Rig(tmp_path, segment_bytes=4096)
    rig.turn(BEGIN)
    rig.turn(END)
    for _ in range(3):
        rig.write(16)
        rig.store.commit()
    damaged = int(rig.store.manifest.segments[0]["segment"])
    rig.store.close()
    path = segment_path(rig.store.directory, damaged)
    data = bytearray(path.read_bytes())
    data[-layout.INDEX_TRAILER.itemsize :] = bytes(layout.INDEX_TRAILER.itemsize)
    path.write_bytes(data)
    rig.open()
    yield rig
    rig.store.close()


def test_a_damaged_index_hides_the_points_and_stops_nothing(damaged: Rig) -> None:
    damaged.write()
    damaged.store.commit()
    assert damaged.shown() is None


def test_an_epoch_that_followed_goes_on_behind_a_damaged_index(damaged: Rig) -> None:
    """Its stream came alone, where the records of the epoch before are not known: what comes next
    is no epoch that left another site."""
    last = damaged.store.durable
    damaged.enter(damaged.store.add_epoch(writer=OTHER, parent=last, state=EpochState.ACCEPTED))
    damaged.store.commit()
    assert damaged.store.durable == Position(2, 0, last.seq)
    assert damaged.write() == Position(2, 0, last.seq + 1)
    damaged.store.commit()
    assert damaged.store.durable == Position(2, 0, last.seq + 1)
    # One that does leave another site is still told from it.
    away = EpochEntry(
        3, EpochState.ACCEPTED, b"3" * 16, OTHER, Position(2, 0, last.seq + 9), wall_ns=3
    )
    damaged.store.follow([*damaged.store.manifest.epochs, away])
    damaged.enter(away)
    with pytest.raises(errors.CorruptError, match="not held here"):
        damaged.write()
