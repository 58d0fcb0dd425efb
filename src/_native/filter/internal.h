/* Internal: what the files of the filter room share.
 *
 * `struct command` embeds the public vrep_command first; all of them, guest
 * commands, sync copies and fills, stand in one array made at open, so that
 * nothing on the I/O path allocates.  Units: bytes, ns.  Threading: everything
 * belongs to the group's thread unless a comment says otherwise.
 */
#ifndef VREP_FILTER_INTERNAL_H
#define VREP_FILTER_INTERNAL_H

#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "disk/disk.h"
#include "filter/chain.h"
#include "filter/command.h"
#include "filter/delta.h"
#include "filter/group.h"
#include "filter/state.h"
#include "filter/worker.h"
#include "format/layout.h"
#include "ring/ring.h"
#include "track/intent.h"
#include "track/map.h"
#include "track/overlap.h"
#include "track/since.h"

#define COPIES 4u     /* sync copies in flight */
#define FILLS 4u      /* fills of views in flight */
#define SLOTS_OWN 16u /* in-flight entries of the group itself: copies, gap records, marks */
#define CONSUMERS 8u
#define MISSES 64u
#define MIRROR_CLIENTS 64u
#define FILTERS_MAX 4u
#define CALLS_MAX 64u
#define COPY_BYTES_MAX (256u << 10)
#define HOLE_BYTES_MAX (1u << 30)
#define MISS_BYTES_MAX (1u << 20)
#define PRIVATE_BLOCK (32u << 10)
#define VIEW_BLOCK_BYTES 65536u
#define SEQ_AHEAD (UINT64_C(1) << 24) /* how far the durable high-water mark of seq runs ahead */
#define NO_GENERATION 0xffu
#define NO_BLOCK UINT32_MAX

#define NS_PER_MS UINT64_C(1000000)
#define NS_PER_S UINT64_C(1000000000)

enum role { ROLE_GUEST, ROLE_COPY, ROLE_FILL };

struct command {
    struct vrep_command base; /* first */
    struct vrep_range range;
    struct vrep_io io;
    void (*resume)(struct command *command); /* after the backing I/O in progress */
    struct vrep_ring_slot *slot;
    struct iovec *room;   /* iovecs of this command */
    struct command *link; /* in the one list it waits in: pool, cold, ready, a miss */
    uint64_t at, bytes;   /* range that is changed: base's, or the aligned part of a discard */
    uint32_t block;       /* first private block, NO_BLOCK: none */
    uint32_t blocks;
    int failure; /* status for the guest while a failed write is re-read */
    uint8_t role;
    uint8_t level; /* of the chain */
    uint8_t generation;
    bool in_use;
    bool submitted;
    bool recorded;       /* has a descriptor */
    bool ranged;         /* holds or waits for its range */
    bool marked;         /* counted in its generation */
    bool intended;       /* counted in the write-intent */
    struct vrep_job job; /* copies: extent under the range */
    bool hole;
    struct delta_window *window; /* copies: of a delta, or NULL */
    bool stale;                  /* copies: the range was marked again since it began */
    bool yielded;                /* copies: let go of the range, and are void */
    uint64_t number;             /* copies: counts those that were begun */
    struct miss *miss;           /* fills */
};

struct list {
    struct command *first;
    struct command **last;
};

static inline void list_init(struct list *list)
{
    list->first = NULL;
    list->last = &list->first;
}

static inline void list_push(struct list *list, struct command *command)
{
    command->link = NULL;
    *list->last = command;
    list->last = &command->link;
}

static inline struct command *list_pop(struct list *list)
{
    struct command *command = list->first;
    if (command != NULL) {
        list->first = command->link;
        if (list->first == NULL)
            list->last = &list->first;
    }
    return command;
}

struct call {
    int (*fn)(struct vrep_group *group, void *argument);
    void *argument;
    int status;
    bool finished;
    struct call *next;
};

enum miss_state { MISS_FREE, MISS_QUEUED, MISS_TAKEN, MISS_FILLING };
struct miss {
    enum miss_state state;
    uint64_t ticket;
    uint64_t offset, length;
    uint16_t disk;
    struct list waiters;
    /* of the fill */
    const uint8_t *data;
    struct vrep_fill_part whole;
    const struct vrep_fill_part *parts; /* what is written of it */
    uint32_t parts_left;
    uint64_t first, at, end; /* absent blocks that are being filled; written up to at */
    bool *filled;            /* the waiting thread's flag and status */
    int *filled_status;
};

