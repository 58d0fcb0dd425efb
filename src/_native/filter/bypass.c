/* Bypass: a pass-through that stands in for a filter that cannot start, so that its guest runs: the
 * same disks and front-ends, no ring, nothing recorded.
 *
 * The disks' locks are taken before this is asked, so no I/O of the dead process is left.  Then,
 * and before the first client, the durable state says that a pass-through serves.  With the shared
 * memory whole, the in-flight table and each write are marked unshipped in its map, under the gap
 * flag, and the next filter resyncs those; without it the state says `blind`, and the next filter
 * takes every block for unshipped.  If the state cannot be changed, the group does not open.
 *
 * Write-intent and checkpoints stand still meanwhile: a power loss makes everything unshipped, and
 * the next filter syncs the backing before it relies on the map again. */
#include "base/log.h"
#include "filter/fault.h"
#include "filter/internal.h"

static int store(struct vrep_group *group, const struct vrep_finding *found)
{
    int status = VREP_OK;
    if (group->state_file.fd < 0)
        status = vrep_state_open(found->state, &group->state_file);
    return status == VREP_OK ? vrep_state_write(&group->state_file, &group->state) : status;
}

/* What was on its way may have reached the disk or not.  The slots stay: the next filter publishes
 * what is there then. */
static void inflight_to_unshipped(struct vrep_group *group)
{
    for (uint32_t i = 0; i < vrep_ring_slots(group->ring); i++) {
        const struct vrep_ring_slot *slot = vrep_ring_slot_at(group->ring, i);
        if (slot->state != VREP_SLOT_FREE && vrep_recover_slot_sane(group, slot))
            vrep_map_mark_unshipped(group->map, slot->disk, slot->offset, slot->length);
    }
}

int vrep_bypass_begin(struct vrep_group *group)
{
    struct vrep_finding found;
    int status = vrep_recover_find(group, &found);
    if (status != VREP_OK)
        return status;
    /* The map of a disk that has another size by now has no bits for all of it. */
    bool marks = found.shared && !found.resized &&
                 (found.how == VREP_OPENED_CLEAN || found.how == VREP_OPENED_KILLED);
    if (marks) {
        vrep_recover_settle_gap(group);
        vrep_map_set_gap(group->map);
        inflight_to_unshipped(group);
    } else if (found.shared) {
        vrep_recover_detach(group, &found);
    }
    vrep_fault("bypass.before_state");
    /* Without a state, or with a damaged one, the next filter takes everything for unshipped. */
    if (found.known) {
        group->state.flags |= VREP_STATE_OPEN | VREP_STATE_BYPASS;
        if (!marks)
            group->state.flags |= VREP_STATE_BLIND;
        status = store(group, &found);
    }
    if (status != VREP_OK)
        return status;
    vrep_fault("bypass.after_state");
    uint32_t reason = marks ? vrep_map_header(group->map)->unverified : found.reason;
    group->flush_failed = reason == VREP_UNVERIFIED_FLUSH;
    group->opened_as = (uint32_t)(marks ? found.how : VREP_OPENED_UNEXPLAINED);
    VREP_WARN("filter", "a pass-through serves the disks: nothing is replicated, %s",
              marks ? "what it writes is marked" : "every block is copied again later");
    return VREP_OK;
}

void vrep_bypass_flush_failed(struct vrep_group *group)
{
    if (group->map != NULL)
        vrep_map_header(group->map)->unverified = VREP_UNVERIFIED_FLUSH;
    if (group->state_file.fd < 0 || (group->state.unverified == VREP_UNVERIFIED_FLUSH &&
                                     (group->state.flags & VREP_STATE_BLIND) != 0))
        return;
    group->state.unverified = VREP_UNVERIFIED_FLUSH;
    group->state.flags |= VREP_STATE_UNVERIFIED | VREP_STATE_BLIND;
    int status = vrep_state_write(&group->state_file, &group->state);
    if (status != VREP_OK)
        VREP_ERROR("filter", "the failed flush could not be noted: %s", vrep_status_text(status));
}
