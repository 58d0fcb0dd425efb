#include "track/map.h"

#include <stdlib.h>
#include <string.h>

#include "base/atomic.h"
#include "base/status.h"
#include "format/checksum.h"
#include "track/bits.h"
#include "track/map_private.h"

enum { BIT_BYTES_MIN = 512, BIT_BYTES_MAX = 1 << 30, FILE_MODE = 0640 };
#define DISK_BYTES_MAX (UINT64_C(1) << 56)

/* Which generations an interrupted merge was about; see the header's merge field. */
#define MERGE_SET 0x100u
#define MERGE_WORD(from, to) (MERGE_SET | (uint32_t)(to) << 4 | (uint32_t)(from))
#define MERGE_FROM(word) ((word)&0xfu)
#define MERGE_TO(word) ((word) >> 4 & 0xfu)

uint64_t *vrep_map_words(const struct vrep_map *map, uint32_t disk, unsigned bitmap)
{
    const struct vrep_map_disk *d = &map->disk[disk];
    uint8_t *base = map->shared.base;
    return (uint64_t *)(void *)(base + d->bitmaps_at + bitmap * d->words * sizeof(uint64_t));
}

/* ---- layout, create, attach ----------------------------------------------- */

static int lay_out(const uint64_t *disk_bytes, uint32_t disks, uint32_t bit_bytes,
                   struct vrep_map_disk *disk, uint64_t *file_bytes)
{
    uint64_t at = sizeof(struct vrep_map_header);
    if (disks == 0 || disks > VREP_DISKS_MAX || bit_bytes < BIT_BYTES_MIN ||
        bit_bytes > BIT_BYTES_MAX || (bit_bytes & (bit_bytes - 1)) != 0)
        return VREP_E_INVALID;
    for (uint32_t i = 0; i < disks; i++) {
        uint64_t bytes = disk_bytes[i];
        if (bytes > DISK_BYTES_MAX)
            return VREP_E_INVALID;
        uint64_t bits = (bytes + bit_bytes - 1) / bit_bytes, words = (bits + 63) / 64;
        words = (words + VREP_MAP_PAGE_WORDS - 1) / VREP_MAP_PAGE_WORDS * VREP_MAP_PAGE_WORDS;
        disk[i] =
            (struct vrep_map_disk){.bytes = bytes, .bits = bits, .words = words, .bitmaps_at = at};
        at += words * sizeof(uint64_t) * VREP_MAP_BITMAPS;
    }
    *file_bytes = at;
    return VREP_OK;
}

static int make_touched(struct vrep_map *map)
{
    uint64_t pages = 0;
    for (uint32_t i = 0; i < map->disks; i++)
        pages += map->disk[i].words / VREP_MAP_PAGE_WORDS;
    map->touched_room = calloc(pages * VREP_MAP_BITMAPS + 1, 1);
    if (map->touched_room == NULL)
        return VREP_E_NOMEM;
    uint8_t *at = map->touched_room;
    for (uint32_t i = 0; i < map->disks; i++)
        for (unsigned b = 0; b < VREP_MAP_BITMAPS; b++) {
            map->touched[i][b] = at;
            at += map->disk[i].words / VREP_MAP_PAGE_WORDS;
        }
    return VREP_OK;
}

static void adopt(struct vrep_map *map, uint32_t disks, uint32_t bit_bytes)
{
    map->header = map->shared.base;
    map->disks = disks;
    map->bit_shift = (uint32_t)__builtin_ctz(bit_bytes);
}

static int fill_header(struct vrep_map *map, const uint8_t group_id[16],
                       const uint8_t target_id[16], uint32_t bit_bytes)
{
    struct vrep_map_header *header = map->header;
    header->magic = VREP_MAP_MAGIC;
    header->version = VREP_MAP_VERSION;
    header->header_bytes = sizeof *header;
    header->file_bytes = map->shared.bytes;
    memcpy(header->group_id, group_id, sizeof header->group_id);
    memcpy(header->target_id, target_id, sizeof header->target_id);
    header->bit_bytes = bit_bytes;
    header->disks = map->disks;
    header->generation[0].state = VREP_GENERATION_OPEN;
    memcpy(header->disk, map->disk, sizeof header->disk);
    int status = vrep_boot_id(header->boot_id);
    header->checksum = vrep_checksum32(header, offsetof(struct vrep_map_header, checksum));
    return status;
}

