/* iSCSI login: negotiation of one connection, from its first login request to
 * full feature phase or refusal (RFC 7143 6.3, 12, 13), with CHAP (RFC 1994)
 * in one or both directions.  No I/O.
 *
 * Limits: 16 KiB of keys in one exchange, secrets of 12 to 255 bytes.  Threading:
 * one login by one thread.
 */
#ifndef VREP_SERVE_ISCSI_LOGIN_H
#define VREP_SERVE_ISCSI_LOGIN_H

#include "serve/iscsi_pdu.h"

#define ISCSI_TEXT_MAX (16u << 10)
#define ISCSI_CHAP_MAX 255u
#define ISCSI_CHALLENGE 16u
#define ISCSI_MAX_BURST (1u << 20)
#define ISCSI_FIRST_BURST (256u << 10)

struct iscsi_credentials {
    const char *name; /* NULL: none are asked for */
    const char *secret;
    const char *mutual_name; /* NULL: the target does not prove itself */
    const char *mutual_secret;
};

/* class << 8 | detail of a login response */
enum iscsi_login_status {
    ISCSI_LOGIN_OK = 0,
    ISCSI_LOGIN_INITIATOR_ERROR = 0x0200,
    ISCSI_LOGIN_AUTHENTICATION = 0x0201,
    ISCSI_LOGIN_FORBIDDEN = 0x0202,
    ISCSI_LOGIN_NOT_FOUND = 0x0203,
    ISCSI_LOGIN_VERSION = 0x0205,
    ISCSI_LOGIN_TOO_MANY = 0x0206,
    ISCSI_LOGIN_MISSING = 0x0207,
    ISCSI_LOGIN_SESSION_TYPE = 0x0209,
    ISCSI_LOGIN_NO_SESSION = 0x020a,
    ISCSI_LOGIN_INVALID = 0x020b,
    ISCSI_LOGIN_TARGET_ERROR = 0x0300,
    ISCSI_LOGIN_NO_RESOURCES = 0x0302
};

struct iscsi_login {
    /* set by who begins it */
    const struct iscsi_credentials *credentials;
    const char *target_name;

    /* what was agreed, valid in full feature phase */
    char initiator[ISCSI_NAME_MAX + 1];
    bool named, discovery, target_given, target_right;
    bool header_digest, data_digest, initial_r2t, immediate_data;
    uint32_t send_max; /* of a data segment that the initiator receives */
    uint32_t max_burst, first_burst;

    /* private */
    bool begun, authenticated, declared, tagged, done;
    uint8_t stage;
    uint8_t isid[6];
    uint8_t chap_step; /* 0: none, 1: CHAP chosen, 2: challenged */
    uint8_t chap_algorithm, chap_id;
    uint8_t challenge[ISCSI_CHALLENGE];
    uint32_t kept_bytes; /* of keys that go on in the next request */
    char kept[ISCSI_TEXT_MAX];
};

void iscsi_login_init(struct iscsi_login *login, const struct iscsi_credentials *credentials,
                      const char *target_name);
/* One login request: fills the response's header (48 bytes, but for StatSN, ExpCmdSN, MaxCmdSN) and
 * text.  Returns an iscsi_login_status; but for OK the connection ends after the response.  When
 * the initiator goes to full feature phase, login->done is true. */
int iscsi_login_step(struct iscsi_login *login, const struct iscsi_pdu *pdu, uint8_t *bhs,
                     struct iscsi_made *made);

#endif
