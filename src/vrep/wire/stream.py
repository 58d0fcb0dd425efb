"""Byte streams under the protocol: a Protocol type, and TLS 1.3 over a socket.

`ByteStream` is what `FrameTransport` needs; a simulator passes its own.
`TlsStream` is full duplex from two threads.  What moves bytes is native
(`tls/tls.h`) and holds no GIL; here are the waits, and what an error means.

Sizes are bytes, times seconds.  Nothing here waits without a bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import select
import socket
import threading
import time
from typing import Final, Protocol

from vrep._core import tls
from vrep.errors import PeerError, TimeLimitError, TrustError, UnreachableError

__all__ = ["ByteStream", "Clock", "ConnectionLostError", "SystemClock", "TlsStream"]

SCRATCH_BYTES: Final = 16 << 10
ALERT_WAIT_S: Final = 1.0


class ConnectionLostError(UnreachableError):
    """The connection was lost."""


class Clock(Protocol):
    """Time as an argument."""

    def monotonic(self) -> float: ...

    def time_ns(self) -> int: ...


class SystemClock:
    """The host's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time_ns(self) -> int:
        return time.time_ns()


class ByteStream(Protocol):
    """A connected, ordered stream of bytes. One thread may read while another
    writes; `close` may be called by any thread and ends both."""

    def read_into(self, buffer: memoryview, timeout_s: float) -> int | None:
        """Read at least one byte. 0 at the end, None when the time is over."""

    def write(self, data: bytes | bytearray | memoryview, stall_s: float) -> None:
        """Write all. TimeLimitError when nothing moves for `stall_s`."""

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        """Write what goes without waiting, perhaps nothing; how many bytes went.
        The next write must begin with all that is left."""

    def close(self) -> None: ...


