"""The oldest and the newest recovery point of a store, while it is written.

What they are is said in recovery/history.py; here the gaps are followed as they become durable,
so that a status costs no walk. They are of the line of the newest accepted epoch: what `latest`
means. The newest is the last durable record, or the one before the gap that is open; the oldest the
horizon of the store, where it has one.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from vrep._core import layout, record
from vrep._core.index import Index
from vrep.errors import VrepError
from vrep.target import runs
from vrep.target.manifest import EpochEntry, Manifest, Position
from vrep.target.segment import Batch, entry_path

__all__ = ["Point", "Span"]

_ALL: Final = (1 << 64) - 1
_TURNS: Final = (layout.KIND_GAP_BEGIN, layout.KIND_GAP_END)

log = logging.getLogger("vrep.target")


class Point(NamedTuple):
    """A recovery point, and its time at the source; 0 when that is not known here."""

    position: Position
    wall_ns: int = 0

    def plain(self) -> dict[str, Any]:
        return {"point": f"pos:{self.position}", "wall_ns": self.wall_ns}


@dataclass(frozen=True)
class _Turn:
    """A gap-begin or a gap-end that is durable."""

    point: Point
    begins: bool
    before: Point | None = None
    """the record of its epoch before it, where that was seen"""
    segment: int = 0
    """where it stands, when it was there already as the store was opened"""
    at: int = 0
    """byte of that segment"""


class Span:
    """Follows one store. `add` belongs to the thread that commits, the rest to any."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """From the indexes of the closed segments. Without one of them nothing is known, and
        records are taken all the same."""
        self._directory = directory
        self._segments = manifest.segments
        self._turns: list[_Turn] = []
        self._resizes: dict[tuple[Position, int], int] = {}
        """position and disk of each RESIZE, and the size that it gives"""
        self._lasts: dict[int, Point] = {}
        """the last record of each epoch"""
        self._known = True
        self._judged: tuple[tuple[EpochEntry, ...], Position, int] | None = None
        self._ranges: list[tuple[Position, Position | None]] = []
        """from the first recovery point to before a gap-begin, if there was one"""
        self._oldest: Point | None = None
        self._before_gap: Point | None = None
        self._lock = threading.Lock()
        try:
            for unit in runs.units(manifest):
                self._load(Index.open(unit.path(directory)))
        except (VrepError, OSError) as error:
            self._lose(error)

    def _load(self, index: Index) -> None:
        events = index.events
        for row in events[np.isin(events["kind"], _TURNS)]:
            point = Point(Position.of(row["at"]), int(row["wall_ns"]))
            begins = int(row["kind"]) == layout.KIND_GAP_BEGIN
            segment, at = int(row["segment"]), int(row["position"])
            self._turns.append(_Turn(point, begins, segment=segment, at=at))
        for row in events[events["kind"] == layout.KIND_RESIZE]:
            self._resized(self._header(int(row["segment"]), int(row["position"])))
        epochs = index.times["at"]["epoch"]
        for row in index.times[np.append(epochs[1:] != epochs[:-1], True)[: len(epochs)]]:
            self._note(Point(Position.of(row["at"]), int(row["wall_ns"])))

    def _lose(self, error: Exception) -> None:
        self._known = False
        log.warning("%s: its recovery points are not shown: %s", self._directory, error)

    def _note(self, point: Point) -> None:
        epoch = point.position.epoch
        self._lasts[epoch] = max(self._lasts.get(epoch, point), point)

    def add(self, batches: Sequence[Batch]) -> None:
        """Batches became durable."""
        with self._lock:
            for batch in batches:
                for header in batch.turns:
                    self._turn(header)
                for header in batch.resizes:
                    self._resized(header)
                if batch.wall_ns:
                    self._note(Point(batch.last, batch.wall_ns))

    def _resized(self, header: Any) -> None:
        key = (Position.of(header), int(header["disk"]))
        self._resizes[key] = int(header["offset"])

    def _header(self, number: int, at: int) -> Any:
        """The header of a record of a closed segment."""
        row = self._segments[np.searchsorted(self._segments["segment"], number)]
        return _read_header(entry_path(self._directory, row), at)

    def sizes(self, manifest: Manifest) -> dict[int, int]:
        """The size that the newest durable RESIZE of the line gives each disk that has one."""
        line = dict(manifest.ancestry(manifest.end_of(manifest.accepted_epoch.epoch)))
        with self._lock:
            rows = sorted(self._resizes.items())
        return {disk: size for (at, disk), size in rows if at.seq <= line.get(at.epoch, 0)}

    def _turn(self, header: Any) -> None:
        point = Point(Position.of(header), int(header["wall_ns"]))
        if header["kind"] in _TURNS:
            begins = int(header["kind"]) == layout.KIND_GAP_BEGIN
            before = self._lasts.get(point.position.epoch)
            self._turns.append(_Turn(point, begins, before))
        self._note(point)

    def folded(self, manifest: Manifest) -> None:
        """Segments were replaced by what a fold left of them."""
        with self._lock:
            self._segments = manifest.segments
            self._turns = [t for t in self._turns if t.point.position > manifest.horizon]
            self._judged = None  # as many may come as went

    def points(self, manifest: Manifest) -> tuple[Point, Point] | None:
        """The oldest and the newest recovery point; None when there is none."""
        with self._lock:
            self._follow(manifest)
            if not self._known or self._oldest is None:
                return None
            return self._oldest, self._before_gap or self._end(manifest)

    def in_gap(self, manifest: Manifest) -> bool:
        """Whether recovery points lie behind the newest record, in a gap that has not ended, or
        that is not known."""
        with self._lock:
            self._follow(manifest)
            return not self._known or self._before_gap is not None

    def holds(self, manifest: Manifest, position: Position) -> bool:
        """Whether the store has the record of a position, or that at which its epoch, which wrote
        nothing before, left its parent. Where the indexes are damaged: that is not known."""
        with self._lock:
            if not position.epoch or position == manifest.horizon:
                return True
            if all(entry.epoch != position.epoch for entry in manifest.epochs):
                return False
            for epoch, reach in manifest.ancestry(position):
                last = self._lasts.get(epoch)
                if last is not None and last.position.seq >= position.seq:
                    return True
                if reach != position.seq or manifest.epoch(epoch).parent.seq != position.seq:
                    return False
            return False

    def repaired(self, manifest: Manifest, position: Position) -> Position | None:
        """The gap-begin at which a repair ended the history, if a position stands for one. So it
        is when that cannot be read."""
        if all(entry.epoch != position.epoch for entry in manifest.epochs):
            return None
        with self._lock:
            here = self._standing(manifest, position).position
            turns = [t for t in self._turns if t.point.position == here and t.begins and t.segment]
        try:
            marks = [int(self._header(t.segment, t.at)["mono_ns"]) for t in turns]
        except (VrepError, OSError):
            return here
        return here if layout.MONO_REPAIRED in marks else None

    def recoverable(self, manifest: Manifest, position: Position) -> bool:
        """Whether a record of this position is a recovery point of the line."""
        with self._lock:
            self._follow(manifest)
            line = dict(manifest.ancestry(manifest.end_of(manifest.accepted_epoch.epoch)))
            reach = line.get(position.epoch, 0)
            last = self._lasts.get(position.epoch)
            if not self._known or last is None or position.lane != manifest.lane:
                return False
            begins = manifest.epoch(position.epoch).parent.seq
            inside = begins < position.seq <= min(reach, last.position.seq)
            return inside and any(
                first <= position and (end is None or position < end) for first, end in self._ranges
            )

    def _follow(self, manifest: Manifest) -> None:
        now = (manifest.epochs, manifest.horizon, len(self._turns))
        if self._judged is None or self._judged[0] is not now[0] or self._judged[1:] != now[1:]:
            self._judge(manifest)
            self._judged = now

    def _judge(self, manifest: Manifest) -> None:
        """Walk the gaps of the line."""
        line = dict(manifest.ancestry(manifest.end_of(manifest.accepted_epoch.epoch)))
        horizon = manifest.horizon
        oldest: Point | None = None
        closed: _Turn | None = None
        self._ranges = []
        if horizon.seq:
            oldest = self._horizon(horizon)
            self._ranges.append((horizon, None))
        for turn in sorted(self._turns, key=lambda turn: turn.point.position):
            position = turn.point.position
            if position.seq > line.get(position.epoch, 0) or position <= horizon:
                continue
            opened = bool(self._ranges) and self._ranges[-1][1] is None
            if turn.begins and opened:
                self._ranges[-1], closed = (self._ranges[-1][0], position), turn
            elif not turn.begins and not opened:
                self._ranges.append((position, None))
                oldest = oldest or turn.point
        self._oldest = oldest
        self._before_gap = None
        if closed is not None and self._ranges[-1][1] is not None:
            self._before_gap = self._before(manifest, closed)

    def _horizon(self, horizon: Position) -> Point:
        """The point at the horizon. While its segment is open its time is not known."""
        if self._oldest is not None and self._oldest.position == horizon and self._oldest.wall_ns:
            return self._oldest
        try:
            found = self._look_up(horizon._replace(seq=horizon.seq + 1), _ALL)
        except (VrepError, OSError) as error:
            self._lose(error)
            found = None
        return found if found is not None and found.position == horizon else Point(horizon)

    def _end(self, manifest: Manifest) -> Point:
        """The last durable record of the line."""
        return self._standing(manifest, manifest.end_of(manifest.accepted_epoch.epoch))

    def _standing(self, manifest: Manifest, position: Position) -> Point:
        """The record that a position of the line stands for: of an epoch that has none here, as it
        wrote nothing or another site holds what it wrote, the one where it left its parent."""
        for epoch, reach in manifest.ancestry(position):
            last, end = self._lasts.get(epoch), position._replace(epoch=epoch, seq=reach)
            if last is not None:
                return last if last.position.seq <= reach else Point(end)
        return Point(position)

    def _before(self, manifest: Manifest, turn: _Turn) -> Point:
        """The record of the line before a gap-begin."""
        before = turn.before
        if before is None and turn.segment:
            try:
                before = self._look_up(turn.point.position, turn.segment)
            except (VrepError, OSError) as error:
                self._lose(error)
        if before is not None:
            return before
        parent = manifest.epoch(turn.point.position.epoch).parent
        known = any(entry.epoch == parent.epoch for entry in manifest.epochs)
        return self._standing(manifest, parent) if known else Point(parent)

    def _look_up(self, here: Position, number: int) -> Point | None:
        """The record of its epoch before a position, in the closed segments up to a number."""
        for segment in self._segments[self._segments["segment"] <= number][::-1]:
            if Position.of(segment["last"]) < Position(here.epoch):
                break
            path = entry_path(self._directory, segment)
            rows = list(_records(Index.open(path), here))
            if rows:
                return _read(path, max(rows)[1])
        return None


def _records(index: Index, end: Position) -> Iterator[tuple[int, int]]:
    """Seq and place in its segment of the newest record of an epoch before a position, of each
    of the parts of a segment's index."""
    events = index.events
    parts = ((events["at"], events), *((e, e) for e in (index.short_entries, index.long_entries)))
    for at, rows in parts:
        chosen = (at["epoch"] == end.epoch) & (at["seq"] < end.seq)
        if chosen.any():
            newest = int(np.argmax(np.where(chosen, at["seq"], 0)))
            yield int(at["seq"][newest]), int(rows["position"][newest])


def _read(path: Path, at: int) -> Point:
    header = _read_header(path, at)
    return Point(Position.of(header), int(header["wall_ns"]))


def _read_header(path: Path, at: int) -> Any:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, layout.RECORD.itemsize, at)
    finally:
        os.close(fd)
    record.check_header(data)
    return np.frombuffer(data, layout.RECORD, 1)[0]
