"""A pair of sites on one host: real processes, a real network, and a cable that can be cut.

`Pair` owns everything that it makes: directories, processes, shared memory, sockets. The
connection from site `a` (source) to site `b` (target) runs through a `Cable` (cable.py), which
records what it carries and can be spoiled in many ways.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from cable import Cable
from fronts import Client, DiskClient, client_of
from packets import ADDRESSES, PacketLink

from vrep import errors
from vrep._core import layout, record
from vrep.groups import GroupDefinition
from vrep.recovery.access import KeyAccess
from vrep.settings import TargetConfig
from vrep.site import Site
from vrep.target.reader import StoreReader

MIB = 1 << 20
GROUP = "web"
KEY = "acme"
WAIT_S = 120.0
GONE_S = TargetConfig().source_gone_s
"""silence after which the target counts the source as gone"""


def wait_until(
    what: str, probe: Callable[[], Any], timeout_s: float = WAIT_S, every_s: float = 0.1
) -> Any:
    """The first true answer of `probe`. Errors of vrep count as "not yet"; the last of them, or
    the last answer, is in the message when time is up."""
    deadline = time.monotonic() + timeout_s
    last: Any = None
    while True:
        try:
            last = probe()
            if last:
                return last
        except errors.VrepError as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:g} s: {what}; last seen: {last!r}")
        time.sleep(every_s)


_kept: deque[socket.socket] = deque()
PORTS_KEPT = 32


def free_port() -> int:
    """A port for a process that is started later, and perhaps again and again. A socket stays bound
    to it, so that the kernel gives it to nobody else meanwhile; it does not listen, and whoever
    asks for the port by its number, with SO_REUSEADDR as all of ours do, may."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _kept.append(holder)
    if len(_kept) > PORTS_KEPT:  # of tests that are over
        _kept.popleft().close()
    return int(holder.getsockname()[1])


