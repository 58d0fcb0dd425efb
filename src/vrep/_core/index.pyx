"""Index: where each piece of a segment stands; runs; the newest piece at a point.

See map/index.h and map/extent_map.h. Arrays that an :class:`Index` gives are views
of its memory or its mapped file, read-only, and keep it alive.
"""

import os

import numpy as np

from vrep._core import layout
from vrep.errors import BusyError, InvalidError, VrepError

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from vrep._core._status cimport check

cdef extern from "base/status.h":
    enum:
        VREP_E_CORRUPT

cdef extern from "format/checksum.h":
    void vrep_digest_once(const void *data, size_t length, uint8_t *out)

cdef extern from "map/index.h" nogil:
    enum:
        VREP_INDEX_MERGE_MAX
    struct vrep_position:
        uint32_t epoch
        uint16_t lane
        uint16_t reserved
        uint64_t seq
    struct vrep_index_stream:
        uint32_t epoch
    struct vrep_index_entry:
        uint64_t offset
    struct vrep_index_summary:
        uint64_t records
        uint64_t entries
        uint64_t data_bytes
        vrep_position first
        vrep_position last
        bint has_stream
        vrep_index_stream stream
    struct vrep_index_builder:
        pass
    int vrep_index_builder_new(uint32_t segment, const uint8_t *group_id,
                               const vrep_index_stream *stream, vrep_index_builder **out)
    void vrep_index_builder_free(vrep_index_builder *builder)
    int vrep_index_builder_add(vrep_index_builder *builder, const void *buffer, size_t length,
                               uint64_t position, uint64_t *records)
    int vrep_index_builder_time(vrep_index_builder *builder, uint64_t wall_ns, vrep_position at)
    void vrep_index_builder_aged(vrep_index_builder *builder, uint64_t aged_ns)
    void vrep_index_builder_summary(const vrep_index_builder *builder, vrep_index_summary *out)
    int vrep_index_builder_finish(vrep_index_builder *builder, uint64_t segment_bytes,
                                  uint8_t **out, size_t *length)
    int vrep_index_open(int fd, vrep_index **out)
    int vrep_index_open_bytes(const void *data, size_t length, vrep_index **out)
    int vrep_index_verify(const vrep_index *index)
    int vrep_index_check_events(const vrep_index *index)
    void vrep_index_free(vrep_index *index)
    int vrep_index_merge(const vrep_index *const *indexes, size_t count, uint32_t level, int fd,
                         vrep_index_trailer *trailer)

cdef extern from "map/extent_map.h" nogil:
    struct vrep_extent:
        uint64_t offset
        uint64_t length
    struct vrep_extent_map:
        pass
    int vrep_extent_map_new(const vrep_index *const *indexes, size_t count,
                            const vrep_reign *ancestry, size_t reigns, vrep_extent_map **out)
    void vrep_extent_map_free(vrep_extent_map *map)
    void vrep_extent_map_scatter(vrep_extent_map *map)
    const vrep_index_stream *vrep_extent_map_streams(const vrep_extent_map *map, uint32_t *count)
    int vrep_extent_map_lookup(const vrep_extent_map *map, uint32_t disk, uint64_t offset,
                               uint64_t length, vrep_extent *out, size_t cap, size_t *count,
                               uint64_t *done)
    int vrep_extent_map_next(const vrep_extent_map *map, uint32_t disk, uint64_t offset,
                             uint64_t *next)

MERGE_MAX = VREP_INDEX_MERGE_MAX
EXTENT = np.dtype([
    ("offset", "<u8"), ("seq", "<u8"), ("length", "<u4"), ("epoch", "<u4"), ("segment", "<u4"),
    ("position", "<u4"), ("skip", "<u4"), ("stream", "<u4"), ("piece", "<u2"), ("kind", "u1"),
    ("reserved0", "u1"), ("reserved1", "<u4"),
])
assert EXTENT.itemsize == sizeof(vrep_extent)

