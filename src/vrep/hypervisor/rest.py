"""Rest: the disks of a VM that mirrors and is off are compared as they are (filter/rest.c).

The filter looks whether somebody has them open or writes them: the files themselves, block devices,
and every file that a qcow2 image consists of. What a guest would see of such an image is then read
by a `qemu-storage-daemon`, to be read only and without a lock that would be in the way of the VM.
What that has in its memory is right as long as nobody writes the image: it is begun when the image
was quiet, the filter looks again behind its begin, and all that it read is forgotten when the rest
ends.

The keeper's thread never waits for an image: a thread of each group's does. Times in seconds.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import IO, Any, Final

import structlog

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import DiskDefinition, GroupDefinition
from vrep.hypervisor import mirror
from vrep.hypervisor.images import image_socket, rest_socket

TOOL_S: Final = 60.0
START_S: Final = 3.0
FRESH_S: Final = 4.5
"""the filter finds quiet what nobody wrote for 5 s: so also since before the reader began"""
ASK_EVERY_S: Final = 0.02
READER: Final = "qemu-storage-daemon"

log = structlog.get_logger("vrep.keeper")


class Rest:
    """Of one group."""

    def __init__(
        self, filter_control: ControlClient, definition: GroupDefinition, nbd_socket: Path
    ) -> None:
        self._filter = filter_control
        self._definition = definition
        self._images = [d for d in definition.disks if d.uri.startswith("qcow2:")]
        self._socket = rest_socket(nbd_socket)
        self._link = image_socket(nbd_socket)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._error: errors.VrepError | None = None
        self._reader: subprocess.Popen[bytes] | None = None
        self._told: IO[bytes] | None = None
        """what it says when something is wrong"""
        self._serving = False
        self._ended = False

    def step(self) -> errors.VrepError | None:
        """The disks do not rest, or nothing reads them: try again, unless the last try is under
        way; why the last one did not succeed."""
        with self._lock:
            if self._serving:  # what it knows of the images may be old
                self._stop_reader()
            if self._ended or (self._thread is not None and self._thread.is_alive()):
                return self._error
            self._thread = threading.Thread(target=self._run, name="keeper:rest", daemon=True)
            self._thread.start()
            return self._error

    def reads(self) -> bool:
        """What has to run while the disks rest does."""
        return not self._images or (self._reader is not None and self._reader.poll() is None)

    def end(self) -> None:
        """Whatever is under way: nothing of it reads the images any more."""
        with self._lock:
            self._ended = True
            self._stop_reader()

    # ---- on its thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._try()
            self._error = None
            self._wait_reader()
        except errors.VrepError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 - told like any other reason
            self._error = errors.VrepError(repr(error))
        finally:
            if self._told is not None:
                self._told.close()
            self._told = None

    def _wait_reader(self) -> None:
        """Until it ends. It is killed with the thread that began it: none outlives the keeper."""
        one, told = self._reader, self._told
        if one is None or told is None:
            return
        self._serving = True
        text = told.read().decode(errors="replace").strip()
        self._serving = False
        if self._reader is one:
            log.warning("what reads a VM's images ended", why=text, group=self._definition.name)

    def _try(self) -> None:
        images = [part for disk in self._definition.disks for part in consists_of(disk)]
        if not self._images:
            self._look(images, begin=True)
            return
        if self._rests():  # its reader ended; the filter goes on looking
            self._start_reader()
            return
        self._look(images, begin=False)
        since = time.monotonic()
        self._start_reader()
        try:
            self._look(images, begin=True)
            if time.monotonic() - since > FRESH_S:
                self._filter.call("mirror_distrust", group=self._definition.name)
                raise errors.TimeLimitError(f"{READER} took too long to begin")
        except errors.VrepError:
            with self._lock:
                self._stop_reader()
            raise

    def _look(self, images: list[tuple[int, str]], *, begin: bool) -> None:
        self._filter.call("mirror_rest", group=self._definition.name, images=images, begin=begin)

    def _rests(self) -> bool:
        return bool(self._filter.call("status", group=self._definition.name)["mirror_rests"])

    def _start_reader(self) -> None:
        command = reader(self._definition, self._images, self._socket)
        with self._lock:
            if self._ended:
                raise errors.StateError("its VM is back")
            self._stop_reader()
            self._socket.unlink(missing_ok=True)
            try:
                self._reader = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            except OSError as error:
                raise errors.HypervisorError(f"{READER}: {error}") from None
            one, self._told = self._reader, self._reader.stderr
        deadline = time.monotonic() + START_S
        while not self._socket.is_socket():
            if one.poll() is not None:
                text = one.communicate()[1].decode(errors="replace").strip()
                raise errors.HypervisorError(f"{READER}: {text or 'it ended'}")
            if time.monotonic() > deadline:
                raise errors.TimeLimitError(f"{READER} does not begin to answer")
            time.sleep(ASK_EVERY_S)
        with self._lock:
            if self._ended or self._reader is not one:
                raise errors.StateError("its VM is back")
            self._link.unlink(missing_ok=True)
            self._link.symlink_to(self._socket.name)
        log.info("the images of a VM that is off are read", group=self._definition.name)

    def _stop_reader(self) -> None:
        """One that hangs in its storage ends when that answers; nobody reads from it."""
        one, self._reader = self._reader, None
        if self._link.is_symlink():
            self._link.unlink(missing_ok=True)
        if one is None:
            return
        self._socket.unlink(missing_ok=True)
        one.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.wait(1.0)


def consists_of(disk: DiskDefinition) -> list[tuple[int, str]]:
    """Every file that a disk is made of, with the disk's index. UnsupportedError: something else
    than files; StateError: it has another size than the group's disk."""
    scheme, _, where = disk.uri.partition(":")
    if scheme != "qcow2":
        return [(disk.index, where)]
    layers = _info(where)
    if int(layers[0]["virtual-size"]) != disk.bytes:
        raise errors.StateError(
            f"disk {disk.name!r} has {layers[0]['virtual-size']} bytes, and {disk.bytes} in the "
            "group"
        )
    found = []
    for layer in layers:
        specific = layer.get("format-specific", {}).get("data", {})
        file = Path(where).parent / str(layer["filename"])
        data = specific.get("data-file")
        for path in [file] if data is None else [file, file.parent / str(data)]:
            if not path.exists():
                raise errors.UnsupportedError(
                    f"disk {disk.name!r}: {where} stands on {path}, which is no file here"
                )
            found.append((disk.index, str(path)))
    return found


