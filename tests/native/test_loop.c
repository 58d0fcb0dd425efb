/* The loop's rule about the processor: it yields once in a turn while requests come in numbers, and
 * not for a while after that cost more than 0.5 ms. The clock, and what a yield costs, are the
 * test's; a front-end of the test plays turns, each in the loop's own order. */
#include <sched.h>
#include <sys/syscall.h>

#include "nbd_double.h"
#include "serve/loop.h"

#define MS UINT64_C(1000000)
#define TURNS_MAX 8192u

static uint64_t clock_now;  /* 0: the machine's */
static uint64_t yield_cost; /* ns; the loop's thread only, once it runs */
static uint32_t yields;
static uint64_t yielded_at[TURNS_MAX];

int clock_gettime(clockid_t clock, struct timespec *now)
{
    uint64_t faked = vrep_load_acquire_u64(&clock_now);
    if (clock != CLOCK_MONOTONIC || faked == 0)
        return (int)syscall(SYS_clock_gettime, clock, now);
    now->tv_sec = (time_t)(faked / 1000000000u);
    now->tv_nsec = (long)(faked % 1000000000u);
    return 0;
}

int sched_yield(void)
{
    if (vrep_load_acquire_u64(&clock_now) == 0) /* a sanitizer, at the end */
        return (int)syscall(SYS_sched_yield);
    CHECK(yields < TURNS_MAX);
    yielded_at[yields++] = clock_now;
    vrep_store_release_u64(&clock_now, clock_now + yield_cost);
    return 0;
}

/* ---- a front-end that plays -------------------------------------------------------------- */

struct player {
    struct vrep_front front; /* first */
    void (*play)(uint32_t turn, struct vrep_front *front);
    uint32_t turns, turn, ended;
    uint32_t before[TURNS_MAX]; /* yields before each turn */
};
static struct player player;

static bool player_turn(struct vrep_front *front)
{
    front->requests = 0;
    if (player.turn < player.turns) {
        player.before[player.turn] = yields;
        player.play(player.turn, front);
        player.turn++;
    }
    if (player.turn == player.turns)
        vrep_store_release_u32(&player.ended, 1);
    return player.turn < player.turns;
}

static void player_wakeup(struct vrep_front *front)
{
    (void)front;
}

static void player_stop(struct vrep_front *front, bool drain)
{
    (void)front, (void)drain;
}

static bool player_idle(const struct vrep_front *front)
{
    (void)front;
    return true;
}

static void run(uint32_t turns, void (*play)(uint32_t turn, struct vrep_front *front))
{
    struct vrep_group *group = double_open();
    struct vrep_loop *loop;
    uint64_t one = 1;
    CHECK(turns <= TURNS_MAX);
    memset(&player, 0, sizeof player);
    player.front = (struct vrep_front){player_turn, player_wakeup, player_stop, player_idle, 0};
    player.play = play;
    player.turns = turns;
    yields = 0;
    vrep_store_release_u64(&clock_now, 1000 * MS);
    CHECK_OK(vrep_loop_create(group, &loop));
    CHECK_OK(vrep_loop_add_front(loop, &player.front));
    CHECK_EQ(write(group->event, &one, sizeof one), 8); /* the first turn has an event */
    CHECK_OK(vrep_loop_start(loop));
    for (int i = 0; !vrep_load_acquire_u32(&player.ended); i++) {
        CHECK(i < 10000);
        usleep(1000);
    }
    CHECK_OK(vrep_loop_stop(loop, true, 1000));
    vrep_store_release_u64(&clock_now, 0);
    vrep_loop_destroy(loop);
    double_close(group);
}

/* ---- when it yields ------------------------------------------------------------------------ */

static void one_at_a_time(uint32_t turn, struct vrep_front *front)
{
    (void)turn;
    front->requests = 1;
}

static void who_waits_for_each_answer_never_pays(void)
{
    yield_cost = 0;
    run(200, one_at_a_time);
    CHECK_EQ(yields, 0);
}

static void several_once(uint32_t turn, struct vrep_front *front)
{
    front->requests = turn == 10 ? 2 : 1;
}

static void several_are_waited_for_in_the_next_turns(void)
{
    yield_cost = 0;
    run(200, several_once);
    for (uint32_t turn = 0; turn < 200; turn++)
        CHECK_EQ(player.before[turn], turn <= 10 ? 0 : turn < 75 ? turn - 10 : 64);
}

/* ---- when somebody keeps the processor --------------------------------------------------------
 */

static void several_in_each_millisecond(uint32_t turn, struct vrep_front *front)
{
    (void)turn;
    front->requests = 2;
    vrep_store_release_u64(&clock_now, clock_now + MS);
}

static void a_yield_that_is_short_is_repeated(void)
{
    yield_cost = 499999;
    run(100, several_in_each_millisecond);
    CHECK_EQ(player.before[99], 99);
}

static void one_that_is_long_is_not_repeated_for_longer_each_time(void)
{
    uint64_t pause = 16;
    yield_cost = MS;
    run(TURNS_MAX - 1, several_in_each_millisecond);
    CHECK(yields > 10);
    for (uint32_t i = 1; i < yields; i++) {
        CHECK_EQ((yielded_at[i] - yielded_at[i - 1]) / MS, 1 + pause);
        pause = pause < 1024 ? 2 * pause : pause;
    }
    CHECK_EQ(pause, 1024);
}

/* Long, long, short, long: what was counted together is forgotten. */
static void long_but_the_third(uint32_t turn, struct vrep_front *front)
{
    several_in_each_millisecond(turn, front);
    yield_cost = yields == 2 ? 0 : MS;
}

static void a_short_one_ends_it(void)
{
    yield_cost = MS;
    run(200, long_but_the_third);
    CHECK(yields > 4);
    CHECK_EQ((yielded_at[1] - yielded_at[0]) / MS, 1 + 16);
    CHECK_EQ((yielded_at[2] - yielded_at[1]) / MS, 1 + 32);
    CHECK_EQ((yielded_at[3] - yielded_at[2]) / MS, 1);
    CHECK_EQ((yielded_at[4] - yielded_at[3]) / MS, 1 + 16);
}

int main(void)
{
    RUN(who_waits_for_each_answer_never_pays);
    RUN(several_are_waited_for_in_the_next_turns);
    RUN(a_yield_that_is_short_is_repeated);
    RUN(one_that_is_long_is_not_repeated_for_longer_each_time);
    RUN(a_short_one_ends_it);
    return check_report();
}
