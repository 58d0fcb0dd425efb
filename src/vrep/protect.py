"""Protecting disks: what is looked at, and what is written, before a group is replicated.

A group with one lane is one definition. With several, each lane has one, of what it needs of its
own: an id, an epoch, a data key. Every definition names all lanes, so a command that was cut off
between two of them leaves a group that is known not to be whole; to unprotect it ends it.
"""

from __future__ import annotations

import base64
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from vrep import errors, iscsi
from vrep.examine import check_options, examine_disk
from vrep.groups import (
    FRONTS,
    VERSION,
    DiskDefinition,
    GroupDefinition,
    GroupOptions,
    block_bytes,
    check_name,
    without_lanes,
)
from vrep.keys.datakey import DataKey
from vrep.lanes import check_lanes, lane_id, lane_name, lane_of, lanes_among
from vrep.numbering import give_numbers

if TYPE_CHECKING:
    from vrep.keys.tenant import TenantKey
    from vrep.site.base import SiteBase
    from vrep.wire.peers import Peer

__all__ = ["DISKS_MAX", "add", "check_fronts", "leave", "protect", "with_fronts"]

DISKS_MAX: Final = 64
"""of one lane"""


def protect(
    site: SiteBase,
    group: str,
    disks: Mapping[str, str],
    *,
    to: str,
    key: str,
    accept_key_loss: bool,
    options: GroupOptions,
    fronts: Mapping[str, str],
    lanes: int,
    beside: str = "",
) -> list[GroupDefinition]:
    """Write the definition of a group, or of each of its `lanes`; 0: it has one, and no other will
    be brought into it. Disks are dealt out in turn. `beside`: the site that has the group's first
    lane; these become further ones. What is wrong is found before anything is written."""
    check_name(group)
    _check_count(disks, lanes)
    if lanes or beside:
        check_lanes(group, max(1, lanes), len(disks))
    check_options(options)
    identity, peer = site.identity, site.peers.get(to)
    if site.lanes_of(group):
        raise errors.ExistsError(
            f"group {group!r} is protected already: without --to and --key these disks are added"
        )
    found = _found(site, group, disks, options, fronts, several=lanes > 1 or bool(beside))
    info = site.keys.require_verified(key, accept_key_loss=accept_key_loss)
    assert identity.site_id != peer.site_id
    group_id, tenant = uuid.uuid4().bytes, site.keys.get(key)
    numbers, shared = list(range(max(1, lanes))), {}
    if beside:
        names = list(disks)
        joined = join(site, group, len(numbers), names, site.peers.get(beside), peer, tenant)
        group_id, numbers, shared = joined.group_id, joined.lanes, joined.definition
    elif lanes:
        shared = {"lanes": tuple(numbers), "numbered": lanes}
    like = {"to_site": peer.site_id, "key": key, "tenant_key_id": info.key_id, "options": options}
    made = _define(group, group_id, numbers, found, tenant, **like, **shared)
    try:
        _store(site, made)
    except errors.VrepError:
        if beside:
            leave(site, made[0], numbers)
        raise
    return made


