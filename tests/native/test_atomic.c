#include <pthread.h>
#include <sched.h>

#include "base/atomic.h"
#include "check.h"

enum { ROUNDS = 20000 };

/* One more look of a loop that waits for the other thread. Where that one wants this very processor
 * it would wait for the end of a time slice, at each of the rounds. */
static void look_again(unsigned *looks)
{
    if (++*looks % 1024 == 0)
        sched_yield();
    else
        vrep_cpu_relax();
}

static void operations_return_the_old_value(void)
{
    uint64_t word = 5;
    CHECK_EQ(vrep_fetch_add_u64(&word, 3), 5);
    CHECK_EQ(vrep_fetch_sub_u64(&word, 1), 8);
    CHECK_EQ(vrep_fetch_or_u64(&word, 8), 7);
    CHECK_EQ(vrep_fetch_and_u64(&word, 12), 15);
    CHECK_EQ(vrep_exchange_u64(&word, 100), 12);
    uint64_t expected = 1;
    CHECK(!vrep_compare_swap_u64(&word, &expected, 2));
    CHECK_EQ(expected, 100);
    CHECK(vrep_compare_swap_u64(&word, &expected, 2));
    CHECK_EQ(vrep_load_relaxed_u64(&word), 2);
    uint32_t small = UINT32_MAX;
    CHECK_EQ(vrep_fetch_add_u32(&small, 1), UINT32_MAX);
    CHECK_EQ(vrep_load_acquire_u32(&small), 0);
}

struct mailbox {
    uint64_t payload;
    uint64_t published;
    uint64_t taken;
};

static void *send_all(void *argument)
{
    struct mailbox *box = argument;
    unsigned looks = 0;
    for (uint64_t i = 1; i <= ROUNDS; i++) {
        while (vrep_load_acquire_u64(&box->taken) != i - 1)
            look_again(&looks);
        box->payload = i * 3;
        vrep_store_release_u64(&box->published, i);
    }
    return NULL;
}

/* The payload is a plain variable: TSan proves that the pair orders it. */
static void release_publishes_what_acquire_reads(void)
{
    struct mailbox box = {0};
    pthread_t sender;
    unsigned looks = 0;
    CHECK_EQ(pthread_create(&sender, NULL, send_all, &box), 0);
    for (uint64_t i = 1; i <= ROUNDS; i++) {
        while (vrep_load_acquire_u64(&box.published) != i)
            look_again(&looks);
        CHECK_EQ(box.payload, i * 3);
        vrep_store_release_u64(&box.taken, i);
    }
    CHECK_EQ(pthread_join(sender, NULL), 0);
}

static void *count_up(void *argument)
{
    uint64_t *counter = argument;
    for (int i = 0; i < ROUNDS; i++)
        vrep_fetch_add_u64(counter, 1);
    return NULL;
}

static void no_addition_is_lost(void)
{
    uint64_t counter = 0;
    pthread_t threads[3];
    for (int i = 0; i < 3; i++)
        CHECK_EQ(pthread_create(&threads[i], NULL, count_up, &counter), 0);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(pthread_join(threads[i], NULL), 0);
    CHECK_EQ(counter, 3 * ROUNDS);
}

struct flags {
    uint32_t mine[2];
    uint32_t saw[2];
    uint64_t arrived;
};

static void meet(struct flags *flags, uint64_t target)
{
    unsigned looks = 0;
    vrep_fetch_add_u64(&flags->arrived, 1);
    while (vrep_load_acquire_u64(&flags->arrived) < target)
        look_again(&looks);
}

static void raise_and_look(struct flags *flags, unsigned side)
{
    vrep_store_relaxed_u32(&flags->mine[side], 1);
    vrep_fence_full();
    vrep_store_relaxed_u32(&flags->saw[side], vrep_load_relaxed_u32(&flags->mine[1 - side]));
}

static void *other_side(void *argument)
{
    struct flags *flags = argument;
    for (uint64_t i = 0; i < ROUNDS / 10; i++) {
        meet(flags, i * 4 + 2);
        raise_and_look(flags, 1);
        meet(flags, i * 4 + 4);
    }
    return NULL;
}

static void full_fence_lets_one_side_see_the_other(void)
{
    struct flags flags = {0};
    pthread_t thread;
    unsigned looks = 0;
    CHECK_EQ(pthread_create(&thread, NULL, other_side, &flags), 0);
    for (uint64_t i = 0; i < ROUNDS / 10; i++) {
        vrep_store_relaxed_u32(&flags.mine[0], 0);
        vrep_store_relaxed_u32(&flags.mine[1], 0);
        meet(&flags, i * 4 + 2);
        raise_and_look(&flags, 0);
        /* The other side waits in its next meeting until the check is done. */
        while (vrep_load_acquire_u64(&flags.arrived) < i * 4 + 3)
            look_again(&looks);
        CHECK(vrep_load_relaxed_u32(&flags.saw[0]) || vrep_load_relaxed_u32(&flags.saw[1]));
        meet(&flags, i * 4 + 4);
    }
    CHECK_EQ(pthread_join(thread, NULL), 0);
}

int main(void)
{
    RUN(operations_return_the_old_value);
    RUN(release_publishes_what_acquire_reads);
    RUN(no_addition_is_lost);
    RUN(full_fence_lets_one_side_see_the_other);
    return check_report();
}
