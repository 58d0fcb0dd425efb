#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/atomic.h"
#include "check.h"
#include "format/checksum.h"
#include "ring/chunks.h"
#include "ring/ring.h"

static char path[64];
static const uint8_t group[16] = {1, 2, 3};

static struct vrep_ring_config config_of(uint32_t descriptors, uint32_t slots, uint64_t bytes)
{
    struct vrep_ring_config config = {.epoch = 3,
                                      .lane = 0,
                                      .descriptors = descriptors,
                                      .slots = slots,
                                      .payload_bytes = bytes,
                                      .first_seq = 100,
                                      .mode = 0640};
    memcpy(config.group_id, group, sizeof group);
    return config;
}

static struct vrep_ring *new_ring(uint32_t descriptors, uint32_t slots, uint64_t bytes)
{
    struct vrep_ring_config config = config_of(descriptors, slots, bytes);
    struct vrep_ring *ring;
    CHECK_OK(vrep_ring_create(path, &config, &ring));
    return ring;
}

static void fill(struct vrep_ring *ring, struct vrep_ring_slot *slot, uint32_t length, uint8_t byte)
{
    struct iovec iov[64];
    int n = vrep_ring_iov(ring, slot, 0, length, iov, 64);
    CHECK(n > 0);
    for (int i = 0; i < n; i++)
        memset(iov[i].iov_base, byte, iov[i].iov_len);
    slot->kind = VREP_KIND_WRITE;
    slot->offset = (uint64_t)byte * 4096;
    slot->length = length;
}

static uint64_t publish(struct vrep_ring *ring, uint32_t length, uint8_t byte)
{
    struct vrep_ring_slot *slot = vrep_ring_reserve(ring, length);
    CHECK(slot != NULL);
    fill(ring, slot, length, byte);
    vrep_ring_grant(ring, slot, 1);
    uint64_t seq = vrep_ring_stage(ring, slot, 5, 6);
    vrep_ring_commit(ring, slot);
    return seq;
}

static void published_changes_are_read_in_order(void)
{
    struct vrep_ring *ring = new_ring(8, 4, 1 << 20);
    struct vrep_ring_reader *reader;
    CHECK_OK(vrep_ring_reader_open(path, -1, -1, -1, &reader));
    CHECK_EQ(vrep_ring_reader_head(reader), 100);
    for (uint8_t i = 1; i <= 3; i++)
        CHECK_EQ(publish(ring, 5000, i), 100u + i);
    CHECK_EQ(vrep_ring_reader_head(reader), 103);
    for (uint8_t i = 1; i <= 3; i++) {
        struct vrep_ring_desc desc;
        struct iovec iov[4];
        int n;
        CHECK_OK(vrep_ring_reader_desc(reader, 100u + i, &desc));
        CHECK_EQ(desc.seq, 100u + i);
        CHECK_EQ(desc.offset, i * 4096u);
        CHECK_EQ(desc.length, 5000);
        CHECK_EQ(desc.wall_ns, 5);
        CHECK_EQ(desc.mono_ns, 6);
        CHECK_EQ(desc.epoch, 3);
        CHECK_OK(vrep_ring_reader_iov(reader, &desc, iov, 4, &n));
        CHECK_EQ(n, 1);
        CHECK_EQ(iov[0].iov_len, 5000);
        CHECK_EQ(((uint8_t *)iov[0].iov_base)[4999], i);
        CHECK(vrep_ring_reader_still(reader, 100u + i));
    }
    struct vrep_ring_desc desc;
    CHECK_STATUS(vrep_ring_reader_desc(reader, 104, &desc), VREP_E_RANGE);
    CHECK_STATUS(vrep_ring_reader_desc(reader, 100, &desc), VREP_E_RANGE);
    CHECK_OK(vrep_ring_release(ring, 102));
    CHECK_STATUS(vrep_ring_reader_desc(reader, 102, &desc), VREP_E_RANGE);
    CHECK(!vrep_ring_reader_still(reader, 102));
    CHECK(vrep_ring_reader_still(reader, 103));
    CHECK_STATUS(vrep_ring_release(ring, 101), VREP_E_INVALID);
    CHECK_STATUS(vrep_ring_release(ring, 104), VREP_E_INVALID);
    CHECK_EQ(vrep_ring_free_bytes(ring), (1u << 20) - 8192);
    CHECK_OK(vrep_ring_release(ring, 103));
    CHECK_EQ(vrep_ring_free_bytes(ring), 1u << 20);
    vrep_ring_reader_close(reader);
    vrep_ring_detach(ring, true);
}

