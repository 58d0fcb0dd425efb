#include "serve/vhost.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status.h"
#include "serve/vhost_internal.h"

#define MESSAGES_A_TURN 64

static const uint64_t PROTOCOL_FEATURES =
    UINT64_C(1) << VREP_VHOST_P_MQ | UINT64_C(1) << VREP_VHOST_P_LOG_SHMFD |
    UINT64_C(1) << VREP_VHOST_P_REPLY_ACK | UINT64_C(1) << VREP_VHOST_P_BACKEND_REQ |
    UINT64_C(1) << VREP_VHOST_P_CONFIG | UINT64_C(1) << VREP_VHOST_P_INFLIGHT_SHMFD |
    UINT64_C(1) << VREP_VHOST_P_RESET_DEVICE | UINT64_C(1) << VREP_VHOST_P_CONFIGURE_MEM_SLOTS;

static uint64_t features_of(const struct vrep_vhost_server *server)
{
    return UINT64_C(1) << VREP_VIRTIO_BLK_SEG_MAX | UINT64_C(1) << VREP_VIRTIO_BLK_BLK_SIZE |
           UINT64_C(1) << VREP_VIRTIO_BLK_FLUSH | UINT64_C(1) << VREP_VIRTIO_BLK_MQ |
           UINT64_C(1) << VREP_VIRTIO_BLK_DISCARD | UINT64_C(1) << VREP_VIRTIO_BLK_WRITE_ZEROES |
           (uint64_t)server->read_only << VREP_VIRTIO_BLK_RO | UINT64_C(1) << VREP_VHOST_F_LOG_ALL |
           UINT64_C(1) << VREP_VIRTIO_RING_INDIRECT | UINT64_C(1) << VREP_VIRTIO_RING_EVENT_IDX |
           UINT64_C(1) << VREP_VHOST_F_PROTOCOL_FEATURES | UINT64_C(1) << VREP_VIRTIO_VERSION_1;
}

static bool speaks(const struct vhost_connection *c, int feature)
{
    return (c->protocol >> feature & 1) != 0;
}

/* ---- queues ------------------------------------------------------------------------ */

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void forget_kick(struct vhost_queue *queue)
{
    if (queue->kick.fd < 0)
        return;
    vrep_loop_forget(queue->connection->server->loop, &queue->kick);
    close_fd(&queue->kick.fd);
}

/* A request that was taken and waits for memory: it was never submitted. */
static void drop_waiting(struct vhost_queue *queue)
{
    struct vhost_request *request = queue->waiting;
    struct vhost_connection *c = queue->connection;
    if (request == NULL)
        return;
    queue->waiting = NULL;
    vrep_command_put(request->command);
    if (request->before != NULL)
        request->before->after = request->after;
    else
        c->requests = request->after;
    if (request->after != NULL)
        request->after->before = request->before;
    vhost_request_give(c->server, request);
}

