"""Disks: files that lose what was not synced when their machine loses its power.

They are real files in memory, so that code which maps or reads them is what ships; beside them
stands what a power loss would leave. The target's store runs on `StoreFiles`, through which all
of its writes go. A spill is written with calls of its module `os`, in whose place `SpillOs`
stands. A killed process loses nothing; what it was about to do is not done.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from kernel import Process, Task

from vrep.target.files import Buffer

SECTOR_BYTES: Final = 512


def _load_forgetting() -> Any:
    path = Path(__file__).resolve().parents[1] / "crash" / "forgetting.py"
    spec = importlib.util.spec_from_file_location("forgetting", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["forgetting"] = module
    spec.loader.exec_module(module)
    return module


forgetting = _load_forgetting()


def _same(fd: int, wanted: tuple[int, int]) -> bool:
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == wanted


class Descriptors:
    """Those that a process holds: closed when it is killed, as the kernel does. Nobody tells when
    it closes one itself: its number, and with some luck its inode, may be another process's by
    then."""

    _owners: ClassVar[dict[int, Descriptors]] = {}
    """by number: who opened it last"""

    def __init__(self, process: Process) -> None:
        self._open: dict[int, tuple[int, int]] = {}
        process.at_kill.append(self.close)

    def add(self, fd: int) -> int:
        found = os.fstat(fd)
        self._open[fd] = (found.st_dev, found.st_ino)
        self._owners[fd] = self
        return fd

    def close(self) -> None:
        for fd, wanted in self._open.items():
            if self._owners.get(fd) is self and _same(fd, wanted):
                os.close(fd)
        self._open.clear()


class StoreDisk:
    """What the storage holds of a store's directory, and what it may hold: a process that is
    killed, and the next one, sync nothing of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.memory = forgetting.Memory()
        self.current: dict[str, int] = {}
        """which file has a name now"""
        self._known: tuple[int, int] | None = None

    def look(self) -> None:
        """Another directory than before is all stored."""
        if not self.directory.is_dir():
            self._known = None
            return
        found = self.directory.stat()
        if (found.st_dev, found.st_ino) == self._known:
            return
        self._remember(
            {
                path.name: bytearray(path.read_bytes())
                for path in self.directory.glob("*")
                if path.is_file() and path.name != "lock"
            }
        )

    def _remember(self, stored: dict[str, bytearray]) -> None:
        """All that is there is stored."""
        found = self.directory.stat()
        self._known = (found.st_dev, found.st_ino)
        self.memory = forgetting.Memory()
        self.current = {}
        for number, name in enumerate(sorted(stored)):
            self.memory.contents[number] = forgetting.Content(stored[name])
            self.memory.names[name] = self.current[name] = number

    def settle(self) -> None:
        """In time all is stored that was written."""
        self._known = None
        self.look()

    @property
    def busy(self) -> bool:
        """Whether something is written and not synced."""
        return any(content.pending for content in self.memory.contents.values())

    def lose_power(self, rng: random.Random) -> bool:
        """Leave of the directory what its storage holds; whether a write was torn or lost. Who had
        it open is dead."""
        if not self.directory.is_dir():
            return False
        self.look()
        lost = self.busy or bool(self.memory.pending)
        after = self.directory.with_name(self.directory.name + ".after")
        left = self.memory.crash(after, rng)
        shutil.rmtree(self.directory)
        after.rename(self.directory)
        self.directory.chmod(0o700)
        self._remember(left)
        return lost


class StoreFiles(forgetting.ForgettingFiles):  # type: ignore[misc]
    """The files of a target's store. Every call is an event, at which its process may be killed or
    another thread go on."""

    def __init__(self, process: Process, disk: StoreDisk) -> None:
        super().__init__()
        self._process = process
        self._kernel = process.kernel
        self._descriptors = Descriptors(process)
        self.dirty: list[Task] = []
        """who waits until something is not synced"""
        disk.look()
        self.memory, self._current = disk.memory, disk.current
        if disk.busy or disk.memory.pending:
            self._kernel.event("unsynced after a kill")

    def _operation(self, what: str) -> None:
        self._process.burn()
        self._kernel.event(what)
        self._kernel.maybe()

    def create(self, path: Path) -> int:
        self._operation("create")
        return self._descriptors.add(super().create(path))

    def open(self, path: Path) -> int:
        self._operation("open")
        return self._descriptors.add(super().open(path))

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        self._operation("write")
        super().write(fd, buffers, offset)
        self._kernel.wake_all(self.dirty)

    def sync(self, fd: int) -> None:
        self._operation("sync")
        if self._kernel.current is not None:
            self._kernel.sleep(self._kernel.rng.random() * 0.003)
        if self.sync_error is not None:
            self._kernel.event("failed sync")
        super().sync(fd)

    def truncate(self, fd: int, size: int) -> None:
        self._operation("truncate")
        super().truncate(fd, size)

    def sync_directory(self, path: Path) -> None:
        self._operation("sync directory")
        super().sync_directory(path)

    def link(self, old: Path, new: Path) -> None:
        self._operation("link")
        super().link(old, new)

    def unlink(self, path: Path) -> None:
        self._operation("unlink")
        super().unlink(path)

    def forget(self, _fd: int) -> None:
        """The page cache keeps what it likes."""


