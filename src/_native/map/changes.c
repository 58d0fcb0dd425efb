#include "map/changes.h"

#include <stdlib.h>
#include <string.h>

#define BLOCK VREP_CHANGES_BLOCK_BYTES
/* A list is made by windows of a bitmap: 1 GiB in 32 KiB of stack. */
#define WORDS 4096u
#define WINDOW_BYTES ((uint64_t)WORDS * 64 * BLOCK)
#define PREFETCH_BYTES (16u << 20)

/* Of an epoch one point shows the records up to `most`, the other those up to `above`. */
struct span {
    uint64_t above;
    uint64_t most;
    uint32_t epoch;
};

struct part {
    const struct vrep_index *index;
    const struct vrep_index_tree *tree;
};

struct vrep_changes {
    struct span *spans; /* by epoch; never empty ones */
    size_t spans_count;
    struct part *parts; /* trees that hold something of a span */
    size_t parts_count;
};

/* ---- what counts -------------------------------------------------------------- */

static bool between(const struct vrep_changes *changes, const struct vrep_index_entry *entry)
{
    for (size_t i = 0; i < changes->spans_count; i++) {
        const struct span *span = &changes->spans[i];
        if (span->epoch == entry->epoch)
            return entry->seq > span->above && entry->seq <= span->most;
    }
    return false;
}

/* Whether something below a node can count: its oldest and newest may be of several epochs. */
static bool node_between(const struct vrep_changes *changes, const struct vrep_index_node *node)
{
    for (size_t i = 0; i < changes->spans_count; i++) {
        const struct span *span = &changes->spans[i];
        if (vrep_index_version_compare(node->epoch_high, node->seq_high, span->epoch,
                                       span->above + 1) >= 0 &&
            vrep_index_version_compare(node->epoch_low, node->seq_low, span->epoch, span->most) <=
                0)
            return true;
    }
    return false;
}

/* ---- the walk ------------------------------------------------------------------ */

/* Of one disk, inside [from, to): marks all that counts, or, without bits, looks for the first
 * byte of it and moves `to` there. */
struct walk {
    const struct vrep_changes *changes;
    const struct part *part;
    uint32_t disk;
    bool found;
    bool ended; /* what follows in the order of entries is of no interest */
    uint64_t from;
    uint64_t to;
    uint64_t *bits; /* of [from, to) */
};

static void set_bits(uint64_t *words, uint64_t first, uint64_t end)
{
    while (first < end) {
        uint64_t bit = first % 64, some = end - first < 64 - bit ? end - first : 64 - bit;
        words[first / 64] |= (~UINT64_C(0) >> (64 - some)) << bit;
        first += some;
    }
}

static int take(struct walk *walk, const struct vrep_index_entry *entry)
{
    int status = vrep_index_entry_check(walk->part->index, walk->part->tree, entry);
    uint64_t begin, end;

    if (status != VREP_OK)
        return status;
    begin = entry->offset > walk->from ? entry->offset : walk->from;
    end = entry->offset + entry->length < walk->to ? entry->offset + entry->length : walk->to;
    if (begin >= end)
        return VREP_OK;
    walk->found = true;
    if (walk->bits == NULL) {
        walk->to = begin;
        walk->ended = true; /* sorted by offset: the others of this tree are no nearer */
    } else {
        set_bits(walk->bits, (begin - walk->from) / BLOCK, (end - walk->from + BLOCK - 1) / BLOCK);
    }
    return VREP_OK;
}

static int walk_entries(struct walk *walk, const struct vrep_index_entry *entries, size_t count)
{
    int status = VREP_OK;

    for (size_t i = 0; i < count && status == VREP_OK && !walk->ended; i++) {
        const struct vrep_index_entry *entry = &entries[i];

        if (entry->disk > walk->disk || (entry->disk == walk->disk && entry->offset >= walk->to))
            walk->ended = true;
        else if (entry->disk == walk->disk && between(walk->changes, entry))
            status = take(walk, entry);
    }
    return status;
}

