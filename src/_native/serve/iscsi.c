#include "serve/iscsi.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status.h"
#include "serve/iscsi_internal.h"

#define RECEIVE_SHARE (1u << 20) /* of one connection before others have their turn */
#define SOCKET_BYTES (1 << 20)
#define TICK_S 5
#define LOGIN_MS 30000u
#define IDLE_MS 60000u
#define SECRET_MIN 12u

static uint64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000u + (uint64_t)now.tv_nsec / 1000000u;
}

void iscsi_activate(struct iscsi_connection *c)
{
    struct vrep_iscsi_server *server = c->server;
    if (c->active || c->state == ISCSI_FREE)
        return;
    c->active = true;
    c->next_active = NULL;
    if (server->active_last != NULL)
        server->active_last->next_active = c;
    else
        server->active_first = c;
    server->active_last = c;
}

static void want_to_send(struct iscsi_connection *c)
{
    if (c->replied)
        return;
    c->replied = true;
    c->next_replied = c->server->replied_first;
    c->server->replied_first = c;
}

/* ---- beginning and end ------------------------------------------------------------ */

static void free_memory(struct iscsi_connection *c)
{
    free(c->in);
    free(c->login);
    free(c->batch);
    free(c->heads);
    free(c->tails);
    c->in = NULL;
    c->login = NULL;
    c->batch = NULL;
    c->heads = NULL;
    c->tails = NULL;
}

void iscsi_end(struct iscsi_connection *c, const char *why)
{
    struct vrep_iscsi_server *server = c->server;
    if (c->state == ISCSI_FREE)
        return;
    if (why != NULL)
        VREP_INFO("iscsi", "%s %s: the connection ends: %s", c->client.address, c->client.initiator,
                  why);
    c->state = ISCSI_FREE;
    vrep_loop_forget(server->loop, &c->watch);
    pthread_mutex_lock(&server->lock);
    close(c->watch.fd);
    c->watch.fd = -1;
    vrep_traffic_add(&server->stats.traffic, &c->client.traffic);
    pthread_mutex_unlock(&server->lock);
    iscsi_forget_tasks(c);
    iscsi_drop_queue(c);
    if (c->nexus != NULL)
        vrep_scsi_nexus_close(c->nexus);
    c->nexus = NULL;
    c->stalled = false;
    c->batch_at = c->batch_count = 0;
    free_memory(c);
    server->freed = true;
}

static bool get_memory(struct iscsi_connection *c)
{
    c->in = malloc(ISCSI_IN_BYTES);
    c->login = malloc(sizeof *c->login);
    c->batch = calloc(ISCSI_BATCH_IOV, sizeof *c->batch);
    c->heads = calloc(ISCSI_BATCH_PDUS, sizeof *c->heads);
    c->tails = calloc(ISCSI_BATCH_PDUS, sizeof *c->tails);
    return c->in != NULL && c->login != NULL && c->batch != NULL && c->heads != NULL &&
           c->tails != NULL;
}

/* The transport's name of an initiator port: SPC-4 7.6.4.6, format 01b. */
static uint32_t transport_id(const struct iscsi_login *login, uint8_t *out)
{
    char *name = (char *)out + 4;
    const uint8_t *isid = login->isid;
    memset(out, 0, VREP_SCSI_TRANSPORT_ID_MAX);
    int bytes = snprintf(name, VREP_SCSI_TRANSPORT_ID_MAX - 4, "%s,i,0x%02x%02x%02x%02x%02x%02x",
                         login->initiator, isid[0], isid[1], isid[2], isid[3], isid[4], isid[5]);
    uint32_t padded = ((uint32_t)bytes + 1 + 3) / 4 * 4;
    out[0] = 0x45;
    vrep_be_store_u16(out + 2, (uint16_t)padded);
    return 4 + padded;
}

