/* Blocks that become unshipped by a command, without a write: no extent is hot for them, so only a
 * checkpoint tells of them after a power loss. Until that is stored the status says so. */
#include "check.h"
#include "filter/fault.h"
#include "filter_rig.h"

static struct rig rig;

static void begin(void)
{
    rig_init(&rig);
    rig.config.checkpoint_ns = 20000000;
    rig_open(&rig);
    rig_sync(&rig);
    rig_close(&rig, true); /* no extent is hot, no bit is set */
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, 0);
    CHECK_EQ(rig_status(&rig).marks_unstored, 0);
}

static void await_stored(void)
{
    for (int i = 0; rig_status(&rig).marks_unstored; i++) {
        CHECK(i < 5000);
        usleep(2000);
        vrep_group_poll(rig.group);
    }
}

static void arm(const char *fault)
{
    if (fault != NULL)
        setenv("VREP_FAULT", fault, 1);
    else
        unsetenv("VREP_FAULT");
    vrep_fault_prepare();
}

static void mark_all(void)
{
    CHECK_OK(vrep_group_resync(rig.group, false, 0, true));
}

static void mark_one(void)
{
    struct vrep_since_range range = {3 * RIG_BIT, 4096};
    CHECK_OK(vrep_group_compare(rig.group, 0, &range, 1));
}

static void lose(void)
{
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, 70000, 3));
    CHECK_OK(vrep_group_lose_ring(rig.group));
}

static void outlast_a_power_loss(void)
{
    static void (*const commands[])(void) = {mark_all, mark_one, lose};
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        begin();
        commands[i]();
        CHECK_EQ(rig_status(&rig).marks_unstored, 1);
        uint64_t unshipped = rig_status(&rig).unshipped_bytes;
        CHECK(unshipped > 0);
        await_stored();
        rig_power_loss(&rig);
        rig_open(&rig);
        CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_POWER_LOSS);
        CHECK(rig_status(&rig).unshipped_bytes >= unshipped);
        rig_free(&rig);
    }
}

/* Another process owes what the one before it did not store. */
static void a_kill_does_not_forget_what_is_owed(void)
{
    begin();
    mark_all();
    rig_kill(&rig);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).opened_as, VREP_OPENED_KILLED);
    CHECK_EQ(rig_status(&rig).marks_unstored, 1);
    await_stored();
    rig_power_loss(&rig);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BYTES);
    rig_free(&rig);
}

static void what_could_not_be_stored_is_tried_again(void)
{
    begin();
    mark_one();
    await_stored();
    for (int i = 0; i < 50; i++) { /* nothing else asks for one any more */
        usleep(2000);
        vrep_group_poll(rig.group);
    }
    arm("checkpoint.write:1:io");
    mark_one();
    uint64_t errors = rig_status(&rig).errors;
    while (rig_status(&rig).errors == errors) {
        usleep(2000);
        vrep_group_poll(rig.group);
    }
    CHECK_EQ(rig_status(&rig).marks_unstored, 1);
    arm(NULL);
    await_stored();
    rig_power_loss(&rig);
    rig_open(&rig);
    CHECK_EQ(rig_status(&rig).unshipped_bytes, RIG_BIT);
    rig_free(&rig);
}

int main(void)
{
    RUN(outlast_a_power_loss);
    RUN(a_kill_does_not_forget_what_is_owed);
    RUN(what_could_not_be_stored_is_tried_again);
    return check_report();
}
