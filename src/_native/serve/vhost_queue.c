#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/endian.h"
#include "base/log.h"
#include "base/status.h"
#include "serve/vhost_internal.h"

/* Offsets within the rings: virtio 1.2, 2.7.6 and 2.7.8. */
#define RING_FLAGS 0u
#define RING_INDEX 2u
#define RING_ENTRIES 4u
#define USED_ENTRY 8u

static uint16_t load_index(const uint8_t *at)
{
    return le16toh(vrep_load_acquire_u16((const uint16_t *)(const void *)at));
}

static bool has(const struct vhost_queue *queue, int feature)
{
    return (queue->connection->features >> feature & 1) != 0;
}

/* ---- start and stop -------------------------------------------------------------- */

int vhost_queue_remap(struct vhost_queue *queue, struct vhost_memory *memory)
{
    uint8_t *descriptors = vhost_user(memory, queue->address_descriptors,
                                      queue->size * sizeof(struct vrep_vring_descriptor));
    uint8_t *available =
        vhost_user(memory, queue->address_available, VREP_VRING_AVAILABLE_BYTES(queue->size));
    uint8_t *used = vhost_user(memory, queue->address_used, VREP_VRING_USED_BYTES(queue->size));
    if (descriptors == NULL || available == NULL || used == NULL)
        return VREP_E_RANGE;
    if ((uintptr_t)descriptors % 16 != 0 || (uintptr_t)available % 2 != 0 ||
        (uintptr_t)used % 4 != 0)
        return VREP_E_PROTOCOL;
    queue->descriptors = (struct vrep_vring_descriptor *)(void *)descriptors;
    queue->available = available;
    queue->used = used;
    vhost_memory_hold(memory);
    vhost_memory_let(queue->memory);
    queue->memory = memory;
    return VREP_OK;
}

static int by_counter(const void *a, const void *b, void *context)
{
    const struct vrep_vhost_inflight_entry *entry = context;
    uint64_t one = entry[*(const uint16_t *)a].counter, other = entry[*(const uint16_t *)b].counter;
    return one < other ? -1 : one > other;
}

/* What the process that served before left in the in-flight region: vhost-user.rst, "Inflight I/O
 * tracking". */
static int take_over(struct vhost_queue *queue)
{
    struct vrep_vhost_inflight_queue *kept = queue->kept;
    if (kept->version == 0) { /* a new region: all zero */
        kept->version = VREP_VHOST_INFLIGHT_VERSION;
        kept->size = (uint16_t)queue->size;
        kept->used_index = queue->published;
        return VREP_OK;
    }
    if (kept->version != VREP_VHOST_INFLIGHT_VERSION || kept->size != queue->size)
        return VREP_E_VERSION;
    uint16_t batch = (uint16_t)(queue->published - kept->used_index);
    if (batch > queue->size)
        return VREP_E_CORRUPT;
    /* Shown to the guest, and not noted any more. */
    for (uint16_t head = kept->last_batch_head; batch > 0; batch--) {
        if (head >= queue->size)
            return VREP_E_CORRUPT;
        kept->entry[head].inflight = 0;
        head = kept->entry[head].next;
    }
    kept->used_index = queue->published;
    for (uint16_t head = 0; head < queue->size; head++)
        if (kept->entry[head].inflight) {
            queue->resubmit[queue->resubmit_count++] = head;
            if (kept->entry[head].counter >= queue->counter)
                queue->counter = kept->entry[head].counter + 1;
        }
    qsort_r(queue->resubmit, queue->resubmit_count, sizeof *queue->resubmit, by_counter,
            kept->entry);
    queue->seen = (uint16_t)(queue->published + queue->resubmit_count);
    return VREP_OK;
}

int vhost_queue_start(struct vhost_queue *queue, struct vhost_memory *memory)
{
    if (queue->size == 0 || memory == NULL)
        return VREP_E_PROTOCOL;
    int status = vhost_queue_remap(queue, memory);
    if (status != VREP_OK)
        return status;
    queue->taken = calloc(queue->size, sizeof *queue->taken);
    queue->resubmit = calloc(queue->size, sizeof *queue->resubmit);
    if (queue->taken == NULL || queue->resubmit == NULL) {
        vhost_queue_stop(queue);
        return VREP_E_NOMEM;
    }
    queue->published = load_index(queue->used + RING_INDEX);
    queue->waited = load_index(queue->available + RING_INDEX);
    queue->given = 0;
    queue->counter = 0;
    queue->resubmit_next = queue->resubmit_count = 0;
    queue->broken = queue->stopping = false;
    if (queue->kept != NULL)
        status = take_over(queue);
    if (status != VREP_OK) {
        vhost_queue_stop(queue);
        return status;
    }
    vrep_count(&queue->connection->server->stats.resubmitted, queue->resubmit_count);
    queue->started = queue->again = true;
    /* A server that was killed may have shown what it had not logged yet. */
    if (queue->log_used)
        vhost_log_write(&queue->connection->log, queue->address_log,
                        VREP_VRING_USED_BYTES(queue->size));
    return VREP_OK;
}

