"""Seal changes into records and open them again, a batch per call without the GIL.

See seal/seal.h. A handle belongs to one thread at a time; a second one that comes
meanwhile gets BusyError.
"""

import numpy as np

from vrep._core import layout
from vrep.errors import BusyError, InvalidError

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from vrep._core._status cimport check
from vrep._core.ring cimport RingReader, iovec, vrep_ring_reader

cdef extern from "<openssl/crypto.h>":
    void OPENSSL_cleanse(void *at, size_t length)

cdef extern from "seal/seal.h":
    struct vrep_record:
        uint8_t kind
        uint16_t flags
        uint16_t disk
        uint64_t seq
        uint64_t offset
        uint32_t length
        uint64_t wall_ns
        uint64_t mono_ns
    int VREP_E_RANGE
    int VREP_E_FULL
    int VREP_MARK_CUT_VERSION
    struct vrep_stream:
        pass
    struct vrep_mark:
        uint64_t wall_ns
        uint16_t version
    struct vrep_cut:
        uint8_t cut_id[16]
        uint16_t lanes
    struct vrep_position:
        uint32_t epoch
        uint16_t lane
        uint64_t seq
    struct vrep_opened_mark:
        vrep_mark mark
        vrep_cut cut
        vrep_position at[64]
        char label[256]
    struct vrep_tally:
        pass
    struct vrep_sealer_options:
        const uint8_t *key
        const uint8_t *hash_secret
        uint8_t stream_id[16]
        uint64_t resume_seq
        uint32_t epoch
        uint16_t lane
        int level
    struct vrep_seal_source:
        uint8_t kind
        uint16_t flags
        uint16_t disk
        uint64_t seq
        uint64_t offset
        uint32_t length
        uint32_t iovecs
        const iovec *iov
        uint64_t wall_ns
        uint64_t mono_ns
    struct vrep_seal_stats:
        uint64_t records
        uint64_t pieces
        uint64_t pieces_tried
        uint64_t pieces_zstd
        uint64_t bytes_plain
        uint64_t bytes_sealed
    struct vrep_sealer:
        pass
    struct vrep_opener:
        pass
    struct vrep_tally_check:
        pass
    bint vrep_record_is_sealed(uint8_t kind) nogil
    int vrep_stream_key(const uint8_t *data_key, const uint8_t *stream_id, uint8_t *out)
    int vrep_sealer_new(const vrep_sealer_options *options, vrep_sealer **out)
    void vrep_sealer_free(vrep_sealer *sealer)
    int vrep_sealer_set_level(vrep_sealer *sealer, int level)
    uint64_t vrep_sealer_seq(const vrep_sealer *sealer)
    int vrep_sealer_stream(vrep_sealer *sealer, const vrep_stream *stream, uint8_t *out,
                           size_t cap, size_t *written)
    int vrep_sealer_seal(vrep_sealer *sealer, const vrep_seal_source *records, size_t n,
                         uint8_t *out, size_t cap, size_t *written, size_t *n_done) nogil
    int vrep_sealer_seal_ring(vrep_sealer *sealer, const vrep_ring_reader *reader,
                              uint64_t from_seq, uint64_t to_seq, uint8_t *out, size_t cap,
                              size_t *written, size_t *n_done) nogil
    int vrep_sealer_tally(vrep_sealer *sealer, uint64_t wall_ns, uint64_t mono_ns, uint8_t *out,
                          size_t cap, size_t *written)
    void vrep_sealer_stats(const vrep_sealer *sealer, vrep_seal_stats *out)
    int vrep_opener_new(const uint8_t *key, const uint8_t *stream_id, vrep_opener **out)
    void vrep_opener_free(vrep_opener *opener)
    int vrep_opener_piece(vrep_opener *opener, const vrep_record *header, uint32_t index,
                          uint32_t word, const void *stored, size_t stored_len, void *out,
                          size_t cap, size_t *written) nogil
    int vrep_opener_record(vrep_opener *opener, const void *record, size_t length, void *out,
                           size_t cap, size_t *written) nogil
    int vrep_opener_hashes(vrep_opener *opener, const void *record, size_t length, void *out,
                           size_t cap, size_t *written) nogil
    int vrep_opener_mark(vrep_opener *opener, const void *record, size_t length,
                         vrep_opened_mark *out)
    int vrep_tally_new(vrep_tally_check **out)
    void vrep_tally_free(vrep_tally_check *tally)
    enum:
        VREP_TALLY_STATE_BYTES
    void vrep_tally_save(const vrep_tally_check *check, uint8_t *out)
    int vrep_tally_load(vrep_tally_check *check, const uint8_t *state)
    int vrep_tally_reset(vrep_tally_check *tally)
    int vrep_tally_update(vrep_tally_check *tally, const void *record, size_t length) nogil
    int vrep_opener_tally(vrep_opener *opener, const void *record, size_t length,
                          const vrep_tally_check *tally, vrep_tally *out)

