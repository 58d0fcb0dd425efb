"""What a command waits for: the end of a sync, a checkpoint that is durable at its target.

Nothing announces either; the site's processes are asked again and again, by the caller's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.lanes import group_of, lane_name
from vrep.source.hosts import may_lack

if TYPE_CHECKING:
    from vrep.site.base import SiteBase

ASK_EVERY_S: Final = 0.2
ASK_MARK_EVERY_S: Final = 0.02
CUT_S: Final = 30.0
"""longer than a cut is tried for"""


def replicating(
    site: SiteBase,
    group: str,
    timeout_s: float | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Until every write of a group is shipped in its order; `progress` hears the bytes of a
    sync, so far and in all. StateError for a group that will not come so far by itself."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        status = site.status(group)["groups"][group]
        state = status["state"]
        if state == "replicating":
            return
        if state == "initial-sync" and "target-full" in status.get("conditions", ()):
            raise errors.StoreFullError(
                f"{status['targets'][0]['site']} has no room for {group!r}, which cannot be "
                "recovered before there is: 'vrep status' there says how much it wants"
            )
        if state == "error":
            raise errors.VrepError(f"{group}: {status['error'] or 'not served'}")
        if state in ("paused", "failed-over"):
            raise errors.StateError(f"{group!r} is {state}: nothing of it is shipped")
        target = status["targets"][0]
        if progress is not None and target["total_bytes"] is not None:
            progress(target["total_bytes"] - target["unshipped_bytes"], target["total_bytes"])
        if deadline is not None and time.monotonic() > deadline:
            raise errors.TimeLimitError(f"{group!r} is {state} after {timeout_s:g} s")
        time.sleep(ASK_EVERY_S)


class Mark(NamedTuple):
    """A checkpoint that was set."""

    label: str
    mark: dict[str, Any]


def mark(
    groups: GroupDirectory,
    control: ControlClient,
    group: str,
    label: str,
    wait_s: float,
    limit_s: float | None = None,
) -> Mark:
    """Mark the present instant. `control` is the filter's, which has `limit_s` to answer. Refused
    where `wait_s`, for which it is to be waited for afterwards, would be in vain."""
    if _own(groups, group).paused and wait_s > 0:
        raise errors.StateError(f"{group!r} is paused: nothing becomes durable until it is resumed")
    return Mark(label, control.call("mark", timeout=limit_s, group=group, label=label))


def durable(
    groups: GroupDirectory, control: ControlClient, group: str, made: Mark, wait_s: float
) -> dict[str, Any]:
    """Wait at most so long until a mark is durable at the target: it is no recovery point
    before."""
    name = f"checkpoint {made.label!r} (position {made.mark['seq']})"
    deadline = time.monotonic() + wait_s
    while True:
        status = control.call("status", group=group)
        # A gap that begins behind the mark may take it along, and then a later durable position
        # proves nothing about it: nor that of a filter which began anew.
        taken = status["gap_last"] > made.mark["seq"]
        durable = status["durable"] >= made.mark["seq"] and not taken
        if durable or wait_s <= 0:
            return {**made.mark, "durable": durable}
        if taken:
            raise errors.GapError(
                f"a gap began before {name} was known to be durable: 'vrep points' at the target "
                "shows whether it is there"
            )
        _own(groups, group)
        if time.monotonic() > deadline:
            raise errors.TimeLimitError(
                f"{name} is not durable at the target after {wait_s:g} s, and no recovery point "
                "until it is"
            )
        time.sleep(ASK_MARK_EVERY_S)


def cut(
    site: SiteBase, lanes: list[str], label: str, wait_s: float, limit_s: float | None = None
) -> dict[str, Any]:
    """Mark the present instant of a group with several lanes by a cut, tried again while it is
    void, for `limit_s` at most: {"point", "wall_ns", ...}. Refused where `wait_s`, for which it is
    to be waited for afterwards, would be in vain."""
    if any(_own(site.groups, name).paused for name in lanes) and wait_s > 0:
        raise errors.StateError(f"{lanes[0]!r} is paused: nothing becomes durable until resumed")
    source = ControlClient(site.paths.socket("source"), timeout=CUT_S)
    limit = {} if limit_s is None else {"try_s": limit_s}
    group = group_of(lanes[0])
    made: dict[str, Any] = source.call("cut", timeout=limit_s, group=group, label=label, **limit)
    return made


def cut_durable(
    site: SiteBase, lanes: list[str], label: str, made: dict[str, Any], wait_s: float
) -> dict[str, Any]:
    """Wait at most so long until a cut is durable with all lanes that have a part in it."""
    groups, source = site.groups, ControlClient(site.paths.socket("source"))
    group = group_of(lanes[0])
    wanted = {lane_name(group, lane): seq for _epoch, lane, seq in made["at"] if seq}
    wanted |= {made["completed"]: made["seq"], **made.get("also", {})}
    deadline = time.monotonic() + wait_s
    while True:
        status = source.call("cut_lanes", group=group)["lanes"]
        known = {name: status[name] for name in wanted if name in status}
        durable = len(known) == len(wanted) and all(
            one["durable"] >= wanted[name] for name, one in known.items()
        )
        marks = {lane_name(group, lane): (epoch, seq) for epoch, lane, seq in made["at"] if seq}
        if any(may_lack(one, *marks[name]) for name, one in known.items()):
            raise errors.GapError(
                f"a gap, or another epoch, began before checkpoint {label!r} was known to be "
                "durable: 'vrep points' at the target shows whether it is there"
            )
        if durable or wait_s <= 0:
            return {**made, "durable": durable}
        for name in lanes:
            _own(groups, name)
        if time.monotonic() > deadline:
            raise errors.TimeLimitError(
                f"checkpoint {label!r} ({made['point']}) is not durable at the target after "
                f"{wait_s:g} s, and no recovery point until it is"
            )
        time.sleep(ASK_MARK_EVERY_S)


def _own(groups: GroupDirectory, group: str) -> GroupDefinition:
    """A group that this site writes; FencedError when it does not any more."""
    definition = groups.load(group)
    if definition.fenced:
        raise errors.FencedError(
            f"another site took {group!r} over: what is written here reaches no target"
        )
    return definition


__all__ = ["Mark", "cut", "cut_durable", "durable", "mark", "replicating"]
