/*
 * Segments as a crash, a bad disk or somebody else left them.
 *
 * Input: one byte of options, then the file. Option 1 makes checksums and digests right where
 * the structure allows it (header, records, commit blocks), so that what stands behind them is
 * reached. Whatever comes: the prefix is inside the file, a shorter file never has a longer
 * prefix that contradicts it, and what was taken scans as records.
 */
#include "fuzz.h"

#include <stdlib.h>
#include <string.h>

#include "base/endian.h"
#include "format/checksum.h"
#include "format/record.h"
#include "format/segment.h"

enum { REPAIR = 1, COMMITS_MAX = 64, FOUND_MAX = 256 };

static const uint8_t group[16] = {0};

static void repair(uint8_t *bytes, size_t size)
{
    struct vrep_segment_header header;
    size_t at = sizeof header, start = at;
    uint32_t number = 1, records = 0;
    struct vrep_position last;

    if (size < sizeof header)
        return;
    memcpy(&header, bytes, sizeof header);
    header.segment = 1;
    header.flags = 0;
    header.after.reserved = 0;
    memset(header.group_id, 0, sizeof header.group_id);
    vrep_segment_header_finish(&header);
    memcpy(bytes, &header, sizeof header);
    last = header.after;
    while (size - at >= 64) {
        struct vrep_record record;
        memcpy(&record, bytes + at, sizeof record);
        if (record.magic == VREP_RECORD_MAGIC) {
            record.version = VREP_RECORD_VERSION;
            record.reserved = 0;
            vrep_record_finish(&record);
            memcpy(bytes + at, &record, sizeof record);
            if (record.body_bytes > size - at - sizeof record)
                return;
            at += sizeof record + record.body_bytes;
            last = (struct vrep_position){.epoch = record.epoch, .seq = record.seq};
            last.lane = record.lane;
            records++;
            continue;
        }
        size_t block = (at + 63) & ~(size_t)63;
        struct vrep_commit commit;
        if (block > size || size - block < sizeof commit ||
            vrep_le_load_u32(bytes + block) != VREP_COMMIT_MAGIC)
            return;
        memcpy(&commit, bytes + block, sizeof commit);
        commit.segment = 1;
        commit.number = number++;
        commit.start = start;
        commit.end = at;
        commit.last = last;
        commit.records = records;
        commit.durable.reserved = 0;
        memset(commit.group_id, 0, sizeof commit.group_id);
        vrep_digest_once(bytes + start, block - start, commit.digest);
        vrep_commit_finish(&commit);
        memcpy(bytes + block, &commit, sizeof commit);
        at = start = block + sizeof commit;
        records = 0;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct vrep_segment_scan all, part;
    struct vrep_commit commits[COMMITS_MAX];
    static struct vrep_record_found found[FOUND_MAX];
    size_t count, consumed;
    uint8_t *bytes;
    int status;

    if (size < 1)
        return 0;
    bytes = malloc(size); /* exact, so that the sanitizer sees the end */
    FUZZ_MUST(bytes != NULL);
    memcpy(bytes, data + 1, --size);
    if (data[0] & REPAIR)
        repair(bytes, size);

    status = vrep_segment_scan(bytes, size, group, 1, NULL, commits, COMMITS_MAX, &all);
    FUZZ_MUST(all.end <= size && all.wrong_at <= size && all.proof_at < size + 1);
    FUZZ_MUST(all.proof_at == 0 || status == VREP_E_CORRUPT);
    FUZZ_CANARY(all.commits == 1 && all.wrong_at < size);
    for (uint32_t i = 0; i < all.commits && i < COMMITS_MAX; i++) {
        const struct vrep_commit *commit = &commits[i];
        FUZZ_MUST(commit->number == i + 1 && commit->end <= all.end);
        FUZZ_MUST(vrep_record_scan(bytes + commit->start, commit->end - commit->start, NULL, found,
                                   FOUND_MAX, &count, &consumed) <= 0);
    }
    if (all.end > 0) {
        /* Cut behind the prefix: the same prefix, and nothing wrong any more. */
        FUZZ_MUST(vrep_segment_scan(bytes, all.end, group, 1, NULL, NULL, 0, &part) == VREP_OK);
        FUZZ_MUST(part.end == all.end && part.commits == all.commits &&
                  part.records == all.records);
    }
    free(bytes);
    return 0;
}
