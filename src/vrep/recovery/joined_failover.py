"""Joined failover: a group of several lanes is taken over, kept, given back, moved and returned.

Each lane is a failover of its own (see `failover`, `move`, `reverse`), and what is done to several
is not one step. So every step is done with all lanes before the next: what can be wrong without a
trace is found before the first lane's old writer is refused, and the point of each lane is durable
in its view by then. A command that was cut off goes on at the point that it began with when it is
given again.

A failover takes a cut (see `cuts`). A move takes the last position of each lane, which is all that
was ever written: no cut is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence

from vrep import errors
from vrep.groups import GroupDefinition, GroupDirectory, GroupOptions
from vrep.lanes import lane_of
from vrep.paths import SitePaths
from vrep.recovery import failover as one_failover
from vrep.recovery import move as one_move
from vrep.recovery.cuts import Cut, HeldLanes
from vrep.recovery.failback import failback_all
from vrep.recovery.failover import MOVED, Failover
from vrep.recovery.joined import base_of, joined_view, lanes_of, resolve
from vrep.recovery.reverse import reverse_all
from vrep.recovery.view import (
    PROTECTED,
    ViewDirectory,
    ViewInfo,
    ViewProcess,
    ViewRecord,
    discard,
    view_directories,
)
from vrep.target.manifest import Position

__all__ = [
    "failback",
    "failover_commit",
    "failover_rollback",
    "failover_start",
    "move",
    "reverse",
]

Begun = dict[int, tuple[ViewDirectory, ViewRecord]]


def _failovers(paths: SitePaths, held: HeldLanes) -> Begun:
    """The views of a failover that was begun and is not over, by lane."""
    ids = {lane.hex: lane_of(lane.name) for lane in held.lanes}
    found = {}
    for view in view_directories(paths):
        with contextlib.suppress(errors.NotFoundError):  # it ended since the listing
            record = view.load()
            mine = record.kind == "failover" and record.group_id in ids
            if mine and record.state != PROTECTED:
                found[ids[record.group_id]] = (view, record)
    return found


def _begun(paths: SitePaths, held: HeldLanes, begun: Begun) -> Cut:
    """What a failover that was begun takes: its cut; of a move, where each lane ended."""
    positions = sorted(
        (Position(*record.point) for _view, record in begun.values()), key=lambda at: at.lane
    )
    records = [record for _view, record in begun.values()]
    if any(record.asked == MOVED for record in records):
        if not all(record.asked == MOVED for record in records):
            raise errors.CorruptError(f"some lanes of {held.name!r} are moved, and some are not")
        wall_ns = max(record.wall_ns for record in records)
        return Cut(b"", tuple(positions), (), wall_ns, "", positions[0])
    (cut,) = resolve(paths, held, f"pos:{positions[0]}")
    if not set(positions) <= set(cut.at):
        raise errors.CorruptError(f"the views of the failover of {held.name!r} are of several cuts")
    return cut


def split_onto(held: HeldLanes, onto: Mapping[str, str] | None) -> dict[str, dict[str, str]]:
    """The disks that are filled in place, by the id of their lane. InvalidError for one that no
    lane has."""
    found: dict[str, dict[str, str]] = {lane.hex: {} for lane in held.lanes}
    for name, uri in (onto or {}).items():
        lanes = [lane.hex for lane in held.lanes if name in {d.name for d in lane.manifest.disks}]
        if not lanes:
            raise errors.InvalidError(f"the group has no disk {name!r}")
        found[lanes[0]][name] = uri
    return found


# ---- failover ----------------------------------------------------------------------------


def failover_start(
    paths: SitePaths,
    held: HeldLanes,
    at: str = "latest",
    *,
    force: bool = False,
    since: str | None = None,
    onto: Mapping[str, str] | None = None,
) -> ViewInfo:
    """Take all lanes over at a cut, or go on with what was cut off. A lane without a part in the
    cut is left alone. Nothing is served to a VM by this command before every lane's old writer
    is refused: it returns then. `onto`: disks that are filled in place, by name.

    SourceAliveError while a source's VM runs or may run, unless `force`."""
    begun = _failovers(paths, held)
    taken = {
        lane
        for lane, (_view, record) in begun.items()
        if record.state != "starting" or Failover(paths, record.group_id).provisional() is not None
    }
    if not taken and any(record.asked == MOVED for _view, record in begun.values()):
        for view, _record in begun.values():
            discard(view)  # of a move that ended before it took any: the sources went on
        begun = {}
    halts = {record.halt for lane, (_view, record) in begun.items() if lane not in taken}
    if len(halts) > 1:
        raise errors.StateError(
            f"a move of {held.name!r} was cut off while it began again: give 'vrep move' again, or "
            "'vrep failover rollback' and then a point"
        )
    cut = _begun(paths, held, begun) if begun else resolve(paths, held, at)[0]
    if begun and at.strip() != "latest" and resolve(paths, held, at)[0] != cut:
        raise errors.StateError(
            f"a failover of {held.name!r} to {cut} is under way: commit it or roll it back first"
        )
    base = resolve(paths, held, since)[0] if since is not None else None
    places = split_onto(held, onto)
    parts = lanes_of(held, cut)
    for name in (name for lane in set(places) - set(dict(parts)) for name in places[lane]):
        raise errors.InvalidError(f"disk {name!r} has no part in {cut}")
    if not force:
        for lane, position in parts:
            if position.lane not in taken:
                one_failover.require_no_writer(paths, lane)
    paths.make_run()
    failovers = {lane: Failover(paths, lane) for lane, _position in parts}
    views: dict[str, ViewDirectory] = {}
    try:
        for lane, position in parts:
            from_ = f"pos:{base_of(base, position.lane)}" if base is not None else None
            views[lane] = one_failover.claim(
                failovers[lane], f"pos:{position}", force=True, since=from_, onto=places[lane]
            )
    except BaseException:
        for lane, view in views.items():
            if lane_of(failovers[lane].held.name) not in begun:
                discard(view)
        raise
    for lane, view in views.items():
        one_failover.shut_out(failovers[lane], view)
    served = [one_failover.serve(view, ViewProcess(paths)) for view in views.values()]
    return joined_view(held, cut, base, served)


