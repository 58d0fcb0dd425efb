#include <stdlib.h>
#include <string.h>

#include "format/record.h"
#include "map/writer.h"

/* A growing array of one struct. */
struct list {
    void *items;
    size_t count;
    size_t room;
    size_t size;
};

struct vrep_index_builder {
    struct list shorts, longs, streams, events, times;
    struct vrep_index_summary summary;
    uint64_t wall_first_ns;
    uint64_t wall_last_ns;
    uint64_t aged_ns;
    uint32_t segment;
    uint16_t stream; /* row in force, when summary.has_stream */
    uint8_t group_id[16];
    bool has_lane;
    uint16_t lane; /* of the first record; entries have none, so there is one */
};

static void *list_add(struct list *list)
{
    if (list->count == list->room) {
        size_t room = list->room ? list->room * 2 : 64;
        void *items = room > SIZE_MAX / list->size ? NULL : realloc(list->items, room * list->size);
        if (items == NULL)
            return NULL;
        list->items = items;
        list->room = room;
    }
    return (uint8_t *)list->items + list->count++ * list->size;
}

int vrep_index_builder_new(uint32_t segment, const uint8_t group_id[16],
                           const struct vrep_index_stream *stream, struct vrep_index_builder **out)
{
    struct vrep_index_builder *builder;

    *out = NULL;
    if (segment == 0)
        return VREP_E_INVALID;
    builder = calloc(1, sizeof *builder);
    if (builder == NULL)
        return VREP_E_NOMEM;
    builder->segment = segment;
    memcpy(builder->group_id, group_id, sizeof builder->group_id);
    builder->shorts.size = builder->longs.size = sizeof(struct vrep_index_entry);
    builder->streams.size = sizeof(struct vrep_index_stream);
    builder->events.size = sizeof(struct vrep_index_event);
    builder->times.size = sizeof(struct vrep_index_time);
    if (stream != NULL) {
        struct vrep_index_stream *row = list_add(&builder->streams);
        if (row == NULL) {
            vrep_index_builder_free(builder);
            return VREP_E_NOMEM;
        }
        *row = *stream;
        builder->summary.has_stream = true;
        builder->summary.stream = *stream;
    }
    *out = builder;
    return VREP_OK;
}

void vrep_index_builder_free(struct vrep_index_builder *builder)
{
    if (builder == NULL)
        return;
    free(builder->shorts.items);
    free(builder->longs.items);
    free(builder->streams.items);
    free(builder->events.items);
    free(builder->times.items);
    free(builder);
}

static int add_stream(struct vrep_index_builder *builder, const uint8_t *body)
{
    const struct vrep_index_stream *last =
        builder->streams.count > 0
            ? (const struct vrep_index_stream *)builder->streams.items + builder->streams.count - 1
            : NULL;
    struct vrep_index_stream row = {0}, *added;
    struct vrep_stream stream;

    memcpy(&stream, body, sizeof stream);
    memcpy(row.stream_id, stream.stream_id, sizeof row.stream_id);
    memcpy(row.epoch_id, stream.epoch_id, sizeof row.epoch_id);
    row.epoch = stream.epoch;
    row.key_generation = stream.key_generation;
    row.first_seq = stream.resume_seq + 1;
    builder->summary.has_stream = true;
    builder->summary.stream = row;
    if (last != NULL && memcmp(last, &row, sizeof row) == 0)
        return VREP_OK;
    if (builder->streams.count >= VREP_INDEX_STREAMS_MAX)
        return VREP_E_FULL;
    added = list_add(&builder->streams);
    if (added == NULL)
        return VREP_E_NOMEM;
    *added = row;
    builder->stream = (uint16_t)(builder->streams.count - 1);
    return VREP_OK;
}

static int add_entry(struct vrep_index_builder *builder, const struct vrep_record *record,
                     uint64_t position, uint16_t piece, uint64_t offset, uint32_t length)
{
    struct list *list = length <= VREP_PIECE_BYTES_MAX ? &builder->shorts : &builder->longs;
    struct vrep_index_entry *entry = list_add(list);

    if (entry == NULL)
        return VREP_E_NOMEM;
    *entry = (struct vrep_index_entry){
        .offset = offset,
        .seq = record->seq,
        .length = length,
        .epoch = record->epoch,
        .segment = builder->segment,
        .position = (uint32_t)position,
        .disk = record->disk,
        .piece = piece,
        .kind = record->kind,
        .stream = builder->stream,
    };
    builder->summary.entries++;
    builder->summary.data_bytes += length;
    return VREP_OK;
}

