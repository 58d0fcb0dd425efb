#include "seal/squeeze.h"

#include <math.h>
#include <string.h>

#include "base/status.h"

enum {
    SQUEEZE_LEAST = 64, /* shorter pieces gain less than a frame costs */
    SAMPLE_RUN = 16,    /* the sample is taken in runs of this, from end to end of a piece */
    LOG_ONE = 65536,    /* unit of the table */
    MISSES_MAX = 15,
    PAGE = 4096,
    SHIFT = 256, /* so that a table of every byte value looks as it is */
};

/* Bits of sum(count * log2 count) over the values of a sample of random bytes: 721.7 on average,
 * with a deviation of 17. */
#define RANDOM_SUM (722 * LOG_ONE)
#define DOUBT (85 * LOG_ONE) /* five deviations; a run of equal bytes over 1/16 is above it */
#define SURE (256 * LOG_ONE) /* half a bit a byte: 1/16 by the spread alone */

int vrep_squeeze_init(struct vrep_squeeze *squeeze, int level)
{
    squeeze->context = ZSTD_createCCtx();
    if (squeeze->context == NULL)
        return VREP_E_NOMEM;
    if (ZSTD_isError(ZSTD_CCtx_setParameter(squeeze->context, ZSTD_c_compressionLevel, level)) ||
        ZSTD_isError(ZSTD_CCtx_setParameter(squeeze->context, ZSTD_c_checksumFlag, 0))) {
        vrep_squeeze_clear(squeeze);
        return VREP_E_INVALID;
    }
    squeeze->misses = squeeze->skip = 0;
    squeeze->cost[0] = 0;
    for (unsigned count = 1; count <= VREP_SQUEEZE_SAMPLE; count++)
        squeeze->cost[count] = (int32_t)(count * log2(count) * LOG_ONE);
    return VREP_OK;
}

void vrep_squeeze_clear(struct vrep_squeeze *squeeze)
{
    ZSTD_freeCCtx(squeeze->context);
    squeeze->context = NULL;
}

/*
 * The entropy of 512 bytes is 9 - sum(count * log2 count) / 512 bits. How far the sum is off that
 * of random bytes says what their spread alone would save: text and tables lie far above, counters
 * and dictionaries of bytes below. Four tables, so that a value that follows itself does not wait
 * for its own count.
 */
enum vrep_squeeze_hope vrep_squeeze_judge(const struct vrep_squeeze *squeeze, const uint8_t *data,
                                          size_t len)
{
    uint8_t counts[4][256] = {{0}};
    int32_t sum = -RANDOM_SUM;
    size_t step, shifts, lead;

    if (len < SQUEEZE_LEAST)
        return VREP_SQUEEZE_NONE;
    if (len < VREP_SQUEEZE_SAMPLE)
        return VREP_SQUEEZE_SURE;
    step = len / (VREP_SQUEEZE_SAMPLE / SAMPLE_RUN);
    shifts = step > SHIFT ? step / SHIFT : 1;
    lead = step < SHIFT ? 0 : SHIFT / 2;
    for (size_t run = 0; run < VREP_SQUEEZE_SAMPLE / SAMPLE_RUN; run++) {
        /* Each page elsewhere: what stands at the head of every page is not what is seen. */
        const uint8_t *at = data + run * step + run * step / PAGE % shifts * SHIFT + lead;

        for (size_t i = 0; i < SAMPLE_RUN; i += 4)
            for (size_t table = 0; table < 4; table++)
                counts[table][at[i + table]]++;
    }
    for (unsigned value = 0; value < 256; value++) {
        unsigned count =
            0u + counts[0][value] + counts[1][value] + counts[2][value] + counts[3][value];
        sum += squeeze->cost[count];
    }
    if (sum > SURE || sum < -DOUBT)
        return VREP_SQUEEZE_SURE;
    return sum > DOUBT ? VREP_SQUEEZE_DOUBT : VREP_SQUEEZE_NONE;
}

bool vrep_squeeze_hopeful(struct vrep_squeeze *squeeze, const uint8_t *data, size_t len)
{
    enum vrep_squeeze_hope hope = vrep_squeeze_judge(squeeze, data, len);

    if (hope != VREP_SQUEEZE_DOUBT)
        return hope == VREP_SQUEEZE_SURE;
    if (squeeze->skip == 0)
        return true;
    squeeze->skip--;
    return false;
}

size_t vrep_squeeze_run(struct vrep_squeeze *squeeze, const uint8_t *data, size_t len, uint8_t *out,
                        size_t cap)
{
    size_t got = ZSTD_compress2(squeeze->context, out, cap, data, len);
    bool pays = !ZSTD_isError(got) && got <= len - len / 16;

    if (pays)
        squeeze->misses = 0;
    else if (squeeze->misses < MISSES_MAX)
        squeeze->misses++;
    squeeze->skip = squeeze->misses;
    return pays ? got : 0;
}
