"""The messages of the protocol, as MessagePack maps with bounded fields.

Decoding is strict about types, lengths and ranges; fields that this release
does not know are skipped, so the next release may add some with a default.
Sequence numbers, epochs and positions mean what design and journal mean by
them: seq 0 is "nothing yet".  Sizes are bytes, times nanoseconds since 1970.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from vrep.errors import ProtocolError
from vrep.wire.frames import FrameType

__all__ = [
    "TIME_MAX",
    "UNSET",
    "Ack",
    "Bye",
    "Data",
    "DiskInfo",
    "EpochInfo",
    "Error",
    "GroupOpened",
    "Hello",
    "Join",
    "Joined",
    "LaneOffer",
    "LaneState",
    "MaybePoints",
    "Message",
    "OpenGroup",
    "Ping",
    "Point",
    "Points",
    "Pong",
    "Position",
    "Refused",
    "Request",
    "Response",
    "Status",
    "StreamStart",
    "Welcome",
    "decode_message",
    "encode_message",
    "frame_type",
]

_U63 = (1 << 63) - 1
TIME_MAX: Final = _U63
Seq = Annotated[int, Meta(ge=0, le=_U63)]
Bytes = Annotated[int, Meta(ge=0, le=_U63)]
Time = Annotated[int, Meta(ge=0, le=_U63)]
Epoch = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
Lane = Annotated[int, Meta(ge=0, le=0xFFFF)]
Id16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
SiteId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]
Version = Annotated[int, Meta(ge=1, le=255)]
Name = Annotated[str, Meta(min_length=1, max_length=63)]
Code = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
Text = Annotated[str, Meta(max_length=4096)]
Features = Annotated[list[Code], Meta(max_length=64)]
Conditions = Annotated[list[Code], Meta(max_length=64)]


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message."""


class _Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message: one frame's payload."""


class Position(_Part, frozen=True, kw_only=True):
    """A place in a group's history."""

    epoch: Epoch
    lane: Lane = 0
    seq: Seq


class Point(_Part, frozen=True, kw_only=True):
    """A recovery point, and its time at the source; 0 when the target does not know it."""

    position: Position
    time_ns: Time = 0


class Points(_Part, frozen=True, kw_only=True):
    """From where to where a target can recover; gaps may lie between."""

    oldest: Point
    newest: Point


MaybePoints = Points | UnsetType
"""left out while there is no point, and by a target that does not tell"""


class EpochInfo(_Part, frozen=True, kw_only=True):
    """A writer's reign: counter, random id, and where it left its parent."""

    counter: Epoch
    id: Id16
    parent: Position | None = None
    parent_id: Id16 | None = None


class DiskInfo(_Part, frozen=True, kw_only=True):
    index: Annotated[int, Meta(ge=0, le=63)]
    name: Name
    size: Bytes


class LaneOffer(_Part, frozen=True, kw_only=True):
    """What the source knows and still has of one lane."""

    lane: Lane = 0
    durable_seq: Seq
    """the last durable acknowledgement that the source saw"""
    oldest_seq: Seq
    """the oldest record that the source can still send"""
    newest_seq: Seq
    """the newest record that the source has"""


class LaneState(_Part, frozen=True, kw_only=True):
    """What the target holds of one lane."""

    durable: Position
    received: Position
    points: MaybePoints = UNSET


class Hello(_Message, frozen=True, kw_only=True):
    """First frame of a client: what it speaks and who it is."""

    min_version: Version
    max_version: Version
    site_id: SiteId
    name: Name
    software: Annotated[str, Meta(max_length=64)] = ""
    features: Features = []


class Welcome(_Message, frozen=True, kw_only=True):
    """First frame of a server: the version both speak from here on."""

    version: Version
    site_id: SiteId
    name: Name
    software: Annotated[str, Meta(max_length=64)] = ""
    features: Features = []


class Join(_Message, frozen=True, kw_only=True):
    """A site that holds an invitation asks to become a peer."""

    secret: Id16
    site_id: SiteId
    name: Name
    certificate: Annotated[str, Meta(min_length=1, max_length=8192)]
    address: Annotated[str, Meta(max_length=270)] = ""

    def __repr__(self) -> str:  # the secret stays out of logs
        return f"Join(site_id={self.site_id!r}, name={self.name!r})"


class Joined(_Message, frozen=True, kw_only=True):
    """The inviting site took the peer in."""

    site_id: SiteId
    name: Name
    address: Annotated[str, Meta(max_length=270)] = ""


class OpenGroup(_Message, frozen=True, kw_only=True):
    """A source offers a group on a channel that it numbers."""

    group_id: Id16
    name: Name
    epoch: EpochInfo
    disks: Annotated[list[DiskInfo], Meta(min_length=1, max_length=64)]
    lanes: Annotated[list[LaneOffer], Meta(min_length=1, max_length=256)]
    wrapped_keys: Annotated[
        list[Annotated[bytes, Meta(min_length=1, max_length=512)]], Meta(max_length=256)
    ]
    window: Annotated[str, Meta(max_length=32)] = ""
    quota: Bytes = 0


