"""The demonstration itself, as `make demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vrep.app.demo import main

WANTED = ["checkpoint", "chosen second", "latest"]


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
