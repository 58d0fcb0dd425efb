"""The store of one group: the writer's side.

``DIR/store/<group id>/`` holds manifests, segments, merged runs, pins of readers and a lock.
One process writes: it holds the lock, and its lease number stands in every manifest that it
creates, so a second one that did not see the lock still cannot replace a manifest of the
first. Opening a store always closes the segment that was open (its torn tail is cut, its
index written) and begins a new one under the new lease.

Records are appended unchanged and are durable when `durable` says so. Sizes are bytes.
Threads: `append` belongs to one thread at a time; everything else may be called by any.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vrep._core import layout, record
from vrep.durable import make_private_directory
from vrep.errors import (
    CorruptError,
    InvalidError,
    NotFoundError,
    StateError,
    StorageError,
    StoreFullError,
    VrepError,
)
from vrep.lanes import is_lane
from vrep.target import reign, runs
from vrep.target.aging import Steady, host_steady
from vrep.target.closing import close_open_segment
from vrep.target.files import Buffer, Files, is_full
from vrep.target.fold import Folded
from vrep.target.journal import Journal
from vrep.target.judge import judge_records
from vrep.target.lease import Lease
from vrep.target.lost import Range, read_lost
from vrep.target.manifest import (
    DiskEntry,
    EpochEntry,
    EpochState,
    Manifest,
    Position,
)
from vrep.target.reader import StoreReader
from vrep.target.reserve import Reserve
from vrep.target.segment import (
    Batch,
    SegmentId,
    SegmentWriter,
    entry_path,
    run_path,
    segment_path,
)
from vrep.target.span import Point, Span
from vrep.target.upkeep import Upkeep
from vrep.target.window import Usage

__all__ = [
    "DiskEntry",
    "EpochEntry",
    "EpochState",
    "GroupStore",
    "Position",
    "StoreOptions",
    "StoreReader",
    "StoreSpec",
    "store_path",
]

Structs = NDArray[np.void]
_ALL: Final = (1 << 64) - 1
NO_SITE: Final = bytes(16)
_LEFTOVER: Final = re.compile(r"\.(manifest|run|seg)-.*\.tmp")

log = logging.getLogger("vrep.target")


def store_path(directory: Path, group_id: bytes) -> Path:
    """Where the store of a group is, below a site's directory of stores."""
    return Path(directory) / group_id.hex()


@dataclass(frozen=True)
class StoreOptions:
    """Settings of a store."""

    commit_s: float = 0.01
    """under load, commits begin at most this far apart"""
    segment_bytes: int = 64 << 20
    reserve_bytes: int = 64 << 20
    """appending stops while the filesystem has less room, so that recovery can work"""
    reserve: Reserve | None = None
    """shared by the stores of one filesystem; None: `reserve_bytes` alone"""
    merge: bool = True
    """whether a thread merges indexes and folds"""
    fold_rate: int = 0
    """bytes a second that a fold may read and write; 0: no limit"""
    held: Callable[[bytes], Sequence[Position]] = lambda _group_id: ()
    """points of a group that are in use, so that no fold takes what they need"""


@dataclass(frozen=True)
class StoreSpec:
    """What a new store begins with."""

    name: str
    disks: Sequence[DiskEntry]
    epoch: EpochEntry
    wrapped_keys: Sequence[bytes] = ()


