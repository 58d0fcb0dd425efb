"""Rot: bits of a store that turn, files of it that go; what a recovery shows then, and the repair.

The target is stopped, and something of its store goes bad: records, indexes, merged runs, the
newest manifest, what an earlier repair wrote. It may run over that for a while. What is read is
what was written, or an error. Then an operator repairs it, as `vrep repair` and
`vrep repair --resend` do, each killed at some of its steps and given again, and the target goes on.

The commits of the store are looked at while they are whole. So it is known behind which position
the first loss is: every point up to there stays one, and no other is. What the store shows of the
disks at its end is compared with what it showed before: it may be another thing in the ranges alone
that the target names to the source (`salvages`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from disks import StoreFiles
from facts import DISK_BYTES_MAX, Image
from hosts import GROUP_ID
from kernel import Kernel, Process, Violation
from recoveries import Recoveries
from uses import give

from vrep._core import layout
from vrep._core import segment as native
from vrep.errors import BusyError, IntegrityError, StateError
from vrep.recovery.access import KeyAccess
from vrep.recovery.fetch import Fetcher
from vrep.recovery.repair import RepairReport, repair
from vrep.target.lost import lost_path, read_lost
from vrep.target.manifest import Manifest, Position, load_newest, manifest_numbers, manifest_path
from vrep.target.reader import StoreReader
from vrep.target.segment import entry_path, run_path, segment_path

if TYPE_CHECKING:
    from oracle import Oracle
    from sites import TargetSite

KINDS: Final = {
    "records": 8,
    "open": 4,
    "index": 2,
    "records and index": 1,
    "file": 1,
    "short": 1,
    "run": 2,
    "manifest": 1,
    "lost": 1,
}
"""what goes bad, and how often each is drawn"""
AGAIN: Final = 0.25
"""once more before the target runs"""
RUN_OVER: Final = 0.4
"""of the times the target runs over it, for a while"""
RUN_S: Final = 2.0
_ALIGN: Final = 64


@dataclass(frozen=True)
class Wound:
    """What went bad in one place."""

    kind: str
    path: Path
    whole: bytes
    """what the file held"""
    left: bytes | None
    """what it holds since; None: it is gone"""
    before: Position | None
    """every record up to here stands before it; None: it takes no records"""

    @property
    def is_open(self) -> bool:
        """Whether it is there still: nothing took the place of the file."""
        return (self.path.read_bytes() if self.path.exists() else None) == self.left


class Rot:
    """Of the store of one site."""

    def __init__(
        self,
        kernel: Kernel,
        oracle: Oracle,
        east: TargetSite,
        recoveries: Recoveries,
        make: Callable[[str], Process],
    ) -> None:
        """`make` is a process of the site that stores, by its name: of a command."""
        self._kernel = kernel
        self._rng = kernel.rng
        self._oracle = oracle
        self._east = east
        self._recoveries = recoveries
        self._make = make

    def play(self) -> None:
        """Something goes bad, once or again before the source hears of it; it is repaired."""
        kernel, rng, east = self._kernel, self._rng, self._east
        kernel.kill(east.process)
        for _ in range(1 + (rng.random() < AGAIN)):
            east.disk.settle()
            wounds = self._wound()
            if not wounds:
                break
            kernel.event("rot")
            # A target that cannot read where an earlier repair ended does not tell its source of it
            # before that is repaired, too: see docs/internals/repair.md.
            if rng.random() < RUN_OVER and not self._oracle.salvages.awaited:
                east.start()
                kernel.sleep(rng.random() * RUN_S)
                self._recoveries.read_damaged(2)
                kernel.kill(east.process)
                east.disk.settle()
            else:
                self._recoveries.read_damaged(2)
            self._repair(wounds)
        kernel.sleep(rng.random())
        east.start()

    # ---- what goes bad ------------------------------------------------------------------

    def _wound(self) -> list[Wound]:
        if not manifest_numbers(self._east.directory):
            return []
        manifest = load_newest(self._east.directory, GROUP_ID)
        found: dict[Path, Wound] = {}
        for _ in range(1 + (self._rng.random() < 0.3)):
            kind = self._rng.choices(list(KINDS), list(KINDS.values()))[0]
            if kind == "manifest" and found:
                continue  # what it names is to be read when it is made again
            wound = self._one(kind, manifest, set(found))
            if wound is None:
                continue
            found[wound.path] = wound
            if kind == "lost":
                self._oracle.salvages.losses_unknown()
            self._kernel.event(f"rot of {kind}")
            self._kernel.note(f"rot of {kind}: {wound.path.name}, sound up to {wound.before}")
            if kind == "manifest":
                break
        return list(found.values())

    def _one(self, kind: str, manifest: Manifest, taken: set[Path]) -> Wound | None:
        """Make it; None where there is nothing of its kind that is whole."""
        directory, rng, rows = self._east.directory, self._rng, manifest.segments
        if kind == "manifest":
            return self._wound_manifest(manifest)
        if kind in ("run", "lost"):
            paths = [run_path(directory, int(row["run"])) for row in manifest.runs]
            if kind == "lost":
                paths = [lost_path(directory)]
            paths = [path for path in paths if path.exists() and path not in taken]
            if not paths:
                return None
            path = rng.choice(paths)
            return self._flip(kind, path, 0, path.stat().st_size, None)
        if kind == "open":
            return self._wound_open(manifest, taken)
        if not len(rows):
            return None
        at = rng.randrange(len(rows))
        row, path = rows[at], entry_path(directory, rows[at])
        last = Position.of(rows[at - 1]["last"]) if at else Position()
        if path in taken or not path.exists():
            return None
        end, size = int(row["data_end"]), path.stat().st_size
        if kind == "index":
            return self._flip(kind, path, end, size, None)
        number, folded = int(row["segment"]), bool(row["generation"])
        if kind == "file":
            whole = path.read_bytes()
            path.unlink()
            return Wound(kind, path, whole, None, last)
        if kind == "short":
            whole, cut = path.read_bytes(), rng.randrange(1, size)
            path.write_bytes(whole[:cut])
            before = None if cut >= end else _sound_before(whole[:end], number, cut, last)
            before = last if folded and cut < end else before
            return Wound(kind, path, whole, whole[:cut], before)
        byte = rng.randrange(end)
        before = last if folded else _sound_before(path.read_bytes()[:end], number, byte, last)
        wound = self._flip(kind, path, byte, byte + 1, before)
        if kind == "records and index":
            left = self._flip(kind, path, end, size, before).left
            wound = replace(wound, left=left)
        return wound

    def _flip(self, kind: str, path: Path, start: int, end: int, before: Position | None) -> Wound:
        whole, byte = path.read_bytes(), self._rng.randrange(start, end)
        data = bytearray(whole)
        data[byte] ^= 1 << self._rng.randrange(8)
        path.write_bytes(data)
        return Wound(kind, path, whole, bytes(data), before)

    def _wound_open(self, manifest: Manifest, taken: set[Path]) -> Wound | None:
        """What a later commit proves to have been durable: behind that, it is a torn tail."""
        number = manifest.active_segment
        path = segment_path(self._east.directory, number)
        if not number or path in taken or not path.exists():
            return None
        data = path.read_bytes()
        _result, commits = native.scan(data, GROUP_ID, number, commits=True)
        if len(commits) < 2:
            return None
        rows = manifest.segments
        last = Position.of(rows[-1]["last"]) if len(rows) else Position()
        byte = self._rng.randrange(int(commits[-1]["start"]))
        return self._flip("open", path, byte, byte + 1, _sound_before(data, number, byte, last))

    def _wound_manifest(self, manifest: Manifest) -> Wound | None:
        """The newest. Not when it alone knows an epoch: that cannot be made again, and in a world
        where no view tells of a failover nobody would notice."""
        directory = self._east.directory
        numbers = manifest_numbers(directory)
        if len(numbers) < 2:
            return None
        older = Manifest.decode(manifest_path(directory, numbers[-2]).read_bytes())
        if older.epochs != manifest.epochs:
            return None
        path = manifest_path(directory, numbers[-1])
        return self._flip("manifest", path, 0, path.stat().st_size, None)

    # ---- the repair ---------------------------------------------------------------------

    def _repair(self, wounds: list[Wound]) -> None:
        kernel, oracle, directory = self._kernel, self._oracle, self._east.directory
        wounds = [wound for wound in wounds if wound.is_open]
        report = self._give("repair", resend=False)
        sound = [wound.before for wound in wounds if wound.before is not None]
        if not report.lost:
            if sound:
                raise Violation(f"7: a repair finds nothing lost, and there is: {wounds[0].kind}")
            kernel.event("repair")
            self._recoveries.look(1, whole=True)
            return
        if not sound:
            if [wound.kind for wound in wounds] == ["manifest"]:
                self._bring_back(wounds)  # it says so, and changes nothing
                return
            raise Violation(f"7: a repair takes what is whole for lost: {report.lost[0]}")
        manifest = load_newest(directory, GROUP_ID)
        with_end, cut_off = oracle.salvages.end, kernel.events["cut off command"]
        try:
            report = self._give("repair --resend", resend=True, ends=(StateError,))
        except BusyError as error:
            kernel.note(f"somebody reads the history: {error}")
            self._bring_back(wounds)
            return
        except StateError as error:
            kernel.note(f"nothing is kept: {error}")
            kernel.event("nothing kept")
            self._bring_back(wounds)
            return
        kernel.event("resend")
        end = min(sound)
        if not end.seq or not manifest.keeps(end):
            end = Position()
        wanted = f"pos:{end}" if end.seq else ""
        if report.lost and report.kept_to != wanted:  # else it was cut off when that was done
            raise Violation(f"7: a repair keeps all up to {report.kept_to!r}, not {wanted!r}")
        whole = kernel.events["cut off command"] == cut_off
        self._told(end, with_end, report, wounds, whole=whole)
        self._recoveries.look(2, whole=True)

    def _told(
        self,
        end: Position,
        was: Position,
        report: RepairReport,
        wounds: list[Wound],
        *,
        whole: bool,
    ) -> None:
        """The oracle hears what the store is now. `whole`: no repair was cut off."""
        current, self._kernel.current = self._kernel.current, None
        try:
            with StoreReader(self._east.paths.store, GROUP_ID) as reader:
                here = reader.durable
                if here == end:
                    self._oracle.salvages.cut_at(end)
                    return
                access = KeyAccess.open(self._east.paths, GROUP_ID, reader.wrapped_keys)
                shown = self._shown(reader, access, here)
                store_id = reader.manifest.store_id
        finally:
            self._kernel.current = current
        if here > was:
            raise Violation(f"7: a repair made {here} out of a history that ended at {was}")
        lost = read_lost(self._east.directory, GROUP_ID, store_id, here)
        told = None if lost is None else sum(one.length for one in lost)
        if report.lost and report.compared_bytes != told:
            raise Violation("7: a repair says another thing than it wrote")
        # One that was cut off may have put a front in the place of a segment, and its index.
        known = whole and all(wound.kind in ("records", "run", "index") for wound in wounds)
        self._oracle.salvages.made(end, here, shown, known=known)

    def _shown(self, reader: StoreReader, access: KeyAccess, at: Position) -> Image:
        """What the store shows at its end, point or not. All that it shows can be read."""
        image = Image([disk.bytes for disk in reader.disks_at(at)])
        fetcher = Fetcher(reader, reader.extent_map(at), access)
        for disk in range(len(image.sizes)):
            try:
                data = fetcher.read(disk, 0, DISK_BYTES_MAX)
            except IntegrityError as error:
                raise Violation(f"7: a repair kept what is damaged: {error}") from None
            image.put(disk, 0, bytes(data or b""))
        return image

    def _give(self, name: str, *, resend: bool, ends: tuple[Any, ...] = ()) -> RepairReport:
        paths, disk = self._east.paths, self._east.disk

        def make() -> Process:
            process = self._make(name)
            process.names["Files"] = functools.partial(StoreFiles, process, disk)
            return process

        def run() -> RepairReport:
            disk.settle()
            return repair(paths, GROUP_ID.hex(), resend=resend)

        try:
            report = give(self._kernel, make, name, run, ends=ends, cut_off=0.5)
        finally:
            disk.settle()
        assert isinstance(report, RepairReport)
        return report

    def _bring_back(self, wounds: list[Wound]) -> None:
        """From a copy that the operator has."""
        for wound in wounds:
            if wound.is_open:
                wound.path.write_bytes(wound.whole)
        self._east.disk.settle()


def _sound_before(data: bytes, number: int, byte: int, last: Position) -> Position:
    """The last position before the commit of a segment that a byte belongs to; `last` is that of
    the segment before."""
    _result, commits = native.scan(data, GROUP_ID, number, commits=True)
    for commit in commits:
        end = -(-int(commit["end"]) // _ALIGN) * _ALIGN + layout.COMMIT.itemsize
        if byte < end:
            break
        last = Position.of(commit["last"])
    return last
