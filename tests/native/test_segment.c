#include "format/segment.h"

#include "check.h"
#include "format/checksum.h"
#include "format/record.h"

enum { ROOM = 1 << 16, COMMITS = 5 };

static const uint8_t group[16] = {7};
static uint8_t bytes[ROOM];
static uint8_t copy[ROOM];
static uint64_t ends[COMMITS + 1];

/* A write of 100 bytes in one piece: only the commit's digest covers its body. */
static size_t put_record(uint8_t *at, uint64_t seq)
{
    struct vrep_record record;

    vrep_record_init(&record, VREP_KIND_WRITE, 3, 0);
    record.seq = seq;
    record.length = 100;
    record.pieces = 1;
    record.body_bytes = 4 + 100 + VREP_TAG_BYTES;
    vrep_record_finish(&record);
    memcpy(at, &record, sizeof record);
    memset(at + sizeof record, (int)seq, record.body_bytes);
    return sizeof record + record.body_bytes;
}

static size_t put_commit(uint8_t *file, size_t start, size_t end, uint32_t number, uint32_t records,
                         uint64_t last, uint64_t durable)
{
    struct vrep_commit commit = {.segment = 9, .number = number, .start = start, .end = end};
    size_t block = (end + 63) & ~(size_t)63;

    memset(file + end, 0, block - end);
    vrep_digest_once(file + start, block - start, commit.digest);
    commit.last = (struct vrep_position){.epoch = 3, .seq = last};
    commit.durable = (struct vrep_position){.epoch = durable ? 3 : 0, .seq = durable};
    memcpy(commit.group_id, group, sizeof group);
    commit.records = records;
    vrep_commit_finish(&commit);
    memcpy(file + block, &commit, sizeof commit);
    return block + sizeof commit;
}

/* COMMITS commits of 1..3 records; commit n says that n - 1 is durable. */
static size_t make(void)
{
    struct vrep_segment_header header = {.segment = 9, .lease = 4};
    uint64_t seq = 0, before = 0;
    size_t at = sizeof header;

    memcpy(header.group_id, group, sizeof group);
    vrep_segment_header_finish(&header);
    memcpy(bytes, &header, sizeof header);
    ends[0] = at;
    for (uint32_t n = 1; n <= COMMITS; n++) {
        size_t start = at;
        uint32_t records = 1 + n % 3;
        for (uint32_t i = 0; i < records; i++)
            at += put_record(bytes + at, ++seq);
        at = put_commit(bytes, start, at, n, records, seq, before);
        before = seq;
        ends[n] = at;
    }
    return at;
}

static int scan(const uint8_t *file, size_t len, struct vrep_segment_scan *out)
{
    return vrep_segment_scan(file, len, group, 9, NULL, NULL, 0, out);
}

static void a_whole_segment_is_taken_whole(void)
{
    struct vrep_segment_scan found;
    struct vrep_commit commits[COMMITS];
    size_t len = make();

    CHECK_OK(vrep_segment_scan(bytes, len, group, 9, NULL, commits, COMMITS, &found));
    CHECK_EQ(found.end, len);
    CHECK_EQ(found.wrong_at, len);
    CHECK_EQ(found.commits, COMMITS);
    CHECK_EQ(found.records, found.last.seq);
    CHECK_EQ(commits[COMMITS - 1].last.seq, found.last.seq);
    CHECK_EQ(found.durable.seq, commits[COMMITS - 1].durable.seq);
    CHECK_STATUS(vrep_segment_scan(bytes, len, group, 8, NULL, NULL, 0, &found), VREP_E_CORRUPT);
    CHECK_STATUS(vrep_segment_scan(bytes, len, bytes, 9, NULL, NULL, 0, &found), VREP_E_CORRUPT);
}

/* Cut anywhere: the whole commits before the cut, and never an error. */
static void a_cut_is_a_torn_tail(void)
{
    struct vrep_segment_scan found;
    size_t len = make();

    for (size_t cut = 0; cut <= len; cut++) {
        size_t whole = 0;
        int status = scan(bytes, cut, &found);
        if (cut < ends[0]) {
            CHECK_EQ(status, VREP_E_CORRUPT);
            continue;
        }
        while (whole < COMMITS && ends[whole + 1] <= cut)
            whole++;
        CHECK_OK(status);
        CHECK_EQ(found.commits, whole);
        CHECK_EQ(found.end, ends[whole]);
    }
}

