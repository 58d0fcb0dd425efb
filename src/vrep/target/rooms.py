"""Rooms: memory for received records, used again when nobody holds it any more.

A frame's payload lives from its first byte until its records are durable. New pages for each
cost more than the decryption of what fills them, so slabs go round: `room` hands out a view of
one, and the slab comes back when the last view of it is gone. Sizes are bytes; slabs are powers
of two from `SMALL_BYTES`. One that waits counts together with those that are held: above
`KEPT_BYTES` in all, what waits goes back to the host, of the size first that was asked for
longest ago. Any thread.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Rooms"]

SMALL_BYTES: Final = 64 << 10
"""what is smaller comes from the allocator, which has pages for it"""
KEPT_BYTES: Final = 128 << 20
"""twice the credits of one source: a slab may be twice as large as what it holds"""


class Rooms:
    """A stock of slabs."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        # By size; the size that was used last stands last.
        self._waiting: dict[int, list[NDArray[np.uint8]]] = {}
        # Reentrant: a slab may come back while the collector runs inside of `room`.
        self._lock = threading.RLock()
        self.waiting_bytes = 0
        self.held_bytes = 0

    def room(self, _channel: int, length: int) -> memoryview:
        """`length` writable bytes of any content."""
        if length < SMALL_BYTES:
            return np.empty(length, np.uint8).data
        size = 1 << (length - 1).bit_length()
        with self._lock:
            waiting = self._of_size(size)
            slab = waiting.pop() if waiting else None
            if slab is not None:
                self.waiting_bytes -= size
            self.held_bytes += size
            self._shrink()
        try:
            if slab is None:
                slab = _new_slab(size)
            # Views of it hold `loan`, and `loan` holds the slab's memory: NumPy would make them
            # hold the slab itself, whose end would be that of its memory.
            loan = np.frombuffer(slab.data, np.uint8, length)
            weakref.finalize(loan, self._back, slab).atexit = False
        except BaseException:
            with self._lock:
                self.held_bytes -= size
            raise
        return loan.data

    def _back(self, slab: NDArray[Any]) -> None:
        with self._lock:
            self._of_size(slab.nbytes).append(slab)
            self.held_bytes -= slab.nbytes
            self.waiting_bytes += slab.nbytes
            self._shrink()

    def _of_size(self, size: int) -> list[NDArray[np.uint8]]:
        self._waiting[size] = waiting = self._waiting.pop(size, [])
        return waiting

    def _shrink(self) -> None:
        for size, waiting in self._waiting.items():
            while waiting and self.held_bytes + self.waiting_bytes > self._kept_bytes:
                waiting.pop()
                self.waiting_bytes -= size


def _new_slab(size: int) -> NDArray[np.uint8]:
    """Pages of their own, which the host has back when the slab ends: an allocator would keep
    them, beside those that wait here."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8)
