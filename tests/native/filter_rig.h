/* A group on files in a temporary directory, driven by the test's own thread. */
#ifndef VREP_TESTS_FILTER_RIG_H
#define VREP_TESTS_FILTER_RIG_H

#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "filter/group.h"
#include "ring/ring.h"
#include "track/map.h"

#define RIG_BYTES (4u << 20)
#define RIG_BIT 65536u

struct rig {
    char root[64], disk[96], uri[128], shm[96], state[96], ring[128];
    struct vrep_group_disk disks[1];
    struct vrep_group_config config;
    struct vrep_group *group;
    struct vrep_ring_reader *reader;
    uint64_t applied, reported;
    uint64_t bytes; /* of the disk, as its records say */
    bool seen_begin, seen_end, in_gap;
    uint32_t kinds[16];
    uint16_t last_flags;
    uint8_t shadow[RIG_BYTES];
};

CHECK_UNUSED static void rig_init(struct rig *rig)
{
    memset(rig, 0, sizeof *rig);
    const char *base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(rig->root, sizeof rig->root, "%s/vrep-test-XXXXXX", base);
    CHECK(mkdtemp(rig->root) != NULL);
    snprintf(rig->disk, sizeof rig->disk, "%s/disk", rig->root);
    snprintf(rig->uri, sizeof rig->uri, "file:%s", rig->disk);
    snprintf(rig->shm, sizeof rig->shm, "%s/shm", rig->root);
    snprintf(rig->state, sizeof rig->state, "%s/state", rig->root);
    snprintf(rig->ring, sizeof rig->ring, "%s/ring", rig->shm);
    CHECK(mkdir(rig->shm, 0700) == 0 && mkdir(rig->state, 0700) == 0);
    int fd = open(rig->disk, O_CREAT | O_RDWR, 0600);
    CHECK(fd >= 0 && ftruncate(fd, RIG_BYTES) == 0);
    close(fd);
    rig->bytes = RIG_BYTES;
    rig->disks[0] = (struct vrep_group_disk){.name = "a", .uri = rig->uri};
    rig->config = (struct vrep_group_config){
        .group_id = {1},
        .target_id = {2},
        .epoch_id = {3},
        .epoch = 1,
        .flags = VREP_GROUP_TAP,
        .disks = rig->disks,
        .disks_count = 1,
        .shm_dir = rig->shm,
        .state_dir = rig->state,
        .ring_bytes = 8u << 20,
        .ring_descriptors = 1024,
        .slots = 64,
        .bit_bytes = RIG_BIT,
        .threads = 2,
    };
}

/* Data that were there before the group: only a sync copy can bring them over. */
CHECK_UNUSED static void rig_preset(struct rig *rig, int fill)
{
    static uint8_t data[RIG_BYTES];
    memset(data, fill, sizeof data);
    int fd = open(rig->disk, O_WRONLY);
    CHECK(fd >= 0 && pwrite(fd, data, sizeof data, 0) == (ssize_t)sizeof data);
    close(fd);
}

CHECK_UNUSED static void rig_open(struct rig *rig)
{
    CHECK_OK(vrep_group_open(&rig->config, &rig->group));
}

CHECK_UNUSED static void rig_detach_reader(struct rig *rig)
{
    if (rig->reader != NULL)
        vrep_ring_reader_close(rig->reader);
    rig->reader = NULL;
}

CHECK_UNUSED static void rig_close(struct rig *rig, bool clean)
{
    rig_detach_reader(rig);
    vrep_group_close(rig->group, clean);
    rig->group = NULL;
}

CHECK_UNUSED static void rig_kill(struct rig *rig)
{
    rig_detach_reader(rig);
    vrep_group_abandon(rig->group);
    rig->group = NULL;
}

CHECK_UNUSED static void rig_shell(const char *format, const char *path)
{
    char command[256];
    snprintf(command, sizeof command, format, path);
    CHECK_EQ(system(command), 0);
}

