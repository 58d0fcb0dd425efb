"""iSCSI: an initiator's requests, with every record read and checksummed by a second process.

Beside Debian's tgt on the same image with the same client, and beside ourselves without the tap.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers import iscsi
from bench.pipeline.image import make
from bench.pipeline.tap import ROOT, SIZE, follower, sound
from bench.rows import Row, row

PEER = "tgt"


class Load(NamedTuple):
    name: str
    rw: str
    block: int
    depth: int
    target: str = ""
    busy: int = 0  # processes beside it that never sleep


LOADS = [
    Load("4 KiB random write qd32", "write", 4096, 32, ">= 2.0"),
    Load("4 KiB random read qd32", "read", 4096, 32, ">= 2.0"),
    Load("4 KiB random write qd32, busy machine", "write", 4096, 32, busy=2),
    Load("4 KiB random write qd1", "write", 4096, 1),
    Load("256 KiB random write qd4", "write", 256 << 10, 4),
    Load("256 KiB random read qd4", "read", 256 << 10, 4),
]


@contextmanager
def busy(count: int) -> Iterator[None]:
    """As the guests of a host may be."""
    spin = [sys.executable, "-c", "while True: pass"]
    spinning = [subprocess.Popen(spin) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


class Bench:
    """The client and the image of all runs."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "disk.img"
        make(self.image, SIZE)
        self._program = iscsi.load_program(directory)
        self._follow = ["--follow", str(follower(directory))]

    @contextmanager
    def ours(self, tap: bool, port: int, said: dict[str, Any]) -> Iterator[int]:
        host = [sys.executable, "-m", "bench.pipeline.host", f"127.0.0.1:{port}", str(self.image)]
        command = [*host, "--iscsi", *(self._follow if tap else [])]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        try:
            iscsi.wait_for(port, server)
            yield server.pid
        finally:
            server.send_signal(signal.SIGTERM)
            out, _ = server.communicate(timeout=120)
        said.update(json.loads(out.splitlines()[-1]))
        said["server"]["errors"] -= 1  # the attention that a new session is told

    def run(
        self, server: str, load: Load, seconds: float, tuning: int = 0,
        said: dict[str, Any] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        port = iscsi.free_port()
        if server == PEER:
            serving, lun = iscsi.tgt(self.image, port, tuning), 1
        else:
            said = {} if said is None else said
            serving, lun = self.ours(server == "tap", port, said), 0
        with serving as pid, busy(load.busy):
            return iscsi.load(
                self._program, port, lun, pid, rw=load.rw, block=load.block, depth=load.depth,
                size=SIZE, seconds=seconds,
            )  # fmt: skip


def rows(runs: int = 5, seconds: float = 2.0, only: str = "") -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="bench-") as name:
        bench = Bench(Path(name))
        for load in LOADS:
            if only not in load.name:
                continue
            trials = range(len(iscsi.TUNINGS))
            speeds = [bench.run(PEER, load, min(1.0, seconds), t)["iops"] for t in trials]
            tuning = speeds.index(max(speeds))
            got: dict[str, list[dict[str, float]]] = {each: [] for each in ("tap", "off", PEER)}
            void = False
            for _ in range(runs):
                for each, runs_of in got.items():
                    said: dict[str, Any] = {}
                    runs_of.append(bench.run(each, load, seconds, tuning, said))
                    void |= each != PEER and not sound(said)
            yield from compare(load, got, void)


def compare(load: Load, got: dict[str, list[dict[str, float]]], void: bool) -> Iterator[Row]:
    def against(peer: str, key: str, unit: str, target: str = "") -> Row:
        ours, theirs = ([run[key] for run in got[server]] for server in ("tap", peer))
        name = f"iscsi: {load.name}" + ("" if key in ("iops", "mb_s") else f" {key}")
        return row(name, unit, peer, ours, theirs, target, void=void)

    if load.depth == 1:
        yield against(PEER, "p50", "us")
        yield against("off", "p50", "us")
    elif load.block > 4096:
        yield against(PEER, "mb_s", "MB/s")
        yield against("off", "mb_s", "MB/s")
    else:
        yield against(PEER, "iops", "IOPS", load.target)
        yield against("off", "iops", "IOPS")
    yield against(PEER, "p99", "us")
    yield against("off", "p99", "us")
    yield against(PEER, "server_us", "us")
    yield against("off", "server_us", "us")
    yield against(PEER, "cpu_us", "us")
