"""Files that forget: what a power loss may leave of everything that was not synced.

The store runs on real files. Beside them this layer keeps what the storage holds for sure
(content as of each file's last sync, names as of the directory's last sync) and what it may
hold besides. `crash` writes a directory that a power loss at that moment could have left: any
subset of the unsynced writes, in any order, each perhaps torn, any subset of the names.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vrep.target.files import Buffer, Files

SECTOR_BYTES = 512


@dataclass
class Content:
    """One file: bytes that are stored, and changes that may or may not be."""

    stored: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)
    """(offset, bytes), or (size, None) for a change of the size"""

    def apply(self, offset: int, data: bytes | None) -> None:
        if data is None:
            del self.stored[offset:]
            self.stored.extend(bytes(offset - len(self.stored)))
            return
        if offset > len(self.stored):
            self.stored.extend(bytes(offset - len(self.stored)))
        self.stored[offset : offset + len(data)] = data


@dataclass
class Memory:
    """What the storage holds, and what it may hold."""

    contents: dict[int, Content] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    """stored names"""
    pending: list[tuple[str, int | None]] = field(default_factory=list)
    """names that were given (to a file) or taken away (None), not synced"""

    def crash(self, directory: Path, rng: random.Random) -> dict[str, bytearray]:
        """Write a directory that a power loss could have left; what each file of it holds."""
        directory.mkdir(parents=True)
        names = dict(self.names)
        for name, number in self.pending:
            if rng.random() < 0.5:
                if number is None:
                    names.pop(name, None)
                else:
                    names[name] = number
        left: dict[str, bytearray] = {}
        for name, number in names.items():
            content = Content(
                bytearray(self.contents[number].stored), self.contents[number].pending
            )
            changes = [change for change in content.pending if rng.random() < 0.6]
            if rng.random() < 0.5:
                rng.shuffle(changes)
            for offset, data in changes:
                content.apply(offset, tear(data, rng))
            with open(f"{directory}/{name}", "wb", buffering=0) as file:  # noqa: PTH123 - thousands
                file.write(content.stored)
            left[name] = content.stored
        return left


def tear(data: bytes | None, rng: random.Random) -> bytes | None:
    """Half of the time, only the first sectors of a write."""
    if data is None or rng.random() < 0.5:
        return data
    return data[: rng.randrange(0, len(data) + 1) // SECTOR_BYTES * SECTOR_BYTES]


class ForgettingFiles(Files):
    """Real files, with a memory of what was synced. `before` is called, under the lock,
    before every change, with the memory as it is: tests take crashes there."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.before: Callable[[str, Memory], None] = lambda _what, _memory: None
        self.room = 1 << 40
        self.sync_error: OSError | None = None
        self.syncs = 0
        self._lock = threading.RLock()
        self._files: dict[int, int] = {}
        self._current: dict[str, int] = {}

    def _step(self, what: str) -> None:
        self.before(what, self.memory)

    def create(self, path: Path) -> int:
        with self._lock:
            self._step("create")
            fd = super().create(path)
            number = len(self.memory.contents)
            self.memory.contents[number] = Content()
            self._files[fd] = number
            self._current[path.name] = number
            self.memory.pending.append((path.name, number))
            return fd

    def open(self, path: Path) -> int:
        with self._lock:
            fd = super().open(path)
            number = self._current.get(path.name)
            if number is None:
                number = len(self.memory.contents)
                self.memory.contents[number] = Content(bytearray(path.read_bytes()))
                self._current[path.name] = self.memory.names[path.name] = number
            self._files[fd] = number
            return fd

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        data = b"".join(buffers)
        with self._lock:
            self._step("write")
            allowed = data[: max(0, self.room)]
            super().write(fd, [allowed], offset)
            self.room -= len(allowed)
            self.memory.contents[self._files[fd]].pending.append((offset, allowed))
            if len(allowed) < len(data):
                raise OSError(errno.ENOSPC, "No space left on device")

    def write_direct(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        # A device may lose, tear and reorder it as any other write before the sync.
        self.write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        with self._lock:
            self._step("sync")
            self.syncs += 1
            if self.sync_error is not None:
                # Reported once, as the kernel does: the next sync would succeed.
                error, self.sync_error = self.sync_error, None
                raise error
            super().sync(fd)
            # Native code (the merge of runs) writes beside this layer, so what a sync makes
            # durable is read back rather than replayed.
            content = self.memory.contents[self._files[fd]]
            content.stored = bytearray(os.pread(fd, os.fstat(fd).st_size, 0))
            content.pending.clear()

    def truncate(self, fd: int, size: int) -> None:
        with self._lock:
            self._step("truncate")
            super().truncate(fd, size)
            self.memory.contents[self._files[fd]].pending.append((size, None))

    def sync_directory(self, path: Path) -> None:
        with self._lock:
            self._step("sync directory")
            super().sync_directory(path)
            for name, number in self.memory.pending:
                if number is None:
                    self.memory.names.pop(name, None)
                else:
                    self.memory.names[name] = number
            self.memory.pending.clear()

    def link(self, old: Path, new: Path) -> None:
        with self._lock:
            self._step("link")
            super().link(old, new)
            self._current[new.name] = self._current[old.name]
            self.memory.pending.append((new.name, self._current[new.name]))

    def unlink(self, path: Path) -> None:
        with self._lock:
            self._step("unlink")
            super().unlink(path)
            self._current.pop(path.name, None)
            self.memory.pending.append((path.name, None))

    def free_bytes(self, path: Path) -> int:
        return max(0, self.room)
