/* Reservation: who may do what: PERSISTENT RESERVE IN and OUT, RESERVE(6) and
 * RELEASE(6) (SPC-4 5.12, 6.15, 6.16).
 *
 * A change is made in a copy.  With APTPL now or before, the copy is stored
 * first; it takes effect when it is durable, and the initiator is answered
 * after that.  Not supported, and said so: REGISTER AND MOVE, SPEC_I_PT,
 * ALL_TG_PT. */
#include <string.h>

#include "scsi/internal.h"

enum action {
    OUT_REGISTER,
    OUT_RESERVE,
    OUT_RELEASE,
    OUT_CLEAR,
    OUT_PREEMPT,
    OUT_PREEMPT_ABORT,
    OUT_REGISTER_IGNORE
};
enum type {
    WRITE_EXCLUSIVE = 1,
    EXCLUSIVE_ACCESS = 3,
    WRITE_EXCLUSIVE_REGISTRANTS = 5,
    EXCLUSIVE_ACCESS_REGISTRANTS = 6,
    WRITE_EXCLUSIVE_ALL = 7,
    EXCLUSIVE_ACCESS_ALL = 8
};
#define NOBODY UINT32_MAX
#define OUT_LIST_BYTES 24u

static bool type_known(uint8_t type)
{
    return type == WRITE_EXCLUSIVE || type == EXCLUSIVE_ACCESS ||
           (type >= WRITE_EXCLUSIVE_REGISTRANTS && type <= EXCLUSIVE_ACCESS_ALL);
}

static bool all_registrants(uint8_t type)
{
    return type == WRITE_EXCLUSIVE_ALL || type == EXCLUSIVE_ACCESS_ALL;
}

static bool registrants_only(uint8_t type)
{
    return type >= WRITE_EXCLUSIVE_REGISTRANTS;
}

static bool stops_reads(uint8_t type)
{
    return type == EXCLUSIVE_ACCESS || type == EXCLUSIVE_ACCESS_REGISTRANTS ||
           type == EXCLUSIVE_ACCESS_ALL;
}

static bool is_of(const struct vrep_registration *one, const struct vrep_scsi_nexus *nexus)
{
    return one->port == nexus->port && one->transport_id_bytes == nexus->transport_id_bytes &&
           memcmp(one->transport_id, nexus->transport_id, one->transport_id_bytes) == 0;
}

static uint32_t find(const struct reservations *all, const struct vrep_scsi_nexus *nexus)
{
    for (uint32_t i = 0; i < all->count; i++)
        if (is_of(&all->list[i], nexus))
            return i;
    return NOBODY;
}

static bool holds(const struct reservations *all, uint32_t index)
{
    return all->type != 0 && index != NOBODY &&
           (all_registrants(all->type) || all->holder == index);
}

/* ---- who is stopped ------------------------------------------------------------------ */

/* What the commands that judge themselves count as (SPC-4 table 68, SBC-3 table 13). */
static enum scsi_access access_of(const struct vrep_scsi_task *task)
{
    if (task->opcode->access != ACCESS_OWN)
        return (enum scsi_access)task->opcode->access;
    switch (task->cdb[0]) {
    case 0x1b: /* START STOP UNIT: starting is harmless */
        return (task->cdb[4] & 0xf1u) == 1 ? ACCESS_ALWAYS : ACCESS_WRITE;
    case 0x1e: /* PREVENT ALLOW: allowing is */
        return (task->cdb[4] & 3u) == 0 ? ACCESS_ALWAYS : ACCESS_WRITE;
    default:
        return ACCESS_ALWAYS;
    }
}

bool scsi_reserved_against(const struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    const struct reservations *all = &unit->reservations;
    uint8_t code = task->cdb[0];
    if (unit->reserved_by != NULL && unit->reserved_by != task->nexus) /* SPC-2 5.5.1 */
        return code != 0x12 && code != 0xa0 && code != 0x03 && code != 0x17;
    if (code == 0x16 || code == 0x17) /* not beside persistent ones */
        return all->count > 0;
    if (all->type == 0)
        return false;
    enum scsi_access access = access_of(task);
    if (access == ACCESS_ALWAYS || (access == ACCESS_READ && !stops_reads(all->type)))
        return false;
    uint32_t mine = find(all, task->nexus);
    if (registrants_only(all->type))
        return mine == NOBODY;
    return !holds(all, mine);
}

void scsi_reservations_reset(struct scsi_unit *unit)
{
    unit->reserved_by = NULL;
}

void scsi_reserve(struct vrep_scsi_task *task)
{
    task->unit->reserved_by = task->nexus;
    scsi_good(task);
}

