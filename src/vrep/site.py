"""`vrep.Site`: everything that the command line does, from Python.

A `Site` is a directory with its identity, peers, keys, groups, store and views. Its methods
work whether or not the site's processes run: they change durable files and then tell the
processes that listen. All raise subclasses of `vrep.errors.VrepError`.

    site = vrep.Site("/var/lib/vrep")
    site.protect("web", {"root": "file:/srv/web.raw"}, to="backup", key="acme")
    print(site.status("web"))
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import msgspec

from vrep import errors, iscsi, keyfiles
from vrep.control import ControlClient
from vrep.groups import GroupDefinition, GroupDirectory, GroupOptions
from vrep.lanes import group_of, is_lane, lane_of, lanes_among
from vrep.paths import SitePaths
from vrep.settings import Config, load_config, set_listen

if TYPE_CHECKING:
    from vrep.hypervisor.attach import Attacher
    from vrep.hypervisor.attach import Result as AttachResult
    from vrep.hypervisor.attach_mirror import MirrorAttacher
    from vrep.keys.identity import SiteIdentity
    from vrep.keys.release import ReleaseEntry
    from vrep.keys.tenant import KeyInfo, TenantKeyring
    from vrep.recovery.changes import ChangeList
    from vrep.recovery.cuts import HeldLanes
    from vrep.recovery.export import ExportResult
    from vrep.recovery.fold import FoldResult
    from vrep.recovery.points import PointList
    from vrep.recovery.repair import RepairReport
    from vrep.recovery.untaken import Untaken
    from vrep.recovery.verify import VerifyOptions, VerifyReport
    from vrep.recovery.view import ViewInfo
    from vrep.rotate import Rotation
    from vrep.service import ServiceOptions, ServicePlan
    from vrep.wire.peers import Peer, PeerRegistry

Made = TypeVar("Made")

SERVE_WAIT_S: Final = 15.0
RESIZE_S: Final = 120.0
REASON_LETTERS_MAX: Final = 1000
NOT_STORED: Final = "not-found-error"
"""a target's answer about a group of which it holds nothing"""


