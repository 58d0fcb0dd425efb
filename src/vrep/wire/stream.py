"""Byte streams under the protocol: a Protocol type, and TLS 1.3 over a socket.

`ByteStream` is what `FrameTransport` needs; a simulator passes its own.
`TlsStream` is full duplex from two threads: OpenSSL does not allow SSL_read
and SSL_write on one connection at once, so the socket is non-blocking, each
call into OpenSSL holds a lock for at most one chunk, and waiting happens in
poll() outside of the lock.

Sizes are bytes, times seconds.  Nothing here waits without a bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import ssl
import threading
import time
from typing import Final, Protocol

from vrep.errors import PeerError, TimeLimitError, TrustError, UnreachableError
from vrep.wire.turn import TurnLock

__all__ = ["ByteStream", "Clock", "ConnectionLostError", "SystemClock", "TlsStream"]

# One turn with OpenSSL: a few TLS records, so that the other direction gets its own.
WRITE_CHUNK_BYTES: Final = 256 << 10
READ_CHUNK_BYTES: Final = 256 << 10
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
        """Write what goes without waiting, perhaps nothing. What is left must
        be what the next write begins with."""

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


class TlsStream:
    """TLS 1.3 over a connected socket, of which it becomes the owner."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, clock: Clock
    ) -> None:
        sock.setblocking(False)
        self._clock = clock
        # wrap_socket takes the descriptor over, and does not shake hands yet.
        self._sock = context.wrap_socket(
            sock, server_side=server_side, do_handshake_on_connect=False
        )
        self._fd = self._sock.fileno()
        self._ssl_lock = TurnLock()
        self._gate = threading.Lock()
        self._users = 0
        self._closed = False
        self._pollers: dict[int, select.poll] = {}
        for events in (select.POLLIN, select.POLLOUT):
            self._pollers[events] = select.poll()
            self._pollers[events].register(self._fd, events)
        # Of the reading thread: what the last SSL_read lacked; 0: nothing.
        self._read_waits_for = 0

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
            # SSLSocket.shutdown would drop TLS and let a reader see raw bytes.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
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
            while True:
                try:
                    self._sock.do_handshake()
                    return
                except ssl.SSLWantReadError:
                    events = select.POLLIN
                except ssl.SSLWantWriteError:
                    events = select.POLLOUT
                except OSError as error:
                    self._let_alert_arrive()
                    raise _translate(error) from None
                if not self._wait(events, deadline - self._clock.monotonic()):
                    raise TimeLimitError(f"no TLS handshake within {timeout_s:g} s")

    def _let_alert_arrive(self) -> None:
        """A socket that is closed with bytes unread is reset, and the peer loses the alert that
        says why: read on, below TLS, until the peer closes."""
        deadline = self._clock.monotonic() + ALERT_WAIT_S
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)
            while self._wait(select.POLLIN, deadline - self._clock.monotonic()):
                if not socket.socket.recv(self._sock, READ_CHUNK_BYTES):
                    return

    def peer_certificate_der(self) -> bytes | None:
        """The peer's certificate; None when it showed none."""
        return self._sock.getpeercert(binary_form=True)

    def peer_fingerprint(self) -> str | None:
        der = self.peer_certificate_der()
        return None if der is None else hashlib.sha256(der).hexdigest()

    def read_into(self, buffer: memoryview, timeout_s: float) -> int | None:
        with self:
            filled, deadline = 0, 0.0
            while True:
                # OpenSSL hands out one record a call: take all that is there, in one turn.
                if self._read_waits_for == 0:
                    with self._ssl_lock:
                        filled, ended = self._read_records(buffer)
                    if ended:
                        return filled
                if filled:
                    return filled
                now = self._clock.monotonic()
                deadline = deadline or now + timeout_s
                if not self._wait(self._read_waits_for, deadline - now):
                    return None
                self._read_waits_for = 0

    def _read_records(self, buffer: memoryview) -> tuple[int, bool]:
        """What is there, and whether the buffer is full or the stream has ended; else
        `_read_waits_for` says what is lacking."""
        receive, filled = self._sock.recv_into, 0
        size = min(len(buffer), READ_CHUNK_BYTES)
        try:
            while filled < size:
                count = receive(buffer[filled:])
                filled += count
                if count == 0:
                    break
            return filled, True
        except ssl.SSLWantReadError:
            self._read_waits_for = select.POLLIN
        except ssl.SSLWantWriteError:
            self._read_waits_for = select.POLLOUT
        except ssl.SSLZeroReturnError:
            return filled, True
        except OSError as error:
            raise _translate(error) from None
        return filled, False

    def write(self, data: bytes | bytearray | memoryview, stall_s: float) -> None:
        with self, memoryview(data).cast("B") as view:
            at, size = 0, view.nbytes
            while at < size:
                # After a "want" OpenSSL must be given the same bytes again.
                chunk = view[at : at + WRITE_CHUNK_BYTES]
                try:
                    with self._ssl_lock:
                        at += self._sock.send(chunk)
                    continue
                except ssl.SSLWantWriteError:
                    events = select.POLLOUT
                except ssl.SSLWantReadError:
                    events = select.POLLIN
                except OSError as error:
                    raise _translate(error) from None
                finally:
                    chunk.release()
                if not self._wait(events, stall_s):
                    raise TimeLimitError(f"the peer took no bytes for {stall_s:g} s")

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        with self, memoryview(data).cast("B") as view:
            at = 0
            while at < view.nbytes:
                try:
                    with self._ssl_lock:
                        at += self._sock.send(view[at : at + WRITE_CHUNK_BYTES])
                except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    break
                except OSError as error:
                    raise _translate(error) from None
            return at


_DISTRUST: Final = (
    "CERTIFICATE_VERIFY_FAILED",
    "ALERT_UNKNOWN_CA",
    "ALERT_BAD_CERTIFICATE",
    "ALERT_CERTIFICATE",
    "ALERT_ACCESS_DENIED",
)


def _translate(error: OSError) -> PeerError:
    """An error of the socket or of OpenSSL, in our words."""
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        if any(word in reason for word in _DISTRUST):
            if "ALERT" in reason:
                return TrustError("the peer does not know this site's certificate, or removed it")
            return TrustError("the peer's certificate is not one that this site trusts")
        if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
            return PeerError("the peer does not speak TLS 1.3")
        if isinstance(error, ssl.SSLEOFError) or "UNEXPECTED_EOF" in reason:
            return ConnectionLostError("the peer ended it without a word")
        return ConnectionLostError(f"TLS failed: {reason.replace('_', ' ').lower()}")
    return ConnectionLostError(error.strerror or str(error))
