"""One segment file: appending commits, closing it, and what a crash left of it.

A segment is appended by one thread. Commit block n + 1 is written only after commit n was
synced: that is what lets a scan (format/segment.h) tell a torn tail from damage.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from vrep._core import layout, record
from vrep._core import segment as native
from vrep._core.index import Index, IndexBuilder
from vrep.target.files import Buffer, Files
from vrep.target.manifest import Position

__all__ = [
    "HEADER_BYTES",
    "Batch",
    "SegmentId",
    "SegmentWriter",
    "TailScan",
    "aged_at",
    "digest",
    "entry_path",
    "index_tail",
    "read_header",
    "run_path",
    "scan_tail",
    "segment_name",
    "segment_path",
    "write_footer",
]

HEADER_BYTES: Final = layout.SEGMENT_HEADER.itemsize
_TRAILER_BYTES: Final = layout.INDEX_TRAILER.itemsize
_ALIGN: Final = 64

Structs = NDArray[np.void]
StreamRow = Any
"""one INDEX_STREAM struct"""


def segment_name(number: int, generation: int = 0) -> str:
    """What a segment is called; a fold makes another file of it, of a higher generation."""
    return f"seg-{number:08x}-{generation:x}" if generation else f"seg-{number:08x}"


def segment_path(directory: Path, number: int, generation: int = 0) -> Path:
    """Where a segment is."""
    return directory / segment_name(number, generation)


def entry_path(directory: Path, entry: Any) -> Path:
    """Where the segment of a manifest's entry is."""
    return segment_path(directory, int(entry["segment"]), int(entry["generation"]))


def run_path(directory: Path, number: int) -> Path:
    return directory / f"run-{number:08x}"


def aged_at(directory: Path, entry: Any) -> int:
    """What had passed for the store (see `aging`) when the segment of a manifest's entry was
    closed: the segments that a fold replaced, where it is one of a fold. 0: that is not known."""
    return int(Index.open(entry_path(directory, entry)).trailer["aged_ns"])


def digest(data: Buffer) -> bytes:
    """XXH3-128 as vrep stores it: low half first."""
    return xxhash.xxh3_128_intdigest(data).to_bytes(16, "little")


@dataclass(frozen=True)
class SegmentId:
    """What every block of a segment repeats."""

    group_id: bytes
    store_id: bytes
    number: int
    lease: int


@dataclass(frozen=True)
class Batch:
    """Whole records as they were received, and what is known of them."""

    buffer: Buffer
    records: int
    last: Position
    wall_ns: int
    """of the last record that consumed a seq; 0 when none did"""
    ticket: int = 0
    """bytes appended to the store up to the end of this batch"""
    turns: tuple[Any, ...] = ()
    """headers of its gap-begins and gap-ends, and of the records before them"""
    resizes: tuple[Any, ...] = ()
    """headers of its resizes"""

    @classmethod
    def of(cls, buffer: Buffer, found: Structs, ticket: int = 0) -> Batch:
        headers = found["header"]
        kinds = headers["kind"]
        solid = np.flatnonzero((kinds != layout.KIND_STREAM) & (kinds != layout.KIND_TALLY))
        last = headers[-1]
        return cls(
            buffer=buffer,
            records=len(found),
            last=Position.of(last),
            wall_ns=int(headers[solid[-1]]["wall_ns"]) if len(solid) else 0,
            ticket=ticket,
            turns=_turns(headers, solid),
            resizes=tuple(headers[kinds == layout.KIND_RESIZE]),
        )


def _turns(headers: Structs, solid: NDArray[np.intp]) -> tuple[Any, ...]:
    kinds = headers["kind"][solid]
    at = np.flatnonzero((kinds == layout.KIND_GAP_BEGIN) | (kinds == layout.KIND_GAP_END))
    if not len(at):
        return ()
    return tuple(headers[solid[np.union1d(at, np.maximum(at - 1, 0))]])


