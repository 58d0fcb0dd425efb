/* Tap: the filter that replicates: grant, publish, acknowledge (the rules of
 * the design's section on the change map, 1 to 3).  Without VREP_GROUP_TAP it
 * only keeps overlapping changes in order. */
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "filter/fault.h"
#include "filter/internal.h"

uint64_t vrep_clock_ns(const struct vrep_group *group, int clock)
{
    if (vrep_group_stepped(group))
        return clock == CLOCK_REALTIME ? group->config.wall_ns : group->config.mono_ns;
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

uint64_t vrep_tap_publish(struct vrep_group *group, struct vrep_ring_slot *slot)
{
    if (group->mirror.on)
        (void)vrep_mirror_whole(group); /* else a gap begins before this record */
    if (vrep_map_gap(group->map) && vrep_map_header(group->map)->gap_open == 0)
        vrep_gap_enter(group);
    uint8_t generation = slot->generation;
    uint64_t seq = vrep_ring_stage(group->ring, slot, vrep_clock_ns(group, CLOCK_REALTIME),
                                   vrep_clock_ns(group, CLOCK_MONOTONIC));
    vrep_fault("tap.after_stage");
    if (generation < VREP_GENERATIONS)
        vrep_map_raise(group->map, generation, seq);
    vrep_fault("tap.after_raise");
    vrep_ring_commit(group->ring, slot);
    vrep_fault("tap.after_commit");
    return seq;
}

static void fill_slot(struct command *command, uint8_t kind)
{
    struct vrep_ring_slot *slot = command->slot;
    slot->kind = kind;
    slot->generation = command->generation;
    slot->disk = command->base.disk;
    slot->offset = command->at;
    slot->length = (uint32_t)command->bytes;
    slot->flags = (command->base.flags & VREP_COMMAND_FUA) != 0 ? VREP_RECORD_FUA : 0;
}

void vrep_tap_grant(struct vrep_group *group, struct command *command, uint8_t kind)
{
    command->generation =
        vrep_map_mark(group->map, command->base.disk, command->at, command->bytes);
    command->marked = true;
    vrep_delta_touch(group, command->base.disk, command->at, command->bytes);
    group->dirtied++;
    fill_slot(command, kind);
    vrep_ring_grant(group->ring, command->slot, group->now_ns);
}

/* Rule 1, second half: what has no descriptor is unshipped, and the gap flag is stored, before it
 * is submitted. */
static void grant_unrecorded(struct vrep_group *group, struct command *command, uint8_t kind)
{
    vrep_map_mark_unshipped(group->map, command->base.disk, command->at, command->bytes);
    vrep_gap_enter(group);
    group->dirtied++;
    group->count.unrecorded++;
    if (command->slot != NULL) {
        command->generation = NO_GENERATION;
        fill_slot(command, kind);
        vrep_ring_grant(group->ring, command->slot, group->now_ns);
    }
}

static void committed(struct vrep_group *group, struct command *command);

static void enter(struct vrep_group *group, struct command *command)
{
    if (group->mirror.on) { /* the VM has written it */
        command->base.status = VREP_OK;
        committed(group, command);
        return;
    }
    if (!vrep_intent_begin(group->intent, command->base.disk, command->at, command->bytes)) {
        list_push(&group->cold, command);
        vrep_maintain_intent(group);
        return;
    }
    command->intended = true;
    vrep_chain_down(command);
}

static void grant(struct vrep_group *group, struct command *command)
{
    if (!group->tap) {
        if (group->map != NULL) { /* a bypass */
            vrep_map_mark_unshipped(group->map, command->base.disk, command->at, command->bytes);
            vrep_fault("bypass.after_mark");
        }
        vrep_chain_down(command);
        return;
    }
    uint8_t kind = command->base.op == VREP_OP_WRITE ? VREP_KIND_WRITE : VREP_KIND_ZEROES;
    /* What a discard leaves on the VM's image is for a sync copy to find out. */
    bool unknown = group->mirror.on && command->base.op == VREP_OP_DISCARD;
    if (unknown)
        command->recorded = false;
    else if (!command->recorded)
        vrep_payload_record(group, command);
    if (command->recorded)
        vrep_tap_grant(group, command, kind);
    else
        grant_unrecorded(group, command, kind);
    vrep_fault("tap.after_grant");
    enter(group, command);
}

static void finish(struct vrep_group *group, struct command *command);
static void drop_slot(struct vrep_group *group, struct command *command);

/* What the disk holds was read while the range is held: it stays so until the write. */
static void compared(struct command *command)
{
    struct vrep_group *group = command->base.group;
    const uint8_t *expect = command->base.expect, *found = command->base.found;
    command->base.status = command->io.status;
    if (command->io.status == VREP_OK && memcmp(expect, found, command->bytes) == 0) {
        grant(group, command);
        return;
    }
    if (command->io.status == VREP_OK) {
        uint64_t at = 0;
        while (expect[at] == found[at])
            at++;
        command->base.mismatch = at;
    } else {
        group->count.errors++;
    }
    drop_slot(group, command);
    finish(group, command);
}

static void granted(struct vrep_group *group, struct command *command)
{
    if (command->base.expect == NULL) {
        grant(group, command);
        return;
    }
    command->room[0] =
        (struct iovec){.iov_base = command->base.found, .iov_len = (size_t)command->bytes};
    vrep_backing_start(command, VREP_IO_READ, 0, command->at, command->bytes, command->room, 1,
                       compared);
}

void vrep_tap_cold_retry(struct vrep_group *group)
{
    struct list waiting = group->cold;
    if (waiting.first == NULL)
        return;
    list_init(&group->cold);
    struct command *command;
    while ((command = list_pop(&waiting)) != NULL)
        enter(group, command);
}

/* ---- order ------------------------------------------------------------------ */

void vrep_tap_granted(void *context, struct vrep_range *range)
{
    struct vrep_group *group = context;
    list_push(&group->ready, range->owner);
}

/* A loop, not recursion: a long queue on one block would use up the stack. */
void vrep_tap_drain(struct vrep_group *group)
{
    if (group->draining)
        return;
    group->draining = true;
    struct command *command;
    while ((command = list_pop(&group->ready)) != NULL) {
        if (command->role == ROLE_COPY)
            vrep_sync_granted(command);
        else if (command->role == ROLE_FILL)
            vrep_fill_granted(command);
        else
            granted(group, command);
    }
    group->draining = false;
}

static void tap_submit(struct vrep_filter *filter, struct command *command)
{
    struct vrep_group *group = filter->group;
    switch (command->base.op) {
    case VREP_OP_READ:
        vrep_chain_down(command);
        return;
    case VREP_OP_FLUSH:
        if (group->flush_failed) {
            command->base.status = VREP_E_IO;
            vrep_chain_up(command);
            return;
        }
        vrep_chain_down(command);
        return;
    default:
        break;
    }
    if (command->bytes ==
        0) { /* a discard without a whole block, or that the backing cannot do cheaply */
        command->base.status = VREP_OK;
        vrep_chain_up(command);
        return;
    }
    command->range.offset = command->at;
    command->range.length = command->bytes;
    command->range.disk = command->base.disk;
    command->ranged = true;
    vrep_disk_widen(disk_of(group, command)->disk, &command->range.offset, &command->range.length);
    if (vrep_overlap_acquire(group->overlap, &command->range))
        list_push(&group->ready, command);
    else if (group->mirror.on)
        vrep_sync_waited_for(group);
    vrep_tap_drain(group);
}

/* ---- completion ---------------------------------------------------------------- */

static void finish(struct vrep_group *group, struct command *command)
{
    if (command->marked)
        vrep_map_done(group->map, command->generation);
    if (command->intended)
        vrep_intent_end(group->intent, command->base.disk, command->at, command->bytes);
    command->marked = command->intended = false;
    vrep_payload_free(group, command);
    if (command->ranged)
        vrep_overlap_release(group->overlap, &command->range, vrep_tap_granted, group);
    command->ranged = false;
    vrep_fault("tap.before_done");
    vrep_chain_up(command);
    vrep_tap_drain(group);
}

static void drop_slot(struct vrep_group *group, struct command *command)
{
    if (command->slot != NULL)
        vrep_ring_cancel(group->ring, command->slot);
    command->slot = NULL;
}

static void give_up_record(struct vrep_group *group, struct command *command)
{
    vrep_map_mark_unshipped(group->map, command->base.disk, command->at, command->bytes);
    vrep_gap_enter(group);
    drop_slot(group, command);
}

static void publish(struct vrep_group *group, struct command *command)
{
    vrep_tap_publish(group, command->slot);
    command->slot = NULL;
}

/* The backing has it: its record gets its place, and the guest its answer. */
static void committed(struct vrep_group *group, struct command *command)
{
    if (command->recorded)
        publish(group, command);
    else
        drop_slot(group, command);
    finish(group, command);
}

static void reread(struct command *command)
{
    struct vrep_group *group = command->base.group;
    if (command->io.status == VREP_OK) {
        command->slot->kind = VREP_KIND_SYNC;
        publish(group, command);
    } else {
        give_up_record(group, command);
    }
    command->base.status = command->failure;
    finish(group, command);
}

/* Rule 3: nobody knows how much of a failed write reached the backing: what is there now is
 * shipped. */
static void failed(struct vrep_group *group, struct command *command)
{
    bool untouched =
        command->base.status == VREP_E_UNSUPPORTED && command->base.op != VREP_OP_WRITE;
    if (!untouched)
        group->count.errors++;
    if (command->io.sync_failed) /* a FUA: the kernel will not tell the next flush of it again */
        vrep_tap_flush_failed(group);
    if (!group->tap || untouched || !command->recorded) {
        drop_slot(group, command);
    } else if (command->base.op == VREP_OP_WRITE) {
        command->failure = command->base.status;
        int count = vrep_payload_iov(group, command);
        vrep_backing_start(command, VREP_IO_READ, 0, command->at, command->bytes, command->room,
                           count, reread);
        return;
    } else {
        give_up_record(group, command);
    }
    if (untouched && command->base.op == VREP_OP_DISCARD)
        command->base.status = VREP_OK; /* a discard is advice */
    finish(group, command);
}

void vrep_tap_flush_failed(struct vrep_group *group)
{
    group->count.errors++;
    if (!group->flush_failed)
        VREP_ERROR(
            "filter",
            "a flush of the backing store failed: flushes fail until the disks are verified again");
    group->flush_failed = true;
    if (!group->tap) {
        vrep_bypass_flush_failed(group);
        return;
    }
    /* Each time: the kernel tells a loss once, and this one may speak of newer writes. */
    struct vrep_map_header *header = vrep_map_header(group->map);
    header->unverified = VREP_UNVERIFIED_FLUSH; /* first: a restart does the rest from this alone */
    vrep_sync_since_flush(group);
    group->distrust++;
    vrep_gap_enter(group);
    group->state.unverified = VREP_UNVERIFIED_FLUSH;
    group->state.flags |= VREP_STATE_UNVERIFIED;
    vrep_maintain_state(group);
}

static void tap_completed(struct vrep_filter *filter, struct command *command)
{
    struct vrep_group *group = filter->group;
    int status = command->base.status;
    if (command->base.op == VREP_OP_READ) {
        if (status != VREP_OK)
            group->count.errors++;
        vrep_chain_up(command);
    } else if (command->base.op == VREP_OP_FLUSH) {
        if (status != VREP_OK)
            vrep_tap_flush_failed(group);
        /* Another disk's flush may have failed meanwhile; this one stood on its own. */
        vrep_chain_up(command);
    } else if (status != VREP_OK) {
        failed(group, command);
    } else {
        committed(group, command);
    }
}

const struct vrep_filter_ops vrep_tap_ops = {
    .name = "tap", .submit = tap_submit, .completed = tap_completed};
