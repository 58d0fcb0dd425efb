"""Whatever is wrong with a group, its status says what happens next and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_cli import commands
from test_status import FILTERED, SESSION, Rig, rig  # noqa: F401 - a fixture

from vrep import errors, waits
from vrep.advice import CONDITIONS, STATES, advice
from vrep.app.cli_status import text_of
from vrep.status import STATES as KNOWN

ROOT = Path(__file__).resolve().parents[2]


def documented() -> set[str]:
    """Conditions in the table of the reference."""
    text = (ROOT / "docs" / "reference" / "status.md").read_text()
    table = text.split("| condition | meaning |")[1].split("\n\n")[0]
    return {
        code
        for line in table.splitlines()[2:]
        for code in re.findall(r"`([\w-]+)`", line.split("|")[1])
    }


def test_every_state_and_condition_has_one() -> None:
    assert set(CONDITIONS) == documented()
    assert {*STATES, "replicating"} == set(KNOWN)


@pytest.mark.parametrize(("code", "text"), sorted({**STATES, **CONDITIONS}.items()))
def test_the_commands_that_it_names_exist(code: str, text: str) -> None:
    known = commands()
    for words in re.findall(r"'vrep ([^']+)'", text):
        parts = words.split()
        name = next((" ".join(parts[:n]) for n in (2, 1) if " ".join(parts[:n]) in known), None)
        assert name is not None, f"{code}: {words}"
        options = {option for one in known[name].params for option in one.opts}
        assert {part for part in parts if part.startswith("--")} <= options, f"{code}: {words}"


def test_a_status_says_it(rig: Rig) -> None:  # noqa: F811
    rig.add("web")
    rig.serve("filter", lambda: {"web": dict(FILTERED)})
    rig.serve("source", lambda: {"web": {**SESSION, "connected": False, "error": "no route"}})
    text = text_of(rig.site.status())
    assert "web: no route" in text
    assert f"web: offline: {STATES['offline']}" in text


def test_what_nobody_knows_is_not_shown_as_zero(rig: Rig) -> None:  # noqa: F811
    rig.add("web")
    rig.serve("source", lambda: {"web": dict(SESSION)})
    lines = text_of(rig.site.status()).splitlines()
    assert "not running here, or hanging: filter" in lines[0]
    row = re.split(r" {2,}", next(line for line in lines if line.startswith("web ")))
    assert row[1:9] == ["error", "filter-down", row[3], "-", "-", "-", "-", "-"]
    assert any(line.startswith("web: filter-down: ") for line in lines)


def test_one_that_replicates_well_needs_none() -> None:
    group: dict[str, Any] = {"role": "source", "state": "replicating", "conditions": []}
    assert advice("web", group) == []


def test_a_first_sync_that_a_full_target_does_not_hold_is_none(rig: Rig) -> None:  # noqa: F811
    """All was sent and nothing is held: it is not waited for in vain, nor called replicating."""
    rig.add("web")
    rig.serve("filter", lambda: {"web": {**FILTERED, "durable": 0, "gap_last": 1}})
    rig.serve("source", lambda: {"web": {**SESSION, "conditions": ["target-full"]}})
    status = rig.site.status()["groups"]["web"]
    assert (status["state"], status["conditions"]) == ("initial-sync", ["target-full"])
    with pytest.raises(errors.StoreFullError, match="no room for 'web'"):
        waits.replicating(rig.site, "web", 5.0, None)


@pytest.mark.parametrize(
    ("decided", "wanted", "unwanted"),
    [
        ("provisional", ["commit", "rollback"], ["reverse"]),
        ("accepted", ["reverse"], ["commit", "rollback"]),
    ],
)
def test_a_group_that_was_taken_over_has_a_way_on(
    decided: str, wanted: list[str], unwanted: list[str]
) -> None:
    """Its old source is silent since it was shut out: to fail over once more is no advice."""
    group: dict[str, Any] = {
        "role": "target",
        "state": "failed-over",
        "conditions": ["old-source-alive", "source-silent"],
        "epochs": [{"epoch": 1, "state": "accepted"}, {"epoch": 2, "state": decided}],
    }
    texts = dict(advice("web", group))
    assert set(texts) == {"failed-over", "old-source-alive"}
    assert all(word in texts["failed-over"] for word in wanted)
    assert not any(word in text for text in texts.values() for word in unwanted)
    assert "failover start" not in str(texts)


def test_a_lane_is_advised_of_its_whole_group() -> None:
    """But where a command is about one lane alone: recovery refuses a lane."""
    conditions = ["damaged", "source-silent"]
    group: dict[str, Any] = {"role": "target", "state": "offline", "conditions": conditions}
    for name, whole in (("shop@1", "shop"), ("a-GROUP-of-LANEs", "a-GROUP-of-LANEs")):
        texts = dict(advice(name, group))
        assert f"'vrep failover start {whole}'" in texts["source-silent"]
        assert f"'vrep repair {name}'" in texts["damaged"]
        assert f"'vrep repair {name} --resend'" in texts["damaged"]
