"""Salvage: what is sound behind a loss becomes what a source compares with.

Behind records that are lost no position recovers before their source has compared its disks with
what is here. What the target still holds decides what that costs. So of every sound commit behind
the loss the records stay that are the newest for some byte at the end of the history, as they are,
in new segments: data, sizes and objects. They stand in one open gap, at their own positions, with a
gap-begin in the place of what was left out. No gap-end is among them, and no tally, since both
would speak of what is not there. The last position of the history is a gap-begin, too, that no
source made: by it the target tells the source to compare everything (`Span.repaired`).

None of it is a recovery point, so nothing depends on which records these are (docs/internals/
repair.md). It is the way of a base (`vrep.target.base`), with what the source had sealed before.

A commit is sound when its own block says so: digest, count and place. A record is left out when the
stream that sealed it is not known. Memory: 48 bytes for each record behind the loss, and a
segment. Sizes are bytes.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vrep import errors
from vrep._core import layout, record
from vrep._core import segment as native
from vrep._core.index import ExtentMap, Index, IndexBuilder
from vrep.recovery.known import Known, begins, blocks, bytes_of, covered, gap_begins_at
from vrep.recovery.unreadable import require_readable
from vrep.target.files import Files
from vrep.target.lease import Lease
from vrep.target.lost import Range, read_lost, united
from vrep.target.manifest import NOWHERE, EpochEntry, Position
from vrep.target.segment import Batch, SegmentId, SegmentWriter, digest, segment_path

__all__ = ["Salvage", "Source", "index_of", "sound_commits"]

COMMIT_BYTES: Final = 4 << 20
SEGMENT_BYTES: Final = 64 << 20
_ALIGN: Final = 64
_HEADER: Final = layout.RECORD.itemsize
_ASIDE: Final = (layout.KIND_STREAM, layout.KIND_TALLY)
_LASTING: Final = (layout.KIND_RESIZE, layout.KIND_OBJECT)

Structs = NDArray[np.void]


@dataclass(frozen=True)
class Source:
    """A segment whose sound commits are wanted, and its index where that is whole."""

    path: Path
    number: int
    index: Index | None
    last: Position = NOWHERE
    """of its records; seq 0: it was being appended to"""


@dataclass(frozen=True)
class _Stretch:
    """Records of one stream that stand back to back."""

    stream: Any
    """STREAM struct"""
    headers: Structs
    starts: NDArray[np.int64]
    end: int
    data: memoryview
    """of the whole segment"""


def sound_commits(data: memoryview, group_id: bytes, number: int) -> list[tuple[int, int]]:
    """Where the records of each commit begin and end whose own block agrees with them, in order,
    whatever stands before, between and behind them."""
    found, reach = [], 0
    for at, block in blocks(data, group_id, number):
        start, end = int(block["start"]), int(block["end"])
        if (
            reach <= start <= end <= at
            and start % _ALIGN == 0
            and at - end < _ALIGN
            and digest(data[start:at]) == block["digest"].tobytes()
        ):
            reach = at + layout.COMMIT.itemsize
            found.append((start, end))
    return found


class Salvage:
    """One salvage: `find` looks, `write` makes the new segments."""

    def __init__(
        self, group_id: bytes, lease: Lease, sources: Sequence[Source], before: Index | None
    ) -> None:
        """`sources` are the segments from the first loss on, in order; `before` the index of the
        one that stands before them."""
        self._group_id = group_id
        self._lease = lease
        self._manifest = lease.manifest
        self._sources = sources
        self._epochs = {entry.epoch: entry for entry in lease.manifest.epochs}
        self._positions: dict[int, NDArray[np.uint32]] = {}
        """where the records stand that stay, by segment; data alone"""
        self._line: dict[int, int] = {}
        self._streams: dict[int, Any] = {}
        """a stream of each epoch"""
        self._kept: dict[int, list[int]] = {}
        """seqs of the data records that were written, by epoch"""
        self._named = _named([before, *(source.index for source in sources)], self._epochs)
        self.end = self._last()
        """the last position of the history that is known, from a commit block or the manifest"""

    def _last(self) -> Position:
        rows = self._manifest.segments
        last = Position.of(rows[-1]["last"]) if len(rows) else Position()
        for source in self._sources:
            with bytes_of(source.path) as data:
                for _at, block in blocks(data, self._group_id, source.number):
                    last = max(last, Position.of(block["last"]))
        return last

    def find(self, after: Position) -> int:
        """Bytes of data behind a position that a source need not send again, if its disks still
        hold them."""
        self._line = dict(self._manifest.ancestry(self.end))
        indexes = [index for index in map(self._index, self._sources) if index is not None]
        extents = ExtentMap(indexes, self._line.items(), group_id=self._group_id)
        shown: dict[int, list[NDArray[np.uint32]]] = {}
        total = 0
        for disk, start, end in covered(indexes):
            found = extents.lookup(disk, start, end - start)
            found = found[found["kind"] == layout.KIND_WRITE]
            found = found[_between(found, after, self.end)]
            total += int(found["length"].sum(dtype=np.uint64))
            for number in np.unique(found["segment"]).tolist():
                here = found["position"][found["segment"] == number]
                shown.setdefault(number, []).append(np.unique(here))
        self._positions = {
            number: np.unique(np.concatenate(parts)) for number, parts in shown.items()
        }
        return total

    def _index(self, source: Source) -> Index | None:
        """Of what is sound in a segment."""
        builder = IndexBuilder(source.number, self._group_id)
        with bytes_of(source.path) as data:
            for part in self._stretches(source, data):
                resume = int(part.headers[0]["seq"]) - 1
                builder.add(self._stream_record(part.stream, resume), 0)
                builder.add(data[int(part.starts[0]) : part.end], int(part.starts[0]))
                self._streams[int(part.stream["epoch"])] = part.stream
        return builder.freeze() if builder.records else None

    def _stretches(self, source: Source, data: memoryview) -> Iterator[_Stretch]:
        """The records of the sound commits of a segment whose stream is known."""
        known = _Streams(source.index, self._named)
        reach, stream = self._begins(source, data)
        for start, end in sound_commits(data, self._group_id, source.number):
            if start != reach:
                stream = None  # another one may have begun in what is lost
            reach = -(-end // _ALIGN) * _ALIGN + layout.COMMIT.itemsize
            try:
                found, consumed = record.scan(data[start:end])
            except (errors.IntegrityError, errors.UnsupportedError):
                stream = None  # what it began is not known
                continue  # a digest of what never was a commit
            if not len(found):
                continue  # it says what is durable, and no more
            if consumed != end - start:
                continue  # the same
            headers = found["header"]
            starts = start + found["position"].astype(np.int64)
            ends = np.append(starts[1:], end)
            aside = np.flatnonzero(np.isin(headers["kind"], _ASIDE)).tolist()
            begin = 0
            for at in [*aside, len(headers)]:
                if at > begin:
                    stream = stream if stream is not None else known.at(starts[begin:at])
                    if stream is not None:
                        yield _Stretch(
                            stream, headers[begin:at], starts[begin:at], int(ends[at - 1]), data
                        )
                if at < len(headers) and headers[at]["kind"] == layout.KIND_STREAM:
                    body = record.parse_stream(data[int(starts[at]) : int(ends[at])])
                    stream = _of_known_epoch(body, self._epochs)
                    if stream is not None:
                        self._named[stream["stream_id"].tobytes()] = stream
                begin = at + 1

    def _begins(self, source: Source, data: memoryview) -> tuple[int, Any]:
        """Where the commits of a segment begin, and the stream that is in force there."""
        at = begins(data, source.number)
        if not at:
            return 0, None
        header = native.parse_header(data[: layout.SEGMENT_HEADER.itemsize])
        return at, self._named.get(header["stream_id"].tobytes())

    def _stream_record(self, stream: Any, resume: int) -> bytes:
        body = stream.copy()
        body["resume_seq"] = resume
        return record.stream_record(body, self._manifest.lane)

    # ---- what is not there any more -----------------------------------------------------------

    def lost(self, after: Position) -> list[Range] | None:
        """Behind `write`: what of the disks the new history may show otherwise than the one of
        before. None when that cannot be known."""
        known = Known(self._manifest, self._lease.directory, self._group_id, self._fake)
        indexes = known.indexes(self._sources)
        if indexes is None:
            return None
        found = []
        extents = ExtentMap(indexes, self._line.items(), group_id=self._group_id)
        kept = {epoch: np.unique(seqs) for epoch, seqs in self._kept.items()}
        for disk, start, end in covered(indexes):
            rows = extents.lookup(disk, start, end - start)
            rows = rows[(rows["kind"] != 0) & (_late(rows, after))]
            for epoch, seqs in kept.items():
                rows = rows[(rows["epoch"] != epoch) | ~np.isin(rows["seq"], seqs)]
            found += [Range(disk, int(row["offset"]), int(row["length"])) for row in rows]
        if not gap_begins_at(indexes, self.end):
            return united(found)
        # Perhaps an earlier repair's, of which the source does not know yet.
        store_id = self._manifest.store_id
        before = read_lost(self._lease.directory, self._group_id, store_id, self.end)
        return united([*found, *before]) if before is not None else None

    def _fake(self, epoch: int, resume: int) -> bytes:
        """A STREAM record, for an index of which nobody asks what sealed a record."""
        return self._stream_record(self._any_stream(epoch), resume)

    # ---- writing ---------------------------------------------------------------------------

    def write(self, after: Position, number: int) -> Structs:
        """Write the new segments, synced, from a number on; their entries of a manifest. The
        history before them ends at `after`. What was written is removed after an error."""
        out = _Output(self._group_id, self._lease, after, number)
        try:
            for source in self._sources:
                with bytes_of(source.path) as data:
                    for part in self._stretches(source, data):
                        self._put(source.number, part, out)
                    out.flush()  # before the bytes go away
            self._close(out)
            return out.finish()
        except BaseException:
            out.discard()
            raise

    def _put(self, number: int, part: _Stretch, out: _Output) -> None:
        """Give what stays of a stretch to the output."""
        headers = part.headers
        epoch, seqs = int(headers[0]["epoch"]), headers["seq"]
        kept = np.isin(part.starts, self._positions.get(number, np.zeros(0, np.uint32)))
        kept &= np.isin(headers["kind"], (layout.KIND_WRITE, layout.KIND_SYNC))
        kept |= np.isin(headers["kind"], _LASTING)
        kept &= seqs <= self._line.get(epoch, 0)
        kept &= _between(headers, out.after, self.end)
        ends = np.append(part.starts[1:], part.end)
        for at in np.flatnonzero(kept).tolist():
            seq, wall_ns = int(seqs[at]), int(headers[at]["wall_ns"])
            self._reach(out, epoch, wall_ns)
            out.stream(part.stream, self._stream_record)
            if not out.began and seq == out.at.seq + 1:
                out.gap(seq, wall_ns)  # the gap takes its place
                continue
            if seq > out.at.seq + 1:
                out.gap(seq - 1, wall_ns)
            if seq == out.at.seq + 1:
                out.put(part.data[int(part.starts[at]) : int(ends[at])], seq, wall_ns)
                self._kept.setdefault(epoch, []).append(seq)

    def _reach(self, out: _Output, epoch: int, wall_ns: int) -> None:
        """Go on with a later epoch: one that was left goes up to the place where it was left."""
        if epoch == out.at.epoch:
            return
        parent = self._epochs[epoch].parent
        here = out.at
        if here.epoch and here.epoch == parent.epoch and here.seq < parent.seq:
            if not out.streamed:
                out.stream(self._any_stream(here.epoch), self._stream_record)
            out.gap(parent.seq, wall_ns)
        out.begin(Position(epoch, self._manifest.lane, parent.seq))

    def _any_stream(self, epoch: int) -> Any:
        """A stream under which nothing is sealed any more; an epoch of which no stream is known
        gets one that nothing was ever sealed under."""
        known = self._streams.get(epoch)
        if known is not None:
            return known
        entry, body = self._epochs[epoch], np.zeros((), layout.STREAM)
        body["stream_id"] = np.frombuffer(secrets.token_bytes(16), np.uint8)
        body["epoch_id"] = np.frombuffer(entry.epoch_id, np.uint8)
        body["epoch"], body["parent"] = epoch, entry.parent.raw
        body["key_generation"] = max(
            (int(stream["key_generation"]) for stream in self._streams.values()), default=1
        )
        return body

    def _close(self, out: _Output) -> None:
        """The last position of the history: what stood there is not there any more."""
        wall_ns = out.wall_ns or time.time_ns()
        self._reach(out, self.end.epoch, wall_ns)
        if not out.streamed:
            out.stream(self._any_stream(self.end.epoch), self._stream_record)
        out.gap(self.end.seq, wall_ns, mono_ns=layout.MONO_REPAIRED)
        out.flush()


class _Streams:
    """Under which stream a record of a segment was sealed, as its index says."""

    def __init__(self, index: Index | None, named: dict[bytes, Any]) -> None:
        self._index, self._named = index, named
        if index is not None:
            parts = (index.short_entries, index.long_entries, index.events)
            self._at = np.concatenate([rows["position"] for rows in parts])
            self._stream = np.concatenate([rows["stream"] for rows in parts])

    def at(self, starts: NDArray[np.int64]) -> Any:
        """Of records between two STREAM records; None when that is not known."""
        if self._index is None:
            return None
        numbers = np.unique(self._stream[np.isin(self._at, starts)])
        if len(numbers) != 1 or int(numbers[0]) >= len(self._index.streams):
            return None
        return self._named.get(self._index.streams[int(numbers[0])]["stream_id"].tobytes())


def _named(indexes: Sequence[Index | None], epochs: dict[int, EpochEntry]) -> dict[bytes, Any]:
    """The streams that some indexes know, by their ids."""
    found = {}
    for row in (row for index in indexes if index is not None for row in index.streams):
        body = np.zeros((), layout.STREAM)
        body["stream_id"], body["epoch_id"] = row["stream_id"], row["epoch_id"]
        body["epoch"], body["key_generation"] = row["epoch"], row["key_generation"]
        body = _of_known_epoch(body, epochs)
        if body is not None:
            found[body["stream_id"].tobytes()] = body
    return found


def _of_known_epoch(body: Any, epochs: dict[int, EpochEntry]) -> Any:
    """A stream, if it is of an epoch that the store knows."""
    entry = epochs.get(int(body["epoch"]))
    if entry is None or entry.epoch_id != body["epoch_id"].tobytes():
        return None
    body = body.copy()
    body["parent"] = entry.parent.raw
    return body


class _Output:
    """The segments that are made."""

    def __init__(self, group_id: bytes, lease: Lease, after: Position, number: int) -> None:
        self.at = self.after = after
        self.began = self.streamed = False
        """whether the gap began; whether a stream of the epoch of `at` is in force here"""
        self.wall_ns = 0
        self._group_id, self._lease = group_id, lease
        self._files, self._number, self._written = Files(), number, after
        self._stream_id = b""
        self._room, self._records = bytearray(), 0
        self._writer: SegmentWriter | None = None
        self._paths: list[Path] = []
        self._entries: list[Structs] = []

    def begin(self, at: Position) -> None:
        """An epoch begins."""
        self.at, self.streamed = at, False

    def stream(self, body: Any, made: Any) -> None:
        """What follows was sealed under a stream."""
        identity = body["stream_id"].tobytes()
        if self.streamed and identity == self._stream_id:
            return
        self._room += made(body, self.at.seq)
        self._records += 1
        self._stream_id, self.streamed = identity, True

    def gap(self, seq: int, wall_ns: int, mono_ns: int = 0) -> None:
        """Nothing recovers from here on."""
        headers = np.zeros(1, layout.RECORD)
        headers["magic"], headers["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
        headers["kind"], headers["flags"] = layout.KIND_GAP_BEGIN, layout.RECORD_JUMP
        headers["epoch"], headers["lane"] = self.at.epoch, self.at.lane
        headers["seq"], headers["wall_ns"], headers["mono_ns"] = seq, wall_ns, mono_ns
        record.finish(headers)
        self.began = True
        self.put(headers.tobytes(), seq, wall_ns)

    def put(self, data: bytes | memoryview, seq: int, wall_ns: int) -> None:
        self._room += data
        self._records += 1
        self.at, self.wall_ns = self.at._replace(seq=seq), wall_ns
        if len(self._room) >= COMMIT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Commit what was put."""
        if not self._records:
            return
        room, self._room, self._records = self._room, bytearray(), 0
        if self._writer is None:
            self._writer = self._begin()
        batch = Batch.of(room, record.scan(room)[0])
        end = self._writer.write([batch], self._written, self._lease.aging.now_ns())
        self._writer.sync()
        self._writer.committed([batch], end)
        self._written = batch.last
        if end >= SEGMENT_BYTES:
            self._seal()

    def _begin(self) -> SegmentWriter:
        manifest, number = self._lease.manifest, self._number
        self._number += 1
        path = segment_path(self._lease.directory, number)
        path.unlink(missing_ok=True)  # of a repair that was cut off
        ident = SegmentId(self._group_id, manifest.store_id, number, manifest.lease)
        self._paths.append(path)
        return SegmentWriter(self._files, path, ident, self._written, None, time.time_ns())

    def _seal(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.builder.aged(self._lease.aging.now_ns())
            self._entries.append(writer.seal())
        finally:
            writer.close()
        self.streamed = False  # each segment names its own

    def finish(self) -> Structs:
        self.flush()
        self._seal()
        self._files.sync_directory(self._lease.directory)
        return np.stack(self._entries)

    def discard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for path in self._paths:
            path.unlink(missing_ok=True)


def _late(rows: Structs, after: Position) -> NDArray[np.bool_]:
    """Which of some extents stand behind a position."""
    epochs = rows["epoch"]
    late: NDArray[np.bool_] = epochs > after.epoch
    late |= (epochs == after.epoch) & (rows["seq"] > after.seq)
    return late


def _between(rows: Structs, after: Position, end: Position) -> NDArray[np.bool_]:
    """Which of some extents or headers stand behind one position and before another."""
    epochs, seqs = rows["epoch"], rows["seq"]
    late = _late(rows, after)
    late &= (epochs < end.epoch) | ((epochs == end.epoch) & (seqs < end.seq))
    return late


def index_of(path: Path, entry: Any) -> Index | None:
    """The index of a closed segment, if it is whole and the one that the manifest names, whatever
    became of the records before it."""
    try:
        if path.stat().st_size != int(entry["file_bytes"]):
            return None
        require_readable(path, int(entry["data_end"]))
        index = Index.open(path, verify=True)
    except (errors.IntegrityError, OSError):
        return None
    return index if index.digest == entry["index_digest"].tobytes() else None
