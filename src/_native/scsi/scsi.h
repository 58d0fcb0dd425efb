/* SCSI: the disks of a group as a SCSI target device with logical units,
 * without any transport (SAM-5, SPC-4, SBC-3).
 *
 * A transport opens a nexus for each initiator port that logged in, and gives
 * it tasks.  A task is prepared (its CDB is decoded, and it gets the memory
 * that its data-out is received into), submitted once its data-out is there,
 * and done() is called once, with status, sense and data-in; then the transport
 * ends it.  Every change of a disk is a command of the filter chain: what the
 * chain did not do is in no record, and records stand in the order of the chain.
 *
 * Units: bytes, logical blocks where it says blocks.  Limits: 64 logical units,
 * 64 nexuses, 64 persistent registrations a unit, 16 MiB of data a task.
 * Threading: the group's thread only.  Nothing here blocks; nothing allocates
 * after a nexus was opened.
 */
#ifndef VREP_SCSI_SCSI_H
#define VREP_SCSI_SCSI_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "base/buffers.h"
#include "filter/group.h"
#include "scsi/sense.h"

#define VREP_SCSI_UNITS_MAX VREP_DISKS_MAX
#define VREP_SCSI_NEXUSES_MAX 64u
#define VREP_SCSI_CDB_BYTES 16u
#define VREP_SCSI_TRANSPORT_ID_MAX 248u
#define VREP_SCSI_DATA_MAX (16u << 20)

#define VREP_SCSI_GOOD 0x00u
#define VREP_SCSI_CHECK_CONDITION 0x02u
#define VREP_SCSI_CONDITION_MET 0x04u
#define VREP_SCSI_BUSY 0x08u
#define VREP_SCSI_RESERVATION_CONFLICT 0x18u
#define VREP_SCSI_TASK_SET_FULL 0x28u
#define VREP_SCSI_TASK_ABORTED 0x40u

enum vrep_scsi_attribute {
    VREP_SCSI_SIMPLE,
    VREP_SCSI_ORDERED,
    VREP_SCSI_HEAD_OF_QUEUE,
    VREP_SCSI_ACA /* refused: there is no ACA here */
};

struct vrep_scsi_unit_config {
    uint16_t disk;        /* of the group */
    uint32_t block_bytes; /* 512 or 4096 */
    bool removable;       /* the medium can be ejected and loaded again */
    /* Where registrations are kept that outlive a power loss, beside the durable state of the
     * disk; NULL: none are (PTPL_C is 0). */
    const char *reservations_path;
};
struct vrep_scsi_config {
    uint8_t group_id[16];
    const struct vrep_scsi_unit_config *units; /* LUN 0, 1, ... */
    uint32_t units_count;
};

struct vrep_scsi_target;
struct vrep_scsi_nexus;

/* Reads the reservations.  INVALID: no unit, a block size, a disk that is not there; CORRUPT,
 * VERSION, IO: a reservations file that cannot be believed. */
int vrep_scsi_create(struct vrep_group *group, const struct vrep_scsi_config *config,
                     struct vrep_scsi_target **out);
/* No task is in flight, unless the group was closed before. */
void vrep_scsi_destroy(struct vrep_scsi_target *target);
/* Readable: poll has work. */
int vrep_scsi_fd(const struct vrep_scsi_target *target);
void vrep_scsi_poll(struct vrep_scsi_target *target);
/* The group's wake-up: commands or memory are free again. */
void vrep_scsi_wakeup(struct vrep_scsi_target *target);
/* True when nothing is in flight and nothing is being stored. */
bool vrep_scsi_idle(const struct vrep_scsi_target *target);

/* ---- nexuses ------------------------------------------------------------------ */

/* transport_id: the initiator port's TransportID (SPC-4 7.6.4), which registrations are known by;
 * port: relative target port.  FULL: too many. */
int vrep_scsi_nexus_open(struct vrep_scsi_target *target, const uint8_t *transport_id,
                         uint32_t transport_id_bytes, uint16_t port, struct vrep_scsi_nexus **out);