class Site:
    """One site, by its directory (default: ``VREP_DIR``, then /var/lib/vrep)."""

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.paths = SitePaths.of(directory)

    # ---- identity and peers --------------------------------------------------

    @classmethod
    def init(
        cls,
        directory: str | os.PathLike[str] | None = None,
        *,
        name: str,
        listen: str = "",
    ) -> Site:
        """Make a new site. `listen` is the HOST:PORT where other sites connect; without it
        the site can protect its own disks but receive nothing."""
        from vrep.keys.identity import SiteIdentity
        from vrep.wire.address import parse_address

        if listen:
            parse_address(listen)
        site = cls(directory)
        site.paths.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        SiteIdentity.create(site.paths.root, name)
        if listen:
            set_listen(site.paths.config, listen)
        return site

    @property
    def identity(self) -> SiteIdentity:
        from vrep.keys.identity import SiteIdentity

        return SiteIdentity.load(self.paths.root)

    @property
    def config(self) -> Config:
        return load_config(self.paths.config)

    @property
    def peers(self) -> PeerRegistry:
        from vrep.wire.peers import PeerRegistry

        return PeerRegistry(self.paths.root)

    @property
    def keys(self) -> TenantKeyring:
        from vrep.keys.tenant import TenantKeyring

        return TenantKeyring(self.paths.root)

    @property
    def groups(self) -> GroupDirectory:
        return GroupDirectory(self.paths.root)

    def invite(self, *, lifetime_s: int = 86400) -> str:
        """A token with which one other site may join, once, within its lifetime."""
        from vrep.wire.invite import InviteBook, encode_invite

        identity, network = self.identity, self.config.network
        address = network.advertise or network.listen
        if not address:
            raise errors.ConfigError(
                "this site does not listen: set network.listen in config.toml, or run "
                "'vrep site init' with --listen"
            )
        invite = InviteBook(self.paths.root).create(
            name=identity.name,
            address=address,
            fingerprint=identity.fingerprint,
            lifetime_s=lifetime_s,
        )
        return encode_invite(invite)

    def join(self, token: str) -> Peer:
        """Use an invitation: both sites trust each other from now on."""
        from vrep.wire.site import join_site

        network = self.config.network
        return join_site(
            self.identity,
            self.peers,
            token,
            listen_address=network.advertise or network.listen,
        )

    def remove_peer(self, name: str) -> Peer:
        """Stop trusting a site. Refused while a group is protected to it."""
        peer = self.peers.get(name)
        users = [g.name for g in self.groups.readable() if g.to_site == peer.site_id]
        if users:
            raise errors.BusyError(
                f"{', '.join(users)} replicate to {peer.name!r}: unprotect them first"
            )
        removed = self.peers.remove(name)
        self._tell("target", "reload")
        return removed

    # ---- protection ------------------------------------------------------------

    def protect(
        self,
        group: str,
        disks: Mapping[str, str],
        *,
        to: str,
        key: str,
        accept_key_loss: bool = False,
        options: GroupOptions | None = None,
        fronts: Mapping[str, str] | None = None,
        lanes: int = 0,
    ) -> GroupDefinition:
        """Replicate disks, as one group, to a site that joined.

        `disks` maps names to backing URIs (``file:`` or ``block:``), `fronts` to how a VM reaches
        them (``nbd``, which is the default, or ``vhost-user-blk``). The first sync begins when the
        site's processes run. VMs must use the group's sockets from now on: see `disk_uri`. With
        `lanes` the disks are dealt out, in turn, to so many filter threads, each with sockets of
        its own; the answer is the first one's definition. Such a group is recovered at the cuts
        over its lanes.
        """
        from vrep.protect import protect

        made = protect(
            self,
            group,
            disks,
            to=to,
            key=key,
            accept_key_loss=accept_key_loss,
            options=options or self.group_options(),
            fronts=fronts or {},
            lanes=lanes,
        )
        self._tell("filter", "reload")
        self._tell("source", "reload")
        return made[0]

    def lanes_of(self, group: str) -> list[str]:
        """What is protected here under a name: a group, a lane, or the lanes of a group."""
        names = list(self.groups.names())
        return [group] if group in names else lanes_among(group, names)

    def _of_group(self, group: str) -> list[str]:
        """`lanes_of`; NotFoundError when there are none."""
        found = self.lanes_of(group)
        if not found:
            raise errors.NotFoundError(f"no group {group!r} is protected here")
        return found

    def group_options(self, **changes: Any) -> GroupOptions:
        """The options of a new group as the settings have them, with changes."""
        config = self.config
        options = GroupOptions(
            ring_bytes=config.filter.ring_bytes,
            threads=config.filter.io_threads,
            rate_bytes_per_s=config.source.resync_rate,
            compression=config.source.compression,
            socket_mode=int(config.filter.socket_mode, 8),
            socket_group=config.filter.socket_group,
        )
        return msgspec.structs.replace(options, **changes)

    def unprotect(self, group: str, *, delete_history: bool = False) -> str:
        """Stop replicating a group and forget it here; its disks stay as they are. With
        `delete_history` the target deletes what it holds as well; that needs the target. The
        answer is why the target could not be told, if it could not: then it misses its source.

        At the site that holds the history of a group that was given up, with `delete_history`:
        delete that history."""
        lanes = self.lanes_of(group)
        if lanes and lanes != [group]:
            for lane in lanes:  # all are looked at before the first is given up
                if clients := self._clients(lane):
                    raise errors.BusyError(
                        f"{clients} client(s) use {lane!r}: move the VM back to its disks first"
                    )
            problems = [self.unprotect(lane, delete_history=delete_history) for lane in lanes]
            return "; ".join(dict.fromkeys(text for text in problems if text))
        # Only what the target is told is in the definition: a group whose definition cannot be
        # read can be forgotten all the same.
        if group not in set(self.groups.names()):
            if delete_history:
                self._delete_held(group)
                return ""
            raise errors.NotFoundError(f"no group {group!r} is protected here")
        clients = self._clients(group)
        if clients:
            raise errors.BusyError(
                f"{clients} client(s) use {group!r}: move the VM back to its disks first"
            )
        if delete_history:
            self._delete_history(self.groups.load(group))
        try:
            definition, problem = self.groups.load(group), ""
        except errors.VrepError as error:
            definition, problem = None, str(error)
        self.groups.forget(group)
        for name in lanes_among(group_of(group), self.groups.names()) if is_lane(group) else ():
            left = tuple(n for n in self.groups.load(name).lanes if n != lane_of(group))
            self.groups.update(name, lanes=left)  # cuts are made without it, and are whole
        self._tell("source", "reload")
        if self._tell("filter", "reload"):
            self._wait_gone(group)
        shutil.rmtree(self.groups.path(group))
        shutil.rmtree(self.paths.shm(self.config.filter.shm_dir) / group, ignore_errors=True)
        spill = self.paths.spill(group, self.config.source.spill_dir)
        shutil.rmtree(spill, ignore_errors=True)
        # Last: a session that still ran would take the group back.
        if definition is not None and not delete_history:
            problem = self._tell_target(definition, "group.unprotect", {})
        return problem

    def keep(
        self, group: str, *, window_s: int | None = None, quota_bytes: int | None = None
    ) -> str:
        """Change how much history the target keeps of a group; None leaves a limit as it is, 0
        lifts it. The answer is why the target could not be told, if it could not: it learns it
        when the group is shipped next."""
        lanes = self._of_group(group)
        if lanes != [group]:
            told = [self.keep(n, window_s=window_s, quota_bytes=quota_bytes) for n in lanes]
            return "; ".join(dict.fromkeys(text for text in told if text))
        definition = self.groups.load(group)
        given = {"window_s": window_s, "quota_bytes": quota_bytes}
        changes = {name: value for name, value in given.items() if value is not None}
        options = msgspec.structs.replace(definition.options, **changes)
        self._change(group, options=options)
        params = {"window_s": options.window_s, "quota": options.quota_bytes}
        return self._tell_target(definition, "group.keep", params)

    def options_of(self, group: str) -> GroupOptions:
        """The options of a protected group."""
        return self.groups.load(self._of_group(group)[0]).options

    def pause(self, group: str) -> None:
        """Stop shipping. Writes stay marked; the ring may overflow into a gap."""
        for name in self._of_group(group):
            self._change(name, paused=True)

    def resume(self, group: str, *, force: bool = False) -> None:
        """Ship again. `force`: also let a guest go on that a move has halted, without the word of
        the site that moves the group; it may have taken it over, and then two VMs run."""
        lanes = self._of_group(group)
        if lanes != [group]:
            for name in lanes:
                self.resume(name, force=force)
            return
        if self.groups.load(group).halted:
            if not force:
                raise errors.StateError(
                    f"{group!r} is being moved: it goes on by itself once its target is reached "
                    "and has not taken it over; --force, if you know that it has not"
                )
            from vrep.source.halt import go_on

            if self.groups.load(group).fenced or self._connected(group):
                raise errors.StateError(
                    f"the target of {group!r} can be asked: it decides whether the guest goes on"
                )
            go_on(self.groups, self._filter(), group)
        self._change(group, paused=False)

    def resync(self, group: str) -> None:
        """Copy every block again, as if the target held nothing that can be trusted; at the
        group's rate, and once it is resumed if it is paused."""
        for name in self._of_group(group):
            self.groups.load(name)
            self._filter().call("resync", group=name, all=True)

    def resize(
        self, group: str, disk: str, size: int | None = None, *, shrink: bool = False
    ) -> dict[str, Any]:
        """Give a disk another size, as one record in the order of its writes: {"bytes",
        "changed"}. A file gets it here; a block device, or without `size`, has it already. Points
        before it keep the size that the disk had. `shrink`: a smaller one, too, whose end the
        guest does not use any more. The filter must run; its clients connect again."""
        for lane in self._of_group(group):
            if any(one.name == disk for one in self.groups.load(lane).disks):
                group = lane
        self.groups.load(group)
        answer: dict[str, Any] = self._filter().call(
            "resize", timeout=RESIZE_S, group=group, disk=disk, size=size or 0, shrink=shrink
        )
        self._tell("source", "reload", group=group)
        return answer

    def wait_replicating(
        self,
        group: str,
        *,
        timeout_s: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Until a first sync or resync has ended, and every write is shipped in its order.
        `progress` hears the bytes of the sync, so far and in all."""
        from vrep.waits import replicating

        self.wait_served(group)
        for name in self._of_group(group):
            replicating(self, name, timeout_s, progress)

    def attach(
        self,
        group: str,
        vm: str | None = None,
        *,
        dry_run: bool = False,
        reconnect_s: int | None = None,
        mode: Literal["inline", "mirror"] = "inline",
    ) -> AttachResult | None:
        """Put the filter under the disks of a running VM (``qmp:SOCKET``, ``libvirt:NAME``) that
        this group protects, without a pause that its guest notices; `dry_run` only says how.
        UnsupportedError: a block graph that is not known, and was left as it is. Without `vm`: a
        group that was detached is served again, for a VM that is started on its socket.

        In the mode `mirror` the VM goes on writing its disks itself, and sends a copy of each
        write: whatever becomes of the filter, the VM goes on.

        Of a libvirt domain the definition is kept as object ``domain.xml``, and its NVRAM as
        ``nvram``, if it has one."""
        from vrep.hypervisor.attach import RECONNECT_S

        if vm is None:
            self.groups.update(group, detached=False)
            self._tell("filter", "reload")
            return None
        if mode == "mirror":
            result = self._mirror_attacher(group).attach(vm, dry_run=dry_run)
        else:
            delay = RECONNECT_S if reconnect_s is None else reconnect_s
            result = self._attacher(group).attach(vm, dry_run=dry_run, reconnect_s=delay)
        if dry_run or not vm.startswith("libvirt:"):
            return result
        put, missing = self._keep_domain(group, vm.partition(":")[2])
        return msgspec.structs.replace(result, objects=put, objects_missing=missing)

    def _keep_domain(self, group: str, domain: str) -> tuple[tuple[str, ...], str]:
        """Put what is kept of a libvirt domain beside its disks; why something is missing: the VM
        is attached all the same."""
        from vrep.hypervisor.domain import describe

        put: list[str] = []
        try:
            found, missing = describe(domain)
            for name, data in found.items():
                self.object_put(group, name, data)
                put.append(name)
        except errors.VrepError as error:
            missing = str(error)
        return tuple(put), missing

    # ---- objects ---------------------------------------------------------------------

    def object_put(
        self, group: str, name: str, data: bytes, *, wait_s: float = 0.0
    ) -> dict[str, Any]:
        """Let a small blob travel with a group, sealed, its name too: {"name", "bytes",
        "durable"}. It is a version of its name from the next position on. It is kept here until a
        target holds it, so it may be put in a gap, before the first sync, or while the filter does
        not run. With `wait_s` the target holds it, or `TimeLimitError` is raised."""
        from vrep.objects import ObjectDirectory

        definition = self.groups.load(group)
        room = definition.options.ring_bytes // 4
        if len(data) > room:
            raise errors.InvalidError(
                f"object {name!r} has {len(data)} bytes; {group!r}'s ring takes {room} at most"
            )
        objects = ObjectDirectory(self.groups.path(group))
        one = objects.put(name, data, time.time_ns())
        deadline = time.monotonic() + wait_s
        while True:
            try:
                self._filter().call("publish_objects", group=group)
            except errors.VrepError:
                if wait_s:
                    raise
            durable = one not in objects.due()
            if durable or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        if wait_s and not durable:
            raise errors.TimeLimitError(
                f"object {name!r} is not durable at the target after {wait_s:g} s: it is kept "
                "here until it is"
            )
        return {"name": name, "bytes": len(data), "durable": durable}

    def objects(self, group: str, at: str = "latest") -> list[dict[str, Any]]:
        """The objects of a group, by name: at the site that holds its history, as they were at a
        point, {"name", "bytes", "point", "time"}; at its source, the newest, {"name", "bytes",
        "durable", "time"}."""
        if group in set(self.groups.names()) and at == "latest":
            return self._own_objects(group)
        from vrep.recovery.object_records import list_objects

        return [msgspec.to_builtins(each) for each in list_objects(self.paths, group, at)]

    def _own_objects(self, group: str) -> list[dict[str, Any]]:
        from vrep.objects import ObjectDirectory, parse

        objects = ObjectDirectory(self.groups.path(group))
        due = objects.due()
        found = []
        for one in objects.ids():
            plain = parse(objects.load(one))
            row = {"name": plain.name, "bytes": len(plain.data), "durable": one not in due}
            found.append({**row, "time": utc(plain.wall_ns / 1e9)})
        return sorted(found, key=lambda row: str(row["name"]))

    def object_get(self, group: str, name: str, at: str = "latest") -> bytes:
        """The bytes of an object at a point, at the site that holds the group's history."""
        from vrep.recovery.object_records import get_object

        return get_object(self.paths, group, name, at)

    def detach(self, group: str, *, dry_run: bool = False) -> AttachResult:
        """Undo `attach`: the VM's disks are as they were, the filter lets them alone, and nothing
        that is written from then on is replicated. For a VM that is off: the same, without it."""
        from vrep.hypervisor.record import AttachmentFile

        record = AttachmentFile(self.groups, group).load()
        if record is not None and record.mode == "mirror":
            return self._mirror_attacher(group).detach(dry_run=dry_run)
        return self._attacher(group).detach(dry_run=dry_run)

    def _attacher(self, group: str) -> Attacher:
        from vrep.hypervisor.attach import Attacher

        return Attacher(self.groups, self._filter(), group, self.paths.nbd_socket(group))

    def _mirror_attacher(self, group: str) -> MirrorAttacher:
        from vrep.hypervisor.attach_mirror import MirrorAttacher

        return MirrorAttacher(self.groups, self._filter(), group, self.paths.nbd_socket(group))

    def checkpoint(
        self,
        group: str,
        label: str,
        *,
        wait_s: float = 0.0,
        quiesce: bool = False,
        agent: str = "",
    ) -> dict[str, Any]:
        """Name the present instant: {"seq", "wall_ns"} of the mark, ordered after every write
        that was acknowledged before, and whether it is "durable" at the target, which it must
        be before it can be recovered. With `wait_s` it is, or `TimeLimitError` is raised.

        With `quiesce` the guest's file systems are frozen meanwhile, by its guest agent
        (``unix:SOCKET`` or ``libvirt:NAME``; default: the settings'), between the commands of the
        settings; it is thawed whatever happens, and an error says that it was not frozen."""
        from vrep.hypervisor.quiesce import mark_quiesced
        from vrep.recovery.point import check_label
        from vrep.waits import cut, cut_durable, durable, mark

        check_label(label)
        control, lanes = self._filter(), self.lanes_of(group) or [group]

        def made_by(make: Callable[[float | None], Made]) -> Made:
            if not quiesce:
                return make(None)
            return mark_quiesced(
                self.config.quiesce, agent, self.groups, control, lanes, label, make
            )

        if lanes != [group]:
            answer = made_by(partial(cut, self, lanes, label, wait_s))
            found = cut_durable(self, lanes, label, answer, wait_s)
        else:
            one = made_by(partial(mark, self.groups, control, group, label, wait_s))
            found = durable(self.groups, control, group, one, wait_s)
        return {**found, "quiesced": quiesce}

    def disk_uri(self, group: str, disk: str | None = None) -> str:
        """Where a VM finds a disk of a protected group (default: the first): an NBD or iSCSI URI,
        or ``vhost-user-blk:`` and the path of a socket."""
        for lane in self._of_group(group):
            definition = self.groups.load(lane)
            for found in definition.disks:
                if disk not in (None, found.name):
                    continue
                if found.front == "vhost-user-blk":
                    return f"vhost-user-blk:{self.paths.vhost_socket(lane, found.index)}"
                if found.front == iscsi.FRONT:
                    units = [d.name for d in definition.disks if d.front == iscsi.FRONT]
                    return iscsi.uri(definition, units.index(found.name))
                return f"nbd+unix:///{found.name}?socket={self.paths.nbd_socket(lane)}"
        raise errors.NotFoundError(f"group {group!r} has no disk {disk!r}")

    def set_fronts(self, group: str, fronts: Mapping[str, str], **options: Any) -> GroupDefinition:
        """Change how a VM reaches disks of a protected group, and with `options` where iSCSI is
        served. Refused while a VM uses one; what cannot be served leaves all as it was."""
        from vrep.protect import with_fronts

        definition = before = self.groups.load(group)
        disks = tuple(with_fronts(definition.disks, fronts))
        changed = msgspec.structs.replace(definition.options, **options)
        iscsi.check(changed, [disk.front for disk in disks])
        if clients := self._clients(group):
            raise errors.BusyError(f"{clients} client(s) use {group!r}: shut the VM down first")
        definition = self.groups.update(group, disks=disks, options=changed)
        # One that is not served now is served so by its next start.
        with contextlib.suppress(errors.UnreachableError, errors.NotFoundError):
            try:
                self._filter().call("front", group=group)
            except (errors.UnreachableError, errors.NotFoundError):
                raise
            except errors.VrepError:
                self.groups.update(group, disks=before.disks, options=before.options)
                raise
        return definition

    def running(self, role: str = "filter") -> bool:
        """Whether a process of this site answers."""
        return ControlClient(self.paths.socket(role)).alive()

    def wait_served(self, group: str, timeout_s: float = SERVE_WAIT_S) -> None:
        """Until the filter serves a group's disks."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                for name in self._of_group(group):
                    self._filter().call("status", group=name)
                return
            except errors.VrepError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    # ---- status ------------------------------------------------------------------

    def status(self, group: str | None = None) -> dict[str, Any]:
        """State, conditions, RPO and lag of all groups or one: what `vrep status --json` prints."""
        from vrep.status import collect

        return collect(self, group)

    def verdict(self, status: Mapping[str, Any]) -> tuple[int, list[str]]:
        """What `vrep status --check` makes of a status: 0 well, 1 warning, 2 critical, and why.
        The limits of the RPO are those of the settings."""
        from vrep.status import verdict

        return verdict(status, self.config.status)

    # ---- recovery, at the site that holds the history ------------------------------

    def _require_group(self, group: str) -> None:
        """InvalidError for one of the lanes of a group that is taken as a whole."""
        if is_lane(group):
            raise errors.InvalidError(
                f"{group!r} is a lane: all lanes of {group_of(group)!r} go together"
            )

    def _lanes_held(self, group: str) -> HeldLanes | None:
        """The lanes of a group whose history this site holds, if it is one of several."""
        from vrep.recovery.cuts import find_lanes

        return find_lanes(self.paths, group)

    def points(
        self, group: str, *, progress: Callable[[int, int], None] | None = None
    ) -> PointList:
        """What can be recovered, and what cannot: points, gaps, marks, verdicts. `progress`
        hears the bytes of history that were checked, so far and in all."""
        from vrep.recovery.points import list_points

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.points(self.paths, lanes, progress=progress)
        return list_points(self.paths, group, progress=progress)

    def changes(
        self, group: str, since: str, at: str = "latest", *, disk: str | None = None
    ) -> ChangeList:
        """Which bytes of the group's disks (or of one) may differ between two points, in blocks
        of 4 KiB, from the indexes alone. What is not in the list is equal at both. The order of
        the points does not matter, and they may lie on different branches of the history."""
        from vrep.recovery.changes import list_changes

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.changes(self.paths, lanes, since, at, disk)
        return list_changes(self.paths, group, since, at, disk)

    def test_start(self, group: str, at: str = "latest", *, since: str | None = None) -> ViewInfo:
        """Serve the group's disks as they were, to try them; replication goes on. With `since`,
        another point, the NBD server offers what may differ from it as a dirty bitmap: see
        `ViewInfo.bitmap`."""
        from vrep.recovery.view import start_test

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.serve(self.paths, lanes, at, since)
        return start_test(self.paths, group, at, since)

    def tests(self) -> list[ViewInfo]:
        """Views that are served here."""
        from vrep.recovery.view import list_views

        return list_views(self.paths)

    def test_stop(self, group: str) -> None:
        """End a test and delete what it wrote."""
        from vrep.recovery.view import stop_test

        stop_test(self.paths, group)

    def failover_start(
        self,
        group: str,
        at: str = "latest",
        *,
        force: bool = False,
        since: str | None = None,
        onto: Mapping[str, str] | None = None,
    ) -> ViewInfo:
        """Take the group over at a point: the old writer is refused from here on. Undo by
        `failover_rollback`, keep by `failover_commit`. `since`: as for `test_start`. `onto` maps
        names of disks to ``file:`` or ``block:`` URIs that are filled in place, over what they
        hold, while the VM runs."""
        from vrep.recovery.failover import start

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined_failover

            return joined_failover.failover_start(
                self.paths, lanes, at, force=force, since=since, onto=onto
            )
        return start(self.paths, group, at, force=force, since=since, onto=onto)

    def failover_commit(self, group: str) -> ViewInfo:
        from vrep.recovery.failover import commit

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined_failover

            return joined_failover.failover_commit(self.paths, lanes)
        return commit(self.paths, group)

    def failover_rollback(self, group: str) -> None:
        from vrep.recovery.failover import rollback

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined_failover

            joined_failover.failover_rollback(self.paths, lanes)
        else:
            rollback(self.paths, group)

    def move(
        self,
        group: str,
        *,
        pause: bool = False,
        wait_s: float = 120.0,
        onto: Mapping[str, str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> ViewInfo:
        """At the site that holds the history: take a group over from its source, which lives, and
        lose nothing; the source stays halted. Refused while a VM uses its disks there, unless
        `pause` cuts it off. `wait_s` bounds how long the last changes may take; `onto`: as for
        `failover_start`."""
        from vrep.recovery.move import move

        self._require_group(group)
        if lanes := self._lanes_held(group):
            from vrep.recovery import joined_failover

            return joined_failover.move(
                self.paths, lanes, pause=pause, wait_s=wait_s, onto=onto, progress=progress
            )
        return move(self.paths, group, pause=pause, wait_s=wait_s, onto=onto, progress=progress)

    def failback(
        self,
        group: str,
        *,
        pause: bool = False,
        wait_s: float = 120.0,
        discard_untaken: bool = False,
        moved: Callable[[ViewInfo], None] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> GroupDefinition:
        """At the old site, once the group is protected back to it: return the group to it, onto
        the disks that it had here, and protect it to the other site again. `moved` hears of the
        view as soon as its VM may run here: the disks are filled meanwhile. Refused when those
        disks hold writes that were not taken over and not exported, unless `discard_untaken`."""
        from vrep.recovery.failback import failback

        self._require_group(group)
        if lanes := self._lanes_held(group):
            from vrep.recovery import joined_failover

            return joined_failover.failback(
                self.paths, lanes, self.group_options(), pause=pause, wait_s=wait_s,
                discard_untaken=discard_untaken, moved=moved, progress=progress,
            )[0]  # fmt: skip
        return failback(
            self.paths, group, self.group_options(), pause=pause, wait_s=wait_s,
            discard_untaken=discard_untaken, moved=moved, progress=progress,
        )  # fmt: skip

    def untaken(self, group: str) -> Untaken:
        """What this site wrote of a group that the site which took it over does not have."""
        from vrep.recovery.untaken import find_untaken, joined_untaken

        lanes = self._of_group(group)
        if lanes != [group]:
            return joined_untaken([find_untaken(self.paths, lane) for lane in lanes])
        return find_untaken(self.paths, group)

    def export_untaken(
        self,
        group: str,
        out: str | os.PathLike[str],
        *,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Untaken:
        """Write the disks of a group that was taken over as they are here, and the list of extents
        that were not taken, into new files of a directory. Refused while a VM uses them."""
        from vrep.recovery.untaken import export_untaken, joined_untaken

        lanes = self._of_group(group)
        if lanes != [group]:
            return joined_untaken(
                [export_untaken(self.paths, lane, Path(out), progress=progress) for lane in lanes]
            )
        return export_untaken(self.paths, group, Path(out), progress=progress)

    def reverse(
        self, group: str, *, progress: Callable[[int, int], None] | None = None
    ) -> GroupDefinition:
        """Protect a recovered VM back to its old site, once its failover is committed: its disks
        become those of a protected group of this site. Its VM sees a pause, and finds its disks on
        the same sockets. `progress` hears the bytes of its disks that are here, so far and in
        all: they must all be."""
        from vrep.recovery.reverse import reverse

        self._require_group(group)
        if lanes := self._lanes_held(group):
            from vrep.recovery import joined_failover

            return joined_failover.reverse(
                self.paths, lanes, self.group_options(), progress=progress
            )[0]
        return reverse(self.paths, group, self.group_options(), progress=progress)

    def export(
        self,
        group: str,
        out: str | os.PathLike[str],
        *,
        at: str = "latest",
        format: str = "raw",
        sha256: bool = False,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> ExportResult:
        """Write the group's disks at a point into files of a directory. `progress` hears what
        is done ("check", then each disk's name), bytes so far, bytes in all."""
        from vrep.recovery.export import export

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.export(
                self.paths, lanes, at, Path(out), format, progress=progress, sha256=sha256
            )
        return export(self.paths, group, at, Path(out), format, progress=progress, sha256=sha256)

    def verify(
        self,
        group: str,
        at: str = "latest",
        *,
        options: VerifyOptions | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> VerifyReport:
        """Prove that a point recovers: every object of the store, the point itself and a sample
        of others, the file systems on a view. The signed verdicts are kept and shown by `points`
        and `status`. What is wrong is in the report; `LockedError` while another one runs."""
        from vrep.recovery.verify import verify

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.verify(self.paths, lanes, at, options=options, progress=progress)
        return verify(self.paths, group, at, options=options, progress=progress)

    def repair(self, group: str, *, start_over: bool = False) -> RepairReport:
        """At the site that holds a group's history, while its target process does not have it
        open: make indexes again from records that are whole. What is lost is in the report, and
        then nothing was changed; with `start_over` the damaged store is set aside instead, and the
        source sends everything again."""
        from vrep.recovery.repair import repair

        return repair(self.paths, group, start_over=start_over)

    def fold(self, group: str, at: str) -> FoldResult:
        """At the site that holds its history: keep the recovery points of a group from one on.
        Those before it cannot be had any more."""
        from vrep.recovery.fold import fold

        if lanes := self._lanes_held(group):
            from vrep.recovery import joined

            return joined.fold(self.paths, lanes, at)
        return fold(self.paths, group, at)

    # ---- keys ------------------------------------------------------------------------

    def key_create(self, name: str) -> KeyInfo:
        return self.keys.create(name)

    def key_export(
        self, name: str, out: str | os.PathLike[str], passphrase: str | None = None
    ) -> None:
        """Write a key into a new file that only its owner can read."""
        keyfiles.write_new(out, lambda: self.keys.export(name, passphrase))

    def key_verify(
        self, name: str, file: str | os.PathLike[str], passphrase: str | None = None
    ) -> KeyInfo:
        """Read an export back and compare it with the key held here."""
        return self.keys.verify(name, keyfiles.read(file), passphrase)

    def key_import(
        self,
        file: str | os.PathLike[str],
        *,
        name: str | None = None,
        passphrase: str | None = None,
    ) -> KeyInfo:
        """Take in an exported key, or one that was released to this site."""
        from vrep.keys.release import is_release, opener

        text = keyfiles.read(file)
        if is_release(text):
            return self.keys.import_released(text, opener(self.identity))
        return self.keys.import_key(text, passphrase, name=name)

    def key_release(
        self, name: str, to: str, out: str | os.PathLike[str], *, reason: str = ""
    ) -> None:
        """Wrap a key for a peer that recovers, into a new file that only that site can open.
        The release is in the log, with its reason, before it is written."""
        if not reason.isprintable() or len(reason) > REASON_LETTERS_MAX:
            raise errors.InvalidError(
                f"a reason is one line of printable text, at most {REASON_LETTERS_MAX} letters"
            )
        recipient = self.peers.get(to).certificate
        keyfiles.write_new(out, lambda: self.keys.release(name, recipient, reason=reason))

    def key_releases(self, name: str | None = None) -> list[ReleaseEntry]:
        """Every release of a key (or of all), oldest first: to whom, when and why.
        TenantKeyError when a line of the log was changed or taken away."""
        from vrep.keys.release import read_log

        entries = read_log(self.keys.release_log_path)
        return [entry for entry in entries if name in (None, entry.key_name)]

    def key_rotate(
        self,
        name: str,
        *,
        out: str | os.PathLike[str] | None = None,
        passphrase: str | None = None,
        accept_key_loss: bool = False,
        wait_s: float = 30.0,
    ) -> Rotation:
        """Wrap the data keys of every group under a new generation of a tenant key; nothing is
        sent again. First with `out`: the new generation is made and exported there. Once that
        export was read back (`key_verify`), again without: the groups are wrapped anew, and their
        targets are told; `wait_s` bounds how long that is waited for. What was cut off, or a target
        that could not be told, goes on when it is called again."""
        from vrep.rotate import rotate

        return rotate(
            self, name, out=out, passphrase=passphrase, accept_key_loss=accept_key_loss,
            wait_s=wait_s,
        )  # fmt: skip

    # ---- the host ----------------------------------------------------------------------

    def service_install(
        self, options: ServiceOptions | None = None, *, dry_run: bool = False
    ) -> ServicePlan:
        """Run this site under systemd, as root; `dry_run`: only what would be done."""
        from vrep.service import install, plan

        return plan(self.paths, options) if dry_run else install(self.paths, options)

    def service_uninstall(self, *, force: bool = False) -> list[str]:
        """Remove the units; the site stays. The removed files."""
        from vrep.service import uninstall

        return uninstall(self.paths, force=force)

    # ---- internals ---------------------------------------------------------------------

    def _filter(self) -> ControlClient:
        return ControlClient(self.paths.socket("filter"))

    def _connected(self, group: str) -> bool:
        """Whether the group's session with its target stands."""
        try:
            found = ControlClient(self.paths.socket("source")).call("status", group=group)
        except (errors.UnreachableError, errors.NotFoundError):
            return False
        return bool(found[group]["connected"])

    def _tell(self, role: str, method: str, **params: Any) -> bool:
        """Call a process of this site if it runs. False when it does not: then it reads the
        files when it starts."""
        try:
            ControlClient(self.paths.socket(role)).call(method, **params)
        except errors.UnreachableError:
            return False
        return True

    def _clients(self, group: str) -> int:
        """NBD connections of a group; none when it is not served, whatever the reason."""
        try:
            return int(self._filter().call("status").get(group, {}).get("clients", 0))
        except errors.UnreachableError:
            return 0

    def _wait_gone(self, group: str) -> None:
        deadline = time.monotonic() + SERVE_WAIT_S
        while time.monotonic() < deadline:
            try:
                self._filter().call("status", group=group)
            except (errors.NotFoundError, errors.UnreachableError):
                return
            time.sleep(0.05)
        raise errors.TimeLimitError(f"the filter still serves {group!r}")

    def _change(self, group: str, **changes: Any) -> None:
        self.groups.update(group, **changes)
        self._tell("source", "reload", group=group)

    def _delete_history(self, definition: GroupDefinition) -> None:
        from vrep.wire.transport import PeerRefusedError

        try:
            self._ask_target(definition, "group.delete", {})
        except PeerRefusedError as error:
            if error.code != NOT_STORED:  # a group that was never served has left nothing there
                raise

    def _tell_target(self, definition: GroupDefinition, method: str, params: dict[str, Any]) -> str:
        """Ask the target for something; why it could not be asked."""
        from vrep.wire.transport import PeerRefusedError

        try:
            self._ask_target(definition, method, params)
        except PeerRefusedError as error:
            return "" if error.code == NOT_STORED else str(error)
        except errors.VrepError as error:
            return str(error)
        return ""

    def _delete_held(self, group: str) -> None:
        """Delete the history of a group that its source gave up, through the target process,
        which has it open."""
        from vrep.recovery.held import find_group
        from vrep.recovery.view import PROTECTED, view_directories

        held = find_group(self.paths, group)
        if held.manifest.current_epoch.writer.hex() == self.identity.site_id:
            raise errors.StateError(f"this site took {group!r} over: its history is in use")
        # Also one that does not run now: what it has not fetched yet stands in the history alone.
        views = [
            view.id
            for view in view_directories(self.paths)
            if (record := view.load()).group_id == held.hex and record.state != PROTECTED
        ]
        if views:
            raise errors.BusyError(
                f"view {', '.join(views)} reads the history of {group!r}: end it first, with "
                "'vrep test stop' or 'vrep failover rollback'"
            )
        ControlClient(self.paths.socket("target")).call("delete_unprotected", group_id=held.hex)

    def _ask_target(self, definition: GroupDefinition, method: str, params: dict[str, Any]) -> Any:
        from vrep.wire.site import connect

        with connect(self.identity, self.peers.get(definition.to_site)) as transport:
            return transport.ask(method, {"group_id": definition.group_id, **params})


def utc(seconds: float) -> str:
    """RFC 3339 text of a time."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


__all__ = ["Site", "utc"]
