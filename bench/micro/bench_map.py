"""Change-map scan beside NumPy and pyroaring, on this machine, in one run.

    python bench/micro/bench_map.py [--json FILE] [--gib 1024] [--runs 5]

The map of a disk of 1 TiB with 64 KiB bits and all five bitmaps in use, `share` of the
bits set in runs at random places. Counted: the dirty bits of the union; listed: its runs
as (offset, length). NumPy does the same over the same five bitmaps as arrays of words,
pyroaring over five of its bitmaps. In turns, the fastest of 7 calls each; `ratio` is the
median over the runs; a row whose spread is over a quarter of it is void.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vrep._core.map import ChangeMap

BIT = 65536
CALLS = 7
TARGET = 5.0


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compare(
    name: str, ours: Callable[[], Any], against: str, other: Callable[[], Any], runs: int
) -> dict[str, Any]:
    pairs = []
    for _ in range(runs):
        calls = [(seconds(ours), seconds(other)) for _ in range(CALLS)]
        pairs.append((min(mine for mine, _ in calls), min(theirs for _, theirs in calls)))
    ratios = [theirs / mine for mine, theirs in pairs]
    ratio, spread = statistics.median(ratios), max(ratios) - min(ratios)
    void = spread > ratio / 4
    return {
        "name": name,
        "value": round(statistics.median(mine for mine, _ in pairs) * 1e6, 1),
        "unit": "us",
        "against": against,
        "against_value": round(statistics.median(theirs for _, theirs in pairs) * 1e6, 1),
        "ratio": round(ratio, 2),
        "spread": round(spread, 2),
        "target": TARGET,
        "met": None if void else ratio >= TARGET,
        "void": void,
    }


def numpy_union(bitmaps: list[np.ndarray]) -> np.ndarray:
    union = bitmaps[0] | bitmaps[1]
    for bitmap in bitmaps[2:]:
        np.bitwise_or(union, bitmap, out=union)
    return union


def numpy_runs(bitmaps: list[np.ndarray]) -> np.ndarray:
    bits = np.unpackbits(numpy_union(bitmaps).view(np.uint8), bitorder="little")
    edges = np.flatnonzero(np.diff(bits, prepend=0, append=0))
    starts, ends = edges[::2].astype(np.uint64) * BIT, edges[1::2].astype(np.uint64) * BIT
    return np.stack([starts, ends - starts], axis=1)


def fill(changes: ChangeMap, bits: int, share: float) -> list[np.ndarray]:
    """Marks all five bitmaps; returns them as plain arrays of words."""
    rng = np.random.default_rng(1)
    bitmaps = []
    for turn in range(5):
        flags = np.zeros(bits, np.uint8)
        starts = rng.integers(0, bits, max(1, int(bits * share / 5 / 8)))
        for start, length in zip(
            starts.tolist(), rng.integers(1, 16, len(starts)).tolist(), strict=True
        ):
            flags[start : start + length] = 1
            if turn == 0:
                changes.mark_unshipped(0, start * BIT, length * BIT)
            else:
                changes.mark(0, start * BIT, length * BIT)
        if 0 < turn < 4:
            changes.seal(turn)
        bitmaps.append(np.packbits(flags, bitorder="little").view(np.uint64))
    return bitmaps


def pyroaring_rows(
    name: str, changes: ChangeMap, bitmaps: list[np.ndarray], runs: int
) -> list[Any]:
    from pyroaring import BitMap

    roaring = []
    for words in bitmaps:
        bits = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        roaring.append(BitMap(bits.astype(np.uint32)))
        roaring[-1].run_optimize()

    def listed() -> np.ndarray:
        return np.array(BitMap.union(*roaring).to_array(), copy=False)

    def counted() -> int:
        return len(BitMap.union(*roaring))

    assert counted() == changes.dirty_bits
    return [
        compare(f"{name}, count", lambda: changes.dirty_bits, "pyroaring", counted, runs),
        compare(f"{name}, list", lambda: changes.runs(0), "pyroaring", listed, runs),
    ]


def numpy_rows(name: str, changes: ChangeMap, bitmaps: list[np.ndarray], runs: int) -> list[Any]:
    def counted() -> int:
        return int(np.bitwise_count(numpy_union(bitmaps)).sum())

    def listed() -> np.ndarray:
        return numpy_runs(bitmaps)

    assert (listed() == changes.runs(0)).all()
    return [
        compare(f"{name}, count", lambda: changes.dirty_bits, "NumPy", counted, runs),
        compare(f"{name}, list", lambda: changes.runs(0), "NumPy", listed, runs),
    ]


def rows(gib: int = 1024, runs: int = 5) -> list[dict[str, Any]]:
    found = []
    size = gib << 30
    for share in (0.001, 0.05):
        with (
            tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
            ChangeMap.create(Path(folder) / "map", [size]) as changes,
        ):
            bitmaps = fill(changes, size // BIT, share)
            name = f"change-map scan, {gib} GiB, {share:.1%} set"
            found += numpy_rows(name, changes, bitmaps, runs)
            found += pyroaring_rows(name, changes, bitmaps, runs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gib", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    found = rows(arguments.gib, arguments.runs)
    for row in found:
        print(json.dumps(row))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
