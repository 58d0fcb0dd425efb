/*
 * Every atomic access and memory barrier of the project.
 *
 * Works on plain, naturally aligned integers, because they live in structs that
 * two processes map; all widths here are lock-free on every supported machine,
 * which is what makes them valid across processes. No other file may name a
 * memory order. Safe from any thread and any process that maps the memory.
 *
 * Suffix: _u16 (loads and stores), _u32, _u64 or _ptr (a void *, within one process only).
 *
 *   vrep_load_relaxed    Indivisible, orders nothing: counters for statistics,
 *                        or a value that only this thread writes.
 *   vrep_load_acquire    What the other side wrote before its release store of
 *                        the value read is visible to every later access here.
 *   vrep_store_relaxed   Indivisible, orders nothing.
 *   vrep_store_release   Every earlier access here is done before the new value
 *                        can be seen; pairs with an acquire load.
 *   vrep_exchange        Acquire and release in one: takes what was published
 *                        and publishes what this side did.
 *   vrep_fetch_add, vrep_fetch_sub, vrep_fetch_or, vrep_fetch_and
 *                        Return the old value; acquire and release, so that the
 *                        one who counts down to zero sees all others' work.
 *   vrep_compare_swap    Acquire and release on success, acquire on failure;
 *                        never fails spuriously; on failure *expected holds the
 *                        value found.
 *   vrep_fence_full      No access moves across in either direction, a store
 *                        before and a load after included: the only cure for
 *                        "I set my flag, then look at yours" on both sides.
 *   vrep_fence_acquire   Loads before stay before every access after: ends the
 *                        copying part of a read that is then validated.
 *   vrep_fence_release   Accesses before stay before every store after.
 *   vrep_cpu_relax       A hint inside a spin loop; orders nothing.
 */
#ifndef VREP_BASE_ATOMIC_H
#define VREP_BASE_ATOMIC_H

#include <stdbool.h>
#include <stdint.h>

#if !defined(__GCC_ATOMIC_LLONG_LOCK_FREE) || __GCC_ATOMIC_LLONG_LOCK_FREE != 2
#error "64-bit atomics must be lock-free to be shared between processes"
#endif

#define VREP_ATOMIC_DEFINE_ACCESS(suffix, type)                                                    \
    static inline type vrep_load_relaxed_##suffix(type const *at)                                  \
    {                                                                                              \
        return __atomic_load_n(at, __ATOMIC_RELAXED);                                              \
    }                                                                                              \
    static inline type vrep_load_acquire_##suffix(type const *at)                                  \
    {                                                                                              \
        return __atomic_load_n(at, __ATOMIC_ACQUIRE);                                              \
    }                                                                                              \
    static inline void vrep_store_relaxed_##suffix(type *at, type value)                           \
    {                                                                                              \
        __atomic_store_n(at, value, __ATOMIC_RELAXED);                                             \
    }                                                                                              \
    static inline void vrep_store_release_##suffix(type *at, type value)                           \
    {                                                                                              \
        __atomic_store_n(at, value, __ATOMIC_RELEASE);                                             \
    }                                                                                              \
    static inline type vrep_exchange_##suffix(type *at, type value)                                \
    {                                                                                              \
        return __atomic_exchange_n(at, value, __ATOMIC_ACQ_REL);                                   \
    }                                                                                              \
    static inline bool vrep_compare_swap_##suffix(type *at, type *expected, type desired)          \
    {                                                                                              \
        return __atomic_compare_exchange_n(at, expected, desired, false, __ATOMIC_ACQ_REL,         \
                                           __ATOMIC_ACQUIRE);                                      \
    }

#define VREP_ATOMIC_DEFINE_FETCH(suffix, type, verb)                                               \
    static inline type vrep_fetch_##verb##_##suffix(type *at, type value)                          \
    {                                                                                              \
        return __atomic_fetch_##verb(at, value, __ATOMIC_ACQ_REL);                                 \
    }

typedef void *vrep_atomic_ptr;

VREP_ATOMIC_DEFINE_ACCESS(u16, uint16_t)
VREP_ATOMIC_DEFINE_ACCESS(u32, uint32_t)
VREP_ATOMIC_DEFINE_ACCESS(u64, uint64_t)
VREP_ATOMIC_DEFINE_ACCESS(ptr, vrep_atomic_ptr)

VREP_ATOMIC_DEFINE_FETCH(u32, uint32_t, add)
VREP_ATOMIC_DEFINE_FETCH(u32, uint32_t, sub)
VREP_ATOMIC_DEFINE_FETCH(u32, uint32_t, or)
VREP_ATOMIC_DEFINE_FETCH(u32, uint32_t, and)
VREP_ATOMIC_DEFINE_FETCH(u64, uint64_t, add)
VREP_ATOMIC_DEFINE_FETCH(u64, uint64_t, sub)
VREP_ATOMIC_DEFINE_FETCH(u64, uint64_t, or)
VREP_ATOMIC_DEFINE_FETCH(u64, uint64_t, and)

#undef VREP_ATOMIC_DEFINE_ACCESS
#undef VREP_ATOMIC_DEFINE_FETCH

static inline void vrep_fence_full(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline void vrep_fence_acquire(void)
{
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
}

static inline void vrep_fence_release(void)
{
    __atomic_thread_fence(__ATOMIC_RELEASE);
}

static inline void vrep_cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
