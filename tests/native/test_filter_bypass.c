/* A pass-through stands in for a filter that cannot start, and what the next filter makes of it. */
#include <signal.h>
#include <sys/wait.h>

#include "filter/fault.h"
#include "filter_rig.h"

static struct rig rig;

static void arm(const char *fault)
{
    if (fault != NULL)
        setenv("VREP_FAULT", fault, 1);
    else
        unsetenv("VREP_FAULT");
    vrep_fault_prepare();
}

static void quiet(void)
{
    for (int i = 0; i < 1000 && vrep_group_dirty_bytes(rig.group) > 0; i++) {
        usleep(1000);
        vrep_group_poll(rig.group);
    }
    CHECK_EQ(vrep_group_dirty_bytes(rig.group), 0);
}

static void synced(void)
{
    rig_init(&rig);
    rig_open(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 200000, 7));
    rig_sync(&rig);
    rig_compare(&rig);
    quiet();
}

static void flagged(uint32_t flags)
{
    rig.config.flags = flags;
}

static void bypass_open(void)
{
    flagged(VREP_GROUP_BYPASS);
    rig_open(&rig);
}

static void bypass_close(bool clean)
{
    if (clean)
        rig_close(&rig, true);
    else
        rig_kill(&rig);
    flagged(VREP_GROUP_TAP);
}

static void bypass_writes(int fill)
{
    bypass_open();
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 401000, 9000, fill));
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, VREP_COMMAND_FUA, 3000000, 70000, fill + 1));
    CHECK_OK(rig_run(&rig, VREP_OP_ZERO, 0, 65536, 65536, 0));
    CHECK_OK(rig_run(&rig, VREP_OP_DISCARD, 0, 0, 65536, 0));
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
}

/* Commands that a pool thread writes and nobody sees complete. */
static void kill_in_flight(void)
{
    enum { N = 8 };
    static bool done[N];
    struct vrep_command *commands[N];
    for (int i = 0; i < N; i++)
        commands[i] = rig_prepare(&rig, VREP_OP_WRITE, VREP_COMMAND_FUA, (uint64_t)i * 400000,
                                  50000, 0x30 + i, &done[i]);
    for (int i = 0; i < N; i++)
        vrep_command_submit(commands[i]);
    rig_kill(&rig);
}

static void becomes_whole(void)
{
    rig.seen_begin = rig.seen_end = false;
    rig_sync(&rig);
    CHECK(rig.seen_begin && rig.seen_end);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    rig_compare(&rig);
    rig_close(&rig, true); /* and what it stored is clean again */
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_CLEAN);
    CHECK_EQ(rig_status(&rig).gap, 0);
    rig_free(&rig);
}

static void writes_of_a_pass_through_are_resynced_and_nothing_else(void)
{
    for (int killed = 0; killed < 2; killed++) {
        for (int stopped = 0; stopped < 2; stopped++) {
            synced();
            CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 900000, 1000, 3)); /* recorded, not shipped */
            if (stopped)
                rig_close(&rig, true);
            else
                kill_in_flight();
            bypass_writes(0x50);
            bypass_close(!killed);
            bypass_writes(0x60); /* it may come again */
            bypass_close(!killed);
            rig_open(&rig);
            struct vrep_group_status status = rig_status(&rig);
            CHECK_EQ(status.opened_as, VREP_OPENED_KILLED);
            CHECK_EQ(status.unverified, 0);
            CHECK_EQ(status.gap, 1);
            /* 14 blocks at most of the pass-through and of what was in flight. */
            CHECK(status.unshipped_bytes > 0 && status.unshipped_bytes < 20 * RIG_BIT);
            CHECK(rig_check_dirty(&rig) > 0);
            becomes_whole();
        }
    }
}

static void a_power_loss_after_a_pass_through_resyncs_everything(void)
{
    synced();
    kill_in_flight();
    bypass_writes(0x50);
    bypass_close(false);
    rig_shell("rm -f %s/*", rig.shm);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_UNEXPLAINED);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_BYPASS);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BYTES);
    becomes_whole();
}

