#include "map/writer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "format/checksum.h"

enum { ALIGN = 64 };

uint32_t vrep_index_tree_shape(uint64_t count, uint64_t nodes[VREP_INDEX_LEVELS_MAX])
{
    uint32_t levels = 0;

    while (count > 0 && levels < VREP_INDEX_LEVELS_MAX) {
        count = count / VREP_INDEX_FANOUT + (count % VREP_INDEX_FANOUT != 0);
        nodes[levels++] = count;
        if (count == 1)
            break;
    }
    return levels;
}

static void widen(struct vrep_index_node *node, uint32_t epoch_low, uint64_t seq_low,
                  uint32_t epoch_high, uint64_t seq_high, uint64_t end)
{
    if (vrep_index_version_compare(epoch_low, seq_low, node->epoch_low, node->seq_low) < 0) {
        node->epoch_low = epoch_low;
        node->seq_low = seq_low;
    }
    if (vrep_index_version_compare(epoch_high, seq_high, node->epoch_high, node->seq_high) > 0) {
        node->epoch_high = epoch_high;
        node->seq_high = seq_high;
    }
    if (end > node->end)
        node->end = end;
}

void vrep_index_node_over_entries(const struct vrep_index_entry *entries, size_t count,
                                  struct vrep_index_node *node)
{
    memset(node, 0, sizeof *node);
    node->offset = entries[0].offset;
    node->disk_first = entries[0].disk;
    node->disk_last = entries[count - 1].disk;
    node->epoch_low = entries[0].epoch;
    node->seq_low = entries[0].seq;
    for (size_t i = 0; i < count; i++)
        widen(node, entries[i].epoch, entries[i].seq, entries[i].epoch, entries[i].seq,
              entries[i].offset + entries[i].length);
    node->checksum = vrep_checksum32(entries, count * sizeof *entries);
}

void vrep_index_node_over_nodes(const struct vrep_index_node *nodes, size_t count,
                                struct vrep_index_node *node)
{
    memset(node, 0, sizeof *node);
    node->offset = nodes[0].offset;
    node->disk_first = nodes[0].disk_first;
    node->disk_last = nodes[count - 1].disk_last;
    node->epoch_low = nodes[0].epoch_low;
    node->seq_low = nodes[0].seq_low;
    for (size_t i = 0; i < count; i++)
        widen(node, nodes[i].epoch_low, nodes[i].seq_low, nodes[i].epoch_high, nodes[i].seq_high,
              nodes[i].end);
    node->checksum = vrep_checksum32(nodes, count * sizeof *nodes);
}

/* Lays one array out after *at; VREP_E_RANGE when the file would be too large. */
static int place(uint64_t *at, uint64_t count, size_t size, uint64_t *placed)
{
    uint64_t begin = (*at + ALIGN - 1) / ALIGN * ALIGN;

    if (count > ((uint64_t)INT64_MAX - begin - ALIGN) / size)
        return VREP_E_RANGE;
    *placed = begin;
    *at = begin + count * size;
    return VREP_OK;
}

static int lay_out(struct vrep_index_writer *writer)
{
    struct vrep_index_trailer *trailer = &writer->trailer;
    uint64_t nodes[VREP_INDEX_LEVELS_MAX], at = writer->base, count = 0;
    int status = VREP_OK;

    for (uint32_t level = vrep_index_tree_shape(trailer->long_count, nodes); level-- > 0;)
        count += nodes[level];
    for (uint32_t level = vrep_index_tree_shape(trailer->short_count, nodes); level-- > 0;)
        count += nodes[level];
    trailer->nodes_count = count;
    if (status == VREP_OK)
        status =
            place(&at, trailer->short_count, sizeof(struct vrep_index_entry), &trailer->short_at);
    if (status == VREP_OK)
        status =
            place(&at, trailer->long_count, sizeof(struct vrep_index_entry), &trailer->long_at);
    if (status == VREP_OK)
        status = place(&at, trailer->streams_count, sizeof(struct vrep_index_stream),
                       &trailer->streams_at);
    if (status == VREP_OK)
        status =
            place(&at, trailer->events_count, sizeof(struct vrep_index_event), &trailer->events_at);
    if (status == VREP_OK)
        status =
            place(&at, trailer->times_count, sizeof(struct vrep_index_time), &trailer->times_at);
    if (status == VREP_OK)
        status =
            place(&at, trailer->nodes_count, sizeof(struct vrep_index_node), &trailer->nodes_at);
    if (status == VREP_OK)
        status = place(&at, 1, sizeof *trailer, &writer->end);
    writer->end += sizeof *trailer;
    return status;
}

