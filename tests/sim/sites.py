"""Sites: the processes of vrep, as they are, on a simulated machine.

`SourceSite` has a filter process (`FilterHost` over a native group that is stepped) and a source
process (`Source`: session, shipper, spiller); `TargetSite` has a target process (`Target`: hosts,
sessions, stores, upkeep). One host may have both. What they ask of the system is answered here and
in `hosts`: control sockets, the network, disks, clocks and threads. Everything else is the code
that ships.
"""

from __future__ import annotations

import base64
import errno
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from disks import SpillDisk, SpillOs, StoreDisk, StoreFiles, lose_sectors, whole
from hosts import EPOCH_ID, GROUP, GROUP_ID, KEY, Host, SimStore
from kernel import NS, Process, Task, Violation

from vrep._core.filter_driver import GroupDriver
from vrep._core.ring import RingReader
from vrep.app import filterd
from vrep.app.host_lanes import HostLanes
from vrep.groups import VERSION, DiskDefinition, GroupDefinition, GroupOptions
from vrep.lanes import lane_id, lane_name
from vrep.recovery.old_site import give_way
from vrep.recovery.view import clients_here, points_in_use
from vrep.source import daemon as source_daemon
from vrep.source import session, spill
from vrep.target import daemon as target_daemon
from vrep.target import receive
from vrep.target.aging import Steady
from vrep.target.store import GroupStore

if TYPE_CHECKING:
    from oracle import Oracle
    from plan import Plan

FLUSH, ZERO = 3, 4
DRAIN_S: Final = 30.0
FUA: Final = 1


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
        return [self] if self.open and self._site.attached else []


def options_of(plan: Plan) -> GroupOptions:
    """How a world's group is protected."""
    return GroupOptions(
        ring_bytes=1 << 20,
        descriptors=plan.descriptors,
        slots=16,
        threads=1,
        compression=plan.compression,
        bit_bytes=plan.bit_bytes,
        window_s=plan.window_s,
        quota_bytes=plan.quota_bytes,
    )


