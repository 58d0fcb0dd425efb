/* Delta: sync copies that send only what the target does not hold.
 *
 * While it is on, unshipped runs of data become *windows*: the owner takes
 * them, asks the target for the hashes of what it holds durably there, opens
 * them, and answers.  A copy of an answered window is read and compared under
 * its range, in units of VREP_HASH_BLOCK_BYTES: runs that differ, or of which
 * nothing is known, become records of their own; a unit that equals the
 * target's is passed over.  When each unit of the copy is one or the other,
 * its bits leave *unshipped* (rule 10 of the change map).
 *
 * An answer says what the target held at a position that is at least `at_least`
 * of the call that gave the window.  It stays true while no record of the unit
 * is made: a unit of which one was made since, or might be on its way when the
 * window was made, is sent whatever the answer says.
 *
 * An answer that never comes, or says nothing, costs bytes and time, never
 * bits: after VREP_DELTA_WAIT_NS a window is copied whole.
 *
 * Units: bytes.  Limits: below; memory is fixed.  Threading: the group's
 * thread, or vrep_group_call.
 */
#ifndef VREP_FILTER_DELTA_H
#define VREP_FILTER_DELTA_H

#include <stdbool.h>
#include <stdint.h>

#include "format/layout.h"

struct vrep_group;

#define VREP_DELTA_WINDOWS 32u
#define VREP_DELTA_WINDOW_BYTES (4u << 20)
#define VREP_DELTA_UNITS (VREP_DELTA_WINDOW_BYTES / VREP_HASH_BLOCK_BYTES)
#define VREP_DELTA_KEYS_MAX 8u
#define VREP_DELTA_WAIT_NS (UINT64_C(30) * 1000000000u)

struct vrep_delta_window {
    uint64_t id;
    uint64_t offset; /* a multiple of VREP_HASH_BLOCK_BYTES */
    uint64_t length; /* at most VREP_DELTA_WINDOW_BYTES; whole bits of the change map */
    uint16_t disk;
};

/* As the format stores them: of a block, XXH3-128 with the secret of a key generation. */
struct vrep_delta_hash {
    uint64_t low, high;
};

/* Compares from now on; what was answered before is forgotten.  `secrets` are those that hashes may
 * have been made with, an answer names them by number.  INVALID: none, or too many; UNSUPPORTED: no
 * tap, or bits smaller than a unit. */
int vrep_group_delta_begin(struct vrep_group *group,
                           const uint8_t (*secrets)[VREP_HASH_SECRET_BYTES], uint32_t count);
/* Copies are whole again, those of windows in use too.  Also a new target's consumer, a lost ring
 * and a resync that is stopped do this. */
void vrep_group_delta_end(struct vrep_group *group);
/* Up to `max` windows to ask for; *count may be 0.  *at_least: the target must be durable up to
 * this seq before it is asked.  GONE: it is off. */
int vrep_group_delta_take(struct vrep_group *group, struct vrep_delta_window *out, uint32_t max,
                          uint32_t *count, uint64_t *at_least);
/* For each unit of a window that was taken: keys[i] 0: nothing is known; else hashes[i] is what the
 * target holds, by secret keys[i] - 1.  NOT_FOUND: the window is not there any more, which does no
 * harm; INVALID: another number of units, or a secret that was not given. */
int vrep_group_delta_answer(struct vrep_group *group, uint64_t id, const uint8_t *keys,
                            const struct vrep_delta_hash *hashes, uint32_t units);

#endif
