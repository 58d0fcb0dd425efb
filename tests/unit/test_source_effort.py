"""How hard a source compresses, by shares of time that are told: no clock runs here."""

from __future__ import annotations

import random

from vrep.source.effort import DOWN_AFTER, FORGET, LOOK_S, UP_AFTER, Effort

MIB = 1 << 20


def second(effort: Effort, sealing: float, idle: float = 0.0, count: int = 100 * MIB) -> int:
    """A second of which such shares went into sealing and into nothing; the level after it."""
    waiting = LOOK_S - sealing - idle
    for _ in range(4):
        effort.note(sealing_s=sealing / 4, count=count // 4, waiting_s=waiting / 4, idle_s=idle / 4)
    return effort.level


def test_it_falls_step_by_step_while_sealing_holds_shipping_up() -> None:
    effort = Effort(9)
    seen = [second(effort, 0.95) for _ in range(12)]
    assert seen == [9, 6, 6, 3, 3, 1, 1, 0, 0, 0, 0, 0]


def test_one_busy_second_changes_nothing() -> None:
    effort = Effort(1)
    for _ in range(10):
        for _ in range(DOWN_AFTER - 1):
            assert second(effort, 0.95) == 1
        assert second(effort, 0.3) == 1


def test_it_stays_while_shipping_keeps_up_or_waits_for_the_link() -> None:
    effort = Effort(1)
    for _ in range(20):
        assert second(effort, 0.85, idle=0.15) == 1  # there was nothing to ship at times
        assert second(effort, 0.2) == 1
        assert second(effort, 0.7) == 1


def test_it_comes_back_when_there_is_time_and_not_before() -> None:
    effort = Effort(1)
    while effort.level:
        second(effort, 0.9, count=100 * MIB)
    # As fast as before without it, and a fifth of the time: compressing would take 90 % again.
    for _ in range(20):
        assert second(effort, 0.2, count=100 * MIB) == 0
    # Now less than half of that is written.
    for _ in range(UP_AFTER - 1):
        assert second(effort, 0.1, count=30 * MIB) == 0
    assert second(effort, 0.1, count=30 * MIB) == 1


def test_between_the_shares_it_does_not_swing() -> None:
    """At a rate which compressing just cannot do and sealing alone can, it is tried again as its
    cost is forgotten: a fall a minute or fewer, not one a second."""
    effort, before, falls = Effort(1), 1, 0
    for _ in range(600):
        level = second(effort, 0.9 if before else 0.15)
        falls += level < before
        before = level
    assert 1 <= falls <= 600 * (1 - FORGET) + 5
    assert before in (0, 1)


def test_an_idle_source_is_ready_to_compress() -> None:
    effort = Effort(12)
    while effort.level:
        second(effort, 0.99)
    for _ in range(6 * UP_AFTER):
        effort.note(idle_s=LOOK_S)
    assert effort.level == 12


def test_few_bytes_say_nothing_of_the_cost() -> None:
    effort = Effort(1)
    while effort.level:
        second(effort, 0.9)
    for _ in range(UP_AFTER):  # one byte that took long, at both steps
        second(effort, 0.2, count=1)
    assert effort.level == 1
    for _ in range(DOWN_AFTER):
        second(effort, 0.9, count=1)
    assert effort.level == 0
    for _ in range(UP_AFTER + 1):
        second(effort, 0.05, count=10 * MIB)
    assert effort.level == 1


def test_it_never_leaves_its_steps() -> None:
    rng = random.Random(7)
    for most in (0, 1, 2, 3, 5, 19):
        effort = Effort(most)
        assert effort.level == most
        for _ in range(500):
            level = second(effort, rng.choice((0.0, 0.1, 0.5, 0.99)), count=rng.randrange(1 << 28))
            assert 0 <= level <= most
