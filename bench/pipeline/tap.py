"""The tap through NBD, beside the peers without replication, over a page-cached file.

Ours runs with its tap on: ring, change map, write-intent, and a second process that
reads and checksums every record. Servers take turns, each with a fresh process over the
same warm file; a run of ours with a gap, an unrecorded write or a record that the
follower did not see voids its rows. Beside the first load stands the least that a server
can do (`null_nbd.c`, which only writes): what the client gets from it is the machine's limit.
Beside large writes stands the least that a tap can do (`least_tap.c`), followed and not.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.peers import nbd
from bench.pipeline import limits
from bench.pipeline.image import make
from bench.rows import Row, row

ROOT = Path(__file__).resolve().parents[2]
SIZE = 512 << 20
LOADS: list[tuple[str, str, str, int, str]] = [
    # name, rw, bs, depth, what is compared
    ("4 KiB random write qd32", "randwrite", "4k", 32, "iops"),
    ("4 KiB random write qd1", "randwrite", "4k", 1, "latency"),
    ("256 KiB sequential write qd4", "write", "256k", 4, "iops"),
    ("256 KiB sequential read qd4", "read", "256k", 4, "iops"),
    ("4 KiB random read qd32", "randread", "4k", 32, "iops"),
]


def follower(directory: Path) -> Path:
    """The ring's consumer, compiled from this tree."""
    program = directory / "follow"
    native = ROOT / "src" / "_native"
    sources = [
        str(path) for room in ("ring", "base", "format") for path in native.glob(f"{room}/*.c")
    ]
    subprocess.run(
        [
            *("gcc", "-O2", "-std=c11", "-D_GNU_SOURCE", f"-I{native}"),
            *(ROOT / "bench/pipeline/follow.c", *sources, "-lxxhash", "-lpthread", "-o", program),
        ],
        check=True,
    )
    return program


@contextmanager
def running(command: list[str], socket: Path, said: dict[str, Any] | None = None) -> Iterator[int]:
    """A server for the time of one load: its process; what it prints at its end goes into
    ``said``."""
    socket.unlink(missing_ok=True)
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        for _ in range(1000):
            if socket.exists():
                break
            if server.poll() is not None:
                raise RuntimeError(f"{command[0]}: {(server.stderr or sys.stdin).read()!r}")
            time.sleep(0.01)
        time.sleep(0.2)
        yield server.pid
    finally:
        server.send_signal(signal.SIGTERM)
        out, _ = server.communicate(timeout=120)
        if said is not None and out:
            said.update(json.loads(out.splitlines()[-1]))


def sound(said: dict[str, Any]) -> bool:
    status, seen = said["status"], said["follower"]
    whole = not seen or (seen["records"] == status["head"] and status["unrecorded"] == 0)
    return whole and status["gaps"] == 0 and said["server"]["errors"] == 0


def rows(runs: int = 5, seconds: float = 2.0, only: str = "") -> Iterator[Row]:
    """As they are found; ``only`` takes the loads whose name holds it."""
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="bench-") as name:
        directory = Path(name)
        image, socket = directory / "disk.img", directory / "s"
        make(image, SIZE)
        host = [sys.executable, "-m", "bench.pipeline.host", str(socket), str(image)]
        follow = str(follower(directory))
        served = [str(socket), str(SIZE), str(image)]
        least = [str(limits.program("null_nbd", directory)), *served]
        least_tap = [str(limits.program("least_tap", directory, "-lxxhash")), *served]

        def measure(
            command: list[str], load: tuple[Any, ...], span: float, said: Any = None
        ) -> Any:
            with running(command, socket, said):
                return nbd.fio(
                    socket, rw=load[1], bs=load[2], depth=load[3], size=SIZE, seconds=span
                )

        def best(make: Callable[[Path, Path, int], list[str]], load: tuple[Any, ...]) -> list[str]:
            trials = [make(socket, image, tuning) for tuning in range(3)]
            speed = [measure(trial, load, min(1.0, seconds))["iops"] for trial in trials]
            return trials[speed.index(max(speed))]

        for load in LOADS:
            if only not in load[0]:
                continue
            servers = {
                "tap": [*host, "--follow", follow],
                "off": host,
                "nbdkit": best(nbd.nbdkit, load),
                "qemu-nbd": best(nbd.qemu_nbd, load),
            }
            if first(load):
                servers["least"] = least
            if large(load):
                servers |= {"least tap": [*least_tap, "1"], "least tap, off": [*least_tap, "0"]}
            got: dict[str, list[dict[str, float]]] = {each: [] for each in servers}
            void = False
            for _ in range(runs):
                for each, command in servers.items():
                    said: dict[str, Any] | None = {} if each in ("tap", "off") else None
                    got[each].append(measure(command, load, seconds, said))
                    void |= said is not None and not sound(said)
            yield from compare(load, got, void)


def first(load: tuple[Any, ...]) -> bool:
    return load[3] == 32 and load[1] == "randwrite"


def large(load: tuple[Any, ...]) -> bool:
    return load[1] == "write"


def middle_ratio(mine: list[float], theirs: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 2)


def compare(load: tuple[Any, ...], got: dict[str, list[dict[str, float]]], void: bool) -> list[Row]:
    def of(server: str, key: str) -> list[float]:
        return [run[key] for run in got[server]]

    name = load[0]
    if load[4] == "latency":
        return [
            row(
                f"tap: {name} {key}",
                "us",
                peer,
                of("tap", key),
                of(peer, key),
                "" if peer == "off" else "<= 1.0",
                void=void,
            )
            for key in ("p50", "p99")
            for peer in ("nbdkit", "qemu-nbd", "off")
        ]
    targets = {
        "nbdkit": ">= 1.5" if first(load) else ">= 1.0",
        "qemu-nbd": ">= 2.0" if first(load) else ">= 1.0",
        "off": ">= 0.95",
    }
    if first(load):
        targets["least"] = ""
    table = [
        row(f"tap: {name}", "IOPS", peer, of("tap", "iops"), of(peer, "iops"), target, void=void)
        for peer, target in targets.items()
    ]
    if large(load):
        limit = of("least tap", "iops")
        table.append(
            row(
                f"tap: {name}",
                "IOPS",
                "least tap",
                of("tap", "iops"),
                limit,
                void=void,
                least_x_nbdkit=middle_ratio(limit, of("nbdkit", "iops")),
                least_x_its_off=middle_ratio(limit, of("least tap, off", "iops")),
            )
        )
    if first(load):
        table.append(
            row(
                f"tap: {name} p99",
                "us",
                "off",
                of("tap", "p99"),
                of("off", "p99"),
                "<= 1.2",
                void=void,
            )
        )
    return table
