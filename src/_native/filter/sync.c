/* Sync: re-reads unshipped blocks while the guest runs, as records in the same
 * order (rules 4 and 10).
 *
 * A copy takes its slot before its range, never from the last half of the
 * ring; it holds whole bits, marks the open generation, publishes, then clears
 * unshipped, then releases the range.  Holes and zero data become SYNC_ZEROES;
 * nothing is passed over without a record, but for what a delta proves
 * (delta.h): that one reads first, and marks what it publishes.  One copy at a time while the guest
 * has commands in flight, COPIES otherwise.  When the guest's own records keep
 * the ring more than half full, copies are owed room: until they had it, the
 * guest's changes are unrecorded, so that every resync ends. */
#include <string.h>

#include "filter/fault.h"
#include "filter/internal.h"

#define STARVED_NS (50 * NS_PER_MS)
#define RETRY_NS NS_PER_S
#define YIELD_NS (20 * NS_PER_MS)

bool vrep_sync_all_zero(const struct iovec *iov, int count)
{
    for (int i = 0; i < count; i++) {
        const uint8_t *at = iov[i].iov_base;
        size_t bytes = iov[i].iov_len;
        /* Equal to itself shifted by one and zero at the start: memcmp is the fastest scan at hand.
         */
        if (bytes > 0 && (at[0] != 0 || memcmp(at, at + 1, bytes - 1) != 0))
            return false;
    }
    return true;
}

bool vrep_sync_target_attached(const struct vrep_group *group)
{
    for (uint32_t i = 0; i < group->consumers_count; i++)
        if (group->consumers[i].role == VREP_CONTROL_TARGET)
            return true;
    return false;
}

static void end(struct vrep_group *group, struct command *copy)
{
    if (copy->marked)
        vrep_map_done(group->map, copy->generation);
    if (copy->slot != NULL)
        vrep_ring_cancel(group->ring, copy->slot);
    copy->slot = NULL;
    copy->marked = false;
    if (copy->window != NULL)
        vrep_delta_ended(group, copy);
    if (copy->ranged)
        vrep_overlap_release(group->overlap, &copy->range, vrep_tap_granted, group);
    copy->ranged = copy->in_use = false;
    if (--group->copies_inflight == 0)
        group->mirror.yield_ns = 0;
    group->copies_bytes -= copy->bytes;
    vrep_tap_drain(group);
}

void vrep_sync_mark(struct vrep_group *group, uint16_t disk, uint64_t offset, uint64_t length)
{
    vrep_map_mark_unshipped(group->map, disk, offset, length);
    for (uint32_t i = 0; i < COPIES; i++)
        if (group->copies[i].in_use && group->copies[i].base.disk == disk)
            group->copies[i].stale = true;
}

void vrep_sync_clear(struct vrep_group *group, const struct command *copy)
{
    if (!copy->stale)
        vrep_map_clear_unshipped(group->map, copy->base.disk, copy->at, copy->bytes);
    vrep_fault("sync.after_clear");
    group->count.resync_bytes += copy->bytes;
}

static void publish(struct vrep_group *group, struct command *copy)
{
    vrep_tap_publish(group, copy->slot);
    copy->slot = NULL;
    vrep_fault("sync.after_publish");
    vrep_sync_clear(group, copy);
}

static void copied(struct command *copy)
{
    struct vrep_group *group = copy->base.group;
    if (copy->yielded) {
        /* What was written meanwhile stands in the order already, before this would. */
    } else if (copy->io.status != VREP_OK) {
        /* The block stays unshipped; others go first. */
        group->count.errors++;
        group->resync_retry_ns = group->now_ns + RETRY_NS;
    } else if (copy->window != NULL) {
        vrep_delta_copied(group, copy);
    } else {
        int count = vrep_payload_iov(group, copy);
        if (vrep_sync_all_zero(copy->room, count)) {
            vrep_ring_drop_payload(group->ring, copy->slot);
            copy->slot->kind = VREP_KIND_SYNC_ZEROES;
        }
        publish(group, copy);
    }
    end(group, copy);
}

