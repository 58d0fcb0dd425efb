"""Native statuses as exceptions."""

from vrep import errors

cdef extern from "base/status.h":
    enum:
        VREP_OK
        VREP_E_INVALID
        VREP_E_NOMEM
        VREP_E_IO
        VREP_E_FULL
        VREP_E_AGAIN
        VREP_E_CORRUPT
        VREP_E_TORN
        VREP_E_AUTH
        VREP_E_VERSION
        VREP_E_RANGE
        VREP_E_BUSY
        VREP_E_GONE
        VREP_E_UNSUPPORTED
        VREP_E_EXISTS
        VREP_E_NOT_FOUND
        VREP_E_FENCED
        VREP_E_LOCKED
        VREP_E_NOSPACE
        VREP_E_PERMISSION
        VREP_E_CLOSED
        VREP_E_TIMEOUT
        VREP_E_READONLY
        VREP_E_PROTOCOL
    const char *vrep_status_name(int status)
    const char *vrep_status_text(int status)

cdef dict EXCEPTIONS = {
    VREP_E_INVALID: errors.InvalidError,
    VREP_E_NOMEM: errors.MemoryLimitError,
    VREP_E_IO: errors.StorageError,
    VREP_E_FULL: errors.FullError,
    VREP_E_AGAIN: errors.AgainError,
    VREP_E_CORRUPT: errors.CorruptError,
    VREP_E_TORN: errors.TornError,
    VREP_E_AUTH: errors.AuthError,
    VREP_E_VERSION: errors.VersionError,
    VREP_E_RANGE: errors.RangeError,
    VREP_E_BUSY: errors.BusyError,
    VREP_E_GONE: errors.GoneError,
    VREP_E_UNSUPPORTED: errors.UnsupportedError,
    VREP_E_EXISTS: errors.ExistsError,
    VREP_E_NOT_FOUND: errors.NotFoundError,
    VREP_E_FENCED: errors.FencedError,
    VREP_E_LOCKED: errors.LockedError,
    VREP_E_NOSPACE: errors.StoreFullError,
    VREP_E_PERMISSION: errors.AccessError,
    VREP_E_CLOSED: errors.UnreachableError,
    VREP_E_TIMEOUT: errors.TimeLimitError,
    VREP_E_READONLY: errors.ReadOnlyError,
    VREP_E_PROTOCOL: errors.ProtocolError,
}


cdef int check(int status) except -1:
    if status >= VREP_OK:
        return status
    name = vrep_status_name(status).decode("ascii")
    text = vrep_status_text(status).decode("ascii")
    raise EXCEPTIONS.get(status, errors.VrepError)(f"{text} ({name})")


def check_status(int status):
    """Raise what a negative native status stands for; return any other unchanged."""
    return check(status)


def status_name(int status):
    """The name of a native status, such as ``E_TORN``."""
    return vrep_status_name(status).decode("ascii")
