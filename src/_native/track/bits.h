/* Bits: loops over the union of a few bitmaps of 64-bit words.
 *
 * The union is never stored: each loop reads the words of every source once.
 * Loops are plain C, compiled a second time for AVX2 and popcnt and chosen at
 * run time; both give the same results.  Plain loads: for the thread that
 * writes the bitmaps, or another process.
 *
 * Units: bits and words of 64 bits; a bitmap is a multiple of 8 words.
 * Limits: 8 sources.  Pure.
 */
#ifndef VREP_TRACK_BITS_H
#define VREP_TRACK_BITS_H

#include <stdbool.h>
#include <stdint.h>

#define VREP_BITS_SOURCES_MAX 8

struct vrep_bits {
    const uint64_t *source[VREP_BITS_SOURCES_MAX];
    unsigned sources; /* 0: all bits clear */
    uint64_t words;
};

void vrep_bits_union(const struct vrep_bits *bits, uint64_t *out);
uint64_t vrep_bits_count(const struct vrep_bits *bits);
/* First set (or clear) bit at or after from; words * 64 when there is none. */
uint64_t vrep_bits_next(const struct vrep_bits *bits, uint64_t from, bool set);

/* Runs of set bits from bit *from on, as [first, end); a run that holds *from begins there. Returns
 * how many, at most max, and moves *from to where the search goes on: the end when all were found.
 * With room for VREP_BITS_RUNS_MIN or more, one pass over the words; fewer are looked for one by
 * one. Fewer than max may be returned before the end. */
#define VREP_BITS_RUNS_MIN 1024u
uint64_t vrep_bits_runs(const struct vrep_bits *bits, uint64_t *from, uint64_t (*runs)[2],
                        uint64_t max);

/* [first, last] of one bitmap that other threads may read meanwhile (relaxed stores). Each returns
 * how many bits changed. */
uint64_t vrep_bits_set(uint64_t *words, uint64_t first, uint64_t last);
uint64_t vrep_bits_clear(uint64_t *words, uint64_t first, uint64_t last);
bool vrep_bits_any(const uint64_t *words, uint64_t first, uint64_t last);

/* Tests: true makes every loop run as it does on a processor without AVX2. */
void vrep_bits_force_plain(bool plain);

#endif
