#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status.h"
#include "serve/nbd_internal.h"

#define SMALL_BUFFERS 1024u
#define PAGE_BUFFERS 512u
#define SOCKET_BYTES (4 << 20)
#define ACCEPTS_A_TURN 16

/* ---- connections --------------------------------------------------------------------- */

void nbd_activate(struct nbd_connection *c)
{
    struct vrep_nbd_server *server = c->server;
    if (c->active)
        return;
    c->active = true;
    c->next_active = NULL;
    if (server->active_last != NULL)
        server->active_last->next_active = c;
    else
        server->active_first = c;
    server->active_last = c;
}

/* Lists are walked by their own turn; a member that ended is skipped there by its state. */
static void unstall(struct vrep_nbd_server *server, struct nbd_connection *c)
{
    if (!c->stalled)
        return;
    c->stalled = false;
    struct nbd_connection **at = &server->stalled_first, *last = NULL;
    while (*at != c) {
        last = *at;
        at = &(*at)->next_stalled;
    }
    *at = c->next_stalled;
    if (server->stalled_last == c)
        server->stalled_last = last;
}

void nbd_end(struct nbd_connection *c, const char *why)
{
    struct vrep_nbd_server *server = c->server;
    if (c->state == NBD_FREE)
        return;
    if (why != NULL)
        VREP_INFO("nbd", "%s: connection ended: %s", c->client.address, why);
    nbd_drop_unsubmitted(c);
    for (struct nbd_request *r = c->submitted; r != NULL; r = r->after) {
        r->connection = NULL; /* the connection's counts die with it */
        server->orphans++;
    }
    c->submitted = NULL;
    while (c->out_first != NULL) {
        struct nbd_request *request = c->out_first;
        c->out_first = request->next;
        nbd_request_give(server, request);
    }
    unstall(server, c);
    if (server->long_reader == c)
        server->long_reader = NULL;
    server->freed = true;
    vrep_loop_forget(server->loop, &c->watch);
    vrep_group_mirror_leave(server->group, c->watch.fd);
    close(c->watch.fd);
    pthread_mutex_lock(&server->lock);
    vrep_traffic_add(&server->stats.traffic, &c->client.traffic);
    c->watch.fd = -1;
    c->state = NBD_FREE;
    pthread_mutex_unlock(&server->lock);
    free(c->in);
    free(c->answer);
    c->in = c->answer = NULL;
}

/* Ends every connection whose peer is gone, with what it had not submitted. */
static void fence(struct vrep_nbd_server *server)
{
    for (uint32_t i = 0; i < server->connections_max; i++) {
        struct nbd_connection *c = &server->connections[i];
        if (c->state == NBD_FREE)
            continue;
        if (vrep_peer_is_gone(c->watch.fd)) {
            vrep_count(&server->stats.fenced, 1);
            nbd_end(c, "its peer is gone and another one came");
        }
    }
}

static void serve(struct nbd_connection *c)
{
    if (vrep_group_mirror_join(c->server->group, c->export, c->watch.fd) != VREP_OK) {
        nbd_end(c, "too many connections of a mirror");
        return;
    }
    c->state = NBD_SERVING;
    nbd_activate(c);
}

/* Haggling is over. */
static void admit(struct nbd_connection *c)
{
    struct vrep_nbd_server *server = c->server;
    c->export = c->shake.export;
    c->structured = c->shake.structured;
    c->contexts = c->shake.contexts;
    pthread_mutex_lock(&server->lock);
    snprintf(c->client.export, sizeof c->client.export, "%s", server->exports.list[c->export].name);
    pthread_mutex_unlock(&server->lock);
    c->state = NBD_FENCED;
    fence(server);
    VREP_INFO("nbd", "%s: serves disk %s", c->client.address, c->client.export);
    if (server->orphans == 0)
        serve(c);
}

/* ---- haggling -------------------------------------------------------------------------- */

