"""The whole pipeline under random load and random faults, judged by what its clients know.

Real processes on real sockets; the disks of a group are written through each of the filter's
front-ends while its processes are killed. See `witness` for what is checked.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from fronts import FAST_ZERO, FUA, NO_HOLE, DiskClient
from sites import (
    GROUP,
    MIB,
    WAIT_S,
    Entry,
    Pair,
    compare,
    journal,
    journal_data,
    wait_until,
)
from witness import Replay, Witness, payload

from vrep import errors
from vrep._core import layout

pytestmark = pytest.mark.e2e

DISKS = {"root": 40 * MIB, "data": 12 * MIB}
ANY, BLOCK = 1, 512
"""what offsets and lengths are a multiple of, over NBD and over the others"""
LENGTHS = (1, 7, 512, 512, 1000, 4096, 4096, 4096, 4096, 12288, 65536, 100_000, 200_000)


@dataclass
class Load:
    """Clients that write until stopped, each on a thread with a connection of its own."""

    pair: Pair
    witness: Witness
    seed: int
    pause_s: float = 0.002
    big: float = 0.003
    """share of writes that are large"""
    reconnects: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def start(self, disks: list[int]) -> None:
        for number, disk in enumerate(disks):
            thread = threading.Thread(target=self._run, args=(number, disk), daemon=True)
            self._threads.append(thread)
            thread.start()

    def some(self, count: int) -> None:
        """So many commands of one client, which ends with the last."""
        rng = random.Random(f"{self.seed}/some")
        with self.pair.client(self.witness.disks[0]) as client:
            for _ in range(count):
                self._command(rng, client, 0)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive(), "a client hangs"
        if self._failures:
            raise self._failures[0]

    def _run(self, number: int, disk: int) -> None:
        rng = random.Random(f"{self.seed}/client/{number}")
        try:
            while not self._stop.is_set():
                try:
                    with self.pair.client(self.witness.disks[disk]) as client:
                        while not self._stop.is_set():
                            self._command(rng, client, disk)
                except (OSError, errors.UnreachableError):
                    # Killed while it served us: what was not answered stays so.
                    self.reconnects += 1
                    time.sleep(0.05)
        except BaseException as error:  # noqa: BLE001 - raised by `stop`, on the test's thread
            self._failures.append(error)

    def _command(self, rng: random.Random, client: DiskClient, disk: int) -> None:
        size = self.witness.sizes[disk]
        unit = ANY if self.pair.front == "nbd" else BLOCK
        length = rng.choice(LENGTHS)
        if rng.random() < self.big:
            # The largest that a front-end takes at once.
            length = rng.choice([1, 4, 8, 16 if self.pair.front == "iscsi" else 32]) * MIB
        length = min(length + -length % unit, size)
        # Half of it falls into a narrow zone, so that commands overlap.
        span = min(size - length, 2 * MIB) if rng.random() < 0.5 else size - length
        offset = rng.randrange(span + 1)
        offset -= offset % (4096 if rng.random() < 0.5 else unit)
        shape = rng.choices(["noise", "text", "zeroes", "trim"], [6, 3, 1, 0.5])[0]
        command = self.witness.begin(disk, offset, length, shape)
        if shape == "zeroes":
            self._zeroes(rng, client, command.offset, command.length)
        elif shape == "trim":
            client.trim(offset, length)
        else:
            client.write(offset, command.data, fua=rng.random() < 0.05)
        command.answered = time.monotonic()
        if rng.random() < 0.03:
            client.flush()
        time.sleep(self.pause_s * rng.random())

    @staticmethod
    def _zeroes(rng: random.Random, client: DiskClient, offset: int, length: int) -> None:
        flags = rng.choice([0, NO_HOLE, FAST_ZERO, FUA])
        try:
            client.zeroes(offset, length, flags)
        except errors.StorageError:
            # A fast zero may be refused, and then nothing was done.
            assert flags == FAST_ZERO
            client.zeroes(offset, length)


class Faults:
    """One fault after another, from the seed."""

    def __init__(self, pair: Pair, witness: Witness, rng: random.Random) -> None:
        self.pair, self.witness, self.rng = pair, witness, rng
        self.done: list[str] = []
        self.marks = 0

    def one(self, kind: str = "") -> None:
        kind = kind or self.rng.choice(
            ["filter", "source", "target", "site", "both", "pause", "cut", "mark", "mark", "starve"]
        )
        self.done.append(kind)
        getattr(self, kind)()

    def _restart(self, *roles: str) -> None:
        self.pair.kill(*roles)
        if "filter" in roles and self.pair.front == "vhost-user-blk":
            # Behind it: what was on its way then was sent before, and is answered later.
            self.witness.killed.append(time.monotonic())
        time.sleep(self.rng.uniform(0, 0.5))
        self.pair.start(*roles)

    def filter(self) -> None:
        self._restart("filter")

    def source(self) -> None:
        self._restart("source")

    def target(self) -> None:
        self._restart("target")

    def site(self) -> None:
        self._restart("filter", "source")

    def both(self) -> None:
        self._restart("filter", "source", "target")

    def pause(self) -> None:
        self.pair.a.pause(GROUP)
        time.sleep(self.rng.uniform(0.1, 1.0))
        self.pair.a.resume(GROUP)

    def cut(self) -> None:
        self.pair.cable.cut()

    def mark(self) -> None:
        self.marks += 1
        label = f"mark {self.marks}"
        asked = time.monotonic()
        try:
            seq = self.pair.a.checkpoint(GROUP, label)["seq"]
        except errors.VrepError:
            return  # the filter just died, or there was no room: no answer, no mark
        self.witness.marked(label, int(seq), asked)

    def _in_gap(self) -> bool:
        return bool((self.pair.status()["filter"] or {}).get("gap"))

    def starve(self, limit_s: float = 30.0) -> bool:
        """Long enough without a target that the ring overflows, and the spill before it; whether
        there was a gap."""
        self.pair.served()  # another fault may just have been here
        self.pair.kill("target")
        rng = random.Random(self.rng.random())
        end = time.monotonic() + limit_s
        try:
            with self.pair.client("root", WAIT_S) as client:
                while not (gap := self._in_gap()) and time.monotonic() < end:
                    length = 8 * MIB
                    offset = rng.randrange(DISKS["root"] - length)
                    offset -= offset % (ANY if self.pair.front == "nbd" else BLOCK)
                    command = self.witness.begin(0, offset, length, "noise")
                    client.write(offset, command.data)
                    command.answered = time.monotonic()
        finally:
            self.pair.start("target")
        return gap


def check(pair: Pair, witness: Witness, rng: random.Random, points: int) -> dict[str, int]:
    """Everything that must hold once the load has ended and all is durable."""
    entries = journal(pair)
    seqs = [entry.seq for entry in entries]
    assert seqs == sorted(set(seqs)), "the journal is out of order, or has a record twice"
    recorded = witness.recorded(entries)
    witness.check_order(recorded)
    witness.check_marks(entries, recorded)
    listed = pair.b.points(GROUP)
    assert listed.verdict.whole, listed.verdict
    assert listed.verdict.sealed, listed.verdict
    ranges = [(_seq(r.first.point), _seq(r.last.point)) for r in listed.ranges]
    good = [seq for seq in seqs if any(first <= seq <= last for first, last in ranges)]
    newest = seqs[-1]
    assert good[-1] == newest
    chosen = {newest, *rng.sample(good, min(points, len(good)))}
    marks = {m.seq: m for m in witness.marks if m.seq in set(good)}
    chosen |= set(rng.sample(sorted(marks), min(points, len(marks))))
    replay = Replay(dict(enumerate(witness.sizes)))
    known = replayed = 0
    for noted, entry in zip(entries, journal_data(pair), strict=False):
        assert (entry.seq, entry.digest) == (noted.seq, noted.digest), "history changed meanwhile"
        replay.apply(entry)
        replayed += 1
        if entry.seq not in chosen:
            continue
        mark = marks.get(entry.seq)
        view = pair.read_view(f"pos:{entry.epoch}/0/{entry.seq}")
        for index, name in enumerate(witness.disks):
            compare(f"{name} at {entry.seq}", view[name], bytes(replay.disks[index]))
            if mark is not None:
                known += witness.check_content(
                    index, view[name], asked=mark.asked, answered=mark.answered
                )
    assert replayed == len(entries)
    for index, name in enumerate(witness.disks):
        disk = pair.images[name].read_bytes()
        compare(f"{name} at the source", disk, bytes(replay.disks[index]))
        known += witness.check_content(index, disk)
    return {
        "records": len(entries),
        "written": len(recorded),
        "gaps": len(listed.gaps),
        "points": len(chosen),
        "marks": len(marks),
        "bytes known": known,
    }


def _seq(point: str) -> int:
    return int(point.rsplit("/", 1)[1])


def storm(make_pair: Callable[..., Pair], seed: int, faults: int, points: int) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}")
    pair = make_pair(
        disks=DISKS,
        ring_bytes=rng.choice([40, 64]) * MIB,
        compression=rng.choice([0, 1]),
        source_settings=f"spill_bytes = {rng.choice([0, 64, 200]) * MIB}",
    )
    for image in pair.images.values():
        with image.open("r+b") as file:
            file.write(rng.randbytes(MIB))
    pair.up(settle=False)  # the load begins while the first sync runs
    witness = Witness(list(DISKS), list(DISKS.values()))
    load = Load(pair, witness, seed)
    load.start([0, 0, 1, 1])
    plan = Faults(pair, witness, rng)
    try:
        for turn in range(faults):
            time.sleep(rng.uniform(0.3, 2.0))
            # What the front-ends do each in their own way.
            plan.one("filter" if turn == 0 and pair.front != "nbd" else "")
            pair.alive()
        time.sleep(0.5)
        # However slow the machine is, and whatever the last fault was, the clients go on.
        enough = witness.answered + 100
        wait_until("the clients go on", lambda: witness.answered > enough)
    finally:
        load.stop()
        print("faults:", *plan.done)
    pair.settle()
    load.some(150)  # on a slow machine all that was written before may lie in gaps
    plan.mark()
    pair.settle()
    found = check(pair, witness, rng, points)
    print(found, "answered", witness.answered, "of", len(witness.commands))
    assert witness.answered > 100
    assert found["written"] > 50
    pair.stop("source", "filter", "target")


@pytest.mark.every_front(quick=("iscsi", "vhost-user-blk"))
def test_storm(make_pair: Callable[..., Pair], front: str, seed: int) -> None:
    storm(make_pair, seed, faults=10 if front == "nbd" else 3, points=2)


@pytest.mark.slow
@pytest.mark.every_front
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("turn", range(int(os.environ.get("VREP_STORMS", "10"))))
def test_storms(make_pair: Callable[..., Pair], seed: int, turn: int) -> None:
    storm(make_pair, seed + turn, faults=25, points=4)


@pytest.mark.every_front
def test_overflow_makes_a_gap_that_ends(make_pair: Callable[..., Pair], seed: int) -> None:
    """A ring that overflows, where nothing is spilled, costs recovery points, and no write."""
    rng = random.Random(seed)
    pair = make_pair(disks=DISKS, ring_bytes=40 * MIB, source_settings="spill_bytes = 0").up()
    witness = Witness(list(DISKS), list(DISKS.values()))
    plan = Faults(pair, witness, rng)
    plan.mark()
    assert plan.starve(WAIT_S)
    assert pair.status()["filter"]["unrecorded"] > 0
    wait_until("the resync has ended", pair.settled)
    plan.mark()
    pair.settle()
    found = check(pair, witness, rng, 2)
    assert found["gaps"] == 2  # the first sync, and this one
    kinds = [entry.kind for entry in journal(pair)]
    assert kinds.count(layout.KIND_GAP_BEGIN) == kinds.count(layout.KIND_GAP_END) == 2


# ---- the oracle itself: it must see what it is there for ------------------------------------


def _history() -> tuple[Witness, list[Entry]]:
    """Two writes, a mark, and a third write, one after the other."""
    witness = Witness(["root"], [MIB])
    entries = []
    for seq, offset in ((1, 0), (2, 4096), (4, 2048)):
        if seq == 4:
            witness.marked("here", 3, time.monotonic())
            entries.append(_entry(layout.KIND_MARK, 3, label="here"))
        command = witness.begin(0, offset, 4096, "noise")
        command.answered = time.monotonic()
        entries.append(_entry(layout.KIND_WRITE, seq, offset, command.data))
    return witness, entries


def _entry(kind: int, seq: int, offset: int = 0, data: bytes = b"", label: str = "") -> Entry:
    header = {"epoch": 1, "seq": seq, "kind": kind, "disk": 0, "offset": offset}
    return Entry({**header, "length": len(data)}, data, label)


def _content(entries: list[Entry]) -> bytes:
    replay = Replay({0: MIB})
    for entry in entries:
        replay.apply(entry)
    return bytes(replay.disks[0])


def test_oracle_accepts_what_is_right() -> None:
    witness, entries = _history()
    recorded = witness.recorded(entries)
    witness.check_order(recorded)
    witness.check_marks(entries, recorded)
    assert witness.check_content(0, _content(entries)) == 3 * 4096
    mark = witness.marks[0]
    before = _content(entries[:2])
    assert witness.check_content(0, before, asked=mark.asked, answered=mark.answered) == 2 * 4096


def test_payloads_are_made_again_in_any_part_and_are_nobody_elses(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        number, length = rng.randrange(1, 1 << 20), rng.choice([1, 7, 8, 9, 4096, 100_001])
        noise = rng.random() < 0.5
        whole = payload(number, noise, 0, length)
        tag = number.to_bytes(8, "big")
        assert len(whole) == length
        assert whole[:8] == tag[:length]
        if not noise:
            assert whole == (tag * (length // 8 + 1))[:length]
        first = rng.randrange(length)
        end = rng.randrange(first, length) + 1
        assert payload(number, noise, first, end) == whole[first:end]
    one, other = (np.frombuffer(payload(n, True, 0, 8 * MIB), np.uint8) for n in (1, 2))
    for back in (0, 1, 8, 512, 4096, MIB):  # of each other, and of itself elsewhere
        for written in (one, other):
            same = np.count_nonzero(one[back:] == written[: len(written) - back])
            if back or written is other:
                assert same / (len(one) - back) < 1 / 200


def test_oracle_sees_writes_in_the_wrong_order() -> None:
    witness, entries = _history()
    entries[0].seq, entries[1].seq = 2, 1
    with pytest.raises(AssertionError, match="stands after it"):
        witness.check_order(witness.recorded([entries[1], entries[0]]))


def test_oracle_sees_a_write_on_the_wrong_side_of_a_mark() -> None:
    witness, entries = _history()
    entries[2].seq, entries[3].seq = 4, 3
    witness.marks[0].seq = 4
    with pytest.raises(AssertionError, match="has command 3"):
        witness.check_marks(entries, witness.recorded(entries))


def test_oracle_sees_lost_torn_and_foreign_writes() -> None:
    witness, entries = _history()
    with pytest.raises(AssertionError, match="command 2"):
        witness.check_content(0, _content([entries[0], entries[3]]))
    torn = bytearray(_content(entries))
    torn[4000] ^= 1
    with pytest.raises(AssertionError, match="no other command explains"):
        witness.check_content(0, bytes(torn))
    with pytest.raises(AssertionError, match="twice"):
        witness.recorded([*entries, entries[0]])
    command = witness.commands[0]
    witness.killed = [command.answered + 1]
    with pytest.raises(AssertionError, match="twice"):
        witness.recorded([*entries, entries[0]])
    witness.killed, command.answered = [command.sent + 0.5], command.sent + 1
    assert len(witness.recorded([*entries, entries[0]])) == 4
    with pytest.raises(AssertionError, match="twice"):
        witness.recorded([*entries, entries[0], entries[0]])
    entries[0] = _entry(layout.KIND_WRITE, 1, 0, bytes(4096))
    with pytest.raises(AssertionError, match="no client wrote"):
        witness.recorded(entries)


def test_oracle_sees_a_later_write_in_an_earlier_point() -> None:
    witness, entries = _history()
    mark = witness.marks[0]
    with pytest.raises(AssertionError, match="no other command explains"):
        witness.check_content(0, _content(entries), asked=mark.asked, answered=mark.answered)
