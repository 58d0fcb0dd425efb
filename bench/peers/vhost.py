"""vhost-user-blk servers over a page-cached file, and the load that a guest would be.

The peer is qemu-storage-daemon, writeback through the page cache, with three tunings; the client
(`vhost_load.c`) is ours, since nobody packages one: it drives both alike.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from bench.peers.iscsi import cpu_s

__all__ = ["load", "load_program", "qemu_storage_daemon"]

ROOT = Path(__file__).resolve().parents[2]
TUNINGS: list[tuple[str, bool]] = [("threads", False), ("io_uring", False), ("threads", True)]
"""aio, and whether the export has an I/O thread of its own"""


def qemu_storage_daemon(socket: Path, image: Path, tuning: int) -> list[str]:
    aio, threaded = TUNINGS[tuning]
    export = (
        f"type=vhost-user-blk,id=export,node-name=file,addr.type=unix,addr.path={socket},"
        "writable=on,num-queues=1"
    )
    thread = ["--object", "iothread,id=thread"] if threaded else []
    return [
        "qemu-storage-daemon",
        *thread,
        *("--blockdev", f"driver=file,node-name=file,filename={image},aio={aio}"),
        *("--export", export + (",iothread=thread" if threaded else "")),
    ]


def load_program(directory: Path) -> Path:
    """The client, compiled from this tree."""
    made = directory / "vhost_load"
    includes = [f"-I{ROOT / 'src' / '_native'}", f"-I{ROOT / 'tests' / 'native'}"]
    sources = [ROOT / "bench/peers/vhost_load.c", ROOT / "src/_native/base/status.c"]
    subprocess.run(["gcc", "-O2", *includes, *sources, "-o", made], check=True)
    return made


def load(
    program: Path, socket: Path, pid: int, *, rw: str, block: int, depth: int, size: int,
    seconds: float,
) -> dict[str, float]:  # fmt: skip
    """One timed load: IOPS, MB/s, percentiles of a request's time, and CPU time for each of the
    client and of the server `pid`, in µs."""
    command = [str(program), str(socket), str(size), rw, str(block), str(depth), str(seconds)]
    before = cpu_s(pid)
    done = subprocess.run(command, capture_output=True, check=True, timeout=seconds + 60)
    got = {name: float(value) for name, value in json.loads(done.stdout).items()}
    got["server_us"] = (cpu_s(pid) - before) * 1e6 / (got["iops"] * seconds)
    got["mb_s"] = got["iops"] * block / 1e6
    return got
