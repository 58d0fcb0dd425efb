"""Frames over a byte stream, for blocking threads.

A `FrameTransport` joins a `ByteStream` and a `Connection`.  One thread calls
`receive` in a loop; any thread may `send`.  `receive` answers pings, sends its
own when the peer is silent, and raises TimeLimitError when a peer stays so:
a hung peer is noticed as surely as a dead one.  It also pings when this end has
long said nothing: a peer whose frame takes minutes on a slow link hears that it
is heard.  The reading thread never waits for the writing direction, so two ends
cannot block each other.

No call waits without a bound; times are seconds.  After any exception the
transport is of no more use and must be closed.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from vrep.errors import (
    PeerError,
    ProtocolError,
    StateError,
    TimeLimitError,
    VersionError,
    VrepError,
)
from vrep.wire import messages as m
from vrep.wire.peers import Peer
from vrep.wire.protocol import Connection, ConnectionState, Event, Role
from vrep.wire.stream import ByteStream, Clock, ConnectionLostError, SystemClock
from vrep.wire.turn import TurnLock

__all__ = ["FrameTransport", "PeerRefusedError", "Timeouts"]

# TLS cuts what it is given into records of this size: we hand it full ones.
TLS_RECORD_BYTES: Final = 16384
# AES-GCM keys wear out (RFC 8446, 5.5: 2^24.5 full records); renew well before.
RENEW_AFTER_BYTES: Final = 200 << 30
POSTED_MAX: Final = 1024
# Of ours, unanswered, while the peer sends: its answers wait behind what it sends. Far below
# what the protocol allows.
PINGS_WAITING_MAX: Final = 128
CLOSE_WAIT_S: Final = 0.2
LINGER_S: Final = 1.0


class PeerRefusedError(PeerError):
    """The other side refused."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{text} ({code})" if text else code)
        self.code = code


@dataclass(frozen=True)
class Timeouts:
    """Bounds of every wait."""

    connect_s: float = 10.0
    handshake_s: float = 10.0
    """TLS and HELLO, each"""
    ping_after_s: float = 5.0
    """silence after which a ping is sent"""
    dead_after_s: float = 20.0
    """silence, or a stalled write, after which the peer counts as dead"""


