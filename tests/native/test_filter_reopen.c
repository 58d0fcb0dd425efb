/* Starts that go wrong half-way, or after something that the last process did not live to store. */
#include <stdlib.h>
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

static void synced(void)
{
    rig_init(&rig);
    rig_open(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 300000, 7));
    rig_sync(&rig);
}

static void turn(int ms)
{
    for (int i = 0; i < ms; i++) {
        vrep_group_poll(rig.group);
        usleep(1000);
    }
}

/* A start that is killed at a fault point, in a process of its own. */
static void killed_start(const char *fault)
{
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        arm(fault);
        rig_open(&rig);
        _exit(1); /* it was not killed */
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFSIGNALED(status));
}

static void flushes_work_again_after_a_kill_past_the_repair(void)
{
    synced();
    CHECK_OK(vrep_group_resync(rig.group, false, 0, false));
    arm("backing.flush:1:io");
    CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
    arm(NULL);
    turn(20);
    CHECK(rig_status(&rig).flush_failed);
    arm("state.write:1:io+"); /* what follows the gap's end is not stored any more */
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    rig_settle(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    rig_kill(&rig);
    arm(NULL);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    rig_free(&rig);
}

/* The other half: a failed flush is not forgotten by a kill, and its repair ends. */
static void a_failed_flush_outlives_a_kill_until_it_is_repaired(void)
{
    synced();
    CHECK_OK(vrep_group_resync(rig.group, false, 0, false));
    arm("backing.flush:1:io");
    CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
    rig_kill(&rig);
    arm(NULL);
    rig_open(&rig);
    CHECK(rig_status(&rig).flush_failed);
    CHECK_EQ(rig_status(&rig).gap, 1);
    CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
    rig_sync(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    rig_compare(&rig);
    rig_free(&rig);
}

/* Invariants 2 and 9: memory that a killed start left half made is nobody's map. */
static void a_start_killed_before_its_map_is_whole_leaves_none(void)
{
    for (int power = 0; power < 2; power++) {
        synced();
        CHECK_OK(vrep_group_resync(rig.group, false, 0, false));
        for (int i = 0; i < 12; i++) /* more than the ring holds */
            CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, (uint64_t)(i % 3) << 20, 1 << 20, 0x40 + i));
        turn(50);
        rig_apply(&rig, true);
        turn(300);
        CHECK(rig_check_dirty(&rig) > 0);
        if (power) {
            rig_power_loss(&rig);
        } else {
            rig_close(&rig, true);
            rig_shell("rm -f %s/*", rig.shm);
        }
        killed_start("recover.before_ring:1:kill");
        rig_open(&rig);
        CHECK(rig_status(&rig).opened_as != VREP_OPENED_KILLED);
        CHECK_EQ(rig_status(&rig).gap, 1);
        CHECK(rig_check_dirty(&rig) > 0);
        rig_sync(&rig);
        rig_compare(&rig);
        rig_free(&rig);
    }
}

/* One that is killed with its memory whole, before its first record: the next one begins with that,
 * and where seq jumps it says so. */
static void a_start_killed_before_its_gap_begins_is_carried_on(void)
{
    synced();
    rig_power_loss(&rig);
    killed_start("recover.after_state:1:kill");
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_KILLED);
    CHECK_EQ(rig_status(&rig).gap, 1);
    rig.seen_begin = false;
    rig_attach(&rig);
    rig_apply(&rig, true);
    CHECK(rig.seen_begin);
    CHECK(rig.last_flags & VREP_RECORD_JUMP);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

/* One that is killed while it replays what was in flight, at each entry: the next one replays the
 * rest, and copies nothing else. */
