"""The change map against Python sets, and its reports against NumPy."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vrep import errors
from vrep._core.map import ChangeMap

BIT = 4096
SIZES = [BIT * 70 + 512, BIT * 300]
SHM = Path("/dev/shm")


def touched(disk: int, offset: int, length: int) -> set[tuple[int, int]]:
    end = min(offset + length, SIZES[disk])
    return {(disk, bit) for bit in range(offset // BIT, -(-end // BIT))} if offset < end else set()


def covered(disk: int, offset: int, length: int) -> set[tuple[int, int]]:
    end = offset + length
    return {
        (disk, bit)
        for bit in range(-(-SIZES[disk] // BIT))
        if bit * BIT >= offset and min((bit + 1) * BIT, SIZES[disk]) <= end
    }


class Generation:
    def __init__(self) -> None:
        self.bits: set[tuple[int, int]] = set()
        self.last_seq = 0
        self.inflight = 0


RANGE = st.tuples(st.integers(0, 1), st.integers(0, BIT * 310), st.integers(0, BIT * 12))


class MapModel(RuleBasedStateMachine):
    """Marks, publishes, seals, merges, clears, sync copies and restarts, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.path = SHM / f"vrep-test-{uuid.uuid4().hex}"
        self.map = ChangeMap.create(self.path, SIZES, bit_bytes=BIT)
        self.open = Generation()
        self.sealed: list[Generation] = []  # oldest first
        self.names: dict[Generation, int] = {}
        self.unshipped: set[tuple[int, int]] = set()
        self.commands: list[Generation] = []
        self.seq = 0
        self.marked = False

    def teardown(self) -> None:
        self.map.close()
        self.path.unlink()

    @rule(where=RANGE)
    def mark(self, where: tuple[int, int, int]) -> None:
        self.names[self.open] = self.map.mark(*where)
        self.open.bits |= touched(*where)
        self.open.inflight += 1
        self.commands.append(self.open)
        self.marked = True

    @precondition(lambda self: self.commands)
    @rule(which=st.integers(0, 100))
    def publish(self, which: int) -> None:
        generation = self.commands.pop(which % len(self.commands))
        self.seq += 1
        self.map.raise_seq(self.names[generation], self.seq)
        self.map.done(self.names[generation])
        generation.last_seq = max(generation.last_seq, self.seq)
        generation.inflight -= 1

    @rule(where=RANGE)
    def unrecorded(self, where: tuple[int, int, int]) -> None:
        self.map.mark_unshipped(*where)
        self.unshipped |= touched(*where)

    @rule(where=RANGE)
    def sync_copy(self, where: tuple[int, int, int]) -> None:
        self.mark(where)
        self.publish(len(self.commands) - 1)
        self.map.clear_unshipped(*where)
        self.unshipped -= covered(*where)

    @rule()
    def seal(self) -> None:
        self.names[self.open] = int(self.map.header["open_generation"])
        merge = self.map.seal(self.seq)
        if not self.marked:
            assert merge is None
            return
        if len(self.sealed) == 3:
            older, newer = self.sealed[:2]
            assert merge == (self.names[newer], self.names[older])
            older.bits |= newer.bits
            older.last_seq = max(older.last_seq, newer.last_seq)
            older.inflight += newer.inflight
            self.commands = [older if c is newer else c for c in self.commands]
            self.sealed.remove(newer)
        else:
            assert merge == ()
        self.sealed.append(self.open)
        self.open = Generation()
        self.marked = False

    @rule(behind=st.integers(0, 6))
    def clear(self, behind: int) -> None:
        durable = max(self.seq - behind, 0)
        stays = [g for g in self.sealed if g.inflight or g.last_seq > durable]
        assert self.map.clear(durable) == len(self.sealed) - len(stays)
        self.sealed = stays

    @rule()
    def lose_the_ring(self) -> None:
        self.map.generations_to_unshipped()
        for generation in (self.open, *self.sealed):
            self.unshipped |= generation.bits
            generation.bits = set()

    @rule()
    def restart(self) -> None:
        self.map.close()
        self.map = ChangeMap.attach(self.path, SIZES)
        self.map.reset_inflight()
        for generation in self.commands:
            assert self.map.count(self.names[generation]) == self.names[generation]
        self.marked = True

    @invariant()
    def the_maps_agree(self) -> None:
        dirty = set(self.unshipped)
        for generation in (self.open, *self.sealed):
            dirty |= generation.bits
        found = set()
        for disk in range(2):
            words = self.map.union(disk)
            bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
            found |= {(disk, int(bit)) for bit in bits}
        assert found == dirty
        assert self.map.dirty_bits == len(dirty)
        assert self.map.unshipped_bits == len(self.unshipped)
        size = sum(min(BIT, SIZES[disk] - bit * BIT) for disk, bit in self.unshipped)
        assert self.map.unshipped_bytes == size


