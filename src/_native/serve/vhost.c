#include "serve/vhost.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status.h"
#include "serve/vhost_internal.h"

#define MESSAGES_A_TURN 64

/* ---- queues ------------------------------------------------------------------------ */

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

/* ---- connections -------------------------------------------------------------------- */

void vhost_end(struct vhost_connection *c, const char *why)
{
    struct vrep_vhost_server *server = c->server;
    if (!c->open)
        return;
    if (why != NULL)
        VREP_INFO("vhost", "%s: connection ended: %s", server->accept.listener.path, why);
    for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX; i++) {
        struct vhost_queue *queue = &c->queue[i];
        drop_waiting(queue);
        vhost_forget_kick(queue);
        vhost_close_fd(&queue->call_fd);
        vhost_close_fd(&queue->error_fd);
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
    vhost_close_fd(&c->watch.fd);
    vhost_close_fds(&c->message);
    vhost_close_fd(&c->backend_fd);
    vhost_memory_let(c->memory);
    c->memory = NULL;
    vhost_log_close(&c->log);
    vhost_drop_inflight(c);
    c->open = false;
    if (server->holder == c)
        vhost_hold(server, NULL);
    pthread_mutex_lock(&server->lock);
    server->stats.monitor[c - server->connection].address[0] = 0;
    pthread_mutex_unlock(&server->lock);
}

bool vhost_uses(const struct vhost_connection *c)
{
    for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX; i++)
        if (c->queue[i].started)
            return true;
    return false;
}

void vhost_hold(struct vrep_vhost_server *server, struct vhost_connection *c)
{
    if (server->holder == c)
        return;
    pthread_mutex_lock(&server->lock);
    server->holder = c;
    for (uint32_t i = 0; i < VREP_VHOST_MONITORS_MAX; i++)
        server->stats.monitor[i].holds = c == &server->connection[i];
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
        if (!vhost_take_message(c))
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

static void open_connection(struct vrep_vhost_server *server, struct vhost_connection *c, int fd)
{
    struct vrep_vhost_monitor *shown = &server->stats.monitor[c - server->connection];
    *c = (struct vhost_connection){
        .watch = {fd, connection_ready},
        .server = server,
        .open = true,
        .backend_fd = -1,
        .draining = -1,
    };
    for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX; i++)
        reset_queue(c, i);
    pthread_mutex_lock(&server->lock);
    vrep_peer_name(fd, shown->address);
    shown->connected_ns = vrep_accept_time_ns();
    pthread_mutex_unlock(&server->lock);
    vrep_count(&server->stats.accepted, 1);
    VREP_INFO("vhost", "%s: connected: %s", server->accept.listener.path, shown->address);
    int status = vrep_loop_watch(server->loop, &c->watch, EPOLLIN | EPOLLRDHUP);
    if (status != VREP_OK)
        vhost_end(c, vrep_status_text(status));
}

static void connected(struct vrep_accept *accept, int fd)
{
    struct vrep_vhost_server *server = accept->owner;
    struct vhost_connection *room = NULL;
    for (uint32_t i = 0; i < VREP_VHOST_MONITORS_MAX; i++) {
        struct vhost_connection *c = &server->connection[i];
        if (c->open && vrep_peer_is_gone(c->watch.fd))
            vhost_end(c, "its peer is gone and another one came");
        if (!c->open)
            room = c;
    }
    if (room == NULL) {
        VREP_WARN("vhost", "%s: one monitor more is refused", accept->listener.path);
        vrep_count(&server->stats.refused, 1);
        close(fd);
        return;
    }
    open_connection(server, room, fd);
}

/* ---- the loop's side ------------------------------------------------------------------------- */

