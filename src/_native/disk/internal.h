/* Internal to the disk room: the engine, a disk, and one request between them.
 * Nothing outside src/_native/disk includes it.
 */
#ifndef VREP_DISK_INTERNAL_H
#define VREP_DISK_INTERNAL_H

#include <pthread.h>

#include "disk/disk.h"

struct vrep_io_list {
    struct vrep_io *first, *last;
};

struct vrep_disk {
    struct vrep_engine *engine;
    /* Page-cached writes that wait for the one that a thread is at; under the engine's lock. */
    struct vrep_io_list writes;
    bool writing;
    int fd;
    /* One open file description for each thread of the pool, for what must sync: the kernel
     * reports a lost write once per description, so of two syncs at once on a shared one, the
     * other would succeed wrongly. After a loss each reports it once: false alarms, no silence. */
    int *sync_fd;
    uint32_t sync_fds;
    bool direct, block_device, read_only, zero_cheap;
    bool locks; /* its lock bytes are held */
    uint32_t align_bytes, block_bytes;
    uint64_t bytes;
    uint64_t device, inode, mtime_ns, ctime_ns;
    uint64_t commands, sectors;
    uint64_t slow_until_ns;         /* inline writes are off until then; owner thread only */
    uint64_t read_end, ahead_end;   /* of reads, and of what is fetched; any thread, hints */
    struct vrep_presence *presence; /* overlays only */
    struct vrep_remote *remote;     /* what is read through a VM's NBD server: fd is -1 */
};

/* raw.c: runs the whole request with blocking calls on thread `number` of the pool; sets status and
 * os_error. */
void vrep_disk_run(struct vrep_io *io, uint32_t number, void *bounce, size_t bounce_bytes);
/* lock.c: holds its lock bytes whoever else does. */
int vrep_disk_hold_locks(struct vrep_disk *disk);
/* LOCKED: another may write it, or lets nobody read it; takes nothing. */
int vrep_lock_probe(int fd);
/* overlay.c */
void vrep_overlay_written(struct vrep_disk *disk, uint64_t offset, uint64_t length);
void vrep_overlay_free(struct vrep_disk *disk);
/* remote.c: 0 or an errno, within some seconds. */
int vrep_remote_read(struct vrep_io *io);
void vrep_remote_free(struct vrep_disk *disk);
/* engine.c */
void vrep_engine_queue(struct vrep_engine *engine, struct vrep_io *io);
uint32_t vrep_engine_threads(const struct vrep_engine *engine);
bool vrep_engine_is_stepped(const struct vrep_engine *engine);
/* True when io_uring took the request. */
bool vrep_engine_ring(struct vrep_engine *engine, struct vrep_io *io);

uint64_t vrep_iov_bytes(const struct iovec *iov, int iovcnt);
/* Drops the first bytes of an iovec array in place. */
void vrep_iov_advance(struct iovec **iov, int *iovcnt, size_t bytes);
void vrep_io_fail(struct vrep_io *io, int os_error);

#endif
