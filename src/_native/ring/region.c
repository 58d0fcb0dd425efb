#include "ring/region.h"

#include <string.h>
#include <sys/uio.h>

#include "base/atomic.h"
#include "base/shared.h"
#include "base/status.h"
#include "format/checksum.h"

enum { DESC_WORDS = sizeof(struct vrep_ring_desc) / sizeof(uint64_t) };

static bool inside(uint64_t at, uint64_t count, uint64_t size, uint64_t total)
{
    return at % 64 == 0 && at >= sizeof(struct vrep_ring_header) && at <= total &&
           count <= (total - at) / size;
}

int vrep_ring_region_find(void *base, uint64_t bytes, struct vrep_ring_region *out)
{
    struct vrep_ring_header *header = base;
    uint8_t boot_id[16];
    if (bytes < sizeof *header || header->magic != VREP_RING_MAGIC)
        return VREP_E_CORRUPT;
    if (header->version != VREP_RING_VERSION)
        return VREP_E_VERSION;
    if (header->checksum != vrep_checksum32(header, offsetof(struct vrep_ring_header, checksum)))
        return VREP_E_CORRUPT;
    uint32_t descs = header->descriptors;
    if (header->header_bytes != sizeof *header || header->file_bytes != bytes ||
        header->chunk_bytes != VREP_CHUNK_BYTES || descs == 0 || (descs & (descs - 1)) != 0 ||
        header->slots == 0 ||
        !inside(header->slots_at, header->slots, sizeof(struct vrep_ring_slot), bytes) ||
        !inside(header->descs_at, descs, sizeof(struct vrep_ring_desc), bytes) ||
        !inside(header->next_at, header->chunks, sizeof(uint32_t), bytes) ||
        !inside(header->chunks_at, header->chunks, VREP_CHUNK_BYTES, bytes))
        return VREP_E_CORRUPT;
    int status = vrep_boot_id(boot_id);
    if (status != VREP_OK)
        return status;
    if (memcmp(boot_id, header->boot_id, sizeof boot_id) != 0)
        return VREP_E_GONE;
    uint8_t *bytes_at = base;
    *out = (struct vrep_ring_region){
        .header = header,
        .slots = (struct vrep_ring_slot *)(void *)(bytes_at + header->slots_at),
        .descs = (struct vrep_ring_desc *)(void *)(bytes_at + header->descs_at),
        .next = (uint32_t *)(void *)(bytes_at + header->next_at),
        .payload = bytes_at + header->chunks_at,
        .slots_count = header->slots,
        .descs_count = descs,
        .chunks_count = header->chunks,
    };
    return VREP_OK;
}

void vrep_ring_desc_load(const struct vrep_ring_desc *from, struct vrep_ring_desc *to)
{
    const uint64_t *words = (const uint64_t *)(const void *)from;
    uint64_t copy[DESC_WORDS];
    for (int i = 0; i < DESC_WORDS; i++)
        copy[i] = vrep_load_relaxed_u64(&words[i]);
    memcpy(to, copy, sizeof copy);
}

void vrep_ring_desc_store(struct vrep_ring_desc *to, const struct vrep_ring_desc *from)
{
    uint64_t *words = (uint64_t *)(void *)to;
    uint64_t copy[DESC_WORDS];
    memcpy(copy, from, sizeof copy);
    for (int i = 0; i < DESC_WORDS; i++)
        vrep_store_relaxed_u64(&words[i], copy[i]);
}

int vrep_ring_region_iov(const struct vrep_ring_region *region, uint32_t first, uint32_t chunks,
                         uint64_t offset, uint64_t length, void *iov, int max, int *n)
{
    struct iovec *list = iov;
    int used = 0;
    *n = 0;
    if (length == 0)
        return VREP_OK;
    if (first == VREP_NO_CHUNK || chunks > region->chunks_count ||
        offset > (uint64_t)chunks * VREP_CHUNK_BYTES ||
        length > (uint64_t)chunks * VREP_CHUNK_BYTES - offset)
        return VREP_E_RANGE;
    uint32_t chunk = first;
    for (uint64_t skip = offset / VREP_CHUNK_BYTES; skip > 0; skip--) {
        if (chunk >= region->chunks_count)
            return VREP_E_CORRUPT;
        chunk = vrep_load_relaxed_u32(&region->next[chunk]);
    }
    uint64_t within = offset % VREP_CHUNK_BYTES;
    while (length > 0) {
        if (chunk >= region->chunks_count)
            return VREP_E_CORRUPT;
        uint64_t part = VREP_CHUNK_BYTES - within < length ? VREP_CHUNK_BYTES - within : length;
        uint8_t *at = region->payload + (uint64_t)chunk * VREP_CHUNK_BYTES + within;
        if (used > 0 && (uint8_t *)list[used - 1].iov_base + list[used - 1].iov_len == at)
            list[used - 1].iov_len += part;
        else if (used == max)
            return VREP_E_FULL;
        else
            list[used++] = (struct iovec){.iov_base = at, .iov_len = part};
        length -= part;
        within = 0;
        if (length > 0)
            chunk = vrep_load_relaxed_u32(&region->next[chunk]);
    }
    *n = used;
    return VREP_OK;
}
