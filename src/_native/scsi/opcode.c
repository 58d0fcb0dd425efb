/* Opcode: the table of commands, and where their fields stand (SBC-3 5, SPC-4 6).
 * The usage bytes are those that REPORT SUPPORTED OPERATION CODES tells: a bit
 * that is looked at is 1. */
#include <string.h>

#include "scsi/internal.h"

#define MEDIUM OPCODE_MEDIUM
#define CHANGE (OPCODE_MEDIUM | OPCODE_CHANGES)
#define ANY (OPCODE_ANY_UNIT | OPCODE_NO_ATTENTION)
#define LBA4 0xff, 0xff, 0xff, 0xff
#define LBA8 LBA4, LBA4

static const struct scsi_opcode table[] = {
    {0x00,
     -1,
     6,
     ACCESS_ALWAYS,
     MEDIUM,
     scsi_prepares_nothing,
     scsi_test_unit_ready,
     {0, 0, 0, 0, 0, 4}},
    {0x03, -1, 6, ACCESS_ALWAYS, ANY, scsi_allocates, scsi_request_sense, {0, 1, 0, 0, 0xff, 4}},
    {0x08,
     -1,
     6,
     ACCESS_READ,
     MEDIUM,
     scsi_read_prepare,
     scsi_read,
     {0, 0x1f, 0xff, 0xff, 0xff, 4}},
    {0x0a,
     -1,
     6,
     ACCESS_WRITE,
     CHANGE,
     scsi_write_prepare,
     scsi_write,
     {0, 0x1f, 0xff, 0xff, 0xff, 4}},
    {0x12, -1, 6, ACCESS_ALWAYS, ANY, scsi_allocates, scsi_inquiry, {0, 1, 0xff, 0xff, 0xff, 4}},
    {0x15,
     -1,
     6,
     ACCESS_WRITE,
     0,
     scsi_mode_select_prepare,
     scsi_mode_select,
     {0, 0x11, 0, 0, 0xff, 4}},
    {0x16, -1, 6, ACCESS_OWN, 0, scsi_prepares_nothing, scsi_reserve, {0, 0, 0, 0, 0, 4}},
    {0x17, -1, 6, ACCESS_OWN, 0, scsi_prepares_nothing, scsi_release, {0, 0, 0, 0, 0, 4}},
    {0x1a, -1, 6, ACCESS_READ, 0, scsi_allocates, scsi_mode_sense, {0, 8, 0xff, 0xff, 0xff, 4}},
    {0x1b,
     -1,
     6,
     ACCESS_OWN,
     0,
     scsi_start_stop_prepare,
     scsi_start_stop,
     {0, 1, 0, 0x0f, 0xf7, 4}},
    {0x1e, -1, 6, ACCESS_OWN, 0, scsi_prepares_nothing, scsi_prevent_allow, {0, 0, 0, 0, 3, 4}},
    {0x25,
     -1,
     10,
     ACCESS_ALWAYS,
     MEDIUM,
     scsi_allocates,
     scsi_read_capacity,
     {0, 0, LBA4, 0, 0, 1, 4}},
    {0x28,
     -1,
     10,
     ACCESS_READ,
     MEDIUM,
     scsi_read_prepare,
     scsi_read,
     {0, 0xf8, LBA4, 0, 0xff, 0xff, 4}},
    {0x2a,
     -1,
     10,
     ACCESS_WRITE,
     CHANGE,
     scsi_write_prepare,
     scsi_write,
     {0, 0xf8, LBA4, 0, 0xff, 0xff, 4}},
    {0x2e,
     -1,
     10,
     ACCESS_WRITE,
     CHANGE,
     scsi_write_verify_prepare,
     scsi_write_verify,
     {0, 0xf6, LBA4, 0, 0xff, 0xff, 4}},
    {0x2f,
     -1,
     10,
     ACCESS_READ,
     MEDIUM,
     scsi_verify_prepare,
     scsi_verify,
     {0, 0xf6, LBA4, 0, 0xff, 0xff, 4}},
    {0x34,
     -1,
     10,
     ACCESS_READ,
     MEDIUM,
     scsi_prefetch_prepare,
     scsi_prefetch,
     {0, 2, LBA4, 0, 0xff, 0xff, 4}},
    {0x35,
     -1,
     10,
     ACCESS_WRITE,
     MEDIUM,
     scsi_sync_prepare,
     scsi_sync,
     {0, 2, LBA4, 0, 0xff, 0xff, 4}},
    {0x41,
     -1,
     10,
     ACCESS_WRITE,
     CHANGE,
     scsi_write_same_prepare,
     scsi_write_same,
     {0, 0xf8, LBA4, 0, 0xff, 0xff, 4}},
    {0x42,
     -1,
     10,
     ACCESS_WRITE,
     CHANGE | OPCODE_THIN,
     scsi_unmap_prepare,
     scsi_unmap,
     {0, 1, 0, 0, 0, 0, 0, 0xff, 0xff, 4}},
    {0x55,
     -1,
     10,
     ACCESS_WRITE,
     0,
     scsi_mode_select_prepare,
     scsi_mode_select,
     {0, 0x11, 0, 0, 0, 0, 0, 0xff, 0xff, 4}},
    {0x5a,
     -1,
     10,
     ACCESS_READ,
     0,
     scsi_allocates,
     scsi_mode_sense,
     {0, 0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 4}},
    {0x5e,
     0,
     10,
     ACCESS_OWN,
     0,
     scsi_allocates,
     scsi_persistent_in,
     {0, 0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 4}},
    {0x5e,
     1,
     10,
     ACCESS_OWN,
     0,
     scsi_allocates,
     scsi_persistent_in,
     {0, 0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 4}},
    {0x5e,
     2,
     10,
     ACCESS_OWN,
     0,
     scsi_allocates,
     scsi_persistent_in,
     {0, 0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 4}},
    {0x5e,
     3,
     10,
     ACCESS_OWN,
     0,
     scsi_allocates,
     scsi_persistent_in,
     {0, 0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 4}},
#define PERSISTENT_OUT(action)                                                                     \
    {                                                                                              \
        0x5f, action, 10, ACCESS_OWN, 0, scsi_persistent_out_prepare, scsi_persistent_out,         \
        {                                                                                          \
            0, 0x1f, 0xff, 0, 0, LBA4, 4                                                           \
        }                                                                                          \
    }
    PERSISTENT_OUT(0),
    PERSISTENT_OUT(1),
    PERSISTENT_OUT(2),
    PERSISTENT_OUT(3),
    PERSISTENT_OUT(4),
    PERSISTENT_OUT(5),
    PERSISTENT_OUT(6),
    {0x88, -1, 16, ACCESS_READ, MEDIUM, scsi_read_prepare, scsi_read, {0, 0xf8, LBA8, LBA4, 0, 4}},
    {0x89,
     -1,
     16,
     ACCESS_WRITE,
     CHANGE,
     scsi_compare_write_prepare,
     scsi_compare_write,
     {0, 0xf8, LBA8, 0, 0, 0, 0xff, 0, 4}},
    {0x8a,
     -1,
     16,
     ACCESS_WRITE,
     CHANGE,
     scsi_write_prepare,
     scsi_write,
     {0, 0xf8, LBA8, LBA4, 0, 4}},
    {0x8e,
     -1,
     16,
     ACCESS_WRITE,
     CHANGE,
     scsi_write_verify_prepare,
     scsi_write_verify,
     {0, 0xf6, LBA8, LBA4, 0, 4}},
    {0x8f,
     -1,
     16,
     ACCESS_READ,
     MEDIUM,
     scsi_verify_prepare,
     scsi_verify,
     {0, 0xf6, LBA8, LBA4, 0, 4}},
    {0x90,
     -1,
     16,
     ACCESS_READ,
     MEDIUM,
     scsi_prefetch_prepare,
     scsi_prefetch,
     {0, 2, LBA8, LBA4, 0, 4}},
    {0x91, -1, 16, ACCESS_WRITE, MEDIUM, scsi_sync_prepare, scsi_sync, {0, 2, LBA8, LBA4, 0, 4}},
    {0x93,
     -1,
     16,
     ACCESS_WRITE,
     CHANGE,
     scsi_write_same_prepare,
     scsi_write_same,
     {0, 0xf9, LBA8, LBA4, 0, 4}},
    {0x9c,
     -1,
     16,
     ACCESS_WRITE,
     CHANGE,
     scsi_write_atomic_prepare,
     scsi_write,
     {0, 0xf8, LBA8, 0xff, 0xff, 0xff, 0xff, 0, 4}},
    {0x9e,
     0x10,
     16,
     ACCESS_ALWAYS,
     MEDIUM,
     scsi_allocates,
     scsi_read_capacity,
     {0, 0x1f, LBA8, LBA4, 1, 4}},
    {0x9e,
     0x12,
     16,
     ACCESS_READ,
     MEDIUM,
     scsi_lba_status_prepare,
     scsi_lba_status,
     {0, 0x1f, LBA8, LBA4, 0, 4}},
    {0xa0,
     -1,
     12,
     ACCESS_ALWAYS,
     ANY,
     scsi_allocates,
     scsi_report_luns,
     {0, 0, 0xff, 0, 0, 0, LBA4, 0, 4}},
    {0xa3,
     0x0c,
     12,
     ACCESS_READ,
     0,
     scsi_allocates,
     scsi_report_opcodes,
     {0, 0x1f, 0x87, 0xff, 0xff, 0xff, LBA4, 0, 4}},
    {0xa8, -1, 12, ACCESS_READ, MEDIUM, scsi_read_prepare, scsi_read, {0, 0xf8, LBA4, LBA4, 0, 4}},
    {0xaa,
     -1,
     12,
     ACCESS_WRITE,
     CHANGE,
     scsi_write_prepare,
     scsi_write,
     {0, 0xf8, LBA4, LBA4, 0, 4}},
    {0xae,
     -1,
     12,
     ACCESS_WRITE,
     CHANGE,
     scsi_write_verify_prepare,
     scsi_write_verify,
     {0, 0xf6, LBA4, LBA4, 0, 4}},
    {0xaf,
     -1,
     12,
     ACCESS_READ,
     MEDIUM,
     scsi_verify_prepare,
     scsi_verify,
     {0, 0xf6, LBA4, LBA4, 0, 4}},
};
#define COUNT (sizeof table / sizeof table[0])

