/* NBD protocol without I/O: option haggling, requests, reply headers.
 *
 * The handshake is fed the bytes that came and gives the bytes to send; the
 * transmission phase has one decoder for requests and encoders for replies.
 * Everything on the wire is big-endian.  Foreign lengths are compared with what
 * is there before use; an option over VREP_NBD_OPTION_MAX is skipped unread and
 * refused.  docs/reference/nbd.md says what is offered.
 *
 * Units: bytes.  Limits: 64 exports, names of 255 bytes.  Threading: pure but
 * for the handshake struct, which belongs to its connection.
 */
#ifndef VREP_SERVE_NBD_PROTOCOL_H
#define VREP_SERVE_NBD_PROTOCOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "format/layout.h"

#define VREP_NBD_GREETING_BYTES 18u
#define VREP_NBD_OPTION_MAX (64u << 10)
#define VREP_NBD_ANSWER_MAX (32u << 10) /* all replies to one option */
#define VREP_NBD_EXPORT_NAME_MAX 255u
#define VREP_NBD_PAYLOAD_MAX VREP_WRITE_BYTES_MAX
#define VREP_NBD_BLOCK_PREFERRED 4096u

/* command types */
#define VREP_NBD_READ 0u
#define VREP_NBD_WRITE 1u
#define VREP_NBD_DISCONNECT 2u
#define VREP_NBD_FLUSH 3u
#define VREP_NBD_TRIM 4u
#define VREP_NBD_CACHE 5u
#define VREP_NBD_WRITE_ZEROES 6u
#define VREP_NBD_BLOCK_STATUS 7u
/* command flags */
#define VREP_NBD_FLAG_FUA 1u
#define VREP_NBD_FLAG_NO_HOLE 2u
#define VREP_NBD_FLAG_DF 4u
#define VREP_NBD_FLAG_REQ_ONE 8u
#define VREP_NBD_FLAG_FAST_ZERO 16u
/* errors */
#define VREP_NBD_EPERM 1u
#define VREP_NBD_EIO 5u
#define VREP_NBD_ENOMEM 12u
#define VREP_NBD_EINVAL 22u
#define VREP_NBD_ENOSPC 28u
#define VREP_NBD_ENOTSUP 95u
#define VREP_NBD_ESHUTDOWN 108u
/* structured chunks */
#define VREP_NBD_CHUNK_DONE 1u
#define VREP_NBD_CHUNK_NONE 0u
#define VREP_NBD_CHUNK_DATA 1u
#define VREP_NBD_CHUNK_STATUS 5u
#define VREP_NBD_CHUNK_ERROR 0x8001u
/* extents */
#define VREP_NBD_STATE_HOLE 1u
#define VREP_NBD_STATE_ZERO 2u
#define VREP_NBD_STATE_DIRTY 1u
/* metadata contexts: bits of a set; the id on the wire is the bit */
#define VREP_NBD_CONTEXT_ALLOCATION 1u
#define VREP_NBD_CONTEXT_DIRTY 2u

struct vrep_nbd_export {
    const char *name;
    uint64_t bytes;
    bool read_only;
    const char *bitmap; /* name of the context that tells what is dirty; NULL: none */
    bool hidden;        /* another front-end serves it: nobody finds it here */
};
struct vrep_nbd_exports {
    uint32_t count;
    struct vrep_nbd_export list[VREP_DISKS_MAX];
};

struct vrep_nbd_handshake {
    bool greeted;    /* client flags are here */
    bool fixed;      /* client may haggle */
    bool no_zeroes;  /* after EXPORT_NAME */
    bool structured; /* replies */
    uint32_t contexts;
    uint32_t contexts_export; /* they were chosen for */
    uint32_t export;          /* chosen */
    uint64_t skip;            /* bytes of a refused option still to be dropped */
};

enum vrep_nbd_step {
    VREP_NBD_MORE = 0, /* more bytes are needed */
    VREP_NBD_NEXT,     /* something was consumed: call again */
    VREP_NBD_SERVE,    /* transmission starts after the answer is sent */
    VREP_NBD_CLOSE,    /* send the answer, then close */
};

void vrep_nbd_greeting(uint8_t out[VREP_NBD_GREETING_BYTES]);
/* One option at most; `out` has room for VREP_NBD_ANSWER_MAX.  A whole option must fit the caller's
 * buffer: VREP_NBD_OPTION_MAX + 16. */
enum vrep_nbd_step vrep_nbd_handshake_step(struct vrep_nbd_handshake *shake,
                                           const struct vrep_nbd_exports *exports,
                                           const uint8_t *in, size_t in_bytes, size_t *consumed,
                                           uint8_t *out, size_t *out_bytes);
/* Transmission flags of an export. */
uint16_t vrep_nbd_export_flags(const struct vrep_nbd_export *export, bool structured);

#define VREP_NBD_REQUEST_BYTES 28u
struct vrep_nbd_request {
    uint16_t flags;
    uint16_t type;
    uint64_t cookie; /* opaque, goes back as it came */
    uint64_t offset;
    uint32_t length;
};
/* PROTOCOL: not a request, the connection has lost its place. */
int vrep_nbd_request_decode(const uint8_t in[VREP_NBD_REQUEST_BYTES], struct vrep_nbd_request *out);
/* What a request may not be: 0, or the error of its reply.  A WRITE that is refused still has its
 * payload behind it. */
uint32_t vrep_nbd_request_check(const struct vrep_nbd_request *request,
                                const struct vrep_nbd_export *export, bool structured,
                                uint32_t contexts);

#define VREP_NBD_SIMPLE_BYTES 16u
void vrep_nbd_simple(uint8_t out[VREP_NBD_SIMPLE_BYTES], uint32_t error, uint64_t cookie);
#define VREP_NBD_CHUNK_BYTES 20u
void vrep_nbd_chunk(uint8_t out[VREP_NBD_CHUNK_BYTES], uint16_t flags, uint16_t type,
                    uint64_t cookie, uint32_t length);
/* A whole error chunk with a text for people; returns its bytes. */
#define VREP_NBD_ERROR_MAX 128u
size_t vrep_nbd_error_chunk(uint8_t out[VREP_NBD_ERROR_MAX], uint32_t error, uint64_t cookie,
                            const char *text);
/* The error of a reply for a native status. */
uint32_t vrep_nbd_error(int status, uint16_t type);

#endif
