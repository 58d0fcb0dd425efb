"""Check: that nothing of a group's history was changed, left out, added or taken back.

Every commit's digest, the order of all records, the place where each epoch and stream goes on,
and, with the tenant's key, every sealed tally: the running digest over the tags of all records
of a stream, which only the source can write. What a tally does not agree with is narrowed down
to the record. Without the key all but the tallies is checked, and the verdict says so.

A segment that was closed and checked is not read again while its file is the same (size, inode,
times of change); what was found, and where to go on, stands in DIR/checked/<group>.sealed.json,
under a MAC of a key derived from the data key. The newest position that was ever checked stands
there too: a store that ends before it was rolled back.

What was folded holds no tallies: it is checked by its digests and for order, and the verdict says
how far it goes. Behind it the tallies go on from the state that the fold left, which is compared
with what an earlier check knew of that place (docs/internals/fold.md).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from vrep._core import layout, record
from vrep._core import segment as native
from vrep._core.index import Index, IndexBuilder
from vrep._core.seal import Tally
from vrep.durable import make_private_directory, write_atomic
from vrep.errors import AuthError, CorruptError, IntegrityError, OmittedError
from vrep.paths import SitePaths
from vrep.recovery.access import KeyAccess
from vrep.target.manifest import Position
from vrep.target.reader import RecordSpan, StoreReader

__all__ = ["Verdict", "check_history"]

log = logging.getLogger("vrep.recovery")

VERSION: Final = 1
Structs = NDArray[np.void]
Progress = Callable[[int, int], None]
"""bytes checked, bytes in all"""


class Verdict(msgspec.Struct, frozen=True):
    """What a check found. A check that finds something wrong raises instead, unless it was
    asked to go on."""

    whole: bool
    """nothing is changed or missing, as far as was checked"""
    sealed: bool
    """tallies were checked, with the tenant's key"""
    checked_to: str
    """pos:EPOCH/LANE/SEQ: order and digests"""
    tallied_to: str
    """pos:EPOCH/LANE/SEQ: covered by a tally that agrees; empty without the key"""
    records: int
    tallies: int
    folded_to: str = ""
    """pos:EPOCH/LANE/SEQ: up to here the target has folded, and what it left out there is not
    proven; empty: nothing is folded"""
    error: str = ""
    note: str = ""


class _State(msgspec.Struct):
    """Where a check stands behind a segment."""

    position: tuple[int, int, int] = (0, 0, 0)
    stream: str = ""
    """as the bytes of its STREAM body, hex"""
    tally: str = ""
    tallied: tuple[int, int, int] = (0, 0, 0)
    records: int = 0
    tallies: int = 0
    sealed: bool = True
    """every tally so far was checked"""
    folded: tuple[int, int, int] = (0, 0, 0)
    """so far was folded"""

    def place(self) -> tuple[object, ...]:
        """What decides how the check goes on from here."""
        return (self.position, self.stream, self.tally)


class _Checked(msgspec.Struct, frozen=True):
    """A closed segment that was checked."""

    segment: int
    stamps: tuple[int, int, int, int]
    after: _State


