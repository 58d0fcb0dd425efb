#include "serve/vhost_protocol.h"

#include <assert.h>
#include <string.h>

#include "base/endian.h"
#include "base/status.h"

static_assert(sizeof(struct vrep_vhost_header) == VREP_VHOST_HEADER_BYTES, "vhost-user header");
static_assert(sizeof(struct vrep_vhost_regions) == 8 + 8 * 32, "SET_MEM_TABLE");
static_assert(sizeof(struct vrep_vhost_one_region) == 40, "ADD_MEM_REG");
static_assert(sizeof(struct vrep_vhost_address) == 40, "SET_VRING_ADDR");
static_assert(sizeof(struct vrep_vhost_config) == 12 + 256, "GET_CONFIG");
static_assert(offsetof(struct vrep_vhost_inflight, queue_size) == 18, "GET_INFLIGHT_FD");
static_assert(sizeof(struct vrep_vhost_inflight_queue) == 16, "in-flight region");
static_assert(sizeof(struct vrep_vhost_inflight_entry) == 16, "in-flight entry");
static_assert(sizeof(struct vrep_vring_descriptor) == 16, "descriptor");

#define INFLIGHT_BODY 20u
#define CONFIG_HEAD 12u

struct shape {
    uint16_t least, most; /* bytes of the body */
    uint8_t fds_least, fds_most;
    bool known;
};

static const struct shape shapes[] = {
    [VREP_VHOST_GET_FEATURES] = {0, 0, 0, 0, true},
    [VREP_VHOST_SET_FEATURES] = {8, 8, 0, 0, true},
    [VREP_VHOST_SET_OWNER] = {0, 0, 0, 0, true},
    [VREP_VHOST_RESET_OWNER] = {0, 0, 0, 0, true},
    [VREP_VHOST_SET_MEM_TABLE] = {8, sizeof(struct vrep_vhost_regions), 0,
                                  VREP_VHOST_REGIONS_MESSAGE, true},
    [VREP_VHOST_SET_LOG_BASE] = {16, 16, 1, 1, true},
    [VREP_VHOST_SET_LOG_FD] = {0, 8, 1, 1, true},
    [VREP_VHOST_SET_VRING_NUM] = {8, 8, 0, 0, true},
    [VREP_VHOST_SET_VRING_ADDR] = {40, 40, 0, 0, true},
    [VREP_VHOST_SET_VRING_BASE] = {8, 8, 0, 0, true},
    [VREP_VHOST_GET_VRING_BASE] = {8, 8, 0, 0, true},
    [VREP_VHOST_SET_VRING_KICK] = {8, 8, 0, 1, true},
    [VREP_VHOST_SET_VRING_CALL] = {8, 8, 0, 1, true},
    [VREP_VHOST_SET_VRING_ERR] = {8, 8, 0, 1, true},
    [VREP_VHOST_GET_PROTOCOL_FEATURES] = {0, 0, 0, 0, true},
    [VREP_VHOST_SET_PROTOCOL_FEATURES] = {8, 8, 0, 0, true},
    [VREP_VHOST_GET_QUEUE_NUM] = {0, 0, 0, 0, true},
    [VREP_VHOST_SET_VRING_ENABLE] = {8, 8, 0, 0, true},
    [VREP_VHOST_SET_BACKEND_REQ_FD] = {0, 8, 1, 1, true},
    [VREP_VHOST_GET_CONFIG] = {CONFIG_HEAD, sizeof(struct vrep_vhost_config), 0, 0, true},
    [VREP_VHOST_SET_CONFIG] = {CONFIG_HEAD, sizeof(struct vrep_vhost_config), 0, 0, true},
    [VREP_VHOST_GET_INFLIGHT_FD] = {INFLIGHT_BODY, sizeof(struct vrep_vhost_inflight), 0, 0, true},
    [VREP_VHOST_SET_INFLIGHT_FD] = {INFLIGHT_BODY, sizeof(struct vrep_vhost_inflight), 1, 1, true},
    [VREP_VHOST_RESET_DEVICE] = {0, 0, 0, 0, true},
    [VREP_VHOST_GET_MAX_MEM_SLOTS] = {0, 0, 0, 0, true},
    [VREP_VHOST_ADD_MEM_REG] = {40, 40, 1, 1, true},
    [VREP_VHOST_REM_MEM_REG] = {40, 40, 0, 1, true},
};

static const struct shape *shape_of(uint32_t request)
{
    if (request >= sizeof shapes / sizeof shapes[0] || !shapes[request].known)
        return NULL;
    return &shapes[request];
}

int vrep_vhost_check_header(const struct vrep_vhost_header *header)
{
    if ((header->flags & 3u) != VREP_VHOST_VERSION || header->flags & VREP_VHOST_REPLY)
        return VREP_E_PROTOCOL;
    const struct shape *shape = shape_of(header->request);
    if (shape == NULL)
        return header->bytes <= VREP_VHOST_PAYLOAD_MAX ? VREP_E_UNSUPPORTED : VREP_E_PROTOCOL;
    if (header->bytes < shape->least || header->bytes > shape->most)
        return VREP_E_PROTOCOL;
    return VREP_OK;
}

static bool region_is_sane(const struct vrep_vhost_region *region)
{
    return region->bytes > 0 && region->guest + region->bytes > region->guest &&
           region->user + region->bytes > region->user &&
           region->offset + region->bytes > region->offset && region->bytes <= INT64_MAX &&
           region->offset <= INT64_MAX - region->bytes;
}

