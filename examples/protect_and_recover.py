"""Protect a disk from Python, write to it, and get it back as it was before a mistake.

Two sites in one directory stand for two hosts. A site's processes run under `vrep run`; everything
else is `vrep.Site`, which does what the command line does. `qemu-io` stands for the VM.

    python examples/protect_and_recover.py [DIRECTORY]
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vrep

MIB = 1 << 20


@contextmanager
def running(site: vrep.Site) -> Iterator[None]:
    """The site's processes, as a service manager would run them."""
    command = [sys.executable, "-m", "vrep.app.cli", "run", "--dir", str(site.paths.root)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not (site.running("filter") and site.running("target")):
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait()


def guest(uri: str, *commands: str) -> None:
    """What a VM would do with its disk."""
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["qemu-io", "-f", "raw", *words, uri], capture_output=True, text=True)
    if done.returncode or "failed" in done.stdout:
        raise SystemExit(f"qemu-io: {done.stdout}{done.stderr}")


def wait_durable(site: vrep.Site, group: str) -> None:
    """Until the other site holds everything that was written so far."""
    while True:
        status = site.status(group)["groups"][group]
        if status["state"] == "replicating" and status["targets"][0]["rpo_ms"] == 0:
            return
        time.sleep(0.05)


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def example(work: Path) -> None:
    """The whole story."""
    disk = work / "web.raw"
    with disk.open("wb") as file:
        file.truncate(64 * MIB)

    east = vrep.Site.init(work / "east", name="east", listen=free_address())
    west = vrep.Site.init(work / "west", name="west")
    with running(east), running(west):
        # Trust each other once. Keep a copy of the key where the source's loss cannot reach it.
        west.join(east.invite())
        west.key_create("acme")
        west.key_export("acme", work / "acme.key")
        west.key_verify("acme", work / "acme.key")

        west.protect("web", {"root": f"file:{disk}"}, to="east", key="acme")
        west.wait_served("web")
        uri = west.disk_uri("web")
        guest(uri, "write -P 1 0 8M", "flush")
        wait_durable(west, "web")

        west.checkpoint("web", "before the mistake")
        guest(uri, "write -P 0xdd 0 4M", "flush")
        wait_durable(west, "web")

        # At the other site. Without the key it knows when, but not what.
        east.key_import(work / "acme.key")
        for mark in east.points("web").marks:
            print(f"{mark.time}  {mark.label}")
        view = east.test_start("web", "before the mistake")
        guest(view.disks[0].uri, "read -P 1 0 8M")
        print(f"served as of {view.time}: {view.disks[0].uri}")
        east.test_stop("web")

        result = east.export("web", work / "recovered", at="before the mistake")
        recovered = Path(result.disks[0].path)
        with recovered.open("rb") as file:
            assert file.read(8 * MIB) == bytes([1]) * (8 * MIB)
        print(f"exported: {recovered}")


def main() -> None:
    if len(sys.argv) > 1:
        example(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory(prefix="vrep-example-") as directory:
        example(Path(directory))


if __name__ == "__main__":
    main()
