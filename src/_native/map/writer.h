/*
 * Writer of an index (internal to the map room): arrays, nodes and trailer go to
 * their places as sorted entries arrive, in memory that does not grow with them.
 *
 * The caller knows all counts beforehand and gives the arrays in the order of the
 * file: short entries, long entries, streams, events, times. The bytes go to a
 * file descriptor or to one block. Units: bytes. Threading: one thread at a time.
 */
#ifndef VREP_MAP_WRITER_H
#define VREP_MAP_WRITER_H

#include "format/checksum.h"
#include "map/index.h"

#define VREP_INDEX_WRITER_BUFFER (256u << 10)

struct vrep_index_writer {
    int fd;        /* -1: memory */
    uint8_t *room; /* memory: stands for offset `base` of the file */
    uint64_t base;
    uint64_t end; /* of the trailer */
    struct vrep_index_trailer trailer;
    struct vrep_digest digest;
    struct vrep_digest events;
    uint8_t *buffer; /* of the array that is being written */
    size_t buffered;
    uint64_t at; /* where the buffer goes */
    uint32_t levels;
    uint64_t level_at[VREP_INDEX_LEVELS_MAX];
    uint32_t pending[VREP_INDEX_LEVELS_MAX];
    uint32_t neighbours;
    struct vrep_index_entry entries[VREP_INDEX_FANOUT];
    struct vrep_index_node nodes[VREP_INDEX_LEVELS_MAX][VREP_INDEX_FANOUT];
};

/* Nodes of each level over `count` entries; returns the number of levels. */
uint32_t vrep_index_tree_shape(uint64_t count, uint64_t nodes[VREP_INDEX_LEVELS_MAX]);

/* What neighbours have in common; count > 0. */
void vrep_index_node_over_entries(const struct vrep_index_entry *entries, size_t count,
                                  struct vrep_index_node *node);
void vrep_index_node_over_nodes(const struct vrep_index_node *nodes, size_t count,
                                struct vrep_index_node *node);

/*
 * `counts` and everything that does not follow from the arrays (segment, level,
 * positions, group, ...) are taken from `trailer`. fd < 0: a block is allocated.
 */
int vrep_index_writer_begin(struct vrep_index_writer *writer, int fd, uint64_t base,
                            const struct vrep_index_trailer *trailer);
int vrep_index_writer_short(struct vrep_index_writer *writer, const struct vrep_index_entry *entry);
int vrep_index_writer_shorts_end(struct vrep_index_writer *writer);
int vrep_index_writer_long(struct vrep_index_writer *writer, const struct vrep_index_entry *entry);
int vrep_index_writer_longs_end(struct vrep_index_writer *writer);
int vrep_index_writer_streams(struct vrep_index_writer *writer,
                              const struct vrep_index_stream *streams);
int vrep_index_writer_event(struct vrep_index_writer *writer, const struct vrep_index_event *event);
int vrep_index_writer_events_end(struct vrep_index_writer *writer);
int vrep_index_writer_time(struct vrep_index_writer *writer, const struct vrep_index_time *time);
/* The last array, then the trailer. */
int vrep_index_writer_finish(struct vrep_index_writer *writer);
/* Frees the buffers; the block too unless it was taken (room = NULL). */
void vrep_index_writer_free(struct vrep_index_writer *writer);

#endif