int vrep_map_create(const char *path, const uint8_t group_id[16], const uint8_t target_id[16],
                    const uint64_t *disk_bytes, uint32_t disks, uint32_t bit_bytes,
                    struct vrep_map **out)
{
    uint64_t file_bytes;
    struct vrep_map *map = calloc(1, sizeof *map);
    if (map == NULL)
        return VREP_E_NOMEM;
    int status = lay_out(disk_bytes, disks, bit_bytes, map->disk, &file_bytes);
    if (status == VREP_OK)
        status = vrep_shared_create(path, file_bytes, FILE_MODE, &map->shared);
    if (status == VREP_OK)
        vrep_shared_populate(&map->shared);
    if (status != VREP_OK) {
        free(map);
        return status;
    }
    adopt(map, disks, bit_bytes);
    map->owner = true;
    status = fill_header(map, group_id, target_id, bit_bytes);
    if (status == VREP_OK)
        status = make_touched(map);
    if (status == VREP_OK)
        status = vrep_shared_publish(&map->shared, path);
    if (status != VREP_OK) {
        vrep_shared_discard(&map->shared, path);
        vrep_map_detach(map);
        return status;
    }
    *out = map;
    return VREP_OK;
}

/* The geometry is computed again from the sizes, and must be what the file says. */
static int check_header(struct vrep_map *map)
{
    const struct vrep_map_header *header = map->shared.base;
    uint64_t sizes[VREP_DISKS_MAX], file_bytes;
    uint8_t boot_id[16];
    if (header->magic != VREP_MAP_MAGIC)
        return VREP_E_CORRUPT;
    if (header->version != VREP_MAP_VERSION)
        return VREP_E_VERSION;
    if (header->checksum != vrep_checksum32(header, offsetof(struct vrep_map_header, checksum)) ||
        header->header_bytes != sizeof *header || header->file_bytes != map->shared.bytes ||
        header->disks > VREP_DISKS_MAX)
        return VREP_E_CORRUPT;
    for (uint32_t i = 0; i < header->disks; i++)
        sizes[i] = header->disk[i].bytes;
    if (lay_out(sizes, header->disks, header->bit_bytes, map->disk, &file_bytes) != VREP_OK ||
        file_bytes != map->shared.bytes ||
        memcmp(map->disk, header->disk, header->disks * sizeof map->disk[0]) != 0)
        return VREP_E_CORRUPT;
    int status = vrep_boot_id(boot_id);
    if (status != VREP_OK)
        return status;
    if (memcmp(boot_id, header->boot_id, sizeof boot_id) != 0)
        return VREP_E_GONE;
    adopt(map, header->disks, header->bit_bytes);
    return VREP_OK;
}

static void scan_touched(struct vrep_map *map)
{
    for (uint32_t i = 0; i < map->disks; i++)
        for (unsigned b = 0; b < VREP_MAP_BITMAPS; b++)
            for (uint64_t page = 0; page < map->disk[i].words / VREP_MAP_PAGE_WORDS; page++) {
                struct vrep_bits bits = {
                    .source = {vrep_map_words(map, i, b) + page * VREP_MAP_PAGE_WORDS},
                    .sources = 1,
                    .words = VREP_MAP_PAGE_WORDS};
                uint64_t count = vrep_bits_count(&bits);
                map->touched[i][b][page] = count > 0;
                if (b == VREP_MAP_UNSHIPPED)
                    map->unshipped_bits += count;
            }
}

static void finish_merge(struct vrep_map *map, unsigned from, unsigned to);

