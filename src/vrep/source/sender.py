"""Sender: the sending half of shipping, so that a batch can be sealed while the last one leaves.

Sealing and encrypting for the link cost a processor about the same. A batch with more behind it
is handed over to a thread of its own; a lone one is sent by who sealed it, without a thread's
waking up. Batches leave in the order in which they come, one at a time. Times are seconds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from vrep import threads
from vrep.errors import StateError
from vrep.source.bandwidth import Bandwidth
from vrep.wire.frames import PAYLOAD_BYTES_MAX
from vrep.wire.stream import Clock
from vrep.wire.transport import FrameTransport

__all__ = ["Sender"]

CREDIT_WAIT_S: Final = 0.5


class Sender:
    """Sends what one thread gives it, as credits and bandwidth allow, until stopped."""

    def __init__(
        self, transport: FrameTransport, channel: int, clock: Clock, bandwidth: Bandwidth
    ) -> None:
        self._transport = transport
        self._channel = channel
        self._clock = clock
        self._bandwidth = bandwidth
        self._change = threading.Condition()
        self._stopping = False
        self._batch: memoryview | None = None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._spent_s = 0.0
        self.bytes_sent = 0

    def stop(self) -> None:
        """End what waits, soon; from any thread."""
        with self._change:
            self._stopping = True
            self._change.notify_all()

    def granted(self) -> None:
        """The peer granted more."""
        with self._change:
            self._change.notify_all()

    def join(self) -> None:
        """Wait for the thread, after `stop`: at most as long as one write may stall."""
        if self._thread is not None:
            self._thread.join()
        self._failure = None  # with it goes what its frames hold

    def send(self, batch: memoryview) -> None:
        """Send on this thread, after all that was handed over."""
        self.settle()
        with self._timed():
            self._send(batch)

    def hand_over(self, batch: memoryview) -> None:
        """Send on the other thread, once what was handed over before has left. The batch is this
        sender's until the next call of any kind but `take_spent_s` has returned."""
        self.settle()
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="send", daemon=True)
            threads.start(thread)
            self._thread = thread
        with self._change:
            self._batch = batch
            self._change.notify_all()

    def settle(self) -> None:
        """Wait until what was handed over has left. Raises what kept it from that."""
        with self._change:
            while self._batch is not None and self._failure is None:
                self._change.wait()
        if self._failure is not None:
            raise self._failure

    def take_spent_s(self) -> float:
        """How long sending took since this was asked for last."""
        with self._change:
            spent_s, self._spent_s = self._spent_s, 0.0
            return spent_s

    def _run(self) -> None:
        try:
            while True:
                with self._change:
                    while self._batch is None and not self._stopping:
                        self._change.wait()
                    batch = self._batch
                if batch is None:
                    return
                with self._timed():
                    self._send(batch)
                with self._change:
                    self._batch = None
                    self._change.notify_all()
        except BaseException as error:  # noqa: BLE001 - handed to who gave the batch
            with self._change:
                self._failure = error
                self._change.notify_all()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began_s = self._clock.monotonic()
        yield
        with self._change:
            self._spent_s += self._clock.monotonic() - began_s

    def _send(self, batch: memoryview) -> None:
        """In frames, each within the credit that there is."""
        at = 0
        while at < len(batch):
            count = min(len(batch) - at, PAYLOAD_BYTES_MAX, self._wait_credit())
            count = self._wait_turn(count)
            more = at + count < len(batch)
            self._transport.send_data(self._channel, [batch[at : at + count]], more=more)
            at += count
            self.bytes_sent += count

    def _wait_turn(self, count: int) -> int:
        """How many of these bytes may go now, once they may."""
        count = self._bandwidth.turn_bytes(count)
        deadline = self._clock.monotonic() + self._bandwidth.take(count)
        with self._change:
            while not self._stopping:
                left_s = deadline - self._clock.monotonic()
                if left_s <= 0:
                    return count
                self._change.wait(left_s)
        raise StateError("shipping was stopped")

    def _wait_credit(self) -> int:
        with self._change:
            while not self._stopping:
                available = self._transport.connection.credit(self._channel)
                if available > 0:
                    return available
                self._change.wait(CREDIT_WAIT_S)
        raise StateError("shipping was stopped")
