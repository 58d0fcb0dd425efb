/* Internal to the iSCSI target: connections, items, and who calls whom.
 *
 * iscsi.c accepts, admits, and ends connections; iscsi_request.c receives PDUs
 * and carries them out, iscsi_session.c those of the session itself; iscsi_send.c makes PDUs of
 * answers and sends them; iscsi_rule.c says who is admitted.  Nothing outside src/_native/serve
 * includes it.
 */
#ifndef VREP_SERVE_ISCSI_INTERNAL_H
#define VREP_SERVE_ISCSI_INTERNAL_H

#include <netinet/in.h>
#include <pthread.h>

#include "base/atomic.h"
#include "serve/iscsi.h"

#define ISCSI_IN_BYTES (512u << 10)
#define ISCSI_WINDOW 64u     /* of commands of a session */
#define ISCSI_BATCH_PDUS 64u /* made before they are sent */
#define ISCSI_BATCH_IOV 512u
#define ISCSI_QUEUE_MAX 256u
#define ISCSI_TAIL 8u       /* padding and digest behind a data segment */
#define ISCSI_TAG_LISTS 64u /* initiators number their tasks, from 0 or in a row */

struct iscsi_connection;

/* Something to be sent: a PDU that was made, or the data and status of a task. */
struct iscsi_item {
    struct iscsi_item *next;
    struct iscsi_task *task; /* NULL: header and data below */
    uint8_t bhs[ISCSI_BHS];
    uint8_t *data; /* malloc'ed, NULL: none */
    uint32_t data_bytes;
    bool counts; /* takes a StatSN */
    bool bare;   /* without digests: a login response */
    bool ends;   /* the connection ends behind it */
};

struct iscsi_task {
    struct vrep_scsi_task scsi; /* first */
    struct iscsi_item item;
    uint8_t sense[2 + VREP_SENSE_BYTES_MAX];
    struct iscsi_task *before, *after;   /* of its connection; or the free list */
    struct iscsi_task *next_tag;         /* in the list that its tag is looked for in */
    struct iscsi_connection *connection; /* NULL: it ended meanwhile */
    struct vrep_iscsi_server *server;
    uint32_t tag, expected; /* ITT, EDTL */
    uint8_t direction;      /* ISCSI_READ, ISCSI_WRITE */
    bool submitted, unsolicited, solicited;
    bool broken; /* its data came out of order: it ends in an error when the rest has come */
    uint32_t received, burst_end, transfer_tag, data_sn, r2t_sn;
    int out_index;
    size_t out_within;
    uint32_t sent; /* of its data-in */
    uint32_t in_sn;
};

struct iscsi_manage {
    struct vrep_scsi_management scsi; /* first */
    struct iscsi_connection *connection;
    struct iscsi_manage *next; /* of its connection */
    struct vrep_iscsi_server *server;
    uint32_t tag;
    bool cold;
};

enum iscsi_state { ISCSI_FREE, ISCSI_LOGGING_IN, ISCSI_SERVING, ISCSI_FINISHING };

struct iscsi_connection {
    struct vrep_watch watch; /* first */
    struct vrep_iscsi_server *server;
    enum iscsi_state state;
    struct iscsi_login *login;     /* what was agreed stays in it */
    struct vrep_scsi_nexus *nexus; /* NULL: discovery, or not yet */
    struct sockaddr_storage peer;
    uint8_t *in;
    uint32_t in_from, in_to;
    bool readable, hung_up, stalled, active, replied;
    struct iscsi_connection *next_active, *next_replied;

    uint32_t exp_cmd_sn, max_cmd_sn, stat_sn;
    struct iscsi_task *tasks; /* all of it, answered ones until they are sent */
    struct iscsi_task *tags[ISCSI_TAG_LISTS];
    uint32_t tasks_count; /* in the window */
    struct iscsi_manage *managing;

