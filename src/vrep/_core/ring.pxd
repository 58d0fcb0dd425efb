# The C handles behind the ring's Python classes, for modules that work on a ring in C.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "ring/ring.h" nogil:
    struct vrep_ring:
        pass
    struct vrep_ring_reader:
        pass

cdef class Mapped:
    # Memory that views of it keep alive.
    cdef Py_ssize_t views
    cdef bint busy

cdef class RingReader(Mapped):
    cdef vrep_ring_reader *reader
    # The handle; raises when it is closed. It stays valid while the object does.
    cdef vrep_ring_reader *get(self) except NULL

cdef class RingProducer(Mapped):
    cdef vrep_ring *ring
    cdef vrep_ring *get(self) except NULL
