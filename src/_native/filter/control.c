/* Control: what other threads ask of a group: status, marks, resync. */
#include <string.h>
#include <time.h>

#include "filter/internal.h"

uint32_t vrep_group_disks(const struct vrep_group *group)
{
    return group->disks_count;
}

const char *vrep_group_disk_name(const struct vrep_group *group, uint32_t disk)
{
    return disk < group->disks_count ? group->disks[disk].name : NULL;
}

struct vrep_disk *vrep_group_disk(struct vrep_group *group, uint32_t disk)
{
    return disk < group->disks_count ? group->disks[disk].disk : NULL;
}

uint64_t vrep_group_disk_bytes(const struct vrep_group *group, uint32_t disk)
{
    return disk < group->disks_count ? group->disks[disk].info.bytes : 0;
}

bool vrep_group_disk_resized(const struct vrep_group *group, uint32_t disk)
{
    if (disk >= group->disks_count)
        return false;
    const struct disk *it = &group->disks[disk];
    return it->planned_was != 0 && it->planned_was != it->info.bytes;
}

struct vrep_map *vrep_group_map(struct vrep_group *group)
{
    return group->map;
}

struct vrep_ring *vrep_group_ring(struct vrep_group *group)
{
    return group->ring;
}

/* Writes the parts of a mark's plaintext; less than one chunk, so one piece of memory. */
static void *put(void *at, const void *bytes, size_t count)
{
    if (count > 0)
        memcpy(at, bytes, count);
    return (uint8_t *)at + count;
}

int vrep_mark_put(struct vrep_group *group, const struct vrep_cut *cut,
                  const struct vrep_position *lanes, const char *label, uint16_t label_bytes,
                  uint64_t *seq)
{
    if (!group->tap)
        return VREP_E_UNSUPPORTED;
    if (label_bytes > VREP_LABEL_BYTES_MAX)
        return VREP_E_INVALID;
    if (group->mirror.on)
        (void)vrep_mirror_whole(group);
    if (vrep_map_gap(group->map))
        return VREP_E_GONE;
    if (vrep_handover_blind(group))
        return VREP_E_BUSY;
    if (vrep_ring_head(group->ring) + group->commands_count + SLOTS_OWN >= group->seq_limit)
        return VREP_E_FULL;
    struct vrep_mark mark = {.wall_ns = vrep_clock_ns(group, CLOCK_REALTIME),
                             .version = cut != NULL ? VREP_MARK_CUT_VERSION : VREP_MARK_VERSION,
                             .label_bytes = label_bytes};
    size_t lanes_bytes = cut != NULL ? cut->lanes * sizeof *lanes : 0;
    uint32_t bytes =
        (uint32_t)(sizeof mark + (cut != NULL ? sizeof *cut : 0) + lanes_bytes + label_bytes);
    struct vrep_ring_slot *slot = vrep_ring_reserve(group->ring, bytes);
    if (slot == NULL)
        return VREP_E_FULL;
    struct iovec iov[2];
    if (vrep_ring_iov(group->ring, slot, 0, bytes, iov, 2) != 1) {
        vrep_ring_cancel(group->ring, slot);
        return VREP_E_CORRUPT;
    }
    void *at = put(iov[0].iov_base, &mark, sizeof mark);
    if (cut != NULL)
        at = put(put(at, cut, sizeof *cut), lanes, lanes_bytes);
    put(at, label, label_bytes);
    slot->kind = VREP_KIND_MARK;
    slot->generation = NO_GENERATION;
    slot->disk = 0;
    slot->offset = 0;
    slot->length = bytes;
    slot->flags = 0;
    *seq = vrep_tap_publish(group, slot);
    return VREP_OK;
}

int vrep_group_object(struct vrep_group *group, uint64_t tag, const void *data, uint32_t bytes,
                      uint64_t *seq)
{
    if (!group->tap)
        return VREP_E_UNSUPPORTED;
    if (bytes <= sizeof(struct vrep_object) || bytes > VREP_OBJECT_BYTES_MAX)
        return VREP_E_INVALID;
    if (vrep_handover_blind(group))
        return VREP_E_BUSY;
    if (vrep_ring_half_full(group->ring) ||
        vrep_ring_head(group->ring) + group->commands_count + SLOTS_OWN >= group->seq_limit)
        return VREP_E_FULL;
    struct vrep_ring_slot *slot = vrep_ring_reserve(group->ring, bytes);
    if (slot == NULL)
        return VREP_E_FULL;
    /* A step at a time: its chunks may lie anywhere, and no memory is taken here. */
    struct iovec iov[COPY_BYTES_MAX / VREP_CHUNK_BYTES + 2];
    for (uint32_t at = 0; at < bytes; at += COPY_BYTES_MAX) {
        uint32_t step = bytes - at < COPY_BYTES_MAX ? bytes - at : COPY_BYTES_MAX;
        int count =
            vrep_ring_iov(group->ring, slot, at, step, iov, (int)(sizeof iov / sizeof *iov));
        if (count < 0) {
            vrep_ring_cancel(group->ring, slot);
            return VREP_E_CORRUPT;
        }
        const uint8_t *from = (const uint8_t *)data + at;
        for (int i = 0; i < count; i++) {
            memcpy(iov[i].iov_base, from, iov[i].iov_len);
            from += iov[i].iov_len;
        }
    }
    slot->kind = VREP_KIND_OBJECT;
    slot->generation = NO_GENERATION;
    slot->disk = 0;
    slot->offset = tag;
    slot->length = bytes;
    slot->flags = 0;
    *seq = vrep_tap_publish(group, slot);
    return VREP_OK;
}

