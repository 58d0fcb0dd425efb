"""Who waits for a TurnLock gets it before who has just had it."""

from __future__ import annotations

import threading

from vrep.wire.turn import TurnLock


def test_the_one_who_waits_is_next() -> None:
    lock = TurnLock()
    order: list[str] = []

    def wait() -> None:
        with lock:
            order.append("waiter")

    for _ in range(50):
        order.clear()
        lock.acquire()
        waiter = threading.Thread(target=wait)
        waiter.start()
        while not lock._turn.locked():
            pass
        lock.release()
        with lock:
            order.append("holder")
        waiter.join()
        assert order == ["waiter", "holder"]


def test_without_waiting() -> None:
    lock = TurnLock()
    assert lock.acquire_within(0)
    assert not lock.acquire_within(0)
    assert not lock.acquire_within(0.001)
    lock.release()
    assert lock.acquire_within(0.001)
    lock.release()
