/*
 * Record: the header, the piece table and the order of records, as they stand
 * on the wire, in a spill and in a journal (struct vrep_record of layout.h).
 *
 * Everything here reads plain bytes and needs no key; sealing is in seal/. A
 * header is judged before its body arrives: after vrep_record_check succeeded,
 * `length`, `pieces` and `body_bytes` lie within the limits of the record's
 * kind and agree with each other, so a reader may size a buffer by them.
 *
 * Units: bytes; positions count from the start of the buffer. Limits: 32 MiB of
 * data per record, VREP_RECORD_LANES_MAX lanes in one order check. Buffers may
 * have any alignment; structs given by pointer have their own.
 *
 * Threading: no state is kept between calls; a struct vrep_record_order belongs
 * to one thread at a time.
 */
#ifndef VREP_FORMAT_RECORD_H
#define VREP_FORMAT_RECORD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "format/layout.h"

/* No record takes more bytes than this, header included. */
#define VREP_RECORD_BYTES_MAX                                                                      \
    (64u + VREP_PIECES_MAX * (4u + VREP_TAG_BYTES) + VREP_WRITE_BYTES_MAX +                        \
     VREP_WRITE_BYTES_MAX / VREP_HASH_BLOCK_BYTES * 16u)

/* WRITE and SYNC: data of a disk stand in the body. */
bool vrep_record_is_data(uint8_t kind);

/* WRITE, SYNC, MARK, OBJECT and TALLY: the plaintext stands in sealed pieces. */
bool vrep_record_is_sealed(uint8_t kind);

/* STREAM and TALLY: the record carries the seq of the one before it. */
bool vrep_record_is_aside(uint8_t kind);

/* Aligned 4 KiB blocks that [offset, offset + length) fully covers; *first is
 * the byte offset of the first one, relative to `offset`. */
uint32_t vrep_record_hash_blocks(uint64_t offset, uint32_t length, uint32_t *first);

/* Pieces that hold `length` bytes of plaintext, the hash piece not counted. */
uint32_t vrep_record_data_pieces(uint32_t length);

/* Most bytes that a record of this kind and range can take once sealed. */
size_t vrep_record_bound(uint8_t kind, uint64_t offset, uint32_t length);

/* A zeroed header with magic, version, kind, epoch and lane. */
void vrep_record_init(struct vrep_record *record, uint8_t kind, uint32_t epoch, uint16_t lane);

/* Stores the checksum; the last step of writing a header. */
void vrep_record_finish(struct vrep_record *record);

/*
 * Judges a header by itself. VREP_E_CORRUPT: magic, checksum or a field is
 * wrong; VREP_E_VERSION: a whole header of a version this code does not read.
 */
int vrep_record_check(const struct vrep_record *record);

/*
 * Judges the piece table of a checked record; `words` points at its
 * record->pieces words. VREP_E_CORRUPT: a word is out of bounds, or their sum is
 * not body_bytes.
 */
int vrep_record_check_pieces(const struct vrep_record *record, const void *words);

/* One piece of a checked record with a checked table. */
struct vrep_piece {
    uint32_t index;  /* number in the nonce: 0.., VREP_PIECE_HASH or VREP_PIECE_TALLY */
    uint32_t word;   /* piece word as stored */
    uint32_t stored; /* bytes stored, tag included */
    uint32_t plain;  /* bytes of plaintext */
    uint32_t offset; /* of the plaintext in the record's plaintext; 0 for the hash piece */
    uint32_t at;     /* of the stored bytes, from the start of the header */
};

/* A walk over the pieces of a record; `words` must outlive it. */
struct vrep_piece_walk {
    const struct vrep_record *record;
    const uint8_t *word; /* the next one */
    uint32_t next;
    uint32_t at;
};
void vrep_piece_walk_init(struct vrep_piece_walk *walk, const struct vrep_record *record,
                          const void *words);

/* The same for one piece alone: `number` is its place in the table, `word` its word;
 * `at` of the piece then means nothing. */
void vrep_piece_walk_one(struct vrep_piece_walk *walk, const struct vrep_record *record,
                         uint32_t number, const void *word);

/* 1 and *piece filled, 0 at the end, VREP_E_CORRUPT when a word is out of bounds. */
int vrep_piece_walk_next(struct vrep_piece_walk *walk, struct vrep_piece *piece);

/* Judges the plain body of a checked STREAM record. */
int vrep_stream_check(const struct vrep_stream *stream, const struct vrep_record *record);

/* Writes a whole STREAM record (192 bytes) for `stream`, whose epoch, resume_seq
 * and wall_ns give those of the header. Stores both checksums. */
void vrep_stream_write(const struct vrep_stream *stream, uint16_t lane, uint8_t out[192]);

/*
 * Order of the records of several lanes. Starts zeroed (knows nothing: the first
 * record of a lane is taken as it is) or seeded with vrep_record_order_seed.
 *
 * Rule, per lane: a STREAM either carries the last seq of its epoch or begins a
 * larger epoch; a TALLY carries the last seq; any other record has the epoch of
 * the last STREAM and the next seq, but a gap-begin with VREP_RECORD_JUMP may
 * have any larger one.
 */
#define VREP_RECORD_LANES_MAX 16u
struct vrep_record_order {
    uint32_t lanes;
    uint32_t reserved;
    struct vrep_position last[VREP_RECORD_LANES_MAX];
};

/* Sets the last position of a lane; VREP_E_FULL when there are too many lanes. */
int vrep_record_order_seed(struct vrep_record_order *order, struct vrep_position last);

/* Takes the next checked record: VREP_E_CORRUPT when it breaks the order. */
int vrep_record_order_next(struct vrep_record_order *order, const struct vrep_record *record);

/* What a scan found: the header as stored, and where in the buffer. */
struct vrep_record_found {
    struct vrep_record header;
    uint64_t position;
};
static_assert(sizeof(struct vrep_record_found) == 72, "no padding");

/*
 * Walks the records that stand back to back in a buffer: header, piece table,
 * body of STREAM records and, unless `order` is NULL, the order of each.
 *
 * Fills out[0..*count) and sets *consumed to the end of the last record that is
 * whole and right. VREP_OK: the walk ended at the end of the buffer, at a record
 * that the buffer holds only in part, or because `out` is full. VREP_E_CORRUPT or
 * VREP_E_VERSION: the record at *consumed is wrong.
 */
int vrep_record_scan(const void *buffer, size_t len, struct vrep_record_order *order,
                     struct vrep_record_found *out, size_t cap, size_t *count, size_t *consumed);

#endif
