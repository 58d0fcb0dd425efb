#include "format/checksum.h"

#include <pthread.h>

#define XXH_STATIC_LINKING_ONLY /* for the size of XXH3_state_t */
#if defined(__x86_64__) || defined(__i386__)
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#include "base/endian.h"

/* XXH3_state_t wants 64-byte alignment, which malloc does not give to a struct
 * that embeds a digest: leave slack and align by address. The margin also takes
 * a state that a later libxxhash makes somewhat larger. */
#define STATE_ALIGN 64u
_Static_assert(sizeof(XXH3_state_t) + STATE_ALIGN <= sizeof(struct vrep_digest),
               "room for the XXH3 state");

static pthread_once_t prepared = PTHREAD_ONCE_INIT;

static void prepare(void)
{
    /* Over 240 bytes, the length from which XXH3 goes through the dispatch tables. */
    static const uint8_t zeros[512];
    XXH3_state_t state;
    uint64_t sink = XXH3_64bits(zeros, sizeof zeros);

    sink ^= XXH3_64bits_withSeed(zeros, sizeof zeros, 1);
    sink ^= XXH3_64bits_withSecret(zeros, sizeof zeros, zeros, sizeof zeros);
    sink ^= XXH3_128bits(zeros, sizeof zeros).low64;
    sink ^= XXH3_128bits_withSecret(zeros, sizeof zeros, zeros, sizeof zeros).low64;
    (void)XXH3_128bits_reset(&state);
    (void)XXH3_128bits_update(&state, zeros, sizeof zeros);
    sink ^= XXH3_128bits_digest(&state).low64;
    (void)sink;
}

void vrep_checksum_prepare(void)
{
    (void)pthread_once(&prepared, prepare);
}

static XXH3_state_t *state_of(const struct vrep_digest *digest)
{
    uintptr_t at = (uintptr_t)digest->room;

    return (XXH3_state_t *)((at + (STATE_ALIGN - 1)) & ~(uintptr_t)(STATE_ALIGN - 1));
}

static void store(XXH128_hash_t hash, uint8_t out[VREP_DIGEST_BYTES])
{
    vrep_le_store_u64(out, hash.low64);
    vrep_le_store_u64(out + 8, hash.high64);
}

uint32_t vrep_checksum32(const void *data, size_t len)
{
    vrep_checksum_prepare();
    return (uint32_t)XXH3_64bits_withSeed(data, len, VREP_CHECKSUM_SEED);
}

void vrep_digest_init(struct vrep_digest *digest)
{
    vrep_checksum_prepare();
    (void)XXH3_128bits_reset(state_of(digest));
}

void vrep_digest_update(struct vrep_digest *digest, const void *data, size_t len)
{
    if (len > 0)
        (void)XXH3_128bits_update(state_of(digest), data, len);
}

void vrep_digest_final(const struct vrep_digest *digest, uint8_t out[VREP_DIGEST_BYTES])
{
    store(XXH3_128bits_digest(state_of(digest)), out);
}

void vrep_digest_once(const void *data, size_t len, uint8_t out[VREP_DIGEST_BYTES])
{
    vrep_checksum_prepare();
    store(XXH3_128bits(data, len), out);
}