static int put(struct vrep_index_writer *writer, const void *bytes, size_t len, uint64_t at)
{
    const uint8_t *from = bytes;

    if (writer->fd < 0) {
        memcpy(writer->room + (at - writer->base), bytes, len);
        return VREP_OK;
    }
    while (len > 0) {
        ssize_t done = pwrite(writer->fd, from, len, (off_t)at);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return vrep_status_from_errno(errno);
        if (done == 0)
            return VREP_E_IO;
        from += done;
        at += (uint64_t)done;
        len -= (size_t)done;
    }
    return VREP_OK;
}

static int flush(struct vrep_index_writer *writer)
{
    int status = VREP_OK;

    vrep_digest_update(&writer->digest, writer->buffer, writer->buffered);
    if (writer->buffered > 0)
        status = put(writer, writer->buffer, writer->buffered, writer->at);
    writer->at += writer->buffered;
    writer->buffered = 0;
    return status;
}

static int append(struct vrep_index_writer *writer, const void *bytes, size_t len)
{
    const uint8_t *from = bytes;

    while (len > 0) {
        size_t some = VREP_INDEX_WRITER_BUFFER - writer->buffered;
        if (some > len)
            some = len;
        memcpy(writer->buffer + writer->buffered, from, some);
        writer->buffered += some;
        from += some;
        len -= some;
        if (writer->buffered == VREP_INDEX_WRITER_BUFFER) {
            int status = flush(writer);
            if (status != VREP_OK)
                return status;
        }
    }
    return VREP_OK;
}

static uint64_t short_nodes_at(const struct vrep_index_trailer *trailer)
{
    uint64_t nodes[VREP_INDEX_LEVELS_MAX], at = trailer->nodes_at;

    for (uint32_t level = vrep_index_tree_shape(trailer->long_count, nodes); level-- > 0;)
        at += nodes[level] * sizeof(struct vrep_index_node);
    return at;
}

/* Makes ready for a tree whose lowest level stands at `at`. */
static void begin_tree(struct vrep_index_writer *writer, uint64_t count, uint64_t at)
{
    uint64_t nodes[VREP_INDEX_LEVELS_MAX];

    writer->levels = vrep_index_tree_shape(count, nodes);
    for (uint32_t level = 0; level < writer->levels; level++) {
        writer->level_at[level] = at;
        writer->pending[level] = 0;
        at += nodes[level] * sizeof(struct vrep_index_node);
    }
    writer->neighbours = 0;
}

int vrep_index_writer_begin(struct vrep_index_writer *writer, int fd, uint64_t base,
                            const struct vrep_index_trailer *trailer)
{
    int status;

    memset(writer, 0, sizeof *writer);
    writer->fd = fd;
    writer->base = base;
    writer->trailer = *trailer;
    status = lay_out(writer);
    if (status != VREP_OK)
        return status;
    writer->buffer = malloc(VREP_INDEX_WRITER_BUFFER);
    if (fd < 0)
        writer->room = calloc(1, (size_t)(writer->end - base));
    if (writer->buffer == NULL || (fd < 0 && writer->room == NULL)) {
        vrep_index_writer_free(writer);
        return VREP_E_NOMEM;
    }
    writer->at = writer->trailer.short_at;
    vrep_digest_init(&writer->digest);
    begin_tree(writer, writer->trailer.short_count, short_nodes_at(&writer->trailer));
    return VREP_OK;
}

void vrep_index_writer_free(struct vrep_index_writer *writer)
{
    free(writer->buffer);
    free(writer->room);
    writer->buffer = NULL;
    writer->room = NULL;
}

/* Nodes wait at their level until their parent is known; then they are written. */
static int level_up(struct vrep_index_writer *writer, uint32_t level,
                    const struct vrep_index_node *node);

static int close_level(struct vrep_index_writer *writer, uint32_t level)
{
    struct vrep_index_node *nodes = writer->nodes[level], parent;
    uint32_t count = writer->pending[level];
    int status = put(writer, nodes, count * sizeof *nodes, writer->level_at[level]);

    if (status != VREP_OK)
        return status;
    writer->level_at[level] += count * sizeof *nodes;
    writer->pending[level] = 0;
    if (level + 1 == writer->levels)
        return VREP_OK;
    vrep_index_node_over_nodes(nodes, count, &parent);
    return level_up(writer, level + 1, &parent);
}

