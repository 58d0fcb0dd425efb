"""History: which positions of a group can be recovered, and what each way to name one means.

A point belongs to a line of epochs: its own, then its parent's up to where they parted, and so
on. Along one line positions are ordered by (epoch, seq). Recoverable are the positions from the
first gap-end on that lie in no gap: from a gap-begin up to, but not including, its gap-end.

Times are those of the source's host. A time means the newest position that is not later. When
the clock jumped back, a time can mean several positions: then all of them are named. (Times are
compared by commit first: a jump shorter than the time that one commit spans is not noticed.)
"""

from __future__ import annotations

import datetime
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from vrep._core import layout, record
from vrep._core.index import Index
from vrep.errors import (
    CorruptError,
    GapError,
    IntegrityError,
    InvalidError,
    PointAmbiguousError,
    PointNotFoundError,
)
from vrep.recovery.access import KeyAccess
from vrep.recovery.point import kind_of, parse_ago, parse_position, parse_time
from vrep.target.manifest import Position
from vrep.target.reader import Event, StoreReader

__all__ = ["Found", "History", "Mark", "Range", "format_time", "needs_key", "resolve"]

_HEADER: Final = layout.RECORD.itemsize
_FIELDS: Final = struct.Struct("<IBBHIHHQQIIQQHHI")
_ASIDE: Final = (layout.KIND_STREAM, layout.KIND_TALLY)
_CANDIDATES_MAX: Final = 16
_ALL: Final = (1 << 64) - 1


def format_time(wall_ns: int) -> str:
    """A time as RFC 3339 in UTC, to the microsecond (rounded up, so that read back it still
    means the position it stands for)."""
    moment = datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(
        microseconds=-(-wall_ns // 1000)
    )
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True)
class Found:
    """A record that takes a position, and where it stands."""

    position: Position
    wall_ns: int
    kind: int
    flags: int
    segment: int
    at: int

    def __str__(self) -> str:
        return f"pos:{self.position} ({format_time(self.wall_ns)})"


@dataclass(frozen=True)
class Range:
    """Positions from `first` to `last`, both among them; all recoverable, or none."""

    first: Position
    last: Position
    first_wall_ns: int
    last_wall_ns: int


@dataclass(frozen=True)
class Mark:
    """A checkpoint. `label` is None while its key is not held."""

    position: Position
    wall_ns: int
    label: str | None
    event: Event


