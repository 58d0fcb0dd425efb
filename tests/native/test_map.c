#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/atomic.h"
#include "check.h"
#include "format/checksum.h"
#include "track/bits.h"
#include "track/map_private.h"

enum { BIT = 65536 };

static char path[64], prefix[64];
static const uint8_t group[16] = {1}, target[16] = {2};
static const uint64_t sizes[2] = {BIT * 100 + 512, BIT *UINT64_C(70000)};

static struct vrep_map *new_map(void)
{
    struct vrep_map *map;
    CHECK_OK(vrep_map_create(path, group, target, sizes, 2, BIT, &map));
    return map;
}

static struct vrep_map *attached(void)
{
    struct vrep_map *map;
    CHECK_OK(vrep_map_attach(path, group, target, sizes, 2, &map));
    return map;
}

static bool dirty(struct vrep_map *map, uint16_t disk, uint64_t offset)
{
    uint64_t length;
    bool is;
    CHECK(vrep_map_next_run(map, disk, offset, &length, &is));
    return is;
}

static void a_generation_clears_when_all_of_it_is_durable(void)
{
    struct vrep_map *map = new_map();
    struct vrep_map_move move;
    CHECK(!vrep_map_seal(map, 0, &move)); /* nothing marked */
    uint8_t a = vrep_map_mark(map, 0, 0, 1), b = vrep_map_mark(map, 0, BIT * 5, BIT + 1);
    CHECK_EQ(a, b);
    CHECK_EQ(vrep_map_dirty_bits(map), 3);
    vrep_map_raise(map, a, 7);
    vrep_map_done(map, a);
    CHECK_EQ(vrep_map_clear(map, 100), 0); /* open */
    CHECK(vrep_map_seal(map, 7, &move));
    CHECK(!move.moved);
    CHECK_EQ(vrep_map_clear(map, 100), 0); /* b is in flight */
    CHECK_EQ(vrep_map_dirty_bits(map), 3);
    vrep_map_raise(map, b, 9);
    vrep_map_done(map, b);
    CHECK_EQ(vrep_map_clear(map, 8), 0); /* 9 is not durable */
    CHECK(dirty(map, 0, BIT * 6));
    CHECK_EQ(vrep_map_clear(map, 9), 1);
    CHECK_EQ(vrep_map_dirty_bits(map), 0);
    vrep_map_detach(map);
}

static void an_acknowledgement_never_clears_unshipped(void)
{
    struct vrep_map *map = new_map();
    struct vrep_map_move move;
    uint8_t g = vrep_map_mark(map, 0, 0, BIT);
    vrep_map_mark_unshipped(map, 0, 0, BIT);
    vrep_map_set_gap(map);
    vrep_map_raise(map, g, 1);
    vrep_map_done(map, g);
    CHECK(vrep_map_seal(map, 1, &move));
    CHECK_EQ(vrep_map_clear(map, 1), 1);
    CHECK(dirty(map, 0, 0));
    CHECK(!vrep_map_in_generation(map, 0, 0, BIT));
    CHECK_EQ(vrep_map_unshipped_bits(map), 1);
    CHECK(vrep_map_gap(map));
    vrep_map_clear_unshipped(map, 0, 0, BIT);
    CHECK(!dirty(map, 0, 0));
    vrep_map_detach(map);
}

