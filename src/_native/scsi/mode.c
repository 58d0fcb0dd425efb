/* Mode: mode pages (SPC-4 7.5, SBC-3 6.4), and starting, stopping, locking.
 * What can be changed: WCE, D_SENSE, SWP.  Nothing is saved: a reset or a
 * restart brings the defaults back. */
#include <string.h>

#include "scsi/internal.h"

#define PAGES_MAX 96u
#define WRITE_CACHE 0x04u
#define SENSE_DESCRIPTORS 0x04u
#define PROTECT 0x08u

enum control { CONTROL_CURRENT, CONTROL_CHANGEABLE, CONTROL_DEFAULT, CONTROL_SAVED };

static uint32_t page_recovery(const struct scsi_unit *unit, enum control control, uint8_t *out)
{
    (void)unit;
    out[0] = 0x01;
    out[1] = 0x0a;
    if (control != CONTROL_CHANGEABLE)
        out[2] = 0xc0; /* AWRE, ARRE */
    return 12;
}

static uint32_t page_caching(const struct scsi_unit *unit, enum control control, uint8_t *out)
{
    out[0] = 0x08;
    out[1] = 0x12;
    if (control != CONTROL_CURRENT || !unit->write_through)
        out[2] = WRITE_CACHE;
    return 20;
}

static uint32_t page_control(const struct scsi_unit *unit, enum control control, uint8_t *out)
{
    bool changeable = control == CONTROL_CHANGEABLE, current = control == CONTROL_CURRENT;
    out[0] = 0x0a;
    out[1] = 0x0a;
    if (changeable || (current && unit->descriptor_sense))
        out[2] = SENSE_DESCRIPTORS;
    if (changeable || (current && unit->software_protect))
        out[4] = PROTECT;
    if (!changeable) {
        out[2] |= 0x02; /* GLTSD */
        out[3] = 0x10;  /* commands may be reordered */
        vrep_be_store_u16(out + 8, 0xffff);
    }
    return 12;
}

static uint32_t page_exceptions(const struct scsi_unit *unit, enum control control, uint8_t *out)
{
    (void)unit;
    out[0] = 0x1c;
    out[1] = 0x0a;
    if (control != CONTROL_CHANGEABLE)
        out[2] = 0x08; /* DEXCPT: none is reported */
    return 12;
}

static uint32_t (*const makers[])(const struct scsi_unit *unit, enum control control,
                                  uint8_t *out) = {page_recovery, page_caching, page_control,
                                                   page_exceptions};
static const uint8_t codes[] = {0x01, 0x08, 0x0a, 0x1c};
#define MAKERS (sizeof makers / sizeof makers[0])

static uint8_t device_specific(const struct scsi_unit *unit)
{
    struct vrep_disk_info info = {0};
    bool known = vrep_disk_info(vrep_group_disk(unit->target->group, unit->disk), &info) == VREP_OK;
    return (uint8_t)(0x10u | /* DPOFUA */
                     (unit->software_protect || (known && info.read_only) ? 0x80u : 0u));
}

static uint32_t block_descriptor(const struct scsi_unit *unit, bool large, uint8_t *out)
{
    uint64_t blocks = scsi_blocks(unit);
    if (large) {
        vrep_be_store_u64(out, blocks);
        vrep_be_store_u32(out + 12, unit->block_bytes);
        return 16;
    }
    vrep_be_store_u32(out, blocks <= UINT32_MAX ? (uint32_t)blocks : UINT32_MAX);
    vrep_be_store_u32(out + 4, unit->block_bytes); /* three bytes, after a reserved one */
    return 8;
}

void scsi_mode_sense(struct vrep_scsi_task *task)
{
    const struct scsi_unit *unit = task->unit;
    const uint8_t *cdb = task->cdb;
    uint8_t *out = scsi_buffer(task);
    bool ten = task->opcode->length == 10;
    enum control control = (enum control)(cdb[2] >> 6);
    uint8_t page = cdb[2] & 0x3fu, subpage = cdb[3];
    uint32_t bytes = ten ? 8 : 4;
    if (control == CONTROL_SAVED) {
        scsi_fail(task, VREP_SENSE_SAVING);
        return;
    }
    uint32_t descriptor = 0;
    bool large = ten && (cdb[1] & 0x10u) != 0;
    if ((cdb[1] & 8u) == 0) /* DBD */
        descriptor = block_descriptor(unit, large, out + bytes);
    bytes += descriptor;
    bool found = false;
    for (uint32_t i = 0; i < MAKERS; i++) {
        if (page != 0x3f && page != codes[i])
            continue;
        if (subpage != 0 && subpage != 0xff)
            continue;
        bytes += makers[i](unit, control, out + bytes);
        found = true;
    }
    if (!found) {
        (void)scsi_refuse_cdb(task, subpage != 0 && subpage != 0xff ? 3 : 2);
        scsi_fail(task, VREP_SENSE_FIELD_IN_CDB);
        return;
    }
    if (ten) {
        vrep_be_store_u16(out, (uint16_t)(bytes - 2));
        out[3] = device_specific(unit);
        out[4] = large ? 1 : 0;
        vrep_be_store_u16(out + 6, (uint16_t)descriptor);
    } else {
        out[0] = (uint8_t)(bytes - 1);
        out[2] = device_specific(unit);
        out[3] = (uint8_t)descriptor;
    }
    scsi_good_data(task, bytes, task->blocks);
}

