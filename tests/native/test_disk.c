/* Files, O_DIRECT files and overlays: what open refuses, what I/O does, what is remembered. */
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "disk/disk.h"

#define SIZE (1u << 20)
#define PAGE 4096u

static char directory[] = "/tmp/vrep-test-disk-XXXXXX";
static struct vrep_engine *engine;
static _Alignas(PAGE) uint8_t memory[SIZE], expected[SIZE];
static const uint8_t view_id[16] = "view of a disk.", other_id[16] = "another view...";

static const char *at(const char *name)
{
    static char path[4][256];
    static unsigned turn;
    char *out = path[turn++ % 4];
    snprintf(out, sizeof path[0], "%s/%s", directory, name);
    return out;
}

static const char *uri(const char *name)
{
    static char out[300];
    snprintf(out, sizeof out, "file:%s", at(name));
    return out;
}

static void make(const char *name, off_t bytes)
{
    int fd = open(at(name), O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0);
    CHECK_EQ(ftruncate(fd, bytes), 0);
    close(fd);
}

static void done(struct vrep_io *io)
{
    *(bool *)io->owner = true;
}

static int run(struct vrep_disk *disk, struct vrep_io *io)
{
    bool over = false;
    io->done = done;
    io->owner = &over;
    vrep_disk_submit(disk, io);
    while (!io->inline_done && !over) {
        struct pollfd event = {.fd = vrep_engine_fd(engine), .events = POLLIN};
        CHECK_EQ(poll(&event, 1, 60000), 1);
        vrep_engine_reap(engine);
    }
    CHECK(!(io->inline_done && over)); /* done() is not called for what was done at once */
    return io->status;
}

static int data(struct vrep_disk *disk, uint8_t op, uint64_t offset, void *bytes, size_t length,
                uint8_t flags)
{
    struct iovec iov = {bytes, length};
    struct vrep_io io = {
        .op = op, .flags = flags, .offset = offset, .length = length, .iov = &iov, .iovcnt = 1};
    return run(disk, &io);
}

static int range(struct vrep_disk *disk, uint8_t op, uint64_t offset, uint64_t length,
                 uint8_t flags)
{
    struct vrep_io io = {.op = op, .flags = flags, .offset = offset, .length = length};
    return run(disk, &io);
}

static void open_refuses(void)
{
    struct vrep_disk *disk;
    make("odd", 1000);
    make("good", SIZE);
    CHECK_STATUS(vrep_disk_open(engine, "http:/x", 0, &disk), VREP_E_UNSUPPORTED);
    CHECK_STATUS(vrep_disk_open(engine, "file:", 0, &disk), VREP_E_INVALID);
    CHECK_STATUS(vrep_disk_open(engine, uri("absent"), 0, &disk), VREP_E_NOT_FOUND);
    CHECK_STATUS(vrep_disk_open(engine, uri("odd"), 0, &disk), VREP_E_INVALID);
    CHECK_STATUS(vrep_disk_open(engine, uri("."), VREP_DISK_READ_ONLY, &disk), VREP_E_INVALID);
    CHECK_STATUS(vrep_disk_open(engine, "block:/dev/null", 0, &disk), VREP_E_INVALID);
    char block[300];
    snprintf(block, sizeof block, "block:%s", at("good"));
    CHECK_STATUS(vrep_disk_open(engine, block, 0, &disk), VREP_E_INVALID);
    CHECK_EQ(mkfifo(at("pipe"), 0600), 0); /* must not wait for a writer */
    CHECK_STATUS(vrep_disk_open(engine, uri("pipe"), VREP_DISK_READ_ONLY, &disk), VREP_E_INVALID);
}

