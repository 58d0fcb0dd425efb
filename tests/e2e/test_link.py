"""What a bad link does, and what it never does: make the guest wait, or lose anything.

Real filter, source and target processes; clients write all the while, and note when each of
their commands was answered. Once the link is good again history must be whole (no gap, since
ring and spill had room), and every point that is looked at must be what the clients' own notes
say (`witness`). The link is a `Cable`; test_link_packets.py has one of packets.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from sites import GROUP, MIB, Pair, journal, wait_until
from test_pipeline import Load, check
from witness import NEVER, Witness

from vrep import errors
from vrep._core import layout
from vrep.source.session import STATUS_EVERY_S

pytestmark = pytest.mark.e2e

Make = Callable[..., Pair]
DISKS = {"root": 8 * MIB, "data": 4 * MIB}
SMALL = 1 << 16
WAITED_S_MAX = 10.0
"""of a client for one small command: far below any limit of the network times the number of
faults, far above what two busy processors make of a millisecond"""
SLACK_S = 8.0
"""for threads that get no processor when they want one"""


def gaps(pair: Pair) -> int:
    return sum(entry.kind == layout.KIND_GAP_BEGIN for entry in journal(pair))


def durable(pair: Pair) -> int:
    return int(pair.status()["targets"][0]["durable_seq"] or 0)


def connected(pair: Pair) -> bool:
    return bool(pair.status()["targets"][0]["connected"])


class Lab:
    """A pair under load, and what is known of it."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair, self.seed = pair, seed
        self.rng = random.Random(seed)
        self.witness = Witness(list(DISKS), list(DISKS.values()))
        self.marks = 0

    def mark(self) -> None:
        self.marks += 1
        asked = time.monotonic()
        seq = self.pair.a.checkpoint(GROUP, f"mark {self.marks}")["seq"]
        self.witness.marked(f"mark {self.marks}", int(seq), asked)

    def waited_s(self) -> float:
        """The longest that a client waited for a small command."""
        return max(
            command.answered - command.sent
            for command in self.witness.commands
            if command.length <= SMALL and command.answered < NEVER
        )


@contextmanager
def under_load(pair: Pair, seed: int, pause_s: float = 0.06) -> Iterator[Lab]:
    """Clients write while the body spoils the link; then everything that must hold is checked."""
    print(f"seed {seed}")
    before = gaps(pair)
    lab = Lab(pair, seed)
    # One write as large as the ring could be too much for it, whatever the link does.
    load = Load(pair, lab.witness, seed, pause_s, big=0.0)
    load.start([0, 1])
    try:
        yield lab
        wait_until("the clients wrote", lambda: lab.witness.answered > 50)
        lab.mark()
    finally:
        pair.cable.repair()
        pair.cable.bytes_per_s = 0
        pair.cable.delay_s = pair.cable.jitter_s = 0.0
        load.stop()
    pair.alive()
    pair.settle()
    lab.mark()
    pair.settle()
    found = check(pair, lab.witness, lab.rng, 2)
    waited_s = lab.waited_s()
    print(found, f"longest wait {waited_s:.3f} s, connections {pair.cable.connections}")
    assert waited_s < WAITED_S_MAX
    assert gaps(pair) == before, "a gap, although ring and spill had room"
    assert load.reconnects == 0, "a client lost its connection"


def lossless(make_pair: Make, seed: int, dead_after_s: float = 2.0) -> Pair:
    return make_pair(disks=DISKS, ring_bytes=40 * MIB, dead_after_s=dead_after_s, seed=seed).up()


# ---- slow and far ------------------------------------------------------------------------------


def test_a_slow_and_uneven_link_costs_nobody_anything(make_pair: Make, seed: int) -> None:
    pair = lossless(make_pair, seed, dead_after_s=5.0)
    with under_load(pair, seed) as lab:
        pair.cable.delay_s, pair.cable.jitter_s = 0.1, 0.2
        least = durable(pair)
        wait_until("it replicates", lambda: durable(pair) > least + 20)
        lab.mark()
        pair.cable.bytes_per_s = 200_000
        least = durable(pair)
        time.sleep(1.5)
        wait_until("it replicates still", lambda: durable(pair) > least)


def test_a_link_slower_than_a_batch_in_the_time_of_silence_is_not_given_up(
    make_pair: Make, seed: int
) -> None:
    """A batch takes longer than the silence after which a peer counts as dead. The target, which
    has nothing to acknowledge meanwhile, is heard all the same, and one session ships all."""
    pair = lossless(make_pair, seed, dead_after_s=5.0)
    pair.cable.bytes_per_s = 100_000
    rng = random.Random(seed)
    least, begun = durable(pair), pair.cable.connections
    with pair.client() as client:
        client.write(rng.randrange(client.bytes - MIB), rng.randbytes(MIB))
    wait_until("it is durable", lambda: durable(pair) > least)
    assert pair.cable.connections == begun
    pair.cable.bytes_per_s = 0
    pair.settle()
    pair.same_as_source()


# ---- flapping ----------------------------------------------------------------------------------


