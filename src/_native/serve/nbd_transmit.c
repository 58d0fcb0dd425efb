#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "base/endian.h"
#include "base/log.h"
#include "base/status.h"
#include "serve/nbd_internal.h"

#define RECEIVE_SHARE (1u << 20) /* of one connection before others have their turn */
#define SEND_IOV_MAX 1024
#define LARGE_BYTES (64u << 10) /* payload of a write worth a system call of its own */
#define HEADERS_BYTES (4u << 10)

/* What handling the next bytes of a connection came to. */
enum progress { PROGRESS_INPUT, PROGRESS_STALLED, PROGRESS_ENDED };

/* ---- requests -------------------------------------------------------------------- */

struct nbd_request *nbd_request_take(struct nbd_connection *c)
{
    struct vrep_nbd_server *server = c->server;
    struct nbd_request *request = server->free;
    if (request == NULL || c->outstanding >= NBD_OUTSTANDING_MAX)
        return NULL;
    server->free = request->next;
    request->next = NULL;
    request->connection = c;
    request->command = NULL;
    request->buffer.parts = 0;
    request->buffer.bytes = 0;
    request->header_bytes = 0;
    c->outstanding++;
    return request;
}

static void give_buffer(struct vrep_nbd_server *server, struct nbd_request *request)
{
    if (request->connection != NULL && !request->buffer.small)
        request->connection->pages -= request->buffer.parts;
    vrep_buffers_give(server->buffers, &request->buffer);
    request->buffer.bytes = 0;
}

void nbd_request_give(struct vrep_nbd_server *server, struct nbd_request *request)
{
    give_buffer(server, request);
    if (request->connection != NULL)
        request->connection->outstanding--;
    request->connection = NULL;
    request->next = server->free;
    server->free = request;
    server->freed = true;
}

static void link_submitted(struct nbd_connection *c, struct nbd_request *request)
{
    request->before = NULL;
    request->after = c->submitted;
    if (c->submitted != NULL)
        c->submitted->before = request;
    c->submitted = request;
}

static void unlink_submitted(struct nbd_connection *c, struct nbd_request *request)
{
    if (request->before != NULL)
        request->before->after = request->after;
    else
        c->submitted = request->after;
    if (request->after != NULL)
        request->after->before = request->before;
}

void nbd_reply(struct nbd_connection *c, struct nbd_request *request)
{
    request->next = NULL;
    if (c->out_last != NULL)
        c->out_last->next = request;
    else
        c->out_first = request;
    c->out_last = request;
    if (!c->replied) {
        c->replied = true;
        c->next_replied = c->server->replied_first;
        c->server->replied_first = c;
    }
}

void nbd_reply_error(struct nbd_connection *c, struct nbd_request *request, uint32_t error,
                     const char *text)
{
    uint16_t type = request->wire.type;
    give_buffer(c->server, request);
    vrep_count(&c->client.traffic.errors, 1);
    if (c->structured && (type == VREP_NBD_READ || type == VREP_NBD_BLOCK_STATUS)) {
        request->header_bytes =
            (uint32_t)vrep_nbd_error_chunk(request->header, error, request->wire.cookie, text);
    } else {
        vrep_nbd_simple(request->header, error, request->wire.cookie);
        request->header_bytes = VREP_NBD_SIMPLE_BYTES;
    }
    nbd_reply(c, request);
}

static void reply_done(struct nbd_connection *c, struct nbd_request *request)
{
    bool read = request->wire.type == VREP_NBD_READ;
    if (!read)
        give_buffer(c->server, request);
    if (!read || !c->structured) {
        vrep_nbd_simple(request->header, 0, request->wire.cookie);
        request->header_bytes = VREP_NBD_SIMPLE_BYTES;
    } else if (request->wire.length == 0) {
        vrep_nbd_chunk(request->header, VREP_NBD_CHUNK_DONE, VREP_NBD_CHUNK_NONE,
                       request->wire.cookie, 0);
        request->header_bytes = VREP_NBD_CHUNK_BYTES;
    } else {
        vrep_nbd_chunk(request->header, VREP_NBD_CHUNK_DONE, VREP_NBD_CHUNK_DATA,
                       request->wire.cookie, request->wire.length + 8);
        vrep_be_store_u64(request->header + VREP_NBD_CHUNK_BYTES, request->wire.offset);
        request->header_bytes = VREP_NBD_CHUNK_BYTES + 8;
    }
    nbd_reply(c, request);
}

