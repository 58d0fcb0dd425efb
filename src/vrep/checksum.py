"""The 32-bit checksum of every header and slot that vrep stores, as `format/checksum.h` has it
(docs/internals/formats.md)."""

from __future__ import annotations

from typing import Final

import xxhash

__all__ = ["CHECKSUM_BYTES", "checksum32"]

CHECKSUM_BYTES: Final = 4
"""at the end of what it is of, little-endian"""
_SEED: Final = 0x76726570


def checksum32(data: bytes | bytearray | memoryview) -> int:
    """The low half of XXH3-64 with vrep's seed."""
    return xxhash.xxh3_64_intdigest(data, seed=_SEED) & 0xFFFFFFFF