static uint64_t free_of(const struct vrep_ring_reader *reader)
{
    uint64_t bytes = 1;
    CHECK_OK(vrep_ring_reader_free_bytes(reader, &bytes));
    return bytes;
}

static void consumers_see_how_full_it_is(void)
{
    struct vrep_ring *ring = new_ring(8, 4, 8 * 4096);
    struct vrep_ring_reader *reader;
    CHECK_OK(vrep_ring_reader_open(path, -1, -1, -1, &reader));
    CHECK_EQ(free_of(reader), 8 * 4096);
    publish(ring, 5000, 1);
    CHECK_EQ(free_of(reader), 6 * 4096);
    for (uint8_t i = 2; i <= 4; i++)
        publish(ring, 2 * 4096, i);
    CHECK_EQ(free_of(reader), 0); /* which is not "unknown" */
    CHECK_OK(vrep_ring_release(ring, 103));
    CHECK_EQ(free_of(reader), 6 * 4096);
    /* A producer that died leaves reserved memory, which is taken until it is judged. */
    CHECK(vrep_ring_reserve(ring, 4096) != NULL);
    CHECK_EQ(free_of(reader), 6 * 4096);
    vrep_ring_detach(ring, false);
    CHECK_OK(vrep_ring_attach(path, group, &ring));
    CHECK_EQ(free_of(reader), 5 * 4096);
    /* One of an older release says nothing. */
    uint64_t bytes = 7;
    struct vrep_ring_header *header = (struct vrep_ring_header *)vrep_ring_header(ring);
    header->free_bytes_one = 0;
    CHECK_STATUS(vrep_ring_reader_free_bytes(reader, &bytes), VREP_E_UNSUPPORTED);
    CHECK_EQ(bytes, 7);
    vrep_ring_reader_close(reader);
    vrep_ring_detach(ring, true);
}

static void nothing_shows_before_commit(void)
{
    struct vrep_ring *ring = new_ring(8, 4, 1 << 20);
    struct vrep_ring_reader *reader;
    CHECK_OK(vrep_ring_reader_open(path, -1, -1, -1, &reader));
    struct vrep_ring_slot *slot = vrep_ring_reserve(ring, 4096);
    fill(ring, slot, 4096, 7);
    vrep_ring_grant(ring, slot, 1);
    CHECK_EQ(vrep_ring_reader_head(reader), 100);
    CHECK_EQ(vrep_ring_stage(ring, slot, 0, 0), 101);
    CHECK_EQ(slot->seq, 101);
    CHECK_EQ(vrep_ring_reader_head(reader), 100);
    vrep_ring_commit(ring, slot);
    CHECK_EQ(vrep_ring_reader_head(reader), 101);
    CHECK_EQ(slot->state, VREP_SLOT_FREE);
    vrep_ring_reader_close(reader);
    vrep_ring_detach(ring, true);
}

static void a_reserve_takes_all_or_nothing(void)
{
    struct vrep_ring *ring = new_ring(4, 3, 4 * 4096);
    CHECK(vrep_ring_reserve(ring, 5 * 4096) == NULL);
    CHECK_EQ(vrep_ring_free_bytes(ring), 4 * 4096);
    CHECK_EQ(vrep_ring_free_descriptors(ring), 4);
    CHECK(vrep_ring_reserve(ring, UINT64_MAX) == NULL);
    struct vrep_ring_slot *a = vrep_ring_reserve(ring, 3 * 4096), *b = vrep_ring_reserve(ring, 0);
    CHECK(a != NULL && b != NULL);
    CHECK_EQ(b->chunk, VREP_NO_CHUNK);
    CHECK(vrep_ring_half_full(ring));
    struct vrep_ring_slot *c = vrep_ring_reserve_unrecorded(ring);
    CHECK(c != NULL);
    CHECK_EQ(c->state, VREP_SLOT_UNRECORDED);
    CHECK(vrep_ring_reserve(ring, 0) == NULL);
    CHECK(vrep_ring_reserve_unrecorded(ring) == NULL);
    CHECK_EQ(vrep_ring_free_descriptors(ring), 2);
    vrep_ring_drop_payload(ring, a);
    CHECK_EQ(vrep_ring_free_bytes(ring), 4 * 4096);
    vrep_ring_drop_payload(ring, a);
    CHECK_EQ(vrep_ring_free_bytes(ring), 4 * 4096);
    vrep_ring_cancel(ring, c);
    vrep_ring_cancel(ring, a);
    vrep_ring_cancel(ring, b);
    CHECK_EQ(vrep_ring_free_descriptors(ring), 4);
    CHECK(!vrep_ring_half_full(ring));
    vrep_ring_detach(ring, true);
}

