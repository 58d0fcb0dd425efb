#include "filter/group.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/log.h"
#include "filter/fault.h"
#include "filter/internal.h"

#define PRIVATE_BYTES_DEFAULT (UINT64_C(64) << 20)
#define CHECKPOINT_NS_DEFAULT (5 * NS_PER_S)
#define EVENTS 16

/* ---- open -------------------------------------------------------------------- */

static int check_config(const struct vrep_group_config *config)
{
    if (config->disks_count == 0 || config->disks_count > VREP_DISKS_MAX || config->slots == 0 ||
        config->slots > UINT16_MAX - SLOTS_OWN || config->threads == 0)
        return VREP_E_INVALID;
    for (uint32_t i = 0; i < config->disks_count; i++)
        if (config->disks[i].name == NULL || config->disks[i].uri == NULL ||
            strlen(config->disks[i].name) >= VREP_NAME_BYTES)
            return VREP_E_INVALID;
    if ((config->flags & VREP_GROUP_MIRROR) != 0 &&
        (config->flags & (VREP_GROUP_TAP | VREP_GROUP_HANDOVER | VREP_GROUP_BYPASS)) !=
            VREP_GROUP_TAP)
        return VREP_E_INVALID;
    if ((config->flags & VREP_GROUP_BYPASS) != 0)
        return config->state_dir == NULL ||
                       (config->flags & (VREP_GROUP_TAP | VREP_GROUP_READ_ONLY)) != 0
                   ? VREP_E_INVALID
                   : VREP_OK;
    if ((config->flags & VREP_GROUP_TAP) == 0)
        return (config->flags & VREP_GROUP_HANDOVER) == 0 ? VREP_OK : VREP_E_INVALID;
    uint32_t bit = config->bit_bytes;
    if (config->shm_dir == NULL || config->state_dir == NULL || bit < VREP_CHUNK_BYTES ||
        (bit & (bit - 1)) != 0 || bit > COPY_BYTES_MAX ||
        (config->flags & VREP_GROUP_READ_ONLY) != 0)
        return VREP_E_INVALID;
    /* One copy and the group's own records must fit beside the half that the guest may always use.
     */
    if (config->ring_bytes < UINT64_C(4) * COPY_BYTES_MAX ||
        config->ring_descriptors < 4 * SLOTS_OWN)
        return VREP_E_INVALID;
    return VREP_OK;
}

static int open_disk(struct vrep_group *group, uint32_t index, const struct vrep_group_disk *from)
{
    struct disk *disk = &group->disks[index];
    memcpy(disk->name, from->name, strlen(from->name) + 1);
    int status;
    if (strncmp(from->uri, "view:", 5) == 0) {
        status = vrep_overlay_open(group->engine, from->uri + 5, from->onto, group->config.group_id,
                                   from->bytes, VIEW_BLOCK_BYTES, &disk->disk);
    } else if (group->mirror.on && strncmp(from->uri, "nbd:", 4) == 0) {
        status = vrep_remote_open(group->engine, from->uri + 4, from->bytes, &disk->disk);
    } else {
        uint32_t flags = (group->config.flags & VREP_GROUP_DIRECT) != 0 ? VREP_DISK_DIRECT : 0;
        if ((group->config.flags & VREP_GROUP_READ_ONLY) != 0)
            flags |= VREP_DISK_READ_ONLY;
        if (group->handover == VREP_HANDOVER_IN)
            flags |= VREP_DISK_HANDOVER;
        if (group->mirror.on)
            flags |= VREP_DISK_READ_ONLY | VREP_DISK_NO_LOCK;
        status = vrep_disk_open(group->engine, from->uri, flags, &disk->disk);
    }
    if (status != VREP_OK) {
        disk->disk = NULL;
        VREP_ERROR("filter", "disk %s at %s: %s", from->name, from->uri, vrep_status_text(status));
        return status;
    }
    disk->overlay = vrep_disk_is_overlay(disk->disk);
    disk->planned_was = from->was;
    group->disks_count++;
    return vrep_disk_info(disk->disk, &disk->info);
}

