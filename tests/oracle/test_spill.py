"""A spill against a list: what was put in comes out, after cuts, crashes and damage too."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from vrep._core import layout, record
from vrep._core.seal import Opener, Sealer
from vrep.errors import CorruptError, StorageError, StoreFullError
from vrep.keys.datakey import DataKey
from vrep.source.feed import Feed
from vrep.source.spill import Spill, SpillKeys

GROUP = bytes(range(16))
MIB = 1 << 20
ROOM = memoryview(bytearray(33 * MIB))

Entry = tuple[int, int, int, bytes]
"""seq, kind, offset, data"""


class Lab:
    """A spill, and the records that went into it."""

    def __init__(self, directory: Path, seed: int, **options: int) -> None:
        self.choose = random.Random(seed)
        self.directory = directory
        self.options = {"quota_bytes": 1 << 30, "reserve_bytes": 0, "segment_bytes": 256 << 10}
        self.options |= options
        self.keys = {n: DataKey(GROUP, n, bytes([n] * 32)) for n in (1, 2)}
        self.newest = 1
        self.epoch = 1
        self.entries: list[Entry] = []
        self.last = self.choose.choice((0, 5, 1 << 40))
        self.durable = self.last
        self.spill = self.open()

    def open(self) -> Spill:
        return Spill(self.directory, GROUP, **self.options)

    def spill_keys(self) -> SpillKeys:
        return SpillKeys(self.keys[self.newest], self.keys.__getitem__)

    def stream(self) -> np.ndarray:
        stream = np.zeros(1, layout.STREAM)
        stream["epoch_id"] = np.frombuffer(bytes([self.epoch] * 16), np.uint8)
        stream["key_generation"] = self.newest
        stream["wall_ns"] = 1_000 + self.last
        return stream

    def make(self) -> tuple[np.void, bytes]:
        header = np.zeros((), layout.RECORD)
        kind = self.choose.choice(
            (layout.KIND_WRITE, layout.KIND_WRITE, layout.KIND_SYNC, layout.KIND_ZEROES)
        )
        jump = self.choose.random() < 0.03
        self.last += self.choose.randrange(2, 1000) if jump else 1
        size = self.choose.choice((512, 4096, 10_000, 200_000))
        offset = self.choose.randrange(0, 1 << 30, 512)
        if jump:
            kind, size, offset = layout.KIND_GAP_BEGIN, 0, 0
            header["flags"] = layout.RECORD_JUMP
        header["kind"], header["seq"], header["offset"], header["length"] = (
            kind, self.last, offset, size,
        )  # fmt: skip
        header["wall_ns"], header["mono_ns"] = 1_000 + self.last, self.last
        bodied = kind in (layout.KIND_WRITE, layout.KIND_SYNC)
        data = self.choose.randbytes(size) if bodied else b""
        return header, data

    def put(self, count: int) -> None:
        """One commit."""
        after = self.spill.last or self.last
        made = [self.make() for _ in range(count)]
        sealer = self.spill.sealer(
            self.spill_keys(), self.stream(), self.epoch, after, self.choose.choice((0, 1))
        )
        headers = np.array([header for header, _ in made], layout.RECORD)
        written, done = sealer.seal(headers, b"".join(data for _, data in made), ROOM)
        assert done == count
        self.spill.append(ROOM[:written])
        for header, data in made:
            self.entries.append(
                (int(header["seq"]), int(header["kind"]), int(header["offset"]), data)
            )

    def put_jump(self, seq: int) -> None:
        header = np.zeros(1, layout.RECORD)
        header["kind"], header["flags"] = layout.KIND_GAP_BEGIN, layout.RECORD_JUMP
        header["seq"], header["wall_ns"] = seq, 1_000 + seq
        sealer = self.spill.sealer(self.spill_keys(), self.stream(), self.epoch, self.spill.last, 0)
        written, _done = sealer.seal(header, b"", ROOM)
        self.spill.append(ROOM[:written])
        self.entries.append((seq, layout.KIND_GAP_BEGIN, 0, b""))
        self.last = seq

    def read(self, after: int) -> list[Entry]:
        """Everything that follows `after`, through another stream, as a shipper reads it."""
        feed = Feed(NoRing(), self.spill, self.spill_keys())  # type: ignore[arg-type]
        stream_id, key = bytes([7] * 16), bytes([8] * 32)
        sealer = Sealer(key, stream_id, epoch=9, resume_seq=after, secret=bytes(192))
        opener = Opener(key, stream_id)
        found: list[Entry] = []
        while sealer.seq < self.spill.last:
            room = memoryview(bytearray(self.choose.choice((300_000, 3 * MIB))))
            written, done = feed.seal(sealer, self.spill.last, room)
            assert done
            records, end = record.scan(room[:written])
            assert end == written
            for each in records:
                header = each["header"]
                data = b""
                if header["kind"] in (layout.KIND_WRITE, layout.KIND_SYNC):
                    out = bytearray(int(header["length"]))
                    opener.record(room[int(each["position"]) : written], out)
                    data = bytes(out)
                assert header["wall_ns"] == 1_000 + header["seq"]
                found.append((int(header["seq"]), int(header["kind"]), int(header["offset"]), data))
        return found

    def wanted(self, after: int) -> list[Entry]:
        return [entry for entry in self.entries if entry[0] > after]

    def check(self) -> None:
        newest = self.entries[-1][0]
        assert self.spill.last == (newest if newest > self.durable else 0)
        begin = max(self.spill.after, self.durable)
        known = [entry[0] for entry in self.wanted(begin)]
        for after in (begin, self.choose.choice(known) if known else begin):
            assert self.read(after) == self.wanted(after)
        if known:
            assert 0 < self.spill.oldest_ns(begin) <= 1_000 + known[0]

    def files(self) -> list[Path]:
        return sorted(self.directory.glob("spill-*"))


class NoRing:
    """Everything was released."""

    released = 1 << 62


@pytest.mark.parametrize("seed", range(10))
def test_history(tmp_path: Path, seed: int) -> None:
    lab = Lab(tmp_path / "spill", seed)
    for _ in range(30):
        lab.put(lab.choose.randrange(1, 12))
        turn = lab.choose.random()
        if turn < 0.15:
            lab.spill.close()
            lab.spill = lab.open()
        elif turn < 0.3:
            lab.durable = lab.choose.choice([entry[0] for entry in lab.entries[-30:]])
            lab.spill.drop(lab.durable)
        elif turn < 0.4:
            last = lab.choose.choice([entry[0] for entry in lab.entries[-20:]])
            if last > lab.durable:
                lab.spill.cut(last)
                lab.last = last
                lab.entries = [entry for entry in lab.entries if entry[0] <= last]
        elif turn < 0.5:
            lab.newest, lab.epoch = 3 - lab.newest, lab.epoch + 1
        elif turn < 0.6:
            lab.spill.abandon()
        lab.check()
    lab.spill.drop(lab.last)
    assert not lab.files()
    assert (lab.spill.last, lab.spill.bytes) == (0, 0)


@pytest.mark.parametrize("seed", range(8))
def test_a_torn_end_costs_no_whole_commit(tmp_path: Path, seed: int) -> None:
    lab = Lab(tmp_path / "spill", seed)
    for _ in range(6):
        lab.put(4)
    ends = {}
    newest = lab.files()[-1]
    ends[newest.stat().st_size] = list(lab.entries)
    lab.put(3)
    if lab.files()[-1] != newest:
        newest, ends = lab.files()[-1], {0: list(lab.entries[:-3])}
    lab.spill.close()
    size = newest.stat().st_size
    with newest.open("r+b") as file:
        file.truncate(lab.choose.randrange(max(ends) + 1, size))
    lab.entries = ends[max(ends)]
    lab.spill = lab.open()
    lab.last = lab.entries[-1][0]
    lab.check()
    lab.put(5)
    lab.check()


@pytest.mark.parametrize("seed", range(12))
def test_damage_ends_it_and_is_never_given_out(tmp_path: Path, seed: int) -> None:
    lab = Lab(tmp_path / "spill", seed)
    for _ in range(12):
        lab.put(5)
    lab.spill.close()
    path = lab.choose.choice(lab.files())
    data = bytearray(path.read_bytes())
    data[lab.choose.randrange(len(data))] ^= 1 << lab.choose.randrange(8)
    path.write_bytes(data)
    before = lab.entries
    lab.spill = lab.open()
    begin = lab.spill.after
    known = [entry for entry in before if begin < entry[0] <= lab.spill.last]
    assert lab.read(begin) == known
    if known:  # a prefix: nothing follows a hole
        start = next(n for n, entry in enumerate(before) if entry[0] > begin)
        assert known == before[start : start + len(known)]


def test_damage_while_it_runs_is_an_error_that_names_it(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "spill", 1)
    lab.put(6)
    path = lab.files()[0]
    data = bytearray(path.read_bytes())
    data[-400] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="spill-00000001"):
        lab.read(lab.spill.after)


def test_a_cut_through_a_jump_hides_nothing(tmp_path: Path) -> None:
    """The ring began anew at 2000; its first records were written, and not reported."""
    lab = Lab(tmp_path / "spill", 1)
    lab.put(5)
    begin, last = lab.spill.after, lab.last
    for _ in range(2):
        lab.last = last
        lab.put_jump(2_000 + last)
        lab.spill.cut(last + 1_000)
        assert lab.spill.last == last + 1_000
        lab.entries = lab.entries[:5]
    lab.put_jump(2_000 + last)
    lab.put(3)
    assert lab.read(begin) == lab.entries
    lab.spill.close()
    lab.spill = lab.open()
    assert lab.read(begin) == lab.entries


def test_the_key_that_seals_is_the_one_that_is_named(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "spill", 1)
    lab.put(2)
    old = lab.stream()
    lab.newest = 2
    lab.stream = lambda: old  # type: ignore[method-assign]
    lab.put(2)
    lab.check()


def test_another_groups_files_are_not_read(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "spill", 1)
    lab.put(3)
    other = Spill(tmp_path / "spill", bytes(16), quota_bytes=1, reserve_bytes=0)
    assert other.last == 0


def test_room(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "spill", 1, quota_bytes=2 * MIB)
    lab.spill.check_room(MIB)
    with pytest.raises(StoreFullError, match="of 2097152 bytes"):
        lab.spill.check_room(3 * MIB)
    full = Spill(
        tmp_path / "full", GROUP, quota_bytes=MIB, reserve_bytes=10, free_bytes=lambda _path: 100
    )
    full.check_room(90)
    with pytest.raises(StoreFullError, match="are free"):
        full.check_room(91)


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(tmp_path / "spill", 3)
    lab.put(4)
    entries, last = list(lab.entries), lab.last
    for name in ("pwrite", "fdatasync"):

        def fail(*_arguments: object) -> int:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises((StorageError, OSError), match="Input/output"):
                lab.put(4)
        lab.entries, lab.last = list(entries), last
        lab.check()
        assert lab.spill.last == last
    lab.put(4)
    lab.check()
    lab.spill.close()
    lab.spill = lab.open()
    lab.check()


def test_a_copy_of_a_spill_reads_the_same(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "spill", 4)
    for _ in range(5):
        lab.put(7)
    shutil.copytree(lab.directory, tmp_path / "copy")
    lab.directory = tmp_path / "copy"
    lab.spill = lab.open()
    lab.check()
