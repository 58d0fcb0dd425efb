"""Lanes: worlds whose group is served by two filter threads, and recovered at cuts.

Each lane has a guest, an oracle and a store of its own; one filter, source and target process has
all of them, or each of two hosts has a filter and a source process for its own. What joins them is
time: a write that was sent after another was answered may depend on it, on whatever lane, so every
cut that holds the one must hold the other.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import shutil
from pathlib import Path
from typing import Any, Final

import msgspec
from cuts import LANES, Cuts
from facts import Epoch
from guest import Guest
from hosts import DATA_KEY, EAST, GROUP, GROUP_ID, KEY, NORTH, WEST, Host
from kernel import NS, Kernel, Process, Task, Violation
from net import Network
from oracle import Oracle
from plan import Plan
from sites import (
    SourceSite,
    TargetSite,
    start_filter,
    start_peer,
    start_source,
    start_target,
)
from uses import give

from vrep.errors import PointNotFoundError, StateError, VrepError
from vrep.keys.datakey import DataKey
from vrep.lanes import lane_id
from vrep.recovery.cuts import find_lanes
from vrep.recovery.joined import fold
from vrep.source.cutter import VOID_PAUSE_MAX_S
from vrep.target.manifest import Position
from vrep.target.store import GroupStore

HEAL_S: Final = 900.0
CUT_EVERY_S: Final = 0.08
WRITE_S: Final = 0.003
"""between two writes of a guest: some stand beside each cut"""
LAST_MAX: Final = 2
LAST_WRITES: Final = 60
CALM: Final = 0.6
"""of the cuts beside which no guest is in a hurry"""
CALM_LATE: Final = 0.75
"""the same when only something to be broken is left to do: one that writes beside a cut makes
another one due"""
BESIDE_NS: Final = 24_000_000
"""and for how long, at most, beside the others: some of it is before, some behind"""
FAULTS: Final = {
    "kill source": 3,
    "kill filter": 3,
    "kill target": 3,
    "power source": 2,
    "power target": 3,
    "cut": 4,
    "hang": 2,
    "down": 2,
    "mark": 4,
    "fold": 3,
    "clock": 1,
    "verify": 2,
    "full target": 1,
    "failed sync": 1,
    "failed spill": 1,
    "full source": 2,
}
BETWEEN: Final = {"away": 3, "apart": 3, "kill peer": 2}
"""and these, when lanes are of two hosts"""
AWAY_S: Final = 8.0
GONE_S: Final = 2.0
"""then cuts are made without a host"""


class LaneWorld:
    """One seed's world of this kind."""

    def __init__(self, plan: Plan, root: Path, keys: Path, _wrapped: bytes) -> None:
        self.kernel = Kernel(plan.seed)
        self.rng = self.kernel.rng
        self.network = network = Network(self.kernel, plan)
        for name in ("west", "north", "east"):
            (root / name).mkdir()
            shutil.copytree(keys, root / name / "keys")
        window_s = self.rng.choice((0, 1, 1, 2))
        plan = self.plan = dataclasses.replace(plan, write_s=WRITE_S, window_s=window_s)
        numbers = tuple(range(LANES))
        west = Host(self.kernel, root / "west", network, WEST, EAST, plan, (NORTH,))
        self.east = Host(self.kernel, root / "east", network, EAST, WEST, plan, (NORTH,))
        hosts = [west] * LANES
        if plan.hosts:
            hosts[1] = Host(self.kernel, root / "north", network, NORTH, EAST, plan, (WEST,))
            network.near_sites = {WEST.site_id, NORTH.site_id}
        for host in hosts:
            source = msgspec.structs.replace(
                host.config.source, cut_every_s=CUT_EVERY_S, lane_gone_s=GONE_S
            )
            host.config = msgspec.structs.replace(host.config, source=source)
        self.oracles = [
            Oracle(
                self.kernel,
                plan,
                lane_key(lane),
                lane=lane,
                epochs=[Epoch(1, bytes.fromhex(host.identity.site_id), Position())],
            )
            for lane, host in enumerate(hosts)
        ]
        self.sites = [
            SourceSite(host, oracle, plan, self._disks(root, plan, lane), lane)
            for lane, (host, oracle) in enumerate(zip(hosts, self.oracles, strict=True))
        ]
        self.machines = [[site] for site in self.sites] if plan.hosts else [self.sites]
        self.peers: dict[Host, Process] = {}
        """what answers other hosts, by the host it runs at"""
        self.targets = [
            TargetSite(self.east, oracle, plan, lane_id(GROUP_ID, lane))
            for lane, oracle in enumerate(self.oracles)
        ]
        self.cuts = Cuts(self.kernel, self.east, self.sites, self.oracles, self.targets)
        self.over = False
        self._stirred: list[Task] = []
        """who waits until a cut begins"""
        self.guests = [
            Guest(self.kernel, plan, oracle, site, lambda: self.over)
            for oracle, site in zip(self.oracles, self.sites, strict=True)
        ]
        for lane, site in enumerate(self.sites):
            site.after_turn, site.at_cut = self.guests[lane].answers, self._stir
            self.guests[lane].reads_beside = True
            shared = tuple((n, host.identity.site_id) for n, host in enumerate(hosts))
            site.prepare(
                lane_key(lane).wrap(west.keys.get(KEY)), numbers, shared if plan.hosts else ()
            )

    @staticmethod
    def _disks(root: Path, plan: Plan, lane: int) -> list[Path]:
        return [root / "west" / f"disk{lane}{number}" for number in range(len(plan.disk_bytes))]

    # ---- what happens -----------------------------------------------------------------

    def start(self) -> None:
        for machine in self.machines:
            self._start_machine(machine)
        start_target(self.targets)
        for guest in self.guests:
            run = functools.partial(self._write, guest)
            self.kernel.spawn(self.kernel.outside, run, "guest")
            run = functools.partial(self._write_beside, guest)
            self.kernel.spawn(self.kernel.outside, run, "guest:cut")
        self.kernel.spawn(self.kernel.outside, self._break, "chaos")

    def _start_machine(self, machine: list[SourceSite]) -> None:
        start_filter(machine)
        start_source(machine)
        if self.plan.hosts:
            self.peers[machine[0].host] = start_peer(machine[0])

    def _machine(self) -> list[SourceSite]:
        return self.machines[self.rng.randrange(len(self.machines))]

    def _write(self, guest: Guest) -> None:
        """Not before cuts can be made: there is none in the gap of a first sync."""
        self.kernel.wait_until(self._can_be_cut, 20.0)
        guest.run(self.plan.writes)

    def _stir(self) -> None:
        self.kernel.wake_all(self._stirred)

    def _write_beside(self, guest: Guest) -> None:
        """While a cut is made, as quickly as answers come: what it holds and what it does not."""
        kernel, rng = self.kernel, self.rng
        while not guest.finished:
            calm = CALM if guest.written < self.plan.writes else CALM_LATE
            if not kernel.block(self._stirred, 1.0) or rng.random() < calm or self.over:
                continue
            until_ns = kernel.now_ns + int(rng.random() * BESIDE_NS)
            while kernel.now_ns < until_ns and not guest.finished:
                guest.command()
                kernel.sleep(rng.random() * 0.003)

    def _can_be_cut(self) -> bool:
        groups = [site.group for site in self.sites]
        return all(group is not None and not group.status()["gap"] for group in groups)

    def _break(self) -> None:
        self.kernel.wait_until(self._can_be_cut, 20.0)
        pause_s = 0.2 + self.plan.writes * self.plan.write_s / 8
        faults = ["power target", "kill filter", "cut"]
        if self.plan.hosts:
            faults += [self.rng.choice(("away", "apart")), "lost marks"]
        known = FAULTS | (BETWEEN if self.plan.hosts else {})
        faults += self.rng.choices(list(known), list(known.values()), k=self.rng.randrange(3, 7))
        self.rng.shuffle(faults)
        for fault in faults:
            self.kernel.sleep(self.rng.expovariate(1 / pause_s))
            self.kernel.note(f"fault: {fault}")
            self.kernel.event(f"fault {fault}")
            getattr(self, "_" + fault.replace(" ", "_"))()
        for _ in range(20):
            if self.kernel.events["torn write"]:
                break
            # The guests may have ended, and the sources wait: something to write.
            self.kernel.wait_until(self._can_be_cut, 20.0)
            self._mark()
            self._power_target()
        for _ in range(20):
            if self.kernel.events["cut"]:
                break
            self._cut()
        self.over = True

    def _kill_source(self) -> None:
        machine = self._machine()
        self.kernel.kill(machine[0].source)
        self.kernel.event("crash")
        self.kernel.sleep(self.rng.random())
        start_source(machine)

    def _kill_filter(self) -> None:
        machine = self._machine()
        process = machine[0].filter
        if self.rng.random() < 0.5:
            process.fuse = self.rng.randrange(40)
            self.kernel.wait_until(lambda: process.dead, 2.0)
        if not process.dead:
            self.kernel.kill(process)
        self.kernel.event("crash")
        for site in machine:
            site.oracle.source_came_back(False, site.content)
        start_filter(machine)
        self.kernel.wait_until(lambda: all(site.group for site in machine), 10.0)

    def _power_source(self) -> None:
        self._fail_host(self._machine(), self.rng.random() * 2)

    def _lost_marks(self) -> None:
        """A host loses its power with marks of cuts that went nowhere else: mostly the one that
        does not make them, so that who made them may believe in them still."""
        self.kernel.event("marks lost with a host")
        machine = self.machines[1] if self.rng.random() < 0.7 else self._machine()
        self.kernel.wait_until(self._can_be_cut, 20.0)
        self._cut_that_is_not_shipped()
        self._fail_host(machine, self.rng.random() * 5)

    def _away(self) -> None:
        """A host is gone for so long that cuts are made without it, and the window of what is
        written meanwhile at the other one would go past the newest cut of both."""
        self.kernel.event("host away")
        over: list[int] = []

        def write() -> None:
            while not over:
                for guest in self.guests:
                    guest.command()
                self.kernel.sleep(self.rng.random() * 0.2)

        self.kernel.spawn(self.kernel.outside, write, "guest:alone")
        self._fail_host(self._machine(), GONE_S + self.rng.random() * AWAY_S)
        self.cuts.verify(0)
        over.append(1)

    def _fail_host(self, machine: list[SourceSite], away_s: float) -> None:
        """One loses its power, and has it again later."""
        torn = [site.lose_power() for site in machine]
        peer = self.peers.get(machine[0].host)
        if peer is not None:
            self.kernel.kill(peer)
        if any(torn):
            self.kernel.event("torn write")
        self.kernel.event("crash")
        for site in machine:
            site.oracle.source_came_back(True, site.content)
        self.kernel.sleep(away_s)
        self.cuts.verify(0)
        self._start_machine(machine)
        self.kernel.wait_until(lambda: all(site.group for site in machine), 10.0)

    def _cut_that_is_not_shipped(self) -> None:
        """Its marks are in the rings when the power goes, and nowhere else."""
        until_ns = self.kernel.now_ns + int(self.rng.random() * NS)
        self.network.hung_until_ns = max(self.network.hung_until_ns, until_ns)
        made = self._made()
        for _ in range(LAST_WRITES):
            if self._made() > made:
                break
            self.rng.choice(self.guests).command()
            self.kernel.sleep(self.rng.random() * 0.01)

    def _made(self) -> int:
        """So many cuts were completed."""
        return sum(len(site.completed) for site in self.sites)

    def _kill_peer(self) -> None:
        """What answers the other host."""
        site = self._machine()[0]
        self.kernel.kill(self.peers[site.host])
        self.kernel.event("crash")
        self.kernel.sleep(self.rng.random())
        self.peers[site.host] = start_peer(site)

    def _apart(self) -> None:
        """The hosts do not hear each other: both make cuts after a while."""
        near = self.network.near
        until_ns = self.kernel.now_ns + int((GONE_S + self.rng.random() * 4) * NS)
        if self.rng.random() < 0.5:
            near.hung_until_ns = until_ns
        else:
            near.down_until_ns = until_ns
            self.network.cut(near)
        self.kernel.event("hosts apart")

    def _kill_target(self) -> None:
        self.kernel.kill(self.targets[0].process)
        self.kernel.event("crash")
        self.kernel.sleep(self.rng.random())
        start_target(self.targets)

    def _power_target(self) -> None:
        busy = self.targets[self.rng.randrange(LANES)]
        if busy.files is not None:
            self.kernel.wait_until(lambda: busy.disk.busy, 1.0, busy.files.dirty)
        for target in self.targets:
            if target.lose_power():
                self.kernel.event("torn write")
        self.kernel.event("crash")
        self.kernel.sleep(self.rng.random())
        start_target(self.targets)

    def _full_target(self) -> None:
        files = [target.files for target in self.targets if target.files is not None]
        for one in files:
            one.room = self.rng.randrange(60_000)
        self.kernel.sleep(self.rng.random() * 4)
        for one in files:
            one.room = 1 << 40
        self.kernel.event("full disk")

    def _failed_sync(self) -> None:
        files = self.targets[self.rng.randrange(LANES)].files
        if files is not None:
            files.sync_error = OSError(errno.EIO, "Input/output error")

    def _failed_spill(self) -> None:
        disk = self._machine()[0].spill_disk
        disk.fail_syncs = 0.3
        self.kernel.sleep(self.rng.random() * 3)
        disk.fail_syncs = 0.0

    def _full_source(self) -> None:
        site = self._machine()[0]
        site.fill(True)
        if self.rng.random() < 0.5:
            self._down()
        self.kernel.sleep(self.rng.random() * 4)
        site.fill(False)

    def _cut(self) -> None:
        self.kernel.wait_until(lambda: self.network.connected, 20.0)
        self.network.cut()

    def _hang(self) -> None:
        self.kernel.event("hang")
        self.network.hung_until_ns = self.kernel.now_ns + int(self.rng.random() * 6 * NS)

    def _down(self) -> None:
        self.network.down_until_ns = self.kernel.now_ns + int(self.rng.random() * 4 * NS)
        self.network.cut()

    def _clock(self) -> None:
        self.kernel.wall_ahead_ns += self.rng.randrange(-3600, 3600) * NS

    def _mark(self) -> None:
        """A checkpoint of all lanes."""
        label = f"m{self.kernel.now_ns}"
        try:
            self._machine()[0].ask("source", "cut", group=GROUP, label=label, try_s=2.0)
            self.kernel.event("checkpoint")
        except VrepError as error:
            self.kernel.note(f"no checkpoint: {error}")

    def _fold(self) -> None:
        """Keep the cuts from one of all lanes on, as an operator does: each lane is folded."""
        cut = self.cuts.any_whole()
        if cut is None:
            return
        held = find_lanes(self.east.paths, GROUP)
        assert held is not None
        run = functools.partial(fold, self.east.paths, held, cut.point)
        ends = (PointNotFoundError, StateError)  # the window went past it
        try:
            give(self.kernel, self._command, "fold", run, ends=ends)
        except ends as error:
            self.kernel.note(f"no fold: {error}")
            return
        self.cuts.require_kept_from(cut)
        self.kernel.event("fold of lanes")

    def _command(self) -> Process:
        """What an operator starts at the site that stores."""
        process = self.east.process("command", self.oracles[0])

        def open_store(stores: Any, group_id: bytes, **options: Any) -> GroupStore:
            target = next(target for target in self.targets if target.group_id == group_id)
            return target.open_store(process, stores, group_id, **options)

        process.names["open_store"] = open_store
        return process

    def _verify(self) -> None:
        self.cuts.verify(1)

    # ---- what must hold ---------------------------------------------------------------

    def finished(self) -> bool:
        return all(guest.finished for guest in self.guests)

    def end(self) -> None:
        """Everything heals; each lane is whole; every cut stands."""
        self.network.hung_until_ns = self.network.down_until_ns = 0
        near = self.network.near
        near.hung_until_ns = near.down_until_ns = 0
        starts = [(self.targets[0].process, lambda: start_target(self.targets))]
        for machine in self.machines:
            starts.append((machine[0].filter, functools.partial(start_filter, machine)))
            starts.append((machine[0].source, functools.partial(start_source, machine)))
        for process, start in starts:
            process.fuse = -1
            if process.dead:
                start()
        self._require_whole()
        for _ in range(self.rng.randrange(LAST_MAX + 1)):
            self._say_more()
            self._require_whole()
        if not self.cuts.verify(3):
            raise Violation("8: all is whole, and no cut has all of it")

    def _say_more(self) -> None:
        """All are silent after a cut beside which they wrote: that is in another one."""
        kernel, rng = self.kernel, self.rng
        made = self._made()
        for _ in range(LAST_WRITES):
            if self._made() > made:
                break
            rng.choice(self.guests).command()
            kernel.sleep(rng.random() * 0.002)
        if rng.random() < 0.5:
            kernel.sleep(rng.random() * 0.002)
            rng.choice(self.guests).command()

    def _require_whole(self) -> None:
        """Each lane is, and a cut has all of it."""
        if not self.kernel.wait_until(self._whole, HEAL_S, look_s=0.2):
            raise Violation("9: the lanes do not become whole again")
        for site, oracle in zip(self.sites, self.oracles, strict=True):
            assert site.group is not None
            oracle.check_map(site.group, site.content)
            image = oracle.durable_image()
            for disk in range(len(image.sizes)):
                if not site.content(disk) == oracle.model[disk] == image.read(disk):
                    raise Violation(f"2: disk {disk} of {site.name} differs")
        # Void ones leave marks, too, and after several the next is tried half a minute later.
        for _ in range(8 * int(VOID_PAUSE_MAX_S / 0.5)):
            if self.cuts.verify(0):
                return
            self.kernel.sleep(0.5)
        raise Violation("8: all is whole, and no cut has all of it")

    def _whole(self) -> bool:
        for site, target, oracle in zip(self.sites, self.targets, self.oracles, strict=True):
            group, store = site.group, target.store
            if group is None or store is None or target.process.dead or oracle.flights:
                return False
            status = group.status()
            if status["gap"] or status["dirty_bytes"] or status["durable"] != status["head"]:
                return False
            if store.durable.seq != status["head"]:
                return False
        return True


def lane_key(lane: int) -> DataKey:
    """The data key of a lane."""
    return DataKey(lane_id(GROUP_ID, lane), 1, bytes([lane]) + DATA_KEY.secret[1:])
