/*
 * The whole test framework of the native tests.
 *
 * A test program is one main() that calls RUN() for each of its functions and
 * returns check_report(). A failed check prints file, line and both values and
 * ends the program with status 1. Checks evaluate each argument once. Random
 * tests draw from check_random(), whose seed is printed on failure and can be
 * given again in VREP_TEST_SEED. One thread.
 */
#ifndef VREP_TESTS_CHECK_H
#define VREP_TESTS_CHECK_H

#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/status.h"

static const char *check_running = "main";
static unsigned check_passed;
static uint64_t check_seed_used;
static uint64_t check_random_state;

#define CHECK_UNUSED __attribute__((unused))

__attribute__((noreturn)) CHECK_UNUSED static void check_fail(const char *file, int line)
{
    fprintf(stderr, "%s:%d: failed in %s\n", file, line, check_running);
    if (check_seed_used != 0)
        fprintf(stderr, "replay with VREP_TEST_SEED=%" PRIu64 "\n", check_seed_used);
    exit(1);
}

/* Start (or restart) the random sequence; called by itself on first use. */
CHECK_UNUSED static void check_seed(uint64_t seed)
{
    check_seed_used = seed;
    check_random_state = seed;
}

CHECK_UNUSED static uint64_t check_random(void)
{
    if (check_seed_used == 0) {
        const char *given = getenv("VREP_TEST_SEED");
        uint64_t seed = given ? strtoull(given, NULL, 0) : (uint64_t)time(NULL);
        check_seed(seed ? seed : 1);
    }
    /* splitmix64 */
    uint64_t z = (check_random_state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* Uniform enough for tests: 0 .. limit - 1. */
CHECK_UNUSED static uint64_t check_random_below(uint64_t limit)
{
    return check_random() % limit;
}

CHECK_UNUSED static int check_report(void)
{
    printf("%u tests passed\n", check_passed);
    return 0;
}

#define RUN(function)                                                                              \
    do {                                                                                           \
        check_running = #function;                                                                 \
        function();                                                                                \
        check_passed++;                                                                            \
    } while (0)

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "not true: %s\n", #condition);                                         \
            check_fail(__FILE__, __LINE__);                                                        \
        }                                                                                          \
    } while (0)

/* Integers of any width and sign, compared and printed as 64 bits. */
#define CHECK_EQ(got, want)                                                                        \
    do {                                                                                           \
        int64_t check_got = (int64_t)(got), check_want = (int64_t)(want);                          \
        if (check_got != check_want) {                                                             \
            fprintf(stderr, "%s is %" PRId64 " (0x%" PRIx64 "), not %" PRId64 "\n", #got,          \
                    check_got, (uint64_t)check_got, check_want);                                   \
            check_fail(__FILE__, __LINE__);                                                        \
        }                                                                                          \
    } while (0)

#define CHECK_STATUS(call, want)                                                                   \
    do {                                                                                           \
        int check_got = (call), check_want = (want);                                               \
        if (check_got != check_want) {                                                             \
            fprintf(stderr, "%s gave %s (%d), not %s\n", #call, vrep_status_name(check_got),       \
                    check_got, vrep_status_name(check_want));                                      \
            check_fail(__FILE__, __LINE__);                                                        \
        }                                                                                          \
    } while (0)

#define CHECK_OK(call) CHECK_STATUS(call, VREP_OK)

#define CHECK_STR(got, want)                                                                       \
    do {                                                                                           \
        const char *check_got = (got), *check_want = (want);                                       \
        if (strcmp(check_got, check_want) != 0) {                                                  \
            fprintf(stderr, "%s is \"%s\", not \"%s\"\n", #got, check_got, check_want);            \
            check_fail(__FILE__, __LINE__);                                                        \
        }                                                                                          \
    } while (0)

#define CHECK_MEM(got, want, size)                                                                 \
    do {                                                                                           \
        const unsigned char *check_got = (const void *)(got), *check_want = (const void *)(want);  \
        for (size_t check_i = 0, check_n = (size); check_i < check_n; check_i++) {                 \
            if (check_got[check_i] != check_want[check_i]) {                                       \
                fprintf(stderr, "%s[%zu] is 0x%02x, not 0x%02x\n", #got, check_i,                  \
                        check_got[check_i], check_want[check_i]);                                  \
                check_fail(__FILE__, __LINE__);                                                    \
            }                                                                                      \
        }                                                                                          \
    } while (0)

#endif
