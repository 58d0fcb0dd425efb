"""A laboratory for recovery: a site with a store, written by a source that the test plays, and
a plain model of what every disk held at every position. Load it by its path."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vrep._core import layout
from vrep._core.seal import Sealer
from vrep.keys.datakey import DataKey
from vrep.keys.identity import SiteIdentity
from vrep.keys.tenant import TenantKeyring
from vrep.lanes import lane_of
from vrep.paths import SitePaths
from vrep.recovery.view import points_in_use
from vrep.target.manifest import DiskEntry, EpochEntry, EpochState, Position
from vrep.target.store import GroupStore, StoreOptions, StoreSpec

NS = 1_000_000_000
START_NS = 1_800_000_000 * NS


@dataclass
class Change:
    """What one record did."""

    position: Position
    wall_ns: int
    kind: int
    disk: int = 0
    offset: int = 0
    length: int = 0
    data: bytes = b""


@dataclass
class Lab:
    """One group in one store."""

    root: Path
    disks: list[DiskEntry]
    rng: random.Random
    level: int = 1
    segment_bytes: int = 1 << 20
    merge: bool = True
    """whether the store merges and folds by itself"""
    hold: bool = True
    """whether folds ask for the points of views"""
    name: str = "web"
    group_id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    source_id: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    changes: list[Change] = field(default_factory=list)
    seq: int = 0
    wall_ns: int = START_NS
    pending: int = 0
    """bytes appended since they were committed last"""

    def __post_init__(self) -> None:
        self.paths = SitePaths(self.root)
        if not (self.root / "identity").exists():
            self.identity = SiteIdentity.create(self.root, "backup")
        ring = TenantKeyring(self.root)
        if "acme" not in ring.names():
            ring.create("acme")
        self.tenant = ring.get("acme")
        self.key = DataKey.create(self.group_id)
        self.epoch = EpochEntry(
            1, EpochState.ACCEPTED, secrets.token_bytes(16), self.source_id, Position(), START_NS
        )
        spec = StoreSpec(self.name, self.disks, self.epoch, [self.key.wrap(self.tenant)])
        self.store: GroupStore | None = self._open(spec)
        self.start_stream()

    def _open(self, create: StoreSpec | None = None) -> GroupStore:
        options = StoreOptions(
            commit_s=0.001,
            segment_bytes=self.segment_bytes,
            reserve_bytes=0,
            merge=self.merge,
            held=lambda group_id: points_in_use(self.paths, group_id) if self.hold else [],
        )
        return GroupStore.open(self.paths.store, self.group_id, create=create, options=options)

    def open(self) -> None:
        assert self.store is None
        self.store = self._open()

    def close(self) -> None:
        if self.store is not None:
            self.store.commit()
            self.store.close()
            self.store = None

    # ---- writing ---------------------------------------------------------------

    def start_stream(self) -> None:
        """A source that starts: a new stream of the present epoch."""
        stream_id = secrets.token_bytes(16)
        self.sealer = Sealer(
            self.key.stream_key(stream_id),
            stream_id,
            epoch=self.epoch.epoch,
            lane=lane_of(self.name),
            resume_seq=self.seq,
            secret=self.key.hash_secret(),
            level=self.level,
        )
        body = np.zeros((), layout.STREAM)
        body["epoch_id"] = np.frombuffer(self.epoch.epoch_id, np.uint8)
        body["parent"] = self.epoch.parent.raw
        body["key_generation"], body["wall_ns"] = 1, self.wall_ns
        room = bytearray(1024)
        count = self.sealer.stream(body, room)
        assert self.store is not None
        self.store.append(bytes(room[:count]))

    def new_epoch(self, entry: EpochEntry) -> None:
        """Go on as the writer of an epoch that the store knows."""
        self.epoch = entry
        self.seq = entry.parent.seq
        self.start_stream()

    def record(
        self,
        kind: int,
        disk: int = 0,
        offset: int = 0,
        data: bytes = b"",
        *,
        length: int | None = None,
        flags: int = 0,
        step_ns: int = NS // 100,
        jump: int = 0,
    ) -> Position:
        """Seal and append one record."""
        self.seq += 1 + jump
        self.wall_ns += step_ns
        size = len(data) if length is None else length
        header = np.zeros(1, layout.RECORD)
        header["kind"], header["flags"], header["disk"] = kind, flags, disk
        header["seq"], header["offset"], header["length"] = self.seq, offset, size
        header["wall_ns"], header["mono_ns"] = self.wall_ns, self.seq
        room = bytearray(len(data) + len(data) // 64 + 65536)
        written, done = self.sealer.seal(header, [data if data else None], room)
        assert done == 1
        written += self.sealer.tally(memoryview(room)[written:], wall_ns=self.wall_ns)
        assert self.store is not None
        self.store.append(bytes(room[:written]))
        self.pending += written
        if self.pending >= self.segment_bytes // 8:
            # A commit is never divided: one of all, on a slow machine, were a single segment.
            self.store.commit()
            self.pending = 0
        position = Position(self.epoch.epoch, lane_of(self.name), self.seq)
        self.changes.append(Change(position, self.wall_ns, kind, disk, offset, size, data))
        return position

    def write(self, disk: int, offset: int, data: bytes, kind: int = layout.KIND_WRITE) -> Position:
        return self.record(kind, disk, offset, data)

    def zeroes(self, disk: int, offset: int, length: int) -> Position:
        return self.record(layout.KIND_ZEROES, disk, offset, length=length)

    def bytes_of(self, disk: int) -> int:
        """The size that a disk has where the writer is now."""
        return self._sizes(self._here())[disk]

    def _here(self) -> list[tuple[int, int]]:
        assert self.store is not None
        return self.store.manifest.ancestry(Position(self.epoch.epoch, 0, self.seq))

    def _sizes(self, ancestry: list[tuple[int, int]]) -> list[int]:
        reach, sizes = dict(ancestry), [disk.bytes for disk in self.disks]
        for change in sorted(self.changes, key=lambda c: c.position):
            visible = change.position.seq <= reach.get(change.position.epoch, 0)
            if change.kind == layout.KIND_RESIZE and visible:
                sizes[change.disk] = change.offset
        return sizes

    def resize(self, disk: int, size: int) -> Position:
        """As a filter does: what a disk gains is zeroes, before it has it."""
        was = self.bytes_of(disk)
        if size > was:
            self.zeroes(disk, was, size - was)
        return self.record(layout.KIND_RESIZE, disk, size)

    def random_resize(self) -> Position:
        disk = self.rng.randrange(len(self.disks))
        most = self.disks[disk].bytes * 5 // 4 // 512
        return self.resize(disk, 512 * self.rng.randrange(1, most))

    def gap_begin(self, jump: int = 0) -> Position:
        flags = layout.RECORD_JUMP if jump else 0
        return self.record(layout.KIND_GAP_BEGIN, flags=flags, jump=jump)

    def gap_end(self) -> Position:
        return self.record(layout.KIND_GAP_END)

    def mark(self, label: str) -> Position:
        text = label.encode()
        body = np.zeros((), np.dtype([("wall_ns", "<u8"), ("version", "<u2"), ("n", "<u2"),
                                      ("flags", "<u4")]))  # fmt: skip
        body["wall_ns"], body["version"], body["n"] = self.wall_ns, 1, len(text)
        return self.record(layout.KIND_MARK, data=body.tobytes() + text)

    def cut_mark(
        self, cut_id: bytes, at: Sequence[tuple[int, int, int]] = (), label: str = ""
    ) -> Position:
        """A lane's part in a cut, or with positions the record that completes one."""
        text, mark = label.encode(), np.zeros((), layout.MARK)
        mark["wall_ns"], mark["version"], mark["label_bytes"] = self.wall_ns, 2, len(text)
        cut = np.zeros((), layout.CUT)
        cut["cut_id"], cut["lanes"] = np.frombuffer(cut_id, np.uint8), len(at)
        lanes = np.zeros(len(at), layout.POSITION)
        for row, (epoch, lane, seq) in zip(lanes, at, strict=True):
            row["epoch"], row["lane"], row["seq"] = epoch, lane, seq
        body = mark.tobytes() + cut.tobytes() + lanes.tobytes() + text
        return self.record(layout.KIND_MARK, data=body)

    def commit(self) -> Position:
        assert self.store is not None
        return self.store.commit()

    def sync(self) -> None:
        """A first sync that found nothing: the history can be recovered from here."""
        self.gap_begin()
        self.gap_end()

    def random_write(self) -> Position:
        """Something a guest might do."""
        disk = self.rng.randrange(len(self.disks))
        size = self.bytes_of(disk)
        shape = self.rng.random()
        if shape < 0.7:
            length = self.rng.choice([512, 4096, 4096, 4096, 8192, 65536])
        elif shape < 0.9:
            length = self.rng.randrange(1, 20000)
        else:
            length = self.rng.randrange(100_000, 600_000)
        length = min(length, size)
        offset = self.rng.randrange(size - length + 1)
        if self.rng.random() < 0.7:
            offset -= offset % 4096
        if self.rng.random() < 0.15:
            return self.zeroes(disk, offset, length)
        data = self.rng.randbytes(length)
        if self.rng.random() < 0.3:
            data = bytes([self.rng.randrange(256)]) * length
        kind = layout.KIND_SYNC if self.rng.random() < 0.1 else layout.KIND_WRITE
        return self.write(disk, offset, data, kind)

    # ---- the model ---------------------------------------------------------------

    def model(self, ancestry: list[tuple[int, int]]) -> list[bytearray]:
        """What the disks hold at the end of an ancestry."""
        reach = dict(ancestry)
        found = [bytearray(disk.bytes * 2) for disk in self.disks]
        line = [c for c in self.changes if c.position.seq <= reach.get(c.position.epoch, 0)]
        for change in sorted(line, key=lambda c: c.position):
            if change.kind in (layout.KIND_WRITE, layout.KIND_SYNC):
                end = change.offset + change.length
                found[change.disk][change.offset : end] = change.data
            elif change.kind in (layout.KIND_ZEROES, layout.KIND_SYNC_ZEROES):
                end = change.offset + change.length
                found[change.disk][change.offset : end] = bytes(change.length)
        sizes = self._sizes(ancestry)
        return [content[:size] for content, size in zip(found, sizes, strict=True)]

    def at(self, position: Position) -> list[bytearray]:
        assert self.store is not None
        return self.model(self.store.manifest.ancestry(position))


