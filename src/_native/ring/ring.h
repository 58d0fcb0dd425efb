/* Ring: the shared-memory queue between one filter thread and its consumers.
 *
 * A ring file (tmpfs) holds, in this order: a header page, the in-flight table
 * (slots), the descriptors, the chunk links and the payload chunks of 4 KiB;
 * format/layout.h has the structs.  The producer reserves a slot, a descriptor
 * and all chunks of a change, or nothing; receives the payload straight into
 * the chunks; and publishes descriptors in seq order by advancing `head`, the
 * only commit point.  Consumers map the file read-only and follow head.
 *
 * Units: bytes, and seq numbers from first_seq + 1.  Limits: descriptors is a
 * power of two <= 2^20, chunks <= 2^24 (64 GiB), slots <= 65535.
 * Threading: producer functions belong to one thread and never block or
 * allocate after create/attach; a reader handle belongs to one thread.
 */
#ifndef VREP_RING_RING_H
#define VREP_RING_RING_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "format/layout.h"

struct vrep_ring;

struct vrep_ring_config {
    uint8_t group_id[16];
    uint8_t epoch_id[16];
    uint32_t epoch;
    uint16_t lane;
    uint32_t descriptors;   /* power of two */
    uint32_t slots;         /* in-flight table */
    uint64_t payload_bytes; /* rounded up to chunks */
    uint64_t first_seq;     /* head at creation */
    uint32_t mode;          /* of the file, e.g. 0640 */
};

/* Creates, fully allocates (no SIGBUS later) and attaches a new ring file in place of whatever
 * stands at path (written aside, renamed).  INVALID, NOMEM, IO, FULL. */
int vrep_ring_create(const char *path, const struct vrep_ring_config *config,
                     struct vrep_ring **out);

/* Attaches the ring a dead producer left: checks magic, version, checksum, boot id, group id and
 * every region bound; rebuilds the chunk allocator from (released, head] and the slots.  The caller
 * then calls vrep_ring_judge before anything is reserved.  NOT_FOUND, GONE (another boot), VERSION,
 * CORRUPT, INVALID (another group), BUSY (its producer still lives: an exclusive lock on the file
 * is held for the life of the handle), PERMISSION (not our file, or writable by others), IO. */
int vrep_ring_attach(const char *path, const uint8_t group_id[16], struct vrep_ring **out);

/* Records from now on belong to a newer epoch of the same line. Before consumers are served. */
void vrep_ring_adopt_epoch(struct vrep_ring *ring, uint32_t epoch, const uint8_t epoch_id[16]);

/* Unmaps; clean says that nothing is in flight (recorded only if that is true). */
void vrep_ring_detach(struct vrep_ring *ring, bool clean);

const struct vrep_ring_header *vrep_ring_header(const struct vrep_ring *ring);
uint64_t vrep_ring_head(const struct vrep_ring *ring);
uint64_t vrep_ring_released(const struct vrep_ring *ring);
bool vrep_ring_was_clean(const struct vrep_ring *ring); /* as found by attach */
/* Free resources now: for the "never the last half" rule of sync copies. */
uint64_t vrep_ring_free_bytes(const struct vrep_ring *ring);
uint64_t vrep_ring_payload_bytes(const struct vrep_ring *ring);
uint32_t vrep_ring_free_descriptors(const struct vrep_ring *ring);
/* True when less than half of chunks or of descriptors is free. */
bool vrep_ring_half_full(const struct vrep_ring *ring);

/* A slot (state RESERVED) with a descriptor and chunks for payload_bytes (0: none); NULL when any
 * of the three is short, and then nothing is taken.  Prefers contiguous chunks. */
struct vrep_ring_slot *vrep_ring_reserve(struct vrep_ring *ring, uint64_t payload_bytes);
/* A slot without descriptor or chunks (state UNRECORDED); NULL when the table is full. */
struct vrep_ring_slot *vrep_ring_reserve_unrecorded(struct vrep_ring *ring);
/* The caller has filled kind, generation, disk, offset, length and flags, and has marked the map:
 * from here a restart replays the slot (RESERVED becomes GRANTED; an UNRECORDED one stays). */
