"""Aging: the clock by which a history ages, which nobody can set.

A window says for how long history is kept once the target has it. The wall clock cannot measure
that: it is set, by hand or by a server that is wrong, and a jump past the window would fold away
all that there is. So a store counts what really passes: within one boot of the host the time since
boot, suspended or not, whether or not its process runs. Of what passed between two boots only the
wall clock tells, and it is not believed: a history ages too slowly then, never too fast, and gains
nothing while its target is down.

The count stands in the manifest, with the boot and the time since boot at which it was taken, and
in the index of each segment, as the count when the segment was closed. Nanoseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import xxhash

__all__ = ["BEGIN", "Aging", "Count", "Steady", "host_steady"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Steady(NamedTuple):
    """A moment: which boot of the host, as a number that is not 0, and how long after it."""

    boot: int
    since_ns: int


class Count(NamedTuple):
    """What has passed for a store, and when that was so."""

    aged_ns: int = 0
    boot: int = 0
    since_ns: int = 0


def host_steady() -> Steady:
    """Now."""
    return Steady(_BOOT, time.clock_gettime_ns(time.CLOCK_BOOTTIME))


def _boot() -> int:
    """The boot of this host; a new one each time where that cannot be told."""
    try:
        told = _BOOT_ID.read_bytes()
    except OSError:
        told = time.time_ns().to_bytes(8, "little")
    return xxhash.xxh3_64_intdigest(told) & 0xFFFFFFFF or 1


_BOOT = _boot()


BEGIN = Count()
"""of a store that knows nothing yet"""


class Aging:
    """The clock of one store. Safe from any thread."""

    def __init__(self, steady: Callable[[], Steady], count: Count = BEGIN) -> None:
        """Goes on from what the newest manifest says."""
        self._steady = steady
        now = steady()
        passed_ns = now.since_ns - count.since_ns if now.boot == count.boot else 0
        # 0 stands for "not known".
        self._base = Steady(now.boot, now.since_ns)
        self._aged_ns = max(1, count.aged_ns + max(0, passed_ns))

    def now_ns(self) -> int:
        """What has passed since the store began."""
        return self._at(self._steady())

    def count(self) -> Count:
        """What the next manifest says."""
        now = self._steady()
        return Count(self._at(now), now.boot, now.since_ns)

    def _at(self, now: Steady) -> int:
        return self._aged_ns + max(0, now.since_ns - self._base.since_ns)