static void only_whole_bits_are_cleared(void)
{
    struct vrep_map *map = new_map();
    vrep_map_mark_all_unshipped(map);
    CHECK_EQ(vrep_map_unshipped_bits(map), 101 + 70000);
    CHECK_EQ(vrep_map_unshipped_bytes(map), sizes[0] + sizes[1]);
    CHECK_EQ(vrep_map_dirty_bytes(map), sizes[0] + sizes[1]);
    vrep_map_clear_unshipped(map, 0, 1, BIT * 2 - 2); /* no bit is covered whole */
    CHECK_EQ(vrep_map_unshipped_bits(map), 101 + 70000);
    vrep_map_clear_unshipped(map, 0, 1, BIT * 3 - 1);
    CHECK_EQ(vrep_map_unshipped_bits(map), 101 + 70000 - 2);
    vrep_map_clear_unshipped(map, 0, BIT * 100, 511);
    CHECK_EQ(vrep_map_unshipped_bits(map), 101 + 70000 - 2);
    vrep_map_clear_unshipped(map, 0, BIT * 100, 512); /* the short last bit */
    CHECK_EQ(vrep_map_unshipped_bits(map), 101 + 70000 - 3);
    vrep_map_clear_unshipped(map, 0, 0, UINT64_MAX);
    vrep_map_clear_unshipped(map, 1, 0, UINT64_MAX);
    CHECK_EQ(vrep_map_unshipped_bits(map), 0);
    CHECK_EQ(vrep_map_unshipped_bytes(map), 0);
    vrep_map_detach(map);
}

static void ranges_outside_a_disk_are_ignored(void)
{
    struct vrep_map *map = new_map();
    vrep_map_mark_unshipped(map, 2, 0, BIT);
    vrep_map_mark_unshipped(map, 0, sizes[0], BIT);
    vrep_map_mark_unshipped(map, 0, 0, 0);
    CHECK_EQ(vrep_map_unshipped_bits(map), 0);
    vrep_map_mark_unshipped(map, 0, sizes[0] - 1, UINT64_MAX);
    CHECK_EQ(vrep_map_unshipped_bits(map), 1);
    uint64_t offset, length;
    bool is;
    CHECK(!vrep_map_next_run(map, 0, sizes[0], &length, &is));
    CHECK(!vrep_map_next_run(map, 9, 0, &length, &is));
    CHECK(vrep_map_next_unshipped(map, 0, 0, BIT * 8, &offset, &length));
    CHECK_EQ(offset, BIT * 100);
    CHECK_EQ(length, 512);
    CHECK(!vrep_map_next_unshipped(map, 0, offset + length, BIT * 8, &offset, &length));
    CHECK(!vrep_map_next_unshipped(map, 1, 0, BIT * 8, &offset, &length));
    vrep_map_mark_unshipped(map, 1, BIT * 10, BIT * 20);
    CHECK(vrep_map_next_unshipped(map, 1, 0, BIT * 8 + 5, &offset, &length));
    CHECK_EQ(offset, BIT * 10);
    CHECK_EQ(length, BIT * 8);
    CHECK(vrep_map_next_unshipped(map, 1, offset + length, 1, &offset, &length));
    CHECK_EQ(offset, BIT * 18);
    CHECK_EQ(length, BIT);
    vrep_map_detach(map);
}

static void seal_all(struct vrep_map *map, uint8_t generation[4])
{
    struct vrep_map_move move;
    for (int i = 0; i < 4; i++) {
        generation[i] = vrep_map_mark(map, 0, (uint64_t)i * BIT, 1);
        vrep_map_raise(map, generation[i], 10 + (uint64_t)i);
        if (i < 3)
            CHECK(vrep_map_seal(map, 10 + (uint64_t)i, &move) && !move.moved);
    }
}

static void a_merge_moves_commands(void)
{
    struct vrep_map *map = new_map();
    struct vrep_map_move move;
    uint8_t generation[4];
    seal_all(map, generation);
    CHECK(vrep_map_seal(map, 14, &move));
    CHECK(move.moved);
    CHECK_EQ(move.to, generation[0]);
    CHECK_EQ(move.from, generation[1]);
    CHECK_EQ(vrep_map_dirty_bits(map), 4);
    vrep_map_done(map, generation[0]);
    /* The command of generation[1] is in flight still: it holds both back. */
    CHECK_EQ(vrep_map_clear(map, 1000), 0);
    vrep_map_raise(map, move.to, 50);
    vrep_map_done(map, move.to);
    CHECK_EQ(vrep_map_clear(map, 11), 0);
    CHECK_EQ(vrep_map_clear(map, 50), 1);
    CHECK_EQ(vrep_map_dirty_bits(map), 2);
    vrep_map_detach(map);
}

