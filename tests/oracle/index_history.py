"""Random histories of a group as records, for the oracles of index and extent map."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from vrep._core import layout, record
from vrep._core.index import Index, IndexBuilder

GROUP = bytes(range(16))
PIECE = layout.PIECE_BYTES_MAX
DISK_BYTES = 700_000
DATA = {layout.KIND_WRITE, layout.KIND_SYNC}
ZEROES = {layout.KIND_ZEROES, layout.KIND_SYNC_ZEROES}


@dataclass
class Change:
    """One record as the oracle knows it."""

    kind: int
    epoch: int
    seq: int
    disk: int = 0
    offset: int = 0
    length: int = 0
    segment: int = 0
    position: int = 0
    stream_id: bytes = b""

    def raw(self) -> bytes:
        """Header and a body of pieces that look compressed."""
        pieces = 0
        body = b""
        length = self.length
        if self.kind in DATA:
            plain = [min(PIECE, length - at) for at in range(0, length, PIECE)]
            words = [17 | (layout.PIECE_ZSTD if size > 1 else 0) for size in plain]
            pieces = len(plain)
            body = np.array(words, "<u4").tobytes() + bytes(17 * pieces)
        elif self.kind == layout.KIND_MARK:
            pieces, length = 1, 20
            body = np.uint32(36).tobytes() + bytes(36)
        header = np.zeros(1, layout.RECORD)
        header["magic"], header["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
        header["kind"], header["epoch"], header["seq"] = self.kind, self.epoch, self.seq
        header["disk"], header["offset"], header["length"] = self.disk, self.offset, length
        header["pieces"], header["body_bytes"] = pieces, len(body)
        header["wall_ns"] = 1_000 * self.seq
        record.finish(header)
        return header.tobytes() + body


def stream_record(epoch: int, stream_id: bytes, resume_seq: int) -> bytes:
    body = np.zeros((), layout.STREAM)
    body["stream_id"] = np.frombuffer(stream_id, np.uint8)
    body["epoch_id"] = epoch
    body["epoch"], body["resume_seq"], body["key_generation"] = epoch, resume_seq, 1
    return record.stream_record(body)


@dataclass
class History:
    changes: list[Change] = field(default_factory=list)
    parents: dict[int, tuple[int, int]] = field(default_factory=dict)  # epoch: (parent, seq)
    builders: list[IndexBuilder] = field(default_factory=list)

    def ancestry(self, epoch: int, seq: int) -> list[tuple[int, int]]:
        chain = [(epoch, seq)]
        while epoch in self.parents:
            epoch, seq = self.parents[epoch]
            chain.append((epoch, seq))
        return chain

    def visible(self, ancestry: list[tuple[int, int]]) -> list[Change]:
        limit = dict(ancestry)
        seen = [c for c in self.changes if c.seq <= limit.get(c.epoch, 0)]
        return sorted(seen, key=lambda change: (change.epoch, change.seq))

    def winners(self, disk: int, ancestry: list[tuple[int, int]]) -> np.ndarray:
        """For each byte of the disk the number of the change that it comes from, or -1."""
        rows = np.full(DISK_BYTES, -1, np.int64)
        number = {id(change): i for i, change in enumerate(self.changes)}
        for change in self.visible(ancestry):
            if change.disk == disk and change.kind in DATA | ZEROES:
                rows[change.offset : change.offset + change.length] = number[id(change)]
        return rows

    def indexes(self) -> list[Index]:
        return [builder.freeze() for builder in self.builders]


small = st.integers(1, 70_000)
lengths = st.one_of(
    st.integers(1, 600), st.integers(1, 40).map(lambda n: n * 512), small, st.integers(1, 400_000)
)
offsets = st.one_of(
    st.integers(0, DISK_BYTES - 1),
    st.integers(0, DISK_BYTES // 4096 - 1).map(lambda n: n * 4096),
    st.sampled_from([0, 4096, PIECE, 2 * PIECE]),
)
kinds = st.sampled_from(
    [layout.KIND_WRITE] * 6
    + [layout.KIND_SYNC, layout.KIND_ZEROES, layout.KIND_ZEROES, layout.KIND_SYNC_ZEROES]
    + [layout.KIND_MARK, layout.KIND_GAP_BEGIN, layout.KIND_GAP_END]
)
# kind, disk, offset, length, what comes before: 0 nothing, 1 a stream, 2 a segment, 3 an epoch
steps = st.tuples(
    kinds, st.integers(0, 1), offsets, lengths, st.sampled_from([0] * 12 + [1, 2, 2, 3])
)


@st.composite
def histories(draw: st.DrawFn, max_size: int = 60) -> History:
    history = History()
    epoch, seq, streams = 1, 0, 0
    builder, position = IndexBuilder(1, GROUP), 128
    history.builders.append(builder)
    stream_id = b""

    def put(raw: bytes) -> None:
        nonlocal position
        assert builder.add(raw, position) == 1
        position += len(raw)

    for kind, disk, offset, length, before in draw(st.lists(steps, max_size=max_size)):
        if before == 3 and seq:
            # a failover: the new epoch leaves its parent at some earlier position
            known = [c for c in history.changes if c.epoch == epoch]
            at = draw(st.sampled_from(known)).seq if known else seq
            history.parents[epoch + 1] = (epoch, at)
            epoch, seq = epoch + 1, at
        if before == 2:
            builder = IndexBuilder(builder.segment + 1, GROUP, builder.stream)
            history.builders.append(builder)
            position = 128
        if before in (1, 3) or not stream_id:
            streams += 1
            stream_id = streams.to_bytes(16, "big")
            put(stream_record(epoch, stream_id, seq))
        seq += 1
        change = Change(kind, epoch, seq, segment=builder.segment, position=position)
        change.stream_id = stream_id
        if kind in DATA | ZEROES:
            change.disk, change.offset = disk, offset
            change.length = min(length, DISK_BYTES - offset)
        put(change.raw())
        history.changes.append(change)
        if seq % 5 == 0:
            builder.time(1_000 * seq, epoch, 0, seq)
    return history
