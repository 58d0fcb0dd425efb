"""Sites: the processes of vrep, as they are, on a simulated machine.

`SourceSite` has a filter process (`FilterHost` over a native group that is stepped) and a source
process (`Source`: session, shipper, spiller); `TargetSite` has a target process (`Target`: hosts,
sessions, stores, upkeep). What they ask of the system is answered here: control sockets, the
network, disks, clocks and threads. Everything else is the code that ships.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import shutil
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from disks import Descriptors, SpillDisk, SpillOs, StoreFiles, lose_sectors
from kernel import NS, Kernel, Process, Task, Violation, patched
from net import Controls, Network, Peers, Wires

from vrep._core.filter_driver import GroupDriver
from vrep._core.ring import RingReader
from vrep._core.seal import Sealer
from vrep.app import filterd, hosted
from vrep.errors import VrepError
from vrep.groups import VERSION, DiskDefinition, GroupDefinition, GroupDirectory, GroupOptions
from vrep.keys.datakey import DataKey
from vrep.keys.tenant import TenantKeyring
from vrep.paths import SitePaths
from vrep.settings import Config, FilterConfig, NetworkConfig, SourceConfig, TargetConfig
from vrep.source import attach as source_attach
from vrep.source import daemon as source_daemon
from vrep.source import feed, session, ship, spill, spiller
from vrep.target import daemon as target_daemon
from vrep.target import epochs as target_epochs
from vrep.target import lease as target_lease
from vrep.target import receive, upkeep
from vrep.target import session as target_session
from vrep.target.aging import Steady
from vrep.target.manifest import EpochEntry
from vrep.target.store import GroupStore
from vrep.wire import protocol

if TYPE_CHECKING:
    from oracle import Oracle
    from plan import Plan

GROUP: Final = "web"
GROUP_ID: Final = bytes.fromhex("11" * 16)
EPOCH_ID: Final = "33" * 16
WEST: Final = types.SimpleNamespace(site_id="aa" * 16, name="west")
EAST: Final = types.SimpleNamespace(site_id="bb" * 16, name="east")
DATA_KEY: Final = DataKey(GROUP_ID, 1, bytes(range(32)))
FLUSH, ZERO = 3, 4
DRAIN_S: Final = 30.0
FUA: Final = 1
RECORD_ROOM: Final = 512 << 10
"""the largest record here, sealed: a copy of 256 KiB"""


def make_keys(root: Path) -> bytes:
    """A tenant's key in a directory; the group's data key wrapped by it."""
    ring = TenantKeyring(root)
    ring.create("acme")
    return DATA_KEY.wrap(ring.get("acme"))


class Gate:
    """In the place of the NBD server: the guest talks to the group itself."""

    def __init__(self, site: SourceSite, group: Any) -> None:
        self._site = site
        self.group = group
        self.open = False

    def start(self) -> None:
        self.open = True

    def stop(self, **_options: Any) -> None:
        """When it returns, all that was sent is answered."""
        self.open = False
        oracle = self._site.oracle
        if not self._site.kernel.wait_until(lambda: not oracle.flights, DRAIN_S):
            raise Violation("5: a command of the guest is never answered")

    def clients(self) -> list[Any]:
        return [self] if self.open else []


class SourceSite:
    """The site whose VM writes."""

    def __init__(
        self, kernel: Kernel, root: Path, network: Network, oracle: Oracle, plan: Plan
    ) -> None:
        self.kernel = kernel
        self.paths = SitePaths(root)
        self.network = network
        self.oracle = oracle
        self.plan = plan
        self.controls = Controls(kernel)
        self.groups = GroupDirectory(root)
        self.filter: Process = kernel.outside
        self.source: Process = kernel.outside
        self.group: GroupDriver | None = None
        self.gate: Gate | None = None
        self.spill_disk = SpillDisk(kernel.rng)
        self.bad_disk = 0.0
        """how often a request to the guest's disks fails"""
        self.kicks: list[Task] = []
        self.ring_waiters: list[Task] = []
        self.disks = [root / f"disk{number}" for number in range(len(plan.disk_bytes))]
        self.stable = [bytes(size) for size in plan.disk_bytes]
        """what a power loss leaves for sure"""
        self.host: Any = None
        self.after_turn: Callable[[], None] = lambda: None
        self.check_map: Callable[[], None] = lambda: None
        self._readers: list[RingReader] = []
        self._observer: RingReader | None = None

    def prepare(self, wrapped: bytes) -> None:
        """The disks and the definition of the group."""
        (self.paths.root / "shm").mkdir()
        for path, size in zip(self.disks, self.plan.disk_bytes, strict=True):
            with path.open("wb") as file:
                file.truncate(size)
        self.groups.store(
            GroupDefinition(
                version=VERSION,
                group_id=GROUP_ID.hex(),
                name=GROUP,
                disks=tuple(
                    DiskDefinition(f"d{number}", f"file:{path}", size, number)
                    for number, (path, size) in enumerate(
                        zip(self.disks, self.plan.disk_bytes, strict=True)
                    )
                ),
                to_site=EAST.site_id,
                key="acme",
                tenant_key_id=TenantKeyring(self.paths.root).get("acme").key_id,
                epoch=1,
                epoch_id=EPOCH_ID,
                wrapped_keys=(base64.b64encode(wrapped).decode(),),
                created=0.0,
                options=GroupOptions(
                    ring_bytes=1 << 20,
                    descriptors=self.plan.descriptors,
                    slots=16,
                    threads=1,
                    compression=self.plan.compression,
                    bit_bytes=self.plan.bit_bytes,
                    window_s=self.plan.window_s,
                    quota_bytes=self.plan.quota_bytes,
                ),
            )
        )

    def content(self, disk: int) -> bytes:
        return self.disks[disk].read_bytes()

    # ---- the filter -----------------------------------------------------------------

    def start_filter(self) -> None:
        self.filter = process = self.kernel.process("filter")
        process.at_kill.append(self._filter_killed)
        self.kernel.spawn(process, self._run_filter, "filter")

    def _run_filter(self) -> None:
        process = self.filter
        hosted.Group = self._open_group  # type: ignore
        hosted.Server = self._open_gate  # type: ignore
        filterd.ControlServer = self.controls.server(process)  # type: ignore
        config = Config(filter=FilterConfig(shm_dir=str(self.paths.root / "shm")))
        self.host = filterd.FilterHost(self.paths, config)
        self.host.start()
        self.kernel.spawn(process, self._keep_filter, "filter:run")
        pause_s = 0.0
        while True:
            self.kernel.block(self.kicks, pause_s)
            pause_s = self.turn()

    def _keep_filter(self) -> None:
        while True:
            self.kernel.sleep(filterd.SCAN_EVERY_S)
            self.host._scan()

    def _open_group(self, disks: Any, **options: Any) -> GroupDriver:
        assert self.group is None
        now = (self.kernel.now_ns, self.kernel.now_ns + self.kernel.wall_ahead_ns)
        period_ms = self.kernel.rng.choice((200, 1000, 5000))
        group = SimGroup(disks, **options, stepped=now, checkpoint_ms=period_ms)
        group.site = self
        self.group = group
        self.kernel.event(f"opened {group.status()['opened_as']}")
        if self._observer is not None:
            self._observer.close()
        self._observer = RingReader(self._ring_path())
        sizes = [size for _name, size in group.disks]
        if sizes != self.oracle.sizes:
            # A new size is synced before anything is recorded, and so is all below it.
            self.stable = [path.read_bytes() for path in self.disks]
            self.oracle.resized(sizes)
        self.oracle.filter_opened(self._observer, group.status())
        return group

    def _open_gate(self, group: Any, **options: Any) -> Gate:
        self.gate = Gate(self, group)
        return self.gate

    def _ring_path(self) -> Path:
        return self.paths.shm(str(self.paths.root / "shm")) / GROUP / "ring"

    def kick(self) -> None:
        self.kernel.wake_all(self.kicks)

    def turn(self) -> float:
        """One turn of the filter's loop: some of what it waits for is done, in any order. In how
        many seconds the next one is due, if nobody kicks it before."""
        group, kernel = self.group, self.kernel
        if group is None:
            return 1.0
        kernel.event("turn")
        steps = group.steps()
        for _ in range(min(len(steps), kernel.rng.randrange(4))):
            if self.filter.fuse == 0:
                break
            self.filter.burn()
            index = kernel.rng.randrange(len(steps))
            if steps[index].kind == "disk" and kernel.rng.random() < self.bad_disk:
                self._fail(index, steps[index])
            else:
                self._step(index, steps[index])
            steps = group.steps()
        group.set_time(kernel.now_ns, kernel.now_ns + kernel.wall_ahead_ns)
        group.poll()
        self.look()
        self.after_turn()
        if group.steps():
            return kernel.rng.random() * 0.002
        return kernel.rng.random() * (
            0.2 if self.oracle.flights or kernel.rng.random() < 0.5 else 1
        )

    def look(self) -> None:
        """See what was published."""
        assert self._observer is not None
        if self.oracle.harvest(self._observer):
            self.kernel.wake_all(self.ring_waiters)

    def _step(self, index: int, step: Any) -> None:
        assert self.group is not None
        self.kernel.event(f"filter {step.kind}")
        self.group.step(index)
        if step.kind != "disk":
            return
        if step.op == FLUSH or (step.op == ZERO and step.flags & FUA):
            self.stable[step.disk] = self.disks[step.disk].read_bytes()
        elif step.flags & FUA:
            end = step.offset + step.length
            now = self.disks[step.disk].read_bytes()
            before = self.stable[step.disk]
            self.stable[step.disk] = before[: step.offset] + now[step.offset : end] + before[end:]

    def _fail(self, index: int, step: Any) -> None:
        """A request fails. When it was to sync, anything since the last sync may be lost: the
        system tells that once, and then shows what is stored."""
        assert self.group is not None
        self.kernel.event("failed request")
        self.group.step_failing(index, errno.EIO)
        if step.op == FLUSH or step.flags & FUA:
            self.kernel.event("failed flush")
            path = self.disks[step.disk]
            lose_sectors(path, self.stable[step.disk], self.kernel.rng, 512)
            self.oracle.flush_failed(step.disk, self.content)

    def _filter_killed(self) -> None:
        """What the kernel had of the process's I/O ends, or never began."""
        group, self.gate = self.group, None
        if group is None:
            return
        steps = group.steps()
        while steps:
            index = self.kernel.rng.randrange(len(steps))
            if steps[index].kind != "disk" or self.kernel.rng.random() < 0.5:
                break
            self._step(index, steps[index])
            steps = group.steps()
        self.look()
        self.group = None
        group.kill()
        self.oracle.filter_killed()

    def close_group(self, group: GroupDriver) -> None:
        """It is closed: what waits is done first, by hand, to know what is stable afterwards."""
        for _ in range(1000):
            steps = group.steps()
            if not steps:
                break
            self._step(0, steps[0])
            group.poll()
        self.look()
        self.group = None

    def close_filter(self) -> None:
        """A clean stop."""
        self.host.close()
        self.gate = None
        self.stable = [path.read_bytes() for path in self.disks]

    def lose_power(self) -> bool:
        """Of the whole host. Whether anything was torn or lost."""
        self.kernel.call(self._lose_power)
        return self.torn

    torn = False

    def _lose_power(self) -> None:
        kernel, rng = self.kernel, self.kernel.rng
        kernel._kill(self.source)
        state = self.groups.path(GROUP)
        files = [path for path in sorted(state.iterdir()) if path.is_file()]
        files = [path for path in files if path.suffix not in (".json", ".lock")]
        before = {path: path.read_bytes() for path in files}
        group = self.group
        if group is not None:
            # What is under way reaches the disks in part, in any order.
            for _ in range(rng.randrange(4)):
                steps = group.steps()
                if not steps:
                    break
                index = rng.randrange(len(steps))
                if steps[index].kind == "disk":
                    self._step(index, steps[index])
                else:
                    group.step(index)
        kernel._kill(self.filter)
        self.torn = False
        for path, data in before.items():
            self.torn |= lose_sectors(path, data, rng, 512)
        for path, stable in zip(self.disks, self.stable, strict=True):
            self.torn |= lose_sectors(path, stable, rng, 512)
        self.torn |= self.spill_disk.lose_power()
        shutil.rmtree(self.paths.root / "shm")
        (self.paths.root / "shm").mkdir()
        self.stable = [path.read_bytes() for path in self.disks]

    # ---- the source -------------------------------------------------------------------

    def start_source(self) -> None:
        self.source = process = self.kernel.process("source")
        process.at_kill.append(self._source_killed)
        self.kernel.spawn(process, self._run_source, "source")

    def _run_source(self) -> None:
        process, plan = self.source, self.plan
        wires = Wires(self.network, process, WEST)
        client = self.controls.client(process)
        source_daemon.ControlServer = self.controls.server(process)  # type: ignore[misc]
        source_daemon.ControlClient = client  # type: ignore[misc]
        source_daemon.SiteIdentity = types.SimpleNamespace(load=lambda _root: WEST)  # type: ignore
        source_daemon.PeerRegistry = lambda _root: Peers(EAST)  # type: ignore
        source_daemon.GroupSession = functools.partial(  # type: ignore
            session.GroupSession, connect_peer=wires.connect
        )
        source_daemon.Spill = functools.partial(  # type: ignore
            spill.Spill, segment_bytes=plan.spill_segment_bytes
        )
        source_attach.RingReader = functools.partial(SimReader, self, process)  # type: ignore
        spill.os = SpillOs(process, self.spill_disk)  # type: ignore
        config = SourceConfig(spill_bytes=plan.spill_bytes, spill_reserve_bytes=0)
        host = source_daemon.Source(self.paths, config, timeouts=plan.timeouts)
        host.start()
        host.run()

    def _source_killed(self) -> None:
        for reader in self._readers:
            reader.close()
        self._readers.clear()

    def keep_reader(self, reader: RingReader) -> None:
        self._readers.append(reader)

    def ask(self, process: str, method: str, **params: Any) -> Any:
        """What the command line asks of this site's processes."""
        return self.controls.ask(str(self.paths.socket(process)), method, params, 30.0).result