def add(
    site: SiteBase,
    group: str,
    disks: Mapping[str, str],
    *,
    fronts: Mapping[str, str],
    lanes: int = 1,
) -> list[GroupDefinition]:
    """Bring further disks into a group with lanes that this site protects, as so many lanes more.
    Nothing of the others is copied again; points have the new disks once they are whole."""
    names = lanes_among(group, site.lanes_of(group))
    if not names:
        site.groups.load(group)
        raise errors.UnsupportedError(
            f"{group!r} was protected without lanes, and keeps the disks that it has: protect "
            "these as another group, or unprotect it and protect all of them with --lanes 1"
        )
    mine = [site.groups.load(name) for name in names]
    first = mine[0]
    if any(one.fenced or one.yielded for one in mine):
        raise errors.FencedError(f"another site took {group!r} over")
    if any(one.halted for one in mine):
        raise errors.StateError(f"{group!r} is being moved")
    _check_count(disks, lanes)
    check_lanes(group, lanes, len(disks))
    taken = {disk.name for one in mine for disk in one.disks} & set(disks)
    if taken:
        raise errors.ExistsError(f"the group has a disk {min(taken)!r} already")
    found = _found(site, group, disks, first.options, fronts, several=True)
    own, tenant = site.identity.site_id, site.keys.get(first.key)
    leader = min(first.hosts)[1] if first.hosts else own
    if leader == own:
        numbers, told = give_numbers(
            site.groups, names, lanes, own=own, site=own, has=[lane_of(name) for name in names]
        )
        shared = {
            field: getattr(told, field) for field in ("lanes", "hosts", "joining", "numbered")
        }
    else:
        has = [lane_of(name) for name in names]
        to = site.peers.get(first.to_site)
        joined = join(site, group, lanes, list(disks), site.peers.get(leader), to, tenant, has=has)
        numbers, shared = joined.lanes, joined.definition
    like = {
        field: getattr(first, field) for field in ("to_site", "key", "tenant_key_id", "options")
    }
    made = _define(group, bytes.fromhex(first.group_id), numbers, found, tenant, **like, **shared)
    try:
        _store(site, made)
    except errors.VrepError:
        for name in names:
            site.groups.revise(name, without_lanes(numbers))
        leave(site, made[0], numbers)
        raise
    return made


def _check_count(disks: Mapping[str, str], lanes: int) -> None:
    if not 1 <= len(disks) <= DISKS_MAX * max(1, lanes):
        raise errors.InvalidError(f"a lane has 1 to {DISKS_MAX} disks; these are {len(disks)}")


def _found(
    site: SiteBase,
    group: str,
    disks: Mapping[str, str],
    options: GroupOptions,
    fronts: Mapping[str, str],
    *,
    several: bool,
) -> list[DiskDefinition]:
    """The disks as they are, and as they can be served. `several`: in one of several lanes."""
    found = with_fronts(examined(site, group, disks), fronts)
    check_fronts(options, found)
    if several and any(disk.front == iscsi.FRONT for disk in found):
        raise errors.UnsupportedError("the lanes of a group are not served over iSCSI yet")
    if any(disk.uri.startswith("qcow2:") and disk.front != "nbd" for disk in found):
        raise errors.UnsupportedError(
            "a qcow2 image is protected in mirror mode, whose VM has no other front-end"
        )
    return found


def _define(
    group: str,
    group_id: bytes,
    numbers: Sequence[int],
    found: Sequence[DiskDefinition],
    tenant: TenantKey,
    **like: Any,
) -> list[GroupDefinition]:
    """The definition of a group, or of each of some lanes of it, to which disks are dealt out."""
    made = []
    for at, lane in enumerate(numbers):
        own_id = lane_id(group_id, lane) if "lanes" in like else group_id
        wrapped = DataKey.create(own_id).wrap(tenant)
        mine = found[at :: len(numbers)]
        made.append(
            GroupDefinition(
                version=VERSION,
                group_id=own_id.hex(),
                name=lane_name(group, lane) if "lanes" in like else group,
                disks=tuple(msgspec.structs.replace(d, index=i) for i, d in enumerate(mine)),
                epoch=1,
                epoch_id=uuid.uuid4().hex,
                wrapped_keys=(base64.b64encode(wrapped).decode("ascii"),),
                created=time.time(),
                **like,
            )
        )
    return made


def _store(site: SiteBase, made: Sequence[GroupDefinition]) -> None:
    for definition in made:
        # What an unprotect that was cut off left here belongs to another group.
        shutil.rmtree(site.groups.path(definition.name), ignore_errors=True)
        site.groups.store(definition)


class Joined(NamedTuple):
    """What a site is told that brings lanes into a group."""

    group_id: bytes
    lanes: list[int]
    definition: dict[str, Any]
    """what their definitions have of the other lanes"""


