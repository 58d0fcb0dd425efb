"""Fold: neighbouring segments rewritten without what no kept recovery point needs.

docs/internals/fold.md says what may be dropped and why. What is live is found from indexes
alone; live records are copied as they are, unread, in runs as long as they stand, so the work on
bytes (digests, writes) is done in C. The new files have names of their own: until a manifest
names them they are nothing.

Only the thread that keeps a store up may fold it. Sizes are bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vrep._core import layout, record
from vrep._core import segment as native
from vrep._core.index import ExtentMap, Index, IndexBuilder
from vrep._core.seal import Tally
from vrep.errors import CorruptError
from vrep.target import runs
from vrep.target.files import Files
from vrep.target.manifest import Manifest, Position
from vrep.target.segment import aged_at, entry_path, segment_path, write_footer

__all__ = ["Folded", "Good", "Judge", "Live", "choose", "fold_segments", "foldable", "name_of"]

Structs = NDArray[np.void]

Good = dict[tuple[int, int], tuple[int, int]]
"""segments (number, generation) that need no fold: bytes that the disks show, and all bytes"""

COMMIT_BYTES: Final = 4 << 20
"""a commit of a folded segment ends when it holds so much"""
DEAD_MIN: Final = 0.25
"""share of dead bytes from which a folded segment is folded again"""
SEGMENTS_MAX: Final = 64
"""of one step"""
_HEADER: Final = layout.RECORD.itemsize
_STREAM_RECORD: Final = _HEADER + layout.STREAM.itemsize
_DATA: Final = (layout.KIND_WRITE, layout.KIND_SYNC)
_ZEROES: Final = (layout.KIND_ZEROES, layout.KIND_SYNC_ZEROES)
_LASTING: Final = (layout.KIND_RESIZE, layout.KIND_OBJECT)
"""kinds of which any may be the one that counts, but for versions of an object that has a newer"""


def foldable(manifest: Manifest) -> Structs:
    """The closed segments that lie at or before the horizon, oldest first. The newest closed one
    is left alone: what follows it goes on with the stream that stands at its end."""
    rows = manifest.segments[:-1]
    last, horizon = rows["last"], manifest.horizon
    before = (last["epoch"] < horizon.epoch) | (
        (last["epoch"] == horizon.epoch) & (last["seq"] <= horizon.seq)
    )
    count = int(np.argmin(before)) if len(before) and not before.all() else len(before)
    return rows[:count]


class Judge:
    """What is live at the horizon of a manifest, by the indexes of its closed segments. What
    only the open segment supersedes counts as live."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._indexes = [Index.open(unit.path(directory)) for unit in runs.units(manifest)]
        self._line = manifest.ancestry(manifest.horizon)
        self._map = ExtentMap(self._indexes, self._line, group_id=manifest.group_id)
        self._objects = self._find_objects()

    def _find_objects(self) -> dict[int, list[tuple[int, int, bool]]]:
        """By segment: place and size of each object of the line, and whether it is the newest
        version at the horizon. Names are sealed; versions of one object have one tag."""
        rows = []
        for index in self._indexes:
            events = index.events[index.events["kind"] == layout.KIND_OBJECT]
            rows += list(events[self.visible(events["at"]["epoch"], events["at"]["seq"])])
        rows.sort(key=lambda row: Position.of(row["at"]))
        found: dict[int, list[tuple[int, int, bool]]] = {}
        seen: set[int] = set()
        for row in reversed(rows):
            number, at = int(row["segment"]), int(row["position"])
            header = self._header(number, at)
            tag, size = int(header["offset"]), int(header["length"])
            found.setdefault(number, []).append((at, size, not tag or tag not in seen))
            seen.add(tag)
        return found

    def _header(self, number: int, at: int) -> Any:
        """Of a record of a closed segment, checked."""
        rows = self._manifest.segments
        path = entry_path(self._directory, rows[int(np.searchsorted(rows["segment"], number))])
        with path.open("rb") as file:
            file.seek(at)
            data = file.read(_HEADER)
        record.check_header(data)
        return np.frombuffer(data, layout.RECORD)[0]

    def _map_to(self, end: Position) -> ExtentMap:
        """The disks as the line of the horizon had them at an earlier position."""
        line = [
            (epoch, min(seq, end.seq) if epoch == end.epoch else seq)
            for epoch, seq in self._line
            if epoch <= end.epoch
        ]
        return ExtentMap(self._indexes, line, group_id=self._manifest.group_id)

    def visible(self, epochs: Any, seqs: Any) -> NDArray[np.bool_]:
        """Which positions are on the line of the horizon, up to it."""
        found = np.zeros(len(epochs), bool)
        for epoch, seq in self._line:
            found |= (epochs == epoch) & (seqs <= seq)
        return found

    def live(self, entry: Any) -> Live:
        """The records of a segment that hold something of the disks at the horizon, and its own."""
        index = Index.open(entry_path(self._directory, entry))
        rows = np.concatenate([index.short_entries, index.long_entries])
        mine = rows[self.visible(rows["epoch"], rows["seq"])]
        number = int(entry["segment"])
        held: list[NDArray[np.uint32]] = []
        shown = 0
        for disk in np.unique(mine["disk"]):
            of_disk = mine[mine["disk"] == disk]
            for start, end in _ranges(of_disk["offset"], of_disk["length"].astype(np.uint64)):
                found = self._map.lookup(int(disk), start, end - start)
                here = (found["segment"] == number) & (found["kind"] != 0)
                held.append(found["position"][here])
                data = here & (found["kind"] == layout.KIND_WRITE)
                shown += int(found["length"][data].sum(dtype=np.uint64))
        positions = np.unique(np.concatenate(held)) if held else np.zeros(0, np.uint32)
        chosen = mine[np.isin(mine["position"], positions)]
        idle = [
            int(row["position"])
            for row in chosen[np.isin(chosen["kind"], _ZEROES)]
            if not self._covers(row)
        ]
        horizon = self._manifest.horizon
        here = mine[(mine["epoch"] == horizon.epoch) & (mine["seq"] == horizon.seq)]
        positions = np.setdiff1d(positions, np.array(idle, np.uint32))
        positions = np.union1d(positions, here["position"])
        chosen = mine[np.isin(mine["position"], positions)]
        size = chosen[np.isin(chosen["kind"], _DATA)]["length"].astype(np.uint64)
        total = rows[np.isin(rows["kind"], _DATA)]["length"].astype(np.uint64)
        records = len(np.unique(rows["position"]))
        objects = self._objects.get(number, [])
        newest = sum(length for _at, length, is_newest in objects if is_newest)
        return Live(
            positions,
            int(size.sum()) + newest,
            int(total.sum()) + sum(length for _at, length, _is_newest in objects),
            shown + newest,
            records,
            np.array([at for at, _length, is_newest in objects if not is_newest], np.int64),
        )

    def _covers(self, row: Any) -> bool:
        """Whether the store has a record of the line older than some zeroes, in their range."""
        epoch, seq = int(row["epoch"]), int(row["seq"])
        before = self._map_to(Position(epoch, self._manifest.lane, seq - 1))
        offset = int(row["offset"])
        found = before.next_written(int(row["disk"]), offset)
        return found is not None and found < offset + int(row["length"])

    def keeps(self, headers: Structs, starts: NDArray[np.int64], live: Live) -> NDArray[np.bool_]:
        """Which records of a segment stay, but for STREAM records, which follow the others."""
        horizon, kinds = self._manifest.horizon, headers["kind"]
        kept: NDArray[np.bool_] = np.isin(starts, live.positions)
        kept &= np.isin(kinds, _DATA + _ZEROES)
        visible = self.visible(headers["epoch"], headers["seq"])
        kept |= visible & np.isin(kinds, _LASTING) & ~np.isin(starts, live.old_objects)
        here = (headers["epoch"] == horizon.epoch) & (headers["seq"] == horizon.seq)
        aside = (kinds == layout.KIND_STREAM) | (kinds == layout.KIND_TALLY)
        stays: NDArray[np.bool_] = (kept | here) & ~aside
        return stays


