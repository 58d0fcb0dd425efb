#include "format/record.h"

#include <string.h>

#include "base/endian.h"
#include "format/checksum.h"

enum { HASH_BYTES = 16 };

/* What each kind allows; flags, lengths and what must be zero. */
struct rule {
    uint32_t length_min;
    uint32_t length_max;
    uint16_t flags;
    bool known;
    bool on_disk;  /* disk and offset have a meaning */
    bool sealed;   /* the plaintext stands in pieces */
    bool squeezed; /* pieces may be compressed */
};

#define COPIED (VREP_RECORD_FUA | VREP_RECORD_REPLAY)
static const struct rule rules[VREP_KIND_LAST + 1] = {
    [VREP_KIND_WRITE] = {1, VREP_WRITE_BYTES_MAX, COPIED | VREP_RECORD_HASHED, true, true, true,
                         true},
    [VREP_KIND_ZEROES] = {1, UINT32_MAX, COPIED, true, true, false, false},
    [VREP_KIND_RESIZE] = {0, 0, 0, true, true, false, false},
    [VREP_KIND_SYNC] = {1, VREP_WRITE_BYTES_MAX, COPIED | VREP_RECORD_HASHED, true, true, true,
                        true},
    [VREP_KIND_SYNC_ZEROES] = {1, UINT32_MAX, COPIED, true, true, false, false},
    [VREP_KIND_MARK] = {sizeof(struct vrep_mark), VREP_MARK_BYTES_MAX, 0, true, false, true, false},
    [VREP_KIND_GAP_BEGIN] = {0, 0, VREP_RECORD_JUMP, true, false, false, false},
    [VREP_KIND_GAP_END] = {0, 0, 0, true, false, false, false},
    [VREP_KIND_OBJECT] = {sizeof(struct vrep_object) + 1, VREP_OBJECT_BYTES_MAX, 0, true, false,
                          true, true},
    [VREP_KIND_STREAM] = {sizeof(struct vrep_stream), sizeof(struct vrep_stream), 0, true, false,
                          false, false},
    [VREP_KIND_TALLY] = {sizeof(struct vrep_tally), sizeof(struct vrep_tally), 0, true, false, true,
                         false},
};

static const struct rule *rule_of(uint8_t kind)
{
    if (kind > VREP_KIND_LAST || !rules[kind].known)
        return NULL;
    return &rules[kind];
}

bool vrep_record_is_data(uint8_t kind)
{
    return kind == VREP_KIND_WRITE || kind == VREP_KIND_SYNC;
}

bool vrep_record_is_sealed(uint8_t kind)
{
    const struct rule *rule = rule_of(kind);

    return rule != NULL && rule->sealed;
}

bool vrep_record_is_aside(uint8_t kind)
{
    return kind == VREP_KIND_STREAM || kind == VREP_KIND_TALLY;
}

uint32_t vrep_record_hash_blocks(uint64_t offset, uint32_t length, uint32_t *first)
{
    const uint32_t block = VREP_HASH_BLOCK_BYTES;
    uint32_t lead = (uint32_t)((block - (offset & (block - 1))) & (block - 1));

    *first = lead;
    return length > lead ? (length - lead) / block : 0;
}

uint32_t vrep_record_data_pieces(uint32_t length)
{
    return length / VREP_PIECE_BYTES_MAX + (length % VREP_PIECE_BYTES_MAX != 0);
}

size_t vrep_record_bound(uint8_t kind, uint64_t offset, uint32_t length)
{
    const struct rule *rule = rule_of(kind);
    size_t bytes = sizeof(struct vrep_record);
    uint32_t pieces, first, blocks;

    if (rule == NULL)
        return 0;
    if (!rule->sealed)
        return bytes + (kind == VREP_KIND_STREAM ? sizeof(struct vrep_stream) : 0);
    pieces = vrep_record_data_pieces(length);
    bytes += (size_t)pieces * (4 + VREP_TAG_BYTES) + length;
    if (vrep_record_is_data(kind)) {
        blocks = vrep_record_hash_blocks(offset, length, &first);
        if (blocks > 0)
            bytes += 4 + VREP_TAG_BYTES + (size_t)blocks * HASH_BYTES;
    }
    return bytes;
}

void vrep_record_init(struct vrep_record *record, uint8_t kind, uint32_t epoch, uint16_t lane)
{
    memset(record, 0, sizeof *record);
    record->magic = VREP_RECORD_MAGIC;
    record->version = VREP_RECORD_VERSION;
    record->kind = kind;
    record->epoch = epoch;
    record->lane = lane;
}

void vrep_record_finish(struct vrep_record *record)
{
    record->checksum = vrep_checksum32(record, offsetof(struct vrep_record, checksum));
}

