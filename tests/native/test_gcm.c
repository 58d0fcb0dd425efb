#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>
#include <openssl/provider.h>

#include "check.h"
#include "crypto/gcm.h"

enum { ROOM = 1 << 18 };

struct cipher {
    EVP_CIPHER *aes;
    EVP_CIPHER_CTX *context;
};

static struct cipher fetch(const char *properties)
{
    struct cipher cipher = {EVP_CIPHER_fetch(vrep_gcm_context(), "AES-256-GCM", properties),
                            EVP_CIPHER_CTX_new()};

    CHECK(cipher.aes != NULL && cipher.context != NULL);
    return cipher;
}

static void drop(struct cipher *cipher)
{
    EVP_CIPHER_CTX_free(cipher->context);
    EVP_CIPHER_free(cipher->aes);
}

static uint32_t any(uint32_t below)
{
    return (uint32_t)check_random_below(below);
}

static void fill(uint8_t *bytes, size_t len)
{
    for (size_t i = 0; i < len; i++)
        bytes[i] = (uint8_t)any(256);
}

/* In as many updates as it takes; out may be in. */
static void run(EVP_CIPHER_CTX *context, const uint8_t *in, size_t len, uint8_t *out, bool whole)
{
    for (size_t at = 0; at < len;) {
        size_t part = whole ? len : 1 + any((uint32_t)(len - at));
        int wrote = -1;

        CHECK(EVP_CipherUpdate(context, out + at, &wrote, in + at, (int)part) == 1);
        CHECK((size_t)wrote == part);
        at += part;
    }
}

static void begin(struct cipher *cipher, const uint8_t *key, const uint8_t *nonce,
                  const uint8_t *data, size_t len, int sealing)
{
    int wrote;

    CHECK(EVP_CipherInit_ex2(cipher->context, key != NULL ? cipher->aes : NULL, key, nonce, sealing,
                             NULL) == 1);
    if (len > 0)
        CHECK(EVP_CipherUpdate(cipher->context, NULL, &wrote, data, (int)len) == 1);
}

/* Both ways, each with what the other made: every length up to some blocks, and large ones. */
static void test_against_the_default(void)
{
    static uint8_t plain[ROOM], ours[ROOM], theirs[ROOM];
    struct cipher here = fetch(VREP_GCM_PROPERTIES), there = fetch("provider=default");
    uint8_t key[32], nonce[12], data[100], tag[16], other[16], none[16];
    int wrote;

    for (int round = 0; round < 1500; round++) {
        size_t len = round < 1000 ? (size_t)round : any(ROOM);
        size_t about = any(sizeof data + 1);
        bool renew = round % 7 == 0, in_place = any(2), whole = any(2);

        if (renew)
            fill(key, sizeof key);
        fill(nonce, sizeof nonce);
        fill(data, sizeof data);
        fill(plain, len);
        begin(&there, renew ? key : NULL, nonce, data, about, 1);
        run(there.context, plain, len, theirs, true);
        CHECK(EVP_CipherFinal_ex(there.context, none, &wrote) == 1 && wrote == 0);
        CHECK(EVP_CIPHER_CTX_ctrl(there.context, EVP_CTRL_AEAD_GET_TAG, 16, other) == 1);

        begin(&here, renew ? key : NULL, nonce, data, about, 1);
        if (in_place)
            memcpy(ours, plain, len);
        run(here.context, in_place ? ours : plain, len, ours, whole);
        CHECK(EVP_CipherFinal_ex(here.context, none, &wrote) == 1 && wrote == 0);
        CHECK(EVP_CIPHER_CTX_ctrl(here.context, EVP_CTRL_AEAD_GET_TAG, 16, tag) == 1);
        CHECK(memcmp(ours, theirs, len) == 0 && memcmp(tag, other, sizeof tag) == 0);

        begin(&here, NULL, nonce, data, about, 0);
        CHECK(EVP_CIPHER_CTX_ctrl(here.context, EVP_CTRL_AEAD_SET_TAG, 16, other) == 1);
        run(here.context, ours, len, in_place ? ours : theirs, whole);
        CHECK(memcmp(in_place ? ours : theirs, plain, len) == 0);
        CHECK(EVP_CipherFinal_ex(here.context, none, &wrote) == 1 && wrote == 0);
    }
    drop(&here);
    drop(&there);
}

