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
from kernel import Kernel, Killed, Violation
from net import Network
from oracle import Oracle
from plan import Plan
from recoveries import Recoveries
from sites import DATA_KEY, SourceSite, TargetSite, small_world

from vrep.wire import messages as m

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
        self.network = network = Network(kernel)
        network.slow_ns = plan.slow_ns
        network.features = m.FEATURES if plan.delta else ()
        for name in ("west", "east"):
            (root / name).mkdir()
            shutil.copytree(keys, root / name / "keys")
        self.west = west = SourceSite(kernel, root / "west", network, oracle, plan)
        self.east = east = TargetSite(kernel, root / "east", network, oracle, plan)
        self.recoveries = recoveries = Recoveries(kernel, oracle, east)
        self.faults = Faults(kernel, plan, oracle, network, west, east, recoveries.verify)
        self.guest = Guest(kernel, plan, oracle, west, lambda: self.faults.over)
        west.after_turn = self.guest.answers
        west.check_map = self.guest.check_map = self._check_map
        west.prepare(wrapped)

    def _check_map(self) -> None:
        if self.west.group is not None and not self.faults.failed_over:
            self.kernel.event("map check")
            self.oracle.check_map(self.west.group, self.west.content)

    def _healed(self) -> bool:
        """Whether all is whole again."""
        group, store = self.west.group, self.east.store
        if group is None or store is None or self.east.process.dead:
            return False
        status = group.status()
        return (
            not self.oracle.flights
            and not status["gap"]
            and status["durable"] == status["head"] == store.durable.seq
            and status["dirty_bytes"] == 0
        )

    def _end(self) -> None:
        """Everything heals; the target catches up; what it holds is what the guest wrote."""
        kernel, west, east = self.kernel, self.west, self.east
        self.network.hung_until_ns = self.network.down_until_ns = 0
        west.spill_disk.fail_syncs = west.bad_disk = 0.0
        for process, start in (
            (west.filter, west.start_filter),
            (west.source, west.start_source),
            (east.process, east.start),
        ):
            process.fuse = -1
            if process.dead:
                start()
        if self.faults.failed_over:
            kernel.sleep(30.0)
            self.recoveries.verify()
            return
        if not kernel.wait_until(self._healed, HEAL_S, look_s=0.2):
            status = west.group.status() if west.group else None
            durable = east.store.durable if east.store else None
            raise Violation(f"9: it does not become whole again: {status}, {durable}")
        self._check_map()
        image = self.oracle.durable_image()
        if image.sizes != self.oracle.sizes:
            raise Violation(f"8: the target's disks have {image.sizes} bytes")
        for disk in range(len(image.sizes)):
            here, there = west.content(disk), image.read(disk)
            if here != self.oracle.model[disk]:
                raise Violation(f"4: disk {disk} is not what the guest wrote")
            if here != there:
                raise Violation(f"2: disk {disk} differs at the target though nothing is dirty")
        self.recoveries.verify(4, whole=True)

    # ---- running ---------------------------------------------------------------------------------

    def run(self, trace: Callable[[str], None] | None = None) -> Outcome:
        kernel = self.kernel
        kernel.trace = trace
        over: list[bool] = []
        with small_world(self.oracle):
            undo = kernel.patch()
            try:
                self.west.start_filter()
                self.west.start_source()
                self.east.start()
                kernel.spawn(kernel.outside, self.guest.run, "guest")
                kernel.spawn(kernel.outside, self.faults.run, "chaos")

                def judge() -> None:
                    kernel.wait_until(lambda: self.guest.finished, 1e6, look_s=0.2)
                    self._end()
                    over.append(True)

                kernel.spawn(kernel.outside, judge, "judge")
                kernel.run(lambda: bool(over))
            finally:
                try:
                    kernel.close()
                finally:
                    undo()
        return Outcome(self.plan.seed, kernel.events)


def play(
    seed: int, keys: Path, wrapped: bytes, trace: Callable[[str], None] | None = None
) -> Outcome:
    """One seed, in a temporary directory, which is best in memory."""
    root = Path(tempfile.mkdtemp(prefix="vrep-sim-"))
    world = World(Plan.draw(seed), root, keys, wrapped)
    try:
        return world.run(trace)
    except Violation as error:
        return Outcome(seed, world.kernel.events, str(error))
    except Killed:
        return Outcome(seed, world.kernel.events, "a thread outlived its process")
    finally:
        for run in root.glob("*/run"):  # of a site whose path is too long for a socket
            if run.is_symlink():
                shutil.rmtree(run.resolve(), ignore_errors=True)
        shutil.rmtree(root, ignore_errors=True)