class SimGroup(GroupDriver):
    """A group whose records are all seen, also those that it gives up."""

    site: SourceSite

    def lose_ring(self) -> None:
        self.site.look()
        super().lose_ring()

    def close(self, clean: bool = True) -> None:
        self.site.close_group(self)
        super().close(clean)


class SimReader(RingReader):
    """A source's mapping of the ring, which waits in simulated time."""

    def __init__(self, site: SourceSite, process: Process, *args: Any) -> None:
        super().__init__(*args)
        self._site = site
        self._process = process
        site.keep_reader(self)

    def wait(self, seq: int, timeout: float = 1.0) -> bool:
        kernel = self._site.kernel
        return kernel.wait_until(
            lambda: self.head > seq, timeout, self._site.ring_waiters, look_s=timeout
        )

    def set(self, **values: int) -> None:
        self._process.burn()
        super().set(**values)
        self._site.kick()


class TargetSite:
    """The site that stores."""

    def __init__(
        self, kernel: Kernel, root: Path, network: Network, oracle: Oracle, plan: Plan
    ) -> None:
        self.kernel = kernel
        self.paths = SitePaths(root)
        self.network = network
        self.oracle = oracle
        self.plan = plan
        self.controls = Controls(kernel)
        self.process: Process = kernel.outside
        self.files: StoreFiles | None = None
        self.store: GroupStore | None = None
        self._room_bytes = 1 << 40

    @property
    def directory(self) -> Path:
        return self.paths.store / GROUP_ID.hex()

    def start(self) -> None:
        self.process = process = self.kernel.process("target")
        self.store = None
        self.kernel.spawn(process, self._run, "target")

    def _run(self) -> None:
        process, plan = self.process, self.plan
        wires = Wires(self.network, process, EAST)
        descriptors = Descriptors(process)
        take_lock = TAKE_LOCK
        target_lease._take_lock = lambda path: descriptors.add(take_lock(path))
        target_daemon.Listener = wires.listener  # type: ignore
        target_daemon.ControlServer = self.controls.server(process)  # type: ignore
        target_daemon.SiteIdentity = types.SimpleNamespace(load=lambda _root: EAST)  # type: ignore
        target_daemon.PeerRegistry = lambda _root: Peers(WEST)  # type: ignore
        target_daemon.InviteBook = lambda _root: None  # type: ignore
        target_daemon.GroupHost = functools.partial(  # type: ignore
            receive.GroupHost, open_store=functools.partial(self._open_store, process)
        )
        config = Config(
            network=NetworkConfig(listen="simulated:1"),
            target=TargetConfig(
                segment_bytes=plan.segment_bytes,
                window_bytes=plan.window_bytes,
                reserve_bytes=0,
                fold_rate=0,
            ),
        )
        host = target_daemon.Target(self.paths, config, timeouts=plan.timeouts)
        host.start()
        host.run()

    def _open_store(self, process: Process, *args: Any, **options: Any) -> GroupStore:
        files = StoreFiles(process, self.directory)
        files.room = self._room_bytes
        steady = lambda: Steady(1, self.kernel.now_ns)  # noqa: E731
        clocks = {"wall_ns": self._wall_ns, "steady": steady}
        store = SimStore.open(*args, files=files, **clocks, **options)
        assert isinstance(store, SimStore)
        store.oracle = self.oracle
        self.files, self.store = files, store
        self.oracle.store_opened(store)
        return store

    def _wall_ns(self) -> int:
        return self.kernel.now_ns + self.kernel.wall_ahead_ns

    def lose_power(self) -> bool:
        """Whether anything was torn or lost."""
        files, self.files = self.files, None
        self.kernel.kill(self.process)
        return files is not None and files.lose_power(self.directory)

    def ask(self, method: str, **params: Any) -> Any:
        """What the command line asks of the target's process."""
        path = str(self.paths.socket("target"))
        return self.controls.ask(path, method, params, 60.0).result


