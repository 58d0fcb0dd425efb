"""Verify: prove that a recovery point recovers, and keep a signed verdict on it.

Every byte of a group's store is read anew: manifests, segments, their indexes, merged runs, and
with the tenant's key every tally (see `check`, `objects`). Then the point, and a sample of others,
are rebuilt: each written byte of each disk is opened and authenticated. The file systems of the
point are checked on a view, and a command of the user's may look at it; the view is taken down
whatever happens. Replication goes on untouched: the store is only read.

Without the tenant's key nothing can be opened: what is proven then is that the objects are whole,
and the verdict says `intact`, never `good`. Sizes are bytes, times seconds.
"""

from __future__ import annotations

import hashlib
import logging
import random
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from vrep import errors
from vrep.durable import make_private_directory
from vrep.keys.errors import UnknownKeyError
from vrep.keys.identity import SiteIdentity
from vrep.paths import SitePaths
from vrep.recovery.access import KeyAccess
from vrep.recovery.alone import alone
from vrep.recovery.check import check_history
from vrep.recovery.fetch import Fetcher
from vrep.recovery.filesystems import find_file_systems, run_command, run_e2fsck
from vrep.recovery.held import HeldGroup, find_group
from vrep.recovery.history import Found, History, resolve
from vrep.recovery.objects import ReadFirst, check_manifests, check_runs, damage_of, survey
from vrep.recovery.point import kind_of, parse_position
from vrep.recovery.verdict import (
    Check,
    Damage,
    Finding,
    RebuiltDisk,
    SignedVerdict,
    VerdictBook,
    VerdictInfo,
    anchor_of,
    history_of,
    judge,
)
from vrep.recovery.view import ViewDirectory, describe, discard, start_test, view_directories
from vrep.target.manifest import DiskEntry, Position
from vrep.target.reader import StoreReader

__all__ = ["VerifyOptions", "VerifyReport", "verify"]

CHUNK_BYTES: Final = 4 << 20
SAMPLE_TRIES: Final = 8
Progress = Callable[[str, int, int], None]
"""what is done ("check" or a disk's name), bytes so far, bytes in all"""

log = logging.getLogger("vrep.recovery")


@dataclass(frozen=True)
class VerifyOptions:
    """How much is done."""

    samples: int = 1
    """other points that are rebuilt as well: the oldest first, then at random"""
    file_systems: bool = True
    """e2fsck on every ext file system of the point"""
    command: str = ""
    """run on a view of the point; its exit status is part of the verdict"""
    limit_s: float = 3600.0
    """of each e2fsck, and of the command"""


class VerifyReport(msgspec.Struct, frozen=True):
    """What a verification found."""

    group: str
    group_id: str
    result: str
    """good, intact or bad: the worst of the verdicts"""
    verdicts: list[VerdictInfo]
    """the point that was asked for, then the samples"""
    objects: dict[str, int]
    records: int
    tallies: int
    bytes: int
    """of the store, all read"""
    key_held: bool
    folded_to: str
    """up to here the target has folded, and what it left out there is not proven; empty: nowhere"""
    note: str
    seconds: float


@dataclass
class _Store:
    """What the check of the whole store found; it holds for every point."""

    damages: list[Damage] = field(default_factory=list)
    objects: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    records: int = 0
    tallies: int = 0
    tallied_to: str = ""
    folded_to: str = ""


def verify(
    paths: SitePaths,
    group: str,
    at: str = "latest",
    *,
    options: VerifyOptions | None = None,
    progress: Progress | None = None,
    rng: random.Random | None = None,
) -> VerifyReport:
    """Verify a group (its name or id) at a point. What is wrong with the store or the point is in
    the verdicts; LockedError while another verification runs here."""
    held = find_group(paths, group)
    with alone(paths):
        for view in view_directories(paths):
            if view.load().kind == "verify":
                discard(view)  # of a verification that died
        work = _Verification(paths, held, options or VerifyOptions(), progress)
        try:
            reader = ReadFirst(paths.store, held.group_id)
        except errors.IntegrityError as error:
            return work.unreadable(at, error)
        with reader:
            return work.run(reader, at, rng or random.Random())


