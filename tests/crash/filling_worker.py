"""A view that fills another disk in place, below forget.c; see test_filling_crash.py.

python filling_worker.py ROOT SEED
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
from pathlib import Path

from vrep._core.filter import Disk
from vrep._core.filter_driver import GroupDriver

UNIT, BLOCK, SIZE, VIEW = 4096, 65536, 20 * 65536 + 512, b"v" * 16
ONTO = "onto.raw"


def contents(seed: int) -> tuple[bytes, bytes]:
    """What the disk holds before, and what it is to hold: some of its units, and of the sectors of
    others, are another thing."""
    rng = random.Random(f"contents {seed}")
    before = rng.randbytes(SIZE)
    wanted = bytearray(before)
    for at in range(0, SIZE, UNIT):
        if rng.random() < 0.3:
            size = min(rng.choice([512, UNIT]), SIZE - at)
            wanted[at : at + size] = rng.randbytes(size)
    return before, bytes(wanted)


def open_view(directory: Path) -> GroupDriver:
    onto = f"file:{directory / ONTO}"
    disk = Disk("root", f"view:{directory / 'view'}", SIZE, onto=onto)
    return GroupDriver([disk], group_id=VIEW, tap=False)


def fill_some(group: GroupDriver, directory: Path, wanted: bytes, most: int) -> bool:
    """Compare what is absent next, and fill it; False when all is there."""
    miss = group.fill_next(0, 0, most)
    if miss is None:
        return False
    end = miss.offset + miss.length
    with (directory / ONTO).open("rb") as file:
        held = os.pread(file.fileno(), miss.length, miss.offset)
    parts = [
        (at, min(UNIT, end - at))
        for at in range(miss.offset, end, UNIT)
        if held[at - miss.offset :][:UNIT] != wanted[at : min(at + UNIT, end)]
    ]
    group.fill(miss, wanted[miss.offset : end], parts)
    return True


def main() -> None:
    root, seed = Path(sys.argv[1]), int(sys.argv[2])
    rng = random.Random(seed)
    _before, wanted = contents(seed)
    library = ctypes.CDLL(None)
    with open_view(root / "durable") as group:
        library.forget_mark(b"opened", ctypes.c_size_t(6))
        flushed = False
        while fill_some(group, root / "durable", wanted, BLOCK * rng.choice([1, 1, 2, 5])):
            if not flushed or rng.random() < 0.4:
                group.run("flush")
                flushed = True
                library.forget_mark(b"flushed", ctypes.c_size_t(7))


if __name__ == "__main__":
    main()
