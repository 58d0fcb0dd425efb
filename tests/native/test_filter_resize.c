/* A disk gets another size: as a record in the order of its writes, whatever is killed on the way.
 */
#include <stdlib.h>
#include <sys/wait.h>

#include "filter/fault.h"
#include "filter_rig.h"

#define SMALL (1u << 20)
#define ODD (SMALL + 3 * 512) /* in the middle of a bit, and of a page */
#define LARGE RIG_BYTES

static struct rig rig;

static void arm(const char *fault)
{
    if (fault != NULL)
        setenv("VREP_FAULT", fault, 1);
    else
        unsetenv("VREP_FAULT");
    vrep_fault_prepare();
}

static void plan(uint64_t was, uint64_t bytes)
{
    rig.disks[0].was = was;
    rig.disks[0].bytes = bytes;
}

static uint64_t file_bytes(void)
{
    struct stat st;
    CHECK(stat(rig.disk, &st) == 0);
    return (uint64_t)st.st_size;
}

static void truncate_to(uint64_t bytes)
{
    CHECK(truncate(rig.disk, (off_t)bytes) == 0);
}

/* A disk of this size, all of it written, synced and quiet. */
static void synced(uint64_t bytes)
{
    rig_init(&rig);
    truncate_to(bytes);
    rig.bytes = bytes;
    rig_open(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, bytes, 7));
    rig_sync(&rig);
    for (int i = 0; i < 1000 && vrep_group_dirty_bytes(rig.group) > 0; i++) {
        usleep(1000);
        vrep_group_poll(rig.group);
    }
    memset(rig.kinds, 0, sizeof rig.kinds);
    rig.seen_begin = rig.seen_end = false;
}

/* The target's disk has the size and the bytes of the source's. */
static void same(uint64_t bytes)
{
    static uint8_t source[RIG_BYTES];
    CHECK_EQ(file_bytes(), bytes);
    CHECK_EQ(vrep_group_disk_bytes(rig.group, 0), bytes);
    CHECK_EQ(rig.bytes, bytes);
    int fd = open(rig.disk, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, source, bytes, 0) == (ssize_t)bytes);
    close(fd);
    CHECK_MEM(rig.shadow, source, bytes);
}

/* Invariant 2, whatever was applied so far. */
static void check_dirty(void)
{
    static uint8_t source[RIG_BYTES];
    uint64_t bytes = vrep_group_disk_bytes(rig.group, 0), length;
    int fd = open(rig.disk, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, source, bytes, 0) == (ssize_t)bytes);
    close(fd);
    for (uint64_t at = 0; at < bytes; at += length) {
        bool dirty;
        CHECK(vrep_map_next_run(vrep_group_map(rig.group), 0, at, &length, &dirty));
        if (!dirty)
            CHECK_MEM(source + at, rig.shadow + at, length < bytes - at ? length : bytes - at);
    }
}

static void reopened(uint64_t was, uint64_t bytes, enum vrep_opened how)
{
    plan(was, bytes);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, how);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    CHECK_EQ(vrep_group_disk_bytes(rig.group, 0), bytes);
    check_dirty();
}

static void resize(uint64_t was, uint64_t bytes)
{
    rig_close(&rig, false); /* nothing is in flight, and all that is known stays in memory */
    reopened(was, bytes, VREP_OPENED_KILLED);
}

static int write_at(uint64_t offset, uint64_t length, int fill)
{
    return rig_run(&rig, VREP_OP_WRITE, 0, offset, length, fill);
}

static bool refused(uint64_t offset)
{
    struct vrep_command *command = vrep_command_get(rig.group);
    CHECK(command != NULL);
    *command = (struct vrep_command){.group = command->group,
                                     .op = VREP_OP_WRITE,
                                     .offset = offset,
                                     .length = 512,
                                     .done = rig_done};
    int status = vrep_command_prepare(command);
    vrep_command_put(command);
    return status == VREP_E_RANGE;
}

