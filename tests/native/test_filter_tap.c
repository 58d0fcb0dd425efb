/* What the tap promises for each command: order, marks, records, gaps. */
#include "filter_rig.h"

static struct rig rig;

static void first_sync_ends_the_gap(void)
{
    rig_init(&rig);
    rig_open(&rig);
    struct vrep_group_status status = rig_status(&rig);
    CHECK_EQ(status.opened_as, VREP_OPENED_NEW);
    CHECK_EQ(status.gap, 1);
    CHECK_EQ(status.head, 1);
    CHECK_EQ(status.unshipped_bytes, RIG_BYTES);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 100000, 70001, 0x5a));
    rig_sync(&rig);
    CHECK(rig.seen_begin && rig.seen_end);
    CHECK(rig.kinds[VREP_KIND_SYNC_ZEROES] >= 1);
    CHECK(rig.kinds[VREP_KIND_SYNC] >= 1);
    rig_compare(&rig);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, 0);
    rig_free(&rig);
}

static void changes_arrive_in_order(void)
{
    rig_init(&rig);
    rig_open(&rig);
    rig_sync(&rig);
    check_seed(7);
    for (int i = 0; i < 400; i++) {
        uint64_t length = 1 + check_random_below(100000);
        uint64_t offset = check_random_below(RIG_BYTES - length);
        uint64_t dice = check_random_below(10);
        uint8_t op = dice < 7 ? VREP_OP_WRITE : dice < 9 ? VREP_OP_ZERO : VREP_OP_DISCARD;
        CHECK_OK(rig_run(&rig, op, i % 5 == 0 ? VREP_COMMAND_FUA : 0, offset, length, i));
        if (i % 7 == 0)
            rig_apply(&rig, true);
        if (i % 50 == 0) {
            rig_check_dirty(&rig);
            CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
        }
    }
    rig_settle(&rig);
    rig_compare(&rig);
    CHECK_EQ(rig_status(&rig).unrecorded, 0);
    for (int i = 0; i < 300 && vrep_group_dirty_bytes(rig.group) > 0; i++) {
        usleep(1000);
        vrep_group_poll(rig.group);
    }
    CHECK_EQ(vrep_group_dirty_bytes(rig.group), 0);
    rig_free(&rig);
}

static void overlapping_commands_take_turns(void)
{
    rig_init(&rig);
    rig_open(&rig);
    rig_sync(&rig);
    enum { N = 60 };
    struct vrep_command *commands[N];
    static bool done[N];
    for (int round = 0; round < 20; round++) {
        for (int i = 0; i < N; i++)
            commands[i] = rig_prepare(&rig, i % 7 == 3 ? VREP_OP_ZERO : VREP_OP_WRITE, 0,
                                      (uint64_t)i * 3000, 300000, round * N + i, &done[i]);
        for (int i = 0; i < N; i++)
            vrep_command_submit(commands[i]);
        for (int i = 0; i < N; i++) {
            rig_wait(&rig, &done[i]);
            CHECK_OK(commands[i]->status);
            vrep_command_put(commands[i]);
        }
        rig_apply(&rig, true);
    }
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static void full_ring_never_stalls_the_guest(void)
{
    rig_init(&rig);
    rig_open(&rig);
    rig_sync(&rig);
    rig.seen_begin = rig.seen_end = false;
    for (int i = 0; i < 500; i++)
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, (uint64_t)(i % 60) * 65536 + 17, 65000, i));
    struct vrep_group_status status = rig_status(&rig);
    CHECK(status.unrecorded > 300);
    CHECK_EQ(status.gap, 1);
    CHECK_EQ(status.gaps, 1);
    CHECK(status.unshipped_bytes > 0);
    rig_check_dirty(&rig);
    rig_settle(&rig);
    CHECK(rig.seen_begin && rig.seen_end);
    rig_compare(&rig);
    uint64_t seq;
    CHECK_OK(vrep_group_mark(rig.group, "after", 5, &seq));
    CHECK_EQ(seq, rig_status(&rig).head);
    rig_free(&rig);
}

static void bounds_are_checked(void)
{
    rig_init(&rig);
    rig_open(&rig);
    struct vrep_command *command = vrep_command_get(rig.group);
    command->op = VREP_OP_WRITE;
    command->disk = 0;
    command->offset = RIG_BYTES - 10;
    command->length = 11;
    CHECK_STATUS(vrep_command_prepare(command), VREP_E_RANGE);
    command->offset = UINT64_MAX - 3;
    CHECK_STATUS(vrep_command_prepare(command), VREP_E_RANGE);
    command->disk = 1;
    CHECK_STATUS(vrep_command_prepare(command), VREP_E_INVALID);
    command->disk = 0;
    command->op = 77;
    CHECK_STATUS(vrep_command_prepare(command), VREP_E_UNSUPPORTED);
    command->op = VREP_OP_READ;
    command->offset = 0;
    command->length = 0;
    CHECK_STATUS(vrep_command_prepare(command), VREP_E_INVALID);
    command->flags = 0x80;
    CHECK_STATUS(vrep_command_prepare(command), VREP_E_INVALID);
    vrep_command_put(command);
    rig_free(&rig);
}

