#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status.h"
#include "disk/internal.h"

#define THREADS_MAX 64u
#define BOUNCE_BYTES (1u << 20) /* a multiple of every logical block size */
#define BOUNCE_ALIGN (64u << 10)
#define STEP_BYTES (64u << 10)
#define RING_ENTRIES 256u
#define RING_INFLIGHT_MAX (2 * RING_ENTRIES) /* as many completions have room */

struct vrep_engine {
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct vrep_io_list queue, done; /* under lock */
    bool stop;
    bool stepped; /* no threads: `queue` waits for vrep_engine_step */
    void *bounce; /* of a stepped one */
    int event_fd;
    uint32_t threads, started; /* started: under lock, numbers the threads */
    pthread_t thread[THREADS_MAX];

    /* owner thread only */
    uint32_t pool_inflight;
    struct io_uring ring;
    bool ring_ready, ring_refused;
    uint32_t ring_inflight;
};

static void list_push(struct vrep_io_list *list, struct vrep_io *io)
{
    io->next = NULL;
    if (list->last != NULL)
        list->last->next = io;
    else
        list->first = io;
    list->last = io;
}

static struct vrep_io *list_pop(struct vrep_io_list *list)
{
    struct vrep_io *io = list->first;
    if (io != NULL) {
        list->first = io->next;
        if (list->first == NULL)
            list->last = NULL;
    }
    return io;
}

static void signal_event(struct vrep_engine *engine)
{
    uint64_t one = 1;
    ssize_t n;
    do
        n = write(engine->event_fd, &one, sizeof one);
    while (n < 0 && errno == EINTR); /* EAGAIN: the counter is full, so it is readable already */
}

/* Page-cached writes of one file exclude each other in the kernel (the lock of the inode), so a
 * second thread would only be woken to wait: they are done by one thread, in their order. Not what
 * syncs, which waits for the disk outside of that lock. */
static bool takes_turns(const struct vrep_io *io)
{
    const struct vrep_disk *disk = io->disk;
    return io->op == VREP_IO_WRITE && (io->flags & VREP_IO_FUA) == 0 && !disk->direct &&
           disk->remote == NULL && !vrep_engine_is_stepped(disk->engine);
}

/* Under the lock. What a thread that has run `io` does next, NULL: what the queue holds. */
static struct vrep_io *next_write(const struct vrep_io *io)
{
    struct vrep_io *next;
    if (!takes_turns(io))
        return NULL;
    next = list_pop(&io->disk->writes);
    io->disk->writing = next != NULL;
    return next;
}

static void *worker(void *argument)
{
    struct vrep_engine *engine = argument;
    void *bounce = NULL;
    if (posix_memalign(&bounce, BOUNCE_ALIGN, BOUNCE_BYTES) != 0)
        bounce = NULL; /* requests that need it fail with NOMEM */
    pthread_mutex_lock(&engine->lock);
    uint32_t number = engine->started++;
    struct vrep_io *next = NULL;
    for (;;) {
        struct vrep_io *io = next != NULL ? next : list_pop(&engine->queue);
        if (io == NULL) {
            if (engine->stop)
                break;
            pthread_cond_wait(&engine->work, &engine->lock);
            continue;
        }
        pthread_mutex_unlock(&engine->lock);
        vrep_disk_run(io, number, bounce, bounce != NULL ? BOUNCE_BYTES : 0);
        pthread_mutex_lock(&engine->lock);
        bool first = engine->done.first == NULL;
        next = next_write(io); /* whose owner may free it as soon as it is done */
        list_push(&engine->done, io);
        if (first) {
            pthread_mutex_unlock(&engine->lock);
            signal_event(engine);
            pthread_mutex_lock(&engine->lock);
        }
    }
    pthread_mutex_unlock(&engine->lock);
    free(bounce);
    return NULL;
}

static int create(struct vrep_engine **out)
{
    struct vrep_engine *engine = calloc(1, sizeof *engine);
    if (engine == NULL)
        return VREP_E_NOMEM;
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->work, NULL);
    engine->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (engine->event_fd < 0) {
        int status = vrep_status_from_errno(errno);
        pthread_cond_destroy(&engine->work);
        pthread_mutex_destroy(&engine->lock);
        free(engine);
        return status;
    }
    *out = engine;
    return VREP_OK;
}

