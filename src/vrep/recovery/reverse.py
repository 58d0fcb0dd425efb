"""Reverse: the recovered VM is protected back to the site that it came from.

The disks of a committed failover, once they are whole, become the disks of a protected group of
this site, whose target is the old one. Each step is durable before the next begins, and the same
command goes on where it was cut off:

1. background filling ends, so that the disks need no history any more;
2. the old site gives way (`vrep.recovery.old_site`), seals what its disks hold
   (`vrep.target.base`), and its store learns of the epochs;
3. the group's definition is written: this site writes it, in the epoch that the failover raised;
4. the view's process ends and the filter opens the disks, under the sockets that there were: a VM
   that reconnects sees a pause. From then on everything is recorded and shipped.

Before 3 the view's process answers nobody any more, and stores what was written last. A disk that
cannot do so keeps its view: a new process would read back, and call stable, what is in memory only.

Of a group with several lanes each goes back to the site that it came from, or all to one that is
named, which may be any that joined: one that never had a lane begins with nothing.

The first record behind the fork is a gap-begin, so nothing is a recovery point at the old site
before all that may differ there was sent.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import (
    VERSION,
    DiskDefinition,
    GroupDefinition,
    GroupDirectory,
    GroupOptions,
    ParentPosition,
)
from vrep.keys.datakey import inspect_wrapped
from vrep.keys.identity import SiteIdentity
from vrep.keys.tenant import TenantKeyring
from vrep.lanes import is_lane, lane_of
from vrep.paths import SitePaths
from vrep.recovery.cuts import find_lanes
from vrep.recovery.failover import Failover
from vrep.recovery.untaken import read_untaken
from vrep.recovery.view import PROTECTED, ViewDirectory, ViewRecord, describe, ended
from vrep.settings import load_config
from vrep.target.epochs import plain
from vrep.target.manifest import EpochState
from vrep.wire.peers import Peer, PeerRegistry
from vrep.wire.site import connect
from vrep.wire.transport import FrameTransport, PeerRefusedError

__all__ = ["reverse", "reverse_all"]

ASK_EVERY_S: Final = 0.1
FOLLOW_S: Final = 90.0
"""the old site lets its filter go first"""
HOLD_S: Final = 120.0
"""a view drains and syncs its disks first"""
BEGUN_S: Final = 20.0
STATE_FILES: Final = ("state", "intent", "map.0", "map.1")

Progress = Callable[[int, int], None]


def reverse(
    paths: SitePaths,
    group: str,
    options: GroupOptions,
    *,
    to: str = "",
    progress: Progress | None = None,
) -> GroupDefinition:
    """Protect a group that this site took over, and committed, to the site that wrote it before,
    or to one that is named. `progress` hears the bytes of its disks that are here, so far and in
    all; then how far the old site is with its own."""
    (made,) = reverse_all(paths, [group], options, to=to, progress=progress)
    return made


class _Way:
    """A group with one lane, or a lane, on its way back. Raises why it cannot go."""

    def __init__(self, paths: SitePaths, group: str, to: Peer | None) -> None:
        self.failover = failover = Failover(paths, group)
        self.name = failover.held.name
        groups = GroupDirectory(paths.root)
        self.view = failover.view()
        self.epochs = failover.epochs()
        self.current = current = self.epochs[-1]
        if current.writer != failover.site_id:
            raise errors.StateError(f"{self.name!r} is written by another site")
        self.mine = mine = groups.of_id(failover.held.hex)
        self.defined = mine is not None and not mine.yielded
        """whether this site protects it already; with a view, that may serve its disks still"""
        if self.view is None:
            if not self.defined:
                raise errors.NotFoundError(f"no failover of {group!r} is under way")
            self._require_target(to)
            return
        record = self.record = self.view.load()
        if record.state != "committed" or current.state is not EpochState.ACCEPTED:
            raise errors.StateError(f"the failover of {group!r} is not committed: do that first")
        self.defined = self.defined and mine is not None and mine.epoch == current.epoch
        if self.defined:
            self._require_target(to)
        else:
            self.peer = _reached(to or PeerRegistry(paths.root).get(record.old_writer))
            _require_name(groups, self.name, failover.held.hex)

    def _require_target(self, to: Peer | None) -> None:
        """What was cut off goes on to where it began to go."""
        if to is not None and self.mine is not None and self.mine.to_site != to.site_id:
            raise errors.StateError(f"{self.name!r} is protected to another site than {to.name!r}")


def reverse_all(
    paths: SitePaths,
    groups: Sequence[str],
    options: GroupOptions,
    *,
    to: str = "",
    progress: Progress | None = None,
) -> list[GroupDefinition]:
    """`reverse` of all lanes of a group, by their ids or names: each step of all of them before
    the next of any. What was cut off goes on with those that are left."""
    peer = PeerRegistry(paths.root).get(to) if to else None
    ways = [_Way(paths, group, peer) for group in groups]
    new = [way for way in ways if not way.defined]
    for way in new:
        assert way.view is not None
        _wait_filled(way.view, way.record, progress)
    for way in new:
        _follow(paths, way, progress)
    shared = _shared(paths, ways)
    with _held(way.view for way in ways if way.view is not None):
        made = [_define(paths, way, options, shared) if way in new else way.mine for way in ways]
        found = []
        for way, definition in zip(ways, made, strict=True):
            assert definition is not None
            if way.view is not None:
                _switch(paths, definition, way.view)
            found.append(definition)
    return found


def _shared(paths: SitePaths, ways: Sequence[_Way]) -> dict[str, Any]:
    """What the definitions of lanes have of the others. Those of other sites that this site knew
    when it wrote the group before are theirs, unless they came along; no number that a lane ever
    had, as far as is known here, is given again."""
    here = [lane_of(way.name) for way in ways if is_lane(way.name)]
    if not here:
        return {}
    held = find_lanes(paths, ways[0].failover.held.hex[:28] + "0000")
    before = [way.mine for way in ways if way.mine is not None]
    own = SiteIdentity.load(paths.root).site_id
    hosts = dict.fromkeys(here, own)
    for one in before:
        hosts = {**{lane: site for lane, site in one.hosts if site != own}, **hosts}
    lanes = sorted(hosts)
    stored = [lane_of(lane.name) + 1 for lane in held.lanes] if held is not None else []
    return {
        "lanes": tuple(lanes),
        "hosts": tuple(sorted(hosts.items())) if set(hosts.values()) != {own} else (),
        "joining": tuple(sorted({lane for one in before for lane in one.joining} - {*here})),
        "numbered": max(*(lane + 1 for lane in lanes), *stored, *(one.numbered for one in before)),
    }


def _reached(peer: Peer) -> Peer:
    if not peer.address:
        raise errors.ConfigError(
            f"site {peer.name!r} does not listen: set network.listen there, let it join once more, "
            "and try again"
        )
    return peer


def _require_name(groups: GroupDirectory, name: str, group_id: str) -> None:
    if name in set(groups.names()) and groups.load(name).group_id != group_id:
        raise errors.ExistsError(f"another group {name!r} is protected here")


def _wait_filled(view: ViewDirectory, record: ViewRecord, progress: Progress | None) -> None:
    """Until every block of the view's disks is here."""
    total = sum(disk.bytes for disk in record.disks)
    with contextlib.suppress(errors.VrepError):
        ControlClient(view.control).call("fill", timeout=5.0)
    while True:
        info = describe(view)
        if info.fill.get("done"):
            return
        if not info.running:
            raise errors.StateError(
                f"the recovered disks of {record.group!r} are not served: 'vrep run' serves them"
            )
        if info.conditions:
            raise errors.RecoveryError(
                f"the disks of {record.group!r} cannot be filled: {', '.join(info.conditions)}"
            )
        if progress is not None:
            progress(sum(info.fill.get("filled_to", {}).values()), total)
        time.sleep(ASK_EVERY_S)


