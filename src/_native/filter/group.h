/* Group: a protection group as the filter serves it: its disks, its filter
 * chain (the replication tap first), ring, change map, write-intent, durable
 * state and consumers, all on one thread (a lane).
 *
 * Units: bytes, ns.  Limits: 64 disks, 1 target.  Threading: everything here
 * is called on the group's thread, except vrep_group_call, which other threads
 * use to run a control request on it (mailbox + eventfd) and wait, and the
 * miss queue.
 */
#ifndef VREP_FILTER_GROUP_H
#define VREP_FILTER_GROUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "disk/disk.h"
#include "filter/command.h"
#include "format/layout.h"

struct vrep_group_disk {
    const char *name; /* export name is name */
    const char *uri;  /* file: block: or view:PATH (overlay) */
    uint64_t bytes;   /* expected size of an overlay to create; with `was` the size to have */
    uint64_t was;     /* a disk that is to get another size: what it had before; 0: none is */
    const char *onto; /* of an overlay: the disk that takes its data; NULL: a file at PATH */
};
#define VREP_GROUP_TAP 1u /* replicate: ring, map, intent, state */
#define VREP_GROUP_READ_ONLY 2u
#define VREP_GROUP_DIRECT 4u /* O_DIRECT backing */
#define VREP_GROUP_BYPASS 8u /* no tap: in the place of a filter that cannot start */
/* A running VM still writes the disks, and is about to switch to this group: see "hand-over". */
#define VREP_GROUP_HANDOVER 16u
/* No threads and no clock of its own, for simulators: see "stepped". */
#define VREP_GROUP_STEPPED 32u
/* A VM writes the disks itself, and sends a copy of each write: see "mirror". */
#define VREP_GROUP_MIRROR 64u
struct vrep_group_config {
    uint8_t group_id[16];
    uint8_t target_id[16];
    uint8_t epoch_id[16];
    uint32_t epoch;
    uint16_t lane; /* of the group that the records are of */
    uint32_t flags;
    uint64_t
        first_seq; /* a group without state begins behind it: where its epoch left its parent */
    const struct vrep_group_disk *disks;
    uint32_t disks_count;
    const char *shm_dir;   /* ring and map: "<shm_dir>/ring", "<shm_dir>/map"; NULL: a bypass that
                              does not know */
    const char *state_dir; /* "<state_dir>/state", "intent", "map.0", "map.1" */
    uint64_t ring_bytes;
    uint32_t ring_descriptors;
    uint32_t slots; /* commands in flight */
    uint32_t bit_bytes;
    uint32_t threads;            /* of the disk engine */
    uint64_t private_bytes;      /* reserve for unrecorded payloads, default 64 MiB */
    uint64_t resync_bytes_per_s; /* 0: unlimited */
    uint64_t checkpoint_ns;      /* period of map checkpoints, default 5 s */
    uint64_t mono_ns, wall_ns;   /* of a stepped group: what time it is when it opens */
};

/* Opens disks and locks; decides from durable state, stamps, ring and map what happened since
 * (clean, process kill, power loss, written past the filter); replays the in-flight table; ready to
 * serve when it returns.  A disk with a plan for another size gets it (filter/resize.c), unless its
 * backing cannot: then it is served as it was. LOCKED, NOT_FOUND, INVALID (size changed under clean
 * state is `unverified`, not an error), IO, CORRUPT, VERSION; GONE: a hand-over of a disk that
 * nobody has open. */
int vrep_group_open(const struct vrep_group_config *config, struct vrep_group **out);
/* Another has the disks of a group that is not open: the next open believes nothing. LOCKED: a
 * filter has it, and nothing is stored. shm_dir may be NULL. */
int vrep_group_note_past(const uint8_t group_id[16], const char *shm_dir, const char *state_dir);
/* Drains what is in flight; clean also stores stamps and a clean checkpoint. */
void vrep_group_close(struct vrep_group *group, bool clean);

/* A kill, for tests: nothing is drained or stored; what the kernel has, ends, then locks and memory
 * are let go. */
void vrep_group_abandon(struct vrep_group *group);

/* The thread that polls first owns the group.  When it stops polling it says so, and control
 * requests run on the threads that make them. */
void vrep_group_disown(struct vrep_group *group);

