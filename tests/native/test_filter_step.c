/* A stepped group: nothing happens by itself, completions come in the order that the driver takes,
 * and what was not stepped before a kill never happened. */
#include <errno.h>

#include "check.h"
#include "filter_rig.h"

static struct rig rig;

static void stepped(void)
{
    rig_init(&rig);
    rig.config.flags |= VREP_GROUP_STEPPED;
    rig.config.mono_ns = 1;
    rig.config.wall_ns = 1000;
    rig_open(&rig);
}

static uint32_t waiting(enum vrep_step_kind kind)
{
    struct vrep_group_step step;
    uint32_t count = 0;
    for (uint32_t i = 0; vrep_group_waiting(rig.group, i, &step); i++)
        count += step.kind == kind;
    return count;
}

/* Steps all of a kind, the newest first. */
static void step_all(enum vrep_step_kind kind)
{
    struct vrep_group_step step;
    uint32_t count = 0;
    while (vrep_group_waiting(rig.group, count, &step))
        count++;
    while (count-- > 0)
        if (vrep_group_waiting(rig.group, count, &step) && step.kind == kind)
            vrep_group_step(rig.group, count);
}

static void send(struct vrep_command **commands, bool *done, int count)
{
    for (int i = 0; i < count; i++) {
        commands[i] =
            rig_prepare(&rig, VREP_OP_WRITE, 0, (uint64_t)i * 8192, 4096, i + 1, &done[i]);
        vrep_command_submit(commands[i]);
    }
    while (waiting(VREP_STEP_QUICK) > 0) { /* their extent becomes warm */
        step_all(VREP_STEP_QUICK);
        vrep_group_poll(rig.group);
    }
}

static void completions_come_in_the_drivers_order(void)
{
    stepped();
    struct vrep_command *commands[4];
    bool done[4];
    send(commands, done, 4);
    for (int i = 0; i < 100; i++)
        vrep_group_poll(rig.group);
    CHECK_EQ(waiting(VREP_STEP_DISK), 4);
    CHECK(!done[0] && !done[1] && !done[2] && !done[3]);
    struct vrep_group_step step;
    uint32_t third = 0;
    while (vrep_group_waiting(rig.group, third, &step) &&
           (step.kind != VREP_STEP_DISK || step.offset != 2 * 8192))
        third++;
    CHECK_EQ(step.length, 4096);
    CHECK_EQ(step.disk, 0);
    CHECK_EQ(step.op, VREP_IO_WRITE);
    vrep_group_step(rig.group, third);
    CHECK(!done[2]); /* poll tells */
    vrep_group_poll(rig.group);
    CHECK(done[2] && !done[0] && !done[1] && !done[3]);
    step_all(VREP_STEP_DISK);
    vrep_group_poll(rig.group);
    CHECK(done[0] && done[1] && done[3]);
    for (int i = 0; i < 4; i++)
        vrep_command_put(commands[i]);
    CHECK(!vrep_group_waiting(rig.group, 1000, &step));
    vrep_group_step(rig.group, 1000); /* nothing */
    rig_free(&rig);
}

static void time_is_what_the_driver_says(void)
{
    stepped();
    vrep_group_set_time(rig.group, 5, 2000);
    struct vrep_command *commands[1];
    bool done[1];
    send(commands, done, 1);
    step_all(VREP_STEP_DISK);
    vrep_group_poll(rig.group);
    CHECK(done[0]);
    vrep_command_put(commands[0]);
    struct vrep_ring_reader *reader;
    CHECK_OK(vrep_ring_reader_open(rig.ring, -1, -1, -1, &reader));
    struct vrep_ring_desc desc;
    CHECK_OK(vrep_ring_reader_desc(reader, vrep_ring_reader_head(reader), &desc));
    CHECK_EQ(desc.wall_ns, 2000);
    CHECK_EQ(desc.mono_ns, 5);
    vrep_ring_reader_close(reader);
    rig_free(&rig);
}

