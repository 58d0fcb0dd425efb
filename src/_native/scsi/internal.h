/* Internal: what the files of the SCSI room share.
 *
 * target.c makes targets and nexuses and lists what a nexus was not told yet;
 * task.c prepares, orders, runs and aborts tasks; opcode.c holds the table of
 * commands and decodes; inquiry.c, mode.c, block.c, compare.c, thin.c and
 * reservation.c carry the commands out; reservation_file.c keeps registrations.
 */
#ifndef VREP_SCSI_INTERNAL_H
#define VREP_SCSI_INTERNAL_H

#include "base/endian.h"
#include "base/status.h"
#include "filter/worker.h"
#include "format/layout.h"
#include "scsi/scsi.h"

#define SCSI_BUFFERS_SMALL 1024u
#define SCSI_BUFFERS_PAGES 512u                /* 128 MiB */
#define SCSI_CONTIGUOUS VREP_BUFFER_PAGE_BYTES /* what one part of a buffer holds */
#define SCSI_PARAMETERS_MAX VREP_BUFFER_SMALL_BYTES
#define SCSI_COMPARE_BYTES_MAX (SCSI_CONTIGUOUS / 2)
#define SCSI_COMPARE_BLOCKS_MAX 255u
#define SCSI_WRITE_SAME_BYTES_MAX ((32u << 20) - 4096u) /* what WRITE SAME (10) can name */
#define SCSI_UNMAP_BLOCKS_MAX (1u << 20)
#define SCSI_UNMAP_DESCRIPTORS_MAX 256u
#define SCSI_PATTERN_BYTES (1u << 20) /* of one step of WRITE SAME */
#define SCSI_TASKS_MAX 4096u          /* of a unit: TASK SET FULL above */

/* Which reservations stop a command (SPC-4 5.12, SBC-3 4.17). */
enum scsi_access {
    ACCESS_ALWAYS, /* never stopped */
    ACCESS_READ,   /* stopped by exclusive access */
    ACCESS_WRITE,  /* and by write exclusive */
    ACCESS_OWN     /* judges itself */
};

#define OPCODE_ANY_UNIT 1u     /* also where no unit is */
#define OPCODE_NO_ATTENTION 2u /* does not report a unit attention */
#define OPCODE_MEDIUM 4u       /* not while stopped */
#define OPCODE_CHANGES 8u      /* not while write protected */
#define OPCODE_THIN 16u        /* only where the backing can unmap */

struct scsi_opcode {
    uint8_t code;
    int8_t action; /* service action, -1: none */
    uint8_t length;
    uint8_t access;
    uint8_t flags;
    /* Decodes, checks fields, sets data_out and asks for memory. True, or the task has failed. */
    bool (*prepare)(struct vrep_scsi_task *task);
    void (*run)(struct vrep_scsi_task *task);
    uint8_t usage[VREP_SCSI_CDB_BYTES]; /* REPORT SUPPORTED OPERATION CODES; [0] is unused */
};

enum task_stage {
    STAGE_FREE,
    STAGE_PREPARED, /* in the task set; data-out is being received */
    STAGE_WAITING,  /* submitted; others go first */
    STAGE_RUNNING,
    STAGE_DONE
};

/* What a nexus is to be told, in the order of telling. */
enum attention {
    ATTENTION_POWER_ON,
    ATTENTION_UNIT_RESET,
    ATTENTION_NEXUS_LOSS,
    ATTENTION_MEDIUM,
    ATTENTION_COMMANDS_CLEARED,
    ATTENTION_CAPACITY,
    ATTENTION_MODE,
    ATTENTION_RESERVATIONS_PREEMPTED,
    ATTENTION_RESERVATIONS_RELEASED,
    ATTENTION_REGISTRATIONS_PREEMPTED,
    ATTENTIONS
};

struct reservations {
    uint32_t generation; /* PRGENERATION: from zero at each start */
    uint32_t count;
    uint32_t holder; /* index, valid when type != 0 and not all registrants */
    uint8_t type;    /* 0: no reservation */
    bool persist;    /* APTPL */
    struct vrep_registration list[VREP_REGISTRATIONS_MAX];
};

struct scsi_unit {
    struct vrep_scsi_target *target;
    uint32_t number; /* LUN */
    bool absent;     /* the last one: where tasks for a LUN that is not there stand */
    uint16_t disk;
    uint32_t block_bytes;
    uint64_t bytes; /* of the disk */
    bool resized;   /* it got them as the group was opened: who comes back knows other ones */
    bool thin;
    uint32_t granularity; /* blocks that unmap frees together */
    char serial[33];
    uint8_t naa[8];

