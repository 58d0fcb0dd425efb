"""Cuts: the recovery points of a group that has several lanes.

Each lane has a history of its own at the target, under a name like ``web@1`` (see `vrep.lanes`),
and the positions of one lane say nothing about those of another. What joins them is a cut: a
position of each lane, between which no write of one depends on a later one of another
(docs/internals/cuts.md tells how it is made). The record that completes a cut stands, sealed, in
one of its lanes and names the positions of all. A cut is offered when every lane that has a part
in it holds its mark at that position, on the line of its accepted epoch, outside of gaps, and not
folded away: of a cut that was not completed, or not by all, there is no such record, or not all
such marks.

A cut in which a lane of the group has no part (its host was gone, or who made the cut had not
heard of it), or whose history of a lane is not held here (it goes to another target), is a point of
the other lanes' disks only. Who asks for `latest`, or for a time, and
would get one is refused, and told of both.

Times are nanoseconds of the clock of the host that completed the cut.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Final, Self

from vrep._core import layout, record
from vrep.errors import (
    CorruptError,
    IntegrityError,
    InvalidError,
    PointAmbiguousError,
    PointNotFoundError,
    TenantKeyError,
    VrepError,
)
from vrep.lanes import group_of, is_lane, lane_of
from vrep.paths import SitePaths
from vrep.recovery.access import KeyAccess
from vrep.recovery.held import HeldGroup, held_groups
from vrep.recovery.history import History, format_time
from vrep.recovery.point import kind_of, parse_ago, parse_position, parse_time
from vrep.target.manifest import Position
from vrep.target.reader import Event, StoreReader

__all__ = ["Cut", "HeldLanes", "LaneSet", "find_lanes"]

_PART_BYTES: Final = layout.MARK.itemsize + layout.CUT.itemsize
"""a mark of that length completes nothing"""
_LISTED_MAX: Final = 16
ALIVE_NS: Final = 60_000_000_000
"""a lane whose last mark is older than that when others are cut had left them"""


@dataclass(frozen=True)
class HeldLanes:
    """A group of several lanes in the store of this site."""

    name: str
    lanes: tuple[HeldGroup, ...]
    """by number"""

    @property
    def hex(self) -> str:
        """The id of the group, which is that of its lane 0."""
        return self.lanes[0].hex[:28] + "0000"


def find_lanes(paths: SitePaths, text: str) -> HeldLanes | None:
    """The group of several lanes with this name or id; None when there is none. A lane's own
    name is that lane alone. Two sites may use one name: then the id is asked for. What is wrong
    with the manifest of any of its lanes is raised: one that is left out would seem to be held
    elsewhere, and the rest of a cut would be taken for a point without it."""
    found: dict[str, list[HeldGroup]] = {}
    damaged: dict[str, IntegrityError] = {}
    wanted = text[:28] if len(text) == 32 and text.endswith("0000") else None
    for group_id, held in held_groups(paths):
        if isinstance(held, IntegrityError):
            damaged[group_id.hex()[:28]] = held
            continue
        if is_lane(held.name) and (
            held.hex.startswith(wanted) if wanted is not None else group_of(held.name) == text
        ):
            found.setdefault(held.hex[:28], []).append(held)
    for prefix in (wanted, *found):
        if prefix in damaged:
            raise damaged[prefix]
    if len(found) > 1:
        ids = ", ".join(f"{prefix}0000" for prefix in found)
        raise InvalidError(f"{len(found)} groups are called {text!r}: give an id: {ids}")
    for lanes in found.values():
        lanes.sort(key=lambda held: lane_of(held.name))
        return HeldLanes(group_of(lanes[0].name), tuple(lanes))
    return None


@dataclass(frozen=True)
class Cut:
    """A completed cut. It is named by the position of its mark in its lowest lane."""

    cut_id: bytes
    at: tuple[Position, ...]
    """the marks, rising by lane"""
    absent: tuple[int, ...] = field(compare=False)
    """lanes of the group that had no part in it, or are not held here"""
    wall_ns: int
    label: str
    completed: Position
    """of the record that says all this"""

    @property
    def anchor(self) -> Position:
        return self.at[0]

    @property
    def point(self) -> str:
        return f"pos:{self.anchor}"

    def of(self, lane: int) -> Position | None:
        """Its mark in a lane."""
        return next((position for position in self.at if position.lane == lane), None)

    def __str__(self) -> str:
        return f"{self.point} ({format_time(self.wall_ns)})"


def _compare(a: Cut, b: Cut) -> int:
    """By the order of a lane that both have; of two that have none in common, by their clocks."""
    for position in a.at:
        other = b.of(position.lane)
        if other is not None and other != position:
            return -1 if position < other else 1
    return (a.wall_ns > b.wall_ns) - (a.wall_ns < b.wall_ns)


@dataclass
class Lane:
    """One lane's history."""

    number: int
    held: HeldGroup
    reader: StoreReader
    access: KeyAccess
    history: History
    marks: dict[Position, Event] = field(default_factory=dict)
    """on the line"""
    completing: list[Event] = field(default_factory=list)
    """marks that may complete a cut, newest first: of every line, since the record stands behind
    the marks, and a failover to the cut leaves it behind"""

    def offers(self, position: Position) -> bool:
        """Whether a mark stands at a position that can be recovered."""
        return position in self.marks and any(
            r.first <= position <= r.last for r in self.history.ranges
        )

    def was_there(self, wall_ns: int) -> bool:
        """Whether it was marked before a time, and not long before it for the last time; one that
        was given up was not."""
        times = [event.wall_ns for event in self.marks.values()]
        return (
            not self.held.manifest.unprotected
            and min(times, default=wall_ns + 1) <= wall_ns
            and max(times) >= wall_ns - ALIVE_NS
        )

    def completed(self, event: Event) -> Cut | None:
        """The cut that a mark completes; None when it completes none."""
        header = self.reader.read(event.segment, event.at, layout.RECORD.itemsize)
        try:
            record.check_header(header)
            if int.from_bytes(header[32:36], "little") <= _PART_BYTES:
                return None
            whole = self.reader.record(event.segment, event.at)
            opener = self.access.opener(event.stream)
            found = opener.cut(whole)
            if found is None or not found[1]:
                return None
            _wall_ns, label = opener.mark(whole)
        except IntegrityError as error:
            where = f"segment {event.segment:08x}, byte {event.at}"
            raise type(error)(f"{where}, a mark: {error.detail}") from None
        cut_id, lanes = found
        return Cut(
            cut_id=cut_id,
            at=tuple(Position(*at) for at in lanes if at[2]),
            absent=tuple(lane for _epoch, lane, seq in lanes if not seq),
            wall_ns=event.wall_ns,
            label=label,
            completed=event.position,
        )

    def has_part(self, cut: Cut) -> bool:
        """Whether the mark of this lane that a cut names says so itself."""
        at = cut.of(self.number)
        if at is None:
            return False
        event = self.marks[at]
        opener = self.access.opener(event.stream)
        return opener.cut(self.reader.record(event.segment, event.at)) == (cut.cut_id, ())


