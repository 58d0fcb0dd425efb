/* The vhost-user server: requests, bad bytes, and what outlives a connection. */
#include "vhost_rig.h"

static void wait_held(uint32_t count)
{
    for (int i = 0; vrep_load_acquire_u32(&group->held) != count; i++) {
        CHECK(i < WAIT_MS);
        usleep(1000);
    }
}

/* ---- what a guest does -------------------------------------------------------------- */

static void what_is_written_is_read(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    uint8_t *data = guest_request(&m, 0, 0, VREP_VIRTIO_OUT, 8, 8192);
    for (int i = 0; i < 8192; i++)
        data[i] = (uint8_t)(i * 7);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_OK);
    CHECK_EQ(vrep_load_acquire_u32(&group->flags_seen), 0);
    uint8_t *back = guest_request(&m, 0, 1, VREP_VIRTIO_IN, 9, 4096);
    guest_offer(&m, 0, 3);
    guest_kick(&m, 0);
    uint32_t written;
    CHECK_EQ(guest_take(&m, 0, &written), 3);
    CHECK_EQ(written, 4097);
    CHECK_EQ(guest_status(&m, 1), VREP_VIRTIO_OK);
    CHECK_EQ(memcmp(back, data + 512, 4096), 0);
    (void)guest_request(&m, 0, 2, VREP_VIRTIO_FLUSH, 0, 0);
    CHECK_EQ(guest_run(&m, 0, 2), VREP_VIRTIO_OK);
    uint8_t *id = guest_request(&m, 0, 3, VREP_VIRTIO_GET_ID, 0, VREP_VIRTIO_ID_BYTES);
    CHECK_EQ(guest_run(&m, 0, 3), VREP_VIRTIO_OK);
    CHECK_EQ(memcmp(id, "root", 5), 0);
    CHECK_EQ(stats().traffic.written_bytes, 8192);
    CHECK_EQ(stats().traffic.read_bytes, 4096);
    end();
}

/* A guest may write again into a buffer that is under way (direct I/O, a dirty page): what the disk
 * and the record get is one content, that of when the request was taken. */
static void a_buffer_that_changes_under_way_is_one_write(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    double_hold(group, true);
    uint8_t *data = guest_request(&m, 0, 0, VREP_VIRTIO_OUT, 8, 8192);
    memset(data, 0x11, 8192);
    guest_offer(&m, 0, 0);
    guest_kick(&m, 0);
    wait_held(1);
    memset(data, 0x22, 8192);
    double_hold(group, false);
    CHECK_EQ(guest_take(&m, 0, NULL), 0);
    CHECK_EQ(guest_status(&m, 0), VREP_VIRTIO_OK);
    uint8_t *back = guest_request(&m, 0, 1, VREP_VIRTIO_IN, 8, 8192);
    CHECK_EQ(guest_run(&m, 0, 1), VREP_VIRTIO_OK);
    for (int i = 0; i < 8192; i++)
        CHECK_EQ(back[i], 0x11);
    end();
}

static void zeroes_and_discard(void)
{
    static const uint32_t types[] = {VREP_VIRTIO_WRITE_ZEROES, VREP_VIRTIO_DISCARD};
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    for (uint16_t i = 0; i < 2; i++) {
        memset(guest_request(&m, 0, 0, VREP_VIRTIO_OUT, 64, 4096), 0xaa, 4096);
        CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_OK);
        struct vrep_virtio_range range = {htole64(64), htole32(8), 0};
        memcpy(guest_request(&m, 0, 1, types[i], 0, sizeof range), &range, sizeof range);
        CHECK_EQ(guest_run(&m, 0, 1), VREP_VIRTIO_OK);
        uint8_t *back = guest_request(&m, 0, 2, VREP_VIRTIO_IN, 64, 4096);
        memset(back, 1, 4096);
        CHECK_EQ(guest_run(&m, 0, 2), VREP_VIRTIO_OK);
        for (int at = 0; at < 4096; at++)
            CHECK_EQ(back[at], 0);
    }
    /* Zeroes that may not be a hole, and flags that nobody knows. */
    CHECK_EQ(vrep_load_acquire_u32(&group->flags_seen), VREP_COMMAND_NO_HOLE);
    struct vrep_virtio_range odd = {htole64(64), htole32(8), htole32(1)};
    memcpy(guest_request(&m, 0, 0, VREP_VIRTIO_DISCARD, 0, sizeof odd), &odd, sizeof odd);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_UNSUPPORTED);
    odd.flags = htole32(2);
    memcpy(guest_request(&m, 0, 0, VREP_VIRTIO_WRITE_ZEROES, 0, sizeof odd), &odd, sizeof odd);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_UNSUPPORTED);
    odd = (struct vrep_virtio_range){htole64(64), htole32(VREP_VIRTIO_ZERO_SECTORS_MAX + 1), 0};
    memcpy(guest_request(&m, 0, 0, VREP_VIRTIO_DISCARD, 0, sizeof odd), &odd, sizeof odd);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_IOERR);
    end();
}

