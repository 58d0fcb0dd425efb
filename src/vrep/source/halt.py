"""Halt: a guest's I/O stops for a planned move, and nothing of it is left behind.

The target asks for it on the group's session. That the guest is halted is durable before its I/O
stops, so a filter that restarts does not serve it. It stays halted until the target says otherwise
or a later session of the group is accepted: then the move did not happen. A source that is refused
instead was replaced. While the target cannot be asked nobody knows which of the two it will be.
"""

from __future__ import annotations

import re
import threading
import time
from typing import Any, Final

import structlog

from vrep import threads
from vrep.control import ControlClient
from vrep.errors import (
    BusyError,
    GapError,
    NotFoundError,
    StateError,
    TimeLimitError,
    UnsupportedError,
    VrepError,
)
from vrep.groups import GroupDirectory
from vrep.wire import messages as m
from vrep.wire.transport import FrameTransport

__all__ = ["Halt", "go_on"]

log = structlog.get_logger("vrep.source")


def go_on(groups: GroupDirectory, control: ControlClient, group: str) -> None:
    """Serve a halted guest again. Cut off before it is written down, it is done once more."""
    definition = groups.load(group)
    if not definition.halted:
        return
    log.warning("the guest goes on", group=group)
    if not definition.fenced or definition.options.on_fence != "pause":
        control.call("pause_guest", group=group, paused=False)
    groups.update(group, halted=False)


LOOKED_S: Final = 10.0


def looked_again(control: ControlClient, group: str) -> dict[str, Any]:
    """The status once the images of a VM that is off were looked at after this was called, and
    found as they were; or once they were not."""
    status: dict[str, Any] = control.call("status", group=group)
    # One look may be under way, and have begun before.
    looks, deadline = int(status["mirror_looks"]) + 2, time.monotonic() + LOOKED_S
    while status["mirror_rests"] and status["mirror_looks"] < looks:
        if time.monotonic() > deadline:
            raise TimeLimitError(f"the images of {group!r} do not answer: is their storage well?")
        time.sleep(0.05)
        status = control.call("status", group=group)
    return status


class Halt:
    """What one session's target may ask of the guest. After `close` it asks in vain."""

    def __init__(
        self, name: str, groups: GroupDirectory, control: ControlClient, transport: FrameTransport
    ) -> None:
        self._name = name
        self._groups = groups
        self._control = control
        self._transport = transport
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """The session ended. One that is just halting ends that first."""
        with self._lock:
            self._closed = True

    def answer(self, request: m.Request) -> None:
        """Do what a request asks for, on a thread of its own: the session's must go on taking
        acknowledgements."""
        threads.start(threading.Thread(target=self._answer, args=(request,), daemon=True))

    def _answer(self, request: m.Request) -> None:
        try:
            answer = m.Response(id=request.id, result=self._do(request))
        except VrepError as error:
            code = re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()[:32]
            answer = m.Response(id=request.id, error=code, text=error.detail[:4096])
        except (KeyError, TypeError, ValueError) as error:
            answer = m.Response(id=request.id, error="invalid", text=str(error)[:4096])
        try:
            self._transport.post(answer)
        except VrepError as error:
            # The session has ended, and with it what was asked for: the next one goes on.
            log.debug("not answered", group=self._name, error=str(error))

    def _do(self, request: m.Request) -> dict[str, Any]:
        match request.method:
            case "group.halt":
                return self.stop(pause=bool(request.params["pause"]))
            case "group.go-on":
                return self.go_on()
            case method:
                raise NotFoundError(f"no method {method!r}")

    def stop(self, *, pause: bool) -> dict[str, Any]:
        """Let no guest use the disks any more; ``head`` is the position of the last change that
        any of them made. BusyError while one does, unless `pause` cuts it off: its program waits
        for the disks to come back. GapError while not all is known to be recorded."""
        with self._lock:
            self._require_open()
            before = self._control.call("status", group=self._name)
            self._require_filtered(before)
            if before["clients"] and not pause:
                raise BusyError(
                    f"{before['clients']} client(s) use {self._name!r}: shut the VM down first, or "
                    "give --pause, which cuts it off: its I/O waits"
                )
            self._require_whole(before)
            self._groups.update(self._name, halted=True)
            log.warning("the guest is halted: the group is being moved", group=self._name)
            try:
                if before.get("mirror"):  # its images are looked at while it is served
                    looked = looked_again(self._control, self._name)
                    self._require_filtered(looked)
                    self._require_whole(looked)
                self._control.call("pause_guest", group=self._name, paused=True, timeout=30.0)
                after = self._control.call("status", group=self._name)
                self._require_filtered(after)
                self._require_whole(after)
            except BaseException:
                go_on(self._groups, self._control, self._name)
                raise
            return {"head": int(after["head"])}

    def go_on(self) -> dict[str, Any]:
        """The move does not happen."""
        with self._lock:
            self._require_open()
            go_on(self._groups, self._control, self._name)
            return {}

    def _require_open(self) -> None:
        if self._closed:
            raise StateError("the session has ended")

    def _require_filtered(self, status: dict[str, Any]) -> None:
        """The guest's writes pass through the filter, or there are none."""
        if status.get("mirror") and not status.get("mirror_rests"):
            raise UnsupportedError(
                f"the VM of {self._name!r} writes its disks itself, which nobody here can stop: "
                "shut it down, and move the group once 'vrep status' has 'replicating' again"
            )

    def _require_whole(self, status: dict[str, Any]) -> None:
        if status["gap"] or status["unshipped_bytes"] or status["unverified"]:
            raise GapError(f"a resync of {self._name!r} is under way: wait until it has ended")
