"""The old site of a group: how it gives way to the site that took the group over.

The new site asks for it (`group.follow` on the wire) before it protects the group back to here.
From then on the filter leaves the disks alone, nothing is shipped from here, and the history of the
group goes on in this site's store. The disks stay as they are. Each step can be repeated.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import GroupDefinition, GroupDirectory, ParentPosition
from vrep.keys.datakey import inspect_wrapped
from vrep.keys.identity import SiteIdentity
from vrep.paths import SitePaths
from vrep.recovery.untaken import note_untaken, untaken_path
from vrep.target.base import BaseDisk, BaseOffer
from vrep.target.epochs import entry_of
from vrep.target.manifest import EpochEntry, Position, load_newest
from vrep.target.reign import left_at

__all__ = ["give_way"]

RELEASE_S = 60.0
"""the filter drains the group, and writes down that it did"""


def give_way(paths: SitePaths, site_id: str, told: Mapping[str, Any]) -> BaseOffer | None:
    """Leave a group to the site that took it over; `told` has ``group_id`` and the ``epochs`` of
    that site's history, oldest first. BusyError while a VM uses the disks here. What can be sealed
    of the old disks, under the ``wrapped_keys`` that the site holds; None when it names none."""
    epochs = [entry_of(raw) for raw in told["epochs"]]
    if not epochs or epochs[-1].writer.hex() != site_id:
        raise errors.InvalidError("the newest epoch belongs to another site")
    groups = GroupDirectory(paths.root)
    definition = groups.of_id(str(told["group_id"]))
    if definition is None:
        _require_writer(paths, site_id, str(told["group_id"]), epochs)
        return None
    if definition.to_site != site_id:
        raise errors.FencedError(f"{definition.name!r} is not protected to the site that asks")
    known = next((entry for entry in epochs if entry.epoch == definition.epoch), None)
    if known is None or known.epoch_id.hex() != definition.epoch_id:
        raise errors.StateError(
            f"the history of {definition.name!r} there does not go on from epoch {definition.epoch}"
        )
    if known is epochs[-1]:
        raise errors.StateError(f"{definition.name!r} is written here: nobody took it over")
    left = left_at(epochs, definition.epoch)
    first = not definition.yielded
    if first:
        _require_unused(paths, definition)
    definition = groups.update(
        definition.name,
        fenced=True,
        yielded=True,
        left=ParentPosition(left.epoch, left.lane, left.seq),
    )
    _tell(paths, "source", "reload")
    _tell(paths, "filter", "release", group=definition.name)
    if first or not untaken_path(paths, definition.name).exists():
        note_untaken(paths, definition)
    return _offer(paths, definition, left, list(told.get("wrapped_keys", ())))


def _offer(
    paths: SitePaths, definition: GroupDefinition, left: Position, keys: list[bytes]
) -> BaseOffer | None:
    disks = []
    for disk in definition.disks:
        scheme, _, where = disk.uri.partition(":")
        if scheme in ("file", "block"):
            disks.append(BaseDisk(disk.name, where, disk.bytes, disk.index))
    for blob in keys:
        inspect_wrapped(blob)
    if not keys or len(disks) < len(definition.disks):
        return None
    return BaseOffer(
        name=definition.name,
        left=left,
        disks=disks,
        wrapped_keys=keys,
        compression=definition.options.compression,
        command=[sys.executable, "-m", "vrep.recovery.base", str(paths.root)],
    )


def _require_writer(
    paths: SitePaths, site_id: str, group_id: str, epochs: Sequence[EpochEntry]
) -> None:
    """FencedError unless a store that is here, of a group without a definition, knows the site.
    One that a base made knows nobody else yet: then the site must know the id of this site's own
    epoch, which who was sent the group's history learnt, and have gone on from it."""
    try:
        manifest = load_newest(paths.store / group_id, bytes.fromhex(group_id))
    except errors.NotFoundError:
        return
    if any(entry.writer.hex() == site_id for entry in manifest.epochs):
        return
    own = manifest.current_epoch
    ours = own.writer.hex() == SiteIdentity.load(paths.root).site_id
    told = any(entry.epoch == own.epoch and entry.epoch_id == own.epoch_id for entry in epochs)
    if not (ours and told):
        raise errors.FencedError(f"{manifest.name!r} belongs to another site")
    left_at(epochs, own.epoch)


def _require_unused(paths: SitePaths, definition: GroupDefinition) -> None:
    try:
        known = ControlClient(paths.socket("filter")).call("status").get(definition.name, {})
    except errors.UnreachableError:
        return
    if clients := int(known.get("clients", 0)):
        raise errors.BusyError(
            f"{clients} client(s) use the old disks of {definition.name!r} at the old site: shut "
            "that VM down first; what it wrote was not taken over"
        )


def _tell(paths: SitePaths, role: str, method: str, **params: Any) -> None:
    """A process that does not run reads the files when it starts."""
    with contextlib.suppress(errors.UnreachableError):
        ControlClient(paths.socket(role), timeout=RELEASE_S).call(method, **params)
