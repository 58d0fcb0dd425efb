"""Failover: this site takes a group over at a point, and keeps it or gives it back.

Each step is durable before the next begins, and each can be repeated, so a failover that was
cut off goes on where it stood when the same command is given again:

1. the point is chosen, the key proven, and ``view.json`` says what is meant to happen;
2. a provisional epoch is raised: from then on no target hears the old writer;
3. the view is served, its epoch known; background filling makes it an ordinary disk.

`commit` accepts the epoch. `rollback` abandons it: the old writer goes on in a newer epoch,
from the last position that was durable, and the view is deleted with what was written to it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from vrep import errors
from vrep.control import ControlClient
from vrep.keys.identity import SiteIdentity
from vrep.paths import SitePaths
from vrep.recovery.access import KeyAccess
from vrep.recovery.fetch import Fetcher
from vrep.recovery.held import HeldGroup, find_group
from vrep.recovery.history import History, resolve
from vrep.recovery.onto import place_onto
from vrep.recovery.view import (
    PROTECTED,
    ViewDirectory,
    ViewInfo,
    ViewProcess,
    ViewRecord,
    describe,
    discard,
    ended,
    record_of,
    view_directories,
)
from vrep.target.epochs import EpochDoor, entry_of
from vrep.target.manifest import EpochEntry, EpochState, Position
from vrep.target.reader import StoreReader

__all__ = [
    "MOVED",
    "Failover",
    "check_onto",
    "choose",
    "claim",
    "commit",
    "require_no_writer",
    "retarget",
    "rollback",
    "serve",
    "shut_out",
    "start",
]

MOVED: Final = "move"
"""what was asked for, in the record of a view that a move made"""

REPORT_WAIT_S: Final = 3.0
IDLE_REPORT_WAIT_S: Final = 16.0
"""longer than the pauses between two reports of a source that sends nothing"""


class Failover:
    """The parts of every command here."""

    def __init__(self, paths: SitePaths, group: str) -> None:
        self.paths = paths
        self.held: HeldGroup = find_group(paths, group)
        self.site_id = bytes.fromhex(SiteIdentity.load(paths.root).site_id)
        self.door = EpochDoor(paths.store, paths.socket("target"), self.held.group_id)

    def view(self) -> ViewDirectory | None:
        """The failover's view, if one was begun and is not over."""
        for view in view_directories(self.paths):
            record = view.load()
            mine = record.kind == "failover" and record.group_id == self.held.hex
            if mine and record.state != PROTECTED:
                return view
        return None

    def protected_views(self) -> list[ViewDirectory]:
        """Views whose disks this site protects, or did before another took the group over."""
        found = [(view, view.load()) for view in view_directories(self.paths)]
        return [v for v, r in found if r.group_id == self.held.hex and r.state == PROTECTED]

    def require_other_writer(self) -> EpochEntry:
        """The current epoch; StateError when this site writes the group."""
        state = self.door.state()
        current = next(
            entry_of(raw) for raw in state["epochs"] if int(raw["epoch"]) == int(state["current"])
        )
        if current.writer == self.site_id:
            raise errors.StateError(
                f"this site writes {self.held.name!r} already, in epoch {current.epoch} "
                f"({current.state.name.lower()})"
            )
        return current

    def epochs(self) -> list[EpochEntry]:
        return [entry_of(raw) for raw in self.door.state()["epochs"]]

    def provisional(self) -> EpochEntry | None:
        """The epoch that a failover of this site raised and nobody decided on."""
        newest = self._standing()[-1]
        if newest.state is EpochState.PROVISIONAL and newest.writer == self.site_id:
            return newest
        return None

    def _standing(self) -> list[EpochEntry]:
        """The epochs that were not abandoned; the last one is the current one."""
        return [entry for entry in self.epochs() if entry.state is not EpochState.ABANDONED]

    def committed(self, record: ViewRecord) -> bool:
        """Whether the epoch of a view was accepted, whatever the record says: a commit that was cut
        off had its effect."""
        return record.state == "committed" or any(
            (entry.epoch, entry.epoch_id.hex()) == (record.epoch, record.epoch_id)
            and entry.state is EpochState.ACCEPTED
            for entry in self.epochs()
        )

    def require_of_now(self, record: ViewRecord) -> None:
        """StateError when a view is not of the group as it stands: its epoch is not the current
        one, or, before it raised one, others went on from the epoch that it was begun in. Served,
        it would be of a point at which nobody is refused."""
        if record.state == "rolling-back":
            return  # what it gave up is not current any more
        *before, current = self._standing()
        if record.epoch:
            right = (current.epoch, current.epoch_id.hex()) == (record.epoch, record.epoch_id)
        elif current.writer == self.site_id and current.state is EpochState.PROVISIONAL:
            # Its number did not reach the record. Only `latest` is decided when it is raised.
            right = bool(before) and before[-1].epoch == record.old_epoch
            right &= record.asked == "latest" or current.parent == Position(*record.point)
        else:
            right = current.epoch == record.old_epoch
        if not right:
            raise errors.StateError(
                f"the failover of {record.group!r} that was begun here does not fit the group any "
                f"more, which is in epoch {current.epoch}: 'vrep failover rollback' ends it"
            )


