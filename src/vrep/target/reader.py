"""A read-only snapshot of a group's store, from any process, beside its writer.

`StoreReader` takes the newest manifest, the indexes that it names, and what is committed of
the segment that is being appended. What it shows as durable is: it syncs that segment before
it looks, so a record that it saw cannot vanish in a crash. While it is open, no file that it
may read is removed. `refresh` takes a new snapshot; arrays and maps of the old one stay valid.

Threads: one at a time calls `refresh` or `close`; `read` and the rest may be called by any
number between them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vrep._core import layout, record
from vrep._core import segment as native
from vrep._core.index import ExtentMap, Index, IndexBuilder
from vrep.errors import CorruptError, IntegrityError, NotFoundError, RangeError, StorageError
from vrep.target import runs
from vrep.target.manifest import DiskEntry, EpochEntry, Manifest, Position, load_newest
from vrep.target.segment import (
    TailScan,
    digest,
    entry_path,
    index_tail,
    run_path,
    scan_tail,
    segment_path,
)

__all__ = ["Event", "RecordSpan", "StoreReader"]

Structs = NDArray[np.void]
_TRAILER_BYTES: Final = layout.INDEX_TRAILER.itemsize
_ATTEMPTS: Final = 8


@dataclass(frozen=True)
class Event:
    """A mark, a gap's begin or end, an object or a resize, and where its record stands."""

    position: Position
    wall_ns: int
    kind: int
    segment: int
    at: int
    """bytes from the start of the segment"""
    stream: Any
    """INDEX_STREAM struct of the stream that sealed it"""


@dataclass(frozen=True)
class RecordSpan:
    """Records that stand back to back: `found` are their headers, with positions counted
    from `start` of the segment."""

    segment: int
    start: int
    found: Structs


@dataclass(frozen=True)
class _Tail:
    """The committed part of the segment that is being appended."""

    number: int
    data: memoryview
    scan: TailScan
    builder: IndexBuilder
    index: Index