static void two_writers_refuse_each_other(void)
{
    struct vrep_disk *one, *two;
    make("locked", SIZE);
    CHECK_OK(vrep_disk_open(engine, uri("locked"), 0, &one));
    CHECK_STATUS(vrep_disk_open(engine, uri("locked"), 0, &two), VREP_E_LOCKED);
    CHECK_STATUS(vrep_disk_open(engine, uri("locked"), VREP_DISK_READ_ONLY, &two), VREP_E_LOCKED);
    CHECK_OK(vrep_disk_open(engine, uri("locked"), VREP_DISK_NO_LOCK, &two));
    vrep_disk_close(two); /* takes none of the other's locks along */
    CHECK_STATUS(vrep_disk_open(engine, uri("locked"), 0, &two), VREP_E_LOCKED);
    vrep_disk_close(one);
    CHECK_OK(vrep_disk_open(engine, uri("locked"), VREP_DISK_READ_ONLY, &one));
    CHECK_OK(vrep_disk_open(engine, uri("locked"), VREP_DISK_READ_ONLY, &two));
    struct vrep_disk *three;
    CHECK_STATUS(vrep_disk_open(engine, uri("locked"), 0, &three), VREP_E_LOCKED);
    vrep_disk_close(one);
    vrep_disk_close(two);
}

static void bounds(void)
{
    struct vrep_disk *disk;
    make("bounds", SIZE);
    CHECK_OK(vrep_disk_open(engine, uri("bounds"), 0, &disk));
    CHECK_STATUS(data(disk, VREP_IO_READ, SIZE - 511, memory, 512, 0), VREP_E_RANGE);
    CHECK_STATUS(data(disk, VREP_IO_WRITE, UINT64_MAX, memory, 2, 0), VREP_E_RANGE);
    CHECK_STATUS(range(disk, VREP_IO_ZERO, 512, UINT64_MAX - 511, 0), VREP_E_RANGE);
    CHECK_STATUS(range(disk, VREP_IO_ZERO, 1, SIZE, 0), VREP_E_RANGE);
    CHECK_OK(range(disk, VREP_IO_ZERO, SIZE, 0, 0));
    struct iovec iov = {memory, 100};
    struct vrep_io io = {.op = VREP_IO_READ, .length = 200, .iov = &iov, .iovcnt = 1};
    CHECK_STATUS(run(disk, &io), VREP_E_INVALID);
    vrep_disk_close(disk);
    CHECK_OK(vrep_disk_open(engine, uri("bounds"), VREP_DISK_READ_ONLY, &disk));
    CHECK_STATUS(data(disk, VREP_IO_WRITE, 0, memory, 512, 0), VREP_E_READONLY);
    CHECK_STATUS(range(disk, VREP_IO_ZERO, 0, 512, 0), VREP_E_READONLY);
    CHECK_OK(range(disk, VREP_IO_FLUSH, 0, 0, 0));
    vrep_disk_close(disk);
}

static void sizes_are_read_again(void)
{
    struct vrep_disk *disk;
    struct vrep_disk_info info;
    make("grows", SIZE);
    CHECK_OK(vrep_disk_open(engine, uri("grows"), 0, &disk));
    CHECK_EQ(truncate(at("grows"), 2 * SIZE), 0);
    CHECK_STATUS(data(disk, VREP_IO_READ, SIZE, memory, 512, 0), VREP_E_RANGE);
    CHECK_OK(vrep_disk_refresh(disk));
    CHECK_OK(data(disk, VREP_IO_READ, SIZE, memory, 512, 0));
    CHECK_EQ(truncate(at("grows"), 2 * SIZE + 100), 0);
    CHECK_STATUS(vrep_disk_refresh(disk), VREP_E_INVALID);
    CHECK_OK(vrep_disk_info(disk, &info));
    CHECK_EQ(info.bytes, 2 * SIZE); /* what is no size leaves the old one */
    CHECK_EQ(truncate(at("grows"), SIZE / 2), 0);
    CHECK_STATUS(data(disk, VREP_IO_READ, SIZE, memory, 512, 0), VREP_E_IO); /* cut behind us */
    vrep_disk_close(disk);
}

static void count_done(struct vrep_io *io)
{
    ++*(unsigned *)io->owner;
}

/* Page-cached writes of a disk leave in the order in which they came, whatever reads and synced
 * writes come between, and none is forgotten; of two disks neither waits for the other. */
