/* A VM mirrors a disk whose image only it can read: copies are read through its own NBD server,
 * which here is a thread that hangs, lies or ends when it is told to. */
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "base/atomic.h"
#include "base/endian.h"
#include "disk/disk.h"
#include "filter_rig.h"

static struct rig rig;
static int image, peer, mine;

/* ---- the VM's server ---------------------------------------------------------------- */

enum fault { NONE, HANGS, FAILS, OTHER_SIZE, NO_EXPORT, GARBAGE, OTHER_HANDLE, ENDS };
static struct {
    pthread_t thread;
    int listener;
    uint32_t client; /* its connection, atomic */
    uint32_t fault;  /* enum fault, atomic */
    uint32_t reads;  /* requests that came, atomic */
    char path[108];
} server;

static bool whole(int fd, void *to, size_t bytes)
{
    for (char *at = to; bytes > 0;) {
        ssize_t n = recv(fd, at, bytes, 0);
        if (n <= 0)
            return false;
        at += n;
        bytes -= (size_t)n;
    }
    return true;
}

static bool put(int fd, const void *from, size_t bytes)
{
    return send(fd, from, bytes, MSG_NOSIGNAL) == (ssize_t)bytes;
}

static bool greet(int fd)
{
    uint8_t hello[18], option[4 + 16], name[64], reply[20 + 12];
    memcpy(hello, "NBDMAGICIHAVEOPT", 16);
    vrep_be_store_u16(hello + 16, 3);
    if (vrep_load_acquire_u32(&server.fault) == GARBAGE)
        memset(hello, 'x', sizeof hello);
    if (!put(fd, hello, sizeof hello) || !whole(fd, option, sizeof option))
        return false;
    uint32_t bytes = vrep_be_load_u32(option + 16);
    CHECK(vrep_be_load_u32(option + 12) == 7 && bytes == 4 + 3 + 2);
    if (!whole(fd, name, bytes))
        return false;
    CHECK_MEM(name + 4, "img", 3);
    vrep_be_store_u64(reply, UINT64_C(0x3e889045565a9));
    vrep_be_store_u32(reply + 8, 7);
    if (vrep_load_acquire_u32(&server.fault) == NO_EXPORT) {
        vrep_be_store_u32(reply + 12, 0x80000006u);
        vrep_be_store_u32(reply + 16, 0);
        return put(fd, reply, 20);
    }
    vrep_be_store_u32(reply + 12, 3);
    vrep_be_store_u32(reply + 16, 12);
    vrep_be_store_u16(reply + 20, 0);
    vrep_be_store_u64(reply + 22,
                      vrep_load_acquire_u32(&server.fault) == OTHER_SIZE ? 512 : RIG_BYTES);
    vrep_be_store_u16(reply + 30, 1);
    if (!put(fd, reply, 32))
        return false;
    vrep_be_store_u32(reply + 12, 1);
    vrep_be_store_u32(reply + 16, 0);
    return put(fd, reply, 20);
}

static void serve(int fd)
{
    static uint8_t data[RIG_BYTES];
    uint8_t request[28], reply[16];
    if (!greet(fd))
        return;
    while (whole(fd, request, sizeof request)) {
        uint64_t offset = vrep_be_load_u64(request + 16);
        uint32_t length = vrep_be_load_u32(request + 24);
        CHECK(offset + length <= RIG_BYTES);
        CHECK(pread(image, data, length, (off_t)offset) == (ssize_t)length);
        vrep_fetch_add_u32(&server.reads, 1);
        while (vrep_load_acquire_u32(&server.fault) == HANGS)
            usleep(500);
        uint32_t fault = vrep_load_acquire_u32(&server.fault);
        if (fault == ENDS)
            return;
        vrep_be_store_u32(reply, 0x67446698u);
        vrep_be_store_u32(reply + 4, fault == FAILS ? 5 : 0);
        memcpy(reply + 8, request + 8, 8);
        if (fault == OTHER_HANDLE)
            reply[8] ^= 1;
        if (!put(fd, reply, sizeof reply) || (fault != FAILS && !put(fd, data, length)))
            return;
    }
}

