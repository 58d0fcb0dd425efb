/* Look: what an image is like that nobody should be writing, and whether somebody is.
 *
 * By the locks that QEMU takes on it, by its times, and for a block device, which has none that
 * mean anything, by the kernel's count of what was written and discarded on it, through whatever
 * name; what lies in the page cache is made to count first.  Nothing is written and no lock taken.
 *
 * Units: bytes, nanoseconds of CLOCK_REALTIME.  Limits: of a partition, what is written through
 * the device that holds it is not seen; nor what another host writes to either.
 * Threading: any thread; every call may block for as long as the image's storage does.
 */
#ifndef VREP_DISK_LOOK_H
#define VREP_DISK_LOOK_H

#include <stdbool.h>
#include <stdint.h>

struct vrep_look {
    uint64_t device, inode; /* of a block device: its own number */
    uint64_t bytes;
    uint64_t mtime_ns, ctime_ns; /* 0 for a block device */
    uint64_t commands, sectors;  /* written and discarded since boot; 0 for a file */
    bool block_device;
};

/* Opens a file or block device to be looked at: UNSUPPORTED, it is neither. */
int vrep_look_open(const char *path, int *fd);
/* LOCKED: somebody has it open to write, it is mounted, or another device stands on it.
 * UNSUPPORTED: the kernel does not count what is written to it. */
int vrep_look_at(int fd, struct vrep_look *out);
/* What was written and discarded on a block device since boot, by whatever name; false: the kernel
 * does not count it.  What lies in the page cache does not count yet. */
bool vrep_look_counts(int fd, uint64_t *commands, uint64_t *sectors);
/* The same image, and nothing was written to it in between. */
bool vrep_look_same(const struct vrep_look *a, const struct vrep_look *b);
/* Reads of a block device tell what is stored, not what was read before. */
void vrep_look_afresh(int fd);

#endif
