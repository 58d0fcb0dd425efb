/* Live migration over vhost-user: what is written to the guest's memory is logged, and the disk
 * goes from one monitor to another one, never being used by both. */
#include "vhost_rig.h"

/* ---- the log of a migration ----------------------------------------------------------- */

struct guest_log {
    int fd;
    uint64_t bytes;
    uint8_t *at; /* a bit of each page */
};

static const struct vrep_vhost_address logged_rings = {.flags = 1,
                                                       .descriptors = USER_AT,
                                                       .available = USER_AT + AVAILABLE_AT,
                                                       .used = USER_AT + USED_AT,
                                                       .log = GUEST_AT + USED_AT};

static struct guest_log log_memory(struct monitor *one)
{
    struct guest_log log = {.fd = memfd_create("log", MFD_CLOEXEC),
                            .bytes = (GUEST_AT + MEMORY_BYTES) / 4096 / 8};
    CHECK_EQ(ftruncate(log.fd, (off_t)log.bytes), 0);
    log.at = mmap(NULL, log.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, log.fd, 0);
    CHECK(log.at != MAP_FAILED);
    struct vrep_vhost_log base = {log.bytes, 0};
    uint64_t said;
    monitor_send(one, VREP_VHOST_SET_LOG_BASE, 0, &base, sizeof base, &log.fd, 1);
    CHECK_EQ(monitor_reply(one, VREP_VHOST_SET_LOG_BASE, &said, 8), -1);
    return log;
}

static void log_end(struct guest_log *log)
{
    munmap(log->at, log->bytes);
    close(log->fd);
}

static void what_is_written_to_guest_memory_is_logged(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES | UINT64_C(1) << VREP_VHOST_F_LOG_ALL, -1);
    struct guest_log log = log_memory(&m);
    CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_VRING_ADDR, &logged_rings, 40, -1), 0);
    (void)guest_request(&m, 0, 0, VREP_VIRTIO_IN, 0, 12288);
    CHECK_EQ(guest_run(&m, 0, 0), VREP_VIRTIO_OK);
    uint64_t first = (GUEST_AT + DATA_AT) / 4096, used = (GUEST_AT + USED_AT) / 4096;
    /* The ring is logged last, and behind the index that the guest saw. */
    for (int i = 0; !(log.at[used / 8] >> (used % 8) & 1); i++) {
        CHECK(i < WAIT_MS);
        usleep(1000);
    }
    usleep(20000);
    /* status; three pages of data; the used ring; and nothing else */
    uint64_t expected[] = {first, first + 1, first + 2, first + 3, used};
    uint32_t found = 0;
    for (uint64_t page = 0; page < log.bytes * 8; page++)
        if (log.at[page / 8] >> (page % 8) & 1) {
            bool known = false;
            for (size_t i = 0; i < sizeof expected / sizeof expected[0]; i++)
                known = known || expected[i] == page;
            CHECK(known);
            found++;
        }
    CHECK_EQ(found, 5);
    log_end(&log);
    end();
}

/* What the one that was killed had shown and not logged yet is logged by the next one. */
static void rings_are_logged_when_they_start(void)
{
    begin();
    monitor_connect(&m, path);
    monitor_greet(&m, MONITOR_FEATURES | UINT64_C(1) << VREP_VHOST_F_LOG_ALL);
    monitor_give_memory(&m);
    struct guest_log log = log_memory(&m);
    struct vrep_vhost_state state = {0, 64};
    uint64_t number = 0, page = (GUEST_AT + USED_AT) / 4096;
    CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_VRING_NUM, &state, 8, -1), 0);
    CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_VRING_ADDR, &logged_rings, 40, -1), 0);
    CHECK_EQ(log.at[page / 8], 0);
    int kick = eventfd(0, EFD_CLOEXEC);
    CHECK_EQ(monitor_do(&m, VREP_VHOST_SET_VRING_KICK, &number, 8, kick), 0);
    CHECK_EQ(log.at[page / 8] >> (page % 8) & 1, 1);
    close(kick);
    log_end(&log);
    end();
}

/* ---- two monitors ------------------------------------------------------------------- */

static uint8_t flushes(struct monitor *one)
{
    (void)guest_request(one, 0, 0, VREP_VIRTIO_FLUSH, 0, 0);
    return guest_run(one, 0, 0);
}

