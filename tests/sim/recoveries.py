"""Recoveries: points of the store as it is, read as a recovery reads them, beside the oracle.

`History` says which points there are, `resolve` finds one, `Fetcher` opens every byte of its
disks; `check_history` goes over the digests, the order and the tallies of all of it. Nothing else
happens meanwhile: a recovery is another process, and reads what is there.
"""

from __future__ import annotations

from facts import Image
from hosts import GROUP_ID
from kernel import Kernel, Violation
from oracle import Oracle
from sites import TargetSite

from vrep.errors import GapError, IntegrityError, PointNotFoundError, StorageError
from vrep.recovery.access import KeyAccess
from vrep.recovery.check import check_history
from vrep.recovery.fetch import Fetcher
from vrep.recovery.history import History, resolve
from vrep.target.manifest import Position
from vrep.target.reader import StoreReader


class Recoveries:
    """Of one target's store."""

    def __init__(self, kernel: Kernel, oracle: Oracle, east: TargetSite) -> None:
        self._kernel = kernel
        self._rng = kernel.rng
        self._oracle = oracle
        self._east = east

    def verify(self, count: int = 2, *, whole: bool = False) -> None:
        """The points that are offered, and the disks at some of them; `whole`: and that nothing of
        the history was changed or left out."""
        store = self._east.store
        if store is None or self._east.process.dead or not store.durable.seq:
            return
        current = self._kernel.current
        self._kernel.current = None  # a recovery is another process: nothing happens meanwhile
        try:
            self._recover(count, whole=whole)
        finally:
            self._kernel.current = current

    def look(self, count: int, *, whole: bool) -> None:
        """The same of a store that nobody has open."""
        current, self._kernel.current = self._kernel.current, None
        try:
            self._recover(count, whole=whole)
        finally:
            self._kernel.current = current

    def read_damaged(self, count: int) -> None:
        """A store of which something went bad shows what was written, or an error with a name."""
        current, self._kernel.current = self._kernel.current, None
        try:
            with StoreReader(self._east.paths.store, GROUP_ID) as reader:
                access = KeyAccess.open(self._east.paths, GROUP_ID, reader.wrapped_keys)
                horizon = reader.manifest.horizon
                points = [p for p in self._oracle.recoverable(reader.durable) if p >= horizon]
                for point in {self._rng.choice(points) for _ in range(count)} if points else ():
                    self._read_damaged(reader, access, point)
        except (IntegrityError, StorageError) as error:
            self._kernel.note(f"damage is told: {error}")
            self._kernel.event("damage told")
        finally:
            self._kernel.current = current

    def _read_damaged(self, reader: StoreReader, access: KeyAccess, point: Position) -> None:
        try:
            compare(reader, access, point, self._oracle.image(point))
        except (IntegrityError, StorageError) as error:
            self._kernel.note(f"damage at {point} is told: {error}")
            self._kernel.event("damage told")

    def _recover(self, count: int, *, whole: bool) -> None:
        oracle, rng = self._oracle, self._rng
        with StoreReader(self._east.paths.store, GROUP_ID) as reader:
            if not reader.durable.seq:
                return
            access = KeyAccess.open(self._east.paths, GROUP_ID, reader.wrapped_keys)
            if whole:
                verdict = check_history(self._east.paths, reader, access)
                if not verdict.whole:
                    raise Violation("10: the history is not whole")
            history = History(reader, reader.durable)
            horizon = reader.manifest.horizon
            oracle.horizon = max(oracle.horizon, horizon)
            wanted = [p for p in oracle.recoverable(reader.durable) if p >= horizon]
            offered = [p for p in wanted if any(r.first <= p <= r.last for r in history.ranges)]
            outside = [
                Position(epoch, 0, seq)
                for epoch, seq, _kind in oracle.history(reader.durable)
                if any(r.first <= (epoch, 0, seq) <= r.last for r in history.ranges)
            ]
            if offered != wanted:
                lost = [str(p) for p in wanted if p not in offered]
                raise Violation(f"8: the points {lost[:4]} are not offered")
            if outside != wanted:
                extra = [str(p) for p in outside if p not in wanted]
                raise Violation(f"8: the points {extra[:4]} lie in a gap and are offered")
            if not wanted:
                return
            chosen = {wanted[-1], wanted[0]}
            chosen |= {rng.choice(wanted) for _ in range(count)}
            for point, image in oracle.images(list(chosen)):
                self._kernel.event("recovery")
                compare(reader, access, point, image)
            self._refuses_gaps(reader, access, wanted, horizon)

    def _refuses_gaps(
        self, reader: StoreReader, access: KeyAccess, wanted: list[Position], horizon: Position
    ) -> None:
        good = set(wanted)
        bad = [
            Position(epoch, 0, seq)
            for epoch, seq, _kind in self._oracle.history(reader.durable)
            if Position(epoch, 0, seq) not in good and Position(epoch, 0, seq) >= horizon
        ]
        if not bad:
            return
        try:
            resolve(reader, f"pos:{self._rng.choice(bad)}", access, 0)
        except (GapError, PointNotFoundError):
            return
        raise Violation("8: a point in a gap is recovered")


def compare(reader: StoreReader, access: KeyAccess, point: Position, image: Image) -> None:
    """The disks at a point, every byte of them, with what they must hold."""
    found = resolve(reader, f"pos:{point}", access, 0)
    fetcher = Fetcher(reader, reader.extent_map(found.position), access)
    sizes = [disk.bytes for disk in reader.disks_at(point)]
    if sizes != image.sizes:
        raise Violation(f"8: the disks have {sizes} bytes at {point}, not {image.sizes}")
    for disk in range(len(sizes)):
        truth = image.read(disk)
        got = fetcher.read(disk, 0, len(truth)) or bytes(len(truth))
        if got != truth:
            at = next(i for i in range(len(truth)) if got[i] != truth[i])
            raise Violation(f"8: disk {disk} at {point} differs from byte {at} on")