/* One turn of a group that is open while no loop polls it (its guest is paused): acknowledgements
 * are taken, timers run.  Does nothing when a loop does.  No loop may start meanwhile. */
void vrep_group_attend(struct vrep_group *group);

int vrep_group_fd(const struct vrep_group *group); /* an epoll fd: readable when poll has work */
void vrep_group_poll(struct vrep_group *group);    /* completions, consumers, mailbox, timers */
int vrep_group_timeout_ms(
    const struct vrep_group *group); /* until poll must be called anyway; -1: never */
/* After a batch of submits: wakes the consumers (once per batch). */
void vrep_group_flush_wakeups(struct vrep_group *group);
/* Called on the group's thread when commands or payload memory are free again after AGAIN/NULL. */
void vrep_group_set_wakeup(struct vrep_group *group, void (*wakeup)(void *context), void *context);

uint32_t vrep_group_disks(const struct vrep_group *group);
const char *vrep_group_disk_name(const struct vrep_group *group, uint32_t disk);
struct vrep_disk *vrep_group_disk(struct vrep_group *group, uint32_t disk);
uint64_t vrep_group_disk_bytes(const struct vrep_group *group, uint32_t disk);
/* It got another size when the group was opened, or shortly before: clients may not know. */
bool vrep_group_disk_resized(const struct vrep_group *group, uint32_t disk);
struct vrep_map *vrep_group_map(struct vrep_group *group);   /* NULL without tap, */
struct vrep_ring *vrep_group_ring(struct vrep_group *group); /* unless a bypass marks */

/* ---- control, from any thread ---------------------------------------------- */
/* Runs fn(group, argument) on the group's thread and waits for it. GONE after close. */
int vrep_group_call(struct vrep_group *group, int (*fn)(struct vrep_group *group, void *argument),
                    void *argument);

/* The following run on the group's thread (use vrep_group_call). */
int vrep_group_consumer_attach(struct vrep_group *group, uint32_t role, const uint8_t target_id[16],
                               uint64_t durable,
                               int fds[3]); /* control, data, space: dups for the consumer */
int vrep_group_consumer_detach(struct vrep_group *group, uint32_t role);
/* Inserts a MARK record (no payload but the label) after everything acknowledged so far; *seq is
 * its position. FULL when there is no room, GONE in a gap. */
int vrep_group_mark(struct vrep_group *group, const char *label, uint16_t label_bytes,
                    uint64_t *seq);
/* Inserts an OBJECT record: `tag` is the same for all versions of an object, `data` is its
 * plaintext (struct vrep_object, name, blob), copied. In a gap, too. FULL when more than half of
 * the ring is used, or it has no room; INVALID. */
int vrep_group_object(struct vrep_group *group, uint64_t tag, const void *data, uint32_t bytes,
                      uint64_t *seq);

/* ---- a cut over the lanes of a group (cut.c), each on its own thread ---------
 * Holds all answers, at most VREP_CUT_HOLD_NS_MAX: what is longer ends by itself and voids the cut.
 * INVALID: a longer limit; BUSY: holds already, or in a hand-over; GONE: in a gap. */
#define VREP_CUT_HOLD_NS_MAX UINT64_C(10000000)
int vrep_group_cut_hold(struct vrep_group *group, const uint8_t cut_id[16], uint64_t limit_ns);
/* Marks the order of a lane that holds for this cut. TIMEOUT: it does not (any more); else as
 * vrep_group_mark. */
int vrep_group_cut_mark(struct vrep_group *group, const uint8_t cut_id[16], uint64_t *seq);
/* Ends the hold. TIMEOUT: it had ended before, so the cut is void. */
int vrep_group_cut_release(struct vrep_group *group, const uint8_t cut_id[16]);
/* Puts the record that completes a cut, which every lane has held for until its release: `lanes`
 * are the marks' positions, rising by lane, seq 0 for a lane without a part. As vrep_group_mark. */
int vrep_group_cut_complete(struct vrep_group *group, const uint8_t cut_id[16],
                            const struct vrep_position *lanes, uint16_t count, const char *label,
                            uint16_t label_bytes, uint64_t *seq);
/* Sync copies of unshipped blocks run only while allowed; rate 0 = unlimited.  Everything becomes
 * unshipped with `all` (first sync: the gap starts with it). */
