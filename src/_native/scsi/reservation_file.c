/* Reservation file: registrations that outlive a power loss (APTPL). */
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "format/checksum.h"
#include "scsi/internal.h"

#define SLOTS 2

static uint32_t checksum_of(const struct vrep_reservations *stored)
{
    return vrep_checksum32(stored, offsetof(struct vrep_reservations, checksum));
}

static void unit_identity(const struct scsi_unit *unit, uint8_t out[16])
{
    for (size_t i = 0; i < 16; i++) {
        char digits[3] = {unit->serial[i * 2], unit->serial[i * 2 + 1], '\0'};
        out[i] = (uint8_t)strtoul(digits, NULL, 16);
    }
}

/* Whether a slot with a right checksum also says what can be. */
static bool sane(const struct vrep_reservations *stored)
{
    if (stored->count > VREP_REGISTRATIONS_MAX || stored->type > 8 || stored->type == 2 ||
        stored->type == 4 || (stored->type != 0 && stored->count == 0) ||
        (stored->holder != 0 && stored->holder >= stored->count))
        return false;
    for (uint32_t i = 0; i < stored->count; i++)
        if (stored->list[i].transport_id_bytes == 0 ||
            stored->list[i].transport_id_bytes > VREP_SCSI_TRANSPORT_ID_MAX)
            return false;
    return true;
}

static int read_newest(struct scsi_unit *unit, struct vrep_reservations *newest)
{
    int failure = VREP_E_CORRUPT;
    bool found = false;
    struct vrep_reservations *candidate = &unit->stored;
    for (int slot = 0; slot < SLOTS; slot++) {
        memset(candidate, 0, sizeof *candidate);
        off_t at = slot * (off_t)sizeof *candidate;
        if (pread(unit->fd, candidate, sizeof *candidate, at) < 0)
            return vrep_status_from_errno(errno);
        if (candidate->magic != VREP_RESERVATIONS_MAGIC ||
            candidate->checksum != checksum_of(candidate))
            continue; /* torn: it was being written, and the other one stands */
        if (candidate->version != VREP_RESERVATIONS_VERSION) {
            failure = VREP_E_VERSION;
            continue;
        }
        if (candidate->counter % SLOTS != (uint64_t)slot || !sane(candidate))
            continue;
        if (!found || candidate->counter > newest->counter)
            *newest = *candidate;
        found = true;
    }
    return found ? VREP_OK : failure;
}

static int sync_directory(const char *path)
{
    char copy[PATH_MAX];
    if (snprintf(copy, sizeof copy, "%s", path) >= (int)sizeof copy)
        return VREP_E_RANGE;
    int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    int status = fsync(fd) == 0 ? VREP_OK : vrep_status_from_errno(errno);
    close(fd);
    return status;
}

static int load(struct scsi_unit *unit)
{
    struct vrep_reservations *newest = calloc(1, sizeof *newest);
    if (newest == NULL)
        return VREP_E_NOMEM;
    uint8_t identity[16];
    unit_identity(unit, identity);
    int status = read_newest(unit, newest);
    if (status == VREP_OK && memcmp(newest->unit, identity, sizeof identity) != 0)
        status = VREP_E_INVALID; /* another disk's */
    if (status == VREP_OK) {
        struct reservations *out = &unit->reservations;
        unit->counter = newest->counter;
        out->count = newest->count;
        out->holder = newest->holder;
        out->type = newest->type;
        out->persist = newest->count > 0;
        memcpy(out->list, newest->list, sizeof out->list);
    }
    free(newest);
    return status;
}

void scsi_reservations_close(struct scsi_unit *unit)
{
    if (unit->fd >= 0)
        close(unit->fd);
    unit->fd = -1;
    free(unit->path);
    unit->path = NULL;
}

int scsi_reservations_write(struct scsi_unit *unit)
{
    struct vrep_reservations *stored = &unit->stored;
    const struct reservations *from = &unit->next_reservations;
    bool keep = from->persist;
    memset(stored, 0, sizeof *stored);
    stored->magic = VREP_RESERVATIONS_MAGIC;
    stored->version = VREP_RESERVATIONS_VERSION;
    stored->counter = unit->counter + 1;
    unit_identity(unit, stored->unit);
    if (keep) {
        stored->count = from->count;
        stored->type = from->type;
        stored->holder = from->holder;
        memcpy(stored->list, from->list, from->count * sizeof from->list[0]);
    }
    stored->checksum = checksum_of(stored);
    off_t at = (off_t)(stored->counter % SLOTS) * (off_t)sizeof *stored;
    ssize_t put = pwrite(unit->fd, stored, sizeof *stored, at);
    if (put < 0)
        return vrep_status_from_errno(errno);
    if (put != (ssize_t)sizeof *stored)
        return VREP_E_NOSPACE;
    if (fdatasync(unit->fd) != 0)
        return vrep_status_from_errno(errno);
    unit->counter = stored->counter;
    return VREP_OK;
}

/* Both slots are whole before the file has its name: one without a whole slot is damaged, and is
 * never taken for an empty one. */
static int make(struct scsi_unit *unit)
{
    char aside[PATH_MAX];
    if (snprintf(aside, sizeof aside, "%s.new", unit->path) >= (int)sizeof aside)
        return VREP_E_RANGE;
    unit->fd = open(aside, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0640);
    if (unit->fd < 0)
        return vrep_status_from_errno(errno);
    int status = VREP_OK;
    for (int slot = 0; slot < SLOTS && status == VREP_OK; slot++)
        status = scsi_reservations_write(unit);
    if (status == VREP_OK && (fsync(unit->fd) != 0 || rename(aside, unit->path) != 0))
        status = vrep_status_from_errno(errno);
    if (status != VREP_OK)
        (void)unlink(aside);
    return status;
}

int scsi_reservations_open(struct scsi_unit *unit)
{
    unit->fd = open(unit->path, O_RDWR | O_CLOEXEC);
    int status = VREP_OK;
    if (unit->fd >= 0)
        status = load(unit);
    else
        status = errno == ENOENT ? make(unit) : vrep_status_from_errno(errno);
    return status == VREP_OK ? sync_directory(unit->path) : status;
}
