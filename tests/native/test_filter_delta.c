/* A resync that asks the target what it holds: the test takes the windows and answers for it. */
#include "filter/delta.h"

#include "filter_rig.h"
#include "track/hash.h"

#define UNIT VREP_HASH_BLOCK_BYTES
#define UNITS (RIG_BYTES / UNIT)
#define WINDOWS 64u

static const uint8_t secrets[1][VREP_HASH_SECRET_BYTES] = {{7}};
static struct rig rig;
static struct vrep_delta_window windows[WINDOWS];
static uint32_t taken;

/* The target holds what the disk does, and all of it is to be compared. */
static void begin(void)
{
    rig_init(&rig);
    rig_preset(&rig, 3);
    rig_open(&rig);
    rig_sync(&rig);
    rig_compare(&rig);
}

static void compare_all(void)
{
    struct vrep_since_range all = {0, RIG_BYTES};
    CHECK_OK(vrep_group_compare(rig.group, 0, &all, 1));
    CHECK_OK(vrep_group_delta_begin(rig.group, secrets, 1));
    CHECK_EQ(rig_status(&rig).gap, 1);
}

/* Takes what is offered; the seq that the target must have reached. */
static uint64_t take(void)
{
    uint64_t at_least;
    uint32_t count;
    vrep_group_poll(rig.group);
    CHECK_OK(vrep_group_delta_take(rig.group, windows + taken, WINDOWS - taken, &count, &at_least));
    taken += count;
    return at_least;
}

static uint64_t bytes_taken(uint64_t from, uint64_t to)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < taken; i++) {
        uint64_t start = windows[i].offset > from ? windows[i].offset : from;
        uint64_t end = windows[i].offset + windows[i].length;
        end = end < to ? end : to;
        bytes += end > start ? end - start : 0;
    }
    return bytes;
}

/* Until so many bytes are asked for: where data are is found out by another thread. */
static uint64_t take_all(uint64_t bytes)
{
    uint64_t at_least = take();
    for (int i = 0; bytes_taken(0, RIG_BYTES) < bytes && i < 20000; i++) {
        usleep(1000);
        at_least = take();
    }
    CHECK_EQ(bytes_taken(0, RIG_BYTES), bytes);
    return at_least;
}

/* It holds what was there at the beginning. */
static void answer(void)
{
    static uint8_t keys[UNITS], block[UNIT];
    static struct vrep_delta_hash hashes[UNITS];
    uint64_t hash[2];
    memset(block, 3, sizeof block);
    vrep_hash_one128(block, UNIT, secrets[0], VREP_HASH_SECRET_BYTES, hash);
    for (uint32_t i = 0; i < UNITS; i++) {
        keys[i] = 1;
        hashes[i] = (struct vrep_delta_hash){hash[0], hash[1]};
    }
    for (uint32_t i = 0; i < taken; i++)
        CHECK_OK(vrep_group_delta_answer(rig.group, windows[i].id, keys, hashes,
                                         (uint32_t)(windows[i].length / UNIT)));
    taken = 0;
}

static void settle(void)
{
    for (int i = 0; rig_status(&rig).gap && i < 20000; i++) {
        (void)take();
        answer();
        rig_apply(&rig, true);
        usleep(1000);
    }
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static void what_equals_is_not_sent(void)
{
    begin();
    uint32_t copies = rig.kinds[VREP_KIND_SYNC];
    compare_all();
    rig_apply(&rig, true);
    (void)take_all(RIG_BYTES);
    answer();
    settle();
    CHECK_EQ(rig.kinds[VREP_KIND_SYNC], copies);
}

static void what_was_written_since_is_sent_whatever_was_answered(void)
{
    begin();
    uint32_t copies = rig.kinds[VREP_KIND_SYNC];
    compare_all();
    rig_apply(&rig, true);
    (void)take_all(RIG_BYTES);
    /* With the same bytes: no look at the disk tells that a record of them is on its way. */
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 5 * RIG_BIT + UNIT, UNIT, 3));
    answer();
    settle();
    CHECK_EQ(rig.kinds[VREP_KIND_SYNC], copies + 1);
}

static void the_target_has_the_beginning_of_the_gap_before_it_is_asked(void)
{
    begin();
    compare_all();
    uint64_t gap = rig_status(&rig).gap_seq;
    CHECK(gap > rig_status(&rig).durable);
    CHECK_EQ(take(), gap);
    rig_apply(&rig, true);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, UNIT, 4));
    rig_apply(&rig, true);
    uint64_t at_least = take();
    CHECK_EQ(at_least, rig_status(&rig).durable);
    CHECK(at_least > gap);
    answer();
    settle();
}

static void what_has_a_record_under_way_is_not_asked_for(void)
{
    begin();
    rig_close(&rig, true); /* the marks of the first sync go */
    rig_open(&rig);
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, false, 0, false));
    compare_all();
    rig_apply(&rig, true);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 9 * RIG_BIT, UNIT, 4)); /* of the gap */
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    (void)take_all(RIG_BYTES - RIG_BIT);
    CHECK_EQ(bytes_taken(9 * RIG_BIT, 10 * RIG_BIT), 0);
    rig_apply(&rig, true); /* it is durable now */
    answer();
    uint64_t bytes = 0;
    for (int i = 0; rig_status(&rig).gap && i < 20000; i++) {
        (void)take();
        bytes += bytes_taken(9 * RIG_BIT, 10 * RIG_BIT);
        answer();
        rig_apply(&rig, true);
        usleep(1000);
    }
    CHECK_EQ(bytes, RIG_BIT);
    settle();
}

int main(void)
{
    RUN(what_equals_is_not_sent);
    RUN(what_was_written_since_is_sent_whatever_was_answered);
    RUN(the_target_has_the_beginning_of_the_gap_before_it_is_asked);
    RUN(what_has_a_record_under_way_is_not_asked_for);
    return check_report();
}
