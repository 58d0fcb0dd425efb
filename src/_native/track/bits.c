#include "track/bits.h"

#include "base/atomic.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum {
    STEP = 8, /* words handled without a branch: one cache line of each source */
    EDGES_USUAL = 4
};
#define LAST_BIT (UINT64_C(1) << 63)

ALWAYS_INLINE void gather(const struct vrep_bits *bits, unsigned sources, uint64_t at,
                          uint64_t out[STEP])
{
    const uint64_t *from = bits->source[0] + at;
    for (int i = 0; i < STEP; i++)
        out[i] = from[i];
    for (unsigned s = 1; s < sources; s++) {
        from = bits->source[s] + at;
        for (int i = 0; i < STEP; i++)
            out[i] |= from[i];
    }
}

ALWAYS_INLINE void union_body(const struct vrep_bits *bits, unsigned sources, uint64_t *out)
{
    for (uint64_t at = 0; at < bits->words; at += STEP)
        gather(bits, sources, at, out + at);
}

ALWAYS_INLINE uint64_t count_body(const struct vrep_bits *bits, unsigned sources)
{
    uint64_t count = 0;
    for (uint64_t at = 0; at < bits->words; at += STEP) {
        uint64_t line[STEP], any = 0;
        gather(bits, sources, at, line);
        for (int i = 0; i < STEP; i++)
            any |= line[i];
        if (any == 0)
            continue;
        for (int i = 0; i < STEP; i++)
            count += (uint64_t)__builtin_popcountll(line[i]);
    }
    return count;
}

/* First line at or after `at` whose union is not all clear (flip 0) or not all set (flip ~0). */
ALWAYS_INLINE uint64_t next_line_body(const struct vrep_bits *bits, unsigned sources, uint64_t at,
                                      uint64_t flip)
{
    for (; at < bits->words; at += STEP) {
        uint64_t line[STEP], any = 0;
        gather(bits, sources, at, line);
        for (int i = 0; i < STEP; i++)
            any |= line[i] ^ flip;
        if (any != 0)
            break;
    }
    return at;
}

/* Writes the position of every bit that differs from the one before it, from word `at` on (of it
 * only bits from skip - 1 on), and returns where it stopped: at the end, or before a word
 * whose edges may not fit. */
ALWAYS_INLINE uint64_t edges_body(const struct vrep_bits *bits, unsigned sources, uint64_t at,
                                  uint64_t skip, uint64_t *out, uint64_t max, uint64_t *n)
{
    uint64_t carry = 0, found = 0;
    for (; at < bits->words; at = (at | (STEP - 1)) + 1) {
        uint64_t line[STEP], differs = 0, base = at & ~(uint64_t)(STEP - 1);
        gather(bits, sources, base, line);
        if (skip != 0) { /* the first line only: what lies before the start is not looked at */
            for (uint64_t i = 0; i < at - base; i++)
                line[i] = 0;
            line[at - base] &= ~UINT64_C(0) << (skip - 1);
            skip = 0;
        }
        for (int i = 0; i < STEP; i++)
            differs |= line[i] ^ (0 - carry);
        if (differs == 0)
            continue;
        if (found + STEP * 64 + EDGES_USUAL > max) {
            at = base;
            break;
        }
        for (unsigned i = 0; i < STEP; i++) {
            uint64_t edges = line[i] ^ (line[i] << 1 | carry);
            uint64_t *to = out + found;
            carry = line[i] >> 63;
            found += (uint64_t)__builtin_popcountll(edges);
            /* How many there are cannot be predicted: the usual few are written in any case, and
             * what is too much is written over by the next word. */
            for (int k = 0; k < EDGES_USUAL; k++, edges &= edges - 1)
                *to++ = (base + i) * 64 + (uint64_t)__builtin_ctzll(edges | LAST_BIT);
            for (; edges != 0; edges &= edges - 1)
                *to++ = (base + i) * 64 + (uint64_t)__builtin_ctzll(edges);
        }
    }
    *n = found;
    return at;
}

/* With the number of sources known, their pointers stay in registers. */
#define BY_SOURCES(call)                                                                           \
    switch (bits->sources) {                                                                       \
    case 1:                                                                                        \
        return call(1);                                                                            \
    case 2:                                                                                        \
        return call(2);                                                                            \
    case 3:                                                                                        \
        return call(3);                                                                            \
    case 5:                                                                                        \
        return call(5);                                                                            \
    default:                                                                                       \
        return call(bits->sources);                                                                \
    }

#define UNION(n) union_body(bits, n, out)
#define COUNT(n) count_body(bits, n)
#define NEXT(n) next_line_body(bits, n, at, flip)
#define EDGES(n) edges_body(bits, n, at, skip, out, max, found)

/* clang-format off */
#define DEFINE_LOOPS(name, attribute)                                                              \
    attribute static void name##_union(const struct vrep_bits *bits, uint64_t *out)                \
    {                                                                                              \
        BY_SOURCES(UNION)                                                                          \
    }                                                                                              \
    attribute static uint64_t name##_count(const struct vrep_bits *bits)                           \
    {                                                                                              \
        BY_SOURCES(COUNT)                                                                          \
    }                                                                                              \
    attribute static uint64_t name##_next_line(const struct vrep_bits *bits, uint64_t at,          \
                                               uint64_t flip)                                      \
    {                                                                                              \
        BY_SOURCES(NEXT)                                                                           \
    }                                                                                              \
    attribute static uint64_t name##_edges(const struct vrep_bits *bits, uint64_t at,              \
                                           uint64_t skip, uint64_t *out, uint64_t max,             \
                                           uint64_t *found)                                        \
    {                                                                                              \
        BY_SOURCES(EDGES)                                                                          \
    }
