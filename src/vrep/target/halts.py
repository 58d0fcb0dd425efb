"""Halts: how a target has a source stop its guest for a planned move.

The source is asked on its own connection (`vrep.source.halt`). A halt is of one session: when that
ends, however it does, the source goes on or learns that it was replaced, and no epoch is raised on
the word of the old one. It lapses when the command that moves the group does not renew it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vrep.errors import BusyError, GapError, PeerError, StateError, TimeLimitError
from vrep.target.manifest import Position
from vrep.target.session import Session
from vrep.wire import messages as m
from vrep.wire.transport import FrameTransport

__all__ = ["Halts"]

ANSWER_S: Final = 45.0
"""a guest's commands end, and a filter answers"""
RENEW_S: Final = 20.0

log = logging.getLogger("vrep.target")


@dataclass
class _Asked:
    number: int
    answer: m.Response | None = None
    come: threading.Event = field(default_factory=threading.Event)


class Halts:
    """Of one group. All but `answered` and `wait` need the lock of its host."""

    _numbers: Iterator[int] = itertools.count(1)

    def __init__(self) -> None:
        self._asked: dict[int, _Asked] = {}
        self._session: Session | None = None
        self._last = Position()
        self._until_s = 0.0

    # ---- questions -----------------------------------------------------------------

    def ask(self, transport: FrameTransport, method: str, params: Mapping[str, Any]) -> _Asked:
        asked = _Asked(next(self._numbers))
        self._asked[asked.number] = asked
        transport.post(m.Request(id=asked.number, method=method, params=dict(params)))
        return asked

    def tell(self, transport: FrameTransport, method: str) -> None:
        """Ask for something of which the answer does not matter: a source that is not reached
        begins another session."""
        try:
            transport.post(m.Request(id=next(self._numbers), method=method))
        except (PeerError, StateError) as error:
            log.debug("the source was not told: %s", error)

    def answered(self, message: m.Response) -> None:
        asked = self._asked.get(message.id)
        if asked is not None:
            asked.answer = message
            asked.come.set()

    def wait(self, asked: _Asked) -> Mapping[str, Any]:
        """The answer; raises what the source raised."""
        come = asked.come.wait(ANSWER_S)
        self._asked.pop(asked.number, None)
        if not come or asked.answer is None:
            raise TimeLimitError(f"the source did not answer within {ANSWER_S:g} s")
        if asked.answer.error is None:
            return dict(asked.answer.result)
        kinds = {"busy-error": BusyError, "gap-error": GapError}
        raise kinds.get(asked.answer.error, StateError)(asked.answer.text)

    # ---- the halt ------------------------------------------------------------------

    def begin(self, session: Session, last: Position) -> None:
        self._session, self._last = session, last
        self._until_s = time.monotonic() + RENEW_S

    def require(self, session: Session | None, *, renew: bool = False) -> Position:
        """The last change of the guest, which is halted in this session; StateError else."""
        held = self._session
        if held is None or held is not session or held.ended or self.late():
            raise StateError("the guest is not halted any more: the source goes on")
        if renew:
            self._until_s = time.monotonic() + RENEW_S
        return self._last

    def late(self) -> bool:
        return self._session is not None and time.monotonic() > self._until_s

    def end(self) -> None:
        """The guest may go on."""
        session, self._session = self._session, None
        if session is not None and not session.ended:
            self.tell(session.transport, "group.go-on")
