/* Backing stores that fail: rules 3 and 10, invariant 6, and the state file. */
#include "base/atomic.h"
#include "filter/fault.h"
#include "filter/internal.h"
#include "filter/state.h"
#include "filter_rig.h"

#include <sys/syscall.h>
#include <sys/uio.h>

static struct rig rig;

/* Between the library and the kernel: what really reaches the backing. */
static int dsync_writes, syncs;

ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    if (flags & RWF_DSYNC)
        __atomic_fetch_add(&dsync_writes, 1, __ATOMIC_ACQ_REL);
    return syscall(SYS_pwritev2, fd, iov, count, offset, 0, flags);
}

int fdatasync(int fd)
{
    char name[64], path[256];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1);
    path[length > 0 ? length : 0] = '\0';
    if (strcmp(path, rig.disk) == 0)
        __atomic_fetch_add(&syncs, 1, __ATOMIC_ACQ_REL);
    return (int)syscall(SYS_fdatasync, fd);
}

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
    arm(NULL);
    rig_init(&rig);
    rig_open(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 300000, 7));
    rig_sync(&rig);
    rig.seen_begin = rig.seen_end = false;
    memset(rig.kinds, 0, sizeof rig.kinds);
}

static void failed_write_ships_what_is_there(void)
{
    synced();
    arm("backing.write:1:io");
    CHECK_STATUS(rig_run(&rig, VREP_OP_WRITE, 0, 1000, 5000, 9), VREP_E_IO);
    rig_apply(&rig, true);
    CHECK_EQ(rig.kinds[VREP_KIND_SYNC], 1);
    CHECK_EQ(rig.kinds[VREP_KIND_WRITE], 0);
    CHECK_EQ(rig_status(&rig).gap, 0);
    CHECK_EQ(rig_status(&rig).errors, 1);
    rig_compare(&rig);
    rig_free(&rig);
}

static void failed_write_that_cannot_be_read_is_a_gap(void)
{
    synced();
    arm("backing.write:1:io,backing.read:1:io");
    CHECK_STATUS(rig_run(&rig, VREP_OP_WRITE, 0, 1000, 5000, 9), VREP_E_IO);
    CHECK_EQ(rig_status(&rig).gap, 1);
    CHECK(rig_status(&rig).unshipped_bytes >= RIG_BIT || rig_status(&rig).resync_bytes > 0);
    rig_settle(&rig);
    CHECK(rig.seen_begin && rig.seen_end);
    rig_compare(&rig);
    rig_free(&rig);
}

static void failed_zero_is_a_gap(void)
{
    synced();
    arm("backing.zero:1:io");
    CHECK_STATUS(rig_run(&rig, VREP_OP_ZERO, 0, 1000, 100000, 0), VREP_E_IO);
    rig_settle(&rig);
    CHECK(rig.seen_begin && rig.seen_end);
    rig_compare(&rig);
    rig_free(&rig);
}

static void failed_flush_is_not_retried_into_success(void)
{
    synced();
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 65536, 65536, 1));
    CHECK_OK(vrep_group_resync(rig.group, false, 0, false));
    arm("backing.flush:1:io");
    CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
    CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
    struct vrep_group_status status = rig_status(&rig);
    CHECK_EQ(status.flush_failed, 1);
    CHECK_EQ(status.unverified, VREP_UNVERIFIED_FLUSH);
    CHECK_EQ(status.gap, 1);
    CHECK(status.unshipped_bytes >= RIG_BIT);
    CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
    /* A stop in this state is not clean. */
    rig_close(&rig, true);
    rig_open(&rig);
    status = rig_status(&rig);
    CHECK_EQ(status.opened_as, VREP_OPENED_KILLED);
    CHECK_EQ(status.unverified, VREP_UNVERIFIED_FLUSH);
    CHECK_EQ(status.flush_failed, 1);
    CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
    rig_sync(&rig);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    rig_compare(&rig);
    rig_free(&rig);
}

static void failed_copy_leaves_the_block_unshipped(void)
{
    arm(NULL);
    rig_init(&rig);
    rig_preset(&rig, 7);
    rig_open(&rig);
    arm("backing.read:1:io");
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    rig_settle(&rig);
    CHECK(rig_status(&rig).errors >= 1);
    rig_compare(&rig);
    rig_free(&rig);
}

static void cold_writes_wait_for_the_intent(void)
{
    arm(NULL);
    rig_init(&rig);
    arm("intent.write:1:io");
    rig_open(&rig);
    bool done;
    struct vrep_command *command = rig_prepare(&rig, VREP_OP_WRITE, 0, 0, 4096, 1, &done);
    vrep_command_submit(command);
    uint64_t errors = rig_status(&rig).errors;
    time_t until = time(NULL) + 60;
    while (rig_status(&rig).errors == errors && time(NULL) < until) {
        usleep(1000);
        vrep_group_poll(rig.group);
    }
    CHECK_EQ(rig_status(&rig).errors, errors + 1);
    CHECK(!done); /* the first sync failed: nothing may reach the disk before the second */
    uint8_t byte;
    int fd = open(rig.disk, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, &byte, 1, 0) == 1);
    close(fd);
    CHECK_EQ(byte, 0);
    rig_wait(&rig, &done); /* the second is a second later */
    CHECK_OK(command->status);
    vrep_command_put(command);
    rig_free(&rig);
}

