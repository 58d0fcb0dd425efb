"""Two sites on this host, for measurements: their processes, their CPU seconds and memory.

A source site (filter and source process) and a target site over loopback TLS, in one
directory below build/, with the settings that a user gets, but for what a measurement
names. Nothing is faked: the processes are those that `vrep run` starts.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vrep.control import ControlClient
from vrep.errors import VrepError
from vrep.site import Site

ROOT = Path(__file__).resolve().parents[2]
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
GROUP = "bench"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_s(pid: int) -> float:
    """User and system seconds of a process, all its threads, dead ones too."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def rss_bytes(pid: int) -> dict[str, int]:
    """Resident memory: private (heap, stacks) apart from files and shared memory."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("RssAnon", "RssFile", "RssShmem"):
            found[name] = int(rest.split()[0]) << 10
    return found


def wait_for(test: Callable[[], bool], what: str, limit_s: float = 120.0) -> float:
    """Seconds until it is so."""
    begin = time.monotonic()
    while not test():
        if time.monotonic() - begin > limit_s:
            raise TimeoutError(what)
        time.sleep(0.01)
    return time.monotonic() - begin


class Lab:
    """A protected disk and everything that replicates it."""

    def __init__(self, base: Path, image: Path, **options: Any) -> None:
        self.base, self.image = base, image
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        listen = f"127.0.0.1:{free_port()}"
        self.east = Site.init(base / "east", name="east", listen=listen)
        self.west = Site.init(base / "west", name="west")
        self.options = options

    def spawn(self, role: str, site: Site, prefix: tuple[str, ...] = ()) -> None:
        site.paths.make_run()
        with (self.base / f"{role}.log").open("ab") as log:
            self.processes[role] = subprocess.Popen(
                [*prefix, sys.executable, "-m", "vrep.app.daemon", role, str(site.paths.root)],
                stdin=subprocess.DEVNULL,
                stderr=log,
                stdout=log,
                start_new_session=True,
            )

    def start(self) -> None:
        """All processes, the disk protected; does not wait for the first sync."""
        self.spawn("target", self.east)
        wait_for(lambda: self.east.running("target"), "the target answers")
        self.west.join(self.east.invite())
        self.west.key_create("tenant")
        self.spawn("filter", self.west)
        wait_for(lambda: self.west.running("filter"), "the filter answers")
        self.spawn("source", self.west)
        wait_for(lambda: self.west.running("source"), "the source answers")
        self.protect_begin = time.monotonic()
        self.west.protect(
            GROUP,
            {"disk": f"file:{self.image}"},
            to="east",
            key="tenant",
            accept_key_loss=True,
            options=self.west.group_options(**self.options),
        )
        self.west.wait_served(GROUP)
        self.filter = ControlClient(self.west.paths.socket("filter"))
        self.source = ControlClient(self.west.paths.socket("source"))
        self.target = ControlClient(self.east.paths.socket("target"))

    @property
    def nbd(self) -> Path:
        return self.west.paths.nbd_socket(GROUP)

    @property
    def group_id(self) -> str:
        return str(self.west.groups.load(GROUP).group_id)

    def status(self) -> dict[str, Any]:
        found = self.filter.call("status", group=GROUP)
        assert isinstance(found, dict)
        return found

    def stored(self) -> dict[str, Any]:
        found = self.target.call("status")["groups"]
        return dict(next(iter(found.values())))

    def settled(self) -> bool:
        """Every write durable at the target, no gap, no bit set."""
        try:
            now = self.status()
        except VrepError:
            return False
        return not now["gap"] and now["durable"] == now["head"] and not now["dirty_bytes"]

    def settle(self, limit_s: float = 300.0) -> float:
        return wait_for(self.settled, "everything is durable at the target", limit_s)

    def cpu(self) -> dict[str, float]:
        return {role: cpu_s(process.pid) for role, process in self.processes.items()}

    def memory(self) -> dict[str, dict[str, int]]:
        return {role: rss_bytes(process.pid) for role, process in self.processes.items()}

    @contextmanager
    def stopped(self, role: str) -> Iterator[None]:
        """A process stands still for the time of a block."""
        pid = self.processes[role].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        for role in ("filter", "source", "target"):
            process = self.processes.pop(role, None)
            if process is None:
                continue
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for site in (self.west, self.east):
            shutil.rmtree(site.paths.shm(), ignore_errors=True)


@contextmanager
def lab(base: Path, image: Path, *, start: bool = True, **options: Any) -> Iterator[Lab]:
    """A lab, replicating, for the time of a block; nothing of it is left."""
    base.mkdir(parents=True)
    made = Lab(base, image, **options)
    try:
        if start:
            made.start()
        yield made
    finally:
        made.close()
        shutil.rmtree(base, ignore_errors=True)
