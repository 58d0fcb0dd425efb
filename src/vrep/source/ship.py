"""Shipping: records from the spill and the ring, sealed a batch a call, sent as credits allow.

One `Shipper` serves one stream: one connection, one group, one lane. It runs on a thread of
its own; sealing and sending release the GIL. Memory: one buffer that holds the largest record.
"""

from __future__ import annotations

import threading
import time
from typing import Final

from vrep._core.seal import Sealer
from vrep.errors import FullError, StateError
from vrep.source.bandwidth import Bandwidth
from vrep.source.effort import Effort
from vrep.source.feed import Feed
from vrep.wire.frames import PAYLOAD_BYTES_MAX
from vrep.wire.stream import Clock
from vrep.wire.transport import FrameTransport

BATCH_BYTES: Final = 4 << 20
BATCH_FIRST_BYTES: Final = 64 << 10
"""of a stream: doubled each time that the target holds more, so that on a link which stays up for
moments only something arrives whole each time"""
BUFFER_BYTES: Final = (32 << 20) + (1 << 20)
"""the largest record sealed: 32 MiB in 256 pieces, their hashes, tags and words"""
TALLY_BYTES: Final = 256
IDLE_WAIT_S: Final = 0.2
CREDIT_WAIT_S: Final = 0.5
GATHER_RECORDS: Final = 256
GATHER_S: Final = 0.004
"""a batch costs both ends some hundred microseconds, however small: while records keep coming,
few of them wait this long for more. A lone write is sent at once."""


class Shipper:
    """Seals and sends everything after the sealer's seq until stopped."""

    def __init__(
        self,
        feed: Feed,
        sealer: Sealer,
        transport: FrameTransport,
        channel: int,
        clock: Clock,
        bandwidth: Bandwidth | None = None,
        effort: Effort | None = None,
        buffer: memoryview | None = None,
    ) -> None:
        """`buffer`, of `BUFFER_BYTES`, is this shipper's until `run` has returned."""
        self._feed = feed
        self._sealer = sealer
        self._transport = transport
        self._channel = channel
        self._clock = clock
        self._bandwidth = bandwidth or Bandwidth(0)
        self._effort = effort or Effort(sealer.level)
        self._buffer = memoryview(bytearray(BUFFER_BYTES)) if buffer is None else buffer
        self._credit = threading.Condition()
        self._stopping = False
        self._batch_bytes = BATCH_FIRST_BYTES
        self.bytes_sent = 0
        self.records_sent = 0

    def stop(self) -> None:
        """Make `run` return soon; from any thread."""
        with self._credit:
            self._stopping = True
            self._credit.notify_all()

    def acknowledged(self, *, progress: bool) -> None:
        """The peer granted more; whether it holds more than before."""
        with self._credit:
            if progress:
                self._batch_bytes = min(2 * self._batch_bytes, BATCH_BYTES)
            self._credit.notify_all()

    def open_stream(self, stream: object) -> None:
        """Send the STREAM record that opens this stream."""
        self._send(self._sealer.stream(stream, self._buffer))

    def run(self) -> None:
        """Ship what follows the sealer's seq until stopped. Raises what the connection, the ring
        or the spill raise."""
        ring, sent_s, full = self._feed.ring, 0.0, False
        while not self._stopping:
            seq, asked_s = self._sealer.seq, self._clock.monotonic()
            ready = ring.wait(seq, IDLE_WAIT_S)
            self._effort.note(idle_s=self._clock.monotonic() - asked_s)
            if not ready:
                continue
            busy = self._clock.monotonic() - sent_s < 2 * GATHER_S
            if busy and not full and ring.head - seq < GATHER_RECORDS:
                time.sleep(GATHER_S)
            last = ring.head
            self._ship(last)
            full = self._sealer.seq < last  # a batch of large records waits for nothing
            ring.set(read=self._sealer.seq)
            sent_s = self._clock.monotonic()

    def _ship(self, last: int) -> None:
        """Seal and send one batch."""
        size = self._batch_bytes
        if self._sealer.level != self._effort.level:
            self._sealer.level = self._effort.level
        began_s, sealed = self._clock.monotonic(), self._sealer.stats()["bytes_plain"]
        while True:
            try:
                room = self._buffer[: size - TALLY_BYTES]
                written, done = self._feed.seal(self._sealer, last, room)
                break
            except FullError:  # one record larger than a batch
                if size == BUFFER_BYTES:
                    raise
                size = min(2 * size, BUFFER_BYTES)
        written += self._sealer.tally(self._buffer[written:], wall_ns=self._clock.time_ns())
        self.records_sent += done
        sealed, done_s = self._sealer.stats()["bytes_plain"] - sealed, self._clock.monotonic()
        self._send(written)
        waiting_s = self._clock.monotonic() - done_s
        self._effort.note(sealing_s=done_s - began_s, count=sealed, waiting_s=waiting_s)

    def _send(self, length: int) -> None:
        """Send the head of the buffer in frames, each within the credit that there is."""
        at = 0
        while at < length:
            count = min(length - at, PAYLOAD_BYTES_MAX, self._wait_credit())
            count = self._wait_turn(count)
            more = at + count < length
            self._transport.send_data(self._channel, [self._buffer[at : at + count]], more=more)
            at += count
            self.bytes_sent += count

    def _wait_turn(self, count: int) -> int:
        """How many of these bytes may go now, once they may."""
        count = self._bandwidth.turn_bytes(count)
        deadline = self._clock.monotonic() + self._bandwidth.take(count)
        with self._credit:
            while not self._stopping:
                left_s = deadline - self._clock.monotonic()
                if left_s <= 0:
                    return count
                self._credit.wait(left_s)
        raise StateError("shipping was stopped")

    def _wait_credit(self) -> int:
        with self._credit:
            while not self._stopping:
                available = self._transport.connection.credit(self._channel)
                if available > 0:
                    return available
                self._credit.wait(CREDIT_WAIT_S)
        raise StateError("shipping was stopped")


__all__ = ["Shipper"]
