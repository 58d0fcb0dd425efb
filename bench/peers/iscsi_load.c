/* An initiator's load over iSCSI, for any target of it. One session; whole blocks at random places,
 * as many in flight as asked for; commands that are due go out in one call, and answers are read
 * many in one call, as a good initiator does. Prints one JSON object: requests a second,
 * percentiles of their time in microseconds, and its own CPU time for each. usage: iscsi_load
 * HOST PORT TARGET LUN BYTES write|read BLOCK DEPTH SECONDS
 *
 * gcc -O2 -Isrc/_native -Itests/native bench/peers/iscsi_load.c src/_native/base/crc32c.c
 *     src/_native/base/status.c -o build/iscsi_load */
#define _GNU_SOURCE
#include "iscsi_initiator.h"

#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/uio.h>

#define DEPTH_MAX 64u
#define BLOCK_MAX (1u << 20)
#define PIECES 4096u /* PDUs of one call */
#define IN_BYTES (2u << 20)
#define BUCKETS 4096

struct slot {
    uint8_t bhs[ISCSI_BHS];
    uint8_t *data;
    uint64_t started_ns;
    bool due;
};

static struct client client;
static struct slot slots[DEPTH_MAX];
static struct iovec iov[2 * PIECES];
static uint8_t headers[PIECES][ISCSI_BHS];
static uint8_t in[IN_BYTES];
static uint64_t counts[BUCKETS], done, blocks, lun, seed = 88172645463325252u;
static uint32_t block, segment, first_burst, max_cmd_sn, inflight, iovs, pieces;
static bool writes, immediate;

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* 1 us each up to 2 ms, then 100 us each. */
static uint32_t bucket(uint64_t ns)
{
    uint64_t us = ns / 1000, at = us < 2048 ? us : 2048 + (us - 2048) / 100;
    return (uint32_t)(at < BUCKETS ? at : BUCKETS - 1);
}

static double percentile(double share)
{
    uint64_t seen = 0;
    for (uint32_t i = 0; i < BUCKETS; i++)
        if ((seen += counts[i]) >= (uint64_t)((double)done * share))
            return i < 2048 ? i + 0.5 : 2048 + (i - 2048) * 100.0 + 50;
    return 0;
}

/* ---- out ----------------------------------------------------------------------- */

static void flush(void)
{
    struct iovec *at = iov;
    while (iovs > 0) {
        struct msghdr message = {.msg_iov = at, .msg_iovlen = iovs < 1024 ? iovs : 1024};
        ssize_t sent = sendmsg(client.fd, &message, MSG_NOSIGNAL);
        CHECK(sent > 0);
        while (iovs > 0 && (size_t)sent >= at->iov_len) {
            sent -= (ssize_t)at->iov_len;
            at++;
            iovs--;
        }
        if (iovs > 0) {
            at->iov_base = (uint8_t *)at->iov_base + sent;
            at->iov_len -= (size_t)sent;
        }
    }
    pieces = 0;
}

static void add(const uint8_t *bhs, uint8_t *data, uint32_t bytes)
{
    if (pieces == PIECES)
        flush();
    uint8_t *head = headers[pieces++];
    memcpy(head, bhs, ISCSI_BHS);
    head[5] = (uint8_t)(bytes >> 16);
    head[6] = (uint8_t)(bytes >> 8);
    head[7] = (uint8_t)bytes;
    vrep_be_store_u32(head + 28, client.stat_sn);
    iov[iovs++] = (struct iovec){head, ISCSI_BHS};
    if (bytes > 0)
        iov[iovs++] = (struct iovec){data, bytes};
}

static void send_command(uint32_t i)
{
    struct slot *slot = &slots[i];
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    vrep_be_store_u32(slot->bhs + 24, client.cmd_sn++);
    vrep_be_store_u32(slot->bhs + 32 + 2, (uint32_t)(seed % blocks * (block / 512)));
    if (writes)
        memcpy(slot->data, &seed, sizeof seed);
    uint32_t bytes = block < segment ? block : segment;
    if (bytes > first_burst)
        bytes = first_burst;
    slot->due = false;
    slot->started_ns = now_ns();
    inflight++;
    add(slot->bhs, slot->data, writes && immediate ? bytes : 0);
}

