/* Views: absent blocks wait for a fill, partial writes fill first, newer data stay. */
#include <pthread.h>

#include "base/atomic.h"
#include "filter/internal.h"
#include "filter_rig.h"

#define BLOCK 65536u

static struct rig rig;
static char uri[128];

static void open_view(void)
{
    rig_init(&rig);
    snprintf(uri, sizeof uri, "view:%s/overlay", rig.root);
    rig.disks[0].uri = uri;
    rig.disks[0].bytes = RIG_BYTES;
    rig.config.flags = 0;
    rig_open(&rig);
}

/* Byte i of the disk behind the view. */
static uint8_t behind(uint64_t i)
{
    return (uint8_t)(i / 4096 + i % 251);
}

static void make(uint8_t *to, uint64_t offset, uint64_t length)
{
    for (uint64_t i = 0; i < length; i++)
        to[i] = behind(offset + i);
}

static void read_waits_for_its_fill(void)
{
    open_view();
    static uint8_t got[200000], want[200000], data[1 << 20];
    bool done;
    struct iovec iov = {.iov_base = got, .iov_len = sizeof got};
    struct vrep_command *command = rig_prepare(&rig, VREP_OP_READ, 0, 70000, sizeof got, 0, &done);
    command->iov = &iov;
    command->iovcnt = 1;
    vrep_command_submit(command);
    vrep_group_poll(rig.group);
    CHECK(!done);
    struct vrep_miss miss[4];
    CHECK_EQ(vrep_group_misses(rig.group, miss, 4, 0), 1);
    CHECK_EQ(miss[0].offset, BLOCK);
    CHECK_EQ(miss[0].length, 4 * BLOCK);
    CHECK_EQ(vrep_group_misses(rig.group, miss + 1, 3, 0), 0);
    make(data, miss[0].offset, miss[0].length);
    CHECK_OK(vrep_group_fill(rig.group, miss[0].ticket, data, VREP_OK));
    CHECK_STATUS(vrep_group_fill(rig.group, miss[0].ticket, data, VREP_OK), VREP_E_NOT_FOUND);
    rig_wait(&rig, &done);
    CHECK_OK(command->status);
    make(want, 70000, sizeof want);
    CHECK_MEM(got, want, sizeof want);
    vrep_command_put(command);
    rig_free(&rig);
}

static void failed_fill_fails_those_who_wait(void)
{
    open_view();
    bool done;
    struct vrep_command *command = rig_prepare(&rig, VREP_OP_WRITE, 0, 100, 50, 1, &done);
    vrep_command_submit(command);
    struct vrep_miss miss;
    CHECK_EQ(vrep_group_misses(rig.group, &miss, 1, 0), 1);
    CHECK_OK(vrep_group_fill(rig.group, miss.ticket, NULL, VREP_E_IO));
    CHECK(done);
    CHECK_STATUS(command->status, VREP_E_IO);
    vrep_command_put(command);
    rig_free(&rig);
}

static void newer_data_survive_a_late_fill(void)
{
    open_view();
    static uint8_t data[1 << 20], got[2 * BLOCK];
    struct vrep_miss miss;
    CHECK_OK(vrep_group_fill_next(rig.group, 0, 0, 2 * BLOCK, &miss));
    CHECK_EQ(miss.length, 2 * BLOCK);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, BLOCK, BLOCK, 0x77)); /* whole: needs no fill */
    make(data, 0, 2 * BLOCK);
    CHECK_OK(vrep_group_fill(rig.group, miss.ticket, data, VREP_OK));
    CHECK_OK(rig_read(&rig, 0, 2 * BLOCK, got));
    CHECK_MEM(got, data, BLOCK);
    for (unsigned i = 0; i < BLOCK; i++)
        CHECK_EQ(got[BLOCK + i], 0x77);
    rig_free(&rig);
}

/* What a file system writes: whole pages, in the middle of a block that is not there. */
static void page_in_an_absent_block_fills_first(void)
{
    static const uint8_t ops[] = {VREP_OP_WRITE, VREP_OP_ZERO};
    for (unsigned i = 0; i < 2; i++) {
        open_view();
        static uint8_t data[1 << 20], got[BLOCK];
        bool done;
        struct vrep_command *command =
            rig_prepare(&rig, ops[i], 0, BLOCK + 4096, 4096, 0x77, &done);
        vrep_command_submit(command);
        vrep_group_poll(rig.group);
        CHECK(!done);
        struct vrep_miss miss;
        CHECK_EQ(vrep_group_misses(rig.group, &miss, 1, 0), 1);
        CHECK_EQ(miss.offset, BLOCK);
        CHECK_EQ(miss.length, BLOCK);
        make(data, BLOCK, BLOCK);
        CHECK_OK(vrep_group_fill(rig.group, miss.ticket, data, VREP_OK));
        rig_wait(&rig, &done);
        CHECK_OK(command->status);
        vrep_command_put(command);
        memset(data + 4096, ops[i] == VREP_OP_WRITE ? 0x77 : 0, 4096);
        CHECK_OK(rig_read(&rig, BLOCK, BLOCK, got));
        CHECK_MEM(got, data, BLOCK);
        rig_free(&rig);
    }
}

