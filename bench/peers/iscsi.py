"""iSCSI targets over a page-cached file, and the load of an initiator.

The peer is Debian's tgt, writeback through the page cache, with three tunings; the client
(`iscsi_load.c`) is ours, since fio as it is packaged has no iSCSI engine and libiscsi's
`iscsi-perf` reads only: it drives both alike.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["NAME", "TUNINGS", "cpu_s", "free_port", "load", "load_program", "tgt", "wait_for"]

ROOT = Path(__file__).resolve().parents[2]
NAME = "iqn.2026-01.invalid.vrep:bench"
CONTROL = "78"
TUNINGS: list[tuple[list[str], dict[str, int]]] = [
    ([], {}),
    (["--nr_iothreads=1"], {}),
    (
        ["--nr_iothreads=4"],
        {"MaxRecvDataSegmentLength": 262144, "MaxXmitDataSegmentLength": 262144,
         "FirstBurstLength": 262144, "MaxBurstLength": 1048576},
    ),
]  # fmt: skip
"""options of tgtd, and what its target negotiates"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Until somebody accepts there."""
    for _ in range(2000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None:
            raise RuntimeError(f"{server.args!r} ended with {server.returncode}")
        time.sleep(0.01)
    raise TimeoutError(f"nobody listens on port {port}")


def _tgtadm(*arguments: str) -> None:
    command = ["tgtadm", "-C", CONTROL, "--lld", "iscsi", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def tgt(image: Path, port: int, tuning: int) -> Iterator[int]:
    """Debian's tgt with the image as LUN 1; its process."""
    options, keys = TUNINGS[tuning]
    daemon = subprocess.Popen(
        ["tgtd", "-f", "-C", CONTROL, "--iscsi", f"portal=127.0.0.1:{port}", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, daemon)
        target = ["--mode", "target", "--tid", "1"]
        _tgtadm("--op", "new", *target, "-T", NAME)
        for key, value in keys.items():
            _tgtadm("--op", "update", *target, "-n", key, "-v", str(value))
        unit = ["--mode", "logicalunit", "--tid", "1", "--lun", "1"]
        _tgtadm("--op", "new", *unit, "-b", str(image))
        _tgtadm("--op", "bind", *target, "-I", "ALL")
        yield daemon.pid
    finally:
        daemon.send_signal(signal.SIGKILL)  # it does not end by itself while a target is there
        daemon.wait()


def load_program(directory: Path) -> Path:
    """The client, compiled from this tree."""
    made = directory / "iscsi_load"
    native = ROOT / "src" / "_native"
    sources = [native / name for name in ("serve/iscsi_pdu.c", "base/crc32c.c", "base/status.c")]
    includes = [f"-I{native}", f"-I{ROOT / 'tests' / 'native'}"]
    main = ROOT / "bench/peers/iscsi_load.c"
    subprocess.run(["gcc", "-O2", *includes, main, *sources, "-o", made, "-lpthread"], check=True)
    return made


def cpu_s(pid: int) -> float:
    """User and system time of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(
    program: Path, port: int, lun: int, pid: int, *, rw: str, block: int, depth: int, size: int,
    seconds: float,
) -> dict[str, float]:  # fmt: skip
    """One timed load: IOPS, MB/s, percentiles of a request's time, and CPU time for each of the
    client and of the server `pid`, in µs."""
    words = [
        *("127.0.0.1", str(port), NAME, str(lun), str(size), rw, str(block), str(depth)),
        str(seconds),
    ]
    before = cpu_s(pid)
    done = subprocess.run([program, *words], capture_output=True, check=True, timeout=seconds + 60)
    got = {name: float(value) for name, value in json.loads(done.stdout).items()}
    got["server_us"] = (cpu_s(pid) - before) * 1e6 / (got["iops"] * seconds)
    got["mb_s"] = got["iops"] * block / 1e6
    return got
