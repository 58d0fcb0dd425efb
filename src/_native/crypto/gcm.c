#include "crypto/gcm.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/core_dispatch.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/params.h>
#include <openssl/provider.h>

#ifdef VREP_IPSEC_MB

#include <intel-ipsec-mb.h>

enum { KEY_BYTES = 32, NONCE_BYTES = 12, TAG_BYTES = 16, UPDATE_BYTES_MAX = 1 << 30 };

/* Plain functions: they keep no state but what they are given. */
static struct {
    aes_gcm_pre_t pre;
    aes_gcm_init_t init;
    aes_gcm_enc_dec_update_t seal, open;
    aes_gcm_enc_dec_finalize_t seal_end, open_end;
} mb;

struct gcm {
    struct gcm_key_data key; /* first: aligned */
    struct gcm_context_data state;
    uint8_t nonce[NONCE_BYTES], tag[TAG_BYTES];
    size_t tag_bytes; /* of a tag that was given, or made; 0: neither */
    bool keyed, nonced, begun, sealing;
};

/* What the library asks of the processor; without it OpenSSL is as fast. */
static bool find_functions(void)
{
    const uint64_t needed = IMB_FEATURE_AVX512_SKX | IMB_FEATURE_VAES | IMB_FEATURE_VPCLMULQDQ;
    IMB_MGR *manager = alloc_mb_mgr(0);
    bool found;

    if (manager == NULL)
        return false;
    init_mb_mgr_auto(manager, NULL);
    found = (manager->features & needed) == needed && imb_get_errno(manager) == 0;
    mb.pre = manager->gcm256_pre;
    mb.init = manager->gcm256_init;
    mb.seal = manager->gcm256_enc_update;
    mb.open = manager->gcm256_dec_update;
    mb.seal_end = manager->gcm256_enc_finalize;
    mb.open_end = manager->gcm256_dec_finalize;
    free_mb_mgr(manager);
    return found;
}

static void *gcm_new(void *provider)
{
    struct gcm *gcm = aligned_alloc(_Alignof(struct gcm), sizeof *gcm);

    (void)provider;
    if (gcm != NULL)
        memset(gcm, 0, sizeof *gcm);
    return gcm;
}

static void gcm_free(void *context)
{
    if (context == NULL)
        return;
    OPENSSL_cleanse(context, sizeof(struct gcm));
    free(context);
}

static int gcm_set_params(void *context, const OSSL_PARAM params[])
{
    struct gcm *gcm = context;
    const OSSL_PARAM *tag, *bytes;
    size_t value;

    if (params == NULL)
        return 1;
    bytes = OSSL_PARAM_locate_const(params, OSSL_CIPHER_PARAM_IVLEN);
    if (bytes != NULL && (!OSSL_PARAM_get_size_t(bytes, &value) || value != NONCE_BYTES))
        return 0;
    bytes = OSSL_PARAM_locate_const(params, OSSL_CIPHER_PARAM_KEYLEN);
    if (bytes != NULL && (!OSSL_PARAM_get_size_t(bytes, &value) || value != KEY_BYTES))
        return 0;
    tag = OSSL_PARAM_locate_const(params, OSSL_CIPHER_PARAM_AEAD_TAG);
    if (tag != NULL) {
        if (tag->data_type != OSSL_PARAM_OCTET_STRING || tag->data_size == 0 ||
            tag->data_size > TAG_BYTES)
            return 0;
        if (tag->data != NULL) { /* without: only how long it is to be */
            if (gcm->sealing)
                return 0;
            memcpy(gcm->tag, tag->data, tag->data_size);
            gcm->tag_bytes = tag->data_size;
        }
    }
    return 1;
}

static int begin(struct gcm *gcm, const unsigned char *key, size_t key_len,
                 const unsigned char *nonce, size_t nonce_len, const OSSL_PARAM params[],
                 bool sealing)
{
    gcm->sealing = sealing;
    gcm->begun = false;
    if (nonce != NULL) {
        if (nonce_len != NONCE_BYTES)
            return 0;
        memcpy(gcm->nonce, nonce, NONCE_BYTES);
        gcm->nonced = true;
        gcm->tag_bytes = 0;
    }
    if (key != NULL) {
        if (key_len != KEY_BYTES)
            return 0;
        mb.pre(key, &gcm->key);
        gcm->keyed = true;
    }
    return gcm_set_params(gcm, params);
}

