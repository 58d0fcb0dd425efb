#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/shared.h"
#include "base/status.h"
#include "disk/internal.h"
#include "format/checksum.h"

#define HEADER_BYTES sizeof(struct vrep_presence_header)
#define BLOCK_BYTES_MIN 512u
#define BLOCK_BYTES_MAX (1u << 20)
#define SYNC_WORDS 512u /* presence is written in pages of 4 KiB */

struct vrep_presence {
    int fd;
    uint32_t block_bytes;
    uint64_t blocks, words;
    struct vrep_shared memory; /* of live: a killed process loses no bit */
    uint64_t *live;            /* set as data are written; any thread, atomically */
    uint64_t *synced;          /* what the file holds; under lock */
    uint64_t *snapshot;        /* of live, when a sync begins; under lock */
    int failed; /* first failed sync; sticky: what it covered cannot be trusted any more */
    pthread_mutex_t lock;
};

static uint64_t word_mask(uint64_t from, uint64_t to) /* bits [from, to) of one word */
{
    uint64_t high = to == 64 ? ~0ull : (1ull << to) - 1;
    return high & ~((1ull << from) - 1);
}

static int full_read(int fd, void *buffer, size_t bytes, off_t at)
{
    char *to = buffer;
    while (bytes > 0) {
        ssize_t n = pread(fd, to, bytes, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return vrep_status_from_errno(errno);
        if (n == 0)
            return VREP_E_TORN;
        to += n;
        bytes -= (size_t)n;
        at += n;
    }
    return VREP_OK;
}

static int full_write(int fd, const void *buffer, size_t bytes, off_t at)
{
    const char *from = buffer;
    while (bytes > 0) {
        ssize_t n = pwrite(fd, from, bytes, at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return vrep_status_from_errno(errno);
        from += n;
        bytes -= (size_t)n;
        at += n;
    }
    return VREP_OK;
}

static uint32_t checksum_of(const struct vrep_presence_header *header)
{
    return vrep_checksum32(header, offsetof(struct vrep_presence_header, checksum));
}

static struct vrep_presence_header header_of(const struct vrep_presence *p,
                                             const uint8_t view_id[16], uint64_t disk_bytes)
{
    struct vrep_presence_header header = {
        .magic = VREP_PRESENCE_MAGIC,
        .version = VREP_PRESENCE_VERSION,
        .block_bytes = p->block_bytes,
        .disk_bytes = disk_bytes,
        .words = p->words,
    };
    memcpy(header.view_id, view_id, 16);
    return header;
}

static int presence_create(struct vrep_presence *p, const uint8_t view_id[16], uint64_t disk_bytes)
{
    struct vrep_presence_header header = header_of(p, view_id, disk_bytes);
    header.checksum = checksum_of(&header);
    /* To nothing first: bits of a file that was there before must not survive. */
    if (ftruncate(p->fd, 0) != 0 || ftruncate(p->fd, (off_t)(HEADER_BYTES + p->words * 8)) != 0)
        return vrep_status_from_errno(errno);
    int status = full_write(p->fd, &header, sizeof header, 0);
    if (status == VREP_OK && fsync(p->fd) != 0)
        status = vrep_status_from_errno(errno);
    return status;
}

static int presence_load(struct vrep_presence *p, const uint8_t view_id[16], uint64_t disk_bytes,
                         off_t file_bytes)
{
    struct vrep_presence_header header;
    if (file_bytes < (off_t)HEADER_BYTES)
        return VREP_E_TORN;
    int status = full_read(p->fd, &header, sizeof header, 0);
    if (status != VREP_OK)
        return status;
    if (header.magic != VREP_PRESENCE_MAGIC || header.checksum != checksum_of(&header))
        return VREP_E_CORRUPT;
    if (header.version != VREP_PRESENCE_VERSION)
        return VREP_E_VERSION;
    if (header.block_bytes != p->block_bytes || header.disk_bytes != disk_bytes ||
        header.words != p->words || memcmp(header.view_id, view_id, 16) != 0)
        return VREP_E_INVALID;
    if ((uint64_t)file_bytes != HEADER_BYTES + p->words * 8)
        return VREP_E_TORN;
    status = full_read(p->fd, p->synced, p->words * 8, HEADER_BYTES);
    if (status != VREP_OK)
        return status;
    if (p->blocks % 64 != 0 && (p->synced[p->words - 1] & ~word_mask(0, p->blocks % 64)) != 0)
        return VREP_E_CORRUPT; /* bits past the end of the disk */
    for (uint64_t i = 0; i < p->words; i++)
        p->live[i] |= p->synced[i];
    return VREP_OK;
}

/* Maps the live bits that a killed process left in this boot, or makes new ones: theirs is no word
 * that a power loss leaves behind, nor one after a sync failed. */
static int live_open(struct vrep_presence *p, const char *path, const uint8_t view_id[16],
                     uint64_t disk_bytes, bool fresh)
{
    char name[PATH_MAX];
    int n = snprintf(name, sizeof name, "%s.live", path);
    if (n < 0 || (size_t)n >= sizeof name)
        return VREP_E_INVALID;
    struct vrep_presence_header due = header_of(p, view_id, disk_bytes);
    due.magic = VREP_PRESENCE_LIVE_MAGIC;
    int status = vrep_boot_id(due.boot_id);
    if (status != VREP_OK)
        return status;
    due.checksum = checksum_of(&due);
    uint64_t bytes = HEADER_BYTES + p->words * 8;
    status = fresh ? VREP_E_NOT_FOUND : vrep_shared_attach(name, bytes, &p->memory);
    if (status == VREP_OK && p->memory.bytes != bytes) {
        vrep_shared_close(&p->memory);
        status = VREP_E_NOT_FOUND;
    }
    /* In place: a full disk has room for it. The header goes first and comes back last. */
    if (status == VREP_OK && memcmp(p->memory.base, &due, sizeof due) != 0) {
        memset(p->memory.base, 0, bytes);
        vrep_fence_full();
        memcpy(p->memory.base, &due, sizeof due);
    }
    if (status == VREP_E_NOT_FOUND || status == VREP_E_CORRUPT) {
        status = vrep_shared_create(name, bytes, 0600, &p->memory);
        if (status != VREP_OK)
            return status;
        memcpy(p->memory.base, &due, sizeof due);
        status = vrep_shared_publish(&p->memory, name);
        if (status != VREP_OK)
            vrep_shared_discard(&p->memory, name);
    }
    if (status != VREP_OK)
        return status;
    p->live = (uint64_t *)(void *)((char *)p->memory.base + HEADER_BYTES);
    if (p->blocks % 64 != 0)
        p->live[p->words - 1] &= word_mask(0, p->blocks % 64);
    return VREP_OK;
}

/* No later process may believe what was not synced. */
static void live_distrust(struct vrep_presence *p)
{
    struct vrep_presence_header *header = p->memory.base;
    vrep_store_release_u32(&header->distrust, 1);
}

static int presence_open(struct vrep_disk *disk, const char *path, const uint8_t view_id[16],
                         uint32_t block_bytes, bool fresh)
{
    struct vrep_presence *p = calloc(1, sizeof *p);
    if (p == NULL)
        return VREP_E_NOMEM;
    disk->presence = p;
    pthread_mutex_init(&p->lock, NULL);
    p->fd = -1;
    p->block_bytes = block_bytes;
    p->blocks = (disk->bytes + block_bytes - 1) / block_bytes;
    p->words = (p->blocks + 63) / 64;
    p->synced = calloc(p->words + 1, 8);
    p->snapshot = calloc(p->words + 1, 8);
    char name[PATH_MAX];
    int n = snprintf(name, sizeof name, "%s.presence", path);
    if (p->synced == NULL || p->snapshot == NULL)
        return VREP_E_NOMEM;
    if (n < 0 || (size_t)n >= sizeof name)
        return VREP_E_INVALID;
    int status = live_open(p, path, view_id, disk->bytes, fresh);
    if (status != VREP_OK)
        return status;
    p->fd = open(name, O_RDWR | O_CLOEXEC | (fresh ? O_CREAT : 0), 0600);
    struct stat st;
    if (p->fd < 0 || fstat(p->fd, &st) != 0)
        return errno == ENOENT ? VREP_E_CORRUPT : vrep_status_from_errno(errno);
    /* A fresh overlay file holds no data, so whatever an interrupted creation left is void. */
    return fresh ? presence_create(p, view_id, disk->bytes)
                 : presence_load(p, view_id, disk->bytes, st.st_size);
}

/* An empty file when there is none. */
static int touch(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0600);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    close(fd);
    return VREP_OK;
}

static int sync_names(const char *path)
{
    char copy[PATH_MAX];
    if (snprintf(copy, sizeof copy, "%s", path) >= (int)sizeof copy)
        return VREP_E_INVALID;
    int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    int status = fsync(fd) == 0 ? VREP_OK : vrep_status_from_errno(errno);
    close(fd);
    return status;
}

/* Creation sets the size last, when the presence file and both names are stable: an empty data file
 * is one that was never finished, and one with a size has its presence. */
static int set_size(struct vrep_disk *disk, const char *path, uint64_t disk_bytes)
{
    int status = sync_names(path);
    if (status == VREP_OK && (ftruncate(disk->fd, (off_t)disk_bytes) != 0 || fsync(disk->fd) != 0))
        status = vrep_status_from_errno(errno);
    return status;
}

/* Bytes of the file at path, which is empty until the view's presence file is stable. */
static int marker_bytes(const char *path, uint64_t *bytes)
{
    struct stat st;
    if (stat(path, &st) != 0)
        return vrep_status_from_errno(errno);
    *bytes = (uint64_t)st.st_size;
    return VREP_OK;
}

/* Of a view that fills another disk, the same as set_size: the sparse file says it, and no more. */
static int set_marker(const char *path, uint64_t disk_bytes)
{
    int status = sync_names(path);
    if (status != VREP_OK)
        return status;
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    if (ftruncate(fd, (off_t)disk_bytes) != 0 || fsync(fd) != 0)
        status = vrep_status_from_errno(errno);
    close(fd);
    return status;
}

int vrep_overlay_open(struct vrep_engine *engine, const char *path, const char *onto,
                      const uint8_t view_id[16], uint64_t disk_bytes, uint32_t block_bytes,
                      struct vrep_disk **out)
{
    if (block_bytes < BLOCK_BYTES_MIN || block_bytes > BLOCK_BYTES_MAX ||
        (block_bytes & (block_bytes - 1)) != 0 || disk_bytes == 0 ||
        disk_bytes % VREP_SECTOR_BYTES != 0)
        return VREP_E_INVALID;
    int status = touch(path);
    if (status != VREP_OK)
        return status;
    char uri[PATH_MAX];
    int n = snprintf(uri, sizeof uri, "file:%s", path);
    if (n < 0 || (size_t)n >= sizeof uri)
        return VREP_E_INVALID;
    struct vrep_disk *disk;
    status = vrep_disk_open(engine, onto != NULL ? onto : uri, 0, &disk);
    if (status != VREP_OK)
        return status;
    /* Judged under the lock of the data: nobody else creates it now. */
    uint64_t bytes = disk->bytes;
    if (onto != NULL && disk->bytes != disk_bytes)
        status = VREP_E_INVALID;
    else if (onto != NULL)
        status = marker_bytes(path, &bytes);
    bool fresh = bytes == 0;
    if (status == VREP_OK && !fresh && bytes != disk_bytes)
        status = VREP_E_INVALID;
    disk->bytes = disk_bytes;
    disk->block_bytes = block_bytes; /* what covers less of an absent block waits for its fill */
    if (status == VREP_OK)
        status = presence_open(disk, path, view_id, block_bytes, fresh);
    if (status == VREP_OK && fresh)
        status = onto != NULL ? set_marker(path, disk_bytes) : set_size(disk, path, disk_bytes);
    if (status != VREP_OK) {
        vrep_disk_close(disk);
        return status;
    }
    *out = disk;
    return VREP_OK;
}

void vrep_overlay_free(struct vrep_disk *disk)
{
    struct vrep_presence *p = disk->presence;
    if (p->fd >= 0)
        close(p->fd);
    vrep_shared_close(&p->memory);
    free(p->synced);
    free(p->snapshot);
    pthread_mutex_destroy(&p->lock);
    free(p);
    disk->presence = NULL;
}

bool vrep_disk_is_overlay(const struct vrep_disk *disk)
{
    return disk->presence != NULL;
}

static bool present(const struct vrep_presence *p, uint64_t block)
{
    return (vrep_load_relaxed_u64(&p->live[block / 64]) >> (block % 64) & 1) != 0;
}

bool vrep_overlay_absent(const struct vrep_disk *disk, uint64_t offset, uint64_t length,
                         uint64_t *absent, uint64_t *absent_length)
{
    const struct vrep_presence *p = disk->presence;
    if (p == NULL || length == 0)
        return false;
    uint64_t block = offset / p->block_bytes;
    uint64_t end = (offset + length + p->block_bytes - 1) / p->block_bytes;
    if (end > p->blocks)
        end = p->blocks;
    while (block < end) {
        uint64_t word = vrep_load_relaxed_u64(&p->live[block / 64]);
        if (block % 64 == 0 && word == ~0ull)
            block += 64;
        else if (word >> (block % 64) & 1)
            block++;
        else
            break;
    }
    if (block >= end)
        return false;
    uint64_t last = block + 1;
    while (last < end && !present(p, last))
        last++;
    *absent = block * p->block_bytes;
    uint64_t stop = last * p->block_bytes;
    *absent_length = (stop < disk->bytes ? stop : disk->bytes) - *absent;
    return true;
}

void vrep_overlay_set_present(struct vrep_disk *disk, uint64_t offset, uint64_t length)
{
    vrep_overlay_written(disk, offset, length);
}

void vrep_overlay_written(struct vrep_disk *disk, uint64_t offset, uint64_t length)
{
    struct vrep_presence *p = disk->presence;
    uint64_t end = offset + length;
    uint64_t block = (offset + p->block_bytes - 1) / p->block_bytes;
    /* the last block of a disk may be short: it is whole when the range reaches the end */
    uint64_t last = end >= disk->bytes ? p->blocks : end / p->block_bytes;
    while (block < last) {
        uint64_t from = block % 64, to = last - block + from < 64 ? last - block + from : 64;
        vrep_fetch_or_u64(&p->live[block / 64], word_mask(from, to));
        block += to - from;
    }
}

/* The words of [first, first + count) that are not in the file yet; data were synced since they
 * were read, so every bit in `snapshot` stands for stable data. */
static int write_words(struct vrep_presence *p, const uint64_t *snapshot, uint64_t first,
                       uint64_t count)
{
    if (memcmp(snapshot, p->synced + first, count * 8) == 0)
        return VREP_OK;
    int status = full_write(p->fd, snapshot, count * 8, (off_t)(HEADER_BYTES + first * 8));
    if (status == VREP_OK)
        memcpy(p->synced + first, snapshot, count * 8);
    return status;
}

int vrep_overlay_sync(struct vrep_disk *disk)
{
    struct vrep_presence *p = disk->presence;
    pthread_mutex_lock(&p->lock);
    uint64_t *snapshot = p->snapshot;
    int status = p->failed;
    if (status == VREP_OK) {
        for (uint64_t i = 0; i < p->words; i++)
            snapshot[i] = vrep_load_acquire_u64(&p->live[i]);
        if (fdatasync(disk->fd) != 0)
            status = vrep_status_from_errno(errno);
    }
    for (uint64_t i = 0; status == VREP_OK && i < p->words; i += SYNC_WORDS)
        status =
            write_words(p, snapshot + i, i, p->words - i < SYNC_WORDS ? p->words - i : SYNC_WORDS);
    if (status == VREP_OK && fdatasync(p->fd) != 0)
        status = vrep_status_from_errno(errno);
    if (status != VREP_OK)
        live_distrust(p);
    p->failed = status;
    pthread_mutex_unlock(&p->lock);
    return status;
}

uint64_t vrep_overlay_present_bytes(const struct vrep_disk *disk)
{
    const struct vrep_presence *p = disk->presence;
    uint64_t blocks = 0;
    for (uint64_t i = 0; i < p->words; i++)
        blocks += (uint64_t)__builtin_popcountll(vrep_load_relaxed_u64(&p->live[i]));
    uint64_t bytes = blocks * p->block_bytes;
    bool short_last = disk->bytes % p->block_bytes != 0 && present(p, p->blocks - 1);
    return short_last ? bytes - p->block_bytes + disk->bytes % p->block_bytes : bytes;
}
