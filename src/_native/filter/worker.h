/* Worker: a thread that does for a group what may block: syncs of write-intent
 * and state, checkpoints, extent look-ups.
 *
 * The group's thread posts a job that it owns and is told by an eventfd; it
 * then collects finished jobs and their done() runs there.  Jobs of a worker
 * run one at a time, in order.  Threading: post and collect by one owner.
 */
#ifndef VREP_FILTER_WORKER_H
#define VREP_FILTER_WORKER_H

#include <stdbool.h>
#include <stdint.h>

struct vrep_job {
    int (*run)(struct vrep_job *job);   /* on the worker; its value becomes status */
    void (*done)(struct vrep_job *job); /* on the owner */
    void *owner;
    int status;
    bool busy; /* posted, done not yet called */
    struct vrep_job *next;
};

struct vrep_worker;
/* notify_fd: an eventfd of the owner, written when a job finished. */
int vrep_worker_create(int notify_fd, struct vrep_worker **out);
/* Without a thread, for simulators: a job waits until vrep_worker_step runs it. */
int vrep_worker_create_stepped(struct vrep_worker **out);
/* The next job, NULL when none is posted or the worker has a thread. */
const struct vrep_job *vrep_worker_waiting(const struct vrep_worker *worker);
void vrep_worker_step(struct vrep_worker *worker);
/* Finishes what was posted, but for a stepped one, then ends the thread; done() of what was not
 * collected is not called. */
void vrep_worker_destroy(struct vrep_worker *worker);
/* The job must not be busy. */
void vrep_worker_post(struct vrep_worker *worker, struct vrep_job *job);
/* Calls done() of every finished job; returns how many. One load when there is none. */
uint32_t vrep_worker_collect(struct vrep_worker *worker);

#endif
