#include <string.h>

#include "base/endian.h"
#include "base/status.h"
#include "serve/vhost_internal.h"

#define DATA_BYTES_MAX (32u << 20)
#define CHAINS_A_TURN 64u /* of a queue: others, and the group's consumers, wait meanwhile */
/* What is done is shown while the next is done, so that the guest works beside us; more often, and
 * the interrupts cost more than that gains. */
#define SHOWN_TOGETHER 16u

struct vhost_request *vhost_request_take(struct vrep_vhost_server *server)
{
    struct vhost_request *request = server->free;
    if (request != NULL) {
        server->free = request->next;
        request->next = NULL;
        request->command = NULL;
        request->memory = NULL;
        request->queue = NULL;
    }
    return request;
}

void vhost_request_give(struct vrep_vhost_server *server, struct vhost_request *request)
{
    vhost_memory_let(request->memory);
    request->memory = NULL;
    request->next = server->free;
    server->free = request;
}

static void link_request(struct vhost_connection *c, struct vhost_request *request)
{
    request->before = NULL;
    request->after = c->requests;
    if (c->requests != NULL)
        c->requests->before = request;
    c->requests = request;
}

static void unlink_request(struct vhost_connection *c, struct vhost_request *request)
{
    if (request->before != NULL)
        request->before->after = request->after;
    else
        c->requests = request->after;
    if (request->after != NULL)
        request->after->before = request->before;
}

/* ---- the parts of a chain -------------------------------------------------------- */

/* Copies what the guest wrote from byte `from` of the readable segments; false: there is less. */
static bool copy_out(const struct vhost_chain *chain, uint64_t from, void *to, uint64_t bytes)
{
    uint8_t *at = to;
    if (chain->readable_bytes < from || chain->readable_bytes - from < bytes)
        return false;
    for (uint32_t i = 0; i < chain->readable && bytes > 0; i++) {
        const struct iovec *segment = &chain->segment[i];
        if (from >= segment->iov_len) {
            from -= segment->iov_len;
            continue;
        }
        uint64_t n = segment->iov_len - from < bytes ? segment->iov_len - from : bytes;
        memcpy(at, (const uint8_t *)segment->iov_base + from, n);
        at += n;
        bytes -= n;
        from = 0;
    }
    return true;
}

/* The payload of a write, from the guest's memory into the command's: the one copy. */
static void copy_payload(const struct vhost_chain *chain, const struct iovec *to, int count)
{
    uint64_t from = VREP_VIRTIO_HEADER_BYTES;
    for (int i = 0; i < count; i++) {
        (void)copy_out(chain, from, to[i].iov_base, to[i].iov_len);
        from += to[i].iov_len;
    }
}

/* The writable segments but their last byte, the status, as iovecs; returns how many. */
static int data_in(const struct vhost_chain *chain, struct iovec *iov)
{
    int count = 0;
    for (uint32_t i = 0; i < chain->writable; i++) {
        iov[count] = chain->segment[chain->readable + i];
        if (i + 1 == chain->writable)
            iov[count].iov_len--;
        if (iov[count].iov_len > 0)
            count++;
    }
    return count;
}

static void copy_in(const struct vhost_chain *chain, const void *from, uint64_t bytes)
{
    struct iovec iov[VHOST_SEGMENTS_MAX];
    int count = data_in(chain, iov);
    const uint8_t *at = from;
    for (int i = 0; i < count && bytes > 0; i++) {
        uint64_t n = iov[i].iov_len < bytes ? iov[i].iov_len : bytes;
        memcpy(iov[i].iov_base, at, n);
        at += n;
        bytes -= n;
    }
}

static void log_data(struct vhost_request *request, uint64_t bytes)
{
    const struct vhost_chain *chain = &request->chain;
    struct vhost_log *log = &request->queue->connection->log;
    if (log->at == NULL)
        return;
    for (uint32_t i = 0; i < chain->writable && bytes > 0; i++) {
        uint64_t n = chain->segment[chain->readable + i].iov_len;
        if (n > bytes)
            n = bytes;
        vhost_log_write(log, chain->address[chain->readable + i], n);
        bytes -= n;
    }
}

/* ---- the end of a request ---------------------------------------------------------- */

/* The guest learns it when the turn ends at the latest. `data` bytes of what it reads were filled.
 */
