"""Attach and detach: a running VM's disks pass to the filter, and back.

Order is everything. Attach: the filter opens the group beside the VM (hand-over: it starts nothing
and copies nothing), what is to be done is written down, QEMU switches all disks by one command,
and the filter begins when QEMU's image locks are gone. Detach: the filter stores that it may be
written past, lets go of its locks, QEMU switches back and takes them, the filter sees that.
Whatever ends in between, the same command goes on where it stood.

The record (record.py) is there from before the first change in the VM until after the last. Times
in seconds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.hypervisor import recipe
from vrep.hypervisor.graph import Graph
from vrep.hypervisor.mirror import MirrorPlan
from vrep.hypervisor.monitor import Monitor, check_vm, open_monitor
from vrep.hypervisor.recipe import Command, DiskPlan, Step
from vrep.hypervisor.record import VERSION, Attachment, AttachmentFile

RECONNECT_S: Final = 60
"""how long a VM waits for a filter that restarts; longer than the filter's own pauses"""
SWITCH_S: Final = 10.0
DURABLE_S: Final = 5.0
ASK_EVERY_S: Final = 0.005
RUNNING: Final = frozenset({"running", "paused", "prelaunch"})


class Result(msgspec.Struct, frozen=True):
    """What was done, or (`dry_run`) would be: QMP commands in their order."""

    vm: str
    disks: tuple[DiskPlan, ...]
    commands: tuple[Command, ...]
    dry_run: bool
    switch_ms: float = 0.0
    """time that the VM's disks stood still, at most: from the command to its answer; of a mirror,
    until it was begun, meanwhile the VM goes on"""
    mirrors: tuple[MirrorPlan, ...] = ()
    """in the place of `disks` in mirror mode"""
    objects: tuple[str, ...] = ()
    """names of the objects that were put: the VM's definition, its NVRAM"""
    objects_missing: str = ""
    """why one of them is not kept"""