static void large_writes_take_turns(void)
{
    enum { WRITES = 60, LENGTH = 192 << 10 }; /* more than is written at once */
    static uint8_t bytes[2 * WRITES][LENGTH], read[WRITES][PAGE];
    static struct vrep_io io[3 * WRITES];
    static struct iovec iov[3 * WRITES];
    struct vrep_disk *disk[2];
    unsigned finished = 0, submitted = 0;
    make("turns0", SIZE);
    make("turns1", SIZE);
    CHECK_OK(vrep_disk_open(engine, uri("turns0"), 0, &disk[0]));
    CHECK_OK(vrep_disk_open(engine, uri("turns1"), 0, &disk[1]));
    for (unsigned i = 0; i < WRITES; i++)
        for (unsigned d = 0; d < 2; d++) {
            unsigned which = 2 * i + d;
            memset(bytes[which], (int)(1 + i), LENGTH);
            iov[which] = (struct iovec){bytes[which], LENGTH};
            io[which] = (struct vrep_io){.op = VREP_IO_WRITE,
                                         .flags = i % 16 == 7 ? VREP_IO_FUA : 0,
                                         .offset = i % 16 == 7 ? LENGTH : 0,
                                         .length = LENGTH,
                                         .iov = &iov[which],
                                         .iovcnt = 1,
                                         .done = count_done,
                                         .owner = &finished};
            vrep_disk_submit(disk[d], &io[which]);
            submitted += !io[which].inline_done;
            if (d == 0) {
                which = 2 * WRITES + i;
                iov[which] = (struct iovec){read[i], PAGE};
                io[which] = (struct vrep_io){.op = VREP_IO_READ,
                                             .offset = SIZE / 2 + i * PAGE,
                                             .length = PAGE,
                                             .iov = &iov[which],
                                             .iovcnt = 1,
                                             .done = count_done,
                                             .owner = &finished};
                vrep_disk_submit(disk[d], &io[which]);
                submitted += !io[which].inline_done;
            }
        }
    while (finished < submitted) {
        struct pollfd event = {.fd = vrep_engine_fd(engine), .events = POLLIN};
        CHECK_EQ(poll(&event, 1, 60000), 1);
        vrep_engine_reap(engine);
    }
    for (unsigned i = 0; i < 3 * WRITES; i++)
        CHECK_OK(io[i].status);
    for (unsigned d = 0; d < 2; d++) {
        memset(expected, WRITES, LENGTH);
        CHECK_OK(data(disk[d], VREP_IO_READ, 0, memory, LENGTH, 0));
        CHECK(memcmp(memory, expected, LENGTH) == 0);
        /* It is idle now: the next one is not left to a thread that is gone. */
        CHECK_OK(data(disk[d], VREP_IO_WRITE, 0, expected, LENGTH, 0));
        vrep_disk_close(disk[d]);
    }
}

static void direct_is_widened(void)
{
    struct vrep_disk *disk;
    struct vrep_disk_info info;
    make("direct", SIZE);
    CHECK_OK(vrep_disk_open(engine, uri("direct"), VREP_DISK_DIRECT, &disk));
    CHECK_OK(vrep_disk_info(disk, &info));
    CHECK(info.align_bytes >= 512 && SIZE % info.align_bytes == 0);
    uint64_t offset = info.align_bytes + 1, length = info.align_bytes;
    vrep_disk_widen(disk, &offset, &length);
    CHECK_EQ(offset, info.align_bytes);
    CHECK_EQ(length, 2 * info.align_bytes);
    /* Every edge and every place in memory, up to more than a bounce buffer. */
    static const size_t edges[] = {0, 1, 511, 512, 513, 4095, 4096};
    for (size_t i = 0; i < 7; i++) {
        for (size_t j = 0; j < 7; j++) {
            size_t from = edges[i], bytes = SIZE - from - edges[j] - PAGE;
            for (size_t k = 0; k < bytes; k++)
                memory[edges[j] + k] = expected[from + k] = (uint8_t)(k * 7 + i * 31 + j);
            CHECK_OK(data(disk, VREP_IO_WRITE, from, memory + edges[j], bytes, 0));
        }
        CHECK_OK(data(disk, VREP_IO_READ, edges[i], memory + 1, SIZE - edges[i] - 1, 0));
        CHECK_MEM(memory + 1, expected + edges[i], SIZE - edges[i] - 1);
    }
    CHECK_OK(range(disk, VREP_IO_ZERO, 513, 300001, VREP_IO_NO_HOLE));
    memset(expected + 513, 0, 300001);
    CHECK_OK(data(disk, VREP_IO_READ, 0, memory, SIZE, 0));
    CHECK_MEM(memory, expected, SIZE);
    CHECK_EQ(info.bytes, SIZE);
    struct stat st;
    CHECK_EQ(stat(at("direct"), &st), 0);
    CHECK_EQ(st.st_size, SIZE); /* no edge reached past the end */
    vrep_disk_close(disk);
}

