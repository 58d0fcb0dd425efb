"""Left: groups that are at another site than the one that is asked.

A view whose disks became those of a protected group keeps them when the group goes back: its
sockets are nobody's then. And a site that was taken over from can return a group only once the
other one protects it back to here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vrep import errors
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.lanes import group_of
from vrep.paths import SitePaths
from vrep.recovery.held import find_group

if TYPE_CHECKING:
    from vrep.recovery.view import ViewDirectory, ViewRecord

__all__ = ["has_left", "require_history", "require_left"]


def has_left(view: ViewDirectory, record: ViewRecord) -> bool:
    """Whether the disks of a view that were a protected group's are not that any more."""
    mine = GroupDirectory(view.paths.root).of_id(record.group_id)
    if mine is None or mine.yielded:
        return True
    used = {disk.uri for disk in mine.disks}
    return not all(view.disk_uri(disk) in used for disk in record.disks)


def require_history(paths: SitePaths, group: str) -> None:
    """Before a group (its name or id) returns: NotFoundError when this site holds no history of it,
    and nothing else of it; StateError, with what comes first, when it has its definition."""
    try:
        find_group(paths, group)
    except errors.NotFoundError:
        for mine in GroupDirectory(paths.root).readable():
            if group in (mine.name, group_of(mine.name), mine.group_id):
                require_left(mine)
                raise errors.StateError(
                    f"{mine.name!r} is written at this site: there is nothing to return"
                ) from None
        raise


def require_left(mine: GroupDefinition) -> None:
    """StateError when another site took a group over, and this one has no part in that yet."""
    if not mine.fenced or mine.yielded:
        return
    name = group_of(mine.name)
    raise errors.StateError(
        f"{name!r} was taken over by another site, which does not protect it to here: give 'vrep "
        f"reverse {name}' there first, once its failover is committed, then 'vrep failback' here"
    )
