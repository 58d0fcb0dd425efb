"""Folds through power losses and kills at every step: the store opens with the points that it
had before the step or after it, and each recovers (invariants 7 and 8)."""

from __future__ import annotations

import copy
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forgetting
import pytest
import store_records as records

from vrep._core import layout
from vrep._core.seal import Opener
from vrep.errors import StateError
from vrep.target.files import Files
from vrep.target.manifest import Position
from vrep.target.store import GroupStore, StoreOptions, StoreReader, store_path

HERE = Path(__file__).resolve().parent
BLOCK = 4096
BLOCKS = 12


GROUP = records.GROUP
SMALL = StoreOptions(commit_s=0.0005, segment_bytes=1 << 15, reserve_bytes=0, merge=False)
Model = list[dict[int, int]]
"""by seq: what each block holds, the seq that wrote it"""


def fill(store: GroupStore, feed: Any, model: Model, rng: random.Random, count: int) -> None:
    """Writes and zeroes, in commits of their own."""
    for _ in range(count):
        at, length = rng.randrange(BLOCKS), rng.randrange(1, 4)
        if rng.random() < 0.3:
            store.append(feed.zeroes(at * BLOCK, length * BLOCK))
            model.append({**model[-1], **{at + i: 0 for i in range(length)}})
        else:
            store.append(feed.writes(length, BLOCK, at * BLOCK) + feed.tally())
            for i in range(length):
                model.append({**model[-1], at + i: len(model)})
        store.commit()
        if rng.random() < 0.2:
            store.merge_once()


def begin(directory: Path, files: Files | None = None) -> tuple[GroupStore, Any, Model]:
    feed = records.Feed()
    store = GroupStore.open(directory, GROUP, create=records.spec(), options=SMALL, files=files)
    store.append(feed.stream() + feed.mark_gap(layout.KIND_GAP_BEGIN))
    store.append(feed.mark_gap(layout.KIND_GAP_END))
    return store, feed, [{}, {}, {}]


def check(directory: Path, model: Model, horizons: list[Position], rng: random.Random) -> Position:
    """The store opens, has one of the horizons, and every point from there on is right; it takes
    records and folds on. Its horizon."""
    with GroupStore.open(directory, GROUP, options=SMALL) as store:
        horizon = store.manifest.horizon
        assert horizon in horizons
        assert store.durable.seq == len(model) - 1
        points = store.points()
        assert points is not None
        assert points[0].position == (horizon if horizon.seq else Position(1, 0, 2))
        compare(directory, model, points[0].position.seq, rng)
        if horizon.seq:
            store.fold(horizon)
            compare(directory, model, horizon.seq, rng)
            with pytest.raises(StateError):
                store.fold(horizon._replace(seq=horizon.seq - 1))
        assert not [p for p in store.directory.iterdir() if p.name.endswith(".tmp")]
        named = {int(n) for n in store.manifest.segments["segment"]}
        named.add(store.manifest.active_segment)
        files = [int(p.name.split("-")[1], 16) for p in store.directory.glob("seg-*")]
        assert sorted(files) == sorted(named)
    return horizon


