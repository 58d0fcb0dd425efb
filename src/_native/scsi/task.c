/* Task: a command from its CDB to its status.  Tasks of a unit stand in its
 * task set in the order in which they came; SIMPLE ones start at once, ORDERED
 * ones when all before them have ended, and nothing starts while aborted ones
 * are still in the chain. */
#include <string.h>

#include "scsi/internal.h"

static void drive(struct vrep_scsi_task *task);

/* ---- memory ------------------------------------------------------------------ */

bool scsi_take_buffer(struct vrep_scsi_task *task, uint32_t bytes)
{
    return vrep_buffers_take(task->target->buffers, bytes, &task->buffer);
}

uint8_t *scsi_buffer_at(const struct vrep_scsi_task *task, uint32_t at, uint32_t *length)
{
    struct iovec part;
    if (vrep_buffers_iov(task->target->buffers, &task->buffer, at, &part, 1) != 1) {
        *length = 0;
        return NULL;
    }
    if (part.iov_len < *length)
        *length = (uint32_t)part.iov_len;
    return part.iov_base;
}

uint8_t *scsi_buffer(const struct vrep_scsi_task *task)
{
    uint32_t length = SCSI_CONTIGUOUS;
    return scsi_buffer_at(task, 0, &length);
}

/* The first `bytes` bytes from `at` on. */
static int buffer_iov(struct vrep_scsi_task *task, uint32_t at, uint32_t bytes, struct iovec *iov)
{
    int count =
        vrep_buffers_iov(task->target->buffers, &task->buffer, at, iov, (int)VREP_BUFFER_PAGES_MAX);
    for (int i = 0; i < count; i++) {
        if (iov[i].iov_len >= bytes) {
            iov[i].iov_len = bytes;
            return i + 1;
        }
        bytes -= (uint32_t)iov[i].iov_len;
    }
    return count;
}

bool scsi_take_out(struct vrep_scsi_task *task, uint32_t bytes)
{
    task->data_out = bytes;
    task->out_bytes = bytes < task->out_expected ? bytes : task->out_expected;
    if (bytes == 0)
        return true;
    if (task->buffer.parts == 0 && !scsi_take_buffer(task, bytes))
        return false;
    task->out = task->iov;
    task->out_count = buffer_iov(task, 0, task->out_bytes, task->iov);
    return true;
}

bool scsi_take_parameters(struct vrep_scsi_task *task, uint32_t bytes)
{
    if (bytes > SCSI_PARAMETERS_MAX)
        return scsi_refuse(task, VREP_SENSE_PARAMETER_LIST_LENGTH);
    return scsi_take_out(task, bytes);
}

/* ---- the end -------------------------------------------------------------------- */

static void unlink_task(struct vrep_scsi_task *task)
{
    struct scsi_unit *unit = task->unit;
    if (task->before != NULL)
        task->before->after = task->after;
    else
        unit->first = task->after;
    if (task->after != NULL)
        task->after->before = task->before;
    else
        unit->last = task->before;
    unit->tasks--;
    if (task->attribute == VREP_SCSI_ORDERED)
        unit->ordered--;
    if (task->stage == STAGE_WAITING)
        unit->waiting--;
    if (task->stage == STAGE_RUNNING && task->aborted)
        unit->dying--;
}

static void finish(struct vrep_scsi_task *task)
{
    struct vrep_scsi_target *target = task->target;
    struct vrep_scsi_nexus *nexus = task->nexus;
    bool descriptor = task->unit->descriptor_sense;
    unlink_task(task);
    task->stage = STAGE_DONE;
    if (task->gone != NULL)
        *task->gone = true;
    task->gone = NULL;
    if (task->command != NULL)
        vrep_command_put(task->command);
    task->command = NULL;
    task->sense_bytes = 0;
    if (task->status == VREP_SCSI_CHECK_CONDITION)
        task->sense_bytes = (uint8_t)vrep_sense_encode(&task->why, descriptor, task->sense);
    if (task->status != VREP_SCSI_GOOD || task->aborted)
        task->in_bytes = 0;
    nexus->tasks--;
    if (nexus->closed && nexus->tasks == 0)
        scsi_nexus_release(nexus);
    task->done(task);
    scsi_settle(target);
}

void scsi_good(struct vrep_scsi_task *task)
{
    task->status = VREP_SCSI_GOOD;
    finish(task);
}

void scsi_good_data(struct vrep_scsi_task *task, uint32_t bytes, uint32_t allocation)
{
    task->in_bytes = bytes < allocation ? bytes : allocation;
    task->in = task->iov;
    task->in_count = task->in_bytes > 0 ? buffer_iov(task, 0, task->in_bytes, task->iov) : 0;
    scsi_good(task);
}

