"""Two sites on one host, for every end-to-end test of the pipeline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Test modules are imported by their path; what they share stands beside them.
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Any]]:
    """Makes pairs of sites (`sites.Pair`), and leaves nothing of them behind. Their logs are
    printed at the end: pytest shows them when the test failed."""
    from sites import Pair

    made: list[Pair] = []

    def make(**options: Any) -> Pair:
        pair = Pair(**options)
        made.append(pair)
        return pair

    try:
        yield make
    finally:
        for pair in made:
            pair.close()
