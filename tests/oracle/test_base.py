"""What the old site of a group seals of its old disks: what it holds, what it never claims, and
what a new writer need not send."""

from __future__ import annotations

import os
import random
import secrets
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrep import errors
from vrep._core import layout
from vrep._core.filter import Window
from vrep._core.hash import hash_blocks
from vrep._core.seal import Sealer
from vrep.keys.datakey import DataKey
from vrep.keys.identity import SiteIdentity
from vrep.keys.tenant import TenantKeyring
from vrep.paths import SitePaths
from vrep.recovery import base
from vrep.recovery.access import KeyAccess
from vrep.recovery.check import check_history
from vrep.recovery.fetch import Fetcher
from vrep.recovery.history import History, resolve
from vrep.source.delta import HashBook, Line
from vrep.target.base import BaseDisk, BaseOffer
from vrep.target.delta import look_up
from vrep.target.manifest import NOWHERE, DiskEntry, EpochEntry, EpochState, Position
from vrep.target.receive import GroupHost
from vrep.target.segment import segment_path
from vrep.target.store import GroupStore, StoreOptions, StoreReader, StoreSpec
from vrep.wire import messages as m

US, THEM = b"w" * 16, b"e" * 16
GROUP = b"g" * 16
UNIT = 4096
DISK = (3 << 20) + 512
"""ends inside a unit"""
WAIT_S = 60.0


def epoch(number: int, writer: bytes, parent: Position = NOWHERE) -> EpochEntry:
    return EpochEntry(number, EpochState.ACCEPTED, bytes([number]) * 16, writer, parent, number)


@dataclass
class Old:
    """The old site: its keys, its disk, its target, and whoever writes to its store."""

    root: Path
    rng: random.Random
    disk: bytearray = field(default_factory=lambda: bytearray(DISK))
    keys: list[bytes] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        SiteIdentity.create(self.root, "old")
        self.paths = SitePaths(self.root)
        ring = TenantKeyring(self.root)
        ring.create("acme")
        self.tenant = ring.get("acme")
        self.key = DataKey.create(GROUP)
        self.keys = [self.key.wrap(self.tenant)]
        self.command = [sys.executable, "-m", "vrep.recovery.base", str(self.root)]
        self.image = self.root / "old.raw"
        self.host = self.open()

    def open(self, reserve_bytes: int = 0) -> GroupHost:
        options = StoreOptions(commit_s=0.001, reserve_bytes=reserve_bytes, merge=False)
        self.host = GroupHost(self.paths.store, GROUP, options, 1 << 20, site=US)
        return self.host

    @property
    def store(self) -> GroupStore:
        return self.host.require()

    def fill(self, share: float = 0.5) -> None:
        """Random units, so that a file has holes."""
        for at in range(0, DISK, UNIT):
            if self.rng.random() < share:
                self.change(at)

    def change(self, at: int) -> None:
        end = min(at + UNIT, DISK)
        self.disk[at:end] = self.rng.randbytes(end - at)

    def offer(self, left: Position) -> BaseOffer:
        """As its disk is now."""
        with self.image.open("wb") as file:
            file.truncate(DISK)
            for at in range(0, DISK, UNIT):
                unit = self.disk[at : at + UNIT]
                if unit.strip(b"\0"):
                    file.seek(at)
                    file.write(unit)
        disk = BaseDisk("root", str(self.image), DISK, 0)
        return BaseOffer("web", left, [disk], self.keys, 1, self.command)

    def follow(self, epochs: list[EpochEntry], offer: BaseOffer) -> None:
        """As the new writer asks, until it is done."""
        deadline = time.monotonic() + WAIT_S
        while self.host.follow(epochs, offer):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    # ---- what is there -------------------------------------------------------------

    def kinds(self, number: int) -> list[tuple[int, int, int]]:
        """Kind, seq and length of every record of an epoch."""
        with StoreReader(self.paths.store, GROUP) as reader:
            headers = [
                header
                for segment in reader.numbers()
                for span in reader.spans(segment)
                for header in span.found["header"]
            ]
        mine = [h for h in headers if int(h["epoch"]) == number]
        return [(int(h["kind"]), int(h["seq"]), int(h["length"])) for h in mine]

    def require_no_new_point(self, before: Position | None, *positions: Position) -> None:
        """What can be recovered is what could be before; of these positions none."""
        with StoreReader(self.paths.store, GROUP) as reader:
            assert History(reader).newest == before
            for position in positions:
                with pytest.raises(errors.RecoveryError):
                    resolve(reader, f"pos:{position}", None, 0)
        points = self.store.points()
        assert (points[1].position if points else None) == before

    def require_whole(self, tallied: Position | None = None) -> None:
        with StoreReader(self.paths.store, GROUP) as reader:
            access = KeyAccess.open(self.paths, GROUP, reader.wrapped_keys)
            verdict = check_history(self.paths, reader, access, fresh=True)
        assert verdict.whole
        assert verdict.sealed
        if tallied is not None:
            assert verdict.tallied_to == f"pos:{tallied}"

    def show(self, position: Position) -> bytes:
        """The disk at a position of the store."""
        with StoreReader(self.paths.store, GROUP) as reader:
            access = KeyAccess.open(self.paths, GROUP, reader.wrapped_keys)
            fetcher = Fetcher(reader, reader.extent_map(position), access)
            return bytes(fetcher.read(0, 0, DISK) or bytes(DISK))