void scsi_conflict(struct vrep_scsi_task *task)
{
    task->status = VREP_SCSI_RESERVATION_CONFLICT;
    finish(task);
}

void scsi_fail(struct vrep_scsi_task *task, uint32_t code)
{
    task->why.code = code;
    task->status = VREP_SCSI_CHECK_CONDITION;
    finish(task);
}

void scsi_fail_status(struct vrep_scsi_task *task, int status, bool write)
{
    scsi_fail(task, vrep_sense_of_status(status, write));
}

void scsi_fail_parameter(struct vrep_scsi_task *task, uint16_t byte)
{
    task->why.has_field = true;
    task->why.field_is_cdb = false;
    task->why.field = byte;
    scsi_fail(task, VREP_SENSE_FIELD_IN_PARAMETERS);
}

bool scsi_refuse(struct vrep_scsi_task *task, uint32_t code)
{
    task->why.code = code;
    return false;
}

bool scsi_refuse_cdb(struct vrep_scsi_task *task, uint16_t byte)
{
    task->why.has_field = task->why.field_is_cdb = true;
    task->why.field = byte;
    return scsi_refuse(task, VREP_SENSE_FIELD_IN_CDB);
}

/* ---- commands of the chain ---------------------------------------------------------- */

static void command_done(struct vrep_command *command)
{
    struct vrep_scsi_task *task = command->owner;
    int status = command->status;
    if (command->mismatch != UINT64_MAX) {
        task->why.has_information = true;
        task->why.information = command->mismatch;
    }
    task->command = NULL;
    vrep_command_put(command);
    if (task->aborted)
        finish(task);
    else
        task->step.next(task, status);
}

static void starve(struct vrep_scsi_task *task)
{
    struct vrep_scsi_target *target = task->target;
    task->starved = true;
    task->next_starved = NULL;
    if (target->starved_last != NULL)
        target->starved_last->next_starved = task;
    else
        target->starved_first = task;
    target->starved_last = task;
}

static void unstarve(struct vrep_scsi_task *task)
{
    struct vrep_scsi_target *target = task->target;
    struct vrep_scsi_task *before = NULL;
    for (struct vrep_scsi_task *at = target->starved_first; at != task; at = at->next_starved)
        before = at;
    if (before != NULL)
        before->next_starved = task->next_starved;
    else
        target->starved_first = task->next_starved;
    if (target->starved_last == task)
        target->starved_last = before;
    task->starved = false;
}

/* The block at the buffer's begin, over and over. */
static void fill_pattern(const struct vrep_scsi_task *task, const struct vrep_command *command)
{
    const uint8_t *block = scsi_buffer(task);
    uint32_t block_bytes = task->unit->block_bytes, at = 0;
    for (int i = 0; i < command->iovcnt; i++) {
        uint8_t *to = command->iov[i].iov_base;
        size_t left = command->iov[i].iov_len;
        while (left > 0) {
            size_t n = block_bytes - at < left ? block_bytes - at : left;
            memcpy(to, block + at, n);
            at = (at + (uint32_t)n) % block_bytes;
            to += n;
            left -= n;
        }
    }
}

static void try_step(struct vrep_scsi_task *task)
{
    if (task->aborted) {
        finish(task);
        return;
    }
    struct vrep_command *command = vrep_command_get(task->target->group);
    if (command == NULL) {
        starve(task);
        return;
    }
    command->op = task->step.op;
    command->flags = task->step.flags;
    command->disk = task->unit->disk;
    command->offset = task->step.offset;
    command->length = task->step.length;
    command->done = command_done;
    command->owner = task;
    if (command->op == VREP_OP_READ) {
        command->iov = task->iov;
        command->iovcnt = buffer_iov(task, task->step.at, (uint32_t)task->step.length, task->iov);
    }
    int status = vrep_command_prepare(command);
    if (status != VREP_OK) {
        vrep_command_put(command);
        if (status == VREP_E_AGAIN)
            starve(task);
        else
            task->step.next(task, status);
        return;
    }
    if (command->op == VREP_OP_WRITE)
        fill_pattern(task, command);
    task->command = command;
    vrep_command_submit(command);
}

/* A loop, not recursion: steps may end inside their start. */
static void drive(struct vrep_scsi_task *task)
{
    bool gone = false;
    task->gone = &gone;
    task->driving = true;
    while (!gone && task->pending) {
        task->pending = false;
        try_step(task);
    }
    if (gone)
        return;
    task->driving = false;
    task->gone = NULL;
}

