"""Onto: the disks that a recovery fills in place, instead of sparse files of its own.

A file or block device of the size of the recovered disk, whatever it holds: which of its blocks are
right is known from the view's presence file alone, so it is complete only when the view is filled.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from vrep import errors
from vrep.durable import sync_directory
from vrep.groups import GroupDirectory
from vrep.paths import SitePaths
from vrep.recovery.view import RecordedDisk, view_directories

__all__ = ["parse_onto", "place_onto"]


def parse_onto(words: Sequence[str]) -> dict[str, str]:
    """``NAME=URI`` words, by name."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, uri = word.partition("=")
        if not equals or not name or name in found:
            raise errors.InvalidError(f"{word!r}: a disk is named once, as NAME=block:/dev/...")
        found[name] = uri
    return found


def place_onto(
    paths: SitePaths, group_id: str, disks: Sequence[RecordedDisk], onto: Mapping[str, str]
) -> list[RecordedDisk]:
    """Disks of a view, with those that fill another disk. A file that is not there, or is empty, is
    made; nothing is written to any other yet. InvalidError for one of another size; BusyError for
    one that a group or view of this site has."""
    unknown = set(onto) - {disk.name for disk in disks}
    if unknown:
        raise errors.InvalidError(f"the group has no disk {sorted(unknown)[0]!r}")
    taken = {
        _named(disk.uri): f"a disk of group {group.name!r}"
        for group in GroupDirectory(paths.root).readable()
        if not (group.yielded and group.group_id == group_id)
        for disk in group.disks
    }
    for view in view_directories(paths):
        record = view.load()
        if record.state != "protected":
            taken |= {_named(d.onto): f"filled by view {record.id}" for d in record.disks if d.onto}
    found = []
    for disk in disks:
        uri = onto.get(disk.name)
        if uri is not None:
            uri = _examined(disk, uri)
            named = _named(uri)
            if named in taken:
                raise errors.BusyError(f"{uri} is {taken[named]}")
            taken[named] = f"filled by disk {disk.name!r} already"
            disk = msgspec.structs.replace(disk, onto=uri)
        found.append(disk)
    for disk in found:
        if disk.onto.startswith("file:"):
            _make(Path(disk.onto.removeprefix("file:")), disk.bytes)
    return found


def _named(uri: str) -> tuple[int | str, ...]:
    """The file or device that a URI names, which may have other names, as in /dev/disk."""
    path = Path(uri.partition(":")[2])
    try:
        status = path.stat()
    except OSError:
        return (os.path.realpath(path),)
    if stat.S_ISBLK(status.st_mode):
        return ("device", status.st_rdev)
    return (status.st_dev, status.st_ino)


def _examined(disk: RecordedDisk, uri: str) -> str:
    scheme, _, where = uri.partition(":")
    if scheme not in ("file", "block") or not where:
        raise errors.UnsupportedError(f"{uri!r}: file:PATH and block:PATH are supported")
    path = Path(where).absolute()
    try:
        status = path.stat()
    except FileNotFoundError:
        if scheme == "file" and path.parent.is_dir():
            return f"{scheme}:{path}"
        raise errors.NotFoundError(f"{path} is not there") from None
    except OSError as error:
        raise errors.StorageError(f"{path}: {error.strerror or error}") from None
    if scheme == "file" and not stat.S_ISREG(status.st_mode):
        raise errors.InvalidError(f"{path} is not a regular file")
    if scheme == "block" and not stat.S_ISBLK(status.st_mode):
        raise errors.InvalidError(f"{path} is not a block device")
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
    if size != disk.bytes and not (scheme == "file" and size == 0):
        raise errors.InvalidError(
            f"{path} has {size} bytes, disk {disk.name!r} has {disk.bytes}: they must be equal"
        )
    return f"{scheme}:{path}"


def _make(path: Path, size: int) -> None:
    """A file of this size, durably, unless it is there."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size == 0:
                os.ftruncate(fd, size)
                os.fsync(fd)
        finally:
            os.close(fd)
        sync_directory(path.parent)
    except OSError as error:
        raise errors.StorageError(f"{path}: {error.strerror or error}") from None
