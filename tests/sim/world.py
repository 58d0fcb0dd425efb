"""World: one seed. A guest writes, two sites replicate, things break, and all must hold.

A world plays its plan, lets everything heal, waits until the target has caught up, and compares
what is there with the oracle.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from faults import Faults
from guest import Guest
from hosts import DATA_KEY, EAST, WEST, Host, small_world
from kernel import Kernel, Killed, Violation
from lanes import LaneWorld
from lives import Life
from net import Network
from oracle import Oracle
from plan import AGAIN, Plan
from recoveries import Recoveries
from rot import Rot
from sites import SourceSite, TargetSite
from uses import Uses
from views import Views

HEAL_S: Final = 900.0
"""simulated seconds in which everything must be whole again"""


@dataclass
class Outcome:
    """What a seed did."""

    seed: int
    events: Counter[str]
    error: str = ""


class World:
    """One seed's world in a directory of its own."""

    def __init__(self, plan: Plan, root: Path, keys: Path, wrapped: bytes) -> None:
        self.plan = plan
        self.kernel = kernel = Kernel(plan.seed)
        self.oracle = oracle = Oracle(kernel, plan, DATA_KEY)
        self.network = network = Network(kernel, plan)
        for name in ("west", "east"):
            (root / name).mkdir()
            shutil.copytree(keys, root / name / "keys")
        self.west_host = Host(kernel, root / "west", network, WEST, EAST, plan)
        self.east_host = Host(kernel, root / "east", network, EAST, WEST, plan)
        disks = [root / "west" / f"disk{number}" for number in range(len(plan.disk_bytes))]
        self.west = west = SourceSite(self.west_host, oracle, plan, disks)
        self.east = east = TargetSite(self.east_host, oracle, plan)
        self.views = views = Views(self.east_host, oracle, east.opens_store)
        self.recoveries = recoveries = Recoveries(kernel, oracle, east)
        self.uses = Uses(kernel, oracle, west, east, views)
        self.faults = self.faults_of(oracle, west, east, recoveries.verify)
        self.faults.rot = Rot(kernel, oracle, east, recoveries, views.process)
        self.guest = Guest(kernel, plan, oracle, west, lambda: self.faults.over)
        west.after_turn = self.guest.answers
        west.check_map = self.guest.check_map = self._check_map
        west.prepare(wrapped)

    def faults_of(
        self, oracle: Oracle, source: SourceSite, target: TargetSite, verify: Callable[[], None]
    ) -> Faults:
        """What may break at two sites."""
        return Faults(
            self.kernel, self.plan, oracle, self.network, source, target, verify, self.uses
        )

    def _check_map(self) -> None:
        if self.west.group is not None and not self.faults.failed_over:
            self.kernel.event("map check")
            self.oracle.check_map(self.west.group, self.west.content)

    def play_on(self, site: SourceSite, oracle: Oracle, faults: Faults | None = None) -> None:
        """The guest works on, at a site, while a few things break."""
        kernel, rng = self.kernel, self.kernel.rng
        faults = faults or self.faults
        over: list[int] = []
        guest = Guest(kernel, self.plan, oracle, site, lambda: bool(over))
        site.after_turn = guest.answers
        task = kernel.spawn(kernel.outside, lambda: guest.run(20), "guest")
        faults.again(rng.choices(list(AGAIN), list(AGAIN.values()), k=rng.randrange(1, 4)))
        over.append(1)
        kernel.wait_until(lambda: task.done, 1e6, look_s=0.1)

    def _healed(self, source: SourceSite, target: TargetSite, oracle: Oracle) -> bool:
        """Whether all is whole again."""
        group, store = source.group, target.store
        if group is None or store is None or target.process.dead:
            return False
        status = group.status()
        return (
            not oracle.flights
            and not status["gap"]
            and status["durable"] == status["head"] == store.durable.seq
            and status["dirty_bytes"] == 0
        )

    def _restart(self) -> None:
        """What broke is repaired, what died is started."""
        west, east = self.west, self.east
        self.network.hung_until_ns = self.network.down_until_ns = 0
        west.spill_disk.fail_syncs = west.bad_disk = 0.0
        west.fill(False)
        for process, start in (
            (west.filter, west.start_filter),
            (west.source, west.start_source),
            (east.process, east.start),
        ):
            process.fuse = -1
            if process.dead:
                start()

    def compare(
        self, source: SourceSite, target: TargetSite, oracle: Oracle, recoveries: Recoveries
    ) -> None:
        """The target catches up; what it holds is what the guest wrote."""
        self.network.hung_until_ns = self.network.down_until_ns = 0
        if not self.kernel.wait_until(
            lambda: self._healed(source, target, oracle), HEAL_S, look_s=0.2
        ):
            status = source.group.status() if source.group else None
            durable = target.store.durable if target.store else None
            raise Violation(f"9: it does not become whole again: {status}, {durable}")
        assert source.group is not None
        oracle.check_map(source.group, source.content)
        image = oracle.durable_image()
        if image.sizes != oracle.sizes:
            raise Violation(f"8: the target's disks have {image.sizes} bytes")
        for disk in range(len(image.sizes)):
            here, there = source.content(disk), image.read(disk)
            if here != oracle.model[disk]:
                raise Violation(f"4: disk {disk} is not what the guest wrote")
            if here != there:
                raise Violation(f"2: disk {disk} differs at the target though nothing is dirty")
        recoveries.verify(4, whole=True)

    def end(self) -> None:
        """Everything heals, and is compared; some go on."""
        self._restart()
        if self.faults.failed_over:
            self.kernel.sleep(30.0)
            self.recoveries.verify()
            return
        self.compare(self.west, self.east, self.oracle, self.recoveries)
        if self.plan.life:
            Life(self).run()

    # ---- running ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin: what runs, who writes, what breaks."""
        self.west.start_filter()
        self.west.start_source()
        self.east.start()
        kernel = self.kernel
        kernel.spawn(kernel.outside, lambda: self.guest.run(self.plan.writes), "guest")
        kernel.spawn(kernel.outside, self.faults.run, "chaos")

    def finished(self) -> bool:
        return self.guest.finished


def play(
    seed: int, keys: Path, wrapped: bytes, trace: Callable[[str], None] | None = None
) -> Outcome:
    """One seed, in a temporary directory, which is best in memory."""
    root = Path(tempfile.mkdtemp(prefix="vrep-sim-"))
    plan = Plan.draw(seed)
    world = (LaneWorld if plan.lanes else World)(plan, root, keys, wrapped)
    kernel = world.kernel
    kernel.trace = trace
    try:
        run(world)
        return Outcome(seed, kernel.events)
    except Violation as error:
        return Outcome(seed, kernel.events, str(error))
    except Killed:
        return Outcome(seed, kernel.events, "a thread outlived its process")
    finally:
        for directory in root.glob("*/run"):  # of a site whose path is too long for a socket
            if directory.is_symlink():
                shutil.rmtree(directory.resolve(), ignore_errors=True)
        shutil.rmtree(root, ignore_errors=True)


def run(world: World | LaneWorld) -> None:
    """Play a world to its end. Raises what is wrong."""
    kernel = world.kernel
    over: list[bool] = []

    def judge() -> None:
        kernel.wait_until(world.finished, 1e6, look_s=0.2)
        world.end()
        over.append(True)

    with small_world(kernel):
        undo = kernel.patch()
        try:
            world.start()
            kernel.spawn(kernel.outside, judge, "judge")
            kernel.run(lambda: bool(over))
        finally:
            try:
                kernel.close()
            finally:
                undo()
