"""Transitions: what becomes of a group's replication, as events.

Each change of its state, and of what a state hides (a spill or a gap while the target is away), is
one line of the log and is counted, with how much is missing at the target and an estimate of when
replication is whole again: nothing is missing and no gap is open. The source's process looks once a
second; what came and went between two looks is told by the filter's count of gaps.

Times are seconds of a monotonic clock where they end in `_s`, nanoseconds since the epoch in `_ns`.
Not thread-safe: one thread looks; `view` is replaced as a whole and read by any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import structlog

from vrep.groups import GroupDefinition
from vrep.states import state_of

__all__ = ["Backlog", "Transitions"]

UNREACHED: Final = frozenset({"offline", "paused", "failed-over", "error"})
"""states in which nothing is sent: nobody knows when that ends"""
GAPS: Final = frozenset({"initial-sync", "gap", "resync", "unverified"})
"""states of an open gap"""

log = structlog.get_logger("vrep.source")


class Backlog:
    """How fast a backlog shrinks, as a mean over some seconds."""

    MEAN_S: Final = 10.0

    def __init__(self) -> None:
        self._at_s = 0.0
        self._bytes = 0
        self._rate: float | None = None

    def left_s(self, now_s: float, backlog_bytes: int) -> float | None:
        """Seconds until it is empty; None when it does not shrink, or is just being looked at."""
        passed_s = now_s - self._at_s
        if self._at_s and 0 < passed_s < self.MEAN_S:
            rate = (self._bytes - backlog_bytes) / passed_s
            share = min(1.0, passed_s / self.MEAN_S) if self._rate is not None else 1.0
            self._rate = rate * share + (self._rate or 0.0) * (1 - share)
        else:
            self._rate = None
        self._at_s, self._bytes = now_s, backlog_bytes
        if not backlog_bytes:
            return 0.0
        return round(backlog_bytes / self._rate, 1) if self._rate and self._rate > 0 else None

    def forget(self) -> None:
        """It is not being worked off: what comes next has a pace of its own."""
        self._at_s, self._rate = 0.0, None


class Transitions:
    """Of one group, from the first look of a process on."""

    def __init__(self, group: str) -> None:
        self.group = group
        self._now: frozenset[str] = frozenset()
        self._since_s = 0.0
        self._since_ns = 0
        self._gaps = 0
        self._estimated = False
        self._backlog = Backlog()
        self._counts: Counter[str] = Counter()
        self.view: dict[str, Any] = {}
        """empty before the first look"""

    def look(
        self,
        definition: GroupDefinition,
        filtered: Mapping[str, Any] | None,
        session: Mapping[str, Any],
        now_s: float,
        now_ns: int,
    ) -> None:
        """Compare with the last look. `filtered`: as the filter says, None when it does not serve
        the group; `session`: `connected`, `fenced` and `spill` of the source's."""
        state = state_of(definition, filtered, session)
        spilled = int(session["spill"].get("bytes", 0)) if session["spill"] else 0
        now = {state}
        if spilled:
            now.add("spilling")
        if filtered is not None and filtered["gap"] and state not in GAPS:
            now.add("gap")
        missing = spilled + _missing(filtered) if filtered is not None else None
        whole_in_s = self._estimate(state, missing, now_s)
        self._tell(state, frozenset(now), missing, whole_in_s, now_s, now_ns)
        self._note_gaps(filtered)
        self.view = {
            "since_ns": self._since_ns,
            "counts": dict(self._counts),
            "missing_bytes": missing,
            "whole_in_s": whole_in_s,
        }

    def _estimate(self, state: str, missing: int | None, now_s: float) -> float | None:
        if missing is None or state in UNREACHED:
            self._backlog.forget()
            return None
        left_s = self._backlog.left_s(now_s, missing)
        return 0.0 if state == "replicating" else left_s

    def _tell(
        self,
        state: str,
        now: frozenset[str],
        missing: int | None,
        whole_in_s: float | None,
        now_s: float,
        now_ns: int,
    ) -> None:
        fields = {"missing_bytes": missing, "whole_in_s": whole_in_s}
        if now != self._now:
            if self._now:
                self._counts.update(now - self._now)
                write = log.info if now == {"replicating"} else log.warning
                write(
                    "replication changes its state",
                    group=self.group,
                    state=state,
                    also=sorted(now - {state}),
                    was=sorted(self._now),
                    lasted_s=round(now_s - self._since_s, 1),
                    **fields,
                )
            self._now, self._since_s, self._since_ns = now, now_s, now_ns
            self._estimated = whole_in_s is not None
        elif not self._estimated and whole_in_s is not None:
            self._estimated = True
            log.info("when replication is whole again", group=self.group, state=state, **fields)

    def _note_gaps(self, filtered: Mapping[str, Any] | None) -> None:
        """One that came and went since the last look is an event, too."""
        if filtered is None:
            return
        gaps = int(filtered.get("gaps", 0))
        if self.view and gaps > self._gaps and not filtered["gap"]:
            self._counts["gap"] += gaps - self._gaps
            log.warning("a gap came and went", group=self.group, gaps=gaps - self._gaps)
        self._gaps = gaps


def _missing(filtered: Mapping[str, Any]) -> int:
    """Bytes in the ring that are not durable at the target, and of blocks that are to be copied."""
    ring = int(filtered["ring_bytes"]) - int(filtered["ring_free_bytes"])
    return ring + int(filtered["unshipped_bytes"])
