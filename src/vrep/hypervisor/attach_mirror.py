"""Attach and detach in mirror mode: the VM keeps its disks, and sends a copy of each write.

The record is written before the first change in the VM, then the group's definition says that it is
mirrored: from then on the filter opens it so, and the keeper goes on with whatever was cut off.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Final

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.hypervisor import mirror
from vrep.hypervisor.attach import Result, check_runs, wait_durable
from vrep.hypervisor.graph import Graph
from vrep.hypervisor.mirror import MirrorPlan
from vrep.hypervisor.mirrored import Mirrored
from vrep.hypervisor.monitor import Monitor, check_vm, open_monitor
from vrep.hypervisor.record import VERSION, Attachment, AttachmentFile

GONE: Final = (errors.UnreachableError, errors.TimeLimitError)


class MirrorAttacher:
    """Attaches and detaches one group of a site."""

    def __init__(
        self, groups: GroupDirectory, filter_control: ControlClient, group: str, socket: Path
    ) -> None:
        self._groups = groups
        self._filter = filter_control
        self._group = group
        self._socket = socket
        self._file = AttachmentFile(groups, group)

    def attach(self, vm: str, *, dry_run: bool = False) -> Result:
        """Have a running VM mirror its writes. UnsupportedError: a block graph without a recipe;
        then nothing was changed. A VM that mirrors goes on so: no commands."""
        vm = check_vm(vm)
        with self._file.held(), contextlib.closing(open_monitor(vm)) as monitor:
            definition = self._groups.load(self._group)
            _check(definition)
            check_runs(monitor)
            record = self._file.load()
            if record is not None and (record.mode != "mirror" or record.vm != vm):
                raise errors.StateError(f"{self._group!r} is attached to {record.vm} already")
            disks = record.mirrors if record else _plan(definition, Graph.read(monitor))
            mirrored = self._mirrored(monitor, disks)
            if record is not None and self._live():
                return Result(vm, (), (), dry_run, mirrors=disks)
            if dry_run:
                return Result(vm, (), mirrored.commands(), True, mirrors=disks)
            failures = mirrored.failures()
            self._file.store(
                Attachment(VERSION, vm, mode="mirror", mirrors=disks, failures=failures)
            )
            try:
                self._groups.update(self._group, mirrored=True, detached=False)
                self._filter.call("mirror_begin", group=self._group)
                begun = time.monotonic()
                mirrored.begin()
                took = round((time.monotonic() - begun) * 1000, 3)
            except errors.VrepError as error:
                if record is None:
                    self._undo(mirrored, definition, error)
                raise
            return Result(vm, (), mirrored.commands(), False, took, mirrors=disks)

    def _live(self) -> bool:
        status = self._filter.call("status", group=self._group)
        return bool(status["mirror"]) and status["handover"] == ""

    def _undo(self, mirrored: Mirrored, before: GroupDefinition, error: errors.VrepError) -> None:
        """Nothing is left behind, if the VM can be asked."""
        try:
            mirrored.end()
        except errors.VrepError as also:
            error.detail += f"; and the VM may mirror ({also}): 'vrep detach {self._group}' ends it"
            return
        self._groups.update(self._group, mirrored=False, detached=before.detached)
        with contextlib.suppress(*GONE):
            self._filter.call("mirror_end", group=self._group)
        self._file.forget()

    def detach(self, *, dry_run: bool = False) -> Result:
        """The VM mirrors no more, and is as it was; its history ends here. For a VM that is off:
        the same, without it."""
        with self._file.held():
            record = self._file.load()
            if record is None:
                raise errors.StateError(f"{self._group!r} is not attached")
            try:
                monitor = open_monitor(record.vm)
            except (errors.UnreachableError, errors.NotFoundError):
                if not dry_run:
                    self._close_group()
                return Result(record.vm, (), (), dry_run, mirrors=record.mirrors)
            with contextlib.closing(monitor):
                mirrored = self._mirrored(monitor, record.mirrors)
                running, bitmaps = mirrored.jobs(), mirrored.bitmaps()
                exports = mirrored.exports()
                commands = [
                    *(mirror.stop(d, force=False) for d in record.mirrors if d.job in running),
                    *(mirror.remove_bitmap(d, b) for d in record.mirrors for b in bitmaps[d.name]),
                    *(mirror.unexport(d) for d in record.mirrors if d.export in exports),
                ]
                if not dry_run:
                    with contextlib.suppress(*GONE, errors.StateError):
                        self._filter.call("mirror_distrust", group=self._group)
                    mirrored.end()
            if not dry_run:
                self._close_group()
            return Result(record.vm, (), tuple(commands), dry_run, mirrors=record.mirrors)

    def _close_group(self) -> None:
        wait_durable(self._filter, self._group)
        self._groups.update(self._group, detached=True, mirrored=False)
        with contextlib.suppress(*GONE):
            self._filter.call("release", group=self._group)
        self._file.forget()

    def _mirrored(self, monitor: Monitor, disks: tuple[MirrorPlan, ...]) -> Mirrored:
        return Mirrored(monitor, self._filter, self._group, disks, self._socket)


def _check(definition: GroupDefinition) -> None:
    if definition.fenced:
        raise errors.FencedError(f"another site took {definition.name!r} over")
    if any(disk.front != "nbd" for disk in definition.disks):
        raise errors.UnsupportedError(
            f"{definition.name!r} has disks that are served over another front-end than NBD"
        )
    if definition.options.on_fence == "pause":
        raise errors.UnsupportedError(
            f"{definition.name!r} is to pause its VM when another site takes it over, and a VM "
            "that mirrors does not wait for the filter: attach it in-line"
        )


def _plan(definition: GroupDefinition, graph: Graph) -> tuple[MirrorPlan, ...]:
    tag = definition.group_id[:8]
    return tuple(
        mirror.plan(graph, tag, disk.index, disk.name, disk.uri, disk.bytes)
        for disk in definition.disks
    )


__all__ = ["MirrorAttacher"]
