"""Shipping: records from the spill and the ring, sealed a batch a call, sent as credits allow.

One `Shipper` serves one stream: one connection, one group, one lane. It runs on a thread of
its own, beside which a `Sender` has one; sealing and sending release the GIL. Memory: two buffers
that hold the largest record each, of which only what batches need is ever touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from vrep._core.seal import Sealer
from vrep.errors import FullError
from vrep.memory import large_pages
from vrep.source.bandwidth import Bandwidth
from vrep.source.effort import Effort
from vrep.source.feed import Feed
from vrep.source.sender import Sender
from vrep.wire.stream import Clock
from vrep.wire.transport import FrameTransport

__all__ = ["BUFFER_BYTES", "Shipper", "new_buffers"]

BATCH_BYTES: Final = 4 << 20
BATCH_FIRST_BYTES: Final = 64 << 10
"""of a stream: doubled each time that the target holds more, so that on a link which stays up for
moments only something arrives whole each time"""
BUFFER_BYTES: Final = (32 << 20) + (1 << 20)
"""the largest record sealed: 32 MiB in 256 pieces, their hashes, tags and words"""
TALLY_BYTES: Final = 256
IDLE_WAIT_S: Final = 0.2
GATHER_RECORDS: Final = 256
GATHER_S: Final = 0.004
"""a batch costs both ends some hundred microseconds, however small: while records keep coming,
few of them wait this long for more. A lone write is sent at once."""


def new_buffers() -> tuple[memoryview, memoryview]:
    """What one shipper needs; memory that is not touched costs nothing."""
    return memoryview(large_pages(BUFFER_BYTES)), memoryview(large_pages(BUFFER_BYTES))


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
        buffers: tuple[memoryview, memoryview] | None = None,
        allow: Callable[[int], None] = lambda _seq: None,
    ) -> None:
        """`buffers`, from `new_buffers`, are this shipper's until `join` has returned; `allow` is
        asked before records up to a seq are sent."""
        self._feed = feed
        self._sealer = sealer
        self._clock = clock
        self._effort = effort or Effort(sealer.level)
        self._sender = Sender(transport, channel, clock, bandwidth or Bandwidth(0))
        self._buffer, self._other = buffers or new_buffers()
        self._allow = allow
        self._stopping = False
        self._batch_bytes = BATCH_FIRST_BYTES
        self.records_sent = 0

    @property
    def bytes_sent(self) -> int:
        return self._sender.bytes_sent

    def stop(self) -> None:
        """Make `run` return soon; from any thread."""
        self._stopping = True
        self._sender.stop()

    def join(self) -> None:
        """Wait until nothing uses the buffers any more, after `run` and `stop`. What is being
        written ends with the connection."""
        self._sender.join()

    def acknowledged(self, *, progress: bool) -> None:
        """The peer granted more; whether it holds more than before."""
        if progress:
            self._batch_bytes = min(2 * self._batch_bytes, BATCH_BYTES)
        self._sender.granted()

    def open_stream(self, stream: object) -> None:
        """Send the STREAM record that opens this stream."""
        self._sender.send(self._buffer[: self._sealer.stream(stream, self._buffer)])

    def run(self) -> None:
        """Ship what follows the sealer's seq until stopped. Raises what the connection, the ring
        or the spill raise."""
        ring, sent_s, full = self._feed.ring, 0.0, False
        while not self._stopping:
            seq, asked_s = self._sealer.seq, self._clock.monotonic()
            ready = ring.wait(seq, IDLE_WAIT_S)
            self._effort.note(idle_s=self._clock.monotonic() - asked_s)
            if not ready:
                self._sender.settle()
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
        """Seal one batch, and send it, or have it sent while the next is sealed."""
        batch = self._seal(last)
        self._allow(self._sealer.seq)
        if self._sealer.seq < last:
            self._sender.hand_over(batch)
        else:
            self._sender.send(batch)
        self._buffer, self._other = self._other, self._buffer
        self._effort.note(waiting_s=self._sender.take_spent_s())

    def _seal(self, last: int) -> memoryview:
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
        sealed = self._sealer.stats()["bytes_plain"] - sealed
        self._effort.note(sealing_s=self._clock.monotonic() - began_s, count=sealed)
        return self._buffer[:written]
