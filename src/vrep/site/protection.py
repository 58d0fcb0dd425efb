"""Groups of disks are protected, changed and given up."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from vrep import errors, iscsi
from vrep.control import ControlClient
from vrep.groups import GroupDefinition, GroupOptions, without_lanes
from vrep.lanes import group_of, is_lane, lane_of, lanes_among
from vrep.site.base import NOT_STORED, SiteBase

__all__ = ["Protection"]

SERVE_WAIT_S: Final = 15.0
RESIZE_S: Final = 120.0
STORED_WAIT_S: Final = 30.0


class Protection(SiteBase):
    """See `vrep.Site`."""

    def protect(
        self,
        group: str,
        disks: Mapping[str, str],
        *,
        to: str,
        key: str,
        accept_key_loss: bool = False,
        options: GroupOptions | None = None,
        fronts: Mapping[str, str] | None = None,
        lanes: int = 0,
        beside: str = "",
    ) -> GroupDefinition:
        """Replicate disks, as one group, to a site that joined.

        `disks` maps names to backing URIs (``file:`` or ``block:``; ``qcow2:`` for a group that a
        running VM mirrors), `fronts` to how a VM reaches them (``nbd``, which is the default, or
        ``vhost-user-blk``). The first sync begins when the site's processes run. VMs must use the
        group's sockets from now on: see `disk_uri`. With `lanes` the disks are dealt out, in turn,
        to so many filter threads, each with sockets of its own; the answer is the first one's
        definition. Such a group is recovered at the cuts over its lanes. `beside` names a site that
        protects lanes of this group: these become further lanes of it, and it has several hosts.
        """
        from vrep.protect import protect

        made = protect(
            self,
            group,
            disks,
            to=to,
            key=key,
            accept_key_loss=accept_key_loss,
            options=options or self.group_options(),
            fronts=fronts or {},
            lanes=lanes,
            beside=beside,
        )
        self._tell("filter", "reload")
        self._tell("source", "reload")
        return made[0]

    def add_disks(
        self,
        group: str,
        disks: Mapping[str, str],
        *,
        fronts: Mapping[str, str] | None = None,
        lanes: int = 1,
    ) -> GroupDefinition:
        """Bring further disks into a group that this site protects with lanes, as lanes of their
        own: only they are copied. Points keep the disks that the group had when they were made, and
        go on without the new ones until these are whole. UnsupportedError for a group without
        lanes."""
        from vrep.protect import add

        made = add(self, group, disks, fronts=fronts or {}, lanes=lanes)
        self._tell("filter", "reload")
        self._tell("source", "reload")
        return made[0]

    def unprotect(self, group: str, *, delete_history: bool = False) -> str:
        """Stop replicating a group and forget it here; its disks stay as they are. With
        `delete_history` the target deletes what it holds as well; that needs the target. The
        answer is why the target could not be told, if it could not: then it misses its source.

        At the site that holds the history of a group that was given up, with `delete_history`:
        delete that history."""
        from vrep.protect import leave

        lanes = self.lanes_of(group)
        if not lanes and is_lane(group) and self._forget_lane(group):
            return ""
        if lanes and lanes != [group]:
            for lane in lanes:  # all are looked at before the first is given up
                if clients := self._clients(lane):
                    raise errors.BusyError(
                        f"{clients} client(s) use {lane!r}: move the VM back to its disks first"
                    )
            problems = [self.unprotect(lane, delete_history=delete_history) for lane in lanes]
            return "; ".join(dict.fromkeys(text for text in problems if text))
        # Only what the target is told is in the definition: a group whose definition cannot be
        # read can be forgotten all the same.
        if group not in set(self.groups.names()):
            if delete_history:
                self._delete_held(group)
                return ""
            raise errors.NotFoundError(f"no group {group!r} is protected here")
        clients = self._clients(group)
        if clients:
            raise errors.BusyError(
                f"{clients} client(s) use {group!r}: move the VM back to its disks first"
            )
        if delete_history:
            self._delete_history(self.groups.load(group))
        try:
            definition, problem = self.groups.load(group), ""
        except errors.VrepError as error:
            definition, problem = None, str(error)
        self.groups.forget(group)
        if is_lane(group):
            self._forget_lane(group)
        self._tell("source", "reload")
        if self._tell("filter", "reload"):
            self._wait_gone(group)
        shutil.rmtree(self.groups.path(group))
        shutil.rmtree(self.paths.shm(self.config.filter.shm_dir) / group, ignore_errors=True)
        spill = self.paths.spill(group, self.config.source.spill_dir)
        shutil.rmtree(spill, ignore_errors=True)
        if definition is not None and definition.hosts:
            problem = leave(self, definition, [lane_of(group)])
        # Last: a session that still ran would take the group back.
        if definition is not None and not delete_history:
            told = self._tell_target(definition, "group.unprotect", {})
            problem = "; ".join(text for text in (problem, told) if text)
        return problem

    def _forget_lane(self, lane: str) -> bool:
        """Make cuts without a lane, which are whole from then on; whether any lane here knew it."""
        known = False
        for name in lanes_among(group_of(lane), self.groups.names()):
            known = known or lane_of(lane) in self.groups.load(name).lanes
            self.groups.revise(name, without_lanes({lane_of(lane)}))
        return known

    def keep(
        self, group: str, *, window_s: int | None = None, quota_bytes: int | None = None
    ) -> str:
        """Change how much history the target keeps of a group; None leaves a limit as it is, 0
        lifts it. The answer is why the target could not be told, if it could not: it learns it
        when the group is shipped next."""
        lanes = self._of_group(group)
        if lanes != [group]:
            told = [self.keep(n, window_s=window_s, quota_bytes=quota_bytes) for n in lanes]
            return "; ".join(dict.fromkeys(text for text in told if text))
        definition = self.groups.load(group)
        given = {"window_s": window_s, "quota_bytes": quota_bytes}
        changes = {name: value for name, value in given.items() if value is not None}
        options = msgspec.structs.replace(definition.options, **changes)
        self._change(group, options=options)
        params = {"window_s": options.window_s, "quota": options.quota_bytes}
        return self._tell_target(definition, "group.keep", params)

    def pause(self, group: str) -> None:
        """Stop shipping. Writes stay marked; the ring may overflow into a gap."""
        for name in self._of_group(group):
            self._change(name, paused=True)

    def resume(self, group: str, *, force: bool = False) -> None:
        """Ship again. `force`: also let a guest go on that a move has halted, without the word of
        the site that moves the group; it may have taken it over, and then two VMs run."""
        lanes = self._of_group(group)
        if lanes != [group]:
            for name in lanes:
                self.resume(name, force=force)
            return
        if self.groups.load(group).halted:
            if not force:
                raise errors.StateError(
                    f"{group!r} is being moved: it goes on by itself once its target is reached "
                    "and has not taken it over; --force, if you know that it has not"
                )
            from vrep.source.halt import go_on

            if self.groups.load(group).fenced or self._connected(group):
                raise errors.StateError(
                    f"the target of {group!r} can be asked: it decides whether the guest goes on"
                )
            go_on(self.groups, self._filter(), group)
        self._change(group, paused=False)

    def resync(self, group: str) -> None:
        """Copy every block again, as if the target held nothing that can be trusted; at the
        group's rate, and once it is resumed if it is paused. When it returns, that is known after
        a power loss as well; StorageError: not yet."""
        for name in self._of_group(group):
            self.groups.load(name)
            self._filter().call("resync", group=name, all=True)
            deadline = time.monotonic() + STORED_WAIT_S
            while self._filter().call("status", group=name).get("marks_unstored"):
                if time.monotonic() > deadline:
                    raise errors.StorageError(
                        f"{name!r} copies every block again, but its change map cannot be stored"
                    )
                time.sleep(0.005)

    def resize(
        self, group: str, disk: str, size: int | None = None, *, shrink: bool = False
    ) -> dict[str, Any]:
        """Give a disk another size, as one record in the order of its writes: {"bytes",
        "changed"}. A file gets it here; a block device, or without `size`, has it already. Points
        before it keep the size that the disk had. `shrink`: a smaller one, too, whose end the
        guest does not use any more. The filter must run; its clients connect again."""
        for lane in self._of_group(group):
            if any(one.name == disk for one in self.groups.load(lane).disks):
                group = lane
        self.groups.load(group)
        answer: dict[str, Any] = self._filter().call(
            "resize", timeout=RESIZE_S, group=group, disk=disk, size=size or 0, shrink=shrink
        )
        self._tell("source", "reload", group=group)
        return answer

    def wait_replicating(
        self,
        group: str,
        *,
        timeout_s: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Until a first sync or resync has ended, and every write is shipped in its order.
        `progress` hears the bytes of the sync, so far and in all."""
        from vrep.waits import replicating

        self.wait_served(group)
        for name in self._of_group(group):
            replicating(self, name, timeout_s, progress)

    def wait_served(self, group: str, timeout_s: float = SERVE_WAIT_S) -> None:
        """Until the filter serves a group's disks."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                for name in self._of_group(group):
                    self._filter().call("status", group=name)
                return
            except errors.VrepError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def disk_uri(self, group: str, disk: str | None = None) -> str:
        """Where a VM finds a disk of a protected group (default: the first): an NBD or iSCSI URI,
        or ``vhost-user-blk:`` and the path of a socket."""
        for lane in self._of_group(group):
            definition = self.groups.load(lane)
            for found in definition.disks:
                if disk not in (None, found.name):
                    continue
                if found.front == "vhost-user-blk":
                    return f"vhost-user-blk:{self.paths.vhost_socket(lane, found.index)}"
                if found.front == iscsi.FRONT:
                    units = [d.name for d in definition.disks if d.front == iscsi.FRONT]
                    return iscsi.uri(definition, units.index(found.name))
                return f"nbd+unix:///{found.name}?socket={self.paths.nbd_socket(lane)}"
        raise errors.NotFoundError(f"group {group!r} has no disk {disk!r}")

    def set_fronts(self, group: str, fronts: Mapping[str, str], **options: Any) -> GroupDefinition:
        """Change how a VM reaches disks of a protected group, and with `options` where iSCSI is
        served. Refused while a VM uses one; what cannot be served leaves all as it was."""
        from vrep.protect import check_fronts, with_fronts

        definition = before = self.groups.load(group)
        disks = tuple(with_fronts(definition.disks, fronts))
        changed = msgspec.structs.replace(definition.options, **options)
        check_fronts(changed, disks)
        if clients := self._clients(group):
            raise errors.BusyError(f"{clients} client(s) use {group!r}: shut the VM down first")
        definition = self.groups.update(group, disks=disks, options=changed)
        # One that is not served now is served so by its next start.
        with contextlib.suppress(errors.UnreachableError, errors.NotFoundError):
            try:
                self._filter().call("front", group=group)
            except (errors.UnreachableError, errors.NotFoundError):
                raise
            except errors.VrepError:
                self.groups.update(group, disks=before.disks, options=before.options)
                raise
        return definition

    def _wait_gone(self, group: str) -> None:
        deadline = time.monotonic() + SERVE_WAIT_S
        while time.monotonic() < deadline:
            try:
                self._filter().call("status", group=group)
            except (errors.NotFoundError, errors.UnreachableError):
                return
            time.sleep(0.05)
        raise errors.TimeLimitError(f"the filter still serves {group!r}")

    def _delete_history(self, definition: GroupDefinition) -> None:
        from vrep.wire.transport import PeerRefusedError

        try:
            self._ask_target(definition, "group.delete", {})
        except PeerRefusedError as error:
            if error.code != NOT_STORED:  # a group that was never served has left nothing there
                raise

    def _delete_held(self, group: str) -> None:
        """Delete the history of a group that its source gave up, through the target process,
        which has it open."""
        from vrep.recovery.held import find_group
        from vrep.recovery.view import PROTECTED, view_directories

        held = find_group(self.paths, group)
        if held.manifest.current_epoch.writer.hex() == self.identity.site_id:
            raise errors.StateError(f"this site took {group!r} over: its history is in use")
        # Also one that does not run now: what it has not fetched yet stands in the history alone.
        views = [
            view.id
            for view in view_directories(self.paths)
            if (record := view.load()).group_id == held.hex and record.state != PROTECTED
        ]
        if views:
            raise errors.BusyError(
                f"view {', '.join(views)} reads the history of {group!r}: end it first, with "
                "'vrep test stop' or 'vrep failover rollback'"
            )
        ControlClient(self.paths.socket("target")).call("delete_unprotected", group_id=held.hex)
