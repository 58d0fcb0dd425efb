"""The store's input and output: every call through which bytes reach a disk.

`Files` does it for real. Tests pass one that forgets what was not synced, or that
fails: the promise "durable means durable" is only worth what it is under those.
Sizes and offsets are bytes. Safe from any thread; a descriptor has one writer.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vrep.durable import sync_directory

__all__ = ["Buffer", "Files", "is_full"]

Buffer = bytes | bytearray | memoryview

_IOV_MAX: Final = 1024
_PAGE_BYTES: Final = 4096
_READ_BYTES: Final = 8 << 20


def is_full(error: OSError) -> bool:
    """Whether an error says that there is no room, rather than that the storage failed."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class Files:
    """The operating system's files."""

    def create(self, path: Path) -> int:
        """A new file, open for reading and writing. What had the name is removed: callers
        create only names that no manifest holds."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(path, flags, 0o600)
        except FileExistsError:
            path.unlink()
            return os.open(path, flags, 0o600)

    def open(self, path: Path) -> int:
        """An existing file, open for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def write(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all buffers, back to back."""
        rest = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        at = 0
        while at < len(rest):
            written = os.pwritev(fd, rest[at : at + _IOV_MAX], offset)
            offset += written
            while at < len(rest) and written >= len(rest[at]):
                written -= len(rest[at])
                at += 1
            if written:
                rest[at] = rest[at][written:]

    def sync(self, fd: int) -> None:
        """Content and size of a file are on stable storage when this returns."""
        os.fdatasync(fd)

    def forget(self, fd: int) -> None:
        """Let the page cache drop a file's synced bytes: nobody here reads them again, and
        pages that are used again and again are cheaper than ever new ones."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def sync_directory(self, path: Path) -> None:
        sync_directory(path)

    def publish(self, path: Path, data: bytes) -> None:
        """Create a file with this content, durably and as a whole. FileExistsError when
        the name is taken, also by another process at the same moment."""
        temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
        fd = self.create(temporary)
        try:
            try:
                self.write(fd, [data], 0)
                self.sync(fd)
            finally:
                os.close(fd)
            self.link(temporary, path)
        finally:
            self.unlink(temporary)
        self.sync_directory(path.parent)

    def link(self, old: Path, new: Path) -> None:
        os.link(old, new)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def free_bytes(self, path: Path) -> int:
        """Bytes that may still be written to the filesystem."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def read_stored(self, path: Path) -> memoryview:
        """A file's content as the storage holds it, not as memory remembers it: after a
        failed sync the page cache may show what never arrived. Read with O_DIRECT; where
        a filesystem refuses that (tmpfs, which has no other storage), its cache is dropped
        as far as it goes, and read."""
        size = path.stat().st_size
        room = mmap.mmap(-1, max(_PAGE_BYTES, -(-size // _PAGE_BYTES) * _PAGE_BYTES))
        view = memoryview(room)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            at = 0
            while at < size:
                with contextlib.closing(_Part(view, at, min(len(view), at + _READ_BYTES))) as part:
                    count = os.preadv(fd, [part.view], at)
                if count == 0:
                    raise OSError(errno.EIO, f"{path.name} became shorter while it was read")
                at += count
        finally:
            os.close(fd)
        return view[:size]


class _Part:
    def __init__(self, view: memoryview, start: int, end: int) -> None:
        self.view = view[start:end]

    def close(self) -> None:
        self.view.release()
