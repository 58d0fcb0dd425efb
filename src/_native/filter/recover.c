/* Recover: what happened to a group since it was served last, and what follows
 * from it (the design's section on the change map, rules 7 to 9, and on writes
 * past the filter).  Runs once, at open, on one thread, before any client.
 *
 *   state      shared memory   found as      what becomes unshipped
 *   absent     -               NEW           everything
 *   closed     whole           CLEAN         nothing more
 *   closed     gone            CLEAN         the clean checkpoint's bits
 *   open       whole           KILLED        nothing; the in-flight table is replayed
 *   open       gone            POWER_LOSS    the checkpoint's bits and hot extents
 *                              UNEXPLAINED   everything, when a disk was written since this boot
 *   any        any             UNEXPLAINED   everything, when another file, or an older
 *                                            content, stands in a disk's place
 *
 * Anything that these do not explain is UNEXPLAINED, everything, with a reason; so is a state that
 * says that a VM may have written past the filter, and a VM that does (a hand-over, a mirror).
 *
 * A mirror that is opened again with its shared memory whole is KILLED, however it ended: its gap
 * is open until its VM has told what it wrote meanwhile (mirror.c).
 *
 * After a pass-through (bypass.c) the state is open: KILLED when it marked in the shared memory
 * that is still there, else UNEXPLAINED. */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/log.h"
#include "base/shared.h"
#include "filter/fault.h"
#include "filter/internal.h"

static int join(char out[PATH_MAX], const char *directory, const char *name)
{
    int length = snprintf(out, PATH_MAX, "%s/%s", directory, name);
    return length > 0 && length < PATH_MAX - 8 ? VREP_OK : VREP_E_RANGE;
}

static int name_files(const struct vrep_group *group, struct vrep_finding *found)
{
    const char *shm = group->config.shm_dir, *state = group->config.state_dir;
    if (shm == NULL)
        shm = state; /* nothing is looked for there */
    if (join(found->ring, shm, "ring") != VREP_OK || join(found->map, shm, "map") != VREP_OK ||
        join(found->intent, state, "intent") != VREP_OK ||
        join(found->state, state, "state") != VREP_OK ||
        join(found->checkpoint, state, "map") != VREP_OK)
        return VREP_E_RANGE;
    return VREP_OK;
}

/* ---- finding out ---------------------------------------------------------------- */

static bool sizes_match(const struct vrep_group *group)
{
    if (group->state.disks != group->disks_count)
        return false;
    for (uint32_t i = 0; i < group->disks_count; i++)
        if (group->state.disk[i].bytes != group->disks[i].info.bytes)
            return false;
    return true;
}

/* A device node is made anew at each boot, and its times say nothing of its content: the kernel's
 * count of what was written to it does, since the boot.  One that is not counted is believed. */
static bool counts_match(const struct vrep_state_disk *before, const struct vrep_disk_info *now,
                         bool same_boot)
{
    if (!same_boot)
        return now->commands == 0;
    return before->commands == now->commands && before->sectors == now->sectors;
}

/* What holds whatever was written: a file that was put in its place has another inode.  One that
 * was written or changed last before the filter opened it holds what it held earlier: a copy was
 * restored over it, or its file system was taken back. */
static bool same_files(const struct vrep_group *group)
{
    for (uint32_t i = 0; i < group->disks_count; i++) {
        const struct vrep_state_disk *before = &group->state.disk[i];
        const struct vrep_disk_info *now = &group->disks[i].info;
        if (!now->block_device &&
            (before->inode != now->inode || now->mtime_ns < before->mtime_ns ||
             now->ctime_ns < before->ctime_ns))
            return false;
    }
    return true;
}

static bool stamps_match(const struct vrep_group *group)
{
    uint8_t boot[16];
    bool same_boot =
        vrep_boot_id(boot) == VREP_OK && memcmp(group->state.boot_id, boot, sizeof boot) == 0;
    for (uint32_t i = 0; i < group->disks_count; i++) {
        const struct vrep_state_disk *before = &group->state.disk[i];
        const struct vrep_disk_info *now = &group->disks[i].info;
        if (now->block_device && !counts_match(before, now, same_boot))
            return false;
        if (!now->block_device &&
            (before->inode != now->inode || before->mtime_ns != now->mtime_ns ||
             before->ctime_ns != now->ctime_ns))
            return false;
    }
    return true;
}