static void a_slow_command_does_not_block_others(void)
{
    struct vrep_ring *ring = new_ring(16, 16, 64 * 4096);
    struct vrep_ring_slot *slow = vrep_ring_reserve(ring, 20 * 4096);
    for (int round = 0; round < 200; round++) {
        uint64_t seq = publish(ring, 3 * 4096, (uint8_t)round);
        CHECK_OK(vrep_ring_release(ring, seq));
    }
    fill(ring, slow, 20 * 4096, 9);
    vrep_ring_stage(ring, slow, 0, 0);
    vrep_ring_commit(ring, slow);
    CHECK_EQ(vrep_ring_head(ring), 301);
    CHECK_OK(vrep_ring_release(ring, 301));
    CHECK_EQ(vrep_ring_free_bytes(ring), 64 * 4096);
    vrep_ring_detach(ring, true);
}

static void scattered_chunks_form_one_payload(void)
{
    struct vrep_ring *ring = new_ring(64, 64, 32 * 4096);
    struct vrep_ring_slot *held[32];
    for (int i = 0; i < 32; i++)
        held[i] = vrep_ring_reserve(ring, 1);
    for (int i = 0; i < 32; i += 2)
        vrep_ring_cancel(ring, held[i]);
    struct vrep_ring_slot *slot = vrep_ring_reserve(ring, 16 * 4096);
    CHECK(slot != NULL);
    struct iovec iov[18];
    int n = vrep_ring_iov(ring, slot, 100, 16 * 4096 - 200, iov, 18);
    CHECK_EQ(n, 16);
    size_t total = 0;
    for (int i = 0; i < n; i++)
        total += iov[i].iov_len;
    CHECK_EQ(total, 16 * 4096 - 200);
    CHECK_EQ(vrep_ring_iov(ring, slot, 0, 16 * 4096, iov, 15), -1);
    CHECK_EQ(vrep_ring_iov(ring, slot, 4096, 16 * 4096, iov, 18), -1);
    CHECK_EQ(vrep_ring_iov(ring, slot, 4095, 2, iov, 18), 2);
    vrep_ring_detach(ring, false);
}

static void chunks_agree_with_a_naive_set(void)
{
    enum { COUNT = 5000, ROUNDS = 3000 };
    struct vrep_chunks chunks;
    static uint32_t next[COUNT], first[ROUNDS], length[ROUNDS];
    static uint8_t used[COUNT];
    uint32_t live = 0, free_count = COUNT;
    memset(used, 0, sizeof used);
    CHECK_OK(vrep_chunks_create(COUNT, &chunks));
    for (int round = 0; round < ROUNDS; round++) {
        uint32_t n = 1 + (uint32_t)check_random_below(check_random_below(8) ? 40 : 2000);
        bool joined;
        bool taken = vrep_chunks_take(&chunks, n, next, &first[live], &joined);
        CHECK_EQ(taken, n <= free_count);
        if (taken) {
            uint32_t at = first[live];
            bool consecutive = true;
            for (uint32_t i = 0; i < n; i++, at = next[at]) {
                CHECK(at < COUNT && !used[at]);
                consecutive = consecutive && at == first[live] + i;
                used[at] = 1;
            }
            CHECK_EQ(at, VREP_NO_CHUNK);
            CHECK(!joined || consecutive);
            length[live++] = n;
            free_count -= n;
        }
        while (live > 0 && (!taken || check_random_below(3) == 0)) {
            uint32_t which = (uint32_t)check_random_below(live);
            uint32_t at = first[which];
            for (uint32_t i = 0; i < length[which]; i++, at = next[at])
                used[at] = 0;
            vrep_chunks_give(&chunks, next, first[which], length[which]);
            free_count += length[which];
            first[which] = first[--live];
            length[which] = length[live];
            taken = true;
        }
        CHECK_EQ(chunks.free, free_count);
    }
    vrep_chunks_destroy(&chunks);
}

