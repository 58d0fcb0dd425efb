/*
 * A group that does what a test says: the whole of filter/command.h and what the
 * serve room uses of filter/group.h, over real files. Commands can be held back,
 * fail, or find no room. Including it keeps the real group out of the program.
 * Switches are set by the test's thread, everything else runs on the loop's.
 */
#ifndef VREP_TESTS_NBD_DOUBLE_H
#define VREP_TESTS_NBD_DOUBLE_H

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/atomic.h"
#include "check.h"
#include "filter/group.h"
#include "track/map.h"

#define DOUBLE_COMMANDS 64
#define DOUBLE_DISKS 2
#define DOUBLE_PAYLOADS 4 /* writes that can be received at a time */
#define DOUBLE_BYTES (64u << 20)

struct double_command {
    struct vrep_command base;
    struct iovec iov;
    bool used;
    int payload; /* -1: none */
};

struct vrep_group {
    struct double_command command[DOUBLE_COMMANDS];
    uint8_t *payload[DOUBLE_PAYLOADS];
    bool payload_used[DOUBLE_PAYLOADS];
    struct vrep_engine *engine;
    struct vrep_disk *disk[DOUBLE_DISKS];
    int fd[DOUBLE_DISKS];
    struct vrep_map *map;
    int event;
    struct vrep_command *held_first, *held_last;
    void (*wakeup)(void *context);
    void *context;
    bool wanted;
    char directory[64];
    /* switches and witnesses, atomic */
    uint32_t hold;      /* submitted commands wait */
    uint32_t fail;      /* status of the next commands, negated; 0: none */
    uint32_t refuse;    /* the same, of prepare */
    uint32_t held;      /* how many wait */
    uint32_t submitted; /* ever */
    uint32_t used;      /* commands taken and not given back */
    uint32_t flags_seen;
    uint32_t disowned;
    uint32_t turns;    /* flush_wakeups called */
    uint32_t timeless; /* it asks for no turn by itself */
};

bool vrep_group_is_mirror(const struct vrep_group *group)
{
    (void)group;
    return false;
}

int vrep_group_mirror_join(struct vrep_group *group, uint32_t disk, int fd)
{
    (void)group, (void)disk, (void)fd;
    return VREP_OK;
}

void vrep_group_mirror_leave(struct vrep_group *group, int fd)
{
    (void)group, (void)fd;
}

struct vrep_command *vrep_command_get(struct vrep_group *group)
{
    for (int i = 0; i < DOUBLE_COMMANDS; i++) {
        if (group->command[i].used)
            continue;
        group->command[i] = (struct double_command){.used = true, .payload = -1};
        group->command[i].base.group = group;
        vrep_fetch_add_u32(&group->used, 1);
        return &group->command[i].base;
    }
    group->wanted = true;
    return NULL;
}

void vrep_command_put(struct vrep_command *base)
{
    struct double_command *command = (struct double_command *)base;
    struct vrep_group *group = base->group;
    if (command->payload >= 0)
        group->payload_used[command->payload] = false;
    CHECK(command->used);
    command->used = false;
    vrep_fetch_sub_u32(&group->used, 1);
    if (group->wanted && group->wakeup != NULL) {
        group->wanted = false;
        group->wakeup(group->context);
    }
}

int vrep_command_prepare(struct vrep_command *base)
{
    struct double_command *command = (struct double_command *)base;
    struct vrep_group *group = base->group;
    int status = -(int)vrep_load_acquire_u32(&group->refuse);
    if (status != VREP_OK || base->op != VREP_OP_WRITE)
        return status;
    CHECK(base->length > 0 && base->length <= VREP_WRITE_BYTES_MAX);
    for (int i = 0; i < DOUBLE_PAYLOADS; i++) {
        if (group->payload_used[i])
            continue;
        group->payload_used[i] = true;
        command->payload = i;
        command->iov = (struct iovec){group->payload[i], base->length};
        base->iov = &command->iov;
        base->iovcnt = 1;
        return VREP_OK;
    }
    group->wanted = true;
    return VREP_E_AGAIN;
}

static int double_run(struct vrep_group *group, struct vrep_command *base)
{
    int fd = group->fd[base->disk];
    uint64_t moved = 0;
    switch (base->op) {
    case VREP_OP_READ:
        for (int i = 0; i < base->iovcnt; i++) {
            ssize_t n = pread(fd, base->iov[i].iov_base, base->iov[i].iov_len,
                              (off_t)(base->offset + moved));
            if (n != (ssize_t)base->iov[i].iov_len)
                return VREP_E_IO;
            moved += (uint64_t)n;
        }
        return moved == base->length ? VREP_OK : VREP_E_IO;
    case VREP_OP_WRITE:
        return pwrite(fd, base->iov->iov_base, base->length, (off_t)base->offset) ==
                       (ssize_t)base->length
                   ? VREP_OK
                   : VREP_E_IO;
    case VREP_OP_FLUSH:
        return VREP_OK;
    default:
        return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)base->offset,
                         (off_t)base->length) == 0
                   ? VREP_OK
                   : VREP_E_UNSUPPORTED;
    }
}

static void double_finish(struct vrep_group *group, struct vrep_command *base)
{
    int fail = -(int)vrep_load_acquire_u32(&group->fail);
    base->status = fail != VREP_OK ? fail : double_run(group, base);
    base->done(base);
}

