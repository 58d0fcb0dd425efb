"""The clock by which a history ages: it counts what passed, and nothing else."""

from __future__ import annotations

import random
import time

from vrep.target.aging import Aging, Count, Steady, host_steady


class Host:
    """A host: which boot, and how long it has been up."""

    def __init__(self) -> None:
        self.boot, self.up_ns = 7, 0

    def steady(self) -> Steady:
        return Steady(self.boot, self.up_ns)


def test_what_passes_in_one_boot_counts_whether_or_not_the_process_runs(
    rng: random.Random,
) -> None:
    host, passed = Host(), 0
    count = Aging(host.steady).count()
    for _ in range(200):
        aging = Aging(host.steady, count)
        for _ in range(rng.randrange(3)):
            step = rng.randrange(10**12)
            host.up_ns, passed = host.up_ns + step, passed + step
            assert aging.now_ns() == passed + 1
            count = aging.count()
        step = rng.randrange(10**12)
        host.up_ns, passed = host.up_ns + step, passed + step
    assert Aging(host.steady, count).now_ns() == passed + 1


def test_what_passes_between_two_boots_is_not_believed() -> None:
    host = Host()
    host.up_ns = 10**15
    count = Aging(host.steady, Count(5, 7, 10**15 - 10)).count()
    assert count == Count(15, 7, 10**15)
    host.boot, host.up_ns = 8, 10**18
    aging = Aging(host.steady, count)
    assert aging.now_ns() == 15
    host.up_ns += 3
    assert aging.count() == Count(18, 8, 10**18 + 3)


def test_it_never_runs_back() -> None:
    """A host that was put back to a snapshot is up for less than it was."""
    host = Host()
    host.up_ns = 100
    aging = Aging(host.steady, Count(50, 7, 200))
    assert aging.now_ns() == 50
    host.up_ns = 90
    assert aging.now_ns() == 50
    host.up_ns = 101
    assert aging.now_ns() == 51


def test_a_store_that_knows_nothing_begins_now() -> None:
    host = Host()
    host.up_ns = 10**18
    assert Aging(host.steady).now_ns() == 1


def test_the_hosts_clock_is_that_of_its_boot() -> None:
    first = host_steady()
    assert 0 < first.boot < 1 << 32
    assert abs(first.since_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) < 10**10
    assert host_steady().boot == first.boot
    assert host_steady().since_ns >= first.since_ns
