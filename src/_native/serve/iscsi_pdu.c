#include "serve/iscsi_pdu.h"

#include <stdlib.h>
#include <string.h>

#include "base/crc32c.h"

enum iscsi_found iscsi_pdu_find(const uint8_t *in, size_t have, bool header_digest,
                                bool data_digest, struct iscsi_pdu *out)
{
    if (have < ISCSI_BHS)
        return ISCSI_MORE;
    uint32_t segment = iscsi_segment(in);
    if (segment > ISCSI_SEGMENT_MAX)
        return ISCSI_BROKEN;
    uint32_t header = ISCSI_BHS + iscsi_ahs(in);
    uint32_t at = header + (header_digest ? 4 : 0);
    if (have < at) /* a header that is damaged must not say how much is waited for */
        return ISCSI_MORE;
    if (header_digest && vrep_crc32c(0, in, header) != vrep_le_load_u32(in + header))
        return ISCSI_BROKEN;
    uint32_t padded = segment + iscsi_pad(segment);
    uint32_t bytes = at + padded + (data_digest && segment > 0 ? 4 : 0);
    if (have < bytes)
        return ISCSI_MORE;
    if (data_digest && segment > 0 &&
        vrep_crc32c(0, in + at, padded) != vrep_le_load_u32(in + at + padded))
        return ISCSI_BROKEN;
    *out = (struct iscsi_pdu){.bhs = in, .data = in + at, .data_bytes = segment, .bytes = bytes};
    return ISCSI_WHOLE;
}

bool iscsi_text_next(struct iscsi_text *text, const char **key, uint32_t *key_bytes,
                     const char **value, bool *bad)
{
    *bad = false;
    while (text->at < text->end && *text->at == '\0') /* padding */
        text->at++;
    if (text->at == text->end)
        return false;
    size_t left = (size_t)(text->end - text->at);
    const char *end = memchr(text->at, '\0', left);
    const char *equals = end != NULL ? memchr(text->at, '=', (size_t)(end - text->at)) : NULL;
    if (equals == NULL || equals == text->at || equals - text->at > 63) {
        *bad = true;
        return false;
    }
    *key = text->at;
    *key_bytes = (uint32_t)(equals - text->at);
    *value = equals + 1;
    text->at = end + 1;
    return true;
}

void iscsi_made_add(struct iscsi_made *made, const char *key, const char *value)
{
    size_t key_bytes = strlen(key), value_bytes = strlen(value);
    if (key_bytes + value_bytes + 2 > made->max - made->bytes) {
        made->full = true;
        return;
    }
    char *at = made->text + made->bytes;
    memcpy(at, key, key_bytes);
    at[key_bytes] = '=';
    memcpy(at + key_bytes + 1, value, value_bytes + 1);
    made->bytes += (uint32_t)(key_bytes + value_bytes + 2);
}

bool iscsi_number(const char *value, uint32_t *out)
{
    bool hex = value[0] == '0' && (value[1] == 'x' || value[1] == 'X');
    const char *digits = hex ? value + 2 : value;
    char *end;
    if (digits[0] == '\0' || strlen(digits) > 10 ||
        strspn(digits, hex ? "0123456789abcdefABCDEF" : "0123456789") != strlen(digits))
        return false;
    unsigned long long number = strtoull(digits, &end, hex ? 16 : 10);
    *out = (uint32_t)number;
    return number <= UINT32_MAX;
}

bool iscsi_listed(const char *list, const char *one)
{
    size_t bytes = strlen(one);
    for (const char *at = list; at != NULL; at = strchr(at, ',')) {
        if (*at == ',')
            at++;
        if (strncmp(at, one, bytes) == 0 && (at[bytes] == '\0' || at[bytes] == ','))
            return true;
    }
    return false;
}
