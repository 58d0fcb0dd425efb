"""Cuts of a group with several lanes, made while it is replicated and for checkpoints.

One `Cutter` for each such group of this site. Every so often, when something was written, it
has the filter cut all lanes (docs/internals/cuts.md) and remembers the cut until it is durable
everywhere: the newest in which all lanes have a part is what the target is told, so that no
window takes it.
A lane that is not served is waited for, and then left out: the others' cuts go on without it.

Times are those of a monotonic clock, seconds, unless they end in `_ns`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from vrep.control import ControlClient
from vrep.errors import AgainError, GapError, VrepError
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.lanes import lane_name, lane_of, lanes_among

__all__ = ["Cutter"]

CUT_S: Final = 2.0
"""a filter that takes longer to answer is as good as none"""
TRY_S: Final = 20.0
"""for which a checkpoint is tried again while cuts are void"""
AGAIN_S: Final = 0.05
VOID_PAUSE_S: Final = 0.2
PENDING_MAX: Final = 1024
STALE: Final = 10
"""intervals without a cut after which the status says so"""

log = structlog.get_logger("vrep.source")


@dataclass(frozen=True)
class _Made:
    """A completed cut that is not known to be durable yet."""

    at: tuple[tuple[int, int, int], ...]
    completed: tuple[str, int]
    """lane and seq of its record"""
    wall_ns: int
    gaps: Mapping[str, int]
    """that had begun in each lane before: one that begins later may take a mark along"""

    @property
    def whole(self) -> bool:
        return all(seq for _epoch, _lane, seq in self.at)

    @property
    def point(self) -> str:
        return "pos:{}/{}/{}".format(*next(at for at in self.at if at[2]))


class Cutter:
    """Cuts one group until stopped."""

    def __init__(
        self,
        group: str,
        groups: GroupDirectory,
        filter_control: ControlClient,
        *,
        every_s: float,
        gone_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`every_s`: 0 for checkpoints only; `gone_s`: how long a lane is waited for."""
        self.group = group
        self._groups = groups
        self._filter = filter_control
        self._every_s = every_s
        self._gone_s = gone_s
        self._clock = clock
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._missing: dict[int, float] = {}
        self._pending: list[_Made] = []
        self._newest: _Made | None = None
        self._newest_whole: _Made | None = None
        self._heads: dict[str, int] = {}
        self._made = self._void = 0
        self._absent: list[int] = []
        self._error = ""
        self._wanted_since: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"cuts:{group}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(2 * CUT_S)

    @property
    def alive(self) -> bool:
        """Whether its thread runs; what ended it stands in the log."""
        return self._thread.is_alive()

    def _run(self) -> None:
        often_s = self._every_s or 1.0
        pause_s = often_s
        while not self._stopping.wait(pause_s):
            try:
                # A void cut cost the guests a moment: it is tried again soon, not at once.
                pause_s = often_s if self.tend() else min(often_s, VOID_PAUSE_S)
            except Exception:
                log.exception("cuts failed", group=self.group)

    # ---- what is asked ---------------------------------------------------------------

    def view(self) -> dict[str, Any]:
        """What the status says."""
        newest, since = self._newest, self._wanted_since
        stale_s = max(STALE * self._every_s, self._gone_s)
        return {
            "made": self._made,
            "void": self._void,
            "absent": list(self._absent),
            "newest": {"point": newest.point, "wall_ns": newest.wall_ns} if newest else None,
            "error": self._error,
            "stale": since is not None and self._clock() - since > stale_s,
        }

    def durable_at(self, lane: int) -> tuple[int, int]:
        """Epoch and seq of the mark in a lane of the newest cut of all lanes that is durable with
        each; zeroes: none."""
        newest = self._newest_whole
        return next(((e, s) for e, n, s in newest.at if n == lane), (0, 0)) if newest else (0, 0)

    def cut(self, label: str, try_s: float = TRY_S) -> dict[str, Any]:
        """A checkpoint: tried again while cuts are void. AgainError when none stood, GapError in
        a gap of a lane."""
        deadline = self._clock() + try_s
        while True:
            try:
                with self._lock:
                    made, answer = self._take(self._look(), label)
                return {
                    **answer,
                    "point": made.point,
                    "absent": [lane for _epoch, lane, seq in made.at if not seq],
                    "gaps": dict(made.gaps),
                }
            except AgainError:
                if self._clock() > deadline or self._stopping.wait(AGAIN_S):
                    raise

    def tend(self) -> bool:
        """One turn: note what became durable, cut if something was written. Whether it need not
        be tried again before it is time for the next."""
        with self._lock:
            try:
                status = self._look()
                self._note(status)
                if not self._every_s or not self._is_due(status):
                    return True
                if self._wanted_since is None:
                    self._wanted_since = self._clock()
                self._take(status, "")
            except VrepError as error:
                self._fail(error)
                return not isinstance(error, AgainError)
            self._error, self._wanted_since = "", None
            return True

    def _fail(self, error: VrepError) -> None:
        text = str(error)
        if isinstance(error, AgainError):
            self._void += 1
        if text != self._error and not isinstance(error, AgainError):
            log.info("no cut", group=self.group, reason=text)
        self._error = text

    # ---- one cut ---------------------------------------------------------------------

    def _definitions(self) -> dict[str, GroupDefinition]:
        found = {}
        for name in lanes_among(self.group, self._groups.names()):
            with contextlib.suppress(VrepError):  # it stands in the status
                found[name] = self._groups.load(name)
        return found

    def _look(self) -> dict[str, dict[str, Any]]:
        """What the filter says of the lanes that it serves."""
        names = set(lanes_among(self.group, self._groups.names()))
        answer = self._filter.call("status", timeout=CUT_S)
        return {name: one for name, one in answer.items() if name in names and "error" not in one}

    def _is_due(self, status: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether anything was written since the last cut, to lanes that are shipped."""
        definitions = self._definitions()
        if any(
            one.paused or one.fenced or one.detached or one.halted for one in definitions.values()
        ):
            return False
        return {name: int(one["head"]) for name, one in status.items()} != self._heads

    def _take(
        self, status: Mapping[str, Mapping[str, Any]], label: str
    ) -> tuple[_Made, dict[str, Any]]:
        definitions = self._definitions()
        lanes = [name for name in definitions if name in status]
        if not lanes:
            raise AgainError(f"no lane of {self.group!r} is served")
        self._absent = self._gone(definitions, lanes)
        in_gap = [name for name in lanes if status[name]["gap"]]
        if in_gap:
            raise GapError(
                f"{', '.join(in_gap)}: there is no recovery point until its sync has ended"
            )
        answer = self._filter.call(
            "cut", timeout=CUT_S, lanes=lanes, absent=self._absent, label=label
        )
        made = _Made(
            at=tuple((int(e), int(lane), int(seq)) for e, lane, seq in answer["at"]),
            completed=(lanes[0], int(answer["seq"])),
            wall_ns=int(answer["wall_ns"]),
            gaps={name: int(status[name]["gaps"]) for name in lanes},
        )
        self._made += 1
        self._pending = [*self._pending[-PENDING_MAX:], made]
        self._heads = {lane_name(self.group, lane): seq for _e, lane, seq in made.at if seq}
        self._heads[lanes[0]] = made.completed[1]
        return made, answer

    def _gone(self, definitions: Mapping[str, GroupDefinition], served: list[str]) -> list[int]:
        """The lanes that cuts do without; AgainError while one is waited for."""
        now = self._clock()
        known = {lane_of(name) for name in definitions}
        known |= {lane for one in definitions.values() for lane in one.lanes}
        missing = sorted(known - {lane_of(name) for name in served})
        self._missing = {lane: self._missing.get(lane, now) for lane in missing}
        waited = [lane for lane in missing if now - self._missing[lane] < self._gone_s]
        if waited:
            raise AgainError(f"lane {', '.join(map(str, waited))} of {self.group!r} is not served")
        return missing

    # ---- what became of it -------------------------------------------------------------

    def _note(self, status: Mapping[str, Mapping[str, Any]]) -> None:
        """Forget what a gap may have taken along; find the newest that is durable."""
        left = []
        for made in self._pending:
            lanes = [lane_name(self.group, lane) for _epoch, lane, seq in made.at if seq]
            if any(n in status and int(status[n]["gaps"]) != made.gaps.get(n) for n in lanes):
                continue
            wanted = {lane_name(self.group, lane): seq for _epoch, lane, seq in made.at if seq}
            wanted[made.completed[0]] = made.completed[1]
            if all(
                name in status and int(status[name]["durable"]) >= seq
                for name, seq in wanted.items()
            ):
                self._newest = made
                if made.whole:
                    self._newest_whole = made
            else:
                left.append(made)
        self._pending = left