struct disk {
    struct vrep_disk *disk;
    struct vrep_disk_info info;
    char name[VREP_NAME_BYTES];
    bool overlay;
    uint64_t planned_was;     /* what it had when it was to get another size; 0: it was not */
    uint64_t told_bytes;      /* the size that the durable state names: its last record's */
    struct vrep_since *since; /* of a view with a base point */
};

struct vrep_group {
    struct vrep_group_config config;
    bool tap; /* records */
    struct vrep_engine *engine;
    struct disk disks[VREP_DISKS_MAX];
    uint32_t disks_count;
    char since_name[96];

    /* chain */
    struct vrep_filter filters[FILTERS_MAX];
    uint32_t filters_count;
    struct vrep_overlap *overlap;

    /* commands */
    struct command *commands;
    uint32_t commands_count;
    struct list pool;       /* of the guest */
    struct command *copies; /* COPIES of them */
    struct command *fills;  /* FILLS */
    struct iovec *room;
    size_t room_bytes;
    uint8_t *private_memory;
    size_t private_bytes;
    uint32_t *private_next;
    uint32_t private_first, private_free, private_blocks;
    bool wanted; /* somebody was sent away for want of a command or memory */
    bool freed;  /* and now there is some */
    void (*wakeup)(void *context);
    void *wakeup_context;
    uint32_t inflight; /* guest commands submitted and not done */
    struct list ready; /* granted their range, not yet gone on */
    bool draining;
    struct list cold; /* wait for a sync of the write-intent */

    /* replication */
    struct vrep_ring *ring;
    struct vrep_map *map;
    struct vrep_intent *intent;
    struct vrep_checkpoint *checkpoint;
    struct vrep_state_file state_file;
    struct vrep_state state;         /* what the next write stores */
    struct vrep_state state_written; /* of the job in progress */
    struct vrep_ring_slot *gap_slot; /* reserved: makes gap-begin the next record */
    uint64_t gap_wall_ns;
    uint64_t
        sizes_due; /* one bit a disk: a RESIZE with its size must be published before a gap ends */
    uint64_t seq_limit; /* durable */
    struct vrep_ring_consumer consumers[CONSUMERS];
    uint32_t consumers_count;
    uint64_t durable, received, read;
    uint64_t notified; /* head at the last notify */
    bool liar;         /* a consumer reported what cannot be, and was named */
    bool flush_failed;
    /* Failed syncs since the page cache was dropped, and how many the drop under way is for:
     * nothing is copied in between. */
    uint32_t distrust, distrust_known;
    uint64_t dirtied; /* marks since the last checkpoint */

    /* the threads beside, and their jobs */
    struct vrep_worker *quick;  /* write-intent and state: guests wait for it */
    struct vrep_worker *slow;   /* checkpoints */
    struct vrep_worker *prober; /* holes: their range is held meanwhile, so no sync goes before */
    int notify_fd;
    struct vrep_job intent_job, state_job, checkpoint_job, populate_job, probe_job, forget_job;
    bool state_again, checkpoint_again;
    uint64_t checkpoint_head, checkpoint_durable;
    /* By number: asked for, begun, stored; and the one that holds marks of no write, of which
     * nothing else would tell after a power loss. */
    uint64_t checkpoint_asked, checkpoint_begun, checkpoint_stored, checkpoint_wanted;
    uint64_t intent_retry_ns, state_retry_ns;
    enum { COOL_IDLE, COOL_FLUSHING, COOL_FLUSHED, COOL_CHECKPOINT } cooling;
    bool cool_ok;
    uint32_t cool_flushes;
    struct vrep_io *cool_io; /* one per disk */

    /* resync */
    bool resync_allowed;
    uint64_t resync_rate;
    int64_t resync_budget;
    uint64_t resync_filled_ns;
    uint64_t resync_retry_ns;
    uint64_t resync_starved_ns; /* since when the ring leaves no room for copies; 0: it does */
    int64_t resync_owed;        /* bytes of copies that go before guest records again */
    uint16_t cursor_disk;
    uint64_t cursor;
    uint32_t copies_inflight;
    uint64_t copies_bytes; /* of those in flight */
    bool resync_again;     /* poll soon */
    struct {
        uint16_t disk;
        uint64_t offset, length;
        bool hole, valid;
    } probe;

    struct delta *delta; /* with a tap */

