"""What a power loss could leave of a directory, rebuilt from the log of forget.c.

Each sector (512 bytes) of a file holds, after the loss, what it held at the last sync that ended,
or what any later write made of it: each sector by itself. The same goes for a file's size. A name
that was made, changed or taken away without a sync of its directory may be as it was before; a
rename is one change.
"""

from __future__ import annotations

import copy
import random
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SECTOR = 512
HEADER = struct.Struct("<IIIIQQQQ")
MAGIC = 0x54474F46
CREATE, WRITE, TRUNCATE, ZERO, RENAME, UNLINK, SYNC_BEGIN, SYNC_END, MARK, LINK = range(1, 11)
DSYNC = 1


def compile_shim(directory: Path) -> Path:
    library = directory / "forget.so"
    options = [
        "-std=c11",
        "-D_GNU_SOURCE",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O1",
        "-fPIC",
        "-shared",
    ]
    subprocess.run(["cc", *options, "-o", library, HERE / "forget.c"], check=True)
    return library


class Entry(NamedTuple):
    kind: int
    flags: int
    sync: int
    inode: int
    offset: int
    length: int
    data: bytes


def read_log(path: Path) -> Iterator[Entry]:
    """The entries; the last may be torn, when the process was killed."""
    log = path.read_bytes()
    at = 0
    while at + HEADER.size <= len(log):
        magic, kind, flags, sync, inode, offset, length, size = HEADER.unpack_from(log, at)
        assert magic == MAGIC, f"no entry at {at}"
        at += HEADER.size
        if at + size > len(log):
            return
        yield Entry(kind, flags, sync, inode, offset, length, log[at : at + size])
        at += size


@dataclass
class File:
    """One inode: what is stable, and what each sector and the size were since."""

    live: bytearray = field(default_factory=bytearray)
    stable: bytearray = field(default_factory=bytearray)
    stable_size: int = 0
    sectors: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, content: bytes) -> File:
        return cls(bytearray(content), bytearray(content), len(content))

    def resize(self, number: int, size: int) -> None:
        if size == len(self.live):
            return
        if size < len(self.live):
            self.write(number, size, bytes(len(self.live) - size))
            del self.live[size:]
        else:
            self.live.extend(bytes(size - len(self.live)))
        self.sizes.append((number, size))

    def write(self, number: int, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if end > len(self.live):
            self.resize(number, end)
        self.live[offset:end] = data
        for sector in range(offset // SECTOR, -(-end // SECTOR)):
            now = bytes(self.live[sector * SECTOR : (sector + 1) * SECTOR]).ljust(SECTOR, b"\0")
            self.sectors.setdefault(sector, []).append((number, now))

    def settle(self, before: int, first: int = 0, last: int | None = None) -> None:
        """What stood before entry ``before``, in sectors [first, last), is stable."""
        for sector in list(self.sectors):
            if sector < first or (last is not None and sector >= last):
                continue
            old = [content for number, content in self.sectors[sector] if number <= before]
            if old:
                self.store(sector, old[-1])
            self.sectors[sector] = [one for one in self.sectors[sector] if one[0] > before]
            if not self.sectors[sector]:
                del self.sectors[sector]
        for number, size in self.sizes:
            if number <= before:
                self.stable_size = size
        self.sizes = [one for one in self.sizes if one[0] > before]

    def store(self, sector: int, content: bytes) -> None:
        end = (sector + 1) * SECTOR
        if len(self.stable) < end:
            self.stable.extend(bytes(end - len(self.stable)))
        self.stable[end - SECTOR : end] = content

    def after_loss(self, rng: random.Random) -> bytes:
        keep = rng.choice([0.0, 0.2, 0.5, 0.9, 1.0])
        left = copy.copy(self)
        left.stable = bytearray(self.stable)
        for sector, versions in self.sectors.items():
            if rng.random() < keep:
                left.store(sector, rng.choice(versions)[1])
        size = self.stable_size
        if self.sizes and rng.random() < 0.7:
            size = rng.choice(self.sizes)[1]
        return bytes(left.stable[:size]).ljust(size, b"\0")


def write_sparse(path: Path, content: bytes, step: int = 65536) -> None:
    nothing = bytes(step)
    with path.open("wb") as file:
        for at in range(0, len(content), step):
            if content[at : at + step] != nothing:
                file.seek(at)
                file.write(content[at : at + step])
        file.truncate(len(content))


class Storage:
    """A directory (flat), from its first content on, entry by entry."""

    def __init__(self, directory: Path) -> None:
        self.files: dict[int, File] = {}
        self.names: dict[str, int] = {}
        self.directory = directory.stat().st_ino
        for path in directory.iterdir():
            inode = path.stat().st_ino
            self.files[inode] = File.of(path.read_bytes())
            self.names[path.name] = inode
        self.live = dict(self.names)
        self.changes: list[tuple[int, dict[str, int | None]]] = []
        self.syncs: dict[int, tuple[int, Entry]] = {}
        self.number = 0

    def rename(self, change: dict[str, int | None]) -> None:
        self.changes.append((self.number, change))
        self.give(self.live, change)

    @staticmethod
    def give(names: dict[str, int], change: dict[str, int | None]) -> None:
        for name, inode in change.items():
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode

    def apply(self, entry: Entry) -> None:
        self.number += 1
        if entry.kind == CREATE:
            self.files[entry.inode] = File()
            self.rename({entry.data.decode(): entry.inode})
        elif entry.kind == WRITE:
            self.files[entry.inode].write(self.number, entry.offset, entry.data)
            if entry.flags & DSYNC:
                self.syncs[entry.sync] = (self.number, entry)
        elif entry.kind == TRUNCATE:
            self.files[entry.inode].resize(self.number, entry.length)
        elif entry.kind == ZERO:
            file = self.files[entry.inode]
            size = max(0, min(entry.length, len(file.live) - entry.offset))
            file.write(self.number, entry.offset, bytes(size)) if size else None
        elif entry.kind == RENAME:
            old, new = entry.data.decode().split("\n")
            self.rename({old: None, new: self.live[old]})
        elif entry.kind == LINK:
            old, new = entry.data.decode().split("\n")
            self.rename({new: self.live[old]})
        elif entry.kind == UNLINK:
            self.rename({entry.data.decode(): None})
        elif entry.kind == SYNC_BEGIN:
            self.syncs[entry.sync] = (self.number, entry)
        elif entry.kind == SYNC_END:
            self.settle(*self.syncs.pop(entry.sync))

    def settle(self, before: int, entry: Entry) -> None:
        if entry.kind == WRITE:
            first, end = entry.offset // SECTOR, entry.offset + len(entry.data)
            self.files[entry.inode].settle(before, first, -(-end // SECTOR))
        elif entry.inode == self.directory:
            for number, change in self.changes:
                if number <= before:
                    self.give(self.names, change)
            self.changes = [one for one in self.changes if one[0] > before]
        else:
            self.files[entry.inode].settle(before)

    def after_loss(self, directory: Path, rng: random.Random) -> None:
        """Write what may be left into an empty directory."""
        names = dict(self.names)
        ordered = rng.random() < 0.5
        for _, change in self.changes:
            if rng.random() < 0.5:
                self.give(names, change)
            elif ordered:
                break
        directory.mkdir()
        for name, inode in names.items():
            write_sparse(directory / name, self.files[inode].after_loss(rng))
