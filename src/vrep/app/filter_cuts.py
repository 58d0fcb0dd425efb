"""Cuts over lanes that this filter serves, docs/internals/cuts.md.

A guest waits while its lane holds: that is done in C, without the interpreter, and each lane ends
its hold by itself after 10 ms.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from vrep._core.filter import Group, cut_all
from vrep.errors import (
    AgainError,
    BusyError,
    FullError,
    GapError,
    GoneError,
    StateError,
    TimeLimitError,
)
from vrep.groups import GroupDirectory
from vrep.lanes import lane_of

__all__ = ["FilterCuts"]

_VOID = (BusyError, FullError, GoneError, TimeLimitError)
_WHY = {
    BusyError: "it is being cut, or handed over, already",
    FullError: "its ring has no room for a mark",
    GoneError: "it is in a gap, or is being closed",
    TimeLimitError: "a lane could not hold for so long",
}


class FilterCuts:
    """Answers what is asked of a filter process for cuts."""

    def __init__(self, groups: GroupDirectory, group_of: Callable[[str], Group]) -> None:
        """`group_of` gives the native group of a lane that is served, or says why it is not."""
        self._groups = groups
        self._group_of = group_of
        self._lock = threading.Lock()

    def settle(self) -> None:
        """Until a cut that is under way has ended. One that begins later knows what the
        definitions say now: of a lane that is halted then, no mark moves the end any more."""
        with self._lock:
            pass

    def cut(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Cut some `lanes`, while others are `absent`, and complete it in the first: the marks'
        positions `at`, and the `seq` of the record that completes the cut. AgainError: it is
        void; GapError: a gap began before it could be completed; StateError: a guest is halted."""
        with self._lock:
            return self._cut(params)

    def _cut(self, params: Mapping[str, Any]) -> dict[str, Any]:
        names = [str(name) for name in params["lanes"]]
        definitions = [self._groups.load(name) for name in names]
        for one in definitions:
            if one.halted:
                raise StateError(f"{one.name!r} is being moved: nothing is marked any more")
        # The epoch is the definition's: what is not shipped yet is sealed under it.
        epochs = [one.epoch for one in definitions]
        cut_id = secrets.token_bytes(16)
        try:
            seqs = cut_all([self._group_of(name) for name in names], cut_id)
        except _VOID as error:
            name = names[int(getattr(error, "lane", 0))]
            raise AgainError(f"a cut is void: {name}: {_WHY[type(error)]}") from None
        at = [(e, lane_of(n), seq) for e, n, seq in zip(epochs, names, seqs, strict=True)]
        at += [(0, int(lane), 0) for lane in params.get("absent", ())]
        at.sort(key=lambda position: position[1])
        try:
            seq = self._group_of(names[0]).cut_complete(cut_id, at, str(params.get("label", "")))
        except GoneError:
            raise GapError(f"a gap of {names[0]!r} began before a cut was complete") from None
        return {"at": at, "seq": seq, "wall_ns": time.time_ns()}
