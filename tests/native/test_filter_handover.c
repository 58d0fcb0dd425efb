/* Images pass from a running VM to the filter and back: a second description with QEMU's lock bytes
 * stands for the VM's. */
#include "disk/disk.h"
#include "filter_rig.h"

static struct rig rig;

static void vm_lock(int fd, short type)
{
    static const int bytes[] = {100, 101, 201}; /* reads, writes, shares no writing */
    for (size_t i = 0; i < sizeof bytes / sizeof bytes[0]; i++) {
        struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = bytes[i], .l_len = 1};
        CHECK(fcntl(fd, F_OFD_SETLK, &lock) == 0);
    }
}

/* What QEMU looks at before it takes them: who does not share what it wants, who writes. */
static bool vm_may(int fd)
{
    static const int bytes[] = {200, 201, 101};
    for (size_t i = 0; i < sizeof bytes / sizeof bytes[0]; i++) {
        struct flock lock = {
            .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = bytes[i], .l_len = 1};
        CHECK(fcntl(fd, F_OFD_GETLK, &lock) == 0);
        if (lock.l_type != F_UNLCK)
            return false;
    }
    return true;
}

static int vm_start(void)
{
    int fd = open(rig.disk, O_RDWR);
    CHECK(fd >= 0);
    CHECK(vm_may(fd));
    vm_lock(fd, F_RDLCK);
    return fd;
}

static void vm_write(int fd, uint64_t offset, int fill)
{
    static uint8_t data[RIG_BIT];
    memset(data, fill, sizeof data);
    CHECK(pwrite(fd, data, sizeof data, (off_t)offset) == (ssize_t)sizeof data);
}

static void polls(int count)
{
    for (int i = 0; i < count; i++) {
        vrep_group_poll(rig.group);
        if (rig.reader != NULL)
            rig_apply(&rig, true);
        usleep(1000);
    }
}

static bool starts(uint8_t op)
{
    struct vrep_command *command = vrep_command_get(rig.group);
    CHECK(command != NULL);
    command->op = op;
    command->offset = 0;
    command->length = 4096;
    int status = vrep_command_prepare(command);
    CHECK(status == VREP_OK || status == VREP_E_AGAIN);
    vrep_command_put(command);
    return status == VREP_OK;
}

static void hand_over(void)
{
    rig.config.flags |= VREP_GROUP_HANDOVER;
    rig_open(&rig);
    rig.config.flags &= ~VREP_GROUP_HANDOVER;
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_IN);
}

static void nothing_starts_or_is_copied_before_the_vm_lets_go(void)
{
    rig_init(&rig);
    rig_preset(&rig, 3);
    int vm = vm_start();
    CHECK_EQ(vrep_group_open(&rig.config, &rig.group), VREP_E_LOCKED);
    hand_over();
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    CHECK(!starts(VREP_OP_WRITE) && !starts(VREP_OP_READ) && !starts(VREP_OP_ZERO));
    CHECK_EQ(rig_status(&rig).handover_waiting, 1);
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    for (int i = 0; i < 30; i++) { /* the VM writes on; a copy made now would be old */
        vm_write(vm, (uint64_t)i * RIG_BIT, 100 + i);
        polls(1);
    }
    CHECK_EQ(rig_status(&rig).resync_bytes, 0);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BYTES);
    CHECK(!starts(VREP_OP_WRITE));
    uint64_t seq;
    CHECK_EQ(vrep_group_mark(rig.group, "x", 1, &seq), VREP_E_GONE);
    vm_lock(vm, F_UNLCK);
    /* The first command comes through at once, without a turn of the loop. */
    bool done;
    struct vrep_command *command = rig_prepare(&rig, VREP_OP_WRITE, 0, 0, 4096, 9, &done);
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_NONE);
    CHECK(!vm_may(vm));
    vrep_command_submit(command);
    for (int i = 0; !done && i < 30000; i++)
        polls(1);
    CHECK_OK(command->status);
    vrep_command_put(command);
    rig_settle(&rig);
    rig_compare(&rig);
    CHECK(rig_check_dirty(&rig) == 0);
    close(vm);
    rig_free(&rig);
}

