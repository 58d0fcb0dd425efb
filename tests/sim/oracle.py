"""Oracle: what the guest was promised, what was recorded, and what the target must hold.

Plain lists and byte arrays, built from outside: commands as the guest sent them, records as they
appeared in the ring, what the target took, and what each side said. Nothing here asks the code
under test what is right. `Violation` names the invariant (docs/internals and the design's list).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from facts import SALVAGED, WRITES, Epoch, Flight, Image, Ledger, Record, Reign
from kernel import Kernel, Violation
from salvages import Salvages

from vrep._core import layout, record
from vrep._core.ring import RingReader
from vrep.errors import RangeError, StorageError
from vrep.keys.datakey import DataKey
from vrep.target.manifest import EpochState, Position
from vrep.wire import messages as m

if TYPE_CHECKING:
    from plan import Plan

ZEROES: Final = (layout.KIND_ZEROES, layout.KIND_SYNC_ZEROES)
ASIDE: Final = (layout.KIND_STREAM, layout.KIND_TALLY)
WEST: Final = b"\xaa" * 16
SECTOR: Final = 512
HASH_PIECE: Final = 0x80000000
_HEADER: Final = layout.RECORD.itemsize


class Oracle:
    """The truth of the disks that one site writes, and of the store of the other one."""

    def __init__(
        self,
        kernel: Kernel,
        plan: Plan,
        key: DataKey,
        *,
        epochs: list[Epoch] | None = None,
        disks: list[bytes] | None = None,
        base: Callable[[int], bytes] | None = None,
        lane: int = 0,
    ) -> None:
        """The last of `epochs` is that in which the writer begins, `disks` is what they hold then;
        `base` are those of the store's site."""
        self.kernel = kernel
        self.plan = plan
        self.key = key
        self.epochs = epochs or [Epoch(1, WEST, Position())]
        first = self.epochs[-1]
        held = [bytes(size) for size in plan.disk_bytes] if disks is None else disks
        self.writer = first.writer
        self.fork = first.parent.seq
        """of the reign that is now: it goes on behind what the other site holds up to here"""
        self.records: dict[int, Record] = {}
        """of the reign that is now, by seq"""
        self.reigns: list[Reign] = []
        if base is not None:
            self.reigns.append(Reign(1, {}, base))
        self.reigns.append(Reign(first.number, self.records))
        """of those who put something into the store, oldest first"""
        self.recorded = True
        """whether changes become records"""
        self.lane = lane
        self.head = 0
        self.flights: list[Flight] = []
        self.sizes_first = [len(data) for data in held]
        self.sizes = list(self.sizes_first)
        """of the disks, now"""
        self.model = [bytearray(data) for data in held]
        self.touched = [np.zeros(-(-len(data) // SECTOR), np.int64) for data in held]
        """when a sector was last written, as the guest knows it"""
        self.stamp = 0
        self.flushed = [0 for _ in held]
        """writes that were answered before this stamp survive a power loss"""
        self.gap = True
        self.ledger = Ledger()
        self.store: Any = None
        self.epochs_seen = 0
        """so many of the epochs stood in the store's manifest"""
        self.fenced = 0
        """records of an older epoch are not written any more"""
        self.told_cut: Callable[[Position], None] = lambda _at: None
        """the source says that a cut of all lanes is durable, whose mark here stands at a place"""
        self.acks = 0
        self.may_fail = False
        """requests to the source's disks failed"""
        self.unsure_flush = False
        """one of them was a sync"""
        self.amnesia = False
        """the target lost what it had acknowledged, and the source does not know yet"""
        self.salvages = Salvages(self)
        self.check_due = False
        """the change map is to be looked at now"""
        self.deciding = False
        """somebody asked for another epoch"""
        self.horizon = Position()
        self.orders: dict[int, int] = {}
        """of records: when their commands were sent"""
        self.answers: dict[int, int] = {}
        """and answered, if they were"""
        self.streams: set[bytes] = set()
        self.seals: dict[tuple[bytes, int, int], int] = {}
        self._ciphers: dict[bytes, AESGCM] = {}
        self._image_at = 0
        self._image_of: list[tuple[int, int, int]] = []
        self._image = self._empty()

    def _empty(self) -> Image:
        return Image(list(self.sizes_first))

    def reigns_again(
        self, epoch: Epoch, disks: list[bytes], base: Callable[[int], bytes], since: int
    ) -> None:
        """The writer is it once more, in an epoch of which others know already; its disks hold what
        the other site wrote, from the epoch `since` on. The store goes on behind what it has, and
        what that site's disks, `base`, hold."""
        self.records = {}
        self.reigns.append(Reign(since, {}, base))
        self.reigns.append(Reign(epoch.number, self.records))
        self.fork = epoch.parent.seq
        self.head, self.gap, self.recorded = 0, True, True
        self.sizes = [len(data) for data in disks]
        self.model = [bytearray(data) for data in disks]
        self.touched = [np.zeros(-(-len(data) // SECTOR), np.int64) for data in disks]
        self.flushed = [self.stamp for _ in disks]
        self.flights.clear()
        self.ledger.told = 0
        self.amnesia = False

    def record_of(self, epoch: int, seq: int) -> Record:
        """A record, by its position."""
        return self.reign_of(epoch).records[seq]

    def reign_of(self, epoch: int) -> Reign:
        return next(reign for reign in reversed(self.reigns) if epoch >= reign.first)

    # ---- the guest ----------------------------------------------------------------------

    def sent(self, flight: Flight) -> None:
        flight.order = self.kernel.next_order()
        self.flights.append(flight)
        self._touch(flight)

    def _touch(self, flight: Flight) -> None:
        if flight.length:
            self.stamp += 1
            first, end = flight.offset // SECTOR, -(-(flight.offset + flight.length) // SECTOR)
            self.touched[flight.disk][first:end] = self.stamp

    def answered(self, flight: Flight, group: Any, source: Callable[[int], bytes]) -> None:
        """A command was answered: invariants 1, 4 and 6."""
        self.flights.remove(flight)
        try:
            got = group.result(flight.pending)
        except StorageError:
            self._failed(flight, group, source)
            return
        at, end = flight.offset, flight.offset + flight.length
        if flight.op == "flush":
            self.flushed[flight.disk] = max(self.flushed[flight.disk], flight.stamp)
            return
        if flight.op == "read" and flight.beside is not None:
            # Who reads what a write that is not answered put there has heard of it.
            seq = flight.beside.seq
            if seq and got == flight.beside.data:
                self.answers.setdefault(seq, self.kernel.next_order())
                self.kernel.event("heard by a read")
            return
        if flight.op == "read":
            if got != self.model[flight.disk][at:end] and not flight.unsure:
                raise Violation(f"4: a read of disk {flight.disk} at {at} shows other bytes")
            return
        changes = self.recorded and flight.op in ("write", "zero")
        if changes and not flight.seq and not group.status()["gap"]:
            raise Violation(
                f"1: the {flight.op} of disk {flight.disk} at {at} was answered without a record"
            )
        if flight.seq:
            self.answers.setdefault(flight.seq, self.kernel.next_order())
        if flight.op == "discard" or flight.unsure:
            self.model[flight.disk][at:end] = source(flight.disk)[at:end]
        else:
            self.model[flight.disk][at:end] = flight.data
        self._touch(flight)

    def _failed(self, flight: Flight, group: Any, source: Callable[[int], bytes]) -> None:
        """A command failed: what it was to change is there or not, or in part."""
        if not self.may_fail:
            raise Violation(f"6: a {flight.op} of the guest failed on a disk that is well")
        self.kernel.event("failed command")
        at, end = flight.offset, flight.offset + flight.length
        if flight.op not in ("flush", "read"):
            self.model[flight.disk][at:end] = source(flight.disk)[at:end]
            self._touch(flight)

    def flush_failed(self, disk: int, source: Callable[[int], bytes]) -> None:
        """A sync of the source's disk failed: what it lost, it lost."""
        self.unsure_flush = True
        for flight in self.flights:
            flight.unsure = True  # it may be done, and lost
        self.model[disk][:] = source(disk)

    def drop_guest(self) -> None:
        """What was in flight is never answered."""
        for flight in self.flights:
            flight.lost = True

    def busy(self, disk: int, offset: int, length: int) -> bool:
        """Whether a command in flight changes a range."""
        return any(
            flight.disk == disk
            and flight.op != "flush"
            and flight.offset < offset + length
            and offset < flight.offset + flight.length
            for flight in self.flights
        )

    def resized(self, sizes: list[int]) -> None:
        """The filter opened disks of these sizes: what is new reads zero."""
        for disk, size in enumerate(sizes):
            sectors = -(-size // SECTOR)
            self.model[disk] = self.model[disk][:size].ljust(size, b"\0")
            self.touched[disk] = np.resize(self.touched[disk], sectors)
            if size > self.sizes[disk]:
                self.touched[disk][-(-self.sizes[disk] // SECTOR) :] = 0
            if size != self.sizes[disk]:
                self.kernel.event("resize")
        self.sizes = list(sizes)

    # ---- the ring -----------------------------------------------------------------------

    def filter_opened(self, observer: RingReader, status: dict[str, Any]) -> None:
        if status["unverified"] and not (status["unverified"] == "flush" and self.unsure_flush):
            raise Violation(f"9: the group is unverified ({status['unverified']})")
        if status["opened_as"] in ("power-loss", "new"):
            self.head = max(self.head, observer.released)
        self.harvest(observer)

    def filter_killed(self) -> None:
        self.drop_guest()

    def harvest(self, observer: RingReader) -> bool:
        """See the records that were published since; invariants 3 and 4."""
        head = observer.head
        if head <= self.head:
            return False
        try:
            found = observer.descriptors(self.head + 1, head)
        except RangeError:
            raise Violation(f"5: records after {self.head} left the ring unseen") from None
        for desc in found:
            seq, kind, flags = int(desc["seq"]), int(desc["kind"]), int(desc["flags"])
            data = b""
            if kind in WRITES:
                data = b"".join(observer.payload(desc))
            self._published(
                Record(
                    seq,
                    kind,
                    flags,
                    int(desc["disk"]),
                    int(desc["offset"]),
                    int(desc["length"]),
                    data,
                )
            )
        self.head = head
        return True

    def _published(self, one: Record) -> None:
        self.kernel.event("record")
        if one.seq in self.records:
            raise Violation(f"8: seq {one.seq} is given twice")
        self.records[one.seq] = one
        if one.kind == layout.KIND_GAP_BEGIN:
            self.kernel.event("gap")
            self.gap = True
        elif one.kind == layout.KIND_GAP_END:
            self.kernel.event("gap end")
            self.gap = False
            self.check_due |= self.salvages.ended()
        elif one.kind in (layout.KIND_SYNC, layout.KIND_SYNC_ZEROES):
            self.kernel.event("sync copy")
        elif one.kind == layout.KIND_WRITE:
            self._match(one)
        elif one.kind == layout.KIND_ZEROES:
            for flight in self.flights:
                if flight.op == "zero" and not flight.seq and self._same_range(flight, one):
                    flight.seq = one.seq
                    self.orders[one.seq] = flight.order
                    break

    @staticmethod
    def _same_range(flight: Flight, one: Record) -> bool:
        return (flight.disk, flight.offset, flight.length) == (one.disk, one.offset, one.length)

    def _match(self, one: Record) -> None:
        """A write in the ring is one of the guest's, byte for byte, and comes after all that was
        answered before it was sent."""
        for flight in self.flights:
            if flight.op == "write" and not flight.seq and self._same_range(flight, one):
                if flight.data != one.data:
                    continue
                if one.seq <= flight.after:
                    raise Violation(f"4: the record {one.seq} stands before what was answered")
                flight.seq = one.seq
                self.orders[one.seq] = flight.order
                return
        raise Violation(f"3: record {one.seq} holds what nobody wrote")

    @property
    def newest_write(self) -> int:
        """Seq of the last record of a command."""
        return max(self.orders, default=0)

    def last_sent(self, seq: int) -> int:
        """When the last command was sent of those whose records stand up to here."""
        return max((order for at, order in self.orders.items() if at <= seq), default=0)

    def answered_before(self, order: int, *, after: int) -> int:
        """A record behind a seq whose command was answered before a moment; 0: none."""
        found = (seq for seq, at in self.answers.items() if seq > after and at < order)
        return min(found, default=0)

    # ---- what the source's disks hold -------------------------------------------------------

    def source_came_back(self, power_lost: bool, source: Callable[[int], bytes]) -> None:
        """After an end of the filter: what was answered, and with a power loss what was flushed,
        is there, invariant 6. What was in flight is there or not."""
        unsure = [np.zeros(len(touched), bool) for touched in self.touched]
        for flight in self.flights:
            if flight.op not in ("flush", "read"):
                first = flight.offset // SECTOR
                unsure[flight.disk][first : -(-(flight.offset + flight.length) // SECTOR)] = True
        for disk, model in enumerate(self.model):
            now = source(disk)
            if power_lost:
                unsure[disk] |= self.touched[disk] > self.flushed[disk]
            for sector in np.flatnonzero(~unsure[disk]).tolist():
                at = sector * SECTOR
                if now[at : at + SECTOR] != model[at : at + SECTOR]:
                    raise Violation(f"6: disk {disk} lost what was stable at {at}")
            model[:] = now
            if power_lost:
                self.flushed[disk] = self.stamp
        if power_lost:
            self.salvages.power_lost()
        else:
            for flight in self.flights:
                self._touch(flight)  # the system did some of it after the last flush
        self.flights.clear()

    # ---- the target: what it took ---------------------------------------------------------------

    @property
    def current(self) -> Epoch:
        return next(epoch for epoch in reversed(self.epochs) if not epoch.given_up)

    def epochs_are(self, entries: Any) -> None:
        """What a manifest says, once it is durable: epochs only come, and only when somebody asked
        for them; the writer before goes on from where the last one ended."""
        known = {epoch.number: epoch for epoch in self.epochs}
        numbers = [entry.epoch for entry in entries]
        both = min(len(numbers), len(known))
        if numbers[:both] != list(known)[:both] or len(numbers) < self.epochs_seen:
            raise Violation("11: an epoch is gone")
        self.epochs_seen = len(numbers)
        for entry in entries:
            given_up = entry.state == EpochState.ABANDONED
            if entry.epoch not in known:
                if not self.deciding:
                    raise Violation(f"11: nobody asked for epoch {entry.epoch}")
                self.epochs.append(Epoch(entry.epoch, entry.writer, entry.parent, given_up))
            elif given_up and not known[entry.epoch].given_up:
                known[entry.epoch].given_up = True
            elif known[entry.epoch].given_up and not given_up:
                raise Violation(f"11: epoch {entry.epoch} is back")
        self.fenced = next(
            epoch.number
            for epoch in reversed(self.epochs)
            if not epoch.given_up and epoch.number in numbers
        )

    def taking(self, buffer: Any) -> Callable[[], None]:
        """Records go into the store; what is returned takes them out again."""
        found, _end = record.scan(buffer)
        headers = found["header"]
        begun = len(self.ledger.taken)
        for epoch, seq, kind in zip(
            headers["epoch"].tolist(),
            headers["seq"].tolist(),
            headers["kind"].tolist(),
            strict=True,
        ):
            if kind in ASIDE:
                continue
            if epoch < self.fenced:
                continue  # it must be refused: see `writing`
            self.ledger.taken.append((epoch, seq, kind))
            base = self.reign_of(epoch)
            if base.disks is not None:
                base.records[seq] = base.record(headers[headers["seq"] == seq][0])

        def undo() -> None:
            del self.ledger.taken[begun:]

        return undo

    def writing(self, batches: Any) -> None:
        """Batches go to the disk: invariant 11."""
        for batch in batches:
            if batch.last.epoch and batch.last.epoch < self.fenced:
                raise Violation(f"11: records of epoch {batch.last.epoch} after {self.fenced}")

    def store_opened(self, store: Any) -> None:
        """A target came back: invariant 7."""
        self.store = store
        self.epochs_are(store.manifest.epochs)
        durable = store.durable
        if durable.seq < self.ledger.told:
            raise Violation(f"7: {self.ledger.told} was durable, and {durable.seq} came back")
        kept = [entry for entry in self.ledger.taken if (entry[0], entry[1]) <= durable[::2]]
        self.ledger.taken = kept
        line = self.history(durable)
        if durable.seq not in (0, self.fork) and (not line or line[-1][1] != durable.seq):
            raise Violation(f"7: {durable} came back, which is not what was taken")

    def target_is_old(self, taken: list[tuple[int, int, int]]) -> None:
        """The target holds what it took up to an earlier day, with the epochs of today."""
        self.ledger = Ledger(list(taken))
        self.horizon = Position()
        self.amnesia, self.store = True, None
        self.salvages.power_lost()

    def told(self, seq: int) -> None:
        if seq > self.fork:
            self.ledger.told = max(self.ledger.told, seq)

    def said(self, message: Any) -> None:
        """A message leaves one of the sites."""
        if isinstance(message, m.Ack):
            self.told(message.durable_seq)
            if self.store is not None and message.durable_seq > self._durable_seq():
                raise Violation(
                    f"7: {message.durable_seq} was told durable, {self.store.durable} is"
                )
            self._told_points(message)
        elif isinstance(message, m.GroupOpened):
            self.told(message.lanes[0].durable.seq)
            if self.current.writer != self.writer:
                raise Violation("11: a source was heard whose group another site writes")
            if message.epoch.counter != self.current.number:
                raise Violation(f"11: epoch {message.epoch.counter} was accepted")
            self.salvages.opened(message)
            self.kernel.event("session")
        elif isinstance(message, m.Status) and message.values.get("cut-seq"):
            at = Position(message.values["cut-epoch"], self.lane, message.values["cut-seq"])
            self.told_cut(at)
        elif isinstance(message, m.Refused) and message.code == "fenced":
            self.kernel.event("fenced")

    def _told_points(self, message: m.Ack) -> None:
        """What a source is told of points can be recovered; looked at now and then."""
        self.acks += 1
        if self.acks % 16 or message.points is m.UNSET:
            return
        wanted = set(self.recoverable(self.store.durable))
        for point in (message.points.oldest, message.points.newest):
            at = point.position
            if Position(at.epoch, at.lane, at.seq) not in wanted:
                raise Violation(f"8: a source is told of a point at {at}, which is none")

    def _durable_seq(self) -> int:
        """What the target may say that it holds."""
        return max(self.fork, int(self.store.durable.seq) if self.store is not None else 0)

    # ---- seals ---------------------------------------------------------------------------------

    def stream(self, stream_id: bytes) -> None:
        """A sealer begins: invariant 10."""
        if stream_id in self.streams:
            raise Violation("10: a stream began twice")
        self.streams.add(stream_id)
        self.kernel.event("stream")

    def sealed(self, stream_id: bytes, sealed: memoryview) -> None:
        """Every (key, nonce) seals one thing: the stream names the key, seq and piece the nonce.
        That the nonce is that one is tried with another implementation."""
        found, _end = record.scan(sealed)
        for one in found:
            header, at = one["header"], int(one["position"])
            kind, seq = int(header["kind"]), int(header["seq"])
            if kind == layout.KIND_STREAM:
                self.kernel.event("re-seal")
            if kind in ASIDE:
                continue
            body = bytes(sealed[at : at + _HEADER + int(header["body_bytes"])])
            digest = hash(body)
            key = (stream_id, seq, kind)
            if self.seals.setdefault(key, digest) != digest:
                raise Violation(f"10: record {seq} was sealed twice under one stream")
            if kind in WRITES and len(self.seals) % 8 == 1:
                self._open(stream_id, seq, body, self.records.get(seq))

    def _open(self, stream_id: bytes, seq: int, body: bytes, truth: Record | None) -> None:
        cipher = self._ciphers.get(stream_id)
        if cipher is None:
            cipher = self._ciphers[stream_id] = AESGCM(self.key.stream_key(stream_id))
        header = bytearray(body[:_HEADER])
        for piece in record.pieces(body):
            at, stored = int(piece["at"]), int(piece["stored"])
            word, index = int(piece["word"]), int(piece["index"])
            nonce = struct.pack("<QI", seq, index)
            try:
                plain = cipher.decrypt(
                    nonce, body[at : at + stored], associated(header, word, index)
                )
            except InvalidTag:
                raise Violation(
                    f"10: piece {index:#x} of record {seq} is sealed under another nonce"
                ) from None
            if truth is None or index == HASH_PIECE or word & 0x01000000:
                continue
            start = index * layout.PIECE_BYTES_MAX
            if plain != truth.data[start : start + len(plain)]:
                raise Violation(f"3: record {seq} is shipped with other bytes than were written")

    # ---- what the target must hold -----------------------------------------------------------

    def line(self, point: Position) -> dict[int, int]:
        """The ancestry of a point: the highest seq of each epoch."""
        limits = {point.epoch: point.seq}
        epoch = next(e for e in self.epochs if e.number == point.epoch)
        while epoch.parent.epoch:
            seq = min(epoch.parent.seq, *limits.values())
            limits[epoch.parent.epoch] = seq
            parent = next((e for e in self.epochs if e.number == epoch.parent.epoch), None)
            if parent is None:
                break  # the other site has that part of the history
            epoch = parent
        return limits

    def history(self, point: Position) -> list[tuple[int, int, int]]:
        """The records of a point's line up to it, as they were taken."""
        if not point.epoch:
            return []
        limits = self.line(point)
        taken = self.ledger.taken
        if len(self.epochs) == 1:
            limit = limits[self.epochs[0].number]
            return [entry for entry in taken if entry[1] <= limit]
        return [entry for entry in taken if entry[1] <= limits.get(entry[0], 0)]

    def recoverable(self, point: Position) -> list[Position]:
        """Positions of the line of a point that lie in no gap, invariant 8; and that the order has
        no hole."""
        found, whole, before = [], False, 0
        reigns = [reign.first for reign in self.reigns]
        begins = {e.number: e.parent.seq for e in self.epochs}
        for epoch, seq, kind in self.history(point):
            if not before or epoch in reigns:  # it begins behind what the other site wrote
                before = max(before, begins[epoch])
                reigns = [first for first in reigns if first > epoch]
            jump = kind == SALVAGED or (
                kind == layout.KIND_GAP_BEGIN
                and self.record_of(epoch, seq).flags & layout.RECORD_JUMP
            )
            if seq != before + 1 and not jump:
                raise Violation(f"8: the target's history goes from {before} to {seq}")
            before = seq
            if kind in (layout.KIND_GAP_BEGIN, SALVAGED):
                whole = False
            elif kind == layout.KIND_GAP_END:
                whole = True
            if whole:
                found.append(Position(epoch, self.lane, seq))
        return found

    def apply(self, image: Image, entry: tuple[int, int, int]) -> None:
        epoch, seq, kind = entry
        if kind == SALVAGED:
            image.become(self.salvages.shown(entry))
            return
        one = self.record_of(epoch, seq)
        if one.kind in WRITES:
            image.put(one.disk, one.offset, one.data)
        elif one.kind in ZEROES:
            image.put(one.disk, one.offset, bytes(one.length))
        elif one.kind == layout.KIND_RESIZE:
            image.sizes[one.disk] = one.offset

    def image(self, point: Position) -> Image:
        """What every disk holds at a point."""
        image = self._empty()
        for entry in self.history(point):
            self.apply(image, entry)
        return image

    def images(self, points: list[Position]) -> Iterator[tuple[Position, Image]]:
        """The same at several, in their order: one image, which goes on from point to point."""
        image, known = self._empty(), []
        for point in sorted(points):
            wanted = self.history(point)
            if wanted[: len(known)] != known:
                image, known = self._empty(), []
            for entry in wanted[len(known) :]:
                self.apply(image, entry)
            known = wanted
            yield point, image

    def image_anew(self) -> None:
        """What the store holds is not what it held."""
        self._image_of, self._image = [], self._empty()

    def durable_image(self) -> Image:
        """What the target's newest durable point of the accepted writer holds."""
        durable = self.store.durable if self.store is not None else Position()
        wanted = self.history(durable) if durable.epoch else []
        known = self._image_of
        if wanted[: len(known)] != known:
            self._image, known = self._empty(), []
        for entry in wanted[len(known) :]:
            self.apply(self._image, entry)
        self._image_of = wanted
        return self._image

    def check_map(self, group: Any, source: Callable[[int], bytes]) -> None:
        """Invariant 2: where source and durable target differ, a bit is set."""
        if self.amnesia and group.status()["acknowledged"] > self._durable_seq():
            return
        if self.salvages.awaited:
            return
        self.amnesia = False
        bit = self.plan.bit_bytes
        image = self.durable_image()
        for disk in range(len(self.sizes)):
            here = source(disk)
            there = image.read(disk, len(here))
            if here == there:
                continue
            dirty = group.dirty(disk)
            for number, flag in enumerate(dirty):
                block = slice(number * bit, (number + 1) * bit)
                if not flag and here[block] != there[block]:
                    raise Violation(f"2: block {number} of disk {disk} differs and is clean")


def associated(header: bytearray, word: int, index: int) -> bytes:
    """What a piece is sealed with: see docs/internals/formats.md."""
    return bytes(header) + struct.pack("<II", word, index)
