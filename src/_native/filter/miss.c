/* Miss: commands on absent blocks of a view wait here while another thread
 * fetches them; fills write what came under the overlap rule. */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "filter/fault.h"
#include "filter/internal.h"

#define FILL_LOOK_MS 10 /* who waits for a fill looks so often whether somebody polls */

int vrep_miss_init(struct vrep_group *group)
{
    pthread_condattr_t monotonic;
    pthread_mutex_init(&group->miss_lock, NULL);
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&group->miss_wake, &monotonic);
    pthread_cond_init(&group->fill_wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    list_init(&group->miss_full);
    for (uint32_t i = 0; i < MISSES; i++)
        list_init(&group->misses[i].waiters);
    return VREP_OK;
}

void vrep_miss_destroy(struct vrep_group *group)
{
    pthread_cond_destroy(&group->fill_wake);
    pthread_cond_destroy(&group->miss_wake);
    pthread_mutex_destroy(&group->miss_lock);
}

static void set_state(struct vrep_group *group, struct miss *miss, enum miss_state state)
{
    pthread_mutex_lock(&group->miss_lock);
    miss->state = state;
    if (state == MISS_QUEUED)
        pthread_cond_signal(&group->miss_wake);
    pthread_mutex_unlock(&group->miss_lock);
}

/* A state is changed by the fetching thread too: QUEUED to TAKEN. */
static enum miss_state state_of(struct vrep_group *group, const struct miss *miss)
{
    pthread_mutex_lock(&group->miss_lock);
    enum miss_state state = miss->state;
    pthread_mutex_unlock(&group->miss_lock);
    return state;
}

static struct miss *find(struct vrep_group *group, uint16_t disk, uint64_t offset)
{
    for (uint32_t i = 0; i < MISSES; i++) {
        struct miss *miss = &group->misses[i];
        if (state_of(group, miss) != MISS_FREE && miss->disk == disk && offset >= miss->offset &&
            offset - miss->offset < miss->length)
            return miss;
    }
    return NULL;
}

static struct miss *ask(struct vrep_group *group, uint16_t disk, uint64_t offset, uint64_t length,
                        enum miss_state state)
{
    for (uint32_t i = 0; i < MISSES; i++) {
        struct miss *miss = &group->misses[i];
        if (state_of(group, miss) != MISS_FREE)
            continue;
        miss->ticket = ++group->ticket;
        miss->disk = disk;
        miss->offset = offset;
        miss->length = length < MISS_BYTES_MAX ? length : MISS_BYTES_MAX;
        miss->filled = NULL;
        set_state(group, miss, state);
        return miss;
    }
    return NULL;
}

void vrep_miss_prefetch(struct vrep_group *group, uint16_t disk, uint64_t offset, uint64_t length)
{
    if (find(group, disk, offset) == NULL)
        ask(group, disk, offset, length, MISS_QUEUED);
}

static void wait_for(struct vrep_group *group, struct command *command, uint64_t absent,
                     uint64_t length)
{
    struct miss *miss = find(group, command->base.disk, absent);
    if (miss == NULL)
        miss = ask(group, command->base.disk, absent, length, MISS_QUEUED);
    list_push(miss != NULL ? &miss->waiters : &group->miss_full, command);
}

/* ---- the view filter ------------------------------------------------------------ */

/* What must be fetched first: all of a read or compare, the partly covered blocks of a change. */
static bool missing(const struct vrep_group *group, const struct command *command, uint64_t *absent,
                    uint64_t *length)
{
    const struct disk *disk = &group->disks[command->base.disk];
    uint64_t block = disk->info.block_bytes, bytes = disk->info.bytes;
    if (command->base.op == VREP_OP_READ || command->base.expect != NULL)
        return vrep_overlay_absent(disk->disk, command->base.offset, command->base.length, absent,
                                   length);
    if (command->bytes == 0)
        return false;
    uint64_t end = command->at + command->bytes;
    uint64_t first = command->at - command->at % block, last = end - end % block;
    if (command->at != first && vrep_overlay_absent(disk->disk, first, 1, absent, length))
        return true;
    return end != last && end != bytes && vrep_overlay_absent(disk->disk, last, 1, absent, length);
}

