"""What is sent while the next is sealed: in order, whole, and nothing hangs when it fails."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest

from vrep.errors import PeerError, StateError
from vrep.source.bandwidth import Bandwidth
from vrep.source.sender import Sender
from vrep.wire.frames import PAYLOAD_BYTES_MAX
from vrep.wire.stream import SystemClock

LIMIT_S = 20.0


class Line:
    """A transport: what was sent on it, by whom; it may be shut, or end."""

    def __init__(self) -> None:
        self.connection = self
        self.open = threading.Event()
        self.open.set()
        self.frames: list[tuple[bytes, bool]] = []
        self.threads: list[str] = []
        self.entered = threading.Semaphore(0)
        self.failure: Exception | None = None
        self.granted = 1 << 40

    def credit(self, _channel: int) -> int:
        return self.granted

    def send_data(self, _channel: int, buffers: list[memoryview], *, more: bool = False) -> None:
        self.entered.release()
        assert self.open.wait(LIMIT_S)
        if self.failure is not None:
            raise self.failure
        self.frames.append((b"".join(bytes(each) for each in buffers), more))
        self.threads.append(threading.current_thread().name)

    @property
    def sent(self) -> bytes:
        return b"".join(data for data, _ in self.frames)


def make(line: Line) -> Sender:
    clock: Any = SystemClock()
    transport: Any = line
    return Sender(transport, 1, clock, Bandwidth(0))


def finish(sender: Sender) -> None:
    sender.stop()
    sender.join()
    assert "send" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("seed", range(8))
def test_batches_leave_in_order_and_are_not_touched_meanwhile(seed: int) -> None:
    """Two buffers, of which one is filled while the other leaves, as a shipper has them."""
    choose, line, expected = random.Random(seed), Line(), bytearray()
    sender = make(line)
    buffers = [memoryview(bytearray(4096)), memoryview(bytearray(4096))]
    for turn in range(300):
        buffer, count = buffers[turn % 2], choose.randrange(1, 4097)
        data = choose.randbytes(count)
        buffer[:count] = data
        expected += data
        (sender.send if choose.random() < 0.3 else sender.hand_over)(buffer[:count])
    sender.settle()
    assert line.sent == expected
    assert sender.bytes_sent == len(expected)
    assert {"send", "MainThread"} == set(line.threads)
    finish(sender)


def test_who_hands_over_goes_on_and_waits_for_the_batch_before() -> None:
    line, reached = Line(), threading.Event()
    sender = make(line)
    line.open.clear()
    sender.hand_over(memoryview(b"one"))
    assert line.entered.acquire(timeout=LIMIT_S)  # it is being sent, and this thread is here

    def second() -> None:
        sender.hand_over(memoryview(b"two"))
        reached.set()

    thread = threading.Thread(target=second)
    thread.start()
    assert not reached.wait(0.2)
    line.open.set()
    assert reached.wait(LIMIT_S)
    thread.join()
    sender.settle()
    assert line.sent == b"onetwo"
    finish(sender)


def test_a_batch_is_cut_into_frames_that_say_whether_more_comes() -> None:
    line = Line()
    sender = make(line)
    whole = bytes(PAYLOAD_BYTES_MAX + 5)
    sender.hand_over(memoryview(whole))
    sender.settle()
    assert [(len(data), more) for data, more in line.frames] == [
        (PAYLOAD_BYTES_MAX, True),
        (5, False),
    ]
    finish(sender)


def test_a_failure_is_told_to_whoever_comes_next_each_time() -> None:
    line = Line()
    sender = make(line)
    line.failure = PeerError("cut")
    sender.hand_over(memoryview(b"lost"))
    for call in (sender.settle, lambda: sender.hand_over(memoryview(b"x")), sender.settle):
        with pytest.raises(PeerError, match="cut"):
            call()
    with pytest.raises(PeerError, match="cut"):
        sender.send(memoryview(b"after the hole"))
    assert line.frames == []
    finish(sender)


def test_it_ends_while_it_waits_for_credit() -> None:
    line = Line()
    sender = make(line)
    line.granted = 0
    sender.hand_over(memoryview(b"never"))
    sender.stop()
    with pytest.raises(StateError, match="stopped"):
        sender.settle()
    finish(sender)
    assert line.frames == []


def test_time_that_went_into_sending_is_counted_once() -> None:
    line = Line()
    now = [0.0]

    class Clock:
        def monotonic(self) -> float:
            return now[0]

    class Slow(Line):
        def send_data(self, channel: int, buffers: Any, *, more: bool = False) -> None:
            now[0] += 2.0
            super().send_data(channel, buffers, more=more)

    line = Slow()
    transport: Any = line
    clock: Any = Clock()
    sender = Sender(transport, 1, clock, Bandwidth(0))
    sender.hand_over(memoryview(b"a"))
    sender.settle()
    sender.send(memoryview(b"b"))
    assert sender.take_spent_s() == 4.0
    assert sender.take_spent_s() == 0.0
    finish(sender)
