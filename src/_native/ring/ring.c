#include "ring/ring.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/shared.h"
#include "base/status.h"
#include "format/checksum.h"
#include "ring/chunks.h"
#include "ring/private.h"
#include "ring/region.h"

enum { DESCS_MAX = 1 << 20, CHUNKS_MAX = 1 << 24, SLOTS_MAX = 65535 };

/* What the producer knows of a slot beyond shared memory. */
enum { HOLDS_DESC = 1, HOLDS_CHUNKS = 2, JOINED = 4, TAKEN = 8 };

struct vrep_ring {
    struct vrep_shared shared;
    struct vrep_ring_region region;
    struct vrep_chunks chunks;
    uint64_t head; /* ours: we are the only writer */
    uint64_t released;
    uint32_t reserved_descs;
    uint32_t free_slots_count;
    uint32_t *free_slots; /* a stack: a hot slot is used again soon */
    uint8_t *held;        /* per slot */
    bool was_clean;
};

static uint64_t round_up(uint64_t value, uint64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

/* Consumers look at how full the ring is many times a second. */
static void tell_free(const struct vrep_ring *ring)
{
    vrep_store_relaxed_u64(&ring->region.header->free_bytes_one, vrep_ring_free_bytes(ring) + 1);
}

static void destroy(struct vrep_ring *ring)
{
    vrep_chunks_destroy(&ring->chunks);
    free(ring->free_slots);
    free(ring->held);
    vrep_shared_close(&ring->shared);
    free(ring);
}

static int make_private(struct vrep_ring *ring)
{
    const struct vrep_ring_region *region = &ring->region;
    ring->free_slots = calloc(region->slots_count, sizeof *ring->free_slots);
    ring->held = calloc(region->slots_count, sizeof *ring->held);
    if (ring->free_slots == NULL || ring->held == NULL)
        return VREP_E_NOMEM;
    return vrep_chunks_create(region->chunks_count, &ring->chunks);
}

static int lay_out(const struct vrep_ring_config *config, struct vrep_ring_header *header)
{
    uint64_t chunks = round_up(config->payload_bytes, VREP_CHUNK_BYTES) / VREP_CHUNK_BYTES;
    if (config->descriptors == 0 || config->descriptors > DESCS_MAX ||
        (config->descriptors & (config->descriptors - 1)) != 0 || config->slots == 0 ||
        config->slots > SLOTS_MAX || config->payload_bytes > UINT64_MAX - VREP_CHUNK_BYTES ||
        chunks == 0 || chunks > CHUNKS_MAX || config->first_seq > UINT64_MAX / 2)
        return VREP_E_INVALID;
    *header = (struct vrep_ring_header){
        .magic = VREP_RING_MAGIC,
        .version = VREP_RING_VERSION,
        .header_bytes = sizeof *header,
        .epoch = config->epoch,
        .lane = config->lane,
        .descriptors = config->descriptors,
        .slots = config->slots,
        .chunks = (uint32_t)chunks,
        .chunk_bytes = VREP_CHUNK_BYTES,
        .first_seq = config->first_seq,
        .head = config->first_seq,
        .released = config->first_seq,
        .durable = config->first_seq,
        .incarnation = 1,
        .producer_pid = (uint64_t)getpid(),
    };
    memcpy(header->group_id, config->group_id, sizeof header->group_id);
    memcpy(header->epoch_id, config->epoch_id, sizeof header->epoch_id);
    header->slots_at = sizeof *header;
    header->descs_at =
        round_up(header->slots_at + (uint64_t)config->slots * sizeof(struct vrep_ring_slot), 4096);
    header->next_at = round_up(
        header->descs_at + (uint64_t)config->descriptors * sizeof(struct vrep_ring_desc), 4096);
    header->chunks_at = round_up(header->next_at + chunks * sizeof(uint32_t), 4096);
    header->file_bytes = header->chunks_at + chunks * VREP_CHUNK_BYTES;
    int status = vrep_boot_id(header->boot_id);
    header->checksum = vrep_checksum32(header, offsetof(struct vrep_ring_header, checksum));
    return status;
}

int vrep_ring_create(const char *path, const struct vrep_ring_config *config,
                     struct vrep_ring **out)
{
    struct vrep_ring_header header;
    int status = lay_out(config, &header);
    if (status != VREP_OK)
        return status;
    struct vrep_ring *ring = calloc(1, sizeof *ring);
    if (ring == NULL)
        return VREP_E_NOMEM;
    status = vrep_shared_create(path, header.file_bytes, config->mode, &ring->shared);
    if (status != VREP_OK) {
        free(ring);
        return status;
    }
    memcpy(ring->shared.base, &header, sizeof header);
    status = vrep_ring_region_find(ring->shared.base, ring->shared.bytes, &ring->region);
    if (status == VREP_OK)
        status = make_private(ring);
    if (status == VREP_OK)
        status = vrep_shared_publish(&ring->shared, path);
    if (status != VREP_OK) {
        vrep_shared_discard(&ring->shared, path);
        destroy(ring);
        return status;
    }
    ring->head = ring->released = header.first_seq;
    ring->was_clean = true;
    tell_free(ring);
    for (uint32_t i = header.slots; i > 0; i--)
        ring->free_slots[ring->free_slots_count++] = i - 1;
    *out = ring;
    return VREP_OK;
}

void vrep_ring_populate(const struct vrep_ring *ring)
{
    vrep_shared_populate(&ring->shared);
}

/* Claims a chain that must be whole, bounded and used by nobody else. */
static bool claim_chain(struct vrep_ring *ring, uint32_t first, uint32_t chunks, bool *joined)
{
    uint32_t chunk = first;
    *joined = true;
    for (uint32_t i = 0; i < chunks; i++) {
        if (!vrep_chunks_claim(&ring->chunks, chunk))
            return false;
        *joined = *joined && chunk == first + i;
        chunk = ring->region.next[chunk];
    }
    return true;
}

static int claim_published(struct vrep_ring *ring)
{
    uint32_t mask = ring->region.descs_count - 1;
    for (uint64_t seq = ring->released + 1; seq <= ring->head; seq++) {
        struct vrep_ring_desc desc;
        bool joined;
        vrep_ring_desc_load(&ring->region.descs[seq & mask], &desc);
        if (desc.seq != seq)
            return VREP_E_CORRUPT;
        if (desc.chunk != VREP_NO_CHUNK && !claim_chain(ring, desc.chunk, desc.chunks, &joined))
            return VREP_E_CORRUPT;
    }
    return VREP_OK;
}

static bool committed(const struct vrep_ring *ring, const struct vrep_ring_slot *slot)
{
    return slot->seq != 0 && slot->seq <= ring->head;
}

/* A slot whose seq was committed lost its chunks to the descriptor; every other one that was
 * reserved still holds its descriptor and its chunks, granted or not, until it is judged. */
static int claim_slots(struct vrep_ring *ring)
{
    for (uint32_t i = 0; i < ring->region.slots_count; i++) {
        struct vrep_ring_slot *slot = &ring->region.slots[i];
        bool joined = false;
        ring->held[i] = TAKEN;
        if ((slot->state != VREP_SLOT_RESERVED && slot->state != VREP_SLOT_GRANTED) ||
            committed(ring, slot))
            continue;
        ring->held[i] |= HOLDS_DESC;
        ring->reserved_descs++;
        if (slot->chunk == VREP_NO_CHUNK || slot->chunks == 0)
            continue;
        if (!claim_chain(ring, slot->chunk, slot->chunks, &joined))
            return VREP_E_CORRUPT;
        ring->held[i] |= HOLDS_CHUNKS;
        if (joined)
            ring->held[i] |= JOINED;
    }
    if (ring->head - ring->released + ring->reserved_descs > ring->region.descs_count)
        return VREP_E_CORRUPT;
    return VREP_OK;
}

int vrep_ring_attach(const char *path, const uint8_t group_id[16], struct vrep_ring **out)
{
    struct vrep_ring *ring = calloc(1, sizeof *ring);
    if (ring == NULL)
        return VREP_E_NOMEM;
    int status = vrep_shared_attach(path, sizeof(struct vrep_ring_header), &ring->shared);
    if (status != VREP_OK) {
        free(ring);
        return status;
    }
    status = vrep_ring_region_find(ring->shared.base, ring->shared.bytes, &ring->region);
    struct vrep_ring_header *header = ring->region.header;
    if (status == VREP_OK && memcmp(header->group_id, group_id, sizeof header->group_id) != 0)
        status = VREP_E_INVALID;
    if (status == VREP_OK && (header->descriptors > DESCS_MAX || header->chunks > CHUNKS_MAX ||
                              header->slots > SLOTS_MAX || header->released < header->first_seq ||
                              header->released > header->head || header->durable > header->head ||
                              header->head - header->released > header->descriptors))
        status = VREP_E_CORRUPT;
    if (status == VREP_OK)
        status = make_private(ring);
    if (status == VREP_OK) {
        ring->head = header->head;
        ring->released = header->released;
        status = claim_published(ring);
    }
    if (status == VREP_OK)
        status = claim_slots(ring);
    if (status != VREP_OK) {
        destroy(ring);
        return status;
    }
    tell_free(ring);
    ring->was_clean = header->clean == 1;
    vrep_store_relaxed_u64(&header->clean, 0);
    vrep_store_relaxed_u64(&header->incarnation, header->incarnation + 1);
    vrep_store_relaxed_u64(&header->producer_pid, (uint64_t)getpid());
    *out = ring;
    return VREP_OK;
}

void vrep_ring_adopt_epoch(struct vrep_ring *ring, uint32_t epoch, const uint8_t epoch_id[16])
{
    struct vrep_ring_header *header = ring->region.header;
    if (header->epoch == epoch && memcmp(header->epoch_id, epoch_id, sizeof header->epoch_id) == 0)
        return;
    /* A kill between the stores leaves a checksum that does not match: the ring counts as lost
     * then, and the checkpoint and write-intent tell what was dirty. */
    header->epoch = epoch;
    memcpy(header->epoch_id, epoch_id, sizeof header->epoch_id);
    header->checksum = vrep_checksum32(header, offsetof(struct vrep_ring_header, checksum));
}

void vrep_ring_detach(struct vrep_ring *ring, bool clean)
{
    if (ring == NULL)
        return;
    if (clean && ring->free_slots_count == ring->region.slots_count)
        vrep_store_release_u64(&ring->region.header->clean, 1);
    destroy(ring);
}

const struct vrep_ring_header *vrep_ring_header(const struct vrep_ring *ring)
{
    return ring->region.header;
}

struct vrep_ring_region *vrep_ring_region(struct vrep_ring *ring)
{
    return &ring->region;
}

uint64_t vrep_ring_head(const struct vrep_ring *ring)
{
    return ring->head;
}

uint64_t vrep_ring_released(const struct vrep_ring *ring)
{
    return ring->released;
}

bool vrep_ring_was_clean(const struct vrep_ring *ring)
{
    return ring->was_clean;
}

uint64_t vrep_ring_free_bytes(const struct vrep_ring *ring)
{
    return (uint64_t)ring->chunks.free * VREP_CHUNK_BYTES;
}

uint64_t vrep_ring_payload_bytes(const struct vrep_ring *ring)
{
    return (uint64_t)ring->region.chunks_count * VREP_CHUNK_BYTES;
}

uint32_t vrep_ring_free_descriptors(const struct vrep_ring *ring)
{
    return ring->region.descs_count - (uint32_t)(ring->head - ring->released) -
           ring->reserved_descs;
}

bool vrep_ring_half_full(const struct vrep_ring *ring)
{
    return ring->chunks.free < ring->region.chunks_count / 2 ||
           vrep_ring_free_descriptors(ring) < ring->region.descs_count / 2;
}

static struct vrep_ring_slot *pop_slot(struct vrep_ring *ring, uint32_t *index)
{
    *index = ring->free_slots[--ring->free_slots_count];
    struct vrep_ring_slot *slot = &ring->region.slots[*index];
    memset((uint8_t *)slot + sizeof slot->state, 0, sizeof *slot - sizeof slot->state);
    slot->generation = 0xff;
    slot->lane = ring->region.header->lane;
    slot->chunk = VREP_NO_CHUNK;
    return slot;
}

struct vrep_ring_slot *vrep_ring_reserve(struct vrep_ring *ring, uint64_t payload_bytes)
{
    uint32_t index, first = VREP_NO_CHUNK;
    bool joined = true;
    uint64_t wanted = round_up(payload_bytes, VREP_CHUNK_BYTES) / VREP_CHUNK_BYTES;
    if (ring->free_slots_count == 0 || vrep_ring_free_descriptors(ring) == 0 ||
        payload_bytes > vrep_ring_free_bytes(ring))
        return NULL;
    uint32_t chunks = (uint32_t)wanted;
    if (chunks > 0 && !vrep_chunks_take(&ring->chunks, chunks, ring->region.next, &first, &joined))
        return NULL;
    struct vrep_ring_slot *slot = pop_slot(ring, &index);
    slot->chunk = first;
    slot->chunks = chunks;
    ring->reserved_descs++;
    ring->held[index] =
        (uint8_t)(TAKEN | HOLDS_DESC | (chunks > 0 ? HOLDS_CHUNKS : 0) | (joined ? JOINED : 0));
    /* A producer that dies here leaves either a free slot or one whose chain is whole. */
    vrep_store_release_u32(&slot->state, VREP_SLOT_RESERVED);
    return slot;
}

struct vrep_ring_slot *vrep_ring_reserve_unrecorded(struct vrep_ring *ring)
{
    uint32_t index;
    if (ring->free_slots_count == 0)
        return NULL;
    struct vrep_ring_slot *slot = pop_slot(ring, &index);
    ring->held[index] = TAKEN;
    vrep_store_release_u32(&slot->state, VREP_SLOT_UNRECORDED);
    return slot;
}

void vrep_ring_grant(struct vrep_ring *ring, struct vrep_ring_slot *slot, uint64_t now_ns)
{
    uint8_t held = ring->held[vrep_ring_slot_index(ring, slot)];
    slot->granted_ns = now_ns;
    vrep_store_release_u32(&slot->state,
                           held & HOLDS_DESC ? VREP_SLOT_GRANTED : VREP_SLOT_UNRECORDED);
}

uint32_t vrep_ring_slot_index(const struct vrep_ring *ring, const struct vrep_ring_slot *slot)
{
    return (uint32_t)(slot - ring->region.slots);
}

/* After this the slot, and what it still held, can be taken again. */
static void free_slot(struct vrep_ring *ring, struct vrep_ring_slot *slot)
{
    uint32_t index = vrep_ring_slot_index(ring, slot);
    uint8_t held = ring->held[index];
    vrep_store_release_u32(&slot->state, VREP_SLOT_FREE);
    if (held & HOLDS_CHUNKS)
        vrep_chunks_give(&ring->chunks, ring->region.next, slot->chunk, slot->chunks);
    if (held & HOLDS_DESC)
        ring->reserved_descs--;
    ring->held[index] = 0;
    ring->free_slots[ring->free_slots_count++] = index;
}

void vrep_ring_cancel(struct vrep_ring *ring, struct vrep_ring_slot *slot)
{
    free_slot(ring, slot);
}

void vrep_ring_drop_payload(struct vrep_ring *ring, struct vrep_ring_slot *slot)
{
    uint32_t index = vrep_ring_slot_index(ring, slot);
    uint32_t first = slot->chunk, chunks = slot->chunks;
    if (!(ring->held[index] & HOLDS_CHUNKS))
        return;
    /* chunk alone decides at a restart: one store drops the chain. */
    vrep_store_release_u32(&slot->chunk, VREP_NO_CHUNK);
    vrep_store_relaxed_u32(&slot->chunks, 0);
    ring->held[index] &= (uint8_t) ~(HOLDS_CHUNKS | JOINED);
    vrep_chunks_give(&ring->chunks, ring->region.next, first, chunks);
}

int vrep_ring_iov(struct vrep_ring *ring, const struct vrep_ring_slot *slot, uint32_t offset,
                  uint32_t length, struct iovec *iov, int max)
{
    uint32_t first = slot->chunk, chunks = slot->chunks;
    int n;
    if (first != VREP_NO_CHUNK && ring->held[vrep_ring_slot_index(ring, slot)] & JOINED) {
        uint32_t skip = offset / VREP_CHUNK_BYTES;
        if (skip >= chunks)
            return length == 0 ? 0 : -1;
        first += skip;
        chunks -= skip;
        offset %= VREP_CHUNK_BYTES;
    }
    return vrep_ring_region_iov(&ring->region, first, chunks, offset, length, iov, max, &n) ==
                   VREP_OK
               ? n
               : -1;
}

uint64_t vrep_ring_stage(struct vrep_ring *ring, struct vrep_ring_slot *slot, uint64_t wall_ns,
                         uint64_t mono_ns)
{
    uint64_t seq = ring->head + 1;
    struct vrep_ring_desc desc = {
        .seq = seq,
        .offset = slot->offset,
        .length = slot->length,
        .chunk = slot->chunk,
        .chunks = slot->chunks,
        .kind = slot->kind,
        .generation = slot->generation,
        .flags = slot->flags,
        .disk = slot->disk,
        .lane = slot->lane,
        .epoch = ring->region.header->epoch,
        .wall_ns = wall_ns,
        .mono_ns = mono_ns,
    };
    vrep_ring_desc_store(&ring->region.descs[seq & (ring->region.descs_count - 1)], &desc);
    vrep_store_release_u64(&slot->seq, seq);
    return seq;
}

void vrep_ring_commit(struct vrep_ring *ring, struct vrep_ring_slot *slot)
{
    ring->head = slot->seq;
    vrep_store_release_u64(&ring->region.header->head, ring->head);
    /* The descriptor counts as published now, and owns the chunks. */
    ring->held[vrep_ring_slot_index(ring, slot)] &= (uint8_t)~HOLDS_CHUNKS;
    free_slot(ring, slot);
    tell_free(ring);
}

int vrep_ring_release(struct vrep_ring *ring, uint64_t upto)
{
    uint32_t mask = ring->region.descs_count - 1;
    struct vrep_ring_header *header = ring->region.header;
    if (upto < ring->released || upto > ring->head)
        return VREP_E_INVALID;
    if (upto == ring->released)
        return VREP_OK;
    if (upto > header->durable && header->spilled_ns == 0) {
        uint64_t oldest = header->durable > ring->released ? header->durable : ring->released;
        vrep_store_relaxed_u64(&header->spilled_ns,
                               ring->region.descs[(oldest + 1) & mask].wall_ns);
    }
    for (uint64_t seq = ring->released + 1; seq <= upto; seq++) {
        struct vrep_ring_desc desc;
        vrep_ring_desc_load(&ring->region.descs[seq & mask], &desc);
        if (desc.chunk != VREP_NO_CHUNK)
            vrep_chunks_give(&ring->chunks, ring->region.next, desc.chunk, desc.chunks);
    }
    ring->released = upto;
    vrep_store_release_u64(&ring->region.header->released, upto);
    tell_free(ring);
    /* Whoever sees bytes of the next user of these chunks also sees `released`: it is stored before
     * them. */
    vrep_fence_release();
    return VREP_OK;
}

void vrep_ring_set_durable(struct vrep_ring *ring, uint64_t durable)
{
    struct vrep_ring_header *header = ring->region.header;
    if (durable <= header->durable || durable > ring->head)
        return;
    vrep_store_release_u64(&header->durable, durable);
    if (durable >= ring->released)
        vrep_store_relaxed_u64(&header->spilled_ns, 0);
}

uint64_t vrep_ring_durable(const struct vrep_ring *ring)
{
    return ring->region.header->durable;
}

void vrep_ring_forget_durable(struct vrep_ring *ring)
{
    vrep_store_release_u64(&ring->region.header->durable, 0);
}

uint64_t vrep_ring_spilled_ns(const struct vrep_ring *ring)
{
    return ring->region.header->spilled_ns;
}

uint32_t vrep_ring_slots(const struct vrep_ring *ring)
{
    return ring->region.slots_count;
}

struct vrep_ring_slot *vrep_ring_slot_at(struct vrep_ring *ring, uint32_t index)
{
    return index < ring->region.slots_count ? &ring->region.slots[index] : NULL;
}

uint32_t vrep_ring_judge(struct vrep_ring *ring)
{
    uint32_t remaining = 0;
    ring->free_slots_count = 0;
    for (uint32_t i = ring->region.slots_count; i > 0; i--) {
        struct vrep_ring_slot *slot = &ring->region.slots[i - 1];
        bool stays = (slot->state == VREP_SLOT_GRANTED && !committed(ring, slot)) ||
                     slot->state == VREP_SLOT_UNRECORDED;
        if (stays) {
            vrep_store_relaxed_u64(&slot->seq, 0);
            remaining++;
        } else {
            free_slot(ring, slot);
        }
    }
    return remaining;
}
