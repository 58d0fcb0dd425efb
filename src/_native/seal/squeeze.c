#include "seal/squeeze.h"

#include <string.h>

#include "base/status.h"

enum {
    SQUEEZE_LEAST = 64,  /* shorter pieces gain less than a frame costs */
    SAMPLE_BYTES = 1024, /* seen by the probe */
    SAMPLE_RUN = 64,     /* in runs of this */
    PROBE_LEAST = 512,   /* too short a piece to judge by its spread */
};

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
    return VREP_OK;
}

void vrep_squeeze_clear(struct vrep_squeeze *squeeze)
{
    ZSTD_freeCCtx(squeeze->context);
    squeeze->context = NULL;
}

/*
 * Of n random bytes, the sum of squared counts of the 256 values is
 * n + n(n - 1)/256 on average, with a deviation of about 0.09 n. More than six
 * deviations off, on either side, is not random: text and tables lie far above,
 * counters and dictionaries of bytes below.
 */
bool vrep_squeeze_hopeful(const uint8_t *data, size_t len)
{
    uint16_t counts[256] = {0};
    uint32_t sum = 0, n = 0, mean, slack;
    size_t step;

    if (len < SQUEEZE_LEAST)
        return false;
    if (len < PROBE_LEAST)
        return true;
    step = len <= SAMPLE_BYTES ? SAMPLE_RUN : len / (SAMPLE_BYTES / SAMPLE_RUN);
    for (size_t at = 0; at + SAMPLE_RUN <= len && n < SAMPLE_BYTES; at += step, n += SAMPLE_RUN)
        for (size_t i = 0; i < SAMPLE_RUN; i++)
            counts[data[at + i]]++;
    for (unsigned value = 0; value < 256; value++)
        sum += (uint32_t)counts[value] * counts[value];
    mean = n + n * (n - 1) / 256;
    slack = n * 53 / 100;
    return sum > mean + slack || sum < mean - slack;
}

size_t vrep_squeeze_run(struct vrep_squeeze *squeeze, const uint8_t *data, size_t len, uint8_t *out,
                        size_t cap)
{
    size_t got = ZSTD_compress2(squeeze->context, out, cap, data, len);

    if (ZSTD_isError(got) || got > len - len / 16)
        return 0;
    return got;
}
