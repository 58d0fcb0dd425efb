#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/status.h"
#include "format/checksum.h"
#include "track/map.h"
#include "track/map_private.h"

/* Words copied between two looks at `moves`, and words written by one call. */
enum { BLOCK_WORDS = VREP_MAP_PAGE_WORDS, BUFFER_WORDS = 32 * BLOCK_WORDS };

struct vrep_checkpoint {
    struct vrep_map *map;
    int fd[2];
    unsigned next; /* which file is written next: the older one */
    uint64_t counter;
    uint64_t buffer[BUFFER_WORDS];
};

static int file_path(const char *prefix, unsigned which, char path[PATH_MAX])
{
    int n = snprintf(path, PATH_MAX, "%s.%u", prefix, which);
    return n < 0 || n >= PATH_MAX ? VREP_E_INVALID : VREP_OK;
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

static int write_all(int fd, const void *buffer, size_t size, uint64_t at)
{
    const uint8_t *from = buffer;
    while (size > 0) {
        ssize_t put = pwrite(fd, from, size, (off_t)at);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return vrep_status_from_errno(errno);
        from += put;
        at += (uint64_t)put;
        size -= (size_t)put;
    }
    return VREP_OK;
}

/* ---- reading --------------------------------------------------------------- */

static bool same_geometry(const struct vrep_map *map, const struct vrep_checkpoint_header *header)
{
    if (header->disks != map->disks || header->bit_bytes != map->header->bit_bytes ||
        memcmp(header->group_id, map->header->group_id, 16) != 0 ||
        memcmp(header->target_id, map->header->target_id, 16) != 0)
        return false;
    for (uint32_t i = 0; i < map->disks; i++)
        if (header->words[i] != map->disk[i].words || header->bytes[i] != map->disk[i].bytes)
            return false;
    return true;
}

/* Reads the bitmaps once: for their digest, and into unshipped when asked. */
static int read_bitmaps(int fd, struct vrep_map *map, uint64_t *buffer, bool load,
                        uint8_t digest[VREP_DIGEST_BYTES])
{
    struct vrep_digest state;
    uint64_t at = sizeof(struct vrep_checkpoint_header);
    vrep_digest_init(&state);
    for (uint32_t i = 0; i < map->disks; i++)
        for (uint64_t word = 0; word < map->disk[i].words;) {
            uint64_t left = map->disk[i].words - word,
                     n = left < BUFFER_WORDS ? left : BUFFER_WORDS;
            int status = read_all(fd, buffer, n * sizeof(uint64_t), at);
            if (status != VREP_OK)
                return status;
            vrep_digest_update(&state, buffer, n * sizeof(uint64_t));
            if (load)
                vrep_map_or_unshipped(map, i, word, buffer, n);
            at += n * sizeof(uint64_t);
            word += n;
        }
    vrep_digest_final(&state, digest);
    return VREP_OK;
}

/* NOT_FOUND, CORRUPT, VERSION, INVALID (whole, but of another map), or OK. */
static int judge(int fd, struct vrep_map *map, uint64_t *buffer,
                 struct vrep_checkpoint_header *header)
{
    uint8_t digest[VREP_DIGEST_BYTES];
    int status = read_all(fd, header, sizeof *header, 0);
    if (status != VREP_OK)
        return status;
    if (header->magic != VREP_CHECKPOINT_MAGIC)
        return VREP_E_CORRUPT;
    if (header->version != VREP_CHECKPOINT_VERSION)
        return VREP_E_VERSION;
    if (header->checksum !=
        vrep_checksum32(header, offsetof(struct vrep_checkpoint_header, checksum)))
        return VREP_E_CORRUPT;
    if (!same_geometry(map, header))
        return VREP_E_INVALID;
    status = read_bitmaps(fd, map, buffer, false, digest);
    if (status != VREP_OK)
        return status;
    return memcmp(digest, header->digest, sizeof digest) == 0 ? VREP_OK : VREP_E_CORRUPT;
}

int vrep_checkpoint_load(const char *prefix, struct vrep_map *map, bool *clean)
{
    struct vrep_checkpoint_header header[2];
    int fd[2] = {-1, -1}, status[2], result;
    uint64_t *buffer = malloc(BUFFER_WORDS * sizeof *buffer);
    if (buffer == NULL)
        return VREP_E_NOMEM;
    for (unsigned i = 0; i < 2; i++) {
        char path[PATH_MAX];
        status[i] = file_path(prefix, i, path);
        if (status[i] != VREP_OK)
            continue;
        fd[i] = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        status[i] =
            fd[i] < 0 ? vrep_status_from_errno(errno) : judge(fd[i], map, buffer, &header[i]);
    }
    int best = status[0] == VREP_OK ? 0 : 1;
    if (status[0] == VREP_OK && status[1] == VREP_OK && header[1].counter > header[0].counter)
        best = 1;
    if (status[best] == VREP_OK) {
        uint8_t digest[VREP_DIGEST_BYTES];
        result = read_bitmaps(fd[best], map, buffer, true, digest);
        *clean = header[best].clean == 1;
        vrep_map_acknowledge(map, header[best].durable);
    } else if (status[0] == VREP_E_NOT_FOUND) {
        result = status[1];
    } else if (status[1] == VREP_E_NOT_FOUND) {
        result = status[0];
    } else {
        result = status[0] == status[1] ? status[0] : VREP_E_CORRUPT;
    }
    for (unsigned i = 0; i < 2; i++)
        if (fd[i] >= 0)
            close(fd[i]);
    free(buffer);
    return result;
}

/* ---- writing ---------------------------------------------------------------- */

static int sync_directory(const char *path)
{
    char directory[PATH_MAX];
    const char *slash = strrchr(path, '/');
    size_t length = slash == NULL ? 0 : (size_t)(slash - path);
    if (slash == NULL)
        memcpy(directory, ".", 2);
    else {
        memcpy(directory, path, length);
        directory[length] = '\0';
    }
    int fd = open(slash == path ? "/" : directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    int status = fsync(fd) == 0 ? VREP_OK : vrep_status_from_errno(errno);
    close(fd);
    return status;
}

static uint64_t bytes_of(const struct vrep_map *map)
{
    uint64_t bytes = sizeof(struct vrep_checkpoint_header);
    for (uint32_t i = 0; i < map->disks; i++)
        bytes += map->disk[i].words * sizeof(uint64_t);
    return bytes;
}

/* Opens both files at their full size, so that a later checkpoint needs no space, and finds out
 * which one is newer. */
static int open_files(struct vrep_checkpoint *checkpoint, const char *prefix)
{
    uint64_t counter[2] = {0, 0};
    char path[PATH_MAX];
    for (unsigned i = 0; i < 2; i++) {
        struct vrep_checkpoint_header header;
        int status = file_path(prefix, i, path);
        if (status != VREP_OK)
            return status;
        int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (fd < 0)
            return vrep_status_from_errno(errno);
        checkpoint->fd[i] = fd;
        status = judge(fd, checkpoint->map, checkpoint->buffer, &header);
        /* One of the sizes before is the newest there is until the first of these is written. */
        if (status == VREP_OK || status == VREP_E_INVALID)
            counter[i] = header.counter;
        int error = posix_fallocate(fd, 0, (off_t)bytes_of(checkpoint->map));
        if (error != 0)
            return vrep_status_from_errno(error);
    }
    checkpoint->next = counter[0] <= counter[1] ? 0 : 1;
    checkpoint->counter = counter[0] < counter[1] ? counter[1] : counter[0];
    return sync_directory(path);
}

int vrep_checkpoint_open(const char *prefix, struct vrep_map *map, struct vrep_checkpoint **out)
{
    struct vrep_checkpoint *checkpoint = calloc(1, sizeof *checkpoint);
    if (checkpoint == NULL)
        return VREP_E_NOMEM;
    checkpoint->map = map;
    checkpoint->fd[0] = checkpoint->fd[1] = -1;
    int status = open_files(checkpoint, prefix);
    if (status != VREP_OK) {
        vrep_checkpoint_close(checkpoint);
        return status;
    }
    *out = checkpoint;
    return VREP_OK;
}

void vrep_checkpoint_close(struct vrep_checkpoint *checkpoint)
{
    if (checkpoint == NULL)
        return;
    for (unsigned i = 0; i < 2; i++)
        if (checkpoint->fd[i] >= 0)
            close(checkpoint->fd[i]);
    free(checkpoint);
}

/* The union of one block, while the owner goes on. A sync copy moves a bit from unshipped to the
 * open generation, so unshipped is read first; every other move is seen in `moves`. */
static void copy_block(const struct vrep_map *map, uint32_t disk, uint64_t at, uint64_t *out)
{
    for (;;) {
        uint64_t before = vrep_load_acquire_u64(&map->moves);
        const uint64_t *from = vrep_map_words(map, disk, VREP_MAP_UNSHIPPED) + at;
        for (int i = 0; i < BLOCK_WORDS; i++)
            out[i] = vrep_load_relaxed_u64(&from[i]);
        vrep_fence_acquire();
        for (unsigned g = 0; g < VREP_GENERATIONS; g++) {
            from = vrep_map_words(map, disk, g) + at;
            for (int i = 0; i < BLOCK_WORDS; i++)
                out[i] |= vrep_load_relaxed_u64(&from[i]);
        }
        vrep_fence_acquire();
        if (before % 2 == 0 && vrep_load_relaxed_u64(&map->moves) == before)
            return;
        sched_yield();
    }
}

static int write_bitmaps(struct vrep_checkpoint *checkpoint, int fd,
                         uint8_t digest[VREP_DIGEST_BYTES])
{
    const struct vrep_map *map = checkpoint->map;
    struct vrep_digest state;
    uint64_t at = sizeof(struct vrep_checkpoint_header);
    vrep_digest_init(&state);
    for (uint32_t i = 0; i < map->disks; i++)
        for (uint64_t word = 0; word < map->disk[i].words;) {
            uint64_t left = map->disk[i].words - word,
                     n = left < BUFFER_WORDS ? left : BUFFER_WORDS;
            for (uint64_t block = 0; block < n; block += BLOCK_WORDS)
                copy_block(map, i, word + block, checkpoint->buffer + block);
            vrep_digest_update(&state, checkpoint->buffer, n * sizeof(uint64_t));
            int status = write_all(fd, checkpoint->buffer, n * sizeof(uint64_t), at);
            if (status != VREP_OK)
                return status;
            at += n * sizeof(uint64_t);
            word += n;
        }
    vrep_digest_final(&state, digest);
    return VREP_OK;
}

int vrep_checkpoint_write(struct vrep_checkpoint *checkpoint, uint64_t head, bool clean)
{
    const struct vrep_map *map = checkpoint->map;
    int fd = checkpoint->fd[checkpoint->next];
    struct vrep_checkpoint_header header = {
        .magic = VREP_CHECKPOINT_MAGIC,
        .version = VREP_CHECKPOINT_VERSION,
        .disks = map->disks,
        .counter = checkpoint->counter + 1,
        .bit_bytes = map->header->bit_bytes,
        .clean = clean,
        .head = head,
    };
    memcpy(header.group_id, map->header->group_id, sizeof header.group_id);
    memcpy(header.target_id, map->header->target_id, sizeof header.target_id);
    for (uint32_t i = 0; i < map->disks; i++) {
        header.words[i] = map->disk[i].words;
        header.bytes[i] = map->disk[i].bytes;
    }
    int status = write_bitmaps(checkpoint, fd, header.digest);
    /* After the bits: what they leave out was acknowledged before. */
    header.durable = vrep_load_acquire_u64(&map->acknowledged);
    header.checksum = vrep_checksum32(&header, offsetof(struct vrep_checkpoint_header, checksum));
    if (status == VREP_OK)
        status = write_all(fd, &header, sizeof header, 0);
    if (status == VREP_OK && fdatasync(fd) != 0)
        status = vrep_status_from_errno(errno);
    /* After a failure the same file is written again, whole: the other one is still good. */
    if (status != VREP_OK)
        return status;
    checkpoint->counter++;
    checkpoint->next = 1 - checkpoint->next;
    return VREP_OK;
}