static void a_tail_that_is_no_whole_block_is_never_overrun(void)
{
    struct vrep_disk *disk;
    make("tail", SIZE + 512);
    int status = vrep_disk_open(engine, uri("tail"), VREP_DISK_DIRECT, &disk);
    if (status == VREP_E_UNSUPPORTED) /* the filesystem's blocks are larger */
        return;
    CHECK_OK(status);
    CHECK_OK(data(disk, VREP_IO_WRITE, SIZE + 100, memory, 412, 0));
    CHECK_OK(range(disk, VREP_IO_ZERO, SIZE + 200, 312, VREP_IO_NO_HOLE));
    struct stat st;
    CHECK_EQ(stat(at("tail"), &st), 0);
    CHECK_EQ(st.st_size, SIZE + 512);
    vrep_disk_close(disk);
}

static void zero_and_extents(void)
{
    struct vrep_disk *disk;
    uint64_t length;
    bool hole;
    make("holes", SIZE);
    CHECK_OK(vrep_disk_open(engine, uri("holes"), 0, &disk));
    CHECK_OK(vrep_disk_extent(disk, 0, UINT64_MAX, &length, &hole));
    CHECK(hole && length == SIZE);
    memset(memory, 0xaa, SIZE);
    CHECK_OK(data(disk, VREP_IO_WRITE, 0, memory, SIZE, 0));
    CHECK_OK(vrep_disk_extent(disk, 100, 1000, &length, &hole));
    CHECK(!hole && length == 1000);
    CHECK_OK(range(disk, VREP_IO_ZERO, 65536, 65536, VREP_IO_FAST | VREP_IO_FUA));
    CHECK_OK(vrep_disk_extent(disk, 0, UINT64_MAX, &length, &hole));
    CHECK(!hole && length == 65536);
    CHECK_OK(vrep_disk_extent(disk, 65536, UINT64_MAX, &length, &hole));
    CHECK(hole && length == 65536);
    CHECK_OK(range(disk, VREP_IO_ZERO, 262144 + 1, 70000, VREP_IO_NO_HOLE));
    CHECK_OK(data(disk, VREP_IO_READ, 0, memory, SIZE, 0));
    for (size_t i = 0; i < SIZE; i++)
        CHECK(memory[i] == ((i >= 65536 && i < 131072) || (i > 262144 && i <= 332144) ? 0 : 0xaa));
    CHECK_STATUS(vrep_disk_extent(disk, SIZE, 1, &length, &hole), VREP_E_RANGE);
    vrep_disk_close(disk);
}

/* ---- overlays ------------------------------------------------------------------ */

#define BLOCK 4096u
#define BLOCKS 130u
#define SHORT (BLOCKS * BLOCK - 3 * 512) /* the last block is 2,560 bytes long */

static int overlay(const char *name, struct vrep_disk **disk)
{
    return vrep_overlay_open(engine, at(name), NULL, view_id, SHORT, BLOCK, disk);
}