static int gcm_seal_init(void *context, const unsigned char *key, size_t key_len,
                         const unsigned char *nonce, size_t nonce_len, const OSSL_PARAM params[])
{
    return begin(context, key, key_len, nonce, nonce_len, params, true);
}

static int gcm_open_init(void *context, const unsigned char *key, size_t key_len,
                         const unsigned char *nonce, size_t nonce_len, const OSSL_PARAM params[])
{
    return begin(context, key, key_len, nonce, nonce_len, params, false);
}

/* A nonce serves once: the next message has to bring its own. */
static bool start(struct gcm *gcm, const unsigned char *data, size_t len)
{
    if (!gcm->keyed || !gcm->nonced)
        return false;
    mb.init(&gcm->key, &gcm->state, gcm->nonce, data, len);
    gcm->nonced = false;
    gcm->begun = true;
    return true;
}

static int gcm_update(void *context, unsigned char *out, size_t *out_len, size_t out_room,
                      const unsigned char *in, size_t len)
{
    struct gcm *gcm = context;

    *out_len = 0;
    if (len == 0)
        return 1;
    if (len > UPDATE_BYTES_MAX)
        return 0;
    if (out == NULL) { /* associated data: once, and before everything else */
        *out_len = len;
        return start(gcm, in, len);
    }
    if (out_room < len || (!gcm->begun && !start(gcm, NULL, 0)))
        return 0;
    (gcm->sealing ? mb.seal : mb.open)(&gcm->key, &gcm->state, out, in, len);
    *out_len = len;
    return 1;
}

static int gcm_final(void *context, unsigned char *out, size_t *out_len, size_t out_room)
{
    struct gcm *gcm = context;
    uint8_t tag[TAG_BYTES];
    int good;

    (void)out, (void)out_room;
    *out_len = 0;
    if (!gcm->begun && !start(gcm, NULL, 0))
        return 0;
    gcm->begun = false;
    if (gcm->sealing) {
        mb.seal_end(&gcm->key, &gcm->state, gcm->tag, TAG_BYTES);
        gcm->tag_bytes = TAG_BYTES;
        return 1;
    }
    mb.open_end(&gcm->key, &gcm->state, tag, TAG_BYTES);
    good = gcm->tag_bytes > 0 && CRYPTO_memcmp(tag, gcm->tag, gcm->tag_bytes) == 0;
    gcm->tag_bytes = 0;
    return good;
}

static int gcm_get_context_params(void *context, OSSL_PARAM params[])
{
    const struct gcm *gcm = context;
    OSSL_PARAM *tag = OSSL_PARAM_locate(params, OSSL_CIPHER_PARAM_AEAD_TAG);
    OSSL_PARAM *bytes = OSSL_PARAM_locate(params, OSSL_CIPHER_PARAM_IVLEN);

    if (bytes != NULL && !OSSL_PARAM_set_size_t(bytes, NONCE_BYTES))
        return 0;
    bytes = OSSL_PARAM_locate(params, OSSL_CIPHER_PARAM_KEYLEN);
    if (bytes != NULL && !OSSL_PARAM_set_size_t(bytes, KEY_BYTES))
        return 0;
    bytes = OSSL_PARAM_locate(params, OSSL_CIPHER_PARAM_AEAD_TAGLEN);
    if (bytes != NULL && !OSSL_PARAM_set_size_t(bytes, TAG_BYTES))
        return 0;
    if (tag == NULL)
        return 1;
    if (!gcm->sealing || gcm->tag_bytes == 0 || tag->data_size > TAG_BYTES)
        return 0;
    return OSSL_PARAM_set_octet_string(tag, gcm->tag, tag->data_size);
}

