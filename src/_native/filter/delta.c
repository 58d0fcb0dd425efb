/* Delta: see the header.  The order of a copy (rule 4) stays: it has its slot
 * before its range, and never waits for another one under it.  Records of runs
 * take a slot each if there is room; if there is none, the slot that the copy
 * has takes all of it.  *Unshipped* is cleared last, before the range goes. */
#include "filter/delta.h"

#include <stdlib.h>
#include <string.h>

#include "filter/fault.h"
#include "filter/internal.h"
#include "track/hash.h"

#define UNIT VREP_HASH_BLOCK_BYTES
#define COPY_UNITS (COPY_BYTES_MAX / UNIT)
/* Blocks that the guest writes all the time are left for a later round, when their records may be
 * durable.  After so many the rest is sent as it is, so that every resync ends. */
#define ROUNDS 8u
#define ROUND_NS (250 * NS_PER_MS)

enum window_state { WINDOW_FREE, WINDOW_OFFERED, WINDOW_TAKEN, WINDOW_ANSWERED };

struct delta_window {
    enum window_state state;
    uint16_t disk;
    uint32_t copies; /* in flight */
    uint64_t id, offset, length;
    uint64_t next; /* where the next copy begins */
    uint64_t made_ns;
    uint8_t keys[VREP_DELTA_UNITS]; /* 0: not known, or made anew since */
    uint8_t touched[VREP_DELTA_UNITS];
    struct vrep_delta_hash hashes[VREP_DELTA_UNITS];
};

struct delta {
    bool on;
    uint32_t used;
    uint32_t round;
    uint64_t round_ns; /* when the next may begin */
    uint64_t last_id;
    uint32_t secrets_count;
    uint8_t secrets[VREP_DELTA_KEYS_MAX][VREP_HASH_SECRET_BYTES];
    struct delta_window windows[VREP_DELTA_WINDOWS];
};

int vrep_delta_init(struct vrep_group *group)
{
    group->delta = calloc(1, sizeof *group->delta);
    return group->delta != NULL ? VREP_OK : VREP_E_NOMEM;
}

void vrep_delta_destroy(struct vrep_group *group)
{
    free(group->delta);
}

bool vrep_delta_on(const struct vrep_group *group)
{
    /* Without an open gap nothing bounds what the target may still take from before. */
    return group->delta->on && vrep_map_header(group->map)->gap_open != 0;
}

static uint32_t units_of(uint64_t length)
{
    return (uint32_t)((length + UNIT - 1) / UNIT);
}

/* ---- windows -------------------------------------------------------------------- */

static void free_window(struct vrep_group *group, struct delta_window *window)
{
    window->state = WINDOW_FREE;
    group->delta->used--;
}

/* Nothing that was answered counts any more; copies in flight send all. */
static void drop_all(struct vrep_group *group)
{
    for (uint32_t i = 0; i < VREP_DELTA_WINDOWS; i++) {
        struct delta_window *window = &group->delta->windows[i];
        if (window->state == WINDOW_FREE)
            continue;
        memset(window->keys, 0, sizeof window->keys);
        window->state = WINDOW_ANSWERED;
        window->next = window->offset + window->length;
        if (window->copies == 0)
            free_window(group, window);
    }
    group->delta->round = 0;
    group->delta->round_ns = 0;
}

void vrep_delta_forget(struct vrep_group *group)
{
    drop_all(group);
    group->cursor_disk = 0;
    group->cursor = 0;
}

void vrep_group_delta_end(struct vrep_group *group)
{
    if (!group->tap)
        return;
    group->delta->on = false;
    vrep_delta_forget(group);
    memset(group->delta->secrets, 0, sizeof group->delta->secrets);
}

bool vrep_delta_full(const struct vrep_group *group)
{
    return group->delta->used == VREP_DELTA_WINDOWS;
}

bool vrep_delta_next_round(struct vrep_group *group)
{
    struct delta *delta = group->delta;
    if (!delta->on)
        return true;
    if (delta->used > 0 || group->now_ns < delta->round_ns)
        return false;
    delta->round_ns = group->now_ns + ROUND_NS;
    delta->round++;
    return true;
}

static bool in_generation(struct vrep_group *group, uint64_t offset, uint64_t bit)
{
    return vrep_map_in_generation(group->map, group->cursor_disk, offset, bit);
}

