"""Manifests: the numbered files that say what a store consists of.

A change of the store is a new manifest, created under a name that must not exist; so of two
writers one learns that it lost. A reader takes the largest number. A manifest has its name
only when its bytes are on stable storage: one that has a name and fails its checks is damage,
never a write that was cut off, and the store refuses to go on with an older one. The bytes are
checked in C (format/manifest.h); this module gives them meaning.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vrep._core import layout
from vrep._core import manifest as native
from vrep.errors import CorruptError, IntegrityError, NotFoundError, PointNotFoundError
from vrep.groups import NAME
from vrep.lanes import lane_of
from vrep.listing import names_in
from vrep.target.aging import BEGIN, Count

__all__ = [
    "NOWHERE",
    "DiskEntry",
    "EpochEntry",
    "EpochState",
    "Manifest",
    "Position",
    "load_newest",
    "manifest_numbers",
    "manifest_path",
    "require_no_segments",
]

_NAME: Final = re.compile(r"manifest-([0-9a-f]{16})")
Structs = NDArray[np.void]


class Position(NamedTuple):
    """A place in a group's history; seq 0 is "nothing yet". Ordered within one lane."""

    epoch: int = 0
    lane: int = 0
    seq: int = 0

    @classmethod
    def of(cls, raw: Any) -> Position:
        """From a struct vrep_position."""
        return cls(int(raw["epoch"]), int(raw["lane"]), int(raw["seq"]))

    @property
    def raw(self) -> tuple[int, int, int, int]:
        """As the fields of a struct vrep_position."""
        return (self.epoch, self.lane, 0, self.seq)

    def __str__(self) -> str:
        return f"{self.epoch}/{self.lane}/{self.seq}"


NOWHERE: Final = Position()


class EpochState(enum.IntEnum):
    """How an epoch stands with this target."""

    ACCEPTED = 1
    PROVISIONAL = 2
    """a failover was started and neither committed nor rolled back"""
    ABANDONED = 3


@dataclass(frozen=True)
class EpochEntry:
    """A writer's reign."""

    epoch: int
    state: EpochState
    epoch_id: bytes
    writer: bytes
    """id of the site that may write it"""
    parent: Position = NOWHERE
    wall_ns: int = 0


@dataclass(frozen=True)
class DiskEntry:
    """A disk of the group. In a manifest its size is the one before any RESIZE record."""

    name: str
    bytes: int
    index: int


