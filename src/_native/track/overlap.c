#include "track/overlap.h"

#include <stdlib.h>

#include "base/status.h"
#include "format/layout.h"

/* A treap for each disk, ordered by (offset, ticket), each node with the largest end below it: the
 * ranges that overlap another are found in O(log n + their number). A range counts the earlier
 * ones in its way; each that leaves takes one off, and at zero it is granted. */
enum { LEFT, RIGHT, QUEUE_NEXT, QUEUE_PREV };
enum { TICKET, PRIORITY, MAX_END, BLOCKERS };

struct vrep_overlap {
    struct vrep_range *root[VREP_DISKS_MAX];
    uint64_t tickets;
    uint64_t random;
    uint32_t held;
    /* granted, but its owner has not been told: a callback may release such a one */
    struct vrep_range *queue_first, *queue_last;
};

int vrep_overlap_create(uint32_t ranges_max, struct vrep_overlap **out)
{
    if (ranges_max == 0)
        return VREP_E_INVALID;
    *out = calloc(1, sizeof **out);
    if (*out == NULL)
        return VREP_E_NOMEM;
    (*out)->random = UINT64_C(0x9e3779b97f4a7c15);
    return VREP_OK;
}

void vrep_overlap_destroy(struct vrep_overlap *overlap)
{
    free(overlap);
}

static uint64_t end_of(const struct vrep_range *range)
{
    return range->length > UINT64_MAX - range->offset ? UINT64_MAX : range->offset + range->length;
}

static bool before(const struct vrep_range *a, const struct vrep_range *b)
{
    return a->offset != b->offset ? a->offset < b->offset : a->words[TICKET] < b->words[TICKET];
}

static void update(struct vrep_range *node)
{
    uint64_t end = end_of(node);
    for (int side = LEFT; side <= RIGHT; side++)
        if (node->links[side] != NULL && node->links[side]->words[MAX_END] > end)
            end = node->links[side]->words[MAX_END];
    node->words[MAX_END] = end;
}

/* Splits a tree into what stands before the key and the rest. */
static void split(struct vrep_range *node, const struct vrep_range *key, struct vrep_range **left,
                  struct vrep_range **right)
{
    if (node == NULL) {
        *left = *right = NULL;
        return;
    }
    if (before(node, key)) {
        split(node->links[RIGHT], key, &node->links[RIGHT], right);
        *left = node;
    } else {
        split(node->links[LEFT], key, left, &node->links[LEFT]);
        *right = node;
    }
    update(node);
}

static struct vrep_range *join(struct vrep_range *left, struct vrep_range *right)
{
    if (left == NULL)
        return right;
    if (right == NULL)
        return left;
    if (left->words[PRIORITY] > right->words[PRIORITY]) {
        left->links[RIGHT] = join(left->links[RIGHT], right);
        update(left);
        return left;
    }
    right->links[LEFT] = join(left, right->links[LEFT]);
    update(right);
    return right;
}

static struct vrep_range *insert(struct vrep_range *node, struct vrep_range *range)
{
    if (node == NULL || range->words[PRIORITY] > node->words[PRIORITY]) {
        split(node, range, &range->links[LEFT], &range->links[RIGHT]);
        update(range);
        return range;
    }
    int side = before(range, node) ? LEFT : RIGHT;
    node->links[side] = insert(node->links[side], range);
    update(node);
    return node;
}

static struct vrep_range *erase(struct vrep_range *node, const struct vrep_range *range)
{
    if (node == range)
        return join(node->links[LEFT], node->links[RIGHT]);
    int side = before(range, node) ? LEFT : RIGHT;
    node->links[side] = erase(node->links[side], range);
    update(node);
    return node;
}

static uint64_t count_overlapping(const struct vrep_range *node, const struct vrep_range *range)
{
    if (node == NULL || node->words[MAX_END] <= range->offset)
        return 0;
    uint64_t count = count_overlapping(node->links[LEFT], range);
    if (node->offset >= end_of(range))
        return count;
    if (end_of(node) > range->offset && node->disk == range->disk && node->length > 0)
        count++;
    return count + count_overlapping(node->links[RIGHT], range);
}

static void enqueue(struct vrep_overlap *overlap, struct vrep_range *range)
{
    range->links[QUEUE_NEXT] = NULL;
    range->links[QUEUE_PREV] = overlap->queue_last;
    if (overlap->queue_last != NULL)
        overlap->queue_last->links[QUEUE_NEXT] = range;
    else
        overlap->queue_first = range;
    overlap->queue_last = range;
}

static bool queued(const struct vrep_overlap *overlap, const struct vrep_range *range)
{
    return range->links[QUEUE_PREV] != NULL || overlap->queue_first == range;
}

static void dequeue(struct vrep_overlap *overlap, struct vrep_range *range)
{
    struct vrep_range *next = range->links[QUEUE_NEXT], *prev = range->links[QUEUE_PREV];
    if (prev != NULL)
        prev->links[QUEUE_NEXT] = next;
    else
        overlap->queue_first = next;
    if (next != NULL)
        next->links[QUEUE_PREV] = prev;
    else
        overlap->queue_last = prev;
    range->links[QUEUE_NEXT] = range->links[QUEUE_PREV] = NULL;
}

/* Takes one blocker off every later range that overlaps the one that left. */
static void unblock(struct vrep_overlap *overlap, struct vrep_range *node,
                    const struct vrep_range *left)
{
    if (node == NULL || node->words[MAX_END] <= left->offset)
        return;
    unblock(overlap, node->links[LEFT], left);
    if (node->offset >= end_of(left))
        return;
    if (end_of(node) > left->offset && node->disk == left->disk && node->length > 0 &&
        node->words[TICKET] > left->words[TICKET] && --node->words[BLOCKERS] == 0) {
        node->held = true;
        overlap->held++;
        enqueue(overlap, node);
    }
    unblock(overlap, node->links[RIGHT], left);
}

bool vrep_overlap_acquire(struct vrep_overlap *overlap, struct vrep_range *range)
{
    struct vrep_range **root = &overlap->root[range->disk % VREP_DISKS_MAX];
    for (int i = 0; i < 6; i++)
        range->links[i] = NULL;
    /* splitmix64: a tree that no pattern of offsets can make deep */
    uint64_t z = (overlap->random += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    range->words[TICKET] = ++overlap->tickets;
    range->words[PRIORITY] = z ^ (z >> 27);
    range->words[BLOCKERS] = range->length > 0 ? count_overlapping(*root, range) : 0;
    *root = insert(*root, range);
    range->held = range->words[BLOCKERS] == 0;
    if (range->held)
        overlap->held++;
    return range->held;
}

void vrep_overlap_release(struct vrep_overlap *overlap, struct vrep_range *range,
                          void (*granted)(void *context, struct vrep_range *range), void *context)
{
    struct vrep_range **root = &overlap->root[range->disk % VREP_DISKS_MAX];
    if (queued(overlap, range))
        dequeue(overlap, range);
    if (range->held)
        overlap->held--;
    range->held = false;
    *root = erase(*root, range);
    if (range->length > 0)
        unblock(overlap, *root, range);
    while (overlap->queue_first != NULL) {
        struct vrep_range *next = overlap->queue_first;
        dequeue(overlap, next);
        granted(context, next);
    }
}

uint32_t vrep_overlap_held(const struct vrep_overlap *overlap)
{
    return overlap->held;
}
