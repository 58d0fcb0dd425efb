/* A VM keeps its disk and sends a copy of each write: the test writes the image, as the VM does,
 * and sends the copies. One end of a socket pair stands for the VM's connection. */
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>

#include "disk/disk.h"
#include "filter_rig.h"

static struct rig rig;
static int image, peer, mine;

static void connect_vm(void)
{
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    peer = ends[0];
    mine = ends[1];
    CHECK_OK(vrep_group_mirror_join(rig.group, 0, mine));
}

static void disconnect_vm(void)
{
    close(peer);
    vrep_group_mirror_leave(rig.group, mine);
    close(mine);
}

static void begin(void)
{
    rig_init(&rig);
    rig_preset(&rig, 3);
    rig.config.flags |= VREP_GROUP_MIRROR;
    image = open(rig.disk, O_RDWR);
    CHECK(image >= 0);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_MIRROR);
    connect_vm();
}

static void end(void)
{
    disconnect_vm();
    close(image);
    rig_free(&rig);
}

static void vm_writes(uint64_t offset, uint64_t length, int fill)
{
    static uint8_t data[RIG_BYTES];
    memset(data, fill, length);
    CHECK(pwrite(image, data, length, (off_t)offset) == (ssize_t)length);
}

static void sends(uint64_t offset, uint64_t length, int fill)
{
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, offset, length, fill));
}

static void guest_writes(uint64_t offset, uint64_t length, int fill)
{
    vm_writes(offset, length, fill);
    sends(offset, length, fill);
}

static void polls(int count)
{
    for (int i = 0; i < count; i++) {
        vrep_group_poll(rig.group);
        rig_apply(&rig, true);
        usleep(500);
    }
}

static void copied(void)
{
    for (int i = 0; !rig_status(&rig).mirror_waits && i < 60000; i++)
        polls(1);
    CHECK_EQ(rig_status(&rig).mirror_waits, 1);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, 0);
}

static void drained(void)
{
    CHECK_OK(vrep_group_mirror_barrier(rig.group, rig_status(&rig).mirror_copies));
    rig_settle(&rig);
}

static void synced(void)
{
    begin();
    CHECK_OK(vrep_group_mirror_live(rig.group));
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    copied();
    drained();
    rig_compare(&rig);
}

static void copies_are_recorded_and_written_nowhere(void)
{
    synced();
    guest_writes(4096, 8192, 9);
    CHECK_OK(rig_run(&rig, VREP_OP_ZERO, 0, RIG_BIT, RIG_BIT, 0));
    vm_writes(RIG_BIT, RIG_BIT, 0);
    sends(5 * RIG_BIT, 4096, 77); /* a copy of nothing: the image must not get it */
    rig_settle(&rig);
    CHECK_EQ(rig_status(&rig).writes, 2);
    uint8_t there[4096];
    CHECK(pread(image, there, sizeof there, 5 * RIG_BIT) == sizeof there);
    CHECK(there[0] == 3 && rig.shadow[5 * RIG_BIT] == 77);
    vm_writes(5 * RIG_BIT, 4096, 77);
    rig_compare(&rig);
    CHECK_EQ(rig_status(&rig).gap, 0);
    end();
}

static void no_lock_is_taken(void)
{
    begin();
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 100, .l_len = 200};
    CHECK(fcntl(image, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_UNLCK);
    CHECK_EQ(vrep_group_let_go(rig.group), VREP_E_UNSUPPORTED);
    CHECK_EQ(vrep_group_take_back(rig.group), VREP_E_INVALID);
    end();
}

static void nothing_is_copied_before_it_is_live(void)
{
    begin();
    disconnect_vm();
    CHECK_EQ(vrep_group_mirror_live(rig.group), VREP_E_GONE); /* nobody sends anything */
    connect_vm();
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    polls(30);
    CHECK_EQ(rig_status(&rig).resync_bytes, 0);
    uint64_t seq;
    CHECK_EQ(vrep_group_mark(rig.group, "x", 1, &seq), VREP_E_GONE);
    CHECK_EQ(vrep_group_mirror_barrier(rig.group, 0), VREP_E_GONE);
    vm_writes(0, 4096, 50); /* not sent: it is seen by a copy */
    CHECK_OK(vrep_group_mirror_live(rig.group));
    copied();
    drained();
    rig_compare(&rig);
    end();
}