static int walk_node(struct walk *walk, uint32_t level, uint64_t i)
{
    const void *children;
    size_t count;
    int status = vrep_index_children(walk->part->tree, level, i, &children, &count);

    if (status != VREP_OK)
        return status;
    if (level == 0)
        return walk_entries(walk, children, count);
    for (size_t c = 0; c < count && status == VREP_OK && !walk->ended; c++) {
        const struct vrep_index_node *node = (const struct vrep_index_node *)children + c;

        if (node->disk_first > walk->disk ||
            (node->disk_first == walk->disk && node->offset >= walk->to))
            walk->ended = true;
        else if (node->disk_last >= walk->disk && node->end > walk->from &&
                 node_between(walk->changes, node))
            status = walk_node(walk, level - 1, i * VREP_INDEX_FANOUT + c);
    }
    return status;
}

static int walk_parts(struct walk *walk)
{
    const struct vrep_changes *changes = walk->changes;

    for (size_t p = 0; p < changes->parts_count && walk->from < walk->to; p++) {
        int status;

        walk->part = &changes->parts[p];
        walk->ended = false;
        status = walk_node(walk, walk->part->tree->levels - 1, 0);
        if (status != VREP_OK)
            return status;
    }
    return VREP_OK;
}

/* ---- lists --------------------------------------------------------------------- */

static bool bit(const uint64_t *words, uint64_t i)
{
    return (words[i / 64] >> (i % 64) & 1) != 0;
}

/* First bit from `i` on that is `set`, or `end`. */
static uint64_t next_bit(const uint64_t *words, uint64_t i, uint64_t end, bool set)
{
    while (i < end && bit(words, i) != set) {
        if (i % 64 == 0 && words[i / 64] == (set ? 0 : ~UINT64_C(0)))
            i += 64;
        else
            i++;
    }
    return i < end ? i : end;
}

struct list {
    struct vrep_changed *out;
    size_t cap;
    size_t *count;
};

/* False when there is no room. */
static bool put(const struct list *list, uint64_t offset, uint64_t end)
{
    struct vrep_changed *last = *list->count > 0 ? &list->out[*list->count - 1] : NULL;

    if (last != NULL && last->offset + last->length == offset) {
        last->length += end - offset;
        return true;
    }
    if (*list->count == list->cap)
        return false;
    list->out[(*list->count)++] = (struct vrep_changed){.offset = offset, .length = end - offset};
    return true;
}

/* Puts what is marked in the window [begin, end), and says how far it came. `low` and `high`
 * are what the list was asked for. */
static uint64_t put_window(const struct list *list, const uint64_t *words, uint64_t begin,
                           uint64_t end, uint64_t low, uint64_t high)
{
    uint64_t count = (end - begin + BLOCK - 1) / BLOCK;

    for (uint64_t i = next_bit(words, 0, count, true); i < count;) {
        uint64_t stop = next_bit(words, i, count, false);
        uint64_t from = begin + i * BLOCK, to = begin + stop * BLOCK;

        from = from > low ? from : low;
        if (!put(list, from, to < high ? to : high))
            return from;
        i = next_bit(words, stop, count, true);
    }
    return end;
}

int vrep_changes_list(const struct vrep_changes *changes, uint32_t disk, uint64_t offset,
                      uint64_t length, struct vrep_changed *out, size_t cap, size_t *count,
                      uint64_t *done)
{
    const struct list list = {out, cap, count};
    uint64_t words[WORDS];
    uint64_t at = offset, high = offset + length;

    *done = 0;
    if (disk >= VREP_DISKS_MAX || offset > INT64_MAX || length > INT64_MAX - offset)
        return VREP_E_RANGE;
    while (at < high) {
        /* The blocks at both ends belong to the list, whatever of them changed. */
        uint64_t from = at - at % BLOCK, to = high + (BLOCK - high % BLOCK) % BLOCK;
        struct walk walk = {.changes = changes, .disk = disk, .from = from, .to = to};
        int status = walk_parts(&walk);

        if (status != VREP_OK)
            return status;
        if (!walk.found)
            break;
        memset(words, 0, sizeof words);
        walk.from = walk.to - walk.to % BLOCK;
        walk.to = to - walk.from < WINDOW_BYTES ? to : walk.from + WINDOW_BYTES;
        walk.bits = words;
        status = walk_parts(&walk);
        if (status != VREP_OK)
            return status;
        at = put_window(&list, words, walk.from, walk.to, offset, high);
        if (at < walk.to) {
            *done = at - offset;
            return VREP_OK;
        }
    }
    *done = length;
    return VREP_OK;
}

