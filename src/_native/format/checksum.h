/*
 * Checksums of our own formats: a 32-bit one for headers, a 128-bit digest for
 * bodies (commit blocks, index footers, manifests, state files).
 *
 * They find damage (torn writes, bit rot, a stray write); they are not
 * authentication: whoever can write the file can write a matching checksum.
 * What must be authentic is sealed (seal/).
 *
 * Values. Both are parts of XXH3, as the xxHash specification defines it:
 *
 *   vrep_checksum32   low 32 bits of XXH3-64 with seed VREP_CHECKSUM_SEED.
 *                     A zeroed header is never valid: of the lengths up to
 *                     16384, no run of zero bytes has checksum 0 (tested).
 *   vrep_digest       XXH3-128, seed 0, default secret, stored as 16 bytes:
 *                     bytes 0..7 the low half, 8..15 the high half, each
 *                     little-endian, on every machine. (This is not xxHash's
 *                     own "canonical" form, which is big-endian, high first.)
 *
 * Units and limits: lengths in bytes, any size_t, zero included (`data` may be
 * NULL then). Nothing here allocates or can fail.
 *
 * Threading: every function may be called from any thread; one struct
 * vrep_digest belongs to one thread at a time.
 */
#ifndef VREP_FORMAT_CHECKSUM_H
#define VREP_FORMAT_CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

#define VREP_CHECKSUM_SEED UINT64_C(0x76726570) /* "vrep" */
#define VREP_DIGEST_BYTES 16u

/*
 * State of a digest in the making. Opaque; lives on the stack or inside another
 * struct at any alignment, but must not be moved or copied between init and
 * final: the code aligns its state inside `room` by address.
 */
struct vrep_digest {
    uint64_t room[128];
};

/* Checksum of a header or other short run of bytes. */
uint32_t vrep_checksum32(const void *data, size_t len);

/* Starts a digest; also throws away one that was begun. */
void vrep_digest_init(struct vrep_digest *digest);

/* Adds `len` bytes. How a body is split over calls does not change its digest. */
void vrep_digest_update(struct vrep_digest *digest, const void *data, size_t len);

/* Writes the digest of all bytes added so far. More may be added afterwards. */
void vrep_digest_final(const struct vrep_digest *digest, uint8_t out[VREP_DIGEST_BYTES]);

/* The digest of one contiguous body in one call: same value as init/update/final. */
void vrep_digest_once(const void *data, size_t len, uint8_t out[VREP_DIGEST_BYTES]);

/*
 * Makes libxxhash choose its kernels for this processor, once per process.
 * The library does that on first use without synchronisation, so whoever calls
 * XXH3 through xxh_x86dispatch.h on its own calls this first. Cheap afterwards.
 */
void vrep_checksum_prepare(void);

#endif
