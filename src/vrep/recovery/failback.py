"""Failback: a group returns to the site that wrote it before, onto the disks that it had there.

A move to here whose view fills the old disks in place: the VM runs from them behind the filter at
once, and what is right in them is known from the view's presence file. Once they are whole the
group is protected to the other site again. Each part goes on where it was cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vrep import errors
from vrep.groups import GroupDefinition, GroupDirectory, GroupOptions
from vrep.paths import SitePaths
from vrep.recovery.failover import Failover
from vrep.recovery.left import require_left
from vrep.recovery.move import WAIT_S, move_all
from vrep.recovery.reverse import reverse_all
from vrep.recovery.untaken import find_untaken
from vrep.recovery.view import ViewInfo

__all__ = ["failback", "failback_all"]

Progress = Callable[[str, int, int], None]


def failback(
    paths: SitePaths,
    group: str,
    options: GroupOptions,
    *,
    pause: bool = False,
    wait_s: float = WAIT_S,
    discard_untaken: bool = False,
    moved: Callable[[ViewInfo], None] | None = None,
    progress: Progress | None = None,
) -> GroupDefinition:
    """Return a group to this site, which wrote it before. StateError when its disks here hold
    writes that were not taken over and not exported, unless `discard_untaken`. `moved` hears of the
    view as soon as its VM may run; `progress` of the bytes of each part. See `move` and `reverse`.
    """
    (made,) = failback_all(
        paths, [group], options, pause=pause, wait_s=wait_s, discard_untaken=discard_untaken,
        moved=None if moved is None else lambda views: moved(views[0]), progress=progress,
    )  # fmt: skip
    return made


def failback_all(
    paths: SitePaths,
    groups: Sequence[str],
    options: GroupOptions,
    *,
    pause: bool = False,
    wait_s: float = WAIT_S,
    discard_untaken: bool = False,
    moved: Callable[[list[ViewInfo]], None] | None = None,
    progress: Progress | None = None,
) -> list[GroupDefinition]:
    """`failback` of all lanes of a group, by their ids or names."""
    away: dict[str, dict[str, str]] = {}
    for group in groups:
        failover = Failover(paths, group)
        mine = GroupDirectory(paths.root).of_id(failover.held.hex)
        if mine is None:
            raise errors.StateError(
                f"{failover.held.name!r} was never written at this site: 'vrep move' takes it over"
            )
        if not mine.yielded:
            require_left(mine)
            continue  # it is back
        if mine.read_through_vm:
            raise errors.UnsupportedError(
                f"{mine.name!r} has a qcow2 image here, which cannot be filled in place: 'vrep "
                "move' brings the group to disks of its own"
            )
        if failover.view() is None and not discard_untaken:
            _require_taken(paths, mine)
        away[group] = {disk.name: disk.uri for disk in mine.disks}

    def part(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    if away:
        views = move_all(
            paths, away, pause=pause, wait_s=wait_s, progress=part("checking the history")
        )
        if moved is not None:
            moved(views)
    return reverse_all(paths, groups, options, progress=part("protecting back"))


def _require_taken(paths: SitePaths, mine: GroupDefinition) -> None:
    """StateError when the group's disks here hold what is nowhere else."""
    left = find_untaken(paths, mine.name)
    if left.bytes and not left.exported:
        raise errors.StateError(
            f"the disks of {mine.name!r} here hold writes that were not taken over, in "
            f"{left.bytes} bytes: 'vrep export {mine.name} --untaken' keeps them, "
            "--discard-untaken gives them up"
        )
