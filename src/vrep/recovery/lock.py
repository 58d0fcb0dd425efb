"""One command at a time: the lock of those that take a group over, or give it back.

Such a command looks whether a failover is under way, decides for a while, and writes down what it
decided. Two of them at once would each decide for a group that the other one changes. So each holds
the lock of its group from before its first look until it has ended. The lock is one of the kernel,
so it ends with its holder, however that ends. All lanes of a group share it.

Its file, ``locks/<first 14 bytes of the group's id>``, holds the number of the process that took it
last. It stays: who removed it would let two in.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import Final

from vrep.durable import make_private_directory
from vrep.errors import LockedError, StorageError
from vrep.paths import SitePaths

__all__ = ["group_lock"]

_NUMBER_BYTES: Final = 20


@contextlib.contextmanager
def group_lock(paths: SitePaths, group_id: bytes, name: str) -> Iterator[None]:
    """Hold the lock of a group, which is called `name`. LockedError, at once, while another
    command holds it, of this process or of another; StorageError when its file cannot be made."""
    path = paths.locks / group_id[:14].hex()
    try:
        make_private_directory(paths.locks)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, _NUMBER_BYTES, 0).decode("ascii", "replace").strip() or "?"
            raise LockedError(
                f"another command takes {name!r} over or gives it back (process {holder}): wait "
                "until it has ended"
            ) from None
        with contextlib.suppress(OSError):  # a full disk keeps nobody from recovering
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)
