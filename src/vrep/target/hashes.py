"""Hashes: which record's sealed hashes tell of which 4 KiB of a disk, and where they are stored.

Nothing is opened here. Sizes and offsets are bytes.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple

import numpy as np

from vrep._core import layout
from vrep.target.reader import StoreReader

__all__ = ["HashPiece", "hash_piece", "whole_blocks"]

BLOCK: Final = layout.HASH_BLOCK_BYTES
SEALED_BYTES_MIN: Final = 32
"""one hash and its tag"""
_HEADER: Final = layout.RECORD.itemsize
_WORD: Final = struct.Struct("<I")
# magic .. seq, offset, length, body_bytes: see struct vrep_record
_FIELDS: Final = struct.Struct("<IBBHIHHQQIIQQHHI")


class HashPiece(NamedTuple):
    """The sealed hashes of a record, as they are stored."""

    header: bytes
    """of the record"""
    word: int
    piece: bytes


def whole_blocks(extents: Any) -> Any:
    """Runs of whole blocks of which one record is the newest: rows of (first extent, offset,
    end). Neighbouring extents of one record, which pieces cut, are one."""
    if not len(extents):
        return np.zeros((0, 3), np.uint64)
    ends = extents["offset"] + extents["length"]
    broken = (
        (extents["segment"][1:] != extents["segment"][:-1])
        | (extents["position"][1:] != extents["position"][:-1])
        | (extents["offset"][1:] != ends[:-1])
    )
    starts = np.concatenate(([0], np.flatnonzero(broken) + 1))
    lasts = np.concatenate((starts[1:], [len(extents)])) - 1
    first = (extents["offset"][starts] + np.uint64(BLOCK - 1)) // np.uint64(BLOCK)
    end = ends[lasts] // np.uint64(BLOCK)
    rows = np.stack((starts.astype(np.uint64), first * np.uint64(BLOCK), end * np.uint64(BLOCK)), 1)
    return rows[first < end]


def hash_piece(
    reader: StoreReader, segment: int, position: int, most: int = layout.WRITE_BYTES_MAX
) -> HashPiece | None:
    """The hashes of the record at a place of the store; None when it has none, or they take more
    than so many bytes."""
    header = reader.read(segment, position, _HEADER)
    fields = _FIELDS.unpack(header)
    flags, body, pieces = fields[3], fields[10], fields[13]
    if not flags & layout.RECORD_HASHED:
        return None
    last = reader.read(segment, position + _HEADER + 4 * (pieces - 1), 4)
    word: int = _WORD.unpack(last)[0]
    size = word & layout.PIECE_LENGTH_MASK
    if not SEALED_BYTES_MIN <= size <= min(body, most):
        return None
    piece = reader.read(segment, position + _HEADER + body - size, size)
    return HashPiece(bytes(header), word, bytes(piece))