class FrameTransport:
    """One connection to a peer. `peer` is None while it is not known."""

    def __init__(
        self,
        stream: ByteStream,
        connection: Connection,
        *,
        peer: Peer | None = None,
        timeouts: Timeouts | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.stream = stream
        self.connection = connection
        self.peer = peer
        self.timeouts = timeouts or Timeouts()
        self.round_trip_s: float | None = None
        """of the last answered ping"""
        self.bytes_sent = 0
        self.bytes_received = 0
        self._clock = clock or SystemClock()
        self._send_lock = TurnLock()
        self._posted: deque[tuple[m.Message, int]] = deque()
        self._unfinished: memoryview | None = None
        # Its words: the error itself would hold this end, with all its buffers, in a ring.
        self._failure: str | None = None
        self._closed = False
        self._silent_s = 0.0
        self._spoke_s = self._clock.monotonic()
        self._pinged_at_s = 0.0
        self._ping_id = 0
        self._request_ids = itertools.count(1)
        self._ping_sent: dict[int, float] = {}

    @property
    def name(self) -> str:
        return self.peer.name if self.peer else "a site that is not known"

    @property
    def renewal_due(self) -> bool:
        """Whether the TLS keys carried so much that a new connection should
        be made at the next good moment."""
        return max(self.bytes_sent, self.bytes_received) >= RENEW_AFTER_BYTES

    # ---- sending -------------------------------------------------------------

    def send(self, message: m.Message, channel: int = 0) -> None:
        """Send a message, waiting for room in the stream."""
        with self._send_lock:
            self._drain_locked()
            self._write_locked(self.connection.send(message, channel))
        self._flush_posted()

    def send_data(
        self,
        channel: int,
        buffers: Sequence[bytes | bytearray | memoryview],
        *,
        more: bool = False,
    ) -> None:
        """Send records as one DATA frame. Of each buffer at most one TLS
        record at either end is copied; the rest goes to TLS from where it is.
        The caller has checked `connection.credit(channel)`."""
        with self._send_lock:
            self._drain_locked()
            head = bytearray(self.connection.send_data(channel, buffers, more=more))
            if len(buffers) == 1:
                self._write_one_locked(head, memoryview(buffers[0]).cast("B"))
                buffers, head = (), bytearray()
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                if head:
                    room = TLS_RECORD_BYTES - len(head)
                    head += view[:room]
                    view = view[room:]
                    if len(head) == TLS_RECORD_BYTES:
                        self._write_locked(head)
                        head = bytearray()
                whole = len(view) - len(view) % TLS_RECORD_BYTES
                if whole:
                    self._write_locked(view[:whole])
                head += view[whole:]
            if head:
                self._write_locked(head)
        self._flush_posted()

    def _write_one_locked(self, head: bytearray, view: memoryview) -> None:
        # The odd bytes go in front, with the header: then the rest is full
        # records, written at once, and no small record trails behind.
        odd = len(view) % TLS_RECORD_BYTES
        if odd + len(head) > TLS_RECORD_BYTES:
            odd = TLS_RECORD_BYTES - len(head)
        head += view[:odd]
        self._write_locked(head)
        if odd < len(view):
            self._write_locked(view[odd:])

    def post(self, message: m.Message, channel: int = 0) -> None:
        """Send without ever waiting: now if there is room, else with the next
        send or receive. For threads that must go on reading."""
        if len(self._posted) >= POSTED_MAX:
            raise TimeLimitError(f"{self.name} takes no answers")
        self._posted.append((message, channel))
        self._flush_posted()

    def _flush_posted(self) -> None:
        # Whoever holds the lock comes here when it has let go, so nothing that
        # was posted meanwhile is forgotten.
        while (self._posted or self._unfinished) and self._send_lock.acquire_within(0):
            try:
                if not self._push_locked():
                    return
            finally:
                self._send_lock.release()

    def _push_locked(self) -> bool:
        """Write posted frames without waiting. False when the stream is full."""
        while self._unfinished or self._posted:
            if not self._unfinished:
                message, channel = self._posted.popleft()
                self._unfinished = self._encode_posted(message, channel)
                if self._unfinished is None:
                    continue
            self._raise_failure()
            try:
                count = self.stream.write_some(self._unfinished)
            except VrepError as error:
                self._failure = str(error)
                raise
            self._sent(count)
            self._unfinished = self._unfinished[count:] or None
            if self._unfinished:
                return False
        return True

    def _encode_posted(self, message: m.Message, channel: int) -> memoryview | None:
        try:
            return memoryview(self.connection.send(message, channel))
        except StateError:
            # The channel or connection ended after it was posted; a posted
            # message is an answer that nobody waits for any more.
            if channel and channel in self.connection.channels():
                raise
            if not channel and self.connection.state is ConnectionState.READY:
                raise
            return None

    def _drain_locked(self) -> None:
        if self._unfinished:
            rest, self._unfinished = self._unfinished, None
            self._write_locked(rest)
        while self._posted:
            encoded = self._encode_posted(*self._posted.popleft())
            if encoded is not None:
                self._write_locked(encoded)

    def _write_locked(self, data: bytes | bytearray | memoryview) -> None:
        self._raise_failure()
        try:
            self.stream.write(data, self.timeouts.dead_after_s)
        except VrepError as error:
            # A frame may be half written: nothing may follow it.
            self._failure = str(error)
            raise
        self._sent(len(data))

    def _sent(self, count: int) -> None:
        self.bytes_sent += count
        if count:
            self._spoke_s = self._clock.monotonic()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise ConnectionLostError(f"to {self.name}: {self._failure}")

    # ---- receiving -----------------------------------------------------------

    def receive(self, timeout_s: float) -> Event | None:
        """The next event, or None when the time is over. Raises
        ConnectionLostError at an end without BYE, TimeLimitError when the peer
        stays silent, PeerRefusedError when it ends with ERROR; after a BYE on
        channel 0 was returned nothing more comes."""
        deadline = self._clock.monotonic() + timeout_s
        while True:
            if self._posted or self._unfinished:
                self._flush_posted()
            waiting = bool(self._posted or self._unfinished)
            now = self._clock.monotonic()
            left = max(0.0, deadline - now)
            slice_s = min(left, self.timeouts.ping_after_s / 4, 0.05 if waiting else left)
            count = self.stream.read_into(self.connection.receive_buffer(), slice_s)
            if count is None:
                self._count_silence(self._clock.monotonic() - now)
                if self._clock.monotonic() >= deadline:
                    return None
                continue
            if count == 0 and self._closed:
                raise ConnectionLostError("it was closed on this side")
            if count == 0:
                raise ConnectionLostError(f"{self.name} ended it without a word")
            self._silent_s = 0.0
            self.bytes_received += count
            self._be_heard()
            event = self.connection.bytes_received(count)
            if event is not None and not self._handle(event):
                return event

    def _count_silence(self, waited_s: float) -> None:
        # Only time spent waiting counts: a busy owner is not a silent peer.
        self._silent_s += waited_s
        if self._silent_s >= self.timeouts.dead_after_s:
            raise TimeLimitError(f"{self.name} is silent for {self._silent_s:.0f} s")
        ready = self.connection.state is ConnectionState.READY
        if not ready or self._silent_s < self.timeouts.ping_after_s:
            self._pinged_at_s = 0.0
            return
        if self._silent_s - self._pinged_at_s >= self.timeouts.ping_after_s:
            self._pinged_at_s = self._silent_s
            self.ping()

    def _be_heard(self) -> None:
        """Say something to a peer that sends, and waits for our word on what is not whole yet."""
        ready = self.connection.state is ConnectionState.READY
        quiet_s = self._clock.monotonic() - self._spoke_s
        if ready and quiet_s >= self.timeouts.ping_after_s:
            self._spoke_s += quiet_s  # also when there is no room for it now
            if len(self._ping_sent) < PINGS_WAITING_MAX:
                self.ping()

    def ping(self) -> None:
        """Ask for a sign of life; the answer sets `round_trip_s`."""
        self._ping_id += 1
        self._ping_sent[self._ping_id] = self._clock.monotonic()
        self.post(m.Ping(id=self._ping_id, time_ns=self._clock.time_ns()))

    def _handle(self, event: Event) -> bool:
        """Take care of what the owner need not see."""
        match event.message:
            case m.Ping(id=number, time_ns=sent_ns):
                answer = m.Pong(id=number, ping_time_ns=sent_ns, time_ns=self._clock.time_ns())
                if self.connection.state is ConnectionState.READY:
                    self.post(answer)
                return True
            case m.Pong(id=number):
                sent = self._ping_sent.pop(number, None)
                if sent is not None:
                    self.round_trip_s = self._clock.monotonic() - sent
                return True
            case m.Error(code=code, text=text) if event.channel == 0:
                raise PeerRefusedError(code, text)
        return False

    def expect(self, timeout_s: float) -> Event:
        """The next event; TimeLimitError when none comes in time."""
        event = self.receive(timeout_s)
        if event is None:
            raise TimeLimitError(f"no answer of {self.name} within {timeout_s:g} s")
        return event

    def question(self, method: str, params: Mapping[str, Any]) -> int:
        """Post a question; who receives finds its answer by this number. For any thread."""
        number = next(self._request_ids)
        self.post(m.Request(id=number, method=method, params=dict(params)))
        return number

    def ask(
        self, method: str, params: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> Any:
        """Send a question and wait for its answer: for an owner that has no
        other thread receiving. PeerRefusedError when the answer is an error."""
        number = next(self._request_ids)
        self.send(m.Request(id=number, method=method, params=dict(params or {})))
        limit = self.timeouts.dead_after_s if timeout_s is None else timeout_s
        deadline = self._clock.monotonic() + limit
        while (event := self.receive(max(0.0, deadline - self._clock.monotonic()))) is not None:
            message = event.message
            if isinstance(message, m.Bye) and event.channel == 0:
                raise ConnectionLostError(f"{self.name} said good-bye: {message.reason}")
            if isinstance(message, m.Response) and message.id == number:
                if message.error is not None:
                    raise PeerRefusedError(message.error, message.text)
                return message.result
        raise TimeLimitError(f"no answer of {self.name} to {method!r} within {limit:g} s")

    # ---- beginning and end -----------------------------------------------------

    def greet(self, site_id: str, name: str, software: str, features: Sequence[str] = ()) -> None:
        """HELLO and WELCOME, in this end's role, within `handshake_s`. The
        peer must be the site that its certificate says it is."""
        limit = self.timeouts.handshake_s
        low, high = self.connection.versions
        hello: m.Hello | m.Welcome
        if self.connection.role is Role.CLIENT:
            self.send(
                m.Hello(
                    min_version=low,
                    max_version=high,
                    site_id=site_id,
                    name=name,
                    software=software,
                    features=list(features),
                )
            )
            message = self.expect(limit).message
            if not isinstance(message, m.Welcome):
                raise ProtocolError(f"{type(message).__name__} came in place of WELCOME")
            hello = message
        else:
            try:
                message = self.expect(limit).message
            except VersionError as error:
                self.refuse("version", error.detail)
                raise
            if not isinstance(message, m.Hello):
                raise ProtocolError(f"{type(message).__name__} came in place of HELLO")
            hello = message
        if self.peer is not None and hello.site_id != self.peer.site_id:
            text = f"the certificate is of site {self.peer.site_id}, not of {hello.site_id}"
            self.refuse("identity", text)
            raise ProtocolError(text)
        self.peer_software = hello.software
        self.peer_features = frozenset(hello.features)
        if self.connection.role is Role.SERVER:
            self.send(
                m.Welcome(
                    version=self.connection.offered_version,
                    site_id=site_id,
                    name=name,
                    software=software,
                    features=list(features),
                )
            )

    peer_software: str = ""
    peer_features: frozenset[str] = frozenset()

    def refuse(self, code: str, text: str) -> None:
        """End the connection with an error that the peer can show."""
        try:
            self.send(m.Error(code=code, text=text[:4096]))
            self._linger()
        except (PeerError, StateError):
            # It cannot be told: the connection failed or has ended already.
            return

    def _linger(self) -> None:
        """Read on until the peer closes: a socket that is closed with bytes
        unread is reset, and the peer would lose the words that were for it."""
        scratch = memoryview(bytearray(TLS_RECORD_BYTES))
        deadline = self._clock.monotonic() + LINGER_S
        while (left := deadline - self._clock.monotonic()) > 0:
            if not self.stream.read_into(scratch, left):
                return

    def close(self, reason: str = "") -> None:
        """Say BYE if that goes without waiting, and close the stream."""
        try:
            if self.connection.state is ConnectionState.READY and self._failure is None:
                self._say_bye(reason)
        except (PeerError, StateError):
            # A peer that cannot be told finds the end of the stream instead.
            self._posted.clear()
        finally:
            self._closed = True
            self.stream.close()

    def _say_bye(self, reason: str) -> None:
        # A writer that is at work gets a moment to end its frame.
        if self._send_lock.acquire_within(CLOSE_WAIT_S):
            try:
                self._posted.append((m.Bye(reason=reason), 0))
                self._push_locked()
            finally:
                self._send_lock.release()

    def __enter__(self) -> FrameTransport:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