int vrep_group_mark(struct vrep_group *group, const char *label, uint16_t label_bytes,
                    uint64_t *seq)
{
    return vrep_mark_put(group, NULL, NULL, label, label_bytes, seq);
}

int vrep_group_resync(struct vrep_group *group, bool allowed, uint64_t bytes_per_s, bool all)
{
    if (!group->tap)
        return VREP_E_UNSUPPORTED;
    if (all) {
        for (uint32_t i = 0; i < group->disks_count; i++)
            vrep_sync_mark(group, (uint16_t)i, 0, group->disks[i].info.bytes);
        vrep_gap_enter(group);
        group->dirtied++;
        group->state.durable_seq = 0;
        vrep_ring_forget_durable(group->ring);
        vrep_map_acknowledge(group->map, 0);
        vrep_maintain_keep(group);
        vrep_delta_forget(group);
    }
    if (!allowed)
        vrep_group_delta_end(group);
    if (all || (allowed && !group->resync_allowed))
        group->count.resync_bytes = group->count.compared_bytes = group->count.equal_bytes = 0;
    group->resync_allowed = allowed;
    group->resync_rate = bytes_per_s;
    group->resync_filled_ns = group->now_ns;
    group->resync_budget = 0;
    group->resync_again = allowed;
    return VREP_OK;
}

int vrep_group_lose_ring(struct vrep_group *group)
{
    return group->tap ? vrep_gap_lose_ring(group) : VREP_E_UNSUPPORTED;
}

static uint64_t oldest_ns(const struct vrep_group *group)
{
    uint64_t oldest = vrep_map_gap(group->map) ? group->gap_wall_ns : 0;
    uint64_t spilled = vrep_ring_spilled_ns(group->ring);
    const struct vrep_ring_desc *first = vrep_group_desc(group, group->durable + 1);
    if (first != NULL && (oldest == 0 || first->wall_ns < oldest))
        oldest = first->wall_ns;
    if (spilled != 0 && (oldest == 0 || spilled < oldest))
        oldest = spilled;
    return oldest;
}

int vrep_group_status(struct vrep_group *group, struct vrep_group_status *out)
{
    *out = group->count;
    out->inflight = group->inflight;
    out->flush_failed = group->flush_failed;
    out->opened_as = group->opened_as;
    for (uint32_t i = 0; i < group->disks_count; i++)
        out->total_bytes += group->disks[i].info.bytes;
    if (!group->tap)
        return VREP_OK;
    const struct vrep_map_header *header = vrep_map_header(group->map);
    out->head = vrep_ring_head(group->ring);
    out->released = vrep_ring_released(group->ring);
    out->durable = group->durable;
    out->received = group->received;
    out->acknowledged = group->state.durable_seq;
    out->read = group->read;
    out->ring_free_bytes = vrep_ring_free_bytes(group->ring);
    out->ring_bytes = vrep_ring_payload_bytes(group->ring);
    out->unshipped_bytes =
        vrep_map_unshipped_bits(group->map) == 0 ? 0 : vrep_map_unshipped_bytes(group->map);
    out->gap = vrep_map_gap(group->map);
    out->gap_seq = out->gap ? header->gap_seq : 0;
    out->gap_last = header->gap_last;
    out->unverified = header->unverified;
    out->replayed = group->replayed;
    out->consumers = group->consumers_count;
    out->oldest_ns = oldest_ns(group);
    out->resync_allowed = group->resync_allowed;
    out->handover = group->handover;
    out->handover_waiting = group->handover == VREP_HANDOVER_IN && group->wanted;
    out->sizes_due = (uint32_t)__builtin_popcountll(group->sizes_due);
    out->mirror = group->mirror.on;
    out->mirror_waits = group->mirror.on && !vrep_handover_blind(group) && !group->mirror.rests &&
                        vrep_map_unshipped_bits(group->map) == 0 && !vrep_mirror_settled(group);
    out->mirror_copies = group->mirror.on ? vrep_mirror_copied(group) : 0;
    out->mirror_losses = group->mirror.losses;
    out->mirror_rests = group->mirror.rests;
    out->marks_unstored = group->checkpoint_stored < group->checkpoint_wanted;
    out->mirror_looks = group->mirror.looks;
    return VREP_OK;
}

uint64_t vrep_group_dirty_bytes(const struct vrep_group *group)
{
    return group->map == NULL ? 0 : vrep_map_dirty_bytes(group->map);
}
