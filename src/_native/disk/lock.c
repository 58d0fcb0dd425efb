/* Lock: the locks that QEMU takes on an image, so that a VM started past the
 * filter and vrep refuse each other.  They are byte locks of an open file
 * description (OFD), all of the kind that many may hold: who wants the image
 * holds its bytes, and looks at those of the others. */
#include <errno.h>
#include <fcntl.h>

#include "base/status.h"
#include "disk/internal.h"

/* QEMU's image locks (its docs/system, "image locking"): a byte for each permission held, at
 * 100 + n, and for each permission not shared with others, at 200 + n. */
#define LOCK_HELD 100
#define LOCK_UNSHARED 200
#define PERM_READ 0
#define PERM_WRITE 1
#define PERM_RESIZE 3

static int lock_byte(int fd, int at, short type)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};
    return fcntl(fd, F_OFD_SETLK, &lock) == 0 ? 0 : errno;
}

/* EAGAIN when another process holds the byte. */
static int probe_byte(int fd, int at)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};
    if (fcntl(fd, F_OFD_GETLK, &lock) != 0)
        return errno;
    return lock.l_type == F_UNLCK ? 0 : EAGAIN;
}

static const int held[] = {PERM_READ, PERM_WRITE, PERM_RESIZE};
static const int unshared[] = {PERM_WRITE, PERM_RESIZE};
#define UNSHARED (sizeof unshared / sizeof unshared[0])

static size_t held_count(bool read_only)
{
    return read_only ? 1 : sizeof held / sizeof held[0];
}

/* Every byte of ours, as `type`: a read lock, which others may hold too, or none. */
static int mark_image(int fd, bool read_only, short type)
{
    int error = 0;
    for (size_t i = 0; error == 0 && i < held_count(read_only); i++)
        error = lock_byte(fd, LOCK_HELD + held[i], type);
    for (size_t i = 0; error == 0 && i < UNSHARED; i++)
        error = lock_byte(fd, LOCK_UNSHARED + unshared[i], type);
    return error;
}

/* EAGAIN when somebody holds what we do not share, or does not share what we hold. */
static int probe_image(int fd, bool read_only)
{
    int error = 0;
    for (size_t i = 0; error == 0 && i < held_count(read_only); i++)
        error = probe_byte(fd, LOCK_UNSHARED + held[i]);
    for (size_t i = 0; error == 0 && i < UNSHARED; i++)
        error = probe_byte(fd, LOCK_HELD + unshared[i]);
    return error;
}

static int lock_status(int error)
{
    if (error == EAGAIN || error == EACCES)
        return VREP_E_LOCKED;
    return error == 0 ? VREP_OK : vrep_status_from_errno(error);
}

int vrep_disk_hold_locks(struct vrep_disk *disk)
{
    int error = mark_image(disk->fd, disk->read_only, F_RDLCK);
    disk->locks = error == 0;
    return lock_status(error);
}

int vrep_disk_lock(struct vrep_disk *disk)
{
    if (disk->locks)
        return lock_status(probe_image(disk->fd, disk->read_only));
    /* Asked before too: bytes of ours, for however short a time, would be in the way of who holds
     * the image.  Then every byte is taken, and then the others' bytes are looked at: of two that
     * do so at once, at least one sees the other. */
    int error = probe_image(disk->fd, disk->read_only);
    if (error != 0)
        return lock_status(error);
    error = mark_image(disk->fd, disk->read_only, F_RDLCK);
    if (error == 0)
        error = probe_image(disk->fd, disk->read_only);
    disk->locks = error == 0;
    if (error != 0) /* a lock that cannot be undone ends with the description */
        (void)mark_image(disk->fd, disk->read_only, F_UNLCK);
    return lock_status(error);
}

bool vrep_disk_locked(struct vrep_disk *disk)
{
    return probe_image(disk->fd, disk->read_only) == EAGAIN;
}

int vrep_lock_probe(int fd)
{
    return lock_status(probe_image(fd, true));
}

int vrep_disk_unlock(struct vrep_disk *disk)
{
    disk->locks = false;
    return lock_status(mark_image(disk->fd, disk->read_only, F_UNLCK));
}
