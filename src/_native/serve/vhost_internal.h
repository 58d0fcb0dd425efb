/* Internal to the vhost-user server.
 *
 * vhost.c accepts, receives and ends connections; vhost_messages.c does what messages ask for;
 * vhost_memory.c maps the guest's memory
 * and logs what is written to it; vhost_queue.c takes chains from virtqueues, gives them back and
 * keeps the in-flight region; vhost_block.c makes commands of them.  Nothing outside
 * src/_native/serve includes it.
 */
#ifndef VREP_SERVE_VHOST_INTERNAL_H
#define VREP_SERVE_VHOST_INTERNAL_H

#include <pthread.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/atomic.h"
#include "serve/vhost.h"
#include "serve/vhost_protocol.h"

/* With header and status, and where memory goes on in another region. */
#define VHOST_SEGMENTS_MAX (VREP_VIRTIO_SEGMENTS_MAX + 2u + VREP_VHOST_REGIONS_MAX)
#define VHOST_REQUESTS 256u /* of a server, in flight */

/* ---- vhost_memory.c --------------------------------------------------------------- */

struct vhost_region {
    struct vrep_vhost_region is;
    uint8_t *at; /* of its first byte */
    void *mapped;
    size_t mapped_bytes;
    uint32_t users;
};
/* Regions as they are at one moment; requests that use them hold it. */
struct vhost_memory {
    uint32_t users, count;
    struct vhost_region *region[VREP_VHOST_REGIONS_MAX];
};
struct vhost_log {
    uint8_t *at; /* NULL: nothing is logged; a bit of each page of 4 KiB of guest memory */
    uint64_t bytes;
    void *mapped;
    size_t mapped_bytes;
};

/* Maps [offset, offset + bytes) of a file that is as long as that; *at is the first byte. */
int vhost_map(int fd, uint64_t offset, uint64_t bytes, void **mapped, size_t *mapped_bytes,
              uint8_t **at);
struct vhost_memory *vhost_memory_create(void);
/* A copy with one region more, or one less; NULL: no memory, or it is not there. */
struct vhost_memory *vhost_memory_with(const struct vhost_memory *memory,
                                       const struct vrep_vhost_region *region, int fd, int *status);
struct vhost_memory *vhost_memory_without(const struct vhost_memory *memory,
                                          const struct vrep_vhost_region *region);
void vhost_memory_hold(struct vhost_memory *memory);
void vhost_memory_let(struct vhost_memory *memory);
/* NULL unless all of it lies in one region. */
uint8_t *vhost_guest(const struct vhost_memory *memory, uint64_t address, uint64_t bytes);
/* The beginning of it, and how much of it lies in that region; NULL: it begins in none. */
uint8_t *vhost_guest_part(const struct vhost_memory *memory, uint64_t address, uint64_t *bytes);
/* The same as vhost_guest for an address of the monitor. */
uint8_t *vhost_user(const struct vhost_memory *memory, uint64_t address, uint64_t bytes);
int vhost_log_open(struct vhost_log *log, int fd, uint64_t offset, uint64_t bytes);
void vhost_log_close(struct vhost_log *log);
/* [address, address + bytes) of guest memory was written. */
void vhost_log_write(struct vhost_log *log, uint64_t address, uint64_t bytes);

/* ---- vhost_queue.c ----------------------------------------------------------------- */

struct vhost_connection;
struct vhost_queue {
    struct vrep_watch kick;
    struct vhost_connection *connection;
    int call_fd, error_fd;
    uint32_t size;
    uint16_t number;
    bool started, enabled, stopping;
    bool again; /* there may be chains, or room for one that waits: looked at in the next turn */
    bool more;  /* the turn ended before its chains did */
    struct vhost_request *waiting; /* taken; prepared again when there is payload memory */
    uint64_t address_descriptors, address_available, address_used, address_log;
    bool log_used;
    /* mapped while it is started */
    struct vrep_vring_descriptor *descriptors;
    uint8_t *available, *used;
    struct vhost_memory *memory;
    uint16_t seen;                          /* next index of the available ring */
    uint16_t published;                     /* index of the used ring as the guest sees it */
    uint16_t given;                         /* entries put into the used ring since */
    uint16_t waited;                        /* index of the available ring when it started */
    uint32_t inflight;                      /* chains taken and not given back */
    struct vrep_vhost_inflight_queue *kept; /* NULL: without a region */
    uint64_t counter;
    /* of the earlier connection, to be submitted again, in their order */
    uint16_t *resubmit;
    uint32_t resubmit_next, resubmit_count;
    bool *taken; /* heads in flight: a guest that offers one twice is broken */
    bool broken;
};

/* One chain, as it was read. */
struct vhost_chain {
    uint16_t head;
    uint32_t readable, writable; /* segments, the readable ones first */
    uint64_t readable_bytes, writable_bytes;
    struct iovec segment[VHOST_SEGMENTS_MAX];
    uint64_t address[VHOST_SEGMENTS_MAX]; /* of the guest */
};

