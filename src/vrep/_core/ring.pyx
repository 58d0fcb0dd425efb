"""The shared-memory ring between a filter and its consumers; see ring/ring.h.

A ``RingReader`` follows a ring: ``wait`` for the head to move, take ``descriptors`` as a
structured array, and each ``payload`` as memoryviews into the ring, without a copy. Such
views stay valid until the consumer lets the ring go on with ``set``; an observer copies,
then asks ``still``. A ``RingProducer`` makes a ring of its own, for tests and examples.

A handle belongs to one thread at a time; close raises BusyError while views are alive.
"""

import os

import numpy as np

from vrep._core import layout
from vrep.errors import BusyError, FullError, InvalidError, RangeError

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from vrep._core._status cimport check

cdef extern from "base/status.h":
    enum:
        VREP_E_AGAIN

cdef extern from "ring/ring.h" nogil:
    enum:
        VREP_CHUNK_BYTES
        VREP_NO_CHUNK
        VREP_CONTROL_OBSERVER
        VREP_CONTROL_TARGET
    struct vrep_ring_config:
        uint8_t group_id[16]
        uint8_t epoch_id[16]
        uint32_t epoch
        uint16_t lane
        uint32_t descriptors
        uint32_t slots
        uint64_t payload_bytes
        uint64_t first_seq
        uint32_t mode
    struct vrep_ring_header:
        uint32_t descriptors
        uint32_t chunks
        uint32_t chunk_bytes
        uint64_t incarnation
    struct vrep_ring_slot:
        uint32_t state
        uint8_t kind
        uint8_t generation
        uint16_t disk
        uint64_t offset
        uint64_t seq
        uint32_t length
        uint32_t chunk
        uint32_t chunks
        uint16_t flags
    struct vrep_ring_desc:
        uint64_t seq
        uint32_t length
        uint32_t chunk
        uint32_t chunks
    struct vrep_ring_consumer:
        int control_fd
        int data_fd
        int peer_fd
        int space_fd
        uint64_t durable
        uint64_t received
        uint64_t read
        uint32_t role
    int vrep_ring_create(const char *path, const vrep_ring_config *config, vrep_ring **out)
    int vrep_ring_attach(const char *path, const uint8_t *group_id, vrep_ring **out)
    void vrep_ring_detach(vrep_ring *ring, bint clean)
    const vrep_ring_header *vrep_ring_get_header "vrep_ring_header" (const vrep_ring *ring)
    uint64_t vrep_ring_head(const vrep_ring *ring)
    uint64_t vrep_ring_released(const vrep_ring *ring)
    bint vrep_ring_was_clean(const vrep_ring *ring)
    uint64_t vrep_ring_free_bytes(const vrep_ring *ring)
    uint64_t vrep_ring_payload_bytes(const vrep_ring *ring)
    uint32_t vrep_ring_free_descriptors(const vrep_ring *ring)
    vrep_ring_slot *vrep_ring_reserve(vrep_ring *ring, uint64_t payload_bytes)
    void vrep_ring_grant(vrep_ring *ring, vrep_ring_slot *slot, uint64_t now_ns)
    void vrep_ring_cancel(vrep_ring *ring, vrep_ring_slot *slot)
    int vrep_ring_iov(vrep_ring *ring, const vrep_ring_slot *slot, uint32_t offset,
                      uint32_t length, iovec *iov, int max)
    uint64_t vrep_ring_stage(vrep_ring *ring, vrep_ring_slot *slot, uint64_t wall_ns,
                             uint64_t mono_ns)
    void vrep_ring_commit(vrep_ring *ring, vrep_ring_slot *slot)
    int vrep_ring_release(vrep_ring *ring, uint64_t upto)
    uint32_t vrep_ring_slots(const vrep_ring *ring)
    vrep_ring_slot *vrep_ring_slot_at(vrep_ring *ring, uint32_t index)
    uint32_t vrep_ring_judge(vrep_ring *ring)
    int vrep_ring_consumer_create(uint32_t role, const uint8_t *target_id, uint64_t durable,
                                  uint64_t spilled,
                                  vrep_ring_consumer *out)
    void vrep_ring_consumer_close(vrep_ring_consumer *consumer)
    int vrep_ring_consumer_poll(const vrep_ring *ring, vrep_ring_consumer *consumer)
    void vrep_ring_consumer_notify(const vrep_ring *ring, vrep_ring_consumer *consumer)
    int vrep_ring_reader_open(const char *path, int control_fd, int data_fd, int space_fd,
                              vrep_ring_reader **out)
    void vrep_ring_reader_close(vrep_ring_reader *reader)
    const vrep_ring_header *vrep_ring_reader_header(const vrep_ring_reader *reader)
    uint64_t vrep_ring_reader_head(const vrep_ring_reader *reader)
    uint64_t vrep_ring_reader_released(const vrep_ring_reader *reader)
    int vrep_ring_reader_free_bytes(const vrep_ring_reader *reader, uint64_t *out)
    int vrep_ring_reader_wait(vrep_ring_reader *reader, uint64_t seq, int timeout_ms)
    int vrep_ring_reader_desc(const vrep_ring_reader *reader, uint64_t seq, vrep_ring_desc *out)
    int vrep_ring_reader_run(const vrep_ring_reader *reader, uint64_t first, uint64_t last,
                             const vrep_ring_desc **at, uint32_t *n)
    int vrep_ring_reader_iov(const vrep_ring_reader *reader, const vrep_ring_desc *desc,
                             iovec *iov, int max, int *n)
    bint vrep_ring_reader_still(const vrep_ring_reader *reader, uint64_t seq)
    void vrep_ring_reader_set(vrep_ring_reader *reader, uint64_t read, uint64_t received,
                              uint64_t durable, uint64_t spilled)

