/* Forget: a shim (LD_PRELOAD) that writes down what a process does to the files below a directory,
 * so that forget.py can rebuild what a power loss at any moment could have left of them.
 *
 * VREP_FORGET_DIR   the directory, absolute and resolved
 * VREP_FORGET_LOG   the log, outside of it
 * VREP_FORGET_US    how long a sync takes; none reaches the storage
 * VREP_FORGET_SPEED how many times faster CLOCK_MONOTONIC runs
 *
 * A write and its entry are made under one lock: an entry stands for a finished write.  A sync has
 * two entries, and covers what stands before the first.  forget_mark() adds an entry of the
 * program's own, in the same order.  Writes through memory maps and io_uring are not seen.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind { CREATE = 1, WRITE, TRUNCATE, ZERO, RENAME, UNLINK, SYNC_BEGIN, SYNC_END, MARK, LINK };
#define DSYNC 1u

struct entry {
    uint32_t magic, kind, flags, sync;
    uint64_t inode, offset, length, bytes; /* bytes of data or text that follow */
};
#define MAGIC 0x54474f46u

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int log_fd = -1;
static char directory[PATH_MAX];
static size_t directory_length;
static long sync_us;
static long speed = 1;
static uint32_t syncs;
static struct timespec began;

static void die(const char *what)
{
    fprintf(stderr, "forget: %s: %s\n", what, strerror(errno));
    abort();
}

static void start(void)
{
    const char *dir = getenv("VREP_FORGET_DIR"), *log = getenv("VREP_FORGET_LOG");
    const char *us = getenv("VREP_FORGET_US"), *fast = getenv("VREP_FORGET_SPEED");
    if (dir == NULL || log == NULL || strlen(dir) >= sizeof directory)
        return;
    strcpy(directory, dir);
    directory_length = strlen(dir);
    sync_us = us != NULL ? atol(us) : 0;
    speed = fast != NULL && atol(fast) > 0 ? atol(fast) : 1;
    syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &began);
    log_fd =
        (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (log_fd < 0)
        die(log);
}

static bool on(void)
{
    pthread_once(&once, start);
    return log_fd >= 0;
}

static const char *below(const char *path)
{
    if (strncmp(path, directory, directory_length) != 0)
        return NULL;
    if (path[directory_length] == '\0')
        return ".";
    return path[directory_length] == '/' ? path + directory_length + 1 : NULL;
}

/* The inode of a file of ours that is open, 0 for any other. */
static uint64_t watched(int fd)
{
    char link[64], path[PATH_MAX];
    if (!on())
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0)
        return 0;
    path[n] = '\0';
    struct stat st;
    if (below(path) == NULL || fstat(fd, &st) != 0)
        return 0;
    if (S_ISREG(st.st_mode) && st.st_nlink == 0)
        return 0; /* without a name nothing of it comes back */
    return S_ISREG(st.st_mode) || S_ISDIR(st.st_mode) ? st.st_ino : 0;
}

static void put(const void *bytes, size_t size)
{
    const char *from = bytes;
    while (size > 0) {
        ssize_t n = syscall(SYS_write, log_fd, from, size);
        if (n <= 0)
            die("the log");
        from += n;
        size -= (size_t)n;
    }
}

static void note(struct entry entry, const void *bytes)
{
    entry.magic = MAGIC;
    put(&entry, sizeof entry);
    put(bytes, entry.bytes);
}

void forget_mark(const void *bytes, size_t size)
{
    if (!on())
        return;
    pthread_mutex_lock(&lock);
    note((struct entry){.kind = MARK, .bytes = size}, bytes);
    pthread_mutex_unlock(&lock);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    long result = syscall(SYS_clock_gettime, clock, now);
    if (result == 0 && clock == CLOCK_MONOTONIC && on() && speed > 1) {
        int64_t ns = ((now->tv_sec - began.tv_sec) * 1000000000l + now->tv_nsec - began.tv_nsec);
        ns = ns * speed + began.tv_nsec;
        now->tv_sec = began.tv_sec + ns / 1000000000l;
        now->tv_nsec = ns % 1000000000l;
    }
    return (int)result;
}

