#include "map/index.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "format/checksum.h"
#include "map/writer.h"

enum { ALIGN = 64 };

int vrep_index_entry_compare(const struct vrep_index_entry *a, const struct vrep_index_entry *b)
{
    int newer;

    if (a->disk != b->disk)
        return a->disk < b->disk ? -1 : 1;
    if (a->offset != b->offset)
        return a->offset < b->offset ? -1 : 1;
    newer = vrep_index_version_compare(b->epoch, b->seq, a->epoch, a->seq);
    if (newer != 0)
        return newer;
    if (a->segment != b->segment)
        return a->segment > b->segment ? -1 : 1;
    return a->position > b->position ? -1 : a->position < b->position;
}

static int position_compare(const struct vrep_position *a, const struct vrep_position *b)
{
    if (a->epoch == b->epoch && a->lane != b->lane)
        return a->lane < b->lane ? -1 : 1;
    return vrep_index_version_compare(a->epoch, a->seq, b->epoch, b->seq);
}

int vrep_index_event_compare(const struct vrep_index_event *a, const struct vrep_index_event *b)
{
    int order = position_compare(&a->at, &b->at);

    if (order != 0)
        return order;
    if (a->segment != b->segment)
        return a->segment < b->segment ? -1 : 1;
    return a->position < b->position ? -1 : a->position > b->position;
}

int vrep_index_time_compare(const struct vrep_index_time *a, const struct vrep_index_time *b)
{
    int order = position_compare(&a->at, &b->at);

    if (order != 0)
        return order;
    return a->wall_ns < b->wall_ns ? -1 : a->wall_ns > b->wall_ns;
}

static bool all_zero(const uint8_t *bytes, size_t len)
{
    uint8_t seen = 0;

    for (size_t i = 0; i < len; i++)
        seen |= bytes[i];
    return seen == 0;
}

/* One array: in order, aligned, before `limit`. */
static bool fits(uint64_t *after, uint64_t limit, uint64_t at, uint64_t count, size_t size)
{
    if (at % ALIGN != 0 || at < *after || at > limit || count > (limit - at) / size)
        return false;
    *after = at + count * size;
    return true;
}

static uint64_t tree_nodes(uint64_t count)
{
    uint64_t nodes[VREP_INDEX_LEVELS_MAX], sum = 0;

    for (uint32_t level = vrep_index_tree_shape(count, nodes); level-- > 0;)
        sum += nodes[level];
    return sum;
}

static int check_trailer(const struct vrep_index_trailer *trailer, uint64_t file_bytes)
{
    const uint64_t most = UINT64_C(1) << 48; /* what VREP_INDEX_LEVELS_MAX levels span */
    uint64_t limit = file_bytes - sizeof *trailer, after = trailer->segment_bytes;

    if (trailer->magic != VREP_INDEX_MAGIC ||
        trailer->checksum !=
            vrep_checksum32(trailer, offsetof(struct vrep_index_trailer, checksum)))
        return VREP_E_CORRUPT;
    if (trailer->version != VREP_INDEX_VERSION)
        return VREP_E_VERSION;
    if (trailer->trailer_bytes != sizeof *trailer || trailer->short_count > most ||
        trailer->long_count > most || trailer->streams_count > VREP_INDEX_STREAMS_MAX ||
        trailer->first.reserved != 0 || trailer->last.reserved != 0 ||
        !all_zero(trailer->reserved, sizeof trailer->reserved))
        return VREP_E_CORRUPT;
    if (!fits(&after, limit, trailer->short_at, trailer->short_count,
              sizeof(struct vrep_index_entry)) ||
        !fits(&after, limit, trailer->long_at, trailer->long_count,
              sizeof(struct vrep_index_entry)) ||
        !fits(&after, limit, trailer->streams_at, trailer->streams_count,
              sizeof(struct vrep_index_stream)) ||
        !fits(&after, limit, trailer->events_at, trailer->events_count,
              sizeof(struct vrep_index_event)) ||
        !fits(&after, limit, trailer->times_at, trailer->times_count,
              sizeof(struct vrep_index_time)) ||
        !fits(&after, limit, trailer->nodes_at, trailer->nodes_count,
              sizeof(struct vrep_index_node)))
        return VREP_E_CORRUPT;
    if (trailer->nodes_count != tree_nodes(trailer->long_count) + tree_nodes(trailer->short_count))
        return VREP_E_CORRUPT;
    return VREP_OK;
}

