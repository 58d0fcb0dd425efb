#include "map/extent_map.h"

#include <stdbool.h>

#include "check.h"
#include "format/checksum.h"
#include "format/record.h"

enum { DISK = 1 << 22, BLOCK = 512, BLOCKS = DISK / BLOCK, SEQS = 6000, SEGMENTS = 7 };

static const uint8_t group[16] = {7};

struct change {
    uint64_t seq;
    uint64_t offset;
    uint32_t length;
};
static struct change changes[SEQS];

static size_t put(uint8_t *out, uint8_t kind, uint64_t seq, uint64_t offset, uint32_t length)
{
    struct vrep_record record;
    uint32_t word = VREP_PIECE_ZSTD | 17;

    vrep_record_init(&record, kind, 1, 0);
    record.seq = seq;
    record.offset = offset;
    record.length = length;
    if (kind == VREP_KIND_WRITE) {
        record.pieces = 1;
        record.body_bytes = 21;
        memcpy(out + 64, &word, sizeof word);
        memset(out + 68, 0, 17);
    }
    vrep_record_finish(&record);
    memcpy(out, &record, sizeof record);
    return 64 + record.body_bytes;
}

static struct vrep_index_builder *new_builder(uint32_t segment)
{
    static const struct vrep_index_stream stream = {.epoch = 1};
    struct vrep_index_builder *builder;

    CHECK_OK(vrep_index_builder_new(segment, group, &stream, &builder));
    return builder;
}

static struct vrep_index *freeze(struct vrep_index_builder *builder)
{
    struct vrep_index *index;
    uint8_t *bytes;
    size_t len;

    CHECK_OK(vrep_index_builder_finish(builder, 0, &bytes, &len));
    CHECK_OK(vrep_index_open_bytes(bytes, len, &index));
    free(bytes);
    vrep_index_builder_free(builder);
    return index;
}

static void add(struct vrep_index_builder *builder, uint8_t kind, uint64_t seq, uint64_t offset,
                uint32_t length)
{
    uint8_t room[128];
    uint64_t records;
    size_t len = put(room, kind, seq, offset, length);

    CHECK_OK(vrep_index_builder_add(builder, room, len, 128 * seq, &records));
}

/* Compares a whole lookup with `want`, the seq that each block must come from. */
static void check_disk(const struct vrep_extent_map *map, const uint64_t *want, size_t cap)
{
    static struct vrep_extent out[BLOCKS];
    uint64_t at = 0, done;

    while (at < DISK) {
        size_t count = 0;
        CHECK_OK(vrep_extent_map_lookup(map, 0, at, DISK - at, out, cap, &count, &done));
        CHECK(done > 0);
        for (size_t i = 0; i < count; i++) {
            CHECK_EQ(out[i].offset, at);
            for (uint64_t end = at + out[i].length; at < end; at += BLOCK) {
                uint64_t seq = want[at / BLOCK];
                CHECK_EQ(out[i].seq, seq);
                CHECK_EQ(out[i].kind != 0, seq != 0);
                if (seq != 0)
                    CHECK_EQ(out[i].skip + (at - out[i].offset), at - changes[seq - 1].offset);
            }
        }
    }
}

static void random_history_at_random_points(void)
{
    static uint64_t want[BLOCKS];
    const struct vrep_index *indexes[SEGMENTS];
    struct vrep_index_builder *builder = NULL;
    uint32_t segments = 0;

    for (uint32_t i = 0; i < SEQS; i++) {
        bool zeroes = check_random_below(20) == 0;
        uint64_t offset = check_random_below(BLOCKS) * BLOCK;
        uint32_t length = (uint32_t)(1 + check_random_below(zeroes ? 2000 : 16)) * BLOCK;
        if (check_random_below(8) == 0)
            offset = 77 * BLOCK;
        if (length > DISK - offset)
            length = (uint32_t)(DISK - offset);
        changes[i] = (struct change){.seq = i + 1, .offset = offset, .length = length};
        if (builder == NULL)
            builder = new_builder(segments + 1);
        add(builder, zeroes ? VREP_KIND_ZEROES : VREP_KIND_WRITE, i + 1, offset, length);
        if ((i + 1) % (SEQS / SEGMENTS) == 0 && segments + 1 < SEGMENTS) {
            indexes[segments++] = freeze(builder);
            builder = NULL;
        }
    }
    indexes[segments++] = freeze(builder);
    for (int round = 0; round < 12; round++) {
        uint64_t point = round == 0 ? SEQS : check_random_below(SEQS + 1);
        struct vrep_reign reign = {.epoch = 1, .seq_max = point};
        struct vrep_extent_map *map;
        memset(want, 0, sizeof want);
        for (uint64_t i = 0; i < point; i++)
            for (uint64_t b = 0; b < changes[i].length / BLOCK; b++)
                want[changes[i].offset / BLOCK + b] = i + 1;
        CHECK_OK(vrep_extent_map_new(indexes, segments, &reign, 1, &map));
        check_disk(map, want, round % 2 ? BLOCKS : 7);
        for (int i = 0; i < 200; i++) {
            uint64_t from = check_random_below(BLOCKS), to = from, next;
            int found = vrep_extent_map_next(map, 0, from * BLOCK, &next);
            while (to < BLOCKS && want[to] == 0)
                to++;
            CHECK_EQ(found, to < BLOCKS);
            if (found)
                CHECK_EQ(next, to * BLOCK);
        }
        vrep_extent_map_free(map);
    }
    for (uint32_t i = 0; i < segments; i++)
        vrep_index_free((struct vrep_index *)(uintptr_t)indexes[i]);
}