static bool send_answer(struct nbd_connection *c)
{
    while (c->answer_from < c->answer_to) {
        ssize_t n = send(c->watch.fd, c->answer + c->answer_from, c->answer_to - c->answer_from,
                         MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN) {
            c->blocked = true;
            (void)vrep_loop_change(c->server->loop, &c->watch,
                                   EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
            return false;
        }
        if (n < 0) {
            nbd_end(c, strerror(errno));
            return false;
        }
        c->answer_from += (uint32_t)n;
    }
    c->answer_from = c->answer_to = 0;
    return true;
}

/* One answer is out before the next option is looked at: what is unsent stays bounded. */
static void haggle(struct nbd_connection *c)
{
    while (c->state == NBD_HAGGLING && !c->blocked) {
        size_t consumed, bytes;
        enum vrep_nbd_step step =
            vrep_nbd_handshake_step(&c->shake, &c->server->exports, c->in + c->in_from,
                                    c->in_to - c->in_from, &consumed, c->answer, &bytes);
        c->in_from += (uint32_t)consumed;
        c->answer_to = (uint32_t)bytes;
        if (step == VREP_NBD_SERVE) {
            /* A fresh socket takes an answer of this size; one that does not is no client. */
            if (send_answer(c))
                admit(c);
            else if (c->state == NBD_HAGGLING)
                nbd_end(c, "does not read its answers");
            return;
        }
        if (step == VREP_NBD_CLOSE) {
            if (send_answer(c))
                nbd_end(c, NULL);
            else if (c->state == NBD_HAGGLING)
                nbd_end(c, "does not read its answers");
            return;
        }
        if (!send_answer(c) || step == VREP_NBD_NEXT)
            continue;
        if (!c->readable)
            return;
        memmove(c->in, c->in + c->in_from, c->in_to - c->in_from);
        c->in_to -= c->in_from;
        c->in_from = 0;
        ssize_t n = recv(c->watch.fd, c->in + c->in_to, NBD_STAGING_BYTES - c->in_to, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            c->readable = false;
        else if (n <= 0)
            nbd_end(c, n == 0 ? NULL : strerror(errno));
        else
            c->in_to += (uint32_t)n;
    }
}

static void work(struct nbd_connection *c)
{
    if (c->state == NBD_HAGGLING)
        haggle(c);
    if (c->state == NBD_SERVING)
        nbd_receive(c);
    if (c->state == NBD_FINISHING && c->outstanding == 0)
        nbd_end(c, NULL);
}

static void connection_ready(struct vrep_watch *watch, uint32_t events)
{
    struct nbd_connection *c =
        (struct nbd_connection *)(void *)((char *)watch - offsetof(struct nbd_connection, watch));
    if (watch->fd < 0)
        return;
    if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->readable = true;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        c->hangup = true;
    if (events & (EPOLLHUP | EPOLLERR) && c->state == NBD_FINISHING) {
        nbd_end(c, NULL);
        return;
    }
    if (c->blocked && events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) {
        c->blocked = false;
        (void)vrep_loop_change(c->server->loop, watch, EPOLLIN | EPOLLRDHUP | EPOLLET);
        if (c->state == NBD_HAGGLING && !send_answer(c))
            return;
        if (c->out_first != NULL && !c->replied) {
            c->replied = true;
            c->next_replied = c->server->replied_first;
            c->server->replied_first = c;
        }
    }
    work(c);
}

/* ---- accepting --------------------------------------------------------------------------- */

static struct nbd_connection *free_connection(struct vrep_nbd_server *server)
{
    struct nbd_connection *oldest = NULL;
    for (uint32_t i = 0; i < server->connections_max; i++) {
        struct nbd_connection *c = &server->connections[i];
        /* One that ended in this turn may still stand on a list: not yet. */
        if (c->state == NBD_FREE && !c->active && !c->replied)
            return c;
        if (c->state == NBD_HAGGLING && !c->active && !c->replied &&
            (oldest == NULL || c->client.connected_ns < oldest->client.connected_ns))
            oldest = c;
    }
    /* Those that never come to the point do not keep others out. */
    if (oldest != NULL)
        nbd_end(oldest, "still haggling while others wait");
    return oldest;
}

static void open_connection(struct vrep_nbd_server *server, int fd)
{
    struct nbd_connection *c = free_connection(server);
    uint8_t *in = c != NULL ? malloc(NBD_STAGING_BYTES) : NULL;
    uint8_t *answer = in != NULL ? malloc(VREP_NBD_ANSWER_MAX) : NULL;
    if (answer == NULL) {
        VREP_WARN("nbd", "a connection is refused: %u are open", (unsigned)server->connections_max);
        vrep_count(&server->stats.refused, 1);
        free(in);
        close(fd);
        return;
    }
    int one = 1, bytes = SOCKET_BYTES;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* fails on a Unix socket */
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) != 0)
        (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    pthread_mutex_lock(&server->lock);
    *c = (struct nbd_connection){
        .watch = {fd, connection_ready},
        .server = server,
        .state = NBD_HAGGLING,
        .in = in,
        .answer = answer,
    };
    c->client.connected_ns = vrep_accept_time_ns();
    vrep_peer_name(fd, c->client.address);
    pthread_mutex_unlock(&server->lock);
    vrep_count(&server->stats.accepted, 1);
    vrep_nbd_greeting(answer);
    c->answer_to = VREP_NBD_GREETING_BYTES;
    int status = vrep_loop_watch(server->loop, &c->watch, EPOLLIN | EPOLLRDHUP | EPOLLET);
    if (status != VREP_OK)
        nbd_end(c, vrep_status_text(status));
    else
        (void)send_answer(c);
}

static void connected(struct vrep_accept *accept, int fd)
{
    fence(accept->owner);
    open_connection(accept->owner, fd);
}

/* ---- the loop's side ------------------------------------------------------------------------ */

static bool front_turn(struct vrep_front *front)
{
    struct vrep_nbd_server *server = (struct vrep_nbd_server *)front;
    struct nbd_connection *c, *next;
    if (server->orphans == 0)
        for (uint32_t i = 0; i < server->connections_max; i++)
            if (server->connections[i].state == NBD_FENCED)
                serve(&server->connections[i]);
    if (server->freed && server->stalled_first != NULL) {
        server->freed = false;
        c = server->stalled_first;
        server->stalled_first = server->stalled_last = NULL;
        for (; c != NULL; c = next) {
            next = c->next_stalled;
            c->stalled = false;
            nbd_activate(c);
        }
    }
    c = server->active_first;
    server->active_first = server->active_last = NULL;
    for (; c != NULL; c = next) {
        next = c->next_active;
        c->active = false;
        work(c);
    }
    c = server->replied_first;
    server->replied_first = NULL;
    for (; c != NULL; c = next) {
        next = c->next_replied;
        c->replied = false;
        if (c->state == NBD_SERVING || c->state == NBD_FINISHING)
            nbd_send(c);
        if (c->state == NBD_FINISHING && c->outstanding == 0)
            nbd_end(c, NULL);
    }
    front->requests = server->received;
    server->received = 0;
    return server->active_first != NULL || (server->freed && server->stalled_first != NULL);
}

static void front_wakeup(struct vrep_front *front)
{
    ((struct vrep_nbd_server *)front)->freed = true;
}

static void close_listeners(struct vrep_nbd_server *server)
{
    vrep_accept_stop(&server->unix_socket);
    vrep_accept_stop(&server->tcp_socket);
}

static void front_stop(struct vrep_front *front, bool drain)
{
    struct vrep_nbd_server *server = (struct vrep_nbd_server *)front;
    server->stopping = true;
    close_listeners(server);
    for (uint32_t i = 0; i < server->connections_max; i++) {
        struct nbd_connection *c = &server->connections[i];
        if (c->state == NBD_FREE)
            continue;
        bool answers = c->state == NBD_SERVING || c->state == NBD_FINISHING;
        nbd_drop_unsubmitted(c);
        if (!drain || !answers || c->outstanding == 0) {
            nbd_end(c, "the server stops");
        } else {
            c->state = NBD_FINISHING;
            unstall(server, c);
        }
    }
}

static bool front_idle(const struct vrep_front *front)
{
    const struct vrep_nbd_server *server = (const struct vrep_nbd_server *)front;
    if (server->inflight > 0)
        return false;
    for (uint32_t i = 0; i < server->connections_max; i++)
        if (server->connections[i].state != NBD_FREE)
            return false;
    return true;
}

/* ---- the outside -------------------------------------------------------------------------- */

static void list_exports(struct vrep_nbd_server *server, uint64_t elsewhere)
{
    struct vrep_nbd_exports *exports = &server->exports;
    const char *since = vrep_group_since_name(server->group);
    const char *bitmap = NULL;
    if (vrep_group_map(server->group) != NULL)
        bitmap = "vrep";
    else if (since != NULL)
        bitmap = since;
    if (bitmap != NULL)
        snprintf(server->bitmap, sizeof server->bitmap, "qemu:dirty-bitmap:%s", bitmap);
    exports->count = vrep_group_disks(server->group);
    for (uint32_t i = 0; i < exports->count; i++) {
        struct vrep_disk_info info = {0};
        bool known = vrep_disk_info(vrep_group_disk(server->group, i), &info) == VREP_OK;
        exports->list[i] = (struct vrep_nbd_export){
            .name = vrep_group_disk_name(server->group, i),
            .bytes = vrep_group_disk_bytes(server->group, i),
            .read_only = known && info.read_only && !vrep_group_is_mirror(server->group),
            .bitmap = bitmap != NULL ? server->bitmap : NULL,
            .hidden = (elsewhere >> i & 1) != 0,
        };
    }
}

static int listen_on(struct vrep_nbd_server *server, const struct vrep_nbd_config *config)
{
    int status = VREP_OK;
    if (config->unix_path != NULL)
        status = vrep_listen_unix(config->unix_path, config->unix_mode, config->unix_group,
                                  &server->unix_socket.listener);
    if (status == VREP_OK && config->tcp_host != NULL)
        status = vrep_listen_tcp(config->tcp_host, config->tcp_port, &server->tcp_socket.listener);
    if (status == VREP_OK && config->unix_path != NULL)
        status = vrep_accept_start(&server->unix_socket);
    if (status == VREP_OK && config->tcp_host != NULL)
        status = vrep_accept_start(&server->tcp_socket);
    return status;
}

int vrep_nbd_create(struct vrep_loop *loop, const struct vrep_nbd_config *config,
                    struct vrep_nbd_server **out)
{
    if (config->connections > VREP_NBD_CONNECTIONS_MAX)
        return VREP_E_INVALID;
    struct vrep_nbd_server *server = calloc(1, sizeof *server);
    if (server == NULL)
        return VREP_E_NOMEM;
    server->front = (struct vrep_front){front_turn, front_wakeup, front_stop, front_idle, 0};
    server->loop = loop;
    server->group = vrep_loop_group(loop);
    vrep_accept_init(&server->unix_socket, loop, "nbd", connected, server);
    vrep_accept_init(&server->tcp_socket, loop, "nbd", connected, server);
    server->connections_max =
        config->connections > 0 ? config->connections : VREP_NBD_CONNECTIONS_MAX;
    pthread_mutex_init(&server->lock, NULL);
    server->connections = calloc(server->connections_max, sizeof *server->connections);
    server->requests = calloc(NBD_REQUESTS, sizeof *server->requests);
    int status = server->connections == NULL || server->requests == NULL ? VREP_E_NOMEM : VREP_OK;
    if (status == VREP_OK)
        status = vrep_buffers_create(SMALL_BUFFERS, PAGE_BUFFERS, &server->buffers);
    if (status == VREP_OK) {
        for (uint32_t i = 0; i < server->connections_max; i++)
            server->connections[i].watch.fd = -1;
        for (uint32_t i = NBD_REQUESTS; i-- > 0;) {
            server->requests[i].next = server->free;
            server->free = &server->requests[i];
        }
        list_exports(server, config->elsewhere);
        status = listen_on(server, config);
    }
    if (status == VREP_OK)
        status = vrep_loop_add_front(loop, &server->front);
    if (status != VREP_OK) {
        vrep_nbd_destroy(server);
        return status;
    }
    *out = server;
    return VREP_OK;
}

uint16_t vrep_nbd_port(const struct vrep_nbd_server *server)
{
    return server->tcp_socket.listener.port;
}

void vrep_nbd_destroy(struct vrep_nbd_server *server)
{
    if (server == NULL)
        return;
    close_listeners(server);
    if (server->connections != NULL)
        for (uint32_t i = 0; i < server->connections_max; i++)
            nbd_end(&server->connections[i], NULL);
    vrep_buffers_destroy(server->buffers);
    pthread_mutex_destroy(&server->lock);
    free(server->connections);
    free(server->requests);
    free(server);
}

static void copy_client(const struct vrep_nbd_client *from, struct vrep_nbd_client *to)
{
    memcpy(to->address, from->address, sizeof to->address);
    memcpy(to->export, from->export, sizeof to->export);
    to->connected_ns = from->connected_ns;
    to->traffic = vrep_traffic_read(&from->traffic);
}

/* A connection's fd changes under the lock only, so it tells other threads which ones live. */
uint32_t vrep_nbd_clients(struct vrep_nbd_server *server, struct vrep_nbd_client *out, uint32_t max)
{
    uint32_t count = 0;
    pthread_mutex_lock(&server->lock);
    for (uint32_t i = 0; i < server->connections_max && count < max; i++)
        if (server->connections[i].watch.fd >= 0)
            copy_client(&server->connections[i].client, &out[count++]);
    pthread_mutex_unlock(&server->lock);
    return count;
}

void vrep_nbd_stats(struct vrep_nbd_server *server, struct vrep_nbd_stats *out)
{
    const struct vrep_nbd_stats *ended = &server->stats;
    pthread_mutex_lock(&server->lock);
    *out = (struct vrep_nbd_stats){
        .accepted = vrep_load_relaxed_u64(&ended->accepted),
        .refused = vrep_load_relaxed_u64(&ended->refused) +
                   vrep_load_relaxed_u64(&server->unix_socket.turned_away) +
                   vrep_load_relaxed_u64(&server->tcp_socket.turned_away),
        .fenced = vrep_load_relaxed_u64(&ended->fenced),
        .traffic = vrep_traffic_read(&ended->traffic),
        .stalls = vrep_load_relaxed_u64(&ended->stalls),
    };
    for (uint32_t i = 0; i < server->connections_max; i++) {
        if (server->connections[i].watch.fd < 0)
            continue;
        out->connections++;
        vrep_traffic_add(&out->traffic, &server->connections[i].client.traffic);
    }
    pthread_mutex_unlock(&server->lock);
}