int iscsi_admit(struct iscsi_connection *c)
{
    struct vrep_iscsi_server *server = c->server;
    struct iscsi_login *login = c->login;
    if (!iscsi_admitted(server->rules, server->rules_count, login->initiator, &c->peer))
        return ISCSI_LOGIN_FORBIDDEN;
    pthread_mutex_lock(&server->lock);
    memcpy(c->client.initiator, login->initiator, sizeof c->client.initiator);
    pthread_mutex_unlock(&server->lock);
    if (login->discovery)
        return ISCSI_LOGIN_OK;
    for (uint32_t i = 0; i < server->connections_max; i++) { /* reinstatement */
        struct iscsi_connection *other = &server->connections[i];
        if (other != c && other->nexus != NULL &&
            memcmp(other->login->isid, login->isid, sizeof login->isid) == 0 &&
            strcmp(other->login->initiator, login->initiator) == 0)
            iscsi_end(other, "its initiator began the session anew");
    }
    uint8_t id[VREP_SCSI_TRANSPORT_ID_MAX];
    uint32_t bytes = transport_id(login, id);
    return vrep_scsi_nexus_open(server->target, id, bytes, 1, &c->nexus) == VREP_OK
               ? ISCSI_LOGIN_OK
               : ISCSI_LOGIN_NO_RESOURCES;
}

