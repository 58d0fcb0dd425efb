"""Views: a group's disks as they were at a point, served at once and writable.

A view has a directory, DIR/views/<id>/: ``view.json`` (what it is, no secret), a sparse overlay
for each disk that holds what was fetched and what its user wrote, and a lock that its process
holds. The process (`vrep.recovery.process`) serves NBD on ``run/view-<id>-nbd.sock`` and answers
``run/view-<id>.sock``. It needs nobody: it outlives the command that started it, and
`restart_views` brings back those whose process or host died, with their writes.

A group may have several tests at once; each is its own view, and `stop_test` with the group's
name ends them all. Times are nanoseconds of the source's clock, sizes bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from vrep import errors
from vrep.control import ControlClient
from vrep.durable import make_private_directory, sync_directory, write_atomic
from vrep.lanes import group_of, is_lane
from vrep.paths import SitePaths
from vrep.recovery.alone import under_way

if TYPE_CHECKING:
    from vrep.recovery.access import KeyAccess
    from vrep.recovery.held import HeldGroup
    from vrep.target.manifest import Position
    from vrep.target.reader import StoreReader

__all__ = [
    "ViewDisk",
    "ViewInfo",
    "ViewRecord",
    "list_views",
    "points_in_use",
    "restart_views",
    "start_test",
    "stop_test",
]

VERSION: Final = 1
START_S: Final = 60.0
STOP_S: Final = 20.0
LOCK_S: Final = 0.5
TOLD_TO_END: Final = "told to end"
PROTECTED: Final = "protected"
"""the state of a view whose disks are those of a protected group: the filter serves them"""


class ViewDisk(msgspec.Struct, frozen=True):
    """A disk of a view."""

    name: str
    bytes: int
    uri: str
    """empty: nobody serves it"""
    bitmap: str | None = None
    """of a group with several lanes: the NBD metadata context that tells what may differ"""


class ViewInfo(msgspec.Struct, frozen=True):
    """A view as it is now."""

    id: str
    kind: str
    """test, failover, or verify: of a verification that runs"""
    group: str
    group_id: str
    point: str
    """pos:EPOCH/LANE/SEQ"""
    time: str
    """of the point, by the source's clock"""
    state: str
    """starting, serving, committed, rolling-back, protected; left: it was protected, and the group
    is at another site now"""
    running: bool
    pid: int | None
    socket: str
    disks: list[ViewDisk]
    created: str
    epoch: int | None
    """that a failover raised"""
    since: str | None
    """the point, pos:EPOCH/LANE/SEQ, of which `bitmap` tells what may differ"""
    bitmap: str | None
    """the NBD metadata context of its disks that does"""
    conditions: list[str]
    """what is wrong with it, if anything"""
    fill: dict[str, Any]
    """of a failover: how far its disks are whole"""


class RecordedDisk(msgspec.Struct, frozen=True):
    """A disk in view.json."""

    name: str
    bytes: int
    index: int
    onto: str = ""
    """URI of the disk that is filled in place; empty: a sparse file of the view"""


class ViewRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """view.json: what a view is, so that it can be served again. No key is in it."""

    version: int
    id: str
    kind: str
    group_id: str
    group: str
    asked: str
    point: tuple[int, int, int]
    wall_ns: int
    ancestry: list[tuple[int, int]]
    disks: list[RecordedDisk]
    created_ns: int
    state: str
    epoch_id: str = ""
    """of a failover: the id of the epoch it raises, chosen before it is raised"""
    epoch: int = 0
    old_writer: str = ""
    """of a failover: the site that wrote before"""
    old_epoch: int = 0
    since: tuple[int, int, int] | None = None
    """another point: what may differ from it is offered as a dirty bitmap"""
    since_ancestry: list[tuple[int, int]] = []
    since_asked: str = ""
    halt: str = ""
    """of a move: which halt of all lanes the point is of"""


