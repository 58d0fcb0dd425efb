"""Shipped: up to which seq anything of an epoch was sent, so that a disk put back is noticed.

A host that is taken back to an earlier state (a snapshot of its storage, a backup) has a disk, a
change map and a write-intent that agree with each other, and a target that holds what was written
since: blocks differ that no bit has. What gives it away is the target, which holds more than this
site knows to have sent. So before a record is sent, a seq at or above it is stored here, beside the
group's other state, where whatever takes the disk back takes this back as well. A target that holds
more in this epoch was written by a future that is gone: nothing is believed, and all is compared.
A mark of an epoch before says that nothing was sent in this one: a target that holds more than its
begin, or lets it begin behind what was sent in the one before, was written by such a future, too.

The mark is stored once a second at most, ahead by what a second of this load needs, and drawn
back to what was sent when that is less, and when a session ends. So what was sent within about a
second of the snapshot is not noticed. A mark that cannot be stored is removed: then nothing is
known, and nothing noticed. One that is there and cannot be read, or is damaged or of another
version, may be of before or of now: then all is compared as well.

File: `shipped.json` in the group's directory, replaced as a whole; its bytes are in
docs/internals/formats.md. Threads: any.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated, Final

import msgspec
import structlog
from msgspec import Meta

from vrep.checksum import checksum32
from vrep.durable import sync_directory, write_atomic
from vrep.errors import CorruptError, VersionError, VrepError
from vrep.groups import GroupDefinition
from vrep.wire.stream import Clock

__all__ = ["Mark", "Shipped", "decode", "encode"]

VERSION: Final = 2
EVERY_S: Final = 1.0

log = structlog.get_logger("vrep.source")


class Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file says, beside its checksum."""

    version: int
    epoch: int
    epoch_id: str
    seq: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


_CHECKSUM: Final = b',"checksum":'


def encode(mark: Mark) -> bytes:
    """The file. Its checksum is of the object without it."""
    said = msgspec.json.encode(mark)
    return said[:-1] + _CHECKSUM + b"%d}" % checksum32(said)


def decode(data: bytes) -> Mark:
    """CorruptError; VersionError when it is of another version."""
    said, _name, checksum = data.rpartition(_CHECKSUM)
    said += b"}"
    if checksum != b"%d}" % checksum32(said):
        raise CorruptError("its checksum is wrong, or it has none")
    try:
        mark = msgspec.json.decode(said, type=Mark)
    except msgspec.MsgspecError as error:
        raise CorruptError(str(error)) from None
    if mark.version != VERSION:
        raise VersionError(f"it has version {mark.version}")
    return mark


class Shipped:
    """Of one group's present epoch."""

    def __init__(self, directory: Path, definition: GroupDefinition, clock: Clock) -> None:
        self._path = directory / "shipped.json"
        self._group = definition.name
        self._epoch, self._epoch_id = definition.epoch, definition.epoch_id
        self._clock = clock
        self._lock = threading.Lock()
        self._limit: int | None = None
        """stored; None: nothing is known"""
        self._sent = 0
        self._stored_s = clock.monotonic() - EVERY_S
        self._stored_at = 0
        self._unreadable = False
        mark = self._load()
        if mark is not None:
            self._limit = _limit_of(mark, definition)

    def _load(self) -> Mark | None:
        try:
            return decode(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, VrepError) as error:
            log.warning("not known what was sent", group=self._group, error=str(error))
            self._unreadable = True
            return None

    def went_back(self, durable: int) -> bool:
        """Whether a target that holds `durable` of this epoch holds more than was sent, or may."""
        if self._unreadable:
            return durable > 0
        return self._limit is not None and durable > self._limit

    def begin(self, durable: int) -> None:
        """What the target holds is known from here on: before anything is sent, and once what
        `went_back` means outlasts a power loss."""
        with self._lock:
            self._unreadable = False
            self._sent = self._stored_at = durable
            if self._limit is None or durable > self._limit:
                self._store(durable)

    def allow(self, seq: int) -> None:
        """Return when records up to `seq` may be sent."""
        with self._lock:
            pace = max(0, seq - self._stored_at)
            passed_s = max(self._clock.monotonic() - self._stored_s, 1e-3)
            self._sent = seq
            if self._limit is not None and (seq > self._limit or passed_s >= EVERY_S):
                self._store(seq + int(pace * EVERY_S / passed_s))  # for a second of this load
                self._stored_at = seq

    def settle(self) -> None:
        """Draw the mark back to what was sent; for an idle moment."""
        with self._lock:
            if self._clock.monotonic() - self._stored_s >= EVERY_S:
                self._draw_back()

    def end(self) -> None:
        """The same at once: nothing is sent any more."""
        with self._lock:
            self._draw_back()

    def _draw_back(self) -> None:
        if self._limit is not None and self._limit > self._sent:
            self._store(self._sent)
            self._stored_at = self._sent

    def _store(self, seq: int) -> None:
        mark = Mark(VERSION, self._epoch, self._epoch_id, seq)
        self._stored_s = self._clock.monotonic()
        try:
            write_atomic(self._path, encode(mark))
            self._limit = seq
        except (OSError, VrepError) as error:
            self._limit = None
            log.warning("what was sent is not noted", group=self._group, error=str(error))
            self._forget()

    def _forget(self) -> None:
        try:
            self._path.unlink(missing_ok=True)
            sync_directory(self._path.parent)
        except OSError as error:  # it may make a later session compare everything
            log.warning("an old mark stays", group=self._group, error=str(error))


def _limit_of(mark: Mark, definition: GroupDefinition) -> int | None:
    """Up to where a target may hold records of a group's present epoch; None: nobody knows."""
    if mark.epoch == definition.epoch:
        return mark.seq if mark.epoch_id == definition.epoch_id else None
    if mark.epoch > definition.epoch:
        return None
    parent = definition.parent
    # Where another epoch stands between, another site may have written it: the begin is believed.
    return min(parent.seq, mark.seq) if parent.epoch == mark.epoch else parent.seq
