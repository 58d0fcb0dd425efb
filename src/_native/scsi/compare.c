/* Compare: VERIFY, WRITE AND VERIFY, COMPARE AND WRITE (SBC-3 5.2, 5.27, 5.34).
 *
 * The buffer of a task holds what the initiator sent, and behind it, at
 * `scratch`, a part of the medium at a time. */
#include <string.h>

#include "scsi/internal.h"

#define REFUSED 0xe0u

static uint8_t byte_check(const struct vrep_scsi_task *task)
{
    return task->cdb[1] >> 1 & 3u;
}

/* Bytes of data-out for one BYTCHK. */
static uint32_t sent_bytes(const struct vrep_scsi_task *task)
{
    uint32_t block = task->unit->block_bytes;
    if (task->blocks == 0)
        return 0;
    return byte_check(task) == 0 ? 0 : byte_check(task) == 1 ? task->blocks * block : block;
}

/* A buffer for `sent` bytes and for as much of the medium as is compared at a time. */
static bool take_scratch(struct vrep_scsi_task *task, uint32_t sent)
{
    uint64_t bytes = (uint64_t)task->blocks * task->unit->block_bytes;
    uint32_t part = bytes < SCSI_CONTIGUOUS ? (uint32_t)bytes : SCSI_CONTIGUOUS;
    task->scratch = sent;
    if (sent + part > VREP_BUFFER_SMALL_BYTES) /* it begins at a page of its own */
        task->scratch = (sent + SCSI_CONTIGUOUS - 1) / SCSI_CONTIGUOUS * SCSI_CONTIGUOUS;
    return scsi_take_buffer(task, task->scratch + part);
}

bool scsi_verify_prepare(struct vrep_scsi_task *task)
{
    /* Data move only with BYTCHK 1: without, any length is read part by part. */
    bool sends = byte_check(task) == 1;
    if (!scsi_check(task, REFUSED, sends ? VREP_SCSI_DATA_MAX : 0))
        return false;
    if (byte_check(task) == 2)
        return scsi_refuse_cdb(task, 1);
    if (task->blocks == 0)
        return true;
    uint32_t sent = sent_bytes(task);
    task->data_out = sent;
    if (task->out_expected < sent)
        return scsi_refuse(task, VREP_SENSE_DATA_OUT_SIZE);
    return take_scratch(task, sent) && scsi_take_out(task, sent);
}

/* The first byte of the part of `bytes` bytes, `at` from the begin, that is not what was sent;
 * UINT64_MAX: none. */
static uint64_t first_difference(const struct vrep_scsi_task *task, uint64_t at, uint32_t bytes)
{
    uint32_t block = task->unit->block_bytes;
    bool repeats = byte_check(task) == 3; /* one block, against each */
    for (uint32_t done = 0; done < bytes;) {
        uint64_t sent_at = repeats ? (at + done) % block : at + done;
        uint32_t length = bytes - done, found_length = bytes - done;
        const uint8_t *sent = scsi_buffer_at(task, (uint32_t)sent_at, &length);
        const uint8_t *found = scsi_buffer_at(task, task->scratch + done, &found_length);
        if (found_length < length)
            length = found_length;
        if (repeats && length > block - (uint32_t)sent_at)
            length = block - (uint32_t)sent_at;
        if (sent == NULL || found == NULL || length == 0)
            return at + done;
        if (memcmp(sent, found, length) != 0) {
            uint32_t i = 0;
            while (sent[i] == found[i])
                i++;
            return at + done + i;
        }
        done += length;
    }
    return UINT64_MAX;
}

static void verify_next(struct vrep_scsi_task *task);

static void verified(struct vrep_scsi_task *task, int status)
{
    uint32_t bytes = (uint32_t)task->step.length;
    if (status != VREP_OK) {
        task->why.has_information = true;
        task->why.information = task->lba + task->at / task->unit->block_bytes;
        scsi_fail_status(task, status, false);
        return;
    }
    if (byte_check(task) != 0) {
        uint64_t differs = first_difference(task, task->at, bytes);
        if (differs != UINT64_MAX) {
            task->why.has_information = true;
            task->why.information = differs;
            scsi_fail(task, VREP_SENSE_MISCOMPARE);
            return;
        }
    }
    task->at += bytes;
    task->left -= bytes;
    verify_next(task);
}

static void verify_next(struct vrep_scsi_task *task)
{
    if (task->left == 0) {
        scsi_good(task);
        return;
    }
    uint64_t part = task->left < SCSI_CONTIGUOUS ? task->left : SCSI_CONTIGUOUS;
    scsi_step(task, VREP_OP_READ, 0, task->lba * task->unit->block_bytes + task->at, part,
              task->scratch, verified);
}

