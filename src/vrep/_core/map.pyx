"""The change map: which blocks a target may not hold; see track/map.h.

``ChangeMap.open`` reads the map of a running filter. ``create`` and ``attach`` make the
caller its owner, who marks and clears. Offsets and lengths are bytes.
"""

import os

import numpy as np

from vrep._core import layout
from vrep.errors import InvalidError, RangeError, ReadOnlyError

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from vrep._core._status cimport check

cdef extern from "<stdbool.h>":
    ctypedef bint c_bool "bool"

cdef extern from "track/map.h" nogil:
    enum:
        VREP_MAP_BIT_BYTES
        VREP_DISKS_MAX
    struct vrep_map:
        pass
    struct vrep_map_disk:
        uint64_t bytes
        uint64_t bits
        uint64_t words
    struct vrep_map_header:
        uint32_t disks
        uint32_t bit_bytes
        vrep_map_disk disk[64]
    struct vrep_map_move:
        c_bool moved
        uint8_t source "from"
        uint8_t to
    struct vrep_checkpoint:
        pass
    int vrep_map_create(const char *path, const uint8_t *group, const uint8_t *target,
                        const uint64_t *disk_bytes, uint32_t disks, uint32_t bit_bytes,
                        vrep_map **out)
    int vrep_map_attach(const char *path, const uint8_t *group, const uint8_t *target,
                        const uint64_t *disk_bytes, uint32_t disks, vrep_map **out)
    int vrep_map_open(const char *path, vrep_map **out)
    void vrep_map_detach(vrep_map *map)
    vrep_map_header *vrep_map_get_header "vrep_map_header" (vrep_map *map)
    uint8_t vrep_map_mark(vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length)
    void vrep_map_raise(vrep_map *map, uint8_t generation, uint64_t seq)
    void vrep_map_done(vrep_map *map, uint8_t generation)
    void vrep_map_mark_unshipped(vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length)
    void vrep_map_mark_all_unshipped(vrep_map *map)
    void vrep_map_clear_unshipped(vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length)
    c_bool vrep_map_in_generation(vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length)
    c_bool vrep_map_seal(vrep_map *map, uint64_t head, vrep_map_move *move)
    uint32_t vrep_map_clear(vrep_map *map, uint64_t durable)
    void vrep_map_generations_to_unshipped(vrep_map *map)
    void vrep_map_reset_inflight(vrep_map *map)
    uint8_t vrep_map_count(vrep_map *map, uint8_t generation)
    void vrep_map_set_gap(vrep_map *map)
    c_bool vrep_map_gap(const vrep_map *map)
    uint64_t vrep_map_unshipped_bits(const vrep_map *map)
    uint64_t vrep_map_dirty_bits(const vrep_map *map)
    uint64_t vrep_map_dirty_bytes(const vrep_map *map)
    uint64_t vrep_map_unshipped_bytes(const vrep_map *map)
    c_bool vrep_map_next_unshipped(const vrep_map *map, uint16_t disk, uint64_t start,
                                   uint64_t max_bytes, uint64_t *offset, uint64_t *length)
    c_bool vrep_map_next_run(const vrep_map *map, uint16_t disk, uint64_t start,
                             uint64_t *length, c_bool *dirty)
    void vrep_map_union(const vrep_map *map, uint16_t disk, uint64_t *words)
    uint64_t vrep_map_runs(const vrep_map *map, uint16_t disk, uint64_t *start,
                           uint64_t (*runs)[2], uint64_t most)
    int vrep_checkpoint_open(const char *prefix, vrep_map *map, vrep_checkpoint **out)
    int vrep_checkpoint_write(vrep_checkpoint *checkpoint, uint64_t head, c_bool clean)
    void vrep_checkpoint_close(vrep_checkpoint *checkpoint)
    int vrep_checkpoint_load(const char *prefix, vrep_map *map, c_bool *clean)

BIT_BYTES = VREP_MAP_BIT_BYTES

# Room for runs at first; it is doubled when less than this is left.
cdef uint64_t RUNS_FIRST = 8192


cdef int copy_id(object name, object value, uint8_t *out) except -1:
    if not isinstance(value, bytes) or len(value) != 16:
        raise InvalidError(f"{name} is {value!r}: 16 bytes")
    memcpy(out, <const char *>value, 16)
    return 0


