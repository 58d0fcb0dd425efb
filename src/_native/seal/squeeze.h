/*
 * Squeeze: compresses a piece when that pays, for the files of seal/ only.
 *
 * It pays when at least 1/16 of the piece is saved. A look at the spread of byte
 * values in 512 bytes of the piece tells data that look random (already compressed
 * or encrypted), which zstd never sees, from those that surely are not. In between,
 * where a few bytes of many repeat, it is tried, and after each time that it did not
 * pay a longer row of such pieces passes untried: 1, 2, ... 15. Wrong is at worst
 * the size. One context, reused. Units: bytes. Threading: a handle belongs to one
 * thread at a time.
 */
#ifndef VREP_SEAL_SQUEEZE_H
#define VREP_SEAL_SQUEEZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <zstd.h>

#define VREP_SQUEEZE_SAMPLE 512u

struct vrep_squeeze {
    ZSTD_CCtx *context;
    uint32_t misses;                       /* times in a row that zstd did not pay */
    uint32_t skip;                         /* doubtful pieces to pass untried */
    int32_t cost[VREP_SQUEEZE_SAMPLE + 1]; /* n log2 n */
};

enum vrep_squeeze_hope { VREP_SQUEEZE_NONE, VREP_SQUEEZE_DOUBT, VREP_SQUEEZE_SURE };

/* INVALID for a level that zstd does not take, NOMEM. */
int vrep_squeeze_init(struct vrep_squeeze *squeeze, int level);
void vrep_squeeze_clear(struct vrep_squeeze *squeeze);

/* What the spread of the bytes promises. */
enum vrep_squeeze_hope vrep_squeeze_judge(const struct vrep_squeeze *squeeze, const uint8_t *data,
                                          size_t len);

/* Whether zstd is worth trying now; counts a doubtful piece that is passed. */
bool vrep_squeeze_hopeful(struct vrep_squeeze *squeeze, const uint8_t *data, size_t len);

/* Bytes written to out (one whole frame), or 0: stored raw it is as good. `cap` is at
 * least len. */
size_t vrep_squeeze_run(struct vrep_squeeze *squeeze, const uint8_t *data, size_t len, uint8_t *out,
                        size_t cap);

#endif
