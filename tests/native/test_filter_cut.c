/* A lane's part in a cut: what waits, what does not, and how a hold ends. */
#include <time.h>

#include "filter_rig.h"

static struct rig rig;
static const uint8_t CUT[16] = {7}, OTHER[16] = {8};
#define LIMIT VREP_CUT_HOLD_NS_MAX

static uint64_t now_ns(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

static void begin(void)
{
    rig_init(&rig);
    rig_open(&rig);
    rig_sync(&rig);
}

/* Whether the machine was fast enough to show anything. */
static bool show_that_answers_wait(void)
{
    begin();
    uint64_t head = rig_status(&rig).head, seq, at;
    uint8_t byte = 0;
    struct iovec iov = {&byte, 1};
    bool written, read, flushed;
    uint64_t began = now_ns();
    CHECK_OK(vrep_group_cut_hold(rig.group, CUT, LIMIT));
    struct vrep_command *write = rig_prepare(&rig, VREP_OP_WRITE, 0, 0, 4096, 0x5a, &written);
    vrep_command_submit(write);
    for (int i = 0; i < 1000000 && rig_status(&rig).head == head; i++)
        vrep_group_poll(rig.group);
    bool in_time = now_ns() - began < LIMIT / 2;
    struct vrep_command *reads = rig_prepare(&rig, VREP_OP_READ, 0, 0, 1, 0, &read);
    reads->iov = &iov;
    reads->iovcnt = 1;
    vrep_command_submit(reads);
    struct vrep_command *flush = rig_prepare(&rig, VREP_OP_FLUSH, 0, 0, 0, 0, &flushed);
    vrep_command_submit(flush);
    while (byte != 0x5a && now_ns() - began < LIMIT / 2)
        vrep_group_poll(rig.group);
    for (uint64_t came = now_ns(); now_ns() - came < LIMIT / 8;)
        vrep_group_poll(rig.group); /* its completion, too */
    in_time = in_time && byte == 0x5a && now_ns() - began < LIMIT * 3 / 4;
    if (in_time) {
        CHECK(!written && !read && !flushed);
        CHECK_EQ(rig_status(&rig).inflight, 3);
        CHECK_OK(vrep_group_cut_mark(rig.group, CUT, &seq));
        CHECK_EQ(seq, head + 2);
        CHECK(!written && !read);
        CHECK_OK(vrep_group_cut_release(rig.group, CUT));
        CHECK(written); /* the read may have to be looked for */
        CHECK_EQ(rig_status(&rig).cuts, 1);
        struct vrep_position lanes[2] = {{.epoch = 1, .lane = 0, .seq = seq},
                                         {.epoch = 1, .lane = 1, .seq = 5}};
        CHECK_OK(vrep_group_cut_complete(rig.group, CUT, lanes, 2, "now", 3, &at));
        CHECK_EQ(at, seq + 1);
        struct vrep_ring_desc desc;
        CHECK_OK(vrep_ring_reader_desc(rig.reader, at, &desc));
        CHECK_EQ(desc.kind, VREP_KIND_MARK);
        CHECK_EQ(desc.length, sizeof(struct vrep_mark) + sizeof(struct vrep_cut) +
                                  2 * sizeof(struct vrep_position) + 3);
    }
    rig_wait(&rig, &written);
    rig_wait(&rig, &read);
    rig_wait(&rig, &flushed);
    vrep_command_put(write);
    vrep_command_put(reads);
    vrep_command_put(flush);
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
    return in_time;
}

static void answers_wait_and_the_order_goes_on(void)
{
    for (int i = 0; i < 500; i++)
        if (show_that_answers_wait())
            return;
    CHECK(!"within 10 ms nothing ever got done");
}

static void a_timer_ends_the_hold_and_voids_the_cut(void)
{
    begin();
    uint64_t seq;
    bool done;
    uint64_t began = now_ns();
    CHECK_OK(vrep_group_cut_hold(rig.group, CUT, LIMIT));
    struct vrep_command *write = rig_prepare(&rig, VREP_OP_WRITE, 0, 0, 4096, 1, &done);
    vrep_command_submit(write);
    CHECK(vrep_group_timeout_ms(rig.group) <= 10);
    for (int i = 0; !done && i < 10000000; i++)
        vrep_group_poll(rig.group);
    CHECK(done);
    CHECK(now_ns() - began >= LIMIT);
    CHECK_STATUS(vrep_group_cut_mark(rig.group, CUT, &seq), VREP_E_TIMEOUT);
    CHECK_STATUS(vrep_group_cut_release(rig.group, CUT), VREP_E_TIMEOUT);
    CHECK_EQ(rig_status(&rig).cuts_void, 1);
    CHECK_EQ(rig_status(&rig).cuts, 0);
    vrep_command_put(write);
    rig_free(&rig);
}

/* Nobody polled for longer than the limit; a release that comes then finds the cut void. */
static void a_late_release_finds_the_cut_void(void)
{
    begin();
    uint64_t seq;
    CHECK_OK(vrep_group_cut_hold(rig.group, CUT, 1000000));
    CHECK_OK(vrep_group_cut_mark(rig.group, CUT, &seq));
    usleep(3000);
    vrep_group_poll(rig.group);
    CHECK_STATUS(vrep_group_cut_release(rig.group, CUT), VREP_E_TIMEOUT);
    rig_free(&rig);
}

static void one_cut_at_a_time_and_none_in_a_gap(void)
{
    rig_init(&rig);
    rig_open(&rig);
    uint64_t seq;
    CHECK_STATUS(vrep_group_cut_hold(rig.group, CUT, LIMIT), VREP_E_GONE);
    rig_sync(&rig);
    CHECK_STATUS(vrep_group_cut_hold(rig.group, CUT, LIMIT + 1), VREP_E_INVALID);
    CHECK_STATUS(vrep_group_cut_hold(rig.group, CUT, 0), VREP_E_INVALID);
    CHECK_STATUS(vrep_group_cut_mark(rig.group, CUT, &seq), VREP_E_TIMEOUT);
    CHECK_OK(vrep_group_cut_hold(rig.group, CUT, LIMIT));
    CHECK_STATUS(vrep_group_cut_hold(rig.group, OTHER, LIMIT), VREP_E_BUSY);
    CHECK_STATUS(vrep_group_cut_mark(rig.group, OTHER, &seq), VREP_E_TIMEOUT);
    CHECK_STATUS(vrep_group_cut_release(rig.group, OTHER), VREP_E_TIMEOUT);
    CHECK_OK(vrep_group_cut_release(rig.group, CUT));
    struct vrep_position lanes[2] = {{.lane = 1, .seq = 1}, {.lane = 1, .seq = 1}};
    CHECK_STATUS(vrep_group_cut_complete(rig.group, CUT, lanes, 2, "", 0, &seq), VREP_E_INVALID);
    CHECK_STATUS(vrep_group_cut_complete(rig.group, CUT, lanes, 0, "", 0, &seq), VREP_E_INVALID);
    rig_free(&rig);
}

/* A filter that dies while it holds: its successor knows of no hold, and answers what it is sent.
 */
static void a_hold_dies_with_its_filter(void)
{
    begin();
    uint64_t seq;
    bool done;
    CHECK_OK(vrep_group_cut_hold(rig.group, CUT, LIMIT));
    CHECK_OK(vrep_group_cut_mark(rig.group, CUT, &seq));
    struct vrep_command *write = rig_prepare(&rig, VREP_OP_WRITE, 0, 8192, 4096, 3, &done);
    vrep_command_submit(write);
    rig_kill(&rig);
    rig_open(&rig);
    rig_attach(&rig);
    CHECK_STATUS(vrep_group_cut_release(rig.group, CUT), VREP_E_TIMEOUT);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 4096, 4));
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