CHECK_UNUSED static void rig_power_loss(struct rig *rig)
{
    rig_kill(rig);
    rig_shell("rm -f %s/*", rig->shm);
}

CHECK_UNUSED static void rig_free(struct rig *rig)
{
    if (rig->group != NULL)
        rig_close(rig, true);
    rig_shell("rm -rf %s", rig->root);
}

CHECK_UNUSED static void rig_done(struct vrep_command *command)
{
    *(bool *)command->owner = true;
}

CHECK_UNUSED static struct vrep_group_status rig_status(struct rig *rig)
{
    struct vrep_group_status status;
    CHECK_OK(vrep_group_status(rig->group, &status));
    return status;
}

CHECK_UNUSED static struct vrep_command *rig_prepare(struct rig *rig, uint8_t op, uint8_t flags,
                                                     uint64_t offset, uint64_t length, int fill,
                                                     bool *done)
{
    struct vrep_command *command = vrep_command_get(rig->group);
    CHECK(command != NULL);
    command->op = op;
    command->flags = flags;
    command->disk = 0;
    command->offset = offset;
    command->length = length;
    command->done = rig_done;
    command->owner = done;
    *done = false;
    CHECK_OK(vrep_command_prepare(command));
    if (op == VREP_OP_WRITE)
        for (int i = 0; i < command->iovcnt; i++) /* the payload arrives */
            memset(command->iov[i].iov_base, fill, command->iov[i].iov_len);
    /* A front-end may use its iovecs up while it receives. */
    if (op == VREP_OP_WRITE)
        memset(command->iov, 0, (size_t)command->iovcnt * sizeof *command->iov);
    return command;
}

/* Until it is done. Asleep: on a busy machine a thread that polls all the time takes the processor
 * from the very threads that it waits for, a time slice for each command. */
CHECK_UNUSED static void rig_wait(struct rig *rig, const bool *done)
{
    time_t until = time(NULL) + 60;
    while (!*done && time(NULL) < until) {
        struct pollfd work = {.fd = vrep_group_fd(rig->group), .events = POLLIN};
        int most = vrep_group_timeout_ms(rig->group);
        (void)poll(&work, 1, most >= 0 && most < 10 ? most : 10);
        vrep_group_poll(rig->group);
    }
    CHECK(*done);
}

/* Runs a command until done; returns its status. */
CHECK_UNUSED static int rig_run(struct rig *rig, uint8_t op, uint8_t flags, uint64_t offset,
                                uint64_t length, int fill)
{
    bool done;
    struct vrep_command *command = rig_prepare(rig, op, flags, offset, length, fill, &done);
    vrep_command_submit(command);
    rig_wait(rig, &done);
    int status = command->status;
    vrep_command_put(command);
    return status;
}

CHECK_UNUSED static int rig_read(struct rig *rig, uint64_t offset, uint64_t length, void *to)
{
    bool done;
    struct iovec iov = {.iov_base = to, .iov_len = length};
    struct vrep_command *command = rig_prepare(rig, VREP_OP_READ, 0, offset, length, 0, &done);
    command->iov = &iov;
    command->iovcnt = 1;
    vrep_command_submit(command);
    rig_wait(rig, &done);
    int status = command->status;
    vrep_command_put(command);
    return status;
}

CHECK_UNUSED static void rig_attach(struct rig *rig)
{
    int fds[3];
    rig_detach_reader(rig);
    CHECK_OK(vrep_group_consumer_attach(rig->group, VREP_CONTROL_TARGET, rig->config.target_id,
                                        rig->applied, fds));
    CHECK_OK(vrep_ring_reader_open(rig->ring, fds[0], fds[1], fds[2], &rig->reader));
    for (int i = 0; i < 3; i++)
        close(fds[i]);
    uint64_t released = vrep_ring_reader_released(rig->reader);
    if (rig->applied < released)
        rig->applied = released;
    rig->reported = rig->applied;
}

