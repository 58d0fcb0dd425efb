"""Control sockets: how the processes of one site, and its command line, talk to each other.

A Unix stream socket (mode 0600: the user that owns the site). One JSON object a line, at
most `LINE_BYTES_MAX` bytes: ``{"method": str, "params": {...}}`` is answered by
``{"result": ...}`` or ``{"error": {"type", "text", "exit_code"}}``; file descriptors travel
beside the answer (SCM_RIGHTS). Nothing here is on a guest's path.

Threading: the server runs one thread a connection; handlers must be thread-safe.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vrep import errors, threads


def _log() -> Any:
    """The logger of a server; a command, which asks, does without the time its import takes."""
    import structlog

    return structlog.get_logger("vrep.control")


LINE_BYTES_MAX = 1 << 20
FDS_MAX = 16
CONNECTIONS_MAX = 64
TEXT_MAX = 1 << 14
"""characters of an error's text that are sent"""
ACCEPT_AGAIN_S = 0.1

Handler = Callable[[Mapping[str, Any]], Any]


@dataclass(slots=True)
class Reply:
    """A result with file descriptors; they are closed here once they were sent."""

    result: Any
    fds: list[int] = field(default_factory=list)


_ERRORS: dict[str, type[errors.VrepError]] = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.VrepError)
}


def _encode(message: Mapping[str, Any]) -> bytes:
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > LINE_BYTES_MAX:
        raise errors.RangeError(f"a control message of {len(line)} bytes exceeds {LINE_BYTES_MAX}")
    return line


def _result(reply: Reply) -> bytes:
    """A result as it is sent; one that cannot be is an error that the peer is told."""
    try:
        return _encode({"result": reply.result})
    except errors.VrepError as error:
        raise _Failed.of(error) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise _Failed.of(errors.VrepError(f"a result that is not JSON: {error}")) from None


class _Lines:
    """Lines and descriptors read from a socket, bounded."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self.fds: list[int] = []

    def read(self) -> dict[str, Any] | None:
        """The next message; None at the end of the stream."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > LINE_BYTES_MAX:
                raise errors.ProtocolError("a control line is too long")
            data, fds, _flags, _address = socket.recv_fds(self._sock, 65536, FDS_MAX)
            self.fds.extend(fds)
            if not data:
                if self._buffer:
                    raise errors.ProtocolError("the control connection ended inside a line")
                return None
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise errors.ProtocolError(f"a control line is not JSON: {error}") from None
        if not isinstance(message, dict):
            raise errors.ProtocolError("a control message is not an object")
        return message

    def take_fds(self) -> list[int]:
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        for fd in self.take_fds():
            os.close(fd)