static void errors_are_told(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    (void)guest_request(&m, 0, 0, 77, 0, 512);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_UNSUPPORTED);
    (void)guest_request(&m, 0, 0, VREP_VIRTIO_OUT, 0, 100);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_IOERR);
    (void)guest_request(&m, 0, 0, VREP_VIRTIO_IN, UINT64_MAX, 512);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_IOERR);
    vrep_store_release_u32(&group->refuse, (uint32_t)-VREP_E_RANGE);
    (void)guest_request(&m, 0, 0, VREP_VIRTIO_OUT, 0, 512);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_IOERR);
    vrep_store_release_u32(&group->refuse, 0);
    vrep_store_release_u32(&group->fail, (uint32_t)-VREP_E_IO);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_IOERR);
    vrep_store_release_u32(&group->fail, 0);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_OK);
    CHECK_EQ(stats().traffic.errors, 5);
    end();
}

static void a_driver_without_flush_gets_writes_that_are_durable(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES & ~(UINT64_C(1) << VREP_VIRTIO_BLK_FLUSH), -1);
    (void)guest_request(&m, 0, 0, VREP_VIRTIO_OUT, 0, 512);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_OK);
    CHECK_EQ(vrep_load_acquire_u32(&group->flags_seen), VREP_COMMAND_FUA);
    end();
}

/* Headers, data and status cut anywhere, directly and in an indirect table, against a plain copy.
 */
static void segments(void)
{
    static uint8_t model[64 << 10];
    memset(model, 0, sizeof model);
    for (int round = 0; round < 400; round++) {
        bool in = check_random_below(2), indirect = check_random_below(2);
        uint32_t sectors = 1 + (uint32_t)check_random_below(16);
        uint32_t first = (uint32_t)check_random_below(sizeof model / 512 - sectors);
        uint32_t bytes = sectors * 512, at = DATA_AT;
        uint8_t *memory = m.memory + at;
        vrep_le_store_u32(memory, in ? VREP_VIRTIO_IN : VREP_VIRTIO_OUT);
        vrep_le_store_u64(memory + 8, first);
        for (uint32_t i = 0; i < bytes; i++)
            memory[16 + i] = in ? 0xee : (uint8_t)check_random();
        memory[16 + bytes] = 0xff;
        /* Everything lies in one piece: header, data, status; cut it where chance wants. */
        struct vrep_vring_descriptor cut[48];
        uint32_t count = 0, total = 16 + bytes + 1, reads = in ? 16 : 16 + bytes;
        for (uint32_t from = 0; from < total;) {
            uint32_t limit = from < reads ? reads : total;
            uint32_t n = count < 40 ? 1 + (uint32_t)check_random_below(700) : total;
            if (n > limit - from)
                n = limit - from;
            cut[count++] = (struct vrep_vring_descriptor){GUEST_AT + at + from, n,
                                                          from < reads ? 0 : VREP_VRING_WRITE, 0};
            from += n;
        }
        for (uint16_t i = 0; i < count; i++) {
            cut[i].flags |= (uint16_t)(i + 1 < (uint16_t)count ? VREP_VRING_NEXT : 0);
            cut[i].next = (uint16_t)(i + 1);
        }
        if (indirect) {
            memcpy(m.memory + DATA_AT + (1u << 20), cut, count * sizeof cut[0]);
            guest_descriptor(&m, 0, 5, GUEST_AT + DATA_AT + (1u << 20),
                             (uint32_t)(count * sizeof cut[0]), VREP_VRING_INDIRECT, -1);
        } else {
            for (uint16_t i = 0; i < count; i++) {
                cut[i].next = (uint16_t)(5 + i + 1);
                monitor_descriptors(&m, 0)[5 + i] = cut[i];
            }
        }
        guest_offer(&m, 0, 5);
        guest_kick(&m, 0);
        CHECK_EQ(guest_take(&m, 0, NULL), 5);
        CHECK_EQ(memory[16 + bytes], VREP_VIRTIO_OK);
        if (in)
            CHECK_EQ(memcmp(memory + 16, model + first * 512, bytes), 0);
        else
            memcpy(model + first * 512, memory + 16, bytes);
    }
}

