"""Power losses while a disk is filled in place: what is present is whole and stable, what is not is
compared again, and the disk comes to be right (invariants 6 and 8)."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import filling_worker as worker
import forget
import pytest

from vrep._core.disk import Disk, Engine

HERE = Path(__file__).resolve().parent


def present(directory: Path) -> list[int]:
    """Where blocks begin that the view's file has."""
    with (
        Engine(1) as engine,
        Disk(
            engine,
            directory / "view",
            view_id=worker.VIEW,
            size=worker.SIZE,
            block_bytes=worker.BLOCK,
            onto=f"file:{directory / worker.ONTO}",
        ) as disk,
    ):
        return [at for at in range(0, worker.SIZE, worker.BLOCK) if disk.absent(at, 1) is None]


def go_on(directory: Path, wanted: bytes) -> None:
    """As the next process of the view does."""
    with worker.open_view(directory) as group:
        while worker.fill_some(group, directory, wanted, 1 << 20):
            pass
        group.run("flush")


@pytest.mark.parametrize("round_", range(2))
def test_a_power_loss_leaves_what_is_right_or_is_compared_again(
    round_: int, tmp_path: Path, seed: int
) -> None:
    root, seed = tmp_path.resolve(), seed + round_
    (root / "durable").mkdir()
    (root / "before").mkdir()
    before, wanted = worker.contents(seed)
    filled = root / "durable" / worker.ONTO
    filled.write_bytes(before)
    environment = os.environ | {
        "LD_PRELOAD": str(forget.compile_shim(root)),
        "VREP_FORGET_DIR": str(root / "durable"),
        "VREP_FORGET_LOG": str(root / "log"),
        "VREP_FORGET_US": "300",
    }
    command = [sys.executable, str(HERE / "filling_worker.py"), str(root), str(seed)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert filled.read_bytes() == wanted
    rng = random.Random(seed ^ 1)
    storage = forget.Storage(root / "before")
    storage.directory = (root / "durable").stat().st_ino
    number = filled.stat().st_ino
    storage.files[number] = forget.File.of(before)
    storage.names[worker.ONTO] = storage.live[worker.ONTO] = number
    entries = list(forget.read_log(root / "log"))
    moments = set(rng.sample(range(1, len(entries)), 20)) | {len(entries)}
    flushed, most = 0, 0
    for count, entry in enumerate(entries, 1):
        if entry.kind != forget.MARK:
            storage.apply(entry)
        elif entry.data == b"flushed":
            flushed += 1
        if count not in moments:
            continue
        crash = root / "crash"
        storage.after_loss(crash, rng)
        there = present(crash)
        content = (crash / worker.ONTO).read_bytes()
        for at in there:
            assert content[at : at + worker.BLOCK] == wanted[at : at + worker.BLOCK]
        assert len(there) >= flushed  # each had one block more at least
        most = max(most, len(there))
        go_on(crash, wanted)
        assert (crash / worker.ONTO).read_bytes() == wanted
        shutil.rmtree(crash)
    assert flushed
    assert most == -(-worker.SIZE // worker.BLOCK)  # closed in good order