static void queue_ready(struct vrep_watch *watch, uint32_t events)
{
    struct vhost_queue *queue =
        (struct vhost_queue *)(void *)((char *)watch - offsetof(struct vhost_queue, kick));
    uint64_t count;
    (void)events;
    if (watch->fd < 0)
        return;
    while (read(watch->fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
    queue->again = true;
}

/* The part of a queue in the region, whose parts are made for the largest one. */
static struct vrep_vhost_inflight_queue *kept_of(const struct vhost_connection *c,
                                                 const struct vhost_queue *queue)
{
    size_t bytes = VREP_VHOST_INFLIGHT_BYTES(c->inflight_size);
    if (queue->size > c->inflight_size || (queue->number + 1u) * bytes > c->inflight_bytes)
        return NULL;
    return (struct vrep_vhost_inflight_queue *)(void *)(c->inflight_at + queue->number * bytes);
}

static int start_queue(struct vhost_connection *c, struct vhost_queue *queue)
{
    queue->kept = NULL;
    if (speaks(c, VREP_VHOST_P_INFLIGHT_SHMFD) && c->inflight_at != NULL) {
        queue->kept = kept_of(c, queue);
        if (queue->kept == NULL)
            return VREP_E_PROTOCOL;
    }
    if (!(c->features >> VREP_VHOST_F_PROTOCOL_FEATURES & 1))
        queue->enabled = true;
    return vhost_queue_start(queue, c->memory);
}

/* ---- connections -------------------------------------------------------------------- */

static void close_fds(struct vrep_vhost_message *message)
{
    for (uint32_t i = 0; i < message->fds_count; i++)
        close_fd(&message->fds[i]);
    message->fds_count = 0;
}

/* The one descriptor of a message, or -1. Nothing waits at what a monitor gave. */
static int take_fd(struct vrep_vhost_message *message)
{
    int fd = message->fds_count > 0 ? message->fds[0] : -1;
    if (fd < 0)
        return -1;
    message->fds[0] = -1;
    (void)fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    return fd;
}

static void drop_inflight(struct vhost_connection *c)
{
    if (c->inflight != NULL)
        munmap(c->inflight, c->inflight_mapped);
    c->inflight = NULL;
    c->inflight_at = NULL;
    c->inflight_bytes = 0;
}

void vhost_end(struct vhost_connection *c, const char *why)
{
    struct vrep_vhost_server *server = c->server;
    if (!c->open)
        return;
    if (why != NULL)
        VREP_INFO("vhost", "%s: connection ended: %s", server->listener.path, why);
    for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX; i++) {
        struct vhost_queue *queue = &c->queue[i];
        drop_waiting(queue);
        forget_kick(queue);
        close_fd(&queue->call_fd);
        close_fd(&queue->error_fd);
        /* What was given this turn is told: it is done. */
        if (queue->started)
            vhost_queue_publish(queue);
        vhost_queue_stop(queue);
    }
    for (struct vhost_request *r = c->requests; r != NULL; r = r->after) {
        r->queue = NULL;
        server->orphans++;
    }
    c->requests = NULL;
    vrep_loop_forget(server->loop, &c->watch);
    close_fd(&c->watch.fd);
    close_fds(&c->message);
    close_fd(&c->backend_fd);
    vhost_memory_let(c->memory);
    c->memory = NULL;
    vhost_log_close(&c->log);
    drop_inflight(c);
    pthread_mutex_lock(&server->lock);
    c->open = false;
    server->stats.address[0] = 0;
    pthread_mutex_unlock(&server->lock);
}

static void reset_queue(struct vhost_connection *c, uint32_t number)
{
    struct vhost_queue *queue = &c->queue[number];
    *queue = (struct vhost_queue){
        .kick = {-1, queue_ready},
        .connection = c,
        .call_fd = -1,
        .error_fd = -1,
        .number = (uint16_t)number,
    };
}

/* ---- replies -------------------------------------------------------------------------- */

static bool send_message(int socket, const struct vrep_vhost_header *header, const void *body,
                         int fd)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec iov[2] = {{(void *)(uintptr_t)header, sizeof *header},
                           {(void *)(uintptr_t)body, header->bytes}};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};
    if (fd >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *one = CMSG_FIRSTHDR(&message);
        one->cmsg_level = SOL_SOCKET;
        one->cmsg_type = SCM_RIGHTS;
        one->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(one), &fd, sizeof fd);
    }
    ssize_t n;
    do
        n = sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    /* A socket that has no room for so little is not read from any more. */
    return n == (ssize_t)(sizeof *header + header->bytes);
}

static int reply(struct vhost_connection *c, const void *body, uint32_t bytes, int fd)
{
    struct vrep_vhost_header header = {c->message.header.request,
                                       VREP_VHOST_VERSION | VREP_VHOST_REPLY, bytes};
    return send_message(c->watch.fd, &header, body, fd) ? VREP_OK : VREP_E_CLOSED;
}

static int reply_number(struct vhost_connection *c, uint64_t number)
{
    return reply(c, &number, sizeof number, -1);
}

/* ---- messages --------------------------------------------------------------------------- */

