#include "seal/seal.h"

#include <stdlib.h>
#include <string.h>

#include <openssl/crypto.h>
#include <openssl/evp.h>
#if defined(__x86_64__) || defined(__i386__)
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

#include "base/endian.h"
#include "format/checksum.h"
#include "seal/cipher.h"
#include "seal/squeeze.h"

enum {
    HASH_BYTES = 16,
    HASHES_BYTES = VREP_WRITE_BYTES_MAX / VREP_HASH_BLOCK_BYTES * HASH_BYTES,
    TALLY_RECORD = sizeof(struct vrep_record) + 4 + sizeof(struct vrep_tally) + VREP_TAG_BYTES,
};

struct vrep_sealer {
    struct vrep_cipher cipher;
    struct vrep_squeeze squeeze; /* without a context when level is 0 */
    EVP_MD_CTX *running;         /* SHA-256 over headers and tags */
    EVP_MD_CTX *fork;            /* its copy, to end it for a tally */
    uint8_t stream_id[16];
    uint32_t epoch;
    uint16_t lane;
    bool broken; /* failed inside a record: its nonces may be used */
    bool hashing;
    uint64_t seq;
    uint64_t resume_seq;
    uint64_t first_seq;
    uint64_t tallied; /* records when the last tally was made */
    struct vrep_seal_stats stats;
    uint8_t secret[VREP_HASH_SECRET_BYTES];
    uint8_t hashes[HASHES_BYTES];           /* of the record being sealed */
    uint8_t gathered[VREP_PIECE_BYTES_MAX]; /* a piece that iovecs split */
};

/* Where in the iovecs of a record the next byte stands. */
struct cursor {
    const struct iovec *iov;
    size_t at;
};

/* The next run of contiguous bytes, at most `want` of them. */
static const uint8_t *run_at(struct cursor *cursor, size_t want, size_t *len)
{
    while (cursor->at == cursor->iov->iov_len) {
        cursor->iov++;
        cursor->at = 0;
    }
    *len = cursor->iov->iov_len - cursor->at;
    if (*len > want)
        *len = want;
    return (const uint8_t *)cursor->iov->iov_base + cursor->at;
}

static void skip(struct cursor *cursor, size_t bytes)
{
    while (bytes > 0) {
        size_t len;
        (void)run_at(cursor, bytes, &len);
        cursor->at += len;
        bytes -= len;
    }
}

/* The next `bytes` bytes in one run: in place, or copied to `room`. */
static const uint8_t *whole(struct cursor *cursor, size_t bytes, uint8_t *room)
{
    size_t len, have = 0;
    const uint8_t *from = run_at(cursor, bytes, &len);

    if (len == bytes) {
        cursor->at += len;
        return from;
    }
    while (have < bytes) {
        from = run_at(cursor, bytes - have, &len);
        memcpy(room + have, from, len);
        cursor->at += len;
        have += len;
    }
    return room;
}

/* Block hashes of a record, taken as its data pass by. */
struct hashing {
    struct cursor cursor;
    uint32_t next;   /* plaintext offset of the next block */
    uint32_t blocks; /* done */
    uint32_t total;
};

static void hash_until(struct vrep_sealer *sealer, struct hashing *hashing, uint32_t end)
{
    uint8_t room[VREP_HASH_BLOCK_BYTES];

    while (hashing->blocks < hashing->total && hashing->next + VREP_HASH_BLOCK_BYTES <= end) {
        const uint8_t *block = whole(&hashing->cursor, VREP_HASH_BLOCK_BYTES, room);
        XXH128_hash_t hash = XXH3_128bits_withSecret(block, VREP_HASH_BLOCK_BYTES, sealer->secret,
                                                     sizeof sealer->secret);
        uint8_t *out = sealer->hashes + (size_t)hashing->blocks * HASH_BYTES;
        vrep_le_store_u64(out, hash.low64);
        vrep_le_store_u64(out + 8, hash.high64);
        hashing->blocks++;
        hashing->next += VREP_HASH_BLOCK_BYTES;
    }
}

static int digest(EVP_MD_CTX *context, const void *bytes, size_t len)
{
    return EVP_DigestUpdate(context, bytes, len) == 1 ? VREP_OK : VREP_E_IO;
}

/* One piece from `from` to out (stored bytes, tag last), and its tag into the digest. */
static int seal_piece(struct vrep_sealer *sealer, const struct vrep_record *header, uint32_t word,
                      uint32_t index, struct cursor *from, uint8_t *out)
{
    size_t left = (word & VREP_PIECE_LENGTH_MASK) - VREP_TAG_BYTES, len;
    int status = vrep_cipher_begin(&sealer->cipher, true, header, word, index);

    for (; status == VREP_OK && left > 0; left -= len, out += len) {
        const uint8_t *bytes = run_at(from, left, &len);
        status = vrep_cipher_add(&sealer->cipher, true, bytes, len, out);
        from->at += len;
    }
    if (status == VREP_OK)
        status = vrep_cipher_seal_end(&sealer->cipher, out);
    if (status == VREP_OK && index != VREP_PIECE_TALLY)
        status = digest(sealer->running, out, VREP_TAG_BYTES);
    return status;
}

