"""Records as plain bytes: scan a buffer of them, walk their pieces, build the plain ones.

See format/record.h. Nothing here needs a key.
"""

import numpy as np

from vrep._core import layout
from vrep.errors import InvalidError, VrepError

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer,
)
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from vrep._core._status cimport check

cdef extern from "format/record.h":
    struct vrep_position:
        uint32_t epoch
        uint16_t lane
        uint16_t reserved
        uint64_t seq
    struct vrep_record:
        uint8_t kind
        uint16_t pieces
        uint32_t body_bytes
    struct vrep_stream:
        uint32_t epoch
    struct vrep_piece:
        uint32_t at
    struct vrep_piece_walk:
        pass
    struct vrep_record_order:
        uint32_t lanes
        vrep_position last[1]
    struct vrep_record_found:
        uint64_t position
    size_t vrep_record_bound(uint8_t kind, uint64_t offset, uint32_t length)
    uint32_t vrep_record_hash_blocks(uint64_t offset, uint32_t length, uint32_t *first)
    void vrep_record_finish(vrep_record *record)
    int vrep_record_check(const vrep_record *record)
    int vrep_record_check_pieces(const vrep_record *record, const void *words)
    void vrep_piece_walk_init(vrep_piece_walk *walk, const vrep_record *record, const void *words)
    int vrep_piece_walk_next(vrep_piece_walk *walk, vrep_piece *piece)
    int vrep_stream_check(const vrep_stream *stream, const vrep_record *record)
    void vrep_stream_write(const vrep_stream *stream, uint16_t lane, uint8_t *out)
    int vrep_record_order_seed(vrep_record_order *order, vrep_position last)
    int vrep_record_scan(const void *buffer, size_t length, vrep_record_order *order,
                         vrep_record_found *out, size_t cap, size_t *count,
                         size_t *consumed) nogil


cdef class Order:
    """What a scan knows of the last position of each lane; carries over from scan to scan."""

    cdef vrep_record_order order
    cdef bint busy

    def __cinit__(self):
        memset(&self.order, 0, sizeof(self.order))

    def seed(self, *, uint32_t epoch, uint64_t seq, uint16_t lane=0):
        """Set the last position of a lane."""
        cdef vrep_position last
        last.epoch, last.lane, last.reserved, last.seq = epoch, lane, 0, seq
        check(vrep_record_order_seed(&self.order, last))

    def positions(self):
        """``{lane: (epoch, seq)}`` of every lane seen."""
        return {
            self.order.last[i].lane: (self.order.last[i].epoch, self.order.last[i].seq)
            for i in range(self.order.lanes)
        }


