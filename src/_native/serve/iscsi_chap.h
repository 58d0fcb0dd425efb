/* CHAP: responses and the encodings of binary values in text (RFC 7143 12.1.3,
 * 6.1).  Pure but for the random challenge; any thread. */
#ifndef VREP_SERVE_ISCSI_CHAP_H
#define VREP_SERVE_ISCSI_CHAP_H

#include <stdbool.h>
#include <stdint.h>

#define CHAP_MD5 5u
#define CHAP_SHA256 7u
#define CHAP_RESPONSE_MAX 32u
#define CHAP_BINARY_MAX 1024u

/* Digest of id, secret, challenge; its length, 0 when the algorithm is not to be had. */
uint32_t iscsi_chap_response(uint8_t algorithm, uint8_t id, const char *secret,
                             const uint8_t *challenge, uint32_t challenge_bytes,
                             uint8_t out[CHAP_RESPONSE_MAX]);
bool iscsi_chap_random(uint8_t *out, uint32_t bytes);
/* "0x..." or "0b..." (base64); false: neither, or longer than max. */
bool iscsi_binary_decode(const char *text, uint8_t *out, uint32_t max, uint32_t *bytes);
/* "0x...": out has room for 2 * bytes + 3. */
void iscsi_binary_encode(const uint8_t *bytes, uint32_t count, char *out);

#endif