void vhost_queue_stop(struct vhost_queue *queue)
{
    free(queue->taken);
    free(queue->resubmit);
    vhost_memory_let(queue->memory);
    queue->taken = NULL;
    queue->resubmit = NULL;
    queue->memory = NULL;
    queue->started = queue->stopping = queue->again = false;
}

/* ---- chains ------------------------------------------------------------------------ */

static int broken(struct vhost_queue *queue, const char *why)
{
    uint64_t one = 1;
    queue->broken = true;
    VREP_WARN("vhost", "queue %u: %s: it is served no more", (unsigned)queue->number, why);
    if (queue->error_fd >= 0 && write(queue->error_fd, &one, sizeof one) < 0)
        VREP_WARN("vhost", "queue %u: nobody was told", (unsigned)queue->number);
    return VREP_E_PROTOCOL;
}

/* One read of what the guest may change at any moment. */
static struct vrep_vring_descriptor read_descriptor(const struct vrep_vring_descriptor *from)
{
    struct vrep_vring_descriptor raw;
    memcpy(&raw, from, sizeof raw);
    vrep_fence_acquire();
    return (struct vrep_vring_descriptor){le64toh(raw.address), le32toh(raw.bytes),
                                          le16toh(raw.flags), le16toh(raw.next)};
}

/* What is one piece for the guest may lie in several regions: modules of memory and nodes of a NUMA
 * machine are regions of their own, and stand side by side. */
static const char *add_segment(struct vhost_queue *queue, struct vhost_chain *chain,
                               const struct vrep_vring_descriptor *is)
{
    bool writable = (is->flags & VREP_VRING_WRITE) != 0;
    if (is->bytes > 0 && !writable && chain->writable > 0)
        return "what the device reads stands behind what it writes";
    for (uint64_t done = 0, bytes; done < is->bytes; done += bytes) {
        uint32_t at = chain->readable + chain->writable;
        uint64_t address = is->address + done;
        if (at == VHOST_SEGMENTS_MAX)
            return "a request has too many segments";
        bytes = is->bytes - done;
        uint8_t *memory = vhost_guest_part(queue->memory, address, &bytes);
        if (memory == NULL)
            return "a descriptor points outside of the guest's memory";
        chain->segment[at] = (struct iovec){memory, bytes};
        chain->address[at] = address;
        if (writable) {
            chain->writable++;
            chain->writable_bytes += bytes;
        } else {
            chain->readable++;
            chain->readable_bytes += bytes;
        }
    }
    return NULL;
}

/* Follows a chain in a table of `size` descriptors; no chain has more than those. */
static const char *follow(struct vhost_queue *queue, struct vhost_chain *chain,
                          const struct vrep_vring_descriptor *table, uint32_t size, uint16_t at,
                          bool indirect)
{
    for (uint32_t steps = 0; steps < size; steps++) {
        if (at >= size)
            return "a descriptor's number is out of range";
        struct vrep_vring_descriptor is = read_descriptor(&table[at]);
        const char *why;
        if (is.flags & VREP_VRING_INDIRECT) {
            if (indirect || !has(queue, VREP_VIRTIO_RING_INDIRECT) || is.flags & VREP_VRING_NEXT)
                return "an indirect table where none may be";
            if (is.bytes == 0 || is.bytes % sizeof is != 0 ||
                is.bytes / sizeof is > VREP_VHOST_QUEUE_SIZE_MAX)
                return "an indirect table of no size that one has";
            uint8_t *inner = vhost_guest(queue->memory, is.address, is.bytes);
            if (inner == NULL || (uintptr_t)inner % _Alignof(struct vrep_vring_descriptor) != 0)
                return "an indirect table outside of the guest's memory";
            return follow(queue, chain, (const struct vrep_vring_descriptor *)(void *)inner,
                          (uint32_t)(is.bytes / sizeof is), 0, true);
        }
        why = add_segment(queue, chain, &is);
        if (why != NULL)
            return why;
        if (!(is.flags & VREP_VRING_NEXT))
            return NULL;
        at = is.next;
    }
    return "a chain of descriptors has no end";
}

