"""Manifests as plain bytes: check and take apart, complete and check.

See format/manifest.h. Nothing here needs a key.
"""

import numpy as np

from vrep._core import layout

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from vrep._core._status cimport check

cdef extern from "format/manifest.h":
    struct vrep_manifest_header:
        uint32_t epochs
        uint32_t segments
        uint32_t runs
        uint32_t disks
        uint32_t key_bytes
    struct vrep_manifest_view:
        vrep_manifest_header header
        uint64_t epochs_at
        uint64_t segments_at
        uint64_t runs_at
        uint64_t disks_at
        uint64_t keys_at
    int vrep_manifest_check(const void *buffer, size_t len, vrep_manifest_view *view) nogil
    int vrep_manifest_finish(void *buffer, size_t len) nogil


cdef object entries(buffer, dtype, uint64_t at, uint32_t count):
    return np.frombuffer(buffer, dtype, count=count, offset=at).copy()


def parse(buffer):
    """``{header, epochs, segments, runs, disks, keys}`` of a whole manifest, checked.

    Arrays of the structs of layout.h (copies), ``keys`` a list of bytes. CorruptError or
    VersionError when it cannot be trusted.
    """
    cdef vrep_manifest_view at
    cdef Py_buffer view
    cdef int status
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            status = vrep_manifest_check(view.buf, <size_t>view.len, &at)
        check(status)
    finally:
        PyBuffer_Release(&view)
    raw = bytes(memoryview(buffer)[at.keys_at:at.keys_at + at.header.key_bytes])
    keys = []
    place = 0
    while place < len(raw):
        size = int.from_bytes(raw[place:place + 4], "little")
        keys.append(raw[place + 4:place + 4 + size])
        place += 4 + size
    return {
        "header": np.frombuffer(buffer, layout.MANIFEST_HEADER, count=1)[0].copy(),
        "epochs": entries(buffer, layout.MANIFEST_EPOCH, at.epochs_at, at.header.epochs),
        "segments": entries(buffer, layout.MANIFEST_SEGMENT, at.segments_at, at.header.segments),
        "runs": entries(buffer, layout.MANIFEST_RUN, at.runs_at, at.header.runs),
        "disks": entries(buffer, layout.MANIFEST_DISK, at.disks_at, at.header.disks),
        "keys": keys,
    }


def build(fields, epochs, segments, runs, disks, keys):
    """The bytes of a manifest: counts, sizes, digest and checksum of ``fields`` are filled in.

    InvalidError when the parts would not pass the check.
    """
    cdef Py_buffer view
    cdef int status
    wrapped = b"".join(len(key).to_bytes(4, "little") + key for key in keys)
    head = np.array(fields, layout.MANIFEST_HEADER)
    head["epochs"], head["segments"] = len(epochs), len(segments)
    head["runs"], head["disks"] = len(runs), len(disks)
    head["key_bytes"] = len(wrapped)
    out = bytearray(
        head.tobytes()
        + np.asarray(epochs, layout.MANIFEST_EPOCH).tobytes()
        + np.asarray(segments, layout.MANIFEST_SEGMENT).tobytes()
        + np.asarray(runs, layout.MANIFEST_RUN).tobytes()
        + np.asarray(disks, layout.MANIFEST_DISK).tobytes()
        + wrapped
    )
    PyObject_GetBuffer(out, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    try:
        with nogil:
            status = vrep_manifest_finish(view.buf, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)
    check(status)
    return bytes(out)
