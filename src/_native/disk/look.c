#include "disk/look.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/status.h"
#include "disk/internal.h"

#define NS_PER_S UINT64_C(1000000000)
#define PATH_BYTES 128

int vrep_look_open(const char *path, int *fd)
{
    struct stat st;
    *fd = -1;
    /* The kind is looked at before: to open a pipe or a terminal may block or have effects. */
    if (stat(path, &st) != 0)
        return vrep_status_from_errno(errno);
    if (!S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode))
        return VREP_E_UNSUPPORTED;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    return *fd < 0 ? vrep_status_from_errno(errno) : VREP_OK;
}

/* The first words of a small file of the kernel's; false when it cannot be read. */
static bool read_line(const char *path, char *line, int bytes)
{
    FILE *file = fopen(path, "re");
    if (file == NULL)
        return false;
    bool read = fgets(line, bytes, file) != NULL;
    fclose(file);
    return read;
}

static void name(char path[PATH_BYTES], dev_t device, const char *what)
{
    snprintf(path, PATH_BYTES, "/sys/dev/block/%u:%u/%s", major(device), minor(device), what);
}

/* Documentation/admin-guide/iostats.rst: fields 5 and 7 are writes completed and sectors written,
 * 12 and 14 the same of discards, which came later. */
static bool counted(dev_t device, struct vrep_look *out)
{
    char path[PATH_BYTES], line[512];
    name(path, device, "queue/iostats");
    bool known = read_line(path, line, sizeof line);
    if (!known) { /* a partition's are those of its device */
        name(path, device, "../queue/iostats");
        known = read_line(path, line, sizeof line);
    }
    if (!known || line[0] != '1')
        return false;
    name(path, device, "stat");
    if (!read_line(path, line, sizeof line))
        return false;
    uint64_t field[14] = {0};
    int used = 0, fields = 0;
    for (char *at = line; fields < 14; at += used, fields++)
        if (sscanf(at, "%" SCNu64 "%n", &field[fields], &used) != 1)
            break;
    out->commands = field[4] + field[11];
    out->sectors = field[6] + field[13];
    return fields >= 7;
}

/* Whether another device stands on it: device mapper, RAID. */
static bool has_holders(dev_t device)
{
    char path[PATH_BYTES];
    name(path, device, "holders");
    DIR *directory = opendir(path);
    if (directory == NULL)
        return false;
    bool found = false;
    for (struct dirent *entry; !found && (entry = readdir(directory)) != NULL;)
        found = entry->d_name[0] != '.';
    closedir(directory);
    return found;
}

static bool is_mounted(dev_t device)
{
    FILE *file = fopen("/proc/self/mountinfo", "re");
    if (file == NULL)
        return false;
    char line[4096];
    bool found = false, begins = true;
    while (!found && fgets(line, sizeof line, file) != NULL) {
        unsigned a, b;
        if (begins && sscanf(line, "%*u %*u %u:%u", &a, &b) == 2)
            found = a == major(device) && b == minor(device);
        begins = strchr(line, '\n') != NULL; /* or this was a part of a long line */
    }
    fclose(file);
    return found;
}

static int look_at_device(int fd, dev_t device, struct vrep_look *out)
{
    if (ioctl(fd, BLKGETSIZE64, &out->bytes) != 0)
        return vrep_status_from_errno(errno);
    if (is_mounted(device) || has_holders(device))
        return VREP_E_LOCKED;
    /* A writer without locks may be seen by its pages alone. */
    if (sync_file_range(fd, 0, 0,
                        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
                            SYNC_FILE_RANGE_WAIT_AFTER) != 0)
        return vrep_status_from_errno(errno);
    return counted(device, out) ? VREP_OK : VREP_E_UNSUPPORTED;
}

bool vrep_look_counts(int fd, uint64_t *commands, uint64_t *sectors)
{
    struct stat st;
    struct vrep_look found = {0};
    bool known = fstat(fd, &st) == 0 && S_ISBLK(st.st_mode) && counted(st.st_rdev, &found);
    *commands = known ? found.commands : 0;
    *sectors = known ? found.sectors : 0;
    return known;
}

int vrep_look_at(int fd, struct vrep_look *out)
{
    struct stat st;
    *out = (struct vrep_look){0};
    int status = vrep_lock_probe(fd);
    if (status != VREP_OK)
        return status;
    if (fstat(fd, &st) != 0)
        return vrep_status_from_errno(errno);
    out->block_device = S_ISBLK(st.st_mode);
    out->device = out->block_device ? st.st_rdev : st.st_dev;
    out->inode = st.st_ino;
    if (out->block_device)
        return look_at_device(fd, st.st_rdev, out);
    out->bytes = (uint64_t)st.st_size;
    out->mtime_ns = (uint64_t)st.st_mtim.tv_sec * NS_PER_S + (uint64_t)st.st_mtim.tv_nsec;
    out->ctime_ns = (uint64_t)st.st_ctim.tv_sec * NS_PER_S + (uint64_t)st.st_ctim.tv_nsec;
    return VREP_OK;
}

bool vrep_look_same(const struct vrep_look *a, const struct vrep_look *b)
{
    return a->device == b->device && a->inode == b->inode && a->bytes == b->bytes &&
           a->mtime_ns == b->mtime_ns && a->ctime_ns == b->ctime_ns && a->commands == b->commands &&
           a->sectors == b->sectors && a->block_device == b->block_device;
}

void vrep_look_afresh(int fd)
{
    (void)posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
}