static void any_layout_of_segments(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    segments();
    end();
}

/* Regions that stand side by side are one memory for the guest. */
static void segments_over_regions(void)
{
    struct vrep_vhost_regions regions = {.count = VREP_VHOST_REGIONS_MESSAGE};
    int fds[VREP_VHOST_REGIONS_MESSAGE];
    uint64_t from = 0, said;
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    for (uint32_t i = 0; i < regions.count; i++) {
        uint64_t end = i + 1 < regions.count ? DATA_AT + (i + 1) * 4096 : MEMORY_BYTES;
        regions.region[i] =
            (struct vrep_vhost_region){GUEST_AT + from, end - from, USER_AT + from, from};
        fds[i] = m.memory_fd;
        from = end;
    }
    monitor_send(&m, VREP_VHOST_SET_MEM_TABLE, VREP_VHOST_NEED_REPLY, &regions, sizeof regions, fds,
                 regions.count);
    CHECK_EQ(monitor_reply(&m, VREP_VHOST_SET_MEM_TABLE, &said, sizeof said), -1);
    CHECK_EQ(said, 0);
    segments();
    end();
}

static void more_writes_than_there_is_memory_for(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    double_hold(group, true);
    for (uint16_t i = 0; i < 12; i++) {
        memset(guest_request(&m, 0, i, VREP_VIRTIO_OUT, i, 512), i + 1, 512);
        guest_offer(&m, 0, (uint16_t)(3 * i));
    }
    guest_kick(&m, 0);
    wait_held(DOUBLE_PAYLOADS);
    CHECK_EQ(guest_used_index(&m, 0), 0);
    double_hold(group, false);
    for (uint16_t i = 0; i < 12; i++)
        CHECK_EQ(guest_take(&m, 0, NULL), 3 * i);
    CHECK(stats().stalls > 0);
    for (uint16_t i = 0; i < 12; i++) {
        uint8_t *back = guest_request(&m, 0, i, VREP_VIRTIO_IN, i, 512);
        CHECK_EQ(guest_run(&m, 0, i), VREP_VIRTIO_OK);
        CHECK_EQ(back[511], i + 1);
    }
    end();
}

static bool interrupted(int q)
{
    struct pollfd look = {.fd = m.queue[q].call, .events = POLLIN};
    uint64_t count;
    if (poll(&look, 1, 0) != 1)
        return false;
    CHECK_EQ(read(m.queue[q].call, &count, sizeof count), 8);
    return true;
}

static void a_guest_is_interrupted_as_it_asks(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES | UINT64_C(1) << VREP_VIRTIO_RING_EVENT_IDX, -1);
    uint8_t *event = monitor_available(&m, 0) + 4 + 2 * 64;
    (void)interrupted(0);
    for (uint16_t i = 0; i < 6; i++) {
        /* Only at the fourth. */
        vrep_le_store_u16(event, 3);
        (void)guest_request(&m, 0, 0, VREP_VIRTIO_FLUSH, 0, 0);
        CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_OK);
        /* The interrupt follows the index. */
        if (i == 3)
            monitor_wait(m.queue[0].call);
        else
            usleep(20000);
        CHECK_EQ(interrupted(0), i == 3);
    }
    /* And the device says from where on it wants to be kicked. */
    CHECK_EQ(vrep_le_load_u16(monitor_used(&m, 0) + 4 + 8 * 64), 6);
    end();
}

/* ---- what breaks a queue, and only that -------------------------------------------------- */

static void a_chain(uint16_t at, uint64_t address, uint32_t bytes, uint16_t flags, int next)
{
    guest_descriptor(&m, 0, at, address, bytes, flags, next);
}

