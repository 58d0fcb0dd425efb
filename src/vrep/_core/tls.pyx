"""TLS 1.3 over a non-blocking socket, without the GIL. See tls/tls.h.

The methods of `Tls` return what the native functions do: zero or a count, or one of the
negative numbers below. One thread may read while another writes.
"""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

from vrep._core._status cimport check

cdef extern from "base/status.h":
    enum:
        VREP_OK
        VREP_E_AGAIN
        VREP_E_CLOSED
        VREP_E_IO
        VREP_E_NOT_FOUND
        VREP_E_PROTOCOL
        VREP_E_TORN

cdef extern from "tls/tls.h":
    struct vrep_tls_context:
        pass
    struct vrep_tls:
        pass
    struct vrep_tls_options:
        bint server
        const char *certificate_path
        const char *key_path
        const char *trusted
    int vrep_tls_context_new(const vrep_tls_options *options, vrep_tls_context **out) nogil
    void vrep_tls_context_free(vrep_tls_context *context)
    int vrep_tls_new(const vrep_tls_context *context, bint server, vrep_tls **out)
    void vrep_tls_free(vrep_tls *tls)
    int vrep_tls_handshake(vrep_tls *tls) nogil
    int vrep_tls_receive(vrep_tls *tls, int fd) nogil
    int vrep_tls_push(vrep_tls *tls, int fd) nogil
    int vrep_tls_read(vrep_tls *tls, int fd, void *buffer, size_t len, size_t *got) nogil
    int vrep_tls_write(vrep_tls *tls, int fd, const void *data, size_t len, size_t *gone) nogil
    size_t vrep_tls_owed(const vrep_tls *tls)
    int vrep_tls_peer_certificate(vrep_tls *tls, uint8_t **der, size_t *len)
    void vrep_tls_release(uint8_t *der)
    const char *vrep_tls_reason(const vrep_tls *tls)
    int vrep_tls_errno(const vrep_tls *tls, bint writing)

AGAIN = VREP_E_AGAIN
CLOSED = VREP_E_CLOSED
IO = VREP_E_IO
PROTOCOL = VREP_E_PROTOCOL
TORN = VREP_E_TORN


cdef class TlsContext:
    """Who this end is and whom it trusts; read at its making."""

    cdef vrep_tls_context *context
    cdef readonly bint server

    def __cinit__(self, *, bint server, certificate_path=None, key_path=None, str trusted=""):
        cdef vrep_tls_options options
        cdef bytes certificate, key, pem = trusted.encode("ascii")
        cdef int status
        self.server = options.server = server
        options.certificate_path = options.key_path = options.trusted = NULL
        if certificate_path is not None:
            certificate, key = os.fsencode(certificate_path), os.fsencode(key_path)
            options.certificate_path, options.key_path = certificate, key
        if pem:
            options.trusted = pem
        with nogil:
            status = vrep_tls_context_new(&options, &self.context)
        check(status)

    def __dealloc__(self):
        vrep_tls_context_free(self.context)


cdef class Tls:
    """One end of one connection."""

    cdef vrep_tls *tls

    def __cinit__(self, TlsContext context not None):
        check(vrep_tls_new(context.context, context.server, &self.tls))

    def __dealloc__(self):
        vrep_tls_free(self.tls)

    def handshake(self):
        """0 when hands are shaken, AGAIN while the peer must say something."""
        cdef int status
        with nogil:
            status = vrep_tls_handshake(self.tls)
        return status

    def receive(self, int fd):
        """Take what arrived: 0, also at the end; AGAIN when that is nothing."""
        cdef int status
        with nogil:
            status = vrep_tls_receive(self.tls, fd)
        return status

    def push(self, int fd):
        """Send what is encrypted: 0 when all has left, AGAIN when some of it waits."""
        cdef int status
        with nogil:
            status = vrep_tls_push(self.tls, fd)
        return status

    def read(self, int fd, buffer):
        """How many bytes were read into ``buffer``; CLOSED at the end, AGAIN when nothing
        arrives, TORN when something does that is no data."""
        cdef Py_buffer view
        cdef size_t got = 0
        cdef int status
        PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
        try:
            with nogil:
                status = vrep_tls_read(self.tls, fd, view.buf, <size_t>view.len, &got)
        finally:
            PyBuffer_Release(&view)
        return got if status == VREP_OK else status

    def write(self, int fd, data):
        """``(status, gone)``: 0 when all has left, AGAIN when the socket takes no more; how
        many bytes left. InvalidError when fewer than ``owed`` bytes are given."""
        cdef Py_buffer view
        cdef size_t gone = 0
        cdef int status
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                status = vrep_tls_write(self.tls, fd, view.buf, <size_t>view.len, &gone)
        finally:
            PyBuffer_Release(&view)
        if status not in (VREP_OK, VREP_E_AGAIN, VREP_E_IO, VREP_E_PROTOCOL, VREP_E_CLOSED):
            check(status)
        return status, gone

    @property
    def owed(self):
        """How many bytes the next write begins with that are encrypted already."""
        return vrep_tls_owed(self.tls)

    def peer_certificate(self):
        """The peer's certificate in DER; None when it showed none."""
        cdef uint8_t *der = NULL
        cdef size_t size = 0
        cdef int status = vrep_tls_peer_certificate(self.tls, &der, &size)
        if status == VREP_E_NOT_FOUND:
            return None
        check(status)
        try:
            return (<char *>der)[:size]
        finally:
            vrep_tls_release(der)

    @property
    def reason(self):
        """Why PROTOCOL was returned, in OpenSSL's words."""
        return vrep_tls_reason(self.tls).decode("utf-8", "replace")

    def errno(self, *, bint writing):
        """Why IO was returned."""
        return vrep_tls_errno(self.tls, writing)
