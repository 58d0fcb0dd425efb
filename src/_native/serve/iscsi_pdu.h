/* iSCSI PDUs: where the fields of a basic header segment stand (RFC 7143 11),
 * how long a PDU is, and text keys.  No I/O; pure, any thread.
 *
 * Units: bytes.  Limits: a data segment of ISCSI_SEGMENT_MAX, and additional
 * header segments of 1020 bytes, are the longest that is received.
 */
#ifndef VREP_SERVE_ISCSI_PDU_H
#define VREP_SERVE_ISCSI_PDU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/endian.h"

#define ISCSI_BHS 48u
#define ISCSI_SEGMENT_MAX (256u << 10)
#define ISCSI_NAME_MAX 223u
#define ISCSI_NO_TAG 0xffffffffu

enum iscsi_opcode {
    ISCSI_NOP_OUT = 0x00,
    ISCSI_COMMAND = 0x01,
    ISCSI_TASK_MANAGEMENT = 0x02,
    ISCSI_LOGIN = 0x03,
    ISCSI_TEXT = 0x04,
    ISCSI_DATA_OUT = 0x05,
    ISCSI_LOGOUT = 0x06,
    ISCSI_SNACK = 0x10,
    ISCSI_NOP_IN = 0x20,
    ISCSI_RESPONSE = 0x21,
    ISCSI_TASK_MANAGEMENT_RESPONSE = 0x22,
    ISCSI_LOGIN_RESPONSE = 0x23,
    ISCSI_TEXT_RESPONSE = 0x24,
    ISCSI_DATA_IN = 0x25,
    ISCSI_LOGOUT_RESPONSE = 0x26,
    ISCSI_R2T = 0x31,
    ISCSI_REJECT = 0x3f
};
#define ISCSI_OPCODE_MASK 0x3fu
#define ISCSI_IMMEDIATE 0x40u /* byte 0 */
#define ISCSI_FINAL 0x80u     /* byte 1 */
#define ISCSI_CONTINUE 0x40u
#define ISCSI_READ 0x40u
#define ISCSI_WRITE 0x20u
#define ISCSI_OVERFLOW 0x04u
#define ISCSI_UNDERFLOW 0x02u
#define ISCSI_STATUS 0x01u

static inline uint8_t iscsi_opcode(const uint8_t *bhs)
{
    return bhs[0] & ISCSI_OPCODE_MASK;
}

static inline uint32_t iscsi_segment(const uint8_t *bhs)
{
    return vrep_be_load_u32(bhs + 4) & 0xffffffu;
}

static inline uint32_t iscsi_ahs(const uint8_t *bhs)
{
    return (uint32_t)bhs[4] * 4;
}

static inline uint32_t iscsi_pad(uint32_t bytes)
{
    return (4u - bytes % 4u) % 4u;
}

/* Looks at what was received.  MORE: not whole yet.  BROKEN: longer than anything that is sent
 * here, or a digest does not match: the connection is lost. */
enum iscsi_found { ISCSI_MORE, ISCSI_WHOLE, ISCSI_BROKEN };
struct iscsi_pdu {
    const uint8_t *bhs;
    const uint8_t *data;
    uint32_t data_bytes;
    uint32_t bytes; /* of all */
};
enum iscsi_found iscsi_pdu_find(const uint8_t *in, size_t have, bool header_digest,
                                bool data_digest, struct iscsi_pdu *out);

/* The next "key=value" of a text; false: no more, or *bad.  Both are NUL-terminated in place. */
struct iscsi_text {
    const char *at, *end;
};
bool iscsi_text_next(struct iscsi_text *text, const char **key, uint32_t *key_bytes,
                     const char **value, bool *bad);

/* A text being made; `full` when something did not fit. */
struct iscsi_made {
    char *text;
    uint32_t bytes, max;
    bool full;
};
void iscsi_made_add(struct iscsi_made *made, const char *key, const char *value);

/* A value that is a number in decimal or hexadecimal; false: it is none, or above UINT32_MAX. */
bool iscsi_number(const char *value, uint32_t *out);
/* Whether `one` stands in the comma-separated list. */
bool iscsi_listed(const char *list, const char *one);

#endif