def scan(buffer, *, Order order=None, out=None, bint tolerant=False):
    """Walk the records that stand back to back in ``buffer``.

    Returns ``(found, consumed)``: a RECORD_FOUND array (header, position) of the
    whole records, and where they end. A record that the buffer holds only in part
    ends the walk. A wrong one raises CorruptError with its position or, if
    ``tolerant``, ends the walk too. ``out``, a RECORD_FOUND array, is filled instead
    of a new one; when it is full the walk ends. ``order`` adds the check of seqs.
    """
    cdef Py_buffer view, room
    cdef size_t count = 0, consumed = 0, cap
    cdef int status
    cdef vrep_record_order *kept = NULL
    if order is not None:
        if order.busy:
            raise InvalidError("the order is in use by another thread")
        kept = &order.order
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        if out is None:
            out = np.empty(view.len // 64 + 1, layout.RECORD_FOUND)
        elif out.dtype != layout.RECORD_FOUND or out.ndim != 1:
            raise InvalidError("out must be a one-dimensional RECORD_FOUND array")
        PyObject_GetBuffer(out, &room, PyBUF_SIMPLE | PyBUF_WRITABLE)
        if order is not None:
            order.busy = True
        try:
            cap = <size_t>room.len // sizeof(vrep_record_found)
            with nogil:
                status = vrep_record_scan(view.buf, <size_t>view.len, kept,
                                          <vrep_record_found *>room.buf, cap, &count, &consumed)
        finally:
            if order is not None:
                order.busy = False
            PyBuffer_Release(&room)
    finally:
        PyBuffer_Release(&view)
    if status < 0 and not tolerant:
        try:
            check(status)
        except VrepError as error:
            raise type(error)(f"record at byte {consumed}: {error.detail}") from None
    return out[:count], consumed


cdef int load(Py_buffer *view, vrep_record *record) except -1:
    if <size_t>view.len < sizeof(vrep_record):
        raise InvalidError(f"a record header has {sizeof(vrep_record)} bytes, not {view.len}")
    memcpy(record, view.buf, sizeof(vrep_record))
    return check(vrep_record_check(record))


def check_header(buffer):
    """Judge the record header at the start of ``buffer``; return the bytes of its body."""
    cdef Py_buffer view
    cdef vrep_record record
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        load(&view, &record)
        return record.body_bytes
    finally:
        PyBuffer_Release(&view)


def pieces(buffer):
    """The pieces of the record at the start of ``buffer`` (header and piece table suffice)."""
    cdef Py_buffer view
    cdef vrep_record record
    cdef vrep_piece_walk walk
    cdef vrep_piece *piece
    cdef const uint8_t *words
    cdef Py_ssize_t i = 0
    cdef uint8_t[::1] room
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        load(&view, &record)
        if <size_t>view.len < sizeof(vrep_record) + 4 * <size_t>record.pieces:
            raise InvalidError("the buffer ends inside the piece table")
        found = np.empty(record.pieces, layout.PIECE)
        if record.pieces == 0:
            return found
        words = <const uint8_t *>view.buf + sizeof(vrep_record)
        check(vrep_record_check_pieces(&record, words))
        room = found.view(np.uint8)
        piece = <vrep_piece *>&room[0]
        vrep_piece_walk_init(&walk, &record, words)
        while check(vrep_piece_walk_next(&walk, &piece[i])) > 0:
            i += 1
            if i == record.pieces:
                break
        return found
    finally:
        PyBuffer_Release(&view)


def finish(headers):
    """Store the checksum of every header of a contiguous RECORD array, in place."""
    cdef Py_buffer view
    cdef Py_ssize_t i
    if headers.dtype != layout.RECORD:
        raise InvalidError("headers must be a RECORD array")
    PyObject_GetBuffer(headers, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    try:
        for i in range(view.len // <Py_ssize_t>sizeof(vrep_record)):
            vrep_record_finish(&(<vrep_record *>view.buf)[i])
    finally:
        PyBuffer_Release(&view)


def stream_record(stream, uint16_t lane=0):
    """The whole STREAM record (192 bytes) for one STREAM struct; checksums are filled in."""
    cdef vrep_stream body
    cdef uint8_t out[192]
    cdef bytes raw = np.asarray(stream, layout.STREAM).tobytes()
    if len(raw) != sizeof(vrep_stream):
        raise InvalidError("one STREAM struct is needed")
    memcpy(&body, <const uint8_t *>raw, sizeof(body))
    vrep_stream_write(&body, lane, out)
    return (<uint8_t *>out)[:192]


def parse_stream(buffer):
    """The STREAM struct of the STREAM record at the start of ``buffer``, checked."""
    cdef Py_buffer view
    cdef vrep_record record
    cdef vrep_stream body
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        load(&view, &record)
        if record.kind != layout.KIND_STREAM:
            raise InvalidError("this record is not a STREAM")
        if <size_t>view.len < sizeof(vrep_record) + sizeof(body):
            raise InvalidError("the buffer ends inside the record")
        memcpy(&body, <const uint8_t *>view.buf + sizeof(vrep_record), sizeof(body))
        check(vrep_stream_check(&body, &record))
        return np.frombuffer((<uint8_t *>&body)[:sizeof(body)], layout.STREAM)[0]
    finally:
        PyBuffer_Release(&view)


def bound(uint8_t kind, uint64_t offset=0, uint32_t length=0):
    """Most bytes that a sealed record of this kind and range can take."""
    return vrep_record_bound(kind, offset, length)


def hash_blocks(uint64_t offset, uint32_t length):
    """``(count, first)``: aligned 4 KiB blocks that the range fully covers, and where the
    first one begins, counted from ``offset``."""
    cdef uint32_t first
    cdef uint32_t count = vrep_record_hash_blocks(offset, length, &first)
    return count, first
