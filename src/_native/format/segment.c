#include "format/segment.h"

#include <stdbool.h>
#include <string.h>

#include "base/endian.h"
#include "format/checksum.h"
#include "format/record.h"

static bool all_zero(const uint8_t *bytes, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (bytes[i] != 0)
            return false;
    return true;
}

static uint32_t checksum_of(const void *block, size_t at)
{
    return vrep_checksum32(block, at);
}

void vrep_segment_header_finish(struct vrep_segment_header *header)
{
    header->magic = VREP_SEGMENT_MAGIC;
    /* What was received is written as before: an older release reads it. */
    header->version = header->flags == 0 ? 1 : VREP_SEGMENT_VERSION;
    header->header_bytes = sizeof *header;
    memset(header->reserved, 0, sizeof header->reserved);
    header->checksum = checksum_of(header, offsetof(struct vrep_segment_header, checksum));
}

int vrep_segment_header_check(const struct vrep_segment_header *header)
{
    if (header->magic != VREP_SEGMENT_MAGIC ||
        header->checksum != checksum_of(header, offsetof(struct vrep_segment_header, checksum)))
        return VREP_E_CORRUPT;
    if (header->version == 0 || header->version > VREP_SEGMENT_VERSION)
        return VREP_E_VERSION;
    if (header->header_bytes != sizeof *header || (header->flags & ~VREP_SEGMENT_FOLDED) != 0 ||
        (header->flags != 0) != (header->version == 2) || header->segment == 0 ||
        header->after.reserved != 0 || !all_zero(header->reserved, sizeof header->reserved))
        return VREP_E_CORRUPT;
    return VREP_OK;
}

void vrep_fold_finish(struct vrep_fold *fold)
{
    fold->magic = VREP_FOLD_MAGIC;
    fold->version = VREP_FOLD_VERSION;
    fold->block_bytes = sizeof *fold;
    memset(fold->reserved1, 0, sizeof fold->reserved1);
    fold->checksum = checksum_of(fold, offsetof(struct vrep_fold, checksum));
}

int vrep_fold_check(const struct vrep_fold *fold)
{
    if (fold->magic != VREP_FOLD_MAGIC ||
        fold->checksum != checksum_of(fold, offsetof(struct vrep_fold, checksum)))
        return VREP_E_CORRUPT;
    if (fold->version != VREP_FOLD_VERSION)
        return VREP_E_VERSION;
    if (fold->block_bytes != sizeof *fold || fold->segment == 0 || fold->generation == 0 ||
        (fold->flags & ~VREP_FOLD_TALLIED) != 0 || fold->reserved0 != 0 ||
        fold->horizon.reserved != 0 || fold->end.reserved != 0 ||
        ((fold->flags & VREP_FOLD_TALLIED) == 0 && !all_zero(fold->tally, sizeof fold->tally)) ||
        !all_zero(fold->reserved1, sizeof fold->reserved1))
        return VREP_E_CORRUPT;
    return VREP_OK;
}

size_t vrep_segment_data_at(const struct vrep_segment_header *header)
{
    bool folded = (header->flags & VREP_SEGMENT_FOLDED) != 0;

    return sizeof *header + (folded ? sizeof(struct vrep_fold) : 0);
}

void vrep_commit_finish(struct vrep_commit *commit)
{
    commit->magic = VREP_COMMIT_MAGIC;
    commit->version = VREP_COMMIT_VERSION;
    commit->block_bytes = sizeof *commit;
    memset(commit->reserved, 0, sizeof commit->reserved);
    commit->checksum = checksum_of(commit, offsetof(struct vrep_commit, checksum));
}

int vrep_commit_check(const struct vrep_commit *commit)
{
    if (commit->magic != VREP_COMMIT_MAGIC ||
        commit->checksum != checksum_of(commit, offsetof(struct vrep_commit, checksum)))
        return VREP_E_CORRUPT;
    if (commit->version != VREP_COMMIT_VERSION)
        return VREP_E_VERSION;
    if (commit->block_bytes != sizeof *commit || commit->number == 0 ||
        commit->start < sizeof(struct vrep_segment_header) ||
        commit->start % VREP_COMMIT_ALIGN != 0 || commit->end < commit->start ||
        commit->end > VREP_SEGMENT_BYTES_MAX || commit->last.reserved != 0 ||
        commit->durable.reserved != 0 || !all_zero(commit->reserved, sizeof commit->reserved))
        return VREP_E_CORRUPT;
    return VREP_OK;
}

int vrep_position_compare(const struct vrep_position *a, const struct vrep_position *b)
{
    if (a->epoch != b->epoch)
        return a->epoch < b->epoch ? -1 : 1;
    if (a->seq != b->seq)
        return a->seq < b->seq ? -1 : 1;
    return 0;
}

struct walk {
    const uint8_t *bytes;
    size_t len;
    const uint8_t *group_id;
    uint32_t segment;
};

