/* Private: what map.c and checkpoint.c share and nobody else includes.
 *
 * Units and threading as in map.h.
 */
#ifndef VREP_TRACK_MAP_PRIVATE_H
#define VREP_TRACK_MAP_PRIVATE_H

#include "base/shared.h"
#include "track/map.h"

enum {
    VREP_MAP_BITMAPS = VREP_GENERATIONS + 1,
    VREP_MAP_UNSHIPPED = VREP_GENERATIONS, /* index of that bitmap */
    VREP_MAP_PAGE_WORDS = 512,
};

struct vrep_map {
    struct vrep_shared shared;
    struct vrep_map_header *header;
    struct vrep_map_disk disk[VREP_DISKS_MAX]; /* a checked copy */
    uint32_t disks;
    uint32_t bit_shift;
    uint64_t unshipped_bits;
    /* Odd while bits move between bitmaps other than by a sync copy: a copy that is made meanwhile
     * could miss a bit in both, and is made again. */
    uint64_t moves;
    uint64_t acknowledged; /* see vrep_map_acknowledge */
    bool owner;
    bool marked; /* since the last seal */
    /* Per disk and bitmap, one byte for each page of words that may hold a set bit. */
    uint8_t *touched[VREP_DISKS_MAX][VREP_MAP_BITMAPS];
    uint8_t *touched_room;
};

uint64_t *vrep_map_words(const struct vrep_map *map, uint32_t disk, unsigned bitmap);
/* Ors words into `unshipped`, from word `at` on; bits behind the end of the disk are left out. */
void vrep_map_or_unshipped(struct vrep_map *map, uint32_t disk, uint64_t at, const uint64_t *words,
                           uint64_t count);

#endif