void scsi_release(struct vrep_scsi_task *task)
{
    if (task->unit->reserved_by == task->nexus)
        task->unit->reserved_by = NULL;
    scsi_good(task);
}

/* ---- PERSISTENT RESERVE IN ------------------------------------------------------------ */

static uint32_t full_status(const struct reservations *all, uint8_t *out)
{
    uint8_t *at = out + 8;
    for (uint32_t i = 0; i < all->count; i++) {
        const struct vrep_registration *one = &all->list[i];
        vrep_be_store_u64(at, one->key);
        if (holds(all, i)) {
            at[12] = 1; /* R_HOLDER */
            at[13] = all->type;
        }
        vrep_be_store_u16(at + 18, one->port);
        vrep_be_store_u32(at + 20, one->transport_id_bytes);
        memcpy(at + 24, one->transport_id, one->transport_id_bytes);
        at += 24 + one->transport_id_bytes;
    }
    vrep_be_store_u32(out + 4, (uint32_t)(at - out) - 8);
    return (uint32_t)(at - out);
}

static uint32_t capabilities(const struct scsi_unit *unit, uint8_t *out)
{
    vrep_be_store_u16(out, 8);
    out[2] = unit->path != NULL ? 0x01 : 0x00;                          /* PTPL_C */
    out[3] = (uint8_t)(0x80u | (unit->reservations.persist ? 1u : 0u)); /* TMV, PTPL_A */
    out[4] = 0xea; /* WR_EX_AR, EX_AC_RO, WR_EX_RO, EX_AC, WR_EX */
    out[5] = 0x01; /* EX_AC_AR */
    return 8;
}

void scsi_persistent_in(struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    const struct reservations *all = &unit->reservations;
    uint8_t *out = scsi_buffer(task);
    uint32_t bytes = 8;
    vrep_be_store_u32(out, all->generation);
    switch (task->cdb[1] & 0x1fu) {
    case 0: /* READ KEYS */
        for (uint32_t i = 0; i < all->count; i++, bytes += 8)
            vrep_be_store_u64(out + bytes, all->list[i].key);
        vrep_be_store_u32(out + 4, bytes - 8);
        break;
    case 1: /* READ RESERVATION */
        if (all->type != 0) {
            vrep_be_store_u32(out + 4, 16);
            if (!all_registrants(all->type))
                vrep_be_store_u64(out + 8, all->list[all->holder].key);
            out[21] = all->type;
            bytes = 24;
        }
        break;
    case 2:
        bytes = capabilities(unit, out);
        break;
    default:
        bytes = full_status(all, out);
    }
    scsi_good_data(task, bytes, task->blocks);
}

/* ---- PERSISTENT RESERVE OUT ------------------------------------------------------------ */

bool scsi_persistent_out_prepare(struct vrep_scsi_task *task)
{
    uint8_t action = task->cdb[1] & 0x1fu;
    uint32_t bytes = vrep_be_load_u32(task->cdb + 5);
    bool typed = action == OUT_RESERVE || action == OUT_RELEASE || action == OUT_PREEMPT ||
                 action == OUT_PREEMPT_ABORT;
    if (typed && (task->cdb[2] >> 4 != 0 || !type_known(task->cdb[2] & 0xfu)))
        return scsi_refuse_cdb(task, 2);
    if (bytes != OUT_LIST_BYTES)
        return scsi_refuse(task, VREP_SENSE_PARAMETER_LIST_LENGTH);
    return scsi_take_parameters(task, bytes);
}

static void each_nexus_of(struct scsi_unit *unit, const struct vrep_registration *one,
                          const struct vrep_scsi_nexus *but, enum attention what)
{
    for (uint32_t i = 0; i < VREP_SCSI_NEXUSES_MAX; i++) {
        struct vrep_scsi_nexus *nexus = &unit->target->nexus[i];
        if (nexus->used && !nexus->closed && nexus != but && is_of(one, nexus))
            scsi_attention(unit, nexus, what);
    }
}

static void remove_at(struct reservations *all, uint32_t index)
{
    all->count--;
    memmove(&all->list[index], &all->list[index + 1], (all->count - index) * sizeof all->list[0]);
    memset(&all->list[all->count], 0, sizeof all->list[0]);
    if (all->type != 0 && !all_registrants(all->type) && all->holder > index)
        all->holder--;
}

static void drop_reservation(struct reservations *all)
{
    all->type = 0;
    all->holder = 0;
}

