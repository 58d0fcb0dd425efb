"""Segments as plain bytes: headers, commit blocks, and the scan after a crash.

See format/segment.h. Nothing here needs a key.
"""

import numpy as np

from vrep._core import layout
from vrep.errors import CorruptError, InvalidError

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from vrep._core._status cimport check

cdef extern from "format/segment.h":
    struct vrep_position:
        uint32_t epoch
        uint16_t lane
        uint64_t seq
    struct vrep_segment_header:
        pass
    struct vrep_commit:
        uint8_t digest[16]
    struct vrep_segment_scan:
        uint64_t end
        uint64_t wrong_at
        uint64_t proof_at
        uint64_t records
        uint32_t commits
        vrep_position last
        vrep_position durable
    int VREP_E_CORRUPT
    void vrep_segment_header_finish(vrep_segment_header *header)
    int vrep_segment_header_check(const vrep_segment_header *header)
    struct vrep_fold:
        pass
    void vrep_fold_finish(vrep_fold *fold)
    int vrep_fold_check(const vrep_fold *fold)
    size_t vrep_segment_data_at(const vrep_segment_header *header)
    void vrep_commit_finish(vrep_commit *commit)
    int vrep_commit_check(const vrep_commit *commit)
    int vrep_segment_scan_ "vrep_segment_scan"(
        const void *buffer, size_t len, const uint8_t *group_id, uint32_t segment,
        const vrep_position *known, vrep_commit *out, size_t cap,
        vrep_segment_scan *scan) nogil

cdef extern from "format/checksum.h":
    struct vrep_digest:
        pass
    void vrep_digest_init(vrep_digest *digest)
    void vrep_digest_update(vrep_digest *digest, const void *data, size_t len) nogil
    void vrep_digest_final(const vrep_digest *digest, uint8_t *out)


cdef bytes raw_struct(value, dtype):
    raw = np.asarray(value, dtype).tobytes()
    if len(raw) != dtype.itemsize:
        raise InvalidError(f"one struct of {dtype.itemsize} bytes is needed")
    return raw


def header(fields):
    """The 128 bytes of a segment header; magic, version, sizes and checksum are filled in."""
    cdef vrep_segment_header out
    cdef bytes raw = raw_struct(fields, layout.SEGMENT_HEADER)
    memcpy(&out, <const uint8_t *>raw, sizeof(out))
    vrep_segment_header_finish(&out)
    check(vrep_segment_header_check(&out))
    return (<uint8_t *>&out)[:sizeof(out)]


def parse_header(buffer):
    """The SEGMENT_HEADER at the start of ``buffer``, checked."""
    cdef vrep_segment_header out
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        if <size_t>view.len < sizeof(out):
            raise CorruptError(f"a segment header has {sizeof(out)} bytes, not {view.len}")
        memcpy(&out, view.buf, sizeof(out))
        check(vrep_segment_header_check(&out))
        return np.frombuffer((<uint8_t *>&out)[:sizeof(out)], layout.SEGMENT_HEADER)[0]
    finally:
        PyBuffer_Release(&view)


def fold(fields):
    """The 256 bytes behind the header of a folded segment; magic, version, size and checksum
    are filled in."""
    cdef vrep_fold out
    cdef bytes raw = raw_struct(fields, layout.FOLD)
    memcpy(&out, <const uint8_t *>raw, sizeof(out))
    vrep_fold_finish(&out)
    check(vrep_fold_check(&out))
    return (<uint8_t *>&out)[:sizeof(out)]


def parse_fold(buffer):
    """The FOLD behind the header of the segment in ``buffer``, checked; None when the segment
    is as it was received."""
    cdef vrep_segment_header head
    cdef vrep_fold out
    cdef Py_buffer view
    cdef size_t at
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        if <size_t>view.len < sizeof(head):
            raise CorruptError(f"a segment header has {sizeof(head)} bytes, not {view.len}")
        memcpy(&head, view.buf, sizeof(head))
        check(vrep_segment_header_check(&head))
        at = vrep_segment_data_at(&head)
        if at == sizeof(head):
            return None
        if <size_t>view.len < at:
            raise CorruptError(f"a folded segment begins with {at} bytes, not {view.len}")
        memcpy(&out, <const uint8_t *>view.buf + sizeof(head), sizeof(out))
        check(vrep_fold_check(&out))
        return np.frombuffer((<uint8_t *>&out)[:sizeof(out)], layout.FOLD)[0]
    finally:
        PyBuffer_Release(&view)