class GroupOpened(_Message, frozen=True, kw_only=True):
    """The target accepts, says what it holds, and grants the first credits."""

    epoch: EpochInfo
    lanes: Annotated[list[LaneState], Meta(min_length=1, max_length=256)]
    credit_bytes: Bytes
    empty: bool
    """whether the target holds no history of the group at all"""
    conditions: Conditions = []


RefusalCode = Literal[
    "fenced",
    "unknown",
    "size-mismatch",
    "busy",
    "version",
    "not-allowed",
    "full",
    "damaged",
    "invalid",
]


class Refused(_Message, frozen=True, kw_only=True):
    """A channel is refused, or closed later (fenced), and why."""

    code: RefusalCode
    text: Text
    epoch: EpochInfo | None = None
    """the epoch that the target accepts"""


class StreamStart(_Message, frozen=True, kw_only=True):
    """Records that follow on this lane are sealed under a new stream."""

    stream_id: Id16
    key_generation: Annotated[int, Meta(ge=1, le=0xFFFF_FFFF)]
    lane: Lane = 0
    resume_seq: Seq
    """the next record has seq resume_seq + 1, or is a jump"""


class Ack(_Message, frozen=True, kw_only=True):
    """How far the target received and synced a lane; new credits."""

    lane: Lane = 0
    received_seq: Seq
    durable_seq: Seq
    credit_bytes: Bytes
    """cumulative bytes of DATA granted on this channel"""
    conditions: Conditions = []
    points: MaybePoints = UNSET


class Status(_Message, frozen=True, kw_only=True):
    """How a channel does, for the other side's status."""

    time_ns: Time
    state: Code
    conditions: Conditions = []
    values: Annotated[dict[Code, Annotated[int, Meta(ge=-_U63, le=_U63)]], Meta(max_length=64)] = {}


class Ping(_Message, frozen=True, kw_only=True):
    id: Seq
    time_ns: Time


class Pong(_Message, frozen=True, kw_only=True):
    """Answers a ping with its id and its time, and adds the answerer's time."""

    id: Seq
    ping_time_ns: Time
    time_ns: Time


class Error(_Message, frozen=True, kw_only=True):
    """On channel 0 the end of the connection, else of that channel."""

    code: Code
    text: Text


class Bye(_Message, frozen=True, kw_only=True):
    """A clean end: of the connection on channel 0, else of that channel."""

    reason: Text = ""


class Request(_Message, frozen=True, kw_only=True):
    """A question outside the flow of records."""

    id: Seq
    method: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9._-]{0,63}$")]
    params: dict[str, Any] = {}


class Response(_Message, frozen=True, kw_only=True):
    """The answer to the request with the same id: a result, or an error code."""

    id: Seq
    result: Any = None
    error: Code | None = None
    text: Text = ""


class Data(msgspec.Struct, frozen=True):
    """Concatenated sealed records, as they were sealed and as they are stored.
    Not MessagePack: the payload is the bytes themselves."""

    payload: memoryview
    more: bool = False
    """the last record goes on in the channel's next Data"""

    def __repr__(self) -> str:
        return f"Data({len(self.payload)} bytes, more={self.more})"


Message = (
    Hello
    | Welcome
    | Join
    | Joined
    | OpenGroup
    | GroupOpened
    | Refused
    | StreamStart
    | Ack
    | Status
    | Ping
    | Pong
    | Error
    | Bye
    | Request
    | Response
)

_CLASSES: Final[dict[FrameType, type[_Message]]] = {
    FrameType.HELLO: Hello,
    FrameType.WELCOME: Welcome,
    FrameType.JOIN: Join,
    FrameType.JOINED: Joined,
    FrameType.OPEN_GROUP: OpenGroup,
    FrameType.GROUP_OPENED: GroupOpened,
    FrameType.REFUSED: Refused,
    FrameType.STREAM_START: StreamStart,
    FrameType.ACK: Ack,
    FrameType.STATUS: Status,
    FrameType.PING: Ping,
    FrameType.PONG: Pong,
    FrameType.ERROR: Error,
    FrameType.BYE: Bye,
    FrameType.REQUEST: Request,
    FrameType.RESPONSE: Response,
}
_TYPES: Final[dict[type, FrameType]] = {cls: kind for kind, cls in _CLASSES.items()}
_DECODERS: Final = {kind: msgspec.msgpack.Decoder(cls) for kind, cls in _CLASSES.items()}
_ENCODER: Final = msgspec.msgpack.Encoder()


def frame_type(message: Message) -> FrameType:
    return _TYPES[type(message)]


def encode_message(message: Message) -> bytes:
    """The payload of a message. A field out of its bounds is refused here, at
    the sender, and not only by the peer."""
    kind = frame_type(message)
    try:
        payload = _ENCODER.encode(message)
        _DECODERS[kind].decode(payload)
    except (msgspec.MsgspecError, TypeError, OverflowError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"cannot send this {kind.name}: {error}") from None
    return payload


def decode_message(kind: FrameType, payload: bytes | bytearray | memoryview) -> Message:
    """The message of a payload; ProtocolError for anything that is not one."""
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise ProtocolError(f"a {kind.name} frame holds no message")
    try:
        message = decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError, OverflowError) as error:
        raise ProtocolError(f"a {kind.name} message is malformed: {error}") from None
    return message  # type: ignore[return-value]
