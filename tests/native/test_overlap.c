#include <unistd.h>

#include "check.h"
#include "track/overlap.h"

enum { RANGES = 64, SPACE = 200 };

static struct vrep_range *told[RANGES * 4];
static unsigned told_count;

static void tell(void *context, struct vrep_range *range)
{
    (void)context;
    CHECK(range->held);
    told[told_count++] = range;
}

static struct vrep_overlap *new_overlap(void)
{
    struct vrep_overlap *overlap;
    CHECK_OK(vrep_overlap_create(RANGES, &overlap));
    told_count = 0;
    return overlap;
}

static void overlapping_ranges_go_one_after_the_other(void)
{
    struct vrep_overlap *overlap = new_overlap();
    struct vrep_range a = {.offset = 0, .length = 10}, b = {.offset = 5, .length = 10},
                      c = {.offset = 10, .length = 10}, d = {.offset = 5, .length = 10, .disk = 1};
    CHECK(vrep_overlap_acquire(overlap, &a));
    CHECK(!vrep_overlap_acquire(overlap, &b));
    CHECK(!vrep_overlap_acquire(overlap, &c)); /* b waits, and came first */
    CHECK(vrep_overlap_acquire(overlap, &d));
    CHECK_EQ(vrep_overlap_held(overlap), 2);
    vrep_overlap_release(overlap, &a, tell, NULL);
    CHECK_EQ(told_count, 1);
    CHECK(told[0] == &b && !c.held);
    vrep_overlap_release(overlap, &b, tell, NULL);
    CHECK_EQ(told_count, 2);
    CHECK(told[1] == &c);
    vrep_overlap_release(overlap, &c, tell, NULL);
    vrep_overlap_release(overlap, &d, tell, NULL);
    CHECK_EQ(vrep_overlap_held(overlap), 0);
    vrep_overlap_destroy(overlap);
}

static void a_withdrawn_range_lets_others_pass(void)
{
    struct vrep_overlap *overlap = new_overlap();
    struct vrep_range a = {.offset = 0, .length = 10}, b = {.offset = 0, .length = 30},
                      c = {.offset = 20, .length = 10};
    CHECK(vrep_overlap_acquire(overlap, &a));
    CHECK(!vrep_overlap_acquire(overlap, &b));
    CHECK(!vrep_overlap_acquire(overlap, &c));
    vrep_overlap_release(overlap, &b, tell, NULL);
    CHECK_EQ(told_count, 1);
    CHECK(told[0] == &c);
    vrep_overlap_destroy(overlap);
}

static struct vrep_range *victim;

static void tell_and_withdraw(void *context, struct vrep_range *range)
{
    struct vrep_range *other = victim;
    tell(context, range);
    victim = NULL;
    if (other != NULL)
        vrep_overlap_release(context, other, tell_and_withdraw, context);
}

static void a_callback_may_release_a_range_that_was_just_granted(void)
{
    struct vrep_overlap *overlap = new_overlap();
    struct vrep_range a = {.offset = 0, .length = 100}, b = {.offset = 0, .length = 10},
                      c = {.offset = 50, .length = 10}, d = {.offset = 50, .length = 1};
    CHECK(vrep_overlap_acquire(overlap, &a));
    CHECK(!vrep_overlap_acquire(overlap, &b));
    CHECK(!vrep_overlap_acquire(overlap, &c));
    CHECK(!vrep_overlap_acquire(overlap, &d));
    victim = &c; /* granted together with b, and withdrawn before it is told */
    vrep_overlap_release(overlap, &a, tell_and_withdraw, overlap);
    CHECK_EQ(told_count, 2);
    CHECK(told[0] == &b && told[1] == &d);
    CHECK_EQ(vrep_overlap_held(overlap), 2);
    vrep_overlap_destroy(overlap);
}

static void empty_and_endless_ranges(void)
{
    struct vrep_overlap *overlap = new_overlap();
    struct vrep_range all = {.offset = 0, .length = UINT64_MAX}, none = {.offset = 5, .length = 0},
                      last = {.offset = UINT64_MAX - 1, .length = 1};
    CHECK(vrep_overlap_acquire(overlap, &all));
    CHECK(vrep_overlap_acquire(overlap, &none));
    CHECK(!vrep_overlap_acquire(overlap, &last));
    vrep_overlap_release(overlap, &all, tell, NULL);
    CHECK(last.held);
    vrep_overlap_release(overlap, &none, tell, NULL);
    struct vrep_overlap *other;
    CHECK_STATUS(vrep_overlap_create(0, &other), VREP_E_INVALID);
    vrep_overlap_destroy(overlap);
}

static bool collide(const struct vrep_range *a, const struct vrep_range *b)
{
    return a->disk == b->disk && a->offset < b->offset + b->length &&
           b->offset < a->offset + a->length;
}

/* The model: a list in order of arrival; a range is held when nothing earlier in it collides. */
static void agrees_with_a_plain_list(void)
{
    struct vrep_overlap *overlap = new_overlap();
    static struct vrep_range pool[RANGES];
    struct vrep_range *list[RANGES], *idle[RANGES];
    unsigned listed = 0, spare = RANGES;
    for (unsigned i = 0; i < RANGES; i++)
        idle[i] = &pool[i];
    for (int round = 0; round < 20000; round++) {
        if (spare > 0 && (listed == 0 || check_random_below(2) == 0)) {
            struct vrep_range *range = idle[--spare];
            range->disk = (uint16_t)check_random_below(2);
            range->offset = check_random_below(SPACE);
            range->length = 1 + check_random_below(check_random_below(10) ? 8 : SPACE);
            bool held = vrep_overlap_acquire(overlap, range);
            CHECK_EQ(held, range->held);
            list[listed++] = range;
        } else {
            unsigned at = (unsigned)check_random_below(listed);
            struct vrep_range *range = list[at];
            told_count = 0;
            vrep_overlap_release(overlap, range, tell, NULL);
            listed--;
            memmove(&list[at], &list[at + 1], (listed - at) * sizeof *list);
            idle[spare++] = range;
        }
        uint32_t held = 0;
        for (unsigned i = 0; i < listed; i++) {
            bool free_way = true;
            for (unsigned j = 0; j < i; j++)
                free_way = free_way && !collide(list[j], list[i]);
            CHECK_EQ(list[i]->held, free_way);
            held += free_way;
        }
        CHECK_EQ(vrep_overlap_held(overlap), held);
    }
    vrep_overlap_destroy(overlap);
}

int main(void)
{
    RUN(overlapping_ranges_go_one_after_the_other);
    RUN(a_withdrawn_range_lets_others_pass);
    RUN(a_callback_may_release_a_range_that_was_just_granted);
    RUN(empty_and_endless_ranges);
    RUN(agrees_with_a_plain_list);
    return check_report();
}