@dataclass
class Writer:
    """A site that writes the group to the old site's store."""

    old: Old
    entry: EpochEntry

    def __post_init__(self) -> None:
        self.seq = self.entry.parent.seq
        stream_id = secrets.token_bytes(16)
        key = self.old.key
        self.sealer = Sealer(
            key.stream_key(stream_id),
            stream_id,
            epoch=self.entry.epoch,
            resume_seq=self.seq,
            secret=key.hash_secret(),
            level=1,
        )
        body = np.zeros((), layout.STREAM)
        body["epoch_id"] = np.frombuffer(self.entry.epoch_id, np.uint8)
        body["parent"] = self.entry.parent.raw
        body["key_generation"], body["wall_ns"] = key.generation, time.time_ns()
        room = bytearray(1024)
        self.old.store.append(bytes(room[: self.sealer.stream(body, room)]))

    def record(self, kind: int, at: int = 0, data: bytes = b"", length: int = 0) -> Position:
        self.seq += 1
        header = np.zeros(1, layout.RECORD)
        header["kind"], header["seq"] = kind, self.seq
        header["offset"], header["length"] = at, len(data) or length
        header["wall_ns"], header["mono_ns"] = time.time_ns(), self.seq
        room = bytearray(2 * len(data) + 65536)
        written, done = self.sealer.seal(header, [data or None], room)
        assert done == 1
        written += self.sealer.tally(memoryview(room)[written:], wall_ns=time.time_ns())
        self.old.store.append(bytes(room[:written]))
        return Position(self.entry.epoch, 0, self.seq)

    def resync(self, disk: bytes) -> tuple[Position, list[int]]:
        """What a source does that compares: a gap, the blocks of which the target shows no equal
        hash, the gap's end. That position, and the blocks that were sent."""
        begun = self.record(layout.KIND_GAP_BEGIN)
        self.old.store.commit()
        book = HashBook([self.old.key])
        asked = m.HashQuestion(
            group_id=GROUP, at_least=begun.seq, ranges=[m.HashRange(disk=0, offset=0, length=DISK)]
        )
        parent = self.entry.parent
        with StoreReader(self.old.paths.store, GROUP) as reader:
            answer = look_up(reader, begun, asked)
        window = Window(0, 0, 0, DISK)
        line = Line(self.entry.epoch, parent.epoch, parent.seq)
        found, refused = book.read(answer, {0: window}, line)
        assert refused == 0
        known = np.frombuffer(found[0][0], np.uint8) > 0
        said = np.frombuffer(found[0][1], np.uint8).reshape(-1, 16)
        secret = book.secrets[0]
        sent = []
        for number, at in enumerate(range(0, DISK, UNIT)):
            unit = bytes(disk[at : at + UNIT])
            if not unit.strip(b"\0"):
                self.record(layout.KIND_SYNC_ZEROES, at, length=len(unit))
                continue
            if len(unit) == UNIT and known[number]:
                mine = hash_blocks(unit, UNIT, secret=secret).hashes.view(np.uint8).reshape(16)
                if (mine == said[number]).all():
                    continue
            sent.append(at)
            self.record(layout.KIND_SYNC, at, unit)
        return self.record(layout.KIND_GAP_END), sent


@pytest.fixture
def old(tmp_path: Path, rng: random.Random) -> Iterator[Old]:
    old = Old(tmp_path, rng)
    yield old
    old.host.close()


