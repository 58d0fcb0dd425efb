"""Spill: what the ring can keep no longer, sealed, on the source's own disk.

A spill is a row of segment files (format/segment.h), each one stream: a STREAM record,
then records in order, sealed as they are for a target, in commits that are each synced.
It holds one run of the order, all between `after` and `last`, and gives it back with `batch`,
open, so that it can be sealed again for the stream of the day. Files whose records are all
durable at the target are removed. A file that is damaged ends before the damage, and the spill
with it: the session that finds the hole makes it a gap.

Sizes are bytes. Threads: one appends, drops and cuts; any may read.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
from numpy.typing import NDArray

from vrep._core import layout, record
from vrep._core import segment as native
from vrep._core.seal import Opener, Sealer
from vrep.durable import make_private_directory, sync_directory
from vrep.errors import CorruptError, StorageError, StoreFullError, VrepError
from vrep.keys.datakey import DataKey

__all__ = ["Batch", "Spill", "SpillKeys", "is_spilled"]

SEGMENT_BYTES: Final = 64 << 20
HEADER_BYTES: Final = layout.SEGMENT_HEADER.itemsize
_NAME: Final = re.compile(r"spill-([0-9a-f]{8})")
_ASIDE: Final = (layout.KIND_STREAM, layout.KIND_TALLY)
_SEALED: Final = (layout.KIND_WRITE, layout.KIND_SYNC, layout.KIND_MARK, layout.KIND_OBJECT)
"""kinds with data of their own"""

log = structlog.get_logger("vrep.source")

Structs = NDArray[np.void]


class SpillKeys:
    """The data keys of a group, by generation; the newest seals."""

    def __init__(self, newest: DataKey, find: Callable[[int], DataKey]) -> None:
        self.newest = newest
        self._found = {newest.generation: newest}
        self._find = find

    def renew(self, newest: DataKey) -> None:
        self._found[newest.generation] = self.newest = newest

    def generation(self, number: int) -> DataKey:
        if number not in self._found:
            self._found[number] = self._find(number)
        return self._found[number]


@dataclass(frozen=True)
class Batch:
    """Records of one commit, open: RECORD structs, the data of those that have some, back to
    back, and where the data of each begin."""

    headers: Structs
    payload: memoryview
    starts: NDArray[np.uint64]

    @classmethod
    def empty(cls) -> Batch:
        return cls(np.zeros(0, layout.RECORD), memoryview(b""), np.zeros(0, np.uint64))


@dataclass
class _Commit:
    after: int
    last: int
    start: int
    end: int
    wall_ns: int


@dataclass
class _File:
    number: int
    path: Path
    after: int
    """the seq that its first record follows, but for a jump"""
    last: int = 0
    bytes: int = 0
    commits: list[_Commit] = field(default_factory=list)


class Spill:
    """The spill of one group, in a directory of its own."""

    def __init__(
        self,
        directory: Path,
        group_id: bytes,
        *,
        quota_bytes: int,
        reserve_bytes: int,
        segment_bytes: int = SEGMENT_BYTES,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        """Open it; what a crash left behind the last whole commit is cut. StorageError."""
        self.directory = directory
        self.group_id = group_id
        self.quota_bytes = quota_bytes
        self.reserve_bytes = reserve_bytes
        self._segment_bytes = segment_bytes
        self._free_bytes = free_bytes or _free_bytes
        self._files: list[_File] = []
        self._lock = threading.Lock()
        self._fd = -1
        self._sealer: Sealer | None = None
        self._next_number = 1
        try:
            self._load()
        except OSError as error:
            raise StorageError(f"{directory}: {error.strerror or error}") from None

    # ---- what it holds -----------------------------------------------------------

    @property
    def after(self) -> int:
        """The seq that its first record follows; 0 when empty."""
        with self._lock:
            return self._files[0].after if self._files else 0

    @property
    def last(self) -> int:
        """The seq of its last record; 0 when empty."""
        with self._lock:
            return self._files[-1].last if self._files else 0

    @property
    def bytes(self) -> int:
        """On disk."""
        with self._lock:
            return sum(file.bytes for file in self._files)

    def oldest_ns(self, after: int) -> int:
        """CLOCK_REALTIME of the oldest record that follows `after`, or of one little older; 0:
        none does."""
        with self._lock:
            place = self._find(after)
            return place[1].wall_ns if place else 0

    def _find(self, after: int) -> tuple[_File, _Commit] | None:
        for file in self._files:
            if file.last > after:
                for commit in file.commits:
                    if commit.last > after:
                        return file, commit
        return None

    # ---- opening -----------------------------------------------------------------

    def _load(self) -> None:
        make_private_directory(self.directory)
        found = sorted(
            (int(match[1], 16), path)
            for path in self.directory.iterdir()
            if (match := _NAME.fullmatch(path.name))
        )
        if found:
            self._next_number = found[-1][0] + 1
        whole = True
        for number, path in found:
            file = self._read_file(number, path) if whole else None
            if file is not None and self._files:
                before = self._files[-1]
                if file.after > before.last:
                    log.warning("spill is broken off", file=path.name, after=before.last)
                    file = None
                else:  # what stood above was cut, and this goes on from there
                    before.last = file.after
            if file is None:
                whole = whole and not self._files  # an empty file in front breaks nothing
                path.unlink()
                continue
            self._files.append(file)
        sync_directory(self.directory)

    def _read_file(self, number: int, path: Path) -> _File | None:
        """What is whole of a file, the rest cut off; None when that is nothing."""
        data = memoryview(path.read_bytes())
        try:
            result, commits = native.scan(data, self.group_id, number, commits=True)
            header = native.parse_header(data[:HEADER_BYTES])
        except VrepError as error:
            log.warning("spill is damaged", file=path.name, error=str(error))
            return None
        file = _File(number, path, after=int(header["after"]["seq"]), bytes=int(result["end"]))
        for commit in commits:
            file.commits.append(
                _Commit(
                    after=file.commits[-1].last if file.commits else file.after,
                    last=int(commit["last"]["seq"]),
                    start=int(commit["start"]),
                    end=int(commit["end"]),
                    wall_ns=int(commit["wall_ns"]),
                )
            )
        if not file.commits:
            return None
        file.last = file.commits[-1].last
        if file.bytes < len(data):
            log.warning("torn end of a spill is cut", file=path.name, bytes=len(data) - file.bytes)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.ftruncate(fd, file.bytes)
                os.fdatasync(fd)
            finally:
                os.close(fd)
        return file

    # ---- appending ---------------------------------------------------------------

    def sealer(self, keys: SpillKeys, stream: Any, epoch: int, after: int, level: int) -> Sealer:
        """Who seals what follows `after`, to be given to `append`. A new file is begun when the
        one that is open is full, ends elsewhere, or is of another epoch or key. `stream` is a
        STREAM struct without its ids and its key's generation."""
        current = self._files[-1] if self._files else None
        if (
            self._sealer is not None
            and current is not None
            and current.bytes < self._segment_bytes
            and current.last == after == self._sealer.seq
            and (epoch, keys.newest.generation) == self._sealing
        ):
            return self._sealer
        if current is not None and current.last != after:
            raise ValueError(f"the spill ends at {current.last}, not at {after}")
        self._begin(keys, stream, epoch, after, level)
        assert self._sealer is not None
        return self._sealer

    _sealing: tuple[int, int] = (0, 0)

    def _begin(self, keys: SpillKeys, stream: Any, epoch: int, after: int, level: int) -> None:
        self._end()
        stream_id = secrets.token_bytes(16)
        key = keys.newest
        stream["key_generation"] = key.generation  # the one that seals, whatever was asked
        head = np.zeros((), layout.SEGMENT_HEADER)
        head["group_id"] = np.frombuffer(self.group_id, np.uint8)
        head["segment"] = number = self._next_number
        head["after"]["epoch"], head["after"]["seq"] = epoch, after
        head["wall_ns"] = stream["wall_ns"][0]
        sealer = Sealer(
            key.stream_key(stream_id), stream_id, epoch=epoch, resume_seq=after, level=level
        )
        room = bytearray(4096)
        count = sealer.stream(stream, room)
        path = self.directory / f"spill-{number:08x}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o600)
        file = _File(number, path, after=after, last=after, bytes=HEADER_BYTES)
        self._next_number += 1
        self._fd = fd
        try:
            _write(fd, memoryview(native.header(head)), 0)
            self._commit(file, memoryview(room)[:count], after, epoch, int(head["wall_ns"]))
            sync_directory(self.directory)
        except BaseException:
            self._end()
            path.unlink(missing_ok=True)
            raise
        self._sealer, self._sealing = sealer, (epoch, key.generation)
        with self._lock:
            self._files.append(file)

    def _end(self) -> None:
        fd, self._fd, self._sealer = self._fd, -1, None
        if fd >= 0:
            os.close(fd)

    def append(self, sealed: memoryview) -> None:
        """Write what its sealer made last, durably. StorageError; after any error the spill ends
        before these records."""
        assert self._sealer is not None
        found, _end = record.scan(sealed)
        wall_ns = int(found["header"]["wall_ns"][0])
        try:
            self._commit(self._files[-1], sealed, self._sealer.seq, self._sealing[0], wall_ns)
        except OSError as error:
            self.abandon()
            raise StorageError(f"{self.directory}: {error.strerror or error}") from None
        except VrepError:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Give up what was sealed and not appended: the next file goes on where this one ends. One
        that has nothing in it is removed: a disk that takes no more would fill up with them."""
        file = self._files[-1] if self._files and self._fd >= 0 else None
        if file is not None:
            try:
                os.ftruncate(self._fd, file.bytes)
            except OSError as error:
                log.warning("spill could not be cut", file=file.path.name, error=str(error))
        self._end()
        if file is not None and len(file.commits) == 1:  # its STREAM record
            with self._lock:
                self._files.remove(file)
            file.path.unlink(missing_ok=True)

    def check_room(self, need: int) -> None:
        """StoreFullError when so many more bytes pass the quota, or take what is kept free."""
        used = self.bytes
        if used + need > self.quota_bytes:
            raise StoreFullError(f"the spill holds {used} of {self.quota_bytes} bytes")
        free = self._free_bytes(self.directory)
        if free < need + self.reserve_bytes:
            raise StoreFullError(f"{free} bytes are free, {self.reserve_bytes} are kept")

    def _commit(self, file: _File, sealed: memoryview, last: int, epoch: int, wall_ns: int) -> None:
        start, end = file.bytes, file.bytes + len(sealed)
        block = np.zeros((), layout.COMMIT)
        block["segment"], block["number"] = file.number, len(file.commits) + 1
        block["start"], block["end"] = start, end
        block["last"]["epoch"], block["last"]["seq"] = epoch, last
        # `durable` stays zero: damage ends a spill, wherever it is.
        block["wall_ns"] = wall_ns
        block["group_id"] = np.frombuffer(self.group_id, np.uint8)
        found, _end = record.scan(sealed)
        block["records"] = len(found)
        tail = native.commit(block, [sealed])
        at = start
        for part in (sealed, memoryview(tail)):
            at = _write(self._fd, part, at)
        os.fdatasync(self._fd)
        with self._lock:
            file.commits.append(_Commit(file.last, last, start, end, wall_ns))
            file.last, file.bytes = last, at

    # ---- reading and removing ------------------------------------------------------

    def batch(self, after: int, keys: SpillKeys, room: memoryview) -> Batch:
        """The records of one commit that follow `after`, open, their data in `room` as far as
        it goes; an empty batch when nothing follows. `room` takes the largest record.
        CorruptError names the file and the position when it is damaged or cannot be read."""
        look = after
        while True:
            with self._lock:
                place = self._find(look)
                if place is None:
                    return Batch.empty()
                file, commit = place
                first, last = file.commits[0], file.last
            data, stream = _read_commit(file, first, commit, after)
            stream_id = stream["stream_id"].tobytes()
            key = keys.generation(int(stream["key_generation"]))
            opener = Opener(key.stream_key(stream_id), stream_id)
            try:
                found, end = record.scan(data)
                if end != len(data):
                    raise CorruptError(f"a commit ends inside a record, at byte {end}")
                headers = found["header"]
                wanted = (headers["seq"] > after) & (headers["seq"] <= last)
                wanted &= ~np.isin(headers["kind"], _ASIDE)
                found = found[wanted]
                written, done = opener.records(data, found, room)
            except VrepError as error:
                raise _damaged(file, after, error) from None
            if done:
                break
            # A cut went through a jump: the file ends before it, and the next one goes on.
            look = min(commit.last, last)
        headers = found["header"][:done].copy()
        headers["flags"] &= np.uint16(0xFFFF ^ layout.RECORD_HASHED)  # sealing sets it again
        bodies = np.where(np.isin(headers["kind"], _SEALED), headers["length"], 0)
        starts = np.cumsum(bodies, dtype=np.uint64) - bodies.astype(np.uint64)
        return Batch(headers, room[:written], starts)

    def drop(self, durable: int) -> None:
        """Remove the files whose records are all at or below `durable`."""
        gone: list[_File] = []
        with self._lock:
            while self._files and self._files[0].last <= durable:
                gone.append(self._files.pop(0))
        if not gone:
            return
        if not self._files:
            self._end()
        for file in gone:
            file.path.unlink(missing_ok=True)

    def cut(self, last: int) -> None:
        """Forget everything above `last`: it stands elsewhere, or belongs to another history.
        Whole files only are removed; a part of one is not given out any more. 0: everything."""
        if last and last >= self.last:
            return
        self._end()
        with self._lock:
            gone = [file for file in self._files if file.after >= last]
            self._files = [file for file in self._files if file.after < last]
            if self._files and self._files[-1].last > last:
                file = self._files[-1]
                file.commits = [commit for commit in file.commits if commit.after < last]
                file.last = min(file.last, last)
        for file in gone:
            file.path.unlink(missing_ok=True)

    def close(self) -> None:
        self._end()


def is_spilled(directory: Path) -> bool:
    """Whether a spill stands there. OSError."""
    return directory.is_dir() and any(_NAME.fullmatch(path.name) for path in directory.iterdir())


def _free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _read_commit(
    file: _File, first: _Commit, commit: _Commit, after: int
) -> tuple[bytearray, np.void]:
    """The records of a commit, and the STREAM of their file."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            stream = record.parse_stream(_read(fd, first.start, first.end))
            return _read(fd, commit.start, commit.end), stream
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EIO):
            raise _damaged(file, after, error) from None
        raise StorageError(f"{file.path}: {error.strerror or error}") from None
    except VrepError as error:
        raise _damaged(file, after, error) from None


def _damaged(file: _File, after: int, error: Exception) -> CorruptError:
    why = getattr(error, "detail", None) or getattr(error, "strerror", None) or error
    return CorruptError(f"{file.path}: after position {after}: {why}")


def _write(fd: int, view: memoryview, at: int) -> int:
    """Write all of it, however little goes at once; where it ends."""
    while view:
        count = os.pwrite(fd, view, at)
        view, at = view[count:], at + count
    return at


def _read(fd: int, start: int, end: int) -> bytearray:
    data = bytearray(end - start)
    view, at = memoryview(data), start
    while view:
        count = os.preadv(fd, [view], at)
        if count == 0:
            raise CorruptError(f"a spill ends at byte {at}, before {end}")
        view, at = view[count:], at + count
    return data
