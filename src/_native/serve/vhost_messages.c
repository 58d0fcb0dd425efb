#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status.h"
#include "serve/vhost_internal.h"

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

void vhost_forget_kick(struct vhost_queue *queue)
{
    if (queue->kick.fd < 0)
        return;
    vrep_loop_forget(queue->connection->server->loop, &queue->kick);
    vhost_close_fd(&queue->kick.fd);
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

/* ---- whose the disk is --------------------------------------------------------------- */

/* What became of the guest is written into the region too: the monitor keeps it, and whoever serves
 * next knows. */
static void note(struct vhost_connection *c)
{
    if (c->inflight_at == NULL || c->inflight_bytes < sizeof(struct vrep_vhost_inflight_queue))
        return;
    struct vrep_vhost_inflight_queue *first =
        (struct vrep_vhost_inflight_queue *)(void *)c->inflight_at;
    uint64_t others = first->features & ~(VREP_VHOST_INFLIGHT_MOVED | VREP_VHOST_INFLIGHT_LEFT);
    first->features = others | (c->moved ? VREP_VHOST_INFLIGHT_MOVED : 0) |
                      (c->left ? VREP_VHOST_INFLIGHT_LEFT : 0);
}

/* The same from a region that was kept. */
static void recall(struct vhost_connection *c)
{
    if (c->inflight_bytes < sizeof(struct vrep_vhost_inflight_queue))
        return;
    const struct vrep_vhost_inflight_queue *first =
        (const struct vrep_vhost_inflight_queue *)(void *)c->inflight_at;
    c->moved = c->moved || (first->features & VREP_VHOST_INFLIGHT_MOVED) != 0;
    c->left = c->left || (first->features & VREP_VHOST_INFLIGHT_LEFT) != 0;
}

/* A monitor whose guest moved still has chains in its memory that the guest's new place does too:
 * done again later, they would put old bytes over new ones. */
static void bar(struct vhost_connection *c)
{
    if (!c->moved || c->left || !c->server->taken_over)
        return;
    c->left = true;
    note(c);
    VREP_WARN("vhost", "%s: the guest of %s goes on elsewhere: it is served no more",
              c->server->accept.listener.path,
              c->server->stats.monitor[c - c->server->connection].address);
}

void vhost_guest_runs(struct vhost_connection *c)
{
    struct vrep_vhost_server *server = c->server;
    c->runs = true;
    c->moved = false;
    note(c);
    server->taken_over = true;
    for (uint32_t i = 0; i < VREP_VHOST_MONITORS_MAX; i++)
        if (server->connection[i].open)
            bar(&server->connection[i]);
}

/* Another monitor's guest may use the disk: two that write at once would be two orders. One that
 * stopped without the log may go on at any moment (it is paused); one that moved may not, unless
 * nobody took the disk over. A monitor whose guest moved, and that finds another server, starts its
 * queues, though nothing runs its guest: until that is seen to run, the disk is the other's. */
static bool may_use(struct vhost_connection *c)
{
    const struct vhost_connection *holder = c->server->holder;
    bar(c);
    return !c->left && (holder == NULL || holder == c || holder->moved);
}

/* A monitor that came back may know another size: a disk is resized between two connections.  It
 * looks, and tells its guest what is new. */
static void tell_config(struct vhost_connection *c)
{
    struct vrep_vhost_header header = {VREP_VHOST_BACKEND_CONFIG_CHANGE, VREP_VHOST_VERSION, 0};
    if (c->backend_fd >= 0 && vhost_speaks(c, VREP_VHOST_P_BACKEND_REQ) &&
        !vhost_send(c->backend_fd, &header, NULL, -1))
        VREP_WARN("vhost", "%s: the monitor was not told to look at the size",
                  c->server->accept.listener.path);
}

static int start_queue(struct vhost_connection *c, struct vhost_queue *queue)
{
    if (!may_use(c))
        return VREP_E_BUSY;
    queue->kept = NULL;
    if (vhost_speaks(c, VREP_VHOST_P_INFLIGHT_SHMFD) && c->inflight_at != NULL) {
        queue->kept = kept_of(c, queue);
        if (queue->kept == NULL)
            return VREP_E_PROTOCOL;
    }
    if (!(c->features >> VREP_VHOST_F_PROTOCOL_FEATURES & 1))
        queue->enabled = true;
    bool first = !vhost_uses(c);
    int status = vhost_queue_start(queue, c->memory);
    if (status != VREP_OK)
        return status;
    struct vhost_connection *before = c->server->holder;
    if (before != NULL && before != c && vhost_uses(before))
        vhost_end(before, "its guest arrived elsewhere");
    vhost_hold(c->server, c);
    if (first) {
        c->runs = false;
        c->moved = c->moved && before == NULL; /* it came back, and may have been left */
        note(c);
        tell_config(c);
    }
    return VREP_OK;
}

void vhost_close_fds(struct vrep_vhost_message *message)
{
    for (uint32_t i = 0; i < message->fds_count; i++)
        vhost_close_fd(&message->fds[i]);
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

void vhost_drop_inflight(struct vhost_connection *c)
{
    if (c->inflight != NULL)
        munmap(c->inflight, c->inflight_mapped);
    c->inflight = NULL;
    c->inflight_at = NULL;
    c->inflight_bytes = 0;
}

/* ---- replies -------------------------------------------------------------------------- */

bool vhost_send(int socket, const struct vrep_vhost_header *header, const void *body, int fd)
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
    return vhost_send(c->watch.fd, &header, body, fd) ? VREP_OK : VREP_E_CLOSED;
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
    if (!vhost_speaks(c, VREP_VHOST_P_LOG_SHMFD))
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
    vhost_forget_kick(queue);
    queue->kick.fd = take_fd(&c->message);
    int status = start_queue(c, queue);
    if (status == VREP_OK)
        status = vrep_loop_watch(c->server->loop, &queue->kick, EPOLLIN);
    if (status != VREP_OK) {
        vhost_close_fd(&queue->kick.fd);
        vhost_queue_stop(queue);
    }
    return status;
}

static int set_event(struct vhost_connection *c, bool error)
{
    struct vhost_queue *queue = &c->queue[c->message.body.number & 0xff];
    int *fd = error ? &queue->error_fd : &queue->call_fd;
    vhost_close_fd(fd);
    *fd = take_fd(&c->message);
    if (!error && *fd >= 0) {
        /* What was complete before: one interrupt too many does no harm. */
        uint64_t one = 1;
        if (queue->started && write(*fd, &one, sizeof one) < 0)
            return VREP_E_IO;
    }
    return VREP_OK;
}

int vhost_answer_base(struct vhost_connection *c, struct vhost_queue *queue)
{
    struct vrep_vhost_state state = {queue->number, queue->seen};
    vhost_queue_publish(queue);
    vhost_forget_kick(queue);
    vhost_close_fd(&queue->call_fd);
    vhost_queue_stop(queue);
    if (c->log.at != NULL && !vhost_uses(c) && c->server->holder == c) {
        c->moved = true;
        c->server->taken_over = false;
        note(c);
    }
    c->draining = -1;
    return reply(c, &state, sizeof state, -1) == VREP_OK ? ANSWERED : VREP_E_CLOSED;
}

/* The queue stops once nothing of it is in flight; until then no other message is looked at. */
static int get_base(struct vhost_connection *c)
{
    struct vhost_queue *queue = &c->queue[c->message.body.state.queue];
    if (!queue->started) {
        vhost_forget_kick(queue);
        return vhost_answer_base(c, queue);
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
    vhost_drop_inflight(c);
    c->inflight = mapped;
    c->inflight_mapped = mapped_bytes;
    c->inflight_at = at;
    c->inflight_bytes = is->bytes;
    c->inflight_size = is->queue_size;
    recall(c);
    note(c); /* a new region of one that was left before its guest was reset */
    return VREP_OK;
}

static int get_inflight(struct vhost_connection *c)
{
    struct vrep_vhost_inflight *asked = &c->message.body.inflight;
    size_t bytes = asked->queues * VREP_VHOST_INFLIGHT_BYTES(asked->queue_size);
    int fd = memfd_create("vrep-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) {
        vhost_close_fd(&fd);
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
        vhost_close_fd(&c->backend_fd);
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
bool vhost_take_message(struct vhost_connection *c)
{
    bool wants = vhost_speaks(c, VREP_VHOST_P_REPLY_ACK) &&
                 (c->message.header.flags & VREP_VHOST_NEED_REPLY) != 0;
    int status = vrep_vhost_check(&c->message);
    if (status == VREP_OK)
        status = handle(c);
    if (status == VREP_OK && wants)
        status = reply_number(c, 0);
    else if (status < 0 && wants && status != VREP_E_CLOSED)
        /* It was asked for, and learns that it did not work. */
        status = reply_number(c, 1) == VREP_OK ? VREP_OK : VREP_E_CLOSED;
    vhost_close_fds(&c->message);
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
