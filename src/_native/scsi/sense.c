#include "scsi/sense.h"

#include <string.h>

#include "base/endian.h"
#include "base/status.h"

#define DESCRIPTOR_INFORMATION 0x00u
#define DESCRIPTOR_KEY_SPECIFIC 0x02u

/* Sense-key specific: field pointer (SPC-4 4.5.2.4.2). */
static void key_specific(const struct vrep_sense *sense, uint8_t out[3])
{
    out[0] = (uint8_t)(0x80u | (sense->field_is_cdb ? 0x40u : 0u));
    vrep_be_store_u16(out + 1, sense->field);
}

static uint32_t encode_fixed(const struct vrep_sense *sense, uint8_t *out)
{
    memset(out, 0, VREP_SENSE_FIXED_BYTES);
    out[0] = 0x70;
    /* The field has 32 bits: what does not fit is not valid there. */
    if (sense->has_information && sense->information <= UINT32_MAX) {
        out[0] |= 0x80u;
        vrep_be_store_u32(out + 3, (uint32_t)sense->information);
    }
    out[2] = (uint8_t)(sense->code >> 16);
    out[7] = VREP_SENSE_FIXED_BYTES - 8;
    out[12] = (uint8_t)(sense->code >> 8);
    out[13] = (uint8_t)sense->code;
    if (sense->has_field)
        key_specific(sense, out + 15);
    return VREP_SENSE_FIXED_BYTES;
}

static uint32_t encode_descriptor(const struct vrep_sense *sense, uint8_t *out)
{
    uint32_t bytes = 8;
    memset(out, 0, VREP_SENSE_BYTES_MAX);
    out[0] = 0x72;
    out[1] = (uint8_t)(sense->code >> 16);
    out[2] = (uint8_t)(sense->code >> 8);
    out[3] = (uint8_t)sense->code;
    if (sense->has_information) {
        out[bytes] = DESCRIPTOR_INFORMATION;
        out[bytes + 1] = 10;
        out[bytes + 2] = 0x80; /* valid */
        vrep_be_store_u64(out + bytes + 4, sense->information);
        bytes += 12;
    }
    if (sense->has_field) {
        out[bytes] = DESCRIPTOR_KEY_SPECIFIC;
        out[bytes + 1] = 6;
        key_specific(sense, out + bytes + 4);
        bytes += 8;
    }
    out[7] = (uint8_t)(bytes - 8);
    return bytes;
}

uint32_t vrep_sense_encode(const struct vrep_sense *sense, bool descriptor,
                           uint8_t out[VREP_SENSE_BYTES_MAX])
{
    return descriptor ? encode_descriptor(sense, out) : encode_fixed(sense, out);
}

uint32_t vrep_sense_of_status(int status, bool write)
{
    switch (status) {
    case VREP_E_RANGE:
        return VREP_SENSE_LBA_RANGE;
    case VREP_E_READONLY:
        return VREP_SENSE_WRITE_PROTECTED;
    case VREP_E_NOSPACE:
        return write ? VREP_SENSE_NO_SPACE : VREP_SENSE_READ_ERROR;
    case VREP_E_IO:
    case VREP_E_CORRUPT:
        return write ? VREP_SENSE_WRITE_ERROR : VREP_SENSE_READ_ERROR;
    case VREP_E_GONE:
    case VREP_E_TIMEOUT:
        return VREP_SENSE_NOT_READY_CAUSE;
    default:
        return VREP_SENSE_INTERNAL;
    }
}
