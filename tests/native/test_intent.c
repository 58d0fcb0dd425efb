#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "format/checksum.h"
#include "track/intent.h"

#define EXTENT ((uint64_t)VREP_INTENT_BYTES)

static char path[64];
static const uint8_t group[16] = {7};
static const uint64_t sizes[2] = {EXTENT * 10 + 512, EXTENT * 200};

static struct vrep_intent *new_intent(void)
{
    struct vrep_intent *intent;
    CHECK_OK(vrep_intent_create(path, group, sizes, 2, &intent));
    return intent;
}

static struct vrep_intent *opened(void)
{
    struct vrep_intent *intent;
    CHECK_OK(vrep_intent_open(path, group, sizes, 2, &intent));
    return intent;
}

static void sync_now(struct vrep_intent *intent)
{
    vrep_intent_prepare(intent);
    int status = vrep_intent_write(intent);
    CHECK_OK(status);
    vrep_intent_commit(intent, status);
}

/* What a power loss would leave. */
static bool on_disk(uint16_t disk, uint64_t extent)
{
    struct vrep_intent *intent = opened();
    uint64_t offset, length;
    bool found = vrep_intent_next(intent, disk, extent * EXTENT, &offset, &length) &&
                 offset == extent * EXTENT;
    vrep_intent_close(intent);
    return found;
}

static void a_cold_write_waits_for_one_sync(void)
{
    struct vrep_intent *intent = new_intent();
    CHECK(!vrep_intent_wants_sync(intent));
    CHECK(!vrep_intent_begin(intent, 0, 0, 512));
    CHECK(!vrep_intent_begin(intent, 1, EXTENT * 3 - 1, 2));
    CHECK(vrep_intent_wants_sync(intent));
    CHECK(!on_disk(0, 0));
    sync_now(intent);
    CHECK(!vrep_intent_wants_sync(intent));
    CHECK(on_disk(0, 0) && on_disk(1, 2) && on_disk(1, 3) && !on_disk(1, 4));
    CHECK(vrep_intent_begin(intent, 0, 0, 512));
    CHECK(vrep_intent_begin(intent, 1, EXTENT * 3 - 1, 2));
    CHECK(!vrep_intent_begin(intent, 1, EXTENT * 4 - 1, 2));
    CHECK_EQ(vrep_intent_hot_extents(intent), 4);
    CHECK(vrep_intent_begin(intent, 5, 0, 1) && vrep_intent_begin(intent, 0, sizes[0], 1));
    uint64_t offset, length;
    CHECK(vrep_intent_next(intent, 1, 0, &offset, &length));
    CHECK_EQ(offset, EXTENT * 2);
    CHECK_EQ(length, EXTENT * 2);
    CHECK(!vrep_intent_next(intent, 1, offset + length, &offset, &length));
    vrep_intent_close(intent);
}

static void the_last_extent_may_be_short(void)
{
    struct vrep_intent *intent = new_intent();
    CHECK(!vrep_intent_begin(intent, 0, EXTENT * 10, UINT64_MAX));
    sync_now(intent);
    uint64_t offset, length;
    CHECK(vrep_intent_next(intent, 0, 0, &offset, &length));
    CHECK_EQ(offset, EXTENT * 10);
    CHECK_EQ(length, 512);
    vrep_intent_close(intent);
}

static void an_extent_cools_only_after_flush_and_checkpoint(void)
{
    struct vrep_intent *intent = new_intent();
    CHECK(!vrep_intent_begin(intent, 0, 0, 1));
    CHECK(!vrep_intent_begin(intent, 0, EXTENT, 1));
    CHECK(!vrep_intent_begin(intent, 0, EXTENT * 2, 1));
    sync_now(intent);
    CHECK(vrep_intent_begin(intent, 0, 0, 1)); /* stays in flight */
    CHECK(vrep_intent_begin(intent, 0, EXTENT, 1));
    vrep_intent_end(intent, 0, EXTENT, 1);
    vrep_intent_cool_begin(intent);
    vrep_intent_cool_end(intent, false); /* the flush failed */
    CHECK(!vrep_intent_wants_sync(intent));
    CHECK_EQ(vrep_intent_hot_extents(intent), 3);
    vrep_intent_cool_begin(intent);
    CHECK(vrep_intent_begin(intent, 0, EXTENT, 1)); /* written since */
    vrep_intent_end(intent, 0, EXTENT, 1);
    vrep_intent_cool_end(intent, true);
    CHECK(vrep_intent_wants_sync(intent));
    CHECK_EQ(vrep_intent_hot_extents(intent), 2);
    CHECK(on_disk(0, 2)); /* not yet */
    sync_now(intent);
    CHECK(on_disk(0, 0) && on_disk(0, 1) && !on_disk(0, 2));
    vrep_intent_end(intent, 0, 0, 1);
    vrep_intent_cool_begin(intent);
    vrep_intent_cool_end(intent, true);
    sync_now(intent);
    CHECK_EQ(vrep_intent_hot_extents(intent), 0);
    CHECK(!on_disk(0, 0) && !on_disk(0, 1));
    vrep_intent_close(intent);
}

