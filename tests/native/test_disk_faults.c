/* The disk room when the kernel says no: calls of libc and liburing are replaced here, by ones that
 * fail, tear or count when told to. */
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/atomic.h"
#include "check.h"
#include "disk/disk.h"

#define SIZE (1u << 20)
#define PAGE 4096u

/* What the next calls do; any thread, so read atomically. */
static uint32_t fail_sync, fail_write, fail_submit, short_io, fail_punch, interrupt;
static uint32_t syncs, punches;

static ssize_t torn(const struct iovec *iov, int count, bool write, int fd, off_t offset, int flags)
{
    (void)count;
    size_t bytes = iov->iov_len > 1 ? iov->iov_len / 2 : iov->iov_len;
    struct iovec half = {iov->iov_base, bytes};
    long number = write ? SYS_pwritev2 : SYS_preadv2;
    return syscall(number, fd, &half, 1, (long)offset, 0L, flags);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    int error = (int)vrep_load_acquire_u32(&fail_write);
    if (error != 0) {
        errno = error;
        return -1;
    }
    if (vrep_load_acquire_u32(&interrupt) != 0) {
        vrep_store_release_u32(&interrupt, 0);
        errno = EINTR;
        return -1;
    }
    if ((flags & RWF_DSYNC) != 0 && vrep_load_acquire_u32(&fail_sync) != 0) {
        (void)syscall(SYS_pwritev2, fd, iov, count, (long)offset, 0L, 0);
        errno = EIO;
        return -1;
    }
    if (vrep_load_acquire_u32(&short_io) != 0)
        return torn(iov, count, true, fd, offset, flags);
    return syscall(SYS_pwritev2, fd, iov, count, (long)offset, 0L, flags);
}

ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    if (vrep_load_acquire_u32(&short_io) != 0)
        return torn(iov, count, false, fd, offset, flags);
    return syscall(SYS_preadv2, fd, iov, count, (long)offset, 0L, flags);
}

int fdatasync(int fd)
{
    vrep_store_release_u32(&syncs, vrep_load_acquire_u32(&syncs) + 1);
    int error = (int)vrep_load_acquire_u32(&fail_sync);
    if (error != 0) {
        errno = error;
        return -1;
    }
    return (int)syscall(SYS_fdatasync, fd);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    punches++;
    if (fail_punch != 0) {
        errno = (int)fail_punch;
        return -1;
    }
    return (int)syscall(SYS_fallocate, fd, mode, (long)offset, (long)length);
}

/* As the kernel does when it is out of memory: nothing is taken. */
int io_uring_submit(struct io_uring *ring)
{
    if (fail_submit != 0) {
        fail_submit--;
        return -EAGAIN;
    }
    return io_uring_submit_and_wait(ring, 0);
}

static char directory[] = "/tmp/vrep-test-faults-XXXXXX";
static struct vrep_engine *engine;
static _Alignas(PAGE) uint8_t memory[SIZE], other[SIZE];
static const uint8_t view_id[16] = "view of a disk.";

static const char *uri(const char *name, off_t bytes)
{
    static char out[300];
    snprintf(out, sizeof out, "file:%s/%s", directory, name);
    int fd = open(out + 5, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0);
    CHECK_EQ(ftruncate(fd, bytes), 0);
    close(fd);
    return out;
}

static uint32_t finished;

static void done(struct vrep_io *io)
{
    finished++;
    *(bool *)io->owner = true;
}

static void await(const bool *over)
{
    while (!*over) {
        struct pollfd event = {.fd = vrep_engine_fd(engine), .events = POLLIN};
        CHECK_EQ(poll(&event, 1, 60000), 1);
        vrep_engine_reap(engine);
    }
}

static struct vrep_io run(struct vrep_disk *disk, uint8_t op, uint64_t offset, void *bytes,
                          size_t length, uint8_t flags)
{
    bool over = false;
    /* Odd pieces: a torn transfer ends inside one, and zero-length ones stand between. */
    struct iovec iov[4] = {{bytes, length / 3},
                           {bytes, 0},
                           {(uint8_t *)bytes + length / 3, length - length / 3},
                           {bytes, 0}};
    struct vrep_io io = {.op = op,
                         .flags = flags,
                         .offset = offset,
                         .length = length,
                         .iov = iov,
                         .iovcnt = 4,
                         .done = done,
                         .owner = &over};
    vrep_disk_submit(disk, &io);
    if (!io.inline_done)
        await(&over);
    return io;
}

static void fill(uint8_t with)
{
    for (size_t i = 0; i < SIZE; i++)
        memory[i] = (uint8_t)(i * 13 + with);
}