/* What a handler says of a message besides a status: it answered by itself. */
#define ANSWERED 1

static int set_features(struct vhost_connection *c, uint64_t features)
{
    if (features & ~features_of(c->server))
        return VREP_E_UNSUPPORTED;
    c->features = features;
    if (!(features >> VREP_VHOST_F_LOG_ALL & 1))
        vhost_log_close(&c->log);
    return VREP_OK;
}

/* Queues that run look their rings up in the new memory. */
static int use_memory(struct vhost_connection *c, struct vhost_memory *memory)
{
    int status = VREP_OK;
    for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX && status == VREP_OK; i++)
        if (c->queue[i].started)
            status = vhost_queue_remap(&c->queue[i], memory);
    vhost_memory_let(c->memory);
    c->memory = memory;
    return status;
}

static int set_memory(struct vhost_connection *c)
{
    struct vrep_vhost_message *message = &c->message;
    struct vhost_memory *memory = vhost_memory_create(), *more;
    int status = VREP_OK;
    if (memory == NULL)
        return VREP_E_NOMEM;
    for (uint32_t i = 0; i < message->body.regions.count; i++) {
        struct vrep_vhost_region region = message->body.regions.region[i];
        more = vhost_memory_with(memory, &region, message->fds[i], &status);
        vhost_memory_let(memory);
        if (more == NULL)
            return status;
        memory = more;
    }
    return use_memory(c, memory);
}

static int change_memory(struct vhost_connection *c, bool add)
{
    struct vrep_vhost_region region = c->message.body.one.region;
    int status = VREP_E_NOT_FOUND;
    struct vhost_memory *base = c->memory != NULL ? c->memory : vhost_memory_create(), *made;
    if (base == NULL)
        return VREP_E_NOMEM;
    if (add)
        made = vhost_memory_with(base, &region, c->message.fds[0], &status);
    else
        made = vhost_memory_without(base, &region);
    if (c->memory == NULL)
        vhost_memory_let(base);
    return made == NULL ? status : use_memory(c, made);
}

static int set_log(struct vhost_connection *c)
{
    const struct vrep_vhost_log *log = &c->message.body.log;
    int status = vhost_log_open(&c->log, c->message.fds[0], log->offset, log->bytes);
    if (status != VREP_OK)
        return status;
    if (!speaks(c, VREP_VHOST_P_LOG_SHMFD))
        return VREP_OK;
    return reply_number(c, 0) == VREP_OK ? ANSWERED : VREP_E_CLOSED;
}

static int set_address(struct vhost_connection *c)
{
    const struct vrep_vhost_address *address = &c->message.body.address;
    struct vhost_queue *queue = &c->queue[address->queue];
    queue->log_used = (address->flags & 1) != 0;
    queue->address_log = address->log;
    if (queue->started && queue->address_descriptors == address->descriptors &&
        queue->address_available == address->available && queue->address_used == address->used)
        return VREP_OK; /* only whether it is logged */
    if (queue->started)
        return VREP_E_PROTOCOL;
    queue->address_descriptors = address->descriptors;
    queue->address_available = address->available;
    queue->address_used = address->used;
    return VREP_OK;
}

static int set_kick(struct vhost_connection *c)
{
    struct vhost_queue *queue = &c->queue[c->message.body.number & 0xff];
    if (queue->started)
        return VREP_E_PROTOCOL;
    if (c->message.fds_count == 0)
        return VREP_E_UNSUPPORTED; /* polling a guest's memory would cost a processor */
    forget_kick(queue);
    queue->kick.fd = take_fd(&c->message);
    int status = start_queue(c, queue);
    if (status == VREP_OK)
        status = vrep_loop_watch(c->server->loop, &queue->kick, EPOLLIN);
    if (status != VREP_OK) {
        close_fd(&queue->kick.fd);
        vhost_queue_stop(queue);
    }
    return status;
}