void scsi_step(struct vrep_scsi_task *task, uint8_t op, uint8_t flags, uint64_t offset,
               uint64_t length, uint32_t at, vrep_scsi_step *next)
{
    task->step.op = op;
    task->step.flags = flags;
    task->step.offset = offset;
    task->step.length = length;
    task->step.at = at;
    task->step.next = next;
    task->pending = true;
    if (!task->driving)
        drive(task);
}

void scsi_start(struct vrep_scsi_task *task, vrep_scsi_step *next)
{
    task->step.next = next;
    task->command->done = command_done;
    task->command->owner = task;
    vrep_command_submit(task->command);
}

void vrep_scsi_wakeup(struct vrep_scsi_target *target)
{
    struct vrep_scsi_task *last = target->starved_last;
    while (target->starved_first != NULL) {
        struct vrep_scsi_task *task = target->starved_first;
        bool end = task == last;
        unstarve(task);
        task->pending = true;
        drive(task);
        if (end)
            return;
    }
}

/* ---- prepare -------------------------------------------------------------------------- */

static void enter_set(struct vrep_scsi_task *task)
{
    struct scsi_unit *unit = task->unit;
    task->stage = STAGE_PREPARED;
    task->serial = ++task->target->serial;
    task->after = NULL;
    task->before = unit->last;
    if (unit->last != NULL)
        unit->last->after = task;
    else
        unit->first = task;
    unit->last = task;
    unit->tasks++;
    if (task->attribute == VREP_SCSI_ORDERED)
        unit->ordered++;
    task->nexus->tasks++;
}

static void reset_task(struct vrep_scsi_task *task)
{
    task->out = task->in = NULL;
    task->out_count = task->in_count = 0;
    task->out_bytes = task->in_bytes = task->data_out = 0;
    task->status = VREP_SCSI_GOOD;
    task->aborted = task->starved = task->driving = task->pending = false;
    task->gone = NULL;
    task->command = NULL;
    task->buffer.parts = 0;
    task->buffer.bytes = 0;
    task->sense_bytes = 0;
    task->why = (struct vrep_sense){0};
    task->scratch = 0;
    task->at = task->left = 0;
}

int vrep_scsi_prepare(struct vrep_scsi_task *task)
{
    reset_task(task);
    task->target = task->nexus->target;
    task->unit = scsi_unit_of(task->target, task->lun);
    task->opcode = scsi_opcode_find(task->cdb);
    const struct scsi_opcode *opcode = task->opcode;
    if (task->unit->tasks >= SCSI_TASKS_MAX) {
        task->status = VREP_SCSI_TASK_SET_FULL;
    } else if (opcode == NULL) {
        if (scsi_opcode_known(task->cdb[0]))
            (void)scsi_refuse_cdb(task, 1);
        else
            (void)scsi_refuse(task, VREP_SENSE_OPCODE);
    } else if (task->unit->absent && (opcode->flags & OPCODE_ANY_UNIT) == 0) {
        (void)scsi_refuse(task, VREP_SENSE_NO_UNIT);
    } else if ((opcode->flags & OPCODE_THIN) != 0 && !task->unit->thin) {
        (void)scsi_refuse(task, VREP_SENSE_OPCODE);
    } else if ((task->cdb[opcode->length - 1] & 4u) != 0) {
        (void)scsi_refuse_cdb(task, (uint16_t)(opcode->length - 1)); /* NACA */
    } else if (task->attribute > VREP_SCSI_HEAD_OF_QUEUE) {
        (void)scsi_refuse(task, VREP_SENSE_INTERNAL); /* there is no ACA to be part of */
    } else if (!opcode->prepare(task)) {
        if (task->command != NULL)
            vrep_command_put(task->command);
        task->command = NULL;
        vrep_buffers_give(task->target->buffers, &task->buffer);
        task->out = NULL;
        task->out_count = 0;
        task->out_bytes = 0;
        if (task->why.code == VREP_SENSE_NONE)
            return VREP_E_AGAIN;
    }
    enter_set(task);
    return VREP_OK;
}

