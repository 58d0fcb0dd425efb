"""Uses: what an operator does beside the replication, each as a process that may be killed.

A command that is cut off is given again, until it has done its work: so vrep promises it.
"""

from __future__ import annotations

import functools
import shutil
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from hosts import GROUP, KEY
from kernel import Kernel, Process, Violation
from power import HostPower

from vrep import rotate
from vrep.errors import (
    GapError,
    GoneError,
    NotFoundError,
    PointNotFoundError,
    RecoveryError,
    VrepError,
)
from vrep.keys.datakey import inspect_wrapped
from vrep.recovery.export import export
from vrep.recovery.view import start_test, stop_test, view_directories

if TYPE_CHECKING:
    from facts import Image
    from oracle import Oracle
    from sites import SourceSite, TargetSite
    from views import ViewMachine, Views

    from vrep.target.manifest import Position

GONE: Final = "is not kept any more"
"""what a failover is told that was cut off, and whose point left the window since"""
COMMAND_S: Final = 900.0
TRIES: Final = 40
OPERATIONS: Final = 30
"""within so many of its operations a command is killed, if it is"""
DARK: Final = 0.2
"""of the commands under which the host loses its power"""
SECTOR: Final = 512


def give(
    kernel: Kernel,
    make: Callable[[], Process],
    name: str,
    run: Callable[[], Any],
    *,
    ends: tuple[type[VrepError], ...] = (),
    cut_off: float = 0.3,
) -> Any:
    """Give a command until it has done its work; what it answers. `ends`: errors that are its
    answer, and raised. `cut_off`: how often it is killed."""
    said = ""
    for _ in range(TRIES):
        process = make()
        if kernel.rng.random() < cut_off:
            process.fuse = kernel.rng.randrange(OPERATIONS)
        try:
            answers = _once(kernel, process, name, run)
        except VrepError as error:
            if isinstance(error, ends) or GONE in error.detail:
                raise
            said = f"{type(error).__name__}: {error}"
            kernel.note(f"{name}: {said}")
        else:
            if answers:
                return answers[0]
            kernel.event("cut off command")
        kernel.sleep(kernel.rng.random() * 3)
    raise Violation(f"9: the command '{name}' never ends well: {said}")


def _once(kernel: Kernel, process: Process, name: str, run: Callable[[], Any]) -> list[Any]:
    """What a command answers; nothing, when it is killed before. Raises what it raises."""
    answers: list[Any] = []
    errors: list[VrepError] = []

    def body() -> None:
        try:
            answers.append(run())
        except VrepError as error:
            errors.append(error)

    kernel.spawn(process, body, name)
    kernel.wait_until(lambda: answers or errors or process.dead, COMMAND_S, look_s=0.05)
    if not (answers or errors or process.dead):
        raise Violation(f"5: the command '{name}' does not end")
    kernel.kill(process)
    if errors:
        raise errors[0]
    return answers