/* clang-format on */

DEFINE_LOOPS(plain, )

static uint32_t forced_plain;

#if defined(__x86_64__) || defined(__i386__)
DEFINE_LOOPS(wide, __attribute__((target("avx2,popcnt,bmi"))))

static bool wide(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt") &&
           __builtin_cpu_supports("bmi") && vrep_load_relaxed_u32(&forced_plain) == 0;
}

#define DISPATCH(loop, ...) (wide() ? wide_##loop(__VA_ARGS__) : plain_##loop(__VA_ARGS__))
#else
#define DISPATCH(loop, ...) plain_##loop(__VA_ARGS__)
#endif

void vrep_bits_force_plain(bool plain)
{
    vrep_store_relaxed_u32(&forced_plain, plain);
}

void vrep_bits_union(const struct vrep_bits *bits, uint64_t *out)
{
    if (bits->sources > 0) {
        DISPATCH(union, bits, out);
        return;
    }
    for (uint64_t i = 0; i < bits->words; i++)
        out[i] = 0;
}

uint64_t vrep_bits_count(const struct vrep_bits *bits)
{
    return bits->sources > 0 ? DISPATCH(count, bits) : 0;
}

static uint64_t union_word(const struct vrep_bits *bits, uint64_t at)
{
    uint64_t word = 0;
    for (unsigned s = 0; s < bits->sources; s++)
        word |= bits->source[s][at];
    return word;
}

uint64_t vrep_bits_next(const struct vrep_bits *bits, uint64_t from, bool set)
{
    uint64_t end = bits->words * 64, flip = set ? 0 : ~UINT64_C(0), at = from / 64;
    if (from >= end || (bits->sources == 0 && set))
        return end;
    if (bits->sources == 0)
        return from;
    uint64_t word = (union_word(bits, at) ^ flip) & (~UINT64_C(0) << (from % 64));
    while (word == 0) {
        if (++at == bits->words)
            return end;
        if (at % STEP == 0) {
            at = DISPATCH(next_line, bits, at, flip);
            if (at >= bits->words)
                return end;
        }
        word = union_word(bits, at) ^ flip;
    }
    return at * 64 + (uint64_t)__builtin_ctzll(word);
}

uint64_t vrep_bits_runs(const struct vrep_bits *bits, uint64_t *from, uint64_t (*runs)[2],
                        uint64_t max)
{
    uint64_t end = bits->words * 64, n = 0, *edges = &runs[0][0];
    if (max == 0 || *from >= end)
        return 0;
    if (bits->sources == 0) {
        *from = end;
        return 0;
    }
    if (max >= VREP_BITS_RUNS_MIN) {
        *from = DISPATCH(edges, bits, *from / 64, *from % 64 + 1, edges, 2 * max - 1, &n) * 64;
        if (n % 2 != 0) { /* a run is open where the room ended, or at the end of all */
            *from = vrep_bits_next(bits, *from, false);
            edges[n++] = *from;
        }
        return n / 2;
    }
    for (; n < max; n++) {
        runs[n][0] = vrep_bits_next(bits, *from, true);
        *from = runs[n][0];
        if (*from == end)
            break;
        *from = runs[n][1] = vrep_bits_next(bits, *from, false);
    }
    return n;
}

static uint64_t mask_of(uint64_t word, uint64_t first, uint64_t last)
{
    uint64_t mask = ~UINT64_C(0);
    if (word == first / 64)
        mask &= ~UINT64_C(0) << (first % 64);
    if (word == last / 64)
        mask &= ~UINT64_C(0) >> (63 - last % 64);
    return mask;
}

/* One thread writes, so a load and a store are enough; each is indivisible for those who read. */
uint64_t vrep_bits_set(uint64_t *words, uint64_t first, uint64_t last)
{
    uint64_t changed = 0;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t before = vrep_load_relaxed_u64(&words[word]);
        uint64_t added = mask_of(word, first, last) & ~before;
        if (added == 0)
            continue;
        vrep_store_relaxed_u64(&words[word], before | added);
        changed += (uint64_t)__builtin_popcountll(added);
    }
    return changed;
}

uint64_t vrep_bits_clear(uint64_t *words, uint64_t first, uint64_t last)
{
    uint64_t changed = 0;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t before = vrep_load_relaxed_u64(&words[word]);
        uint64_t removed = mask_of(word, first, last) & before;
        if (removed == 0)
            continue;
        vrep_store_relaxed_u64(&words[word], before & ~removed);
        changed += (uint64_t)__builtin_popcountll(removed);
    }
    return changed;
}

bool vrep_bits_any(const uint64_t *words, uint64_t first, uint64_t last)
{
    for (uint64_t word = first / 64; word <= last / 64; word++)
        if (vrep_load_relaxed_u64(&words[word]) & mask_of(word, first, last))
            return true;
    return false;
}