static void command_done(struct vrep_command *command)
{
    struct nbd_request *request = command->owner;
    struct nbd_connection *c = request->connection;
    int status = command->status;
    request->command = NULL;
    if (c == NULL) {
        /* Its connection ended: nobody waits for the answer, but newcomers wait for this. */
        struct vrep_nbd_server *server = (struct vrep_nbd_server *)(uintptr_t)command->tag;
        vrep_command_put(command);
        server->inflight--;
        server->orphans--;
        nbd_request_give(server, request);
        return;
    }
    vrep_command_put(command);
    c->server->inflight--;
    unlink_submitted(c, request);
    if (status == VREP_OK) {
        vrep_count(request->wire.type == VREP_NBD_READ ? &c->client.traffic.read_bytes
                                                       : &c->client.traffic.written_bytes,
                   request->wire.type == VREP_NBD_READ || request->wire.type == VREP_NBD_WRITE
                       ? request->wire.length
                       : 0);
        reply_done(c, request);
    } else {
        nbd_reply_error(c, request, vrep_nbd_error(status, request->wire.type),
                        vrep_status_text(status));
    }
}

static void submit(struct nbd_connection *c, struct nbd_request *request)
{
    link_submitted(c, request);
    c->server->inflight++;
    vrep_command_submit(request->command);
}

/* ---- input ------------------------------------------------------------------------- */

static void fill_command(struct nbd_connection *c, struct nbd_request *request)
{
    static const uint8_t ops[] = {
        [VREP_NBD_READ] = VREP_OP_READ,   [VREP_NBD_WRITE] = VREP_OP_WRITE,
        [VREP_NBD_FLUSH] = VREP_OP_FLUSH, [VREP_NBD_TRIM] = VREP_OP_DISCARD,
        [VREP_NBD_CACHE] = VREP_OP_READ,  [VREP_NBD_WRITE_ZEROES] = VREP_OP_ZERO,
    };
    const struct vrep_nbd_request *wire = &request->wire;
    struct vrep_command *command = request->command;
    command->op = ops[wire->type];
    command->flags = 0;
    if (command->op != VREP_OP_READ && command->op != VREP_OP_FLUSH &&
        (wire->flags & VREP_NBD_FLAG_FUA))
        command->flags |= VREP_COMMAND_FUA;
    if (wire->flags & VREP_NBD_FLAG_NO_HOLE)
        command->flags |= VREP_COMMAND_NO_HOLE;
    if (wire->flags & VREP_NBD_FLAG_FAST_ZERO)
        command->flags |= VREP_COMMAND_FAST;
    command->disk = (uint16_t)c->export;
    command->offset = wire->offset;
    command->length = wire->length;
    command->iov = NULL;
    command->iovcnt = 0;
    if (command->op == VREP_OP_READ) {
        command->length = request->buffer.bytes;
        command->iov = request->iov;
        command->iovcnt = vrep_buffers_iov(c->server->buffers, &request->buffer, 0, request->iov,
                                           (int)VREP_BUFFER_PAGES_MAX);
    }
    command->done = command_done;
    command->owner = request;
    command->tag = (uint64_t)(uintptr_t)c->server;
}

static bool take_buffer(struct nbd_connection *c, struct nbd_request *request)
{
    struct vrep_nbd_server *server = c->server;
    uint32_t bytes = request->wire.length;
    if (request->wire.type == VREP_NBD_BLOCK_STATUS)
        bytes = VREP_BUFFER_SMALL_BYTES;
    else if (bytes > VREP_NBD_PAYLOAD_MAX) /* CACHE is advice: so much of it is taken */
        bytes = VREP_NBD_PAYLOAD_MAX;
    if (bytes <= VREP_BUFFER_SMALL_BYTES)
        return vrep_buffers_take(server->buffers, bytes, &request->buffer);
    if (c->pages > 0 && c->pages + bytes / VREP_BUFFER_PAGE_BYTES + 1 > VREP_BUFFER_PAGES_MAX)
        return false; /* it has its share: one that does not read its replies blocks itself only */
    if (server->long_reader != NULL && server->long_reader != c)
        return false; /* it would wait for ever if others took what becomes free */
    bool taken = vrep_buffers_take(server->buffers, bytes, &request->buffer);
    server->long_reader = taken ? NULL : c;
    if (taken)
        c->pages += request->buffer.parts;
    return taken;
}

