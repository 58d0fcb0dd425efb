/* Disk: a backing store that the filter serves, and its asynchronous I/O.
 *
 * Kinds: a raw file, a block device, an overlay (a sparse local file plus
 * a presence bitmap: blocks not present yet belong to somebody else), and a
 * remote one, which is read through another's NBD server.  An
 * engine owns a small pool of threads and an eventfd.  A request may complete
 * inside submit (page-cached reads by RWF_NOWAIT, small page-cached writes by
 * pwritev2, when the last ones were fast), on a pool thread, or by io_uring
 * (O_DIRECT without FUA); completions are reaped on the thread that owns the engine.
 *
 * Units: bytes.  Limits: a request <= 32 MiB of data, zero and extents any
 * length.  Threading: one owner thread per engine; nothing blocks it but
 * what is said above; no allocation per request.
 */
#ifndef VREP_DISK_DISK_H
#define VREP_DISK_DISK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "format/layout.h"

enum vrep_io_op {
    VREP_IO_READ = 1,
    VREP_IO_WRITE,
    VREP_IO_FLUSH, /* all writes completed before submit are stable when it completes */
    VREP_IO_ZERO,  /* the range reads zero afterwards, stays allocated when NO_HOLE */
};
#define VREP_IO_FUA 1u /* stable before completion */
#define VREP_IO_NO_HOLE 2u
#define VREP_IO_FAST 4u /* zero: fail with UNSUPPORTED rather than write zeroes slowly */

struct vrep_io {
    uint8_t op;
    uint8_t flags;
    bool inline_done;
    uint64_t offset;
    uint64_t length;
    struct iovec *iov; /* kept by the caller until completion; may be consumed */
    int iovcnt;
    int status;   /* enum vrep_status; a short transfer is IO */
    int os_error; /* errno of a failure, 0 otherwise */
    /* A failed FLUSH, or a FUA that may have failed in its sync: the kernel tells a loss once, so
     * this failure may speak of any write since the last good sync of the disk. */
    bool sync_failed;
    void (*done)(struct vrep_io *io);
    void *owner;
    /* private to the disk room */
    struct vrep_disk *disk;
    struct vrep_io *next;
};

struct vrep_engine;
int vrep_engine_create(uint32_t threads, struct vrep_engine **out);
/* Without threads, for simulators: a request waits until its owner runs it, in whatever order. */
int vrep_engine_create_stepped(struct vrep_engine **out);
/* The index-th request that waits, the oldest is 0; NULL past the last, and of an engine that is
 * not stepped. */
const struct vrep_io *vrep_engine_waiting(const struct vrep_engine *engine, uint32_t index);
/* Runs it; `reap` tells. */
void vrep_engine_step(struct vrep_engine *engine, uint32_t index);
/* Ends it with an error, and nothing of it is done. */
void vrep_engine_step_failing(struct vrep_engine *engine, uint32_t index, int os_error);
/* What waits is never run: the machine lost its power. */
void vrep_engine_forget(struct vrep_engine *engine);
/* Waits up to timeout_ms (-1: for ever) until something completed, and reaps. A stepped one runs
 * all that waits. */
void vrep_engine_wait(struct vrep_engine *engine, int timeout_ms);
/* Waits for everything in flight. */
void vrep_engine_destroy(struct vrep_engine *engine);
int vrep_engine_fd(const struct vrep_engine *engine); /* readable: call reap */
/* Calls done() of everything that completed; returns how many. */
uint32_t vrep_engine_reap(struct vrep_engine *engine);

struct vrep_disk_info {
    uint64_t bytes;
    uint32_t block_bytes; /* preferred */
    uint32_t align_bytes; /* 1 for page-cached; logical block for O_DIRECT */
    bool zero_is_cheap;   /* punch hole or BLKZEROOUT without writing */
    bool direct;
    bool block_device;
    bool read_only;
    uint64_t device, inode, mtime_ns, ctime_ns; /* stamps: who wrote past the filter */
    uint64_t commands, sectors; /* those of a block device: see look.h; 0: a file, or not counted */
};

#define VREP_DISK_DIRECT 1u
#define VREP_DISK_READ_ONLY 2u
#define VREP_DISK_NO_LOCK 4u
#define VREP_DISK_HANDOVER 8u /* holds its locks beside those of who writes now; asks nobody */
/* uri: "file:PATH" or "block:PATH"; any other scheme is UNSUPPORTED.  Takes the locks that QEMU
 * takes on an image (OFD byte locks: permissions at 100, what it does not share at 200), so that a
 * VM started past the filter and vrep refuse each other: LOCKED.  A size that is no multiple of 512
 * is INVALID; with DIRECT, UNSUPPORTED when it is none of the filesystem's alignment either. */
