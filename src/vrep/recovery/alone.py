"""One verification at a time: the lock of those of a site, and what one that died has left.

A verification reads a whole history; two at once would only stand in each other's way. The lock is
one of the kernel, so it ends with its holder, however that ends. A view that a verification made
(kind `verify`) belongs to the holder: when nobody holds the lock, it is nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Final

from vrep.durable import make_private_directory
from vrep.errors import LockedError
from vrep.paths import SitePaths

__all__ = ["alone", "under_way"]

WAIT_S: Final = 0.5
"""who only looks whether the lock is held has it for a moment"""


@contextlib.contextmanager
def alone(paths: SitePaths, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold the lock. LockedError while another verification runs here."""
    fd = os.open(
        make_private_directory(paths.verdicts) / "lock",
        os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
        0o600,
    )
    try:
        deadline = time.monotonic() + wait_s
        while not _taken(fd):
            if time.monotonic() >= deadline:
                raise LockedError("another verification runs at this site")
            time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def _taken(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def under_way(paths: SitePaths) -> bool:
    """Whether a verification runs here now."""
    if not (paths.verdicts / "lock").exists():
        return False
    try:
        with alone(paths, wait_s=0.0):
            return False
    except LockedError:
        return True
