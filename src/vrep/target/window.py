"""Window and quota: how far back a group's history is kept, and when that becomes less.

The horizon moves by whole segments, since only those can be folded: to the end of the newest one
that the store has had for longer than the window, by its own clock (`aging`), which can neither be
set nor jump. A record cannot be older here than it is at its source, so all that is younger than
the window is kept, whatever either site's wall clock says. When the quota is nearly used up, or the
disk is nearly full, the horizon moves on by one segment at a time although it is inside the window:
the history becomes shorter before replication stops, and `Usage` says so.

Times are nanoseconds, durations seconds, sizes bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vrep.target.manifest import Manifest, Position
from vrep.target.segment import aged_at
from vrep.target.span import Point

__all__ = ["Growth", "Usage", "common_point", "had_since_ns", "next_by_space", "next_by_time"]

NS: Final = 1_000_000_000
WARN: Final = 0.80
SHORTEN: Final = 0.95
"""shares of the quota: a warning, and a second one with a shorter window"""
GROWTH_S: Final = 300.0
"""time over which the growth is measured"""

Recoverable = Callable[[Position], bool]


def next_by_time(
    directory: Path, manifest: Manifest, aged_ns: int, recoverable: Recoverable
) -> Position | None:
    """Where the horizon belongs by the window, when so much has passed for the store; None where
    it is."""
    best = None
    for row in _behind(manifest):
        if aged_ns - aged_at(directory, row) < manifest.window_s * NS:
            break
        end = Position.of(row["last"])
        if recoverable(end):
            best = end
    return best


def had_since_ns(directory: Path, manifest: Manifest, position: Position) -> int | None:
    """What had passed for the store when the segment of a position was closed; None while it is
    open."""
    for row in manifest.segments:
        if Position.of(row["last"]) >= position:
            return aged_at(directory, row)
    return None


def next_by_space(manifest: Manifest, recoverable: Recoverable) -> Position | None:
    """The next place of the horizon where a fold can begin."""
    ends = (Position.of(row["last"]) for row in _behind(manifest))
    return next((end for end in ends if recoverable(end)), None)


def _behind(manifest: Manifest) -> list[Any]:
    """Closed segments that end behind the horizon, oldest first, but for the newest, which no
    fold takes."""
    return [row for row in manifest.segments[:-1] if Position.of(row["last"]) > manifest.horizon]


def common_point(manifest: Manifest, held: Sequence[Position]) -> Position:
    """Up to where the history may be folded while some points are in use, whether or not they
    are still offered: the newest position that the horizon and all of them have in common."""
    common = manifest.horizon
    for point in held:
        if not common.seq:
            break
        line = dict(manifest.ancestry(point))
        for epoch, seq in manifest.ancestry(common):
            if epoch in line:
                common = Position(epoch, manifest.lane, min(seq, line[epoch]))
                break
        else:
            common = Position()
    return common


class Growth:
    """How fast a store grows."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, now_s: float, used: int) -> None:
        """The store has so many bytes now."""
        self._seen.append((now_s, used))
        while self._seen[-1][0] - self._seen[0][0] > GROWTH_S:
            self._seen.popleft()

    def left_s(self, room: int) -> float | None:
        """Seconds until so much room is used up; None when it does not grow."""
        if len(self._seen) < 2 or self._seen[-1][0] <= self._seen[0][0]:
            return None
        (began_s, before), (now_s, after) = self._seen[0], self._seen[-1]
        return max(0, room) * (now_s - began_s) / (after - before) if after > before else None


@dataclass(frozen=True)
class Usage:
    """What a group uses of what it may use."""

    used_bytes: int
    quota_bytes: int
    window_s: int
    """that the source asks for; 0: all"""
    real_window_s: float | None
    """from the oldest point to now, by the wall clocks of both sites; None without a point or
    without its time"""
    left_s: float | None
    """until the quota is used up, at the present rate"""
    shortened: bool
    """the horizon is inside the window"""

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        used_bytes: int,
        oldest: Point | None,
        growth: Growth,
        now_ns: int,
        had_s: float | None,
    ) -> Usage:
        """`had_s`: for how long the store has had the horizon; None: that is not known."""
        real_s = max(0, now_ns - oldest.wall_ns) / NS if oldest and oldest.wall_ns else None
        inside = had_s is not None and (not manifest.window_s or had_s < manifest.window_s)
        return cls(
            used_bytes=used_bytes,
            quota_bytes=manifest.quota_bytes,
            window_s=manifest.window_s,
            real_window_s=real_s,
            left_s=growth.left_s(manifest.quota_bytes - used_bytes)
            if manifest.quota_bytes
            else None,
            shortened=bool(manifest.horizon.seq) and inside,
        )

    @property
    def share(self) -> float:
        """Of the quota that is used; 0 without a quota."""
        return self.used_bytes / self.quota_bytes if self.quota_bytes else 0.0

    @property
    def conditions(self) -> list[str]:
        """What status shows of it."""
        found = ["window-short"] if self.shortened else []
        if self.share >= SHORTEN:
            found.append("quota-95")
        elif self.share >= WARN:
            found.append("quota-80")
        return found

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "window_s": self.window_s,
            "real_window_s": None if self.real_window_s is None else round(self.real_window_s, 3),
            "quota_bytes": self.quota_bytes,
            "quota_left_s": None if self.left_s is None else round(self.left_s, 1),
        }