class _Verification:
    """One verification of one group."""

    def __init__(
        self, paths: SitePaths, held: HeldGroup, options: VerifyOptions, progress: Progress | None
    ) -> None:
        self._paths = paths
        self._held = held
        self._options = options
        self._progress = progress
        self._identity = SiteIdentity.load(paths.root)
        self._book = VerdictBook(paths, held.group_id)
        self._began = time.monotonic()
        self._manifest = held.manifest
        self._store = _Store()
        self._access: KeyAccess | None = None
        self._note = ""

    # ---- the store -------------------------------------------------------------------

    def unreadable(self, at: str, error: errors.IntegrityError) -> VerifyReport:
        """The store cannot be opened at all. The verdict is on the point, where it names its
        position; else on the last that is known."""
        manifest, directory = self._manifest, self._paths.store / self._held.hex
        found = survey(directory, self._held.group_id, manifest)
        self._store.damages = found or [damage_of(error, manifest)]
        if kind_of(at.strip()) == "position":
            position = Position(*parse_position(at.strip()))
        elif len(manifest.segments):
            position = Position.of(manifest.segments[-1]["last"])
        else:
            raise error
        verdict = self._verdict(position, 0, "", "bad")
        self._book.store(verdict, self._identity)
        return self._report([position], None)

    def run(self, reader: StoreReader, at: str, rng: random.Random) -> VerifyReport:
        manifest = self._manifest = reader.manifest
        self._open_key(reader)
        try:
            asked = resolve(reader, at, self._access, time.time_ns())
            history = History(reader)
        except errors.IntegrityError as error:
            return self.unreadable(at, error)
        self._check_store(reader)
        chosen = [asked]
        if self._access is not None and not self._store.damages:
            # A rebuild alone does not replace the word of more than that.
            deeper = {
                position
                for position, found in self._book.all()
                if isinstance(found, SignedVerdict)
                and (found.finding.checks or found.finding.result == "bad")
            }
            chosen += _sample(history, {asked.position, *deeper}, self._options.samples, rng)
        for found in reversed(chosen):  # the point that was asked for last: it is the newest word
            verdict = self._examine(reader, history, found, whole=found is asked)
            self._book.store(verdict, self._identity)
        log.info("group %s: verified at %s", manifest.name, asked.position)
        return self._report([found.position for found in chosen], history)

    def _open_key(self, reader: StoreReader) -> None:
        try:
            self._access = KeyAccess.open(self._paths, reader.group_id, reader.wrapped_keys)
        except UnknownKeyError as error:
            self._note = f"nothing was opened: the tenant's key is not held here ({error.detail})"
        except errors.TenantKeyError as error:
            # The key is here, and does not open what it should.
            self._store.damages.append(Damage("manifest", "", "", error.detail))

    def _check_store(self, reader: StoreReader) -> None:
        """Every object, every record's order, every tally."""
        store, directory, manifest = self._store, reader.directory, reader.manifest
        progress = self._progress
        try:
            verdict = check_history(
                self._paths,
                reader,
                self._access,
                progress=None if progress is None else lambda d, t: progress("check", d, t),
                fresh=True,
            )
        except errors.IntegrityError as error:
            found = survey(directory, reader.group_id, manifest)
            store.damages += found or [damage_of(error, manifest)]
        else:
            store.records, store.tallies = verdict.records, verdict.tallies
            store.tallied_to, store.folded_to = verdict.tallied_to, verdict.folded_to
        active = [n for n in reader.numbers() if n == manifest.active_segment]
        store.bytes = int(manifest.segments["file_bytes"].sum()) + sum(
            len(reader.segment(number)) for number in active
        )
        count, damaged = check_manifests(directory, reader.group_id)
        store.objects["manifests"] = count
        store.objects["segments"] = store.objects["indexes"] = len(reader.numbers())
        if not store.damages:  # a run is compared with segments that are whole
            runs, wrong = check_runs(reader, make_private_directory(self._paths.verdicts))
            store.objects["runs"] = runs
            damaged += wrong
        store.damages += damaged

    # ---- points ----------------------------------------------------------------------

    def _examine(
        self, reader: StoreReader, history: History, found: Found, *, whole: bool
    ) -> SignedVerdict:
        """Rebuild a point; `whole`: look at its file systems as well."""
        position = found.position
        damages: list[Damage] = []
        disks: list[RebuiltDisk] = []
        checks: list[Check] = []
        anchor = ""
        if not self._store.damages:
            try:
                anchor = anchor_of(_line_of(reader, history, position), position)
                if self._access is not None:
                    fetcher = Fetcher(reader, reader.extent_map(position), self._access)
                    disks = [self._rebuild(fetcher, disk) for disk in reader.disks_at(position)]
                    damages += self._compare(position, disks)
                    if whole:
                        checks = self._look(reader, fetcher, position, damages)
            except errors.IntegrityError as error:
                damages.append(damage_of(error, reader.manifest))
        bad = damages or self._store.damages or any(c.result == "bad" for c in checks)
        result = "bad" if bad else "good" if self._access is not None else "intact"
        return self._verdict(position, found.wall_ns, anchor, result, disks, checks, damages)

    def _rebuild(self, fetcher: Fetcher, disk: DiskEntry) -> RebuiltDisk:
        """Open every written byte of a disk."""
        digest, total = hashlib.sha256(), 0
        at = fetcher.next_written(disk.index, 0)
        while at is not None and at < disk.bytes:
            at -= at % CHUNK_BYTES
            length = min(CHUNK_BYTES, disk.bytes - at)
            data = fetcher.read(disk.index, at, length)
            if data is not None and np.frombuffer(data, np.uint8).any():
                digest.update(struct.pack("<QQ", at, length))
                digest.update(data)
                total += length
            if self._progress is not None:
                self._progress(disk.name, at + length, disk.bytes)
            at = fetcher.next_written(disk.index, at + length)
        return RebuiltDisk(disk.name, disk.bytes, total, digest.hexdigest())

    def _compare(self, position: Position, disks: list[RebuiltDisk]) -> list[Damage]:
        """What a point holds cannot change: an earlier verdict says what it was."""
        known = dict(self._book.all()).get(position)
        if not isinstance(known, SignedVerdict) or known.finding.result != "good":
            return []
        if known.store_id != self._manifest.store_id or known.finding.history != history_of(
            self._manifest, position
        ):
            return []
        before = {disk.name: disk.sha256 for disk in known.finding.disks}
        text = "it holds other bytes than when the point was verified before"
        return [
            Damage("history", "", f"pos:{position}", f"disk {disk.name}: {text}")
            for disk in disks
            if before.get(disk.name, disk.sha256) != disk.sha256
        ]

    def _look(
        self, reader: StoreReader, fetcher: Fetcher, position: Position, damages: list[Damage]
    ) -> list[Check]:
        """File systems and the user's command, on a view that is gone afterwards."""
        options = self._options
        found, checks = [], []
        for disk in reader.disks_at(position) if options.file_systems else ():
            here = find_file_systems(disk.name, disk.bytes, _reading(fetcher, disk))
            found += here
            if not here:
                text = "no ext2, ext3 or ext4 file system was recognised"
                checks.append(Check("e2fsck", disk.name, "skipped", text))
        if not found and not options.command:
            return checks
        view = start_test(self._paths, self._held.hex, f"pos:{position}", kind="verify")
        directory = ViewDirectory(self._paths, view.id)
        try:
            checks += run_e2fsck(view, found, options.limit_s)
            if options.command:
                checks.append(run_command(view, options.command, options.limit_s))
            for condition in describe(directory).conditions:
                if not condition.startswith("unreadable: "):
                    raise errors.RecoveryError(f"the view failed: {condition}")
                damages.append(damage_of(errors.CorruptError(condition), reader.manifest))
        finally:
            discard(directory)
        return checks

    # ---- the result ------------------------------------------------------------------

    def _verdict(
        self,
        position: Position,
        time_ns: int,
        anchor: str,
        result: str,
        disks: list[RebuiltDisk] | None = None,
        checks: list[Check] | None = None,
        damages: list[Damage] | None = None,
    ) -> SignedVerdict:
        store, manifest = self._store, self._manifest
        finding = Finding(
            group=manifest.name,
            time_ns=time_ns,
            result=result,  # type: ignore[arg-type]
            site=self._identity.name,
            site_id=self._identity.site_id,
            fingerprint=self._identity.fingerprint,
            manifest=manifest.number,
            history=history_of(manifest, position),
            anchor=anchor,
            records=store.records,
            tallies=store.tallies,
            tallied_to=store.tallied_to,
            objects=store.objects,
            disks=disks or [],
            checks=checks or [],
            damages=store.damages + (damages or []),
            note=self._note,
            seconds=round(time.monotonic() - self._began, 3),
            folded_to=store.folded_to,
        )
        return SignedVerdict(
            manifest.group_id, manifest.store_id, position, time.time_ns(), finding
        )

    def _report(self, positions: list[Position], history: History | None) -> VerifyReport:
        known = {p: v for p, v in self._book.all() if p in positions}
        durable = history.reader.durable if history is not None else None
        infos = judge([(p, known[p]) for p in positions], self._manifest, durable, history)
        states = [info.state for info in infos]
        order = ("damaged", "void", "bad", "intact", "good")
        worst = min(states, key=order.index)
        store, manifest = self._store, self._manifest
        return VerifyReport(
            group=manifest.name,
            group_id=manifest.group_id.hex(),
            result=worst if worst in ("good", "intact") else "bad",
            verdicts=infos,
            objects=store.objects,
            records=store.records,
            tallies=store.tallies,
            bytes=store.bytes,
            key_held=self._access is not None,
            folded_to=store.folded_to,
            note=self._note,
            seconds=round(time.monotonic() - self._began, 3),
        )


def _reading(fetcher: Fetcher, disk: DiskEntry) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        data = fetcher.read(disk.index, offset, length)
        return bytes(length) if data is None else bytes(data)

    return read


def _line_of(reader: StoreReader, history: History, position: Position) -> History:
    """The line that a point belongs to: not always the accepted one."""
    return history if history.visible(position) else History(reader, position)


def _sample(
    history: History, without: set[Position], count: int, rng: random.Random
) -> list[Found]:
    """Points of the line: the oldest, then any. Fewer where there are not so many."""
    chosen: dict[Position, Found] = {}
    ranges = history.ranges
    tries = [ranges[0].first] if ranges else []
    while ranges and len(tries) < 1 + count * SAMPLE_TRIES:
        inside = rng.choice(ranges)
        first, last = inside.first, inside.last
        low = first.seq if first.epoch == last.epoch else 1
        tries.append(last._replace(seq=rng.randint(low, last.seq)))
    for position in tries:
        if len(chosen) >= count:
            break
        if position in without or position in chosen or not history.visible(position):
            continue
        if not any(r.first <= position <= r.last for r in ranges):
            continue
        found = history.locate(position)
        if found is not None and found.position == position:
            chosen[position] = found
    return list(chosen.values())