class _Cache(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    segments: list[_Checked]
    newest: tuple[int, int, int]


class _File(msgspec.Struct, frozen=True):
    mac: str
    content: msgspec.Raw


@dataclass
class _Check:
    """One check of one snapshot."""

    reader: StoreReader
    access: KeyAccess | None
    state: _State = field(default_factory=_State)
    tally: Tally = field(default_factory=Tally)
    stream: Any = None
    pending: list[tuple[int, int]] = field(default_factory=list)
    """(segment, byte) of records that no tally covers yet"""

    def resume(self, state: _State) -> None:
        self.state = msgspec.json.decode(msgspec.json.encode(state), type=_State)
        self.tally = Tally()
        self.stream = None
        self.pending = []
        if state.stream:
            body = np.frombuffer(bytes.fromhex(state.stream), layout.STREAM)
            self.stream = body[0]
            self.tally.load(bytes.fromhex(state.tally))

    def segment(self, number: int) -> None:
        """Check one segment; the state stands behind it."""
        try:
            block = native.parse_fold(self.reader.segment(number))
        except IntegrityError as error:
            raise type(error)(f"segment {number:08x}, its header: {error.detail}") from None
        if block is not None:
            self._folded(number, block)
            return
        if self.state.folded != (0, 0, 0) and not self.state.stream:
            raise CorruptError(f"segment {number:08x}: the fold before it does not say how it ends")
        closed = number != self.reader.manifest.active_segment
        index = self._index(number) if closed else None
        builder = self._builder(number, index) if index is not None else None
        for span in self.reader.spans(number):
            records = self._span(span)
            if builder is not None:
                builder.add(records, span.start)
        if index is not None and builder is not None:
            self._compare(number, index, builder)
        if self.stream is not None:
            self.state.tally = self.tally.save().hex()

    def _folded(self, number: int, block: Any) -> None:
        """Check a folded segment: its digests, its index, and that its records may be there."""
        where = f"segment {number:08x}"
        manifest = self.reader.manifest
        horizon, end = Position.of(block["horizon"]), Position.of(block["end"])
        entry = manifest.segments[int(np.searchsorted(manifest.segments["segment"], number))]
        if int(entry["generation"]) != int(block["generation"]):
            raise CorruptError(f"{where} is of fold {int(block['generation'])}")
        kept_to = dict(manifest.ancestry(manifest.horizon)) if manifest.horizon.seq else {}
        if horizon.seq > kept_to.get(horizon.epoch, 0) or end > manifest.horizon:
            raise OmittedError(f"{where} was folded past the horizon, {manifest.horizon}")
        if self.stream is not None and self.state.position > self.state.folded:
            raise OmittedError(f"{where} was folded, but not what stands before it")
        line = manifest.ancestry(horizon)
        index = self._index(number)
        builder = IndexBuilder(number, self.reader.group_id)
        stream = b""
        for span in self.reader.spans(number):
            headers = span.found["header"]
            self._folded_order(where, headers, line)
            last = int(span.found["position"][-1]) + layout.RECORD.itemsize
            size = last + int(headers["body_bytes"][-1])
            part = self.reader.read(number, span.start, size)
            builder.add(part, span.start)
            streams = np.flatnonzero(headers["kind"] == layout.KIND_STREAM)
            for at in streams:
                stream = self._known_stream(where, part[int(span.found["position"][at]) :])
            self.state.records += len(headers) - len(streams)
        self._compare(number, index, builder)
        self.state.position = self.state.folded = (end.epoch, end.lane, end.seq)
        self.state.stream = self.state.tally = ""
        self.stream, self.pending = None, []
        if int(block["flags"]) & layout.FOLD_TALLIED:
            if not stream:
                raise CorruptError(f"{where} does not end with a stream")
            self.state.stream = stream.hex()
            self.state.tally = block["tally"].tobytes().hex()
            self.resume(self.state)

    def _folded_order(self, where: str, headers: Structs, line: list[tuple[int, int]]) -> None:
        """Records of a folded segment are of the line of its horizon, each behind the last."""
        solid = headers[headers["kind"] != layout.KIND_STREAM]
        if (solid["kind"] == layout.KIND_TALLY).any():
            raise CorruptError(f"{where} was folded, but has a tally")
        reach, lane = dict(line), self.reader.manifest.lane
        for epoch, seq in zip(solid["epoch"].tolist(), solid["seq"].tolist(), strict=True):
            here = (epoch, lane, seq)
            if here <= self.state.position or seq > reach.get(epoch, 0):
                raise OmittedError(
                    f"{where}: {Position(*here)} does not belong behind "
                    f"{Position(*self.state.position)}"
                )
            self.state.position = here

    def _known_stream(self, where: str, whole: memoryview) -> bytes:
        """The body of a STREAM record, of an epoch that the store knows."""
        size = layout.RECORD.itemsize + layout.STREAM.itemsize
        body = record.parse_stream(whole[:size])
        known = {entry.epoch: entry.epoch_id for entry in self.reader.epochs}
        if known.get(int(body["epoch"])) != body["epoch_id"].tobytes():
            raise CorruptError(f"{where}: a stream of an epoch that the store does not know")
        return bytes(body.tobytes())

    def _span(self, span: RecordSpan) -> memoryview:
        """Check the records of one commit; their bytes."""
        data = self.reader.segment(span.segment)
        headers = span.found["header"]
        starts = span.start + span.found["position"].astype(np.int64)
        kinds = headers["kind"]
        ends = starts + layout.RECORD.itemsize + headers["body_bytes"].astype(np.int64)
        records = data[span.start : int(ends[-1])]
        self._order(span, headers, starts, records)
        aside = np.flatnonzero((kinds == layout.KIND_STREAM) | (kinds == layout.KIND_TALLY))
        begin = 0
        for at in [*aside.tolist(), len(headers)]:
            if at > begin:
                if self.stream is None:
                    raise OmittedError(
                        f"segment {span.segment:08x}, byte {int(starts[begin])}: the history "
                        f"begins at {Position.of(headers[begin])}, without a stream"
                    )
                self.tally.update(data[int(starts[begin]) : int(ends[at - 1])])
                if self.access is not None:
                    self.pending += [(span.segment, int(s)) for s in starts[begin:at]]
                self.state.records += at - begin
            if at:
                self._reach(headers[at - 1])
            if at < len(headers):
                whole = data[int(starts[at]) : int(ends[at])]
                if kinds[at] == layout.KIND_STREAM:
                    self._begin_stream(span.segment, int(starts[at]), whole)
                else:
                    self._tally(span.segment, int(starts[at]), headers[at], whole)
            begin = at + 1
        return records

    def _reach(self, header: Any) -> None:
        self.state.position = (int(header["epoch"]), int(header["lane"]), int(header["seq"]))

    def _order(self, span: RecordSpan, headers: Structs, starts: Any, data: memoryview) -> None:
        """Each record follows the one before it."""
        order = record.Order()
        epoch, lane, seq = self.state.position
        if epoch:
            order.seed(epoch=epoch, lane=lane, seq=seq)
        try:
            record.scan(data, order=order)
        except CorruptError:
            previous = Position(epoch, lane, seq)
            for header, start in zip(headers, starts, strict=True):
                here = Position.of(header)
                aside = header["kind"] in (layout.KIND_STREAM, layout.KIND_TALLY)
                jump = bool(int(header["flags"]) & layout.RECORD_JUMP)
                if previous.epoch and here.epoch == previous.epoch and not jump:
                    wanted = previous.seq if aside else previous.seq + 1
                    if here.seq != wanted:
                        raise OmittedError(
                            f"segment {span.segment:08x}, byte {int(start)}: {here} follows "
                            f"{previous}"
                        ) from None
                previous = here
            raise OmittedError(
                f"segment {span.segment:08x}: what follows {epoch}/{lane}/{seq} is out of order"
            ) from None

    def _begin_stream(self, segment: int, at: int, whole: memoryview) -> None:
        """A stream goes on where the one before ended; an epoch, where it left its parent."""
        where = f"segment {segment:08x}, byte {at}"
        body = record.parse_stream(whole)
        entry = next(
            (e for e in self.reader.epochs if e.epoch == int(body["epoch"])),
            None,
        )
        if entry is None or entry.epoch_id != body["epoch_id"].tobytes():
            raise CorruptError(f"{where}: a stream of an epoch that the store does not know")
        epoch, _lane, seq = self.state.position
        if entry.epoch != epoch:
            parent = entry.parent
            if int(body["resume_seq"]) != parent.seq:
                raise OmittedError(f"{where}: epoch {entry.epoch} does not begin at {parent}")
            if parent.epoch == epoch and parent.seq > seq:
                raise OmittedError(
                    f"{where}: epoch {epoch} ends at {seq}, but epoch {entry.epoch} left it "
                    f"at {parent.seq}"
                )
        self.stream = body.copy()
        self.state.stream = body.tobytes().hex()
        self.tally.reset()
        self.pending = []

    def _tally(self, segment: int, at: int, header: Any, whole: memoryview) -> None:
        where = f"segment {segment:08x}, byte {at}"
        if self.stream is None:
            raise CorruptError(f"{where}: a tally of no stream")
        if self.access is None:
            self.state.sealed = False
            return
        opener = self.access.opener(self.stream)
        position = Position.of(header)
        try:
            opener.tally(whole, self.tally)
        except AuthError:
            raise AuthError(
                f"{where}: the tally at {position} was changed, or sealed under another key"
            ) from None
        except CorruptError:
            self._find_changed(opener)
            raise OmittedError(
                f"{where}: the records up to {position} are not those that the source sealed "
                f"after {Position(*self.state.tallied)}: some are missing or out of place"
            ) from None
        self.state.tallied = (position.epoch, position.lane, position.seq)
        self.state.tallies += 1
        self.pending = []

    def _find_changed(self, opener: Any) -> None:
        """Name the record that does not authenticate, if one does not."""
        for segment, at in self.pending:
            whole = self.reader.record(segment, at)
            header = np.frombuffer(whole[: layout.RECORD.itemsize], layout.RECORD)[0]
            if not int(header["pieces"]):
                continue  # its header alone is in the tally
            room = bytearray(int(header["length"]))
            try:
                opener.record(whole, room)
            except IntegrityError as error:
                raise AuthError(
                    f"segment {segment:08x}, byte {at}: record {Position.of(header)} was changed "
                    f"({error.detail})"
                ) from None

    def _index(self, number: int) -> Index:
        return Index.open(self.reader.path(number), verify=True)

    def _builder(self, number: int, index: Index) -> IndexBuilder:
        head = self.reader.read(number, 0, layout.SEGMENT_HEADER.itemsize)
        named = np.frombuffer(head, layout.SEGMENT_HEADER)[0]["stream_id"]
        if not named.any():
            return IndexBuilder(number, self.reader.group_id)
        for row in index.streams:
            if (row["stream_id"] == named).all():
                return IndexBuilder(number, self.reader.group_id, stream=row)
        raise CorruptError(f"{index.name}: it does not know the stream that its segment starts in")

    def _compare(self, number: int, index: Index, builder: IndexBuilder) -> None:
        """The index of a closed segment says what its records say, and nothing else."""
        rebuilt = builder.freeze()
        same = rebuilt.trailer["short_digest"] == index.trailer["short_digest"]
        for mine, stored in (
            (rebuilt.long_entries, index.long_entries),
            (rebuilt.events, index.events),
            (rebuilt.streams, index.streams),
        ):
            same = same and mine.tobytes() == stored.tobytes()
        if not same:
            raise CorruptError(
                f"{index.name}: the index of segment {number:08x} does not say what its records say"
            )


def check_history(
    paths: SitePaths,
    reader: StoreReader,
    access: KeyAccess | None,
    *,
    progress: Progress | None = None,
    fresh: bool = False,
) -> Verdict:
    """Check the whole history, from where earlier checks ended; with `fresh` every byte of it is
    read again, since files can rot without a trace. OmittedError, AuthError or CorruptError name
    the segment and the position of what is wrong."""
    cache = _CacheFile(paths, reader.group_id, access)
    check = _Check(reader, access)
    numbers = reader.numbers()
    entries = {int(e["segment"]): int(e["file_bytes"]) for e in reader.manifest.segments}
    total = sum(entries.values())
    kept: list[_Checked] = []
    for number in numbers:
        known = cache.segments.get(number)
        if (
            fresh
            or known is None
            or len(kept) != numbers.index(number)
            or known.stamps != _stamps(reader, number)
            or (access is not None and not known.after.sealed)
        ):
            break
        kept.append(known)
    if kept:
        check.resume(kept[-1].after)
    done = sum(entries.get(k.segment, 0) for k in kept)
    for number in numbers[len(kept) :]:
        stamps = _stamps(reader, number)
        known = cache.goes_on(number, stamps, check.state, sealed=access is not None)
        if known is not None and not fresh:
            # A fold before it, which leads to where the check stood then.
            folded = check.state.folded
            check.resume(known.after)
            check.state.folded = max(folded, known.after.folded)
        else:
            check.segment(number)
            cache.compare(check.state)
        if number in entries:
            after = msgspec.json.decode(msgspec.json.encode(check.state), type=_State)
            kept.append(_Checked(number, stamps, after))
            done += entries[number]
            if progress is not None:
                progress(done, total)
    newest = Position(*check.state.position)
    before = Position(*cache.newest)
    if newest < before:
        raise OmittedError(
            f"the history ends at {newest}, but it was checked up to {before} before: what came "
            "after was taken away"
        )
    cache.store(kept, newest)
    sealed = access is not None and check.state.sealed
    notes = [] if sealed else ["the tallies were not checked: the tenant's key is not held here"]
    folded, tallied = Position(*check.state.folded), Position(*check.state.tallied)
    if folded.seq:
        notes.append(f"what was left out of the history up to pos:{folded} is not proven")
    return Verdict(
        whole=True,
        sealed=sealed,
        checked_to=f"pos:{newest}",
        tallied_to=f"pos:{tallied}" if sealed and tallied.seq else "",
        records=check.state.records,
        tallies=check.state.tallies if sealed else 0,
        folded_to=f"pos:{folded}" if folded.seq else "",
        note="; ".join(notes),
    )


def _stamps(reader: StoreReader, number: int) -> tuple[int, int, int, int]:
    path = reader.path(number)
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None  # a run may still cover it
    return (status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


class _CacheFile:
    """What earlier checks found. One that was changed or is of another key counts as none."""

    def __init__(self, paths: SitePaths, group_id: bytes, access: KeyAccess | None) -> None:
        # Without the key nothing can be proven: such a check never replaces one that had it.
        kind = "sealed" if access is not None else "open"
        self._path: Path = paths.root / "checked" / f"{group_id.hex()}.{kind}.json"
        self._key = access.derive(b"checked") if access is not None else b""
        self.segments: dict[int, _Checked] = {}
        self._before: dict[int, _State] = {}
        """where the check stood before a segment"""
        self._tallies: dict[tuple[tuple[int, int, int], str], str] = {}
        """where segments end, by position and stream: a segment that holds a STREAM alone ends
        where the one before it did"""
        self.newest = (0, 0, 0)
        try:
            stored = msgspec.json.decode(self._path.read_bytes(), type=_File)
            if not hmac.compare_digest(stored.mac, self._mac(bytes(stored.content))):
                return
            cache = msgspec.json.decode(stored.content, type=_Cache)
        except (FileNotFoundError, msgspec.MsgspecError):
            return
        if cache.version == VERSION:
            self.segments = {each.segment: each for each in cache.segments}
            before = _State()
            for each in cache.segments:
                self._before[each.segment] = before
                before = each.after
                self._tallies[before.position, before.stream] = before.tally
            self.newest = cache.newest

    def goes_on(
        self, number: int, stamps: tuple[int, int, int, int], here: _State, *, sealed: bool
    ) -> _Checked | None:
        """What is known of a segment that is still the same, before which the check stood where
        it stands now."""
        known = self.segments.get(number)
        if known is None or known.stamps != stamps or (sealed and not known.after.sealed):
            return None
        return known if self._before[number].place() == here.place() else None

    def compare(self, here: _State) -> None:
        """OmittedError when a fold ends in another way than what was checked there before."""
        if here.folded != here.position or not here.stream:
            return
        if self._tallies.get((here.position, here.stream), here.tally) != here.tally:
            raise OmittedError(
                f"the fold up to {Position(*here.folded)} does not lead to what was checked there "
                "before"
            )

    def _mac(self, content: bytes) -> str:
        return hmac.new(self._key, content, hashlib.sha256).hexdigest()

    def store(self, segments: list[_Checked], newest: Position) -> None:
        content = msgspec.json.encode(
            _Cache(VERSION, segments, (newest.epoch, newest.lane, newest.seq))
        )
        whole = msgspec.json.encode(_File(self._mac(content), msgspec.Raw(content)))
        try:
            make_private_directory(self._path.parent)
            write_atomic(self._path, whole)
        except OSError as error:
            # Recovery works on a full disk. The next check reads more, and compares the end of
            # the history with an older one.
            log.warning("%s: what was checked is not kept: %s", self._path, error.strerror or error)