static int watch(struct vrep_group *group, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events};
    return epoll_ctl(group->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0
               ? VREP_OK
               : vrep_status_from_errno(errno);
}

/* Edge-triggered: each write is seen once and nobody has to read the counters. */
static int open_loop(struct vrep_group *group)
{
    group->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    group->mail_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    group->notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (group->epoll_fd < 0 || group->mail_fd < 0 || group->notify_fd < 0)
        return vrep_status_from_errno(errno);
    int status = watch(group, group->mail_fd, EPOLLIN | EPOLLET);
    if (status == VREP_OK)
        status = watch(group, group->notify_fd, EPOLLIN | EPOLLET);
    if (status == VREP_OK)
        status = watch(group, vrep_engine_fd(group->engine), EPOLLIN);
    return status;
}

static void tear_down(struct vrep_group *group, bool clean)
{
    /* Kernel I/O ends first: the lock on a disk is released only after the last byte reached it. */
    vrep_worker_destroy(group->quick);
    vrep_worker_destroy(group->slow);
    vrep_worker_destroy(group->prober);
    vrep_rest_destroy(group);
    vrep_engine_destroy(group->engine);
    for (uint32_t i = 0; i < group->disks_count; i++) {
        if (group->disks[i].disk != NULL)
            vrep_disk_close(group->disks[i].disk);
        vrep_since_destroy(group->disks[i].since);
    }
    vrep_consumers_close(group);
    if (group->checkpoint != NULL)
        vrep_checkpoint_close(group->checkpoint);
    if (group->intent != NULL)
        vrep_intent_close(group->intent);
    if (group->map != NULL)
        vrep_map_detach(group->map);
    if (group->ring != NULL)
        vrep_ring_detach(group->ring, clean);
    vrep_state_close(&group->state_file);
    if (group->overlap != NULL)
        vrep_overlap_destroy(group->overlap);
    vrep_pool_destroy(group);
    vrep_miss_destroy(group);
    vrep_delta_destroy(group);
    free(group->cool_io);
    int fds[] = {group->epoll_fd, group->mail_fd, group->notify_fd};
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    pthread_cond_destroy(&group->mail_wake);
    pthread_mutex_destroy(&group->mail_lock);
    free(group);
}

static int create_worker(struct vrep_group *group, struct vrep_worker **out)
{
    return vrep_group_stepped(group) ? vrep_worker_create_stepped(out)
                                     : vrep_worker_create(group->notify_fd, out);
}

static int open_all(struct vrep_group *group)
{
    const struct vrep_group_config *config = &group->config;
    bool stepped = vrep_group_stepped(group);
    int status = stepped ? vrep_engine_create_stepped(&group->engine)
                         : vrep_engine_create(config->threads, &group->engine);
    for (uint32_t i = 0; status == VREP_OK && i < config->disks_count; i++)
        status = open_disk(group, i, &config->disks[i]);
    if (status == VREP_OK)
        status = open_loop(group);
    if (status == VREP_OK)
        status = create_worker(group, &group->quick);
    if (status == VREP_OK)
        status = create_worker(group, &group->slow);
    if (status == VREP_OK)
        status = create_worker(group, &group->prober);
    if (status == VREP_OK)
        status = vrep_pool_create(group);
    if (status == VREP_OK)
        status = vrep_overlap_create(group->commands_count, &group->overlap);
    group->cool_io = calloc(group->disks_count + 1, sizeof *group->cool_io);
    if (status == VREP_OK && group->cool_io == NULL)
        status = VREP_E_NOMEM;
    /* A disk that nobody has open has nobody to hand it over; that of another VM, perhaps. */
    for (uint32_t i = 0;
         group->handover == VREP_HANDOVER_IN && status == VREP_OK && i < group->disks_count; i++) {
        status = vrep_disk_lock(group->disks[i].disk);
        status = status == VREP_OK ? VREP_E_GONE : status == VREP_E_LOCKED ? VREP_OK : status;
    }
    if (status != VREP_OK)
        return status;
    vrep_chain_build(group);
    group->now_ns = vrep_clock_ns(group, CLOCK_MONOTONIC);
    group->resync_filled_ns = group->now_ns;
    if ((config->flags & VREP_GROUP_BYPASS) != 0)
        return vrep_bypass_begin(group);
    if (!group->tap)
        return VREP_OK;
    status = vrep_delta_init(group);
    if (status == VREP_OK)
        status = vrep_recover(group);
    if (status == VREP_OK)
        status = vrep_pool_limit(group, vrep_ring_slots(group->ring));
    if (status == VREP_OK) {
        vrep_maintain_init(group);
        vrep_sync_init(group);
    }
    return status;
}