/* I_T nexus loss: its tasks are aborted, and done() of those that run follows. */
void vrep_scsi_nexus_close(struct vrep_scsi_nexus *nexus);

/* ---- tasks ---------------------------------------------------------------------- */

struct scsi_unit;
struct scsi_opcode;
struct vrep_scsi_task;
typedef void vrep_scsi_step(struct vrep_scsi_task *task, int status);

struct vrep_scsi_task {
    /* set by the transport before prepare */
    struct vrep_scsi_nexus *nexus;
    uint64_t lun; /* the eight bytes of SAM-5 4.6, as a big-endian number */
    uint8_t cdb[VREP_SCSI_CDB_BYTES];
    uint8_t attribute;     /* enum vrep_scsi_attribute */
    uint32_t out_expected; /* bytes that the initiator will send */
    void (*done)(struct vrep_scsi_task *task);
    void *owner;

    /* valid after prepare: out_bytes bytes of data-out belong into out[] before submit.  What the
     * initiator sends beyond is dropped by the transport.  The transport may use the iovecs up. */
    struct iovec *out;
    int out_count;
    uint32_t out_bytes;
    uint32_t data_out; /* what the CDB asks for: with out_expected, the residual */

    /* valid in done and until end */
    uint8_t status; /* VREP_SCSI_* */
    bool aborted;   /* no status is to be sent */
    uint8_t sense_bytes;
    uint8_t sense[VREP_SENSE_BYTES_MAX];
    struct iovec *in;
    int in_count;
    uint32_t in_bytes;

    /* private to the SCSI room */
    struct vrep_scsi_target *target;
    struct scsi_unit *unit;
    const struct scsi_opcode *opcode;
    struct vrep_scsi_task *before, *after; /* in the unit's task set */
    struct vrep_scsi_task *next_starved;
    struct vrep_command *command;
    struct vrep_buffer buffer;
    struct iovec iov[VREP_BUFFER_PAGES_MAX + 2];
    struct vrep_sense why;
    uint64_t serial; /* order of arrival */
    uint64_t lba;
    uint32_t blocks;
    uint8_t stage; /* enum task_stage */
    bool starved;  /* its next command waits for room */
    bool driving, pending;
    bool *gone;
    struct {
        uint8_t op, flags;
        uint64_t offset, length;
        uint32_t at; /* READ: where in the buffer */
        vrep_scsi_step *next;
    } step;
    uint64_t at, left; /* of a command in steps: bytes */
    uint32_t scratch;  /* where in the buffer what is read for a compare goes */
};

/* OK also for a task that will fail: submit tells.  AGAIN: no room; call again after the group's
 * wake-up, and after any task was ended. */
int vrep_scsi_prepare(struct vrep_scsi_task *task);
void vrep_scsi_submit(struct vrep_scsi_task *task);
/* Gives its memory back; of a task that was prepared and never submitted too. */
void vrep_scsi_end(struct vrep_scsi_task *task);
bool vrep_scsi_task_live(const struct vrep_scsi_task *task);

/* ---- task management ---------------------------------------------------------------- */

enum vrep_scsi_function {
    VREP_SCSI_ABORT_TASK,
    VREP_SCSI_ABORT_TASK_SET,
    VREP_SCSI_CLEAR_TASK_SET,
    VREP_SCSI_UNIT_RESET,
    VREP_SCSI_TARGET_RESET
};
enum vrep_scsi_response { VREP_SCSI_COMPLETE, VREP_SCSI_NO_LUN, VREP_SCSI_REJECTED };

/* done() is called once every task that it aborted has left the chain: no write of them lands
 * afterwards. */
struct vrep_scsi_management {
    struct vrep_scsi_nexus *nexus;
    uint64_t lun;
    uint8_t function;
    struct vrep_scsi_task *task; /* ABORT TASK: NULL when it has ended */
    void (*done)(struct vrep_scsi_management *management);
    void *owner;
    uint8_t response; /* enum vrep_scsi_response, valid in done */
    /* private */
    struct vrep_scsi_management *next;
    uint64_t serial;
    struct scsi_unit *unit; /* NULL: all */
};
void vrep_scsi_manage(struct vrep_scsi_management *management);

#endif
