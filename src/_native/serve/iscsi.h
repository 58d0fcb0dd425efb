/* iSCSI target: serves the disks of one group on a loop as the logical units
 * of one target (RFC 7143, error recovery level 0, one connection a session).
 *
 * The target's name is configured, its portal group is 1.  Initiators are
 * admitted by name, address and CHAP; without CHAP only the loopback listens.
 * Several sessions, of one or several initiators, are several nexuses of the
 * SCSI room: multipath.  A session of an initiator with an ISID that it has
 * already ends the older one, and begins when that one's commands have left.
 *
 * Units: bytes, ns.  Limits: 64 sessions, 64 commands of each in the window,
 * 32 access rules.  Threading: create, close and destroy belong to the thread
 * that owns the loop from outside, while the loop does not run; sessions and
 * stats are for any thread.
 */
#ifndef VREP_SERVE_ISCSI_H
#define VREP_SERVE_ISCSI_H

#include <stdbool.h>
#include <stdint.h>

#include "scsi/scsi.h"
#include "serve/accept.h"
#include "serve/iscsi_login.h"

#define VREP_ISCSI_SESSIONS_MAX VREP_SCSI_NEXUSES_MAX
#define VREP_ISCSI_RULES_MAX 32u
#define VREP_ISCSI_PORT 3260u

struct vrep_iscsi_server;

/* Admits who matches both. */
struct vrep_iscsi_rule {
    const char *initiator; /* name; NULL: any */
    const char *address;   /* "10.0.0.7", "10.0.0.0/8", "fd00::/64"; NULL: any */
};
struct vrep_iscsi_config {
    const char *host;  /* a numeric address */
    uint16_t port;     /* 0: any */
    uint16_t sessions; /* 0: VREP_ISCSI_SESSIONS_MAX */
    const char *target_name;
    struct iscsi_credentials credentials; /* copied */
    const struct vrep_iscsi_rule *rules;  /* none: whoever authenticates */
    uint32_t rules_count;
    struct vrep_scsi_config scsi;
};

/* Binds and listens; nobody is answered before the loop runs.  INVALID: a name that is no iqn.,
 * eui. or naa. name, an address, a secret shorter than 12 bytes or the same in both directions, an
 * address other than the loopback without CHAP; what vrep_scsi_create gives. */
int vrep_iscsi_create(struct vrep_loop *loop, const struct vrep_iscsi_config *config,
                      struct vrep_iscsi_server **out);
uint16_t vrep_iscsi_port(const struct vrep_iscsi_server *server);
/* After the loop's stop, and after the group's close when that gave TIMEOUT. */
void vrep_iscsi_destroy(struct vrep_iscsi_server *server);

struct vrep_iscsi_session {
    char address[64];
    char initiator[ISCSI_NAME_MAX + 1]; /* empty while it logs in */
    uint64_t connected_ns;              /* CLOCK_REALTIME */
    struct vrep_traffic traffic;
};
uint32_t vrep_iscsi_sessions(struct vrep_iscsi_server *server, struct vrep_iscsi_session *out,
                             uint32_t max);

struct vrep_iscsi_stats {
    uint64_t accepted, refused; /* connections; refused: full, or by the login */
    struct vrep_traffic traffic;
    uint64_t stalls; /* times that a connection had to wait for room */
    uint32_t connections;
};
void vrep_iscsi_stats(struct vrep_iscsi_server *server, struct vrep_iscsi_stats *out);

#endif
