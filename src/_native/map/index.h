/*
 * Index: where each piece of a segment stands, sorted by place on the disk; the
 * footer of an immutable segment, a merged run over many, or a copy in memory of
 * what an active segment holds so far.
 *
 * A builder takes whole records as they are appended and writes the footer; a
 * reader maps it: opening looks at the trailer alone, so it costs the same at any
 * size, and every block of neighbours is checked against its node when it is first
 * read (a tree of checksums down from the trailer). A merge writes one run out of
 * several indexes and keeps all versions, in memory that does not grow with them.
 * What the arrays mean stands in format/layout.h; lookups are in map/extent_map.h.
 *
 * Units: bytes; positions count from the start of the segment's file. Limits: one
 * lane (entries do not say which); VREP_INDEX_STREAMS_MAX streams in one index; a segment ends
 * below 4 GiB; a builder takes memory in proportion to the entries of its segment.
 *
 * A mapped file must not become shorter while an index holds it.
 *
 * Threading: a builder belongs to one thread at a time. An index does not change
 * after it was opened and may be read by any number of threads.
 */
#ifndef VREP_MAP_INDEX_H
#define VREP_MAP_INDEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "format/layout.h"

#define VREP_INDEX_STREAMS_MAX 65536u
#define VREP_INDEX_LEVELS_MAX 8u

/* ---- builder ------------------------------------------------------------- */

struct vrep_index_builder;

/*
 * `stream` is the one in force where the segment starts; NULL: the first record is a
 * STREAM. The table of streams begins with it, and its last row is the one in force at
 * the end; a stream that comes back has a row again.
 */
int vrep_index_builder_new(uint32_t segment, const uint8_t group_id[16],
                           const struct vrep_index_stream *stream, struct vrep_index_builder **out);
void vrep_index_builder_free(struct vrep_index_builder *builder);

/*
 * Takes the records that stand back to back in `buffer`, which stands at `position`
 * of the segment. *records counts those taken, also when a later one fails:
 * VREP_E_TORN when the last is only in part there, VREP_E_CORRUPT or VREP_E_VERSION
 * when one is wrong, or sealed under no known stream, VREP_E_UNSUPPORTED for
 * another lane than the first record's, VREP_E_RANGE past 4 GiB, VREP_E_FULL, VREP_E_NOMEM.
 */
int vrep_index_builder_add(struct vrep_index_builder *builder, const void *buffer, size_t len,
                           uint64_t position, uint64_t *records);

/* One sample of the time index. */
int vrep_index_builder_time(struct vrep_index_builder *builder, uint64_t wall_ns,
                            struct vrep_position at);

/* What had passed for the store when the segment was closed. */
void vrep_index_builder_aged(struct vrep_index_builder *builder, uint64_t aged_ns);

struct vrep_index_summary {
    uint64_t records; /* STREAM and TALLY not counted */
    uint64_t entries;
    uint64_t data_bytes;
    struct vrep_position first;
    struct vrep_position last;
    bool has_stream;
    struct vrep_index_stream stream; /* in force now */
};
void vrep_index_builder_summary(const struct vrep_index_builder *builder,
                                struct vrep_index_summary *out);

/*
 * Writes the whole footer, arrays and trailer, as it stands at `segment_bytes` of
 * the file (a multiple of 64), to a block that the caller frees. The builder may
 * take more records afterwards.
 */
int vrep_index_builder_finish(struct vrep_index_builder *builder, uint64_t segment_bytes,
                              uint8_t **out, size_t *out_len);

/* ---- reader -------------------------------------------------------------- */

/* The nodes over one sorted array of entries; level 0 is the lowest. */
struct vrep_index_tree {
    const struct vrep_index_entry *entries;
    uint64_t count;
    uint32_t length_max;
    uint32_t root_checksum;
    uint32_t levels;
    const struct vrep_index_node *nodes[VREP_INDEX_LEVELS_MAX];
    uint64_t nodes_count[VREP_INDEX_LEVELS_MAX];
};