class Pair:
    """Sites `a` and `b`. Nothing runs until `start`."""

    def __init__(
        self,
        *,
        disks: Mapping[str, int] | None = None,
        ring_bytes: int = 64 * MIB,
        compression: int = 1,
        target_settings: str = "",
        source_settings: str = "",
        on_fence: str = "go-on",
        dead_after_s: float = 5.0,
        seed: int = 0,
        packets: PacketLink | None = None,
        front: str = "nbd",
    ) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="vrep-e2e-"))
        self.cable = Cable(seed)
        self.cable.target = ("127.0.0.1", free_port())
        listen, advertise = f"127.0.0.1:{self.cable.target[1]}", self.cable.address
        self._enter: dict[str, list[str]] = {}
        self.enter: dict[str, list[str]] = {}
        """what each role is started by, if by anything"""
        self.env: dict[str, dict[str, str]] = {}
        """what each role has in its environment besides"""
        if packets is not None:
            listen = advertise = f"{ADDRESSES[1]}:{self.cable.target[1]}"
            self._enter = dict(zip(("a", "b"), (s.enter for s in packets.sides), strict=True))
        self.a = Site.init(self.root / "a", name="alpha")
        self.b = Site.init(self.root / "b", name="beta")
        self.dead_after_s = dead_after_s
        quick = f"connect_s = 5.0\nping_after_s = 1.0\ndead_after_s = {dead_after_s}\n"
        self.a.paths.config.write_text(f"[network]\n{quick}[source]\n{source_settings}\n")
        self.b.paths.config.write_text(
            f'[network]\n{quick}listen = "{listen}"\nadvertise = "{advertise}"\n'
            f"[target]\n{target_settings}\n"
        )
        self.front = front
        self.options = self.a.group_options(
            ring_bytes=ring_bytes,
            compression=compression,
            on_fence=on_fence,
            iscsi_listen=f"127.0.0.1:{free_port()}" if front == "iscsi" else "",
        )
        self.sizes = dict(disks or {"root": 16 * MIB})
        self.images = {name: self.root / f"{name}.raw" for name in self.sizes}
        for name, size in self.sizes.items():
            with self.images[name].open("wb") as file:
                file.truncate(size)
        self.scheme = "file"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.exported_key = self.root / "acme.key"
        self.definition: GroupDefinition

    # ---- processes -----------------------------------------------------------------

    def _site(self, role: str) -> Site:
        return self.b if role == "target" else self.a

    def start(self, *roles: str) -> None:
        for role in roles or ("target", "filter", "source"):
            assert role not in self.processes
            with (self.root / f"{role}.log").open("ab") as log:
                self.processes[role] = subprocess.Popen(
                    [
                        *self._enter.get(self._site(role).paths.root.name, []),
                        *self.enter.get(role, []),
                        *(sys.executable, "-m", "vrep.app.daemon"),
                        *(role, self._site(role).paths.root),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **self.env.get(role, {})},
                )

    def kill(self, *roles: str) -> None:
        """kill -9 of all of them at once."""
        gone = [self.processes.pop(role) for role in roles]
        for process in gone:
            process.kill()
        for process in gone:
            process.wait()

    def stop(self, *roles: str) -> None:
        """A clean end."""
        for role in roles:
            process = self.processes.pop(role)
            process.terminate()
            assert process.wait(60) == 0, f"the {role} process ended with {process.returncode}"

    def alive(self) -> None:
        """Nothing that was started ended by itself."""
        for role, process in self.processes.items():
            assert process.poll() is None, f"the {role} process ended: {process.returncode}"

    # ---- protection ----------------------------------------------------------------

    def join(self) -> None:
        """Needs the target."""
        self.listening()
        if not self._enter:
            self.a.join(self.b.invite())
            return
        script = "import sys, vrep; vrep.Site(sys.argv[1]).join(sys.argv[2])"
        words = [sys.executable, "-c", script, self.a.paths.root, self.b.invite()]
        subprocess.run([*self._enter["a"], *words], check=True)

    def make_key(self) -> None:
        self.a.key_create(KEY)
        self.a.key_export(KEY, self.exported_key)
        self.a.key_verify(KEY, self.exported_key)

    def protect(self) -> None:
        self.definition = self.a.protect(
            GROUP,
            {name: f"{self.scheme}:{path}" for name, path in self.images.items()},
            to="beta",
            key=KEY,
            options=self.options,
            fronts=dict.fromkeys(self.images, self.front),
        )

    def up_beside(self) -> Pair:
        """All processes run, and a VM has the disks of the group open."""
        self.start("target")
        self.join()
        self.make_key()
        self.protect()
        self.start("filter", "source")
        wait_until("the filter runs", lambda: self._runs("filter"))
        self.b.key_import(self.exported_key)
        return self

    def up(self, *, settle: bool = True, key_at_b: bool = True) -> Pair:
        """Everything that comes before the first interesting event."""
        self.start("target")
        self.join()
        self.make_key()
        self.protect()
        self.start("filter", "source")
        self.served()
        if key_at_b:
            self.b.key_import(self.exported_key)
        if settle:
            self.settle()
        return self

    def _runs(self, role: str) -> bool:
        self.alive()  # what ended will not answer any more
        return self._site(role).running(role)

    def listening(self) -> None:
        wait_until("the target listens", lambda: self._runs("target"))

    def served(self) -> None:
        wait_until("the filter runs", lambda: self._runs("filter"))
        self.a.wait_served(GROUP, WAIT_S)

    def client(self, disk: str | None = None, timeout_s: float = 60.0) -> DiskClient:
        return client_of(self.a.disk_uri(GROUP, disk), timeout_s)

    # ---- what is seen --------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.a.status(GROUP)["groups"][GROUP]
        return found

    def stored(self) -> dict[str, Any]:
        found: dict[str, Any] = self.b.status(GROUP)["groups"][GROUP]
        return found

    def settled(self) -> dict[str, Any] | None:
        """The status, once everything is durable at the target; None before."""
        status = self.status()
        target = status["targets"][0]
        done = (
            status["state"] == "replicating"
            and target["seq"] == target["durable_seq"]
            and not target["dirty_bytes"]
        )
        self.last_status = status
        return status if done else None

    def settle(self, timeout_s: float = WAIT_S) -> dict[str, Any]:
        try:
            found: dict[str, Any] = wait_until("all is durable", self.settled, timeout_s)
        except AssertionError:
            print("last status:", getattr(self, "last_status", None))
            raise
        return found

    def unused(self) -> None:
        """The filter knows that the last client has gone, which it hears of a moment later."""
        wait_until("nobody uses the disks", lambda: self.status()["clients"] == 0)

    # ---- what is stored ------------------------------------------------------------

    @property
    def group_id(self) -> bytes:
        return bytes.fromhex(self.definition.group_id)

    @property
    def store(self) -> Path:
        return self.b.paths.store / self.group_id.hex()

    @contextlib.contextmanager
    def view(self, at: str = "latest") -> Iterator[dict[str, str]]:
        """A test at a point: the NBD URI of each disk."""
        view = self.b.test_start(GROUP, at)
        try:
            yield {disk.name: disk.uri for disk in view.disks}
        finally:
            self.b.test_stop(view.id)

    def read_view(self, at: str = "latest") -> dict[str, bytes]:
        found = {}
        with self.view(at) as uris:
            for name, uri in uris.items():
                with Client(uri, 120.0) as client:
                    found[name] = client.read_all()
        return found

    def same_as_source(self) -> None:
        """What can be recovered at `latest` is what the source's disks hold."""
        for name, content in self.read_view().items():
            compare(name, content, self.images[name].read_bytes())

    # ---- the end -------------------------------------------------------------------

    def _left(self) -> list[int]:
        """Processes of the sites, views too: their command lines name the directories."""
        roots = {os.fsencode(site.paths.root) for site in (self.a, self.b)}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if roots & set((entry / "cmdline").read_bytes().split(b"\0")):
                        found.append(int(entry.name))
        return found

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.cable.close()
        for log in sorted(self.root.glob("*.log")) + sorted(self.b.paths.log.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            print(f"---- {log.name}: last {min(len(lines), 60)} of {len(lines)} lines")
            print("\n".join(lines[-60:]))
        for site in (self.a, self.b):
            shutil.rmtree(site.paths.shm(), ignore_errors=True)
            run = site.paths.root / "run"
            if run.is_symlink():
                shutil.rmtree(run.resolve(), ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)


def compare(name: str, found: bytes, wanted: bytes) -> None:
    """Equal, or the first bytes that differ, by name."""
    assert len(found) == len(wanted), name
    if found != wanted:
        wrong = np.flatnonzero(np.frombuffer(found, np.uint8) != np.frombuffer(wanted, np.uint8))
        at = int(wrong[0])
        raise AssertionError(
            f"disk {name!r}: {len(wrong)} bytes differ, from {at} to {int(wrong[-1])}; there is "
            f"{found[at : at + 16].hex()}, there should be {wanted[at : at + 16].hex()}"
        )


def digest_of(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


class Entry:
    """One record of the journal, opened. `forget` lets go of its data, and `digest` stays."""

    __slots__ = ("data", "digest", "disk", "epoch", "kind", "label", "length", "offset", "seq")

    def __init__(self, header: Any, data: bytes, label: str) -> None:
        self.epoch, self.seq = int(header["epoch"]), int(header["seq"])
        self.kind, self.disk = int(header["kind"]), int(header["disk"])
        self.offset, self.length = int(header["offset"]), int(header["length"])
        self.data: bytes | None = data
        self.digest, self.label = digest_of(data), label

    def forget(self) -> Entry:
        self.data = None
        return self


def journal(pair: Pair) -> list[Entry]:
    """Every record of the target's history that takes a position, in order, without its data."""
    return [entry.forget() for entry in journal_data(pair)]


def journal_data(pair: Pair) -> Iterator[Entry]:
    """The same with their data, one at a time, read and opened without any of the code that
    builds views. No more than a segment is held."""
    with StoreReader(pair.b.paths.store, pair.group_id) as reader:
        access = KeyAccess.open(pair.b.paths, pair.group_id, reader.wrapped_keys)
        numbers = reader.numbers()
    stream: Any = None
    for number in numbers:
        with StoreReader(pair.b.paths.store, pair.group_id) as reader:
            for span in reader.spans(number):
                data = reader.segment(number)
                for each in span.found:
                    header = each["header"]
                    at = span.start + int(each["position"])
                    whole = data[at : at + layout.RECORD.itemsize + int(header["body_bytes"])]
                    kind = int(header["kind"])
                    if kind == layout.KIND_STREAM:
                        stream = record.parse_stream(whole)
                    elif kind != layout.KIND_TALLY:
                        yield _entry(access, stream, header, kind, whole)


def _entry(access: KeyAccess, stream: Any, header: Any, kind: int, whole: memoryview) -> Entry:
    if kind == layout.KIND_MARK:
        return Entry(header, b"", access.opener(stream).mark(whole)[1])
    if kind in (layout.KIND_WRITE, layout.KIND_SYNC):
        room = bytearray(int(header["length"]))
        access.opener(stream).record(whole, room)
        return Entry(header, bytes(room), "")
    return Entry(header, b"", "")


def bytes_sent(pair: Pair) -> int:
    return int(pair.status()["targets"][0]["bytes_sent"])


def counted(pair: Pair) -> int:
    """How much was sent, when all is durable and the session stands. Bytes are counted once they
    have left, which may be after the target's answer, and shown within a second."""
    seen = -1

    def still() -> bool:
        nonlocal seen
        before, seen = seen, bytes_sent(pair)
        return seen == before

    wait_until("all that was sent is counted", still, every_s=1.5)
    return seen
