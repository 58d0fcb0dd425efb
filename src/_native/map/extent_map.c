#include "map/extent_map.h"

#include <stdlib.h>
#include <string.h>

#include "map/streams.h"

/* A lookup works on a window of the range that falls into at most so many fragments;
 * a window of so many bytes can never fall into more. */
#define FRAGMENTS 1024u
#define WINDOW_START (4u << 20)
#define WINDOW_MAX (UINT64_C(1) << 44)
/* Nodes read ahead when a map is made: those of 20 million entries. */
#define PREFETCH_BYTES (16u << 20)
/* Groups of entries of one tree that a scattered lookup asks for at once. */
#define AHEAD_MAX 8u

struct version {
    uint64_t seq;
    uint32_t epoch;
};

/* One tree of one index that holds something visible. */
struct part {
    const struct vrep_index *index;
    const struct vrep_index_tree *tree;
    struct version bound; /* nothing visible in it is newer */
    size_t which;
};

struct vrep_extent_map {
    struct part *parts; /* the newest bound first */
    size_t parts_count;
    struct vrep_reign *reigns; /* by epoch */
    size_t reigns_count;
    struct vrep_index_streams streams;
    bool scattered;
};

/* The newest entry found so far for the bytes from `start` to the next fragment. */
struct fragment {
    uint64_t start;
    uint64_t seq;
    const struct vrep_index_entry *entry; /* NULL: none */
    uint32_t epoch;
    uint32_t which; /* index of the entry */
};

struct search {
    const struct vrep_extent_map *map;
    uint32_t disk;
    uint32_t count;
    uint64_t begin;
    uint64_t end;
    struct fragment fragments[FRAGMENTS];
};

static int compare(struct version a, struct version b)
{
    return vrep_index_version_compare(a.epoch, a.seq, b.epoch, b.seq);
}

/* The largest visible version within [low, high]; false when there can be none. */
static bool newest_visible(const struct vrep_extent_map *map, struct version low,
                           struct version high, struct version *newest)
{
    for (size_t i = map->reigns_count; i-- > 0;) {
        const struct vrep_reign *reign = &map->reigns[i];
        if (reign->epoch > high.epoch)
            continue;
        newest->epoch = reign->epoch;
        newest->seq = reign->seq_max;
        if (compare(*newest, high) > 0)
            *newest = high;
        if (newest->seq == 0)
            continue;
        return compare(*newest, low) >= 0;
    }
    return false;
}

static bool visible(const struct vrep_extent_map *map, const struct vrep_index_entry *entry)
{
    for (size_t i = map->reigns_count; i-- > 0;)
        if (map->reigns[i].epoch == entry->epoch)
            return entry->seq <= map->reigns[i].seq_max;
    return false;
}

static bool node_visible(const struct vrep_extent_map *map, const struct vrep_index_node *node,
                         struct version *newest)
{
    struct version low = {.seq = node->seq_low, .epoch = node->epoch_low};
    struct version high = {.seq = node->seq_high, .epoch = node->epoch_high};

    return newest_visible(map, low, high, newest);
}

/* ---- fragments ------------------------------------------------------------- */

static uint64_t fragment_end(const struct search *search, uint32_t i)
{
    return i + 1 < search->count ? search->fragments[i + 1].start : search->end;
}