/* ---- holes -------------------------------------------------------------------- */

/* On the worker, while the range is held: nobody can write what is being proven. */
static int prove_hole(struct vrep_job *job)
{
    struct command *copy = job->owner;
    struct vrep_disk *disk = disk_of(copy->base.group, copy)->disk;
    uint64_t at = copy->at, stop = copy->at + copy->bytes;
    while (at < stop) {
        uint64_t length;
        bool hole;
        int status = vrep_disk_extent(disk, at, stop - at, &length, &hole);
        if (status != VREP_OK)
            return status;
        if (!hole || length == 0)
            return VREP_E_NOT_FOUND;
        at += length;
    }
    return VREP_OK;
}

static void hole_proven(struct vrep_job *job)
{
    struct command *copy = job->owner;
    struct vrep_group *group = copy->base.group;
    if (job->status == VREP_OK) {
        vrep_tap_grant(group, copy, VREP_KIND_SYNC_ZEROES);
        publish(group, copy);
    } else {
        group->probe.valid = true;
        group->probe.disk = copy->base.disk;
        group->probe.offset = copy->at;
        group->probe.length = vrep_map_header(group->map)->bit_bytes;
        group->probe.hole = false;
        group->cursor_disk = copy->base.disk;
        group->cursor = copy->at;
    }
    end(group, copy);
}

void vrep_sync_granted(struct command *copy)
{
    struct vrep_group *group = copy->base.group;
    if (copy->hole) {
        copy->job.run = prove_hole;
        copy->job.done = hole_proven;
        copy->job.owner = copy;
        vrep_worker_post(group->prober, &copy->job);
        return;
    }
    if (copy->window == NULL)
        vrep_tap_grant(group, copy, VREP_KIND_SYNC);
    vrep_fault("sync.after_grant");
    int count = vrep_payload_iov(group, copy);
    vrep_backing_start(copy, VREP_IO_READ, 0, copy->at, copy->bytes, copy->room, count, copied);
}

static int probe_run(struct vrep_job *job)
{
    struct vrep_group *group = job->owner;
    return vrep_disk_extent(group->disks[group->probe.disk].disk, group->probe.offset,
                            HOLE_BYTES_MAX, &group->probe.length, &group->probe.hole);
}

static void probe_done(struct vrep_job *job)
{
    struct vrep_group *group = job->owner;
    if (job->status != VREP_OK) { /* it is read as data then, and that finds the error */
        group->probe.hole = false;
        group->probe.length = vrep_map_header(group->map)->bit_bytes;
    }
    group->probe.valid = group->probe.length > 0;
    group->resync_again = true;
}

/* It lies in hot extents: one leaves only after a good flush. */
void vrep_sync_since_flush(struct vrep_group *group)
{
    for (uint16_t disk = 0; disk < group->disks_count; disk++) {
        uint64_t from = 0, offset, length;
        while (vrep_intent_next(group->intent, disk, from, &offset, &length)) {
            vrep_map_mark_unshipped(group->map, disk, offset, length);
            from = offset + length;
        }
    }
}

static int forget_run(struct vrep_job *job)
{
    struct vrep_group *group = job->owner;
    for (uint32_t i = 0; i < group->disks_count; i++)
        vrep_disk_forget_cache(group->disks[i].disk);
    return VREP_OK;
}

static void forget_done(struct vrep_job *job)
{
    struct vrep_group *group = job->owner;
    /* Copies that were under way when the sync failed had read the cache, and cleared. */
    vrep_sync_since_flush(group);
    if (group->distrust == group->distrust_known)
        group->distrust = 0;
    group->resync_again = true;
}