/* Rule 2. The connection of one disk is gone when a write of another arrives. */
static void a_lost_connection_is_noticed_before_the_next_record(void)
{
    synced();
    int other[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, other) == 0);
    CHECK_OK(vrep_group_mirror_join(rig.group, 0, other[1]));
    guest_writes(0, 4096, 20);
    CHECK_EQ(rig_status(&rig).gap, 0);
    close(other[0]);                  /* nobody told the filter */
    vm_writes(9 * RIG_BIT, 4096, 21); /* this one is not sent */
    guest_writes(4096, 4096, 22);
    struct vrep_group_status status = rig_status(&rig);
    CHECK_EQ(status.handover, VREP_HANDOVER_MIRROR);
    CHECK_EQ(status.mirror_losses, 1);
    CHECK_EQ(status.gap_seq, status.head - 1);
    vrep_group_mirror_leave(rig.group, other[1]);
    close(other[1]);
    CHECK_EQ(rig_status(&rig).mirror_losses, 1);
    /* The VM tells what it had not sent. */
    struct vrep_since_range range = {9 * RIG_BIT, 4096};
    CHECK_OK(vrep_group_mirror_mark(rig.group, 0, &range, 1));
    uint64_t before = rig_status(&rig).resync_bytes;
    CHECK_OK(vrep_group_mirror_live(rig.group));
    CHECK_EQ(vrep_group_mirror_live(rig.group), VREP_E_BUSY);
    copied();
    CHECK_EQ(rig_status(&rig).resync_bytes - before, RIG_BIT);
    drained();
    rig_compare(&rig);
    end();
}

static void no_mark_stands_where_a_connection_was_lost(void)
{
    synced();
    uint64_t seq;
    CHECK_OK(vrep_group_mark(rig.group, "x", 1, &seq));
    close(peer);
    peer = -1;
    CHECK_EQ(vrep_group_mark(rig.group, "y", 1, &seq), VREP_E_GONE);
    CHECK_EQ(rig_status(&rig).gap, 1);
    end();
}

/* Rule 3. A copy sees half of a write; no gap ends before the rest is there. */
static void what_a_copy_saw_of_a_write_is_whole_before_a_gap_ends(void)
{
    synced();
    struct vrep_since_range range = {2 * RIG_BIT, RIG_BIT};
    CHECK_OK(vrep_group_mirror_mark(rig.group, 0, &range, 1));
    vm_writes(2 * RIG_BIT, 2048, 60); /* half of it is on the image */
    copied();
    CHECK(rig.shadow[2 * RIG_BIT] == 60 && rig.shadow[2 * RIG_BIT + 2048] == 3);
    polls(20);
    CHECK_EQ(rig_status(&rig).gap, 1);
    uint64_t copies = rig_status(&rig).mirror_copies;
    CHECK_EQ(vrep_group_mirror_barrier(rig.group, copies + 1), VREP_E_INVALID);
    CHECK_OK(vrep_group_mirror_barrier(rig.group, copies - 1)); /* of a drain before that copy */
    polls(20);
    CHECK_EQ(rig_status(&rig).gap, 1);
    guest_writes(2 * RIG_BIT, 4096, 60);
    CHECK_OK(vrep_group_mirror_barrier(rig.group, copies));
    rig_settle(&rig);
    rig_compare(&rig);
    end();
}

/* Rule 3. What is marked while a copy of it is under way was changed behind what that copy read. */
static void what_is_marked_during_its_copy_is_copied_again(void)
{
    synced();
    struct vrep_since_range range = {4 * RIG_BIT, RIG_BIT};
    CHECK_OK(vrep_group_mirror_mark(rig.group, 0, &range, 1));
    uint64_t before = rig_status(&rig).resync_bytes;
    vrep_group_poll(rig.group); /* it begins; only another turn sees that it has read */
    usleep(20000);
    CHECK_EQ(rig_status(&rig).resync_bytes, before);
    vm_writes(4 * RIG_BIT, 4096, 61); /* not sent */
    CHECK_OK(vrep_group_mirror_mark(rig.group, 0, &range, 1));
    copied();
    drained();
    CHECK_EQ(rig_status(&rig).resync_bytes - before, 2 * RIG_BIT);
    rig_compare(&rig);
    end();
}

static void a_discard_is_for_a_copy_to_find_out(void)
{
    synced();
    vm_writes(7 * RIG_BIT, RIG_BIT, 0);
    CHECK_OK(rig_run(&rig, VREP_OP_DISCARD, 0, 7 * RIG_BIT, RIG_BIT, 0));
    CHECK_EQ(rig_status(&rig).gap, 1);
    copied();
    drained();
    rig_compare(&rig);
    end();
}