static uint32_t stop_queue(struct monitor *one)
{
    struct vrep_vhost_state state = {0, 0};
    monitor_send(one, VREP_VHOST_GET_VRING_BASE, 0, &state, 8, NULL, 0);
    CHECK_EQ(monitor_reply(one, VREP_VHOST_GET_VRING_BASE, &state, 8), -1);
    return state.number;
}

/* As a monitor at the other end of a migration: it asks and says everything, and does not begin. */
static void other_connects(struct monitor *other)
{
    monitor_create(other);
    monitor_connect(other, path);
    monitor_greet(other, MONITOR_FEATURES);
    monitor_give_memory(other);
}

static uint64_t try_to_start(struct monitor *one, uint16_t base)
{
    struct vrep_vhost_state state = {0, 64};
    struct vrep_vhost_address address = {
        .descriptors = USER_AT, .available = USER_AT + AVAILABLE_AT, .used = USER_AT + USED_AT};
    uint64_t number = 0;
    CHECK_EQ(monitor_do(one, VREP_VHOST_SET_VRING_NUM, &state, 8, -1), 0);
    state.number = base;
    CHECK_EQ(monitor_do(one, VREP_VHOST_SET_VRING_BASE, &state, 8, -1), 0);
    CHECK_EQ(monitor_do(one, VREP_VHOST_SET_VRING_ADDR, &address, 40, -1), 0);
    int kick = eventfd(0, EFD_CLOEXEC);
    uint64_t said = monitor_do(one, VREP_VHOST_SET_VRING_KICK, &number, 8, kick);
    close(kick);
    return said;
}

static void start_is_refused(struct monitor *one, uint16_t base)
{
    CHECK_EQ(try_to_start(one, base), 1);
}

static void other_is_refused(struct monitor *other)
{
    start_is_refused(other, 0);
}

/* The end of another connection is noticed a little later. */
static void other_starts_in_the_end(struct monitor *other)
{
    for (int i = 0; try_to_start(other, 0) != 0; i++) {
        CHECK(i < WAIT_MS);
        usleep(1000);
    }
    CHECK_EQ(stop_queue(other), 0);
    monitor_start(other, 0, 64, 0);
}

static void one_monitor_at_a_time(void)
{
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    struct monitor other, third;
    other_connects(&other);
    CHECK(!stats().monitor[0].holds || !stats().monitor[1].holds);
    other_is_refused(&other);
    monitor_create(&third);
    monitor_connect(&third, path);
    monitor_expect_end(&third);
    monitor_destroy(&third);
    CHECK_EQ(stats().refused, 1);
    CHECK_EQ(flushes(&m), VREP_VIRTIO_OK);
    /* One that is gone needs the disk no more. */
    monitor_hang_up(&m);
    other_starts_in_the_end(&other);
    CHECK_EQ(flushes(&other), VREP_VIRTIO_OK);
    monitor_destroy(&other);
    end();
}

static void a_guest_that_moved_is_served_where_it_is(void)
{
    struct monitor other;
    begin();
    connect_and_start(MONITOR_FEATURES | UINT64_C(1) << VREP_VHOST_F_LOG_ALL, -1);
    other_connects(&other);
    struct guest_log log = log_memory(&m);
    other_is_refused(&other);
    CHECK_EQ(flushes(&m), VREP_VIRTIO_OK);
    CHECK_EQ(stop_queue(&m), 1);
    /* It did not arrive, and goes on where it was. */
    monitor_start(&m, 0, 64, 1);
    other_is_refused(&other);
    CHECK_EQ(flushes(&m), VREP_VIRTIO_OK);
    CHECK_EQ(stop_queue(&m), 2);
    monitor_start(&other, 0, 64, 0);
    CHECK_EQ(flushes(&other), VREP_VIRTIO_OK);
    CHECK_EQ(stats().accepted, 2);
    /* Nobody goes on where it was, while it runs there; nor when it stops there for a while. */
    start_is_refused(&m, 0);
    CHECK_EQ(stop_queue(&other), 1);
    start_is_refused(&m, 0);
    monitor_start(&other, 0, 64, 1);
    CHECK_EQ(flushes(&other), VREP_VIRTIO_OK);
    monitor_destroy(&other);
    log_end(&log);
    end();
}