static int gcm_get_params(OSSL_PARAM params[])
{
    static const struct {
        const char *name;
        size_t value;
    } facts[] = {
        {OSSL_CIPHER_PARAM_MODE, EVP_CIPH_GCM_MODE},
        {OSSL_CIPHER_PARAM_BLOCK_SIZE, 1},
        {OSSL_CIPHER_PARAM_KEYLEN, KEY_BYTES},
        {OSSL_CIPHER_PARAM_IVLEN, NONCE_BYTES},
        {OSSL_CIPHER_PARAM_AEAD, 1},
        {OSSL_CIPHER_PARAM_CUSTOM_IV, 1},
    };

    for (size_t i = 0; i < sizeof facts / sizeof *facts; i++) {
        OSSL_PARAM *param = OSSL_PARAM_locate(params, facts[i].name);

        if (param == NULL)
            continue;
        if (param->data_type == OSSL_PARAM_INTEGER ? !OSSL_PARAM_set_int(param, (int)facts[i].value)
                                                   : !OSSL_PARAM_set_size_t(param, facts[i].value))
            return 0;
    }
    return 1;
}

/* ---- the provider ------------------------------------------------------------------------- */

typedef void (*function)(void);

static const OSSL_DISPATCH cipher_functions[] = {
    {OSSL_FUNC_CIPHER_NEWCTX, (function)gcm_new},
    {OSSL_FUNC_CIPHER_FREECTX, (function)gcm_free},
    {OSSL_FUNC_CIPHER_ENCRYPT_INIT, (function)gcm_seal_init},
    {OSSL_FUNC_CIPHER_DECRYPT_INIT, (function)gcm_open_init},
    {OSSL_FUNC_CIPHER_UPDATE, (function)gcm_update},
    {OSSL_FUNC_CIPHER_FINAL, (function)gcm_final},
    {OSSL_FUNC_CIPHER_GET_PARAMS, (function)gcm_get_params},
    {OSSL_FUNC_CIPHER_GET_CTX_PARAMS, (function)gcm_get_context_params},
    {OSSL_FUNC_CIPHER_SET_CTX_PARAMS, (function)gcm_set_params},
    {0, NULL},
};

/* The names by which OpenSSL's own goes; libssl asks for the second. */
static const OSSL_ALGORITHM ciphers[] = {
    {"AES-256-GCM:id-aes256-GCM:2.16.840.1.101.3.4.1.46", "provider=vrep", cipher_functions,
     "AES-256-GCM of libipsec-mb"},
    {NULL, NULL, NULL, NULL},
};

static const OSSL_ALGORITHM *query(void *provider, int operation, int *no_cache)
{
    (void)provider;
    *no_cache = 0;
    return operation == OSSL_OP_CIPHER ? ciphers : NULL;
}

static const OSSL_DISPATCH provider_functions[] = {
    {OSSL_FUNC_PROVIDER_QUERY_OPERATION, (function)query},
    {0, NULL},
};

static int init_provider(const OSSL_CORE_HANDLE *handle, const OSSL_DISPATCH *in,
                         const OSSL_DISPATCH **out, void **provider)
{
    (void)in;
    *out = provider_functions;
    *provider = (void *)(uintptr_t)handle; /* any that is not NULL */
    return 1;
}

static bool add_provider(OSSL_LIB_CTX *context)
{
    return find_functions() && OSSL_PROVIDER_add_builtin(context, "vrep", init_provider) == 1 &&
           OSSL_PROVIDER_load(context, "vrep") != NULL;
}

#else

static bool add_provider(OSSL_LIB_CTX *context)
{
    (void)context;
    return false;
}

#endif

/* Of the process, and as long as it lives. */
static OSSL_LIB_CTX *shared;
static bool fast;
static pthread_once_t made = PTHREAD_ONCE_INIT;

static void make(void)
{
    OSSL_LIB_CTX *context = OSSL_LIB_CTX_new();

    if (context == NULL)
        return;
    if (OSSL_PROVIDER_load(context, "default") == NULL) {
        OSSL_LIB_CTX_free(context);
        return;
    }
    fast = add_provider(context);
    shared = context;
}

OSSL_LIB_CTX *vrep_gcm_context(void)
{
    pthread_once(&made, make);
    return shared;
}

bool vrep_gcm_is_fast(void)
{
    pthread_once(&made, make);
    return fast;
}
