"""Disk: a backing store and its asynchronous I/O, from one thread; see disk/disk.h."""

import os
import select
from typing import NamedTuple

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_FromStringAndSize

from vrep._core._status cimport check
from vrep.errors import InvalidError, TimeLimitError

cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void **out, size_t align, size_t size)

cdef extern from "<stdbool.h>":
    ctypedef bint c_bool "bool"

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "disk/disk.h" nogil:
    enum:
        VREP_IO_READ
        VREP_IO_WRITE
        VREP_IO_FLUSH
        VREP_IO_ZERO
        VREP_IO_FUA
        VREP_IO_NO_HOLE
        VREP_IO_FAST
        VREP_DISK_DIRECT
        VREP_DISK_READ_ONLY
        VREP_DISK_NO_LOCK
        VREP_WRITE_BYTES_MAX
    struct vrep_disk:
        pass
    struct vrep_engine:
        pass
    struct vrep_io:
        uint8_t op
        uint8_t flags
        c_bool inline_done
        uint64_t offset
        uint64_t length
        iovec *iov
        int iovcnt
        int status
        int os_error
        c_bool sync_failed
        void (*done)(vrep_io *io) noexcept nogil
        void *owner
    int vrep_engine_create(uint32_t threads, vrep_engine **out)
    void vrep_engine_destroy(vrep_engine *engine)
    int vrep_engine_fd(const vrep_engine *engine)
    uint32_t vrep_engine_reap(vrep_engine *engine)
    struct vrep_disk_info:
        uint64_t bytes
        uint32_t block_bytes
        uint32_t align_bytes
        c_bool zero_is_cheap
        c_bool direct
        c_bool block_device
        c_bool read_only
    int vrep_disk_open(vrep_engine *engine, const char *uri, uint32_t flags, vrep_disk **out)
    void vrep_disk_close(vrep_disk *disk)
    int vrep_disk_info_get "vrep_disk_info"(vrep_disk *disk, vrep_disk_info *out)
    int vrep_disk_refresh(vrep_disk *disk)
    void vrep_disk_submit(vrep_disk *disk, vrep_io *io)
    void vrep_disk_widen(const vrep_disk *disk, uint64_t *offset, uint64_t *length)
    int vrep_disk_extent(vrep_disk *disk, uint64_t offset, uint64_t max, uint64_t *length,
                         c_bool *hole)
    int vrep_overlay_open(vrep_engine *engine, const char *path, const char *onto,
                          const uint8_t *view_id, uint64_t disk_bytes, uint32_t block_bytes,
                          vrep_disk **out)
    c_bool vrep_disk_is_overlay(const vrep_disk *disk)
    c_bool vrep_overlay_absent(const vrep_disk *disk, uint64_t offset, uint64_t length,
                               uint64_t *absent, uint64_t *absent_length)
    void vrep_overlay_set_present(vrep_disk *disk, uint64_t offset, uint64_t length)
    int vrep_overlay_sync(vrep_disk *disk)
    uint64_t vrep_overlay_present_bytes(const vrep_disk *disk)

OPS = {"read": VREP_IO_READ, "write": VREP_IO_WRITE, "flush": VREP_IO_FLUSH, "zero": VREP_IO_ZERO}
DATA_BYTES_MAX = VREP_WRITE_BYTES_MAX
cdef size_t PAGE = 4096


class DiskInfo(NamedTuple):
    """What a backing store is."""

    size: int
    block_bytes: int
    align_bytes: int
    zero_is_cheap: bool
    direct: bool
    block_device: bool
    read_only: bool


cdef class Disk


cdef void io_done(vrep_io *io) noexcept nogil:
    (<uint8_t *>io.owner)[0] = 1