static void view_submit(struct vrep_filter *filter, struct command *command)
{
    struct vrep_group *group = filter->group;
    uint64_t absent, length;
    bool changes = command->base.op != VREP_OP_FLUSH && command->base.op != VREP_OP_READ;
    if (changes && group->disks[command->base.disk].since != NULL)
        vrep_since_mark(group->disks[command->base.disk].since, command->base.offset,
                        command->base.length);
    if (command->base.op != VREP_OP_FLUSH && group->disks[command->base.disk].overlay &&
        missing(group, command, &absent, &length)) {
        if (group->closing) {
            command->base.status = VREP_E_GONE;
            vrep_chain_up(command);
            return;
        }
        wait_for(group, command, absent, length);
        return;
    }
    vrep_chain_down(command);
}

static void view_completed(struct vrep_filter *filter, struct command *command)
{
    (void)filter;
    vrep_chain_up(command);
}

const struct vrep_filter_ops vrep_view_ops = {
    .name = "view", .submit = view_submit, .completed = view_completed};

/* ---- fills ------------------------------------------------------------------------ */

static void resume_all(struct list waiting, int status)
{
    struct command *command;
    while ((command = list_pop(&waiting)) != NULL) {
        if (status == VREP_OK) {
            vrep_chain_submit(command);
        } else {
            command->base.status = status;
            vrep_chain_up(command); /* it waits in the first filter */
        }
    }
}

static void end_miss(struct vrep_group *group, struct miss *miss, int status)
{
    struct list waiters = miss->waiters, full = group->miss_full;
    bool *filled = miss->filled;
    int *filled_status = miss->filled_status;
    if (waiters.first == NULL)
        list_init(&waiters);
    if (full.first == NULL)
        list_init(&full);
    list_init(&miss->waiters);
    list_init(&group->miss_full);
    set_state(group, miss, MISS_FREE);
    resume_all(waiters, status);
    resume_all(full, VREP_OK);
    if (filled != NULL) {
        pthread_mutex_lock(&group->miss_lock);
        *filled_status = status;
        *filled = true;
        pthread_cond_broadcast(&group->fill_wake);
        pthread_mutex_unlock(&group->miss_lock);
    }
}

static void end_fill(struct vrep_group *group, struct command *fill, int status)
{
    struct miss *miss = fill->miss;
    vrep_overlap_release(group->overlap, &fill->range, vrep_tap_granted, group);
    fill->ranged = fill->in_use = false;
    fill->miss = NULL;
    group->fills_inflight--;
    end_miss(group, miss, status);
    vrep_tap_drain(group);
}

static void filled_part(struct command *fill);

/* What is written next of the blocks that are being filled: a part may go on behind them. */
static bool next_part(struct miss *miss, uint64_t *from, uint64_t *length)
{
    for (; miss->parts_left > 0; miss->parts++, miss->parts_left--) {
        uint64_t end = miss->parts->offset + miss->parts->length;
        *from = miss->parts->offset > miss->at ? miss->parts->offset : miss->at;
        if (*from >= miss->end)
            return false;
        if (*from >= end)
            continue;
        *length = (end < miss->end ? end : miss->end) - *from;
        miss->at = *from + *length;
        return true;
    }
    return false;
}

/* Only what is still absent: a guest's newer data stay.  Blocks are present once all of their parts
 * are written. */
static void fill_next_part(struct command *fill)
{
    struct vrep_group *group = fill->base.group;
    struct vrep_disk *disk = disk_of(group, fill)->disk;
    struct miss *miss = fill->miss;
    uint64_t from, length;
    while (miss->first == miss->end || !next_part(miss, &from, &length)) {
        if (miss->first < miss->end) {
            vrep_fault("fill.before_present");
            vrep_overlay_set_present(disk, miss->first, miss->end - miss->first);
            vrep_fault("fill.after_present");
        }
        if (!vrep_overlay_absent(disk, fill->at, fill->bytes, &from, &length)) {
            end_fill(group, fill, VREP_OK);
            return;
        }
        miss->first = miss->at = from;
        miss->end = from + length;
        fill->bytes -= miss->end - fill->at;
        fill->at = miss->end;
    }
    vrep_fault("fill.before_part");
    if (miss->data == NULL) {
        vrep_backing_start(fill, VREP_IO_ZERO, 0, from, length, NULL, 0, filled_part);
        return;
    }
    fill->room[0].iov_base = (void *)(uintptr_t)(miss->data + (from - miss->offset));
    fill->room[0].iov_len = length;
    vrep_backing_start(fill, VREP_IO_WRITE, 0, from, length, fill->room, 1, filled_part);
}

static void filled_part(struct command *fill)
{
    if (fill->io.status != VREP_OK) {
        fill->base.group->count.errors++;
        end_fill(fill->base.group, fill, fill->io.status);
        return;
    }
    fill_next_part(fill);
}

