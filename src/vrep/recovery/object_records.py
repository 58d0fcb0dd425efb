"""Objects that stand in a group's history: the VM's definition, its NVRAM, other small blobs.

Their names are sealed as their bytes are, so the tenant's key is needed to list them. At a point
an object is the newest version of its name at or below it, on the line of the point. Sizes are
bytes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import numpy as np

from vrep import errors
from vrep._core import layout
from vrep.durable import sync_directory
from vrep.objects import Plain, parse
from vrep.paths import SitePaths
from vrep.recovery.access import KeyAccess
from vrep.recovery.held import find_group
from vrep.recovery.history import format_time, resolve
from vrep.target.manifest import Position
from vrep.target.reader import Event, StoreReader

__all__ = [
    "ObjectInfo",
    "get_object",
    "list_objects",
    "object_info",
    "objects_at",
    "write_objects",
]


class ObjectInfo(msgspec.Struct, frozen=True):
    """An object at a point."""

    name: str
    bytes: int
    point: str
    """of the version"""
    time: str
    """when it was put, by the source's clock"""


def objects_at(
    reader: StoreReader, access: KeyAccess, point: Position
) -> dict[str, tuple[Position, Plain]]:
    """The newest version of each object at a point, by name."""
    line = dict(reader.ancestry(point))
    found: dict[str, tuple[Position, Plain]] = {}
    events = [e for e in reader.events() if e.kind == layout.KIND_OBJECT]
    for event in sorted(events, key=lambda e: e.position):
        if event.position.seq <= line.get(event.position.epoch, 0):
            plain = _open(reader, access, event)
            found[plain.name] = (event.position, plain)
    return dict(sorted(found.items()))


def _open(reader: StoreReader, access: KeyAccess, event: Event) -> Plain:
    where = f"segment {event.segment:08x}, byte {event.at}, an object"
    try:
        record = reader.record(event.segment, event.at)
        length = int(np.frombuffer(record, layout.RECORD, 1)[0]["length"])
        room = bytearray(length)
        access.opener(event.stream).record(record, room)
        return parse(room)
    except errors.IntegrityError as error:
        raise type(error)(f"{where}: {error.detail}") from None


def object_info(position: Position, plain: Plain) -> ObjectInfo:
    """What is shown of a version."""
    return ObjectInfo(plain.name, len(plain.data), f"pos:{position}", format_time(plain.wall_ns))


def list_objects(paths: SitePaths, group: str, at: str = "latest") -> list[ObjectInfo]:
    """The objects of a group at a point, by name."""
    return [object_info(*each) for each in _find(paths, group, at).values()]


def get_object(paths: SitePaths, group: str, name: str, at: str = "latest") -> bytes:
    """The bytes of an object at a point; NotFoundError names those that there are."""
    found = _find(paths, group, at)
    if name not in found:
        names = ", ".join(found) or "none"
        raise errors.NotFoundError(f"group {group!r} has no object {name!r} at {at}: {names}")
    return found[name][1].data


def _find(paths: SitePaths, group: str, at: str) -> dict[str, tuple[Position, Plain]]:
    held = find_group(paths, group)
    with StoreReader(paths.store, held.group_id) as reader:
        access = KeyAccess.open(paths, held.group_id, reader.wrapped_keys)
        return objects_at(reader, access, resolve(reader, at, access, time.time_ns()).position)


def write_objects(
    found: dict[str, tuple[Position, Plain]], where: Path
) -> list[tuple[ObjectInfo, Path]]:
    """Write objects as files of a new directory, only their owner's; OSError as it comes."""
    if not found:
        return []
    where.mkdir(mode=0o700)
    written = []
    for position, plain in found.values():
        path = where / plain.name
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(plain.data)
            file.flush()
            os.fsync(fd)
        written.append((object_info(position, plain), path))
    sync_directory(where)
    sync_directory(where.parent)
    return written