/* Only what cannot be whole at once waits: the rest goes on beside it, block by block. */
static void fill_next_gives_whole_blocks(void)
{
    open_view();
    struct vrep_miss miss;
    CHECK_OK(vrep_group_fill_next(rig.group, 0, 0, 100000, &miss));
    CHECK_EQ(miss.length, BLOCK);
    CHECK_OK(vrep_group_fill(rig.group, miss.ticket, NULL, VREP_E_GONE));
    CHECK_OK(vrep_group_fill_next(rig.group, 0, 0, 100, &miss));
    CHECK_EQ(miss.length, BLOCK);
    CHECK_OK(vrep_group_fill(rig.group, miss.ticket, NULL, VREP_E_GONE));
    rig_free(&rig);
}

/* A killed process loses no write that it answered, flushed or not; a power loss may. */
static void killed_view_keeps_what_it_answered(void)
{
    open_view();
    static uint8_t got[BLOCK];
    struct vrep_miss miss;
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 0, BLOCK, 0x55));
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, BLOCK, BLOCK, 0x77));
    rig_kill(&rig);
    rig_open(&rig);
    CHECK_OK(rig_read(&rig, BLOCK, BLOCK, got));
    for (unsigned i = 0; i < BLOCK; i++)
        CHECK_EQ(got[i], 0x77);
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 2 * BLOCK, BLOCK, 0x99));
    rig_kill(&rig);
    /* Another boot: the live bits are not of this one, the synced ones hold. */
    char live[192];
    snprintf(live, sizeof live, "%s/overlay.live", rig.root);
    int fd = open(live, O_RDWR);
    CHECK(fd >= 0 && pwrite(fd, "another boot....", 16, 48) == 16);
    close(fd);
    rig_open(&rig);
    CHECK_OK(rig_read(&rig, BLOCK, BLOCK, got));
    CHECK_EQ(got[0], 0x77);
    CHECK_OK(vrep_group_fill_next(rig.group, 0, 0, BLOCK, &miss));
    CHECK_EQ(miss.offset, 2 * BLOCK);
    CHECK_OK(vrep_group_fill(rig.group, miss.ticket, NULL, VREP_E_GONE));
    rig_free(&rig);
}

/* ---- a fetching thread beside the loop, against an oracle -------------------------- */

static bool fetching;

static void *fetch(void *argument)
{
    (void)argument;
    static uint8_t data[1 << 20];
    while (__atomic_load_n(&fetching, __ATOMIC_ACQUIRE)) {
        struct vrep_miss miss[8];
        uint32_t count = vrep_group_misses(rig.group, miss, 8, 20);
        for (uint32_t i = 0; i < count; i++) {
            make(data, miss[i].offset, miss[i].length);
            CHECK_OK(vrep_group_fill(rig.group, miss[i].ticket, data, VREP_OK));
        }
    }
    return NULL;
}

static void view_equals_its_oracle(void)
{
    open_view();
    vrep_group_poll(rig.group); /* this thread owns the group from here */
    static uint8_t oracle[RIG_BYTES], got[RIG_BYTES];
    make(oracle, 0, RIG_BYTES);
    pthread_t thread;
    fetching = true;
    CHECK_EQ(pthread_create(&thread, NULL, fetch, NULL), 0);
    check_seed(11);
    for (int i = 0; i < 300; i++) {
        uint64_t length = 1 + check_random_below(i % 10 == 0 ? 400000 : 20000);
        uint64_t offset = check_random_below(RIG_BYTES - length);
        /* As guests write: in units that are smaller than a block of the view. */
        static const unsigned units[] = {1, 512, 4096, 4096, BLOCK};
        unsigned unit = units[check_random_below(5)];
        offset -= offset % unit;
        length += unit - length % unit;
        if (offset + length > RIG_BYTES)
            offset = RIG_BYTES - length;
        uint64_t dice = check_random_below(10);
        if (dice < 5) {
            CHECK_OK(
                rig_run(&rig, VREP_OP_WRITE, dice == 0 ? VREP_COMMAND_FUA : 0, offset, length, i));
            memset(oracle + offset, i, length);
        } else if (dice < 7) {
            CHECK_OK(rig_run(&rig, VREP_OP_ZERO, 0, offset, length, 0));
            memset(oracle + offset, 0, length);
        } else {
            CHECK_OK(rig_read(&rig, offset, length, got));
            CHECK_MEM(got, oracle + offset, length);
        }
    }
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    CHECK_OK(rig_read(&rig, 0, RIG_BYTES, got));
    CHECK_MEM(got, oracle, RIG_BYTES);
    struct vrep_miss miss;
    CHECK_STATUS(vrep_group_fill_next(rig.group, 0, 0, BLOCK, &miss), VREP_E_NOT_FOUND);
    __atomic_store_n(&fetching, false, __ATOMIC_RELEASE);
    vrep_group_stop_misses(rig.group);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    rig_free(&rig);
}