    enum vrep_handover handover;
    struct {
        bool on; /* VREP_GROUP_MIRROR */
        struct pollfd clients[MIRROR_CLIENTS];
        uint16_t disk_of[MIRROR_CLIENTS];
        uint32_t clients_count;
        uint64_t copies, barrier, losses, looks, joins;
        bool rests;        /* its VM is off: see mirror.c, rule 5 */
        struct rest *rest; /* who looks at its images; NULL before the first look */
        uint64_t
            yield_ns; /* when copies that read through the VM give way to it; 0: it waits for none
                       */
    } mirror;

    /* a cut over the lanes of the group, see cut.c */
    struct {
        bool held;
        uint8_t id[16];
        uint64_t since_ns, until_ns;
        struct list waiting; /* commands that are done and not answered */
    } cut;

    /* views */
    pthread_mutex_t miss_lock; /* guards misses' states, wakes the fetching thread */
    pthread_cond_t miss_wake;  /* a miss was queued */
    pthread_cond_t fill_wake;  /* a fill ended */
    struct miss misses[MISSES];
    uint64_t ticket;
    struct list miss_full; /* commands that found every miss taken */
    uint32_t fills_inflight;
    bool misses_closed;

    /* event loop and control */
    int epoll_fd, mail_fd;
    pthread_mutex_t mail_lock;
    pthread_cond_t mail_wake;
    struct call *mail_first, **mail_last;
    uint32_t mail_pending; /* atomic */
    bool owned;            /* a thread polls */
    pthread_t owner;
    bool closing;
    bool abandoned;   /* a simulated kill: nothing that completes is seen any more */
    bool lose_wanted; /* no new copies: the ring is to be given up */
    uint64_t now_ns;
    uint64_t seal_ns, checkpoint_ns, cool_ns;

    struct vrep_group_status count; /* counters only */
    uint32_t opened_as, replayed;
};

static inline struct command *command_of(struct vrep_command *command)
{
    return (struct command *)command;
}

static inline struct disk *disk_of(struct vrep_group *group, const struct command *command)
{
    return &group->disks[command->base.disk];
}

/* CLOCK_MONOTONIC or CLOCK_REALTIME, of the system or of who steps the group. */
uint64_t vrep_clock_ns(const struct vrep_group *group, int clock);
static inline bool vrep_group_stepped(const struct vrep_group *group)
{
    return (group->config.flags & VREP_GROUP_STEPPED) != 0;
}
/* step.c: all that waits. */
void vrep_group_step_all(struct vrep_group *group);

/* command.c */
int vrep_pool_create(struct vrep_group *group);
void vrep_pool_destroy(struct vrep_group *group);
/* A ring that was attached may have been made with fewer slots than are configured now. */
int vrep_pool_limit(struct vrep_group *group, uint32_t ring_slots);
void vrep_payload_free(struct vrep_group *group, struct command *command);
/* A change that found no room when it was prepared, and now may: it is recorded after all. */
void vrep_payload_record(struct vrep_group *group, struct command *command);
int vrep_payload_iov(struct vrep_group *group, struct command *command);

/* tap.c */
extern const struct vrep_filter_ops vrep_tap_ops;
/* Commits a slot as the next record, after a gap-begin when one is due; the slot is free
 * afterwards. */
uint64_t vrep_tap_publish(struct vrep_group *group, struct vrep_ring_slot *slot);
void vrep_tap_drain(struct vrep_group *group);
void vrep_tap_granted(void *context, struct vrep_range *range);
void vrep_tap_cold_retry(struct vrep_group *group);
/* Marks the open generation and makes the slot of a command GRANTED. */
void vrep_tap_grant(struct vrep_group *group, struct command *command, uint8_t kind);
void vrep_tap_flush_failed(struct vrep_group *group);

/* gap.c */
void vrep_gap_enter(struct vrep_group *group);
/* Publishes a gap-begin even inside a gap; with `jump` seq need not go on without a break. */
int vrep_gap_restart(struct vrep_group *group, bool jump);
/* Reserves the descriptor that makes gap-begin the next record. */
bool vrep_gap_reserve(struct vrep_group *group);
void vrep_gap_try_end(struct vrep_group *group);
bool vrep_gap_due(const struct vrep_group *group);
/* Everything in the ring becomes unshipped and is let go of; no copy is in flight. */
int vrep_gap_give_up_ring(struct vrep_group *group);
int vrep_gap_lose_ring(struct vrep_group *group);

/* control.c */
/* A MARK: of this lane alone, or with `cut` and the positions of its lanes. */
int vrep_mark_put(struct vrep_group *group, const struct vrep_cut *cut,
                  const struct vrep_position *lanes, const char *label, uint16_t label_bytes,
                  uint64_t *seq);

