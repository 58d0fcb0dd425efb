/* Block: READ, WRITE, SYNCHRONIZE CACHE, PRE-FETCH, READ CAPACITY (SBC-3 5). */
#include "scsi/internal.h"

#define PROTECT_MASK 0xe0u
#define FUA 0x08u

/* Fields that all of these have.  `most`: bytes that a task may move, 0: any. */
bool scsi_check(struct vrep_scsi_task *task, uint8_t refused, uint64_t most)
{
    scsi_decode(task);
    if (task->opcode->length != 6 && (task->cdb[1] & refused) != 0)
        return scsi_refuse_cdb(task, 1);
    if (!scsi_in_range(task)) {
        task->why.has_information = true;
        task->why.information = task->lba;
        return scsi_refuse(task, VREP_SENSE_LBA_RANGE);
    }
    if (most != 0 && (uint64_t)task->blocks * task->unit->block_bytes > most)
        return scsi_refuse_cdb(task, task->opcode->length == 16   ? 10
                                     : task->opcode->length == 12 ? 6
                                                                  : 7);
    return true;
}

static bool force_unit_access(const struct vrep_scsi_task *task)
{
    return task->opcode->length != 6 && (task->cdb[1] & FUA) != 0;
}

uint8_t scsi_write_flags(const struct vrep_scsi_task *task)
{
    return task->unit->write_through || force_unit_access(task) ? VREP_COMMAND_FUA : 0;
}

/* ---- READ ----------------------------------------------------------------------- */

bool scsi_read_prepare(struct vrep_scsi_task *task)
{
    if (!scsi_check(task, PROTECT_MASK, VREP_SCSI_DATA_MAX))
        return false;
    return task->blocks == 0 || scsi_take_buffer(task, task->blocks * task->unit->block_bytes);
}

static void was_read(struct vrep_scsi_task *task, int status)
{
    uint32_t bytes = task->blocks * task->unit->block_bytes;
    if (status == VREP_OK) {
        scsi_good_data(task, bytes, bytes);
        return;
    }
    task->why.has_information = true;
    task->why.information = task->lba;
    scsi_fail_status(task, status, false);
}

static void read_now(struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    scsi_step(task, VREP_OP_READ, 0, task->lba * unit->block_bytes,
              (uint64_t)task->blocks * unit->block_bytes, 0, was_read);
}

static void synced_for_read(struct vrep_scsi_task *task, int status)
{
    if (status == VREP_OK)
        read_now(task);
    else
        scsi_fail_status(task, status, true);
}

void scsi_read(struct vrep_scsi_task *task)
{
    if (task->blocks == 0)
        scsi_good(task);
    else if (force_unit_access(task)) /* what is read then stands on the medium */
        scsi_step(task, VREP_OP_FLUSH, 0, 0, 0, 0, synced_for_read);
    else
        read_now(task);
}

/* ---- WRITE ------------------------------------------------------------------------ */

bool scsi_take_command(struct vrep_scsi_task *task, uint64_t bytes, const uint8_t *expect,
                       uint8_t *found)
{
    struct vrep_command *command = vrep_command_get(task->target->group);
    if (command == NULL)
        return false;
    command->op = VREP_OP_WRITE;
    command->flags = scsi_write_flags(task);
    command->disk = task->unit->disk;
    command->offset = task->lba * task->unit->block_bytes;
    command->length = bytes;
    command->expect = expect;
    command->found = found;
    task->command = command;
    int status = vrep_command_prepare(command);
    if (status == VREP_OK)
        return true;
    vrep_command_put(command);
    task->command = NULL;
    return status == VREP_E_AGAIN ? false : scsi_refuse(task, vrep_sense_of_status(status, true));
}

bool scsi_write_prepare(struct vrep_scsi_task *task)
{
    if (!scsi_check(task, PROTECT_MASK, VREP_SCSI_DATA_MAX))
        return false;
    uint32_t block = task->unit->block_bytes;
    task->data_out = task->blocks * block;
    uint32_t bytes = task->data_out < task->out_expected ? task->data_out : task->out_expected;
    if (bytes % block != 0) /* a part of a block cannot be written */
        return scsi_refuse(task, VREP_SENSE_DATA_OUT_SIZE);
    task->out_bytes = bytes;
    if (bytes == 0)
        return true;
    if (!scsi_take_command(task, bytes, NULL, NULL))
        return false;
    task->out = task->command->iov;
    task->out_count = task->command->iovcnt;
    return true;
}

/* Atomic against power loss is what the store writes as one: a block. */
bool scsi_write_atomic_prepare(struct vrep_scsi_task *task)
{
    task->lba = vrep_be_load_u64(task->cdb + 2);
    task->blocks = vrep_be_load_u16(task->cdb + 12);
    if (vrep_be_load_u16(task->cdb + 10) != 0) /* ATOMIC BOUNDARY */
        return scsi_refuse_cdb(task, 10);
    if (task->blocks > 1 && scsi_in_range(task))
        return scsi_refuse_cdb(task, 12);
    return scsi_write_prepare(task);
}

void scsi_written(struct vrep_scsi_task *task, int status)
{
    if (status == VREP_OK)
        scsi_good(task);
    else
        scsi_fail_status(task, status, true);
}

void scsi_write(struct vrep_scsi_task *task)
{
    if (task->command == NULL)
        scsi_good(task);
    else
        scsi_start(task, scsi_written);
}

/* ---- SYNCHRONIZE CACHE, PRE-FETCH ---------------------------------------------------- */

bool scsi_sync_prepare(struct vrep_scsi_task *task)
{
    return scsi_check(task, 0, 0);
}

/* All of the cache, whatever range is named; IMMED is answered late, which it allows. */
void scsi_sync(struct vrep_scsi_task *task)
{
    scsi_step(task, VREP_OP_FLUSH, 0, 0, 0, 0, scsi_written);
}

bool scsi_prefetch_prepare(struct vrep_scsi_task *task)
{
    return scsi_check(task, 0, 0);
}

/* Advice that is not taken: GOOD says that not all of it is in a cache. */
void scsi_prefetch(struct vrep_scsi_task *task)
{
    scsi_good(task);
}

/* ---- READ CAPACITY -------------------------------------------------------------------- */

static uint8_t blocks_per_physical(const struct scsi_unit *unit)
{
    uint8_t exponent = 0;
    while (exponent < 15 && (2u << exponent) <= unit->granularity)
        exponent++;
    return (1u << exponent) == unit->granularity ? exponent : 0;
}

void scsi_read_capacity(struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    uint8_t *out = scsi_buffer(task);
    uint64_t last = scsi_blocks(unit) - 1;
    if (task->opcode->length == 10) {
        if ((task->cdb[8] & 1u) == 0 && vrep_be_load_u32(task->cdb + 2) != 0) {
            (void)scsi_refuse_cdb(task, 2);
            scsi_fail(task, VREP_SENSE_FIELD_IN_CDB);
            return;
        }
        vrep_be_store_u32(out, last < UINT32_MAX ? (uint32_t)last : UINT32_MAX);
        vrep_be_store_u32(out + 4, unit->block_bytes);
        scsi_good_data(task, 8, 8);
        return;
    }
    vrep_be_store_u64(out, last);
    vrep_be_store_u32(out + 8, unit->block_bytes);
    out[13] = blocks_per_physical(unit);
    if (unit->thin)
        out[14] = 0xc0; /* LBPME, LBPRZ */
    scsi_good_data(task, 32, task->blocks);
}