static void presence_follows_whole_blocks(void)
{
    struct vrep_disk *disk;
    uint64_t from, length;
    CHECK_OK(overlay("view", &disk));
    CHECK(vrep_disk_is_overlay(disk));
    CHECK(vrep_overlay_absent(disk, 5000, 1, &from, &length));
    CHECK_EQ(from, BLOCK);
    CHECK_EQ(length, BLOCK);
    CHECK(vrep_overlay_absent(disk, 0, SHORT, &from, &length));
    CHECK(from == 0 && length == SHORT);
    CHECK_OK(data(disk, VREP_IO_WRITE, 100, memory, 2 * BLOCK, 0)); /* one block whole */
    CHECK_EQ(vrep_overlay_present_bytes(disk), BLOCK);
    CHECK(vrep_overlay_absent(disk, 0, 3 * BLOCK, &from, &length));
    CHECK(from == 0 && length == BLOCK);
    CHECK(!vrep_overlay_absent(disk, BLOCK, BLOCK, &from, &length));
    CHECK(vrep_overlay_absent(disk, BLOCK, BLOCK + 1, &from, &length));
    CHECK(from == 2 * BLOCK && length == BLOCK);
    /* the short last block is whole when the range reaches the end */
    CHECK_OK(range(disk, VREP_IO_ZERO, 129 * BLOCK + 1, SHORT - 129 * BLOCK - 1, 0));
    CHECK(vrep_overlay_absent(disk, 129 * BLOCK, 1, &from, &length));
    CHECK_EQ(length, SHORT - 129 * BLOCK);
    CHECK_OK(range(disk, VREP_IO_ZERO, 129 * BLOCK, SHORT - 129 * BLOCK, 0));
    CHECK(!vrep_overlay_absent(disk, 129 * BLOCK, SHORT - 129 * BLOCK, &from, &length));
    CHECK_EQ(vrep_overlay_present_bytes(disk), BLOCK + SHORT - 129 * BLOCK);
    vrep_overlay_set_present(disk, 60 * BLOCK, 10 * BLOCK); /* over a word's edge */
    CHECK(!vrep_overlay_absent(disk, 60 * BLOCK, 10 * BLOCK, &from, &length));
    CHECK(vrep_overlay_absent(disk, 59 * BLOCK, 71 * BLOCK, &from, &length));
    CHECK(from == 59 * BLOCK && length == BLOCK);
    uint64_t present_bytes = vrep_overlay_present_bytes(disk);
    vrep_disk_close(disk); /* what was not synced is still in memory, data and bits */
    CHECK_OK(overlay("view", &disk));
    CHECK_EQ(vrep_overlay_present_bytes(disk), present_bytes);
    vrep_disk_close(disk);
    CHECK_EQ(unlink(at("view.live")), 0); /* unless the power went */
    CHECK_OK(overlay("view", &disk));
    CHECK_EQ(vrep_overlay_present_bytes(disk), 0);
    vrep_overlay_set_present(disk, 60 * BLOCK, 10 * BLOCK);
    CHECK_OK(range(disk, VREP_IO_FLUSH, 0, 0, 0));
    CHECK_OK(data(disk, VREP_IO_WRITE, 0, memory, BLOCK, VREP_IO_FUA));
    vrep_disk_close(disk);
    CHECK_OK(overlay("view", &disk));
    CHECK_EQ(vrep_overlay_present_bytes(disk), 11 * BLOCK);
    struct vrep_disk *again;
    CHECK_STATUS(overlay("view", &again), VREP_E_LOCKED);
    vrep_disk_close(disk);
}

