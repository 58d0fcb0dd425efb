/* Overlap: commands in flight whose ranges overlap are granted one after the
 * other, in order of arrival, so that seq order is the backing's order.
 *
 * The caller embeds a vrep_range in its command.  acquire grants at once when
 * no earlier range (held or waiting) of the same disk overlaps; otherwise the
 * range waits, and release of the last range in its way hands it to the
 * `granted` list.  FIFO among overlapping ranges: no starvation.
 *
 * Units: bytes.  Expected cost O(log n) or a small constant (buckets by 1 MiB
 * region with a list for wide ranges, or a tree: bench decides); no allocation
 * after create.  Threading: one thread.
 */
#ifndef VREP_TRACK_OVERLAP_H
#define VREP_TRACK_OVERLAP_H

#include <stdbool.h>
#include <stdint.h>

struct vrep_range {
    uint64_t offset, length;
    uint16_t disk;
    bool held;
    void *owner;
    /* private to overlap.c */
    struct vrep_range *links[6];
    uint64_t words[4];
};

struct vrep_overlap;
int vrep_overlap_create(uint32_t ranges_max, struct vrep_overlap **out);
void vrep_overlap_destroy(struct vrep_overlap *overlap);
/* True: held now.  False: waits. */
bool vrep_overlap_acquire(struct vrep_overlap *overlap, struct vrep_range *range);
/* Ends a held range, or withdraws a waiting one; calls granted() for each range that becomes held.
 */
void vrep_overlap_release(struct vrep_overlap *overlap, struct vrep_range *range,
                          void (*granted)(void *context, struct vrep_range *range), void *context);
uint32_t vrep_overlap_held(const struct vrep_overlap *overlap);

#endif
