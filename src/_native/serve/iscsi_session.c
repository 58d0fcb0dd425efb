/* Session: what an initiator and the target say of the session itself: login, text, NOP, logout,
 * and that a PDU is refused. */
#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/status.h"
#include "serve/iscsi_internal.h"

static enum handled queued(bool good)
{
    return good ? HANDLED : ENDED;
}

enum handled iscsi_reject(struct iscsi_connection *c, const struct iscsi_pdu *pdu, uint8_t reason)
{
    uint8_t bhs[ISCSI_BHS] = {ISCSI_REJECT, ISCSI_FINAL, reason};
    vrep_be_store_u32(bhs + 16, ISCSI_NO_TAG);
    vrep_count(&c->client.traffic.errors, 1);
    return queued(iscsi_queue_pdu(c, bhs, pdu->bhs, ISCSI_BHS, true));
}

static void own_address(const struct iscsi_connection *c, char *out, size_t bytes)
{
    struct sockaddr_storage address = {0};
    socklen_t length = sizeof address;
    char host[INET6_ADDRSTRLEN] = "";
    unsigned int port = 0;
    (void)getsockname(c->watch.fd, (struct sockaddr *)&address, &length);
    if (address.ss_family == AF_INET6) {
        const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)&address;
        port = ntohs(v6->sin6_port);
        if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
            (void)inet_ntop(AF_INET, v6->sin6_addr.s6_addr + 12, host, sizeof host);
        } else {
            (void)inet_ntop(AF_INET6, &v6->sin6_addr, host, sizeof host);
            snprintf(out, bytes, "[%s]:%u,1", host, port);
            return;
        }
    } else {
        const struct sockaddr_in *v4 = (const struct sockaddr_in *)&address;
        port = ntohs(v4->sin_port);
        (void)inet_ntop(AF_INET, &v4->sin_addr, host, sizeof host);
    }
    snprintf(out, bytes, "%s:%u,1", host, port);
}

enum handled iscsi_text_request(struct iscsi_connection *c, const struct iscsi_pdu *pdu)
{
    char room[1024], address[INET6_ADDRSTRLEN + 16];
    struct iscsi_made made = {.text = room, .max = sizeof room};
    struct iscsi_text text = {(const char *)pdu->data, (const char *)pdu->data + pdu->data_bytes};
    const char *key, *value;
    uint32_t key_bytes;
    bool bad;
    uint8_t bhs[ISCSI_BHS] = {ISCSI_TEXT_RESPONSE, ISCSI_FINAL};
    if ((pdu->bhs[1] & ISCSI_CONTINUE) != 0 || (pdu->bhs[1] & ISCSI_FINAL) == 0)
        return iscsi_reject(c, pdu,
                            ISCSI_REJECT_PROTOCOL); /* nothing that is asked here is so long */
    while (iscsi_text_next(&text, &key, &key_bytes, &value, &bad)) {
        if (key_bytes != 11 || memcmp(key, "SendTargets", 11) != 0) {
            char name[64];
            memcpy(name, key, key_bytes);
            name[key_bytes] = '\0';
            iscsi_made_add(&made, name, "NotUnderstood");
            continue;
        }
        bool all = strcmp(value, "All") == 0 && c->login->discovery;
        bool this_one = value[0] == '\0' && !c->login->discovery;
        if (!all && !this_one && strcmp(value, c->server->name) != 0)
            continue; /* no target of that name: none is told */
        own_address(c, address, sizeof address);
        iscsi_made_add(&made, "TargetName", c->server->name);
        iscsi_made_add(&made, "TargetAddress", address);
    }
    if (bad || made.full)
        return iscsi_reject(c, pdu, ISCSI_REJECT_PROTOCOL);
    memcpy(bhs + 8, pdu->bhs + 8, 12); /* LUN, tag */
    vrep_be_store_u32(bhs + 20, ISCSI_NO_TAG);
    return queued(iscsi_queue_pdu(c, bhs, made.text, made.bytes, true));
}

enum handled iscsi_nop_out(struct iscsi_connection *c, const struct iscsi_pdu *pdu)
{
    uint8_t bhs[ISCSI_BHS] = {ISCSI_NOP_IN, ISCSI_FINAL};
    if (vrep_be_load_u32(pdu->bhs + 16) == ISCSI_NO_TAG)
        return HANDLED; /* an answer to our ping */
    memcpy(bhs + 8, pdu->bhs + 8, 12);
    vrep_be_store_u32(bhs + 20, ISCSI_NO_TAG);
    uint32_t bytes = pdu->data_bytes < c->login->send_max ? pdu->data_bytes : c->login->send_max;
    return queued(iscsi_queue_pdu(c, bhs, pdu->data, bytes, true));
}

enum handled iscsi_logout(struct iscsi_connection *c, const struct iscsi_pdu *pdu)
{
    uint8_t bhs[ISCSI_BHS] = {ISCSI_LOGOUT_RESPONSE, ISCSI_FINAL};
    uint8_t reason = pdu->bhs[1] & 0x7fu;
    if (reason > 1) /* to recover the connection: not at level 0 */
        bhs[2] = 2;
    memcpy(bhs + 16, pdu->bhs + 16, 4);
    if (!iscsi_queue_pdu(c, bhs, NULL, 0, true))
        return ENDED;
    if (reason <= 1) {
        c->out_last->ends = true;
        c->state = ISCSI_FINISHING;
    }
    return HANDLED;
}

enum handled iscsi_login_request(struct iscsi_connection *c, const struct iscsi_pdu *pdu)
{
    char text[8192];
    struct iscsi_made made = {.text = text, .max = sizeof text};
    uint8_t bhs[ISCSI_BHS];
    if (iscsi_opcode(pdu->bhs) != ISCSI_LOGIN) {
        iscsi_end(c, "did not log in");
        return ENDED;
    }
    if (!c->login->begun && c->login->kept_bytes == 0) {
        c->exp_cmd_sn = vrep_be_load_u32(pdu->bhs + 24);
        c->max_cmd_sn = c->exp_cmd_sn - 1;
        c->stat_sn = vrep_be_load_u32(pdu->bhs + 28);
    }
    int status = iscsi_login_step(c->login, pdu, bhs, &made);
    if (status == ISCSI_LOGIN_OK && c->login->done) {
        status = iscsi_admit(c);
        if (status != ISCSI_LOGIN_OK) {
            bhs[1] = 0;
            made.bytes = 0;
            vrep_be_store_u16(bhs + 36, (uint16_t)status);
        } else {
            if (++c->server->tsih == 0)
                c->server->tsih = 1;
            vrep_be_store_u16(bhs + 14, c->server->tsih);
        }
    }
    if (!iscsi_queue_pdu(c, bhs, made.text, made.bytes, true))
        return ENDED;
    c->out_last->bare = true;
    if (status != ISCSI_LOGIN_OK) {
        VREP_WARN("iscsi", "%s %s: login refused, status %04x", c->client.address,
                  c->login->initiator, (unsigned)status);
        vrep_count(&c->server->stats.refused, 1);
        c->out_last->ends = true;
        c->state = ISCSI_FINISHING;
    } else if (c->login->done) {
        c->state = ISCSI_SERVING;
    }
    return HANDLED;
}
