"""Advice: what a state or condition of a group means to who runs it: what happens next, and what to
do. `vrep status` prints it below its table; the tables of docs/reference/status.md say what each
is. ``GROUP`` stands for the group's name, ``LANE`` for that of the lane where there are several."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from vrep.lanes import group_of

STATES: Final[dict[str, str]] = {
    "initial-sync": "the first copy runs; it can be recovered once the other site holds all of it",
    "gap": "what was missed is copied next, by itself; earlier points stay",
    "resync": "what was missed is being copied; new points follow when that has ended",
    "unverified": "everything is compared, and what differs is sent; earlier points stay",
    "paused": "nothing is shipped before 'vrep resume GROUP'",
    "offline": "it is tried again by itself; changes are kept here and sent then. See that the "
    "other site runs ('vrep run') and can be reached",
    "failed-over": "'vrep status' at the site that took over has the group now; 'vrep reverse "
    "GROUP' there protects it back to here",
    "error": "it is tried again by itself once the cause is gone",
    "spilling": "what the disk here holds is sent by itself; nothing is lost",
}
"""`replicating` needs none."""

CONDITIONS: Final[dict[str, str]] = {
    "filter-down": "nothing is known of the group, and a VM on its socket waits: start 'vrep run' "
    "(or the service vrep-filter); one that hangs is to be killed, and is started again",
    "source-down": "nothing is shipped; changes are marked and sent later: start 'vrep run' (or "
    "the service vrep-source)",
    "target-down": "nothing arrives, and the sources keep what they have: start 'vrep run' (or "
    "the service vrep-target)",
    "not-served": "its VM finds no disks on its socket; tried again by itself once the cause above "
    "is gone",
    "bypass": "its VM runs, and nothing is replicated: put the cause above right, then start "
    "'vrep run' anew",
    "handing-over": "passes when the VM has switched; 'vrep attach' or 'vrep detach' goes on where "
    "it was cut off",
    "mirror-lost": "begun again by itself, or its disks are compared while it is off; should it "
    "stay, the log of 'vrep run' says why",
    "detached": "nothing is replicated before 'vrep attach LANE'",
    "unreadable": "put its group.json back from a copy; its history at the other site stays",
    "old-source-alive": "its VM may run as well as the one here: see that it is ended",
    "two-vms": "two VMs write different futures: end one of them now",
    "fenced": "its VM's writes here are not replicated any more: end it; 'vrep reverse GROUP' at "
    "the site that took over protects it back",
    "untaken-writes": "'vrep export GROUP --untaken --out DIR' keeps them, before the way back "
    "writes over them",
    "moving": "decided by the target alone: 'vrep move GROUP' there goes on or gives up",
    "guest-paused": "the VM waits, by intent; it goes on when the move is given up, or at the "
    "other site",
    "key-missing": "'vrep key import FILE', or have it released by the site that holds it ('vrep "
    "key release')",
    "keys-unsent": "told by itself when a session opens; keep the old generation until then",
    "flush-failed": "the disk's storage failed: see to it; everything since the last good flush "
    "is copied again",
    "history-lost": "what differs is sent again by itself; see to the target's storage, which "
    "lost what it had synced",
    "spill-full": "the next burst is a gap: bring the other site back, or raise "
    "spill_bytes in the settings",
    "lane-absent": "bring the other host's 'vrep run' back; points follow again with all lanes",
    "no-cuts": "no new points before it ends: the error of the cuts says what is in the way",
    "target-full": "nothing is acknowledged before there is room: free or add some at the target's "
    "store, or keep less ('vrep protect GROUP --window TIME' at the source); nothing is "
    "lost, changes are kept at the source",
    "quota-80": "room for the time in quota_left_s ('vrep status --json'): raise it ('vrep protect "
    "GROUP --quota SIZE' at the source), or accept a shorter window",
    "quota-95": "the window is being shortened: raise it ('vrep protect GROUP --quota SIZE' at "
    "the source)",
    "window-short": "less can be recovered than was asked for: raise the quota or add room",
    "sealing-base": "passes; the way back sends less then",
    "clocks-apart": "set the clock of the site that is wrong: points are named by the source's",
    "source-silent": "what was received can be recovered. See that the source's site runs and "
    "reaches this one; if it is gone: 'vrep failover start GROUP'",
    "unprotected": "well: 'vrep unprotect GROUP --delete-history' deletes what is left",
    "damaged": "stop the target, then 'vrep repair LANE'; what is lost is sent again after "
    "'vrep repair LANE --resend'",
    "verify-failed": "'vrep verify GROUP' says what is wrong; damage is for 'vrep repair LANE'",
    "testing": "'vrep test stop GROUP' ends it; a history is not folded past it meanwhile",
    "view-down": "its VM has no disk: start 'vrep run', which serves it again",
}


UNDECIDED: Final = (
    "taken over here, and not decided: 'vrep failover commit GROUP' keeps it, 'vrep failover "
    "rollback GROUP' gives it back to its old site"
)
TAKEN_OVER: Final = (
    "taken over here, and replicated nowhere: 'vrep reverse GROUP' protects it back to its old site"
)


def _taken_over(group: Mapping[str, Any]) -> str:
    """What to do at the site that took a group over, whose old source is silent by intent."""
    epochs = group.get("epochs") or [{}]
    return UNDECIDED if epochs[-1].get("state") == "provisional" else TAKEN_OVER


def advice(name: str, group: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(state or condition, what to do) for each that a group has, worst known first as it shows
    them; nothing for one that replicates well. What its role or its conditions explain better than
    its state is not said twice."""
    found = [(code, CONDITIONS[code]) for code in group["conditions"] if code in CONDITIONS]
    state = str(group["state"])
    explained = state in ("offline", "error") and bool(found)
    explained = explained or (state == "failed-over" and "fenced" in group["conditions"])
    if group["role"] == "source" and state in STATES and not explained:
        found.insert(0, (state, STATES[state]))
    if group["role"] == "target" and state == "failed-over":
        found = [(code, text) for code, text in found if code != "source-silent"]
        found.insert(0, (state, _taken_over(group)))
    names = {"GROUP": group_of(name), "LANE": name}
    return [(code, re.sub("GROUP|LANE", lambda m: names[m[0]], text)) for code, text in found]


__all__ = ["CONDITIONS", "STATES", "advice"]