int vrep_engine_create(uint32_t threads, struct vrep_engine **out)
{
    if (threads == 0 || threads > THREADS_MAX)
        return VREP_E_INVALID;
    struct vrep_engine *engine;
    int status = create(&engine);
    if (status != VREP_OK)
        return status;
    /* Without io_uring (an old kernel, a seccomp profile) the pool does its work. */
    if (io_uring_queue_init(RING_ENTRIES, &engine->ring, 0) == 0) {
        engine->ring_ready = true;
        if (io_uring_register_eventfd(&engine->ring, engine->event_fd) != 0) {
            io_uring_queue_exit(&engine->ring);
            engine->ring_ready = false;
        }
    }
    for (; engine->threads < threads; engine->threads++) {
        if (pthread_create(&engine->thread[engine->threads], NULL, worker, engine) != 0) {
            vrep_engine_destroy(engine);
            return VREP_E_NOMEM;
        }
    }
    *out = engine;
    return VREP_OK;
}

int vrep_engine_create_stepped(struct vrep_engine **out)
{
    int status = create(out);
    if (status != VREP_OK)
        return status;
    (*out)->stepped = true;
    if (posix_memalign(&(*out)->bounce, BOUNCE_ALIGN, STEP_BYTES) != 0) {
        (*out)->bounce = NULL;
        vrep_engine_destroy(*out);
        return VREP_E_NOMEM;
    }
    return VREP_OK;
}

void vrep_engine_wait(struct vrep_engine *engine, int timeout_ms)
{
    while (engine->stepped && engine->queue.first != NULL)
        vrep_engine_step(engine, 0);
    if (!engine->stepped) {
        struct pollfd event = {.fd = engine->event_fd, .events = POLLIN};
        (void)poll(&event, 1, timeout_ms); /* a failure, EINTR, only makes the loop turn */
    }
    vrep_engine_reap(engine);
}

void vrep_engine_destroy(struct vrep_engine *engine)
{
    if (engine == NULL)
        return;
    /* Completions may submit again: until nothing is left. */
    while (engine->ring_inflight > 0 || engine->pool_inflight > 0)
        vrep_engine_wait(engine, -1);
    pthread_mutex_lock(&engine->lock);
    engine->stop = true;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    for (uint32_t i = 0; i < engine->threads; i++)
        pthread_join(engine->thread[i], NULL);
    if (engine->ring_ready)
        io_uring_queue_exit(&engine->ring);
    close(engine->event_fd);
    pthread_cond_destroy(&engine->work);
    pthread_mutex_destroy(&engine->lock);
    free(engine->bounce);
    free(engine);
}

uint32_t vrep_engine_threads(const struct vrep_engine *engine)
{
    return engine->stepped ? 1 : engine->threads;
}

bool vrep_engine_is_stepped(const struct vrep_engine *engine)
{
    return engine->stepped;
}

int vrep_engine_fd(const struct vrep_engine *engine)
{
    return engine->event_fd;
}

void vrep_engine_queue(struct vrep_engine *engine, struct vrep_io *io)
{
    engine->pool_inflight++;
    pthread_mutex_lock(&engine->lock);
    bool waits = takes_turns(io) && io->disk->writing;
    if (takes_turns(io))
        io->disk->writing = true;
    list_push(waits ? &io->disk->writes : &engine->queue, io);
    pthread_mutex_unlock(&engine->lock);
    /* Who wakes up finds the lock free. */
    if (!waits)
        pthread_cond_signal(&engine->work);
}

/* ---- stepped -------------------------------------------------------------- */

const struct vrep_io *vrep_engine_waiting(const struct vrep_engine *engine, uint32_t index)
{
    const struct vrep_io *io = engine->stepped ? engine->queue.first : NULL;
    while (io != NULL && index-- > 0)
        io = io->next;
    return io;
}