static void a_full_ring_is_a_gap_and_no_wait(void)
{
    synced();
    for (int i = 0; i < 60; i++) /* nobody reads the ring */
        guest_writes((uint64_t)i * RIG_BIT, RIG_BIT * 4, 100 + i);
    CHECK(rig_status(&rig).unrecorded > 0);
    CHECK(rig_check_dirty(&rig) > 0);
    copied();
    drained();
    rig_compare(&rig);
    end();
}

static void a_restart_copies_what_its_vm_tells(void)
{
    for (int clean = 0; clean < 2; clean++) {
        synced();
        guest_writes(0, 4096, 30);
        rig_apply(&rig, false);
        if (clean) {
            disconnect_vm();
            rig_close(&rig, true);
        } else { /* nobody notices that the connection ends */
            rig_kill(&rig);
            close(peer);
            close(mine);
        }
        vm_writes(11 * RIG_BIT, 4096, 31);
        rig_open(&rig);
        struct vrep_group_status status = rig_status(&rig);
        CHECK_EQ(status.opened_as, VREP_OPENED_KILLED);
        CHECK_EQ(status.handover, VREP_HANDOVER_MIRROR);
        CHECK_EQ(status.gap, 1);
        CHECK_EQ(status.unverified, 0);
        connect_vm();
        rig_attach(&rig);
        CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
        struct vrep_since_range range = {11 * RIG_BIT, 4096};
        CHECK_OK(vrep_group_mirror_mark(rig.group, 0, &range, 1));
        CHECK_OK(vrep_group_mirror_live(rig.group));
        copied();
        CHECK_EQ(rig_status(&rig).resync_bytes, RIG_BIT);
        drained();
        rig_compare(&rig);
        end();
    }
}

/* Even when nothing was written meanwhile: what ran before may have copied half of a write. */
static void a_restart_needs_a_barrier_of_its_own(void)
{
    begin();
    CHECK_OK(vrep_group_mirror_live(rig.group));
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    copied();
    disconnect_vm();
    rig_kill(&rig);
    rig_open(&rig);
    connect_vm();
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    CHECK_OK(vrep_group_mirror_live(rig.group));
    polls(20);
    CHECK_EQ(rig_status(&rig).gap, 1);
    drained();
    rig_compare(&rig);
    end();
}

static void nothing_is_believed_without_the_same_mirror(void)
{
    for (int how = 0; how < 3; how++) {
        synced();
        disconnect_vm();
        if (how == 0)
            rig_power_loss(&rig);
        else
            rig_close(&rig, true);
        vm_writes(11 * RIG_BIT, 4096, 31);
        if (how == 1) /* a filter in its line takes the disk */
            rig.config.flags &= ~VREP_GROUP_MIRROR;
        if (how == 2)
            rig_shell("rm -f %s/map*", rig.shm);
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_UNEXPLAINED);
        CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_PAST);
        CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BYTES);
        if (how == 1) {
            rig_sync(&rig);
            rig_compare(&rig);
            rig_close(&rig, true);
            /* And the other way round: a VM that is there already has written what it liked. */
            rig.config.flags |= VREP_GROUP_MIRROR;
            rig_open(&rig);
            CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_PAST);
        }
        close(image);
        rig_free(&rig);
    }
}

static void what_is_distrusted_is_copied_whole(void)
{
    synced();
    vm_writes(13 * RIG_BIT, 4096, 40);
    CHECK_OK(vrep_group_mirror_distrust(rig.group));
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_MIRROR);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_PAST);
    CHECK_OK(vrep_group_mirror_live(rig.group));
    copied();
    drained();
    CHECK_EQ(rig_status(&rig).unverified, 0);
    rig_compare(&rig);
    end();
}

