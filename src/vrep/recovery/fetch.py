"""Fetch: the bytes of a group's disks at one recovery point.

Every piece is authenticated before a byte of it is used, and the record that an index points
at must be the one that the index promised: a damaged or forged index shows as an error, never
as another record's bytes. Bytes that were never written are zero.

Sizes and offsets are bytes. Any number of threads may read at once; the interpreter runs
meanwhile, since looking up, decompressing and opening happen in C.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Final

from vrep._core import layout, record
from vrep._core.index import ExtentMap
from vrep.errors import AuthError, CorruptError, IntegrityError, StorageError
from vrep.recovery.access import KeyAccess
from vrep.target.reader import StoreReader

__all__ = ["Fetcher"]

CACHE_BYTES: Final = 16 << 20
AHEAD_BYTES: Final = 1 << 20
_PAGE: Final = 4096
_HEADER: Final = layout.RECORD.itemsize
_PIECE: Final = layout.PIECE_BYTES_MAX
_WORD: Final = struct.Struct("<I")
# magic .. seq, offset, length, body_bytes: see struct vrep_record
_FIELDS: Final = struct.Struct("<IBBHIHHQQIIQQHHI")


class Fetcher:
    """Reads disks at the point of an extent map."""

    def __init__(self, reader: StoreReader, extents: ExtentMap, access: KeyAccess) -> None:
        self._reader = reader
        self._lane = reader.manifest.lane
        self._extents = extents
        self._access = access
        self._streams = extents.streams
        self._cache: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._read_to: dict[int, int] = {}
        self._asked_to: dict[int, int] = {}
        self.read_bytes = 0
        """of the store since the probe: sealed pieces, with the headers of their records"""

    def next_written(self, disk: int, offset: int) -> int | None:
        """The first offset from here on that was ever written."""
        return self._extents.next_written(disk, offset)

    def read(self, disk: int, offset: int, length: int) -> bytearray | None:
        """The bytes of a range; None when all of it reads zero. IntegrityError names the
        segment and position of what cannot be trusted."""
        return self.open(disk, offset, length, self.find(disk, offset, length))

    def find(self, disk: int, offset: int, length: int) -> Any:
        """The extents of a range that hold data, for `open`; the disk begins to read them.
        So several ranges are waited for at once when all are found before one is opened."""
        found = self._find(disk, offset, length)
        # Read in order, a range is followed by the next: that one is found early.
        end = offset + length
        if self._read_to.get(disk) == offset:
            start = max(end, self._asked_to.get(disk, 0))
            if start < end + AHEAD_BYTES // 2:
                with contextlib.suppress(IntegrityError, StorageError):
                    # Damage there is for whoever asks for it.
                    self._find(disk, start, AHEAD_BYTES)
                self._asked_to[disk] = start + AHEAD_BYTES
        else:
            self._asked_to[disk] = 0
        self._read_to[disk] = end
        return found

    def _find(self, disk: int, offset: int, length: int) -> Any:
        extents = self._extents.lookup(disk, offset, length)
        extents = extents[extents["kind"] == layout.KIND_WRITE]
        for extent in extents:
            # How a piece was compressed is not known yet: at most what stands before its end.
            shown = int(extent["skip"]) + int(extent["length"]) if extent["piece"] == 0 else 0
            self._reader.will_need(
                int(extent["segment"]), int(extent["position"]), _HEADER + shown + 64
            )
        return extents

    def open(self, disk: int, offset: int, length: int, extents: Any) -> bytearray | None:
        """The bytes of a range out of what `find` found in it."""
        if not len(extents):
            return None
        out = bytearray(length)
        view = memoryview(out)
        for extent in extents:
            at = int(extent["offset"]) - offset
            self._piece(disk, extent, view[at : at + int(extent["length"])])
        return out

    def probe(self, disks: Iterable[int]) -> None:
        """Open one piece of what is there, so that a key that is wrong shows at once."""
        for disk in disks:
            at: int | None = 0
            for _try in range(16):
                at = self._extents.next_written(disk, at or 0)
                if at is None:
                    break
                extent = self._extents.lookup(disk, at, 1)[0]
                if extent["kind"] == layout.KIND_WRITE:
                    self._piece(disk, extent, memoryview(bytearray(1)))
                    self.read_bytes = 0
                    return
                at += _PIECE

    def _piece(self, disk: int, extent: Any, out: memoryview) -> None:
        """The part of a piece that an extent shows."""
        segment, position = int(extent["segment"]), int(extent["position"])
        piece, skip = int(extent["piece"]), int(extent["skip"])
        key = (segment, position, piece)
        with self._lock:
            plain = self._cache.get(key)
            if plain is not None:
                self._cache.move_to_end(key)
        if plain is not None:
            out[:] = plain[skip : skip + len(out)]
            return
        try:
            self._open(disk, extent, key, skip, out)
        except IntegrityError as error:
            raise type(error)(
                f"record {int(extent['epoch'])}/{self._lane}/{int(extent['seq'])} in segment "
                f"{segment:08x} at byte {position}, piece {piece}: {error.detail}"
            ) from None

    def _open(
        self, disk: int, extent: Any, key: tuple[int, int, int], skip: int, out: memoryview
    ) -> None:
        segment, position, piece = key
        header = self._reader.read(segment, position, _HEADER)
        record.check_header(header)
        fields = _FIELDS.unpack(header)
        epoch, lane, on_disk, seq, offset, length = fields[4:10]
        pieces = fields[13]
        start = offset + piece * _PIECE
        size = min(_PIECE, length - piece * _PIECE)
        if (
            (epoch, lane, seq) != (int(extent["epoch"]), self._lane, int(extent["seq"]))
            or on_disk != disk
            or size <= 0
            or piece >= pieces
            or start + skip != int(extent["offset"])
            or skip + len(out) > size
        ):
            raise CorruptError("the index points at another record than it promises")
        words = self._reader.read(segment, position + _HEADER, 4 * pieces)
        at = position + _HEADER + 4 * pieces
        for number in range(piece):
            at += _WORD.unpack_from(words, 4 * number)[0] & layout.PIECE_LENGTH_MASK
        word = _WORD.unpack_from(words, 4 * piece)[0]
        stored = self._reader.read(segment, at, word & layout.PIECE_LENGTH_MASK)
        if len(stored) > _PAGE:
            self._reader.will_need(segment, at, len(stored))
        with self._lock:
            self.read_bytes += _HEADER + 4 * pieces + len(stored)
        opener = self._access.opener(self._streams[int(extent["stream"])])
        whole = skip == 0 and len(out) == size
        room: Any = out if whole else bytearray(size)
        try:
            opened = opener.piece(header, piece, word, stored, room)
        except AuthError:
            raise AuthError("it was changed, or sealed under another key") from None
        if opened != size:
            raise CorruptError(f"it holds {opened} bytes, not {size}")
        if not whole:
            out[:] = memoryview(room)[skip : skip + len(out)]
            self._keep(key, bytes(room))

    def _keep(self, key: tuple[int, int, int], plain: bytes) -> None:
        """Remember a piece of which only a part was asked for: its neighbours come next."""
        with self._lock:
            if key in self._cache:
                return
            self._cache[key] = plain
            self._cached_bytes += len(plain)
            while self._cached_bytes > CACHE_BYTES:
                _old, gone = self._cache.popitem(last=False)
                self._cached_bytes -= len(gone)
