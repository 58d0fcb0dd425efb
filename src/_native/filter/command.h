/* Command: one guest (or internal) request on its way through the filter
 * chain, whatever front-end it came from.
 *
 * A front-end takes a command from its group's pool, fills the public fields,
 * prepares it (a write gets the ring memory its payload is received into),
 * submits it and is called back once.  Nothing on this path allocates, blocks
 * or calls Python.
 *
 * Units: bytes.  Limits: data <= 32 MiB; zero and discard up to 2^32 - 1 (a
 * front-end splits what is longer).  Threading: the group's thread only.
 */
#ifndef VREP_FILTER_COMMAND_H
#define VREP_FILTER_COMMAND_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

enum vrep_command_op {
    VREP_OP_READ = 1,
    VREP_OP_WRITE,
    VREP_OP_FLUSH,
    VREP_OP_DISCARD, /* becomes zeroes where the backing then reads zero; otherwise it is a no-op */
    VREP_OP_ZERO,
};
#define VREP_COMMAND_FUA 1u
#define VREP_COMMAND_NO_HOLE 2u
#define VREP_COMMAND_FAST 4u

struct vrep_group;
struct vrep_command {
    uint8_t op;
    uint8_t flags;
    uint16_t disk;
    uint64_t offset;
    uint64_t length;
    struct iovec
        *iov; /* READ: destination, set by the front-end; WRITE: payload memory, set by prepare */
    int iovcnt;
    int status; /* enum vrep_status, valid in done */
    void (*done)(struct vrep_command *command);
    void *owner;
    uint64_t tag;              /* free for the front-end */
    struct vrep_command *next; /* free for the front-end */
    /* WRITE, else NULL: under the range, before anything is marked, what the disk holds is read
     * into `found` (as long as the write) and compared; where it differs nothing is written or
     * recorded, status is OK, and mismatch the first differing byte.  UINT64_MAX: it was written.
     */
    const uint8_t *expect;
    uint8_t *found;
    uint64_t mismatch;
    struct vrep_group *group;
    /* the rest is private to the filter room (it embeds this struct first in a larger one) */
};

/* NULL when all are in flight: stop reading from the client until vrep_group_set_wakeup's callback.
 */
struct vrep_command *vrep_command_get(struct vrep_group *group);
/* Returns a command that was not submitted, or whose done was called. */
void vrep_command_put(struct vrep_command *command);
/* WRITE: reserves where the payload goes and sets iov/iovcnt (ring chunks; without room in the ring
 * a small private reserve, and then the write will be unrecorded).  AGAIN: no memory at all; wait
 * for the wake-up.  Bounds and flags are checked here for every op: RANGE, INVALID, UNSUPPORTED,
 * READ_ONLY as IO. */
int vrep_command_prepare(struct vrep_command *command);
/* Runs it through the chain; done() is called exactly once, possibly before submit returns. */
void vrep_command_submit(struct vrep_command *command);

#endif