/* Brings what a killed owner was in the middle of to its end. */
static int recover(struct vrep_map *map)
{
    struct vrep_map_header *header = map->header;
    uint32_t merge = header->merge;
    if (header->open_generation >= VREP_GENERATIONS ||
        header->generation[header->open_generation].state != VREP_GENERATION_OPEN)
        return VREP_E_CORRUPT;
    for (unsigned g = 0; g < VREP_GENERATIONS; g++) {
        struct vrep_map_generation *generation = &header->generation[g];
        if (generation->state > VREP_GENERATION_SEALED)
            return VREP_E_CORRUPT;
        if (generation->state == VREP_GENERATION_OPEN && g != header->open_generation)
            vrep_store_relaxed_u32(&generation->state, VREP_GENERATION_SEALED);
    }
    if (merge == 0)
        return VREP_OK;
    if ((merge & ~0xffu) != MERGE_SET || MERGE_FROM(merge) >= VREP_GENERATIONS ||
        MERGE_TO(merge) >= VREP_GENERATIONS || MERGE_FROM(merge) == MERGE_TO(merge))
        return VREP_E_CORRUPT;
    if (header->generation[MERGE_FROM(merge)].state == VREP_GENERATION_SEALED)
        finish_merge(map, MERGE_FROM(merge), MERGE_TO(merge));
    return VREP_OK;
}

int vrep_map_attach(const char *path, const uint8_t group_id[16], const uint8_t target_id[16],
                    const uint64_t *disk_bytes, uint32_t disks, struct vrep_map **out)
{
    struct vrep_map *map = calloc(1, sizeof *map);
    if (map == NULL)
        return VREP_E_NOMEM;
    int status = vrep_shared_attach(path, sizeof(struct vrep_map_header), &map->shared);
    if (status == VREP_OK)
        status = check_header(map);
    if (status == VREP_OK &&
        (disks != map->disks || memcmp(map->header->group_id, group_id, 16) != 0 ||
         memcmp(map->header->target_id, target_id, 16) != 0))
        status = VREP_E_INVALID;
    for (uint32_t i = 0; status == VREP_OK && i < disks; i++)
        if (disk_bytes[i] != map->disk[i].bytes)
            status = VREP_E_INVALID;
    if (status == VREP_OK)
        status = make_touched(map);
    if (status == VREP_OK) {
        map->owner = true;
        map->marked = true; /* not known: the next seal is a real one */
        scan_touched(map);
        status = recover(map);
    }
    if (status != VREP_OK) {
        vrep_map_detach(map);
        return status;
    }
    *out = map;
    return VREP_OK;
}

/* What one disk's bitmaps say of blocks that both sizes have. */
static void copy_bits(struct vrep_map *to, const struct vrep_map *from, uint32_t disk)
{
    uint64_t bits =
        from->disk[disk].bits < to->disk[disk].bits ? from->disk[disk].bits : to->disk[disk].bits;
    for (unsigned b = 0; b < VREP_MAP_BITMAPS; b++) {
        uint64_t *words = vrep_map_words(to, disk, b);
        memcpy(words, vrep_map_words(from, disk, b), (bits + 63) / 64 * sizeof(uint64_t));
        if (bits % 64 != 0)
            words[bits / 64] &= (UINT64_C(1) << bits % 64) - 1;
    }
}

static void copy_state(struct vrep_map_header *to, const struct vrep_map_header *from)
{
    to->gap = from->gap;
    to->gap_open = from->gap_open;
    to->gap_seq = from->gap_seq;
    to->gap_last = from->gap_last;
    to->open_generation = from->open_generation;
    to->unverified = from->unverified;
    to->merge = from->merge;
    memcpy(to->generation, from->generation, sizeof to->generation);
}

int vrep_map_resize(struct vrep_map *map, const char *path, const uint64_t *disk_bytes,
                    struct vrep_map **out)
{
    uint64_t file_bytes;
    struct vrep_map *made = calloc(1, sizeof *made);
    if (made == NULL) {
        vrep_map_detach(map);
        return VREP_E_NOMEM;
    }
    const struct vrep_map_header *header = map->header;
    int status = lay_out(disk_bytes, map->disks, header->bit_bytes, made->disk, &file_bytes);
    if (status == VREP_OK)
        status = vrep_shared_create(path, file_bytes, FILE_MODE, &made->shared);
    if (status != VREP_OK) {
        vrep_map_detach(map);
        free(made);
        return status;
    }
    vrep_shared_populate(&made->shared);
    adopt(made, map->disks, header->bit_bytes);
    made->owner = true;
    made->marked = true; /* not known: the next seal is a real one */
    made->acknowledged = map->acknowledged;
    status = fill_header(made, header->group_id, header->target_id, header->bit_bytes);
    copy_state(made->header, header);
    for (uint32_t i = 0; i < map->disks; i++)
        copy_bits(made, map, i);
    if (status == VREP_OK)
        status = make_touched(made);
    /* Its lock goes before another file takes its name. */
    vrep_map_detach(map);
    if (status == VREP_OK)
        status = vrep_shared_publish(&made->shared, path);
    if (status != VREP_OK) {
        vrep_shared_discard(&made->shared, path);
        vrep_map_detach(made);
        return status;
    }
    scan_touched(made);
    *out = made;
    return VREP_OK;
}