static const void *at(const struct vrep_index *index, uint64_t offset)
{
    return index->base + (offset - index->base_at);
}

static uint64_t plant(struct vrep_index *index, struct vrep_index_tree *tree, uint64_t entries_at,
                      uint64_t count, uint64_t nodes_at)
{
    tree->entries = at(index, entries_at);
    tree->count = count;
    tree->levels = vrep_index_tree_shape(count, tree->nodes_count);
    for (uint32_t level = 0; level < tree->levels; level++) {
        tree->nodes[level] = at(index, nodes_at);
        nodes_at += tree->nodes_count[level] * sizeof(struct vrep_index_node);
    }
    return nodes_at;
}

/* Everything of an index whose bytes are in place and whose trailer was checked. */
static int set_up(struct vrep_index *index)
{
    const struct vrep_index_trailer *trailer = &index->trailer;
    uint64_t nodes_at;

    nodes_at =
        plant(index, &index->longs, trailer->long_at, trailer->long_count, trailer->nodes_at);
    plant(index, &index->shorts, trailer->short_at, trailer->short_count, nodes_at);
    index->longs.length_max = UINT32_MAX;
    index->longs.root_checksum = trailer->long_root;
    index->shorts.length_max = VREP_PIECE_BYTES_MAX;
    index->shorts.root_checksum = trailer->short_root;
    index->streams = at(index, trailer->streams_at);
    index->events = at(index, trailer->events_at);
    index->times = at(index, trailer->times_at);
    if (vrep_checksum32(index->streams, trailer->streams_count * sizeof *index->streams) !=
        trailer->streams_checksum)
        return VREP_E_CORRUPT;
    return VREP_OK;
}

static int read_trailer(int fd, uint64_t file_bytes, struct vrep_index_trailer *trailer)
{
    uint8_t *to = (uint8_t *)trailer;
    uint64_t from = file_bytes - sizeof *trailer;
    size_t done = 0;

    while (done < sizeof *trailer) {
        ssize_t some = pread(fd, to + done, sizeof *trailer - done, (off_t)(from + done));
        if (some < 0 && errno == EINTR)
            continue;
        if (some < 0)
            return vrep_status_from_errno(errno);
        if (some == 0)
            return VREP_E_TORN;
        done += (size_t)some;
    }
    return VREP_OK;
}

int vrep_index_open(int fd, struct vrep_index **out)
{
    struct vrep_index *index;
    struct stat stat;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    void *mapping;
    int status;

    *out = NULL;
    if (fstat(fd, &stat) != 0)
        return vrep_status_from_errno(errno);
    if (stat.st_size < (off_t)sizeof index->trailer)
        return VREP_E_TORN;
    index = calloc(1, sizeof *index);
    if (index == NULL)
        return VREP_E_NOMEM;
    index->file_bytes = (uint64_t)stat.st_size;
    status = read_trailer(fd, index->file_bytes, &index->trailer);
    if (status == VREP_OK)
        status = check_trailer(&index->trailer, index->file_bytes);
    if (status != VREP_OK)
        goto fail;
    index->base_at = index->trailer.short_at / page * page;
    index->bytes = index->file_bytes - index->base_at;
    mapping = mmap(NULL, (size_t)index->bytes, PROT_READ, MAP_SHARED, fd, (off_t)index->base_at);
    if (mapping == MAP_FAILED) {
        status = vrep_status_from_errno(errno);
        goto fail;
    }
    index->mapping = mapping;
    index->mapping_bytes = (size_t)index->bytes;
    index->base = mapping;
    status = set_up(index);
    if (status != VREP_OK)
        goto fail;
    *out = index;
    return VREP_OK;
fail:
    vrep_index_free(index);
    return status;
}