void vrep_sync_init(struct vrep_group *group)
{
    group->forget_job = (struct vrep_job){.run = forget_run, .done = forget_done, .owner = group};
    group->probe_job = (struct vrep_job){.run = probe_run, .done = probe_done, .owner = group};
}

/* ---- choosing ------------------------------------------------------------------- */

static bool budget_left(struct vrep_group *group)
{
    if (group->resync_rate == 0)
        return true;
    uint64_t passed = group->now_ns - group->resync_filled_ns;
    int64_t most = (int64_t)(group->resync_rate / 4 > COPY_BYTES_MAX ? group->resync_rate / 4
                                                                     : COPY_BYTES_MAX);
    double per_ns = (double)group->resync_rate / (double)NS_PER_S, more = (double)passed * per_ns;
    if (more >= (double)most) {
        group->resync_budget += most;
        group->resync_filled_ns = group->now_ns;
    } else { /* turns may be less than a byte apart: the rest counts for the next */
        group->resync_budget += (int64_t)more;
        group->resync_filled_ns += (uint64_t)((double)(int64_t)more / per_ns);
    }
    if (group->resync_budget > most)
        group->resync_budget = most;
    return group->resync_budget > 0;
}

static bool room_left(struct vrep_group *group)
{
    if (vrep_ring_head(group->ring) + group->commands_count + SLOTS_OWN >= group->seq_limit)
        return false;
    if (!vrep_ring_half_full(group->ring))
        return true;
    if (group->resync_starved_ns == 0)
        group->resync_starved_ns = group->now_ns;
    else if (group->now_ns - group->resync_starved_ns > STARVED_NS && group->resync_owed <= 0)
        group->resync_owed = (int64_t)(vrep_ring_payload_bytes(group->ring) / 8);
    return false;
}

/* The next unshipped run from the cursor on; around the end only when no copy is in flight, so that
 * none is copied twice. */
static bool next_run(struct vrep_group *group, uint64_t *offset, uint64_t *length)
{
    bool wrapped = false;
    for (;;) {
        if (group->cursor < group->disks[group->cursor_disk].info.bytes &&
            vrep_map_next_unshipped(group->map, group->cursor_disk, group->cursor, HOLE_BYTES_MAX,
                                    offset, length)) {
            group->cursor = *offset;
            return true;
        }
        group->cursor = 0;
        if (group->cursor_disk + 1u < group->disks_count) {
            group->cursor_disk++;
            continue;
        }
        if (wrapped || group->copies_inflight > 0 || !vrep_delta_next_round(group)) {
            group->cursor = group->disks[group->cursor_disk].info.bytes; /* stay at the end */
            return false;
        }
        group->cursor_disk = 0;
        wrapped = true;
    }
}

/* The range is of the cursor's disk, or of the window. */
static bool start(struct vrep_group *group, uint64_t offset, uint64_t length, bool hole,
                  struct delta_window *window)
{
    struct command *copy = NULL;
    for (uint32_t i = 0; i < COPIES && copy == NULL; i++)
        if (!group->copies[i].in_use)
            copy = &group->copies[i];
    if (copy == NULL)
        return false;
    struct vrep_ring_slot *slot = vrep_ring_reserve(group->ring, hole ? 0 : length);
    if (slot == NULL)
        return false;
    copy->in_use = true;
    copy->slot = slot;
    copy->hole = hole;
    copy->marked = copy->stale = copy->yielded = false;
    copy->generation = NO_GENERATION;
    copy->base.disk = group->cursor_disk;
    copy->base.op = VREP_OP_READ;
    copy->base.flags = 0;
    copy->base.offset = copy->at = offset;
    copy->base.length = copy->bytes = length;
    if (window != NULL)
        vrep_delta_start(window, copy);
    else
        group->cursor = offset + length;
    copy->range.disk = copy->base.disk;
    copy->range.offset = offset;
    copy->range.length = length;
    copy->ranged = true;
    group->copies_inflight++;
    copy->number = ++group->mirror.copies;
    group->copies_bytes += length;
    if (!hole)
        group->resync_budget -= (int64_t)length;
    group->resync_owed -= group->resync_owed > 0 ? (int64_t)length : 0;
    group->resync_starved_ns = 0;
    /* The last ones: what the guest writes behind them must be recorded, or a block that it writes
     * all the time would never be done. */
    if (vrep_map_unshipped_bits(group->map) * vrep_map_header(group->map)->bit_bytes <=
        group->copies_bytes)
        group->resync_owed = 0;
    if (vrep_overlap_acquire(group->overlap, &copy->range))
        list_push(&group->ready, copy);
    vrep_tap_drain(group);
    return true;
}