static void a_merge_survives_its_owner(void)
{
    struct vrep_map *map = new_map();
    struct vrep_map_move move;
    uint8_t generation[4];
    seal_all(map, generation);
    CHECK(vrep_map_seal(map, 14, &move)); /* killed before it told its commands */
    vrep_map_detach(map);
    map = attached();
    vrep_map_reset_inflight(map);
    for (int i = 0; i < 4; i++) {
        uint8_t now = vrep_map_count(map, generation[i]);
        CHECK_EQ(now, generation[i] == move.from ? move.to : generation[i]);
        generation[i] = now;
    }
    CHECK_EQ(vrep_map_count(map, 0xff), 0xff);
    vrep_map_done(map, generation[0]);
    CHECK_EQ(vrep_map_clear(map, 1000), 0);
    vrep_map_done(map, generation[1]);
    CHECK_EQ(vrep_map_clear(map, 1000), 1);
    vrep_map_mark(map, 0, 0, 1);
    vrep_map_reset_inflight(map);
    CHECK_EQ(vrep_map_count(map, move.from), move.from); /* the merge is over */
    vrep_map_detach(map);
}

/* The owner dies at a random moment of seals, merges and clears; no bit may be missing. */
static void a_killed_owner_loses_no_bit(void)
{
    vrep_map_detach(new_map());
    for (int round = 0; round < 40; round++) {
        uint64_t seed = check_random() | 1;
        pid_t child = fork();
        if (child == 0) {
            struct vrep_map *map;
            if (vrep_map_attach(path, group, target, sizes, 2, &map) != VREP_OK)
                _exit(1);
            vrep_map_reset_inflight(map);
            check_seed(seed);
            for (uint64_t n = 0;; n++) {
                struct vrep_map_move move;
                /* Bits below 50 are marked for ever; those above come and go. */
                uint8_t g = vrep_map_mark(map, 0, check_random_below(50) * BIT, 1);
                vrep_map_raise(map, g, UINT64_MAX);
                vrep_map_mark_unshipped(map, 1, check_random_below(60000) * BIT, BIT);
                (void)vrep_map_seal(map, n, &move);
                (void)vrep_map_clear(map, n);
            }
        }
        usleep((useconds_t)(300 + check_random_below(2500)));
        kill(child, 9);
        int status;
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK(WIFSIGNALED(status));
        static uint8_t was[50];
        struct vrep_map *map = attached();
        for (uint64_t bit = 0; bit < 50; bit++) {
            CHECK(!was[bit] || dirty(map, 0, bit * BIT));
            was[bit] = dirty(map, 0, bit * BIT);
        }
        unsigned open = 0;
        for (int g = 0; g < 4; g++)
            open += vrep_map_header(map)->generation[g].state == VREP_GENERATION_OPEN;
        CHECK_EQ(open, 1);
        uint64_t kept = vrep_map_unshipped_bits(map);
        vrep_map_detach(map);
        CHECK_OK(vrep_map_open(path, &map));
        CHECK_EQ(vrep_map_unshipped_bits(map), kept);
        vrep_map_detach(map);
    }
}

static void generations_move_to_unshipped(void)
{
    struct vrep_map *map = new_map();
    uint8_t generation[4];
    seal_all(map, generation);
    vrep_map_mark_unshipped(map, 0, 0, 1);
    vrep_map_generations_to_unshipped(map);
    CHECK_EQ(vrep_map_unshipped_bits(map), 4);
    CHECK(!vrep_map_in_generation(map, 0, 0, sizes[0]));
    for (int i = 0; i < 4; i++)
        vrep_map_done(map, generation[i]);
    (void)vrep_map_clear(map, UINT64_MAX);
    CHECK_EQ(vrep_map_dirty_bits(map), 4);
    vrep_map_detach(map);
}

