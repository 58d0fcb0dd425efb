"""Block hash: XXH3 of every block of a buffer or of a range of a file.

Values are those of the xxHash specification (XXH3, no seed; the default secret
unless one is given), bit for bit the same on every machine and for any number of
threads. With 128 bits a row is ``(low64, high64)``; where a row is stored as
bytes, low comes first and each half is little-endian, which is what
``hashes.astype("<u8").tobytes()`` gives.
"""

import os
from typing import NamedTuple

import numpy as np

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t, uintptr_t

from vrep._core._status cimport check
from vrep.errors import InvalidError, RangeError

cdef extern from "track/hash.h" nogil:
    enum:
        VREP_HASH_BLOCK_MIN
        VREP_HASH_BLOCK_MAX
        VREP_HASH_BLOCK_DEFAULT
        VREP_HASH_SECRET_MIN
        VREP_HASH_THREADS_MAX
    struct vrep_hash_options:
        uint32_t block_size
        uint32_t bits
        uint32_t threads
        const void *secret
        size_t secret_len
    uint64_t vrep_hash_count(uint64_t len, uint32_t block_size)
    int vrep_hash_blocks(const vrep_hash_options *options, const void *data, size_t len,
                         uint64_t *out, uint8_t *zeros)
    int vrep_hash_file(const vrep_hash_options *options, int fd, uint64_t offset, uint64_t len,
                       uint64_t *out, uint8_t *zeros)

BLOCK_MIN = VREP_HASH_BLOCK_MIN
BLOCK_MAX = VREP_HASH_BLOCK_MAX
BLOCK_DEFAULT = VREP_HASH_BLOCK_DEFAULT
SECRET_MIN = VREP_HASH_SECRET_MIN
THREADS_MAX = VREP_HASH_THREADS_MAX

# A signal (Ctrl-C) is looked at after so many bytes: a multiple of every block size,
# long enough that starting threads anew does not show.
cdef uint64_t SLICE_BYTES = 1 << 30


class BlockHashes(NamedTuple):
    """What hashing gives: ``hashes``, uint64 of shape ``(n, 2)`` or ``(n,)``, and
    ``zeros``, bool of shape ``(n,)``, true where a block is all zero bytes."""

    hashes: np.ndarray
    zeros: np.ndarray


cdef class Job:
    # One call's options, results, and the buffers it holds while C uses them.
    cdef vrep_hash_options options
    cdef Py_buffer secret
    cdef bint has_secret
    cdef uint64_t *out
    cdef uint8_t *flags
    cdef object hashes
    cdef object zeros

    def __cinit__(self, block_size, bits, secret, threads):
        if not (isinstance(block_size, int) and BLOCK_MIN <= block_size <= BLOCK_MAX
                and block_size & (block_size - 1) == 0):
            raise InvalidError(
                f"block_size is {block_size!r}: a power of two, {BLOCK_MIN} to {BLOCK_MAX}"
            )
        if bits not in (64, 128):
            raise InvalidError(f"bits is {bits!r}: 64 or 128")
        if not (isinstance(threads, int) and 1 <= threads <= THREADS_MAX):
            raise InvalidError(f"threads is {threads!r}: 1 to {THREADS_MAX}")
        self.options.block_size = block_size
        self.options.bits = bits
        self.options.threads = threads
        if secret is not None:
            PyObject_GetBuffer(secret, &self.secret, PyBUF_SIMPLE)
            self.has_secret = True
            if self.secret.len < <Py_ssize_t>VREP_HASH_SECRET_MIN:
                raise InvalidError(
                    f"secret has {self.secret.len} bytes: at least {SECRET_MIN}"
                )
            self.options.secret = self.secret.buf
            self.options.secret_len = <size_t>self.secret.len

    def __dealloc__(self):
        if self.has_secret:
            PyBuffer_Release(&self.secret)

    cdef prepare(self, uint64_t length, out, zeros):
        # Makes or checks the result arrays for `length` bytes.
        cdef uint64_t count = vrep_hash_count(length, self.options.block_size)
        cdef tuple rows = (count,)
        cdef tuple shape = rows if self.options.bits == 64 else (count, 2)
        self.hashes = result("out", out, np.uint64, shape)
        self.zeros = result("zeros", zeros, np.bool_, rows)
        if out is not None and zeros is not None and np.may_share_memory(out, zeros):
            raise InvalidError("out and zeros overlap")
        self.out = <uint64_t *><uintptr_t>self.hashes.ctypes.data
        self.flags = <uint8_t *><uintptr_t>self.zeros.ctypes.data

    cdef keep_off(self, const void *data, uint64_t length):
        # C sees one slice at a time; results of one could lie in the data of another.
        if overlap(data, length, self.out, self.hashes.nbytes):
            raise InvalidError("out overlaps the buffer")
        if overlap(data, length, self.flags, self.zeros.nbytes):
            raise InvalidError("zeros overlaps the buffer")

    cdef uint64_t *out_at(self, uint64_t done) noexcept nogil:
        return self.out + done // self.options.block_size * (self.options.bits // 64)

    cdef uint8_t *flags_at(self, uint64_t done) noexcept nogil:
        return self.flags + done // self.options.block_size


cdef bint overlap(const void *a, uint64_t a_length, const void *b, uint64_t b_length) noexcept:
    cdef uintptr_t from_a = <uintptr_t>a, from_b = <uintptr_t>b
    return from_a < from_b + b_length and from_b < from_a + a_length