def compare(directory: Path, model: Model, first: int, rng: random.Random) -> None:
    openers: dict[bytes, Opener] = {}
    with StoreReader(directory, GROUP) as reader:
        reader.verify()
        rest = range(first + 1, len(model))
        for seq in {first, len(model) - 1, *rng.sample(rest, min(5, len(rest)))}:
            extents = reader.extent_map(Position(1, 0, seq))
            found = {}
            for row in extents.lookup(0, 0, 16 * BLOCK):
                if row["kind"] != layout.KIND_WRITE:
                    continue
                raw = reader.record(int(row["segment"]), int(row["position"]))
                stream = extents.streams[int(row["stream"])]["stream_id"].tobytes()
                opener = openers.setdefault(stream, Opener(records.KEY, stream))
                plain = bytearray(BLOCK)
                assert opener.record(raw, plain) == BLOCK
                found[int(row["offset"]) // BLOCK] = int.from_bytes(plain[:8], "little")
            assert found == {at: by for at, by in model[seq].items() if by}, seq


def fresh_ends(store: GroupStore, feed: Any, model: Model, rng: random.Random) -> tuple[int, int]:
    """Where a segment ends that may be folded first, and where the first one does behind the half
    of the history: of the second fold, so that both have work. Writes on until there is one."""
    while True:
        ends = [int(row["last"]["seq"]) for row in store.manifest.segments[:-1]]
        behind = [end for end in ends if end > len(model) - len(model) // 2]
        if behind and behind[0] > ends[0]:
            return ends[0], behind[0]
        fill(store, feed, model, rng, 5)


@pytest.mark.parametrize("round_", range(3))
def test_power_loss_at_every_step_of_a_fold(
    tmp_path: Path, rng: random.Random, round_: int
) -> None:
    files = forgetting.ForgettingFiles()
    taken: list[Any] = []
    store, feed, model = begin(tmp_path / "origin", files)
    horizons = [Position()]
    with store:
        fill(store, feed, model, rng, 40)
        ends = fresh_ends(store, feed, model, rng)
        files.before = lambda _what, memory: taken.append(copy.deepcopy(memory))
        for part, end in zip((2, 3), ends, strict=True):
            horizons.append(Position(1, 0, max(end, len(model) - len(model) // part)))
            assert store.fold(horizons[-1])
        files.before = lambda _what, _memory: None
    assert len(taken) > 30
    seen = set()
    for number, memory in enumerate(taken):
        there = tmp_path / f"crash-{number}"
        memory.crash(store_path(there, GROUP), rng)
        seen.add(check(there, model, horizons, rng))
        shutil.rmtree(there)
    assert seen == set(horizons)


class KillingFiles(Files):
    """Ends the process before a step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def _step(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def create(self, path: Path) -> int:
        self._step()
        return super().create(path)

    def write(self, fd: int, buffers: Any, offset: int) -> None:
        self._step()
        super().write(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self._step()
        super().sync(fd)

    def truncate(self, fd: int, size: int) -> None:
        self._step()
        super().truncate(fd, size)

    def sync_directory(self, path: Path) -> None:
        self._step()
        super().sync_directory(path)

    def link(self, old: Path, new: Path) -> None:
        self._step()
        super().link(old, new)

    def unlink(self, path: Path) -> None:
        self._step()
        super().unlink(path)


def folder(directory: Path, steps: int, seq: int) -> None:
    """In a process of its own: fold, and be killed at a step."""
    files = KillingFiles(0)
    with GroupStore.open(directory, GROUP, options=SMALL, files=files) as store:
        files.left = steps
        store.fold(Position(1, 0, seq))
        files.left = 0
        print("done", flush=True)


def test_a_kill_at_every_step_of_a_fold(tmp_path: Path, rng: random.Random) -> None:
    store, feed, model = begin(tmp_path / "good")
    with store:
        fill(store, feed, model, rng, 25)
    horizon = Position(1, 0, len(model) * 3 // 4)
    ends = {}
    # Each in a child of one interpreter: it forks before it has threads.
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(horizon.seq)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    copies = int(done.stdout.split()[-1])
    assert copies > 15
    for number in range(1, copies + 1):
        ends[number] = check(tmp_path / f"kill-{number}", model, [Position(), horizon], rng)
    assert ends[1] == Position()
    assert ends[copies] == horizon


def main() -> None:
    """Kill a fold at its first step, its second, and so on until one comes through."""
    root, seq = Path(sys.argv[1]), int(sys.argv[2])
    for number in range(1, 1000):
        there = root / f"kill-{number}"
        shutil.copytree(root / "good", there)
        child = os.fork()
        if child == 0:
            folder(there, number, seq)
            os._exit(0)
        _pid, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            print(number)
            return


if __name__ == "__main__":
    main()
