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
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vrep.errors import VrepError
from vrep.target import runs
from vrep.target.files import Files
from vrep.target.fold import Folded, Judge, choose, fold_segments, foldable
from vrep.target.lease import Lease
from vrep.target.manifest import Manifest, Position
from vrep.target.segment import entry_path, segment_path

__all__ = ["Upkeep"]

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
        fold_rate: int,
        folded: Callable[[], None],
    ) -> None:
        """`fold_rate` is how many bytes a second a fold may read and write, 0: no limit.
        `folded` is called when segments were replaced."""
        self.failure = ""
        self._directory = directory
        self._lease = lease
        self._files = files
        self._wall_ns = wall_ns
        self._segment_bytes = segment_bytes
        self._fold_rate = fold_rate
        self._folded = folded
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._good: set[tuple[int, int]] = set()
        self._good_at = Position()

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
            self._wanted.wait()
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
                # Nothing is lost without it; the next closed segment tries again.
                self.failure = str(error)
                log.warning("%s: upkeep failed: %s", self._directory, error)

    def step(self) -> bool:
        """Do one thing that is due; whether there was one."""
        return self.merge_once() or self.fold_once() is not None

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
        manifest = self._lease.manifest
        if not manifest.horizon.seq or not len(foldable(manifest)):
            return None
        if self._good_at != manifest.horizon:
            self._good, self._good_at = set(), manifest.horizon
        judge = Judge(self._directory, manifest)
        chosen = choose(manifest, judge, self._segment_bytes, self._good)
        if not chosen:
            return None
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
        self._good.update(
            zip(done.entries["segment"].tolist(), done.entries["generation"].tolist(), strict=True)
        )
        self._swap(done)
        self.drop_files()
        return done

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
    named = {entry_path(directory, row) for row in manifest.segments}
    named.add(segment_path(directory, manifest.active_segment))
    return [path for path in directory.glob("seg-*") if path not in named]


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
