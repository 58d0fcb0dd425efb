"""Frames over a stream: silence, stalls, ends, and who waits for whom."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from vrep.errors import ProtocolError, StateError, TimeLimitError
from vrep.wire import messages as m
from vrep.wire.memory import MemoryStream, memory_pair
from vrep.wire.protocol import Connection, Event, Role
from vrep.wire.stream import ConnectionLostError
from vrep.wire.transport import (
    PINGS_WAITING_MAX,
    POSTED_MAX,
    TLS_RECORD_BYTES,
    FrameTransport,
    PeerRefusedError,
    Timeouts,
)

SITE_A, SITE_B = "a" * 32, "b" * 32
WAIT_S = 30.0


class ManualClock:
    """Time that moves only when somebody waits on a `Silent` stream."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def time_ns(self) -> int:
        return int(self.now_s * 1e9)


class Recorder:
    """A stream whose reads wait on a manual clock, and which keeps what is written."""

    def __init__(self, clock: ManualClock, room: int = 1 << 30) -> None:
        self.clock = clock
        self.room = room
        self.incoming = bytearray()
        self.writes: list[bytes] = []
        self.closed = False

    def read_into(self, buffer: memoryview, timeout_s: float) -> int | None:
        if not self.incoming:
            self.clock.now_s += max(timeout_s, 0.001)
            return None
        count = min(len(buffer), len(self.incoming))
        buffer[:count] = self.incoming[:count]
        del self.incoming[:count]
        return count

    def write(self, data: bytes | bytearray | memoryview, stall_s: float) -> None:
        if len(data) > self.room:
            self.clock.now_s += stall_s
            raise TimeLimitError("stalled")
        self.writes.append(bytes(data))

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        count = min(len(data), self.room)
        if count:
            self.writes.append(bytes(data[:count]))
            self.room -= count
        return count

    def close(self) -> None:
        self.closed = True


def ready(stream: Recorder, clock: ManualClock) -> tuple[FrameTransport, Connection]:
    """A client's transport that was greeted, and the server at its other end."""
    server = Connection(Role.SERVER)
    client = FrameTransport(
        stream,
        Connection(Role.CLIENT),
        clock=clock,
        timeouts=Timeouts(ping_after_s=5, dead_after_s=20),
    )
    hello = m.Hello(min_version=1, max_version=1, site_id=SITE_A, name="a")
    server.feed(client.connection.send(hello))
    client.connection.feed(server.send(m.Welcome(version=1, site_id=SITE_B, name="b")))
    return client, server


def frames(server: Connection, stream: Recorder) -> list[m.Message | m.Data]:
    data = b"".join(stream.writes)
    stream.writes.clear()
    return [event.message for event in server.feed(data)]


def test_a_silent_peer_is_asked_and_then_given_up() -> None:
    clock = ManualClock()
    stream = Recorder(clock)
    client, server = ready(stream, clock)
    started_s = clock.now_s
    with pytest.raises(TimeLimitError, match="silent"):
        client.receive(1000.0)
    assert clock.now_s - started_s == pytest.approx(20, abs=1.5)
    pings = frames(server, stream)
    assert [type(ping) for ping in pings] == [m.Ping] * 3


def test_a_busy_owner_is_not_a_silent_peer() -> None:
    clock = ManualClock()
    client, _ = ready(Recorder(clock), clock)
    for _ in range(10):
        clock.now_s += 1000  # between calls nobody listens
        assert client.receive(1.0) is None


def test_a_peer_that_sends_for_long_hears_that_it_is_heard() -> None:
    """One frame takes minutes on a slow link: until it is whole there is nothing to answer. The
    answers of the peer stand behind it, so the questions are bounded."""
    clock = ManualClock()
    stream = Recorder(clock)
    client, server = ready(stream, clock)
    frame = server.send(m.Ping(id=1, time_ns=0))
    for part in (frame[:10], frame[10:20]):
        stream.incoming += part
        clock.now_s += 6
        assert client.receive(0.1) is None
        assert [type(each) for each in frames(server, stream)] == [m.Ping]
        assert client.receive(0.1) is None
        assert stream.writes == []  # and not more often than that
    asked = 0
    for byte in range(20, len(frame) - 1):
        stream.incoming += frame[byte : byte + 1]
        clock.now_s += 6
        assert client.receive(0.1) is None
        asked += len(frames(server, stream))
    assert 10 < asked <= PINGS_WAITING_MAX - 2
    for _ in range(2 * PINGS_WAITING_MAX):
        client._spoke_s -= 6
        client._be_heard()
    assert asked + len(frames(server, stream)) == PINGS_WAITING_MAX - 2


