#include "serve/iscsi_chap.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

uint32_t iscsi_chap_response(uint8_t algorithm, uint8_t id, const char *secret,
                             const uint8_t *challenge, uint32_t challenge_bytes,
                             uint8_t out[CHAP_RESPONSE_MAX])
{
    const EVP_MD *kind = algorithm == CHAP_MD5      ? EVP_md5()
                         : algorithm == CHAP_SHA256 ? EVP_sha256()
                                                    : NULL;
    EVP_MD_CTX *context = kind != NULL ? EVP_MD_CTX_new() : NULL;
    unsigned int bytes = 0;
    bool good = context != NULL && EVP_DigestInit_ex(context, kind, NULL) == 1 &&
                EVP_DigestUpdate(context, &id, 1) == 1 &&
                EVP_DigestUpdate(context, secret, strlen(secret)) == 1 &&
                EVP_DigestUpdate(context, challenge, challenge_bytes) == 1 &&
                EVP_DigestFinal_ex(context, out, &bytes) == 1;
    EVP_MD_CTX_free(context);
    return good ? bytes : 0;
}

bool iscsi_chap_random(uint8_t *out, uint32_t bytes)
{
    return getrandom(out, bytes, 0) == (ssize_t)bytes;
}

static int digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    if (c >= 'A' && c <= 'F')
        return c - 'A' + 10;
    return -1;
}

static bool decode_hex(const char *text, uint8_t *out, uint32_t max, uint32_t *bytes)
{
    size_t digits = strlen(text), at = 0;
    if (digits == 0 || (digits + 1) / 2 > max)
        return false;
    *bytes = 0;
    int high = digits % 2 != 0 ? 0 : -1; /* an odd number: the first stands alone */
    for (; at < digits; at++) {
        int value = digit(text[at]);
        if (value < 0)
            return false;
        if (high < 0) {
            high = value;
            continue;
        }
        out[(*bytes)++] = (uint8_t)(high << 4 | value);
        high = -1;
    }
    return true;
}

static int sextet(char c)
{
    static const char alphabet[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *found = c != '\0' ? strchr(alphabet, c) : NULL;
    return found != NULL ? (int)(found - alphabet) : -1;
}

static bool decode_base64(const char *text, uint8_t *out, uint32_t max, uint32_t *bytes)
{
    uint32_t held = 0, bits = 0;
    *bytes = 0;
    while (*text != '\0' && *text != '=') {
        int value = sextet(*text++);
        if (value < 0)
            return false;
        held = held << 6 | (uint32_t)value;
        bits += 6;
        if (bits >= 8) {
            bits -= 8;
            if (*bytes == max)
                return false;
            out[(*bytes)++] = (uint8_t)(held >> bits);
        }
    }
    return strspn(text, "=") == strlen(text) && strlen(text) <= 2 && *bytes > 0;
}

bool iscsi_binary_decode(const char *text, uint8_t *out, uint32_t max, uint32_t *bytes)
{
    if (text[0] != '0')
        return false;
    if (text[1] == 'x' || text[1] == 'X')
        return decode_hex(text + 2, out, max, bytes);
    if (text[1] == 'b' || text[1] == 'B')
        return decode_base64(text + 2, out, max, bytes);
    return false;
}

void iscsi_binary_encode(const uint8_t *bytes, uint32_t count, char *out)
{
    memcpy(out, "0x", 3);
    for (uint32_t i = 0; i < count; i++)
        snprintf(out + 2 + (size_t)i * 2, 3, "%02x", bytes[i]);
}