static void state_survives_a_torn_write(void)
{
    arm(NULL);
    rig_init(&rig);
    char path[128];
    snprintf(path, sizeof path, "%s/state", rig.state);
    struct vrep_state_file file;
    struct vrep_state state = {.disks = 1, .group_id = {1}}, loaded;
    CHECK_STATUS(vrep_state_load(path, state.group_id, &loaded), VREP_E_NOT_FOUND);
    CHECK_OK(vrep_state_open(path, &file));
    CHECK_STATUS(vrep_state_load(path, state.group_id, &loaded), VREP_E_CORRUPT);
    for (uint64_t i = 1; i <= 5; i++) {
        state.seq_limit = i;
        CHECK_OK(vrep_state_write(&file, &state));
    }
    vrep_state_close(&file);
    CHECK_OK(vrep_state_load(path, state.group_id, &loaded));
    CHECK_EQ(loaded.seq_limit, 5);
    /* The newest slot is torn: the one before it counts. */
    int fd = open(path, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, "torn", 4, (off_t)(loaded.counter % 2) * 8192 + 4000) == 4);
    close(fd);
    CHECK_OK(vrep_state_load(path, state.group_id, &loaded));
    CHECK_EQ(loaded.seq_limit, 4);
    uint8_t other[16] = {2};
    CHECK_STATUS(vrep_state_load(path, other, &loaded), VREP_E_INVALID);
    rig_shell("rm -rf %s", rig.root);
}

static void misspelt_faults_arm_nothing(void)
{
    arm("tap.after_stage:kill");
    CHECK(!vrep_fault_armed);
    arm("a.point:2:io");
    CHECK(vrep_fault_armed);
    CHECK_OK(vrep_fault("a.point"));
    CHECK_OK(vrep_fault("another"));
    CHECK_STATUS(vrep_fault("a.point"), VREP_E_IO);
    CHECK_OK(vrep_fault("a.point"));
    arm(NULL);
    CHECK(!vrep_fault_armed);
}

static void flush_and_fua_reach_the_backing(void)
{
    synced();
    dsync_writes = syncs = 0;
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 4096, 1));
    CHECK_EQ(dsync_writes, 0);
    CHECK_EQ(syncs, 0);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, VREP_COMMAND_FUA, 0, 4096, 2));
    CHECK(dsync_writes + syncs > 0);
    syncs = 0;
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    CHECK_EQ(syncs, 1);
    CHECK_OK(rig_run(&rig, VREP_OP_ZERO, VREP_COMMAND_FUA, 8192, 4096, 0));
    CHECK(dsync_writes + syncs > 2);
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static uint32_t let_go;

static int hold(struct vrep_job *job)
{
    (void)job;
    while (vrep_load_acquire_u32(&let_go) == 0)
        usleep(100);
    return VREP_OK;
}

static void held(struct vrep_job *job)
{
    (void)job;
}

/* After a failed sync the page cache may show what is not on the disk: no copy reads it before it
 * was dropped, and the gap does not end before. */
static void no_copy_believes_the_cache_after_a_failed_flush(void)
{
    synced();
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 65536, 65536, 1));
    struct vrep_job job = {.run = hold, .done = held};
    vrep_worker_post(rig.group->prober, &job);
    arm("backing.flush:1:io");
    CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
    arm(NULL);
    CHECK_OK(vrep_group_resync(rig.group, false, 0, false));
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    for (int i = 0; i < 100; i++) {
        usleep(200);
        rig_apply(&rig, true);
        vrep_group_poll(rig.group);
    }
    CHECK_EQ(rig_status(&rig).resync_bytes, 0);
    CHECK_EQ(rig_status(&rig).gap, 1);
    /* Whatever a copy would ask of that thread comes behind the drop. */
    CHECK(rig.group->forget_job.busy && !rig.group->probe_job.busy);
    vrep_store_release_u32(&let_go, 1);
    rig_sync(&rig);
    CHECK(rig_status(&rig).resync_bytes >= RIG_BIT);
    CHECK_EQ(rig_status(&rig).flush_failed, 0);
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    rig_compare(&rig);
    rig_free(&rig);
}

/* Nothing was written since the last good flush: nothing has to be copied, and the gap ends too. */
static void failed_flush_of_nothing_ends(void)
{
    rig_init(&rig);
    rig_open(&rig);
    rig_sync(&rig);
    arm("backing.flush:1:io");
    CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
    arm(NULL);
    CHECK_EQ(rig_status(&rig).gap, 1);
    rig_sync(&rig);
    CHECK_EQ(rig_status(&rig).gap, 0);
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    rig_compare(&rig);
    rig_free(&rig);
}

int main(void)
{
    RUN(failed_write_ships_what_is_there);
    RUN(failed_write_that_cannot_be_read_is_a_gap);
    RUN(failed_zero_is_a_gap);
    RUN(failed_flush_is_not_retried_into_success);
    RUN(failed_flush_of_nothing_ends);
    RUN(no_copy_believes_the_cache_after_a_failed_flush);
    RUN(failed_copy_leaves_the_block_unshipped);
    RUN(cold_writes_wait_for_the_intent);
    RUN(state_survives_a_torn_write);
    RUN(misspelt_faults_arm_nothing);
    RUN(flush_and_fua_reach_the_backing);
    return check_report();
}