cdef class ChangeMap:
    """A change map in shared memory. Make it with create, attach or open."""
    cdef vrep_map *map
    cdef bint owner

    def __init__(self):
        raise InvalidError("use ChangeMap.create, attach or open")

    def __dealloc__(self):
        vrep_map_detach(self.map)

    cdef vrep_map *get(self) except NULL:
        if self.map == NULL:
            raise InvalidError("the change map is closed")
        return self.map

    cdef vrep_map *own(self) except NULL:
        self.get()
        if not self.owner:
            raise ReadOnlyError("this change map was opened for reading")
        return self.map

    cdef vrep_map *on(self, uint16_t disk) except NULL:
        self.get()
        if disk >= vrep_map_get_header(self.map).disks:
            raise RangeError(f"there is no disk {disk}")
        return self.map

    @staticmethod
    cdef ChangeMap make(path, group_id, target_id, sizes, uint32_t bit_bytes, bint fresh):
        cdef ChangeMap self = ChangeMap.__new__(ChangeMap)
        cdef bytes name = os.fsencode(path)
        cdef uint8_t group[16]
        cdef uint8_t target[16]
        cdef uint64_t disk_bytes[64]
        cdef uint32_t disks = len(sizes)
        cdef const char *text = name
        cdef int status
        copy_id("group_id", group_id, group)
        copy_id("target_id", target_id, target)
        if not 1 <= disks <= VREP_DISKS_MAX:
            raise InvalidError(f"{disks} disks: 1 to {VREP_DISKS_MAX}")
        for i in range(disks):
            disk_bytes[i] = sizes[i]
        with nogil:
            if fresh:
                status = vrep_map_create(text, group, target, disk_bytes, disks, bit_bytes,
                                         &self.map)
            else:
                status = vrep_map_attach(text, group, target, disk_bytes, disks, &self.map)
        check(status)
        self.owner = True
        return self

    @staticmethod
    def create(path, sizes, *, group_id=bytes(16), target_id=bytes(16),
               uint32_t bit_bytes=VREP_MAP_BIT_BYTES):
        """Make a new map of disks of these sizes in place of what stands at ``path``."""
        return ChangeMap.make(path, group_id, target_id, sizes, bit_bytes, True)

    @staticmethod
    def attach(path, sizes, *, group_id=bytes(16), target_id=bytes(16)):
        """Take over the map that a dead owner left, and end what it was in the middle of."""
        return ChangeMap.make(path, group_id, target_id, sizes, 0, False)

    @staticmethod
    def open(path):
        """Read the map of another process."""
        cdef ChangeMap self = ChangeMap.__new__(ChangeMap)
        cdef bytes name = os.fsencode(path)
        cdef const char *text = name
        cdef int status
        with nogil:
            status = vrep_map_open(text, &self.map)
        check(status)
        return self

    def close(self):
        """Let the map go; close its checkpoints first."""
        vrep_map_detach(self.map)
        self.map = NULL

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    @property
    def header(self):
        """The header as it is now: a record of ``layout.MAP_HEADER``."""
        cdef const char *at = <const char *>vrep_map_get_header(self.get())
        cdef Py_ssize_t size = layout.MAP_HEADER.itemsize
        return np.frombuffer(at[:size], layout.MAP_HEADER)[0]

    @property
    def sizes(self):
        """Bytes of each disk."""
        cdef vrep_map_header *header = vrep_map_get_header(self.get())
        return [header.disk[i].bytes for i in range(header.disks)]

    @property
    def bit_bytes(self):
        """Bytes that one bit stands for."""
        return vrep_map_get_header(self.get()).bit_bytes

    def mark(self, uint16_t disk, uint64_t offset, uint64_t length):
        """Mark the open generation, count one command in flight; returns the generation."""
        return vrep_map_mark(self.own(), disk, offset, length)

    def raise_seq(self, uint8_t generation, uint64_t seq):
        """A command of the generation was published as ``seq``."""
        vrep_map_raise(self.own(), generation, seq)

    def done(self, uint8_t generation):
        """A command of the generation left the in-flight table."""
        vrep_map_done(self.own(), generation)

    def mark_unshipped(self, uint16_t disk, uint64_t offset, uint64_t length):
        """Mark every bit that the range touches."""
        vrep_map_mark_unshipped(self.own(), disk, offset, length)

    def mark_all_unshipped(self):
        """Mark every bit of every disk."""
        cdef vrep_map *map = self.own()
        with nogil:
            vrep_map_mark_all_unshipped(map)

    def clear_unshipped(self, uint16_t disk, uint64_t offset, uint64_t length):
        """Clear the bits that the range covers whole, after its sync copy was published."""
        vrep_map_clear_unshipped(self.own(), disk, offset, length)

    def in_generation(self, uint16_t disk, uint64_t offset, uint64_t length):
        """True if a generation has a bit of the range."""
        return vrep_map_in_generation(self.on(disk), disk, offset, length)

    def seal(self, uint64_t head):
        """Seal the open generation. None: nothing was marked. Else the merge that it needed:
        ``()`` or ``(from, to)``, whose commands in flight now count in ``to``."""
        cdef vrep_map_move move
        cdef vrep_map *map = self.own()
        cdef c_bool sealed
        with nogil:
            sealed = vrep_map_seal(map, head, &move)
        if not sealed:
            return None
        return (move.source, move.to) if move.moved else ()

    def clear(self, uint64_t durable):
        """Clear what a durable acknowledgement allows; returns how many generations."""
        cdef vrep_map *map = self.own()
        cdef uint32_t freed
        with nogil:
            freed = vrep_map_clear(map, durable)
        return freed

    def generations_to_unshipped(self):
        """Move what all generations hold to unshipped: their records are lost."""
        cdef vrep_map *map = self.own()
        with nogil:
            vrep_map_generations_to_unshipped(map)

    def reset_inflight(self):
        """After attach: no command is in flight until ``count`` says so."""
        vrep_map_reset_inflight(self.own())

    def count(self, uint8_t generation):
        """Count a command that the table still holds; returns the generation it is in now."""
        return vrep_map_count(self.own(), generation)

    def set_gap(self):
        """Store the gap flag, before an unrecorded write starts."""
        vrep_map_set_gap(self.own())

    @property
    def gap(self):
        return vrep_map_gap(self.get())

    @property
    def unshipped_bits(self):
        return vrep_map_unshipped_bits(self.get())

    @property
    def unshipped_bytes(self):
        return vrep_map_unshipped_bytes(self.get())

    @property
    def dirty_bits(self):
        cdef vrep_map *map = self.get()
        cdef uint64_t bits
        with nogil:
            bits = vrep_map_dirty_bits(map)
        return bits

    @property
    def dirty_bytes(self):
        cdef vrep_map *map = self.get()
        cdef uint64_t count
        with nogil:
            count = vrep_map_dirty_bytes(map)
        return count

    def next_unshipped(self, uint16_t disk, uint64_t start=0, uint64_t max_bytes=1 << 62):
        """(offset, length) of the next run of unshipped bits, or None."""
        cdef vrep_map *map = self.on(disk)
        cdef uint64_t offset, length
        cdef c_bool found
        with nogil:
            found = vrep_map_next_unshipped(map, disk, start, max_bytes, &offset, &length)
        return (offset, length) if found else None

    def next_run(self, uint16_t disk, uint64_t start):
        """(length, dirty) of the run that holds ``start``, or None behind the disk's end."""
        cdef vrep_map *map = self.on(disk)
        cdef uint64_t length
        cdef c_bool dirty, found
        with nogil:
            found = vrep_map_next_run(map, disk, start, &length, &dirty)
        return (length, dirty) if found else None

    def runs(self, uint16_t disk):
        """All dirty runs of a disk, as an array of (offset, length)."""
        cdef vrep_map *map = self.on(disk)
        cdef uint64_t start = 0, got = 1, n = 0
        cdef uint64_t room = RUNS_FIRST
        cdef uint64_t[:, ::1] view
        found = np.empty((room, 2), np.uint64)
        while got > 0:
            if room - n < RUNS_FIRST:
                room *= 2
                found.resize((room, 2), refcheck=False)
            view = found
            with nogil:
                got = vrep_map_runs(map, disk, &start, <uint64_t (*)[2]>&view[n, 0], room - n)
            view = None
            n += got
        found.resize((n, 2), refcheck=False)
        return found

    def union(self, uint16_t disk):
        """The dirty bitmap of a disk as 64-bit words, lowest bit first, padded to whole pages."""
        cdef vrep_map *map = self.on(disk)
        words = np.empty(vrep_map_get_header(map).disk[disk].words, np.uint64)
        cdef uint64_t[::1] view = words
        if view.shape[0] == 0:
            return words
        cdef uint64_t *at = &view[0]
        with nogil:
            vrep_map_union(map, disk, at)
        return words

    def checkpoint(self, prefix):
        """A writer of durable copies into ``prefix.0`` and ``prefix.1`` in turn."""
        cdef Checkpoint self_ = Checkpoint.__new__(Checkpoint)
        cdef vrep_map *map = self.own()
        cdef bytes name = os.fsencode(prefix)
        cdef const char *text = name
        cdef int status
        with nogil:
            status = vrep_checkpoint_open(text, map, &self_.checkpoint)
        check(status)
        self_.owner = self
        return self_

    def load_checkpoint(self, prefix):
        """Add the newest whole checkpoint to unshipped; true if a clean stop wrote it."""
        cdef vrep_map *map = self.own()
        cdef bytes name = os.fsencode(prefix)
        cdef const char *text = name
        cdef c_bool clean = False
        cdef int status
        with nogil:
            status = vrep_checkpoint_load(text, map, &clean)
        check(status)
        return clean


cdef class Checkpoint:
    """Writes checkpoints of a map; from ``ChangeMap.checkpoint``."""
    cdef vrep_checkpoint *checkpoint
    cdef ChangeMap owner

    def __dealloc__(self):
        vrep_checkpoint_close(self.checkpoint)

    def write(self, uint64_t head=0, *, bint clean=False):
        """Write and sync one checkpoint."""
        cdef int status
        if self.checkpoint == NULL:
            raise InvalidError("the checkpoint is closed")
        self.owner.get()
        with nogil:
            status = vrep_checkpoint_write(self.checkpoint, head, clean)
        check(status)

    def close(self):
        """Close both files."""
        vrep_checkpoint_close(self.checkpoint)
        self.checkpoint = NULL