int vrep_map_open(const char *path, struct vrep_map **out)
{
    struct vrep_map *map = calloc(1, sizeof *map);
    if (map == NULL)
        return VREP_E_NOMEM;
    int status = vrep_shared_open(path, sizeof(struct vrep_map_header), &map->shared);
    if (status == VREP_OK)
        status = check_header(map);
    if (status != VREP_OK) {
        vrep_map_detach(map);
        return status;
    }
    *out = map;
    return VREP_OK;
}

void vrep_map_detach(struct vrep_map *map)
{
    if (map == NULL)
        return;
    vrep_shared_close(&map->shared);
    free(map->touched_room);
    free(map);
}

struct vrep_map_header *vrep_map_header(struct vrep_map *map)
{
    return map->header;
}

/* ---- marks ------------------------------------------------------------------ */

/* Bits that [offset, offset + length) touches; false when it lies outside the disk or is empty. */
static bool bits_of(const struct vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length,
                    uint64_t *first, uint64_t *last)
{
    if (disk >= map->disks || length == 0 || offset >= map->disk[disk].bytes)
        return false;
    uint64_t left = map->disk[disk].bytes - offset;
    *first = offset >> map->bit_shift;
    *last = (offset + (length < left ? length : left) - 1) >> map->bit_shift;
    return true;
}

static uint64_t set_range(struct vrep_map *map, uint16_t disk, unsigned bitmap, uint64_t first,
                          uint64_t last)
{
    enum { PAGE_BITS = VREP_MAP_PAGE_WORDS * 64 };
    memset(map->touched[disk][bitmap] + first / PAGE_BITS, 1,
           last / PAGE_BITS - first / PAGE_BITS + 1);
    return vrep_bits_set(vrep_map_words(map, disk, bitmap), first, last);
}

/* The caller has told its commands of the last merge, or it would not mark, seal or clear. */
static void settle_merge(struct vrep_map *map)
{
    if (map->header->merge != 0)
        vrep_store_release_u32(&map->header->merge, 0);
}

uint8_t vrep_map_mark(struct vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length)
{
    uint64_t first, last;
    uint32_t open = map->header->open_generation;
    settle_merge(map);
    if (bits_of(map, disk, offset, length, &first, &last))
        (void)set_range(map, disk, open, first, last);
    map->header->generation[open].inflight++;
    map->marked = true;
    /* Whatever the caller does next, in memory or on a disk, comes after the mark. */
    vrep_fence_release();
    return (uint8_t)open;
}

void vrep_map_raise(struct vrep_map *map, uint8_t generation, uint64_t seq)
{
    if (generation >= VREP_GENERATIONS)
        return;
    struct vrep_map_generation *g = &map->header->generation[generation];
    if (seq > g->last_seq)
        vrep_store_release_u64(&g->last_seq, seq);
}

void vrep_map_done(struct vrep_map *map, uint8_t generation)
{
    if (generation >= VREP_GENERATIONS)
        return;
    struct vrep_map_generation *g = &map->header->generation[generation];
    if (g->inflight > 0)
        vrep_store_relaxed_u32(&g->inflight, g->inflight - 1);
}

void vrep_map_mark_unshipped(struct vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length)
{
    uint64_t first, last;
    if (bits_of(map, disk, offset, length, &first, &last))
        map->unshipped_bits += set_range(map, disk, VREP_MAP_UNSHIPPED, first, last);
    vrep_fence_release();
}

