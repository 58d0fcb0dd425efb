"""Events: what a world must have, and what a run must have somewhere."""

from __future__ import annotations

from typing import Final

EVENTS_MIN: Final = 1000
"""of a seed; its guest goes on until it has them"""
PER_SEED: Final = ("crash", "cut", "torn write")
"""what every seed has at least once"""
EVER: Final = (
    *("crash", "cut", "torn write", "hang", "full disk", "failed sync", "old target"),
    *("failed request", "failed flush", "failed command"),
    *(
        "gap",
        "gap end",
        "sync copy",
        "hashes",
        "spill",
        "fold",
        "merge",
        "mark",
        "stream",
        "re-seal",
    ),
    *("failover", "failover kept", "rollback", "fenced", "recovery", "map check", "session"),
    *("resize", "opened new", "opened clean", "opened killed", "opened power-loss"),
    *("cut of lanes", "recovery at a cut", "base"),
    *("view", "killed view", "export", "rotation", "cut off command"),
    *("move", "failover start", "failover rollback", "failover commit", "reverse", "failback"),
    *("host power", "unsynced after a kill", "cuts in a window", "hold for another host"),
    *("fault full source", "host away", "hosts apart", "cut without a host"),
    *(
        "cut told durable",
        "heard by a read",
        "marks lost with a host",
        "host power under a use",
        "host power under a view",
        "fold of lanes",
        "rot",
        "repair",
        "resend",
        "damage told",
        "told to compare",
        "told what was lost",
    ),
)
"""what every run has at least once"""
NOTHING: Final = ("turn",)
"""counted, and no event: the filter looks whether there is something to do"""
