#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/status.h"
#include "ring/ring.h"

static int make_control(const struct vrep_ring_control *initial, int *out)
{
    int fd = memfd_create("vrep-control", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return vrep_status_from_errno(errno);
    /* The size is fixed before anyone else has the file, so that no access to the mapping can fail.
     */
    if (pwrite(fd, initial, sizeof *initial, 0) != (ssize_t)sizeof *initial ||
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        int error = errno;
        close(fd);
        return vrep_status_from_errno(error);
    }
    *out = fd;
    return VREP_OK;
}

int vrep_ring_consumer_create(uint32_t role, const uint8_t target_id[16], uint64_t durable,
                              uint64_t spilled, struct vrep_ring_consumer *out)
{
    if (role != VREP_CONTROL_OBSERVER && role != VREP_CONTROL_TARGET)
        return VREP_E_INVALID;
    struct vrep_ring_control initial = {
        .magic = VREP_CONTROL_MAGIC,
        .version = VREP_CONTROL_VERSION,
        .role = role,
        .durable = durable,
        .received = durable,
        .read = durable,
        .spilled = spilled,
    };
    if (target_id != NULL)
        memcpy(initial.target_id, target_id, sizeof initial.target_id);
    *out = (struct vrep_ring_consumer){.control_fd = -1,
                                       .data_fd = -1,
                                       .peer_fd = -1,
                                       .space_fd = -1,
                                       .durable = durable,
                                       .received = durable,
                                       .read = durable,
                                       .spilled = spilled,
                                       .role = role};
    int status = make_control(&initial, &out->control_fd);
    if (status != VREP_OK)
        return status;
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) == 0) {
        out->data_fd = pair[0];
        out->peer_fd = pair[1];
    }
    out->space_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    void *control = mmap(NULL, sizeof initial, PROT_READ, MAP_SHARED, out->control_fd, 0);
    if (control != MAP_FAILED)
        out->control = control;
    if (out->control == NULL || out->data_fd < 0 || out->space_fd < 0) {
        status = vrep_status_from_errno(errno);
        vrep_ring_consumer_close(out);
    }
    return status;
}

void vrep_ring_consumer_close(struct vrep_ring_consumer *consumer)
{
    if (consumer->control != NULL)
        munmap((void *)(uintptr_t)consumer->control, sizeof *consumer->control);
    int fds[] = {consumer->control_fd, consumer->data_fd, consumer->peer_fd, consumer->space_fd};
    for (int i = 0; i < 4; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    *consumer =
        (struct vrep_ring_consumer){.control_fd = -1, .data_fd = -1, .peer_fd = -1, .space_fd = -1};
}

static bool believable(uint64_t value, uint64_t before, uint64_t head)
{
    return value >= before && value <= head;
}

int vrep_ring_consumer_poll(const struct vrep_ring *ring, struct vrep_ring_consumer *consumer)
{
    /* Copied once: what is checked is what is used, whatever the consumer writes meanwhile. */
    uint64_t durable = vrep_load_acquire_u64(&consumer->control->durable);
    uint64_t received = vrep_load_acquire_u64(&consumer->control->received);
    uint64_t read = vrep_load_acquire_u64(&consumer->control->read);
    uint64_t spilled = vrep_load_acquire_u64(&consumer->control->spilled);
    uint64_t head = vrep_ring_head(ring);
    if (!believable(durable, consumer->durable, head) ||
        !believable(received, consumer->received, head) ||
        !believable(read, consumer->read, head) || !believable(spilled, consumer->spilled, head))
        return VREP_E_INVALID;
    consumer->durable = durable;
    consumer->received = received;
    consumer->read = read;
    consumer->spilled = spilled;
    return VREP_OK;
}

void vrep_ring_consumer_notify(const struct vrep_ring *ring, struct vrep_ring_consumer *consumer)
{
    (void)ring;
    /* head was stored before; the consumer stores `waiting`, then looks at head. With a full fence
     * on both sides one of the two sees the other. */
    vrep_fence_full();
    uint32_t waiting = vrep_load_relaxed_u32(&consumer->control->waiting);
    if (waiting == 0 || waiting == consumer->signalled)
        return;
    consumer->signalled = waiting;
    uint64_t one = 1;
    /* Never waits, whatever the consumer did to its end. It fails when that is full, so that the
     * consumer wakes, or gone. */
    ssize_t sent = send(consumer->data_fd, &one, sizeof one, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)sent;
}