bool scsi_mode_select_prepare(struct vrep_scsi_task *task)
{
    const uint8_t *cdb = task->cdb;
    if ((cdb[1] & 0x10u) == 0 || (cdb[1] & 1u) != 0) /* page format; nothing is saved */
        return scsi_refuse_cdb(task, 1);
    uint32_t bytes = task->opcode->length == 10 ? vrep_be_load_u16(cdb + 7) : cdb[4];
    return scsi_take_parameters(task, bytes);
}

/* Whether a page says nothing else than the current one, but where it may. */
static bool differs(const struct scsi_unit *unit, uint32_t maker, const uint8_t *page,
                    uint32_t bytes, uint32_t *at)
{
    uint8_t current[PAGES_MAX] = {0}, changeable[PAGES_MAX] = {0};
    (void)makers[maker](unit, CONTROL_CURRENT, current);
    (void)makers[maker](unit, CONTROL_CHANGEABLE, changeable);
    for (*at = 2; *at < bytes; (*at)++)
        if (((page[*at] ^ current[*at]) & (uint8_t)~changeable[*at]) != 0)
            return true;
    return false;
}

struct selected {
    bool write_through, descriptor_sense, software_protect;
};

/* One page at `at`; returns its length, or 0 after it has failed the task. */
static uint32_t select_page(struct vrep_scsi_task *task, const uint8_t *list, uint32_t at,
                            uint32_t left, struct selected *selected)
{
    const uint8_t *page = list + at;
    uint8_t expected[PAGES_MAX] = {0};
    uint32_t maker = 0, wrong;
    while (maker < MAKERS && codes[maker] != (page[0] & 0x3fu))
        maker++;
    if (maker == MAKERS || (page[0] & 0x40u) != 0) { /* SPF: there are no subpages */
        scsi_fail_parameter(task, (uint16_t)at);
        return 0;
    }
    uint32_t bytes = makers[maker](task->unit, CONTROL_CURRENT, expected);
    if (left < 2 || page[1] != expected[1]) {
        scsi_fail_parameter(task, (uint16_t)(at + 1));
        return 0;
    }
    if (left < bytes) {
        scsi_fail(task, VREP_SENSE_PARAMETER_LIST_LENGTH);
        return 0;
    }
    if (differs(task->unit, maker, page, bytes, &wrong)) {
        scsi_fail_parameter(task, (uint16_t)(at + wrong));
        return 0;
    }
    if (codes[maker] == 0x08)
        selected->write_through = (page[2] & WRITE_CACHE) == 0;
    if (codes[maker] == 0x0a) {
        selected->descriptor_sense = (page[2] & SENSE_DESCRIPTORS) != 0;
        selected->software_protect = (page[4] & PROTECT) != 0;
    }
    return bytes;
}

/* The block descriptor may only say what is so.  False: it has failed the task. */
static bool check_descriptor(struct vrep_scsi_task *task, const uint8_t *at, uint32_t bytes,
                             bool large, uint16_t offset)
{
    const struct scsi_unit *unit = task->unit;
    if (bytes == 0)
        return true;
    if (bytes != (large ? 16u : 8u)) {
        scsi_fail_parameter(task, (uint16_t)(offset - 1));
        return false;
    }
    uint64_t blocks = large ? vrep_be_load_u64(at) : vrep_be_load_u32(at);
    uint64_t all = large ? UINT64_MAX : UINT32_MAX;
    uint32_t block = large ? vrep_be_load_u32(at + 12) : vrep_be_load_u32(at + 4) & 0xffffffu;
    bool same = blocks == 0 || blocks == all || blocks == scsi_blocks(unit);
    if (same && block == unit->block_bytes)
        return true;
    scsi_fail_parameter(task, same ? (uint16_t)(offset + (large ? 12 : 5)) : offset);
    return false;
}

static void synced(struct vrep_scsi_task *task, int status)
{
    if (status == VREP_OK)
        scsi_good(task);
    else
        scsi_fail_status(task, status, true);
}

