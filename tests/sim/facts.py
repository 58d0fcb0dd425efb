"""Facts: what an oracle remembers of a world, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from vrep._core import layout
from vrep.target.manifest import Position

SALVAGED: Final = -1
"""in the place of a record's kind: the end of a history that was repaired"""
WRITES: Final = (layout.KIND_WRITE, layout.KIND_SYNC)
DISK_BYTES_MAX: Final = 512 << 10


@dataclass
class Record:
    """One record as it stood in the ring."""

    seq: int
    kind: int
    flags: int
    disk: int
    offset: int
    length: int
    data: bytes


@dataclass
class Flight:
    """A command of the guest that was not answered yet."""

    op: str
    disk: int
    offset: int
    length: int
    data: bytes
    fua: bool
    pending: Any
    after: int
    """head when it was sent: its record comes later"""
    stamp: int
    seq: int = 0
    """of its record; 0: none seen"""
    lost: bool = False
    unsure: bool = False
    sent_ns: int = 0
    order: int = 0
    """when it was sent, among all that was sent and answered in this world"""
    beside: Flight | None = None
    """of a read: the write under way whose range it reads"""


@dataclass
class Epoch:
    """A reign, as this world decided it."""

    number: int
    writer: bytes
    parent: Position
    given_up: bool = False


@dataclass
class Reign:
    """Of one writer, from an epoch on: records by seq."""

    first: int
    records: dict[int, Record]
    disks: Callable[[int], bytes] | None = None
    """of a base: the disks of the store's site, which it copies"""

    def record(self, header: Any) -> Record:
        """One of a base, by its header."""
        assert self.disks is not None
        kind, disk = int(header["kind"]), int(header["disk"])
        offset, length = int(header["offset"]), int(header["length"])
        data = self.disks(disk)[offset : offset + length] if kind in WRITES else b""
        flags = int(header["flags"])
        return Record(int(header["seq"]), kind, flags, disk, offset, length, data)


@dataclass
class Ledger:
    """What a target took, in order, and how much of it must be there after anything."""

    taken: list[tuple[int, int, int]] = field(default_factory=list)
    """(epoch, seq, kind)"""
    told: int = 0
    """the highest seq that it said was durable"""


@dataclass
class Salvage:
    """What a repair left of a history, at the position where it ended."""

    shown: Image
    """what the store shows of the disks"""
    truth: Image
    """what it showed before the loss"""
    behind: list[set[int]]
    """of each disk, the blocks of which records stood behind what was kept"""
    known: bool
    """whether it can be known what was lost"""


class Image:
    """Disks: what is in front of their end, and what lies behind it, which a larger size shows."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self._bytes = [bytearray(DISK_BYTES_MAX) for _ in sizes]

    def become(self, other: Image) -> None:
        self.sizes[:] = other.sizes
        self._bytes = [bytearray(data) for data in other._bytes]

    def put(self, disk: int, offset: int, data: bytes) -> None:
        self._bytes[disk][offset : offset + len(data)] = data

    def read(self, disk: int, size: int | None = None) -> bytearray:
        """A disk, or as much of it as another one of this size has."""
        return self._bytes[disk][: self.sizes[disk] if size is None else size]
