"""What a resync sends: of a disk that was changed past the filter, of a target that lost its
store, and of a group that its operator wants compared."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator

import pytest
from sites import GROUP, MIB, WAIT_S, Pair, bytes_sent, counted, wait_until

pytestmark = pytest.mark.e2e

BLOCK = 4096
SIZE = 24 * MIB
COPY = 256 << 10
"""of a sync copy, at most"""


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


def sent(pair: Pair, before: int) -> int:
    return bytes_sent(pair) - before


def test_a_disk_changed_past_the_filter_is_compared(pair: Pair, rng: random.Random) -> None:
    fill(pair, rng)
    before = counted(pair)
    pair.stop("filter")
    units = change(pair, rng)
    pair.cable.cut(down=True)  # or all may be compared before anybody looks
    pair.start("filter")
    pair.served()
    wait_until("it is unverified", lambda: pair.status()["unverified"] == "stamps")
    pair.cable.repair()
    after = pair.settle()
    assert after["unverified"] == ""
    # Bytes are counted once they have left, and the target may be faster with its answer.
    wait_until("they are counted", lambda: sent(pair, before) >= units * BLOCK)
    assert sent(pair, before) <= units * BLOCK * 1.05 + 8192
    pair.same_as_source()


def test_an_operator_has_a_disk_compared(pair: Pair, rng: random.Random) -> None:
    """In the session that made the first sync, while a guest writes; hash traffic is counted
    apart, and is small."""
    fill(pair, rng)
    units = change(pair, rng)
    wait_until("resyncs are compared", lambda: pair.status()["targets"][0]["comparing"])
    before = counted(pair)
    pair.a.resync(GROUP)
    with pair.client() as client:
        for _ in range(200):
            unit = rng.randrange(SIZE // BLOCK)
            client.write(unit * BLOCK, rng.randbytes(BLOCK))
            units += 1
    after = pair.settle()
    target = after["targets"][0]
    assert target["equal_bytes"] > SIZE // 2
    # What the guest writes meanwhile may travel twice: as its record, and as a block.
    assert sent(pair, before) <= 2 * units * BLOCK * 1.05 + 8192
    assert 0 < target["hash_bytes"] < SIZE // 40
    pair.same_as_source()


def test_a_target_that_lost_its_newest_history_gets_the_difference(
    pair: Pair, rng: random.Random
) -> None:
    """Its store is that of an earlier moment."""
    fill(pair, rng)
    pair.stop("target")
    kept = pair.root / "kept"
    shutil.copytree(pair.store, kept)
    pair.start("target")
    pair.listening()
    units = rng.sample(range(SIZE // BLOCK), 60)
    with pair.client() as client:
        for unit in units:
            client.write(unit * BLOCK, rng.randbytes(BLOCK))
    pair.settle()
    before = counted(pair)
    pair.stop("target")
    shutil.rmtree(pair.store)
    kept.rename(pair.store)
    pair.start("target")
    wait_until("it is seen", lambda: pair.status()["targets"][0]["compared_bytes"] > 0)
    pair.settle()
    assert sent(pair, before) <= len(units) * BLOCK * 1.05 + 8192
    pair.same_as_source()


@pytest.mark.parametrize(
    "point", ["delta.after_run:1", "delta.after_run:7", "delta.before_clear:9"]
)
def test_a_filter_that_is_killed_while_it_compares_loses_nothing(
    pair: Pair, rng: random.Random, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two runs of a copy, and before its bits are cleared: what was not cleared is compared
    again, and what was published is not sent twice but for that copy."""
    fill(pair, rng)
    before = counted(pair)
    pair.stop("filter")
    units = change(pair, rng)
    monkeypatch.setenv("VREP_FAULT", f"{point}:kill")
    pair.start("filter")
    monkeypatch.delenv("VREP_FAULT")
    assert pair.processes.pop("filter").wait(WAIT_S) == -signal.SIGKILL
    pair.start("filter")
    pair.served()
    with pair.client() as client:
        client.write(0, rng.randbytes(BLOCK))
    pair.settle()
    assert sent(pair, before) <= (units + 1) * BLOCK * 1.05 + 2 * COPY + 8192
    pair.same_as_source()
    assert pair.b.points(GROUP).verdict.whole
