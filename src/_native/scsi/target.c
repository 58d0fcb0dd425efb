/* Target: logical units, nexuses, and what a nexus was not told yet. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "format/checksum.h"
#include "scsi/internal.h"

static const uint32_t attention_codes[ATTENTIONS] = {
    [ATTENTION_POWER_ON] = VREP_SENSE_POWER_ON,
    [ATTENTION_UNIT_RESET] = VREP_SENSE_UNIT_RESET,
    [ATTENTION_NEXUS_LOSS] = VREP_SENSE_NEXUS_LOSS,
    [ATTENTION_MEDIUM] = VREP_SENSE_MEDIUM_CHANGED,
    [ATTENTION_COMMANDS_CLEARED] = VREP_SENSE_COMMANDS_CLEARED,
    [ATTENTION_CAPACITY] = VREP_SENSE_CAPACITY_CHANGED,
    [ATTENTION_MODE] = VREP_SENSE_MODE_CHANGED,
    [ATTENTION_RESERVATIONS_PREEMPTED] = VREP_SENSE_RESERVATIONS_PREEMPTED,
    [ATTENTION_RESERVATIONS_RELEASED] = VREP_SENSE_RESERVATIONS_RELEASED,
    [ATTENTION_REGISTRATIONS_PREEMPTED] = VREP_SENSE_REGISTRATIONS_PREEMPTED,
};

/* ---- attentions ---------------------------------------------------------------- */

void scsi_attention(struct scsi_unit *unit, struct vrep_scsi_nexus *nexus, enum attention what)
{
    if (unit->absent)
        return;
    uint16_t *bits = &nexus->attention[unit->number];
    /* A reset says that everything before it is void, but for what stays so. */
    if (what == ATTENTION_UNIT_RESET)
        *bits &= (uint16_t)(1u << ATTENTION_POWER_ON | 1u << ATTENTION_MEDIUM |
                            1u << ATTENTION_CAPACITY);
    *bits |= (uint16_t)(1u << what);
}

void scsi_attention_others(struct scsi_unit *unit, const struct vrep_scsi_nexus *but,
                           enum attention what)
{
    for (uint32_t i = 0; i < VREP_SCSI_NEXUSES_MAX; i++) {
        struct vrep_scsi_nexus *nexus = &unit->target->nexus[i];
        if (nexus->used && !nexus->closed && nexus != but)
            scsi_attention(unit, nexus, what);
    }
}

uint32_t scsi_attention_peek(const struct scsi_unit *unit, const struct vrep_scsi_nexus *nexus)
{
    if (unit->absent)
        return VREP_SENSE_NONE;
    for (uint32_t i = 0; i < ATTENTIONS; i++)
        if ((nexus->attention[unit->number] >> i & 1u) != 0)
            return attention_codes[i];
    return VREP_SENSE_NONE;
}

uint32_t scsi_attention_take(struct scsi_unit *unit, struct vrep_scsi_nexus *nexus)
{
    uint32_t code = scsi_attention_peek(unit, nexus);
    for (uint32_t i = 0; i < ATTENTIONS && code != VREP_SENSE_NONE; i++)
        if (attention_codes[i] == code)
            nexus->attention[unit->number] &= (uint16_t) ~(1u << i);
    return code;
}

/* ---- units ----------------------------------------------------------------------- */

struct scsi_unit *scsi_unit_of(struct vrep_scsi_target *target, uint64_t lun)
{
    struct scsi_unit *absent = &target->units[target->units_count];
    uint32_t method = (uint32_t)(lun >> 62), first = (uint32_t)(lun >> 48);
    uint32_t number = method == 0 ? first : first & 0x3fffu; /* bus 0, or flat space */
    if (method > 1 || (lun & UINT64_C(0xffffffffffff)) != 0 || number >= target->units_count)
        return absent;
    return &target->units[number];
}

/* The same for the same disk of the same group, wherever and whenever it is served. */
static void name_unit(struct scsi_unit *unit, const uint8_t group_id[16])
{
    const char *name = vrep_group_disk_name(unit->target->group, unit->disk);
    uint8_t identity[16 + VREP_NAME_BYTES] = {0}, digest[VREP_DIGEST_BYTES];
    memcpy(identity, group_id, 16);
    memcpy(identity + 16, name, strnlen(name, VREP_NAME_BYTES));
    vrep_digest_once(identity, sizeof identity, digest);
    for (uint32_t i = 0; i < sizeof digest; i++)
        snprintf(unit->serial + (size_t)i * 2, 3, "%02x", digest[i]);
    memcpy(unit->naa, digest, sizeof unit->naa);
    unit->naa[0] = (uint8_t)(0x30u | (unit->naa[0] & 0xfu)); /* NAA 3h: locally assigned */
}

