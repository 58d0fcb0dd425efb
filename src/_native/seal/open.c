#include "seal/seal.h"

#include <stdlib.h>
#include <string.h>

/* SHA256_CTX: the running digest must outlive a process, and EVP gives no state away. */
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/sha.h>
#include <zstd.h>

#include "base/endian.h"
#include "seal/cipher.h"

struct vrep_opener {
    struct vrep_cipher cipher;
    ZSTD_DCtx *unsqueeze;
    uint8_t stream_id[16];
    uint8_t room[VREP_PIECE_BYTES_MAX]; /* a compressed piece, authenticated */
};

/* The header and piece table of a whole record, checked. */
struct whole {
    struct vrep_record header;
    const uint8_t *words;
    const uint8_t *start;
};

static int take(const void *record, size_t len, struct whole *whole)
{
    int status;

    if (len < sizeof whole->header)
        return VREP_E_TORN;
    memcpy(&whole->header, record, sizeof whole->header);
    status = vrep_record_check(&whole->header);
    if (status != VREP_OK)
        return status;
    if (len - sizeof whole->header < whole->header.body_bytes)
        return VREP_E_TORN;
    whole->start = record;
    whole->words = whole->start + sizeof whole->header;
    return vrep_record_check_pieces(&whole->header, whole->words);
}

int vrep_opener_new(const uint8_t key[VREP_STREAM_KEY_BYTES], const uint8_t stream_id[16],
                    struct vrep_opener **out)
{
    struct vrep_opener *opener = calloc(1, sizeof *opener);
    int status;

    if (opener == NULL)
        return VREP_E_NOMEM;
    memcpy(opener->stream_id, stream_id, sizeof opener->stream_id);
    status = vrep_cipher_init(&opener->cipher, key, false);
    if (status == VREP_OK) {
        opener->unsqueeze = ZSTD_createDCtx();
        if (opener->unsqueeze == NULL)
            status = VREP_E_NOMEM;
    }
    if (status != VREP_OK) {
        vrep_opener_free(opener);
        return status;
    }
    *out = opener;
    return VREP_OK;
}

void vrep_opener_free(struct vrep_opener *opener)
{
    if (opener == NULL)
        return;
    vrep_cipher_clear(&opener->cipher);
    ZSTD_freeDCtx(opener->unsqueeze);
    OPENSSL_cleanse(opener, sizeof *opener);
    free(opener);
}

/* One frame that holds exactly `plain` bytes, whatever its header claims. */
static int unsqueeze(struct vrep_opener *opener, size_t len, uint8_t *out, size_t plain)
{
    size_t frame = ZSTD_findFrameCompressedSize(opener->room, len);

    if (ZSTD_isError(frame) || frame != len ||
        ZSTD_decompressDCtx(opener->unsqueeze, out, plain, opener->room, len) != plain)
        return VREP_E_CORRUPT;
    return VREP_OK;
}

static int open_piece(struct vrep_opener *opener, const struct vrep_record *header,
                      const struct vrep_piece *piece, const uint8_t *stored, uint8_t *out)
{
    uint32_t len = piece->stored - VREP_TAG_BYTES;
    bool squeezed = (piece->word & VREP_PIECE_ZSTD) != 0;
    uint8_t *to = squeezed ? opener->room : out;
    int status = vrep_cipher_begin(&opener->cipher, false, header, piece->word, piece->index);

    if (status == VREP_OK)
        status = vrep_cipher_add(&opener->cipher, false, stored, len, to);
    if (status == VREP_OK)
        status = vrep_cipher_open_end(&opener->cipher, stored + len);
    if (status == VREP_OK && squeezed)
        status = unsqueeze(opener, len, out, piece->plain);
    if (status != VREP_OK)
        OPENSSL_cleanse(out, piece->plain); /* nothing unauthentic leaves */
    return status;
}

/* Bounds a piece word by its header alone: what a walk over the whole table would find. */
static int bound_piece(const struct vrep_record *header, uint32_t index, uint32_t word,
                       struct vrep_piece *piece)
{
    bool hashed = (header->flags & VREP_RECORD_HASHED) != 0;
    struct vrep_piece_walk walk;
    uint8_t stored_word[4];
    uint32_t number = index;

    if (index == VREP_PIECE_HASH && hashed)
        number = header->pieces - 1u;
    else if (index == VREP_PIECE_TALLY && header->kind == VREP_KIND_TALLY)
        number = 0;
    else if (header->kind == VREP_KIND_TALLY || index >= header->pieces - (hashed ? 1u : 0u))
        return VREP_E_CORRUPT;
    vrep_le_store_u32(stored_word, word);
    vrep_piece_walk_one(&walk, header, number, stored_word);
    return vrep_piece_walk_next(&walk, piece) == 1 ? VREP_OK : VREP_E_CORRUPT;
}

