#include "ring/chunks.h"

#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "format/layout.h"

/* Free runs looked at before a change is scattered: bounds the search, yet enough that a ring
 * which is not nearly full gives long runs. */
enum { RUNS_TRIED = 16 };

int vrep_chunks_create(uint32_t count, struct vrep_chunks *out)
{
    uint32_t words = (count + 63) / 64, summary = (words + 63) / 64;
    *out = (struct vrep_chunks){
        .count = count, .words_count = words, .summary_count = summary, .free = count};
    out->words = calloc(words, sizeof(uint64_t));
    out->summary = calloc(summary, sizeof(uint64_t));
    if (out->words == NULL || out->summary == NULL) {
        vrep_chunks_destroy(out);
        return VREP_E_NOMEM;
    }
    for (uint32_t i = 0; i < words; i++) {
        out->words[i] = ~UINT64_C(0);
        out->summary[i / 64] |= UINT64_C(1) << (i % 64);
    }
    if (count % 64 != 0)
        out->words[words - 1] = (UINT64_C(1) << (count % 64)) - 1;
    return VREP_OK;
}

void vrep_chunks_destroy(struct vrep_chunks *chunks)
{
    free(chunks->words);
    free(chunks->summary);
    chunks->words = chunks->summary = NULL;
}

static void refresh(struct vrep_chunks *chunks, uint32_t word)
{
    uint64_t bit = UINT64_C(1) << (word % 64);
    if (chunks->words[word] != 0)
        chunks->summary[word / 64] |= bit;
    else
        chunks->summary[word / 64] &= ~bit;
}

/* First free chunk at or after from; count when there is none. */
static uint32_t next_free(const struct vrep_chunks *chunks, uint32_t from)
{
    if (from >= chunks->count)
        return chunks->count;
    uint32_t word = from / 64;
    uint64_t bits = chunks->words[word] & (~UINT64_C(0) << (from % 64));
    if (bits != 0)
        return word * 64 + (uint32_t)__builtin_ctzll(bits);
    word++;
    for (uint32_t group = word / 64; group < chunks->summary_count; group++) {
        uint64_t groups = chunks->summary[group];
        if (group == word / 64)
            groups &= ~UINT64_C(0) << (word % 64);
        if (groups == 0)
            continue;
        uint32_t found = group * 64 + (uint32_t)__builtin_ctzll(groups);
        return found * 64 + (uint32_t)__builtin_ctzll(chunks->words[found]);
    }
    return chunks->count;
}

/* First used chunk in [from, limit); limit when there is none. */
static uint32_t next_used(const struct vrep_chunks *chunks, uint32_t from, uint32_t limit)
{
    uint32_t word = from / 64;
    uint64_t bits = ~chunks->words[word] & (~UINT64_C(0) << (from % 64));
    while (bits == 0) {
        word++;
        if (word * UINT64_C(64) >= limit)
            return limit;
        bits = ~chunks->words[word];
    }
    uint32_t found = word * 64 + (uint32_t)__builtin_ctzll(bits);
    return found < limit ? found : limit;
}

static void mark_used(struct vrep_chunks *chunks, uint32_t first, uint32_t n)
{
    for (uint32_t at = first, end = first + n; at < end;) {
        uint32_t word = at / 64, low = at % 64;
        uint32_t high = end - word * 64 < 64 ? end - word * 64 : 64;
        uint64_t mask = ~UINT64_C(0) << low;
        if (high < 64)
            mask &= (UINT64_C(1) << high) - 1;
        chunks->words[word] &= ~mask;
        refresh(chunks, word);
        at = word * 64 + high;
    }
    chunks->free -= n;
}

static bool find_run(const struct vrep_chunks *chunks, uint32_t n, uint32_t *first)
{
    uint32_t at = chunks->cursor;
    bool wrapped = false;
    for (int tried = 0; tried < RUNS_TRIED;) {
        uint32_t start = next_free(chunks, at);
        if (start >= chunks->count) {
            if (wrapped)
                return false;
            wrapped = true;
            at = 0;
            continue;
        }
        uint32_t limit = chunks->count - start < n ? chunks->count : start + n;
        uint32_t end = next_used(chunks, start, limit);
        if (end - start == n) {
            *first = start;
            return true;
        }
        at = end;
        tried++;
    }
    return false;
}

static void take_scattered(struct vrep_chunks *chunks, uint32_t n, uint32_t *next, uint32_t *first)
{
    uint32_t at = chunks->cursor, last = VREP_NO_CHUNK;
    while (n > 0) {
        uint32_t start = next_free(chunks, at);
        if (start >= chunks->count) {
            at = 0; /* enough are free, so this happens once */
            continue;
        }
        uint32_t limit = chunks->count - start < n ? chunks->count : start + n;
        uint32_t end = next_used(chunks, start, limit);
        mark_used(chunks, start, end - start);
        if (last == VREP_NO_CHUNK)
            *first = start;
        else
            next[last] = start;
        for (last = start; last + 1 < end; last++)
            next[last] = last + 1;
        n -= end - start;
        at = end;
    }
    next[last] = VREP_NO_CHUNK;
    chunks->cursor = at < chunks->count ? at : 0;
}

bool vrep_chunks_take(struct vrep_chunks *chunks, uint32_t n, uint32_t *next, uint32_t *first,
                      bool *joined)
{
    if (n > chunks->free)
        return false;
    *joined = find_run(chunks, n, first);
    if (!*joined) {
        take_scattered(chunks, n, next, first);
        return true;
    }
    mark_used(chunks, *first, n);
    uint32_t end = *first + n;
    for (uint32_t i = *first; i + 1 < end; i++)
        next[i] = i + 1;
    next[end - 1] = VREP_NO_CHUNK;
    chunks->cursor = end < chunks->count ? end : 0;
    return true;
}

bool vrep_chunks_claim(struct vrep_chunks *chunks, uint32_t chunk)
{
    if (chunk >= chunks->count || !(chunks->words[chunk / 64] >> (chunk % 64) & 1))
        return false;
    mark_used(chunks, chunk, 1);
    return true;
}

void vrep_chunks_give(struct vrep_chunks *chunks, const uint32_t *next, uint32_t first, uint32_t n)
{
    for (uint32_t chunk = first, left = n; left > 0; left--) {
        uint32_t word = chunk / 64;
        chunks->words[word] |= UINT64_C(1) << (chunk % 64);
        chunks->summary[word / 64] |= UINT64_C(1) << (word % 64);
        chunk = next[chunk];
    }
    chunks->free += n;
}
