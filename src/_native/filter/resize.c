/* Resize: a disk of a group gets another size, as a record in the order of its writes.
 *
 * It happens when the group is opened, and nowhere else: who wants another size ends the group
 * (nothing is in flight then), and opens it with the plan "it was so large, and is to be so large".
 * So a crash at any step is a crash between two opens, and the next one goes on: the durable state
 * names the old size until the record is committed, or a gap stands for it.
 *
 *   1. the file gets its size, durably; a device has got it from its maker
 *   2. the change map gets it: a new file, by one rename
 *   3. what the last write-intent stands for is made stable, and a checkpoint of the new size is
 *      written; then a new write-intent begins, empty
 *   4. new space: where it provably reads zero it is recorded as zeroes, before the size, so that
 * no recovery point shows what an earlier size had there; else it is unshipped, in a gap
 *   5. the RESIZE record; a checkpoint that has the marks of the new space; then the state
 *
 * A gap that broke the order may stand for a lost RESIZE: the sizes of all disks are published
 * again before it ends, and so they are before any gap ends over which the group was opened (the
 * first as well: its target may have held the group before). */
#include "base/log.h"
#include "filter/fault.h"
#include "filter/internal.h"

#define PROBE_BYTES_MAX (1u << 20) /* that are read to prove that new space is zero */

bool vrep_resize_find(struct vrep_group *group, struct vrep_finding *found)
{
    bool any = false;
    if (group->state.disks != group->disks_count)
        return false;
    for (uint32_t i = 0; i < group->disks_count; i++) {
        const struct vrep_group_disk *plan = &group->config.disks[i];
        uint64_t was = group->state.disk[i].bytes, now = group->disks[i].info.bytes;
        bool planned = plan->was != 0 && plan->was == was && plan->bytes != was &&
                       (now == was || now == plan->bytes);
        if (!planned && now != was)
            return false;
        found->was_bytes[i] = was;
        if (planned)
            any = true;
    }
    for (uint32_t i = 0; any && i < group->disks_count; i++)
        if (group->config.disks[i].was == found->was_bytes[i])
            found->disk_bytes[i] = group->config.disks[i].bytes;
    return any;
}

void vrep_resize_backing(struct vrep_group *group, struct vrep_finding *found)
{
    found->resized = false;
    for (uint32_t i = 0; i < group->disks_count; i++) {
        struct disk *disk = &group->disks[i];
        if (disk->info.bytes != found->disk_bytes[i]) {
            int status = vrep_fault("resize.backing");
            if (status == VREP_OK)
                status = vrep_disk_resize(disk->disk, found->disk_bytes[i]);
            if (status != VREP_OK) /* it is served as it is, and its size says so */
                VREP_ERROR("filter", "disk %s cannot get its new size: %s", disk->name,
                           vrep_status_text(status));
            (void)vrep_disk_refresh(disk->disk);
            (void)vrep_disk_info(disk->disk, &disk->info);
            found->disk_bytes[i] = disk->info.bytes;
        }
        if (found->disk_bytes[i] != found->was_bytes[i])
            found->resized = true;
    }
    vrep_fault("resize.after_backing");
}

int vrep_resize_map(struct vrep_group *group, const struct vrep_finding *found)
{
    const struct vrep_map_header *header = vrep_map_header(group->map);
    bool same = true;
    for (uint32_t i = 0; i < group->disks_count; i++)
        same = same && header->disk[i].bytes == found->disk_bytes[i];
    if (same)
        return VREP_OK;
    struct vrep_map *old = group->map;
    group->map = NULL;
    int status = vrep_map_resize(old, found->map, found->disk_bytes, &group->map);
    vrep_fault("resize.after_map");
    return status;
}

int vrep_resize_intent(struct vrep_group *group, const struct vrep_finding *found)
{
    vrep_intent_close(group->intent);
    group->intent = NULL;
    int status = vrep_intent_create(found->intent, group->config.group_id, found->disk_bytes,
                                    group->disks_count, &group->intent);
    vrep_fault("resize.after_intent");
    return status;
}

