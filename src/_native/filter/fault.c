#include "filter/fault.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/atomic.h"
#include "base/log.h"
#include "base/status.h"

#define POINTS_MAX 8

enum action { ACTION_KILL, ACTION_IO, ACTION_IO_ON };
struct point {
    char name[48];
    uint32_t count;
    uint32_t passed;
    enum action action;
};

uint32_t vrep_fault_armed;
static struct point points[POINTS_MAX];
static unsigned points_count;
/* Taken only by tests that arm, and by threads that pass a point while something is armed. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static bool parse(const char *text, struct point *point)
{
    char action[8];
    unsigned count = 0;
    if (sscanf(text, "%47[^:,]:%u:%7[^,]", point->name, &count, action) != 3 || count == 0)
        return false;
    point->count = count;
    point->passed = 0;
    if (strcmp(action, "kill") == 0)
        point->action = ACTION_KILL;
    else if (strcmp(action, "io") == 0)
        point->action = ACTION_IO;
    else if (strcmp(action, "io+") == 0)
        point->action = ACTION_IO_ON;
    else
        return false;
    return true;
}

static void read_points(const char *text)
{
    points_count = 0;
    while (*text != '\0' && points_count < POINTS_MAX) {
        if (!parse(text, &points[points_count])) {
            VREP_ERROR("fault", "VREP_FAULT is malformed at \"%.60s\": nothing is armed", text);
            points_count = 0;
            return;
        }
        points_count++;
        text += strcspn(text, ",");
        if (*text == ',')
            text++;
    }
}

/* A constructor: a process that is to be killed at a point is told so by its environment. */
__attribute__((constructor)) void vrep_fault_prepare(void)
{
    const char *text = getenv("VREP_FAULT");
    pthread_mutex_lock(&lock);
    read_points(text != NULL ? text : "");
    vrep_store_release_u32(&vrep_fault_armed, points_count > 0);
    pthread_mutex_unlock(&lock);
}

static int hit(const char *name)
{
    for (unsigned i = 0; i < points_count; i++) {
        struct point *point = &points[i];
        if (strcmp(point->name, name) != 0)
            continue;
        uint32_t pass = ++point->passed;
        if (pass == point->count && point->action == ACTION_KILL) {
            if (kill(getpid(), SIGKILL) != 0)
                abort();
            for (;;)
                pause();
        }
        if ((pass == point->count && point->action == ACTION_IO) ||
            (pass >= point->count && point->action == ACTION_IO_ON))
            return VREP_E_IO;
    }
    return VREP_OK;
}

int vrep_fault_hit(const char *name)
{
    pthread_mutex_lock(&lock);
    int status = hit(name);
    pthread_mutex_unlock(&lock);
    return status;
}