static void bad_chain(int kind)
{
    uint64_t data = GUEST_AT + DATA_AT;
    (void)guest_request(&m, 0, 0, VREP_VIRTIO_OUT, 0, 512);
    switch (kind) {
    case 0: /* no end */
        a_chain(0, data, 16, 0, 1);
        a_chain(1, data, 16, 0, 0);
        break;
    case 1: /* out of the table */
        a_chain(0, data, 16, 0, 64);
        break;
    case 2: /* out of memory */
        a_chain(1, GUEST_AT + MEMORY_BYTES - 256, 512, 0, 2);
        break;
    case 3: /* addresses of the monitor */
        a_chain(1, USER_AT, 512, 0, 2);
        break;
    case 4: /* wraps */
        a_chain(1, UINT64_MAX - 100, 512, 0, 2);
        break;
    case 5: /* read after write */
        a_chain(0, data, 16, VREP_VRING_WRITE, 1);
        break;
    case 6: /* nowhere for a status */
        a_chain(0, data, 16, 0, -1);
        break;
    case 7: /* no header */
        a_chain(0, data, 8, 0, 2);
        break;
    case 8: /* a table of no whole size */
        a_chain(0, data, 24, VREP_VRING_INDIRECT, -1);
        break;
    case 9: /* a table of tables */
        monitor_descriptors(&m, 0)[9] = (struct vrep_vring_descriptor){
            htole64(data), htole32(16), htole16(VREP_VRING_INDIRECT), 0};
        a_chain(0, GUEST_AT + 9 * 16, 16, VREP_VRING_INDIRECT, -1);
        break;
    case 10: /* a table that is huge */
        a_chain(0, data, 0xfffffff0u, VREP_VRING_INDIRECT, -1);
        break;
    default: /* a table and a next one */
        a_chain(0, data, 16, VREP_VRING_INDIRECT, 1);
    }
}

static void bad_chains_break_their_queue_alone(void)
{
    begin();
    for (int kind = 0; kind < 14; kind++) {
        memset(&m.queue[0], 0, sizeof m.queue[0]);
        memset(m.memory, 0, DATA_AT);
        connect_and_start(MONITOR_FEATURES, -1);
        bad_chain(kind);
        uint16_t head = 0;
        if (kind == 12)
            head = 64;    /* a head that no queue has */
        if (kind == 13) { /* more than it can hold */
            vrep_store_release_u16((uint16_t *)(void *)(monitor_available(&m, 0) + 2), htole16(65));
        } else {
            guest_offer(&m, 0, head);
        }
        guest_kick(&m, 0);
        monitor_wait(m.queue[0].error);
        CHECK_EQ(guest_used_index(&m, 0), 0);
        CHECK_EQ(monitor_ask(&m, VREP_VHOST_GET_QUEUE_NUM), VREP_VHOST_QUEUES_MAX);
        /* It can be stopped, and started anew. */
        struct vrep_vhost_state state = {0, 0};
        monitor_send(&m, VREP_VHOST_GET_VRING_BASE, 0, &state, 8, NULL, 0);
        CHECK_EQ(monitor_reply(&m, VREP_VHOST_GET_VRING_BASE, &state, 8), -1);
        monitor_hang_up(&m);
    }
    CHECK_EQ(vrep_load_acquire_u32(&group->submitted), 0);
    end();
}

static void a_chain_that_is_in_flight_is_not_taken_again(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    double_hold(group, true);
    (void)guest_request(&m, 0, 0, VREP_VIRTIO_OUT, 0, 512);
    guest_offer(&m, 0, 0);
    guest_kick(&m, 0);
    wait_held(1);
    guest_offer(&m, 0, 0);
    guest_kick(&m, 0);
    monitor_wait(m.queue[0].error);
    CHECK_EQ(vrep_load_acquire_u32(&group->submitted), 1);
    double_hold(group, false);
    CHECK_EQ(guest_take(&m, 0, NULL), 0);
    end();
}

/* ---- messages ------------------------------------------------------------------------------ */

