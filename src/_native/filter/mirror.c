/* Mirror: a VM that goes on writing its own disks sends a copy of each write, and the filter
 * records it.  The disks are opened to be read only, without locks: nothing here can hurt the VM.
 *
 * What the VM's side promises (QEMU's mirror job, copy-mode write-blocking): a write reaches the
 * image, then its copy is sent, then the guest is told; overlapping writes go one after another
 * through all three; and a disk's connection closes before the first write of which no copy is
 * sent. From this follow the rules:
 *
 * 1. A copy that arrives is marked, published and answered, and written nowhere.
 * 2. Nothing is published as whole after a connection closed: they are looked at after a record's
 *    bytes were received and before it gets its place.  A write on another disk that the guest gave
 *    after one whose copy is missing was sent after the close, so the gap begins before it.
 * 3. A sync copy reads the image under its range.  It may see a write, or a part of one, whose copy
 *    has not arrived; that one comes later in the order, for its range is held.  So a gap ends only
 *    behind a barrier: the VM drained its writes after the last sync copy had ended (`copies` names
 *    that moment), and what each of them saw is published whole.
 * 4. While writes may be missing (the gap is open, nothing is copied, no gap ends) only who knows
 *    which ones can end that: the VM's own bitmap of what was written, or else every block.
 * 5. A VM that is off writes nothing.  Then the images are compared as they are, each block of
 *    them (rest.c).  The barrier is then a look at them that began after the last copy had ended,
 *    and found them as before the first: nobody had one open, and none was written in between. */
#include <errno.h>
#include <poll.h>

#include "base/log.h"
#include "filter/internal.h"

static bool hung(const struct pollfd *look)
{
    return (look->revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

/* False when a connection is gone; what cannot be looked at counts as gone. */
static bool all_there(struct vrep_group *group)
{
    int count;
    do
        count = poll(group->mirror.clients, group->mirror.clients_count, 0);
    while (count < 0 && errno == EINTR);
    for (uint32_t i = 0; count > 0 && i < group->mirror.clients_count; i++)
        if (hung(&group->mirror.clients[i]))
            return false;
    return count >= 0;
}

bool vrep_mirror_read_elsewhere(struct vrep_group *group)
{
    bool remote = false;
    for (uint32_t i = 0; i < group->disks_count; i++)
        if (vrep_disk_is_remote(group->disks[i].disk)) {
            vrep_remote_forget(group->disks[i].disk);
            remote = true;
        }
    return remote;
}

void vrep_mirror_lost(struct vrep_group *group)
{
    bool rested = group->mirror.rests;
    group->handover = VREP_HANDOVER_MIRROR;
    group->mirror.losses++;
    group->mirror.rests = false;
    vrep_gap_enter(group);
    /* A VM that was there without locks may not have stored what an image's file is read by. */
    if (vrep_mirror_read_elsewhere(group) && rested)
        (void)vrep_handover_distrust(group);
    VREP_WARN("filter", "a VM's mirror is interrupted: what it writes meanwhile is not recorded");
}

bool vrep_mirror_whole(struct vrep_group *group)
{
    if (group->handover == VREP_HANDOVER_NONE &&
        (group->mirror.rests ? group->mirror.clients_count > 0 : !all_there(group)))
        vrep_mirror_lost(group);
    return group->handover == VREP_HANDOVER_NONE;
}

bool vrep_mirror_settled(const struct vrep_group *group)
{
    return !group->mirror.on || group->mirror.barrier == group->mirror.copies;
}

uint64_t vrep_mirror_copied(const struct vrep_group *group)
{
    uint64_t last = group->mirror.copies;
    for (uint32_t i = 0; i < COPIES; i++)
        if (group->copies[i].in_use && group->copies[i].number <= last)
            last = group->copies[i].number - 1;
    return last;
}

bool vrep_group_is_mirror(const struct vrep_group *group)
{
    return group->mirror.on;
}

int vrep_group_mirror_join(struct vrep_group *group, uint32_t disk, int fd)
{
    if (!group->mirror.on)
        return VREP_OK;
    if (group->mirror.clients_count == MIRROR_CLIENTS)
        return VREP_E_FULL;
    if (group->mirror.rests) /* its VM runs, and has perhaps written before it sends */
        vrep_mirror_lost(group);
    group->mirror.joins++;
    uint32_t at = group->mirror.clients_count++;
    group->mirror.clients[at] = (struct pollfd){.fd = fd, .events = POLLRDHUP};
    group->mirror.disk_of[at] = (uint16_t)disk;
    return VREP_OK;
}

void vrep_group_mirror_leave(struct vrep_group *group, int fd)
{
    for (uint32_t i = 0; i < group->mirror.clients_count; i++) {
        if (group->mirror.clients[i].fd != fd)
            continue;
        uint32_t last = --group->mirror.clients_count;
        group->mirror.clients[i] = group->mirror.clients[last];
        group->mirror.disk_of[i] = group->mirror.disk_of[last];
        if (group->handover == VREP_HANDOVER_NONE && !group->closing)
            vrep_mirror_lost(group);
        return;
    }
}

int vrep_group_mirror_live(struct vrep_group *group)
{
    if (!group->mirror.on)
        return VREP_E_INVALID;
    if (group->handover == VREP_HANDOVER_NONE)
        return VREP_E_BUSY;
    for (uint32_t disk = 0; disk < group->disks_count; disk++) {
        bool sent = false;
        for (uint32_t i = 0; i < group->mirror.clients_count; i++)
            sent = sent || group->mirror.disk_of[i] == disk;
        if (!sent)
            return VREP_E_GONE;
    }
    if (!all_there(group))
        return VREP_E_GONE;
    (void)vrep_mirror_read_elsewhere(group);
    group->handover = VREP_HANDOVER_NONE;
    group->resync_again = true;
    VREP_INFO("filter", "a VM mirrors its writes");
    return VREP_OK;
}

int vrep_group_mirror_mark(struct vrep_group *group, uint32_t disk,
                           const struct vrep_since_range *ranges, size_t count)
{
    if (!group->mirror.on || disk >= group->disks_count)
        return VREP_E_INVALID;
    uint64_t bytes = group->disks[disk].info.bytes;
    for (size_t i = 0; i < count; i++)
        if (ranges[i].offset > bytes || ranges[i].length > bytes - ranges[i].offset)
            return VREP_E_RANGE;
    for (size_t i = 0; i < count; i++)
        if (ranges[i].length > 0)
            vrep_sync_mark(group, (uint16_t)disk, ranges[i].offset, ranges[i].length);
    vrep_gap_enter(group);
    group->dirtied++;
    return VREP_OK;
}

int vrep_group_mirror_distrust(struct vrep_group *group)
{
    if (!group->mirror.on)
        return VREP_E_INVALID;
    if (group->handover == VREP_HANDOVER_NONE)
        vrep_mirror_lost(group);
    return vrep_handover_distrust(group);
}

int vrep_group_mirror_barrier(struct vrep_group *group, uint64_t copies)
{
    if (!group->mirror.on || copies > group->mirror.copies)
        return VREP_E_INVALID;
    if (group->mirror.rests) /* nobody drains anything */
        return VREP_E_BUSY;
    if (!vrep_mirror_whole(group))
        return VREP_E_GONE;
    group->mirror.barrier = copies;
    group->resync_again = true;
    return VREP_OK;
}