/* cut.c */
/* Whether an answer has to wait for the end of a hold: then it is kept. */
bool vrep_cut_keeps(struct vrep_group *group, struct command *command);
void vrep_cut_poll(struct vrep_group *group);
int vrep_cut_timeout_ms(const struct vrep_group *group);

/* sync.c */
void vrep_sync_pump(struct vrep_group *group);
void vrep_sync_granted(struct command *command);
/* Marks unshipped what was written since the last good flush. */
void vrep_sync_since_flush(struct vrep_group *group);
void vrep_sync_init(struct vrep_group *group);
/* The range was marked unshipped for what was written past the filter: copies in flight may have
 * read what was there before, and do not clear it. */
void vrep_sync_mark(struct vrep_group *group, uint16_t disk, uint64_t offset, uint64_t length);
/* Clears what a copy covers. */
void vrep_sync_clear(struct vrep_group *group, const struct command *copy);
int vrep_sync_timeout_ms(const struct vrep_group *group);
/* A command of a VM that mirrors has to wait for a range: not for long. */
void vrep_sync_waited_for(struct vrep_group *group);
bool vrep_sync_all_zero(const struct iovec *iov, int count);
bool vrep_sync_target_attached(const struct vrep_group *group);

/* delta.c */
int vrep_delta_init(struct vrep_group *group);
void vrep_delta_destroy(struct vrep_group *group);
bool vrep_delta_on(const struct vrep_group *group);
/* Nothing that was answered counts any more. */
void vrep_delta_forget(struct vrep_group *group);
/* A record of this range is on its way to the target. */
void vrep_delta_touch(struct vrep_group *group, uint16_t disk, uint64_t offset, uint64_t length);
bool vrep_delta_full(const struct vrep_group *group);
/* Makes a window of the beginning of an unshipped run at the cursor, and moves it on. */
void vrep_delta_offer(struct vrep_group *group, uint64_t offset, uint64_t length);
/* The cursor is at the end of all disks: whether it may begin again now. */
bool vrep_delta_next_round(struct vrep_group *group);
/* The next range to copy out of a window that was answered. */
bool vrep_delta_ready(struct vrep_group *group, uint64_t *offset, uint64_t *length,
                      struct delta_window **out);
void vrep_delta_start(struct delta_window *window, struct command *copy);
/* It was read under its range: publishes what differs, clears unshipped. */
void vrep_delta_copied(struct vrep_group *group, struct command *copy);
void vrep_delta_ended(struct vrep_group *group, struct command *copy);

/* consumer.c */
void vrep_consumers_poll(struct vrep_group *group);
void vrep_consumers_notify(struct vrep_group *group);
void vrep_consumers_close(struct vrep_group *group);
/* NULL when seq is not in (released, head]. */
const struct vrep_ring_desc *vrep_group_desc(const struct vrep_group *group, uint64_t seq);

/* group.c */
/* True on the thread that polls; when no thread does this one takes the group, and is to disown it.
 */
bool vrep_group_take(struct vrep_group *group, bool *taken);
/* One turn of the loop: waits for work, then polls. */
void vrep_group_wait(struct vrep_group *group, int timeout_ms);

/* maintain.c */
void vrep_maintain_init(struct vrep_group *group);
void vrep_maintain(struct vrep_group *group);
void vrep_maintain_intent(struct vrep_group *group);
void vrep_maintain_state(struct vrep_group *group);
void vrep_maintain_checkpoint(struct vrep_group *group);
/* The same, and until it is stored vrep_group_status says marks_unstored. */
void vrep_maintain_keep(struct vrep_group *group);
void vrep_maintain_seal(struct vrep_group *group);
bool vrep_maintain_busy(const struct vrep_group *group);
int vrep_maintain_timeout_ms(const struct vrep_group *group);
void vrep_state_stamp(struct vrep_group *group);

/* handover.c */
/* Whether commands may start: tries to end a hand-over that waits for the VM. */
bool vrep_handover_over(struct vrep_group *group);
void vrep_handover_poll(struct vrep_group *group);
int vrep_handover_timeout_ms(const struct vrep_group *group);
/* A gap that only a copy of everything ends: a VM wrote the disks past the filter. */
int vrep_handover_distrust(struct vrep_group *group);
/* While the VM may write past the filter, what the backing holds is not what the order says. */
static inline bool vrep_handover_blind(const struct vrep_group *group)
{
    return group->handover != VREP_HANDOVER_NONE;
}

