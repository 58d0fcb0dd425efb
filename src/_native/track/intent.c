#include "track/intent.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/status.h"
#include "format/checksum.h"

#define EXTENT_SHIFT 24
static_assert(VREP_INTENT_BYTES == 1u << EXTENT_SHIFT, "extents are shifted");
#define DISK_BYTES_MAX (UINT64_C(1) << 56)

struct disk {
    uint64_t bytes;
    uint64_t extents;
    uint64_t first; /* bit of its first extent: a whole word */
};

struct vrep_intent {
    int fd;
    struct disk disk[VREP_DISKS_MAX];
    uint32_t disks;
    uint64_t words;
    uint64_t slot_bytes;
    uint64_t counter; /* of the slot that is durable */
    unsigned next;    /* the slot to write */
    bool writing;     /* between prepare and commit */
    bool changed;     /* hot differs from what was written last */
    uint8_t group_id[16];
    uint64_t *hot;       /* wanted on disk */
    uint64_t *durable;   /* known to be on disk, whichever slot is read after a crash */
    uint64_t *candidate; /* may leave when the cooling ends */
    uint32_t *inflight;  /* per extent */
    uint8_t *slot;       /* header and the bitmap that is being written */
};

static bool get(const uint64_t *bits, uint64_t at)
{
    return bits[at / 64] >> (at % 64) & 1;
}

static void put(uint64_t *bits, uint64_t at, bool value)
{
    uint64_t bit = UINT64_C(1) << (at % 64);
    bits[at / 64] = value ? bits[at / 64] | bit : bits[at / 64] & ~bit;
}

static uint64_t *frozen(const struct vrep_intent *intent)
{
    return (uint64_t *)(void *)(intent->slot + sizeof(struct vrep_intent_header));
}

/* ---- create, open ----------------------------------------------------------- */

static int prepare_memory(const uint8_t group_id[16], const uint64_t *disk_bytes, uint32_t disks,
                          struct vrep_intent **out)
{
    uint64_t words = 0;
    if (disks == 0 || disks > VREP_DISKS_MAX)
        return VREP_E_INVALID;
    for (uint32_t i = 0; i < disks; i++)
        if (disk_bytes[i] > DISK_BYTES_MAX)
            return VREP_E_INVALID;
    struct vrep_intent *intent = calloc(1, sizeof *intent);
    if (intent == NULL)
        return VREP_E_NOMEM;
    for (uint32_t i = 0; i < disks; i++) {
        uint64_t extents = (disk_bytes[i] + VREP_INTENT_BYTES - 1) >> EXTENT_SHIFT;
        intent->disk[i] =
            (struct disk){.bytes = disk_bytes[i], .extents = extents, .first = words * 64};
        words += (extents + 63) / 64;
    }
    intent->fd = -1;
    intent->disks = disks;
    intent->words = words;
    intent->slot_bytes = (sizeof(struct vrep_intent_header) + words * 8 + 4095) / 4096 * 4096;
    memcpy(intent->group_id, group_id, sizeof intent->group_id);
    intent->hot = calloc(words + 1, sizeof(uint64_t));
    intent->durable = calloc(words + 1, sizeof(uint64_t));
    intent->candidate = calloc(words + 1, sizeof(uint64_t));
    intent->inflight = calloc(words * 64 + 1, sizeof(uint32_t));
    intent->slot = aligned_alloc(4096, intent->slot_bytes);
    if (intent->hot == NULL || intent->durable == NULL || intent->candidate == NULL ||
        intent->inflight == NULL || intent->slot == NULL || intent->slot_bytes > UINT32_MAX) {
        int status = intent->slot_bytes > UINT32_MAX ? VREP_E_INVALID : VREP_E_NOMEM;
        vrep_intent_close(intent);
        return status;
    }
    memset(intent->slot, 0, intent->slot_bytes);
    *out = intent;
    return VREP_OK;
}