OBSERVER = VREP_CONTROL_OBSERVER
TARGET = VREP_CONTROL_TARGET

# A signal (Ctrl-C) is looked at this often while a reader waits.
cdef int WAIT_SLICE_MS = 200

# No wait is longer than a day, so that milliseconds fit an int.
cdef double WAIT_SECONDS_MAX = 86400


cdef class Mapped:
    pass


cdef class View:
    # Exports one piece of a mapping; the owner lives, and stays open, as long as this does.
    cdef Mapped owner
    cdef void *at
    cdef Py_ssize_t size
    cdef bint readonly

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.at, self.size, self.readonly, flags)

    def __dealloc__(self):
        if self.owner is not None:
            self.owner.views -= 1


cdef object make_view(Mapped owner, const void *at, Py_ssize_t size, bint readonly):
    cdef View view = View()
    view.at = <void *>at
    view.size = size
    view.readonly = readonly
    view.owner = owner
    owner.views += 1
    return view


cdef list make_views(Mapped owner, iovec *iov, int n, bint readonly):
    return [
        memoryview(make_view(owner, iov[i].iov_base, <Py_ssize_t>iov[i].iov_len, readonly))
        for i in range(n)
    ]


cdef dict header_dict(const vrep_ring_header *header):
    cdef Py_ssize_t size = layout.RING_HEADER.itemsize
    record = np.frombuffer((<const char *>header)[:size], layout.RING_HEADER)[0]
    fields = {}
    for name in layout.RING_HEADER.names:
        if name.startswith(("reserved", "pad")):
            continue
        value = record[name]
        fields[name] = value.tobytes() if getattr(value, "ndim", 0) else value.item()
    return fields


cdef int copy_id(object name, object value, uint8_t *out) except -1:
    if not isinstance(value, bytes) or len(value) != 16:
        raise InvalidError(f"{name} is {value!r}: 16 bytes")
    memcpy(out, <const char *>value, 16)
    return 0


cdef int refuse_close(Mapped mapped) except -1:
    if mapped.busy:
        raise BusyError("another thread waits on the ring")
    if mapped.views > 0:
        raise BusyError(f"{mapped.views} views of the ring are alive")
    return 0


