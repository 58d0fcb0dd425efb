/* State: what must survive a host about a protected group at its source: is
 * it open, the stamps of its disks, the epoch, and the high-water mark of seq.
 *
 * One file of two slots of struct vrep_state, written in turn, each write
 * followed by fdatasync: after a crash one slot is whole.  Units: bytes.
 * Threading: open, close and load by the owner; write by one thread at a time.
 */
#ifndef VREP_FILTER_STATE_H
#define VREP_FILTER_STATE_H

#include <stdint.h>

#include "format/layout.h"

/* A slot with a counter from here on is not ours: no life of a disk counts that far. */
#define VREP_STATE_COUNTER_LIMIT (UINT64_C(1) << 63)

struct vrep_state_file {
    int fd;
    uint64_t counter; /* of the newest slot on disk */
};

/* Loads the newest whole slot: NOT_FOUND, CORRUPT (no slot is whole), VERSION,
 * INVALID (another group's), IO. */
int vrep_state_load(const char *path, const uint8_t group_id[16], struct vrep_state *state);
/* Opens for writing, creates if absent (the directory entry is synced). */
int vrep_state_open(const char *path, struct vrep_state_file *file);
/* Stores into the slot that does not hold the newest, with the next counter; sets magic, version,
 * counter and checksum in *state.  Durable when it returns OK; FULL at the counter's limit. */
int vrep_state_write(struct vrep_state_file *file, struct vrep_state *state);
void vrep_state_close(struct vrep_state_file *file);

#endif