const struct scsi_opcode *scsi_opcode_at(uint32_t index)
{
    return index < COUNT ? &table[index] : NULL;
}

const struct scsi_opcode *scsi_opcode_find(const uint8_t *cdb)
{
    for (uint32_t i = 0; i < COUNT; i++)
        if (table[i].code == cdb[0] &&
            (table[i].action < 0 || table[i].action == (int8_t)(cdb[1] & 0x1fu)))
            return &table[i];
    return NULL;
}

bool scsi_opcode_known(uint8_t code)
{
    for (uint32_t i = 0; i < COUNT; i++)
        if (table[i].code == code)
            return true;
    return false;
}

uint64_t scsi_blocks(const struct scsi_unit *unit)
{
    return unit->bytes / unit->block_bytes;
}

void scsi_decode(struct vrep_scsi_task *task)
{
    const uint8_t *cdb = task->cdb;
    switch (task->opcode->length) {
    case 6:
        task->lba = vrep_be_load_u32(cdb) & 0x1fffffu;
        task->blocks = cdb[4] == 0 ? 256 : cdb[4];
        return;
    case 10:
        task->lba = vrep_be_load_u32(cdb + 2);
        task->blocks = vrep_be_load_u16(cdb + 7);
        return;
    case 12:
        task->lba = vrep_be_load_u32(cdb + 2);
        task->blocks = vrep_be_load_u32(cdb + 6);
        return;
    default:
        task->lba = vrep_be_load_u64(cdb + 2);
        task->blocks = vrep_be_load_u32(cdb + 10);
    }
}