void vrep_ring_grant(struct vrep_ring *ring, struct vrep_ring_slot *slot, uint64_t now_ns);
/* Gives back a slot that was never granted, or that is published as unshipped instead. */
void vrep_ring_cancel(struct vrep_ring *ring, struct vrep_ring_slot *slot);
/* Gives back the chunks only (a change that turned out to be zeroes). */
void vrep_ring_drop_payload(struct vrep_ring *ring, struct vrep_ring_slot *slot);

/* Payload of a slot, [offset, offset + length) of it, as iovecs (adjacent chunks joined); returns
 * their number, or -1 when max is too small.  max = length / 4096 + 2 is always enough. */
int vrep_ring_iov(struct vrep_ring *ring, const struct vrep_ring_slot *slot, uint32_t offset,
                  uint32_t length, struct iovec *iov, int max);

/* Publish, first half: assigns seq = head + 1, writes the descriptor from the slot's fields and the
 * times, stores seq in the slot.  One staged slot at a time.  The caller then raises the
 * generation's last_seq. */
uint64_t vrep_ring_stage(struct vrep_ring *ring, struct vrep_ring_slot *slot, uint64_t wall_ns,
                         uint64_t mono_ns);
/* Publish, second half: advances head (release), then frees the slot (its chunks now belong to the
 * descriptor). */
void vrep_ring_commit(struct vrep_ring *ring, struct vrep_ring_slot *slot);

/* Frees descriptors and chunks up to `upto` (checked: released <= upto <= head; returns INVALID
 * otherwise).  What is above durable is kept elsewhere from now on (a spill), or is unshipped. */
int vrep_ring_release(struct vrep_ring *ring, uint64_t upto);
/* What every target holds: outlives the process, as `released` does.  A new ring's is first_seq.
 * Never goes back; never above head. */
void vrep_ring_set_durable(struct vrep_ring *ring, uint64_t durable);
uint64_t vrep_ring_durable(const struct vrep_ring *ring);
/* The target lost what it had acknowledged: nothing is durable. */
void vrep_ring_forget_durable(struct vrep_ring *ring);
/* CLOCK_REALTIME of the oldest record that was released but is not durable; 0: none.  Exact when it
 * was released; while a spill is being shipped the record is younger than this says. */
uint64_t vrep_ring_spilled_ns(const struct vrep_ring *ring);

/* The in-flight table, for a restart and for inspection. */
uint32_t vrep_ring_slots(const struct vrep_ring *ring);
/* Maps all of its pages, beside whoever uses it: what is not mapped yet faults once. */
void vrep_ring_populate(const struct vrep_ring *ring);
struct vrep_ring_slot *vrep_ring_slot_at(struct vrep_ring *ring, uint32_t index);
/* Its number: stable for the life of the slot, for a caller's table of commands. */
uint32_t vrep_ring_slot_index(const struct vrep_ring *ring, const struct vrep_ring_slot *slot);
/* Restart: frees slots that were committed (seq != 0 && seq <= head) or never granted, resets seq
 * of the rest to 0; returns how many GRANTED or UNRECORDED ones remain. */
uint32_t vrep_ring_judge(struct vrep_ring *ring);

/* ---- consumers, as the filter sees them --------------------------------- */

/* A consumer: a sealed memfd (control, 4096 bytes, cannot shrink: no SIGBUS) that it writes, a
 * socket pair on which the filter sends a word when head moved and `waiting` is set, and an eventfd
 * that the consumer signals when it wrote. The filter's end is the filter's alone: an eventfd
 * shared with a consumer could be made to block whoever signals it. */