int vhost_queue_start(struct vhost_queue *queue, struct vhost_memory *memory);
void vhost_queue_stop(struct vhost_queue *queue);
/* The next chain: OK, AGAIN: there is none, PROTOCOL: the queue is broken. */
int vhost_queue_take(struct vhost_queue *queue, struct vhost_chain *chain);
/* Other memory is in force: looks its rings up again. */
int vhost_queue_remap(struct vhost_queue *queue, struct vhost_memory *memory);
/* `written` bytes of its writable segments were filled. */
void vhost_queue_give(struct vhost_queue *queue, uint16_t head, uint32_t written);
/* Nothing of it is in flight, and nothing is left to be submitted again. */
bool vhost_queue_is_drained(const struct vhost_queue *queue);
/* Shows the guest what was given, and tells it if it wants to be told. */
void vhost_queue_publish(struct vhost_queue *queue);

/* ---- vhost_block.c ----------------------------------------------------------------- */

struct vhost_request {
    struct vhost_request *next;
    struct vhost_queue *queue;            /* NULL: its connection ended meanwhile */
    struct vhost_request *before, *after; /* of a connection */
    struct vrep_vhost_server *server;
    struct vhost_memory *memory;
    struct vrep_command *command;
    uint32_t type;
    uint8_t *status; /* in guest memory */
    uint64_t status_address;
    struct vhost_chain chain;
    struct iovec iov[VHOST_SEGMENTS_MAX]; /* a command may consume it */
};

/* Takes chains until there are none; false: no room, or (`more`) enough for a turn. */
bool vhost_block_run(struct vhost_queue *queue);

/* ---- vhost.c ------------------------------------------------------------------------- */

struct vhost_connection {
    struct vrep_watch watch;
    struct vrep_vhost_server *server;
    bool open;
    bool readable;
    struct vrep_vhost_message message; /* being received */
    uint32_t received;                 /* of header and body */
    uint64_t features, protocol;
    struct vhost_memory *memory;
    struct vhost_log log;
    int backend_fd;
    void *inflight; /* mapped */
    size_t inflight_mapped;
    uint8_t *inflight_at;
    uint64_t inflight_bytes;
    uint16_t inflight_size; /* of the queues that it was made for */
    struct vhost_queue queue[VREP_VHOST_QUEUES_MAX];
    struct vhost_request *requests; /* in flight */
    bool moved; /* all its queues stopped under the log, and its guest was not seen to run since */
    bool left;  /* and its guest was seen to run elsewhere: it never goes on here */
    bool runs;  /* its guest was seen to run */
    int draining; /* queue that GET_VRING_BASE waits for; -1: none */
};

struct vrep_vhost_server {
    struct vrep_front front; /* first */
    struct vrep_loop *loop;
    struct vrep_group *group;
    uint32_t disk;
    struct vrep_virtio_disk info;
    bool read_only;
    char serial[VREP_VIRTIO_ID_BYTES];
    struct vrep_accept accept;
    struct vhost_connection connection[VREP_VHOST_MONITORS_MAX];
    struct vhost_connection *holder; /* that started queues last, and is still there; or NULL */
    bool taken_over;                 /* a guest was seen to run since the last one moved away */
    struct vhost_request *requests, *free;
    uint32_t inflight; /* commands submitted and not done */
    uint32_t orphans;  /* of those, whose connection ended */
    uint32_t received; /* requests of this turn */
    bool stopping;
    pthread_mutex_t lock; /* guards what the statistics say of monitors */
    struct vrep_vhost_stats stats;
};

struct vhost_request *vhost_request_take(struct vrep_vhost_server *server);
void vhost_request_give(struct vrep_vhost_server *server, struct vhost_request *request);
void vhost_end(struct vhost_connection *c, const char *why);
/* Whether one of its queues runs. */
bool vhost_uses(const struct vhost_connection *c);
/* The disk is this one's now; NULL: nobody's. */
void vhost_hold(struct vrep_vhost_server *server, struct vhost_connection *c);

/* ---- vhost_messages.c -------------------------------------------------------------------- */

/* A whole message. False: the connection ended. */
bool vhost_take_message(struct vhost_connection *c);
/* The guest offered a chain that did not wait yet when its queue started: there are processors that
 * run it. Where others were left, they are barred now, before the chain is done. */
void vhost_guest_runs(struct vhost_connection *c);
/* Ends the wait of GET_VRING_BASE. 1, or below 0: nobody reads the answer. */
int vhost_answer_base(struct vhost_connection *c, struct vhost_queue *queue);
bool vhost_send(int socket, const struct vrep_vhost_header *header, const void *body, int fd);
void vhost_close_fds(struct vrep_vhost_message *message);
void vhost_forget_kick(struct vhost_queue *queue);
void vhost_drop_inflight(struct vhost_connection *c);

/* ---- shared ---------------------------------------------------------------------------------- */

static inline void vhost_close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* A feature of the protocol that both agreed on. */
static inline bool vhost_speaks(const struct vhost_connection *c, int feature)
{
    return (c->protocol >> feature & 1) != 0;
}

#endif