void vrep_fill_granted(struct command *fill)
{
    fill_next_part(fill);
}

struct fill_request {
    uint64_t ticket;
    const void *data;
    const struct vrep_fill_part *parts; /* NULL: all of it */
    uint32_t parts_count;
    int status;
    bool filled;
    int filled_status;
};

static bool in_order(const struct fill_request *request, const struct miss *miss)
{
    uint64_t at = miss->offset, end = miss->offset + miss->length;
    for (uint32_t i = 0; i < request->parts_count; i++) {
        const struct vrep_fill_part *part = &request->parts[i];
        if (part->offset < at || part->offset > end || part->length == 0 ||
            part->length > end - part->offset)
            return false;
        at = part->offset + part->length;
    }
    return true;
}

static int fill_begin(struct vrep_group *group, void *argument)
{
    struct fill_request *request = argument;
    struct miss *miss = NULL;
    for (uint32_t i = 0; i < MISSES && miss == NULL; i++)
        if (state_of(group, &group->misses[i]) == MISS_TAKEN &&
            group->misses[i].ticket == request->ticket)
            miss = &group->misses[i];
    if (miss == NULL)
        return VREP_E_NOT_FOUND;
    if (!in_order(request, miss))
        return VREP_E_INVALID;
    struct command *fill = NULL;
    for (uint32_t i = 0; i < FILLS && fill == NULL; i++)
        if (!group->fills[i].in_use)
            fill = &group->fills[i];
    if (fill == NULL)
        return VREP_E_AGAIN;
    miss->filled = &request->filled;
    miss->filled_status = &request->filled_status;
    miss->data = request->data;
    miss->whole = (struct vrep_fill_part){.offset = miss->offset, .length = miss->length};
    miss->parts = request->parts != NULL ? request->parts : &miss->whole;
    miss->parts_left = request->parts != NULL ? request->parts_count : 1;
    miss->first = miss->at = miss->end = 0;
    set_state(group, miss, MISS_FILLING);
    if (request->status != VREP_OK) {
        end_miss(group, miss, request->status);
        return VREP_OK;
    }
    fill->in_use = true;
    fill->miss = miss;
    fill->base.disk = miss->disk;
    fill->base.op = VREP_OP_WRITE;
    fill->at = miss->offset;
    fill->bytes = miss->length;
    fill->range.disk = miss->disk;
    fill->range.offset = miss->offset;
    fill->range.length = miss->length;
    fill->ranged = true;
    group->fills_inflight++;
    if (vrep_overlap_acquire(group->overlap, &fill->range))
        list_push(&group->ready, fill);
    vrep_tap_drain(group);
    return VREP_OK;
}

static struct timespec in_ms(int ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    uint64_t at = (uint64_t)until.tv_sec * NS_PER_S + (uint64_t)until.tv_nsec +
                  (ms > 0 ? (uint64_t)ms * NS_PER_MS : 0);
    until.tv_sec = (time_t)(at / NS_PER_S);
    until.tv_nsec = (long)(at % NS_PER_S);
    return until;
}

static bool ended_within(struct vrep_group *group, const struct fill_request *request, int ms)
{
    struct timespec until = in_ms(ms);
    int error = 0;
    pthread_mutex_lock(&group->miss_lock);
    while (!request->filled && error != ETIMEDOUT)
        error = pthread_cond_timedwait(&group->fill_wake, &group->miss_lock, &until);
    bool filled = request->filled;
    pthread_mutex_unlock(&group->miss_lock);
    return filled;
}

/* Who polls the group ends the fill.  When nobody does, or does no more since the group's
 * front-ends were stopped, one of those that wait does it. */
static void await(struct vrep_group *group, const struct fill_request *request)
{
    bool taken;
    do {
        if (!vrep_group_take(group, &taken))
            continue;
        while (!ended_within(group, request, 0))
            vrep_group_wait(group, FILL_LOOK_MS);
        if (taken)
            vrep_group_disown(group);
    } while (!ended_within(group, request, FILL_LOOK_MS));
}

static int fill_as_asked(struct vrep_group *group, struct fill_request *request)
{
    int begun = vrep_group_call(group, fill_begin, request);
    if (begun != VREP_OK)
        return begun;
    await(group, request);
    return request->status != VREP_OK ? VREP_OK : request->filled_status;
}

