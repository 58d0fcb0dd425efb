"""A VM that mirrors its writes to the filter: begun, begun again, settled, ended.

The filter knows when a connection closed, and not what was written meanwhile; QEMU's bitmaps know
that, as long as that QEMU runs. So whatever ended a mirror, beginning it again marks what a bitmap
says, and nothing else is copied. When a bitmap is missing or cannot be read (a QEMU that was
started anew), everything is.

The order of `begin` is what makes it right. The jobs run; then the VM's writes are drained: each
one that began before a job took note of it has ended, and stands in a bitmap; each later one is
sent. Then the bitmaps are read, and marked; then the filter may copy.

`settle` is the barrier before a gap ends (see the filter's mirror.c), and lets older bitmaps go: a
new one is added, the writes are drained, and if no connection closed until then, each write that
only the older one has was sent. Times in seconds.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import structlog

from vrep import errors
from vrep.control import ControlClient
from vrep.hypervisor import mirror
from vrep.hypervisor.images import Images
from vrep.hypervisor.mirror import MirrorPlan
from vrep.hypervisor.monitor import Monitor
from vrep.hypervisor.recipe import Command

DRAIN_S: Final = 2.0
"""a VM whose writes are drained stands still: no longer than this"""
READY_S: Final = 10.0
ASK_EVERY_S: Final = 0.02
TOOL_S: Final = 120.0
RANGES_MAX: Final = 1000
"""in one message to the filter"""

log = structlog.get_logger("vrep.hypervisor")


class Mirrored:
    """The disks of one group in one VM. `monitor` is the caller's."""

    def __init__(
        self,
        monitor: Monitor,
        filter_control: ControlClient,
        group: str,
        disks: tuple[MirrorPlan, ...],
        socket: Path,
    ) -> None:
        self._monitor = monitor
        self._filter = filter_control
        self._group = group
        self._disks = disks
        self._socket = socket
        self._images = Images(monitor, disks, socket)

    # ---- what there is -------------------------------------------------------------

    def jobs(self) -> dict[str, dict[str, Any]]:
        """The jobs of these disks that run, by their names."""
        ours = {disk.job for disk in self._disks}
        found = self._monitor.execute("query-block-jobs")
        return {job["device"]: job for job in found if job["device"] in ours}

    def bitmaps(self) -> dict[str, list[str]]:
        """Names of each disk's bitmaps, oldest first, by the disks' names."""
        nodes = self._monitor.execute("query-named-block-nodes")
        return {disk.name: mirror.bitmaps_of(disk, nodes) for disk in self._disks}

    def exports(self) -> set[str]:
        """Names of the images that the filter reads through the VM."""
        return self._images.exports()

    def failures(self) -> int:
        """Commands that failed at the VM's images: nothing of such a one is sent."""
        devices = {disk.device for disk in self._disks}
        nodes = {disk.node for disk in self._disks}
        return sum(
            int(entry["stats"]["failed_wr_operations"])
            + int(entry["stats"]["failed_flush_operations"])
            for entry in self._monitor.execute("query-blockstats")
            if entry.get("qdev") in devices or entry.get("node-name") in nodes
        )

    # ---- begin ---------------------------------------------------------------------

    def commands(self) -> tuple[Command, ...]:
        """What `begin` does to a VM in which nothing was done yet."""
        bitmaps = [mirror.add_bitmap(disk, 0) for disk in self._disks]
        jobs = [mirror.start(disk, self._socket) for disk in self._disks]
        return (*bitmaps, *self._images.commands(), *jobs)

    def begin(self) -> bool:
        """Mirror from here on, whatever was before. False: the bitmaps do not tell all of what the
        filter does not have, and everything is copied."""
        self.stop_jobs()
        had = self.bitmaps()
        proven = all(had.values())
        if not proven:
            # Before there is a bitmap: who begins again after this was cut off finds one.
            self._filter.call("mirror_distrust", group=self._group)
        for disk in self._disks:
            if not had[disk.name]:
                self._do(mirror.add_bitmap(disk, 0))
        self._images.serve()
        for disk in self._disks:
            self._do(mirror.start(disk, self._socket))
        self._wait_ready()
        if not self._drain():
            raise errors.TimeLimitError("the filter does not answer the VM, and was let go of")
        if proven and not self.mark():
            proven = False
            self._filter.call("mirror_distrust", group=self._group)
        self._filter.call("mirror_live", group=self._group)
        return proven

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            jobs = self.jobs()
            missing = [disk.name for disk in self._disks if disk.job not in jobs]
            if missing:
                raise errors.HypervisorError(f"the mirror of {', '.join(missing)} ended at once")
            if all(job["ready"] for job in jobs.values()):
                return
            if time.monotonic() > deadline:
                raise errors.TimeLimitError("the VM's mirror jobs do not become ready")
            time.sleep(ASK_EVERY_S)

    def mark(self) -> bool:
        """What the oldest bitmap of a disk has (no other has more) may not have been sent. False:
        one cannot be read."""
        names = self.bitmaps()
        for disk in self._disks:
            try:
                ranges = self._read(disk, names[disk.name][0])
            except (errors.HypervisorError, IndexError) as error:
                log.warning("a bitmap cannot be read", group=self._group, error=str(error))
                return False
            for at in range(0, len(ranges), RANGES_MAX):
                some = ranges[at : at + RANGES_MAX]
                self._filter.call("mirror_mark", group=self._group, disk=disk.index, ranges=some)
        return True

    def _read(self, disk: MirrorPlan, bitmap: str) -> list[list[int]]:
        """(offset, length) of what a bitmap has. HypervisorError: it cannot be read.

        QEMU stores it in an image that is made for it, beside the socket that QEMU reaches anyway:
        nothing else gives a bitmap's content out but QEMU's NBD server, which may be another's, and
        which ends QEMU 7.2 when a disk works in an I/O thread."""
        self._remove_reader(disk)
        nodes = self._monitor.execute("query-named-block-nodes")
        size = next(n["image"]["virtual-size"] for n in nodes if n["node-name"] == disk.node)
        with tempfile.TemporaryDirectory(prefix="bitmap-", dir=self._socket.parent) as directory:
            Path(directory).chmod(0o711)  # QEMU may be another user
            image = Path(directory) / "image"
            _tool("qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size))
            image.chmod(0o666)
            try:
                for command in mirror.read(disk, bitmap, image):
                    self._monitor.execute(command.execute, command.arguments)
            finally:
                self._remove_reader(disk)
            return _dirty(image, Path(directory) / "n")

    def _remove_reader(self, disk: MirrorPlan) -> None:
        nodes = self._monitor.execute("query-named-block-nodes")
        if any(node["node-name"] == disk.reader for node in nodes):
            self._monitor.execute("blockdev-del", {"node-name": disk.reader})

    # ---- settle --------------------------------------------------------------------

    def settle(self) -> bool:
        """A barrier. False: the mirror was interrupted, and what is marked stays."""
        status = self._filter.call("status", group=self._group)
        if status["handover"] != "":
            return False
        had = self.bitmaps()
        for disk in self._disks:
            for name in had[disk.name][1:]:  # of a barrier that did not come about
                self._do(mirror.remove_bitmap(disk, name))
            last = had[disk.name][-1] if had[disk.name] else f"{disk.bitmaps}0"
            self._do(mirror.add_bitmap(disk, int(last.removeprefix(disk.bitmaps)) + 1))
        if not self._drain() or self.jobs().keys() != {disk.job for disk in self._disks}:
            return False
        try:
            self._filter.call(
                "mirror_barrier", group=self._group, copies=int(status["mirror_copies"])
            )
        except errors.GoneError:
            return False
        after = self._filter.call("status", group=self._group)
        if after["mirror_losses"] != status["mirror_losses"]:
            return False
        for disk in self._disks:
            for name in had[disk.name][:1]:
                self._do(mirror.remove_bitmap(disk, name))
        return True

    # ---- end -----------------------------------------------------------------------

    def end(self) -> None:
        """The VM is as it was before."""
        self.stop_jobs(orderly=True)
        names = self.bitmaps()
        for disk in self._disks:
            for name in names[disk.name]:
                self._do(mirror.remove_bitmap(disk, name))
            self._remove_reader(disk)
        self._images.end()

    def stop_jobs(self, *, orderly: bool = False) -> None:
        """No job of these disks runs any more."""
        if orderly and self.jobs():
            self._cancel(force=False)
            if self._gone(DRAIN_S):
                return
        self.cut()
        self._cancel(force=True)
        if not self._gone(READY_S):
            raise errors.TimeLimitError("the VM's mirror jobs do not end")

    def _cancel(self, *, force: bool) -> None:
        running = self.jobs()
        for disk in self._disks:
            if disk.job in running:
                with contextlib.suppress(errors.HypervisorError):  # it ended meanwhile
                    self._do(mirror.stop(disk, force=force))

    def _gone(self, limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while self.jobs():
            if time.monotonic() > deadline:
                return False
            time.sleep(ASK_EVERY_S)
        return True

    def cut(self) -> None:
        """End the jobs' connections: what the VM writes is not sent, and it goes on."""
        instances = self._instances()
        if instances:
            with contextlib.suppress(errors.HypervisorError):  # one ended meanwhile
                self._monitor.execute("yank", {"instances": instances})

    def _instances(self) -> list[dict[str, str]]:
        ours = {disk.nbd for disk in self._disks}
        return [
            {"type": "block-node", "node-name": str(instance["node-name"])}
            for instance in self._monitor.execute("query-yank")
            if instance.get("node-name") in ours
        ]

    def _drain(self) -> bool:
        """Everything that the VM had sent to its disks has ended, its copies too. False: a server
        did not answer, and its connection was cut. An empty transaction drains all disks."""
        self._filter.call("status", group=self._group, timeout=DRAIN_S)  # or nobody would answer
        rescue = ("yank", {"instances": self._instances()})
        return self._monitor.guarded("transaction", {"actions": []}, DRAIN_S, rescue)

    def _do(self, command: Command) -> None:
        self._monitor.execute(command.execute, command.arguments)


def _tool(*command: str) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, timeout=TOOL_S, check=True).stdout
    except subprocess.CalledProcessError as error:
        text = error.stderr.decode(errors="replace").strip()
        raise errors.HypervisorError(f"{command[0]}: {text}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise errors.HypervisorError(f"{command[0]}: {error}") from None


def _dirty(image: Path, socket: Path) -> list[list[int]]:
    """What the bitmap that is stored in an image has."""
    server = ["qemu-nbd", "-r", "-f", "qcow2", "-B", mirror.STORED, "-k", str(socket), "--fork"]
    _tool(*server, str(image))  # it ends with its first client
    options = {
        "driver": "nbd",
        "server": {"type": "unix", "path": str(socket)},
        "x-dirty-bitmap": f"qemu:dirty-bitmap:{mirror.STORED}",
    }
    answer = _tool("qemu-img", "map", "--output=json", f"json:{json.dumps(options)}")
    try:
        # Its `data` is false where a bit is set: the context stands in for "allocated".
        return [[int(e["start"]), int(e["length"])] for e in json.loads(answer) if not e["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise errors.HypervisorError(f"qemu-img map of a bitmap: {error}") from None


__all__ = ["Mirrored"]