cdef class RingReader(Mapped):
    """A consumer's handle on the ring at ``path``, read-only.

    The descriptors come from the filter's control socket; without them this is an
    observer that nobody knows of: ``set`` does nothing and ``wait`` polls.
    """

    def __init__(self, path, int control_fd=-1, int data_fd=-1, int space_fd=-1):
        cdef bytes name = os.fsencode(path)
        cdef const char *text = name
        cdef int status
        if self.reader != NULL:
            raise InvalidError("the reader is open")
        with nogil:
            status = vrep_ring_reader_open(text, control_fd, data_fd, space_fd, &self.reader)
        check(status)

    def __dealloc__(self):
        vrep_ring_reader_close(self.reader)

    cdef vrep_ring_reader *get(self) except NULL:
        if self.reader == NULL:
            raise InvalidError("the reader is closed")
        return self.reader

    def close(self):
        """Let the ring go. BusyError while views of it are alive."""
        refuse_close(self)
        vrep_ring_reader_close(self.reader)
        self.reader = NULL

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # An error on its way keeps frames, and so views, alive: it matters more than they do.
        if kind is None or self.views == 0:
            self.close()

    @property
    def header(self):
        """The ring's header as it is now, reserved fields left out."""
        return header_dict(vrep_ring_reader_header(self.get()))

    @property
    def capacity(self):
        """How many descriptors the ring has."""
        return vrep_ring_reader_header(self.get()).descriptors

    @property
    def incarnation(self):
        """Starts of a producer."""
        return vrep_ring_reader_header(self.get()).incarnation

    @property
    def head(self):
        """The last published seq."""
        return vrep_ring_reader_head(self.get())

    @property
    def released(self):
        """Descriptors up to this seq, and their payloads, may be overwritten."""
        return vrep_ring_reader_released(self.get())

    @property
    def free_bytes(self):
        """Free payload bytes when head or released moved last.

        UnsupportedError: a producer of an older release does not say.
        """
        cdef uint64_t found = 0
        check(vrep_ring_reader_free_bytes(self.get(), &found))
        return found

    @property
    def payload_bytes(self):
        """Payload bytes of the whole ring."""
        cdef const vrep_ring_header *header = vrep_ring_reader_header(self.get())
        return <uint64_t>header.chunks * header.chunk_bytes

    def wait(self, uint64_t seq, double timeout=1.0):
        """True as soon as head > seq; False after ``timeout`` seconds."""
        cdef vrep_ring_reader *reader = self.get()
        cdef int status = VREP_E_AGAIN
        cdef int left_ms, slice_ms
        if not 0 <= timeout <= WAIT_SECONDS_MAX:
            raise InvalidError(f"timeout is {timeout!r}: 0 to {WAIT_SECONDS_MAX} seconds")
        if self.busy:
            raise BusyError("another thread waits on the ring")
        left_ms = <int>(timeout * 1000)
        self.busy = True
        try:
            while status == VREP_E_AGAIN:
                slice_ms = min(left_ms, WAIT_SLICE_MS)
                with nogil:
                    status = vrep_ring_reader_wait(reader, seq, slice_ms)
                PyErr_CheckSignals()
                left_ms -= slice_ms
                if left_ms <= 0:
                    break
        finally:
            self.busy = False
        if status == VREP_E_AGAIN:
            return False
        check(status)
        return True

    def descriptors(self, uint64_t from_seq, uint64_t to_seq):
        """Descriptors from_seq to to_seq, both included, as an array of ``layout.RING_DESC``.

        A read-only view into the ring; a copy where the table wraps.
        """
        cdef vrep_ring_reader *reader = self.get()
        cdef const vrep_ring_desc *at
        cdef uint32_t n
        cdef list parts = []
        if to_seq + 1 == from_seq:
            return np.empty(0, layout.RING_DESC)
        while from_seq <= to_seq:
            check(vrep_ring_reader_run(reader, from_seq, to_seq, &at, &n))
            view = make_view(self, at, n * sizeof(vrep_ring_desc), True)
            parts.append(np.frombuffer(view, layout.RING_DESC))
            from_seq += n
        if not parts:
            raise RangeError(f"descriptors {from_seq} to {to_seq}")
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def payload(self, desc):
        """The payload of a descriptor, or of a seq, as read-only memoryviews into the ring."""
        cdef vrep_ring_reader *reader = self.get()
        cdef vrep_ring_desc found
        cdef iovec few[16]
        cdef iovec *iov = few
        cdef int n = 0, most = 16, status
        cdef bytes raw
        if isinstance(desc, int):
            check(vrep_ring_reader_desc(reader, desc, &found))
        else:
            raw = desc.tobytes()
            if len(raw) != sizeof(vrep_ring_desc):
                raise InvalidError(f"a descriptor has {sizeof(vrep_ring_desc)} bytes")
            memcpy(&found, <const char *>raw, sizeof(vrep_ring_desc))
        if found.length // VREP_CHUNK_BYTES + 2 > 16:
            most = <int>(found.length // VREP_CHUNK_BYTES + 2)
            iov = <iovec *>malloc(most * sizeof(iovec))
            if iov == NULL:
                raise MemoryError()
        try:
            status = vrep_ring_reader_iov(reader, &found, iov, most, &n)
            check(status)
            return make_views(self, iov, n, True)
        finally:
            if iov != few:
                free(iov)

    def still(self, uint64_t seq):
        """True while nothing of the record was overwritten: for observers, after copying."""
        return vrep_ring_reader_still(self.get(), seq)

    def set(self, *, uint64_t read=0, uint64_t received=0, uint64_t durable=0,
            uint64_t spilled=0):
        """Tell the filter how far this consumer is. Smaller values than before are kept out.

        After ``durable`` or ``spilled`` the filter may reuse the memory of these records: no
        thread may still read them.
        """
        vrep_ring_reader_set(self.get(), read, received, durable, spilled)


cdef class RingConsumer:
    """The producer's side of one consumer: pass its three descriptors to the consumer."""
    cdef vrep_ring_consumer consumer
    cdef RingProducer producer

    def __dealloc__(self):
        if self.producer is not None:
            vrep_ring_consumer_close(&self.consumer)

    @property
    def fds(self):
        """(control, data, space), as ``RingReader`` takes them; they stay ours."""
        return (self.consumer.control_fd, self.consumer.peer_fd, self.consumer.space_fd)

    @property
    def read(self):
        return self.consumer.read

    @property
    def received(self):
        return self.consumer.received

    @property
    def durable(self):
        return self.consumer.durable

    def poll(self):
        """Take over what the consumer says; InvalidError when it lies."""
        check(vrep_ring_consumer_poll(self.producer.get(), &self.consumer))

    def notify(self):
        """Wake the consumer if it waits."""
        vrep_ring_consumer_notify(self.producer.get(), &self.consumer)


cdef class RingSlot:
    """A change on its way: fill ``buffers``, then publish or cancel it."""
    cdef RingProducer producer
    cdef vrep_ring_slot *slot
    cdef readonly uint64_t size

    cdef vrep_ring_slot *get(self) except NULL:
        self.producer.get()
        if self.slot == NULL:
            raise InvalidError("the slot was published or cancelled")
        return self.slot

    def buffers(self):
        """Writable memoryviews of the payload in the ring; do not keep them past publish."""
        cdef vrep_ring_slot *slot = self.get()
        cdef int most = <int>(self.size // VREP_CHUNK_BYTES + 2)
        cdef iovec *iov = <iovec *>malloc(most * sizeof(iovec))
        if iov == NULL:
            raise MemoryError()
        try:
            n = vrep_ring_iov(self.producer.ring, slot, 0, <uint32_t>self.size, iov, most)
            return make_views(self.producer, iov, n, False)
        finally:
            free(iov)

    def write(self, data):
        """Copy bytes to the start of the payload."""
        cdef vrep_ring_slot *slot = self.get()
        cdef Py_buffer buffer
        cdef iovec *iov
        cdef const char *at
        cdef int n, most
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
        try:
            if <uint64_t>buffer.len > self.size:
                raise RangeError(f"{buffer.len} bytes into a slot of {self.size}")
            most = <int>(self.size // VREP_CHUNK_BYTES + 2)
            iov = <iovec *>malloc(most * sizeof(iovec))
            if iov == NULL:
                raise MemoryError()
            with nogil:
                n = vrep_ring_iov(self.producer.ring, slot, 0, <uint32_t>buffer.len, iov, most)
                at = <const char *>buffer.buf
                for i in range(n):
                    memcpy(iov[i].iov_base, at, iov[i].iov_len)
                    at += iov[i].iov_len
                free(iov)
        finally:
            PyBuffer_Release(&buffer)

    def publish(self, int kind, *, uint16_t disk=0, uint64_t offset=0, length=None,
                uint16_t flags=0, uint64_t wall_ns=0, uint64_t mono_ns=0):
        """Publish the change; returns its seq."""
        cdef vrep_ring_slot *slot = self.get()
        cdef vrep_ring *ring = self.producer.ring
        cdef uint64_t seq
        cdef uint64_t bytes_count = self.size if length is None else length
        if bytes_count > 0xffffffff or (slot.chunk != VREP_NO_CHUNK and bytes_count > self.size):
            raise RangeError(f"length {bytes_count} in a slot of {self.size} bytes")
        slot.kind = <uint8_t>kind
        slot.disk = disk
        slot.offset = offset
        slot.length = <uint32_t>bytes_count
        slot.flags = flags
        vrep_ring_grant(ring, slot, mono_ns)
        seq = vrep_ring_stage(ring, slot, wall_ns, mono_ns)
        vrep_ring_commit(ring, slot)
        self.slot = NULL
        return seq

    def cancel(self):
        """Give the slot back unpublished."""
        vrep_ring_cancel(self.producer.ring, self.get())
        self.slot = NULL


cdef class RingProducer(Mapped):
    """The writing side of a ring; one at a time for each file. Make it with create or attach."""

    def __init__(self):
        raise InvalidError("use RingProducer.create or RingProducer.attach")

    def __dealloc__(self):
        vrep_ring_detach(self.ring, False)

    cdef vrep_ring *get(self) except NULL:
        if self.ring == NULL:
            raise InvalidError("the producer is closed")
        return self.ring

    @staticmethod
    def create(path, *, group_id, epoch_id=bytes(16), uint32_t epoch=1, uint16_t lane=0,
               uint32_t descriptors=4096, uint32_t slots=256, uint64_t payload_bytes=16 << 20,
               uint64_t first_seq=0, uint32_t mode=0o640):
        """Make a new ring file in place of what stands at ``path``."""
        cdef RingProducer self = RingProducer.__new__(RingProducer)
        cdef bytes name = os.fsencode(path)
        cdef const char *text = name
        cdef vrep_ring_config config
        cdef int status
        memset(&config, 0, sizeof(config))
        copy_id("group_id", group_id, config.group_id)
        copy_id("epoch_id", epoch_id, config.epoch_id)
        config.epoch = epoch
        config.lane = lane
        config.descriptors = descriptors
        config.slots = slots
        config.payload_bytes = payload_bytes
        config.first_seq = first_seq
        config.mode = mode
        with nogil:
            status = vrep_ring_create(text, &config, &self.ring)
        check(status)
        return self

    @staticmethod
    def attach(path, *, group_id):
        """Take over the ring that a dead producer left; then ``judge``."""
        cdef RingProducer self = RingProducer.__new__(RingProducer)
        cdef bytes name = os.fsencode(path)
        cdef const char *text = name
        cdef uint8_t group[16]
        cdef int status
        copy_id("group_id", group_id, group)
        with nogil:
            status = vrep_ring_attach(text, group, &self.ring)
        check(status)
        return self

    def close(self, *, bint clean=True):
        """Let the ring go. BusyError while views of it are alive."""
        refuse_close(self)
        vrep_ring_detach(self.ring, clean)
        self.ring = NULL

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # An error on its way keeps frames, and so views, alive: it matters more than they do.
        if kind is None or self.views == 0:
            self.close()

    @property
    def header(self):
        """The ring's header as it is now, reserved fields left out."""
        return header_dict(vrep_ring_get_header(self.get()))

    @property
    def head(self):
        """The last published seq."""
        return vrep_ring_head(self.get())

    @property
    def released(self):
        """What was released last."""
        return vrep_ring_released(self.get())

    @property
    def was_clean(self):
        """True when the last producer went with nothing in flight."""
        return vrep_ring_was_clean(self.get())

    @property
    def free_bytes(self):
        """Payload bytes that can be reserved now."""
        return vrep_ring_free_bytes(self.get())

    @property
    def payload_bytes(self):
        """Payload bytes of the whole ring."""
        return vrep_ring_payload_bytes(self.get())

    @property
    def free_descriptors(self):
        """Changes that can be reserved now."""
        return vrep_ring_free_descriptors(self.get())

    def judge(self):
        """After attach: free what was committed or never granted; how many slots remain."""
        return vrep_ring_judge(self.get())

    def slots(self):
        """A copy of the in-flight table, as an array of ``layout.RING_SLOT``."""
        cdef vrep_ring *ring = self.get()
        cdef Py_ssize_t size = vrep_ring_slots(ring) * sizeof(vrep_ring_slot)
        raw = (<const char *>vrep_ring_slot_at(ring, 0))[:size]
        return np.frombuffer(raw, layout.RING_SLOT)

    def reserve(self, uint64_t size):
        """A slot with a descriptor and ``size`` bytes of payload. FullError when one is short."""
        cdef RingSlot slot = RingSlot.__new__(RingSlot)
        slot.slot = vrep_ring_reserve(self.get(), size)
        if slot.slot == NULL:
            raise FullError(f"no slot, descriptor or {size} bytes are free in the ring")
        slot.producer = self
        slot.size = size
        return slot

    def publish(self, int kind, data=b"", **fields):
        """Reserve, write and publish a change in one call; returns its seq."""
        cdef RingSlot slot
        with memoryview(data) as view:
            slot = self.reserve(view.nbytes)
            try:
                slot.write(view)
                return slot.publish(kind, **fields)
            finally:
                if slot.slot != NULL:
                    slot.cancel()

    def release(self, uint64_t upto):
        """Free descriptors and payloads up to ``upto``; InvalidError unless it is within
        released and head."""
        check(vrep_ring_release(self.get(), upto))

    def consumer(self, *, uint32_t role=OBSERVER, target_id=bytes(16), durable=None):
        """Register a consumer; ``durable`` is what it holds already (default: released)."""
        cdef RingConsumer consumer = RingConsumer.__new__(RingConsumer)
        cdef uint8_t target[16]
        cdef uint64_t start = self.released if durable is None else durable
        copy_id("target_id", target_id, target)
        check(vrep_ring_consumer_create(role, target, start, start, &consumer.consumer))
        consumer.producer = self
        return consumer
