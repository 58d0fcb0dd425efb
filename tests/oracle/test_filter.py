"""Random histories of a group against plain bytes: order, marks, gaps, and every way to end.

The source is what the disk files hold. The target is an image that applies records in the
order of their seq and makes them durable when the history says so. At every quiet point each
block in which source and durable target differ must be dirty (invariant 2); once a gap has
ended and all is applied, both are equal (invariants 4 and 8). A power loss forgets shared
memory and any part of what was not flushed.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from vrep._core.filter_driver import Follower, GroupDriver, Pending, Record
from vrep.errors import AgainError, GoneError

DISKS = 2
SIZE = (1 << 20) + 512 * 7
BIT = 65536
BLOCK = 4096
TARGET = b"t" * 16
WRITE, ZEROES, SYNC, SYNC_ZEROES, GAP_BEGIN, GAP_END = 1, 2, 4, 5, 7, 8
JUMP = 0x0008


class Target:
    """The other side: what is applied, and what of it would survive its crash."""

    def __init__(self) -> None:
        self.durable = [bytearray(SIZE) for _ in range(DISKS)]
        self.durable_seq = 0
        self.durable_gap = True
        self.waiting: list[Record] = []

    @property
    def seq(self) -> int:
        return self.waiting[-1].seq if self.waiting else self.durable_seq

    def receive(self, record: Record) -> None:
        jump = record.kind == GAP_BEGIN and record.flags & JUMP
        assert record.seq == self.seq + 1 or (jump and record.seq > self.seq)
        self.waiting.append(record)

    def sync(self, count: int) -> None:
        for record in self.waiting[:count]:
            disk, end = self.durable[record.disk], record.offset + record.length
            if record.kind in (WRITE, SYNC):
                assert record.payload is not None
                assert len(record.payload) == record.length
                disk[record.offset : end] = record.payload
            elif record.kind in (ZEROES, SYNC_ZEROES):
                disk[record.offset : end] = bytes(record.length)
            elif record.kind == GAP_BEGIN:
                self.durable_gap = True
            elif record.kind == GAP_END:
                assert self.durable_gap
                self.durable_gap = False
            self.durable_seq = record.seq
        del self.waiting[:count]


class History:
    ring_bytes = 1 << 20

    def __init__(self, rng: random.Random, root: Path) -> None:
        self.rng = rng
        self.root = root
        self.shm, self.state = root / "shm", root / "state"
        self.shm.mkdir()
        self.state.mkdir()
        self.files = []
        for number in range(DISKS):
            path = root / f"disk{number}"
            with path.open("wb") as file:
                file.truncate(SIZE)
                file.seek(rng.randrange(SIZE // 2))
                file.write(rng.randbytes(rng.randrange(SIZE // 2)))
            self.files.append(os.open(path, os.O_RDWR))
        self.model = [bytearray(self.source(disk)) for disk in range(DISKS)]
        self.stable = [bytearray(image) for image in self.model]
        self.target = Target()
        self.flights: list[tuple[Pending, str, int, int, int, bytes]] = []
        self.ends = 0
        self.open("new")

    # ---- the group ------------------------------------------------------------

    def open(self, *expected: str) -> None:
        self.group = GroupDriver(
            [(f"d{disk}", f"file:{self.root}/disk{disk}") for disk in range(DISKS)],
            group_id=b"g" * 16,
            target_id=TARGET,
            shm_dir=self.shm,
            state_dir=self.state,
            ring_bytes=self.ring_bytes,
            ring_descriptors=256,
            slots=32,
            bit_bytes=BIT,
            threads=2,
        )
        status = self.group.status()
        assert status["opened_as"] in expected
        assert status["unverified"] == ""
        self.follower: Follower | None = None
        self.check_dirty()

    def attach(self) -> None:
        if self.follower is not None:
            return
        # A target forgets what it had not synced; the ring still has it.
        self.target.waiting.clear()
        fds = self.group.consumer_attach("target", TARGET, self.target.durable_seq)
        self.follower = Follower(self.shm / "ring", fds)
        self.next = max(self.target.durable_seq, self.follower.released) + 1

    def source(self, disk: int) -> bytes:
        return os.pread(self.files[disk], SIZE, 0)

    # ---- the guest ----------------------------------------------------------------

    def submit(self) -> None:
        rng = self.rng
        op = rng.choices(["write", "zero", "discard"], [8, 2, 1])[0]
        disk = rng.randrange(DISKS)
        length = min(int(rng.expovariate(1 / 20000)) + 1, SIZE)
        if rng.random() < 0.02:
            length = rng.randrange(SIZE // 2, SIZE)
        offset = rng.randrange(SIZE - length + 1)
        if rng.random() < 0.3:
            offset, length = offset // BLOCK * BLOCK, (length + BLOCK - 1) // BLOCK * BLOCK
            length = min(length, SIZE - offset)
        data = rng.randbytes(length) if op == "write" else bytes(length)
        fua = rng.random() < 0.2
        try:
            if op == "write":
                pending = self.group.submit("write", disk, offset, data=data, fua=fua)
            elif op == "zero":
                pending = self.group.submit(
                    "zero", disk, offset, length, fua=fua, no_hole=rng.random() < 0.5
                )
            else:
                pending = self.group.submit("discard", disk, offset, length)
        except AgainError:
            self.finish(1)
            return
        self.flights.append((pending, op, disk, offset, length, data))

    def finish(self, keep: int = 0) -> None:
        """The oldest commands end; overlapping ones take effect in the order of submission."""
        while len(self.flights) > keep:
            pending, op, disk, offset, length, data = self.flights.pop(0)
            self.group.result(pending)
            if op == "discard":
                self.model[disk][offset : offset + length] = os.pread(
                    self.files[disk], length, offset
                )
            else:
                self.model[disk][offset : offset + length] = data

    def flush(self) -> None:
        self.finish()
        disk = self.rng.randrange(DISKS)
        self.group.run("flush", disk)
        self.stable[disk] = bytearray(self.model[disk])

    def read(self) -> None:
        self.finish()
        disk = self.rng.randrange(DISKS)
        length = self.rng.randrange(1, 50000)
        offset = self.rng.randrange(SIZE - length)
        got = self.group.run("read", disk, offset, length)
        assert got == self.model[disk][offset : offset + length]

    # ---- the target -----------------------------------------------------------------

    def receive(self) -> None:
        self.attach()
        assert self.follower is not None
        until = self.rng.randrange(self.next - 1, self.follower.head + 1)
        if self.rng.random() < 0.5:
            until = self.follower.head
        while self.next <= until:
            self.target.receive(self.follower.record(self.next))
            self.next += 1

    def sync_target(self) -> None:
        if self.follower is None:
            return
        self.target.sync(self.rng.randrange(len(self.target.waiting) + 1))
        # A target that has nothing of this ring yet says nothing.
        durable = max(self.target.durable_seq, self.follower.released)
        self.follower.report(durable, max(durable, self.target.seq))
        self.group.poll()

    def crash_target(self) -> None:
        self.target.waiting.clear()
        self.follower = None

    def resync(self) -> None:
        self.attach()
        self.group.resync(self.rng.random() < 0.8, bytes_per_s=self.rng.choice([0, 0, 1 << 22]))
        self.pump(self.rng.randrange(30))

    def pump(self, turns: int) -> None:
        for _ in range(turns):
            self.group.poll()

    # ---- ends --------------------------------------------------------------------------

    def restart(self) -> None:
        rng = self.rng
        self.ends += 1
        how = rng.choice(["clean", "reboot", "kill", "power"])
        self.follower = None
        self.target.waiting.clear()
        if how in ("clean", "reboot"):
            self.finish()
            self.group.close()
            self.stable = [bytearray(image) for image in self.model]
            if how == "reboot":
                self.forget_memory()
            self.open("clean")
            return
        flights, self.flights = self.flights, []
        self.group.kill()
        touched = [bytearray(SIZE) for _ in range(DISKS)]
        for _, _, disk, offset, length, _ in flights:
            touched[disk][offset : offset + length] = b"\1" * length
        for disk in range(DISKS):
            now = self.source(disk)
            if how == "kill":
                for at in range(0, SIZE, BLOCK):
                    stop = min(at + BLOCK, SIZE)
                    if not any(touched[disk][at:stop]):
                        assert now[at:stop] == self.model[disk][at:stop]
            else:
                self.lose_unflushed(disk, now)
            self.model[disk] = bytearray(self.source(disk))
        if how == "power":
            self.stable = [bytearray(image) for image in self.model]
            self.forget_memory()
        self.open("killed" if how == "kill" else "power-loss")

    def lose_unflushed(self, disk: int, now: bytes) -> None:
        for at in range(0, SIZE, BLOCK):
            stop = min(at + BLOCK, SIZE)
            if now[at:stop] != self.stable[disk][at:stop] and self.rng.random() < 0.5:
                os.pwrite(self.files[disk], self.stable[disk][at:stop], at)

    def forget_memory(self) -> None:
        for path in self.shm.iterdir():
            path.unlink()

    # ---- what must hold ---------------------------------------------------------------

    def check_dirty(self) -> None:
        for disk in range(DISKS):
            source, target = self.source(disk), self.target.durable[disk]
            dirty = self.group.dirty(disk)
            for bit, flag in enumerate(dirty):
                block = slice(bit * BIT, (bit + 1) * BIT)
                assert flag or source[block] == target[block], f"disk {disk} bit {bit} is clean"

    def settle(self) -> None:
        """With a target that takes all, every gap ends and both sides are equal."""
        self.finish()
        self.attach()
        assert self.follower is not None
        self.group.resync(True)
        until = time.monotonic() + 60
        while True:
            self.group.poll()
            while self.next <= self.follower.head:
                self.target.receive(self.follower.record(self.next))
                self.next += 1
            self.target.sync(len(self.target.waiting))
            self.follower.report(self.target.durable_seq)
            status = self.group.status()
            if not status["gap"] and status["durable"] == status["head"]:
                break
            assert time.monotonic() < until, f"the gap does not end: {status}"
        assert not self.target.durable_gap
        for disk in range(DISKS):
            assert self.source(disk) == self.model[disk]
            assert self.target.durable[disk] == self.model[disk]
        seq = self.group.mark("settled")
        assert self.follower.record(seq).payload is not None

    def close(self) -> None:
        self.finish()
        self.follower = None
        self.group.close()

    def release(self) -> None:
        self.follower = None
        self.group.kill()
        for file in self.files:
            os.close(file)


STEPS = {
    History.submit: 40,
    History.finish: 8,
    History.flush: 3,
    History.read: 3,
    History.receive: 12,
    History.sync_target: 12,
    History.crash_target: 1,
    History.resync: 5,
    History.restart: 2,
    History.settle: 1,
}


@pytest.fixture
def root() -> Path:
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="vrep-oracle-", dir=base))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("number", range(12))
def test_history(number: int, rng: random.Random, root: Path) -> None:
    history = History(rng, root)
    try:
        for _ in range(250):
            step = rng.choices(list(STEPS), list(STEPS.values()))[0]
            step(history)
            history.check_dirty()
        history.settle()
        history.close()
    finally:
        history.release()


def test_target_that_lost_its_past_starts_again(rng: random.Random, root: Path) -> None:
    history = History(rng, root)
    try:
        for _ in range(60):
            history.submit()
        history.settle()
        history.follower = None
        history.target = Target()
        with pytest.raises(GoneError):
            history.attach()
        history.group.lose_ring()
        history.group.resync(everything=True)
        history.settle()
        history.close()
    finally:
        history.release()
