#include "format/manifest.h"

#include <stdbool.h>
#include <string.h>

#include "base/endian.h"
#include "format/checksum.h"
#include "format/segment.h"

static bool all_zero(const uint8_t *bytes, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (bytes[i] != 0)
            return false;
    return true;
}

static bool name_ends(const char name[VREP_NAME_BYTES])
{
    const char *end = memchr(name, 0, VREP_NAME_BYTES);

    return end != NULL && end != name &&
           all_zero((const uint8_t *)end, VREP_NAME_BYTES - (size_t)(end - name));
}

/* The counts are bounded, so the sums cannot wrap. */
static bool place(struct vrep_manifest_view *view)
{
    const struct vrep_manifest_header *header = &view->header;

    if (header->epochs == 0 || header->epochs > VREP_MANIFEST_EPOCHS_MAX ||
        header->segments > VREP_MANIFEST_SEGMENTS_MAX ||
        header->runs > VREP_MANIFEST_SEGMENTS_MAX || header->disks == 0 ||
        header->disks > VREP_DISKS_MAX ||
        header->key_bytes > VREP_MANIFEST_KEYS_MAX * (4 + VREP_MANIFEST_KEY_BYTES_MAX))
        return false;
    view->epochs_at = sizeof *header;
    view->segments_at =
        view->epochs_at + (uint64_t)header->epochs * sizeof(struct vrep_manifest_epoch);
    view->runs_at =
        view->segments_at + (uint64_t)header->segments * sizeof(struct vrep_manifest_segment);
    view->disks_at = view->runs_at + (uint64_t)header->runs * sizeof(struct vrep_manifest_run);
    view->keys_at = view->disks_at + (uint64_t)header->disks * sizeof(struct vrep_manifest_disk);
    return true;
}

/* What version 1 did not have is zero in it. */
static bool is_first_version(const struct vrep_manifest_header *header)
{
    size_t at = offsetof(struct vrep_manifest_header, horizon);

    return all_zero((const uint8_t *)header + at,
                    offsetof(struct vrep_manifest_header, checksum) - at);
}

static int check_header(const struct vrep_manifest_header *header)
{
    if (header->magic != VREP_MANIFEST_MAGIC ||
        header->checksum !=
            vrep_checksum32(header, offsetof(struct vrep_manifest_header, checksum)))
        return VREP_E_CORRUPT;
    if (header->version == 0 || header->version > VREP_MANIFEST_VERSION)
        return VREP_E_VERSION;
    if (header->header_bytes != sizeof *header || header->number == 0 || header->lease == 0 ||
        header->next_segment == 0 || (header->flags & ~VREP_MANIFEST_UNPROTECTED) != 0 ||
        header->active_segment >= header->next_segment || header->reserved0 != 0 ||
        !name_ends(header->group_name) || header->horizon.reserved != 0 ||
        (header->horizon.seq == 0) != (header->horizon.epoch == 0))
        return VREP_E_CORRUPT;
    return header->version > 1 || is_first_version(header) ? VREP_OK : VREP_E_CORRUPT;
}

static bool check_epochs(const uint8_t *bytes, const struct vrep_manifest_header *header)
{
    uint32_t before = 0;

    for (uint32_t i = 0; i < header->epochs; i++) {
        struct vrep_manifest_epoch epoch;
        memcpy(&epoch, bytes + i * sizeof epoch, sizeof epoch);
        if (epoch.epoch <= before || epoch.state < VREP_EPOCH_ACCEPTED ||
            epoch.state > VREP_EPOCH_ABANDONED || epoch.parent.epoch >= epoch.epoch ||
            epoch.parent.reserved != 0 || all_zero(epoch.epoch_id, sizeof epoch.epoch_id))
            return false;
        before = epoch.epoch;
    }
    return true;
}

static bool check_segments(const uint8_t *bytes, const struct vrep_manifest_header *header)
{
    uint32_t before = 0;

    for (uint32_t i = 0; i < header->segments; i++) {
        struct vrep_manifest_segment segment;
        memcpy(&segment, bytes + i * sizeof segment, sizeof segment);
        if (segment.segment <= before || segment.segment >= header->next_segment ||
            segment.segment == header->active_segment ||
            (segment.generation != 0 && header->version == 1) ||
            segment.data_end < sizeof(struct vrep_segment_header) ||
            segment.data_end % VREP_COMMIT_ALIGN != 0 || segment.file_bytes < segment.data_end ||
            segment.file_bytes - segment.data_end < sizeof(struct vrep_index_trailer) ||
            segment.data_end > VREP_SEGMENT_BYTES_MAX || segment.first.reserved != 0 ||
            segment.last.reserved != 0 || vrep_position_compare(&segment.first, &segment.last) > 0)
            return false;
        before = segment.segment;
    }
    return true;
}