int vrep_group_open(const struct vrep_group_config *config, struct vrep_group **out)
{
    int status = check_config(config);
    if (status != VREP_OK)
        return status;
    struct vrep_group *group = calloc(1, sizeof *group);
    if (group == NULL)
        return VREP_E_NOMEM;
    group->config = *config;
    group->tap = (config->flags & VREP_GROUP_TAP) != 0;
    if ((config->flags & VREP_GROUP_HANDOVER) != 0)
        group->handover = VREP_HANDOVER_IN;
    if ((config->flags & VREP_GROUP_MIRROR) != 0) {
        group->mirror.on = true;
        group->mirror.copies = 1; /* those of an earlier run may have seen a part of a write, too */
        group->handover = VREP_HANDOVER_MIRROR;
    }
    if (group->config.private_bytes < VREP_WRITE_BYTES_MAX)
        group->config.private_bytes =
            config->private_bytes == 0 ? PRIVATE_BYTES_DEFAULT : VREP_WRITE_BYTES_MAX;
    if (group->config.checkpoint_ns == 0)
        group->config.checkpoint_ns = CHECKPOINT_NS_DEFAULT;
    group->resync_rate = config->resync_bytes_per_s;
    group->epoll_fd = group->mail_fd = group->notify_fd = -1;
    group->state_file.fd = -1;
    group->mail_last = &group->mail_first;
    list_init(&group->pool);
    list_init(&group->ready);
    list_init(&group->cold);
    list_init(&group->cut.waiting);
    pthread_mutex_init(&group->mail_lock, NULL);
    pthread_cond_init(&group->mail_wake, NULL);
    status = vrep_miss_init(group);
    if (status == VREP_OK)
        status = open_all(group);
    /* What they point to belongs to the caller and ends now. */
    group->config.disks = NULL;
    group->config.shm_dir = group->config.state_dir = NULL;
    if (status != VREP_OK) {
        group->abandoned = true;
        tear_down(group, false);
        return status;
    }
    *out = group;
    return VREP_OK;
}

/* ---- the loop ------------------------------------------------------------------- */

static void own(struct vrep_group *group)
{
    pthread_t self = pthread_self();
    if (group->owned && pthread_equal(group->owner, self))
        return;
    pthread_mutex_lock(&group->mail_lock);
    group->owner = self;
    group->owned = true;
    pthread_mutex_unlock(&group->mail_lock);
}

static void run_mail(struct vrep_group *group)
{
    if (vrep_load_acquire_u32(&group->mail_pending) == 0)
        return;
    pthread_mutex_lock(&group->mail_lock);
    struct call *call = group->mail_first;
    group->mail_first = NULL;
    group->mail_last = &group->mail_first;
    vrep_store_release_u32(&group->mail_pending, 0);
    pthread_mutex_unlock(&group->mail_lock);
    while (call != NULL) {
        struct call *next = call->next; /* the caller's stack: gone once finished is seen */
        int status = call->fn(group, call->argument);
        pthread_mutex_lock(&group->mail_lock);
        call->status = status;
        call->finished = true;
        pthread_cond_broadcast(&group->mail_wake);
        pthread_mutex_unlock(&group->mail_lock);
        call = next;
    }
}

static void give_wakeup(struct vrep_group *group)
{
    if (!group->freed)
        return;
    group->freed = false;
    group->wanted = false;
    if (group->wakeup != NULL)
        group->wakeup(group->wakeup_context);
}