static void loops_agree_with_single_bits(void)
{
    static uint64_t words[3][512];
    static uint64_t out[512];
    for (int round = 0; round < 200; round++) {
        struct vrep_bits bits = {.words = 512, .sources = (unsigned)check_random_below(4)};
        memset(words, round % 3 == 0 ? 0xff : 0, sizeof words);
        for (unsigned s = 0; s < bits.sources; s++) {
            bits.source[s] = words[s];
            for (int i = 0; i < 3; i++) {
                uint64_t first = check_random_below(512 * 64),
                         last = first + check_random_below(512 * 64 - first);
                if (i % 2)
                    (void)vrep_bits_clear(words[s], first, last);
                else
                    (void)vrep_bits_set(words[s], first, last);
            }
        }
        for (int plain = 0; plain < 2; plain++) {
            vrep_bits_force_plain(plain);
            uint64_t count = 0, from = check_random_below(512 * 64), set = 512 * 64,
                     clear = 512 * 64;
            vrep_bits_union(&bits, out);
            for (uint64_t i = 0; i < 512 * 64; i++) {
                bool is = false;
                for (unsigned s = 0; s < bits.sources; s++)
                    is = is || (words[s][i / 64] >> (i % 64) & 1);
                CHECK_EQ(out[i / 64] >> (i % 64) & 1, is);
                count += is;
                if (i >= from && is && set == 512 * 64)
                    set = i;
                if (i >= from && !is && clear == 512 * 64)
                    clear = i;
            }
            CHECK_EQ(vrep_bits_count(&bits), count);
            CHECK_EQ(vrep_bits_next(&bits, from, true), set);
            CHECK_EQ(vrep_bits_next(&bits, from, false), clear);
        }
    }
    vrep_bits_force_plain(false);
}

/* Every run from a random bit on, with rooms of several sizes, against single steps. */
static void runs_agree_with_single_steps(void)
{
    static uint64_t words[2][512], runs[2048][2];
    static const uint64_t rooms[] = {1, 7, VREP_BITS_RUNS_MIN, 2048};
    for (int round = 0; round < 200; round++) {
        struct vrep_bits bits = {{words[0], words[1]}, (unsigned)round % 3, 512};
        memset(words, 0, sizeof words);
        for (int i = 0; i < 512; i++) {
            uint64_t noise = check_random();
            words[0][i] = round % 5 == 0   ? noise
                          : round % 5 == 1 ? 0 - (noise >> 63)
                                           : noise & check_random() & check_random();
            words[1][i] = i % 50 == 0 ? noise : 0;
        }
        if (round % 7 == 0)
            words[0][511] = ~UINT64_C(0);
        for (unsigned how = 0; how < 8; how++) {
            vrep_bits_force_plain(how % 2);
            uint64_t room = rooms[how / 2], from = check_random_below(512 * 64), at = from;
            while (from < 512 * 64) {
                uint64_t n = vrep_bits_runs(&bits, &from, runs, room);
                CHECK(n <= room);
                CHECK(n > 0 || from == 512 * 64);
                for (uint64_t i = 0; i < n; i++) {
                    CHECK_EQ(runs[i][0], vrep_bits_next(&bits, at, true));
                    at = vrep_bits_next(&bits, runs[i][0], false);
                    CHECK_EQ(runs[i][1], at);
                }
                CHECK(n == 0 || from >= at);
            }
            CHECK_EQ(vrep_bits_next(&bits, at, true), 512 * 64);
        }
    }
    vrep_bits_force_plain(false);
}

