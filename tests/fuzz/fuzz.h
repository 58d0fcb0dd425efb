/*
 * What every fuzz target shares: the canary. A target plants one behind the
 * checks that it exercises; it exists only in the build with VREP_FUZZ_CANARY
 * and shows that the fuzzer gets that deep. See README.md.
 */
#ifndef VREP_TESTS_FUZZ_H
#define VREP_TESTS_FUZZ_H

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#ifdef VREP_FUZZ_CANARY
#define FUZZ_CANARY(condition)                                                                     \
    do {                                                                                           \
        if (condition) {                                                                           \
            fputs("fuzz canary found\n", stderr);                                                  \
            abort();                                                                               \
        }                                                                                          \
    } while (0)
#else
#define FUZZ_CANARY(condition) ((void)0)
#endif

/* An invariant of the code under test: broken is a finding, in both builds. */
#define FUZZ_MUST(condition)                                                                       \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not true: %s (errno %d)\n", __FILE__, __LINE__, #condition,    \
                    errno);                                                                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#endif