static void finish(struct vhost_request *request, uint8_t status, uint64_t data)
{
    struct vhost_queue *queue = request->queue;
    struct vhost_connection *c = queue->connection;
    log_data(request, data);
    vrep_fence_release();
    *request->status = status;
    vhost_log_write(&c->log, request->status_address, 1);
    if (status != VREP_VIRTIO_OK)
        vrep_count(&c->server->stats.traffic.errors, 1);
    vhost_queue_give(queue, request->chain.head, (uint32_t)(data + 1));
    if (queue->given >= SHOWN_TOGETHER)
        vhost_queue_publish(queue);
    queue->again = true;
    unlink_request(c, request);
    vhost_request_give(c->server, request);
}

static void command_done(struct vrep_command *command)
{
    struct vhost_request *request = command->owner;
    struct vrep_vhost_server *server = request->server;
    int status = command->status;
    uint64_t bytes =
        request->type == VREP_VIRTIO_IN || request->type == VREP_VIRTIO_OUT ? command->length : 0;
    request->command = NULL;
    vrep_command_put(command);
    server->inflight--;
    if (request->queue == NULL) {
        /* Its connection ended: it stands in the in-flight region, and will be submitted again. */
        server->orphans--;
        vhost_request_give(server, request);
        return;
    }
    if (status == VREP_OK)
        vrep_count(request->type == VREP_VIRTIO_IN ? &server->stats.traffic.read_bytes
                                                   : &server->stats.traffic.written_bytes,
                   bytes);
    uint8_t said = VREP_VIRTIO_OK;
    if (status == VREP_E_UNSUPPORTED)
        said = VREP_VIRTIO_UNSUPPORTED;
    else if (status != VREP_OK)
        said = VREP_VIRTIO_IOERR;
    finish(request, said, status == VREP_OK && request->type == VREP_VIRTIO_IN ? bytes : 0);
}

/* ---- the begin of a request --------------------------------------------------------- */

/* Sectors of a request as bytes of the disk; false: outside of what an offset can be. */
static bool place(struct vrep_command *command, uint64_t sector, uint64_t bytes)
{
    if (sector > INT64_MAX / VREP_VHOST_SECTOR)
        return false;
    command->offset = sector * VREP_VHOST_SECTOR;
    command->length = bytes;
    return true;
}

/* DISCARD and WRITE ZEROES: one range, as the configuration says. */
static int fill_range(struct vhost_request *request)
{
    struct vrep_virtio_range raw;
    struct vrep_command *command = request->command;
    bool discard = request->type == VREP_VIRTIO_DISCARD;
    if (request->chain.readable_bytes != VREP_VIRTIO_HEADER_BYTES + sizeof raw ||
        !copy_out(&request->chain, VREP_VIRTIO_HEADER_BYTES, &raw, sizeof raw))
        return VREP_VIRTIO_UNSUPPORTED;
    uint64_t sector = le64toh(raw.sector);
    uint32_t sectors = le32toh(raw.sectors), flags = le32toh(raw.flags);
    /* virtio 1.2, 5.2.6.2: other bits are not known, and a discard has none. */
    if (flags & ~VREP_VIRTIO_UNMAP || (discard && flags != 0))
        return VREP_VIRTIO_UNSUPPORTED;
    if (sectors > VREP_VIRTIO_ZERO_SECTORS_MAX ||
        !place(command, sector, (uint64_t)sectors * VREP_VHOST_SECTOR))
        return VREP_VIRTIO_IOERR;
    command->op = discard ? VREP_OP_DISCARD : VREP_OP_ZERO;
    if (!discard && !(flags & VREP_VIRTIO_UNMAP))
        command->flags |= VREP_COMMAND_NO_HOLE;
    return VREP_VIRTIO_OK;
}

static int fill_data(struct vhost_request *request, uint64_t sector)
{
    const struct vhost_chain *chain = &request->chain;
    struct vrep_command *command = request->command;
    bool in = request->type == VREP_VIRTIO_IN;
    uint64_t bytes =
        in ? chain->writable_bytes - 1 : chain->readable_bytes - VREP_VIRTIO_HEADER_BYTES;
    if (bytes % VREP_VHOST_SECTOR != 0 || bytes > DATA_BYTES_MAX || !place(command, sector, bytes))
        return VREP_VIRTIO_IOERR;
    command->op = in ? VREP_OP_READ : VREP_OP_WRITE;
    if (in) {
        command->iovcnt = data_in(chain, request->iov);
        command->iov = request->iov;
    }
    return VREP_VIRTIO_OK;
}