static void checkpoints_alternate_and_the_newest_wins(void)
{
    struct vrep_map *map = new_map();
    struct vrep_checkpoint *checkpoint;
    bool clean = true;
    CHECK_STATUS(vrep_checkpoint_load(prefix, map, &clean), VREP_E_NOT_FOUND);
    CHECK_OK(vrep_checkpoint_open(prefix, map, &checkpoint));
    CHECK_STATUS(vrep_checkpoint_load(prefix, map, &clean), VREP_E_CORRUPT);
    vrep_map_mark_unshipped(map, 0, 0, 1);
    CHECK_OK(vrep_checkpoint_write(checkpoint, 1, false));
    (void)vrep_map_mark(map, 1, BIT * UINT64_C(69999), 1);
    CHECK_OK(vrep_checkpoint_write(checkpoint, 2, true));
    vrep_checkpoint_close(checkpoint);
    vrep_map_detach(map);

    map = new_map();
    CHECK_OK(vrep_checkpoint_load(prefix, map, &clean));
    CHECK(clean);
    CHECK_EQ(vrep_map_unshipped_bits(map), 2);
    CHECK(dirty(map, 1, BIT * UINT64_C(69999)));
    vrep_map_detach(map);

    /* Damage in the newest: the one before it is taken, and the newest is the next to be written.
     */
    char file[80];
    (void)snprintf(file, sizeof file, "%s.1", prefix);
    int fd = open(file, O_RDWR);
    CHECK_EQ(pwrite(fd, "x", 1, 1152 + 4096), 1);
    close(fd);
    map = new_map();
    CHECK_OK(vrep_checkpoint_load(prefix, map, &clean));
    CHECK(!clean);
    CHECK_EQ(vrep_map_unshipped_bits(map), 1);
    CHECK_OK(vrep_checkpoint_open(prefix, map, &checkpoint));
    (void)snprintf(file, sizeof file, "%s.0", prefix);
    CHECK_OK(vrep_checkpoint_write(checkpoint, 3, false));
    CHECK_EQ(truncate(file, 2000), 0);
    CHECK_OK(vrep_checkpoint_load(prefix, map, &clean));
    vrep_checkpoint_close(checkpoint);
    (void)snprintf(file, sizeof file, "%s.1", prefix);
    CHECK_EQ(truncate(file, 100), 0);
    CHECK_STATUS(vrep_checkpoint_load(prefix, map, &clean), VREP_E_CORRUPT);
    vrep_map_detach(map);
}

static void another_geometry_is_refused(void)
{
    struct vrep_map *map = new_map(), *other;
    struct vrep_checkpoint *checkpoint;
    bool clean;
    CHECK_OK(vrep_checkpoint_open(prefix, map, &checkpoint));
    CHECK_OK(vrep_checkpoint_write(checkpoint, 0, false));
    CHECK_OK(vrep_checkpoint_write(checkpoint, 0, false));
    vrep_checkpoint_close(checkpoint);
    CHECK_STATUS(vrep_map_attach(path, group, target, sizes, 2, &other), VREP_E_BUSY);
    vrep_map_detach(map);
    uint64_t larger[2] = {sizes[0] + 512, sizes[1]};
    CHECK_STATUS(vrep_map_attach(path, group, target, larger, 2, &map), VREP_E_INVALID);
    CHECK_STATUS(vrep_map_attach(path, group, target, sizes, 1, &map), VREP_E_INVALID);
    CHECK_STATUS(vrep_map_attach(path, target, target, sizes, 2, &map), VREP_E_INVALID);
    CHECK_STATUS(vrep_map_attach(path, group, group, sizes, 2, &map), VREP_E_INVALID);
    CHECK_STATUS(vrep_map_create(path, group, target, sizes, 0, BIT, &map), VREP_E_INVALID);
    CHECK_STATUS(vrep_map_create(path, group, target, sizes, 65, BIT, &map), VREP_E_INVALID);
    CHECK_STATUS(vrep_map_create(path, group, target, sizes, 2, 65537, &map), VREP_E_INVALID);
    CHECK_STATUS(vrep_map_create(path, group, target, sizes, 2, 0, &map), VREP_E_INVALID);
    CHECK_OK(vrep_map_create(path, group, target, larger, 2, BIT, &map));
    CHECK_STATUS(vrep_checkpoint_load(prefix, map, &clean), VREP_E_INVALID);
    vrep_map_detach(map);
}

