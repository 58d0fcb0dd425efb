"""Plan: how one world is made and what breaks in it, drawn from its seed alone.

Every plan has a crash, a cut and a power loss at least; what else breaks, in which order, how
large and how slow all is, differs. Disks are small, so that all of them can be compared often.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Final

from vrep.wire.transport import Timeouts

FAULTS: Final = {
    "kill source": 5,
    "kill filter": 5,
    "kill target": 5,
    "power source": 2,
    "power target": 4,
    "cut": 6,
    "hang": 3,
    "down": 4,
    "close filter": 1,
    "failover": 2,
    "fold": 3,
    "mark": 3,
    "pause": 1,
    "verify": 2,
    "full target": 1,
    "failed sync": 1,
    "failed spill": 1,
    "full source": 2,
    "old target": 1,
    "bad disk": 2,
    "clock": 1,
    "resize": 3,
    "export": 1,
    "test": 2,
    "rotate": 2,
}
"""and how often each is drawn"""
ROTS: Final = (0.75, 0.18, 0.07)
"""of the worlds have so many times something of the target's store go bad"""
LANES: Final = 0.1
"""of the worlds have a group of two lanes"""
HOSTS: Final = 0.6
"""of those have them on two hosts"""
AT_SOURCE: Final = (
    *("kill source", "kill filter", "power source", "close filter"),
    *("mark", "pause", "failed spill", "full source", "bad disk", "resize", "rotate"),
)
"""these break while others do at the target and between the sites"""
AGAIN: Final = {
    fault: FAULTS[fault]
    for fault in (
        *("kill source", "kill filter", "kill target", "power source", "power target"),
        *("cut", "hang", "down", "mark", "failed sync", "verify"),
    )
}
"""what may break once more, after a takeover"""
LIVES: Final = {
    (): 84,
    ("failover", "rollback"): 4,
    ("failover", "reverse"): 2,
    ("failover", "reverse", "failback"): 4,
    ("move", "reverse"): 2,
    ("move", "reverse", "failback"): 4,
}
"""and how often each is drawn"""
CRASHES: Final = ("kill source", "kill filter", "kill target")


@dataclass
class Plan:
    """How one world is made."""

    seed: int
    disk_bytes: tuple[int, ...] = ()
    bit_bytes: int = 4096
    descriptors: int = 64
    compression: int = 0
    segment_bytes: int = 0
    window_bytes: int = 0
    spill_bytes: int = 0
    spill_segment_bytes: int = 0
    window_s: int = 0
    delta: bool = False
    """whether resyncs compare hashes"""
    quota_bytes: int = 0
    slow_ns: int = 0
    writes: int = 0
    write_s: float = 0.0
    faults: list[str] = field(default_factory=list)
    failover_kept: bool = False
    lanes: bool = False
    """whether the group has two, and nothing of what follows"""
    hosts: bool = False
    """whether each of those lanes is of another host"""
    life: tuple[str, ...] = ()
    """what comes after it all: see `LIVES`"""
    timeouts: Timeouts = field(default_factory=Timeouts)

    @classmethod
    def draw(cls, seed: int) -> Plan:
        rng = random.Random(f"plan {seed}")
        faults = [rng.choice(CRASHES), "cut", "power target"]
        faults += rng.choices(list(FAULTS), list(FAULTS.values()), k=rng.randrange(4, 10))
        rng.shuffle(faults)
        own = random.Random(f"rot {seed}")  # what else a seed draws stays what it was
        for _ in range(own.choices(range(len(ROTS)), ROTS)[0]):
            faults.insert(own.randrange(len(faults) + 1), "rot")
        return cls(
            seed=seed,
            disk_bytes=(rng.choice((64, 96, 128)) << 10, (rng.choice((16, 32)) << 10) + 512 * 3),
            bit_bytes=rng.choice((4096, 8192, 16384)),
            descriptors=rng.choice((64, 64, 128)),
            compression=rng.choice((0, 0, 1)),
            segment_bytes=rng.choice((24, 48, 96)) << 10,
            window_bytes=512 << 10,
            spill_bytes=rng.choice((0, 96 << 10, 1 << 20, 4 << 20)),
            spill_segment_bytes=rng.choice((16, 64)) << 10,
            window_s=rng.choice((0, 0, 2, 20)),
            delta=rng.random() < 0.7,
            quota_bytes=0,
            slow_ns=rng.choice((200_000, 2_000_000, 20_000_000)),
            writes=rng.randrange(40, 80),
            write_s=rng.choice((0.002, 0.01, 0.03)),
            faults=faults,
            failover_kept=rng.random() < 0.1,
            timeouts=Timeouts(dead_after_s=rng.choice((4.0, 20.0)), ping_after_s=1.0),
            life=rng.choices(list(LIVES), list(LIVES.values()))[0],
            lanes=rng.random() < LANES,
            hosts=rng.random() < HOSTS,
        )
