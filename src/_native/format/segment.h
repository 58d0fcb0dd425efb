/*
 * Segment: header, commit blocks and the scan that finds what a crash left.
 *
 * A segment (layout.h) is its header, then commits: records back to back, zeroes
 * up to a multiple of 64, a commit block. A writer writes commit block n + 1 only
 * after commit n was synced, so the scan can tell two things apart: bytes that
 * are wrong where nothing proves that they were ever synced are a torn tail and
 * end the prefix; bytes that are wrong although a later whole commit block proves
 * that they were synced are damage, and never cut silently.
 *
 * Units: bytes from the start of the file. Limits: a segment below 4 GiB.
 * Buffers may have any alignment. Every length that is read is bounded before use.
 *
 * Threading: no state; every function may be called from any thread.
 */
#ifndef VREP_FORMAT_SEGMENT_H
#define VREP_FORMAT_SEGMENT_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "format/layout.h"

#define VREP_COMMIT_ALIGN 64u
#define VREP_SEGMENT_BYTES_MAX UINT64_C(0xffffffff)

/* Stores magic, version, sizes and checksum; the caller filled in the rest. */
void vrep_segment_header_finish(struct vrep_segment_header *header);

/* VREP_E_CORRUPT: not a header of a segment; VREP_E_VERSION: a newer one. */
int vrep_segment_header_check(const struct vrep_segment_header *header);

/* The same for what stands behind the header of a folded segment. */
void vrep_fold_finish(struct vrep_fold *fold);
int vrep_fold_check(const struct vrep_fold *fold);

/* Where the first commit of a segment begins. */
size_t vrep_segment_data_at(const struct vrep_segment_header *header);

/* Stores magic, version, sizes and checksum; the caller filled in the rest. */
void vrep_commit_finish(struct vrep_commit *commit);

/* Judges a commit block by itself: what it covers is not looked at. */
int vrep_commit_check(const struct vrep_commit *commit);

/* -1, 0 or 1 as a is before, at or after b. */
int vrep_position_compare(const struct vrep_position *a, const struct vrep_position *b);

struct vrep_segment_scan {
    uint64_t end;      /* of the last whole commit block; where the first one would begin if none */
    uint64_t wrong_at; /* the first byte that could not be taken; len when all is whole */
    uint64_t proof_at; /* after VREP_E_CORRUPT: the block that proves the damage; else 0 */
    uint64_t records;
    uint32_t commits;
    uint32_t reserved;
    struct vrep_position last;    /* of the last whole commit; `after` of the header if none */
    struct vrep_position durable; /* the largest that any whole commit block names */
};

/*
 * Walks a segment's bytes from its header. `known` may be NULL; else it is a
 * position that is known to have been durable in this segment.
 *
 * VREP_OK: [0, end) is whole, and what follows is nothing or a torn tail.
 * VREP_E_CORRUPT: the header is wrong or another segment's, or damage lies where
 * a later commit block, or `known`, proves that the bytes were durable; `scan`
 * says where. VREP_E_VERSION: a newer format. The first `cap` commit blocks are
 * copied to `out` (NULL: none are).
 */
int vrep_segment_scan(const void *buffer, size_t len, const uint8_t group_id[16], uint32_t segment,
                      const struct vrep_position *known, struct vrep_commit *out, size_t cap,
                      struct vrep_segment_scan *scan);

#endif