static bool regions_are_sane(const struct vrep_vhost_message *message)
{
    const struct vrep_vhost_regions *regions = &message->body.regions;
    if (regions->count > VREP_VHOST_REGIONS_MESSAGE || regions->count != message->fds_count ||
        message->header.bytes != 8 + regions->count * sizeof regions->region[0])
        return false;
    for (uint32_t i = 0; i < regions->count; i++)
        if (!region_is_sane(&regions->region[i]))
            return false;
    return true;
}

/* A power of two: virtio 1.2, 2.7. */
static bool size_is_sane(uint32_t size)
{
    return size > 0 && size <= VREP_VHOST_QUEUE_SIZE_MAX && (size & (size - 1)) == 0;
}

/* KICK, CALL, ERR: the number of a queue, and a descriptor or the word that there is none. */
static bool event_is_sane(const struct vrep_vhost_message *message)
{
    uint64_t number = message->body.number;
    bool without = (number & VREP_VHOST_NO_FD) != 0;
    return (number & 0xffu) < VREP_VHOST_QUEUES_MAX && number <= (VREP_VHOST_NO_FD | 0xffu) &&
           message->fds_count == (without ? 0u : 1u);
}

static bool inflight_is_sane(const struct vrep_vhost_message *message)
{
    const struct vrep_vhost_inflight *inflight = &message->body.inflight;
    if (inflight->queues == 0 || inflight->queues > VREP_VHOST_QUEUES_MAX ||
        !size_is_sane(inflight->queue_size))
        return false;
    if (message->header.request == VREP_VHOST_GET_INFLIGHT_FD)
        return true;
    size_t least = inflight->queues * VREP_VHOST_INFLIGHT_BYTES(inflight->queue_size);
    return inflight->bytes >= least && inflight->bytes <= INT32_MAX &&
           inflight->offset <= INT64_MAX - inflight->bytes;
}

int vrep_vhost_check(const struct vrep_vhost_message *message)
{
    const struct shape *shape = shape_of(message->header.request);
    if (shape == NULL)
        return VREP_E_UNSUPPORTED;
    bool sane = message->header.bytes >= shape->least && message->header.bytes <= shape->most &&
                message->fds_count >= shape->fds_least && message->fds_count <= shape->fds_most;
    const struct vrep_vhost_state *state = &message->body.state;
    const struct vrep_vhost_config *config = &message->body.config;
    if (!sane)
        return VREP_E_PROTOCOL;
    switch (message->header.request) {
    case VREP_VHOST_SET_MEM_TABLE:
        sane = regions_are_sane(message);
        break;
    case VREP_VHOST_ADD_MEM_REG:
    case VREP_VHOST_REM_MEM_REG:
        sane = region_is_sane(&message->body.one.region);
        break;
    case VREP_VHOST_SET_VRING_NUM:
        sane = state->queue < VREP_VHOST_QUEUES_MAX && size_is_sane(state->number);
        break;
    case VREP_VHOST_SET_VRING_BASE:
        sane = state->queue < VREP_VHOST_QUEUES_MAX && state->number <= UINT16_MAX;
        break;
    case VREP_VHOST_GET_VRING_BASE:
    case VREP_VHOST_SET_VRING_ENABLE:
        sane = state->queue < VREP_VHOST_QUEUES_MAX;
        break;
    case VREP_VHOST_SET_VRING_ADDR:
        sane = message->body.address.queue < VREP_VHOST_QUEUES_MAX;
        break;
    case VREP_VHOST_SET_VRING_KICK:
    case VREP_VHOST_SET_VRING_CALL:
    case VREP_VHOST_SET_VRING_ERR:
        sane = event_is_sane(message);
        break;
    case VREP_VHOST_SET_LOG_BASE:
        /* Whole words, which is what both sides set bits in. */
        sane = message->body.log.bytes > 0 && message->body.log.bytes <= INT64_MAX &&
               message->body.log.offset <= INT64_MAX - message->body.log.bytes &&
               message->body.log.bytes % 8 == 0 && message->body.log.offset % 8 == 0;
        break;
    case VREP_VHOST_GET_CONFIG:
    case VREP_VHOST_SET_CONFIG:
        sane = config->bytes <= sizeof config->data && config->offset <= sizeof config->data &&
               config->offset + config->bytes <= sizeof config->data &&
               message->header.bytes == CONFIG_HEAD + config->bytes;
        break;
    case VREP_VHOST_GET_INFLIGHT_FD:
    case VREP_VHOST_SET_INFLIGHT_FD:
        sane = inflight_is_sane(message);
        break;
    default:
        break;
    }
    return sane ? VREP_OK : VREP_E_PROTOCOL;
}

/* virtio 1.2, 5.2.4. */
void vrep_virtio_config(const struct vrep_virtio_disk *disk, uint8_t out[VREP_VIRTIO_CONFIG_BYTES])
{
    uint32_t align = disk->discard_align_bytes > disk->block_bytes ? disk->discard_align_bytes
                                                                   : disk->block_bytes;
    memset(out, 0, VREP_VIRTIO_CONFIG_BYTES);
    vrep_le_store_u64(out, disk->bytes / VREP_VHOST_SECTOR);
    vrep_le_store_u32(out + 12, VREP_VIRTIO_SEGMENTS_MAX);
    vrep_le_store_u32(out + 20, disk->block_bytes);
    out[32] = 1; /* write-back: a flush is what makes writes durable */
    vrep_le_store_u16(out + 34, disk->queues);
    vrep_le_store_u32(out + 36, VREP_VIRTIO_ZERO_SECTORS_MAX);
    vrep_le_store_u32(out + 40, 1);
    vrep_le_store_u32(out + 44, align / VREP_VHOST_SECTOR);
    vrep_le_store_u32(out + 48, VREP_VIRTIO_ZERO_SECTORS_MAX);
    vrep_le_store_u32(out + 52, 1);
    out[56] = 1; /* zeroes may be unmapped */
}
