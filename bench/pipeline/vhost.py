"""vhost-user-blk: a guest's requests, with every record read and checksummed by a second process.

Beside qemu-storage-daemon on the same image with the same client, and beside our own NBD
front-end, whose client is fio.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers import nbd, vhost
from bench.pipeline.image import make
from bench.pipeline.tap import ROOT, SIZE, follower, running, sound
from bench.rows import Row, row

PEER = "qemu-storage-daemon"


class Load(NamedTuple):
    name: str
    rw: str
    block: int
    depth: int


LOADS = [
    Load("4 KiB random write qd32", "write", 4096, 32),
    Load("4 KiB random write qd1", "write", 4096, 1),
    Load("4 KiB random read qd32", "read", 4096, 32),
    Load("256 KiB random write qd4", "write", 256 << 10, 4),
    Load("256 KiB random read qd4", "read", 256 << 10, 4),
]


class Bench:
    """The client, the image and the socket of all runs."""

    def __init__(self, directory: Path) -> None:
        self.image, self.socket = directory / "disk.img", directory / "s"
        make(self.image, SIZE)
        self._program = vhost.load_program(directory)
        host = [sys.executable, "-m", "bench.pipeline.host", str(self.socket), str(self.image)]
        follow = ["--follow", str(follower(directory))]
        self.ours = {
            "tap": [*host, "--vhost", *follow],
            "off": [*host, "--vhost"],
            "our NBD": [*host, *follow],
        }

    def run(
        self, command: list[str], load: Load, seconds: float, said: dict[str, Any] | None = None
    ) -> dict[str, float]:
        with running(command, self.socket, said) as pid:
            if command == self.ours["our NBD"]:
                return nbd.fio(
                    self.socket, rw=f"rand{load.rw}", bs=str(load.block), depth=load.depth,
                    size=SIZE, seconds=seconds,
                )  # fmt: skip
            return vhost.load(
                self._program, self.socket, pid, rw=load.rw, block=load.block, depth=load.depth,
                size=SIZE, seconds=seconds,
            )  # fmt: skip


def rows(runs: int = 5, seconds: float = 2.0) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix="bench-") as name:
        bench = Bench(Path(name))
        for load in LOADS:
            trials = [vhost.qemu_storage_daemon(bench.socket, bench.image, t) for t in range(3)]
            speeds = [bench.run(trial, load, min(1.0, seconds))["iops"] for trial in trials]
            servers = {**bench.ours, PEER: trials[speeds.index(max(speeds))]}
            if load.block > 4096:
                del servers["our NBD"]
            got: dict[str, list[dict[str, float]]] = {each: [] for each in servers}
            void = False
            for _ in range(runs):
                for each, command in servers.items():
                    said: dict[str, Any] | None = None if each == PEER else {}
                    got[each].append(bench.run(command, load, seconds, said))
                    void |= said is not None and not sound(said)
            yield from compare(load, got, void)


def compare(load: Load, got: dict[str, list[dict[str, float]]], void: bool) -> Iterator[Row]:
    def of(server: str, key: str) -> list[float]:
        return [run[key] for run in got[server]]

    key, unit, better = "iops", "IOPS", ">= 1.0"
    targets = {PEER: better, "off": ">= 0.95", "our NBD": ""}
    if load.depth == 1:
        key, unit = "p50", "us"
        targets = {PEER: "<= 1.0", "off": "", "our NBD": ""}
    elif load.block > 4096:
        key, unit = "mb_s", "MB/s"
        targets = {PEER: "", "off": ""}
    for peer, target in targets.items():
        yield row(
            f"vhost: {load.name}", unit, peer, of("tap", key), of(peer, key), target, void=void
        )
    for more in ("p99", "server_us"):
        for peer in (PEER, "off"):
            name = f"vhost: {load.name} {more}"
            yield row(name, "us", peer, of("tap", more), of(peer, more), "", void=void)