int vrep_group_resync(struct vrep_group *group, bool allowed, uint64_t bytes_per_s, bool all);
/* The ring cannot be shipped any more from here (lost history at the target): rule 12. */
int vrep_group_lose_ring(struct vrep_group *group);
/* A range of a disk, in bytes. */
struct vrep_since_range {
    uint64_t offset, length;
};
/* The blocks of these ranges may differ from the target's, whatever was acknowledged: they become
 * unshipped, and a gap begins.  They are compared when a delta is on, else sent.  RANGE. */
int vrep_group_compare(struct vrep_group *group, uint32_t disk,
                       const struct vrep_since_range *ranges, size_t count);

/* ---- hand-over: the images pass from a running VM to the filter, and back ---------------------
 *
 * In (VREP_GROUP_HANDOVER): the group opens beside the VM that writes its disks, with every block
 * unshipped, and takes its lock bytes without asking.  Until all that others hold is let go of it
 * neither starts a command nor copies anything: who sends one waits, for as long as a program that
 * switches needs from its last write to the disk to its first one here.
 *
 * Out: first a durable flag says that the disks may be written past the filter, then the locks go;
 * commands are served on, nothing is copied, no mark is set and no gap ends.  Once another holds a
 * disk, a gap begins, and all is unshipped and unverified (VREP_UNVERIFIED_PAST); so it is at the
 * next open, if the locks were not taken back before. */
enum vrep_handover {
    VREP_HANDOVER_NONE,
    VREP_HANDOVER_IN,      /* waits until the VM lets go */
    VREP_HANDOVER_LETTING, /* the flag is being stored, copies in flight end */
    VREP_HANDOVER_OUT,     /* the locks are gone */
    VREP_HANDOVER_PAST,    /* and another has a disk */
    VREP_HANDOVER_MIRROR   /* a mirror that may miss writes */
};
/* Begins to let go; OUT follows.  BUSY in a hand-over. */
int vrep_group_let_go(struct vrep_group *group);
/* Takes the locks back, when the VM did not switch after all.  LOCKED: another has a disk. */
int vrep_group_take_back(struct vrep_group *group);

/* ---- stepped: whoever drives the group says what happens when ---------------------------------
 *
 * Requests to the disks and jobs of the workers wait until they are stepped, each by itself and in
 * any order but that of one worker's jobs; `poll` sees what they did.  A close steps all that it
 * waits for; vrep_group_abandon forgets what was not stepped. */
enum vrep_step_kind {
    VREP_STEP_DISK = 1, /* a request to a backing disk */
    VREP_STEP_QUICK,    /* write-intent or state */
    VREP_STEP_SLOW,     /* checkpoint */
    VREP_STEP_PROBER
};
struct vrep_group_step {
    uint8_t kind;
    uint8_t op, flags; /* enum vrep_io_op and its flags, of a disk's */
    uint16_t disk;
    uint64_t offset, length;
};
/* The index-th of what waits; false past the last. */
bool vrep_group_waiting(const struct vrep_group *group, uint32_t index,
                        struct vrep_group_step *out);
void vrep_group_step(struct vrep_group *group, uint32_t index);
/* A request to a disk ends with an error, and nothing of it is done; a job runs. */
void vrep_group_step_failing(struct vrep_group *group, uint32_t index, int os_error);
/* What time it is from now on. */
void vrep_group_set_time(struct vrep_group *group, uint64_t mono_ns, uint64_t wall_ns);

/* ---- mirror: a VM keeps its disks, and sends a copy of each write (VREP_GROUP_MIRROR) ----------
 *
 * The disks are opened to be read only and without locks.  A group opens as VREP_HANDOVER_MIRROR:
 * writes may be missing, so a gap is open and nothing is copied.  After `live` it is
 * VREP_HANDOVER_NONE, until a connection closes; see mirror.c for the rules. */
bool vrep_group_is_mirror(const struct vrep_group *group);
/* Of a front-end: a connection begins to send a disk's writes, or ends; before its fd is closed.
 * Nothing to do without VREP_GROUP_MIRROR.  FULL: too many. */
int vrep_group_mirror_join(struct vrep_group *group, uint32_t disk, int fd);
void vrep_group_mirror_leave(struct vrep_group *group, int fd);
/* Every write of each disk is sent from now on, and every one that was not has been marked.  GONE:
 * a disk has no connection, or one closed; BUSY: it is live. */
