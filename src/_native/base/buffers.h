/* Buffers: memory that reads land in before they are sent, bounded per front-end.
 *
 * Two classes: small buffers for the common read and for BLOCK_STATUS answers,
 * and pages of 256 KiB of which a long read takes several.  A request gets all
 * that it needs or nothing.  The last one given back is the first one given
 * out, so that a light load stays in the caches.
 *
 * Units: bytes.  Limits: 32 MiB a request.  Threading: one thread.
 */
#ifndef VREP_BASE_BUFFERS_H
#define VREP_BASE_BUFFERS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define VREP_BUFFER_SMALL_BYTES (8u << 10)
#define VREP_BUFFER_PAGE_BYTES (256u << 10)
#define VREP_BUFFER_PAGES_MAX 128u /* of one request: 32 MiB */

struct vrep_buffers;

/* What one request holds. */
struct vrep_buffer {
    uint32_t bytes;
    uint16_t parts; /* 0: nothing */
    bool small;
    uint16_t part[VREP_BUFFER_PAGES_MAX];
};

/* pages >= VREP_BUFFER_PAGES_MAX, so that one request of 32 MiB always fits in the end. */
int vrep_buffers_create(uint32_t smalls, uint32_t pages, struct vrep_buffers **out);
void vrep_buffers_destroy(struct vrep_buffers *buffers);
bool vrep_buffers_take(struct vrep_buffers *buffers, uint32_t bytes, struct vrep_buffer *out);
void vrep_buffers_give(struct vrep_buffers *buffers, struct vrep_buffer *buffer);
/* [from, bytes) of a buffer as iovecs, at most max; returns how many. */
int vrep_buffers_iov(const struct vrep_buffers *buffers, const struct vrep_buffer *buffer,
                     uint32_t from, struct iovec *iov, int max);

#endif
