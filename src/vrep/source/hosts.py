"""Hosts: the other sites whose filters serve lanes of a group.

Who cuts a group is in touch with each of them over a connection of its own, mutually
authenticated as any between sites. A thread asks every `LOOK_S` what the lanes there are like, so
that a host that is gone never delays a cut: what it said last is at hand, and it is out of touch
when that is too old. Holds and releases go over the same connection. Whatever is late or lost there
makes a cut void; a hold that nobody ends ends by itself, at the filter.

Times are those of a monotonic clock, in seconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import structlog

from vrep.errors import AgainError, ProtocolError, VrepError
from vrep.keys.identity import SiteIdentity
from vrep.wire import messages as m
from vrep.wire.peers import PeerRegistry
from vrep.wire.site import connect
from vrep.wire.transport import FrameTransport, PeerRefusedError, Timeouts

__all__ = ["Host", "may_lack"]

LOOK_S: Final = 0.25
STALE_S: Final = 2.0
"""what a host said is believed for so long"""
ANSWER_S: Final = 1.0
"""a hold is long over by then"""

log = structlog.get_logger("vrep.source")

Position = tuple[int, int, int]


class Host:
    """One other site. `tell` is what it is told whenever it is asked about its lanes."""

    def __init__(
        self,
        site_id: str,
        identity: SiteIdentity,
        peers: PeerRegistry,
        tell: Callable[[], Mapping[str, Any]],
        timeouts: Timeouts | None,
    ) -> None:
        self.site_id = site_id
        self._identity = identity
        self._peers = peers
        self._tell = tell
        self._timeouts = timeouts
        self._lock = threading.Lock()
        self._transport: FrameTransport | None = None
        self._said: dict[str, dict[str, Any]] = {}
        self._seen_s = float("-inf")
        self.error = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"host:{site_id[:8]}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def lanes(self) -> dict[str, dict[str, Any]]:
        """What its lanes are like, by name; nothing while it is out of touch."""
        return self._said if time.monotonic() - self._seen_s < STALE_S else {}

    def _run(self) -> None:
        while True:
            try:
                self._look()
                self.error = ""
            except VrepError as error:
                if str(error) != self.error:
                    log.info("a host is out of touch", site=self.site_id, error=str(error))
                self.error = str(error)
            except Exception as error:
                if (text := f"{type(error).__name__}: {error}") != self.error:
                    log.exception("a host cannot be asked", site=self.site_id)
                self.error = text
            if self._stopping.wait(LOOK_S):
                break
        with self._lock:
            self._drop()

    def look(self) -> None:
        """Ask about its lanes now, if it is in touch."""
        with contextlib.suppress(VrepError):
            self._ask_lanes()

    def _look(self) -> None:
        if self._transport is None:
            peer = self._peers.get(self.site_id)
            transport = connect(self._identity, peer, timeouts=self._timeouts)
            with self._lock:
                self._transport = transport
        self._ask_lanes()

    def _ask_lanes(self) -> None:
        answer = self._ask(m.LANES_LOOK, self._tell())
        with _understood():
            self._said = {str(name): _lane(one) for name, one in answer["lanes"].items()}
        self._seen_s = time.monotonic()

    def _ask(self, method: str, params: Mapping[str, Any]) -> Any:
        with self._lock:
            if self._transport is None:
                raise AgainError(f"site {self.site_id} is out of touch")
            try:
                return self._transport.ask(method, params, ANSWER_S)
            except PeerRefusedError:
                raise
            except BaseException:
                self._drop()  # an answer may come late, and would be taken for another's
                raise

    def _drop(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            with contextlib.suppress(VrepError, OSError):
                transport.close()

    def hold(self, group_id: str, cut_id: bytes, lanes: Sequence[int]) -> list[Position]:
        """Some of its lanes hold, and each has its mark: their positions."""
        params = {"group_id": group_id, "cut_id": cut_id, "lanes": list(lanes)}
        answer = self._ask(m.LANES_HOLD, params)
        with _understood():
            at = [(int(e), int(lane), int(seq)) for e, lane, seq in answer["at"]]
        if any(seq <= 0 for _epoch, _lane, seq in at):
            raise ProtocolError("a host has marked nothing")
        return at

    def release(self, group_id: str, cut_id: bytes, lanes: Sequence[int]) -> None:
        """They go on. PeerRefusedError: one did before, so the cut is void."""
        params = {"group_id": group_id, "cut_id": cut_id, "lanes": list(lanes)}
        self._ask(m.LANES_RELEASE, params)


def may_lack(lane: Mapping[str, Any], epoch: int, seq: int) -> bool:
    """Whether the history of a lane, which is like this now, may lack its mark at a position,
    although the lane is durable up to there: a gap began behind it, which may have taken it along,
    or it was shipped in another epoch, since a failover was rolled back before it was durable."""
    return int(lane["gap_last"]) > seq or int(lane["epoch"]) != epoch


def _lane(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a lane is like, as `Cutter.own_lanes` has it."""
    numbers = {key: int(said[key]) for key in ("head", "durable", "gap_last", "epoch")}
    return {**numbers, "gap": bool(said["gap"]), "idle": bool(said["idle"])}


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """ProtocolError for an answer that is not one."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"an answer of a host is not understood: {error}") from None
