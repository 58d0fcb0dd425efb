"""The right to change a store: its lock, its newest manifest, and how the next one is made.

Within a host the lock decides who writes. Beyond it the manifests do: each change creates
one under a name that must not exist, so of two writers one learns that it lost; and nothing
is acknowledged once somebody else's manifest is there.

Threads: any; `lock` is held over each change, and by callers that make several one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from vrep.errors import CorruptError, ExistsError, LockedError, StorageError, StoreFullError
from vrep.target.aging import Aging, Steady, host_steady
from vrep.target.files import Files, is_full
from vrep.target.manifest import (
    Manifest,
    load_newest,
    manifest_numbers,
    manifest_path,
    require_no_segments,
)

__all__ = ["Lease"]

_MANIFESTS_KEPT: Final = 2
_SPARE_BYTES: Final = 1 << 20


class Lease:
    """Held by the one process that writes a store."""

    def __init__(
        self,
        directory: Path,
        group_id: bytes,
        files: Files,
        wall_ns: Callable[[], int],
        steady: Callable[[], Steady] = host_steady,
    ) -> None:
        """LockedError when another process holds it."""
        self.directory = directory
        self.manifest: Manifest
        """the newest; immutable"""
        self.aging = Aging(steady)
        """what has passed for the store; that of the manifest once it is loaded"""
        self.lock = threading.RLock()
        self._group_id = group_id
        self._files = files
        self._wall_ns = wall_ns
        self._steady = steady
        self._fd = _take_lock(directory / "lock")

    def close(self) -> None:
        os.close(self._fd)

    def create(self, manifest: Manifest) -> None:
        """The first manifest of a store."""
        if manifest_numbers(self.directory):
            raise ExistsError(f"the store of group {self._group_id.hex()}")
        require_no_segments(self.directory)
        manifest = replace(manifest, count=self.aging.count())
        self._files.publish(manifest_path(self.directory, manifest.number), manifest.encode())

    def abandon(self) -> None:
        """Instead of `close`, of a store that was to be created: when it has no manifest, nothing
        was promised of it, and its directory goes."""
        if not manifest_numbers(self.directory):
            with contextlib.suppress(CorruptError):  # it holds what was promised before
                require_no_segments(self.directory)
                shutil.rmtree(self.directory, ignore_errors=True)
        self.close()

    def load(self) -> Manifest:
        """Read the newest manifest."""
        self.manifest = load_newest(self.directory, self._group_id)
        self.aging = Aging(self._steady, self.manifest.count)
        return self.manifest

    def publish(self, **changes: Any) -> None:
        """Create the next manifest, durably. LockedError when somebody else did."""
        with self.lock:
            count = self.aging.count()
            manifest = self.manifest.next(self._wall_ns(), count=count, **changes)
            path = manifest_path(self.directory, manifest.number)
            data = manifest.encode()
            try:
                self._publish(path, data)
            except FileExistsError:
                raise self._lost(path) from None
            except OSError as error:
                kind = StoreFullError if is_full(error) else StorageError
                raise kind(f"{path}: {error.strerror or error}") from None
            self.manifest = manifest
            for number in manifest_numbers(self.directory):
                if number <= manifest.number - _MANIFESTS_KEPT:
                    self._files.unlink(manifest_path(self.directory, number))

    def _publish(self, path: Path, data: bytes) -> None:
        try:
            self._files.publish(path, data)
        except OSError as error:
            if not is_full(error) or path.exists():
                raise
            # What was kept for this moment: a failover must not fail for want of a few KiB.
            self._files.unlink(self._spare)
            self._files.publish(path, data)

    def check(self) -> None:
        """LockedError once another process has taken the store over."""
        with self.lock:
            newer = manifest_path(self.directory, self.manifest.number + 1)
            if newer.exists():
                raise self._lost(newer)

    @staticmethod
    def _lost(path: Path) -> LockedError:
        return LockedError(f"{path.name} exists: another process took the store over")

    @property
    def _spare(self) -> Path:
        return self.directory / "spare"

    def keep_spare(self) -> None:
        """Keep room for a manifest on a disk that others may fill."""
        if self._spare.exists():
            return
        fd = self._files.create(self._spare)
        try:
            os.posix_fallocate(fd, 0, _SPARE_BYTES)
        except OSError as error:
            self._files.unlink(self._spare)
            if not is_full(error) and error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
        finally:
            os.close(fd)


def _take_lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise LockedError(f"{path.parent}: another process writes this store") from None
    return fd