static void one_producer_at_a_time(void)
{
    struct vrep_ring *ring = new_ring(8, 4, 1 << 16), *second;
    struct vrep_ring_config config = config_of(8, 4, 1 << 16);
    CHECK_STATUS(vrep_ring_attach(path, group, &second), VREP_E_BUSY);
    CHECK_STATUS(vrep_ring_create(path, &config, &second), VREP_E_BUSY);
    struct stat info;
    CHECK_EQ(stat(path, &info), 0);
    CHECK_EQ(info.st_mode & 07777, 0640);
    CHECK_EQ(info.st_blocks * 512, info.st_size);
    vrep_ring_detach(ring, true);
    CHECK_OK(vrep_ring_attach(path, group, &second));
    CHECK(vrep_ring_was_clean(second));
    CHECK_EQ(vrep_ring_judge(second), 0);
    CHECK_EQ(vrep_ring_header(second)->incarnation, 2);
    CHECK(vrep_ring_reserve(second, 1) != NULL);
    vrep_ring_detach(second, true); /* one is in flight: not clean */
    CHECK_OK(vrep_ring_attach(path, group, &second));
    CHECK(!vrep_ring_was_clean(second));
    vrep_ring_detach(second, false);
    uint8_t other[16] = {9};
    CHECK_STATUS(vrep_ring_attach(path, other, &second), VREP_E_INVALID);
}

static void restart_judges_by_head(void)
{
    struct vrep_ring *ring = new_ring(8, 8, 16 * 4096);
    publish(ring, 4096, 1);
    struct vrep_ring_slot *granted = vrep_ring_reserve(ring, 8192);
    fill(ring, granted, 8192, 2);
    vrep_ring_grant(ring, granted, 1);
    vrep_ring_stage(ring, granted, 0, 0); /* seq stored, head not advanced */
    struct vrep_ring_slot *never = vrep_ring_reserve(ring, 4096);
    CHECK(never != NULL);
    struct vrep_ring_slot *unrecorded = vrep_ring_reserve_unrecorded(ring);
    CHECK(unrecorded != NULL);
    vrep_ring_grant(ring, unrecorded, 1);
    struct vrep_ring_slot *done = vrep_ring_reserve(ring, 4096);
    vrep_ring_grant(ring, done, 1);
    uint32_t index = vrep_ring_slot_index(ring, granted);
    /* As if killed between the two stores of a commit. */
    done->seq = 101;
    done->chunk = VREP_NO_CHUNK;
    vrep_ring_detach(ring, false);
    CHECK_OK(vrep_ring_attach(path, group, &ring));
    CHECK(vrep_ring_reserve(ring, 1) == NULL);
    CHECK_EQ(vrep_ring_judge(ring), 2);
    CHECK_EQ(vrep_ring_free_bytes(ring), (16 - 1 - 2) * 4096);
    CHECK_EQ(vrep_ring_free_descriptors(ring), 8 - 1 - 1);
    struct vrep_ring_slot *slot = vrep_ring_slot_at(ring, index);
    CHECK_EQ(slot->state, VREP_SLOT_GRANTED);
    CHECK_EQ(slot->seq, 0);
    CHECK_EQ(slot->length, 8192);
    struct iovec iov[4];
    CHECK_EQ(vrep_ring_iov(ring, slot, 0, 8192, iov, 4), 1);
    CHECK_EQ(((uint8_t *)iov[0].iov_base)[0], 2);
    CHECK_EQ(vrep_ring_stage(ring, slot, 0, 0), 102);
    vrep_ring_commit(ring, slot);
    CHECK_OK(vrep_ring_release(ring, 102));
    CHECK_EQ(vrep_ring_free_bytes(ring), 16 * 4096);
    vrep_ring_detach(ring, false);
}