def failover_commit(paths: SitePaths, held: HeldLanes) -> ViewInfo:
    """Keep what was taken over, of all lanes."""
    begun = _failovers(paths, held)
    if not begun:
        raise errors.NotFoundError(f"no failover of {held.name!r} is under way")
    cut = _begun(paths, held, begun)
    unready = [p.lane for p in cut.at if p.lane not in begun] + [
        lane
        for lane, (_view, record) in begun.items()
        if record.state not in ("serving", "committed")
    ]
    if unready:
        lanes = ", ".join(map(str, sorted(unready)))
        raise errors.StateError(
            f"the failover of {held.name!r} has not reached lane {lanes}: give 'failover start' "
            "again first"
        )
    ids = {position.lane: lane for lane, position in lanes_of(held, cut)}
    views = [one_failover.commit(paths, ids[lane]) for lane in sorted(begun)]
    return joined_view(held, cut, None, views)


def failover_rollback(paths: SitePaths, held: HeldLanes) -> None:
    """Give all lanes back to their old writers. What was cut off goes on when it is asked for
    again; a lane that was committed already stops it before anything is undone."""
    begun = _failovers(paths, held)
    if any(Failover(paths, one.group_id).committed(one) for _view, one in begun.values()):
        raise errors.StateError(
            f"the failover of {held.name!r} was committed: what this site wrote since is the truth"
        )
    done = 0
    for lane in held.lanes:
        with contextlib.suppress(errors.NotFoundError):  # it was not begun, or is undone
            one_failover.rollback(paths, lane.hex)
            done += 1
    if not done:
        raise errors.NotFoundError(f"no failover of {held.name!r} is under way")


# ---- moves -------------------------------------------------------------------------------


def move(
    paths: SitePaths,
    held: HeldLanes,
    *,
    pause: bool = False,
    wait_s: float = one_move.WAIT_S,
    onto: Mapping[str, str] | None = None,
    progress: one_move.Progress | None = None,
) -> ViewInfo:
    """Take all lanes over from their sources, which live, without a loss: see `move.move`. A lane
    that was given up has no part."""
    lanes = _movable(paths, held)
    places = split_onto(held, onto)
    views = one_move.move_all(
        paths, {lane: places[lane] for lane in lanes}, pause=pause, wait_s=wait_s,
        progress=progress,
    )  # fmt: skip
    return _moved(paths, held, views)


def _movable(paths: SitePaths, held: HeldLanes) -> list[str]:
    """The ids of the lanes that a move takes, or took: those that were not given up. StateError
    when there is none."""
    begun = _failovers(paths, held)
    lanes = [
        lane.hex
        for lane in held.lanes
        if lane_of(lane.name) in begun or not lane.manifest.unprotected
    ]
    if not lanes:
        raise errors.StateError(f"no lane of {held.name!r} is protected to here any more")
    return lanes


def _moved(paths: SitePaths, held: HeldLanes, views: Sequence[ViewInfo]) -> ViewInfo:
    """The views of a move as one."""
    by_id = {view.group_id: view for view in views}
    cut = _begun(paths, held, _failovers(paths, held))
    return joined_view(held, cut, None, [by_id[lane] for lane, _position in lanes_of(held, cut)])


def reverse(
    paths: SitePaths,
    held: HeldLanes,
    options: GroupOptions,
    *,
    to: str = "",
    progress: one_move.Progress | None = None,
) -> list[GroupDefinition]:
    """Protect all lanes that were taken over, each to the site that wrote it before or all to one
    that is named: their definitions."""
    groups = GroupDirectory(paths.root)
    begun = _failovers(paths, held)
    lanes = []
    for lane in held.lanes:
        mine = groups.of_id(lane.hex)
        if lane_of(lane.name) in begun or (mine is not None and not mine.yielded):
            lanes.append(lane.hex)
    if not lanes:
        raise errors.NotFoundError(f"no failover of {held.name!r} is under way")
    return reverse_all(paths, lanes, options, to=to, progress=progress)


def failback(
    paths: SitePaths,
    held: HeldLanes,
    options: GroupOptions,
    *,
    pause: bool = False,
    wait_s: float = one_move.WAIT_S,
    discard_untaken: bool = False,
    moved: Callable[[ViewInfo], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[GroupDefinition]:
    """Return all lanes to this site, which wrote them before: their definitions. A lane that was
    given up has no part."""

    def told(views: list[ViewInfo]) -> None:
        if moved is not None:
            moved(_moved(paths, held, views))

    return failback_all(
        paths, _movable(paths, held), options, pause=pause, wait_s=wait_s,
        discard_untaken=discard_untaken, moved=told, progress=progress,
    )  # fmt: skip