static void bad_messages_end_their_connection(void)
{
    begin();
    struct vrep_vhost_state queue = {99, 1};
    struct vrep_vhost_header odd[] = {
        {VREP_VHOST_GET_FEATURES, 2, 0},                    /* another version */
        {VREP_VHOST_GET_FEATURES, 1 | VREP_VHOST_REPLY, 0}, /* a reply */
        {VREP_VHOST_GET_FEATURES, 1, 8},                    /* with a body */
        {VREP_VHOST_SET_FEATURES, 1, 0},                    /* without one */
        {VREP_VHOST_SET_MEM_TABLE, 1, 0xffffffffu},         /* a huge one */
        {999, 1, VREP_VHOST_PAYLOAD_MAX + 1},               /* unknown, and huge */
    };
    for (size_t i = 0; i < sizeof odd / sizeof odd[0]; i++) {
        monitor_connect(&m, path);
        monitor_send_raw(&m, &odd[i], sizeof odd[i], NULL, 0);
        monitor_expect_end(&m);
    }
    monitor_connect(&m, path);
    monitor_send(&m, VREP_VHOST_SET_VRING_NUM, 0, &queue, 8, NULL, 0);
    monitor_expect_end(&m);
    monitor_connect(&m, path);
    monitor_send(&m, VREP_VHOST_SET_INFLIGHT_FD, 0, &queue, 8, NULL, 0);
    monitor_expect_end(&m);
    /* More descriptors than any message has. */
    int fds[9];
    for (int i = 0; i < 9; i++)
        fds[i] = m.memory_fd;
    monitor_connect(&m, path);
    monitor_send(&m, VREP_VHOST_SET_OWNER, 0, NULL, 0, fds, 9);
    monitor_expect_end(&m);
    /* Memory that is longer than its file: said, not mapped. */
    monitor_connect(&m, path);
    monitor_greet(&m, MONITOR_FEATURES);
    struct vrep_vhost_regions regions = {.count = 1};
    regions.region[0] = (struct vrep_vhost_region){GUEST_AT, 2 * MEMORY_BYTES, USER_AT, 0};
    CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_MEM_TABLE, &regions, 40, m.memory_fd), 1);
    /* A request that nobody knows, asked for politely. */
    uint64_t number = 0;
    CHECK_EQ(monitor_do(&m, 39, &number, 8, -1), 1);
    end();
}

static void the_configuration_is_that_of_the_disk(void)
{
    begin();
    monitor_connect(&m, path);
    monitor_greet(&m, MONITOR_FEATURES);
    struct vrep_vhost_config config = {.bytes = VREP_VIRTIO_CONFIG_BYTES};
    monitor_send(&m, VREP_VHOST_GET_CONFIG, 0, &config, 12 + config.bytes, NULL, 0);
    CHECK_EQ(monitor_reply(&m, VREP_VHOST_GET_CONFIG, &config, 12 + config.bytes), -1);
    CHECK_EQ(vrep_le_load_u64(config.data), DOUBLE_BYTES / 512);
    CHECK_EQ(vrep_le_load_u32(config.data + 20), 512);
    CHECK_EQ(vrep_le_load_u16(config.data + 34), VREP_VHOST_QUEUES_MAX);
    /* Nothing of it can be changed. */
    CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_CONFIG, &config, 12 + config.bytes, -1), 1);
    /* Who starts queues is told to look, since the size may be new. */
    int pair[2];
    CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
    CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_BACKEND_REQ_FD, NULL, 0, pair[1]), 0);
    struct vrep_vhost_header told;
    monitor_give_memory(&m);
    CHECK_EQ(recv(pair[0], &told, sizeof told, MSG_DONTWAIT), -1);
    monitor_start(&m, 0, 64, 0);
    monitor_wait(pair[0]);
    CHECK_EQ(recv(pair[0], &told, sizeof told, MSG_WAITALL), (ssize_t)sizeof told);
    CHECK_EQ(told.request, VREP_VHOST_BACKEND_CONFIG_CHANGE);
    close(pair[0]);
    close(pair[1]);
    end();
}

static void memory_that_is_taken_away_is_used_no_more(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    int more = memfd_create("more", MFD_CLOEXEC);
    CHECK_EQ(ftruncate(more, 1 << 20), 0);
    uint8_t *at = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, more, 0);
    CHECK(at != MAP_FAILED);
    struct vrep_vhost_one_region one = {
        .region = {GUEST_AT + MEMORY_BYTES, 1 << 20, USER_AT + 2 * MEMORY_BYTES, 0}};
    CHECK_EQ(monitor_do(&m, VREP_VHOST_ADD_MEM_REG, &one, sizeof one, more), 0);
    memset(at, 0x5a, 512);
    (void)guest_request(&m, 0, 0, VREP_VIRTIO_OUT, 3, 512);
    a_chain(1, GUEST_AT + MEMORY_BYTES, 512, 0, 2);
    /* In flight while it goes: the mapping stays until the command is done. */
    double_hold(group, true);
    guest_offer(&m, 0, 0);
    guest_kick(&m, 0);
    wait_held(1);
    CHECK_EQ(monitor_do(&m, VREP_VHOST_REM_MEM_REG, &one, sizeof one, -1), 0);
    double_hold(group, false);
    CHECK_EQ(guest_take(&m, 0, NULL), 0);
    CHECK_EQ(guest_status(&m, 0), VREP_VIRTIO_OK);
    uint8_t *back = guest_request(&m, 0, 1, VREP_VIRTIO_IN, 3, 512);
    CHECK_EQ(guest_run(&m, 0, 1), VREP_VIRTIO_OK);
    CHECK_EQ(memcmp(back, at, 512), 0);
    guest_offer(&m, 0, 0);
    guest_kick(&m, 0);
    monitor_wait(m.queue[0].error);
    munmap(at, 1 << 20);
    close(more);
    end();
}

