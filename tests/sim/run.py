"""Run the simulator: seeds in parallel, coverage counted, failures named with how to replay them.

    python tests/sim/run.py [--seeds N] [--fresh N] [--base N] [--jobs N]
    python tests/sim/run.py --seed N [--trace]

`--seeds` are always the same; `--fresh` ones begin at a random base, which is printed. A run fails
when a seed does, when one was too small, or when something that must happen never did: what never
happens was not tested.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Final

from events import EVENTS_MIN, EVER, NOTHING, PER_SEED
from workers import Workers, play_all

SEEDS: Final = 100
FRESH: Final = 40
FAILED_MAX: Final = 5
"""then the rest is not played"""


def judge(seed: int, events: Counter[str], error: str) -> str:
    """What is wrong with a seed that was played."""
    if error:
        return error
    total = sum(count for what, count in events.items() if what not in NOTHING)
    if total < EVENTS_MIN:
        return f"it has {total} events, {EVENTS_MIN} at least are wanted"
    missing = [what for what in PER_SEED if not events[what]]
    return f"it has no {', '.join(missing)}" if missing else ""


class Results:
    """What workers tell, as it comes."""

    def __init__(self, worker: subprocess.Popen[bytes], told: list[int]) -> None:
        """`told`: descriptors that its processes write to."""
        self.totals: Counter[str] = Counter()
        self.played: set[int] = set()
        self.failed: dict[int, str] = {}
        self._worker = worker
        self._told = told
        self._lock = threading.Lock()

    def collect(self) -> None:
        threads = [threading.Thread(target=self._read, args=(fd,)) for fd in self._told]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._worker.wait()

    def _read(self, fd: int) -> None:
        with os.fdopen(fd) as lines:
            for line in lines:
                found = json.loads(line)
                with self._lock:
                    self._take(found["seed"], found["events"], found["error"])

    def _take(self, seed: int, events: dict[str, int], error: str) -> None:
        self.played.add(seed)
        self.totals.update(events)
        error = judge(seed, Counter(events), error)
        if error:
            self.failed[seed] = error
            print(f"seed {seed}: {error}\n  make sim SEED={seed}", flush=True)
        if len(self.failed) >= FAILED_MAX:
            self.stop()

    def stop(self) -> None:
        self._worker.terminate()


def run(seeds: list[int], jobs: int) -> int:
    began = time.monotonic()
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="vrep-sim-", dir=base) as root:
        # The order of a set of names must be the same in a replay.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "TMPDIR": root}
        errors = (Path(root) / "errors").open("w+")
        pipes = [os.pipe() for _job in range(jobs)]
        ends = [end for _told, end in pipes]
        worker = subprocess.Popen(
            [sys.executable, __file__, "--workers", json.dumps(ends)],
            stdin=subprocess.PIPE,
            stderr=errors,
            env=environment,
            pass_fds=ends,
        )
        for end in ends:
            os.close(end)
        results = Results(worker, [told for told, _end in pipes])
        try:
            assert worker.stdin is not None
            with worker.stdin as given:
                given.write(json.dumps(seeds).encode())
            results.collect()
        finally:
            results.stop()
            worker.wait()
        with errors:
            errors.seek(0)
            said = [line for line in errors if not line.startswith("vrep ")]
    passed_s = time.monotonic() - began
    totals, failed, played = results.totals, results.failed, results.played
    print(", ".join(f"{what} {count}" for what, count in sorted(totals.items())))
    events = sum(count for what, count in totals.items() if what not in NOTHING)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    each_s = (used.ru_utime + used.ru_stime) / max(1, len(played))
    print(
        f"{len(played)} seeds, {events} events, {len(failed)} failed, {passed_s:.1f} s, "
        f"{each_s:.3f} s of a processor each: {60 * len(played) / passed_s:.0f} seeds a minute, "
        f"{120 / each_s:.0f} if 2 cores had nothing else to do"
    )
    if failed:
        return 1
    never = [what for what in EVER if not totals[what]] if len(seeds) > 1 else []
    if never:
        print(f"never happened: {', '.join(never)}")
    lost = sorted(set(seeds) - played)
    if lost:
        print(f"a worker ended before it had played {lost[:5]}: {''.join(said[-20:])}")
    return 1 if never or lost else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="that are always the same")
    parser.add_argument("--fresh", type=int, default=FRESH, help="that begin at the base")
    parser.add_argument("--base", type=int, help="of the fresh ones; default: random")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="this one only")
    parser.add_argument("--trace", action="store_true", help="tell all that happens")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        play_all(arguments.worker, sys.stdout)
        return 0
    if arguments.workers is not None:
        Workers(json.load(sys.stdin), arguments.workers).run()
        return 0
    if arguments.seed is not None:
        if os.environ.get("PYTHONHASHSEED") != "0":
            os.environ["PYTHONHASHSEED"] = "0"
            os.execv(sys.executable, [sys.executable, *sys.argv])
        if not arguments.trace:
            return run([arguments.seed], 1)
        play_all([arguments.seed], sys.stdout, trace=True)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # directories are removed
    base = arguments.base or random.SystemRandom().randrange(10_000, 1 << 40)
    print(f"seeds 1 to {arguments.seeds}, and {arguments.fresh} from base {base} on", flush=True)
    seeds = [*range(1, arguments.seeds + 1), *range(base, base + arguments.fresh)]
    return run(seeds, max(1, min(arguments.jobs, len(seeds))))


if __name__ == "__main__":
    sys.exit(main())
