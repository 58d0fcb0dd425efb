#include "filter/worker.h"

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/status.h"

struct vrep_worker {
    pthread_mutex_t lock; /* held for list operations only */
    pthread_cond_t wake;
    struct vrep_job *first, **last; /* posted */
    struct vrep_job *finished, **finished_last;
    uint32_t finished_count; /* atomic: lets collect look without the lock */
    bool stop;
    bool stepped;
    int notify_fd;
    pthread_t thread;
};

/* Runs the first job, if there is one, with the lock let go of meanwhile. */
static bool run_first(struct vrep_worker *worker)
{
    struct vrep_job *job = worker->first;
    if (job == NULL)
        return false;
    worker->first = job->next;
    if (worker->first == NULL)
        worker->last = &worker->first;
    pthread_mutex_unlock(&worker->lock);
    job->status = job->run(job);
    pthread_mutex_lock(&worker->lock);
    job->next = NULL;
    *worker->finished_last = job;
    worker->finished_last = &job->next;
    vrep_fetch_add_u32(&worker->finished_count, 1);
    return true;
}

static void *work(void *argument)
{
    struct vrep_worker *worker = argument;
    pthread_mutex_lock(&worker->lock);
    for (;;) {
        while (worker->first == NULL && !worker->stop)
            pthread_cond_wait(&worker->wake, &worker->lock);
        if (!run_first(worker))
            break;
        pthread_mutex_unlock(&worker->lock);
        uint64_t one = 1;
        /* The counter cannot overflow, and the flag above is what collect reads. */
        ssize_t told = write(worker->notify_fd, &one, sizeof one);
        (void)told;
        pthread_mutex_lock(&worker->lock);
    }
    pthread_mutex_unlock(&worker->lock);
    return NULL;
}

static struct vrep_worker *create(int notify_fd)
{
    struct vrep_worker *worker = calloc(1, sizeof *worker);
    if (worker == NULL)
        return NULL;
    worker->last = &worker->first;
    worker->finished_last = &worker->finished;
    worker->notify_fd = notify_fd;
    pthread_mutex_init(&worker->lock, NULL);
    pthread_cond_init(&worker->wake, NULL);
    return worker;
}

int vrep_worker_create_stepped(struct vrep_worker **out)
{
    *out = create(-1);
    if (*out == NULL)
        return VREP_E_NOMEM;
    (*out)->stepped = true;
    return VREP_OK;
}

const struct vrep_job *vrep_worker_waiting(const struct vrep_worker *worker)
{
    return worker->stepped ? worker->first : NULL;
}

void vrep_worker_step(struct vrep_worker *worker)
{
    pthread_mutex_lock(&worker->lock);
    if (worker->stepped)
        (void)run_first(worker);
    pthread_mutex_unlock(&worker->lock);
}

int vrep_worker_create(int notify_fd, struct vrep_worker **out)
{
    struct vrep_worker *worker = create(notify_fd);
    if (worker == NULL)
        return VREP_E_NOMEM;
    /* Signals belong to the process's main thread. */
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    int error = pthread_create(&worker->thread, NULL, work, worker);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (error != 0) {
        pthread_cond_destroy(&worker->wake);
        pthread_mutex_destroy(&worker->lock);
        free(worker);
        return vrep_status_from_errno(error);
    }
    *out = worker;
    return VREP_OK;
}

void vrep_worker_destroy(struct vrep_worker *worker)
{
    if (worker == NULL)
        return;
    pthread_mutex_lock(&worker->lock);
    worker->stop = true;
    pthread_cond_signal(&worker->wake);
    pthread_mutex_unlock(&worker->lock);
    if (!worker->stepped)
        pthread_join(worker->thread, NULL);
    pthread_cond_destroy(&worker->wake);
    pthread_mutex_destroy(&worker->lock);
    free(worker);
}

void vrep_worker_post(struct vrep_worker *worker, struct vrep_job *job)
{
    job->busy = true;
    job->next = NULL;
    pthread_mutex_lock(&worker->lock);
    *worker->last = job;
    worker->last = &job->next;
    pthread_mutex_unlock(&worker->lock);
    pthread_cond_signal(&worker->wake); /* who wakes up finds the lock free */
}

uint32_t vrep_worker_collect(struct vrep_worker *worker)
{
    if (vrep_load_acquire_u32(&worker->finished_count) == 0)
        return 0;
    pthread_mutex_lock(&worker->lock);
    struct vrep_job *job = worker->finished;
    worker->finished = NULL;
    worker->finished_last = &worker->finished;
    vrep_store_release_u32(&worker->finished_count, 0);
    pthread_mutex_unlock(&worker->lock);
    uint32_t count = 0;
    while (job != NULL) {
        struct vrep_job *next = job->next;
        job->busy = false;
        job->done(job);
        job = next;
        count++;
    }
    return count;
}