cdef class Request:
    """A request on its way: it owns its memory until it is done."""

    cdef vrep_io io
    cdef iovec *iov
    cdef char *memory
    cdef char *data
    cdef uint8_t over
    cdef readonly Disk disk

    def __dealloc__(self):
        free(self.memory)
        free(self.iov)

    @property
    def done(self):
        return self.over != 0

    @property
    def inline(self):
        """Whether it was done when ``submit`` returned."""
        return bool(self.io.inline_done)

    @property
    def status(self):
        """The native status, 0 for success; InvalidError while it is on its way."""
        if not self.over:
            raise InvalidError("the request is still on its way")
        return self.io.status

    @property
    def sync_failed(self):
        return bool(self.io.sync_failed)

    def result(self):
        """The bytes of a read, None otherwise; raises what went wrong."""
        if self.status < 0:
            try:
                check(self.io.status)
            except Exception as error:
                if self.io.os_error:
                    error.detail = os.strerror(self.io.os_error)
                raise
        if self.io.op == VREP_IO_READ:
            return PyBytes_FromStringAndSize(self.data, <Py_ssize_t>self.io.length)
        return None


cdef class Engine:
    """A pool of threads and an io_uring; everything of it belongs to one thread."""

    cdef vrep_engine *engine
    cdef set pending
    cdef set disks

    def __cinit__(self, uint32_t threads=4):
        self.pending = set()
        self.disks = set()
        check(vrep_engine_create(threads, &self.engine))

    def __dealloc__(self):
        if self.engine != NULL:
            with nogil:
                vrep_engine_destroy(self.engine)

    @property
    def inflight(self):
        return len(self.pending)

    def fileno(self):
        return vrep_engine_fd(self.engine)

    cdef collect(self):
        for request in [request for request in self.pending if request.done]:
            self.pending.discard(request)

    def reap(self):
        """Complete what is ready; returns how many."""
        if self.engine == NULL:
            raise InvalidError("the engine is closed")
        count = vrep_engine_reap(self.engine)
        self.collect()
        return count

    def wait(self, Request request=None, timeout=60.0):
        """Until one request, or all, are done; TimeLimitError after ``timeout`` seconds."""
        while self.pending and (request is None or not request.done):
            ready, _, _ = select.select([self.fileno()], [], [], timeout)
            if not ready:
                raise TimeLimitError(f"{len(self.pending)} requests are on their way")
            self.reap()

    def close(self):
        """Wait for everything in flight, close the disks."""
        if self.engine != NULL:
            with nogil:
                vrep_engine_destroy(self.engine)
            self.engine = NULL
            self.collect()
            for disk in list(self.disks):
                disk.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()


