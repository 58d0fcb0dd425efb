/* Loop: the one thread of a group: its sockets, its connections, its commands.
 *
 * A thread waits with epoll on listening sockets, connections and the group's
 * own fd, and works in turns: the events of the turn, the group's completions,
 * then every front-end once (which sends what it gathered), then one wake-up of
 * the group's consumers.  A front-end knows its protocol; the loop knows none.
 *
 * Limits: a front-end for each disk and one for all, 64 events a turn.  Threading: create, start,
 * stop and destroy belong to one outside thread; everything else runs on the loop's thread (watch,
 * change and forget also before start and after stop).
 */
#ifndef VREP_SERVE_LOOP_H
#define VREP_SERVE_LOOP_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/epoll.h>

#include "filter/group.h"

struct vrep_loop;

/* One fd, embedded in what owns it.  It may be told of an event after it was forgotten in the same
 * turn, so its memory lives as long as the loop, and ready looks at fd first. */
struct vrep_watch {
    int fd; /* -1: none */
    void (*ready)(struct vrep_watch *watch, uint32_t events);
};

struct vrep_front {
    /* Ends a turn; true: there is more to do without waiting for an event. */
    bool (*turn)(struct vrep_front *front);
    /* Commands or payload memory of the group are free again. */
    void (*wakeup)(struct vrep_front *front);
    /* No new work from here; drain: answer what was submitted first, else cut at once. */
    void (*stop)(struct vrep_front *front, bool drain);
    /* True when nothing of it is in flight any more, and after stop every reply is sent. */
    bool (*idle)(const struct vrep_front *front);
    uint32_t requests; /* that came in the last turn: set by turn */
};

int vrep_loop_create(struct vrep_group *group, struct vrep_loop **out);
/* FULL: too many. */
int vrep_loop_add_front(struct vrep_loop *loop, struct vrep_front *front);
int vrep_loop_watch(struct vrep_loop *loop, struct vrep_watch *watch, uint32_t events);
int vrep_loop_change(struct vrep_loop *loop, struct vrep_watch *watch, uint32_t events);
/* Before the fd is closed. */
void vrep_loop_forget(struct vrep_loop *loop, struct vrep_watch *watch);
struct vrep_group *vrep_loop_group(struct vrep_loop *loop);

/* BUSY: it runs already. */
int vrep_loop_start(struct vrep_loop *loop);
/* Stops the front-ends, waits until they are idle, ends the thread.  TIMEOUT: something was still
 * in flight after timeout_ms; the thread has ended all the same, and nothing may be destroyed
 * before the group was closed. */
int vrep_loop_stop(struct vrep_loop *loop, bool drain, uint32_t timeout_ms);
/* After stop, or before start. */
void vrep_loop_destroy(struct vrep_loop *loop);

#endif