/* Gives a request back that found no room; it frees nothing that another one could wait for. */
static bool retreat(struct vrep_nbd_server *server, struct nbd_request *request)
{
    bool freed = server->freed;
    nbd_request_give(server, request);
    server->freed = freed;
    return false;
}

/* A request with its command; false: no payload memory, it waits as it is (to give the command back
 * would look like room to whoever waits for commands). */
static bool prepare(struct nbd_connection *c, struct nbd_request *request)
{
    const struct vrep_nbd_request *wire = &request->wire;
    int status = vrep_command_prepare(request->command);
    c->waiting = status == VREP_E_AGAIN ? request : NULL;
    if (status == VREP_E_AGAIN)
        return false;
    if (status != VREP_OK) {
        vrep_command_put(request->command);
        request->command = NULL;
        if (wire->type == VREP_NBD_WRITE)
            c->drop_left = wire->length;
        nbd_reply_error(c, request, vrep_nbd_error(status, wire->type), vrep_status_text(status));
    } else if (wire->type == VREP_NBD_WRITE) {
        c->receiving = request;
        c->payload = request->command->iov;
        c->payload_count = request->command->iovcnt;
        c->payload_left = wire->length;
    } else {
        submit(c, request);
    }
    return true;
}

void nbd_drop_unsubmitted(struct nbd_connection *c)
{
    struct nbd_request *dropped[] = {c->receiving, c->waiting};
    c->receiving = c->waiting = NULL;
    for (int i = 0; i < 2; i++) {
        if (dropped[i] == NULL)
            continue;
        vrep_command_put(dropped[i]->command);
        dropped[i]->command = NULL;
        nbd_request_give(c->server, dropped[i]);
    }
}

/* A request that was decoded and is allowed; false: no room now, nothing was taken. */
static bool start(struct nbd_connection *c, const struct vrep_nbd_request *wire)
{
    struct vrep_nbd_server *server = c->server;
    struct nbd_request *request = nbd_request_take(c);
    if (request == NULL)
        return false;
    request->wire = *wire;
    if (wire->type == VREP_NBD_BLOCK_STATUS) {
        if (!take_buffer(c, request))
            return retreat(server, request);
        nbd_block_status(c, request);
        return true;
    }
    if (wire->length == 0 && wire->type != VREP_NBD_FLUSH) {
        reply_done(c, request);
        return true;
    }
    bool reads = wire->type == VREP_NBD_READ || wire->type == VREP_NBD_CACHE;
    if (reads && !take_buffer(c, request))
        return retreat(server, request);
    request->command = vrep_command_get(server->group);
    if (request->command == NULL)
        return retreat(server, request);
    fill_command(c, request);
    (void)prepare(c, request); /* when it has to wait, its header is consumed all the same */
    return true;
}

/* The payload is whole: the command starts. */
static void payload_done(struct nbd_connection *c)
{
    struct nbd_request *request = c->receiving;
    c->receiving = NULL;
    submit(c, request);
}

static void copy_payload(struct nbd_connection *c)
{
    uint32_t have = c->in_to - c->in_from;
    uint64_t left = c->payload_left < have ? c->payload_left : have;
    uint64_t begin = c->receiving->wire.length - c->payload_left;
    uint64_t at = 0;
    c->payload_left -= left;
    for (int i = 0; i < c->payload_count && left > 0; i++) {
        uint64_t length = c->payload[i].iov_len;
        if (begin < at + length) {
            uint64_t within = begin - at;
            uint64_t n = length - within < left ? length - within : left;
            memcpy((uint8_t *)c->payload[i].iov_base + within, c->in + c->in_from, n);
            c->in_from += (uint32_t)n;
            begin += n;
            left -= n;
        }
        at += length;
    }
    if (c->payload_left == 0)
        payload_done(c);
}

