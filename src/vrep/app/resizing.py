"""Resizing a protected disk, as the filter's process plans it.

The plan stands in the group's definition before anything is done, and is carried out when the
group is opened (src/_native/filter/resize.c): a filter that is killed on the way goes on when it
starts. It is forgotten once the size is a record in the order of the writes. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from vrep._core.filter import Disk
from vrep.errors import InvalidError, NotFoundError
from vrep.examine import SECTOR_BYTES, examine_disk
from vrep.groups import GroupDefinition, GroupDirectory, block_bytes

if TYPE_CHECKING:
    from vrep._core.filter import Group

__all__ = ["note_sizes", "open_disks", "plan_resize"]

SIZE_MAX: Final = 1 << 50


def open_disks(definition: GroupDefinition) -> list[Disk]:
    """The disks to open, with what is planned for them."""
    disks = []
    for disk in definition.disks:
        was, size = definition.resizing.get(disk.name, (0, disk.bytes))
        disks.append(Disk(disk.name, disk.uri, size, was))
    return disks


def plan_resize(
    definition: GroupDefinition, served: Mapping[str, int], params: Mapping[str, Any]
) -> tuple[str, int, int] | None:
    """Name, size and size to have of a disk, of which `served` tells what it has as it is served;
    None when it has that size. InvalidError, NotFoundError: it cannot be done."""
    name = str(params["disk"])
    disk = next((d for d in definition.disks if d.name == name), None)
    if disk is None:
        names = ", ".join(d.name for d in definition.disks)
        raise NotFoundError(f"group {definition.name!r} has no disk {name!r}: {names}")
    was, there = served[name], examine_disk(disk.index, name, disk.uri).bytes
    size = int(params.get("size") or there)
    if disk.uri.startswith("block:") and size != there:
        raise InvalidError(
            f"{disk.uri} has {there} bytes, not {size}: resize the device first, then say so here"
        )
    if there not in (was, size):
        raise InvalidError(
            f"{disk.uri} has {there} bytes, neither the {was} that are served nor {size}"
        )
    if not 0 < size <= SIZE_MAX or size % SECTOR_BYTES:
        raise InvalidError(f"a disk of {size} bytes: it has a multiple of {SECTOR_BYTES}")
    block = block_bytes(definition.options, disk.front)
    if size % block:
        raise InvalidError(f"a disk of {size} bytes: its guest knows blocks of {block}")
    if size < was and not params.get("shrink"):
        raise InvalidError(
            f"disk {name!r} has {was} bytes: {was - size} at its end would be cut off. If its "
            "guest does without them already, say so with --shrink"
        )
    return None if size == was == there else (name, was, size)


def note_sizes(groups: GroupDirectory, definition: GroupDefinition, group: Group) -> None:
    """Keep in the definition what the disks of an open group have, and forget plans that were
    carried out."""
    sizes = dict(group.disks)
    disks = tuple(
        msgspec.structs.replace(disk, bytes=sizes[disk.name]) for disk in definition.disks
    )
    resizing = {
        name: plan
        for name, plan in definition.resizing.items()
        if group.status()["sizes_due"] and sizes[name] == plan[1]
    }
    groups.update(definition.name, disks=disks, resizing=resizing)