TAKE_LOCK: Final = target_lease._take_lock


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

    def _decided(self, entry: EpochEntry) -> EpochEntry:
        self.oracle.epochs_are(self.manifest.epochs)
        return entry

    def _write(self, batches: Any) -> int:
        self.oracle.writing(batches)
        return super()._write(batches)


class SimSealer(Sealer):
    """Tells the oracle every record that is sealed."""

    oracle: Oracle

    def __init__(self, key: Any, stream_id: bytes, **_options: Any) -> None:
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


@contextlib.contextmanager
def small_world(oracle: Oracle) -> Iterator[None]:
    """Buffers that fit a small world, and eyes on what leaves each process."""
    SimSealer.oracle = oracle
    send = protocol.Connection.send

    def watched(self: protocol.Connection, message: Any, channel: int = 0) -> bytes:
        data = send(self, message, channel)
        oracle.said(message)
        return data

    real_fold, real_merge = upkeep.fold_segments, upkeep.runs.merge_units

    def fold(*args: Any, **options: Any) -> Any:
        oracle.kernel.event("fold")
        return real_fold(*args, **options)

    def merge(*args: Any, **options: Any) -> Any:
        oracle.kernel.event("merge")
        return real_merge(*args, **options)

    append = spill.Spill.append

    def spilled(self: spill.Spill, sealed: memoryview) -> None:
        append(self, sealed)
        oracle.kernel.event("spill")

    priority = types.SimpleNamespace(PRIO_PROCESS=0, setpriority=lambda *_args: None)
    keep: list[Any] = []
    for module in (filterd, source_daemon, target_daemon, source_attach, spill, target_lease):
        keep.append((module, dict(vars(module))))
    try:
        with (
            patched(protocol.Connection, send=watched),
            patched(session, Sealer=SimSealer),
            patched(spill, Sealer=SimSealer),
            patched(spill.Spill, append=spilled),
            patched(ship, BATCH_BYTES=24 << 10, BUFFER_BYTES=RECORD_ROOM),
            patched(spiller, BATCH_BYTES=24 << 10, BUFFER_BYTES=RECORD_ROOM),
            patched(feed, ROOM_BYTES=RECORD_ROOM),
            patched(receive, WINDOW_BYTES_MIN=RECORD_ROOM),
            patched(upkeep, os=priority, fold_segments=fold, SPARE_BYTES=0),
            patched(upkeep.runs, merge_units=merge),
        ):
            yield
    finally:
        for module, names in keep:
            for name, value in names.items():
                setattr(module, name, value)


__all__ = [
    "EAST",
    "GROUP",
    "GROUP_ID",
    "NS",
    "WEST",
    "SourceSite",
    "TargetSite",
    "VrepError",
    "make_keys",
    "small_world",
    "target_epochs",
    "target_session",
]