/* ---- records --------------------------------------------------------------------- */

static struct vrep_ring_slot *reserve(struct vrep_group *group)
{
    if (vrep_ring_head(group->ring) + group->commands_count + SLOTS_OWN >= group->seq_limit)
        return NULL;
    return vrep_ring_reserve(group->ring, 0);
}

static void put(struct vrep_group *group, struct vrep_ring_slot *slot, uint8_t kind, uint32_t disk,
                uint64_t offset, uint64_t length, uint8_t generation)
{
    slot->kind = kind;
    slot->generation = generation;
    slot->disk = (uint16_t)disk;
    slot->offset = offset;
    slot->length = (uint32_t)length;
    slot->flags = 0;
    (void)vrep_tap_publish(group, slot);
}

/* Marked as a write of zeroes is: what is lost on the way becomes unshipped. */
static bool record_zeroes(struct vrep_group *group, uint32_t disk, uint64_t from, uint64_t to)
{
    uint64_t most = UINT32_MAX - UINT32_MAX % vrep_map_header(group->map)->bit_bytes;
    while (from < to) {
        uint64_t length = to - from < most ? to - from : most;
        struct vrep_ring_slot *slot = vrep_ring_half_full(group->ring) ? NULL : reserve(group);
        if (slot == NULL)
            return false;
        uint8_t generation = vrep_map_mark(group->map, (uint16_t)disk, from, length);
        put(group, slot, VREP_KIND_ZEROES, disk, from, length, generation);
        vrep_map_done(group->map, generation);
        vrep_fault("resize.after_zeroes");
        from += length;
    }
    return true;
}

static void new_space(struct vrep_group *group, uint32_t disk, uint64_t from, uint64_t to)
{
    if (!vrep_map_gap(group->map) &&
        vrep_recover_reads_zero(group, (uint16_t)disk, from, to, PROBE_BYTES_MAX) &&
        record_zeroes(group, disk, from, to))
        return;
    vrep_map_mark_unshipped(group->map, (uint16_t)disk, from, to - from);
    vrep_gap_enter(group);
}

bool vrep_resize_publish(struct vrep_group *group)
{
    for (uint32_t i = 0; i < group->disks_count; i++) {
        if ((group->sizes_due >> i & 1) == 0)
            continue;
        struct vrep_ring_slot *slot = reserve(group);
        if (slot == NULL)
            return false;
        put(group, slot, VREP_KIND_RESIZE, i, group->disks[i].info.bytes, 0, NO_GENERATION);
        group->sizes_due &= ~(UINT64_C(1) << i);
        vrep_fault("resize.after_record");
    }
    return true;
}

void vrep_resize_all_due(struct vrep_group *group)
{
    group->sizes_due = UINT64_MAX >> (64 - group->disks_count);
}

int vrep_resize_record(struct vrep_group *group, const struct vrep_finding *found)
{
    for (uint32_t i = 0; i < group->disks_count; i++) {
        uint64_t was = found->was_bytes[i], now = found->disk_bytes[i];
        if (was == now)
            continue;
        VREP_INFO("filter", "disk %s: %llu bytes, not %llu any more", group->disks[i].name,
                  (unsigned long long)now, (unsigned long long)was);
        if (now > was)
            new_space(group, i, was, now);
        group->sizes_due |= UINT64_C(1) << i;
    }
    if (!vrep_resize_publish(group))
        vrep_gap_enter(group); /* before it ends they are */
    /* No write-intent stands for the marks of new space: they are durable before its size is. */
    int status = vrep_checkpoint_write(group->checkpoint, vrep_ring_head(group->ring), false);
    for (uint32_t i = 0; i < group->disks_count; i++)
        group->disks[i].told_bytes = group->disks[i].info.bytes;
    vrep_state_stamp(group);
    if (vrep_map_gap(group->map))
        group->state.flags |= VREP_STATE_GAP;
    if (status == VREP_OK)
        status = vrep_state_write(&group->state_file, &group->state);
    vrep_fault("resize.after_state");
    return status;
}
