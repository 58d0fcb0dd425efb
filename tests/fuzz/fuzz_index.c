/*
 * Footers and runs from a damaged or hostile store: open, verify, lookups, merge.
 *
 * Input: one byte of options, then a file that ends with a trailer. Checksums cannot
 * be guessed, so option 1 makes those right that a hostile writer would have made
 * right: trailer, streams, nodes and digests, whatever they cover. Option 2 merges too.
 */
#include "fuzz.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "format/checksum.h"
#include "map/extent_map.h"

enum { REPAIR = 1, MERGE = 2, EXTENTS = 64 };

static void repair_trailer(uint8_t *bytes, size_t size)
{
    struct vrep_index_trailer trailer;
    size_t at = size - sizeof trailer;

    memcpy(&trailer, bytes + at, sizeof trailer);
    trailer.magic = VREP_INDEX_MAGIC;
    trailer.version = VREP_INDEX_VERSION;
    trailer.trailer_bytes = sizeof trailer;
    trailer.first.reserved = trailer.last.reserved = 0;
    memset(trailer.reserved, 0, sizeof trailer.reserved);
    memset(trailer.group_id, 0, sizeof trailer.group_id);
    if (trailer.streams_at <= at &&
        trailer.streams_count <= (at - trailer.streams_at) / sizeof(struct vrep_index_stream))
        trailer.streams_checksum = vrep_checksum32(
            bytes + trailer.streams_at, trailer.streams_count * sizeof(struct vrep_index_stream));
    trailer.checksum = vrep_checksum32(&trailer, offsetof(struct vrep_index_trailer, checksum));
    memcpy(bytes + at, &trailer, sizeof trailer);
}

/* The index has its own copy of the bytes: its checksums are made right there. */
static void repair_tree(struct vrep_index_tree *tree)
{
    for (uint32_t level = 0; level < tree->levels; level++) {
        struct vrep_index_node *nodes = (struct vrep_index_node *)(uintptr_t)tree->nodes[level];
        uint64_t below = level == 0 ? tree->count : tree->nodes_count[level - 1];
        for (uint64_t i = 0; i < tree->nodes_count[level]; i++) {
            uint64_t first = i * VREP_INDEX_FANOUT;
            size_t some = below - first < VREP_INDEX_FANOUT ? below - first : VREP_INDEX_FANOUT;
            nodes[i].checksum =
                level == 0 ? vrep_checksum32(tree->entries + first, some * sizeof *tree->entries)
                           : vrep_checksum32(tree->nodes[level - 1] + first, some * sizeof *nodes);
        }
        tree->root_checksum = vrep_checksum32(nodes, sizeof *nodes);
    }
}

static void repair_digests(struct vrep_index *index)
{
    struct vrep_index_trailer *trailer = &index->trailer;
    struct vrep_digest rest;
    uint8_t digest[VREP_DIGEST_BYTES];

    vrep_digest_once(index->shorts.entries, index->shorts.count * sizeof *index->shorts.entries,
                     trailer->short_digest);
    vrep_digest_init(&rest);
    vrep_digest_update(&rest, index->longs.entries,
                       index->longs.count * sizeof *index->longs.entries);
    vrep_digest_update(&rest, index->streams, trailer->streams_count * sizeof *index->streams);
    vrep_digest_update(&rest, index->events, trailer->events_count * sizeof *index->events);
    vrep_digest_update(&rest, index->times, trailer->times_count * sizeof *index->times);
    vrep_digest_final(&rest, trailer->rest_digest);
    vrep_digest_once(index->events, trailer->events_count * sizeof *index->events, digest);
    memcpy(&trailer->events_checksum, digest, sizeof trailer->events_checksum);
}

static void look(const struct vrep_extent_map *map, uint32_t disk, uint64_t offset, uint64_t length)
{
    struct vrep_extent out[EXTENTS];
    uint32_t streams;
    size_t count = 0;
    uint64_t done, at = offset, next;
    int status = vrep_extent_map_lookup(map, disk, offset, length, out, EXTENTS, &count, &done);

    FUZZ_MUST(count <= EXTENTS && done <= length);
    FUZZ_MUST(status != VREP_OK || done == length || count == EXTENTS);
    (void)vrep_extent_map_streams(map, &streams);
    for (size_t i = 0; i < count; i++) {
        FUZZ_MUST(out[i].offset == at && out[i].length > 0);
        FUZZ_MUST(out[i].kind == 0 || out[i].stream < streams);
        at += out[i].length;
        FUZZ_CANARY(out[i].kind == VREP_KIND_WRITE && (out[i].piece != 0 || out[i].skip != 0));
    }
    FUZZ_MUST(at == offset + done);
    if (vrep_extent_map_next(map, disk, offset, &next) == 1)
        FUZZ_MUST(next >= offset);
}

static void look_around(const struct vrep_index *index)
{
    struct vrep_reign chain[2] = {{.epoch = 1, .seq_max = UINT64_MAX}, {.epoch = 2, .seq_max = 50}};
    const struct vrep_index *twice[2] = {index, index};
    struct vrep_extent_map *map;

    if (vrep_extent_map_new(twice, 2, chain, 2, &map) != VREP_OK)
        return;
    look(map, 0, 0, 1 << 20);
    look(map, 0, 4096, 1);
    look(map, 1, 0, INT64_MAX);
    vrep_extent_map_free(map);
}

static void merge(const struct vrep_index *index)
{
    const struct vrep_index *twice[2] = {index, index};
    struct vrep_index_trailer trailer;
    struct vrep_index *run;
    int fd = memfd_create("run", MFD_CLOEXEC);

    FUZZ_MUST(fd >= 0);
    if (vrep_index_merge(twice, 2, 1, fd, &trailer) == VREP_OK) {
        FUZZ_MUST(trailer.short_count == 2 * index->shorts.count);
        FUZZ_MUST(vrep_index_open(fd, &run) == VREP_OK);
        (void)vrep_index_verify(run); /* an entry may stand in the wrong array */
        vrep_index_free(run);
    }
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct vrep_index *index;
    uint8_t *bytes;
    bool repair;

    if (size < 1)
        return 0;
    repair = data[0] & REPAIR;
    bytes = malloc(size); /* exact, so that the sanitizer sees the end */
    FUZZ_MUST(bytes != NULL);
    memcpy(bytes, data + 1, --size);
    if (repair && size >= sizeof(struct vrep_index_trailer))
        repair_trailer(bytes, size);
    if (vrep_index_open_bytes(bytes, size, &index) == VREP_OK) {
        if (repair) {
            repair_tree(&index->shorts);
            repair_tree(&index->longs);
            repair_digests(index);
        }
        (void)vrep_index_verify(index);
        if (data[0] & MERGE)
            merge(index);
        look_around(index);
        vrep_index_free(index);
    }
    free(bytes);
    return 0;
}
