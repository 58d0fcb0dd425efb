"""A target in this process, for the tests of what it answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Any]:
    from target_world import World

    world = World(tmp_path)
    try:
        yield world
    finally:
        world.close()