cdef result(str name, given, dtype, tuple shape):
    if given is None:
        return np.empty(shape, dtype=dtype)
    if not isinstance(given, np.ndarray):
        raise TypeError(f"{name} is {type(given).__name__}: a NumPy array")
    if given.dtype != dtype or given.shape != shape:
        raise InvalidError(
            f"{name} is {given.dtype}{given.shape}: {np.dtype(dtype)}{shape} is needed"
        )
    if not (given.flags.c_contiguous and given.flags.aligned and given.flags.writeable):
        raise InvalidError(f"{name} is not contiguous, aligned and writeable")
    return given


def hash_blocks(buffer, block_size=VREP_HASH_BLOCK_DEFAULT, *, bits=128, secret=None, threads=1,
                out=None, zeros=None):
    """Hash every block of a buffer in place, without the GIL.

    :param buffer: any C-contiguous object with the buffer protocol; taken as bytes.
        Block ``i`` is ``buffer[i * block_size : (i + 1) * block_size]``; the last
        one is hashed as short as it is. ``n = ceil(bytes / block_size)``.
    :param block_size: bytes; a power of two, 512 to 16 MiB.
    :param bits: 128 (XXH3-128) or 64 (XXH3-64).
    :param secret: bytes-like, at least 136 bytes of high entropy, instead of XXH3's
        default secret. Another secret, or another length, gives unrelated values.
    :param threads: 1 to 64, the calling thread included.
    :param out: uint64 array to write to, ``(n, 2)`` for 128 bits and ``(n,)`` for
        64; made when None.
    :param zeros: bool array of shape ``(n,)`` to write to; made when None.
    :returns: :class:`BlockHashes`: the arrays ``out`` and ``zeros``. Each row of
        128 bits is ``(low64, high64)``.
    :raises InvalidError: an argument outside the above, or ``out`` or ``zeros``
        overlapping ``buffer``.
    :raises TypeError: ``buffer`` or ``secret`` has no buffer, or ``out`` or
        ``zeros`` is not an array.
    :raises BufferError, ValueError: the buffer is not C-contiguous.

    The buffer must not change meanwhile. Values follow the XXH3 part of the xxHash
    specification.
    """
    cdef Job job = Job(block_size, bits, secret, threads)
    cdef Py_buffer view
    cdef uint64_t length, done = 0, n
    cdef int status = 0

    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        length = <uint64_t>view.len
        job.prepare(length, out, zeros)
        job.keep_off(view.buf, length)
        while done < length:
            n = min(length - done, SLICE_BYTES)
            with nogil:
                status = vrep_hash_blocks(&job.options, <const uint8_t *>view.buf + done,
                                          <size_t>n, job.out_at(done), job.flags_at(done))
            check(status)
            done += n
            PyErr_CheckSignals()
    finally:
        PyBuffer_Release(&view)
    return BlockHashes(job.hashes, job.zeros)


def hash_file(path_or_fd, offset=0, length=None, block_size=VREP_HASH_BLOCK_DEFAULT, *, bits=128,
              secret=None, threads=1, out=None, zeros=None):
    """Hash every block of a range of a file or block device, without the GIL.

    Holes are zero blocks that are never read; the rest is read with pread, into one
    buffer of ``max(256 KiB, block_size)`` per thread, so the range may be larger
    than memory.

    :param path_or_fd: a path, or a descriptor open for reading. The position of a
        descriptor is the same afterwards, but moves meanwhile.
    :param offset: first byte; with an O_DIRECT descriptor a multiple of the
        device's block.
    :param length: bytes; None: up to the end. Blocks are counted from ``offset``.
    :returns: :class:`BlockHashes`; the other parameters are those of
        :func:`hash_blocks`.
    :raises RangeError: the range reaches past the end of the file, or the file
        became shorter meanwhile.
    :raises InvalidError: an argument outside the above.
    :raises StorageError: reading failed.
    :raises OSError: the file cannot be opened or has no end (a pipe).

    After an error ``out`` and ``zeros`` hold no meaning.
    """
    cdef Job job = Job(block_size, bits, secret, threads)

    if isinstance(path_or_fd, int):
        return hash_descriptor(job, path_or_fd, offset, length, out, zeros)
    fd = os.open(path_or_fd, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return hash_descriptor(job, fd, offset, length, out, zeros)
    finally:
        os.close(fd)


cdef hash_descriptor(Job job, int fd, offset, length, out, zeros):
    cdef uint64_t at, left, done = 0, n
    cdef int status = 0

    # The size decides how large the results are: a wrong range must not allocate them.
    position = os.lseek(fd, 0, os.SEEK_CUR)
    size = os.lseek(fd, 0, os.SEEK_END)
    os.lseek(fd, position, os.SEEK_SET)
    if length is None:
        length = size - offset
    if offset < 0 or length < 0 or offset + length > size:
        raise RangeError(f"bytes {offset} to {offset + length} of a file of {size}")
    at = offset
    left = length
    job.prepare(left, out, zeros)
    while done < left:
        n = min(left - done, SLICE_BYTES)
        with nogil:
            status = vrep_hash_file(&job.options, fd, at + done, n, job.out_at(done),
                                    job.flags_at(done))
        check(status)
        done += n
        PyErr_CheckSignals()
    return BlockHashes(job.hashes, job.zeros)