class ControlServer:
    """Serves named methods on a Unix socket until closed.

    A stale socket of a dead process is replaced; that of a live one raises `BusyError`.
    """

    def __init__(self, path: Path, methods: Mapping[str, Handler], *, mode: int = 0o600) -> None:
        self.path = path
        self._methods = {"ping": lambda _params: {"pid": os.getpid()}, **methods}
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind(mode)
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(
            target=self._accept, name=f"control:{path.name}", daemon=True
        )
        self._thread.start()

    def _bind(self, mode: int) -> None:
        if self.path.exists():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(self.path)) == 0:
                    raise errors.BusyError(f"{self.path} is served by another process")
            self.path.unlink(missing_ok=True)
        # The name appears with this mode, or less. (The umask belongs to all threads: what
        # another one makes meanwhile must not get ours.)
        os.fchmod(self._socket.fileno(), mode)
        self._socket.bind(str(self.path))
        self.path.chmod(mode)
        self._socket.listen(CONNECTIONS_MAX)

    def _accept(self) -> None:
        failing = False
        while True:
            try:
                connection, _address = self._socket.accept()
            except OSError as error:
                if self._closed:
                    return
                if not failing:
                    _log().warning("no control connection", path=str(self.path), error=str(error))
                failing = True
                time.sleep(ACCEPT_AGAIN_S)  # out of descriptors or memory: it passes
                continue
            failing = False
            with self._lock:
                if self._closed or len(self._connections) >= CONNECTIONS_MAX:
                    connection.close()
                    continue
                self._connections.add(connection)
            thread = threading.Thread(
                target=self._serve, args=(connection,), name="control:connection", daemon=True
            )
            try:
                threads.start(thread)
            except RuntimeError as error:  # no more threads
                _log().warning("no control connection", path=str(self.path), error=str(error))
                self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)
        connection.close()

    def _serve(self, connection: socket.socket) -> None:
        lines = _Lines(connection)
        try:
            while (request := lines.read()) is not None:
                lines.close()  # requests carry no descriptors
                reply = self._answer(request)
                try:
                    self._send(connection, _result(reply), reply.fds)
                finally:
                    for fd in reply.fds:
                        os.close(fd)
        except _Failed as failed:
            with contextlib.suppress(OSError):
                connection.sendall(_encode(failed.message))
        except (OSError, errors.VrepError):
            pass  # the peer vanished or spoke nonsense: its connection ends, nothing else does
        finally:
            lines.close()
            self._forget(connection)

    def _answer(self, request: Mapping[str, Any]) -> Reply:
        try:
            method = self._methods.get(str(request.get("method")))
            if method is None:
                raise errors.UnsupportedError(f"no control method {request.get('method')!r}")
            params = request.get("params", {})
            if not isinstance(params, dict):
                raise errors.ProtocolError("params is not an object")
            result = method(params)
        except errors.VrepError as error:
            raise _Failed.of(error) from error
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise _Failed.of(errors.VrepError(f"{type(error).__name__}: {error}")) from error
        except Exception as error:
            # A fault of ours: who asked is told all the same, and the log has where it was.
            _log().exception("a control method failed", method=str(request.get("method")))
            raise _Failed.of(errors.VrepError(f"{type(error).__name__}: {error}")) from error
        return result if isinstance(result, Reply) else Reply(result)

    @staticmethod
    def _send(connection: socket.socket, payload: bytes, fds: list[int]) -> None:
        sent = socket.send_fds(connection, [payload], fds) if fds else 0
        if sent < len(payload):
            connection.sendall(payload[sent:])

    def close(self) -> None:
        """Stop serving and remove the socket."""
        with self._lock:
            self._closed = True
            connections = list(self._connections)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.path.unlink(missing_ok=True)
        self._thread.join(timeout=5)

    def __enter__(self) -> ControlServer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class _Failed(Exception):
    """A request that ends in an error message (and ends its connection)."""

    def __init__(self, message: dict[str, Any]) -> None:
        super().__init__()
        self.message = message

    @classmethod
    def of(cls, error: errors.VrepError) -> _Failed:
        text = error.detail[:TEXT_MAX]
        detail = {"type": type(error).__name__, "text": text, "exit_code": error.exit_code}
        return cls({"error": detail})


class ControlClient:
    """Calls methods of a control server; a new connection each call, so a restart of the
    server is never noticed."""

    def __init__(self, path: Path, *, timeout: float = 10.0) -> None:
        self.path = path
        self.timeout = timeout

    def call(self, method: str, *, timeout: float | None = None, **params: Any) -> Any:
        """The method's result. Raises the error it raised, or `UnreachableError`."""
        result, fds = self.call_fds(method, timeout=timeout, **params)
        for fd in fds:
            os.close(fd)
        return result

    def call_fds(
        self, method: str, *, timeout: float | None = None, **params: Any
    ) -> tuple[Any, list[int]]:
        """The result and the descriptors that came with it (the caller closes them)."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(self.timeout if timeout is None else timeout)
            lines = _Lines(sock)
            try:
                sock.connect(str(self.path))
                sock.sendall(_encode({"method": method, "params": params}))
                message = lines.read()
            except TimeoutError:
                lines.close()
                raise errors.TimeLimitError(f"{method} at {self.path}") from None
            except OSError as error:
                lines.close()
                raise errors.UnreachableError(f"{self.path}: {error.strerror}") from None
            if message is None:
                lines.close()
                raise errors.UnreachableError(f"{self.path} closed the connection")
            if "error" in message:
                lines.close()
                detail = message["error"]
                raise _ERRORS.get(str(detail.get("type")), errors.VrepError)(
                    str(detail.get("text"))
                )
            return message.get("result"), lines.take_fds()

    def alive(self) -> bool:
        """True when the server answers."""
        try:
            self.call("ping", timeout=2.0)
        except errors.VrepError:
            return False
        return True


__all__ = ["ControlClient", "ControlServer", "Reply"]