static struct vrep_ring_control *consumer_side(const struct vrep_ring_consumer *consumer)
{
    void *at = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, consumer->control_fd, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

static void forged_values_are_refused(void)
{
    struct vrep_ring *ring = new_ring(8, 4, 1 << 20);
    struct vrep_ring_consumer consumer;
    CHECK_OK(vrep_ring_consumer_create(VREP_CONTROL_TARGET, NULL, 100, 100, &consumer));
    struct vrep_ring_control *control = consumer_side(&consumer);
    for (uint8_t i = 0; i < 5; i++)
        publish(ring, 4096, i);
    control->durable = 103;
    control->received = 104;
    control->read = 105;
    CHECK_OK(vrep_ring_consumer_poll(ring, &consumer));
    CHECK_EQ(consumer.durable, 103);
    CHECK_EQ(consumer.received, 104);
    CHECK_EQ(consumer.read, 105);
    control->durable = 106; /* above head */
    CHECK_STATUS(vrep_ring_consumer_poll(ring, &consumer), VREP_E_INVALID);
    control->durable = 102; /* backwards */
    control->read = 105;
    CHECK_STATUS(vrep_ring_consumer_poll(ring, &consumer), VREP_E_INVALID);
    control->durable = 104;
    control->received = UINT64_MAX;
    CHECK_STATUS(vrep_ring_consumer_poll(ring, &consumer), VREP_E_INVALID);
    CHECK_EQ(consumer.durable, 103);
    control->received = 104;
    control->read = 0;
    CHECK_STATUS(vrep_ring_consumer_poll(ring, &consumer), VREP_E_INVALID);
    control->read = 105;
    control->spilled = 106;
    CHECK_STATUS(vrep_ring_consumer_poll(ring, &consumer), VREP_E_INVALID);
    control->spilled = 99;
    CHECK_STATUS(vrep_ring_consumer_poll(ring, &consumer), VREP_E_INVALID);
    CHECK_EQ(consumer.durable, 103);
    CHECK_EQ(consumer.spilled, 100);
    CHECK(ftruncate(consumer.control_fd, 0) != 0);
    CHECK(ftruncate(consumer.control_fd, 8192) != 0);
    munmap(control, 4096);
    vrep_ring_consumer_close(&consumer);
    vrep_ring_detach(ring, true);
}

/* Invariant 12: whatever a consumer does to what it was given, the filter never waits. */
static void a_hostile_consumer_cannot_block_the_filter(void)
{
    struct vrep_ring *ring = new_ring(8, 4, 1 << 20);
    struct vrep_ring_consumer consumer;
    CHECK_OK(vrep_ring_consumer_create(VREP_CONTROL_OBSERVER, NULL, 100, 100, &consumer));
    struct vrep_ring_control *control = consumer_side(&consumer);
    CHECK_EQ(fcntl(consumer.peer_fd, F_SETFL, 0), 0); /* blocking, and never read */
    alarm(20);
    for (uint32_t i = 1; i < 100000; i++) {
        control->waiting = i;
        vrep_ring_consumer_notify(ring, &consumer);
    }
    close(consumer.peer_fd);
    consumer.peer_fd = -1;
    control->waiting = 1; /* and no SIGPIPE when it is gone */
    vrep_ring_consumer_notify(ring, &consumer);
    alarm(0);
    munmap(control, 4096);
    vrep_ring_consumer_close(&consumer);
    vrep_ring_detach(ring, true);
}

static void a_reader_outlives_the_producer_without_spinning(void)
{
    struct vrep_ring *ring = new_ring(8, 4, 1 << 20);
    struct vrep_ring_consumer consumer;
    struct vrep_ring_reader *reader;
    struct timespec before, after;
    CHECK_OK(vrep_ring_consumer_create(VREP_CONTROL_OBSERVER, NULL, 100, 100, &consumer));
    CHECK_OK(vrep_ring_reader_open(path, consumer.control_fd, consumer.peer_fd, consumer.space_fd,
                                   &reader));
    vrep_ring_consumer_close(&consumer);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
    CHECK_STATUS(vrep_ring_reader_wait(reader, 100, 300), VREP_E_AGAIN);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
    int64_t spent_ns =
        (after.tv_sec - before.tv_sec) * 1000000000ll + after.tv_nsec - before.tv_nsec;
    CHECK(spent_ns < 200000000);
    vrep_ring_reader_close(reader);
    vrep_ring_detach(ring, true);
}

static void a_waiting_consumer_is_signalled_once(void)
{
    struct vrep_ring *ring = new_ring(8, 4, 1 << 20);
    struct vrep_ring_consumer consumer;
    struct vrep_ring_reader *reader;
    CHECK_OK(vrep_ring_consumer_create(VREP_CONTROL_TARGET, NULL, 100, 100, &consumer));
    CHECK_OK(vrep_ring_reader_open(path, consumer.control_fd, consumer.peer_fd, consumer.space_fd,
                                   &reader));
    struct vrep_ring_control *control = consumer_side(&consumer);
    uint64_t count;
    publish(ring, 4096, 1);
    vrep_ring_consumer_notify(ring, &consumer);
    CHECK(read(consumer.peer_fd, &count, sizeof count) < 0); /* nobody waits */
    control->waiting = 1;
    vrep_ring_consumer_notify(ring, &consumer);
    vrep_ring_consumer_notify(ring, &consumer);
    CHECK_EQ(read(consumer.peer_fd, &count, sizeof count), 8);
    CHECK_EQ(count, 1);
    control->waiting = 2;
    vrep_ring_consumer_notify(ring, &consumer);
    CHECK_EQ(read(consumer.peer_fd, &count, sizeof count), 8);
    CHECK_OK(vrep_ring_reader_wait(reader, 100, 0));
    CHECK_STATUS(vrep_ring_reader_wait(reader, 101, 1), VREP_E_AGAIN);
    CHECK_EQ(control->waiting, 0);
    vrep_ring_reader_set(reader, 101, 101, 101, 0);
    CHECK_EQ(read(consumer.space_fd, &count, sizeof count), 8);
    CHECK_OK(vrep_ring_consumer_poll(ring, &consumer));
    CHECK_EQ(consumer.durable, 101);
    vrep_ring_reader_set(reader, 100, 100, 100, 0); /* never backwards */
    CHECK(read(consumer.space_fd, &count, sizeof count) < 0);
    CHECK_OK(vrep_ring_consumer_poll(ring, &consumer));
    munmap(control, 4096);
    vrep_ring_reader_close(reader);
    vrep_ring_consumer_close(&consumer);
    vrep_ring_detach(ring, true);
}

static void rewrite(const void *bytes, size_t size, off_t at)
{
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0);
    CHECK_EQ(pwrite(fd, bytes, size, at), size);
    close(fd);
}

