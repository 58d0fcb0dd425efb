/* Chunks: which payload chunks of a ring are free; private to its producer.
 *
 * A bitmap with one summary bit per word, so that the search for a free chunk
 * in a full ring of 2^24 chunks reads a few thousand words at worst.  take
 * goes on where the last one ended (next fit) and looks at a bounded number of
 * free runs for one that is long enough; only then it gathers scattered
 * chunks.  Units: chunks.  One thread; no allocation after create.
 */
#ifndef VREP_RING_CHUNKS_H
#define VREP_RING_CHUNKS_H

#include <stdbool.h>
#include <stdint.h>

struct vrep_chunks {
    uint64_t *words; /* bit set: free */
    uint64_t *summary;
    uint32_t count;
    uint32_t words_count;
    uint32_t summary_count;
    uint32_t free;
    uint32_t cursor;
};

/* All chunks free. E_NOMEM. */
int vrep_chunks_create(uint32_t count, struct vrep_chunks *out);
void vrep_chunks_destroy(struct vrep_chunks *chunks);

/* Takes n > 0 chunks, linked through next[] from *first; false when fewer are free.
 * *joined: they are consecutive. */
bool vrep_chunks_take(struct vrep_chunks *chunks, uint32_t n, uint32_t *next, uint32_t *first,
                      bool *joined);
/* Marks one chunk used; false when it was not free or does not exist. */
bool vrep_chunks_claim(struct vrep_chunks *chunks, uint32_t chunk);
/* Frees the first n chunks of the chain; it was linked by take, or claimed. */
void vrep_chunks_give(struct vrep_chunks *chunks, const uint32_t *next, uint32_t first, uint32_t n);

#endif