struct vrep_index {
    struct vrep_index_trailer trailer; /* a copy, checked */
    struct vrep_index_tree shorts;
    struct vrep_index_tree longs;
    const struct vrep_index_stream *streams;
    const struct vrep_index_event *events;
    const struct vrep_index_time *times;
    const uint8_t *base; /* byte `base_at` of the file; the file ends at base + bytes */
    uint64_t base_at;
    uint64_t bytes;
    uint64_t file_bytes;
    void *mapping; /* NULL when the bytes are the index's own block */
    size_t mapping_bytes;
    void *block;
};

/*
 * Maps the index at the end of a file; `fd` may be closed afterwards. VREP_E_TORN:
 * too short; VREP_E_CORRUPT: no trailer, or one whose arrays do not fit the file;
 * VREP_E_VERSION. The trailer and the table of streams are checked here.
 */
int vrep_index_open(int fd, struct vrep_index **out);

/* The same over bytes that begin at offset 0 of a file; they are copied. */
int vrep_index_open_bytes(const void *bytes, size_t len, struct vrep_index **out);

/* Looks at every byte: digests, order, each entry, the whole tree. */
int vrep_index_verify(const struct vrep_index *index);

/* VREP_E_CORRUPT when the table of events is not what was written. */
int vrep_index_check_events(const struct vrep_index *index);

void vrep_index_free(struct vrep_index *index);

/* Starts reading the nodes, at most `bytes_max` of the upper levels, in the background. */
void vrep_index_prefetch(const struct vrep_index *index, uint64_t bytes_max);

/* Begin to read what lies in the index at `from`. Advice only. */
void vrep_index_will_need(const struct vrep_index *index, const void *from, uint64_t bytes);

/* Entries will be read here and there: the system reads no neighbours of theirs. */
void vrep_index_scatter(const struct vrep_index *index);

/* The root of a tree, checked; NULL when the tree is empty. */
int vrep_index_root(const struct vrep_index_tree *tree, const struct vrep_index_node **root);

/* Children of node `i` of a level, checked: of level 0 entries, of others nodes. */
int vrep_index_children(const struct vrep_index_tree *tree, uint32_t level, uint64_t i,
                        const void **children, size_t *count);

/* VREP_E_CORRUPT unless the fields of an entry lie within the limits of its tree. */
int vrep_index_entry_check(const struct vrep_index *index, const struct vrep_index_tree *tree,
                           const struct vrep_index_entry *entry);

/* Order of entries: disk, offset, then the newest first. */
int vrep_index_entry_compare(const struct vrep_index_entry *a, const struct vrep_index_entry *b);

/* Order of events and of times: by position, then by place in the store. */
int vrep_index_event_compare(const struct vrep_index_event *a, const struct vrep_index_event *b);
int vrep_index_time_compare(const struct vrep_index_time *a, const struct vrep_index_time *b);

/* (epoch, seq) as one order: negative, 0 or positive. */
static inline int vrep_index_version_compare(uint32_t epoch_a, uint64_t seq_a, uint32_t epoch_b,
                                             uint64_t seq_b)
{
    if (epoch_a != epoch_b)
        return epoch_a < epoch_b ? -1 : 1;
    return seq_a < seq_b ? -1 : seq_a > seq_b;
}

/* ---- merge --------------------------------------------------------------- */

#define VREP_INDEX_MERGE_MAX 1024u

/*
 * Writes the run that holds all of `count` indexes of one group to `fd` from offset
 * 0 on, every version kept, and fills *trailer. What fd holds is not synced. On an
 * error the file holds no trailer. An input that fails its checks ends the merge
 * with VREP_E_CORRUPT; a failed write with the status of its errno.
 */
int vrep_index_merge(const struct vrep_index *const *indexes, size_t count, uint32_t level, int fd,
                     struct vrep_index_trailer *trailer);

#endif