/* Until a moment of the fast clock, for programs that sleep so (Python). */
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *request,
                    struct timespec *remain)
{
    struct timespec left = *request;
    if (clock == CLOCK_MONOTONIC && (flags & TIMER_ABSTIME) != 0 && on() && speed > 1) {
        struct timespec now;
        clock_gettime(clock, &now);
        int64_t ns = (request->tv_sec - now.tv_sec) * 1000000000l + request->tv_nsec - now.tv_nsec;
        ns = ns > 0 ? ns / speed : 0;
        left.tv_sec = ns / 1000000000l;
        left.tv_nsec = ns % 1000000000l;
        flags = 0;
    }
    return syscall(SYS_clock_nanosleep, clock, flags, &left, remain) == 0 ? 0 : errno;
}

/* ---- names ------------------------------------------------------------------- */

static int open_any(int dirfd, const char *path, int flags, mode_t mode)
{
    if (!on() || (flags & (O_CREAT | O_TRUNC)) == 0 || path[0] != '/' || below(path) == NULL)
        return (int)syscall(SYS_openat, dirfd, path, flags, mode);
    pthread_mutex_lock(&lock);
    struct stat st;
    bool there = stat(path, &st) == 0;
    int fd = (int)syscall(SYS_openat, dirfd, path, flags, mode);
    int error = errno;
    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
        const char *name = below(path);
        if (!there)
            note((struct entry){.kind = CREATE, .inode = st.st_ino, .bytes = strlen(name)}, name);
        else if ((flags & O_TRUNC) != 0)
            note((struct entry){.kind = TRUNCATE, .inode = st.st_ino}, NULL);
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...)                                                     \
    {                                                                                              \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = (flags & O_CREAT) != 0 ? (mode_t)va_arg(rest, int) : 0;                      \
        va_end(rest);                                                                              \
        return open_any(AT_FDCWD, path, flags, mode);                                              \
    }
OPEN(open)
OPEN(open64)

