"""One limit for all groups: never more than the rate and one burst, and no group is left out."""

from __future__ import annotations

import random

import pytest

from vrep.source.bandwidth import BURST_S, TURN_BYTES_MIN, Bandwidth

RATE = 1_000_000


class HandClock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.mark.parametrize("seed", range(20))
def test_never_more_than_the_rate_and_a_burst(seed: int) -> None:
    choose, clock = random.Random(seed), HandClock()
    limit = Bandwidth(RATE, clock)
    sent: list[tuple[float, int]] = []
    waiting: list[tuple[float, int]] = []
    for _ in range(300):
        clock.now += choose.choice((0.0, 0.001, 0.05, 3.0))
        count = limit.turn_bytes(choose.randrange(1, 2 * RATE))
        waiting.append((clock.now + limit.take(count), count))
    sent = sorted(waiting)
    for first in range(0, len(sent), 7):
        total = 0
        for when, count in sent[first:]:
            total += count
            # The last of them begins when those before are through.
            assert total - count <= RATE * (when - sent[first][0] + BURST_S) + 1
    asked = [when for when, _ in waiting]
    assert asked == sorted(asked)  # nobody passes another


def test_what_was_not_used_is_not_saved_up() -> None:
    clock = HandClock()
    limit = Bandwidth(RATE, clock)
    clock.now += 3600
    assert limit.take(int(RATE * BURST_S)) == 0.0
    assert limit.take(1) == pytest.approx(0.0, abs=1e-6)
    assert limit.take(1000) > 0


def test_a_slow_line_is_shared_in_small_turns() -> None:
    assert Bandwidth(1000).turn_bytes(1 << 20) == TURN_BYTES_MIN
    assert Bandwidth(10_000_000).turn_bytes(1 << 20) == 1_000_000
    assert Bandwidth(10_000_000).turn_bytes(5) == 5


def test_no_limit() -> None:
    limit = Bandwidth(0)
    assert limit.turn_bytes(1 << 30) == 1 << 30
    assert limit.take(1 << 40) == 0.0
