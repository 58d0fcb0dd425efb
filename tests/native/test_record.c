#include <stdlib.h>

#include "base/endian.h"
#include "check.h"
#include "format/checksum.h"
#include "format/record.h"

/* A lawful record with fake sealed bytes; every piece is stored uncompressed. */
static size_t build(uint8_t *out, uint8_t kind, uint64_t seq, uint64_t offset, uint32_t length)
{
    struct vrep_record record;
    uint32_t first, blocks, pieces;
    size_t at;

    vrep_record_init(&record, kind, 1, 0);
    record.seq = seq;
    record.offset = offset;
    record.length = length;
    record.wall_ns = seq * 1000;
    pieces = vrep_record_bound(kind, offset, length) > sizeof record && kind != VREP_KIND_STREAM
                 ? vrep_record_data_pieces(length)
                 : 0;
    blocks = vrep_record_is_data(kind) ? vrep_record_hash_blocks(offset, length, &first) : 0;
    if (blocks > 0)
        record.flags = VREP_RECORD_HASHED;
    record.pieces = (uint16_t)(pieces + (blocks > 0));
    record.body_bytes = (uint32_t)(vrep_record_bound(kind, offset, length) - sizeof record);
    vrep_record_finish(&record);
    memcpy(out, &record, sizeof record);
    at = sizeof record;
    for (uint32_t i = 0; i < pieces; i++, at += 4) {
        uint32_t plain = length - i * VREP_PIECE_BYTES_MAX;
        if (plain > VREP_PIECE_BYTES_MAX)
            plain = VREP_PIECE_BYTES_MAX;
        vrep_le_store_u32(out + at, plain + VREP_TAG_BYTES);
    }
    if (blocks > 0) {
        vrep_le_store_u32(out + at, blocks * 16 + VREP_TAG_BYTES);
        at += 4;
    }
    memset(out + at, 0xa5, sizeof record + record.body_bytes - at);
    return sizeof record + record.body_bytes;
}

static struct vrep_record sample(uint8_t kind, uint64_t offset, uint32_t length)
{
    uint8_t *room = malloc(VREP_RECORD_BYTES_MAX);
    struct vrep_record record;

    CHECK(room != NULL);
    build(room, kind, 7, offset, length);
    memcpy(&record, room, sizeof record);
    free(room);
    return record;
}

static void refuse(struct vrep_record record, int want)
{
    vrep_record_finish(&record);
    CHECK_STATUS(vrep_record_check(&record), want);
}

static void hash_blocks_are_the_aligned_ones_inside(void)
{
    for (int i = 0; i < 20000; i++) {
        uint64_t offset = check_random_below(1 << 16);
        uint32_t length = (uint32_t)check_random_below(1 << 15), first, blocks, want = 0;
        uint64_t at = UINT64_MAX;
        for (uint64_t b = 0; b < 32; b++)
            if (b * 4096 >= offset && (b + 1) * 4096 <= offset + length) {
                if (want++ == 0)
                    at = b * 4096;
            }
        blocks = vrep_record_hash_blocks(offset, length, &first);
        CHECK_EQ(blocks, want);
        if (want > 0)
            CHECK_EQ(offset + first, at);
    }
}

static void lawful_headers_pass(void)
{
    const struct {
        uint8_t kind;
        uint64_t offset;
        uint32_t length;
    } lawful[] = {
        {VREP_KIND_WRITE, 0, 1},
        {VREP_KIND_WRITE, 4096, VREP_WRITE_BYTES_MAX},
        {VREP_KIND_WRITE, INT64_MAX - 512, 512},
        {VREP_KIND_ZEROES, 512, UINT32_MAX},
        {VREP_KIND_RESIZE, 1 << 20, 0},
        {VREP_KIND_SYNC, 65536, 262144},
        {VREP_KIND_SYNC_ZEROES, 0, 4096},
        {VREP_KIND_MARK, 0, 16},
        {VREP_KIND_MARK, 0, 16 + 255},
        {VREP_KIND_GAP_BEGIN, 0, 0},
        {VREP_KIND_GAP_END, 0, 0},
        {VREP_KIND_OBJECT, 0, VREP_OBJECT_BYTES_MAX},
        {VREP_KIND_STREAM, 0, 128},
        {VREP_KIND_TALLY, 0, 64},
    };
    for (size_t i = 0; i < sizeof lawful / sizeof *lawful; i++) {
        struct vrep_record record = sample(lawful[i].kind, lawful[i].offset, lawful[i].length);
        CHECK_OK(vrep_record_check(&record));
    }
}

