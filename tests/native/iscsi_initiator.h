/* A small iSCSI initiator, of tests and loads: blocking, one PDU at a time, whatever it is told to
 * send. */
#ifndef VREP_TESTS_ISCSI_INITIATOR_H
#define VREP_TESTS_ISCSI_INITIATOR_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <stddef.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/crc32c.h"
#include "base/endian.h"
#include "check.h"
#include "serve/iscsi_pdu.h"

struct client {
    int fd;
    bool header_digest, data_digest;
    uint32_t cmd_sn, stat_sn, tag;
    uint8_t bhs[ISCSI_BHS]; /* of the last PDU that came */
    uint8_t data[1 << 20];
    uint32_t data_bytes;
};

/* host: a numeric address. */
CHECK_UNUSED static void client_open(struct client *client, const char *host, uint16_t port)
{
    struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(port)};
    memset(client, 0, offsetof(struct client, data));
    client->cmd_sn = 1;
    if (inet_pton(AF_INET6, host, &v6.sin6_addr) == 1) {
        client->fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
        CHECK_EQ(connect(client->fd, (struct sockaddr *)&v6, sizeof v6), 0);
        return;
    }
    CHECK_EQ(inet_pton(AF_INET, host, &v4.sin_addr), 1);
    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK_EQ(connect(client->fd, (struct sockaddr *)&v4, sizeof v4), 0);
}

CHECK_UNUSED static void put_bytes(struct client *client, const void *bytes, size_t count)
{
    while (count > 0) {
        ssize_t sent = send(client->fd, bytes, count, MSG_NOSIGNAL);
        if (sent < 0)
            return; /* it was closed: what comes next finds out */
        bytes = (const uint8_t *)bytes + sent;
        count -= (size_t)sent;
    }
}

/* Sends a header as it is, its length and the digests added. */
CHECK_UNUSED static void put_pdu(struct client *client, uint8_t *bhs, const void *data,
                                 uint32_t bytes)
{
    static uint8_t out[ISCSI_BHS + 4 + (1 << 20) + 8];
    uint32_t at = ISCSI_BHS;
    bhs[5] = (uint8_t)(bytes >> 16);
    bhs[6] = (uint8_t)(bytes >> 8);
    bhs[7] = (uint8_t)bytes;
    memcpy(out, bhs, ISCSI_BHS);
    if (client->header_digest) {
        vrep_le_store_u32(out + at, vrep_crc32c(0, out, ISCSI_BHS));
        at += 4;
    }
    if (bytes > 0) {
        uint32_t padded = bytes + iscsi_pad(bytes);
        memset(out + at, 0, padded);
        memcpy(out + at, data, bytes);
        if (client->data_digest) {
            vrep_le_store_u32(out + at + padded, vrep_crc32c(0, out + at, padded));
            padded += 4;
        }
        at += padded;
    }
    put_bytes(client, out, at);
}

CHECK_UNUSED static bool get_bytes(struct client *client, void *to, size_t count)
{
    while (count > 0) {
        struct pollfd ready = {.fd = client->fd, .events = POLLIN};
        if (poll(&ready, 1, 10000) <= 0)
            return false;
        ssize_t got = recv(client->fd, to, count, 0);
        if (got <= 0)
            return false;
        to = (uint8_t *)to + got;
        count -= (size_t)got;
    }
    return true;
}

/* The next PDU; false: the connection has ended. */
CHECK_UNUSED static bool get_pdu(struct client *client)
{
    uint32_t digest;
    if (!get_bytes(client, client->bhs, ISCSI_BHS))
        return false;
    if (client->header_digest) {
        CHECK(get_bytes(client, &digest, 4));
        CHECK_EQ(vrep_le_load_u32(&digest), vrep_crc32c(0, client->bhs, ISCSI_BHS));
    }
    client->data_bytes = iscsi_segment(client->bhs);
    uint32_t padded = client->data_bytes + iscsi_pad(client->data_bytes);
    CHECK(padded <= sizeof client->data);
    CHECK(get_bytes(client, client->data, padded));
    if (client->data_digest && padded > 0) {
        CHECK(get_bytes(client, &digest, 4));
        CHECK_EQ(vrep_le_load_u32(&digest), vrep_crc32c(0, client->data, padded));
    }
    return true;
}

