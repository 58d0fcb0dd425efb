"""Two sites on one host: in network namespaces of their own where that is allowed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vrep.errors import VrepError
from vrep.site import Site

# RFC 5737: addresses for documentation; nobody's.
ADDRESSES: Final = {"a": "192.0.2.1", "b": "192.0.2.2"}
PORT: Final = 17321


class DemoError(VrepError):
    """The demonstration cannot go on."""

    exit_code = 71


class Network:
    """A link between two namespaces, or the loopback device where those are not allowed."""

    def __init__(self) -> None:
        self.isolated = False
        self._names = {side: f"vrep-demo-{side}-{os.getpid()}" for side in ADDRESSES}
        if os.geteuid() == 0:
            self.isolated = self._make()

    def _make(self) -> bool:
        a, b = self._names["a"], self._names["b"]
        veth = {side: f"vd{side}{os.getpid()}" for side in ADDRESSES}
        steps = [["netns", "add", a], ["netns", "add", b]]
        steps.append(
            [
                "link",
                "add",
                veth["a"],
                "netns",
                a,
                "type",
                "veth",
                "peer",
                "name",
                veth["b"],
                "netns",
                b,
            ]
        )
        for side, address in ADDRESSES.items():
            inside = ["-n", self._names[side]]
            steps.append([*inside, "addr", "add", f"{address}/24", "dev", veth[side]])
            steps.append([*inside, "link", "set", veth[side], "up"])
            steps.append([*inside, "link", "set", "lo", "up"])
        for step in steps:
            try:
                done = subprocess.run(["ip", *step], capture_output=True, check=False)
            except FileNotFoundError:
                return False
            if done.returncode != 0:
                self.close()
                return False
        return True

    def prefix(self, side: str) -> list[str]:
        """What a command of a side begins with."""
        return ["ip", "netns", "exec", self._names[side]] if self.isolated else []

    def listen(self, side: str) -> str:
        if self.isolated:
            return f"{ADDRESSES[side]}:{PORT}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return f"127.0.0.1:{probe.getsockname()[1]}"

    def close(self) -> None:
        for name in self._names.values():
            with contextlib.suppress(FileNotFoundError):  # no ip, no namespaces
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@dataclass
class DemoSite:
    """A site, its processes, and the command line as an operator would use it."""

    side: str
    site: Site
    network: Network
    process: subprocess.Popen[bytes] | None = None
    log_path: Path = field(default_factory=Path)

    def start(self) -> None:
        """`vrep run` in the background, its log beside the site."""
        self.log_path = self.site.paths.root.parent / f"{self.side}.log"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.network.prefix(self.side), *self.vrep("run")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def vrep(self, *arguments: str) -> list[str]:
        command = [sys.executable, "-m", "vrep.app.cli", *arguments]
        return [*command, "--dir", str(self.site.paths.root)]

    def call(self, *arguments: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """Run a command with --json in this side's network; its answer."""
        done = subprocess.run(
            [*self.network.prefix(self.side), *self.vrep(*arguments, "--json")],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != 0:
            raise DemoError(f"vrep {' '.join(arguments)}: {done.stderr.strip()}")
        answer = json.loads(done.stdout) if done.stdout.strip() else {}
        return answer if isinstance(answer, dict) else {"items": answer}

    def group_status(self, group: str) -> dict[str, Any] | None:
        """The group's status; None while the site starts."""
        try:
            status = self.site.status(group)["groups"][group]
        except (VrepError, KeyError):
            return None
        assert isinstance(status, dict)
        return status

    def pids(self) -> list[int]:
        """Every process of the site: they all name its directory."""
        root = os.fsencode(self.site.paths.root)
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue  # it ended meanwhile
                if root in words:
                    found.append(int(entry.name))
        return found

    def kill9(self) -> int:
        """kill -9 of every process of the site, until none is left; how many there were."""
        killed: set[int] = set()
        deadline = time.monotonic() + 10
        while pids := self.pids():
            for pid in pids:
                killed.add(pid)
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if time.monotonic() > deadline:
                raise DemoError(f"processes {pids} do not die")
            time.sleep(0.01)
        if self.process is not None:
            self.process.wait()
        return len(killed)

    def stop(self) -> None:
        """End whatever of the site still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.kill9()


__all__ = ["DemoError", "DemoSite", "Network"]
