"""Rooms: memory for received records, used again when nobody holds it any more.

A frame's payload lives from its first byte until its records are durable. New pages for each
cost more than the decryption of what fills them, so slabs go round: `room` hands out a view of
one, and the slab comes back when the last view of it is gone. Sizes are bytes; slabs are powers
of two from `SMALL_BYTES`, and at most `KEPT_BYTES` of them wait. Any thread.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rooms"]

SMALL_BYTES: Final = 64 << 10
"""what is smaller comes from the allocator, which has pages for it"""
KEPT_BYTES: Final = 64 << 20
"""above the credits of one source"""


class Rooms:
    """A stock of slabs."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._waiting: dict[int, list[NDArray[np.uint8]]] = {}
        # Reentrant: a slab may come back while the collector runs inside of `room`.
        self._lock = threading.RLock()
        self.waiting_bytes = 0

    def room(self, _channel: int, length: int) -> memoryview:
        """`length` writable bytes of any content."""
        if length < SMALL_BYTES:
            return np.empty(length, np.uint8).data
        size = 1 << (length - 1).bit_length()
        with self._lock:
            waiting = self._waiting.get(size)
            slab = waiting.pop() if waiting else None
            if slab is not None:
                self.waiting_bytes -= size
        if slab is None:
            slab = np.empty(size, np.uint8)
        # Views of it hold `loan`, and `loan` holds the slab's memory: NumPy would make them hold
        # the slab itself, whose end would be that of its memory.
        loan = np.frombuffer(slab.data, np.uint8, length)
        weakref.finalize(loan, self._back, slab).atexit = False
        return loan.data

    def _back(self, slab: NDArray[Any]) -> None:
        with self._lock:
            if self.waiting_bytes + slab.nbytes <= self._kept_bytes:
                self._waiting.setdefault(slab.nbytes, []).append(slab)
                self.waiting_bytes += slab.nbytes