class SpillOs:
    """In the place of the module os, for the spill of one process."""

    def __init__(self, process: Process, machine: SpillDisk) -> None:
        self._process = process
        self._kernel = process.kernel
        self._machine = machine
        self._descriptors = Descriptors(process)
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _operation(self, what: str) -> None:
        self._process.burn()
        self._kernel.event(what)
        self._kernel.maybe()

    def _require_room(self) -> None:
        if self._machine.full:
            self._kernel.event("no room at a source")
            raise OSError(errno.ENOSPC, "No space left on device")

    def statvfs(self, path: Any) -> Any:
        """It says so before a write fails, or somebody else was faster."""
        if self._machine.full and self._kernel.rng.random() < 0.5:
            return types.SimpleNamespace(f_bavail=0, f_frsize=4096)
        return os.statvfs(path)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        self._process.burn()
        if flags & os.O_CREAT:
            self._require_room()
        fd = self._descriptors.add(os.open(path, flags, mode))
        self._paths[fd] = str(path)
        return fd

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        self._operation("write")
        whole = bytes(data)
        count = len(whole)
        if offset + count > os.fstat(fd).st_size:
            self._require_room()
        if count > SECTOR_BYTES and self._kernel.rng.random() < 0.1:
            count = self._kernel.rng.randrange(1, count)  # a short write
        before = os.pread(fd, count, offset)
        size = os.fstat(fd).st_size
        written = os.pwrite(fd, whole[:count], offset)
        self._machine.wrote(self._paths[fd], offset, before, size)
        return written

    def fdatasync(self, fd: int) -> None:
        self._operation("sync")
        if self._kernel.rng.random() < self._machine.fail_syncs:
            self._kernel.event("failed sync")
            raise OSError(errno.EIO, "Input/output error")
        os.fdatasync(fd)
        self._machine.synced(self._paths[fd])

    def ftruncate(self, fd: int, size: int) -> None:
        self._operation("truncate")
        os.ftruncate(fd, size)


class SpillDisk:
    """What of a source's spill is not synced: it outlives the processes, not the power."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.fail_syncs = 0.0
        self.full = False
        self._pending: dict[str, list[tuple[int, bytes, int]]] = {}

    def wrote(self, path: str, offset: int, before: bytes, size: int) -> None:
        self._pending.setdefault(path, []).append((offset, before, size))

    def synced(self, path: str) -> None:
        self._pending.pop(path, None)

    def lose_power(self) -> bool:
        """Lose or tear what was not synced; whether there was any."""
        lost = False
        for path, writes in self._pending.items():
            if not Path(path).exists():
                continue
            fd = os.open(path, os.O_RDWR)
            try:
                for offset, before, size in reversed(writes):
                    if self._rng.random() < 0.5:
                        continue
                    lost = True
                    if len(before) < SECTOR_BYTES or self._rng.random() < 0.5:
                        os.pwrite(fd, before, offset)
                        os.ftruncate(fd, max(size, offset))
                    else:  # its first sectors stayed
                        kept = self._rng.randrange(len(before)) // SECTOR_BYTES * SECTOR_BYTES
                        os.pwrite(fd, before[kept:], offset + kept)
            finally:
                os.close(fd)
        self._pending.clear()
        return lost


def whole(path: Path) -> bytes:
    """What a file holds. `Path.read_bytes` says the same in twice the time, a hundred times in a
    world."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def lose_sectors(path: Path, stable: bytes, rng: random.Random, block_bytes: int) -> bool:
    """Give back, here and there, what a file held when it was synced last."""
    lost = False
    with path.open("r+b") as file:
        now = file.read()
        for at in range(0, len(now), block_bytes):
            end = at + block_bytes
            if now[at:end] != stable[at:end] and rng.random() < 0.5:
                lost = True
                file.seek(at)
                file.write(stable[at:end])
    return lost
