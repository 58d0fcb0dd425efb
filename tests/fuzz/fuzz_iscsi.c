/* Bytes of an iSCSI initiator against a whole target that listens on the loopback.
 *
 * The first byte says how far the harness logs in before: not at all, or to full feature phase,
 * plain or with digests; and whether it completes what follows: with bit 7, PDUs of the input are
 * 48 bytes of header and the data that it announces (at most what is left), to which the harness
 * adds padding and digests, which nobody can guess.  Whatever comes, the target answers or closes,
 * and ends idle. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/crc32c.h"
#include "base/log.h"
#include "base/status.h"
#include "fuzz.h"
#include "serve/iscsi.h"

#define DISK_BYTES (1u << 20)
#define PDUS_MAX 64

static struct vrep_group *group;
static struct vrep_loop *loop;
static struct vrep_iscsi_server *server;
static uint8_t in[4u << 20];

static void serve(void)
{
    static char uri[64];
    int fd = memfd_create("fuzz-iscsi", 0);
    FUZZ_MUST(fd >= 0 && ftruncate(fd, DISK_BYTES) == 0);
    snprintf(uri, sizeof uri, "file:/proc/self/fd/%d", fd);
    struct vrep_group_disk disk = {.name = "a", .uri = uri};
    struct vrep_group_config config = {
        .disks = &disk, .disks_count = 1, .slots = 32, .threads = 1, .private_bytes = 32u << 20};
    struct vrep_scsi_unit_config unit = {.disk = 0, .block_bytes = 512};
    struct vrep_iscsi_config iscsi = {.host = "127.0.0.1",
                                      .target_name = "iqn.a:b",
                                      .sessions = 8,
                                      .scsi = {.units = &unit, .units_count = 1}};
    FUZZ_MUST(vrep_group_open(&config, &group) == VREP_OK);
    FUZZ_MUST(vrep_loop_create(group, &loop) == VREP_OK);
    FUZZ_MUST(vrep_iscsi_create(loop, &iscsi, &server) == VREP_OK);
    FUZZ_MUST(vrep_loop_start(loop) == VREP_OK);
}

/* The fuzzer's alarm clock interrupts. */
static ssize_t get(int fd, void *to, size_t size)
{
    ssize_t got;
    do
        got = recv(fd, to, size, 0);
    while (got < 0 && errno == EINTR);
    return got;
}

static void put(int fd, const void *data, size_t size)
{
    while (size > 0) {
        struct pollfd ready = {.fd = fd, .events = POLLOUT | POLLIN};
        int count = poll(&ready, 1, 10000);
        if (count < 0 && errno == EINTR)
            continue;
        FUZZ_MUST(count == 1);
        /* It may not read on before its answers are read. */
        if ((ready.revents & POLLIN) != 0 && recv(fd, in, sizeof in, MSG_DONTWAIT) == 0)
            return;
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && (ready.revents & (POLLERR | POLLHUP)) != 0)
            return; /* it was closed */
        if (sent > 0) {
            data = (const uint8_t *)data + sent;
            size -= (size_t)sent;
        }
    }
}

static void put_pdu(int fd, uint8_t *bhs, const uint8_t *data, uint32_t bytes, bool digests)
{
    uint8_t out[ISCSI_BHS + 1020 + 4 + 65536 + 8] = {0};
    uint32_t header = ISCSI_BHS + iscsi_ahs(bhs), at = header;
    bhs[5] = 0;
    bhs[6] = (uint8_t)(bytes >> 8);
    bhs[7] = (uint8_t)bytes;
    memcpy(out, bhs, ISCSI_BHS);
    if (digests) {
        vrep_le_store_u32(out + at, vrep_crc32c(0, out, header));
        at += 4;
    }
    if (bytes > 0) {
        uint32_t padded = bytes + iscsi_pad(bytes);
        memcpy(out + at, data, bytes);
        if (digests)
            vrep_le_store_u32(out + at + padded, vrep_crc32c(0, out + at, padded));
        at += padded + (digests ? 4 : 0);
    }
    put(fd, out, at);
}

