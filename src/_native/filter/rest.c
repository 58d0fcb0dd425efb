/* Rest: the images of a VM that mirrors and is off are compared as they are (mirror.c, rule 5).
 *
 * No lock is taken, for the VM must be able to start at any time; so the images are looked at
 * several times a second, and the gap begins again when somebody has one open or has written it.
 * What a VM writes before that is seen is in no point; a point of that moment holds the images as
 * they were before it started.  A thread of its own looks: the group's loop never waits for an
 * image's storage, and when a look does not end in time it counts as one that found a VM. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "disk/look.h"
#include "filter/internal.h"

#define LOOK_MS 400             /* from the end of a look to the next */
#define LATE_NS (5 * NS_PER_S)  /* of one that has not ended nobody knows what it would find */
#define QUIET_NS (5 * NS_PER_S) /* what was written later has perhaps a VM without locks */
#define IMAGES_MAX 4096u

struct image {
    uint32_t disk;
    char *path;
    int fd;               /* -1: not open */
    struct vrep_look was; /* when it was last seen to change */
    uint64_t since_ns;    /* monotonic, of that; 0: not seen yet */
};

struct rest {
    struct vrep_worker *looker;
    struct vrep_job job;
    struct vrep_group *group;
    struct image *images;
    size_t count;
    bool begin, first; /* what the look is for: to begin, and to find out whether one could */
    int looked;        /* of the last that was no watch */
    uint64_t posted_ns, ended_ns, copied, losses, joins;
};

/* ---- on the looker --------------------------------------------------------------- */

static uint64_t clock_now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

static bool older(uint64_t stamp_ns, uint64_t wall_ns)
{
    return stamp_ns <= wall_ns && wall_ns - stamp_ns >= QUIET_NS;
}

/* Opened anew, for its path may name another file now. */
static int look_first(const struct rest *rest, struct image *image)
{
    struct vrep_look now;
    if (image->fd >= 0)
        close(image->fd);
    int status = vrep_look_open(image->path, &image->fd);
    if (status == VREP_OK)
        status = vrep_look_at(image->fd, &now);
    if (status == VREP_E_NOT_FOUND)
        return VREP_E_GONE;
    if (status != VREP_OK)
        return status;
    /* Facts of its opening, which nothing changes while a mirror is open. */
    const struct disk *disk = &rest->group->disks[image->disk];
    if (!vrep_disk_is_remote(disk->disk) &&
        (now.device != disk->info.device || now.inode != disk->info.inode ||
         now.bytes != disk->info.bytes))
        return VREP_E_GONE;
    uint64_t mono_ns = clock_now(CLOCK_MONOTONIC), wall_ns = clock_now(CLOCK_REALTIME);
    if (image->since_ns == 0 || !vrep_look_same(&image->was, &now)) {
        image->was = now;
        image->since_ns = mono_ns;
    }
    bool quiet =
        mono_ns - image->since_ns >= QUIET_NS ||
        (!now.block_device && older(now.mtime_ns, wall_ns) && older(now.ctime_ns, wall_ns));
    if (now.block_device && quiet)
        vrep_look_afresh(image->fd);
    return quiet ? VREP_OK : VREP_E_AGAIN;
}

static int look_on(const struct image *image)
{
    struct vrep_look now;
    int status = vrep_look_at(image->fd, &now);
    if (status == VREP_OK && !vrep_look_same(&image->was, &now))
        status = VREP_E_AGAIN;
    return status;
}

/* Each of them is looked at: how long one was quiet is known for all. */
static int run(struct vrep_job *job)
{
    struct rest *rest = job->owner;
    int status = VREP_OK;
    for (size_t i = 0; i < rest->count; i++) {
        int one = rest->first ? look_first(rest, &rest->images[i]) : look_on(&rest->images[i]);
        /* That an image was written says less than what is wrong with another. */
        if (one != VREP_OK && (status == VREP_OK || status == VREP_E_AGAIN))
            status = one;
    }
    return status;
}

/* ---- on the group's thread -------------------------------------------------------- */

static int enter(struct vrep_group *group)
{
    int status = vrep_handover_distrust(group);
    if (status != VREP_OK)
        return status;
    (void)vrep_mirror_read_elsewhere(group);
    group->mirror.rests = true;
    group->handover = VREP_HANDOVER_NONE;
    group->resync_again = true;
    VREP_INFO("filter", "a VM that mirrors is off: its disks are compared");
    return VREP_OK;
}

static void done(struct vrep_job *job)
{
    struct rest *rest = job->owner;
    struct vrep_group *group = rest->group;
    rest->ended_ns = group->now_ns;
    /* A connection that came, or a rest that ended, says more than a look that began before. */
    bool stale = rest->losses != group->mirror.losses || rest->joins != group->mirror.joins;
    if (rest->first) {
        rest->looked = job->status == VREP_OK && stale ? VREP_E_AGAIN : job->status;
        if (rest->looked == VREP_OK && rest->begin)
            rest->looked = group->closing ? VREP_E_BUSY : enter(group);
        return;
    }
    if (stale || !group->mirror.rests)
        return;
    if (job->status != VREP_OK) {
        vrep_mirror_lost(group);
        return;
    }
    group->mirror.looks++;
    if (group->mirror.barrier != rest->copied)
        group->resync_again = true; /* perhaps the gap ends */
    group->mirror.barrier = rest->copied;
}