class Attacher:
    """Attaches and detaches one group of a site."""

    def __init__(
        self, groups: GroupDirectory, filter_control: ControlClient, group: str, socket: Path
    ) -> None:
        self._groups = groups
        self._filter = filter_control
        self._group = group
        self._socket = socket
        self._file = AttachmentFile(groups, group)

    # ---- attach --------------------------------------------------------------------

    def attach(self, vm: str, *, dry_run: bool = False, reconnect_s: int = RECONNECT_S) -> Result:
        """Put the filter under the disks of a running VM. UnsupportedError: a block graph without
        a recipe; then nothing was changed. A VM that is attached stays so: no commands."""
        vm = check_vm(vm)
        definition = self._groups.load(self._group)
        if definition.fenced:
            raise errors.FencedError(f"another site took {self._group!r} over")
        if definition.read_through_vm:
            raise errors.UnsupportedError(
                f"{self._group!r} has a qcow2 image, which only mirror mode takes: --mode mirror"
            )
        other = [disk.name for disk in definition.disks if disk.front != "nbd"]
        if other:
            raise errors.InvalidError(
                f"disk {other[0]!r} is served over another front-end than NBD, which is what a "
                "running VM can switch to"
            )
        with contextlib.closing(open_monitor(vm)) as monitor:
            check_runs(monitor)
            graph, record = Graph.read(monitor), self._record()
            if record is not None and any(_on_filter(disk, graph) for disk in record.disks):
                if not dry_run:
                    self._hold_again()
                return Result(record.vm, record.disks, (), dry_run)
            if record is not None:
                graph = self._cleaned(monitor, graph, record, dry_run)
            disks = self._plan(definition, graph)
            steps = [s for d in disks for s in recipe.prepare(d, self._socket, reconnect_s)]
            switch = recipe.switch(disks, on=True)
            commands = (*(step.do for step in steps), switch)
            if dry_run:
                return Result(vm, disks, commands, True)
            self._begin_handover()
            try:
                self._file.store(Attachment(VERSION, vm, disks))
                # From here on a filter that starts serves the group, if nobody else has its disks.
                self._groups.update(self._group, detached=False)
                took = self._switch_over(monitor, disks, steps, switch)
            except errors.VrepError as error:
                self._after_failure(monitor, disks, error)
                if definition.detached and self._file.load() is None:
                    self._groups.update(self._group, detached=True)
                raise
            self._wait("", "the VM switched, and waits until nobody holds its image's locks")
            return Result(vm, disks, commands, False, took)

    def _plan(self, definition: GroupDefinition, graph: Graph) -> tuple[DiskPlan, ...]:
        tag = definition.group_id[:8]
        return tuple(
            recipe.plan(
                graph, tag, disk.index, disk.name, Path(disk.uri.partition(":")[2]), disk.bytes
            )
            for disk in definition.disks
        )

    def _record(self) -> Attachment | None:
        record = self._file.load()
        if record is not None and record.mode == "mirror":
            raise errors.StateError(f"{self._group!r} is mirrored by {record.vm}: detach it first")
        return record

    def _hold_again(self) -> None:
        """The filter has the locks, also when a detach that was cut off had it let go of them."""
        with contextlib.suppress(errors.UnreachableError):
            if self._status()["handover"] in ("letting-go", "out"):
                self._wait("out", "the filter lets go of its locks")
                self._filter.call("take_back", group=self._group)
        self._wait("", "the VM is attached, and the filter takes its disks")

    def _begin_handover(self) -> None:
        """Also behind a detach that was cut off when the VM had its disks already."""
        with contextlib.suppress(errors.VrepError):  # it is not served: as it should be
            if self._status()["handover"] == "out":
                self._wait("past", "the filter sees that the VM has its disks")
        self._filter.call("handover_begin", group=self._group)

    def _cleaned(self, monitor: Monitor, graph: Graph, record: Attachment, dry_run: bool) -> Graph:
        """The graph without what an attach or detach that was cut off left there."""
        commands = [c for disk in record.disks for c in recipe.remove(disk, graph)]
        if not commands:
            return graph
        if dry_run:
            raise errors.StateError(
                f"an attach or detach was cut off: 'vrep detach {self._group}' cleans up after it"
            )
        for command in commands:
            _run(monitor, command)
        return Graph.read(monitor)

    def _switch_over(
        self,
        monitor: Monitor,
        disks: Sequence[DiskPlan],
        steps: Sequence[Step],
        switch: Command,
    ) -> float:
        done: list[Step] = []
        try:
            for step in steps:
                _run(monitor, step.do)
                done.append(step)
            self._check_sizes(Graph.read(monitor), disks)
            begun = time.monotonic()
            _run(monitor, switch)
            return round((time.monotonic() - begun) * 1000, 3)
        except (errors.HypervisorError, errors.StateError):
            for step in reversed(done):  # refused: nothing was switched
                for command in step.undo:
                    _run(monitor, command)
            raise

    @staticmethod
    def _check_sizes(graph: Graph, disks: Sequence[DiskPlan]) -> None:
        for disk in disks:
            served, had = graph.nodes[disk.nbd].bytes, graph.nodes[disk.below].bytes
            if served != had:
                raise errors.StateError(
                    f"disk {disk.name!r}: the filter serves {served} bytes, the VM has {had}"
                )

    def _after_failure(
        self, monitor: Monitor, disks: Sequence[DiskPlan], error: errors.VrepError
    ) -> None:
        """Nothing is left behind, if the VM is where it was for certain."""
        try:
            graph = Graph.read(monitor)
            places = {recipe.stands_on(disk, graph) for disk in disks}
        except errors.VrepError:
            places = {"neither"}
        if isinstance(error, errors.HypervisorError | errors.StateError) and places == {"image"}:
            for disk in disks:
                for command in recipe.remove(disk, graph):
                    _run(monitor, command)
            self._filter.call("handover_cancel", group=self._group)
            self._file.forget()
            return
        error.detail += (
            f"; whether the VM switched is not known: look at it, then 'vrep detach {self._group}'"
        )

    # ---- detach --------------------------------------------------------------------

    def detach(self, *, dry_run: bool = False) -> Result:
        """Put the VM's disks back as they were, and serve the group no more. What is recorded
        until then stays; what the VM writes from then on is not replicated."""
        record = self._file.load()
        if record is None:
            return self._detach_off("", dry_run)
        try:
            monitor = open_monitor(record.vm)
        except (errors.UnreachableError, errors.NotFoundError):
            if self._clients():
                raise
            return self._detach_off(record.vm, dry_run)
        with contextlib.closing(monitor):
            graph = Graph.read(monitor)
            places = {recipe.stands_on(disk, graph) for disk in record.disks}
            if places not in ({"filter"}, {"image"}):
                return self._detach_restarted(record, dry_run)
            commands: list[Command] = []
            took = 0.0
            if places == {"filter"}:
                commands.append(recipe.switch(record.disks, on=False))
                if not dry_run:
                    took = self._switch_back(monitor, commands[0])
            if dry_run:
                commands += [c for disk in record.disks for c in recipe.remove_all(disk)]
                return Result(record.vm, record.disks, tuple(commands), True)
            graph = Graph.read(monitor)
            for command in [c for disk in record.disks for c in recipe.remove(disk, graph)]:
                _run(monitor, command)
                commands.append(command)
        self._close_group()
        return Result(record.vm, record.disks, tuple(commands), False, took)

    def _switch_back(self, monitor: Monitor, switch: Command) -> float:
        if self._status()["handover"] == "in":
            raise errors.StateError(f"{self._group!r} is being attached")
        if self._status()["handover"] == "":  # else an earlier detach came so far
            self._filter.call("let_go", group=self._group)
        self._wait("out", "the filter lets go of its locks")
        begun = time.monotonic()
        try:
            _run(monitor, switch)
        except errors.HypervisorError:  # refused: the VM stays on the filter
            self._filter.call("take_back", group=self._group)
            raise
        took = round((time.monotonic() - begun) * 1000, 3)
        self._wait("past", "the VM takes its disks")
        return took

    def _close_group(self) -> None:
        """The group is served no more, once its target knows where the history ends, if it can
        be told soon."""
        wait_durable(self._filter, self._group)
        self._groups.update(self._group, detached=True)
        self._filter.call("release", group=self._group)
        self._file.forget()

    def _detach_restarted(self, record: Attachment, dry_run: bool) -> Result:
        if self._clients():
            raise errors.StateError(
                f"{record.vm} was started again since it was attached, and uses the filter's "
                "socket: stop it, and start it on its own disks"
            )
        return self._detach_off(record.vm, dry_run)

    def _detach_off(self, vm: str, dry_run: bool) -> Result:
        """For a VM that is off: the filter lets go of the disks."""
        if self._clients():
            raise errors.StateError(
                f"a VM uses {self._group!r}, and was not attached by 'vrep attach': stop it first"
            )
        if not dry_run:
            self._groups.update(self._group, detached=True)
            with contextlib.suppress(errors.UnreachableError):
                self._filter.call("release", group=self._group)
            self._file.forget()
        return Result(vm, (), (), dry_run)

    # ---- the filter, and the record ---------------------------------------------------

    def _status(self) -> Any:
        return self._filter.call("status", group=self._group)

    def _clients(self) -> int:
        try:
            return int(self._filter.call("status").get(self._group, {}).get("clients", 0))
        except errors.UnreachableError:
            return 0

    def _wait(self, handover: str, what: str) -> None:
        """Also for a filter that is being started again."""
        deadline = time.monotonic() + SWITCH_S
        while True:
            try:
                if self._status()["handover"] == handover:
                    return
                problem = ""
            except errors.VrepError as error:
                problem = f": {error}"
            if time.monotonic() > deadline:
                raise errors.TimeLimitError(f"{what}: not within {SWITCH_S:g} s{problem}")
            time.sleep(ASK_EVERY_S)


def wait_durable(filter_control: ControlClient, group: str) -> None:
    """Until the target has all of a group's history, if that is soon."""
    with contextlib.suppress(errors.VrepError):
        deadline = time.monotonic() + DURABLE_S
        while time.monotonic() < deadline:
            status = filter_control.call("status", group=group)
            if status["durable"] >= status["head"] or not status["consumers"]:
                break
            time.sleep(ASK_EVERY_S)


def check_runs(monitor: Monitor) -> None:
    """StateError: it is about to end, or to move away."""
    status = str(monitor.execute("query-status")["status"])
    if status not in RUNNING:
        raise errors.StateError(f"the VM is {status}: it is attached while it runs or is paused")


def _on_filter(disk: DiskPlan, graph: Graph) -> bool:
    return recipe.stands_on(disk, graph) == "filter"


def _run(monitor: Monitor, command: Command) -> None:
    monitor.execute(command.execute, command.arguments)


__all__ = ["Attacher", "Result", "check_runs", "wait_durable"]
