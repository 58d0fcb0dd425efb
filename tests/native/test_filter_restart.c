/* What each end of a filter leaves, and what the next start makes of it. */
#include <signal.h>
#include <sys/wait.h>

#include "filter/fault.h"
#include "filter/state.h"
#include "filter_rig.h"

static struct rig rig;

/* The open generation is sealed, and cleared by what is durable. */
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

static void write_some(int from, int count)
{
    for (int i = from; i < from + count; i++)
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, (uint64_t)(i % 40) * 100000 + 11, 9000, i));
}

static void clean_stop_goes_on(void)
{
    synced();
    write_some(1, 20);
    rig_close(&rig, true);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_CLEAN);
    CHECK_EQ(rig_status(&rig).gap, 0);
    write_some(50, 5);
    rig.seen_begin = false;
    rig_sync(&rig);
    CHECK(!rig.seen_begin);
    rig_compare(&rig);
    rig_free(&rig);
}

static void clean_reboot_without_backlog_has_no_gap(void)
{
    synced();
    write_some(1, 20);
    rig_settle(&rig);
    quiet();
    uint64_t head = rig_status(&rig).head;
    rig_close(&rig, true);
    rig_shell("rm -f %s/*", rig.shm);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_CLEAN);
    CHECK_EQ(rig_status(&rig).gap, 0);
    CHECK_EQ(rig_status(&rig).head, head);
    rig.seen_begin = false;
    write_some(3, 3);
    rig_sync(&rig);
    CHECK(!rig.seen_begin);
    rig_compare(&rig);
    rig_free(&rig);
}

static void clean_reboot_with_backlog_is_a_gap(void)
{
    synced();
    write_some(1, 20);
    uint64_t head = rig_status(&rig).head;
    rig_close(&rig, true);
    rig_shell("rm -f %s/*", rig.shm);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_CLEAN);
    CHECK_EQ(rig_status(&rig).gap, 1);
    CHECK_EQ(rig_status(&rig).head, head + 1);
    CHECK(rig_status(&rig).unshipped_bytes < RIG_BYTES);
    CHECK(rig_check_dirty(&rig) > 0);
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static void kill_resyncs_nothing_but_the_table(void)
{
    synced();
    write_some(1, 20);
    enum { N = 8 };
    bool done[N];
    struct vrep_command *commands[N];
    for (int i = 0; i < N; i++)
        commands[i] = rig_prepare(&rig, VREP_OP_WRITE, VREP_COMMAND_FUA, (uint64_t)i * 400000,
                                  50000, i, &done[i]);
    for (int i = 0; i < N; i++)
        vrep_command_submit(commands[i]); /* by a pool thread, and never seen to complete */
    struct vrep_ring_slot *torn = NULL;
    struct vrep_ring *ring = vrep_group_ring(rig.group);
    uint32_t granted = 0;
    for (uint32_t i = 0; i < vrep_ring_slots(ring); i++) {
        torn = vrep_ring_slot_at(ring, i);
        granted += torn->state == VREP_SLOT_GRANTED;
    }
    CHECK_EQ(granted, N);
    rig_kill(&rig);
    rig_open(&rig);
    struct vrep_group_status status = rig_status(&rig);
    CHECK_EQ(status.opened_as, VREP_OPENED_KILLED);
    CHECK_EQ(status.replayed, N);
    CHECK_EQ(status.gap, 0);
    CHECK_EQ(status.unshipped_bytes, 0);
    rig_check_dirty(&rig);
    rig.seen_begin = false;
    rig_sync(&rig);
    CHECK(!rig.seen_begin);
    CHECK(rig.last_flags & VREP_RECORD_REPLAY);
    rig_compare(&rig);
    rig_free(&rig);
}

static void power_loss_resyncs_extents_and_checkpoint(void)
{
    synced();
    /* A clean stop leaves a checkpoint without a bit: what follows is known by its extents alone.
     */
    rig_close(&rig, true);
    rig_open(&rig);
    write_some(1, 3);
    uint64_t head = rig_status(&rig).head;
    rig_power_loss(&rig);
    rig_open(&rig);
    struct vrep_group_status status = rig_status(&rig);
    CHECK_EQ(status.opened_as, VREP_OPENED_POWER_LOSS);
    CHECK_EQ(status.unverified, 0);
    CHECK_EQ(status.gap, 1);
    CHECK(status.head > head);
    rig_check_dirty(&rig);
    rig_attach(&rig);
    struct vrep_ring_desc desc;
    CHECK_OK(vrep_ring_reader_desc(rig.reader, status.head, &desc));
    CHECK_EQ(desc.kind, VREP_KIND_GAP_BEGIN);
    CHECK(desc.flags & VREP_RECORD_JUMP);
    rig_detach_reader(&rig);
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static void writes_past_the_filter_make_it_unverified(void)
{
    synced();
    rig_close(&rig, true);
    int fd = open(rig.disk, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, "stranger", 8, 3000000) == 8);
    close(fd);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_UNEXPLAINED);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_STAMPS);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BYTES);
    rig_sync(&rig);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    rig_compare(&rig);
    rig_free(&rig);
}

