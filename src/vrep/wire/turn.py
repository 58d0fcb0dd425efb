"""A lock that its users get in turn.

threading.Lock lets a thread that has just released it take it again before the
one that waited wakes up; a busy writer then starves the reader of the same
connection.  Here who waits holds the turn, and nobody passes it.
"""

from __future__ import annotations

import threading

__all__ = ["TurnLock"]


class TurnLock:
    """Not reentrant. Of two threads that both want it, neither gets it twice
    in a row."""

    __slots__ = ("_lock", "_turn")

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._lock = threading.Lock()

    def acquire(self) -> None:
        with self._turn:
            self._lock.acquire()

    def acquire_within(self, timeout_s: float) -> bool:
        """Acquire, or give up after `timeout_s` (0: without waiting)."""
        if timeout_s <= 0:
            if not self._turn.acquire(blocking=False):
                return False
        elif not self._turn.acquire(timeout=timeout_s):
            return False
        try:
            if timeout_s <= 0:
                return self._lock.acquire(blocking=False)
            return self._lock.acquire(timeout=timeout_s)
        finally:
            self._turn.release()

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