class ViewDirectory:
    """The directory of one view."""

    def __init__(self, paths: SitePaths, view_id: str) -> None:
        if not view_id.isalnum():
            raise errors.InvalidError(f"the view id {view_id!r} is not an id")
        self.paths = paths
        self.id = view_id
        self.root = paths.views / view_id

    @property
    def record_path(self) -> Path:
        return self.root / "view.json"

    @property
    def control(self) -> Path:
        return self.paths.socket(f"view-{self.id}")

    @property
    def nbd_socket(self) -> Path:
        return self.paths.socket(f"view-{self.id}-nbd")

    @property
    def log(self) -> Path:
        return self.paths.log / f"view-{self.id}.log"

    def overlay(self, disk: str) -> Path:
        return self.root / f"{disk}.overlay"

    def data_path(self, disk: RecordedDisk) -> Path:
        """Where the bytes of a disk are."""
        return Path(disk.onto.partition(":")[2]) if disk.onto else self.overlay(disk.name)

    def disk_uri(self, disk: RecordedDisk) -> str:
        """A disk whose blocks are all present, as the disk of a group."""
        return disk.onto or f"file:{self.data_path(disk)}"

    def load(self) -> ViewRecord:
        try:
            record = msgspec.json.decode(self.record_path.read_bytes(), type=ViewRecord)
        except FileNotFoundError:
            raise errors.NotFoundError(f"no view {self.id}") from None
        except msgspec.MsgspecError as error:
            raise errors.CorruptError(f"{self.record_path}: {error}") from None
        if record.version != VERSION:
            raise errors.VersionError(f"{self.record_path} has version {record.version}")
        return record

    def store(self, record: ViewRecord) -> None:
        text = msgspec.json.format(msgspec.json.encode(record), indent=2)
        write_atomic(self.record_path, text + b"\n")

    def create(self, record: ViewRecord) -> None:
        make_private_directory(self.root)
        (self.root / "lock").touch(0o600)
        self.store(record)

    def claim(self, record: ViewRecord) -> None:
        """`create` a view on a point. From then on no fold takes what the point needs
        (`points_in_use`); PointNotFoundError when one may have done so since it was chosen."""
        from vrep.target.manifest import Position, load_newest

        self.create(record)
        home = self.paths.store / record.group_id
        point = Position(*record.point)
        if not load_newest(home, bytes.fromhex(record.group_id)).keeps(point):
            shutil.rmtree(self.root, ignore_errors=True)
            raise errors.PointNotFoundError(f"pos:{point} was folded away since it was chosen")

    def change(self, **changes: Any) -> ViewRecord:
        record = msgspec.structs.replace(self.load(), **changes)
        self.store(record)
        return record

    def take_lock(self) -> int:
        """The lock of the view's process; LockedError while another one has it, to serve the
        view or to end it. A record that was loaded before may be of a view that is gone."""
        try:
            fd = os.open(self.root / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise errors.NotFoundError(f"no view {self.id}") from None
        deadline = time.monotonic() + LOCK_S
        while not _locked(fd):
            if time.monotonic() > deadline:
                os.close(fd)
                raise errors.LockedError(f"view {self.id} is served by another process")
            time.sleep(0.01)  # who only asks for the holder has it for a moment
        self.note_in_lock(fd, str(os.getpid()))
        return fd

    @staticmethod
    def note_in_lock(fd: int, text: str) -> None:
        """What the holder of the lock leaves in it: its pid, at last that it was told to end."""
        os.ftruncate(fd, 0)
        os.pwrite(fd, text.encode(), 0)

    def was_told_to_end(self) -> bool:
        """Whether the last process of the view ended in good order, and did not die."""
        try:
            return (self.root / "lock").read_text() == TOLD_TO_END
        except FileNotFoundError:
            return False

    def holder(self) -> int | None:
        """Pid of the process that holds the lock; None when there is none."""
        try:
            fd = os.open(self.root / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            text = os.pread(fd, 32, 0)
            return int(text) if text.isdigit() else 0
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Delete everything of the view, which is `ended`. Its record goes first, durably: what
        is left of the rest is nobody's."""
        self.record_path.unlink(missing_ok=True)
        if self.root.is_dir():
            sync_directory(self.root)
            shutil.rmtree(self.root)
            sync_directory(self.paths.views)
        for path in (self.control, self.nbd_socket, self.log):
            path.unlink(missing_ok=True)


def _locked(fd: int) -> bool:
    """Whether this process has the lock of a file now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def view_directories(paths: SitePaths) -> list[ViewDirectory]:
    """Every view that has a record, oldest name first."""
    if not paths.views.is_dir():
        return []
    return [
        ViewDirectory(paths, entry.name)
        for entry in sorted(paths.views.iterdir())
        if entry.name.isalnum() and (entry / "view.json").is_file()
    ]


def points_in_use(paths: SitePaths, group_id: bytes) -> list[Position]:
    """Points of a group that views read, or would read when they are started again. What cannot
    be read may be any: CorruptError."""
    from vrep.target.manifest import Position

    found = []
    for view in view_directories(paths):
        try:
            record = view.load()
        except errors.NotFoundError:
            continue  # it ended since the listing
        if record.group_id == group_id.hex() and record.state != PROTECTED:
            found.append(Position(*record.point))
    return found


def served_by_filter(paths: SitePaths, record: ViewRecord) -> bool:
    """Whether the filter opened a view's disks as those of the group that they become: what a view
    wrote after that would be marked nowhere. To be asked while the disks' locks are held."""
    from vrep.groups import GroupDirectory

    groups = GroupDirectory(paths.root)
    definition = groups.of_id(record.group_id) if record.kind == "failover" else None
    return (
        definition is not None
        and not definition.yielded
        and definition.epoch == record.epoch
        and (groups.path(definition.name) / "state").exists()
    )


def clients_here(paths: SitePaths, group_id: str) -> int:
    """How many clients use the disks of a group at this site: of a failover's view, or of the
    group that they became."""
    from vrep.groups import GroupDirectory

    count = 0
    for view in view_directories(paths):
        with contextlib.suppress(errors.VrepError):
            record = view.load()
            if record.group_id == group_id and record.kind == "failover":
                status = ControlClient(view.control).call("status", timeout=2.0)
                count += len(status["clients"])
    definition = GroupDirectory(paths.root).of_id(group_id)
    if definition is not None and not definition.yielded:
        with contextlib.suppress(errors.VrepError):
            served = ControlClient(paths.socket("filter")).call("status", timeout=2.0)
            count += int(served.get(definition.name, {}).get("clients", 0))
    return count


# ---- the process of a view ---------------------------------------------------------------


class ViewProcess:
    """The process of a view, being started: it loads its modules while its starter still
    decides what it is to serve."""

    def __init__(self, paths: SitePaths) -> None:
        make_private_directory(paths.log)
        self._log_path = paths.log / f"view-start-{os.getpid()}-{secrets.token_hex(4)}.log"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        log_fd = os.open(self._log_path, flags, 0o600)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vrep.recovery.process", str(paths.root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_fd,
                start_new_session=True,
                cwd="/",
            )
        finally:
            os.close(log_fd)

    def start(
        self, view: ViewDirectory, group: str, at: str, *, kind: str, since: str | None
    ) -> ViewInfo:
        """Let it choose the point and make the view; a test, being served."""
        request = {"view": view.id, "group": group, "at": at, "kind": kind}
        if since is not None:
            request["since"] = since
        return self._ask(view, request)

    def serve(self, view: ViewDirectory) -> ViewInfo:
        """Let it serve a view that stands. Raises what stopped it."""
        return self._ask(view, {"view": view.id})

    def _ask(self, view: ViewDirectory, request: dict[str, str]) -> ViewInfo:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self._log_path.rename(view.log)
        self._log_path = view.log
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], START_S)
            line = process.stdout.readline() if ready else None
        finally:
            self._close()
        if line and "view" in (found := json.loads(line)):
            return msgspec.convert(found["view"], ViewInfo)
        raise failure(view, line, START_S)

    def cancel(self) -> None:
        """It is not needed."""
        self._close()
        self._log_path.unlink(missing_ok=True)

    def _close(self) -> None:
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        process.wait()  # it has moved to the background long ago