def grow(lab: Lab) -> list[Position]:
    """A history with everything that happens: several segments, streams, gaps, marks, sizes, a
    failover that was rolled back and one that was kept. Returns recoverable positions."""
    rng = lab.rng
    assert lab.store is not None
    good: list[Position] = []

    def live(count: int) -> None:
        for _ in range(count):
            good.append(lab.random_write())
            if rng.random() < 0.04:
                good.append(lab.random_resize())
            if rng.random() < 0.05:
                good.append(lab.mark(f"mark {len(good)}"))
            if rng.random() < 0.1:
                lab.commit()
            if rng.random() < 0.02:
                lab.start_stream()

    lab.gap_begin()
    for _ in range(10):
        lab.random_write()
    good.append(lab.gap_end())
    live(60)
    lab.gap_begin(jump=rng.randrange(50))
    for _ in range(10):
        lab.random_write()
    good.append(lab.gap_end())
    live(40)
    lab.close()
    lab.open()
    lab.start_stream()
    live(20)
    lab.commit()
    # rolled back: the old writer goes on behind all it wrote
    given_up = lab.store.add_epoch(
        writer=b"o" * 16, parent=rng.choice(good), state=EpochState.PROVISIONAL
    )
    lab.new_epoch(lab.store.roll_back_epoch(given_up.epoch))
    live(30)
    # kept: what the parent wrote after the point is not in the line any more
    lab.commit()
    parent = rng.choice(good[len(good) // 2 :])
    lab.new_epoch(lab.store.add_epoch(writer=b"n" * 16, parent=parent))
    live(40)
    lab.commit()
    return good


class Nbd:
    """A small NBD client: enough to read and write what a view serves."""

    def __init__(self, socket_path: str, export: str = "") -> None:
        import socket
        import struct

        self._struct = struct
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(60)
        self._socket.connect(socket_path)
        magic, option_magic, _flags = struct.unpack(">QQH", self._take(18))
        assert (magic, option_magic) == (0x4E42444D41474943, 0x49484156454F5054)
        name = export.encode()
        # EXPORT_NAME, without zeroes
        self._socket.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, len(name)) + name)
        self.size, self.flags = struct.unpack(">QH", self._take(10))
        self._cookie = 0

    def _take(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            part = self._socket.recv(count - len(parts))
            assert part, "the server closed the connection"
            parts += part
        return bytes(parts)

    def _ask(self, kind: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> bytes:
        self._cookie += 1
        self._socket.sendall(
            self._struct.pack(">IHHQQI", 0x25609513, flags, kind, self._cookie, offset, length)
            + data
        )
        magic, error, cookie = self._struct.unpack(">IIQ", self._take(16))
        assert (magic, cookie) == (0x67446698, self._cookie)
        if error:
            raise OSError(error, "NBD")
        return self._take(length) if kind == 0 else b""

    def read(self, offset: int, length: int) -> bytes:
        return self._ask(0, offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self._ask(1, offset, len(data), data)

    def flush(self) -> None:
        self._ask(3, 0, 0)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Nbd:
        return self

    def __exit__(self, *_exc: Any) -> None:
        self.close()