/* A newer epoch of a group goes on where the older one was: a failover was rolled back, and begins
 * behind all that was ever acknowledged to this writer.  The same number with another id is another
 * history. */
static bool one_line(uint32_t epoch, const uint8_t epoch_id[16],
                     const struct vrep_group_config *config)
{
    return epoch < config->epoch ||
           (epoch == config->epoch && memcmp(epoch_id, config->epoch_id, 16) == 0);
}

void vrep_recover_detach(struct vrep_group *group, struct vrep_finding *found)
{
    vrep_map_detach(group->map);
    vrep_ring_detach(group->ring, false);
    group->map = NULL;
    group->ring = NULL;
    found->shared = false;
}

static void attach_shared(struct vrep_group *group, struct vrep_finding *found, int *status)
{
    const struct vrep_group_config *config = &group->config;
    *status = VREP_E_NOT_FOUND;
    if (config->shm_dir == NULL)
        return;
    *status = vrep_ring_attach(found->ring, config->group_id, &group->ring);
    if (*status != VREP_OK) {
        group->ring = NULL;
        return;
    }
    /* A resize that was cut off may have left the map of either size. */
    *status = vrep_map_attach(found->map, config->group_id, config->target_id,
                              found->resized ? found->was_bytes : found->disk_bytes,
                              group->disks_count, &group->map);
    if (*status == VREP_E_INVALID && found->resized)
        *status = vrep_map_attach(found->map, config->group_id, config->target_id,
                                  found->disk_bytes, group->disks_count, &group->map);
    const struct vrep_ring_header *header = vrep_ring_header(group->ring);
    bool same_line = one_line(header->epoch, header->epoch_id, config);
    if (*status == VREP_OK && same_line) {
        vrep_ring_adopt_epoch(group->ring, config->epoch, config->epoch_id);
        found->shared = true;
        return;
    }
    if (*status == VREP_OK)
        vrep_map_detach(group->map);
    vrep_ring_detach(group->ring, false);
    group->map = NULL;
    group->ring = NULL;
}

/* Seconds times 2^24 lie above any seq that counting reaches. */
static uint64_t above_any_seq(const struct vrep_group *group)
{
    return vrep_clock_ns(group, CLOCK_REALTIME) / NS_PER_S << 24;
}

static int find_out(struct vrep_group *group, struct vrep_finding *found)
{
    const struct vrep_group_config *config = &group->config;
    int shared_status;
    int status = vrep_state_load(found->state, config->group_id, &group->state);
    if (status != VREP_OK && status != VREP_E_NOT_FOUND && status != VREP_E_CORRUPT)
        return status;
    if (status == VREP_OK && group->state.epoch > config->epoch)
        return VREP_E_FENCED;
    found->known = status == VREP_OK;
    found->resized = found->known && vrep_resize_find(group, found);
    attach_shared(group, found, &shared_status);
    if (shared_status == VREP_E_BUSY)
        return VREP_E_LOCKED;

    bool other_epoch =
        status == VREP_OK && !one_line(group->state.epoch, group->state.epoch_id, config);
    if (status == VREP_E_NOT_FOUND || other_epoch) {
        found->how = VREP_OPENED_NEW;
        found->first_seq = other_epoch ? group->state.seq_limit : 0;
        if (found->first_seq < config->first_seq)
            found->first_seq = config->first_seq;
        if (!other_epoch)
            memset(&group->state, 0, sizeof group->state);
        return VREP_OK;
    }
    if (status == VREP_E_CORRUPT) {
        /* The high-water mark is lost with it. */
        memset(&group->state, 0, sizeof group->state);
        found->how = VREP_OPENED_UNEXPLAINED;
        found->reason = VREP_UNVERIFIED_STATE;
        found->first_seq = above_any_seq(group);
        return VREP_OK;
    }
    found->first_seq = group->state.seq_limit;
    found->reason = group->state.unverified;
    found->bypassed = (group->state.flags & (VREP_STATE_BYPASS | VREP_STATE_BLIND)) != 0;
    if ((group->state.flags & VREP_STATE_BLIND) != 0 && found->shared)
        vrep_recover_detach(group, found); /* it may be of any earlier run */
    bool open = (group->state.flags & VREP_STATE_OPEN) != 0;
    if (!found->resized && !sizes_match(group)) {
        found->how = VREP_OPENED_UNEXPLAINED;
        found->reason = VREP_UNVERIFIED_SIZE;
    } else if (group->mirror.on && found->shared && (group->state.flags & VREP_STATE_MIRROR) != 0) {
        found->how = VREP_OPENED_KILLED; /* what was not sent meanwhile, its VM knows */
    } else if ((group->state.flags & VREP_STATE_PAST) != 0 || group->handover == VREP_HANDOVER_IN ||
               group->mirror.on) {
        found->how = VREP_OPENED_UNEXPLAINED;
        if (found->reason != VREP_UNVERIFIED_FLUSH)
            found->reason = VREP_UNVERIFIED_PAST;
    } else if (found->bypassed && !found->shared) {
        found->how = VREP_OPENED_UNEXPLAINED;
        if (found->reason != VREP_UNVERIFIED_FLUSH)
            found->reason = VREP_UNVERIFIED_BYPASS;
    } else if (open ? !same_files(group) : !stamps_match(group)) {
        found->how = VREP_OPENED_UNEXPLAINED;
        found->reason = VREP_UNVERIFIED_STAMPS;
    } else if (!open) {
        found->how = VREP_OPENED_CLEAN;
        /* Memory that an earlier run in another directory left is not what the last one closed. */
        if (found->shared && vrep_ring_head(group->ring) != group->state.seq_limit)
            vrep_recover_detach(group, found);
    } else {
        found->how = found->shared ? VREP_OPENED_KILLED : VREP_OPENED_POWER_LOSS;
        if (!found->shared && vrep_past_since_boot(group)) {
            found->how = VREP_OPENED_UNEXPLAINED;
            found->reason = VREP_UNVERIFIED_PAST;
        }
    }
    /* The disk and this state may be those of an earlier time, put back: a target may hold more
     * than the state knows of. */
    if (found->how == VREP_OPENED_UNEXPLAINED && !found->shared &&
        found->first_seq < above_any_seq(group))
        found->first_seq = above_any_seq(group);
    return VREP_OK;
}