class Uses:
    """Of one group: its views, exports and keys."""

    def __init__(
        self, kernel: Kernel, oracle: Oracle, west: SourceSite, east: TargetSite, views: Views
    ) -> None:
        self._kernel = kernel
        self._rng = kernel.rng
        self._oracle = oracle
        self._west = west
        self._east = east
        self._views = views
        self._power = HostPower(east.host, views, east)

    def _give(
        self, name: str, run: Callable[[], Any], ends: tuple[type[VrepError], ...], cut_off: float
    ) -> Any:
        """A command at the site that stores; its host loses its power meanwhile, now and then."""
        kernel, rng = self._kernel, self._rng
        rest = [1] if rng.random() < DARK else []

        def fail() -> None:
            kernel.sleep(rng.random() * 0.05)
            self._power.fail()
            kernel.event("host power under a use")
            rest.pop()

        if rest:
            kernel.spawn(kernel.outside, fail, "faults:power")
        make = functools.partial(self._views.process, name.split()[0])
        try:
            return give(kernel, make, name, run, ends=ends, cut_off=cut_off)
        finally:
            kernel.wait_until(lambda: not rest, 1e6, look_s=0.1)

    # ---- points -----------------------------------------------------------------------

    def point(self) -> tuple[Position, Image] | None:
        """One that can be recovered now, and what it holds."""
        store, oracle = self._east.store, self._oracle
        if store is None or self._east.process.dead or not store.durable.seq:
            return None
        horizon = max(oracle.horizon, store.manifest.horizon)
        points = [p for p in oracle.recoverable(store.durable) if p >= horizon]
        if not points:
            return None
        point = self._rng.choice([points[0], points[-1], self._rng.choice(points)])
        return point, oracle.image(point)

    def is_gone(self, point: Position) -> bool:
        """Whether a fold, or an older store, may have taken a point."""
        store = self._east.store
        return store is None or self._oracle.amnesia or not store.manifest.keeps(point)

    # ---- export -------------------------------------------------------------------------

    def export(self) -> None:
        """The disks at a point, as files."""
        found = self.point()
        if found is None:
            return
        point, image = found
        out = self._east.paths.root / "exported"
        paths = self._east.paths

        def run() -> None:
            shutil.rmtree(out, ignore_errors=True)
            export(paths, GROUP, f"pos:{point}", out)

        try:
            self._give("export", run, (PointNotFoundError, GapError, NotFoundError), 0.1)
        except (PointNotFoundError, GapError, NotFoundError) as error:
            if not self.is_gone(point):
                raise Violation(f"8: {point} cannot be exported: {error}") from None
            return
        for disk, size in enumerate(image.sizes):
            data = (out / f"d{disk}.raw").read_bytes()
            if data != image.read(disk) or len(data) != size:
                raise Violation(f"8: disk {disk} is exported at {point} with other bytes")
        shutil.rmtree(out)
        self._kernel.event("export")

    # ---- test ---------------------------------------------------------------------------

    def test(self) -> None:
        """A view of a point: it is read, written, killed, served again, read, and ends."""
        found = self.point()
        if found is None:
            return
        self._views.keep()
        point, image = found
        paths = self._east.paths
        gone = (PointNotFoundError, GapError, NotFoundError)
        try:
            info = self._give(
                "test start", lambda: start_test(paths, GROUP, f"pos:{point}"), gone, 0.1
            )
        except gone as error:
            if not self.is_gone(point):
                raise Violation(f"8: {point} cannot be tested: {error}") from None
            return
        truth = [image.read(disk) for disk in range(len(image.sizes))]
        self._compare(info.id, point, truth)
        before = self._write(info.id, truth)
        end = self._rng.random()
        if end < 0.4:
            self._kernel.kill(self._views.machines[info.id].process)
            self._kernel.event("killed view")
            before = []
        elif end < 0.7:
            self._power.fail()
            self._kernel.event("host power under a view")
        else:
            before = []
        self._compare(info.id, point, truth, before)
        self._give("test stop", lambda: self._stop(info.id), (), 0.2)
        self._kernel.event("view")

    def _stop(self, view_id: str) -> None:
        paths = self._east.paths
        if any(view.id == view_id for view in view_directories(paths)):
            stop_test(paths, GROUP, view_id)

    def _served(self, view_id: str) -> ViewMachine:
        """Its process, which the site keeps running."""
        machines = self._views.machines
        if not self._kernel.wait_until(
            lambda: machines[view_id].gate is not None, 300.0, look_s=0.1
        ):
            raise Violation(f"9: a view that died is not served again: {self._views.problems}")
        return machines[view_id]

    def _compare(
        self,
        view_id: str,
        point: Position,
        truth: list[bytearray],
        before: Sequence[Sequence[bytes]] = (),
    ) -> None:
        """A view's disks with what they must hold. `before`: what they held earlier, to which any
        sector may have gone back since it was never flushed."""
        for disk, data in enumerate(truth):
            got = b""
            for _ in range(TRIES):
                try:
                    got = self._served(view_id).content(disk)
                    break
                except GoneError:
                    continue
            for at in range(0, max(len(got), len(data)), SECTOR):
                sector = slice(at, at + SECTOR)
                held = [data[sector], *(disks[disk][sector] for disks in before)]
                if got[sector] not in held:
                    raise Violation(f"8: a view of disk {disk} at {point} differs at {at}")

    def _write(self, view_id: str, truth: list[bytearray]) -> list[list[bytes]]:
        """Write here and there; what the disks held before each."""
        before: list[list[bytes]] = []
        for _ in range(self._rng.randrange(6)):
            before.append([bytes(data) for data in truth])
            disk = self._rng.randrange(len(truth))
            length = 512 * self._rng.randrange(1, 20)
            offset = 512 * self._rng.randrange((len(truth[disk]) - length) // 512 + 1)
            data = self._rng.randbytes(length)
            self._served(view_id).ask("write", disk, offset, length, data)
            truth[disk][offset : offset + length] = data
        return before

    # ---- keys ---------------------------------------------------------------------------

    def rotate(self) -> None:
        """A new generation of the tenant's key: exported, read back, taken in at the other site,
        used."""
        west, ring = self._west, self._west.host.keys
        site: Any = types.SimpleNamespace(
            keys=ring,
            groups=west.groups,
            paths=west.paths,
            running=lambda _role: not west.source.dead,
        )
        out = west.paths.root / "exported.key"
        old = self._kernel.events["old target"]

        def process() -> Process:
            return west.host.process("rotate", self._oracle)

        def begin() -> None:
            out.unlink(missing_ok=True)
            rotate.rotate(site, KEY, out=out)

        give(self._kernel, process, "key rotate --out", begin, cut_off=0.2)
        text = out.read_text()
        ring.verify(KEY, text)
        self._east.host.keys.import_key(text)

        def go_on() -> None:
            known = west.groups.load(GROUP)
            used = ring.pending(KEY) is None and known.tenant_key_id == ring.get(KEY).key_id
            if used and known.keys_at_target == known.keys_digest:
                return  # it was over when it was cut off
            found = rotate.rotate(site, KEY, wait_s=20.0)
            if found.state != "done":
                raise RecoveryError(f"the rotation is {found.state}")

        give(self._kernel, process, "key rotate", go_on, cut_off=0.2)
        out.unlink()
        self._kernel.event("rotation")
        store = self._east.store
        wanted = ring.get(KEY).key_id
        older = self._kernel.events["old target"] != old
        if store is not None and not self._east.process.dead and not older:
            held = {inspect_wrapped(blob).tenant_key_id for blob in store.manifest.wrapped_keys}
            if held != {wanted}:
                raise Violation("10: a rotation is over, and the target has other keys")
