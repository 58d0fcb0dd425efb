"""A group that a filter process hosts: its native group, and the servers of its disks.

Opening reads files and maps memory, and takes the image locks of the disks; serving listens. Both
raise errors that name the disks or addresses. The guest's I/O runs on native threads.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from vrep import iscsi
from vrep._core.filter import Group
from vrep._core.serve import Server
from vrep.app.publishing import Publisher
from vrep.app.resizing import open_disks
from vrep.errors import BusyError, GoneError, LockedError, StateError, StoreFullError, VrepError
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.hypervisor.images import read_through_vm
from vrep.lanes import lane_of
from vrep.paths import SitePaths, socket_gid
from vrep.wire.address import parse_address

if TYPE_CHECKING:
    from vrep._core.serve import Client

__all__ = ["Hosted", "close", "open_group", "serve", "serve_or_close"]

log = structlog.get_logger("vrep.filter")


@dataclass
class Hosted:
    """A group that is served."""

    definition: GroupDefinition
    group: Group
    server: Server | None
    """None while the guest is paused"""
    ring_path: str = ""
    """empty: passed through, without a ring"""

    lock: threading.Lock = field(default_factory=threading.Lock)
    publisher: Publisher | None = None
    """of its objects; None: passed through"""
    handover_until: float = 0.0
    """a VM that has not switched by then (monotonic) is not waited for"""

    def clients(self) -> list[Client]:
        with self.lock:
            return self.server.clients() if self.server is not None else []

    def take_server(self) -> Server | None:
        """The server, which nobody else uses from now on."""
        with self.lock:
            server, self.server = self.server, None
            return server


def open_group(
    paths: SitePaths,
    definition: GroupDefinition,
    shm: Path | None,
    *,
    bypass: bool = False,
    handover: bool = False,
) -> Group:
    """The native group of a definition, with what is kept of it in `shm` (None: a bypass has
    none). `bypass`: commands pass, and nothing is recorded. `handover`: beside the VM that has the
    disks open now."""
    options = definition.options
    disks = read_through_vm(definition, open_disks(definition), paths.nbd_socket(definition.name))
    uris = ", ".join(disk.uri for disk in disks)
    try:
        return Group(
            disks,
            tap=not bypass,
            bypass=bypass,
            group_id=bytes.fromhex(definition.group_id),
            target_id=bytes.fromhex(definition.to_site),
            epoch_id=bytes.fromhex(definition.epoch_id),
            epoch=definition.epoch,
            first_seq=definition.parent.seq,
            lane=lane_of(definition.name),
            shm_dir=shm,
            state_dir=GroupDirectory(paths.root).path(definition.name),
            direct=options.direct,
            ring_bytes=options.ring_bytes,
            ring_descriptors=options.descriptors,
            slots=options.slots,
            bit_bytes=options.bit_bytes,
            threads=options.threads,
            resync_bytes_per_s=options.rate_bytes_per_s,
            handover=handover,
            mirror=definition.mirrored and not bypass,
        )
    except GoneError:
        if not handover:
            raise
        raise StateError(
            f"no VM holds the image locks of {uris}: is it running, with locks?"
        ) from None
    except LockedError:
        raise LockedError(f"a VM, or another filter, has {uris} open") from None
    except StoreFullError as error:
        error.detail = f"a ring of {options.ring_bytes} bytes in {shm}: {error.detail}"
        raise
    except VrepError as error:
        error.detail = f"{uris}: {error.detail}"
        raise


def serve_or_close(paths: SitePaths, definition: GroupDefinition, group: Group) -> Server:
    """`serve`, or close the group."""
    try:
        return serve(paths, definition, group)
    except BaseException:
        group.close(clean=True)
        raise


def serve(paths: SitePaths, definition: GroupDefinition, group: Group) -> Server:
    """Listen where the definition says, for each disk at its front-end."""
    options = definition.options
    tcp = "" if definition.mirrored else options.tcp  # its VM is on this host
    paths.admit_users(options.socket_mode)
    try:
        vhost = {
            disk.name: paths.vhost_socket(definition.name, disk.index)
            for disk in definition.disks
            if disk.front == "vhost-user-blk"
        }
        target = iscsi.target(definition, GroupDirectory(paths.root).path(definition.name))
        elsewhere = len(vhost) + (len(target.disks) if target is not None else 0)
        nbd = elsewhere < len(definition.disks)
        server = Server(
            group,
            unix_path=paths.nbd_socket(definition.name) if nbd else None,
            mode=options.socket_mode,
            socket_gid=socket_gid(options.socket_group),
            tcp=parse_address(options.tcp) if nbd and tcp else None,
            vhost=vhost,
            vhost_block=options.vhost_block_bytes,
            iscsi=target,
        )
        server.start()
    except BusyError:
        taken = [where for where in (options.tcp, options.iscsi_listen) if where]
        where = "".join(f"{one} or " for one in taken)
        raise BusyError(f"another program listens on {where}the group's socket") from None
    return server


def close(hosted: Hosted) -> None:
    """Let commands end, and leave the disks and the maps clean."""
    try:
        server = hosted.take_server()
        if server is not None:
            server.stop(drain=True)
    finally:
        hosted.group.close(clean=True)
    log.info("group closed", group=hosted.definition.name)