/* rest.c */
/* Every so often: whether the images of a VM that is off are still as they were. */
void vrep_rest_poll(struct vrep_group *group);
int vrep_rest_timeout_ms(const struct vrep_group *group);
void vrep_rest_destroy(struct vrep_group *group);

/* mirror.c */
/* What is read through another process is asked of who answers from now on; false: nothing is. */
bool vrep_mirror_read_elsewhere(struct vrep_group *group);
/* Writes may be missing from here on: a gap. */
void vrep_mirror_lost(struct vrep_group *group);
/* Whether nothing is missing of what a live mirror sends; when a connection closed, the gap has
 * begun. */
bool vrep_mirror_whole(struct vrep_group *group);
/* Whether what sync copies saw of writes under way has been sent since. */
bool vrep_mirror_settled(const struct vrep_group *group);
/* The last copy of which, and of all before it, nothing is under way any more: what a drain that
 * begins now comes after. */
uint64_t vrep_mirror_copied(const struct vrep_group *group);

/* past.c */
/* Whether a disk was written in this boot of the host, and the last filter was of another. */
bool vrep_past_since_boot(const struct vrep_group *group);

/* recover.c */
/* What a group is found as at open; file names, and what follows from the durable state. */
struct vrep_finding {
    enum vrep_opened how;
    uint32_t reason; /* VREP_UNVERIFIED_* */
    bool known;      /* a durable state was read */
    bool shared;     /* ring and map were attached */
    bool bypassed;   /* a pass-through served since the last filter */
    uint64_t first_seq;
    bool resized;    /* disks have, or are to get, another size than the state says, as planned */
    bool intent_was; /* ... and the write-intent may be of the sizes before */
    uint64_t disk_bytes[VREP_DISKS_MAX];
    uint64_t was_bytes[VREP_DISKS_MAX]; /* what the state says, when `resized` */
    char ring[PATH_MAX], map[PATH_MAX], intent[PATH_MAX], state[PATH_MAX], checkpoint[PATH_MAX];
};
/* Fills it and group->state, attaches ring and map; changes nothing durable. LOCKED, FENCED,
 * VERSION, INVALID, IO. */
int vrep_recover_find(struct vrep_group *group, struct vrep_finding *found);
/* The record at head tells which half of a gap's begin or end the dead process had done. */
void vrep_recover_settle_gap(struct vrep_group *group);
void vrep_recover_detach(struct vrep_group *group, struct vrep_finding *found);
/* Whether an entry of the in-flight table names a range of a disk. */
bool vrep_recover_slot_sane(const struct vrep_group *group, const struct vrep_ring_slot *slot);
int vrep_recover(struct vrep_group *group);
int vrep_backing_sync_io(struct vrep_group *group, uint32_t disk, struct vrep_io *io);
/* Whether a range reads zero, of which at most data_max bytes that are no holes are read. */
bool vrep_recover_reads_zero(struct vrep_group *group, uint16_t disk, uint64_t from, uint64_t to,
                             uint64_t data_max);

/* resize.c, in the order in which recover.c calls them */
/* Whether every size that is not what the state says is planned; then fills in what they were, and
 * are to be. */
bool vrep_resize_find(struct vrep_group *group, struct vrep_finding *found);
void vrep_resize_backing(struct vrep_group *group, struct vrep_finding *found);
int vrep_resize_map(struct vrep_group *group, const struct vrep_finding *found);
int vrep_resize_intent(struct vrep_group *group, const struct vrep_finding *found);
int vrep_resize_record(struct vrep_group *group, const struct vrep_finding *found);
/* Publishes the sizes that are due; false when there is no room for all. */
bool vrep_resize_publish(struct vrep_group *group);
void vrep_resize_all_due(struct vrep_group *group);

/* bypass.c */
int vrep_bypass_begin(struct vrep_group *group);
/* A sync failed: it outlives the pass-through. */
void vrep_bypass_flush_failed(struct vrep_group *group);

/* miss.c */
extern const struct vrep_filter_ops vrep_view_ops;
int vrep_miss_init(struct vrep_group *group);
void vrep_miss_destroy(struct vrep_group *group);
void vrep_miss_close(struct vrep_group *group);
void vrep_fill_granted(struct command *command);
/* Asks for an absent range that nobody waits for yet. */
void vrep_miss_prefetch(struct vrep_group *group, uint16_t disk, uint64_t offset, uint64_t length);

#endif