/* ---- what outlives a connection ------------------------------------------------------------- */

static int new_region(void)
{
    int fd = memfd_create("inflight", MFD_CLOEXEC);
    CHECK_EQ(ftruncate(fd, (off_t)VREP_VHOST_INFLIGHT_BYTES(64)), 0);
    return fd;
}

static struct vrep_vhost_inflight_queue *map_region(int fd)
{
    void *at = mmap(NULL, VREP_VHOST_INFLIGHT_BYTES(64), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

static void offer_writes(uint16_t count)
{
    for (uint16_t i = 0; i < count; i++) {
        memset(guest_request(&m, 0, i, VREP_VIRTIO_OUT, 0, 512), i + 1, 512);
        guest_offer(&m, 0, (uint16_t)(3 * i));
    }
    guest_kick(&m, 0);
}

/* A new connection submits again what the old one had in flight, in its order, and only once the
 * old one's are complete. */
static void what_was_in_flight_is_submitted_again(void)
{
    begin();
    int region = new_region();
    connect_and_start(MONITOR_FEATURES, region);
    double_hold(group, true);
    offer_writes(3);
    wait_held(3);
    monitor_hang_up(&m);
    connect_and_start(MONITOR_FEATURES, region);
    usleep(50000);
    CHECK_EQ(vrep_load_acquire_u32(&group->submitted), 3);
    CHECK_EQ(guest_used_index(&m, 0), 0);
    double_hold(group, false);
    for (uint16_t i = 0; i < 3; i++)
        CHECK_EQ(guest_take(&m, 0, NULL), 3 * i);
    CHECK_EQ(vrep_load_acquire_u32(&group->submitted), 6);
    CHECK_EQ(stats().resubmitted, 3);
    uint8_t *back = guest_request(&m, 0, 5, VREP_VIRTIO_IN, 0, 512);
    CHECK_EQ(guest_run(&m, 0, 5), VREP_VIRTIO_OK);
    CHECK_EQ(back[0], 3);
    close(region);
    end();
}

/* The same after the process that served is gone, as if killed between any two of its stores. */
static void a_killed_process_is_taken_over(void)
{
    begin();
    int region = new_region();
    connect_and_start(MONITOR_FEATURES, region);
    offer_writes(4);
    for (uint16_t i = 0; i < 4; i++)
        CHECK_EQ(guest_take(&m, 0, NULL), 3 * i);
    monitor_hang_up(&m);
    serve_no_more();
    struct vrep_vhost_inflight_queue *kept = map_region(region);
    CHECK_EQ(kept->used_index, 4);
    for (int i = 0; i < 64; i++)
        CHECK_EQ(kept->entry[i].inflight, 0);
    /* It was killed after it had shown two to the guest, and noted neither ... */
    kept->used_index = 2;
    kept->entry[6].inflight = kept->entry[9].inflight = 1;
    /* ... while two more were in flight, the later one with the smaller number. */
    kept->entry[15].inflight = kept->entry[12].inflight = 1;
    kept->entry[15].counter = 100;
    kept->entry[12].counter = 101;
    (void)guest_request(&m, 0, 4, VREP_VIRTIO_OUT, 0, 512);
    (void)guest_request(&m, 0, 5, VREP_VIRTIO_OUT, 0, 512);
    guest_offer(&m, 0, 12);
    guest_offer(&m, 0, 15);
    serve();
    connect_and_start(MONITOR_FEATURES, region);
    CHECK_EQ(guest_take(&m, 0, NULL), 15);
    CHECK_EQ(guest_take(&m, 0, NULL), 12);
    CHECK_EQ(vrep_load_acquire_u32(&group->submitted), 6);
    /* Behind the index that the guest saw they are noted as done, and that in the end. */
    for (int i = 0; vrep_load_acquire_u16(&kept->used_index) != 6; i++) {
        CHECK(i < WAIT_MS);
        usleep(1000);
    }
    for (int i = 0; i < 64; i++)
        CHECK_EQ(kept->entry[i].inflight, 0);
    munmap(kept, VREP_VHOST_INFLIGHT_BYTES(64));
    close(region);
    end();
}

static void a_region_of_nonsense_is_refused(void)
{
    begin();
    int region = new_region();
    struct vrep_vhost_inflight_queue *kept = map_region(region);
    memset(kept, 0xff, VREP_VHOST_INFLIGHT_BYTES(64));
    for (int kind = 0; kind < 2; kind++) {
        kept->version = kind == 0 ? 7 : VREP_VHOST_INFLIGHT_VERSION;
        kept->size = 64;
        kept->used_index = 0;
        vrep_store_release_u16((uint16_t *)(void *)(monitor_used(&m, 0) + 2), htole16(3));
        monitor_connect(&m, path);
        monitor_greet(&m, MONITOR_FEATURES);
        struct vrep_vhost_inflight inflight = {
            .bytes = VREP_VHOST_INFLIGHT_BYTES(64), .queues = 1, .queue_size = 64};
        CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_INFLIGHT_FD, &inflight, sizeof inflight, region), 0);
        monitor_give_memory(&m);
        uint64_t number = 0;
        struct vrep_vhost_state state = {0, 64};
        struct vrep_vhost_address address = {
            .descriptors = USER_AT, .available = USER_AT + AVAILABLE_AT, .used = USER_AT + USED_AT};
        CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_VRING_NUM, &state, 8, -1), 0);
        CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_VRING_ADDR, &address, 40, -1), 0);
        int kick = eventfd(0, EFD_CLOEXEC);
        CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_VRING_KICK, &number, 8, kick), 1);
        close(kick);
        monitor_hang_up(&m);
    }
    munmap(kept, VREP_VHOST_INFLIGHT_BYTES(64));
    close(region);
    end();
}