/* ---- making one ---------------------------------------------------------------- */

static int by_epoch(const void *a, const void *b)
{
    const struct span *left = a, *right = b;

    return left->epoch < right->epoch ? -1 : left->epoch > right->epoch;
}

/* One limit of an epoch at a time: the second of an epoch meets the first. */
static int add_reigns(struct vrep_changes *changes, const struct vrep_reign *reigns, size_t count)
{
    size_t known = changes->spans_count;

    for (size_t i = 0; i < count; i++) {
        struct span *span = NULL;

        for (size_t k = 0; k < i; k++)
            if (reigns[k].epoch == reigns[i].epoch)
                return VREP_E_INVALID;
        for (size_t k = 0; k < known && span == NULL; k++)
            if (changes->spans[k].epoch == reigns[i].epoch)
                span = &changes->spans[k];
        if (span == NULL) {
            changes->spans[changes->spans_count++] =
                (struct span){.epoch = reigns[i].epoch, .most = reigns[i].seq_max};
        } else if (reigns[i].seq_max > span->most) {
            span->above = span->most;
            span->most = reigns[i].seq_max;
        } else {
            span->above = reigns[i].seq_max;
        }
    }
    return VREP_OK;
}

static void drop_empty(struct vrep_changes *changes)
{
    size_t kept = 0;

    for (size_t i = 0; i < changes->spans_count; i++)
        if (changes->spans[i].above < changes->spans[i].most)
            changes->spans[kept++] = changes->spans[i];
    changes->spans_count = kept;
    if (kept > 1)
        qsort(changes->spans, kept, sizeof *changes->spans, by_epoch);
}

static int add_parts(struct vrep_changes *changes, const struct vrep_index *const *indexes,
                     size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const struct vrep_index_tree *trees[2] = {&indexes[i]->shorts, &indexes[i]->longs};
        size_t before = changes->parts_count;

        if (memcmp(indexes[i]->trailer.group_id, indexes[0]->trailer.group_id,
                   sizeof indexes[i]->trailer.group_id) != 0)
            return VREP_E_INVALID;
        for (int t = 0; t < 2; t++) {
            const struct vrep_index_node *root;
            int status = vrep_index_root(trees[t], &root);

            if (status != VREP_OK)
                return status;
            if (root != NULL && node_between(changes, root))
                changes->parts[changes->parts_count++] = (struct part){indexes[i], trees[t]};
        }
        if (changes->parts_count > before)
            vrep_index_prefetch(indexes[i], PREFETCH_BYTES);
    }
    return VREP_OK;
}

int vrep_changes_new(const struct vrep_index *const *indexes, size_t count,
                     const struct vrep_reign *since, size_t since_count,
                     const struct vrep_reign *at, size_t at_count, struct vrep_changes **out)
{
    struct vrep_changes *changes = calloc(1, sizeof *changes);
    int status = VREP_OK;

    *out = NULL;
    if (changes == NULL)
        return VREP_E_NOMEM;
    changes->spans = calloc(since_count + at_count + 1, sizeof *changes->spans);
    changes->parts = calloc(count + 1, 2 * sizeof *changes->parts);
    if (changes->spans == NULL || changes->parts == NULL)
        status = VREP_E_NOMEM;
    if (status == VREP_OK)
        status = add_reigns(changes, since, since_count);
    if (status == VREP_OK)
        status = add_reigns(changes, at, at_count);
    if (status == VREP_OK) {
        drop_empty(changes);
        status = add_parts(changes, indexes, count);
    }
    if (status != VREP_OK) {
        vrep_changes_free(changes);
        return status;
    }
    *out = changes;
    return VREP_OK;
}

void vrep_changes_free(struct vrep_changes *changes)
{
    if (changes == NULL)
        return;
    free(changes->spans);
    free(changes->parts);
    free(changes);
}