static void post(struct vrep_group *group, bool first)
{
    struct rest *rest = group->mirror.rest;
    rest->first = first;
    rest->posted_ns = group->now_ns;
    rest->copied = vrep_mirror_copied(group); /* those read their images before this look */
    rest->losses = group->mirror.losses;
    rest->joins = group->mirror.joins;
    vrep_worker_post(rest->looker, &rest->job);
}

void vrep_rest_poll(struct vrep_group *group)
{
    struct rest *rest = group->mirror.rest;
    if (rest == NULL)
        return;
    (void)vrep_worker_collect(rest->looker);
    if (!group->mirror.rests || group->closing)
        return;
    if (!rest->job.busy) {
        if (group->now_ns >= rest->ended_ns + LOOK_MS * NS_PER_MS)
            post(group, false);
    } else if (group->now_ns >= rest->posted_ns + LATE_NS) {
        VREP_WARN("filter", "the images of a VM that is off do not answer");
        vrep_mirror_lost(group);
    }
}

int vrep_rest_timeout_ms(const struct vrep_group *group)
{
    return group->mirror.rests ? LOOK_MS : -1;
}

static void forget(struct rest *rest)
{
    for (size_t i = 0; i < rest->count; i++) {
        if (rest->images[i].fd >= 0)
            close(rest->images[i].fd);
        free(rest->images[i].path);
    }
    free(rest->images);
    rest->images = NULL;
    rest->count = 0;
}

static bool same_images(const struct rest *rest, const struct vrep_rest_image *images, size_t count)
{
    bool same = rest->count == count;
    for (size_t i = 0; same && i < count; i++)
        same = rest->images[i].disk == images[i].disk &&
               strcmp(rest->images[i].path, images[i].path) == 0;
    return same;
}

/* How long others were quiet is not known. */
static int take(struct rest *rest, const struct vrep_rest_image *images, size_t count)
{
    if (same_images(rest, images, count))
        return VREP_OK;
    forget(rest);
    rest->images = calloc(count, sizeof *rest->images);
    if (rest->images == NULL)
        return VREP_E_NOMEM;
    for (size_t i = 0; i < count; i++) {
        rest->images[i] = (struct image){.disk = images[i].disk, .fd = -1};
        rest->images[i].path = strdup(images[i].path);
        rest->count = i + 1;
        if (rest->images[i].path == NULL) {
            forget(rest);
            return VREP_E_NOMEM;
        }
    }
    return VREP_OK;
}

static int create(struct vrep_group *group)
{
    struct rest *rest = calloc(1, sizeof *rest);
    if (rest == NULL)
        return VREP_E_NOMEM;
    int status = vrep_worker_create(group->notify_fd, &rest->looker);
    if (status != VREP_OK) {
        free(rest);
        return status;
    }
    rest->group = group;
    rest->job = (struct vrep_job){.run = run, .done = done, .owner = rest};
    rest->looked = VREP_E_AGAIN;
    group->mirror.rest = rest;
    return VREP_OK;
}

void vrep_rest_destroy(struct vrep_group *group)
{
    struct rest *rest = group->mirror.rest;
    if (rest == NULL)
        return;
    vrep_worker_destroy(rest->looker);
    forget(rest);
    free(rest);
    group->mirror.rest = NULL;
}

static bool every_disk_has_one(const struct vrep_group *group, const struct vrep_rest_image *images,
                               size_t count)
{
    for (uint32_t disk = 0; disk < group->disks_count; disk++) {
        bool has = false;
        for (size_t i = 0; i < count; i++)
            has = has || images[i].disk == disk;
        if (!has)
            return false;
    }
    return true;
}

int vrep_group_mirror_rest(struct vrep_group *group, const struct vrep_rest_image *images,
                           size_t count, bool begin)
{
    if (!group->mirror.on || vrep_group_stepped(group) || count > IMAGES_MAX ||
        !every_disk_has_one(group, images, count))
        return VREP_E_INVALID;
    for (size_t i = 0; i < count; i++)
        if (images[i].disk >= group->disks_count)
            return VREP_E_INVALID;
    if (group->handover == VREP_HANDOVER_NONE || group->mirror.clients_count > 0 || group->closing)
        return VREP_E_BUSY;
    int status = group->mirror.rest == NULL ? create(group) : VREP_OK;
    if (status != VREP_OK)
        return status;
    struct rest *rest = group->mirror.rest;
    if (rest->job.busy)
        return VREP_E_BUSY;
    status = take(rest, images, count);
    if (status != VREP_OK)
        return status;
    rest->begin = begin;
    post(group, true);
    return VREP_OK;
}

int vrep_group_mirror_looked(const struct vrep_group *group)
{
    const struct rest *rest = group->mirror.rest;
    if (rest == NULL)
        return VREP_E_INVALID;
    return rest->job.busy && rest->first ? VREP_E_BUSY : rest->looked;
}
