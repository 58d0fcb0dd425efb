/* Cut: a lane's part in a recovery point over several lanes of a group.
 *
 * While a lane holds, commands run and are published as ever, but no answer leaves:
 * who has not heard of a write can make nothing depend on it. Every lane holds from
 * before its own mark until after all the others', so that a write before a lane's
 * mark depends on nothing behind another's (docs/internals/cuts.md). A hold ends by
 * itself when its time is over; that cut is void, and whoever asked for it learns so
 * from `release`. */
#include <string.h>
#include <time.h>

#include "filter/internal.h"

static bool holds_for(const struct vrep_group *group, const uint8_t cut_id[16])
{
    return group->cut.held && memcmp(group->cut.id, cut_id, sizeof group->cut.id) == 0;
}

/* Answers everything that waited. What an answer sets going may complete at once, and is answered
 * at once: the hold is over. */
static void let_go(struct vrep_group *group)
{
    uint64_t held_ns = vrep_clock_ns(group, CLOCK_MONOTONIC) - group->cut.since_ns;
    if (held_ns > group->count.cut_hold_ns_max)
        group->count.cut_hold_ns_max = held_ns;
    group->cut.held = false;
    struct list waiting = group->cut.waiting;
    list_init(&group->cut.waiting);
    if (waiting.first == NULL)
        return;
    for (struct command *command = waiting.first, *next; command != NULL; command = next) {
        next = command->link;
        vrep_chain_answer(command);
    }
}

bool vrep_cut_keeps(struct vrep_group *group, struct command *command)
{
    if (!group->cut.held)
        return false;
    list_push(&group->cut.waiting, command);
    return true;
}

void vrep_cut_poll(struct vrep_group *group)
{
    if (!group->cut.held || group->now_ns < group->cut.until_ns)
        return;
    group->count.cuts_void++;
    let_go(group);
}

int vrep_cut_timeout_ms(const struct vrep_group *group)
{
    if (!group->cut.held)
        return -1;
    uint64_t now = vrep_clock_ns(group, CLOCK_MONOTONIC);
    /* Rounded down: the last millisecond is waited for awake. */
    return now >= group->cut.until_ns ? 0 : (int)((group->cut.until_ns - now) / NS_PER_MS);
}

int vrep_group_cut_hold(struct vrep_group *group, const uint8_t cut_id[16], uint64_t limit_ns)
{
    if (!group->tap)
        return VREP_E_UNSUPPORTED;
    if (limit_ns == 0 || limit_ns > VREP_CUT_HOLD_NS_MAX)
        return VREP_E_INVALID;
    if (vrep_map_gap(group->map))
        return VREP_E_GONE;
    if (group->cut.held || vrep_handover_blind(group))
        return VREP_E_BUSY;
    memcpy(group->cut.id, cut_id, sizeof group->cut.id);
    group->cut.since_ns = vrep_clock_ns(group, CLOCK_MONOTONIC);
    group->cut.until_ns = group->cut.since_ns + limit_ns;
    group->cut.held = true;
    return VREP_OK;
}

int vrep_group_cut_mark(struct vrep_group *group, const uint8_t cut_id[16], uint64_t *seq)
{
    if (!holds_for(group, cut_id))
        return VREP_E_TIMEOUT;
    struct vrep_cut cut = {.lanes = 0};
    memcpy(cut.cut_id, cut_id, sizeof cut.cut_id);
    return vrep_mark_put(group, &cut, NULL, NULL, 0, seq);
}

int vrep_group_cut_release(struct vrep_group *group, const uint8_t cut_id[16])
{
    if (!holds_for(group, cut_id))
        return VREP_E_TIMEOUT;
    group->count.cuts++;
    let_go(group);
    return VREP_OK;
}

int vrep_group_cut_complete(struct vrep_group *group, const uint8_t cut_id[16],
                            const struct vrep_position *lanes, uint16_t count, const char *label,
                            uint16_t label_bytes, uint64_t *seq)
{
    if (count == 0 || count > VREP_LANES_MAX)
        return VREP_E_INVALID;
    for (uint16_t i = 1; i < count; i++)
        if (lanes[i - 1].lane >= lanes[i].lane)
            return VREP_E_INVALID;
    struct vrep_cut cut = {.lanes = count};
    memcpy(cut.cut_id, cut_id, sizeof cut.cut_id);
    return vrep_mark_put(group, &cut, lanes, label, label_bytes, seq);
}