/* What nothing explains begins anew, with the sizes that the disks have, which its gap tells. */
static void settle_sizes(struct vrep_group *group, struct vrep_finding *found)
{
    if (!found->resized)
        return;
    vrep_resize_backing(group, found);
    if (found->how != VREP_OPENED_NEW && found->how != VREP_OPENED_UNEXPLAINED)
        return;
    if (found->shared)
        vrep_recover_detach(group, found);
    found->resized = false;
}

/* ---- shared memory made anew -------------------------------------------------------- */

/* Map first, ring last: shared memory counts only with both, so a kill in between leaves none. */
static int make_map(struct vrep_group *group, const struct vrep_finding *found,
                    const uint64_t *bytes)
{
    const struct vrep_group_config *config = &group->config;
    if (unlink(found->ring) != 0 && errno != ENOENT)
        return vrep_status_from_errno(errno);
    return vrep_map_create(found->map, config->group_id, config->target_id, bytes,
                           group->disks_count, config->bit_bytes, &group->map);
}

static int make_ring(struct vrep_group *group, const struct vrep_finding *found)
{
    const struct vrep_group_config *config = &group->config;
    struct vrep_ring_config ring = {
        .epoch = config->epoch,
        .lane = config->lane,
        .descriptors = config->ring_descriptors,
        .slots = config->slots + SLOTS_OWN,
        .payload_bytes = config->ring_bytes,
        .first_seq = found->first_seq,
        .mode = 0640,
    };
    memcpy(ring.group_id, config->group_id, 16);
    memcpy(ring.epoch_id, config->epoch_id, 16);
    return vrep_ring_create(found->ring, &ring, &group->ring);
}

static void hot_to_unshipped(struct vrep_group *group)
{
    for (uint16_t disk = 0; disk < group->disks_count; disk++) {
        uint64_t from = 0, offset, length;
        while (vrep_intent_next(group->intent, disk, from, &offset, &length)) {
            vrep_map_mark_unshipped(group->map, disk, offset, length);
            from = offset + length;
        }
    }
}

