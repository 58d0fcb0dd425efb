/* Maintain: what happens beside the guest's commands: generations are sealed,
 * the map is checkpointed, extents of the write-intent cool down, durable
 * state is renewed.  The group's thread decides, the workers wait for disks. */
#include <time.h>

#include "base/log.h"
#include "filter/fault.h"
#include "filter/internal.h"

#define SEAL_NS (100 * NS_PER_MS)
#define COOL_NS (30 * NS_PER_S)
#define RETRY_NS NS_PER_S

/* ---- write-intent ------------------------------------------------------------- */

static int intent_run(struct vrep_job *job)
{
    struct vrep_group *group = job->owner;
    int status = vrep_fault("intent.write");
    return status != VREP_OK ? status : vrep_intent_write(group->intent);
}

static void intent_done(struct vrep_job *job)
{
    struct vrep_group *group = job->owner;
    vrep_intent_commit(group->intent, job->status);
    if (job->status != VREP_OK) {
        /* A cold write that went ahead could be forgotten at a power loss: it waits for the state
         * directory. */
        group->count.errors++;
        group->intent_retry_ns = group->now_ns + RETRY_NS;
        VREP_ERROR("filter", "write-intent cannot be stored (%s): writes to cold extents wait",
                   vrep_status_name(job->status));
        return;
    }
    vrep_tap_cold_retry(group);
    vrep_maintain_intent(group);
}

void vrep_maintain_intent(struct vrep_group *group)
{
    if (group->intent_job.busy || !vrep_intent_wants_sync(group->intent) ||
        group->now_ns < group->intent_retry_ns)
        return;
    vrep_intent_prepare(group->intent);
    vrep_worker_post(group->quick, &group->intent_job);
}

/* ---- durable state --------------------------------------------------------------- */

static int state_run(struct vrep_job *job)
{
    struct vrep_group *group = job->owner;
    return vrep_state_write(&group->state_file, &group->state_written);
}

static void state_done(struct vrep_job *job)
{
    struct vrep_group *group = job->owner;
    if (job->status == VREP_OK) {
        group->seq_limit = group->state_written.seq_limit;
    } else {
        group->count.errors++;
        group->state_again = true;
        group->state_retry_ns = group->now_ns + RETRY_NS;
        VREP_ERROR("filter", "durable state cannot be stored: %s", vrep_status_name(job->status));
        return;
    }
    if (group->state_again)
        vrep_maintain_state(group);
}

void vrep_maintain_state(struct vrep_group *group)
{
    if (group->state_job.run == NULL) /* still opening: it is written there */
        return;
    group->state_again = group->state_job.busy || group->now_ns < group->state_retry_ns;
    if (group->state_again)
        return;
    group->state_written = group->state;
    vrep_worker_post(group->quick, &group->state_job);
}

void vrep_state_stamp(struct vrep_group *group)
{
    group->state.disks = (uint16_t)group->disks_count;
    for (uint32_t i = 0; i < group->disks_count; i++) {
        const struct vrep_disk_info *info = &group->disks[i].info;
        group->state.disk[i] = (struct vrep_state_disk){
            .bytes = group->disks[i].told_bytes,
            .device = info->device,
            .inode = info->inode,
            .mtime_ns = info->mtime_ns,
            .ctime_ns = info->ctime_ns,
            .commands = info->commands,
            .sectors = info->sectors,
        };
    }
}

/* ---- checkpoints and cooling -------------------------------------------------------- */

static int checkpoint_run(struct vrep_job *job)
{
    struct vrep_group *group = job->owner;
    int status = vrep_fault("checkpoint.write");
    return status != VREP_OK
               ? status
               : vrep_checkpoint_write(group->checkpoint, group->checkpoint_head, false);
}

static void checkpoint_done(struct vrep_job *job)
{
    struct vrep_group *group = job->owner;
    if (job->status != VREP_OK) {
        group->count.errors++;
        group->dirtied++; /* once more, at the next period */
        VREP_ERROR("filter", "the change map cannot be checkpointed: %s",
                   vrep_status_name(job->status));
    } else {
        group->checkpoint_stored = group->checkpoint_begun;
    }
    if (group->cooling == COOL_CHECKPOINT) {
        vrep_intent_cool_end(group->intent, job->status == VREP_OK);
        group->cooling = COOL_IDLE;
        vrep_maintain_intent(group);
    }
    if (group->checkpoint_again && job->status == VREP_OK)
        vrep_maintain_checkpoint(group);
}

void vrep_maintain_checkpoint(struct vrep_group *group)
{
    if (group->checkpoint_job.run == NULL)
        return;
    group->checkpoint_asked++;
    group->checkpoint_again = group->checkpoint_job.busy;
    if (group->checkpoint_again)
        return;
    group->dirtied = 0;
    /* A checkpoint forgets bits that an acknowledgement cleared: which one must be known after a
     * power loss too. */
    vrep_maintain_state(group);
    group->checkpoint_head = vrep_ring_head(group->ring);
    group->checkpoint_begun = group->checkpoint_asked;
    vrep_worker_post(group->slow, &group->checkpoint_job);
}

void vrep_maintain_keep(struct vrep_group *group)
{
    vrep_maintain_checkpoint(group);
    group->checkpoint_wanted = group->checkpoint_asked;
}