int vrep_index_open_bytes(const void *bytes, size_t len, struct vrep_index **out)
{
    struct vrep_index *index;
    int status;

    *out = NULL;
    if (len < sizeof index->trailer)
        return VREP_E_TORN;
    index = calloc(1, sizeof *index);
    if (index == NULL)
        return VREP_E_NOMEM;
    index->file_bytes = index->bytes = len;
    memcpy(&index->trailer, (const uint8_t *)bytes + len - sizeof index->trailer,
           sizeof index->trailer);
    status = check_trailer(&index->trailer, len);
    if (status != VREP_OK)
        goto fail;
    index->block = aligned_alloc(ALIGN, (len + ALIGN - 1) / ALIGN * ALIGN);
    if (index->block == NULL) {
        status = VREP_E_NOMEM;
        goto fail;
    }
    memcpy(index->block, bytes, len);
    index->base = index->block;
    status = set_up(index);
    if (status != VREP_OK)
        goto fail;
    *out = index;
    return VREP_OK;
fail:
    vrep_index_free(index);
    return status;
}

void vrep_index_free(struct vrep_index *index)
{
    if (index == NULL)
        return;
    if (index->mapping != NULL)
        munmap(index->mapping, index->mapping_bytes);
    free(index->block);
    free(index);
}

/* Of whole pages that hold `bytes` from `from` on; a failure changes nothing. */
static void advise(const struct vrep_index *index, const void *from, uint64_t bytes, int advice)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = (uintptr_t)from / page * page, end = (uintptr_t)from + (uintptr_t)bytes;

    if (index->mapping != NULL && bytes > 0)
        (void)madvise((void *)begin, end - begin, advice);
}

void vrep_index_will_need(const struct vrep_index *index, const void *from, uint64_t bytes)
{
    advise(index, from, bytes, MADV_WILLNEED);
}

void vrep_index_scatter(const struct vrep_index *index)
{
    const struct vrep_index_tree *trees[2] = {&index->shorts, &index->longs};

    for (int i = 0; i < 2; i++)
        advise(index, trees[i]->entries, trees[i]->count * sizeof *trees[i]->entries, MADV_RANDOM);
}

void vrep_index_prefetch(const struct vrep_index *index, uint64_t bytes_max)
{
    const struct vrep_index_tree *trees[2] = {&index->shorts, &index->longs};

    for (int i = 0; i < 2; i++)
        for (uint32_t level = trees[i]->levels; level-- > 0;) {
            uint64_t bytes = trees[i]->nodes_count[level] * sizeof(struct vrep_index_node);
            if (bytes > bytes_max)
                break;
            bytes_max -= bytes;
            vrep_index_will_need(index, trees[i]->nodes[level], bytes);
        }
}

int vrep_index_root(const struct vrep_index_tree *tree, const struct vrep_index_node **root)
{
    *root = NULL;
    if (tree->levels == 0)
        return VREP_OK;
    *root = tree->nodes[tree->levels - 1];
    return vrep_checksum32(*root, sizeof **root) == tree->root_checksum ? VREP_OK : VREP_E_CORRUPT;
}

int vrep_index_children(const struct vrep_index_tree *tree, uint32_t level, uint64_t i,
                        const void **children, size_t *count)
{
    uint64_t below = level == 0 ? tree->count : tree->nodes_count[level - 1];
    uint64_t first = i * VREP_INDEX_FANOUT;
    size_t some = below - first < VREP_INDEX_FANOUT ? (size_t)(below - first) : VREP_INDEX_FANOUT;
    size_t bytes;

    if (level == 0) {
        *children = tree->entries + first;
        bytes = some * sizeof(struct vrep_index_entry);
    } else {
        *children = tree->nodes[level - 1] + first;
        bytes = some * sizeof(struct vrep_index_node);
    }
    *count = some;
    return vrep_checksum32(*children, bytes) == tree->nodes[level][i].checksum ? VREP_OK
                                                                               : VREP_E_CORRUPT;
}

int vrep_index_entry_check(const struct vrep_index *index, const struct vrep_index_tree *tree,
                           const struct vrep_index_entry *entry)
{
    bool data = entry->kind == VREP_KIND_WRITE || entry->kind == VREP_KIND_SYNC;
    bool zeroes = entry->kind == VREP_KIND_ZEROES || entry->kind == VREP_KIND_SYNC_ZEROES;

    if (!(data ? entry->length <= VREP_PIECE_BYTES_MAX : zeroes && entry->piece == 0) ||
        entry->length == 0 || entry->length > tree->length_max || entry->disk >= VREP_DISKS_MAX ||
        entry->offset > (uint64_t)INT64_MAX - entry->length ||
        entry->stream >= index->trailer.streams_count || entry->piece >= VREP_PIECES_MAX ||
        entry->flags != 0)
        return VREP_E_CORRUPT;
    return VREP_OK;
}