static void a_largest_record_has_the_largest_size(void)
{
    CHECK_EQ(vrep_record_bound(VREP_KIND_WRITE, 0, VREP_WRITE_BYTES_MAX), VREP_RECORD_BYTES_MAX);
    CHECK_EQ(sample(VREP_KIND_WRITE, 0, VREP_WRITE_BYTES_MAX).pieces, VREP_PIECES_MAX);
}

static void unlawful_headers_are_refused(void)
{
    struct vrep_record record = sample(VREP_KIND_WRITE, 8192, 4096), bad;

#define BAD(change)                                                                                \
    do {                                                                                           \
        bad = record;                                                                              \
        change;                                                                                    \
        refuse(bad, VREP_E_CORRUPT);                                                               \
    } while (0)
    BAD(bad.magic ^= 1);
    BAD(bad.kind = 0);
    BAD(bad.kind = VREP_KIND_LAST + 1);
    BAD(bad.flags |= 0x10);
    BAD(bad.flags |= VREP_RECORD_JUMP);
    BAD(bad.disk = VREP_DISKS_MAX);
    BAD(bad.seq = 0);
    BAD(bad.offset = UINT64_MAX);
    BAD(bad.offset = (uint64_t)INT64_MAX - 4095);
    BAD(bad.length = 0);
    BAD(bad.length = VREP_WRITE_BYTES_MAX + 1);
    BAD(bad.body_bytes++);
    BAD(bad.body_bytes = UINT32_MAX);
    BAD(bad.body_bytes = 8 + 16 + 32);
    BAD(bad.pieces = 1);
    BAD(bad.pieces = 3);
    BAD(bad.reserved = 1);
    BAD(bad.flags = 0);
    record = sample(VREP_KIND_WRITE, 1, 4096);
    BAD(bad.flags = VREP_RECORD_HASHED);
    record = sample(VREP_KIND_ZEROES, 0, 4096);
    BAD(bad.flags = VREP_RECORD_HASHED);
    BAD(bad.pieces = 1);
    BAD(bad.body_bytes = 1);
    record = sample(VREP_KIND_RESIZE, 4096, 0);
    BAD(bad.offset = 4097);
    BAD(bad.offset = 0);
    BAD(bad.length = 1);
    record = sample(VREP_KIND_MARK, 0, 20);
    BAD(bad.disk = 1);
    BAD(bad.offset = 512);
    BAD(bad.length = 15);
    BAD(bad.body_bytes--);
    record = sample(VREP_KIND_STREAM, 0, 128);
    BAD(bad.length = 64);
    BAD(bad.body_bytes = 0);
#undef BAD
    record = sample(VREP_KIND_WRITE, 0, 1);
    record.version = 2;
    refuse(record, VREP_E_VERSION);
    record.version = VREP_RECORD_VERSION;
    record.checksum ^= 1;
    CHECK_STATUS(vrep_record_check(&record), VREP_E_CORRUPT);
}

static void every_flipped_bit_of_a_header_is_noticed(void)
{
    struct vrep_record record = sample(VREP_KIND_WRITE, 8192, 4096);

    for (size_t bit = 0; bit < sizeof record * 8; bit++) {
        struct vrep_record bad = record;
        ((uint8_t *)&bad)[bit / 8] ^= (uint8_t)(1u << (bit % 8));
        CHECK(vrep_record_check(&bad) != VREP_OK);
    }
}

static void piece_words_are_bounded(void)
{
    struct vrep_record record = sample(VREP_KIND_WRITE, 0, 200000);
    uint32_t good[3] = {131072 + 16, 200000 - 131072 + 16, 48 * 16 + 16}, words[3];

    CHECK_EQ(record.pieces, 3);
    CHECK_OK(vrep_record_check_pieces(&record, good));
    for (unsigned i = 0; i < 3; i++) {
        const uint32_t bad[] = {0,
                                15,
                                16,
                                17,
                                good[i] - 1,
                                good[i] + 1,
                                0x00ffffff,
                                good[i] | 0x02000000,
                                good[i] | VREP_PIECE_ZSTD,
                                VREP_PIECE_ZSTD | 16,
                                0xffffffff};
        for (size_t b = 0; b < sizeof bad / sizeof *bad; b++) {
            memcpy(words, good, sizeof words);
            words[i] = bad[b];
            CHECK_STATUS(vrep_record_check_pieces(&record, words), VREP_E_CORRUPT);
        }
    }
    /* compressed to 100 bytes: lawful once body_bytes says the same */
    memcpy(words, good, sizeof words);
    words[0] = (100 + 16) | VREP_PIECE_ZSTD;
    CHECK_STATUS(vrep_record_check_pieces(&record, words), VREP_E_CORRUPT);
    record.body_bytes -= 131072 - 100;
    vrep_record_finish(&record);
    CHECK_OK(vrep_record_check(&record));
    CHECK_OK(vrep_record_check_pieces(&record, words));
    words[2] |= VREP_PIECE_ZSTD;
    CHECK_STATUS(vrep_record_check_pieces(&record, words), VREP_E_CORRUPT);
}

