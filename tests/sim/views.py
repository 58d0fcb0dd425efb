"""Views: disks as they were at a point, served by the process that ships, on a simulated machine.

`ViewProcess` stands in the place of the one of `vrep.recovery.view`: what it starts is the code of
`vrep.recovery.process`, over a native group with overlays that is stepped as that of a source is.
`Views` are those of one host: its keeper starts again what died, as `vrep run` does.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from disks import SECTOR_BYTES, lose_sectors
from kernel import Kernel, Process, Task, Violation
from sites import FLUSH, FUA, Gate

from vrep._core import layout
from vrep._core.filter_driver import GroupDriver
from vrep.errors import GoneError, VrepError
from vrep.recovery import process as view_process
from vrep.recovery.keeper import ViewKeeper
from vrep.recovery.view import (
    PROTECTED,
    START_S,
    ViewDirectory,
    ViewInfo,
    failure,
    view_directories,
)

if TYPE_CHECKING:
    from hosts import Host
    from oracle import Oracle

KEEP_S: Final = 2.0
READ_BYTES: Final = 32 << 10
READ_S: Final = 60.0
LIVE_BOOT_AT: Final = layout.PRESENCE_HEADER.fields["boot_id"][1]


class ViewFiles(NamedTuple):
    """Of one disk of a view."""

    data: Path
    presence: Path
    live: Path

    @classmethod
    def of(cls, disk: Any) -> ViewFiles:
        overlay = disk.uri.removeprefix("view:")
        data = Path(disk.onto.partition(":")[2] if disk.onto else overlay)
        return cls(data, Path(f"{overlay}.presence"), Path(f"{overlay}.live"))

    def read(self) -> tuple[bytes, bytes]:
        return self.data.read_bytes(), self.presence.read_bytes()


class ViewMachine:
    """The process of one view: to a guest it is what a source site is."""

    def __init__(self, views: Views, view_id: str, process: Process) -> None:
        self._views, self._id = views, view_id
        self.kernel = views.kernel
        self.process = process
        self.group: SimViewGroup | None = None
        self.gate: Gate | None = None
        self.attached = True
        self.kicks: list[Task] = []
        self.misses: list[Task] = []
        self.files: list[ViewFiles] = []
        process.at_kill.append(self._killed)

    @property
    def oracle(self) -> Any:
        """That of the guest."""
        return self._views.guest

    def open_group(self, disks: Any, **options: Any) -> SimViewGroup:
        now = (self.kernel.now_ns, self.kernel.now_ns + self.kernel.wall_ahead_ns)
        self.group = SimViewGroup(disks, **options, stepped=now)
        self.group.machine = self
        self.files = [ViewFiles.of(disk) for disk in disks]
        for files in self.files:
            self._views.stored.setdefault(files, files.read())  # creation syncs
        self._views.machines[self._id] = self
        self.kernel.spawn(self.process, self._run, "view:turns")
        return self.group

    def open_gate(self, group: Any, **_options: Any) -> Gate:
        self.gate = Gate(self, group)
        return self.gate

    def _killed(self) -> None:
        group, self.group, self.gate = self.group, None, None
        if group is not None:
            group.kill()

    def synced(self, disk: int) -> None:
        files = self.files[disk]
        self._views.stored[files] = files.read()

    def closed(self) -> None:
        """In good order: all is synced."""
        for files in self.files:
            self._views.stored[files] = files.read()

    def kick(self) -> None:
        self.kernel.wake_all(self.kicks)

    def _run(self) -> None:
        while self.group is not None:
            self.kernel.block(self.kicks, self._turn(self.group))

    def _turn(self, group: SimViewGroup) -> float:
        kernel = self.kernel
        steps = group.steps()
        for _ in range(min(len(steps), 1 + kernel.rng.randrange(4))):
            self.process.burn()
            self.step(group, kernel.rng.randrange(len(steps)))
            steps = group.steps()
        group.set_time(kernel.now_ns, kernel.now_ns + kernel.wall_ahead_ns)
        group.poll()
        kernel.wake_all(self.misses)
        self._views.after_turn()
        busy = steps or self.oracle.flights
        return kernel.rng.random() * (0.002 if busy else 0.2)

    def step(self, group: SimViewGroup, index: int, *, torn: bool = False) -> None:
        """One thing that the group waits for is done; `torn`: its presence is not synced any
        more."""
        step = group.steps()[index]
        group.step(index)
        if step.kind != "disk" or not (step.op == FLUSH or step.flags & FUA):
            return
        files = self.files[step.disk]
        data, presence = files.read()
        self._views.stored[files] = (data, self._views.stored[files][1] if torn else presence)

    def step_some(self) -> None:
        """What was under way when the power was lost: some of it is done."""
        rng = self.kernel.rng
        for _ in range(rng.randrange(4)):
            group = self.group
            steps = group.steps() if group is not None else []
            if group is None or not steps:
                return
            self.step(group, rng.randrange(len(steps)), torn=True)

    def ask(self, op: Any, disk: int, offset: int, length: int, data: bytes = b"") -> Any:
        """A command, and its result; GoneError when the process ends first."""
        group = self.group
        if group is None or self.gate is None or not self.gate.open:
            raise GoneError("the view is not served")
        pending = group.submit(op, disk, offset, length, data=data or None)
        self.kick()
        done = self.kernel.wait_until(
            lambda: pending.done or self.group is not group, READ_S, look_s=0.01
        )
        if not done:
            raise Violation(f"5: a {op} of a view is not answered")
        if self.group is not group:
            raise GoneError("the view is not served any more")
        return group.result(pending)

    def content(self, disk: int) -> bytes:
        """All of a disk, read through the view."""
        assert self.group is not None
        size = self.group.disks[disk][1]
        parts = [
            self.ask("read", disk, at, min(READ_BYTES, size - at))
            for at in range(0, size, READ_BYTES)
        ]
        return b"".join(parts)


class SimViewGroup(GroupDriver):
    """A group whose misses are waited for in simulated time."""

    machine: ViewMachine

    def misses(self, most: int = 64, timeout: float | None = None) -> Any:
        kernel = self.machine.kernel
        while True:
            found = super().misses(most, 0)
            if found:
                return found
            if timeout is not None or kernel.current is None:
                return []
            kernel.block(self.machine.misses, 0.05)

    def sync_disk(self, disk: int) -> None:
        """What was filled is stored, and which blocks are there."""
        super().sync_disk(disk)
        self.machine.synced(disk)

    def close(self, clean: bool = True) -> None:
        super().close(clean)
        if self.machine.group is self:
            self.machine.group = None
        if clean:
            self.machine.closed()


class Views:
    """Of one host."""

    def __init__(
        self, host: Host, oracle: Oracle, door: Callable[[Process], None] = lambda _p: None
    ) -> None:
        """`oracle` is told what their processes do; `door` lets one open the host's store."""
        self.host = host
        self.kernel: Kernel = host.kernel
        self.oracle = oracle
        self.guest: Any = types.SimpleNamespace(flights=[])
        """the oracle of the guest that uses one"""
        self.after_turn: Callable[[], None] = lambda: None
        self._door = door
        self._kept = False
        self.stored: dict[ViewFiles, tuple[bytes, bytes]] = {}
        """data and presence of each disk as they were synced last"""
        self.machines: dict[str, ViewMachine] = {}
        self.problems: list[str] = []

    def keep(self) -> None:
        """Start again what died, from now on."""
        if self._kept:
            return
        self._kept = True
        process = self.process("keeper")

        def run() -> None:
            keeper = ViewKeeper(self.host.paths, lambda: self.kernel.now_ns / 1e9)
            while True:
                self.kernel.sleep(KEEP_S)
                for problem in keeper.tend():
                    self.kernel.note(problem)

        self.kernel.spawn(process, run, "keeper")

    def keep_again(self) -> None:
        """The site starts once more; its keeper does if it ran."""
        if self._kept:
            self._kept = False
            self.keep()

    def step_some(self) -> None:
        for machine in list(self.machines.values()):
            if not machine.process.dead:
                machine.step_some()

    def lose_power(self) -> bool:
        """Of what views wrote and did not sync, all is there or not; whether any is not. Their
        processes are dead. What belongs to a group now is not theirs any more: it was synced."""
        rng, lost = self.kernel.rng, False
        theirs = view_directories(self.host.paths)
        kept = {view.root for view in theirs if view.load().state != PROTECTED}
        for files, (data, presence) in list(self.stored.items()):
            if files.presence.parent not in kept:
                del self.stored[files]
                continue
            lost |= lose_sectors(files.presence, presence, rng, SECTOR_BYTES)
            lost |= lose_sectors(files.data, data, rng, SECTOR_BYTES)
            self.stored[files] = files.read()
            with files.live.open("r+b") as live:  # another boot has another id
                live.seek(LIVE_BOOT_AT)
                live.write(rng.randbytes(8))
        return lost

    def process(self, name: str) -> Process:
        """A process of this host that may begin views."""
        process = self.host.process(name, self.oracle)
        process.names["ViewProcess"] = lambda _paths: ViewProcess(self, process)
        self._door(process)
        return process

    def start(self, request: dict[str, str], answers: list[bytes]) -> Process:
        process = self.process("view")
        machine = ViewMachine(self, request["view"], process)
        process.names |= {
            "Group": machine.open_group,
            "Server": machine.open_gate,
            "report": lambda answer: answers.append(json.dumps(answer).encode()),
        }
        paths = self.host.paths

        def run() -> None:
            view_process.serve(paths, request)
            self.kernel.kill(process)

        self.kernel.spawn(process, run, "view")
        return process


class ViewProcess:
    """In the place of `vrep.recovery.view.ViewProcess`."""

    def __init__(self, views: Views, starter: Process) -> None:
        self._views = views
        starter.burn()

    def start(
        self, view: ViewDirectory, group: str, at: str, *, kind: str, since: str | None
    ) -> ViewInfo:
        request = {"view": view.id, "group": group, "at": at, "kind": kind}
        if since is not None:
            request["since"] = since
        return self._ask(view, request)

    def serve(self, view: ViewDirectory) -> ViewInfo:
        return self._ask(view, {"view": view.id})

    def _ask(self, view: ViewDirectory, request: dict[str, str]) -> ViewInfo:
        answers: list[bytes] = []
        process = self._views.start(request, answers)
        kernel = self._views.kernel
        came = kernel.wait_until(lambda: answers or process.dead, START_S, look_s=0.01)
        line = answers[0] if answers else b"" if came else None
        if line and "view" in (found := json.loads(line)):
            return msgspec.convert(found["view"], ViewInfo)
        raise failure(view, line, START_S)

    def cancel(self) -> None:
        """It is not needed."""


__all__ = ["ViewMachine", "Views", "VrepError"]
