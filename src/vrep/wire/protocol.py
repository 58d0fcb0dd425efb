"""The protocol without I/O: what may be said when, by whom, and how much.

A `Connection` is one end of one connection.  Its owner moves bytes: it fills
`receive_buffer()` and tells `bytes_received()` how many came, and it writes to
the peer what `send()` and `send_data()` return, in that order.  Payloads of
DATA are received straight into a buffer that the owner chooses, and are sent
from the owner's buffers; this code never copies or reads them.

Whatever the peer does against the rules raises ProtocolError (VersionError for
a version out of range) before its payload is accepted; the connection is then
of no more use.  Every size is bounded, and so is all memory that a peer can
make this end use: the payload bounds of `frames`, CHANNELS_MAX channels,
REQUESTS_MAX open questions.

Threads: one thread may drive the receiving half while another sends; a lock
inside makes each call atomic.  Whoever sends must write in the order in which
calls returned.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from vrep.errors import ProtocolError, StateError, VersionError
from vrep.wire import messages as m
from vrep.wire.credits import CreditGranter, CreditWindow
from vrep.wire.frames import (
    CHANNEL_MAX,
    HANDSHAKE_BYTES_MAX,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    FrameFlag,
    FrameHeader,
    FrameType,
    decode_header,
    encode_header,
)

__all__ = [
    "CHANNELS_MAX",
    "HELLO_VERSION",
    "PROTOCOL_VERSION_MAX",
    "PROTOCOL_VERSION_MIN",
    "REQUESTS_MAX",
    "ChannelClosedError",
    "Connection",
    "ConnectionState",
    "Event",
    "Role",
]

PROTOCOL_VERSION_MIN: Final = 1
PROTOCOL_VERSION_MAX: Final = 1
HELLO_VERSION: Final = 1
"""stamped on frames before a version is agreed on; never changes"""
CHANNELS_MAX: Final = 1024
REQUESTS_MAX: Final = 256

T = FrameType
Allocate = Callable[[int, int], memoryview | bytearray]


class ChannelClosedError(StateError):
    """The channel is not open."""


class Role(enum.Enum):
    """Who connected. A client opens groups, so a source is always a client."""

    CLIENT = "client"
    SERVER = "server"


class ConnectionState(enum.Enum):
    START = "start"
    """nothing was said"""
    GREETED = "greeted"
    """HELLO was said, WELCOME was not"""
    READY = "ready"
    CLOSING = "closing"
    """this end said BYE or ERROR; what still comes is dropped"""
    CLOSED = "closed"
    """the peer said BYE or ERROR"""


class _ChannelState(enum.Enum):
    OPENING = "opening"
    OPEN = "open"


class Event(NamedTuple):
    """A message that came, and its channel (0: the connection's own)."""

    channel: int
    message: m.Message | m.Data


class _Channel:
    __slots__ = ("acked", "granter", "lanes", "more", "state", "streaming", "window")

    def __init__(self, lanes: frozenset[int]) -> None:
        self.state = _ChannelState.OPENING
        self.lanes = lanes
        self.streaming = False
        self.more = False
        self.acked: dict[int, tuple[int, int]] = {}
        self.window = CreditWindow()
        self.granter: CreditGranter | None = None


# Frames that live on channel 0 only, on a group's channel only; the rest on either.
_CONNECTION_ONLY: Final = frozenset(
    {T.HELLO, T.WELCOME, T.JOIN, T.JOINED, T.PING, T.PONG, T.REQUEST, T.RESPONSE}
)
_CHANNEL_ONLY: Final = frozenset(
    {T.OPEN_GROUP, T.GROUP_OPENED, T.REFUSED, T.STREAM_START, T.DATA, T.ACK}
)
_BY_CLIENT: Final = frozenset({T.HELLO, T.JOIN, T.OPEN_GROUP, T.STREAM_START, T.DATA})
_BY_SERVER: Final = frozenset({T.WELCOME, T.JOINED, T.GROUP_OPENED, T.REFUSED, T.ACK})
# All that may pass before the peer is known.
_STRANGERS: Final = frozenset(
    {T.HELLO, T.WELCOME, T.JOIN, T.JOINED, T.PING, T.PONG, T.ERROR, T.BYE}
)
_ENDS: Final = frozenset({T.BYE, T.ERROR, T.REFUSED})


def _default_allocate(channel: int, length: int) -> memoryview:
    return memoryview(bytearray(length))


class Connection:
    """One end of a connection. `known`: the peer's certificate is a peer's;
    while it is not, only joining is possible."""

    def __init__(
        self,
        role: Role,
        *,
        known: bool = True,
        versions: tuple[int, int] = (PROTOCOL_VERSION_MIN, PROTOCOL_VERSION_MAX),
        allocate: Allocate | None = None,
    ) -> None:
        self.role = role
        self.known = known
        self.state = ConnectionState.START
        self.version: int | None = None
        """agreed on, or None before WELCOME"""
        self._versions = versions
        self._allocate: Allocate = allocate or _default_allocate
        self._lock = threading.RLock()
        self._channels: dict[int, _Channel] = {}
        self._last_channel = 0
        self._sent_frames = 0
        self._received_frames = 0
        self._asked: set[int] = set()
        self._to_answer: set[int] = set()
        self._pings: dict[int, None] = {}
        self._offered: int | None = None
        # Receiving: the header buffer is reused, payloads get their own.
        self._header_buffer = memoryview(bytearray(HEADER_BYTES))
        self._header: FrameHeader | None = None
        self._dropping = False
        self._target = self._header_buffer
        self._filled = 0

    # ---- what an owner may ask ---------------------------------------------

    @property
    def versions(self) -> tuple[int, int]:
        """The lowest and highest protocol version that this end speaks."""
        return self._versions

    def channels(self) -> list[int]:
        """Numbers of the channels that are opening or open."""
        with self._lock:
            return list(self._channels)

    def credit(self, channel: int) -> int:
        """Bytes of DATA that may be sent on a channel now."""
        with self._lock:
            return self._channel(channel).window.available

    def held(self, channel: int) -> int:
        """Bytes of DATA received on a channel and not released."""
        with self._lock:
            return self._granter(channel).held

    def release(self, channel: int, count: int) -> bool:
        """The memory of `count` received bytes is free again. True when it is
        worth telling the peer (a quarter of the window)."""
        with self._lock:
            granter = self._granter(channel)
            granter.release(count)
            return granter.due

    def ack(
        self,
        channel: int,
        received_seq: int,
        durable_seq: int,
        *,
        lane: int = 0,
        conditions: Sequence[str] = (),
        points: m.MaybePoints = m.UNSET,
    ) -> m.Ack:
        """An Ack for `send`, granting all credits that are free."""
        with self._lock:
            return m.Ack(
                lane=lane,
                received_seq=received_seq,
                durable_seq=durable_seq,
                credit_bytes=self._granter(channel).grantable,
                conditions=list(conditions),
                points=points,
            )

    def next_channel(self) -> int:
        """The number of the next group that a client opens. Never used twice."""
        with self._lock:
            return self._last_channel + 1

    def _channel(self, channel: int) -> _Channel:
        found = self._channels.get(channel)
        if found is None:
            raise ChannelClosedError(f"channel {channel}")
        return found

    def _granter(self, channel: int) -> CreditGranter:
        granter = self._channel(channel).granter
        if granter is None:
            raise ChannelClosedError(f"channel {channel} was granted no credits")
        return granter

    # ---- sending -------------------------------------------------------------

    def _stamp(self, kind: FrameType, channel: int, length: int, flags: int = 0) -> bytes:
        version = HELLO_VERSION
        if self.version is not None and kind is not T.WELCOME:
            version = self.version
        header = encode_header(
            FrameHeader(version, kind, flags, length, channel, self._sent_frames)
        )
        self._sent_frames += 1
        return header

    def send(self, message: m.Message, channel: int = 0) -> bytes:
        """The frame of a message, header and payload. StateError when this end
        may not say it now; ChannelClosedError when the channel has ended."""
        kind = m.frame_type(message)
        payload = m.encode_message(message)
        with self._lock:
            self._check_send(kind, channel)
            self._apply_sent(kind, message, channel)
            # WELCOME carries the version; it is in force for what follows it.
            return self._stamp(kind, channel, len(payload)) + payload

    def send_data(
        self, channel: int, buffers: Sequence[bytes | bytearray | memoryview], *, more: bool = False
    ) -> bytes:
        """Account for records that are about to be sent and return the header
        to write in front of them. The buffers are the owner's to write."""
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        if not 0 < length <= PAYLOAD_BYTES_MAX:
            raise ProtocolError(f"a DATA frame has 1 to {PAYLOAD_BYTES_MAX} bytes, not {length}")
        with self._lock:
            self._check_send(T.DATA, channel)
            state = self._channel(channel)
            if not state.streaming:
                raise StateError(f"no stream was started on channel {channel}")
            state.window.consume(length)
            state.more = more
            return self._stamp(T.DATA, channel, length, int(FrameFlag.MORE) if more else 0)

    def _check_send(self, kind: FrameType, channel: int) -> None:
        if kind in (_BY_SERVER if self.role is Role.CLIENT else _BY_CLIENT):
            raise StateError(f"a {self.role.value} does not send {kind.name}")
        if not 0 <= channel <= CHANNEL_MAX:
            raise StateError(f"{channel} is no channel")
        if kind in (_CONNECTION_ONLY if channel else _CHANNEL_ONLY):
            raise StateError(f"{kind.name} does not belong on channel {channel}")
        allowed: frozenset[FrameType] | None = None
        if self.state is ConnectionState.START:
            allowed = frozenset({T.HELLO, T.ERROR})
        elif self.state is ConnectionState.GREETED:
            allowed = frozenset({T.WELCOME, T.ERROR})
        elif self.state is not ConnectionState.READY:
            raise StateError(f"the connection is {self.state.value}: {kind.name} cannot be sent")
        elif kind in (T.HELLO, T.WELCOME):
            raise StateError(f"{kind.name} was said already")
        elif not self.known:
            allowed = _STRANGERS
        if allowed is not None and kind not in allowed:
            raise StateError(f"{kind.name} cannot be sent: the connection is {self.state.value}")
        if channel and kind is not T.OPEN_GROUP:
            state = self._channel(channel)
            opening = state.state is _ChannelState.OPENING
            if opening and kind not in _ENDS and kind is not T.GROUP_OPENED:
                raise StateError(f"channel {channel} is not open yet: {kind.name} cannot be sent")
            if not opening and kind is T.GROUP_OPENED:
                raise StateError(f"channel {channel} is open already")
            if state.more and kind is T.STREAM_START:
                raise StateError(f"channel {channel} is in the middle of a record")

    def _apply_sent(self, kind: FrameType, message: m.Message, channel: int) -> None:
        match message:
            case m.Hello():
                self._versions = (message.min_version, message.max_version)
                self.state = ConnectionState.GREETED
            case m.Welcome():
                if message.version != self._offered:
                    raise StateError(
                        f"version {self._offered} was agreed on, not {message.version}"
                    )
                self.version = message.version
                self.state = ConnectionState.READY
            case m.OpenGroup():
                if channel <= self._last_channel:
                    raise StateError(f"channel {channel} was used before")
                if len(self._channels) >= CHANNELS_MAX:
                    raise StateError(f"a connection has at most {CHANNELS_MAX} channels")
                self._last_channel = channel
                self._channels[channel] = _Channel(frozenset(lane.lane for lane in message.lanes))
            case m.GroupOpened():
                state = self._channel(channel)
                if sorted(lane.durable.lane for lane in message.lanes) != sorted(state.lanes):
                    raise StateError(f"channel {channel} has other lanes than those answered")
                state.granter = CreditGranter(max(1, message.credit_bytes))
                state.state = _ChannelState.OPEN
            case m.StreamStart():
                if message.lane not in self._channel(channel).lanes:
                    raise StateError(f"channel {channel} has no lane {message.lane}")
                self._channel(channel).streaming = True
            case m.Ack():
                self._check_ack(self._channel(channel), message, StateError)
                self._granter(channel).tell(message.credit_bytes)
            case m.Ping():
                if len(self._pings) >= REQUESTS_MAX:
                    raise StateError("too many pings were not answered")
                self._pings[message.id] = None
            case m.Request():
                if message.id in self._asked or len(self._asked) >= REQUESTS_MAX:
                    raise StateError(f"request {message.id} is open, or too many are")
                self._asked.add(message.id)
            case m.Response():
                if message.id not in self._to_answer:
                    raise StateError(f"request {message.id} is not waiting for an answer")
                self._to_answer.discard(message.id)
            case _ if kind in _ENDS:
                if channel:
                    del self._channels[channel]
                else:
                    self.state = ConnectionState.CLOSING

    @staticmethod
    def _check_ack(
        state: _Channel, ack: m.Ack, error: type[ProtocolError] | type[StateError]
    ) -> None:
        received, durable = state.acked.get(ack.lane, (0, 0))
        if ack.lane not in state.lanes:
            raise error(f"an acknowledgement of lane {ack.lane}, which the channel does not have")
        if ack.durable_seq > ack.received_seq:
            raise error(f"durable {ack.durable_seq} is above received {ack.received_seq}")
        if ack.received_seq < received or ack.durable_seq < durable:
            raise error(
                f"an acknowledgement went back from {received}/{durable} "
                f"to {ack.received_seq}/{ack.durable_seq}"
            )
        state.acked[ack.lane] = (ack.received_seq, ack.durable_seq)

    # ---- receiving -----------------------------------------------------------

    def receive_buffer(self) -> memoryview:
        """Where the next received bytes go: never empty, and no more than is
        left of the header or payload that is awaited."""
        return self._target[self._filled :]

    @property
    def receiving(self) -> bool:
        """Whether a frame has begun and is not whole."""
        return self._header is not None or self._filled > 0

    def bytes_received(self, count: int) -> Event | None:
        """`count` bytes were put into `receive_buffer()`. An Event when they
        completed a frame that the owner must see."""
        if not 0 < count <= len(self._target) - self._filled:
            raise ValueError(f"{count} bytes do not fit into the receive buffer")
        self._filled += count
        if self._filled < len(self._target):
            return None
        if self._header is None:
            header = decode_header(self._header_buffer)
            with self._lock:
                self._dropping = not self._admit(header)
            self._received_frames += 1
            self._header = header
            self._filled = 0
            if header.length:
                self._target = self._payload_buffer(header)
                return None
        return self._complete()

    def _payload_buffer(self, header: FrameHeader) -> memoryview:
        if header.type is T.DATA and not self._dropping:
            buffer = memoryview(self._allocate(header.channel, header.length)).cast("B")
            if buffer.nbytes < header.length or buffer.readonly:
                raise ValueError(f"the owner's buffer is not {header.length} writable bytes")
            return buffer[: header.length]
        return memoryview(bytearray(header.length))

    def _complete(self) -> Event | None:
        header, payload = self._header, self._target
        assert header is not None
        self._header, self._target, self._filled = None, self._header_buffer, 0
        if self._dropping:
            return None
        if header.type is T.DATA:
            if header.channel not in self._channels:
                return None  # ended by this end while the payload was on its way
            more = bool(header.flags & FrameFlag.MORE)
            return Event(header.channel, m.Data(payload, more))
        message = m.decode_message(header.type, payload if header.length else b"")
        with self._lock:
            self._apply_received(header.type, message, header.channel)
        return Event(header.channel, message)

    def feed(self, data: bytes | bytearray | memoryview) -> list[Event]:
        """Receive bytes that are at hand already: for simulators and tests."""
        events: list[Event] = []
        rest = memoryview(data)
        while rest:
            buffer = self.receive_buffer()
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            rest = rest[count:]
            event = self.bytes_received(count)
            if event is not None:
                events.append(event)
        return events

    def _admit(self, header: FrameHeader) -> bool:
        """Judge a header by the state, before its payload is accepted. False:
        the payload is to be dropped, it was sent before the peer knew the end."""
        kind, channel = header.type, header.channel
        greeting = kind in (T.HELLO, T.WELCOME)
        expected = HELLO_VERSION if greeting or self.version is None else self.version
        if header.version != expected:
            raise VersionError(f"a {kind.name} frame has version {header.version}, not {expected}")
        if header.sequence != self._received_frames:
            raise ProtocolError(
                f"frame {header.sequence} came where {self._received_frames} was due"
            )
        if kind in (_BY_CLIENT if self.role is Role.CLIENT else _BY_SERVER):
            raise ProtocolError(f"the peer of a {self.role.value} does not send {kind.name}")
        if kind in (_CONNECTION_ONLY if channel else _CHANNEL_ONLY):
            raise ProtocolError(f"{kind.name} does not belong on channel {channel}")
        if kind is T.DATA and not header.length:
            raise ProtocolError("an empty DATA frame")
        if self.state is ConnectionState.CLOSED:
            raise ProtocolError(f"{kind.name} after the end of the connection")
        if self.state is ConnectionState.CLOSING:
            return kind in (T.BYE, T.ERROR) and not channel
        allowed: frozenset[FrameType] | None = None
        if self.state is ConnectionState.START:
            allowed = frozenset({T.HELLO} if self.role is Role.SERVER else ())
        elif self.state is ConnectionState.GREETED:
            allowed = frozenset({T.WELCOME, T.ERROR} if self.role is Role.CLIENT else ())
        elif greeting:
            raise ProtocolError(f"{kind.name} was said already")
        elif not self.known:
            allowed = _STRANGERS
        if allowed is not None and kind not in allowed:
            known = "" if self.known else " by a peer that is not known"
            raise ProtocolError(f"{kind.name}{known} while the connection is {self.state.value}")
        if (self.version is None or not self.known) and header.length > HANDSHAKE_BYTES_MAX:
            raise ProtocolError(f"{header.length} bytes by a peer that is not known yet")
        return self._admit_on_channel(header) if channel else True

    def _admit_on_channel(self, header: FrameHeader) -> bool:
        kind, channel = header.type, header.channel
        state = self._channels.get(channel)
        if kind is T.OPEN_GROUP:
            if channel <= self._last_channel:
                raise ProtocolError(f"channel {channel} was used before")
            if len(self._channels) >= CHANNELS_MAX:
                raise ProtocolError(f"a connection has at most {CHANNELS_MAX} channels")
            return True
        if state is None:
            if channel > self._last_channel:
                raise ProtocolError(f"{kind.name} on channel {channel}, which was never opened")
            return False
        opening = state.state is _ChannelState.OPENING
        if opening and kind not in _ENDS and kind is not T.GROUP_OPENED:
            raise ProtocolError(f"{kind.name} on channel {channel}, which is not open yet")
        if not opening and kind is T.GROUP_OPENED:
            raise ProtocolError(f"channel {channel} is open already")
        if kind is T.DATA:
            if not state.streaming or state.granter is None:
                raise ProtocolError(f"DATA on channel {channel} without a stream")
            state.granter.receive(header.length)
            state.more = bool(header.flags & FrameFlag.MORE)
        elif kind is T.STREAM_START and state.more:
            raise ProtocolError(f"STREAM_START on channel {channel} inside a record")
        return True

    def _apply_received(self, kind: FrameType, message: m.Message, channel: int) -> None:
        match message:
            case m.Hello():
                self._agree(message)
            case m.Welcome():
                low, high = self._versions
                if not low <= message.version <= high:
                    raise VersionError(
                        f"the peer {message.name!r} chose protocol version {message.version}; "
                        f"this release speaks {low} to {high}"
                    )
                self.version = message.version
                self.state = ConnectionState.READY
            case m.OpenGroup():
                lanes = [lane.lane for lane in message.lanes]
                if len(set(lanes)) != len(lanes):
                    raise ProtocolError("a group is offered with a lane twice")
                indexes = [disk.index for disk in message.disks]
                names = {disk.name for disk in message.disks}
                if len(set(indexes)) != len(indexes) or len(names) != len(indexes):
                    raise ProtocolError("a group is offered with a disk twice")
                self._last_channel = channel
                self._channels[channel] = _Channel(frozenset(lanes))
            case m.GroupOpened():
                state = self._channels.get(channel)
                if state is None:  # ended by this end while the answer was on its way
                    return
                if sorted(lane.durable.lane for lane in message.lanes) != sorted(state.lanes):
                    raise ProtocolError("a group was opened with other lanes than offered")
                state.window.grant(message.credit_bytes)
                state.state = _ChannelState.OPEN
            case m.StreamStart():
                if (state := self._channels.get(channel)) is not None:
                    if message.lane not in state.lanes:
                        raise ProtocolError(f"channel {channel} has no lane {message.lane}")
                    state.streaming = True
            case m.Ack():
                if (state := self._channels.get(channel)) is not None:
                    self._check_ack(state, message, ProtocolError)
                    state.window.grant(message.credit_bytes)
            case m.Pong():
                if message.id not in self._pings:
                    raise ProtocolError(f"an answer to ping {message.id}, which was not asked")
                del self._pings[message.id]
            case m.Request():
                if message.id in self._to_answer or len(self._to_answer) >= REQUESTS_MAX:
                    raise ProtocolError(f"request {message.id} is open, or too many are")
                self._to_answer.add(message.id)
            case m.Response():
                if message.id not in self._asked:
                    raise ProtocolError(f"an answer to request {message.id}, which was not asked")
                self._asked.discard(message.id)
            case m.Error() if self.version is None and message.code == "version":
                self.state = ConnectionState.CLOSED
                raise VersionError(f"the peer says: {message.text}")
            case _ if kind in _ENDS:
                if channel:
                    self._channels.pop(channel, None)
                else:
                    self.state = ConnectionState.CLOSED

    def _agree(self, hello: m.Hello) -> None:
        low, high = self._versions
        if hello.min_version > hello.max_version:
            raise ProtocolError(f"versions {hello.min_version} to {hello.max_version} are no range")
        agreed = min(high, hello.max_version)
        if agreed < max(low, hello.min_version):
            release = "an older" if hello.max_version < low else "a newer"
            raise VersionError(
                f"the peer {hello.name!r} runs {release} release "
                f"({hello.software or 'unnamed'}) that speaks protocol versions "
                f"{hello.min_version} to {hello.max_version}; this one speaks {low} to {high}"
            )
        self._offered = agreed
        self.state = ConnectionState.GREETED

    @property
    def offered_version(self) -> int:
        """The version that a server must answer HELLO with."""
        if self._offered is None:
            raise StateError("no HELLO was received")
        return self._offered
