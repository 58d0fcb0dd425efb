#include "base/endian.h"
#include "base/status.h"
#include "serve/nbd_internal.h"
#include "track/map.h"
#include "track/since.h"

/* One context's extents as they grow: equal neighbours are joined. */
struct extents {
    uint8_t *out;
    uint32_t count, max;
    uint32_t last_length, last_flags;
};

static bool add(struct extents *extents, uint64_t length, uint32_t flags)
{
    if (extents->count > 0 && extents->last_flags == flags &&
        length <= UINT32_MAX - extents->last_length) {
        extents->last_length += (uint32_t)length;
    } else if (extents->count == extents->max) {
        return false;
    } else {
        extents->count++;
        extents->last_length = (uint32_t)length;
        extents->last_flags = flags;
    }
    uint8_t *at = extents->out + (size_t)(extents->count - 1) * 8;
    vrep_be_store_u32(at, extents->last_length);
    vrep_be_store_u32(at + 4, extents->last_flags);
    return true;
}

/* What lies at offset, at most max bytes of it.  A file's hole reads zero, but in an overlay a
 * block that is not present yet belongs to somebody else: that is data, wherever it is. */
static int allocation_at(struct nbd_connection *c, struct vrep_disk *disk, uint64_t offset,
                         uint64_t max, uint64_t *length, uint32_t *flags)
{
    *flags = 0;
    if (offset >= c->data_from && offset < c->data_to) {
        *length = c->data_to - offset < max ? c->data_to - offset : max;
        return VREP_OK;
    }
    uint64_t absent, absent_length;
    if (vrep_disk_is_overlay(disk) &&
        vrep_overlay_absent(disk, offset, max, &absent, &absent_length)) {
        if (absent <= offset) {
            uint64_t end = absent + absent_length;
            *length = end - offset < max ? end - offset : max;
            return VREP_OK;
        }
        max = absent - offset;
    }
    bool hole;
    uint64_t look = vrep_disk_is_overlay(disk) ? max : UINT64_MAX;
    uint64_t found;
    int status = vrep_disk_extent(disk, offset, look, &found, &hole);
    if (status != VREP_OK)
        return status;
    if (found == 0)
        return VREP_E_IO;
    if (hole) {
        *flags = VREP_NBD_STATE_HOLE | VREP_NBD_STATE_ZERO;
    } else {
        c->data_from = offset;
        c->data_to = offset + found;
    }
    *length = found < max ? found : max;
    return VREP_OK;
}

static int next_at(struct nbd_connection *c, uint32_t context, uint64_t offset, uint64_t max,
                   uint64_t *length, uint32_t *flags)
{
    struct vrep_group *group = c->server->group;
    if (context == VREP_NBD_CONTEXT_ALLOCATION)
        return allocation_at(c, vrep_group_disk(group, c->export), offset, max, length, flags);
    struct vrep_map *map = vrep_group_map(group);
    bool dirty, inside;
    uint64_t run;
    if (map != NULL)
        inside = vrep_map_next_run(map, (uint16_t)c->export, offset, &run, &dirty);
    else
        inside = vrep_since_next_run(vrep_group_since(group, c->export), offset, &run, &dirty);
    if (!inside)
        return VREP_E_RANGE;
    *length = run < max ? run : max;
    *flags = dirty ? VREP_NBD_STATE_DIRTY : 0;
    return VREP_OK;
}

/* Extents of [offset, offset + length) for one context; stops early when there are too many, which
 * the protocol allows. */
static int fill(struct nbd_connection *c, const struct vrep_nbd_request *wire, uint32_t context,
                struct extents *extents)
{
    uint64_t at = wire->offset, end = wire->offset + wire->length;
    /* Each step may be a system call: their number is bounded apart from what they give. */
    for (uint32_t steps = 0; at < end && steps < NBD_EXTENTS_MAX; steps++) {
        uint64_t length = 0;
        uint32_t flags = 0;
        int status = next_at(c, context, at, end - at, &length, &flags);
        if (status != VREP_OK || length == 0)
            return extents->count > 0 ? VREP_OK : VREP_E_IO;
        if (!add(extents, length, flags))
            break;
        at += length;
    }
    return VREP_OK;
}

void nbd_block_status(struct nbd_connection *c, struct nbd_request *request)
{
    const struct vrep_nbd_request *wire = &request->wire;
    struct iovec memory;
    vrep_buffers_iov(c->server->buffers, &request->buffer, 0, &memory, 1);
    uint8_t *out = memory.iov_base;
    uint32_t bytes = 0, last = 0;
    for (uint32_t context = 1; context <= VREP_NBD_CONTEXT_DIRTY; context <<= 1) {
        if (!(c->contexts & context))
            continue;
        uint8_t *chunk = out + bytes;
        struct extents extents = {
            .out = chunk + VREP_NBD_CHUNK_BYTES + 4,
            .max = wire->flags & VREP_NBD_FLAG_REQ_ONE ? 1 : NBD_EXTENTS_MAX,
        };
        int status = fill(c, wire, context, &extents);
        if (status != VREP_OK) {
            nbd_reply_error(c, request, VREP_NBD_EIO, "the extents of the disk cannot be read");
            return;
        }
        vrep_nbd_chunk(chunk, 0, VREP_NBD_CHUNK_STATUS, wire->cookie, 4 + extents.count * 8);
        vrep_be_store_u32(chunk + VREP_NBD_CHUNK_BYTES, context);
        last = bytes;
        bytes += VREP_NBD_CHUNK_BYTES + 4 + extents.count * 8;
    }
    vrep_be_store_u16(out + last + 4, VREP_NBD_CHUNK_DONE);
    request->header_bytes = 0;
    request->buffer.bytes = bytes;
    nbd_reply(c, request);
}
