"""The virtual machine of a group, and the host: attach, detach, checkpoints, objects, service."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from vrep import errors
from vrep.site.protection import Protection

if TYPE_CHECKING:
    from vrep.hypervisor.attach import Attacher
    from vrep.hypervisor.attach import Result as AttachResult
    from vrep.hypervisor.attach_mirror import MirrorAttacher
    from vrep.service import ServiceOptions, ServicePlan

__all__ = ["Machine"]

Made = TypeVar("Made")


class Machine(Protection):
    """See `vrep.Site`."""

    def attach(
        self,
        group: str,
        vm: str | None = None,
        *,
        dry_run: bool = False,
        reconnect_s: int | None = None,
        mode: Literal["inline", "mirror"] = "inline",
    ) -> AttachResult | None:
        """Put the filter under the disks of a running VM (``qmp:SOCKET``, ``libvirt:NAME``) that
        this group protects, without a pause that its guest notices; `dry_run` only says how.
        UnsupportedError: a block graph that is not known, and was left as it is. Without `vm`: a
        group that was detached is served again, for a VM that is started on its socket.

        In the mode `mirror` the VM goes on writing its disks itself, and sends a copy of each
        write: whatever becomes of the filter, the VM goes on.

        Of a libvirt domain the definition is kept as object ``domain.xml``, and its NVRAM as
        ``nvram``, if it has one."""
        from vrep.hypervisor.attach import RECONNECT_S

        if vm is None:
            self.groups.update(group, detached=False)
            self._tell("filter", "reload")
            self._tell("source", "reload", group=group)
            return None
        if mode == "mirror":
            result = self._mirror_attacher(group).attach(vm, dry_run=dry_run)
        else:
            delay = RECONNECT_S if reconnect_s is None else reconnect_s
            result = self._attacher(group).attach(vm, dry_run=dry_run, reconnect_s=delay)
        if dry_run:
            return result
        self._tell("source", "reload", group=group)
        if not vm.startswith("libvirt:"):
            return result
        put, missing = self._keep_domain(group, vm.partition(":")[2])
        return msgspec.structs.replace(result, objects=put, objects_missing=missing)

    def detach(self, group: str, *, dry_run: bool = False) -> AttachResult:
        """Undo `attach`: the VM's disks are as they were, the filter lets them alone, and nothing
        that is written from then on is replicated. For a VM that is off: the same, without it."""
        from vrep.hypervisor.record import AttachmentFile

        record = AttachmentFile(self.groups, group).load()
        if record is not None and record.mode == "mirror":
            return self._mirror_attacher(group).detach(dry_run=dry_run)
        return self._attacher(group).detach(dry_run=dry_run)

    def _attacher(self, group: str) -> Attacher:
        from vrep.hypervisor.attach import Attacher

        return Attacher(self.groups, self._filter(), group, self.paths.nbd_socket(group))

    def _mirror_attacher(self, group: str) -> MirrorAttacher:
        from vrep.hypervisor.attach_mirror import MirrorAttacher

        return MirrorAttacher(self.groups, self._filter(), group, self.paths.nbd_socket(group))

    def _keep_domain(self, group: str, domain: str) -> tuple[tuple[str, ...], str]:
        """Put what is kept of a libvirt domain beside its disks; why something is missing: the VM
        is attached all the same."""
        from vrep.hypervisor.domain import describe

        put: list[str] = []
        try:
            found, missing = describe(domain)
            for name, data in found.items():
                self.object_put(group, name, data)
                put.append(name)
        except errors.VrepError as error:
            missing = str(error)
        return tuple(put), missing

    def checkpoint(
        self,
        group: str,
        label: str,
        *,
        wait_s: float = 0.0,
        quiesce: bool = False,
        agent: str = "",
    ) -> dict[str, Any]:
        """Name the present instant: {"seq", "wall_ns"} of the mark, ordered after every write
        that was acknowledged before, and whether it is "durable" at the target, which it must
        be before it can be recovered. With `wait_s` it is, or `TimeLimitError` is raised.

        With `quiesce` the guest's file systems are frozen meanwhile, by its guest agent
        (``unix:SOCKET`` or ``libvirt:NAME``; default: the settings'), between the commands of the
        settings; it is thawed whatever happens, and an error says that it was not frozen."""
        from vrep.hypervisor.quiesce import mark_quiesced
        from vrep.recovery.point import check_label
        from vrep.waits import cut, cut_durable, durable, mark

        check_label(label)
        control, lanes = self._filter(), self.lanes_of(group) or [group]

        def made_by(make: Callable[[float | None], Made]) -> Made:
            if not quiesce:
                return make(None)
            return mark_quiesced(
                self.config.quiesce, agent, self.groups, control, lanes, label, make
            )

        if lanes != [group]:
            answer = made_by(partial(cut, self, lanes, label, wait_s))
            found = cut_durable(self, lanes, label, answer, wait_s)
        else:
            one = made_by(partial(mark, self.groups, control, group, label, wait_s))
            found = durable(self.groups, control, group, one, wait_s)
        return {**found, "quiesced": quiesce}

    def object_put(
        self, group: str, name: str, data: bytes, *, wait_s: float = 0.0
    ) -> dict[str, Any]:
        """Let a small blob travel with a group, sealed, its name too: {"name", "bytes",
        "durable"}. It is a version of its name from the next position on. It is kept here until a
        target holds it, so it may be put in a gap, before the first sync, or while the filter does
        not run. With `wait_s` the target holds it, or `TimeLimitError` is raised."""
        from vrep.objects import ObjectDirectory

        definition = self.groups.load(group)
        room = definition.options.ring_bytes // 4
        if len(data) > room:
            raise errors.InvalidError(
                f"object {name!r} has {len(data)} bytes; {group!r}'s ring takes {room} at most"
            )
        objects = ObjectDirectory(self.groups.path(group))
        one = objects.put(name, data, time.time_ns())
        deadline = time.monotonic() + wait_s
        while True:
            try:
                self._filter().call("publish_objects", group=group)
            except errors.VrepError:
                if wait_s:
                    raise
            durable = one not in objects.due()
            if durable or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        if wait_s and not durable:
            raise errors.TimeLimitError(
                f"object {name!r} is not durable at the target after {wait_s:g} s: it is kept "
                "here until it is"
            )
        return {"name": name, "bytes": len(data), "durable": durable}

    def objects(self, group: str, at: str = "latest") -> list[dict[str, Any]]:
        """The objects of a group, by name: at the site that holds its history, as they were at a
        point, {"name", "bytes", "point", "time"}; at its source, the newest, {"name", "bytes",
        "durable", "time"}."""
        if group in set(self.groups.names()) and at == "latest":
            return self._own_objects(group)
        from vrep.recovery.object_records import list_objects

        return [msgspec.to_builtins(each) for each in list_objects(self.paths, group, at)]

    def _own_objects(self, group: str) -> list[dict[str, Any]]:
        from vrep.objects import ObjectDirectory, parse
        from vrep.recovery.history import format_time

        objects = ObjectDirectory(self.groups.path(group))
        due = objects.due()
        found = []
        for one in objects.ids():
            plain = parse(objects.load(one))
            row = {"name": plain.name, "bytes": len(plain.data), "durable": one not in due}
            found.append({**row, "time": format_time(plain.wall_ns)})
        return sorted(found, key=lambda row: str(row["name"]))

    def object_get(self, group: str, name: str, at: str = "latest") -> bytes:
        """The bytes of an object at a point, at the site that holds the group's history."""
        from vrep.recovery.object_records import get_object

        return get_object(self.paths, group, name, at)

    def service_install(
        self, options: ServiceOptions | None = None, *, dry_run: bool = False
    ) -> ServicePlan:
        """Run this site under systemd, as root; `dry_run`: only what would be done."""
        from vrep.service import install, plan

        return plan(self.paths, options) if dry_run else install(self.paths, options)

    def service_uninstall(self, *, force: bool = False) -> list[str]:
        """Remove the units; the site stays. The removed files."""
        from vrep.service import uninstall

        return uninstall(self.paths, force=force)