static void a_write_never_starts_into_what_a_running_sync_forgets(void)
{
    struct vrep_intent *intent = new_intent();
    CHECK(!vrep_intent_begin(intent, 0, 0, 1));
    sync_now(intent);
    vrep_intent_cool_begin(intent);
    vrep_intent_cool_end(intent, true);
    vrep_intent_prepare(intent); /* without the extent */
    CHECK(!vrep_intent_begin(intent, 0, 0, 1));
    CHECK(!vrep_intent_wants_sync(intent)); /* one at a time */
    CHECK_OK(vrep_intent_write(intent));
    vrep_intent_commit(intent, VREP_OK);
    CHECK(!on_disk(0, 0));
    CHECK(!vrep_intent_begin(intent, 0, 0, 1));
    CHECK(vrep_intent_wants_sync(intent));
    sync_now(intent);
    CHECK(vrep_intent_begin(intent, 0, 0, 1));
    vrep_intent_close(intent);
}

static void a_failed_sync_leaves_only_what_both_slots_hold(void)
{
    struct vrep_intent *intent = new_intent();
    CHECK(!vrep_intent_begin(intent, 0, 0, 1));
    CHECK(!vrep_intent_begin(intent, 0, EXTENT, 1));
    sync_now(intent);
    CHECK(vrep_intent_begin(intent, 0, EXTENT, 1));
    vrep_intent_cool_begin(intent);
    vrep_intent_cool_end(intent, true); /* extent 0 leaves */
    vrep_intent_prepare(intent);
    vrep_intent_commit(intent, VREP_E_IO);
    CHECK(vrep_intent_wants_sync(intent));
    CHECK(!vrep_intent_begin(intent, 0, 0, 1));
    CHECK(vrep_intent_begin(intent, 0, EXTENT, 1));
    sync_now(intent);
    CHECK(vrep_intent_begin(intent, 0, 0, 1));
    vrep_intent_close(intent);
}

static void damage(off_t at, uint8_t value)
{
    int fd = open(path, O_RDWR);
    CHECK_EQ(pwrite(fd, &value, 1, at), 1);
    close(fd);
}

static void a_torn_slot_falls_back_to_the_other(void)
{
    struct vrep_intent *intent = new_intent();
    CHECK(!vrep_intent_begin(intent, 0, 0, 1));
    sync_now(intent); /* slot 0: create wrote both */
    CHECK(!vrep_intent_begin(intent, 0, EXTENT, 1));
    sync_now(intent); /* slot 1 */
    vrep_intent_close(intent);
    CHECK(on_disk(0, 0) && on_disk(0, 1));
    damage(4096 + 128, 0xff);
    CHECK(on_disk(0, 0) && !on_disk(0, 1));
    intent = opened();
    CHECK(vrep_intent_begin(intent, 0, 0, 1));
    CHECK(!vrep_intent_begin(intent, 0, EXTENT, 1));
    sync_now(intent); /* over the torn one */
    vrep_intent_close(intent);
    CHECK(on_disk(0, 0) && on_disk(0, 1));
    damage(8, 0xff);
    CHECK(on_disk(0, 0) && on_disk(0, 1));
    damage(4096, 0xff);
    CHECK_STATUS(vrep_intent_open(path, group, sizes, 2, &intent), VREP_E_CORRUPT);
}

static void damaged_files_are_refused(void)
{
    struct vrep_intent *intent = new_intent();
    vrep_intent_close(intent);
    CHECK_STATUS(vrep_intent_open(path, (const uint8_t[16]){1}, sizes, 2, &intent), VREP_E_INVALID);
    CHECK_STATUS(vrep_intent_open(path, group, sizes, 1, &intent), VREP_E_INVALID);
    CHECK_STATUS(vrep_intent_open(path, group, sizes, 0, &intent), VREP_E_INVALID);
    for (off_t size = 8191; size > 0; size = size * 2 / 3) {
        CHECK_EQ(truncate(path, size), 0);
        int status = vrep_intent_open(path, group, sizes, 2, &intent);
        if (size >= 168) {
            /* slot 0 is whole */
            CHECK_OK(status);
            vrep_intent_close(intent);
        } else {
            CHECK_STATUS(status, VREP_E_CORRUPT);
        }
    }
    unlink(path);
    CHECK_STATUS(vrep_intent_open(path, group, sizes, 2, &intent), VREP_E_NOT_FOUND);
    CHECK_EQ(mkdir(path, 0700), 0);
    CHECK(vrep_intent_open(path, group, sizes, 2, &intent) != VREP_OK);
    CHECK_EQ(rmdir(path), 0);
}

int main(void)
{
    (void)snprintf(path, sizeof path, "/dev/shm/vrep-test-intent-%d", (int)getpid());
    RUN(a_cold_write_waits_for_one_sync);
    RUN(the_last_extent_may_be_short);
    RUN(an_extent_cools_only_after_flush_and_checkpoint);
    RUN(a_write_never_starts_into_what_a_running_sync_forgets);
    RUN(a_failed_sync_leaves_only_what_both_slots_hold);
    RUN(a_torn_slot_falls_back_to_the_other);
    RUN(damaged_files_are_refused);
    unlink(path);
    return check_report();
}
