/* Gap: the flag, and the records that bound it (rules 6 and 12).
 *
 * The flag is stored before anything unrecorded is submitted; gap-begin has a
 * reserved descriptor, so it is the next record whatever the ring holds; and
 * gap-end is published only together with a fresh reserve for the next gap. */
#include <time.h>

#include "base/atomic.h"
#include "base/log.h"
#include "filter/fault.h"
#include "filter/internal.h"

static struct vrep_map_header *header_of(struct vrep_group *group)
{
    return vrep_map_header(group->map);
}

static void fill_slot(struct vrep_ring_slot *slot, uint8_t kind, uint16_t flags)
{
    slot->kind = kind;
    slot->generation = NO_GENERATION;
    slot->disk = 0;
    slot->offset = 0;
    slot->length = 0;
    slot->flags = flags;
}

static uint64_t put(struct vrep_group *group, struct vrep_ring_slot *slot, uint8_t kind,
                    uint16_t flags)
{
    fill_slot(slot, kind, flags);
    uint64_t wall = vrep_clock_ns(group, CLOCK_REALTIME);
    uint64_t seq = vrep_ring_stage(group->ring, slot, wall, vrep_clock_ns(group, CLOCK_MONOTONIC));
    vrep_fault("gap.after_stage");
    vrep_ring_commit(group->ring, slot);
    vrep_fault("gap.after_commit");
    if (kind == VREP_KIND_GAP_BEGIN)
        group->gap_wall_ns = wall;
    return seq;
}

bool vrep_gap_reserve(struct vrep_group *group)
{
    if (group->gap_slot == NULL)
        group->gap_slot = vrep_ring_reserve(group->ring, 0);
    return group->gap_slot != NULL;
}

static void begin(struct vrep_group *group, uint16_t flags)
{
    /* Its place in the order is fixed by commit; a restart finds the record at head and sets
     * gap_open. */
    struct vrep_map_header *header = header_of(group);
    header->gap_seq = put(group, group->gap_slot, VREP_KIND_GAP_BEGIN, flags);
    header->gap_last = header->gap_seq;
    group->gap_slot = NULL;
    vrep_store_release_u32(&header->gap_open, 1);
    VREP_INFO("filter", "gap begins at %llu", (unsigned long long)header->gap_seq);
}

static void raise_flag(struct vrep_group *group)
{
    if (vrep_map_gap(group->map))
        return;
    vrep_map_set_gap(group->map);
    vrep_fault("gap.after_flag");
    group->count.gaps++;
    group->state.flags |= VREP_STATE_GAP;
    vrep_maintain_state(group);
}

void vrep_gap_enter(struct vrep_group *group)
{
    raise_flag(group);
    /* Outside a gap the reserve is always there: gap-end took a fresh one. */
    if (header_of(group)->gap_open == 0 && vrep_gap_reserve(group))
        begin(group, 0);
}

int vrep_gap_restart(struct vrep_group *group, bool jump)
{
    raise_flag(group);
    if (!vrep_gap_reserve(group))
        return VREP_E_FULL;
    begin(group, jump ? VREP_RECORD_JUMP : 0);
    if (jump) /* what it passes over may be a new size */
        vrep_resize_all_due(group);
    return VREP_OK;
}

bool vrep_gap_due(const struct vrep_group *group)
{
    return vrep_map_gap(group->map) && vrep_map_unshipped_bits(group->map) == 0 &&
           group->copies_inflight == 0 && group->distrust == 0 && vrep_mirror_settled(group);
}

void vrep_gap_try_end(struct vrep_group *group)
{
    struct vrep_map_header *header = header_of(group);
    if (!vrep_gap_due(group) || header->gap_open == 0 ||
        vrep_ring_head(group->ring) + group->commands_count + SLOTS_OWN >= group->seq_limit ||
        (group->mirror.on && !vrep_mirror_whole(group)) || !vrep_resize_publish(group))
        return;
    struct vrep_ring_slot *fresh = vrep_ring_reserve(group->ring, 0);
    struct vrep_ring_slot *end = fresh == NULL ? NULL : vrep_ring_reserve(group->ring, 0);
    if (end == NULL) {
        if (fresh != NULL)
            vrep_ring_cancel(group->ring, fresh);
        return;
    }
    uint64_t seq = put(group, end, VREP_KIND_GAP_END, 0);
    group->gap_slot = fresh;
    /* In this order: a restart that finds gap_open and a gap-end at head finishes what stands here.
     */
    header->unverified = 0; /* a reason never outlives its gap */
    vrep_store_release_u32(&header->gap_open, 0);
    vrep_store_release_u32(&header->gap, 0);
    header->gap_seq = 0;
    group->gap_wall_ns = 0;
    group->flush_failed = false;
    group->state.unverified = 0;
    group->state.flags &= ~(VREP_STATE_GAP | VREP_STATE_UNVERIFIED);
    group->state.flags |= VREP_STATE_SYNCED;
    vrep_maintain_state(group);
    vrep_delta_forget(group);
    VREP_INFO("filter", "gap ends at %llu", (unsigned long long)seq);
}

/* Commands in flight publish behind the gap's begin: their marks must tell of that. */
static void mark_again(struct vrep_group *group)
{
    for (uint32_t i = 0; i < group->commands_count; i++) {
        struct command *command = &group->commands[i];
        if (!command->marked)
            continue;
        uint8_t now = vrep_map_mark(group->map, command->base.disk, command->at, command->bytes);
        vrep_map_done(group->map, command->generation);
        command->generation = now;
        if (command->slot != NULL)
            command->slot->generation = now;
    }
}

int vrep_gap_give_up_ring(struct vrep_group *group)
{
    vrep_map_generations_to_unshipped(group->map);
    mark_again(group);
    vrep_delta_forget(group);
    raise_flag(group);
    int status = vrep_ring_release(group->ring, vrep_ring_head(group->ring));
    return status == VREP_OK ? vrep_gap_restart(group, true) : status;
}

int vrep_gap_lose_ring(struct vrep_group *group)
{
    /* A copy in flight would clear unshipped although its generation was just emptied. */
    if (group->copies_inflight > 0) {
        group->lose_wanted = true;
        return VREP_E_AGAIN;
    }
    group->lose_wanted = false;
    int status = vrep_gap_give_up_ring(group);
    group->freed = group->freed || group->wanted;
    vrep_maintain_keep(group);
    return status;
}