/* Opens the write-intent, or makes a new one; *whole says whether the old one can be believed. */
static int open_intent(struct vrep_group *group, struct vrep_finding *found, bool *whole)
{
    const uint8_t *id = group->config.group_id;
    *whole = false;
    if (found->how != VREP_OPENED_NEW && found->reason != VREP_UNVERIFIED_SIZE) {
        int status = VREP_E_INVALID;
        if (found->resized) {
            status = vrep_intent_open(found->intent, id, found->was_bytes, group->disks_count,
                                      &group->intent);
            found->intent_was = status == VREP_OK;
        }
        if (status == VREP_E_INVALID)
            status = vrep_intent_open(found->intent, id, found->disk_bytes, group->disks_count,
                                      &group->intent);
        *whole = status == VREP_OK;
        if (status == VREP_OK)
            return status;
        if (status != VREP_E_NOT_FOUND && status != VREP_E_CORRUPT && status != VREP_E_INVALID)
            return status;
    }
    return vrep_intent_create(found->intent, id, found->disk_bytes, group->disks_count,
                              &group->intent);
}

/* The bits of the newest checkpoint, in a map of its sizes: when a resize was cut off, those that
 * the disks have now, or those before. */
static int load_checkpoint(struct vrep_group *group, const struct vrep_finding *found, bool *clean)
{
    int status = vrep_checkpoint_load(found->checkpoint, group->map, clean);
    if (status == VREP_OK || !found->resized)
        return status;
    vrep_map_detach(group->map);
    group->map = NULL;
    status = make_map(group, found, found->was_bytes);
    return status == VREP_OK ? vrep_checkpoint_load(found->checkpoint, group->map, clean) : status;
}

/* After this the map says what may differ; *jump: the ring begins with a gap that breaks seq. */
static int settle_map(struct vrep_group *group, struct vrep_finding *found, bool intent_whole,
                      bool *jump)
{
    bool all = found->how == VREP_OPENED_NEW || found->how == VREP_OPENED_UNEXPLAINED;
    *jump = false;
    if (!found->shared || found->how == VREP_OPENED_NEW) {
        if (found->shared) /* of an epoch or group that ended */
            vrep_recover_detach(group, found);
        int status = make_map(group, found, found->disk_bytes);
        if (status != VREP_OK)
            return status;
        *jump = found->first_seq != 0;
        if (!all) {
            bool clean;
            status = load_checkpoint(group, found, &clean);
            bool believed =
                status == VREP_OK && (found->how == VREP_OPENED_CLEAN ? clean : intent_whole);
            if (status != VREP_OK && status != VREP_E_NOT_FOUND && status != VREP_E_CORRUPT &&
                status != VREP_E_INVALID)
                return status;
            if (!believed) {
                found->how = VREP_OPENED_UNEXPLAINED;
                found->reason = VREP_UNVERIFIED_INTENT;
                all = true;
            } else if (found->how == VREP_OPENED_POWER_LOSS) {
                hot_to_unshipped(group);
            }
            /* The state file may be older than the checkpoint. */
            if (status == VREP_OK && vrep_map_acknowledged(group->map) > group->state.durable_seq)
                group->state.durable_seq = vrep_map_acknowledged(group->map);
        }
        /* Closed cleanly, all delivered, nothing dirty: order goes on as if nothing had been. */
        if (found->how == VREP_OPENED_CLEAN && vrep_map_unshipped_bits(group->map) == 0 &&
            group->state.durable_seq == found->first_seq &&
            (group->state.flags & VREP_STATE_GAP) == 0)
            *jump = false;
    }
    if (all)
        vrep_map_mark_all_unshipped(group->map);
    if (all || *jump || found->reason != 0)
        vrep_map_set_gap(group->map);
    vrep_fault("recover.before_ring");
    if (group->ring != NULL)
        return VREP_OK;
    vrep_map_header(group->map)->unverified = found->reason;
    return make_ring(group, found);
}

/* The durable write-intent is lost, or a pass-through kept none, and the shared memory is whole:
 * what a later power loss could take back without a trace is made stable first. */
static int sync_backing(struct vrep_group *group)
{
    for (uint32_t i = 0; i < group->disks_count; i++) {
        struct vrep_io io = {.op = VREP_IO_FLUSH};
        int status = vrep_fault("recover.flush");
        if (status == VREP_OK && !group->disks[i].info.read_only)
            status = vrep_backing_sync_io(group, i, &io);
        if (status != VREP_OK)
            return status;
    }
    return VREP_OK;
}

/* ---- replay (rule 7) -------------------------------------------------------------------- */

struct waited {
    bool done;
};

static void waited_done(struct vrep_io *io)
{
    ((struct waited *)io->owner)->done = true;
}

