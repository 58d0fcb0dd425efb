/* Layout: every struct, magic and version that vrep writes to a disk, a wire
 * or shared memory, and nothing else.  All integers are little-endian, all
 * offsets, lengths and sizes are bytes, all times are nanoseconds, all
 * reserved bytes are written as zero and refused when not zero.  A struct
 * that is trusted before its body carries its own `checksum`
 * (vrep_checksum32 of all bytes before that field); bodies carry a 128-bit
 * digest (XXH3-128) or an AEAD tag.  docs/internals/formats.md explains each
 * byte; tests/golden pins them.
 *
 * A change of any struct here is a new version of its format.  Hosts are
 * little-endian (checked below), so structs are used in place.
 */
#ifndef VREP_FORMAT_LAYOUT_H
#define VREP_FORMAT_LAYOUT_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "vrep maps its formats in place and needs a little-endian host"
#endif

#define VREP_LAYOUT(type, bytes)                                                                   \
    static_assert(sizeof(type) == (bytes), #type " must be " #bytes " bytes")
#define VREP_AT(type, field, at)                                                                   \
    static_assert(offsetof(type, field) == (at), #type "." #field " must be at " #at)

/* ---- limits ------------------------------------------------------------ */

#define VREP_DISKS_MAX 64u               /* disks of one lane */
#define VREP_LANES_MAX 64u               /* lanes of one protection group */
#define VREP_TARGETS_MAX 8u              /* targets in the formats; the code accepts one */
#define VREP_GENERATIONS 4u              /* generations of a change map */
#define VREP_WRITE_BYTES_MAX (32u << 20) /* one guest write */
#define VREP_PIECE_BYTES_MAX (128u << 10)
#define VREP_PIECES_MAX 257u             /* 32 MiB of data pieces and one hash piece */
#define VREP_HASH_BLOCK_BYTES 4096u      /* unit of sealed block hashes */
#define VREP_CHUNK_BYTES 4096u           /* unit of ring payload */
#define VREP_MAP_BIT_BYTES 65536u        /* default bytes per change-map bit */
#define VREP_INTENT_BYTES (16u << 20)    /* bytes per write-intent extent */
#define VREP_SECTOR_BYTES 512u           /* disk sizes are multiples of this */
#define VREP_NAME_BYTES 64u              /* NUL-terminated names in structs */
#define VREP_OBJECT_BYTES_MAX (8u << 20) /* plaintext of an OBJECT record */
#define VREP_LABEL_BYTES_MAX 255u        /* label of a mark, name of an object */

/* ---- common ------------------------------------------------------------ */

/* A position in a group's history.  Within one ancestry, positions of a lane
 * are ordered by (epoch, seq).  seq starts at 1; 0 means "nothing". */
struct vrep_position {
    uint32_t epoch;
    uint16_t lane;
    uint16_t reserved;
    uint64_t seq;
};
VREP_LAYOUT(struct vrep_position, 16);

enum vrep_kind {
    VREP_KIND_WRITE = 1,       /* guest data */
    VREP_KIND_ZEROES = 2,      /* range reads zero; no body */
    VREP_KIND_RESIZE = 3,      /* offset = new size of the disk, length 0; no body */
    VREP_KIND_SYNC = 4,        /* re-read data (sync copy) */
    VREP_KIND_SYNC_ZEROES = 5, /* re-read and found zero or a hole; no body */
    VREP_KIND_MARK = 6,        /* named or timed checkpoint; body: sealed vrep_mark + label */
    VREP_KIND_GAP_BEGIN = 7,   /* no recovery point from here ... */
    VREP_KIND_GAP_END = 8,     /* ... to here (this position is recoverable) */
    VREP_KIND_OBJECT = 9,      /* body: sealed vrep_object + name + blob */
    VREP_KIND_STREAM = 10,     /* plain vrep_stream body: records that follow are sealed under it */
    VREP_KIND_TALLY = 11,      /* sealed vrep_tally: running MAC up to and including its seq */
};
#define VREP_KIND_LAST VREP_KIND_TALLY

/* mono_ns of a gap-begin at which a repair ended a history of which its source must compare
 * everything; no filter's host has just started at the moment of a record */
#define VREP_MONO_REPAIRED 1u

/* ---- record: wire, spill and journal ------------------------------------ */

#define VREP_RECORD_MAGIC 0x52504556u /* "VEPR" */
#define VREP_RECORD_VERSION 1u

#define VREP_RECORD_FUA 0x0001u    /* the guest asked for FUA */
#define VREP_RECORD_REPLAY 0x0002u /* sync copy made by a filter restart */
#define VREP_RECORD_HASHED 0x0004u /* the last piece is the hash piece */
#define VREP_RECORD_JUMP 0x0008u   /* gap-begin after which seq need not be contiguous */
#define VREP_RECORD_FLAGS 0x000fu

/* Header of every record.  The body that follows has body_bytes bytes:
 * pieces x uint32_t piece words, then the pieces back to back.  A piece word
 * is the stored length (ciphertext and 16-byte tag) in its low 24 bits and
 * VREP_PIECE_* flags above.  Data piece i covers plaintext bytes
 * [i * 128 KiB, min((i + 1) * 128 KiB, length)).  A hash piece, when flagged,
 * is the last one: 16 bytes (XXH3-128, canonical low then high, little-endian)
 * for each aligned 4 KiB block that [offset, offset + length) fully covers;
 * there is none, and no flag, when it covers no block.
 *
 * Only pieces of WRITE, SYNC and OBJECT records may be compressed, and then
 * they are shorter than their plaintext.  disk, offset and length are zero
 * where the kind gives them no meaning (MARK, OBJECT and TALLY have a length).
 *
 * Sealing: AES-256-GCM, key = stream key, nonce = seq (8 bytes LE) || piece
 * index (4 bytes LE; VREP_PIECE_HASH for the hash piece, VREP_PIECE_TALLY for
 * a tally), associated data = the 64 header bytes, then the piece word (4
 * bytes LE), then the piece index (4 bytes LE).
 *
 * One stream seals one lane of one epoch, each seq at most once and in rising
 * order, and at most one tally per seq: no nonce is ever used twice.
 *
 * STREAM and TALLY records do not consume a seq: they carry the seq of the
 * last record before them (0 at the beginning of history).  That of a STREAM
 * equals its resume_seq. */
struct vrep_record {
    uint32_t magic;
    uint8_t version;
    uint8_t kind;
    uint16_t flags;
    uint32_t epoch;
    uint16_t lane;
    uint16_t disk;
    uint64_t seq;
    uint64_t offset;
    uint32_t length;     /* plaintext bytes; for zeroes, bytes of the range */
    uint32_t body_bytes; /* bytes after this header */
    uint64_t wall_ns;    /* CLOCK_REALTIME when the order was fixed */
    uint64_t mono_ns;    /* CLOCK_MONOTONIC of the filter's host */
    uint16_t pieces;
    uint16_t reserved;
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_record, 64);
VREP_AT(struct vrep_record, seq, 16);
VREP_AT(struct vrep_record, length, 32);
VREP_AT(struct vrep_record, wall_ns, 40);
VREP_AT(struct vrep_record, checksum, 60);

#define VREP_PIECE_LENGTH_MASK 0x00ffffffu
#define VREP_PIECE_ZSTD 0x01000000u  /* plaintext is one zstd frame of the piece */
#define VREP_PIECE_HASH 0x80000000u  /* nonce index of the hash piece */
#define VREP_PIECE_TALLY 0x80000001u /* nonce index of a tally */
#define VREP_TAG_BYTES 16u
#define VREP_STREAM_KEY_BYTES 32u
#define VREP_HASH_SECRET_BYTES 192u

/* Plain body of a STREAM record (pieces = 0, length = body_bytes = 128). The stream key is
 * HKDF-SHA256(data key of key_generation, no salt, info = "vrep stream v1" || stream id). */
struct vrep_stream {
    uint8_t stream_id[16];
    uint8_t epoch_id[16];
    uint8_t parent_epoch_id[16];
    struct vrep_position parent; /* where this epoch left its parent; zero for the first */
    uint64_t resume_seq;         /* the next record has seq resume_seq + 1, or is a JUMP */
    uint32_t epoch;
    uint32_t key_generation;
    uint64_t wall_ns;
    uint8_t reserved[36];
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_stream, 128);

/* Plaintext of a TALLY's single piece.  running = SHA-256 over, for each
 * record of the stream in order (TALLY and STREAM records left out): its 64
 * header bytes, then the tags of its pieces in order.  A record that was
 * removed, added or put elsewhere changes it. */
struct vrep_tally {
    uint8_t running[32];
    uint8_t stream_id[16];
    uint64_t records;   /* of this stream so far */
    uint64_t first_seq; /* of this stream */
};
VREP_LAYOUT(struct vrep_tally, 64);

/* Plaintext of a MARK: this struct, in version 2 a struct vrep_cut, then
 * label_bytes of UTF-8. */
#define VREP_MARK_VERSION 1u     /* of a lane alone */
#define VREP_MARK_CUT_VERSION 2u /* of a cut over the lanes of a group */
struct vrep_mark {
    uint64_t wall_ns;
    uint16_t version;     /* VREP_MARK_*VERSION */
    uint16_t label_bytes; /* <= 255 */
    uint32_t flags;       /* 0 */
};
VREP_LAYOUT(struct vrep_mark, 16);

/* A cut over several lanes. lanes = 0: the mark of one lane, which alone is no
 * recovery point, and has no label. lanes > 0: the record that completes the cut,
 * in one of its lanes: behind this struct stand the positions of the marks, a
 * struct vrep_position for each lane of the group, rising by lane; seq 0 is a lane
 * that had no part. */
struct vrep_cut {
    uint8_t cut_id[16];
    uint16_t lanes; /* <= VREP_LANES_MAX */
    uint8_t reserved[14];
};
VREP_LAYOUT(struct vrep_cut, 32);
#define VREP_MARK_BYTES_MAX 1327u /* plaintext of a MARK */
_Static_assert(VREP_MARK_BYTES_MAX == sizeof(struct vrep_mark) + sizeof(struct vrep_cut) +
                                          VREP_LANES_MAX * sizeof(struct vrep_position) +
                                          VREP_LABEL_BYTES_MAX,
               "a cut over all lanes with the longest label");

/* Plaintext of an OBJECT: this struct, then name_bytes of UTF-8, then the
 * blob, up to the length of the record. The record's offset is a random number
 * that all versions of the object have, so that a fold can let old ones go
 * though their name is sealed; 0: none. */
struct vrep_object {
    uint64_t wall_ns;
    uint16_t version;    /* 1 */
    uint16_t name_bytes; /* 1..255 */
    uint32_t flags;      /* 0 */
};
VREP_LAYOUT(struct vrep_object, 16);

/* ---- ring: shared memory ------------------------------------------------ */

#define VREP_RING_MAGIC 0x474e495250455256ull /* "VREPRING" */
#define VREP_RING_VERSION 1u

/* One change, in flight or not yet published; 64 bytes, one cache line. */
enum vrep_slot_state {
    VREP_SLOT_FREE = 0,
    VREP_SLOT_RESERVED = 1,  /* descriptor and chunks held, nothing granted */
    VREP_SLOT_GRANTED = 2,   /* marked; its backing write may have started */
    VREP_SLOT_UNRECORDED = 3 /* granted without descriptor: unshipped + gap flag stored first */
};
struct vrep_ring_slot {
    uint32_t state;
    uint8_t kind;
    uint8_t generation; /* of the change map; 0xff: none */
    uint16_t disk;
    uint64_t offset;
    uint64_t seq; /* stored by publish before head; judged by seq <= head */
    uint32_t length;
    uint32_t chunk; /* first payload chunk; VREP_NO_CHUNK: none */
    uint32_t chunks;
    uint16_t flags; /* VREP_RECORD_* */
    uint16_t lane;
    uint64_t granted_ns;
    uint64_t reserved[2];
};
VREP_LAYOUT(struct vrep_ring_slot, 64);

/* One published change, in order: descriptor of seq s is slot s % descriptors.
 * Payload bytes are the chain of chunks from `chunk` through next[]. */
struct vrep_ring_desc {
    uint64_t seq;
    uint64_t offset;
    uint32_t length;
    uint32_t chunk;
    uint32_t chunks;
    uint8_t kind;
    uint8_t generation;
    uint16_t flags;
    uint16_t disk;
    uint16_t lane;
    uint32_t epoch;
    uint64_t wall_ns;
    uint64_t mono_ns;
    uint64_t reserved;
};
VREP_LAYOUT(struct vrep_ring_desc, 64);
#define VREP_NO_CHUNK 0xffffffffu

struct vrep_ring_header {
    uint64_t magic;
    uint32_t version;
    uint32_t header_bytes; /* 4096 */
    uint64_t file_bytes;
    uint8_t group_id[16];
    uint8_t boot_id[16]; /* of the host: memory of another boot is not ours */
    uint8_t epoch_id[16];
    uint32_t epoch;
    uint16_t lane;
    uint16_t reserved0;
    uint32_t descriptors; /* power of two */
    uint32_t slots;
    uint32_t chunks;
    uint32_t chunk_bytes;
    uint64_t slots_at; /* file offsets of the regions */
    uint64_t descs_at;
    uint64_t next_at; /* uint32_t[chunks] */
    uint64_t chunks_at;
    uint64_t first_seq; /* head at creation: the first record has first_seq + 1 */
    uint8_t reserved1[372];
    uint32_t checksum; /* of the 508 bytes before */

    /* what changes; each on its own cache line */
    uint64_t head;           /* at 512: last published seq */
    uint64_t free_bytes_one; /* of payload chunks when head or released moved last, plus 1; 0: the
                                producer does not say */
    uint8_t pad0[48];
    uint64_t released;   /* at 576: descriptors <= released, and their chunks, are free */
    uint64_t durable;    /* every target holds everything <= durable; <= released, but for a ring
                            that began above it */
    uint64_t spilled_ns; /* CLOCK_REALTIME of the oldest record that was released and is not
                            durable; 0: none */
    uint8_t pad1[40];
    uint64_t incarnation; /* at 640: starts of a producer */
    uint64_t producer_pid;
    uint64_t clean; /* 1: the last producer detached cleanly */
    uint8_t pad2[40];
    uint8_t pad3[3392];
};
VREP_LAYOUT(struct vrep_ring_header, 4096);
VREP_AT(struct vrep_ring_header, checksum, 508);
VREP_AT(struct vrep_ring_header, head, 512);
VREP_AT(struct vrep_ring_header, released, 576);
VREP_AT(struct vrep_ring_header, incarnation, 640);

/* A consumer's control file, 4096 bytes, written by the consumer, read by the
 * filter: each value copied once, checked monotonic and <= head. */
#define VREP_CONTROL_MAGIC 0x4c54435250455256ull /* "VREPRCTL" */
#define VREP_CONTROL_VERSION 1u
#define VREP_CONTROL_OBSERVER 1u /* never holds release */
#define VREP_CONTROL_TARGET 2u
struct vrep_ring_control {
    uint64_t magic;
    uint32_t version;
    uint32_t role;
    uint8_t target_id[16];
    uint64_t pid;
    uint8_t pad0[24];
    uint64_t durable; /* at 64: a target holds everything <= durable */
    uint64_t received;
    uint64_t read;    /* sealed and sent */
    uint64_t spilled; /* everything <= spilled is durable, or safe on the source's own disk */
    uint8_t pad1[32];
    uint32_t waiting; /* at 128: not 0 = wants one eventfd signal when head moves; a new value each
                         time */
    uint8_t pad2[60];
    uint8_t pad3[3904];
};
VREP_LAYOUT(struct vrep_ring_control, 4096);
VREP_AT(struct vrep_ring_control, durable, 64);
VREP_AT(struct vrep_ring_control, waiting, 128);

/* ---- change map: shared memory, and its checkpoint on disk --------------- */

#define VREP_MAP_MAGIC 0x50414d5045525600ull
#define VREP_MAP_VERSION 1u

enum vrep_generation_state {
    VREP_GENERATION_FREE = 0,
    VREP_GENERATION_OPEN = 1,
    VREP_GENERATION_SEALED = 2
};
struct vrep_map_generation {
    uint32_t state;
    uint32_t inflight; /* recomputed from the slots at a restart */
    uint64_t last_seq;
    uint64_t opened_seq; /* head when it was opened, or one above the one before: order of age */
    uint64_t reserved;
};
VREP_LAYOUT(struct vrep_map_generation, 32);

struct vrep_map_disk {
    uint64_t bytes; /* size of the disk */
    uint64_t bits;
    uint64_t words;      /* uint64_t per bitmap, padded to a page */
    uint64_t bitmaps_at; /* file offset: generation 0..3, then unshipped, each words * 8 bytes */
};
VREP_LAYOUT(struct vrep_map_disk, 32);

struct vrep_map_header {
    uint64_t magic;
    uint32_t version;
    uint32_t header_bytes; /* 4096 */
    uint64_t file_bytes;
    uint8_t group_id[16];
    uint8_t target_id[16];
    uint8_t boot_id[16];
    uint32_t bit_bytes;
    uint32_t disks;
    uint8_t reserved0[44];
    uint32_t checksum; /* at 124, of the 124 bytes before */
    /* what changes */
    uint32_t gap;      /* at 128: 1 = a gap must be, or is, recorded */
    uint32_t gap_open; /* 1 = gap-begin has been published */
    uint64_t gap_seq;  /* of that gap-begin */
    uint32_t open_generation;
    uint32_t unverified; /* reason code, 0 = verified */
    /* 0, or 0x100 | to << 4 | from: commands of generation `from` count in `to` (a merge whose
     * owner may have died before it told them) */
    uint32_t merge;
    uint32_t reserved1;
    uint64_t gap_last; /* of the newest gap-begin since the map was made; 0: none */
    uint64_t reserved4[3];
    struct vrep_map_generation generation[VREP_GENERATIONS]; /* at 192 */
    uint8_t reserved2[192];
    struct vrep_map_disk disk[VREP_DISKS_MAX]; /* at 512 */
    uint8_t reserved3[1536];
};
VREP_LAYOUT(struct vrep_map_header, 4096);
VREP_AT(struct vrep_map_header, gap, 128);
VREP_AT(struct vrep_map_header, generation, 192);
VREP_AT(struct vrep_map_header, disk, 512);

/* Checkpoint: two files written in turn; this header, then for each disk
 * `words` uint64_t: the union of all generations and unshipped.  */
#define VREP_CHECKPOINT_MAGIC 0x54504b4350455256ull
#define VREP_CHECKPOINT_VERSION 1u
struct vrep_checkpoint_header {
    uint64_t magic;
    uint32_t version;
    uint32_t disks;
    uint64_t counter; /* the larger valid one wins */
    uint8_t group_id[16];
    uint8_t target_id[16];
    uint32_t bit_bytes;
    uint32_t clean;     /* 1: written by a clean stop, nothing in flight */
    uint64_t head;      /* when the copy began */
    uint8_t digest[16]; /* XXH3-128 of the bitmaps */
    uint64_t words[VREP_DISKS_MAX];
    uint64_t bytes[VREP_DISKS_MAX];
    uint64_t durable; /* acknowledged when the copy had been made: what its bits leave out */
    uint8_t reserved[28];
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_checkpoint_header, 1152);

/* Write-intent: two slots of slot_bytes each in one file; this header, then
 * the bitmap of 16 MiB extents, all disks back to back. */
#define VREP_INTENT_MAGIC 0x544e495045525600ull
#define VREP_INTENT_VERSION 1u
struct vrep_intent_header {
    uint64_t magic;
    uint32_t version;
    uint32_t extent_bytes;
    uint64_t counter;
    uint8_t group_id[16];
    uint32_t disks;
    uint32_t slot_bytes;
    uint64_t words;     /* of the whole bitmap */
    uint8_t digest[16]; /* of the bitmap */
    uint8_t reserved[52];
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_intent_header, 128);

/* ---- durable state of a protected group at its source -------------------- */

#define VREP_STATE_MAGIC 0x5453504552560000ull
#define VREP_STATE_VERSION 1u
#define VREP_STATE_OPEN 0x1u /* set before the first guest write, cleared by a clean stop */
#define VREP_STATE_GAP 0x2u
#define VREP_STATE_SYNCED 0x4u /* a first sync has ended at least once */
#define VREP_STATE_FENCED 0x8u
#define VREP_STATE_UNVERIFIED 0x10u
#define VREP_STATE_BYPASS 0x20u /* a pass-through served since, and marked in the shared map */
#define VREP_STATE_BLIND 0x40u  /* one did that could not mark: every block counts as unshipped */
#define VREP_STATE_PAST 0x80u   /* a VM may write past the filter: the next open believes nothing */
#define VREP_STATE_MIRROR 0x100u /* but that of the same mirror: its VM knows what it wrote */
struct vrep_state_disk {
    uint64_t bytes;
    uint64_t device;
    uint64_t inode;
    uint64_t mtime_ns;
    uint64_t ctime_ns;
    uint64_t
        commands;     /* of a block device: writes and discards since boot, as its kernel counts; */
    uint64_t sectors; /* and how much; both 0: not counted */
    uint64_t reserved;
};
VREP_LAYOUT(struct vrep_state_disk, 64);
struct vrep_state {
    uint64_t magic;
    uint32_t version;
    uint32_t flags;
    uint64_t counter; /* two slots of 8192 bytes; the larger valid one wins */
    uint8_t group_id[16];
    uint8_t epoch_id[16];
    uint32_t epoch;
    uint16_t lane;
    uint16_t disks;
    uint64_t seq_limit;   /* high-water mark: no seq above it has ever been used */
    uint64_t durable_seq; /* last acknowledgement seen */
    uint32_t unverified;  /* reason code */
    uint32_t reserved0;
    struct vrep_state_disk disk[VREP_DISKS_MAX];
    uint8_t boot_id[16]; /* of the host, when a filter opened it last; zero: not known */
    uint8_t reserved1[3988];
    uint32_t checksum; /* at 8188 */
};
VREP_LAYOUT(struct vrep_state, 8192);
VREP_AT(struct vrep_state, checksum, 8188);

/* ---- SCSI reservations ------------------------------------------------------ */

/* Registrations and reservation of one disk (PERSISTENT RESERVE with APTPL). One file of two slots,
 * written in turn, each write followed by fdatasync: after a crash one slot is whole. */
#define VREP_RESERVATIONS_MAGIC 0x5352504552560000ull
#define VREP_RESERVATIONS_VERSION 1u
#define VREP_REGISTRATIONS_MAX 64u
struct vrep_registration {
    uint64_t key;
    uint16_t port;               /* relative target port */
    uint16_t transport_id_bytes; /* 0: unused */
    uint32_t reserved0;
    uint8_t transport_id[248]; /* of the initiator port, as SPC-4 7.6.4 encodes it */
    uint8_t reserved1[56];
};
VREP_LAYOUT(struct vrep_registration, 320);
struct vrep_reservations {
    uint64_t magic;
    uint32_t version;
    uint32_t flags;   /* none yet: 0 */
    uint64_t counter; /* two slots of 24576 bytes; the larger valid one wins */
    uint8_t unit[16]; /* the serial number of the disk, in binary */
    uint32_t count;   /* registrations; 0: nothing is kept */
    uint32_t holder;  /* index of the holder; 0 with no holder, or with all registrants */
    uint8_t type;     /* as SPC-4 6.15.3.4 numbers them; 0: no reservation */
    uint8_t reserved0[79];
    struct vrep_registration list[VREP_REGISTRATIONS_MAX];
    uint8_t reserved1[3964];
    uint32_t checksum; /* at 24572 */
};
VREP_LAYOUT(struct vrep_reservations, 24576);
VREP_AT(struct vrep_reservations, checksum, 24572);

/* ---- segment ------------------------------------------------------------- */

#define VREP_SEGMENT_MAGIC 0x47455356u /* "VSEG" */
#define VREP_SEGMENT_VERSION 2u
/* Version 1: as it was received. Version 2 has flags; a folded segment has struct
 * vrep_fold behind its header. */
struct vrep_segment_header {
    uint32_t magic;
    uint16_t version;
    uint16_t header_bytes; /* 128 */
    uint8_t group_id[16];
    uint8_t store_id[16];
    uint32_t segment; /* number, from 1 */
    uint32_t flags;   /* VREP_SEGMENT_*; 0 in version 1 */
    uint64_t lease;   /* of the writer */
    uint64_t wall_ns;
    struct vrep_position after; /* the last position of the segment before */
    uint8_t stream_id[16]; /* stream in force at the start; zero: a STREAM record comes first */
    uint8_t reserved[28];
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_segment_header, 128);
#define VREP_SEGMENT_FOLDED 0x1u

/* What a folded segment stands for. Its records are a part of those that were
 * received: each is whole and unchanged, and no tally is among them. */
#define VREP_FOLD_MAGIC 0x444c4656u /* "VFLD" */
#define VREP_FOLD_VERSION 1u
struct vrep_fold {
    uint32_t magic;
    uint16_t version;
    uint16_t block_bytes; /* 256 */
    uint32_t segment;
    uint32_t generation; /* as in the file's name */
    uint32_t flags;      /* VREP_FOLD_* */
    uint32_t reserved0;
    struct vrep_position horizon; /* what was superseded there was dropped */
    struct vrep_position end;     /* the segments up to this one stand for all up to here */
    uint64_t input_bytes;         /* of records that were read for it and its neighbours */
    uint64_t input_records;
    uint8_t tally[128]; /* TALLIED: the tally of the last stream here, as it was at `end` */
    uint8_t reserved1[52];
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_fold, 256);
#define VREP_FOLD_TALLIED 0x1u

/* Ends every group commit.  Starts at a multiple of 64; the bytes between the
 * last record and it are zero. */
#define VREP_COMMIT_MAGIC 0x544d4356u /* "VCMT" */
#define VREP_COMMIT_VERSION 1u
struct vrep_commit {
    uint32_t magic;
    uint16_t version;
    uint16_t block_bytes; /* 128 */
    uint32_t segment;
    uint32_t number; /* of this commit in the segment, from 1 */
    uint64_t start;  /* [start, end) are the records of this commit */
    uint64_t end;
    uint8_t digest[16];           /* XXH3-128 of [start, this block), padding included */
    struct vrep_position last;    /* of the last record */
    struct vrep_position durable; /* known to be durable when this was written */
    uint8_t group_id[16];
    uint64_t wall_ns;
    uint32_t records;
    uint8_t reserved[16];
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_commit, 128);

/* ---- index: footer of an immutable segment, or a merged run -------------- */

/* One stored piece (<= 128 KiB of plaintext), or a range of zeroes.  Sorted by
 * (disk, offset, epoch descending, seq descending). */
struct vrep_index_entry {
    uint64_t offset;
    uint64_t seq;
    uint32_t length;
    uint32_t epoch;
    uint32_t segment;
    uint32_t position; /* of the record in its segment, in units of 1 byte */
    uint16_t disk;
    uint16_t piece;
    uint8_t kind;
    uint8_t flags;   /* 0 */
    uint16_t stream; /* into this index's table of streams */
};
VREP_LAYOUT(struct vrep_index_entry, 40);

struct vrep_index_stream {
    uint8_t stream_id[16];
    uint8_t epoch_id[16];
    uint32_t epoch;
    uint32_t key_generation;
    uint64_t first_seq;
    uint8_t reserved[16];
};
VREP_LAYOUT(struct vrep_index_stream, 64);

/* Marks and gaps of an index, in order of position: points without a scan. */
struct vrep_index_event {
    struct vrep_position at;
    uint64_t wall_ns;
    uint32_t segment;
    uint32_t position;
    uint8_t kind;
    uint8_t reserved0;
    uint16_t stream;
    uint32_t reserved1;
};
VREP_LAYOUT(struct vrep_index_event, 40);

/* Time index: one sample per commit (wall time of its last record). */
struct vrep_index_time {
    uint64_t wall_ns;
    struct vrep_position at;
};
VREP_LAYOUT(struct vrep_index_time, 24);

/* What up to VREP_INDEX_FANOUT neighbours (entries, or nodes one level below)
 * have in common: enough to pass over them unread, and to check them when read. */
#define VREP_INDEX_FANOUT 64u
struct vrep_index_node {
    uint64_t offset;  /* of the first entry below */
    uint64_t end;     /* largest offset + length below, whatever the disk */
    uint64_t seq_low; /* (epoch, seq) of the oldest and the newest entry below */
    uint64_t seq_high;
    uint32_t epoch_low;
    uint32_t epoch_high;
    uint16_t disk_first;
    uint16_t disk_last;
    uint32_t checksum; /* vrep_checksum32 of the neighbours' bytes */
};
VREP_LAYOUT(struct vrep_index_node, 48);

#define VREP_INDEX_MAGIC 0x58444956u /* "VIDX" */
#define VREP_INDEX_VERSION 1u
/* At the end of the file.  The six arrays stand before it in this order, each
 * at a multiple of 64: short entries (length <= 128 KiB), long entries
 * (zeroes ranges above 128 KiB), streams, events, times, nodes.  The nodes are
 * a tree over the long entries, then one over the short entries; each has its
 * lowest level first, ends with its one root, and is empty over no entries. */
struct vrep_index_trailer {
    uint32_t magic;
    uint16_t version;
    uint16_t trailer_bytes; /* 256 */
    uint32_t segment;       /* 0: a merged run */
    uint32_t level;
    uint64_t short_at;
    uint64_t short_count;
    uint64_t long_at;
    uint64_t long_count;
    uint64_t streams_at;
    uint64_t streams_count;
    uint64_t events_at;
    uint64_t events_count;
    uint64_t times_at;
    uint64_t times_count;
    struct vrep_position first;
    struct vrep_position last;
    uint64_t data_bytes;    /* plaintext bytes of all entries */
    uint64_t segment_bytes; /* end of the last commit block in the file; 0 in a run */
    uint64_t wall_first_ns;
    uint64_t wall_last_ns;
    uint8_t group_id[16];
    uint8_t short_digest[16]; /* XXH3-128 of the short entries */
    uint8_t rest_digest[16];  /* XXH3-128 of long entries, streams, events, times */
    uint64_t nodes_at;
    uint64_t nodes_count;
    uint32_t long_root; /* vrep_checksum32 of the root node; 0: no entries */
    uint32_t short_root;
    uint32_t streams_checksum; /* vrep_checksum32 of the array */
    uint32_t events_checksum;  /* low 32 bits of the XXH3-128 of the array */
    uint64_t aged_ns; /* of the store when the segment was closed; 0: not known, or a run */
    uint8_t reserved[4];
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_index_trailer, 256);

/* ---- manifest ------------------------------------------------------------- */

#define VREP_MANIFEST_MAGIC 0x4e414d56u /* "VMAN" */
#define VREP_MANIFEST_VERSION 2u
/* File `manifest-<number, 16 hex digits>`, created if absent; the largest
 * number that is whole wins.  Header, then epochs, segments, runs, disks,
 * then key_bytes of wrapped data keys. */
struct vrep_manifest_header {
    uint32_t magic;
    uint16_t version;
    uint16_t header_bytes; /* 256 */
    uint64_t number;
    uint64_t lease;
    uint8_t group_id[16];
    uint8_t store_id[16];
    uint64_t wall_ns;
    uint32_t epochs;
    uint32_t segments;
    uint32_t runs;
    uint32_t disks;
    uint32_t key_bytes;
    uint32_t body_bytes;
    uint32_t next_segment;
    uint32_t flags;          /* VREP_MANIFEST_* */
    uint32_t active_segment; /* being appended, 0: none */
    uint32_t reserved0;
    char group_name[VREP_NAME_BYTES];
    uint8_t digest[16]; /* of the body */
    /* Version 1 has zeroes from here on. */
    struct vrep_position horizon; /* the oldest recovery point that is kept; seq 0: all are */
    uint64_t window_s;            /* that the source asks for; 0: all */
    uint64_t quota_bytes;         /* that the group may use; 0: no limit */
    uint64_t received_bytes;      /* appended so far, and ... */
    uint64_t folded_bytes;        /* ... written by folds, closed segments only */
    uint64_t aged_ns;             /* that have passed for the store; 0: not told */
    uint64_t boot_ns;             /* since the host's boot, when that was so, ... */
    uint32_t boot;                /* ... and which boot */
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_manifest_header, 256);
#define VREP_MANIFEST_UNPROTECTED 0x1u

struct vrep_manifest_epoch {
    uint32_t epoch;
    uint32_t state; /* 1 accepted, 2 provisional (failover started), 3 abandoned */
    uint8_t epoch_id[16];
    uint8_t writer[16]; /* site that may write it */
    struct vrep_position parent;
    uint64_t wall_ns;
};
VREP_LAYOUT(struct vrep_manifest_epoch, 64);

struct vrep_manifest_segment {
    uint32_t segment;
    uint32_t generation; /* 0: as it was received; else the number of its fold */
    uint64_t file_bytes;
    uint64_t data_end; /* end of the last commit block */
    struct vrep_position first;
    struct vrep_position last;
    uint64_t records;
    uint64_t data_bytes;
    uint8_t index_digest[16]; /* XXH3-128 of the trailer */
};
VREP_LAYOUT(struct vrep_manifest_segment, 88);

struct vrep_manifest_run {
    uint32_t run; /* file `run-<8 hex digits>` */
    uint32_t level;
    uint32_t first_segment; /* covers segments first..last */
    uint32_t last_segment;
    uint64_t file_bytes;
    uint8_t index_digest[16];
    uint64_t reserved;
};
VREP_LAYOUT(struct vrep_manifest_run, 48);

struct vrep_manifest_disk {
    char name[VREP_NAME_BYTES];
    uint64_t bytes;
    uint32_t index;
    uint32_t flags;
};
VREP_LAYOUT(struct vrep_manifest_disk, 80);

/* ---- view: presence of a sparse overlay ----------------------------------- */

#define VREP_PRESENCE_MAGIC 0x5345525056000000ull
#define VREP_PRESENCE_LIVE_MAGIC 0x4556494c56000000ull
#define VREP_PRESENCE_VERSION 1u
/* File header (4096 bytes), then one bit per block_bytes of the disk. Bits are
 * set on disk only after the data they stand for were synced. The file of live
 * bits has the other magic and is mapped: what was written but not synced yet
 * outlives a killed process, and counts in one boot only. */
struct vrep_presence_header {
    uint64_t magic;
    uint32_t version;
    uint32_t block_bytes;
    uint64_t disk_bytes;
    uint64_t words;
    uint8_t view_id[16];
    uint8_t boot_id[16]; /* live bits: of the host; zero in the durable file */
    uint32_t distrust;   /* live bits: a sync failed, and only durable bits count */
    uint8_t reserved0[4024];
    uint32_t checksum; /* live bits: as if distrust were 0 */
};
VREP_LAYOUT(struct vrep_presence_header, 4096);

/* ---- what a repair lost ---------------------------------------------------- */

#define VREP_LOST_MAGIC 0x54534c56u /* "VLST" */
#define VREP_LOST_VERSION 1u
#define VREP_LOST_RANGES_MAX 1024u
#define VREP_LOST_UNKNOWN 0x0001u /* no range is known: all of every disk, and none follows */
/* File header, then `ranges` ranges: what a repair's history may show otherwise than it was. It
 * counts for the history that ends with the repair's gap-begin at `at`, and for no other. */
struct vrep_lost_header {
    uint32_t magic;
    uint16_t version;
    uint16_t flags; /* VREP_LOST_* */
    uint8_t group_id[16];
    uint8_t store_id[16];
    struct vrep_position at; /* of the gap-begin with which the repair ends the history */
    uint32_t ranges;
    uint32_t reserved0;
    uint8_t digest[16]; /* XXH3-128 of the ranges */
    uint8_t reserved[44];
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_lost_header, 128);

/* Rising by disk and offset, apart, none empty. */
struct vrep_lost_range {
    uint64_t offset;
    uint64_t length;
    uint32_t disk;
    uint32_t reserved;
};
VREP_LAYOUT(struct vrep_lost_range, 24);

/* ---- verdict on a recovery point ------------------------------------------ */

#define VREP_VERDICT_MAGIC 0x44525656u /* "VVRD" */
#define VREP_VERDICT_VERSION 1u
#define VREP_VERDICT_BODY_BYTES_MAX 1048576u
/* One file a point: this header, body_bytes of JSON, signature_bytes of an ECDSA
 * signature by the key of the site that verified (P-256, SHA-256; r, then s, each
 * 32 bytes big-endian) over "vrep verdict v1", a NUL, the header and the body. */
struct vrep_verdict_header {
    uint32_t magic;
    uint16_t version;
    uint16_t header_bytes;
    uint8_t group_id[16];
    uint8_t store_id[16];
    struct vrep_position at; /* the recovery point */
    uint64_t wall_ns;        /* when it was verified */
    uint32_t body_bytes;
    uint32_t signature_bytes;
    uint8_t digest[16]; /* XXH3-128 of the body */
    uint8_t reserved[36];
    uint32_t checksum;
};
VREP_LAYOUT(struct vrep_verdict_header, 128);

#endif