def join(
    site: SiteBase,
    group: str,
    count: int,
    names: list[str],
    other: Peer,
    to: Peer,
    tenant: TenantKey,
    has: Sequence[int] = (),
) -> Joined:
    """Have the site with a group's first lane give out numbers for lanes of this one, beside those
    that it `has`."""
    from vrep.keys.membership import membership_proof
    from vrep.wire import messages as m
    from vrep.wire.site import connect

    identity = site.identity
    if not site.config.network.listen:
        raise errors.ConfigError(
            "the sites of a group reach each other: set network.listen in config.toml"
        )
    proof = membership_proof(tenant, group, identity.site_id, other.site_id)
    params = {
        "group": group,
        "count": count,
        "names": names,
        "to_site": to.site_id,
        "proof": proof,
        "has": list(has),
    }
    with connect(identity, other) as transport:
        told = transport.ask(m.LANES_ADMIT, params)
    hosts = tuple((int(lane), str(whose)) for lane, whose in told["hosts"])
    lanes = [int(lane) for lane in told["lanes"]]
    return Joined(
        group_id=bytes.fromhex(told["group_id"]),
        lanes=lanes,
        definition={
            "lanes": tuple(lane for lane, _whose in hosts),
            "hosts": hosts,
            "joining": tuple(lanes),
            "numbered": max(lanes) + 1,
        },
    )


def leave(site: SiteBase, definition: GroupDefinition, lanes: Sequence[int]) -> str:
    """Tell the other sites of a group that lanes of this one end; why one could not be told."""
    from vrep.wire import messages as m
    from vrep.wire.site import connect

    problems = []
    others = {whose for _lane, whose in definition.hosts} - {site.identity.site_id}
    for site_id in sorted(others):
        params = {"group_id": definition.group_id, "lanes": list(lanes)}
        try:
            with connect(site.identity, site.peers.get(site_id)) as transport:
                transport.ask(m.LANES_LEAVE, params)
        except errors.VrepError as error:
            problems.append(f"a site with lanes of the group misses this one: {error}")
    return "; ".join(problems)


def examined(site: SiteBase, group: str, disks: Mapping[str, str]) -> list[DiskDefinition]:
    """The disks as they are, none of them another group's."""
    # Those of a group that cannot be read are not known; whoever has them open holds their locks.
    known = {disk.uri: g.name for g in site.groups.readable() for disk in g.disks}
    found = []
    for index, (name, uri) in enumerate(disks.items()):
        disk = examine_disk(index, check_name(name, "disk"), uri)
        if disk.uri in known:
            raise errors.BusyError(f"{disk.uri} is a disk of group {known[disk.uri]!r} already")
        known[disk.uri] = group
        found.append(disk)
    return found


def check_fronts(options: GroupOptions, disks: Sequence[DiskDefinition]) -> None:
    """That disks can be served as they are to be."""
    iscsi.check(options, [disk.front for disk in disks])
    if options.vhost_block_bytes not in (512, 4096):
        raise errors.InvalidError("--vhost-block is 512 or 4096")
    for disk in disks:
        block = block_bytes(options, disk.front)
        if disk.bytes % block:
            raise errors.InvalidError(
                f"disk {disk.name!r} has {disk.bytes} bytes, no multiple of its blocks of {block}"
            )


def with_fronts(disks: Sequence[DiskDefinition], fronts: Mapping[str, str]) -> list[DiskDefinition]:
    """Disks with the front-ends that are named; the others keep theirs."""
    unknown = sorted(set(fronts) - {disk.name for disk in disks})
    if unknown:
        raise errors.NotFoundError(f"the group has no disk {unknown[0]!r}")
    for front in fronts.values():
        if front not in FRONTS:
            raise errors.InvalidError(f"a front-end is one of {', '.join(FRONTS)}, not {front!r}")
    replace = msgspec.structs.replace
    return [replace(disk, front=fronts.get(disk.name, disk.front)) for disk in disks]
