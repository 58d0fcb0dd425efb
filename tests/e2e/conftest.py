"""Two sites on one host, for every end-to-end test of the pipeline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Test modules are imported by their path; what they share stands beside them.
sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `every_front` runs over each front-end; those beside NBD that the mark does
    not name as `quick` are slow, and those in `but` are left out."""
    from fronts import FRONTS

    marker = metafunc.definition.get_closest_marker("every_front")
    if marker is not None and "front" in metafunc.fixturenames:
        quick = ("nbd", *marker.kwargs.get("quick", ()))
        fronts = [
            pytest.param(front, marks=[] if front in quick else [pytest.mark.slow])
            for front in FRONTS
            if front not in marker.kwargs.get("but", ())
        ]
        metafunc.parametrize("front", fronts, indirect=True)


@pytest.fixture
def front(request: pytest.FixtureRequest) -> str:
    """How the pair's disks are served: over NBD, unless the test is marked `every_front`."""
    return str(getattr(request, "param", "nbd"))


@pytest.fixture
def make_pair(front: str) -> Iterator[Callable[..., Any]]:
    """Makes pairs of sites (`sites.Pair`), and leaves nothing of them behind. Their logs are
    printed at the end: pytest shows them when the test failed."""
    from sites import Pair

    made: list[Pair] = []

    def make(**options: Any) -> Pair:
        pair = Pair(**{"front": front, **options})
        made.append(pair)
        return pair

    try:
        yield make
    finally:
        for pair in made:
            pair.close()
