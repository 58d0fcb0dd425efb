/*
 * Extent map: the newest piece of every byte of a disk at one recovery point, out
 * of the indexes of a group.
 *
 * A point is an ancestry: a list of (epoch, largest seq); a record is visible when
 * the list names its epoch with a seq at least its own. Of the visible ones that
 * cover a byte the largest (epoch, seq) wins. Of each index only those nodes of its
 * two trees are read that may hold something visible, inside the range, and newer
 * than what is known to cover it, the newest index first: a lookup costs a few
 * blocks per run, whatever the age and size of the history. All that is read is
 * checked against its node first.
 *
 * Units: bytes. Limits: offset + length of a lookup at most 2^63 - 1.
 *
 * Threading: a map does not change once made; lookups need 64 KiB of stack and may
 * run at once. The indexes must outlive the map.
 */
#ifndef VREP_MAP_EXTENT_MAP_H
#define VREP_MAP_EXTENT_MAP_H

#include "map/index.h"

/* One generation of the ancestry. */
struct vrep_reign {
    uint32_t epoch;
    uint32_t reserved;
    uint64_t seq_max;
};

/* One run of bytes from one piece. kind: 0 (never written), VREP_KIND_WRITE (data,
 * sync copies included) or VREP_KIND_ZEROES (every kind of zeroes). */
struct vrep_extent {
    uint64_t offset;
    uint64_t seq;
    uint32_t length; /* at most VREP_EXTENT_BYTES_MAX */
    uint32_t epoch;
    uint32_t segment;
    uint32_t position; /* of the record in its segment */
    uint32_t skip;     /* of the extent in the plaintext of the piece, or of the zeroes */
    uint32_t stream;   /* row of the map's table */
    uint16_t piece;
    uint8_t kind;
    uint8_t reserved0;
    uint32_t reserved1;
};
static_assert(sizeof(struct vrep_extent) == 48, "no padding");
#define VREP_EXTENT_BYTES_MAX (1u << 31)

struct vrep_extent_map;

/*
 * VREP_E_INVALID: an epoch twice, or indexes of several groups. Reads the root of
 * each tree; asks the system to begin reading the nodes.
 */
int vrep_extent_map_new(const struct vrep_index *const *indexes, size_t count,
                        const struct vrep_reign *ancestry, size_t reigns,
                        struct vrep_extent_map **out);
void vrep_extent_map_free(struct vrep_extent_map *map);

/*
 * Lookups will be short and anywhere: from now on each first asks the system for all
 * that it will read of the entries, so that it waits once, and for nothing beside it.
 * Before the first lookup.
 */
void vrep_extent_map_scatter(struct vrep_extent_map *map);

/* The united table of streams. */
const struct vrep_index_stream *vrep_extent_map_streams(const struct vrep_extent_map *map,
                                                        uint32_t *count);

/*
 * Appends to out[*count .. cap) extents that tile [offset, offset + length) from its
 * start on; *done becomes how many bytes they tile: fewer than length when `out` is
 * full. The first may prolong out[*count - 1] instead. VREP_E_CORRUPT: an index is
 * damaged where it was read; VREP_E_RANGE: disk, offset or length out of bounds.
 */
int vrep_extent_map_lookup(const struct vrep_extent_map *map, uint32_t disk, uint64_t offset,
                           uint64_t length, struct vrep_extent *out, size_t cap, size_t *count,
                           uint64_t *done);

/* 1 and the first offset >= `offset` of the disk that was ever written, zeroes
 * included; 0 when there is none. */
int vrep_extent_map_next(const struct vrep_extent_map *map, uint32_t disk, uint64_t offset,
                         uint64_t *next);

#endif
