"""Cuts over lanes that this filter serves, docs/internals/cuts.md.

A guest waits while its lane holds: that is done in C, without the interpreter, and each lane ends
its hold by itself after 10 ms. Where lanes of other hosts are in a cut, these hold first; a host
that is asked to (`hold`) goes on when it is told to (`release`), and the one who cuts marks last.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import structlog

from vrep._core.filter import Group, cut_all, cut_hold, cut_release
from vrep.errors import (
    AgainError,
    BusyError,
    FullError,
    GapError,
    GoneError,
    StateError,
    TimeLimitError,
    VrepError,
)
from vrep.groups import GroupDirectory
from vrep.lanes import lane_of

__all__ = ["FilterCuts"]

log = structlog.get_logger("vrep.filter")

_VOID = (BusyError, FullError, GoneError, TimeLimitError)
_WHY = {
    BusyError: "it is being cut, or handed over, already",
    FullError: "its ring has no room for a mark",
    GoneError: "it is in a gap, or is being closed",
    TimeLimitError: "a lane could not hold for so long",
}
Position = tuple[int, int, int]
Result = TypeVar("Result")


class FilterCuts:
    """Answers what is asked of a filter process for cuts."""

    def __init__(self, groups: GroupDirectory, group_of: Callable[[str], Group]) -> None:
        """`group_of` gives the native group of a lane that is served, or says why it is not."""
        self._groups = groups
        self._group_of = group_of
        self._lock = threading.Lock()
        self._untold: dict[str, str] = {}
        """why a lane did not get the record of the newest cut, by its name"""

    def settle(self) -> None:
        """Until no cut is under way that began before: one that begins later knows what the
        definitions say now, and a halted lane gets no mark any more."""
        with self._lock:
            pass

    def cut(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Cut some `lanes`, while others are `absent`, and complete it in the first, and in those
        named by `also`: the marks' positions `at`, and the `seq` of the record that completes the
        cut. AgainError: it is void; GapError: a gap began before it could be completed."""
        names = [str(name) for name in params["lanes"]]
        cut_id = secrets.token_bytes(16)
        with self._lock:
            at = self._positions(names, cut_id, cut_all)
            at += [(0, int(lane), 0) for lane in params.get("absent", ())]
            return self._complete(names[0], cut_id, at, params)

    def mark(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The part of some `lanes` in the cut `cut_id` (hex), of which all others hold: the marks'
        positions `at`. AgainError: it is void."""
        names = [str(name) for name in params["lanes"]]
        with self._lock:
            return {"at": self._positions(names, bytes.fromhex(params["cut_id"]), cut_all)}

    def hold(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """As `mark`, but the lanes hold until `release`, or for 10 ms."""
        names = [str(name) for name in params["lanes"]]
        with self._lock:
            return {"at": self._positions(names, bytes.fromhex(params["cut_id"]), cut_hold)}

    def release(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Let the lanes of `hold` go on. AgainError: one did before, so the cut is void."""
        names = [str(name) for name in params["lanes"]]
        self._in_all(names, bytes.fromhex(params["cut_id"]), cut_release)
        return {}

    def complete(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Put the record that completes a cut into a `lane`, and into those named by `also`: all
        lanes have held `at` their marks, until all had marked. GapError: a gap began."""
        at = [(int(e), int(lane), int(seq)) for e, lane, seq in params["at"]]
        cut_id, name = bytes.fromhex(params["cut_id"]), str(params["lane"])
        with self._lock:
            self._epochs([name])
            return self._complete(name, cut_id, at, params)

    def _epochs(self, names: Sequence[str]) -> list[int]:
        """The epochs of the definitions: what is not shipped yet is sealed under them."""
        definitions = [self._groups.load(name) for name in names]
        for definition in definitions:
            if definition.halted:
                raise StateError(f"{definition.name!r} is being moved: nothing is marked any more")
        return [definition.epoch for definition in definitions]

    def _positions(
        self, names: Sequence[str], cut_id: bytes, ask: Callable[[list[Group], bytes], list[int]]
    ) -> list[Position]:
        epochs = self._epochs(names)
        seqs = self._in_all(names, cut_id, ask)
        return [(e, lane_of(n), seq) for e, n, seq in zip(epochs, names, seqs, strict=True)]

    def _in_all(
        self, names: Sequence[str], cut_id: bytes, ask: Callable[[list[Group], bytes], Result]
    ) -> Result:
        try:
            return ask([self._group_of(name) for name in names], cut_id)
        except _VOID as error:
            name = names[int(getattr(error, "lane", 0))]
            raise AgainError(f"a cut is void: {name}: {_WHY[type(error)]}") from None

    def _complete(
        self, name: str, cut_id: bytes, at: list[Position], params: Mapping[str, Any]
    ) -> dict[str, Any]:
        label = str(params.get("label", ""))
        at.sort(key=lambda position: position[1])
        try:
            seq = self._group_of(name).cut_complete(cut_id, at, label)
        except GoneError:
            raise GapError(f"a gap of {name!r} began before a cut was complete") from None
        also: dict[str, int] = {}
        for other in params.get("also", ()):
            try:
                self._epochs([other])
                also[other] = self._group_of(other).cut_complete(cut_id, at, label)
                self._untold.pop(other, None)
            except VrepError as error:  # its target has one point less, and no window goes up to it
                if self._untold.get(other) != (why := str(error)):
                    log.warning("a target has no record of a cut", lane=other, error=why)
                self._untold[other] = why
        return {"at": at, "seq": seq, "also": also, "wall_ns": time.time_ns()}