    struct vrep_scsi_task *first, *last; /* task set, in order of arrival */
    uint32_t tasks, ordered, waiting;
    uint32_t dying; /* aborted tasks that are still in the chain */

    bool removable, ejected; /* what is ejected is stopped, too */
    bool stopped, software_protect, descriptor_sense, write_through;
    struct vrep_scsi_nexus *reserved_by; /* RESERVE(6) */

    struct reservations reservations, next_reservations, last_reservations;
    struct vrep_reservations stored;
    char *path;
    int fd;
    uint64_t counter;
    struct vrep_job job;
    struct vrep_scsi_task *storing; /* the task that changes them */
};

struct vrep_scsi_nexus {
    struct vrep_scsi_target *target;
    bool used, closed;
    uint32_t tasks;
    uint16_t port;
    uint16_t transport_id_bytes;
    uint8_t transport_id[VREP_SCSI_TRANSPORT_ID_MAX];
    uint16_t attention[VREP_SCSI_UNITS_MAX]; /* bits of enum attention */
    bool prevents[VREP_SCSI_UNITS_MAX];
};

struct vrep_scsi_target {
    struct vrep_group *group;
    struct scsi_unit *units; /* one more than there are */
    uint32_t units_count;
    struct vrep_scsi_nexus nexus[VREP_SCSI_NEXUSES_MAX];
    struct vrep_buffers *buffers;
    struct vrep_worker *worker;
    int notify_fd;
    uint64_t serial;
    struct vrep_scsi_task *starved_first, *starved_last;
    struct vrep_scsi_management *managing;
    bool settling, settle_again;
};

/* ---- target.c */
struct scsi_unit *scsi_unit_of(struct vrep_scsi_target *target, uint64_t lun);
void scsi_attention(struct scsi_unit *unit, struct vrep_scsi_nexus *nexus, enum attention what);
/* All nexuses but one (which may be NULL). */
void scsi_attention_others(struct scsi_unit *unit, const struct vrep_scsi_nexus *but,
                           enum attention what);
/* The next one, which is then told; 0: none. */
uint32_t scsi_attention_take(struct scsi_unit *unit, struct vrep_scsi_nexus *nexus);
uint32_t scsi_attention_peek(const struct scsi_unit *unit, const struct vrep_scsi_nexus *nexus);
void scsi_nexus_release(struct vrep_scsi_nexus *nexus);

/* ---- task.c */
/* Ends a task; the transport may end it inside. */
void scsi_good(struct vrep_scsi_task *task);
void scsi_conflict(struct vrep_scsi_task *task);
void scsi_fail(struct vrep_scsi_task *task, uint32_t code);
void scsi_fail_status(struct vrep_scsi_task *task, int status, bool write);
/* In prepare: remembers the failure. */
bool scsi_refuse(struct vrep_scsi_task *task, uint32_t code);
bool scsi_refuse_cdb(struct vrep_scsi_task *task, uint16_t byte);
void scsi_fail_parameter(struct vrep_scsi_task *task, uint16_t byte);
/* In prepare: the data-out of the command; received into the buffer. */
bool scsi_take_out(struct vrep_scsi_task *task, uint32_t bytes);
/* The parameter list; never longer than one small buffer. */
bool scsi_take_parameters(struct vrep_scsi_task *task, uint32_t bytes);
/* In run: data-in of at most `allocation` of `bytes` bytes, which were made in the buffer. */
void scsi_good_data(struct vrep_scsi_task *task, uint32_t bytes, uint32_t allocation);
bool scsi_take_buffer(struct vrep_scsi_task *task, uint32_t bytes);
uint8_t *scsi_buffer(const struct vrep_scsi_task *task); /* its first part */
/* [at, ...) of the buffer: contiguous up to *length, which it shortens. */
uint8_t *scsi_buffer_at(const struct vrep_scsi_task *task, uint32_t at, uint32_t *length);
/* Runs one command of the chain, then next(task, status).  READ lands at `at` in the buffer; WRITE
 * takes the block at the buffer's begin again and again. */
void scsi_step(struct vrep_scsi_task *task, uint8_t op, uint8_t flags, uint64_t offset,
               uint64_t length, uint32_t at, vrep_scsi_step *next);
/* Starts the command that prepare had got. */
void scsi_start(struct vrep_scsi_task *task, vrep_scsi_step *next);
/* Aborts those that `which` names; waits for nothing. */
void scsi_abort(struct scsi_unit *unit, const struct vrep_scsi_nexus *nexus,
                const struct vrep_scsi_task *but);
