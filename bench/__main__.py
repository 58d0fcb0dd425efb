"""Run every measurement: ``python -m bench [--quick] [--only NAME] [--whole]``.

Rows of ``bench/pipeline`` come from alternating runs, ours and the peer's in turn, and show
the median and the spread of the ratio; the programs of ``bench/micro`` are run as they are,
with ``--json``. All rows go to ``build/bench.json``, with the machine and its load. A void
row says that the machine was busy or that a run was not as it must be: it proves nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.pipeline import iscsi, replicate, tap, vhost

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("name", "value", "unit", "against", "ratio", "target", "met", "void")
PIPELINE = ("tap", "vhost", "iscsi", "write", "single", "large", "steady", "first", "delta", "rto")
QUICK: dict[str, list[str]] = {
    "disk": ["--mib", "64", "--runs", "1", "--seconds", "0.3"],
    "filter": ["--writes", "20000", "--runs", "3"],
    "hash": ["--mib", "32", "--runs", "2"],
    "index": ["--records", "300000"],
    "map": ["--runs", "2"],
    "ring": ["--runs", "2"],
    "seal": ["--runs", "2"],
    "store": ["--mib", "64", "--runs", "1"],
    "wire": ["--seconds", "0.5", "--runs", "1"],
}
USUAL: dict[str, list[str]] = {
    "disk": ["--runs", "3", "--seconds", "0.5"],
    "index": ["--records", "2000000"],
}


def program(command: list[Any], name: str, limit_s: float) -> list[dict[str, Any]]:
    """The rows of a program that writes them with --json."""
    failed = dict.fromkeys(KEYS) | {"name": name, "met": False, "void": True}
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "rows.json"
        try:
            done = subprocess.run(
                [sys.executable, *command, "--json", out], cwd=ROOT, check=False, timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            return [failed | {"error": f"longer than {limit_s:.0f} s"}]
        if done.returncode != 0 or not out.exists():
            return [failed | {"error": f"exit status {done.returncode}"}]
        table = json.loads(out.read_text())
    return [dict.fromkeys(KEYS) | each for each in table]


def micros(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    table = []
    for path in sorted((ROOT / "bench" / "micro").glob("bench_*.py")):
        name = path.stem.removeprefix("bench_")
        if arguments.only not in (None, name):
            continue
        options = QUICK.get(name, []) if arguments.quick else USUAL.get(name, [])
        if arguments.whole:
            options = []
        print(f"== {path.stem}", flush=True)
        table += program([path, *options], path.stem, 900.0)
    return table


def recovery(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """bench/pipeline/rto.py at a size that the time allows; --whole: as the target says."""
    records, gib, runs = (10_000_000, 1024, 5) if arguments.whole else (1_000_000, 1024, 5)
    if arguments.quick:
        records, gib, runs = 40_000, 1024, 3
    command = ["-m", "bench.pipeline.rto", "--records", str(records), "--disk-gib", str(gib)]
    return program([*command, "--runs", str(runs), "--where", "build"], "rto", 1800.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs: a look, in five minutes")
    parser.add_argument("--whole", action="store_true", help="the largest sizes too: an hour")
    parser.add_argument("--only", help=f"a bench/micro without bench_, or {', '.join(PIPELINE)}")
    parser.add_argument("--load", default="", help="of tap, iscsi: loads whose name holds this")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are stopped on the way out
    (ROOT / "build").mkdir(exist_ok=True)
    begin, load = time.monotonic(), os.getloadavg()[0]
    print(f"{os.cpu_count()} processors, load {load:.1f} before the first row", flush=True)
    table = micros(arguments)
    if arguments.only in (None, "tap"):
        print("== tap")
        runs = arguments.runs or (2 if arguments.quick else 5)
        seconds = arguments.seconds or (0.5 if arguments.quick else 3.0)
        for each in tap.rows(runs, seconds, arguments.load):
            print(each, flush=True)
            table.append(asdict(each))
    if arguments.only in (None, "vhost"):
        print("== vhost")
        for each in vhost.rows(runs=arguments.runs or (2 if arguments.quick else 5)):
            print(each, flush=True)
            table.append(asdict(each))
    if arguments.only in (None, "iscsi"):
        print("== iscsi")
        runs = arguments.runs or (2 if arguments.quick else 5)
        seconds = arguments.seconds or (0.5 if arguments.quick else 2.0)
        for each in iscsi.rows(runs, seconds, arguments.load):
            print(each, flush=True)
            table.append(asdict(each))
    if arguments.only is None or arguments.only in PIPELINE[3:-1]:
        print("== pipeline")
        plan = replicate.QUICK if arguments.quick else replicate.Plan()
        if arguments.runs:
            plan.runs = arguments.runs
        table += [asdict(each) for each in replicate.rows(plan, arguments.only or "")]
    if arguments.only in (None, "rto"):
        print("== recovery", flush=True)
        table += recovery(arguments)
    out = ROOT / "build" / "bench.json"
    out.write_text(json.dumps(table, indent=1) + "\n")
    void = [each["name"] for each in table if each["void"]]
    missed = [each["name"] for each in table if each["met"] is False and not each["void"]]
    for name in missed:
        print(f"missed: {name}")
    print(
        f"{len(table)} rows in {out.relative_to(ROOT)}, {len(missed)} missed, {len(void)} void, "
        f"{time.monotonic() - begin:.0f} s, load {os.getloadavg()[0]:.1f} at the end"
    )


if __name__ == "__main__":
    main()