int vrep_opener_piece(struct vrep_opener *opener, const struct vrep_record *header, uint32_t index,
                      uint32_t word, const void *stored, size_t stored_len, void *out, size_t cap,
                      size_t *written)
{
    struct vrep_piece piece;
    int status = vrep_record_check(header);

    if (status != VREP_OK)
        return status;
    if (header->pieces == 0)
        return VREP_E_CORRUPT;
    status = bound_piece(header, index, word, &piece);
    if (status != VREP_OK)
        return status;
    if (piece.stored != stored_len)
        return VREP_E_CORRUPT;
    if (piece.plain > cap)
        return VREP_E_FULL;
    status = open_piece(opener, header, &piece, stored, out);
    if (status == VREP_OK)
        *written = piece.plain;
    return status;
}

int vrep_opener_record(struct vrep_opener *opener, const void *record, size_t len, void *out,
                       size_t cap, size_t *written)
{
    struct vrep_piece_walk walk;
    struct vrep_piece piece;
    struct whole whole;
    size_t total = 0;
    int status = take(record, len, &whole);

    if (status != VREP_OK)
        return status;
    if (whole.header.pieces > 0 && whole.header.length > cap)
        return VREP_E_FULL;
    if (whole.header.pieces > 0) {
        vrep_piece_walk_init(&walk, &whole.header, whole.words);
        while (status == VREP_OK && vrep_piece_walk_next(&walk, &piece) > 0) {
            if (piece.index == VREP_PIECE_HASH)
                break;
            status = open_piece(opener, &whole.header, &piece, whole.start + piece.at,
                                (uint8_t *)out + piece.offset);
            total = (size_t)piece.offset + piece.plain;
        }
    }
    if (status != VREP_OK) {
        OPENSSL_cleanse(out, total);
        return status;
    }
    *written = total;
    return VREP_OK;
}

int vrep_opener_hashes(struct vrep_opener *opener, const void *record, size_t len, void *out,
                       size_t cap, size_t *written)
{
    struct vrep_piece_walk walk;
    struct vrep_piece piece;
    struct whole whole;
    int status = take(record, len, &whole);

    if (status != VREP_OK)
        return status;
    if (!(whole.header.flags & VREP_RECORD_HASHED))
        return VREP_E_NOT_FOUND;
    vrep_piece_walk_init(&walk, &whole.header, whole.words);
    while (vrep_piece_walk_next(&walk, &piece) > 0 && piece.index != VREP_PIECE_HASH)
        ;
    if (piece.plain > cap)
        return VREP_E_FULL;
    status = open_piece(opener, &whole.header, &piece, whole.start + piece.at, out);
    if (status == VREP_OK)
        *written = piece.plain;
    return status;
}

/* The cut of a mark's plaintext; how many bytes it takes. */
static int cut_of(const uint8_t *plain, size_t len, struct vrep_opened_mark *out, size_t *taken)
{
    struct vrep_cut *cut = &out->cut;
    static const uint8_t zeroes[sizeof cut->reserved];

    if (len < sizeof *cut)
        return VREP_E_CORRUPT;
    memcpy(cut, plain, sizeof *cut);
    if (cut->lanes > VREP_LANES_MAX || memcmp(cut->reserved, zeroes, sizeof zeroes) != 0 ||
        len - sizeof *cut < cut->lanes * sizeof *out->at)
        return VREP_E_CORRUPT;
    memcpy(out->at, plain + sizeof *cut, cut->lanes * sizeof *out->at);
    for (uint16_t i = 0; i < cut->lanes; i++)
        if (out->at[i].reserved != 0 || (i > 0 && out->at[i - 1].lane >= out->at[i].lane))
            return VREP_E_CORRUPT;
    *taken = sizeof *cut + cut->lanes * sizeof *out->at;
    return VREP_OK;
}

int vrep_opener_mark(struct vrep_opener *opener, const void *record, size_t len,
                     struct vrep_opened_mark *out)
{
    uint8_t plain[VREP_MARK_BYTES_MAX];
    struct vrep_mark *mark = &out->mark;
    size_t got, at = sizeof *mark, taken = 0;
    uint8_t kind;
    int status = vrep_opener_record(opener, record, len, plain, sizeof plain, &got);

    memset(out, 0, sizeof *out);
    if (status == VREP_E_FULL)
        return VREP_E_INVALID; /* not a mark: those fit */
    if (status != VREP_OK)
        return status;
    memcpy(&kind, (const uint8_t *)record + offsetof(struct vrep_record, kind), sizeof kind);
    if (kind != VREP_KIND_MARK)
        return VREP_E_INVALID;
    if (got < sizeof *mark)
        return VREP_E_CORRUPT;
    memcpy(mark, plain, sizeof *mark);
    if (mark->version != VREP_MARK_VERSION && mark->version != VREP_MARK_CUT_VERSION)
        return VREP_E_VERSION;
    if (mark->version == VREP_MARK_CUT_VERSION)
        status = cut_of(plain + at, got - at, out, &taken);
    if (status != VREP_OK)
        return status;
    at += taken;
    if (mark->flags != 0 || mark->label_bytes > VREP_LABEL_BYTES_MAX ||
        mark->label_bytes != got - at || memchr(plain + at, 0, mark->label_bytes) != NULL)
        return VREP_E_CORRUPT;
    memcpy(out->label, plain + at, mark->label_bytes);
    return VREP_OK;
}