int vrep_backing_sync_io(struct vrep_group *group, uint32_t disk, struct vrep_io *io)
{
    struct waited waited = {false};
    io->done = waited_done;
    io->owner = &waited;
    vrep_disk_submit(group->disks[disk].disk, io);
    while (!io->inline_done && !waited.done)
        vrep_engine_wait(group->engine, 1000);
    return io->status;
}

bool vrep_recover_slot_sane(const struct vrep_group *group, const struct vrep_ring_slot *slot)
{
    return slot->disk < group->disks_count && slot->length > 0 &&
           slot->offset <= group->disks[slot->disk].info.bytes &&
           slot->length <= group->disks[slot->disk].info.bytes - slot->offset;
}

bool vrep_recover_reads_zero(struct vrep_group *group, uint16_t disk, uint64_t from, uint64_t to,
                             uint64_t data_max)
{
    uint64_t at = from;
    while (at < to) {
        uint64_t length;
        bool hole;
        if (vrep_disk_extent(group->disks[disk].disk, at, to - at, &length, &hole) != VREP_OK ||
            length == 0)
            return false;
        if (!hole) { /* any private memory will do: no client is served yet */
            if (length > data_max)
                return false;
            data_max -= length;
            if (length > group->private_bytes)
                length = group->private_bytes;
            if (length > VREP_WRITE_BYTES_MAX)
                length = VREP_WRITE_BYTES_MAX;
            struct iovec whole = {.iov_base = group->private_memory, .iov_len = length};
            struct iovec used = whole;
            struct vrep_io io = {
                .op = VREP_IO_READ, .offset = at, .length = length, .iov = &used, .iovcnt = 1};
            if (vrep_backing_sync_io(group, disk, &io) != VREP_OK || !vrep_sync_all_zero(&whole, 1))
                return false;
        }
        at += length;
    }
    return true;
}

/* What the backing holds now goes into the descriptor that the dead process had reserved. */
static bool reread(struct vrep_group *group, struct vrep_ring_slot *slot)
{
    if (slot->chunk == VREP_NO_CHUNK) {
        slot->kind = VREP_KIND_SYNC_ZEROES;
        return vrep_recover_reads_zero(group, slot->disk, slot->offset, slot->offset + slot->length,
                                       UINT64_MAX);
    }
    int max = (int)(VREP_WRITE_BYTES_MAX / VREP_CHUNK_BYTES + 2);
    struct iovec *iov = group->room;
    int count = vrep_ring_iov(group->ring, slot, 0, slot->length, iov, max);
    if (count < 0)
        return false;
    struct vrep_io io = {.op = VREP_IO_READ,
                         .offset = slot->offset,
                         .length = slot->length,
                         .iov = iov,
                         .iovcnt = count};
    slot->kind = VREP_KIND_SYNC;
    return vrep_backing_sync_io(group, slot->disk, &io) == VREP_OK;
}

/* A command in flight over the end of a disk that became smaller: its part that is still there is
 * not known. */
static void cut_off(struct vrep_group *group, const struct vrep_ring_slot *slot)
{
    if ((slot->state != VREP_SLOT_GRANTED && slot->state != VREP_SLOT_UNRECORDED) ||
        slot->disk >= group->disks_count || slot->length == 0 ||
        slot->offset >= group->disks[slot->disk].info.bytes)
        return;
    vrep_map_mark_unshipped(group->map, slot->disk, slot->offset, slot->length);
    vrep_gap_enter(group);
}

static void replay(struct vrep_group *group)
{
    struct vrep_map *map = group->map;
    vrep_map_reset_inflight(map);
    vrep_ring_judge(group->ring);
    uint32_t slots = vrep_ring_slots(group->ring);
    /* All are counted before the first is published: a later kill must find every mark. */
    for (uint32_t i = 0; i < slots; i++) {
        struct vrep_ring_slot *slot = vrep_ring_slot_at(group->ring, i);
        if (slot->state != VREP_SLOT_GRANTED || !vrep_recover_slot_sane(group, slot))
            continue;
        slot->generation = vrep_map_mark(map, slot->disk, slot->offset, slot->length);
    }
    for (uint32_t i = 0; i < slots; i++) {
        struct vrep_ring_slot *slot = vrep_ring_slot_at(group->ring, i);
        if (slot->state == VREP_SLOT_FREE)
            continue;
        if (!vrep_recover_slot_sane(
                group, slot)) { /* an entry that was being filled: nothing was submitted for it */
            cut_off(group, slot);
            vrep_ring_cancel(group->ring, slot);
            continue;
        }
        uint8_t generation = slot->generation;
        bool granted = slot->state == VREP_SLOT_GRANTED;
        vrep_fault("recover.replay");
        /* The image of a mirror is being written: a sync copy reads it, when the mirror is live. */
        if (granted && !group->mirror.on && reread(group, slot)) {
            slot->flags |= VREP_RECORD_REPLAY;
            vrep_tap_publish(group, slot);
            group->replayed++;
        } else {
            vrep_map_mark_unshipped(map, slot->disk, slot->offset, slot->length);
            vrep_gap_enter(group);
            vrep_ring_cancel(group->ring, slot);
        }
        if (granted)
            vrep_map_done(map, generation);
    }
}

