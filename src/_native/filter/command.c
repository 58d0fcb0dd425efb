#include "filter/command.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "filter/internal.h"

/* The most that is copied on the group's thread to record a change after all. */
#define LATE_BYTES_MAX (1u << 20)
/* Enough iovecs for the largest payload, whatever chunks or blocks it got. */
#define ROOM_COUNT (VREP_WRITE_BYTES_MAX / VREP_CHUNK_BYTES + 2u)

static void *map_memory(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

int vrep_pool_create(struct vrep_group *group)
{
    group->commands_count = group->config.slots + COPIES + FILLS;
    group->private_blocks =
        (uint32_t)((group->config.private_bytes + PRIVATE_BLOCK - 1) / PRIVATE_BLOCK);
    group->private_bytes = (size_t)group->private_blocks * PRIVATE_BLOCK;
    group->room_bytes = (size_t)group->commands_count * ROOM_COUNT * sizeof(struct iovec);
    group->commands = calloc(group->commands_count, sizeof *group->commands);
    group->private_next = calloc(group->private_blocks, sizeof *group->private_next);
    group->room = map_memory(group->room_bytes);
    group->private_memory = map_memory(group->private_bytes);
    if (group->commands == NULL || group->private_next == NULL || group->room == NULL ||
        group->private_memory == NULL)
        return VREP_E_NOMEM;

    for (uint32_t i = 0; i < group->private_blocks; i++)
        group->private_next[i] = i + 1 < group->private_blocks ? i + 1 : NO_BLOCK;
    group->private_first = 0;
    group->private_free = group->private_blocks;

    list_init(&group->pool);
    for (uint32_t i = 0; i < group->commands_count; i++) {
        struct command *command = &group->commands[i];
        command->base.group = group;
        command->room = group->room + (size_t)i * ROOM_COUNT;
        command->block = NO_BLOCK;
        command->range.owner = command;
        command->generation = NO_GENERATION;
        if (i < group->config.slots)
            list_push(&group->pool, command);
    }
    group->copies = group->commands + group->config.slots;
    group->fills = group->copies + COPIES;
    for (uint32_t i = 0; i < COPIES; i++)
        group->copies[i].role = ROLE_COPY;
    for (uint32_t i = 0; i < FILLS; i++)
        group->fills[i].role = ROLE_FILL;
    return VREP_OK;
}

void vrep_pool_destroy(struct vrep_group *group)
{
    if (group->room != NULL)
        munmap(group->room, group->room_bytes);
    if (group->private_memory != NULL)
        munmap(group->private_memory, group->private_bytes);
    free(group->private_next);
    free(group->commands);
}

int vrep_pool_limit(struct vrep_group *group, uint32_t ring_slots)
{
    if (ring_slots <= SLOTS_OWN)
        return VREP_E_INVALID;
    for (uint32_t slots = group->config.slots; slots + SLOTS_OWN > ring_slots; slots--)
        (void)list_pop(&group->pool);
    return VREP_OK;
}

struct vrep_command *vrep_command_get(struct vrep_group *group)
{
    struct command *command = list_pop(&group->pool);
    if (command == NULL) {
        group->wanted = true;
        return NULL;
    }
    struct vrep_command *base = &command->base;
    base->flags = 0;
    base->iov = NULL;
    base->iovcnt = 0;
    base->status = VREP_OK;
    base->next = NULL;
    base->expect = NULL;
    base->found = NULL;
    base->mismatch = UINT64_MAX;
    command->in_use = true;
    command->submitted = false;
    command->slot = NULL;
    command->recorded = command->ranged = command->marked = command->intended = false;
    command->generation = NO_GENERATION;
    return base;
}

/* ---- payload memory -------------------------------------------------------- */

static bool private_take(struct vrep_group *group, struct command *command, uint64_t bytes)
{
    uint32_t blocks = (uint32_t)((bytes + PRIVATE_BLOCK - 1) / PRIVATE_BLOCK);
    if (blocks > group->private_free)
        return false;
    command->block = group->private_first;
    command->blocks = blocks;
    uint32_t last = group->private_first;
    for (uint32_t i = 1; i < blocks; i++)
        last = group->private_next[last];
    group->private_first = group->private_next[last];
    group->private_next[last] = NO_BLOCK;
    group->private_free -= blocks;
    return true;
}

static void private_give(struct vrep_group *group, struct command *command)
{
    uint32_t last = command->block;
    while (group->private_next[last] != NO_BLOCK)
        last = group->private_next[last];
    group->private_next[last] = group->private_first;
    group->private_first = command->block;
    group->private_free += command->blocks;
    command->block = NO_BLOCK;
    group->freed = group->freed || group->wanted;
}

void vrep_payload_free(struct vrep_group *group, struct command *command)
{
    if (command->block != NO_BLOCK)
        private_give(group, command);
}

/* Builds the iovecs of a write's payload in the command's room; returns their number. */
int vrep_payload_iov(struct vrep_group *group, struct command *command)
{
    struct iovec *iov = command->room;
    uint64_t left = command->base.length;
    if (command->block == NO_BLOCK)
        return vrep_ring_iov(group->ring, command->slot, 0, (uint32_t)left, iov, (int)ROOM_COUNT);
    int count = 0;
    for (uint32_t block = command->block; left > 0; block = group->private_next[block]) {
        uint8_t *at = group->private_memory + (size_t)block * PRIVATE_BLOCK;
        size_t bytes = left < PRIVATE_BLOCK ? (size_t)left : PRIVATE_BLOCK;
        if (count > 0 && (uint8_t *)iov[count - 1].iov_base + iov[count - 1].iov_len == at) {
            iov[count - 1].iov_len += bytes;
        } else {
            iov[count].iov_base = at;
            iov[count++].iov_len = bytes;
        }
        left -= bytes;
    }
    return count;
}

/* A guest's change goes into the ring unless seq ran into its durable limit, or sync copies are
 * owed room. */
static bool may_record(const struct vrep_group *group)
{
    return group->resync_owed <= 0 &&
           vrep_ring_head(group->ring) + group->commands_count + SLOTS_OWN < group->seq_limit;
}

/* Copies a payload that was received into private memory into the ring's; the backing is then
 * written from there. */
static void private_to_ring(struct vrep_group *group, struct command *command,
                            const struct iovec *to)
{
    uint64_t left = command->base.length;
    size_t used = 0;
    for (uint32_t block = command->block; left > 0; block = group->private_next[block]) {
        const uint8_t *from = group->private_memory + (size_t)block * PRIVATE_BLOCK;
        size_t bytes = left < PRIVATE_BLOCK ? (size_t)left : PRIVATE_BLOCK;
        left -= bytes;
        while (bytes > 0) {
            size_t part = to->iov_len - used < bytes ? to->iov_len - used : bytes;
            memcpy((uint8_t *)to->iov_base + used, from, part);
            from += part;
            bytes -= part;
            used += part;
            if (used == to->iov_len) {
                to++;
                used = 0;
            }
        }
    }
}

void vrep_payload_record(struct vrep_group *group, struct command *command)
{
    uint64_t payload = command->base.op == VREP_OP_WRITE ? command->base.length : 0;
    if (payload > LATE_BYTES_MAX || !may_record(group))
        return;
    struct vrep_ring_slot *slot = vrep_ring_reserve(group->ring, payload);
    if (slot == NULL)
        return;
    if (payload > 0) {
        if (vrep_ring_iov(group->ring, slot, 0, (uint32_t)payload, command->room, (int)ROOM_COUNT) <
            0) {
            vrep_ring_cancel(group->ring, slot);
            return;
        }
        private_to_ring(group, command, command->room);
        vrep_payload_free(group, command);
    }
    if (command->slot != NULL)
        vrep_ring_cancel(group->ring, command->slot);
    command->slot = slot;
    command->recorded = true;
}

/* ---- prepare ----------------------------------------------------------------- */

static int check_bounds(const struct vrep_group *group, const struct vrep_command *command)
{
    if (command->disk >= group->disks_count)
        return VREP_E_INVALID;
    if ((command->flags & ~(VREP_COMMAND_FUA | VREP_COMMAND_NO_HOLE | VREP_COMMAND_FAST)) != 0)
        return VREP_E_INVALID;
    if (command->op < VREP_OP_READ || command->op > VREP_OP_ZERO)
        return VREP_E_UNSUPPORTED;
    if (command->expect != NULL && (command->op != VREP_OP_WRITE || command->found == NULL))
        return VREP_E_INVALID;
    if (command->op == VREP_OP_FLUSH)
        return VREP_OK;
    uint64_t bytes = group->disks[command->disk].info.bytes;
    if (command->length == 0)
        return VREP_E_INVALID;
    if (command->offset > bytes || command->length > bytes - command->offset)
        return VREP_E_RANGE;
    bool data = command->op == VREP_OP_READ || command->op == VREP_OP_WRITE;
    if (command->length > (data ? VREP_WRITE_BYTES_MAX : UINT32_MAX))
        return VREP_E_INVALID;
    if (command->op != VREP_OP_READ && !group->mirror.on &&
        ((group->config.flags & VREP_GROUP_READ_ONLY) != 0 ||
         group->disks[command->disk].info.read_only))
        return VREP_E_READONLY;
    return VREP_OK;
}

/* The part of a discard that may be zeroed: whole blocks of the backing, if it makes zeroes
 * cheaply. */
static void trim_discard(const struct vrep_group *group, struct command *command)
{
    const struct vrep_disk_info *info = &group->disks[command->base.disk].info;
    uint64_t block = info->block_bytes > info->align_bytes ? info->block_bytes : info->align_bytes;
    uint64_t end = command->base.offset + command->base.length;
    uint64_t from = (command->base.offset + block - 1) / block * block;
    uint64_t to = end == info->bytes ? end : end / block * block;
    command->at = from;
    command->bytes = info->zero_is_cheap && to > from ? to - from : 0;
}

int vrep_command_prepare(struct vrep_command *base)
{
    struct vrep_group *group = base->group;
    struct command *command = command_of(base);
    int status = check_bounds(group, base);
    if (status != VREP_OK)
        return status;
    /* A flush need not wait: what came before it was not written here, and it syncs that too. */
    if (base->op != VREP_OP_FLUSH && !vrep_handover_over(group)) {
        group->wanted = true;
        return VREP_E_AGAIN;
    }
    command->at = base->offset;
    command->bytes = base->length;
    if (base->op == VREP_OP_READ || base->op == VREP_OP_FLUSH)
        return VREP_OK;
    if (base->op == VREP_OP_DISCARD && !group->mirror.on) {
        trim_discard(group, command);
        if (command->bytes == 0)
            return VREP_OK;
    }

    uint64_t payload = base->op == VREP_OP_WRITE ? base->length : 0;
    if (group->tap && may_record(group))
        command->slot = vrep_ring_reserve(group->ring, payload);
    command->recorded = command->slot != NULL;
    if (!command->recorded) {
        if (payload != 0 && !private_take(group, command, payload)) {
            group->wanted = true;
            return VREP_E_AGAIN;
        }
        /* Without an entry the write is as safe: its blocks are unshipped before it starts. */
        if (group->tap)
            command->slot = vrep_ring_reserve_unrecorded(group->ring);
    }
    if (payload != 0) {
        base->iov = command->room;
        base->iovcnt = vrep_payload_iov(group, command);
    }
    return VREP_OK;
}

void vrep_command_put(struct vrep_command *base)
{
    struct vrep_group *group = base->group;
    struct command *command = command_of(base);
    if (!command->in_use || command->submitted)
        return;
    if (command->slot != NULL) {
        vrep_ring_cancel(group->ring, command->slot);
        command->slot = NULL;
        group->freed = group->freed || group->wanted;
    }
    vrep_payload_free(group, command);
    command->in_use = false;
    group->freed = group->freed || group->wanted;
    list_push(&group->pool, command);
}

void vrep_command_submit(struct vrep_command *base)
{
    struct vrep_group *group = base->group;
    struct command *command = command_of(base);
    command->submitted = true;
    group->inflight++;
    switch (base->op) {
    case VREP_OP_READ:
        group->count.reads++;
        group->count.read_bytes += base->length;
        break;
    case VREP_OP_WRITE:
        group->count.writes++;
        group->count.write_bytes += base->length;
        break;
    case VREP_OP_FLUSH:
        group->count.flushes++;
        break;
    default:
        group->count.zeroes++;
        group->count.zero_bytes += command->bytes;
    }
    vrep_chain_submit(command);
}