void vrep_map_mark_all_unshipped(struct vrep_map *map)
{
    for (uint32_t i = 0; i < map->disks; i++)
        vrep_map_mark_unshipped(map, (uint16_t)i, 0, map->disk[i].bytes);
}

void vrep_map_clear_unshipped(struct vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length)
{
    if (disk >= map->disks || length == 0 || offset >= map->disk[disk].bytes)
        return;
    const struct vrep_map_disk *d = &map->disk[disk];
    uint64_t bit_bytes = UINT64_C(1) << map->bit_shift;
    uint64_t end = length >= d->bytes - offset ? d->bits << map->bit_shift : offset + length;
    uint64_t first = (offset + bit_bytes - 1) >> map->bit_shift, after = end >> map->bit_shift;
    if (first >= after)
        return;
    /* A checkpoint on another thread reads unshipped first: seeing it clear, it sees the mark in
     * the open generation that was made before. */
    vrep_fence_release();
    map->unshipped_bits -=
        vrep_bits_clear(vrep_map_words(map, disk, VREP_MAP_UNSHIPPED), first, after - 1);
}

bool vrep_map_in_generation(struct vrep_map *map, uint16_t disk, uint64_t offset, uint64_t length)
{
    uint64_t first, last;
    if (!bits_of(map, disk, offset, length, &first, &last))
        return false;
    for (unsigned g = 0; g < VREP_GENERATIONS; g++)
        if (map->header->generation[g].state != VREP_GENERATION_FREE &&
            vrep_bits_any(vrep_map_words(map, disk, g), first, last))
            return true;
    return false;
}

/* ---- generations ------------------------------------------------------------ */

static void move_begin(struct vrep_map *map)
{
    vrep_store_relaxed_u64(&map->moves, map->moves + 1);
    vrep_fence_release();
}

static void move_end(struct vrep_map *map)
{
    vrep_store_release_u64(&map->moves, map->moves + 1);
}

static void wipe(struct vrep_map *map, unsigned bitmap)
{
    for (uint32_t i = 0; i < map->disks; i++) {
        uint64_t *words = vrep_map_words(map, i, bitmap);
        for (uint64_t page = 0; page < map->disk[i].words / VREP_MAP_PAGE_WORDS; page++) {
            if (!map->touched[i][bitmap][page])
                continue;
            uint64_t *at = words + page * VREP_MAP_PAGE_WORDS;
            for (int w = 0; w < VREP_MAP_PAGE_WORDS; w++)
                vrep_store_relaxed_u64(&at[w], 0);
            map->touched[i][bitmap][page] = 0;
        }
    }
}

static void pour(struct vrep_map *map, unsigned from, unsigned to)
{
    for (uint32_t i = 0; i < map->disks; i++) {
        const uint64_t *source = vrep_map_words(map, i, from);
        uint64_t *target = vrep_map_words(map, i, to);
        for (uint64_t at = 0; at < map->disk[i].words; at++) {
            uint64_t page = at / VREP_MAP_PAGE_WORDS;
            if (!map->touched[i][from][page]) {
                at += VREP_MAP_PAGE_WORDS - 1;
                continue;
            }
            map->touched[i][to][page] = 1;
            uint64_t before = target[at], added = source[at] & ~before;
            if (added == 0)
                continue;
            vrep_store_relaxed_u64(&target[at], before | added);
            if (to == VREP_MAP_UNSHIPPED)
                map->unshipped_bits += (uint64_t)__builtin_popcountll(added);
        }
    }
}

/* Every step may be the last of a killed owner; done again from the start it gives the same. */
static void finish_merge(struct vrep_map *map, unsigned from, unsigned to)
{
    struct vrep_map_generation *source = &map->header->generation[from];
    struct vrep_map_generation *target = &map->header->generation[to];
    move_begin(map);
    pour(map, from, to);
    if (source->last_seq > target->last_seq)
        vrep_store_relaxed_u64(&target->last_seq, source->last_seq);
    vrep_fence_release();
    wipe(map, from);
    vrep_store_relaxed_u32(&target->inflight, target->inflight + source->inflight);
    vrep_store_relaxed_u32(&source->inflight, 0);
    vrep_store_release_u32(&source->state, VREP_GENERATION_FREE);
    move_end(map);
}

