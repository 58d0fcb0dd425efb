"""The demonstration itself, as `make demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sites import wait_until

from vrep.app.demo import main
from vrep.app.demo.run import GROUP, LOST_MS, Demo

WANTED = ["checkpoint", "chosen second", "latest"]


@pytest.fixture(autouse=True)
def _kept_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disaster comes while the target keeps up. Its disk may be busy with other tests, and
    what is not durable for so long is lost then, as it is said to be."""
    strike = Demo.disaster

    def keeps_up(demo: Demo) -> bool:
        status = demo.require_a().group_status(GROUP)
        age_ms = status["targets"][0]["rpo_ms"] if status is not None else None
        return age_ms is not None and age_ms < LOST_MS // 4

    def disaster(demo: Demo) -> None:
        wait_until("the target keeps up", lambda: keeps_up(demo))
        strike(demo)

    monkeypatch.setattr(Demo, "disaster", disaster)


def test_without_a_guest_it_recovers_but_does_not_count(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    assert main("none", out=str(out)) == 3
    report = json.loads(out.read_text())
    assert report["guest"] == "none"
    assert report["violations"] == []
    assert [recovery["name"] for recovery in report["recoveries"]] == WANTED
    assert all(recovery["lines"] > 0 for recovery in report["recoveries"])


@pytest.mark.e2e
def test_a_real_guest_comes_back_at_every_point(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    assert main("qemu", out=str(out)) == 0
    report = json.loads(out.read_text())
    assert report["violations"] == []
    assert [recovery["name"] for recovery in report["recoveries"]] == WANTED
    checkpoint, chosen, latest = (recovery["lines"] for recovery in report["recoveries"])
    assert 0 < checkpoint < chosen < latest
    assert report["continued"] == f"CONTINUED from {latest}"
    assert report["processes_killed"] >= 4
