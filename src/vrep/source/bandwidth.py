"""Bandwidth: one limit for all that a source ships, shared by its groups as they come.

Who wants to send asks for its bytes and is told how long to wait before they go; later askers
stand behind it. Bytes that nobody asked for in the last `BURST_S` may be sent at once. Rates are
bytes a second. Any thread.
"""

from __future__ import annotations

import threading
from typing import Final

from vrep.wire.stream import Clock, SystemClock

__all__ = ["Bandwidth"]

BURST_S: Final = 0.25
TURN_S: Final = 0.1
"""what one turn may take of the line, so that groups share it"""
TURN_BYTES_MIN: Final = 16 << 10


class Bandwidth:
    """A limit; `bytes_per_s` 0: none."""

    def __init__(self, bytes_per_s: int, clock: Clock | None = None) -> None:
        self.bytes_per_s = bytes_per_s
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._free_s = float("-inf")

    def turn_bytes(self, wanted: int) -> int:
        """How much of it may be asked for at once."""
        if not self.bytes_per_s:
            return wanted
        return min(wanted, max(TURN_BYTES_MIN, int(self.bytes_per_s * TURN_S)))

    def take(self, count: int) -> float:
        """Ask for bytes; the seconds to wait before they are sent."""
        if not self.bytes_per_s:
            return 0.0
        with self._lock:
            now = self._clock.monotonic()
            begin = max(self._free_s, now - BURST_S)
            self._free_s = begin + count / self.bytes_per_s
            return max(0.0, begin - now)
