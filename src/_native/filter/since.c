/* Since: what of a view may differ from a base point; marks are set here and by the view filter. */
#include "track/since.h"

#include <stdio.h>
#include <string.h>

#include "filter/internal.h"

/* Of a view that was served before nobody knows which of its blocks were written and which were
 * only fetched: all that are present count. */
static void mark_present(struct disk *disk)
{
    uint64_t bytes = disk->info.bytes, at = 0;

    while (at < bytes) {
        uint64_t absent = bytes, length = 0;

        if (disk->overlay)
            (void)vrep_overlay_absent(disk->disk, at, bytes - at, &absent, &length);
        if (absent > at)
            vrep_since_mark(disk->since, at, absent - at);
        at = absent + length;
    }
}

int vrep_group_since_begin(struct vrep_group *group, const char *name)
{
    if (group->since_name[0] != '\0')
        return VREP_E_EXISTS;
    if (group->tap || name[0] == '\0' || strlen(name) >= sizeof group->since_name)
        return VREP_E_INVALID;
    for (uint32_t i = 0; i < group->disks_count; i++) {
        struct disk *disk = &group->disks[i];
        int status =
            disk->since != NULL ? VREP_OK : vrep_since_create(disk->info.bytes, &disk->since);
        if (status != VREP_OK)
            return status;
        mark_present(disk);
    }
    snprintf(group->since_name, sizeof group->since_name, "%s", name);
    return VREP_OK;
}

int vrep_group_since_mark(struct vrep_group *group, uint32_t disk,
                          const struct vrep_since_range *ranges, size_t count)
{
    if (disk >= group->disks_count || group->disks[disk].since == NULL)
        return VREP_E_INVALID;
    for (size_t i = 0; i < count; i++)
        vrep_since_mark(group->disks[disk].since, ranges[i].offset, ranges[i].length);
    return VREP_OK;
}

const char *vrep_group_since_name(const struct vrep_group *group)
{
    return group->since_name[0] != '\0' ? group->since_name : NULL;
}

const struct vrep_since *vrep_group_since(const struct vrep_group *group, uint32_t disk)
{
    return group->disks[disk].since;
}