def _follow(paths: SitePaths, way: _Way, progress: Progress | None) -> None:
    """Let the old site give way, and seal what its disks hold. Its answer is asked for again when
    it was lost, and until all is done there."""
    params = {
        "group_id": way.failover.held.hex,
        "epochs": [plain(entry) for entry in way.epochs],
        "wrapped_keys": list(way.failover.held.manifest.wrapped_keys),
    }
    with connect(SiteIdentity.load(paths.root), way.peer) as transport:
        while base := _ask_to_follow(transport, params):
            if progress is not None:
                progress(int(base["done"]), int(base["total"]))
            time.sleep(ASK_EVERY_S)


def _ask_to_follow(transport: FrameTransport, params: dict[str, Any]) -> dict[str, int] | None:
    """How far the old site is with its disks; None when it follows."""
    try:
        answer = transport.ask("group.follow", params, timeout_s=FOLLOW_S)
    except PeerRefusedError as error:
        kinds = {"busy-error": errors.BusyError, "fenced-error": errors.FencedError}
        raise kinds.get(error.code, errors.StateError)(error.detail) from None
    return answer.get("base") if isinstance(answer, dict) else None


def _define(
    paths: SitePaths, way: _Way, options: GroupOptions, shared: Mapping[str, Any]
) -> GroupDefinition:
    """The definition, written. What the filter and the spill knew of an earlier reign of this site
    goes first: it is of other disks, or of what they held before."""
    name, manifest, mine, view = way.name, way.failover.held.manifest, way.mine, way.view
    assert view is not None
    groups = GroupDirectory(paths.root)
    if mine is None or mine.yielded:
        config = load_config(paths.config)
        for state in STATE_FILES:
            (groups.path(name) / state).unlink(missing_ok=True)
        shutil.rmtree(paths.shm(config.filter.shm_dir) / name, ignore_errors=True)
        shutil.rmtree(paths.spill(name, config.source.spill_dir), ignore_errors=True)
    tenant = TenantKeyring(paths.root).find(
        inspect_wrapped(manifest.wrapped_keys[-1]).tenant_key_id
    )
    current, parent = way.current, way.current.parent
    definition = GroupDefinition(
        version=VERSION,
        group_id=way.failover.held.hex,
        name=name,
        disks=tuple(
            DiskDefinition(disk.name, view.disk_uri(disk), disk.bytes, disk.index)
            for disk in way.record.disks
        ),
        to_site=way.peer.site_id,
        key=tenant.name,
        tenant_key_id=tenant.key_id,
        epoch=current.epoch,
        epoch_id=current.epoch_id.hex(),
        wrapped_keys=tuple(base64.b64encode(blob).decode() for blob in manifest.wrapped_keys),
        created=mine.created if mine is not None else time.time(),
        parent=ParentPosition(parent.epoch, parent.lane, parent.seq),
        options=mine.options if mine is not None else options,
        **shared,
    )
    groups.store(definition)
    return definition


