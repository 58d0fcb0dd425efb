"""`vrep run`: everything that a site runs, in the foreground.

The supervisor starts one child process for each role and keeps it running: a role that dies
is started again, at once the first time, then after a growing pause. SIGTERM and SIGINT stop
all: the appliances first, so that nothing is shipped past the filter's last word.

A filter that ends before it is ready, `STARTS_MAX` times in a row, is replaced by a pass-through
(the role `bypass`): the VMs run, nothing is replicated, and the status says so. The filter is tried
again when the pass-through ends, or this supervisor does.

Roles outlive a supervisor that is killed, since a guest may use them: the next one finds them by
their control sockets, lets them run, starts each again when it ends, and stops them with the rest.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import structlog

from vrep.control import ControlClient, ControlServer
from vrep.errors import BusyError, UsageError, VrepError
from vrep.paths import SitePaths

ROLES: Final = ("filter", "target", "source")
STOP_ORDER: Final = ("source", "target", "filter")
PAUSE_FIRST_S: Final = 0.1
PAUSE_MAX_S: Final = 10.0
STEADY_S: Final = 30.0
STOP_S: Final = 30.0
FOUND_EVERY_S: Final = 1.0
STARTS_MAX: Final = 3
PING_S: Final = 0.5
UCRED: Final = struct.Struct("3i")
"""pid, uid and gid of who listens (unix(7), SO_PEERCRED)"""

log = structlog.get_logger("vrep.run")


@dataclass
class _Child:
    """One role's process, and when it may be started again."""

    role: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    not_before: float = 0.0
    pause_s: float = PAUSE_FIRST_S
    restarts: int = 0
    last_exit: int | None = None
    ready: bool = False
    """it answered on its control socket"""
    failed_starts: int = 0
    """in a row"""
    bypass: bool = False
    """of the filter: it is the pass-through that runs"""
    found_pid: int | None = None
    """of a process that an earlier supervisor left behind"""