/* Bytes from `offset` on, at most `most`, of bits of which a record is under way, or of which none
 * is. */
static uint64_t same_bits(struct vrep_group *group, uint64_t offset, uint64_t most, bool under_way)
{
    uint64_t bit = vrep_map_header(group->map)->bit_bytes, done = 0;
    while (done < most && in_generation(group, offset + done, bit) == under_way)
        done += bit;
    return done < most ? done : most;
}

void vrep_delta_offer(struct vrep_group *group, uint64_t offset, uint64_t length)
{
    struct delta *delta = group->delta;
    bool last = delta->round > ROUNDS;
    uint64_t most = length < VREP_DELTA_WINDOW_BYTES ? length : VREP_DELTA_WINDOW_BYTES;
    if (!last) {
        uint64_t wait = same_bits(group, offset, most, true);
        if (wait > 0) {
            group->cursor = offset + wait;
            return;
        }
        most = same_bits(group, offset, most, false);
    }
    struct delta_window *window = delta->windows;
    while (window->state != WINDOW_FREE)
        window++;
    window->state = WINDOW_OFFERED;
    window->id = ++delta->last_id;
    window->disk = group->cursor_disk;
    window->offset = window->next = offset;
    window->length = most;
    window->copies = 0;
    window->made_ns = group->now_ns;
    memset(window->keys, 0, sizeof window->keys);
    memset(window->touched, 0, sizeof window->touched);
    delta->used++;
    uint64_t bit = vrep_map_header(group->map)->bit_bytes;
    for (uint64_t at = 0; last && at < most; at += bit)
        if (in_generation(group, offset + at, bit))
            memset(window->touched + at / UNIT, 1, bit / UNIT);
    group->cursor = offset + most;
}

void vrep_delta_touch(struct vrep_group *group, uint16_t disk, uint64_t offset, uint64_t length)
{
    if (group->delta->used == 0 || length == 0)
        return;
    for (uint32_t i = 0; i < VREP_DELTA_WINDOWS; i++) {
        struct delta_window *window = &group->delta->windows[i];
        if (window->state == WINDOW_FREE || window->disk != disk)
            continue;
        uint64_t from = offset > window->offset ? offset : window->offset;
        uint64_t end = offset + length, stop = window->offset + window->length;
        if (end > stop)
            end = stop;
        if (from >= end)
            continue;
        uint64_t first = (from - window->offset) / UNIT, last = (end - 1 - window->offset) / UNIT;
        memset(window->touched + first, 1, last - first + 1);
    }
}

bool vrep_delta_ready(struct vrep_group *group, uint64_t *offset, uint64_t *length,
                      struct delta_window **out)
{
    for (uint32_t i = 0; i < VREP_DELTA_WINDOWS && group->delta->used > 0; i++) {
        struct delta_window *window = &group->delta->windows[i];
        if (window->state == WINDOW_FREE)
            continue;
        if (window->state != WINDOW_ANSWERED) {
            if (group->now_ns - window->made_ns < VREP_DELTA_WAIT_NS)
                continue;
            window->state = WINDOW_ANSWERED; /* as it is: nothing is known */
        }
        uint64_t stop = window->offset + window->length;
        bool more = window->next < stop &&
                    vrep_map_next_unshipped(group->map, window->disk, window->next, COPY_BYTES_MAX,
                                            offset, length) &&
                    *offset < stop;
        if (more) {
            if (*length > stop - *offset)
                *length = stop - *offset;
            *out = window;
            return true;
        }
        window->next = stop;
        if (window->copies == 0)
            free_window(group, window);
    }
    return false;
}

void vrep_delta_start(struct delta_window *window, struct command *copy)
{
    copy->window = window;
    copy->base.disk = window->disk;
    window->copies++;
    window->next = copy->at + copy->bytes;
}

void vrep_delta_ended(struct vrep_group *group, struct command *copy)
{
    struct delta_window *window = copy->window;
    copy->window = NULL;
    if (--window->copies == 0 && window->next >= window->offset + window->length)
        free_window(group, window);
}

/* ---- comparing and publishing ------------------------------------------------------ */

enum unit { UNIT_SAME, UNIT_ZERO, UNIT_DATA };