def failure(view: ViewDirectory, line: bytes | None, timeout_s: float) -> errors.VrepError:
    """Why a view is not served, by what its process answered: None is nothing in time, empty
    that it ended."""
    if line is None:
        return errors.TimeLimitError(f"view {view.id} did not start in {timeout_s:g} s")
    if not line:
        lines: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            lines = view.log.read_text(errors="replace").strip().splitlines()
        last_words = lines[-1] if lines else f"see {view.log}"
        return errors.RecoveryError(f"the process of the view ended: {last_words}")
    return _error(json.loads(line)["error"])


def discard(view: ViewDirectory) -> None:
    """End a view, and delete everything of it."""
    with ended(view):
        view.remove()


def _error(detail: dict[str, str]) -> errors.VrepError:
    from vrep.keys import errors as key_errors

    name = detail["type"]
    kind: type[errors.VrepError] = getattr(
        errors, name, getattr(key_errors, name, errors.RecoveryError)
    )
    return kind(detail["text"])


# ---- tests ----------------------------------------------------------------------------------


def bitmap_name(since: tuple[int, int, int]) -> str:
    """The dirty bitmap of a view's changes since a point. It names the point, so that a client
    with another base is refused, and never told too little."""
    return "vrep-since-{}-{}-{}".format(*since)


