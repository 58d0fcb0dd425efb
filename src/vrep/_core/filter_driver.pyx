"""Filter driver: a group without a front-end, for tests and measurements.

``GroupDriver`` submits commands and turns the group's loop on the caller's thread;
``Follower`` is a consumer of its ring. One thread.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

import os
from typing import NamedTuple

from vrep._core._status cimport check
from vrep._core.filter cimport (
    VREP_COMMAND_FAST, VREP_COMMAND_FUA, VREP_COMMAND_NO_HOLE, VREP_OP_DISCARD, VREP_OP_FLUSH,
    VREP_OP_READ, VREP_OP_WRITE, VREP_OP_ZERO, VREP_STEP_DISK, VREP_STEP_PROBER, VREP_STEP_QUICK,
    VREP_STEP_SLOW, Group, iovec, vrep_command, vrep_command_get,
    vrep_command_prepare, vrep_command_put, vrep_command_submit, vrep_group, vrep_group_abandon,
    vrep_group_map, vrep_group_poll, vrep_group_set_time, vrep_group_step, vrep_group_step_at,
    vrep_group_step_failing, vrep_group_waiting, vrep_map)
from vrep.errors import AgainError, InvalidError

cdef extern from "format/layout.h" nogil:
    struct vrep_map_disk:
        uint64_t bits
        uint64_t words
    struct vrep_map_header:
        uint32_t bit_bytes
        vrep_map_disk disk[64]
    struct vrep_ring_desc:
        uint64_t seq
        uint64_t offset
        uint32_t length
        uint32_t chunk
        uint8_t kind
        uint8_t generation
        unsigned short flags
        unsigned short disk
        uint64_t wall_ns
    enum:
        VREP_NO_CHUNK

cdef extern from "track/map.h" nogil:
    vrep_map_header *vrep_map_header_of "vrep_map_header"(vrep_map *map)
    void vrep_map_union(const vrep_map *map, unsigned short disk, uint64_t *words)

cdef extern from "ring/ring.h" nogil:
    struct vrep_ring_reader:
        pass
    int vrep_ring_reader_open(const char *path, int control, int data, int space,
                              vrep_ring_reader **out)
    void vrep_ring_reader_close(vrep_ring_reader *reader)
    uint64_t vrep_ring_reader_head(const vrep_ring_reader *reader)
    uint64_t vrep_ring_reader_released(const vrep_ring_reader *reader)
    int vrep_ring_reader_desc(const vrep_ring_reader *reader, uint64_t seq, vrep_ring_desc *out)
    int vrep_ring_reader_iov(const vrep_ring_reader *reader, const vrep_ring_desc *desc,
                             iovec *iov, int most, int *n)
    void vrep_ring_reader_set(vrep_ring_reader *reader, uint64_t read, uint64_t received,
                              uint64_t durable, uint64_t spilled)

OPS = {"read": VREP_OP_READ, "write": VREP_OP_WRITE, "flush": VREP_OP_FLUSH,
       "discard": VREP_OP_DISCARD, "zero": VREP_OP_ZERO}
STEPS = {VREP_STEP_DISK: "disk", VREP_STEP_QUICK: "quick", VREP_STEP_SLOW: "slow",
         VREP_STEP_PROBER: "prober"}
cdef int IOV_MOST = (32 << 20) // 4096 + 2


class Step(NamedTuple):
    """Something that a stepped group waits for: a job of a worker, or a request to a disk, whose
    ``op`` is a number of enum vrep_io_op."""

    kind: str
    op: int
    flags: int
    disk: int
    offset: int
    length: int


class Record(NamedTuple):
    """One record of the ring; ``payload`` is None for a kind without one."""

    seq: int
    kind: int
    flags: int
    disk: int
    offset: int
    length: int
    payload: bytes | None


cdef void command_done(vrep_command *command) noexcept nogil:
    command.tag = 1


cdef class Pending:
    """A command on its way."""

    cdef vrep_command *command
    cdef iovec iov
    cdef readonly object buffer
    cdef bint over

    @property
    def done(self):
        return self.over or self.command == NULL or self.command.tag == 1


cdef class GroupDriver(Group):
    """A group that its caller drives."""

    def poll(self):
        """One turn of the loop, without waiting."""
        cdef vrep_group *group = self.enter()
        try:
            with nogil:
                vrep_group_poll(group)
        finally:
            self.leave()

    def submit(self, op, disk=0, offset=0, length=0, data=None, *, fua=False, no_hole=False,
               fast=False):
        """Start a command; AgainError when neither a command nor memory is free."""
        cdef vrep_group *group = self.enter()
        cdef Pending pending = Pending()
        cdef vrep_command *command
        cdef int status
        cdef Py_ssize_t at = 0
        try:
            command = vrep_command_get(group)
            if command == NULL:
                raise AgainError("every command is in flight")
            command.op = OPS[op]
            command.flags = ((VREP_COMMAND_FUA if fua else 0) | (VREP_COMMAND_FAST if fast else 0)
                             | (VREP_COMMAND_NO_HOLE if no_hole else 0))
            command.disk = disk
            command.offset = offset
            command.length = len(data) if op == "write" else length
            command.done = command_done
            command.tag = 0
            status = vrep_command_prepare(command)
            if status != 0:
                vrep_command_put(command)
                check(status)
            pending.command = command
            if op == "write":
                pending.buffer = bytes(data)
                for i in range(command.iovcnt):
                    memcpy(command.iov[i].iov_base, PyBytes_AS_STRING(pending.buffer) + at,
                           command.iov[i].iov_len)
                    at += <Py_ssize_t>command.iov[i].iov_len
            elif op == "read":
                pending.buffer = PyBytes_FromStringAndSize(NULL, length)
                pending.iov.iov_base = PyBytes_AS_STRING(pending.buffer)
                pending.iov.iov_len = length
                command.iov = &pending.iov
                command.iovcnt = 1
            with nogil:
                vrep_command_submit(command)
            return pending
        finally:
            self.leave()

    def result(self, Pending pending):
        """Turn the loop until it is done; the bytes of a read."""
        cdef int status
        while not pending.done:
            self.poll()
        if pending.command == NULL:
            raise InvalidError("the result was taken")
        self.enter()
        self.leave()
        status = pending.command.status
        is_read = pending.command.op == VREP_OP_READ
        vrep_command_put(pending.command)
        pending.command = NULL
        pending.over = True
        check(status)
        return pending.buffer if is_read else None

    def run(self, op, disk=0, offset=0, length=0, data=None, *, fua=False, no_hole=False,
            fast=False):
        """Submit, turning the loop while there is no room, and wait for the result."""
        while True:
            try:
                pending = self.submit(op, disk, offset, length, data, fua=fua, no_hole=no_hole,
                                      fast=fast)
                break
            except AgainError:
                self.poll()
        return self.result(pending)

    def dirty(self, uint32_t disk):
        """The change map of a disk: one byte per bit of it, 1 where it is dirty."""
        cdef vrep_group *group = self.enter()
        cdef vrep_map *map = vrep_group_map(group)
        cdef vrep_map_header *header
        cdef uint64_t *words
        try:
            if map == NULL:
                raise InvalidError("the group has no change map")
            header = vrep_map_header_of(map)
            words = <uint64_t *>calloc(header.disk[disk].words, 8)
            if words == NULL:
                raise MemoryError
            vrep_map_union(map, <unsigned short>disk, words)
            result = bytes(words[bit // 64] >> (bit % 64) & 1
                           for bit in range(header.disk[disk].bits))
            free(words)
            return result
        finally:
            self.leave()

    def steps(self):
        """What a stepped group waits for: jobs, then requests to the disks, the oldest first."""
        cdef vrep_group *group = self.enter()
        cdef vrep_group_step step
        cdef uint32_t index = 0
        found = []
        while vrep_group_waiting(group, index, &step):
            found.append(Step(STEPS[step.kind], step.op, step.flags, step.disk, step.offset,
                              step.length))
            index += 1
        self.leave()
        return found

    def step(self, uint32_t index=0):
        """Run one of them; ``poll`` sees what it did."""
        vrep_group_step_at(self.enter(), index)
        self.leave()

    def step_failing(self, uint32_t index, int error):
        """End a request to a disk with an errno, with nothing of it done; run a job."""
        vrep_group_step_failing(self.enter(), index, error)
        self.leave()

    def set_time(self, uint64_t mono_ns, uint64_t wall_ns):
        """What time it is for a stepped group."""
        vrep_group_set_time(self.enter(), mono_ns, wall_ns)
        self.leave()

    def kill(self):
        """End as a killed process does: nothing is drained or stored."""
        cdef vrep_group *group = self.handle
        self.handle = NULL
        if group != NULL:
            with nogil:
                vrep_group_abandon(group)


cdef class Follower:
    """A consumer: reads records and says what its target holds durably."""

    cdef vrep_ring_reader *reader
    cdef iovec *iov

    def __cinit__(self, path, fds):
        cdef int status
        cdef bytes name = str(path).encode()
        self.iov = <iovec *>calloc(IOV_MOST, sizeof(iovec))
        if self.iov == NULL:
            raise MemoryError
        status = vrep_ring_reader_open(name, fds[0], fds[1], fds[2], &self.reader)
        for fd in fds:
            os.close(fd)
        check(status)

    def __dealloc__(self):
        if self.reader != NULL:
            vrep_ring_reader_close(self.reader)
        free(self.iov)

    @property
    def head(self):
        return vrep_ring_reader_head(self.reader)

    @property
    def released(self):
        return vrep_ring_reader_released(self.reader)

    def record(self, uint64_t seq):
        """The record of a seq, its payload copied."""
        cdef vrep_ring_desc desc
        cdef int count = 0
        cdef Py_ssize_t at = 0
        check(vrep_ring_reader_desc(self.reader, seq, &desc))
        payload = None
        if desc.chunk != VREP_NO_CHUNK:
            check(vrep_ring_reader_iov(self.reader, &desc, self.iov, IOV_MOST, &count))
            payload = PyBytes_FromStringAndSize(NULL, desc.length)
            for i in range(count):
                memcpy(PyBytes_AS_STRING(payload) + at, self.iov[i].iov_base, self.iov[i].iov_len)
                at += <Py_ssize_t>self.iov[i].iov_len
        return Record(desc.seq, desc.kind, desc.flags, desc.disk, desc.offset, desc.length,
                      payload)

    def report(self, uint64_t durable, uint64_t received=0):
        """Tell the filter what the target has."""
        received = max(received, durable)
        vrep_ring_reader_set(self.reader, received, received, durable, 0)