cdef enum:
    KEY_BYTES = 32
    ID_BYTES = 16
    SECRET_BYTES = 192


cdef int copy_exactly(object source, void *to, Py_ssize_t size, str what) except -1:
    cdef Py_buffer view
    PyObject_GetBuffer(source, &view, PyBUF_SIMPLE)
    try:
        if view.len != size:
            raise InvalidError(f"{what} has {size} bytes, not {view.len}")
        memcpy(to, view.buf, <size_t>size)
    finally:
        PyBuffer_Release(&view)
    return 0


def stream_key(data_key, stream_id):
    """The 32-byte key of a stream, derived from the data key of its key generation."""
    cdef uint8_t key[KEY_BYTES]
    cdef uint8_t ident[ID_BYTES]
    cdef uint8_t out[KEY_BYTES]
    copy_exactly(data_key, key, KEY_BYTES, "a data key")
    try:
        copy_exactly(stream_id, ident, ID_BYTES, "a stream id")
        check(vrep_stream_key(key, ident, out))
        return (<uint8_t *>out)[:KEY_BYTES]
    finally:
        OPENSSL_cleanse(key, KEY_BYTES)
        OPENSSL_cleanse(out, KEY_BYTES)


cdef class Batch:
    # Python buffers held while C reads them, and the sources that point into them.
    cdef vrep_seal_source *sources
    cdef iovec *iov
    cdef Py_buffer *views
    cdef Py_ssize_t held
    cdef Py_ssize_t n

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.held):
            PyBuffer_Release(&self.views[i])
        free(self.views)
        free(self.iov)
        free(self.sources)

    cdef int hold(self, object buffer) except -1:
        PyObject_GetBuffer(buffer, &self.views[self.held], PyBUF_SIMPLE)
        self.held += 1
        return 0

    cdef int fill(self, object records, object payloads) except -1:
        cdef Py_ssize_t i, at = 0
        cdef const vrep_record *headers
        cdef vrep_seal_source *source
        cdef Py_buffer *view
        cdef bint joined = PyObject_CheckBuffer(payloads)
        cdef bint bodied
        records = np.ascontiguousarray(records, layout.RECORD).reshape(-1)
        self.n = len(records)
        if not joined and len(payloads) != self.n:
            raise InvalidError(f"{self.n} records, but {len(payloads)} payloads")
        self.sources = <vrep_seal_source *>calloc(<size_t>self.n + 1, sizeof(vrep_seal_source))
        self.iov = <iovec *>calloc(<size_t>self.n + 1, sizeof(iovec))
        self.views = <Py_buffer *>calloc(<size_t>self.n + 2, sizeof(Py_buffer))
        if self.sources == NULL or self.iov == NULL or self.views == NULL:
            raise MemoryError
        self.hold(records)
        headers = <const vrep_record *>self.views[0].buf
        if joined:
            self.hold(payloads)
        for i in range(self.n):
            source = &self.sources[i]
            source.kind, source.flags = headers[i].kind, headers[i].flags
            source.disk, source.seq = headers[i].disk, headers[i].seq
            source.offset, source.length = headers[i].offset, headers[i].length
            source.wall_ns, source.mono_ns = headers[i].wall_ns, headers[i].mono_ns
            bodied = vrep_record_is_sealed(source.kind)
            if joined:
                view = &self.views[1]
                if not bodied:
                    continue
                if source.length > view.len - at:
                    raise InvalidError(f"the payload ends inside record {i}")
                self.iov[i].iov_base = <uint8_t *>view.buf + at
                self.iov[i].iov_len = source.length
                at += source.length
            else:
                if payloads[i] is None:
                    continue
                self.hold(payloads[i])
                view = &self.views[self.held - 1]
                self.iov[i].iov_base = view.buf
                self.iov[i].iov_len = <size_t>view.len
            source.iov = &self.iov[i]
            source.iovecs = 1
        if joined and at != self.views[1].len:
            raise InvalidError(f"{self.views[1].len - at} payload bytes belong to no record")
        return 0