static int set_event(struct vhost_connection *c, bool error)
{
    struct vhost_queue *queue = &c->queue[c->message.body.number & 0xff];
    int *fd = error ? &queue->error_fd : &queue->call_fd;
    close_fd(fd);
    *fd = take_fd(&c->message);
    if (!error && *fd >= 0) {
        /* What was complete before: one interrupt too many does no harm. */
        uint64_t one = 1;
        if (queue->started && write(*fd, &one, sizeof one) < 0)
            return VREP_E_IO;
    }
    return VREP_OK;
}

static int answer_base(struct vhost_connection *c, struct vhost_queue *queue)
{
    struct vrep_vhost_state state = {queue->number, queue->seen};
    vhost_queue_publish(queue);
    forget_kick(queue);
    close_fd(&queue->call_fd);
    vhost_queue_stop(queue);
    c->draining = -1;
    return reply(c, &state, sizeof state, -1) == VREP_OK ? ANSWERED : VREP_E_CLOSED;
}

/* The queue stops once nothing of it is in flight; until then no other message is looked at. */
static int get_base(struct vhost_connection *c)
{
    struct vhost_queue *queue = &c->queue[c->message.body.state.queue];
    if (!queue->started) {
        forget_kick(queue);
        return answer_base(c, queue);
    }
    queue->stopping = true;
    c->draining = queue->number;
    return ANSWERED;
}

static int get_config(struct vhost_connection *c)
{
    struct vrep_vhost_config *config = &c->message.body.config;
    uint8_t all[sizeof config->data] = {0};
    vrep_virtio_config(&c->server->info, all);
    memcpy(config->data, all + config->offset, config->bytes);
    return reply(c, config, c->message.header.bytes, -1) == VREP_OK ? ANSWERED : VREP_E_CLOSED;
}

static int map_inflight(struct vhost_connection *c, int fd)
{
    const struct vrep_vhost_inflight *is = &c->message.body.inflight;
    void *mapped;
    size_t mapped_bytes;
    uint8_t *at;
    for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX; i++)
        if (c->queue[i].started)
            return VREP_E_PROTOCOL;
    int status = vhost_map(fd, is->offset, is->bytes, &mapped, &mapped_bytes, &at);
    if (status != VREP_OK)
        return status;
    if ((uintptr_t)at % 8 != 0) {
        munmap(mapped, mapped_bytes);
        return VREP_E_PROTOCOL;
    }
    drop_inflight(c);
    c->inflight = mapped;
    c->inflight_mapped = mapped_bytes;
    c->inflight_at = at;
    c->inflight_bytes = is->bytes;
    c->inflight_size = is->queue_size;
    return VREP_OK;
}

static int get_inflight(struct vhost_connection *c)
{
    struct vrep_vhost_inflight *asked = &c->message.body.inflight;
    size_t bytes = asked->queues * VREP_VHOST_INFLIGHT_BYTES(asked->queue_size);
    int fd = memfd_create("vrep-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) {
        close_fd(&fd);
        return VREP_E_NOMEM;
    }
    asked->bytes = bytes;
    asked->offset = 0;
    int status = map_inflight(c, fd);
    if (status == VREP_OK)
        status = reply(c, asked, c->message.header.bytes, fd) == VREP_OK ? ANSWERED : VREP_E_CLOSED;
    close(fd);
    return status;
}

static int set_queue_size(struct vhost_connection *c)
{
    struct vhost_queue *queue = &c->queue[c->message.body.state.queue];
    if (queue->started)
        return VREP_E_PROTOCOL;
    queue->size = c->message.body.state.number;
    return VREP_OK;
}

static int set_base(struct vhost_connection *c)
{
    struct vhost_queue *queue = &c->queue[c->message.body.state.queue];
    if (queue->started)
        return VREP_E_PROTOCOL;
    queue->seen = (uint16_t)c->message.body.state.number;
    return VREP_OK;
}

