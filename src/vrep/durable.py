"""Files that survive a power loss whole or not at all.

Everything small that vrep keeps (keys, peers, invitations, configuration of a
group) is written through this module: a reader sees the old content or the
new one, never a mixture, and when a call returns the content is on stable
storage.  Offsets and sizes are bytes.  Functions may be called from several
threads; two writers of one path race, and the later rename wins.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

__all__ = ["append_durable", "make_private_directory", "sync_directory", "write_atomic"]


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Make the names in a directory durable: a rename or a new file is only
    on stable storage after its directory was synced."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_private_directory(path: str | os.PathLike[str]) -> Path:
    """Create a directory that only its owner may enter (mode 0700), durably.

    Missing parents are created too.  An existing directory is left as it is.
    """
    directory = Path(path)
    missing: list[Path] = []
    at = directory
    while not at.exists():
        missing.append(at)
        at = at.parent
    for each in reversed(missing):
        try:
            each.mkdir(mode=0o700)
        except FileExistsError:
            continue  # made by somebody else since we looked: as good as ours
        sync_directory(each.parent)
    return directory


def _write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_atomic(
    path: str | os.PathLike[str],
    data: bytes | bytearray | memoryview,
    mode: int = 0o600,
    *,
    exclusive: bool = False,
) -> None:
    """Replace the content of `path` by `data`, all or nothing, durably.

    The data go to a new file in the same directory (created with `mode`, not
    with the umask's idea of it), are synced, and take the name in one step;
    then the directory is synced.  With `exclusive` an existing file is never
    replaced: FileExistsError is raised and the file is untouched, also when
    two processes try at once.
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}.tmp"
    fd = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        try:
            _write_all(fd, data)
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
        if exclusive:
            # A hard link fails when the name exists; rename would replace it.
            os.link(temporary, target)
            temporary.unlink()
        else:
            temporary.rename(target)
    except BaseException:
        # The name may be gone already (renamed or unlinked); nothing to undo then.
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(target.parent)


def append_durable(path: str | os.PathLike[str], data: bytes, mode: int = 0o600) -> None:
    """Append `data` to a log and sync it, creating the file when it is missing.

    One write call with O_APPEND: lines of two processes do not interleave.  A
    power loss may leave a part of the last append; readers must expect that.
    """
    fresh = not Path(path).exists()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        written = os.write(fd, data)
        if written != len(data):
            raise OSError(f"short append to {os.fspath(path)}: {written} of {len(data)} bytes")
        os.fsync(fd)
    finally:
        os.close(fd)
    if fresh:
        sync_directory(Path(path).parent)