void vrep_scsi_end(struct vrep_scsi_task *task)
{
    if (task->stage == STAGE_FREE)
        return;
    if (task->stage == STAGE_PREPARED) { /* never submitted */
        struct vrep_scsi_nexus *nexus = task->nexus;
        struct vrep_scsi_target *target = task->target;
        unlink_task(task);
        if (task->command != NULL)
            vrep_command_put(task->command);
        task->command = NULL;
        nexus->tasks--;
        vrep_buffers_give(target->buffers, &task->buffer);
        task->stage = STAGE_FREE;
        if (nexus->closed && nexus->tasks == 0)
            scsi_nexus_release(nexus);
        scsi_settle(target);
        return;
    }
    vrep_buffers_give(task->target->buffers, &task->buffer);
    task->stage = STAGE_FREE;
}

bool vrep_scsi_task_live(const struct vrep_scsi_task *task)
{
    return task->stage == STAGE_WAITING || task->stage == STAGE_RUNNING;
}

/* ---- run -------------------------------------------------------------------------------- */

static bool may_start(const struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    if (unit->dying > 0)
        return false;
    if (unit->storing != NULL && task->opcode != NULL && task->opcode->run == scsi_persistent_out)
        return false;
    if (task->attribute == VREP_SCSI_HEAD_OF_QUEUE || unit->ordered == 0)
        return true;
    for (const struct vrep_scsi_task *at = unit->first; at != task; at = at->after)
        if (task->attribute == VREP_SCSI_ORDERED || at->attribute == VREP_SCSI_ORDERED)
            return false;
    return true;
}

static bool write_protected(const struct scsi_unit *unit)
{
    struct vrep_disk_info info = {0};
    struct vrep_disk *disk = vrep_group_disk(unit->target->group, unit->disk);
    return vrep_disk_info(disk, &info) == VREP_OK && info.read_only;
}

/* What stands in the way: what the unit cannot do at all, then what it cannot do now, then what
 * prepare found wrong in the CDB.  NONE: nothing. */
static uint32_t obstacle(const struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    uint8_t flags = task->opcode != NULL ? task->opcode->flags : 0;
    if (unit->absent || task->why.code == VREP_SENSE_OPCODE)
        return task->why.code;
    if (unit->stopped && (flags & OPCODE_MEDIUM) != 0)
        return scsi_not_ready(unit);
    if ((flags & OPCODE_CHANGES) != 0 && unit->software_protect)
        return VREP_SENSE_SOFTWARE_PROTECTED;
    if ((flags & OPCODE_CHANGES) != 0 && write_protected(unit))
        return VREP_SENSE_WRITE_PROTECTED;
    return task->why.code;
}

static void run(struct vrep_scsi_task *task)
{
    struct scsi_unit *unit = task->unit;
    const struct scsi_opcode *opcode = task->opcode;
    unit->waiting--;
    task->stage = STAGE_RUNNING;
    if (task->status != VREP_SCSI_GOOD) {
        finish(task);
        return;
    }
    if (!unit->absent && (opcode == NULL || (opcode->flags & OPCODE_NO_ATTENTION) == 0)) {
        uint32_t attention = scsi_attention_take(unit, task->nexus);
        if (attention != VREP_SENSE_NONE) {
            task->why = (struct vrep_sense){0};
            scsi_fail(task, attention);
            return;
        }
    }
    if (opcode != NULL && !unit->absent && scsi_reserved_against(task)) {
        scsi_conflict(task);
        return;
    }
    uint32_t code = obstacle(task);
    if (code == VREP_SENSE_NONE) {
        opcode->run(task);
        return;
    }
    if (code != task->why.code)
        task->why = (struct vrep_sense){0};
    scsi_fail(task, code);
}

void vrep_scsi_submit(struct vrep_scsi_task *task)
{
    task->stage = STAGE_WAITING;
    task->unit->waiting++;
    if (may_start(task))
        run(task);
}

static bool start_one(struct scsi_unit *unit)
{
    if (unit->waiting == 0)
        return false;
    for (struct vrep_scsi_task *task = unit->first; task != NULL; task = task->after)
        if (task->stage == STAGE_WAITING && may_start(task)) {
            run(task);
            return true;
        }
    return false;
}

bool scsi_aborting_before(const struct scsi_unit *unit, uint64_t serial)
{
    if (unit->dying == 0)
        return false;
    for (const struct vrep_scsi_task *task = unit->first; task != NULL; task = task->after)
        if (task->stage == STAGE_RUNNING && task->aborted && task->serial <= serial)
            return true;
    return false;
}

static bool management_waits(const struct vrep_scsi_management *management)
{
    const struct vrep_scsi_target *target = management->nexus->target;
    if (management->unit != NULL)
        return scsi_aborting_before(management->unit, management->serial);
    for (uint32_t i = 0; i < target->units_count; i++)
        if (scsi_aborting_before(&target->units[i], management->serial))
            return true;
    return false;
}