class SourceSite:
    """The site whose VM writes."""

    def __init__(
        self, host: Host, oracle: Oracle, plan: Plan, disks: list[Path], lane: int | None = None
    ) -> None:
        """`lane`: of a group that has several."""
        self.name = GROUP if lane is None else lane_name(GROUP, lane)
        self.lane = lane or 0
        self.host = host
        self.kernel = kernel = host.kernel
        self.paths = host.paths
        self.groups = host.groups
        self.oracle = oracle
        self.plan = plan
        self.filter: Process = kernel.outside
        self.source: Process = kernel.outside
        self.group: GroupDriver | None = None
        self.gate: Gate | None = None
        self.spill_disk = SpillDisk(kernel.rng)
        self.bad_disk = 0.0
        """how often a request to the guest's disks fails"""
        self.kicks: list[Task] = []
        self.ring_waiters: list[Task] = []
        self.disks = disks
        self.stable = [b"" for _path in disks]
        """what a power loss leaves for sure"""
        self.daemon: Any = None
        """the filter process's"""
        self.attached = True
        """a VM uses the disks"""
        self.after_turn: Callable[[], None] = lambda: None
        self.check_map: Callable[[], None] = lambda: None
        self.at_cut: Callable[[], None] = lambda: None
        self.hold_ends_ns = 0
        """when the filter looks whether a hold is over"""
        self.completed: list[tuple[bytes, list[tuple[int, int, int]], int]] = []
        """cuts: id, marks and the seq of the record that completes each"""
        self._readers: list[RingReader] = []
        self._observer: RingReader | None = None

    def prepare(
        self,
        wrapped: bytes,
        lanes: tuple[int, ...] = (),
        hosts: tuple[tuple[int, str], ...] = (),
    ) -> None:
        """The disks and the definition of the group, or of a lane among those of one, which may be
        of several hosts."""
        self.stable = [bytes(size) for size in self.plan.disk_bytes]
        for path, size in zip(self.disks, self.plan.disk_bytes, strict=True):
            with path.open("wb") as file:
                file.truncate(size)
        self.groups.store(
            GroupDefinition(
                version=VERSION,
                group_id=(lane_id(GROUP_ID, self.lane) if lanes else GROUP_ID).hex(),
                name=self.name,
                lanes=lanes,
                hosts=hosts,
                numbered=len(lanes) if hosts else 0,
                disks=tuple(
                    DiskDefinition(f"d{number}", f"file:{path}", size, number)
                    for number, (path, size) in enumerate(
                        zip(self.disks, self.plan.disk_bytes, strict=True)
                    )
                ),
                to_site=self.host.peer.site_id,
                key=KEY,
                tenant_key_id=self.host.keys.get(KEY).key_id,
                epoch=1,
                epoch_id=EPOCH_ID,
                wrapped_keys=(base64.b64encode(wrapped).decode(),),
                created=0.0,
                options=options_of(self.plan),
            )
        )

    def content(self, disk: int) -> bytes:
        return whole(self.disks[disk])

    # ---- the filter -----------------------------------------------------------------

    def start_filter(self) -> None:
        start_filter([self])

    def turns(self) -> None:
        """The filter's loop."""
        pause_s = 0.0
        while True:
            self.kernel.block(self.kicks, pause_s)
            pause_s = self.turn()

    def open_group(self, disks: Any, **options: Any) -> GroupDriver:
        assert self.group is None
        now = (self.kernel.now_ns, self.kernel.now_ns + self.kernel.wall_ahead_ns)
        period_ms = self.kernel.rng.choice((200, 1000, 5000))
        group = SimGroup(disks, **options, stepped=now, checkpoint_ms=period_ms)
        group.site = self
        self.group = group
        self.disks = [Path(disk.uri.partition(":")[2]) for disk in disks]
        if group.status()["opened_as"] == "new":  # of a view, which was synced before
            self.stable = [path.read_bytes() for path in self.disks]
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

    def open_gate(self, group: Any, **options: Any) -> Gate:
        self.gate = Gate(self, group)
        return self.gate

    def _ring_path(self) -> Path:
        return self.paths.shm(str(self.host.shm)) / self.name / "ring"

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
        for _ in range(min(len(steps), 1 + kernel.rng.randrange(4))):
            self.filter.burn()  # not a stop before it: a resize waits for turns that are done
            index = kernel.rng.randrange(len(steps))
            if steps[index].kind == "disk" and kernel.rng.random() < self.bad_disk:
                self._fail(index, steps[index])
            else:
                self._step(index, steps[index])
            steps = group.steps()
        self.look()  # a mark was put since, maybe, and is shipped: its room is given back below
        group.set_time(kernel.now_ns, kernel.now_ns + kernel.wall_ahead_ns)
        group.poll()
        self.look()
        self.after_turn()
        if group.steps():
            return kernel.rng.random() * 0.002
        pause_s = kernel.rng.random() * (
            0.2 if self.oracle.flights or kernel.rng.random() < 0.5 else 1
        )
        left_ns = self.hold_ends_ns - kernel.now_ns
        return min(pause_s, left_ns / NS) if left_ns > 0 else pause_s

    def holds(self, limit_ms: float) -> None:
        """A cut begins: its lane holds for so long at the most."""
        self.hold_ends_ns = self.kernel.now_ns + int(limit_ms * 1e6)
        self.look()
        self.kick()
        self.at_cut()

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
            self.stable[step.disk] = whole(self.disks[step.disk])
        elif step.flags & FUA:
            end = step.offset + step.length
            now = whole(self.disks[step.disk])
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

    def filter_killed(self) -> None:
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
        self.daemon.close()
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
        state = self.groups.path(self.name)
        files = [path for path in sorted(state.glob("*")) if path.is_file()]
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
        shutil.rmtree(self.host.shm)
        self.host.shm.mkdir()
        self.stable = [path.read_bytes() for path in self.disks]

    # ---- the source -------------------------------------------------------------------

    def start_source(self) -> None:
        start_source([self])

    def source_killed(self) -> None:
        for reader in self._readers:
            reader.close()
        self._readers.clear()

    def fill(self, full: bool) -> None:
        """Whether the disk of its state and its spill is full."""
        self.host.full = self.spill_disk.full = full

    def keep_reader(self, reader: RingReader) -> None:
        self._readers.append(reader)

    def ask(self, process: str, method: str, **params: Any) -> Any:
        """What the command line asks of this site's processes."""
        path = str(self.paths.socket(process))
        return self.host.controls.ask(path, method, params, 30.0).result


def start_filter(sites: list[SourceSite]) -> None:
    """The filter process of a host, which serves the group, or all its lanes."""
    one = sites[0]
    kernel, process = one.kernel, one.host.process("filter", one.oracle)

    def open_group(disks: Any, **options: Any) -> GroupDriver:
        site = next(site for site in sites if site.lane == options["lane"])
        return site.open_group(disks, **options)

    def open_gate(group: Any, **options: Any) -> Gate:
        return next(site for site in sites if site.group is group).open_gate(group, **options)

    def run() -> None:
        daemon = filterd.FilterHost(one.paths, one.host.config)
        daemon.start()
        for site in sites:
            site.daemon = daemon
            kernel.spawn(process, site.turns, f"filter{site.lane}")
        while True:
            kernel.sleep(filterd.SCAN_EVERY_S)
            daemon._scan()

    process.names |= {"Group": open_group, "Server": open_gate}
    for site in sites:
        site.filter = process
        process.at_kill.append(site.filter_killed)
    kernel.spawn(process, run, "filter")