void vrep_command_submit(struct vrep_command *base)
{
    struct vrep_group *group = base->group;
    vrep_fetch_add_u32(&group->submitted, 1);
    vrep_fetch_or_u32(&group->flags_seen, base->flags);
    if (!vrep_load_acquire_u32(&group->hold)) {
        double_finish(group, base);
        return;
    }
    base->next = NULL;
    if (group->held_last != NULL)
        group->held_last->next = base;
    else
        group->held_first = base;
    group->held_last = base;
    vrep_fetch_add_u32(&group->held, 1);
}

void vrep_group_poll(struct vrep_group *group)
{
    uint64_t count;
    if (read(group->event, &count, sizeof count) < 0)
        count = 0;
    while (!vrep_load_acquire_u32(&group->hold) && group->held_first != NULL) {
        struct vrep_command *base = group->held_first;
        group->held_first = base->next;
        if (group->held_first == NULL)
            group->held_last = NULL;
        vrep_fetch_sub_u32(&group->held, 1);
        double_finish(group, base);
    }
}

int vrep_group_fd(const struct vrep_group *group)
{
    return group->event;
}

int vrep_group_timeout_ms(const struct vrep_group *group)
{
    return vrep_load_acquire_u32(&group->timeless) ? -1 : 1000;
}

void vrep_group_flush_wakeups(struct vrep_group *group)
{
    vrep_fetch_add_u32(&group->turns, 1);
}

void vrep_group_set_wakeup(struct vrep_group *group, void (*wakeup)(void *context), void *context)
{
    group->wakeup = wakeup;
    group->context = context;
}

void vrep_group_disown(struct vrep_group *group)
{
    vrep_fetch_add_u32(&group->disowned, 1);
}

uint32_t vrep_group_disks(const struct vrep_group *group)
{
    (void)group;
    return DOUBLE_DISKS;
}

const char *vrep_group_disk_name(const struct vrep_group *group, uint32_t disk)
{
    (void)group;
    return disk == 0 ? "root" : "data";
}

struct vrep_disk *vrep_group_disk(struct vrep_group *group, uint32_t disk)
{
    return group->disk[disk];
}

uint64_t vrep_group_disk_bytes(const struct vrep_group *group, uint32_t disk)
{
    (void)group;
    return DOUBLE_BYTES >> disk;
}

/* A double has no base. */
const char *vrep_group_since_name(const struct vrep_group *group)
{
    (void)group;
    return NULL;
}

const struct vrep_since *vrep_group_since(const struct vrep_group *group, uint32_t disk)
{
    (void)group;
    (void)disk;
    return NULL;
}

struct vrep_map *vrep_group_map(struct vrep_group *group)
{
    return group->map;
}

CHECK_UNUSED static void double_hold(struct vrep_group *group, bool hold)
{
    vrep_store_release_u32(&group->hold, hold);
    uint64_t one = 1;
    if (!hold)
        CHECK_EQ(write(group->event, &one, sizeof one), 8);
}

CHECK_UNUSED static struct vrep_group *double_open(void)
{
    struct vrep_group *group = calloc(1, sizeof *group);
    uint8_t id[16] = {1};
    uint64_t bytes[DOUBLE_DISKS];
    char path[128], uri[140];
    CHECK(group != NULL);
    strcpy(group->directory, "/tmp/vrep-nbd-XXXXXX");
    CHECK(mkdtemp(group->directory) != NULL);
    CHECK_OK(vrep_engine_create(1, &group->engine));
    for (uint32_t i = 0; i < DOUBLE_DISKS; i++) {
        bytes[i] = DOUBLE_BYTES >> i;
        snprintf(path, sizeof path, "%s/disk.%u", group->directory, i);
        snprintf(uri, sizeof uri, "file:%s", path);
        group->fd[i] = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
        CHECK(group->fd[i] >= 0);
        CHECK_EQ(ftruncate(group->fd[i], (off_t)bytes[i]), 0);
        CHECK_OK(vrep_disk_open(group->engine, uri, 0, &group->disk[i]));
    }
    for (int i = 0; i < DOUBLE_PAYLOADS; i++)
        CHECK((group->payload[i] = malloc(VREP_WRITE_BYTES_MAX)) != NULL);
    snprintf(path, sizeof path, "%s/map", group->directory);
    CHECK_OK(vrep_map_create(path, id, id, bytes, DOUBLE_DISKS, 65536, &group->map));
    group->event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK(group->event >= 0);
    return group;
}

CHECK_UNUSED static void double_close(struct vrep_group *group)
{
    char path[128];
    vrep_map_detach(group->map);
    for (uint32_t i = 0; i < DOUBLE_DISKS; i++) {
        vrep_disk_close(group->disk[i]);
        close(group->fd[i]);
        snprintf(path, sizeof path, "%s/disk.%u", group->directory, i);
        unlink(path);
    }
    vrep_engine_destroy(group->engine);
    for (int i = 0; i < DOUBLE_PAYLOADS; i++)
        free(group->payload[i]);
    snprintf(path, sizeof path, "%s/map", group->directory);
    unlink(path);
    rmdir(group->directory);
    close(group->event);
    free(group);
}

#endif
