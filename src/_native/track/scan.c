#include <string.h>

#include "base/atomic.h"
#include "track/bits.h"
#include "track/map.h"
#include "track/map_private.h"

/* A free generation is all clear: left out, it costs nothing. A reader in another process may look
 * at one that is just being opened or freed; what it reports is a moment's view anyway. */
static struct vrep_bits dirty_of(const struct vrep_map *map, uint32_t disk)
{
    struct vrep_bits bits = {.words = map->disk[disk].words};
    bits.source[bits.sources++] = vrep_map_words(map, disk, VREP_MAP_UNSHIPPED);
    for (unsigned g = 0; g < VREP_GENERATIONS; g++)
        if (vrep_load_relaxed_u32(&map->header->generation[g].state) != VREP_GENERATION_FREE)
            bits.source[bits.sources++] = vrep_map_words(map, disk, g);
    return bits;
}

static struct vrep_bits unshipped_of(const struct vrep_map *map, uint32_t disk)
{
    return (struct vrep_bits){.source = {vrep_map_words(map, disk, VREP_MAP_UNSHIPPED)},
                              .sources = 1,
                              .words = map->disk[disk].words};
}

uint64_t vrep_map_unshipped_bits(const struct vrep_map *map)
{
    if (map->owner)
        return map->unshipped_bits;
    uint64_t count = 0;
    for (uint32_t i = 0; i < map->disks; i++) {
        struct vrep_bits bits = unshipped_of(map, i);
        count += vrep_bits_count(&bits);
    }
    return count;
}

uint64_t vrep_map_dirty_bits(const struct vrep_map *map)
{
    uint64_t count = 0;
    for (uint32_t i = 0; i < map->disks; i++) {
        struct vrep_bits bits = dirty_of(map, i);
        count += vrep_bits_count(&bits);
    }
    return count;
}

/* What the last bit of a disk stands for less than a whole one, when it is set. */
static uint64_t shortage(const struct vrep_map *map, uint32_t disk, const struct vrep_bits *bits)
{
    const struct vrep_map_disk *d = &map->disk[disk];
    uint64_t whole = d->bits << map->bit_shift;
    if (whole == d->bytes || vrep_bits_next(bits, d->bits - 1, true) != d->bits - 1)
        return 0;
    return whole - d->bytes;
}

uint64_t vrep_map_dirty_bytes(const struct vrep_map *map)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < map->disks; i++) {
        struct vrep_bits bits = dirty_of(map, i);
        bytes += (vrep_bits_count(&bits) << map->bit_shift) - shortage(map, i, &bits);
    }
    return bytes;
}

uint64_t vrep_map_unshipped_bytes(const struct vrep_map *map)
{
    uint64_t bytes = vrep_map_unshipped_bits(map) << map->bit_shift;
    for (uint32_t i = 0; i < map->disks; i++) {
        struct vrep_bits bits = unshipped_of(map, i);
        bytes -= shortage(map, i, &bits);
    }
    return bytes;
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

bool vrep_map_next_unshipped(const struct vrep_map *map, uint16_t disk, uint64_t from,
                             uint64_t max_bytes, uint64_t *offset, uint64_t *length)
{
    if (disk >= map->disks || from >= map->disk[disk].bytes)
        return false;
    const struct vrep_map_disk *d = &map->disk[disk];
    struct vrep_bits bits = unshipped_of(map, disk);
    uint64_t first = vrep_bits_next(&bits, from >> map->bit_shift, true);
    if (first >= d->bits)
        return false;
    uint64_t bits_max = max_bytes >> map->bit_shift;
    uint64_t end = least(vrep_bits_next(&bits, first, false), d->bits);
    end = least(end, first + (bits_max > 0 ? least(bits_max, d->bits) : 1));
    *offset = first << map->bit_shift;
    *length = least(end << map->bit_shift, d->bytes) - *offset;
    return true;
}

bool vrep_map_next_run(const struct vrep_map *map, uint16_t disk, uint64_t from, uint64_t *length,
                       bool *dirty)
{
    if (disk >= map->disks || from >= map->disk[disk].bytes)
        return false;
    const struct vrep_map_disk *d = &map->disk[disk];
    struct vrep_bits bits = dirty_of(map, disk);
    uint64_t bit = from >> map->bit_shift;
    *dirty = vrep_bits_next(&bits, bit, true) == bit;
    uint64_t end = least(vrep_bits_next(&bits, bit, !*dirty), d->bits);
    *length = least(end << map->bit_shift, d->bytes) - from;
    return true;
}

void vrep_map_union(const struct vrep_map *map, uint16_t disk, uint64_t *words)
{
    if (disk >= map->disks)
        return;
    struct vrep_bits bits = dirty_of(map, disk);
    vrep_bits_union(&bits, words);
}

uint64_t vrep_map_runs(const struct vrep_map *map, uint16_t disk, uint64_t *from,
                       uint64_t (*runs)[2], uint64_t max)
{
    uint64_t n = 0;
    if (disk >= map->disks)
        return 0;
    const struct vrep_map_disk *d = &map->disk[disk];
    struct vrep_bits bits = dirty_of(map, disk);
    while (n == 0 && max > 0 && *from < d->bytes) { /* no run before a full room: search on */
        uint64_t start = *from, bit = start >> map->bit_shift;
        n = vrep_bits_runs(&bits, &bit, runs, max);
        for (uint64_t i = 0; i < n; i++) {
            uint64_t first = runs[i][0] << map->bit_shift;
            runs[i][0] = first > start ? first : start;
            runs[i][1] = least(runs[i][1] << map->bit_shift, d->bytes) - runs[i][0];
        }
        *from = least(bit << map->bit_shift, d->bytes);
    }
    return n;
}

void vrep_map_or_unshipped(struct vrep_map *map, uint32_t disk, uint64_t at, const uint64_t *words,
                           uint64_t count)
{
    const struct vrep_map_disk *d = &map->disk[disk];
    uint64_t *target = vrep_map_words(map, disk, VREP_MAP_UNSHIPPED);
    for (uint64_t i = 0; i < count && (at + i) * 64 < d->bits; i++) {
        uint64_t word = words[i], left = d->bits - (at + i) * 64;
        if (left < 64)
            word &= (UINT64_C(1) << left) - 1;
        word &= ~target[at + i];
        if (word == 0)
            continue;
        map->touched[disk][VREP_MAP_UNSHIPPED][(at + i) / VREP_MAP_PAGE_WORDS] = 1;
        vrep_store_relaxed_u64(&target[at + i], target[at + i] | word);
        map->unshipped_bits += (uint64_t)__builtin_popcountll(word);
    }
}