def start_test(
    paths: SitePaths,
    group: str,
    at: str = "latest",
    since: str | None = None,
    *,
    kind: str = "test",
) -> ViewInfo:
    """Serve the disks of a group as they were at a point. Replication is not touched."""
    view = ViewDirectory(paths, secrets.token_hex(6))
    process = ViewProcess(paths)
    try:
        return process.start(view, group, at, kind=kind, since=since)
    except BaseException:
        discard(view)
        raise


def begin_test(
    paths: SitePaths, view_id: str, group: str, at: str, *, kind: str, since: str | None
) -> StoreReader:
    """In the process of the view: choose its point and make its directory. The reader that
    was used for it, scattered, is the caller's."""
    from vrep.recovery.held import find_group
    from vrep.target.reader import StoreReader

    paths.make_run()
    held = find_group(paths, group)
    reader = StoreReader(paths.store, held.group_id, scattered=True)
    try:
        record = record_of(paths, held, reader, at, kind, None, since)
        ViewDirectory(paths, view_id).claim(msgspec.structs.replace(record, id=view_id))
    except BaseException:
        reader.close()
        raise
    return reader


def record_of(
    paths: SitePaths,
    held: HeldGroup,
    reader: StoreReader,
    at: str,
    kind: str,
    access: KeyAccess | None,
    since: str | None = None,
) -> ViewRecord:
    """The record of a view at a point."""
    from vrep.recovery.history import needs_key, resolve

    if access is None and (needs_key(at) or (since is not None and needs_key(since))):
        from vrep.recovery.access import KeyAccess

        access = KeyAccess.open(paths, held.group_id, reader.wrapped_keys)
    now_ns = time.time_ns()
    point = resolve(reader, at, access, now_ns)
    base = None if since is None else resolve(reader, since, access, now_ns).position
    return ViewRecord(
        version=VERSION,
        id=secrets.token_hex(6),
        kind=kind,
        group_id=held.hex,
        group=held.name,
        asked=at,
        point=(point.position.epoch, point.position.lane, point.position.seq),
        wall_ns=point.wall_ns,
        ancestry=reader.ancestry(point.position),
        disks=[RecordedDisk(d.name, d.bytes, d.index) for d in reader.disks_at(point.position)],
        created_ns=time.time_ns(),
        state="starting",
        since=None if base is None else (base.epoch, base.lane, base.seq),
        since_ancestry=[] if base is None else reader.ancestry(base),
        since_asked=(since or "").strip(),
    )


def describe(view: ViewDirectory) -> ViewInfo:
    """A view as it is now."""
    record = view.load()
    status: dict[str, Any] = {}
    holder = view.holder()
    if holder is not None:
        with contextlib.suppress(errors.VrepError):
            status = ControlClient(view.control).call("status", timeout=5.0)
    return info_of(view, record, holder, status)


