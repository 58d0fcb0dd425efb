#include "disk/staged.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/status.h"

static int write_all(int fd, const uint8_t *from, size_t bytes, uint64_t offset, uint64_t *written,
                     int *os_error)
{
    size_t at = 0;

    while (at < bytes) {
        ssize_t count = pwrite(fd, from + at, bytes - at, (off_t)(offset + at));

        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0) {
            *os_error = count < 0 ? errno : EIO;
            return VREP_E_IO;
        }
        at += (size_t)count;
        *written += (uint64_t)count;
    }
    return VREP_OK;
}

int vrep_write_staged(int fd, const struct iovec *iov, size_t count, uint64_t offset, void *room,
                      size_t room_bytes, uint64_t *written, int *os_error)
{
    size_t filled = 0;
    int status = VREP_OK;

    *written = 0;
    *os_error = 0;
    if (room_bytes == 0)
        return VREP_E_INVALID;
    for (size_t i = 0; i < count; i++) {
        size_t at = 0;

        while (at < iov[i].iov_len) {
            size_t left = iov[i].iov_len - at, space = room_bytes - filled;
            size_t part = left < space ? left : space;

            memcpy((uint8_t *)room + filled, (const uint8_t *)iov[i].iov_base + at, part);
            at += part;
            filled += part;
            if (filled < room_bytes)
                continue;
            status = write_all(fd, room, filled, offset + *written, written, os_error);
            if (status != VREP_OK)
                return status;
            filled = 0;
        }
    }
    return write_all(fd, room, filled, offset + *written, written, os_error);
}