static void read_header(struct vrep_ring_header *header)
{
    int fd = open(path, O_RDONLY);
    CHECK_EQ(pread(fd, header, sizeof *header, 0), sizeof *header);
    close(fd);
}

static void sign(struct vrep_ring_header *header)
{
    header->checksum = vrep_checksum32(header, offsetof(struct vrep_ring_header, checksum));
    rewrite(header, sizeof *header, 0);
}

static void attach_and_open_give(int attach, int open_status)
{
    struct vrep_ring *ring;
    struct vrep_ring_reader *reader;
    CHECK_STATUS(vrep_ring_attach(path, group, &ring), attach);
    CHECK_STATUS(vrep_ring_reader_open(path, -1, -1, -1, &reader), open_status);
}

static void damaged_files_are_refused(void)
{
    struct vrep_ring *ring = new_ring(8, 4, 1 << 16);
    publish(ring, 4096, 1);
    publish(ring, 4096, 2);
    struct vrep_ring_slot *slot = vrep_ring_reserve(ring, 4096);
    vrep_ring_grant(ring, slot, 0);
    vrep_ring_detach(ring, false);
    struct vrep_ring_header good, bad;
    read_header(&good);

    bad = good;
    bad.boot_id[0] ^= 1;
    sign(&bad);
    attach_and_open_give(VREP_E_GONE, VREP_E_GONE);
    bad = good;
    bad.version++;
    sign(&bad);
    attach_and_open_give(VREP_E_VERSION, VREP_E_VERSION);
    bad = good;
    bad.magic ^= 1;
    sign(&bad);
    attach_and_open_give(VREP_E_CORRUPT, VREP_E_CORRUPT);
    bad = good;
    bad.chunks_at ^= 64;
    rewrite(&bad, sizeof bad, 0); /* not signed */
    attach_and_open_give(VREP_E_CORRUPT, VREP_E_CORRUPT);
    for (int i = 0; i < 8; i++) {
        bad = good;
        uint64_t *fields[] = {&bad.slots_at, &bad.descs_at, &bad.next_at, &bad.chunks_at};
        *fields[i / 2] = i % 2 ? bad.file_bytes : UINT64_MAX - 63;
        sign(&bad);
        attach_and_open_give(VREP_E_CORRUPT, VREP_E_CORRUPT);
    }
    bad = good;
    bad.chunks = 1u << 31;
    sign(&bad);
    attach_and_open_give(VREP_E_CORRUPT, VREP_E_CORRUPT);
    bad = good;
    bad.descriptors = 7;
    sign(&bad);
    attach_and_open_give(VREP_E_CORRUPT, VREP_E_CORRUPT);
    bad = good;
    bad.released = bad.head + 1;
    rewrite(&bad, sizeof bad, 0);
    CHECK_STATUS(vrep_ring_attach(path, group, &ring), VREP_E_CORRUPT);
    bad = good;
    bad.head += 1; /* nothing is published there */
    rewrite(&bad, sizeof bad, 0);
    CHECK_STATUS(vrep_ring_attach(path, group, &ring), VREP_E_CORRUPT);
    bad = good;
    bad.head += UINT32_MAX;
    rewrite(&bad, sizeof bad, 0);
    CHECK_STATUS(vrep_ring_attach(path, group, &ring), VREP_E_CORRUPT);
    rewrite(&good, sizeof good, 0);

    struct vrep_ring_desc desc;
    int fd = open(path, O_RDWR);
    off_t at = (off_t)(good.descs_at + (101 % 8) * sizeof desc);
    CHECK_EQ(pread(fd, &desc, sizeof desc, at), sizeof desc);
    uint32_t chunk = desc.chunk;
    desc.chunk = 1u << 30;
    rewrite(&desc, sizeof desc, at);
    CHECK_STATUS(vrep_ring_attach(path, group, &ring), VREP_E_CORRUPT);
    struct vrep_ring_reader *reader;
    CHECK_OK(vrep_ring_reader_open(path, -1, -1, -1, &reader));
    struct vrep_ring_desc seen;
    struct iovec iov[4];
    int n;
    CHECK_OK(vrep_ring_reader_desc(reader, 101, &seen));
    CHECK_STATUS(vrep_ring_reader_iov(reader, &seen, iov, 4, &n), VREP_E_CORRUPT);
    desc.chunk = chunk;
    desc.chunks = 1000; /* longer than its chain */
    rewrite(&desc, sizeof desc, at);
    CHECK_STATUS(vrep_ring_attach(path, group, &ring), VREP_E_CORRUPT);
    desc.chunks = 1;
    desc.length = 4097; /* longer than its chunks */
    rewrite(&desc, sizeof desc, at);
    CHECK_OK(vrep_ring_reader_desc(reader, 101, &seen));
    CHECK_STATUS(vrep_ring_reader_iov(reader, &seen, iov, 4, &n), VREP_E_CORRUPT);
    desc.length = 4096;
    desc.chunk = chunk + 1; /* the other descriptor's */
    rewrite(&desc, sizeof desc, at);
    CHECK_STATUS(vrep_ring_attach(path, group, &ring), VREP_E_CORRUPT);
    desc.chunk = chunk;
    rewrite(&desc, sizeof desc, at);
    CHECK_OK(vrep_ring_attach(path, group, &ring));
    CHECK_EQ(vrep_ring_judge(ring), 1);
    vrep_ring_detach(ring, false);
    vrep_ring_reader_close(reader);
    close(fd);

    for (off_t size = (off_t)good.file_bytes - 1; size > 0; size /= 3) {
        CHECK_EQ(truncate(path, size), 0);
        attach_and_open_give(VREP_E_CORRUPT, VREP_E_CORRUPT);
    }
    unlink(path);
    attach_and_open_give(VREP_E_NOT_FOUND, VREP_E_NOT_FOUND);
    CHECK_EQ(mkdir(path, 0700), 0);
    CHECK(vrep_ring_attach(path, group, &ring) != VREP_OK);
    CHECK(vrep_ring_reader_open(path, -1, -1, -1, &reader) != VREP_OK);
    CHECK_EQ(rmdir(path), 0);
}