static void connection_ready(struct vrep_watch *watch, uint32_t events)
{
    struct iscsi_connection *c = (struct iscsi_connection *)watch;
    if (watch->fd < 0)
        return;
    if ((events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0)
        c->hung_up = true;
    if ((events & ~(uint32_t)EPOLLOUT) != 0) {
        c->readable = true;
        iscsi_activate(c);
    }
    if ((events & EPOLLOUT) != 0) {
        c->writable = true;
        want_to_send(c);
    }
}

static struct iscsi_connection *free_connection(struct vrep_iscsi_server *server)
{
    struct iscsi_connection *oldest = NULL;
    for (uint32_t i = 0; i < server->connections_max; i++) {
        struct iscsi_connection *c = &server->connections[i];
        if (c->active || c->replied)
            continue;
        if (c->state == ISCSI_FREE)
            return c;
        if (c->state == ISCSI_LOGGING_IN &&
            (oldest == NULL || c->client.connected_ns < oldest->client.connected_ns))
            oldest = c;
    }
    /* Those that never come to the point do not keep others out. */
    if (oldest != NULL)
        iscsi_end(oldest, "still logging in while others wait");
    return oldest;
}

static void connected(struct vrep_accept *accept, int fd)
{
    struct vrep_iscsi_server *server = accept->owner;
    struct iscsi_connection *c = free_connection(server);
    int one = 1, bytes = SOCKET_BYTES;
    if (c == NULL) {
        VREP_WARN("iscsi", "a connection is refused: %u are open", server->connections_max);
        vrep_count(&server->stats.refused, 1);
        close(fd);
        return;
    }
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    pthread_mutex_lock(&server->lock);
    *c = (struct iscsi_connection){
        .watch = {fd, connection_ready},
        .server = server,
        .state = ISCSI_LOGGING_IN,
        .writable = true,
        .heard_ms = now_ms(),
    };
    socklen_t peer_bytes = sizeof c->peer;
    (void)getpeername(fd, (struct sockaddr *)&c->peer, &peer_bytes); /* else no rule admits it */
    c->client.connected_ns = vrep_accept_time_ns();
    vrep_peer_name(fd, c->client.address);
    pthread_mutex_unlock(&server->lock);
    vrep_count(&server->stats.accepted, 1);
    int status = get_memory(c) ? VREP_OK : VREP_E_NOMEM;
    if (status == VREP_OK) {
        iscsi_login_init(c->login, &server->credentials, server->name);
        status =
            vrep_loop_watch(server->loop, &c->watch, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET);
    }
    if (status != VREP_OK)
        iscsi_end(c, vrep_status_text(status));
}

static void scsi_ready(struct vrep_watch *watch, uint32_t events)
{
    struct vrep_iscsi_server *server =
        (struct vrep_iscsi_server *)(void *)((char *)watch -
                                             offsetof(struct vrep_iscsi_server, scsi_watch));
    (void)events;
    vrep_scsi_poll(server->target);
}

/* Who is silent is asked, and ends when it does not answer; who does not log in ends as well. */
static void look_at_time(struct iscsi_connection *c, uint64_t now)
{
    uint64_t silent = now - c->heard_ms;
    if (c->state == ISCSI_LOGGING_IN && silent >= LOGIN_MS) {
        iscsi_end(c, "did not log in in time");
    } else if (c->state == ISCSI_SERVING && c->pinged && silent >= 2 * IDLE_MS) {
        iscsi_end(c, "does not answer");
    } else if (c->state == ISCSI_SERVING && !c->pinged && silent >= IDLE_MS) {
        uint8_t bhs[ISCSI_BHS] = {ISCSI_NOP_IN, ISCSI_FINAL};
        vrep_be_store_u32(bhs + 16, ISCSI_NO_TAG);
        vrep_be_store_u32(bhs + 20, 1);
        c->pinged = true;
        (void)iscsi_queue_pdu(c, bhs, NULL, 0, false);
    }
}

static void timer_ready(struct vrep_watch *watch, uint32_t events)
{
    struct vrep_iscsi_server *server =
        (struct vrep_iscsi_server *)(void *)((char *)watch -
                                             offsetof(struct vrep_iscsi_server, timer_watch));
    uint64_t count, now = now_ms();
    (void)events;
    while (read(watch->fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
    for (uint32_t i = 0; i < server->connections_max; i++)
        look_at_time(&server->connections[i], now);
}

/* ---- input -------------------------------------------------------------------------- */

/* True: there is more than its share. */
static bool work(struct iscsi_connection *c)
{
    uint32_t share = 0;
    c->stalled = false;
    if (!iscsi_consume(c))
        return false;
    while (!c->stalled && c->readable &&
           (c->state == ISCSI_LOGGING_IN || c->state == ISCSI_SERVING)) {
        if (share >= RECEIVE_SHARE)
            return true;
        if (c->in_from == c->in_to) {
            c->in_from = c->in_to = 0;
        } else if (c->in_from > 0 && ISCSI_IN_BYTES - c->in_to < ISCSI_IN_BYTES / 2) {
            memmove(c->in, c->in + c->in_from, c->in_to - c->in_from);
            c->in_to -= c->in_from;
            c->in_from = 0;
        }
        size_t room = ISCSI_IN_BYTES - c->in_to;
        ssize_t got = read(c->watch.fd, c->in + c->in_to, room);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN) {
            c->readable = false;
            return false;
        }
        if (got <= 0) {
            iscsi_end(c, got == 0 ? "the initiator closed it" : strerror(errno));
            return false;
        }
        /* The socket is empty, and an event will tell of more; but of a peer that is gone there is
         * no second event. */
        if ((size_t)got < room && !c->hung_up)
            c->readable = false;
        c->in_to += (uint32_t)got;
        share += (uint32_t)got;
        c->heard_ms = now_ms();
        c->pinged = false;
        if (!iscsi_consume(c))
            return false;
    }
    if (c->stalled && c->hung_up) /* nobody is left to wait for room */
        iscsi_end(c, "the initiator closed it");
    return false;
}

/* ---- the loop's side ------------------------------------------------------------------ */

static bool front_turn(struct vrep_front *front)
{
    struct vrep_iscsi_server *server = (struct vrep_iscsi_server *)front;
    struct iscsi_connection *c, *next;
    if (server->freed) {
        server->freed = false;
        for (uint32_t i = 0; i < server->connections_max; i++)
            if (server->connections[i].state != ISCSI_FREE && server->connections[i].stalled)
                iscsi_activate(&server->connections[i]);
    }
    c = server->active_first;
    server->active_first = server->active_last = NULL;
    for (; c != NULL; c = next) {
        next = c->next_active;
        c->active = false;
        if (c->state != ISCSI_FREE && work(c))
            iscsi_activate(c);
    }
    c = server->replied_first;
    server->replied_first = NULL;
    for (; c != NULL; c = next) {
        next = c->next_replied;
        c->replied = false;
        if (c->state != ISCSI_FREE)
            iscsi_send(c);
        if (c->state == ISCSI_FINISHING && c->tasks == NULL && iscsi_nothing_to_send(c))
            iscsi_end(c, NULL);
    }
    front->requests = server->received;
    server->received = 0;
    return server->active_first != NULL || server->freed;
}

static void front_wakeup(struct vrep_front *front)
{
    struct vrep_iscsi_server *server = (struct vrep_iscsi_server *)front;
    server->freed = true;
    vrep_scsi_wakeup(server->target);
}

static void front_stop(struct vrep_front *front, bool drain)
{
    struct vrep_iscsi_server *server = (struct vrep_iscsi_server *)front;
    server->stopping = true;
    vrep_accept_stop(&server->accept);
    for (uint32_t i = 0; i < server->connections_max; i++) {
        struct iscsi_connection *c = &server->connections[i];
        if (c->state == ISCSI_FREE)
            continue;
        if (!drain || c->state == ISCSI_LOGGING_IN) {
            iscsi_end(c, "the server stops");
            continue;
        }
        c->state = ISCSI_FINISHING;
        for (struct iscsi_task *task = c->tasks, *after; task != NULL; task = after) {
            after = task->after;
            if (!task->submitted) /* its data will not come any more */
                iscsi_task_give(task);
        }
        want_to_send(c);
    }
}

static bool front_idle(const struct vrep_front *front)
{
    const struct vrep_iscsi_server *server = (const struct vrep_iscsi_server *)front;
    for (uint32_t i = 0; i < server->connections_max; i++)
        if (server->connections[i].state != ISCSI_FREE)
            return false;
    return server->managing == 0 && vrep_scsi_idle(server->target);
}

/* ---- the outside -------------------------------------------------------------------------- */

static bool fits(const char *text)
{
    return text != NULL && text[0] != '\0' && strlen(text) <= ISCSI_CHAP_MAX;
}

static bool credentials_good(const struct iscsi_credentials *given)
{
    if (given->name == NULL)
        return given->mutual_name == NULL;
    if (!fits(given->name) || !fits(given->secret) || strlen(given->secret) < SECRET_MIN)
        return false;
    if (given->mutual_name == NULL)
        return true;
    return fits(given->mutual_name) && fits(given->mutual_secret) &&
           strlen(given->mutual_secret) >= SECRET_MIN &&
           strcmp(given->secret, given->mutual_secret) !=
               0; /* else an answer could be had from us */
}

static const char *keep(char *to, const char *from)
{
    if (from == NULL)
        return NULL;
    strcpy(to, from);
    return to;
}

static void keep_credentials(struct vrep_iscsi_server *server,
                             const struct iscsi_credentials *given)
{
    server->credentials = (struct iscsi_credentials){
        .name = keep(server->secrets[0], given->name),
        .secret = given->name != NULL ? keep(server->secrets[1], given->secret) : NULL,
        .mutual_name = keep(server->secrets[2], given->mutual_name),
        .mutual_secret =
            given->mutual_name != NULL ? keep(server->secrets[3], given->mutual_secret) : NULL,
    };
}

static int configure(struct vrep_iscsi_server *server, const struct vrep_iscsi_config *config)
{
    if (config->sessions > VREP_ISCSI_SESSIONS_MAX || config->rules_count > VREP_ISCSI_RULES_MAX ||
        !iscsi_name_valid(config->target_name) || !credentials_good(&config->credentials))
        return VREP_E_INVALID;
    if (config->credentials.name == NULL && !vrep_listen_is_loopback(config->host))
        return VREP_E_INVALID;
    strcpy(server->name, config->target_name);
    keep_credentials(server, &config->credentials);
    for (uint32_t i = 0; i < config->rules_count; i++) {
        int status = iscsi_rule_parse(&config->rules[i], &server->rules[i]);
        if (status != VREP_OK)
            return status;
    }
    server->rules_count = config->rules_count;
    server->connections_max = config->sessions > 0 ? config->sessions : VREP_ISCSI_SESSIONS_MAX;
    server->tasks_max = server->connections_max * (ISCSI_WINDOW + 8);
    server->connections = calloc(server->connections_max, sizeof *server->connections);
    server->tasks = calloc(server->tasks_max, sizeof *server->tasks);
    if (server->connections == NULL || server->tasks == NULL)
        return VREP_E_NOMEM;
    for (uint32_t i = 0; i < server->connections_max; i++)
        server->connections[i].watch.fd = -1;
    for (uint32_t i = server->tasks_max; i-- > 0;) {
        server->tasks[i].after = server->free_task;
        server->free_task = &server->tasks[i];
    }
    server->tasks_free = server->tasks_max;
    return VREP_OK;
}

static int start_timer(struct vrep_iscsi_server *server)
{
    struct itimerspec every = {.it_interval = {.tv_sec = TICK_S}, .it_value = {.tv_sec = TICK_S}};
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    server->timer_watch = (struct vrep_watch){fd, timer_ready};
    if (fd < 0 || timerfd_settime(fd, 0, &every, NULL) != 0)
        return vrep_status_from_errno(errno);
    return vrep_loop_watch(server->loop, &server->timer_watch, EPOLLIN);
}

int vrep_iscsi_create(struct vrep_loop *loop, const struct vrep_iscsi_config *config,
                      struct vrep_iscsi_server **out)
{
    struct vrep_iscsi_server *server = calloc(1, sizeof *server);
    if (server == NULL)
        return VREP_E_NOMEM;
    server->front = (struct vrep_front){front_turn, front_wakeup, front_stop, front_idle, 0};
    server->loop = loop;
    server->group = vrep_loop_group(loop);
    server->scsi_watch.fd = server->timer_watch.fd = -1;
    vrep_accept_init(&server->accept, loop, "iscsi", connected, server);
    pthread_mutex_init(&server->lock, NULL);
    int status = configure(server, config);
    if (status == VREP_OK)
        status = vrep_scsi_create(server->group, &config->scsi, &server->target);
    if (status == VREP_OK)
        status = vrep_listen_any(config->host, config->port, &server->accept.listener);
    if (status == VREP_OK)
        status = vrep_accept_start(&server->accept);
    if (status == VREP_OK) {
        server->scsi_watch = (struct vrep_watch){vrep_scsi_fd(server->target), scsi_ready};
        status = vrep_loop_watch(loop, &server->scsi_watch, EPOLLIN);
    }
    if (status == VREP_OK)
        status = start_timer(server);
    if (status == VREP_OK)
        status = vrep_loop_add_front(loop, &server->front);
    if (status != VREP_OK) {
        vrep_iscsi_destroy(server);
        return status;
    }
    *out = server;
    return VREP_OK;
}

uint16_t vrep_iscsi_port(const struct vrep_iscsi_server *server)
{
    return server->accept.listener.port;
}

void vrep_iscsi_destroy(struct vrep_iscsi_server *server)
{
    if (server == NULL)
        return;
    vrep_accept_stop(&server->accept);
    for (uint32_t i = 0; server->connections != NULL && i < server->connections_max; i++)
        iscsi_end(&server->connections[i], NULL);
    if (server->scsi_watch.fd >= 0)
        vrep_loop_forget(server->loop, &server->scsi_watch);
    if (server->timer_watch.fd >= 0) {
        vrep_loop_forget(server->loop, &server->timer_watch);
        close(server->timer_watch.fd);
    }
    vrep_scsi_destroy(server->target);
    while (server->free_item != NULL) {
        struct iscsi_item *next = server->free_item->next;
        free(server->free_item);
        server->free_item = next;
    }
    OPENSSL_cleanse(server->secrets, sizeof server->secrets);
    pthread_mutex_destroy(&server->lock);
    free(server->connections);
    free(server->tasks);
    free(server);
}

static void copy_session(const struct vrep_iscsi_session *from, struct vrep_iscsi_session *to)
{
    memcpy(to->address, from->address, sizeof to->address);
    memcpy(to->initiator, from->initiator, sizeof to->initiator);
    to->connected_ns = from->connected_ns;
    to->traffic = vrep_traffic_read(&from->traffic);
}

uint32_t vrep_iscsi_sessions(struct vrep_iscsi_server *server, struct vrep_iscsi_session *out,
                             uint32_t max)
{
    uint32_t count = 0;
    pthread_mutex_lock(&server->lock);
    for (uint32_t i = 0; i < server->connections_max && count < max; i++)
        if (server->connections[i].watch.fd >= 0)
            copy_session(&server->connections[i].client, &out[count++]);
    pthread_mutex_unlock(&server->lock);
    return count;
}

void vrep_iscsi_stats(struct vrep_iscsi_server *server, struct vrep_iscsi_stats *out)
{
    const struct vrep_iscsi_stats *ended = &server->stats;
    pthread_mutex_lock(&server->lock);
    *out = (struct vrep_iscsi_stats){
        .accepted = vrep_load_relaxed_u64(&ended->accepted),
        .refused = vrep_load_relaxed_u64(&ended->refused) +
                   vrep_load_relaxed_u64(&server->accept.turned_away),
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
