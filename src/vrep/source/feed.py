"""Feed: where a shipper's records come from, and how the ring's memory is let go of.

Records come from the spill as long as it has what follows, then from the ring. `floor` is the
seq below which the ring holds nothing that may still be read: what was reported durable or
spilled, the filter uses again at any moment. So whoever reads the ring's memory holds the lock,
and whoever reports such a position takes it too.
"""

from __future__ import annotations

import threading
from typing import Final

from vrep._core.ring import RingReader
from vrep._core.seal import Sealer
from vrep.errors import CorruptError
from vrep.memory import large_pages
from vrep.source.spill import Batch, Spill, SpillKeys

__all__ = ["Feed"]

ROOM_BYTES: Final = 32 << 20
"""data of the largest record"""


class Feed:
    """One attachment to a ring, with the spill of its group, if there is one."""

    def __init__(self, ring: RingReader, spill: Spill | None, keys: SpillKeys | None) -> None:
        self.ring = ring
        self.spill = spill
        self.lock = threading.Lock()
        self.keys = keys
        self._floor = ring.released
        self._damaged: int | None = None
        # Of the shipping thread: an open commit of the spill, and how much of it is sealed.
        self._room = memoryview(b"")
        self._batch = Batch.empty()
        self._next, self._after = 0, 0

    @property
    def floor(self) -> int:
        """Everything above is in the ring."""
        return max(self._floor, self.ring.released)

    @property
    def oldest(self) -> int:
        """The seq that the first record follows that this source still has."""
        spill = self.spill
        return spill.after if spill is not None and spill.last else self.floor

    def reaches(self, after: int) -> bool:
        """Whether every record that follows `after` is here."""
        floor = self.floor
        if after >= floor:
            return True
        spill = self.spill
        return spill is not None and spill.after <= after and spill.last >= floor

    def mend(self, after: int) -> None:
        """Forget what was spilled and cannot be shipped to a target that holds what is up to
        `after`: it lies behind damage that was found, or behind a hole. Nobody else uses the feed
        or the spill meanwhile."""
        spill, damaged, self._damaged = self.spill, self._damaged, None
        if spill is None:
            return
        if damaged is not None:
            spill.cut(damaged)
        if spill.after > after:
            spill.cut(0)

    def drop(self) -> None:
        """Forget all that was spilled. Nobody else uses the feed or the spill meanwhile."""
        self._damaged = None
        if self.spill is not None:
            self.spill.cut(0)

    def report(self, *, received: int = 0, durable: int = 0, spilled: int = 0) -> None:
        """Tell the filter what the target has, and what the spill holds for it."""
        with self.lock:
            self._floor = max(self._floor, durable, spilled)
            self.ring.set(received=received, durable=durable, spilled=spilled)

    def seal(self, sealer: Sealer, last: int, room: memoryview) -> tuple[int, int]:
        """Seal records that follow the sealer's seq, none above `last`, into `room`; how many
        bytes and records. FullError when the first one does not fit, InvalidError when what
        follows is not here, CorruptError when it is damaged: then `mend` before the next."""
        after = sealer.seq
        with self.lock:
            if after >= self.floor:
                return sealer.seal_ring(self.ring, after + 1, last, room)
        if self._fill(after):
            batch, at = self._batch, self._next
            written, done = sealer.seal(
                batch.headers[at:], batch.payload[int(batch.starts[at]) :], room
            )
            self._next, self._after = at + done, sealer.seq
            return written, done
        with self.lock:  # the spill ends before the ring begins: only a jump may follow
            return sealer.seal_ring(self.ring, self.floor + 1, last, room)

    def _fill(self, after: int) -> bool:
        """Make the record that follows `after` the next of the open batch; whether there is one."""
        if self.spill is None or self.keys is None:
            return False
        if self._after == after and self._next < len(self._batch.headers):
            return True
        if not self._room:
            self._room = memoryview(large_pages(ROOM_BYTES))
        try:
            self._batch = self.spill.batch(after, self.keys, self._room)
        except CorruptError:
            self._damaged = after
            raise
        self._next, self._after = 0, after
        return len(self._batch.headers) > 0