def _walk(reader: StoreReader, segment: int, start: int = 128) -> Iterator[Found]:
    """The records of a segment that take a position, from a byte on, by their headers."""
    data = reader.segment(segment)
    at, end = start, len(data)
    while at + _HEADER <= end:
        magic = int.from_bytes(data[at : at + 4], "little")
        if magic == layout.RECORD_MAGIC:
            header = data[at : at + _HEADER]
            try:
                body = record.check_header(header)
            except CorruptError as error:
                raise CorruptError(f"segment {segment:08x}, byte {at}: {error.detail}") from None
            fields = _FIELDS.unpack(header)
            if fields[2] not in _ASIDE:
                position = Position(fields[4], fields[5], fields[7])
                yield Found(position, fields[11], fields[2], fields[3], segment, at)
            at += _HEADER + body
        elif magic == layout.COMMIT_MAGIC:
            at += layout.COMMIT.itemsize
        elif magic == layout.FOLD_MAGIC and at == layout.SEGMENT_HEADER.itemsize:
            at += layout.FOLD.itemsize
        elif magic == 0 or not any(data[at : at + 1]):
            at = (at // 64 + 1) * 64
        else:
            raise CorruptError(f"segment {segment:08x}, byte {at}: no record starts there")


def _end_of(reader: StoreReader, epoch: int) -> Position:
    """The last durable position of an epoch's line that this store holds: its own; of an epoch that
    has none here, as it wrote nothing or another site holds what it wrote, that of its parent."""
    for number, reach in reader.ancestry(reader.manifest.end_of(epoch)):
        if reader.durable.epoch == number and reader.durable.seq <= reach:
            return reader.durable
        first, last = Position(number), reader.manifest.end_of(number)._replace(seq=reach)
        for segment in reversed(reader.numbers(first, last)):
            found = [
                each.position
                for each in _walk(reader, segment)
                if each.position.epoch == number and each.position.seq <= reach
            ]
            if found:
                return found[-1]
    return Position()


class History:
    """The line of epochs that ends at a position (default: what was accepted last)."""

    def __init__(self, reader: StoreReader, end: Position | None = None) -> None:
        self.reader = reader
        self.manifest = reader.manifest
        if end is None:
            end = _end_of(reader, self.manifest.accepted_epoch.epoch)
        self.end = end
        self._line = dict(reader.ancestry(end)) if end.seq else {}
        self._events = [e for e in reader.events() if self.visible(e.position)]
        self._events.sort(key=lambda event: (event.position, event.at))
        self.horizon = self._kept_from()
        self._events = [e for e in self._events if e.position >= self.horizon]
        self.ranges: list[Range] = []
        self.gaps: list[Range] = []
        if end.seq and self.manifest.keeps(end):
            self._walk_gaps()

    def _kept_from(self) -> Position:
        """The horizon of the store, which is a position of every line that is kept; of one that
        is not, its end: a line that left the others before has no points any more."""
        return self.manifest.horizon if self.manifest.keeps(self.end) else self.end

    def visible(self, position: Position) -> bool:
        """Whether a record of this position belongs to the line."""
        return position.seq <= self._line.get(position.epoch, 0)

    @property
    def newest(self) -> Position | None:
        """The newest position that can be recovered."""
        return self.ranges[-1].last if self.ranges else None

    @property
    def oldest(self) -> Position | None:
        return self.ranges[0].first if self.ranges else None

    # ---- gaps ----------------------------------------------------------------------

    def _walk_gaps(self) -> None:
        """Split the line at its gap-begins and gap-ends."""
        opened: tuple[Position, int] | None = None  # of a range
        gap: tuple[Position, int] | None = None
        if self.horizon.seq:
            found = self._known(self.horizon)
            opened = (found.position, found.wall_ns)
        for event in self._events:
            if event.position <= self.horizon:
                continue  # the horizon lies in no gap, whatever its record is
            here = (event.position, event.wall_ns)
            if event.kind == layout.KIND_GAP_BEGIN:
                if opened is not None:
                    before = self._before(event)
                    self.ranges.append(Range(opened[0], before[0], opened[1], before[1]))
                    opened = None
                gap = gap or here
            elif event.kind == layout.KIND_GAP_END and opened is None:
                if gap is not None:
                    self.gaps.append(Range(gap[0], event.position, gap[1], event.wall_ns))
                opened, gap = here, None
        if opened is not None:
            last, wall_ns = self.end, self._wall_of_end()
            self.ranges.append(Range(opened[0], last, opened[1], wall_ns))
        elif gap is not None:
            self.gaps.append(Range(gap[0], self.end, gap[1], self._wall_of_end()))

    def _before(self, event: Event) -> tuple[Position, int]:
        """The position before that of an event, and its time."""
        found = self._last_before(event.position)
        if found is None:
            raise CorruptError(f"nothing stands before the gap at {event.position}")
        return found.position, found.wall_ns

    def _wall_of_end(self) -> int:
        found = self.locate(self.end)
        return found.wall_ns if found is not None else 0

    # ---- records -------------------------------------------------------------------

    def _start(self, segment: int, first: Position) -> int:
        """A byte from where a walk meets every record of a segment from `first` on."""
        if segment == self.manifest.active_segment:
            entries = self.reader.indexes[-1].short_entries
        else:
            entries = Index.open(self.reader.path(segment)).short_entries
        before = (entries["epoch"] < first.epoch) | (
            (entries["epoch"] == first.epoch) & (entries["seq"] <= first.seq)
        )
        start = int(entries["position"][before].max()) if before.any() else 128
        return start if self._stands(segment, start, first) else 128

    def _stands(self, segment: int, at: int, first: Position) -> bool:
        """Whether a walk may begin at a byte: the entries were not checked, and one that is
        damaged would lead past records."""
        try:
            here = next(_walk(self.reader, segment, at), None)
        except IntegrityError:
            return False
        return here is not None and here.position <= first

    def between(self, after: Position, last: Position) -> Iterator[Found]:
        """Records of the line after a position and up to another, in order."""
        for segment in self.reader.numbers(after, last):
            for found in _walk(self.reader, segment, self._start(segment, after)):
                if found.position > last:
                    return
                if found.position > after and self.visible(found.position):
                    yield found

    def locate(self, position: Position) -> Found | None:
        """The record of a position of the line, if there is one."""
        for segment in self.reader.numbers(position, position):
            for found in _walk(self.reader, segment, self._start(segment, position)):
                if found.position == position:
                    return found
                if found.position > position:
                    break
        # An epoch that wrote nothing yet stands where it left its parent.
        for entry in self.reader.epochs:
            if entry.epoch == position.epoch and entry.parent.seq == position.seq:
                return self.locate(entry.parent) if entry.parent.epoch else None
        return None

    def _last_before(self, position: Position) -> Found | None:
        """The newest record of the line before a position."""
        best: Found | None = None
        for segment in reversed(self.reader.numbers(None, position)):
            for found in _walk(self.reader, segment):
                if found.position >= position:
                    break
                if self.visible(found.position):
                    best = found
            if best is not None:
                return best
        return None

    # ---- points ----------------------------------------------------------------------

    def require(self, found: Found) -> Found:
        """The record, if its position can be recovered; else GapError with the nearest."""
        position = found.position
        if any(r.first <= position <= r.last for r in self.ranges):
            return found
        if self.manifest.horizon.seq and position < self.horizon:
            raise PointNotFoundError(f"{found}; {self._gone()}")
        before = [r for r in self.ranges if r.last < position]
        after = [r for r in self.ranges if r.first > position]
        near = []
        if before:
            near.append(f"before: pos:{before[-1].last} ({format_time(before[-1].last_wall_ns)})")
        if after:
            near.append(f"after: pos:{after[0].first} ({format_time(after[0].first_wall_ns)})")
        text = "; ".join(near) or "there is no recovery point yet"
        raise GapError(f"{found}; nearest points {text}" if near else f"{found}; {text}")

    def _gone(self) -> str:
        """Why a point before the horizon cannot be had."""
        oldest = f"pos:{self.manifest.horizon}"
        if self.ranges:
            oldest += f" ({format_time(self.ranges[0].first_wall_ns)})"
        return f"what was before the oldest point that is kept, {oldest}, was folded away"

    def latest(self) -> Found:
        newest = self.newest
        if newest is None:
            raise PointNotFoundError("no recovery point yet: the first sync has not ended")
        return self._known(newest)

    def _known(self, position: Position) -> Found:
        found = self.locate(position)
        if found is None:
            raise CorruptError(f"no record stands at {position}")
        return Found(position, found.wall_ns, found.kind, found.flags, found.segment, found.at)

    def at_time(self, wall_ns: int) -> Found:
        """The newest position that is not later than a time."""
        if not self.ranges:
            raise PointNotFoundError("no recovery point yet: the first sync has not ended")
        candidates = self._candidates(wall_ns)
        if not candidates:
            oldest = self.ranges[0]
            raise PointNotFoundError(
                f"nothing is as old as {format_time(wall_ns)}: the oldest point is "
                f"pos:{oldest.first} ({format_time(oldest.first_wall_ns)})"
            )
        if len(candidates) > 1:
            listed = ", ".join(str(c) for c in candidates[:_CANDIDATES_MAX])
            raise PointAmbiguousError(
                f"the source's clock jumped, {format_time(wall_ns)} is one of: {listed}"
            )
        chosen = candidates[0]
        if chosen.position < self.ranges[0].first:
            oldest = self.ranges[0]
            raise PointNotFoundError(
                f"{format_time(wall_ns)} lies before the oldest point, "
                f"pos:{oldest.first} ({format_time(oldest.first_wall_ns)})"
            )
        return self.require(chosen)

    def _candidates(self, wall_ns: int) -> list[Found]:
        """Every place of the line where its clock went past a time, and its end if it did
        not. Commits are compared first, then the records of those that may hold the place."""
        samples = self.reader.times()
        line = np.zeros(len(samples), bool)
        for epoch, seq in self._line.items():
            at = samples["at"]
            line |= (at["epoch"] == epoch) & (at["seq"] <= seq)
        samples = samples[line]
        order = np.lexsort((samples["at"]["seq"], samples["at"]["epoch"]))
        samples = samples[order]
        start = Position()
        if self.horizon.seq:
            start = self.horizon._replace(seq=self.horizon.seq - 1)
            after = samples["at"]["epoch"] > start.epoch
            after |= (samples["at"]["epoch"] == start.epoch) & (samples["at"]["seq"] > start.seq)
            samples = samples[after]
        places = [start] + [Position.of(at) for at in samples["at"]]
        early = np.concatenate([[True], samples["wall_ns"] <= wall_ns])
        if places[-1] != self.end:
            places.append(self.end)
            early = np.append(early, self._wall_of_end() <= wall_ns)
        found: list[Found] = []
        for i in np.flatnonzero(early[:-1] & ~early[1:]):
            last: Found | None = None
            for each in self.between(places[i], places[i + 1]):
                if each.wall_ns > wall_ns:
                    break
                last = each
            if last is None and i > 0:
                last = self._known(places[i])
            if last is not None:
                found.append(last)
        if early[-1]:
            found.append(self._known(self.end))
        return found

    # ---- marks -----------------------------------------------------------------------

    def events(self, kind: int) -> list[Event]:
        """The events of the line that are of a kind, in order."""
        return [event for event in self._events if event.kind == kind]

    def marks(self, access: KeyAccess | None) -> list[Mark]:
        """Checkpoints of the line, oldest first."""
        found = []
        for event in self._events:
            if event.kind != layout.KIND_MARK:
                continue
            label = None
            if access is not None:
                opener = access.opener(event.stream)
                try:
                    _wall, label = opener.mark(self.reader.record(event.segment, event.at))
                except IntegrityError as error:
                    where = f"segment {event.segment:08x}, byte {event.at}"
                    raise type(error)(f"{where}, a mark: {error.detail}") from None
            found.append(Mark(event.position, event.wall_ns, label, event))
        return found


def needs_key(text: str) -> bool:
    """Whether a POINT is a label, which only the key can read."""
    return kind_of(text.strip()) == "label"


def resolve(reader: StoreReader, text: str, access: KeyAccess | None, now_ns: int) -> Found:
    """The position that a POINT means: ``latest``, a label, an RFC 3339 time, ``-5m`` (back
    from now), or ``pos:EPOCH/LANE/SEQ`` (of any epoch, also one that was abandoned).

    A label that several checkpoints have is ambiguous, whichever is newest: its user meant
    one of them.
    """
    text = text.strip()
    kind = kind_of(text)
    if kind == "position":
        return _resolve_position(reader, Position(*parse_position(text)))
    if kind in ("ago", "time"):
        # Parsed first: what is written wrongly is refused before a history is read.
        wall_ns = parse_ago(text, now_ns) if kind == "ago" else parse_time(text)
        return History(reader).at_time(wall_ns)
    history = History(reader)
    return history.latest() if kind == "latest" else _resolve_label(history, text, access)


def _resolve_position(reader: StoreReader, position: Position) -> Found:
    entry = reader.manifest.epoch(position.epoch)
    last = _end_of(reader, entry.epoch)
    if position.seq > last.seq or position.lane != reader.manifest.lane:
        raise PointNotFoundError(f"pos:{position}: the last of its epoch is pos:{last}")
    # The whole line of its epoch, so that an error can name what comes after as well.
    history = History(reader, last if last.epoch == position.epoch else position)
    if not reader.manifest.keeps(position):
        raise PointNotFoundError(f"pos:{position}; {history._gone()}")
    found = history.locate(position)
    if found is None:
        raise PointNotFoundError(f"pos:{position}: no record has this position")
    history.require(Found(position, found.wall_ns, found.kind, found.flags, 0, 0))
    return Found(position, found.wall_ns, found.kind, found.flags, found.segment, found.at)


def _resolve_label(history: History, label: str, access: KeyAccess | None) -> Found:
    if access is None:
        raise InvalidError(f"the label {label!r} cannot be looked up: labels are sealed")
    marks = [mark for mark in history.marks(access) if mark.label == label]
    if not marks:
        raise PointNotFoundError(
            f"no checkpoint is called {label!r}; a time is written as in 2026-01-31T12:00:00Z"
        )
    if len(marks) > 1:
        listed = ", ".join(f"pos:{m.position} ({format_time(m.wall_ns)})" for m in marks)
        raise PointAmbiguousError(f"{len(marks)} checkpoints are called {label!r}: {listed}")
    return history.require(history._known(marks[0].position))