static bool answer_one(struct vrep_scsi_target *target)
{
    struct vrep_scsi_management **at = &target->managing;
    while (*at != NULL && management_waits(*at))
        at = &(*at)->next;
    struct vrep_scsi_management *management = *at;
    if (management == NULL)
        return false;
    *at = management->next;
    management->done(management);
    return true;
}

void scsi_settle(struct vrep_scsi_target *target)
{
    target->settle_again = true;
    if (target->settling)
        return;
    target->settling = true;
    while (target->settle_again) {
        target->settle_again = false;
        for (uint32_t i = 0; i <= target->units_count; i++) {
            struct scsi_unit *unit = &target->units[i];
            if (unit->storing != NULL)
                scsi_reservations_settle(unit);
            while (start_one(unit))
                ;
        }
        while (answer_one(target))
            ;
    }
    target->settling = false;
}

/* ---- aborting ----------------------------------------------------------------------------- */

/* False: it has ended. */
static bool abort_task(struct vrep_scsi_task *task)
{
    if (task->aborted || task->stage == STAGE_DONE || task->stage == STAGE_FREE)
        return false;
    task->aborted = true;
    if (task->stage != STAGE_RUNNING) {
        finish(task);
        return true;
    }
    task->unit->dying++;
    if (task->starved) {
        unstarve(task);
        finish(task);
    }
    return true;
}

void scsi_abort(struct scsi_unit *unit, const struct vrep_scsi_nexus *nexus,
                const struct vrep_scsi_task *but)
{
    struct vrep_scsi_target *target = unit->target;
    bool outermost = !target->settling;
    target->settling = true; /* nothing starts while the set is cut down */
    struct vrep_scsi_task *task = unit->first;
    while (task != NULL) { /* from the begin again: who is told may end others */
        bool meant = task != but && (nexus == NULL || task->nexus == nexus);
        task = meant && abort_task(task) ? unit->first : task->after;
    }
    if (outermost) {
        target->settling = false;
        scsi_settle(target);
    } else {
        target->settle_again = true;
    }
}

static void reset_unit(struct scsi_unit *unit)
{
    scsi_abort(unit, NULL, NULL);
    scsi_reservations_reset(unit);
    unit->stopped = unit->ejected;
    unit->software_protect = unit->descriptor_sense = unit->write_through = false;
    for (uint32_t i = 0; i < VREP_SCSI_NEXUSES_MAX; i++)
        unit->target->nexus[i].prevents[unit->number] = false;
    scsi_attention_others(unit, NULL, ATTENTION_UNIT_RESET);
}

static void clear_set(struct scsi_unit *unit, const struct vrep_scsi_nexus *by)
{
    for (struct vrep_scsi_task *task = unit->first; task != NULL; task = task->after)
        if (task->nexus != by && !task->aborted)
            scsi_attention(unit, task->nexus, ATTENTION_COMMANDS_CLEARED);
    scsi_abort(unit, NULL, NULL);
}

void vrep_scsi_manage(struct vrep_scsi_management *management)
{
    struct vrep_scsi_nexus *nexus = management->nexus;
    struct vrep_scsi_target *target = nexus->target;
    struct scsi_unit *unit = scsi_unit_of(target, management->lun);
    management->serial = target->serial;
    management->unit = unit;
    management->response = VREP_SCSI_COMPLETE;
    if (management->function != VREP_SCSI_TARGET_RESET && unit->absent) {
        management->response = VREP_SCSI_NO_LUN;
        management->done(management);
        return;
    }
    bool settling = target->settling;
    target->settling = true; /* the answer comes last */
    switch (management->function) {
    case VREP_SCSI_ABORT_TASK:
        if (management->task != NULL)
            (void)abort_task(management->task);
        break;
    case VREP_SCSI_ABORT_TASK_SET:
        scsi_abort(unit, nexus, NULL);
        break;
    case VREP_SCSI_CLEAR_TASK_SET:
        clear_set(unit, nexus);
        break;
    case VREP_SCSI_UNIT_RESET:
        reset_unit(unit);
        break;
    case VREP_SCSI_TARGET_RESET:
        management->unit = NULL;
        for (uint32_t i = 0; i < target->units_count; i++)
            reset_unit(&target->units[i]);
        break;
    default:
        management->response = VREP_SCSI_REJECTED;
    }
    target->settling = settling;
    management->next = NULL;
    struct vrep_scsi_management **last = &target->managing;
    while (*last != NULL)
        last = &(*last)->next;
    *last = management;
    scsi_settle(target);
}
