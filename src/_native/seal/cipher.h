/*
 * Cipher: AES-256-GCM with the nonce and associated data of a piece, for the files
 * of seal/ only.
 *
 * The key schedule is made once per context; a piece costs one nonce. Units:
 * bytes; a piece has at most VREP_PIECE_BYTES_MAX of them. Threading: a context
 * belongs to one thread at a time.
 */
#ifndef VREP_SEAL_CIPHER_H
#define VREP_SEAL_CIPHER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include <openssl/evp.h>

#include "format/layout.h"

struct vrep_cipher {
    EVP_CIPHER_CTX *context;
};

/* NOMEM or IO. */
int vrep_cipher_init(struct vrep_cipher *cipher, const uint8_t key[VREP_STREAM_KEY_BYTES],
                     bool sealing);
void vrep_cipher_clear(struct vrep_cipher *cipher);

/* Gives the next piece its nonce and associated data. IO. */
int vrep_cipher_begin(struct vrep_cipher *cipher, bool sealing, const struct vrep_record *header,
                      uint32_t word, uint32_t index);

/* Adds `len` bytes; in and out may be the same. IO. */
int vrep_cipher_add(struct vrep_cipher *cipher, bool sealing, const void *in, size_t len,
                    void *out);

/* Ends a piece: writes its tag (IO), or compares it (AUTH). */
int vrep_cipher_seal_end(struct vrep_cipher *cipher, uint8_t tag[VREP_TAG_BYTES]);
int vrep_cipher_open_end(struct vrep_cipher *cipher, const uint8_t tag[VREP_TAG_BYTES]);

#endif
