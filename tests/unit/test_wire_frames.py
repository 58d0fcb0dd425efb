"""Frame headers and messages under damage: ProtocolError and nothing else."""

from __future__ import annotations

import struct

import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from vrep.errors import ProtocolError
from vrep.wire import messages as m
from vrep.wire.frames import (
    CONTROL_BYTES_MAX,
    HANDSHAKE_BYTES_MAX,
    HEADER_BYTES,
    PAYLOAD_BYTES_MAX,
    FrameHeader,
    FrameType,
    decode_header,
    encode_header,
)

headers = st.builds(
    FrameHeader,
    version=st.integers(0, 255),
    type=st.sampled_from(FrameType),
    flags=st.just(0),
    length=st.integers(0, HANDSHAKE_BYTES_MAX),
    channel=st.integers(0, 2**32 - 1),
    sequence=st.integers(0, 2**64 - 1),
)


@given(headers)
def test_header_round_trip(header: FrameHeader) -> None:
    data = encode_header(header)
    assert len(data) == HEADER_BYTES
    assert decode_header(data) == header
    assert decode_header(memoryview(bytearray(data))) == header


@given(headers, st.integers(0, HEADER_BYTES * 8 - 1))
def test_each_flipped_bit_is_noticed(header: FrameHeader, bit: int) -> None:
    data = bytearray(encode_header(header))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        decode_header(data)


@given(st.binary(max_size=64))
def test_garbage_header(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_header(data)


def forge(type_number: int = 9, flags: int = 0, length: int = 1) -> bytes:
    """A header whose checksum is right but whose fields need not be."""

    fields = struct.pack("<IBBHIIQ", 0x46575256, 1, type_number, flags, length, 0, 0)
    return fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))


@pytest.mark.parametrize(
    ("number", "flags", "length"),
    [
        (0, 0, 0),
        (18, 0, 0),
        (255, 0, 0),
        (FrameType.DATA, 2, 1),
        (FrameType.PING, 1, 1),
        (FrameType.DATA, 0, PAYLOAD_BYTES_MAX + 1),
        (FrameType.RESPONSE, 0, PAYLOAD_BYTES_MAX + 1),
        (FrameType.REQUEST, 0, CONTROL_BYTES_MAX + 1),
        (FrameType.HELLO, 0, HANDSHAKE_BYTES_MAX + 1),
        (FrameType.DATA, 0, 2**32 - 1),
    ],
)
def test_bounds_of_a_header_that_is_whole(number: int, flags: int, length: int) -> None:
    with pytest.raises(ProtocolError):
        decode_header(forge(number, flags, length))


def test_the_largest_lengths_are_accepted() -> None:
    assert decode_header(forge(FrameType.DATA, 1, PAYLOAD_BYTES_MAX)).flags == 1
    assert decode_header(forge(FrameType.REQUEST, 0, CONTROL_BYTES_MAX)).length == CONTROL_BYTES_MAX


control = st.sampled_from([kind for kind in FrameType if kind is not FrameType.DATA])


@given(control, st.binary(max_size=300))
@example(FrameType.BYE, b"\x80")  # every field of it has a default
def test_garbage_message(kind: FrameType, payload: bytes) -> None:
    """It is refused, or is a message that can be said again."""
    try:
        message = m.decode_message(kind, payload)
    except ProtocolError:
        return
    again = m.encode_message(message)
    assert m.encode_message(m.decode_message(kind, again)) == again  # a NaN in it equals nothing