static void short_transfers_go_on(void)
{
    for (int direct = 0; direct < 2; direct++) {
        struct vrep_disk *disk;
        CHECK_OK(vrep_disk_open(engine, uri("short", SIZE), direct ? VREP_DISK_DIRECT : 0, &disk));
        fill((uint8_t)(1 + direct));
        /* an O_DIRECT transfer tears at whole blocks; skewed memory goes by the bounce buffer */
        size_t skew = 0, bytes = direct ? 3 * 65536 : 200001;
        short_io = !direct;
        interrupt = 1;
        CHECK_OK(run(disk, VREP_IO_WRITE, 4096, memory + skew, bytes, 0).status);
        CHECK_OK(run(disk, VREP_IO_WRITE, 4096, memory + skew, bytes, VREP_IO_FUA).status);
        CHECK_OK(run(disk, VREP_IO_READ, 4096, other, bytes, 0).status);
        short_io = interrupt = 0;
        CHECK_MEM(other, memory + skew, bytes);
        vrep_disk_close(disk);
    }
}

static void a_failed_write_says_so_once(void)
{
    struct vrep_disk *disk;
    CHECK_OK(vrep_disk_open(engine, uri("eio", SIZE), 0, &disk));
    for (size_t bytes = 512; bytes <= SIZE; bytes *= 32) {
        fail_write = EIO;
        struct vrep_io io = run(disk, VREP_IO_WRITE, 0, memory, bytes, 0);
        CHECK_STATUS(io.status, VREP_E_IO);
        CHECK_EQ(io.os_error, EIO);
        CHECK(!io.sync_failed);
        fail_write = ENOSPC;
        CHECK_STATUS(run(disk, VREP_IO_WRITE, 0, memory, bytes, 0).status, VREP_E_NOSPACE);
        fail_write = 0;
        CHECK_OK(run(disk, VREP_IO_WRITE, 0, memory, bytes, 0).status);
    }
    vrep_disk_close(disk);
}

static void a_failed_sync_is_told(void)
{
    struct vrep_disk *disk;
    CHECK_OK(vrep_disk_open(engine, uri("sync", SIZE), 0, &disk));
    fail_sync = EIO;
    struct vrep_io io = run(disk, VREP_IO_FLUSH, 0, NULL, 0, 0);
    CHECK(io.status == VREP_E_IO && io.sync_failed);
    io = run(disk, VREP_IO_WRITE, 0, memory, 4096, VREP_IO_FUA);
    CHECK(io.status == VREP_E_IO && io.sync_failed);
    io = run(disk, VREP_IO_ZERO, 0, NULL, 4096, VREP_IO_FUA);
    CHECK(io.status == VREP_E_IO && io.sync_failed);
    io = run(disk, VREP_IO_WRITE, 0, memory, 4096, 0);
    CHECK(io.status == VREP_OK && !io.sync_failed);
    fail_sync = 0;
    io = run(disk, VREP_IO_FLUSH, 0, NULL, 0, 0);
    CHECK(io.status == VREP_OK && !io.sync_failed);
    vrep_disk_close(disk);
}

static void an_overlay_never_recovers_from_a_failed_sync(void)
{
    struct vrep_disk *disk;
    char path[300];
    snprintf(path, sizeof path, "%s/sticky", directory);
    for (int which = 0; which < 3; which++) {
        CHECK_OK(vrep_overlay_open(engine, path, NULL, view_id, SIZE, 4096, &disk));
        uint64_t before = vrep_overlay_present_bytes(disk);
        uint64_t at = (uint64_t)which * 65536;
        if (which == 2)
            CHECK_OK(run(disk, VREP_IO_WRITE, at, memory, 4096, 0).status);
        fail_sync = EIO;
        struct vrep_io io;
        if (which == 0)
            io = run(disk, VREP_IO_WRITE, at, memory, 4096, VREP_IO_FUA);
        else if (which == 1)
            io = run(disk, VREP_IO_ZERO, at, NULL, 4096, VREP_IO_FUA);
        else
            io = run(disk, VREP_IO_FLUSH, 0, NULL, 0, 0);
        CHECK(io.status == VREP_E_IO && io.sync_failed);
        fail_sync = 0;
        uint32_t counted = syncs;
        CHECK_STATUS(run(disk, VREP_IO_FLUSH, 0, NULL, 0, 0).status, VREP_E_IO);
        CHECK_STATUS(run(disk, VREP_IO_WRITE, 0, memory, 512, VREP_IO_FUA).status, VREP_E_IO);
        CHECK_STATUS(vrep_overlay_sync(disk), VREP_E_IO);
        CHECK_EQ(syncs, counted); /* it does not even try */
        CHECK(vrep_overlay_present_bytes(disk) > before);
        vrep_disk_close(disk);
        CHECK_OK(vrep_overlay_open(engine, path, NULL, view_id, SIZE, 4096, &disk));
        CHECK_EQ(vrep_overlay_present_bytes(disk), before); /* no bit without stable data */
        vrep_disk_close(disk);
    }
}

