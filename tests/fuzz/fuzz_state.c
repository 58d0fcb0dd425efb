/*
 * The durable state of a group as a crash, a bad disk or a hostile hand may leave it: two slots of
 * struct vrep_state, loaded, opened and written again.
 *
 * Input: one byte of options, then edits of a good file, each 4 bytes of offset and 8 bytes that
 * are written there; a last incomplete one cuts the file. Checksums cannot be guessed: options 1
 * and 2 store that of the first and of the second slot anew.
 */
#include "fuzz.h"

#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

#include "base/endian.h"
#include "base/status.h"
#include "filter/state.h"
#include "format/checksum.h"

enum { SIGN = 1, SLOTS = 2, SLOT_BYTES = sizeof(struct vrep_state), EDIT = 12 };

static char path[64];
static uint8_t good[SLOTS * SLOT_BYTES];
static const uint8_t id[16] = {1};

static void store(const uint8_t *bytes, size_t size)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    FUZZ_MUST(fd >= 0 && write(fd, bytes, size) == (ssize_t)size);
    close(fd);
}

static void prepare(void)
{
    if (path[0] != '\0')
        return;
    snprintf(path, sizeof path, "/dev/shm/vrep-fuzz-state-%d", (int)getpid());
    struct vrep_state_file file;
    struct vrep_state state = {.flags = VREP_STATE_OPEN, .epoch = 1, .disks = 2};
    memcpy(state.group_id, id, sizeof id);
    unlink(path);
    FUZZ_MUST(vrep_state_open(path, &file) == VREP_OK);
    for (uint64_t i = 0; i < 3; i++) { /* so that the first slot is neither empty nor the newest */
        state.seq_limit = i << 24;
        FUZZ_MUST(vrep_state_write(&file, &state) == VREP_OK);
    }
    vrep_state_close(&file);
    int fd = open(path, O_RDONLY);
    FUZZ_MUST(read(fd, good, sizeof good) == (ssize_t)sizeof good);
    close(fd);
}

/* What a slot is worth, found out by other code than that under test. */
static bool whole(const uint8_t *bytes, size_t size, unsigned slot, struct vrep_state *out)
{
    size_t at = (size_t)slot * SLOT_BYTES, have = size < at ? 0 : size - at;
    memset(out, 0, SLOT_BYTES); /* what was cut off reads as zeroes */
    memcpy(out, bytes + at, have < SLOT_BYTES ? have : SLOT_BYTES);
    return out->magic == VREP_STATE_MAGIC && out->version == VREP_STATE_VERSION &&
           out->checksum == vrep_checksum32(out, SLOT_BYTES - 4) && out->disks >= 1 &&
           out->disks <= VREP_DISKS_MAX && out->counter % SLOTS == slot &&
           out->counter < VREP_STATE_COUNTER_LIMIT;
}

static void check_load(const uint8_t *bytes, size_t size)
{
    static struct vrep_state slot[SLOTS], loaded;
    int status = vrep_state_load(path, id, &loaded);
    bool first = whole(bytes, size, 0, &slot[0]), second = whole(bytes, size, 1, &slot[1]);
    if (!first && !second) {
        FUZZ_MUST(status == VREP_E_CORRUPT || status == VREP_E_VERSION);
        return;
    }
    unsigned best = second && (!first || slot[1].counter > slot[0].counter) ? 1 : 0;
    bool ours = memcmp(slot[best].group_id, id, sizeof id) == 0;
    FUZZ_MUST(status == (ours ? VREP_OK : VREP_E_INVALID));
    FUZZ_MUST(memcmp(&loaded, &slot[best], SLOT_BYTES) == 0);
    /* Both are whole, and the first became the newer one. */
    FUZZ_CANARY(ours && best == 0 && second);
}

/* Whatever was there: what is written is what is loaded, and the newest slot that was there stays
 * as it is until then. */
static void check_write(void)
{
    static struct vrep_state before, state, loaded;
    struct vrep_state_file file;
    int known = vrep_state_load(path, id, &before);
    if (vrep_state_open(path, &file) != VREP_OK) {
        FUZZ_MUST(known != VREP_OK);
        return;
    }
    memset(&state, 0, sizeof state);
    memcpy(state.group_id, id, sizeof id);
    state.disks = 1;
    state.seq_limit = 77;
    bool last = file.counter == VREP_STATE_COUNTER_LIMIT - 1;
    FUZZ_MUST(vrep_state_write(&file, &state) == (last ? VREP_E_FULL : VREP_OK));
    vrep_state_close(&file);
    if (last)
        return;
    FUZZ_MUST(vrep_state_load(path, id, &loaded) == VREP_OK && loaded.seq_limit == 77);
    if (known != VREP_OK)
        return;
    FUZZ_MUST(loaded.counter == before.counter + 1);
    int fd = open(path, O_RDWR);
    off_t at = (off_t)(loaded.counter % SLOTS) * SLOT_BYTES;
    FUZZ_MUST(fd >= 0 && pwrite(fd, "torn", 4, at) == 4);
    close(fd);
    FUZZ_MUST(vrep_state_load(path, id, &loaded) == VREP_OK &&
              memcmp(&loaded, &before, SLOT_BYTES) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static uint8_t bytes[SLOTS * SLOT_BYTES];
    prepare();
    if (size < 1)
        return 0;
    size_t have = sizeof bytes, at = 1;
    memcpy(bytes, good, sizeof bytes);
    for (; size - at >= EDIT; at += EDIT) {
        size_t where = vrep_le_load_u32(data + at) % (sizeof bytes - 8);
        memcpy(bytes + where, data + at + 4, 8);
    }
    if (size - at >= 4)
        have = vrep_le_load_u32(data + at) % (sizeof bytes + 1);
    for (unsigned slot = 0; slot < SLOTS; slot++)
        if (data[0] & (SIGN << slot))
            vrep_le_store_u32(bytes + (size_t)(slot + 1) * SLOT_BYTES - 4,
                              vrep_checksum32(bytes + (size_t)slot * SLOT_BYTES, SLOT_BYTES - 4));
    store(bytes, have);
    check_load(bytes, have);
    check_write();
    unlink(path);
    return 0;
}