bool scsi_aborting_before(const struct scsi_unit *unit, uint64_t serial);
/* Starts what may start, tells who waited. */
void scsi_settle(struct vrep_scsi_target *target);

/* ---- opcode.c */
const struct scsi_opcode *scsi_opcode_find(const uint8_t *cdb);
bool scsi_opcode_known(uint8_t code);
const struct scsi_opcode *scsi_opcode_at(uint32_t index); /* NULL: past the last */
uint64_t scsi_blocks(const struct scsi_unit *unit);
/* READ, WRITE, VERIFY ...: fills lba and blocks. */
void scsi_decode(struct vrep_scsi_task *task);
bool scsi_in_range(const struct vrep_scsi_task *task);

/* ---- the commands */
bool scsi_allocates(struct vrep_scsi_task *task); /* prepare: a small or page buffer for data-in */
bool scsi_prepares_nothing(struct vrep_scsi_task *task);
void scsi_inquiry(struct vrep_scsi_task *task);
void scsi_report_luns(struct vrep_scsi_task *task);
void scsi_request_sense(struct vrep_scsi_task *task);
void scsi_test_unit_ready(struct vrep_scsi_task *task);
void scsi_report_opcodes(struct vrep_scsi_task *task);
bool scsi_mode_select_prepare(struct vrep_scsi_task *task);
void scsi_mode_sense(struct vrep_scsi_task *task);
void scsi_mode_select(struct vrep_scsi_task *task);
bool scsi_start_stop_prepare(struct vrep_scsi_task *task);
void scsi_start_stop(struct vrep_scsi_task *task);
void scsi_prevent_allow(struct vrep_scsi_task *task);
/* Of a unit that is stopped: why. */
uint32_t scsi_not_ready(const struct scsi_unit *unit);
bool scsi_read_prepare(struct vrep_scsi_task *task);
void scsi_read(struct vrep_scsi_task *task);
bool scsi_write_prepare(struct vrep_scsi_task *task);
bool scsi_write_atomic_prepare(struct vrep_scsi_task *task);
void scsi_write(struct vrep_scsi_task *task);
bool scsi_sync_prepare(struct vrep_scsi_task *task);
void scsi_sync(struct vrep_scsi_task *task);
/* Decodes; `refused` are bits of byte 1 that must be 0; `most` bytes, 0: any. */
bool scsi_check(struct vrep_scsi_task *task, uint8_t refused, uint64_t most);
uint8_t scsi_write_flags(const struct vrep_scsi_task *task);
/* In prepare: the command of a write of `bytes` bytes at the task's LBA. */
bool scsi_take_command(struct vrep_scsi_task *task, uint64_t bytes, const uint8_t *expect,
                       uint8_t *found);
void scsi_written(struct vrep_scsi_task *task, int status);
bool scsi_prefetch_prepare(struct vrep_scsi_task *task);
void scsi_prefetch(struct vrep_scsi_task *task);
void scsi_read_capacity(struct vrep_scsi_task *task);
bool scsi_verify_prepare(struct vrep_scsi_task *task);
void scsi_verify(struct vrep_scsi_task *task);
bool scsi_write_verify_prepare(struct vrep_scsi_task *task);
void scsi_write_verify(struct vrep_scsi_task *task);
bool scsi_compare_write_prepare(struct vrep_scsi_task *task);
void scsi_compare_write(struct vrep_scsi_task *task);
bool scsi_write_same_prepare(struct vrep_scsi_task *task);
void scsi_write_same(struct vrep_scsi_task *task);
bool scsi_unmap_prepare(struct vrep_scsi_task *task);
void scsi_unmap(struct vrep_scsi_task *task);
bool scsi_lba_status_prepare(struct vrep_scsi_task *task);
void scsi_lba_status(struct vrep_scsi_task *task);
void scsi_reserve(struct vrep_scsi_task *task);
void scsi_release(struct vrep_scsi_task *task);
void scsi_persistent_in(struct vrep_scsi_task *task);
bool scsi_persistent_out_prepare(struct vrep_scsi_task *task);
void scsi_persistent_out(struct vrep_scsi_task *task);

/* ---- reservation.c */
bool scsi_reserved_against(const struct vrep_scsi_task *task);
void scsi_reservations_reset(
    struct scsi_unit *unit); /* RESERVE(6) ends; the persistent ones stay */
/* A change that was stored and waited for aborted tasks. */
void scsi_reservations_settle(struct scsi_unit *unit);

/* ---- reservation_file.c */
int scsi_reservations_open(struct scsi_unit *unit);
void scsi_reservations_close(struct scsi_unit *unit);
/* Runs on the worker. */
int scsi_reservations_write(struct scsi_unit *unit);

#endif
