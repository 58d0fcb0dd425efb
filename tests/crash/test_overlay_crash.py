"""Power losses of an overlay: a block is present only with data that are stable (invariant 6)."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import forget
import overlay_worker as worker
import pytest

from vrep._core.disk import Engine

HERE = Path(__file__).resolve().parent


class Promise:
    """What each block may hold: the number of the write that was promised last, and later ones."""

    def __init__(self) -> None:
        self.writes: dict[int, list[int]] = {block: [] for block in range(worker.BLOCKS)}
        self.floor = dict.fromkeys(range(worker.BLOCKS), 0)
        self.issued: dict[int, tuple[list[int], bool]] = {}
        self.acked: list[int] = []
        self.covers: dict[int, int] = {}
        self.opened = False

    def hear(self, mark: bytes) -> None:
        said = json.loads(mark)
        if said["what"] == "opened":
            self.opened = True
            return
        number = said["number"]
        if said["what"] == "issue":
            self.issued[number] = (said["blocks"], said["fua"])
            self.covers[number] = len(self.acked)
            for block in said["blocks"]:
                self.writes[block].append(number)
            return
        blocks, fua = self.issued[number]
        if blocks and fua:
            self.promise([number])
        elif not blocks:
            self.promise(self.acked[: self.covers[number]])
        self.acked.append(number)

    def promise(self, numbers: list[int]) -> None:
        for number in numbers:
            for block in self.issued[number][0]:
                self.floor[block] = max(self.floor[block], number)

    def check(self, directory: Path, seed: int) -> None:
        with Engine(1) as engine, worker.open_overlay(engine, directory) as disk:
            for block, writes in self.writes.items():
                present = disk.absent(block * worker.BLOCK, 1) is None
                assert present or self.floor[block] == 0, f"block {block} was promised"
                if not present:
                    continue
                length = min(worker.BLOCK, worker.SIZE - block * worker.BLOCK)
                found = disk.read(block * worker.BLOCK, length)
                # A later write may be there in part: each sector is of one of those allowed.
                allowed = [
                    worker.block_of(seed, number, block)
                    for number in writes
                    if number >= self.floor[block]
                ]
                for at in range(0, length, forget.SECTOR):
                    sector = found[at : at + forget.SECTOR]
                    assert any(sector == one[at : at + forget.SECTOR] for one in allowed), (
                        f"block {block} is present without its data"
                    )


@pytest.mark.parametrize("onto", [False, True], ids=["sparse", "onto"])
@pytest.mark.parametrize("round_", range(3))
def test_presence_never_outlives_its_data(
    round_: int, onto: bool, tmp_path: Path, seed: int
) -> None:
    """Also of an overlay that fills another disk, as ``failover --onto`` does, which holds
    something else."""
    root = tmp_path.resolve()
    (root / "durable").mkdir()
    (root / "before").mkdir()
    filled = root / "durable" / worker.ONTO
    if onto:
        filled.write_bytes(random.Random(seed).randbytes(worker.SIZE))
    environment = os.environ | {
        "LD_PRELOAD": str(forget.compile_shim(root)),
        "VREP_FORGET_DIR": str(root / "durable"),
        "VREP_FORGET_LOG": str(root / "log"),
        "VREP_FORGET_US": "300",
    }
    command = [sys.executable, str(HERE / "overlay_worker.py"), str(root), str(seed), "150"]
    subprocess.run(command, env=environment, check=True, timeout=120)
    rng = random.Random(seed ^ 1)
    storage, promise = forget.Storage(root / "before"), Promise()
    storage.directory = (root / "durable").stat().st_ino
    if onto:
        number = filled.stat().st_ino
        storage.files[number] = forget.File.of(random.Random(seed).randbytes(worker.SIZE))
        storage.names[worker.ONTO] = storage.live[worker.ONTO] = number
    entries = list(forget.read_log(root / "log"))
    moments = set(rng.sample(range(1, len(entries)), 25)) | {len(entries)}
    for number, entry in enumerate(entries, 1):
        if entry.kind == forget.MARK:
            promise.hear(entry.data)
        else:
            storage.apply(entry)
        if number in moments:
            storage.after_loss(root / "crash", rng)
            promise.check(root / "crash", seed)  # also what was never finished opens, or anew
            shutil.rmtree(root / "crash")
    assert promise.opened