def commit(fields, buffers):
    """Padding and commit block that end ``buffers`` (records, in order).

    ``start`` and ``end`` of ``fields`` are theirs; digest, sizes and checksum are filled in.
    """
    cdef vrep_commit out
    cdef vrep_digest digest
    cdef Py_buffer view
    cdef uint64_t bytes_seen = 0
    cdef size_t gap
    cdef const uint8_t *padding
    cdef bytes zeroes = bytes(64)
    cdef bytes raw = raw_struct(fields, layout.COMMIT)
    memcpy(&out, <const uint8_t *>raw, sizeof(out))
    vrep_digest_init(&digest)
    for buffer in buffers:
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                vrep_digest_update(&digest, view.buf, <size_t>view.len)
            bytes_seen += <uint64_t>view.len
        finally:
            PyBuffer_Release(&view)
    if int(fields["end"]) - int(fields["start"]) != bytes_seen:
        raise InvalidError("start and end of a commit are not those of its records")
    gap = <size_t>(-<int>(bytes_seen & 63) & 63)
    padding = zeroes
    vrep_digest_update(&digest, padding, gap)
    vrep_digest_final(&digest, out.digest)
    vrep_commit_finish(&out)
    check(vrep_commit_check(&out))
    return zeroes[:gap] + (<uint8_t *>&out)[:sizeof(out)]


def scan(buffer, group_id, uint32_t segment, *, known=None, bint commits=False):
    """What a crash left of a segment: ``(result, commits)``.

    ``result`` has end, wrong_at, proof_at, records, commits, last and durable, the last two
    as (epoch, seq). ``known`` is an (epoch, seq) that is known to have been durable here.
    Damage below a durable position raises CorruptError. ``commits`` asks for the commit
    blocks as a COMMIT array, else it is empty.
    """
    cdef Py_buffer view
    cdef vrep_segment_scan result
    cdef vrep_position durable
    cdef const vrep_position *known_at = NULL
    cdef vrep_commit *out = NULL
    cdef size_t cap = 0
    cdef uint8_t[::1] room
    cdef int status
    cdef bytes group = bytes(group_id)
    cdef const uint8_t *group_bytes = group
    if len(group) != 16:
        raise InvalidError("a group id has 16 bytes")
    if known is not None:
        memset(&durable, 0, sizeof(durable))
        durable.epoch, durable.seq = known
        known_at = &durable
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        found = np.empty(view.len // 128 if commits else 0, layout.COMMIT)
        if len(found):
            room = found.view(np.uint8)
            out = <vrep_commit *>&room[0]
            cap = <size_t>len(found)
        with nogil:
            status = vrep_segment_scan_(view.buf, <size_t>view.len, group_bytes, segment,
                                        known_at, out, cap, &result)
        if status == VREP_E_CORRUPT:
            raise CorruptError(describe(&result, segment, view.len))
        check(status)
        return {
            "end": result.end, "wrong_at": result.wrong_at, "proof_at": result.proof_at,
            "records": result.records, "commits": result.commits,
            "last": (result.last.epoch, result.last.seq),
            "lane": result.last.lane,
            "durable": (result.durable.epoch, result.durable.seq),
        }, found[:result.commits].copy()
    finally:
        PyBuffer_Release(&view)


cdef str describe(vrep_segment_scan *result, uint32_t segment, Py_ssize_t size):
    if result.end == 0:
        return f"segment {segment:08x}: its header is not whole, or is another segment's"
    where = (
        f"segment {segment:08x} ({size} bytes) is damaged at byte {result.wrong_at}, after "
        f"position {result.last.epoch}/{result.last.seq}"
    )
    if result.proof_at:
        return f"{where}: the commit block at byte {result.proof_at} proves that it was durable"
    return f"{where}: more than that was durable"