/* A copy that was restored, or another disk: its times say nothing after an unclean end, its inode
 * does. */
static void another_file_in_its_place_is_noticed(void)
{
    for (int end = 0; end < 3; end++) {
        synced();
        write_some(1, 3);
        if (end == 0)
            rig_close(&rig, true);
        else if (end == 1)
            rig_kill(&rig);
        else
            rig_power_loss(&rig);
        rig_shell("at=%s; cp $at $at.other && mv $at.other $at", rig.disk);
        int fd = open(rig.disk, O_WRONLY);
        CHECK(fd >= 0 && pwrite(fd, "older", 5, 3000000) == 5);
        close(fd);
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_UNEXPLAINED);
        CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_STAMPS);
        rig_check_dirty(&rig);
        rig_sync(&rig);
        CHECK_EQ(rig_status(&rig).unverified, 0);
        rig_compare(&rig);
        rig_free(&rig);
    }
}

static void lost_state_makes_it_unverified(void)
{
    synced();
    uint64_t head = rig_status(&rig).head;
    rig_power_loss(&rig);
    rig_shell("rm %s/intent", rig.state);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_INTENT);
    rig_kill(&rig);
    rig_shell("dd if=/dev/zero of=%s/state bs=16384 count=1 2>/dev/null", rig.state);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_STATE);
    CHECK(rig_status(&rig).head > head);
    rig_sync(&rig);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    rig_compare(&rig);
    rig_free(&rig);
}

