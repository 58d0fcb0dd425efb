/*
 * Seal: turns changes into sealed records, and sealed records back into bytes.
 *
 * A sealer is one stream: one key, one lane of one epoch. It compresses each
 * piece when that pays, seals it with AES-256-GCM, adds the sealed block hashes,
 * and writes whole records back to back into the caller's buffer. It never seals
 * a seq twice: seqs must follow each other (a gap-begin with VREP_RECORD_JUMP may
 * skip some), and after a failure inside a record it refuses everything. An opener
 * is the reverse for one stream; it trusts nothing but its key. A tally check
 * follows the running digest of a stream without any key.
 *
 * layout.h defines the bytes. Units: bytes; times in nanoseconds. Limits: those
 * of layout.h; output must have room for vrep_record_bound of a record before it
 * is begun. Payload is read where it lies and must not change during the call.
 * Contexts and buffers are made once per handle (about 400 KiB), nothing is
 * allocated per record. Keys and the buffers of a handle are wiped at free; the work space of
 * zstd is not.
 *
 * Threading: a handle belongs to one thread at a time; handles share nothing.
 */
#ifndef VREP_SEAL_SEAL_H
#define VREP_SEAL_SEAL_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#include "format/layout.h"
#include "format/record.h"

/* Key of a stream: HKDF-SHA256(data_key, no salt, "vrep stream v1" || stream_id). */
int vrep_stream_key(const uint8_t data_key[32], const uint8_t stream_id[16],
                    uint8_t out[VREP_STREAM_KEY_BYTES]);

/* ---- sealing ------------------------------------------------------------- */

#define VREP_SEAL_LEVEL_MAX 19

struct vrep_sealer_options {
    const uint8_t *key;         /* VREP_STREAM_KEY_BYTES, copied */
    const uint8_t *hash_secret; /* VREP_HASH_SECRET_BYTES, copied; NULL: no hash pieces */
    uint8_t stream_id[16];
    uint64_t resume_seq; /* the first record has seq resume_seq + 1, or jumps */
    uint32_t epoch;
    uint16_t lane;
    int level; /* zstd level, 0: no compression */
};

/* One change to seal. flags: FUA, REPLAY or JUMP. */
struct vrep_seal_source {
    uint8_t kind; /* any but STREAM and TALLY */
    uint16_t flags;
    uint16_t disk;
    uint64_t seq;
    uint64_t offset;
    uint32_t length;
    uint32_t iovecs;         /* 0 for a kind without a body */
    const struct iovec *iov; /* exactly `length` bytes */
    uint64_t wall_ns;
    uint64_t mono_ns;
};

struct vrep_sealer;

int vrep_sealer_new(const struct vrep_sealer_options *options, struct vrep_sealer **out);
void vrep_sealer_free(struct vrep_sealer *sealer);

/* Compress what is sealed from now on at another level, 0: not at all. INVALID; NOMEM, and
 * then not at all. */
int vrep_sealer_set_level(struct vrep_sealer *sealer, int level);

/* Last seq sealed; resume_seq before the first. */
uint64_t vrep_sealer_seq(const struct vrep_sealer *sealer);

/* The STREAM record that opens the stream; only before the first record. Of
 * `stream`, epoch, stream_id and resume_seq are the sealer's own. FULL when cap
 * is too small. */
int vrep_sealer_stream(struct vrep_sealer *sealer, const struct vrep_stream *stream, uint8_t *out,
                       size_t cap, size_t *written);

/*
 * Seals records[0..n) one after another into out. Stops before a record that may
 * not fit into what is left of `cap`; VREP_E_FULL when that is the first one.
 * INVALID: a record is not lawful, or its seq does not follow. Either way
 * *n_done records are whole in out[0..*written). VREP_E_IO: libcrypto failed.
 */
int vrep_sealer_seal(struct vrep_sealer *sealer, const struct vrep_seal_source *records, size_t n,
                     uint8_t *out, size_t cap, size_t *written, size_t *n_done);

/* A TALLY over everything sealed so far. INVALID when nothing was sealed since
 * the last one: a second would use its nonce again. */
int vrep_sealer_tally(struct vrep_sealer *sealer, uint64_t wall_ns, uint64_t mono_ns, uint8_t *out,
                      size_t cap, size_t *written);

