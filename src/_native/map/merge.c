#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "format/checksum.h"
#include "map/streams.h"
#include "map/writer.h"

/* Pages of an input that the merge has passed are given back in steps of this. */
#define STEP_BYTES (1u << 20)

/* One input of one array. */
struct source {
    const uint8_t *next;
    const uint8_t *end;
    const uint8_t *given_back; /* pages below are, and stand in the digest */
    size_t which;              /* input */
    struct vrep_digest digest;
};

struct merge {
    const struct vrep_index *const *indexes;
    size_t count;
    struct source *sources;
    size_t *heap; /* of sources, smallest item first */
    size_t heaped;
    size_t item_bytes;
    int (*compare)(const void *, const void *);
    struct vrep_index_streams streams;
    struct vrep_index_writer *writer;
};

static bool before(const struct merge *merge, size_t a, size_t b)
{
    int order = merge->compare(merge->sources[a].next, merge->sources[b].next);

    return order != 0 ? order < 0 : a < b;
}

static void sink(struct merge *merge, size_t place)
{
    size_t *heap = merge->heap, moved = heap[place];

    for (;;) {
        size_t child = 2 * place + 1;
        if (child >= merge->heaped)
            break;
        if (child + 1 < merge->heaped && before(merge, heap[child + 1], heap[child]))
            child++;
        if (!before(merge, heap[child], moved))
            break;
        heap[place] = heap[child];
        place = child;
    }
    heap[place] = moved;
}

/* What was read will not be read again: a merge of large runs stays small in memory. */
static void give_back(const struct merge *merge, struct source *source)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t from = ((uintptr_t)source->given_back + page - 1) / page * page;
    uintptr_t to = (uintptr_t)source->next / page * page;

    vrep_digest_update(&source->digest, source->given_back,
                       (size_t)(source->next - source->given_back));
    source->given_back = source->next;
    if (merge->indexes[source->which]->mapping != NULL && to > from)
        (void)madvise((void *)from, to - from, MADV_DONTNEED);
}

static void start(struct merge *merge, size_t item_bytes,
                  int (*compare)(const void *, const void *))
{
    merge->item_bytes = item_bytes;
    merge->compare = compare;
    merge->heaped = 0;
}

static void start_input(struct merge *merge, size_t which, const void *items, uint64_t count)
{
    struct source *source = &merge->sources[which];

    source->which = which;
    source->next = source->given_back = items;
    source->end = source->next + count * merge->item_bytes;
    if (count > 0)
        merge->heap[merge->heaped++] = which;
}

static void heapify(struct merge *merge)
{
    for (size_t place = merge->heaped / 2; place-- > 0;)
        sink(merge, place);
}

/* The smallest item is done with: VREP_E_CORRUPT when its input is not in order. */
static int advance(struct merge *merge)
{
    struct source *source = &merge->sources[merge->heap[0]];
    const uint8_t *passed = source->next;

    source->next += merge->item_bytes;
    if (source->next == source->end) {
        give_back(merge, source);
        merge->heap[0] = merge->heap[--merge->heaped];
    } else if (merge->compare(passed, source->next) > 0) {
        return VREP_E_CORRUPT;
    } else if ((size_t)(source->next - source->given_back) >= STEP_BYTES) {
        give_back(merge, source);
    }
    if (merge->heaped > 1)
        sink(merge, 0);
    return VREP_OK;
}

static uint16_t row(const struct merge *merge, size_t which, uint16_t stream)
{
    return (uint16_t)merge->streams.rows[merge->streams.rows_at[which] + stream];
}

static int compare_entries(const void *a, const void *b)
{
    return vrep_index_entry_compare(a, b);
}

static int compare_events(const void *a, const void *b)
{
    return vrep_index_event_compare(a, b);
}

static int compare_times(const void *a, const void *b)
{
    return vrep_index_time_compare(a, b);
}

static int merge_entries(struct merge *merge, bool shorts)
{
    start(merge, sizeof(struct vrep_index_entry), compare_entries);
    for (size_t i = 0; i < merge->count; i++) {
        const struct vrep_index_tree *tree =
            shorts ? &merge->indexes[i]->shorts : &merge->indexes[i]->longs;
        start_input(merge, i, tree->entries, tree->count);
    }
    heapify(merge);
    while (merge->heaped > 0) {
        size_t which = merge->heap[0];
        const struct vrep_index *index = merge->indexes[which];
        struct vrep_index_entry entry;
        int status;

        memcpy(&entry, merge->sources[which].next, sizeof entry);
        status = vrep_index_entry_check(index, shorts ? &index->shorts : &index->longs, &entry);
        if (status == VREP_OK) {
            entry.stream = row(merge, which, entry.stream);
            status = shorts ? vrep_index_writer_short(merge->writer, &entry)
                            : vrep_index_writer_long(merge->writer, &entry);
        }
        if (status == VREP_OK)
            status = advance(merge);
        if (status != VREP_OK)
            return status;
    }
    return shorts ? vrep_index_writer_shorts_end(merge->writer)
                  : vrep_index_writer_longs_end(merge->writer);
}

static int merge_events(struct merge *merge)
{
    start(merge, sizeof(struct vrep_index_event), compare_events);
    for (size_t i = 0; i < merge->count; i++)
        start_input(merge, i, merge->indexes[i]->events, merge->indexes[i]->trailer.events_count);
    heapify(merge);
    while (merge->heaped > 0) {
        size_t which = merge->heap[0];
        struct vrep_index_event event;
        int status = VREP_E_CORRUPT;

        memcpy(&event, merge->sources[which].next, sizeof event);
        if (event.stream < merge->indexes[which]->trailer.streams_count) {
            event.stream = row(merge, which, event.stream);
            status = vrep_index_writer_event(merge->writer, &event);
        }
        if (status == VREP_OK)
            status = advance(merge);
        if (status != VREP_OK)
            return status;
    }
    return vrep_index_writer_events_end(merge->writer);
}

