"""The store through power losses, kills, full disks and failed syncs (invariant 7)."""

from __future__ import annotations

import copy
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forgetting
import pytest
import store_records as records

from vrep.errors import LockedError, StorageError, StoreFullError, TimeLimitError
from vrep.target.files import Files
from vrep.target.manifest import Position, manifest_path
from vrep.target.store import GroupStore, StoreOptions, StoreReader, store_path

HERE = Path(__file__).resolve().parent


GROUP = records.GROUP
SMALL = StoreOptions(commit_s=0.0005, segment_bytes=1 << 16, reserve_bytes=0)


def content(directory: Path) -> bytes:
    """All records of a store, byte for byte, in order."""
    with StoreReader(directory, GROUP) as reader:
        out = bytearray()
        for span in reader.records():
            last = span.found[-1]
            end = int(last["position"]) + 64 + int(last["header"]["body_bytes"])
            out += reader.read(span.segment, span.start, end)
        return bytes(out)


Loss = tuple[Any, Position, int]
"""what the disk's memory held, what was promised, and how many bytes had been given"""


@pytest.mark.parametrize("round_", range(12))
def test_power_loss_leaves_at_least_what_was_acknowledged(
    tmp_path: Path, rng: random.Random, round_: int
) -> None:
    """Before single steps of the I/O of a store that appends, rotates, merges and reopens."""
    rounds = rng.randrange(20, 60)
    taken, sent = losses(
        tmp_path,
        rng,
        rounds,
        lambda _step, so_far: so_far < 12 and (not so_far or rng.random() < 0.1),
    )
    assert taken
    for number, (memory, promised, length) in enumerate(taken):
        there = tmp_path / f"crash-{number}"
        memory.crash(store_path(there, GROUP), rng)
        check_recovered(there, promised, sent, length)


def test_power_loss_at_every_flush(tmp_path: Path, rng: random.Random) -> None:
    """While each is under way: of what it covers anything may be there."""
    taken, sent = losses(tmp_path, rng, 80, lambda step, _so_far: step.startswith("sync"))
    assert len(taken) > 24
    for number, (memory, promised, length) in enumerate(taken):
        for turn in range(3):
            there = tmp_path / f"crash-{number}-{turn}"
            copy.deepcopy(memory).crash(store_path(there, GROUP), rng)
            check_recovered(there, promised, sent, length)
            shutil.rmtree(there)


def losses(
    tmp_path: Path, rng: random.Random, rounds: int, wanted: Callable[[str, int], bool]
) -> tuple[list[Loss], bytes]:
    """Moments before steps of a store's I/O at which its power may be lost, and all that it was
    given."""
    files = forgetting.ForgettingFiles()
    taken: list[Loss] = []
    sent = bytearray()
    acked = [Position()]

    def before(what: str, memory: object) -> None:
        if wanted(what, len(taken)):
            taken.append((copy.deepcopy(memory), acked[0], len(sent)))

    feed = records.Feed()
    origin = tmp_path / "origin"
    with GroupStore.open(origin, GROUP, create=records.spec(), options=SMALL, files=files) as store:
        files.before = before

        def acknowledge() -> None:
            acked[0] = store.durable

        store.listen(acknowledge)
        batch = feed.stream()
        for _ in range(rounds):
            batch += feed.writes(rng.randrange(1, 9), 512 * rng.randrange(1, 20))
            sent += batch
            store.append(batch)
            batch = feed.tally() if rng.random() < 0.3 else b""
            if rng.random() < 0.2:
                store.commit()
        store.commit()
        files.before = lambda _what, _memory: None
    return taken, bytes(sent)


def check_recovered(there: Path, promised: Position, sent: bytes, length: int) -> None:
    """It opens again, holds an exact prefix, and goes on."""
    with GroupStore.open(there, GROUP, options=SMALL) as store:
        assert store.durable >= promised
        kept = content(there)
        assert kept == sent[: len(kept)]
        assert len(kept) <= length + (1 << 20)
        assert len(kept) == 0 or records.seqs(kept)[-1:] in ([store.durable.seq], [])
        feed = records.Feed(seq=store.durable.seq)
        feed.restart()
        more = feed.stream() + feed.writes(3)
        store.append(more)
        assert store.commit().seq == feed.seq
    assert content(there) == kept + more


def test_a_failed_sync_is_never_acknowledged_nor_repeated(tmp_path: Path) -> None:
    files = forgetting.ForgettingFiles()
    feed = records.Feed()
    store = GroupStore.open(tmp_path, GROUP, create=records.spec(), options=SMALL, files=files)
    store.append(feed.stream() + feed.writes(2))
    good = store.commit()
    files.sync_error = OSError(errno.EIO, "Input/output error")
    store.append(feed.writes(2))
    with pytest.raises(StorageError, match="could not be synced"):
        store.commit()
    syncs = files.syncs
    with pytest.raises(StorageError):
        store.append(feed.writes(1))
    with pytest.raises(StorageError):
        store.commit()
    time.sleep(0.05)
    assert store.durable == good
    assert files.syncs == syncs
    assert isinstance(store.failure, StorageError)
    store.close()
    with GroupStore.open(tmp_path, GROUP) as again:
        assert again.durable.seq >= good.seq