bool scsi_in_range(const struct vrep_scsi_task *task)
{
    uint64_t blocks = scsi_blocks(task->unit);
    return task->lba <= blocks && task->blocks <= blocks - task->lba;
}

bool scsi_prepares_nothing(struct vrep_scsi_task *task)
{
    (void)task;
    return true;
}

static uint32_t allocation_of(const struct vrep_scsi_task *task)
{
    const uint8_t *cdb = task->cdb;
    switch (cdb[0]) {
    case 0x12:
        return vrep_be_load_u16(cdb + 3);
    case 0x25:
        return 8;
    default:
        switch (task->opcode->length) {
        case 6:
            return cdb[4];
        case 10:
            return vrep_be_load_u16(cdb + 7);
        case 12:
            return vrep_be_load_u32(cdb + 6);
        default:
            return vrep_be_load_u32(cdb + 10);
        }
    }
}

/* Every answer that is made in memory is shorter than one part of a buffer, whatever the initiator
 * has room for: READ FULL STATUS is the longest. */
bool scsi_allocates(struct vrep_scsi_task *task)
{
    bool lengthy = task->opcode->run == scsi_persistent_in;
    task->blocks = allocation_of(task);
    if (!scsi_take_buffer(task, lengthy ? SCSI_CONTIGUOUS : VREP_BUFFER_SMALL_BYTES))
        return false;
    memset(scsi_buffer(task), 0, lengthy ? SCSI_CONTIGUOUS : VREP_BUFFER_SMALL_BYTES);
    return true;
}
