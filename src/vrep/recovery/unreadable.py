"""Files of a disk that is failing: what of them can be read.

A mapping of such a file ends the process with SIGBUS at the first sector that cannot be read. So a
repair reads, and never maps what it has not read before. Sizes are bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["read_sound", "require_readable"]

_STEP: Final = 1 << 20
_SECTOR: Final = 4096


def read_sound(path: Path) -> bytearray:
    """A file, with zeroes where it cannot be read: no checksum agrees with those. Empty when it is
    missing, or cannot be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return bytearray()
    try:
        data = bytearray(os.fstat(fd).st_size)
        for at in range(0, len(data), _STEP):
            part = min(_STEP, len(data) - at)
            if not _read(fd, data, at, part):
                for sector in range(at, at + part, _SECTOR):
                    _read(fd, data, sector, min(_SECTOR, len(data) - sector))
        return data
    finally:
        os.close(fd)


def _read(fd: int, data: bytearray, at: int, size: int) -> bool:
    """Whether these bytes could be read, all of them."""
    done = 0
    try:
        while done < size and (more := os.pread(fd, size - done, at + done)):
            data[at + done : at + done + len(more)] = more
            done += len(more)
    except OSError:
        return False
    return done == size


def require_readable(path: Path, begin: int = 0) -> None:
    """Read a file from a byte on; OSError when that fails. What a mapping needs is in memory
    then."""
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        room = bytearray(_STEP)
        while file.readinto(room):
            continue
