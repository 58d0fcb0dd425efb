"""Base: what the old site of a group holds on its disks, put into its store before others go on.

A site that gave a group up has the disks that it wrote, while its store lacks what it wrote
itself: all of it, where the site never was a target. A program (`vrep.recovery.base`), which holds
the tenant's key as the source did, seals what those disks hold and the store does not show. This
module appends its output unread, as it appends what a source sends, in the last epoch of the
site's own, up to the position where the new writer left it.

Nothing of it is a recovery point. It stands in a gap which only the new writer ends, when every
block was compared with what is here, or sent. So a base may be cut off anywhere, and may hold what
was not taken over. The store follows the new epochs only when the base has ended: with a record at
the fork, so that the history goes on from there.

Sizes are bytes.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import IO, Any, Final

import msgspec
import numpy as np

from vrep import threads
from vrep._core import layout, record
from vrep.errors import CorruptError, StateError, StorageError, VrepError
from vrep.lanes import lane_of
from vrep.target.manifest import DiskEntry, EpochEntry, Position
from vrep.target.reign import followed, left_at, passes
from vrep.target.store import GroupStore, StoreSpec

__all__ = [
    "BASE_FRAME",
    "FRAME_BYTES_MAX",
    "FRAME_END",
    "BaseDesk",
    "BaseDisk",
    "BaseOffer",
    "BasePlan",
    "end_before",
]

BASE_FRAME: Final = struct.Struct("<QQI")
"""before each batch of records that the program writes: how far it is and will be, the bytes that
follow"""
FRAME_END: Final = (1 << 32) - 1
"""in place of a size: all is written"""
FRAME_BYTES_MAX: Final = 64 << 20
PENDING_BYTES_MAX: Final = 32 << 20
COMMIT_S: Final = 120.0
STOP_S: Final = 10.0
SEQS_MIN: Final = 3
"""a gap-begin, one copy, and the record at the fork"""

log = logging.getLogger("vrep.target")


class BaseDisk(msgspec.Struct, frozen=True):
    """An old disk: a file or a block device."""

    name: str
    path: str
    bytes: int
    index: int


class BasePlan(msgspec.Struct, frozen=True):
    """What the program is asked for, as JSON on its standard input."""

    group_id: str
    name: str
    epoch: int
    epoch_id: str
    parent: Position
    after: int
    """the seq behind which it begins"""
    last: int
    """the seq of the fork"""
    disks: list[BaseDisk]
    wrapped_keys: list[bytes]
    compression: int
    wall_ns: int
    """the time of its records: when the new writer took over, by its clock, so that no clock jumps
    between them and what follows"""


class BaseOffer(msgspec.Struct, frozen=True):
    """What a site that gives a group up can seal."""

    name: str
    left: Position
    """where the new writer left the site's last epoch"""
    disks: list[BaseDisk]
    wrapped_keys: list[bytes]
    """those that the new writer holds"""
    compression: int
    command: list[str]

    def spec(self, epoch: EpochEntry) -> StoreSpec:
        """Of a store that is not there yet; the new writer tells the sizes anew."""
        disks = [DiskEntry(disk.name, disk.bytes, disk.index) for disk in self.disks]
        return StoreSpec(self.name, disks, epoch, self.wrapped_keys)

    def own(self, epochs: Sequence[EpochEntry]) -> list[EpochEntry]:
        """The epochs up to the site's last one."""
        return [entry for entry in epochs if entry.epoch <= self.left.epoch]


