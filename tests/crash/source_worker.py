"""A group under random load, in a process of its own below forget.c; see test_source_crash.py.

    python source_worker.py ROOT SEED STEPS

ROOT/durable is the watched directory: disks and durable state. Everything that the test must
know is written into the same log, as lines of JSON, in the order in which it happened.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import random
import sys
import time
from pathlib import Path

import parse

from vrep._core.filter_driver import Follower, GroupDriver, Pending
from vrep.errors import AgainError

DISKS, BIT = 2, 65536
EXTENT = 16 << 20  # of the write-intent
WINDOW, WINDOWS = 256 << 10, 3  # only the start of each extent is written
SIZE = (WINDOWS - 1) * EXTENT + WINDOW
GROUP, TARGET = b"g" * 16, b"t" * 16


def group_at(root: Path, **options: int) -> GroupDriver:
    durable = root / "durable"
    return GroupDriver(
        [(f"d{disk}", f"file:{durable}/disk{disk}") for disk in range(DISKS)],
        group_id=GROUP,
        target_id=TARGET,
        shm_dir=root / "shm",
        state_dir=durable,
        ring_bytes=1 << 20,
        ring_descriptors=256,
        slots=32,
        bit_bytes=BIT,
        threads=2,
        **options,
    )


def payload(seed: int, number: int, length: int) -> bytes:
    return random.Random(f"{seed}/{number}").randbytes(length)


def explained(durable: Path) -> set[tuple[int, int]]:
    """The blocks that a resync may have to read: those that the newest whole checkpoint of the
    change map has, and those of the newest whole write-intent's extents, as the independent
    parser reads them."""
    slots = []
    for path in (durable / "map.0", durable / "map.1"):
        with contextlib.suppress(parse.BadFormat, FileNotFoundError):
            slots.append(parse.parse_checkpoint(path.read_bytes()))
    bitmaps = parse.newest(slots)["bitmaps"]
    blocks = {(disk, bit) for disk, bits in enumerate(bitmaps) for bit in bits}
    a_disk = -(-SIZE // EXTENT // 64) * 64  # each begins at a word of its own
    for extent in parse.parse_intent((durable / "intent").read_bytes())["extents"]:
        disk, within = divmod(extent, a_disk)
        first = within * EXTENT // BIT
        last = min((within + 1) * EXTENT, SIZE) // BIT
        blocks |= {(disk, bit) for bit in range(first, last)}
    return blocks


class Load:
    def __init__(self, root: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.library = ctypes.CDLL(None)
        self.group = group_at(root, checkpoint_ms=2000)
        self.root = root
        self.flights: list[tuple[int, Pending]] = []
        self.number = 0
        self.follower: Follower | None = None
        self.next = 1
        self.say(what="opened", how=self.group.status()["opened_as"])

    def say(self, data: bytes = b"", **fields: object) -> None:
        text = json.dumps(fields).encode() + b"\n" + data
        self.library.forget_mark(text, ctypes.c_size_t(len(text)))

    def submit(self) -> None:
        rng = self.rng
        op = rng.choices(["write", "zero", "flush"], [12, 3, 2])[0]
        disk = rng.randrange(DISKS)
        length = min(int(rng.expovariate(1 / 8000)) + 1, WINDOW // 2)
        offset = rng.randrange(WINDOW - length)
        if rng.random() < 0.5:
            offset, length = offset // 4096 * 4096, max(length // 4096, 1) * 4096
        # The load moves on, and extents get cold behind it.
        window = (self.number // 40 + disk) if rng.random() < 0.95 else rng.randrange(WINDOWS)
        offset += window % WINDOWS * EXTENT
        fua = op != "flush" and rng.random() < 0.25
        self.number += 1
        self.say(
            what="issue",
            number=self.number,
            op=op,
            disk=disk,
            offset=offset,
            length=length,
            fua=fua,
        )
        try:
            if op == "write":
                data = payload(self.seed, self.number, length)
                pending = self.group.submit(op, disk, offset, data=data, fua=fua)
            elif op == "zero":
                pending = self.group.submit(
                    op, disk, offset, length, fua=fua, no_hole=rng.random() < 0.5
                )
            else:
                pending = self.group.submit(op, disk)
        except AgainError:
            self.say(what="refused", number=self.number)
            return
        self.flights.append((self.number, pending))

    def collect(self, keep: int) -> None:
        while len(self.flights) > keep:
            number, pending = self.flights.pop(self.rng.randrange(len(self.flights)))
            self.group.result(pending)
            self.say(what="ack", number=number)

    def hear(self) -> None:
        """What has completed is acknowledged as soon as it can be."""
        for number, pending in [flight for flight in self.flights if flight[1].done]:
            self.flights.remove((number, pending))
            self.group.result(pending)
            self.say(what="ack", number=number)

    def settle(self) -> None:
        while self.group.status()["gap"]:
            self.group.poll()
            self.replicate(wholly=True)

    def rest(self) -> None:
        """Until all is durable there and every extent is cold: a loss then costs nothing. How long
        that takes is the machine's business: what counts is that the files say so, and then some
        turns more, in which the last of them is synced. In vain for a minute, the test says so."""
        until = time.monotonic() + 60_000  # of the clock of forget.c
        turns = 0
        while turns < 400 and time.monotonic() < until:
            self.group.poll()
            self.replicate(wholly=True)
            cold = not self.group.status()["dirty_bytes"] and not explained(self.root / "durable")
            turns = turns + 1 if cold else 0
            time.sleep(0.5)

    def replicate(self, *, wholly: bool = False) -> None:
        if self.follower is None:
            fds = self.group.consumer_attach("target", TARGET, 0)
            self.follower = Follower(self.root / "shm" / "ring", fds)
            self.next = self.follower.released + 1
        until = self.follower.head
        if not wholly and self.rng.random() < 0.5:
            until = self.rng.randrange(self.next - 1, until + 1)
        for seq in range(self.next, until + 1):
            record = self.follower.record(seq)
            self.say(
                record.payload or b"",
                what="record",
                seq=seq,
                kind=record.kind,
                disk=record.disk,
                offset=record.offset,
                length=record.length,
            )
        self.next = until + 1
        self.say(what="durable", seq=until)
        self.follower.report(until)
        self.group.poll()

    def step(self) -> None:
        what = self.rng.choices(["submit", "turn", "collect", "replicate"], [10, 12, 2, 4])[0]
        if what == "submit":
            self.submit()
        elif what == "turn":
            self.group.poll()
            self.hear()
        elif what == "collect":
            self.collect(self.rng.randrange(4))
        else:
            self.replicate()
        self.say(what="head", seq=self.group.status()["head"])


def main() -> None:
    root, seed, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    load = Load(root, seed)
    load.group.resync(True)
    if seed % 4:  # else the load begins while the first sync runs
        load.settle()
    for _ in range(steps):
        load.step()
    load.collect(0)
    load.rest()
    load.say(what="end")
    load.follower = None
    load.group.kill()


if __name__ == "__main__":
    main()