/* Works on what lies in the staging buffer. */
static enum progress consume(struct nbd_connection *c)
{
    for (;;) {
        uint32_t have = c->in_to - c->in_from;
        if (c->state != NBD_SERVING) /* it said goodbye, or the server stops */
            return PROGRESS_ENDED;
        if (c->waiting != NULL && !prepare(c, c->waiting))
            return PROGRESS_STALLED;
        if (c->receiving != NULL) {
            if (have == 0)
                return PROGRESS_INPUT;
            copy_payload(c);
            continue;
        }
        if (c->drop_left > 0) {
            if (have == 0)
                return PROGRESS_INPUT;
            uint32_t n = c->drop_left < have ? (uint32_t)c->drop_left : have;
            c->in_from += n;
            c->drop_left -= n;
            continue;
        }
        if (have < VREP_NBD_REQUEST_BYTES)
            return PROGRESS_INPUT;
        struct vrep_nbd_request wire;
        if (vrep_nbd_request_decode(c->in + c->in_from, &wire) != VREP_OK) {
            nbd_end(c, "sent what is no request");
            return PROGRESS_ENDED;
        }
        if (wire.type == VREP_NBD_DISCONNECT) {
            c->state = NBD_FINISHING;
            return PROGRESS_ENDED;
        }
        const struct vrep_nbd_export *export = &c->server->exports.list[c->export];
        uint32_t error = vrep_nbd_request_check(&wire, export, c->structured, c->contexts);
        if (error != 0) {
            struct nbd_request *request = nbd_request_take(c);
            if (request == NULL)
                return PROGRESS_STALLED;
            request->wire = wire;
            nbd_reply_error(c, request, error, "the request is not allowed");
            if (wire.type == VREP_NBD_WRITE)
                c->drop_left = wire.length;
        } else if (!start(c, &wire)) {
            return PROGRESS_STALLED;
        }
        c->large = wire.type == VREP_NBD_WRITE && wire.length >= LARGE_BYTES;
        c->in_from += VREP_NBD_REQUEST_BYTES;
        c->server->received++;
        vrep_count(&c->client.traffic.requests, 1);
    }
}

/* One readv: the rest of a payload straight to its place, then the staging buffer. Behind a large
 * write little is asked for: of the next one only its header is to be copied. */
static ssize_t receive_some(struct nbd_connection *c, size_t *asked)
{
    struct iovec *iov = c->server->iov;
    uint32_t staged;
    int count = 0;
    uint64_t direct = 0;
    if (c->in_from == c->in_to) {
        c->in_from = c->in_to = 0;
    } else if (c->in_from > 0 && NBD_STAGING_BYTES - c->in_to < NBD_STAGING_BYTES / 2) {
        memmove(c->in, c->in + c->in_from, c->in_to - c->in_from);
        c->in_to -= c->in_from;
        c->in_from = 0;
    }
    bool whole = true;
    if (c->receiving != NULL) {
        uint64_t begin = c->receiving->wire.length - c->payload_left, at = 0;
        for (int i = 0; i < c->payload_count; i++) {
            uint64_t length = c->payload[i].iov_len;
            if (begin < at + length) {
                if (count == SEND_IOV_MAX - 1) {
                    whole = false;
                    break;
                }
                uint64_t within = begin > at ? begin - at : 0;
                iov[count++] = (struct iovec){(uint8_t *)c->payload[i].iov_base + within,
                                              (size_t)(length - within)};
                direct += length - within;
            }
            at += length;
        }
    }
    staged = NBD_STAGING_BYTES - c->in_to;
    if (c->large && staged > HEADERS_BYTES)
        staged = HEADERS_BYTES;
    if (whole)
        iov[count++] = (struct iovec){c->in + c->in_to, staged};
    *asked = direct + (whole ? staged : 0);
    ssize_t n;
    do
        n = readv(c->watch.fd, iov, count);
    while (n < 0 && errno == EINTR);
    if (n > 0) {
        uint64_t taken = (uint64_t)n < direct ? (uint64_t)n : direct;
        c->in_to += (uint32_t)((uint64_t)n - taken);
        if (c->receiving != NULL && taken > 0) {
            c->payload_left -= taken;
            if (c->payload_left == 0)
                payload_done(c);
        }
    }
    return n;
}

