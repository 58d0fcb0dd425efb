"""Overlap: ranges that overlap are held one after the other; see track/overlap.h."""

from vrep.errors import InvalidError

from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vrep._core._status cimport check

cdef extern from "<stdbool.h>":
    ctypedef bint c_bool "bool"

cdef extern from "track/overlap.h":
    struct vrep_range:
        uint64_t offset
        uint64_t length
        uint16_t disk
        c_bool held
        void *owner
    struct vrep_overlap:
        pass
    int vrep_overlap_create(uint32_t ranges_max, vrep_overlap **out)
    void vrep_overlap_destroy(vrep_overlap *overlap)
    c_bool vrep_overlap_acquire(vrep_overlap *overlap, vrep_range *range)
    ctypedef void (*granted_function "void (*)(void *, struct vrep_range *)")(
        void *context, vrep_range *range) noexcept
    void vrep_overlap_release(vrep_overlap *overlap, vrep_range *range, granted_function granted,
                              void *context)
    uint32_t vrep_overlap_held(const vrep_overlap *overlap)


cdef class Range:
    """A range that an Overlap holds or lets wait."""
    cdef vrep_range range
    cdef bint listed

    @property
    def disk(self):
        return self.range.disk

    @property
    def offset(self):
        return self.range.offset

    @property
    def length(self):
        return self.range.length

    @property
    def held(self):
        """True while it is granted."""
        return self.listed and self.range.held


cdef void tell(void *context, vrep_range *range) noexcept:
    (<list>context).append(<Range>range.owner)


cdef class Overlap:
    """Grants ranges in order of arrival, as far as they overlap."""
    cdef vrep_overlap *overlap
    cdef set ranges

    def __cinit__(self, uint32_t ranges_max=65536):
        check(vrep_overlap_create(ranges_max, &self.overlap))
        self.ranges = set()

    def __dealloc__(self):
        vrep_overlap_destroy(self.overlap)

    def acquire(self, uint16_t disk, uint64_t offset, uint64_t length):
        """A new range: ``held`` now, or waiting."""
        cdef Range new = Range()
        new.range.disk = disk
        new.range.offset = offset
        new.range.length = length
        new.range.owner = <void *>new
        new.listed = True
        self.ranges.add(new)
        vrep_overlap_acquire(self.overlap, &new.range)
        return new

    def release(self, Range held not None):
        """End a held range or withdraw a waiting one; returns those that are held now."""
        cdef list granted = []
        if held not in self.ranges:
            raise InvalidError("the range is not in this table")
        self.ranges.discard(held)
        vrep_overlap_release(self.overlap, &held.range, tell, <void *>granted)
        held.listed = False
        return granted

    @property
    def held(self):
        """How many ranges are held."""
        return vrep_overlap_held(self.overlap)
