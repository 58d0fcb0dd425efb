/* Rules: which initiators are admitted, by name and address. */
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "serve/iscsi_internal.h"

static void map_v4(const void *address, uint8_t out[16])
{
    memset(out, 0, 10);
    out[10] = out[11] = 0xff;
    memcpy(out + 12, address, 4);
}

static int parse_address(const char *text, struct iscsi_rule *out)
{
    char host[INET6_ADDRSTRLEN];
    uint8_t v4[4];
    const char *slash = strchr(text, '/');
    size_t bytes = slash != NULL ? (size_t)(slash - text) : strlen(text);
    if (bytes >= sizeof host)
        return VREP_E_INVALID;
    memcpy(host, text, bytes);
    host[bytes] = '\0';
    uint32_t most = 128, bits;
    if (inet_pton(AF_INET, host, v4) == 1) {
        map_v4(v4, out->address);
        most = 32;
    } else if (inet_pton(AF_INET6, host, out->address) != 1) {
        return VREP_E_INVALID;
    }
    if (slash == NULL)
        bits = most;
    else if (!iscsi_number(slash + 1, &bits) || bits > most || slash[2] == 'x')
        return VREP_E_INVALID;
    out->bits = bits + (128 - most);
    return VREP_OK;
}

int iscsi_rule_parse(const struct vrep_iscsi_rule *rule, struct iscsi_rule *out)
{
    memset(out, 0, sizeof *out);
    if (rule->initiator != NULL) {
        if (!iscsi_name_valid(rule->initiator))
            return VREP_E_INVALID;
        strcpy(out->initiator, rule->initiator);
    }
    return rule->address != NULL ? parse_address(rule->address, out) : VREP_OK;
}

static bool same_bits(const uint8_t *a, const uint8_t *b, uint32_t bits)
{
    if (memcmp(a, b, bits / 8) != 0)
        return false;
    uint32_t rest = bits % 8;
    return rest == 0 || ((a[bits / 8] ^ b[bits / 8]) >> (8 - rest)) == 0;
}

bool iscsi_admitted(const struct iscsi_rule *rules, uint32_t count, const char *initiator,
                    const struct sockaddr_storage *peer)
{
    uint8_t address[16] = {0};
    bool known = true;
    if (peer->ss_family == AF_INET)
        map_v4(&((const struct sockaddr_in *)peer)->sin_addr, address);
    else if (peer->ss_family == AF_INET6)
        memcpy(address, &((const struct sockaddr_in6 *)peer)->sin6_addr, 16);
    else
        known = false;
    for (uint32_t i = 0; i < count; i++) {
        const struct iscsi_rule *rule = &rules[i];
        if (rule->initiator[0] != '\0' && strcmp(rule->initiator, initiator) != 0)
            continue;
        if (rule->bits == 0 || (known && same_bits(rule->address, address, rule->bits)))
            return true;
    }
    return count == 0;
}

/* RFC 7143 4.2.7: the characters that are left after normalization. */
bool iscsi_name_valid(const char *name)
{
    size_t bytes = strlen(name);
    bool typed = strncmp(name, "iqn.", 4) == 0 || strncmp(name, "eui.", 4) == 0 ||
                 strncmp(name, "naa.", 4) == 0;
    if (!typed || bytes < 5 || bytes > ISCSI_NAME_MAX)
        return false;
    return strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789.-:") == bytes ||
           (name[0] != 'i' && strspn(name + 4, "0123456789abcdefABCDEF") == bytes - 4);
}