int vrep_group_mirror_live(struct vrep_group *group);
struct vrep_since_range;
/* These ranges may hold what was not sent.  RANGE: past the disk's end, and nothing is marked. */
int vrep_group_mirror_mark(struct vrep_group *group, uint32_t disk,
                           const struct vrep_since_range *ranges, size_t count);
/* Anything may have been written: all is unshipped and unverified (VREP_UNVERIFIED_PAST). */
int vrep_group_mirror_distrust(struct vrep_group *group);
/* The VM is off: have its images looked at, by a thread of their own, for their storage may hang.
 * When nobody writes them, and with `begin`, they are compared as they are, and a gap ends behind
 * that, until one is locked, was written, or has a connection.  `images` are what the disks consist
 * of, at least one of each: a disk itself where it is, or every file that an image is made of.
 * BUSY: live, somebody is connected, or a look is under way; INVALID. */
struct vrep_rest_image {
    uint32_t disk;
    const char *path; /* copied */
};
int vrep_group_mirror_rest(struct vrep_group *group, const struct vrep_rest_image *images,
                           size_t count, bool begin);
/* What came of it.  LOCKED: somebody has an image open; AGAIN: it was written in the last seconds,
 * or something happened meanwhile; GONE: it was replaced, or has another size; UNSUPPORTED: it
 * cannot be told whether it is written; BUSY: it is under way still. */
int vrep_group_mirror_looked(const struct vrep_group *group);
/* The VM's writes were drained after `copies` (of the status) was read.  GONE: a connection
 * closed. */
int vrep_group_mirror_barrier(struct vrep_group *group, uint64_t copies);

struct vrep_group_status {
    uint64_t head, released, durable, received, read;
    uint64_t ring_free_bytes, ring_bytes;
    uint64_t unshipped_bytes, total_bytes;
    uint64_t gap_seq; /* 0: none open */
    /* The newest gap-begin: it may have taken along what stands before it and is not known to be
     * durable, whatever `durable` says later.  0: none since the ring began. */
    uint64_t gap_last;
    uint32_t gap;        /* 1: in a gap */
    uint32_t unverified; /* reason code */
    uint32_t opened_as;  /* how the last open found it: VREP_OPENED_* */
    uint32_t replayed;   /* slots replayed at open */
    uint32_t inflight;
    uint32_t consumers;
    uint64_t oldest_ns; /* CLOCK_REALTIME of the oldest change not durable (in a gap: its begin), 0:
                           none */
    uint64_t writes, write_bytes, reads, read_bytes, flushes, zeroes, zero_bytes; /* of the guest */
    uint64_t unrecorded;     /* writes that found no room */
    uint64_t gaps;           /* begun since open */
    uint64_t resync_bytes;   /* copied since the last resync began */
    uint64_t compared_bytes; /* of them, in windows of a delta */
    uint64_t equal_bytes;    /* of them, the same as what the target holds: not sent */
    uint64_t errors;         /* backing errors */
    uint32_t flush_failed;   /* flushes fail until re-verified */
    uint32_t resync_allowed;
    /* A target that holds less lost what blocks that are clean here rely on: everything must become
     * unshipped again (vrep_group_resync with `all`).  0: nothing is relied on. */
    uint64_t acknowledged;
    uint64_t cuts, cuts_void;  /* holds that were released, and that ended by themselves */
    uint64_t cut_hold_ns_max;  /* the longest */
    uint32_t handover;         /* VREP_HANDOVER_* */
    uint32_t handover_waiting; /* a command waits for it */
    uint32_t sizes_due;        /* disks whose size is not in the order yet */
    uint32_t mirror;           /* VREP_GROUP_MIRROR */
    uint32_t mirror_waits;     /* a gap would end behind a barrier */
    uint64_t mirror_copies;    /* sync copies that ended, of which none before is under way */
    uint64_t mirror_losses;    /* times that a connection of a live one closed */
    uint64_t mirror_yields;    /* copies that gave way to the VM that they read through */
    uint32_t mirror_rests;     /* its VM is off, and nobody writes the images */
    /* 1: blocks became unshipped by a command, and a power loss would forget that: nothing that a
     * target holds may rely on their gap yet. */
    uint32_t marks_unstored;
    uint64_t mirror_looks; /* ended, and found that so */
};
enum vrep_opened {
    VREP_OPENED_NEW = 1,
    VREP_OPENED_CLEAN,
    VREP_OPENED_KILLED,
    VREP_OPENED_POWER_LOSS,
    VREP_OPENED_UNEXPLAINED
};
/* Why a group is unverified: no recovery point is offered until everything was sent or compared
 * again. */