/* The fragment that holds byte `at` of the window. */
static uint32_t fragment_of(const struct search *search, uint64_t at)
{
    uint32_t low = 0, high = search->count;

    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (search->fragments[middle].start <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static bool older(const struct fragment *fragment, struct version version)
{
    struct version held = {.seq = fragment->seq, .epoch = fragment->epoch};

    return compare(held, version) < 0;
}

/* Whether any byte of [from, to) is covered by nothing as new as `version`. */
static bool wanted(const struct search *search, uint64_t from, uint64_t to, struct version version)
{
    for (uint32_t i = fragment_of(search, from);
         i < search->count && search->fragments[i].start < to; i++)
        if (older(&search->fragments[i], version))
            return true;
    return false;
}

static int split(struct search *search, uint32_t i, uint64_t at)
{
    struct fragment *fragment = &search->fragments[i];

    if (search->count == FRAGMENTS)
        return VREP_E_FULL;
    memmove(fragment + 1, fragment, (search->count - i) * sizeof *fragment);
    fragment[1].start = at;
    search->count++;
    return VREP_OK;
}

static void join_before(struct search *search, uint32_t i)
{
    struct fragment *fragment = &search->fragments[i];

    memmove(fragment, fragment + 1, (search->count - i - 1) * sizeof *fragment);
    search->count--;
}

static int offer(struct search *search, const struct vrep_index_entry *entry, size_t which)
{
    struct version version = {.seq = entry->seq, .epoch = entry->epoch};
    uint64_t end = entry->offset + entry->length;
    uint64_t at = entry->offset > search->begin ? entry->offset : search->begin;
    uint32_t i = fragment_of(search, at);

    if (end > search->end)
        end = search->end;
    while (at < end) {
        uint64_t stop = fragment_end(search, i) < end ? fragment_end(search, i) : end;
        if (older(&search->fragments[i], version)) {
            int status = VREP_OK;
            if (at > search->fragments[i].start)
                status = split(search, i++, at);
            if (status == VREP_OK && stop < fragment_end(search, i))
                status = split(search, i, stop);
            if (status != VREP_OK)
                return status;
            search->fragments[i] = (struct fragment){.start = at,
                                                     .seq = entry->seq,
                                                     .entry = entry,
                                                     .epoch = entry->epoch,
                                                     .which = (uint32_t)which};
            if (i > 0 && search->fragments[i - 1].entry == entry)
                join_before(search, i--);
        }
        at = stop;
        i++;
    }
    return VREP_OK;
}

/* ---- descent --------------------------------------------------------------- */

static int search_entries(struct search *search, const struct part *part,
                          const struct vrep_index_entry *entries, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const struct vrep_index_entry *entry = &entries[i];
        int status;

        if (entry->disk > search->disk ||
            (entry->disk == search->disk && entry->offset >= search->end))
            break;
        if (entry->disk < search->disk || !visible(search->map, entry))
            continue;
        status = vrep_index_entry_check(part->index, part->tree, entry);
        if (status == VREP_OK && entry->offset + entry->length > search->begin)
            status = offer(search, entry, part->which);
        if (status != VREP_OK)
            return status;
    }
    return VREP_OK;
}

/* Where in the window the entries below a node can lie; false: nowhere. */
static bool node_range(const struct search *search, const struct vrep_index_node *node,
                       uint64_t *from, uint64_t *to)
{
    *from = search->begin;
    *to = search->end;
    if (node->disk_first > search->disk || node->disk_last < search->disk)
        return false;
    if (node->disk_first == search->disk && node->offset > *from)
        *from = node->offset;
    if (node->disk_first == node->disk_last && node->end < *to)
        *to = node->end;
    return *from < *to;
}

struct choice {
    struct version newest;
    uint64_t from;
    uint64_t to;
    uint64_t node;
};

/* Of the children those that may matter, the one that may hold the newest first: what
 * it covers lets the others be passed over. */
static size_t choose(const struct search *search, const struct vrep_index_node *nodes, size_t count,
                     uint64_t first, struct choice *choices)
{
    size_t chosen = 0;

    for (size_t i = 0; i < count; i++) {
        const struct vrep_index_node *node = &nodes[i];
        struct choice choice = {.node = first + i};
        size_t place;

        if (node->disk_first > search->disk ||
            (node->disk_first == search->disk && node->offset >= search->end))
            break;
        if (!node_range(search, node, &choice.from, &choice.to) ||
            !node_visible(search->map, node, &choice.newest) ||
            !wanted(search, choice.from, choice.to, choice.newest))
            continue;
        for (place = chosen++; place > 0; place--) {
            if (compare(choices[place - 1].newest, choice.newest) >= 0)
                break;
            choices[place] = choices[place - 1];
        }
        choices[place] = choice;
    }
    return chosen;
}

static int search_node(struct search *search, const struct part *part, uint32_t level, uint64_t i)
{
    struct choice choices[VREP_INDEX_FANOUT];
    const void *children;
    size_t count;
    int status = vrep_index_children(part->tree, level, i, &children, &count);

    if (status != VREP_OK)
        return status;
    if (level == 0)
        return search_entries(search, part, children, count);
    count = choose(search, children, count, i * VREP_INDEX_FANOUT, choices);
    for (size_t c = 0; c < count && status == VREP_OK; c++)
        if (wanted(search, choices[c].from, choices[c].to, choices[c].newest))
            status = search_node(search, part, level - 1, choices[c].node);
    return status;
}

/* Asks for the entries below a node that a search may come to. Nothing is judged here: what
 * is damaged shows when the search reads it. Returns how many more may be asked for. */
static uint32_t ask_node(const struct search *search, const struct part *part, uint32_t level,
                         uint64_t i, uint32_t left)
{
    const struct vrep_index_tree *tree = part->tree;
    struct version newest;
    uint64_t first = i * VREP_INDEX_FANOUT, from, to;
    const void *children;
    size_t count;

    if (level == 0) {
        uint64_t some = tree->count - first;
        if (some > VREP_INDEX_FANOUT)
            some = VREP_INDEX_FANOUT;
        vrep_index_will_need(part->index, tree->entries + first, some * sizeof *tree->entries);
        return left - 1;
    }
    if (vrep_index_children(tree, level, i, &children, &count) != VREP_OK)
        return 0;
    for (size_t c = 0; c < count && left > 0; c++) {
        const struct vrep_index_node *node = (const struct vrep_index_node *)children + c;
        if (node->disk_first > search->disk ||
            (node->disk_first == search->disk && node->offset >= search->end))
            break;
        if (node_range(search, node, &from, &to) && node_visible(search->map, node, &newest))
            left = ask_node(search, part, level - 1, first + c, left);
    }
    return left;
}

static void ask_ahead(const struct search *search)
{
    const struct vrep_extent_map *map = search->map;

    for (size_t p = 0; p < map->parts_count; p++)
        if (map->parts[p].index->mapping != NULL)
            (void)ask_node(search, &map->parts[p], map->parts[p].tree->levels - 1, 0, AHEAD_MAX);
}

/* Resolves [begin, end) of the search; VREP_E_FULL when it has too many fragments. */
static int search_window(struct search *search)
{
    const struct vrep_extent_map *map = search->map;

    if (map->scattered)
        ask_ahead(search);
    search->count = 1;
    search->fragments[0] = (struct fragment){.start = search->begin};
    for (size_t p = 0; p < map->parts_count; p++) {
        const struct part *part = &map->parts[p];
        uint32_t top = part->tree->levels - 1;
        uint64_t from, to;
        int status;

        if (!wanted(search, search->begin, search->end, part->bound))
            break;
        if (!node_range(search, part->tree->nodes[top], &from, &to))
            continue;
        status = search_node(search, part, top, 0);
        if (status != VREP_OK)
            return status;
    }
    return VREP_OK;
}

/* ---- results --------------------------------------------------------------- */

static struct vrep_extent extent_of(const struct search *search, const struct fragment *fragment)
{
    const struct vrep_index_streams *streams = &search->map->streams;
    const struct vrep_index_entry *entry = fragment->entry;
    struct vrep_extent extent = {.offset = fragment->start};

    if (entry == NULL)
        return extent;
    extent.seq = entry->seq;
    extent.epoch = entry->epoch;
    extent.segment = entry->segment;
    extent.position = entry->position;
    extent.skip = (uint32_t)(fragment->start - entry->offset);
    extent.stream = streams->rows[streams->rows_at[fragment->which] + entry->stream];
    extent.piece = entry->piece;
    extent.kind = entry->kind == VREP_KIND_WRITE || entry->kind == VREP_KIND_SYNC
                      ? VREP_KIND_WRITE
                      : VREP_KIND_ZEROES;
    return extent;
}

/* Whether `next` goes on where `last` ends, in the same piece. */
static bool continues(const struct vrep_extent *last, const struct vrep_extent *next)
{
    return last->offset + last->length == next->offset && last->kind == next->kind &&
           last->seq == next->seq && last->epoch == next->epoch && last->piece == next->piece &&
           last->segment == next->segment && last->position == next->position &&
           (next->kind == 0 || last->skip + last->length == next->skip);
}

/* Bytes written to `out`: all of the window, or as many as there was room for. */
static uint64_t emit(const struct search *search, struct vrep_extent *out, size_t cap,
                     size_t *count)
{
    uint64_t at = search->begin;

    for (uint32_t i = 0; i < search->count; i++) {
        struct vrep_extent extent = extent_of(search, &search->fragments[i]);
        uint64_t end = fragment_end(search, i);
        if (*count > 0 && continues(&out[*count - 1], &extent)) {
            uint64_t room = VREP_EXTENT_BYTES_MAX - out[*count - 1].length;
            uint64_t some = end - at < room ? end - at : room;
            out[*count - 1].length += (uint32_t)some;
            at += some;
            extent.skip += extent.kind ? (uint32_t)some : 0;
        }
        while (at < end) {
            uint64_t some = end - at < VREP_EXTENT_BYTES_MAX ? end - at : VREP_EXTENT_BYTES_MAX;
            if (*count == cap)
                return at - search->begin;
            extent.offset = at;
            extent.length = (uint32_t)some;
            out[(*count)++] = extent;
            at += some;
            extent.skip += extent.kind ? (uint32_t)some : 0;
        }
    }
    return at - search->begin;
}

static int check_range(uint32_t disk, uint64_t offset, uint64_t length)
{
    return disk < VREP_DISKS_MAX && offset <= INT64_MAX && length <= INT64_MAX - offset
               ? VREP_OK
               : VREP_E_RANGE;
}

int vrep_extent_map_lookup(const struct vrep_extent_map *map, uint32_t disk, uint64_t offset,
                           uint64_t length, struct vrep_extent *out, size_t cap, size_t *count,
                           uint64_t *done)
{
    struct search search = {.map = map, .disk = disk};
    uint64_t window = WINDOW_START;

    *done = 0;
    if (check_range(disk, offset, length) != VREP_OK)
        return VREP_E_RANGE;
    while (*done < length) {
        uint64_t left = length - *done, some = left < window ? left : window, written;
        int status;

        search.begin = offset + *done;
        search.end = search.begin + some;
        status = search_window(&search);
        if (status == VREP_E_FULL) {
            window = some / 2 > FRAGMENTS ? some / 2 : FRAGMENTS;
            continue;
        }
        if (status != VREP_OK)
            return status;
        written = emit(&search, out, cap, count);
        *done += written;
        if (written < some)
            break;
        if (search.count < FRAGMENTS / 4 && window < WINDOW_MAX)
            window *= 2;
    }
    return VREP_OK;
}

/* ---- the next byte that was written ---------------------------------------- */

struct walk {
    const struct vrep_extent_map *map;
    uint32_t disk;
    bool found;
    uint64_t offset;
    uint64_t best; /* nothing at or above it is of interest */
};

/* Entries are sorted by offset, so the first one found in a tree is its nearest. */
static int walk_node(struct walk *walk, const struct part *part, uint32_t level, uint64_t i,
                     bool *ended)
{
    const void *children;
    size_t count;
    int status = vrep_index_children(part->tree, level, i, &children, &count);

    for (size_t c = 0; c < count && status == VREP_OK && !*ended; c++) {
        if (level == 0) {
            const struct vrep_index_entry *entry = (const struct vrep_index_entry *)children + c;
            *ended = entry->disk > walk->disk ||
                     (entry->disk == walk->disk && entry->offset >= walk->best);
            if (*ended || entry->disk < walk->disk || !visible(walk->map, entry))
                continue;
            status = vrep_index_entry_check(part->index, part->tree, entry);
            if (status != VREP_OK || entry->offset + entry->length <= walk->offset)
                continue;
            walk->best = entry->offset > walk->offset ? entry->offset : walk->offset;
            walk->found = *ended = true;
        } else {
            const struct vrep_index_node *node = (const struct vrep_index_node *)children + c;
            struct version newest;
            *ended = node->disk_first > walk->disk ||
                     (node->disk_first == walk->disk && node->offset >= walk->best);
            if (*ended || node->disk_last < walk->disk ||
                (node->disk_first == node->disk_last && node->end <= walk->offset) ||
                !node_visible(walk->map, node, &newest))
                continue;
            status = walk_node(walk, part, level - 1, i * VREP_INDEX_FANOUT + c, ended);
        }
    }
    return status;
}

int vrep_extent_map_next(const struct vrep_extent_map *map, uint32_t disk, uint64_t offset,
                         uint64_t *next)
{
    struct walk walk = {.map = map, .disk = disk, .offset = offset, .best = UINT64_MAX};

    *next = 0;
    if (check_range(disk, offset, 0) != VREP_OK)
        return VREP_E_RANGE;
    for (size_t p = 0; p < map->parts_count && walk.best > offset; p++) {
        bool ended = false;
        int status = walk_node(&walk, &map->parts[p], map->parts[p].tree->levels - 1, 0, &ended);
        if (status != VREP_OK)
            return status;
    }
    if (walk.found)
        *next = walk.best;
    return walk.found;
}

/* ---- making one ------------------------------------------------------------ */

static int by_epoch(const void *a, const void *b)
{
    const struct vrep_reign *left = a, *right = b;

    return left->epoch < right->epoch ? -1 : left->epoch > right->epoch;
}

static int newest_first(const void *a, const void *b)
{
    const struct part *left = a, *right = b;
    int order = compare(right->bound, left->bound);

    if (order != 0)
        return order;
    return left->which < right->which ? -1 : left->which > right->which;
}

/* Takes the tree in unless nothing of it is visible. */
static int add_part(struct vrep_extent_map *map, const struct vrep_index *index,
                    const struct vrep_index_tree *tree, size_t which)
{
    struct part part = {.index = index, .tree = tree, .which = which};
    const struct vrep_index_node *root;
    int status = vrep_index_root(tree, &root);

    if (status != VREP_OK || root == NULL)
        return status;
    if (node_visible(map, root, &part.bound))
        map->parts[map->parts_count++] = part;
    return VREP_OK;
}

static int add_parts(struct vrep_extent_map *map, const struct vrep_index *const *indexes,
                     size_t count)
{
    for (size_t i = 0; i < count; i++) {
        size_t before = map->parts_count;
        int status = VREP_OK;

        if (memcmp(indexes[i]->trailer.group_id, indexes[0]->trailer.group_id,
                   sizeof indexes[i]->trailer.group_id) != 0)
            return VREP_E_INVALID;
        status = add_part(map, indexes[i], &indexes[i]->shorts, i);
        if (status == VREP_OK)
            status = add_part(map, indexes[i], &indexes[i]->longs, i);
        if (status != VREP_OK)
            return status;
        if (map->parts_count > before)
            vrep_index_prefetch(indexes[i], PREFETCH_BYTES);
    }
    return VREP_OK;
}

static int set_reigns(struct vrep_extent_map *map, const struct vrep_reign *ancestry, size_t reigns)
{
    if (reigns > 0) {
        memcpy(map->reigns, ancestry, reigns * sizeof *ancestry);
        qsort(map->reigns, reigns, sizeof *ancestry, by_epoch);
    }
    map->reigns_count = reigns;
    for (size_t i = 1; i < reigns; i++)
        if (map->reigns[i - 1].epoch == map->reigns[i].epoch)
            return VREP_E_INVALID;
    return VREP_OK;
}

int vrep_extent_map_new(const struct vrep_index *const *indexes, size_t count,
                        const struct vrep_reign *ancestry, size_t reigns,
                        struct vrep_extent_map **out)
{
    struct vrep_extent_map *map = calloc(1, sizeof *map);
    int status;

    *out = NULL;
    if (map == NULL)
        return VREP_E_NOMEM;
    map->parts = calloc(count + 1, 2 * sizeof *map->parts);
    map->reigns = calloc(reigns + 1, sizeof *map->reigns);
    if (map->parts == NULL || map->reigns == NULL)
        status = VREP_E_NOMEM;
    else
        status = vrep_index_streams_unite(&map->streams, indexes, count);
    if (status == VREP_OK)
        status = set_reigns(map, ancestry, reigns);
    if (status == VREP_OK)
        status = add_parts(map, indexes, count);
    if (status != VREP_OK) {
        vrep_extent_map_free(map);
        return status;
    }
    if (map->parts_count > 1)
        qsort(map->parts, map->parts_count, sizeof *map->parts, newest_first);
    *out = map;
    return VREP_OK;
}

void vrep_extent_map_scatter(struct vrep_extent_map *map)
{
    for (size_t p = 0; p < map->parts_count; p++)
        vrep_index_scatter(map->parts[p].index);
    map->scattered = true;
}

void vrep_extent_map_free(struct vrep_extent_map *map)
{
    if (map == NULL)
        return;
    vrep_index_streams_free(&map->streams);
    free(map->parts);
    free(map->reigns);
    free(map);
}

const struct vrep_index_stream *vrep_extent_map_streams(const struct vrep_extent_map *map,
                                                        uint32_t *count)
{
    *count = map->streams.count;
    return map->streams.streams;
}