/* The registration at index goes, and its reservation with it. */
static void unregister(struct reservations *all, uint32_t index)
{
    bool held = holds(all, index);
    bool last = all->count == 1;
    if (held && (!all_registrants(all->type) || last))
        drop_reservation(all);
    remove_at(all, index);
}

/* What an action makes of a copy.  0: done; a sense code; CONFLICT. */
#define CONFLICT UINT32_MAX

static uint32_t register_key(const struct vrep_scsi_nexus *nexus, struct reservations *all,
                             uint64_t key, bool persist)
{
    uint32_t mine = find(all, nexus);
    if (key == 0) {
        if (mine != NOBODY)
            unregister(all, mine);
    } else if (mine != NOBODY) {
        all->list[mine].key = key;
    } else {
        if (all->count == VREP_REGISTRATIONS_MAX)
            return VREP_SENSE_NO_RESERVATION_ROOM;
        struct vrep_registration *one = &all->list[all->count++];
        memset(one, 0, sizeof *one);
        one->key = key;
        one->port = nexus->port;
        one->transport_id_bytes = nexus->transport_id_bytes;
        memcpy(one->transport_id, nexus->transport_id, nexus->transport_id_bytes);
    }
    all->persist = persist && all->count > 0;
    all->generation++;
    return 0;
}

static uint32_t reserve(struct reservations *all, uint32_t mine, uint8_t type)
{
    if (all->type == 0) {
        all->type = type;
        all->holder = all_registrants(type) ? 0 : mine;
        return 0;
    }
    return holds(all, mine) && all->type == type ? 0 : CONFLICT;
}

static uint32_t release(struct reservations *all, uint32_t mine, uint8_t type)
{
    if (all->type == 0 || !holds(all, mine))
        return 0;
    if (all->type != type)
        return VREP_SENSE_INVALID_RELEASE;
    drop_reservation(all);
    return 0;
}

/* Removes registrations by key, all but mine if key is 0; returns how many. */
static uint32_t remove_keys(struct reservations *all, uint32_t *mine, uint64_t key, bool any)
{
    uint32_t removed = 0;
    for (uint32_t i = all->count; i-- > 0;) {
        if (i == *mine || (!any && all->list[i].key != key))
            continue;
        remove_at(all, i);
        if (i < *mine)
            (*mine)--;
        removed++;
    }
    return removed;
}

static uint32_t preempt(struct reservations *all, uint32_t mine, uint8_t type, uint64_t victim)
{
    bool everybody = all->type != 0 && all_registrants(all->type);
    if (everybody && victim == 0) {
        (void)remove_keys(all, &mine, 0, true);
        all->type = type;
        all->holder = all_registrants(type) ? 0 : mine;
    } else if (victim == 0) {
        return VREP_SENSE_FIELD_IN_PARAMETERS;
    } else if (all->type != 0 && !everybody && all->list[all->holder].key == victim) {
        drop_reservation(all); /* the holder's: it becomes mine */
        (void)remove_keys(all, &mine, victim, false);
        all->type = type;
        all->holder = all_registrants(type) ? 0 : mine;
    } else if (remove_keys(all, &mine, victim, false) == 0 && all->list[mine].key != victim) {
        return CONFLICT;
    }
    all->generation++;
    return 0;
}

static uint32_t change(const struct vrep_scsi_task *task, const uint8_t *list,
                       struct reservations *all)
{
    uint8_t action = task->cdb[1] & 0x1fu, type = task->cdb[2] & 0xfu;
    uint64_t key = vrep_be_load_u64(list), service_key = vrep_be_load_u64(list + 8);
    uint32_t mine = find(all, task->nexus);
    if (action == OUT_REGISTER && mine == NOBODY && key != 0)
        return CONFLICT;
    if (action != OUT_REGISTER_IGNORE && !(action == OUT_REGISTER && mine == NOBODY) &&
        (mine == NOBODY || all->list[mine].key != key))
        return CONFLICT;
    switch (action) {
    case OUT_REGISTER:
    case OUT_REGISTER_IGNORE:
        return register_key(task->nexus, all, service_key, (list[20] & 1u) != 0);
    case OUT_RESERVE:
        return reserve(all, mine, type);
    case OUT_RELEASE:
        return release(all, mine, type);
    case OUT_CLEAR: {
        uint32_t generation = all->generation;
        memset(all, 0, sizeof *all);
        all->generation = generation + 1;
        return 0;
    }
    default:
        return preempt(all, mine, type, service_key);
    }
}

/* ---- taking effect ------------------------------------------------------------------------ */

static bool still_there(const struct reservations *all, const struct vrep_registration *one)
{
    for (uint32_t i = 0; i < all->count; i++)
        if (all->list[i].port == one->port &&
            all->list[i].transport_id_bytes == one->transport_id_bytes &&
            memcmp(all->list[i].transport_id, one->transport_id, one->transport_id_bytes) == 0)
            return true;
    return false;
}