@dataclass(frozen=True)
class Manifest:
    """What a store consists of. `segments` and `runs` are arrays of the structs of layout.h."""

    group_id: bytes
    store_id: bytes
    name: str
    epochs: tuple[EpochEntry, ...]
    disks: tuple[DiskEntry, ...]
    wrapped_keys: tuple[bytes, ...]
    segments: Structs
    runs: Structs
    number: int = 1
    lease: int = 1
    wall_ns: int = 0
    next_segment: int = 1
    active_segment: int = 0
    unprotected: bool = False
    horizon: Position = NOWHERE
    """the oldest recovery point that is kept; seq 0: all are"""
    window_s: int = 0
    """seconds of history that the source asks for; 0: all"""
    quota_bytes: int = 0
    """that the group may use; 0: no limit"""
    received_bytes: int = 0
    """appended since the store began"""
    folded_bytes: int = 0
    """written by folds since the store began"""
    count: Count = BEGIN
    """of its clock, when it was made"""

    def encode(self) -> bytes:
        head = np.zeros((), layout.MANIFEST_HEADER)
        head["number"], head["lease"] = self.number, self.lease
        head["group_id"] = np.frombuffer(self.group_id, np.uint8)
        head["store_id"] = np.frombuffer(self.store_id, np.uint8)
        head["wall_ns"], head["next_segment"] = self.wall_ns, self.next_segment
        head["flags"] = layout.MANIFEST_UNPROTECTED if self.unprotected else 0
        head["active_segment"] = self.active_segment
        head["group_name"] = self.name.encode()
        head["horizon"] = self.horizon.raw
        head["window_s"], head["quota_bytes"] = self.window_s, self.quota_bytes
        head["received_bytes"], head["folded_bytes"] = self.received_bytes, self.folded_bytes
        head["aged_ns"], head["boot"], head["boot_ns"] = self.count
        return native.build(
            head,
            _encode_epochs(self.epochs),
            self.segments,
            self.runs,
            _encode_disks(self.disks),
            self.wrapped_keys,
        )

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        parts = native.parse(data)
        head = parts["header"]
        try:
            name = bytes(head["group_name"]).decode()
            disks = tuple(_decode_disk(raw) for raw in parts["disks"])
        except UnicodeDecodeError:
            raise CorruptError("a name in the manifest is not UTF-8") from None
        return cls(
            group_id=head["group_id"].tobytes(),
            store_id=head["store_id"].tobytes(),
            name=name,
            epochs=tuple(_decode_epoch(raw) for raw in parts["epochs"]),
            disks=disks,
            wrapped_keys=tuple(parts["keys"]),
            segments=parts["segments"],
            runs=parts["runs"],
            number=int(head["number"]),
            lease=int(head["lease"]),
            wall_ns=int(head["wall_ns"]),
            next_segment=int(head["next_segment"]),
            active_segment=int(head["active_segment"]),
            unprotected=bool(int(head["flags"]) & layout.MANIFEST_UNPROTECTED),
            horizon=Position.of(head["horizon"]),
            window_s=int(head["window_s"]),
            quota_bytes=int(head["quota_bytes"]),
            received_bytes=int(head["received_bytes"]),
            folded_bytes=int(head["folded_bytes"]),
            count=Count(int(head["aged_ns"]), int(head["boot"]), int(head["boot_ns"])),
        )

    @property
    def lane(self) -> int:
        """The number of the lane whose history this is."""
        return lane_of(self.name)

    def end_of(self, epoch: int) -> Position:
        """Past every position of an epoch."""
        return Position(epoch, self.lane, (1 << 64) - 1)

    def next(self, wall_ns: int, **changes: Any) -> Manifest:
        """The manifest that follows this one."""
        return replace(self, number=self.number + 1, wall_ns=wall_ns, **changes)

    # ---- epochs ----------------------------------------------------------------

    @property
    def current_epoch(self) -> EpochEntry:
        """The newest epoch that was not abandoned: the only one whose writer is heard."""
        for entry in reversed(self.epochs):
            if entry.state is not EpochState.ABANDONED:
                return entry
        raise CorruptError("every epoch of the store was abandoned")

    @property
    def accepted_epoch(self) -> EpochEntry:
        """The newest accepted epoch: what `latest` means without a failover."""
        for entry in reversed(self.epochs):
            if entry.state is EpochState.ACCEPTED:
                return entry
        raise CorruptError("the store has no accepted epoch")

    def epoch(self, counter: int) -> EpochEntry:
        for entry in self.epochs:
            if entry.epoch == counter:
                return entry
        raise PointNotFoundError(f"the store knows no epoch {counter}")

    def ancestry(self, point: Position) -> list[tuple[int, int]]:
        """``[(epoch, highest seq)]`` of the history that ends at a point, newest first."""
        chain = [(point.epoch, point.seq)]
        parent = self.epoch(point.epoch).parent
        while parent.epoch and any(entry.epoch == parent.epoch for entry in self.epochs):
            # A point below the place where its epoch began reaches less of the parent.
            chain.append((parent.epoch, min(parent.seq, point.seq)))
            parent = self.epoch(parent.epoch).parent
        return chain

    def keeps(self, point: Position) -> bool:
        """Whether a point is at or behind the horizon, so that no fold takes it away: the
        horizon lies on the line that ends there."""
        here = self.horizon
        return not here.seq or dict(self.ancestry(point)).get(here.epoch, 0) >= here.seq


def _encode_epochs(epochs: Sequence[EpochEntry]) -> Structs:
    out = np.zeros(len(epochs), layout.MANIFEST_EPOCH)
    for raw, entry in zip(out, epochs, strict=True):
        raw["epoch"], raw["state"], raw["wall_ns"] = entry.epoch, entry.state, entry.wall_ns
        raw["epoch_id"] = np.frombuffer(entry.epoch_id, np.uint8)
        raw["writer"] = np.frombuffer(entry.writer, np.uint8)
        raw["parent"] = entry.parent.raw
    return out