cdef class Disk:
    """A file, a block device or an overlay. With ``view_id`` the path of an overlay; with ``onto``
    as well, the URI of the disk that it fills in place."""

    cdef vrep_disk *disk
    cdef readonly Engine engine

    def __init__(self, Engine engine not None, uri, *, direct=False, read_only=False, lock=True,
                 bytes view_id=None, uint64_t size=0, uint32_t block_bytes=65536, onto=None):
        cdef uint32_t flags = ((VREP_DISK_DIRECT if direct else 0)
                               | (VREP_DISK_READ_ONLY if read_only else 0)
                               | (0 if lock else VREP_DISK_NO_LOCK))
        cdef bytes name = os.fsencode(uri)
        cdef bytes filled = b"" if onto is None else os.fsencode(onto)
        cdef const char *where = <const char *>filled if filled else NULL
        if engine.engine == NULL or self.disk != NULL:
            raise InvalidError("the engine is closed, or the disk open")
        self.engine = engine
        if view_id is None:
            check(vrep_disk_open(engine.engine, name, flags, &self.disk))
        elif len(view_id) != 16:
            raise InvalidError("a view id has 16 bytes")
        else:
            check(vrep_overlay_open(engine.engine, name, where, view_id, size, block_bytes,
                                    &self.disk))
        engine.disks.add(self)

    cdef vrep_disk *enter(self) except NULL:
        if self.disk == NULL or self.engine.engine == NULL:
            raise InvalidError("the disk is closed")
        return self.disk

    def close(self):
        """Wait for its requests, close it."""
        if self.disk == NULL:
            return
        if self.engine.engine != NULL:
            while any(request.disk is self for request in self.engine.pending):
                select.select([self.engine.fileno()], [], [])
                self.engine.reap()
        vrep_disk_close(self.disk)
        self.disk = NULL
        self.engine.disks.discard(self)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.close()

    @property
    def info(self):
        cdef vrep_disk_info info
        memset(&info, 0, sizeof(info))
        check(vrep_disk_info_get(self.enter(), &info))
        return DiskInfo(info.bytes, info.block_bytes, info.align_bytes, bool(info.zero_is_cheap),
                        bool(info.direct), bool(info.block_device), bool(info.read_only))

    def refresh(self):
        """Read the size again."""
        check(vrep_disk_refresh(self.enter()))

    def submit(self, op, uint64_t offset=0, uint64_t length=0, data=None, *, fua=False,
               no_hole=False, fast=False, size_t skew=0, size_t piece_bytes=0):
        """Start a request. Its memory starts ``skew`` bytes behind a page and is handed over in
        pieces of ``piece_bytes`` (0: one piece)."""
        cdef vrep_disk *disk = self.enter()
        cdef Request request = Request()
        cdef const uint8_t[::1] view
        cdef size_t at = 0, count
        request.disk = self
        request.io.op = OPS[op]
        request.io.flags = ((VREP_IO_FUA if fua else 0) | (VREP_IO_NO_HOLE if no_hole else 0)
                            | (VREP_IO_FAST if fast else 0))
        if op == "write":
            view = data
            length = view.shape[0]
        request.io.offset = offset
        request.io.length = length
        if op in ("read", "write") and length <= VREP_WRITE_BYTES_MAX:
            piece_bytes = piece_bytes or max(length, 1)
            count = (length + piece_bytes - 1) // piece_bytes
            request.iov = <iovec *>calloc(count + 1, sizeof(iovec))
            if (request.iov == NULL or posix_memalign(<void **>&request.memory, PAGE,
                                                      length + skew + 1) != 0):
                raise MemoryError
            request.data = request.memory + skew
            if op == "write" and length:
                memcpy(request.data, &view[0], length)
            for i in range(count):
                request.iov[i].iov_base = request.data + at
                request.iov[i].iov_len = min(piece_bytes, length - at)
                at += piece_bytes
            request.io.iov = request.iov
            request.io.iovcnt = <int>count
        request.io.done = io_done
        request.io.owner = &request.over
        self.engine.pending.add(request)
        with nogil:
            vrep_disk_submit(disk, &request.io)
        if request.io.inline_done:
            request.over = 1
            self.engine.pending.discard(request)
        return request

    def run(self, op, offset=0, length=0, data=None, **options):
        """Submit, wait, and give the result."""
        request = self.submit(op, offset, length, data, **options)
        self.engine.wait(request)
        return request.result()

    def read(self, offset, length):
        return self.run("read", offset, length)

    def write(self, offset, data, *, fua=False):
        self.run("write", offset, 0, data, fua=fua)

    def zero(self, offset, length, *, fua=False, no_hole=False, fast=False):
        self.run("zero", offset, length, fua=fua, no_hole=no_hole, fast=fast)

    def flush(self):
        self.run("flush")

    def widen(self, uint64_t offset, uint64_t length):
        """The range that must be held for a request."""
        vrep_disk_widen(self.enter(), &offset, &length)
        return offset, length

    def extent(self, uint64_t offset, uint64_t most=2**63):
        """``(length, is a hole)`` of what begins at ``offset``."""
        cdef uint64_t length = 0
        cdef c_bool hole = False
        check(vrep_disk_extent(self.enter(), offset, most, &length, &hole))
        return length, bool(hole)

    # ---- overlays ---------------------------------------------------------------

    cdef vrep_disk *overlay(self) except NULL:
        if not vrep_disk_is_overlay(self.enter()):
            raise InvalidError("the disk is no overlay")
        return self.disk

    def absent(self, uint64_t offset, uint64_t length):
        """The first absent run of blocks inside a range, or None."""
        cdef uint64_t at = 0, count = 0
        if not vrep_overlay_absent(self.overlay(), offset, length, &at, &count):
            return None
        return at, count

    def set_present(self, uint64_t offset, uint64_t length):
        vrep_overlay_set_present(self.overlay(), offset, length)

    def sync(self):
        """Data first, then presence."""
        cdef vrep_disk *disk = self.overlay()
        cdef int status
        with nogil:
            status = vrep_overlay_sync(disk)
        check(status)

    @property
    def present_bytes(self):
        return vrep_overlay_present_bytes(self.overlay())