def info_of(
    view: ViewDirectory, record: ViewRecord, holder: int | None, status: dict[str, Any]
) -> ViewInfo:
    """What is known of a view; `status` is what its process, `holder`, says."""
    from vrep.recovery.history import format_time
    from vrep.recovery.left import has_left

    conditions = list(status.get("conditions", []))
    left = record.state == PROTECTED and has_left(view, record)
    socket = "" if left else str(view.nbd_socket)
    if holder is None and record.state not in ("starting", PROTECTED):
        conditions.append("not-running")
    return ViewInfo(
        id=record.id,
        kind=record.kind,
        group=record.group,
        group_id=record.group_id,
        point="pos:{}/{}/{}".format(*record.point),
        time=format_time(record.wall_ns),
        state="left" if left else record.state,
        running=holder is not None,
        pid=holder,
        socket=socket,
        disks=[
            ViewDisk(d.name, d.bytes, f"nbd+unix:///{d.name}?socket={socket}" if socket else "")
            for d in record.disks
        ],
        created=format_time(record.created_ns),
        epoch=record.epoch or None,
        since=None if record.since is None else "pos:{}/{}/{}".format(*record.since),
        bitmap=None if record.since is None else f"qemu:dirty-bitmap:{bitmap_name(record.since)}",
        conditions=conditions,
        fill=status.get("fill", {}),
    )


def list_views(paths: SitePaths) -> list[ViewInfo]:
    """Every view of this site, tests and failovers."""
    found = []
    for view in view_directories(paths):
        with contextlib.suppress(errors.NotFoundError):  # it ended since the listing
            found.append(describe(view))
    return found


@contextlib.contextmanager
def ended(view: ViewDirectory, timeout_s: float = STOP_S) -> Iterator[None]:
    """A view without its process: told to stop, killed when it does not. None can begin to serve
    it inside, not even one that was started already: the lock is held here."""
    try:
        fd = os.open(view.root / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield  # no process ever served it
        return
    try:
        deadline = time.monotonic() + timeout_s
        while not _locked(fd):
            # Again and again: one that has just begun does not listen yet.
            with contextlib.suppress(errors.VrepError):
                ControlClient(view.control).call("stop", timeout=1.0)
            pid = view.holder()
            if time.monotonic() > deadline and pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + timeout_s
            time.sleep(0.02)
        view.note_in_lock(fd, TOLD_TO_END)  # the pid in it may be another's by now
        yield
    finally:
        os.close(fd)


def _names_of(record: ViewRecord) -> tuple[str, ...]:
    """What a view may be called by: its id, its group or lane; a lane's group, too. The id of
    the whole group is the last."""
    names = (record.id, record.group, record.group_id)
    if not is_lane(record.group):
        return names
    return (*names, group_of(record.group), f"{record.group_id[:28]}0000")


def stop_test(paths: SitePaths, group: str, view_id: str | None = None) -> None:
    """End the tests of a group (or the one with this id), and delete what they wrote. `group`
    may itself be a view's id."""
    matches = [
        (view, record)
        for view in view_directories(paths)
        if group in _names_of(record := view.load()) and view_id in (None, record.id)
    ]
    tests = [(view, record) for view, record in matches if record.kind == "test"]
    if not tests:
        if matches:
            raise errors.StateError(
                f"{group!r} is a failover: commit it or roll it back, it is not a test"
            )
        raise errors.NotFoundError(f"no test of {group!r} runs here")
    groups = {_names_of(record)[-1] for _view, record in tests}
    if len(groups) > 1:
        raise errors.InvalidError(
            f"{len(groups)} groups are called {group!r}: give an id: {', '.join(sorted(groups))}"
        )
    for view, _record in tests:
        discard(view)


def restart_views(
    paths: SitePaths, due: Callable[[ViewDirectory], bool] = lambda _view: True
) -> list[str]:
    """Serve again every view whose process is gone and that is `due`, with what was written to
    it. Removed are tests that never came to be served, and views of a verification that died.
    Returns a line of text for each that could not."""
    problems = []
    for view in view_directories(paths):
        try:
            record = view.load()
            if record.kind == "verify":
                if not under_way(paths):  # whoever made it died
                    discard(view)
                continue
            if view.holder() is not None:
                continue
            if record.state == "starting" and record.kind == "test":
                if time.time_ns() - record.created_ns > 2 * START_S * 1e9:
                    discard(view)
                continue
            if record.state in ("serving", "committed") and due(view):
                restart(view)
        except (errors.VrepError, OSError) as error:
            problems.append(f"view {view.id}: {error}")
    return problems


def restart(view: ViewDirectory) -> None:
    """Start the process of a view that exists."""
    view.paths.make_run()
    process = ViewProcess(view.paths)
    process.serve(view)
