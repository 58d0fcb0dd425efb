/*
 * Conventions of the fuzz targets (libFuzzer, one target per fuzz_<what>.c).
 *
 * A target defines LLVMFuzzerTestOneInput and plants one canary: a call of
 * FUZZ_CANARY() where only input that passed the parser's checks arrives. Each
 * target is built twice; in the second build the canary aborts, and the run that
 * does not find it fails. Seeds lie in corpus/fuzz_<what>/, an optional libFuzzer
 * dictionary in fuzz_<what>.dict. FUZZ_CHECK states what must hold for any input.
 */
#ifndef VREP_TESTS_FUZZ_H
#define VREP_TESTS_FUZZ_H

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
#define FUZZ_CANARY(condition) ((void)(condition))
#endif

#define FUZZ_CHECK(condition)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);              \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#endif
