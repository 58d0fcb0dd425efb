"""The store's input and output: every call through which bytes reach a disk.

`Files` does it for real. Tests pass one that forgets what was not synced, or that
fails: the promise "durable means durable" is only worth what it is under those.
Sizes and offsets are bytes. Safe from any thread; a descriptor has one writer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from vrep._core.staged import write_staged
from vrep.durable import sync_directory
from vrep.memory import large_pages

__all__ = ["Buffer", "Files", "is_full"]

Buffer = bytes | bytearray | memoryview

_IOV_MAX: Final = 1024
_PAGE_BYTES: Final = 4096
_READ_BYTES: Final = 8 << 20
_DIRECT_BYTES_MIN: Final = 256 << 10
_STAGING_BYTES: Final = 2 << 20
_STAGING_KEPT: Final = 4

# Page-aligned memory that waits for its next use: O_DIRECT needs it, and new memory is slower.
_staging: deque[mmap.mmap] = deque(maxlen=_STAGING_KEPT)


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

    def append(self, fd: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all buffers, back to back, at the end of a file. The whole pages of a large
        write go past the page cache (O_DIRECT), where the filesystem takes that: nobody here
        reads them again soon, and new pages cost more than the write itself."""
        views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        end = offset + sum(len(view) for view in views)
        start = -(-offset // _PAGE_BYTES) * _PAGE_BYTES
        stop = end // _PAGE_BYTES * _PAGE_BYTES
        if stop - start < _DIRECT_BYTES_MIN:
            self.write(fd, views, offset)
            return
        head, rest = _cut(views, start - offset)
        body, tail = _cut(rest, stop - start)
        self.write(fd, head, offset)
        self.write_direct(fd, body, start)
        self.write(fd, tail, stop)

    def write_direct(self, fd: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Write whole pages, back to back, past the page cache if that can be."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.write(fd, buffers, offset)
            return
        try:
            with _staging_room() as room:
                written, code = write_staged(fd, buffers, offset, room)
            if code == errno.EINVAL:  # pages are not whole blocks of this device
                fcntl.fcntl(fd, fcntl.F_SETFL, flags)
                Files.write(self, fd, _cut(buffers, written)[1], offset + written)
            elif code:
                raise OSError(code, os.strerror(code))
        finally:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags)

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


def _cut(views: Sequence[memoryview], size: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `size` bytes, and the rest."""
    for number, view in enumerate(views):
        if size < len(view):
            first = [*views[:number], view[:size]] if size else list(views[:number])
            return first, [view[size:], *views[number + 1 :]]
        size -= len(view)
    return list(views), []


@contextlib.contextmanager
def _staging_room() -> Iterator[mmap.mmap]:
    try:
        room = _staging.pop()  # not asked first: another thread may take the last one meanwhile
    except IndexError:
        room = large_pages(_STAGING_BYTES)
    try:
        yield room
    finally:
        _staging.append(room)


class _Part:
    def __init__(self, view: memoryview, start: int, end: int) -> None:
        self.view = view[start:end]

    def close(self) -> None:
        self.view.release()
