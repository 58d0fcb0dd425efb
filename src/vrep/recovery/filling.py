"""Filling: the blocks of a view's disks that are not there yet, made or put right.

A disk that a view makes is fetched whole. One that is filled in place, as the old disk of a group
that returns, has most of what it is to hold: what of it is proven right (`vrep.recovery.compare`)
is neither fetched nor written. A unit is right only if it was compared here, in this process, on
this disk, while its lock is held: no map or file of an earlier time says so. What was fetched is
compared byte by byte, and written where the disk differs.

A unit stays what it was when it was compared until its block becomes present: whatever is written
to an absent block either makes it present or was fetched as well. And it is stable then: what the
cache held when the disk was opened is synced and dropped, so that what is compared came from the
medium or was written since; and the view's file has a block only behind a sync of the disk.

Sizes and offsets are bytes. Any number of threads may use one disk at once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from vrep.recovery.compare import Comparer, Runs, runs_of, units_of
from vrep.recovery.fetch import Fetcher

__all__ = ["Anew", "FillCount", "InPlace"]

log = logging.getLogger("vrep.recovery")


@dataclass
class FillCount:
    """What filling a disk in place cost, since its process began; bytes."""

    right_bytes: int = 0
    """proven, and neither fetched nor written"""
    fetched_bytes: int = 0
    written_bytes: int = 0

    @classmethod
    def sum(cls, counts: Iterable[FillCount]) -> FillCount:
        total = cls()
        for count in counts:
            total.right_bytes += count.right_bytes
            total.fetched_bytes += count.fetched_bytes
            total.written_bytes += count.written_bytes
        return total

    def plain(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Found:
    """A range of which it is known what must be fetched."""

    held: bytearray | None
    """what the disk holds there; None when it could not be read"""
    runs: Runs
    extents: list[Any]
    """of each run: what `Fetcher.find` found"""


class Anew:
    """A disk that a view makes: all of it is fetched."""

    def __init__(self, disk: int, fetcher: Fetcher) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._lock = threading.Lock()
        self.count = FillCount()

    def find(self, offset: int, length: int) -> Any:
        """What must be fetched of a range; the store's disk begins to read it."""
        return self._fetcher.find(self._disk, offset, length)

    def open(self, offset: int, length: int, found: Any) -> tuple[bytearray | None, Runs | None]:
        """The bytes of a range, None where it is zero; and what of it is to be written: all."""
        data = self._fetcher.open(self._disk, offset, length, found)
        with self._lock:
            self.count.fetched_bytes += 0 if data is None else length
            self.count.written_bytes += length
        return data, None

    def close(self) -> None:
        """Nothing is held."""


class InPlace:
    """A disk that is filled in place. Whoever makes this holds its lock: nobody else writes it."""

    def __init__(self, disk: int, uri: str, fetcher: Fetcher, comparer: Comparer) -> None:
        """`uri` is of a file or block device. Where it cannot be read or synced, all is fetched."""
        self._disk = disk
        self._fetcher = fetcher
        self._comparer = comparer
        self._lock = threading.Lock()
        self.count = FillCount()
        path = uri.partition(":")[2]
        self._fd = -1
        fd = -1
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            # After a write that failed the cache may hold what the medium does not.
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            log.warning("%s is not compared: %s", path, error.strerror or error)
            if fd >= 0:
                os.close(fd)
        else:
            self._fd = fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def find(self, offset: int, length: int) -> Found:
        """What must be fetched of a range; the store's disk begins to read it."""
        held = self._read(offset, length)
        runs = [(offset, length)]
        if held is not None:
            runs = self._comparer.differing(self._disk, offset, held)
        return Found(held, runs, [self._fetcher.find(self._disk, *run) for run in runs])

    def _read(self, offset: int, length: int) -> bytearray | None:
        held = bytearray(length)
        try:
            count = os.preadv(self._fd, [held], offset) if self._fd >= 0 else 0
        except OSError:
            return None  # it is written anew
        return held if count == length else None

    def open(self, offset: int, length: int, found: Found) -> tuple[bytearray | None, Runs]:
        """The bytes of a range, None where all that is written is zero; and which parts of it are
        to be written."""
        fetched = [
            self._fetcher.open(self._disk, *run, extents)
            for run, extents in zip(found.runs, found.extents, strict=True)
        ]
        asked = sum(size for _at, size in found.runs)
        if found.held is None:
            data, parts = fetched[0], found.runs
        else:
            data, parts = _merge(offset, found, fetched)
        with self._lock:
            self.count.right_bytes += length - asked
            self.count.fetched_bytes += sum(len(part) for part in fetched if part is not None)
            self.count.written_bytes += sum(size for _at, size in parts)
        return data, parts


def _merge(
    offset: int, found: Found, fetched: list[bytearray | None]
) -> tuple[bytearray | None, Runs]:
    """What was fetched put over what the disk holds, and where that changes it."""
    assert found.held is not None
    parts: Runs = []
    some = False
    for (at, size), part in zip(found.runs, fetched, strict=True):
        there = slice(at - offset, at - offset + size)
        new = bytes(size) if part is None else part
        wrong = (units_of(found.held[there]) != units_of(new)).any(axis=1)
        found.held[there] = new
        differing = runs_of(wrong, at, size)
        parts += differing
        some |= part is not None and bool(differing)
    return (found.held if some else None), parts
