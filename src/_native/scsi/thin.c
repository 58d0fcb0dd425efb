/* Thin: WRITE SAME, UNMAP, GET LBA STATUS (SBC-3 5.40, 5.28, 5.5).
 *
 * What is unmapped is zeroed by the chain, to the byte, as a hole where the
 * backing makes holes: LBPRZ is told because it is so.  Without such a backing
 * nothing of this is offered but WRITE SAME, which writes. */
#include <string.h>

#include "scsi/internal.h"

#define REFUSED 0xe0u
#define ANCHOR 0x10u
#define UNMAP 0x08u
#define NDOB 0x01u

/* ---- WRITE SAME ------------------------------------------------------------------- */

bool scsi_write_same_prepare(struct vrep_scsi_task *task)
{
    bool no_data = task->opcode->length == 16 && (task->cdb[1] & NDOB) != 0;
    if (!scsi_check(task, REFUSED | ANCHOR, 0))
        return false;
    if ((task->cdb[1] & UNMAP) != 0 && !task->unit->thin)
        return scsi_refuse_cdb(task, 1);
    uint64_t bytes = (uint64_t)task->blocks * task->unit->block_bytes;
    if (task->blocks == 0 || bytes > SCSI_WRITE_SAME_BYTES_MAX) /* WSNZ */
        return scsi_refuse_cdb(task, task->opcode->length == 16 ? 10 : 7);
    uint32_t sent = no_data ? 0 : task->unit->block_bytes;
    task->data_out = sent;
    if (task->out_expected != sent)
        return scsi_refuse(task, VREP_SENSE_DATA_OUT_SIZE);
    return scsi_take_out(task, sent);
}

static void same_next(struct vrep_scsi_task *task);

static void same_done(struct vrep_scsi_task *task, int status)
{
    if (status != VREP_OK) {
        scsi_fail_status(task, status, true);
        return;
    }
    task->at += task->step.length;
    task->left -= task->step.length;
    same_next(task);
}

static void same_next(struct vrep_scsi_task *task)
{
    if (task->left == 0) {
        scsi_good(task);
        return;
    }
    uint64_t part = task->left < SCSI_PATTERN_BYTES ? task->left : SCSI_PATTERN_BYTES;
    scsi_step(task, VREP_OP_WRITE, task->unit->write_through ? VREP_COMMAND_FUA : 0,
              task->lba * task->unit->block_bytes + task->at, part, 0, same_done);
}

static bool all_zero(const uint8_t *bytes, uint32_t length)
{
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0;
}

void scsi_write_same(struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    task->at = 0;
    task->left = (uint64_t)task->blocks * unit->block_bytes;
    if (task->data_out != 0 && !all_zero(scsi_buffer(task), unit->block_bytes)) {
        same_next(task); /* UNMAP may be ignored where the data are not what it would leave */
        return;
    }
    uint8_t flags = (task->cdb[1] & UNMAP) != 0 ? 0 : VREP_COMMAND_NO_HOLE;
    if (unit->write_through)
        flags |= VREP_COMMAND_FUA;
    scsi_step(task, VREP_OP_ZERO, flags, task->lba * unit->block_bytes, task->left, 0,
              scsi_written);
}

/* ---- UNMAP ------------------------------------------------------------------------------ */

bool scsi_unmap_prepare(struct vrep_scsi_task *task)
{
    if ((task->cdb[1] & 1u) != 0) /* ANCHOR */
        return scsi_refuse_cdb(task, 1);
    return scsi_take_parameters(task, vrep_be_load_u16(task->cdb + 7));
}

static void unmap_next(struct vrep_scsi_task *task);

static void unmapped(struct vrep_scsi_task *task, int status)
{
    if (status != VREP_OK) {
        scsi_fail_status(task, status, true);
        return;
    }
    task->at++;
    unmap_next(task);
}

static void unmap_next(struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    for (; task->at < task->left; task->at++) {
        const uint8_t *descriptor = scsi_buffer(task) + 8 + task->at * 16;
        uint32_t blocks = vrep_be_load_u32(descriptor + 8);
        if (blocks == 0)
            continue;
        scsi_step(task, VREP_OP_ZERO, unit->write_through ? VREP_COMMAND_FUA : 0,
                  vrep_be_load_u64(descriptor) * unit->block_bytes,
                  (uint64_t)blocks * unit->block_bytes, 0, unmapped);
        return;
    }
    scsi_good(task);
}