/* Each bit flipped: in the last commit it ends the prefix there, before that it is damage. */
static void damage_is_found_bit_by_bit(void)
{
    struct vrep_segment_scan found;
    size_t len = make();

    for (size_t bit = 0; bit < len * 8; bit++) {
        int status;
        memcpy(copy, bytes, len);
        copy[bit / 8] = (uint8_t)(copy[bit / 8] ^ 1u << bit % 8);
        status = scan(copy, len, &found);
        if (bit / 8 < ends[COMMITS - 1] && bit / 8 >= ends[0]) {
            CHECK_EQ(status, VREP_E_CORRUPT);
            CHECK(found.proof_at >= found.end);
            CHECK(found.wrong_at <= bit / 8 + 128 && found.end <= bit / 8);
        } else if (bit / 8 < ends[0]) {
            CHECK(status == VREP_E_CORRUPT || status == VREP_E_VERSION);
        } else {
            CHECK_EQ(status, VREP_OK);
            CHECK_EQ(found.commits, COMMITS - 1);
            CHECK(found.wrong_at >= found.end && found.wrong_at < len);
        }
    }
}

static void a_known_position_is_proof_as_well(void)
{
    struct vrep_segment_scan found;
    struct vrep_position known = {.epoch = 3, .seq = 1};
    size_t len = make();
    uint64_t last;

    CHECK_OK(scan(bytes, len, &found));
    last = found.last.seq;
    known.seq = last;
    CHECK_OK(vrep_segment_scan(bytes, len, group, 9, &known, NULL, 0, &found));
    CHECK_STATUS(vrep_segment_scan(bytes, len - 1, group, 9, &known, NULL, 0, &found),
                 VREP_E_CORRUPT);
    known.seq = last + 1;
    CHECK_STATUS(vrep_segment_scan(bytes, len, group, 9, &known, NULL, 0, &found), VREP_E_CORRUPT);
}

/* Sectors of a commit that was not synced may be missing while its block is there. */
static void a_block_over_missing_records_is_torn(void)
{
    struct vrep_segment_scan found;
    size_t len = make();

    memset(bytes + ends[COMMITS - 1], 0, 64);
    CHECK_OK(scan(bytes, len, &found));
    CHECK_EQ(found.commits, COMMITS - 1);
    CHECK_EQ(found.end, ends[COMMITS - 1]);
}

static void an_empty_commit_proves_the_one_before(void)
{
    struct vrep_segment_scan found;
    size_t len = make();

    CHECK_OK(scan(bytes, len, &found));
    len = put_commit(bytes, len, len, COMMITS + 1, 0, found.last.seq, found.last.seq);
    CHECK_OK(scan(bytes, len, &found));
    CHECK_EQ(found.end, len);
    bytes[ends[COMMITS] - 1] ^= 1;
    CHECK_STATUS(scan(bytes, len, &found), VREP_E_CORRUPT);
    CHECK_EQ(found.proof_at, len - sizeof(struct vrep_commit));
}

static void a_commit_that_lies_is_not_taken(void)
{
    struct vrep_segment_scan found;
    struct vrep_commit commit;
    size_t len = make(), block = len - sizeof commit;

    for (int field = 0; field < 6; field++) {
        make();
        memcpy(&commit, bytes + block, sizeof commit);
        switch (field) {
        case 0:
            commit.records++;
            break;
        case 1:
            commit.last.seq++;
            break;
        case 2:
            commit.number++;
            break;
        case 3:
            commit.start += 64;
            break;
        case 4:
            commit.end--;
            break;
        default:
            commit.segment++;
            break;
        }
        vrep_commit_finish(&commit);
        memcpy(bytes + block, &commit, sizeof commit);
        /* A block that is one too far ahead proves that one before it was durable. */
        CHECK_STATUS(scan(bytes, len, &found), field == 2 ? VREP_E_CORRUPT : VREP_OK);
        CHECK_EQ(found.commits, COMMITS - 1);
    }
}

static void a_newer_format_is_told_apart(void)
{
    struct vrep_segment_scan found;
    struct vrep_segment_header header;
    size_t len = make();

    memcpy(&header, bytes, sizeof header);
    header.version = VREP_SEGMENT_VERSION + 1;
    header.checksum = vrep_checksum32(&header, offsetof(struct vrep_segment_header, checksum));
    memcpy(bytes, &header, sizeof header);
    CHECK_STATUS(scan(bytes, len, &found), VREP_E_VERSION);
}

int main(void)
{
    RUN(a_whole_segment_is_taken_whole);
    RUN(a_cut_is_a_torn_tail);
    RUN(damage_is_found_bit_by_bit);
    RUN(a_known_position_is_proof_as_well);
    RUN(a_block_over_missing_records_is_torn);
    RUN(an_empty_commit_proves_the_one_before);
    RUN(a_commit_that_lies_is_not_taken);
    RUN(a_newer_format_is_told_apart);
    return check_report();
}
