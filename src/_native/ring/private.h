/* Private: what the files of ring/ share and nobody else includes.
 *
 * Units and threading as in ring.h.
 */
#ifndef VREP_RING_PRIVATE_H
#define VREP_RING_PRIVATE_H

#include "ring/region.h"
#include "ring/ring.h"

struct vrep_ring_region *vrep_ring_region(struct vrep_ring *ring);

#endif
