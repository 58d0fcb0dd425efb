/* What recording costs: 4 KiB random writes through a group, tap on and off, and bare pwritev2, in
 * turns.  Arguments: directory, writes per turn, turns.  Prints "name ns_per_write" lines, the
 * fastest turn of each; a consumer on the same thread releases what was published. */
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status.h"
#include "filter/group.h"
#include "ring/ring.h"

#define DISK_BYTES (UINT64_C(256) << 20)
#define BATCH 32

static uint8_t payload[4096] __attribute__((aligned(4096)));
static uint64_t state = 88172645463325252ull;

static uint64_t offset_next(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % (DISK_BYTES / 4096) * 4096;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void must(bool ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "filter_publish: %s failed\n", what);
        exit(1);
    }
}

static unsigned completed;

static void done(struct vrep_command *command)
{
    must(command->status == VREP_OK, "a write");
    completed++;
    vrep_command_put(command);
}

static struct vrep_group *open_group(const char *root, const char *name, bool tap)
{
    char uri[400], shm[300], kept[300], disk[300];
    snprintf(disk, sizeof disk, "%s/%s", root, name);
    snprintf(uri, sizeof uri, "file:%s", disk);
    snprintf(shm, sizeof shm, "/dev/shm/vrep-bench-%d-%s", (int)getpid(), name);
    snprintf(kept, sizeof kept, "%s/%s.state", root, name);
    must(mkdir(shm, 0700) == 0 && mkdir(kept, 0700) == 0, "mkdir");
    int fd = open(disk, O_CREAT | O_RDWR, 0600);
    must(fd >= 0, "open");
    static uint8_t mega[1 << 20];
    memset(mega, 1, sizeof mega);
    for (uint64_t at = 0; at < DISK_BYTES; at += sizeof mega)
        must(write(fd, mega, sizeof mega) == sizeof mega, "fill");
    close(fd);
    struct vrep_group_disk one = {.name = "a", .uri = uri};
    struct vrep_group_config config = {
        .epoch = 1,
        .flags = tap ? VREP_GROUP_TAP : 0,
        .disks = &one,
        .disks_count = 1,
        .shm_dir = shm,
        .state_dir = kept,
        .ring_bytes = 64u << 20,
        .ring_descriptors = 32768,
        .slots = 256,
        .bit_bytes = 65536,
        .threads = 2,
    };
    struct vrep_group *group;
    must(vrep_group_open(&config, &group) == VREP_OK, "vrep_group_open");
    return group;
}

static double through_group(struct vrep_group *group, struct vrep_ring_reader *reader,
                            unsigned count)
{
    uint64_t begun = now_ns();
    completed = 0;
    for (unsigned sent = 0; sent < count;) {
        for (unsigned i = 0; i < BATCH && sent < count; i++) {
            struct vrep_command *command = vrep_command_get(group);
            if (command == NULL)
                break;
            command->op = VREP_OP_WRITE;
            command->disk = 0;
            command->offset = offset_next();
            command->length = sizeof payload;
            command->done = done;
            must(vrep_command_prepare(command) == VREP_OK, "prepare");
            memcpy(command->iov[0].iov_base, payload, sizeof payload);
            vrep_command_submit(command);
            sent++;
        }
        vrep_group_poll(group);
        if (reader != NULL)
            vrep_ring_reader_set(reader, vrep_ring_reader_head(reader),
                                 vrep_ring_reader_head(reader), vrep_ring_reader_head(reader), 0);
    }
    while (completed < count)
        vrep_group_poll(group);
    return (double)(now_ns() - begun) / count;
}

static double bare(int fd, unsigned count)
{
    static uint8_t received[BATCH][4096];
    uint64_t begun = now_ns();
    for (unsigned i = 0; i < count; i++) {
        memcpy(received[i % BATCH], payload, sizeof payload); /* what a socket would do */
        struct iovec iov = {.iov_base = received[i % BATCH], .iov_len = sizeof payload};
        must(pwritev2(fd, &iov, 1, (off_t)offset_next(), 0) == sizeof payload, "pwritev2");
    }
    return (double)(now_ns() - begun) / count;
}

int main(int argc, char **argv)
{
    must(argc == 4, "usage: filter_publish DIRECTORY WRITES TURNS:");
    vrep_log_set_level(VREP_LOG_ERROR);
    unsigned count = (unsigned)atoi(argv[2]), turns = (unsigned)atoi(argv[3]);
    memset(payload, 0x5a, sizeof payload);
    struct vrep_group *tapped = open_group(argv[1], "tapped", true);
    struct vrep_group *plain = open_group(argv[1], "plain", false);
    char path[300];
    snprintf(path, sizeof path, "%s/plain", argv[1]);
    int fd = open(path, O_RDWR);
    must(fd >= 0, "open");
    snprintf(path, sizeof path, "/dev/shm/vrep-bench-%d-tapped/ring", (int)getpid());
    uint8_t target[16] = {0};
    int fds[3];
    struct vrep_ring_reader *reader;
    must(vrep_group_consumer_attach(tapped, VREP_CONTROL_TARGET, target, 0, fds) == VREP_OK,
         "attach");
    must(vrep_ring_reader_open(path, fds[0], fds[1], fds[2], &reader) == VREP_OK, "reader");
    must(vrep_group_resync(tapped, true, 0, false) == VREP_OK, "resync");
    struct vrep_group_status status;
    do {
        vrep_group_poll(tapped);
        uint64_t head = vrep_ring_reader_head(reader);
        vrep_ring_reader_set(reader, head, head, head, 0);
        vrep_group_status(tapped, &status);
    } while (status.gap);
    through_group(tapped, reader, count); /* extents become hot */
    double best[3] = {1e18, 1e18, 1e18};
    for (unsigned turn = 0; turn < turns; turn++) {
        double took[3] = {bare(fd, count), through_group(plain, NULL, count),
                          through_group(tapped, reader, count)};
        for (int i = 0; i < 3; i++)
            best[i] = took[i] < best[i] ? took[i] : best[i];
    }
    vrep_group_status(tapped, &status);
    must(status.unrecorded == 0, "recording every write");
    printf("pwritev2 %.0f\nuntapped %.0f\ntapped %.0f\n", best[0], best[1], best[2]);
    vrep_ring_reader_close(reader);
    vrep_group_close(tapped, false);
    vrep_group_close(plain, false);
    close(fd);
    return 0;
}
