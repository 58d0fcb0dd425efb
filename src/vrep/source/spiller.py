"""Spiller: drains a ring that fills faster than its target takes it.

Past `HIGH` of the ring it seals the oldest records into the spill and lets the filter have
their memory, until `LOW` is left: history stays whole while a target is slow or gone. It runs
beside the session, connected or not. While a target takes records it waits longer, but not
for a ring that is about to be full. Only when the spill is full, or fails, is the ring left to
overflow, which the filter answers with a gap.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import structlog

from vrep._core.seal import Sealer
from vrep.errors import (
    FullError,
    InvalidError,
    RangeError,
    StoreFullError,
    UnsupportedError,
    VrepError,
)
from vrep.memory import large_pages
from vrep.source.attach import RingHold
from vrep.source.feed import Feed
from vrep.source.spill import Spill, SpillKeys

__all__ = ["Spiller", "Work"]

HIGH: Final = 5 / 8
"""of the ring's memory or descriptors; above the half that resync copies leave to the guest"""
LOW: Final = 1 / 2
HIGH_CONNECTED: Final = 7 / 8
LOW_CONNECTED: Final = 3 / 4
"""the same while a target takes records: sealing and syncing them here slows down the shipping
that empties the ring"""
HEADROOM_S: Final = 0.08
"""a ring that is full in less, at the pace at which it fills, is drained before `HIGH_CONNECTED`"""
POLL_S: Final = 0.05
POLL_NEAR_S: Final = 0.01
"""the same above `LOW`"""
PACE_S: Final = 0.02
"""a pace is measured over no less"""
BATCH_BYTES: Final = 4 << 20
BUFFER_BYTES: Final = (32 << 20) + (1 << 20)
"""the largest record, sealed"""
PAUSE_FULL_S: Final = 1.0
RENEW_EVERY_S: Final = 0.5
STOP_S: Final = 5.0

log = structlog.get_logger("vrep.source")


@dataclass(frozen=True)
class Work:
    """What to drain, and how to seal it."""

    hold: RingHold
    feed: Feed
    keys: SpillKeys
    stream: Callable[[], Any]
    """a STREAM struct without its ids"""
    epoch: int
    level: int


class Pace:
    """How fast a ring fills, in rings a second; below 0 while it empties."""

    def __init__(self) -> None:
        self.value = 0.0
        self._level = self._at_s = 0.0

    def note(self, level: float, now_s: float) -> None:
        passed_s = now_s - self._at_s
        if passed_s < PACE_S:
            return
        self.value = (level - self._level) / passed_s
        self._level, self._at_s = level, now_s