static void target_that_lost_history_needs_a_new_beginning(void)
{
    synced();
    write_some(1, 20);
    rig_settle(&rig);
    rig_detach_reader(&rig);
    int fds[3];
    CHECK_STATUS(
        vrep_group_consumer_attach(rig.group, VREP_CONTROL_TARGET, rig.config.target_id, 2, fds),
        VREP_E_GONE);
    CHECK_STATUS(vrep_group_consumer_attach(rig.group, VREP_CONTROL_TARGET, rig.config.target_id,
                                            1u << 30, fds),
                 VREP_E_INVALID);
    CHECK_OK(vrep_group_lose_ring(rig.group));
    CHECK_OK(vrep_group_resync(rig.group, true, 0, true));
    memset(rig.shadow, 0xcc, RIG_BYTES);
    rig.applied = 2;
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

/* It waits for copies in flight; who asked for it ended meanwhile, and the next one finds all that
 * it needs: the copies that were held back go on, or no gap would ever end. */
static void nobody_waits_for_who_wanted_the_ring_lost(void)
{
    rig_init(&rig);
    rig_preset(&rig, 5);
    rig_open(&rig);
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    int status = VREP_OK;
    time_t until = time(NULL) + 60;
    while (status != VREP_E_AGAIN && time(NULL) < until) {
        vrep_group_poll(rig.group);
        status = vrep_group_lose_ring(rig.group);
        usleep(100); /* no copy begins before the worker has had its turn, and found the data */
    }
    CHECK_STATUS(status, VREP_E_AGAIN);
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

/* Of a mark that was not known to be durable: a later durable position proves nothing about it once
 * a gap begins behind it, also one that has ended since, in a filter that ended since. */
static void a_gap_behind_a_mark_is_never_forgotten(void)
{
    uint64_t mark;
    synced();
    CHECK_OK(vrep_group_mark(rig.group, "", 0, &mark));
    rig_kill(&rig);
    rig_open(&rig);
    CHECK(rig_status(&rig).gap_last > 0);
    CHECK(rig_status(&rig).gap_last < mark);
    CHECK_OK(vrep_group_lose_ring(rig.group));
    CHECK(rig_status(&rig).gap_last > mark);
    rig_sync(&rig);
    CHECK_EQ(rig_status(&rig).gap, 0);
    rig_kill(&rig);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).gap, 0);
    CHECK(rig_status(&rig).durable > mark);
    CHECK(rig_status(&rig).gap_last > mark);
    CHECK_OK(vrep_group_mark(rig.group, "", 0, &mark));
    CHECK(rig_status(&rig).gap_last < mark);
    rig_power_loss(&rig);
    rig_open(&rig);
    CHECK(rig_status(&rig).durable > mark); /* as a ring that began above it has it */
    CHECK(rig_status(&rig).gap_last > mark);
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

/* The locks belong to open file descriptions, so a second opener in this process is refused as one
 * in another would be. */
static void only_one_opens_a_group(void)
{
    synced();
    struct vrep_group *second;
    CHECK_STATUS(vrep_group_open(&rig.config, &second), VREP_E_LOCKED);
    rig_free(&rig);
}

static void ring_of_another_size_goes_on(void)
{
    synced();
    rig_close(&rig, true);
    rig.config.slots = 200; /* the ring that is there has 64, and its own */
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_CLEAN);
    struct vrep_command *commands[200];
    unsigned got = 0;
    while (got < 200 && (commands[got] = vrep_command_get(rig.group)) != NULL)
        got++;
    CHECK_EQ(got, 64);
    while (got > 0)
        vrep_command_put(commands[--got]);
    write_some(1, 100);
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static void turn(void)
{
    usleep(2000);
    vrep_group_poll(rig.group);
}

/* Until the durable state says that this was acknowledged. */
static void await_acknowledged(uint64_t seq)
{
    char path[128];
    struct vrep_state state = {0};
    time_t until = time(NULL) + 60;
    snprintf(path, sizeof path, "%s/state", rig.state);
    do {
        turn();
        CHECK_OK(vrep_state_load(path, rig.config.group_id, &state));
    } while (state.durable_seq != seq && time(NULL) < until);
    CHECK_EQ(state.durable_seq, seq);
}

/* Until a checkpoint of this process knows of it. */
static void await_checkpoint(uint64_t acknowledged)
{
    char path[128];
    struct vrep_checkpoint_header header = {0};
    time_t until = time(NULL) + 60;
    for (int which = 0; header.durable != acknowledged && time(NULL) < until; which = 1 - which) {
        turn();
        snprintf(path, sizeof path, "%s/map.%d", rig.state, which);
        int fd = open(path, O_RDONLY);
        CHECK(fd >= 0);
        if (pread(fd, &header, sizeof header, 0) != sizeof header)
            header.durable = 0; /* it was not written yet */
        close(fd);
    }
    CHECK_EQ(header.durable, acknowledged);
}

/* Until all that was marked by commands is in a checkpoint. */
static void await_marks(void)
{
    time_t until = time(NULL) + 60;
    while (rig_status(&rig).marks_unstored && time(NULL) < until)
        turn();
    CHECK_EQ(rig_status(&rig).marks_unstored, 0);
}

/* Whether a target holds what it must can be asked after every kind of end. */
static void acknowledged_survives(void)
{
    for (int power = 0; power < 2; power++) {
        synced();
        uint64_t known = rig_status(&rig).acknowledged;
        CHECK_EQ(known, rig_status(&rig).head);
        if (power)
            rig_close(&rig, true);
        else
            rig_kill(&rig);
        if (power)
            rig_shell("rm -f %s/*", rig.shm);
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).acknowledged, known);
        CHECK_OK(vrep_group_resync(rig.group, true, 0, true));
        CHECK_EQ(rig_status(&rig).acknowledged, 0);
        await_acknowledged(0);
        rig_kill(&rig);
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).acknowledged, 0);
        rig_free(&rig);
    }
}

/* The state file is written seldom.  A checkpoint whose bits an acknowledgement has cleared knows
 * of it: a target that lost its store meanwhile must not pass for one that never had anything. */
static void power_loss_forgets_no_acknowledgement_that_cleared_bits(void)
{
    rig_init(&rig);
    rig.config.checkpoint_ns = 20000000;
    rig_open(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 200000, 7));
    rig_sync(&rig);
    uint64_t stored = rig_status(&rig).acknowledged;
    rig_shell("cd %s && cp -r state older", rig.root);
    write_some(1, 20);
    rig_settle(&rig);
    quiet();
    uint64_t known = rig_status(&rig).acknowledged;
    CHECK(known >= stored + 20);
    await_checkpoint(known);
    rig_power_loss(&rig);
    rig_shell("cd %s && cp older/state* state/", rig.root);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_POWER_LOSS);
    CHECK_EQ(rig_status(&rig).acknowledged, known);
    /* Once more, with nothing acknowledged in between, and other checkpoints. */
    await_marks();
    for (int i = 0; i < 150; i++)
        turn();
    rig_power_loss(&rig);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).acknowledged, known);
    CHECK_OK(vrep_group_resync(rig.group, false, 0, true));
    await_acknowledged(0);
    await_marks();
    rig_power_loss(&rig);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).acknowledged, 0);
    rig_free(&rig);
}