class Base:
    """One base in the making, on a thread of its own."""

    def __init__(
        self, store: GroupStore, plan: BasePlan, command: Sequence[str], writer: bytes
    ) -> None:
        self.done, self.total = 0, 1
        self.writer = writer
        """the site that waits for it"""
        self._store = store
        self._plan = plan
        self._error: VrepError = StateError("what the old disks hold is not sealed yet")
        self._ended = self._stopped = False
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise StorageError(f"{command[0]} cannot be run: {error.strerror or error}") from None
        self._thread = threading.Thread(
            target=self._run, name=f"base:{plan.group_id[:8]}", daemon=True
        )
        threads.start(self._thread)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def progress(self) -> dict[str, int]:
        return {"done": self.done, "total": self.total}

    def check(self) -> None:
        """Raise what keeps the store from going on. That less was sealed than could be does not."""
        if not self._ended:
            raise self._error

    def stop(self) -> None:
        """End it where it is; from any thread."""
        self._stopped = True
        self._process.kill()
        self._thread.join(STOP_S)

    # ---- its thread ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._process:
                try:
                    whole = self._take()
                finally:
                    self._process.kill()
            if self._stopped:
                return
            if not whole:
                log.warning(
                    "group %s: not all of the old disks was sealed (status %s): the rest is sent",
                    self._store.name,
                    self._process.returncode,
                )
            self._store.commit(COMMIT_S)
            _end(self._store, self._plan.epoch, self._plan.last, self._plan.wall_ns)
            self._ended = True
        except VrepError as error:
            self._error = error
        except Exception as error:
            log.exception("group %s: the old disks are not sealed", self._store.name)
            self._error = StateError(f"the old disks cannot be sealed: {error}")

    def _take(self) -> bool:
        """Append what the program writes; whether it wrote all that it wanted to."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; what it wrote before counts
            self._process.stdin.write(msgspec.json.encode(self._plan))
            self._process.stdin.close()
        while not self._stopped:
            head = _read(self._process.stdout, BASE_FRAME.size)
            if head is None:
                return False
            self.done, self.total, size = BASE_FRAME.unpack(head)
            if size == FRAME_END:
                return True
            if size > FRAME_BYTES_MAX:
                raise CorruptError(f"a batch of {size} bytes")
            records = _read(self._process.stdout, size)
            if records is None:
                return False
            self._store.append(records, check=self._judge)
            if self._store.pending_bytes > PENDING_BYTES_MAX:
                self._store.commit(COMMIT_S)
        return False

    def _judge(self, found: Any) -> None:
        """A base claims nothing: no end of a gap, nothing past the fork."""
        headers = found["header"]
        if (headers["kind"] == layout.KIND_GAP_END).any():
            raise CorruptError("a base ends no gap")
        if (headers["seq"] >= self._plan.last).any():
            raise CorruptError("a base ends before the fork")


class BaseDesk:
    """The bases of one group, one at a time. The owner's lock is held to `seal`."""

    def __init__(self) -> None:
        self.now: Base | None = None
        """the last one, until it was asked what became of it"""

    @property
    def busy(self) -> bool:
        return self.now is not None and self.now.running

    def under_way(self, writer: bytes) -> dict[str, Any] | None:
        """What to tell the site that waits for a base that is being made."""
        base = self.now
        if base is None or not base.running or base.writer != writer:
            return None
        return {"base": base.progress()}

    def told(self) -> dict[str, Any]:
        """What to tell any other site meanwhile."""
        return {"base": {"done": 0, "total": 1}}

    def seal(
        self,
        store_of: Callable[[StoreSpec], GroupStore],
        epochs: Sequence[EpochEntry],
        offer: BaseOffer,
    ) -> dict[str, Any] | None:
        """See that what is offered is sealed before the store follows some epochs; None once that
        is so, or cannot be. Raises what keeps the store from going on: then it is begun anew when
        it is asked for again. `store_of` opens the store, or makes one."""
        if self.now is None:
            self.now = _begin(store_of(offer.spec(offer.own(epochs)[0])), epochs, offer)
        if self.busy:
            return self.under_way(epochs[-1].writer) or self.told()
        base, self.now = self.now, None
        if base is not None:
            base.check()
        return None

    def stop(self) -> None:
        """End it where it is; without the lock."""
        if self.now is not None:
            self.now.stop()


def _begin(store: GroupStore, epochs: Sequence[EpochEntry], offer: BaseOffer) -> Base | None:
    """Let the program begin; None when the store followed already, or has no place for a base."""
    own = offer.own(epochs)
    mine = own[-1]
    if mine.epoch != offer.left.epoch or store.manifest.current_epoch.epoch > mine.epoch:
        return None
    store.follow(own)
    store.set_wrapped_keys(offer.wrapped_keys)
    here = store.received
    after = here.seq if here.epoch == mine.epoch else mine.parent.seq
    plan = BasePlan(
        group_id=store.group_id.hex(),
        name=store.name,
        epoch=mine.epoch,
        epoch_id=mine.epoch_id.hex(),
        parent=mine.parent,
        after=after,
        last=offer.left.seq,
        disks=offer.disks,
        wrapped_keys=offer.wrapped_keys,
        compression=offer.compression,
        wall_ns=epochs[-1].wall_ns,
    )
    if offer.left.seq - after < SEQS_MIN:
        _end(store, plan.epoch, plan.last, plan.wall_ns)
        return None
    return Base(store, plan, offer.command, epochs[-1].writer)


def _read(stream: IO[bytes], size: int) -> bytes | None:
    """So many bytes; None when the stream ended before."""
    data = stream.read(size)
    return data if len(data) == size else None


def end_before(store: GroupStore, epochs: Sequence[EpochEntry]) -> None:
    """What a store needs before it follows some epochs, whatever became of a base: where its own
    history ends short of the place where their line left it, it goes up to there. StateError when
    they do not go on from what is here."""
    here, epoch = store.received, store.manifest.current_epoch.epoch
    followed(store.epochs, epochs)
    if here.epoch != epoch or not passes(epochs, epoch):
        return
    left = left_at(epochs, epoch)
    if here.seq < left.seq:
        _end(store, epoch, left.seq, epochs[-1].wall_ns)


def _end(store: GroupStore, epoch: int, last: int, wall_ns: int) -> None:
    """The history of the epoch goes up to the fork, if it begins at all: a gap-begin that jumps
    there, which needs no key."""
    here = store.received
    if here.epoch == epoch and here.seq < last:
        headers = np.zeros(1, layout.RECORD)
        headers["magic"], headers["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
        headers["kind"], headers["flags"] = layout.KIND_GAP_BEGIN, layout.RECORD_JUMP
        headers["epoch"], headers["lane"] = epoch, lane_of(store.name)
        headers["seq"], headers["wall_ns"] = last, wall_ns
        record.finish(headers)
        store.append(headers.tobytes())
    store.commit(COMMIT_S)