static void marks_out_of_bounds_are_refused_whole(void)
{
    synced();
    struct vrep_since_range ranges[2] = {{0, 4096}, {RIG_BYTES, 1}};
    CHECK_EQ(vrep_group_mirror_mark(rig.group, 0, ranges, 2), VREP_E_RANGE);
    CHECK_EQ(vrep_group_mirror_mark(rig.group, 1, ranges, 1), VREP_E_INVALID);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, 0);
    CHECK_EQ(rig_status(&rig).gap, 0);
    end();
    rig_init(&rig);
    rig_open(&rig); /* no mirror */
    CHECK_EQ(vrep_group_mirror_mark(rig.group, 0, ranges, 1), VREP_E_INVALID);
    CHECK_EQ(vrep_group_mirror_live(rig.group), VREP_E_INVALID);
    CHECK_EQ(vrep_group_mirror_distrust(rig.group), VREP_E_INVALID);
    CHECK_EQ(vrep_group_mirror_barrier(rig.group, 0), VREP_E_INVALID);
    rig_free(&rig);
}

/* Rule 5. */
static const char *where; /* of the image, for a look */

static void quiet(void)
{
    struct timespec old[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = time(NULL) - 3600}};
    CHECK(futimens(image, old) == 0);
    usleep(5100 * 1000); /* its change time cannot be set */
}

static int look(bool begin)
{
    struct vrep_rest_image at = {.disk = 0, .path = where != NULL ? where : rig.disk};
    int status = vrep_group_mirror_rest(rig.group, &at, 1, begin);
    if (status != VREP_OK)
        return status;
    for (int i = 0; vrep_group_mirror_looked(rig.group) == VREP_E_BUSY && i < 60000; i++)
        polls(1);
    return vrep_group_mirror_looked(rig.group);
}

static int rest(void)
{
    return look(true);
}

static void noticed(void)
{
    for (int i = 0; rig_status(&rig).mirror_rests && i < 60000; i++)
        polls(1);
    CHECK_EQ(rig_status(&rig).mirror_rests, 0);
}

static void lock_image(short type)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = 101, .l_len = 1};
    CHECK(fcntl(image, F_OFD_SETLK, &lock) == 0);
}

static void rested(void)
{
    CHECK_OK(rest());
    CHECK_EQ(rig_status(&rig).mirror_rests, 1);
    CHECK_EQ(rig_status(&rig).unverified, VREP_UNVERIFIED_PAST);
    rig_settle(&rig);
    CHECK_EQ(rig_status(&rig).gap, 0);
    CHECK_EQ(rig_status(&rig).unverified, 0);
    CHECK_EQ(rig_status(&rig).mirror_waits, 0);
    rig_compare(&rig);
}

static void what_a_vm_wrote_before_it_went_off_is_copied(void)
{
    synced();
    guest_writes(4096, 4096, 5);
    CHECK_EQ(rest(), VREP_E_BUSY); /* it is live */
    disconnect_vm();
    vm_writes(9 * RIG_BIT, 4096, 41); /* its last, which was not sent */
    polls(2);
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_MIRROR);
    CHECK_EQ(rest(), VREP_E_AGAIN);
    quiet();
    lock_image(F_RDLCK);
    CHECK_EQ(rest(), VREP_E_LOCKED);
    lock_image(F_UNLCK);
    where = "/proc/self/exe"; /* another file */
    CHECK_EQ(rest(), VREP_E_GONE);
    where = "/nowhere";
    CHECK_EQ(rest(), VREP_E_GONE);
    where = "/dev/null";
    CHECK_EQ(rest(), VREP_E_UNSUPPORTED);
    where = NULL;
    CHECK_EQ(vrep_group_mirror_rest(rig.group, NULL, 0, true), VREP_E_INVALID);
    struct vrep_rest_image none = {.disk = 1, .path = rig.disk};
    CHECK_EQ(vrep_group_mirror_rest(rig.group, &none, 1, true), VREP_E_INVALID);
    CHECK_OK(look(false)); /* and nothing is begun */
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_MIRROR);
    uint64_t gaps = rig_status(&rig).gaps;
    rested();
    CHECK_EQ(rig_status(&rig).gaps, gaps);
    uint64_t seq;
    CHECK_OK(vrep_group_mark(rig.group, "off", 3, &seq));
    CHECK_EQ(rest(), VREP_E_BUSY);

    /* It starts. */
    lock_image(F_RDLCK);
    noticed();
    CHECK_EQ(vrep_group_mark(rig.group, "on", 2, &seq), VREP_E_GONE);
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_MIRROR);
    lock_image(F_UNLCK);
    rested();

    /* It starts without locks, and writes. */
    vm_writes(11 * RIG_BIT, 512, 42);
    noticed();
    CHECK_EQ(rig_status(&rig).gap, 1);
    quiet();
    rested();

    /* It sends before anybody has seen it. */
    connect_vm();
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_MIRROR);
    CHECK_EQ(rest(), VREP_E_BUSY);
    CHECK_OK(vrep_group_mirror_distrust(rig.group));
    CHECK_OK(vrep_group_mirror_live(rig.group));
    guest_writes(0, 4096, 43);
    polls(30);
    CHECK_EQ(rig_status(&rig).gap, 1); /* a live one needs its barrier */
    copied();
    drained();
    rig_compare(&rig);
    end();
}

