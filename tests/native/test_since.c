#include "track/since.h"

#include "check.h"

enum { BLOCK = VREP_SINCE_BLOCK_BYTES };

static void check_run(const struct vrep_since *since, uint64_t offset, uint64_t length, bool marked)
{
    uint64_t found;
    bool is;

    CHECK(vrep_since_next_run(since, offset, &found, &is));
    CHECK_EQ(found, length);
    CHECK_EQ(is, marked);
}

static void marks_cover_whole_blocks_and_end_with_the_disk(void)
{
    const uint64_t bytes = 1000 * BLOCK + 512;
    struct vrep_since *since;
    uint64_t length;
    bool marked;

    CHECK_OK(vrep_since_create(bytes, &since));
    check_run(since, 0, bytes, false);
    vrep_since_mark(since, 5 * BLOCK - 1, 2); /* two blocks of one byte each */
    check_run(since, 0, 4 * BLOCK, false);
    check_run(since, 4 * BLOCK, 2 * BLOCK, true);
    check_run(since, 4 * BLOCK + 100, 2 * BLOCK - 100, true);
    check_run(since, 6 * BLOCK, bytes - 6 * BLOCK, false);
    vrep_since_mark(since, 0, 0);
    check_run(since, 0, 4 * BLOCK, false);
    vrep_since_mark(since, bytes - 1, UINT64_MAX); /* what lies past the disk is left out */
    check_run(since, 1000 * BLOCK, 512, true);
    vrep_since_mark(since, bytes, 1);
    CHECK(!vrep_since_next_run(since, bytes, &length, &marked));
    vrep_since_mark(since, 0, bytes);
    check_run(since, 0, bytes, true);
    vrep_since_destroy(since);
    vrep_since_destroy(NULL);
}

static void random_marks_are_those_of_a_plain_array(void)
{
    enum { BLOCKS = 3000 };
    static bool wanted[BLOCKS];
    struct vrep_since *since;

    CHECK_OK(vrep_since_create((uint64_t)BLOCKS * BLOCK, &since));
    for (int turn = 0; turn < 200; turn++) {
        uint64_t first = check_random() % BLOCKS, count = 1 + check_random() % 20;
        uint64_t at = 0;

        if (count > BLOCKS - first)
            count = BLOCKS - first;
        vrep_since_mark(since, first * BLOCK, count * BLOCK);
        for (uint64_t i = first; i < first + count; i++)
            wanted[i] = true;
        while (at < BLOCKS) {
            uint64_t length;
            bool marked;
            CHECK(vrep_since_next_run(since, at * BLOCK, &length, &marked));
            CHECK(length > 0 && length % BLOCK == 0);
            for (uint64_t i = 0; i < length / BLOCK; i++)
                CHECK_EQ(wanted[at + i], marked);
            at += length / BLOCK;
        }
        CHECK_EQ(at, BLOCKS);
    }
    vrep_since_destroy(since);
}

int main(void)
{
    RUN(marks_cover_whole_blocks_and_end_with_the_disk);
    RUN(random_marks_are_those_of_a_plain_array);
    return check_report();
}