static void marks_have_a_place_in_the_order(void)
{
    rig_init(&rig);
    rig_open(&rig);
    uint64_t seq;
    CHECK_STATUS(vrep_group_mark(rig.group, "x", 1, &seq), VREP_E_GONE);
    rig_sync(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 4096, 1));
    CHECK_OK(vrep_group_mark(rig.group, "label", 5, &seq));
    CHECK_EQ(seq, rig_status(&rig).head);
    struct vrep_ring_desc desc;
    CHECK_OK(vrep_ring_reader_desc(rig.reader, seq, &desc));
    CHECK_EQ(desc.kind, VREP_KIND_MARK);
    CHECK_EQ(desc.length, sizeof(struct vrep_mark) + 5);
    struct iovec iov[4];
    int count;
    CHECK_OK(vrep_ring_reader_iov(rig.reader, &desc, iov, 4, &count));
    CHECK_MEM((const char *)iov[0].iov_base + sizeof(struct vrep_mark), "label", 5);
    rig_free(&rig);
}

/* A large write has reached the disk but is not seen yet; a small one that overlaps it comes. */
static void small_write_does_not_overtake_a_large_one(void)
{
    rig_init(&rig);
    rig_open(&rig);
    rig_sync(&rig);
    for (int i = 0; i < 20; i++) {
        bool large_done, small_done;
        struct vrep_command *large =
            rig_prepare(&rig, VREP_OP_WRITE, 0, 0, 500000, 2 * i, &large_done);
        struct vrep_command *small =
            rig_prepare(&rig, VREP_OP_WRITE, 0, 100000, 512, 2 * i + 1, &small_done);
        vrep_command_submit(large);
        usleep(3000);
        vrep_command_submit(small);
        rig_wait(&rig, &large_done);
        rig_wait(&rig, &small_done);
        vrep_command_put(large);
        vrep_command_put(small);
        rig_apply(&rig, true);
        rig_compare(&rig);
        CHECK_EQ(rig.shadow[100000], 2 * i + 1);
    }
    rig_free(&rig);
}

static void copies_hold_their_range(void)
{
    check_seed(3);
    for (int round = 0; round < 4; round++) {
        rig_init(&rig);
        rig_preset(&rig, 0x33);
        rig_open(&rig);
        rig_attach(&rig);
        CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
        for (int i = 0; i < 60; i++) {
            vrep_group_poll(rig.group);
            usleep(500); /* copies were read, and are not published yet */
            CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, check_random_below(RIG_BYTES / 4096) * 4096,
                             4096, i));
            rig_apply(&rig, true);
        }
        rig_settle(&rig);
        rig_compare(&rig);
        rig_free(&rig);
    }
}

/* A guest that fills the ring faster than the target empties it: copies get their share. */
static void resync_ends_under_load(void)
{
    rig_init(&rig);
    rig_preset(&rig, 0x33);
    rig.config.ring_bytes = 2u << 20;
    rig_open(&rig);
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    bool ended = false;
    time_t until = time(NULL) + 20;
    for (int i = 0; time(NULL) < until && !ended; i++) {
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, (uint64_t)(i % 8) * 4096, 4096, i));
        if (i % 40 != 0)
            continue;
        rig_apply(&rig, false);
        rig.reported += rig.reported + 20 < rig.applied ? 20 : rig.applied - rig.reported;
        usleep(500);
        vrep_group_poll(rig.group);
        ended = rig_status(&rig).gap == 0;
    }
    CHECK(ended);
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static uint64_t head_before;
static bool acknowledged;

static void check_published(struct vrep_command *command)
{
    struct vrep_group_status status;
    CHECK_OK(vrep_group_status(command->group, &status));
    CHECK_OK(command->status);
    CHECK_EQ(status.head, head_before + 1);
    static uint8_t on_disk[5000];
    int fd = open(rig.disk, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, on_disk, sizeof on_disk, 777) == (ssize_t)sizeof on_disk);
    close(fd);
    CHECK_EQ(on_disk[0], 0x42);
    CHECK_EQ(on_disk[4999], 0x42);
    acknowledged = true;
}

