"""Definitions of protection groups: what a source site knows of each group it protects.

One directory a group, ``groups/<name>/``, with ``group.json`` (written whole, atomically and
synced) and the native state files beside it. The definition holds no secret: data keys are
wrapped by the tenant's key.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from vrep import errors
from vrep.durable import make_private_directory, write_atomic
from vrep.lanes import group_of
from vrep.listing import is_file, names_in

VERSION = 1
ON_FENCE = ("go-on", "pause")
FRONTS = ("nbd", "vhost-user-blk", "iscsi")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class DiskDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One disk: its export name, its backing and its size in bytes, as the filter knew it last."""

    name: str
    uri: str
    bytes: int
    index: int
    front: Literal["nbd", "vhost-user-blk", "iscsi"] = "nbd"
    """how its VM reaches it; one of `FRONTS`"""


class ParentPosition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an epoch left its parent; zeroes for a first epoch."""

    epoch: int = 0
    lane: int = 0
    seq: int = 0


class GroupOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one group; sizes in bytes, rates in bytes a second, 0 = unlimited or off."""

    ring_bytes: int = 256 << 20
    descriptors: int = 1 << 16
    slots: int = 1024
    threads: int = 2
    rate_bytes_per_s: int = 0
    compression: int = 1
    bit_bytes: int = 65536
    direct: bool = False
    socket_mode: int = 0o600
    socket_group: str = ""
    tcp: str = ""
    window_s: int = 0
    """seconds of history that the target keeps; 0: all"""
    quota_bytes: int = 0
    """that the group's history may use at the target; 0: no limit"""
    iscsi_listen: str = ""
    """host:port of the group's iSCSI target; empty: it has none"""
    iscsi_block_bytes: Literal[512, 4096] = 512
    """logical blocks of its units"""
    iscsi_admit: tuple[str, ...] = ()
    """who may log in, each ``NAME``, ``@ADDRESS`` or ``NAME@ADDRESS``; none: who authenticates"""
    iscsi_auth: str = ""
    """file of CHAP names and secrets; empty: none are asked for"""
    vhost_block_bytes: Literal[512, 4096] = 512
    """logical blocks of disks on vhost-user-blk"""
    on_fence: Literal["go-on", "pause"] = "go-on"
    """what the VM's I/O does when another site took the group over; one of `ON_FENCE`"""


def block_bytes(options: GroupOptions, front: str) -> int:
    """What the size of a disk must be a multiple of, beside sectors, to be served so."""
    blocks = {"iscsi": options.iscsi_block_bytes, "vhost-user-blk": options.vhost_block_bytes}
    return blocks.get(front, 1)


class GroupDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a source needs to protect a group. Change by `msgspec.structs.replace`."""

    version: int
    group_id: str
    name: str
    disks: tuple[DiskDefinition, ...]
    to_site: str
    key: str
    tenant_key_id: str
    epoch: int
    epoch_id: str
    wrapped_keys: tuple[str, ...]
    created: float
    parent: ParentPosition = ParentPosition()
    paused: bool = False
    fenced: bool = False
    detached: bool = False
    """its VM runs without the filter, which leaves the disks alone"""
    yielded: bool = False
    """the site that took the group over protects it back to here: the filter leaves the disks
    alone, nothing is shipped, and history comes in"""
    halted: bool = False
    """its guest's I/O waits, since the group is being moved to another site"""
    left: ParentPosition | None = None
    """the position of this writer where the site that took over goes on, once that is known: what
    was written here behind it was not taken"""
    mirrored: bool = False
    """its VM writes the disks itself, and sends a copy of each write to the filter"""
    options: GroupOptions = GroupOptions()
    lanes: tuple[int, ...] = ()
    """of a lane: the numbers of all lanes of its group; empty for a group that has one"""
    hosts: tuple[tuple[int, str], ...] = ()
    """of a lane: whose each lane is, by number and site's id; empty: all are of this site"""
    numbered: int = 0
    """of a lane: the first number that no lane of the group ever had, where sites joined it"""
    joining: tuple[int, ...] = ()
    """of a lane: those of `lanes` that got their numbers and were never seen served; no cut waits
    for them"""
    keys_at_target: str = ""
    """`keys_digest` of the wrapped keys that the target was heard to hold last; empty: unknown"""
    resizing: dict[str, tuple[int, int]] = {}
    """disks that are to get another size: what they have, and what they are to have"""

    @property
    def read_through_vm(self) -> bool:
        """Whether only a VM that runs knows what its guest sees of a disk: the group can be
        mirrored, and not served."""
        return any(disk.uri.startswith("qcow2:") for disk in self.disks)

    @property
    def keys_digest(self) -> str:
        """What stands for the wrapped keys."""
        return hashlib.sha256("\n".join(self.wrapped_keys).encode()).hexdigest()