class StoreReader:
    """Reads a group's store. Close it: it holds files back from removal."""

    def __init__(
        self, directory: str | os.PathLike[str], group_id: bytes, *, scattered: bool = False
    ) -> None:
        """`directory` is a site's ``store``. `scattered`: what is read lies here and there,
        so the system shall not read its neighbours. NotFoundError when it has no such group,
        CorruptError, naming file and position, when something durable is damaged."""
        self.directory = Path(directory) / group_id.hex()
        self.group_id = group_id
        if not self.directory.is_dir():
            raise NotFoundError(f"no store of group {group_id.hex()} in {directory}")
        self._scattered = scattered
        self._maps: dict[int, memoryview] = {}
        self._generations: dict[int, int] = {}
        """of the files that are mapped"""
        self._files: dict[int, mmap.mmap] = {}
        self._maps_lock = threading.Lock()
        self._indexes: dict[tuple[int, int, bytes], Index] = {}
        self.manifest: Manifest
        self._tail: _Tail | None = None
        self._pin = runs.Pin(self.directory)
        try:
            self.refresh()
        except BaseException:
            self._pin.close()
            raise

    def refresh(self) -> None:
        """Look again."""
        for attempt in range(_ATTEMPTS):
            manifest = load_newest(self.directory, self.group_id)
            try:
                indexes, tail = self._load(manifest)
            except FileNotFoundError as error:
                newest = load_newest(self.directory, self.group_id)
                if attempt + 1 < _ATTEMPTS and newest.number != manifest.number:
                    continue  # the writer went on meanwhile
                raise CorruptError(f"{error.filename} is missing") from None
            except OSError as error:
                raise StorageError(f"{self.directory}: {error.strerror or error}") from None
            self.manifest, self._indexes, self._tail = manifest, indexes, tail
            self._forget_folded()
            return
        raise CorruptError(f"{self.directory} changes faster than it can be read")

    def _forget_folded(self) -> None:
        """Files that a fold replaced are not those of their segments any more."""
        now = dict(
            zip(
                self.manifest.segments["segment"].tolist(),
                self.manifest.segments["generation"].tolist(),
                strict=True,
            )
        )
        with self._maps_lock:
            for number in [n for n, held in self._generations.items() if now.get(n) != held]:
                del self._maps[number], self._files[number], self._generations[number]

    def _load(self, manifest: Manifest) -> tuple[dict[tuple[int, int, bytes], Index], _Tail | None]:
        indexes: dict[tuple[int, int, bytes], Index] = {}
        known = {
            **{(0, int(s["segment"])): s for s in manifest.segments},
            **{(1, int(r["run"])): r for r in manifest.runs},
        }
        for unit in runs.units(manifest):
            entry = known[(min(unit.level, 1), unit.number)]
            wanted = entry["index_digest"].tobytes()
            key = (unit.level, unit.number, wanted)
            index = self._indexes.get(key)
            if index is None:
                path = unit.path(self.directory)
                _check_trailer(path, int(entry["file_bytes"]), wanted)
                index = Index.open(path)
            indexes[key] = index
        return indexes, self._load_tail(manifest)

    def _load_tail(self, manifest: Manifest) -> _Tail | None:
        number = manifest.active_segment
        if not number:
            return None
        path = segment_path(self.directory, number)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The size first: what is below it does not change any more.
            size = os.fstat(fd).st_size
            os.fdatasync(fd)
            data = _read(fd, size)
        finally:
            os.close(fd)
        try:
            scan = scan_tail(data, self.group_id, number)
        except CorruptError as error:
            raise CorruptError(f"{path}: {error.detail}") from None
        stream = None
        if scan.header["stream_id"].any():
            newest = entry_path(self.directory, manifest.segments[-1])
            stream = Index.open(newest).streams[-1]
        builder = index_tail(data[: scan.end], scan, self.group_id, stream)
        return _Tail(number, data[: scan.end].toreadonly(), scan, builder, builder.freeze())

    def close(self) -> None:
        """Let go of the files."""
        self._pin.close()
        with self._maps_lock:
            self._maps.clear()
            self._files.clear()
            self._generations.clear()

    def __enter__(self) -> StoreReader:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # ---- what there is -------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def epochs(self) -> tuple[EpochEntry, ...]:
        return self.manifest.epochs

    @property
    def disks(self) -> tuple[DiskEntry, ...]:
        """With the sizes that they had when the store was made: `disks_at` tells those of a
        point."""
        return self.manifest.disks

    def disks_at(self, point: Position) -> tuple[DiskEntry, ...]:
        """The disks with the sizes that they had at a point."""
        line, newest = dict(self.ancestry(point)), dict[int, tuple[Position, int]]()
        for event in self.events():
            if event.kind != layout.KIND_RESIZE:
                continue
            if event.position.seq <= line.get(event.position.epoch, 0):
                header = self.header(event.segment, event.at)
                disk, found = int(header["disk"]), (event.position, int(header["offset"]))
                newest[disk] = max(newest.get(disk, found), found)
        return tuple(
            replace(disk, bytes=newest[disk.index][1]) if disk.index in newest else disk
            for disk in self.manifest.disks
        )

    @property
    def wrapped_keys(self) -> tuple[bytes, ...]:
        return self.manifest.wrapped_keys

    @property
    def durable(self) -> Position:
        """The last durable position, of any epoch; seq 0 when there is none."""
        if self._tail is not None and self._tail.scan.records:
            return self._tail.scan.last
        segments = self.manifest.segments
        return Position.of(segments[-1]["last"]) if len(segments) else Position()

    @property
    def oldest(self) -> Position:
        """The first position of the store; seq 0 when there is none."""
        segments = self.manifest.segments
        if len(segments):
            return Position.of(segments[0]["first"])
        return Position(*self._tail.builder.first) if self._tail is not None else Position()

    @property
    def indexes(self) -> list[Index]:
        """All indexes, oldest first; each closed segment is in exactly one."""
        found = list(self._indexes.values())
        if self._tail is not None and self._tail.scan.records:
            found.append(self._tail.index)
        return found

    def durable_of(self, epoch: int) -> Position:
        """The last durable position of the history that an epoch goes on with: its own, or
        that of its parent where it left it."""
        best = self.manifest.epoch(epoch).parent
        for span in self._segments():
            if span["last"]["epoch"] == epoch:
                best = Position.of(span["last"])
        if self.durable.epoch == epoch:
            best = self.durable
        return best

    def _segments(self) -> Iterator[Any]:
        yield from self.manifest.segments

    def ancestry(self, point: Position) -> list[tuple[int, int]]:
        """``[(epoch, highest seq)]`` of the history that ends at a point, newest first."""
        return self.manifest.ancestry(point)

    def has(self, point: Position) -> bool:
        """Whether everything that a point needs is there. So it is of every point that is kept,
        and of others as long as no fold was made at a horizon that is not on their line."""
        if self.manifest.keeps(point):
            return True
        line = dict(self.ancestry(point))
        for row in self.manifest.segments[self.manifest.segments["generation"] > 0]:
            block = native.parse_fold(self._segment_bytes(int(row["segment"])))
            if block is None or line.get(int(block["horizon"]["epoch"]), 0) < int(
                block["horizon"]["seq"]
            ):
                return False
        return True

    def extent_map(self, point: Position) -> ExtentMap:
        """What every disk held at a point."""
        extents = ExtentMap(self.indexes, self.ancestry(point), group_id=self.group_id)
        if self._scattered:
            extents.scatter()
        return extents

    def events(self) -> list[Event]:
        """Marks, gaps, objects and resizes, in order of position; of every epoch."""
        found = []
        for index in self.indexes:
            streams, rows = index.streams, index.events
            names = ("at", "wall_ns", "kind", "segment", "position", "stream")
            for at, wall_ns, kind, segment, position, stream in zip(
                *(rows[name].tolist() for name in names), strict=True
            ):
                epoch, lane, _zero, seq = at
                place = Position(epoch, lane, seq)
                found.append(Event(place, wall_ns, kind, segment, position, streams[stream]))
        found.sort(key=lambda event: (event.segment, event.at))
        return found

    def times(self) -> Structs:
        """The time index: one INDEX_TIME sample for each commit, in order of writing."""
        parts = [index.times for index in self.indexes]
        return np.concatenate(parts) if parts else np.zeros(0, layout.INDEX_TIME)

    # ---- bytes -----------------------------------------------------------------------------

    def read(self, segment: int, position: int, length: int) -> memoryview:
        """Bytes of a segment, such as a record or a piece. They stay valid."""
        data = self._segment_bytes(segment)
        if position < 0 or length < 0 or position + length > len(data):
            raise RangeError(
                f"segment {segment:08x} has {len(data)} bytes, not {position} + {length}"
            )
        return data[position : position + length]

    def will_need(self, segment: int, position: int, length: int) -> None:
        """Begin to read bytes of a segment; what is wrong shows when they are read. Only for
        scattered reads: what is read in order the system reads ahead by itself."""
        if not self._scattered:
            return
        self._segment_bytes(segment)
        room = self._files.get(segment)
        if room is not None and 0 <= position < len(room):
            start = position // mmap.PAGESIZE * mmap.PAGESIZE
            room.madvise(mmap.MADV_WILLNEED, start, min(position + length, len(room)) - start)

    def segment(self, number: int) -> memoryview:
        """All committed bytes of a segment, from its header to its last commit block."""
        return self._segment_bytes(number)

    def record(self, segment: int, position: int) -> memoryview:
        """The whole record at a position."""
        body = record.check_header(self.read(segment, position, layout.RECORD.itemsize))
        return self.read(segment, position, layout.RECORD.itemsize + body)

    def header(self, segment: int, position: int) -> Any:
        """The header of the record at a position, checked."""
        data = self.read(segment, position, layout.RECORD.itemsize)
        record.check_header(data)
        return np.frombuffer(data, layout.RECORD, 1)[0]

    def _segment_bytes(self, segment: int) -> memoryview:
        tail = self._tail
        if tail is not None and segment == tail.number:
            return tail.data
        with self._maps_lock:
            data = self._maps.get(segment)
            if data is None:
                data = self._maps[segment] = self._map(segment)
            return data

    def _entry(self, segment: int) -> Any:
        """What the manifest says of a closed segment."""
        at = int(np.searchsorted(self.manifest.segments["segment"], segment))
        if at == len(self.manifest.segments) or self.manifest.segments[at]["segment"] != segment:
            raise RangeError(f"the store has no segment {segment:08x}")
        return self.manifest.segments[at]

    def path(self, segment: int) -> Path:
        """The file of a segment."""
        if segment == self.manifest.active_segment:
            return segment_path(self.directory, segment)
        return entry_path(self.directory, self._entry(segment))

    def _map(self, segment: int) -> memoryview:
        entry = self._entry(segment)
        path = entry_path(self.directory, entry)
        try:
            runs.check_file(path, int(entry["file_bytes"]))
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from None
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, fd)
            room = self._files[segment] = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
            self._generations[segment] = int(entry["generation"])
        if self._scattered:
            room.madvise(mmap.MADV_RANDOM)
        return memoryview(room)[: int(entry["data_end"])]

    # ---- records ---------------------------------------------------------------------------

    def numbers(self, first: Position | None = None, last: Position | None = None) -> list[int]:
        """Numbers of the segments that may hold records from `first` to `last`, rising."""
        found = []
        for entry in self.manifest.segments:
            begins, ends = Position.of(entry["first"]), Position.of(entry["last"])
            if (first is None or ends >= first) and (last is None or begins <= last):
                found.append(int(entry["segment"]))
        if self._tail is not None and self._tail.scan.records:
            found.append(self._tail.number)
        return found

    def records(
        self, first: Position | None = None, last: Position | None = None
    ) -> Iterator[RecordSpan]:
        """All records of the segments that may hold those from `first` to `last`, a span for
        each commit, verified by the commits' digests. Whole segments: the caller drops what
        lies outside."""
        for number in self.numbers(first, last):
            yield from self.spans(number)

    def spans(self, number: int) -> Iterator[RecordSpan]:
        """The records of one segment, a span for each commit, verified by their digests."""
        data = self._segment_bytes(number)
        try:
            result, commits = native.scan(data, self.group_id, number, commits=True)
        except IntegrityError as error:
            raise type(error)(f"segment {number:08x}: {error.detail}") from None
        if result["end"] != len(data):
            raise CorruptError(
                f"segment {number:08x} is damaged at byte {result['wrong_at']} of {len(data)}, "
                f"after position {result['last'][0]}/{result['last'][1]}"
            )
        for commit in commits:
            start, end = int(commit["start"]), int(commit["end"])
            found, _consumed = record.scan(data[start:end])
            if len(found):
                yield RecordSpan(number, start, found)

    def verify(self) -> int:
        """Read everything and check every digest; how many records there are."""
        for entry in self.manifest.segments:
            Index.open(entry_path(self.directory, entry), verify=True)
        for entry in self.manifest.runs:
            Index.open(run_path(self.directory, int(entry["run"])), verify=True)
        return sum(len(span.found) for span in self.records())


def _read(fd: int, size: int) -> memoryview:
    room = memoryview(bytearray(size))
    at = 0
    while at < size:
        count = os.preadv(fd, [room[at:]], at)
        if count == 0:
            break  # cut since its size was taken: the scan judges what is left
        at += count
    return room[:at]


def _check_trailer(path: Path, file_bytes: int, wanted: bytes) -> None:
    runs.check_file(path, file_bytes)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.pread(fd, _TRAILER_BYTES, file_bytes - _TRAILER_BYTES)
    finally:
        os.close(fd)
    if digest(found) != wanted:
        raise CorruptError(f"{path}: its index is not the one that the manifest names")