void vrep_recover_settle_gap(struct vrep_group *group)
{
    struct vrep_map_header *header = vrep_map_header(group->map);
    const struct vrep_ring_desc *last = vrep_group_desc(group, vrep_ring_head(group->ring));
    if (last == NULL || header->gap == 0)
        return;
    if (header->gap_open == 0 && last->kind == VREP_KIND_GAP_BEGIN) {
        header->gap_seq = header->gap_last = last->seq;
        vrep_store_release_u32(&header->gap_open, 1);
    } else if (header->gap_open != 0 && last->kind == VREP_KIND_GAP_END) {
        header->unverified = 0;
        vrep_store_release_u32(&header->gap_open, 0);
        vrep_store_release_u32(&header->gap, 0);
    }
}

/* The process that made the ring died before the gap-begin that it was to begin with. */
static bool begun_anew(struct vrep_group *group)
{
    const struct vrep_map_header *header = vrep_map_header(group->map);
    uint64_t head = vrep_ring_head(group->ring);
    return head != 0 && head == vrep_ring_header(group->ring)->first_seq && header->gap != 0 &&
           header->gap_open == 0;
}

/* What the last process saw acknowledged may be more than its state file says: the ring knows,
 * unless it began anew, which no target had a part in. */
static void settle_acknowledged(struct vrep_group *group)
{
    uint64_t durable = vrep_ring_durable(group->ring);
    bool anew = durable == vrep_ring_header(group->ring)->first_seq;
    if (!anew && durable > group->state.durable_seq)
        group->state.durable_seq = durable;
}

/* ---- all of it --------------------------------------------------------------------------- */

static int store_state(struct vrep_group *group, const struct vrep_finding *found)
{
    struct vrep_state *state = &group->state;
    memcpy(state->group_id, group->config.group_id, 16);
    memcpy(state->epoch_id, group->config.epoch_id, 16);
    state->epoch = group->config.epoch;
    state->lane = group->config.lane;
    state->flags |= VREP_STATE_OPEN;
    state->flags &= ~(VREP_STATE_GAP | VREP_STATE_UNVERIFIED | VREP_STATE_BYPASS |
                      VREP_STATE_BLIND | VREP_STATE_PAST | VREP_STATE_MIRROR);
    if (group->handover == VREP_HANDOVER_IN || group->mirror.on)
        state->flags |= VREP_STATE_PAST;
    if (group->mirror.on)
        state->flags |= VREP_STATE_MIRROR;
    if (vrep_map_gap(group->map))
        state->flags |= VREP_STATE_GAP;
    if (found->reason != 0)
        state->flags |= VREP_STATE_UNVERIFIED;
    state->unverified = found->reason;
    state->seq_limit = vrep_ring_head(group->ring) + SEQ_AHEAD;
    if (vrep_boot_id(state->boot_id) != VREP_OK)
        memset(state->boot_id, 0, sizeof state->boot_id);
    vrep_state_stamp(group);
    int status = vrep_state_write(&group->state_file, state);
    if (status == VREP_OK)
        group->seq_limit = state->seq_limit;
    return status;
}

int vrep_recover_find(struct vrep_group *group, struct vrep_finding *found)
{
    *found = (struct vrep_finding){.how = VREP_OPENED_NEW};
    for (uint32_t i = 0; i < group->disks_count; i++)
        found->disk_bytes[i] = group->disks[i].info.bytes;
    int status = name_files(group, found);
    return status == VREP_OK ? find_out(group, found) : status;
}