/* False: there is no payload memory, it waits as it is. */
static bool prepare(struct vhost_request *request)
{
    struct vhost_queue *queue = request->queue;
    struct vrep_command *command = request->command;
    int status = vrep_command_prepare(command);
    queue->waiting = status == VREP_E_AGAIN ? request : NULL;
    if (status == VREP_E_AGAIN) {
        vrep_count(&request->server->stats.stalls, 1);
        return false;
    }
    request->server->inflight++;
    if (status != VREP_OK) {
        command->status = status;
        command_done(command);
        return true;
    }
    if (command->op == VREP_OP_WRITE)
        copy_payload(&request->chain, command->iov, command->iovcnt);
    vrep_command_submit(command);
    return true;
}

/* A chain that was taken. False: it waits. */
static bool begin(struct vhost_request *request)
{
    struct vhost_queue *queue = request->queue;
    struct vrep_vhost_server *server = request->server;
    struct vrep_command *command = request->command;
    const struct vhost_chain *chain = &request->chain;
    uint8_t header[VREP_VIRTIO_HEADER_BYTES];
    int verdict = VREP_VIRTIO_OK;

    uint32_t last = chain->readable + chain->writable - 1;
    const struct iovec *end = &chain->segment[last];
    request->status = (uint8_t *)end->iov_base + end->iov_len - 1;
    request->status_address = chain->address[last] + end->iov_len - 1;
    (void)copy_out(chain, 0, header, sizeof header); /* no chain without one is taken */
    request->type = vrep_le_load_u32(header);
    uint64_t sector = vrep_le_load_u64(header + 8);

    command->op = 0;
    command->flags = 0;
    command->disk = (uint16_t)server->disk;
    command->offset = command->length = 0;
    command->iov = NULL;
    command->iovcnt = 0;
    command->done = command_done;
    command->owner = request;
    switch (request->type) {
    case VREP_VIRTIO_IN:
    case VREP_VIRTIO_OUT:
        verdict = fill_data(request, sector);
        break;
    case VREP_VIRTIO_FLUSH:
        command->op = VREP_OP_FLUSH;
        break;
    case VREP_VIRTIO_DISCARD:
    case VREP_VIRTIO_WRITE_ZEROES:
        verdict = fill_range(request);
        break;
    case VREP_VIRTIO_GET_ID:
        break;
    default:
        verdict = VREP_VIRTIO_UNSUPPORTED;
    }
    /* A driver that did not ask for FLUSH takes a write for durable once it is complete. */
    bool through = (queue->connection->features >> VREP_VIRTIO_BLK_FLUSH & 1) == 0;
    if (through && command->op != VREP_OP_READ && command->op != VREP_OP_FLUSH)
        command->flags |= VREP_COMMAND_FUA;
    bool empty = command->length == 0 && request->type != VREP_VIRTIO_FLUSH;
    if (verdict == VREP_VIRTIO_OK && !empty)
        return prepare(request);

    uint64_t data = 0;
    request->command = NULL;
    vrep_command_put(command);
    if (request->type == VREP_VIRTIO_GET_ID) {
        data = chain->writable_bytes - 1 < VREP_VIRTIO_ID_BYTES ? chain->writable_bytes - 1
                                                                : VREP_VIRTIO_ID_BYTES;
        copy_in(chain, server->serial, data);
    }
    finish(request, (uint8_t)verdict, data);
    return true;
}

bool vhost_block_run(struct vhost_queue *queue)
{
    struct vrep_vhost_server *server = queue->connection->server;
    queue->more = false;
    if (queue->waiting != NULL && !prepare(queue->waiting))
        return false;
    for (uint32_t taken = 0; !queue->broken; taken++) {
        if (taken == CHAINS_A_TURN) {
            queue->more = true;
            return false;
        }
        struct vhost_request *request = vhost_request_take(server);
        if (request == NULL)
            return false;
        request->command = vrep_command_get(server->group);
        int status =
            request->command == NULL ? VREP_E_FULL : vhost_queue_take(queue, &request->chain);
        if (status != VREP_OK) {
            if (request->command != NULL)
                vrep_command_put(request->command);
            vhost_request_give(server, request);
            return status != VREP_E_FULL;
        }
        request->server = server;
        request->queue = queue;
        request->memory = queue->memory;
        vhost_memory_hold(request->memory);
        link_request(queue->connection, request);
        server->received++;
        vrep_count(&server->stats.traffic.requests, 1);
        if (!begin(request))
            return false;
    }
    return true;
}
