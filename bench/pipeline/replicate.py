"""The whole pipeline: a guest's writes, replicated, sealed, over TLS, durable at the target.

Filter, source and target process on this host's processors, beside the client that loads
them. A run is void if a gap happened or the lag still grew at its end; each run of ours ends
only when the change map is empty, and its CPU time counts until then.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import nbd
from bench.pipeline import delta, image, limits
from bench.pipeline.lab import GROUP, ROOT, Lab, lab, wait_for
from bench.pipeline.tap import running
from bench.rows import Row, plain, row

BUILD = ROOT / "build"
MIB = 1 << 20
RING_BYTES = 256 * MIB
"""of a new group, unless its owner says otherwise"""
SMALL, LARGE = "single pages", "large folios"
"""how the image lies in the page cache: see bench/pipeline/image.py"""


@dataclass
class Plan:
    """How long things take: the whole of it, or a look."""

    runs: int = 5
    burst_s: float = 8.0
    peer_s: float = 4.0
    long_s: float = 60.0
    rpo_s: float = 20.0
    disk_bytes: int = 512 * MIB
    backlog_bytes: int = 768 * MIB
    sync_bytes: int = 10240 * MIB
    delta_bytes: int = 2048 * MIB


QUICK = Plan(2, 4.0, 2.0, 8.0, 6.0, 256 * MIB, 256 * MIB, 512 * MIB, 256 * MIB)


@dataclass
class Burst:
    """One load of the protected disk, until all of it was durable."""

    iops: float
    cpu_us: float  # of all stages, per record
    stages_us: dict[str, float]
    records: int
    stored_bytes: int
    lag_mid: int
    lag_end: int
    drain_s: float
    gaps: int

    @property
    def void(self) -> bool:
        growing = self.lag_end > self.lag_mid + RING_BYTES // 10
        return self.gaps > 0 or growing


def lag_bytes(status: dict[str, Any]) -> int:
    return int(status["ring_bytes"]) - int(status["ring_free_bytes"])


def load(site: Lab, size: int, seconds: float, **changes: Any) -> dict[str, Any]:
    options = {"rw": "randwrite", "bs": "4k", "depth": 32} | changes
    return nbd.fio(site.nbd, size=size, seconds=seconds, **options)


def burst(site: Lab, size: int, seconds: float, rate_iops: int = 0) -> Burst:
    before, stored, cpu = site.status(), site.stored(), site.cpu()
    done: dict[str, Any] = {}
    client = threading.Thread(
        target=lambda: done.update(load(site, size, seconds, rate_iops=rate_iops))
    )
    begin = time.monotonic()
    client.start()
    time.sleep(seconds / 2)
    middle = lag_bytes(site.status())
    lag, end = middle, site.status()
    while client.is_alive() and time.monotonic() - begin < seconds + 60:
        time.sleep(0.1)
        end = site.status()
        if client.is_alive():
            lag = lag_bytes(end)
    client.join()
    drain_s = site.settle()
    after, used = site.status(), site.cpu()
    records = after["head"] - before["head"]
    stages = {role: (used[role] - cpu[role]) / records * 1e6 for role in used}
    return Burst(
        iops=done["iops"],
        cpu_us=sum(stages.values()),
        stages_us={f"{role}_us": round(each, 1) for role, each in stages.items()},
        records=records,
        stored_bytes=site.stored()["bytes"] - stored["bytes"],
        lag_mid=middle,
        lag_end=lag,
        drain_s=drain_s,
        gaps=after["gaps"] - before["gaps"],
    )


def peer_load(directory: Path, size: int, seconds: float, tuning: int) -> float:
    """nbdkit over an image of the same making, without replication."""
    socket, disk = directory / "s", directory / "peer.img"
    with running(nbd.nbdkit(socket, disk, tuning), socket):
        return float(
            nbd.fio(socket, rw="randwrite", bs="4k", depth=32, size=size, seconds=seconds)["iops"]
        )


def least_pipeline(directory: Path, size: int) -> Callable[[float], float]:
    """The least pipeline in C, to be loaded for some seconds at a time: writes a second."""
    server = limits.program("least_pipeline", directory, "-lssl", "-lcrypto", "-lpthread")
    socket, pem, journal = directory / "l", directory / "least.pem", directory / "least.journal"
    limits.certificate(pem)

    def load_it(seconds: float) -> float:
        command = [server, socket, size, directory / "peer.img", journal, pem]
        with running([str(part) for part in command], socket):
            found = nbd.fio(socket, rw="randwrite", bs="4k", depth=32, size=size, seconds=seconds)
        journal.unlink()
        return float(found["iops"])

    return load_it


def best_tuning(directory: Path, size: int) -> int:
    trial = [peer_load(directory, size, 1.0, tuning) for tuning in range(3)]
    return trial.index(max(trial))


def sustained(site: Lab, size: int, seconds: float) -> int:
    """The rate that replication keeps up with: what it ships when it is given a little too
    much, then less until nothing is lost and the lag does not grow."""
    seen = burst(site, size, seconds)
    if not seen.void:
        return 0  # the client is the slower one: no limit needed
    rate = int(seen.iops)
    for _ in range(6):
        rate = rate * 4 // 5
        if not burst(site, size, seconds, rate).void:
            return rate
    raise RuntimeError(f"nothing sustained down to {rate} IOPS")


def memory_rows(memory: list[dict[str, dict[str, int]]]) -> list[Row]:
    found, half = [], len(memory) // 2
    for role in memory[0]:
        early = max(each[role]["RssAnon"] for each in memory[:half])
        late = max(each[role]["RssAnon"] for each in memory[half:])
        found.append(
            plain(
                f"memory: {role}, late / early of the long run",
                "",
                [late / early],
                "<= 1.1",
                mib=round(late / MIB, 1),
            )
        )
    return found


def limit_rows(directory: Path, size: int, name: str, bursts: list[Burst], void: bool) -> list[Row]:
    """Ours beside what the least work of each stage leaves of this machine."""
    server = limits.program("null_nbd", directory)
    socket = directory / "least"
    with running([str(server), str(socket), str(size)], socket):
        client = nbd.fio(socket, rw="randwrite", bs="4k", depth=32, size=size, seconds=2.0)
    steps, disk = limits.steps_us(directory), limits.disk(directory)
    stored = sum(each.stored_bytes for each in bursts) // sum(each.records for each in bursts)
    most = limits.writes_per_s(client["cpu_us"], steps, disk, stored)
    return [
        row(
            name,
            "IOPS",
            "limit",
            [each.iops for each in bursts],
            [most] * len(bursts),
            void=void,
            client_us=round(client["cpu_us"], 1),
            steps_us=steps["sum"],
            disk_mb_s=round(disk),
        )
    ]


def write_rows(site: Lab, directory: Path, plan: Plan, pages: str) -> tuple[list[Row], float]:
    """Random 4 KiB writes beside nbdkit: as fast as the client goes (void when that is more
    than the target's disk and two processors replicate), and at the rate that holds."""
    size, name = plan.disk_bytes, f"pipeline, {pages}: 4 KiB random write qd32"
    tuning = best_tuning(directory, size)
    rate = sustained(site, size, plan.burst_s)
    bursts, peers, leasts = [], [], []
    load_least = least_pipeline(directory, size)
    for _ in range(plan.runs):
        bursts.append(burst(site, size, plan.burst_s, rate))
        peers.append(peer_load(directory, size, plan.peer_s, tuning))
        leasts.append(load_least(plan.burst_s))
    memory = [site.memory()]
    over = threading.Event()

    def sample() -> None:
        while not over.wait(plan.long_s / 40):
            memory.append(site.memory())

    sampler = threading.Thread(target=sample)
    sampler.start()
    long = burst(site, size, plan.long_s, rate)
    over.set()
    sampler.join()
    void = any(each.void for each in bursts)
    held = statistics.median(each.iops for each in bursts)
    found = [
        row(
            name,
            "IOPS",
            "nbdkit",
            [each.iops for each in bursts],
            peers,
            ">= 1.0",
            void=void,
            gaps=sum(each.gaps for each in bursts),
            client="limited" if rate else "unlimited",
        ),
        row(
            f"{name}, {plan.long_s:.0f} s",
            "IOPS",
            "nbdkit",
            [long.iops],
            [statistics.median(peers)],
            ">= 1.0",
            void=long.void,
            gaps=long.gaps,
            rings=round(long.records * 4096 / RING_BYTES, 1),
            lag_mid_mib=long.lag_mid >> 20,
            lag_end_mib=long.lag_end >> 20,
            drain_s=round(long.drain_s, 2),
        ),
        row(
            name,
            "IOPS",
            "least pipeline",
            [each.iops for each in bursts],
            leasts,
            void=void,
        ),
        plain(
            f"pipeline, {pages}: CPU of all stages per 4 KiB write",
            "us",
            [each.cpu_us for each in bursts],
            "<= 20.0",
            void=void,
            **bursts[-1].stages_us,
        ),
    ]
    if pages == SMALL:
        found += limit_rows(directory, size, name, bursts, void)
        found.append(
            plain(
                "pipeline: journal bytes / guest bytes, 4 KiB",
                "",
                [each.stored_bytes / (each.records * 4096) for each in [*bursts, long]],
                "<= 1.06",
                void=void or long.void,
            )
        )
        found += memory_rows(memory)
    return found, held


def rpo_rows(site: Lab, plan: Plan, rate: float) -> list[Row]:
    """The age of the oldest write that is not durable, as the filter's control socket says
    it to a client outside of the three processes, a hundred times a second."""
    ages: list[float] = []
    before = site.status()
    client = threading.Thread(
        target=lambda: load(site, plan.disk_bytes, plan.rpo_s, rate_iops=int(rate / 2))
    )
    client.start()
    time.sleep(0.5)
    while client.is_alive():
        oldest = int(site.status()["oldest_ns"])
        ages.append(max(0.0, (time.time_ns() - oldest) / 1e6) if oldest else 0.0)
        time.sleep(0.01)
    client.join()
    site.settle()
    ages = sorted(ages[:-20] or ages)
    void = site.status()["gaps"] != before["gaps"]
    p50, p99 = ages[len(ages) // 2], ages[int(len(ages) * 0.99)]
    notes = {"samples": len(ages), "iops": int(rate / 2)}
    return [
        plain("RPO at half of the rate, p50", "ms", [p50], "<= 50.0", void=void, **notes),
        plain("RPO at half of the rate, p99", "ms", [p99], "<= 250.0", void=void, **notes),
    ]


def steady_rows(directory: Path, plan: Plan) -> list[Row]:
    """A backlog of 64 KiB writes, shipped and made durable as fast as it goes."""
    disk = directory / "steady.img"
    image.make(disk, plan.disk_bytes)
    speeds, bounds, void = [], [], False
    with lab(directory / "steady", disk, ring_bytes=2 * plan.backlog_bytes) as site:
        site.settle()
        for _ in range(plan.runs):
            before = site.status()
            with site.stopped("source"):
                command = nbd.fio_command(
                    site.nbd, rw="randwrite", bs="64k", depth=8, size=plan.disk_bytes
                )
                command += [f"--io_size={plan.backlog_bytes}", "--norandommap"]
                subprocess.run(command, check=True, capture_output=True)
                begin = time.monotonic()
            wait_for(lambda: (s := site.status())["durable"] == s["head"], "all is durable")
            speeds.append(plan.backlog_bytes / (time.monotonic() - begin) / 1e6)
            void |= site.status()["gaps"] != before["gaps"]
            bounds.append(limits.measure(directory))
    names = list(bounds[0])
    middle = {name: statistics.median(each[name] for each in bounds) for name in names}
    slowest = min(middle, key=lambda name: middle[name])
    notes = {name: round(value) for name, value in middle.items()}
    return [
        row(
            "steady shipping, 64 KiB writes",
            "MB/s",
            slowest,
            speeds,
            [each[slowest] for each in bounds],
            ">= 0.5",
            void=void,
            **notes,
        )
    ]


def first_sync_rows(directory: Path, plan: Plan) -> list[Row]:
    """From `protect` to everything durable, beside nbdcopy between two nbdkit."""
    disk, copy = directory / "first.img", directory / "copy.img"
    data = image.make(disk, plan.sync_bytes, full=0.2)
    ours, theirs, sent = [], [], []
    for _ in range(plan.runs):
        with lab(directory / "first", disk) as site:
            wait_for(site.settled, "the first sync", 300)
            ours.append(time.monotonic() - site.protect_begin)
            sent.append(site.source.call("status")[GROUP]["bytes_sent"] / data)
        with copy.open("wb") as file:
            file.truncate(plan.sync_bytes)
        here, there = directory / "s", directory / "t"
        with (
            running(nbd.nbdkit(here, disk, 0), here),
            running(nbd.nbdkit(there, copy, 0), there),
        ):
            begin = time.monotonic()
            uris = [f"nbd+unix:///?socket={each}" for each in (here, there)]
            subprocess.run(["nbdcopy", "--flush", "--destination-is-zero", *uris], check=True)
            theirs.append(time.monotonic() - begin)
    steps = limits.steps_us(directory)
    least = data / 4096 * steps["sync"] / 1e6 / len(os.sched_getaffinity(0))
    return [
        row("first sync of a 20 % full disk", "s", "nbdcopy", ours, theirs, "<= 1.0"),
        row(
            "first sync of a 20 % full disk",
            "s",
            "limit",
            ours,
            [least] * len(ours),
            limit_x_nbdcopy=round(least / statistics.median(theirs), 2),
            steps_us=steps["sync"],
        ),
        plain("first sync: bytes sent / bytes of data", "", sent, "<= 1.05"),
    ]


def rows(plan: Plan, only: str = "") -> list[Row]:
    found: list[Row] = []
    directory = BUILD / f"bench-{os.getpid()}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)

    def show(some: list[Row]) -> None:
        found.extend(some)
        for each in some:
            print(each, flush=True)

    try:
        for pages in (SMALL, LARGE):
            if only not in ("", "write", pages.split()[0]):
                continue
            disk, step = directory / "disk.img", 4096 if pages == SMALL else MIB
            image.make(directory / "peer.img", plan.disk_bytes, step=step)
            image.make(disk, plan.disk_bytes, step=step)
            with lab(directory / "write", disk, ring_bytes=RING_BYTES) as site:
                site.settle()
                some, rate = write_rows(site, directory, plan, pages)
                show(some)
                if pages == SMALL:
                    show(rpo_rows(site, plan, rate))
        if only in ("", "steady"):
            show(steady_rows(directory, plan))
        if only in ("", "first"):
            show(first_sync_rows(directory, plan))
        if only in ("", "delta"):
            show(delta.rows(directory, plan.runs, plan.delta_bytes))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return found