/* A look that began before a connection says nothing about the time after it. */
static void a_look_that_a_connection_overtakes_begins_nothing(void)
{
    synced();
    disconnect_vm();
    quiet();
    struct vrep_rest_image at = {.disk = 0, .path = rig.disk};
    CHECK_OK(vrep_group_mirror_rest(rig.group, &at, 1, true));
    CHECK_EQ(vrep_group_mirror_rest(rig.group, &at, 1, true), VREP_E_BUSY);
    connect_vm();
    disconnect_vm();
    for (int i = 0; vrep_group_mirror_looked(rig.group) == VREP_E_BUSY && i < 60000; i++)
        polls(1);
    CHECK_EQ(vrep_group_mirror_looked(rig.group), VREP_E_AGAIN);
    CHECK_EQ(rig_status(&rig).mirror_rests, 0);
    CHECK_EQ(rig_status(&rig).handover, VREP_HANDOVER_MIRROR);
    rested();
    CHECK_EQ(vrep_group_mirror_barrier(rig.group, rig_status(&rig).mirror_copies), VREP_E_BUSY);
    connect_vm();
    end();
}

/* The gap waits for a look that began behind the last copy, so what changed is found. */
static void no_gap_ends_without_a_look_behind_the_last_copy(void)
{
    synced();
    disconnect_vm();
    quiet();
    CHECK_OK(rest());
    uint64_t looks = rig_status(&rig).mirror_looks;
    for (int i = 0; rig_status(&rig).unshipped_bytes > 0 && i < 60000; i++)
        polls(1);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, 0);
    if (rig_status(&rig).mirror_looks == looks) /* the first is due later than the copies took */
        CHECK_EQ(rig_status(&rig).gap, 1);
    rig_settle(&rig);
    CHECK(rig_status(&rig).mirror_looks > looks);
    CHECK_EQ(rig_status(&rig).gap, 0);
    rig_compare(&rig);
    connect_vm();
    end();
}

/* What is copied while it changes is not whole. */
static void an_image_that_changes_while_it_is_compared_ends_no_gap(void)
{
    synced();
    disconnect_vm();
    quiet();
    CHECK_OK(vrep_group_resync(rig.group, false, 0, false));
    CHECK_OK(rest());
    polls(5);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    uint64_t all = rig_status(&rig).unshipped_bytes;
    CHECK(all > 0);
    for (int i = 0; rig_status(&rig).unshipped_bytes == all && i < 60000; i++)
        vrep_group_poll(rig.group);
    CHECK(rig_status(&rig).unshipped_bytes > 0); /* and not all is copied */
    vm_writes(0, 512, 44);
    noticed();
    CHECK_EQ(rig_status(&rig).gap, 1);
    connect_vm();
    end();
}

int main(void)
{
    RUN(copies_are_recorded_and_written_nowhere);
    RUN(no_lock_is_taken);
    RUN(nothing_is_copied_before_it_is_live);
    RUN(a_lost_connection_is_noticed_before_the_next_record);
    RUN(no_mark_stands_where_a_connection_was_lost);
    RUN(what_a_copy_saw_of_a_write_is_whole_before_a_gap_ends);
    RUN(what_is_marked_during_its_copy_is_copied_again);
    RUN(a_discard_is_for_a_copy_to_find_out);
    RUN(a_full_ring_is_a_gap_and_no_wait);
    RUN(a_restart_copies_what_its_vm_tells);
    RUN(a_restart_needs_a_barrier_of_its_own);
    RUN(nothing_is_believed_without_the_same_mirror);
    RUN(what_is_distrusted_is_copied_whole);
    RUN(marks_out_of_bounds_are_refused_whole);
    RUN(what_a_vm_wrote_before_it_went_off_is_copied);
    RUN(a_look_that_a_connection_overtakes_begins_nothing);
    RUN(no_gap_ends_without_a_look_behind_the_last_copy);
    RUN(an_image_that_changes_while_it_is_compared_ends_no_gap);
    return check_report();
}