cdef class Sealer:
    """Seals one stream: one lane of one epoch, each seq once and in order.

    ``key`` is the stream key (see ``stream_key``), ``secret`` the 192 bytes under which
    block hashes are made (None: no hashes), ``level`` a zstd level (0: no compression),
    ``resume_seq`` the seq that the first record follows.
    """

    cdef vrep_sealer *sealer
    cdef bint busy
    cdef readonly bytes stream_id
    cdef int now_level

    def __cinit__(self, key, stream_id, *, uint32_t epoch, uint16_t lane=0,
                  uint64_t resume_seq=0, secret=None, int level=0):
        cdef vrep_sealer_options options
        cdef uint8_t own_key[KEY_BYTES]
        cdef uint8_t own_secret[SECRET_BYTES]
        memset(&options, 0, sizeof(options))
        try:
            copy_exactly(key, own_key, KEY_BYTES, "a stream key")
            copy_exactly(stream_id, options.stream_id, ID_BYTES, "a stream id")
            options.key = own_key
            if secret is not None:
                copy_exactly(secret, own_secret, SECRET_BYTES, "a hash secret")
                options.hash_secret = own_secret
            options.epoch, options.lane, options.resume_seq = epoch, lane, resume_seq
            options.level = level
            check(vrep_sealer_new(&options, &self.sealer))
        finally:
            OPENSSL_cleanse(own_key, KEY_BYTES)
            OPENSSL_cleanse(own_secret, SECRET_BYTES)
        self.stream_id = bytes(stream_id)
        self.now_level = level

    def __dealloc__(self):
        vrep_sealer_free(self.sealer)

    def __repr__(self):
        return f"<Sealer stream={self.stream_id.hex()} seq={self.seq}>"

    cdef int enter(self) except -1:
        if self.busy:
            raise BusyError("the sealer is in use by another thread")
        self.busy = True
        return 0

    @property
    def level(self):
        """The zstd level of what is sealed from now on; 0: no compression."""
        return self.now_level

    @level.setter
    def level(self, int level):
        self.enter()
        try:
            check(vrep_sealer_set_level(self.sealer, level))
            self.now_level = level
        finally:
            self.busy = False

    @property
    def seq(self):
        """The last seq sealed; ``resume_seq`` before the first."""
        return vrep_sealer_seq(self.sealer)

    def stats(self):
        """What was sealed and compressed so far, by name."""
        cdef vrep_seal_stats stats
        vrep_sealer_stats(self.sealer, &stats)
        return {
            "records": stats.records, "pieces": stats.pieces,
            "pieces_tried": stats.pieces_tried, "pieces_zstd": stats.pieces_zstd,
            "bytes_plain": stats.bytes_plain, "bytes_sealed": stats.bytes_sealed,
        }

    def seal(self, records, payloads, out):
        """Seal changes one after another into ``out``; return ``(written, done)``.

        ``records`` is a RECORD array of which kind, flags, disk, seq, offset, length and
        times are read. ``payloads`` is a sequence with one buffer (or None) each, or one
        buffer with all payloads back to back. Stops before a record that may not fit, and
        before one that is wrong; raises only when that is the first of the call, so that
        what was sealed is never lost.
        """
        cdef Py_buffer room
        cdef size_t written = 0, done = 0
        cdef int status
        cdef Batch batch = Batch()
        batch.fill(records, payloads)
        PyObject_GetBuffer(out, &room, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            self.enter()
            try:
                with nogil:
                    status = vrep_sealer_seal(self.sealer, batch.sources, <size_t>batch.n,
                                              <uint8_t *>room.buf, <size_t>room.len,
                                              &written, &done)
            finally:
                self.busy = False
        finally:
            PyBuffer_Release(&room)
        if done == 0:
            check(status)
        return written, done

    def seal_ring(self, RingReader reader not None, uint64_t from_seq, uint64_t to_seq, out):
        """Seal records ``from_seq`` to ``to_seq`` of a ring, out of its memory, into ``out``.

        Returns ``(written, done)`` and stops as ``seal`` does. The caller's consumer must
        hold these records: they may not be released before the call ends.
        """
        cdef Py_buffer room
        cdef size_t written = 0, done = 0
        cdef int status
        cdef const vrep_ring_reader *handle = reader.get()
        PyObject_GetBuffer(out, &room, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            self.enter()
            reader.views += 1  # nobody closes it meanwhile
            try:
                with nogil:
                    status = vrep_sealer_seal_ring(self.sealer, handle, from_seq, to_seq,
                                                   <uint8_t *>room.buf, <size_t>room.len,
                                                   &written, &done)
            finally:
                reader.views -= 1
                self.busy = False
        finally:
            PyBuffer_Release(&room)
        if done == 0:
            check(status)
        return written, done

    def stream(self, stream, out):
        """Write the STREAM record that opens this stream; return the bytes written.

        Of ``stream``, a STREAM struct, epoch_id, parent_epoch_id, parent, key_generation
        and wall_ns are read.
        """
        cdef Py_buffer room
        cdef vrep_stream body
        cdef size_t written = 0
        copy_exactly(np.asarray(stream, layout.STREAM).reshape(1).view(np.uint8), &body,
                     sizeof(body), "a STREAM struct")
        PyObject_GetBuffer(out, &room, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            self.enter()
            try:
                check(vrep_sealer_stream(self.sealer, &body, <uint8_t *>room.buf,
                                         <size_t>room.len, &written))
            finally:
                self.busy = False
        finally:
            PyBuffer_Release(&room)
        return written

    def tally(self, out, *, uint64_t wall_ns, uint64_t mono_ns=0):
        """Write a TALLY over everything sealed so far; return the bytes written."""
        cdef Py_buffer room
        cdef size_t written = 0
        PyObject_GetBuffer(out, &room, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            self.enter()
            try:
                check(vrep_sealer_tally(self.sealer, wall_ns, mono_ns, <uint8_t *>room.buf,
                                        <size_t>room.len, &written))
            finally:
                self.busy = False
        finally:
            PyBuffer_Release(&room)
        return written


cdef class Tally:
    """The running digest of a stream, taken from its records as stored; needs no key."""

    cdef vrep_tally_check *tally
    cdef bint busy

    def __cinit__(self):
        check(vrep_tally_new(&self.tally))

    def __dealloc__(self):
        vrep_tally_free(self.tally)

    def reset(self):
        """Start again, for the next stream."""
        if self.busy:
            raise BusyError("the tally is in use by another thread")
        check(vrep_tally_reset(self.tally))

    def save(self):
        """What was taken so far, as bytes from which :meth:`load` goes on."""
        cdef uint8_t state[VREP_TALLY_STATE_BYTES]
        if self.busy:
            raise BusyError("the tally is in use by another thread")
        vrep_tally_save(self.tally, state)
        return (<uint8_t *>state)[:VREP_TALLY_STATE_BYTES]

    def load(self, state):
        """Go on from what :meth:`save` gave."""
        cdef uint8_t own[VREP_TALLY_STATE_BYTES]
        if self.busy:
            raise BusyError("the tally is in use by another thread")
        copy_exactly(state, own, VREP_TALLY_STATE_BYTES, "a tally's state")
        check(vrep_tally_load(self.tally, own))

    def update(self, buffer):
        """Take the next whole records of the stream, back to back, the last one whole."""
        cdef Py_buffer view
        cdef size_t at = 0
        cdef int status = 0
        cdef const uint8_t *bytes_at
        if self.busy:
            raise BusyError("the tally is in use by another thread")
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        self.busy = True
        try:
            bytes_at = <const uint8_t *>view.buf
            with nogil:
                while status == 0 and at < <size_t>view.len:
                    status = vrep_tally_update(self.tally, bytes_at + at, <size_t>view.len - at)
                    if status == 0:
                        at += 64 + body_of(bytes_at + at)
        finally:
            self.busy = False
            PyBuffer_Release(&view)
        check(status)


cdef inline size_t body_of(const uint8_t *header) noexcept nogil:
    cdef uint32_t body
    memcpy(&body, header + BODY_AT, sizeof(body))
    return body


cdef size_t BODY_AT = layout.RECORD.fields["body_bytes"][1]


cdef class Opener:
    """Opens what a stream sealed, with its stream key."""

    cdef vrep_opener *opener
    cdef bint busy
    cdef readonly bytes stream_id

    def __cinit__(self, key, stream_id):
        cdef uint8_t own_key[KEY_BYTES]
        cdef uint8_t ident[ID_BYTES]
        try:
            copy_exactly(key, own_key, KEY_BYTES, "a stream key")
            copy_exactly(stream_id, ident, ID_BYTES, "a stream id")
            check(vrep_opener_new(own_key, ident, &self.opener))
        finally:
            OPENSSL_cleanse(own_key, KEY_BYTES)
        self.stream_id = bytes(stream_id)

    def __dealloc__(self):
        vrep_opener_free(self.opener)

    def __repr__(self):
        return f"<Opener stream={self.stream_id.hex()}>"

    cdef int enter(self) except -1:
        if self.busy:
            raise BusyError("the opener is in use by another thread")
        self.busy = True
        return 0

    def piece(self, header, uint32_t index, uint32_t word, stored, out):
        """Open one piece into ``out``; return its plaintext bytes.

        ``header`` is the 64 bytes of its record, ``index`` its number in the nonce,
        ``word`` its piece word, ``stored`` its bytes with the tag.
        """
        cdef Py_buffer view, room
        cdef vrep_record record
        cdef size_t written = 0
        cdef int status
        copy_exactly(header, &record, sizeof(record), "a record header")
        PyObject_GetBuffer(stored, &view, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(out, &room, PyBUF_SIMPLE | PyBUF_WRITABLE)
            try:
                self.enter()
                try:
                    with nogil:
                        status = vrep_opener_piece(self.opener, &record, index, word, view.buf,
                                                   <size_t>view.len, room.buf, <size_t>room.len,
                                                   &written)
                finally:
                    self.busy = False
            finally:
                PyBuffer_Release(&room)
        finally:
            PyBuffer_Release(&view)
        check(status)
        return written

    cdef size_t run(self, object record, object out, bint hashes) except? 0:
        cdef Py_buffer view, room
        cdef size_t written = 0
        cdef int status
        PyObject_GetBuffer(record, &view, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(out, &room, PyBUF_SIMPLE | PyBUF_WRITABLE)
            try:
                self.enter()
                try:
                    with nogil:
                        if hashes:
                            status = vrep_opener_hashes(self.opener, view.buf, <size_t>view.len,
                                                        room.buf, <size_t>room.len, &written)
                        else:
                            status = vrep_opener_record(self.opener, view.buf, <size_t>view.len,
                                                        room.buf, <size_t>room.len, &written)
                finally:
                    self.busy = False
            finally:
                PyBuffer_Release(&room)
        finally:
            PyBuffer_Release(&view)
        check(status)
        return written

    def record(self, record, out):
        """Open the data of a whole record into ``out``; return the bytes written."""
        return self.run(record, out, False)

    def records(self, buffer, found, out):
        """Open whole records, one after another, into ``out``; return ``(written, done)``.

        ``found`` are those of ``buffer`` to open, as ``record.scan`` finds them. The data of
        those that have some lie back to back, as ``Sealer.seal`` takes them. Stops before a
        record that does not fit; FullError when that is the first.
        """
        cdef Py_buffer view, room
        cdef size_t at, size, got, written = 0
        cdef Py_ssize_t done = 0, n
        cdef int status = 0
        cdef const uint8_t *bytes_at
        cdef const uint64_t[::1] positions
        cdef const uint8_t[::1] kinds
        cdef const uint32_t[::1] lengths
        headers = found["header"]
        positions = np.ascontiguousarray(found["position"], np.uint64)
        kinds = np.ascontiguousarray(headers["kind"], np.uint8)
        lengths = np.ascontiguousarray(headers["length"], np.uint32)
        n = len(found)
        PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(out, &room, PyBUF_SIMPLE | PyBUF_WRITABLE)
            try:
                self.enter()
                try:
                    with nogil:
                        bytes_at = <const uint8_t *>view.buf
                        size = <size_t>view.len
                        while done < n:
                            if vrep_record_is_sealed(kinds[done]):
                                at = <size_t>positions[done]
                                if at > size:
                                    status = VREP_E_RANGE
                                elif lengths[done] > <size_t>room.len - written:
                                    status = VREP_E_FULL
                                else:
                                    status = vrep_opener_record(
                                        self.opener, bytes_at + at, size - at,
                                        <uint8_t *>room.buf + written,
                                        <size_t>room.len - written, &got)
                                if status != 0:
                                    break
                                written += got
                            done += 1
                finally:
                    self.busy = False
            finally:
                PyBuffer_Release(&room)
        finally:
            PyBuffer_Release(&view)
        if status != 0 and (done == 0 or status != VREP_E_FULL):
            check(status)
        return written, done

    def hashes(self, record, out):
        """Open the hash piece of a whole record into ``out``, 16 bytes per block."""
        return self.run(record, out, True)

    def mark(self, record):
        """Open a MARK: ``(wall_ns, label)``."""
        cdef vrep_opened_mark opened
        self.open_mark(record, &opened)
        return opened.mark.wall_ns, (<bytes>opened.label).decode("utf-8")

    def cut(self, record):
        """Open a MARK as the part of a cut that it is: ``(cut id, positions)``, each position
        ``(epoch, lane, seq)``, rising by lane. None for a mark of a lane alone; no positions for
        the mark of one lane, those of all the group's for the record that completes the cut."""
        cdef vrep_opened_mark opened
        cdef int i
        self.open_mark(record, &opened)
        if opened.mark.version != VREP_MARK_CUT_VERSION:
            return None
        return <bytes>opened.cut.cut_id[:ID_BYTES], tuple([
            (opened.at[i].epoch, opened.at[i].lane, opened.at[i].seq)
            for i in range(opened.cut.lanes)
        ])

    cdef int open_mark(self, record, vrep_opened_mark *opened) except -1:
        cdef Py_buffer view
        PyObject_GetBuffer(record, &view, PyBUF_SIMPLE)
        try:
            self.enter()
            try:
                check(vrep_opener_mark(self.opener, view.buf, <size_t>view.len, opened))
            finally:
                self.busy = False
        finally:
            PyBuffer_Release(&view)
        return 0

    def tally(self, record, Tally tally not None):
        """Open a TALLY and compare it with what ``tally`` took; return its TALLY struct.

        AuthError: it was not sealed under this key. CorruptError: a record that it
        counted was removed, changed, added or moved.
        """
        cdef Py_buffer view
        cdef vrep_tally opened
        if tally.busy:
            raise BusyError("the tally is in use by another thread")
        PyObject_GetBuffer(record, &view, PyBUF_SIMPLE)
        try:
            self.enter()
            try:
                check(vrep_opener_tally(self.opener, view.buf, <size_t>view.len, tally.tally,
                                        &opened))
            finally:
                self.busy = False
        finally:
            PyBuffer_Release(&view)
        return np.frombuffer((<uint8_t *>&opened)[:sizeof(opened)], layout.TALLY)[0]