/* Its blocks are in no checkpoint, and no extent of theirs is hot, before the next filter began. */
static void a_power_loss_after_the_next_start_finds_its_blocks(void)
{
    synced();
    rig_close(&rig, true);
    bypass_writes(0x50);
    bypass_close(false);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_KILLED);
    rig_power_loss(&rig);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_POWER_LOSS);
    CHECK(rig_status(&rig).unshipped_bytes < RIG_BYTES);
    CHECK(rig_check_dirty(&rig) > 0);
    becomes_whole();
}

/* What a power loss could still take back from the disk is synced before its blocks are shipped;
 * when that fails, nothing of the disk is believed. */
static void the_next_start_syncs_what_a_pass_through_wrote(void)
{
    synced();
    rig_close(&rig, true);
    bypass_writes(0x50);
    bypass_close(false);
    arm("recover.flush:1:io");
    rig_open(&rig);
    arm(NULL);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_UNEXPLAINED);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_FLUSH);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BYTES);
    becomes_whole();
}

static void without_the_map_everything_is_resynced(void)
{
    for (int forgotten = 0; forgotten < 2; forgotten++) {
        synced();
        uint64_t head = rig_status(&rig).head;
        rig_close(&rig, true);
        if (!forgotten)
            rig_shell("rm -f %s/*", rig.shm);
        /* Else the pass-through does not know where the memory is, and the next filter does. */
        const char *shm = rig.config.shm_dir;
        rig.config.shm_dir = forgotten ? NULL : shm;
        bypass_writes(0x50);
        bypass_close(true);
        rig.config.shm_dir = shm;
        rig_open(&rig);
        struct vrep_group_status status = rig_status(&rig);
        CHECK_EQ(status.opened_as, VREP_OPENED_UNEXPLAINED);
        CHECK_EQ(status.unverified, VREP_UNVERIFIED_BYPASS);
        CHECK_EQ(status.unshipped_bytes, RIG_BYTES);
        CHECK(status.head > head);
        becomes_whole();
    }
}

static void memory_that_the_last_filter_did_not_close_is_not_marked(void)
{
    static char other[96];
    synced();
    snprintf(other, sizeof other, "%s/other", rig.root);
    CHECK_EQ(mkdir(other, 0700), 0);
    rig_close(&rig, true);
    const char *shm = rig.config.shm_dir;
    rig.config.shm_dir = other; /* the last one ran with its memory elsewhere */
    char ring[128];
    memcpy(ring, rig.ring, sizeof ring);
    snprintf(rig.ring, sizeof rig.ring, "%s/ring", other);
    rig_open(&rig);
    for (int i = 0; i < 12; i++)
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, (uint64_t)(i % 3) << 20, 1 << 20, 0x40 + i));
    rig_close(&rig, true);
    rig.config.shm_dir = shm;
    memcpy(rig.ring, ring, sizeof ring);
    bypass_writes(0x50);
    bypass_close(true);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_BYPASS);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BYTES);
    becomes_whole();
}

static void one_that_cannot_say_so_serves_nobody(void)
{
    synced();
    kill_in_flight();
    arm("state.write:1:io");
    flagged(VREP_GROUP_BYPASS);
    CHECK_STATUS(vrep_group_open(&rig.config, &rig.group), VREP_E_IO);
    arm(NULL);
    flagged(VREP_GROUP_TAP);
    rig_open(&rig); /* nothing was served: nothing but the gap came of it */
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_KILLED);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    rig_check_dirty(&rig);
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static void a_fenced_or_held_group_is_not_passed_through(void)
{
    struct vrep_group *second = NULL;
    synced();
    struct vrep_group_config config = rig.config;
    config.flags = VREP_GROUP_BYPASS;
    CHECK_STATUS(vrep_group_open(&config, &second), VREP_E_LOCKED);
    rig_close(&rig, true);
    rig.config.epoch = 2;
    rig_open(&rig);
    rig_close(&rig, true);
    CHECK_STATUS(vrep_group_open(&config, &second), VREP_E_FENCED);
    bypass_open();
    config.epoch = 2;
    CHECK_STATUS(vrep_group_open(&config, &second), VREP_E_LOCKED);
    bypass_close(true);
    rig_free(&rig);
}