static void cool_flushed(struct vrep_io *io)
{
    struct vrep_group *group = io->owner;
    if (group->abandoned)
        return;
    if (io->status != VREP_OK) {
        /* The kernel reports a failed sync once: this one stands for the guest's next flush. */
        vrep_tap_flush_failed(group);
        group->cool_ok = false;
    }
    if (--group->cool_flushes > 0)
        return;
    if (group->cool_ok) {
        group->cooling =
            COOL_FLUSHED; /* the checkpoint starts when the one in progress has ended */
    } else {
        vrep_intent_cool_end(group->intent, false);
        group->cooling = COOL_IDLE;
    }
}

static void cool(struct vrep_group *group)
{
    if (vrep_intent_hot_extents(group->intent) == 0 || group->flush_failed)
        return;
    vrep_intent_cool_begin(group->intent);
    group->cooling = COOL_FLUSHING;
    group->cool_ok = true;
    group->cool_flushes = group->disks_count;
    for (uint32_t i = 0; i < group->disks_count; i++) {
        struct vrep_io *io = &group->cool_io[i];
        *io = (struct vrep_io){.op = VREP_IO_FLUSH, .done = cool_flushed, .owner = group};
        vrep_disk_submit(group->disks[i].disk, io);
        if (io->inline_done)
            cool_flushed(io);
    }
}

/* ---- generations ---------------------------------------------------------------------- */

void vrep_maintain_seal(struct vrep_group *group)
{
    struct vrep_map_move move = {false, 0, 0};
    if (vrep_map_seal(group->map, vrep_ring_head(group->ring), &move) && move.moved) {
        for (uint32_t i = 0; i < group->commands_count; i++) {
            struct command *command = &group->commands[i];
            if (!command->marked || command->generation != move.from)
                continue;
            command->generation = move.to;
            if (command->slot != NULL)
                command->slot->generation = move.to;
        }
    }
    vrep_map_clear(group->map, group->durable);
}

/* ---- timers ----------------------------------------------------------------------------- */

/* The ring is whole when the group opens, but mapping its pages takes as long as the rest of a
 * start: that goes on beside the first commands. */
static int populate_run(struct vrep_job *job)
{
    vrep_ring_populate(((struct vrep_group *)job->owner)->ring);
    return VREP_OK;
}

static void populate_done(struct vrep_job *job)
{
    (void)job;
}

void vrep_maintain_init(struct vrep_group *group)
{
    group->intent_job = (struct vrep_job){.run = intent_run, .done = intent_done, .owner = group};
    group->state_job = (struct vrep_job){.run = state_run, .done = state_done, .owner = group};
    group->checkpoint_job =
        (struct vrep_job){.run = checkpoint_run, .done = checkpoint_done, .owner = group};
    group->populate_job =
        (struct vrep_job){.run = populate_run, .done = populate_done, .owner = group};
    if (vrep_map_gap(group->map)) /* a process that was killed may have owed it */
        vrep_maintain_keep(group);
    vrep_worker_post(group->slow, &group->populate_job);
    group->seal_ns = group->now_ns + SEAL_NS;
    group->checkpoint_ns = group->now_ns + group->config.checkpoint_ns;
    group->cool_ns = group->now_ns + COOL_NS;
}

void vrep_maintain(struct vrep_group *group)
{
    if (group->now_ns >= group->seal_ns) {
        group->seal_ns = group->now_ns + SEAL_NS;
        vrep_maintain_seal(group);
    }
    if (vrep_ring_head(group->ring) + SEQ_AHEAD / 2 > group->state.seq_limit) {
        group->state.seq_limit = vrep_ring_head(group->ring) + SEQ_AHEAD;
        vrep_maintain_state(group);
    } else if (group->state_again) {
        vrep_maintain_state(group);
    }
    vrep_maintain_intent(group);
    if (group->closing)
        return;
    if (group->cooling == COOL_FLUSHED && !group->checkpoint_job.busy) {
        group->cooling = COOL_CHECKPOINT;
        vrep_maintain_checkpoint(group);
    }
    if (group->now_ns >= group->checkpoint_ns) {
        group->checkpoint_ns = group->now_ns + group->config.checkpoint_ns;
        bool changed = group->dirtied > 0 || group->durable != group->checkpoint_durable;
        if (changed && !group->checkpoint_job.busy) {
            group->checkpoint_durable = group->durable;
            vrep_maintain_checkpoint(group);
        }
    }
    if (group->now_ns >= group->cool_ns) {
        group->cool_ns = group->now_ns + COOL_NS;
        if (group->cooling == COOL_IDLE)
            cool(group);
    }
}

bool vrep_maintain_busy(const struct vrep_group *group)
{
    return group->intent_job.busy || group->state_job.busy || group->checkpoint_job.busy ||
           group->probe_job.busy || group->forget_job.busy || group->cool_flushes > 0;
}

int vrep_maintain_timeout_ms(const struct vrep_group *group)
{
    uint64_t next = group->seal_ns;
    bool idle = group->inflight == 0 && group->durable >= vrep_ring_head(group->ring) &&
                group->cold.first == NULL;
    if (idle)
        next = group->checkpoint_ns;
    uint64_t now = vrep_clock_ns(group, CLOCK_MONOTONIC);
    return next <= now ? 0 : (int)((next - now) / NS_PER_MS) + 1;
}
