#include "seal/cipher.h"

#include <string.h>

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/kdf.h>

#include "base/endian.h"
#include "base/status.h"
#include "crypto/gcm.h"
#include "seal/seal.h"

int vrep_cipher_init(struct vrep_cipher *cipher, const uint8_t key[VREP_STREAM_KEY_BYTES],
                     bool sealing)
{
    EVP_CIPHER *aes;
    int done;

    cipher->context = EVP_CIPHER_CTX_new();
    if (cipher->context == NULL)
        return VREP_E_NOMEM;
    aes = EVP_CIPHER_fetch(vrep_gcm_context(), "AES-256-GCM", VREP_GCM_PROPERTIES);
    if (aes == NULL) {
        vrep_cipher_clear(cipher);
        return VREP_E_IO;
    }
    done = EVP_CipherInit_ex2(cipher->context, aes, key, NULL, sealing, NULL);
    EVP_CIPHER_free(aes); /* the context keeps its own reference */
    if (done != 1) {
        vrep_cipher_clear(cipher);
        return VREP_E_IO;
    }
    return VREP_OK;
}

void vrep_cipher_clear(struct vrep_cipher *cipher)
{
    EVP_CIPHER_CTX_free(cipher->context); /* wipes the key schedule */
    cipher->context = NULL;
}

int vrep_cipher_begin(struct vrep_cipher *cipher, bool sealing, const struct vrep_record *header,
                      uint32_t word, uint32_t index)
{
    uint8_t nonce[12], data[sizeof *header + 8];
    int len, done;

    vrep_le_store_u64(nonce, header->seq);
    vrep_le_store_u32(nonce + 8, index);
    memcpy(data, header, sizeof *header);
    vrep_le_store_u32(data + sizeof *header, word);
    vrep_le_store_u32(data + sizeof *header + 4, index);
    if (sealing)
        done = EVP_EncryptInit_ex2(cipher->context, NULL, NULL, nonce, NULL) == 1 &&
               EVP_EncryptUpdate(cipher->context, NULL, &len, data, sizeof data) == 1;
    else
        done = EVP_DecryptInit_ex2(cipher->context, NULL, NULL, nonce, NULL) == 1 &&
               EVP_DecryptUpdate(cipher->context, NULL, &len, data, sizeof data) == 1;
    return done ? VREP_OK : VREP_E_IO;
}

int vrep_cipher_add(struct vrep_cipher *cipher, bool sealing, const void *in, size_t len, void *out)
{
    int wrote, done;

    if (sealing)
        done = EVP_EncryptUpdate(cipher->context, out, &wrote, in, (int)len);
    else
        done = EVP_DecryptUpdate(cipher->context, out, &wrote, in, (int)len);
    return done == 1 && (size_t)wrote == len ? VREP_OK : VREP_E_IO;
}

int vrep_cipher_seal_end(struct vrep_cipher *cipher, uint8_t tag[VREP_TAG_BYTES])
{
    int len;

    if (EVP_EncryptFinal_ex(cipher->context, tag, &len) != 1 || len != 0 ||
        EVP_CIPHER_CTX_ctrl(cipher->context, EVP_CTRL_AEAD_GET_TAG, VREP_TAG_BYTES, tag) != 1)
        return VREP_E_IO;
    return VREP_OK;
}

int vrep_cipher_open_end(struct vrep_cipher *cipher, const uint8_t tag[VREP_TAG_BYTES])
{
    uint8_t copy[VREP_TAG_BYTES], none[VREP_TAG_BYTES];
    int len;

    memcpy(copy, tag, sizeof copy);
    if (EVP_CIPHER_CTX_ctrl(cipher->context, EVP_CTRL_AEAD_SET_TAG, VREP_TAG_BYTES, copy) != 1)
        return VREP_E_IO;
    return EVP_DecryptFinal_ex(cipher->context, none, &len) == 1 ? VREP_OK : VREP_E_AUTH;
}

int vrep_stream_key(const uint8_t data_key[32], const uint8_t stream_id[16],
                    uint8_t out[VREP_STREAM_KEY_BYTES])
{
    static const char label[] = "vrep stream v1";
    uint8_t key[32], info[sizeof label - 1 + 16];
    char digest[] = "SHA256";
    EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
    EVP_KDF_CTX *context = kdf == NULL ? NULL : EVP_KDF_CTX_new(kdf);
    OSSL_PARAM params[4];
    int status = VREP_E_IO;

    memcpy(key, data_key, sizeof key);
    memcpy(info, label, sizeof label - 1);
    memcpy(info + sizeof label - 1, stream_id, 16);
    params[0] = OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest, 0);
    params[1] = OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, key, sizeof key);
    params[2] = OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, info, sizeof info);
    params[3] = OSSL_PARAM_construct_end();
    if (context != NULL && EVP_KDF_derive(context, out, VREP_STREAM_KEY_BYTES, params) == 1)
        status = VREP_OK;
    EVP_KDF_CTX_free(context);
    EVP_KDF_free(kdf);
    OPENSSL_cleanse(key, sizeof key);
    return status;
}
