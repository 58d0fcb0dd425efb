/* vhost-user-blk: serves one disk of a group to a virtual machine monitor, which hands over the
 * guest's memory and its virtqueues.
 *
 * A Unix socket per disk.  One monitor at a time uses it; a second one may be connected beside it,
 * and gets the disk when the first is gone, or when the guest has moved to it: the first stopped
 * all queues while it had the guest's memory logged (live migration).  What the guest writes is
 * copied once, from its memory into the ring's; what it reads goes straight into its memory.  All
 * queues land on the group's thread.  What is in flight stands in memory that the monitor keeps
 * (the in-flight region): after a kill, or a restart, it is submitted again, in its order, to the
 * filter that comes next, once everything that the old connection had submitted is complete.
 *
 * The guest's memory is shared with the guest: every descriptor is read once, and every address is
 * looked up before it is used.  A monitor that shortens the file behind that memory kills the
 * filter (SIGBUS): it is trusted with that, as it is with the guest.
 *
 * Units: bytes.  Limits: two monitors, 16 queues of 1024, requests of 32 MiB and 256 segments.
 * Threading: as nbd.h.
 */
#ifndef VREP_SERVE_VHOST_H
#define VREP_SERVE_VHOST_H

#include <stdbool.h>
#include <stdint.h>

#include "serve/accept.h"

struct vrep_vhost_server;

struct vrep_vhost_config_server {
    const char *unix_path;
    uint32_t unix_mode;
    int64_t unix_group;   /* -1: as it is */
    uint32_t disk;        /* of the group */
    uint32_t block_bytes; /* what the guest sees as a block: 512 or 4096; 0: 512 */
    uint16_t queues;      /* at most; 0: VREP_VHOST_QUEUES_MAX */
};

/* Binds and listens; nobody is answered before the loop runs. */
int vrep_vhost_create(struct vrep_loop *loop, const struct vrep_vhost_config_server *config,
                      struct vrep_vhost_server **out);
/* After the loop's stop, and after the group's close when that gave TIMEOUT. */
void vrep_vhost_destroy(struct vrep_vhost_server *server);

#define VREP_VHOST_MONITORS_MAX 2u
struct vrep_vhost_monitor {
    char address[64];      /* empty: none */
    uint64_t connected_ns; /* CLOCK_REALTIME */
    bool holds;            /* the disk is this one's, whether its queues run or not */
};
struct vrep_vhost_stats {
    struct vrep_vhost_monitor monitor[VREP_VHOST_MONITORS_MAX];
    uint64_t accepted, refused;
    struct vrep_traffic traffic;
    uint64_t resubmitted; /* that stood in the in-flight region of an earlier connection */
    uint64_t stalls;
};
/* From any thread. */
void vrep_vhost_stats(struct vrep_vhost_server *server, struct vrep_vhost_stats *out);

#endif
