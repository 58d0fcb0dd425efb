/* NBD server: serves the disks of one group on a loop, over Unix and loopback
 * TCP sockets.
 *
 * The export name is the disk's name, the empty name its first disk.  Requests
 * are received many at a time; small payloads are copied into their command's
 * memory, what is left of a large one is received straight into it.  Replies of
 * a turn leave in one call.  A connection whose replies are not read, or that
 * finds no command, no payload memory or no read buffer free, is not read from
 * until there is.
 *
 * A connection that arrives first ends those whose peer is gone: what they had
 * not submitted is dropped, and the newcomer is served only once everything
 * that they had submitted is complete, so that no old write lands after a new
 * one.
 *
 * Units: bytes, ns.  Limits: 64 connections, 256 requests of each in flight,
 * payloads of 32 MiB, long reads of 32 MiB a connection and 128 MiB in
 * all that are not sent yet.  Threading: create, close
 * and destroy belong to the thread that owns the loop from outside, while the
 * loop does not run; clients and stats are for any thread.
 */
#ifndef VREP_SERVE_NBD_H
#define VREP_SERVE_NBD_H

#include <stdbool.h>
#include <stdint.h>

#include "serve/accept.h"

#define VREP_NBD_CONNECTIONS_MAX 64u

struct vrep_nbd_server;

struct vrep_nbd_config {
    const char *unix_path; /* NULL: none */
    uint32_t unix_mode;
    int64_t unix_group;   /* -1: as it is */
    const char *tcp_host; /* NULL: none; a loopback address */
    uint16_t tcp_port;    /* 0: any */
    uint16_t connections; /* 0: VREP_NBD_CONNECTIONS_MAX */
    uint64_t elsewhere;   /* a bit of each disk that another front-end serves */
};

/* Binds and listens; nobody is answered before the loop runs. */
int vrep_nbd_create(struct vrep_loop *loop, const struct vrep_nbd_config *config,
                    struct vrep_nbd_server **out);
uint16_t vrep_nbd_port(const struct vrep_nbd_server *server); /* TCP: the one bound */
/* After the loop's stop, and after the group's close when that gave TIMEOUT. */
void vrep_nbd_destroy(struct vrep_nbd_server *server);

struct vrep_nbd_client {
    char address[64];      /* "unix pid 12 uid 0", "127.0.0.1:40000" */
    char export[64];       /* empty while it haggles */
    uint64_t connected_ns; /* CLOCK_REALTIME */
    struct vrep_traffic traffic;
};
/* Returns how many were stored. */
uint32_t vrep_nbd_clients(struct vrep_nbd_server *server, struct vrep_nbd_client *out,
                          uint32_t max);

struct vrep_nbd_stats {
    uint64_t accepted, refused; /* connections */
    uint64_t fenced;            /* ended because a newcomer found their peer gone */
    struct vrep_traffic traffic;
    uint64_t stalls; /* times that a connection had to wait for room */
    uint32_t connections;
};
void vrep_nbd_stats(struct vrep_nbd_server *server, struct vrep_nbd_stats *out);

#endif