static int add_event(struct vrep_index_builder *builder, const struct vrep_record *record,
                     uint64_t position)
{
    struct vrep_index_event *event = list_add(&builder->events);

    if (event == NULL)
        return VREP_E_NOMEM;
    *event = (struct vrep_index_event){
        .at = {.epoch = record->epoch, .lane = record->lane, .seq = record->seq},
        .wall_ns = record->wall_ns,
        .segment = builder->segment,
        .position = (uint32_t)position,
        .kind = record->kind,
        .stream = builder->stream,
    };
    return VREP_OK;
}

static bool of_this_lane(struct vrep_index_builder *builder, uint16_t lane)
{
    if (!builder->has_lane)
        builder->lane = lane;
    builder->has_lane = true;
    return lane == builder->lane;
}

static void note_position(struct vrep_index_builder *builder, const struct vrep_record *record)
{
    struct vrep_index_summary *summary = &builder->summary;
    struct vrep_position at = {.epoch = record->epoch, .lane = record->lane, .seq = record->seq};

    if (summary->records == 0 ||
        vrep_index_version_compare(at.epoch, at.seq, summary->first.epoch, summary->first.seq) < 0)
        summary->first = at;
    if (summary->records == 0 ||
        vrep_index_version_compare(at.epoch, at.seq, summary->last.epoch, summary->last.seq) > 0)
        summary->last = at;
    if (summary->records == 0 || record->wall_ns < builder->wall_first_ns)
        builder->wall_first_ns = record->wall_ns;
    if (record->wall_ns > builder->wall_last_ns)
        builder->wall_last_ns = record->wall_ns;
    summary->records++;
}

static int add_record(struct vrep_index_builder *builder, const struct vrep_record *record,
                      const uint8_t *bytes, uint64_t position)
{
    uint32_t done = 0;
    int status = VREP_OK;

    if (!of_this_lane(builder, record->lane))
        return VREP_E_UNSUPPORTED;
    if (record->kind == VREP_KIND_STREAM)
        return add_stream(builder, bytes + sizeof *record);
    if (!builder->summary.has_stream || builder->summary.stream.epoch != record->epoch)
        return VREP_E_CORRUPT;
    switch (record->kind) {
    case VREP_KIND_WRITE:
    case VREP_KIND_SYNC:
        for (uint16_t piece = 0; done < record->length && status == VREP_OK; piece++) {
            uint32_t plain = record->length - done;
            if (plain > VREP_PIECE_BYTES_MAX)
                plain = VREP_PIECE_BYTES_MAX;
            status = add_entry(builder, record, position, piece, record->offset + done, plain);
            done += plain;
        }
        break;
    case VREP_KIND_ZEROES:
    case VREP_KIND_SYNC_ZEROES:
        status = add_entry(builder, record, position, 0, record->offset, record->length);
        break;
    case VREP_KIND_TALLY:
        return VREP_OK;
    default:
        status = add_event(builder, record, position);
    }
    if (status == VREP_OK)
        note_position(builder, record);
    return status;
}

int vrep_index_builder_add(struct vrep_index_builder *builder, const void *buffer, size_t len,
                           uint64_t position, uint64_t *records)
{
    struct vrep_record_found found[64];
    const uint8_t *bytes = buffer;
    size_t at = 0, count, consumed;

    *records = 0;
    if (position > UINT32_MAX || len > UINT32_MAX - position)
        return VREP_E_RANGE;
    while (at < len) {
        int status = vrep_record_scan(bytes + at, len - at, NULL, found,
                                      sizeof found / sizeof found[0], &count, &consumed);
        for (size_t i = 0; i < count; i++) {
            int added = add_record(builder, &found[i].header, bytes + at + found[i].position,
                                   position + at + found[i].position);
            if (added != VREP_OK)
                return added;
            (*records)++;
        }
        if (status != VREP_OK)
            return status;
        if (count == 0)
            return VREP_E_TORN;
        at += consumed;
    }
    return VREP_OK;
}

