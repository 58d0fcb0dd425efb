/*
 * Block hash: XXH3-64 or XXH3-128 of every block of a buffer or of a range of a
 * file, and which blocks are zero.
 *
 * Blocks. Block i covers bytes [i * block_size, (i + 1) * block_size) of the
 * buffer or range, counted from its start; the last one is hashed as short as it
 * is. Block size: a power of two, 512 bytes to 16 MiB.
 *
 * Values: XXH3 by the xxHash specification, without a seed, with the default
 * secret or the caller's (>= 136 bytes of high entropy; its length changes the
 * value). 64 bits: one uint64_t per block. 128 bits: two, low64 then high64 of
 * XXH128_hash_t. In memory these are native integers; a format that stores them
 * writes low then high, each little-endian. XXH3 is not a cryptographic hash: a
 * secret keeps values of different groups apart, it does not stop an attacker
 * who knows it.
 *
 * Zero blocks get the hash of their zero bytes like any other; it is computed
 * once and reused. Holes of a file (SEEK_DATA/SEEK_HOLE) are zero blocks that
 * are never read.
 *
 * Memory: a buffer is hashed in place. A file range of any size is read with
 * pread into one buffer of max(256 KiB, block_size) per thread.
 *
 * Threading: the functions keep no state and may be called from any thread. With
 * threads > 1 they start up to threads - 1 helpers for the time of the call (all
 * signals blocked in them); if the system refuses one, fewer do the same work.
 * Results do not depend on the number of threads. Data that change during the
 * call are hashed as some mixture of old and new.
 */
#ifndef VREP_TRACK_HASH_H
#define VREP_TRACK_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VREP_HASH_BLOCK_MIN UINT32_C(512)
#define VREP_HASH_BLOCK_MAX (UINT32_C(16) << 20)
#define VREP_HASH_BLOCK_DEFAULT UINT32_C(4096)
#define VREP_HASH_SECRET_MIN 136u
#define VREP_HASH_THREADS_MAX 64u

/* How to hash. Checked whole by each call; an unlawful value is VREP_E_INVALID. */
struct vrep_hash_options {
    uint32_t block_size; /* bytes, see above */
    uint32_t bits;       /* 64 or 128 */
    uint32_t threads;    /* 1..VREP_HASH_THREADS_MAX, the caller's thread included */
    const void *secret;  /* NULL: XXH3's default secret */
    size_t secret_len;   /* >= VREP_HASH_SECRET_MIN, or 0 with secret NULL */
};

/* Number of blocks in `len` bytes: rounded up, 0 for 0. */
uint64_t vrep_hash_count(uint64_t len, uint32_t block_size);

/* Whether all of `len` bytes are zero (true for len 0). */
bool vrep_hash_is_zero(const void *data, size_t len);

/*
 * XXH3-128 of one run of bytes of any length: out[0] low64, out[1] high64. For
 * callers that hash a block at a time; `secret` NULL means the default one, and
 * a given one has >= VREP_HASH_SECRET_MIN bytes (the caller's duty: not checked).
 */
void vrep_hash_one128(const void *data, size_t len, const void *secret, size_t secret_len,
                      uint64_t out[2]);

/*
 * Hashes `len` bytes at `data`. `out` has room for vrep_hash_count() values of
 * bits / 64 words each; `zeros`, unless NULL, for as many bytes, set to 1 for a
 * block that is all zero and 0 otherwise. Neither may overlap `data`.
 */
int vrep_hash_blocks(const struct vrep_hash_options *options, const void *data, size_t len,
                     uint64_t *out, uint8_t *zeros);

/*
 * The same for bytes [offset, offset + len) of `fd`, a regular file or block
 * device opened for reading. The file position is the same afterwards, but moves
 * meanwhile: nobody else may depend on it during the call. With O_DIRECT, offset
 * must be a multiple of the device's block. A range that reaches past the end of
 * the file, also one that was cut off during the call, is VREP_E_RANGE. On
 * failure `out` and `zeros` hold no meaning.
 */
int vrep_hash_file(const struct vrep_hash_options *options, int fd, uint64_t offset, uint64_t len,
                   uint64_t *out, uint8_t *zeros);

#endif