def _require_no_writer(failover: Failover) -> None:
    """SourceAliveError unless the source's VM is known not to run, or the source was silent for
    so long that it counts as gone. Every doubt refuses: two writers cannot be undone.

    A source reports once a second, a paused or fenced one more seldom: "no client" counts only
    when it was said after the question, so that a VM which has just started is not overlooked.
    """
    first = source = failover.door.state()["source"]
    began = time.monotonic()
    while source["gone_in_s"] != 0:
        clients = source["guest_clients"]
        if clients == 0 and source["seen_ns"] != first["seen_ns"]:
            return
        limit_s = REPORT_WAIT_S if source["connected"] else IDLE_REPORT_WAIT_S
        may_report = clients == 0 or (clients is None and source["connected"])
        if not may_report or time.monotonic() - began > limit_s:
            raise errors.SourceAliveError(_why_alive(failover.held.name, source))
        time.sleep(0.05)
        source = failover.door.state()["source"]


def require_no_writer(paths: SitePaths, group: str) -> None:
    """SourceAliveError unless `start` would take a group over without being forced."""
    _require_no_writer(Failover(paths, group))


def _why_alive(name: str, source: Mapping[str, Any]) -> str:
    """What is known of a source that may live, and what to do."""
    clients = source["guest_clients"]
    if source["gone_in_s"] is None:
        return (
            "the target process does not run here, so nobody hears whether the source of "
            f"{name!r} lives: start 'vrep run' and try again, or --force if you know that it is "
            "gone"
        )
    if source["connected"]:
        serves = f"serves {clients} client(s)" if clients else "does not say whether its VM runs"
        return (
            f"the source of {name!r} is connected and {serves}: 'vrep move' takes the group over "
            "without a loss, or --force"
        )
    heard = "has just started, so the source may be there"
    if source["silent_s"] is not None:
        state = f" ({source['state']})" if source["state"] in ("paused", "fenced") else ""
        heard = f"heard the source{state} {source['silent_s']:.1f} s ago"
        if clients is not None:
            heard += f", with {clients} client(s) at its disks"
    return (
        f"the VM of {name!r} may run: this target {heard}. Once it was silent for "
        f"{math.ceil(source['gone_in_s'])} s more the source counts as gone: try again then, or "
        "--force if you know that it is. If it lives, 'vrep move' takes the group over: nothing "
        "is lost"
    )


def start(
    paths: SitePaths,
    group: str,
    at: str = "latest",
    *,
    force: bool = False,
    since: str | None = None,
    onto: Mapping[str, str] | None = None,
) -> ViewInfo:
    """Take a group over at a point, or go on with a failover that was cut off. `since`: the point
    from which its view's dirty bitmap counts. `onto`: disks that are filled in place, by name.

    SourceAliveError while the source's VM runs or may run, unless `force`.
    """
    failover = Failover(paths, group)
    paths.make_run()
    process = ViewProcess(paths)
    try:
        view = failover.view()
        if view is not None and took_nothing(failover, view.load()):
            discard(view)
        view = claim(failover, at, force=force, since=since, onto=onto)
        shut_out(failover, view)
    except BaseException:
        process.cancel()
        raise
    return serve(view, process)