TestMapModel = MapModel.TestCase
TestMapModel.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


@pytest.fixture
def path() -> Iterator[Path]:
    path = SHM / f"vrep-test-{uuid.uuid4().hex}"
    yield path
    path.unlink(missing_ok=True)


def naive_runs(dirty: np.ndarray, size: int) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], dirty.astype(np.int8), [0]])))
    return [
        (int(a) * BIT, min(int(b) * BIT, size) - int(a) * BIT)
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


@settings(max_examples=50, deadline=None)
@given(
    ranges=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 299), st.integers(1, 40)), max_size=30
    ),
    limit=st.integers(1, 20),
)
def test_runs_agree_with_numpy(ranges: list[tuple[int, int, int]], limit: int) -> None:
    path = SHM / f"vrep-test-{uuid.uuid4().hex}"
    dirty, unshipped = np.zeros(300, bool), np.zeros(300, bool)
    with ChangeMap.create(path, SIZES, bit_bytes=BIT) as changes:
        path.unlink()
        for kind, first, count in ranges:
            dirty[first : first + count] = True
            if kind == 0:
                unshipped[first : first + count] = True
                changes.mark_unshipped(1, first * BIT, count * BIT)
            else:
                changes.mark(1, first * BIT, count * BIT)
            if kind == 1:
                changes.seal(0)
        want = naive_runs(dirty, SIZES[1])
        assert [tuple(map(int, run)) for run in changes.runs(1)] == want
        at, walked = 0, []
        while (run := changes.next_run(1, at)) is not None:
            if run[1]:
                walked.append((at, run[0]))
            at += run[0]
        assert at == SIZES[1]
        assert walked == want
        at, copied = 0, np.zeros(300, bool)
        while (piece := changes.next_unshipped(1, at, limit * BIT)) is not None:
            assert piece[1] <= limit * BIT
            assert not copied[piece[0] // BIT]
            copied[piece[0] // BIT : (piece[0] + piece[1]) // BIT] = True
            at = sum(piece)
        assert (copied == unshipped).all()


def test_a_reader_sees_what_the_owner_marks(path: Path) -> None:
    with ChangeMap.create(path, SIZES, bit_bytes=BIT) as owner, ChangeMap.open(path) as reader:
        owner.mark(0, 0, 1)
        owner.mark_unshipped(0, BIT * 70, 512)
        owner.set_gap()
        assert reader.runs(0).tolist() == [[0, BIT], [BIT * 70, 512]]
        assert reader.dirty_bytes == BIT + 512
        assert reader.unshipped_bits == 1
        assert reader.gap
        assert reader.sizes == SIZES
        with pytest.raises(errors.ReadOnlyError):
            reader.mark(0, 0, 1)
        with pytest.raises(errors.RangeError):
            reader.runs(2)
        with pytest.raises(errors.BusyError):
            ChangeMap.attach(path, SIZES)


def test_a_checkpoint_brings_all_bits_back_as_unshipped(path: Path, tmp_path: Path) -> None:
    with ChangeMap.create(path, SIZES, bit_bytes=BIT) as changes:
        checkpoint = changes.checkpoint(tmp_path / "map")
        changes.mark(0, 0, 1)
        changes.seal(0)
        changes.mark(1, BIT * 299, 1)
        changes.mark_unshipped(1, 0, 1)
        checkpoint.write(clean=True)
        changes.mark(1, BIT, 1)  # after it: not in it
    with ChangeMap.create(path, SIZES, bit_bytes=BIT) as changes:
        assert changes.load_checkpoint(tmp_path / "map")
        assert changes.unshipped_bits == changes.dirty_bits == 3
        assert changes.runs(1).tolist() == [[0, BIT], [BIT * 299, BIT]]
    with pytest.raises(errors.InvalidError):
        checkpoint.write()


@pytest.mark.parametrize("cut", [0, 1, 1151, 1152, 5000])
def test_a_torn_checkpoint_falls_back(path: Path, tmp_path: Path, cut: int) -> None:
    with ChangeMap.create(path, SIZES, bit_bytes=BIT) as changes:
        checkpoint = changes.checkpoint(tmp_path / "map")
        changes.mark_unshipped(0, 0, 1)
        checkpoint.write()
        changes.mark_unshipped(0, BIT, 1)
        checkpoint.write()
        newest = tmp_path / "map.1"
        newest.write_bytes(newest.read_bytes()[:cut])
    with ChangeMap.create(path, SIZES, bit_bytes=BIT) as changes:
        assert not changes.load_checkpoint(tmp_path / "map")
        assert changes.unshipped_bits == 1
        (tmp_path / "map.0").write_bytes(b"")
        with pytest.raises(errors.CorruptError):
            changes.load_checkpoint(tmp_path / "map")
