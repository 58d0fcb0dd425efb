/* CDBs and their data-out against a whole device server on a small disk in memory.
 *
 * A task of the input: nexus and attribute, how much data-out the initiator says and sends (one
 * byte, in units of 64 bytes), the CDB, then the data-out.  Whatever the bytes are: every task is
 * answered once, with no more data than a task may move, and what ends in a conflict has changed
 * nothing. */
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status.h"
#include "filter/group.h"
#include "fuzz.h"
#include "scsi/scsi.h"

#define DISK_BYTES (1u << 20)
#define TASKS_MAX 64
#define HEAD 18u

static struct vrep_group *group;
static struct vrep_scsi_target *target;
static struct vrep_scsi_nexus *nexus[2];
static bool done;
static uint8_t status;
static uint32_t in_bytes;

static void wakeup(void *context)
{
    vrep_scsi_wakeup(context);
}

static void open_nexus(int i)
{
    uint8_t id[16] = {0x45, 0, 0, 12, (uint8_t)('a' + i)};
    FUZZ_MUST(vrep_scsi_nexus_open(target, id, sizeof id, 1, &nexus[i]) == VREP_OK);
}

static void open_all(void)
{
    static char uri[64];
    int fd = memfd_create("fuzz-scsi", 0);
    FUZZ_MUST(fd >= 0 && ftruncate(fd, DISK_BYTES) == 0);
    snprintf(uri, sizeof uri, "file:/proc/self/fd/%d", fd);
    struct vrep_group_disk disk = {.name = "a", .uri = uri};
    struct vrep_group_config config = {
        .disks = &disk, .disks_count = 1, .slots = 32, .threads = 1, .private_bytes = 32u << 20};
    FUZZ_MUST(vrep_group_open(&config, &group) == VREP_OK);
    struct vrep_scsi_unit_config unit = {.disk = 0, .block_bytes = 512};
    struct vrep_scsi_config scsi = {.units = &unit, .units_count = 1};
    FUZZ_MUST(vrep_scsi_create(group, &scsi, &target) == VREP_OK);
    vrep_group_set_wakeup(group, wakeup, target);
    open_nexus(0);
    open_nexus(1);
}

static void task_done(struct vrep_scsi_task *task)
{
    FUZZ_MUST(!done);
    done = true;
    status = task->status;
    in_bytes = 0;
    for (int i = 0; i < task->in_count && task->in_bytes > 0; i++)
        in_bytes += (uint32_t)task->in[i].iov_len;
    FUZZ_MUST(in_bytes == task->in_bytes);
    FUZZ_MUST(in_bytes <= VREP_SCSI_DATA_MAX);
    FUZZ_MUST(status == VREP_SCSI_GOOD || in_bytes == 0);
    FUZZ_MUST((status == VREP_SCSI_CHECK_CONDITION) == (task->sense_bytes > 0));
    FUZZ_MUST(task->sense_bytes <= VREP_SENSE_BYTES_MAX);
    vrep_scsi_end(task);
}

/* Returns how much of data it used. */
static size_t run(const uint8_t *data, size_t size)
{
    static struct vrep_scsi_task task;
    uint32_t says = (uint32_t)data[1] * 64;
    size_t used = HEAD;
    memset(&task, 0, sizeof task);
    task.nexus = nexus[data[0] & 1];
    task.attribute = data[0] >> 1 & 3;
    task.lun = (data[0] & 0x80) != 0 ? UINT64_C(1) << 48 : 0;
    memcpy(task.cdb, data + 2, sizeof task.cdb);
    task.out_expected = says;
    task.done = task_done;
    done = false;
    struct vrep_group_status before, after;
    FUZZ_MUST(vrep_group_status(group, &before) == VREP_OK);
    int prepared;
    while ((prepared = vrep_scsi_prepare(&task)) == VREP_E_AGAIN)
        vrep_group_poll(group);
    FUZZ_MUST(prepared == VREP_OK);
    FUZZ_MUST(task.out_bytes <= says);
    uint32_t sent = 0;
    for (int i = 0; i < task.out_count; i++) {
        size_t have = size - used < task.out[i].iov_len ? size - used : task.out[i].iov_len;
        memcpy(task.out[i].iov_base, data + used, have);
        memset((uint8_t *)task.out[i].iov_base + have, 0, task.out[i].iov_len - have);
        sent += (uint32_t)task.out[i].iov_len;
        used += have;
    }
    FUZZ_MUST(sent == task.out_bytes);
    vrep_scsi_submit(&task);
    while (!done) {
        vrep_group_poll(group);
        vrep_scsi_poll(target);
    }
    FUZZ_MUST(vrep_group_status(group, &after) == VREP_OK);
    FUZZ_MUST(status == VREP_SCSI_GOOD || status == VREP_SCSI_CHECK_CONDITION ||
              after.writes + after.zeroes == before.writes + before.zeroes);
    /* A reservation of one nexus stopped the other. */
    FUZZ_CANARY(task.cdb[0] == 0x28 && status == VREP_SCSI_RESERVATION_CONFLICT);
    return used;
}

static void reset_done(struct vrep_scsi_management *management)
{
    FUZZ_MUST(management->response == VREP_SCSI_COMPLETE);
    done = true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (group == NULL) {
        vrep_log_set_level(VREP_LOG_ERROR);
        open_all();
    }
    for (int i = 0; i < TASKS_MAX && size >= HEAD; i++) {
        size_t used = run(data, size);
        data += used;
        size -= used;
    }
    /* The next input begins where this one began: new nexuses, modes as they were. */
    struct vrep_scsi_management reset = {
        .nexus = nexus[0], .function = VREP_SCSI_UNIT_RESET, .done = reset_done};
    done = false;
    vrep_scsi_manage(&reset);
    FUZZ_MUST(done);
    for (int i = 0; i < 2; i++) {
        vrep_scsi_nexus_close(nexus[i]);
        open_nexus(i);
    }
    FUZZ_MUST(vrep_scsi_idle(target));
    return 0;
}
