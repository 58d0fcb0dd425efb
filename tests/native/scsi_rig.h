/* A group of filter_rig.h behind a SCSI target with two nexuses. */
#ifndef VREP_TESTS_SCSI_RIG_H
#define VREP_TESTS_SCSI_RIG_H

#include <poll.h>

#include "base/endian.h"
#include "filter_rig.h"
#include "scsi/scsi.h"

#define SCSI_NEXUSES 3

struct scsi_rig {
    struct rig rig;
    char reservations[160];
    uint32_t block;
    bool removable;
    struct vrep_scsi_target *target;
    struct vrep_scsi_nexus *nexus[SCSI_NEXUSES];
};

/* One task of a test, its data, and what came of it. */
struct answer {
    struct vrep_scsi_task task;
    bool done, aborted;
    uint8_t status;
    uint32_t sense; /* key << 16 | ASC << 8 | ASCQ */
    uint32_t in_bytes;
    uint32_t out_asked;
    uint8_t in[1 << 20];
};

CHECK_UNUSED static void scsi_rig_wakeup(void *context)
{
    vrep_scsi_wakeup(context);
}

CHECK_UNUSED static void scsi_rig_nexus(struct scsi_rig *rig, int i)
{
    uint8_t id[64] = {0x45, 0, 0, 60};
    snprintf((char *)id + 4, sizeof id - 4, "iqn.2026-01.test:%d,i,0x00023d00000%d", i, i);
    CHECK_OK(vrep_scsi_nexus_open(rig->target, id, sizeof id, 1, &rig->nexus[i]));
}

CHECK_UNUSED static void scsi_rig_open(struct scsi_rig *rig)
{
    rig_open(&rig->rig);
    struct vrep_scsi_unit_config unit = {.disk = 0,
                                         .block_bytes = rig->block,
                                         .removable = rig->removable,
                                         .reservations_path = rig->reservations};
    struct vrep_scsi_config config = {.group_id = {1}, .units = &unit, .units_count = 1};
    CHECK_OK(vrep_scsi_create(rig->rig.group, &config, &rig->target));
    vrep_group_set_wakeup(rig->rig.group, scsi_rig_wakeup, rig->target);
    for (int i = 0; i < SCSI_NEXUSES; i++)
        scsi_rig_nexus(rig, i);
}

CHECK_UNUSED static void scsi_rig_init(struct scsi_rig *rig, uint32_t block)
{
    rig_init(&rig->rig);
    rig->block = block;
    snprintf(rig->reservations, sizeof rig->reservations, "%s/scsi.0", rig->rig.state);
    scsi_rig_open(rig);
}

CHECK_UNUSED static void scsi_rig_shut(struct scsi_rig *rig, bool clean)
{
    CHECK(vrep_scsi_idle(rig->target));
    vrep_group_set_wakeup(rig->rig.group, NULL, NULL);
    if (clean)
        rig_close(&rig->rig, true);
    else
        rig_power_loss(&rig->rig);
    vrep_scsi_destroy(rig->target);
}

CHECK_UNUSED static void scsi_rig_free(struct scsi_rig *rig)
{
    scsi_rig_shut(rig, true);
    rig_free(&rig->rig);
}

CHECK_UNUSED static uint32_t sense_of(const uint8_t *sense, uint32_t bytes)
{
    if (bytes >= 14 && (sense[0] & 0x7f) == 0x70)
        return (uint32_t)(sense[2] & 0xf) << 16 | (uint32_t)sense[12] << 8 | sense[13];
    if (bytes >= 8 && (sense[0] & 0x7f) == 0x72)
        return (uint32_t)(sense[1] & 0xf) << 16 | (uint32_t)sense[2] << 8 | sense[3];
    CHECK_EQ(bytes, 0);
    return 0;
}