static void *serving(void *unused)
{
    (void)unused;
    for (;;) {
        int fd = accept(server.listener, NULL, NULL);
        if (fd < 0)
            return NULL;
        vrep_store_release_u32(&server.client, (uint32_t)fd);
        serve(fd);
        vrep_store_release_u32(&server.client, 0);
        close(fd);
    }
}

static void set_fault(enum fault fault)
{
    vrep_store_release_u32(&server.fault, fault);
}

static void start_server(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(server.path, sizeof server.path, "%s/nbd", rig.root);
    memcpy(address.sun_path, server.path, sizeof server.path);
    server.listener = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(bind(server.listener, (struct sockaddr *)&address, sizeof address) == 0);
    CHECK(listen(server.listener, 4) == 0);
    server.fault = NONE;
    server.reads = 0;
    CHECK(pthread_create(&server.thread, NULL, serving, NULL) == 0);
}

static void stop_server(void)
{
    set_fault(ENDS);
    CHECK(shutdown(server.listener, SHUT_RDWR) == 0);
    uint32_t client = vrep_load_acquire_u32(&server.client);
    if (client != 0)
        (void)shutdown((int)client, SHUT_RDWR);
    pthread_join(server.thread, NULL);
    close(server.listener);
}

/* ---- the disk alone -------------------------------------------------------------------- */

static void read_done(struct vrep_io *io)
{
    *(bool *)io->owner = true;
}

static int read_once(struct vrep_engine *engine, struct vrep_disk *disk, uint64_t offset,
                     uint8_t *to, size_t bytes)
{
    bool done = false;
    struct iovec iov[2] = {{.iov_base = to, .iov_len = 100},
                           {.iov_base = to + 100, .iov_len = bytes - 100}};
    struct vrep_io io = {.op = VREP_IO_READ,
                         .offset = offset,
                         .length = bytes,
                         .iov = iov,
                         .iovcnt = 2,
                         .done = read_done,
                         .owner = &done};
    vrep_disk_submit(disk, &io);
    while (!io.inline_done && !done)
        vrep_engine_wait(engine, 100);
    return io.status;
}

static void be_image(void)
{
    rig_init(&rig);
    rig_preset(&rig, 3);
    image = open(rig.disk, O_RDWR);
    CHECK(image >= 0);
    start_server();
}

static void a_read_gives_the_right_bytes_or_fails(void)
{
    static uint8_t got[300000], wanted[sizeof got];
    be_image();
    check_seed(11);
    for (size_t i = 0; i < sizeof wanted; i++)
        wanted[i] = (uint8_t)check_random_below(256);
    CHECK(pwrite(image, wanted, sizeof wanted, 4096) == (ssize_t)sizeof wanted);
    struct vrep_engine *engine;
    struct vrep_disk *disk;
    char where[128];
    snprintf(where, sizeof where, "img:%s", server.path);
    CHECK_OK(vrep_engine_create(2, &engine));
    CHECK_OK(vrep_remote_open(engine, where, RIG_BYTES, &disk));
    CHECK(vrep_disk_is_remote(disk));
    static const enum fault faults[] = {NONE,  NO_EXPORT,    OTHER_SIZE, GARBAGE, NONE,
                                        FAILS, OTHER_HANDLE, ENDS,       HANGS,   NONE};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        bool greeted = faults[i] == NO_EXPORT || faults[i] == OTHER_SIZE || faults[i] == GARBAGE;
        if (greeted) { /* the connection ends, so that there is a greeting */
            set_fault(ENDS);
            CHECK(read_once(engine, disk, 4096, got, sizeof got) != VREP_OK);
        }
        set_fault(faults[i]);
        memset(got, 0, sizeof got);
        int status = read_once(engine, disk, 4096, got, sizeof got);
        CHECK_EQ(status == VREP_OK, faults[i] == NONE);
        if (faults[i] == NONE)
            CHECK_MEM(got, wanted, sizeof got);
    }
    struct vrep_io io = {.op = VREP_IO_WRITE, .length = 0};
    vrep_disk_submit(disk, &io);
    CHECK_EQ(io.status, VREP_E_READONLY);
    CHECK_OK(vrep_disk_refresh(disk));
    stop_server();
    CHECK(read_once(engine, disk, 4096, got, sizeof got) != VREP_OK);
    vrep_disk_close(disk);
    static const char *const bad[] = {"", "img", ":/x", "img:", "img:x"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_STATUS(vrep_remote_open(engine, bad[i], RIG_BYTES, &disk), VREP_E_INVALID);
    CHECK_STATUS(vrep_remote_open(engine, where, 511, &disk), VREP_E_INVALID);
    CHECK_STATUS(vrep_disk_open(engine, "nbd:img:/x", 0, &disk), VREP_E_UNSUPPORTED);
    vrep_engine_destroy(engine);
    close(image);
    rig_free(&rig);
}