class SegmentWriter:
    """The segment that is being appended."""

    def __init__(
        self,
        files: Files,
        path: Path,
        ident: SegmentId,
        after: Position,
        stream: StreamRow | None,
        wall_ns: int,
    ) -> None:
        """Create the file; its header is synced, its name is not."""
        self.path = path
        self.ident = ident
        self.after = after
        self.end = HEADER_BYTES
        """of the last commit block that was synced"""
        self.commits = 0
        self.last = after
        self.builder = IndexBuilder(ident.number, ident.group_id, stream)
        self._files = files
        head = np.zeros((), layout.SEGMENT_HEADER)
        head["group_id"] = np.frombuffer(ident.group_id, np.uint8)
        head["store_id"] = np.frombuffer(ident.store_id, np.uint8)
        head["segment"], head["lease"], head["wall_ns"] = ident.number, ident.lease, wall_ns
        head["after"] = after.raw
        if stream is not None:
            head["stream_id"] = stream["stream_id"]
        self._fd = files.create(path)
        try:
            files.write(self._fd, [native.header(head)], 0)
            files.sync(self._fd)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, batches: Sequence[Batch], durable: Position, wall_ns: int) -> int:
        """Append a commit of these records, not yet synced; where it ends. Nothing of this
        object changes: a write that failed may be tried again."""
        buffers = [batch.buffer for batch in batches]
        end = self.end + sum(len(buffer) for buffer in buffers)
        block = np.zeros((), layout.COMMIT)
        block["segment"], block["number"] = self.ident.number, self.commits + 1
        block["start"], block["end"] = self.end, end
        block["last"] = (batches[-1].last if batches else self.last).raw
        block["durable"] = durable.raw
        block["group_id"] = np.frombuffer(self.ident.group_id, np.uint8)
        block["wall_ns"] = wall_ns
        block["records"] = sum(batch.records for batch in batches)
        tail = native.commit(block, buffers)
        self._files.append(self._fd, [*buffers, tail], self.end)
        return end + len(tail)

    def sync(self) -> None:
        self._files.sync(self._fd)

    def cut(self) -> None:
        """Take back what a failed write left behind the last commit."""
        self._files.truncate(self._fd, self.end)

    def committed(self, batches: Sequence[Batch], end: int) -> None:
        """What `write` appended is durable: count and index it."""
        at = self.end
        for batch in batches:
            self.builder.add(batch.buffer, at)
            at += len(batch.buffer)
            if batch.wall_ns:
                self.builder.time(batch.wall_ns, *batch.last)
            self.last = batch.last
        self.commits += 1
        self.end = end

    def seal(self) -> Structs:
        """Write and sync the index footer; the manifest's entry of the segment. May be
        repeated after an error."""
        return write_footer(self._files, self._fd, self.builder, self.last, self.end)

    def forget(self) -> None:
        """What was synced needs no memory any more."""
        self._files.forget(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def write_footer(files: Files, fd: int, builder: IndexBuilder, last: Position, end: int) -> Structs:
    """The footer at `end` of a segment, synced; the manifest's entry of the segment."""
    footer = builder.finish(end)
    files.write(fd, [footer], end)
    files.truncate(fd, end + len(footer))
    files.sync(fd)
    first = Position(*builder.first)
    entry = np.zeros((), layout.MANIFEST_SEGMENT)
    entry["segment"], entry["records"] = builder.segment, builder.records
    entry["file_bytes"], entry["data_end"] = end + len(footer), end
    entry["first"], entry["last"] = (first if first.seq else last).raw, last.raw
    entry["data_bytes"] = builder.data_bytes
    entry["index_digest"] = np.frombuffer(digest(footer[-_TRAILER_BYTES:]), np.uint8)
    return entry


def read_header(data: memoryview) -> Position:
    """Behind which position a segment begins. CorruptError."""
    return Position.of(native.parse_header(data[:HEADER_BYTES])["after"])


@dataclass(frozen=True)
class TailScan:
    """What the bytes of a segment without a footer hold."""

    number: int
    header: Any
    end: int
    """of the last whole commit block"""
    records: int
    last: Position
    commits: Structs


def scan_tail(data: memoryview, group_id: bytes, number: int) -> TailScan:
    """The durable prefix, or more, of a segment's bytes. CorruptError names the segment and
    the positions when bytes are wrong that are known to have been durable."""
    result, commits = native.scan(data, group_id, number, commits=True)
    header = native.parse_header(data[:HEADER_BYTES])
    last = Position(result["last"][0], result["lane"], result["last"][1])
    return TailScan(
        number=number,
        header=header,
        end=result["end"],
        records=result["records"],
        last=last,
        commits=commits,
    )


def index_tail(
    data: memoryview, scan: TailScan, group_id: bytes, stream: StreamRow | None
) -> IndexBuilder:
    """The index of a scanned tail. `stream` is the one that its header names, if it does."""
    builder = IndexBuilder(scan.number, group_id, stream)
    for commit in scan.commits:
        start, end = int(commit["start"]), int(commit["end"])
        if end == start:
            continue
        part = data[start:end]
        builder.add(part, start)
        found, _end = record.scan(part)
        batch = Batch.of(part, found)
        if batch.wall_ns:
            builder.time(batch.wall_ns, *batch.last)
    return builder