@dataclass(frozen=True)
class Live:
    """What of a segment is live."""

    positions: NDArray[np.uint32]
    """of its records, sorted"""
    data_bytes: int
    """plaintext of live records, objects among them"""
    total_bytes: int
    """plaintext of all its records"""
    shown_bytes: int
    """of that, what the disks show at the horizon"""
    records: int
    """writes and zeroes, live or not"""
    old_objects: NDArray[np.int64]
    """where versions of objects stand that have a newer one at the horizon"""

    @property
    def dead_share(self) -> float:
        """Of what a fold would give back; in a segment without data all or nothing."""
        if self.total_bytes:
            return 1 - self.data_bytes / self.total_bytes
        return float(self.records > len(self.positions))


def _ranges(offsets: NDArray[np.uint64], lengths: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """The union of some ranges, as ranges that do not touch."""
    order = np.argsort(offsets, kind="stable")
    starts, ends = offsets[order], (offsets + lengths)[order]
    reach = np.maximum.accumulate(ends)
    first = np.append(True, starts[1:] > reach[:-1])
    last = np.append(first[1:], True)
    return list(zip(starts[first].tolist(), reach[last].tolist(), strict=True))


def name_of(entry: Any) -> tuple[int, int]:
    """Number and generation of a segment."""
    return int(entry["segment"]), int(entry["generation"])


def choose(
    manifest: Manifest, judge: Judge, segment_bytes: int, good: Good
) -> list[tuple[Any, Live]]:
    """The neighbours of the next step, oldest first; empty when nothing is worth one. `good`
    gathers the segments that need none at this horizon."""
    rows = foldable(manifest)
    chosen: list[tuple[Any, Live]] = []
    held = 0
    for at, row in enumerate(rows):
        name = name_of(row)
        live = judge.live(row) if name not in good else None
        if live is None or (name[1] and live.dead_share < DEAD_MIN):
            if live is not None:
                good[name] = (live.shown_bytes, live.total_bytes)
            if chosen:
                break
            continue
        if not chosen and at and int(rows[at - 1]["data_end"]) < segment_bytes // 4:
            # A small one before it joins in: else every step would leave one more.
            chosen.append((rows[at - 1], judge.live(rows[at - 1])))
            held = chosen[0][1].data_bytes
        chosen.append((row, live))
        held += live.data_bytes
        if held >= segment_bytes or len(chosen) >= SEGMENTS_MAX:
            break
    return chosen


@dataclass(frozen=True)
class Folded:
    """What a step made."""

    entries: Structs
    """of the new files, for the manifest"""
    first: int
    last: int
    """numbers of the segments that they replace"""
    input_bytes: int
    output_bytes: int


@dataclass
class _State:
    """What is in force where the reading stands."""

    stream: bytes = b""
    """the STREAM record, whole"""
    tally: Tally = field(default_factory=Tally)
    known: bool = False
    """the tally is that of all records of the stream so far"""


def fold_segments(
    directory: Path,
    manifest: Manifest,
    judge: Judge,
    chosen: Sequence[tuple[Any, Live]],
    files: Files,
    *,
    segment_bytes: int,
    wall_ns: int,
    pace: Callable[[int], None] = lambda _bytes: None,
) -> Folded:
    """Write the files that take the place of some neighbours, synced. CorruptError when one of
    them is damaged: nothing of it is carried on. What was written is removed after an error.
    `pace` is told of bytes as they are read and written."""
    numbers = [int(row["segment"]) for row, _live in chosen]
    generation = 1 + max(int(row["generation"]) for row, _live in chosen)
    state = _before(directory, manifest, numbers[0])
    out = _Output(files, directory, manifest, numbers, generation, segment_bytes, wall_ns, pace)
    try:
        out.aged_ns = aged_at(directory, chosen[-1][0])
        for row, live in chosen:
            _read_segment(directory, manifest, judge, row, live, state, out, pace)
        out.input_bytes = sum(int(row["data_end"]) for row, _live in chosen)
        out.input_records = sum(int(row["records"]) for row, _live in chosen)
        entries = out.finish(state, Position.of(chosen[-1][0]["last"]))
    except BaseException:
        out.discard()
        raise
    return Folded(entries, numbers[0], numbers[-1], out.input_bytes, out.written)


def _before(directory: Path, manifest: Manifest, number: int) -> _State:
    """What is in force before the first segment of a step."""
    at = int(np.searchsorted(manifest.segments["segment"], number))
    if at == 0:
        return _State(known=True)
    entry = manifest.segments[at - 1]
    with _mapped(directory, entry) as data:
        state = _State()
        _take_over(entry, data, state)
        return state


def _take_over(entry: Any, data: memoryview, state: _State) -> None:
    """What is in force behind a folded segment."""
    block = native.parse_fold(data)
    if block is None:
        raise CorruptError(f"segment {int(entry['segment']):08x} was received, not folded")
    state.known = bool(int(block["flags"]) & layout.FOLD_TALLIED)
    if state.known:
        at = len(data) - layout.COMMIT.itemsize - _STREAM_RECORD
        state.stream = bytes(data[at : at + _STREAM_RECORD])
        record.parse_stream(state.stream)
        state.tally.load(block["tally"].tobytes())


def _read_segment(
    directory: Path,
    manifest: Manifest,
    judge: Judge,
    row: Any,
    live: Live,
    state: _State,
    out: _Output,
    pace: Callable[[int], None],
) -> None:
    """Give what stays of a segment to the output."""
    number, path = int(row["segment"]), entry_path(directory, row)
    with _mapped(directory, row) as data:
        try:
            result, commits = native.scan(data, manifest.group_id, number, commits=True)
        except CorruptError as error:
            raise CorruptError(f"{path}: {error.detail}") from None
        if result["end"] != len(data):
            raise CorruptError(f"{path} is damaged at byte {result['wrong_at']}")
        received = native.parse_fold(data) is None
        if received and not state.known:
            raise CorruptError(f"segment {number:08x}: what stands before it does not say how")
        for commit in commits:
            start, end = int(commit["start"]), int(commit["end"])
            _read_commit(data, start, end, judge, live, received, state, out)
            pace(end - start)
        out.flush()  # before the bytes go away
        if not received:
            _take_over(row, data, state)


def _read_commit(
    data: memoryview,
    start: int,
    end: int,
    judge: Judge,
    live: Live,
    received: bool,
    state: _State,
    out: _Output,
) -> None:
    found, _consumed = record.scan(data[start:end])
    headers = found["header"]
    starts = start + found["position"].astype(np.int64)
    ends = np.append(starts[1:], end)
    kept = judge.keeps(headers, starts, live)
    kinds = headers["kind"]
    aside = np.flatnonzero((kinds == layout.KIND_STREAM) | (kinds == layout.KIND_TALLY))
    begin = 0
    for at in [*aside.tolist(), len(headers)]:
        if at > begin:
            if received:
                state.tally.update(data[int(starts[begin]) : int(ends[at - 1])])
            for first, last in _stretches(kept[begin:at]):
                rows = headers[begin + first : begin + last]
                part = data[int(starts[begin + first]) : int(ends[begin + last - 1])]
                out.put(part, rows, state.stream)
        if at < len(headers) and kinds[at] == layout.KIND_STREAM:
            state.stream = bytes(data[int(starts[at]) : int(ends[at])])
            state.tally.reset()
        begin = at + 1


def _stretches(kept: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where a mask is set, as (first, behind the last)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


@contextlib.contextmanager
def _mapped(directory: Path, entry: Any) -> Iterator[memoryview]:
    """The committed bytes of a closed segment."""
    path = entry_path(directory, entry)
    runs.check_file(path, int(entry["file_bytes"]))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        room = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        room.madvise(mmap.MADV_SEQUENTIAL)
        yield memoryview(room)[: int(entry["data_end"])]
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


class _Output:
    """The files of a step."""

    def __init__(
        self,
        files: Files,
        directory: Path,
        manifest: Manifest,
        numbers: list[int],
        generation: int,
        segment_bytes: int,
        wall_ns: int,
        pace: Callable[[int], None],
    ) -> None:
        self.aged_ns = 0
        self.input_bytes = self.input_records = self.written = 0
        self._files = files
        self._directory = directory
        self._manifest = manifest
        self._numbers = numbers
        self._generation = generation
        self._segment_bytes = segment_bytes
        self._wall_ns = wall_ns
        self._pace = pace
        self._entries: list[Structs] = []
        self._paths: list[Path] = []
        self._fd = -1
        self._pending: list[tuple[memoryview | bytes, int]] = []
        self._pending_bytes = 0
        self._last = _after(directory, manifest, numbers[0])
        self._builder: IndexBuilder
        self._stream = b""
        self._end = self._commits = 0

    def put(self, part: memoryview, rows: Structs, stream: bytes) -> None:
        """Records of one stream, back to back."""
        if self._fd < 0:
            self._begin()
        if stream != self._stream:
            self._add(stream, 1, _position(stream))
            self._stream = stream
        self._add(part, len(rows), Position.of(rows[-1]))
        horizon = self._manifest.horizon
        if (rows["epoch"][-1], rows["seq"][-1]) == (horizon.epoch, horizon.seq):
            # The only record here that a time can mean.
            self._builder.time(int(rows["wall_ns"][-1]), *horizon)
        if self._pending_bytes >= COMMIT_BYTES:
            self.flush()
            if self._end >= self._segment_bytes and len(self._entries) + 1 < len(self._numbers):
                self._close(None, None)

    def _add(self, part: memoryview | bytes, records: int, last: Position) -> None:
        self._pending.append((part, records))
        self._pending_bytes += len(part)
        self._last = last

    def _begin(self) -> None:
        number = self._numbers[len(self._entries)]
        path = segment_path(self._directory, number, self._generation)
        self._fd = self._files.create(path)
        self._paths.append(path)
        self._builder = IndexBuilder(number, self._manifest.group_id, None)
        self._after = self._last
        self._stream = b""
        self._end = layout.SEGMENT_HEADER.itemsize + layout.FOLD.itemsize
        self._commits = 0

    def flush(self) -> None:
        """Write a commit of what was put."""
        if not self._pending:
            return
        buffers = [part for part, _records in self._pending]
        end = self._end + self._pending_bytes
        self._commits += 1
        block = np.zeros((), layout.COMMIT)
        block["segment"] = self._builder.segment
        block["number"], block["start"], block["end"] = self._commits, self._end, end
        block["last"], block["durable"] = self._last.raw, self._after.raw
        block["group_id"] = np.frombuffer(self._manifest.group_id, np.uint8)
        block["wall_ns"] = self._wall_ns
        block["records"] = sum(records for _part, records in self._pending)
        tail = native.commit(block, buffers)
        self._files.append(self._fd, [*buffers, tail], self._end)
        at = self._end
        for part in buffers:
            self._builder.add(part, at)
            at += len(part)
        self._end = end + len(tail)
        self._pending, self._pending_bytes = [], 0
        self._pace(self._end - int(block["start"]))

    def finish(self, state: _State, end: Position) -> Structs:
        """Close the last file, which says what is in force behind it."""
        if self._fd < 0:
            self._begin()
        self.flush()
        if state.known and state.stream:
            # By itself in the last commit, where the next step finds it.
            self._add(state.stream, 1, _position(state.stream))
            self.flush()
        self._close(state if state.known and state.stream else None, end)
        self._files.sync_directory(self._directory)
        return np.stack(self._entries)

    def _close(self, state: _State | None, end: Position | None) -> None:
        """End the file that is open. Without `end` another one follows it."""
        manifest, builder = self._manifest, self._builder
        head = np.zeros((), layout.SEGMENT_HEADER)
        head["group_id"] = np.frombuffer(manifest.group_id, np.uint8)
        head["store_id"] = np.frombuffer(manifest.store_id, np.uint8)
        head["segment"], head["lease"] = builder.segment, manifest.lease
        head["flags"], head["wall_ns"] = layout.SEGMENT_FOLDED, self._wall_ns
        head["after"] = self._after.raw
        block = np.zeros((), layout.FOLD)
        block["segment"], block["generation"] = builder.segment, self._generation
        block["horizon"], block["end"] = manifest.horizon.raw, (end or self._last).raw
        block["input_bytes"], block["input_records"] = self.input_bytes, self.input_records
        if state is not None:
            block["flags"] = layout.FOLD_TALLIED
            block["tally"] = np.frombuffer(state.tally.save(), np.uint8)
        self._files.write(self._fd, [native.header(head), native.fold(block)], 0)
        builder.aged(self.aged_ns)
        entry = write_footer(self._files, self._fd, builder, end or self._last, self._end)
        entry["generation"] = self._generation
        if not builder.records:
            entry["first"] = self._after.raw if self._after.seq else entry["last"]
        self._entries.append(entry)
        self.written += int(entry["file_bytes"])
        self._files.forget(self._fd)
        os.close(self._fd)
        self._fd = -1

    def discard(self) -> None:
        """Remove what was written."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        for path in self._paths:
            self._files.unlink(path)


def _after(directory: Path, manifest: Manifest, number: int) -> Position:
    """The last position before a segment."""
    at = int(np.searchsorted(manifest.segments["segment"], number))
    return Position.of(manifest.segments[at - 1]["last"]) if at else Position()


def _position(stream: bytes) -> Position:
    return Position.of(np.frombuffer(stream, layout.RECORD, 1)[0])
