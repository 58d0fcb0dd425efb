/* Region: the parts of a mapped ring file, found and bounded once.
 *
 * Shared by producer and reader, each over its own mapping.  The pointers are
 * taken from a header whose every offset was checked against the size of the
 * mapping.  Units: bytes.  Pure.
 */
#ifndef VREP_RING_REGION_H
#define VREP_RING_REGION_H

#include <stdint.h>

#include "format/layout.h"

struct vrep_ring_region {
    struct vrep_ring_header *header;
    struct vrep_ring_slot *slots;
    struct vrep_ring_desc *descs;
    uint32_t *next;
    uint8_t *payload;
    uint32_t slots_count;
    uint32_t descs_count;
    uint32_t chunks_count;
};

/* E_CORRUPT (magic, checksum, bounds), E_VERSION, E_GONE (another boot). */
int vrep_ring_region_find(void *base, uint64_t bytes, struct vrep_ring_region *out);

/* Descriptors are copied by indivisible words: a reader may look at one that is being reused. */
void vrep_ring_desc_load(const struct vrep_ring_desc *from, struct vrep_ring_desc *to);
void vrep_ring_desc_store(struct vrep_ring_desc *to, const struct vrep_ring_desc *from);

/* Chunks of [offset, offset + length) of a chain of `chunks` from `first`, as iovecs, adjacent ones
 * joined. E_CORRUPT: a link leads outside; E_FULL: more than max; E_RANGE: beyond the chain. */
int vrep_ring_region_iov(const struct vrep_ring_region *region, uint32_t first, uint32_t chunks,
                         uint64_t offset, uint64_t length, void *iov, int max, int *n);

#endif