/* A name of ours that another becomes, or gets beside it. */
static int name_any(const char *old, const char *new, long number, uint32_t kind)
{
    if (!on() || below(old) == NULL || below(new) == NULL)
        return (int)syscall(number, old, new);
    pthread_mutex_lock(&lock);
    int result = (int)syscall(number, old, new), error = errno;
    char both[2 * PATH_MAX];
    int n = snprintf(both, sizeof both, "%s%c%s", below(old), '\n', below(new));
    if (result == 0)
        note((struct entry){.kind = kind, .bytes = (uint64_t)n}, both);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int rename(const char *old, const char *new)
{
    return name_any(old, new, SYS_rename, RENAME);
}

int link(const char *old, const char *new)
{
    return name_any(old, new, SYS_link, LINK);
}

int unlink(const char *path)
{
    if (!on() || below(path) == NULL)
        return (int)syscall(SYS_unlink, path);
    pthread_mutex_lock(&lock);
    int result = (int)syscall(SYS_unlink, path), error = errno;
    if (result == 0)
        note((struct entry){.kind = UNLINK, .bytes = strlen(below(path))}, below(path));
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

/* ---- data ---------------------------------------------------------------------- */

static ssize_t write_any(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    uint64_t inode = watched(fd);
    if (inode == 0)
        return syscall(SYS_pwritev2, fd, iov, count, (long)offset, 0l, flags);
    pthread_mutex_lock(&lock);
    bool append = (fcntl(fd, F_GETFL) & O_APPEND) != 0;
    off_t at =
        offset >= 0 ? offset : (off_t)syscall(SYS_lseek, fd, 0l, append ? SEEK_END : SEEK_CUR);
    ssize_t n = syscall(SYS_pwritev2, fd, iov, count, (long)offset, 0l, flags & ~RWF_DSYNC);
    int error = errno;
    if (n > 0) {
        struct entry entry = {.magic = MAGIC,
                              .kind = WRITE,
                              .flags = (flags & RWF_DSYNC) != 0 ? DSYNC : 0,
                              .inode = inode,
                              .offset = (uint64_t)at,
                              .length = (uint64_t)n,
                              .bytes = (uint64_t)n};
        if (entry.flags == DSYNC)
            entry.sync = ++syncs;
        put(&entry, sizeof entry);
        size_t left = (size_t)n;
        for (int i = 0; i < count && left > 0; i++) {
            size_t part = iov[i].iov_len < left ? iov[i].iov_len : left;
            put(iov[i].iov_base, part);
            left -= part;
        }
        if (entry.flags ==
            DSYNC) { /* it is stable only later: both entries leave a place between */
            pthread_mutex_unlock(&lock);
            usleep((useconds_t)sync_us);
            pthread_mutex_lock(&lock);
            note((struct entry){.kind = SYNC_END, .inode = inode, .sync = entry.sync}, NULL);
        }
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return n;
}

ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    return write_any(fd, iov, count, offset, flags);
}

ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t offset)
{
    return write_any(fd, iov, count, offset, 0);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
    struct iovec iov = {(void *)(uintptr_t)data, size};
    return write_any(fd, &iov, 1, offset, 0);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset)
{
    return pwrite(fd, data, size, offset);
}

ssize_t write(int fd, const void *data, size_t size)
{
    if (watched(fd) == 0)
        return syscall(SYS_write, fd, data, size);
    struct iovec iov = {(void *)(uintptr_t)data, size};
    return write_any(fd, &iov, 1, -1, 0);
}

int ftruncate(int fd, off_t size)
{
    uint64_t inode = watched(fd);
    if (inode == 0)
        return (int)syscall(SYS_ftruncate, fd, (long)size);
    pthread_mutex_lock(&lock);
    int result = (int)syscall(SYS_ftruncate, fd, (long)size), error = errno;
    if (result == 0)
        note((struct entry){.kind = TRUNCATE, .inode = inode, .length = (uint64_t)size}, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int ftruncate64(int fd, off_t size)
{
    return ftruncate(fd, size);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    uint64_t inode = watched(fd);
    if (inode == 0)
        return (int)syscall(SYS_fallocate, fd, mode, (long)offset, (long)length);
    pthread_mutex_lock(&lock);
    int result = (int)syscall(SYS_fallocate, fd, mode, (long)offset, (long)length), error = errno;
    struct stat st;
    if (result == 0 && mode == 0 && fstat(fd, &st) == 0)
        note((struct entry){.kind = TRUNCATE, .inode = inode, .length = (uint64_t)st.st_size},
             NULL);
    else if (result == 0)
        note((struct entry){.kind = ZERO,
                            .inode = inode,
                            .offset = (uint64_t)offset,
                            .length = (uint64_t)length},
             NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int posix_fallocate(int fd, off_t offset, off_t length)
{
    return fallocate(fd, 0, offset, length) == 0 ? 0 : errno;
}

/* ---- syncs ----------------------------------------------------------------------- */

static int sync_any(int fd, long number)
{
    uint64_t inode = watched(fd);
    if (inode == 0)
        return (int)syscall(number, fd);
    pthread_mutex_lock(&lock);
    uint32_t id = ++syncs;
    note((struct entry){.kind = SYNC_BEGIN, .inode = inode, .sync = id}, NULL);
    pthread_mutex_unlock(&lock);
    usleep((useconds_t)sync_us);
    pthread_mutex_lock(&lock);
    note((struct entry){.kind = SYNC_END, .inode = inode, .sync = id}, NULL);
    pthread_mutex_unlock(&lock);
    return 0;
}

int fsync(int fd)
{
    return sync_any(fd, SYS_fsync);
}

int fdatasync(int fd)
{
    return sync_any(fd, SYS_fdatasync);
}
