/* A disk that got another size: who comes back to it is told, and finds it. */
#include <stdlib.h>

#include "filter/fault.h"
#include "scsi_rig.h"

#define SMALL (1u << 20)

static struct scsi_rig rig;
static struct answer probe;

/* The group is closed as for a resize, and opened with this plan. */
static void reopen(uint64_t was, uint64_t bytes)
{
    CHECK(vrep_scsi_idle(rig.target));
    vrep_group_set_wakeup(rig.rig.group, NULL, NULL);
    rig_close(&rig.rig, false);
    vrep_scsi_destroy(rig.target);
    rig.rig.disks[0].was = was;
    rig.rig.disks[0].bytes = bytes;
    scsi_rig_open(&rig);
}

static void reset_done(struct vrep_scsi_management *management)
{
    CHECK_EQ(management->response, VREP_SCSI_COMPLETE);
}

static uint32_t sense_now(int nexus)
{
    if (scsi_run(&rig, &probe, nexus, CDB(0x00), NULL, 0) == VREP_SCSI_GOOD)
        return 0;
    CHECK_EQ(probe.status, VREP_SCSI_CHECK_CONDITION);
    return probe.sense;
}

static uint64_t blocks_now(int nexus)
{
    CHECK_EQ(scsi_run(&rig, &probe, nexus, CDB(0x9e, 0x10, [13] = 32), NULL, 0), VREP_SCSI_GOOD);
    return vrep_be_load_u64(probe.in) + 1;
}

static void every_nexus_is_told_once(uint32_t block)
{
    static const uint64_t sizes[] = {RIG_BYTES, SMALL, RIG_BYTES};
    scsi_rig_init(&rig, block);
    scsi_settle_in(&rig, &probe);
    for (int i = 1; i < 3; i++) {
        reopen(sizes[i - 1], sizes[i]);
        for (int nexus = 0; nexus < SCSI_NEXUSES; nexus++) {
            CHECK_EQ(sense_now(nexus), 0x062900);
            CHECK_EQ(sense_now(nexus), 0x062a09);
            CHECK_EQ(sense_now(nexus), 0);
            CHECK_EQ(blocks_now(nexus), sizes[i] / block);
        }
        uint64_t end = sizes[i] / block;
        CHECK_EQ(scsi_run(&rig, &probe, 0, cdb16(0x88, 0, end - 1, 1), NULL, 0), VREP_SCSI_GOOD);
        CHECK_EQ(scsi_run(&rig, &probe, 0, cdb16(0x88, 0, end, 1), NULL, 0),
                 VREP_SCSI_CHECK_CONDITION);
        CHECK_EQ(probe.sense, 0x052100);
    }
    scsi_rig_free(&rig);
}

static void blocks_of_512_bytes(void)
{
    every_nexus_is_told_once(512);
}

static void blocks_of_4096_bytes(void)
{
    every_nexus_is_told_once(4096);
}

/* INQUIRY and REPORT LUNS do not wait for it, REQUEST SENSE takes it, a reset does not swallow it.
 */
static void it_is_an_attention_like_others(void)
{
    struct vrep_scsi_management reset = {.function = VREP_SCSI_UNIT_RESET};
    scsi_rig_init(&rig, 512);
    reopen(RIG_BYTES, SMALL);
    CHECK_EQ(scsi_run(&rig, &probe, 0, CDB(0x12, [4] = 36), NULL, 0), VREP_SCSI_GOOD);
    CHECK_EQ(scsi_run(&rig, &probe, 0, CDB(0xa0, [9] = 16), NULL, 0), VREP_SCSI_GOOD);
    for (int i = 0; i < 3; i++) {
        static const uint16_t told[] = {0x2900, 0x2a09, 0};
        CHECK_EQ(scsi_run(&rig, &probe, 0, CDB(0x03, [4] = 18), NULL, 0), VREP_SCSI_GOOD);
        CHECK_EQ(vrep_be_load_u16(probe.in + 12), told[i]);
    }
    reset.nexus = rig.nexus[0];
    reset.done = reset_done;
    vrep_scsi_manage(&reset);
    CHECK_EQ(sense_now(1), 0x062900);
    CHECK_EQ(sense_now(1), 0x062903);
    CHECK_EQ(sense_now(1), 0x062a09);
    CHECK_EQ(sense_now(1), 0);
    CHECK_EQ(sense_now(0), 0x062903);
    CHECK_EQ(sense_now(0), 0);
    scsi_rig_free(&rig);
}

/* A plan that stands in the definition until its record is out: it may have been told already, or
 * not. One that could not be carried out is not told. */
static void what_did_not_happen_is_not_told(void)
{
    scsi_rig_init(&rig, 512);
    reopen(0, 0);
    CHECK_EQ(sense_now(0), 0x062900);
    CHECK_EQ(sense_now(0), 0);
    setenv("VREP_FAULT", "resize.backing:1:io", 1);
    vrep_fault_prepare();
    reopen(RIG_BYTES, SMALL);
    unsetenv("VREP_FAULT");
    vrep_fault_prepare();
    CHECK_EQ(sense_now(0), 0x062900);
    CHECK_EQ(sense_now(0), 0);
    CHECK_EQ(blocks_now(0), RIG_BYTES / 512);
    reopen(RIG_BYTES, SMALL);
    reopen(RIG_BYTES, SMALL); /* the filter was killed meanwhile */
    CHECK_EQ(sense_now(0), 0x062900);
    CHECK_EQ(sense_now(0), 0x062a09);
    CHECK_EQ(sense_now(0), 0);
    scsi_rig_free(&rig);
}

int main(void)
{
    RUN(blocks_of_512_bytes);
    RUN(blocks_of_4096_bytes);
    RUN(it_is_an_attention_like_others);
    RUN(what_did_not_happen_is_not_told);
    return check_report();
}
