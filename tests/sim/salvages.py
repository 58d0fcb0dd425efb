"""Salvages: what repairs left of a store, and what its source must hear and do.

A history that was repaired ends in a gap-begin that no source made. In the oracle's ledger an entry
of the kind `SALVAGED` stands for it and for all that the repair put behind the last point: it knows
what the store shows since, which is what everything behind it stands on, and what it showed before.
When the gap ends that the source began, the change map is looked at: what of the disks differs
from the store then, and is clean, is never sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from facts import DISK_BYTES_MAX, SALVAGED, Image, Salvage
from kernel import Violation

from vrep._core import layout
from vrep.target.manifest import Position
from vrep.wire import messages as m

if TYPE_CHECKING:
    from oracle import Oracle

BLOCK: Final = 4096
"""in which losses are told here, see `hosts`"""
_PAST_ALL: Final = (1 << 63) - 1


class Salvages:
    """Of one oracle's store."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self._made: dict[tuple[int, int, int], Salvage] = {}
        self._told = False
        """a session was opened since, which says so"""
        self._told_ranges = False
        """and names what was lost"""
        self._held = 0
        """up to which seq the target says that it holds all else"""
        self._marked = False
        """the source has given up its ring for that"""
        self._open = False
        """no gap has ended since"""

    def _end(self) -> tuple[int, int, int] | None:
        """The entry at which the line of the writer ends."""
        oracle = self._oracle
        taken = oracle.ledger.taken
        if not self._made or not taken:
            return None
        line = oracle.history(Position(oracle.current.number, oracle.lane, _PAST_ALL))
        return line[-1] if line else None

    @property
    def end(self) -> Position:
        """Of the writer's line, as far as it was taken."""
        oracle = self._oracle
        line = oracle.history(Position(oracle.current.number, oracle.lane, _PAST_ALL))
        return Position(line[-1][0], oracle.lane, line[-1][1]) if line else Position()

    def _pending(self) -> Salvage | None:
        end = self._end()
        return self._made[end] if end is not None and end[2] == SALVAGED else None

    @property
    def awaited(self) -> bool:
        """Whether the source need not know yet what it must compare: also while another site has
        taken the group over at a point before, and may give it back."""
        return not self._marked and (self._pending() is not None or self._stored())

    def _stored(self) -> bool:
        """Whether the history that is durable ends with what a repair left."""
        oracle = self._oracle
        if not self._made or oracle.store is None:
            return False
        line = oracle.history(oracle.store.durable)
        return bool(line) and line[-1][2] == SALVAGED

    def shown(self, entry: tuple[int, int, int]) -> Image:
        return self._made[entry].shown

    # ---- a repair ---------------------------------------------------------------------

    def cut_at(self, end: Position) -> None:
        """Nothing was kept behind a position: its source finds that there is less than it was
        told."""
        taken = [e for e in self._oracle.ledger.taken if e[:2] <= (end.epoch, end.seq)]
        self._oracle.target_is_old(taken)

    def made(self, kept: Position, here: Position, shown: Image, *, known: bool) -> None:
        """All up to `kept` stayed as it was; from there up to `here` the store shows what it does.
        `known`: what became of each segment does not keep anybody from knowing what was lost."""
        oracle = self._oracle
        line = oracle.history(here)
        last = line[-1]
        if last[2] == SALVAGED:
            known = known and self._made[last].known
        elif last[2] == layout.KIND_GAP_BEGIN:
            known = False  # it may be that of a repair
        behind: list[set[int]] = [set() for _disk in shown.sizes]
        for entry in line:
            if entry[:2] <= (kept.epoch, kept.seq):
                continue
            if entry[2] == SALVAGED:
                for disk, blocks in enumerate(self._made[entry].behind):
                    behind[disk] |= blocks
                continue
            one = oracle.record_of(entry[0], entry[1])
            if one.length and one.disk < len(behind):
                behind[one.disk] |= _blocks(one.offset, one.length)
        truth = oracle.image(here)
        entry = (here.epoch, here.seq, SALVAGED)
        self._made[entry] = Salvage(shown, truth, behind, known)
        kept_taken = [e for e in oracle.ledger.taken if e[:2] <= (kept.epoch, kept.seq)]
        oracle.ledger.taken = [*kept_taken, entry]
        if not kept.seq:
            oracle.horizon = Position()
        oracle.image_anew()
        self._told = self._told_ranges = self._marked = False
        self._open = True

    def losses_unknown(self) -> None:
        """What a repair wrote about it is damaged."""
        for made in self._made.values():
            made.known = False

    # ---- the source -------------------------------------------------------------------

    def opened(self, message: m.GroupOpened) -> None:
        """A session begins: its source is told to compare when it must, and what; not else."""
        pending = self._pending()
        if (message.compare is True) != (pending is not None):
            said = "is" if message.compare is True else "is not"
            raise Violation(f"8: a source {said} told that what was repaired is to be compared")
        self._told, self._told_ranges = pending is not None, False
        self._held = message.lanes[0].durable.seq
        if pending is None:
            return
        self._oracle.kernel.event("told to compare")
        if message.lost is m.UNSET:
            if pending.known:
                raise Violation("9: all is to be compared, and what was lost could be known")
            return
        self._told_ranges = True
        self._oracle.kernel.event("told what was lost")
        self._judge(pending, message.lost)

    @staticmethod
    def _judge(made: Salvage, lost: Any) -> None:
        """What differs is named, and nothing that was not touched."""
        for disk, size in enumerate(made.truth.sizes):
            named = {b for r in lost if r.disk == disk for b in _blocks(r.offset, r.length)}
            here = np.frombuffer(made.shown.read(disk, size), np.uint8)
            there = np.frombuffer(made.truth.read(disk, size), np.uint8)
            differs = set((np.flatnonzero(here != there) // BLOCK).tolist())
            if differs - named:
                raise Violation(
                    f"8: block {min(differs - named)} of disk {disk} was lost, and is not named"
                )
            if named - made.behind[disk]:
                raise Violation(
                    f"9: block {min(named - made.behind[disk])} of disk {disk} is named as lost"
                )

    def all_again(self, acknowledged: int) -> None:
        """The source will read all of its disks. It must where the target, put back to an earlier
        state before that damage, does not hold what it acknowledged."""
        known = self._told_ranges and self._held >= acknowledged
        if known and self._pending() is not None:
            raise Violation("9: all is read again, and what was lost is known")

    def ring_lost(self) -> None:
        """It has given up its ring, when it had marked what differs."""
        self._marked = self._marked or self._told

    def ended(self) -> bool:
        """A gap ends; whether it is the first behind a repair of which the source knows."""
        first, self._open = self._open and self._marked, self._open and not self._marked
        return first

    def power_lost(self) -> None:
        """What was marked may be lost as well: then it is told again."""
        self._told = self._told_ranges = self._marked = False


def _blocks(offset: int, length: int) -> set[int]:
    end = min(offset + length, DISK_BYTES_MAX)
    return set(range(offset // BLOCK, -(-end // BLOCK)))
