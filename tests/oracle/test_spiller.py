"""Spiller, feed and ring against a list: whatever is killed and lost, a target gets in order all
that was published, but for what a power loss took from the ring."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vrep._core import layout, record
from vrep._core.ring import RingProducer, RingReader
from vrep._core.seal import Opener, Sealer
from vrep.errors import CorruptError, StorageError
from vrep.keys.datakey import DataKey
from vrep.source import spiller as spiller_module
from vrep.source.feed import Feed
from vrep.source.spill import Spill, SpillKeys
from vrep.source.spiller import Spiller, Work

GROUP = bytes(range(16))
RING_BYTES = 256 << 10
ROOM = memoryview(bytearray(1 << 20))
KEYS = {n: DataKey(GROUP, n, bytes([n] * 32)) for n in (1, 2)}
SHM = Path("/dev/shm")


class KilledError(Exception):
    """The source process dies here."""


class LabFeed(Feed):
    """Lets go of the ring's memory as the filter does."""

    lab: Lab
    dies = False

    def report(self, *, received: int = 0, durable: int = 0, spilled: int = 0) -> None:
        if self.dies and spilled:
            raise KilledError
        super().report(received=received, durable=durable, spilled=spilled)
        self.lab.released = max(self.lab.released, durable, spilled)
        if self.lab.released > self.lab.producer.released:
            self.lab.producer.release(self.lab.released)


class Lab:
    """The filter's and the target's ends; stands for the source's hold as well."""

    def __init__(self, directory: Path, seed: int, **options: int) -> None:
        self.choose = random.Random(seed)
        self.directory = directory
        self.options = {"quota_bytes": 1 << 30, "reserve_bytes": 0, "segment_bytes": 96 << 10}
        self.options |= options
        self.path = SHM / f"vrep-test-{uuid.uuid4().hex}"
        self.generation, self.epoch = 1, 1
        self.published: list[tuple[int, int, bytes]] = []
        self.target: list[tuple[int, int, bytes]] = []
        self.durable = 0
        self.first = self.choose.choice((0, 7, 1 << 40))
        self.new_ring(self.first)
        self.start_source()

    # ---- the filter ----------------------------------------------------------------

    def new_ring(self, first_seq: int) -> None:
        self.producer = RingProducer.create(
            self.path,
            group_id=GROUP,
            descriptors=256,
            payload_bytes=RING_BYTES,
            first_seq=first_seq,
        )
        self.released = first_seq
        if first_seq:
            self.publish(layout.KIND_GAP_BEGIN, b"", layout.RECORD_JUMP)

    def publish(self, kind: int, data: bytes, flags: int = 0) -> None:
        seq = self.producer.publish(kind, data, flags=flags, wall_ns=1_000, offset=0)
        self.published.append((seq, kind, data))

    def write(self) -> bool:
        size = self.choose.choice((512, 4096, 20_000, 60_000))
        if self.producer.free_bytes < size + 4096 or self.producer.free_descriptors < 2:
            return False
        self.publish(layout.KIND_WRITE, self.choose.randbytes(size))
        return True

    def power_loss(self) -> None:
        """The ring is gone, and what only it held."""
        kept = max(self.spill.last, self.durable)
        head = self.producer.head
        self.published = [each for each in self.published if each[0] <= kept]
        self.reader.close()
        self.producer.close()
        self.new_ring(head + self.choose.randrange(1, 1000))
        self.start_source()

    def lose_ring(self) -> None:
        """As `vrep_group_lose_ring` does, when a session begins; the spill is kept."""
        self.connect()
        self.lose_ring_behind(max(self.spill.last, self.durable))

    def lose_ring_behind(self, kept: int) -> None:
        self.published = [each for each in self.published if each[0] <= kept]
        self.released = self.producer.head
        self.producer.release(self.released)
        self.publish(layout.KIND_GAP_BEGIN, b"", layout.RECORD_JUMP)

    # ---- the source's hold -----------------------------------------------------------

    def alive(self) -> bool:
        return True

    def status(self) -> dict[str, Any]:
        return {"ring_free_bytes": self.producer.free_bytes, "ring_bytes": RING_BYTES}

    def jumps(self, after: int) -> bool:
        if not self.producer.released <= after < self.producer.head:
            return False
        first = self.reader.descriptors(after + 1, after + 1)[0]
        return bool(int(first["flags"]) & layout.RECORD_JUMP)

    def stream(self) -> np.ndarray[Any, Any]:
        stream = np.zeros(1, layout.STREAM)
        stream["key_generation"] = 1  # of the attempt that began before the key was renewed
        return stream

    def start_source(self) -> None:
        self.reader = RingReader(self.path)
        self.spill = Spill(self.directory, GROUP, **self.options)
        self.spill.cut(self.reader.released)
        keys = SpillKeys(KEYS[self.generation], KEYS.__getitem__)
        self.feed = LabFeed(self.reader, self.spill, keys)
        self.feed.lab = self
        self.spiller = Spiller("web", self.spill)
        self.spiller.durable = self.durable
        self.work()
        self.connect()

    def work(self) -> None:
        assert self.feed.keys is not None
        hold: Any = self
        self.spiller.take(Work(hold, self.feed, self.feed.keys, self.stream, self.epoch, 0))

    def kill_source(self) -> None:
        self.feed.dies = True
        with contextlib.suppress(KilledError):
            self.spiller.step()
        self.reader.close()
        self.start_source()

    # ---- the target ------------------------------------------------------------------

    def connect(self) -> None:
        """A new session; what is not durable the target forgets."""
        self.target = [each for each in self.target if each[0] <= self.durable]
        with self.spiller.still():
            self.feed.mend(self.durable)
        assert self.feed.reaches(self.durable) or self.jumps(self.feed.floor)
        stream_id, key = self.choose.randbytes(16), bytes([8] * 32)
        self.sealer = Sealer(key, stream_id, epoch=9, resume_seq=self.durable, secret=bytes(192))
        self.opener = Opener(key, stream_id)

    def ship(self) -> None:
        head = self.reader.head
        if self.sealer.seq >= head:
            return
        room = ROOM[: self.choose.choice((150_000, len(ROOM)))]
        written, done = self.feed.seal(self.sealer, head, room)
        assert done
        for each in record.scan(room[:written])[0]:
            header = each["header"]
            data = b""
            if header["kind"] == layout.KIND_WRITE:
                out = bytearray(int(header["length"]))
                self.opener.record(room[int(each["position"]) : written], out)
                data = bytes(out)
            self.target.append((int(header["seq"]), int(header["kind"]), data))

    def acknowledge(self) -> None:
        if not self.target:
            return
        known = [each[0] for each in self.target if each[0] > self.durable]
        if known:
            self.durable = self.choose.choice(known)
            self.feed.report(received=self.durable, durable=self.durable)
            if self.choose.random() < 0.8:
                self.spiller.durable = self.durable

    def check(self) -> None:
        """What the target has is what was published, from the first on."""
        assert self.target == self.published[: len(self.target)]

    def ship_all(self) -> None:
        while self.sealer.seq < self.reader.head:
            self.ship()

    def finish(self) -> None:
        self.connect()
        self.ship_all()
        assert self.target == self.published


