"""NBD servers over a page-cached file, and the client that loads them all alike.

Every server: one Unix socket, writeback through the page cache, flush offered. Three
tunings each; the rows take the fastest of a short trial.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

NBDKIT: list[list[str]] = [
    [],
    ["--threads=1"],
    ["--threads=4"],
]
QEMU_NBD: list[list[str]] = [
    ["--cache=writeback", "--aio=threads"],
    ["--cache=writeback", "--aio=io_uring"],
    ["--cache=writeback", "--aio=threads", "--discard=unmap", "--detect-zeroes=off"],
]


def nbdkit(socket: Path, image: Path, tuning: int) -> list[str]:
    return ["nbdkit", "-f", "-U", str(socket), *NBDKIT[tuning], "file", str(image)]


def qemu_nbd(socket: Path, image: Path, tuning: int) -> list[str]:
    options = ["-f", "raw", "-t", "-e", "8", "-k", str(socket), *QEMU_NBD[tuning]]
    return ["qemu-nbd", *options, str(image)]


def fio_command(socket: Path, *, rw: str, bs: str, depth: int, size: int) -> list[str]:
    """A load of whole requests; how long it lasts is the caller's to say. The data cannot be
    compressed: fio's scrambling would put runs of zeroes into each block."""
    return [
        *("fio", "--name=load", "--ioengine=nbd", f"--uri=nbd+unix:///?socket={socket}"),
        *(f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}", f"--size={size}"),
        *("--randrepeat=0", "--scramble_buffers=0", "--lat_percentiles=1", "--output-format=json"),
    ]


def fio(
    socket: Path,
    *,
    rw: str,
    bs: str,
    depth: int,
    size: int,
    seconds: float,
    rate_iops: int = 0,
) -> dict[str, Any]:
    """One timed load; IOPS, the latency percentiles of whole requests and the client's own CPU
    time for each, in µs."""
    command = fio_command(socket, rw=rw, bs=bs, depth=depth, size=size)
    command += ["--time_based", f"--runtime={seconds}"]
    if rate_iops:
        command.append(f"--rate_iops={rate_iops}")
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = json.loads(out[out.index("{") :])["jobs"][0]
    side = job["write" if "write" in rw else "read"]
    share = side["lat_ns"]["percentile"]
    return {
        "iops": side["iops"],
        "p50": share["50.000000"] / 1000,
        "p99": share["99.000000"] / 1000,
        "cpu_us": (job["usr_cpu"] + job["sys_cpu"]) * 1e4 / side["iops"],
    }
