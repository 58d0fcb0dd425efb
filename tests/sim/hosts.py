"""Hosts: the machine of a site, and what the modules of vrep find there by the names they use.

What a module calls `ControlClient` or `Group` is looked up when it is called, in the process whose
thread calls: several processes of one program run side by side here, and so do those of two sites.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from disks import Descriptors
from kernel import NS, Kernel, Process, patched
from net import Controls, Network, Peers, Wires
from programs import BaseProgram

from vrep import groups, rotate
from vrep._core.seal import Sealer
from vrep.app import filter_cuts, filterd, host_lanes, hosted
from vrep.errors import VrepError
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.keys.datakey import DataKey
from vrep.keys.tenant import TenantKeyring
from vrep.paths import SitePaths
from vrep.recovery import (
    export,
    failover,
    move,
    old_site,
    rebuild,
    repair,
    resend,
    reverse,
    salvage,
    untaken,
    view,
)
from vrep.recovery import fold as recovery_fold
from vrep.recovery import process as view_process
from vrep.settings import Config, FilterConfig, NetworkConfig, SourceConfig, TargetConfig
from vrep.source import attach as source_attach
from vrep.source import daemon as source_daemon
from vrep.source import feed, session, ship, spill, spiller
from vrep.source import hosts as source_hosts
from vrep.target import base, halts, receive, upkeep
from vrep.target import daemon as target_daemon
from vrep.target import epochs as target_epochs
from vrep.target import lease as target_lease
from vrep.target import lost as target_lost
from vrep.target import session as target_session
from vrep.target.aging import Steady
from vrep.target.manifest import EpochEntry
from vrep.target.store import GroupStore
from vrep.wire import messages as m
from vrep.wire import protocol

if TYPE_CHECKING:
    from oracle import Oracle
    from plan import Plan

GROUP: Final = "web"
GROUP_ID: Final = bytes.fromhex("11" * 16)
EPOCH_ID: Final = "33" * 16
WEST: Final = types.SimpleNamespace(site_id="aa" * 16, name="west", address="simulated:1")
NORTH: Final = types.SimpleNamespace(site_id="cc" * 16, name="north", address="simulated:3")
"""near the west: a second host whose disks are of the same group"""
EAST: Final = types.SimpleNamespace(site_id="bb" * 16, name="east", address="simulated:2")
DATA_KEY: Final = DataKey(GROUP_ID, 1, bytes(range(32)))
KEY: Final = "acme"
SPILL_IDLE_S, SPILL_LOOK_S = 0.1, 0.04
"""how often a ring is looked at, and one that fills up: a guest here is as slow as its ring is
small"""
LOST_BLOCK: Final = 4096
"""in which what a repair lost is told: whole bits of the larger maps of larger disks"""
RECORD_ROOM: Final = 512 << 10
"""the largest record here, sealed: a copy of 256 KiB"""


def make_keys(root: Path) -> bytes:
    """A tenant's key in a directory; the group's data key wrapped by it."""
    ring = TenantKeyring(root)
    ring.create(KEY)
    return DATA_KEY.wrap(ring.get(KEY))


class Host:
    """One machine, with the directory of a site."""

    def __init__(
        self,
        kernel: Kernel,
        root: Path,
        network: Network,
        identity: Any,
        peer: Any,
        plan: Plan,
        others: tuple[Any, ...] = (),
    ) -> None:
        """It trusts its `peer`, and `others`."""
        self.kernel = kernel
        self.paths = SitePaths(root)
        self.paths.make_run()  # as `vrep run` does, before anything asks where a socket is
        self.groups = GroupDirectory(root)
        self.keys = TenantKeyring(root)
        self.identity, self.peer = identity, peer
        self.controls = Controls(kernel)
        self.shm = root / "shm"
        self.shm.mkdir()
        self.config = Config(
            filter=FilterConfig(shm_dir=str(self.shm)),
            network=NetworkConfig(listen=identity.address),
            source=SourceConfig(spill_bytes=plan.spill_bytes, spill_reserve_bytes=0),
            target=TargetConfig(
                segment_bytes=plan.segment_bytes,
                window_bytes=plan.window_bytes,
                reserve_bytes=0,
                fold_rate=0,
            ),
        )
        self.full = False
        """its disk takes no new file"""
        self._network = network
        self._peers = Peers([peer, *others])
        self._pids: dict[int, Process] = {}

    def process(self, name: str, oracle: Oracle) -> Process:
        """A process of this host, which says to an oracle what it does."""
        process = self.kernel.process(name)
        wires = Wires(self._network, process, self.identity)
        process.pid = 1000 + len(self._pids)
        self._pids[process.pid] = process
        process.names = {
            "host": self,
            "oracles": {0: oracle},
            "descriptors": Descriptors(process),
            "ControlServer": self.controls.server(process),
            "ControlClient": self.controls.client(process),
            "SiteIdentity": lambda _root: self.identity,
            "PeerRegistry": lambda _root: self._peers,
            "connect": wires.connect,
            "Listener": wires.listener,
            "load_config": lambda _path: self.config,
            "Popen": functools.partial(BaseProgram, self, oracle),
        }
        return process

    def running(self) -> list[Process]:
        """What runs here now."""
        return [process for process in self._pids.values() if not process.dead]

    def kill(self, pid: int, _signal: int) -> None:
        """kill(2): SIGKILL."""
        process = self._pids.get(pid)
        if process is None or process.dead:
            raise ProcessLookupError(pid)
        self.kernel.kill(process)


class ProcessOs:
    """In the place of the module os: what a process learns of itself, and does to others."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def getpid(self) -> int:
        process = _caller(self._kernel)
        return os.getpid() if process is None else process.pid

    def kill(self, pid: int, signal: int) -> None:
        process = _caller(self._kernel)
        assert process is not None
        process.names["host"].kill(pid, signal)

    def setpriority(self, *_args: int) -> None:
        """All threads have the same here."""


