/*
 * A virtual machine monitor with its guest, for tests of the vhost-user server: memory in a memfd,
 * split virtqueues in it, the messages of vhost-user. One thread; it waits at most 10 s for
 * anything.
 *
 * Guest memory: queue q has its rings at q * QUEUE_ROOM; data lie from DATA_AT on. Guest addresses
 * begin at GUEST_AT, those of the monitor at USER_AT, so that nothing works that mixes them up.
 */
#ifndef VREP_TESTS_VHOST_MONITOR_H
#define VREP_TESTS_VHOST_MONITOR_H

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/endian.h"
#include "check.h"
#include "serve/vhost_protocol.h"

#ifndef MEMORY_BYTES
#define MEMORY_BYTES (8u << 20)
#endif
#define GUEST_AT UINT64_C(0x100000000)
#define USER_AT UINT64_C(0x7f0000000000)
#define QUEUE_ROOM (64u << 10)
#define USED_AT (40u << 10)      /* within a queue's room */
#define AVAILABLE_AT (32u << 10) /* the same */
#define DATA_AT (2u << 20)
#define WAIT_MS 10000

struct monitor_queue {
    uint32_t size;
    int kick, call, error;
    uint16_t offered, seen; /* indexes of the rings */
    uint16_t next;          /* descriptor that is free */
};

struct monitor {
    int socket, memory_fd;
    uint8_t *memory;
    uint64_t features;
    struct monitor_queue queue[4];
};

CHECK_UNUSED static void monitor_connect(struct monitor *m, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    m->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(strlen(path) < sizeof address.sun_path);
    memcpy(address.sun_path, path, strlen(path));
    CHECK_EQ(connect(m->socket, (struct sockaddr *)&address, sizeof address), 0);
}

CHECK_UNUSED static void monitor_create(struct monitor *m)
{
    memset(m, 0, sizeof *m);
    m->socket = -1;
    m->memory_fd = memfd_create("guest", MFD_CLOEXEC);
    CHECK(m->memory_fd >= 0);
    CHECK_EQ(ftruncate(m->memory_fd, MEMORY_BYTES), 0);
    m->memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, m->memory_fd, 0);
    CHECK(m->memory != MAP_FAILED);
    for (int i = 0; i < 4; i++)
        m->queue[i].kick = m->queue[i].call = m->queue[i].error = -1;
}

CHECK_UNUSED static void monitor_hang_up(struct monitor *m)
{
    close(m->socket);
    m->socket = -1;
    for (int i = 0; i < 4; i++) {
        int *fds[] = {&m->queue[i].kick, &m->queue[i].call, &m->queue[i].error};
        for (int n = 0; n < 3; n++) {
            if (*fds[n] >= 0)
                close(*fds[n]);
            *fds[n] = -1;
        }
    }
}

CHECK_UNUSED static void monitor_destroy(struct monitor *m)
{
    if (m->socket >= 0)
        monitor_hang_up(m);
    munmap(m->memory, MEMORY_BYTES);
    close(m->memory_fd);
}

/* ---- messages ----------------------------------------------------------------------- */

CHECK_UNUSED static void monitor_send_raw(struct monitor *m, const void *bytes, size_t count,
                                          const int *fds, uint32_t fds_count)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(16 * sizeof(int))];
    } control;
    struct iovec iov = {(void *)(uintptr_t)bytes, count};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    memset(&control, 0, sizeof control);
    if (fds_count > 0) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(fds_count * sizeof(int));
        struct cmsghdr *one = CMSG_FIRSTHDR(&message);
        one->cmsg_level = SOL_SOCKET;
        one->cmsg_type = SCM_RIGHTS;
        one->cmsg_len = CMSG_LEN(fds_count * sizeof(int));
        memcpy(CMSG_DATA(one), fds, fds_count * sizeof(int));
    }
    CHECK_EQ(sendmsg(m->socket, &message, MSG_NOSIGNAL), (ssize_t)count);
}

