/*
 * Squeeze: compresses a piece when that pays, for the files of seal/ only.
 *
 * It pays when at least 1/16 of the piece is saved. A look at the spread of byte
 * values in up to 1 KiB of the piece skips zstd on data that look random (already
 * compressed or encrypted), which is wrong at worst about the size. One context,
 * reused. Units: bytes. Threading: a handle belongs to one thread at a time.
 */
#ifndef VREP_SEAL_SQUEEZE_H
#define VREP_SEAL_SQUEEZE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <zstd.h>

struct vrep_squeeze {
    ZSTD_CCtx *context;
};

/* INVALID for a level that zstd does not take, NOMEM. */
int vrep_squeeze_init(struct vrep_squeeze *squeeze, int level);
void vrep_squeeze_clear(struct vrep_squeeze *squeeze);

/* Whether zstd is worth trying. */
bool vrep_squeeze_hopeful(const uint8_t *data, size_t len);

/* Bytes written to out (one whole frame), or 0: stored raw it is as good. `cap` is at
 * least len. */
size_t vrep_squeeze_run(struct vrep_squeeze *squeeze, const uint8_t *data, size_t len, uint8_t *out,
                        size_t cap);

#endif
