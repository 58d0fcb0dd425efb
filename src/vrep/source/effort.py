"""Effort: how hard a source compresses, by the time that it has.

A group's `compression` is the most that is tried. Sealing, of which compressing is the dear part,
may be what holds shipping up where the processor is busy: then the level falls, step by step, down
to none. It rises again when the next step would have fit into the time, by what it cost when it was
last used. A step down needs `DOWN_AFTER` looks that say so, a step up `UP_AFTER`, and between the
two shares lies room, so that it does not swing. What a step costs is slowly forgotten: data and
processors change, and it is tried again.

Nothing here looks at a clock: times are told, in seconds. One thread.
"""

from __future__ import annotations

from typing import Final

__all__ = ["Effort"]

LEVELS: Final = (0, 1, 3, 6, 9, 12)
"""steps below what the group has"""
LOOK_S: Final = 1.0
"""time that is looked at as one"""
DOWN_SHARE: Final = 0.75
"""of the time goes into sealing: more holds shipping up"""
UP_SHARE: Final = 0.5
"""of the time would go into sealing one step up: less leaves enough for the rest"""
IDLE_SHARE: Final = 0.05
"""of the time without a record to ship: with more, shipping keeps up"""
DOWN_AFTER: Final = 2
UP_AFTER: Final = 4
FORGET: Final = 0.98
"""what is left of a cost that was measured, after a look at a lower step"""
MEASURED_BYTES: Final = 1 << 20
"""of sealed bytes say what a step costs; fewer do not"""


class Effort:
    """The level of one group's sealing; `most` is what the group has."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._levels = [*(level for level in LEVELS if level < most), most]
        self._step = len(self._levels) - 1
        self._cost_s = [0.0] * len(self._levels)
        """seconds for a byte, as last measured"""
        self._sealing_s = self._waiting_s = self._idle_s = 0.0
        self._bytes = 0
        self._down = self._up = 0

    @property
    def level(self) -> int:
        return self._levels[self._step]

    def note(
        self, *, sealing_s: float = 0.0, count: int = 0, waiting_s: float = 0.0, idle_s: float = 0.0
    ) -> None:
        """Time that went into sealing so many bytes of the guest's, into sending them and waiting
        for leave to, and into waiting for something to ship."""
        self._sealing_s += sealing_s
        self._bytes += count
        self._waiting_s += waiting_s
        self._idle_s += idle_s
        if self._sealing_s + self._waiting_s + self._idle_s >= LOOK_S:
            self._look()
            self._sealing_s = self._waiting_s = self._idle_s = 0.0
            self._bytes = 0

    def _look(self) -> None:
        whole_s = self._sealing_s + self._waiting_s + self._idle_s
        step = self._step
        if self._bytes >= MEASURED_BYTES:
            self._cost_s[step] = self._sealing_s / self._bytes
        late = self._sealing_s > DOWN_SHARE * whole_s and self._idle_s < IDLE_SHARE * whole_s
        self._down = self._down + 1 if late and step else 0
        fits = step + 1 < len(self._levels) and (
            self._bytes * self._cost_s[step + 1] < UP_SHARE * whole_s
        )
        self._up = self._up + 1 if fits else 0
        for above in range(step + 1, len(self._levels)):
            self._cost_s[above] *= FORGET
        if self._down >= DOWN_AFTER:
            self._move(-1)
        elif self._up >= UP_AFTER:
            self._move(+1)

    def _move(self, by: int) -> None:
        self._step += by
        self._down = self._up = 0