static void a_punch_that_fails_is_written_or_refused(void)
{
    struct vrep_disk *disk;
    for (int direct = 0; direct < 2; direct++) {
        fail_punch = 0;
        CHECK_OK(vrep_disk_open(engine, uri("punch", SIZE), direct ? VREP_DISK_DIRECT : 0, &disk));
        fill(9);
        CHECK_OK(run(disk, VREP_IO_WRITE, 0, memory, SIZE, 0).status);
        fail_punch = EOPNOTSUPP;
        struct vrep_io io = run(disk, VREP_IO_ZERO, 1000, NULL, 500001, VREP_IO_FAST);
        CHECK_STATUS(io.status, VREP_E_UNSUPPORTED);
        CHECK_OK(run(disk, VREP_IO_READ, 0, other, SIZE, 0).status);
        CHECK_MEM(other, memory, SIZE); /* refused: untouched */
        CHECK_OK(run(disk, VREP_IO_ZERO, 1000, NULL, 500001, 0).status);
        memset(memory + 1000, 0, 500001);
        CHECK_OK(run(disk, VREP_IO_READ, 0, other, SIZE, 0).status);
        CHECK_MEM(other, memory, SIZE);
        fail_punch = ENOSPC;
        CHECK_STATUS(run(disk, VREP_IO_ZERO, 0, NULL, 4096, 0).status, VREP_E_NOSPACE);
        vrep_disk_close(disk);
    }
    struct vrep_disk_info info;
    fail_punch = EOPNOTSUPP;
    CHECK_OK(vrep_disk_open(engine, uri("punch", SIZE), 0, &disk));
    CHECK_OK(vrep_disk_info(disk, &info));
    CHECK(!info.zero_is_cheap);
    fail_punch = 0;
    vrep_disk_close(disk);
}

/* io_uring that takes nothing: each request is done once, by a thread, and nothing hangs. */
static void a_ring_that_takes_nothing_is_replaced(void)
{
    struct vrep_disk *disk;
    static struct vrep_io io[400];
    static struct iovec iov[400];
    static bool over[400];
    CHECK_OK(vrep_disk_open(engine, uri("ring", SIZE), VREP_DISK_DIRECT, &disk));
    for (int round = 0; round < 3; round++) {
        fill((uint8_t)round);
        finished = 0;
        fail_submit = round == 0 ? 1 : round == 1 ? 7 : UINT32_MAX;
        for (size_t i = 0; i < 400; i++) {
            uint64_t offset = (i % 256) * PAGE;
            over[i] = false;
            iov[i] = (struct iovec){memory + offset, PAGE};
            io[i] = (struct vrep_io){.op = i < 256 ? VREP_IO_WRITE : VREP_IO_READ,
                                     .offset = offset,
                                     .length = PAGE,
                                     .iov = &iov[i],
                                     .iovcnt = 1,
                                     .done = done,
                                     .owner = &over[i]};
            if (i == 256) /* reads follow the writes of the same blocks */
                for (size_t j = 0; j < 256; j++)
                    await(&over[j]);
            vrep_disk_submit(disk, &io[i]);
            CHECK(!io[i].inline_done);
        }
        for (size_t i = 0; i < 400; i++) {
            await(&over[i]);
            CHECK_OK(io[i].status);
        }
        CHECK_EQ(finished, 400);
        fail_submit = 0;
        CHECK_OK(run(disk, VREP_IO_READ, 0, other, SIZE, 0).status);
        CHECK_MEM(other, memory, SIZE);
    }
    vrep_disk_close(disk);
}

static struct vrep_io chained[8];
static struct iovec chained_iov[8];
static struct vrep_disk *chained_disk;

static void next(struct vrep_io *io)
{
    CHECK_OK(io->status);
    finished++;
    if (io != &chained[7])
        vrep_disk_submit(chained_disk, io + 1);
}

static void destroy_waits_for_what_completions_submit(void)
{
    struct vrep_engine *own;
    for (int direct = 0; direct < 2; direct++) {
        CHECK_OK(vrep_engine_create(1, &own));
        CHECK_OK(
            vrep_disk_open(own, uri("chain", SIZE), direct ? VREP_DISK_DIRECT : 0, &chained_disk));
        finished = 0;
        for (size_t i = 0; i < 8; i++) {
            bool flush = i % 3 == 2;
            chained_iov[i] = (struct iovec){memory, SIZE}; /* too long to be done at once */
            chained[i] = (struct vrep_io){.op = flush ? VREP_IO_FLUSH : VREP_IO_WRITE,
                                          .flags = i % 2 ? VREP_IO_FUA : 0,
                                          .length = flush ? 0 : SIZE,
                                          .iov = &chained_iov[i],
                                          .iovcnt = 1,
                                          .done = next};
        }
        vrep_disk_submit(chained_disk, &chained[0]);
        CHECK(!chained[0].inline_done);
        vrep_engine_destroy(own);
        CHECK_EQ(finished, 8);
        vrep_disk_close(chained_disk);
    }
}

int main(void)
{
    CHECK(mkdtemp(directory) != NULL);
    CHECK_OK(vrep_engine_create(2, &engine));
    RUN(short_transfers_go_on);
    RUN(a_failed_write_says_so_once);
    RUN(a_failed_sync_is_told);
    RUN(an_overlay_never_recovers_from_a_failed_sync);
    RUN(a_punch_that_fails_is_written_or_refused);
    RUN(a_ring_that_takes_nothing_is_replaced);
    RUN(destroy_waits_for_what_completions_submit);
    vrep_engine_destroy(engine);
    char remove[300];
    snprintf(remove, sizeof remove, "rm -rf %s", directory);
    CHECK_EQ(system(remove), 0);
    return check_report();
}