def _decode_epoch(raw: Any) -> EpochEntry:
    return EpochEntry(
        epoch=int(raw["epoch"]),
        state=EpochState(int(raw["state"])),
        epoch_id=raw["epoch_id"].tobytes(),
        writer=raw["writer"].tobytes(),
        parent=Position.of(raw["parent"]),
        wall_ns=int(raw["wall_ns"]),
    )


def _encode_disks(disks: Sequence[DiskEntry]) -> Structs:
    out = np.zeros(len(disks), layout.MANIFEST_DISK)
    for raw, entry in zip(out, disks, strict=True):
        raw["name"], raw["bytes"], raw["index"] = entry.name.encode(), entry.bytes, entry.index
    return out


def _decode_disk(raw: Any) -> DiskEntry:
    name = bytes(raw["name"]).decode()
    if not NAME.fullmatch(name):
        # Views and exports make files of that name.
        raise CorruptError(f"a disk cannot be called {name!r}")
    return DiskEntry(name, int(raw["bytes"]), int(raw["index"]))


def manifest_path(directory: Path, number: int) -> Path:
    return directory / f"manifest-{number:016x}"


def manifest_numbers(directory: Path) -> list[int]:
    """Numbers of the manifests in a store's directory, rising."""
    return sorted(
        int(match[1], 16) for name in names_in(directory) if (match := _NAME.fullmatch(name))
    )


def require_no_segments(directory: Path) -> None:
    """CorruptError: a directory without a manifest holds a history all the same."""
    try:
        segments = sum(entry.name.startswith("seg-") for entry in directory.iterdir())
    except FileNotFoundError:
        return
    if segments:
        raise CorruptError(
            f"{directory}: its manifests are lost, of its segments {segments} are there"
        )


def _knows_all(directory: Path, manifest: Manifest) -> bool:
    """Whether no segment goes on behind those of a manifest: nothing is appended to one before the
    manifest that names it is durable. What a killed repair left there goes on elsewhere."""
    from vrep.target.segment import HEADER_BYTES, read_header, scan_tail, segment_path

    end = Position.of(manifest.segments[-1]["last"]) if len(manifest.segments) else Position()
    try:
        data = memoryview(segment_path(directory, manifest.next_segment).read_bytes())
        after = read_header(data)
        if len(data) > HEADER_BYTES and manifest.active_segment:
            active = memoryview(segment_path(directory, manifest.active_segment).read_bytes())
            end = scan_tail(active, manifest.group_id, manifest.active_segment).last
    except FileNotFoundError:  # of the one that is named it is said elsewhere
        return True
    except IntegrityError:  # a header that a crash cut short; or the one that is named is damaged
        return True
    if len(data) == HEADER_BYTES or after != end:
        return True
    try:
        return not scan_tail(data, manifest.group_id, manifest.next_segment).records
    except IntegrityError:
        return False  # it held records, whatever became of them


def load_newest(directory: Path, group_id: bytes) -> Manifest:
    """The newest manifest. NotFoundError when there is none; CorruptError, with the file's
    name, when it is damaged or lost: an older one would silently take back what was promised; and
    when all are lost."""
    for _attempt in range(8):
        numbers = manifest_numbers(directory)
        if not numbers:
            require_no_segments(directory)
            raise NotFoundError(f"no store of group {group_id.hex()} in {directory}")
        path = manifest_path(directory, numbers[-1])
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue  # a newer one took its place since the listing
        try:
            found = Manifest.decode(data)
        except IntegrityError as error:
            raise type(error)(f"{path}: {error.detail}") from None
        if found.number != numbers[-1] or found.group_id != group_id:
            raise CorruptError(f"{path}: its content is another manifest's or another group's")
        if not _knows_all(directory, found):
            if manifest_numbers(directory)[-1:] != [found.number]:
                continue  # it was written since the listing
            raise CorruptError(
                f"{manifest_path(directory, found.number + 1)}: it is lost; segment "
                f"{found.next_segment:08x}, which it named, is there"
            )
        return found
    raise CorruptError(f"{directory}: its manifests change faster than they can be read")
