#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/log.h"
#include "base/status.h"
#include "serve/loop.h"

#define FRONTS_MAX (VREP_DISKS_MAX + 1u)
#define EVENTS_MAX 64
#define DEEP_TURNS 64u
#define YIELD_LONG_NS 500000u        /* more than a client takes to make its next requests */
#define YIELD_PAUSE_MIN_NS 16000000u /* without yielding, after one that was so long */
#define YIELD_PAUSE_MAX_NS 1024000000u

enum stop_kind { STOP_NO, STOP_DRAIN, STOP_CUT };

struct vrep_loop {
    struct vrep_group *group;
    struct vrep_watch group_watch, stop_watch;
    struct vrep_front *front[FRONTS_MAX];
    uint32_t fronts;
    int epoll_fd;
    bool group_ready;
    uint32_t deep_turns;     /* to come, in which requests are waited for */
    uint64_t yield_after_ns; /* not before */
    uint64_t yield_pause_ns;
    bool running; /* outside thread only */
    pthread_t thread;
    uint32_t stop; /* enum stop_kind, atomic */
    uint32_t stop_timeout_ms;
    int result; /* of the thread, read after join */
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t now_ms(void)
{
    return now_ns() / 1000000u;
}

#define OWNER_OF(watch, member)                                                                    \
    ((struct vrep_loop *)(void *)((char *)(watch)-offsetof(struct vrep_loop, member)))

static void group_ready(struct vrep_watch *watch, uint32_t events)
{
    (void)events;
    OWNER_OF(watch, group_watch)->group_ready = true;
}

static void stop_ready(struct vrep_watch *watch, uint32_t events)
{
    (void)events;
    uint64_t count;
    while (read(watch->fd, &count, sizeof count) < 0 && errno == EINTR)
        ;
}

static void group_wakeup(void *context)
{
    struct vrep_loop *loop = context;
    for (uint32_t i = 0; i < loop->fronts; i++)
        loop->front[i]->wakeup(loop->front[i]);
}

int vrep_loop_create(struct vrep_group *group, struct vrep_loop **out)
{
    struct vrep_loop *loop = calloc(1, sizeof *loop);
    if (loop == NULL)
        return VREP_E_NOMEM;
    loop->group = group;
    loop->yield_pause_ns = YIELD_PAUSE_MIN_NS;
    loop->stop_watch = (struct vrep_watch){eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), stop_ready};
    loop->group_watch = (struct vrep_watch){vrep_group_fd(group), group_ready};
    loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int status = VREP_OK;
    if (loop->stop_watch.fd < 0 || loop->epoll_fd < 0)
        status = vrep_status_from_errno(errno);
    if (status == VREP_OK)
        status = vrep_loop_watch(loop, &loop->stop_watch, EPOLLIN);
    if (status == VREP_OK)
        status = vrep_loop_watch(loop, &loop->group_watch, EPOLLIN);
    if (status != VREP_OK) {
        vrep_loop_destroy(loop);
        return status;
    }
    *out = loop;
    return VREP_OK;
}

void vrep_loop_destroy(struct vrep_loop *loop)
{
    if (loop == NULL)
        return;
    if (loop->stop_watch.fd >= 0)
        close(loop->stop_watch.fd);
    if (loop->epoll_fd >= 0)
        close(loop->epoll_fd);
    free(loop);
}

int vrep_loop_add_front(struct vrep_loop *loop, struct vrep_front *front)
{
    if (loop->fronts == FRONTS_MAX)
        return VREP_E_FULL;
    loop->front[loop->fronts++] = front;
    return VREP_OK;
}

static int control(struct vrep_loop *loop, int verb, struct vrep_watch *watch, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.ptr = watch};
    return epoll_ctl(loop->epoll_fd, verb, watch->fd, &event) == 0 ? VREP_OK
                                                                   : vrep_status_from_errno(errno);
}

int vrep_loop_watch(struct vrep_loop *loop, struct vrep_watch *watch, uint32_t events)
{
    return control(loop, EPOLL_CTL_ADD, watch, events);
}

int vrep_loop_change(struct vrep_loop *loop, struct vrep_watch *watch, uint32_t events)
{
    return control(loop, EPOLL_CTL_MOD, watch, events);
}

void vrep_loop_forget(struct vrep_loop *loop, struct vrep_watch *watch)
{
    (void)control(loop, EPOLL_CTL_DEL, watch, 0);
}

struct vrep_group *vrep_loop_group(struct vrep_loop *loop)
{
    return loop->group;
}

static bool all_idle(const struct vrep_loop *loop)
{
    for (uint32_t i = 0; i < loop->fronts; i++)
        if (!loop->front[i]->idle(loop->front[i]))
            return false;
    return true;
}