ONE = epoch(1, US)


def away(seq: int) -> tuple[list[EpochEntry], Position]:
    """The first epoch was the old site's, and was left."""
    fork = Position(1, 0, seq)
    return [ONE, epoch(2, THEM, fork)], fork


def test_what_the_old_disks_hold_is_not_sent_again(old: Old) -> None:
    old.fill()
    epochs, fork = away(200)
    taken = bytearray(old.disk)
    old.change(7 * UNIT)  # not taken over
    changed = {7 * UNIT, 300 * UNIT}
    for at in range(20 * UNIT, 30 * UNIT, UNIT):
        changed.add(at)
        taken[at : at + UNIT] = old.rng.randbytes(UNIT)
    taken[300 * UNIT : 301 * UNIT] = old.rng.randbytes(UNIT)
    taken[40 * UNIT : 41 * UNIT] = bytes(UNIT)
    old.follow(epochs, old.offer(fork))
    kinds = old.kinds(1)
    assert kinds[0][:2] == (layout.KIND_STREAM, 0)
    assert kinds[1][:2] == (layout.KIND_GAP_BEGIN, 1)
    assert kinds[-1][:2] == (layout.KIND_GAP_BEGIN, fork.seq)
    old.require_no_new_point(None, fork, Position(1, 0, 1), Position(1, 0, 5))
    writer = Writer(old, epochs[1])
    end, sent = writer.resync(taken)
    old.store.commit()
    wanted = {at for at in changed if taken[at : at + UNIT].strip(b"\0")}
    tail = DISK // UNIT * UNIT  # of a part of a unit there is no hash
    assert set(sent) - {tail} == wanted
    assert old.show(end) == bytes(taken)
    old.require_no_new_point(end, fork, Position(2, 0, end.seq - 1))
    old.require_whole(end)
    with StoreReader(old.paths.store, GROUP) as reader:
        times = {int(t["wall_ns"]) for t in reader.times() if int(t["at"]["epoch"]) == 1}
    assert times == {epochs[1].wall_ns}  # of the new writer's clock
    last = writer.record(layout.KIND_WRITE, 0, b"x" * UNIT)
    old.store.commit()
    old.require_no_new_point(last, fork)


def here_first(old: Old) -> tuple[Position, bytes]:
    """The other site wrote the first epoch to here, and a point of it is the newest."""
    old.fill()
    disk = bytes(old.disk)
    spec = StoreSpec("web", [DiskEntry("root", DISK, 0)], epoch(1, THEM), old.keys)
    options = StoreOptions(commit_s=0.001, reserve_bytes=0, merge=False)
    GroupStore.open(old.paths.store, GROUP, create=spec, options=options).close()
    point, _sent = Writer(old, epoch(1, THEM)).resync(disk)
    old.store.commit()
    old.require_no_new_point(point)
    return point, disk