static int handle(struct vhost_connection *c)
{
    struct vrep_vhost_message *message = &c->message;
    struct vrep_vhost_server *server = c->server;
    struct vhost_queue *queue;
    switch (message->header.request) {
    case VREP_VHOST_GET_FEATURES:
        return reply_number(c, features_of(server)) == VREP_OK ? ANSWERED : VREP_E_CLOSED;
    case VREP_VHOST_SET_FEATURES:
        return set_features(c, message->body.number);
    case VREP_VHOST_GET_PROTOCOL_FEATURES:
        return reply_number(c, PROTOCOL_FEATURES) == VREP_OK ? ANSWERED : VREP_E_CLOSED;
    case VREP_VHOST_SET_PROTOCOL_FEATURES:
        if (message->body.number & ~PROTOCOL_FEATURES)
            return VREP_E_UNSUPPORTED;
        c->protocol = message->body.number;
        return VREP_OK;
    case VREP_VHOST_GET_QUEUE_NUM:
        return reply_number(c, server->info.queues) == VREP_OK ? ANSWERED : VREP_E_CLOSED;
    case VREP_VHOST_GET_MAX_MEM_SLOTS:
        return reply_number(c, VREP_VHOST_REGIONS_MAX) == VREP_OK ? ANSWERED : VREP_E_CLOSED;
    case VREP_VHOST_SET_OWNER:
    case VREP_VHOST_SET_LOG_FD:
        return VREP_OK;
    case VREP_VHOST_RESET_OWNER:
    case VREP_VHOST_RESET_DEVICE:
        for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX; i++)
            c->queue[i].enabled = false;
        return VREP_OK;
    case VREP_VHOST_SET_MEM_TABLE:
        return set_memory(c);
    case VREP_VHOST_ADD_MEM_REG:
        return change_memory(c, true);
    case VREP_VHOST_REM_MEM_REG:
        return change_memory(c, false);
    case VREP_VHOST_SET_LOG_BASE:
        return set_log(c);
    case VREP_VHOST_SET_VRING_NUM:
        return set_queue_size(c);
    case VREP_VHOST_SET_VRING_ADDR:
        return set_address(c);
    case VREP_VHOST_SET_VRING_BASE:
        return set_base(c);
    case VREP_VHOST_GET_VRING_BASE:
        return get_base(c);
    case VREP_VHOST_SET_VRING_KICK:
        return set_kick(c);
    case VREP_VHOST_SET_VRING_CALL:
        return set_event(c, false);
    case VREP_VHOST_SET_VRING_ERR:
        return set_event(c, true);
    case VREP_VHOST_SET_VRING_ENABLE:
        queue = &c->queue[message->body.state.queue];
        queue->enabled = message->body.state.number != 0;
        queue->again = queue->again || queue->enabled;
        return VREP_OK;
    case VREP_VHOST_SET_BACKEND_REQ_FD:
        close_fd(&c->backend_fd);
        c->backend_fd = take_fd(message);
        return VREP_OK;
    case VREP_VHOST_GET_CONFIG:
        return get_config(c);
    case VREP_VHOST_SET_CONFIG:
        return VREP_E_READONLY; /* nothing in it can be written: no write cache mode is offered */
    case VREP_VHOST_GET_INFLIGHT_FD:
        return get_inflight(c);
    case VREP_VHOST_SET_INFLIGHT_FD:
        return map_inflight(c, message->fds[0]);
    default:
        return VREP_E_UNSUPPORTED;
    }
}

/* A whole message. False: the connection ended. */
static bool take_message(struct vhost_connection *c)
{
    bool wants =
        speaks(c, VREP_VHOST_P_REPLY_ACK) && (c->message.header.flags & VREP_VHOST_NEED_REPLY) != 0;
    int status = vrep_vhost_check(&c->message);
    if (status == VREP_OK)
        status = handle(c);
    if (status == VREP_OK && wants)
        status = reply_number(c, 0);
    else if (status < 0 && wants && status != VREP_E_CLOSED)
        /* It was asked for, and learns that it did not work. */
        status = reply_number(c, 1) == VREP_OK ? VREP_OK : VREP_E_CLOSED;
    close_fds(&c->message);
    c->received = 0;
    if (status < 0) {
        char why[96];
        snprintf(why, sizeof why, "request %u: %s", (unsigned)c->message.header.request,
                 vrep_status_text(status));
        vhost_end(c, why);
        return false;
    }
    return true;
}

