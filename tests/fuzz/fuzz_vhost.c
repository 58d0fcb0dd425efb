/* Bytes of a virtual machine monitor and of its guest: messages, and the virtqueues in a guest's
 * memory.
 *
 * The first byte chooses: a row of messages, each judged; or a guest's memory, whose queue is
 * served until it breaks or is empty. The guest's memory is a block of its own: a byte before or
 * behind it that is touched is seen. */
#include <string.h>

#include "base/endian.h"
#include "base/log.h"
#include "base/status.h"
#include "fuzz.h"
#include "serve/vhost_internal.h"

#define MEMORY 16384u
#define QUEUE 16u
#define AVAILABLE 256u
#define USED 320u
#define KEPT 1024u /* the in-flight region, when the input brings one */
#define GUEST UINT64_C(0x10000)
#define USER UINT64_C(0x7000000)

static void messages(const uint8_t *data, size_t size)
{
    while (size >= 5) {
        struct vrep_vhost_message message = {
            .header = {data[0], VREP_VHOST_VERSION | (data[1] & 0x0cu), vrep_le_load_u16(data + 2)},
            .fds_count = data[4] % (VREP_VHOST_REGIONS_MESSAGE + 1),
        };
        data += 5;
        size -= 5;
        int status = vrep_vhost_check_header(&message.header);
        FUZZ_MUST(status != VREP_OK || message.header.bytes <= VREP_VHOST_PAYLOAD_MAX);
        if (status != VREP_OK)
            continue;
        size_t bytes = message.header.bytes < size ? message.header.bytes : size;
        memcpy(message.body.raw, data, bytes);
        data += bytes;
        size -= bytes;
        if (vrep_vhost_check(&message) != VREP_OK)
            continue;
        switch (message.header.request) {
        case VREP_VHOST_SET_MEM_TABLE:
            FUZZ_MUST(message.body.regions.count == message.fds_count);
            break;
        case VREP_VHOST_SET_VRING_NUM:
            FUZZ_MUST(message.body.state.queue < VREP_VHOST_QUEUES_MAX);
            FUZZ_MUST(message.body.state.number <= VREP_VHOST_QUEUE_SIZE_MAX);
            break;
        case VREP_VHOST_GET_CONFIG:
            FUZZ_MUST(message.body.config.offset + message.body.config.bytes <= 256);
            break;
        case VREP_VHOST_SET_INFLIGHT_FD:
            FUZZ_MUST(message.body.inflight.bytes >=
                      message.body.inflight.queues *
                          VREP_VHOST_INFLIGHT_BYTES(message.body.inflight.queue_size));
            break;
        default:
            break;
        }
    }
}

static uint8_t *guest_memory;

static void check_chain(const struct vhost_chain *chain)
{
    uint64_t readable = 0, writable = 0;
    FUZZ_MUST(chain->head < QUEUE);
    FUZZ_MUST(chain->readable + chain->writable <= VHOST_SEGMENTS_MAX);
    FUZZ_MUST(chain->writable > 0 && chain->readable_bytes >= VREP_VIRTIO_HEADER_BYTES);
    for (uint32_t i = 0; i < chain->readable + chain->writable; i++) {
        const uint8_t *at = chain->segment[i].iov_base;
        size_t bytes = chain->segment[i].iov_len;
        FUZZ_MUST(at >= guest_memory && bytes > 0);
        FUZZ_MUST(bytes <= MEMORY && (size_t)(at - guest_memory) <= MEMORY - bytes);
        FUZZ_MUST(chain->address[i] == GUEST + (uint64_t)(at - guest_memory));
        *(i < chain->readable ? &readable : &writable) += bytes;
    }
    FUZZ_MUST(readable == chain->readable_bytes && writable == chain->writable_bytes);
}

static void queue(uint8_t how, const uint8_t *data, size_t size)
{
    static struct vrep_vhost_server server;
    static struct vhost_connection connection;
    static struct vhost_region region;
    static struct vhost_chain chain;
    static uint64_t kept_room[VREP_VHOST_INFLIGHT_BYTES(QUEUE) / 8];
    struct vhost_memory *memory = vhost_memory_create();
    FUZZ_MUST(memory != NULL);
    memset(guest_memory, 0, MEMORY);
    memcpy(guest_memory, data, size < MEMORY ? size : MEMORY);
    region = (struct vhost_region){
        .is = {GUEST, MEMORY, USER, 0}, .at = guest_memory, .users = 2}; /* never unmapped */
    memory->region[memory->count++] = &region;
    connection = (struct vhost_connection){.server = &server,
                                           .features = UINT64_C(1) << VREP_VIRTIO_RING_INDIRECT};
    if (how & 2)
        connection.features |= UINT64_C(1) << VREP_VIRTIO_RING_EVENT_IDX;
    struct vhost_queue *q = &connection.queue[0];
    *q = (struct vhost_queue){.connection = &connection,
                              .kick = {-1, NULL},
                              .call_fd = -1,
                              .error_fd = -1,
                              .size = QUEUE,
                              .address_descriptors = USER,
                              .address_available = USER + AVAILABLE,
                              .address_used = USER + USED};
    if (how & 4) {
        memcpy(kept_room, guest_memory + KEPT, sizeof kept_room);
        q->kept = (struct vrep_vhost_inflight_queue *)(void *)kept_room;
    }
    if (vhost_queue_start(q, memory) == VREP_OK) {
        FUZZ_MUST(q->resubmit_count <= QUEUE);
        uint32_t taken = 0;
        while (vhost_queue_take(q, &chain) == VREP_OK) {
            check_chain(&chain);
            FUZZ_MUST(++taken <= 2 * QUEUE && q->inflight <= QUEUE);
            FUZZ_CANARY(chain.writable > 1);
            if (taken % 3 != 0) { /* some stay in flight */
                vhost_queue_give(q, chain.head, 1);
                vhost_queue_publish(q);
            }
        }
        vhost_queue_stop(q);
    }
    vhost_memory_let(memory);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1)
        return 0;
    if (guest_memory == NULL) {
        guest_memory = aligned_alloc(64, MEMORY);
        vrep_log_set_level(VREP_LOG_ERROR);
    }
    FUZZ_MUST(guest_memory != NULL);
    if (data[0] & 1)
        messages(data + 1, size - 1);
    else
        queue(data[0], data + 1, size - 1);
    return 0;
}
