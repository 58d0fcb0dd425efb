"""What a session shows in the status: positions, points, conditions.

Times are nanoseconds since the epoch where they end in `_ns`, seconds where in `_s`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vrep.source.delta import DeltaCount
from vrep.wire import messages as m

__all__ = ["SessionView", "spill_view"]


@dataclass
class SessionView:
    """What a session shows in the status; replaced field by field, read by any thread."""

    connected: bool = False
    paused: bool = False
    fenced: bool = False
    error: str = ""
    received_seq: int = 0
    durable_seq: int = 0
    oldest_point: dict[str, Any] | None = None
    newest_point: dict[str, Any] | None = None
    bytes_sent: int = 0
    records_sent: int = 0
    conditions: list[str] = field(default_factory=list)
    round_trip_s: float | None = None
    compression: int | None = None
    """the level that is used now, which is at most the group's; None before the first session"""
    attempts: int = 0
    history_lost: bool = False
    """the target lost what it had acknowledged, and does not hold it again yet"""
    rolled_back: bool = False
    """this site went back to an earlier state, and not all is compared yet"""
    lost_bytes: int | None = None
    """with `history_lost`: of how much of the disks that is, as far as it is known; None: all"""
    delta: DeltaCount = field(default_factory=DeltaCount)
    """of all connections since the process began"""
    rival_clients: int | None = None
    """how many use the disks at the site that took the group over; None: it did not say"""
    spill: dict[str, Any] = field(default_factory=dict)
    """empty without one; see `spill_view`"""

    def show_points(self, points: m.MaybePoints) -> None:
        """What the target can recover; nothing when it does not say."""
        self.oldest_point = _point(points.oldest) if points else None
        self.newest_point = _point(points.newest) if points else None


def _point(point: m.Point) -> dict[str, Any]:
    at = point.position
    return {"point": f"pos:{at.epoch}/{at.lane}/{at.seq}", "wall_ns": point.time_ns}


def spill_view(
    quota_bytes: int,
    *,
    held: int = 0,
    last_seq: int = 0,
    oldest_ns: int = 0,
    full: str = "",
) -> dict[str, Any]:
    """What the status says of a spill: bytes held and allowed, its last record, when its oldest
    was written, and why it takes no more."""
    return {
        "bytes": held,
        "quota_bytes": quota_bytes,
        "last_seq": last_seq,
        "oldest_ns": oldest_ns,
        "full": full,
    }