/* ---- receiving --------------------------------------------------------------------------- */

static bool keep_fds(struct vhost_connection *c, struct msghdr *received)
{
    bool room = (received->msg_flags & MSG_CTRUNC) == 0;
    for (struct cmsghdr *one = CMSG_FIRSTHDR(received); one != NULL;
         one = CMSG_NXTHDR(received, one)) {
        if (one->cmsg_level != SOL_SOCKET || one->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (one->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(one) + i * sizeof fd, sizeof fd);
            if (c->message.fds_count < VREP_VHOST_REGIONS_MESSAGE)
                c->message.fds[c->message.fds_count++] = fd;
            else {
                close(fd);
                room = false;
            }
        }
    }
    return room;
}

/* Receives what is missing of header or body. 1: it is whole; 0: later; -1: the connection ended.
 */
static int receive_part(struct vhost_connection *c, void *whole, uint32_t from, uint32_t bytes)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(VREP_VHOST_REGIONS_MESSAGE * sizeof(int))];
    } control;
    while (c->received - from < bytes) {
        uint32_t have = c->received - from;
        struct iovec iov = {(uint8_t *)whole + have, bytes - have};
        struct msghdr message = {.msg_iov = &iov,
                                 .msg_iovlen = 1,
                                 .msg_control = &control,
                                 .msg_controllen = sizeof control};
        ssize_t n = recvmsg(c->watch.fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN) {
            c->readable = false;
            return 0;
        }
        if (n <= 0) {
            vhost_end(c, n == 0 ? "its peer is gone" : strerror(errno));
            return -1;
        }
        c->received += (uint32_t)n;
        if (!keep_fds(c, &message)) {
            vhost_end(c, "sent more descriptors than a message has");
            return -1;
        }
    }
    return 1;
}

static void receive(struct vhost_connection *c)
{
    struct vrep_vhost_header *header = &c->message.header;
    for (int i = 0; i < MESSAGES_A_TURN && c->open && c->readable && c->draining < 0; i++) {
        if (c->received < sizeof *header && receive_part(c, header, 0, sizeof *header) <= 0)
            return;
        int status = vrep_vhost_check_header(header);
        if (status != VREP_OK && status != VREP_E_UNSUPPORTED) {
            vhost_end(c, "sent what is no message");
            return;
        }
        if (receive_part(c, c->message.body.raw, sizeof *header, header->bytes) <= 0)
            return;
        if (!take_message(c))
            return;
    }
}

static void connection_ready(struct vrep_watch *watch, uint32_t events)
{
    struct vhost_connection *c =
        (struct vhost_connection *)(void *)((char *)watch -
                                            offsetof(struct vhost_connection, watch));
    (void)events;
    if (watch->fd < 0)
        return;
    c->readable = true;
    receive(c);
}

/* ---- accepting ---------------------------------------------------------------------------- */

static bool peer_is_gone(const struct vhost_connection *c)
{
    struct pollfd look = {.fd = c->watch.fd, .events = POLLRDHUP};
    return poll(&look, 1, 0) == 1 && look.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

static void open_connection(struct vrep_vhost_server *server, int fd)
{
    struct vhost_connection *c = &server->connection;
    struct ucred who = {0};
    socklen_t bytes = sizeof who;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    (void)getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &bytes);
    pthread_mutex_lock(&server->lock);
    *c = (struct vhost_connection){
        .watch = {fd, connection_ready},
        .server = server,
        .open = true,
        .backend_fd = -1,
        .draining = -1,
    };
    for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX; i++)
        reset_queue(c, i);
    snprintf(server->stats.address, sizeof server->stats.address, "unix pid %d uid %u",
             (int)who.pid, (unsigned)who.uid);
    server->stats.connected_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    pthread_mutex_unlock(&server->lock);
    vhost_count(&server->stats.accepted, 1);
    VREP_INFO("vhost", "%s: connected: %s", server->listener.path, server->stats.address);
    int status = vrep_loop_watch(server->loop, &c->watch, EPOLLIN | EPOLLRDHUP);
    if (status != VREP_OK)
        vhost_end(c, vrep_status_text(status));
}

