/* A virtqueue that is full: its chains are done in turns of 64, without another kick, and what is
 * done is shown 16 at a time, while the rest is done. */
#include "vhost_rig.h"

#define CHAINS 80u
#define QUEUE 256u

static uint64_t interrupts(void)
{
    struct pollfd look = {.fd = m.queue[0].call, .events = POLLIN};
    uint64_t count;
    if (poll(&look, 1, 0) != 1)
        return 0;
    CHECK_EQ(read(m.queue[0].call, &count, sizeof count), 8);
    return count;
}

/* So often, and not once more; the last one comes behind the index. */
static void interrupted(uint64_t times)
{
    uint64_t found = 0;
    for (int i = 0; found < times; i++) {
        CHECK(i < WAIT_MS);
        usleep(1000);
        found += interrupts();
    }
    usleep(20000);
    CHECK_EQ(found + interrupts(), times);
}

static void offer(uint32_t chains, uint32_t type, uint32_t bytes)
{
    for (uint16_t slot = 0; slot < chains; slot++) {
        (void)guest_request(&m, 0, slot, type, 8u * slot, bytes);
        guest_offer(&m, 0, (uint16_t)(3 * slot));
    }
}

static void take(uint32_t chains)
{
    for (uint16_t slot = 0; slot < chains; slot++) {
        CHECK_EQ(guest_take(&m, 0, NULL), 3 * slot);
        CHECK_EQ(guest_status(&m, slot), VREP_VIRTIO_OK);
    }
}

static void start(void)
{
    begin();
    monitor_connect(&m, path);
    monitor_greet(&m, MONITOR_FEATURES);
    monitor_give_memory(&m);
    monitor_start(&m, 0, QUEUE, 0);
    /* Nobody looks at the queue behind this until it is kicked. */
    vrep_store_release_u32(&group->timeless, 1);
    (void)guest_request(&m, 0, 0, VREP_VIRTIO_FLUSH, 0, 0);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_OK);
    interrupted(1); /* or it would be counted with those of the test */
}

static void a_full_queue_takes_several_turns_and_one_kick(void)
{
    start();
    uint32_t turns = vrep_load_acquire_u32(&group->turns);
    offer(CHAINS, VREP_VIRTIO_FLUSH, 0);
    guest_kick(&m, 0);
    take(CHAINS);
    for (int i = 0; vrep_load_acquire_u32(&group->turns) - turns < 2; i++) {
        CHECK(i < WAIT_MS);
        usleep(1000);
    }
    CHECK_EQ(stats().traffic.requests, CHAINS + 1);
    end();
}

static void what_is_done_is_shown_while_the_rest_is_done(void)
{
    start();
    offer(CHAINS, VREP_VIRTIO_IN, 4096);
    guest_kick(&m, 0);
    take(CHAINS);
    interrupted(CHAINS / 16);
    end();
}

static void a_few_are_shown_together(void)
{
    start();
    offer(15, VREP_VIRTIO_IN, 4096);
    guest_kick(&m, 0);
    take(15);
    interrupted(1);
    end();
}

int main(void)
{
    RUN(a_full_queue_takes_several_turns_and_one_kick);
    RUN(what_is_done_is_shown_while_the_rest_is_done);
    RUN(a_few_are_shown_together);
    return check_report();
}