static void a_replay_that_is_killed_is_carried_on(void)
{
    enum { N = 6 };
    for (unsigned k = 1; k <= N; k++) {
        synced();
        struct vrep_command *commands[N];
        bool done[N];
        for (int i = 0; i < N; i++)
            commands[i] = rig_prepare(&rig, VREP_OP_WRITE, VREP_COMMAND_FUA, (uint64_t)i * 400000,
                                      50000, i, &done[i]);
        for (int i = 0; i < N; i++)
            vrep_command_submit(commands[i]);
        uint64_t head = rig_status(&rig).head;
        rig_kill(&rig);
        char fault[32];
        snprintf(fault, sizeof fault, "recover.replay:%u:kill", k);
        killed_start(fault);
        rig_open(&rig);
        struct vrep_group_status status = rig_status(&rig);
        CHECK_EQ(status.opened_as, VREP_OPENED_KILLED);
        CHECK_EQ(status.replayed, N - (k - 1));
        CHECK_EQ(status.head, head + N);
        CHECK_EQ(status.gap, 0);
        CHECK_EQ(status.unshipped_bytes, 0);
        CHECK(rig_check_dirty(&rig) > 0);
        rig_sync(&rig);
        rig_compare(&rig);
        rig_free(&rig);
    }
}

static void a_failed_start_leaves_the_stamps_of_the_disk(void)
{
    synced();
    rig_close(&rig, true);
    rig_shell("rm -f %s/*", rig.shm);
    usleep(20000); /* past the granularity of file times */
    rig.config.shm_dir = "/nonexistent";
    CHECK(vrep_group_open(&rig.config, &rig.group) != VREP_OK);
    rig.group = NULL;
    rig.config.shm_dir = rig.shm;
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_CLEAN);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    rig_free(&rig);
}

static void a_full_ring_does_not_keep_an_unexplained_disk_from_starting(void)
{
    rig_init(&rig);
    rig_open(&rig);
    for (int i = 0; i < 1500; i++) /* more than there are descriptors; nobody takes them */
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, (uint64_t)(i % 1000) * 4096, 4096, i));
    rig_close(&rig, true);
    usleep(20000); /* past the granularity of file times */
    int fd = open(rig.disk, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, "x", 1, 0) == 1);
    close(fd);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_UNEXPLAINED);
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

/* The extents that a power loss would make unshipped are lost: what they stood for is synced first,
 * or everything is sent again. */
static void a_killed_filter_without_its_write_intent_syncs_before_it_goes_on(void)
{
    for (int fails = 0; fails < 2; fails++) {
        synced();
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 700000, 9000, 9));
        rig_kill(&rig);
        rig_shell("rm -f %s/intent", rig.state);
        arm(fails ? "recover.flush:1:io" : NULL);
        rig_open(&rig);
        arm(NULL);
        CHECK_EQ(rig_status(&rig).opened_as, fails ? VREP_OPENED_UNEXPLAINED : VREP_OPENED_KILLED);
        CHECK_EQ(rig_status(&rig).unverified != 0, fails);
        CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), fails ? VREP_E_IO : VREP_OK);
        rig_sync(&rig);
        rig_compare(&rig);
        rig_free(&rig);
    }
}

static void memory_of_an_earlier_place_is_not_taken_for_the_last_one(void)
{
    static char other[96];
    synced();
    snprintf(other, sizeof other, "%s/other", rig.root);
    CHECK_EQ(mkdir(other, 0700), 0);
    rig_close(&rig, true);
    rig.config.shm_dir = other;
    char ring[128];
    memcpy(ring, rig.ring, sizeof ring);
    snprintf(rig.ring, sizeof rig.ring, "%s/ring", other);
    rig_open(&rig);
    for (int i = 0; i < 12; i++) /* bits that only the second memory and the checkpoint know */
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, (uint64_t)(i % 3) << 20, 1 << 20, 0x40 + i));
    rig_close(&rig, true);
    rig.config.shm_dir = rig.shm;
    memcpy(rig.ring, ring, sizeof ring);
    rig_open(&rig);
    CHECK(rig_check_dirty(&rig) > 0);
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

int main(void)
{
    RUN(flushes_work_again_after_a_kill_past_the_repair);
    RUN(a_failed_flush_outlives_a_kill_until_it_is_repaired);
    RUN(a_start_killed_before_its_map_is_whole_leaves_none);
    RUN(a_start_killed_before_its_gap_begins_is_carried_on);
    RUN(a_replay_that_is_killed_is_carried_on);
    RUN(a_failed_start_leaves_the_stamps_of_the_disk);
    RUN(a_full_ring_does_not_keep_an_unexplained_disk_from_starting);
    RUN(a_killed_filter_without_its_write_intent_syncs_before_it_goes_on);
    RUN(memory_of_an_earlier_place_is_not_taken_for_the_last_one);
    return check_report();
}
