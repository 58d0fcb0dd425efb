/*
 * Changes: which blocks of a disk may differ between two recovery points, out of
 * the indexes of a group; no data are read.
 *
 * What a disk holds at a point is decided by the records that its ancestry shows.
 * Two ancestries that show the same records of a block show the same bytes, so
 * what may differ is what the records cover that one of them shows and the other
 * does not: of each epoch those above the smaller limit and up to the larger, of
 * an epoch that only one has those up to its limit.  On one line of history that
 * is what was written between; after a failover or rollback, everything since the
 * lines parted, on both.  Every kind of record that changes bytes counts: writes,
 * zeroes and sync copies, also of bytes that were the same before.
 *
 * Nodes of the trees whose records are all outside of that are passed over
 * unread, so the cost grows with what was written between the points and not
 * with the disk or the age of the history.  All that is read is checked first.
 *
 * Units: bytes; a change is told in whole blocks of VREP_CHANGES_BLOCK_BYTES.
 * Limits: offset + length at most 2^63 - 1.
 *
 * Threading: constant once made; lists need 64 KiB of stack and may be made at
 * once.  The indexes must outlive it.
 */
#ifndef VREP_MAP_CHANGES_H
#define VREP_MAP_CHANGES_H

#include "map/extent_map.h"

#define VREP_CHANGES_BLOCK_BYTES 4096u

struct vrep_changes;

struct vrep_changed {
    uint64_t offset;
    uint64_t length;
};

/* The order of the two points does not matter. VREP_E_INVALID: an epoch twice in one
 * of them, or indexes of several groups. VREP_E_CORRUPT: the root of a tree is damaged. */
int vrep_changes_new(const struct vrep_index *const *indexes, size_t count,
                     const struct vrep_reign *since, size_t since_count,
                     const struct vrep_reign *at, size_t at_count, struct vrep_changes **out);
void vrep_changes_free(struct vrep_changes *changes);

/*
 * Appends to out[*count .. cap) what may differ inside [offset, offset + length), rising,
 * apart, in whole blocks, cut at both ends of the range; *done becomes how many bytes of the
 * range were looked at: fewer than length when `out` is full. The first may prolong
 * out[*count - 1] instead. VREP_E_CORRUPT: an index is damaged where it was read;
 * VREP_E_RANGE: disk, offset or length out of bounds.
 */
int vrep_changes_list(const struct vrep_changes *changes, uint32_t disk, uint64_t offset,
                      uint64_t length, struct vrep_changed *out, size_t cap, size_t *count,
                      uint64_t *done);

#endif
