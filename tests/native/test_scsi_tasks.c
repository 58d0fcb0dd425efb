/* SCSI tasks: order, aborts, resets, resize, and what a nexus is told of them. */
#include "filter/fault.h"
#include "scsi_rig.h"

static struct scsi_rig rig;
static struct answer one, two, three, probe;
static uint8_t data[1 << 20];

static struct {
    bool done;
    uint8_t response;
} managed;

static void management_done(struct vrep_scsi_management *management)
{
    managed.done = true;
    managed.response = management->response;
}

static void manage(struct vrep_scsi_management *management, int nexus, uint8_t function,
                   struct vrep_scsi_task *task)
{
    *management = (struct vrep_scsi_management){
        .nexus = rig.nexus[nexus], .function = function, .task = task, .done = management_done};
    managed.done = false;
    vrep_scsi_manage(management);
}

static const uint8_t *write_at(uint32_t lba, uint32_t blocks)
{
    return cdb16(0x8a, 0, lba, blocks);
}

static uint8_t byte_at(uint32_t lba)
{
    uint8_t byte;
    int fd = open(rig.rig.disk, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, &byte, 1, (off_t)lba * rig.block) == 1);
    close(fd);
    return byte;
}

static void start(uint32_t block)
{
    memset(&one.task, 0, sizeof one.task);
    memset(&two.task, 0, sizeof two.task);
    memset(&three.task, 0, sizeof three.task);
    scsi_rig_init(&rig, block);
    scsi_settle_in(&rig, &probe);
}

/* An ordered task waits for all before it and holds up all behind it. */
static void ordered_tasks_keep_their_place(void)
{
    start(512);
    memset(data, 1, sizeof data);
    scsi_prepare(&rig, &one, 0, write_at(0, 1), data, 512); /* its data are still to come */
    two.task.attribute = VREP_SCSI_ORDERED;
    scsi_prepare(&rig, &two, 1, CDB(0x00), NULL, 0);
    vrep_scsi_submit(&two.task);
    scsi_prepare(&rig, &three, 0, CDB(0x00), NULL, 0);
    vrep_scsi_submit(&three.task);
    for (int i = 0; i < 100; i++)
        scsi_poll(&rig);
    CHECK(!two.done && !three.done);
    probe.task.attribute = VREP_SCSI_HEAD_OF_QUEUE;
    CHECK_EQ(scsi_run(&rig, &probe, 0, CDB(0x00), NULL, 0), VREP_SCSI_GOOD);
    probe.task.attribute = VREP_SCSI_SIMPLE;
    CHECK(!two.done && !three.done);
    vrep_scsi_submit(&one.task);
    scsi_wait(&rig, &one);
    scsi_wait(&rig, &two);
    scsi_wait(&rig, &three);
    CHECK(one.status == 0 && two.status == 0 && three.status == 0);
    two.task.attribute = VREP_SCSI_ACA;
    CHECK_EQ(scsi_run(&rig, &two, 0, CDB(0x00), NULL, 0), VREP_SCSI_CHECK_CONDITION);
    scsi_rig_free(&rig);
}

/* A task whose data never came is gone at once, and nothing was written. */
static void an_aborted_task_writes_nothing(void)
{
    struct vrep_scsi_management management;
    start(512);
    memset(data, 7, sizeof data);
    uint64_t head = rig_status(&rig.rig).head;
    scsi_prepare(&rig, &one, 0, write_at(3, 1), data, 512);
    manage(&management, 0, VREP_SCSI_ABORT_TASK, &one.task);
    CHECK(managed.done && managed.response == VREP_SCSI_COMPLETE);
    CHECK(one.done && one.aborted);
    CHECK_EQ(byte_at(3), 0);
    CHECK_EQ(rig_status(&rig.rig).head, head);
    manage(&management, 0, VREP_SCSI_ABORT_TASK, NULL); /* it has ended: that is no error */
    CHECK(managed.done && managed.response == VREP_SCSI_COMPLETE);
    scsi_rig_free(&rig);
}

