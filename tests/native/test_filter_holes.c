/* Holes are proven while their range is held: nothing slow may stand in front of that. */
#include <pthread.h>

#include "base/atomic.h"
#include "filter/internal.h"
#include "filter_rig.h"

static struct rig rig;
static uint32_t let_go;
static uint32_t began;

static int block(struct vrep_job *job)
{
    (void)job;
    vrep_store_release_u32(&began, 1);
    while (vrep_load_acquire_u32(&let_go) == 0)
        usleep(100);
    return VREP_OK;
}

static void blocked(struct vrep_job *job)
{
    (void)job;
}

/* A checkpoint that waits for its disk must not keep the guest from a range whose hole is being
 * proven, nor the resync from going on. */
static void a_slow_checkpoint_delays_neither_copies_nor_guests(void)
{
    rig_init(&rig); /* all of the disk is a hole */
    rig_open(&rig);
    rig_attach(&rig);
    struct vrep_job job = {.run = block, .done = blocked};
    vrep_worker_post(rig.group->slow, &job);
    while (vrep_load_acquire_u32(&began) == 0)
        usleep(100);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    for (int i = 0; i < 5000 && rig_status(&rig).resync_bytes < RIG_BYTES; i++) {
        vrep_group_poll(rig.group);
        usleep(1000);
    }
    CHECK_EQ(rig_status(&rig).resync_bytes, RIG_BYTES);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 4096, 5000, 3));
    vrep_store_release_u32(&let_go, 1);
    rig_settle(&rig);
    rig_compare(&rig);
    rig_free(&rig);
}

int main(void)
{
    RUN(a_slow_checkpoint_delays_neither_copies_nor_guests);
    return check_report();
}