int vrep_disk_open(struct vrep_engine *engine, const char *uri, uint32_t flags,
                   struct vrep_disk **out);
/* A disk of `bytes` that is read through an NBD server on a Unix socket: `where` is "EXPORT:PATH".
 * To be read only, without locks or stamps.  Nobody need be there when it is opened: a read that
 * finds no server, or one that hangs or has another size, fails with IO or the like, within 5 s. */
int vrep_remote_open(struct vrep_engine *engine, const char *where, uint64_t bytes,
                     struct vrep_disk **out);
/* The next read asks who answers on the socket then.  Any thread. */
void vrep_remote_forget(struct vrep_disk *disk);
/* Whether its reads wait for another process. */
bool vrep_disk_is_remote(const struct vrep_disk *disk);
void vrep_disk_close(struct vrep_disk *disk);
/* Takes the locks of an open disk, if nobody holds what they exclude: else LOCKED, and it holds
 * what it held before.  A disk that has them (HANDOVER) only asks. */
int vrep_disk_lock(struct vrep_disk *disk);
/* Whether another holds what they exclude; takes nothing. */
bool vrep_disk_locked(struct vrep_disk *disk);
/* Lets go of them: whoever wants the image may have it. */
int vrep_disk_unlock(struct vrep_disk *disk);
int vrep_disk_info(struct vrep_disk *disk, struct vrep_disk_info *out);
/* Re-reads the size (resize); stamps too. */
int vrep_disk_refresh(struct vrep_disk *disk);
/* Gives a file another size, durably; what it gains reads zero.  UNSUPPORTED for a block device,
 * whose size is its maker's.  What is cut off is gone. */
int vrep_disk_resize(struct vrep_disk *disk, uint64_t bytes);
/* After a failed sync the page cache may hold, as clean, what never reached the store: lets go of
 * what is clean, so that reads tell what is stored.  May wait for the store. */
void vrep_disk_forget_cache(struct vrep_disk *disk);

/* Starts io; when it completed at once: io->inline_done is true, status is set and done() is NOT
 * called. Bounds are checked (RANGE).  Unaligned requests on an O_DIRECT disk are widened by
 * read-modify-write; the caller holds the widened range (vrep_disk_widen) against overlapping
 * commands. */
void vrep_disk_submit(struct vrep_disk *disk, struct vrep_io *io);
/* The range that must be held for [offset, offset + length). */
void vrep_disk_widen(const struct vrep_disk *disk, uint64_t *offset, uint64_t *length);

/* Next extent at offset: how long (<= max), whether it is a hole that reads zero; cheap
 * (SEEK_HOLE/SEEK_DATA), but may block: for a block device all is data.  Any thread. */
int vrep_disk_extent(struct vrep_disk *disk, uint64_t offset, uint64_t max, uint64_t *length,
                     bool *hole);

/* ---- overlay ------------------------------------------------------------- */

/* Creates `path` (sparse, disk_bytes) and `path`.presence, names synced; opens them when they exist
 * (LOCKED, INVALID: other size or view; CORRUPT, TORN, VERSION: the presence file). `path`.live is
 * made anew when it is not of this boot: it holds what was written and not synced yet, so that a
 * killed process loses nothing. The disk's preferred block is the overlay's.
 *
 * With `onto` (file: or block:, of disk_bytes) the data go there, over whatever it holds, and
 * `path` stays empty of data: that it has a size says that the presence file is stable. */
int vrep_overlay_open(struct vrep_engine *engine, const char *path, const char *onto,
                      const uint8_t view_id[16], uint64_t disk_bytes, uint32_t block_bytes,
                      struct vrep_disk **out);
bool vrep_disk_is_overlay(const struct vrep_disk *disk);
/* First absent run of blocks inside [offset, offset + length), block-aligned; false when all is
 * present. */
bool vrep_overlay_absent(const struct vrep_disk *disk, uint64_t offset, uint64_t length,
                         uint64_t *absent, uint64_t *absent_length);
/* A WRITE or ZERO on an overlay marks the blocks that it covers whole as present once its data are
 * written (the caller fills a partly covered absent block first); FLUSH and FUA sync data and
 * presence. set_present does the same marking for data that came another way. Bits reach the file
 * by vrep_overlay_sync: data are synced first, then the bits that were set before that sync began.
 * A failed sync is never retried into success: all later ones fail too. */
void vrep_overlay_set_present(struct vrep_disk *disk, uint64_t offset, uint64_t length);
int vrep_overlay_sync(struct vrep_disk *disk); /* any thread but one at a time */
uint64_t vrep_overlay_present_bytes(const struct vrep_disk *disk);

#endif