/* ---- a group ------------------------------------------------------------------------------ */

static void vm_writes(uint64_t offset, uint64_t length, int fill)
{
    static uint8_t data[RIG_BYTES];
    memset(data, fill, length);
    CHECK(pwrite(image, data, length, (off_t)offset) == (ssize_t)length);
}

static void guest_writes(uint64_t offset, uint64_t length, int fill)
{
    vm_writes(offset, length, fill);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, offset, length, fill));
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
}

static void drained(void)
{
    CHECK_OK(vrep_group_mirror_barrier(rig.group, rig_status(&rig).mirror_copies));
    rig_settle(&rig);
}

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

static void synced(void)
{
    be_image();
    snprintf(rig.uri, sizeof rig.uri, "nbd:img:%s", server.path);
    rig.disks[0].bytes = RIG_BYTES;
    rig.config.flags |= VREP_GROUP_MIRROR;
    rig_open(&rig);
    connect_vm();
    CHECK_OK(vrep_group_mirror_live(rig.group));
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    copied();
    drained();
    rig_compare(&rig);
    CHECK(vrep_load_acquire_u32(&server.reads) >= RIG_BYTES / (256u << 10));
}

static void end(void)
{
    disconnect_vm();
    set_fault(NONE);
    rig_close(&rig, true);
    stop_server();
    close(image);
    rig_free(&rig);
}

static void to_be_copied(uint64_t offset, uint64_t length)
{
    struct vrep_since_range range = {offset, length};
    CHECK_OK(vrep_group_mirror_mark(rig.group, 0, &range, 1));
}

/* It does not answer a read before the command is answered that waits for the copy's range. */
static void a_vm_does_not_wait_for_what_it_answers_itself(void)
{
    synced();
    for (int round = 0; round < 3; round++) {
        uint32_t reads = vrep_load_acquire_u32(&server.reads);
        uint64_t yields = rig_status(&rig).mirror_yields;
        set_fault(HANGS);
        vm_writes(2 * RIG_BIT, RIG_BIT, 50 + round); /* not sent: for a copy to find */
        to_be_copied(2 * RIG_BIT, RIG_BIT);
        for (int i = 0; vrep_load_acquire_u32(&server.reads) == reads && i < 60000; i++)
            polls(1);
        guest_writes(0, 4096, round); /* elsewhere: it waits for nothing */
        CHECK_EQ(rig_status(&rig).mirror_yields, yields);
        guest_writes(2 * RIG_BIT + 4096, 4096, 60 + round); /* the copy has older bytes */
        CHECK_EQ(rig_status(&rig).mirror_yields, yields + 1);
        guest_writes(2 * RIG_BIT + 4096, 4096, 70 + round);
        CHECK_EQ(rig_status(&rig).mirror_yields, yields + 1);
        set_fault(NONE);
        polls(20);
        rig_check_dirty(&rig);
        copied();
        drained();
        rig_compare(&rig);
    }
    CHECK_EQ(rig_status(&rig).errors, 0);
    end();
}

