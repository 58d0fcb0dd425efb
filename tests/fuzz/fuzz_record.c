/*
 * Records from an untrusted peer or a damaged disk: scan, piece walk, order, tally
 * and opener.
 *
 * Input: one byte of options, then records back to back. Checksums and tags cannot
 * be guessed, so options let the target store them as an attacker who holds the key
 * would: 1 makes magic, version and checksum of each header right, 2 seals the bytes of
 * each piece as if they were its content, which lets the fuzzer choose zstd frames.
 */
#include "fuzz.h"

#include <string.h>

#include "base/endian.h"
#include "format/checksum.h"
#include "format/record.h"
#include "seal/cipher.h"
#include "seal/seal.h"

enum { FOUND_MAX = 64, PLAIN_MAX = 1 << 20, REPAIR = 1, SEAL = 2 };

static const uint8_t key[VREP_STREAM_KEY_BYTES] = {1};
static const uint8_t stream_id[16] = {2};

static struct vrep_opener *opener;
static struct vrep_tally_check *check;
static struct vrep_cipher cipher;
static uint8_t plain[PLAIN_MAX];

static void prepare(void)
{
    if (opener != NULL)
        return;
    FUZZ_MUST(vrep_opener_new(key, stream_id, &opener) == VREP_OK);
    FUZZ_MUST(vrep_tally_new(&check) == VREP_OK);
    FUZZ_MUST(vrep_cipher_init(&cipher, key, true) == VREP_OK);
}

static void seal_in_place(const struct vrep_record *record, uint8_t *start)
{
    struct vrep_piece_walk walk;
    struct vrep_piece piece;

    if (vrep_record_check_pieces(record, start + sizeof *record) != VREP_OK)
        return;
    vrep_piece_walk_init(&walk, record, start + sizeof *record);
    while (vrep_piece_walk_next(&walk, &piece) > 0) {
        uint32_t len = piece.stored - VREP_TAG_BYTES;
        uint8_t *at = start + piece.at;
        FUZZ_MUST(vrep_cipher_begin(&cipher, true, record, piece.word, piece.index) == VREP_OK);
        FUZZ_MUST(vrep_cipher_add(&cipher, true, at, len, at) == VREP_OK);
        FUZZ_MUST(vrep_cipher_seal_end(&cipher, at + len) == VREP_OK);
    }
}

static void repair(uint8_t *bytes, size_t size, bool seal)
{
    struct vrep_record record;

    for (size_t at = 0; size - at >= sizeof record; at += sizeof record + record.body_bytes) {
        memcpy(&record, bytes + at, sizeof record);
        record.magic = VREP_RECORD_MAGIC;
        record.version = VREP_RECORD_VERSION;
        record.reserved = 0;
        vrep_record_finish(&record);
        memcpy(bytes + at, &record, sizeof record);
        if (record.body_bytes > size - at - sizeof record)
            return;
        if (record.kind == VREP_KIND_STREAM && record.body_bytes == sizeof(struct vrep_stream)) {
            struct vrep_stream body;
            memcpy(&body, bytes + at + sizeof record, sizeof body);
            body.checksum = vrep_checksum32(&body, offsetof(struct vrep_stream, checksum));
            memcpy(bytes + at + sizeof record, &body, sizeof body);
        } else if (seal && vrep_record_check(&record) == VREP_OK) {
            seal_in_place(&record, bytes + at);
        }
    }
}

static void open_one(const struct vrep_record *record, const uint8_t *at, bool sealed)
{
    struct vrep_opened_mark mark;
    struct vrep_tally tally;
    size_t len = sizeof *record + record->body_bytes, got = 0;
    int status = vrep_opener_record(opener, at, len, plain, sizeof plain, &got);

    if (status == VREP_OK && record->pieces > 0)
        FUZZ_MUST(got == record->length);
    if (record->pieces > 0 && record->length <= sizeof plain)
        FUZZ_MUST(sealed ? status != VREP_E_AUTH : status == VREP_E_AUTH);
    FUZZ_CANARY(sealed && status == VREP_OK && record->kind == VREP_KIND_OBJECT &&
                memchr(plain, 'V', record->length) != NULL);
    (void)vrep_opener_hashes(opener, at, len, plain, sizeof plain, &got);
    if (vrep_opener_mark(opener, at, len, &mark) == VREP_OK) {
        FUZZ_MUST(mark.label[VREP_LABEL_BYTES_MAX] == '\0');
        FUZZ_MUST(mark.cut.lanes <= VREP_LANES_MAX);
    }
    (void)vrep_opener_tally(opener, at, len, check, &tally);
    FUZZ_MUST(vrep_tally_update(check, at, len) == VREP_OK);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct vrep_record_found found[FOUND_MAX];
    struct vrep_record_order order = {0};
    size_t count, consumed, again, plain_count;
    uint8_t *bytes;
    bool sealed;

    if (size < 1)
        return 0;
    prepare();
    bytes = malloc(size); /* exact, so that the sanitizer sees the end */
    FUZZ_MUST(bytes != NULL);
    memcpy(bytes, data + 1, --size);
    sealed = (data[0] & (REPAIR | SEAL)) == (REPAIR | SEAL);
    if (data[0] & REPAIR)
        repair(bytes, size, sealed);

    (void)vrep_record_scan(bytes, size, NULL, found, FOUND_MAX, &plain_count, &again);
    FUZZ_MUST(again <= size && plain_count <= FOUND_MAX);
    FUZZ_MUST(vrep_tally_reset(check) == VREP_OK);
    for (size_t i = 0; i < plain_count; i++) {
        const struct vrep_record *record = &found[i].header;
        uint64_t end = found[i].position + sizeof *record + record->body_bytes;
        FUZZ_MUST(end == (i + 1 < plain_count ? found[i + 1].position : again));
        FUZZ_MUST(vrep_record_bound(record->kind, record->offset, record->length) >=
                  sizeof *record + record->body_bytes);
        open_one(record, bytes + found[i].position, sealed);
    }
    (void)vrep_record_scan(bytes, size, &order, found, FOUND_MAX, &count, &consumed);
    FUZZ_MUST(count <= plain_count && consumed <= again);
    free(bytes);
    return 0;
}