/* What the source keeps on its own disk is let go of, and nothing else: bits stay until the target
 * holds it, however often the filter is killed. */
static void spilled_frees_the_ring_and_clears_no_bit(void)
{
    synced();
    uint64_t durable = rig_status(&rig).durable,
             most = vrep_ring_free_bytes(vrep_group_ring(rig.group));
    for (int round = 0; round < 40; round++) { /* several times what the ring holds */
        write_some(round * 40, 40);
        rig_apply(&rig, false); /* the shadow stands for spill and target */
        vrep_ring_reader_set(rig.reader, 0, 0, 0, rig.applied);
        vrep_group_poll(rig.group);
    }
    struct vrep_group_status status = rig_status(&rig);
    CHECK_EQ(status.gap, 0);
    CHECK_EQ(status.released, status.head);
    CHECK_EQ(vrep_ring_free_bytes(vrep_group_ring(rig.group)), most);
    CHECK_EQ(status.durable, durable);
    CHECK_EQ(status.acknowledged, durable);
    CHECK(status.oldest_ns != 0);
    CHECK(vrep_group_dirty_bytes(rig.group) >= 40 * 9000);
    for (int kill = 0; kill < 2; kill++) {
        rig_kill(&rig);
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).durable, durable);
        CHECK_EQ(rig_status(&rig).acknowledged, durable);
        CHECK_EQ(rig_status(&rig).oldest_ns, status.oldest_ns);
        CHECK_EQ(rig_status(&rig).gap, 0);
        CHECK(vrep_group_dirty_bytes(rig.group) >= 40 * 9000);
    }
    uint64_t head = rig_status(&rig).head;
    rig.applied = durable;
    rig_attach(&rig);
    CHECK_EQ(rig_status(&rig).durable, durable);
    vrep_ring_reader_set(rig.reader, head, head, head, 0);
    vrep_group_poll(rig.group);
    CHECK_EQ(rig_status(&rig).durable, head);
    CHECK_EQ(rig_status(&rig).oldest_ns, 0);
    quiet();
    rig_compare(&rig);
    rig_free(&rig);
}

static void older_epoch_is_fenced(void)
{
    synced();
    rig_close(&rig, true);
    rig.config.epoch = 2;
    rig.config.epoch_id[0] = 9;
    rig_open(&rig);
    rig_close(&rig, true);
    rig.config.epoch = 1;
    CHECK_STATUS(vrep_group_open(&rig.config, &rig.group), VREP_E_FENCED);
    rig.group = NULL;
    rig_free(&rig);
}

static void another_epoch_of_the_same_number_begins_anew(void)
{
    synced();
    rig_close(&rig, true);
    rig.config.epoch_id[0] = 9;
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_NEW);
    rig_free(&rig);
}

/* A site that took a group over begins behind what its epoch left: no position is used again. */
static void a_group_without_state_begins_where_it_is_told(void)
{
    rig_init(&rig);
    rig.config.first_seq = 1000;
    rig_open(&rig);
    struct vrep_group_status status = rig_status(&rig);
    CHECK_EQ(status.opened_as, VREP_OPENED_NEW);
    CHECK_EQ(status.head, 1001);
    CHECK_EQ(status.gap_seq, 1001);
    CHECK_EQ(status.unshipped_bytes, status.total_bytes);
    rig_close(&rig, true);
    rig_open(&rig); /* what it counted itself counts more */
    CHECK(rig_status(&rig).opened_as != VREP_OPENED_NEW);
    CHECK(rig_status(&rig).head > 1000);
    rig_free(&rig);
}

/* A failover was rolled back while this site's filter was down: what is dirty is known. */
static void newer_epoch_goes_on(void)
{
    static const enum vrep_opened ends[] = {VREP_OPENED_CLEAN, VREP_OPENED_KILLED,
                                            VREP_OPENED_POWER_LOSS};
    for (unsigned i = 0; i < 3; i++) {
        synced();
        write_some(9, 20); /* not applied by the target yet */
        if (ends[i] == VREP_OPENED_CLEAN)
            rig_close(&rig, true);
        else
            rig_kill(&rig);
        if (ends[i] == VREP_OPENED_POWER_LOSS)
            rig_shell("rm -f %s/*", rig.shm);
        rig.config.epoch = 2;
        rig.config.epoch_id[0] = 9;
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).opened_as, ends[i]);
        CHECK_EQ(rig_status(&rig).unverified, 0);
        CHECK_EQ(vrep_ring_header(vrep_group_ring(rig.group))->epoch, 2);
        if (ends[i] != VREP_OPENED_POWER_LOSS)
            CHECK_EQ(rig_status(&rig).unshipped_bytes, 0);
        rig_check_dirty(&rig);
        rig_sync(&rig);
        rig_compare(&rig);
        rig_close(&rig, true); /* and again: the ring that was changed is whole */
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_CLEAN);
        rig_free(&rig);
    }
}