def wait_full(store: GroupStore) -> None:
    """Until the store's thread has tried: who waits for a commit hears else that it was slow."""
    deadline = time.monotonic() + 60
    while not store.full:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_full_disk_stops_acknowledging_and_goes_on_by_itself(tmp_path: Path) -> None:
    files = forgetting.ForgettingFiles()
    feed = records.Feed()
    with GroupStore.open(
        tmp_path, GROUP, create=records.spec(), options=SMALL, files=files
    ) as store:
        first = feed.stream() + feed.writes(2)
        store.append(first)
        good = store.commit()
        files.free_bytes = lambda _path: 1 << 40  # type: ignore[method-assign]
        files.room = 6000  # fails in the middle of the write
        rest = feed.writes(8)
        store.append(rest)
        wait_full(store)
        with pytest.raises(StoreFullError):
            store.commit(timeout_s=0.3)
        assert store.full
        assert store.durable == good
        with StoreReader(tmp_path, GROUP) as reader:
            assert reader.durable == good
        files.room = 1 << 30
        assert store.commit(timeout_s=60) == feed.position
        assert not store.full
    assert content(tmp_path) == first + rest


def test_the_reserve_is_kept_free(tmp_path: Path) -> None:
    files = forgetting.ForgettingFiles()
    feed = records.Feed()
    options = StoreOptions(commit_s=0.001, reserve_bytes=1 << 20)
    with GroupStore.open(
        tmp_path, GROUP, create=records.spec(), options=options, files=files
    ) as store:
        files.room = (1 << 20) + 8192
        store.append(feed.stream() + feed.writes(4))
        with pytest.raises((StoreFullError, TimeLimitError)):
            store.commit(timeout_s=0.3)
        assert files.room >= 1 << 20
        # A failover needs a manifest, and has one.
        store.add_epoch(writer=bytes(16), parent=Position(1, 0, 0))
        assert store.manifest.current_epoch.epoch == 2


def test_rotation_on_a_full_disk_is_repeated(tmp_path: Path) -> None:
    files = forgetting.ForgettingFiles()
    feed = records.Feed()
    options = StoreOptions(commit_s=0.001, segment_bytes=4096, reserve_bytes=0)
    with GroupStore.open(
        tmp_path, GROUP, create=records.spec(), options=options, files=files
    ) as store:
        sent = feed.stream() + feed.writes(4)
        store.append(sent)
        store.commit()
        files.free_bytes = lambda _path: 1 << 40  # type: ignore[method-assign]
        for room in (0, 100, 500, 1000, 1500):
            files.room = room
            batch = feed.writes(2)
            sent += batch
            store.append(batch)
            wait_full(store)
            with pytest.raises(StoreFullError):
                store.commit(timeout_s=0.25)
            files.room = 1 << 30
            assert store.commit(timeout_s=60) == feed.position
    assert content(tmp_path) == sent


WRITER = """
import sys
from pathlib import Path
import store_records as records
from vrep.target.store import GroupStore, StoreOptions
options = StoreOptions(commit_s=0.001, segment_bytes=1 << 17, reserve_bytes=0)
with GroupStore.open(Path(sys.argv[1]), records.GROUP, options=options) as store:
    feed = records.Feed(seq=store.durable.seq)
    store.listen(lambda: print(store.durable.seq, flush=True))
    batch = feed.stream()
    while True:
        store.append(batch + feed.writes(16))
        batch = b""
        if feed.seq % 64 == 0:
            store.commit()
"""


def test_kill_of_the_writer(tmp_path: Path, rng: random.Random) -> None:
    GroupStore.open(tmp_path, GROUP, create=records.spec(), options=SMALL).close()
    before = 0
    for _ in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(rng.random() * 0.3)
        os.kill(child.pid, signal.SIGKILL)
        lines = [first, *child.stdout.readlines()]
        child.wait()
        child.stdout.close()
        promised = int([line for line in lines if line.endswith("\n")][-1])
        assert promised > before
        with GroupStore.open(tmp_path, GROUP, options=SMALL) as store:
            before = store.durable.seq
            assert before >= promised
            kept = content(tmp_path)
        assert records.seqs(kept) == list(range(1, before + 1))


RACER = """
import sys, time
from pathlib import Path
from vrep.errors import LockedError
from vrep.target.store import GroupStore
try:
    with GroupStore.open(Path(sys.argv[1]), bytes(range(16))) as store:
        print("won", store.lease, flush=True)
        sys.stdin.read()
except LockedError:
    print("lost", flush=True)
"""


def test_of_two_processes_one_writes(tmp_path: Path) -> None:
    GroupStore.open(tmp_path, GROUP, create=records.spec()).close()
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [racer.stdout.readline().split()[0] for racer in racers if racer.stdout]
    for racer in racers:
        racer.communicate("")
    assert sorted(said) == ["lost", "lost", "won"]


def test_a_manifest_that_another_process_made_ends_acknowledging(tmp_path: Path) -> None:
    feed = records.Feed()
    store = GroupStore.open(tmp_path, GROUP, create=records.spec(), options=SMALL)
    store.append(feed.stream() + feed.writes(1))
    good = store.commit()
    other = manifest_path(store.directory, store.manifest.number + 1)
    Files().publish(other, store.manifest.next(1, lease=99).encode())
    store.append(feed.writes(1))
    with pytest.raises(LockedError, match="took the store over"):
        store.commit()
    assert store.durable == good
    with pytest.raises(LockedError):
        store.add_epoch(writer=bytes(16), parent=good)
    store.close()