static void a_queue_stops_when_nothing_of_it_is_in_flight(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    double_hold(group, true);
    offer_writes(2);
    wait_held(2);
    struct vrep_vhost_state state = {0, 0};
    monitor_send(&m, VREP_VHOST_GET_VRING_BASE, 0, &state, 8, NULL, 0);
    struct pollfd look = {.fd = m.socket, .events = POLLIN};
    CHECK_EQ(poll(&look, 1, 50), 0);
    double_hold(group, false);
    CHECK_EQ(monitor_reply(&m, VREP_VHOST_GET_VRING_BASE, &state, 8), -1);
    CHECK_EQ(state.number, 2);
    CHECK_EQ(guest_used_index(&m, 0), 2);
    end();
}

static void a_stop_answers_what_was_submitted(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    double_hold(group, true);
    offer_writes(2);
    wait_held(2);
    double_hold(group, false);
    serve_no_more();
    CHECK_EQ(guest_used_index(&m, 0), 2);
    serve();
    end();
}

int main(void)
{
    RUN(what_is_written_is_read);
    RUN(a_buffer_that_changes_under_way_is_one_write);
    RUN(zeroes_and_discard);
    RUN(errors_are_told);
    RUN(a_driver_without_flush_gets_writes_that_are_durable);
    RUN(any_layout_of_segments);
    RUN(segments_over_regions);
    RUN(more_writes_than_there_is_memory_for);
    RUN(a_guest_is_interrupted_as_it_asks);
    RUN(bad_chains_break_their_queue_alone);
    RUN(a_chain_that_is_in_flight_is_not_taken_again);
    RUN(bad_messages_end_their_connection);
    RUN(the_configuration_is_that_of_the_disk);
    RUN(memory_that_is_taken_away_is_used_no_more);
    RUN(what_was_in_flight_is_submitted_again);
    RUN(a_killed_process_is_taken_over);
    RUN(a_region_of_nonsense_is_refused);
    RUN(a_queue_stops_when_nothing_of_it_is_in_flight);
    RUN(a_stop_answers_what_was_submitted);
    return check_report();
}