/* A reset answers only when what it aborted has left the chain; then nothing of it lands. */
static void a_reset_waits_for_what_runs(void)
{
    struct vrep_scsi_management management;
    start(512);
    memset(data, 9, sizeof data);
    uint32_t blocks = 1024;
    bool seen = false;
    for (int round = 0; round < 50; round++) {
        scsi_prepare(&rig, &one, 0, cdb16(0x8a, 8, 0, blocks), data, blocks * 512);
        vrep_scsi_submit(&one.task); /* FUA: it runs on a thread of the engine */
        scsi_prepare(&rig, &two, 1, cdb16(0x8a, 0, 4000, 1), data, 512);
        bool ran = !one.done;
        manage(&management, 1, VREP_SCSI_UNIT_RESET, NULL);
        CHECK(two.done && two.aborted);
        CHECK(!managed.done || one.done);
        for (int i = 0; !managed.done && i < 10000000; i++)
            scsi_poll(&rig);
        CHECK(managed.done && one.done);
        CHECK(!ran || one.aborted);
        seen = seen || ran;
        for (int nexus = 0; nexus < SCSI_NEXUSES; nexus++) {
            CHECK_EQ(scsi_run(&rig, &probe, nexus, CDB(0x00), NULL, 0), VREP_SCSI_CHECK_CONDITION);
            CHECK_EQ(probe.sense, 0x062903);
            CHECK_EQ(scsi_run(&rig, &probe, nexus, CDB(0x00), NULL, 0), VREP_SCSI_GOOD);
        }
    }
    CHECK(seen);
    CHECK_EQ(byte_at(4000), 0);
    rig_sync(&rig.rig);
    rig_compare(&rig.rig); /* what was aborted in flight is in the order all the same */
    scsi_rig_free(&rig);
}

