"""What the soak measures of the sites: memory, descriptors and threads of each process, disk use.

Flat means: over a stretch in which no process was restarted, the median of its second half is not
above that of its first by more than a limit. Sizes are bytes, times seconds of the monotonic clock.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sites import MIB, Pair

EVERY_S: Final = 2.0
RSS_MORE: Final = (16 * MIB, 0.10)
"""the larger of so many bytes, and of this share of what there was"""
STORE_MORE: Final = (64 * MIB, 0.25)
SHM_MORE: Final = (MIB, 0.0)
FDS_MORE: Final = (4, 0.0)
THREADS_MORE: Final = (4, 0.0)


def used_bytes(directory: Path) -> int:
    """What files below a directory take, as far as they stay long enough to be asked."""
    total = 0
    with contextlib.suppress(OSError):
        for path in directory.rglob("*"):
            with contextlib.suppress(OSError):
                if not path.is_symlink():
                    total += path.stat().st_blocks * 512
    return total


def process_gauges(pid: int) -> dict[str, int]:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "rss": int(status["VmRSS"].split()[0]) << 10,
        "threads": int(status["Threads"]),
        "fds": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
    }


@dataclass
class Row:
    """A figure, and what it may be at most."""

    name: str
    value: float
    unit: str
    limit: float | None = None

    @property
    def met(self) -> bool:
        return self.limit is None or self.value <= self.limit


@dataclass
class Gauges:
    """Samples by name, taken by a thread of its own from `start` to `stop`."""

    pair: Pair
    samples: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.sample()

    def sample(self) -> None:
        now = time.monotonic()
        for role, process in dict(self.pair.processes).items():
            # It may just have been killed.
            with contextlib.suppress(OSError, KeyError, ValueError):
                for name, value in process_gauges(process.pid).items():
                    self._note(f"{role}.{name}", now, value)
        self._note("store", now, used_bytes(self.pair.b.paths.store))
        self._note("spill", now, used_bytes(self.pair.a.paths.groups))
        self._note("shm", now, used_bytes(self.pair.a.paths.shm()))

    def _note(self, name: str, at: float, value: int) -> None:
        self.samples.setdefault(name, []).append((at, value))

    def between(self, name: str, begin: float, end: float) -> list[tuple[float, int]]:
        return [(at, value) for at, value in self.samples.get(name, []) if begin <= at <= end]

    def growth(
        self, name: str, begin: float, end: float, more: tuple[int, float], unit: str
    ) -> list[Row]:
        """The median of the second half above that of the first, and what that is an hour."""
        found = self.between(name, begin, end)
        middle = (begin + end) / 2
        first = [value for at, value in found if at < middle]
        second = [value for at, value in found if at >= middle]
        if not first or not second:
            return [Row(f"{name}: samples", 0, "samples", -1.0)]
        was, now = statistics.median(first), statistics.median(second)
        limit = max(more[0], more[1] * was)
        return [
            Row(f"{name}: median", now, unit),
            Row(f"{name}: growth", now - was, unit, limit),
            Row(f"{name}: growth an hour", (now - was) / (end - begin) * 2 * 3600, unit),
        ]

    def rows(self, calm: tuple[float, float], settled: tuple[float, float]) -> list[Row]:
        """`calm`: no process was restarted. `settled`: the window of the history is full."""
        rows = []
        for role in ("filter", "source", "target"):
            rows += self.growth(f"{role}.rss", *calm, RSS_MORE, "bytes")
            rows += self.growth(f"{role}.fds", *calm, FDS_MORE, "descriptors")
            rows += self.growth(f"{role}.threads", *calm, THREADS_MORE, "threads")
        rows += self.growth("store", *settled, STORE_MORE, "bytes")
        rows += self.growth("shm", *settled, SHM_MORE, "bytes")
        return rows


__all__ = ["Gauges", "Row"]
