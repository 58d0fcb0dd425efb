/* A guest's load over vhost-user-blk, without a guest: for any server of it. One queue, whole
 * blocks at random places, as many in flight as asked for; it kicks once for all that it offers at
 * a time, and waits for interrupts, as a driver does. Prints one JSON object: requests a second,
 * percentiles of their time in microseconds, and its own CPU time for each. usage: vhost_load
 * SOCKET BYTES write|read BLOCK DEPTH SECONDS
 *
 * gcc -O2 -Isrc/_native -Itests/native bench/peers/vhost_load.c -o build/vhost_load */
#define _GNU_SOURCE
#include "vhost_monitor.h"

#include <sys/resource.h>

#define SIZE 256u /* of the queue */
#define DEPTH_MAX 64u
#define BUCKETS 4096
#define BUCKET_NS 1000 /* the last ones grow: see bucket() */

static struct monitor m;
static uint64_t counts[BUCKETS], started[DEPTH_MAX], done;

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* 1 us each up to 2 ms, then 100 us each. */
static uint32_t bucket(uint64_t ns)
{
    uint64_t us = ns / BUCKET_NS, at = us < 2048 ? us : 2048 + (us - 2048) / 100;
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

/* Features that both have: servers differ in what they offer of the protocol. */
static void greet(void)
{
    uint64_t features =
        UINT64_C(1) << VREP_VIRTIO_VERSION_1 | UINT64_C(1) << VREP_VIRTIO_BLK_FLUSH |
        UINT64_C(1) << VREP_VIRTIO_RING_EVENT_IDX | UINT64_C(1) << VREP_VHOST_F_PROTOCOL_FEATURES;
    uint64_t protocol = UINT64_C(1) << VREP_VHOST_P_REPLY_ACK | UINT64_C(1) << VREP_VHOST_P_MQ |
                        UINT64_C(1) << VREP_VHOST_P_CONFIG;
    features &= monitor_ask(&m, VREP_VHOST_GET_FEATURES);
    protocol &= monitor_ask(&m, VREP_VHOST_GET_PROTOCOL_FEATURES);
    CHECK(protocol & UINT64_C(1) << VREP_VHOST_P_REPLY_ACK);
    monitor_send(&m, VREP_VHOST_SET_PROTOCOL_FEATURES, 0, &protocol, 8, NULL, 0);
    CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_OWNER, NULL, 0, -1), 0);
    CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_FEATURES, &features, 8, -1), 0);
    m.features = features;
}

static bool wants_kick(uint16_t before)
{
    vrep_fence_full();
    if (!(m.features >> VREP_VIRTIO_RING_EVENT_IDX & 1))
        return (vrep_le_load_u16(monitor_used(&m, 0)) & 1) == 0;
    uint16_t event = vrep_le_load_u16(monitor_used(&m, 0) + 4 + 8 * SIZE);
    return (uint16_t)(m.queue[0].offered - event - 1) < (uint16_t)(m.queue[0].offered - before);
}

/* Slots are of 64 KiB: how many a request needs. */
static uint32_t stride(uint32_t bytes)
{
    return (4096 + bytes + (64u << 10) - 1) / (64u << 10);
}

static void offer(uint16_t slot, bool write, uint64_t blocks, uint32_t bytes)
{
    static uint64_t seed = 88172645463325252u;
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    uint64_t sector = seed % blocks * (bytes / 512);
    uint8_t *data = m.memory + DATA_AT + slot * (64u << 10) + 4096;
    vrep_le_store_u64(m.memory + DATA_AT + slot * (64u << 10) + 8, sector);
    if (write)
        memcpy(data, &seed, sizeof seed);
    started[slot] = now_ns();
    guest_offer(&m, 0, (uint16_t)(3 * slot));
}

int main(int argc, char **argv)
{
    CHECK(argc == 7);
    uint64_t blocks = strtoull(argv[2], NULL, 0), last_ns;
    bool write = strcmp(argv[3], "write") == 0;
    uint32_t bytes = (uint32_t)strtoul(argv[4], NULL, 0),
             depth = (uint32_t)strtoul(argv[5], NULL, 0);
    CHECK(bytes % 512 == 0 && bytes <= 1u << 20 && depth > 0);
    uint32_t step = stride(bytes);
    CHECK(depth <= DEPTH_MAX && depth * step <= DEPTH_MAX);
    blocks /= bytes;
    monitor_create(&m);
    monitor_connect(&m, argv[1]);
    greet();
    monitor_give_memory(&m);
    monitor_start(&m, 0, SIZE, 0);
    for (uint16_t slot = 0; slot < depth * step; slot = (uint16_t)(slot + step)) {
        uint8_t *data =
            guest_request(&m, 0, slot, write ? VREP_VIRTIO_OUT : VREP_VIRTIO_IN, 0, bytes);
        for (uint32_t i = 0; i < bytes; i++)
            data[i] = (uint8_t)check_random();
    }
    uint64_t begin_ns = last_ns = now_ns();
    uint64_t end_ns = begin_ns + (uint64_t)(strtod(argv[6], NULL) * 1e9);
    uint32_t inflight = 0;
    uint16_t before = 0;
    for (; inflight < depth; inflight++)
        offer((uint16_t)(inflight * step), write, blocks, bytes);
    if (wants_kick(before))
        guest_kick(&m, 0);
    while (inflight > 0) {
        uint16_t seen = m.queue[0].seen;
        before = m.queue[0].offered;
        while (guest_used_index(&m, 0) != m.queue[0].seen) {
            uint16_t slot = (uint16_t)(guest_take(&m, 0, NULL) / 3);
            CHECK_EQ(guest_status(&m, slot), VREP_VIRTIO_OK);
            last_ns = now_ns();
            counts[bucket(last_ns - started[slot])]++;
            done++;
            inflight--;
            if (last_ns < end_ns) {
                offer(slot, write, blocks, bytes);
                inflight++;
            }
        }
        if (m.queue[0].offered != before && wants_kick(before))
            guest_kick(&m, 0);
        if (m.queue[0].seen != seen)
            continue;
        /* "Interrupt me at the next one", one more look, then wait. */
        vrep_le_store_u16(monitor_available(&m, 0) + 4 + 2 * SIZE, m.queue[0].seen);
        vrep_fence_full();
        if (guest_used_index(&m, 0) == m.queue[0].seen) {
            uint64_t count;
            monitor_wait(m.queue[0].call);
            CHECK_EQ(read(m.queue[0].call, &count, sizeof count), 8);
        }
    }
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu_us = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1e6 +
                    (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    printf("{\"iops\": %.1f, \"p50\": %.1f, \"p99\": %.1f, \"cpu_us\": %.2f}\n",
           (double)done / ((double)(last_ns - begin_ns) / 1e9), percentile(0.5), percentile(0.99),
           cpu_us / (double)done);
    monitor_destroy(&m);
    return 0;
}