def took_nothing(failover: Failover, record: ViewRecord) -> bool:
    """Whether a view is of a move that ended before it took the group: its source went on."""
    return record.asked == MOVED and record.state == "starting" and failover.provisional() is None


def claim(
    failover: Failover,
    at: str,
    *,
    force: bool = False,
    since: str | None = None,
    onto: Mapping[str, str] | None = None,
) -> ViewDirectory:
    """Step 1, or the view of a failover that was cut off. See `start`."""
    view = failover.view()
    if view is None:
        return _begin(failover, at, force=force, since=since, onto=onto)
    record = view.load()
    failover.require_of_now(record)
    _check_resumed(record, at, since)
    check_onto(record, onto or {})
    return view


def shut_out(failover: Failover, view: ViewDirectory) -> None:
    """Step 2, unless it was done."""
    record = view.load()
    if record.state == "starting":
        _raise(failover, view, record)


def serve(view: ViewDirectory, process: ViewProcess) -> ViewInfo:
    """Step 3. `process` is one that is being started."""
    if view.holder() is None:
        with contextlib.suppress(errors.LockedError):  # `vrep run` was faster
            process.serve(view)
    else:
        process.cancel()
    if view.load().state == "starting":
        view.change(state="serving")
    return describe(view)


def _check_resumed(record: ViewRecord, at: str, since: str | None) -> None:
    if record.state == "rolling-back":
        raise errors.StateError(
            f"the failover of {record.group!r} is being rolled back: finish that first"
        )
    if at.strip() not in ("latest", record.asked, "pos:{}/{}/{}".format(*record.point)):
        raise errors.StateError(
            f"a failover of {record.group!r} to {record.asked} is under way: commit it or roll "
            "it back first"
        )
    base = "pos:{}/{}/{}".format(*record.since) if record.since is not None else None
    if since is not None and since.strip() not in (record.since_asked, base):
        raise errors.StateError(
            f"the failover of {record.group!r} that is under way does not count from {since}"
        )


def check_onto(record: ViewRecord, onto: Mapping[str, str]) -> None:
    """StateError when other disks are to be filled than those that are."""
    filled = {disk.name: disk.onto for disk in record.disks if disk.onto}
    if any(filled.get(name) != uri for name, uri in onto.items()):
        raise errors.StateError(
            f"the failover of {record.group!r} that is under way fills {filled}"
        )


def _begin(
    failover: Failover, at: str, *, force: bool, since: str | None, onto: Mapping[str, str] | None
) -> ViewDirectory:
    """Step 1: everything that can be wrong without a trace is found wrong here."""
    failover.require_other_writer()
    if not force:
        _require_no_writer(failover)
    return choose(failover, at, since=since, onto=onto)


def choose(
    failover: Failover,
    at: str,
    *,
    since: str | None = None,
    asked: str | None = None,
    onto: Mapping[str, str] | None = None,
    halt: str = "",
) -> ViewDirectory:
    """The view of a failover, with its point, claimed; its key is proven. `asked`: what stands in
    the record instead of the point that was asked for. `onto`: see `start`. `halt`: of a move."""
    held, paths = failover.held, failover.paths
    current = failover.require_other_writer()
    access = KeyAccess.open(paths, held.group_id, held.manifest.wrapped_keys)
    with StoreReader(paths.store, held.group_id) as reader:
        record = record_of(paths, held, reader, at, "failover", access, since)
        fetcher = Fetcher(reader, reader.extent_map(Position(*record.point)), access)
        fetcher.probe(sorted(disk.index for disk in reader.disks))
    view = ViewDirectory(paths, record.id)
    view.claim(
        msgspec.structs.replace(
            record,
            asked=asked or record.asked,
            halt=halt,
            disks=place_onto(paths, held.hex, record.disks, onto or {}),
            old_writer=current.writer.hex(),
            old_epoch=current.epoch,
        )
    )
    return view


