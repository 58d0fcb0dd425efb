"""The supervisor: what it starts after what ended, and what systemd hears of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vrep.app import run
from vrep.app.run import Supervisor, notify
from vrep.control import ControlClient, ControlServer
from vrep.paths import SitePaths

SERVES = """
import signal, sys, threading
from pathlib import Path
from vrep.control import ControlServer
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
with ControlServer(Path({path!r}), {{}}):
    stop.wait()
"""


class Roles:
    """Supervises a filter whose processes are told what to do, by role: 1 ends with it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = SitePaths(root)
        self.started: list[str] = []
        self.acts: Callable[[str], bool] = lambda _role: True
        self.text = ""
        """of all, in place of a filter that serves"""
        self.supervisor = Supervisor(self.paths, ("filter",))
        self.real = subprocess.Popen
        monkeypatch.setattr(run.subprocess, "Popen", self._popen)
        monkeypatch.setattr(run.signal, "signal", lambda *_: None)
        self.result: list[int] = []
        self.thread = threading.Thread(target=lambda: self.result.append(self.supervisor.run()))

    def _popen(self, command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        role = command[3]
        self.started.append(role)
        text = SERVES.format(path=str(self.paths.socket("filter")))
        code = self.text or (text if self.acts(role) else "raise SystemExit(1)")
        return self.real([sys.executable, "-c", code], **options)

    def wait(self, what: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 30
        while not what():
            assert time.monotonic() < deadline, self.started
            time.sleep(0.02)

    def child(self) -> dict[str, Any]:
        return dict(self.supervisor.status()["filter"])

    def kill(self) -> None:
        os.kill(int(self.child()["pid"] or 0), signal.SIGKILL)


@pytest.fixture
def roles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Roles]:
    roles = Roles(tmp_path / "s", monkeypatch)
    roles.paths.root.mkdir()
    try:
        yield roles
    finally:
        roles.supervisor.request_stop()
        if roles.thread.is_alive():
            roles.thread.join(60)


def test_a_filter_that_never_starts_is_passed_through(roles: Roles) -> None:
    roles.acts = lambda role: role == "bypass"
    roles.thread.start()
    roles.wait(lambda: roles.supervisor._children["filter"].ready)
    assert roles.started == ["filter"] * run.STARTS_MAX + ["bypass"]
    assert roles.child()["bypass"]
    roles.kill()  # the filter has one more try
    roles.wait(lambda: len(roles.started) >= run.STARTS_MAX + 3)
    assert roles.started[-2:] == ["filter", "bypass"]
    roles.acts = lambda _role: True
    roles.wait(lambda: roles.supervisor._children["filter"].ready)
    roles.kill()
    roles.wait(lambda: roles.started[-1] == "filter" and roles.supervisor._children["filter"].ready)
    assert not roles.child()["bypass"]


def test_a_filter_that_was_ready_is_started_again(
    roles: Roles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PAUSE_MAX_S", 0.1)
    roles.thread.start()
    for count in range(1, run.STARTS_MAX + 2):
        roles.wait(
            lambda: (
                len(roles.started) == count and roles.supervisor._children["filter"].ready  # noqa: B023
            )
        )
        roles.kill()
    roles.wait(lambda: len(roles.started) == run.STARTS_MAX + 2)
    assert set(roles.started) == {"filter"}


def test_a_role_that_is_late_with_its_answer_is_there(roles: Roles) -> None:
    """What an earlier supervisor left: no second one is started beside it, and it is stopped."""
    roles.paths.make_run()
    text = SERVES.format(path=str(roles.paths.socket("filter")))
    with roles.real([sys.executable, "-c", text]) as left:
        try:
            roles.wait(lambda: roles.supervisor._answers("filter") == left.pid)
            left.send_signal(signal.SIGSTOP)
            roles.thread.start()
            roles.wait(lambda: roles.child()["pid"] == left.pid)
            time.sleep(3 * run.FOUND_EVERY_S)  # some more looks
            assert (roles.started, roles.child()["pid"]) == ([], left.pid)
            left.send_signal(signal.SIGCONT)
            roles.supervisor.request_stop()
            roles.thread.join(60)
            assert (roles.result, left.wait(60)) == ([0], 0)
        finally:
            left.kill()
    assert roles.started == []


@pytest.mark.parametrize(("how", "status"), [("signal.SIG_DFL", 0), ("lambda *_: sys.exit(3)", 1)])
def test_a_role_that_was_starting_stops_well(roles: Roles, how: str, status: int) -> None:
    """Told to end before it knows of that; and one that says that something went wrong."""
    there = roles.paths.root / "there"
    roles.text = f"""
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, {how})
Path({str(there)!r}).touch()
time.sleep(600)
"""
    roles.thread.start()
    roles.wait(there.exists)
    roles.supervisor.request_stop()
    roles.thread.join(60)
    assert roles.result == [status]


def test_systemd_hears_when_all_is_ready(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    path = roles.paths.root / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        held = threading.Event()
        roles.acts = lambda _role: held.is_set()
        roles.thread.start()
        roles.wait(lambda: len(roles.started) >= 2)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recv(64)
        listener.settimeout(30)
        held.set()
        assert listener.recv(64) == b"READY=1"
        roles.supervisor.request_stop()
        assert listener.recv(64) == b"STOPPING=1"
        roles.thread.join(60)
    assert roles.result == [0]


def test_systemd_is_told_by_an_abstract_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"vrep-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        notify("READY=1")
        listener.settimeout(10)
        assert listener.recv(64) == b"READY=1"
    notify("READY=1")  # nobody listens: not a reason to end


def deep(tmp_path: Path) -> Path:
    """A directory whose sockets would have names that are too long."""
    root = tmp_path / ("x" * 60) / "site"
    root.mkdir(parents=True)
    return root


def test_the_short_directory_goes_with_the_last_who_uses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Roles(deep(tmp_path), monkeypatch)
    found.thread.start()
    try:
        found.wait(lambda: found.child()["pid"] and found.supervisor._children["filter"].ready)
        directory = found.paths.run
        assert (found.paths.root / "run").is_symlink()
        assert directory.is_dir()
        found.paths.drop_run()  # while somebody runs
        assert directory.is_dir()
        another = ControlServer(found.paths.socket("view"), {})  # outlives the supervisor
    finally:
        found.supervisor.request_stop()
        found.thread.join(60)
    assert found.result == [0]
    assert directory.is_dir()
    another.close()
    again = Supervisor(found.paths, ("target",))
    thread = threading.Thread(target=again.run)
    thread.start()
    found.wait(lambda: ControlClient(found.paths.socket("site-target")).alive())
    again.request_stop()
    thread.join(60)
    assert not directory.exists()
    assert found.paths.make_run() == directory  # and it comes back
    found.paths.drop_run()


def test_a_directory_that_goes_while_a_supervisor_starts_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = SitePaths(deep(tmp_path))
    real = SitePaths.make_run
    left = [1]

    def made_and_gone(self: SitePaths) -> Path:
        target = real(self)
        if left:
            left.pop()
            self.drop_run()
        return target

    monkeypatch.setattr(SitePaths, "make_run", made_and_gone)
    with Supervisor(paths, ("target",))._control():
        assert ControlClient(paths.socket("site-target")).alive()
    paths.drop_run()


def test_a_directory_that_somebody_else_made_is_left(tmp_path: Path) -> None:
    """systemd makes and removes the one of a service."""
    paths = SitePaths(tmp_path / "site")
    theirs = tmp_path / "run-vrep"
    theirs.mkdir()
    paths.root.mkdir()
    (paths.root / "run").symlink_to(theirs)
    paths.drop_run()
    assert theirs.is_dir()
