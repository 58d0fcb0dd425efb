/* A VM wrote the disks while no filter was there to see it, after an end that was not clean. */
#include <sys/file.h>
#include <time.h>

#include "base/shared.h"
#include "disk/disk.h"
#include "filter/state.h"
#include "filter_rig.h"

static struct rig rig;

static void synced(void)
{
    rig_init(&rig);
    rig_preset(&rig, 3);
    rig_open(&rig);
    rig_sync(&rig);
}

static void stranger_writes(void)
{
    int fd = open(rig.disk, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, "stranger", 8, 3000000) == 8);
    close(fd);
}

static void expect_compared(uint32_t reason)
{
    rig_open(&rig);
    struct vrep_group_status status = rig_status(&rig);
    CHECK_EQ(status.opened_as, VREP_OPENED_UNEXPLAINED);
    CHECK_EQ(status.unverified, reason);
    CHECK_EQ(status.gap, 1);
    CHECK_EQ(status.unshipped_bytes, RIG_BYTES);
    rig_sync(&rig);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    rig_compare(&rig);
    rig_close(&rig, true); /* once it was compared it is believed again */
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_CLEAN);
    rig_free(&rig);
}

/* The shared memory is whole, and explains nothing of it. */
static void who_holds_the_image_of_a_killed_filter_is_remembered(void)
{
    for (int power = 0; power < 2; power++) {
        synced();
        if (power)
            rig_power_loss(&rig);
        else
            rig_kill(&rig);
        struct vrep_engine *engine;
        struct vrep_disk *vm;
        CHECK_OK(vrep_engine_create(1, &engine));
        CHECK_OK(vrep_disk_open(engine, rig.uri, 0, &vm));
        CHECK_STATUS(vrep_group_open(&rig.config, &rig.group), VREP_E_LOCKED);
        rig.group = NULL;
        CHECK_OK(vrep_group_note_past(rig.config.group_id, rig.shm, rig.state));
        CHECK_OK(vrep_group_note_past(rig.config.group_id, rig.shm, rig.state));
        stranger_writes();
        vrep_disk_close(vm);
        vrep_engine_destroy(engine);
        expect_compared(VREP_UNVERIFIED_PAST);
    }
}

static void a_filter_that_lives_is_no_stranger(void)
{
    synced();
    CHECK_STATUS(vrep_group_note_past(rig.config.group_id, rig.shm, rig.state), VREP_E_LOCKED);
    rig_kill(&rig);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_KILLED);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    rig_free(&rig);
}

static void a_group_that_was_never_open_has_nothing_to_remember(void)
{
    rig_init(&rig);
    CHECK_OK(vrep_group_note_past(rig.config.group_id, rig.shm, rig.state));
    CHECK_OK(vrep_group_note_past(rig.config.group_id, NULL, rig.state));
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_NEW);
    rig_free(&rig);
}

static void change_state(void (*change)(struct vrep_state *state, int64_t argument),
                         int64_t argument)
{
    char path[128];
    struct vrep_state state;
    struct vrep_state_file file;
    snprintf(path, sizeof path, "%s/state", rig.state);
    CHECK_OK(vrep_state_load(path, rig.config.group_id, &state));
    change(&state, argument);
    CHECK_OK(vrep_state_open(path, &file));
    CHECK_OK(vrep_state_write(&file, &state));
    vrep_state_close(&file);
}

static void set_boot(struct vrep_state *state, int64_t id)
{
    memset(state->boot_id, (int)id, sizeof state->boot_id);
}

/* The state is that of a filter in an earlier boot; zero: of a release that did not store which. */
static void be_of_boot(int id)
{
    change_state(set_boot, id);
}

static void set_written(struct vrep_state *state, int64_t ns)
{
    state->disk[0].mtime_ns = (uint64_t)ns;
}

static void set_changed_later(struct vrep_state *state, int64_t ns)
{
    state->disk[0].ctime_ns += (uint64_t)ns;
}

/* A tool that keeps times wrote it last. */
static void written_at(time_t seconds)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = seconds}};
    CHECK(utimensat(AT_FDCWD, rig.disk, times, 0) == 0);
}

static time_t before_this_boot(void)
{
    struct timespec now, up;
    clock_gettime(CLOCK_REALTIME, &now);
    clock_gettime(CLOCK_BOOTTIME, &up);
    return now.tv_sec - up.tv_sec - 60;
}

/* When the filter before opened it, too. */
static void written_before_this_boot(void)
{
    written_at(before_this_boot());
    change_state(set_written, before_this_boot() * INT64_C(1000000000));
}

static void who_wrote_between_boot_and_filter_is_noticed(void)
{
    synced();
    rig_power_loss(&rig);
    be_of_boot(7);
    stranger_writes();
    expect_compared(VREP_UNVERIFIED_PAST);
}

static void power_loss_alone_costs_no_compare(void)
{
    for (int id = 0; id < 2; id++) {
        synced();
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 4096, 9));
        rig_power_loss(&rig);
        be_of_boot(id);
        if (id > 0)
            written_before_this_boot();
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_POWER_LOSS);
        CHECK_EQ(rig_status(&rig).unverified, 0);
        rig_sync(&rig);
        rig_compare(&rig);
        rig_free(&rig);
    }
}

/* A copy is restored over the disk, or its storage is taken back to before the last open: the file
 * is the same one, and its times say so, the change map does not. */
static void what_is_older_than_at_the_last_open_is_not_believed(void)
{
    for (int i = 0; i < 4; i++) {
        synced();
        CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 4096, 9));
        if (i % 2 == 0)
            rig_kill(&rig);
        else
            rig_power_loss(&rig);
        if (i == 1)
            be_of_boot(7);
        stranger_writes();
        if (i < 2)
            written_at(before_this_boot());
        else
            change_state(set_changed_later, INT64_C(3600) * 1000000000);
        expect_compared(VREP_UNVERIFIED_STAMPS);
    }
}

int main(void)
{
    RUN(who_holds_the_image_of_a_killed_filter_is_remembered);
    RUN(a_filter_that_lives_is_no_stranger);
    RUN(a_group_that_was_never_open_has_nothing_to_remember);
    RUN(who_wrote_between_boot_and_filter_is_noticed);
    RUN(power_loss_alone_costs_no_compare);
    RUN(what_is_older_than_at_the_last_open_is_not_believed);
    return check_report();
}