enum vrep_unverified {
    VREP_UNVERIFIED_STAMPS = 1, /* the disk changed after a clean close */
    VREP_UNVERIFIED_SIZE,       /* its size did, or the group's disks */
    VREP_UNVERIFIED_STATE,      /* durable state is damaged */
    VREP_UNVERIFIED_INTENT,     /* no write-intent or checkpoint after an unclean end */
    VREP_UNVERIFIED_FLUSH,      /* a flush failed */
    VREP_UNVERIFIED_BYPASS,     /* a pass-through wrote what is marked nowhere */
    VREP_UNVERIFIED_PAST,       /* a VM ran without the filter */
};
int vrep_group_status(struct vrep_group *group, struct vrep_group_status *out);
/* Any thread, and slow for a large map: the union of generations and unshipped, in bytes. */
uint64_t vrep_group_dirty_bytes(const struct vrep_group *group);

/* ---- views: what differs from a base point ----------------------------------- */
/* From here on each disk of a view knows which blocks may differ from its base point (see
 * track/since.h), which front-ends offer under `name`. Before it is served. What is present
 * already, of a view that was served before, is marked. EXISTS when there is a base; INVALID with a
 * tap, or for a name of 96 bytes and more; NOMEM. */
int vrep_group_since_begin(struct vrep_group *group, const char *name);
/* On the group's thread: these ranges may differ too. */
int vrep_group_since_mark(struct vrep_group *group, uint32_t disk,
                          const struct vrep_since_range *ranges, size_t count);
const char *vrep_group_since_name(const struct vrep_group *group); /* NULL without a base */
struct vrep_since;
const struct vrep_since *vrep_group_since(const struct vrep_group *group, uint32_t disk);

/* ---- views: the miss queue --------------------------------------------------- */
/* A read or partial write of absent blocks waits while a miss is fetched by another thread. */
struct vrep_miss {
    uint64_t ticket;
    uint64_t offset;
    uint64_t length; /* whole blocks, <= 1 MiB */
    uint16_t disk;
};
/* Any one thread: waits up to timeout_ms for misses (a background fill asks too, by
 * vrep_group_fill_next); returns how many were stored in out. */
uint32_t vrep_group_misses(struct vrep_group *group, struct vrep_miss *out, uint32_t max,
                           int timeout_ms);
/* Any thread: vrep_group_misses returns 0 at once from now on, so that its thread can end before
 * close. */
void vrep_group_stop_misses(struct vrep_group *group);
/* Ends a miss with data (length of the miss), or with a status: then the waiting commands fail.
 * data may be NULL: zeroes.  Presence is rechecked under the range: newer guest data are never
 * overwritten. */
int vrep_group_fill(struct vrep_group *group, uint64_t ticket, const void *data, int status);
/* The same, but only these parts of the miss are written, rising and apart from each other; INVALID
 * when they are not.  What lies outside of them is what the disk below the view holds already: the
 * caller compared it after the miss was taken.  That stays true, since whatever a guest writes to
 * an absent block makes it present. */
struct vrep_fill_part {
    uint64_t offset, length;
};
int vrep_group_fill_parts(struct vrep_group *group, uint64_t ticket, const void *data,
                          const struct vrep_fill_part *parts, uint32_t count);
/* Background fill: asks for the next absent range of a disk as a miss; NOT_FOUND when the disk is
 * whole. */
int vrep_group_fill_next(struct vrep_group *group, uint16_t disk, uint64_t from, uint64_t max,
                         struct vrep_miss *out);
/* Any thread: makes stable what a view's disk holds, and which blocks of it are there.  A disk is
 * whole behind this only: what was filled may be lost until then.  Guests do not wait. */
int vrep_group_sync_disk(struct vrep_group *group, uint16_t disk);

#endif
