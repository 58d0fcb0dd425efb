/*
 * Gcm: where vrep's AES-256-GCM comes from, for seals and for TLS.
 *
 * OpenSSL 3.0 uses half of what a processor with VAES and VPCLMULQDQ on 512 bits can do,
 * or less; libipsec-mb uses it. Where both are there, that library's AES-256-GCM is given
 * to OpenSSL as a provider (provider-cipher(7)) in a library context of our own: callers
 * use EVP and libssl as ever, and nothing else in the process sees it. Elsewhere OpenSSL's
 * own cipher serves; the bytes are the same. A nonce has 12 bytes, a tag up to 16.
 * Both calls are safe from any thread.
 */
#ifndef VREP_CRYPTO_GCM_H
#define VREP_CRYPTO_GCM_H

#include <stdbool.h>

#include <openssl/types.h>

/* For EVP_CIPHER_fetch and SSL_CTX_new_ex. NULL, which is OpenSSL's own: none could be made. */
OSSL_LIB_CTX *vrep_gcm_context(void);

/* Whether ciphers fetched there with these properties are libipsec-mb's. */
#define VREP_GCM_PROPERTIES "?provider=vrep"
bool vrep_gcm_is_fast(void);

#endif