/* True: a queue has more. */
static bool connection_turn(struct vhost_connection *c)
{
    struct vrep_vhost_server *server = c->server;
    bool more = false;
    /* Nothing starts before everything of an earlier connection is complete. */
    bool serves = c->open && server->orphans == 0 && !server->stopping;
    for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX && c->open; i++) {
        struct vhost_queue *queue = &c->queue[i];
        if (!queue->started)
            continue;
        if (serves && queue->again && (queue->enabled || queue->stopping)) {
            queue->again = !vhost_block_run(queue);
            more |= queue->again && queue->more;
        }
        vhost_queue_publish(queue);
        if (queue->stopping && server->orphans == 0 && vhost_queue_is_drained(queue)) {
            if (vhost_answer_base(c, queue) < 0)
                vhost_end(c, "does not read its answers");
            else
                receive(c);
        }
    }
    if (server->stopping && c->open && c->requests == NULL)
        vhost_end(c, "the server stops");
    return more && c->open;
}

static bool front_turn(struct vrep_front *front)
{
    struct vrep_vhost_server *server = (struct vrep_vhost_server *)front;
    bool more = false;
    for (uint32_t i = 0; i < VREP_VHOST_MONITORS_MAX; i++)
        more |= connection_turn(&server->connection[i]);
    front->requests = server->received;
    server->received = 0;
    return more; /* what waits otherwise, waits for an event */
}

/* A queue that found no room looks again in each turn. */
static void front_wakeup(struct vrep_front *front)
{
    (void)front;
}

static void front_stop(struct vrep_front *front, bool drain)
{
    struct vrep_vhost_server *server = (struct vrep_vhost_server *)front;
    server->stopping = true;
    vrep_accept_stop(&server->accept);
    for (uint32_t n = 0; n < VREP_VHOST_MONITORS_MAX; n++) {
        struct vhost_connection *c = &server->connection[n];
        for (uint32_t i = 0; i < VREP_VHOST_QUEUES_MAX && c->open; i++)
            drop_waiting(&c->queue[i]);
        if (c->open && (!drain || c->requests == NULL))
            vhost_end(c, "the server stops");
    }
}

static bool front_idle(const struct vrep_front *front)
{
    const struct vrep_vhost_server *server = (const struct vrep_vhost_server *)front;
    bool open = false;
    for (uint32_t i = 0; i < VREP_VHOST_MONITORS_MAX; i++)
        open = open || server->connection[i].open;
    return server->inflight == 0 && !open;
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
    vrep_accept_init(&server->accept, loop, "vhost", connected, server);
    for (uint32_t i = 0; i < VREP_VHOST_MONITORS_MAX; i++) {
        server->connection[i].watch.fd = server->connection[i].backend_fd = -1;
        server->connection[i].server = server;
    }
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
                                  &server->accept.listener);
    if (status == VREP_OK)
        status = vrep_accept_start(&server->accept);
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
    for (uint32_t i = 0; i < VREP_VHOST_MONITORS_MAX; i++)
        vhost_end(&server->connection[i], "the server ends");
    vrep_accept_stop(&server->accept);
    /* Of commands that never ended: the group was closed, nothing uses it any more. */
    for (uint32_t i = 0; server->requests != NULL && i < VHOST_REQUESTS; i++)
        vhost_memory_let(server->requests[i].memory);
    free(server->requests);
    pthread_mutex_destroy(&server->lock);
    free(server);
}

void vrep_vhost_stats(struct vrep_vhost_server *server, struct vrep_vhost_stats *out)
{
    struct vrep_vhost_stats *stats = &server->stats;
    pthread_mutex_lock(&server->lock);
    *out = (struct vrep_vhost_stats){0};
    memcpy(out->monitor, stats->monitor, sizeof out->monitor);
    pthread_mutex_unlock(&server->lock);
    out->accepted = vrep_load_relaxed_u64(&stats->accepted);
    out->refused =
        vrep_load_relaxed_u64(&stats->refused) + vrep_load_relaxed_u64(&server->accept.turned_away);
    out->traffic = vrep_traffic_read(&stats->traffic);
    out->resubmitted = vrep_load_relaxed_u64(&stats->resubmitted);
    out->stalls = vrep_load_relaxed_u64(&stats->stalls);
}
