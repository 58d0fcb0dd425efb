"""The QEMU guest agent: JSON lines over a Unix socket, or through libvirt.

Addresses: ``unix:SOCKET`` (the chardev of the VM's ``org.qemu.guest_agent.0`` port) and
``libvirt:NAME``. Source: QEMU's guest agent protocol reference. A socket serves one client at a
time, and a client first puts the stream in step: what an earlier one left unread is dropped.
Times in seconds; an agent belongs to one thread.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from pathlib import Path
from typing import Any, Final, Protocol

from vrep import errors
from vrep.hypervisor.monitor import libvirt_modules, open_domain

LINE_BYTES_MAX: Final = 1 << 20
SENTINEL: Final = b"\xff"
"""never part of a message: the agent sends it before the answer that puts the stream in step"""


class Agent(Protocol):
    """What a guest is asked through."""

    def call(self, command: str, limit_s: float) -> Any:
        """The answer. `HypervisorError`: the guest refused. `TimeLimitError`, `UnreachableError`:
        no answer, and whether it was done is not known."""

    def close(self) -> None: ...


class SocketAgent:
    """An agent at the other end of a Unix socket."""

    def __init__(self, path: Path, limit_s: float) -> None:
        self._path = path
        self._rest = b""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(limit_s)
            self._socket.connect(str(path))
            self._in_step(limit_s)
        except OSError as error:
            self._socket.close()
            raise errors.UnreachableError(f"the guest agent at {path}: {error}") from None
        except BaseException:
            self._socket.close()
            raise

    def _in_step(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        token = secrets.randbelow(1 << 31)
        request = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
        self._socket.sendall(SENTINEL + json.dumps(request).encode() + b"\n")
        while True:
            line = self._line(deadline, "guest-sync-delimited")
            mark = line.rfind(SENTINEL)
            if mark >= 0 and _decoded(line[mark + 1 :]).get("return") == token:
                return

    def call(self, command: str, limit_s: float) -> Any:
        deadline = time.monotonic() + limit_s
        try:
            self._socket.settimeout(limit_s)
            self._socket.sendall(json.dumps({"execute": command}).encode() + b"\n")
            answer = _decoded(self._line(deadline, command))
        except OSError as error:
            raise errors.UnreachableError(f"{command}: {error}") from None
        return _result(command, answer)

    def _line(self, deadline: float, what: str) -> bytes:
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._late(what)
            if len(self._rest) > LINE_BYTES_MAX:
                raise errors.ProtocolError(f"{what}: an answer of more than {LINE_BYTES_MAX} bytes")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise self._late(what) from None
            if not data:
                raise errors.UnreachableError(f"{what}: {self._path} was closed")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _late(self, what: str) -> errors.TimeLimitError:
        return errors.TimeLimitError(
            f"{what} at {self._path}: is the agent running in the guest, and nobody else connected?"
        )

    def close(self) -> None:
        self._socket.close()


class LibvirtAgent:
    """An agent that libvirt is connected to."""

    def __init__(self, name: str) -> None:
        self._libvirt, self._qemu = libvirt_modules()
        self._connection, self._domain = open_domain(name)
        self._name = name

    def call(self, command: str, limit_s: float) -> Any:
        request = json.dumps({"execute": command})
        try:
            text = self._qemu.qemuAgentCommand(self._domain, request, max(1, round(limit_s)), 0)
        except self._libvirt.libvirtError as error:
            raise errors.UnreachableError(f"{command} in domain {self._name!r}: {error}") from None
        return _result(command, _decoded(text.encode()))

    def close(self) -> None:
        self._connection.close()


def _decoded(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _result(command: str, answer: dict[str, Any]) -> Any:
    if "return" in answer:
        return answer["return"]
    problem = answer.get("error")
    if isinstance(problem, dict):
        raise errors.HypervisorError(f"{command}: the guest says: {problem.get('desc', problem)}")
    raise errors.ProtocolError(f"{command}: the guest agent sent no answer to it")


def check_agent(address: str) -> str:
    """The address of an agent, when it is one."""
    scheme, _, where = address.partition(":")
    if not where or scheme not in ("unix", "libvirt"):
        raise errors.UsageError(f"the guest agent {address!r}: write unix:SOCKET or libvirt:NAME")
    return address


def open_agent(address: str, limit_s: float) -> Agent:
    """The agent of a running guest."""
    scheme, _, where = check_agent(address).partition(":")
    return SocketAgent(Path(where), limit_s) if scheme == "unix" else LibvirtAgent(where)


__all__ = ["Agent", "SocketAgent", "check_agent", "open_agent"]