def _raise(failover: Failover, view: ViewDirectory, record: ViewRecord) -> ViewRecord:
    """Step 2. An epoch that was raised, and whose number did not reach the record, is found."""
    entry = failover.provisional()
    if entry is None:
        entry = _raise_at(failover, record)
    point = Position(*record.point)
    if entry.parent != point:
        # `latest` is decided in the moment when the old writer was shut out.
        record = retarget(failover, view, record, entry.parent)
    return view.change(epoch=entry.epoch, epoch_id=entry.epoch_id.hex())


def _raise_at(failover: Failover, record: ViewRecord) -> EpochEntry:
    point = Position(*record.point)
    if record.asked != "latest" or not _is_end(failover, point):
        return failover.door.raise_epoch(writer=failover.site_id, parent=point)
    entry = failover.door.raise_epoch(writer=failover.site_id)
    if entry.parent == point:
        return entry
    with StoreReader(failover.paths.store, failover.held.group_id) as reader:
        try:
            resolve(reader, f"pos:{entry.parent}", None, 0)
            return entry
        except errors.RecoveryError:
            pass  # a gap began between the choice and the moment
    failover.door.roll_back(entry.epoch)
    return failover.door.raise_epoch(writer=failover.site_id, parent=point)


def _is_end(failover: Failover, point: Position) -> bool:
    """Whether a point is the last durable position, and no gap has begun behind it."""
    with StoreReader(failover.paths.store, failover.held.group_id) as reader:
        history = History(reader)
        return history.newest == history.end and history.end >= point


def retarget(
    failover: Failover, view: ViewDirectory, record: ViewRecord, parent: Position, halt: str = ""
) -> ViewRecord:
    """Let a view that is not served yet be of another point."""
    with StoreReader(failover.paths.store, failover.held.group_id) as reader:
        found = resolve(reader, f"pos:{parent}", None, 0)
        return view.change(
            point=(parent.epoch, parent.lane, parent.seq),
            wall_ns=found.wall_ns,
            ancestry=reader.ancestry(parent),
            halt=halt or record.halt,
        )


def commit(paths: SitePaths, group: str) -> ViewInfo:
    """Keep what was taken over. The old writer stays fenced."""
    failover = Failover(paths, group)
    view = failover.view()
    if view is None:
        raise errors.NotFoundError(f"no failover of {group!r} is under way")
    record = view.load()
    if record.state not in ("serving", "committed"):
        raise errors.StateError(
            f"the failover of {group!r} is {record.state}: give 'failover start' again first"
            if record.state == "starting"
            else f"the failover of {group!r} is {record.state}"
        )
    failover.door.accept(record.epoch)
    if record.state != "committed":
        view.change(state="committed")
    if view.holder() is None:
        with contextlib.suppress(errors.LockedError):  # `vrep run` was faster
            ViewProcess(paths).serve(view)
    with contextlib.suppress(errors.VrepError):
        ControlClient(view.control).call("fill", timeout=5.0)
    return describe(view)


def rollback(paths: SitePaths, group: str) -> None:
    """Give the group back to its old writer, and delete what was written here."""
    failover = Failover(paths, group)
    view = failover.view()
    if view is None:
        entry = failover.provisional()
        if entry is None:
            raise errors.NotFoundError(f"no failover of {group!r} is under way")
        failover.door.roll_back(entry.epoch)
        return
    record = view.load()
    if failover.committed(record):
        raise errors.StateError(
            f"the failover of {group!r} was committed: what this site wrote since is the truth"
        )
    view.change(state="rolling-back")
    # From before the old writer is heard again until the view is gone nobody serves it.
    with ended(view):
        entry = failover.provisional()
        if entry is not None:
            failover.door.roll_back(entry.epoch)
        view.remove()
