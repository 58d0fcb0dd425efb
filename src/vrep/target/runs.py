"""Merged runs: which indexes to merge next, and which files nobody needs any more.

Size-tiered: eight neighbours of one level become one run of the next, so a store of n
segments is read through about 8 log8(n) indexes. Segments keep their own footers; a run
only saves looking at them one by one. Pins hold files for readers: a file ``pin-*`` that a
living reader keeps locked.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from vrep._core import layout
from vrep._core.index import Index, merge
from vrep.errors import CorruptError
from vrep.listing import names_in
from vrep.target.files import Files
from vrep.target.manifest import Manifest
from vrep.target.segment import run_path, segment_path

__all__ = [
    "FAN_IN",
    "Pin",
    "Unit",
    "merge_units",
    "pinned",
    "stale_runs",
    "units",
    "units_to_merge",
]

FAN_IN: Final = 8
_RUN: Final = re.compile(r"run-([0-9a-f]{8})")


@dataclass(frozen=True)
class Unit:
    """One index that a reader looks at: a segment's footer (level 0) or a run."""

    level: int
    number: int
    first_segment: int
    last_segment: int
    generation: int = 0
    """of a segment"""

    def path(self, directory: Path) -> Path:
        if self.level == 0:
            return segment_path(directory, self.number, self.generation)
        return run_path(directory, self.number)


def units(manifest: Manifest) -> list[Unit]:
    """The indexes that together cover every closed segment once, oldest first."""
    runs = [
        Unit(int(r["level"]), int(r["run"]), int(r["first_segment"]), int(r["last_segment"]))
        for r in manifest.runs
    ]
    firsts = np.array([unit.first_segment for unit in runs], np.int64)
    lasts = np.array([unit.last_segment for unit in runs], np.int64)
    numbers = manifest.segments["segment"].astype(np.int64)
    run_of = np.searchsorted(firsts, numbers, side="right") - 1
    rows = manifest.segments
    bare = rows[(run_of < 0) | (numbers > lasts[run_of])] if len(runs) else rows
    found = runs + [
        Unit(0, n, n, n, int(row["generation"])) for row in bare for n in [int(row["segment"])]
    ]
    return sorted(found, key=lambda unit: unit.first_segment)


def units_to_merge(manifest: Manifest) -> list[Unit]:
    """The next neighbours to merge; empty when there is nothing to do."""
    tiers = units(manifest)
    start = 0
    for at, unit in enumerate(tiers):
        if unit.level != tiers[start].level:
            start = at
        if at - start + 1 == FAN_IN:
            return tiers[start : at + 1]
    return []


def merge_units(
    directory: Path, manifest: Manifest, chosen: list[Unit], files: Files
) -> NDArray[np.void]:
    """Write and sync the run of these indexes; the manifest's entry for it."""
    number = 1 + max([0, *run_numbers(directory), *(int(run["run"]) for run in manifest.runs)])
    path = run_path(directory, number)
    level = chosen[0].level + 1
    indexes = [Index.open(unit.path(directory)) for unit in chosen]
    fd = files.create(path)
    try:
        trailer = merge(indexes, fd, level)
        files.sync(fd)
    except BaseException:
        files.unlink(path)
        raise
    finally:
        os.close(fd)
    entry = np.zeros((), layout.MANIFEST_RUN)
    entry["run"], entry["level"] = number, level
    entry["first_segment"] = chosen[0].first_segment
    entry["last_segment"] = chosen[-1].last_segment
    entry["file_bytes"] = trailer["file_bytes"]
    entry["index_digest"] = np.frombuffer(trailer["digest"], np.uint8)
    return entry


def replace_runs(manifest: Manifest, entry: NDArray[np.void]) -> NDArray[np.void]:
    """The runs of a manifest with a new one in the place of those that it covers."""
    covered = (manifest.runs["first_segment"] >= entry["first_segment"]) & (
        manifest.runs["last_segment"] <= entry["last_segment"]
    )
    kept = np.append(manifest.runs[~covered], entry.reshape(1))
    return kept[np.argsort(kept["first_segment"], kind="stable")]


def without_runs(manifest: Manifest, first: int, last: int) -> NDArray[np.void]:
    """The runs of a manifest but those that cover a segment from `first` to `last`."""
    apart = (manifest.runs["last_segment"] < first) | (manifest.runs["first_segment"] > last)
    return manifest.runs[apart]


def run_numbers(directory: Path) -> list[int]:
    return [int(match[1], 16) for name in names_in(directory) if (match := _RUN.fullmatch(name))]


def stale_runs(directory: Path, manifest: Manifest) -> list[Path]:
    """Runs that the manifest does not name."""
    named = {int(run["run"]) for run in manifest.runs}
    return [run_path(directory, n) for n in run_numbers(directory) if n not in named]


class Pin:
    """While it is open, files that its holder may be reading are not removed."""

    def __init__(self, directory: Path) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        while True:
            self.path = directory / f"pin-{os.getpid()}-{secrets.token_hex(4)}"
            self._fd = os.open(self.path, flags, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if os.fstat(self._fd).st_nlink:
                return
            os.close(self._fd)  # a writer took it for a dead one's before it was locked

    def close(self) -> None:
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def pinned(directory: Path) -> bool:
    """Whether a living reader holds a pin; pins of the dead are removed."""
    held = False
    for name in names_in(directory):
        if not name.startswith("pin-"):
            continue
        path = directory / name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # let go since the listing
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            held = True
        finally:
            os.close(fd)
    return held


def check_file(path: Path, file_bytes: int) -> None:
    """CorruptError unless a file that a manifest names is there with its size."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CorruptError(f"{path} is missing") from None
    if size != file_bytes:
        raise CorruptError(f"{path} has {size} bytes, not {file_bytes}")