static int sync_directory(const char *path)
{
    char directory[PATH_MAX];
    int n = snprintf(directory, sizeof directory, "%s", path);
    if (n < 0 || n >= (int)sizeof directory)
        return VREP_E_INVALID;
    char *slash = strrchr(directory, '/');
    if (slash == NULL)
        (void)snprintf(directory, sizeof directory, ".");
    else
        slash[slash == directory ? 1 : 0] = '\0';
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    int status = fsync(fd) == 0 ? VREP_OK : vrep_status_from_errno(errno);
    close(fd);
    return status;
}

/* A new file has both slots before it has its name. */
static int make_file(struct vrep_intent *intent, const char *path)
{
    char aside[PATH_MAX];
    int n = snprintf(aside, sizeof aside, "%s.new", path);
    if (n < 0 || n >= (int)sizeof aside)
        return VREP_E_INVALID;
    intent->fd = open(aside, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (intent->fd < 0)
        return vrep_status_from_errno(errno);
    int status =
        vrep_status_from_errno(posix_fallocate(intent->fd, 0, (off_t)(2 * intent->slot_bytes)));
    for (int i = 0; i < 2 && status == VREP_OK; i++) {
        vrep_intent_prepare(intent);
        status = vrep_intent_write(intent);
        vrep_intent_commit(intent, status);
    }
    if (status == VREP_OK && rename(aside, path) != 0)
        status = vrep_status_from_errno(errno);
    if (status != VREP_OK) {
        unlink(aside);
        return status;
    }
    return sync_directory(path);
}

int vrep_intent_create(const char *path, const uint8_t group_id[16], const uint64_t *disk_bytes,
                       uint32_t disks, struct vrep_intent **out)
{
    struct vrep_intent *intent;
    int status = prepare_memory(group_id, disk_bytes, disks, &intent);
    if (status != VREP_OK)
        return status;
    status = make_file(intent, path);
    if (status != VREP_OK) {
        vrep_intent_close(intent);
        return status;
    }
    *out = intent;
    return VREP_OK;
}

static int read_all(int fd, void *buffer, size_t size, uint64_t at)
{
    uint8_t *to = buffer;
    while (size > 0) {
        ssize_t got = pread(fd, to, size, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return vrep_status_from_errno(errno);
        if (got == 0)
            return VREP_E_CORRUPT;
        to += got;
        at += (uint64_t)got;
        size -= (size_t)got;
    }
    return VREP_OK;
}

/* OK: the slot is whole and of this geometry, and stands in intent->slot. */
static int read_slot(struct vrep_intent *intent, unsigned which, uint64_t *counter)
{
    struct vrep_intent_header header;
    uint8_t digest[VREP_DIGEST_BYTES];
    int status = read_all(intent->fd, &header, sizeof header, which * intent->slot_bytes);
    if (status != VREP_OK)
        return status;
    if (header.magic != VREP_INTENT_MAGIC)
        return VREP_E_CORRUPT;
    if (header.version != VREP_INTENT_VERSION)
        return VREP_E_VERSION;
    if (header.checksum != vrep_checksum32(&header, offsetof(struct vrep_intent_header, checksum)))
        return VREP_E_CORRUPT;
    if (header.extent_bytes != VREP_INTENT_BYTES || header.disks != intent->disks ||
        header.words != intent->words || header.slot_bytes != intent->slot_bytes ||
        memcmp(header.group_id, intent->group_id, sizeof header.group_id) != 0)
        return VREP_E_INVALID;
    status = read_all(intent->fd, frozen(intent), intent->words * sizeof(uint64_t),
                      which * intent->slot_bytes + sizeof header);
    if (status != VREP_OK)
        return status;
    vrep_digest_once(frozen(intent), intent->words * sizeof(uint64_t), digest);
    if (memcmp(digest, header.digest, sizeof digest) != 0)
        return VREP_E_CORRUPT;
    *counter = header.counter;
    return VREP_OK;
}

static void adopt(struct vrep_intent *intent)
{
    for (uint32_t i = 0; i < intent->disks; i++)
        for (uint64_t e = 0; e < intent->disk[i].extents; e++) {
            uint64_t at = intent->disk[i].first + e;
            put(intent->hot, at, get(frozen(intent), at));
        }
    memcpy(intent->durable, intent->hot, intent->words * sizeof(uint64_t));
}

static int load(struct vrep_intent *intent)
{
    uint64_t counter[2];
    int first = read_slot(intent, 0, &counter[0]), second = read_slot(intent, 1, &counter[1]);
    if (first != VREP_OK && second != VREP_OK)
        return first == second ? first : VREP_E_CORRUPT;
    /* A torn slot is the one that was being written: the other one still holds all that is in
     * flight, as no write began before the torn one was synced. */
    unsigned best = second == VREP_OK && (first != VREP_OK || counter[1] > counter[0]) ? 1 : 0;
    if (best == 0) {
        first = read_slot(intent, 0, &counter[0]);
        if (first != VREP_OK)
            return first;
    }
    intent->counter = counter[best];
    intent->next = 1 - best;
    adopt(intent);
    return VREP_OK;
}

int vrep_intent_open(const char *path, const uint8_t group_id[16], const uint64_t *disk_bytes,
                     uint32_t disks, struct vrep_intent **out)
{
    struct vrep_intent *intent;
    struct stat info;
    int status = prepare_memory(group_id, disk_bytes, disks, &intent);
    if (status != VREP_OK)
        return status;
    intent->fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (intent->fd < 0 || fstat(intent->fd, &info) != 0)
        status = vrep_status_from_errno(errno);
    else if (!S_ISREG(info.st_mode))
        status = VREP_E_CORRUPT;
    else
        status = load(intent);
    if (status != VREP_OK) {
        vrep_intent_close(intent);
        return status;
    }
    *out = intent;
    return VREP_OK;
}

void vrep_intent_close(struct vrep_intent *intent)
{
    if (intent == NULL)
        return;
    if (intent->fd >= 0)
        close(intent->fd);
    free(intent->hot);
    free(intent->durable);
    free(intent->candidate);
    free(intent->inflight);
    free(intent->slot);
    free(intent);
}

/* ---- writes ------------------------------------------------------------------- */

/* Bits [first, last] of the extents that the range touches. */
static bool extents_of(const struct vrep_intent *intent, uint16_t disk, uint64_t offset,
                       uint64_t length, uint64_t *first, uint64_t *last)
{
    if (disk >= intent->disks || length == 0 || offset >= intent->disk[disk].bytes)
        return false;
    const struct disk *d = &intent->disk[disk];
    uint64_t left = d->bytes - offset;
    *first = d->first + (offset >> EXTENT_SHIFT);
    *last = d->first + ((offset + (length < left ? length : left) - 1) >> EXTENT_SHIFT);
    return true;
}

bool vrep_intent_begin(struct vrep_intent *intent, uint16_t disk, uint64_t offset, uint64_t length)
{
    uint64_t first, last;
    bool warm = true;
    if (!extents_of(intent, disk, offset, length, &first, &last))
        return true;
    for (uint64_t at = first; at <= last; at++) {
        put(intent->candidate, at, false);
        if (!get(intent->hot, at)) {
            put(intent->hot, at, true);
            intent->changed = true;
        }
        /* While a slot is being written, either may be the one that a crash leaves. */
        if (!get(intent->durable, at) || (intent->writing && !get(frozen(intent), at)))
            warm = false;
    }
    for (uint64_t at = first; warm && at <= last; at++)
        intent->inflight[at]++;
    return warm;
}

void vrep_intent_end(struct vrep_intent *intent, uint16_t disk, uint64_t offset, uint64_t length)
{
    uint64_t first, last;
    if (!extents_of(intent, disk, offset, length, &first, &last))
        return;
    for (uint64_t at = first; at <= last; at++)
        if (intent->inflight[at] > 0)
            intent->inflight[at]--;
}

bool vrep_intent_wants_sync(const struct vrep_intent *intent)
{
    return intent->changed && !intent->writing;
}

void vrep_intent_prepare(struct vrep_intent *intent)
{
    memcpy(frozen(intent), intent->hot, intent->words * sizeof(uint64_t));
    intent->writing = true;
    intent->changed = false;
}

int vrep_intent_write(struct vrep_intent *intent)
{
    struct vrep_intent_header header = {
        .magic = VREP_INTENT_MAGIC,
        .version = VREP_INTENT_VERSION,
        .extent_bytes = VREP_INTENT_BYTES,
        .counter = intent->counter + 1,
        .disks = intent->disks,
        .slot_bytes = (uint32_t)intent->slot_bytes,
        .words = intent->words,
    };
    memcpy(header.group_id, intent->group_id, sizeof header.group_id);
    vrep_digest_once(frozen(intent), intent->words * sizeof(uint64_t), header.digest);
    header.checksum = vrep_checksum32(&header, offsetof(struct vrep_intent_header, checksum));
    memcpy(intent->slot, &header, sizeof header);
    uint64_t done = 0, at = intent->next * intent->slot_bytes;
    while (done < intent->slot_bytes) {
        ssize_t written =
            pwrite(intent->fd, intent->slot + done, intent->slot_bytes - done, (off_t)(at + done));
        if (written < 0 && errno != EINTR)
            return vrep_status_from_errno(errno);
        if (written > 0)
            done += (uint64_t)written;
    }
    return fdatasync(intent->fd) == 0 ? VREP_OK : vrep_status_from_errno(errno);
}

void vrep_intent_commit(struct vrep_intent *intent, int status)
{
    intent->writing = false;
    if (status == VREP_OK) {
        memcpy(intent->durable, frozen(intent), intent->words * sizeof(uint64_t));
        intent->counter++;
        intent->next = 1 - intent->next;
        return;
    }
    /* Not known which slot a crash would leave: only what both hold is safe. The same slot is
     * written again, whole. */
    for (uint64_t i = 0; i < intent->words; i++)
        intent->durable[i] &= frozen(intent)[i];
    intent->changed = true;
}

/* ---- cooling -------------------------------------------------------------------- */

void vrep_intent_cool_begin(struct vrep_intent *intent)
{
    for (uint64_t word = 0; word < intent->words; word++) {
        uint64_t left = intent->hot[word];
        intent->candidate[word] = 0;
        while (left != 0) {
            uint64_t at = word * 64 + (uint64_t)__builtin_ctzll(left);
            left &= left - 1;
            if (intent->inflight[at] == 0)
                put(intent->candidate, at, true);
        }
    }
}

void vrep_intent_cool_end(struct vrep_intent *intent, bool ok)
{
    for (uint64_t word = 0; word < intent->words; word++) {
        if (ok && intent->candidate[word] != 0) {
            intent->hot[word] &= ~intent->candidate[word];
            intent->changed = true;
        }
        intent->candidate[word] = 0;
    }
}

uint64_t vrep_intent_hot_extents(const struct vrep_intent *intent)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < intent->words; i++)
        count += (uint64_t)__builtin_popcountll(intent->hot[i]);
    return count;
}

bool vrep_intent_next(const struct vrep_intent *intent, uint16_t disk, uint64_t from,
                      uint64_t *offset, uint64_t *length)
{
    if (disk >= intent->disks)
        return false;
    const struct disk *d = &intent->disk[disk];
    uint64_t at = from >> EXTENT_SHIFT;
    while (at < d->extents && !get(intent->durable, d->first + at))
        at++;
    if (from >= d->bytes || at >= d->extents)
        return false;
    uint64_t end = at;
    while (end < d->extents && get(intent->durable, d->first + end))
        end++;
    *offset = at << EXTENT_SHIFT;
    *length = (end << EXTENT_SHIFT < d->bytes ? end << EXTENT_SHIFT : d->bytes) - *offset;
    return true;
}
