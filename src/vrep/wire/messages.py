"""The messages of the protocol, as MessagePack maps with bounded fields.

Decoding is strict about types, lengths and ranges; fields that this release
does not know are skipped, so the next release may add some with a default.
Sequence numbers, epochs and positions mean what design and journal mean by
them: seq 0 is "nothing yet".  Sizes are bytes, times nanoseconds since 1970.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from vrep.errors import ProtocolError
from vrep.wire.frames import FrameType

__all__ = [
    "FEATURES",
    "FEATURE_COMPARE",
    "FEATURE_HASHES",
    "HASHES_METHOD",
    "HASH_ANSWER_BYTES",
    "HASH_VERSION",
    "TIME_MAX",
    "UNSET",
    "Ack",
    "Bye",
    "Data",
    "DiskInfo",
    "EpochInfo",
    "Error",
    "GroupOpened",
    "HashAnswer",
    "HashQuestion",
    "HashRange",
    "HashRecord",
    "HashRun",
    "HashStream",
    "Hello",
    "Join",
    "Joined",
    "LaneOffer",
    "LaneState",
    "LostRange",
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
    "decode_hash_answer",
    "decode_hash_question",
    "decode_message",
    "encode_message",
    "frame_type",
    "plain_part",
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


class LostRange(_Part, frozen=True, kw_only=True):
    """A part of a disk of which the target lost records."""

    disk: Annotated[int, Meta(ge=0, le=63)]
    offset: Bytes
    length: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]


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
    compare: bool | UnsetType = UNSET
    """the target lost records that it had acknowledged, though not the last: everything is to be
    compared; said to a source with FEATURE_COMPARE alone, to others nothing"""
    lost: Annotated[list[LostRange], Meta(max_length=1024)] | UnsetType = UNSET
    """with `compare`: nothing else than this need be compared; an earlier release does not say, and
    compares everything when it is told"""
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


FEATURE_HASHES: Final = "hashes"
"""a server that says so in WELCOME answers questions about the hashes of what it holds"""
FEATURE_COMPARE: Final = "compare"
"""a client that says so in HELLO compares everything when GROUP_OPENED asks for it"""
FEATURES: Final = (FEATURE_HASHES, FEATURE_COMPARE)
"""of this release"""
HASHES_METHOD: Final = "group.hashes"
"""a Request whose params are a HashQuestion, and its result a HashAnswer"""
HASH_VERSION: Final = 1
LANES_ADMIT: Final = "lanes.admit"
"""requests between the sites that have lanes of one group: see docs/internals/wire.md"""
LANES_LEAVE: Final = "lanes.leave"
LANES_LOOK: Final = "lanes.look"
LANES_HOLD: Final = "lanes.hold"
LANES_RELEASE: Final = "lanes.release"
HASH_ANSWER_BYTES: Final = 4 << 20
"""of pieces in one answer, about: a range that would go past it is left for the next question"""
_HASH_ROWS: Final = 1 << 17


class HashRange(_Part, frozen=True, kw_only=True):
    """A part of a disk, in whole 4 KiB blocks but for the disk's end."""

    disk: Annotated[int, Meta(ge=0, le=63)]
    offset: Bytes
    length: Annotated[int, Meta(ge=1, le=64 << 20)]


class HashQuestion(_Part, frozen=True, kw_only=True):
    """What hashes does the target hold of these ranges, at its durable position?"""

    version: Annotated[int, Meta(ge=1, le=255)] = HASH_VERSION
    group_id: Id16
    at_least: Seq
    """it looks when it is durable up to here, in the epoch of the channel that asks"""
    ranges: Annotated[list[HashRange], Meta(min_length=1, max_length=64)]


class HashStream(_Part, frozen=True, kw_only=True):
    """A stream that sealed records, and under which data key."""

    id: Id16
    key_generation: Annotated[int, Meta(ge=1, le=0xFFFF_FFFF)]


class HashRecord(_Part, frozen=True, kw_only=True):
    """A record's header and hash piece, as they are stored."""

    header: Annotated[bytes, Meta(min_length=64, max_length=64)]
    stream: Annotated[int, Meta(ge=0, le=_HASH_ROWS)]
    """of the answer's"""
    word: Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
    """the piece word"""
    piece: Annotated[bytes, Meta(min_length=32, max_length=(128 << 10) + 16)]


class HashRun(_Part, frozen=True, array_like=True):
    """Whole 4 KiB blocks of a range of which a record is the newest."""

    range: Annotated[int, Meta(ge=0, le=63)]
    offset: Bytes
    """of the disk"""
    length: Annotated[int, Meta(ge=4096, le=64 << 20)]
    record: Annotated[int, Meta(ge=0, le=_HASH_ROWS)]
    """of the answer's"""


class HashAnswer(_Part, frozen=True, kw_only=True):
    """What the target holds of the first `answered` ranges. What no run covers has no hash."""

    version: Annotated[int, Meta(ge=1, le=255)] = HASH_VERSION
    position: Position
    """where it looked: durable, and at or past what was wanted"""
    answered: Annotated[int, Meta(ge=1, le=64)]
    streams: Annotated[list[HashStream], Meta(max_length=_HASH_ROWS)]
    records: Annotated[list[HashRecord], Meta(max_length=_HASH_ROWS)]
    runs: Annotated[list[HashRun], Meta(max_length=_HASH_ROWS)]


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


def plain_part(part: HashQuestion | HashAnswer) -> dict[str, Any]:
    """A part as it stands in the params of a Request or the result of a Response."""
    plain = msgspec.to_builtins(part, builtin_types=(bytes,))
    assert isinstance(plain, dict)
    return plain


def decode_hash_question(params: Any) -> HashQuestion:
    """The question in a Request; ProtocolError for anything that is not one."""
    return _part(params, HashQuestion)


def decode_hash_answer(result: Any) -> HashAnswer:
    """The answer in a Response; ProtocolError for anything that is not one."""
    return _part(result, HashAnswer)


_P = TypeVar("_P", HashQuestion, HashAnswer)


def _part(plain: Any, kind: type[_P]) -> _P:
    try:
        part = msgspec.convert(plain, kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ProtocolError(f"a {kind.__name__} is malformed: {error}") from None
    if part.version != HASH_VERSION:
        raise ProtocolError(f"a {kind.__name__} of version {part.version}")
    return part


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
