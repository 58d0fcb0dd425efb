#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/shared.h"
#include "base/status.h"
#include "ring/private.h"
#include "ring/region.h"
#include "ring/ring.h"

/* Without an eventfd head is looked at this often. */
enum { POLL_NS = 200 * 1000 };

struct vrep_ring_reader {
    struct vrep_shared shared; /* empty when the mapping is the producer's */
    struct vrep_ring_region region;
    struct vrep_ring_control *control; /* NULL: nobody knows of this reader */
    bool control_mapped;               /* by us */
    int data_fd, space_fd;
    uint32_t ticket;
};

static int map_control(int fd, struct vrep_ring_control **out)
{
    struct stat info;
    if (fstat(fd, &info) != 0)
        return vrep_status_from_errno(errno);
    if (info.st_size < (off_t)sizeof(struct vrep_ring_control))
        return VREP_E_CORRUPT;
    void *at =
        mmap(NULL, sizeof(struct vrep_ring_control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        return vrep_status_from_errno(errno);
    struct vrep_ring_control *control = at;
    int status = control->magic != VREP_CONTROL_MAGIC       ? VREP_E_CORRUPT
                 : control->version != VREP_CONTROL_VERSION ? VREP_E_VERSION
                                                            : VREP_OK;
    if (status != VREP_OK) {
        munmap(at, sizeof *control);
        return status;
    }
    *out = control;
    return VREP_OK;
}

static int copy_fd(int fd, int *out)
{
    *out = -1;
    if (fd < 0)
        return VREP_OK;
    *out = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return *out < 0 ? vrep_status_from_errno(errno) : VREP_OK;
}

static int attach_control(struct vrep_ring_reader *reader, int control_fd, int data_fd,
                          int space_fd)
{
    int status = copy_fd(data_fd, &reader->data_fd);
    if (status == VREP_OK)
        status = copy_fd(space_fd, &reader->space_fd);
    if (status == VREP_OK && control_fd >= 0) {
        status = map_control(control_fd, &reader->control);
        reader->control_mapped = reader->control != NULL;
    }
    if (status == VREP_OK && reader->control != NULL) {
        vrep_store_relaxed_u64(&reader->control->pid, (uint64_t)getpid());
        /* A consumer that took over the control file goes on from its predecessor's ticket. */
        reader->ticket = vrep_load_relaxed_u32(&reader->control->waiting);
    }
    return status;
}

static struct vrep_ring_reader *new_reader(void)
{
    struct vrep_ring_reader *reader = calloc(1, sizeof *reader);
    if (reader != NULL)
        reader->data_fd = reader->space_fd = reader->shared.fd = -1;
    return reader;
}

int vrep_ring_reader_open(const char *ring_path, int control_fd, int data_fd, int space_fd,
                          struct vrep_ring_reader **out)
{
    struct vrep_ring_reader *reader = new_reader();
    if (reader == NULL)
        return VREP_E_NOMEM;
    int status = vrep_shared_open(ring_path, sizeof(struct vrep_ring_header), &reader->shared);
    if (status == VREP_OK)
        status = vrep_ring_region_find(reader->shared.base, reader->shared.bytes, &reader->region);
    if (status == VREP_OK)
        status = attach_control(reader, control_fd, data_fd, space_fd);
    if (status != VREP_OK) {
        vrep_ring_reader_close(reader);
        return status;
    }
    *out = reader;
    return VREP_OK;
}

int vrep_ring_reader_within(struct vrep_ring *ring, struct vrep_ring_consumer *consumer,
                            struct vrep_ring_reader **out)
{
    struct vrep_ring_reader *reader = new_reader();
    int status = VREP_OK;
    if (reader == NULL)
        return VREP_E_NOMEM;
    reader->region = *vrep_ring_region(ring);
    if (consumer != NULL) {
        struct vrep_ring_control *control = (void *)(uintptr_t)consumer->control;
        if (mprotect(control, sizeof *control, PROT_READ | PROT_WRITE) != 0)
            status = vrep_status_from_errno(errno);
        else
            reader->control = control;
        if (status == VREP_OK)
            status = attach_control(reader, -1, consumer->peer_fd, consumer->space_fd);
    }
    if (status != VREP_OK) {
        vrep_ring_reader_close(reader);
        return status;
    }
    *out = reader;
    return VREP_OK;
}

void vrep_ring_reader_close(struct vrep_ring_reader *reader)
{
    if (reader == NULL)
        return;
    if (reader->control != NULL) {
        vrep_store_release_u32(&reader->control->waiting, 0);
        if (reader->control_mapped)
            munmap(reader->control, sizeof *reader->control);
    }
    if (reader->data_fd >= 0)
        close(reader->data_fd);
    if (reader->space_fd >= 0)
        close(reader->space_fd);
    vrep_shared_close(&reader->shared);
    free(reader);
}

const struct vrep_ring_header *vrep_ring_reader_header(const struct vrep_ring_reader *reader)
{
    return reader->region.header;
}

uint64_t vrep_ring_reader_head(const struct vrep_ring_reader *reader)
{
    return vrep_load_acquire_u64(&reader->region.header->head);
}

uint64_t vrep_ring_reader_released(const struct vrep_ring_reader *reader)
{
    return vrep_load_acquire_u64(&reader->region.header->released);
}

int vrep_ring_reader_free_bytes(const struct vrep_ring_reader *reader, uint64_t *out)
{
    uint64_t told = vrep_load_relaxed_u64(&reader->region.header->free_bytes_one);
    if (told == 0)
        return VREP_E_UNSUPPORTED;
    *out = told - 1;
    return VREP_OK;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void pause_for(int64_t left_ns)
{
    struct timespec pause = {.tv_nsec = left_ns < POLL_NS ? left_ns : POLL_NS};
    nanosleep(&pause, NULL);
}

/* Sleeps until the producer signals, at most left_ns. */
static int sleep_signalled(struct vrep_ring_reader *reader, uint64_t seq, int64_t left_ns)
{
    /* A new value each time: the producer answers each value once. */
    reader->ticket = reader->ticket + 1 != 0 ? reader->ticket + 1 : 1;
    vrep_store_relaxed_u32(&reader->control->waiting, reader->ticket);
    vrep_fence_full(); /* the other half stands in vrep_ring_consumer_notify */
    int status = VREP_OK;
    if (vrep_ring_reader_head(reader) <= seq) {
        struct pollfd event = {.fd = reader->data_fd, .events = POLLIN};
        struct timespec left = {.tv_sec = left_ns / 1000000000, .tv_nsec = left_ns % 1000000000};
        int ready = ppoll(&event, 1, &left, NULL);
        uint64_t word;
        ssize_t got = ready > 0 ? read(reader->data_fd, &word, sizeof word) : (ssize_t)sizeof word;
        if (ready < 0 && errno != EINTR)
            status = vrep_status_from_errno(errno);
        else if (ready < 0)
            status = VREP_E_TIMEOUT; /* a signal: the caller may want to handle it */
        else if (got < 0 && errno != EAGAIN && errno != EINTR)
            status = vrep_status_from_errno(errno);
        else if (got == 0) /* the producer is gone: its last records may still be read */
            pause_for(left_ns);
    }
    vrep_store_release_u32(&reader->control->waiting, 0);
    return status;
}

int vrep_ring_reader_wait(struct vrep_ring_reader *reader, uint64_t seq, int timeout_ms)
{
    int64_t until = now_ns() + (int64_t)timeout_ms * 1000000;
    for (;;) {
        if (vrep_ring_reader_head(reader) > seq)
            return VREP_OK;
        int64_t left = until - now_ns();
        if (left <= 0)
            return VREP_E_AGAIN;
        if (reader->control != NULL && reader->data_fd >= 0) {
            int status = sleep_signalled(reader, seq, left);
            if (status == VREP_E_TIMEOUT)
                return vrep_ring_reader_head(reader) > seq ? VREP_OK : VREP_E_AGAIN;
            if (status != VREP_OK)
                return status;
        } else {
            pause_for(left);
        }
    }
}

int vrep_ring_reader_desc(const struct vrep_ring_reader *reader, uint64_t seq,
                          struct vrep_ring_desc *out)
{
    const struct vrep_ring_region *region = &reader->region;
    if (seq > vrep_ring_reader_head(reader) || seq <= vrep_ring_reader_released(reader))
        return VREP_E_RANGE;
    vrep_ring_desc_load(&region->descs[seq & (region->descs_count - 1)], out);
    if (!vrep_ring_reader_still(reader, seq))
        return VREP_E_RANGE;
    return out->seq == seq ? VREP_OK : VREP_E_CORRUPT;
}

int vrep_ring_reader_run(const struct vrep_ring_reader *reader, uint64_t from, uint64_t to,
                         const struct vrep_ring_desc **at, uint32_t *n)
{
    const struct vrep_ring_region *region = &reader->region;
    if (from == 0 || from > to || to > vrep_ring_reader_head(reader) ||
        from <= vrep_ring_reader_released(reader))
        return VREP_E_RANGE;
    uint64_t first = from & (region->descs_count - 1), count = to - from + 1;
    *at = &region->descs[first];
    *n = (uint32_t)(count < region->descs_count - first ? count : region->descs_count - first);
    return VREP_OK;
}

int vrep_ring_reader_iov(const struct vrep_ring_reader *reader, const struct vrep_ring_desc *desc,
                         struct iovec *iov, int max, int *n)
{
    uint64_t length = desc->chunk == VREP_NO_CHUNK ? 0 : desc->length;
    int status =
        vrep_ring_region_iov(&reader->region, desc->chunk, desc->chunks, 0, length, iov, max, n);
    return status == VREP_E_RANGE ? VREP_E_CORRUPT : status;
}

bool vrep_ring_reader_still(const struct vrep_ring_reader *reader, uint64_t seq)
{
    /* The copy is made; released moves before anything below it is used again. */
    vrep_fence_acquire();
    return vrep_load_relaxed_u64(&reader->region.header->released) < seq;
}

static bool raise(uint64_t *at, uint64_t value)
{
    if (value <= vrep_load_relaxed_u64(at))
        return false;
    vrep_store_release_u64(at, value);
    return true;
}

void vrep_ring_reader_set(struct vrep_ring_reader *reader, uint64_t read, uint64_t received,
                          uint64_t durable, uint64_t spilled)
{
    if (reader->control == NULL)
        return;
    bool moved = raise(&reader->control->read, read);
    moved = raise(&reader->control->received, received) || moved;
    moved = raise(&reader->control->durable, durable) || moved;
    moved = raise(&reader->control->spilled, spilled) || moved;
    uint64_t one = 1;
    if (!moved || reader->space_fd < 0)
        return;
    /* Can fail only when the counter is full: then the filter wakes anyway. */
    ssize_t written = write(reader->space_fd, &one, sizeof one);
    (void)written;
}