def gives_way(definition: GroupDefinition) -> bool:
    """Whether the filter is to leave the group's disks alone."""
    return definition.detached or definition.yielded


def pauses_guest(definition: GroupDefinition) -> bool:
    """Whether the VM's I/O is to wait: the group is being moved, or another site took it over and
    the group asks for it."""
    return definition.halted or (definition.fenced and definition.options.on_fence == "pause")


def check_name(name: str, what: str = "group") -> str:
    """The name, when it can be a file name, an export name and a label of a metric."""
    if not NAME.fullmatch(name):
        raise errors.InvalidError(
            f"the {what} name {name!r} must be 1 to 63 letters, digits, '.', '_' or '-', "
            "and begin with a letter or digit"
        )
    return name


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; it is let go when the process ends, however it does."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class GroupDirectory:
    """The groups of a site, as files."""

    def __init__(self, site_dir: Path) -> None:
        self.root = site_dir / "groups"

    def path(self, name: str) -> Path:
        check_name(group_of(name))
        return self.root / name

    def names(self) -> Iterator[str]:
        """Names of all groups, sorted."""
        for name in sorted(names_in(self.root)):
            if is_file(f"{self.root}/{name}/group.json"):
                yield name

    def load(self, name: str) -> GroupDefinition:
        path = self.path(name) / "group.json"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise errors.NotFoundError(f"no group {name!r} is protected here") from None
        except OSError as error:
            raise errors.StorageError(f"{path}: {error.strerror or error}") from None
        try:
            definition = msgspec.json.decode(data, type=GroupDefinition)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise errors.CorruptError(f"{path}: {error}") from None
        if definition.version != VERSION:
            raise errors.VersionError(f"{path} has version {definition.version}, not {VERSION}")
        return definition

    def readable(self) -> Iterator[GroupDefinition]:
        """Every group whose definition can be read. One that cannot stops nothing that
        concerns the others: it stands in the status, and is not served."""
        for name in self.names():
            with contextlib.suppress(errors.VrepError):
                yield self.load(name)

    def update(self, name: str, **changes: Any) -> GroupDefinition:
        """Change fields of a definition. What changes nothing needs no disk that can be
        written."""
        before = self.load(name)
        if msgspec.structs.replace(before, **changes) == before:
            return before
        return self.revise(name, lambda _before: changes)

    def revise(
        self, name: str, changes: Callable[[GroupDefinition], Mapping[str, Any]]
    ) -> GroupDefinition:
        """Change fields of a definition by what it is. Commands and the site's processes do so at
        the same time: a lock makes reading and writing one step."""
        path = self.path(name)
        try:
            with _locked(path / "group.lock"):
                before = self.load(name)
                definition = msgspec.structs.replace(before, **changes(before))
                if definition != before:
                    self._write(definition)
                return definition
        except FileNotFoundError:
            raise errors.NotFoundError(f"no group {name!r} is protected here") from None
        except OSError as error:
            raise errors.StorageError(f"{path}: {error.strerror or error}") from None

    def of_id(self, group_id: str) -> GroupDefinition | None:
        """The definition of a group by its id, if there is one that can be read."""
        return next((one for one in self.readable() if one.group_id == group_id), None)

    def forget(self, name: str) -> None:
        """Delete a definition; what `update` writes meanwhile does not bring it back."""
        path = self.path(name)
        try:
            with _locked(path / "group.lock"):
                (path / "group.json").unlink()
        except FileNotFoundError:
            raise errors.NotFoundError(f"no group {name!r} is protected here") from None
        except OSError as error:
            raise errors.StorageError(f"{path}: {error.strerror or error}") from None

    def store(self, definition: GroupDefinition) -> None:
        """Write a new definition; `update` changes one."""
        path = make_private_directory(self.path(definition.name))
        with _locked(path / "group.lock"):  # it is there when the disk is full later
            self._write(definition)

    def _write(self, definition: GroupDefinition) -> None:
        path = self.path(definition.name)
        text = msgspec.json.format(msgspec.json.encode(definition), indent=2)
        write_atomic(path / "group.json", text + b"\n", mode=0o600)


def without_lanes(gone: Collection[int]) -> Callable[[GroupDefinition], Mapping[str, Any]]:
    """For `GroupDirectory.revise`: the other lanes of the group go on without some."""

    def changes(one: GroupDefinition) -> dict[str, Any]:
        return {
            "lanes": tuple(lane for lane in one.lanes if lane not in gone),
            "hosts": tuple((lane, site) for lane, site in one.hosts if lane not in gone),
            "joining": tuple(lane for lane in one.joining if lane not in gone),
        }

    return changes


__all__ = [
    "DiskDefinition",
    "GroupDefinition",
    "GroupDirectory",
    "GroupOptions",
    "ParentPosition",
    "block_bytes",
    "check_name",
    "gives_way",
    "pauses_guest",
    "without_lanes",
]
