"""Disk images for the measurements, warm in the page cache as single pages.

An image that is written, or read ahead, in large pieces lies in the page cache in folios of
up to megabytes. On ext4 a later write of 4 KiB walks every block of its folio (28 to 44 us
of CPU on kernel 6.18, in place of 1.5), whichever server makes it: every comparison would
then measure this walk. So images are written in 4 KiB, unless a row says otherwise.
"""

from __future__ import annotations

import os
from pathlib import Path

BLOCK = 4096
PIECE = 1 << 20


def make(path: Path, size: int, *, full: float = 1.0, step: int = BLOCK) -> int:
    """Random bytes over a share of the image, spread evenly in pieces of 1 MiB and written
    in `step`; the rest are holes. Nothing waits to be written back when this returns. How
    many bytes were written."""
    pool = bytearray(os.urandom(PIECE))
    written = 0
    with path.open("wb") as file:
        file.truncate(size)
        for at in range(0, size, PIECE):
            if written >= (at + PIECE) * full:
                continue
            for inner in range(0, PIECE, BLOCK):  # stamped: no two blocks are alike
                pool[inner : inner + 8] = (at + inner).to_bytes(8)
            for inner in range(0, PIECE, step):
                os.pwrite(file.fileno(), memoryview(pool)[inner : inner + step], at + inner)
            written += PIECE
        os.fsync(file.fileno())
    return written