CHECK_UNUSED static void monitor_send(struct monitor *m, uint32_t request, uint32_t flags,
                                      const void *body, uint32_t bytes, const int *fds,
                                      uint32_t fds_count)
{
    uint8_t raw[sizeof(struct vrep_vhost_header) + VREP_VHOST_PAYLOAD_MAX];
    struct vrep_vhost_header header = {request, VREP_VHOST_VERSION | flags, bytes};
    memcpy(raw, &header, sizeof header);
    if (bytes > 0)
        memcpy(raw + sizeof header, body, bytes);
    monitor_send_raw(m, raw, sizeof header + bytes, fds, fds_count);
}

CHECK_UNUSED static void monitor_wait(int fd)
{
    struct pollfd look = {.fd = fd, .events = POLLIN};
    CHECK_EQ(poll(&look, 1, WAIT_MS), 1);
}

/* The reply's body; returns a descriptor that came with it, or -1. */
CHECK_UNUSED static int monitor_reply(struct monitor *m, uint32_t request, void *body,
                                      uint32_t bytes)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct vrep_vhost_header header;
    struct iovec iov = {&header, sizeof header};
    struct msghdr message = {.msg_iov = &iov,
                             .msg_iovlen = 1,
                             .msg_control = &control,
                             .msg_controllen = sizeof control};
    int fd = -1;
    monitor_wait(m->socket);
    CHECK_EQ(recvmsg(m->socket, &message, 0), (ssize_t)sizeof header);
    struct cmsghdr *one = CMSG_FIRSTHDR(&message);
    if (one != NULL)
        memcpy(&fd, CMSG_DATA(one), sizeof fd);
    CHECK_EQ(header.request, request);
    CHECK_EQ(header.flags & VREP_VHOST_REPLY, VREP_VHOST_REPLY);
    CHECK_EQ(header.bytes, bytes);
    if (bytes > 0)
        CHECK_EQ(recv(m->socket, body, bytes, MSG_WAITALL), (ssize_t)bytes);
    return fd;
}

CHECK_UNUSED static uint64_t monitor_ask(struct monitor *m, uint32_t request)
{
    uint64_t number;
    monitor_send(m, request, 0, NULL, 0, NULL, 0);
    CHECK_EQ(monitor_reply(m, request, &number, sizeof number), -1);
    return number;
}

/* Sends one and waits until it is acknowledged; what the server says of it. */
CHECK_UNUSED static uint64_t monitor_do(struct monitor *m, uint32_t request, const void *body,
                                        uint32_t bytes, int fd)
{
    uint64_t said;
    monitor_send(m, request, VREP_VHOST_NEED_REPLY, body, bytes, &fd, fd >= 0 ? 1 : 0);
    CHECK_EQ(monitor_reply(m, request, &said, sizeof said), -1);
    return said;
}

CHECK_UNUSED static void monitor_expect_end(struct monitor *m)
{
    uint8_t byte;
    monitor_wait(m->socket);
    ssize_t n = recv(m->socket, &byte, 1, 0);
    CHECK(n <= 0);
    monitor_hang_up(m);
}

/* ---- from the socket to running queues -------------------------------------------------- */

#define MONITOR_FEATURES                                                                           \
    (UINT64_C(1) << VREP_VIRTIO_VERSION_1 | UINT64_C(1) << VREP_VHOST_F_PROTOCOL_FEATURES |        \
     UINT64_C(1) << VREP_VIRTIO_BLK_FLUSH | UINT64_C(1) << VREP_VIRTIO_RING_INDIRECT)
#define MONITOR_PROTOCOL                                                                           \
    (UINT64_C(1) << VREP_VHOST_P_REPLY_ACK | UINT64_C(1) << VREP_VHOST_P_INFLIGHT_SHMFD |          \
     UINT64_C(1) << VREP_VHOST_P_CONFIG | UINT64_C(1) << VREP_VHOST_P_MQ |                         \
     UINT64_C(1) << VREP_VHOST_P_LOG_SHMFD | UINT64_C(1) << VREP_VHOST_P_BACKEND_REQ |             \
     UINT64_C(1) << VREP_VHOST_P_CONFIGURE_MEM_SLOTS)

