/* Change map: for one target, which blocks it may not hold durably.
 *
 * A file in shared memory (a killed filter loses nothing): per disk four
 * generation bitmaps and the *unshipped* bitmap, one bit per bit_bytes (power
 * of two, default 64 KiB); dirty = the union of the five.  A write marks the
 * open generation before it is submitted; a generation is cleared only when
 * sealed, nothing of it is in flight, and the target's durable seq >= its
 * last_seq.  A mark without a record goes to unshipped, which only a published
 * sync copy clears.  docs/internals/model proves the rules.
 *
 * Units: bytes.  Limits: 64 disks.  Threading: one owner thread writes; any
 * process may read (bits are read with relaxed atomics); checkpoint may run on
 * another thread while the owner marks.
 */
#ifndef VREP_TRACK_MAP_H
#define VREP_TRACK_MAP_H

#include <stdbool.h>
#include <stdint.h>

#include "format/layout.h"

struct vrep_map;

int vrep_map_create(const char *path, const uint8_t group_id[16], const uint8_t target_id[16],
                    const uint64_t *disk_bytes, uint32_t disks, uint32_t bit_bytes,
                    struct vrep_map **out);
/* Attaches what a dead owner left; GONE when of another boot, CORRUPT, VERSION, INVALID when disks
 * or sizes differ. */
int vrep_map_attach(const char *path, const uint8_t group_id[16], const uint8_t target_id[16],
                    const uint64_t *disk_bytes, uint32_t disks, struct vrep_map **out);
/* The map of a disk that got another size: a new file takes the place of the old one, with all that
 * it said of the blocks that there still are; new blocks are clean.  A crash leaves the one or the
 * other.  `map` is detached, whatever the outcome. */
int vrep_map_resize(struct vrep_map *map, const char *path, const uint64_t *disk_bytes,
                    struct vrep_map **out);
/* Read-only, for status. */
int vrep_map_open(const char *path, struct vrep_map **out);
void vrep_map_detach(struct vrep_map *map);
struct vrep_map_header *vrep_map_header(struct vrep_map *map);

/* Grant: marks the open generation and counts one in flight in it; returns the generation's index.
 * raise, done and count do nothing for a slot's 0xff: a change that has no mark. */
uint8_t vrep_map_mark(struct vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length);
/* Publish, between stage and commit of the ring: last_seq = max(last_seq, seq). */
void vrep_map_raise(struct vrep_map *map, uint8_t generation, uint64_t seq);
/* The command left the in-flight table. */
void vrep_map_done(struct vrep_map *map, uint8_t generation);
/* Every bit touched. */
void vrep_map_mark_unshipped(struct vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length);
void vrep_map_mark_all_unshipped(struct vrep_map *map);
/* Only bits that the range covers whole (the last one of a disk may be short). */
void vrep_map_clear_unshipped(struct vrep_map *map, uint16_t disk, uint64_t offset,
                              uint64_t length);
/* True if any bit of the range is set in a generation (for the delta rule). */
bool vrep_map_in_generation(struct vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length);

/* Seals the open generation and opens a free one; when none is free, merges the two oldest sealed
 * ones and tells the caller (moved: from -> to, so that it updates the slots in flight, before it
 * calls anything else here).  False: nothing marked since the last seal, nothing done. */
struct vrep_map_move {
    bool moved;
    uint8_t from, to;
};
bool vrep_map_seal(struct vrep_map *map, uint64_t head, struct vrep_map_move *move);
/* Clears what rule 5 allows; returns the number of generations freed. */
uint32_t vrep_map_clear(struct vrep_map *map, uint64_t durable);
/* What the target said that it holds: told before bits are cleared for it.  A checkpoint carries it
 * beside the bits, so that a target that holds less, later, is known to have lost it although
 * nothing else outlived a power loss.  0: nothing, or all is sent again. */
void vrep_map_acknowledge(struct vrep_map *map, uint64_t durable);
/* Of this process, or of the checkpoint that was loaded. */
uint64_t vrep_map_acknowledged(const struct vrep_map *map);
/* Moves everything that generations hold to unshipped (lost ring or spill, power loss). */
void vrep_map_generations_to_unshipped(struct vrep_map *map);
/* Restart: in-flight counts to zero; the caller then counts its slots again with vrep_map_count,
 * which returns the generation that now has the command's bits (another one when the owner died
 * within a merge): the caller stores it in the slot. */
void vrep_map_reset_inflight(struct vrep_map *map);
uint8_t vrep_map_count(struct vrep_map *map, uint8_t generation);

/* The gap flag (rule 6); set before an unrecorded write is submitted. */
void vrep_map_set_gap(struct vrep_map *map);
bool vrep_map_gap(const struct vrep_map *map);

uint64_t vrep_map_unshipped_bits(const struct vrep_map *map); /* O(1) for the owner */
uint64_t vrep_map_dirty_bits(const struct vrep_map *map);     /* a scan */
/* Bytes of the disk(s) those bits stand for, the short last bit counted right. */
uint64_t vrep_map_dirty_bytes(const struct vrep_map *map);
uint64_t vrep_map_unshipped_bytes(const struct vrep_map *map);
/* Next run of unshipped bits from the bit that holds `from` on, whole bits and at most max_bytes
 * (but at least one bit); false when there is none.
 */
bool vrep_map_next_unshipped(const struct vrep_map *map, uint16_t disk, uint64_t from,
                             uint64_t max_bytes, uint64_t *offset, uint64_t *length);
/* Next run of dirty or clean bits at or after `from`: for BLOCK_STATUS. */
bool vrep_map_next_run(const struct vrep_map *map, uint16_t disk, uint64_t from, uint64_t *length,
                       bool *dirty);
/* Union of the five bitmaps of a disk into words (vrep_map_header()->disk[disk].words of them). */
void vrep_map_union(const struct vrep_map *map, uint16_t disk, uint64_t *words);

/* The runs of dirty bits of a disk from *from on, as pairs of (offset, length) in bytes; returns
 * how many, at most max, and moves *from to where the search goes on: behind the last byte when
 * there are no more (fewer than max alone does not say so). */
uint64_t vrep_map_runs(const struct vrep_map *map, uint16_t disk, uint64_t *from,
                       uint64_t (*runs)[2], uint64_t max);

/* Durable checkpoint of the union into the older of two files (prefix + ".0" / ".1"): write,
 * fdatasync. Any thread; allocates nothing after the first call. */
struct vrep_checkpoint;
int vrep_checkpoint_open(const char *prefix, struct vrep_map *map, struct vrep_checkpoint **out);
int vrep_checkpoint_write(struct vrep_checkpoint *checkpoint, uint64_t head, bool clean);
void vrep_checkpoint_close(struct vrep_checkpoint *checkpoint);
/* Loads the newest valid one into `unshipped`. NOT_FOUND, CORRUPT (neither is valid), INVALID
 * (other geometry). *clean tells whether a clean stop wrote it. */
int vrep_checkpoint_load(const char *prefix, struct vrep_map *map, bool *clean);

#endif
