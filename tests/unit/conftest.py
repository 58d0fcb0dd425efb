"""A target in this process, for the tests of what it answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Test modules are imported by their path; what they share stands beside them.
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Any]:
    from target_world import World

    world = World(tmp_path)
    try:
        yield world
    finally:
        world.close()