def test_pings_are_answered_and_measured() -> None:
    clock = ManualClock()
    stream = Recorder(clock)
    client, server = ready(stream, clock)
    stream.incoming += server.send(m.Ping(id=7, time_ns=123))
    assert client.receive(1.0) is None
    (pong,) = frames(server, stream)
    assert pong == m.Pong(id=7, ping_time_ns=123, time_ns=pong.time_ns)
    client.ping()
    (ping,) = frames(server, stream)
    clock.now_s += 0.25
    stream.incoming += server.send(m.Pong(id=ping.id, ping_time_ns=ping.time_ns, time_ns=0))
    assert client.receive(1.0) is None
    assert client.round_trip_s == pytest.approx(0.25)


def test_what_is_posted_waits_for_room_and_keeps_its_order() -> None:
    clock = ManualClock()
    stream = Recorder(clock, room=10)
    client, server = ready(stream, clock)
    for number in range(5):
        client.post(m.Ping(id=number, time_ns=0))
    assert [len(write) for write in stream.writes] == [10]
    assert client.receive(0.2) is None
    stream.room = 1 << 20
    client.send(m.Status(time_ns=0, state="x"))
    got = frames(server, stream)
    assert [ping.id for ping in got[:5]] == [0, 1, 2, 3, 4]
    assert isinstance(got[5], m.Status)


def test_answers_that_nobody_takes_are_bounded() -> None:
    clock = ManualClock()
    stream = Recorder(clock, room=0)
    client, _ = ready(stream, clock)
    for _ in range(POSTED_MAX):
        client.post(m.Status(time_ns=0, state="x"))
    client.post(m.Status(time_ns=0, state="x"))  # one is being written
    with pytest.raises(TimeLimitError, match="takes no answers"):
        client.post(m.Status(time_ns=0, state="x"))


def test_a_stalled_write_is_the_end() -> None:
    clock = ManualClock()
    stream = Recorder(clock)
    client, _ = ready(stream, clock)
    stream.room = 0
    with pytest.raises(TimeLimitError):
        client.send(m.Status(time_ns=0, state="x"))
    stream.room = 1 << 20
    with pytest.raises(ConnectionLostError):
        client.send(m.Status(time_ns=0, state="x"))
    assert stream.writes == []
    client.close()
    assert stream.closed