/* Is the whole block at `at` a commit block of this segment? */
static bool load_commit(const struct walk *walk, size_t at, struct vrep_commit *commit)
{
    if (at > walk->len || walk->len - at < sizeof *commit ||
        vrep_le_load_u32(walk->bytes + at) != VREP_COMMIT_MAGIC)
        return false;
    memcpy(commit, walk->bytes + at, sizeof *commit);
    return vrep_commit_check(commit) == VREP_OK && commit->segment == walk->segment &&
           memcmp(commit->group_id, walk->group_id, sizeof commit->group_id) == 0;
}

/* Takes the commit that starts at `start`. False: it is not whole, *wrong says where. */
static bool take_commit(const struct walk *walk, size_t start, struct vrep_segment_scan *scan,
                        struct vrep_commit *commit, size_t *wrong)
{
    struct vrep_position last = scan->last;
    struct vrep_record record;
    uint8_t digest[VREP_DIGEST_BYTES];
    uint32_t records = 0;
    size_t at = start, block;

    while (walk->len - at >= sizeof record &&
           vrep_le_load_u32(walk->bytes + at) == VREP_RECORD_MAGIC) {
        *wrong = at;
        memcpy(&record, walk->bytes + at, sizeof record);
        if (vrep_record_check(&record) != VREP_OK ||
            walk->len - at - sizeof record < record.body_bytes)
            return false;
        last =
            (struct vrep_position){.epoch = record.epoch, .lane = record.lane, .seq = record.seq};
        at += sizeof record + record.body_bytes;
        records++;
    }
    *wrong = at;
    block = (at + VREP_COMMIT_ALIGN - 1) & ~(size_t)(VREP_COMMIT_ALIGN - 1);
    if (!load_commit(walk, block, commit) || commit->number != scan->commits + 1 ||
        commit->start != start || commit->end != at || commit->records != records ||
        vrep_position_compare(&commit->last, &last) != 0)
        return false;
    *wrong = start;
    vrep_digest_once(walk->bytes + start, block - start, digest);
    return memcmp(digest, commit->digest, sizeof digest) == 0;
}

/* The first commit block above `from` that proves that the commit after the last
 * whole one was durable; 0 when there is none. */
static size_t find_proof(const struct walk *walk, size_t from, const struct vrep_segment_scan *scan)
{
    struct vrep_commit commit;

    for (size_t at = from; at < walk->len; at += VREP_COMMIT_ALIGN) {
        if (!load_commit(walk, at, &commit) || commit.number <= scan->commits)
            continue;
        if (commit.number >= scan->commits + 2 ||
            vrep_position_compare(&commit.durable, &scan->last) > 0)
            return at;
    }
    return 0;
}

int vrep_segment_scan(const void *buffer, size_t len, const uint8_t group_id[16], uint32_t segment,
                      const struct vrep_position *known, struct vrep_commit *out, size_t cap,
                      struct vrep_segment_scan *scan)
{
    const struct walk walk = {
        .bytes = buffer, .len = len, .group_id = group_id, .segment = segment};
    struct vrep_segment_header header;
    struct vrep_commit commit;
    size_t wrong = 0;
    int status;

    memset(scan, 0, sizeof *scan);
    if (len < sizeof header || len > VREP_SEGMENT_BYTES_MAX)
        return VREP_E_CORRUPT;
    memcpy(&header, buffer, sizeof header);
    status = vrep_segment_header_check(&header);
    if (status != VREP_OK)
        return status;
    if (header.segment != segment || memcmp(header.group_id, group_id, 16) != 0)
        return VREP_E_CORRUPT;

    scan->end = vrep_segment_data_at(&header);
    if (scan->end > sizeof header) {
        struct vrep_fold fold;
        scan->end = 0; /* as with a header that is wrong */
        if (len < sizeof header + sizeof fold)
            return VREP_E_CORRUPT;
        memcpy(&fold, walk.bytes + sizeof header, sizeof fold);
        status = vrep_fold_check(&fold);
        if (status != VREP_OK)
            return status;
        if (fold.segment != segment)
            return VREP_E_CORRUPT;
        scan->end = sizeof header + sizeof fold;
    }
    scan->last = header.after;
    scan->durable = header.after;
    while (scan->end < len && take_commit(&walk, scan->end, scan, &commit, &wrong)) {
        if (out != NULL && scan->commits < cap)
            out[scan->commits] = commit;
        scan->commits++;
        scan->records += commit.records;
        scan->last = commit.last;
        if (vrep_position_compare(&commit.durable, &scan->durable) > 0)
            scan->durable = commit.durable;
        scan->end = ((commit.end + VREP_COMMIT_ALIGN - 1) & ~(uint64_t)(VREP_COMMIT_ALIGN - 1)) +
                    sizeof commit;
    }
    scan->wrong_at = scan->end < len ? wrong : len;
    scan->proof_at = find_proof(&walk, scan->end, scan);
    if (scan->proof_at != 0)
        return VREP_E_CORRUPT;
    if (known != NULL && vrep_position_compare(known, &scan->last) > 0)
        return VREP_E_CORRUPT;
    return VREP_OK;
}