static void a_step_can_fail(void)
{
    stepped();
    struct vrep_command *commands[1];
    bool done[1];
    send(commands, done, 1);
    struct vrep_group_step step;
    uint32_t write = 0;
    while (vrep_group_waiting(rig.group, write, &step) && step.kind != VREP_STEP_DISK)
        write++;
    vrep_group_step_failing(rig.group, write, EIO);
    for (int i = 0; i < 10 && !done[0]; i++) { /* what is there is read again, and recorded */
        vrep_group_poll(rig.group);
        step_all(VREP_STEP_DISK);
    }
    CHECK(done[0]);
    CHECK_STATUS(commands[0]->status, VREP_E_IO);
    vrep_command_put(commands[0]);
    uint8_t byte = 1;
    int fd = open(rig.disk, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, &byte, 1, 0) == 1);
    close(fd);
    CHECK_EQ(byte, 0);
    rig_free(&rig);
}

static void what_was_not_stepped_never_happened(void)
{
    stepped();
    struct vrep_command *commands[2];
    bool done[2];
    send(commands, done, 2);
    struct vrep_group_step step;
    uint32_t first = 0;
    while (vrep_group_waiting(rig.group, first, &step) && step.kind != VREP_STEP_DISK)
        first++;
    uint64_t written = step.offset;
    vrep_group_step(rig.group, first); /* it reached the disk, and nobody saw that */
    rig_kill(&rig);
    uint8_t byte[2];
    int fd = open(rig.disk, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, &byte[0], 1, 0) == 1 && pread(fd, &byte[1], 1, 8192) == 1);
    close(fd);
    CHECK_EQ(byte[0], written == 0 ? 1 : 0);
    CHECK_EQ(byte[1], written == 8192 ? 2 : 0);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_KILLED);
    CHECK_EQ(rig_status(&rig).replayed, 2);
    rig_free(&rig);
}

static void step_everything(void)
{
    struct vrep_group_step step;
    while (vrep_group_waiting(rig.group, 0, &step))
        vrep_group_step(rig.group, 0);
}

static uint64_t now;

static void later(uint64_t ns)
{
    now += ns;
    vrep_group_set_time(rig.group, now, 1000 + now);
    vrep_group_poll(rig.group);
}

/* The disk holds data everywhere, and a target has none of them. */
static void filled(void)
{
    static uint8_t data[RIG_BYTES];
    memset(data, 7, sizeof data);
    rig_init(&rig);
    int fd = open(rig.disk, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, data, sizeof data, 0) == RIG_BYTES);
    close(fd);
    now = 1;
    rig.config.flags |= VREP_GROUP_STEPPED;
    rig.config.mono_ns = now;
    rig.config.wall_ns = 1000;
    rig_open(&rig);
    rig_attach(&rig);
}

/* A turn may take less time than a byte does. */
static void a_rate_is_kept_however_often_there_is_a_turn(void)
{
    enum { RATE = 4000000, TURN_NS = 200, TURNS = 500000, MOST = 256 << 10 };
    uint64_t expected = (uint64_t)RATE * TURN_NS * TURNS / 1000000000;
    filled();
    CHECK_OK(vrep_group_resync(rig.group, true, RATE, false));
    for (int i = 0; i < TURNS; i++) {
        later(TURN_NS);
        step_everything();
    }
    uint64_t copied = rig_status(&rig).resync_bytes;
    CHECK(copied >= expected - 1000);
    CHECK(copied <= expected + MOST); /* the last copy is begun when there is room for a byte */
    rig_free(&rig);
}

int main(void)
{
    RUN(completions_come_in_the_drivers_order);
    RUN(a_step_can_fail);
    RUN(time_is_what_the_driver_says);
    RUN(what_was_not_stepped_never_happened);
    RUN(a_rate_is_kept_however_often_there_is_a_turn);
    return check_report();
}
