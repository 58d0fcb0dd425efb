"""Changes: which blocks of a disk may differ between two recovery points; see map/changes.h."""

import numpy as np

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from vrep._core.index cimport Handles, Reigns, vrep_index, vrep_reign

cdef extern from "map/changes.h" nogil:
    enum:
        VREP_CHANGES_BLOCK_BYTES
    struct vrep_changed:
        uint64_t offset
        uint64_t length
    struct vrep_changes:
        pass
    int vrep_changes_new(const vrep_index *const *indexes, size_t count,
                         const vrep_reign *since, size_t since_count,
                         const vrep_reign *at, size_t at_count, vrep_changes **out)
    void vrep_changes_free(vrep_changes *changes)
    int vrep_changes_list(const vrep_changes *changes, uint32_t disk, uint64_t offset,
                          uint64_t length, vrep_changed *out, size_t cap, size_t *count,
                          uint64_t *done)

BLOCK_BYTES = VREP_CHANGES_BLOCK_BYTES
CHANGED = np.dtype([("offset", "<u8"), ("length", "<u8")])
assert CHANGED.itemsize == sizeof(vrep_changed)


cdef class Changes:
    """What may differ between two recovery points, whatever their order.

    :param indexes: the indexes of one group, as for an :class:`ExtentMap`: all of them, since
        one that is missing is a change that is not told.
    :param since: ``(epoch, max_seq)`` of the one point's epoch and of each before it.
    :param at: of the other.
    :param group_id: 16 bytes that the indexes must be of; None: not compared.

    Lists may be made in several threads at once; the GIL is released.
    """

    cdef vrep_changes *changes
    cdef Handles inputs

    def __cinit__(self, indexes, since, at, *, group_id=None):
        cdef Reigns first = Reigns(tuple(since))
        cdef Reigns second = Reigns(tuple(at))
        cdef int status
        self.inputs = Handles(indexes)
        self.inputs.of_group(group_id)
        with nogil:
            status = vrep_changes_new(self.inputs.handles, self.inputs.count, first.reigns,
                                      first.count, second.reigns, second.count, &self.changes)
        self.inputs.named(status, f"changes in {self.inputs.count} indexes")

    def __dealloc__(self):
        vrep_changes_free(self.changes)

    def list(self, uint32_t disk, uint64_t offset, uint64_t length):
        """CHANGED array of what may differ inside ``[offset, offset + length)``: rising, apart,
        in whole blocks of ``BLOCK_BYTES``, cut at the ends of the range. All else is equal at
        both points. CorruptError: an index is damaged where it was read."""
        cdef size_t cap = 256, count = 0
        cdef uint64_t done = 0, some
        cdef uintptr_t room
        cdef int status
        out = np.empty(cap, CHANGED)
        while done < length or length == 0:
            room = out.ctypes.data
            with nogil:
                status = vrep_changes_list(self.changes, disk, offset + done, length - done,
                                           <vrep_changed *>room, cap, &count, &some)
            self.inputs.named(status, f"disk {disk}, bytes {offset} to {offset + length}")
            done += some
            if done == length:
                break
            cap *= 4
            larger = np.empty(cap, CHANGED)
            larger[:count] = out[:count]
            out = larger
        return out[:count]
