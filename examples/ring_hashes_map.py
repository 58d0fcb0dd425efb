"""The native parts alone: the ring, block hashes and the change map, without any site.

A producer publishes changes of a small "disk" in a shared-memory ring, and marks what it changes
in a change map. A consumer, which could be another process, reads the records in their order,
applies them to a copy, and reports what it holds; the map's bits are cleared only by that report.
Hashes tell which blocks differ on the way.

    python examples/ring_hashes_map.py
"""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path

import numpy as np

from vrep._core import layout
from vrep._core.hash import hash_blocks
from vrep._core.map import ChangeMap
from vrep._core.ring import TARGET, RingProducer, RingReader

DISK_BYTES = 4 << 20
BIT_BYTES = 65536
WRITES = 200
GROUP = os.urandom(16)


def differing(a: bytearray, b: bytearray) -> int:
    """How many 4 KiB blocks differ."""
    left, right = hash_blocks(a, 4096).hashes, hash_blocks(b, 4096).hashes
    return int(np.any(left != right, axis=1).sum())


def example(directory: Path) -> None:
    """Publish, follow, compare."""
    disk, copy = bytearray(DISK_BYTES), bytearray(DISK_BYTES)
    rng = random.Random(1)
    ring_path = directory / "ring"
    with (
        RingProducer.create(ring_path, group_id=GROUP, descriptors=1024) as producer,
        ChangeMap.create(directory / "map", [DISK_BYTES], bit_bytes=BIT_BYTES) as changes,
    ):
        consumer = producer.consumer(role=TARGET, target_id=os.urandom(16), durable=0)
        with RingReader(ring_path, *(os.dup(fd) for fd in consumer.fds)) as reader:
            for _ in range(WRITES):
                offset, data = (
                    rng.randrange(DISK_BYTES - 9000),
                    rng.randbytes(rng.randrange(1, 9000)),
                )
                generation = changes.mark(0, offset, len(data))  # first the mark,
                disk[offset : offset + len(data)] = data  # then the write,
                seq = producer.publish(layout.KIND_WRITE, data, offset=offset)  # then the record
                changes.raise_seq(generation, seq)
                changes.done(generation)
            print(f"{WRITES} writes: {differing(disk, copy)} blocks differ from the copy,")
            print(f"the map says {changes.dirty_bytes} bytes may")

            for record in reader.descriptors(reader.released + 1, reader.head):
                at = int(record["offset"])
                for piece in reader.payload(record):
                    copy[at : at + len(piece)] = piece
                    at += len(piece)
            del record, piece  # views of the ring's memory: it cannot be unmapped under them
            assert differing(disk, copy) == 0

            # The follower holds everything: its report frees the ring and clears the map.
            reader.set(durable=reader.head)
            consumer.poll()
            producer.release(consumer.durable)
            changes.seal(producer.head)
            changes.clear(consumer.durable)
            assert changes.dirty_bytes == 0
            assert producer.released == reader.head
    print("followed: no block differs, the map is empty, the ring is free")


def main() -> None:
    base = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=base if base.is_dir() else None) as directory:
        example(Path(directory))


if __name__ == "__main__":
    main()