/* A view that fills a disk that holds something: only its own presence says what is right in it. */
static void an_overlay_fills_another_disk(void)
{
    struct vrep_disk *disk, *again;
    uint64_t from, length;
    char onto[300];
    snprintf(onto, sizeof onto, "file:%s", at("device"));
    memset(memory, 0xaa, SIZE);
    int fd = open(at("device"), O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0);
    CHECK_EQ(pwrite(fd, memory, SHORT, 0), SHORT);
    CHECK_STATUS(vrep_overlay_open(engine, at("fill"), onto, view_id, SHORT + 512, BLOCK, &disk),
                 VREP_E_INVALID);
    CHECK_STATUS(
        vrep_overlay_open(engine, at("fill"), "file:/nowhere", view_id, SHORT, BLOCK, &disk),
        VREP_E_NOT_FOUND);
    CHECK_OK(vrep_overlay_open(engine, at("fill"), onto, view_id, SHORT, BLOCK, &disk));
    CHECK_STATUS(vrep_overlay_open(engine, at("other"), onto, other_id, SHORT, BLOCK, &again),
                 VREP_E_LOCKED);
    CHECK(vrep_overlay_absent(disk, 0, SHORT, &from, &length));
    CHECK(from == 0 && length == SHORT);
    CHECK_OK(range(disk, VREP_IO_ZERO, 0, 2 * BLOCK, 0)); /* what was there is gone */
    memset(memory, 0x55, BLOCK);
    CHECK_OK(data(disk, VREP_IO_WRITE, 5 * BLOCK, memory, BLOCK, VREP_IO_FUA));
    vrep_disk_close(disk);
    CHECK_EQ(pread(fd, memory, SHORT, 0), SHORT);
    for (size_t i = 0; i < SHORT; i++)
        CHECK(memory[i] == (i < 2 * BLOCK ? 0 : i / BLOCK == 5 ? 0x55 : 0xaa));
    CHECK_EQ(unlink(at("fill.live")), 0); /* the power went */
    CHECK_OK(vrep_overlay_open(engine, at("fill"), onto, view_id, SHORT, BLOCK, &disk));
    CHECK_EQ(vrep_overlay_present_bytes(disk), 3 * BLOCK);
    vrep_disk_close(disk);
    CHECK_EQ(truncate(at("fill"), 0), 0); /* its creation was cut off: nothing is believed */
    CHECK_OK(vrep_overlay_open(engine, at("fill"), onto, view_id, SHORT, BLOCK, &disk));
    CHECK_EQ(vrep_overlay_present_bytes(disk), 0);
    vrep_disk_close(disk);
    CHECK_EQ(unlink(at("fill.presence")), 0);
    CHECK_STATUS(vrep_overlay_open(engine, at("fill"), onto, view_id, SHORT, BLOCK, &disk),
                 VREP_E_CORRUPT);
    close(fd);
}

static void poke(const char *name, off_t offset, uint8_t byte)
{
    int fd = open(at(name), O_RDWR);
    CHECK(fd >= 0);
    CHECK_EQ(pwrite(fd, &byte, 1, offset), 1);
    close(fd);
}

static void overlays_that_are_not_ours_are_refused(void)
{
    struct vrep_disk *disk;
    const off_t whole = (off_t)sizeof(struct vrep_presence_header) + 3 * 8;
    CHECK_OK(overlay("torn", &disk));
    vrep_disk_close(disk);
    CHECK_STATUS(vrep_overlay_open(engine, at("torn"), NULL, other_id, SHORT, BLOCK, &disk),
                 VREP_E_INVALID);
    CHECK_STATUS(vrep_overlay_open(engine, at("torn"), NULL, view_id, SHORT + 512, BLOCK, &disk),
                 VREP_E_INVALID);
    CHECK_STATUS(vrep_overlay_open(engine, at("torn"), NULL, view_id, SHORT, 2 * BLOCK, &disk),
                 VREP_E_INVALID);
    CHECK_STATUS(vrep_overlay_open(engine, at("bad"), NULL, view_id, SHORT, 3000, &disk),
                 VREP_E_INVALID);
    CHECK_STATUS(vrep_overlay_open(engine, at("bad"), NULL, view_id, 100, BLOCK, &disk),
                 VREP_E_INVALID);
    for (off_t bytes = 0; bytes < whole; bytes += 7) {
        CHECK_EQ(truncate(at("torn.presence"), whole), 0);
        CHECK_EQ(truncate(at("torn.presence"), bytes), 0);
        int status = overlay("torn", &disk);
        CHECK(status == VREP_E_TORN || status == VREP_E_CORRUPT);
    }
    unlink(at("torn.presence"));
    CHECK_STATUS(overlay("torn", &disk), VREP_E_CORRUPT);
    CHECK_OK(overlay("flipped", &disk));
    vrep_disk_close(disk);
    for (off_t i = 0; i < (off_t)sizeof(struct vrep_presence_header); i++) {
        uint8_t byte;
        int fd = open(at("flipped.presence"), O_RDONLY);
        CHECK_EQ(pread(fd, &byte, 1, i), 1);
        close(fd);
        poke("flipped.presence", i, (uint8_t)(byte ^ 0x10));
        CHECK_STATUS(overlay("flipped", &disk), VREP_E_CORRUPT);
        poke("flipped.presence", i, byte);
    }
    poke("flipped.presence", whole - 1, 0x80); /* a bit past the end of the disk */
    CHECK_STATUS(overlay("flipped", &disk), VREP_E_CORRUPT);
}