def tune_socket(sock: socket.socket, dead_after_s: float) -> None:
    """No delay for small frames, and a dead path is noticed by the kernel too."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe_s = max(1, int(dead_after_s / 4))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(dead_after_s * 1000))
    with contextlib.suppress(OSError):  # the peer may be gone; a kernel may keep its choice
        peer = ipaddress.ip_address(sock.getpeername()[0].partition("%")[0])
        if peer.is_loopback:
            # There is no link to be probed: BBR would only run its pacing timers.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


class TlsStream:
    """TLS 1.3 over a connected socket, of which it becomes the owner."""

    def __init__(self, sock: socket.socket, context: tls.TlsContext, *, clock: Clock) -> None:
        self._clock = clock
        self._tls = tls.Tls(context)
        self._sock = socket.socket(fileno=sock.detach())
        self._sock.setblocking(False)
        self._fd = self._sock.fileno()
        self._gate = threading.Lock()
        self._users = 0
        self._closed = False
        self._pollers: dict[int, select.poll] = {}
        for events in (select.POLLIN, select.POLLOUT):
            self._pollers[events] = select.poll()
            self._pollers[events].register(self._fd, events)

    # A descriptor is closed only when no thread is inside a call that uses it:
    # its number could be another file's by then.
    def __enter__(self) -> None:
        with self._gate:
            if self._closed:
                raise ConnectionLostError("it was closed on this side")
            self._users += 1

    def __exit__(self, *exc: object) -> None:
        with self._gate:
            self._users -= 1
            if self._closed and not self._users:
                self._sock.close()

    def close(self) -> None:
        with self._gate:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            if not self._users:
                self._sock.close()

    def _wait(self, events: int, timeout_s: float) -> bool:
        if timeout_s <= 0:
            return False
        # A poll object serves one thread at a time: reading and writing wait
        # for their own, and in the rare crossed case for a new one.
        poller = self._pollers.pop(events, None)
        if poller is None:
            poller = select.poll()
            poller.register(self._fd, events)
        try:
            return bool(poller.poll(max(1, int(timeout_s * 1000))))
        finally:
            self._pollers[events] = poller

    def handshake(self, timeout_s: float) -> None:
        """Shake hands within a total time."""
        deadline = self._clock.monotonic() + timeout_s
        with self:
            done = False
            while True:
                if not done:
                    status = self._tls.handshake()
                    done = status == 0
                    if status not in (0, tls.AGAIN):
                        self._let_alert_arrive()
                        raise self._failed(status)
                if not self._moved(self._tls.push(self._fd), writing=True):
                    events = select.POLLOUT
                elif done:
                    return
                elif self._moved(self._tls.receive(self._fd)):
                    continue
                else:
                    events = select.POLLIN
                if not self._wait(events, deadline - self._clock.monotonic()):
                    raise TimeLimitError(f"no TLS handshake within {timeout_s:g} s")

    def _moved(self, status: int, *, writing: bool = False) -> bool:
        """Whether a call did all that it was to do; False: the socket is not ready."""
        if status == 0:
            return True
        if status == tls.AGAIN:
            return False
        raise self._failed(status, writing=writing)

    def _failed(self, status: int, *, writing: bool = False) -> PeerError:
        if status == tls.IO:
            return ConnectionLostError(os.strerror(self._tls.errno(writing=writing)))
        if status == tls.CLOSED:
            return ConnectionLostError("the peer ended it without a word")
        return _judge(self._tls.reason)

    def _let_alert_arrive(self) -> None:
        """Send the alert that says why. A socket that is closed with bytes unread is reset, and
        the peer loses it: read on, below TLS, until the peer closes."""
        deadline = self._clock.monotonic() + ALERT_WAIT_S
        scratch = bytearray(SCRATCH_BYTES)
        self._tls.push(self._fd)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            while self._wait(select.POLLIN, deadline - self._clock.monotonic()):
                if not self._sock.recv_into(scratch):
                    return

    def peer_certificate_der(self) -> bytes | None:
        """The peer's certificate; None when it showed none."""
        return self._tls.peer_certificate()

    def peer_fingerprint(self) -> str | None:
        der = self.peer_certificate_der()
        return None if der is None else hashlib.sha256(der).hexdigest()

    def read_into(self, buffer: memoryview, timeout_s: float) -> int | None:
        with self:
            deadline = 0.0
            while True:
                status = self._tls.read(self._fd, buffer)
                if status > 0:
                    return status
                if status == tls.CLOSED:
                    return 0
                if status not in (tls.AGAIN, tls.TORN):
                    raise self._failed(status)
                # Also while bytes come: a peer can send without end what is no data.
                now = self._clock.monotonic()
                deadline = deadline or now + timeout_s
                if status == tls.TORN and now <= deadline:
                    continue
                if status == tls.TORN or not self._wait(select.POLLIN, deadline - now):
                    return None

    def write(self, data: bytes | bytearray | memoryview, stall_s: float) -> None:
        with self, memoryview(data).cast("B") as view:
            at = 0
            while True:
                with view[at:] as rest:
                    status, gone = self._write(rest)
                at += gone
                if self._moved(status, writing=True):
                    return
                if not self._wait(select.POLLOUT, stall_s):
                    raise TimeLimitError(f"the peer took no bytes for {stall_s:g} s")

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        with self, memoryview(data).cast("B") as view:
            status, gone = self._write(view)
            self._moved(status, writing=True)
            return gone

    def _write(self, view: memoryview) -> tuple[int, int]:
        # Bytes count as written only when they have left: those that are encrypted and wait are
        # what the next write begins with.
        owed = self._tls.owed
        if len(view) < owed:
            raise ValueError(f"{len(view)} bytes, but the last write left {owed}")
        return self._tls.write(self._fd, view)


_DISTRUST: Final = (
    "certificate verify failed",
    "alert unknown ca",
    "alert bad certificate",
    "alert certificate",
    "alert access denied",
)


def _judge(reason: str) -> PeerError:
    """Why TLS failed, in our words."""
    if any(word in reason for word in _DISTRUST):
        if "alert" in reason:
            return TrustError("the peer does not know this site's certificate, or removed it")
        return TrustError("the peer's certificate is not one that this site trusts")
    if "protocol version" in reason or "unsupported protocol" in reason:
        return PeerError("the peer does not speak TLS 1.3")
    return ConnectionLostError(f"TLS failed: {reason}")