/* ---- tally --------------------------------------------------------------- */

struct vrep_tally_check {
    SHA256_CTX running;
    uint64_t records;
    uint64_t first_seq;
};

int vrep_tally_new(struct vrep_tally_check **out)
{
    struct vrep_tally_check *check = calloc(1, sizeof *check);
    int status;

    if (check == NULL)
        return VREP_E_NOMEM;
    status = vrep_tally_reset(check);
    if (status != VREP_OK) {
        vrep_tally_free(check);
        return status;
    }
    *out = check;
    return VREP_OK;
}

void vrep_tally_free(struct vrep_tally_check *check)
{
    free(check);
}

int vrep_tally_reset(struct vrep_tally_check *check)
{
    check->records = 0;
    check->first_seq = 0;
    return SHA256_Init(&check->running) == 1 ? VREP_OK : VREP_E_IO;
}

struct tally_state {
    uint32_t sums[8];
    uint32_t bits_low, bits_high;
    uint8_t pending[64];
    uint32_t pending_bytes, reserved;
    uint64_t records, first_seq;
};
static_assert(sizeof(struct tally_state) == VREP_TALLY_STATE_BYTES, "no padding");

void vrep_tally_save(const struct vrep_tally_check *check, uint8_t out[VREP_TALLY_STATE_BYTES])
{
    struct tally_state state = {
        .bits_low = check->running.Nl,
        .bits_high = check->running.Nh,
        .pending_bytes = check->running.num,
        .records = check->records,
        .first_seq = check->first_seq,
    };
    static_assert(sizeof state.sums == sizeof check->running.h, "same words");
    static_assert(sizeof state.pending == sizeof check->running.data, "same block");
    memcpy(state.sums, check->running.h, sizeof state.sums);
    memcpy(state.pending, check->running.data, state.pending_bytes);
    memcpy(out, &state, sizeof state);
}

int vrep_tally_load(struct vrep_tally_check *check, const uint8_t in[VREP_TALLY_STATE_BYTES])
{
    struct tally_state state;
    int status;

    memcpy(&state, in, sizeof state);
    if (state.pending_bytes >= sizeof state.pending || state.reserved != 0 ||
        state.bits_low % 512 != state.pending_bytes * 8)
        return VREP_E_CORRUPT;
    status = vrep_tally_reset(check);
    if (status != VREP_OK)
        return status;
    check->running.Nl = state.bits_low;
    check->running.Nh = state.bits_high;
    check->running.num = state.pending_bytes;
    memcpy(check->running.h, state.sums, sizeof state.sums);
    memcpy(check->running.data, state.pending, state.pending_bytes);
    check->records = state.records;
    check->first_seq = state.first_seq;
    return VREP_OK;
}

int vrep_tally_update(struct vrep_tally_check *check, const void *record, size_t len)
{
    struct vrep_piece_walk walk;
    struct vrep_piece piece;
    struct whole whole;
    int status = take(record, len, &whole);

    if (status != VREP_OK || vrep_record_is_aside(whole.header.kind))
        return status;
    if (SHA256_Update(&check->running, &whole.header, sizeof whole.header) != 1)
        return VREP_E_IO;
    vrep_piece_walk_init(&walk, &whole.header, whole.words);
    while (vrep_piece_walk_next(&walk, &piece) > 0) {
        const uint8_t *tag = whole.start + piece.at + piece.stored - VREP_TAG_BYTES;
        if (SHA256_Update(&check->running, tag, VREP_TAG_BYTES) != 1)
            return VREP_E_IO;
    }
    if (check->records++ == 0)
        check->first_seq = whole.header.seq;
    return VREP_OK;
}

int vrep_opener_tally(struct vrep_opener *opener, const void *record, size_t len,
                      const struct vrep_tally_check *check, struct vrep_tally *out)
{
    uint8_t running[32];
    SHA256_CTX fork;
    size_t got;
    uint8_t kind;
    int status = vrep_opener_record(opener, record, len, out, sizeof *out, &got);

    if (status == VREP_E_FULL)
        return VREP_E_INVALID; /* not a tally: those fit */
    if (status != VREP_OK)
        return status;
    memcpy(&kind, (const uint8_t *)record + offsetof(struct vrep_record, kind), sizeof kind);
    if (kind != VREP_KIND_TALLY)
        return VREP_E_INVALID;
    fork = check->running;
    if (SHA256_Final(running, &fork) != 1)
        return VREP_E_IO;
    if (memcmp(running, out->running, sizeof running) != 0 || out->records != check->records ||
        out->first_seq != check->first_seq ||
        memcmp(out->stream_id, opener->stream_id, sizeof out->stream_id) != 0)
        return VREP_E_CORRUPT;
    return VREP_OK;
}
