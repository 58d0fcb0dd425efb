#include "map/changes.h"

#include "check.h"
#include "format/record.h"

enum { BLOCK = VREP_CHANGES_BLOCK_BYTES, ROOM = 64 };

static const uint8_t group[16] = {7};

static struct vrep_index_builder *new_builder(uint32_t epoch)
{
    struct vrep_index_stream stream = {.epoch = epoch};
    struct vrep_index_builder *builder;

    CHECK_OK(vrep_index_builder_new(epoch, group, &stream, &builder));
    return builder;
}

static void zeroes(struct vrep_index_builder *builder, uint32_t epoch, uint64_t seq,
                   uint64_t offset, uint32_t length)
{
    struct vrep_record record;
    uint64_t records;

    vrep_record_init(&record, VREP_KIND_ZEROES, epoch, 0);
    record.seq = seq;
    record.offset = offset;
    record.length = length;
    vrep_record_finish(&record);
    CHECK_OK(vrep_index_builder_add(builder, &record, sizeof record, 128 + 64 * seq, &records));
}

static const struct vrep_index *freeze(struct vrep_index_builder *builder)
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

static void let_go(const struct vrep_index *index)
{
    vrep_index_free((struct vrep_index *)(uintptr_t)index);
}

/* Epoch 1 writes blocks 0 to 99, seq 1 to 100; epoch 2 leaves it at 40 and writes blocks 200 on. */
static size_t make(const struct vrep_index *indexes[2])
{
    struct vrep_index_builder *first = new_builder(1), *second = new_builder(2);

    for (uint64_t i = 0; i < 100; i++) {
        zeroes(first, 1, i + 1, i * BLOCK, BLOCK);
        zeroes(second, 2, 41 + i, (200 + i) * BLOCK + 1, 1);
    }
    indexes[0] = freeze(first);
    indexes[1] = freeze(second);
    return 2;
}

static void both_ends_are_exact(void)
{
    const struct vrep_index *indexes[2];
    size_t count = 0, made = make(indexes);
    struct vrep_reign since = {.epoch = 1, .seq_max = 10}, at = {.epoch = 1, .seq_max = 12};
    struct vrep_changed out[ROOM];
    struct vrep_changes *changes;
    uint64_t done;

    CHECK_OK(vrep_changes_new(indexes, made, &since, 1, &at, 1, &changes));
    CHECK_OK(vrep_changes_list(changes, 0, 0, 1 << 30, out, ROOM, &count, &done));
    CHECK_EQ(done, 1 << 30);
    CHECK_EQ(count, 1);
    CHECK_EQ(out[0].offset, 10 * BLOCK); /* seq 11 is the first after the point, 12 the last */
    CHECK_EQ(out[0].length, 2 * BLOCK);
    vrep_changes_free(changes);
    let_go(indexes[0]);
    let_go(indexes[1]);
}

static void lines_that_parted_count_on_both_sides(void)
{
    const struct vrep_index *indexes[2];
    size_t count = 0, made = make(indexes);
    struct vrep_reign since = {.epoch = 1, .seq_max = 50};
    struct vrep_reign at[2] = {{.epoch = 2, .seq_max = 42}, {.epoch = 1, .seq_max = 40}};
    struct vrep_changed out[ROOM];
    struct vrep_changes *changes;
    uint64_t done;

    for (int turn = 0; turn < 2; turn++) { /* whichever is the later one */
        CHECK_OK(turn == 0 ? vrep_changes_new(indexes, made, &since, 1, at, 2, &changes)
                           : vrep_changes_new(indexes, made, at, 2, &since, 1, &changes));
        count = 0;
        CHECK_OK(vrep_changes_list(changes, 0, 0, 1 << 30, out, ROOM, &count, &done));
        CHECK_EQ(count, 2);
        CHECK_EQ(out[0].offset, 40 * BLOCK);
        CHECK_EQ(out[0].length, 10 * BLOCK);
        CHECK_EQ(out[1].offset, 200 * BLOCK); /* one byte of a block is the block */
        CHECK_EQ(out[1].length, 2 * BLOCK);
        vrep_changes_free(changes);
    }
    let_go(indexes[0]);
    let_go(indexes[1]);
}

static void a_list_without_room_goes_on_where_it_ended(void)
{
    struct vrep_index_builder *builder = new_builder(1);
    struct vrep_reign at = {.epoch = 1, .seq_max = UINT64_MAX};
    const uint64_t step = UINT64_C(400) << 20; /* more than one window */
    const struct vrep_index *index;
    struct vrep_changed out[10];
    struct vrep_changes *changes;
    uint64_t from = 100, found = 0, done;

    for (uint64_t i = 0; i < 30; i++)
        zeroes(builder, 1, i + 1, i * step, BLOCK);
    index = freeze(builder);
    CHECK_OK(vrep_changes_new(&index, 1, NULL, 0, &at, 1, &changes));
    while (from < 30 * step) {
        size_t count = 0;
        CHECK_OK(vrep_changes_list(changes, 0, from, 30 * step - from, out, 7, &count, &done));
        CHECK(done > 0);
        for (size_t i = 0; i < count; i++, found++) {
            CHECK_EQ(out[i].offset, found == 0 ? 100 : found * step);
            CHECK_EQ(out[i].offset + out[i].length, found * step + BLOCK);
        }
        from += done;
    }
    CHECK_EQ(found, 30);
    vrep_changes_free(changes);
    let_go(index);
}

static void what_is_wrong_is_refused(void)
{
    struct vrep_reign twice[2] = {{.epoch = 1, .seq_max = 5}, {.epoch = 1, .seq_max = 6}};
    struct vrep_changed out[1];
    struct vrep_changes *changes;
    size_t count = 0;
    uint64_t done;

    CHECK_EQ(vrep_changes_new(NULL, 0, twice, 2, twice, 1, &changes), VREP_E_INVALID);
    CHECK_EQ(vrep_changes_new(NULL, 0, twice, 1, twice, 2, &changes), VREP_E_INVALID);
    CHECK_OK(vrep_changes_new(NULL, 0, twice, 1, twice + 1, 1, &changes));
    CHECK_EQ(vrep_changes_list(changes, VREP_DISKS_MAX, 0, 1, out, 1, &count, &done), VREP_E_RANGE);
    CHECK_EQ(vrep_changes_list(changes, 0, 1, INT64_MAX, out, 1, &count, &done), VREP_E_RANGE);
    CHECK_OK(vrep_changes_list(changes, 0, 0, INT64_MAX, out, 1, &count, &done));
    CHECK_EQ(count, 0);
    CHECK_EQ(done, INT64_MAX);
    vrep_changes_free(changes);
    vrep_changes_free(NULL);
}

int main(void)
{
    RUN(both_ends_are_exact);
    RUN(lines_that_parted_count_on_both_sides);
    RUN(a_list_without_room_goes_on_where_it_ended);
    RUN(what_is_wrong_is_refused);
    return check_report();
}
