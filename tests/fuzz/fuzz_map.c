/*
 * Files that a dead or hostile process left in shared memory or on a disk: ring,
 * change map, checkpoint and write-intent, each attached and used.
 *
 * Input: one byte of which file, one byte of options, then edits of a good file: each
 * is 4 bytes of offset, then 8 bytes that are written there; a last incomplete one cuts
 * the file. Checksums cannot be guessed: option 1 stores those of the headers anew.
 */
#include "fuzz.h"

#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "base/endian.h"
#include "base/status.h"
#include "format/checksum.h"
#include "ring/ring.h"
#include "track/intent.h"
#include "track/map.h"

enum { RING, MAP, CHECKPOINT, INTENT, FILES, SIGN = 1, GOOD_MAX = 1 << 17, EDIT = 12 };

static char path[FILES][64];
static char good_path[80]; /* the checkpoint's first file */
static uint8_t good[FILES][GOOD_MAX];
static size_t good_size[FILES];
static const uint8_t id[16] = {1};
static const uint64_t sizes[2] = {65536 * 100 + 512, (uint64_t)VREP_INTENT_BYTES * 3};

static const char *file_of(int which)
{
    return which == CHECKPOINT ? good_path : path[which];
}

static void keep_good(int which)
{
    int fd = open(file_of(which), O_RDONLY);
    ssize_t got = read(fd, good[which], GOOD_MAX);
    FUZZ_MUST(got > 0 && got < GOOD_MAX);
    good_size[which] = (size_t)got;
    close(fd);
}

static void make_ring(void)
{
    struct vrep_ring_config config = {
        .descriptors = 8, .slots = 4, .payload_bytes = 8 * 4096, .mode = 0600};
    struct vrep_ring *ring;
    memcpy(config.group_id, id, sizeof id);
    FUZZ_MUST(vrep_ring_create(path[RING], &config, &ring) == VREP_OK);
    for (int i = 0; i < 4; i++) {
        struct vrep_ring_slot *slot = vrep_ring_reserve(ring, 5000);
        slot->kind = VREP_KIND_WRITE;
        slot->length = 5000;
        vrep_ring_grant(ring, slot, 1);
        if (i == 3)
            break;
        (void)vrep_ring_stage(ring, slot, 1, 1);
        vrep_ring_commit(ring, slot);
    }
    FUZZ_MUST(vrep_ring_release(ring, 1) == VREP_OK);
    vrep_ring_detach(ring, false);
}

static void make_map(void)
{
    struct vrep_map *map;
    struct vrep_map_move move;
    struct vrep_checkpoint *checkpoint;
    FUZZ_MUST(vrep_map_create(path[MAP], id, id, sizes, 2, 65536, &map) == VREP_OK);
    for (int i = 0; i < 5; i++) {
        (void)vrep_map_mark(map, 0, (uint64_t)i * 65536, 1);
        (void)vrep_map_seal(map, (uint64_t)i, &move);
    }
    vrep_map_mark_unshipped(map, 1, 0, 65536);
    FUZZ_MUST(vrep_checkpoint_open(path[CHECKPOINT], map, &checkpoint) == VREP_OK);
    FUZZ_MUST(vrep_checkpoint_write(checkpoint, 1, true) == VREP_OK);
    vrep_checkpoint_close(checkpoint);
    vrep_map_detach(map);
}

static void prepare(void)
{
    static const char *const names[FILES] = {"ring", "map", "checkpoint", "intent"};
    struct vrep_intent *intent;
    char other[80];
    if (good_size[RING] > 0)
        return;
    for (int i = 0; i < FILES; i++)
        (void)snprintf(path[i], sizeof path[i], "/dev/shm/vrep-fuzz-%d-%s", (int)getpid(),
                       names[i]);
    (void)snprintf(good_path, sizeof good_path, "%s.0", path[CHECKPOINT]);
    make_ring();
    make_map();
    (void)snprintf(other, sizeof other, "%s.1", path[CHECKPOINT]);
    unlink(other);
    FUZZ_MUST(vrep_intent_create(path[INTENT], id, sizes, 2, &intent) == VREP_OK);
    (void)vrep_intent_begin(intent, 1, 0, 1);
    vrep_intent_prepare(intent);
    FUZZ_MUST(vrep_intent_write(intent) == VREP_OK);
    vrep_intent_close(intent);
    for (int i = 0; i < FILES; i++) {
        keep_good(i);
        unlink(file_of(i));
    }
}

/* The checksum, at the end of a header of these bytes. */
static void sign(uint8_t *header, size_t size, size_t have)
{
    if (have >= size)
        vrep_le_store_u32(header + size - 4, vrep_checksum32(header, size - 4));
}

static void sign_headers(int which, uint8_t *bytes, size_t size)
{
    switch (which) {
    case RING:
        sign(bytes, 512, size);
        break;
    case MAP:
        sign(bytes, 128, size);
        break;
    case CHECKPOINT:
        if (size >= sizeof(struct vrep_checkpoint_header))
            vrep_digest_once(bytes + sizeof(struct vrep_checkpoint_header),
                             size - sizeof(struct vrep_checkpoint_header),
                             bytes + offsetof(struct vrep_checkpoint_header, digest));
        sign(bytes, sizeof(struct vrep_checkpoint_header), size);
        break;
    default:
        sign(bytes, sizeof(struct vrep_intent_header), size);
        if (size > 4096)
            sign(bytes + 4096, sizeof(struct vrep_intent_header), size - 4096);
    }
}