static void a_larger_disk_is_a_record_without_a_gap(void)
{
    synced(SMALL);
    CHECK_OK(write_at(0, 4096, 1));
    resize(SMALL, LARGE);
    CHECK_EQ(rig_status(&rig).gap, 0);
    CHECK_EQ(rig_status(&rig).sizes_due, 0);
    CHECK_OK(write_at(LARGE - 4096, 4096, 2));
    rig_sync(&rig);
    CHECK(!rig.seen_begin);
    CHECK_EQ(rig.kinds[VREP_KIND_RESIZE], 1);
    same(LARGE);
    rig_close(&rig, true); /* the plan that stays in the definition means nothing any more */
    reopened(SMALL, LARGE, VREP_OPENED_CLEAN);
    rig_sync(&rig);
    CHECK_EQ(rig.kinds[VREP_KIND_RESIZE], 1);
    rig_free(&rig);
}

static void a_smaller_disk_is_a_record_without_a_gap(void)
{
    synced(LARGE);
    CHECK_OK(write_at(SMALL, 65536, 3)); /* is shipped, although it is cut off */
    resize(LARGE, ODD);
    CHECK(refused(ODD));
    CHECK_OK(write_at(ODD - 512, 512, 4));
    rig_sync(&rig);
    CHECK(!rig.seen_begin);
    CHECK_EQ(rig.kinds[VREP_KIND_WRITE], 2);
    CHECK_EQ(rig.shadow[SMALL + 60000], 3); /* points before it have what was cut off */
    same(ODD);
    rig_free(&rig);
}

static void space_that_comes_back_reads_zero(void)
{
    synced(LARGE);
    resize(LARGE, ODD);
    resize(ODD, LARGE);
    CHECK_EQ(rig_status(&rig).gap, 0);
    rig_sync(&rig); /* and rig_apply looks at each position */
    CHECK(!rig.seen_begin);
    CHECK_EQ(rig.kinds[VREP_KIND_RESIZE], 2);
    CHECK_EQ(rig.shadow[LARGE - 1], 0);
    same(LARGE);
    rig_free(&rig);
}

static void space_that_is_not_zero_is_copied_in_a_gap(void)
{
    synced(SMALL);
    rig_close(&rig, false);
    truncate_to(LARGE); /* as a device that its maker made larger, with what was there before */
    int fd = open(rig.disk, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, "old bytes", 9, SMALL + 70000) == 9);
    close(fd);
    reopened(SMALL, LARGE, VREP_OPENED_KILLED);
    CHECK_EQ(rig_status(&rig).gap, 1);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, LARGE - SMALL); /* and no block that there was */
    rig_sync(&rig);
    CHECK(rig.seen_end);
    CHECK_EQ(rig.kinds[VREP_KIND_RESIZE], 1);
    same(LARGE);
    rig_free(&rig);
}

static void a_resize_in_a_gap_is_told_before_it_ends(void)
{
    synced(LARGE);
    CHECK_OK(vrep_group_resync(rig.group, false, 0, true));
    CHECK_OK(write_at(100, 5000, 9));
    resize(LARGE, ODD);
    resize(ODD, LARGE);
    resize(LARGE, SMALL);
    CHECK_EQ(rig_status(&rig).gap, 1);
    rig_sync(&rig);
    CHECK(rig.seen_end);
    same(SMALL);
    rig_free(&rig);
}

static void a_resize_that_was_lost_is_told_again(void)
{
    static const uint64_t sizes[][2] = {{LARGE, ODD}, {SMALL, LARGE}};
    for (unsigned i = 0; i < 2; i++) {
        for (int power = 0; power < 2; power++) {
            synced(sizes[i][0]);
            resize(sizes[i][0], sizes[i][1]);
            if (power) {
                rig_power_loss(&rig); /* the ring had it, nobody else */
                reopened(sizes[i][0], sizes[i][1], VREP_OPENED_POWER_LOSS);
            } else {
                CHECK_OK(vrep_group_lose_ring(rig.group));
            }
            check_dirty();
            CHECK_EQ(rig_status(&rig).gap, 1);
            CHECK_EQ(rig_status(&rig).sizes_due, 1);
            rig_sync(&rig);
            CHECK(rig.kinds[VREP_KIND_RESIZE] >= 1);
            same(sizes[i][1]);
            rig_free(&rig);
        }
    }
}

/* A target that still has what a smaller disk cut off: after a power loss, for which no
 * write-intent stands, the checkpoint alone knows that the space reads zero again. */