/* Tells who lost what (SPC-4 5.12.11): `before` is what was, `after` what is. */
static void tell(struct vrep_scsi_task *task, const struct reservations *before,
                 const struct reservations *after)
{
    struct scsi_unit *unit = task->unit;
    uint8_t action = task->cdb[1] & 0x1fu;
    bool ended = before->type != 0 && after->type != before->type;
    for (uint32_t i = 0; i < before->count; i++) {
        const struct vrep_registration *one = &before->list[i];
        bool kept = still_there(after, one);
        if (action == OUT_CLEAR)
            each_nexus_of(unit, one, task->nexus, ATTENTION_RESERVATIONS_PREEMPTED);
        else if ((action == OUT_PREEMPT || action == OUT_PREEMPT_ABORT) && !kept)
            each_nexus_of(unit, one, task->nexus, ATTENTION_REGISTRATIONS_PREEMPTED);
        else if (ended && kept && registrants_only(before->type))
            each_nexus_of(unit, one, task->nexus, ATTENTION_RESERVATIONS_RELEASED);
    }
}

static void take_effect(struct vrep_scsi_task *task)
{
    struct scsi_unit *unit = task->unit;
    const struct reservations *before = &unit->last_reservations;
    unit->last_reservations = unit->reservations;
    unit->reservations = unit->next_reservations;
    tell(task, before, &unit->reservations);
    if ((task->cdb[1] & 0x1fu) != OUT_PREEMPT_ABORT)
        return;
    for (uint32_t i = 0; i < VREP_SCSI_NEXUSES_MAX; i++) {
        struct vrep_scsi_nexus *nexus = &unit->target->nexus[i];
        if (!nexus->used || nexus == task->nexus)
            continue;
        uint32_t was = find(before, nexus);
        if (was != NOBODY && find(&unit->reservations, nexus) == NOBODY)
            scsi_abort(unit, nexus, task);
    }
}

/* In effect; with PREEMPT AND ABORT once nothing of the preempted is in the chain any more. */
void scsi_reservations_settle(struct scsi_unit *unit)
{
    struct vrep_scsi_task *task = unit->storing;
    if (!task->pending || unit->dying > (task->aborted ? 1u : 0u))
        return;
    task->pending = false;
    unit->storing = NULL;
    scsi_good(task);
}

static void effective(struct vrep_scsi_task *task)
{
    struct scsi_unit *unit = task->unit;
    take_effect(task);
    task->pending = true;
    scsi_settle(unit->target);
}

static int store_run(struct vrep_job *job)
{
    return scsi_reservations_write(job->owner);
}

static void store_done(struct vrep_job *job)
{
    struct scsi_unit *unit = job->owner;
    struct vrep_scsi_task *task = unit->storing;
    if (job->status == VREP_OK) {
        effective(task);
        return;
    }
    unit->storing = NULL; /* nothing has changed */
    scsi_fail(task, VREP_SENSE_INTERNAL);
}

void scsi_persistent_out(struct vrep_scsi_task *task)
{
    struct scsi_unit *unit = task->unit;
    uint8_t action = task->cdb[1] & 0x1fu;
    if (task->out_bytes < OUT_LIST_BYTES) {
        scsi_fail(task, VREP_SENSE_PARAMETER_LIST_LENGTH);
        return;
    }
    const uint8_t *list = scsi_buffer(task);
    bool registers = action == OUT_REGISTER || action == OUT_REGISTER_IGNORE;
    unit->next_reservations = unit->reservations;
    uint32_t code = change(task, list, &unit->next_reservations);
    if (code == CONFLICT) {
        scsi_conflict(task);
        return;
    }
    if (registers && ((list[20] & 0x0cu) != 0 || ((list[20] & 1u) != 0 && unit->path == NULL))) {
        scsi_fail_parameter(task, 20); /* SPEC_I_PT, ALL_TG_PT; APTPL without a place */
        return;
    }
    if (code == VREP_SENSE_FIELD_IN_PARAMETERS) {
        scsi_fail_parameter(task, 8);
        return;
    }
    if (code != 0) {
        scsi_fail(task, code);
        return;
    }
    unit->storing = task;
    if (!unit->reservations.persist && !unit->next_reservations.persist) {
        effective(task);
        return;
    }
    unit->job.run = store_run;
    unit->job.done = store_done;
    unit->job.owner = unit;
    vrep_worker_post(unit->target->worker, &unit->job);
}