void scsi_mode_select(struct vrep_scsi_task *task)
{
    struct scsi_unit *unit = task->unit;
    bool ten = task->opcode->length == 10;
    uint32_t header = ten ? 8 : 4, bytes = task->out_bytes;
    if (task->data_out == 0) {
        scsi_good(task);
        return;
    }
    if (bytes < task->data_out || bytes < header) {
        scsi_fail(task, VREP_SENSE_PARAMETER_LIST_LENGTH);
        return;
    }
    const uint8_t *list = scsi_buffer(task);
    uint32_t descriptor = ten ? vrep_be_load_u16(list + 6) : list[3];
    if (descriptor > bytes - header) {
        scsi_fail(task, VREP_SENSE_PARAMETER_LIST_LENGTH);
        return;
    }
    if (!check_descriptor(task, list + header, descriptor, ten && (list[4] & 1u) != 0,
                          (uint16_t)header))
        return;
    struct selected selected = {unit->write_through, unit->descriptor_sense,
                                unit->software_protect};
    for (uint32_t at = header + descriptor; at < bytes;) {
        uint32_t page = select_page(task, list, at, bytes - at, &selected);
        if (page == 0)
            return;
        at += page;
    }
    bool flush = selected.write_through && !unit->write_through;
    bool changed = flush || selected.write_through != unit->write_through ||
                   selected.descriptor_sense != unit->descriptor_sense ||
                   selected.software_protect != unit->software_protect;
    unit->write_through = selected.write_through;
    unit->descriptor_sense = selected.descriptor_sense;
    unit->software_protect = selected.software_protect;
    if (changed)
        scsi_attention_others(unit, task->nexus, ATTENTION_MODE);
    if (flush) /* what was cached before the cache was switched off */
        scsi_step(task, VREP_OP_FLUSH, 0, 0, 0, 0, synced);
    else
        scsi_good(task);
}

/* ---- START STOP UNIT, PREVENT ALLOW MEDIUM REMOVAL ------------------------------------ */

#define START 1u
#define LOAD_EJECT 2u
#define NO_FLUSH 4u

uint32_t scsi_not_ready(const struct scsi_unit *unit)
{
    return unit->ejected ? VREP_SENSE_NO_MEDIUM : VREP_SENSE_NOT_READY_STOPPED;
}

bool scsi_start_stop_prepare(struct vrep_scsi_task *task)
{
    uint8_t condition = task->cdb[4] >> 4;
    bool known =
        condition <= 3 || condition == 5 || condition == 7 || condition == 0xa || condition == 0xb;
    bool moves = condition == 0 && (task->cdb[4] & LOAD_EJECT) != 0;
    if (!known || (moves && !task->unit->removable))
        return scsi_refuse_cdb(task, 4);
    return true;
}

/* By any nexus: the medium is the same for all. */
static bool removal_is_prevented(const struct scsi_unit *unit)
{
    for (uint32_t i = 0; i < VREP_SCSI_NEXUSES_MAX; i++) {
        const struct vrep_scsi_nexus *nexus = &unit->target->nexus[i];
        if (nexus->used && !nexus->closed && nexus->prevents[unit->number])
            return true;
    }
    return false;
}

static void stopped(struct vrep_scsi_task *task, int status)
{
    if (status == VREP_OK) {
        task->unit->stopped = true;
        if ((task->cdb[4] & LOAD_EJECT) != 0)
            task->unit->ejected = true;
    }
    synced(task, status);
}

static void start(struct vrep_scsi_task *task)
{
    struct scsi_unit *unit = task->unit;
    bool load = (task->cdb[4] & LOAD_EJECT) != 0;
    if (unit->ejected && !load) {
        scsi_fail(task, VREP_SENSE_NO_MEDIUM);
        return;
    }
    if (unit->ejected)
        scsi_attention_others(unit, task->nexus, ATTENTION_MEDIUM);
    unit->ejected = unit->stopped = false;
    scsi_good(task);
}

void scsi_start_stop(struct vrep_scsi_task *task)
{
    uint8_t how = task->cdb[4];
    if (how >> 4 != 0) /* power conditions: none of them changes anything here */
        scsi_good(task);
    else if ((how & LOAD_EJECT) != 0 && removal_is_prevented(task->unit))
        scsi_fail(task, VREP_SENSE_REMOVAL_PREVENTED);
    else if ((how & START) != 0)
        start(task);
    else if ((how & NO_FLUSH) != 0)
        stopped(task, VREP_OK);
    else
        scsi_step(task, VREP_OP_FLUSH, 0, 0, 0, 0, stopped);
}

void scsi_prevent_allow(struct vrep_scsi_task *task)
{
    task->nexus->prevents[task->unit->number] = (task->cdb[4] & 1u) != 0;
    scsi_good(task);
}
