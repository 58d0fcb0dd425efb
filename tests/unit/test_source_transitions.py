"""Transitions: each is one event, counted, with an estimate of when replication is whole again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from group_definition import definition
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from vrep.source.transitions import Backlog, Transitions
from vrep.states import STATES

MIB = 1 << 20
RING = 64 * MIB
CHANGE, ESTIMATE = "replication changes its state", "when replication is whole again"


class World:
    """What processes say of a group, second by second, and what becomes of it."""

    def __init__(self) -> None:
        self.transitions = Transitions("web")
        self.definition = definition()
        self.filtered: dict[str, Any] | None = {
            "gap": False, "gap_seq": 0, "gaps": 0, "unverified": "", "durable": 9,
            "ring_bytes": RING, "ring_free_bytes": RING, "unshipped_bytes": 0,
        }  # fmt: skip
        self.session: dict[str, Any] = {"connected": True, "fenced": False, "spill": {"bytes": 0}}
        self.now_s = 1000.0
        self.events: list[dict[str, Any]] = []
        self.look()

    def look(self, seconds: float = 1.0, **filtered: Any) -> dict[str, Any]:
        self.now_s += seconds
        if self.filtered is not None:
            self.filtered.update(filtered)
        with capture_logs() as events:
            self.transitions.look(
                self.definition, self.filtered, self.session, self.now_s, int(self.now_s * 1e9)
            )
        self.events += events
        return self.transitions.view

    def take(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events


@pytest.fixture
def world() -> Iterator[World]:
    return World()


def one(events: list[dict[str, Any]]) -> dict[str, Any]:
    (event,) = events
    assert (event["group"], {"missing_bytes", "whole_in_s"} <= event.keys()) == ("web", True)
    return event


def test_from_a_cut_to_whole_again(world: World) -> None:
    """Cut off, spilling, a gap, connected again, copied, whole: each is told as it comes."""
    for _ in range(3):
        assert world.look()["whole_in_s"] == 0.0
    assert world.take() == []

    world.session["connected"] = False
    world.look(ring_free_bytes=RING - 8 * MIB)
    event = one(world.take())
    assert (event["event"], event["state"], event["was"]) == (CHANGE, "offline", ["replicating"])
    assert (event["missing_bytes"], event["whole_in_s"]) == (8 * MIB, None)
    assert event["log_level"] == "warning"
    for _ in range(5):
        world.look()
    assert world.take() == []  # once

    world.session["spill"]["bytes"] = 100 * MIB
    world.look()
    event = one(world.take())
    assert (event["state"], event["also"]) == ("offline", ["spilling"])
    assert event["missing_bytes"] == 108 * MIB
    world.look(gap=True, gap_seq=7, gaps=1, unshipped_bytes=50 * MIB)
    event = one(world.take())
    assert event["also"] == ["gap", "spilling"]
    assert event["missing_bytes"] == 158 * MIB

    world.session["connected"] = True
    world.look()
    event = one(world.take())
    assert (event["state"], event["also"]) == ("resync", ["spilling"])
    assert event["was"] == ["gap", "offline", "spilling"]
    told = None
    left = 100
    while left:
        left -= 10
        world.session["spill"]["bytes"] = left * MIB
        view = world.look()
        told = told or view["whole_in_s"]
    assert told == pytest.approx(14.8, rel=0.1)  # 148 MiB at 10 a second
    estimate, spilled = world.take()
    assert (estimate["event"], estimate["whole_in_s"]) == (ESTIMATE, told)
    assert (spilled["state"], spilled["also"]) == ("resync", [])
    world.look(unshipped_bytes=0)
    assert one(world.take())["state"] == "gap"
    world.look(gap=False, ring_free_bytes=RING)
    event = one(world.take())
    assert (event["state"], event["whole_in_s"], event["log_level"]) == ("replicating", 0.0, "info")
    assert world.transitions.view["counts"] == {
        "offline": 1, "spilling": 1, "gap": 2, "resync": 1, "replicating": 1,
    }  # fmt: skip
    assert world.transitions.view["since_ns"] == int(world.now_s * 1e9)


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({"fenced": True}, "failed-over"),
        ({"unverified": "stamps"}, "unverified"),
        ({"paused": True}, "paused"),
        ({"gap": True, "gap_seq": 1}, "initial-sync"),
        ({"filtered": None}, "error"),
    ],
)
def test_every_state_is_an_event(world: World, change: dict[str, Any], state: str) -> None:
    assert state in STATES
    for key, value in change.items():
        if key == "filtered":
            world.filtered = value
        elif key == "paused":
            world.definition = definition(paused=value)
        elif key in world.session:
            world.session[key] = value
        else:
            assert world.filtered is not None
            world.filtered[key] = value
    world.look()
    event = one(world.take())
    assert event["state"] == state
    assert world.transitions.view["counts"] == {state: 1}
    if world.filtered is None:
        assert (event["missing_bytes"], event["whole_in_s"]) == (None, None)


def test_a_gap_between_two_looks_is_told(world: World) -> None:
    world.look(gaps=2)
    (event,) = world.take()
    assert (event["event"], event["gaps"]) == ("a gap came and went", 2)
    assert world.transitions.view["counts"] == {"gap": 2}
    world.look(gaps=0)  # the filter was restarted
    world.look(gaps=1)
    assert world.transitions.view["counts"] == {"gap": 3}


def test_what_does_not_shrink_has_no_end(world: World) -> None:
    world.look(gap=True, gap_seq=5, unshipped_bytes=10 * MIB)
    for number in range(5):
        assert world.look(unshipped_bytes=(10 + number) * MIB)["whole_in_s"] is None


@given(
    rate=st.integers(1 << 16, 1 << 30),
    seconds=st.integers(3, 300),
    every_s=st.floats(0.5, 3.0),
)
def test_a_steady_pace_is_told_right(rate: int, seconds: int, every_s: float) -> None:
    backlog, now_s, left = Backlog(), 50.0, rate * seconds
    assert backlog.left_s(now_s, left) is None
    while left > rate * every_s:
        now_s += every_s
        left -= int(rate * every_s)
        assert backlog.left_s(now_s, left) == pytest.approx(left / rate, rel=0.01, abs=0.11)
    assert backlog.left_s(now_s + every_s, 0) == 0.0


def test_a_pace_that_changes_is_followed() -> None:
    backlog, left = Backlog(), 1000 * MIB
    for second in range(20):
        left -= 20 * MIB
        backlog.left_s(100.0 + second, left)
    for second in range(30):
        left -= 5 * MIB
        told = backlog.left_s(120.0 + second, left)
    assert told == pytest.approx(left / (5 * MIB), rel=0.2)
    backlog.forget()
    assert backlog.left_s(200.0, left) is None