int vrep_recover(struct vrep_group *group)
{
    struct vrep_finding found;
    int status = vrep_recover_find(group, &found);
    bool intent_whole = false, jump = false;
    if (status == VREP_OK) {
        settle_sizes(group, &found);
        status = open_intent(group, &found, &intent_whole);
    }
    if (status == VREP_OK)
        status = settle_map(group, &found, intent_whole, &jump);
    if (status == VREP_OK && found.resized)
        status = vrep_resize_map(group, &found);
    if (status == VREP_OK && found.resized && found.how == VREP_OPENED_UNEXPLAINED)
        vrep_map_mark_all_unshipped(group->map); /* new blocks too */
    if (status == VREP_OK)
        status = vrep_checkpoint_open(found.checkpoint, group->map, &group->checkpoint);
    if (status == VREP_OK)
        status = vrep_state_open(found.state, &group->state_file);
    if (status != VREP_OK)
        return status;

    struct vrep_map_header *header = vrep_map_header(group->map);
    if (found.shared) {
        vrep_recover_settle_gap(group);
        settle_acknowledged(group);
        jump = jump || begun_anew(group);
        /* What memory says is newer than what the state file was told, for better and for worse. */
        if (found.how != VREP_OPENED_UNEXPLAINED)
            found.reason = header->unverified;
        if ((!intent_whole || found.intent_was || found.bypassed) &&
            found.how != VREP_OPENED_UNEXPLAINED && sync_backing(group) != VREP_OK) {
            found.how = VREP_OPENED_UNEXPLAINED;
            found.reason = VREP_UNVERIFIED_FLUSH;
            vrep_map_mark_all_unshipped(group->map);
        }
    }
    header->unverified = found.reason;
    group->flush_failed = found.reason == VREP_UNVERIFIED_FLUSH;
    group->distrust = group->flush_failed ? 1 : 0;
    if (group->flush_failed)
        hot_to_unshipped(group);
    bool gap = jump || found.how == VREP_OPENED_NEW || found.how == VREP_OPENED_UNEXPLAINED;
    /* A reason ends with a gap, so it never stands without one; nor does a mirror begin without. */
    if (gap || found.reason != 0 || group->mirror.on)
        vrep_map_set_gap(group->map);
    if (found.how == VREP_OPENED_NEW || found.how == VREP_OPENED_UNEXPLAINED)
        group->state.durable_seq = 0; /* all is unshipped: nothing relies on the target */
    group->durable = vrep_ring_durable(group->ring);
    vrep_map_acknowledge(group->map, group->state.durable_seq);
    /* Before the state says open, what a power loss would need is on disk. */
    if (!found.shared || found.how == VREP_OPENED_UNEXPLAINED || !intent_whole || found.bypassed ||
        found.resized)
        status = vrep_checkpoint_write(group->checkpoint, vrep_ring_head(group->ring), false);
    vrep_fault("resize.after_checkpoint");
    if (status == VREP_OK && found.intent_was)
        status = vrep_resize_intent(group, &found);
    for (uint32_t i = 0; i < group->disks_count; i++)
        group->disks[i].told_bytes =
            found.resized ? found.was_bytes[i] : group->disks[i].info.bytes;
    if (status == VREP_OK)
        status = store_state(group, &found);
    if (status != VREP_OK)
        return status;
    vrep_fault("recover.after_state");

    if (found.shared)
        replay(group);
    if (gap)
        status = vrep_gap_restart(group, jump);
    else if (vrep_map_gap(group->map))
        vrep_gap_enter(group);
    /* A ring full of what no target took, and all of the disk is sent again: let go of it. */
    if (status == VREP_E_FULL && found.how == VREP_OPENED_UNEXPLAINED)
        status = vrep_gap_give_up_ring(group);
    if (status == VREP_OK && vrep_map_header(group->map)->gap_open == 0 && !vrep_gap_reserve(group))
        status = VREP_E_FULL;
    /* What an earlier run owed to the gap that is open; and a target may know of other sizes. */
    if (vrep_map_gap(group->map))
        vrep_resize_all_due(group);
    if (status == VREP_OK && found.resized)
        status = vrep_resize_record(group, &found);
    group->opened_as = (uint32_t)found.how;
    group->count.gaps = 0;
    if (found.reason != 0)
        VREP_WARN("filter",
                  "the disks are unverified (reason %u): everything is compared or sent again",
                  found.reason);
    return status;
}
