"""What a resync sends: of a disk that was changed past the filter, of a target that lost its
store, and of a group that its operator wants compared."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from sites import MIB, Pair, wait_until

pytestmark = pytest.mark.e2e

BLOCK = 4096
SIZE = 24 * MIB


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(disks={"root": SIZE}, compression=0)
    try:
        yield pair
    finally:
        pair.close()


def fill(pair: Pair, rng: random.Random) -> bytes:
    """A disk of incompressible data, protected and settled."""
    data = rng.randbytes(SIZE)
    pair.images["root"].write_bytes(data)
    pair.up()
    return data


def change(pair: Pair, rng: random.Random, share: float = 0.01) -> int:
    """Blocks of the image become others, past the filter; how many."""
    units = rng.sample(range(SIZE // BLOCK), int(SIZE // BLOCK * share))
    with pair.images["root"].open("r+b") as file:
        for unit in units:
            file.seek(unit * BLOCK)
            file.write(rng.randbytes(BLOCK))
    return len(units)


def sent(pair: Pair, before: dict[str, Any]) -> int:
    return int(pair.status()["targets"][0]["bytes_sent"] - before["targets"][0]["bytes_sent"])


def test_a_disk_changed_past_the_filter_is_compared(pair: Pair, rng: random.Random) -> None:
    fill(pair, rng)
    pair.stop("filter")
    units = change(pair, rng)
    before = pair.status()
    pair.start("filter")
    pair.served()
    wait_until("it is unverified", lambda: pair.status()["unverified"] == "stamps")
    after = pair.settle()
    assert after["unverified"] == ""
    assert units * BLOCK <= sent(pair, before) <= units * BLOCK * 1.05 + 8192
    pair.same_as_source()