static void pieces_are_walked_in_place(void)
{
    struct vrep_record record = sample(VREP_KIND_WRITE, 0, 200000);
    uint32_t words[3] = {131072 + 16, 200000 - 131072 + 16, 48 * 16 + 16};
    struct vrep_piece_walk walk;
    struct vrep_piece piece;

    vrep_piece_walk_init(&walk, &record, words);
    CHECK_EQ(vrep_piece_walk_next(&walk, &piece), 1);
    CHECK(piece.index == 0 && piece.offset == 0 && piece.plain == 131072 && piece.at == 64 + 12);
    CHECK_EQ(vrep_piece_walk_next(&walk, &piece), 1);
    CHECK(piece.index == 1 && piece.offset == 131072 && piece.plain == 200000 - 131072);
    CHECK_EQ(vrep_piece_walk_next(&walk, &piece), 1);
    CHECK(piece.index == VREP_PIECE_HASH && piece.plain == 48 * 16);
    CHECK_EQ(piece.at + piece.stored, 64 + record.body_bytes);
    CHECK_EQ(vrep_piece_walk_next(&walk, &piece), 0);
}

static void scan_stops_at_every_cut(void)
{
    uint8_t *room = malloc(65536), *cut = malloc(65536);
    size_t ends[5] = {0}, len = 0, count, consumed;
    struct vrep_record_found found[8];

    CHECK(room != NULL && cut != NULL);
    ends[1] = len += build(room + len, VREP_KIND_WRITE, 1, 4096, 4096);
    ends[2] = len += build(room + len, VREP_KIND_ZEROES, 2, 0, 1 << 20);
    ends[3] = len += build(room + len, VREP_KIND_WRITE, 3, 77, 3);
    ends[4] = len += build(room + len, VREP_KIND_MARK, 4, 0, 24);
    for (size_t have = 0; have <= len; have++) {
        struct vrep_record_order order = {0};
        size_t whole = 0;
        while (whole < 4 && ends[whole + 1] <= have)
            whole++;
        /* an exact heap block, so that a sanitizer sees any byte read past it */
        uint8_t *exact = malloc(have ? have : 1);
        CHECK(exact != NULL);
        memcpy(exact, room, have);
        CHECK_OK(vrep_record_scan(exact, have, &order, found, 8, &count, &consumed));
        CHECK_EQ(count, whole);
        CHECK_EQ(consumed, ends[whole]);
        free(exact);
    }
    CHECK_OK(vrep_record_scan(room, len, NULL, found, 2, &count, &consumed));
    CHECK_EQ(count, 2);
    CHECK_EQ(consumed, ends[2]);
    CHECK_EQ(found[1].position, ends[1]);
    CHECK_EQ(found[1].header.seq, 2);
    free(room);
    free(cut);
}

static void scan_names_the_place_of_damage(void)
{
    uint8_t room[16384];
    size_t len = 0, second, count, consumed;
    struct vrep_record_found found[8];

    second = len = build(room, VREP_KIND_WRITE, 1, 4096, 4096);
    len += build(room + len, VREP_KIND_WRITE, 2, 4096, 4096);
    for (size_t i = 0; i < 64 + 8; i++) { /* header and piece table */
        room[second + i] ^= 0x40;
        int status = vrep_record_scan(room, len, NULL, found, 8, &count, &consumed);
        CHECK(status == VREP_E_CORRUPT || status == VREP_E_VERSION);
        CHECK_EQ(count, 1);
        CHECK_EQ(consumed, second);
        room[second + i] ^= 0x40;
    }
    CHECK_OK(vrep_record_scan(room, len, NULL, found, 8, &count, &consumed));
    CHECK_EQ(consumed, len);
}

static void put(struct vrep_record_order *order, uint8_t kind, uint32_t epoch, uint64_t seq,
                uint16_t flags, int want)
{
    struct vrep_record record;

    vrep_record_init(&record, kind, epoch, 0);
    record.seq = seq;
    record.flags = flags;
    CHECK_STATUS(vrep_record_order_next(order, &record), want);
}