static uint32_t plain_of(uint32_t length, uint32_t piece)
{
    uint32_t left = length - piece * VREP_PIECE_BYTES_MAX;

    return left < VREP_PIECE_BYTES_MAX ? left : VREP_PIECE_BYTES_MAX;
}

/*
 * First pass: piece words, compressed pieces at their final place, block hashes when
 * the data are read here anyway. Returns the size of the body.
 */
static uint32_t plan(struct vrep_sealer *sealer, const struct vrep_seal_source *source,
                     uint32_t pieces, struct hashing *hashing, uint8_t *out)
{
    struct cursor cursor = {.iov = source->iov};
    uint32_t total = pieces + (hashing->total > 0);
    uint32_t at = (uint32_t)sizeof(struct vrep_record) + total * 4;
    bool squeeze = sealer->squeeze.context != NULL && source->kind != VREP_KIND_MARK;

    for (uint32_t i = 0; i < pieces; i++) {
        uint32_t plain = plain_of(source->length, i), word = plain + VREP_TAG_BYTES;
        if (squeeze) {
            const uint8_t *bytes = whole(&cursor, plain, sealer->gathered);
            size_t got = 0;
            if (vrep_squeeze_hopeful(&sealer->squeeze, bytes, plain)) {
                got = vrep_squeeze_run(&sealer->squeeze, bytes, plain, out + at, plain);
                sealer->stats.pieces_tried++;
            }
            if (got > 0) {
                word = ((uint32_t)got + VREP_TAG_BYTES) | VREP_PIECE_ZSTD;
                sealer->stats.pieces_zstd++;
            }
            hash_until(sealer, hashing, i * VREP_PIECE_BYTES_MAX + plain);
        }
        vrep_le_store_u32(out + sizeof(struct vrep_record) + (size_t)i * 4, word);
        at += word & VREP_PIECE_LENGTH_MASK;
    }
    if (hashing->total > 0) {
        uint32_t word = hashing->total * HASH_BYTES + VREP_TAG_BYTES;
        vrep_le_store_u32(out + sizeof(struct vrep_record) + (size_t)pieces * 4, word);
        at += word;
    }
    return at - (uint32_t)sizeof(struct vrep_record);
}

/* Second pass: seals every piece at its place; compressed ones where they stand. */
static int seal_pieces(struct vrep_sealer *sealer, const struct vrep_seal_source *source,
                       const struct vrep_record *header, uint32_t pieces, struct hashing *hashing,
                       uint8_t *out)
{
    const uint8_t *words = out + sizeof *header;
    struct cursor cursor = {.iov = source->iov};
    uint32_t at = (uint32_t)sizeof *header + header->pieces * 4u, word;
    int status = VREP_OK;

    for (uint32_t i = 0; i < pieces && status == VREP_OK; i++) {
        uint32_t plain = plain_of(source->length, i);
        word = vrep_le_load_u32(words + (size_t)i * 4);
        hash_until(sealer, hashing, i * VREP_PIECE_BYTES_MAX + plain);
        if (word & VREP_PIECE_ZSTD) {
            struct iovec here = {.iov_base = out + at, .iov_len = plain};
            struct cursor squeezed = {.iov = &here};
            status = seal_piece(sealer, header, word, i, &squeezed, out + at);
            skip(&cursor, plain);
        } else {
            status = seal_piece(sealer, header, word, i, &cursor, out + at);
        }
        at += word & VREP_PIECE_LENGTH_MASK;
    }
    if (hashing->total > 0 && status == VREP_OK) {
        struct iovec here = {.iov_base = sealer->hashes,
                             .iov_len = (size_t)hashing->total * HASH_BYTES};
        struct cursor hashes = {.iov = &here};
        word = vrep_le_load_u32(words + (size_t)pieces * 4);
        status = seal_piece(sealer, header, word, VREP_PIECE_HASH, &hashes, out + at);
    }
    return status;
}

static bool follows(const struct vrep_sealer *sealer, const struct vrep_seal_source *source)
{
    if (source->kind == VREP_KIND_GAP_BEGIN && (source->flags & VREP_RECORD_JUMP))
        return source->seq > sealer->seq;
    return source->seq > sealer->seq && source->seq - 1 == sealer->seq;
}

