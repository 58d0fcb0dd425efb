/* Inquiry: what the device says of itself: INQUIRY and its VPD pages, REPORT
 * LUNS, REQUEST SENSE, REPORT SUPPORTED OPERATION CODES (SPC-4 6.6, 7.8, 6.33). */
#include <stdio.h>
#include <string.h>

#include "scsi/internal.h"

#define VENDOR "VREP    "
#define PRODUCT "VIRTUAL DISK    "
#define REVISION "0001"
#define STANDARD_BYTES 96u

static void text(uint8_t *to, const char *from, size_t bytes)
{
    memset(to, ' ', bytes);
    memcpy(to, from, strnlen(from, bytes));
}

static uint32_t standard(const struct vrep_scsi_task *task, uint8_t *out)
{
    static const uint16_t versions[] = {
        0x00a0, /* SAM-5 */
        0x0460, /* SPC-4 */
        0x04c0, /* SBC-3 */
        0x0960, /* iSCSI */
    };
    out[0] = task->unit->absent ? 0x7f : 0x00;
    if (task->unit->removable)
        out[1] = 0x80;
    out[2] = 0x06; /* SPC-4 */
    out[3] = 0x12; /* HISUP, response data format 2 */
    out[4] = STANDARD_BYTES - 5;
    out[7] = 0x02; /* CMDQUE */
    text(out + 8, VENDOR, 8);
    text(out + 16, PRODUCT, 16);
    text(out + 32, REVISION, 4);
    for (uint32_t i = 0; i < sizeof versions / sizeof versions[0]; i++)
        vrep_be_store_u16(out + 58 + (size_t)i * 2, versions[i]);
    return STANDARD_BYTES;
}

/* ---- VPD pages, each without its four bytes of header; returns the length -------- */

static uint32_t page_supported(const struct vrep_scsi_task *task, uint8_t *out)
{
    static const uint8_t pages[] = {0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2};
    (void)task;
    memcpy(out, pages, sizeof pages);
    return sizeof pages;
}

static uint32_t page_serial(const struct vrep_scsi_task *task, uint8_t *out)
{
    memcpy(out, task->unit->serial, 32);
    return 32;
}

static uint32_t page_identification(const struct vrep_scsi_task *task, uint8_t *out)
{
    uint8_t *at = out;
    at[0] = 0x01; /* binary */
    at[1] = 0x03; /* of the logical unit: NAA */
    at[3] = 8;
    memcpy(at + 4, task->unit->naa, 8);
    at += 12;
    at[0] = 0x02; /* ASCII */
    at[1] = 0x01; /* T10 vendor identification */
    at[3] = 40;
    text(at + 4, VENDOR, 8);
    memcpy(at + 12, task->unit->serial, 32);
    at += 44;
    at[0] = 0x51; /* iSCSI, binary */
    at[1] = 0x94; /* PIV, of the target port: relative target port identifier */
    at[3] = 4;
    vrep_be_store_u16(at + 6, task->nexus->port);
    at += 8;
    return (uint32_t)(at - out);
}

static uint32_t page_limits(const struct vrep_scsi_task *task, uint8_t *out)
{
    const struct scsi_unit *unit = task->unit;
    uint32_t compare = SCSI_COMPARE_BYTES_MAX / unit->block_bytes;
    uint8_t *page = out - 4; /* offsets as in SBC-3 6.5.3 */
    page[4] = 0x01;          /* WSNZ: WRITE SAME of 0 blocks does not mean "to the end" */
    page[5] = (uint8_t)(compare < SCSI_COMPARE_BLOCKS_MAX ? compare : SCSI_COMPARE_BLOCKS_MAX);
    vrep_be_store_u16(page + 6, (uint16_t)(unit->granularity <= 0xffff ? unit->granularity : 1));
    vrep_be_store_u32(page + 8, VREP_SCSI_DATA_MAX / unit->block_bytes);
    vrep_be_store_u32(page + 12, (1u << 20) / unit->block_bytes);
    if (unit->thin) {
        vrep_be_store_u32(page + 20, SCSI_UNMAP_BLOCKS_MAX);
        vrep_be_store_u32(page + 24, SCSI_UNMAP_DESCRIPTORS_MAX);
        vrep_be_store_u32(page + 28, unit->granularity);
        vrep_be_store_u32(page + 32, 0x80000000u); /* UGAVALID: aligned to LBA 0 */
    }
    vrep_be_store_u64(page + 36, SCSI_WRITE_SAME_BYTES_MAX / unit->block_bytes);
    vrep_be_store_u32(page + 44, 1); /* atomic: one block, as the store below writes it */
    return 0x3c;
}