static int check_range(const struct vrep_record *record, const struct rule *rule)
{
    if (record->length < rule->length_min || record->length > rule->length_max)
        return VREP_E_CORRUPT;
    if (!rule->on_disk)
        return record->disk == 0 && (record->offset == 0 || record->kind == VREP_KIND_OBJECT)
                   ? VREP_OK
                   : VREP_E_CORRUPT;
    if (record->disk >= VREP_DISKS_MAX || record->offset > (uint64_t)INT64_MAX - record->length)
        return VREP_E_CORRUPT;
    if (record->kind == VREP_KIND_RESIZE &&
        (record->offset == 0 || record->offset % VREP_SECTOR_BYTES != 0))
        return VREP_E_CORRUPT;
    return VREP_OK;
}

/* Piece count and body length, as far as the header alone fixes them. */
static int check_body(const struct vrep_record *record, const struct rule *rule)
{
    uint32_t pieces, first, blocks = 0;
    uint64_t most, least;

    if (!rule->sealed) {
        uint32_t body = record->kind == VREP_KIND_STREAM ? (uint32_t)sizeof(struct vrep_stream) : 0;
        return record->pieces == 0 && record->body_bytes == body ? VREP_OK : VREP_E_CORRUPT;
    }
    pieces = vrep_record_data_pieces(record->length);
    most = (uint64_t)pieces * (4 + VREP_TAG_BYTES) + record->length;
    least = rule->squeezed ? (uint64_t)pieces * (4 + VREP_TAG_BYTES + 1) : most;
    if (record->flags & VREP_RECORD_HASHED) {
        blocks = vrep_record_hash_blocks(record->offset, record->length, &first);
        if (blocks == 0)
            return VREP_E_CORRUPT;
        pieces++;
        most += 4 + VREP_TAG_BYTES + (uint64_t)blocks * HASH_BYTES;
        least += 4 + VREP_TAG_BYTES + (uint64_t)blocks * HASH_BYTES;
    }
    if (record->pieces != pieces || record->body_bytes < least || record->body_bytes > most)
        return VREP_E_CORRUPT;
    return VREP_OK;
}

int vrep_record_check(const struct vrep_record *record)
{
    const struct rule *rule;
    int status;

    if (record->magic != VREP_RECORD_MAGIC ||
        record->checksum != vrep_checksum32(record, offsetof(struct vrep_record, checksum)))
        return VREP_E_CORRUPT;
    if (record->version != VREP_RECORD_VERSION)
        return VREP_E_VERSION;
    rule = rule_of(record->kind);
    if (rule == NULL || (record->flags & ~rule->flags) != 0 || record->reserved != 0)
        return VREP_E_CORRUPT;
    if (record->seq == 0 && !vrep_record_is_aside(record->kind))
        return VREP_E_CORRUPT;
    status = check_range(record, rule);
    return status == VREP_OK ? check_body(record, rule) : status;
}

void vrep_piece_walk_init(struct vrep_piece_walk *walk, const struct vrep_record *record,
                          const void *words)
{
    walk->record = record;
    walk->word = words;
    walk->next = 0;
    walk->at = (uint32_t)(sizeof *record + record->pieces * sizeof(uint32_t));
}

void vrep_piece_walk_one(struct vrep_piece_walk *walk, const struct vrep_record *record,
                         uint32_t number, const void *word)
{
    vrep_piece_walk_init(walk, record, word);
    walk->next = number;
}

int vrep_piece_walk_next(struct vrep_piece_walk *walk, struct vrep_piece *piece)
{
    const struct vrep_record *record = walk->record;
    uint32_t end = (uint32_t)sizeof *record + record->body_bytes;
    uint32_t i = walk->next, first;
    bool hash, squeezed;

    if (i == record->pieces)
        return 0;
    hash = (record->flags & VREP_RECORD_HASHED) && i + 1 == record->pieces;
    piece->word = vrep_le_load_u32(walk->word);
    piece->stored = piece->word & VREP_PIECE_LENGTH_MASK;
    piece->at = walk->at;
    if (hash) {
        piece->index = VREP_PIECE_HASH;
        piece->offset = 0;
        piece->plain = vrep_record_hash_blocks(record->offset, record->length, &first) * HASH_BYTES;
    } else {
        piece->index = record->kind == VREP_KIND_TALLY ? VREP_PIECE_TALLY : i;
        piece->offset = i * VREP_PIECE_BYTES_MAX;
        piece->plain = record->length - piece->offset;
        if (piece->plain > VREP_PIECE_BYTES_MAX)
            piece->plain = VREP_PIECE_BYTES_MAX;
    }
    squeezed = (piece->word & ~VREP_PIECE_LENGTH_MASK) == VREP_PIECE_ZSTD;
    if (squeezed) {
        if (hash || !rules[record->kind].squeezed || piece->stored <= VREP_TAG_BYTES ||
            piece->stored - VREP_TAG_BYTES >= piece->plain)
            return VREP_E_CORRUPT;
    } else if (piece->word != piece->plain + VREP_TAG_BYTES) {
        return VREP_E_CORRUPT;
    }
    if (piece->stored > end - walk->at)
        return VREP_E_CORRUPT;
    walk->at += piece->stored;
    walk->word += sizeof(uint32_t);
    walk->next = i + 1;
    return 1;
}

