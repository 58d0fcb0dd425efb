"""Compare: what of a disk is proven to be what it was at a recovery point.

Each record of data carries, sealed, the hash of every 4 KiB unit that it covers whole, taken with
a secret of the group. What a disk holds is hashed with it and compared with the newest record of
each unit. Where no data were ever written, or zeroes since, the unit must be zero. All else is in
doubt: a unit without a hash, a part of one, a piece that does not open, a record that is not the
one that the index promises. The hashes of a record are never more than the one piece of data that
would be read and opened for a unit.

That the index names the newest record is believed here as it is by whoever fetches: see the limits
in docs/internals/recovery.md.

Sizes and offsets are bytes. Any number of threads may compare at once. Memory: 4 MiB of hashes.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections import OrderedDict
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vrep import errors
from vrep._core import layout, record
from vrep._core.hash import hash_blocks
from vrep._core.index import ExtentMap
from vrep.recovery.access import KeyAccess
from vrep.target.hashes import hash_piece, whole_blocks
from vrep.target.reader import StoreReader

__all__ = ["UNIT", "Comparer", "Runs", "runs_of", "units_of"]

UNIT: Final = layout.HASH_BLOCK_BYTES
HASH_BYTES: Final = 16
CACHE_BYTES: Final = 4 << 20
# magic .. seq, offset, length, body_bytes: see struct vrep_record
_FIELDS: Final = struct.Struct("<IBBHIHHQQIIQQHHI")
_PROMISED: Final = ("segment", "position", "epoch", "seq")
"""of an index: where a record stands, and which one it is"""

Runs = list[tuple[int, int]]
"""(offset, length), rising"""

log = logging.getLogger("vrep.recovery")


class _Known(NamedTuple):
    """Hashes of a record's whole units, authentic."""

    offset: int
    """of the first unit"""
    hashes: NDArray[np.uint8]


class Comparer:
    """Says what of a disk is proven to be what it was at the point of an extent map."""

    def __init__(self, reader: StoreReader, extents: ExtentMap, access: KeyAccess) -> None:
        self._reader = reader
        self._lane = reader.manifest.lane
        self._extents = extents
        self._streams = extents.streams
        self._access = access
        self._secrets: dict[int, bytes] = {}
        self._cache: OrderedDict[tuple[int, ...], _Known] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self.hash_bytes = 0
        """read of the store: sealed hashes, with their headers"""

    def differing(self, disk: int, offset: int, held: bytes | bytearray) -> Runs:
        """Runs of units in which nothing proves that what a disk holds at an offset, which begins a
        unit, is what it held at the point."""
        rows = units_of(held)
        data = self._extents.lookup(disk, offset, len(held))
        data = data[data["kind"] == layout.KIND_WRITE]
        used = rows.any(axis=1)
        # What no data show reads zero.
        right = ~used & ~_touched(data, offset, len(rows))
        if used.any():
            self._compare(disk, offset, held, data, right)
        return runs_of(~right, offset, len(held))

    def _compare(
        self, disk: int, offset: int, held: bytes | bytearray, data: Any, right: NDArray[np.bool_]
    ) -> None:
        mine: dict[int, NDArray[np.uint8]] = {}
        for at, start, end in whole_blocks(data).tolist():
            extent = data[at]
            known = self._hashes(disk, extent, start, end)
            if known is None:
                continue
            generation = int(self._streams[int(extent["stream"])]["key_generation"])
            if generation not in mine:
                mine[generation] = self._hashed(held, generation)
            blocks = slice((start - offset) // UNIT, (end - offset) // UNIT)
            first = (start - known.offset) // UNIT
            said = known.hashes[first : first + (end - start) // UNIT]
            right[blocks] = (mine[generation][blocks] == said).all(axis=1)

    def _hashed(self, held: bytes | bytearray, generation: int) -> NDArray[np.uint8]:
        """Hashes of what the disk holds, as a source makes them."""
        secret = self._secrets.get(generation)
        if secret is None:
            secret = self._secrets[generation] = self._access.hash_secret(generation)
        values = hash_blocks(held, UNIT, secret=secret).hashes
        return values.astype("<u8").view(np.uint8).reshape(-1, HASH_BYTES)

    def _hashes(self, disk: int, extent: Any, start: int, end: int) -> _Known | None:
        """Of the record of an extent, which cover a range; None when they prove nothing."""
        key = (*(int(extent[name]) for name in _PROMISED), disk)
        with self._lock:
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
        if known is None:
            try:
                known = self._open(disk, extent)
            except errors.VrepError as error:
                log.debug("hashes of segment %08x at byte %d: %s", *key[:2], error)
                return None
            if known is not None and known.hashes.nbytes > (end - start) // UNIT * HASH_BYTES:
                self._keep(key, known)
        if known is None or start < known.offset or start % UNIT or known.offset % UNIT:
            return None
        if end > known.offset + len(known.hashes) * UNIT:
            return None
        return known

    def _open(self, disk: int, extent: Any) -> _Known | None:
        place = int(extent["segment"]), int(extent["position"])
        found = hash_piece(self._reader, *place)
        if found is None:
            return None
        with self._lock:
            self.hash_bytes += len(found.header) + len(found.piece)
        record.check_header(found.header)
        epoch, lane, on_disk, seq, offset, length = _FIELDS.unpack(found.header)[4:10]
        promised = (int(extent["epoch"]), self._lane, disk, int(extent["seq"]))
        if (epoch, lane, on_disk, seq) != promised:
            return None
        blocks, first = record.hash_blocks(offset, length)
        if not blocks:
            return None
        room = bytearray(blocks * HASH_BYTES)
        opener = self._access.opener(self._streams[int(extent["stream"])])
        size = opener.piece(found.header, layout.PIECE_HASH, found.word, found.piece, room)
        if size != len(room):
            return None
        return _Known(offset + first, np.frombuffer(room, np.uint8).reshape(-1, HASH_BYTES))

    def _keep(self, key: tuple[int, ...], known: _Known) -> None:
        """Remember a record that is wider than what was asked for: its neighbours come next."""
        with self._lock:
            if key in self._cache:
                return
            self._cache[key] = known
            self._cached_bytes += known.hashes.nbytes
            while self._cached_bytes > CACHE_BYTES:
                _old, gone = self._cache.popitem(last=False)
                self._cached_bytes -= gone.hashes.nbytes


def units_of(data: bytes | bytearray) -> NDArray[np.uint64]:
    """As rows of one unit; the last one is filled up with zeroes."""
    if len(data) % UNIT:
        data = bytes(data) + bytes(-len(data) % UNIT)
    return np.frombuffer(data, np.uint64).reshape(-1, UNIT // 8)


def _touched(data: Any, offset: int, units: int) -> NDArray[np.bool_]:
    """Which units of a range some data lie in."""
    steps = np.zeros(units + 1, np.int64)
    starts = data["offset"].astype(np.int64) - offset
    np.add.at(steps, starts // UNIT, 1)
    np.add.at(steps, -(-(starts + data["length"].astype(np.int64)) // UNIT), -1)
    touched: NDArray[np.bool_] = np.cumsum(steps[:-1]) > 0
    return touched


def runs_of(wrong: NDArray[np.bool_], offset: int, length: int) -> Runs:
    """Runs of units, within a range whose last unit may be a part of one."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], wrong, [False]))))
    return [
        (offset + first * UNIT, min(last * UNIT, length) - first * UNIT)
        for first, last in edges.reshape(-1, 2).tolist()
    ]