/* Absent blocks of a view are fetched first; the run is cut before them. */
static bool cut_absent(struct vrep_group *group, uint64_t offset, uint64_t *length)
{
    const struct disk *disk = &group->disks[group->cursor_disk];
    uint64_t absent, absent_length, bit = vrep_map_header(group->map)->bit_bytes;
    if (!disk->overlay ||
        !vrep_overlay_absent(disk->disk, offset, *length, &absent, &absent_length))
        return true;
    uint64_t whole = absent <= offset ? 0 : (absent - offset) / bit * bit;
    if (whole == 0) {
        vrep_miss_prefetch(group, group->cursor_disk, absent, absent_length);
        return false;
    }
    *length = whole;
    return true;
}

enum look { LOOK_NOTHING, LOOK_HOLE, LOOK_DATA };

/* What stands next at the cursor: the part of an unshipped run that is a hole, or the run from
 * where it has data.  *known is how far that is known. */
static enum look look(struct vrep_group *group, uint64_t *offset, uint64_t *length, uint64_t *known)
{
    uint64_t bit = vrep_map_header(group->map)->bit_bytes;
    if (!next_run(group, offset, length))
        return LOOK_NOTHING;
    if (!cut_absent(group, *offset, length)) {
        group->resync_owed = 0;
        return LOOK_NOTHING;
    }
    bool probed = group->probe.valid && group->probe.disk == group->cursor_disk &&
                  group->probe.offset <= *offset &&
                  *offset - group->probe.offset < group->probe.length;
    if (!probed) {
        if (!group->probe_job.busy) {
            group->probe.valid = false;
            group->probe.disk = group->cursor_disk;
            group->probe.offset = *offset;
            vrep_worker_post(group->prober, &group->probe_job);
        }
        return LOOK_NOTHING;
    }
    *known = group->probe.offset + group->probe.length - *offset;
    uint64_t run = *known < *length ? *known : *length;
    if (group->probe.hole) {
        bool to_end = *offset + run == group->disks[group->cursor_disk].info.bytes;
        uint64_t whole = to_end ? run : run / bit * bit;
        if (whole > 0) {
            *length = whole;
            return LOOK_HOLE;
        }
    }
    return LOOK_DATA;
}

static bool start_next(struct vrep_group *group)
{
    uint64_t offset, length, known, bit = vrep_map_header(group->map)->bit_bytes;
    if (!budget_left(group)) {
        group->resync_owed =
            0; /* the limit holds copies back, not the ring: the guest may record */
        return false;
    }
    if (!room_left(group))
        return false;
    enum look found = look(group, &offset, &length, &known);
    if (found == LOOK_NOTHING)
        return false;
    if (found == LOOK_HOLE)
        return start(group, offset, length, true, NULL);
    uint64_t run = known < length ? known : length;
    run = (run + bit - 1) / bit * bit;
    if (run > COPY_BYTES_MAX)
        run = COPY_BYTES_MAX;
    return start(group, offset, run < length ? run : length, false, NULL);
}