/* It was read before a write that was not sent, and ends behind the VM's telling of that one. */
static void a_copy_from_before_a_loss_clears_nothing(void)
{
    synced();
    uint32_t reads = vrep_load_acquire_u32(&server.reads);
    set_fault(HANGS);
    vm_writes(2 * RIG_BIT, RIG_BIT, 50);
    to_be_copied(2 * RIG_BIT, RIG_BIT);
    for (int i = 0; vrep_load_acquire_u32(&server.reads) == reads && i < 60000; i++)
        polls(1);
    disconnect_vm();
    vm_writes(2 * RIG_BIT, RIG_BIT, 51);
    connect_vm();
    to_be_copied(2 * RIG_BIT, RIG_BIT);
    set_fault(NONE);
    for (int i = 0; rig.shadow[2 * RIG_BIT] != 50 && i < 60000; i++)
        polls(1);
    CHECK_EQ(rig.shadow[2 * RIG_BIT], 50);
    rig_check_dirty(&rig);
    CHECK_OK(vrep_group_mirror_live(rig.group));
    copied();
    drained();
    rig_compare(&rig);
    end();
}

/* It may read, behind a drain, what was begun behind it. */
static void a_drain_is_for_copies_that_had_ended(void)
{
    synced();
    uint64_t copies = rig_status(&rig).mirror_copies;
    uint32_t reads = vrep_load_acquire_u32(&server.reads);
    set_fault(HANGS);
    to_be_copied(2 * RIG_BIT, RIG_BIT);
    for (int i = 0; vrep_load_acquire_u32(&server.reads) == reads && i < 60000; i++)
        polls(1);
    uint64_t ended = rig_status(&rig).mirror_copies;
    CHECK_EQ(ended, copies);
    CHECK_OK(vrep_group_mirror_barrier(rig.group, ended)); /* the VM has drained its writes */
    set_fault(NONE);
    copied();
    polls(20);
    CHECK_EQ(rig_status(&rig).gap, 1);
    CHECK_EQ(rig_status(&rig).mirror_copies, copies + 1);
    drained();
    rig_compare(&rig);
    end();
}

static void a_read_that_fails_is_tried_again(void)
{
    synced();
    static const enum fault faults[] = {FAILS, ENDS};
    for (int i = 0; i < 2; i++) {
        uint64_t errors = rig_status(&rig).errors;
        set_fault(faults[i]);
        vm_writes(5 * RIG_BIT, RIG_BIT, 80 + i);
        to_be_copied(5 * RIG_BIT, RIG_BIT);
        for (int n = 0; rig_status(&rig).errors == errors && n < 60000; n++)
            polls(1);
        CHECK(rig_status(&rig).errors > errors);
        CHECK_EQ(rig_status(&rig).gap, 1);
        CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BIT);
        set_fault(NONE);
        copied();
        drained();
        rig_compare(&rig);
    }
    end();
}

static void only_a_mirror_reads_through_a_vm(void)
{
    be_image();
    snprintf(rig.uri, sizeof rig.uri, "nbd:img:%s", server.path);
    rig.disks[0].bytes = RIG_BYTES;
    struct vrep_group *group;
    CHECK_STATUS(vrep_group_open(&rig.config, &group), VREP_E_UNSUPPORTED);
    stop_server();
    close(image);
    rig_free(&rig);
}

int main(void)
{
    RUN(a_read_gives_the_right_bytes_or_fails);
    RUN(a_vm_does_not_wait_for_what_it_answers_itself);
    RUN(a_copy_from_before_a_loss_clears_nothing);
    RUN(a_drain_is_for_copies_that_had_ended);
    RUN(a_read_that_fails_is_tried_again);
    RUN(only_a_mirror_reads_through_a_vm);
    return check_report();
}
