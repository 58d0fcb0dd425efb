"""What looks at a recovered disk from outside: e2fsck, and a command of the user's.

Both get a view: a writable disk that is thrown away. e2fsck first does what a mount after a crash
does (``-p``: replay the journal, free what was deleted while open), then checks everything
(``-f -n``); more than that to repair is a failure. It reads a file, so the view's NBD export is
mounted as one with nbdfuse; where that cannot be done the check is skipped, and says why.

ext2, ext3 and ext4 are found at the start of a disk or of a primary partition (GPT, MBR, sectors of
512 bytes). Offsets and sizes are bytes, times seconds.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vrep.recovery.verdict import CHECKS_MAX, TEXT_LETTERS_MAX, Check
from vrep.recovery.view import ViewDisk, ViewInfo

__all__ = ["FileSystem", "find_file_systems", "run_command", "run_e2fsck"]

Read = Callable[[int, int], bytes]
"""(offset, length): bytes of a disk"""

SECTOR: Final = 512
PARTITIONS_MAX: Final = 128
MOUNT_S: Final = 30.0
_GPT_ENTRY_BYTES: Final = range(128, 4097)
_EXPECTED: Final = re.compile(
    r"recovering journal$"
    r"|Clearing orphaned inode"
    r"|Setting free (inodes|blocks) count to "
    r"|: clean, "
    r"|^e2fsck "
)


@dataclass(frozen=True)
class FileSystem:
    """An ext file system on a disk."""

    disk: str
    offset: int
    label: str
    """the disk, or disk and number of the partition"""


# ---- finding them -----------------------------------------------------------------------------


def find_file_systems(disk: str, size: int, read: Read) -> list[FileSystem]:
    """The ext file systems of a disk."""
    if _is_ext(read, 0, size):
        return [FileSystem(disk, 0, disk)]
    return [
        FileSystem(disk, offset, f"{disk}:{number}")
        for number, offset in _partitions(size, read)
        if _is_ext(read, offset, size)
    ]


def _is_ext(read: Read, offset: int, size: int) -> bool:
    return offset + 2048 <= size and read(offset + 1024 + 56, 2) == b"\x53\xef"


def _partitions(size: int, read: Read) -> Iterator[tuple[int, int]]:
    """Number and offset of each partition."""
    if size < 2 * SECTOR:
        return
    first = read(0, SECTOR)
    if first[510:] != b"\x55\xaa":
        return
    entries = [first[446 + 16 * i : 462 + 16 * i] for i in range(4)]
    if any(entry[4] == 0xEE for entry in entries):
        yield from _gpt(size, read)
        return
    for number, entry in enumerate(entries, 1):
        start = struct.unpack_from("<I", entry, 8)[0] * SECTOR
        if entry[4] and start:
            yield number, start


def _gpt(size: int, read: Read) -> Iterator[tuple[int, int]]:
    head = read(SECTOR, SECTOR)
    if head[:8] != b"EFI PART":
        return
    at, count, each = struct.unpack_from("<QII", head, 72)
    if each not in _GPT_ENTRY_BYTES:
        return
    for number in range(min(count, PARTITIONS_MAX)):
        place = at * SECTOR + number * each
        if place + each > size:
            return
        entry = read(place, each)
        start = struct.unpack_from("<Q", entry, 32)[0] * SECTOR
        if any(entry[:16]) and start:
            yield number + 1, start


# ---- programs ---------------------------------------------------------------------------------


def _run(
    command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit status (None: the time limit passed) and output. Nothing of it is left running."""
    process = subprocess.Popen(
        command,
        env={**os.environ, "LC_ALL": "C", **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _none = process.communicate(timeout=limit_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        _kill_session(process)
        return None, process.communicate()[0]
    except BaseException:
        _kill_session(process)
        process.wait()
        raise


def _kill_session(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_words(output: str) -> str:
    lines = ["".join(c for c in line if c.isprintable()) for line in output.splitlines()]
    return "; ".join(line for line in lines if line.strip())[-TEXT_LETTERS_MAX:]


class _NotMountedError(Exception):
    """A view cannot be had as a file."""


@contextlib.contextmanager
def _mounted(disk: ViewDisk) -> Iterator[Path]:
    """A disk of a view as a file."""
    program = shutil.which("nbdfuse")
    if program is None:
        raise _NotMountedError("nbdfuse (package libnbd-bin) is missing")
    command = [program, "MOUNT", disk.uri]
    setpriv = shutil.which("setpriv")
    if setpriv is not None:
        command = [setpriv, "--pdeathsig", "TERM", *command]  # it never outlives this process
    with tempfile.TemporaryDirectory(prefix="vrep-verify-") as directory:
        path = Path(directory) / "disk"
        path.touch(0o600)
        command[command.index("MOUNT")] = str(path)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            _wait_mounted(process, path, disk.bytes)
            yield path
        finally:
            _unmount(process, path)


def _wait_mounted(process: subprocess.Popen[str], path: Path, size: int) -> None:
    deadline = time.monotonic() + MOUNT_S
    device = path.parent.stat().st_dev
    while True:
        status = path.stat()
        if status.st_dev != device and status.st_size == size:
            return
        if process.poll() is not None:
            assert process.stderr is not None
            raise _NotMountedError(f"nbdfuse: {_last_words(process.stderr.read())}")
        if time.monotonic() > deadline:
            raise _NotMountedError(f"nbdfuse did not mount within {MOUNT_S:g} s")
        time.sleep(0.02)


def _unmount(process: subprocess.Popen[str], path: Path) -> None:
    process.terminate()
    try:
        process.communicate(timeout=MOUNT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    if f" {path} " in Path("/proc/self/mounts").read_text():
        for command in (["fusermount3", "-u", "-z"], ["umount", "--lazy"]):
            if shutil.which(command[0]) is not None:
                subprocess.run([*command, str(path)], capture_output=True, check=False)


def run_e2fsck(view: ViewInfo, found: Sequence[FileSystem], limit_s: float) -> list[Check]:
    """Check every file system that was found on the disks of a view."""
    if shutil.which("e2fsck") is None:
        return [
            Check("e2fsck", each.label, "skipped", "e2fsck (package e2fsprogs) is missing")
            for each in found
        ]
    checks: list[Check] = []
    for disk in view.disks:
        here = [each for each in found if each.disk == disk.name]
        if not here:
            continue
        try:
            with _mounted(disk) as path:
                checks += [_e2fsck(each, path, limit_s) for each in here]
        except _NotMountedError as error:
            checks += [Check("e2fsck", each.label, "skipped", str(error)) for each in here]
    return checks[:CHECKS_MAX]


def _e2fsck(each: FileSystem, path: Path, limit_s: float) -> Check:
    where = f"{path}?offset={each.offset}" if each.offset else str(path)
    status, replay = _run(["e2fsck", "-p", where], limit_s)
    replay = replay.replace(where, each.label)
    if status is None:
        return Check("e2fsck", each.label, "bad", f"it did not end within {limit_s:g} s")
    # 1 says that something was changed, which a replay is.
    repairs = [line for line in replay.splitlines() if line.strip() and not _EXPECTED.search(line)]
    if status > 1 or repairs:
        text = _last_words("\n".join(repairs) or replay)
        return Check(
            "e2fsck", each.label, "bad", f"after a crash it needs more than a mount: {text}"
        )
    status, output = _run(["e2fsck", "-f", "-n", where], limit_s)
    output = output.replace(where, each.label)
    if status is None:
        return Check("e2fsck", each.label, "bad", f"it did not end within {limit_s:g} s")
    if status:
        return Check("e2fsck", each.label, "bad", f"exit status {status}: {_last_words(output)}")
    return Check("e2fsck", each.label, "good", _last_words(output.splitlines()[-1]))


def run_command(view: ViewInfo, command: str, limit_s: float) -> Check:
    """Run a command of the user's with the shell. It finds the group in VREP_GROUP, the point in
    VREP_POINT, the names of the disks in VREP_DISKS, and the NBD address of each in
    VREP_URI_<NAME> (capitals, and _ for what is no letter or digit)."""
    environment = {
        "VREP_GROUP": view.group,
        "VREP_POINT": view.point,
        "VREP_TIME": view.time,
        "VREP_DISKS": " ".join(disk.name for disk in view.disks),
    }
    for disk in view.disks:
        environment[f"VREP_URI_{re.sub('[^A-Z0-9]', '_', disk.name.upper())}"] = disk.uri
    status, output = _run(["/bin/sh", "-c", command], limit_s, environment)
    text = _last_words(output)
    if status is None:
        return Check("command", "", "bad", f"it did not end within {limit_s:g} s: {text}")
    if status:
        return Check("command", "", "bad", f"exit status {status}: {text}")
    return Check("command", "", "good", text)
