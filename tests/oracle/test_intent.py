"""Write-intent against sets of extents; a power loss is a second look at the file."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vrep import errors
from vrep._core.intent import EXTENT_BYTES, Intent

SIZES = [EXTENT_BYTES * 5 + 512, EXTENT_BYTES * 70]

RANGE = st.tuples(
    st.integers(0, 1), st.integers(0, EXTENT_BYTES * 8), st.integers(1, EXTENT_BYTES * 2)
)


def extents(disk: int, offset: int, length: int) -> set[tuple[int, int]]:
    end = min(offset + length, SIZES[disk])
    if offset >= end:
        return set()
    return {(disk, e) for e in range(offset // EXTENT_BYTES, -(-end // EXTENT_BYTES))}


def hot_in(path: Path) -> set[tuple[int, int]]:
    intent = Intent.open(path, SIZES)
    found = set()
    for disk in range(2):
        for run in intent.runs(disk):
            found |= extents(disk, *run)
    intent.close()
    return found


class IntentModel(RuleBasedStateMachine):
    """An extent with a write in flight, or not flushed since, is hot after a power loss."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.path = self.directory / "intent"
        self.intent = Intent.create(self.path, SIZES)
        self.inflight: list[tuple[int, int, int]] = []
        self.unsafe: set[tuple[int, int]] = set()  # written, not flushed and checkpointed since
        self.cooling: set[tuple[int, int]] | None = None
        self.writing = False

    def teardown(self) -> None:
        self.intent.close()
        shutil.rmtree(self.directory)

    @rule(where=RANGE)
    def begin(self, where: tuple[int, int, int]) -> None:
        if self.intent.begin(*where):
            self.inflight.append(where)
            self.unsafe |= extents(*where)
        else:
            assert self.intent.wants_sync or self.writing
        if self.cooling is not None:
            self.cooling -= extents(*where)

    @precondition(lambda self: self.inflight)
    @rule(which=st.integers(0, 100))
    def end(self, which: int) -> None:
        self.intent.end(*self.inflight.pop(which % len(self.inflight)))

    @precondition(lambda self: not self.writing)
    @rule()
    def prepare(self) -> None:
        self.intent.prepare()
        self.writing = True

    @precondition(lambda self: self.writing)
    @rule(fails=st.sampled_from(["no", "before", "after"]))
    def finish_sync(self, fails: str) -> None:
        if fails != "before":
            self.intent.write()
        self.intent.commit(0 if fails == "no" else -3)
        self.writing = False

    @rule()
    def cool_begin(self) -> None:
        self.intent.cool_begin()
        busy = set().union(*(extents(*where) for where in self.inflight))
        self.cooling = self.unsafe - busy

    @precondition(lambda self: self.cooling is not None)
    @rule(ok=st.booleans())
    def cool_end(self, ok: bool) -> None:
        self.intent.cool_end(ok)
        if ok and self.cooling is not None:
            self.unsafe -= self.cooling
        self.cooling = None

    @rule()
    def power_loss_and_restart(self) -> None:
        self.intent.close()
        hot = hot_in(self.path)
        assert self.unsafe <= hot
        self.intent = Intent.open(self.path, SIZES)
        self.inflight, self.cooling, self.writing = [], None, False
        self.unsafe = set()

    @invariant()
    def a_power_loss_now_would_find_all_that_is_unsafe(self) -> None:
        assert self.unsafe <= hot_in(self.path)


TestIntentModel = IntentModel.TestCase
TestIntentModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("slot", [0, 1])
def test_a_torn_slot_falls_back(tmp_path: Path, slot: int) -> None:
    path = tmp_path / "intent"
    intent = Intent.create(path, SIZES)
    assert not intent.begin(0, 0, 1)
    intent.sync()
    intent.sync()
    intent.close()
    raw = bytearray(path.read_bytes())
    raw[slot * 4096 + 130] ^= 1
    path.write_bytes(raw)
    assert hot_in(path) == {(0, 0)}
    raw[(1 - slot) * 4096 + 20] ^= 1
    path.write_bytes(raw)
    with pytest.raises(errors.CorruptError):
        Intent.open(path, SIZES)


def test_another_geometry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "intent"
    Intent.create(path, SIZES).close()
    with pytest.raises(errors.InvalidError):
        Intent.open(path, SIZES, group_id=b"x" * 16)
    with pytest.raises(errors.InvalidError):
        Intent.open(path, [SIZES[0]])
    with pytest.raises(errors.NotFoundError):
        Intent.open(tmp_path / "none", SIZES)