def test_an_end_that_failed_is_freed_at_once() -> None:
    """Nothing waits for the collector of rings, which may not come for hours."""
    clock = ManualClock()
    client, _ = ready(Recorder(clock, room=0), clock)
    gone = weakref.ref(client)
    gc.disable()
    try:
        with pytest.raises(TimeLimitError):
            client.send(m.Ping(id=1, time_ns=0))
        del client
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "sizes", [[1], [16352], [16353], [70000], [5, 16384, 3, 40000], [16384 * 4], [1] * 50]
)
def test_data_is_written_in_few_tls_records(sizes: list[int]) -> None:
    clock = ManualClock()
    stream = Recorder(clock)
    client, server = ready(stream, clock)
    epoch = m.EpochInfo(counter=1, id=bytes(16))
    zero = m.Position(epoch=1, seq=0)
    client.send(
        m.OpenGroup(
            group_id=bytes(16),
            name="g",
            epoch=epoch,
            disks=[m.DiskInfo(index=0, name="d", size=1)],
            lanes=[m.LaneOffer(durable_seq=0, oldest_seq=1, newest_seq=0)],
            wrapped_keys=[],
        ),
        1,
    )
    frames(server, stream)
    lane = m.LaneState(durable=zero, received=zero)
    stream.incoming += server.send(
        m.GroupOpened(epoch=epoch, lanes=[lane], credit_bytes=1 << 20, empty=True), 1
    )
    assert client.expect(1.0).channel == 1
    client.send(m.StreamStart(stream_id=bytes(16), key_generation=1, resume_seq=0), 1)
    frames(server, stream)
    buffers = [bytes([number]) * size for number, size in enumerate(sizes)]
    client.send_data(1, buffers)
    records = sum(-(-len(write) // TLS_RECORD_BYTES) for write in stream.writes)
    assert records <= sum(sizes) // TLS_RECORD_BYTES + 2
    (data,) = frames(server, stream)
    assert isinstance(data, m.Data)
    assert data.payload == b"".join(buffers)
    assert client.connection.credit(1) == (1 << 20) - sum(sizes)


def greeted(capacity: int = 1 << 20) -> tuple[FrameTransport, FrameTransport]:
    one, two = memory_pair(capacity)
    client = FrameTransport(one, Connection(Role.CLIENT))
    server = FrameTransport(two, Connection(Role.SERVER))
    thread = threading.Thread(target=server.greet, args=(SITE_B, "b", "vrep"))
    thread.start()
    client.greet(SITE_A, "a", "vrep", ["records"])
    thread.join(WAIT_S)
    return client, server


def test_greeting_both_ends() -> None:
    client, server = greeted()
    assert server.peer_features == {"records"}
    assert client.peer_software == server.peer_software == "vrep"
    client.send(m.Request(id=1, method="state"))
    assert server.expect(WAIT_S) == Event(0, m.Request(id=1, method="state"))
    server.close("done")
    assert client.expect(WAIT_S).message == m.Bye(reason="done")
    with pytest.raises(ConnectionLostError, match="without a word"):
        client.receive(WAIT_S)


def test_an_error_of_the_peer_is_raised_with_its_words() -> None:
    client, server = greeted()
    server.refuse("identity", "another site")
    with pytest.raises(PeerRefusedError, match="another site") as caught:
        client.receive(WAIT_S)
    assert caught.value.code == "identity"
    with pytest.raises(StateError):
        server.send(m.Status(time_ns=0, state="x"))


def test_ask_takes_its_own_answer() -> None:
    client, server = greeted()

    def answer() -> None:
        first = server.expect(WAIT_S).message
        assert isinstance(first, m.Request)
        server.send(m.Status(time_ns=0, state="x"))
        server.send(m.Response(id=first.id, result=first.params))
        second = server.expect(WAIT_S).message
        assert isinstance(second, m.Request)
        server.send(m.Response(id=second.id, error="unknown", text="no such group"))
        server.expect(WAIT_S)
        server.close("gone")

    thread = threading.Thread(target=answer)
    thread.start()
    assert client.ask("echo", {"x": b"y"}) == {"x": b"y"}
    with pytest.raises(PeerRefusedError, match="no such group"):
        client.ask("points.list")
    with pytest.raises(ConnectionLostError, match="gone"):
        client.ask("points.list")
    thread.join(WAIT_S)
    client.close()
    clock = ManualClock()
    silent, _ = ready(Recorder(clock), clock)
    with pytest.raises(TimeLimitError, match="'state' within 3 s"):
        silent.ask("state", timeout_s=3)


def test_two_ends_that_only_ask_do_not_block_each_other() -> None:
    # Each direction holds less than one question's answer; both ends answer
    # hundreds while both go on asking.
    client, server = greeted(capacity=64)
    rounds = 60

    def run(end: FrameTransport, answered: list[int]) -> None:
        for number in range(rounds):
            end.post(m.Request(id=number, method="echo", params={"x": "y" * 200}))
        answers = asked = 0
        while answers < rounds or asked < rounds:
            event = end.expect(WAIT_S)
            if isinstance(event.message, m.Request):
                asked += 1
                end.post(m.Response(id=event.message.id, result="z" * 200))
            else:
                answers += 1
        while end._posted or end._unfinished:
            end.receive(0.01)
        answered.append(answers)

    answered: list[int] = []
    threads = [threading.Thread(target=run, args=(end, answered)) for end in (client, server)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert answered == [rounds, rounds]


def test_garbage_in_the_stream() -> None:
    one, two = memory_pair()
    server = FrameTransport(two, Connection(Role.SERVER))
    one.write(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n", 1.0)
    with pytest.raises(ProtocolError, match="not a frame"):
        server.greet(SITE_B, "b", "vrep")


def test_memory_stream_is_bounded() -> None:
    one, two = memory_pair(capacity=4)
    assert isinstance(one, MemoryStream)
    assert one.write_some(b"abcdef") == 4
    with pytest.raises(TimeLimitError):
        one.write(b"ef", 0.01)
    buffer = memoryview(bytearray(8))
    assert two.read_into(buffer, 1.0) == 4
    assert two.read_into(buffer, 0.0) is None
    two.close()
    assert one.read_into(buffer, 1.0) == 0
    with pytest.raises(ConnectionLostError):
        one.write(b"x", 1.0)