static void damaged_maps_are_refused(void)
{
    vrep_map_detach(new_map());
    struct vrep_map *map;
    struct vrep_map_header good, bad;
    int fd = open(path, O_RDWR);
    CHECK_EQ(pread(fd, &good, sizeof good, 0), sizeof good);
    for (unsigned at = 0; at < 128; at++) {
        bad = good;
        ((uint8_t *)&bad)[at] ^= 0x40;
        CHECK_EQ(pwrite(fd, &bad, sizeof bad, 0), sizeof bad);
        int status = vrep_map_attach(path, group, target, sizes, 2, &map);
        CHECK(status == VREP_E_CORRUPT || (status == VREP_E_VERSION && at >= 8 && at < 12));
        CHECK(vrep_map_open(path, &map) != VREP_OK);
    }
    for (int i = 0; i < 6; i++) {
        bad = good;
        switch (i) {
        case 0:
            bad.disk[0].bitmaps_at += 8;
            break;
        case 1:
            bad.disk[1].words = UINT64_MAX;
            break;
        case 2:
            bad.disk[0].bytes = UINT64_MAX;
            break;
        case 3:
            bad.open_generation = 4;
            break;
        case 4:
            bad.generation[0].state = VREP_GENERATION_FREE;
            break;
        default:
            bad.merge = 0x155;
            break;
        }
        CHECK_EQ(pwrite(fd, &bad, sizeof bad, 0), sizeof bad);
        CHECK_STATUS(vrep_map_attach(path, group, target, sizes, 2, &map), VREP_E_CORRUPT);
    }
    bad = good;
    bad.boot_id[3] ^= 1;
    bad.checksum = vrep_checksum32(&bad, offsetof(struct vrep_map_header, checksum));
    CHECK_EQ(pwrite(fd, &bad, sizeof bad, 0), sizeof bad);
    CHECK_STATUS(vrep_map_attach(path, group, target, sizes, 2, &map), VREP_E_GONE);
    CHECK_EQ(pwrite(fd, &good, sizeof good, 0), sizeof good);
    CHECK_EQ(ftruncate(fd, 5000), 0);
    CHECK_STATUS(vrep_map_attach(path, group, target, sizes, 2, &map), VREP_E_CORRUPT);
    CHECK_EQ(ftruncate(fd, 10), 0);
    CHECK_STATUS(vrep_map_open(path, &map), VREP_E_CORRUPT);
    close(fd);
    unlink(path);
    CHECK_STATUS(vrep_map_attach(path, group, target, sizes, 2, &map), VREP_E_NOT_FOUND);
}

struct writer {
    struct vrep_checkpoint *checkpoint;
    uint64_t stop;
};

static void *keep_writing(void *argument)
{
    struct writer *writer = argument;
    char file[80];
    for (unsigned which = 0; vrep_load_acquire_u64(&writer->stop) == 0; which = 1 - which) {
        uint64_t word;
        CHECK_OK(vrep_checkpoint_write(writer->checkpoint, 0, false));
        (void)snprintf(file, sizeof file, "%s.%u", prefix, which);
        int fd = open(file, O_RDONLY);
        CHECK_EQ(pread(fd, &word, sizeof word, sizeof(struct vrep_checkpoint_header)), 8);
        close(fd);
        CHECK(word >> 7 & 1);
    }
    return NULL;
}

/* One bit wanders through unshipped and the generations while checkpoints are taken; it is always
 * in one of them, so every checkpoint must hold it. */
