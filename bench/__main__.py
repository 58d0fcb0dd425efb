"""Run every measurement: ``python -m bench [--quick] [--only tap]``.

Rows of ``bench/pipeline`` come from five alternating runs; the programs of
``bench/micro`` are run as they are, with ``--json``. All rows go to ``build/bench.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.pipeline import tap

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("name", "value", "unit", "against", "ratio", "target", "met", "void")


def micro(program: Path) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "rows.json"
        done = subprocess.run([sys.executable, program, "--json", out], cwd=ROOT, check=False)
        if done.returncode != 0 or not out.exists():
            failed = dict.fromkeys(KEYS) | {"name": program.stem, "met": False, "void": True}
            return [failed | {"error": f"exit status {done.returncode}"}]
        table = json.loads(out.read_text())
    return [dict.fromkeys(KEYS) | each for each in table]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short runs: a smoke test")
    parser.add_argument("--only", help="a program of bench/micro without bench_, or tap")
    parser.add_argument("--load", default="", help="of tap: only loads whose name holds this")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    (ROOT / "build").mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} processors, load {load:.1f} before the first row")
    table: list[dict[str, Any]] = []
    for program in sorted((ROOT / "bench" / "micro").glob("bench_*.py")):
        if arguments.only in (None, program.stem.removeprefix("bench_")):
            print(f"== {program.stem}")
            table += micro(program)
    if arguments.only in (None, "tap"):
        print("== tap")
        runs = arguments.runs or (2 if arguments.quick else 5)
        seconds = arguments.seconds or (0.5 if arguments.quick else 3.0)
        for each in tap.rows(runs, seconds, arguments.load):
            print(each, flush=True)
            table.append(asdict(each))
    out = ROOT / "build" / "bench.json"
    out.write_text(json.dumps(table, indent=1) + "\n")
    missed = [each["name"] for each in table if each["met"] is False]
    print(f"{len(table)} rows in {out.relative_to(ROOT)}, {len(missed)} missed")


if __name__ == "__main__":
    main()