static bool payload_fits(const struct vrep_seal_source *source, bool sealed)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < source->iovecs; i++) {
        if (source->iov[i].iov_len > VREP_WRITE_BYTES_MAX)
            return false;
        sum += source->iov[i].iov_len;
    }
    return sum == (sealed ? source->length : 0);
}

/* Header with the largest body that the record can have; INVALID when not lawful. */
static int draft(const struct vrep_sealer *sealer, const struct vrep_seal_source *source,
                 size_t bound, uint32_t pieces, uint32_t blocks, struct vrep_record *header)
{
    vrep_record_init(header, source->kind, sealer->epoch, sealer->lane);
    header->flags = source->flags;
    header->disk = source->disk;
    header->seq = source->seq;
    header->offset = source->offset;
    header->length = source->length;
    header->wall_ns = source->wall_ns;
    header->mono_ns = source->mono_ns;
    header->pieces = (uint16_t)(pieces + (blocks > 0));
    header->body_bytes = (uint32_t)(bound - sizeof *header);
    if (blocks > 0)
        header->flags |= VREP_RECORD_HASHED;
    vrep_record_finish(header);
    return vrep_record_check(header) == VREP_OK ? VREP_OK : VREP_E_INVALID;
}

static int seal_one(struct vrep_sealer *sealer, const struct vrep_seal_source *source, uint8_t *out,
                    size_t cap, size_t *written)
{
    struct hashing hashing = {.cursor = {.iov = source->iov}};
    struct vrep_record header;
    uint32_t pieces, blocks = 0, first = 0;
    bool sealed;
    size_t bound;
    int status;

    if (vrep_record_is_aside(source->kind) || (source->flags & VREP_RECORD_HASHED))
        return VREP_E_INVALID;
    sealed = vrep_record_is_sealed(source->kind);
    pieces = sealed ? vrep_record_data_pieces(source->length) : 0;
    if (sealer->hashing && vrep_record_is_data(source->kind))
        blocks = vrep_record_hash_blocks(source->offset, source->length, &first);
    bound = sizeof header;
    if (sealed)
        bound += (size_t)pieces * (4 + VREP_TAG_BYTES) + source->length;
    if (blocks > 0)
        bound += 4 + VREP_TAG_BYTES + (size_t)blocks * HASH_BYTES;
    status = draft(sealer, source, bound, pieces, blocks, &header);
    if (status != VREP_OK)
        return status;
    if (!follows(sealer, source) || !payload_fits(source, sealed))
        return VREP_E_INVALID;
    if (bound > cap)
        return VREP_E_FULL;

    sealer->seq = source->seq;
    sealer->broken = true;
    if (blocks > 0) {
        hashing.total = blocks;
        hashing.next = first;
        skip(&hashing.cursor, first);
    }
    if (sealed) {
        header.body_bytes = plan(sealer, source, pieces, &hashing, out);
        vrep_record_finish(&header);
    }
    memcpy(out, &header, sizeof header);
    status = digest(sealer->running, &header, sizeof header);
    if (status == VREP_OK && sealed)
        status = seal_pieces(sealer, source, &header, pieces, &hashing, out);
    if (status != VREP_OK)
        return status;
    sealer->broken = false;
    if (sealer->stats.records++ == 0)
        sealer->first_seq = source->seq;
    sealer->stats.pieces += header.pieces;
    sealer->stats.bytes_plain += sealed ? source->length : 0;
    *written = sizeof header + header.body_bytes;
    sealer->stats.bytes_sealed += *written;
    return VREP_OK;
}

int vrep_sealer_seal(struct vrep_sealer *sealer, const struct vrep_seal_source *records, size_t n,
                     uint8_t *out, size_t cap, size_t *written, size_t *n_done)
{
    size_t at = 0, done = 0, got = 0;
    int status = sealer->broken ? VREP_E_INVALID : VREP_OK;

    for (; status == VREP_OK && done < n; done++, at += got) {
        status = seal_one(sealer, &records[done], out + at, cap - at, &got);
        if (status != VREP_OK)
            break;
    }
    *written = at;
    *n_done = done;
    return status == VREP_E_FULL && done > 0 ? VREP_OK : status;
}

int vrep_sealer_stream(struct vrep_sealer *sealer, const struct vrep_stream *stream, uint8_t *out,
                       size_t cap, size_t *written)
{
    struct vrep_stream body = *stream;
    uint8_t record[sizeof(struct vrep_record) + sizeof(struct vrep_stream)];

    if (sealer->broken || sealer->stats.records > 0)
        return VREP_E_INVALID;
    if (cap < sizeof record)
        return VREP_E_FULL;
    memcpy(body.stream_id, sealer->stream_id, sizeof body.stream_id);
    body.epoch = sealer->epoch;
    body.resume_seq = sealer->resume_seq;
    memset(body.reserved, 0, sizeof body.reserved);
    body.parent.reserved = 0;
    vrep_stream_write(&body, sealer->lane, record);
    memcpy(out, record, sizeof record);
    *written = sizeof record;
    return VREP_OK;
}

