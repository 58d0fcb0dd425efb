"""Untaken: what a site wrote that the site which took its group over does not have.

The change map of the group knows it, in its bits: every block that was written and is not durable
at the other site, also what the VM writes on after the fence. When the group is given up for good
that is written down, in ``groups/<name>/untaken.json``. Blocks may be named of which the other site
has all; none is left out. What was durable there behind the point that was taken is no part of it:
the other site has it still, and recovers it as ``pos:EPOCH/LANE/SEQ``. Where the disks may have
been written past the filter, which the map does not know, every block is named. Sizes are bytes.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from vrep import errors
from vrep._core.map import ChangeMap
from vrep.control import ControlClient
from vrep.durable import sync_directory, write_atomic
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.lanes import group_of
from vrep.paths import SitePaths
from vrep.recovery.filter_state import written_past
from vrep.settings import load_config

__all__ = [
    "Untaken",
    "UntakenDisk",
    "export_untaken",
    "find_untaken",
    "joined_untaken",
    "note_untaken",
    "untaken_path",
]

FILE: Final = "untaken.json"
COPY_BYTES: Final = 4 << 20
Progress = Callable[[str, int, int], None]


class UntakenDisk(msgspec.Struct, frozen=True):
    """A disk, and where it may hold what was not taken."""

    name: str
    uri: str
    bytes: int
    extents: list[tuple[int, int]]
    """offset and length, rising"""


class Untaken(msgspec.Struct, frozen=True):
    """What was not taken of a group."""

    group: str
    group_id: str
    epoch: int
    after: str
    """pos:EPOCH/LANE/SEQ, the last position of this site that was taken; empty: not known here"""
    bytes: int
    """of the extents of all disks"""
    known: bool
    """whether a change map was there that tells it: without one every block is named"""
    disks: list[UntakenDisk]
    exported: str = ""
    """the directory that it was exported to last"""


def untaken_path(paths: SitePaths, name: str) -> Path:
    """Where it is written down."""
    return paths.groups / name / FILE


def find_untaken(paths: SitePaths, group: str) -> Untaken:
    """What was not taken of a group of this site. StateError when no site took it over."""
    definition = GroupDirectory(paths.root).load(group)
    if not definition.fenced:
        raise errors.StateError(f"{group!r} is written here: no other site took it over")
    return read_untaken(paths, group) if definition.yielded else _of_map(paths, definition)


def read_untaken(paths: SitePaths, group: str) -> Untaken:
    """What was written down when the group was given up last."""
    try:
        return msgspec.json.decode(untaken_path(paths, group).read_bytes(), type=Untaken)
    except FileNotFoundError:
        raise errors.NotFoundError(f"nothing was noted when {group!r} was given up") from None
    except (msgspec.MsgspecError, OSError) as error:
        raise errors.CorruptError(f"{untaken_path(paths, group)}: {error}") from None


def joined_untaken(found: Sequence[Untaken]) -> Untaken:
    """What was not taken of all lanes of a group."""
    return msgspec.structs.replace(
        found[0],
        group=group_of(found[0].group),
        group_id=found[0].group_id[:28] + "0000",
        after=", ".join(each.after for each in found if each.after),
        bytes=sum(each.bytes for each in found),
        known=all(each.known for each in found),
        disks=[disk for each in found for disk in each.disks],
        exported=found[0].exported if all(each.exported for each in found) else "",
    )


def _of_map(paths: SitePaths, definition: GroupDefinition) -> Untaken:
    shm = paths.shm(load_config(paths.config).filter.shm_dir) / definition.name / "map"
    found: dict[int, list[tuple[int, int]]] = {}
    past = written_past(paths, definition)  # first: a filter that opens it now marks all itself
    try:
        with ChangeMap.open(shm) as known:
            for disk in definition.disks if not past else ():
                runs = known.runs(disk.index)
                found[disk.index] = [(int(at), int(length)) for at, length in runs]
    except (errors.VrepError, OSError):
        found = {}
    disks = [
        UntakenDisk(disk.name, disk.uri, disk.bytes, found.get(disk.index, [(0, disk.bytes)]))
        for disk in definition.disks
    ]
    left = definition.left
    return Untaken(
        group=definition.name,
        group_id=definition.group_id,
        epoch=definition.epoch,
        after=f"pos:{left.epoch}/{left.lane}/{left.seq}" if left is not None else "",
        bytes=sum(length for disk in disks for _at, length in disk.extents),
        known=bool(found),
        disks=disks,
    )


def note_untaken(paths: SitePaths, definition: GroupDefinition) -> Untaken:
    """Write down, durably, what was not taken of a group that is being given up: the filter has
    let go of it, so nothing is added any more. What an export said before stays said."""
    found = _of_map(paths, definition)
    _store(paths, found)
    return found


def _store(paths: SitePaths, found: Untaken) -> None:
    text = msgspec.json.format(msgspec.json.encode(found), indent=2)
    write_atomic(untaken_path(paths, found.group), text + b"\n")


def export_untaken(
    paths: SitePaths, group: str, out: Path, *, progress: Progress | None = None
) -> Untaken:
    """Write the disks of a group as they are here, and the list of extents that were not taken,
    into new files of a directory: ``GROUP-DISK.raw`` and ``GROUP-untaken.json``. BusyError while a
    VM uses the disks."""
    definition = GroupDirectory(paths.root).load(group)
    if definition.read_through_vm:
        raise errors.UnsupportedError(
            f"{group!r} has a qcow2 image: 'qemu-img convert' copies it as it is here"
        )
    found = find_untaken(paths, group)
    _require_unused(paths, group)
    names = {disk.name: out / f"{group}-{disk.name}.raw" for disk in found.disks}
    listing = out / f"{group}-{FILE}"
    out.mkdir(parents=True, exist_ok=True)
    for path in (*names.values(), listing):
        if path.exists():
            raise errors.ExistsError(f"{path} is there already")
    for disk in found.disks:
        _copy(Path(disk.uri.partition(":")[2]), names[disk.name], disk, progress)
    found = msgspec.structs.replace(found, exported=str(out.absolute()))
    text = msgspec.json.format(msgspec.json.encode(found), indent=2)
    write_atomic(listing, text + b"\n")
    if definition.yielded:
        _store(paths, found)
    return found


def _require_unused(paths: SitePaths, group: str) -> None:
    try:
        known = ControlClient(paths.socket("filter")).call("status").get(group, {})
    except errors.UnreachableError:
        return
    if clients := int(known.get("clients", 0)):
        raise errors.BusyError(f"{clients} client(s) use {group!r}: shut the VM down first")


def _copy(source: Path, final: Path, disk: UntakenDisk, progress: Progress | None) -> None:
    """A disk as a sparse file, which gets its name when it is whole and synced."""
    partial = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    zeroes = bytes(COPY_BYTES)
    try:
        with source.open("rb") as data, partial.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            for at in range(0, disk.bytes, COPY_BYTES):
                chunk = os.pread(data.fileno(), min(COPY_BYTES, disk.bytes - at), at)
                if chunk != zeroes[: len(chunk)]:
                    os.pwrite(file.fileno(), chunk, at)
                if progress is not None:
                    progress(disk.name, at, disk.bytes)
            file.truncate(disk.bytes)
            os.fsync(file.fileno())
        os.link(partial, final)  # never over another file
        sync_directory(final.parent)
    except FileExistsError:
        raise errors.ExistsError(f"{final} is there already") from None
    except OSError as error:
        kind = errors.StoreFullError if error.errno == errno.ENOSPC else errors.StorageError
        raise kind(f"{source} to {final}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