void vrep_group_poll(struct vrep_group *group)
{
    own(group);
    struct epoll_event events[EVENTS];
    while (epoll_wait(group->epoll_fd, events, EVENTS, 0) < 0 && errno == EINTR)
        continue;
    group->now_ns = vrep_clock_ns(group, CLOCK_MONOTONIC);
    vrep_engine_reap(group->engine);
    vrep_worker_collect(group->quick);
    vrep_worker_collect(group->slow);
    vrep_worker_collect(group->prober);
    vrep_cut_poll(group); /* before the mail: a release that comes late finds the cut void */
    run_mail(group);
    if (group->tap) {
        vrep_consumers_poll(group);
        vrep_maintain(group);
        vrep_handover_poll(group);
        vrep_sync_pump(group);
        vrep_consumers_notify(group);
    }
    vrep_tap_drain(group);
    give_wakeup(group);
}

int vrep_group_timeout_ms(const struct vrep_group *group)
{
    if (group->freed)
        return 0;
    if (!group->tap)
        return -1;
    int timers = vrep_maintain_timeout_ms(group), sync = vrep_sync_timeout_ms(group);
    int handover = vrep_handover_timeout_ms(group);
    if (handover >= 0 && handover < timers)
        timers = handover;
    int cut = vrep_cut_timeout_ms(group);
    if (cut >= 0 && cut < timers)
        timers = cut;
    return sync >= 0 && sync < timers ? sync : timers;
}

void vrep_group_wait(struct vrep_group *group, int timeout_ms)
{
    int timers = vrep_group_timeout_ms(group);
    if (timers >= 0 && (timeout_ms < 0 || timers < timeout_ms))
        timeout_ms = timers;
    if (vrep_group_stepped(group)) {
        vrep_group_step_all(group);
        timeout_ms = 0;
    }
    struct epoll_event events[EVENTS];
    /* An edge that is consumed here is looked at by poll anyway, whatever woke it. */
    while (epoll_wait(group->epoll_fd, events, EVENTS, timeout_ms) < 0 && errno == EINTR)
        continue;
    vrep_group_poll(group);
}

int vrep_group_fd(const struct vrep_group *group)
{
    return group->epoll_fd;
}

void vrep_group_flush_wakeups(struct vrep_group *group)
{
    if (group->tap) {
        vrep_consumers_poll(group);
        vrep_consumers_notify(group);
    }
    give_wakeup(group);
}

void vrep_group_set_wakeup(struct vrep_group *group, void (*wakeup)(void *context), void *context)
{
    group->wakeup = wakeup;
    group->wakeup_context = context;
}

/* ---- calls from other threads ------------------------------------------------------ */

int vrep_group_call(struct vrep_group *group, int (*fn)(struct vrep_group *group, void *argument),
                    void *argument)
{
    struct call call = {.fn = fn, .argument = argument};
    pthread_mutex_lock(&group->mail_lock);
    if (group->closing) {
        pthread_mutex_unlock(&group->mail_lock);
        return VREP_E_GONE;
    }
    if (!group->owned) { /* no loop runs: the lock keeps one from starting meanwhile */
        int status = fn(group, argument);
        pthread_mutex_unlock(&group->mail_lock);
        return status;
    }
    if (pthread_equal(group->owner, pthread_self())) {
        pthread_mutex_unlock(&group->mail_lock);
        return fn(group, argument);
    }
    *group->mail_last = &call;
    group->mail_last = &call.next;
    vrep_store_release_u32(&group->mail_pending, 1);
    uint64_t one = 1;
    /* The counter is never near its end, and the flag is what the loop reads. */
    ssize_t written = write(group->mail_fd, &one, sizeof one);
    (void)written;
    while (!call.finished)
        pthread_cond_wait(&group->mail_wake, &group->mail_lock);
    pthread_mutex_unlock(&group->mail_lock);
    return call.status;
}

bool vrep_group_take(struct vrep_group *group, bool *taken)
{
    pthread_mutex_lock(&group->mail_lock);
    *taken = !group->owned;
    if (*taken) {
        group->owner = pthread_self();
        group->owned = true;
    }
    bool mine = pthread_equal(group->owner, pthread_self());
    pthread_mutex_unlock(&group->mail_lock);
    return mine;
}