def start_source(sites: list[SourceSite]) -> None:
    """The source process of a host, which ships the group, or all its lanes."""
    one = sites[0]
    process, plan = one.host.process("source", one.oracle), one.plan

    def read(path: Path, *fds: int) -> SimReader:
        site = next(site for site in sites if site.name == path.parent.name)
        return SimReader(site, process, path, *fds)

    def run() -> None:
        config, timeouts = one.host.config.source, plan.timeouts
        daemon = source_daemon.Source(one.paths, config, timeouts=timeouts)
        daemon.start()
        daemon.run()

    process.names |= {
        "GroupSession": functools.partial(
            session.GroupSession, connect_peer=process.names["connect"]
        ),
        "Spill": functools.partial(spill.Spill, segment_bytes=plan.spill_segment_bytes),
        "RingReader": read,
        "spill_os": SpillOs(process, one.spill_disk),
        "oracles": {site.lane: site.oracle for site in sites},
    }
    for site in sites:
        site.source = process
        process.at_kill.append(site.source_killed)
    one.kernel.spawn(process, run, "source")


class SimGroup(GroupDriver):
    """A group whose records are all seen, also those that it gives up."""

    site: SourceSite

    def lose_ring(self) -> None:
        self.site.look()
        super().lose_ring()
        self.site.oracle.salvages.ring_lost()

    def resync(
        self, allowed: bool = True, *, bytes_per_s: int = 0, everything: bool = False
    ) -> None:
        if everything:
            self.site.oracle.salvages.all_again(self.status()["acknowledged"])
        super().resync(allowed, bytes_per_s=bytes_per_s, everything=everything)

    def cut_complete(self, cut_id: bytes, lanes: Any, label: str = "") -> int:
        seq = super().cut_complete(cut_id, lanes, label)
        self.site.completed.append((cut_id, list(lanes), seq))
        self.site.look()  # before it can be shipped and leave the ring
        self.site.kernel.event("cut of lanes")
        return seq

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

    def __init__(self, host: Host, oracle: Oracle, plan: Plan, group_id: bytes = GROUP_ID) -> None:
        self.group_id = group_id
        self.host = host
        self.kernel = kernel = host.kernel
        self.paths = host.paths
        self.oracle = oracle
        self.plan = plan
        self.process: Process = kernel.outside
        self.files: StoreFiles | None = None
        self.disk = StoreDisk(self.directory)
        self.store: GroupStore | None = None
        self._room_bytes = 1 << 40

    @property
    def directory(self) -> Path:
        return self.paths.store / self.group_id.hex()

    def start(self) -> None:
        start_target([self])

    def opens_store(self, process: Process) -> None:
        """Let a process of this host open the store."""
        process.names["open_store"] = functools.partial(self.open_store, process)

    def open_store(self, process: Process, *args: Any, **options: Any) -> GroupStore:
        files = StoreFiles(process, self.disk)
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
        self.files = None
        self.kernel.kill(self.process)
        return self.disk.lose_power(self.kernel.rng)

    def ask(self, method: str, **params: Any) -> Any:
        """What the command line asks of the target's process."""
        path = str(self.paths.socket("target"))
        return self.host.controls.ask(path, method, params, 60.0).result


def start_target(targets: list[TargetSite]) -> None:
    """The target process of a host, which stores the group, or all its lanes."""
    one = targets[0]
    process, paths = one.host.process("target", one.oracle), one.paths

    def open_store(stores: Any, group_id: bytes, **options: Any) -> GroupStore:
        target = next(target for target in targets if target.group_id == group_id)
        return target.open_store(process, stores, group_id, **options)

    def run() -> None:
        daemon = target_daemon.Target(
            paths,
            one.host.config,
            timeouts=one.plan.timeouts,
            held=lambda group_id: points_in_use(paths, group_id),
            gives_way=lambda site_id, told: give_way(paths, site_id, told),
            clients=lambda group_id: clients_here(paths, group_id),
        )
        daemon.start()
        daemon.run()

    process.names |= {
        "open_store": open_store,
        "GroupHost": functools.partial(receive.GroupHost, open_store=open_store),
        "oracles": dict(enumerate(target.oracle for target in targets)),
    }
    for target in targets:
        target.process, target.store = process, None
    one.kernel.spawn(process, run, "target")


def start_peer(site: SourceSite) -> Process:
    """The target process of a host that stores nothing: it answers the other hosts of a group."""
    process = site.host.process("peer", site.oracle)

    def run() -> None:
        daemon = target_daemon.Target(
            site.paths,
            site.host.config,
            timeouts=site.plan.timeouts,
            held=lambda _group_id: [],
            lanes=HostLanes(site.paths).answer,
        )
        daemon.start()
        daemon.run()

    process.names["GroupHost"] = receive.GroupHost
    site.kernel.spawn(process, run, "peer")
    return process


__all__ = [
    "SourceSite",
    "TargetSite",
    "start_filter",
    "start_peer",
    "start_source",
    "start_target",
]