/* True: the peer has closed, after whatever it still sent. */
CHECK_UNUSED static bool is_closed(struct client *client)
{
    uint8_t byte;
    while (get_bytes(client, &byte, 1))
        ;
    struct pollfd ready = {.fd = client->fd, .events = POLLIN};
    return poll(&ready, 1, 0) == 1;
}

CHECK_UNUSED static void client_close(struct client *client)
{
    close(client->fd);
}

/* One login request of `text` (keys with NULs between, `bytes` in all); returns status class and
 * detail, and leaves the answer in client. */
CHECK_UNUSED static int login_step(struct client *client, uint8_t flags, const char *text,
                                   uint32_t bytes)
{
    uint8_t bhs[ISCSI_BHS] = {ISCSI_LOGIN | ISCSI_IMMEDIATE, flags};
    memcpy(bhs + 8, "\x00\x02\x3d\x00\x00\x01", 6);
    vrep_be_store_u32(bhs + 16, ++client->tag);
    vrep_be_store_u32(bhs + 24, client->cmd_sn);
    put_pdu(client, bhs, text, bytes);
    CHECK(get_pdu(client));
    CHECK_EQ(iscsi_opcode(client->bhs), ISCSI_LOGIN_RESPONSE);
    CHECK_EQ(vrep_be_load_u32(client->bhs + 16), client->tag);
    return vrep_be_load_u16(client->bhs + 36);
}

/* What the last text says of a key; NULL: nothing. */
CHECK_UNUSED static const char *client_value(const struct client *client, const char *key)
{
    const char *at = (const char *)client->data, *end = at + client->data_bytes;
    size_t bytes = strlen(key);
    for (; at < end; at += strlen(at) + 1)
        if (strncmp(at, key, bytes) == 0 && at[bytes] == '=')
            return at + bytes + 1;
    return NULL;
}

/* Sends a command; data goes along as immediate data. */
CHECK_UNUSED static void put_command(struct client *client, uint8_t flags, const uint8_t *cdb,
                                     uint32_t expected, const void *data, uint32_t bytes)
{
    uint8_t bhs[ISCSI_BHS] = {ISCSI_COMMAND, flags};
    vrep_be_store_u32(bhs + 16, ++client->tag);
    vrep_be_store_u32(bhs + 20, expected);
    vrep_be_store_u32(bhs + 24, client->cmd_sn++);
    memcpy(bhs + 32, cdb, 16);
    put_pdu(client, bhs, data, bytes);
}

/* Reads the answer of the command that was sent last; its data into `in`.  Returns the SCSI status.
 */
CHECK_UNUSED static int get_answer(struct client *client, uint8_t *in, uint32_t *in_bytes)
{
    uint32_t bytes = 0, sn = 0;
    for (;;) {
        CHECK(get_pdu(client));
        CHECK_EQ(vrep_be_load_u32(client->bhs + 16), client->tag);
        if (iscsi_opcode(client->bhs) == ISCSI_RESPONSE)
            break;
        CHECK_EQ(iscsi_opcode(client->bhs), ISCSI_DATA_IN);
        CHECK_EQ(vrep_be_load_u32(client->bhs + 36), sn++);
        CHECK_EQ(vrep_be_load_u32(client->bhs + 40), bytes);
        memcpy(in + bytes, client->data, client->data_bytes);
        bytes += client->data_bytes;
        if ((client->bhs[1] & ISCSI_STATUS) != 0)
            break;
    }
    if (in_bytes != NULL)
        *in_bytes = bytes;
    return client->bhs[3];
}

/* TEST UNIT READY until nothing is left to tell. */
CHECK_UNUSED static void client_settle(struct client *client)
{
    static const uint8_t ready[16];
    do
        put_command(client, 0x80, ready, 0, NULL, 0);
    while (get_answer(client, NULL, NULL) != 0);
}

#endif
