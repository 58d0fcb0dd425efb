/* Consumer: those who follow the ring: what they report, what that releases,
 * and how they are woken. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "base/log.h"
#include "filter/fault.h"
#include "filter/internal.h"

/* Only what is durable clears bits (invariant 2). */
static void take_durable(struct vrep_group *group, uint64_t durable)
{
    if (durable <= group->durable)
        return;
    group->durable = durable;
    group->state.durable_seq = durable;
    vrep_ring_set_durable(group->ring, durable);
    vrep_map_acknowledge(group->map, durable);
    vrep_map_clear(group->map, durable);
    vrep_fault("consumer.after_clear");
}

static void release(struct vrep_group *group, uint64_t safe)
{
    if (safe <= vrep_ring_released(group->ring))
        return;
    vrep_ring_release(group->ring, safe);
    vrep_fault("consumer.after_release");
    group->freed = group->freed || group->wanted;
}

void vrep_consumers_poll(struct vrep_group *group)
{
    uint64_t durable = UINT64_MAX, safe = UINT64_MAX;
    for (uint32_t i = 0; i < group->consumers_count; i++) {
        struct vrep_ring_consumer *consumer = &group->consumers[i];
        if (vrep_ring_consumer_poll(group->ring, consumer) != VREP_OK) {
            if (!group->liar)
                VREP_WARN("filter",
                          "a consumer reports positions that cannot be: they are ignored");
            group->liar = true;
        }
        if (consumer->role != VREP_CONTROL_TARGET)
            continue;
        group->received = consumer->received;
        group->read = consumer->read;
        uint64_t kept =
            consumer->spilled > consumer->durable ? consumer->spilled : consumer->durable;
        if (consumer->durable < durable)
            durable = consumer->durable;
        if (kept < safe)
            safe = kept;
    }
    if (durable != UINT64_MAX) {
        take_durable(group, durable);
        release(group, safe);
    }
}

void vrep_consumers_notify(struct vrep_group *group)
{
    uint64_t head = vrep_ring_head(group->ring);
    if (head == group->notified)
        return;
    group->notified = head;
    for (uint32_t i = 0; i < group->consumers_count; i++)
        vrep_ring_consumer_notify(group->ring, &group->consumers[i]);
}

static void drop(struct vrep_group *group, uint32_t index)
{
    /* The consumer may keep its copy open, and with it a place in epoll. */
    (void)epoll_ctl(group->epoll_fd, EPOLL_CTL_DEL, group->consumers[index].space_fd, NULL);
    vrep_ring_consumer_close(&group->consumers[index]);
    group->consumers[index] = group->consumers[--group->consumers_count];
}

void vrep_consumers_close(struct vrep_group *group)
{
    while (group->consumers_count > 0)
        drop(group, 0);
}

int vrep_group_consumer_detach(struct vrep_group *group, uint32_t role)
{
    for (uint32_t i = 0; i < group->consumers_count; i++) {
        if (group->consumers[i].role == role) {
            if (role == VREP_CONTROL_TARGET) {
                vrep_consumers_poll(group); /* its last word */
                vrep_group_delta_end(group);
            }
            drop(group, i);
            return VREP_OK;
        }
    }
    return VREP_E_NOT_FOUND;
}

static const struct vrep_ring_desc *desc_at(const struct vrep_group *group, uint64_t seq)
{
    const struct vrep_ring_header *header = vrep_ring_header(group->ring);
    const void *descs = (const uint8_t *)header + header->descs_at;
    return (const struct vrep_ring_desc *)descs + (seq & (header->descriptors - 1));
}

const struct vrep_ring_desc *vrep_group_desc(const struct vrep_group *group, uint64_t seq)
{
    return seq > vrep_ring_released(group->ring) && seq <= vrep_ring_head(group->ring)
               ? desc_at(group, seq)
               : NULL;
}

/* A target that is behind what was acknowledged can go on only where its seq may jump.  What was
 * released above that lies in the source's spill. */
static int check_position(const struct vrep_group *group, uint64_t durable)
{
    uint64_t released = vrep_ring_released(group->ring);
    if (durable > vrep_ring_head(group->ring))
        return VREP_E_INVALID;
    if (durable >= group->durable)
        return VREP_OK;
    const struct vrep_ring_desc *first = vrep_group_desc(group, released + 1);
    bool jump = first != NULL && first->kind == VREP_KIND_GAP_BEGIN &&
                (first->flags & VREP_RECORD_JUMP) != 0;
    return jump ? VREP_OK : VREP_E_GONE;
}

int vrep_group_consumer_attach(struct vrep_group *group, uint32_t role, const uint8_t target_id[16],
                               uint64_t durable, int fds[3])
{
    if (!group->tap)
        return VREP_E_UNSUPPORTED;
    uint64_t released = vrep_ring_released(group->ring);
    if (role == VREP_CONTROL_TARGET) {
        if (target_id == NULL || memcmp(target_id, group->config.target_id, 16) != 0)
            return VREP_E_INVALID;
        int status = check_position(group, durable);
        if (status != VREP_OK)
            return status;
        /* The appliance that was here died; its successor speaks for the same target. */
        vrep_group_consumer_detach(group, role);
        released = vrep_ring_released(group->ring);
        group->lose_wanted = false; /* it was wanted by the one before, who may not ask again */
    } else if (durable > vrep_ring_head(group->ring)) {
        return VREP_E_INVALID;
    }
    if (group->consumers_count == CONSUMERS)
        return VREP_E_FULL;
    struct vrep_ring_consumer *consumer = &group->consumers[group->consumers_count];
    /* An observer follows the ring; a target goes on from what is durable. */
    uint64_t held = role == VREP_CONTROL_TARGET ? group->durable : released;
    int status = vrep_ring_consumer_create(role, target_id, durable > held ? durable : held,
                                           durable > released ? durable : released, consumer);
    if (status != VREP_OK)
        return status;
    struct epoll_event event = {.events = EPOLLIN | EPOLLET};
    if (epoll_ctl(group->epoll_fd, EPOLL_CTL_ADD, consumer->space_fd, &event) != 0)
        goto fail;
    int from[3] = {consumer->control_fd, consumer->peer_fd, consumer->space_fd};
    for (int i = 0; i < 3; i++) {
        fds[i] = fcntl(from[i], F_DUPFD_CLOEXEC, 3);
        if (fds[i] < 0) {
            int error = errno;
            while (i-- > 0)
                close(fds[i]);
            errno = error;
            goto fail;
        }
    }
    close(consumer->peer_fd); /* when the consumer is gone, so is its end */
    consumer->peer_fd = -1;
    group->consumers_count++;
    group->liar = false;
    vrep_consumers_poll(group);
    return VREP_OK;
fail:
    status = vrep_status_from_errno(errno);
    vrep_ring_consumer_close(consumer);
    return status;
}