static struct vrep_io *take(struct vrep_io_list *list, uint32_t index)
{
    struct vrep_io *before = NULL, *io = list->first;
    for (; io != NULL && index > 0; index--) {
        before = io;
        io = io->next;
    }
    if (io == NULL)
        return NULL;
    if (before != NULL)
        before->next = io->next;
    else
        list->first = io->next;
    if (list->last == io)
        list->last = before;
    return io;
}

void vrep_engine_step(struct vrep_engine *engine, uint32_t index)
{
    struct vrep_io *io = engine->stepped ? take(&engine->queue, index) : NULL;
    if (io == NULL)
        return;
    vrep_disk_run(io, 0, engine->bounce, STEP_BYTES);
    list_push(&engine->done, io);
}

void vrep_engine_step_failing(struct vrep_engine *engine, uint32_t index, int os_error)
{
    struct vrep_io *io = engine->stepped ? take(&engine->queue, index) : NULL;
    if (io == NULL)
        return;
    io->sync_failed = io->op == VREP_IO_FLUSH || (io->flags & VREP_IO_FUA) != 0;
    vrep_io_fail(io, os_error);
    list_push(&engine->done, io);
}

void vrep_engine_forget(struct vrep_engine *engine)
{
    while (engine->stepped && list_pop(&engine->queue) != NULL)
        engine->pool_inflight--;
}

bool vrep_engine_ring(struct vrep_engine *engine, struct vrep_io *io)
{
    if (!engine->ring_ready || engine->ring_inflight >= RING_INFLIGHT_MAX)
        return false;
    struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring);
    if (sqe == NULL)
        return false;
    int fd = io->disk->fd;
    if (io->op == VREP_IO_READ)
        io_uring_prep_readv(sqe, fd, io->iov, (unsigned)io->iovcnt, io->offset);
    else
        io_uring_prep_writev(sqe, fd, io->iov, (unsigned)io->iovcnt, io->offset);
    io_uring_sqe_set_data(sqe, io);
    int submitted;
    do
        submitted = io_uring_submit(&engine->ring);
    while (submitted == -EINTR);
    /* The kernel takes entries in order: if any is left, this one is. It becomes a no-op that
     * goes out with a later one, and the pool does its work. */
    if (io_uring_sq_ready(&engine->ring) > 0) {
        if (!engine->ring_refused)
            VREP_WARN("disk", "io_uring took no request (%s), threads do what it refuses",
                      submitted < 0 ? strerror(-submitted) : "no room");
        engine->ring_refused = true;
        io_uring_prep_nop(sqe);
        io_uring_sqe_set_data(sqe, NULL);
        return false;
    }
    engine->ring_inflight++;
    return true;
}

static uint32_t reap_ring(struct vrep_engine *engine)
{
    uint32_t count = 0;
    struct io_uring_cqe *cqe;
    while (io_uring_peek_cqe(&engine->ring, &cqe) == 0) {
        struct vrep_io *io = io_uring_cqe_get_data(cqe);
        int result = cqe->res;
        io_uring_cqe_seen(&engine->ring, cqe);
        if (io == NULL) /* a no-op */
            continue;
        engine->ring_inflight--;
        if (result < 0 && result != -EAGAIN && result != -EINTR) {
            vrep_io_fail(io, -result);
        } else if ((uint64_t)(result < 0 ? 0 : result) == io->length) {
            io->status = VREP_OK; /* an overlay is never direct: it has no presence to mark */
        } else {
            vrep_engine_queue(engine, io); /* short: the whole again, by blocking calls */
            continue;
        }
        io->done(io);
        count++;
    }
    return count;
}

uint32_t vrep_engine_reap(struct vrep_engine *engine)
{
    uint64_t drained;
    while (read(engine->event_fd, &drained, sizeof drained) < 0 && errno == EINTR)
        ;
    uint32_t count = engine->ring_ready ? reap_ring(engine) : 0;
    pthread_mutex_lock(&engine->lock);
    struct vrep_io_list done = engine->done;
    engine->done = (struct vrep_io_list){NULL, NULL};
    pthread_mutex_unlock(&engine->lock);
    for (struct vrep_io *io = list_pop(&done); io != NULL; io = list_pop(&done)) {
        engine->pool_inflight--;
        io->done(io);
        count++;
    }
    return count;
}
