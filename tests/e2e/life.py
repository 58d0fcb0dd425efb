"""Two sites that take turns: whole sites (`vrep run`), each of which listens, and a VM that is an
NBD client with an oracle, which follows the group from site to site."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sites import GROUP, KEY, MIB, WAIT_S, Client, compare, free_port, wait_until

from vrep import errors
from vrep.recovery.view import ViewInfo
from vrep.site import Site

QUICK = "connect_s = 5.0\nping_after_s = 1.0\ndead_after_s = 5.0\n"


class Place:
    """A site that runs as a whole."""

    def __init__(self, root: Path, name: str) -> None:
        address = f"127.0.0.1:{free_port()}"
        self.name, self.root = name, root / name
        self.site = Site.init(self.root, name=name)
        self.site.paths.config.write_text(f'[network]\n{QUICK}listen = "{address}"\n')
        self._log = root / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Place:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vrep.app.cli", "run", "--dir", str(self.root)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_until(f"{self.name} runs", self._runs)
        return self

    def _runs(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None
        return all(self.site.status()["roles"].values())

    def pids(self) -> list[int]:
        """Every process that names the directory of the site."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if os.fsencode(self.root) in (entry / "cmdline").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """kill -9 of everything, views too."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def group(self) -> dict[str, Any]:
        found: dict[str, Any] = self.site.status(GROUP)["groups"][GROUP]
        return found

    def unused(self) -> None:
        """No lane that is served here has a client: who has just left may be counted still."""

        def nobody() -> bool:
            lanes = self.site.status(GROUP)["groups"].values()
            return not any(one["clients"] for one in lanes if one["role"] == "source")

        wait_until("nobody uses the disks", nobody)

    def close(self) -> None:
        self.kill()
        lines = (
            self._log.read_text(errors="replace").splitlines()[-60:] if self._log.exists() else []
        )
        for log in sorted(self.site.paths.log.glob("*.log")):
            lines += [log.name, *log.read_text(errors="replace").splitlines()[-20:]]
        print(f"---- {self.name}")
        print("\n".join(lines))
        shutil.rmtree(self.site.paths.shm(), ignore_errors=True)
        run = self.root / "run"
        if run.is_symlink():
            shutil.rmtree(run.resolve(), ignore_errors=True)


class Life:
    """A group of `west`, protected to `east`, its VM, and what its disk must hold."""

    def __init__(self, seed: int, *, disk_bytes: int = 8 * MIB) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="vrep-life-"))
        self.rng = random.Random(seed)
        self.west, self.east = Place(self.root, "west"), Place(self.root, "east")
        self.image = self.root / "root.raw"
        self.oracle = bytearray(disk_bytes)
        with self.image.open("wb") as file:
            file.truncate(disk_bytes)
        self.labels: list[tuple[Place, str, bytes]] = []
        """checkpoints: at which site they recover, and to what"""

    def up(self) -> Life:
        self.west.start()
        self.east.start()
        self.west.site.join(self.east.site.invite())
        key = self.root / "acme.key"
        self.west.site.key_create(KEY)
        self.west.site.key_export(KEY, key)
        self.west.site.key_verify(KEY, key)
        self.east.site.key_import(key)
        options = self.west.site.group_options(ring_bytes=8 * MIB)
        self.west.site.protect(
            GROUP, {"root": f"file:{self.image}"}, to="east", key=KEY, options=options
        )
        self.settle(self.west)
        return self

    def settle(self, at: Place) -> None:
        """Until the site's group is durable at the other one, without a gap."""

        def settled() -> bool:
            status = at.group()
            target = status["targets"][0] if status["role"] == "source" else {}
            return bool(
                status["state"] == "replicating"
                and target["seq"] == target["durable_seq"]
                and not target["dirty_bytes"]
            )

        wait_until(f"all of {at.name} is durable", settled, every_s=0.05)

    # ---- the VM --------------------------------------------------------------------

    def client(self, at: Place, view: ViewInfo | None = None) -> Client:
        """At a view, or at the group's own socket."""
        uri = view.disks[0].uri if view is not None else at.site.disk_uri(GROUP)
        deadline = time.monotonic() + WAIT_S
        while True:  # as a VM's reconnect-delay does
            try:
                return Client(uri, 30.0)
            except (OSError, errors.VrepError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def write(self, client: Client, count: int = 12) -> None:
        """Random writes and zeroes, into the disk and the oracle."""
        for _ in range(count):
            length = self.rng.choice([512, 4096, 4096, 65536, 200 * 1024])
            offset = self.rng.randrange(0, len(self.oracle) - length) // 512 * 512
            if self.rng.random() < 0.15:
                client.zeroes(offset, length)
                self.oracle[offset : offset + length] = bytes(length)
            else:
                data = self.rng.randbytes(length)
                client.write(offset, data)
                self.oracle[offset : offset + length] = data
        client.flush()

    def checkpoint(self, writer: Place, keeper: Place) -> None:
        label = f"round-{len(self.labels)}"
        writer.site.checkpoint(GROUP, label, wait_s=WAIT_S)
        self.labels.append((keeper, label, bytes(self.oracle)))

    # ---- what is seen --------------------------------------------------------------

    def check(self, client: Client) -> None:
        compare("root", client.read_all(), bytes(self.oracle))

    def check_view(self, keeper: Place, at: str, wanted: bytes) -> None:
        """What recovers at a point, there, to the bit."""
        view = keeper.site.test_start(GROUP, at)
        try:
            with Client(view.disks[0].uri, 60.0) as client:
                compare(f"root at {at}", client.read_all(), wanted)
        finally:
            keeper.site.test_stop(view.id)

    def check_labels(self) -> None:
        """Every checkpoint that was ever set still recovers, where its history is."""
        for keeper, label, wanted in self.labels:
            self.check_view(keeper, label, wanted)

    def close(self) -> None:
        for place in (self.west, self.east):
            place.close()
        shutil.rmtree(self.root, ignore_errors=True)
