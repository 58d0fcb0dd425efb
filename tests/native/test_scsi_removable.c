/* A medium that can be ejected: PREVENT ALLOW MEDIUM REMOVAL, START STOP UNIT with LOEJ. */
#include "scsi_rig.h"

static struct scsi_rig rig;
static struct answer probe;
static uint8_t block[512];

#define EJECT CDB(0x1b, [4] = 2)
#define LOAD CDB(0x1b, [4] = 3)
#define START CDB(0x1b, [4] = 1)
#define READY CDB(0x00)
#define READ_ONE CDB(0x28, [8] = 1)
#define PREVENT CDB(0x1e, [4] = 1)
#define ALLOW CDB(0x1e)

static void begin(void)
{
    rig.removable = true;
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &probe);
}

/* 0, or the sense of a CHECK CONDITION. */
static uint32_t tell(int nexus, const uint8_t *cdb)
{
    if (scsi_run(&rig, &probe, nexus, cdb, NULL, 0) == VREP_SCSI_GOOD)
        return 0;
    CHECK_EQ(probe.status, VREP_SCSI_CHECK_CONDITION);
    return probe.sense;
}

static void a_fixed_medium_is_not_ejected(void)
{
    rig.removable = false;
    scsi_rig_init(&rig, 512);
    scsi_settle_in(&rig, &probe);
    CHECK_EQ(tell(0, CDB(0x12, [4] = 36)), 0);
    CHECK_EQ(probe.in[1], 0);
    CHECK_EQ(tell(0, EJECT), 0x052400);
    CHECK_EQ(tell(0, PREVENT), 0);
    CHECK_EQ(tell(0, CDB(0x1b)), 0); /* to stop is no removal */
    CHECK_EQ(tell(0, READY), 0x020402);
    scsi_rig_free(&rig);
}

static void what_is_ejected_is_not_there_for_anybody(void)
{
    begin();
    memset(block, 5, sizeof block);
    CHECK_EQ(tell(0, CDB(0x12, [4] = 36)), 0);
    CHECK_EQ(probe.in[1], 0x80); /* RMB */
    CHECK_EQ(scsi_run(&rig, &probe, 0, CDB(0x2a, [8] = 1), block, 512), VREP_SCSI_GOOD);
    uint64_t flushes = rig_status(&rig.rig).flushes, head = rig_status(&rig.rig).head;
    CHECK_EQ(tell(0, EJECT), 0);
    CHECK_EQ(rig_status(&rig.rig).flushes, flushes + 1);
    for (int nexus = 0; nexus < 2; nexus++) {
        CHECK_EQ(tell(nexus, READY), 0x023a00);
        CHECK_EQ(tell(nexus, READ_ONE), 0x023a00);
        CHECK_EQ(scsi_run(&rig, &probe, nexus, CDB(0x2a, [8] = 1), block, 512),
                 VREP_SCSI_CHECK_CONDITION);
        CHECK_EQ(probe.sense, 0x023a00);
        CHECK_EQ(tell(nexus, CDB(0x03, [4] = 18)), 0);
        CHECK_EQ(sense_of(probe.in, 18), 0x023a00);
    }
    CHECK_EQ(rig_status(&rig.rig).head, head);
    CHECK_EQ(tell(0, START), 0x023a00); /* it has to be loaded */
    CHECK_EQ(tell(0, LOAD), 0);
    CHECK_EQ(tell(0, READ_ONE), 0);
    CHECK_MEM(probe.in, block, 512);
    CHECK_EQ(tell(1, READ_ONE), 0x062800); /* others are told */
    CHECK_EQ(tell(1, READ_ONE), 0);
    CHECK_EQ(tell(0, LOAD), 0); /* nothing changed */
    CHECK_EQ(tell(2, READY), 0x062800);
    CHECK_EQ(tell(2, READY), 0);
    scsi_rig_free(&rig);
}

static void removal_is_prevented_by_any_nexus(void)
{
    begin();
    CHECK_EQ(tell(0, PREVENT), 0);
    CHECK_EQ(tell(1, PREVENT), 0);
    CHECK_EQ(tell(0, EJECT), 0x055302);
    CHECK_EQ(tell(2, EJECT), 0x055302);
    CHECK_EQ(tell(2, READ_ONE), 0);
    CHECK_EQ(tell(0, ALLOW), 0);
    CHECK_EQ(tell(0, EJECT), 0x055302);
    vrep_scsi_nexus_close(rig.nexus[1]); /* what it prevented ends with it */
    CHECK_EQ(tell(0, EJECT), 0);
    CHECK_EQ(tell(0, PREVENT), 0);
    CHECK_EQ(tell(0, LOAD), 0x055302);
    CHECK_EQ(tell(0, ALLOW), 0);
    CHECK_EQ(tell(0, LOAD), 0);
    scsi_rig_nexus(&rig, 1);
    scsi_rig_free(&rig);
}

static void reset_done(struct vrep_scsi_management *management)
{
    CHECK_EQ(management->response, VREP_SCSI_COMPLETE);
}

/* A reset allows removal, and loads nothing. */
static void a_reset_moves_no_medium(void)
{
    struct vrep_scsi_management reset = {.function = VREP_SCSI_UNIT_RESET, .done = reset_done};
    begin();
    reset.nexus = rig.nexus[0];
    CHECK_EQ(tell(1, PREVENT), 0);
    vrep_scsi_manage(&reset);
    CHECK_EQ(tell(0, READY), 0x062903);
    CHECK_EQ(tell(0, EJECT), 0);
    vrep_scsi_manage(&reset);
    CHECK_EQ(tell(0, READY), 0x062903);
    CHECK_EQ(tell(0, READY), 0x023a00);
    CHECK_EQ(tell(0, LOAD), 0);
    CHECK_EQ(tell(0, READY), 0);
    scsi_rig_free(&rig);
}

int main(void)
{
    RUN(a_fixed_medium_is_not_ejected);
    RUN(what_is_ejected_is_not_there_for_anybody);
    RUN(removal_is_prevented_by_any_nexus);
    RUN(a_reset_moves_no_medium);
    return check_report();
}