static void closing_fails_those_who_wait(void)
{
    open_view();
    bool done;
    uint8_t byte;
    struct iovec iov = {.iov_base = &byte, .iov_len = 1};
    struct vrep_command *command = rig_prepare(&rig, VREP_OP_READ, 0, 5, 1, 0, &done);
    command->iov = &iov;
    command->iovcnt = 1;
    vrep_command_submit(command);
    CHECK(!done);
    vrep_group_close(rig.group, false);
    CHECK(done);
    rig.group = NULL;
    rig_free(&rig);
}

/* A recovered disk that is protected again: absent blocks are fetched before they are copied. */
static void protected_view_ships_what_it_fetched(void)
{
    open_view();
    rig_close(&rig, true);
    rig.config.flags = VREP_GROUP_TAP;
    rig_open(&rig);
    rig_attach(&rig);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    static uint8_t data[1 << 20], want[RIG_BYTES];
    time_t until = time(NULL) + 60;
    while (rig_status(&rig).gap && time(NULL) < until) {
        vrep_group_poll(rig.group);
        rig_apply(&rig, true);
        usleep(200); /* the worker looks for holes */
        struct vrep_miss miss;
        while (vrep_group_misses(rig.group, &miss, 1, 0) == 1) {
            make(data, miss.offset, miss.length);
            CHECK_OK(vrep_group_fill(rig.group, miss.ticket, data, VREP_OK));
        }
    }
    CHECK_EQ(rig_status(&rig).gap, 0);
    rig_apply(&rig, true);
    make(want, 0, RIG_BYTES);
    CHECK_MEM(rig.shadow, want, RIG_BYTES);
    rig_free(&rig);
}

#define FILLERS 3

static struct filler {
    pthread_t thread;
    uint64_t from;
    uint32_t ended; /* atomic */
    int status;
    uint8_t data[1 << 20];
} fillers[FILLERS];

static void *fill_a_mib(void *argument)
{
    struct filler *filler = argument;
    struct vrep_miss miss;
    filler->status = vrep_group_fill_next(rig.group, 0, filler->from, sizeof filler->data, &miss);
    if (filler->status == VREP_OK) {
        make(filler->data, miss.offset, miss.length);
        filler->status = vrep_group_fill(rig.group, miss.ticket, filler->data, VREP_OK);
    }
    vrep_store_release_u32(&filler->ended, 1);
    return NULL;
}

static void begin_filler(unsigned i)
{
    fillers[i].from = (uint64_t)i << 20;
    fillers[i].ended = 0;
    CHECK_EQ(pthread_create(&fillers[i].thread, NULL, fill_a_mib, &fillers[i]), 0);
}

static void end_filler(unsigned i)
{
    for (int ms = 0; vrep_load_acquire_u32(&fillers[i].ended) == 0; ms++) {
        if (ms > 20000) {
            CHECK(!"a fill never ends");
            exit(check_report());
        }
        usleep(1000);
    }
    CHECK_EQ(pthread_join(fillers[i].thread, NULL), 0);
    CHECK_OK(fillers[i].status);
}

/* The front-ends are stopped while a view is filled: whose loop polled, polls no more. */
static void fills_end_when_nobody_polls_any_more(void)
{
    for (int round = 0; round < 20; round++) {
        open_view();
        static uint8_t got[FILLERS << 20], want[FILLERS << 20];
        vrep_group_poll(rig.group);
        begin_filler(0);
        while (rig.group->fills_inflight == 0)
            vrep_group_poll(rig.group);
        vrep_group_disown(rig.group);
        if (round % 2 == 0) /* nobody comes who could do it for this one */
            end_filler(0);
        for (unsigned i = 1; i < FILLERS; i++)
            begin_filler(i);
        for (unsigned i = round % 2 == 0 ? 1 : 0; i < FILLERS; i++)
            end_filler(i);
        make(want, 0, sizeof want);
        CHECK_OK(rig_read(&rig, 0, sizeof got, got));
        CHECK_MEM(got, want, sizeof got);
        rig_free(&rig);
    }
}

int main(void)
{
    RUN(read_waits_for_its_fill);
    RUN(failed_fill_fails_those_who_wait);
    RUN(newer_data_survive_a_late_fill);
    RUN(page_in_an_absent_block_fills_first);
    RUN(fill_next_gives_whole_blocks);
    RUN(killed_view_keeps_what_it_answered);
    RUN(view_equals_its_oracle);
    RUN(closing_fails_those_who_wait);
    RUN(fills_end_when_nobody_polls_any_more);
    RUN(protected_view_ships_what_it_fetched);
    return check_report();
}
