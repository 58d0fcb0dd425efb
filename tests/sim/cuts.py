"""Cuts: what must hold of the points of a group with lanes, beside the oracles of its lanes.

What joins lanes is time: a write that was sent after another was answered, or read, may depend on
it, on whatever lane, so every cut that holds the one must hold the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

from hosts import GROUP, Host
from kernel import Kernel, Violation
from oracle import Oracle
from recoveries import compare
from sites import SourceSite, TargetSite

from vrep._core import layout
from vrep.errors import PointNotFoundError
from vrep.recovery.cuts import Cut, LaneSet, find_lanes
from vrep.target.manifest import Position

LANES: Final = 2


class Cuts:
    """Of one group: `sites`, `oracles` and `targets` by lane."""

    def __init__(
        self,
        kernel: Kernel,
        host: Host,
        sites: Sequence[SourceSite],
        oracles: Sequence[Oracle],
        targets: Sequence[TargetSite],
    ) -> None:
        """`host`: where they are kept."""
        self.kernel = kernel
        self.rng: random.Random = kernel.rng
        self.host = host
        self.sites, self.oracles, self.targets = sites, oracles, targets
        self.offered = False
        """a cut of all lanes was"""
        for oracle in oracles:
            oracle.told_cut = self.told

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
        held = find_lanes(self.host.paths, GROUP)
        if held is None or len(held.lanes) < LANES:
            return False
        with LaneSet(self.host.paths, held) as lanes:
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
            self._require_latest(lanes, cuts)
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

    def any_whole(self) -> Cut | None:
        """A cut of all lanes that is offered now."""
        found: list[Cut] = []
        self._look(lambda lanes: found.extend(c for c in lanes.cuts() if not c.absent))
        return self.rng.choice(found) if found else None

    def require_kept_from(self, cut: Cut) -> None:
        """Each lane's history begins there, or later by its window; the cut may be gone by that."""

        def check(lanes: LaneSet) -> None:
            for lane in lanes.lanes:
                at = cut.of(lane.number)
                if at is None or lane.reader.manifest.horizon < at:
                    raise Violation(f"8: lane {lane.number} was folded, and keeps more than {cut}")

        self._look(check)

    def _look(self, run: Callable[[LaneSet], None]) -> None:
        """At the lanes as they are, if each has a store: another process does, at one moment."""
        current, self.kernel.current = self.kernel.current, None
        try:
            held = find_lanes(self.host.paths, GROUP)
            if held is not None and len(held.lanes) == LANES:
                with LaneSet(self.host.paths, held) as lanes:
                    run(lanes)
        finally:
            self.kernel.current = current

    def _require_closed(self, cut: Cut) -> None:
        """No write in a cut was sent after another was answered that is not in it."""
        ends = {position.lane: position.seq for position in cut.at}
        sent = max((self.oracles[lane].last_sent(seq) for lane, seq in ends.items()), default=0)
        for lane, seq in ends.items():
            left = self.oracles[lane].answered_before(sent, after=seq)
            if left:
                raise Violation(f"8: the cut {cut} holds what depends on record {left} of {lane}")

    def _require_latest(self, lanes: LaneSet, cuts: list[Cut]) -> None:
        """The newest cut, unless it has not all lanes: then nobody gets less unasked."""
        try:
            found = lanes.resolve("latest", 0)
        except PointNotFoundError:
            if cuts and not cuts[-1].absent:
                raise Violation("8: there is a cut of all lanes, and no latest point") from None
            return
        if found.absent or not cuts or found.at != cuts[-1].at:
            raise Violation(f"8: the latest point is {found}, which is not the newest cut")

    def told(self, at: Position) -> None:
        """A source says that a cut of all lanes is durable everywhere, up to which windows may go:
        it was completed, and each of its marks is known to be durable, on the line that is."""
        self.kernel.event("cut told durable")
        for site in self.sites:
            for _cut_id, marks, _seq in site.completed:
                if tuple(at) in marks:
                    if not all(self._is_durable(Position(*mark)) for mark in marks):
                        raise Violation(f"8: the cut {marks} is told durable, and is not")
                    self.offered = True
                    return
        raise Violation(f"8: a cut with {at} is told durable, which was not completed")

    def _is_durable(self, mark: Position) -> bool:
        oracle = self.oracles[mark.lane]
        if not mark.seq or mark.seq > oracle.ledger.told:
            return False
        if oracle.current.writer != oracle.writer:
            return True  # it is taken over, and nothing is decided
        limits = oracle.line(Position(oracle.current.number, mark.lane, oracle.ledger.told))
        taken = (mark.epoch, mark.seq, layout.KIND_MARK) in oracle.ledger.taken
        return taken and mark.seq <= limits.get(mark.epoch, 0)

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
