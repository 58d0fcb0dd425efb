"""Memory for bulk data: page-aligned, in large pages where the system gives them."""

from __future__ import annotations

import contextlib
import mmap

__all__ = ["large_pages"]


def large_pages(count: int) -> mmap.mmap:
    """So many zero bytes; what is not touched costs nothing. Copying, encrypting and direct I/O
    take fewer faults and translations for each 2 MiB (madvise(2), MADV_HUGEPAGE)."""
    room = mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        room.madvise(mmap.MADV_HUGEPAGE)
    return room