static bool equals(const struct delta *delta, const struct delta_window *window, uint64_t number,
                   const void *bytes)
{
    uint8_t key = window->keys[number];
    if (key == 0 || window->touched[number])
        return false;
    uint64_t hash[2];
    vrep_hash_one128(bytes, UNIT, delta->secrets[key - 1], VREP_HASH_SECRET_BYTES, hash);
    return hash[0] == window->hashes[number].low && hash[1] == window->hashes[number].high;
}

/* What each unit of a copy is. Chunks of the ring are units, so none is split over iovecs. */
static uint32_t judge(const struct vrep_group *group, const struct command *copy, int count,
                      uint8_t *units)
{
    const struct delta_window *window = copy->window;
    uint64_t number = (copy->at - window->offset) / UNIT;
    uint32_t n = 0;
    for (int i = 0; i < count; i++) {
        for (size_t at = 0; at < copy->room[i].iov_len; at += UNIT, n++) {
            size_t left = copy->room[i].iov_len - at;
            struct iovec unit = {.iov_base = (uint8_t *)copy->room[i].iov_base + at,
                                 .iov_len = left < UNIT ? left : UNIT};
            if (unit.iov_len == UNIT && equals(group->delta, window, number + n, unit.iov_base))
                units[n] = UNIT_SAME;
            else
                units[n] = vrep_sync_all_zero(&unit, 1) ? UNIT_ZERO : UNIT_DATA;
        }
    }
    return n;
}

static void copy_bytes(const struct iovec *from, size_t skip, const struct iovec *to, size_t bytes)
{
    size_t used = 0;
    while (skip >= from->iov_len)
        skip -= from++->iov_len;
    while (bytes > 0) {
        size_t part = from->iov_len - skip, room = to->iov_len - used;
        part = part < room ? part : room;
        part = part < bytes ? part : bytes;
        memcpy((uint8_t *)to->iov_base + used, (const uint8_t *)from->iov_base + skip, part);
        bytes -= part;
        skip += part;
        used += part;
        if (skip == from->iov_len) {
            skip = 0;
            from++;
        }
        if (used == to->iov_len) {
            used = 0;
            to++;
        }
    }
}

static void publish(struct vrep_group *group, struct command *part, uint8_t kind)
{
    vrep_tap_grant(group, part, kind);
    vrep_tap_publish(group, part->slot);
    vrep_map_done(group->map, part->generation);
    part->slot = NULL;
    part->marked = false;
}

/* A run of a copy as a record of its own; false when there is no room for one. */
static bool publish_run(struct vrep_group *group, const struct command *copy, uint64_t skip,
                        uint64_t length, uint8_t kind)
{
    bool data = kind == VREP_KIND_SYNC;
    if (vrep_ring_half_full(group->ring) ||
        vrep_ring_head(group->ring) + group->commands_count + SLOTS_OWN >= group->seq_limit)
        return false;
    struct command part = {.base = {.disk = copy->base.disk}, .at = copy->at + skip};
    part.bytes = length;
    part.slot = vrep_ring_reserve(group->ring, data ? length : 0);
    if (part.slot == NULL)
        return false;
    if (data) {
        struct iovec to[COPY_UNITS + 2];
        if (vrep_ring_iov(group->ring, part.slot, 0, (uint32_t)length, to, COPY_UNITS + 2) < 0) {
            vrep_ring_cancel(group->ring, part.slot);
            return false;
        }
        copy_bytes(copy->room, skip, to, length);
    }
    publish(group, &part, kind);
    vrep_fault("delta.after_run");
    return true;
}

/* Everything of the copy into the slot that it has. */
static void publish_whole(struct vrep_group *group, struct command *copy, uint8_t kind)
{
    if (kind == VREP_KIND_SYNC_ZEROES)
        vrep_ring_drop_payload(group->ring, copy->slot);
    publish(group, copy, kind);
}

