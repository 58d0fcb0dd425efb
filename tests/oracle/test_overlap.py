"""Overlap against brute force: held means that nothing earlier overlaps."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vrep import errors
from vrep._core.overlap import Overlap, Range

LENGTH = st.one_of(st.integers(1, 6), st.integers(1, 100), st.just(2**64 - 1))


def overlap(a: Range, b: Range) -> bool:
    return a.disk == b.disk and a.offset < b.offset + b.length and b.offset < a.offset + a.length


class OverlapModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = Overlap()
        self.order: list[Range] = []

    @rule(disk=st.integers(0, 1), offset=st.integers(0, 60), length=LENGTH)
    def acquire(self, disk: int, offset: int, length: int) -> None:
        self.order.append(self.table.acquire(disk, offset, length))

    @precondition(lambda self: self.order)
    @rule(which=st.integers(0, 1000))
    def release(self, which: int) -> None:
        """A held range ends, or a waiting one is withdrawn."""
        waiting = [r for r in self.order if not r.held]
        leaving = self.order.pop(which % len(self.order))
        granted = self.table.release(leaving)
        assert not leaving.held
        assert set(granted) == {r for r in waiting if r is not leaving and r.held}

    @invariant()
    def held_means_nothing_earlier_overlaps(self) -> None:
        for i, later in enumerate(self.order):
            assert later.held is not any(overlap(earlier, later) for earlier in self.order[:i])
        assert self.table.held == sum(r.held for r in self.order)


TestOverlapModel = OverlapModel.TestCase
TestOverlapModel.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def test_a_range_is_released_once() -> None:
    table = Overlap()
    held = table.acquire(0, 0, 1)
    table.release(held)
    with pytest.raises(errors.InvalidError):
        table.release(held)
