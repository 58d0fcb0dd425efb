/*
 * Since: the blocks of a view's disk that may differ from what it held at a base
 * point.  What the history wrote between the base and the view's own point is
 * marked when the view is opened, what its users write is marked before it is
 * written, and nothing is ever cleared: an incremental copy that takes what is
 * marked has everything.
 *
 * Units: bytes; a mark covers whole blocks of VREP_SINCE_BLOCK_BYTES.  It lives in
 * memory only: 32 MiB for each TiB, of which what is never marked costs nothing.
 * Threading: belongs to one thread.
 */
#ifndef VREP_TRACK_SINCE_H
#define VREP_TRACK_SINCE_H

#include <stdbool.h>
#include <stdint.h>

#define VREP_SINCE_BLOCK_BYTES 4096u

struct vrep_since;

int vrep_since_create(uint64_t disk_bytes, struct vrep_since **out);
void vrep_since_destroy(struct vrep_since *since);

/* Marks every block that a range touches; what lies past the disk is left out. */
void vrep_since_mark(struct vrep_since *since, uint64_t offset, uint64_t length);

/* How far from `offset` on it stays as it is there, at most to the end of the disk, and whether
 * that is marked; false past the end. */
bool vrep_since_next_run(const struct vrep_since *since, uint64_t offset, uint64_t *length,
                         bool *marked);

#endif
