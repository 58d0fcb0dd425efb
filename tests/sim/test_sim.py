"""The simulator's default run, and that a seed means the same world every time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN = Path(__file__).parent / "run.py"


def play(seeds: list[int]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(RUN), "--worker", json.dumps(seeds)],
        capture_output=True,
        check=True,
        text=True,
        env={"PYTHONHASHSEED": "0"},
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_default_run(seed: int) -> None:
    base = 10_000 + seed % (1 << 40)
    done = subprocess.run(
        [sys.executable, str(RUN), "--base", str(base)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]


def test_a_seed_is_one_world(seed: int) -> None:
    """Whatever was played before it in the same process."""
    first, second = seed % (1 << 40), 1 + seed % 977
    alone = play([second])
    later = play([first, second])
    assert alone[0]["events"] == later[1]["events"]
    assert alone[0]["error"] == later[1]["error"] == ""