static void a_checkpoint_never_misses_a_moving_bit(void)
{
    struct vrep_map *map = new_map();
    struct writer writer = {.stop = 0};
    pthread_t thread;
    bool clean;
    CHECK_OK(vrep_checkpoint_open(prefix, map, &writer.checkpoint));
    vrep_map_mark_unshipped(map, 0, BIT * 7, 1);
    CHECK_OK(vrep_checkpoint_write(writer.checkpoint, 0, false));
    CHECK_OK(vrep_checkpoint_write(writer.checkpoint, 0, false));
    CHECK_EQ(pthread_create(&thread, NULL, keep_writing, &writer), 0);
    for (uint64_t i = 1; i < 20000; i++) {
        struct vrep_map_move move;
        uint8_t g = vrep_map_mark(map, 0, BIT * 7, 1); /* a sync copy */
        vrep_map_raise(map, g, i);
        vrep_map_clear_unshipped(map, 0, BIT * 7, BIT);
        vrep_map_done(map, g);
        for (int s = 0; s < 5; s++) {
            (void)vrep_map_mark(map, 0, BIT * 9, 1);
            (void)vrep_map_seal(map, i, &move);
        }
        vrep_map_generations_to_unshipped(map);
        vrep_map_reset_inflight(map);
        (void)vrep_map_clear(map, i);
    }
    vrep_store_release_u64(&writer.stop, 1);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    vrep_checkpoint_close(writer.checkpoint);
    vrep_map_detach(map);
    char file[80];
    for (int i = 0; i < 2; i++) {
        map = new_map();
        CHECK_OK(vrep_checkpoint_load(prefix, map, &clean));
        CHECK(dirty(map, 0, BIT * 7));
        vrep_map_detach(map);
        (void)snprintf(file, sizeof file, "%s.%d", prefix, i);
        unlink(file);
    }
}

static void *write_once(void *argument)
{
    struct writer *writer = argument;
    CHECK_OK(vrep_checkpoint_write(writer->checkpoint, 0, false));
    vrep_store_release_u64(&writer->stop, 1);
    return NULL;
}

/* The same, where one step of the owner takes as long as it likes: the bit is in no bitmap. */
static void a_checkpoint_waits_for_a_bit_under_way(void)
{
    struct vrep_map *map = new_map();
    struct writer writer = {.stop = 0};
    pthread_t thread;
    bool clean;
    CHECK_OK(vrep_checkpoint_open(prefix, map, &writer.checkpoint));
    vrep_store_release_u64(&map->moves, map->moves + 1);
    CHECK_EQ(pthread_create(&thread, NULL, write_once, &writer), 0);
    usleep(20000);
    CHECK_EQ(vrep_load_acquire_u64(&writer.stop), 0);
    vrep_map_mark_unshipped(map, 0, BIT * 7, 1);
    vrep_store_release_u64(&map->moves, map->moves + 1);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    vrep_checkpoint_close(writer.checkpoint);
    vrep_map_detach(map);
    map = new_map();
    CHECK_OK(vrep_checkpoint_load(prefix, map, &clean));
    CHECK(dirty(map, 0, BIT * 7));
    vrep_map_detach(map);
    for (int i = 0; i < 2; i++) {
        char file[80];
        (void)snprintf(file, sizeof file, "%s.%d", prefix, i);
        unlink(file);
    }
}

int main(void)
{
    (void)snprintf(path, sizeof path, "/dev/shm/vrep-test-map-%d", (int)getpid());
    (void)snprintf(prefix, sizeof prefix, "/dev/shm/vrep-test-checkpoint-%d", (int)getpid());
    RUN(a_generation_clears_when_all_of_it_is_durable);
    RUN(an_acknowledgement_never_clears_unshipped);
    RUN(only_whole_bits_are_cleared);
    RUN(ranges_outside_a_disk_are_ignored);
    RUN(a_merge_moves_commands);
    RUN(a_merge_survives_its_owner);
    RUN(a_killed_owner_loses_no_bit);
    RUN(generations_move_to_unshipped);
    RUN(loops_agree_with_single_bits);
    RUN(runs_agree_with_single_steps);
    RUN(checkpoints_alternate_and_the_newest_wins);
    RUN(another_geometry_is_refused);
    RUN(damaged_maps_are_refused);
    RUN(a_checkpoint_never_misses_a_moving_bit);
    RUN(a_checkpoint_waits_for_a_bit_under_way);
    unlink(path);
    return check_report();
}