void scsi_verify(struct vrep_scsi_task *task)
{
    task->at = 0;
    task->left = (uint64_t)task->blocks * task->unit->block_bytes;
    verify_next(task);
}

/* ---- WRITE AND VERIFY ---------------------------------------------------------------- */

bool scsi_write_verify_prepare(struct vrep_scsi_task *task)
{
    if (!scsi_check(task, REFUSED, VREP_SCSI_DATA_MAX))
        return false;
    if (byte_check(task) > 1)
        return scsi_refuse_cdb(task, 1);
    uint32_t block = task->unit->block_bytes;
    task->data_out = task->blocks * block;
    uint32_t bytes = task->data_out < task->out_expected ? task->data_out : task->out_expected;
    if (bytes % block != 0)
        return scsi_refuse(task, VREP_SENSE_DATA_OUT_SIZE);
    task->left = bytes;
    if (bytes == 0)
        return true;
    /* Received into the buffer, which stays for the comparison, and copied from there. */
    if (!take_scratch(task, bytes) || !scsi_take_out(task, bytes))
        return false;
    task->data_out = task->blocks * block;
    if (!scsi_take_command(task, bytes, NULL, NULL))
        return false;
    task->command->flags |= VREP_COMMAND_FUA; /* it is verified on the medium */
    return true;
}

static void copy_out(const struct vrep_scsi_task *task, uint32_t from, uint64_t bytes)
{
    const struct vrep_command *command = task->command;
    for (int i = 0; i < command->iovcnt && bytes > 0; i++) {
        uint8_t *to = command->iov[i].iov_base;
        size_t left = command->iov[i].iov_len < bytes ? command->iov[i].iov_len : (size_t)bytes;
        bytes -= left;
        while (left > 0) {
            uint32_t part = left < UINT32_MAX ? (uint32_t)left : UINT32_MAX;
            const uint8_t *sent = scsi_buffer_at(task, from, &part);
            if (part == 0)
                return;
            memcpy(to, sent, part);
            to += part;
            from += part;
            left -= part;
        }
    }
}

static void written_to_verify(struct vrep_scsi_task *task, int status)
{
    if (status != VREP_OK) {
        scsi_fail_status(task, status, true);
        return;
    }
    task->at = 0;
    verify_next(task);
}

void scsi_write_verify(struct vrep_scsi_task *task)
{
    if (task->command == NULL) {
        scsi_good(task);
        return;
    }
    copy_out(task, 0, task->left);
    scsi_start(task, written_to_verify);
}

/* ---- COMPARE AND WRITE ------------------------------------------------------------------ */

/* Buffer: what is expected, then room for what is found; both in one part of it.  What is to be
 * written goes straight into the command. */
bool scsi_compare_write_prepare(struct vrep_scsi_task *task)
{
    uint32_t block = task->unit->block_bytes;
    uint32_t most = SCSI_COMPARE_BYTES_MAX / block;
    task->lba = vrep_be_load_u64(task->cdb + 2);
    task->blocks = task->cdb[13];
    if ((task->cdb[1] & REFUSED) != 0)
        return scsi_refuse_cdb(task, 1);
    if (!scsi_in_range(task))
        return scsi_refuse(task, VREP_SENSE_LBA_RANGE);
    if (task->blocks > most)
        return scsi_refuse_cdb(task, 13);
    uint32_t bytes = task->blocks * block;
    task->data_out = 2 * bytes;
    if (task->out_expected != task->data_out)
        return scsi_refuse_cdb(task, 13);
    if (bytes == 0)
        return true;
    if (!scsi_take_buffer(task, 2 * bytes))
        return false;
    uint8_t *expect = scsi_buffer(task);
    if (!scsi_take_command(task, bytes, expect, expect + bytes))
        return false;
    task->iov[0] = (struct iovec){.iov_base = expect, .iov_len = bytes};
    int count = task->command->iovcnt;
    if (count > (int)VREP_BUFFER_PAGES_MAX + 1)
        return scsi_refuse(task, VREP_SENSE_INTERNAL);
    memcpy(task->iov + 1, task->command->iov, (size_t)count * sizeof *task->iov);
    task->out = task->iov;
    task->out_count = 1 + count;
    task->out_bytes = 2 * bytes;
    return true;
}

static void compared(struct vrep_scsi_task *task, int status)
{
    if (status != VREP_OK)
        scsi_fail_status(task, status, true);
    else if (task->why.has_information)
        scsi_fail(task, VREP_SENSE_MISCOMPARE);
    else
        scsi_good(task);
}

void scsi_compare_write(struct vrep_scsi_task *task)
{
    if (task->command == NULL)
        scsi_good(task);
    else
        scsi_start(task, compared);
}