static bool check_runs(const uint8_t *bytes, const struct vrep_manifest_header *header)
{
    uint32_t before = 0;

    for (uint32_t i = 0; i < header->runs; i++) {
        struct vrep_manifest_run run;
        memcpy(&run, bytes + i * sizeof run, sizeof run);
        if (run.run == 0 || run.level == 0 || run.level > 64 || run.first_segment <= before ||
            run.last_segment < run.first_segment || run.last_segment >= header->next_segment ||
            run.file_bytes < sizeof(struct vrep_index_trailer) || run.reserved != 0)
            return false;
        before = run.last_segment;
    }
    return true;
}

static bool check_disks(const uint8_t *bytes, const struct vrep_manifest_header *header)
{
    uint64_t seen = 0;

    for (uint32_t i = 0; i < header->disks; i++) {
        struct vrep_manifest_disk disk;
        memcpy(&disk, bytes + i * sizeof disk, sizeof disk);
        if (!name_ends(disk.name) || disk.index >= VREP_DISKS_MAX || disk.flags != 0 ||
            (seen >> disk.index & 1) != 0 || disk.bytes % VREP_SECTOR_BYTES != 0)
            return false;
        seen |= UINT64_C(1) << disk.index;
    }
    return true;
}

static bool check_keys(const uint8_t *bytes, uint32_t len)
{
    uint32_t at = 0, keys = 0;

    while (at < len) {
        uint32_t key;
        if (len - at < 4 || ++keys > VREP_MANIFEST_KEYS_MAX)
            return false;
        key = vrep_le_load_u32(bytes + at);
        at += 4;
        if (key == 0 || key > VREP_MANIFEST_KEY_BYTES_MAX || key > len - at)
            return false;
        at += key;
    }
    return true;
}

int vrep_manifest_check(const void *buffer, size_t len, struct vrep_manifest_view *view)
{
    const uint8_t *bytes = buffer;
    const struct vrep_manifest_header *header = &view->header;
    uint8_t digest[VREP_DIGEST_BYTES];
    int status;

    memset(view, 0, sizeof *view);
    if (len < sizeof *header)
        return VREP_E_TORN;
    memcpy(&view->header, buffer, sizeof *header);
    status = check_header(header);
    if (status != VREP_OK)
        return status;
    if (!place(view) || view->keys_at + header->key_bytes - sizeof *header != header->body_bytes)
        return VREP_E_CORRUPT;
    if (len - sizeof *header != header->body_bytes)
        return len - sizeof *header < header->body_bytes ? VREP_E_TORN : VREP_E_CORRUPT;
    vrep_digest_once(bytes + sizeof *header, header->body_bytes, digest);
    if (memcmp(digest, header->digest, sizeof digest) != 0)
        return VREP_E_CORRUPT;
    if (!check_epochs(bytes + view->epochs_at, header) ||
        !check_segments(bytes + view->segments_at, header) ||
        !check_runs(bytes + view->runs_at, header) ||
        !check_disks(bytes + view->disks_at, header) ||
        !check_keys(bytes + view->keys_at, header->key_bytes))
        return VREP_E_CORRUPT;
    return VREP_OK;
}

int vrep_manifest_finish(void *buffer, size_t len)
{
    uint8_t *bytes = buffer;
    struct vrep_manifest_view view;
    struct vrep_manifest_header *header = &view.header;

    if (len < sizeof *header || len - sizeof *header > UINT32_MAX)
        return VREP_E_INVALID;
    memcpy(header, buffer, sizeof *header);
    header->magic = VREP_MANIFEST_MAGIC;
    header->version = VREP_MANIFEST_VERSION;
    header->header_bytes = sizeof *header;
    header->body_bytes = (uint32_t)(len - sizeof *header);
    if (!place(&view) || view.keys_at + header->key_bytes != len)
        return VREP_E_INVALID;
    vrep_digest_once(bytes + sizeof *header, header->body_bytes, header->digest);
    header->checksum = vrep_checksum32(header, offsetof(struct vrep_manifest_header, checksum));
    memcpy(buffer, header, sizeof *header);
    return vrep_manifest_check(buffer, len, &view) == VREP_OK ? VREP_OK : VREP_E_INVALID;
}
