"""Points: what of a group can be recovered, what cannot, and whether it can be trusted.

Labels of checkpoints are sealed: without the tenant's key they show as None, with their
positions and times. The history is checked on the way (see `check`); what is wrong stands in
the list, since what is right can still be recovered, and nothing is passed over in silence.
"""

from __future__ import annotations

import msgspec

from vrep import errors
from vrep.paths import SitePaths
from vrep.recovery.access import KeyAccess
from vrep.recovery.check import Progress, Verdict, check_history
from vrep.recovery.held import find_group
from vrep.recovery.history import History, Mark, Range, format_time
from vrep.recovery.object_records import ObjectInfo, object_info, objects_at
from vrep.recovery.verdict import VerdictBook, VerdictInfo, judge
from vrep.target.manifest import EpochEntry, Position
from vrep.target.reader import StoreReader

__all__ = [
    "CutInfo",
    "EpochInfo",
    "Gap",
    "MarkInfo",
    "PointInfo",
    "PointList",
    "PointRange",
    "list_points",
]


class PointInfo(msgspec.Struct, frozen=True):
    """One position, as a POINT that names it, and its time at the source."""

    point: str
    time: str


class PointRange(msgspec.Struct, frozen=True):
    """Every position from the first to the last can be recovered."""

    first: PointInfo
    last: PointInfo


class Gap(msgspec.Struct, frozen=True):
    """Nothing from `begin` on can be recovered before `end`; an open gap has not ended."""

    begin: PointInfo
    end: PointInfo
    open: bool


class MarkInfo(msgspec.Struct, frozen=True):
    """A checkpoint; its label is None when the key is not held here."""

    point: str
    time: str
    label: str | None
    recoverable: bool


class CutInfo(msgspec.Struct, frozen=True):
    """A recovery point of a group with several lanes."""

    point: str
    time: str
    label: str
    """empty: it was made because it was time to"""
    absent: list[int]
    """lanes that had no part in it: of their disks it holds nothing"""


class EpochInfo(msgspec.Struct, frozen=True):
    """A writer's reign, and where it left its parent."""

    epoch: int
    state: str
    writer: str
    parent: str | None
    began: str


class PointList(msgspec.Struct, frozen=True):
    """What `vrep points` shows."""

    group: str
    group_id: str
    newest: PointInfo | None
    oldest: PointInfo | None
    ranges: list[PointRange]
    gaps: list[Gap]
    marks: list[MarkInfo]
    epochs: list[EpochInfo]
    key_held: bool
    verdict: Verdict
    """of the check of the whole history, made just now"""
    verdicts: list[VerdictInfo]
    """of verifications (see `vrep verify`), by point"""
    objects: list[ObjectInfo] = []
    """at the newest point; their names are sealed: empty without the key"""
    cuts: list[CutInfo] = []
    """the points of a group with several lanes, oldest first; such a group has no ranges"""


def _info(position: Position, wall_ns: int) -> PointInfo:
    return PointInfo(f"pos:{position}", format_time(wall_ns))


def _mark(history: History, mark: Mark) -> MarkInfo:
    recoverable = any(r.first <= mark.position <= r.last for r in history.ranges)
    return MarkInfo(f"pos:{mark.position}", format_time(mark.wall_ns), mark.label, recoverable)


def _gap(history: History, gap: Range) -> Gap:
    # The last of the gaps is open when no range follows it.
    open_ = not any(r.first >= gap.last for r in history.ranges)
    return Gap(_info(gap.first, gap.first_wall_ns), _info(gap.last, gap.last_wall_ns), open_)


def _epoch(entry: EpochEntry) -> EpochInfo:
    return EpochInfo(
        epoch=entry.epoch,
        state=entry.state.name.lower(),
        writer=entry.writer.hex(),
        parent=f"pos:{entry.parent}" if entry.parent.seq else None,
        began=format_time(entry.wall_ns),
    )


def list_points(paths: SitePaths, group: str, *, progress: Progress | None = None) -> PointList:
    """What can be recovered of a group (its name or id). What a check finds wrong is in
    `verdict`, by name, segment and position; only a store that cannot be read at all raises."""
    held = find_group(paths, group)
    with StoreReader(paths.store, held.group_id) as reader:
        access: KeyAccess | None = None
        note = ""
        try:
            access = KeyAccess.open(paths, held.group_id, reader.wrapped_keys)
        except errors.TenantKeyError as error:
            note = f"the tenant's key cannot be used: {error.detail}"
        try:
            verdict = check_history(paths, reader, access, progress=progress)
        except errors.IntegrityError as error:
            verdict = Verdict(
                whole=False,
                sealed=access is not None,
                checked_to="",
                tallied_to="",
                records=0,
                tallies=0,
                error=f"{type(error).__name__}: {error}",
            )
        if access is None:
            why = f"the tallies were not checked: {note}"
            verdict = msgspec.structs.replace(verdict, note=why)
        book = VerdictBook(paths, held.group_id)
        return _list(held.name, held.hex, reader, access, verdict, book)


def _list(
    name: str,
    group_id: str,
    reader: StoreReader,
    access: KeyAccess | None,
    verdict: Verdict,
    book: VerdictBook,
) -> PointList:
    verdicts = list(book.all())
    try:
        history = History(reader)
        marks = [_mark(history, mark) for mark in history.marks(access)]
    except errors.IntegrityError as error:
        if verdict.whole:
            raise
        # The verdict has named the damage; what depends on it cannot be listed.
        note = f"not every point can be listed: {error}"
        verdict = msgspec.structs.replace(verdict, note=note)
        return PointList(
            group=name,
            group_id=group_id,
            newest=None,
            oldest=None,
            ranges=[],
            gaps=[],
            marks=[],
            epochs=[_epoch(entry) for entry in reader.epochs],
            key_held=access is not None,
            verdict=verdict,
            verdicts=_shown(judge(verdicts, reader.manifest, reader.durable), verdict),
        )
    ranges = [
        PointRange(_info(r.first, r.first_wall_ns), _info(r.last, r.last_wall_ns))
        for r in history.ranges
    ]
    return PointList(
        group=name,
        group_id=group_id,
        newest=ranges[-1].last if ranges else None,
        oldest=ranges[0].first if ranges else None,
        ranges=ranges,
        gaps=[_gap(history, gap) for gap in history.gaps],
        marks=marks,
        epochs=[_epoch(entry) for entry in reader.epochs],
        objects=_objects(reader, access, history),
        key_held=access is not None,
        verdict=verdict,
        verdicts=_shown(judge(verdicts, reader.manifest, reader.durable, history), verdict),
    )


def _objects(reader: StoreReader, access: KeyAccess | None, history: History) -> list[ObjectInfo]:
    """Those of the newest point. A damaged one stands in the verdict of the check."""
    if access is None or history.newest is None:
        return []
    try:
        found = objects_at(reader, access, history.newest)
    except errors.IntegrityError:
        return []
    return [object_info(*each) for each in found.values()]


def _shown(verdicts: list[VerdictInfo], verdict: Verdict) -> list[VerdictInfo]:
    """What was proven once is not claimed while the history is known to be damaged."""
    if verdict.whole:
        return verdicts
    text = f"the history is damaged now: {verdict.error}"
    return [
        msgspec.structs.replace(each, state="void", text=text)
        if each.state in ("good", "intact")
        else each
        for each in verdicts
    ]