int vrep_index_builder_time(struct vrep_index_builder *builder, uint64_t wall_ns,
                            struct vrep_position at)
{
    struct vrep_index_time *time;

    if (!of_this_lane(builder, at.lane))
        return VREP_E_UNSUPPORTED;
    time = list_add(&builder->times);
    if (time == NULL)
        return VREP_E_NOMEM;
    at.reserved = 0;
    *time = (struct vrep_index_time){.wall_ns = wall_ns, .at = at};
    return VREP_OK;
}

void vrep_index_builder_summary(const struct vrep_index_builder *builder,
                                struct vrep_index_summary *out)
{
    *out = builder->summary;
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

static void sort(struct list *list, int (*compare)(const void *, const void *))
{
    if (list->count > 1)
        qsort(list->items, list->count, list->size, compare);
}

static int write_all(const struct vrep_index_builder *builder, struct vrep_index_writer *writer)
{
    const struct vrep_index_entry *shorts = builder->shorts.items, *longs = builder->longs.items;
    const struct vrep_index_event *events = builder->events.items;
    const struct vrep_index_time *times = builder->times.items;
    int status = VREP_OK;

    for (size_t i = 0; i < builder->shorts.count && status == VREP_OK; i++)
        status = vrep_index_writer_short(writer, &shorts[i]);
    if (status == VREP_OK)
        status = vrep_index_writer_shorts_end(writer);
    for (size_t i = 0; i < builder->longs.count && status == VREP_OK; i++)
        status = vrep_index_writer_long(writer, &longs[i]);
    if (status == VREP_OK)
        status = vrep_index_writer_longs_end(writer);
    if (status == VREP_OK)
        status = vrep_index_writer_streams(writer, builder->streams.items);
    for (size_t i = 0; i < builder->events.count && status == VREP_OK; i++)
        status = vrep_index_writer_event(writer, &events[i]);
    if (status == VREP_OK)
        status = vrep_index_writer_events_end(writer);
    for (size_t i = 0; i < builder->times.count && status == VREP_OK; i++)
        status = vrep_index_writer_time(writer, &times[i]);
    return status == VREP_OK ? vrep_index_writer_finish(writer) : status;
}

void vrep_index_builder_aged(struct vrep_index_builder *builder, uint64_t aged_ns)
{
    builder->aged_ns = aged_ns;
}

int vrep_index_builder_finish(struct vrep_index_builder *builder, uint64_t segment_bytes,
                              uint8_t **out, size_t *out_len)
{
    struct vrep_index_trailer trailer = {
        .segment = builder->segment,
        .short_count = builder->shorts.count,
        .long_count = builder->longs.count,
        .streams_count = builder->streams.count,
        .events_count = builder->events.count,
        .times_count = builder->times.count,
        .first = builder->summary.first,
        .last = builder->summary.last,
        .data_bytes = builder->summary.data_bytes,
        .segment_bytes = segment_bytes,
        .wall_first_ns = builder->wall_first_ns,
        .wall_last_ns = builder->wall_last_ns,
        .aged_ns = builder->aged_ns,
    };
    struct vrep_index_writer *writer;
    int status;

    *out = NULL;
    *out_len = 0;
    if (segment_bytes % 64 != 0 || segment_bytes > UINT32_MAX)
        return VREP_E_INVALID;
    memcpy(trailer.group_id, builder->group_id, sizeof trailer.group_id);
    sort(&builder->shorts, compare_entries);
    sort(&builder->longs, compare_entries);
    sort(&builder->events, compare_events);
    sort(&builder->times, compare_times);
    writer = malloc(sizeof *writer);
    if (writer == NULL)
        return VREP_E_NOMEM;
    status = vrep_index_writer_begin(writer, -1, segment_bytes, &trailer);
    if (status == VREP_OK) {
        status = write_all(builder, writer);
        if (status == VREP_OK) {
            *out = writer->room;
            *out_len = (size_t)(writer->end - segment_bytes);
            writer->room = NULL;
        }
        vrep_index_writer_free(writer);
    }
    free(writer);
    return status;
}
