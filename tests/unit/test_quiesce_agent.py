"""A checkpoint with the guest's file systems frozen: it is thawed, whatever happens.

The agent here is a fake that speaks the guest agent's protocol over a Unix socket; a real one, in a
guest, is asked in `tests/e2e/test_quiesce.py`.
"""

from __future__ import annotations

import json
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

from vrep import errors
from vrep.hypervisor import quiesce
from vrep.hypervisor.agent import SocketAgent
from vrep.hypervisor.quiesce import Hooks, all_quiesced, quiesced


class FakeAgent:
    """One client at a time, as a virtio port. What a client leaves unread the next one reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = f"unix:{path}"
        self.frozen = False
        self.commands: list[str] = []
        self.answers: dict[str, Callable[[], Any]] = {}
        """what a command does in place of the usual; None: no answer"""
        self.stale = b""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            with client, client.makefile("rwb", buffering=0) as stream:
                stream.write(self.stale)
                self.stale = b""
                try:
                    for line in stream:
                        self._answer(stream, json.loads(line.lstrip(b"\xff")))
                except (OSError, ValueError):
                    continue  # the client is gone, or sends what no agent understands

    def _answer(self, stream: Any, request: dict[str, Any]) -> None:
        name = request["execute"]
        if name == "guest-sync-delimited":
            stream.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode())
            stream.write(b"\n")
            return
        self.commands.append(name)
        answer = self.answers.get(name, lambda: {"return": self._usual(name)})()
        if answer is not None:
            stream.write(json.dumps(answer).encode() + b"\n")

    def _usual(self, name: str) -> Any:
        if name == quiesce.STATUS:
            return "frozen" if self.frozen else "thawed"
        self.frozen = name == quiesce.FREEZE
        return 2

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    made = FakeAgent(tmp_path / "qga")
    yield made
    made.close()


def test_a_mark_is_set_while_the_guest_is_frozen(agent: FakeAgent) -> None:
    agent.stale = b'{"return": {}}\nhalf of an ans'
    seen: list[bool] = []

    def mark(left_s: float) -> str:
        assert 0 < left_s <= 5
        seen.append(agent.frozen)
        return "marked"

    assert quiesced(agent.address, 5.0, mark) == "marked"
    assert seen == [True]
    assert not agent.frozen
    assert agent.commands[1:] == [quiesce.FREEZE, quiesce.STATUS, quiesce.THAW, quiesce.STATUS]


def test_several_guests_are_frozen_at_once_and_all_thawed(agent: FakeAgent, tmp_path: Path) -> None:
    other = FakeAgent(tmp_path / "other")
    try:
        addresses, seen = [agent.address, other.address], []

        def mark(left_s: float) -> str:
            assert 0 < left_s <= 5
            seen.append((agent.frozen, other.frozen))
            return "marked"

        assert all_quiesced(addresses, 5.0, mark) == "marked"
        assert seen == [(True, True)]
        assert not agent.frozen
        assert not other.frozen
        other.answers[quiesce.FREEZE] = lambda: {"error": {"desc": "it has been disabled"}}
        with pytest.raises(errors.HypervisorError, match="has been disabled"):
            all_quiesced(addresses, 5.0, mark)
        assert len(seen) == 1
        assert not agent.frozen
    finally:
        other.close()


def test_the_guest_is_thawed_when_the_mark_fails(agent: FakeAgent) -> None:
    def mark(_left_s: float) -> None:
        raise errors.GapError("no point now")

    with pytest.raises(errors.GapError):
        quiesced(agent.address, 5.0, mark)
    assert not agent.frozen
    assert quiesce.THAW in agent.commands


def test_the_guest_is_thawed_when_its_freeze_is_not_answered(agent: FakeAgent) -> None:
    def freeze() -> None:
        agent.frozen = True

    agent.answers[quiesce.FREEZE] = freeze
    with pytest.raises(errors.TimeLimitError, match="is the agent running"):
        quiesced(agent.address, 0.5, lambda _left: pytest.fail("marked"))
    assert not agent.frozen


def test_a_mark_that_takes_too_long_is_not_believed(agent: FakeAgent) -> None:
    # The limit holds for each answer of the agent, too, which may come late: it is not short.
    with pytest.raises(errors.TimeLimitError, match="longer than it may"):
        quiesced(agent.address, 2.0, lambda left_s: time.sleep(left_s + 0.05))
    assert not agent.frozen


def test_a_guest_that_thaws_by_itself_is_noticed(agent: FakeAgent) -> None:
    def mark(_left_s: float) -> None:
        agent.frozen = False

    with pytest.raises(errors.StateError, match="thawed by itself"):
        quiesced(agent.address, 5.0, mark)


def test_a_guest_that_was_frozen_by_somebody_else_stays_so(agent: FakeAgent) -> None:
    agent.frozen = True
    with pytest.raises(errors.BusyError):
        quiesced(agent.address, 5.0, lambda _left: pytest.fail("marked"))
    assert agent.commands == [quiesce.STATUS]


def test_a_thaw_that_fails_is_tried_again(agent: FakeAgent) -> None:
    tries = iter([{"error": {"class": "GenericError", "desc": "not now"}}, {"return": 0}])

    def thaw() -> dict[str, Any]:
        answer = next(tries, None)
        if answer is None:
            agent.frozen = False
            return {"return": 2}
        return answer

    agent.answers[quiesce.THAW] = thaw
    assert quiesced(agent.address, 5.0, lambda _left: 7) == 7
    assert agent.commands.count(quiesce.THAW) == 3
    assert not agent.frozen


def test_a_guest_that_cannot_be_thawed_is_cried_out(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiesce, "THAW_S", 2.0)  # of which the last answer may take a third
    agent.answers[quiesce.THAW] = lambda: {"error": {"desc": "never"}}
    with pytest.raises(errors.HypervisorError, match=r"STILL BE FROZEN.*never"):
        quiesced(agent.address, 5.0, lambda _left: 7)


def test_a_refused_freeze_is_an_error(agent: FakeAgent) -> None:
    agent.answers[quiesce.FREEZE] = lambda: {"error": {"desc": "it has been disabled"}}
    with pytest.raises(errors.HypervisorError, match="has been disabled"):
        quiesced(agent.address, 5.0, lambda _left: pytest.fail("marked"))
    agent.answers[quiesce.FREEZE] = lambda: {"return": 0}
    with pytest.raises(errors.StateError, match="froze no file system"):
        quiesced(agent.address, 5.0, lambda _left: pytest.fail("marked"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_guest_is_thawed_when_the_one_who_froze_it_dies(
    agent: FakeAgent, how: signal.Signals
) -> None:
    program = (
        "import sys, time; from vrep.hypervisor.quiesce import quiesced\n"
        "quiesced(sys.argv[1], 60.0, lambda left: time.sleep(60))"
    )
    dying = subprocess.Popen([sys.executable, "-c", program, agent.address])
    deadline = time.monotonic() + 60
    while not agent.frozen:
        assert time.monotonic() < deadline
        assert dying.poll() is None
        time.sleep(0.01)
    os.kill(dying.pid, how)
    dying.wait()
    while agent.frozen:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert quiesce.THAW in agent.commands


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(errors.UnreachableError, match="No such file"):
        quiesced(f"unix:{tmp_path}/none", 0.5, lambda _left: None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        with pytest.raises(errors.TimeLimitError):
            SocketAgent(tmp_path / "silent", 0.3)


def test_hooks_run_before_and_after(tmp_path: Path) -> None:
    told = tmp_path / "told"
    hooks = Hooks(
        f"echo before $VREP_GROUP >> {told}", f"echo after $VREP_LABEL >> {told}", 5.0,
        {"VREP_GROUP": "web", "VREP_LABEL": "now"},
    )  # fmt: skip

    def frozen() -> None:
        with hooks.around():
            told.write_text(told.read_text() + "frozen\n")
            raise errors.GapError

    with pytest.raises(errors.GapError):
        frozen()
    assert told.read_text() == "before web\nfrozen\nafter now\n"


@pytest.mark.parametrize(
    ("command", "limit_s", "kind", "text"),
    [
        ("echo no way >&2; exit 3", 60.0, errors.StateError, "ended with 3.*no way"),
        # The limit is also of the command after, which is to end in it.
        ("exec sleep 60", 2.0, errors.TimeLimitError, "before a checkpoint"),
    ],
)
def test_a_hook_that_fails_stops_the_checkpoint(
    tmp_path: Path, command: str, limit_s: float, kind: type[errors.VrepError], text: str
) -> None:
    hooks = Hooks(command, f"touch {tmp_path}/after", limit_s, {})
    with pytest.raises(kind, match=text), hooks.around():
        pytest.fail("went on")
    assert (tmp_path / "after").exists()