static uint32_t page_characteristics(const struct vrep_scsi_task *task, uint8_t *out)
{
    (void)task;
    vrep_be_store_u16(out, 1); /* not a rotating medium */
    return 0x3c;
}

static uint32_t page_provisioning(const struct vrep_scsi_task *task, uint8_t *out)
{
    if (task->unit->thin) {
        out[1] = 0xe4; /* LBPU, LBPWS, LBPWS10; LBPRZ: what is unmapped reads zero */
        out[2] = 0x02; /* thin */
    }
    return 4;
}

static const struct {
    uint8_t page;
    uint32_t (*make)(const struct vrep_scsi_task *task, uint8_t *out);
} pages[] = {
    {0x00, page_supported}, {0x80, page_serial},          {0x83, page_identification},
    {0xb0, page_limits},    {0xb1, page_characteristics}, {0xb2, page_provisioning},
};

static void fail_cdb(struct vrep_scsi_task *task, uint16_t byte)
{
    (void)scsi_refuse_cdb(task, byte);
    scsi_fail(task, VREP_SENSE_FIELD_IN_CDB);
}

void scsi_inquiry(struct vrep_scsi_task *task)
{
    uint8_t *out = scsi_buffer(task);
    const uint8_t *cdb = task->cdb;
    if ((cdb[1] & 2u) != 0) { /* CMDDT is obsolete */
        fail_cdb(task, 1);
        return;
    }
    if ((cdb[1] & 1u) == 0) {
        if (cdb[2] != 0)
            fail_cdb(task, 2);
        else
            scsi_good_data(task, standard(task, out), task->blocks);
        return;
    }
    for (uint32_t i = 0; i < sizeof pages / sizeof pages[0]; i++) {
        if (pages[i].page != cdb[2] || (task->unit->absent && cdb[2] != 0))
            continue;
        uint32_t bytes = pages[i].make(task, out + 4);
        out[0] = task->unit->absent ? 0x7f : 0x00;
        out[1] = cdb[2];
        vrep_be_store_u16(out + 2, (uint16_t)bytes);
        scsi_good_data(task, bytes + 4, task->blocks);
        return;
    }
    fail_cdb(task, 2);
}

void scsi_report_luns(struct vrep_scsi_task *task)
{
    uint8_t *out = scsi_buffer(task);
    uint32_t count = task->cdb[2] == 1 ? 0 : task->target->units_count; /* 1: well known ones */
    if (task->cdb[2] > 2) {
        fail_cdb(task, 2);
        return;
    }
    if (task->blocks < 16) {
        fail_cdb(task, 6);
        return;
    }
    vrep_be_store_u32(out, count * 8);
    for (uint32_t i = 0; i < count; i++)
        out[8 + (size_t)i * 8 + 1] = (uint8_t)i;
    scsi_good_data(task, 8 + count * 8, task->blocks);
}

void scsi_request_sense(struct vrep_scsi_task *task)
{
    struct scsi_unit *unit = task->unit;
    struct vrep_sense sense = {.code = VREP_SENSE_NO_UNIT};
    if (!unit->absent)
        sense.code = scsi_attention_take(unit, task->nexus);
    if (sense.code == VREP_SENSE_NONE && unit->stopped)
        sense.code = scsi_not_ready(unit);
    uint32_t bytes = vrep_sense_encode(&sense, (task->cdb[1] & 1u) != 0, scsi_buffer(task));
    scsi_good_data(task, bytes, task->blocks);
}