static void a_guest_that_is_paused_keeps_its_disk(void)
{
    struct monitor other;
    begin();
    connect_and_start(MONITOR_FEATURES, -1);
    other_connects(&other);
    CHECK_EQ(stop_queue(&m), 0);
    other_is_refused(&other);
    monitor_start(&m, 0, 64, 0);
    CHECK_EQ(flushes(&m), VREP_VIRTIO_OK);
    monitor_destroy(&other);
    end();
}

/* ---- what was left behind -------------------------------------------------------------- */

#define LOGGED (MONITOR_FEATURES | UINT64_C(1) << VREP_VHOST_F_LOG_ALL)

static int new_region(void)
{
    int fd = memfd_create("region", MFD_CLOEXEC);
    CHECK(fd >= 0);
    CHECK_EQ(ftruncate(fd, (off_t)VREP_VHOST_INFLIGHT_BYTES(64)), 0);
    return fd;
}

static void give_region(struct monitor *one, int fd)
{
    struct vrep_vhost_inflight inflight = {
        .bytes = VREP_VHOST_INFLIGHT_BYTES(64), .queues = 1, .queue_size = 64};
    CHECK_EQ(monitor_do(one, VREP_VHOST_SET_INFLIGHT_FD, &inflight, sizeof inflight, fd), 0);
}

/* Whether the region says what became of its guest. */
static bool region_says(int fd, uint64_t what)
{
    struct vrep_vhost_inflight_queue first;
    CHECK_EQ(pread(fd, &first, sizeof first, 0), (ssize_t)sizeof first);
    return (first.features & what) != 0;
}

static uint8_t disk_byte(off_t at)
{
    uint8_t byte;
    CHECK_EQ(pread(group->fd[0], &byte, 1, at), 1);
    return byte;
}

/* A write that the guest offered when nobody took it: it moves to the new place with the guest, and
 * stays in the memory of the old one. */
static void leave_a_write(struct monitor *one, uint8_t byte)
{
    memset(guest_request(one, 0, 1, VREP_VIRTIO_OUT, 0, 512), byte, 512);
    guest_offer(one, 0, 3);
}

static void write_byte(struct monitor *one, uint8_t byte)
{
    memset(guest_request(one, 0, 0, VREP_VIRTIO_OUT, 0, 512), byte, 512);
    CHECK_EQ(guest_run(one, 0, 0), VREP_VIRTIO_OK);
    CHECK_EQ(disk_byte(0), byte);
}

/* It ran, its guest moved away, and a write of 0xaa was left. */
static struct guest_log move_away(int region)
{
    connect_and_start(LOGGED, region);
    write_byte(&m, 0x11);
    struct guest_log log = log_memory(&m);
    CHECK(!region_says(region, VREP_VHOST_INFLIGHT_MOVED));
    CHECK_EQ(stop_queue(&m), 1);
    CHECK(region_says(region, VREP_VHOST_INFLIGHT_MOVED));
    leave_a_write(&m, 0xaa);
    return log;
}

/* As a monitor that finds another server: it starts its queues, whether its guest runs or not. */
static uint64_t come_back(int region)
{
    if (m.socket >= 0)
        monitor_hang_up(&m);
    monitor_connect(&m, path);
    monitor_greet(&m, LOGGED);
    give_region(&m, region);
    monitor_give_memory(&m);
    return try_to_start(&m, guest_used_index(&m, 0));
}

