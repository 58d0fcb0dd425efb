#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/status.h"
#include "disk/internal.h"
#include "disk/look.h"

/* A page-cached copy of this size takes some tens of microseconds: less than a hand-over to a
 * thread and back when the thread sleeps. */
#define INLINE_BYTES (128u << 10)
#define INLINE_SLOW_NS 1000000ull    /* a write that took longer was throttled or blocked */
#define INLINE_PAUSE_NS 100000000ull /* then the pool takes over for this long */
#define IOV_STEP 64
#define READ_AHEAD_BYTES (1u << 20)
#define ALIGN_DEFAULT 4096u /* where nobody tells: enough for every filesystem */
#define ALIGN_MAX (64u << 10)

uint64_t vrep_iov_bytes(const struct iovec *iov, int iovcnt)
{
    uint64_t bytes = 0;
    for (int i = 0; i < iovcnt; i++)
        bytes += iov[i].iov_len;
    return bytes;
}

void vrep_iov_advance(struct iovec **iov, int *iovcnt, size_t bytes)
{
    while (*iovcnt > 0 && bytes >= (*iov)->iov_len) {
        bytes -= (*iov)->iov_len;
        (*iov)++;
        (*iovcnt)--;
    }
    if (bytes > 0 && *iovcnt > 0) {
        (*iov)->iov_base = (char *)(*iov)->iov_base + bytes;
        (*iov)->iov_len -= bytes;
    }
}