/* A changed bit of any part is noticed; so is a tag that nobody gave. */
static void test_changes_are_noticed(void)
{
    struct cipher cipher = fetch(VREP_GCM_PROPERTIES);
    uint8_t key[32], nonce[12], data[80], sealed[5000], plain[5000], tag[16], none[16];
    int wrote;

    fill(key, sizeof key);
    fill(nonce, sizeof nonce);
    fill(data, sizeof data);
    fill(plain, sizeof plain);
    begin(&cipher, key, nonce, data, sizeof data, 1);
    run(cipher.context, plain, sizeof plain, sealed, true);
    CHECK(EVP_CipherFinal_ex(cipher.context, none, &wrote) == 1);
    CHECK(EVP_CIPHER_CTX_ctrl(cipher.context, EVP_CTRL_AEAD_GET_TAG, 16, tag) == 1);
    for (int round = 0; round < 400; round++) {
        uint8_t *parts[] = {nonce, data, sealed, tag};
        const size_t lens[] = {sizeof nonce, sizeof data, sizeof sealed, sizeof tag};
        int which = round % 5;
        size_t at = which < 4 ? any((uint32_t)lens[which]) : 0;
        uint8_t bit = (uint8_t)(which < 4 ? 1u << any(8) : 0);

        if (which < 4)
            parts[which][at] ^= bit;
        begin(&cipher, NULL, nonce, data, sizeof data, 0);
        CHECK(EVP_CIPHER_CTX_ctrl(cipher.context, EVP_CTRL_AEAD_SET_TAG, 16, tag) == 1);
        run(cipher.context, sealed, sizeof sealed, plain, false);
        CHECK(EVP_CipherFinal_ex(cipher.context, none, &wrote) == (which < 4 ? 0 : 1));
        if (which < 4)
            parts[which][at] ^= bit;
    }
    begin(&cipher, NULL, nonce, data, sizeof data, 0);
    run(cipher.context, sealed, sizeof sealed, plain, true);
    CHECK(EVP_CipherFinal_ex(cipher.context, none, &wrote) != 1);
    drop(&cipher);
}

/* Nothing is sealed under a nonce twice, without one, or without a key. */
static void test_a_nonce_serves_once(void)
{
    struct cipher cipher = fetch(VREP_GCM_PROPERTIES);
    const uint8_t key[32] = {1}, nonce[12] = {2};
    uint8_t bytes[64] = {0}, none[16];
    int wrote;

    begin(&cipher, key, NULL, NULL, 0, 1);
    CHECK(EVP_CipherUpdate(cipher.context, bytes, &wrote, bytes, sizeof bytes) != 1);
    begin(&cipher, NULL, nonce, NULL, 0, 1);
    run(cipher.context, bytes, sizeof bytes, bytes, true);
    CHECK(EVP_CipherFinal_ex(cipher.context, none, &wrote) == 1);
    CHECK(EVP_CipherUpdate(cipher.context, bytes, &wrote, bytes, sizeof bytes) != 1);
    drop(&cipher);

    cipher = fetch(VREP_GCM_PROPERTIES);
    CHECK(EVP_CipherInit_ex2(cipher.context, cipher.aes, NULL, nonce, 1, NULL) == 1);
    CHECK(EVP_CipherUpdate(cipher.context, bytes, &wrote, bytes, sizeof bytes) != 1);
    drop(&cipher);
}

/* Only this context has it, and libssl finds it by the name that it asks for. */
static void test_where_it_serves(void)
{
    const char *wanted = vrep_gcm_is_fast() ? "vrep" : "default";
    EVP_CIPHER *aes = EVP_CIPHER_fetch(vrep_gcm_context(), "id-aes256-GCM", VREP_GCM_PROPERTIES);
    EVP_CIPHER *of_others = EVP_CIPHER_fetch(NULL, "AES-256-GCM", VREP_GCM_PROPERTIES);

    CHECK(vrep_gcm_context() != NULL && aes != NULL && of_others != NULL);
    CHECK(strcmp(OSSL_PROVIDER_get0_name(EVP_CIPHER_get0_provider(aes)), wanted) == 0);
    CHECK(strcmp(OSSL_PROVIDER_get0_name(EVP_CIPHER_get0_provider(of_others)), "default") == 0);
    CHECK(EVP_CIPHER_get_mode(aes) == EVP_CIPH_GCM_MODE);
    CHECK(EVP_CIPHER_get_key_length(aes) == 32 && EVP_CIPHER_get_iv_length(aes) == 12);
    CHECK((EVP_CIPHER_get_flags(aes) & EVP_CIPH_FLAG_AEAD_CIPHER) != 0);
    printf("AES-256-GCM of %s\n", wanted);
    EVP_CIPHER_free(aes);
    EVP_CIPHER_free(of_others);
}

int main(void)
{
    RUN(test_where_it_serves);
    RUN(test_against_the_default);
    RUN(test_changes_are_noticed);
    RUN(test_a_nonce_serves_once);
    return check_report();
}