/* Everything is checked before anything is unmapped. */
void scsi_unmap(struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    uint64_t blocks = scsi_blocks(unit);
    if (task->data_out == 0) {
        scsi_good(task);
        return;
    }
    if (task->out_bytes < 8 || task->out_bytes < task->data_out) {
        scsi_fail(task, VREP_SENSE_PARAMETER_LIST_LENGTH);
        return;
    }
    const uint8_t *list = scsi_buffer(task);
    uint32_t descriptors = vrep_be_load_u16(list + 2);
    if (descriptors % 16 != 0) /* SBC-3: the last, incomplete one is not used */
        descriptors -= descriptors % 16;
    if (descriptors > task->out_bytes - 8)
        descriptors = (task->out_bytes - 8) / 16 * 16;
    uint32_t count = descriptors / 16;
    if (count > SCSI_UNMAP_DESCRIPTORS_MAX) {
        scsi_fail_parameter(task, 2);
        return;
    }
    uint64_t total = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t lba = vrep_be_load_u64(list + 8 + (size_t)i * 16);
        uint32_t length = vrep_be_load_u32(list + 8 + (size_t)i * 16 + 8);
        if (lba > blocks || length > blocks - lba) {
            scsi_fail(task, VREP_SENSE_LBA_RANGE);
            return;
        }
        total += length;
        if (total > SCSI_UNMAP_BLOCKS_MAX || length > UINT32_MAX / unit->block_bytes) {
            scsi_fail_parameter(task, (uint16_t)(8 + i * 16 + 8));
            return;
        }
    }
    task->at = 0;
    task->left = count;
    unmap_next(task);
}

/* ---- GET LBA STATUS ------------------------------------------------------------------------ */

#define STATUS_DESCRIPTORS_MAX 256u
#define STATUS_STEPS_MAX 480u /* each may be a system call */

bool scsi_lba_status_prepare(struct vrep_scsi_task *task)
{
    task->lba = vrep_be_load_u64(task->cdb + 2);
    task->blocks = vrep_be_load_u32(task->cdb + 10);
    if (task->lba >= scsi_blocks(task->unit))
        return scsi_refuse(task, VREP_SENSE_LBA_RANGE);
    if (task->blocks < 24)
        return scsi_refuse_cdb(task, 10);
    if (!scsi_take_buffer(task, VREP_BUFFER_SMALL_BYTES))
        return false;
    memset(scsi_buffer(task), 0, VREP_BUFFER_SMALL_BYTES);
    return true;
}

/* Whole blocks that are alike from `at` on, at least one; what is a hole only in part is mapped.  A
 * block of a view that is not present yet belongs to somebody else: mapped. */
static int extent(const struct scsi_unit *unit, uint64_t at, uint64_t end, uint64_t *length,
                  bool *hole)
{
    struct vrep_disk *disk = vrep_group_disk(unit->target->group, unit->disk);
    uint64_t most = end - at, absent, absent_length;
    if (vrep_disk_is_overlay(disk) &&
        vrep_overlay_absent(disk, at, most, &absent, &absent_length)) {
        if (absent <= at) {
            uint64_t stop = absent + absent_length;
            *hole = false;
            *length = stop - at < most ? stop - at : most;
            return VREP_OK;
        }
        most = absent - at;
    }
    int status = vrep_disk_extent(disk, at, most, length, hole);
    if (status != VREP_OK)
        return status;
    uint64_t block = unit->block_bytes;
    if (*hole && *length >= block) {
        *length -= *length % block;
    } else {
        *hole = false;
        *length = (*length + block - 1) / block * block;
        if (*length == 0)
            *length = block;
    }
    return VREP_OK;
}

void scsi_lba_status(struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    uint8_t *out = scsi_buffer(task);
    uint64_t block = unit->block_bytes;
    uint64_t at = task->lba * block, end = scsi_blocks(unit) * block;
    uint32_t count = 0, steps = 0;
    uint32_t most = (task->blocks - 8) / 16;
    if (most > STATUS_DESCRIPTORS_MAX)
        most = STATUS_DESCRIPTORS_MAX;
    if (at >= end) {
        scsi_fail(task, VREP_SENSE_LBA_RANGE);
        return;
    }
    while (at < end && steps++ < STATUS_STEPS_MAX) {
        uint64_t length;
        bool hole;
        int status = extent(unit, at, end, &length, &hole);
        if (status != VREP_OK) {
            scsi_fail_status(task, status, false);
            return;
        }
        uint64_t blocks = length / block;
        uint8_t *last = out + 8 + (size_t)(count > 0 ? count - 1 : 0) * 16;
        uint64_t joined = count > 0 ? vrep_be_load_u32(last + 8) : 0;
        if (blocks > UINT32_MAX - joined)
            blocks = UINT32_MAX - joined;
        if (count > 0 && last[12] == (hole ? 1 : 0) && blocks > 0) {
            vrep_be_store_u32(last + 8, (uint32_t)(joined + blocks));
        } else {
            if (count == most)
                break;
            blocks = length / block < UINT32_MAX ? length / block : UINT32_MAX;
            last = out + 8 + (size_t)count++ * 16;
            vrep_be_store_u64(last, at / block);
            vrep_be_store_u32(last + 8, (uint32_t)blocks);
            last[12] = hole ? 1 : 0;
        }
        at += blocks * block;
    }
    vrep_be_store_u32(out, 4 + count * 16);
    scsi_good_data(task, 8 + count * 16, task->blocks);
}
