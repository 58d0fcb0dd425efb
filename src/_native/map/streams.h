/*
 * Streams: the tables of several indexes as one (internal to the map room).
 *
 * Each stream id stands once, ordered by epoch, first seq and id; `rows` says where
 * the rows of each input went. Threading: constant once made.
 */
#ifndef VREP_MAP_STREAMS_H
#define VREP_MAP_STREAMS_H

#include "map/index.h"

struct vrep_index_streams {
    struct vrep_index_stream *streams;
    uint32_t count;
    uint32_t *rows;    /* of input i: from rows_at[i] on */
    uint64_t *rows_at; /* inputs + 1 of them */
};

/* VREP_E_CORRUPT: two indexes disagree about a stream; VREP_E_FULL: too many rows. */
int vrep_index_streams_unite(struct vrep_index_streams *all,
                             const struct vrep_index *const *indexes, size_t count);
void vrep_index_streams_free(struct vrep_index_streams *all);

#endif