@pytest.fixture
def lab(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Lab]:
    one = Lab(tmp_path / "spill", getattr(request, "param", 1))
    yield one
    one.reader.close()
    one.producer.close()
    one.path.unlink()


def fill(lab: Lab) -> None:
    while lab.write():
        pass


@pytest.mark.parametrize("lab", range(12), indirect=True)
def test_history(lab: Lab) -> None:
    turns = {
        "step": 6, "ship": 5, "acknowledge": 4, "connect": 1, "kill_source": 1,
        "power_loss": 0.4, "lose_ring": 0.4, "renew": 0.5,
    }  # fmt: skip
    for _ in range(120):
        for _ in range(lab.choose.randrange(8)):
            lab.write()
        (turn,) = lab.choose.choices(list(turns), list(turns.values()))
        if turn == "step":
            lab.spiller.step()
        elif turn == "renew":
            lab.generation, lab.epoch = 3 - lab.generation, lab.epoch + 1
            assert lab.feed.keys is not None
            lab.feed.keys.renew(KEYS[lab.generation])
            lab.work()
        else:
            getattr(lab, turn)()
        lab.check()
    lab.finish()


def test_nothing_is_reported_before_it_is_on_disk(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is reported as spilled, the filter overwrites. A power loss that takes every byte that
    was not synced leaves it."""
    reported: list[int] = []
    synced: dict[str, int] = {}
    report, sync = lab.feed.report, os.fdatasync

    def note(fd: int) -> None:
        sync(fd)
        synced[Path(f"/proc/self/fd/{fd}").readlink().name] = os.fstat(fd).st_size

    def look(**values: int) -> None:
        if spilled := values.get("spilled"):
            copy = tmp_path / f"copy-{len(reported)}"
            shutil.copytree(lab.directory, copy)
            for path in copy.iterdir():
                os.truncate(path, synced.get(path.name, 0))
            found = Spill(copy, GROUP, quota_bytes=1 << 30, reserve_bytes=0)
            assert found.last >= spilled > found.after
            reported.append(spilled)
        report(**values)

    monkeypatch.setattr(os, "fdatasync", note)
    lab.feed.report = look  # type: ignore[method-assign]
    for _ in range(3):
        fill(lab)
        lab.spiller.step()
    assert len(reported) >= 3
    assert lab.producer.released == reported[-1]
    lab.finish()


def test_damage_that_is_found_while_it_is_shipped_is_a_hole(lab: Lab) -> None:
    for _ in range(6):
        fill(lab)
        lab.spiller.step()
    path = sorted(lab.directory.glob("spill-*"))[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    lab.connect()
    with pytest.raises(CorruptError, match=path.name):
        lab.ship_all()
    lab.durable = hole = lab.sealer.seq
    assert hole > 0
    with lab.spiller.still():
        lab.feed.mend(hole)
    assert lab.spill.last == hole
    assert not lab.feed.reaches(hole)  # the session begins a gap
    lab.lose_ring_behind(hole)
    lab.finish()
    assert lab.target[-1][0] > hole


def test_what_does_not_follow_the_target_is_no_use(lab: Lab) -> None:
    """The front of the spill is lost, and so is the ring, in a power loss."""
    for _ in range(6):
        fill(lab)
        lab.spiller.step()
    sorted(lab.directory.glob("spill-*"))[0].unlink()
    lab.published = [each for each in lab.published if each[0] <= lab.durable]
    lab.reader.close()
    head = lab.producer.head
    lab.producer.close()
    lab.new_ring(head + 100)
    lab.start_source()
    assert lab.spill.last == 0
    fill(lab)
    lab.finish()


def test_a_jump_may_begin_a_spill(lab: Lab) -> None:
    """Nothing was spilled before a power loss: what is spilled after it is not lost."""
    fill(lab)
    lab.power_loss()
    for _ in range(3):
        fill(lab)
        lab.spiller.step()
    assert lab.spill.last
    lab.reader.close()
    lab.start_source()
    assert lab.feed.reaches(lab.durable)
    lab.finish()


def test_a_disk_that_takes_nothing_is_not_littered(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(lab)
    sync, calls = os.fdatasync, iter(range(1000))

    def second_fails(fd: int) -> None:
        if next(calls) % 2:
            raise OSError(28, "No space left on device")
        sync(fd)

    with monkeypatch.context() as full:
        full.setattr(os, "fdatasync", second_fails)
        for _ in range(5):
            with pytest.raises(StorageError):
                lab.spiller.step()
            assert not list(lab.directory.glob("spill-*"))
            assert (lab.spill.last, lab.spill.bytes) == (0, 0)
    lab.spiller.step()
    fill(lab)
    lab.finish()


def test_no_record_passes_the_quota(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spiller_module, "BATCH_BYTES", 10_000)
    lab.spill.quota_bytes = 20_000
    while lab.producer.free_bytes > 70_000:
        lab.publish(layout.KIND_WRITE, lab.choose.randbytes(60_000))
    lab.spiller.step()
    assert lab.spill.bytes == 0
    assert "of 20000 bytes" in lab.spiller.full
    assert not list(lab.directory.glob("spill-*"))
    lab.spill.quota_bytes = 1 << 30
    lab.spiller.step()
    assert not lab.spiller.full
    lab.finish()


def test_it_is_not_full_any_more_when_there_is_room(lab: Lab) -> None:
    free = [0]
    lab.spill._free_bytes = lambda _path: free[0]
    fill(lab)
    lab.spiller.step()
    assert lab.spiller.full
    lab.ship_all()
    lab.feed.report(durable=lab.sealer.seq)
    lab.spiller.step()
    assert lab.spiller.full
    free[0] = 1 << 40
    lab.spiller.step()
    assert not lab.spiller.full


def test_no_error_ends_the_thread(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spiller_module, "PAUSE_FULL_S", 0.001)
    fill(lab)
    calls: list[int] = []

    def step() -> None:
        calls.append(1)
        raise ValueError("a spill that ends elsewhere")

    monkeypatch.setattr(lab.spiller, "step", step)
    lab.spiller.start()
    deadline = time.monotonic() + 20
    while len(calls) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert "ends elsewhere" in lab.spiller.full
    lab.spiller.stop()


def test_a_ring_that_fills_fast_is_drained_before_it_is_nearly_full(lab: Lab) -> None:
    """Although a target takes records; at a slow pace they are left to it."""
    spiller = lab.spiller
    spiller.connected = True
    level, now_s = 0.4, 100.0
    for _ in range(40):  # 1 percent in 0.1 s: full in 4 s
        level, now_s = level + 0.01, now_s + 0.1
        spiller.draining = spiller._due(level, now_s)
        assert not spiller.draining
    assert level == pytest.approx(0.8)
    assert spiller._due(0.9, now_s + 1)  # HIGH_CONNECTED
    spiller._due(0.6, now_s + 2)
    assert not spiller._due(0.7, now_s + 2.03)  # below LOW_CONNECTED, whatever the pace
    assert spiller._due(0.8, now_s + 2.06)  # full in 60 ms
    assert not spiller._due(0.8, now_s + 2.09)  # it fills no more
