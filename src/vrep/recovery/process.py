"""The process of one view: ``python -m vrep.recovery.process DIR``, or a fork of the command
that starts it.

It goes to the background, reads from its standard input what to serve, serves it, and says
so, or what is wrong, in one line of JSON on its standard output. Then it needs nobody. What to
serve is a line of JSON: ``{"view": ID}`` for a view that stands, and with ``"group"`` and
``"at"`` a test that is to be made: only this process reads the store then, and only once.
The key is read from DIR/keys and lives in this process only.
"""

from __future__ import annotations

import os

if __name__ == "__main__" and os.fork():
    # Nobody has to wait for a view. Before anything is imported: one thread, little memory.
    os._exit(0)

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from vrep import errors, threads
from vrep._core.changes import CHANGED
from vrep._core.filter import Disk, Group, Miss
from vrep._core.serve import Server
from vrep.control import ControlServer
from vrep.paths import SitePaths, socket_gid
from vrep.recovery.access import KeyAccess
from vrep.recovery.changes import changed, changes_between
from vrep.recovery.compare import Comparer, Runs
from vrep.recovery.fetch import Fetcher
from vrep.recovery.filling import Anew, FillCount, InPlace
from vrep.recovery.view import (
    PROTECTED,
    TOLD_TO_END,
    RecordedDisk,
    ViewDirectory,
    ViewInfo,
    begin_test,
    bitmap_name,
    info_of,
    served_by_filter,
)
from vrep.settings import load_config
from vrep.target.manifest import Position
from vrep.target.reader import StoreReader

__all__ = ["View"]

FETCHERS: Final = 3
BATCH: Final = 8
FILL_BYTES: Final = 1 << 20
FILL_AGAIN_S: Final = 1.0
"""before what could not be filled is tried again"""
FILL_NICE: Final = 10
CONDITIONS_MAX: Final = 8
HOLD_S: Final = 30.0
"""how long nobody is answered when the command that wanted that was killed"""
DRAIN_MS: Final = 5000