NoSignals: Final = types.SimpleNamespace(
    SIGTERM=15, SIGINT=2, SIGHUP=1, SIGKILL=9, SIG_IGN=None, signal=lambda *_args: None
)
"""In the place of the module signal: nobody sends any but SIGKILL here."""


class SpillCalls:
    """In the place of the module os of the spill: that of the calling process."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getattr__(self, name: str) -> Any:
        process = _caller(self._kernel)
        return getattr(os if process is None else process.names["spill_os"], name)


class InlinePool:
    """In the place of ThreadPoolExecutor: what is submitted is done at once."""

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    def __enter__(self) -> InlinePool:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def submit(self, run: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(run(*args))
        except Exception as error:  # noqa: BLE001 - as a pool does
            done.set_exception(error)
        return done


def _caller(kernel: Kernel) -> Process | None:
    return None if kernel.current is None else kernel.current.process


class SimStore(GroupStore):
    """A store that tells the oracle what it takes, and what it writes."""

    oracle: Oracle

    def append(self, buffer: Any, *, check: Any = None) -> int:
        undo = self.oracle.taking(buffer)
        try:
            return super().append(buffer, check=check)
        except BaseException:
            undo()
            raise

    def raise_epoch(self, **options: Any) -> EpochEntry:
        return self._decided(super().raise_epoch(**options))

    def accept_epoch(self, epoch: int) -> EpochEntry:
        return self._decided(super().accept_epoch(epoch))

    def roll_back_epoch(self, epoch: int) -> EpochEntry:
        return self._decided(super().roll_back_epoch(epoch))

    def follow(self, told: Any) -> None:
        super().follow(told)
        self.oracle.epochs_are(self.manifest.epochs)

    def _decided(self, entry: EpochEntry) -> EpochEntry:
        self.oracle.epochs_are(self.manifest.epochs)
        return entry

    def _write(self, batches: Any) -> int:
        self.oracle.writing(batches)
        return super()._write(batches)


class SimSealer(Sealer):
    """Tells the oracle every record that is sealed."""

    oracle: Oracle
    kernel: Kernel

    def __init__(self, key: Any, stream_id: bytes, **_options: Any) -> None:
        process = _caller(self.kernel)
        assert process is not None
        oracles = list(process.names["oracles"].values())
        if len(oracles) > 1:  # each lane has a key of its own
            oracles = [one for one in oracles if one.key.stream_key(bytes(stream_id)) == key]
        self.oracle = oracles[0]
        self.oracle.stream(bytes(stream_id))

    def seal(self, records: Any, payloads: Any, out: Any) -> tuple[int, int]:
        written, done = super().seal(records, payloads, out)
        self.oracle.sealed(self.stream_id, memoryview(out)[:written])
        return written, done

    def seal_ring(self, reader: Any, from_seq: int, to_seq: int, out: Any) -> tuple[int, int]:
        written, done = super().seal_ring(reader, from_seq, to_seq, out)
        self.oracle.sealed(self.stream_id, memoryview(out)[:written])
        return written, done

    def stream(self, stream: Any, out: Any) -> int:
        written = super().stream(stream, out)
        self.oracle.sealed(self.stream_id, memoryview(out)[:written])
        return written

    def tally(self, out: Any, **times: int) -> int:
        written = super().tally(out, **times)
        self.oracle.sealed(self.stream_id, memoryview(out)[:written])
        return written


cut_hold, cut_release = filter_cuts.cut_hold, filter_cuts.cut_release


def hold_now(kernel: Kernel, groups: Any, cut_id: bytes, limit_ms: float = 10.0) -> list[int]:
    """`cut_hold` for another host, which says when they may go on."""
    for group in groups:
        group.site.at_cut()
    kernel.sleep(_late_s(kernel))
    for group in groups:
        group.set_time(kernel.now_ns, kernel.now_ns + kernel.wall_ahead_ns)
    seqs = list(cut_hold(groups, cut_id, limit_ms))
    for group in groups:
        group.site.holds(limit_ms)
    kernel.event("hold for another host")
    kernel.sleep(kernel.rng.random() * 0.001)
    return seqs


def release_now(kernel: Kernel, groups: Any, cut_id: bytes) -> None:
    """`cut_release` for another host, which hears late of it."""
    try:
        cut_release(groups, cut_id)
    finally:
        for group in groups:
            group.site.after_turn()  # what was held is answered
        kernel.sleep(_late_s(kernel))


def _late_s(kernel: Kernel) -> float:
    """How late a thread is now and then; a hold takes 10 ms at the most."""
    return kernel.rng.random() * (0.016 if kernel.rng.random() < 0.3 else 0.003)


def cut_slowly(kernel: Kernel, groups: Any, cut_id: bytes, limit_ms: float = 10.0) -> list[int]:
    """`cut_all`, of which each step takes its time: lanes have threads of their own."""
    seqs: list[int] = []
    failure: Exception | None = None
    try:
        for group in groups:
            group.site.at_cut()
            kernel.sleep(_late_s(kernel))
            group.set_time(kernel.now_ns, kernel.now_ns + kernel.wall_ahead_ns)
            seqs += cut_hold([group], cut_id, limit_ms)
            group.site.holds(limit_ms)
        kernel.sleep(_late_s(kernel))
    except VrepError as error:
        failure = error
        failure.lane = len(seqs)  # type: ignore[attr-defined]
    for number, group in enumerate(groups):
        try:
            cut_release([group], cut_id)
        except VrepError as error:
            if failure is None:
                failure = error
                failure.lane = number  # type: ignore[attr-defined]
        group.site.after_turn()  # what was held is answered
        kernel.sleep(kernel.rng.random() * 0.001)
    if failure is not None:
        raise failure
    return seqs


@contextlib.contextmanager
def small_world(kernel: Kernel) -> Iterator[None]:
    """Buffers that fit a small world, eyes on what leaves each process, and names that mean what
    the calling process has."""

    def names(name: str) -> Any:
        assert kernel.current is not None
        return kernel.current.process.names[name]

    def called(name: str) -> Callable[..., Any]:
        return lambda *args, **options: names(name)(*args, **options)

    SimSealer.kernel = kernel
    send, append = protocol.Connection.send, spill.Spill.append
    fold, merge = upkeep.fold_segments, upkeep.runs.merge_units
    take_lock, take_view = target_lease._take_lock, view.ViewDirectory.take_lock
    write_atomic, asked = groups.write_atomic, halts._Asked
    load = groups.GroupDirectory.load
    definitions: dict[str, tuple[tuple[int, ...], GroupDefinition]] = {}

    def sent(self: protocol.Connection, message: Any, channel: int = 0) -> bytes:
        data = send(self, message, channel)
        process = _caller(kernel)
        if process is not None:
            if isinstance(message, m.OpenGroup):
                lane_of[self] = message.lanes[0].lane
            oracles = process.names["oracles"]
            oracles.get(lane_of.get(self), next(iter(oracles.values()))).said(message)
        return data

    def opened(
        self: receive.GroupHost, transport: Any, channel: int, message: Any
    ) -> target_session.Session:
        lane_of[transport.connection] = message.lanes[0].lane
        return open_session(self, transport, channel, message)

    def counted(what: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            kernel.event(what)
            return run(*args, **options)

        return call

    def steady() -> Steady:
        return Steady(1, kernel.now_ns)

    def burned(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            process = _caller(kernel)
            if process is not None:
                process.burn()
            return run(*args)

        return call

    def spilled(self: spill.Spill, sealed: memoryview) -> None:
        append(self, sealed)
        kernel.event("spill")

    def written(*args: Any, **options: Any) -> None:
        """A process may end before or behind each file that it writes; a full disk takes none."""
        process = _caller(kernel)
        if process is not None:
            process.burn()
            host = process.names.get("host")
            if host is not None and host.full:
                kernel.event("no room at a source")
                raise OSError(errno.ENOSPC, "No space left on device")
        definitions.pop(str(args[0]), None)
        write_atomic(*args, **options)
        if process is not None:
            process.burn()

    def loaded(self: GroupDirectory, name: str) -> GroupDefinition:
        """What is asked for all the time is read when it was written."""
        path = f"{self.root}/{name}/group.json"
        try:
            found = os.stat(path)  # noqa: PTH116 - it is called a thousand times in a world
        except OSError:
            return load(self, name)
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        known = definitions.get(path)
        if known is None or known[0] != stamp:
            known = definitions[path] = (stamp, load(self, name))
        return known[1]

    def locked(path: Path) -> int:
        return int(names("descriptors").add(take_lock(path)))

    def view_locked(self: view.ViewDirectory) -> int:
        return int(names("descriptors").add(take_view(self)))

    lane_of: dict[protocol.Connection, int] = {}
    open_session = receive.GroupHost.open_session
    here = ProcessOs(kernel)
    identity = types.SimpleNamespace(load=called("SiteIdentity"))
    client, server = called("ControlClient"), called("ControlServer")
    settings, peers = called("load_config"), called("PeerRegistry")
    with contextlib.ExitStack() as stack:

        def put(module: Any, **changes: Any) -> None:
            stack.enter_context(patched(module, **changes))

        put(protocol.Connection, send=sent)
        put(hosted, Group=called("Group"), Server=called("Server"))
        put(filterd, ControlServer=server)
        put(source_daemon, ControlServer=server, ControlClient=client, SiteIdentity=identity)
        put(source_daemon, PeerRegistry=peers, Spill=called("Spill"))
        put(source_daemon, GroupSession=called("GroupSession"))
        cutter = functools.partial(source_daemon.Cutter, clock=lambda: kernel.now_ns / NS)
        put(source_daemon, Cutter=cutter)
        put(filter_cuts, cut_all=functools.partial(cut_slowly, kernel))
        put(filter_cuts, cut_hold=functools.partial(hold_now, kernel))
        put(filter_cuts, cut_release=functools.partial(release_now, kernel))
        put(host_lanes, ControlClient=client, SiteIdentity=identity)
        put(source_hosts, connect=called("connect"))
        put(source_attach, RingReader=called("RingReader"))
        put(session, Sealer=SimSealer)
        put(spill, Sealer=SimSealer, os=SpillCalls(kernel))
        put(spill.Spill, append=spilled)
        put(ship, BATCH_BYTES=24 << 10, BUFFER_BYTES=RECORD_ROOM)
        put(spiller, BATCH_BYTES=24 << 10, BUFFER_BYTES=RECORD_ROOM)
        put(spiller, POLL_S=SPILL_IDLE_S, POLL_NEAR_S=SPILL_LOOK_S)
        put(feed, ROOM_BYTES=RECORD_ROOM)
        put(receive, WINDOW_BYTES_MIN=RECORD_ROOM)
        put(receive.GroupHost, open_session=opened)
        put(upkeep, os=here, fold_segments=counted("fold", fold), SPARE_BYTES=0)
        put(upkeep.runs, merge_units=counted("merge", merge))
        put(target_lease, _take_lock=locked)
        put(target_daemon, Listener=called("Listener"), ControlServer=server)
        put(target_daemon, SiteIdentity=identity, PeerRegistry=peers)
        put(target_daemon, InviteBook=lambda _root: None, GroupHost=called("GroupHost"))
        put(halts, _Asked=lambda number: asked(number, come=halts.threading.Event()))
        put(halts.Halts, _numbers=itertools.count(1))
        put(base, subprocess=types.SimpleNamespace(Popen=called("Popen"), PIPE=-1))
        put(target_epochs, ControlClient=client)
        put(target_epochs, GroupStore=types.SimpleNamespace(open=called("open_store")))
        put(groups, write_atomic=written)
        put(groups.GroupDirectory, load=loaded)
        put(view, ControlClient=client, ViewProcess=called("ViewProcess"), os=here)
        put(view, write_atomic=written)
        put(view.ViewDirectory, take_lock=view_locked)
        put(view_process, Group=called("Group"), Server=called("Server"), ControlServer=server)
        put(view_process, load_config=settings, os=here, _report=called("report"), signal=NoSignals)
        opens = types.SimpleNamespace(open=called("open_store"))
        put(recovery_fold, ControlClient=client, load_config=settings, GroupStore=opens)
        put(failover, ControlClient=client, ViewProcess=called("ViewProcess"))
        put(failover, SiteIdentity=identity)
        put(move, ViewProcess=called("ViewProcess"))
        put(reverse, ControlClient=client, SiteIdentity=identity, PeerRegistry=peers)
        put(reverse, connect=called("connect"), load_config=settings)
        put(old_site, ControlClient=client)
        put(untaken, ControlClient=client, load_config=settings)
        put(export, ThreadPoolExecutor=InlinePool)
        for module in (repair, rebuild, resend, salvage):
            put(module, Files=called("Files"))
        put(repair, Lease=functools.partial(target_lease.Lease, steady=steady))
        put(rebuild, host_steady=steady)
        put(resend, _move=burned(resend._move))
        put(target_lost, write_atomic=written, _BIT=LOST_BLOCK)
        put(rotate, ControlClient=client)
        yield