    struct iscsi_item *out_first, *out_last;   /* to be made into PDUs */
    struct iscsi_item *sent_first, *sent_last; /* wholly in the batch */
    struct iovec *batch;
    uint32_t batch_at, batch_count;
    uint8_t (*heads)[ISCSI_BHS + 4];
    uint8_t (*tails)[ISCSI_TAIL];
    bool writable, ends;
    uint32_t queued; /* PDUs that are no task's */

    uint64_t heard_ms; /* when anything came last */
    bool pinged;
    struct vrep_iscsi_session client;
};

struct iscsi_rule {
    char initiator[ISCSI_NAME_MAX + 1]; /* empty: any */
    uint8_t address[16];                /* IPv4 as mapped */
    uint32_t bits;                      /* 0: any */
};

struct vrep_iscsi_server {
    struct vrep_front front; /* first */
    struct vrep_loop *loop;
    struct vrep_group *group;
    struct vrep_scsi_target *target;
    char name[ISCSI_NAME_MAX + 1];
    struct iscsi_credentials credentials; /* in `secrets` */
    char secrets[4][ISCSI_CHAP_MAX + 1];
    struct iscsi_rule rules[VREP_ISCSI_RULES_MAX];
    uint32_t rules_count;
    struct vrep_accept accept;
    struct vrep_watch scsi_watch, timer_watch;
    struct iscsi_connection *connections;
    uint32_t connections_max;
    struct iscsi_task *tasks, *free_task;
    struct iscsi_item *free_item;
    uint32_t tasks_max, tasks_free;
    struct iscsi_connection *active_first, *active_last, *replied_first;
    bool freed, stopping;
    uint32_t managing; /* in the SCSI room */
    uint32_t received;
    uint32_t transfer_tag;
    uint16_t tsih;
    pthread_mutex_t lock; /* connections' fds and names, totals of ended ones */
    struct vrep_iscsi_stats stats;
};

/* iscsi.c */
void iscsi_activate(struct iscsi_connection *c);
void iscsi_end(struct iscsi_connection *c, const char *why);
/* A login that is done: admits it and opens its nexus.  An iscsi_login_status. */
int iscsi_admit(struct iscsi_connection *c);

/* iscsi_request.c */
/* Works on what lies in the staging buffer; false: the connection has ended. */
bool iscsi_consume(struct iscsi_connection *c);
void iscsi_task_give(struct iscsi_task *task);
/* Nobody waits for what is in flight any more. */
void iscsi_forget_tasks(struct iscsi_connection *c);

/* iscsi_session.c */
enum handled { HANDLED, STALLED, ENDED }; /* what came of a PDU: STALLED, it waits for room */
#define ISCSI_REJECT_PROTOCOL 0x04u
#define ISCSI_REJECT_COMMAND 0x05u
enum handled iscsi_reject(struct iscsi_connection *c, const struct iscsi_pdu *pdu, uint8_t reason);
enum handled iscsi_text_request(struct iscsi_connection *c, const struct iscsi_pdu *pdu);
enum handled iscsi_nop_out(struct iscsi_connection *c, const struct iscsi_pdu *pdu);
enum handled iscsi_logout(struct iscsi_connection *c, const struct iscsi_pdu *pdu);
enum handled iscsi_login_request(struct iscsi_connection *c, const struct iscsi_pdu *pdu);

/* iscsi_send.c */
void iscsi_queue(struct iscsi_connection *c, struct iscsi_item *item);
/* A PDU with a copy of data; false: no memory. */
bool iscsi_queue_pdu(struct iscsi_connection *c, const uint8_t *bhs, const void *data,
                     uint32_t bytes, bool counts);
void iscsi_send(struct iscsi_connection *c);
void iscsi_drop_queue(struct iscsi_connection *c);
bool iscsi_nothing_to_send(const struct iscsi_connection *c);
uint32_t iscsi_max_cmd_sn(struct iscsi_connection *c);

/* iscsi_rule.c */
int iscsi_rule_parse(const struct vrep_iscsi_rule *rule, struct iscsi_rule *out);
bool iscsi_admitted(const struct iscsi_rule *rules, uint32_t count, const char *initiator,
                    const struct sockaddr_storage *peer);
bool iscsi_name_valid(const char *name);

#endif