static void order_is_kept_per_lane(void)
{
    struct vrep_record_order order = {0};
    struct vrep_record other;

    put(&order, VREP_KIND_STREAM, 3, 10, 0, VREP_OK);
    put(&order, VREP_KIND_WRITE, 3, 11, 0, VREP_OK);
    put(&order, VREP_KIND_WRITE, 3, 11, 0, VREP_E_CORRUPT);
    put(&order, VREP_KIND_WRITE, 3, 13, 0, VREP_E_CORRUPT);
    put(&order, VREP_KIND_GAP_BEGIN, 3, 13, 0, VREP_E_CORRUPT);
    put(&order, VREP_KIND_GAP_BEGIN, 3, 11, VREP_RECORD_JUMP, VREP_E_CORRUPT);
    put(&order, VREP_KIND_GAP_BEGIN, 3, 20, VREP_RECORD_JUMP, VREP_OK);
    put(&order, VREP_KIND_TALLY, 3, 20, 0, VREP_OK);
    put(&order, VREP_KIND_TALLY, 3, 21, 0, VREP_E_CORRUPT);
    put(&order, VREP_KIND_WRITE, 3, 21, 0, VREP_OK);
    put(&order, VREP_KIND_STREAM, 3, 20, 0, VREP_E_CORRUPT);
    put(&order, VREP_KIND_STREAM, 3, 21, 0, VREP_OK);
    put(&order, VREP_KIND_WRITE, 4, 22, 0, VREP_E_CORRUPT);
    put(&order, VREP_KIND_STREAM, 2, 21, 0, VREP_E_CORRUPT);
    put(&order, VREP_KIND_STREAM, 4, 15, 0, VREP_OK); /* failover to an older position */
    put(&order, VREP_KIND_WRITE, 3, 22, 0, VREP_E_CORRUPT);
    put(&order, VREP_KIND_WRITE, 4, 16, 0, VREP_OK);
    for (uint16_t lane = 1; lane < VREP_RECORD_LANES_MAX; lane++) {
        vrep_record_init(&other, VREP_KIND_WRITE, 1, lane);
        other.seq = lane;
        CHECK_OK(vrep_record_order_next(&order, &other));
    }
    other.lane = VREP_RECORD_LANES_MAX;
    CHECK_STATUS(vrep_record_order_next(&order, &other), VREP_E_FULL);
}

static void stream_bodies_are_checked(void)
{
    struct vrep_stream stream = {.epoch = 5, .resume_seq = 40, .wall_ns = 9, .key_generation = 1};
    _Alignas(8) uint8_t out[192];
    struct vrep_record_found found;
    size_t count, consumed;

    memset(stream.stream_id, 7, sizeof stream.stream_id);
    vrep_stream_write(&stream, 2, out);
    CHECK_OK(vrep_record_scan(out, sizeof out, NULL, &found, 1, &count, &consumed));
    CHECK_EQ(consumed, sizeof out);
    CHECK(found.header.seq == 40 && found.header.epoch == 5 && found.header.lane == 2);
    for (size_t i = 0; i < sizeof out; i++) {
        out[i] ^= 1;
        CHECK(vrep_record_scan(out, sizeof out, NULL, &found, 1, &count, &consumed) != VREP_OK);
        CHECK_EQ(count, 0);
        out[i] ^= 1;
    }
    /* whole by its checksums, but header and body do not agree */
    struct vrep_record header = found.header;
    header.seq++;
    CHECK_STATUS(vrep_stream_check((const void *)(out + 64), &header), VREP_E_CORRUPT);
    header = found.header;
    header.epoch++;
    CHECK_STATUS(vrep_stream_check((const void *)(out + 64), &header), VREP_E_CORRUPT);
    CHECK_OK(vrep_stream_check((const void *)(out + 64), &found.header));
}

int main(void)
{
    RUN(hash_blocks_are_the_aligned_ones_inside);
    RUN(lawful_headers_pass);
    RUN(a_largest_record_has_the_largest_size);
    RUN(unlawful_headers_are_refused);
    RUN(every_flipped_bit_of_a_header_is_noticed);
    RUN(piece_words_are_bounded);
    RUN(pieces_are_walked_in_place);
    RUN(scan_stops_at_every_cut);
    RUN(scan_names_the_place_of_damage);
    RUN(order_is_kept_per_lane);
    RUN(stream_bodies_are_checked);
    return check_report();
}