CHECK_UNUSED static void monitor_greet(struct monitor *m, uint64_t features)
{
    uint64_t protocol = MONITOR_PROTOCOL;
    CHECK_EQ(features & ~monitor_ask(m, VREP_VHOST_GET_FEATURES), 0);
    CHECK_EQ(protocol & ~monitor_ask(m, VREP_VHOST_GET_PROTOCOL_FEATURES), 0);
    monitor_send(m, VREP_VHOST_SET_PROTOCOL_FEATURES, 0, &protocol, 8, NULL, 0);
    CHECK_EQ(monitor_do(m, VREP_VHOST_SET_OWNER, NULL, 0, -1), 0);
    CHECK_EQ(monitor_do(m, VREP_VHOST_SET_FEATURES, &features, 8, -1), 0);
    m->features = features;
}

CHECK_UNUSED static void monitor_give_memory(struct monitor *m)
{
    struct vrep_vhost_regions regions = {.count = 1};
    regions.region[0] = (struct vrep_vhost_region){GUEST_AT, MEMORY_BYTES, USER_AT, 0};
    CHECK_EQ(monitor_do(m, VREP_VHOST_SET_MEM_TABLE, &regions, 40, m->memory_fd), 0);
}

CHECK_UNUSED static struct vrep_vring_descriptor *monitor_descriptors(struct monitor *m, int q)
{
    return (struct vrep_vring_descriptor *)(void *)(m->memory + (size_t)q * QUEUE_ROOM);
}

CHECK_UNUSED static uint8_t *monitor_available(struct monitor *m, int q)
{
    return m->memory + (size_t)q * QUEUE_ROOM + AVAILABLE_AT;
}

CHECK_UNUSED static uint8_t *monitor_used(struct monitor *m, int q)
{
    return m->memory + (size_t)q * QUEUE_ROOM + USED_AT;
}

CHECK_UNUSED static void monitor_start(struct monitor *m, int q, uint32_t size, uint16_t base)
{
    struct monitor_queue *queue = &m->queue[q];
    uint64_t at = USER_AT + (uint64_t)q * QUEUE_ROOM, number = (uint64_t)q;
    struct vrep_vhost_state state = {(uint32_t)q, size};
    struct vrep_vhost_address address = {.queue = (uint32_t)q,
                                         .descriptors = at,
                                         .available = at + AVAILABLE_AT,
                                         .used = at + USED_AT};
    queue->size = size;
    queue->kick = eventfd(0, EFD_CLOEXEC);
    queue->call = eventfd(0, EFD_CLOEXEC);
    queue->error = eventfd(0, EFD_CLOEXEC);
    CHECK_EQ(monitor_do(m, VREP_VHOST_SET_VRING_NUM, &state, 8, -1), 0);
    state.number = base;
    CHECK_EQ(monitor_do(m, VREP_VHOST_SET_VRING_BASE, &state, 8, -1), 0);
    CHECK_EQ(monitor_do(m, VREP_VHOST_SET_VRING_ADDR, &address, 40, -1), 0);
    CHECK_EQ(monitor_do(m, VREP_VHOST_SET_VRING_CALL, &number, 8, queue->call), 0);
    CHECK_EQ(monitor_do(m, VREP_VHOST_SET_VRING_ERR, &number, 8, queue->error), 0);
    CHECK_EQ(monitor_do(m, VREP_VHOST_SET_VRING_KICK, &number, 8, queue->kick), 0);
    state.number = 1;
    CHECK_EQ(monitor_do(m, VREP_VHOST_SET_VRING_ENABLE, &state, 8, -1), 0);
}

/* ---- the guest's driver -------------------------------------------------------------------- */