@pytest.mark.parametrize(
    "payload",
    [
        b"\x91" * 100_000,  # deep nesting
        b"\xdd\xff\xff\xff\xff",  # an array of four thousand million
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\xa2id" + b"\x91" * 100_000,
    ],
)
@pytest.mark.parametrize("kind", [FrameType.REQUEST, FrameType.RESPONSE, FrameType.OPEN_GROUP])
def test_hostile_shapes(kind: FrameType, payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        m.decode_message(kind, payload)


positions = st.builds(
    m.Position,
    epoch=st.integers(0, 2**32 - 1),
    lane=st.integers(0, 2**16 - 1),
    seq=st.integers(0, 2**63 - 1),
)
identifiers = st.binary(min_size=16, max_size=16)
epochs = st.builds(
    m.EpochInfo,
    counter=st.integers(0, 2**32 - 1),
    id=identifiers,
    parent=st.none() | positions,
    parent_id=st.none() | identifiers,
)
codes = st.from_regex(r"[a-z][a-z0-9-]{0,31}", fullmatch=True)
seqs = st.integers(0, 2**63 - 1)
names = st.text(min_size=1, max_size=63)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
messages = st.one_of(
    st.builds(
        m.GroupOpened,
        epoch=epochs,
        lanes=st.lists(
            st.builds(m.LaneState, durable=positions, received=positions), min_size=1, max_size=4
        ),
        credit_bytes=seqs,
        empty=st.booleans(),
        conditions=st.lists(codes, max_size=4),
    ),
    st.builds(m.StreamStart, stream_id=identifiers, key_generation=st.just(1), resume_seq=seqs),
    st.builds(m.Ack, received_seq=seqs, durable_seq=seqs, credit_bytes=seqs),
    st.builds(m.Refused, code=st.just("fenced"), text=st.text(max_size=99), epoch=epochs),
    st.builds(m.Ping, id=seqs, time_ns=seqs),
    st.builds(
        m.OpenGroup,
        group_id=identifiers,
        name=names,
        epoch=epochs,
        disks=st.lists(
            st.builds(m.DiskInfo, index=st.integers(0, 63), name=names, size=seqs),
            min_size=1,
            max_size=4,
        ),
        lanes=st.lists(
            st.builds(m.LaneOffer, durable_seq=seqs, oldest_seq=seqs, newest_seq=seqs),
            min_size=1,
            max_size=3,
        ),
        wrapped_keys=st.lists(st.binary(min_size=1, max_size=512), max_size=3),
    ),
    st.builds(m.Response, id=seqs, result=plain_values),
    st.builds(
        m.Request,
        id=seqs,
        method=st.just("points.list"),
        params=st.dictionaries(st.text(), plain_values, max_size=4),
    ),
)


@given(messages)
def test_message_round_trip(message: m.Message) -> None:
    assert m.decode_message(m.frame_type(message), m.encode_message(message)) == message


@given(messages, st.data())
def test_cut_and_flipped_messages(message: m.Message, data: st.DataObject) -> None:
    kind, payload = m.frame_type(message), m.encode_message(message)
    with pytest.raises(ProtocolError):
        m.decode_message(kind, payload[: data.draw(st.integers(0, len(payload) - 1))])
    flipped = bytearray(payload)
    at = data.draw(st.integers(0, len(payload) - 1))
    flipped[at] ^= data.draw(st.integers(1, 255))
    try:
        other = m.decode_message(kind, flipped)
    except ProtocolError:
        return
    # What is accepted is a message within all bounds: it can be sent again. Its bytes are compared,
    # since a flip can make a number that is none (a NaN), which equals nothing.
    again = m.encode_message(other)
    assert m.encode_message(m.decode_message(kind, again)) == again


@pytest.mark.parametrize(
    "message",
    [
        m.Ping(id=-1, time_ns=0),
        m.Ping(id=1 << 63, time_ns=0),
        m.StreamStart(stream_id=bytes(15), key_generation=1, resume_seq=0),
        m.StreamStart(stream_id=bytes(16), key_generation=0, resume_seq=0),
        m.Ack(lane=1 << 16, received_seq=0, durable_seq=0, credit_bytes=0),
        m.Error(code="Not A Code", text=""),
        m.Bye(reason="x" * 4097),
        m.Request(id=1, method="Über"),
        m.Request(id=1, method="x", params={"a": object()}),
    ],
)
def test_a_sender_cannot_break_the_bounds(message: m.Message) -> None:
    with pytest.raises(ProtocolError, match="cannot send"):
        m.encode_message(message)


def test_the_secret_of_join_does_not_show() -> None:
    join = m.Join(secret=b"sixteen bytes!!!", site_id="0" * 32, name="a", certificate="x")
    assert "sixteen" not in repr(join)
