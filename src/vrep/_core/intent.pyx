"""Write-intent: which 16 MiB extents a power loss may have left unsafe; see track/intent.h."""

import os

from vrep.errors import InvalidError

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from vrep._core._status cimport check

cdef extern from "<stdbool.h>":
    ctypedef bint c_bool "bool"

cdef extern from "track/intent.h" nogil:
    enum:
        VREP_DISKS_MAX
        VREP_INTENT_BYTES
    struct vrep_intent:
        pass
    int vrep_intent_create(const char *path, const uint8_t *group, const uint64_t *disk_bytes,
                           uint32_t disks, vrep_intent **out)
    int vrep_intent_open(const char *path, const uint8_t *group, const uint64_t *disk_bytes,
                         uint32_t disks, vrep_intent **out)
    void vrep_intent_close(vrep_intent *intent)
    c_bool vrep_intent_begin(vrep_intent *intent, uint16_t disk, uint64_t offset, uint64_t length)
    void vrep_intent_end(vrep_intent *intent, uint16_t disk, uint64_t offset, uint64_t length)
    c_bool vrep_intent_wants_sync(const vrep_intent *intent)
    void vrep_intent_prepare(vrep_intent *intent)
    int vrep_intent_write(vrep_intent *intent)
    void vrep_intent_commit(vrep_intent *intent, int status)
    void vrep_intent_cool_begin(vrep_intent *intent)
    void vrep_intent_cool_end(vrep_intent *intent, c_bool ok)
    uint64_t vrep_intent_hot_extents(const vrep_intent *intent)
    c_bool vrep_intent_next(const vrep_intent *intent, uint16_t disk, uint64_t start,
                            uint64_t *offset, uint64_t *length)

EXTENT_BYTES = VREP_INTENT_BYTES


cdef class Intent:
    """The write-intent file of a group. Make it with create or open."""
    cdef vrep_intent *intent

    def __init__(self):
        raise InvalidError("use Intent.create or Intent.open")

    def __dealloc__(self):
        vrep_intent_close(self.intent)

    cdef vrep_intent *get(self) except NULL:
        if self.intent == NULL:
            raise InvalidError("the write-intent file is closed")
        return self.intent

    @staticmethod
    cdef Intent make(path, sizes, group_id, bint fresh):
        cdef Intent self = Intent.__new__(Intent)
        cdef bytes name = os.fsencode(path)
        cdef const char *text = name
        cdef uint8_t group[16]
        cdef uint64_t disk_bytes[64]
        cdef uint32_t disks = len(sizes)
        cdef int status
        if not isinstance(group_id, bytes) or len(group_id) != 16:
            raise InvalidError(f"group_id is {group_id!r}: 16 bytes")
        if not 1 <= disks <= VREP_DISKS_MAX:
            raise InvalidError(f"{disks} disks: 1 to {VREP_DISKS_MAX}")
        memcpy(group, <const char *>group_id, 16)
        for i in range(disks):
            disk_bytes[i] = sizes[i]
        with nogil:
            if fresh:
                status = vrep_intent_create(text, group, disk_bytes, disks, &self.intent)
            else:
                status = vrep_intent_open(text, group, disk_bytes, disks, &self.intent)
        check(status)
        return self

    @staticmethod
    def create(path, sizes, *, group_id=bytes(16)):
        """Make a new file, all extents cold."""
        return Intent.make(path, sizes, group_id, True)

    @staticmethod
    def open(path, sizes, *, group_id=bytes(16)):
        """Open a file; the newest whole slot says which extents are hot."""
        return Intent.make(path, sizes, group_id, False)

    def close(self):
        """Close the file."""
        vrep_intent_close(self.intent)
        self.intent = NULL

    def begin(self, uint16_t disk, uint64_t offset, uint64_t length):
        """True: the write may start, and ``end`` must follow. False: sync, then try again."""
        return vrep_intent_begin(self.get(), disk, offset, length)

    def end(self, uint16_t disk, uint64_t offset, uint64_t length):
        """A write that began has completed."""
        vrep_intent_end(self.get(), disk, offset, length)

    @property
    def wants_sync(self):
        return vrep_intent_wants_sync(self.get())

    def prepare(self):
        """Freeze what the next sync writes."""
        vrep_intent_prepare(self.get())

    def write(self):
        """Write and sync what was frozen; raises as the file does."""
        cdef vrep_intent *intent = self.get()
        cdef int status
        with nogil:
            status = vrep_intent_write(intent)
        check(status)

    def commit(self, int status=0):
        """End a sync with its status: zero, or a negative native one."""
        vrep_intent_commit(self.get(), status)

    def sync(self):
        """prepare, write and commit."""
        cdef vrep_intent *intent = self.get()
        cdef int status
        vrep_intent_prepare(intent)
        with nogil:
            status = vrep_intent_write(intent)
        vrep_intent_commit(intent, status)
        check(status)

    def cool_begin(self):
        """Note the extents with nothing in flight; then flush the backing and checkpoint."""
        vrep_intent_cool_begin(self.get())

    def cool_end(self, bint ok):
        """Drop the noted ones that were not written since, if flush and checkpoint succeeded."""
        vrep_intent_cool_end(self.get(), ok)

    @property
    def hot_extents(self):
        return vrep_intent_hot_extents(self.get())

    def runs(self, uint16_t disk):
        """(offset, length) of each run that a power loss now would leave for resync."""
        cdef vrep_intent *intent = self.get()
        cdef uint64_t offset, length = 0, start = 0
        found = []
        while vrep_intent_next(intent, disk, start, &offset, &length):
            found.append((offset, length))
            start = offset + length
        return found