def _info(path: str) -> list[dict[str, Any]]:
    command = ["qemu-img", "info", "-U", "--backing-chain", "-f", "qcow2", "--output=json", path]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TOOL_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise errors.HypervisorError(f"qemu-img (package qemu-utils): {error}") from None
    if done.returncode:
        raise errors.HypervisorError(f"qemu-img: {done.stderr.decode(errors='replace').strip()}")
    try:
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found
    except ValueError as error:
        raise errors.HypervisorError(f"qemu-img info: {error}") from None


def reader(definition: GroupDefinition, images: list[DiskDefinition], socket: Path) -> list[str]:
    """The command that serves what a guest sees of the images, by the names of `image_socket`."""
    if shutil.which(READER) is None:
        raise errors.UnsupportedError(
            f"a qcow2 image of a VM that is off is read by {READER}, which is missing "
            "(package qemu-system-common)"
        )
    command = [READER, "--nbd-server", f"addr.type=unix,addr.path={socket}"]
    setpriv = shutil.which("setpriv")
    if setpriv is not None:
        command = [setpriv, "--pdeathsig", "KILL", *command]
    for disk in images:
        node = {
            "driver": "qcow2",
            "node-name": f"disk{disk.index}",
            "read-only": True,
            "force-share": True,  # no lock that the VM would find in its way
            "file": {"driver": "file", "filename": disk.uri.partition(":")[2]},
        }
        name = mirror.export_name(definition.group_id[:8], disk.index)
        export = {
            "type": "nbd",
            "id": name,
            "node-name": f"disk{disk.index}",
            "name": name,
            "writable": False,
        }
        command += ["--blockdev", json.dumps(node), "--export", json.dumps(export)]
    return command


__all__ = ["Rest", "consists_of", "reader"]