void scsi_test_unit_ready(struct vrep_scsi_task *task)
{
    scsi_good(task);
}

/* ---- REPORT SUPPORTED OPERATION CODES --------------------------------------------- */

#define TIMEOUTS_BYTES 12u

static bool offered(const struct vrep_scsi_task *task, const struct scsi_opcode *opcode)
{
    return task->unit->thin || (opcode->flags & OPCODE_THIN) == 0;
}

static uint32_t timeouts(uint8_t *out)
{
    vrep_be_store_u16(out, TIMEOUTS_BYTES - 2); /* no time is stated */
    return TIMEOUTS_BYTES;
}

static uint32_t all_opcodes(const struct vrep_scsi_task *task, bool with_timeouts, uint8_t *out)
{
    uint8_t *at = out + 4;
    const struct scsi_opcode *opcode;
    for (uint32_t i = 0; (opcode = scsi_opcode_at(i)) != NULL; i++) {
        if (!offered(task, opcode))
            continue;
        at[0] = opcode->code;
        if (opcode->action >= 0)
            vrep_be_store_u16(at + 2, (uint16_t)opcode->action);
        at[5] = (uint8_t)((with_timeouts ? 2u : 0u) | (opcode->action >= 0 ? 1u : 0u));
        vrep_be_store_u16(at + 6, opcode->length);
        at += 8;
        if (with_timeouts)
            at += timeouts(at);
    }
    vrep_be_store_u32(out, (uint32_t)(at - out) - 4);
    return (uint32_t)(at - out);
}

static uint32_t one_opcode(const struct vrep_scsi_task *task, const struct scsi_opcode *opcode,
                           bool with_timeouts, uint8_t *out)
{
    bool supported = opcode != NULL && offered(task, opcode);
    out[1] = (uint8_t)((supported && with_timeouts ? 0x80u : 0u) | (supported ? 3u : 1u));
    if (!supported)
        return 4;
    vrep_be_store_u16(out + 2, opcode->length);
    memcpy(out + 4, opcode->usage, opcode->length);
    out[4] = opcode->code;
    if (opcode->action >= 0) /* the value itself stands there */
        out[5] = (uint8_t)((opcode->usage[1] & 0xe0u) | (uint8_t)opcode->action);
    uint32_t bytes = 4u + opcode->length;
    return with_timeouts ? bytes + timeouts(out + bytes) : bytes;
}

void scsi_report_opcodes(struct vrep_scsi_task *task)
{
    const uint8_t *cdb = task->cdb;
    uint8_t *out = scsi_buffer(task);
    bool with_timeouts = (cdb[2] & 0x80u) != 0;
    uint8_t options = cdb[2] & 7u;
    uint16_t action = vrep_be_load_u16(cdb + 4);
    if (options == 0) {
        scsi_good_data(task, all_opcodes(task, with_timeouts, out), task->blocks);
        return;
    }
    if (options > 3) {
        fail_cdb(task, 2);
        return;
    }
    uint8_t asked[2] = {cdb[3], (uint8_t)(action & 0x1fu)};
    const struct scsi_opcode *opcode = scsi_opcode_find(asked);
    bool has_actions = scsi_opcode_known(cdb[3]) && (opcode == NULL || opcode->action >= 0);
    if (has_actions && action > 0x1f)
        opcode = NULL;
    /* 1: by opcode alone, 2: with a service action, 3: whichever it is. */
    if ((options == 1 && has_actions) ||
        (options == 2 && scsi_opcode_known(cdb[3]) && !has_actions)) {
        fail_cdb(task, options == 1 ? 3 : 4);
        return;
    }
    if (options == 3 && !has_actions && action != 0)
        opcode = NULL;
    scsi_good_data(task, one_opcode(task, opcode, with_timeouts, out), task->blocks);
}
