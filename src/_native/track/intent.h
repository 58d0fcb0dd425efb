/* Write-intent: which 16 MiB extents may have been written since they were
 * last known to be safe on the backing store and in a checkpoint.  After a
 * host's power loss only these extents and the checkpointed bits need a
 * resync.
 *
 * A file with two slots, written in turn and fdatasync'd.  A write into an
 * extent whose bit is not yet durable (cold) waits for one sync, shared by all
 * cold writes queued meanwhile.  An extent leaves only by rule 9: nothing in
 * flight, a backing flush started after its last write completed, and a map
 * checkpoint started after its last mark.
 *
 * Units: bytes.  Threading: the owner thread calls all but
 * vrep_intent_write, which a worker thread calls, one at a time.
 */
#ifndef VREP_TRACK_INTENT_H
#define VREP_TRACK_INTENT_H

#include <stdbool.h>
#include <stdint.h>

#include "format/layout.h"

struct vrep_intent;
int vrep_intent_create(const char *path, const uint8_t group_id[16], const uint64_t *disk_bytes,
                       uint32_t disks, struct vrep_intent **out);
/* Opens; the newest valid slot is loaded: NOT_FOUND, CORRUPT, INVALID (other geometry). */
int vrep_intent_open(const char *path, const uint8_t group_id[16], const uint64_t *disk_bytes,
                     uint32_t disks, struct vrep_intent **out);
void vrep_intent_close(struct vrep_intent *intent);

/* Begin a write: true when all its extents are durable (then counted in flight, end must follow);
 * false when cold: the extents are requested and a sync is wanted; try again after it. */
bool vrep_intent_begin(struct vrep_intent *intent, uint16_t disk, uint64_t offset, uint64_t length);
void vrep_intent_end(struct vrep_intent *intent, uint16_t disk, uint64_t offset, uint64_t length);
bool vrep_intent_wants_sync(const struct vrep_intent *intent);
/* Owner: freezes the bitmap to write (durable | requested); worker: writes and syncs it; owner:
 * makes it durable. */
void vrep_intent_prepare(struct vrep_intent *intent);
int vrep_intent_write(struct vrep_intent *intent);
void vrep_intent_commit(struct vrep_intent *intent, int status);

/* Cooling, a batch every 30 s: cool_begin notes candidates (nothing in flight); the caller then
 * starts a backing flush and a checkpoint; when both succeeded, cool_end drops those candidates
 * that were not written since, and the next sync makes it durable.  cool_end(false) drops nothing.
 */
void vrep_intent_cool_begin(struct vrep_intent *intent);
void vrep_intent_cool_end(struct vrep_intent *intent, bool ok);

uint64_t vrep_intent_hot_extents(const struct vrep_intent *intent);
/* Next run of durable-hot bytes at or after from (for the resync after power loss). */
bool vrep_intent_next(const struct vrep_intent *intent, uint16_t disk, uint64_t from,
                      uint64_t *offset, uint64_t *length);

#endif