/* The same with a delta: data only out of windows that were answered. */
static bool start_known(struct vrep_group *group)
{
    uint64_t offset, length, known;
    struct delta_window *window = NULL;
    if (!budget_left(group)) {
        group->resync_owed = 0;
        return false;
    }
    if (!vrep_delta_ready(group, &offset, &length, &window) &&
        look(group, &offset, &length, &known) != LOOK_HOLE) {
        /* Answers are waited for, not room. */
        group->resync_owed = 0;
        group->resync_starved_ns = 0;
        return false;
    }
    return room_left(group) && start(group, offset, length, window == NULL, window);
}

/* Windows ahead of the copies, so that their answers are there when they are due. */
static void look_ahead(struct vrep_group *group)
{
    uint64_t offset, length, known;
    while (!vrep_delta_full(group) && look(group, &offset, &length, &known) == LOOK_DATA)
        vrep_delta_offer(group, offset, length);
}

/* ---- giving way ------------------------------------------------------------------ */

/* A copy of a remote disk reads through the VM itself, which may answer nobody before the very
 * command is answered that waits for the copy's range: a QEMU that drains its disks takes no
 * request of its NBD server.  So a VM waits for such a copy for a moment only; then the copy lets
 * go of its range, and what it brings is not believed. */
void vrep_sync_waited_for(struct vrep_group *group)
{
    if (group->mirror.yield_ns == 0 && group->copies_inflight > 0)
        group->mirror.yield_ns = group->now_ns + YIELD_NS;
}

static void give_way(struct vrep_group *group)
{
    group->mirror.yield_ns = 0;
    for (uint32_t i = 0; i < COPIES; i++) {
        struct command *copy = &group->copies[i];
        if (!copy->in_use || !copy->ranged || !vrep_disk_is_remote(disk_of(group, copy)->disk))
            continue;
        group->count.mirror_yields++;
        if (!copy->range.held) { /* nothing was begun */
            end(group, copy);
            continue;
        }
        copy->yielded = true;
        copy->ranged = false;
        vrep_overlap_release(group->overlap, &copy->range, vrep_tap_granted, group);
    }
    vrep_tap_drain(group);
}

void vrep_sync_pump(struct vrep_group *group)
{
    group->resync_again = false;
    if (group->mirror.yield_ns != 0 && group->now_ns >= group->mirror.yield_ns)
        give_way(group);
    if (!group->tap || group->closing)
        return;
    if (vrep_handover_blind(group)) {
        group->resync_owed = 0;
        return;
    }
    if (group->distrust > 0) {
        group->resync_owed = 0;
        if (group->copies_inflight == 0 && !group->forget_job.busy) {
            group->distrust_known = group->distrust;
            vrep_worker_post(group->prober, &group->forget_job);
        }
        return;
    }
    vrep_gap_try_end(group);
    if (!group->resync_allowed || group->lose_wanted || vrep_map_unshipped_bits(group->map) == 0 ||
        !vrep_sync_target_attached(group)) {
        group->resync_owed = 0;
        group->resync_starved_ns = 0;
        return;
    }
    if (group->now_ns < group->resync_retry_ns)
        return;
    uint32_t limit = group->inflight > 0 ? 1 : COPIES;
    uint32_t started = 0;
    bool delta = vrep_delta_on(group);
    if (delta)
        look_ahead(group);
    while (started < COPIES && group->copies_inflight < limit &&
           (delta ? start_known(group) : start_next(group)))
        started++;
    group->resync_again = started > 0 && group->copies_inflight < limit;
    vrep_gap_try_end(group);
}

int vrep_sync_timeout_ms(const struct vrep_group *group)
{
    if (!group->tap)
        return -1;
    if (group->mirror.yield_ns != 0)
        return 1;
    if (group->closing)
        return -1;
    if (group->resync_again)
        return 0;
    bool wanted = group->resync_allowed && vrep_map_unshipped_bits(group->map) > 0 &&
                  vrep_sync_target_attached(group);
    return wanted && group->copies_inflight == 0 && !group->probe_job.busy &&
                   !group->forget_job.busy
               ? 5
               : -1;
}
