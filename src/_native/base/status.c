#include "base/status.h"

#include <errno.h>

const char *vrep_status_name(int status)
{
    if (status > 0)
        return "OK";
    switch (status) {
#define X(name, value, text)                                                                       \
    case value:                                                                                    \
        return #name;
        VREP_STATUS_LIST(X)
#undef X
    default:
        return "E_?";
    }
}

const char *vrep_status_text(int status)
{
    if (status > 0)
        return "done";
    switch (status) {
#define X(name, value, text)                                                                       \
    case value:                                                                                    \
        return text;
        VREP_STATUS_LIST(X)
#undef X
    default:
        return "unknown status";
    }
}

int vrep_status_from_errno(int error)
{
    switch (error) {
    case 0:
        return VREP_OK;
    case EINVAL:
    case EBADF:
    case EFAULT:
        return VREP_E_INVALID;
    case ENOMEM:
        return VREP_E_NOMEM;
    case EAGAIN:
    case EINTR:
        return VREP_E_AGAIN;
    case EBUSY:
        return VREP_E_BUSY;
    case EEXIST:
        return VREP_E_EXISTS;
    case ENOENT:
    case ENODEV:
    case ENXIO:
        return VREP_E_NOT_FOUND;
    case ENOSPC:
    case EDQUOT:
        return VREP_E_NOSPACE;
    case EACCES:
    case EPERM:
        return VREP_E_PERMISSION;
    case EROFS:
        return VREP_E_READONLY;
    case EOPNOTSUPP:
    case ENOSYS:
        return VREP_E_UNSUPPORTED;
    case EPIPE:
    case ECONNRESET:
    case ENOTCONN:
    case ESHUTDOWN:
        return VREP_E_CLOSED;
    case ETIMEDOUT:
        return VREP_E_TIMEOUT;
    case EFBIG:
    case EOVERFLOW:
        return VREP_E_RANGE;
    default:
        return VREP_E_IO;
    }
}