cdef tuple position(vrep_position at):
    return at.epoch, at.lane, at.seq


cdef int named(int status, str where) except -1:
    try:
        return check(status)
    except VrepError as error:
        raise type(error)(f"{where}: {error.detail}") from None


cdef class IndexBuilder:
    """Takes whole records as they are appended to a segment, and writes its footer.

    :param segment: number of the segment, from 1.
    :param group_id: 16 bytes.
    :param stream: the stream in force where the segment starts, as the ``stream`` of
        the builder before (an INDEX_STREAM row); None: a STREAM record comes first.
    """

    cdef vrep_index_builder *builder
    cdef readonly uint32_t segment
    cdef bint busy

    def __cinit__(self, uint32_t segment, group_id, stream=None):
        cdef bytes group = bytes(group_id)
        cdef bytes row
        cdef vrep_index_stream first
        cdef const vrep_index_stream *given = NULL
        if len(group) != 16:
            raise InvalidError(f"a group id has 16 bytes, not {len(group)}")
        if stream is not None:
            row = np.asarray(stream, layout.INDEX_STREAM).tobytes()
            if len(row) != sizeof(first):
                raise InvalidError("one INDEX_STREAM row is needed")
            memcpy(&first, <const uint8_t *>row, sizeof(first))
            given = &first
        self.segment = segment
        check(vrep_index_builder_new(segment, <const uint8_t *>group, given, &self.builder))

    def __dealloc__(self):
        vrep_index_builder_free(self.builder)

    cdef int enter(self) except -1:
        if self.busy:
            raise BusyError("the builder is in use by another thread")
        self.busy = True
        return 0

    def add(self, buffer, uint64_t position):
        """Take the whole records in ``buffer``, which stands at byte ``position`` of the segment.

        Returns how many there were. TornError: the last one is only in part there.
        After an error the builder holds the records before the wrong one.
        """
        cdef Py_buffer view
        cdef uint64_t records = 0
        cdef int status
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        try:
            self.enter()
            try:
                with nogil:
                    status = vrep_index_builder_add(self.builder, view.buf, <size_t>view.len,
                                                    position, &records)
            finally:
                self.busy = False
        finally:
            PyBuffer_Release(&view)
        if status < 0:
            named(status, f"segment {self.segment}, byte {position}, record {records}")
        return records

    def time(self, uint64_t wall_ns, uint32_t epoch, uint16_t lane, uint64_t seq):
        """Add one sample of the time index: the last record of a commit."""
        cdef vrep_position at
        at.epoch, at.lane, at.reserved, at.seq = epoch, lane, 0, seq
        self.enter()
        try:
            check(vrep_index_builder_time(self.builder, wall_ns, at))
        finally:
            self.busy = False

    def aged(self, uint64_t aged_ns):
        """What has passed for the store, now that the segment is closed."""
        self.enter()
        try:
            vrep_index_builder_aged(self.builder, aged_ns)
        finally:
            self.busy = False

    cdef vrep_index_summary summary(self):
        cdef vrep_index_summary summary
        vrep_index_builder_summary(self.builder, &summary)
        return summary

    @property
    def records(self):
        """Records taken, STREAM and TALLY not counted."""
        return self.summary().records

    @property
    def entries(self):
        return self.summary().entries

    @property
    def data_bytes(self):
        """Plaintext bytes of all entries."""
        return self.summary().data_bytes

    @property
    def first(self):
        """``(epoch, lane, seq)`` of the oldest record, zeros when there is none."""
        return position(self.summary().first)

    @property
    def last(self):
        return position(self.summary().last)

    @property
    def stream(self):
        """The stream in force now, an INDEX_STREAM row, or None."""
        cdef vrep_index_summary summary = self.summary()
        if not summary.has_stream:
            return None
        raw = PyBytes_FromStringAndSize(<const char *>&summary.stream, sizeof(summary.stream))
        return np.frombuffer(raw, layout.INDEX_STREAM)[0]

    def finish(self, uint64_t segment_bytes):
        """The whole footer, as it stands at ``segment_bytes`` of the file (a multiple of 64).

        The builder may take more records afterwards.
        """
        cdef uint8_t *out = NULL
        cdef size_t length = 0
        cdef int status
        self.enter()
        try:
            with nogil:
                status = vrep_index_builder_finish(self.builder, segment_bytes, &out, &length)
        finally:
            self.busy = False
        named(status, f"segment {self.segment}")
        try:
            return PyBytes_FromStringAndSize(<const char *>out, <Py_ssize_t>length)
        finally:
            free(out)

    def freeze(self):
        """An :class:`Index` in memory of what was taken so far."""
        return Index.from_bytes(self.finish(0))