@contextlib.contextmanager
def _held(views: Iterable[ViewDirectory]) -> Iterator[None]:
    """Views that answer nobody, with all that was written to them stable; StorageError when that
    cannot be. Those that have not ended by then serve again afterwards."""
    with contextlib.ExitStack() as stack:
        for view in views:
            stack.callback(_go_on, view)
            _hold(view)
        yield


def _hold(view: ViewDirectory) -> None:
    """Unless nobody serves it: then its disks are the filter's, or it died. See `_held`."""
    deadline = time.monotonic() + BEGUN_S
    while (pid := view.holder()) is not None:
        try:
            ControlClient(view.control).call("hold", timeout=HOLD_S)
            return
        except (errors.UnreachableError, errors.GoneError):
            if time.monotonic() > deadline:
                raise
            # One that has just begun does not listen yet, or ends.
            time.sleep(ASK_EVERY_S)
        except errors.StorageError as error:
            raise errors.StorageError(
                f"what was written last to the disks of {view.load().group!r} cannot be stored, so "
                f"they stay with their view: {error.detail}. Shut the VM down and see to the "
                f"storage; once the process of the view, {pid}, is killed, 'vrep run' serves what "
                "is stored"
            ) from None


def _go_on(view: ViewDirectory) -> None:
    with contextlib.suppress(errors.VrepError):
        ControlClient(view.control).call("go_on", timeout=HOLD_S)


def _switch(paths: SitePaths, definition: GroupDefinition, view: ViewDirectory) -> None:
    """From the view's process to the filter. Cut off in between, either serves the same bytes, and
    never both: each holds the lock of the disks."""
    record = view.load()
    _hold(view)  # anew: that lapses, though not before it is told to end, or killed
    with ended(view):
        for disk in record.disks:
            _sync(view.data_path(disk))
        view.change(state=PROTECTED)
        view.nbd_socket.unlink(missing_ok=True)
        view.nbd_socket.symlink_to(paths.nbd_socket(definition.name).name)
    for role in ("filter", "source"):
        with contextlib.suppress(errors.UnreachableError):
            ControlClient(paths.socket(role)).call("reload")
    used = {disk.uri for disk in definition.disks}
    if _has_untaken(paths, definition.name):
        return  # what was written to the older disks is nowhere else
    for other in Failover(paths, definition.group_id).protected_views():
        if other.id != view.id and not used & {other.disk_uri(d) for d in other.load().disks}:
            with ended(other):
                other.remove()


def _has_untaken(paths: SitePaths, name: str) -> bool:
    """Whether an earlier reign of this site left writes that no other site took and nobody
    exported."""
    try:
        found = read_untaken(paths, name)
    except errors.NotFoundError:
        return False
    return bool(found.bytes) and not found.exported


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
