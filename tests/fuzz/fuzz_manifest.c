/*
 * Manifests that are damaged, or written by somebody else.
 *
 * Input: one byte of options, then the file. Option 1 makes sizes, digest and checksum right,
 * so that the entries behind them are judged. What is accepted must keep its promises to the
 * code that reads it: parts in order and inside the file, names that end, numbers that rise.
 */
#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

#include "base/endian.h"
#include "format/checksum.h"
#include "format/manifest.h"

enum { REPAIR = 1 };

static void repair(uint8_t *bytes, size_t size)
{
    struct vrep_manifest_header header;

    if (size < sizeof header)
        return;
    memcpy(&header, bytes, sizeof header);
    header.magic = VREP_MANIFEST_MAGIC;
    header.version = VREP_MANIFEST_VERSION;
    header.header_bytes = sizeof header;
    header.body_bytes = (uint32_t)(size - sizeof header);
    vrep_digest_once(bytes + sizeof header, header.body_bytes, header.digest);
    header.checksum = vrep_checksum32(&header, offsetof(struct vrep_manifest_header, checksum));
    memcpy(bytes, &header, sizeof header);
}

static void check_view(const uint8_t *bytes, size_t size, const struct vrep_manifest_view *view)
{
    uint32_t before = 0;

    FUZZ_MUST(view->epochs_at == sizeof view->header);
    FUZZ_MUST(view->epochs_at <= view->segments_at && view->segments_at <= view->runs_at);
    FUZZ_MUST(view->runs_at <= view->disks_at && view->disks_at <= view->keys_at);
    FUZZ_MUST(view->keys_at + view->header.key_bytes == size);
    FUZZ_MUST(memchr(view->header.group_name, 0, VREP_NAME_BYTES) != NULL);
    for (uint32_t i = 0; i < view->header.epochs; i++) {
        struct vrep_manifest_epoch epoch;
        memcpy(&epoch, bytes + view->epochs_at + i * sizeof epoch, sizeof epoch);
        FUZZ_MUST(epoch.epoch > before && epoch.parent.epoch < epoch.epoch);
        before = epoch.epoch;
    }
    for (uint32_t i = 0; i < view->header.disks; i++) {
        struct vrep_manifest_disk disk;
        memcpy(&disk, bytes + view->disks_at + i * sizeof disk, sizeof disk);
        FUZZ_MUST(memchr(disk.name, 0, VREP_NAME_BYTES) != NULL && disk.index < VREP_DISKS_MAX);
    }
    for (uint64_t at = view->keys_at; at < size;)
        at += 4 + vrep_le_load_u32(bytes + at);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct vrep_manifest_view view;
    uint8_t *bytes;

    if (size < 1)
        return 0;
    bytes = malloc(size);
    FUZZ_MUST(bytes != NULL);
    memcpy(bytes, data + 1, --size);
    if (data[0] & REPAIR)
        repair(bytes, size);
    if (vrep_manifest_check(bytes, size, &view) == VREP_OK) {
        check_view(bytes, size, &view);
        FUZZ_CANARY(view.header.flags == VREP_MANIFEST_UNPROTECTED);
        FUZZ_MUST(vrep_manifest_finish(bytes, size) == VREP_OK);
    }
    free(bytes);
    return 0;
}