static int level_up(struct vrep_index_writer *writer, uint32_t level,
                    const struct vrep_index_node *node)
{
    writer->nodes[level][writer->pending[level]++] = *node;
    return writer->pending[level] == VREP_INDEX_FANOUT ? close_level(writer, level) : VREP_OK;
}

static int close_neighbours(struct vrep_index_writer *writer)
{
    struct vrep_index_node node;
    int status = append(writer, writer->entries, writer->neighbours * sizeof writer->entries[0]);

    if (status != VREP_OK)
        return status;
    vrep_index_node_over_entries(writer->entries, writer->neighbours, &node);
    writer->neighbours = 0;
    return level_up(writer, 0, &node);
}

static int tree_entry(struct vrep_index_writer *writer, const struct vrep_index_entry *entry)
{
    writer->entries[writer->neighbours++] = *entry;
    return writer->neighbours == VREP_INDEX_FANOUT ? close_neighbours(writer) : VREP_OK;
}

/* Ends every level; *root becomes the checksum of the root. */
static int end_tree(struct vrep_index_writer *writer, uint32_t *root)
{
    int status = VREP_OK;

    *root = 0;
    if (writer->neighbours > 0)
        status = close_neighbours(writer);
    for (uint32_t level = 0; level < writer->levels && status == VREP_OK; level++) {
        /* the one node of the highest level waits there: nothing closed that level */
        if (level + 1 == writer->levels)
            *root = vrep_checksum32(writer->nodes[level], sizeof writer->nodes[level][0]);
        if (writer->pending[level] > 0)
            status = close_level(writer, level);
    }
    return status;
}

/* Ends one array; the next one begins at `at`. */
static int next_array(struct vrep_index_writer *writer, uint64_t at)
{
    int status = flush(writer);

    writer->at = at;
    return status;
}

int vrep_index_writer_short(struct vrep_index_writer *writer, const struct vrep_index_entry *entry)
{
    return tree_entry(writer, entry);
}

int vrep_index_writer_shorts_end(struct vrep_index_writer *writer)
{
    struct vrep_index_trailer *trailer = &writer->trailer;
    int status = end_tree(writer, &trailer->short_root);

    if (status == VREP_OK)
        status = next_array(writer, trailer->long_at);
    vrep_digest_final(&writer->digest, trailer->short_digest);
    vrep_digest_init(&writer->digest);
    begin_tree(writer, trailer->long_count, trailer->nodes_at);
    return status;
}

int vrep_index_writer_long(struct vrep_index_writer *writer, const struct vrep_index_entry *entry)
{
    return tree_entry(writer, entry);
}

int vrep_index_writer_longs_end(struct vrep_index_writer *writer)
{
    int status = end_tree(writer, &writer->trailer.long_root);

    return status == VREP_OK ? next_array(writer, writer->trailer.streams_at) : status;
}

int vrep_index_writer_streams(struct vrep_index_writer *writer,
                              const struct vrep_index_stream *streams)
{
    size_t bytes = writer->trailer.streams_count * sizeof *streams;
    int status = append(writer, streams, bytes);

    writer->trailer.streams_checksum = vrep_checksum32(streams, bytes);
    vrep_digest_init(&writer->events);
    return status == VREP_OK ? next_array(writer, writer->trailer.events_at) : status;
}

int vrep_index_writer_event(struct vrep_index_writer *writer, const struct vrep_index_event *event)
{
    vrep_digest_update(&writer->events, event, sizeof *event);
    return append(writer, event, sizeof *event);
}

int vrep_index_writer_events_end(struct vrep_index_writer *writer)
{
    uint8_t digest[VREP_DIGEST_BYTES];

    vrep_digest_final(&writer->events, digest);
    memcpy(&writer->trailer.events_checksum, digest, sizeof writer->trailer.events_checksum);
    return next_array(writer, writer->trailer.times_at);
}

int vrep_index_writer_time(struct vrep_index_writer *writer, const struct vrep_index_time *time)
{
    return append(writer, time, sizeof *time);
}

int vrep_index_writer_finish(struct vrep_index_writer *writer)
{
    struct vrep_index_trailer *trailer = &writer->trailer;
    int status = flush(writer);

    if (status != VREP_OK)
        return status;
    vrep_digest_final(&writer->digest, trailer->rest_digest);
    trailer->magic = VREP_INDEX_MAGIC;
    trailer->version = VREP_INDEX_VERSION;
    trailer->trailer_bytes = sizeof *trailer;
    trailer->checksum = vrep_checksum32(trailer, offsetof(struct vrep_index_trailer, checksum));
    return put(writer, trailer, sizeof *trailer, writer->end - sizeof *trailer);
}