static void an_idle_vm_is_noticed_too(void)
{
    rig_init(&rig);
    int vm = vm_start();
    hand_over();
    polls(5);
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_IN);
    close(vm);
    polls(3);
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_NONE);
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static void a_disk_that_nobody_has_open_is_refused(void)
{
    rig_init(&rig);
    rig.config.flags |= VREP_GROUP_HANDOVER;
    CHECK_EQ(vrep_group_open(&rig.config, &rig.group), VREP_E_GONE);
    rig.config.flags &= ~VREP_GROUP_HANDOVER;
    int vm = vm_start(); /* and no lock stays */
    close(vm);
    rig_free(&rig);
}

/* A group that was synced, let go of, and written past. */
static void another_vm_cannot_take_the_image_meanwhile(void)
{
    rig_init(&rig);
    int vm = vm_start();
    hand_over();
    vm_lock(vm, F_UNLCK);
    int other = open(rig.disk, O_RDWR);
    CHECK(other >= 0 && !vm_may(other));
    close(other);
    close(vm);
    rig_free(&rig);
}

static void synced(void)
{
    rig_init(&rig);
    rig_preset(&rig, 5);
    rig_open(&rig);
    rig_sync(&rig);
    rig_compare(&rig);
}

static void let_go(void)
{
    CHECK_OK(vrep_group_let_go(rig.group));
    CHECK_EQ(vrep_group_let_go(rig.group), VREP_E_BUSY);
    for (int i = 0; rig_status(&rig).handover != VREP_HANDOVER_OUT && i < 30000; i++)
        polls(1);
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_OUT);
}

static void what_is_written_after_letting_go_is_never_believed(void)
{
    for (int end = 0; end < 4; end++) { /* closed, killed, power lost */
        synced();
        let_go();
        int vm = vm_start();
        /* The stamps that a close stores are those after this write: they show nothing. */
        vm_write(vm, 5 * RIG_BIT, 77);
        uint64_t seq;
        CHECK_EQ(vrep_group_mark(rig.group, "x", 1, &seq), VREP_E_BUSY);
        if (end == 3) { /* seen by the running filter */
            polls(20);
            CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_PAST);
            CHECK(rig.in_gap);
        }
        if (end == 0 || end == 3)
            rig_close(&rig, true);
        else if (end == 1)
            rig_kill(&rig);
        else
            rig_power_loss(&rig);
        close(vm);
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_UNEXPLAINED);
        CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_PAST);
        CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BYTES);
        rig_sync(&rig);
        rig_compare(&rig);
        rig_close(&rig, true); /* and once that is mended, it is */
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_CLEAN);
        rig_free(&rig);
    }
}

static void commands_are_served_while_it_lets_go(void)
{
    synced();
    CHECK_OK(vrep_group_resync(rig.group, true, 0, true));
    let_go();
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 9000, 42));
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    uint64_t copied = rig_status(&rig).resync_bytes;
    polls(20); /* and nothing is copied, nor does a gap end */
    CHECK_EQ(rig_status(&rig).resync_bytes, copied);
    CHECK_EQ(rig_status(&rig).gap, 1);
    CHECK_OK(vrep_group_take_back(rig.group));
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static void locks_that_are_taken_back_leave_nothing_to_compare(void)
{
    synced();
    let_go();
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 9000, 42));
    CHECK_OK(vrep_group_take_back(rig.group));
    CHECK_EQ(rig_status(&rig).gap, 0);
    int vm = open(rig.disk, O_RDWR);
    CHECK(vm >= 0 && !vm_may(vm));
    close(vm);
    polls(5);
    rig_close(&rig, true);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_CLEAN);
    rig_sync(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

static void locks_that_another_took_make_it_unverified(void)
{
    synced();
    let_go();
    int vm = vm_start();
    vm_write(vm, 3 * RIG_BIT, 66);
    CHECK_EQ(vrep_group_take_back(rig.group), VREP_E_LOCKED);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_PAST);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BYTES);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 9000, 42));
    close(vm);
    CHECK_OK(vrep_group_take_back(rig.group));
    rig_settle(&rig);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    rig_compare(&rig);
    rig_free(&rig);
}

int main(void)
{
    RUN(nothing_starts_or_is_copied_before_the_vm_lets_go);
    RUN(an_idle_vm_is_noticed_too);
    RUN(a_disk_that_nobody_has_open_is_refused);
    RUN(another_vm_cannot_take_the_image_meanwhile);
    RUN(what_is_written_after_letting_go_is_never_believed);
    RUN(commands_are_served_while_it_lets_go);
    RUN(locks_that_are_taken_back_leave_nothing_to_compare);
    RUN(locks_that_another_took_make_it_unverified);
    return check_report();
}