CHECK_UNUSED static void answer_done(struct vrep_scsi_task *task)
{
    struct answer *answer = task->owner;
    CHECK(!answer->done);
    answer->done = true;
    answer->aborted = task->aborted;
    answer->status = task->status;
    answer->sense = sense_of(task->sense, task->sense_bytes);
    answer->in_bytes = 0;
    for (int i = 0; i < task->in_count && task->in_bytes > 0; i++) {
        CHECK(answer->in_bytes + task->in[i].iov_len <= sizeof answer->in);
        memcpy(answer->in + answer->in_bytes, task->in[i].iov_base, task->in[i].iov_len);
        answer->in_bytes += (uint32_t)task->in[i].iov_len;
    }
    CHECK_EQ(answer->in_bytes, task->in_bytes);
    vrep_scsi_end(task);
}

CHECK_UNUSED static void scsi_poll(struct scsi_rig *rig)
{
    vrep_group_poll(rig->rig.group);
    vrep_scsi_poll(rig->target);
}

/* Prepares, and sends the data; not yet submitted. */
CHECK_UNUSED static void scsi_prepare(struct scsi_rig *rig, struct answer *answer, int nexus,
                                      const uint8_t *cdb, const void *out, uint32_t out_bytes)
{
    struct vrep_scsi_task *task = &answer->task;
    uint8_t attribute = task->attribute;
    uint64_t lun = task->lun;
    memset(task, 0, sizeof *task);
    answer->done = answer->aborted = false;
    answer->sense = 0;
    task->attribute = attribute;
    task->lun = lun;
    task->nexus = rig->nexus[nexus];
    memcpy(task->cdb, cdb, VREP_SCSI_CDB_BYTES);
    task->out_expected = out_bytes;
    task->done = answer_done;
    task->owner = answer;
    int status;
    for (int i = 0; (status = vrep_scsi_prepare(task)) == VREP_E_AGAIN && i < 1000000; i++)
        scsi_poll(rig);
    CHECK_OK(status);
    CHECK(task->out_bytes <= out_bytes);
    uint32_t sent = 0;
    for (int i = 0; i < task->out_count; i++) {
        memcpy(task->out[i].iov_base, (const uint8_t *)out + sent, task->out[i].iov_len);
        sent += (uint32_t)task->out[i].iov_len;
    }
    CHECK_EQ(sent, task->out_bytes);
    answer->out_asked = task->data_out;
}

CHECK_UNUSED static void scsi_wait(struct scsi_rig *rig, struct answer *answer)
{
    for (int i = 0; !answer->done && i < 100000; i++) {
        scsi_poll(rig);
        if (answer->done || i < 10)
            continue;
        /* The threads that do the work want this processor. */
        struct pollfd ready[] = {{.fd = vrep_group_fd(rig->rig.group), .events = POLLIN},
                                 {.fd = vrep_scsi_fd(rig->target), .events = POLLIN}};
        (void)poll(ready, 2, 1);
    }
    CHECK(answer->done);
}

CHECK_UNUSED static uint8_t scsi_run(struct scsi_rig *rig, struct answer *answer, int nexus,
                                     const uint8_t *cdb, const void *out, uint32_t out_bytes)
{
    scsi_prepare(rig, answer, nexus, cdb, out, out_bytes);
    vrep_scsi_submit(&answer->task);
    scsi_wait(rig, answer);
    return answer->status;
}

/* TEST UNIT READY until nothing is left to tell. */
CHECK_UNUSED static void scsi_settle_in(struct scsi_rig *rig, struct answer *answer)
{
    static const uint8_t ready[16];
    for (int i = 0; i < SCSI_NEXUSES; i++)
        while (scsi_run(rig, answer, i, ready, NULL, 0) != VREP_SCSI_GOOD)
            CHECK_EQ(answer->sense >> 16, 6);
}

#define CDB(...) ((const uint8_t[16]){__VA_ARGS__})

/* READ, WRITE ... of 16 bytes. */
CHECK_UNUSED static const uint8_t *cdb16(uint8_t code, uint8_t flags, uint64_t lba, uint32_t blocks)
{
    static uint8_t cdb[4][16];
    static int next;
    uint8_t *at = cdb[next++ % 4];
    memset(at, 0, 16);
    at[0] = code;
    at[1] = flags;
    vrep_be_store_u64(at + 2, lba);
    if (code == 0x89)
        at[13] = (uint8_t)blocks;
    else
        vrep_be_store_u32(at + 10, blocks);
    return at;
}

#endif
