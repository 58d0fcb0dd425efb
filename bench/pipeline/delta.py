"""A delta: 1 % of the 4 KiB units of a full disk changed since the other side had it.

Ours: the disk changes past the filter, and the operator asks for a comparison of all of it; the
clock stops when everything is durable at the target and the change map is empty. Sealed, over
TLS. The peers copy between two files of this host: rsync in place, restic into a repository that
has the disk from before. All read the whole disk. The data cannot be compressed.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from bench.peers import backup
from bench.pipeline import image
from bench.pipeline.lab import GROUP, lab
from bench.rows import Row, plain, row

BLOCK = 4096
SHARE = 0.01


def change(path: Path, rng: random.Random) -> int:
    """Units of an image become others; how many bytes."""
    blocks = path.stat().st_size // BLOCK
    units = rng.sample(range(blocks), int(blocks * SHARE))
    with path.open("r+b") as file:
        for unit in sorted(units):
            os.pwrite(file.fileno(), rng.randbytes(BLOCK), unit * BLOCK)
        os.fsync(file.fileno())
    return len(units) * BLOCK


def rows(directory: Path, runs: int, size: int) -> list[Row]:
    rng = random.Random(1)
    disk, copy, repository = (directory / name for name in ("delta.img", "copy.img", "restic"))
    image.make(disk, size)
    backup.rsync(disk, copy)
    backup.restic_init(repository)
    backup.restic(disk, repository)
    ours, by_rsync, by_restic, sent, hashes = [], [], [], [], []
    with lab(directory / "delta", disk, compression=0) as site:
        site.settle()
        for _ in range(runs):
            changed = change(disk, rng)
            before = site.source.call("status")[GROUP]
            begin = time.monotonic()
            site.filter.call("resync", group=GROUP, all=True)
            site.settle()
            ours.append(time.monotonic() - begin)
            after = site.source.call("status")[GROUP]
            sent.append((after["bytes_sent"] - before["bytes_sent"]) / changed)
            cost = sum(after["delta"][k] - before["delta"][k] for k in backup.HASHES)
            hashes.append(cost / changed)
            by_rsync.append(timed(lambda: backup.rsync(disk, copy)))
            by_restic.append(timed(lambda: backup.restic(disk, repository)))
            subprocess.run(["cmp", disk, copy], check=True)
    name = f"delta of {size >> 20} MiB, 1 % changed"
    return [
        row(name, "s", "rsync", ours, by_rsync, "<= 1.0"),
        row(name, "s", "restic", ours, by_restic, "<= 1.0"),
        plain(f"{name}: bytes sent / changed units", "", sent, "<= 1.05"),
        plain(f"{name}: hash traffic / changed units", "", hashes),
    ]


def timed(run: Callable[[], None]) -> float:
    begin = time.monotonic()
    run()
    return time.monotonic() - begin
