"""Writes past the page cache, without the GIL. See disk/staged.h."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from vrep._core._status cimport check

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "base/status.h":
    enum:
        VREP_E_IO

cdef extern from "disk/staged.h":
    int vrep_write_staged(int fd, const iovec *iov, size_t count, uint64_t offset, void *room,
                          size_t room_bytes, uint64_t *written, int *os_error) nogil


def write_staged(int fd, buffers, uint64_t offset, room):
    """Write all buffers, back to back, through ``room``: ``(written, errno)``.

    errno is 0 when all is written; else ``written`` bytes were, and the next could not be.
    ``room`` is aligned as the file wants it (open(2), O_DIRECT), and nobody else's meanwhile.
    """
    cdef list kept = list(buffers)
    cdef size_t count = len(kept), held = 0, i
    cdef Py_buffer *views = <Py_buffer *>calloc(count + 1, sizeof(Py_buffer))
    cdef iovec *iov = <iovec *>calloc(count + 1, sizeof(iovec))
    cdef uint64_t written = 0
    cdef int status, os_error = 0
    try:
        if views == NULL or iov == NULL:
            raise MemoryError
        for i in range(count):
            PyObject_GetBuffer(kept[i], &views[i], PyBUF_SIMPLE)
            held += 1
            iov[i].iov_base = views[i].buf
            iov[i].iov_len = <size_t>views[i].len
        PyObject_GetBuffer(room, &views[count], PyBUF_WRITABLE)
        held += 1
        with nogil:
            status = vrep_write_staged(fd, iov, count, offset, views[count].buf,
                                       <size_t>views[count].len, &written, &os_error)
    finally:
        if views != NULL:
            for i in range(held):
                PyBuffer_Release(&views[i])
        free(views)
        free(iov)
    if status != VREP_E_IO:
        check(status)
    return written, os_error
