"""Images that the filter reads through their VM: QEMU's NBD server, on a socket of ours.

QEMU has one NBD server. It is begun on a socket that is made here and passed to it open, so who
answers on that socket's name is the QEMU that has it, until it ends. A server that somebody else
began is left alone, and the VM is refused. Times in seconds.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vrep import errors
from vrep.groups import GroupDefinition
from vrep.hypervisor import mirror
from vrep.hypervisor.mirror import MirrorPlan
from vrep.hypervisor.monitor import Monitor
from vrep.hypervisor.recipe import Command

if TYPE_CHECKING:
    from vrep._core.filter import Disk

END_S: Final = 10.0
ASK_EVERY_S: Final = 0.02
ANSWER_S: Final = 2.0
FILE: Final = "vrep-images"
"""the name of the socket in QEMU's monitor"""


def image_socket(nbd_socket: Path) -> Path:
    """The socket by which a group's images are read, beside that of its copies."""
    return nbd_socket.with_name(f"image-{nbd_socket.name.removeprefix('nbd-')}")


def rest_socket(nbd_socket: Path) -> Path:
    """Where the images of a VM that is off are read; the socket above leads to it then."""
    return nbd_socket.with_name(f"rest-{nbd_socket.name.removeprefix('nbd-')}")


def read_through_vm(
    definition: GroupDefinition, disks: Sequence[Disk], nbd_socket: Path
) -> list[Disk]:
    """A group's disks as the filter opens them: of a qcow2 image, what its VM exports."""
    where, tag = image_socket(nbd_socket), definition.group_id[:8]
    return [
        disk._replace(uri=f"nbd:{mirror.export_name(tag, index)}:{where}")
        if disk.uri.startswith("qcow2:")
        else disk
        for index, disk in enumerate(disks)
    ]


class Images:
    """Those of one group in one VM; none, when its disks are read from their files. `monitor` is
    the caller's."""

    def __init__(self, monitor: Monitor, disks: tuple[MirrorPlan, ...], nbd_socket: Path) -> None:
        self._monitor = monitor
        self._disks = tuple(disk for disk in disks if disk.image)
        self._path = image_socket(nbd_socket)

    def commands(self) -> tuple[Command, ...]:
        """What `serve` does to a VM in which nothing was done yet."""
        exports = [mirror.export(disk) for disk in self._disks]
        return (mirror.listen(FILE), *exports) if exports else ()

    def exports(self) -> set[str]:
        """Names of those that are served now."""
        found = self._monitor.execute("query-block-exports") if self._disks else []
        return {str(one["id"]) for one in found} & {disk.export for disk in self._disks}

    def serve(self) -> None:
        """Whatever was before. UnsupportedError: the VM's NBD server is another's."""
        there = self.exports()
        if self._disks and not self._answers():
            self._listen()
        for disk in self._disks:
            if disk.export not in there:
                self._do(mirror.export(disk))

    def end(self) -> None:
        """The VM is as it was before."""
        if not self._disks:
            return
        ours = self._answers()
        for disk in self._disks:
            if disk.export in self.exports():
                self._do(mirror.unexport(disk))
        deadline = time.monotonic() + END_S
        while self.exports():
            if time.monotonic() > deadline:
                raise errors.TimeLimitError("the VM's exports do not end")
            time.sleep(ASK_EVERY_S)
        if ours:
            self._do(Command("nbd-server-stop", {}))
        self._path.unlink(missing_ok=True)

    def _answers(self) -> bool:
        if self._path.is_symlink():  # it was off
            return False
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as asked:
            asked.settimeout(ANSWER_S)
            try:
                asked.connect(str(self._path))
            except OSError:
                return False
        return True

    def _listen(self) -> None:
        self._path.unlink(missing_ok=True)
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
            listening.bind(str(self._path))
            self._path.chmod(0o600)
            listening.listen()
            self._monitor.pass_file(FILE, listening.fileno())
            try:
                self._do(mirror.listen(FILE))
            except errors.HypervisorError as error:
                self._path.unlink(missing_ok=True)
                with contextlib.suppress(errors.HypervisorError):  # it was taken all the same
                    self._do(Command("closefd", {"fdname": FILE}))
                raise errors.UnsupportedError(
                    "a qcow2 image is read through its VM's NBD server, which is used already, by "
                    f"another group or somebody else: {error}"
                ) from None

    def _do(self, command: Command) -> None:
        self._monitor.execute(command.execute, command.arguments)


__all__ = ["Images", "image_socket", "read_through_vm", "rest_socket"]