static void listener_ready(struct vrep_watch *watch, uint32_t events)
{
    struct vrep_vhost_server *server =
        (struct vrep_vhost_server *)(void *)((char *)watch -
                                             offsetof(struct vrep_vhost_server, listener_watch));
    (void)events;
    if (watch->fd < 0)
        return;
    int fd = accept4(watch->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
        if (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR)
            VREP_WARN("vhost", "accept: %s", strerror(errno));
        return;
    }
    struct vhost_connection *c = &server->connection;
    if (c->open && peer_is_gone(c))
        vhost_end(c, "its peer is gone and another one came");
    if (c->open || server->stopping) {
        VREP_WARN("vhost", "%s: a second monitor is refused", server->listener.path);
        vhost_count(&server->stats.refused, 1);
        close(fd);
        return;
    }
    open_connection(server, fd);
}

/* ---- the loop's side ------------------------------------------------------------------------- */

static bool front_turn(struct vrep_front *front)
{
    struct vrep_vhost_server *server = (struct vrep_vhost_server *)front;
    struct vhost_connection *c = &server->connection;
    /* Nothing starts before everything of an earlier connection is complete. */
    bool serves = c->open && server->orphans == 0 && !server->stopping;
    for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX && c->open; i++) {
        struct vhost_queue *queue = &c->queue[i];
        if (!queue->started)
            continue;
        if (serves && queue->again && (queue->enabled || queue->stopping))
            queue->again = !vhost_block_run(queue);
        vhost_queue_publish(queue);
        if (queue->stopping && server->orphans == 0 && vhost_queue_is_drained(queue)) {
            if (answer_base(c, queue) < 0)
                vhost_end(c, "does not read its answers");
            else
                receive(c);
        }
    }
    if (server->stopping && c->open && c->requests == NULL)
        vhost_end(c, "the server stops");
    front->requests = server->received;
    server->received = 0;
    return false; /* what waits, waits for an event */
}

/* A queue that found no room looks again in each turn. */
static void front_wakeup(struct vrep_front *front)
{
    (void)front;
}

static void front_stop(struct vrep_front *front, bool drain)
{
    struct vrep_vhost_server *server = (struct vrep_vhost_server *)front;
    struct vhost_connection *c = &server->connection;
    server->stopping = true;
    if (server->listener_watch.fd >= 0)
        vrep_loop_forget(server->loop, &server->listener_watch);
    server->listener_watch.fd = -1;
    vrep_listen_close(&server->listener);
    for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX && c->open; i++)
        drop_waiting(&c->queue[i]);
    if (c->open && (!drain || c->requests == NULL))
        vhost_end(c, "the server stops");
}

static bool front_idle(const struct vrep_front *front)
{
    const struct vrep_vhost_server *server = (const struct vrep_vhost_server *)front;
    return server->inflight == 0 && !server->connection.open;
}

/* ---- the outside -------------------------------------------------------------------------- */

