"""Lives: what comes after a disaster, or a plan, in one world.

The recovery site takes the group over, by a failover or a move. Its VM runs from a view. Then the
group is given back; or kept, protected to the old site, and later returned. Meanwhile processes
die, connections are cut, and commands are cut off and given again. At every step the disks are
those that the oracle says, and what is protected becomes whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from facts import Epoch, Image
from guest import Guest
from hosts import DATA_KEY, GROUP
from kernel import Process, Violation
from oracle import Oracle
from power import HostPower
from recoveries import Recoveries
from sites import SourceSite, TargetSite, options_of
from uses import GONE, give
from views import ViewMachine, Views

from vrep.errors import GoneError, PointNotFoundError, StateError, VrepError
from vrep.recovery import failover as failovers
from vrep.recovery.failback import failback
from vrep.recovery.move import move
from vrep.recovery.reverse import reverse
from vrep.target.manifest import Position

if TYPE_CHECKING:
    from world import World

    from vrep.recovery.view import ViewInfo

SERVED_S: Final = 300.0
WAIT_S: Final = 60.0


def position_of(text: str) -> Position:
    return Position(*(int(n) for n in text.removeprefix("pos:").split("/")))


class Place:
    """Where the VM runs: on a view, or on the disks of a group. To a guest it is a source site."""

    def __init__(self, views: Views, site: SourceSite) -> None:
        self._views = views
        self._site = site
        self.view_id = ""
        self.away = False
        """the VM was stopped"""

    @property
    def at(self) -> SourceSite | ViewMachine | None:
        if self.away:
            return None
        if self._site.group is not None:
            return self._site
        return self._views.machines.get(self.view_id)

    @property
    def group(self) -> Any:
        return self.at.group if self.at is not None else None

    @property
    def gate(self) -> Any:
        return self.at.gate if self.at is not None else None

    def kick(self) -> None:
        if self.at is not None:
            self.at.kick()

    def content(self, disk: int) -> bytes:
        return self._site.content(disk)


class Life:
    """Of one world, whose disks are whole at both sites when it begins."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._kernel = kernel = world.kernel
        self._rng = kernel.rng
        self._plan = world.plan
        self._west_site, self._east_store = world.west, world.east
        self._east_views = world.views
        self._first = world.oracle
        self._busy = False
        self._east_power = HostPower(world.east_host, world.views, world.east)
        self._west_power = HostPower(
            world.west_host, Views(world.west_host, world.oracle), source=world.west
        )

    def run(self) -> None:
        """Play it."""
        faults = self._world.faults
        self._first.deciding = faults.failed_over = True
        self._east_views.keep()
        info = self._take_over()
        self._use_view(info)
        if "rollback" in self._plan.life:
            self._roll_back(info)
        else:
            self._keep(info)

    # ---- what goes wrong ----------------------------------------------------------------

    def _give(
        self,
        views: Views,
        name: str,
        run: Callable[[], Any],
        breaks: list[Callable[[], None]],
        ends: tuple[type[VrepError], ...] = (),
    ) -> Any:
        """Give a command, while things break."""
        kernel, rng = self._kernel, self._rng
        self._busy = True
        over: list[int] = []

        def disturb() -> None:
            for _ in range(rng.randrange(3)):
                kernel.sleep(rng.expovariate(1 / 0.5))
                if not self._busy:
                    break
                rng.choice(breaks)()
            over.append(1)

        kernel.spawn(kernel.outside, disturb, "faults:life")
        try:
            answer = give(kernel, lambda: views.process(name), name, run, ends=ends)
        finally:
            self._busy = False
            kernel.wait_until(lambda: over, 1e6, look_s=0.1)
        kernel.event(name)
        return answer

    def _kill_idle_view(self, views: Views, view_id: str) -> None:
        """One that no VM uses just now."""
        machine = views.machines.get(view_id)
        if machine is not None and not machine.process.dead:
            self._kernel.kill(machine.process)
            self._kernel.event("killed view")

    # ---- taking over --------------------------------------------------------------------

    def _take_over(self) -> ViewInfo:
        """By a move, with the VM at work, or by a failover."""
        world, oracle, west = self._world, self._first, self._west_site
        faults, paths = world.faults, self._east_store.paths
        breaks = [faults._kill_target, faults._cut, faults._kill_source, self._east_power.fail]
        breaks.append(self._west_power.fail)
        both = [*breaks, faults._kill_filter]
        if "move" in self._plan.life:
            with self._at_work(west, oracle):
                info = self._give(
                    self._east_views,
                    "move",
                    lambda: move(paths, GROUP, pause=True, wait_s=WAIT_S),
                    both,
                )
            image = oracle.image(position_of(info.point))
            if image.sizes != oracle.sizes or not self._nothing_lost(
                image, oracle, self._west_power
            ):
                raise Violation("8: a move lost what the guest wrote")
        elif self._rng.random() < 0.3:  # its VM lives, and writes on: that is not taken
            with self._at_work(west, oracle):
                info = self._fail_over(both, force=True)
            self._kernel.event("split brain")
        else:
            west.attached = False
            info = self._fail_over(breaks)
        west.attached = False
        return info

    @staticmethod
    def _nothing_lost(image: Image, oracle: Oracle, power: HostPower) -> bool:
        """Whether what was taken is what the guest wrote: the disks that it leaves, unless they
        lost their power since, which takes what was not flushed."""
        held = [image.read(disk) for disk in range(len(image.sizes))]
        return held == oracle.model or held in power.before

    @contextlib.contextmanager
    def _at_work(self, site: SourceSite, oracle: Oracle) -> Iterator[None]:
        """A guest writes at a site meanwhile."""
        kernel = self._kernel
        over: list[int] = []
        guest = Guest(kernel, self._plan, oracle, site, lambda: bool(over))
        site.after_turn = guest.answers
        task = kernel.spawn(kernel.outside, lambda: guest.run(None), "guest")
        try:
            yield
        finally:
            over.append(1)
        kernel.wait_until(lambda: task.done, 1e6, look_s=0.1)
        if not kernel.wait_until(lambda: not oracle.flights, 60.0, look_s=0.1):
            raise Violation("5: a command of the guest is never answered")
        site.after_turn = lambda: None

    def _fail_over(self, breaks: list[Callable[[], None]], *, force: bool = False) -> ViewInfo:
        """To the newest point, or any other: that one is taken."""
        uses, paths = self._world.uses, self._east_store.paths
        while True:
            found = uses.point() if self._rng.random() < 0.7 else None
            at = "latest" if found is None else f"pos:{found[0]}"
            try:
                info: ViewInfo = self._give(
                    self._east_views,
                    "failover start",
                    lambda at=at: failovers.start(paths, GROUP, at, force=force),
                    breaks,
                    ends=(PointNotFoundError,),
                )
            except (PointNotFoundError, StateError) as error:
                if found is None or not uses.is_gone(found[0]):
                    raise Violation(f"8: no failover to {at}: {error}") from None
                if GONE in error.detail:  # it began, and the window went past it
                    self._give(
                        self._east_views,
                        "failover rollback",
                        lambda: failovers.rollback(paths, GROUP),
                        breaks,
                    )
                continue
            if at not in ("latest", info.point):
                raise Violation(f"11: a failover to {at} took {info.point}")
            return info

    def _oracle_at(self, info: ViewInfo) -> Oracle:
        """Of the disks that the site which took over writes from now on."""
        image = self._first.image(position_of(info.point))
        epochs = [replace(epoch) for epoch in self._first.epochs]
        assert epochs[-1].number == info.epoch
        oracle = Oracle(
            self._kernel,
            self._plan,
            DATA_KEY,
            epochs=epochs,
            base=self._west_site.content,
            disks=[bytes(image.read(disk)) for disk in range(len(image.sizes))],
        )
        oracle.recorded = False
        return oracle

    # ---- on a view ----------------------------------------------------------------------

    def _use_view(self, info: ViewInfo) -> None:
        """The VM runs from the view, whose process dies now and then."""
        oracle = self._second = self._oracle_at(info)
        views = self._east_views
        self._east = SourceSite(self._world.east_host, oracle, self._plan, [])
        self._place = Place(views, self._east)
        self._place.view_id = info.id
        views.guest = oracle
        self._check_view(views, info.id, oracle)
        self._play(
            views,
            self._place,
            oracle,
            [
                lambda: self._end_view(info.id, lambda: self._kill_idle_view(views, info.id)),
                lambda: self._end_view(info.id, self._east_power.fail, power=True),
            ],
        )
        self._check_view(views, info.id, oracle)

    def _play(
        self, views: Views, place: Place, oracle: Oracle, breaks: list[Callable[[], None]]
    ) -> None:
        """The guest works for a while."""
        kernel = self._kernel
        over: list[int] = []
        guest = Guest(kernel, self._plan, oracle, place, lambda: bool(over))
        views.after_turn = guest.answers
        task = kernel.spawn(kernel.outside, lambda: guest.run(None), "guest")
        for _ in range(self._rng.randrange(3)):
            kernel.sleep(self._rng.random())
            self._rng.choice(breaks)()
        kernel.sleep(self._rng.random())
        over.append(1)
        kernel.wait_until(lambda: task.done, 1e6, look_s=0.05)
        if not kernel.wait_until(lambda: not oracle.flights, 30.0, look_s=0.05):
            raise Violation("5: a command to a view is never answered")
        views.after_turn = lambda: None

    def _served(self, views: Views, view_id: str) -> ViewMachine:
        machines = views.machines

        def served() -> bool:
            machine = machines.get(view_id)
            return machine is not None and machine.gate is not None and machine.gate.open

        if not self._kernel.wait_until(served, SERVED_S, look_s=0.1):
            raise Violation("9: a view that died is not served again")
        return machines[view_id]

    def _contents(self, views: Views, view_id: str) -> list[bytes]:
        """All of a view's disks, read as its user reads."""
        for _ in range(20):
            try:
                machine = self._served(views, view_id)
                assert machine.group is not None
                return [machine.content(disk) for disk in range(len(machine.group.disks))]
            except GoneError:
                continue
        raise Violation("9: a view is not served for long enough to be read")

    def _check_view(self, views: Views, view_id: str, oracle: Oracle) -> None:
        for disk, data in enumerate(self._contents(views, view_id)):
            if data != oracle.model[disk]:
                raise Violation(f"8: disk {disk} of a view is not what it was taken over with")

    def _end_view(self, view_id: str, end: Callable[[], None], *, power: bool = False) -> None:
        """Under its VM, which waits until it is served again."""
        oracle = self._second
        self._place.away = True
        oracle.drop_guest()
        end()
        contents = self._contents(self._east_views, view_id)
        oracle.source_came_back(power, contents.__getitem__)
        self._place.away = False

    # ---- what becomes of it -------------------------------------------------------------

    def _roll_back(self, info: ViewInfo) -> None:
        """The old site goes on, and the target with it."""
        world, paths = self._world, self._east_store.paths
        self._place.away = True
        faults = world.faults
        breaks = [
            faults._kill_target,
            faults._cut,
            faults._kill_source,
            lambda: self._kill_idle_view(self._east_views, info.id),
            self._east_power.fail,
            self._west_power.fail,
        ]
        self._give(
            self._east_views, "failover rollback", lambda: failovers.rollback(paths, GROUP), breaks
        )
        if (paths.views / info.id).exists():
            raise Violation("11: a failover was rolled back, and its view is there")
        self._west_site.attached, faults.failed_over = True, False
        world.play_on(self._west_site, self._first)
        world.compare(self._west_site, self._east_store, self._first, world.recoveries)

    def _keep(self, info: ViewInfo) -> None:
        """The new site keeps the group, and protects it to the old one."""
        world, plan = self._world, self._plan
        kernel, faults = self._kernel, world.faults
        paths, views, oracle = self._east_store.paths, self._east_views, self._second
        idle = lambda: self._kill_idle_view(views, info.id)  # noqa: E731
        failures = self._east_power.failures
        self._place.away = True
        breaks = [faults._kill_target, faults._cut, idle]
        breaks += [self._east_power.fail, self._west_power.fail]
        if "failover" in plan.life:
            self._give(views, "failover commit", lambda: failovers.commit(paths, GROUP), breaks)
        west_store = TargetSite(world.west_host, oracle, plan)
        west_store.start()
        self._east.start_filter()
        self._east.start_source()
        self._east_power.source, self._west_power.target = self._east, west_store
        recoveries = Recoveries(kernel, oracle, west_store)
        again = world.faults_of(oracle, self._east, west_store, recoveries.verify)
        options = options_of(plan)
        self._give(
            views,
            "reverse",
            lambda: reverse(paths, GROUP, options),
            [*breaks, faults._kill_source, again._kill_target],
        )
        if not kernel.wait_until(lambda: self._east.group is not None, 60.0):
            raise Violation("9: the group is reversed, and nobody serves its disks")
        self._place.away = False
        if self._east_power.failures != failures:  # since the guest wrote to the view
            oracle.source_came_back(True, self._east.content)
        for disk, model in enumerate(oracle.model):
            if self._east.content(disk) != model:
                raise Violation(f"6: disk {disk} is another one after a reverse")
        world.play_on(self._east, oracle, again)
        world.compare(self._east, west_store, oracle, recoveries)
        sizes = [path.stat().st_size for path in self._west_site.disks]
        if "failback" in plan.life and sizes == oracle.sizes:  # else its disks are not filled
            self._fail_back(west_store, again, options)

    def _fail_back(self, west_store: TargetSite, again: Any, options: Any) -> None:
        """The group returns, with the VM at work, onto the disks that it had."""
        world, kernel = self._world, self._kernel
        oracle, first, west = self._second, self._first, self._west_site
        views = Views(world.west_host, first, west_store.opens_store)
        views.keep()
        views.guest = first
        self._west_power.views = views
        oracle.deciding = True
        taken: list[ViewInfo] = []

        def moved(info: ViewInfo) -> None:
            """The VM was halted there, and may run here."""
            if taken:
                return
            taken.append(info)
            point = position_of(info.point)
            image = oracle.image(point)
            if not self._nothing_lost(image, oracle, self._east_power):
                raise Violation("8: a failback lost what the guest wrote")
            self._east.attached = False
            assert info.epoch is not None
            epoch = Epoch(info.epoch, bytes.fromhex("aa" * 16), point)
            east, since = self._east, oracle.epochs[-2].number
            disks = [bytes(image.read(disk)) for disk in range(len(image.sizes))]
            first.reigns_again(epoch, disks, east.content, since)
            first.recorded = False

        breaks = [again._kill_target, again._cut, again._kill_source, world.faults._kill_target]
        breaks += [self._east_power.fail, self._west_power.fail]
        with self._at_work(self._east, oracle):
            self._give(
                views,
                "failback",
                lambda: failback(
                    west_store.paths,
                    GROUP,
                    options,
                    pause=True,
                    wait_s=WAIT_S,
                    discard_untaken=True,
                    moved=moved,
                ),
                breaks,
            )
        if not kernel.wait_until(lambda: west.group is not None, 60.0):
            raise Violation("9: the group is back, and nobody serves its disks")
        west.attached = True
        for disk, model in enumerate(first.model):
            if west.content(disk) != model:
                raise Violation(f"6: disk {disk} is another one after a failback")
        recoveries = world.recoveries
        world.play_on(west, first)
        world.compare(west, self._east_store, first, recoveries)


__all__ = ["Life", "Process"]