void vrep_io_fail(struct vrep_io *io, int os_error)
{
    io->os_error = os_error;
    io->status = vrep_status_from_errno(os_error);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

/* ---- open and facts ---------------------------------------------------------- */

void vrep_disk_forget_cache(struct vrep_disk *disk)
{
    if (disk->remote == NULL)
        (void)posix_fadvise(disk->fd, 0, 0, POSIX_FADV_DONTNEED);
}

int vrep_disk_refresh(struct vrep_disk *disk)
{
    struct stat st;
    if (disk->remote != NULL)
        return VREP_OK;
    if (fstat(disk->fd, &st) != 0)
        return vrep_status_from_errno(errno);
    disk->device = disk->block_device ? st.st_rdev : st.st_dev;
    disk->inode = st.st_ino;
    disk->mtime_ns = (uint64_t)st.st_mtim.tv_sec * 1000000000ull + (uint64_t)st.st_mtim.tv_nsec;
    disk->ctime_ns = (uint64_t)st.st_ctim.tv_sec * 1000000000ull + (uint64_t)st.st_ctim.tv_nsec;
    (void)vrep_look_counts(disk->fd, &disk->commands, &disk->sectors);
    uint64_t bytes = (uint64_t)st.st_size;
    if (disk->block_device && ioctl(disk->fd, BLKGETSIZE64, &bytes) != 0)
        return vrep_status_from_errno(errno);
    if (bytes % VREP_SECTOR_BYTES != 0 || bytes % disk->align_bytes != 0)
        return VREP_E_INVALID; /* the size that was known stays */
    disk->bytes = bytes;
    return VREP_OK;
}

int vrep_disk_resize(struct vrep_disk *disk, uint64_t bytes)
{
    if (disk->block_device || disk->read_only)
        return VREP_E_UNSUPPORTED;
    if (bytes == 0 || bytes > INT64_MAX || bytes % VREP_SECTOR_BYTES != 0 ||
        bytes % disk->align_bytes != 0)
        return VREP_E_INVALID;
    /* Nobody may hear of a size that a power loss takes back. */
    if (ftruncate(disk->fd, (off_t)bytes) != 0 || fsync(disk->fd) != 0)
        return vrep_status_from_errno(errno);
    return vrep_disk_refresh(disk);
}

/* What O_DIRECT asks for of offset, length and memory. */
static uint32_t direct_align(const struct vrep_disk *disk)
{
    int logical = 0;
    if (disk->block_device)
        return ioctl(disk->fd, BLKSSZGET, &logical) == 0 && logical > 0 ? (uint32_t)logical
                                                                        : ALIGN_DEFAULT;
#ifdef STATX_DIOALIGN
    struct statx stx;
    if (statx(disk->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 &&
        (stx.stx_mask & STATX_DIOALIGN) != 0 && stx.stx_dio_offset_align > 0)
        return stx.stx_dio_offset_align > stx.stx_dio_mem_align ? stx.stx_dio_offset_align
                                                                : stx.stx_dio_mem_align;
#endif
    return ALIGN_DEFAULT;
}

/* Whether the file system of a file punches holes. Tried on a nameless file beside it: even a punch
 * past the end would change the times by which a clean start knows the disk. Where we may not make
 * one, those are named that are known to. */
static bool punches(const struct vrep_disk *disk, const char *path)
{
    struct statfs fs;
    char real[PATH_MAX];
    if (realpath(path, real) == NULL)
        return false;
    int fd = open(dirname(real), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0)
        return fstatfs(disk->fd, &fs) == 0 &&
               (fs.f_type == EXT4_SUPER_MAGIC || fs.f_type == XFS_SUPER_MAGIC ||
                fs.f_type == BTRFS_SUPER_MAGIC || fs.f_type == TMPFS_MAGIC);
    bool can = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, VREP_SECTOR_BYTES) == 0;
    close(fd);
    return can;
}

/* Whether a range can be made to read zero without writing it. */
static bool learn_zero_cheap(const struct vrep_disk *disk, const char *path)
{
    if (disk->read_only)
        return false;
    if (!disk->block_device)
        return punches(disk, path);
    static const char *const places[] = {"/sys/dev/block/%u:%u/queue/write_zeroes_max_bytes",
                                         "/sys/dev/block/%u:%u/../queue/write_zeroes_max_bytes"};
    for (size_t i = 0; i < 2; i++) { /* of the device, or of the one that it is a partition of */
        char name[128];
        (void)snprintf(name, sizeof name, places[i], major(disk->device), minor(disk->device));
        FILE *file = fopen(name, "re");
        if (file == NULL)
            continue;
        uint64_t most = 0;
        bool told = fscanf(file, "%" SCNu64, &most) == 1;
        (void)fclose(file);
        return told && most > 0;
    }
    return false;
}

static int learn_geometry(struct vrep_disk *disk, const char *path)
{
    disk->block_bytes = 4096;
    disk->align_bytes = disk->direct ? direct_align(disk) : 1;
    if (disk->align_bytes > ALIGN_MAX || disk->bytes % disk->align_bytes != 0)
        return VREP_E_UNSUPPORTED;
    disk->zero_cheap = learn_zero_cheap(disk, path);
    return VREP_OK;
}

static int open_sync_fds(struct vrep_disk *disk, const char *path, int mode)
{
    uint32_t count = vrep_engine_threads(disk->engine);
    disk->sync_fd = calloc(count, sizeof *disk->sync_fd);
    if (disk->sync_fd == NULL)
        return VREP_E_NOMEM;
    for (; disk->sync_fds < count; disk->sync_fds++) {
        int fd = open(path, mode);
        if (fd < 0)
            return vrep_status_from_errno(errno);
        disk->sync_fd[disk->sync_fds] = fd;
        struct stat one, other;
        if (fstat(disk->fd, &one) != 0 || fstat(fd, &other) != 0) {
            disk->sync_fds++;
            return vrep_status_from_errno(errno);
        }
        if (one.st_dev != other.st_dev || one.st_ino != other.st_ino) {
            disk->sync_fds++;
            return VREP_E_BUSY; /* another file took the name */
        }
    }
    return VREP_OK;
}

/* What the kernel's own read-ahead brings into the page cache lies there in folios of up to
 * megabytes, and a later write of 4 KiB walks every block of its folio (ext4, kernel 6.18: 44 us
 * in place of 1.5).  A first sync would do that to the whole disk.  So read-ahead is ours: it
 * fetches the same bytes as single pages. */
static void plan_reading(const struct vrep_disk *disk)
{
    if (!disk->direct)
        posix_fadvise(disk->fd, 0, 0, POSIX_FADV_RANDOM); /* advice: works without, only slower */
}

/* Before a read that goes on where the last one ended, or a little further (short reads of what
 * was fetched do not come here): starts fetching what comes next, up to the next hole, which would
 * only fill the page cache with zeroes. */
static void read_ahead(struct vrep_disk *disk, uint64_t offset, uint64_t length)
{
    uint64_t end = offset + length;
    uint64_t expected = vrep_load_relaxed_u64(&disk->read_end);
    vrep_store_relaxed_u64(&disk->read_end, end);
    if (disk->direct || offset - expected > READ_AHEAD_BYTES)
        return;
    uint64_t from = vrep_load_relaxed_u64(&disk->ahead_end);
    if (from < end || from > end + READ_AHEAD_BYTES)
        from = end;
    if (from - end >= READ_AHEAD_BYTES / 2)
        return;
    uint64_t to = end + READ_AHEAD_BYTES;
    off_t hole = disk->block_device ? -1 : lseek(disk->fd, (off_t)from, SEEK_HOLE);
    if (hole >= 0 && (uint64_t)hole < to)
        to = (uint64_t)hole;
    if (to <= from)
        return;
    posix_fadvise(disk->fd, (off_t)from, (off_t)(to - from), POSIX_FADV_WILLNEED);
    vrep_store_relaxed_u64(&disk->ahead_end, to);
}

int vrep_disk_open(struct vrep_engine *engine, const char *uri, uint32_t flags,
                   struct vrep_disk **out)
{
    bool block = strncmp(uri, "block:", 6) == 0;
    if (!block && strncmp(uri, "file:", 5) != 0)
        return VREP_E_UNSUPPORTED;
    const char *path = uri + (block ? 6 : 5);
    if (path[0] == '\0')
        return VREP_E_INVALID;
    struct vrep_disk *disk = calloc(1, sizeof *disk);
    if (disk == NULL)
        return VREP_E_NOMEM;
    disk->engine = engine;
    disk->read_only = (flags & VREP_DISK_READ_ONLY) != 0;
    disk->direct = (flags & VREP_DISK_DIRECT) != 0;
    disk->block_device = block;
    disk->align_bytes = 1;
    disk->fd = -1;
    int mode = (disk->read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | (disk->direct ? O_DIRECT : 0);
    /* The kind is looked at before too: to open a pipe or a terminal may block or have effects. */
    struct stat st;
    int status = stat(path, &st) != 0 ? vrep_status_from_errno(errno) : VREP_OK;
    if (status == VREP_OK && !(block ? S_ISBLK(st.st_mode) : S_ISREG(st.st_mode)))
        status = VREP_E_INVALID;
    if (status == VREP_OK && (disk->fd = open(path, mode)) < 0)
        status = vrep_status_from_errno(errno);
    if (status == VREP_OK && fstat(disk->fd, &st) != 0)
        status = vrep_status_from_errno(errno);
    if (status == VREP_OK && !(block ? S_ISBLK(st.st_mode) : S_ISREG(st.st_mode)))
        status = VREP_E_INVALID;
    if (status == VREP_OK && (flags & VREP_DISK_HANDOVER) != 0) {
        status = vrep_disk_hold_locks(disk);
    } else if (status == VREP_OK && (flags & VREP_DISK_NO_LOCK) == 0) {
        status = vrep_disk_lock(disk);
    }
    if (status == VREP_OK)
        status = vrep_disk_refresh(disk);
    if (status == VREP_OK)
        status = learn_geometry(disk, path);
    if (status == VREP_OK && !disk->read_only)
        status = open_sync_fds(disk, path, mode);
    if (status != VREP_OK) {
        vrep_disk_close(disk);
        return status;
    }
    plan_reading(disk);
    *out = disk;
    return VREP_OK;
}

void vrep_disk_close(struct vrep_disk *disk)
{
    if (disk == NULL)
        return;
    if (disk->presence != NULL)
        vrep_overlay_free(disk);
    if (disk->remote != NULL)
        vrep_remote_free(disk);
    for (uint32_t i = 0; i < disk->sync_fds; i++)
        close(disk->sync_fd[i]);
    free(disk->sync_fd);
    if (disk->fd >= 0)
        close(disk->fd);
    free(disk);
}

int vrep_disk_info(struct vrep_disk *disk, struct vrep_disk_info *out)
{
    *out = (struct vrep_disk_info){
        .bytes = disk->bytes,
        .block_bytes = disk->block_bytes,
        .align_bytes = disk->align_bytes,
        .zero_is_cheap = disk->zero_cheap,
        .direct = disk->direct,
        .block_device = disk->block_device,
        .read_only = disk->read_only,
        .device = disk->device,
        .inode = disk->inode,
        .mtime_ns = disk->mtime_ns,
        .ctime_ns = disk->ctime_ns,
        .commands = disk->commands,
        .sectors = disk->sectors,
    };
    return VREP_OK;
}

void vrep_disk_widen(const struct vrep_disk *disk, uint64_t *offset, uint64_t *length)
{
    uint64_t align = disk->align_bytes;
    uint64_t end = *offset + *length;
    *offset -= *offset % align;
    end += (align - end % align) % align;
    *length = end - *offset;
}

/* ---- transfers ----------------------------------------------------------------- */

/* 0, an errno, or the negative of one: a stable write that found no room, before any sync. */
static int transfer(int fd, bool write, struct iovec *iov, int iovcnt, uint64_t offset,
                    uint64_t length, int flags)
{
    while (length > 0) {
        int count = iovcnt < IOV_MAX ? iovcnt : IOV_MAX;
        ssize_t n = write ? pwritev2(fd, iov, count, (off_t)offset, flags)
                          : preadv2(fd, iov, count, (off_t)offset, flags);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && flags != 0 && (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)) {
            /* No room for the data, or none when they were made stable? What finds none without
             * being made stable was never taken, and no sync failed. */
            int error = errno;
            return pwritev2(fd, iov, count, (off_t)offset, 0) < 0 ? -error : error;
        }
        if (n < 0)
            return errno;
        if (n == 0)
            return EIO; /* the file is shorter than it was */
        vrep_iov_advance(&iov, &iovcnt, (size_t)n);
        offset += (uint64_t)n;
        length -= (uint64_t)n;
    }
    return 0;
}

static int whole(int fd, bool write, void *buffer, uint64_t offset, uint64_t length, int flags)
{
    struct iovec iov = {buffer, length};
    return transfer(fd, write, &iov, 1, offset, length, flags);
}

/* How much of [offset, offset + length) comes first: at most `most`, cut so that the rest starts on
 * a whole block. */
static uint64_t step(const struct vrep_disk *disk, uint64_t offset, uint64_t length, uint64_t most)
{
    return length <= most ? length : most - (offset + most) % disk->align_bytes;
}

static void copy_iov(struct iovec **iov, int *iovcnt, char *flat, size_t bytes, bool to_iov)
{
    while (bytes > 0) {
        size_t n = (*iov)->iov_len < bytes ? (*iov)->iov_len : bytes;
        if (to_iov)
            memcpy((*iov)->iov_base, flat, n);
        else
            memcpy(flat, (*iov)->iov_base, n);
        vrep_iov_advance(iov, iovcnt, n);
        flat += n;
        bytes -= n;
    }
}

/* O_DIRECT with edges or memory that are not aligned: through the thread's bounce buffer; the
 * caller holds the widened range, so the edges cannot change under us. */
static int bounced(struct vrep_disk *disk, int fd, struct vrep_io *io, char *bounce,
                   size_t bounce_bytes, int flags)
{
    if (bounce == NULL)
        return ENOMEM;
    uint64_t at = io->offset, end = io->offset + io->length;
    struct iovec *iov = io->iov;
    int iovcnt = io->iovcnt;
    while (at < end) {
        uint64_t bytes = step(disk, at, end - at, bounce_bytes / 2);
        uint64_t start = at, length = bytes;
        vrep_disk_widen(disk, &start, &length);
        int error = 0;
        bool partial = start != at || length != bytes;
        if (io->op == VREP_IO_READ || partial)
            error = whole(fd, false, bounce, start, length, 0);
        if (error == 0)
            copy_iov(&iov, &iovcnt, bounce + (at - start), bytes, io->op == VREP_IO_READ);
        if (error == 0 && io->op == VREP_IO_WRITE)
            error = whole(fd, true, bounce, start, length, flags);
        if (error != 0)
            return error;
        at += bytes;
    }
    return 0;
}

static bool aligned(const struct vrep_disk *disk, const struct vrep_io *io)
{
    uint64_t mask = io->offset | io->length;
    for (int i = 0; i < io->iovcnt; i++)
        mask |= (uintptr_t)io->iov[i].iov_base | io->iov[i].iov_len;
    return mask % disk->align_bytes == 0;
}

/* ---- zeroes ----------------------------------------------------------------------- */

#define ZERO_STEP_BYTES (2 * ALIGN_MAX)
#define EDGE_BYTES (ZERO_STEP_BYTES + 2 * ALIGN_MAX)

static int write_zeroes(struct vrep_disk *disk, uint64_t offset, uint64_t length)
{
    static _Alignas(ALIGN_MAX) const char zeroes[ZERO_STEP_BYTES];
    char *edge = NULL;
    int error = 0;
    while (length > 0 && error == 0) {
        uint64_t bytes = step(disk, offset, length, sizeof zeroes);
        uint64_t start = offset, n = bytes;
        vrep_disk_widen(disk, &start, &n);
        if (start == offset && n == bytes) {
            struct iovec iov = {(void *)(uintptr_t)zeroes, n};
            error = transfer(disk->fd, true, &iov, 1, start, n, 0);
        } else { /* an edge inside a block of an O_DIRECT disk */
            if (edge == NULL && posix_memalign((void **)&edge, ALIGN_MAX, EDGE_BYTES) != 0)
                return ENOMEM;
            error = whole(disk->fd, false, edge, start, n, 0);
            memset(edge + (offset - start), 0, bytes);
            if (error == 0)
                error = whole(disk->fd, true, edge, start, n, 0);
        }
        offset += bytes;
        length -= bytes;
    }
    free(edge);
    return error;
}

static int zero_cheaply(struct vrep_disk *disk, uint64_t offset, uint64_t length, bool no_hole)
{
    if (disk->block_device) {
        uint64_t range[2] = {offset, length};
        if ((offset | length) % VREP_SECTOR_BYTES != 0)
            return EOPNOTSUPP;
        if (!disk->zero_cheap) /* the kernel would write zeroes itself, and tell nobody */
            return EOPNOTSUPP;
        return ioctl(disk->fd, BLKZEROOUT, range) == 0 ? 0 : errno;
    }
    int mode = (no_hole ? FALLOC_FL_ZERO_RANGE : FALLOC_FL_PUNCH_HOLE) | FALLOC_FL_KEEP_SIZE;
    int result;
    do
        result = fallocate(disk->fd, mode, (off_t)offset, (off_t)length);
    while (result != 0 && errno == EINTR);
    return result == 0 ? 0 : errno;
}

static int zero(struct vrep_disk *disk, const struct vrep_io *io)
{
    int error = zero_cheaply(disk, io->offset, io->length, (io->flags & VREP_IO_NO_HOLE) != 0);
    if (error == EOPNOTSUPP || error == ENOTTY || error == EINVAL || error == ENOSYS) {
        if (io->flags & VREP_IO_FAST)
            return EOPNOTSUPP;
        error = write_zeroes(disk, io->offset, io->length);
    }
    return error;
}

/* ---- running ------------------------------------------------------------------------ */

void vrep_disk_run(struct vrep_io *io, uint32_t number, void *bounce, size_t bounce_bytes)
{
    struct vrep_disk *disk = io->disk;
    bool overlay = disk->presence != NULL;
    /* On an overlay "stable" means data and presence: its own sync does both, and remembers a
     * failure. */
    bool stable = (io->flags & VREP_IO_FUA) != 0 && io->op != VREP_IO_READ;
    int flags = stable && !overlay ? RWF_DSYNC : 0;
    int sync_fd = number < disk->sync_fds ? disk->sync_fd[number] : disk->fd;
    int fd = flags != 0 ? sync_fd : disk->fd;
    int error = 0, status = VREP_OK;
    io->sync_failed = false;
    switch (io->op) {
    case VREP_IO_READ:
    case VREP_IO_WRITE:
        if (disk->remote != NULL) {
            error = vrep_remote_read(io);
            break;
        }
        if (io->op == VREP_IO_READ)
            read_ahead(disk, io->offset, io->length);
        if (disk->direct && !aligned(disk, io))
            error = bounced(disk, fd, io, bounce, bounce_bytes, flags);
        else
            error = transfer(fd, io->op == VREP_IO_WRITE, io->iov, io->iovcnt, io->offset,
                             io->length, flags);
        io->sync_failed = error > 0 && flags != 0;
        if (error < 0) { /* another descriptor tells, if it was a sync after all */
            error = -error;
            io->sync_failed = fdatasync(disk->fd) != 0;
        }
        break;
    case VREP_IO_ZERO:
        error = zero(disk, io);
        break;
    default:
        break;
    }
    bool sync = io->op == VREP_IO_FLUSH || (io->op == VREP_IO_ZERO && stable);
    if (error == 0 && sync && !overlay && !disk->read_only && fdatasync(sync_fd) != 0) {
        error = errno;
        io->sync_failed = true;
    }
    if (error == 0 && overlay) {
        if (io->op == VREP_IO_WRITE || io->op == VREP_IO_ZERO)
            vrep_overlay_written(disk, io->offset, io->length);
        if (io->op == VREP_IO_FLUSH || stable)
            status = vrep_overlay_sync(disk);
        io->sync_failed = status != VREP_OK;
    }
    io->os_error = 0;
    io->status = status;
    if (error != 0)
        vrep_io_fail(io, error);
}

static bool finish(struct vrep_io *io, int status)
{
    io->status = status;
    io->inline_done = true;
    return true;
}

/* Page-cached data at once, without blocking; a part that is not cached goes to the pool. */
static bool read_now(struct vrep_disk *disk, struct vrep_io *io)
{
    if (io->iovcnt > IOV_STEP)
        return false;
    ssize_t n = preadv2(disk->fd, io->iov, io->iovcnt, (off_t)io->offset, RWF_NOWAIT);
    return n >= 0 && (uint64_t)n == io->length && finish(io, VREP_OK);
}

static bool write_now(struct vrep_disk *disk, struct vrep_io *io)
{
    uint64_t begun = now_ns();
    if (begun < disk->slow_until_ns || io->iovcnt > IOV_STEP)
        return false;
    ssize_t n = pwritev2(disk->fd, io->iov, io->iovcnt, (off_t)io->offset, 0);
    uint64_t ended = now_ns();
    if (ended - begun > INLINE_SLOW_NS)
        disk->slow_until_ns = ended + INLINE_PAUSE_NS;
    if (n < 0 || (uint64_t)n != io->length)
        return false; /* the pool does it again, whole, and finds the error */
    if (disk->presence != NULL)
        vrep_overlay_written(disk, io->offset, io->length);
    return finish(io, VREP_OK);
}

void vrep_disk_submit(struct vrep_disk *disk, struct vrep_io *io)
{
    io->disk = disk;
    io->inline_done = false;
    io->sync_failed = false;
    io->os_error = 0;
    bool data = io->op == VREP_IO_READ || io->op == VREP_IO_WRITE;
    bool ranged = data || io->op == VREP_IO_ZERO;
    if (ranged && (io->length > disk->bytes || io->offset > disk->bytes - io->length)) {
        finish(io, VREP_E_RANGE);
        return;
    }
    if (data &&
        (io->length > VREP_WRITE_BYTES_MAX || vrep_iov_bytes(io->iov, io->iovcnt) != io->length)) {
        finish(io, VREP_E_INVALID);
        return;
    }
    if (disk->read_only && (io->op == VREP_IO_WRITE || io->op == VREP_IO_ZERO)) {
        finish(io, VREP_E_READONLY);
        return;
    }
    if (ranged && io->length == 0) {
        finish(io, VREP_OK);
        return;
    }
    bool small = io->length <= INLINE_BYTES && !disk->direct && disk->remote == NULL &&
                 !vrep_engine_is_stepped(disk->engine);
    if (io->op == VREP_IO_READ && small && read_now(disk, io))
        return;
    if (io->op == VREP_IO_WRITE && small && !(io->flags & VREP_IO_FUA) && write_now(disk, io))
        return;
    /* What syncs needs a description of its own, which a thread has. */
    bool stable = io->op == VREP_IO_WRITE && (io->flags & VREP_IO_FUA) != 0;
    if (data && disk->direct && !stable && io->iovcnt <= IOV_MAX && aligned(disk, io) &&
        vrep_engine_ring(disk->engine, io))
        return;
    vrep_engine_queue(disk->engine, io);
}

int vrep_disk_extent(struct vrep_disk *disk, uint64_t offset, uint64_t max, uint64_t *length,
                     bool *hole)
{
    if (offset >= disk->bytes || max == 0)
        return VREP_E_RANGE;
    uint64_t limit = disk->bytes - offset < max ? disk->bytes - offset : max;
    *length = limit;
    *hole = false;
    if (disk->block_device || disk->remote != NULL)
        return VREP_OK;
    off_t data = lseek(disk->fd, (off_t)offset, SEEK_DATA);
    if (data < 0 && errno == ENXIO) { /* nothing but a hole up to the end */
        *hole = true;
        return VREP_OK;
    }
    if (data < 0) /* a filesystem that does not tell: all is data */
        return errno == EINVAL || errno == EOPNOTSUPP ? VREP_OK : vrep_status_from_errno(errno);
    if ((uint64_t)data > offset) {
        *hole = true;
        if ((uint64_t)data - offset < limit)
            *length = (uint64_t)data - offset;
        return VREP_OK;
    }
    off_t end = lseek(disk->fd, (off_t)offset, SEEK_HOLE);
    if (end > (off_t)offset && (uint64_t)end - offset < limit)
        *length = (uint64_t)end - offset;
    return VREP_OK;
}