static void who_was_left_is_served_no_more(void)
{
    struct monitor other, third;
    begin();
    int region = new_region();
    struct guest_log log = move_away(region);
    other_connects(&other);
    monitor_start(&other, 0, 64, 0);
    CHECK(!region_says(region, VREP_VHOST_INFLIGHT_LEFT));
    write_byte(&other, 0x22);
    CHECK(region_says(region, VREP_VHOST_INFLIGHT_LEFT));
    /* However often it tries, whoever serves, and whether the other one is still there. */
    CHECK_EQ(try_to_start(&m, 1), 1);
    CHECK_EQ(come_back(region), 1);
    monitor_hang_up(&other);
    for (int i = 0; stats().monitor[0].holds || stats().monitor[1].holds; i++) {
        CHECK(i < WAIT_MS);
        usleep(1000);
    }
    CHECK_EQ(come_back(region), 1);
    monitor_hang_up(&m);
    serve_no_more();
    serve();
    CHECK_EQ(come_back(region), 1);
    CHECK_EQ(disk_byte(0), 0x22);
    CHECK_EQ(guest_used_index(&m, 0), 1);
    /* Nor with a new region: its guest was reset. */
    int fresh = new_region();
    give_region(&m, fresh);
    CHECK(region_says(fresh, VREP_VHOST_INFLIGHT_LEFT));
    CHECK_EQ(come_back(fresh), 1);
    /* Another one's guest may have the disk. */
    other_connects(&third);
    monitor_start(&third, 0, 64, 0);
    write_byte(&third, 0x33);
    monitor_destroy(&third);
    monitor_destroy(&other);
    close(fresh);
    close(region);
    log_end(&log);
    end();
}

/* The other one was there and its guest never ran. */
static void a_guest_that_did_not_arrive_goes_on(void)
{
    struct monitor other;
    begin();
    int region = new_region();
    struct guest_log log = move_away(region);
    other_connects(&other);
    monitor_start(&other, 0, 64, 0);
    start_is_refused(&m, 1);
    monitor_destroy(&other);
    for (int i = 0; come_back(region) != 0; i++) {
        CHECK(i < WAIT_MS);
        usleep(1000);
    }
    CHECK_EQ(stop_queue(&m), 1);
    monitor_start(&m, 0, 64, 1);
    CHECK_EQ(guest_take(&m, 0, NULL), 3); /* what it had left */
    CHECK_EQ(disk_byte(0), 0xaa);
    write_byte(&m, 0x44);
    CHECK(!region_says(region, VREP_VHOST_INFLIGHT_MOVED | VREP_VHOST_INFLIGHT_LEFT));
    close(region);
    log_end(&log);
    end();
}

/* The server ends after a guest moved away, and the old monitor is the first at the next one. */
static struct guest_log begin_as_the_first_at_the_next(int *region)
{
    begin();
    *region = new_region();
    struct guest_log log = move_away(*region);
    monitor_hang_up(&m);
    serve_no_more();
    serve();
    m.queue[0].seen = 1;
    connect_and_start(LOGGED, *region);
    CHECK_EQ(guest_take(&m, 0, NULL), 3);
    return log;
}

static void one_that_came_back_without_its_guest_yields(void)
{
    struct monitor other;
    int region;
    struct guest_log log = begin_as_the_first_at_the_next(&region);
    CHECK(region_says(region, VREP_VHOST_INFLIGHT_MOVED));
    other_connects(&other);
    monitor_start(&other, 0, 64, 0);
    monitor_expect_end(&m);
    write_byte(&other, 0x55);
    CHECK_EQ(come_back(region), 1);
    CHECK(region_says(region, VREP_VHOST_INFLIGHT_LEFT));
    CHECK_EQ(disk_byte(0), 0x55);
    monitor_destroy(&other);
    close(region);
    log_end(&log);
    end();
}

/* The same, but the move had failed, and its guest goes on. */
static void one_that_came_back_with_its_guest_keeps_the_disk(void)
{
    struct monitor other;
    int region;
    struct guest_log log = begin_as_the_first_at_the_next(&region);
    write_byte(&m, 0x66);
    CHECK(!region_says(region, VREP_VHOST_INFLIGHT_MOVED));
    other_connects(&other);
    other_is_refused(&other);
    write_byte(&m, 0x77);
    monitor_destroy(&other);
    close(region);
    log_end(&log);
    end();
}

int main(void)
{
    RUN(what_is_written_to_guest_memory_is_logged);
    RUN(rings_are_logged_when_they_start);
    RUN(one_monitor_at_a_time);
    RUN(a_guest_that_moved_is_served_where_it_is);
    RUN(a_guest_that_is_paused_keeps_its_disk);
    RUN(who_was_left_is_served_no_more);
    RUN(a_guest_that_did_not_arrive_goes_on);
    RUN(one_that_came_back_without_its_guest_yields);
    RUN(one_that_came_back_with_its_guest_keeps_the_disk);
    return check_report();
}