struct vrep_ring_consumer {
    const struct vrep_ring_control *control;
    int control_fd, data_fd, peer_fd, space_fd; /* peer_fd: the consumer's end of data_fd */
    uint64_t durable, received, read, spilled;  /* last accepted values */
    uint32_t role;
    uint32_t signalled; /* the `waiting` ticket that was answered last */
};
int vrep_ring_consumer_create(uint32_t role, const uint8_t target_id[16], uint64_t durable,
                              uint64_t spilled, struct vrep_ring_consumer *out);
void vrep_ring_consumer_close(struct vrep_ring_consumer *consumer);
/* Copies each value once, accepts them when all are monotonic and <= head; INVALID names a consumer
 * that lied (its old values stay, all of them). */
int vrep_ring_consumer_poll(const struct vrep_ring *ring, struct vrep_ring_consumer *consumer);
/* After a batch of commits: signals the consumer if it waits, once for each time that it began to.
 */
void vrep_ring_consumer_notify(const struct vrep_ring *ring, struct vrep_ring_consumer *consumer);

/* ---- consumers, their own side ------------------------------------------- */

struct vrep_ring_reader;
/* Opens the ring read-only and the control memfd read-write (fds from the filter's control socket;
 * the other two may be -1: then wait polls; so may control_fd: an observer that nobody knows of,
 * whose set does nothing).  Takes its own dup of the fds.  NOT_FOUND, GONE, VERSION, CORRUPT (ring
 * or control), IO. */
int vrep_ring_reader_open(const char *ring_path, int control_fd, int data_fd, int space_fd,
                          struct vrep_ring_reader **out);
/* The same over the producer's own mappings (that of the control file becomes writable), for a
 * consumer on another thread of its process; both must outlive it, consumer may be NULL. */
int vrep_ring_reader_within(struct vrep_ring *ring, struct vrep_ring_consumer *consumer,
                            struct vrep_ring_reader **out);
void vrep_ring_reader_close(struct vrep_ring_reader *reader);
const struct vrep_ring_header *vrep_ring_reader_header(const struct vrep_ring_reader *reader);
uint64_t vrep_ring_reader_head(const struct vrep_ring_reader *reader);
uint64_t vrep_ring_reader_released(const struct vrep_ring_reader *reader);
/* Free payload bytes when head or released moved last: what was reserved since is not known.
 * UNSUPPORTED: a producer of an older release, which does not say. */
int vrep_ring_reader_free_bytes(const struct vrep_ring_reader *reader, uint64_t *out);
/* Waits until head > seq (returns OK) or timeout_ms passed (AGAIN). */
int vrep_ring_reader_wait(struct vrep_ring_reader *reader, uint64_t seq, int timeout_ms);
/* Copy of the descriptor of seq; RANGE when it is not in (released, head], CORRUPT when the slot
 * holds another seq. */
int vrep_ring_reader_desc(const struct vrep_ring_reader *reader, uint64_t seq,
                          struct vrep_ring_desc *out);
/* The descriptors from..to in the mapping, as far as they stand side by side (*n <= to - from + 1;
 * the table wraps): for a consumer that holds release, or looks with still afterwards. RANGE. */
int vrep_ring_reader_run(const struct vrep_ring_reader *reader, uint64_t from, uint64_t to,
                         const struct vrep_ring_desc **at, uint32_t *n);
/* Payload as iovecs into the read-only mapping; every link is bounded before use (CORRUPT). Returns
 * the number in *n. */
int vrep_ring_reader_iov(const struct vrep_ring_reader *reader, const struct vrep_ring_desc *desc,
                         struct iovec *iov, int max, int *n);
/* Observers: after copying a payload, true when the descriptor still was the same (not yet reused).
 */
bool vrep_ring_reader_still(const struct vrep_ring_reader *reader, uint64_t seq);
/* Tells the filter how far this consumer is, and wakes it; values that are not larger than before
 * are kept.  `spilled` lets the filter reuse memory of what is not durable: nothing of this process
 * may still read it. */
void vrep_ring_reader_set(struct vrep_ring_reader *reader, uint64_t read, uint64_t received,
                          uint64_t durable, uint64_t spilled);

#endif