static int merge_times(struct merge *merge)
{
    start(merge, sizeof(struct vrep_index_time), compare_times);
    for (size_t i = 0; i < merge->count; i++)
        start_input(merge, i, merge->indexes[i]->times, merge->indexes[i]->trailer.times_count);
    heapify(merge);
    while (merge->heaped > 0) {
        struct vrep_index_time time;
        int status;

        memcpy(&time, merge->sources[merge->heap[0]].next, sizeof time);
        status = vrep_index_writer_time(merge->writer, &time);
        if (status == VREP_OK)
            status = advance(merge);
        if (status != VREP_OK)
            return status;
    }
    return VREP_OK;
}

/* What was merged must be what the inputs' trailers say: damage is not passed on. */
static int check_digests(struct merge *merge, bool shorts)
{
    for (size_t i = 0; i < merge->count; i++) {
        const struct vrep_index_trailer *trailer = &merge->indexes[i]->trailer;
        uint8_t digest[VREP_DIGEST_BYTES];

        vrep_digest_final(&merge->sources[i].digest, digest);
        if (memcmp(digest, shorts ? trailer->short_digest : trailer->rest_digest, sizeof digest))
            return VREP_E_CORRUPT;
    }
    return VREP_OK;
}

static int merge_all(struct merge *merge)
{
    int status;

    for (size_t i = 0; i < merge->count; i++)
        vrep_digest_init(&merge->sources[i].digest);
    status = merge_entries(merge, true);
    if (status == VREP_OK)
        status = check_digests(merge, true);
    for (size_t i = 0; i < merge->count; i++)
        vrep_digest_init(&merge->sources[i].digest);
    if (status == VREP_OK)
        status = merge_entries(merge, false);
    for (size_t i = 0; i < merge->count; i++)
        vrep_digest_update(&merge->sources[i].digest, merge->indexes[i]->streams,
                           merge->indexes[i]->trailer.streams_count *
                               sizeof(struct vrep_index_stream));
    if (status == VREP_OK)
        status = vrep_index_writer_streams(merge->writer, merge->streams.streams);
    if (status == VREP_OK)
        status = merge_events(merge);
    if (status == VREP_OK)
        status = merge_times(merge);
    if (status == VREP_OK)
        status = check_digests(merge, false);
    return status == VREP_OK ? vrep_index_writer_finish(merge->writer) : status;
}

static bool earlier(const struct vrep_position *a, const struct vrep_position *b)
{
    return vrep_index_version_compare(a->epoch, a->seq, b->epoch, b->seq) < 0;
}

/* Counts and bounds of the run; VREP_E_INVALID when the inputs are of several groups. */
static int sum_up(const struct merge *merge, struct vrep_index_trailer *run)
{
    bool any = false;

    memcpy(run->group_id, merge->indexes[0]->trailer.group_id, sizeof run->group_id);
    for (size_t i = 0; i < merge->count; i++) {
        const struct vrep_index_trailer *one = &merge->indexes[i]->trailer;

        if (memcmp(one->group_id, run->group_id, sizeof run->group_id) != 0)
            return VREP_E_INVALID;
        run->short_count += one->short_count;
        run->long_count += one->long_count;
        run->events_count += one->events_count;
        run->times_count += one->times_count;
        run->data_bytes += one->data_bytes;
        if (one->last.seq == 0)
            continue;
        if (!any || earlier(&one->first, &run->first))
            run->first = one->first;
        if (!any || earlier(&run->last, &one->last))
            run->last = one->last;
        if (!any || one->wall_first_ns < run->wall_first_ns)
            run->wall_first_ns = one->wall_first_ns;
        if (one->wall_last_ns > run->wall_last_ns)
            run->wall_last_ns = one->wall_last_ns;
        any = true;
    }
    return VREP_OK;
}

int vrep_index_merge(const struct vrep_index *const *indexes, size_t count, uint32_t level, int fd,
                     struct vrep_index_trailer *trailer)
{
    struct merge merge = {.indexes = indexes, .count = count};
    int status;

    memset(trailer, 0, sizeof *trailer);
    if (count == 0 || count > VREP_INDEX_MERGE_MAX || fd < 0)
        return VREP_E_INVALID;
    trailer->level = level;
    status = sum_up(&merge, trailer);
    if (status == VREP_OK)
        status = vrep_index_streams_unite(&merge.streams, indexes, count);
    if (status != VREP_OK)
        return status;
    trailer->streams_count = merge.streams.count;
    merge.sources = calloc(count, sizeof *merge.sources);
    merge.heap = calloc(count, sizeof *merge.heap);
    merge.writer = malloc(sizeof *merge.writer);
    if (merge.streams.count > VREP_INDEX_STREAMS_MAX)
        status = VREP_E_FULL;
    else if (merge.sources == NULL || merge.heap == NULL || merge.writer == NULL)
        status = VREP_E_NOMEM;
    else
        status = vrep_index_writer_begin(merge.writer, fd, 0, trailer);
    if (status == VREP_OK) {
        status = merge_all(&merge);
        *trailer = merge.writer->trailer;
        vrep_index_writer_free(merge.writer);
    }
    free(merge.writer);
    free(merge.heap);
    free(merge.sources);
    vrep_index_streams_free(&merge.streams);
    return status;
}