int vrep_index_check_events(const struct vrep_index *index)
{
    uint8_t digest[VREP_DIGEST_BYTES];

    vrep_digest_once(index->events, index->trailer.events_count * sizeof *index->events, digest);
    return memcmp(digest, &index->trailer.events_checksum, sizeof index->trailer.events_checksum)
               ? VREP_E_CORRUPT
               : VREP_OK;
}

static int verify_entries(const struct vrep_index *index, const struct vrep_index_tree *tree)
{
    for (uint64_t i = 0; i < tree->count; i++) {
        const struct vrep_index_entry *entry = &tree->entries[i];
        bool right_length = (tree == &index->shorts) == (entry->length <= VREP_PIECE_BYTES_MAX);
        if (!right_length || vrep_index_entry_check(index, tree, entry) != VREP_OK ||
            (i > 0 && vrep_index_entry_compare(entry - 1, entry) > 0))
            return VREP_E_CORRUPT;
    }
    return VREP_OK;
}

static int verify_nodes(const struct vrep_index_tree *tree)
{
    for (uint32_t level = 0; level < tree->levels; level++) {
        uint64_t below = level == 0 ? tree->count : tree->nodes_count[level - 1];
        for (uint64_t i = 0; i < tree->nodes_count[level]; i++) {
            struct vrep_index_node node;
            uint64_t first = i * VREP_INDEX_FANOUT;
            size_t some =
                below - first < VREP_INDEX_FANOUT ? (size_t)(below - first) : VREP_INDEX_FANOUT;
            if (level == 0)
                vrep_index_node_over_entries(tree->entries + first, some, &node);
            else
                vrep_index_node_over_nodes(tree->nodes[level - 1] + first, some, &node);
            if (memcmp(&node, &tree->nodes[level][i], sizeof node) != 0)
                return VREP_E_CORRUPT;
        }
    }
    if (tree->levels == 0)
        return tree->root_checksum == 0 ? VREP_OK : VREP_E_CORRUPT;
    return vrep_checksum32(tree->nodes[tree->levels - 1], sizeof(struct vrep_index_node)) ==
                   tree->root_checksum
               ? VREP_OK
               : VREP_E_CORRUPT;
}

static int verify_rest(const struct vrep_index *index)
{
    const struct vrep_index_trailer *trailer = &index->trailer;
    struct vrep_digest rest;
    uint8_t digest[VREP_DIGEST_BYTES];

    vrep_digest_init(&rest);
    vrep_digest_update(&rest, index->longs.entries,
                       trailer->long_count * sizeof(struct vrep_index_entry));
    vrep_digest_update(&rest, index->streams, trailer->streams_count * sizeof *index->streams);
    vrep_digest_update(&rest, index->events, trailer->events_count * sizeof *index->events);
    vrep_digest_update(&rest, index->times, trailer->times_count * sizeof *index->times);
    vrep_digest_final(&rest, digest);
    if (memcmp(digest, trailer->rest_digest, sizeof digest) != 0)
        return VREP_E_CORRUPT;
    for (uint64_t i = 0; i < trailer->events_count; i++)
        if (index->events[i].stream >= trailer->streams_count ||
            (i > 0 && vrep_index_event_compare(&index->events[i - 1], &index->events[i]) > 0))
            return VREP_E_CORRUPT;
    for (uint64_t i = 1; i < trailer->times_count; i++)
        if (vrep_index_time_compare(&index->times[i - 1], &index->times[i]) > 0)
            return VREP_E_CORRUPT;
    return vrep_index_check_events(index);
}

int vrep_index_verify(const struct vrep_index *index)
{
    uint8_t digest[VREP_DIGEST_BYTES];
    int status;

    vrep_digest_once(index->shorts.entries,
                     index->trailer.short_count * sizeof(struct vrep_index_entry), digest);
    if (memcmp(digest, index->trailer.short_digest, sizeof digest) != 0)
        return VREP_E_CORRUPT;
    status = verify_rest(index);
    if (status == VREP_OK)
        status = verify_entries(index, &index->shorts);
    if (status == VREP_OK)
        status = verify_entries(index, &index->longs);
    if (status == VREP_OK)
        status = verify_nodes(&index->shorts);
    return status == VREP_OK ? verify_nodes(&index->longs) : status;
}
