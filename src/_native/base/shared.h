/*
 * Files in shared memory: one owner that writes them, readers that map them.
 *
 * An owner holds an exclusive lock on the file from create or attach to close,
 * so a second owner is refused while the first lives, and the kernel frees the
 * lock when it dies. A file is made aside under "<path>.new", fully allocated
 * (a later access can not fail for want of memory) and becomes visible at once
 * with publish. Sizes are bytes. Handles belong to one thread.
 */
#ifndef VREP_BASE_SHARED_H
#define VREP_BASE_SHARED_H

#include <stdint.h>

struct vrep_shared {
    void *base;
    uint64_t bytes;
    int fd;
};

/* The 16 bytes of this boot of the host: memory of another boot is never valid. */
int vrep_boot_id(uint8_t id[16]);

/* E_BUSY: another owner is making one, or owns what stands at path. E_NOSPACE: not enough memory.
 */
int vrep_shared_create(const char *path, uint64_t bytes, uint32_t mode, struct vrep_shared *out);

/* Puts a created file in the place of path. After a failure the caller discards. */
int vrep_shared_publish(const struct vrep_shared *shared, const char *path);

/* Removes a created file that was not published, and closes it. */
void vrep_shared_discard(struct vrep_shared *shared, const char *path);

/* Owner: maps the whole file for reading and writing. E_NOT_FOUND, E_BUSY (its owner lives),
 * E_PERMISSION (not our file, or others may write it), E_CORRUPT (shorter than bytes_min, or not a
 * regular file). */
int vrep_shared_attach(const char *path, uint64_t bytes_min, struct vrep_shared *out);

/* Reader: maps the whole file read-only, without a lock. */
int vrep_shared_open(const char *path, uint64_t bytes_min, struct vrep_shared *out);

/* Maps every page of an owner's file now (0.4 ms for a MiB), so that none faults when it is used
 * first. Any thread, until close. */
void vrep_shared_populate(const struct vrep_shared *shared);

/* Unmaps, closes, and so gives the lock back. Safe on a zeroed handle. */
void vrep_shared_close(struct vrep_shared *shared);

#endif