static int open_unit(struct scsi_unit *unit, const struct vrep_scsi_unit_config *config,
                     const uint8_t group_id[16])
{
    struct vrep_group *group = unit->target->group;
    struct vrep_disk_info info;
    if (config->disk >= vrep_group_disks(group) ||
        (config->block_bytes != 512 && config->block_bytes != 4096))
        return VREP_E_INVALID;
    int status = vrep_disk_info(vrep_group_disk(group, config->disk), &info);
    if (status != VREP_OK)
        return status;
    unit->disk = config->disk;
    unit->block_bytes = config->block_bytes;
    unit->bytes = vrep_group_disk_bytes(group, config->disk);
    unit->removable = config->removable;
    unit->resized = vrep_group_disk_resized(group, config->disk);
    if (unit->bytes < unit->block_bytes)
        return VREP_E_INVALID;
    unit->thin = info.zero_is_cheap && !info.read_only;
    uint32_t unmap = info.block_bytes > info.align_bytes ? info.block_bytes : info.align_bytes;
    unit->granularity = unmap > unit->block_bytes ? unmap / unit->block_bytes : 1;
    name_unit(unit, group_id);
    if (config->reservations_path == NULL)
        return VREP_OK;
    unit->path = strdup(config->reservations_path);
    return unit->path != NULL ? scsi_reservations_open(unit) : VREP_E_NOMEM;
}

int vrep_scsi_create(struct vrep_group *group, const struct vrep_scsi_config *config,
                     struct vrep_scsi_target **out)
{
    if (config->units_count == 0 || config->units_count > VREP_SCSI_UNITS_MAX)
        return VREP_E_INVALID;
    struct vrep_scsi_target *target = calloc(1, sizeof *target);
    if (target == NULL)
        return VREP_E_NOMEM;
    target->group = group;
    target->units_count = config->units_count;
    target->notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int status = target->notify_fd >= 0 ? VREP_OK : vrep_status_from_errno(errno);
    target->units = calloc(config->units_count + 1u, sizeof *target->units);
    if (target->units == NULL)
        status = VREP_E_NOMEM;
    for (uint32_t i = 0; target->units != NULL && i <= config->units_count; i++) {
        struct scsi_unit *unit = &target->units[i];
        unit->target = target;
        unit->number = i;
        unit->fd = -1;
        unit->absent = i == config->units_count;
        if (!unit->absent && status == VREP_OK)
            status = open_unit(unit, &config->units[i], config->group_id);
    }
    if (status == VREP_OK)
        status = vrep_buffers_create(SCSI_BUFFERS_SMALL, SCSI_BUFFERS_PAGES, &target->buffers);
    if (status == VREP_OK)
        status = vrep_worker_create(target->notify_fd, &target->worker);
    if (status != VREP_OK) {
        vrep_scsi_destroy(target);
        return status;
    }
    *out = target;
    return VREP_OK;
}

void vrep_scsi_destroy(struct vrep_scsi_target *target)
{
    if (target == NULL)
        return;
    vrep_worker_destroy(target->worker);
    for (uint32_t i = 0; target->units != NULL && i < target->units_count; i++)
        scsi_reservations_close(&target->units[i]);
    vrep_buffers_destroy(target->buffers);
    if (target->notify_fd >= 0)
        close(target->notify_fd);
    free(target->units);
    free(target);
}

int vrep_scsi_fd(const struct vrep_scsi_target *target)
{
    return target->notify_fd;
}

void vrep_scsi_poll(struct vrep_scsi_target *target)
{
    uint64_t count;
    while (read(target->notify_fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
    (void)vrep_worker_collect(target->worker);
}

bool vrep_scsi_idle(const struct vrep_scsi_target *target)
{
    for (uint32_t i = 0; i <= target->units_count; i++)
        if (target->units[i].tasks > 0 || target->units[i].job.busy)
            return false;
    return true;
}

/* ---- nexuses ------------------------------------------------------------------------ */

int vrep_scsi_nexus_open(struct vrep_scsi_target *target, const uint8_t *transport_id,
                         uint32_t transport_id_bytes, uint16_t port, struct vrep_scsi_nexus **out)
{
    if (transport_id_bytes == 0 || transport_id_bytes > VREP_SCSI_TRANSPORT_ID_MAX)
        return VREP_E_INVALID;
    struct vrep_scsi_nexus *nexus = NULL;
    for (uint32_t i = 0; i < VREP_SCSI_NEXUSES_MAX && nexus == NULL; i++)
        if (!target->nexus[i].used)
            nexus = &target->nexus[i];
    if (nexus == NULL)
        return VREP_E_FULL;
    *nexus = (struct vrep_scsi_nexus){
        .target = target,
        .used = true,
        .port = port,
        .transport_id_bytes = (uint16_t)transport_id_bytes,
    };
    memcpy(nexus->transport_id, transport_id, transport_id_bytes);
    for (uint32_t i = 0; i < target->units_count; i++) {
        scsi_attention(&target->units[i], nexus, ATTENTION_POWER_ON);
        if (target->units[i].resized)
            scsi_attention(&target->units[i], nexus, ATTENTION_CAPACITY);
    }
    *out = nexus;
    return VREP_OK;
}

void scsi_nexus_release(struct vrep_scsi_nexus *nexus)
{
    nexus->used = false;
}

void vrep_scsi_nexus_close(struct vrep_scsi_nexus *nexus)
{
    struct vrep_scsi_target *target = nexus->target;
    nexus->closed = true;
    nexus->tasks++; /* it stays until this has ended */
    for (uint32_t i = 0; i <= target->units_count; i++) {
        scsi_abort(&target->units[i], nexus, NULL);
        if (target->units[i].reserved_by == nexus)
            target->units[i].reserved_by = NULL;
    }
    if (--nexus->tasks == 0)
        scsi_nexus_release(nexus);
}