class View:
    """A view that is served, until `request_stop`."""

    def __init__(self, paths: SitePaths, view_id: str, reader: StoreReader | None = None) -> None:
        self._directory = ViewDirectory(paths, view_id)
        self._config = load_config(paths.config)
        self._stopping = threading.Event()
        self._broken = False
        """it ends because nobody can be served: whoever looks after views is to begin it again"""
        self._door = threading.Lock()
        self._released = threading.Event()
        self._released.set()
        """not while it is held"""
        self._held_to_s = 0.0
        self._closing = threading.Event()
        self._turn = threading.Lock()
        self._counts = threading.Lock()
        self._problems: dict[str, int] = {}
        self._filled_to: dict[str, int] = {}
        self._fill_wanted = threading.Event()
        self._fill_done = False
        self._threads: list[threading.Thread] = []
        with contextlib.ExitStack() as stack:
            lock = self._directory.take_lock()
            stack.callback(self._let_go, lock)
            # Not before: whoever ends a view holds its lock until the record says so, or is gone.
            self._record = self._directory.load()
            if self._record.state == "rolling-back":
                raise errors.StateError(f"view {view_id} is being rolled back")
            if self._record.state == PROTECTED:
                raise errors.StateError(f"the disks of view {view_id} are a group's")
            self._reader = stack.enter_context(
                reader
                or StoreReader(paths.store, bytes.fromhex(self._record.group_id), scattered=True)
            )
            self._open_history(paths)
            self._disks: list[Anew | InPlace] = []
            stack.callback(self._close_disks)  # once nobody asks for what they hold
            self._group = stack.enter_context(self._open_group())
            self._open_disks()
            if served_by_filter(paths, self._record):  # now that the disks' locks are held here
                raise errors.StateError(f"the disks of view {view_id} are a group's")
            if self._record.since is not None:
                self._offer_changes(Position(*self._record.since))
            paths.admit_users(int(self._config.recovery.socket_mode, 8))
            self._server = self._new_server()
            stack.callback(lambda: self._server.stop())
            self._control = stack.enter_context(
                ControlServer(
                    self._directory.control,
                    {
                        "status": self._status,
                        "stop": self._stop_requested,
                        "fill": self._fill,
                        "hold": self._hold,
                        "go_on": self._go_on,
                    },
                )
            )
            self._server.start()
            self._stack = stack.pop_all()
        for number in range(FETCHERS):
            self._start(self._fetch_loop, f"fetch:{number}")
        if self._record.kind == "failover":
            self._fill_wanted.set()
        self._start(self._fill_loop, "fill")

    def _let_go(self, lock: int) -> None:
        if self._stopping.is_set() and not self._broken:
            self._directory.note_in_lock(lock, TOLD_TO_END)
        os.close(lock)

    def _new_server(self) -> Server:
        return Server(
            self._group,
            unix_path=self._directory.nbd_socket,
            mode=int(self._config.recovery.socket_mode, 8),
            socket_gid=socket_gid(self._config.recovery.socket_group),
        )

    def _open_history(self, paths: SitePaths) -> None:
        """With the key proven right on one piece, before anything is served."""
        record = self._record
        access = KeyAccess.open(paths, self._reader.group_id, self._reader.wrapped_keys)
        point = Position(*record.point)
        if [tuple(step) for step in self._reader.ancestry(point)] != record.ancestry:
            raise errors.CorruptError(f"the history below {point} is not what it was")
        if not self._reader.has(point):
            # What is not fetched yet may be gone, and older data would show in its place. A fold
            # asks for the points of views, but of which views there are its site alone knows.
            raise errors.PointNotFoundError(f"pos:{point}, that of the view, was folded away")
        extents = self._reader.extent_map(point)
        self._fetcher = Fetcher(self._reader, extents, access)
        self._fetcher.probe(sorted(disk.index for disk in record.disks))
        self._comparer = Comparer(self._reader, extents, access)

    def _in_order(self) -> list[RecordedDisk]:
        """The number of a disk in its records is its index: exports stand in that order."""
        return sorted(self._record.disks, key=lambda disk: disk.index)

    def _open_group(self) -> Group:
        directory, record = self._directory, self._record
        return Group(
            [
                Disk(d.name, f"view:{directory.overlay(d.name)}", d.bytes, onto=d.onto)
                for d in self._in_order()
            ],
            group_id=bytes.fromhex(record.id).ljust(16, b"\0"),
            tap=False,
        )

    def _open_disks(self) -> None:
        """Now that their locks are held: what they hold is what the group finds there."""
        for disk in self._in_order():
            self._disks.append(
                InPlace(disk.index, disk.onto, self._fetcher, self._comparer)
                if disk.onto
                else Anew(disk.index, self._fetcher)
            )

    def _close_disks(self) -> None:
        for disk in self._disks:
            disk.close()

    def _offer_changes(self, since: Position) -> None:
        """Let clients see what may differ from another point."""
        if [tuple(step) for step in self._reader.ancestry(since)] != self._record.since_ancestry:
            raise errors.CorruptError(f"the history below {since} is not what it was")
        disks = self._in_order()
        try:
            point = Position(*self._record.point)
            changes = changes_between(self._reader, since, point)
            found = [changed(self._reader, changes, disk.index, since, point) for disk in disks]
        except errors.PointNotFoundError:
            # The base was folded away since the view was made: all may differ from it.
            found = [np.array([(0, disk.bytes)], CHANGED) for disk in disks]
        self._group.since(bitmap_name((since.epoch, since.lane, since.seq)), found)

    def _start(self, target: Any, name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    # ---- fetching --------------------------------------------------------------------

    def _fetch_loop(self) -> None:
        """Take turns: one thread waits for misses, those that got some fetch them."""
        while True:
            try:
                with self._turn:
                    batch = self._group.misses(BATCH)
            except errors.GoneError:
                return
            if not batch:
                return  # the group is being closed
            self._serve(batch)

    def _serve(self, batch: Sequence[Miss]) -> None:
        """Fill misses, or fail what waits for them: never with bytes that are not right."""
        found = []
        for miss in batch:
            try:
                disk = self._disks[miss.disk]
                found.append((miss, disk, disk.find(miss.offset, miss.length)))
            except (errors.VrepError, OSError, MemoryError) as error:
                self._unreadable(miss, error)
        for miss, disk, what in found:
            try:
                data, parts = disk.open(miss.offset, miss.length, what)
            except (errors.VrepError, OSError, MemoryError) as error:
                self._unreadable(miss, error)
            else:
                self._filled(miss, data, parts)

    def _unreadable(self, miss: Miss, error: Exception) -> None:
        self._problem(f"unreadable: {error}")
        self._end(lambda: self._group.fail(miss))

    def _filled(self, miss: Miss, data: bytearray | None, parts: Runs | None) -> None:
        self._end(lambda: self._group.fill(miss, data, parts))

    def _end(self, end: Any) -> None:
        while True:
            try:
                end()
                return
            except errors.AgainError:
                time.sleep(0.0005)
            except errors.GoneError:
                return
            except errors.VrepError as error:
                # What waited has been told; the view's own storage is full or broken.
                self._problem(f"storage: {error}")
                return

    def _problem(self, text: str) -> None:
        with self._counts:
            fresh = text not in self._problems
            if fresh and len(self._problems) >= CONDITIONS_MAX:
                text, fresh = "more: see the log", False
            self._problems[text] = self._problems.get(text, 0) + 1
        if fresh:
            print(text, file=sys.stderr, flush=True)

    # ---- background filling --------------------------------------------------------------

    def _fill_loop(self) -> None:
        self._fill_wanted.wait()
        if self._closing.is_set():
            return
        me = threading.get_native_id()
        # Never less than whoever started it has: that is not allowed.
        os.setpriority(os.PRIO_PROCESS, me, max(FILL_NICE, os.getpriority(os.PRIO_PROCESS, me)))
        while not self._closing.is_set():
            whole = [self._fill_disk(n, name) for n, (name, _) in enumerate(self._group.disks)]
            if all(whole) and not self._closing.is_set():
                self._fill_done = True
                return
            self._closing.wait(FILL_AGAIN_S)

    def _fill_disk(self, disk: int, name: str) -> bool:
        """Once through a disk; whether it is whole, and stable. What fails is passed over."""
        rate = self._config.recovery.fill_rate
        start = 0
        while not self._closing.is_set():
            began = time.monotonic()
            try:
                miss = self._group.fill_next(disk, start, FILL_BYTES)
            except errors.AgainError:
                self._closing.wait(0.005)
                continue
            except errors.VrepError:
                return False  # closed
            if miss is None:
                return self._is_stable(disk)
            again = miss.offset < start
            self._serve([miss])
            if again:
                return False
            start = miss.offset + miss.length
            self._filled_to[name] = start
            if rate:
                pause_s = miss.length / rate - (time.monotonic() - began)
                self._closing.wait(max(0.0, pause_s))
        return False

    def _is_stable(self, disk: int) -> bool:
        """Whether all blocks of a disk, which are there, outlive this host's power."""
        try:
            self._group.sync_disk(disk)
        except errors.VrepError as error:
            if not isinstance(error, errors.GoneError):
                self._problem(f"storage: {error}")
            return False
        return True

    # ---- control -------------------------------------------------------------------------

    def _status(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        with self._counts:
            conditions = [f"{text} ({n} times)" for text, n in self._problems.items()]
        count = FillCount.sum(disk.count for disk in self._disks)
        return {
            "pid": os.getpid(),
            "conditions": conditions,
            "fetched_bytes": count.fetched_bytes,
            "clients": self._server.clients(),
            "fill": {
                "running": self._fill_wanted.is_set() and not self._fill_done,
                "done": self._fill_done,
                "filled_to": dict(self._filled_to),
                **count.plain(),
                "read_bytes": self._fetcher.read_bytes,
                "hash_bytes": self._comparer.hash_bytes,
            },
        }

    def _fill(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        self._fill_wanted.set()
        return {}

    def _hold(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        """Answer nobody, once all that was written is on stable storage, for `HOLD_S` from the last
        time that this was asked for, or until `go_on`. When that fails, clients are served as
        before, and a StorageError says so: their next flush fails too, but after this process
        nobody would know."""
        with self._door:
            if self._stopping.is_set():
                raise errors.GoneError(f"view {self._record.id} is ending")
            self._held_to_s = time.monotonic() + HOLD_S
            if not self._released.is_set():
                return {}
            try:
                self._server.stop(timeout_ms=DRAIN_MS)
                for disk in range(len(self._disks)):
                    self._group.sync_disk(disk)
            except errors.VrepError as error:
                self._problem(f"storage: {error}")
                self._serve_again()
                raise errors.StorageError(str(error)) from None
            self._released.clear()
            threads.start(threading.Thread(target=self._hold_lapses, name="hold", daemon=True))
        return {}

    def _hold_lapses(self) -> None:
        while not self._released.wait(max(0.0, self._held_to_s - time.monotonic())):
            with self._door:
                if time.monotonic() >= self._held_to_s:
                    self._let_in()

    def _go_on(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        """Answer clients again."""
        with self._door:
            self._let_in()
        return {}

    def _let_in(self) -> None:
        if not self._released.is_set() and not self._stopping.is_set():
            self._serve_again()
        self._released.set()

    def _serve_again(self) -> None:
        try:
            self._server = self._new_server()
            self._server.start()
        except BaseException:
            self._broken = True
            self.request_stop()
            raise

    def _stop_requested(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        self.request_stop()
        return {}

    def info(self) -> ViewInfo:
        """What is told to whoever started it."""
        return info_of(self._directory, self._record, os.getpid(), self._status({}))

    def set_serving(self) -> None:
        """A test that is served is served again after a crash."""
        self._record = self._directory.change(state="serving")

    def request_stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        """Serve until stopped; then everything written is on stable storage."""
        self._stopping.wait()
        try:
            with self._door:
                self._server.stop(timeout_ms=DRAIN_MS)
        except errors.TimeLimitError as error:
            print(f"commands were cut: {error}", file=sys.stderr, flush=True)
        self._closing.set()
        self._released.set()
        self._fill_wanted.set()
        self._stack.close()


def _report(answer: dict[str, Any]) -> None:
    """Tell the starter, and let go of it."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def serve(paths: SitePaths, request: Mapping[str, str]) -> int:
    """Serve what is asked for, until stopped."""
    reader: StoreReader | None = None
    try:
        if "group" in request:
            reader = begin_test(
                paths,
                request["view"],
                request["group"],
                request["at"],
                kind=request.get("kind", "test"),
                since=request.get("since"),
            )
        view = View(paths, request["view"], reader)
        if reader is not None:
            view.set_serving()
    except (errors.VrepError, OSError) as error:
        if reader is not None:
            reader.close()
        if not isinstance(error, errors.VrepError):
            error = errors.StorageError(str(error))
        _report({"error": {"type": type(error).__name__, "text": error.detail}})
        return error.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: view.request_stop())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    _report({"view": msgspec.to_builtins(view.info())})
    view.run()
    return 0


def main(arguments: list[str]) -> int:
    """Serve what comes on standard input."""
    line = sys.stdin.readline().strip()
    if not line:
        return 0  # not needed after all
    return serve(SitePaths.of(arguments[0]), json.loads(line))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
