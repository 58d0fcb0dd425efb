"""The whole recovery life: failover, reverse, failback, move, round and round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from life import Life
from sites import GROUP

from vrep import errors

pytestmark = pytest.mark.e2e


@pytest.fixture
def make_life(seed: int) -> Iterator[Callable[..., Life]]:
    made: list[Life] = []

    def make(**options: Any) -> Life:
        made.append(Life(seed, **options))
        return made[-1]

    yield make
    for life in made:
        life.close()


def test_a_recovered_vm_is_protected_back_to_its_old_site(make_life: Callable[..., Life]) -> None:
    life = make_life().up()
    west, east = life.west, life.east
    with life.client(west) as client:
        life.write(client)
        life.checkpoint(west, east)
    life.settle(west)
    west.kill()
    east.site.failover_start(GROUP, force=True)
    view = east.site.failover_commit(GROUP)
    with life.client(east, view) as client:
        life.check(client)
        life.write(client)
    with pytest.raises(errors.UnreachableError):
        east.site.reverse(GROUP)  # west is still down, and nothing has changed
    with life.client(east, view) as client:
        life.check(client)
    west.start()
    made = east.site.reverse(GROUP)
    assert (made.epoch, made.parent.epoch) == (2, 1)
    assert east.site.reverse(GROUP) == made
    with life.client(east, view) as client:  # at the socket that its VM knows
        life.check(client)
        life.write(client)
    life.settle(east)
    with life.client(east) as client:
        life.write(client)
        life.checkpoint(east, west)
    life.settle(east)
    life.check_view(west, "latest", bytes(life.oracle))
    life.check_labels()
    for place in (west, east):
        points = place.site.points(GROUP)
        assert points.verdict.whole, points.verdict
