/* Staged writes: bytes that lie anywhere, written past the page cache.
 *
 * A file that is open with O_DIRECT takes only aligned memory, so the bytes are
 * copied into a room that is, and written from there, a room at a time. Units:
 * bytes. Threading: whoever has the room. */
#ifndef VREP_DISK_STAGED_H
#define VREP_DISK_STAGED_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Writes all of `iov`, back to back, at `offset`. `written` is how many bytes were, also when
 * not all: IO, with errno in `os_error`. INVALID: a room without bytes. */
int vrep_write_staged(int fd, const struct iovec *iov, size_t count, uint64_t offset, void *room,
                      size_t room_bytes, uint64_t *written, int *os_error);

#endif