int vrep_group_fill(struct vrep_group *group, uint64_t ticket, const void *data, int status)
{
    struct fill_request request = {.ticket = ticket, .data = data, .status = status};
    return fill_as_asked(group, &request);
}

int vrep_group_fill_parts(struct vrep_group *group, uint64_t ticket, const void *data,
                          const struct vrep_fill_part *parts, uint32_t count)
{
    static const struct vrep_fill_part none;
    struct fill_request request = {.ticket = ticket,
                                   .data = data,
                                   .parts = parts != NULL ? parts : &none,
                                   .parts_count = count};
    return fill_as_asked(group, &request);
}

/* ---- the fetching thread ------------------------------------------------------------ */

static uint32_t take(struct vrep_group *group, struct vrep_miss *out, uint32_t max)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < MISSES && count < max; i++) {
        struct miss *miss = &group->misses[i];
        if (miss->state != MISS_QUEUED)
            continue;
        miss->state = MISS_TAKEN;
        out[count++] = (struct vrep_miss){.ticket = miss->ticket,
                                          .offset = miss->offset,
                                          .length = miss->length,
                                          .disk = miss->disk};
    }
    return count;
}

uint32_t vrep_group_misses(struct vrep_group *group, struct vrep_miss *out, uint32_t max,
                           int timeout_ms)
{
    struct timespec until = in_ms(timeout_ms);
    pthread_mutex_lock(&group->miss_lock);
    uint32_t count = take(group, out, max);
    int error = 0;
    while (count == 0 && timeout_ms != 0 && error != ETIMEDOUT && !group->misses_closed) {
        error = timeout_ms < 0
                    ? pthread_cond_wait(&group->miss_wake, &group->miss_lock)
                    : pthread_cond_timedwait(&group->miss_wake, &group->miss_lock, &until);
        count = take(group, out, max);
    }
    pthread_mutex_unlock(&group->miss_lock);
    return count;
}

struct next_request {
    uint16_t disk;
    uint64_t from, max;
    struct vrep_miss *out;
};

static int next_absent(struct vrep_group *group, void *argument)
{
    const struct next_request *request = argument;
    if (request->disk >= group->disks_count || !group->disks[request->disk].overlay ||
        request->max == 0)
        return VREP_E_INVALID;
    const struct disk *disk = &group->disks[request->disk];
    uint64_t bytes = disk->info.bytes, from = request->from < bytes ? request->from : 0;
    uint64_t absent, length;
    if (!vrep_overlay_absent(disk->disk, from, bytes - from, &absent, &length) &&
        (from == 0 || !vrep_overlay_absent(disk->disk, 0, from, &absent, &length)))
        return VREP_E_NOT_FOUND;
    uint64_t most = request->max / disk->info.block_bytes * disk->info.block_bytes;
    if (most == 0)
        most = disk->info.block_bytes;
    struct miss *miss =
        ask(group, request->disk, absent, length < most ? length : most, MISS_TAKEN);
    if (miss == NULL)
        return VREP_E_AGAIN;
    *request->out = (struct vrep_miss){
        .ticket = miss->ticket, .offset = miss->offset, .length = miss->length, .disk = miss->disk};
    return VREP_OK;
}

int vrep_group_fill_next(struct vrep_group *group, uint16_t disk, uint64_t from, uint64_t max,
                         struct vrep_miss *out)
{
    struct next_request request = {.disk = disk, .from = from, .max = max, .out = out};
    return vrep_group_call(group, next_absent, &request);
}

int vrep_group_sync_disk(struct vrep_group *group, uint16_t disk)
{
    if (disk >= group->disks_count || !group->disks[disk].overlay)
        return VREP_E_INVALID;
    int status = vrep_fault("view.sync");
    return status != VREP_OK ? status : vrep_overlay_sync(group->disks[disk].disk);
}

void vrep_group_stop_misses(struct vrep_group *group)
{
    pthread_mutex_lock(&group->miss_lock);
    group->misses_closed = true;
    pthread_cond_broadcast(&group->miss_wake);
    pthread_mutex_unlock(&group->miss_lock);
}

/* Nobody fetches any more: what waits fails, so that the group can drain. */
void vrep_miss_close(struct vrep_group *group)
{
    vrep_group_stop_misses(group);
    for (uint32_t i = 0; i < MISSES; i++) {
        enum miss_state state = state_of(group, &group->misses[i]);
        if (state == MISS_QUEUED || state == MISS_TAKEN)
            end_miss(group, &group->misses[i], VREP_E_GONE);
    }
}