class GroupStore:
    """The only writer of a group's store. Open with `GroupStore.open`."""

    def __init__(
        self,
        directory: Path,
        group_id: bytes,
        lease: Lease,
        options: StoreOptions,
        files: Files,
        wall_ns: Callable[[], int],
    ) -> None:
        self.directory = directory
        self.group_id = group_id
        self.options = options
        self.durable = Position()
        """everything up to here is on stable storage"""
        self.received = Position()
        self._followed = Position()
        """the last that went on from a record held here: a stream may come alone, and then nobody
        who cannot read the indexes knows"""
        self.committed_ticket = 0
        """bytes appended (since it was opened) that are durable"""
        self._appended_ticket = 0
        self._lease = lease
        self._files = files
        self._reserve = options.reserve or Reserve(options.reserve_bytes)
        self._wall_ns = wall_ns
        self._order = record.Order()
        self._has_stream = False
        self._listeners: list[Callable[[], None]] = []
        self._writer: SegmentWriter
        self._span: Span
        self._closed = False
        self._newest_cut = Position()
        self._upkeep = Upkeep(
            directory,
            lease,
            files,
            wall_ns,
            segment_bytes=options.segment_bytes,
            reserve_bytes=lambda: self._reserve.kept(group_id),
            fold_rate=options.fold_rate,
            held=lambda: options.held(group_id),
            used=self.used_bytes,
            recoverable=self._may_begin,
            folded=self._note_fold,
        )
        self._journal = Journal(
            group_id.hex()[:8], self._commit, self._mark, self._notify, interval_s=options.commit_s
        )

    # ---- opening -------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        group_id: bytes,
        *,
        create: StoreSpec | None = None,
        options: StoreOptions | None = None,
        files: Files | None = None,
        wall_ns: Callable[[], int] = time.time_ns,
        steady: Callable[[], Steady] = host_steady,
    ) -> GroupStore:
        """Open the store of a group below `directory` (a site's ``store``) for writing.

        With `create` a missing one is created, an existing one raises ExistsError. LockedError
        when another process writes it; CorruptError, naming file and position, when something
        that was durable is damaged or missing.
        """
        if len(group_id) != 16:
            raise InvalidError("a group id has 16 bytes")
        path = store_path(Path(directory), group_id)
        files = files or Files()
        if create is None and not path.is_dir():
            raise NotFoundError(f"no store of group {group_id.hex()} in {directory}")
        make_private_directory(path)
        lease = Lease(path, group_id, files, wall_ns, steady)
        let_go = lease.close if create is None else lease.abandon
        try:
            store = cls(path, group_id, lease, options or StoreOptions(), files, wall_ns)
            if create is not None:
                store._create(create)
            store._recover()
        except OSError as error:
            let_go()
            if is_full(error):
                raise StoreFullError(f"{path}: {error.strerror}") from None
            raise StorageError(f"{path}: {error.strerror or error}") from None
        except BaseException:
            let_go()
            raise
        store._reserve.enter(group_id)
        store._journal.start()
        if store.options.merge:
            store._upkeep.start(group_id.hex()[:8])
        return store

    def _create(self, spec: StoreSpec) -> None:
        manifest = Manifest(
            group_id=self.group_id,
            store_id=secrets.token_bytes(16),
            name=spec.name,
            epochs=(spec.epoch,),
            disks=tuple(spec.disks),
            wrapped_keys=tuple(spec.wrapped_keys),
            segments=np.zeros(0, layout.MANIFEST_SEGMENT),
            runs=np.zeros(0, layout.MANIFEST_RUN),
            wall_ns=self._wall_ns(),
        )
        self._lease.create(manifest)

    def _recover(self) -> None:
        """Take the store over: close what was open, begin a segment under a new lease."""
        for leftover in self.directory.iterdir():
            if _LEFTOVER.fullmatch(leftover.name):
                self._files.unlink(leftover)
        manifest = self._lease.load()
        for segment in manifest.segments:
            path = entry_path(self.directory, segment)
            runs.check_file(path, int(segment["file_bytes"]))
        for run in manifest.runs:
            runs.check_file(run_path(self.directory, int(run["run"])), int(run["file_bytes"]))
        segments, last, stream = close_open_segment(
            self.directory, self.group_id, manifest, self._files, self._lease.aging.now_ns()
        )
        closed = int(segments["data_end"][len(manifest.segments) :].sum())
        received = manifest.received_bytes + closed
        self._begin(segments, last, stream, manifest.lease + 1, received)
        self.durable = self.received = last
        self._span = Span(self.directory, self.manifest)
        self._has_stream = stream is not None
        self._seed_order()
        self._lease.keep_spare()
        self._upkeep.drop_files()

    def _begin(
        self, segments: Structs, after: Position, stream: Any, lease: int, received_bytes: int
    ) -> None:
        """Create the next segment and the manifest that names it."""
        manifest = self.manifest
        number = manifest.next_segment
        path = segment_path(self.directory, number)
        ident = SegmentId(self.group_id, manifest.store_id, number, lease)
        writer = SegmentWriter(self._files, path, ident, after, stream, self._wall_ns())
        try:
            self._files.sync_directory(self.directory)
            self._lease.publish(
                segments=segments,
                active_segment=number,
                next_segment=number + 1,
                lease=lease,
                received_bytes=received_bytes,
            )
        except BaseException:
            writer.close()
            raise
        self._writer = writer

    # ---- what it is ------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def manifest(self) -> Manifest:
        """The newest manifest: immutable."""
        return self._lease.manifest

    @property
    def lease(self) -> int:
        return self.manifest.lease

    @property
    def disks(self) -> tuple[DiskEntry, ...]:
        """With the sizes that they had when the store was made."""
        return self.manifest.disks

    def disks_now(self) -> list[DiskEntry]:
        """The disks with the sizes that the newest durable records of the line give them."""
        sizes = self._span.sizes(self.manifest)
        return [replace(disk, bytes=sizes.get(disk.index, disk.bytes)) for disk in self.disks]

    @property
    def wrapped_keys(self) -> tuple[bytes, ...]:
        return self.manifest.wrapped_keys

    @property
    def epochs(self) -> tuple[EpochEntry, ...]:
        return self.manifest.epochs

    @property
    def failure(self) -> VrepError | None:
        """What ended writing; the store must be opened again."""
        return self._journal.failure

    @property
    def full(self) -> bool:
        """Whether records wait for room on the disk."""
        return self._journal.full

    @property
    def full_why(self) -> str:
        """What there is not enough of; empty while there is."""
        return self._journal.full_why

    @property
    def pending_bytes(self) -> int:
        return self._journal.pending_bytes

    def points(self) -> tuple[Point, Point] | None:
        """The oldest and the newest recovery point, both durable; None when there is none."""
        return self._span.points(self.manifest)

    @property
    def in_gap(self) -> bool:
        """Whether there are recovery points, and nothing behind them is one yet."""
        return self._span.in_gap(self.manifest)

    def note_cut(self, position: Position) -> None:
        """The source says that a cut over all lanes of the group, durable with each, has its mark
        here: history before it is not needed any more for what can be recovered."""
        if position <= self.durable:  # of what is not here nothing is believed
            self._newest_cut = max(self._newest_cut, position)

    def _may_begin(self, position: Position) -> bool:
        """Whether the history that is kept may begin at a position. That of a lane never begins
        behind the newest cut that is known, and nowhere while none is: what would be left then
        might be no point at all."""
        if is_lane(self.name) and position > self._newest_cut:
            return False
        return self._span.recoverable(self.manifest, position)

    def status(self) -> dict[str, Any]:
        """Figures for people and programs."""
        manifest, writer = self.manifest, self._writer
        failure = self.failure
        points = None if is_lane(manifest.name) else self.points()
        if len(manifest.segments):
            oldest = Position.of(manifest.segments[0]["first"])
        else:
            oldest = Position(*writer.builder.first)
        return {
            "group_id": self.group_id.hex(),
            "name": manifest.name,
            "oldest": str(oldest),
            "oldest_point": points[0].plain() if points else None,
            "newest_point": points[1].plain() if points else None,
            "received": str(self.received),
            "durable": str(self.durable),
            "received_seq": self.received.seq,
            "durable_seq": self.durable.seq,
            "epoch": manifest.current_epoch.epoch,
            "lease": manifest.lease,
            "segments": len(manifest.segments) + 1,
            "runs": len(manifest.runs),
            "bytes": self.used_bytes(),
            "records": int(manifest.segments["records"].sum()) + writer.builder.records,
            "pending_bytes": self.pending_bytes,
            "full": self.full,
            "failure": str(failure) if failure else "",
            "merge_failure": self._upkeep.failure,
            **self.usage().plain(),
            **self._upkeep.status(manifest),
        }

    def used_bytes(self) -> int:
        """Of segments and runs; without what only readers hold still."""
        manifest = self.manifest
        named = manifest.segments["file_bytes"].sum() + manifest.runs["file_bytes"].sum()
        return int(named) + self._writer.end

    def usage(self) -> Usage:
        """What the group uses of its window and quota."""
        points = self.points()
        oldest = points[0] if points else None
        growth = self._upkeep.growth
        manifest = self.manifest
        had_s = self._upkeep.horizon_had_s(manifest)
        used = self.used_bytes()
        return Usage.of(manifest, used, oldest, growth, self._wall_ns(), had_s)

    def listen(self, callback: Callable[[], None]) -> None:
        """Call back when `durable`, `full` or `failure` changed; from the thread that
        commits, so it must not wait."""
        self._listeners.append(callback)

    def unlisten(self, callback: Callable[[], None]) -> None:
        if callback in self._listeners:
            self._listeners.remove(callback)

    def _notify(self) -> None:
        for callback in tuple(self._listeners):
            callback()

    # ---- appending ---------------------------------------------------------------------

    def append(self, buffer: Buffer, *, check: Callable[[Structs], None] | None = None) -> int:
        """Take whole records, which must go on where the last ones ended. `buffer` is kept
        until it is durable and must not change. Returns a ticket: the records are durable
        when `committed_ticket` reached it.

        CorruptError when a record or the order is wrong, FencedError when its epoch is not
        the one that is accepted, and whatever `check` raises for the headers: nothing was
        taken then.
        """
        if self._closed:
            raise StateError("the store was closed")
        if not len(buffer):
            return self._appended_ticket
        try:
            found, consumed = record.scan(buffer, order=self._order)
            if consumed != len(buffer):
                raise CorruptError(f"a batch ends inside a record, at byte {consumed}")
            follows = self._follows()
            judge_records(self.manifest, found["header"], begun=self._has_stream, follows=follows)
            if check is not None:
                check(found)
            self._appended_ticket += consumed
            batch = Batch.of(buffer, found, self._appended_ticket)
            self._journal.put(batch)
        except BaseException:
            self._seed_order()
            raise
        self._has_stream = True
        self.received = batch.last
        if follows:
            self._followed = batch.last
        return batch.ticket

    def _follows(self) -> bool:
        """Whether the next record goes on from one that is held here: not when the current epoch
        has none yet, and left its parent at one that was written to another site."""
        epoch, here = self.manifest.current_epoch, self.received
        if here.epoch == epoch.epoch and (here.seq > epoch.parent.seq or here == self._followed):
            return True
        return here == epoch.parent or self._span.holds(self.manifest, epoch.parent)

    def _seed_order(self) -> None:
        self._order = record.Order()
        if self.received.epoch:
            epoch, lane, seq = self.received
            self._order.seed(epoch=epoch, lane=lane, seq=seq)

    def commit(self, timeout_s: float = 60.0) -> Position:
        """Wait until everything that was appended is durable; the last position."""
        self._journal.flush(timeout_s)
        return self.durable

    def _commit(self, batches: Sequence[Batch]) -> None:
        """Make batches durable; on the journal's thread."""
        batches = self._of_current_epoch(batches)
        try:
            if self._writer.end >= self.options.segment_bytes:
                self._rotate()
            room = self._files.free_bytes(self.directory)
            need = sum(len(batch.buffer) for batch in batches)
            quota = self.manifest.quota_bytes
            if quota and need and self.used_bytes() > quota:
                # Judged before a commit, whatever it holds: one that is refused is one for which
                # the window becomes shorter.
                self._upkeep.wake()
                raise StoreFullError(f"the group's quota of {quota} bytes is used up")
            if not self._reserve.admit(self.group_id, room, need):
                kept = self._reserve.kept(self.group_id)
                raise StoreFullError(
                    f"{room} bytes are free on the store's filesystem, of which {kept} are kept "
                    "for recovery and for other groups (reserve_bytes, group_reserve_bytes)"
                )
            end = self._write(batches)
        except OSError as error:
            if is_full(error):
                raise StoreFullError(f"{self.directory}: {error.strerror}") from None
            raise StorageError(f"{self.directory}: {error.strerror or error}") from None
        writer = self._writer
        try:
            writer.sync()
        except OSError as error:
            # The kernel may have dropped the pages: a second sync would prove nothing.
            raise StorageError(
                f"{writer.path.name} could not be synced ({error.strerror or error}): nothing "
                f"after {self.durable} is acknowledged before it was read back"
            ) from None
        self._lease.check()
        writer.committed(batches, end)
        if batches:
            self.durable = writer.last
            self.committed_ticket = batches[-1].ticket
            self._span.add(batches)
        self._notify()

    def _of_current_epoch(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Without those that waited for room while their epoch ended: nobody was told that
        they are durable, and nothing is written for a writer that is fenced."""
        epoch = self.manifest.current_epoch.epoch
        kept = [batch for batch in batches if batch.last.epoch == epoch]
        if len(kept) < len(batches):
            log.warning(
                "%s: %d batches of an epoch that ended are dropped",
                self.directory,
                len(batches) - len(kept),
            )
            self.committed_ticket = batches[len(batches) - len(kept) - 1].ticket
            if self.received.epoch != epoch:
                self.received = self.durable
                self._seed_order()
        return kept

    def _write(self, batches: Sequence[Batch]) -> int:
        try:
            return self._writer.write(batches, self.durable, self._wall_ns())
        except OSError:
            self._writer.cut()
            raise

    def _mark(self) -> None:
        """An empty commit: its block says that all before it is durable, so that damage to
        the last records of a quiet group is noticed too."""
        try:
            self._commit(())
        except StoreFullError:
            return  # it comes with the next records

    # ---- segments and runs ---------------------------------------------------------------

    def _rotate(self) -> None:
        """Close the segment and begin the next. May be repeated after a full disk."""
        with self._lease.lock:
            old = self._writer
            old.builder.aged(self._lease.aging.now_ns())
            entry = old.seal()
            segments = np.append(self.manifest.segments, entry.reshape(1))
            received = self.manifest.received_bytes + old.end
            self._begin(segments, old.last, old.builder.stream, self.manifest.lease, received)
            old.forget()
            old.close()
        self._upkeep.wake()

    def merge_once(self) -> bool:
        """Merge one set of neighbours, if there is one; for tests without the thread."""
        return self._upkeep.merge_once()

    # ---- epochs ----------------------------------------------------------------------------

    @property
    def salvaged(self) -> bool:
        """Whether the history ends with what a repair salvaged, of which its source does not know
        yet: it must compare what was lost before anything that follows is a recovery point."""
        return self._repaired() is not None

    def _repaired(self) -> Position | None:
        here = self.received
        epoch = self.manifest.current_epoch
        return self._span.repaired(
            self.manifest, here if here.epoch == epoch.epoch else epoch.parent
        )

    def lost(self) -> list[Range] | None:
        """Of a history that was salvaged: what its source must compare; None: everything."""
        at = self._repaired()
        if at is None:
            return None
        return read_lost(self.directory, self.group_id, self.manifest.store_id, at)

    def resume_position(self) -> Position:
        """Where the writer of the current epoch goes on."""
        epoch = self.manifest.current_epoch
        if self.received.epoch == epoch.epoch:
            return self.received
        return Position(epoch.epoch, self.manifest.lane, epoch.parent.seq)

    def add_epoch(
        self,
        *,
        writer: bytes,
        parent: Position,
        state: EpochState = EpochState.ACCEPTED,
        epoch_id: bytes | None = None,
    ) -> EpochEntry:
        """Append an epoch, durably: from here on no other writer is heard."""
        with self._lease.lock:
            entry = reign.successor(
                self.manifest,
                self.durable,
                writer=writer,
                parent=parent,
                state=state,
                epoch_id=epoch_id,
                wall_ns=self._wall_ns(),
            )
            # Who gave the group up is the accepted writer before: of a new one that is not true.
            given_up = self.manifest.unprotected and entry.state is not EpochState.ACCEPTED
            self._lease.publish(epochs=(*self.manifest.epochs, entry), unprotected=given_up)
            return entry

    def _end_of_line(self) -> Position:
        """The last durable position of the current epoch's line. Of an epoch that wrote to another
        site only, the last record here may be one that its line left behind."""
        manifest, durable = self.manifest, self.durable
        line = dict(manifest.ancestry(manifest.end_of(manifest.current_epoch.epoch)))
        if durable.epoch and durable.epoch not in line:
            raise StateError(f"{durable} does not lie on the line of the current epoch")
        return durable._replace(seq=min(durable.seq, line.get(durable.epoch, 0)))

    def raise_epoch(
        self, *, writer: bytes, parent: Position | None, state: EpochState
    ) -> EpochEntry:
        """`add_epoch`, at the last durable position without a parent; once, however often it is
        asked for."""
        with self._lease.lock:
            known = reign.undecided(self.manifest, writer, parent, state)
            if known is not None:
                return known
            where = self._end_of_line() if parent is None else parent
            return self.add_epoch(writer=writer, parent=where, state=state)

    def follow(self, epochs: Sequence[EpochEntry]) -> None:
        """Learn, durably, of epochs that were raised at the other site; see `reign.followed`."""
        with self._lease.lock:
            known = self.manifest.epochs
            after = reign.followed(known, epochs)
            if after != known:
                self._lease.publish(epochs=after, unprotected=False)

    def set_epoch_state(self, epoch: int, state: EpochState) -> EpochEntry:
        """Change how an epoch stands, durably. The writer of one that is accepted has not given
        the group up, whatever the writer before it did."""
        with self._lease.lock:
            entry = replace(self.manifest.epoch(epoch), state=EpochState(state))
            self._lease.publish(
                epochs=tuple(entry if e.epoch == epoch else e for e in self.manifest.epochs),
                unprotected=self.manifest.unprotected and entry.state is not EpochState.ACCEPTED,
            )
            return entry

    def accept_epoch(self, epoch: int) -> EpochEntry:
        """Keep a provisional epoch. Nothing happens when it is kept already; StateError when
        it was given up, or another one came after it."""
        with self._lease.lock:
            entry = self.manifest.epoch(epoch)
            if entry is not self.manifest.current_epoch:
                raise StateError(f"epoch {epoch} is not the current one")
            if entry.state is EpochState.ACCEPTED:
                return entry
            return self.set_epoch_state(epoch, EpochState.ACCEPTED)

    def roll_back_epoch(self, epoch: int) -> EpochEntry:
        """Abandon a provisional epoch and, in the same step, give the group back to the writer
        before it. Nothing happens when that was done already."""
        with self._lease.lock:
            epochs = reign.given_back(self.manifest, epoch, self.durable, self._wall_ns())
            if epochs != self.manifest.epochs:
                self._lease.publish(epochs=epochs)
            return self.manifest.current_epoch

    # ---- what is kept ------------------------------------------------------------------

    def set_horizon(self, horizon: Position) -> None:
        """Keep recovery points from here on only, durably. StateError when it is no recovery
        point of the accepted line, or not behind the horizon that there is; a provisional epoch
        keeps what it began from."""
        with self._lease.lock:
            manifest = self.manifest
            if horizon == manifest.horizon:
                return
            reign.check_horizon(manifest, horizon)
            if not self._span.recoverable(manifest, horizon):
                raise StateError(f"{horizon} is not a recovery point of the accepted line")
            self._lease.publish(horizon=horizon)
        self._upkeep.wake()

    def fold(self, horizon: Position) -> list[Folded]:
        """Keep recovery points from here on only, and fold all that is before, now. Only for a
        store whose options have no `merge`: its thread does it else."""
        if self.options.merge:
            raise StateError("the store's own thread folds it")
        self.set_horizon(horizon)
        done = []
        while (step := self._upkeep.fold_once()) is not None:
            done.append(step)
        return done

    def set_limits(self, window_s: int, quota_bytes: int) -> None:
        """What the source asks for, durably; 0: no limit. A longer window brings nothing back
        that was folded."""
        now = (self.manifest.window_s, self.manifest.quota_bytes)
        if (window_s, quota_bytes) != now:
            self._lease.publish(window_s=window_s, quota_bytes=quota_bytes)
            self._upkeep.wake()

    def _note_fold(self) -> None:
        self._span.folded(self.manifest)

    def set_wrapped_keys(self, keys: Sequence[bytes]) -> None:
        """Replace the wrapped data keys, durably."""
        if tuple(keys) != self.manifest.wrapped_keys:
            self._lease.publish(wrapped_keys=tuple(keys))

    def set_unprotected(self, unprotected: bool) -> None:
        """Note whether the source still protects the group."""
        if unprotected != self.manifest.unprotected:
            self._lease.publish(unprotected=unprotected)

    # ---- end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop, without waiting for what is not durable yet, and let go of the lock."""
        if self._closed:
            return
        self._closed = True
        self._reserve.leave(self.group_id)
        self._journal.close()
        self._upkeep.close()
        self._writer.close()
        self._lease.close()

    def __enter__(self) -> GroupStore:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