static void new_space_is_marked_after_a_power_loss(void)
{
    synced(LARGE);
    resize(LARGE, SMALL);
    rig_sync(&rig);
    CHECK_EQ(rig.shadow[LARGE - 1], 7);
    resize(SMALL, LARGE);
    rig_power_loss(&rig); /* the ring had it, nobody else */
    reopened(SMALL, LARGE, VREP_OPENED_POWER_LOSS);
    rig_sync(&rig);
    same(LARGE);
    rig_free(&rig);
}

static void a_size_that_nobody_planned_is_unverified_and_told(void)
{
    synced(LARGE);
    rig_close(&rig, true);
    truncate_to(SMALL);
    plan(LARGE, ODD); /* another one than that */
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_UNEXPLAINED);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_SIZE);
    CHECK_EQ(file_bytes(), SMALL); /* what is there is left alone */
    rig_sync(&rig);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    same(SMALL);
    rig_free(&rig);
}

static void a_planned_size_does_not_hide_a_stranger(void)
{
    synced(SMALL);
    rig_close(&rig, true);
    int fd = open(rig.disk, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, "stranger", 8, 3000) == 8);
    close(fd);
    plan(SMALL, LARGE);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_STAMPS);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, LARGE);
    rig_sync(&rig);
    same(LARGE);
    rig_free(&rig);
}

static void a_clean_stop_before_it_costs_no_compare(void)
{
    synced(SMALL);
    rig_close(&rig, true);
    rig_shell("rm -f %s/*", rig.shm);
    reopened(SMALL, LARGE, VREP_OPENED_CLEAN);
    CHECK_EQ(rig_status(&rig).gap, 0);
    rig_sync(&rig);
    CHECK(!rig.seen_begin);
    same(LARGE);
    rig_free(&rig);
}

static void a_disk_that_cannot_be_resized_is_served_as_it_was(void)
{
    synced(SMALL);
    rig_close(&rig, false);
    arm("resize.backing:1:io+");
    reopened(SMALL, SMALL, VREP_OPENED_KILLED); /* no plan */
    rig_close(&rig, false);
    plan(SMALL, LARGE);
    rig_open(&rig);
    arm(NULL);
    CHECK_EQ(vrep_group_disk_bytes(rig.group, 0), SMALL);
    CHECK_EQ(rig_status(&rig).gap, 0);
    CHECK_OK(write_at(0, 4096, 5));
    rig_sync(&rig);
    CHECK_EQ(rig.kinds[VREP_KIND_RESIZE], 0);
    same(SMALL);
    rig_free(&rig);
}

static void a_full_ring_is_a_gap_and_the_size_comes_later(void)
{
    synced(LARGE);
    while (rig_status(&rig).unrecorded == 0) /* nobody takes anything */
        CHECK_OK(write_at(0, 4096, 1));
    resize(LARGE, SMALL);
    CHECK_EQ(rig_status(&rig).gap, 1);
    rig_sync(&rig);
    same(SMALL);
    rig_free(&rig);
}

static void a_pass_through_marks_all_of_a_disk_that_grew(void)
{
    synced(SMALL);
    rig_close(&rig, false);
    truncate_to(LARGE);
    plan(SMALL, LARGE);
    rig.config.flags = VREP_GROUP_BYPASS;
    rig_open(&rig);
    CHECK_OK(write_at(LARGE - 65536, 65536, 6));
    rig_kill(&rig);
    rig.config.flags = VREP_GROUP_TAP;
    rig_open(&rig);
    check_dirty();
    rig_sync(&rig);
    same(LARGE);
    rig_free(&rig);
}

/* ---- kills ----------------------------------------------------------------------- */

static const char *const points[] = {
    "resize.after_backing:1:kill",    "resize.after_map:1:kill",    "recover.before_ring:1:kill",
    "resize.after_checkpoint:1:kill", "resize.after_intent:1:kill", "recover.after_state:1:kill",
    "resize.after_zeroes:1:kill",     "tap.after_stage:1:kill",     "tap.after_commit:1:kill",
    "tap.after_commit:2:kill",        "resize.after_record:1:kill", "state.write:2:kill",
    "resize.after_state:1:kill",
};

/* Whether the child was killed at its point. */
static bool killed_start(const char *fault)
{
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        arm(fault);
        _exit(vrep_group_open(&rig.config, &rig.group) == VREP_OK ? 0 : 1);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFSIGNALED(status) || WEXITSTATUS(status) == 0);
    return WIFSIGNALED(status);
}

