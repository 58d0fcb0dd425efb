/* Sense: why a SCSI command did not end well, as key, ASC and ASCQ (SPC-4 4.5),
 * and its two encodings.
 *
 * Limits: VREP_SENSE_BYTES_MAX.  Threading: pure.
 */
#ifndef VREP_SCSI_SENSE_H
#define VREP_SCSI_SENSE_H

#include <stdbool.h>
#include <stdint.h>

#define VREP_SENSE_BYTES_MAX 32u
#define VREP_SENSE_FIXED_BYTES 18u

/* key << 16 | ASC << 8 | ASCQ */
enum vrep_sense_code {
    VREP_SENSE_NONE = 0,
    VREP_SENSE_NOT_READY_STOPPED = 0x020402,
    VREP_SENSE_NOT_READY_CAUSE = 0x020400,
    VREP_SENSE_NO_MEDIUM = 0x023a00,
    VREP_SENSE_WRITE_ERROR = 0x030c00,
    VREP_SENSE_READ_ERROR = 0x031100,
    VREP_SENSE_INTERNAL = 0x044400,
    VREP_SENSE_PARAMETER_LIST_LENGTH = 0x051a00,
    VREP_SENSE_OPCODE = 0x052000,
    VREP_SENSE_LBA_RANGE = 0x052100,
    VREP_SENSE_FIELD_IN_CDB = 0x052400,
    VREP_SENSE_NO_UNIT = 0x052500,
    VREP_SENSE_FIELD_IN_PARAMETERS = 0x052600,
    VREP_SENSE_INVALID_RELEASE = 0x052604,
    VREP_SENSE_REMOVAL_PREVENTED = 0x055302,
    VREP_SENSE_NO_RESERVATION_ROOM = 0x055504,
    VREP_SENSE_SAVING = 0x053900,
    VREP_SENSE_MEDIUM_CHANGED = 0x062800,
    VREP_SENSE_POWER_ON = 0x062900,
    VREP_SENSE_UNIT_RESET = 0x062903,
    VREP_SENSE_NEXUS_LOSS = 0x062907,
    VREP_SENSE_MODE_CHANGED = 0x062a01,
    VREP_SENSE_RESERVATIONS_PREEMPTED = 0x062a03,
    VREP_SENSE_RESERVATIONS_RELEASED = 0x062a04,
    VREP_SENSE_REGISTRATIONS_PREEMPTED = 0x062a05,
    VREP_SENSE_CAPACITY_CHANGED = 0x062a09,
    VREP_SENSE_COMMANDS_CLEARED = 0x062f00,
    VREP_SENSE_WRITE_PROTECTED = 0x072700,
    VREP_SENSE_SOFTWARE_PROTECTED = 0x072702,
    VREP_SENSE_NO_SPACE = 0x072707,
    VREP_SENSE_DATA_OUT_SIZE = 0x050e03,
    VREP_SENSE_MISCOMPARE = 0x0e1d00,
};

struct vrep_sense {
    uint32_t code; /* enum vrep_sense_code */
    bool has_information;
    bool has_field;       /* with ILLEGAL REQUEST */
    bool field_is_cdb;    /* else of the parameter list */
    uint16_t field;       /* byte */
    uint64_t information; /* LBA, or offset of the first differing byte */
};

/* Encodes as fixed or descriptor format; returns the length. */
uint32_t vrep_sense_encode(const struct vrep_sense *sense, bool descriptor,
                           uint8_t out[VREP_SENSE_BYTES_MAX]);
/* What a failed command of the filter chain means; write: it would have changed the medium. */
uint32_t vrep_sense_of_status(int status, bool write);

#endif