/* Who closes waits for the answers, and the answers for the timer. */
static void closing_ends_a_hold(void)
{
    begin();
    bool done;
    CHECK_OK(vrep_group_cut_hold(rig.group, CUT, LIMIT));
    struct vrep_command *write = rig_prepare(&rig, VREP_OP_WRITE, 0, 0, 4096, 5, &done);
    vrep_command_submit(write);
    rig_close(&rig, true);
    CHECK(done);
    rig_free(&rig);
}

static void records_carry_their_lane(void)
{
    rig_init(&rig);
    rig.config.lane = 3;
    rig_open(&rig);
    rig_sync(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 4096, 1));
    uint64_t seq;
    CHECK_OK(vrep_group_mark(rig.group, "x", 1, &seq));
    struct vrep_ring_desc desc;
    for (uint64_t at = seq - 1; at <= seq; at++) {
        CHECK_OK(vrep_ring_reader_desc(rig.reader, at, &desc));
        CHECK_EQ(desc.lane, 3);
    }
    rig_free(&rig);
}

int main(void)
{
    RUN(answers_wait_and_the_order_goes_on);
    RUN(a_timer_ends_the_hold_and_voids_the_cut);
    RUN(a_late_release_finds_the_cut_void);
    RUN(one_cut_at_a_time_and_none_in_a_gap);
    RUN(a_hold_dies_with_its_filter);
    RUN(closing_ends_a_hold);
    RUN(records_carry_their_lane);
    return check_report();
}