static void stall(struct nbd_connection *c)
{
    struct vrep_nbd_server *server = c->server;
    if (c->stalled)
        return;
    c->stalled = true;
    c->next_stalled = NULL;
    if (server->stalled_last != NULL)
        server->stalled_last->next_stalled = c;
    else
        server->stalled_first = c;
    server->stalled_last = c;
    vrep_count(&server->stats.stalls, 1);
}

void nbd_receive(struct nbd_connection *c)
{
    uint64_t share = RECEIVE_SHARE;
    while (c->state == NBD_SERVING && !c->stalled) {
        enum progress progress = consume(c);
        if (progress == PROGRESS_STALLED)
            stall(c);
        if (progress != PROGRESS_INPUT || !c->readable)
            return;
        if (share == 0) {
            nbd_activate(c);
            return;
        }
        size_t asked;
        ssize_t n = receive_some(c, &asked);
        if (n == 0 || (n < 0 && errno != EAGAIN)) {
            nbd_end(c, n == 0 ? "closed without goodbye" : strerror(errno));
            return;
        }
        if (n < 0) {
            c->readable = false;
            return;
        }
        /* Less than asked for: the socket is empty, and an event will tell of more; but of a peer
         * that is gone there is no second event. */
        if ((size_t)n < asked && !c->hangup)
            c->readable = false;
        share -= (uint64_t)n < share ? (uint64_t)n : share;
    }
}

/* ---- output ------------------------------------------------------------------------- */

static uint64_t reply_bytes(const struct nbd_request *request)
{
    return (uint64_t)request->header_bytes + request->buffer.bytes;
}

/* As many replies as fit one call; neighbouring headers are joined. */
static int gather(struct nbd_connection *c, uint64_t *bytes)
{
    struct vrep_nbd_server *server = c->server;
    struct iovec *iov = server->iov;
    int count = 0;
    uint32_t used = 0;
    uint64_t skip = c->out_sent;
    bool joins = false;
    *bytes = 0;
    for (struct nbd_request *r = c->out_first; r != NULL; r = r->next) {
        if (count + 2 > SEND_IOV_MAX || used + VREP_NBD_ERROR_MAX > sizeof server->headers)
            break;
        uint32_t header = r->header_bytes, from = 0;
        if (skip < header) {
            header -= (uint32_t)skip;
            memcpy(server->headers + used, r->header + skip, header);
            if (joins)
                iov[count - 1].iov_len += header;
            else
                iov[count++] = (struct iovec){server->headers + used, header};
            used += header;
            *bytes += header;
            joins = true;
        } else {
            from = (uint32_t)(skip - header);
        }
        skip = 0;
        if (r->buffer.bytes > from) {
            int parts = vrep_buffers_iov(server->buffers, &r->buffer, from, iov + count,
                                         SEND_IOV_MAX - count);
            for (int i = 0; i < parts; i++) {
                *bytes += iov[count + i].iov_len;
                from += (uint32_t)iov[count + i].iov_len;
            }
            count += parts;
            joins = false;
            if (from < r->buffer.bytes)
                break;
        }
    }
    return count;
}

static void sent(struct nbd_connection *c, uint64_t bytes)
{
    c->out_sent += bytes;
    while (c->out_first != NULL && c->out_sent >= reply_bytes(c->out_first)) {
        struct nbd_request *request = c->out_first;
        c->out_sent -= reply_bytes(request);
        c->out_first = request->next;
        if (c->out_first == NULL)
            c->out_last = NULL;
        nbd_request_give(c->server, request);
    }
}

void nbd_send(struct nbd_connection *c)
{
    while (c->out_first != NULL && !c->blocked) {
        uint64_t bytes;
        struct msghdr message = {.msg_iov = c->server->iov};
        message.msg_iovlen = (size_t)gather(c, &bytes);
        ssize_t n = sendmsg(c->watch.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN) {
            c->blocked = true;
            (void)vrep_loop_change(c->server->loop, &c->watch,
                                   EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
            return;
        }
        if (n < 0) {
            nbd_end(c, strerror(errno));
            return;
        }
        sent(c, (uint64_t)n);
    }
}
