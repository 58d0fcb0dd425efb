"""``groups/NAME/attached.json``: what was done to a VM, and all that going back needs.

It is there from before the first change in the VM until after the last. Version 1; written whole,
atomically and synced.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from vrep import errors
from vrep.durable import sync_directory, write_atomic
from vrep.groups import GroupDirectory
from vrep.hypervisor.mirror import MirrorPlan
from vrep.hypervisor.recipe import DiskPlan

VERSION: Final = 1
FILE: Final = "attached.json"
Mode = Literal["inline", "mirror"]


class Attachment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was done to a VM."""

    version: int
    vm: str
    disks: tuple[DiskPlan, ...] = ()
    mode: Mode = "inline"
    mirrors: tuple[MirrorPlan, ...] = ()
    """of the mode `mirror`, which has no `disks`"""
    failures: int = 0
    """of writes at the VM's images, that were dealt with"""


class AttachmentFile:
    """The record of one group."""

    def __init__(self, groups: GroupDirectory, group: str) -> None:
        self.path: Path = groups.path(group) / FILE

    @contextlib.contextmanager
    def held(self, *, wait: bool = True) -> Iterator[bool]:
        """One at a time does something to the group's VM. False: somebody does, and it was not
        waited for."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.path.with_suffix(".lock"), flags, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(fd)

    def load(self) -> Attachment | None:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise errors.StorageError(f"{self.path}: {error.strerror}") from None
        try:
            record = msgspec.json.decode(data, type=Attachment)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise errors.CorruptError(f"{self.path}: {error}") from None
        if record.version != VERSION:
            raise errors.VersionError(f"{self.path} has version {record.version}, not {VERSION}")
        return record

    def store(self, record: Attachment) -> None:
        text = msgspec.json.format(msgspec.json.encode(record), indent=2)
        write_atomic(self.path, text + b"\n", mode=0o600)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)
        sync_directory(self.path.parent)


def attached_vm(groups: GroupDirectory, group: str) -> str:
    """The VM that a group is attached to; empty when it is to none."""
    try:
        record: Any = AttachmentFile(groups, group).load()
    except errors.VrepError:
        return ""
    return record.vm if record is not None else ""


__all__ = ["VERSION", "Attachment", "AttachmentFile", "Mode", "attached_vm"]