void vrep_delta_copied(struct vrep_group *group, struct command *copy)
{
    static const uint8_t kinds[] = {
        [UNIT_ZERO] = VREP_KIND_SYNC_ZEROES, [UNIT_DATA] = VREP_KIND_SYNC};
    uint8_t units[COPY_UNITS + 1];
    int count = vrep_payload_iov(group, copy);
    uint32_t n = judge(group, copy, count, units), first = 0, end;
    uint64_t equal = 0;
    while (first < n) {
        for (end = first + 1; end < n && units[end] == units[first];)
            end++;
        uint64_t skip = (uint64_t)first * UNIT, stop = (uint64_t)end * UNIT;
        if (stop > copy->bytes)
            stop = copy->bytes;
        if (units[first] == UNIT_SAME) {
            equal += stop - skip;
        } else if (first == 0 && end == n) {
            publish_whole(group, copy, kinds[units[first]]);
        } else if (!publish_run(group, copy, skip, stop - skip, kinds[units[first]])) {
            publish_whole(group, copy, VREP_KIND_SYNC);
            equal = 0;
            break;
        }
        first = end;
    }
    group->count.compared_bytes += copy->bytes;
    group->count.equal_bytes += equal;
    vrep_fault("delta.before_clear");
    vrep_sync_clear(group, copy);
}

/* ---- control ------------------------------------------------------------------------ */

int vrep_group_delta_begin(struct vrep_group *group,
                           const uint8_t (*secrets)[VREP_HASH_SECRET_BYTES], uint32_t count)
{
    if (!group->tap || vrep_map_header(group->map)->bit_bytes < UNIT)
        return VREP_E_UNSUPPORTED;
    if (count == 0 || count > VREP_DELTA_KEYS_MAX)
        return VREP_E_INVALID;
    vrep_delta_forget(group);
    memcpy(group->delta->secrets, secrets, (size_t)count * VREP_HASH_SECRET_BYTES);
    group->delta->secrets_count = count;
    group->delta->on = true;
    return VREP_OK;
}

int vrep_group_delta_take(struct vrep_group *group, struct vrep_delta_window *out, uint32_t max,
                          uint32_t *count, uint64_t *at_least)
{
    *count = 0;
    if (!group->tap || !group->delta->on)
        return VREP_E_GONE;
    /* Records from before the gap that no generation tells of any more (rules 8 and 12) are durable
     * or dropped once its begin is durable; the others are by what was acknowledged. */
    uint64_t gap = vrep_map_header(group->map)->gap_seq;
    *at_least = gap > group->durable ? gap : group->durable;
    for (uint32_t i = 0; i < VREP_DELTA_WINDOWS && *count < max; i++) {
        struct delta_window *window = &group->delta->windows[i];
        if (window->state != WINDOW_OFFERED)
            continue;
        window->state = WINDOW_TAKEN;
        out[(*count)++] = (struct vrep_delta_window){.id = window->id,
                                                     .offset = window->offset,
                                                     .length = window->length,
                                                     .disk = window->disk};
    }
    return VREP_OK;
}

int vrep_group_delta_answer(struct vrep_group *group, uint64_t id, const uint8_t *keys,
                            const struct vrep_delta_hash *hashes, uint32_t units)
{
    struct delta *delta = group->delta;
    for (uint32_t i = 0; group->tap && i < VREP_DELTA_WINDOWS; i++) {
        struct delta_window *window = &delta->windows[i];
        if (window->state != WINDOW_TAKEN || window->id != id)
            continue;
        if (units != units_of(window->length))
            return VREP_E_INVALID;
        for (uint32_t j = 0; j < units; j++)
            if (keys[j] > delta->secrets_count)
                return VREP_E_INVALID;
        memcpy(window->keys, keys, units);
        memcpy(window->hashes, hashes, units * sizeof *hashes);
        window->state = WINDOW_ANSWERED;
        group->resync_again = true;
        return VREP_OK;
    }
    return VREP_E_NOT_FOUND;
}

int vrep_group_compare(struct vrep_group *group, uint32_t disk,
                       const struct vrep_since_range *ranges, size_t count)
{
    if (!group->tap)
        return VREP_E_UNSUPPORTED;
    if (disk >= group->disks_count)
        return VREP_E_INVALID;
    uint64_t bytes = group->disks[disk].info.bytes;
    for (size_t i = 0; i < count; i++)
        if (ranges[i].offset > bytes || ranges[i].length > bytes - ranges[i].offset)
            return VREP_E_RANGE;
    for (size_t i = 0; i < count; i++)
        if (ranges[i].length > 0)
            vrep_sync_mark(group, (uint16_t)disk, ranges[i].offset, ranges[i].length);
    if (vrep_map_unshipped_bits(group->map) == 0)
        return VREP_OK;
    vrep_gap_enter(group);
    group->dirtied++;
    group->resync_again = group->resync_allowed;
    vrep_maintain_keep(group);
    return VREP_OK;
}