/* Applies every record to the shadow disk, and says that they are durable there when asked. */
CHECK_UNUSED static void rig_apply(struct rig *rig, bool durable)
{
    uint64_t head = vrep_ring_reader_head(rig->reader);
    while (rig->applied < head) {
        struct vrep_ring_desc desc;
        static struct iovec iov[8200];
        int count;
        CHECK_OK(vrep_ring_reader_desc(rig->reader, rig->applied + 1, &desc));
        rig->kinds[desc.kind]++;
        rig->last_flags = desc.flags;
        if (desc.kind == VREP_KIND_WRITE || desc.kind == VREP_KIND_SYNC) {
            CHECK_OK(vrep_ring_reader_iov(rig->reader, &desc, iov, 8200, &count));
            uint64_t at = desc.offset;
            for (int i = 0; i < count; i++) {
                memcpy(rig->shadow + at, iov[i].iov_base, iov[i].iov_len);
                at += iov[i].iov_len;
            }
            CHECK_EQ(at, desc.offset + desc.length);
        } else if (desc.kind == VREP_KIND_ZEROES || desc.kind == VREP_KIND_SYNC_ZEROES) {
            memset(rig->shadow + desc.offset, 0, desc.length);
        } else if (desc.kind == VREP_KIND_RESIZE) {
            /* Each position outside of a gap is a recovery point: new space reads zero at once. */
            for (uint64_t i = rig->bytes; !rig->in_gap && i < desc.offset; i++)
                CHECK_EQ(rig->shadow[i], 0);
            rig->bytes = desc.offset;
        } else if (desc.kind == VREP_KIND_GAP_BEGIN) {
            rig->seen_begin = rig->in_gap = true;
        } else if (desc.kind == VREP_KIND_GAP_END) {
            CHECK(rig->in_gap);
            rig->seen_end = true;
            rig->in_gap = false;
        }
        rig->applied++;
    }
    if (durable)
        rig->reported = head;
    vrep_ring_reader_set(rig->reader, head, head, rig->reported, 0);
}

/* Polls until the gap has ended and all is durable at the shadow. */
CHECK_UNUSED static void rig_settle(struct rig *rig)
{
    time_t until = time(NULL) + 60;
    do {
        vrep_group_poll(rig->group);
        rig_apply(rig, true);
        struct vrep_group_status status = rig_status(rig);
        if (!status.gap && status.durable == status.head)
            return;
        usleep(1000);
    } while (time(NULL) < until);
    CHECK(!"the gap never ended");
}

CHECK_UNUSED static void rig_sync(struct rig *rig)
{
    rig_attach(rig);
    CHECK_OK(vrep_group_resync(rig->group, true, 0, false));
    rig_settle(rig);
}

CHECK_UNUSED static void rig_compare(struct rig *rig)
{
    static uint8_t source[RIG_BYTES];
    int fd = open(rig->disk, O_RDONLY);
    CHECK(fd >= 0);
    CHECK_EQ(pread(fd, source, RIG_BYTES, 0), RIG_BYTES);
    close(fd);
    CHECK_MEM(rig->shadow, source, RIG_BYTES);
}

/* Invariant 2: what differs has its bit set. */
CHECK_UNUSED static uint64_t rig_check_dirty(struct rig *rig)
{
    static uint8_t source[RIG_BYTES];
    int fd = open(rig->disk, O_RDONLY);
    CHECK(fd >= 0);
    CHECK_EQ(pread(fd, source, RIG_BYTES, 0), RIG_BYTES);
    close(fd);
    struct vrep_map *map = vrep_group_map(rig->group);
    static uint64_t words[8192];
    CHECK(vrep_map_header(map)->disk[0].words <= 8192);
    vrep_map_union(map, 0, words);
    uint64_t differ = 0;
    for (uint64_t bit = 0; bit < RIG_BYTES / RIG_BIT; bit++) {
        bool set = (words[bit / 64] >> (bit % 64) & 1) != 0;
        if (memcmp(source + bit * RIG_BIT, rig->shadow + bit * RIG_BIT, RIG_BIT) != 0) {
            CHECK(set);
            differ++;
        }
    }
    return differ;
}

#endif
