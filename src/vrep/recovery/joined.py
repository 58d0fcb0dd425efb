"""Joined: what recovery does with one history, done with those of all lanes of a group.

A point of such a group is a cut (see `cuts`): a position of each lane. A disk belongs to one lane,
so what a cut holds of it is what its lane holds at its position; everything here resolves the cut
once and then does for each lane what is done for a group with one lane. A test is a view for each
lane, each with its own socket, as the lanes have at the source. To take such a group over is in
`joined_failover`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from vrep import errors
from vrep.lanes import lane_of
from vrep.paths import SitePaths
from vrep.recovery import changes as one_changes
from vrep.recovery import export as one_export
from vrep.recovery import fold as one_fold
from vrep.recovery import points as one_points
from vrep.recovery import verify as one_verify
from vrep.recovery.check import Verdict
from vrep.recovery.cuts import Cut, HeldLanes, LaneSet
from vrep.recovery.history import format_time
from vrep.recovery.points import CutInfo, MarkInfo, PointInfo, PointList
from vrep.recovery.verify import VerifyOptions, VerifyReport
from vrep.recovery.view import (
    ViewDirectory,
    ViewInfo,
    discard,
    start_test,
)
from vrep.target.manifest import Position

__all__ = [
    "base_of",
    "changes",
    "export",
    "fold",
    "joined_view",
    "lanes_of",
    "points",
    "resolve",
    "serve",
    "verify",
]

_WORST = ("bad", "intact", "good")


def resolve(paths: SitePaths, held: HeldLanes, *texts: str) -> list[Cut]:
    """The cuts that some POINTs mean."""
    now_ns = time.time_ns()
    with LaneSet(paths, held) as lanes:
        return [lanes.resolve(text, now_ns) for text in texts]


def lanes_of(held: HeldLanes, cut: Cut) -> list[tuple[str, Position]]:
    """The ids of the lanes that have a part in a cut, and their positions."""
    ids = {lane_of(lane.name): lane.hex for lane in held.lanes}
    return [(ids[position.lane], position) for position in cut.at]


# ---- reading ---------------------------------------------------------------------------


def points(
    paths: SitePaths, held: HeldLanes, *, progress: Callable[[int, int], None] | None = None
) -> PointList:
    """What can be recovered. What a check of a lane finds wrong is in the verdict."""
    lists = [one_points.list_points(paths, lane.hex, progress=progress) for lane in held.lanes]
    verdict = _joined_verdict([found.verdict for found in lists])
    cuts: list[Cut] = []
    if any(found.key_held for found in lists):
        try:
            with LaneSet(paths, held) as lanes:
                cuts = lanes.cuts()
        except (errors.IntegrityError, errors.TenantKeyError) as error:
            if verdict.whole:
                raise
            note = f"not every point can be listed: {error}"
            verdict = msgspec.structs.replace(verdict, note=note)
    else:
        note = "which marks of the lanes are one point is sealed: the tenant's key is needed"
        verdict = msgspec.structs.replace(verdict, note=note)
    infos = [
        CutInfo(cut.point, format_time(cut.wall_ns), cut.label, list(cut.absent)) for cut in cuts
    ]
    return PointList(
        group=held.name,
        group_id=held.hex,
        newest=_info(cuts[-1]) if cuts else None,
        oldest=_info(cuts[0]) if cuts else None,
        ranges=[],
        gaps=[gap for found in lists for gap in found.gaps],
        marks=[MarkInfo(i.point, i.time, i.label, True) for i in infos if i.label],
        epochs=lists[0].epochs,
        key_held=all(found.key_held for found in lists),
        verdict=verdict,
        verdicts=[each for found in lists for each in found.verdicts],
        cuts=infos,
    )


def _info(cut: Cut) -> PointInfo:
    return PointInfo(cut.point, format_time(cut.wall_ns))


def _joined_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """One word on the histories of all lanes."""
    return Verdict(
        whole=all(v.whole for v in verdicts),
        sealed=all(v.sealed for v in verdicts),
        checked_to=", ".join(v.checked_to for v in verdicts if v.checked_to),
        tallied_to=", ".join(v.tallied_to for v in verdicts if v.tallied_to),
        records=sum(v.records for v in verdicts),
        tallies=sum(v.tallies for v in verdicts),
        folded_to=", ".join(v.folded_to for v in verdicts if v.folded_to),
        error="; ".join(v.error for v in verdicts if v.error),
        note="; ".join(dict.fromkeys(v.note for v in verdicts if v.note)),
    )


def changes(
    paths: SitePaths, held: HeldLanes, since: str, at: str = "latest", disk: str | None = None
) -> one_changes.ChangeList:
    """What may differ between two cuts."""
    first, last = resolve(paths, held, since, at)
    found: list[one_changes.DiskChanges] = []
    for lane, position in lanes_of(held, last):
        base = base_of(first, position.lane)
        found += one_changes.list_changes(paths, lane, f"pos:{base}", f"pos:{position}").disks
    if disk is not None:
        chosen = [each for each in found if each.name == disk]
        if not chosen:
            names = ", ".join(each.name for each in found)
            raise errors.NotFoundError(f"group {held.name!r} has no disk {disk!r}: {names}")
        found = chosen
    return one_changes.ChangeList(
        group=held.name,
        group_id=held.hex,
        since=_info(first),
        at=_info(last),
        block_bytes=one_changes.BLOCK_BYTES,
        disks=found,
    )


def base_of(cut: Cut, lane: int) -> Position:
    """The position of a lane in the cut from which changes count."""
    base = cut.of(lane)
    if base is None:
        raise errors.PointNotFoundError(f"lane {lane} has no part in {cut}: nothing to count from")
    return base


def export(
    paths: SitePaths,
    held: HeldLanes,
    at: str,
    out: Path,
    format: str = "raw",
    *,
    progress: one_export.Progress | None = None,
    sha256: bool = False,
) -> one_export.ExportResult:
    """Write every disk of a group at a cut. A disk that was written before an error stays."""
    began = time.monotonic()
    (cut,) = resolve(paths, held, at)
    done = [
        one_export.export(
            paths, lane, f"pos:{position}", out, format, progress=progress, sha256=sha256
        )
        for lane, position in lanes_of(held, cut)
    ]
    return one_export.ExportResult(
        group=held.name,
        group_id=held.hex,
        point=cut.point,
        time=format_time(cut.wall_ns),
        format=format,
        disks=[disk for each in done for disk in each.disks],
        objects=[one for each in done for one in each.objects],
        bytes=sum(each.bytes for each in done),
        seconds=round(time.monotonic() - began, 3),
        verdict=_joined_verdict([each.verdict for each in done]),
    )


def verify(
    paths: SitePaths,
    held: HeldLanes,
    at: str = "latest",
    *,
    options: VerifyOptions | None = None,
    progress: one_verify.Progress | None = None,
) -> VerifyReport:
    """Verify each lane at a cut, with its samples and checks."""
    (cut,) = resolve(paths, held, at)
    reports = [
        one_verify.verify(paths, lane, f"pos:{position}", options=options, progress=progress)
        for lane, position in lanes_of(held, cut)
    ]
    objects: dict[str, int] = {}
    for report in reports:
        for kind, count in report.objects.items():
            objects[kind] = objects.get(kind, 0) + count
    return VerifyReport(
        group=held.name,
        group_id=held.hex,
        result=min((r.result for r in reports), key=_WORST.index),
        verdicts=[verdict for r in reports for verdict in r.verdicts],
        objects=objects,
        records=sum(r.records for r in reports),
        tallies=sum(r.tallies for r in reports),
        bytes=sum(r.bytes for r in reports),
        key_held=all(r.key_held for r in reports),
        folded_to=", ".join(r.folded_to for r in reports if r.folded_to),
        note="; ".join(dict.fromkeys(r.note for r in reports if r.note)),
        seconds=round(sum(r.seconds for r in reports), 3),
    )


def fold(paths: SitePaths, held: HeldLanes, at: str) -> one_fold.FoldResult:
    """Keep the cuts of a group from one on."""
    (cut,) = resolve(paths, held, at)
    if cut.absent:
        raise errors.StateError(
            f"lane {', '.join(map(str, cut.absent))} has no part in {cut}: what it keeps cannot "
            "begin there"
        )
    done = [one_fold.fold(paths, lane, f"pos:{position}") for lane, position in lanes_of(held, cut)]
    return one_fold.FoldResult(
        group=held.name,
        group_id=held.hex,
        horizon=cut.point,
        time=format_time(cut.wall_ns),
        background=any(each.background for each in done),
        input_bytes=sum(each.input_bytes for each in done),
        output_bytes=sum(each.output_bytes for each in done),
    )


# ---- views -----------------------------------------------------------------------------


def joined_view(held: HeldLanes, cut: Cut, since: Cut | None, views: list[ViewInfo]) -> ViewInfo:
    """The views of all lanes as one; each disk says which dirty bitmap it has."""
    first = views[0]
    return ViewInfo(
        id=first.id,
        kind=first.kind,
        group=held.name,
        group_id=held.hex,
        point=cut.point,
        time=format_time(cut.wall_ns),
        state=first.state if len({view.state for view in views}) == 1 else "starting",
        running=all(view.running for view in views),
        pid=first.pid,
        socket=first.socket,
        disks=[
            msgspec.structs.replace(disk, bitmap=view.bitmap)
            for view in views
            for disk in view.disks
        ],
        created=first.created,
        epoch=first.epoch,
        since=since.point if since is not None else None,
        bitmap=None,
        conditions=[text for view in views for text in view.conditions],
        fill={view.group: view.fill for view in views},
    )


def serve(
    paths: SitePaths, held: HeldLanes, at: str = "latest", since: str | None = None
) -> ViewInfo:
    """Serve the disks of all lanes as they were at a cut: a view for each lane."""
    cut, *rest = resolve(paths, held, at, *([since] if since is not None else []))
    base = rest[0] if rest else None
    views: list[ViewInfo] = []
    try:
        for lane, position in lanes_of(held, cut):
            from_ = f"pos:{base_of(base, position.lane)}" if base is not None else None
            views.append(start_test(paths, lane, f"pos:{position}", from_))
    except BaseException:
        for view in views:
            discard(ViewDirectory(paths, view.id))
        raise
    return joined_view(held, cut, base, views)