static void task_sets_are_aborted_and_cleared(void)
{
    struct vrep_scsi_management management;
    start(512);
    scsi_prepare(&rig, &one, 0, write_at(0, 1), data, 512);
    scsi_prepare(&rig, &two, 1, write_at(1, 1), data, 512);
    manage(&management, 0, VREP_SCSI_ABORT_TASK_SET, NULL); /* of its own nexus only */
    CHECK(managed.done && one.aborted && !two.done);
    manage(&management, 0, VREP_SCSI_CLEAR_TASK_SET, NULL);
    CHECK(managed.done && two.aborted);
    CHECK_EQ(scsi_run(&rig, &probe, 0, CDB(0x00), NULL, 0), VREP_SCSI_GOOD);
    CHECK_EQ(scsi_run(&rig, &probe, 1, CDB(0x00), NULL, 0), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(probe.sense, 0x062f00);
    management = (struct vrep_scsi_management){.nexus = rig.nexus[0],
                                               .lun = UINT64_C(3) << 48,
                                               .function = VREP_SCSI_UNIT_RESET,
                                               .done = management_done};
    vrep_scsi_manage(&management);
    CHECK_EQ(managed.response, VREP_SCSI_NO_LUN);
    manage(&management, 0, 77, NULL);
    CHECK_EQ(managed.response, VREP_SCSI_REJECTED);
    manage(&management, 0, VREP_SCSI_TARGET_RESET, NULL);
    CHECK_EQ(managed.response, VREP_SCSI_COMPLETE);
    CHECK_EQ(scsi_run(&rig, &probe, 2, CDB(0x00), NULL, 0), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(probe.sense, 0x062903);
    scsi_rig_free(&rig);
}

/* A nexus that is lost takes its tasks and its RESERVE(6) along. */
static void a_lost_nexus_leaves_nothing(void)
{
    start(512);
    CHECK_EQ(scsi_run(&rig, &probe, 0, CDB(0x16), NULL, 0), VREP_SCSI_GOOD);
    CHECK_EQ(scsi_run(&rig, &probe, 1, CDB(0x28, 0, 0, 0, 0, 0, 0, 0, 1), NULL, 0),
             VREP_SCSI_RESERVATION_CONFLICT);
    CHECK_EQ(scsi_run(&rig, &probe, 1, CDB(0x12, 0, 0, 0, 36), NULL, 0), VREP_SCSI_GOOD);
    CHECK_EQ(scsi_run(&rig, &probe, 1, CDB(0x17), NULL, 0), VREP_SCSI_GOOD); /* not its own */
    CHECK_EQ(scsi_run(&rig, &probe, 1, CDB(0x00), NULL, 0), VREP_SCSI_RESERVATION_CONFLICT);
    memset(data, 3, sizeof data);
    scsi_prepare(&rig, &one, 0, write_at(8, 1), data, 512);
    scsi_prepare(&rig, &two, 0, cdb16(0x8a, 8, 16, 1), data, 512);
    vrep_scsi_submit(&two.task);
    vrep_scsi_nexus_close(rig.nexus[0]);
    CHECK(one.done && one.aborted);
    scsi_wait(&rig, &two);
    CHECK_EQ(byte_at(8), 0);
    scsi_rig_nexus(&rig, 0);
    CHECK_EQ(scsi_run(&rig, &probe, 1, CDB(0x28, 0, 0, 0, 0, 0, 0, 0, 1), NULL, 0), VREP_SCSI_GOOD);
    CHECK_EQ(scsi_run(&rig, &probe, 0, CDB(0x00), NULL, 0), VREP_SCSI_CHECK_CONDITION);
    CHECK_EQ(probe.sense, 0x062900);
    CHECK(vrep_scsi_idle(rig.target));
    scsi_rig_free(&rig);
}

static void nexuses_are_bounded(void)
{
    struct vrep_scsi_nexus *all[VREP_SCSI_NEXUSES_MAX];
    uint8_t id[VREP_SCSI_TRANSPORT_ID_MAX + 1] = {5};
    uint32_t count = 0;
    start(512);
    CHECK_STATUS(vrep_scsi_nexus_open(rig.target, id, sizeof id, 1, &all[0]), VREP_E_INVALID);
    CHECK_STATUS(vrep_scsi_nexus_open(rig.target, id, 0, 1, &all[0]), VREP_E_INVALID);
    while (vrep_scsi_nexus_open(rig.target, id, 8, 1, &all[count]) == VREP_OK)
        count++;
    CHECK_EQ(count, VREP_SCSI_NEXUSES_MAX - SCSI_NEXUSES);
    while (count > 0)
        vrep_scsi_nexus_close(all[--count]);
    CHECK_OK(vrep_scsi_nexus_open(rig.target, id, 8, 1, &all[0]));
    scsi_rig_free(&rig);
}

/* A failing store is told as what it is. */
static void errors_of_the_store_have_their_sense(void)
{
    static const struct {
        const char *fault;
        uint8_t code;
        uint32_t out, sense;
    } cases[] = {
        {"backing.read:1:io", 0x28, 0, 0x031100},
        {"backing.read:1:io", 0x2f, 0, 0x031100},
        {"backing.write:1:io", 0x2a, 512, 0x030c00},
        {"backing.flush:1:io", 0x35, 0, 0x030c00},
    };
    start(512);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint8_t cdb[16] = {cases[i].code, 0, 0, 0, 0, 4, 0, 0, 1};
        setenv("VREP_FAULT", cases[i].fault, 1);
        vrep_fault_prepare();
        CHECK_EQ(scsi_run(&rig, &probe, 0, cdb, data, cases[i].out), VREP_SCSI_CHECK_CONDITION);
        CHECK_EQ(probe.sense, cases[i].sense);
        if (cases[i].sense == 0x031100) {
            CHECK_EQ(probe.task.sense[0], 0xf0); /* which block it was */
            CHECK_EQ(vrep_be_load_u32(probe.task.sense + 3), 4);
        }
    }
    unsetenv("VREP_FAULT");
    vrep_fault_prepare();
    scsi_rig_free(&rig);
}

int main(void)
{
    RUN(ordered_tasks_keep_their_place);
    RUN(an_aborted_task_writes_nothing);
    RUN(a_reset_waits_for_what_runs);
    RUN(task_sets_are_aborted_and_cleared);
    RUN(a_lost_nexus_leaves_nothing);
    RUN(nexuses_are_bounded);
    RUN(errors_of_the_store_have_their_sense);
    return check_report();
}
