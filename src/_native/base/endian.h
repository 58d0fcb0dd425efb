/*
 * Loads and stores of 16, 32 and 64 bit integers in a fixed byte order.
 *
 * vrep_le_* is the order of our own formats, vrep_be_* that of NBD and SCSI.
 * Addresses may have any alignment. Nothing here checks bounds: the caller has
 * compared the length of its buffer before. Pure, safe from any thread.
 */
#ifndef VREP_BASE_ENDIAN_H
#define VREP_BASE_ENDIAN_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

/* memcpy is how C11 spells an unaligned access; compilers emit one move. */
#define VREP_ENDIAN_DEFINE(order, bits)                                                            \
    static inline uint##bits##_t vrep_##order##_load_u##bits(const void *from)                     \
    {                                                                                              \
        uint##bits##_t raw;                                                                        \
        memcpy(&raw, from, sizeof raw);                                                            \
        return order##bits##toh(raw);                                                              \
    }                                                                                              \
    static inline void vrep_##order##_store_u##bits(void *to, uint##bits##_t value)                \
    {                                                                                              \
        uint##bits##_t raw = hto##order##bits(value);                                              \
        memcpy(to, &raw, sizeof raw);                                                              \
    }

VREP_ENDIAN_DEFINE(le, 16)
VREP_ENDIAN_DEFINE(le, 32)
VREP_ENDIAN_DEFINE(le, 64)
VREP_ENDIAN_DEFINE(be, 16)
VREP_ENDIAN_DEFINE(be, 32)
VREP_ENDIAN_DEFINE(be, 64)

#undef VREP_ENDIAN_DEFINE

#endif
