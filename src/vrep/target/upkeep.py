"""Upkeep of a store: indexes are merged, what is before the horizon is folded, files go.

One thread at low priority does it, step by step; each step is a manifest or nothing, so it may
be cut off anywhere. What fails is kept in `failure`, and tried again later: reading and appending
work without it. Sizes are bytes, times seconds.

Threads: `merge_once` and `fold_once` belong to that thread, or to a test instead of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from vrep.errors import StoreFullError, VrepError
from vrep.listing import names_in
from vrep.target import runs
from vrep.target.files import Files
from vrep.target.fold import Folded, Good, Judge, Live, choose, fold_segments, foldable, name_of
from vrep.target.lease import Lease
from vrep.target.manifest import Manifest, Position
from vrep.target.segment import segment_name
from vrep.target.window import (
    SHORTEN,
    Growth,
    common_point,
    had_since_ns,
    next_by_space,
    next_by_time,
)

__all__ = ["Upkeep"]

LOOK_S: Final = 5.0
"""at most so long after its time the horizon is moved"""
COUNT_S: Final = 3600.0
"""of what passed for a store at most so much is lost with the host's next boot"""
SPARE_BYTES: Final = 4 << 20
"""of a full disk that no fold uses"""

log = logging.getLogger("vrep.target")


class Upkeep:
    """Keeps one store in order."""

    def __init__(
        self,
        directory: Path,
        lease: Lease,
        files: Files,
        wall_ns: Callable[[], int],
        *,
        segment_bytes: int,
        reserve_bytes: Callable[[], int],
        fold_rate: int,
        held: Callable[[], Sequence[Position]],
        used: Callable[[], int],
        recoverable: Callable[[Position], bool],
        folded: Callable[[], None],
    ) -> None:
        """`fold_rate` is how many bytes a second a fold may read and write, 0: no limit.
        `held` names points that are in use, offered or not; `used` is how many bytes the store
        has, `recoverable` whether a position is a recovery point of the accepted line. `folded`
        is called when segments were replaced."""
        self.growth = Growth()
        self.held_at = Position()
        """where points in use stop the fold before the horizon; seq 0: nothing does"""
        self.failure = ""
        self._directory = directory
        self._lease = lease
        self._files = files
        self._wall_ns = wall_ns
        self._segment_bytes = segment_bytes
        self._reserve_bytes = reserve_bytes
        self._fold_rate = fold_rate
        self._held = held
        self._used = used
        self._recoverable = recoverable
        self._folded = folded
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._good: Good = {}
        self._weighed = (0, 0)
        self._good_at = Position()
        self._had_since: tuple[Position, int] = (Position(), 0)

    def start(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=f"upkeep:{name}", daemon=True)
        self._wanted.set()
        self._thread.start()

    def wake(self) -> None:
        """There may be something to do."""
        self._wanted.set()

    def close(self) -> None:
        """End the thread; a fold that is under way is given up."""
        self._closing.set()
        self._wanted.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while True:
            self._wanted.wait(LOOK_S)
            self._wanted.clear()
            if self._closing.is_set():
                return
            try:
                while self.step() and not self._closing.is_set():
                    continue
                self.failure = ""
            except _GivenUpError:
                return
            except (VrepError, OSError) as error:
                # Nothing is lost without it, and it is tried again.
                if self.failure != str(error):
                    log.warning("%s: upkeep failed: %s", self._directory, error)
                self.failure = str(error)

    def step(self) -> bool:
        """Do one thing that is due; whether there was one."""
        self.growth.note(time.monotonic(), self._used())
        if self.merge_once() or self.fold_once() is not None or self.move_horizon():
            return True
        self.note_age()
        self.drop_files()  # of readers that have ended
        return False

    # ---- the horizon -------------------------------------------------------------------

    def move_horizon(self) -> bool:
        """Move the horizon on, when the window or want of room says so."""
        manifest = self._lease.manifest
        if manifest.current_epoch is not manifest.accepted_epoch:
            return False  # a failover is not decided
        found = None
        if manifest.window_s:
            aged_ns = self._lease.aging.now_ns()
            found = next_by_time(self._directory, manifest, aged_ns, self._recoverable)
        if found is None and self._pressed(manifest):
            found = next_by_space(manifest, self._recoverable)
            if found is not None:
                log.warning("%s: the window is shortened: it begins at %s", manifest.name, found)
        if found is None:
            return False
        with self._lease.lock:
            now = self._lease.manifest
            if now.epochs != manifest.epochs or now.horizon != manifest.horizon:
                return True  # look again
            self._lease.publish(horizon=found)
        return True

    def note_age(self) -> None:
        """Write down what has passed, now and then: the manifests of a quiet store are old. Not
        on a full disk, where a failover may need the room."""
        if self._files.free_bytes(self._directory) < SPARE_BYTES:
            return
        with self._lease.lock:
            since_ns = self._lease.aging.now_ns() - self._lease.manifest.count.aged_ns
            if self._lease.manifest.window_s and since_ns > COUNT_S * 1e9:
                self._lease.publish()

    def horizon_had_s(self, manifest: Manifest) -> float | None:
        """For how long the store has had the oldest point that is kept; None without one, or where
        the index that knows is damaged."""
        horizon = manifest.horizon
        if not horizon.seq:
            return None
        now_ns = self._lease.aging.now_ns()
        known, since_ns = self._had_since
        if known != horizon:
            try:
                found = had_since_ns(self._directory, manifest, horizon)
            except (VrepError, OSError):
                return None  # who reads it will name it
            if found is None:
                return 0.0
            since_ns = found
            self._had_since = (horizon, since_ns)
        return (now_ns - since_ns) / 1e9

    def _pressed(self, manifest: Manifest) -> bool:
        """Whether room is wanted that a shorter window would give. Points in use, or files that
        readers hold, would give none."""
        if self.held_at.seq or self.stale_bytes():
            return False
        if manifest.quota_bytes and self._used() >= SHORTEN * manifest.quota_bytes:
            return True
        bounded = manifest.quota_bytes or manifest.window_s
        kept = self._reserve_bytes()
        low = kept + 2 * self._segment_bytes if kept else 0
        return bool(bounded) and self._files.free_bytes(self._directory) < low

    # ---- runs --------------------------------------------------------------------------

    def merge_once(self) -> bool:
        """Merge one set of neighbours, if there is one."""
        manifest = self._lease.manifest
        chosen = runs.units_to_merge(manifest)
        if not chosen:
            return False
        entry = runs.merge_units(self._directory, manifest, chosen, self._files)
        self._files.sync_directory(self._directory)
        with self._lease.lock:
            self._lease.publish(runs=runs.replace_runs(self._lease.manifest, entry))
        self.drop_files()
        return True

    # ---- folds -------------------------------------------------------------------------

    def fold_once(self) -> Folded | None:
        """Fold some neighbours, if that is worth it; what was made."""
        manifest = self._foldable_to()
        if not manifest.horizon.seq:
            return None
        if self._good_at != manifest.horizon:
            self._good, self._good_at = {}, manifest.horizon
        if all(name_of(row) in self._good for row in foldable(manifest)):
            return None
        judge = Judge(self._directory, manifest)
        chosen = choose(manifest, judge, self._segment_bytes, self._good)
        if not chosen:
            self._weigh(manifest)
            return None
        chosen = chosen[: self._that_fit(chosen)]
        done = fold_segments(
            self._directory,
            manifest,
            judge,
            chosen,
            self._files,
            segment_bytes=self._segment_bytes,
            wall_ns=self._wall_ns(),
            pace=_Pace(self._fold_rate, self._closing),
        )
        # What it left is as good as it gets here, so a step is never made over and over.
        shown = sum(live.shown_bytes for _row, live in chosen)
        for row in done.entries:
            size = int(row["data_bytes"])
            self._good[name_of(row)] = (min(shown, size), size)
            shown -= min(shown, size)
        self._swap(done)
        self.drop_files()
        return done

    def _weigh(self, manifest: Manifest) -> None:
        """Of what is folded: bytes that the disks show at the horizon, and all."""
        known = [self._good.get(name_of(row), (0, 0)) for row in foldable(manifest)]
        self._weighed = (sum(shown for shown, _all in known), sum(size for _shown, size in known))

    def _foldable_to(self) -> Manifest:
        """The manifest, with the horizon where points in use allow it. They are asked for after
        the horizon is durable: whoever notes a point as used looks at the horizon afterwards."""
        manifest = self._lease.manifest
        if not manifest.horizon.seq:
            return manifest
        common = common_point(manifest, self._held())
        self.held_at = common if common != manifest.horizon else Position()
        return replace(manifest, horizon=common)

    def _that_fit(self, chosen: Sequence[tuple[Any, Live]]) -> int:
        """How many of some segments can be folded into the room that there is. The reserve, which
        appending leaves alone, is for this."""
        room = self._files.free_bytes(self._directory) - SPARE_BYTES
        needed = 0
        for count, (row, live) in enumerate(chosen):
            share = 1 - live.dead_share
            needed += int(int(row["data_end"]) * share) + int(row["file_bytes"] - row["data_end"])
            if needed > room and count:
                return count
            if needed > room:
                raise StoreFullError(f"{needed} bytes are needed to fold, {room} are free")
        return len(chosen)

    def _swap(self, done: Folded) -> None:
        """The manifest that names the new files in the place of the old ones."""
        with self._lease.lock:
            manifest = self._lease.manifest
            numbers = manifest.segments["segment"]
            apart = (numbers < done.first) | (numbers > done.last)
            rows = np.concatenate([manifest.segments[apart], done.entries])
            self._lease.publish(
                segments=rows[np.argsort(rows["segment"], kind="stable")],
                runs=runs.without_runs(manifest, done.first, done.last),
                folded_bytes=manifest.folded_bytes + done.output_bytes,
            )
        self._folded()

    # ---- files -------------------------------------------------------------------------

    def drop_files(self) -> None:
        """Remove what no manifest names and no reader holds."""
        with self._lease.lock:
            manifest = self._lease.manifest
            stale = [*stale_segments(self._directory, manifest)]
            stale += runs.stale_runs(self._directory, manifest)
            if stale and not runs.pinned(self._directory):
                for path in stale:
                    self._files.unlink(path)

    def status(self, manifest: Manifest) -> dict[str, Any]:
        """Figures of the folds: what was written in all for each byte that was received, and what
        of the segments that were weighed is dead."""
        received = manifest.received_bytes
        live, total = self._weighed
        return {
            "horizon": str(manifest.horizon) if manifest.horizon.seq else None,
            "folded_bytes": manifest.folded_bytes,
            "write_amplification": round(1 + manifest.folded_bytes / received, 4)
            if received
            else 1.0,
            "dead_share": round(1 - live / total, 4) if total else 0.0,
            "stale_bytes": self.stale_bytes(),
            "held_at": str(self.held_at) if self.held_at.seq else None,
        }

    def stale_bytes(self) -> int:
        """Of files that no manifest names, and that readers hold."""
        found = 0
        for path in stale_segments(self._directory, self._lease.manifest):
            try:
                found += path.stat().st_size
            except FileNotFoundError:
                continue  # removed since the listing
        return found


def stale_segments(directory: Path, manifest: Manifest) -> list[Path]:
    """Segments that a manifest does not name."""
    numbers = zip(
        manifest.segments["segment"].tolist(), manifest.segments["generation"].tolist(), strict=True
    )
    named = {segment_name(number, generation) for number, generation in numbers}
    named.add(segment_name(manifest.active_segment))
    return [
        directory / name
        for name in names_in(directory)
        if name.startswith("seg-") and name not in named
    ]


class _GivenUpError(Exception):
    """The store is closed in the middle of a fold."""


class _Pace:
    """Holds a fold back to its rate, and ends it when the store closes."""

    def __init__(self, rate: int, closing: threading.Event) -> None:
        self._rate = rate
        self._closing = closing
        self._began = time.monotonic()
        self._done = 0

    def __call__(self, size: int) -> None:
        self._done += size
        ahead_s = self._done / self._rate - (time.monotonic() - self._began) if self._rate else 0.0
        if self._closing.wait(max(0.0, ahead_s)):
            raise _GivenUpError