cdef class Index:
    """The index of a segment or a run: :meth:`open`, :meth:`from_bytes`, ``freeze``."""

    def __init__(self):
        raise TypeError("use Index.open, Index.from_bytes or IndexBuilder.freeze")

    def __dealloc__(self):
        vrep_index_free(self.index)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, <void *>self.index.base, <Py_ssize_t>self.index.bytes, 1,
                          flags)

    @staticmethod
    def open(path, *, bint verify=False):
        """Map the index at the end of a file.

        Only the trailer and the table of streams are looked at; what is read later is
        checked then. With ``verify`` every byte is looked at now.
        """
        cdef Index self = Index.__new__(Index)
        cdef int status, descriptor
        self.name = os.fsdecode(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            descriptor = fd
            with nogil:
                status = vrep_index_open(descriptor, &self.index)
        finally:
            os.close(fd)
        named(status, self.name)
        if verify:
            self.verify()
        return self

    @staticmethod
    def from_bytes(data, *, bint verify=False):
        """The index at the end of ``data``, the bytes of a whole file, which are copied."""
        cdef Index self = Index.__new__(Index)
        cdef Py_buffer view
        cdef int status
        self.name = "an index in memory"
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                status = vrep_index_open_bytes(view.buf, <size_t>view.len, &self.index)
        finally:
            PyBuffer_Release(&view)
        named(status, self.name)
        if verify:
            self.verify()
        return self

    def verify(self):
        """Check every byte: digests, order, entries, nodes. Raises CorruptError."""
        cdef int status
        with nogil:
            status = vrep_index_verify(self.index)
        named(status, self.name)

    cdef array(self, dtype, uint64_t at, uint64_t count):
        return np.frombuffer(self, dtype, <Py_ssize_t>count,
                             <Py_ssize_t>(at - self.index.base_at))

    @property
    def trailer(self):
        """The trailer as a dict; positions are ``(epoch, lane, seq)``, ids are bytes."""
        return trailer_dict(&self.index.trailer)

    @property
    def digest(self):
        """XXH3-128 of the trailer, as a manifest names it."""
        return trailer_digest(&self.index.trailer)

    @property
    def file_bytes(self):
        return self.index.file_bytes

    @property
    def segment(self):
        """Number of the segment; 0: a run."""
        return self.index.trailer.segment

    @property
    def short_count(self):
        return self.index.trailer.short_count

    @property
    def long_count(self):
        return self.index.trailer.long_count

    @property
    def short_entries(self):
        """Entries of at most 128 KiB, an INDEX_ENTRY array; not checked."""
        return self.array(layout.INDEX_ENTRY, self.index.trailer.short_at,
                          self.index.trailer.short_count)

    @property
    def long_entries(self):
        return self.array(layout.INDEX_ENTRY, self.index.trailer.long_at,
                          self.index.trailer.long_count)

    @property
    def streams(self):
        """The table that entries and events refer to, an INDEX_STREAM array."""
        return self.array(layout.INDEX_STREAM, self.index.trailer.streams_at,
                          self.index.trailer.streams_count)

    @property
    def events(self):
        """MARK, GAP_BEGIN, GAP_END, RESIZE and OBJECT records, an INDEX_EVENT array in order."""
        cdef int status
        with nogil:
            status = vrep_index_check_events(self.index)
        named(status, self.name)
        return self.array(layout.INDEX_EVENT, self.index.trailer.events_at,
                          self.index.trailer.events_count)

    @property
    def times(self):
        """The time index, an INDEX_TIME array by position; checked by :meth:`verify` only."""
        return self.array(layout.INDEX_TIME, self.index.trailer.times_at,
                          self.index.trailer.times_count)

    def __repr__(self):
        kind = f"segment {self.segment}" if self.segment else "run"
        return f"<Index of {kind}, {self.short_count} + {self.long_count} entries, {self.name}>"


cdef bytes trailer_digest(const vrep_index_trailer *trailer):
    cdef uint8_t digest[16]
    vrep_digest_once(trailer, sizeof(vrep_index_trailer), digest)
    return PyBytes_FromStringAndSize(<const char *>digest, 16)


cdef dict trailer_dict(const vrep_index_trailer *trailer):
    raw = PyBytes_FromStringAndSize(<const char *>trailer, sizeof(vrep_index_trailer))
    row = np.frombuffer(raw, layout.INDEX_TRAILER)[0]
    cdef dict found = {}
    for name in layout.INDEX_TRAILER.names:
        value = row[name]
        if name in ("first", "last"):
            found[name] = (int(value["epoch"]), int(value["lane"]), int(value["seq"]))
        elif isinstance(value, np.ndarray):
            found[name] = value.tobytes()
        else:
            found[name] = int(value)
    return found


cdef class Handles:
    def __cinit__(self, indexes):
        cdef Index one
        self.indexes = tuple(indexes)
        self.count = len(self.indexes)
        self.handles = <const vrep_index **>calloc(self.count + 1, sizeof(vrep_index *))
        if self.handles == NULL:
            raise MemoryError
        for i, index in enumerate(self.indexes):
            one = index
            self.handles[i] = one.index

    def __dealloc__(self):
        free(self.handles)

    cdef of_group(self, group_id):
        # None: not compared.
        for index in self.indexes:
            if group_id is not None and index.trailer["group_id"] != bytes(group_id):
                raise InvalidError(f"{index.name} is of another group")

    cdef int named(self, int status, str where) except -1:
        cdef Index one
        cdef int found
        if status == VREP_E_CORRUPT and self.damaged is None:
            names = []
            for one in self.indexes:
                with nogil:
                    found = vrep_index_verify(one.index)
                if found < 0:
                    names.append(one.name)
            self.damaged = ", ".join(names)
        if status == VREP_E_CORRUPT and self.damaged:
            where = f"{where}, index of {self.damaged}"
        return named(status, where)


cdef class Reigns:
    def __cinit__(self, ancestry):
        self.count = len(ancestry)
        self.reigns = <vrep_reign *>calloc(self.count + 1, sizeof(vrep_reign))
        if self.reigns == NULL:
            raise MemoryError
        for i, (epoch, seq) in enumerate(ancestry):
            self.reigns[i].epoch = epoch
            self.reigns[i].seq_max = seq

    def __dealloc__(self):
        free(self.reigns)


def merge(indexes, out, uint32_t level):
    """Write the run that holds all of ``indexes``, every version kept.

    ``out`` is a path, which must not exist: the file is synced, or removed after an
    error (the directory is the caller's to sync). Or it is a descriptor: nothing is
    synced. Inputs are checked on the way. Memory does not grow with the inputs.
    Returns the trailer as a dict, with ``digest`` and ``file_bytes``.
    """
    cdef Handles inputs = Handles(indexes)
    cdef vrep_index_trailer trailer
    cdef int status, descriptor
    cdef dict found
    if isinstance(out, int):
        fd = out
    else:
        fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            descriptor = fd
            with nogil:
                status = vrep_index_merge(inputs.handles, inputs.count, level, descriptor,
                                          &trailer)
            inputs.named(status, f"merge of {inputs.count} indexes")
            found = trailer_dict(&trailer)
            found["digest"] = trailer_digest(&trailer)
            found["file_bytes"] = os.fstat(fd).st_size
            if fd is not out:
                os.fsync(fd)
        finally:
            if fd is not out:
                os.close(fd)
    except BaseException:
        if fd is not out:
            os.unlink(out)
        raise
    return found


cdef class ExtentMap:
    """The newest piece of every byte at one recovery point.

    :param indexes: the indexes of one group, runs, segments and frozen tail, in any
        order; one that another covers does no harm.
    :param ancestry: ``(epoch, max_seq)`` of the point's epoch and of each before it.
    :param group_id: 16 bytes that the indexes must be of; None: not compared.

    Lookups may run in several threads at once; the GIL is released.
    """

    cdef vrep_extent_map *map
    cdef Handles inputs
    cdef readonly tuple ancestry

    def __cinit__(self, indexes, ancestry, *, group_id=None):
        cdef Reigns reigns
        cdef int status
        self.inputs = Handles(indexes)
        self.inputs.of_group(group_id)
        self.ancestry = tuple((int(epoch), int(seq)) for epoch, seq in ancestry)
        reigns = Reigns(self.ancestry)
        with nogil:
            status = vrep_extent_map_new(self.inputs.handles, self.inputs.count, reigns.reigns,
                                         reigns.count, &self.map)
        self.inputs.named(status, f"extent map of {self.inputs.count} indexes")

    def __dealloc__(self):
        vrep_extent_map_free(self.map)

    def scatter(self):
        """Lookups will be short and anywhere: each waits once for the disk, and reads no
        neighbours. To be called before the first."""
        vrep_extent_map_scatter(self.map)

    @property
    def streams(self):
        """The table that ``stream`` of an extent refers to, an INDEX_STREAM array."""
        cdef uint32_t count = 0
        cdef const vrep_index_stream *rows = vrep_extent_map_streams(self.map, &count)
        raw = PyBytes_FromStringAndSize(<const char *>rows, count * sizeof(vrep_index_stream))
        return np.frombuffer(raw, layout.INDEX_STREAM)

    def lookup(self, uint32_t disk, uint64_t offset, uint64_t length):
        """EXTENT array that tiles ``[offset, offset + length)`` exactly.

        ``kind`` is 0 where nothing was ever written, KIND_WRITE for data (sync copies
        included), KIND_ZEROES for zeroes. Data begin ``skip`` bytes into the plaintext
        of piece ``piece`` of the record at byte ``position`` of ``segment``. No extent
        is longer than 2 GiB. CorruptError: an index is damaged where it was read.
        """
        cdef size_t cap = 64, count = 0
        cdef uint64_t done = 0, some
        cdef uintptr_t room
        cdef int status
        out = np.empty(cap, EXTENT)
        while done < length or length == 0:
            room = out.ctypes.data
            with nogil:
                status = vrep_extent_map_lookup(self.map, disk, offset + done, length - done,
                                                <vrep_extent *>room, cap, &count, &some)
            if status < 0:
                self.inputs.named(status, f"disk {disk}, bytes {offset} to {offset + length}")
            done += some
            if done == length:
                break
            cap *= 4
            larger = np.empty(cap, EXTENT)
            larger[:count] = out[:count]
            out = larger
        return out[:count]

    def next_written(self, uint32_t disk, uint64_t offset):
        """The first offset >= ``offset`` that was ever written, zeroes included, or None."""
        cdef uint64_t found = 0
        cdef int status
        with nogil:
            status = vrep_extent_map_next(self.map, disk, offset, &found)
        if status < 0:
            self.inputs.named(status, f"disk {disk}, from byte {offset}")
        return found if status > 0 else None
