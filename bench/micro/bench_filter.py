"""What recording adds to a 4 KiB write, beside a bare pwritev2, in one run.

    python bench/micro/bench_filter.py [--json FILE] [--dir DIRECTORY] [--writes N] [--runs 5]

A C program (filter_publish.c, compiled here with the sources of the library) drives a
group without a front-end: bare pwritev2, a group without tap, a group with it, in
turns, the fastest turn of each. The row is what the tap adds over the bare call, in
microseconds; `spread` is the largest less the smallest over the runs. A row whose
spread is over half of the target is void: the machine was busy.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TARGET_US = 2.0
LIBRARIES = ["libxxhash", "liburing", "libssl", "libcrypto", "libzstd"]


def compile_program(where: Path) -> Path:
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", *LIBRARIES], capture_output=True, text=True, check=True
    ).stdout.split()
    sources = [str(path) for path in (ROOT / "src" / "_native").glob("*/*.c")]
    program = where / "filter_publish"
    options = ["-O2", "-std=c11", "-D_GNU_SOURCE", f"-I{ROOT / 'src' / '_native'}"]
    bench = str(ROOT / "bench" / "micro" / "filter_publish.c")
    subprocess.run(
        ["cc", *options, bench, *sources, "-o", str(program), *flags, "-lpthread", "-lm"],
        check=True,
    )
    return program


def measure(program: Path, directory: Path, writes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=directory) as work:
        text = subprocess.run(
            [program, work, str(writes), "5"], capture_output=True, text=True, check=True
        ).stdout
    for left in Path("/dev/shm").glob("vrep-bench-*"):
        shutil.rmtree(left)
    return {name: float(ns) / 1000 for name, ns in map(str.split, text.splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--writes", type=int, default=50000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        program = compile_program(Path(work))
        runs = [measure(program, arguments.dir, arguments.writes) for _ in range(arguments.runs)]
    added = [run["tapped"] - run["pwritev2"] for run in runs]
    value, spread = statistics.median(added), max(added) - min(added)
    bare = statistics.median(run["pwritev2"] for run in runs)
    row = {
        "name": "tap: what recording adds to a 4 KiB write",
        "value": round(value, 3),
        "unit": "us",
        "against": "pwritev2",
        "ratio": round((bare + value) / bare, 3),
        "target": TARGET_US,
        "met": value <= TARGET_US,
        "void": spread > TARGET_US / 2,
        "spread": round(spread, 3),
    }
    print(f"{row['name']}: {value:.2f} us over {bare:.2f} us, spread {spread:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([row], indent=2) + "\n")


if __name__ == "__main__":
    main()
