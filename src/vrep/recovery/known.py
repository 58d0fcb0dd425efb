"""Known: what the records of damaged segments covered, from what still tells.

A closed segment's records stand in the index at its end and in the merged run that covers it, each
known by the digest that the manifest has of it; and where both are gone, or the segment was being
appended to, in the headers of its records: each has a checksum of its own, and their number stands
in the commit's block. So a commit of which a body is damaged still says which ranges it covered.
Either all of a segment is known, or nothing is said of it. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from vrep import errors
from vrep._core import layout, record
from vrep._core import segment as native
from vrep._core.index import Index, IndexBuilder
from vrep.checksum import CHECKSUM_BYTES, checksum32
from vrep.recovery.unreadable import read_sound, require_readable
from vrep.target.manifest import Manifest, Position
from vrep.target.segment import run_path

if TYPE_CHECKING:
    from vrep.recovery.salvage import Source

__all__ = ["Known", "begins", "blocks", "bytes_of", "covered", "gap_begins_at"]

_ALIGN: Final = 64


@contextmanager
def bytes_of(path: Path) -> Iterator[memoryview]:
    """What can be read of a file."""
    yield memoryview(read_sound(path))


def blocks(data: memoryview, group_id: bytes, number: int) -> Iterator[tuple[int, Any]]:
    """The commit blocks of a segment that are whole, and where they stand, whatever is between."""
    steps = len(data) // _ALIGN
    words = np.frombuffer(data[: steps * _ALIGN], "<u4").reshape(-1, _ALIGN // 4)
    for step in np.flatnonzero(words[:, 0] == layout.COMMIT_MAGIC).tolist():
        at = step * _ALIGN
        raw = data[at : at + layout.COMMIT.itemsize]
        if len(raw) < layout.COMMIT.itemsize:
            return
        block = np.frombuffer(raw, layout.COMMIT)[0]
        same = int(block["segment"]) == number and block["group_id"].tobytes() == group_id
        if same and checksum32(raw[:-CHECKSUM_BYTES]) == int(block["checksum"]):
            yield at, block


def begins(data: memoryview, number: int) -> int:
    """Where the commits of a segment begin; 0 when its header is damaged or another's."""
    try:
        header = native.parse_header(data[: layout.SEGMENT_HEADER.itemsize])
    except errors.IntegrityError:
        return 0
    if int(header["segment"]) != number:
        return 0
    folded = int(header["flags"]) & layout.SEGMENT_FOLDED
    return int(layout.SEGMENT_HEADER.itemsize) + (layout.FOLD.itemsize if folded else 0)


def covered(indexes: Sequence[Index]) -> Iterator[tuple[int, int, int]]:
    """What the entries of some indexes cover: (disk, start, end), apart and rising."""
    parts = [rows for index in indexes for rows in (index.short_entries, index.long_entries)]
    rows = np.concatenate([np.zeros(0, layout.INDEX_ENTRY), *parts])
    for disk in np.unique(rows["disk"]).tolist():
        mine = rows[rows["disk"] == disk]
        order = np.argsort(mine["offset"], kind="stable")
        starts = mine["offset"][order]
        reach = np.maximum.accumulate(starts + mine["length"][order])
        first = np.append(True, starts[1:] > reach[:-1])
        last = np.append(first[1:], True)
        for start, end in zip(starts[first].tolist(), reach[last].tolist(), strict=True):
            yield disk, start, end


def gap_begins_at(indexes: Sequence[Index], position: Position) -> bool:
    """Whether the record of a position is a gap-begin."""
    for index in indexes:
        events = index.events[index.events["kind"] == layout.KIND_GAP_BEGIN]
        at = events["at"]
        if ((at["epoch"] == position.epoch) & (at["seq"] == position.seq)).any():
            return True
    return False


class Known:
    """Looks for what still tells of segments of one store."""

    def __init__(
        self,
        manifest: Manifest,
        directory: Path,
        group_id: bytes,
        stream: Callable[[int, int], bytes],
    ) -> None:
        """`stream` makes a STREAM record of an epoch that resumes at a seq."""
        self._manifest = manifest
        self._directory = directory
        self._group_id = group_id
        self._stream = stream
        self._runs: dict[int, Index | None] = {}

    def indexes(self, sources: Sequence[Source]) -> list[Index] | None:
        """Indexes in which all records of these segments stand, others perhaps as well; None when
        one of the segments is not known."""
        found: dict[int, Index] = {}
        for source in sources:
            index = source.index or self._run(source.number)
            if index is None:
                known, index = self._by_headers(source)
                if not known:
                    return None
            if index is not None:
                found[id(index)] = index
        return list(found.values())

    def _run(self, number: int) -> Index | None:
        """The merged run that covers a segment, if it is whole."""
        for row in self._manifest.runs:
            if int(row["first_segment"]) <= number <= int(row["last_segment"]):
                run = int(row["run"])
                if run not in self._runs:
                    self._runs[run] = self._open(run, row)
                return self._runs[run]
        return None

    def _open(self, run: int, row: Any) -> Index | None:
        path = run_path(self._directory, run)
        try:
            require_readable(path, 0)
            index = Index.open(path, verify=True)
        except (errors.VrepError, OSError):
            return None
        return index if index.digest == row["index_digest"].tobytes() else None

    def _by_headers(self, source: Source) -> tuple[bool, Index | None]:
        """Whether all records of a segment are known from their headers, and their index."""
        builder = IndexBuilder(source.number, self._group_id)
        last = Position()
        with bytes_of(source.path) as data:
            reach = begins(data, source.number)
            if not reach:
                return False, None
            for at, block in blocks(data, self._group_id, source.number):
                if int(block["start"]) != reach or not self._add(builder, data, at, block):
                    return False, None
                reach = at + layout.COMMIT.itemsize
                last = Position.of(block["last"])
        if source.last.seq and source.last != last:
            return False, None  # its end is lost
        return True, builder.freeze() if builder.records else None

    def _add(self, builder: IndexBuilder, data: memoryview, at: int, block: Any) -> bool:
        """The headers of one commit, if they are whole and all of them are there."""
        start, end = int(block["start"]), int(block["end"])
        if not start <= end <= at or at - end >= _ALIGN:
            return False
        try:
            found, consumed = record.scan(data[start:end])
            if consumed != end - start or len(found) != int(block["records"]):
                return False
            if not len(found):
                return True
            first = found["header"][0]
            if first["kind"] != layout.KIND_STREAM:
                stream, epoch = builder.stream, int(first["epoch"])
                if stream is None or int(stream["epoch"]) != epoch:
                    builder.add(self._stream(epoch, int(first["seq"]) - 1), 0)
            builder.add(data[start:end], start)
        except (errors.IntegrityError, errors.UnsupportedError, KeyError):
            return False  # a header is damaged, or a stream that began here
        return True
