"""The soak itself: it must see what it is there for."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soak as soak_run
import soak_gauges
from sites import MIB, compare
from soak_gauges import RSS_MORE, Gauges, process_gauges, used_bytes
from soak_load import Marks, Writer, hashes

from vrep import errors

DISK = 1 * MIB


class Disk:
    """A client of a disk in memory, which dies now and then."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def _answer(self, offset: int, data: bytes) -> None:
        if self.pair.rng.random() < 0.2:
            if self.pair.rng.random() < 0.5:  # it may have been done all the same
                self.pair.content[offset : offset + len(data)] = data
            raise errors.UnreachableError("killed")
        self.pair.content[offset : offset + len(data)] = data
        self.pair.count += 1

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self._answer(offset, data)

    def zeroes(self, offset: int, length: int) -> None:
        self._answer(offset, bytes(length))

    def __exit__(self, *_exc: object) -> None:
        pass


class Pair:
    """Both sites; what is recovered can be spoilt."""

    def __init__(self) -> None:
        self.rng = random.Random(5)
        self.content = bytearray(DISK)
        self.count = 0
        self.points: dict[str, bytes] = {}
        self.a = self.b = self
        self.spoil = 0
        self.refuse: Exception | None = None
        self.offered: list[str] | None = None

    def client(self, _disk: str) -> Disk:
        return Disk(self)

    def checkpoint(self, _group: str, label: str) -> dict[str, int]:
        self.points[label] = bytes(self.content)
        return {"seq": self.count}

    def read_view(self, label: str) -> dict[str, bytes]:
        if self.refuse is not None:
            raise self.refuse
        data = bytearray(self.points[label])
        data[-1] ^= self.spoil
        return {"root": bytes(data)}

    def _list(self, _group: str) -> Any:
        names = list(self.points) if self.offered is None else self.offered
        return SimpleNamespace(marks=[SimpleNamespace(label=n, recoverable=True) for n in names])


@pytest.fixture
def soak() -> Any:
    pair = Pair()
    pair.points_of = pair._list  # type: ignore[attr-defined]
    found = soak_run.Soak.__new__(soak_run.Soak)
    found.pair = pair
    found.b = None
    found.begin_s, found.seconds = time.monotonic(), 60.0
    found.violations, found.looks = [], soak_run.Counter()
    found.pair.b = SimpleNamespace(points=pair._list)
    return found


@contextmanager
def written(pair: Any, count: int = 300) -> Iterator[Writer]:
    writer = Writer(pair, "root", DISK, "seed", pause_s=0.0)
    writer.start()
    deadline = time.monotonic() + 60
    while pair.count < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    yield writer
    writer.stop()
    assert writer.failure is None


def test_a_writer_knows_its_disk_whatever_is_cut_off(soak: Any) -> None:
    with written(soak.pair) as writer:
        for _ in range(20):
            with writer.still:
                compare("root", bytes(soak.pair.content), bytes(writer.model))
    assert writer.repeated > 10
    compare("root", bytes(soak.pair.content), bytes(writer.model))


def test_a_mark_is_compared_with_what_was_written(soak: Any) -> None:
    with written(soak.pair) as writer:
        marks = Marks(soak.pair, [writer])
        made = [marks.make() for _ in range(5)]
    for mark in made:
        soak.look_at(mark)
    assert (soak.violations, soak.looks["right"]) == ([], 5)
    soak.pair.spoil = 1
    soak.look_at(made[0])
    assert "chunks [15] of root" in soak.violations[0]


def test_a_point_that_is_offered_must_recover(soak: Any) -> None:
    with written(soak.pair, 20) as writer:
        marks = Marks(soak.pair, [writer])
        first, second = marks.make(), marks.make()
    soak.pair.refuse = errors.NotFoundError("not there")
    soak.pair.offered = []
    soak.look_at(second)
    soak.pair.offered = [second.label]  # the oldest may be folded in this moment
    soak.look_at(second)
    assert soak.violations == []
    soak.pair.offered = [first.label, second.label]
    soak.look_at(second)
    assert "does not recover" in soak.violations[0]
    soak.pair.refuse = errors.CorruptError("seg-1")
    soak.pair.offered = []
    soak.look_at(second)
    assert "seg-1" in soak.violations[1]


def test_growth_is_seen_and_noise_is_not() -> None:
    found = Gauges.__new__(Gauges)
    rng = random.Random(3)
    base = 80 * MIB
    found.samples = {
        "flat": [(float(at), base + rng.randrange(8 * MIB)) for at in range(100)],
        "leaks": [(float(at), base + at * MIB) for at in range(100)],
    }
    assert all(row.met for row in found.growth("flat", 0, 100, RSS_MORE, "bytes"))
    rows = found.growth("leaks", 0, 100, RSS_MORE, "bytes")
    assert [row.met for row in rows] == [True, False, True]
    assert rows[1].value == 50 * MIB
    assert rows[2].value == 50 * MIB / 50 * 3600
    (missing,) = found.growth("nobody looked", 0, 100, RSS_MORE, "bytes")
    assert not missing.met


LOOKED_AT = """
import sys, threading
held = bytes(range(256)) * 80000
print(flush=True)
input()
files = [open(f"{sys.argv[1]}/{number}", "wb") for number in range(5)]
threading.Thread(target=input).start()
print(flush=True)
"""


def test_gauges_read_a_process_and_a_directory(tmp_path: Path) -> None:
    # One of its own: what other tests left behind in this one may end at any moment.
    command = [sys.executable, "-c", LOOKED_AT, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        before = process_gauges(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        after = process_gauges(process.pid)
        process.stdin.close()
    assert process.returncode == 0
    assert before["rss"] > 10 * MIB
    assert after["fds"] == before["fds"] + 5
    assert after["threads"] == before["threads"] + 1
    for number in range(5):
        (tmp_path / f"{number}").write_bytes(bytes(100_000))
    assert 500_000 <= used_bytes(tmp_path) < 600_000
    assert used_bytes(tmp_path / "gone") == 0
    assert soak_gauges.EVERY_S > 0
    assert len(hashes(bytes(DISK))) == 16