int vrep_record_check_pieces(const struct vrep_record *record, const void *words)
{
    struct vrep_piece_walk walk;
    struct vrep_piece piece;
    int more;

    if (record->pieces == 0)
        return VREP_OK;
    vrep_piece_walk_init(&walk, record, words);
    while ((more = vrep_piece_walk_next(&walk, &piece)) > 0)
        ;
    if (more < 0)
        return more;
    return walk.at == sizeof *record + record->body_bytes ? VREP_OK : VREP_E_CORRUPT;
}

static bool all_zero(const uint8_t *bytes, size_t len)
{
    uint8_t seen = 0;

    for (size_t i = 0; i < len; i++)
        seen |= bytes[i];
    return seen == 0;
}

int vrep_stream_check(const struct vrep_stream *stream, const struct vrep_record *record)
{
    if (stream->checksum != vrep_checksum32(stream, offsetof(struct vrep_stream, checksum)) ||
        !all_zero(stream->reserved, sizeof stream->reserved) || stream->parent.reserved != 0 ||
        stream->epoch != record->epoch || stream->resume_seq != record->seq)
        return VREP_E_CORRUPT;
    return VREP_OK;
}

void vrep_stream_write(const struct vrep_stream *stream, uint16_t lane, uint8_t out[192])
{
    struct vrep_stream body = *stream;
    struct vrep_record record;

    body.checksum = vrep_checksum32(&body, offsetof(struct vrep_stream, checksum));
    vrep_record_init(&record, VREP_KIND_STREAM, body.epoch, lane);
    record.seq = body.resume_seq;
    record.length = sizeof body;
    record.body_bytes = sizeof body;
    record.wall_ns = body.wall_ns;
    vrep_record_finish(&record);
    memcpy(out, &record, sizeof record);
    memcpy(out + sizeof record, &body, sizeof body);
}

static struct vrep_position *lane_of(struct vrep_record_order *order, uint16_t lane)
{
    for (uint32_t i = 0; i < order->lanes; i++)
        if (order->last[i].lane == lane)
            return &order->last[i];
    return NULL;
}

int vrep_record_order_seed(struct vrep_record_order *order, struct vrep_position last)
{
    struct vrep_position *at = lane_of(order, last.lane);

    if (at == NULL) {
        if (order->lanes >= VREP_RECORD_LANES_MAX)
            return VREP_E_FULL;
        at = &order->last[order->lanes++];
    }
    *at = last;
    return VREP_OK;
}

int vrep_record_order_next(struct vrep_record_order *order, const struct vrep_record *record)
{
    struct vrep_position *last = lane_of(order, record->lane);
    struct vrep_position here = {.epoch = record->epoch, .lane = record->lane, .seq = record->seq};
    bool jump = record->kind == VREP_KIND_GAP_BEGIN && (record->flags & VREP_RECORD_JUMP);

    if (last == NULL)
        return vrep_record_order_seed(order, here);
    if (record->kind == VREP_KIND_STREAM && record->epoch > last->epoch) {
        *last = here;
        return VREP_OK;
    }
    if (record->epoch != last->epoch)
        return VREP_E_CORRUPT;
    if (vrep_record_is_aside(record->kind))
        return record->seq == last->seq ? VREP_OK : VREP_E_CORRUPT;
    if (jump ? record->seq <= last->seq : record->seq - 1 != last->seq)
        return VREP_E_CORRUPT;
    last->seq = record->seq;
    return VREP_OK;
}

/* One whole record at `bytes`: its size, 0 when only a part is there, or a status. */
static int64_t scan_one(const uint8_t *bytes, size_t len, struct vrep_record *record)
{
    const uint8_t *body = bytes + sizeof *record;
    size_t table;
    int status;

    if (len < sizeof *record)
        return 0;
    memcpy(record, bytes, sizeof *record);
    status = vrep_record_check(record);
    if (status != VREP_OK)
        return status;
    table = record->pieces * sizeof(uint32_t);
    len -= sizeof *record;
    if (len < table)
        return 0;
    status = vrep_record_check_pieces(record, body);
    if (status != VREP_OK)
        return status;
    if (len < record->body_bytes)
        return 0;
    if (record->kind == VREP_KIND_STREAM) {
        struct vrep_stream stream;
        memcpy(&stream, body, sizeof stream);
        status = vrep_stream_check(&stream, record);
        if (status != VREP_OK)
            return status;
    }
    return (int64_t)(sizeof *record + record->body_bytes);
}

int vrep_record_scan(const void *buffer, size_t len, struct vrep_record_order *order,
                     struct vrep_record_found *out, size_t cap, size_t *count, size_t *consumed)
{
    const uint8_t *bytes = buffer;
    size_t at = 0, found = 0;
    int status = VREP_OK;

    while (found < cap) {
        int64_t size = scan_one(bytes + at, len - at, &out[found].header);
        if (size <= 0) {
            status = (int)size;
            break;
        }
        if (order != NULL) {
            status = vrep_record_order_next(order, &out[found].header);
            if (status != VREP_OK)
                break;
        }
        out[found++].position = at;
        at += (size_t)size;
    }
    *count = found;
    *consumed = at;
    return status;
}
