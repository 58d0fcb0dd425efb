/* Hand-over: the images of a group pass from a running VM to the filter, and
 * back, and at no instant may a write go where nobody records it.
 *
 * In.  The VM switches in one step: it ends its writes to the image, lets go of
 * its locks, and sends what follows to the group's socket.  The filter cannot
 * see the step, but it sees the locks: it starts the first command only when
 * nobody holds any that ours exclude.  What was written before stands in blocks
 * that are all unshipped, and none of them is copied before that instant.
 *
 * Out.  A VM takes its locks while it switches back, so ours must be gone
 * before; from then on the disks may be written past the filter, which the
 * durable state says first.  That they are shows by the locks again, so that
 * the history says by itself where it ends. */
#include "base/log.h"
#include "filter/internal.h"

#define WAIT_MS 5   /* how soon a change of the locks is seen */
#define URGENT_MS 1 /* a command does */

/* True when no other process holds what the locks of ours exclude, on any disk. */
static bool all_free(struct vrep_group *group)
{
    for (uint32_t i = 0; i < group->disks_count; i++)
        if (vrep_disk_lock(group->disks[i].disk) != VREP_OK)
            return false;
    return true;
}

static void end(struct vrep_group *group)
{
    group->handover = VREP_HANDOVER_NONE;
    group->state.flags &= ~VREP_STATE_PAST;
    vrep_maintain_state(group); /* until it is stored a crash costs a compare, no more */
    group->freed = group->freed || group->wanted;
}

bool vrep_handover_over(struct vrep_group *group)
{
    if (group->handover != VREP_HANDOVER_IN)
        return true;
    if (!all_free(group))
        return false;
    end(group);
    VREP_INFO("filter", "the VM let go of its disks: the group serves them");
    return true;
}

static void let_go(struct vrep_group *group)
{
    for (uint32_t i = 0; i < group->disks_count; i++) {
        int status = vrep_disk_unlock(group->disks[i].disk);
        if (status != VREP_OK) /* then the VM is refused, and the group takes the rest back */
            VREP_ERROR("filter", "disk %s cannot be unlocked: %s", group->disks[i].name,
                       vrep_status_text(status));
    }
    group->handover = VREP_HANDOVER_OUT;
}

int vrep_handover_distrust(struct vrep_group *group)
{
    vrep_map_header(group->map)->unverified = VREP_UNVERIFIED_PAST;
    group->state.unverified = VREP_UNVERIFIED_PAST;
    group->state.flags |= VREP_STATE_UNVERIFIED;
    return vrep_group_resync(group, group->resync_allowed, group->resync_rate, true);
}

/* Another writes a disk from here on: what was recorded stays a history, what follows is a gap. */
static int past(struct vrep_group *group)
{
    if (group->handover == VREP_HANDOVER_PAST)
        return VREP_OK;
    group->handover = VREP_HANDOVER_PAST;
    VREP_INFO("filter", "a VM writes the disks past the filter");
    return vrep_handover_distrust(group);
}

void vrep_handover_poll(struct vrep_group *group)
{
    vrep_rest_poll(group);
    if (group->handover == VREP_HANDOVER_IN)
        (void)vrep_handover_over(group);
    /* state_written is what the last job stored, and no job is behind it. */
    if (group->handover == VREP_HANDOVER_LETTING && !group->state_job.busy && !group->state_again &&
        (group->state_written.flags & VREP_STATE_PAST) != 0 && group->copies_inflight == 0)
        let_go(group);
    if (group->handover == VREP_HANDOVER_OUT)
        for (uint32_t i = 0; i < group->disks_count; i++)
            if (vrep_disk_locked(group->disks[i].disk))
                (void)past(group);
}

int vrep_handover_timeout_ms(const struct vrep_group *group)
{
    switch (group->handover) {
    case VREP_HANDOVER_IN:
        return group->wanted ? URGENT_MS : WAIT_MS;
    case VREP_HANDOVER_LETTING:
    case VREP_HANDOVER_OUT:
        return WAIT_MS;
    default:
        return vrep_rest_timeout_ms(group);
    }
}

int vrep_group_let_go(struct vrep_group *group)
{
    if (!group->tap || group->mirror.on)
        return VREP_E_UNSUPPORTED;
    if (group->handover != VREP_HANDOVER_NONE)
        return VREP_E_BUSY;
    group->handover = VREP_HANDOVER_LETTING;
    group->state.flags |= VREP_STATE_PAST;
    vrep_maintain_state(group);
    return VREP_OK;
}

int vrep_group_take_back(struct vrep_group *group)
{
    if (group->handover == VREP_HANDOVER_NONE || group->handover == VREP_HANDOVER_IN ||
        group->mirror.on)
        return VREP_E_INVALID;
    if (all_free(group)) {
        end(group);
        return VREP_OK;
    }
    if (group->handover != VREP_HANDOVER_LETTING) {
        int status = past(group);
        if (status != VREP_OK)
            return status;
    }
    return VREP_E_LOCKED;
}