int vrep_vhost_create(struct vrep_loop *loop, const struct vrep_vhost_config_server *config,
                      struct vrep_vhost_server **out)
{
    struct vrep_group *group = vrep_loop_group(loop);
    struct vrep_disk_info info = {0};
    uint32_t block = config->block_bytes != 0 ? config->block_bytes : VREP_VHOST_SECTOR;
    if (config->disk >= vrep_group_disks(group) || config->queues > VREP_VHOST_QUEUES_MAX ||
        (block != 512 && block != 4096) || vrep_group_disk_bytes(group, config->disk) % block != 0)
        return VREP_E_INVALID;
    struct vrep_vhost_server *server = calloc(1, sizeof *server);
    if (server == NULL)
        return VREP_E_NOMEM;
    server->front = (struct vrep_front){front_turn, front_wakeup, front_stop, front_idle, 0};
    server->loop = loop;
    server->group = group;
    server->disk = config->disk;
    server->listener.fd = server->listener_watch.fd = -1;
    server->connection.watch.fd = server->connection.backend_fd = -1;
    server->connection.server = server;
    pthread_mutex_init(&server->lock, NULL);
    server->read_only =
        vrep_disk_info(vrep_group_disk(group, config->disk), &info) == VREP_OK && info.read_only;
    server->info = (struct vrep_virtio_disk){
        .bytes = vrep_group_disk_bytes(group, config->disk),
        .block_bytes = block,
        .queues = config->queues != 0 ? config->queues : VREP_VHOST_QUEUES_MAX,
    };
    snprintf(server->serial, sizeof server->serial, "%s",
             vrep_group_disk_name(group, config->disk));
    server->requests = calloc(VHOST_REQUESTS, sizeof *server->requests);
    int status = server->requests == NULL ? VREP_E_NOMEM : VREP_OK;
    for (uint32_t i = 0; status == VREP_OK && i < VHOST_REQUESTS; i++) {
        server->requests[i].server = server;
        vhost_request_give(server, &server->requests[i]);
    }
    if (status == VREP_OK)
        status = vrep_listen_unix(config->unix_path, config->unix_mode, config->unix_group,
                                  &server->listener);
    server->listener_watch = (struct vrep_watch){server->listener.fd, listener_ready};
    if (status == VREP_OK)
        status = vrep_loop_watch(loop, &server->listener_watch, EPOLLIN);
    if (status == VREP_OK)
        status = vrep_loop_add_front(loop, &server->front);
    if (status != VREP_OK) {
        vrep_vhost_destroy(server);
        return status;
    }
    *out = server;
    return VREP_OK;
}

void vrep_vhost_destroy(struct vrep_vhost_server *server)
{
    if (server == NULL)
        return;
    vhost_end(&server->connection, "the server ends");
    if (server->listener_watch.fd >= 0)
        vrep_loop_forget(server->loop, &server->listener_watch);
    vrep_listen_close(&server->listener);
    /* Of commands that never ended: the group was closed, nothing uses it any more. */
    for (uint32_t i = 0; server->requests != NULL && i < VHOST_REQUESTS; i++)
        vhost_memory_let(server->requests[i].memory);
    free(server->requests);
    pthread_mutex_destroy(&server->lock);
    free(server);
}

void vrep_vhost_resized(struct vrep_vhost_server *server)
{
    struct vhost_connection *c = &server->connection;
    struct vrep_vhost_header header = {VREP_VHOST_BACKEND_CONFIG_CHANGE, VREP_VHOST_VERSION, 0};
    server->info.bytes = vrep_group_disk_bytes(server->group, server->disk);
    if (c->open && c->backend_fd >= 0 && speaks(c, VREP_VHOST_P_BACKEND_REQ) &&
        !send_message(c->backend_fd, &header, NULL, -1))
        VREP_WARN("vhost", "%s: the monitor was not told of the new size", server->listener.path);
}

void vrep_vhost_stats(struct vrep_vhost_server *server, struct vrep_vhost_stats *out)
{
    struct vrep_vhost_stats *stats = &server->stats;
    pthread_mutex_lock(&server->lock);
    *out = (struct vrep_vhost_stats){.connected_ns = stats->connected_ns};
    memcpy(out->address, stats->address, sizeof out->address);
    pthread_mutex_unlock(&server->lock);
    out->accepted = vrep_load_relaxed_u64(&stats->accepted);
    out->refused = vrep_load_relaxed_u64(&stats->refused);
    out->requests = vrep_load_relaxed_u64(&stats->requests);
    out->read_bytes = vrep_load_relaxed_u64(&stats->read_bytes);
    out->written_bytes = vrep_load_relaxed_u64(&stats->written_bytes);
    out->errors = vrep_load_relaxed_u64(&stats->errors);
    out->resubmitted = vrep_load_relaxed_u64(&stats->resubmitted);
    out->stalls = vrep_load_relaxed_u64(&stats->stalls);
}