static void a_fork_hides_what_its_parent_wrote_later(void)
{
    static const struct vrep_index_stream first = {.stream_id = {1}, .epoch = 1};
    struct vrep_stream second = {.stream_id = {2}, .epoch = 2, .resume_seq = 3};
    struct vrep_reign chain[2] = {{.epoch = 2, .seq_max = 4}, {.epoch = 1, .seq_max = 3}};
    struct vrep_index_builder *builder;
    struct vrep_extent_map *map;
    struct vrep_extent out[8];
    struct vrep_record record;
    uint8_t room[192];
    uint64_t records, done;
    size_t count = 0;
    const struct vrep_index *index;

    CHECK_OK(vrep_index_builder_new(1, group, &first, &builder));
    for (uint64_t seq = 1; seq <= 9; seq++)
        add(builder, VREP_KIND_ZEROES, seq, 4096 * seq, 4096);
    vrep_stream_write(&second, 0, room);
    CHECK_OK(vrep_index_builder_add(builder, room, sizeof room, 0, &records));
    vrep_record_init(&record, VREP_KIND_ZEROES, 2, 0);
    record.seq = 4;
    record.offset = 4096 * 2;
    record.length = 512;
    vrep_record_finish(&record);
    CHECK_OK(vrep_index_builder_add(builder, &record, sizeof record, 0, &records));
    index = freeze(builder);
    CHECK_OK(vrep_extent_map_new(&index, 1, chain, 2, &map));
    CHECK_OK(vrep_extent_map_lookup(map, 0, 4096, 4096 * 8, out, 8, &count, &done));
    CHECK_EQ(count, 5); /* 1, 2 of the child, rest of 2, 3, nothing */
    CHECK(out[1].epoch == 2 && out[1].length == 512 && out[2].epoch == 1 && out[2].skip == 512);
    CHECK(out[3].seq == 3 && out[4].kind == 0 && out[4].offset == 4096 * 4);
    CHECK(out[1].stream == 1 && out[0].stream == 0);
    vrep_extent_map_free(map);
    chain[1].epoch = 2;
    CHECK_STATUS(vrep_extent_map_new(&index, 1, chain, 2, &map), VREP_E_INVALID);
    vrep_index_free((struct vrep_index *)(uintptr_t)index);
}

static void damage_is_noticed_where_it_is_read(void)
{
    struct vrep_index_builder *builder = new_builder(1);
    struct vrep_reign reign = {.epoch = 1, .seq_max = UINT64_MAX};
    struct vrep_extent_map *map;
    struct vrep_extent out[4];
    const struct vrep_index *index;
    uint64_t done, next;
    size_t count = 0;

    for (uint64_t seq = 1; seq <= 1000; seq++)
        add(builder, VREP_KIND_WRITE, seq, 4096 * seq, 4096);
    index = freeze(builder);
    CHECK_OK(vrep_extent_map_new(&index, 1, &reign, 1, &map));
    ((struct vrep_index_entry *)(uintptr_t)index->shorts.entries)[500].position ^= 64;
    CHECK_OK(vrep_extent_map_lookup(map, 0, 4096 * 9, 4096, out, 4, &count, &done));
    CHECK_STATUS(vrep_extent_map_lookup(map, 0, 4096 * 500, 4096, out, 4, &count, &done),
                 VREP_E_CORRUPT);
    CHECK_STATUS(vrep_extent_map_next(map, 0, 4096 * 500, &next), VREP_E_CORRUPT);
    ((struct vrep_index_node *)(uintptr_t)index->shorts.nodes[0])[9].end ^= 1 << 20;
    CHECK_STATUS(vrep_extent_map_lookup(map, 0, 4096 * 9, 4096, out, 4, &count, &done),
                 VREP_E_CORRUPT);
    CHECK_STATUS(vrep_extent_map_lookup(map, VREP_DISKS_MAX, 0, 1, out, 4, &count, &done),
                 VREP_E_RANGE);
    vrep_extent_map_free(map);
    vrep_index_free((struct vrep_index *)(uintptr_t)index);
}

/* Every byte of a window from another write: the window must shrink, not overflow. */
static void ranges_of_single_bytes_are_resolved(void)
{
    enum { BYTES = 9000 };
    static struct vrep_extent out[BYTES + 2];
    struct vrep_index_builder *builder = new_builder(1);
    struct vrep_reign reign = {.epoch = 1, .seq_max = UINT64_MAX};
    struct vrep_extent_map *map;
    const struct vrep_index *index;
    uint64_t done;
    size_t count = 0;

    for (uint64_t i = 0; i < BYTES; i++) {
        uint64_t at = i * 7919 % BYTES; /* each once, in a scattered order */
        add(builder, VREP_KIND_ZEROES, i + 1, 1000 + at, 1);
    }
    index = freeze(builder);
    CHECK_OK(vrep_extent_map_new(&index, 1, &reign, 1, &map));
    CHECK_OK(vrep_extent_map_lookup(map, 0, 0, 1 << 20, out, BYTES + 2, &count, &done));
    CHECK_EQ(done, 1 << 20);
    CHECK_EQ(count, BYTES + 2);
    CHECK(out[0].kind == 0 && out[0].length == 1000 && out[BYTES + 1].kind == 0);
    for (size_t i = 1; i <= BYTES; i++) {
        CHECK_EQ(out[i].offset, 999 + i);
        CHECK_EQ((out[i].seq - 1) * 7919 % BYTES, i - 1);
    }
    vrep_extent_map_free(map);
    vrep_index_free((struct vrep_index *)(uintptr_t)index);
}

int main(void)
{
    RUN(random_history_at_random_points);
    RUN(a_fork_hides_what_its_parent_wrote_later);
    RUN(damage_is_noticed_where_it_is_read);
    RUN(ranges_of_single_bytes_are_resolved);
    return check_report();
}