def notify(state: str) -> None:
    """Tell systemd, when it started this process and wants to know (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(state.encode(), address)
        except OSError as error:
            log.warning("systemd is not told", state=state, error=str(error))


class Supervisor:
    """Runs roles until it is told to stop."""

    def __init__(self, paths: SitePaths, roles: tuple[str, ...] = ROLES) -> None:
        unknown = set(roles) - set(ROLES)
        if unknown or not roles:
            raise UsageError(f"roles are {', '.join(ROLES)} or all")
        self._paths = paths
        self._children = {role: _Child(role) for role in ROLES if role in roles}
        self._stopping = threading.Event()

    def run(
        self, beside: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    ) -> int:
        """Until a signal or `request_stop`; 0 when every role ended cleanly. `beside` is
        entered once this is known to be the only supervisor, before any role starts."""
        try:
            status = self._supervise(beside)
        finally:
            self._paths.drop_run()
        return status

    def _control(self) -> ControlServer:
        name = "site" if set(self._children) == set(ROLES) else "site-" + "-".join(self._children)
        methods = {"status": lambda _p: self.status(), "stop": lambda _p: self.request_stop()}
        try:
            try:
                return ControlServer(self._paths.make_run() / f"{name}.sock", methods)
            except FileNotFoundError:  # one that just ended removed the directory
                return ControlServer(self._paths.make_run() / f"{name}.sock", methods)
        except BusyError:
            raise BusyError(f"the site in {self._paths.root} runs already") from None

    def _supervise(self, beside: Callable[[], AbstractContextManager[object]]) -> int:
        with self._control(), beside():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: self.request_stop())
            told = False
            while not self._stopping.is_set():
                for child in self._children.values():
                    self._tend(child)
                if not told and all(child.ready for child in self._children.values()):
                    notify("READY=1")
                    told = True
                self._stopping.wait(0.1)
            notify("STOPPING=1")
            return self._stop()

    def request_stop(self) -> dict[str, bool]:
        self._stopping.set()
        return {"stopping": True}

    def status(self) -> dict[str, dict[str, int | float | None]]:
        """Per role: pid, seconds it runs, restarts, last exit status, whether it is passed
        through."""
        now = time.monotonic()
        return {
            role: {
                "pid": child.process.pid if child.process else child.found_pid,
                "running_s": round(now - child.started, 1) if child.process else 0.0,
                "restarts": child.restarts,
                "last_exit": child.last_exit,
                "bypass": child.bypass,
            }
            for role, child in self._children.items()
        }

    def _tend(self, child: _Child) -> None:
        now = time.monotonic()
        if child.process is not None:
            status = child.process.poll()
            if status is None:
                child.ready = child.ready or self._answers(child.role) == child.process.pid
                return
            self._judge(child)
            if now - child.started > STEADY_S:
                child.pause_s = PAUSE_FIRST_S
            log.error("role ended", role=child.role, status=status, restart_in_s=child.pause_s)
            child.process, child.last_exit = None, status
            child.not_before = now + child.pause_s
            child.pause_s = min(child.pause_s * 2, PAUSE_MAX_S)
            child.restarts += 1
        if now >= child.not_before:
            found = self._find(child.role)
            if found is not None:
                if found != child.found_pid:
                    log.warning("role runs already", role=child.role, pid=found)
                child.found_pid, child.not_before = found, now + FOUND_EVERY_S
                child.ready = True
                return
            child.found_pid = None
            role = "bypass" if child.bypass else child.role
            child.process = subprocess.Popen(
                [sys.executable, "-m", "vrep.app.daemon", role, str(self._paths.root)],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor only
            )
            child.started = now
            log.info("role started", role=role, pid=child.process.pid)

    @staticmethod
    def _judge(child: _Child) -> None:
        """What comes after a process that ended: the role again, or what stands in for it."""
        if child.bypass:
            child.failed_starts = STARTS_MAX - 1  # the filter has one more try
        else:
            child.failed_starts = 0 if child.ready else child.failed_starts + 1
        child.ready = False
        child.bypass = child.role == "filter" and child.failed_starts >= STARTS_MAX
        if child.bypass:
            log.error("the filter does not start: its disks are passed through, unreplicated")

    def _answers(self, role: str) -> int | None:
        """The process that answers on a role's control socket, if any does."""
        client = ControlClient(self._paths.socket(role), timeout=PING_S)
        try:
            return int(client.call("ping")["pid"])
        except VrepError:
            return None

    def _find(self, role: str) -> int | None:
        """The process that serves a role's control socket, if any does: one that has not the time
        to answer is there all the same."""
        pid = self._answers(role)
        if pid is not None:
            return pid
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(PING_S)
            try:
                probe.connect(str(self._paths.socket(role)))
            except OSError:  # nobody listens
                return None
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
            return int(UCRED.unpack(credentials)[0]) or None  # 0: of a namespace that is not ours

    def _stop_found(self, role: str) -> None:
        """Stop what an earlier supervisor started."""
        pid = self._find(role)
        if pid is None:
            return
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            signal.pidfd_send_signal(fd, signal.SIGTERM)
            if not select.select([fd], [], [], STOP_S)[0]:
                log.error("role does not stop, killing it", role=role)
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                select.select([fd], [], [], STOP_S)
        except ProcessLookupError:
            return
        finally:
            os.close(fd)
        log.info("role stopped", role=role, pid=pid)

    def _stop(self) -> int:
        """Stop the roles in order; the worst exit status."""
        worst = 0
        for role in STOP_ORDER:
            child = self._children.get(role)
            if child is None:
                continue
            if child.process is None:
                self._stop_found(role)
                continue
            child.process.send_signal(signal.SIGTERM)
            try:
                status = child.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                log.error("role does not stop, killing it", role=role)
                child.process.kill()
                status = child.process.wait()
            if status == -signal.SIGTERM:
                status = 0  # it was starting, and had not come to where it ends in order
            log.info("role stopped", role=role, status=status)
            worst = max(worst, abs(status))
        return min(worst, 1)


__all__ = ["ROLES", "Supervisor"]
