#include "filter/state.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/status.h"
#include "filter/fault.h"
#include "format/checksum.h"

#define SLOTS 2

static uint32_t checksum_of(const struct vrep_state *state)
{
    return vrep_checksum32(state, offsetof(struct vrep_state, checksum));
}

/* The newest whole slot of an open file. What a short file lacks is read as zeroes, as it will be
 * once the file has its length again: one reading before and after. */
static int read_newest(int fd, struct vrep_state *state)
{
    bool found = false;
    int failure = VREP_E_CORRUPT;
    for (int slot = 0; slot < SLOTS; slot++) {
        struct vrep_state candidate = {0};
        ssize_t got = pread(fd, &candidate, sizeof candidate, slot * (off_t)sizeof candidate);
        if (got < 0)
            return vrep_status_from_errno(errno);
        if (candidate.magic != VREP_STATE_MAGIC || candidate.checksum != checksum_of(&candidate))
            continue;
        if (candidate.version != VREP_STATE_VERSION) {
            failure = VREP_E_VERSION;
            continue;
        }
        /* One that stands in the other's place, or that nothing can follow, was never written. */
        if (candidate.disks == 0 || candidate.disks > VREP_DISKS_MAX ||
            candidate.counter % SLOTS != (uint64_t)slot ||
            candidate.counter >= VREP_STATE_COUNTER_LIMIT)
            continue;
        if (!found || candidate.counter > state->counter)
            *state = candidate;
        found = true;
    }
    return found ? VREP_OK : failure;
}

int vrep_state_load(const char *path, const uint8_t group_id[16], struct vrep_state *state)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    int status = read_newest(fd, state);
    if (close(fd) != 0 && status == VREP_OK)
        status = vrep_status_from_errno(errno);
    if (status == VREP_OK && memcmp(state->group_id, group_id, 16) != 0)
        status = VREP_E_INVALID;
    return status;
}

/* A name is durable only when its directory is. */
static int sync_directory(const char *path)
{
    char copy[PATH_MAX];
    if (snprintf(copy, sizeof copy, "%s", path) >= (int)sizeof copy)
        return VREP_E_RANGE;
    int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    int status = fsync(fd) == 0 ? VREP_OK : vrep_status_from_errno(errno);
    if (close(fd) != 0 && status == VREP_OK)
        status = vrep_status_from_errno(errno);
    return status;
}

int vrep_state_open(const char *path, struct vrep_state_file *file)
{
    file->counter = 0;
    file->fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0640);
    if (file->fd < 0)
        return vrep_status_from_errno(errno);
    struct vrep_state newest;
    int status = VREP_OK;
    struct stat stat;
    if (fstat(file->fd, &stat) != 0 || (stat.st_size < (off_t)(SLOTS * sizeof newest) &&
                                        ftruncate(file->fd, SLOTS * sizeof newest) != 0))
        status = vrep_status_from_errno(errno);
    if (status == VREP_OK) {
        status = read_newest(file->fd, &newest);
        if (status == VREP_OK)
            file->counter = newest.counter;
        else if (status == VREP_E_CORRUPT)
            status = VREP_OK; /* nothing here yet, or nothing left */
    }
    if (status == VREP_OK && fsync(file->fd) != 0)
        status = vrep_status_from_errno(errno);
    if (status == VREP_OK)
        status = sync_directory(path);
    if (status != VREP_OK)
        vrep_state_close(file);
    return status;
}

int vrep_state_write(struct vrep_state_file *file, struct vrep_state *state)
{
    int status = vrep_fault("state.write");
    if (status != VREP_OK)
        return status;
    if (file->counter + 1 >= VREP_STATE_COUNTER_LIMIT)
        return VREP_E_FULL;
    state->magic = VREP_STATE_MAGIC;
    state->version = VREP_STATE_VERSION;
    state->counter = file->counter + 1;
    state->checksum = checksum_of(state);
    off_t at = (off_t)(state->counter % SLOTS) * (off_t)sizeof *state;
    ssize_t put = pwrite(file->fd, state, sizeof *state, at);
    if (put < 0)
        return vrep_status_from_errno(errno);
    if (put != (ssize_t)sizeof *state)
        return VREP_E_NOSPACE;
    if (fdatasync(file->fd) != 0)
        return vrep_status_from_errno(errno);
    file->counter = state->counter;
    return VREP_OK;
}

void vrep_state_close(struct vrep_state_file *file)
{
    if (file->fd >= 0)
        close(file->fd);
    file->fd = -1;
}
