/* Step: a group without threads, whose driver runs each disk request and each job by itself. */
#include <stddef.h>

#include "filter/internal.h"

/* Jobs come first, then requests from the oldest. */
static struct vrep_worker *worker_of(const struct vrep_group *group, uint32_t *index,
                                     enum vrep_step_kind *kind)
{
    struct vrep_worker *workers[] = {group->quick, group->slow, group->prober};
    for (uint32_t i = 0; i < 3; i++)
        if (vrep_worker_waiting(workers[i]) != NULL && (*index)-- == 0) {
            *kind = (enum vrep_step_kind)(VREP_STEP_QUICK + i);
            return workers[i];
        }
    return NULL;
}

bool vrep_group_waiting(const struct vrep_group *group, uint32_t index, struct vrep_group_step *out)
{
    enum vrep_step_kind kind;
    if (worker_of(group, &index, &kind) != NULL) {
        *out = (struct vrep_group_step){.kind = (uint8_t)kind};
        return true;
    }
    const struct vrep_io *io = vrep_engine_waiting(group->engine, index);
    if (io == NULL)
        return false;
    *out = (struct vrep_group_step){
        .kind = VREP_STEP_DISK,
        .op = io->op,
        .flags = io->flags,
        .offset = io->offset,
        .length = io->length,
    };
    while (out->disk < group->disks_count && group->disks[out->disk].disk != io->disk)
        out->disk++;
    return true;
}

void vrep_group_step(struct vrep_group *group, uint32_t index)
{
    enum vrep_step_kind kind;
    struct vrep_worker *worker = worker_of(group, &index, &kind);
    if (worker != NULL)
        vrep_worker_step(worker);
    else
        vrep_engine_step(group->engine, index);
}

void vrep_group_step_failing(struct vrep_group *group, uint32_t index, int os_error)
{
    enum vrep_step_kind kind;
    struct vrep_worker *worker = worker_of(group, &index, &kind);
    if (worker != NULL)
        vrep_worker_step(worker);
    else
        vrep_engine_step_failing(group->engine, index, os_error);
}

void vrep_group_step_all(struct vrep_group *group)
{
    struct vrep_group_step step;
    while (vrep_group_waiting(group, 0, &step))
        vrep_group_step(group, 0);
}

void vrep_group_set_time(struct vrep_group *group, uint64_t mono_ns, uint64_t wall_ns)
{
    group->config.mono_ns = mono_ns;
    group->config.wall_ns = wall_ns;
}
