#include "format/checksum.h"

#include <pthread.h>
#include <stdbool.h>

#include "check.h"

/* Bytes (131 i + 7) mod 256; values computed with the Python package xxhash. */
static const struct {
    size_t len;
    uint32_t checksum;
    const char *digest;
} vectors[] = {
    {0, 0x1e210d85, "7f498d4624c30160d8984701d306aa99"},
    {1, 0x709b302e, "1f81f4d045ca5c4ca40cf73e07625b49"},
    {3, 0x922683ff, "ac0611e670263e6ed75d894a5bdc0c39"},
    {8, 0xc6acf8a1, "0d10a6317fbedd613d4eafa6bda3866a"},
    {60, 0xe23ea055, "a8940239eb3aaf2b04b96c38a32100a3"},
    {128, 0x1f0e83bd, "0a718513ec1d36ff6c5578147530c7ae"},
    {129, 0x7ac2ae91, "1ae33897a0b34545267955bbcc36cd98"},
    {240, 0xd792d600, "1f719322e7532c3f3d9053f57be19352"},
    {241, 0xdfdd8631, "9e27672c59ae6c9561f1ed3ffe4038b5"},
    {508, 0xe18f9fb1, "cd31202fc0f8dee49d72432b33695b0f"},
    {4096, 0xea97468b, "ffdaf04ac166dd9dea558aa88ff30f3e"},
    {8188, 0xdaffbc2f, "ccfea143663622e387ca8636deccf148"},
    {100003, 0x34433e70, "08d03aa0c7e7a8d0baa29f4dc1c56f6f"},
};
#define VECTORS (sizeof vectors / sizeof vectors[0])
#define LONGEST 100003u

static uint8_t pattern[LONGEST + 64];

static void check_digest(const uint8_t got[VREP_DIGEST_BYTES], const char *want)
{
    char text[2 * VREP_DIGEST_BYTES + 1];

    for (unsigned i = 0; i < VREP_DIGEST_BYTES; i++)
        snprintf(text + 2 * i, 3, "%02x", got[i]);
    CHECK_STR(text, want);
}

static void known_vectors(void)
{
    for (size_t i = 0; i < VECTORS; i++) {
        uint8_t digest[VREP_DIGEST_BYTES];

        CHECK_EQ(vrep_checksum32(pattern, vectors[i].len), vectors[i].checksum);
        vrep_digest_once(pattern, vectors[i].len, digest);
        check_digest(digest, vectors[i].digest);
    }
}

static void empty_without_address(void)
{
    struct vrep_digest state;
    uint8_t digest[VREP_DIGEST_BYTES];

    CHECK_EQ(vrep_checksum32(NULL, 0), vectors[0].checksum);
    vrep_digest_once(NULL, 0, digest);
    check_digest(digest, vectors[0].digest);
    vrep_digest_init(&state);
    vrep_digest_update(&state, NULL, 0);
    vrep_digest_final(&state, digest);
    check_digest(digest, vectors[0].digest);
}

static void any_split_gives_the_same(void)
{
    for (unsigned round = 0; round < 300; round++) {
        size_t v = check_random_below(VECTORS), len = vectors[v].len, done = 0;
        struct vrep_digest state;
        uint8_t digest[VREP_DIGEST_BYTES];

        vrep_digest_init(&state);
        while (done < len) {
            size_t n = check_random_below(1 + check_random_below(len)) + 1;

            if (n > len - done)
                n = len - done;
            vrep_digest_update(&state, pattern + done, n);
            done += n;
        }
        vrep_digest_final(&state, digest);
        check_digest(digest, vectors[v].digest);
    }
}

static void state_at_any_address(void)
{
    /* malloc, and structs that embed a digest, promise 8 or 16 bytes, not 64. */
    uint8_t *room = malloc(sizeof(struct vrep_digest) + 64);

    CHECK(room != NULL);
    for (size_t shift = 0; shift < 64; shift += 8) {
        struct vrep_digest *state = (void *)(room + shift);
        uint8_t digest[VREP_DIGEST_BYTES];

        vrep_digest_init(state);
        vrep_digest_update(state, pattern, 1000);
        vrep_digest_update(state, pattern + 1000, LONGEST - 1000);
        vrep_digest_final(state, digest);
        check_digest(digest, vectors[VECTORS - 1].digest);
    }
    free(room);
}

static void final_leaves_the_digest_open(void)
{
    struct vrep_digest state;
    uint8_t digest[VREP_DIGEST_BYTES];

    vrep_digest_init(&state);
    vrep_digest_update(&state, pattern, 129);
    vrep_digest_final(&state, digest);
    check_digest(digest, vectors[6].digest);
    vrep_digest_update(&state, pattern + 129, 4096 - 129);
    vrep_digest_final(&state, digest);
    check_digest(digest, vectors[10].digest);
    vrep_digest_init(&state);
    vrep_digest_update(&state, pattern, 60);
    vrep_digest_final(&state, digest);
    check_digest(digest, vectors[4].digest);
}

static void each_flipped_bit_shows(void)
{
    uint8_t header[64];
    uint32_t right;

    memcpy(header, pattern, sizeof header);
    right = vrep_checksum32(header, 60);
    for (unsigned bit = 0; bit < 60 * 8; bit++) {
        header[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        CHECK(vrep_checksum32(header, 60) != right);
        header[bit / 8] ^= (uint8_t)(1u << (bit % 8));
    }
}

static void zeroed_header_is_not_valid(void)
{
    static const uint8_t zeros[16384];

    for (size_t len = 0; len <= sizeof zeros; len++)
        CHECK(vrep_checksum32(zeros, len) != 0);
}

static void *first_use(void *arg)
{
    pthread_barrier_t *barrier = arg;
    uint8_t digest[VREP_DIGEST_BYTES];
    bool right;

    pthread_barrier_wait(barrier);
    right = vrep_checksum32(pattern, 4096) == vectors[10].checksum;
    vrep_digest_once(pattern, 16, digest);
    return right ? arg : NULL;
}

/* Must run first: libxxhash chooses its kernels at the first call. */
static void first_use_by_many_threads(void)
{
    pthread_barrier_t barrier;
    pthread_t threads[8];

    CHECK_EQ(pthread_barrier_init(&barrier, NULL, 8), 0);
    for (unsigned i = 0; i < 8; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, first_use, &barrier), 0);
    for (unsigned i = 0; i < 8; i++) {
        void *result = NULL;

        CHECK_EQ(pthread_join(threads[i], &result), 0);
        CHECK(result != NULL);
    }
    pthread_barrier_destroy(&barrier);
}

int main(void)
{
    for (size_t i = 0; i < sizeof pattern; i++)
        pattern[i] = (uint8_t)(i * 131 + 7);
    RUN(first_use_by_many_threads);
    RUN(known_vectors);
    RUN(empty_without_address);
    RUN(any_split_gives_the_same);
    RUN(state_at_any_address);
    RUN(final_leaves_the_digest_open);
    RUN(each_flipped_bit_shows);
    RUN(zeroed_header_is_not_valid);
    return check_report();
}