static int find_generation(const struct vrep_map *map, uint32_t state, int except)
{
    const struct vrep_map_generation *all = map->header->generation;
    int found = -1;
    for (int g = 0; g < (int)VREP_GENERATIONS; g++)
        if (g != except && all[g].state == state &&
            (found < 0 || all[g].opened_seq < all[found].opened_seq))
            found = g;
    return found;
}

bool vrep_map_seal(struct vrep_map *map, uint64_t head, struct vrep_map_move *move)
{
    struct vrep_map_header *header = map->header;
    *move = (struct vrep_map_move){.moved = false};
    if (!map->marked)
        return false;
    settle_merge(map);
    int next = find_generation(map, VREP_GENERATION_FREE, -1);
    if (next < 0) {
        int to = find_generation(map, VREP_GENERATION_SEALED, -1);
        int from = find_generation(map, VREP_GENERATION_SEALED, to);
        vrep_store_release_u32(&header->merge, MERGE_WORD(from, to));
        finish_merge(map, (unsigned)from, (unsigned)to);
        *move = (struct vrep_map_move){.moved = true, .from = (uint8_t)from, .to = (uint8_t)to};
        next = from;
    }
    struct vrep_map_generation *opened = &header->generation[next];
    uint32_t sealed = header->open_generation;
    opened->inflight = 0;
    opened->last_seq = 0;
    /* Strictly rising, so that it tells the order of age. */
    uint64_t older = header->generation[sealed].opened_seq;
    opened->opened_seq = head > older ? head : older + 1;
    /* In this order: a killed owner leaves the new generation beside the old one, never none. */
    vrep_store_release_u32(&opened->state, VREP_GENERATION_OPEN);
    vrep_store_release_u32(&header->open_generation, (uint32_t)next);
    vrep_store_release_u32(&header->generation[sealed].state, VREP_GENERATION_SEALED);
    map->marked = false;
    return true;
}

void vrep_map_acknowledge(struct vrep_map *map, uint64_t durable)
{
    vrep_store_release_u64(&map->acknowledged, durable);
    vrep_fence_full(); /* a copy that misses a bit that is cleared from here on sees the value */
}

uint64_t vrep_map_acknowledged(const struct vrep_map *map)
{
    return vrep_load_relaxed_u64(&map->acknowledged);
}

uint32_t vrep_map_clear(struct vrep_map *map, uint64_t durable)
{
    uint32_t freed = 0;
    settle_merge(map);
    for (unsigned g = 0; g < VREP_GENERATIONS; g++) {
        struct vrep_map_generation *generation = &map->header->generation[g];
        if (generation->state != VREP_GENERATION_SEALED || generation->inflight != 0 ||
            durable < generation->last_seq)
            continue;
        wipe(map, g);
        vrep_store_release_u32(&generation->state, VREP_GENERATION_FREE);
        freed++;
    }
    return freed;
}

void vrep_map_generations_to_unshipped(struct vrep_map *map)
{
    move_begin(map);
    for (unsigned g = 0; g < VREP_GENERATIONS; g++)
        pour(map, g, VREP_MAP_UNSHIPPED);
    vrep_fence_release();
    for (unsigned g = 0; g < VREP_GENERATIONS; g++)
        wipe(map, g);
    move_end(map);
}

void vrep_map_reset_inflight(struct vrep_map *map)
{
    for (unsigned g = 0; g < VREP_GENERATIONS; g++)
        vrep_store_relaxed_u32(&map->header->generation[g].inflight, 0);
}

uint8_t vrep_map_count(struct vrep_map *map, uint8_t generation)
{
    uint32_t merge = map->header->merge;
    unsigned now = generation;
    if (generation >= VREP_GENERATIONS)
        return generation;
    if (merge != 0 && now == MERGE_FROM(merge))
        now = MERGE_TO(merge);
    map->header->generation[now].inflight++;
    return (uint8_t)now;
}

void vrep_map_set_gap(struct vrep_map *map)
{
    vrep_store_release_u32(&map->header->gap, 1);
}

bool vrep_map_gap(const struct vrep_map *map)
{
    return vrep_load_acquire_u32(&map->header->gap) != 0;
}
