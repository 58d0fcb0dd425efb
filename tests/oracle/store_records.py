"""Records for tests of the store: sealed for real, many at a time, and what they say."""

from __future__ import annotations

import numpy as np

from vrep._core import layout, record
from vrep._core.seal import Sealer
from vrep.target.manifest import DiskEntry, EpochEntry, EpochState, Position
from vrep.target.store import StoreSpec

GROUP = bytes(range(16))
SITE = bytes(range(100, 116))
KEY = bytes(range(32))
DISK_BYTES = 1 << 30
EPOCH_1 = EpochEntry(1, EpochState.ACCEPTED, bytes([1]) * 16, SITE)


def spec(disk_bytes: int = DISK_BYTES) -> StoreSpec:
    return StoreSpec("shop", [DiskEntry("root", disk_bytes, 0)], EPOCH_1, [b"wrapped"])


class Feed:
    """One source: seals batches of writes, stream after stream."""

    def __init__(self, epoch: EpochEntry = EPOCH_1, seq: int = 0) -> None:
        self.epoch = epoch
        self.seq = seq
        self.wall_ns = 1_700_000_000_000_000_000
        self._streams = 0
        self._sealer: Sealer
        self.restart()

    def restart(self, seq: int | None = None) -> None:
        """Begin a new stream behind `seq`."""
        self.seq = self.seq if seq is None else seq
        self._streams += 1
        self._tallied = self.seq
        self.stream_id = bytes([self.epoch.epoch, self._streams]) * 8
        self._sealer = Sealer(KEY, self.stream_id, epoch=self.epoch.epoch, resume_seq=self.seq)

    def stream(self) -> bytes:
        body = np.zeros(1, layout.STREAM)
        body["epoch_id"] = np.frombuffer(self.epoch.epoch_id, np.uint8)
        body["key_generation"] = 1
        body["wall_ns"] = self.wall_ns
        body["parent"] = self.epoch.parent.raw
        out = bytearray(192)
        self._sealer.stream(body, out)
        return bytes(out)

    def headers(self, count: int, kind: int, offset: int, length: int, step: int) -> np.ndarray:
        rows = np.zeros(count, layout.RECORD)
        rows["kind"], rows["epoch"] = kind, self.epoch.epoch
        rows["seq"] = self.seq + 1 + np.arange(count)
        rows["offset"] = offset + step * np.arange(count)
        rows["length"] = length
        rows["wall_ns"] = self.wall_ns + 1000 * np.arange(1, count + 1)
        self.wall_ns += 1000 * count
        self.seq += count
        return rows

    def writes(
        self, count: int = 1, length: int = 4096, offset: int = 0, fill: int | None = None
    ) -> bytes:
        """Writes of neighbouring blocks; each holds its seq, or `fill`, over and over."""
        rows = self.headers(count, layout.KIND_WRITE, offset, length, length)
        data = [
            (int(seq) if fill is None else fill).to_bytes(8, "little") * (length // 8)
            for seq in rows["seq"]
        ]
        return self._seal(rows, data)

    def mark_gap(self, kind: int, *, jump_to: int | None = None) -> bytes:
        """A gap-begin or gap-end; a jump leaves seqs out."""
        if jump_to is not None:
            self.seq = jump_to - 1
        rows = self.headers(1, kind, 0, 0, 0)
        if jump_to is not None:
            rows["flags"] = layout.RECORD_JUMP
        return self._seal(rows, [None])

    def zeroes(self, offset: int, length: int) -> bytes:
        return self._seal(self.headers(1, layout.KIND_ZEROES, offset, length, 0), [None])

    def resize(self, size: int) -> bytes:
        return self._seal(self.headers(1, layout.KIND_RESIZE, size, 0, 0), [None])

    def tally(self) -> bytes:
        """A tally, or nothing where the stream holds nothing new to tally."""
        if self._tallied == self.seq:
            return b""
        self._tallied = self.seq
        out = bytearray(256)
        return bytes(out[: self._sealer.tally(out, wall_ns=self.wall_ns)])

    def _seal(self, rows: np.ndarray, payloads: list[bytes | None]) -> bytes:
        bound = sum(
            record.bound(int(row["kind"]), int(row["offset"]), int(row["length"])) for row in rows
        )
        out = bytearray(bound)
        written, done = self._sealer.seal(rows, payloads, out)
        assert done == len(rows)
        return bytes(out[:written])

    @property
    def position(self) -> Position:
        return Position(self.epoch.epoch, 0, self.seq)


def seqs(buffer: bytes) -> list[int]:
    """Seqs of the records that consume one."""
    found, consumed = record.scan(buffer)
    assert consumed == len(buffer)
    headers = found["header"]
    solid = (headers["kind"] != layout.KIND_STREAM) & (headers["kind"] != layout.KIND_TALLY)
    return [int(seq) for seq in headers["seq"][solid]]
