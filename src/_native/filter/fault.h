/* Fault: named points at which a crash test kills the process or fails a call.
 *
 * VREP_FAULT="name:count:action[,name:count:action...]" arms points when the
 * program starts: at the count-th pass (from 1) of the point `name` the
 * process kills itself with SIGKILL (action "kill"), or the point reports
 * VREP_E_IO once ("io") or from then on ("io+").  Unarmed, a point costs one
 * load and one branch that is never taken, so that tests kill the very binary
 * that ships.  Threading: any thread; what is armed is
 * behind a lock that only armed processes take.
 */
#ifndef VREP_FILTER_FAULT_H
#define VREP_FILTER_FAULT_H

#include <stdint.h>

#include "base/atomic.h"

extern uint32_t vrep_fault_armed;

/* Reads VREP_FAULT again, for tests, at any time; a malformed value arms nothing and is
 * logged. */
void vrep_fault_prepare(void);
int vrep_fault_hit(const char *name);

/* 0, or the status that the point must report instead of doing its work. */
#define vrep_fault(name)                                                                           \
    (__builtin_expect(vrep_load_acquire_u32(&vrep_fault_armed) != 0, 0) ? vrep_fault_hit(name) : 0)

#endif
