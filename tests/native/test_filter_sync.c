/* A FUA whose sync fails: the kernel tells of the loss once, so it stands for the next flush. */
#include <errno.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "base/atomic.h"
#include "check.h"
#include "filter_rig.h"

static uint32_t failing;
static struct rig rig;

/* Instead of libc's: a write with RWF_DSYNC arrives, and its sync fails. */
ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
    bool sync = (flags & RWF_DSYNC) != 0 && vrep_load_acquire_u32(&failing) != 0;
    ssize_t n = syscall(SYS_pwritev2, fd, iov, count, (long)offset, 0L, sync ? 0 : flags);
    if (!sync || n < 0)
        return n;
    errno = EIO;
    return -1;
}

static void a_failed_fua_stands_for_the_next_flush(void)
{
    rig_init(&rig);
    rig_open(&rig);
    rig_sync(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_WRITE, 0, 65536, 65536, 1));
    CHECK_OK(vrep_group_resync(rig.group, false, 0, false));
    vrep_store_release_u32(&failing, 1);
    CHECK_STATUS(rig_run(&rig, VREP_OP_WRITE, VREP_COMMAND_FUA, 262144, 4096, 2), VREP_E_IO);
    vrep_store_release_u32(&failing, 0);
    struct vrep_group_status status = rig_status(&rig);
    CHECK_EQ(status.flush_failed, 1);
    CHECK_EQ(status.gap, 1);
    CHECK(status.unshipped_bytes > 0);
    /* The storage is well again, but what it lost may be any write before. */
    CHECK_STATUS(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0), VREP_E_IO);
    CHECK_OK(vrep_group_resync(rig.group, true, 0, false));
    rig_settle(&rig);
    CHECK_OK(rig_run(&rig, VREP_OP_FLUSH, 0, 0, 0, 0));
    rig_compare(&rig);
    rig_free(&rig);
}

int main(void)
{
    RUN(a_failed_fua_stands_for_the_next_flush);
    return check_report();
}