/* A client that keeps several requests in flight sends them one by one, and would be answered one
 * by one.  While several came in one of the last turns, whoever else wants this processor runs
 * first, so that more of them come together: fewer system calls for each.  A client that waits for
 * each answer never pays for this.  Where the processor goes to somebody who keeps it, all clients
 * would wait for him at each turn: then nothing is yielded for a while, and longer each time. */
static void yield(struct vrep_loop *loop)
{
    uint64_t begin = now_ns();
    if (begin < loop->yield_after_ns)
        return;
    sched_yield();
    uint64_t end = now_ns();
    if (end - begin < YIELD_LONG_NS) {
        loop->yield_pause_ns = YIELD_PAUSE_MIN_NS;
        return;
    }
    loop->yield_after_ns = end + loop->yield_pause_ns;
    if (loop->yield_pause_ns < YIELD_PAUSE_MAX_NS)
        loop->yield_pause_ns *= 2;
}

static int wait_for_events(struct vrep_loop *loop, struct epoll_event *events, int wait_ms)
{
    if (loop->deep_turns > 0) {
        loop->deep_turns--;
        yield(loop);
    }
    return epoll_wait(loop->epoll_fd, events, EVENTS_MAX, wait_ms);
}

/* Waits at most wait_ms (-1: for ever) and works once; true: there is more to do at once. */
static bool turn(struct vrep_loop *loop, int wait_ms)
{
    struct epoll_event events[EVENTS_MAX];
    int count = wait_for_events(loop, events, wait_ms);
    if (count < 0 && errno != EINTR)
        VREP_ERROR("serve", "epoll_wait: %s", strerror(errno));
    bool due = count == 0 && wait_ms != 0; /* a timer of the group, as far as we know */
    for (int i = 0; i < count; i++) {
        struct vrep_watch *watch = events[i].data.ptr;
        watch->ready(watch, events[i].events);
    }
    if (loop->group_ready || due || vrep_group_timeout_ms(loop->group) == 0) {
        loop->group_ready = false;
        vrep_group_poll(loop->group);
    }
    bool more = false;
    for (uint32_t i = 0; i < loop->fronts; i++) {
        more |= loop->front[i]->turn(loop->front[i]);
        if (loop->front[i]->requests > 1)
            loop->deep_turns = DEEP_TURNS;
    }
    vrep_group_flush_wakeups(loop->group);
    return more;
}

static void *run(void *argument)
{
    struct vrep_loop *loop = argument;
    uint64_t deadline = 0;
    bool more = false, stopping = false;
    vrep_group_poll(loop->group); /* whoever polls owns it */
    for (;;) {
        uint32_t stop = vrep_load_acquire_u32(&loop->stop);
        if (stop != STOP_NO && !stopping) {
            stopping = true;
            deadline = now_ms() + loop->stop_timeout_ms;
            for (uint32_t i = 0; i < loop->fronts; i++)
                loop->front[i]->stop(loop->front[i], stop == STOP_DRAIN);
        }
        if (stopping && all_idle(loop)) {
            loop->result = VREP_OK;
            break;
        }
        if (stopping && now_ms() >= deadline) {
            for (uint32_t i = 0; i < loop->fronts; i++)
                loop->front[i]->stop(loop->front[i], false);
            loop->result = all_idle(loop) ? VREP_OK : VREP_E_TIMEOUT;
            break;
        }
        int wait_ms = vrep_group_timeout_ms(loop->group);
        if (stopping && (wait_ms < 0 || wait_ms > 10))
            wait_ms = 10;
        more = turn(loop, more ? 0 : wait_ms);
    }
    vrep_group_flush_wakeups(loop->group);
    vrep_group_set_wakeup(loop->group, NULL, NULL);
    vrep_group_disown(loop->group);
    return NULL;
}

int vrep_loop_start(struct vrep_loop *loop)
{
    if (loop->running)
        return VREP_E_BUSY;
    vrep_store_release_u32(&loop->stop, STOP_NO);
    vrep_group_set_wakeup(loop->group, group_wakeup, loop);
    /* Signals are for the threads of the host program. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&loop->thread, NULL, run, loop);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0)
        return vrep_status_from_errno(error);
    pthread_setname_np(loop->thread, "vrep-group");
    loop->running = true;
    return VREP_OK;
}

int vrep_loop_stop(struct vrep_loop *loop, bool drain, uint32_t timeout_ms)
{
    if (!loop->running)
        return VREP_OK;
    loop->stop_timeout_ms = timeout_ms;
    vrep_store_release_u32(&loop->stop, drain ? STOP_DRAIN : STOP_CUT);
    uint64_t one = 1;
    ssize_t n;
    do
        n = write(loop->stop_watch.fd, &one, sizeof one);
    while (n < 0 && errno == EINTR);
    pthread_join(loop->thread, NULL);
    loop->running = false;
    return loop->result;
}