/* Writes that no target has yet, then a resize that is killed at each step, and killed again at
 * another, by a kill alone or with the power.  No full copy is ever needed. */
static void a_kill_at_each_step_loses_nothing(void)
{
    enum { POINTS = sizeof points / sizeof *points };
    static const uint64_t sizes[][2] = {{SMALL, LARGE}, {LARGE, ODD}, {ODD, LARGE}};
    uint32_t passed[POINTS] = {0};
    for (unsigned p = 0; p < POINTS; p++) {
        for (unsigned variant = 0; variant < 6; variant++) {
            uint64_t was = sizes[variant / 2][0], now = sizes[variant / 2][1];
            bool power = variant % 2 != 0;
            synced(was);
            CHECK_OK(write_at(1000, 70000, 1));
            CHECK_OK(write_at(SMALL - 100000, 100000, 2));
            rig_close(&rig, false);
            plan(was, now);
            passed[p] += killed_start(points[p]);
            if (power)
                rig_shell("rm -f %s/*", rig.shm);
            (void)killed_start(points[(p + variant) % POINTS]);
            rig_open(&rig);
            struct vrep_group_status status = rig_status(&rig);
            if (status.unverified != 0)
                fprintf(stderr, "%s, then %s, variant %u\n", points[p],
                        points[(p + variant) % POINTS], variant);
            CHECK_EQ(status.unverified, 0);
            if (!power)
                CHECK_EQ(status.gap, 0);
            check_dirty();
            CHECK_OK(write_at(now - 512, 512, 3));
            rig_sync(&rig);
            same(now);
            CHECK(rig.kinds[VREP_KIND_RESIZE] >= 1);
            rig_close(&rig, true);
            reopened(was, now, VREP_OPENED_CLEAN);
            rig_free(&rig);
        }
        if (passed[p] == 0)
            fprintf(stderr, "never passed: %s\n", points[p]);
        CHECK(passed[p] > 0);
    }
}

static void random_sizes_and_writes_agree(void)
{
    synced(LARGE);
    uint64_t bytes = LARGE;
    for (int round = 0; round < 60; round++) {
        for (uint64_t i = check_random_below(12); i > 0; i--) {
            uint64_t length = 512 * (1 + check_random_below(200));
            if (length >= bytes)
                continue;
            uint8_t op = check_random_below(4) == 0 ? VREP_OP_ZERO : VREP_OP_WRITE;
            CHECK_OK(rig_run(&rig, op, 0, check_random_below(bytes - length), length,
                             (int)check_random_below(256)));
        }
        uint64_t now = 512 * (1 + check_random_below(LARGE / 512)), kind = check_random_below(5);
        if (kind == 0) {
            rig_kill(&rig);
        } else if (kind == 1) {
            rig_power_loss(&rig);
        } else {
            rig_close(&rig, kind == 2);
        }
        plan(bytes, now);
        rig_open(&rig);
        bytes = now;
        CHECK_EQ(rig_status(&rig).unverified, 0);
        check_dirty();
        if (check_random_below(3) > 0) {
            rig_sync(&rig);
            same(bytes);
        }
    }
    rig_free(&rig);
}

int main(void)
{
    RUN(a_larger_disk_is_a_record_without_a_gap);
    RUN(a_smaller_disk_is_a_record_without_a_gap);
    RUN(space_that_comes_back_reads_zero);
    RUN(space_that_is_not_zero_is_copied_in_a_gap);
    RUN(a_resize_in_a_gap_is_told_before_it_ends);
    RUN(a_resize_that_was_lost_is_told_again);
    RUN(new_space_is_marked_after_a_power_loss);
    RUN(a_size_that_nobody_planned_is_unverified_and_told);
    RUN(a_planned_size_does_not_hide_a_stranger);
    RUN(a_clean_stop_before_it_costs_no_compare);
    RUN(a_disk_that_cannot_be_resized_is_served_as_it_was);
    RUN(a_full_ring_is_a_gap_and_the_size_comes_later);
    RUN(a_pass_through_marks_all_of_a_disk_that_grew);
    RUN(random_sizes_and_writes_agree);
    RUN(a_kill_at_each_step_loses_nothing);
    return 0;
}