/* ---- kills at named points ------------------------------------------------------ */

static void child_writes(const char *fault)
{
    setenv("VREP_FAULT", fault, 1);
    vrep_fault_prepare();
    CHECK_OK(vrep_group_open(&rig.config, &rig.group));
    rig.reader = NULL;
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    /* Long enough for a busy machine: the worker must get its turn before the last points. */
    time_t until = time(NULL) + 30;
    for (int i = 0; time(NULL) < until; i++) {
        uint64_t length = 1 + check_random_below(60000);
        uint64_t offset = check_random_below(RIG_BYTES - length);
        uint8_t op = i % 9 == 4 ? VREP_OP_ZERO : VREP_OP_WRITE;
        CHECK_OK(rig_run(&rig, op, 0, offset, length, i));
        if (i > 400 && i % 3 == 0)
            rig_apply(&rig, true); /* late: the ring overflows first */
    }
    _exit(3); /* the point was never passed */
}

static const char *const points[] = {
    "tap.after_grant:40:kill",       "tap.after_stage:41:kill",     "tap.after_raise:42:kill",
    "tap.after_commit:43:kill",      "tap.before_done:44:kill",     "gap.after_flag:1:kill",
    "gap.after_stage:1:kill",        "gap.after_commit:1:kill",     "gap.after_stage:2:kill",
    "gap.after_commit:2:kill",       "sync.after_grant:3:kill",     "sync.after_publish:3:kill",
    "sync.after_clear:3:kill",       "consumer.after_clear:3:kill", "intent.write:1:kill",
    "tap.after_stage:700:kill",      "tap.after_grant:900:kill",    "state.write:2:kill",
    "consumer.after_release:3:kill",
};

static void kills_at_every_point_lose_nothing(void)
{
    for (unsigned p = 0; p < sizeof points / sizeof *points; p++) {
        for (int power = 0; power < 2; power++) {
            synced();
            rig_close(&rig, true);
            /* Without the child's reader the parent knows what the target had: nothing new. */
            uint64_t applied = rig.applied;
            pid_t child = fork();
            if (child == 0) {
                check_seed(1000 + p);
                child_writes(points[p]);
            }
            int status;
            CHECK(waitpid(child, &status, 0) == child);
            if (!WIFSIGNALED(status))
                fprintf(stderr, "%s (power %d): status %d\n", points[p], power, status);
            CHECK(WIFSIGNALED(status));
            CHECK_EQ(WTERMSIG(status), SIGKILL);
            if (power)
                rig_shell("rm -f %s/*", rig.shm);
            rig_open(&rig);
            CHECK_EQ(rig_status(&rig).opened_as,
                     power ? VREP_OPENED_POWER_LOSS : VREP_OPENED_KILLED);
            CHECK_EQ(rig_status(&rig).unverified, 0);
            uint64_t released = rig_status(&rig).released;
            if (released > applied) { /* the child's own target had it; here it starts anew */
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
    RUN(clean_stop_goes_on);
    RUN(clean_reboot_without_backlog_has_no_gap);
    RUN(clean_reboot_with_backlog_is_a_gap);
    RUN(kill_resyncs_nothing_but_the_table);
    RUN(power_loss_resyncs_extents_and_checkpoint);
    RUN(writes_past_the_filter_make_it_unverified);
    RUN(another_file_in_its_place_is_noticed);
    RUN(lost_state_makes_it_unverified);
    RUN(target_that_lost_history_needs_a_new_beginning);
    RUN(nobody_waits_for_who_wanted_the_ring_lost);
    RUN(a_gap_behind_a_mark_is_never_forgotten);
    RUN(only_one_opens_a_group);
    RUN(ring_of_another_size_goes_on);
    RUN(acknowledged_survives);
    RUN(power_loss_forgets_no_acknowledgement_that_cleared_bits);
    RUN(spilled_frees_the_ring_and_clears_no_bit);
    RUN(older_epoch_is_fenced);
    RUN(another_epoch_of_the_same_number_begins_anew);
    RUN(a_group_without_state_begins_where_it_is_told);
    RUN(newer_epoch_goes_on);
    RUN(kills_at_every_point_lose_nothing);
    return check_report();
}
