"""What an operator sees of a long cut: each transition as an event, and when it is whole again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from sites import GROUP, MIB, Pair, wait_until

from vrep.app.cli_status import text_of
from vrep.app.metrics import samples

pytestmark = pytest.mark.e2e

RING = 40 * MIB
"""the least that takes the largest write"""
CHANGE, ESTIMATE = "replication changes its state", "when replication is whole again"


def events(pair: Pair) -> list[dict[str, Any]]:
    """What the source's process told of the group's transitions."""
    lines = (pair.root / "source.log").read_text().splitlines()
    # The last one may be half there.
    found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    return [event for event in found if event["event"] in (CHANGE, ESTIMATE)]


def target(pair: Pair) -> dict[str, Any]:
    found: dict[str, Any] = pair.status()["targets"][0]
    return found


def test_every_transition_is_an_event_with_an_estimate(
    make_pair: Callable[..., Pair], rng: random.Random
) -> None:
    """Cut off until ring and spill are full; then the link is back, and slow."""
    pair = make_pair(ring_bytes=RING, source_settings=f"spill_bytes = {20 * MIB}").up()
    wait_until("it is whole", lambda: target(pair)["whole_in_s"] == 0.0)
    begun = len(events(pair))
    pair.cable.cut(down=True)
    with pair.client() as client:
        for _ in range(100):
            client.write(rng.randrange(client.bytes - MIB), rng.randbytes(MIB))
    wait_until("the spill is full", lambda: "spill-full" in pair.status()["conditions"])
    away = wait_until("the gap is told", lambda: "gap" in said(pair, begun) and target(pair))
    assert (away["whole_in_s"], away["missing_bytes"] > RING // 2) == (None, True)
    pair.cable.bytes_per_s = 4 * MIB  # for a while: it is looked at once a second
    pair.cable.repair()
    shown = wait_until("an end is told", lambda: shown_end(pair), every_s=0.05)
    wait_until("that is an event", lambda: estimated(pair, begun), every_s=0.05)
    pair.cable.bytes_per_s = 0
    pair.settle()
    wait_until("it is whole again", lambda: target(pair)["whole_in_s"] == 0.0)
    wait_until("that is an event", lambda: events(pair)[-1]["state"] == "replicating")

    told = events(pair)[begun:]
    assert all({"group", "missing_bytes", "whole_in_s"} <= event.keys() for event in told)
    for facts in ("offline", "spilling", "gap", "resync", "replicating"):
        assert facts in said(pair, begun), told
    assert told[-1]["whole_in_s"] == 0.0
    assert "whole in" in shown
    counts = pair.status()["transitions"]["counts"]
    assert counts["spilling"] >= 1
    assert counts["gap"] >= 1
    found = {name: value for name, labels, value in samples("a", pair.a.status())}
    assert found["vrep_target_whole_seconds"] == 0.0
    assert "vrep_group_transitions_total" in found
    pair.same_as_source()


def shown_end(pair: Pair) -> str:
    """A status as it is shown, once it says when all is whole; one alone, the next may not."""
    status = pair.a.status()
    ends = (status["groups"][GROUP]["targets"][0]["whole_in_s"] or 0) > 0
    return text_of(status) if ends else ""


def estimated(pair: Pair, begun: int) -> bool:
    """Whether an estimate of when it is whole was told, before it was."""
    told = events(pair)[begun:]
    return any((event["whole_in_s"] or 0) > 0 for event in told)  # of a change, or of its own


def said(pair: Pair, begun: int) -> set[str]:
    """Each state, and what a state hid, that was told."""
    changes = [event for event in events(pair)[begun:] if event["event"] == CHANGE]
    assert all(event["group"] == GROUP for event in changes)
    return {fact for event in changes for fact in (event["state"], *event["also"])}
