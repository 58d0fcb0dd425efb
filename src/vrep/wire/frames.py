"""Frames: the fixed header in front of every message on a connection.

32 little-endian bytes, then `length` bytes of payload (at most 8 MiB).  The
header carries its own checksum and is judged whole before a byte of the
payload is accepted.  Pure functions over bytes; safe from any thread.
docs/internals/wire.md explains each byte, tests/golden/wire pins them.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

import xxhash

from vrep.errors import ProtocolError

__all__ = [
    "CONTROL_BYTES_MAX",
    "HANDSHAKE_BYTES_MAX",
    "HEADER_BYTES",
    "MAGIC",
    "PAYLOAD_BYTES_MAX",
    "FrameFlag",
    "FrameHeader",
    "FrameType",
    "decode_header",
    "encode_header",
]

MAGIC: Final = 0x46575256  # the bytes "VRWF"
HEADER_BYTES: Final = 32
PAYLOAD_BYTES_MAX: Final = 8 << 20
"""of DATA and RESPONSE"""
CONTROL_BYTES_MAX: Final = 1 << 20
"""of every other frame"""
HANDSHAKE_BYTES_MAX: Final = 64 << 10
"""of frames that a peer may send before it is known"""
CHANNEL_MAX: Final = 0xFFFF_FFFF

_FIELDS: Final = struct.Struct("<IBBHIIQ")
_CHECKSUM: Final = struct.Struct("<Q")
_CHECKED_BYTES: Final = _FIELDS.size
assert _CHECKED_BYTES + _CHECKSUM.size == HEADER_BYTES


class FrameType(enum.IntEnum):
    """What a frame's payload is. Numbers are never given out twice."""

    HELLO = 1
    WELCOME = 2
    JOIN = 3
    JOINED = 4
    OPEN_GROUP = 5
    GROUP_OPENED = 6
    REFUSED = 7
    STREAM_START = 8
    DATA = 9
    ACK = 10
    STATUS = 11
    PING = 12
    PONG = 13
    ERROR = 14
    BYE = 15
    REQUEST = 16
    RESPONSE = 17


class FrameFlag(enum.IntFlag):
    """Flags of a frame; a bit that this release does not know is refused."""

    MORE = 0x0001
    """DATA only: the last record goes on in the channel's next DATA frame"""


_KNOWN_FLAGS: Final = {FrameType.DATA: int(FrameFlag.MORE)}
_LENGTH_MAX: Final = {
    kind: (PAYLOAD_BYTES_MAX if kind in (FrameType.DATA, FrameType.RESPONSE) else CONTROL_BYTES_MAX)
    for kind in FrameType
} | dict.fromkeys(
    (FrameType.HELLO, FrameType.WELCOME, FrameType.JOIN, FrameType.JOINED), HANDSHAKE_BYTES_MAX
)
_TYPES: Final = {int(kind): kind for kind in FrameType}


class FrameHeader(NamedTuple):
    """A header that was judged: every field is in its bounds."""

    version: int
    type: FrameType
    flags: int
    length: int
    channel: int
    sequence: int


def encode_header(header: FrameHeader) -> bytes:
    """The 32 bytes of a header."""
    if header.length > _LENGTH_MAX[header.type]:
        raise ProtocolError(f"a {header.type.name} frame of {header.length} bytes is too long")
    fields = _FIELDS.pack(
        MAGIC,
        header.version,
        header.type,
        header.flags,
        header.length,
        header.channel,
        header.sequence,
    )
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields))


def decode_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """Judge 32 received bytes: magic, checksum, type, flags, bounds."""
    if len(data) != HEADER_BYTES:
        raise ProtocolError(f"a frame header has {HEADER_BYTES} bytes, not {len(data)}")
    view = memoryview(data)
    magic, version, number, flags, length, channel, sequence = _FIELDS.unpack_from(view)
    if magic != MAGIC:
        raise ProtocolError(f"not a frame: it begins with {bytes(view[:4]).hex()}")
    (checksum,) = _CHECKSUM.unpack_from(view, _CHECKED_BYTES)
    if checksum != xxhash.xxh3_64_intdigest(view[:_CHECKED_BYTES]):
        raise ProtocolError("the checksum of a frame header does not match")
    kind = _TYPES.get(number)
    if kind is None:
        raise ProtocolError(f"unknown frame type {number}")
    if flags & ~_KNOWN_FLAGS.get(kind, 0):
        raise ProtocolError(f"unknown flags {flags:#06x} on a {kind.name} frame")
    if length > _LENGTH_MAX[kind]:
        raise ProtocolError(f"a {kind.name} frame of {length} bytes is above {_LENGTH_MAX[kind]}")
    return FrameHeader(version, kind, flags, length, channel, sequence)
