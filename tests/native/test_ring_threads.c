#include <pthread.h>
#include <unistd.h>

#include "check.h"
#include "ring/ring.h"

/* Producer and consumer in one process over one mapping, so that the thread sanitizer sees both:
 * payloads and links are plain memory, ordered only by head, released and the control file. */

enum { RECORDS = 20000, PAYLOAD_MAX = 9000 };

static char path[64];

struct pair {
    struct vrep_ring *ring;
    struct vrep_ring_consumer consumer;
    struct vrep_ring_reader *reader;
};

static uint32_t length_of(uint64_t seq)
{
    return (uint32_t)(seq * UINT64_C(2654435761) % PAYLOAD_MAX) + 1;
}

static void *consume(void *argument)
{
    struct pair *pair = argument;
    uint64_t seq = 0;
    while (seq < RECORDS) {
        int status = vrep_ring_reader_wait(pair->reader, seq, 10000);
        CHECK_OK(status);
        uint64_t head = vrep_ring_reader_head(pair->reader);
        for (; seq < head; seq++) {
            struct vrep_ring_desc desc;
            struct iovec iov[8];
            int n;
            CHECK_OK(vrep_ring_reader_desc(pair->reader, seq + 1, &desc));
            CHECK_EQ(desc.length, length_of(seq + 1));
            CHECK_OK(vrep_ring_reader_iov(pair->reader, &desc, iov, 8, &n));
            for (int i = 0; i < n; i++)
                for (size_t at = 0; at < iov[i].iov_len; at += 61)
                    CHECK_EQ(((uint8_t *)iov[i].iov_base)[at], (uint8_t)(seq + 1));
            if (seq % 16 == 0)
                vrep_ring_reader_set(pair->reader, seq + 1, seq + 1, seq + 1, 0);
        }
        vrep_ring_reader_set(pair->reader, seq, seq, seq, 0);
    }
    return NULL;
}

static struct vrep_ring_slot *reserve(struct pair *pair, uint32_t length)
{
    for (;;) {
        struct vrep_ring_slot *slot = vrep_ring_reserve(pair->ring, length);
        if (slot != NULL)
            return slot;
        vrep_ring_consumer_notify(pair->ring, &pair->consumer);
        CHECK_OK(vrep_ring_consumer_poll(pair->ring, &pair->consumer));
        CHECK_OK(vrep_ring_release(pair->ring, pair->consumer.durable));
        usleep(0);
    }
}

static void a_consumer_sees_every_record_whole(void)
{
    struct vrep_ring_config config = {
        .descriptors = 64, .slots = 8, .payload_bytes = 128 * 4096, .mode = 0600};
    struct pair pair;
    pthread_t thread;
    CHECK_OK(vrep_ring_create(path, &config, &pair.ring));
    CHECK_OK(vrep_ring_consumer_create(VREP_CONTROL_TARGET, NULL, 0, 0, &pair.consumer));
    CHECK_OK(vrep_ring_reader_within(pair.ring, &pair.consumer, &pair.reader));
    CHECK_EQ(pthread_create(&thread, NULL, consume, &pair), 0);
    for (uint64_t seq = 1; seq <= RECORDS; seq++) {
        uint32_t length = length_of(seq);
        struct vrep_ring_slot *slot = reserve(&pair, length);
        struct iovec iov[8];
        int n = vrep_ring_iov(pair.ring, slot, 0, length, iov, 8);
        CHECK(n > 0);
        for (int i = 0; i < n; i++)
            memset(iov[i].iov_base, (int)(seq & 0xff), iov[i].iov_len);
        slot->kind = VREP_KIND_WRITE;
        slot->length = length;
        CHECK_EQ(vrep_ring_stage(pair.ring, slot, 0, 0), seq);
        vrep_ring_commit(pair.ring, slot);
        if (seq % 8 == 0)
            vrep_ring_consumer_notify(pair.ring, &pair.consumer);
    }
    vrep_ring_consumer_notify(pair.ring, &pair.consumer);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_OK(vrep_ring_consumer_poll(pair.ring, &pair.consumer));
    CHECK_EQ(pair.consumer.durable, RECORDS);
    CHECK_OK(vrep_ring_release(pair.ring, RECORDS));
    CHECK_EQ(vrep_ring_free_bytes(pair.ring), vrep_ring_payload_bytes(pair.ring));
    vrep_ring_reader_close(pair.reader);
    vrep_ring_consumer_close(&pair.consumer);
    vrep_ring_detach(pair.ring, true);
}

int main(void)
{
    (void)snprintf(path, sizeof path, "/dev/shm/vrep-test-ring-threads-%d", (int)getpid());
    RUN(a_consumer_sees_every_record_whole);
    unlink(path);
    return check_report();
}
