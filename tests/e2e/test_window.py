"""Window and quota through the whole pipeline: real processes, folds beside the load, kills."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sites import GROUP, MIB, Pair, compare, wait_until

from vrep.source.ship import BATCH_BYTES
from vrep.target.journal import COMMIT_BYTES_MAX

pytestmark = pytest.mark.e2e

Make = Callable[..., Pair]
QUOTA = 48 * MIB
COMMIT = COMMIT_BYTES_MAX + BATCH_BYTES + MIB
"""the quota is judged before a commit, which takes batches until it has so much: the last one may
be whole beyond that; and what indexes take"""


def write_some(pair: Pair, rng: random.Random, total: int) -> None:
    """So many bytes of answered writes to the first disk."""
    with pair.client() as client:
        for _ in range(total // 65536):
            client.write(rng.randrange(client.bytes // 4096 - 16) * 4096, rng.randbytes(65536))


def test_a_quota_shortens_the_window_before_replication_stops(
    make_pair: Make, rng: random.Random
) -> None:
    # All that is written has room in the ring: how fast the target is does not matter here.
    pair = make_pair(
        disks={"root": 4 * MIB},
        ring_bytes=256 * MIB,
        target_settings=f"segment_bytes = {MIB}",
        dead_after_s=60.0,  # a busy machine is no reason to be offline
    )
    pair.up()
    assert pair.a.keep(GROUP, window_s=86400, quota_bytes=QUOTA) == ""
    stored = pair.stored()
    assert (stored["window_s"], stored["quota_bytes"]) == (86400, QUOTA)
    begin = pair.b.points(GROUP).oldest
    for _ in range(30):
        write_some(pair, rng, 4 * MIB)
        assert pair.stored()["bytes"] <= QUOTA + COMMIT
        assert pair.status()["state"] in ("replicating", "spilling")
    pair.settle()
    kept = pair.images["root"].read_bytes()
    pair.a.checkpoint(GROUP, "in the middle")
    pair.kill("target")
    write_some(pair, rng, MIB)
    pair.start("target")
    write_some(pair, rng, 2 * MIB)
    pair.settle()

    # It is not said while a fold takes away the file that knows how old the horizon is.
    stored = wait_until(
        "the window is short",
        lambda: s if "window-short" in (s := pair.stored())["conditions"] else None,
    )
    assert stored["folded_bytes"]
    assert 0 < stored["real_window_s"] < 3600
    assert stored["bytes"] <= QUOTA + COMMIT
    assert stored["write_amplification"] > 1
    assert stored["merge_failure"] == ""
    points = pair.b.points(GROUP)
    assert (points.verdict.whole, points.verdict.sealed) == (True, True)
    assert points.verdict.folded_to
    assert points.gaps == [] or all(not gap.open for gap in points.gaps)
    assert begin is not None
    assert points.oldest is not None
    assert points.oldest.point != begin.point
    pair.same_as_source()
    compare("root", pair.read_view("in the middle")["root"], kept)
    pair.stop("target")  # with its folds: what is the oldest point now stays it
    oldest = pair.b.points(GROUP).oldest
    assert oldest is not None
    result = pair.b.export(GROUP, pair.root / "oldest", at=oldest.point)
    assert Path(result.disks[0].path).stat().st_size == 4 * MIB


def test_a_window_lets_old_history_go(make_pair: Make, rng: random.Random) -> None:
    pair = make_pair(disks={"root": 4 * MIB}, target_settings=f"segment_bytes = {MIB}")
    pair.up()
    for _ in range(10):  # each in segments of its own
        write_some(pair, rng, 2 * MIB)
        pair.settle()
    whole = pair.stored()["bytes"]
    pair.stop("source")
    problem = pair.a.keep(GROUP, window_s=2)  # the target is told all the same
    assert problem == ""
    time.sleep(2)
    pair.start("source")
    wait_until("old history is gone", lambda: pair.stored()["bytes"] < 0.75 * whole)
    wait_until("all is well", lambda: pair.stored()["conditions"] == [])
    pair.settle()
    pair.same_as_source()
    pair.alive()
