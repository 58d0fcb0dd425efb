"""The disk room beside fio with the same pattern, on this machine, in one run.

    python bench/micro/bench_disk.py [--json FILE] [--dir DIR] [--mib 256] [--runs 5]

4 KiB at random, 32 in flight, on one file of DIR: page-cached against fio's pvsync2 (one thread,
one at a time: what a page-cached call can do), O_DIRECT against fio's io_uring with 32 in flight.
Our side is driven from Python, one call for each request, and says how much of that the call
costs: a row ``floor`` is the same loop with requests of no length. Runs alternate; value and peer
are medians, spread is the largest less the smallest. A row whose spread is over a quarter of its
value is void: the machine was busy.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from vrep._core.disk import Disk, Engine

BLOCK, DEPTH, BATCH = 4096, 32, 128


def ours(path: Path, op: str, *, direct: bool, seconds: float, empty: bool = False) -> float:
    """Requests each second."""
    rng = random.Random(1)
    data = rng.randbytes(BLOCK)
    done = 0
    with Engine(4) as engine, Disk(engine, f"file:{path}", direct=direct) as disk:
        blocks = disk.info.size // BLOCK
        places = [rng.randrange(blocks) * BLOCK for _ in range(1 << 16)]
        turn = 0
        begun = now = time.perf_counter()
        while now - begun < seconds:
            turn = (turn + BATCH) % len(places)
            for place in places[turn : turn + BATCH]:
                if empty:
                    disk.submit("zero", place, 0)
                elif op == "write":
                    disk.submit("write", place, 0, data)
                else:
                    disk.submit("read", place, BLOCK)
                while engine.inflight >= DEPTH:
                    select.select([engine], [], [])
                    engine.reap()
                done += 1
            now = time.perf_counter()
        engine.wait()
        return done / (time.perf_counter() - begun)


def fio(path: Path, op: str, *, direct: bool, seconds: float) -> float:
    command = [
        "fio",
        "--name=peer",
        f"--filename={path}",
        f"--rw=rand{op}",
        f"--bs={BLOCK}",
        f"--ioengine={'io_uring' if direct else 'pvsync2'}",
        f"--iodepth={DEPTH if direct else 1}",
        f"--direct={int(direct)}",
        "--time_based",
        f"--runtime={seconds}",
        "--output-format=json",
    ]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(told.stdout)["jobs"][0][op]["iops"])


def row(name: str, mine: list[float], peer: list[float]) -> dict[str, Any]:
    value, against = statistics.median(mine), statistics.median(peer)
    spread = max(mine) - min(mine)
    return {
        "name": name,
        "value": round(value),
        "unit": "requests/s",
        "against": round(against),
        "ratio": round(value / against, 2),
        "spread": round(spread),
        "target": None,
        "met": None,
        "void": spread > value / 4,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=options.dir) as root:
        path = Path(root) / "disk"
        with path.open("wb") as file:
            for _ in range(options.mib):
                file.write(random.Random(1).randbytes(1 << 20))
        for direct in (False, True):
            for op in ("read", "write"):
                mine, peer = [], []
                for _ in range(options.runs):
                    mine.append(ours(path, op, direct=direct, seconds=options.seconds))
                    peer.append(fio(path, op, direct=direct, seconds=options.seconds))
                kind = "direct" if direct else "cached"
                rows.append(row(f"disk: 4 KiB random {op}, {kind}", mine, peer))
        floor = [
            ours(path, "zero", direct=False, seconds=options.seconds, empty=True)
            for _ in range(options.runs)
        ]
        rows.append(row("disk: floor of the Python calls", floor, floor))
    for one in rows:
        void = "  void" if one["void"] else ""
        print(f"{one['name']:<36} {one['value']:>9} {one['against']:>9} {one['ratio']:>6}{void}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