class Spiller:
    """One group's spiller, on a thread of its own, from `start` to `stop`."""

    def __init__(self, group: str, spill: Spill) -> None:
        self.group = group
        self.spill = spill
        self.full = ""
        """why nothing more is spilled; empty: it is not full"""
        self.connected = False
        """whether a target takes records"""
        self.draining = False
        """whether the ring is above the level to which it is drained"""
        self.durable = 0
        """what the target holds: its files are not needed any more"""
        self.renew: Callable[[], None] = lambda: None
        """asked for another ring when there is none, or its filter is gone: gives it by `take`"""
        self._renewed_s = 0.0
        self._pace = Pace()
        self._poll_s = POLL_S
        self._work: Work | None = None
        self._gate = threading.Lock()
        self._stopping = threading.Event()
        self._buffer = memoryview(large_pages(BUFFER_BYTES))
        self._thread = threading.Thread(target=self._run, name=f"spill:{group}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End it; a disk that hangs is not waited for."""
        self._stopping.set()
        self._thread.join(STOP_S)
        if not self._thread.is_alive():
            self.spill.close()

    def take(self, work: Work | None) -> None:
        """Drain another ring, or none: when this returns, nothing reads the one before."""
        with self.still():
            self._work = work

    _leave = False

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Nothing is drained meanwhile."""
        self._leave = True
        with self._gate:
            self._leave = False
            yield

    def _run(self) -> None:
        pause_s = POLL_S
        while not self._stopping.wait(pause_s):
            try:
                self._find_ring()
                with self._gate:
                    self.step()
                pause_s = PAUSE_FULL_S if self.full else self._poll_s
            except (VrepError, OSError) as error:
                self._note_full(str(error))
                pause_s = PAUSE_FULL_S
            except Exception as error:
                log.exception("spilling failed", group=self.group)
                self._note_full(str(error) or type(error).__name__)
                pause_s = PAUSE_FULL_S

    def _find_ring(self) -> None:
        now = time.monotonic()
        if now - self._renewed_s < RENEW_EVERY_S:
            return
        self._renewed_s = now
        with self._gate:
            held = self._work is not None and self._work.hold.alive()
        if not held:  # not behind the gate: who gives another ring wants it still
            self.renew()

    def step(self) -> None:
        """Drain as much as there is to drain now; for the thread, and for tests."""
        self._drop()
        work = self._work
        if work is None or not work.hold.alive() or self._broken(work):
            return
        while not self._stopping.is_set() and not self._leave:
            try:
                level = self._level(work)
            except VrepError as error:  # the filter is gone; whoever attaches again says so
                log.debug("filter not reached", group=self.group, error=str(error))
                return
            self.draining = self._due(level, time.monotonic())
            if not self.draining:
                self._look_for_room()
                return
            begins = not self.spill.last
            try:
                self.spill.check_room(BATCH_BYTES)
                if not self._drain(work):
                    return
            except StoreFullError as error:
                self._note_full(error.detail)
                return
            self.full = ""
            if begins:
                log.warning("spilling begins: the target is slow or gone", group=self.group)

    def _due(self, level: float, now_s: float) -> bool:
        """Whether the ring is to be drained, which is `level` full."""
        self._pace.note(level, now_s)
        self._poll_s = POLL_NEAR_S if level >= LOW else POLL_S
        if not self.connected:
            return level >= (LOW if self.draining else HIGH)
        if level >= LOW_CONNECTED and level + self._pace.value * HEADROOM_S >= 1:
            return True
        return level >= (LOW_CONNECTED if self.draining else HIGH_CONNECTED)

    @staticmethod
    def _level(work: Work) -> float:
        """How full the ring is, of memory or descriptors, from 0 to 1."""
        ring = work.feed.ring
        kept = ring.head - work.feed.floor
        if not kept:
            return 0.0
        try:
            memory = 1 - ring.free_bytes / ring.payload_bytes
        except UnsupportedError:  # a filter of an older release is asked
            status = work.hold.status()
            memory = 1 - int(status["ring_free_bytes"]) / int(status["ring_bytes"])
        return max(memory, kept / ring.capacity)

    def _broken(self, work: Work) -> bool:
        """Whether records between the spill and the ring are lost: the session makes that a gap
        when it is connected, and until then nothing can go on behind the spill."""
        last, floor = self.spill.last, work.feed.floor
        return bool(last) and last < floor and last > self.durable and not work.hold.jumps(floor)

    def _drain(self, work: Work) -> bool:
        """One batch. False when what follows the spill was acknowledged meanwhile."""
        feed, spill = work.feed, self.spill
        after = spill.last or feed.floor
        if not spill.last and work.hold.jumps(feed.floor):
            after = min(after, self.durable)  # it may follow whatever the target holds then
        sealer = spill.sealer(work.keys, work.stream(), work.epoch, after, work.level)
        with feed.lock:
            try:
                written = self._seal(work, sealer, feed.floor + 1)
            except (InvalidError, RangeError):
                spill.abandon()
                return False
            except BaseException:
                spill.abandon()
                raise
        try:
            spill.check_room(written)  # a record may be larger than what was asked for
        except StoreFullError:
            spill.abandon()
            raise
        spill.append(self._buffer[:written])
        feed.report(spilled=sealer.seq)
        return True

    def _seal(self, work: Work, sealer: Sealer, first: int) -> int:
        ring = work.feed.ring
        try:
            return sealer.seal_ring(ring, first, ring.head, self._buffer[:BATCH_BYTES])[0]
        except FullError:  # one record larger than a batch
            return sealer.seal_ring(ring, first, first, self._buffer)[0]

    def _drop(self) -> None:
        held, used = self.spill.last, self.spill.bytes
        self.spill.drop(self.durable)
        if self.spill.bytes < used:
            self.full = ""  # until the next attempt says so again
        if held and not self.spill.last:
            log.info("all that was spilled is durable at the target", group=self.group)

    def _look_for_room(self) -> None:
        """It is not full any more when there is room, although nothing is to be drained now."""
        if self.full:
            with contextlib.suppress(StoreFullError):
                self.spill.check_room(BATCH_BYTES)
                self.full = ""

    def _note_full(self, why: str) -> None:
        if why != self.full:
            log.warning("nothing more can be spilled", group=self.group, reason=why)
        self.full = why
