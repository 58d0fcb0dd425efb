"""Control sockets: every question is answered, and nothing ends the server but its owner."""

from __future__ import annotations

import os
import resource
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vrep import errors
from vrep.control import CONNECTIONS_MAX, LINE_BYTES_MAX, ControlClient, ControlServer, Reply


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vrep-control-") as name:
        yield Path(name) / "x.sock"


def raising(error: BaseException) -> Any:
    def method(_params: Any) -> Any:
        raise error

    return method


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero"), AssertionError(), RuntimeError("odd"), KeyError("x")]
)
def test_a_fault_of_a_method_is_answered(path: Path, error: Exception) -> None:
    with ControlServer(path, {"fails": raising(error)}):
        client = ControlClient(path)
        with pytest.raises(errors.VrepError, match=type(error).__name__):
            client.call("fails")
        assert client.alive()


def test_an_error_keeps_its_kind_however_long_its_words(path: Path) -> None:
    fails = raising(errors.NotFoundError("x" * LINE_BYTES_MAX))
    with ControlServer(path, {"fails": fails}), pytest.raises(errors.NotFoundError, match="xxx"):
        ControlClient(path).call("fails")


@pytest.mark.parametrize("result", [object(), {1: {2}}, "x" * LINE_BYTES_MAX])
def test_a_result_that_cannot_be_sent_is_an_error(path: Path, result: Any) -> None:
    """Also one with descriptors, which are closed all the same."""
    reader, writer = os.pipe()
    with ControlServer(path, {"odd": lambda _p: Reply(result, [writer])}):
        with pytest.raises(errors.VrepError, match=r"JSON|exceeds"):
            ControlClient(path).call("odd")
        assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize("line", [b"[" * 100_000 + b"\n", b"7\n", b'{"method": 3, "params": 1}\n'])
def test_nonsense_ends_its_connection_only(path: Path, line: bytes) -> None:
    with ControlServer(path, {}), socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall(line)
        while sock.recv(4096):
            pass
        assert ControlClient(path).alive()


@contextmanager
def no_more_files() -> Iterator[None]:
    """The next descriptor is refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_outlives_a_lack_of_descriptors(path: Path) -> None:
    with ControlServer(path, {}) as server:
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.settimeout(20)
            with no_more_files():
                waiting.connect(str(path))
                waiting.sendall(b'{"method": "ping"}\n')
                time.sleep(0.3)
                assert server._thread.is_alive()
            assert b"pid" in waiting.recv(4096)
        assert ControlClient(path).alive()


def test_connections_are_bounded(path: Path) -> None:
    with ControlServer(path, {}):
        held = [socket.socket(socket.AF_UNIX) for _ in range(CONNECTIONS_MAX + 3)]
        try:
            for sock in held:
                sock.connect(str(path))
                sock.settimeout(20)
            assert held[-1].recv(1) == b""
        finally:
            for sock in held:
                sock.close()
        deadline = time.monotonic() + 20
        while not ControlClient(path).alive():
            assert time.monotonic() < deadline