int vrep_sealer_tally(struct vrep_sealer *sealer, uint64_t wall_ns, uint64_t mono_ns, uint8_t *out,
                      size_t cap, size_t *written)
{
    struct vrep_tally tally = {.records = sealer->stats.records, .first_seq = sealer->first_seq};
    struct iovec iov = {.iov_base = &tally, .iov_len = sizeof tally};
    struct cursor cursor = {.iov = &iov};
    const uint32_t word = sizeof tally + VREP_TAG_BYTES;
    struct vrep_record header;
    unsigned len;
    int status;

    if (sealer->broken || sealer->stats.records == sealer->tallied)
        return VREP_E_INVALID;
    if (cap < TALLY_RECORD)
        return VREP_E_FULL;
    memcpy(tally.stream_id, sealer->stream_id, sizeof tally.stream_id);
    if (EVP_MD_CTX_copy_ex(sealer->fork, sealer->running) != 1 ||
        EVP_DigestFinal_ex(sealer->fork, tally.running, &len) != 1)
        return VREP_E_IO;
    sealer->tallied = sealer->stats.records;
    vrep_record_init(&header, VREP_KIND_TALLY, sealer->epoch, sealer->lane);
    header.seq = sealer->seq;
    header.length = sizeof tally;
    header.body_bytes = TALLY_RECORD - sizeof header;
    header.pieces = 1;
    header.wall_ns = wall_ns;
    header.mono_ns = mono_ns;
    vrep_record_finish(&header);
    memcpy(out, &header, sizeof header);
    vrep_le_store_u32(out + sizeof header, word);
    status = seal_piece(sealer, &header, word, VREP_PIECE_TALLY, &cursor, out + sizeof header + 4);
    if (status == VREP_OK)
        *written = TALLY_RECORD;
    return status;
}

int vrep_sealer_new(const struct vrep_sealer_options *options, struct vrep_sealer **out)
{
    struct vrep_sealer *sealer;
    int status;

    if (options->level < 0 || options->level > VREP_SEAL_LEVEL_MAX)
        return VREP_E_INVALID;
    sealer = calloc(1, sizeof *sealer);
    if (sealer == NULL)
        return VREP_E_NOMEM;
    memcpy(sealer->stream_id, options->stream_id, sizeof sealer->stream_id);
    sealer->epoch = options->epoch;
    sealer->lane = options->lane;
    sealer->seq = sealer->resume_seq = options->resume_seq;
    if (options->hash_secret != NULL) {
        memcpy(sealer->secret, options->hash_secret, sizeof sealer->secret);
        sealer->hashing = true;
        vrep_checksum_prepare();
    }
    status = vrep_cipher_init(&sealer->cipher, options->key, true);
    if (status == VREP_OK && options->level > 0)
        status = vrep_squeeze_init(&sealer->squeeze, options->level);
    if (status == VREP_OK) {
        sealer->running = EVP_MD_CTX_new();
        sealer->fork = EVP_MD_CTX_new();
        if (sealer->running == NULL || sealer->fork == NULL)
            status = VREP_E_NOMEM;
        else if (EVP_DigestInit_ex(sealer->running, EVP_sha256(), NULL) != 1)
            status = VREP_E_IO;
    }
    if (status != VREP_OK) {
        vrep_sealer_free(sealer);
        return status;
    }
    *out = sealer;
    return VREP_OK;
}

void vrep_sealer_free(struct vrep_sealer *sealer)
{
    if (sealer == NULL)
        return;
    vrep_cipher_clear(&sealer->cipher);
    vrep_squeeze_clear(&sealer->squeeze);
    EVP_MD_CTX_free(sealer->running);
    EVP_MD_CTX_free(sealer->fork);
    OPENSSL_cleanse(sealer, sizeof *sealer);
    free(sealer);
}

int vrep_sealer_set_level(struct vrep_sealer *sealer, int level)
{
    if (level < 0 || level > VREP_SEAL_LEVEL_MAX)
        return VREP_E_INVALID;
    vrep_squeeze_clear(&sealer->squeeze);
    return level == 0 ? VREP_OK : vrep_squeeze_init(&sealer->squeeze, level);
}

uint64_t vrep_sealer_seq(const struct vrep_sealer *sealer)
{
    return sealer->seq;
}

void vrep_sealer_stats(const struct vrep_sealer *sealer, struct vrep_seal_stats *out)
{
    *out = sealer->stats;
}
