#include "serve/accept.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status.h"

#define ACCEPTS_A_TURN 16

static int open_spare(void)
{
    return open("/dev/null", O_RDONLY | O_CLOEXEC);
}

/* Without a descriptor a waiting client would wake the loop for ever. */
static void turn_away(struct vrep_accept *accept)
{
    if (accept->spare_fd < 0) /* somebody else took the one that was free */
        accept->spare_fd = open_spare();
    if (accept->spare_fd < 0)
        return;
    close(accept->spare_fd);
    vrep_count(&accept->turned_away, 1);
    int fd = accept4(accept->watch.fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd >= 0)
        close(fd);
    accept->spare_fd = open_spare();
}

static void ready(struct vrep_watch *watch, uint32_t events)
{
    struct vrep_accept *accept = (struct vrep_accept *)watch;
    (void)events;
    for (int i = 0; i < ACCEPTS_A_TURN && watch->fd >= 0; i++) {
        int fd = accept4(watch->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR)
                VREP_WARN(accept->front, "accept: %s", strerror(errno));
            if (errno == EMFILE || errno == ENFILE)
                turn_away(accept);
            return;
        }
        accept->connected(accept, fd);
    }
}

void vrep_accept_init(struct vrep_accept *accept, struct vrep_loop *loop, const char *front,
                      void (*connected)(struct vrep_accept *accept, int fd), void *owner)
{
    *accept = (struct vrep_accept){
        .watch = {-1, ready},
        .listener = {.fd = -1},
        .loop = loop,
        .front = front,
        .connected = connected,
        .owner = owner,
        .spare_fd = -1,
    };
}

int vrep_accept_start(struct vrep_accept *accept)
{
    accept->spare_fd = open_spare();
    accept->watch.fd = accept->listener.fd;
    int status = vrep_loop_watch(accept->loop, &accept->watch, EPOLLIN);
    if (status != VREP_OK)
        accept->watch.fd = -1;
    return status;
}

void vrep_accept_stop(struct vrep_accept *accept)
{
    if (accept->watch.fd >= 0)
        vrep_loop_forget(accept->loop, &accept->watch);
    accept->watch.fd = -1;
    vrep_listen_close(&accept->listener);
    if (accept->spare_fd >= 0)
        close(accept->spare_fd);
    accept->spare_fd = -1;
}

void vrep_peer_name(int fd, char out[VREP_PEER_NAME_MAX])
{
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_storage storage;
    } peer;
    socklen_t bytes = sizeof peer;
    char text[INET6_ADDRSTRLEN] = "?";
    struct ucred who;
    socklen_t who_bytes = sizeof who;
    if (getpeername(fd, &peer.any, &bytes) != 0) {
        snprintf(out, VREP_PEER_NAME_MAX, "?");
    } else if (peer.any.sa_family == AF_INET) {
        inet_ntop(AF_INET, &peer.v4.sin_addr, text, sizeof text);
        snprintf(out, VREP_PEER_NAME_MAX, "%s:%u", text, ntohs(peer.v4.sin_port));
    } else if (peer.any.sa_family == AF_INET6) {
        inet_ntop(AF_INET6, &peer.v6.sin6_addr, text, sizeof text);
        snprintf(out, VREP_PEER_NAME_MAX, "[%s]:%u", text, ntohs(peer.v6.sin6_port));
    } else if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &who_bytes) == 0) {
        snprintf(out, VREP_PEER_NAME_MAX, "unix pid %d uid %u", (int)who.pid, (unsigned)who.uid);
    } else {
        snprintf(out, VREP_PEER_NAME_MAX, "unix");
    }
}

bool vrep_peer_is_gone(int fd)
{
    struct pollfd look = {.fd = fd, .events = POLLRDHUP};
    return poll(&look, 1, 0) == 1 && look.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

uint64_t vrep_accept_time_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

struct vrep_traffic vrep_traffic_read(const struct vrep_traffic *traffic)
{
    return (struct vrep_traffic){
        .requests = vrep_load_relaxed_u64(&traffic->requests),
        .read_bytes = vrep_load_relaxed_u64(&traffic->read_bytes),
        .written_bytes = vrep_load_relaxed_u64(&traffic->written_bytes),
        .errors = vrep_load_relaxed_u64(&traffic->errors),
    };
}

void vrep_traffic_add(struct vrep_traffic *to, const struct vrep_traffic *more)
{
    struct vrep_traffic now = vrep_traffic_read(more);
    vrep_count(&to->requests, now.requests);
    vrep_count(&to->read_bytes, now.read_bytes);
    vrep_count(&to->written_bytes, now.written_bytes);
    vrep_count(&to->errors, now.errors);
}
