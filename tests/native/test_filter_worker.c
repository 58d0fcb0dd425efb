/* Jobs run in order on the worker; their ends are seen on the owner's thread, once each. */
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "check.h"
#include "filter/worker.h"

enum { JOBS = 500 };
static int order[JOBS], ran, ended;
static pthread_t owner;

struct work {
    struct vrep_job job; /* first */
    int number;
};

static int run(struct vrep_job *job)
{
    CHECK(!pthread_equal(pthread_self(), owner));
    order[ran++] = ((struct work *)job)->number;
    return ((struct work *)job)->number % 3 == 0 ? VREP_E_IO : VREP_OK;
}

static void end(struct vrep_job *job)
{
    CHECK(pthread_equal(pthread_self(), owner));
    CHECK(!job->busy);
    CHECK_EQ(job->status, ((struct work *)job)->number % 3 == 0 ? VREP_E_IO : VREP_OK);
    ended++;
}

static void jobs_run_in_order(void)
{
    static struct work work[JOBS];
    owner = pthread_self();
    int notify = eventfd(0, EFD_NONBLOCK);
    struct vrep_worker *worker;
    CHECK_OK(vrep_worker_create(notify, &worker));
    CHECK_EQ(vrep_worker_collect(worker), 0);
    for (int i = 0; i < JOBS; i++) {
        work[i] = (struct work){.job = {.run = run, .done = end}, .number = i};
        vrep_worker_post(worker, &work[i].job);
    }
    while (ended < JOBS) {
        vrep_worker_collect(worker);
        usleep(100);
    }
    for (int i = 0; i < JOBS; i++)
        CHECK_EQ(order[i], i);
    uint64_t signals;
    CHECK(read(notify, &signals, sizeof signals) == sizeof signals);
    CHECK_EQ(signals, JOBS);
    /* What was posted runs before the thread ends, though nobody collects it. */
    ran = 0;
    vrep_worker_post(worker, &work[1].job);
    vrep_worker_destroy(worker);
    CHECK_EQ(ran, 1);
    CHECK_EQ(ended, JOBS);
    close(notify);
}

int main(void)
{
    RUN(jobs_run_in_order);
    return check_report();
}