/* What compression did so far. */
struct vrep_seal_stats {
    uint64_t records;
    uint64_t pieces;
    uint64_t pieces_tried; /* handed to zstd */
    uint64_t pieces_zstd;  /* stored compressed */
    uint64_t bytes_plain;
    uint64_t bytes_sealed; /* whole records */
};
void vrep_sealer_stats(const struct vrep_sealer *sealer, struct vrep_seal_stats *out);

struct vrep_ring_reader; /* ring/ring.h */

/*
 * Seals what the ring published: records from_seq..to_seq, payload taken from the
 * ring's memory in place. Otherwise as vrep_sealer_seal; also the errors of
 * vrep_ring_reader_desc and vrep_ring_reader_iov. The ring must not release these
 * records before the call ends (the caller is a target's consumer that holds
 * them).
 */
int vrep_sealer_seal_ring(struct vrep_sealer *sealer, const struct vrep_ring_reader *reader,
                          uint64_t from_seq, uint64_t to_seq, uint8_t *out, size_t cap,
                          size_t *written, size_t *n_done);

/* ---- opening ------------------------------------------------------------- */

struct vrep_opener;

int vrep_opener_new(const uint8_t key[VREP_STREAM_KEY_BYTES], const uint8_t stream_id[16],
                    struct vrep_opener **out);
void vrep_opener_free(struct vrep_opener *opener);

/*
 * Opens one piece: `index` is its number in the nonce, `word` its piece word,
 * `stored` its bytes (as many as the word says, or CORRUPT). The plaintext goes to
 * out, *written bytes; FULL when cap is smaller. AUTH: key, header, word, index or
 * bytes are not those that were sealed. CORRUPT: the header or word is not lawful,
 * or authentic bytes do not decompress to exactly the piece. After a failure
 * out[0..cap) holds no plaintext.
 */
int vrep_opener_piece(struct vrep_opener *opener, const struct vrep_record *header, uint32_t index,
                      uint32_t word, const void *stored, size_t stored_len, void *out, size_t cap,
                      size_t *written);

/* Opens all data pieces of a whole record (header, words, pieces): header.length
 * bytes. TORN: the buffer ends inside it. */
int vrep_opener_record(struct vrep_opener *opener, const void *record, size_t len, void *out,
                       size_t cap, size_t *written);

/* Opens the hash piece of a whole record: 16 bytes per block. NOT_FOUND: it has none. */
int vrep_opener_hashes(struct vrep_opener *opener, const void *record, size_t len, void *out,
                       size_t cap, size_t *written);

/* A MARK in the clear. `cut` and `at` are zero where its version is VREP_MARK_VERSION. */
struct vrep_opened_mark {
    struct vrep_mark mark;
    struct vrep_cut cut;
    struct vrep_position at[VREP_LANES_MAX]; /* cut.lanes of them, rising by lane */
    char label[VREP_LABEL_BYTES_MAX + 1];    /* NUL-terminated */
};
int vrep_opener_mark(struct vrep_opener *opener, const void *record, size_t len,
                     struct vrep_opened_mark *out);

/* ---- tally --------------------------------------------------------------- */

/* The running digest of a stream, computed from the records as stored. */
struct vrep_tally_check;

int vrep_tally_new(struct vrep_tally_check **out);
void vrep_tally_free(struct vrep_tally_check *check);

/* Starts again, for the next stream. */
int vrep_tally_reset(struct vrep_tally_check *check);

/* What a check took so far as bytes, so that another process can go on; nothing secret, and to be
 * kept where nobody else can change it. CORRUPT: those bytes are not a state. */
#define VREP_TALLY_STATE_BYTES 128u
void vrep_tally_save(const struct vrep_tally_check *check, uint8_t out[VREP_TALLY_STATE_BYTES]);
int vrep_tally_load(struct vrep_tally_check *check, const uint8_t in[VREP_TALLY_STATE_BYTES]);

/* Takes the next whole record of the stream; STREAM and TALLY records change nothing. */
int vrep_tally_update(struct vrep_tally_check *check, const void *record, size_t len);

/* Opens a TALLY record and compares. AUTH: not sealed with this key, or changed.
 * CORRUPT: authentic, but the records taken are not those it counted. */
int vrep_opener_tally(struct vrep_opener *opener, const void *record, size_t len,
                      const struct vrep_tally_check *check, struct vrep_tally *out);

#endif
