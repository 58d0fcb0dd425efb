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
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vrep._core import layout, record
from vrep._core.index import Index
from vrep.durable import make_private_directory
from vrep.errors import (
    CorruptError,
    FencedError,
    InvalidError,
    NotFoundError,
    StateError,
    StorageError,
    StoreFullError,
    UnsupportedError,
    VrepError,
)
from vrep.target import reign, runs
from vrep.target.files import Buffer, Files, is_full
from vrep.target.journal import Journal
from vrep.target.lease import Lease
from vrep.target.manifest import (
    DiskEntry,
    EpochEntry,
    EpochState,
    Manifest,
    Position,
)
from vrep.target.reader import StoreReader
from vrep.target.segment import (
    Batch,
    SegmentId,
    SegmentWriter,
    index_tail,
    run_path,
    scan_tail,
    segment_path,
    write_footer,
)
from vrep.target.span import Point, Span

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
NO_SITE: Final = bytes(16)
_LEFTOVER: Final = re.compile(r"\.(manifest|run)-.*\.tmp")

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
    merge: bool = True


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
        self.committed_ticket = 0
        """bytes appended (since it was opened) that are durable"""
        self._appended_ticket = 0
        self._lease = lease
        self._files = files
        self._wall_ns = wall_ns
        self._order = record.Order()
        self._has_stream = False
        self._listeners: list[Callable[[], None]] = []
        self._writer: SegmentWriter
        self._span: Span
        self._closed = False
        self._merge_wanted = threading.Event()
        self._merge_failure = ""
        self._merger: threading.Thread | None = None
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
        lease = Lease(path, group_id, files, wall_ns)
        try:
            store = cls(path, group_id, lease, options or StoreOptions(), files, wall_ns)
            if create is not None:
                store._create(create)
            store._recover()
        except OSError as error:
            lease.close()
            if is_full(error):
                raise StoreFullError(f"{path}: {error.strerror}") from None
            raise StorageError(f"{path}: {error.strerror or error}") from None
        except BaseException:
            lease.close()
            raise
        store._journal.start()
        store._start_merging()
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
            path = segment_path(self.directory, int(segment["segment"]))
            runs.check_file(path, int(segment["file_bytes"]))
        for run in manifest.runs:
            runs.check_file(run_path(self.directory, int(run["run"])), int(run["file_bytes"]))
        segments, last, stream = self._close_active(manifest)
        self._begin(segments, last, stream, lease=manifest.lease + 1)
        self.durable = self.received = last
        self._span = Span(self.directory, self.manifest)
        self._has_stream = stream is not None
        self._seed_order()
        self._lease.keep_spare()
        self._drop_files()

    def _close_active(self, manifest: Manifest) -> tuple[Structs, Position, Any]:
        """Closed segments, last position and stream in force, after the open segment was
        scanned as the storage holds it, cut behind its last whole commit, and indexed."""
        sealed = manifest.segments
        last = Position.of(sealed[-1]["last"]) if len(sealed) else Position()
        if not manifest.active_segment:
            return sealed, last, self._last_stream(manifest)
        path = segment_path(self.directory, manifest.active_segment)
        try:
            fd = self._files.open(path)
        except FileNotFoundError:
            raise CorruptError(f"{path} is missing") from None
        try:
            self._files.sync(fd)
            data = self._files.read_stored(path)
            try:
                scan = scan_tail(data, self.group_id, manifest.active_segment)
            except CorruptError as error:
                raise CorruptError(f"{path}: {error.detail}") from None
            if not scan.records:
                return sealed, last, self._last_stream(manifest)
            stream_id = scan.header["stream_id"].tobytes()
            stream = self._last_stream(manifest) if any(stream_id) else None
            builder = index_tail(data, scan, self.group_id, stream)
            if scan.end < len(data):
                log.warning("%s: %d bytes of a torn tail are cut", path, len(data) - scan.end)
            self._files.truncate(fd, scan.end)
            entry = write_footer(self._files, fd, builder, scan.last, scan.end)
        finally:
            os.close(fd)
        return np.append(sealed, entry.reshape(1)), scan.last, builder.stream

    def _last_stream(self, manifest: Manifest) -> Any:
        """The stream in force behind the last closed segment, None at the beginning."""
        if not len(manifest.segments):
            return None
        newest = segment_path(self.directory, int(manifest.segments[-1]["segment"]))
        index = Index.open(newest)
        return index.streams[-1].copy() if len(index.streams) else None

    def _begin(self, segments: Structs, after: Position, stream: Any, lease: int) -> None:
        """Create the next segment and the manifest that names it."""
        manifest = self.manifest
        number = manifest.next_segment
        path = segment_path(self.directory, number)
        ident = SegmentId(self.group_id, manifest.store_id, number, lease)
        writer = SegmentWriter(self._files, path, ident, after, stream, self._wall_ns())
        try:
            self._files.sync_directory(self.directory)
            self._lease.publish(
                segments=segments, active_segment=number, next_segment=number + 1, lease=lease
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
        return self.manifest.disks

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
    def pending_bytes(self) -> int:
        return self._journal.pending_bytes

    def points(self) -> tuple[Point, Point] | None:
        """The oldest and the newest recovery point, both durable; None when there is none."""
        return self._span.points(self.manifest)

    def status(self) -> dict[str, Any]:
        """Figures for people and programs."""
        manifest, writer = self.manifest, self._writer
        failure = self.failure
        points = self.points()
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
            "bytes": int(manifest.segments["file_bytes"].sum())
            + int(manifest.runs["file_bytes"].sum())
            + writer.end,
            "records": int(manifest.segments["records"].sum()) + writer.builder.records,
            "pending_bytes": self.pending_bytes,
            "full": self.full,
            "failure": str(failure) if failure else "",
            "merge_failure": self._merge_failure,
        }

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
            self._check_records(found["header"])
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
        return batch.ticket

    def _seed_order(self) -> None:
        self._order = record.Order()
        if self.received.epoch:
            self._order.seed(epoch=self.received.epoch, seq=self.received.seq)

    def _check_records(self, headers: Structs) -> None:
        manifest = self.manifest
        if not self._has_stream and headers[0]["kind"] != layout.KIND_STREAM:
            raise CorruptError("a history begins with a STREAM record")
        accepted = manifest.current_epoch
        wrong = np.flatnonzero(headers["epoch"] != accepted.epoch)
        if len(wrong):
            raise FencedError(
                f"records of epoch {int(headers[wrong[0]]['epoch'])}, but epoch {accepted.epoch} "
                "is the one that is accepted"
            )
        if (headers["lane"] != 0).any():
            raise UnsupportedError("records of another lane than 0")
        kinds = headers["kind"]
        if (kinds == layout.KIND_RESIZE).any():
            raise UnsupportedError("disks that change their size")
        sizes = np.zeros(layout.DISKS_MAX, np.uint64)
        for disk in manifest.disks:
            sizes[disk.index] = disk.bytes
        placed = (kinds <= layout.KIND_ZEROES) | (
            (kinds >= layout.KIND_SYNC) & (kinds <= layout.KIND_SYNC_ZEROES)
        )
        inside = headers[placed]
        size = sizes[np.minimum(inside["disk"], layout.DISKS_MAX - 1)]
        length = inside["length"].astype(np.uint64)
        bad = (inside["disk"] >= layout.DISKS_MAX) | (length > size)
        bad |= inside["offset"] > size - np.minimum(length, size)
        if bad.any():
            first = inside[np.flatnonzero(bad)[0]]
            raise CorruptError(
                f"record {int(first['seq'])} lies outside of disk {int(first['disk'])}"
            )

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
            if room < need + self.options.reserve_bytes:
                raise StoreFullError(f"{room} bytes are free, {self.options.reserve_bytes} kept")
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
            entry = old.seal()
            segments = np.append(self.manifest.segments, entry.reshape(1))
            self._begin(segments, old.last, old.builder.stream, self.manifest.lease)
            old.forget()
            old.close()
        self._merge_wanted.set()

    def _start_merging(self) -> None:
        if self.options.merge:
            self._merger = threading.Thread(
                target=self._merge_loop, name=f"merge:{self.group_id.hex()[:8]}", daemon=True
            )
            self._merge_wanted.set()
            self._merger.start()

    def _merge_loop(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            self._merge_wanted.wait()
            self._merge_wanted.clear()
            if self._closed:
                return
            try:
                while self.merge_once() and not self._closed:
                    continue
                self._merge_failure = ""
            except (VrepError, OSError) as error:
                # Reading works without the run; the next closed segment tries again.
                self._merge_failure = str(error)
                log.warning("%s: runs are not merged: %s", self.directory, error)

    def merge_once(self) -> bool:
        """Merge one set of neighbours, if there is one; for the merging thread and tests."""
        manifest = self.manifest
        chosen = runs.units_to_merge(manifest)
        if not chosen:
            return False
        entry = runs.merge_units(self.directory, manifest, chosen, self._files)
        self._files.sync_directory(self.directory)
        with self._lease.lock:
            self._lease.publish(runs=runs.replace_runs(self.manifest, entry))
        self._drop_files()
        return True

    def _drop_files(self) -> None:
        """Remove what no manifest names and no reader holds."""
        with self._lease.lock:
            manifest = self.manifest
            named = {int(number) for number in manifest.segments["segment"]}
            named.add(manifest.active_segment)
            for path in self.directory.glob("seg-*"):
                if int(path.name[4:], 16) not in named:
                    self._files.unlink(path)
            stale = runs.stale_runs(self.directory, manifest)
            if stale and not runs.pinned(self.directory):
                for path in stale:
                    self._files.unlink(path)

    # ---- epochs ----------------------------------------------------------------------------

    def resume_position(self) -> Position:
        """Where the writer of the current epoch goes on."""
        epoch = self.manifest.current_epoch
        if self.received.epoch == epoch.epoch:
            return self.received
        return Position(epoch.epoch, 0, epoch.parent.seq)

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

    def raise_epoch(
        self, *, writer: bytes, parent: Position | None, state: EpochState
    ) -> EpochEntry:
        """`add_epoch`, at the last durable position without a parent; once, however often it is
        asked for."""
        with self._lease.lock:
            known = reign.undecided(self.manifest, writer, parent, state)
            if known is not None:
                return known
            where = self.durable if parent is None else parent
            return self.add_epoch(writer=writer, parent=where, state=state)

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
        self._journal.close()
        self._merge_wanted.set()
        if self._merger is not None:
            self._merger.join()
        self._writer.close()
        self._lease.close()

    def __enter__(self) -> GroupStore:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()