static bool log_in(int fd, bool digests)
{
    static const char plain[] = "InitiatorName=iqn.c:d\0TargetName=iqn.a:b\0InitialR2T=No\0";
    static const char sums[] = "InitiatorName=iqn.c:d\0TargetName=iqn.a:b\0"
                               "HeaderDigest=CRC32C\0DataDigest=CRC32C\0";
    uint8_t bhs[ISCSI_BHS] = {ISCSI_LOGIN | ISCSI_IMMEDIATE, 0x87};
    vrep_be_store_u32(bhs + 24, 1);
    put_pdu(fd, bhs, (const uint8_t *)(digests ? sums : plain),
            digests ? sizeof sums - 1 : sizeof plain - 1, false);
    size_t have = 0;
    while (have < ISCSI_BHS ||
           have < ISCSI_BHS + iscsi_segment(in) + iscsi_pad(iscsi_segment(in))) {
        ssize_t got = get(fd, in + have, sizeof in - have);
        FUZZ_MUST(got > 0);
        have += (size_t)got;
    }
    return vrep_be_load_u16(in + 36) == 0;
}

/* What comes back are whole PDUs of a target. */
static void check_answers(size_t size, bool digests)
{
    size_t at = 0;
    while (size - at >= ISCSI_BHS) {
        const uint8_t *bhs = in + at;
        uint8_t opcode = iscsi_opcode(bhs);
        FUZZ_MUST(opcode == ISCSI_NOP_IN || opcode == ISCSI_RESPONSE || opcode == ISCSI_DATA_IN ||
                  opcode == ISCSI_TASK_MANAGEMENT_RESPONSE || opcode == ISCSI_TEXT_RESPONSE ||
                  opcode == ISCSI_LOGOUT_RESPONSE || opcode == ISCSI_R2T || opcode == ISCSI_REJECT);
        FUZZ_MUST(bhs[4] == 0);
        uint32_t segment = iscsi_segment(bhs);
        FUZZ_MUST(segment <= 8192);
        /* A request in its place that is none was refused, and the session goes on. */
        FUZZ_CANARY(opcode == ISCSI_REJECT);
        at += ISCSI_BHS + (digests ? 4u : 0u);
        at += segment + iscsi_pad(segment) + (digests && segment > 0 ? 4u : 0u);
    }
}

/*
 * A connection from the next address of 127.0.0.0/8. Each leaves its port in
 * TIME-WAIT for a minute, and a fast machine makes more connections in that
 * minute than one address has ports.
 */
static int connected(void)
{
    static uint32_t client;
    struct sockaddr_in from = {.sin_family = AF_INET,
                               .sin_addr.s_addr = htonl(0x7f010000u | (client++ & 0xffffu))};
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_port = htons(vrep_iscsi_port(server)),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
    FUZZ_MUST(fd >= 0);
    (void)setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    FUZZ_MUST(bind(fd, (struct sockaddr *)&from, sizeof from) == 0);
    int status;
    do /* the fuzzer's own alarm may come; the next call waits for the same connection */
        status = connect(fd, (struct sockaddr *)&to, sizeof to);
    while (status != 0 && errno == EINTR);
    FUZZ_MUST(status == 0);
    return fd;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1)
        return 0;
    if (group == NULL) {
        vrep_log_set_level(VREP_LOG_ERROR);
        serve();
    }
    int fd = connected();
    bool logged = (data[0] & 1u) != 0, digests = logged && (data[0] & 2u) != 0;
    bool whole = (data[0] & 0x80u) != 0;
    if (logged)
        FUZZ_MUST(log_in(fd, digests));
    data++;
    size--;
    for (int i = 0; whole && i < PDUS_MAX && size >= ISCSI_BHS; i++) {
        uint8_t bhs[ISCSI_BHS];
        memcpy(bhs, data, ISCSI_BHS);
        data += ISCSI_BHS;
        size -= ISCSI_BHS;
        uint32_t bytes = iscsi_segment(bhs) & 0xffffu;
        if (bytes > size)
            bytes = (uint32_t)size;
        put_pdu(fd, bhs, data, bytes, digests);
        data += bytes;
        size -= bytes;
    }
    if (!whole)
        put(fd, data, size);
    shutdown(fd, SHUT_WR);
    size_t have = 0;
    ssize_t got;
    while (have < sizeof in && (got = get(fd, in + have, sizeof in - have)) > 0)
        have += (size_t)got;
    close(fd);
    if (logged && whole && size < ISCSI_BHS)
        check_answers(have, digests);
    struct vrep_group_status status;
    FUZZ_MUST(vrep_group_status(group, &status) == VREP_OK);
    FUZZ_MUST(status.errors == 0);
    return 0;
}
