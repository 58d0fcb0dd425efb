#include "map/streams.h"

#include <stdlib.h>
#include <string.h>

struct ref {
    const struct vrep_index_stream *stream;
    uint32_t row;    /* in `rows` */
    uint32_t merged; /* 0-based number of its id */
};

static int by_id(const void *a, const void *b)
{
    const struct ref *left = a, *right = b;

    return memcmp(left->stream->stream_id, right->stream->stream_id,
                  sizeof left->stream->stream_id);
}

static int by_order(const void *a, const void *b)
{
    const struct vrep_index_stream *left = ((const struct ref *)a)->stream;
    const struct vrep_index_stream *right = ((const struct ref *)b)->stream;
    int order =
        vrep_index_version_compare(left->epoch, left->first_seq, right->epoch, right->first_seq);

    return order != 0 ? order : memcmp(left->stream_id, right->stream_id, sizeof left->stream_id);
}

static bool same(const struct vrep_index_stream *a, const struct vrep_index_stream *b)
{
    return a->epoch == b->epoch && a->key_generation == b->key_generation &&
           memcmp(a->epoch_id, b->epoch_id, sizeof a->epoch_id) == 0;
}

/* refs[0..count) sorted by id; keeps of each id the ref with the lowest first_seq in heads[]. */
static int number_ids(struct ref *refs, size_t count, struct ref *heads, uint32_t *merged)
{
    *merged = 0;
    for (size_t i = 0; i < count; i++) {
        struct ref *head = *merged > 0 ? &heads[*merged - 1] : NULL;
        if (head == NULL || by_id(head, &refs[i]) != 0) {
            heads[*merged] = refs[i];
            heads[*merged].merged = *merged;
            head = &heads[(*merged)++];
        } else if (!same(head->stream, refs[i].stream)) {
            return VREP_E_CORRUPT;
        } else if (refs[i].stream->first_seq < head->stream->first_seq) {
            head->stream = refs[i].stream;
        }
        refs[i].merged = head->merged;
    }
    return VREP_OK;
}

static int unite(struct vrep_index_streams *all, struct ref *refs, struct ref *heads,
                 uint32_t *places, size_t total)
{
    int status;

    if (total > 0)
        qsort(refs, total, sizeof *refs, by_id);
    status = number_ids(refs, total, heads, &all->count);
    if (status != VREP_OK)
        return status;
    if (all->count > 0)
        qsort(heads, all->count, sizeof *heads, by_order);
    for (uint32_t i = 0; i < all->count; i++) {
        all->streams[i] = *heads[i].stream;
        places[heads[i].merged] = i;
    }
    for (size_t i = 0; i < total; i++)
        all->rows[refs[i].row] = places[refs[i].merged];
    return VREP_OK;
}

int vrep_index_streams_unite(struct vrep_index_streams *all,
                             const struct vrep_index *const *indexes, size_t count)
{
    struct ref *refs, *heads;
    uint32_t *places;
    uint64_t total = 0;
    size_t done = 0;
    int status = VREP_E_NOMEM;

    memset(all, 0, sizeof *all);
    for (size_t i = 0; i < count; i++)
        total += indexes[i]->trailer.streams_count;
    if (total > UINT32_MAX)
        return VREP_E_FULL;
    refs = calloc(total + 1, sizeof *refs);
    heads = calloc(total + 1, sizeof *heads);
    places = calloc(total + 1, sizeof *places);
    all->streams = calloc(total + 1, sizeof *all->streams);
    all->rows = calloc(total + 1, sizeof *all->rows);
    all->rows_at = calloc(count + 1, sizeof *all->rows_at);
    if (refs != NULL && heads != NULL && places != NULL && all->streams != NULL &&
        all->rows != NULL && all->rows_at != NULL) {
        for (size_t i = 0; i < count; i++) {
            all->rows_at[i] = done;
            for (uint64_t row = 0; row < indexes[i]->trailer.streams_count; row++, done++)
                refs[done] =
                    (struct ref){.stream = &indexes[i]->streams[row], .row = (uint32_t)done};
        }
        all->rows_at[count] = done;
        status = unite(all, refs, heads, places, done);
    }
    free(refs);
    free(heads);
    free(places);
    if (status != VREP_OK)
        vrep_index_streams_free(all);
    return status;
}

void vrep_index_streams_free(struct vrep_index_streams *all)
{
    free(all->streams);
    free(all->rows);
    free(all->rows_at);
    memset(all, 0, sizeof *all);
}
