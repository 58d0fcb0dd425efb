"""Faults: all that breaks in a world, one after another, each a method named as in `plan.FAULTS`.

A process is killed now, or at one of its next operations; what its site does afterwards, it does
at a random moment later.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from typing import Any

from facts import DISK_BYTES_MAX
from guest import GUEST_S
from hosts import EAST, GROUP, GROUP_ID
from kernel import NS, Kernel, Violation
from net import Network
from oracle import Oracle
from plan import AT_SOURCE, Plan
from rot import Rot
from sites import SourceSite, TargetSite
from uses import GONE, Uses

from vrep.errors import StateError, VrepError
from vrep.target.manifest import Position


class Faults:
    """What breaks in one world."""

    def __init__(
        self,
        kernel: Kernel,
        plan: Plan,
        oracle: Oracle,
        network: Network,
        west: SourceSite,
        east: TargetSite,
        verify: Callable[[], None],
        uses: Uses,
    ) -> None:
        self._kernel = kernel
        self._rng = kernel.rng
        self._plan = plan
        self._oracle = oracle
        self._network = network
        self._west = west
        self._east = east
        self._verify_store = verify
        self._uses = uses
        self.rot: Rot | None = None
        self.over = False
        """all that was to break has"""
        self.failed_over = False
        """another site keeps the group"""

    def run(self) -> None:
        """All of them, those of the two sites side by side, and again what did not work."""
        rest = [1]
        at_source = [fault for fault in self._plan.faults if fault in AT_SOURCE]

        def there() -> None:
            self._break(at_source)
            rest.pop()

        self._kernel.spawn(self._kernel.outside, there, "faults:west")
        self._break([fault for fault in self._plan.faults if fault not in AT_SOURCE])
        self._kernel.wait_until(lambda: not rest, 1e6, look_s=0.2)
        for what, again in (("torn write", self._power_target), ("cut", self._cut)):
            tries = 0
            while not self._kernel.events[what]:
                tries += 1
                if tries > 20:
                    raise Violation(f"no {what} in {tries} attempts: the world is not what it was")
                self._kernel.sleep(self._rng.random())
                again()
        if self._plan.failover_kept:
            self._failover(keep=True)
        self.over = True

    def again(self, faults: list[str]) -> None:
        """Some more, one after the other."""
        self._break(faults)

    def _break(self, faults: list[str]) -> None:
        pause_s = 0.2 + self._plan.writes * self._plan.write_s / 8
        for fault in faults:
            self._kernel.sleep(self._rng.expovariate(1 / pause_s))
            self._kernel.note(f"fault: {fault}")
            self._kernel.event(f"fault {fault}")
            getattr(self, "_" + fault.replace(" ", "_"))()

    def _soon(self, process: Any) -> None:
        """Kill a process now, or at one of its next operations."""
        if self._rng.random() < 0.5:
            process.fuse = self._rng.randrange(40)
            self._kernel.wait_until(lambda: process.dead, 2.0)
        if not process.dead:
            self._kernel.kill(process)
        self._kernel.event("crash")

    def _kill_source(self) -> None:
        self._soon(self._west.source)
        self._kernel.sleep(self._rng.random())
        self._west.start_source()

    def _kill_filter(self) -> None:
        self._soon(self._west.filter)
        self._oracle.source_came_back(False, self._west.content)
        self._kernel.sleep(self._rng.random() * 0.2)
        self._start_filter()

    def _start_filter(self) -> None:
        self._west.start_filter()
        self._kernel.wait_until(lambda: self._west.group is not None, 10.0)
        self._west.check_map()

    def _close_filter(self) -> None:
        west = self._west
        if west.group is None:
            return
        # Who stops a filter has stopped the VM: nothing is in flight.
        gate, west.gate = west.gate, None
        if not self._kernel.wait_until(lambda: not self._oracle.flights, GUEST_S):
            raise Violation("5: a command of the guest is never answered")
        west.gate = gate
        west.close_filter()
        self._kernel.kill(west.filter)
        self._oracle.source_came_back(False, self._west.content)
        self._start_filter()

    def _power_source(self) -> None:
        if self._west.lose_power():
            self._kernel.event("torn write")
        self._kernel.event("crash")
        self._oracle.source_came_back(True, self._west.content)
        self._kernel.sleep(self._rng.random() * 2)
        self._start_filter()
        self._west.start_source()

    def _kill_target(self) -> None:
        self._soon(self._east.process)
        self._restart_target()

    def _power_target(self) -> None:
        files = self._east.files
        if files is not None:
            self._kernel.wait_until(self._target_is_busy, 1.0, files.dirty, look_s=0.2)
        if self._east.lose_power():
            self._kernel.event("torn write")
        self._kernel.event("crash")
        self._restart_target()

    def _target_is_busy(self) -> bool:
        return self._east.files is not None and self._east.disk.busy

    def _restart_target(self) -> None:
        self._kernel.sleep(self._rng.random())
        self._east.start()
        if self._rng.random() < 0.3:
            self._kernel.wait_until(lambda: self._east.store is not None, 5.0)
            self._verify_store()

    def _cut(self) -> None:
        self._kernel.wait_until(lambda: self._network.connected, 20.0)
        self._kernel.sleep(self._rng.random() * 0.01)
        self._network.cut()

    def _hang(self) -> None:
        self._kernel.event("hang")
        self._network.hung_until_ns = self._kernel.now_ns + int(self._rng.random() * 12 * NS)

    def _down(self) -> None:
        self._network.down_until_ns = self._kernel.now_ns + int(self._rng.random() * 8 * NS)
        self._network.cut()

    def _full_target(self) -> None:
        """Its disk takes nothing more, for a while."""
        files = self._east.files
        if files is None or self._east.process.dead:
            return
        files.room = self._rng.randrange(60_000)
        self._kernel.sleep(self._rng.random() * 4)
        files.room = 1 << 40
        self._kernel.event("full disk")

    def _failed_sync(self) -> None:
        files = self._east.files
        if files is not None:
            files.sync_error = OSError(errno.EIO, "Input/output error")

    def _failed_spill(self) -> None:
        self._west.spill_disk.fail_syncs = 0.3
        self._kernel.sleep(self._rng.random() * 3)
        self._west.spill_disk.fail_syncs = 0.0

    def _full_source(self) -> None:
        """The disk of its state and its spill takes nothing more, for a while; in which the target
        is gone, perhaps, so that it would be needed."""
        self._west.fill(True)
        if self._rng.random() < 0.5:
            self._down()
        self._kernel.sleep(self._rng.random() * 4)
        self._west.fill(False)

    def _bad_disk(self) -> None:
        """Requests to the guest's disks fail, for a while."""
        self._oracle.may_fail = True
        self._west.bad_disk = self._rng.choice((0.1, 0.4))
        self._kernel.sleep(1 + self._rng.random() * 3)
        self._west.bad_disk = 0.0

    def _clock(self) -> None:
        """The wall clocks of both sites jump."""
        self._kernel.wall_ahead_ns += self._rng.randrange(-3600, 3600) * NS

    def _old_target(self) -> None:
        """The target's disks are those of an earlier day: what it acknowledged since is lost."""
        directory, kernel = self._east.directory, self._kernel
        if self.failed_over:
            return
        kernel.kill(self._east.process)
        if not directory.is_dir():
            self._restart_target()
            return
        kept, checked = directory.with_name("kept"), self._east.paths.root / "checked"
        shutil.copytree(directory, kept)
        if checked.is_dir():  # what was found of the history is of that day, too
            shutil.copytree(checked, kept.with_name("kept.checked"))
        taken, epochs = list(self._oracle.ledger.taken), len(self._oracle.epochs)
        self._restart_target()
        kernel.sleep(self._rng.random() * 2)
        if self._rng.random() < 0.7:  # it may know of another size, and forget it
            self._ask_size(*self._other_size())
        kernel.sleep(self._rng.random())
        assert epochs == len(self._oracle.epochs), "nothing else breaks meanwhile"
        kernel.kill(self._east.process)
        shutil.rmtree(directory)
        kept.rename(directory)
        shutil.rmtree(checked, ignore_errors=True)
        if kept.with_name("kept.checked").is_dir():
            kept.with_name("kept.checked").rename(checked)
        self._oracle.target_is_old(taken)
        kernel.event("old target")
        self._restart_target()

    def _rot(self) -> None:
        """Something of the target's store goes bad, and is repaired."""
        if self.rot is not None and not self.failed_over:
            self.rot.play()

    def _verify(self) -> None:
        self._verify_store()

    def _export(self) -> None:
        if not self.failed_over:
            self._uses.export()

    def _test(self) -> None:
        if not self.failed_over:
            self._uses.test()

    def _rotate(self) -> None:
        self._uses.rotate()

    def _mark(self) -> None:
        try:
            self._west.ask("filter", "mark", group=GROUP, label=f"m{self._kernel.now_ns}")
            self._kernel.event("mark")
        except VrepError as error:
            self._kernel.note(f"no mark: {error}")

    def _resize(self) -> None:
        """A disk becomes larger or smaller; cut off on the way, the next start does it. Now and
        then its record is lost with the ring."""
        west, rng, oracle = self._west, self._rng, self._oracle
        disk, size = self._other_size()
        if west.group is None or size == oracle.sizes[disk]:
            return
        lost = rng.random() < 0.3
        if lost:
            self._hang()
        elif rng.random() < 0.4:
            west.filter.fuse = rng.randrange(60)
        self._ask_size(disk, size)
        west.filter.fuse = -1
        if west.filter.dead:
            oracle.source_came_back(False, west.content)
            self._start_filter()
        elif lost:
            self._power_source()

    def _other_size(self) -> tuple[int, int]:
        """A disk, and how large it may become."""
        disk = self._rng.randrange(len(self._oracle.sizes))
        size = self._oracle.sizes[disk] + 512 * self._rng.randrange(-64, 65)
        return disk, min(max(16 << 10, size), DISK_BYTES_MAX)

    def _ask_size(self, disk: int, size: int) -> None:
        try:
            self._west.ask("filter", "resize", group=GROUP, disk=f"d{disk}", size=size, shrink=True)
        except VrepError as error:
            self._kernel.note(f"not resized: {error}")

    def _pause(self) -> None:
        self._west.groups.update(GROUP, paused=True)
        self._reload()
        self._kernel.sleep(self._rng.random() * 3)
        self._west.groups.update(GROUP, paused=False)
        self._reload()

    def _reload(self) -> None:
        try:
            self._west.ask("source", "reload")
        except VrepError as error:
            self._kernel.note(f"not reloaded: {error}")

    def _fold(self) -> None:
        """Keep points from here on only."""
        oracle, store = self._oracle, self._east.store
        if store is None or self._east.process.dead or self.failed_over:
            return
        durable = store.durable
        points = [p for p in oracle.recoverable(durable) if p > oracle.horizon]
        if len(points) < 2 or store.manifest.current_epoch.epoch != oracle.current.number:
            return
        horizon = self._rng.choice(points)
        try:
            self._east.ask("fold", group_id=GROUP_ID.hex(), horizon=list(horizon))
        except VrepError as error:
            if not isinstance(error, StateError):
                self._kernel.note(f"no fold: {error}")

    def _failover(self, *, keep: bool = False) -> None:
        """Another site takes the group over, and gives it back or keeps it."""
        oracle, store = self._oracle, self._east.store
        if self.failed_over or store is None or self._east.process.dead:
            return
        points = oracle.recoverable(store.durable)
        points = [p for p in points if p >= store.manifest.horizon]
        if not points:
            return
        point = None if self._rng.random() < 0.5 else self._rng.choice(points)
        try:
            number = self._raise(point)
        except StateError as error:
            if point is None or GONE not in error.detail or not self._uses.is_gone(point):
                raise Violation(f"8: no epoch at {point}: {error}") from None
            return  # the window went past it
        self._kernel.event("failover")
        self._kernel.sleep(self._rng.random() * 8)
        self._verify_store()
        if keep:
            self._until_done("epoch_accept", epoch=number)
            self.failed_over = True
            self._kernel.event("failover kept")
            return
        back = self._until_done("epoch_roll_back", epoch=number)
        if int(back["epoch"]) <= number:
            raise Violation(f"11: epoch {back['epoch']} came after {number}")
        self._kernel.event("rollback")

    def _raise(self, point: Position | None) -> int:
        where = None if point is None else list(point)
        answer = self._until_done(
            "epoch_raise", writer=EAST.site_id, parent=where, state="provisional"
        )
        parent = Position(*answer["parent"])
        if point is not None and parent != point:
            raise Violation(f"11: an epoch was raised at {parent}, not at {point}")
        return int(answer["epoch"])

    def _until_done(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask the target until it answers: it may be killed meanwhile. StateError for a point that
        is gone."""
        self._oracle.deciding = True
        while True:
            try:
                return dict(self._east.ask(method, group_id=GROUP_ID.hex(), **params))
            except VrepError as error:
                if isinstance(error, StateError) and GONE in error.detail:
                    raise
                self._kernel.note(f"{method}: {error}")
                if self._east.process.dead:
                    self._east.start()
                self._kernel.sleep(0.5)
