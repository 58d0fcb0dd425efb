#include "track/since.h"

#include <stdlib.h>

#include "base/status.h"
#include "track/bits.h"

enum { WORDS_ALIGN = 8 }; /* of a bitmap */

struct vrep_since {
    uint64_t disk_bytes;
    uint64_t words_count;
    uint64_t *words;
};

int vrep_since_create(uint64_t disk_bytes, struct vrep_since **out)
{
    uint64_t blocks = disk_bytes / VREP_SINCE_BLOCK_BYTES + 1;
    struct vrep_since *since = calloc(1, sizeof *since);

    *out = NULL;
    if (since == NULL)
        return VREP_E_NOMEM;
    since->disk_bytes = disk_bytes;
    since->words_count = (blocks / 64 / WORDS_ALIGN + 1) * WORDS_ALIGN;
    since->words = calloc(since->words_count, sizeof *since->words);
    if (since->words == NULL) {
        free(since);
        return VREP_E_NOMEM;
    }
    *out = since;
    return VREP_OK;
}

void vrep_since_destroy(struct vrep_since *since)
{
    if (since == NULL)
        return;
    free(since->words);
    free(since);
}

void vrep_since_mark(struct vrep_since *since, uint64_t offset, uint64_t length)
{
    if (length == 0 || offset >= since->disk_bytes)
        return;
    if (length > since->disk_bytes - offset)
        length = since->disk_bytes - offset;
    vrep_bits_set(since->words, offset / VREP_SINCE_BLOCK_BYTES,
                  (offset + length - 1) / VREP_SINCE_BLOCK_BYTES);
}

bool vrep_since_next_run(const struct vrep_since *since, uint64_t offset, uint64_t *length,
                         bool *marked)
{
    const struct vrep_bits bits = {
        .source = {since->words}, .sources = 1, .words = since->words_count};
    uint64_t block = offset / VREP_SINCE_BLOCK_BYTES, end;

    if (offset >= since->disk_bytes)
        return false;
    *marked = (since->words[block / 64] >> (block % 64) & 1) != 0;
    end = vrep_bits_next(&bits, block, !*marked) * VREP_SINCE_BLOCK_BYTES;
    *length = (end < since->disk_bytes ? end : since->disk_bytes) - offset;
    return true;
}
