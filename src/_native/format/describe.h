/*
 * Describe: what layout.h defines, as tables that a program can read.
 *
 * For every struct its fields with offset, size and type, and every constant by
 * name; values come from the compiler, so there is no second definition. Python
 * builds its dtypes from these tables, the documents are checked against them.
 * Units: bytes. Threading: constant data.
 */
#ifndef VREP_FORMAT_DESCRIBE_H
#define VREP_FORMAT_DESCRIBE_H

#include <stddef.h>
#include <stdint.h>

struct vrep_described_field {
    const char *name;
    const char *type; /* "u1" "u2" "u4" "u8", "char", or the name of a struct below */
    size_t offset;
    size_t bytes; /* of the whole field */
    size_t unit;  /* of one element; bytes when it is no array */
};

/* Structs that others hold stand before them. Both tables end with a NULL name. */
struct vrep_described_struct {
    const char *name;
    size_t bytes;
    const struct vrep_described_field *fields;
};
extern const struct vrep_described_struct vrep_described_structs[];

struct vrep_described_constant {
    const char *name;
    uint64_t value;
};
extern const struct vrep_described_constant vrep_described_constants[];

#endif
