/* Internal to the NBD server: connections, requests, and who calls whom.
 *
 * nbd.c accepts, haggles, fences and ends connections; nbd_transmit.c receives
 * requests, submits commands and sends replies; nbd_status.c answers
 * BLOCK_STATUS.  Nothing outside src/_native/serve includes it.
 */
#ifndef VREP_SERVE_NBD_INTERNAL_H
#define VREP_SERVE_NBD_INTERNAL_H

#include <pthread.h>

#include "base/atomic.h"
#include "base/buffers.h"
#include "serve/accept.h"
#include "serve/nbd.h"
#include "serve/nbd_protocol.h"

#define NBD_STAGING_BYTES (256u << 10)
#define NBD_REQUESTS 1024u       /* of a server */
#define NBD_OUTSTANDING_MAX 256u /* of a connection, unsent replies included */
#define NBD_EXTENTS_MAX 480u     /* of one context in one answer: two of them fit a small buffer */

struct nbd_connection;

/* One request from its header to its last reply byte. */
struct nbd_request {
    struct nbd_request *next;           /* free list, or the replies to send */
    struct nbd_request *before, *after; /* submitted ones of a connection */
    struct nbd_connection *connection;  /* NULL: it ended meanwhile */
    struct vrep_command *command;
    struct vrep_nbd_request wire;
    struct vrep_buffer buffer; /* READ, CACHE, BLOCK_STATUS */
    uint32_t header_bytes;
    uint8_t header[VREP_NBD_ERROR_MAX];
    struct iovec iov[VREP_BUFFER_PAGES_MAX]; /* a command may consume it */
};

enum nbd_state {
    NBD_FREE = 0,
    NBD_HAGGLING,
    NBD_FENCED, /* waits until the commands of dead connections are complete */
    NBD_SERVING,
    NBD_FINISHING /* no more requests: what is in flight is answered, then it ends */
};

struct nbd_connection {
    struct vrep_watch watch;
    struct vrep_nbd_server *server;
    enum nbd_state state;
    uint32_t export; /* disk */
    bool structured;
    uint32_t contexts;
    bool readable; /* recv may have more */
    bool hangup;   /* the peer is gone: read until the end is seen */
    bool blocked;  /* the socket takes no more: wait for EPOLLOUT */
    bool stalled;  /* on the server's list */
    bool active;   /* on the server's list of those with work */
    bool replied;  /* on the server's list of those with replies to send */
    struct nbd_connection *next_stalled, *next_active, *next_replied;

    uint8_t *in; /* NBD_STAGING_BYTES */
    uint32_t in_from, in_to;
    bool large;                    /* the last request was a large write */
    struct nbd_request *waiting;   /* prepared again when there is payload memory */
    struct nbd_request *receiving; /* a WRITE whose payload is not whole yet */
    struct iovec *payload;         /* where the rest of it goes */
    int payload_count;
    uint64_t payload_left;
    uint64_t drop_left; /* payload of a refused WRITE */

    struct nbd_request *submitted;
    struct nbd_request *out_first, *out_last;
    uint64_t out_sent; /* bytes of out_first that are gone */
    uint32_t outstanding;
    uint32_t pages; /* of long reads, unsent replies included */

    uint8_t *answer; /* while haggling: VREP_NBD_ANSWER_MAX */
    uint32_t answer_from, answer_to;
    struct vrep_nbd_handshake shake;

    /* the last stretch of data found on its disk: what is data may always be reported as data */
    uint64_t data_from, data_to;

    struct vrep_nbd_client client; /* counters are written relaxed, the rest under the lock */
};

struct vrep_nbd_server {
    struct vrep_front front; /* first */
    struct vrep_loop *loop;
    struct vrep_group *group;
    struct vrep_accept unix_socket, tcp_socket;
    struct vrep_nbd_exports exports;
    char bitmap[128]; /* name of the context that tells what is dirty */
    struct vrep_buffers *buffers;
    struct nbd_request *requests, *free;
    struct nbd_connection *connections;
    uint32_t connections_max;
    uint32_t inflight; /* commands submitted and not done */
    uint32_t orphans;  /* those whose connection ended */
    uint32_t received; /* requests of this turn */
    bool stopping;
    bool freed;                         /* something that a stalled connection may wait for */
    struct nbd_connection *long_reader; /* it waits for pages: nobody else takes any */
    struct nbd_connection *stalled_first, *stalled_last;
    struct nbd_connection *active_first, *active_last;
    struct nbd_connection *replied_first;
    struct iovec iov[1024];
    uint8_t headers[64u << 10];  /* replies gathered for one sendmsg */
    pthread_mutex_t lock;        /* membership and names of connections; not on the I/O path */
    struct vrep_nbd_stats stats; /* of connections that ended; counters relaxed */
};

/* nbd.c */
void nbd_end(struct nbd_connection *c, const char *why);
void nbd_activate(struct nbd_connection *c);

/* nbd_transmit.c */
void nbd_receive(
    struct nbd_connection *c); /* until there is no input, no room, or its share is used */
void nbd_send(struct nbd_connection *c);
/* Takes a request out of the free list; NULL when there is none. */
struct nbd_request *nbd_request_take(struct nbd_connection *c);
void nbd_request_give(struct vrep_nbd_server *server, struct nbd_request *request);
/* Requests whose payload is not whole, or has no place yet. */
void nbd_drop_unsubmitted(struct nbd_connection *c);
/* Puts a whole reply into the queue of its connection. */
void nbd_reply(struct nbd_connection *c, struct nbd_request *request);
void nbd_reply_error(struct nbd_connection *c, struct nbd_request *request, uint32_t error,
                     const char *text);

/* nbd_status.c: fills header and buffer (one small one, already taken) or makes an error reply. */
void nbd_block_status(struct nbd_connection *c, struct nbd_request *request);

#endif
