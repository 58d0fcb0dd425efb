"""One session: what a source sends on one channel, judged, and what it is told.

The thread of a connection receives; the store's thread commits and tells the source at once
how far it is durable. Acknowledgements are never waited for. Memory is bounded by credits:
they are given back when records are durable. Nothing here needs a key.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vrep._core import layout, record
from vrep.errors import IntegrityError, PeerError, ProtocolError, StateError, UnsupportedError
from vrep.lanes import is_lane
from vrep.target.delta import DeltaDesk
from vrep.target.manifest import EpochEntry, Position
from vrep.target.span import Point
from vrep.target.store import GroupStore
from vrep.wire import messages as m
from vrep.wire.transport import FrameTransport

__all__ = ["DRAIN_S", "Session", "wire_points"]

DRAIN_S: Final = 10.0
RECEIVED_EVERY_S: Final = 0.01
"""a source learns at least so often what arrived, when syncs are slow"""

log = logging.getLogger("vrep.target")

Structs = NDArray[np.void]


def wire_points(store: GroupStore) -> m.MaybePoints:
    """The oldest and the newest recovery point of a store, as a source is told. Those of a group
    with several lanes are cuts, which no lane knows of."""
    points = None if is_lane(store.name) else store.points()
    return m.Points(oldest=_point(points[0]), newest=_point(points[1])) if points else m.UNSET


def _point(point: Point) -> m.Point:
    epoch, lane, seq = point.position
    position = m.Position(epoch=epoch, lane=lane, seq=seq)
    return m.Point(position=position, time_ns=min(point.wall_ns, m.TIME_MAX))


class Session:
    """One channel: a source that sends one group."""

    def __init__(
        self,
        store: GroupStore,
        epoch: EpochEntry,
        transport: FrameTransport,
        channel: int,
        conditions: Callable[[], list[str]],
        cuts_stand: Callable[[], bool] = lambda: True,
    ) -> None:
        """`cuts_stand` says whether what is held of the group's lanes is what cuts were made of."""
        self._conditions = conditions
        self._cuts_stand = cuts_stand
        self.store = store
        self.epoch = epoch
        self.transport = transport
        self.channel = channel
        self.site = transport.peer.name if transport.peer else ""
        self.since_ns = time.time_ns()
        self.seen_s = time.monotonic()
        self.status: m.Status | None = None
        self.clock_ahead_s = 0.0
        """the source's, of this site's"""
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
        self.delta = DeltaDesk(
            store.directory.parent,
            store.group_id,
            epoch.epoch,
            lambda: self._seq(self.store.durable),
            transport.post,
        )

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
            raise ProtocolError(f"group {self.store.name}: {error.detail}") from None
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
        self.clock_ahead_s = (status.time_ns - time.time_ns()) / 1e9
        epoch, seq = (status.values.get(key, 0) for key in ("cut-epoch", "cut-seq"))
        if epoch > 0 and seq > 0 and self._cuts_stand():
            self.store.note_cut(Position(epoch, self.store.manifest.lane, seq))

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
                points = wire_points(self.store)  # first: it is never ahead of what is durable
                durable = self._seq(self.store.durable)
                ack = self.transport.connection.ack(
                    self.channel,
                    max(durable, self._seq(self.store.received)),
                    durable,
                    lane=self.store.manifest.lane,
                    conditions=self._conditions(),
                    points=points,
                )
                self.transport.post(ack, self.channel)
            except (PeerError, StateError) as error:
                # The connection or channel is gone; its own thread ends the session.
                log.debug("group %s: not acknowledged: %s", self.store.name, error)

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
        self.delta.close()
        with self._lock:
            if self._told:
                return
            self._told = True
            if message is None:
                return
            try:
                self.transport.post(message, self.channel)
            except (PeerError, StateError) as error:
                log.debug("group %s: end not told: %s", self.store.name, error)
