/* Past: a VM wrote the disks without the filter, which was not there to see it.
 *
 * While the filter holds an image's locks nobody can.  Otherwise it finds out in two ways, besides
 * the stamps of a clean close: it finds the image locked by another when it wants to open it (then
 * it stores at once that the next open may believe nothing, whoever has ended until then); or an
 * unclean end lies in another boot of the host, and an image was written in this one, before any
 * filter was there: by the times of a file, by the kernel's count of what a block device was given.
 */
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/shared.h"
#include "filter/internal.h"

bool vrep_past_since_boot(const struct vrep_group *group)
{
    static const uint8_t unknown[16];
    uint8_t boot[16];
    const uint8_t *before = group->state.boot_id;
    if (vrep_group_stepped(group) || memcmp(before, unknown, sizeof unknown) == 0 ||
        (vrep_boot_id(boot) == VREP_OK && memcmp(before, boot, sizeof boot) == 0))
        return false;
    struct timespec up;
    clock_gettime(CLOCK_BOOTTIME, &up);
    uint64_t booted = vrep_clock_ns(group, CLOCK_REALTIME) -
                      ((uint64_t)up.tv_sec * NS_PER_S + (uint64_t)up.tv_nsec);
    for (uint32_t i = 0; i < group->disks_count; i++)
        if (group->disks[i].info.block_device ? group->disks[i].info.commands > 0
                                              : group->disks[i].info.mtime_ns > booted)
            return true;
    return false;
}

int vrep_group_note_past(const uint8_t group_id[16], const char *shm_dir, const char *state_dir)
{
    char path[PATH_MAX];
    if (shm_dir != NULL) { /* a filter that is about to end is no stranger */
        struct vrep_ring *ring;
        if (snprintf(path, sizeof path, "%s/ring", shm_dir) >= (int)sizeof path)
            return VREP_E_RANGE;
        int status = vrep_ring_attach(path, group_id, &ring);
        if (status == VREP_E_BUSY)
            return VREP_E_LOCKED;
        if (status == VREP_OK)
            vrep_ring_detach(ring, false);
    }
    struct vrep_state state;
    struct vrep_state_file file;
    if (snprintf(path, sizeof path, "%s/state", state_dir) >= (int)sizeof path)
        return VREP_E_RANGE;
    int status = vrep_state_load(path, group_id, &state);
    if (status == VREP_E_NOT_FOUND || status == VREP_E_CORRUPT)
        return VREP_OK; /* nothing is believed then anyway */
    if (status != VREP_OK || (state.flags & VREP_STATE_PAST) != 0)
        return status;
    status = vrep_state_open(path, &file);
    if (status != VREP_OK)
        return status;
    state.flags |= VREP_STATE_PAST;
    status = vrep_state_write(&file, &state);
    vrep_state_close(&file);
    return status;
}