/* The head of the next chain. */
static int next_head(struct vhost_queue *queue, uint16_t *head)
{
    if (queue->resubmit_next < queue->resubmit_count) {
        *head = queue->resubmit[queue->resubmit_next++];
        return VREP_OK;
    }
    if (queue->stopping)
        return VREP_E_AGAIN;
    uint16_t offered = (uint16_t)(load_index(queue->available + RING_INDEX) - queue->seen);
    if (offered == 0 && has(queue, VREP_VIRTIO_RING_EVENT_IDX)) {
        /* "Kick at the next one", then one more look: it may have come in between. */
        vrep_le_store_u16(queue->used + RING_ENTRIES + USED_ENTRY * queue->size, queue->seen);
        vrep_fence_full();
        offered = (uint16_t)(load_index(queue->available + RING_INDEX) - queue->seen);
    }
    if (offered == 0)
        return VREP_E_AGAIN;
    if (offered > queue->size)
        return broken(queue, "it offers more than it has");
    *head = vrep_le_load_u16(queue->available + RING_ENTRIES + 2 * (queue->seen % queue->size));
    if (!queue->connection->runs && (int16_t)(queue->seen - queue->waited) >= 0)
        vhost_guest_runs(queue->connection);
    queue->seen++;
    return VREP_OK;
}

int vhost_queue_take(struct vhost_queue *queue, struct vhost_chain *chain)
{
    uint16_t head = 0;
    int status = next_head(queue, &head);
    if (status != VREP_OK)
        return status;
    if (head >= queue->size)
        return broken(queue, "a chain's number is out of range");
    if (queue->taken[head])
        return broken(queue, "a chain is offered that is in flight");
    chain->head = head;
    chain->readable = chain->writable = 0;
    chain->readable_bytes = chain->writable_bytes = 0;
    const char *why = follow(queue, chain, queue->descriptors, queue->size, head, false);
    if (why == NULL && (chain->writable == 0 || chain->readable_bytes < VREP_VIRTIO_HEADER_BYTES))
        why = "a request has no header, or no room for its status";
    if (why != NULL)
        return broken(queue, why);
    if (queue->kept != NULL) {
        struct vrep_vhost_inflight_entry *entry = &queue->kept->entry[head];
        entry->counter = queue->counter++;
        vrep_fence_release();
        entry->inflight = 1;
    }
    queue->taken[head] = true;
    queue->inflight++;
    return VREP_OK;
}

void vhost_queue_give(struct vhost_queue *queue, uint16_t head, uint32_t written)
{
    uint32_t at = (uint16_t)(queue->published + queue->given) % queue->size;
    uint8_t *entry = queue->used + RING_ENTRIES + USED_ENTRY * at;
    vrep_le_store_u32(entry, head);
    vrep_le_store_u32(entry + 4, written);
    if (queue->log_used)
        vhost_log_write(&queue->connection->log,
                        queue->address_log + RING_ENTRIES + USED_ENTRY * at, USED_ENTRY);
    if (queue->kept != NULL) {
        queue->kept->entry[head].next = queue->kept->last_batch_head;
        vrep_fence_release();
        queue->kept->last_batch_head = head;
    }
    queue->taken[head] = false;
    queue->given++;
    queue->inflight--;
}

bool vhost_queue_is_drained(const struct vhost_queue *queue)
{
    bool again = queue->resubmit_next < queue->resubmit_count && !queue->broken;
    return queue->inflight == 0 && !again;
}

static bool wants_interrupt(const struct vhost_queue *queue, uint16_t before, uint16_t after)
{
    vrep_fence_full();
    if (!has(queue, VREP_VIRTIO_RING_EVENT_IDX))
        return (vrep_le_load_u16(queue->available + RING_FLAGS) & VREP_VRING_NO_INTERRUPT) == 0;
    uint16_t event = vrep_le_load_u16(queue->available + RING_ENTRIES + 2 * queue->size);
    return (uint16_t)(after - event - 1) < (uint16_t)(after - before);
}

void vhost_queue_publish(struct vhost_queue *queue)
{
    if (queue->given == 0)
        return;
    uint16_t before = queue->published, after = (uint16_t)(before + queue->given);
    uint64_t one = 1;
    vrep_store_release_u16((uint16_t *)(void *)(queue->used + RING_INDEX), htole16(after));
    if (queue->log_used)
        vhost_log_write(&queue->connection->log, queue->address_log + RING_INDEX, 2);
    if (queue->kept != NULL) {
        vrep_fence_release();
        uint16_t head = queue->kept->last_batch_head;
        for (uint16_t left = queue->given; left > 0 && head < queue->size; left--) {
            queue->kept->entry[head].inflight = 0;
            head = queue->kept->entry[head].next;
        }
        vrep_fence_release();
        queue->kept->used_index = after;
    }
    queue->published = after;
    queue->given = 0;
    if (queue->call_fd >= 0 && wants_interrupt(queue, before, after) &&
        write(queue->call_fd, &one, sizeof one) < 0)
        VREP_WARN("vhost", "queue %u: the guest was not told", (unsigned)queue->number);
}
