# Indexes for other extension modules: what is made out of several of them.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "map/index.h" nogil:
    struct vrep_index_trailer:
        uint32_t segment
        uint64_t short_at, short_count, long_at, long_count, streams_at, streams_count
        uint64_t events_at, events_count, times_at, times_count, nodes_at, nodes_count
    struct vrep_index:
        vrep_index_trailer trailer
        const uint8_t *base
        uint64_t base_at
        uint64_t bytes
        uint64_t file_bytes

cdef extern from "map/extent_map.h" nogil:
    struct vrep_reign:
        uint32_t epoch
        uint64_t seq_max


cdef class Index:
    cdef vrep_index *index
    cdef readonly str name
    cdef array(self, dtype, uint64_t at, uint64_t count)


cdef class Handles:
    # The C handles of some indexes, which the tuple keeps alive.
    cdef const vrep_index **handles
    cdef size_t count
    cdef tuple indexes
    cdef str damaged
    cdef of_group(self, group_id)
    # As `named`; of damage it says which of the indexes have it.
    cdef int named(self, int status, str where) except -1


cdef class Reigns:
    # An ancestry: (epoch, max_seq) of each epoch.
    cdef vrep_reign *reigns
    cdef size_t count


# The exception of a status, with the name of what it is about.
cdef int named(int status, str where) except -1
