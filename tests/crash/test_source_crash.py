"""Power losses of the source (invariants 2 and 6; rules 8 and 9 of the change map).

A group runs in a process of its own, on disks and durable state that forget (forget.c). At random
moments its power is lost: shared memory is gone, of the files anything unsynced may be. Then it
must say so, hold what the guest was promised, know of each block in which it differs from the
target, and lead the target to the same content.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forget
import numpy as np
import pytest
import source_worker as worker

from vrep._core import layout
from vrep._core.filter_driver import Follower
from vrep.checksum import CHECKSUM_BYTES, checksum32

HERE = Path(__file__).resolve().parent
WRITE, ZEROES, SYNC, SYNC_ZEROES, GAP_BEGIN, GAP_END = 1, 2, 4, 5, 7, 8
JUMP = 0x0008


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(forget.compile_shim(tmp_path_factory.mktemp("shim")))


@pytest.fixture
def root() -> Iterator[Path]:
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="vrep-crash-", dir=base)).resolve()
    yield path
    shutil.rmtree(path)


def record(root: Path, shim: Path, seed: int, steps: int) -> None:
    """Run the load; its log says everything."""
    rng = random.Random(seed)
    for name in ("durable", "shm"):
        (root / name).mkdir()
    for disk in range(worker.DISKS):
        with (root / "durable" / f"disk{disk}").open("wb") as file:
            file.truncate(worker.SIZE)
            for window in range(0, worker.SIZE, worker.EXTENT):
                file.seek(window)
                file.write(rng.randbytes(rng.randrange(worker.WINDOW)))
    shutil.copytree(root / "durable", root / "before", copy_function=shutil.copy2)
    environment = os.environ | {
        "LD_PRELOAD": str(shim),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "VREP_FORGET_DIR": str(root / "durable"),
        "VREP_FORGET_LOG": str(root / "log"),
        "VREP_FORGET_US": "300",
        "VREP_FORGET_SPEED": "1000",
    }
    subprocess.run(
        [sys.executable, str(HERE / "source_worker.py"), str(root), str(seed), str(steps)],
        env=environment,
        check=True,
        timeout=300,
    )


def pack(image: bytes) -> bytes:
    """The windows of a disk; between them it is empty."""
    starts = range(0, worker.SIZE, worker.EXTENT)
    return b"".join(image[start : start + worker.WINDOW] for start in starts)


def packed(offset: int) -> int:
    assert offset % worker.EXTENT < worker.WINDOW
    return offset // worker.EXTENT * worker.WINDOW + offset % worker.EXTENT


class Guest:
    """What the guest of one disk may find: for each byte what it was promised last, and what it
    wrote since."""

    def __init__(self, content: bytes) -> None:
        self.promised = np.frombuffer(content, dtype=np.uint8).copy()
        self.floor = np.zeros(len(content), dtype=np.int64)
        self.writes: list[tuple[int, int, np.ndarray]] = []

    def issue(self, number: int, offset: int, data: bytes) -> None:
        self.writes.append((number, packed(offset), np.frombuffer(data, dtype=np.uint8)))

    def promise(self, numbers: set[int]) -> None:
        for number, offset, data in self.writes:
            if number in numbers:
                span = slice(offset, offset + len(data))
                newer = self.floor[span] < number
                self.promised[span][newer] = data[newer]
                self.floor[span][newer] = number

    def check(self, found: bytes) -> None:
        actual = np.frombuffer(found, dtype=np.uint8)
        good = actual == self.promised
        for number, offset, data in self.writes:
            span = slice(offset, offset + len(data))
            good[span] |= (self.floor[span] < number) & (actual[span] == data)
        wrong = np.flatnonzero(~good)
        assert not len(wrong), f"{len(wrong)} bytes from {wrong[:1]} are not what was promised"


class World:
    """Everything outside the source, entry by entry."""

    def __init__(self, root: Path, seed: int) -> None:
        self.seed = seed
        images = [(root / "before" / f"disk{disk}").read_bytes() for disk in range(worker.DISKS)]
        self.guests = [Guest(pack(image)) for image in images]
        self.target = [bytearray(worker.SIZE) for _ in range(worker.DISKS)]
        self.records: list[tuple[dict[str, Any], bytes]] = []
        self.commands: dict[int, dict[str, Any]] = {}
        self.acked: dict[int, set[int]] = {disk: set() for disk in range(worker.DISKS)}
        self.covers: dict[int, set[int]] = {}
        self.durable = self.head = 0

    def hear(self, mark: bytes) -> None:
        line, _, data = mark.partition(b"\n")
        said = json.loads(line)
        what = said["what"]
        if what == "opened":
            assert said["how"] == "new"
        elif what == "issue":
            self.issue(said)
        elif what == "ack":
            self.acknowledge(said["number"])
        elif what == "record":
            self.head = max(self.head, said["seq"])
            self.records.append((said, data))
        elif what == "durable":
            self.apply(said["seq"])
        elif what == "head":
            self.head = max(self.head, said["seq"])

    def issue(self, said: dict[str, Any]) -> None:
        number, disk = said["number"], said["disk"]
        self.commands[number] = said
        if said["op"] == "flush":
            self.covers[number] = set(self.acked[disk])
        else:
            length = said["length"]
            zero = said["op"] == "zero"
            data = bytes(length) if zero else worker.payload(self.seed, number, length)
            self.guests[disk].issue(number, said["offset"], data)

    def acknowledge(self, number: int) -> None:
        said = self.commands[number]
        guest = self.guests[said["disk"]]
        if said["op"] == "flush":
            guest.promise(self.covers[number])
        else:
            self.acked[said["disk"]].add(number)
            if said["fua"]:
                guest.promise({number})

    def apply(self, seq: int) -> None:
        while self.records and self.records[0][0]["seq"] <= seq:
            apply(self.target, *self.records.pop(0))
        self.durable = seq


def apply(target: list[bytearray], said: dict[str, Any], data: bytes | None) -> None:
    span = slice(said["offset"], said["offset"] + said["length"])
    if said["kind"] in (WRITE, SYNC):
        assert data is not None
        assert len(data) == said["length"]
        target[said["disk"]][span] = data
    elif said["kind"] in (ZEROES, SYNC_ZEROES):
        target[said["disk"]][span] = bytes(said["length"])


def same_files(durable: Path) -> None:
    """What was rebuilt elsewhere has other inodes than the state says: it is to be taken for the
    files that there were. A torn slot stays so."""
    path = durable / "state"
    slots = np.frombuffer(bytearray(path.read_bytes()), layout.STATE)
    for at in range(len(slots)):
        if int(slots[at]["checksum"]) != checksum32(slots[at].tobytes()[:-CHECKSUM_BYTES]):
            continue
        for disk in range(worker.DISKS):
            slots[at]["disk"][disk]["inode"] = (durable / f"disk{disk}").stat().st_ino
        slots[at]["checksum"] = checksum32(slots[at].tobytes()[:-CHECKSUM_BYTES])
    path.write_bytes(slots.tobytes())


def check_loss(there: Path, world: World) -> int:
    """The source that a power loss left in ``there`` opens, and leads its target on, and reads no
    more for it than its durable state makes it doubt. Returns how many of the blocks that are
    written to it knew to be equal."""
    clean = 0
    doubted = worker.explained(there / "durable")
    same_files(there / "durable")
    (there / "shm").mkdir()
    sources = [(there / "durable" / f"disk{disk}").read_bytes() for disk in range(worker.DISKS)]
    for guest, source in zip(world.guests, sources, strict=True):
        guest.check(pack(source))
    group = worker.group_at(there)
    try:
        status = group.status()
        assert status["opened_as"] == "power-loss"
        assert status["unverified"] == ""
        assert status["gap"]
        for disk, source in enumerate(sources):
            for bit, dirty in enumerate(group.dirty(disk)):
                block = slice(bit * worker.BIT, (bit + 1) * worker.BIT)
                same = source[block] == world.target[disk][block]
                assert dirty or same, f"disk {disk}, block {bit} differs and is clean"
                clean += not dirty and block.start % worker.EXTENT < worker.WINDOW
        fds = group.consumer_attach("target", worker.TARGET, world.durable)
        follower = Follower(there / "shm" / "ring", fds)
        assert follower.released >= world.head
        dirty = sum(sum(map(bool, group.dirty(disk))) for disk in range(worker.DISKS))
        assert dirty <= len(doubted), "more is copied than the state explains"
        lead_on(group, follower, world, sources)
        assert 0 < group.status()["resync_bytes"] <= 1.05 * len(doubted) * worker.BIT or not dirty
        return clean
    finally:
        group.kill()


def lead_on(group: Any, follower: Follower, world: World, sources: list[bytes]) -> None:
    target = [bytearray(image) for image in world.target]
    group.resync(True)
    first = following = follower.released + 1
    open_gap = False
    until = time.monotonic() + 180
    while True:
        group.poll()
        while following <= follower.head:
            one = follower.record(following)
            if following == first:
                assert one.kind == GAP_BEGIN
                assert one.flags & JUMP
                assert one.seq > world.head
                open_gap = True
            elif one.kind == GAP_END:
                open_gap = False
            apply(target, one._asdict(), one.payload)
            following += 1
        follower.report(following - 1)
        status = group.status()
        if not status["gap"] and status["durable"] == status["head"]:
            break
        assert time.monotonic() < until, f"the gap does not end: {status}"
    assert not open_gap
    for mine, theirs in zip(sources, target, strict=True):
        assert mine == bytes(theirs)


def crash_at(root: Path, seed: int, cuts: int | None) -> int:
    """Rebuild and check ``cuts`` moments of a recorded run, or the last before the end of each
    flush, and its quiet end. Returns how many."""
    rng = random.Random(seed ^ 1)
    entries = list(forget.read_log(root / "log"))
    opened = next(
        number
        for number, entry in enumerate(entries)
        if entry.kind == forget.MARK and b'"opened"' in entry.data[:40]
    )
    if cuts is not None:
        moments = {*rng.sample(range(opened + 1, len(entries)), cuts), len(entries)}
    else:  # the flush is under way: of what stands before it anything may be there
        moments = {
            number
            for number, entry in enumerate(entries)
            if entry.kind == forget.SYNC_END and number > opened
        } | {len(entries)}
    storage = forget.Storage(root / "before")
    rename_inodes(storage, root)
    world = World(root, seed)
    for number, entry in enumerate(entries, 1):
        if entry.kind == forget.MARK:
            world.hear(entry.data)
        else:
            storage.apply(entry)
        if number in moments:
            there = root / "crash"
            there.mkdir()
            storage.after_loss(there / "durable", rng)
            clean = check_loss(there, world)
            shutil.rmtree(there)
    blocks = worker.DISKS * worker.WINDOWS * worker.WINDOW // worker.BIT
    assert clean == blocks, "what was durable there and cold is sent again"
    return len(moments)


def rename_inodes(storage: Any, root: Path) -> None:
    """The log speaks of the files that ran, the first content was copied from them."""
    storage.directory = (root / "durable").stat().st_ino
    for name, inode in list(storage.names.items()):
        ran = (root / "durable" / name).stat().st_ino
        storage.files[ran] = storage.files.pop(inode)
        storage.names[name] = storage.live[name] = ran


@pytest.mark.parametrize("round_", range(3))
def test_power_loss(round_: int, root: Path, shim: Path, seed: int) -> None:
    record(root, shim, seed, 600)
    crash_at(root, seed, 8)


def test_power_loss_at_every_flush(root: Path, shim: Path, seed: int) -> None:
    record(root, shim, seed, 100)
    assert crash_at(root, seed, None) > 20


@pytest.mark.slow
@pytest.mark.parametrize("round_", range(30))
def test_power_loss_long(round_: int, root: Path, shim: Path, seed: int) -> None:
    record(root, shim, seed, 3000)
    crash_at(root, seed, 60)