static void impossible_shapes_are_refused(void)
{
    struct vrep_ring *ring;
    struct {
        uint32_t descriptors, slots;
        uint64_t bytes;
    } shapes[] = {{0, 1, 4096},     {6, 1, 4096}, {1u << 21, 1, 4096},      {8, 0, 4096},
                  {8, 65536, 4096}, {8, 1, 0},    {8, 1, (1ull << 36) + 1}, {8, 1, UINT64_MAX}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        struct vrep_ring_config config =
            config_of(shapes[i].descriptors, shapes[i].slots, shapes[i].bytes);
        CHECK_STATUS(vrep_ring_create(path, &config, &ring), VREP_E_INVALID);
    }
    struct vrep_ring_config config = config_of(8, 4, 4096);
    CHECK_STATUS(vrep_ring_create("/nonexistent-directory/ring", &config, &ring), VREP_E_NOT_FOUND);
}

/* The child publishes, releases and cancels as fast as it can until it dies. */
_Noreturn static void churn(uint64_t seed)
{
    struct vrep_ring *ring;
    struct vrep_ring_slot *held[6] = {NULL};
    if (vrep_ring_attach(path, group, &ring) != VREP_OK)
        _exit(1);
    (void)vrep_ring_judge(ring);
    for (uint32_t i = 0; i < vrep_ring_slots(ring); i++)
        if (vrep_ring_slot_at(ring, i)->state != VREP_SLOT_FREE)
            vrep_ring_cancel(ring, vrep_ring_slot_at(ring, i));
    check_seed(seed);
    for (;;) {
        struct vrep_ring_slot **slot = &held[check_random_below(6)];
        if (*slot == NULL) {
            uint32_t length = 1 + (uint32_t)check_random_below(40000);
            *slot = vrep_ring_reserve(ring, length);
            if (*slot == NULL) {
                (void)vrep_ring_release(
                    ring, vrep_ring_released(ring) +
                              (vrep_ring_head(ring) - vrep_ring_released(ring) + 1) / 2);
                continue;
            }
            fill(ring, *slot, length, (uint8_t)check_random());
            vrep_ring_grant(ring, *slot, 1);
        } else if (check_random_below(8) == 0) {
            vrep_ring_cancel(ring, *slot);
            *slot = NULL;
        } else {
            vrep_ring_stage(ring, *slot, 0, 0);
            vrep_ring_commit(ring, *slot);
            *slot = NULL;
        }
    }
}