static void acknowledged_means_written_and_published(void)
{
    rig_init(&rig);
    rig_open(&rig);
    rig_sync(&rig);
    bool unused;
    for (int fua = 0; fua < 2; fua++) {
        struct vrep_command *command =
            rig_prepare(&rig, VREP_OP_WRITE, fua ? VREP_COMMAND_FUA : 0, 777, 5000, 0x42, &unused);
        command->done = check_published;
        head_before = rig_status(&rig).head;
        acknowledged = false;
        vrep_command_submit(command);
        rig_wait(&rig, &acknowledged);
        vrep_command_put(command);
    }
    rig_free(&rig);
}

static void copies_are_dirty_until_durable(void)
{
    rig_init(&rig);
    rig_preset(&rig, 0x33);
    rig_open(&rig);
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    time_t until = time(NULL) + 60;
    while (rig_status(&rig).gap && time(NULL) < until) {
        vrep_group_poll(rig.group);
        usleep(500);
    }
    CHECK_EQ(rig_status(&rig).gap, 0); /* published, and nothing of it durable */
    CHECK_EQ(rig_check_dirty(&rig), RIG_BYTES / RIG_BIT);
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static void copies_leave_half_of_the_ring(void)
{
    rig_init(&rig);
    rig.config.ring_bytes = 4u << 20;
    rig_open(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, RIG_BYTES, 0x33)); /* found no room, or all of it */
    rig_attach(&rig);
    rig_apply(&rig, true);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, true));
    struct vrep_group_status status = rig_status(&rig);
    time_t until = time(NULL) + 60; /* for the threads that look for data, and read them */
    for (int i = 0; i < 400 || (status.resync_bytes < 1u << 20 && time(NULL) < until); i++) {
        vrep_group_poll(rig.group);
        usleep(500);
        status = rig_status(&rig);
    }
    CHECK(status.resync_bytes >= 1u << 20);
    CHECK(status.ring_free_bytes >= (2u << 20) - (256u << 10));
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

/* Its bytes stand in the order, whatever chunks they got; in a gap as well. */
static void an_object_is_a_record(void)
{
    static uint8_t data[700001], back[sizeof data];
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)check_random_below(256);
    rig_init(&rig);
    rig_open(&rig);
    uint64_t seq = 0;
    CHECK_STATUS(vrep_group_object(rig.group, 7, data, 16, &seq), VREP_E_INVALID);
    CHECK_STATUS(vrep_group_object(rig.group, 7, data, VREP_OBJECT_BYTES_MAX + 1, &seq),
                 VREP_E_INVALID);
    CHECK_EQ(rig_status(&rig).gap, 1);
    for (int i = 0; i < 5; i++) /* holes among the chunks */
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, (uint64_t)i * 9000, 5000, i));
    CHECK_OK(vrep_group_object(rig.group, 7, data, sizeof data, &seq));
    CHECK_EQ(seq, rig_status(&rig).head);
    rig_attach(&rig);
    struct vrep_ring_desc desc;
    static struct iovec iov[8200];
    int count;
    CHECK_OK(vrep_ring_reader_desc(rig.reader, seq, &desc));
    CHECK_EQ(desc.kind, VREP_KIND_OBJECT);
    CHECK_EQ(desc.offset, 7);
    CHECK_EQ(desc.length, sizeof data);
    CHECK_OK(vrep_ring_reader_iov(rig.reader, &desc, iov, 8200, &count));
    size_t at = 0;
    for (int i = 0; i < count; at += iov[i++].iov_len)
        memcpy(back + at, iov[i].iov_base, iov[i].iov_len);
    CHECK_EQ(at, sizeof data);
    CHECK_MEM(back, data, sizeof data);
    int status = VREP_OK; /* never the last half of the ring: it is the guest's */
    for (int i = 0; i < 20 && status == VREP_OK; i++)
        status = vrep_group_object(rig.group, 7, data, sizeof data, &seq);
    CHECK_EQ(status, VREP_E_FULL);
    CHECK(rig_status(&rig).ring_free_bytes > rig_status(&rig).ring_bytes / 4);
    rig_sync(&rig);
    rig_free(&rig);
}

int main(void)
{
    RUN(an_object_is_a_record);
    RUN(first_sync_ends_the_gap);
    RUN(changes_arrive_in_order);
    RUN(overlapping_commands_take_turns);
    RUN(full_ring_never_stalls_the_guest);
    RUN(bounds_are_checked);
    RUN(marks_have_a_place_in_the_order);
    RUN(acknowledged_means_written_and_published);
    RUN(copies_are_dirty_until_durable);
    RUN(copies_leave_half_of_the_ring);
    RUN(small_write_does_not_overtake_a_large_one);
    RUN(copies_hold_their_range);
    RUN(resync_ends_under_load);
    return check_report();
}
