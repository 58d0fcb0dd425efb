#include "format/manifest.h"

#include "base/endian.h"
#include "check.h"
#include "format/segment.h"

enum { EPOCHS = 3, SEGMENTS = 2, RUNS = 1, DISKS = 2, KEY_BYTES = 4 + 5 + 4 + 1 };

struct file {
    struct vrep_manifest_header header;
    struct vrep_manifest_epoch epochs[EPOCHS];
    struct vrep_manifest_segment segments[SEGMENTS];
    struct vrep_manifest_run runs[RUNS];
    struct vrep_manifest_disk disks[DISKS];
    uint8_t keys[KEY_BYTES];
    uint8_t beyond[2];
};
enum { LEN = offsetof(struct file, beyond) };

static struct file lawful(void)
{
    struct file file;

    memset(&file, 0, sizeof file);
    file.header.number = 12;
    file.header.lease = 2;
    file.header.epochs = EPOCHS;
    file.header.segments = SEGMENTS;
    file.header.runs = RUNS;
    file.header.disks = DISKS;
    file.header.key_bytes = KEY_BYTES;
    file.header.next_segment = 4;
    file.header.active_segment = 3;
    memcpy(file.header.group_name, "shop", 5);
    for (uint32_t i = 0; i < EPOCHS; i++) {
        file.epochs[i].epoch = i + 1;
        file.epochs[i].state = VREP_EPOCH_ACCEPTED;
        file.epochs[i].epoch_id[0] = (uint8_t)(i + 1);
        file.epochs[i].parent = (struct vrep_position){.epoch = i, .seq = 10 * i};
    }
    for (uint32_t i = 0; i < SEGMENTS; i++) {
        file.segments[i].segment = i + 1;
        file.segments[i].data_end = 1024;
        file.segments[i].file_bytes = 2048;
        file.segments[i].first = (struct vrep_position){.epoch = 1, .seq = 1 + i};
        file.segments[i].last = file.segments[i].first;
    }
    file.runs[0] = (struct vrep_manifest_run){
        .run = 1, .level = 1, .first_segment = 1, .last_segment = 2, .file_bytes = 512};
    for (uint32_t i = 0; i < DISKS; i++) {
        file.disks[i].name[0] = (char)('a' + i);
        file.disks[i].bytes = 4096;
        file.disks[i].index = i;
    }
    vrep_le_store_u32(file.keys, 5);
    vrep_le_store_u32(file.keys + 9, 1);
    return file;
}

static void a_lawful_manifest_is_read(void)
{
    struct file file = lawful();
    struct vrep_manifest_view view;

    CHECK_OK(vrep_manifest_finish(&file, LEN));
    CHECK_OK(vrep_manifest_check(&file, LEN, &view));
    CHECK_EQ(view.epochs_at, offsetof(struct file, epochs));
    CHECK_EQ(view.segments_at, offsetof(struct file, segments));
    CHECK_EQ(view.runs_at, offsetof(struct file, runs));
    CHECK_EQ(view.disks_at, offsetof(struct file, disks));
    CHECK_EQ(view.keys_at, offsetof(struct file, keys));
    CHECK_STATUS(vrep_manifest_check(&file, LEN + 1, &view), VREP_E_CORRUPT);
    for (size_t cut = 0; cut < LEN; cut++)
        CHECK_STATUS(vrep_manifest_check(&file, cut, &view), VREP_E_TORN);
}

static void every_flipped_bit_is_seen(void)
{
    struct file good = lawful(), file;
    struct vrep_manifest_view view;

    CHECK_OK(vrep_manifest_finish(&good, LEN));
    for (size_t bit = 0; bit < (size_t)LEN * 8; bit++) {
        uint8_t *bytes = (uint8_t *)&file;
        memcpy(&file, &good, sizeof file);
        bytes[bit / 8] = (uint8_t)(bytes[bit / 8] ^ 1u << bit % 8);
        CHECK(vrep_manifest_check(&file, LEN, &view) < 0);
    }
}

/* What may not be written is not finished, with any checksum. */
#define REFUSED(change)                                                                            \
    do {                                                                                           \
        struct file file = lawful();                                                               \
        change;                                                                                    \
        CHECK_STATUS(vrep_manifest_finish(&file, LEN), VREP_E_INVALID);                            \
    } while (0)

static void unlawful_entries_are_refused(void)
{
    REFUSED(file.header.number = 0);
    REFUSED(file.header.lease = 0);
    REFUSED(file.header.flags = 2);
    REFUSED(file.header.group_name[0] = 0);
    REFUSED(memset(file.header.group_name, 'x', VREP_NAME_BYTES));
    REFUSED(file.header.epochs = 0);
    REFUSED(file.header.epochs = UINT32_MAX);
    REFUSED(file.header.segments = UINT32_MAX);
    REFUSED(file.header.disks = 65);
    REFUSED(file.header.key_bytes++);
    REFUSED(file.header.active_segment = 4);
    REFUSED(file.header.active_segment = 2);
    REFUSED(file.epochs[1].epoch = 1);
    REFUSED(file.epochs[1].state = 4);
    REFUSED(file.epochs[1].state = 0);
    REFUSED(file.epochs[1].parent.epoch = 2);
    REFUSED(file.epochs[2].epoch_id[0] = 0);
    REFUSED(file.segments[1].segment = 1);
    REFUSED(file.segments[1].segment = 4);
    REFUSED(file.segments[0].data_end = 1025);
    REFUSED(file.segments[0].data_end = 64);
    REFUSED(file.segments[0].file_bytes = 1024 + 255);
    REFUSED(file.segments[0].last.seq = 0);
    REFUSED(file.runs[0].level = 0);
    REFUSED(file.runs[0].last_segment = 4);
    REFUSED(file.runs[0].first_segment = 0);
    REFUSED(file.disks[1].index = 0);
    REFUSED(file.disks[1].index = 64);
    REFUSED(file.disks[1].bytes = 4097);
    REFUSED(file.disks[1].name[0] = 0);
    REFUSED(vrep_le_store_u32(file.keys, 0));
    REFUSED(vrep_le_store_u32(file.keys, 513));
    REFUSED(vrep_le_store_u32(file.keys + 9, 2));
}

int main(void)
{
    RUN(a_lawful_manifest_is_read);
    RUN(every_flipped_bit_is_seen);
    RUN(unlawful_entries_are_refused);
    return check_report();
}