def test_only_what_the_store_does_not_show_is_sealed(old: Old) -> None:
    point, disk = here_first(old)
    mine = old.store.raise_epoch(writer=US, parent=point, state=EpochState.ACCEPTED)
    changed = [0, 9 * UNIT, 10 * UNIT, 400 * UNIT]
    for at in changed:
        old.change(at)
    fork = Position(2, 0, point.seq + 12)
    epochs = [epoch(1, THEM), mine, epoch(3, THEM, fork)]
    old.follow(epochs, old.offer(fork))
    copies = [length for kind, _seq, length in old.kinds(2) if kind == layout.KIND_SYNC]
    assert sum(copies) <= 12 * UNIT  # neighbours nearer than 64 KiB in one
    old.require_no_new_point(point, fork)
    assert old.show(point) == disk
    writer = Writer(old, epochs[2])
    end, sent = writer.resync(bytes(old.disk))
    old.store.commit()
    assert set(sent) <= {DISK // UNIT * UNIT}
    assert old.show(end) == bytes(old.disk)
    assert old.show(point) == disk
    old.require_no_new_point(end, fork)
    old.require_whole(end)
    assert old.host.follow(epochs, old.offer(fork)) == {}  # asked again: it has followed
    assert old.store.received == end


@pytest.mark.parametrize("seq", [1, 2, 3, 4, 5])
def test_no_position_past_the_fork_is_used(old: Old, seq: int) -> None:
    old.fill(0.9)
    epochs, fork = away(seq)
    old.follow(epochs, old.offer(fork))
    kinds = old.kinds(1)
    copies = [one for one in kinds if one[0] == layout.KIND_SYNC]
    assert len(copies) <= max(0, seq - 2)
    assert bool(copies) == (seq >= 3)
    if copies:
        assert kinds[-1][:2] == (layout.KIND_GAP_BEGIN, fork.seq)
    old.require_no_new_point(None)
    end, _sent = Writer(old, epochs[1]).resync(bytes(old.disk))
    old.store.commit()
    assert old.show(end) == bytes(old.disk)
    old.require_whole(end)


@given(
    st.lists(st.tuples(st.integers(0, 1 << 15), st.integers(1, 1 << 11)), max_size=40),
    st.integers(1, 60),
)
def test_records_cover_what_differs(found: list[tuple[int, int]], most: int) -> None:
    """As many as there are positions; all that differs, if one for 32 MiB is enough."""
    rows = array("q")
    for start, units in sorted(found):
        at, end = start * UNIT, (start + units) * UNIT
        if not rows or at >= rows[-1]:
            base._join(rows, at, end)
    runs = np.array(rows, np.int64).reshape(-1, 2)
    pieces = base._fit({3: runs}, most).tolist()
    assert len(pieces) <= most
    assert all(disk == 3 and 0 < length <= layout.WRITE_BYTES_MAX for disk, _at, length in pieces)
    ends = [at + length for _disk, at, length in pieces]
    assert all(end <= after[1] for end, after in zip(ends, pieces[1:], strict=False))
    covered = np.zeros(1 << 16, bool)
    for _disk, at, length in pieces:
        covered[at // UNIT : (at + length) // UNIT] = True
    wanted = np.zeros(1 << 16, bool)
    for start, end in runs.tolist():
        wanted[start // UNIT : end // UNIT] = True
    if len(pieces) < most:
        assert (covered | ~wanted).all()
    if (runs[1:, 0] - runs[:-1, 1] >= base.APART_BYTES).all() and len(pieces) < most:
        sizes = -(-(runs[:, 1] - runs[:, 0]) // base.RECORD_BYTES)
        assert sizes.sum() >= most or (covered == wanted).all()


def test_a_device_does_not_say_where_its_data_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "disk"
    image.write_bytes(b"x" * UNIT)
    os.truncate(image, 10 * UNIT + 512)
    fd = os.open(image, os.O_RDONLY)
    try:
        assert list(base._extents(fd, 10 * UNIT + 512)) == [(0, UNIT)]
        with monkeypatch.context() as patch:
            patch.setattr("vrep.recovery.base.os.SEEK_DATA", 77)
            assert list(base._extents(fd, 10 * UNIT + 512)) == [(0, 10 * UNIT + 512)]
    finally:
        os.close(fd)


CUT_OFF = """
import os, sys, time
import msgspec
from vrep.paths import SitePaths
from vrep.recovery import base
from vrep.target.base import BASE_FRAME, BasePlan
plan = msgspec.json.decode(sys.stdin.buffer.read(), type=BasePlan)
base.BATCH_RECORDS = 1
base.RECORD_BYTES = 65536
left = int(sys.argv[2])
for batch in base.seal_base(SitePaths.of(sys.argv[1]), plan):
    if len(batch.data):
        left -= 1
    if left < 0:
        break
    sys.stdout.buffer.write(BASE_FRAME.pack(batch.done, batch.total, len(batch.data)))
    sys.stdout.buffer.write(batch.data)
    sys.stdout.buffer.flush()
if sys.argv[3] == "hangs":
    time.sleep(600)
os._exit(9)
"""


@pytest.mark.parametrize("batches", [0, 1, 4])
def test_a_base_that_is_cut_off_costs_only_bytes(old: Old, batches: int) -> None:
    old.fill()
    epochs, fork = away(100)
    old.command = [sys.executable, "-c", CUT_OFF, str(old.root), str(batches), "ends"]
    old.follow(epochs, old.offer(fork))
    assert len([k for k in old.kinds(1) if k[0] == layout.KIND_SYNC]) == max(0, batches - 1)
    old.require_no_new_point(None, fork)
    end, _sent = Writer(old, epochs[1]).resync(bytes(old.disk))
    old.store.commit()
    assert old.show(end) == bytes(old.disk)
    old.require_whole(end)


def test_a_target_that_is_killed_goes_on_where_it_was(old: Old) -> None:
    old.fill()
    epochs, fork = away(100)
    whole, old.command = old.command, [sys.executable, "-c", CUT_OFF, str(old.root), "4", "hangs"]
    offer = old.offer(fork)
    assert "base" in old.host.follow(epochs, offer)
    deadline = time.monotonic() + WAIT_S
    while old.store.received.seq < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    old.store.commit()
    old.host.close()  # in the middle, with nothing at the fork
    old.open()
    old.command = whole
    old.follow(epochs, old.offer(fork))
    end, sent = Writer(old, epochs[1]).resync(bytes(old.disk))
    old.store.commit()
    assert set(sent) <= {DISK // UNIT * UNIT}
    assert old.show(end) == bytes(old.disk)
    old.require_whole(end)


def test_a_base_that_was_cut_off_and_is_not_offered_again(old: Old) -> None:
    """The group was unprotected there meanwhile: nothing can be sealed any more."""
    old.fill()
    epochs, fork = away(100)
    old.command = [sys.executable, "-c", CUT_OFF, str(old.root), "4", "hangs"]
    assert "base" in old.host.follow(epochs, old.offer(fork))
    deadline = time.monotonic() + WAIT_S
    while old.store.received.seq < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "base" in old.host.follow(epochs)  # it is under way: nothing is followed under it
    assert old.store.manifest.current_epoch == ONE
    old.store.commit()
    old.host.close()
    old.open()
    another = [epoch(2, THEM, fork)]
    with pytest.raises(errors.StateError, match="does not go on"):
        old.host.follow(another)
    assert old.store.received.seq < fork.seq  # nothing was done for it
    for _ in range(2):  # asked again
        assert old.host.follow(epochs) == {}
    old.host.close()  # what goes up to the fork is durable
    old.open()
    assert old.store.received == fork
    old.require_no_new_point(None, fork)
    end, _sent = Writer(old, epochs[1]).resync(bytes(old.disk))
    old.store.commit()
    assert old.show(end) == bytes(old.disk)
    old.require_whole(end)


def test_a_program_that_does_not_run_costs_only_bytes(old: Old) -> None:
    old.fill()
    epochs, fork = away(100)
    old.command = ["/nowhere/at/all"]
    with pytest.raises(errors.StorageError, match="cannot be run"):
        old.follow(epochs, old.offer(fork))
    assert old.store.manifest.current_epoch.epoch == 1
    old.command = ["false"]
    old.follow(epochs, old.offer(fork))
    end, _sent = Writer(old, epochs[1]).resync(bytes(old.disk))
    old.store.commit()
    assert old.show(end) == bytes(old.disk)
    old.require_whole(end)


def test_nothing_is_followed_when_its_thread_fails(
    old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    old.fill()
    epochs, fork = away(100)
    with monkeypatch.context() as patch:
        patch.setattr("vrep.target.base._end", lambda *_: {}["fails"])
        with pytest.raises(errors.StateError, match="cannot be sealed"):
            old.follow(epochs, old.offer(fork))
    assert old.store.manifest.current_epoch.epoch == 1
    old.follow(epochs, old.offer(fork))
    end, _sent = Writer(old, epochs[1]).resync(bytes(old.disk))
    old.store.commit()
    assert old.show(end) == bytes(old.disk)
    old.require_whole(end)


def test_without_the_key_everything_is_sent(old: Old) -> None:
    old.fill()
    epochs, fork = away(100)
    ring = TenantKeyring(old.root / "elsewhere")
    ring.create("other")
    other = ring.get("other")
    old.keys, kept = [old.key.wrap(other)], old.keys
    old.follow(epochs, old.offer(fork))
    assert old.kinds(1) == []
    assert not old.store.received.epoch
    old.store.set_wrapped_keys(kept)  # as the new writer does
    end, _sent = Writer(old, epochs[1]).resync(bytes(old.disk))
    old.store.commit()
    assert old.show(end) == bytes(old.disk)
    old.require_whole(end)


def test_a_key_that_the_store_does_not_know(old: Old) -> None:
    """It was made at the old site, which told the new one: the store learns of it with the base."""
    point, _disk = here_first(old)
    mine = old.store.raise_epoch(writer=US, parent=point, state=EpochState.ACCEPTED)
    old.key = DataKey.create(GROUP, 2)
    old.keys = [*old.keys, old.key.wrap(old.tenant)]
    old.change(0)
    fork = Position(2, 0, point.seq + 12)
    old.follow([epoch(1, THEM), mine, epoch(3, THEM, fork)], old.offer(fork))
    assert layout.KIND_SYNC in [kind for kind, _seq, _length in old.kinds(2)]
    old.require_no_new_point(point, fork)
    old.require_whole()


def test_what_cannot_be_read_in_the_store_is_sealed_again(old: Old) -> None:
    point, _disk = here_first(old)
    mine = old.store.raise_epoch(writer=US, parent=point, state=EpochState.ACCEPTED)
    old.host.close()
    old.open()
    old.store.commit()
    fork = Position(2, 0, point.seq + 12)
    directory = old.paths.store / GROUP.hex()
    sizes = {p: p.stat().st_size for n in range(1, 9) if (p := segment_path(directory, n)).exists()}
    segment = max(sizes, key=lambda path: sizes[path])
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    epochs = [epoch(1, THEM), mine, epoch(3, THEM, fork)]
    old.follow(epochs, old.offer(fork))
    end, sent = Writer(old, epochs[2]).resync(bytes(old.disk))
    old.store.commit()
    assert set(sent) <= {DISK // UNIT * UNIT}
    assert old.show(end) == bytes(old.disk)


CLAIM = """
import sys, secrets, time
import msgspec, numpy as np
from vrep._core import layout
from vrep._core.seal import Sealer
from vrep.target.base import BASE_FRAME, FRAME_END, BasePlan
plan = msgspec.json.decode(sys.stdin.buffer.read(), type=BasePlan)
sealer = Sealer(secrets.token_bytes(32), b"s" * 16, epoch=plan.epoch, resume_seq=plan.after)
body = np.zeros((), layout.STREAM)
body["epoch_id"] = np.frombuffer(bytes.fromhex(plan.epoch_id), np.uint8)
body["key_generation"] = 1
room = memoryview(bytearray(65536))
size = sealer.stream(body, room)
kinds = {"end": [layout.KIND_GAP_BEGIN, layout.KIND_GAP_END]}.get(
    sys.argv[1], [layout.KIND_GAP_BEGIN] * (plan.last - plan.after))
rows = np.zeros(len(kinds), layout.RECORD)
rows["kind"] = kinds
rows["seq"] = plan.after + 1 + np.arange(len(kinds))
size += sealer.seal(rows, [None] * len(kinds), room[size:])[0]
sys.stdout.buffer.write(BASE_FRAME.pack(1, 1, size) + room[:size])
sys.stdout.buffer.write(BASE_FRAME.pack(1, 1, FRAME_END))
"""


@pytest.mark.parametrize("claim", ["end", "past"])
def test_a_base_claims_nothing(old: Old, claim: str) -> None:
    epochs, fork = away(10)
    old.command = [sys.executable, "-c", CLAIM, claim]
    with pytest.raises(errors.CorruptError, match="a base ends"):
        old.follow(epochs, old.offer(fork))
    assert old.kinds(1) == []
    old.require_no_new_point(None, fork)


def test_a_store_without_room_follows_nobody(old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    old.fill()
    epochs, fork = away(100)
    old.host.close()
    old.open(reserve_bytes=1 << 60)
    with monkeypatch.context() as patch:
        patch.setattr("vrep.target.base.COMMIT_S", 0.5)
        with pytest.raises((errors.StoreFullError, errors.TimeLimitError)):
            old.follow(epochs, old.offer(fork))
    assert old.store.manifest.current_epoch.epoch == 1
    old.host.close()
    old.open()
    old.follow(epochs, old.offer(fork))
    end, sent = Writer(old, epochs[1]).resync(bytes(old.disk))
    old.store.commit()
    assert set(sent) <= {DISK // UNIT * UNIT}
    assert old.show(end) == bytes(old.disk)
    old.require_whole(end)


def test_nobody_sends_while_the_old_disks_are_sealed(old: Old) -> None:
    epochs, fork = away(10)
    old.command = [sys.executable, "-c", "import time; time.sleep(600)"]
    answer = old.host.follow(epochs, old.offer(fork))
    assert set(answer["base"]) == {"done", "total"}
    assert old.host.bases.under_way(THEM) is not None
    assert old.host.bases.under_way(US) is None
    assert "sealing-base" in old.host.status()["conditions"]
    old.host.close()
    assert not old.host.bases.busy