static void send_due(uint32_t depth)
{
    for (uint32_t i = 0; i < depth; i++)
        if (slots[i].due && (int32_t)(max_cmd_sn - client.cmd_sn) >= 0)
            send_command(i);
    flush();
}

static void answer_r2t(const uint8_t *r2t)
{
    uint32_t i = vrep_be_load_u32(r2t + 16), at = vrep_be_load_u32(r2t + 40), sn = 0;
    uint32_t end = at + vrep_be_load_u32(r2t + 44);
    CHECK(i < DEPTH_MAX && end <= block);
    while (at < end) {
        uint32_t part = end - at < segment ? end - at : segment;
        uint8_t bhs[ISCSI_BHS] = {ISCSI_DATA_OUT, at + part == end ? ISCSI_FINAL : 0};
        memcpy(bhs + 8, r2t + 8, 16); /* LUN, both tags */
        vrep_be_store_u32(bhs + 36, sn++);
        vrep_be_store_u32(bhs + 40, at);
        add(bhs, slots[i].data + at, part);
        at += part;
    }
}

/* ---- in ------------------------------------------------------------------------ */

static void take_pdu(const uint8_t *bhs, bool again, uint64_t *last_ns)
{
    uint8_t opcode = iscsi_opcode(bhs);
    max_cmd_sn = vrep_be_load_u32(bhs + 32);
    if (opcode == ISCSI_R2T) {
        answer_r2t(bhs);
        return;
    }
    CHECK(opcode == ISCSI_RESPONSE || opcode == ISCSI_DATA_IN);
    if (opcode == ISCSI_DATA_IN && (bhs[1] & ISCSI_STATUS) == 0)
        return;
    uint32_t i = vrep_be_load_u32(bhs + 16);
    CHECK(i < DEPTH_MAX && !slots[i].due);
    CHECK_EQ(bhs[2], 0);
    CHECK_EQ(bhs[3], 0);
    CHECK_EQ(bhs[1] & (ISCSI_OVERFLOW | ISCSI_UNDERFLOW), 0);
    client.stat_sn = vrep_be_load_u32(bhs + 24) + 1;
    *last_ns = now_ns();
    counts[bucket(*last_ns - slots[i].started_ns)]++;
    done++;
    inflight--;
    slots[i].due = again;
}

/* Reads what is there, once, and takes the PDUs that are whole. */
static void receive(uint64_t end_ns, uint64_t *last_ns)
{
    static uint32_t from, to;
    if (from > 0 && from == to)
        from = to = 0;
    if (IN_BYTES - to < IN_BYTES / 2) {
        memmove(in, in + from, to - from);
        to -= from;
        from = 0;
    }
    ssize_t got = recv(client.fd, in + to, IN_BYTES - to, 0);
    CHECK(got > 0);
    to += (uint32_t)got;
    bool again = now_ns() < end_ns;
    for (;;) {
        struct iscsi_pdu pdu;
        enum iscsi_found found = iscsi_pdu_find(in + from, to - from, false, false, &pdu);
        CHECK(found != ISCSI_BROKEN);
        if (found == ISCSI_MORE)
            return;
        take_pdu(pdu.bhs, again, last_ns);
        from += pdu.bytes;
    }
}

/* ---- the session ----------------------------------------------------------------- */

static uint32_t agreed(const char *key, uint32_t otherwise)
{
    const char *at = client_value(&client, key);
    if (at == NULL)
        return otherwise;
    if (strcmp(at, "Yes") == 0 || strcmp(at, "No") == 0)
        return at[0] == 'Y';
    return (uint32_t)strtoul(at, NULL, 0);
}