class LaneSet:
    """The histories of all lanes of a group, read at one time. Close it."""

    def __init__(self, paths: SitePaths, held: HeldLanes) -> None:
        """TenantKeyError without the tenant's key: which marks belong together is sealed."""
        self.held = held
        self.lanes: list[Lane] = []
        self.sealed: dict[int, VrepError] = {}
        """lanes that cannot be opened here, and why. A cut that names one is an error; one that no
        cut names is not of the group: whoever knows its id can leave such a lane at a target."""
        try:
            for each in held.lanes:
                reader = StoreReader(paths.store, each.group_id)
                try:
                    try:
                        access = KeyAccess.open(paths, each.group_id, reader.wrapped_keys)
                    except (TenantKeyError, IntegrityError) as error:
                        self.sealed[lane_of(each.name)] = error
                        reader.close()
                        continue
                    lane = Lane(lane_of(each.name), each, reader, access, History(reader))
                except BaseException:
                    reader.close()
                    raise
                self.lanes.append(lane)
                marks = [e for e in reader.events() if e.kind == layout.KIND_MARK]
                lane.completing = sorted(marks, key=lambda e: e.position, reverse=True)
                lane.marks = {
                    event.position: event for event in lane.history.events(layout.KIND_MARK)
                }
            if not self.lanes:
                raise next(iter(self.sealed.values()))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for lane in self.lanes:
            lane.reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def lane(self, number: int) -> Lane | None:
        return next((lane for lane in self.lanes if lane.number == number), None)

    # ---- cuts --------------------------------------------------------------------------

    def offered(self, cut: Cut) -> bool:
        """Whether every lane with a part in a cut holds its mark, where it can be recovered."""
        for position in cut.at:
            lane = self.lane(position.lane)
            if lane is None or not lane.offers(position):
                return False
        return bool(cut.at)

    def _held_here(self, cut: Cut) -> Cut:
        """What a cut says of the lanes whose history is held here."""
        here = tuple(position for position in cut.at if self.lane(position.lane) is not None)
        elsewhere = {position.lane for position in cut.at} - {position.lane for position in here}
        return replace(cut, at=here, absent=tuple(sorted({*cut.absent, *elsewhere})))

    def _absent(self, cut: Cut) -> tuple[int, ...]:
        """The lanes that have no part in a cut: those that it says were gone, and those that were
        there at its time although it does not name them, as when two sites did not hear each
        other and each cut what it knew."""
        named = {*cut.absent, *(position.lane for position in cut.at)}
        unheard = (lane.number for lane in self.lanes if lane.was_there(cut.wall_ns))
        return tuple(sorted({*cut.absent, *(set(unheard) - named)}))

    def _of_lane(self, lane: Lane) -> Iterator[Cut]:
        """The cuts that are completed in a lane and offered, newest first."""
        for event in lane.completing:
            cut = lane.completed(event)
            if cut is None:
                continue
            for position in cut.at:
                if position.lane in self.sealed:
                    raise self.sealed[position.lane]
            cut = self._held_here(cut)
            if self.offered(cut):
                yield replace(cut, absent=self._absent(cut))

    def cuts(self) -> list[Cut]:
        """Every cut that is offered, oldest first."""
        found = [cut for lane in self.lanes for cut in self._of_lane(lane)]
        return sorted(found, key=functools.cmp_to_key(_compare))

    def newest(self, *, whole: bool = False) -> Cut | None:
        """The newest cut; the newest in which all lanes have a part."""
        best: Cut | None = None
        for lane in self.lanes:
            for cut in self._of_lane(lane):
                if whole and cut.absent:
                    continue
                if best is None or _compare(best, cut) < 0:
                    best = cut
                break
        return best

    def disks_without(self, cut: Cut) -> list[str]:
        """Names of the disks that a cut says nothing about."""
        return [
            disk.name
            for lane in self.lanes
            if cut.of(lane.number) is None
            for disk in lane.reader.disks
        ]

    # ---- points ------------------------------------------------------------------------

    def resolve(self, text: str, now_ns: int) -> Cut:
        """The cut that a POINT means (see `history.resolve`): a position means the cut that has
        it; a time the newest that is not later."""
        text = text.strip()
        kind = kind_of(text)
        if kind == "position":
            return self._proven(self._at_position(Position(*parse_position(text))))
        if kind == "latest":
            newest = self.newest()
            if newest is None:
                raise PointNotFoundError(
                    "no recovery point yet: no cut over the lanes of the group is complete"
                )
            return self._proven(self._whole(newest, text))
        if kind in ("ago", "time"):
            wall_ns = parse_ago(text, now_ns) if kind == "ago" else parse_time(text)
            return self._proven(self._whole(self._at_time(wall_ns), text))
        return self._proven(self._labelled(text))

    def _proven(self, cut: Cut) -> Cut:
        """A cut, with the marks of its lanes opened: they are its own."""
        for position in cut.at:
            lane = self.lane(position.lane)
            assert lane is not None
            if not lane.has_part(cut):
                raise CorruptError(
                    f"the cut {cut} names pos:{position}, where no mark of that cut stands"
                )
        return cut

    def _whole(self, cut: Cut, text: str) -> Cut:
        if not cut.absent:
            return cut
        lanes = ", ".join(str(lane) for lane in cut.absent)
        disks = ", ".join(self.disks_without(cut)) or "none that is held here"
        whole = self.newest(whole=True)
        other = f"the newest point of all lanes is {whole}" if whole else "no point has all lanes"
        raise PointNotFoundError(
            f"{text!r} is {cut}, in which lane {lanes} had no part, or is not held here (disks: "
            f"{disks}); {other}. Name one of them as pos:..."
        )

    def _at_position(self, position: Position) -> Cut:
        for cut in self.cuts():
            if position in (*cut.at, cut.completed):
                return cut
        raise PointNotFoundError(
            f"pos:{position} belongs to no cut that can be recovered; a group of several lanes is "
            "recovered at its cuts"
        )

    def _at_time(self, wall_ns: int) -> Cut:
        cuts = self.cuts()
        early = [cut.wall_ns <= wall_ns for cut in cuts]
        found = [
            cut
            for i, cut in enumerate(cuts)
            if early[i] and (i + 1 == len(cuts) or not early[i + 1])
        ]
        if not found:
            oldest = f"the oldest point is {cuts[0]}" if cuts else "there is no recovery point yet"
            raise PointNotFoundError(f"nothing is as old as {format_time(wall_ns)}: {oldest}")
        if len(found) > 1:
            raise PointAmbiguousError(
                f"the source's clock jumped, {format_time(wall_ns)} is one of: {_listed(found)}"
            )
        return found[0]

    def _labelled(self, label: str) -> Cut:
        found = [cut for cut in self.cuts() if cut.label == label]
        if not found:
            raise PointNotFoundError(
                f"no checkpoint is called {label!r}; a time is written as in 2026-01-31T12:00:00Z"
            )
        if len(found) > 1:
            raise PointAmbiguousError(
                f"{len(found)} checkpoints are called {label!r}: {_listed(found)}"
            )
        return found[0]


def _listed(cuts: Sequence[Cut]) -> str:
    return ", ".join(str(cut) for cut in cuts[:_LISTED_MAX])