static uint64_t count_whole_payloads(const struct vrep_ring *ring)
{
    struct vrep_ring_reader *reader;
    uint64_t chunks = 0;
    CHECK_OK(vrep_ring_reader_open(path, -1, -1, -1, &reader));
    CHECK_EQ(vrep_ring_reader_head(reader), vrep_ring_head(ring));
    for (uint64_t seq = vrep_ring_released(ring) + 1; seq <= vrep_ring_head(ring); seq++) {
        struct vrep_ring_desc desc;
        struct iovec iov[16];
        int n;
        CHECK_OK(vrep_ring_reader_desc(reader, seq, &desc));
        CHECK_OK(vrep_ring_reader_iov(reader, &desc, iov, 16, &n));
        chunks += desc.chunks;
        for (int i = 0; i < n; i++)
            for (size_t b = 0; b < iov[i].iov_len; b += 97)
                CHECK_EQ(((uint8_t *)iov[i].iov_base)[b], desc.offset / 4096);
    }
    vrep_ring_reader_close(reader);
    return chunks;
}

static void a_killed_producer_leaves_whole_records(void)
{
    struct vrep_ring *ring = new_ring(32, 8, 64 * 4096);
    vrep_ring_detach(ring, false);
    uint64_t head = 0;
    time_t until = time(NULL) + 60;
    /* 60 times, and until they got something done: on a busy machine most die before their turn. */
    for (int round = 0; round < 60 || (head <= 1000 && time(NULL) < until); round++) {
        uint64_t seed = check_random() | 1;
        pid_t child = fork();
        if (child == 0)
            churn(seed);
        usleep((useconds_t)(500 + check_random_below(4000)));
        CHECK_EQ(kill(child, 9), 0);
        int status;
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK(WIFSIGNALED(status));
        CHECK_OK(vrep_ring_attach(path, group, &ring));
        uint64_t chunks = count_whole_payloads(ring);
        uint32_t remaining = vrep_ring_judge(ring), found = 0;
        for (uint32_t i = 0; i < vrep_ring_slots(ring); i++) {
            struct vrep_ring_slot *slot = vrep_ring_slot_at(ring, i);
            found += slot->state != VREP_SLOT_FREE;
            if (slot->state == VREP_SLOT_GRANTED) {
                struct iovec iov[16];
                CHECK(vrep_ring_iov(ring, slot, 0, slot->length, iov, 16) > 0);
                CHECK_EQ(*(uint8_t *)iov[0].iov_base, slot->offset / 4096);
                chunks += slot->chunks;
            }
        }
        CHECK_EQ(found, remaining);
        CHECK_EQ(vrep_ring_free_bytes(ring), (64 - chunks) * 4096);
        head = vrep_ring_head(ring);
        vrep_ring_detach(ring, false);
    }
    CHECK(head > 1000);
}

int main(void)
{
    (void)snprintf(path, sizeof path, "/dev/shm/vrep-test-ring-%d", (int)getpid());
    RUN(published_changes_are_read_in_order);
    RUN(consumers_see_how_full_it_is);
    RUN(nothing_shows_before_commit);
    RUN(a_reserve_takes_all_or_nothing);
    RUN(a_slow_command_does_not_block_others);
    RUN(scattered_chunks_form_one_payload);
    RUN(chunks_agree_with_a_naive_set);
    RUN(one_producer_at_a_time);
    RUN(restart_judges_by_head);
    RUN(forged_values_are_refused);
    RUN(a_waiting_consumer_is_signalled_once);
    RUN(a_hostile_consumer_cannot_block_the_filter);
    RUN(a_reader_outlives_the_producer_without_spinning);
    RUN(damaged_files_are_refused);
    RUN(impossible_shapes_are_refused);
    RUN(a_killed_producer_leaves_whole_records);
    unlink(path);
    return check_report();
}