static void log_in(const char *target)
{
    char keys[1024];
    int bytes = snprintf(keys, sizeof keys,
                         "InitiatorName=iqn.2026-01.invalid.vrep:load%cSessionType=Normal%c"
                         "TargetName=%s%cHeaderDigest=None%cDataDigest=None%cImmediateData=Yes%c"
                         "InitialR2T=Yes%cMaxRecvDataSegmentLength=262144%c"
                         "FirstBurstLength=262144%cMaxBurstLength=1048576%cErrorRecoveryLevel=0%c",
                         0, 0, target, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    immediate = true;
    segment = 8192;
    first_burst = 262144;
    do { /* a target with something to negotiate itself takes another round */
        CHECK_EQ(login_step(&client, 0x87, keys, (uint32_t)bytes), 0);
        immediate = agreed("ImmediateData", immediate) != 0;
        segment = agreed("MaxRecvDataSegmentLength", segment);
        first_burst = agreed("FirstBurstLength", first_burst);
        bytes = 0;
    } while ((client.bhs[1] & ISCSI_FINAL) == 0);
    client.stat_sn = vrep_be_load_u32(client.bhs + 24) + 1;
}

/* TEST UNIT READY until nothing is left to tell. */
static void settle(void)
{
    for (int i = 0; i < 100; i++) {
        uint8_t bhs[ISCSI_BHS] = {ISCSI_COMMAND, 0x81};
        vrep_be_store_u64(bhs + 8, lun);
        vrep_be_store_u32(bhs + 16, 0xffff);
        vrep_be_store_u32(bhs + 24, client.cmd_sn++);
        vrep_be_store_u32(bhs + 28, client.stat_sn);
        put_pdu(&client, bhs, NULL, 0);
        CHECK(get_pdu(&client));
        CHECK_EQ(iscsi_opcode(client.bhs), ISCSI_RESPONSE);
        client.stat_sn = vrep_be_load_u32(client.bhs + 24) + 1;
        max_cmd_sn = vrep_be_load_u32(client.bhs + 32);
        if (client.bhs[3] == 0)
            return;
    }
    CHECK(false);
}

int main(int argc, char **argv)
{
    CHECK(argc == 10);
    uint32_t depth = (uint32_t)strtoul(argv[8], NULL, 0);
    int one = 1, bytes = 4 << 20;
    lun = strtoull(argv[4], NULL, 0) << 48;
    writes = strcmp(argv[6], "write") == 0;
    block = (uint32_t)strtoul(argv[7], NULL, 0);
    CHECK(block % 512 == 0 && block <= BLOCK_MAX && depth > 0 && depth <= DEPTH_MAX);
    blocks = strtoull(argv[5], NULL, 0) / block;
    client_open(&client, argv[1], (uint16_t)strtoul(argv[2], NULL, 0));
    (void)setsockopt(client.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    (void)setsockopt(client.fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    log_in(argv[3]);
    settle();
    for (uint32_t i = 0; i < depth; i++) {
        struct slot *slot = &slots[i];
        slot->bhs[0] = ISCSI_COMMAND;
        slot->bhs[1] = (uint8_t)(ISCSI_FINAL | 1 | (writes ? ISCSI_WRITE : ISCSI_READ));
        vrep_be_store_u64(slot->bhs + 8, lun);
        vrep_be_store_u32(slot->bhs + 16, i);
        vrep_be_store_u32(slot->bhs + 20, block);
        slot->bhs[32] = writes ? 0x2a : 0x28;
        vrep_be_store_u16(slot->bhs + 32 + 7, (uint16_t)(block / 512));
        CHECK((slot->data = malloc(block)) != NULL);
        for (uint32_t at = 0; at < block; at++)
            slot->data[at] = (uint8_t)check_random();
        slot->due = true;
    }
    uint64_t begin_ns = now_ns(), last_ns = begin_ns;
    uint64_t end_ns = begin_ns + (uint64_t)(strtod(argv[9], NULL) * 1e9);
    send_due(depth);
    while (inflight > 0) {
        receive(end_ns, &last_ns);
        send_due(depth);
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_us = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1e6 +
                    (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    printf("{\"iops\": %.1f, \"p50\": %.1f, \"p99\": %.1f, \"cpu_us\": %.2f}\n",
           (double)done / ((double)(last_ns - begin_ns) / 1e9), percentile(0.5), percentile(0.99),
           cpu_us / (double)done);
    client_close(&client);
    return 0;
}