/* No call is left behind: who lets go of the group may be followed by another at once. */
void vrep_group_disown(struct vrep_group *group)
{
    bool left;
    do {
        run_mail(group);
        pthread_mutex_lock(&group->mail_lock);
        left = group->mail_first != NULL;
        group->owned = left;
        pthread_mutex_unlock(&group->mail_lock);
    } while (left);
}

void vrep_group_attend(struct vrep_group *group)
{
    bool taken;
    vrep_group_take(group, &taken);
    if (!taken)
        return;
    vrep_group_poll(group);
    vrep_group_disown(group);
}

/* ---- close -------------------------------------------------------------------------- */

static void fail_mail(struct vrep_group *group)
{
    pthread_mutex_lock(&group->mail_lock);
    group->closing = true;
    for (struct call *call = group->mail_first; call != NULL;) {
        struct call *next = call->next;
        call->status = VREP_E_GONE;
        call->finished = true;
        call = next;
    }
    group->mail_first = NULL;
    group->mail_last = &group->mail_first;
    pthread_cond_broadcast(&group->mail_wake);
    pthread_mutex_unlock(&group->mail_lock);
}

static void drain(struct vrep_group *group)
{
    while (group->inflight > 0 || group->copies_inflight > 0 || group->fills_inflight > 0 ||
           (group->tap && vrep_maintain_busy(group)))
        vrep_group_wait(group, 100);
}

static bool flush_all(struct vrep_group *group)
{
    bool good = !group->flush_failed;
    for (uint32_t i = 0; i < group->disks_count; i++) {
        if ((group->config.flags & VREP_GROUP_READ_ONLY) != 0 || group->disks[i].info.read_only)
            continue;
        struct vrep_io io = {.op = VREP_IO_FLUSH};
        if (vrep_backing_sync_io(group, i, &io) != VREP_OK)
            good = false;
    }
    return good;
}

/* Everything that the next open needs to go on without a gap; false leaves the state open, and the
 * next open finds out by itself. */
static bool store_clean(struct vrep_group *group)
{
    vrep_consumers_poll(group);
    vrep_maintain_seal(group);
    vrep_intent_cool_begin(group->intent);
    if (!flush_all(group))
        return false;
    if (vrep_checkpoint_write(group->checkpoint, vrep_ring_head(group->ring), true) != VREP_OK)
        return false;
    vrep_intent_cool_end(group->intent, true);
    vrep_intent_prepare(group->intent);
    int status = vrep_intent_write(group->intent);
    vrep_intent_commit(group->intent, status);
    if (status != VREP_OK)
        return false;
    for (uint32_t i = 0; i < group->disks_count; i++)
        if (vrep_disk_refresh(group->disks[i].disk) != VREP_OK ||
            vrep_disk_info(group->disks[i].disk, &group->disks[i].info) != VREP_OK)
            return false;
    vrep_state_stamp(group);
    group->state.flags &= ~VREP_STATE_OPEN;
    group->state.seq_limit = vrep_ring_head(group->ring);
    return vrep_state_write(&group->state_file, &group->state) == VREP_OK;
}

void vrep_group_close(struct vrep_group *group, bool clean)
{
    fail_mail(group);
    vrep_miss_close(group);
    drain(group);
    bool stored = clean && group->tap && store_clean(group);
    if (clean && !group->tap && !flush_all(group))
        VREP_ERROR("filter", "the last flush of a disk failed");
    if (clean && group->tap && !stored)
        VREP_ERROR("filter",
                   "the group could not be closed cleanly: the next start resyncs what is dirty");
    if (stored && group->gap_slot != NULL) {
        vrep_ring_cancel(group->ring, group->gap_slot);
        group->gap_slot = NULL;
    }
    group->abandoned = true;
    tear_down(group, stored);
}

void vrep_group_abandon(struct vrep_group *group)
{
    fail_mail(group);
    group->abandoned = true;
    vrep_engine_forget(group->engine);
    tear_down(group, false);
}
