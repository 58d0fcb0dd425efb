/* Accept: what front-ends do alike with those who connect: take them from a
 * listening socket in the loop's turn, name them, see that one is gone, and
 * count what they moved.  What is then said to them is the front-end's.
 *
 * Units: bytes, ns.  Limits: 16 connections a turn; the rest wait in the kernel.
 * A process without descriptors turns clients away with its last one, since a
 * client that waits would wake the loop for ever.  Threading: the loop's
 * thread; traffic is written by it and read by any.
 */
#ifndef VREP_SERVE_ACCEPT_H
#define VREP_SERVE_ACCEPT_H

#include <stdbool.h>
#include <stdint.h>

#include "base/atomic.h"
#include "serve/listen.h"
#include "serve/loop.h"

#define VREP_PEER_NAME_MAX 64u

struct vrep_accept {
    struct vrep_watch watch; /* first; fd -1: it does not listen */
    struct vrep_listener listener;
    struct vrep_loop *loop;
    const char *front; /* "nbd": what the log says */
    /* Takes the socket over; it does not block. */
    void (*connected)(struct vrep_accept *accept, int fd);
    void *owner;
    int spare_fd;         /* given up to turn a client away when no descriptor is left */
    uint64_t turned_away; /* counted relaxed */
};

/* Before anything else, also when it never listens. */
void vrep_accept_init(struct vrep_accept *accept, struct vrep_loop *loop, const char *front,
                      void (*connected)(struct vrep_accept *accept, int fd), void *owner);
/* Its listener is bound: connections come from the next turn on. */
int vrep_accept_start(struct vrep_accept *accept);
/* No more of them; the listener is closed.  Again, or without a start: nothing. */
void vrep_accept_stop(struct vrep_accept *accept);

/* "10.0.0.7:1234", "[fd00::7]:1234", "unix pid 7 uid 0". */
void vrep_peer_name(int fd, char out[VREP_PEER_NAME_MAX]);
/* It closed its side, or all of it. */
bool vrep_peer_is_gone(int fd);
/* CLOCK_REALTIME. */
uint64_t vrep_accept_time_ns(void);

/* What one connection moved, or all that a server had. */
struct vrep_traffic {
    uint64_t requests, read_bytes, written_bytes, errors;
};

/* One writer: a plain addition that readers of other threads see whole. */
static inline void vrep_count(uint64_t *counter, uint64_t more)
{
    vrep_store_relaxed_u64(counter, vrep_load_relaxed_u64(counter) + more);
}

/* As it is now, to any thread. */
struct vrep_traffic vrep_traffic_read(const struct vrep_traffic *traffic);
/* `to` is its caller's alone, or written by the loop's thread. */
void vrep_traffic_add(struct vrep_traffic *to, const struct vrep_traffic *more);

#endif
