#include "base/shared.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/status.h"

enum { POPULATE_BYTES = 4 << 20 };

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return -1;
}

int vrep_boot_id(uint8_t id[16])
{
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    char text[64];
    ssize_t got = read(fd, text, sizeof text);
    close(fd);
    int digits = 0;
    for (ssize_t i = 0; i < got && digits < 32; i++) {
        int digit = hex_digit(text[i]);
        if (digit < 0)
            continue;
        uint8_t *byte = &id[digits / 2];
        *byte = (uint8_t)(digits % 2 ? *byte | digit : digit << 4);
        digits++;
    }
    return digits == 32 ? VREP_OK : VREP_E_IO;
}

static int aside_path(const char *path, char aside[PATH_MAX])
{
    int n = snprintf(aside, PATH_MAX, "%s.new", path);
    return n < 0 || n >= PATH_MAX ? VREP_E_INVALID : VREP_OK;
}

static bool same_file(int fd, const char *path)
{
    struct stat held, named;
    return fstat(fd, &held) == 0 && lstat(path, &named) == 0 && held.st_dev == named.st_dev &&
           held.st_ino == named.st_ino;
}

/* Opens and locks what stands at path. The name may move to another file between the two steps,
 * so it is looked at again under the lock. */
static int open_locked(const char *path, int flags, int *out)
{
    for (int attempt = 0; attempt < 100; attempt++) {
        int fd = open(path, flags | O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
        if (fd < 0)
            return vrep_status_from_errno(errno);
        if (flock(fd, LOCK_EX | LOCK_NB) != 0) {
            int error = errno;
            close(fd);
            return error == EWOULDBLOCK ? VREP_E_BUSY : vrep_status_from_errno(error);
        }
        if (same_file(fd, path)) {
            *out = fd;
            return VREP_OK;
        }
        close(fd);
    }
    return VREP_E_BUSY;
}

static int map_file(int fd, uint64_t bytes, int protection, struct vrep_shared *out)
{
    void *base = mmap(NULL, bytes, protection, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED)
        return vrep_status_from_errno(errno);
    *out = (struct vrep_shared){.base = base, .bytes = bytes, .fd = fd};
    return VREP_OK;
}

static int allocate(int fd, uint64_t bytes, uint32_t mode)
{
    int failed;
    if (ftruncate(fd, 0) != 0 || fchmod(fd, mode) != 0)
        return vrep_status_from_errno(errno);
    do
        failed = posix_fallocate(fd, 0, (off_t)bytes);
    while (failed == EINTR);
    return failed != 0 ? vrep_status_from_errno(failed) : VREP_OK;
}

int vrep_shared_create(const char *path, uint64_t bytes, uint32_t mode, struct vrep_shared *out)
{
    char aside[PATH_MAX];
    int fd, status = aside_path(path, aside);
    *out = (struct vrep_shared){.fd = -1};
    if (status != VREP_OK || bytes == 0 || bytes > INT64_MAX)
        return VREP_E_INVALID;
    status = open_locked(aside, O_CREAT, &fd);
    if (status != VREP_OK)
        return status;
    status = allocate(fd, bytes, mode);
    if (status == VREP_OK)
        status = map_file(fd, bytes, PROT_READ | PROT_WRITE, out);
    if (status != VREP_OK) {
        unlink(aside);
        close(fd);
    }
    return status;
}

int vrep_shared_publish(const struct vrep_shared *shared, const char *path)
{
    char aside[PATH_MAX];
    int old, status = aside_path(path, aside);
    if (status != VREP_OK)
        return status;
    if (!same_file(shared->fd, aside))
        return VREP_E_BUSY;
    /* The old file stays locked until the new one has its name: an owner that attaches meanwhile
     * sees E_BUSY, never the file that is about to vanish. */
    status = open_locked(path, 0, &old);
    if (status != VREP_OK && status != VREP_E_NOT_FOUND)
        return status;
    int failed = rename(aside, path);
    int error = errno;
    if (status == VREP_OK)
        close(old);
    return failed != 0 ? vrep_status_from_errno(error) : VREP_OK;
}

void vrep_shared_discard(struct vrep_shared *shared, const char *path)
{
    char aside[PATH_MAX];
    if (shared->base != NULL && aside_path(path, aside) == VREP_OK && same_file(shared->fd, aside))
        unlink(aside);
    vrep_shared_close(shared);
}

int vrep_shared_attach(const char *path, uint64_t bytes_min, struct vrep_shared *out)
{
    struct stat info;
    int fd, status;
    *out = (struct vrep_shared){.fd = -1};
    status = open_locked(path, 0, &fd);
    if (status != VREP_OK)
        return status;
    if (fstat(fd, &info) != 0)
        status = vrep_status_from_errno(errno);
    else if (!S_ISREG(info.st_mode) || info.st_size <= 0 || (uint64_t)info.st_size < bytes_min)
        status = VREP_E_CORRUPT;
    else if (info.st_uid != geteuid() || (info.st_mode & (S_IWGRP | S_IWOTH)) != 0)
        status = VREP_E_PERMISSION;
    else
        status = map_file(fd, (uint64_t)info.st_size, PROT_READ | PROT_WRITE, out);
    if (status != VREP_OK)
        close(fd);
    return status;
}

int vrep_shared_open(const char *path, uint64_t bytes_min, struct vrep_shared *out)
{
    struct stat info;
    int status;
    *out = (struct vrep_shared){.fd = -1};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    if (fstat(fd, &info) != 0)
        status = vrep_status_from_errno(errno);
    else if (!S_ISREG(info.st_mode) || info.st_size <= 0 || (uint64_t)info.st_size < bytes_min)
        status = VREP_E_CORRUPT;
    else
        status = map_file(fd, (uint64_t)info.st_size, PROT_READ, out);
    if (status != VREP_OK)
        close(fd);
    return status;
}

void vrep_shared_populate(const struct vrep_shared *shared)
{
    /* Advice: where the kernel does not know it, each page faults when it is used first. In
     * pieces: each holds up whoever wants to change the process's mappings, as a new thread does.
     */
    for (uint64_t at = 0; at < shared->bytes; at += POPULATE_BYTES) {
        uint64_t left = shared->bytes - at;
        (void)madvise((uint8_t *)shared->base + at, left < POPULATE_BYTES ? left : POPULATE_BYTES,
                      MADV_POPULATE_WRITE);
    }
}

void vrep_shared_close(struct vrep_shared *shared)
{
    if (shared->base == NULL)
        return;
    munmap(shared->base, shared->bytes);
    close(shared->fd);
    *shared = (struct vrep_shared){.fd = -1};
}