static volatile uint8_t sink; /* reads payloads, so that a bad address shows */

static void use_reader(void)
{
    struct vrep_ring_reader *reader;
    if (vrep_ring_reader_open(path[RING], -1, -1, -1, &reader) != VREP_OK)
        return;
    uint64_t released = vrep_ring_reader_released(reader);
    for (uint64_t seq = released; seq != released + 12; seq++) {
        struct vrep_ring_desc desc;
        struct iovec iov[16];
        int n;
        if (vrep_ring_reader_desc(reader, seq, &desc) != VREP_OK ||
            vrep_ring_reader_iov(reader, &desc, iov, 16, &n) != VREP_OK)
            continue;
        for (int i = 0; i < n; i++)
            sink = ((uint8_t *)iov[i].iov_base)[iov[i].iov_len - 1];
    }
    vrep_ring_reader_close(reader);
}

static void use_ring(void)
{
    struct vrep_ring *ring;
    use_reader();
    if (vrep_ring_attach(path[RING], id, &ring) != VREP_OK)
        return;
    uint32_t remaining = vrep_ring_judge(ring);
    FUZZ_CANARY(vrep_ring_head(ring) == 2);
    FUZZ_MUST(remaining <= vrep_ring_slots(ring));
    FUZZ_MUST(vrep_ring_free_bytes(ring) <= vrep_ring_payload_bytes(ring));
    FUZZ_MUST(vrep_ring_release(ring, vrep_ring_head(ring)) == VREP_OK);
    for (uint32_t i = 0; i < vrep_ring_slots(ring); i++) {
        struct vrep_ring_slot *slot = vrep_ring_slot_at(ring, i);
        struct iovec iov[16];
        if (slot->state == VREP_SLOT_FREE)
            continue;
        (void)vrep_ring_iov(ring, slot, 0, slot->length, iov, 16);
        vrep_ring_cancel(ring, slot);
    }
    FUZZ_MUST(vrep_ring_free_bytes(ring) == vrep_ring_payload_bytes(ring));
    vrep_ring_detach(ring, true);
}

static void walk_map(struct vrep_map *map)
{
    uint64_t offset, length, at = 0;
    bool dirty;
    while (vrep_map_next_run(map, 0, at, &length, &dirty)) {
        FUZZ_MUST(length > 0);
        at += length;
    }
    for (at = 0; vrep_map_next_unshipped(map, 1, at, 1 << 20, &offset, &length);) {
        FUZZ_MUST(offset >= at && length > 0);
        at = offset + length;
    }
    FUZZ_MUST(vrep_map_unshipped_bits(map) <= vrep_map_dirty_bits(map));
    (void)vrep_map_dirty_bytes(map);
}

static void use_map(void)
{
    struct vrep_map *map;
    struct vrep_map_move move;
    if (vrep_map_open(path[MAP], &map) == VREP_OK) {
        walk_map(map);
        vrep_map_detach(map);
    }
    if (vrep_map_attach(path[MAP], id, id, sizes, 2, &map) != VREP_OK)
        return;
    vrep_map_reset_inflight(map);
    walk_map(map);
    for (uint8_t g = 0; g < 4; g++)
        (void)vrep_map_count(map, g);
    (void)vrep_map_mark(map, 0, 0, 65536);
    (void)vrep_map_seal(map, 9, &move);
    (void)vrep_map_clear(map, 9);
    vrep_map_generations_to_unshipped(map);
    walk_map(map);
    vrep_map_detach(map);
}

static void use_checkpoint(void)
{
    struct vrep_map *map;
    bool clean;
    FUZZ_MUST(vrep_map_create(path[MAP], id, id, sizes, 2, 65536, &map) == VREP_OK);
    if (vrep_checkpoint_load(path[CHECKPOINT], map, &clean) == VREP_OK)
        walk_map(map);
    vrep_map_detach(map);
    unlink(path[MAP]);
}

static void use_intent(void)
{
    struct vrep_intent *intent;
    uint64_t offset, length, at = 0;
    if (vrep_intent_open(path[INTENT], id, sizes, 2, &intent) != VREP_OK)
        return;
    while (vrep_intent_next(intent, 1, at, &offset, &length)) {
        FUZZ_MUST(length > 0 && offset + length <= sizes[1]);
        at = offset + length;
    }
    (void)vrep_intent_begin(intent, 0, 0, 1);
    vrep_intent_close(intent);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t bytes[GOOD_MAX];
    prepare();
    if (size < 2)
        return 0;
    int which = data[0] % FILES;
    size_t have = good_size[which], at = 2;
    memcpy(bytes, good[which], have);
    for (; size - at >= EDIT; at += EDIT) {
        size_t where = vrep_le_load_u32(data + at) % (good_size[which] - 8);
        memcpy(bytes + where, data + at + 4, 8);
    }
    if (size - at >= 4)
        have = vrep_le_load_u32(data + at) % (have + 1);
    if (data[1] & SIGN)
        sign_headers(which, bytes, have);
    int fd = open(file_of(which), O_RDWR | O_CREAT | O_TRUNC, 0600);
    FUZZ_MUST(fd >= 0 && write(fd, bytes, have) == (ssize_t)have);
    close(fd);
    static void (*const use[FILES])(void) = {use_ring, use_map, use_checkpoint, use_intent};
    use[which]();
    unlink(file_of(which));
    return 0;
}