static void a_flush_that_fails_outlives_the_pass_through(void)
{
    for (int marks = 0; marks < 2; marks++) {
        synced();
        rig_close(&rig, true);
        if (!marks)
            rig_shell("rm -f %s/*", rig.shm);
        bypass_open();
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 700000, 9000, 9));
        arm("backing.flush:1:io");
        CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
        arm(NULL);
        CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
        bypass_close(false);
        bypass_open();
        CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
        bypass_close(true);
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_FLUSH);
        CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BYTES);
        CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
        rig_sync(&rig);
        CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
        rig_compare(&rig);
        rig_free(&rig);
    }
}

/* ---- kills at named points ------------------------------------------------------ */

static void child_filters(const char *fault)
{
    arm(fault);
    rig.reader = NULL;
    rig_open(&rig);
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    time_t until = time(NULL) + 30;
    for (int i = 0; time(NULL) < until; i++) {
        uint64_t length = 1 + check_random_below(60000);
        uint64_t offset = check_random_below(RIG_BYTES - length);
        CHECK_OK(rig_run(&rig, i % 9 == 4 ? VREP_OP_ZERO : VREP_OP_WRITE, 0, offset, length, i));
        if (i > 400 && i % 3 == 0) /* late: the ring overflows first */
            rig_apply(&rig, true);
    }
    _exit(3); /* the point was never passed */
}

static void child_bypasses(const char *fault)
{
    arm(fault);
    bypass_open();
    for (int i = 0; i < 200; i++) {
        uint64_t length = 1 + check_random_below(60000);
        uint64_t offset = check_random_below(RIG_BYTES - length);
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, offset, length, 0x80 + i));
    }
    _exit(3);
}

static void killed(void (*work)(const char *fault), const char *fault, uint64_t seed)
{
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        check_seed(seed);
        work(fault);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    if (!WIFSIGNALED(status))
        fprintf(stderr, "%s: status %d\n", fault, status);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static const char *const filter_points[] = {
    "tap.after_grant:40:kill",    "tap.after_stage:41:kill",   "tap.after_commit:43:kill",
    "gap.after_flag:1:kill",      "gap.after_commit:1:kill",   "gap.after_stage:2:kill",
    "gap.after_commit:2:kill",    "sync.after_publish:3:kill", "sync.after_clear:3:kill",
    "consumer.after_clear:3:kill"};
static const char *const bypass_points[] = {
    "bypass.before_state:1:kill", "bypass.after_state:1:kill", "bypass.after_mark:20:kill"};

static void kills_of_both_lose_nothing(void)
{
    for (unsigned p = 0; p < sizeof filter_points / sizeof *filter_points; p++) {
        for (unsigned q = 0; q < sizeof bypass_points / sizeof *bypass_points; q++) {
            synced();
            rig_close(&rig, true);
            uint64_t applied = rig.applied;
            killed(child_filters, filter_points[p], 2000 + p);
            killed(child_bypasses, bypass_points[q], 3000 + q);
            rig_open(&rig);
            CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_KILLED);
            CHECK_EQ(rig_status(&rig).gap, 1);
            CHECK(vrep_map_header(vrep_group_map(rig.group))->gap_open != 0);
            if (rig_status(&rig).released > applied) { /* the child's own target had it */
                CHECK_OK(vrep_group_lose_ring(rig.group));
                CHECK_OK(vrep_group_resync(rig.group, true, 0, true));
            } else {
                rig_check_dirty(&rig);
            }
            rig_sync(&rig);
            rig_compare(&rig);
            rig_free(&rig);
        }
    }
}

int main(void)
{
    RUN(writes_of_a_pass_through_are_resynced_and_nothing_else);
    RUN(a_power_loss_after_a_pass_through_resyncs_everything);
    RUN(a_power_loss_after_the_next_start_finds_its_blocks);
    RUN(the_next_start_syncs_what_a_pass_through_wrote);
    RUN(without_the_map_everything_is_resynced);
    RUN(memory_that_the_last_filter_did_not_close_is_not_marked);
    RUN(one_that_cannot_say_so_serves_nobody);
    RUN(a_fenced_or_held_group_is_not_passed_through);
    RUN(a_flush_that_fails_outlives_the_pass_through);
    RUN(kills_of_both_lose_nothing);
    return check_report();
}
