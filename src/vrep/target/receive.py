"""Sessions: what a source sends, judged and handed to the store, and what it is told.

A `GroupHost` is one group at this target: its store, and at most one session. A session is
one channel of one connection. A new session of a group ends the old one and waits until what
that one sent is durable, so that the source goes on from a position that nothing can undo.

The thread of a connection receives; the store's thread commits and tells the source at once
how far it is durable. Acknowledgements are never waited for. Memory is bounded by credits:
they are given back when records are durable. Nothing here needs a key.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vrep._core import layout, record
from vrep.durable import sync_directory
from vrep.errors import (
    BusyError,
    FencedError,
    IntegrityError,
    InvalidError,
    NotFoundError,
    PeerError,
    ProtocolError,
    StateError,
    StorageError,
    StoreFullError,
    TimeLimitError,
    UnsupportedError,
    VrepError,
)
from vrep.target import runs
from vrep.target.epochs import epoch_state, judge, plain, wire_epoch
from vrep.target.manifest import DiskEntry, EpochEntry, EpochState, Position
from vrep.target.store import GroupStore, StoreOptions, StoreSpec
from vrep.wire import messages as m
from vrep.wire.transport import FrameTransport

__all__ = ["WINDOW_BYTES_MIN", "GroupHost", "RefusedError", "Session"]

WINDOW_BYTES_MIN: Final = 40 << 20
"""a whole record of the largest kind must fit"""
DRAIN_S: Final = 10.0
RECEIVED_EVERY_S: Final = 0.01
"""a source learns at least so often what arrived, when syncs are slow"""
REOPEN_S: Final = 5.0
ALIVE_S: Final = 10.0
"""a source that said something so lately counts as reachable"""

log = logging.getLogger("vrep.target")

Structs = NDArray[np.void]


class RefusedError(PeerError):
    """The group is refused."""

    def __init__(self, code: m.RefusalCode, text: str, epoch: m.EpochInfo | None = None) -> None:
        super().__init__(f"{text} ({code})")
        self.message = m.Refused(code=code, text=text[:4096], epoch=epoch)


class Session:
    """One channel: a source that sends one group."""

    def __init__(
        self,
        host: GroupHost,
        store: GroupStore,
        epoch: EpochEntry,
        transport: FrameTransport,
        channel: int,
    ) -> None:
        self.host = host
        self.store = store
        self.epoch = epoch
        self.transport = transport
        self.channel = channel
        self.site = transport.peer.name if transport.peer else ""
        self.since_ns = time.time_ns()
        self.seen_s = time.monotonic()
        self.status: m.Status | None = None
        self.ended = False
        """what comes is dropped"""
        self._told = False
        self.bytes_received = 0
        self.records_dropped = 0
        self._announced: m.StreamStart | None = None
        self._streaming = False
        self._carry = bytearray()
        self._charged = 0
        self._tickets: deque[tuple[int, int]] = deque()
        self._taking = threading.Lock()
        self._lock = threading.Lock()
        self._acked_s = 0.0

    # ---- what comes, on the connection's thread ----------------------------------

    def start_stream(self, message: m.StreamStart) -> None:
        """The source begins to seal anew. What it sent before must be durable first, so
        that no record is ever in the history under two seals."""
        with self._taking:
            if not self.ended:
                self._start_stream(message)

    def _start_stream(self, message: m.StreamStart) -> None:
        if self._carry:
            raise ProtocolError("a stream was announced inside a record")
        if self.store.received != self.store.durable:
            self.store.commit(DRAIN_S)
        here = self.store.resume_position().seq
        if message.resume_seq != here:
            raise ProtocolError(
                f"a stream that resumes at {message.resume_seq}, but {here} is the last here"
            )
        self._announced = message

    def take(self, data: m.Data) -> None:
        """A frame of records."""
        self.seen_s = time.monotonic()
        with self._taking:
            if not self.ended:
                self._take(data)
        if time.monotonic() - self._acked_s >= RECEIVED_EVERY_S:
            self.acknowledge()

    def _take(self, data: m.Data) -> None:
        size = len(data.payload)
        self.bytes_received += size
        self._charged += size
        buffer: memoryview = data.payload
        if self._carry:
            self._carry += data.payload
            buffer = memoryview(self._carry)
        try:
            if data.more:
                _found, end = record.scan(buffer)
            else:
                end = len(buffer)
            rest = bytearray(buffer[end:]) if end < len(buffer) else bytearray()
            if end:
                self._append(buffer[:end], len(rest))
        except (IntegrityError, UnsupportedError) as error:
            raise ProtocolError(f"group {self.host.name}: {error.detail}") from None
        if end or not self._carry:
            self._carry = rest

    def _append(self, records: memoryview, carried: int) -> None:
        fresh = self._skip_known(records)
        ticket = None
        if len(fresh):
            self._check_stream(fresh)
            ticket = self.store.append(fresh, check=self._check)
            self._announced, self._streaming = None, True
        paid, self._charged = self._charged - carried, carried
        with self._lock:
            done = self.store.committed_ticket if ticket is None else ticket
            self._tickets.append((done, paid))

    def _skip_known(self, records: memoryview) -> memoryview:
        """The batch without records that came before: resending is harmless."""
        if len(records) < layout.RECORD.itemsize:
            return records
        first = np.frombuffer(records, layout.RECORD, 1)[0]
        received = self.store.resume_position()
        aside = first["kind"] in (layout.KIND_STREAM, layout.KIND_TALLY)
        known = first["seq"] < received.seq or (first["seq"] == received.seq and not aside)
        if first["epoch"] != received.epoch or not known or self._announced is not None:
            return records
        found, _end = record.scan(records)
        headers = found["header"]
        asides = (headers["kind"] == layout.KIND_STREAM) | (headers["kind"] == layout.KIND_TALLY)
        new = np.flatnonzero((headers["seq"] > received.seq) & ~asides)
        self.records_dropped += int(new[0]) if len(new) else len(found)
        return records[int(found[new[0]]["position"]) :] if len(new) else records[:0]

    def _check(self, found: Structs) -> None:
        """Streams begin where they were announced, and nowhere else."""
        kinds = found["header"]["kind"]
        streams = np.flatnonzero(kinds == layout.KIND_STREAM)
        if self._announced is None:
            if len(streams):
                raise ProtocolError("a STREAM record that was not announced")
            if not self._streaming:
                raise ProtocolError("records before a stream")
            return
        if list(streams) != [0]:
            raise ProtocolError("a second STREAM record that was not announced")

    def _check_stream(self, records: memoryview) -> None:
        """The STREAM record against what was announced and what the epoch is."""
        announced = self._announced
        if announced is None:
            return
        record.check_header(records)
        if np.frombuffer(records, layout.RECORD, 1)[0]["kind"] != layout.KIND_STREAM:
            raise ProtocolError("an announced stream begins with its STREAM record")
        body = record.parse_stream(records)
        epoch = self.epoch
        said = (
            body["stream_id"].tobytes(),
            int(body["key_generation"]),
            int(body["resume_seq"]),
            int(body["epoch"]),
            body["epoch_id"].tobytes(),
            Position.of(body["parent"]),
        )
        due = (
            announced.stream_id,
            announced.key_generation,
            announced.resume_seq,
            epoch.epoch,
            epoch.epoch_id,
            epoch.parent,
        )
        if said != due:
            raise ProtocolError("the STREAM record is not the one that was announced")

    def note(self, status: m.Status) -> None:
        """What the source says about itself."""
        self.seen_s = time.monotonic()
        self.status = status

    # ---- what is said, from any thread ---------------------------------------------

    def _seq(self, position: Position) -> int:
        if position.epoch == self.epoch.epoch:
            return position.seq
        return self.epoch.parent.seq

    def acknowledge(self) -> None:
        """Tell the source how far it is; called whenever that changed."""
        with self._lock:
            if self._told:
                return
            try:
                failure = self.store.failure
                if failure is not None:
                    self.ended = self._told = True
                    text = str(failure)[:4096]
                    self.transport.post(m.Error(code="storage", text=text), self.channel)
                    return
                self._release()
                self._acked_s = time.monotonic()
                durable = self._seq(self.store.durable)
                ack = self.transport.connection.ack(
                    self.channel,
                    max(durable, self._seq(self.store.received)),
                    durable,
                    conditions=self.host.conditions(),
                )
                self.transport.post(ack, self.channel)
            except (PeerError, StateError) as error:
                # The connection or channel is gone; its own thread ends the session.
                log.debug("group %s: not acknowledged: %s", self.host.name, error)

    def _release(self) -> None:
        done = self.store.committed_ticket
        free = 0
        while self._tickets and self._tickets[0][0] <= done:
            free += self._tickets.popleft()[1]
        if free:
            self.transport.connection.release(self.channel, free)

    def mute(self) -> None:
        """Drop what comes from now on."""
        with self._taking:
            self.ended = True

    def end(self, message: m.Message | None = None) -> None:
        """Hear the source no more, and tell it why if there is a reason. When this returns,
        nothing of the session is on its way to the store any more."""
        self.mute()
        self.store.unlisten(self.acknowledge)
        with self._lock:
            if self._told:
                return
            self._told = True
            if message is None:
                return
            try:
                self.transport.post(message, self.channel)
            except (PeerError, StateError) as error:
                log.debug("group %s: end not told: %s", self.host.name, error)


class GroupHost:
    """One group at this target. Every change of it holds its lock; records do not."""

    def __init__(
        self,
        stores: Path,
        group_id: bytes,
        options: StoreOptions,
        window_bytes: int,
        open_store: Callable[..., GroupStore] = GroupStore.open,
    ) -> None:
        self.group_id = group_id
        self.error: VrepError | None = None
        """why the store cannot be opened"""
        self._stores = stores
        self._options = options
        self._window = max(window_bytes, WINDOW_BYTES_MIN)
        self._open_store = open_store
        self._store: GroupStore | None = None
        self._session: Session | None = None
        self._last_status: m.Status | None = None
        self._last_seen_s = -1e9
        self._retry_s = 0.0
        self._closed = False
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        return self._store.name if self._store is not None else self.group_id.hex()

    @property
    def session(self) -> Session | None:
        return self._session

    @property
    def failed(self) -> bool:
        """Whether the store must be opened (again) before it is of use."""
        store = self._store
        return store is None or store.failure is not None

    def retry_due(self) -> bool:
        """Whether it is time to try: not more often than the pauses allow."""
        now = time.monotonic()
        if now < self._retry_s:
            return False
        self._retry_s = now + REOPEN_S
        return True

    def load(self) -> GroupStore | None:
        """The store, opened if it is there; again after a failure. None when the group has
        none yet. Raises what makes it unusable, and remembers it in `error`."""
        with self._lock:
            if self._closed:
                raise StateError("the target stops")
            if self._store is not None and self._store.failure is None:
                return self._store
            if self._store is not None:
                log.warning("group %s: the store is opened again", self.name)
                self._end_session(None)
                self._store.close()
                self._store = None
            try:
                self._store = self._open_store(self._stores, self.group_id, options=self._options)
            except NotFoundError:
                return None
            except VrepError as error:
                self.error = error
                raise
            self.error = None
            return self._store

    # ---- sessions ------------------------------------------------------------------

    def open_session(
        self, transport: FrameTransport, channel: int, message: m.OpenGroup
    ) -> Session:
        """Take a source on; RefusedError says why not."""
        with self._lock:
            store = self._admit(transport, message)
            manifest = store.manifest
            assert transport.peer is not None
            site_id = bytes.fromhex(transport.peer.site_id)
            newest = message.lanes[0].newest_seq
            verdict = judge(manifest, message.epoch, newest, site_id)
            if verdict.code is not None:
                raise RefusedError(verdict.code, verdict.text, wire_epoch(manifest, verdict.epoch))
            self._check_disks(store, message)
            self._end_session(m.Bye(reason="the source connected again"))
            try:
                store.commit(DRAIN_S)
            except (StoreFullError, TimeLimitError) as error:
                raise RefusedError("full" if store.full else "busy", str(error)) from None
            if message.wrapped_keys:
                store.set_wrapped_keys(message.wrapped_keys)
            session = Session(self, store, verdict.epoch, transport, channel)
            here = store.resume_position()
            position = m.Position(epoch=here.epoch, lane=here.lane, seq=here.seq)
            transport.send(
                m.GroupOpened(
                    epoch=wire_epoch(manifest, verdict.epoch),
                    lanes=[m.LaneState(durable=position, received=position)],
                    credit_bytes=self._window,
                    empty=not store.received.epoch,
                    conditions=self.conditions(),
                ),
                channel,
            )
            self._session = session
            store.listen(session.acknowledge)
            return session

    def _admit(self, transport: FrameTransport, message: m.OpenGroup) -> GroupStore:
        """The store for an offer, created on first contact."""
        if transport.peer is None:
            raise RefusedError("not-allowed", "only a site that joined may send")
        if [lane.lane for lane in message.lanes] != [0]:
            raise RefusedError("invalid", "groups of several lanes are not supported yet")
        try:
            store = self.load()
            if store is None:
                store = self._create(bytes.fromhex(transport.peer.site_id), message)
        except StoreFullError as error:
            raise RefusedError("full", str(error)) from None
        except IntegrityError as error:
            raise RefusedError("damaged", str(error)) from None
        except (StorageError, StateError) as error:
            raise RefusedError("busy", str(error)) from None
        return store

    def _create(self, site_id: bytes, message: m.OpenGroup) -> GroupStore:
        offer = message.epoch
        if offer.counter < 1:
            raise RefusedError("invalid", "epochs begin at 1")
        parent = offer.parent
        spec = StoreSpec(
            name=message.name,
            disks=[DiskEntry(d.name, d.size, d.index) for d in message.disks],
            epoch=EpochEntry(
                epoch=offer.counter,
                state=EpochState.ACCEPTED,
                epoch_id=offer.id,
                writer=site_id,
                parent=Position(parent.epoch, parent.lane, parent.seq) if parent else Position(),
                wall_ns=time.time_ns(),
            ),
            wrapped_keys=message.wrapped_keys,
        )
        try:
            self._store = self._open_store(
                self._stores, self.group_id, create=spec, options=self._options
            )
        except InvalidError as error:
            raise RefusedError("invalid", str(error)) from None
        log.info("group %s: a new store", message.name)
        return self._store

    @staticmethod
    def _check_disks(store: GroupStore, message: m.OpenGroup) -> None:
        offered = {disk.index: (disk.name, disk.size) for disk in message.disks}
        held = {disk.index: (disk.name, disk.bytes) for disk in store.disks}
        if offered != held:
            wrong = sorted(set(offered.items()) ^ set(held.items()))
            name, size = wrong[0][1]
            raise RefusedError(
                "size-mismatch", f"disk {name!r} of {size} bytes is not the same at both sites"
            )

    def _end_session(self, message: m.Message | None) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._last_status, self._last_seen_s = session.status, session.seen_s
            session.end(message)

    def drop_session(self, session: Session) -> None:
        """The connection of a session ended."""
        session.end()
        with self._lock:
            if self._session is session:
                self._end_session(None)

    # ---- epochs --------------------------------------------------------------------

    def raise_epoch(self, writer: bytes, parent: Position | None, state: EpochState) -> EpochEntry:
        """Append an epoch and end the session of the writer that it fences."""
        with self._lock:
            store = self.require()
            if self._session is not None:
                self._session.mute()
            try:
                store.commit(DRAIN_S)
                entry = store.add_epoch(
                    writer=writer, parent=store.durable if parent is None else parent, state=state
                )
            except VrepError:
                self._end_session(m.Bye(reason="an epoch could not be raised"))
                raise
            self._fence(store)
            return entry

    def accept_epoch(self, epoch: int) -> EpochEntry:
        with self._lock:
            return self.require().set_epoch_state(epoch, EpochState.ACCEPTED)

    def roll_back_epoch(self, epoch: int) -> EpochEntry:
        with self._lock:
            entry = self.require().roll_back_epoch(epoch)
            self._fence(self.require())
            return entry

    def _fence(self, store: GroupStore) -> None:
        session = self._session
        current = store.manifest.current_epoch
        if session is None or session.epoch.epoch == current.epoch:
            return
        self._end_session(
            m.Refused(
                code="fenced",
                text=f"epoch {current.epoch} took the group over",
                epoch=wire_epoch(store.manifest, current),
            )
        )

    def require(self) -> GroupStore:
        store = self.load()
        if store is None:
            raise NotFoundError(f"no store of group {self.group_id.hex()}")
        return store

    # ---- what is known ---------------------------------------------------------------

    def source(self) -> dict[str, Any]:
        """How the source is, as far as this site can know."""
        session = self._session
        status = session.status if session is not None else self._last_status
        seen_s = session.seen_s if session is not None else self._last_seen_s
        silent_s = time.monotonic() - seen_s
        connected = session is not None and not session.ended
        return {
            "connected": connected and silent_s < ALIVE_S,
            "site": session.site if session is not None else "",
            "silent_s": round(silent_s, 3) if seen_s > 0 else None,
            "guest_clients": status.values.get("clients", 0) if status else 0,
            "seen_ns": status.time_ns if status else 0,
            "state": status.state if status else "",
            "values": dict(status.values) if status else {},
            "conditions": list(status.conditions) if status else [],
        }

    def conditions(self) -> list[str]:
        store = self._store
        return ["target-full"] if store is not None and store.full else []

    def epoch_state(self) -> dict[str, Any]:
        with self._lock:
            return {**epoch_state(self.require()), "source": self.source()}

    def status(self) -> dict[str, Any]:
        """One group of ``target.sock`` status."""
        with self._lock:
            store, session = self._store, self._session
            if store is None:
                return {
                    "group_id": self.group_id.hex(),
                    "name": self.group_id.hex(),
                    "state": "error",
                    "error": str(self.error) if self.error else "not opened",
                    "conditions": ["damaged"] if isinstance(self.error, IntegrityError) else [],
                }
            current = store.manifest.current_epoch
            source = self.source()
            conditions = self.conditions()
            if not source["connected"]:
                conditions.append("source-silent")
            state = "replicating" if source["connected"] else "offline"
            if source["connected"] and source["state"] == "gap":
                state = "gap"
            if current.writer != store.epochs[0].writer:
                state = "failed-over"
            if store.failure is not None:
                state = "error"
            return {
                **store.status(),
                "state": state,
                "conditions": conditions,
                "error": str(store.failure) if store.failure else "",
                "epochs": [plain(entry) for entry in store.epochs],
                "source": source,
                "sessions": int(session is not None),
                "disks": [{"name": d.name, "size": d.bytes, "index": d.index} for d in store.disks],
            }

    def delete(self, site_id: bytes) -> None:
        """Remove the store, for the site that writes it."""
        with self._lock:
            store = self.require()
            if store.manifest.current_epoch.writer != site_id:
                raise FencedError("only the site that writes a group may delete it")
            if runs.pinned(store.directory):
                raise BusyError("a recovery reads the history of this group")
            self._end_session(None)
            self._closed, self._store = True, None
            store.close()
            shutil.rmtree(store.directory)
            sync_directory(store.directory.parent)

    def close(self) -> None:
        """End the session and let go of the store; what is not durable yet gets a moment."""
        with self._lock:
            self._closed = True
            self._end_session(m.Bye(reason="the target stops"))
            store, self._store = self._store, None
            if store is None:
                return
            try:
                store.commit(2.0)
            except VrepError as error:
                log.warning("group %s: closed with records not durable: %s", store.name, error)
            store.close()

    def open_fenced(self, params: Mapping[str, Any]) -> EpochEntry:
        """`raise_epoch` with parameters from a control socket."""
        parent = params.get("parent")
        return self.raise_epoch(
            bytes.fromhex(str(params["writer"])),
            None if parent is None else Position(*(int(n) for n in parent)),
            EpochState[str(params.get("state", "provisional")).upper()],
        )
