"""Byte streams under the protocol: a Protocol type, and TLS 1.3 over a socket.

`ByteStream` is what `FrameTransport` needs; a simulator passes its own.
`TlsStream` is full duplex from two threads: OpenSSL does not allow SSL_read
and SSL_write on one connection at once, so each call into it holds a lock for
at most one chunk.  OpenSSL works in memory only: the socket, which is
non-blocking, moves several TLS records with each call, outside of the lock.

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
from collections.abc import Callable
from typing import Final, Protocol, cast

from vrep.errors import PeerError, TimeLimitError, TrustError, UnreachableError
from vrep.wire.turn import TurnLock

__all__ = ["ByteStream", "Clock", "ConnectionLostError", "SystemClock", "TlsStream"]

# What the socket is given or asked for at once: a few TLS records. More would not fit in a
# processor's cache between the copy and the cipher.
CHUNK_BYTES: Final = 64 << 10
# One turn with OpenSSL of a reader, so that the other direction gets its own.
READ_TURN_BYTES: Final = 256 << 10
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


class TlsStream:
    """TLS 1.3 over a connected socket, of which it becomes the owner."""

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool, clock: Clock
    ) -> None:
        self._clock = clock
        self._arrived, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._arrived, self._to_send, server_side=server_side)
        self._sock = socket.socket(fileno=sock.detach())
        self._sock.setblocking(False)
        self._fd = self._sock.fileno()
        self._ssl_lock = TurnLock()
        self._gate = threading.Lock()
        self._users = 0
        self._closed = False
        self._pollers: dict[int, select.poll] = {}
        for events in (select.POLLIN, select.POLLOUT):
            self._pollers[events] = select.poll()
            self._pollers[events].register(self._fd, events)
        # Of the reading thread: whether OpenSSL has seen all that arrived.
        self._dry = False
        self._chunk = memoryview(bytearray(CHUNK_BYTES))
        # What the socket did not take yet, under a lock: a reader adds OpenSSL's answers.
        self._sending = threading.Lock()
        self._unsent = memoryview(b"")
        # Of the writing thread: how many bytes of what is being written that was made of.
        self._owed = 0

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
                try:
                    done = done or self._shake()
                    if not self._push():
                        events = select.POLLOUT
                    elif done:
                        return
                    elif self._receive():
                        continue
                    else:
                        events = select.POLLIN
                except OSError as error:
                    self._let_alert_arrive()
                    raise _translate(error) from None
                if not self._wait(events, deadline - self._clock.monotonic()):
                    raise TimeLimitError(f"no TLS handshake within {timeout_s:g} s")

    def _shake(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        finally:
            self._collect()
        return True

    def _let_alert_arrive(self) -> None:
        """Send the alert that says why. A socket that is closed with bytes unread is reset, and
        the peer loses it: read on, below TLS, until the peer closes."""
        deadline = self._clock.monotonic() + ALERT_WAIT_S
        with contextlib.suppress(OSError):
            self._push()
            self._sock.shutdown(socket.SHUT_WR)
            while self._wait(select.POLLIN, deadline - self._clock.monotonic()):
                if not self._sock.recv_into(self._chunk):
                    return

    def peer_certificate_der(self) -> bytes | None:
        """The peer's certificate; None when it showed none."""
        return self._tls.getpeercert(binary_form=True)

    def peer_fingerprint(self) -> str | None:
        der = self.peer_certificate_der()
        return None if der is None else hashlib.sha256(der).hexdigest()

    # ---- reading -----------------------------------------------------------------

    def read_into(self, buffer: memoryview, timeout_s: float) -> int | None:
        with self:
            deadline = 0.0
            try:
                while True:
                    if not self._dry:
                        with self._ssl_lock:
                            filled, ended = self._read_records(buffer)
                        if filled or ended:
                            return filled
                        if self._to_send.pending:
                            self._tell()
                    # Also while bytes come: a peer can send without end what is no data.
                    arrived, now = self._receive(), self._clock.monotonic()
                    deadline = deadline or now + timeout_s
                    if arrived and now <= deadline:
                        continue
                    if arrived or not self._wait(select.POLLIN, deadline - now):
                        return None
            except OSError as error:
                if isinstance(error, ssl.SSLError):
                    self._tell()
                raise _translate(error) from None

    def _receive(self) -> bool:
        """Hand over to OpenSSL what has arrived. False when that is nothing."""
        try:
            count = self._sock.recv_into(self._chunk)
        except BlockingIOError:
            return False
        with self._ssl_lock:
            if count:
                self._arrived.write(self._chunk[:count])
            else:
                self._arrived.write_eof()
        self._dry = False
        return True

    def _read_records(self, buffer: memoryview) -> tuple[int, bool]:
        """What is there, and whether the stream has ended."""
        # OpenSSL hands out one record a call: take all that is there, in one turn.
        read, filled = cast("Callable[[int, memoryview], int]", self._tls.read), 0
        size = min(len(buffer), READ_TURN_BYTES)
        try:
            while filled < size:
                count = read(size - filled, buffer[filled:size])
                if not count:  # the peer said that it ends (close_notify)
                    return filled, True
                filled += count
        except ssl.SSLWantReadError:
            self._dry = True
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return filled, True
        return filled, False

    def _tell(self) -> None:
        """Send what OpenSSL answers by itself, an alert or a new key's name, behind what is being
        sent, if it goes without waiting; else with the next write."""
        with self._sending:
            with self._ssl_lock:
                self._collect()
            with contextlib.suppress(OSError):
                self._push_locked()

    # ---- writing -----------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview, stall_s: float) -> None:
        with self, memoryview(data).cast("B") as view:
            at, size = 0, view.nbytes
            if size < self._owed:
                raise ValueError(f"{size} bytes, but the last write left {self._owed}")
            try:
                while True:
                    while not self._push():
                        if not self._wait(select.POLLOUT, stall_s):
                            raise TimeLimitError(f"the peer took no bytes for {stall_s:g} s")
                    at, self._owed = at + self._owed, 0
                    if at >= size:
                        return
                    self._encrypt(view[at : at + CHUNK_BYTES])
            except OSError as error:
                raise _translate(error) from None

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        with self, memoryview(data).cast("B") as view:
            at, size = 0, view.nbytes
            if size < self._owed:
                raise ValueError(f"{size} bytes, but the last write left {self._owed}")
            try:
                while self._push():
                    # Bytes count as written only when they have left: those that are encrypted
                    # and wait are what the next write begins with.
                    at, self._owed = at + self._owed, 0
                    if at >= size:
                        break
                    self._encrypt(view[at : at + CHUNK_BYTES])
            except OSError as error:
                raise _translate(error) from None
            return at

    def _encrypt(self, chunk: memoryview) -> None:
        with chunk, self._sending, self._ssl_lock:
            self._owed = self._tls.write(chunk)
            self._collect()

    def _collect(self) -> None:
        """Take what OpenSSL wrote; the one place, so that its order is kept."""
        self._unsent = memoryview(bytes(self._unsent) + self._to_send.read())

    def _push(self) -> bool:
        """Send what is encrypted, without waiting. False when some of it is left."""
        with self._sending:
            return self._push_locked()

    def _push_locked(self) -> bool:
        while self._unsent:
            try:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
            except BlockingIOError:
                return False
        return True


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
