"""What may be said when: states, versions, channels, credits, bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrep.errors import ProtocolError, StateError, VersionError
from vrep.wire import messages as m
from vrep.wire.credits import CreditGranter, CreditWindow
from vrep.wire.frames import HEADER_BYTES, FrameHeader, FrameType, encode_header
from vrep.wire.protocol import (
    CHANNELS_MAX,
    REQUESTS_MAX,
    ChannelClosedError,
    Connection,
    ConnectionState,
    Event,
    Role,
)

SITE_A, SITE_B = "a" * 32, "b" * 32
EPOCH = m.EpochInfo(counter=1, id=bytes(16))
ZERO = m.Position(epoch=1, seq=0)
WINDOW = 1000


def hello(low: int = 1, high: int = 1) -> m.Hello:
    return m.Hello(min_version=low, max_version=high, site_id=SITE_A, name="a", software="old")


def welcome(version: int = 1) -> m.Welcome:
    return m.Welcome(version=version, site_id=SITE_B, name="b")


def open_group(lanes: int = 1) -> m.OpenGroup:
    return m.OpenGroup(
        group_id=bytes(16),
        name="g",
        epoch=EPOCH,
        disks=[m.DiskInfo(index=0, name="d", size=4096)],
        lanes=[
            m.LaneOffer(lane=lane, durable_seq=0, oldest_seq=1, newest_seq=0)
            for lane in range(lanes)
        ],
        wrapped_keys=[],
    )


def opened(credit: int = WINDOW, lanes: int = 1) -> m.GroupOpened:
    states = [
        m.LaneState(durable=m.Position(epoch=1, lane=lane, seq=0), received=ZERO)
        for lane in range(lanes)
    ]
    return m.GroupOpened(epoch=EPOCH, lanes=states, credit_bytes=credit, empty=True)


STREAM = m.StreamStart(stream_id=bytes(16), key_generation=1, resume_seq=0)


class Pair:
    """A client and a server whose bytes go straight to the other."""

    def __init__(self, *, known: bool = True, greet: bool = True) -> None:
        self.client = Connection(Role.CLIENT, known=known)
        self.server = Connection(Role.SERVER, known=known)
        if greet:
            self.up(hello())
            self.down(welcome())

    def up(self, message: m.Message, channel: int = 0) -> list[Event]:
        return self.server.feed(self.client.send(message, channel))

    def down(self, message: m.Message, channel: int = 0) -> list[Event]:
        return self.client.feed(self.server.send(message, channel))

    def open(self, channel: int = 1, credit: int = WINDOW) -> None:
        self.up(open_group(), channel)
        self.down(opened(credit), channel)
        self.up(STREAM, channel)

    def data(self, payload: bytes, channel: int = 1, *, more: bool = False) -> list[Event]:
        return self.server.feed(self.client.send_data(channel, [payload], more=more) + payload)


class Forger:
    """Says anything, in well-formed frames, to a real connection."""

    def __init__(self, sequence: int, version: int = 1) -> None:
        self.sequence = sequence
        self.version = version

    def frame(self, message: m.Message, channel: int = 0) -> bytes:
        return self.raw(m.frame_type(message), m.encode_message(message), channel)

    def raw(self, kind: FrameType, payload: bytes, channel: int = 0, flags: int = 0) -> bytes:
        header = FrameHeader(self.version, kind, flags, len(payload), channel, self.sequence)
        self.sequence += 1
        return encode_header(header) + payload


def test_greeting() -> None:
    pair = Pair(greet=False)
    assert pair.up(hello()) == [Event(0, hello())]
    assert pair.server.offered_version == 1
    assert pair.down(welcome()) == [Event(0, welcome())]
    assert pair.client.version == pair.server.version == 1
    assert pair.client.state is pair.server.state is ConnectionState.READY


@pytest.mark.parametrize(
    ("client", "server", "agreed"),
    [((1, 1), (1, 2), 1), ((1, 2), (1, 1), 1), ((1, 3), (2, 3), 3), ((2, 4), (1, 3), 3)],
)
def test_either_side_may_be_newer(
    client: tuple[int, int], server: tuple[int, int], agreed: int
) -> None:
    one = Connection(Role.CLIENT, versions=client)
    two = Connection(Role.SERVER, versions=server)
    two.feed(one.send(hello(*client)))
    assert two.offered_version == agreed
    with pytest.raises(StateError):
        two.send(welcome(agreed + 1))
    one.feed(two.send(welcome(agreed)))
    assert one.version == agreed
    # All later frames carry the agreed version, and must.
    frame = one.send(m.Ping(id=1, time_ns=0))
    assert frame[4] == agreed
    assert two.feed(frame)
    with pytest.raises(VersionError, match="version 9"):
        two.feed(Forger(2, version=9).frame(m.Bye()))


@pytest.mark.parametrize(
    ("client", "server", "word"), [((1, 1), (2, 3), "older"), ((4, 5), (2, 3), "newer")]
)
def test_releases_too_far_apart_say_so(
    client: tuple[int, int], server: tuple[int, int], word: str
) -> None:
    one = Connection(Role.CLIENT, versions=client)
    two = Connection(Role.SERVER, versions=server)
    with pytest.raises(VersionError, match=f"'a' runs an? {word} release.*old") as caught:
        two.feed(one.send(hello(*client)))
    answer = two.send(m.Error(code="version", text=caught.value.detail))
    with pytest.raises(VersionError, match=f"the peer says: .*{word}"):
        one.feed(answer)


def test_a_server_cannot_choose_what_was_not_offered() -> None:
    client = Connection(Role.CLIENT)
    client.send(hello())
    with pytest.raises(VersionError, match="chose protocol version 2"):
        client.feed(Forger(0).frame(welcome(2)))


def test_data_reaches_the_owners_buffer_unchanged() -> None:
    arena = bytearray(100)
    pair = Pair()
    asked: list[tuple[int, int]] = []

    def allocate(channel: int, length: int) -> memoryview:
        asked.append((channel, length))
        return memoryview(arena)

    pair.server._allocate = allocate
    pair.open()
    parts = [b"abc", memoryview(b"defg"), bytearray(b"h")]
    header = pair.client.send_data(1, parts, more=True)
    assert len(header) == HEADER_BYTES
    # Byte by byte, into exactly the buffers that the connection names.
    events = []
    for byte in header + b"".join(parts):
        buffer = pair.server.receive_buffer()
        buffer[0] = byte
        event = pair.server.bytes_received(1)
        if event is not None:
            events.append(event)
    assert asked == [(1, 8)]
    (event,) = events
    assert isinstance(event.message, m.Data)
    assert event.message.more
    assert event.message.payload == b"abcdefgh"
    assert event.message.payload.obj is arena
    assert pair.client.credit(1) == WINDOW - 8


def test_credits_bound_both_ends() -> None:
    pair = Pair()
    pair.open(credit=10)
    pair.data(b"12345678")
    assert (pair.client.credit(1), pair.server.held(1)) == (2, 8)
    with pytest.raises(ProtocolError, match="credit"):
        pair.client.send_data(1, [b"123"])
    assert not pair.server.release(1, 1)
    assert pair.server.release(1, 5)
    pair.down(pair.server.ack(1, 3, 2), 1)
    assert pair.client.credit(1) == 8
    with pytest.raises(ProtocolError, match="credit"):
        pair.server.feed(Forger(4).raw(FrameType.DATA, bytes(9), 1))


def test_a_grant_or_an_acknowledgement_never_goes_back() -> None:
    for first, second in [
        ((5, 4, WINDOW), (4, 4, WINDOW)),
        ((5, 4, WINDOW), (5, 3, WINDOW)),
        ((5, 4, WINDOW), (6, 5, WINDOW - 1)),
        ((5, 4, WINDOW), (6, 7, WINDOW)),
    ]:
        pair, forger = Pair(), Forger(2)
        pair.open()
        frames = [
            forger.frame(m.Ack(received_seq=r, durable_seq=d, credit_bytes=c), 1)
            for r, d, c in (first, second)
        ]
        assert len(pair.client.feed(frames[0])) == 1
        with pytest.raises(ProtocolError):
            pair.client.feed(frames[1])


def test_records_may_go_on_in_the_next_frame() -> None:
    pair = Pair()
    pair.open()
    pair.data(b"begin", more=True)
    with pytest.raises(StateError, match="middle of a record"):
        pair.client.send(STREAM, 1)
    with pytest.raises(ProtocolError, match="inside a record"):
        pair.server.feed(Forger(4).frame(STREAM, 1))
    pair = Pair()
    pair.open()
    pair.data(b"begin", more=True)
    pair.data(b"end")
    assert pair.up(STREAM, 1)


ILLEGAL_FOR_SERVER: list[tuple[str, Callable[[Forger], bytes]]] = [
    ("HELLO twice", lambda f: f.frame(hello())),
    ("a server's message", lambda f: f.frame(welcome())),
    ("ACK by a client", lambda f: f.frame(m.Ack(received_seq=0, durable_seq=0, credit_bytes=0), 1)),
    ("DATA before a group", lambda f: f.raw(FrameType.DATA, b"x", 1)),
    ("DATA on channel 0", lambda f: f.raw(FrameType.DATA, b"x", 0)),
    ("PING on a channel", lambda f: f.frame(m.Ping(id=1, time_ns=0), 1)),
    ("an answer to nothing", lambda f: f.frame(m.Response(id=1))),
    ("a pong to nothing", lambda f: f.frame(m.Pong(id=1, ping_time_ns=0, time_ns=0))),
    ("stream before group", lambda f: f.frame(STREAM, 1)),
    ("status of no channel", lambda f: f.frame(m.Status(time_ns=0, state="x"), 7)),
    ("BYE of no channel", lambda f: f.frame(m.Bye(), 7)),
    ("group on channel 0", lambda f: f.frame(open_group(), 0)),
    ("empty group", lambda f: f.raw(FrameType.OPEN_GROUP, b"", 1)),
    ("wrong order", lambda f: Forger(5).frame(m.Bye())),
    ("group before answer", lambda f: f.frame(open_group(), 1) + f.frame(STREAM, 1)),
    ("channel twice", lambda f: f.frame(open_group(), 1) + f.frame(open_group(), 1)),
    ("channel backwards", lambda f: f.frame(open_group(), 2) + f.frame(open_group(), 1)),
    (
        "request twice",
        lambda f: f.frame(m.Request(id=1, method="x")) + f.frame(m.Request(id=1, method="x")),
    ),
    ("after BYE", lambda f: f.frame(m.Bye()) + f.frame(m.Ping(id=1, time_ns=0))),
]


@pytest.mark.parametrize(
    ("name", "build"), ILLEGAL_FOR_SERVER, ids=[n for n, _ in ILLEGAL_FOR_SERVER]
)
def test_what_a_client_may_not_say(name: str, build: Callable[[Forger], bytes]) -> None:
    pair = Pair()
    with pytest.raises(ProtocolError):
        pair.server.feed(build(Forger(1)))


@pytest.mark.parametrize(
    "message",
    [m.Ping(id=1, time_ns=0), m.Bye(), m.Request(id=1, method="x"), m.Error(code="x", text="")],
)
def test_nothing_before_hello(message: m.Message) -> None:
    with pytest.raises(ProtocolError):
        Connection(Role.SERVER).feed(Forger(0).frame(message))
    if not isinstance(message, m.Error):
        with pytest.raises(StateError):
            Connection(Role.CLIENT).send(message)


def test_strangers_may_only_join() -> None:
    join = m.Join(secret=bytes(16), site_id=SITE_A, name="a", certificate="x")
    pair = Pair(known=False)
    assert pair.up(join) == [Event(0, join)]
    assert pair.down(m.Joined(site_id=SITE_B, name="b"))
    with pytest.raises(StateError):
        pair.client.send(open_group(), 1)
    for message, channel in [
        (open_group(), 1),
        (m.Request(id=1, method="points.list"), 0),
        (m.Status(time_ns=0, state="x"), 0),
    ]:
        pair = Pair(known=False)
        with pytest.raises(ProtocolError, match="not known"):
            pair.server.feed(Forger(1).frame(message, channel))


def test_strangers_have_smaller_bounds() -> None:
    pair = Pair(known=False)
    header = FrameHeader(1, FrameType.ERROR, 0, 1 << 17, 0, 1)
    with pytest.raises(ProtocolError, match="not known"):
        pair.server.feed(encode_header(header))


def test_a_channel_ends_and_late_frames_are_dropped() -> None:
    pair = Pair()
    pair.open()
    header = pair.client.send_data(1, [b"late"])
    refusal = pair.server.send(m.Refused(code="fenced", text="newer epoch", epoch=EPOCH), 1)
    assert pair.server.feed(header + b"late") == []
    (event,) = pair.client.feed(refusal)
    assert isinstance(event.message, m.Refused)
    with pytest.raises(ChannelClosedError):
        pair.client.send_data(1, [b"x"])
    with pytest.raises(ChannelClosedError):
        pair.server.release(1, 4)
    with pytest.raises(StateError, match="used before"):
        pair.client.send(open_group(), 1)
    assert pair.client.next_channel() == 2
    pair.open(2)
    pair.data(b"x", 2)
    assert pair.server.channels() == [2]


def test_an_end_crosses_the_answer() -> None:
    pair = Pair()
    pair.up(open_group(), 1)
    bye = pair.client.send(m.Bye(), 1)
    assert pair.down(opened(), 1) == []
    assert pair.server.feed(bye) == [Event(1, m.Bye())]
    assert pair.client.channels() == pair.server.channels() == []


def test_the_end_of_a_connection() -> None:
    pair = Pair()
    late = pair.server.send(m.Status(time_ns=0, state="x"))
    pair.up(m.Bye(reason="done"))
    assert pair.server.state is ConnectionState.CLOSED
    assert pair.client.state is ConnectionState.CLOSING
    assert pair.client.feed(late) == []
    with pytest.raises(StateError):
        pair.client.send(m.Bye())


def test_bounds_of_questions_and_channels() -> None:
    pair = Pair()
    for number in range(REQUESTS_MAX):
        pair.up(m.Request(id=number, method="x"))
    with pytest.raises(StateError):
        pair.client.send(m.Request(id=999, method="x"))
    with pytest.raises(ProtocolError, match="too many"):
        pair.server.feed(Forger(1 + REQUESTS_MAX).frame(m.Request(id=999, method="x")))
    pair = Pair()
    for channel in range(1, CHANNELS_MAX + 1):
        pair.up(open_group(), channel)
    with pytest.raises(StateError, match="at most"):
        pair.client.send(open_group(), CHANNELS_MAX + 1)
    with pytest.raises(ProtocolError, match="at most"):
        pair.server.feed(Forger(1 + CHANNELS_MAX).frame(open_group(), CHANNELS_MAX + 1))


def test_questions_both_ways() -> None:
    pair = Pair()
    pair.up(m.Request(id=1, method="points.list"))
    pair.down(m.Request(id=1, method="state"))
    (event,) = pair.down(m.Response(id=1, result=[1]))
    assert event.message == m.Response(id=1, result=[1])
    assert pair.up(m.Response(id=1, error="unknown", text="no"))
    with pytest.raises(StateError):
        pair.server.send(m.Response(id=1))


def test_lanes_and_disks_of_a_group_are_consistent() -> None:
    pair = Pair()
    pair.up(open_group(lanes=2), 1)
    with pytest.raises(StateError, match="lanes"):
        pair.server.send(opened(lanes=1), 1)
    with pytest.raises(ProtocolError, match="lanes"):
        pair.client.feed(Forger(1).frame(opened(lanes=1), 1))
    twice = m.DiskInfo(index=0, name="e", size=1)
    bad = m.OpenGroup(
        group_id=bytes(16),
        name="g",
        epoch=EPOCH,
        disks=[*open_group().disks, twice],
        lanes=open_group().lanes,
        wrapped_keys=[],
    )
    with pytest.raises(ProtocolError, match="disk twice"):
        Pair().server.feed(Forger(1).frame(bad, 1))
    pair = Pair()
    pair.open()
    with pytest.raises(ProtocolError, match="no lane 3"):
        pair.server.feed(
            Forger(3).frame(
                m.StreamStart(stream_id=bytes(16), key_generation=1, lane=3, resume_seq=0), 1
            )
        )


def conversation() -> tuple[bytes, Callable[[], Connection]]:
    """What a client says in a whole conversation, and a server that heard none."""
    client = Connection(Role.CLIENT)
    said = client.send(hello())
    client.feed(Forger(0).frame(welcome()))
    said += client.send(open_group(), 1)
    said += client.send(m.Ping(id=1, time_ns=5))
    said += client.send(m.Request(id=3, method="points.list", params={"group": "g"}))
    said += client.send(m.Bye(), 1)
    said += client.send(m.Bye())
    return said, lambda: Connection(Role.SERVER)


def listen(server: Connection, data: bytes) -> int:
    """Feed a server as its owner does: HELLO is answered when it was heard."""
    events = 0
    for at in range(len(data)):
        for event in server.feed(data[at : at + 1]):
            events += 1
            if isinstance(event.message, m.Hello):
                server.send(welcome(server.offered_version))
    return events


def test_the_conversation_is_heard() -> None:
    said, server = conversation()
    assert listen(server(), said) == 6


@given(st.data())
def test_damaged_conversations(data: st.DataObject) -> None:
    said, server = conversation()
    changed = bytearray(said)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(changed) - 1, 0)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "delete"])):
            case "flip" if changed:
                changed[at] ^= data.draw(st.integers(1, 255))
            case "cut":
                del changed[max(at, 1) :]
            case "insert":
                changed[at:at] = data.draw(st.binary(min_size=1, max_size=40))
            case _:
                del changed[at : at + data.draw(st.integers(1, 40))]
    with contextlib.suppress(ProtocolError, VersionError):
        assert listen(server(), bytes(changed)) <= 7


@given(st.binary(max_size=200), st.sampled_from(Role), st.booleans())
def test_garbage(data: bytes, role: Role, known: bool) -> None:
    connection = Connection(role, known=known)
    if role is Role.CLIENT:
        connection.send(hello())
    if len(data) < HEADER_BYTES:
        assert connection.feed(data) == []
    else:
        with pytest.raises(ProtocolError):
            connection.feed(data)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=60), st.integers(1, 100))
def test_credits_against_a_plain_count(steps: list[tuple[bool, int]], window: int) -> None:
    granter, sender = CreditGranter(window), CreditWindow(window)
    sent = released = 0
    for send, amount in steps:
        if send:
            count = min(amount, sender.available)
            sender.consume(count)
            granter.receive(count)
            sent += count
        else:
            count = min(amount, sent - released)
            granter.release(count)
            released += count
            granter.tell(granter.grantable)
            sender.grant(granter.granted)
        assert granter.held == sent - released <= window
        assert 0 <= sender.available <= window - granter.held
    with pytest.raises(ProtocolError):
        sender.consume(sender.available + 1)
    with pytest.raises(ProtocolError):
        granter.receive(granter.granted - granter.received + 1)
    with pytest.raises(ProtocolError):
        sender.grant(sender.granted - 1)
    with pytest.raises(ValueError, match="release"):
        granter.release(granter.held + 1)
    with pytest.raises(ValueError, match="grant"):
        granter.tell(granter.grantable + 1)
