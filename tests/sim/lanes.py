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
from typing import Final

import msgspec
from facts import Epoch
from guest import Guest
from hosts import DATA_KEY, EAST, GROUP, GROUP_ID, KEY, NORTH, WEST, Host
from kernel import NS, Kernel, Process, Violation
from net import Network
from oracle import Oracle
from plan import Plan
from recoveries import compare
from sites import (
    SourceSite,
    TargetSite,
    start_filter,
    start_peer,
    start_source,
    start_target,
)

from vrep.errors import VrepError
from vrep.keys.datakey import DataKey
from vrep.lanes import lane_id
from vrep.recovery.cuts import Cut, LaneSet, find_lanes
from vrep.target.manifest import Position

LANES: Final = 2
HEAL_S: Final = 900.0
CUT_EVERY_S: Final = 0.04
WRITE_S: Final = 0.003
"""between two writes of a guest: some stand beside each cut"""
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
    "clock": 1,
    "verify": 2,
    "full target": 1,
    "failed sync": 1,
    "failed spill": 1,
    "full source": 2,
}
BETWEEN: Final = {"away": 3, "apart": 3, "kill peer": 2}
"""and these, when lanes are of two hosts"""
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
        plan = self.plan = dataclasses.replace(plan, write_s=WRITE_S)
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
        self.over = False
        self.offered = False
        """a cut of all lanes was"""
        self.guests = [
            Guest(self.kernel, plan, oracle, site, lambda: self.over)
            for oracle, site in zip(self.oracles, self.sites, strict=True)
        ]
        for lane, site in enumerate(self.sites):
            site.after_turn = self.guests[lane].answers
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

    def _can_be_cut(self) -> bool:
        groups = [site.group for site in self.sites]
        return all(group is not None and not group.status()["gap"] for group in groups)

    def _break(self) -> None:
        self.kernel.wait_until(self._can_be_cut, 20.0)
        pause_s = 0.2 + self.plan.writes * self.plan.write_s / 8
        faults = ["power target", "kill filter", "cut"]
        if self.plan.hosts:
            faults.append(self.rng.choice(("away", "apart")))
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
        self._fail_host(self.rng.random() * 2)

    def _away(self) -> None:
        """A host is gone for so long that cuts are made without it."""
        self.kernel.event("host away")
        self._fail_host(GONE_S + self.rng.random() * 4)

    def _fail_host(self, away_s: float) -> None:
        """One loses its power, and has it again later."""
        machine = self._machine()
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
        self._start_machine(machine)
        self.kernel.wait_until(lambda: all(site.group for site in machine), 10.0)

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

    def _verify(self) -> None:
        self.verify(1)

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
        if not self.kernel.wait_until(self._whole, HEAL_S, look_s=0.2):
            raise Violation("9: the lanes do not become whole again")
        for site, oracle in zip(self.sites, self.oracles, strict=True):
            assert site.group is not None
            oracle.check_map(site.group, site.content)
            image = oracle.durable_image()
            for disk in range(len(image.sizes)):
                if not site.content(disk) == oracle.model[disk] == image.read(disk):
                    raise Violation(f"2: disk {disk} of {site.name} differs")
        for _ in range(100):  # void ones leave marks, too
            if self.verify(0):
                break
            self.kernel.sleep(0.5)
        if not self.verify(3):
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

    def verify(self, count: int) -> bool:
        """The cuts that are offered, and the disks at some of them; whether the newest holds all
        that was written."""
        if any(t.store is None or t.process.dead or not t.store.durable.seq for t in self.targets):
            return False
        current = self.kernel.current
        self.kernel.current = None  # a recovery is another process: nothing happens meanwhile
        try:
            return self._verify_cuts(count)
        finally:
            self.kernel.current = current

    def _verify_cuts(self, count: int) -> bool:
        held = find_lanes(self.east.paths, GROUP)
        if held is None or len(held.lanes) < LANES:
            return False
        with LaneSet(self.east.paths, held) as lanes:
            cuts = lanes.cuts()
            points = [
                set(oracle.recoverable(lane.reader.durable))
                for oracle, lane in zip(self.oracles, lanes.lanes, strict=True)
            ]
            for cut in cuts:
                for position in cut.at:
                    if position not in points[position.lane]:
                        raise Violation(f"8: the cut {cut} has {position}, which is no point")
                self._require_closed(cut)
            horizons = {lane.number: lane.reader.manifest.horizon for lane in lanes.lanes}
            self._require_offered(cuts, points, horizons)
            whole = any(not cut.absent for cut in cuts)
            if self.offered and not whole:
                raise Violation("8: the window took the last cut of all lanes")
            self.offered |= whole
            if any(horizons.values()):
                self.kernel.event("cuts in a window")
            if any(cut.absent for cut in cuts):
                self.kernel.event("cut without a host")
            for cut in [self.rng.choice(cuts) for _ in range(count)] if cuts else ():
                self.kernel.event("recovery at a cut")
                for position in cut.at:
                    lane = lanes.lane(position.lane)
                    assert lane is not None
                    image = self.oracles[position.lane].image(position)
                    compare(lane.reader, lane.access, position, image)
        self.kernel.event("cuts looked at")
        return (
            bool(cuts)
            and not cuts[-1].absent
            and all(
                self.oracles[position.lane].newest_write <= position.seq for position in cuts[-1].at
            )
        )

    def _require_closed(self, cut: Cut) -> None:
        """No write in a cut was sent after another was answered that is not in it."""
        ends = {position.lane: position.seq for position in cut.at}
        sent = max((self.oracles[lane].last_sent(seq) for lane, seq in ends.items()), default=0)
        for lane, seq in ends.items():
            left = self.oracles[lane].answered_before(sent, after=seq)
            if left:
                raise Violation(f"8: the cut {cut} holds what depends on record {left} of {lane}")

    def _require_offered(
        self, cuts: list[Cut], points: list[set[Position]], horizons: dict[int, Position]
    ) -> None:
        """Every cut that was completed, and of which all is there."""
        offered = {cut.cut_id for cut in cuts}
        for site in self.sites:
            for cut_id, at, seq in site.completed:
                line = self.oracles[site.lane].history(self._durable(site.lane))
                known = any(s == seq for _epoch, s, _kind in line)
                whole = all(p in points[p[1]] and p >= horizons[p[1]] for p in at if p[2])
                if known and whole and cut_id not in offered:
                    raise Violation(f"8: a cut that was completed as record {seq} is not offered")

    def _durable(self, lane: int) -> Position:
        store = self.targets[lane].store
        assert store is not None
        return store.durable


def lane_key(lane: int) -> DataKey:
    """The data key of a lane."""
    return DataKey(lane_id(GROUP_ID, lane), 1, bytes([lane]) + DATA_KEY.secret[1:])