def test_a_link_that_flaps_faster_than_the_pauses_still_makes_progress(
    make_pair: Make, seed: int
) -> None:
    """Up for moments, and slow then; down first for so long that the source's pauses have grown.
    What is durable grows all the same, in small steps."""
    pair = lossless(make_pair, seed)
    with under_load(pair, seed) as lab:
        pair.cable.cut(down=True)
        time.sleep(3.0)
        pair.cable.bytes_per_s = 1_500_000
        steps = []
        end = time.monotonic() + 180
        while time.monotonic() < end and len(steps) < 4:
            pair.cable.repair()
            time.sleep(lab.rng.uniform(0.4, 1.0))
            pair.cable.cut(down=True, how=lab.rng.choice(("end", "reset")))
            time.sleep(lab.rng.uniform(0.1, 0.4))
            at = durable(pair)
            if not steps or at > steps[-1]:
                steps.append(at)
        assert len(steps) == 4, f"durable positions while the link flapped: {steps}"
        lab.mark()


# ---- a peer that hangs -------------------------------------------------------------------------


def test_a_peer_that_hangs_without_closing_is_noticed_in_time(make_pair: Make, seed: int) -> None:
    """Whichever direction stands still, and whether its bytes wait or vanish: the connection is
    ended `dead_after_s` after the last byte, plus what a look at the status may take."""
    pair = lossless(make_pair, seed)
    bound_s = pair.dead_after_s + STATUS_EVERY_S + SLACK_S
    with under_load(pair, seed) as lab:
        for directions in ((True,), (False,), (True, False)):
            swallow = lab.rng.random() < 0.5
            wait_until("it is connected", lambda: connected(pair))
            begun, hung_s = pair.cable.connections, time.monotonic()
            pair.cable.hang(*directions, swallow=swallow)
            wait_until(
                f"{directions} is noticed",
                lambda begun=begun: not connected(pair) or pair.cable.connections > begun,
                every_s=0.02,
            )
            noticed_s = time.monotonic() - hung_s
            print(f"hung {directions}, swallowed {swallow}: noticed after {noticed_s:.2f} s")
            assert noticed_s < bound_s
            pair.cable.repair()
        wait_until("it is connected", lambda: connected(pair))
        # A process that stands still: its kernel goes on to take bytes.
        process, stopped_s = pair.processes["target"], time.monotonic()
        process.send_signal(signal.SIGSTOP)
        try:
            wait_until("it shows", lambda: not connected(pair), every_s=0.02)
            assert time.monotonic() - stopped_s < bound_s
        finally:
            process.send_signal(signal.SIGCONT)


# ---- bytes that change, connections that end anyhow --------------------------------------------


def test_changed_bytes_and_every_kind_of_end(make_pair: Make, seed: int) -> None:
    """TLS notices each flipped bit, in either direction; nothing of it is stored or believed."""
    pair = lossless(make_pair, seed)
    with under_load(pair, seed) as lab:
        for turn in range(6):
            wait_until("it is connected", lambda: connected(pair))
            begun = pair.cable.connections
            if turn % 3 == 0:
                spoilt = pair.cable.corrupted
                pair.cable.corrupt(turn % 2 == 0)
                wait_until("a bit was flipped", lambda n=spoilt: pair.cable.corrupted > n)
            else:
                pair.cable.cut(how=lab.rng.choice(("end", "reset", "half")))
            wait_until("another connection", lambda n=begun: pair.cable.connections > n)
            if turn % 4 == 0:
                lab.mark()


# ---- all of it at once -------------------------------------------------------------------------


def spoil(lab: Lab, turns: int) -> list[str]:
    """One thing after another, by the seed; what was done."""
    cable, rng, done = lab.pair.cable, lab.rng, []
    for _ in range(turns):
        kind = rng.choice(("cut", "down", "hang", "corrupt", "slow", "late", "mark", "repair"))
        done.append(kind)
        if kind in ("cut", "down"):
            cable.cut(down=kind == "down", how=rng.choice(("end", "reset", "half")))
        elif kind == "hang":
            cable.hang(*rng.choice(((True,), (False,), (True, False))), swallow=rng.random() < 0.5)
        elif kind == "corrupt":
            cable.corrupt(rng.random() < 0.5)
        elif kind == "slow":
            cable.bytes_per_s = rng.choice((0, 100_000, 1_000_000))
        elif kind == "late":
            cable.delay_s, cable.jitter_s = rng.choice(((0.0, 0.0), (0.02, 0.1), (0.2, 0.05)))
        elif kind == "repair":
            cable.repair()
        else:
            try:
                lab.mark()
            except errors.VrepError as error:
                done[-1] = f"no mark: {error}"
        time.sleep(rng.uniform(0.1, 1.5))
    return done


def test_a_link_of_all_faults(make_pair: Make, seed: int) -> None:
    pair = lossless(make_pair, seed)
    with under_load(pair, seed) as lab:
        print(*spoil(lab, 10))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("turn", range(8))
def test_links_of_all_faults(make_pair: Make, seed: int, turn: int) -> None:
    pair = lossless(make_pair, seed + turn)
    with under_load(pair, seed + turn) as lab:
        print(*spoil(lab, 60))