/* Sets descriptor `at`; next below zero: the last one. */
CHECK_UNUSED static void guest_descriptor(struct monitor *m, int q, uint16_t at, uint64_t address,
                                          uint32_t bytes, uint16_t flags, int next)
{
    monitor_descriptors(m, q)[at] = (struct vrep_vring_descriptor){
        htole64(address), htole32(bytes),
        htole16((uint16_t)(flags | (next >= 0 ? VREP_VRING_NEXT : 0))),
        htole16((uint16_t)(next >= 0 ? next : 0))};
}

CHECK_UNUSED static void guest_offer(struct monitor *m, int q, uint16_t head)
{
    struct monitor_queue *queue = &m->queue[q];
    uint8_t *ring = monitor_available(m, q);
    vrep_le_store_u16(ring + 4 + 2 * (queue->offered % queue->size), head);
    queue->offered++;
    vrep_store_release_u16((uint16_t *)(void *)(ring + 2), htole16(queue->offered));
}

CHECK_UNUSED static void guest_kick(struct monitor *m, int q)
{
    uint64_t one = 1;
    CHECK_EQ(write(m->queue[q].kick, &one, sizeof one), 8);
}

CHECK_UNUSED static uint16_t guest_used_index(struct monitor *m, int q)
{
    return le16toh(vrep_load_acquire_u16((const uint16_t *)(const void *)(monitor_used(m, q) + 2)));
}

/* Waits for the next used entry: the head, and how many bytes were written. */
CHECK_UNUSED static uint16_t guest_take(struct monitor *m, int q, uint32_t *written)
{
    struct monitor_queue *queue = &m->queue[q];
    for (int waited = 0; guest_used_index(m, q) == queue->seen; waited++) {
        CHECK(waited < WAIT_MS);
        usleep(1000);
    }
    const uint8_t *entry = monitor_used(m, q) + 4 + 8 * (queue->seen % queue->size);
    queue->seen++;
    if (written != NULL)
        *written = vrep_le_load_u32(entry + 4);
    return (uint16_t)vrep_le_load_u32(entry);
}

/* A request of three descriptors from 3 * slot on: header, data, status. Its memory is at DATA_AT
 * + slot * 64 KiB: header, status at 64, data at 4096. Returns where the data are. */
CHECK_UNUSED static uint8_t *guest_request(struct monitor *m, int q, uint16_t slot, uint32_t type,
                                           uint64_t sector, uint32_t bytes)
{
    uint32_t at = DATA_AT + slot * (64u << 10);
    uint16_t first = (uint16_t)(3 * slot);
    bool in = type == VREP_VIRTIO_IN || type == VREP_VIRTIO_GET_ID;
    vrep_le_store_u32(m->memory + at, type);
    vrep_le_store_u32(m->memory + at + 4, 0);
    vrep_le_store_u64(m->memory + at + 8, sector);
    m->memory[at + 64] = 0xff;
    guest_descriptor(m, q, first, GUEST_AT + at, VREP_VIRTIO_HEADER_BYTES, 0,
                     bytes > 0 ? first + 1 : first + 2);
    if (bytes > 0)
        guest_descriptor(m, q, (uint16_t)(first + 1), GUEST_AT + at + 4096, bytes,
                         in ? VREP_VRING_WRITE : 0, first + 2);
    guest_descriptor(m, q, (uint16_t)(first + 2), GUEST_AT + at + 64, 1, VREP_VRING_WRITE, -1);
    return m->memory + at + 4096;
}

CHECK_UNUSED static uint8_t guest_status(struct monitor *m, uint16_t slot)
{
    return m->memory[DATA_AT + slot * (64u << 10) + 64];
}

/* One request from begin to end: its status. */
CHECK_UNUSED static uint8_t guest_run(struct monitor *m, int q, uint16_t slot)
{
    guest_offer(m, q, (uint16_t)(3 * slot));
    guest_kick(m, q);
    CHECK_EQ(guest_take(m, q, NULL), 3 * slot);
    return guest_status(m, slot);
}

#endif