/* The live bits are a help, never a witness against the durable ones. */
static void live_bits_that_are_not_ours_are_made_anew(void)
{
    struct vrep_disk *disk;
    CHECK_OK(overlay("live", &disk));
    vrep_overlay_set_present(disk, 0, BLOCK);
    CHECK_OK(range(disk, VREP_IO_FLUSH, 0, 0, 0));
    vrep_overlay_set_present(disk, 4 * BLOCK, BLOCK);
    vrep_disk_close(disk);
    for (off_t i = 0; i < (off_t)sizeof(struct vrep_presence_header); i += 3) {
        CHECK_OK(overlay("live", &disk));
        vrep_overlay_set_present(disk, 4 * BLOCK, BLOCK);
        vrep_disk_close(disk);
        uint8_t byte;
        int fd = open(at("live.live"), O_RDONLY);
        CHECK_EQ(pread(fd, &byte, 1, i), 1);
        close(fd);
        poke("live.live", i, (uint8_t)(byte ^ 0x10)); /* boot, distrust, size, anything */
        CHECK_OK(overlay("live", &disk));
        CHECK_EQ(vrep_overlay_present_bytes(disk), BLOCK);
        vrep_disk_close(disk);
    }
    CHECK_EQ(truncate(at("live.live"), 5000 - 1000), 0);
    CHECK_OK(overlay("live", &disk));
    CHECK_EQ(vrep_overlay_present_bytes(disk), BLOCK);
    vrep_disk_close(disk);
}

static void an_unfinished_creation_starts_anew(void)
{
    struct vrep_disk *disk;
    make("half", 0);
    make("half.presence", 4096);
    poke("half.presence", sizeof(struct vrep_presence_header), 0xff); /* bits of another life */
    CHECK_OK(overlay("half", &disk));
    CHECK_EQ(vrep_overlay_present_bytes(disk), 0);
    vrep_disk_close(disk);
    CHECK_OK(overlay("half", &disk));
    CHECK_EQ(vrep_overlay_present_bytes(disk), 0);
    vrep_disk_close(disk);
}

int main(void)
{
    CHECK(mkdtemp(directory) != NULL);
    struct vrep_engine *none;
    CHECK_STATUS(vrep_engine_create(0, &none), VREP_E_INVALID);
    CHECK_STATUS(vrep_engine_create(65, &none), VREP_E_INVALID);
    CHECK_OK(vrep_engine_create(2, &engine));
    RUN(open_refuses);
    RUN(two_writers_refuse_each_other);
    RUN(bounds);
    RUN(sizes_are_read_again);
    RUN(large_writes_take_turns);
    RUN(direct_is_widened);
    RUN(a_tail_that_is_no_whole_block_is_never_overrun);
    RUN(zero_and_extents);
    RUN(presence_follows_whole_blocks);
    RUN(an_overlay_fills_another_disk);
    RUN(overlays_that_are_not_ours_are_refused);
    RUN(live_bits_that_are_not_ours_are_made_anew);
    RUN(an_unfinished_creation_starts_anew);
    vrep_engine_destroy(engine);
    char remove[300];
    snprintf(remove, sizeof remove, "rm -rf %s", directory);
    CHECK_EQ(system(remove), 0);
    return check_report();
}
