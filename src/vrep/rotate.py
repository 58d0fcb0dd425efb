"""Rotation: the data keys of all groups wrapped under a new generation of a tenant key.

Data keys, and all that is sealed under them, stay as they are. Each step is durable before the
next begins, and the command goes on where it stood when it is given again:

1. a new generation is made, `pending`: nothing depends on it. It is exported;
2. its export was read back (`vrep key verify`): it becomes the current one;
3. in the definition of each group the wrapped keys are replaced, in one step;
4. the source's session opens again and hands them to the target, which replaces its own, in one
   step of its manifest, before it answers.

Old generations stay in the ring. So at any moment each copy of the wrapped keys is whole, under the
old generation or the new, and both are held; a site that recovers needs the one that its target
has. Times are seconds.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import msgspec

from vrep import errors, keyfiles
from vrep.control import ControlClient
from vrep.groups import GroupDefinition
from vrep.keys.datakey import inspect_wrapped, unwrap_data_key
from vrep.keys.errors import KeyNotVerifiedError, TenantKeyError
from vrep.keys.tenant import KeyInfo, TenantKey, TenantKeyring

if TYPE_CHECKING:
    from vrep.site.base import SiteBase

__all__ = ["RotatedGroup", "Rotation", "rotate"]

POLL_S: Final = 0.05


class RotatedGroup(msgspec.Struct, frozen=True):
    """A group that is sealed under the key."""

    group: str
    wrapped: bool
    """its definition here has its keys under the current generation"""
    at_target: bool
    """and so has its target, durably"""
    text: str
    """why not"""


class Rotation(msgspec.Struct, frozen=True):
    """How a rotation stands."""

    key: KeyInfo
    """the new generation"""
    state: str
    """exported: read the export back, then go on. done. unfinished: give the command again"""
    groups: list[RotatedGroup]


def rotate(
    site: SiteBase,
    name: str,
    *,
    out: str | os.PathLike[str] | None = None,
    passphrase: str | None = None,
    accept_key_loss: bool = False,
    wait_s: float = 30.0,
) -> Rotation:
    """Begin a rotation, or go on with it; see `vrep.Site.key_rotate`."""
    ring = site.keys
    ring.info(name)  # a key that is not held is named before anything is made
    with _alone(site):
        pending = ring.pending(name)
        if pending is None and not _unfinished(site, ring, name):
            if out is None and not accept_key_loss:
                if ring.info(name).generation > 1:  # it is done: its answer may have been lost
                    return _carry_on(site, ring, name, wait_s)
                raise KeyNotVerifiedError(
                    f"a new generation of {name!r} is made by 'vrep key rotate {name} --out FILE'; "
                    "or accept with --accept-key-loss that it is kept nowhere else"
                )
            pending = ring.add_generation(name)
        elif pending is None and out is not None:
            raise errors.StateError(
                f"the rotation of {name!r} before this is not over: give the command without --out"
            )
        if pending is not None:
            number = pending.generation
            if out is not None:
                keyfiles.write_new(out, lambda: ring.export(name, passphrase, generation=number))
                return Rotation(pending, "exported", [])
            if pending.verified is None and not accept_key_loss:
                raise KeyNotVerifiedError(
                    f"generation {number} of {name!r} ({pending.key_id}): without one, the loss of "
                    "this site loses the data. Run 'vrep key verify' on what 'vrep key rotate "
                    "--out' wrote (once more, if it is lost), or accept it with --accept-key-loss"
                )
            ring.activate(name, number)
        return _carry_on(site, ring, name, wait_s)


@contextlib.contextmanager
def _alone(site: SiteBase) -> Iterator[None]:
    """One rotation at a time."""
    path = site.paths.keys / "rotate.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.LockedError("another rotation runs at this site") from None
        yield
    finally:
        os.close(fd)


def _sealed_under(site: SiteBase, name: str) -> list[GroupDefinition]:
    return [definition for definition in site.groups.readable() if definition.key == name]


def _unfinished(site: SiteBase, ring: TenantKeyring, name: str) -> bool:
    """Whether a group is not wrapped under the current generation yet, or its target was not
    told. The first generation was never rotated to; the target of a group that was given up hears
    of keys from the site that writes it now."""
    current = ring.info(name)
    return current.generation > 1 and any(
        definition.tenant_key_id != current.key_id
        or (
            definition.keys_at_target not in ("", definition.keys_digest) and not definition.yielded
        )
        for definition in _sealed_under(site, name)
    )


def _carry_on(site: SiteBase, ring: TenantKeyring, name: str, wait_s: float) -> Rotation:
    tenant = ring.get(name)
    failed: dict[str, str] = {}
    for definition in _sealed_under(site, name):
        try:
            _rewrap(site, ring, definition, tenant)
        except errors.VrepError as error:
            failed[definition.name] = str(error)
    readable = {definition.name for definition in site.groups.readable()}
    for group in set(site.groups.names()) - readable:
        failed[group] = "its definition cannot be read: whether it uses the key is not known"
    _wait_told(site, name, wait_s)
    groups = [_told(site, definition, tenant, failed) for definition in _sealed_under(site, name)]
    known = {each.group for each in groups}
    groups += [RotatedGroup(g, False, False, t) for g, t in failed.items() if g not in known]
    given_up = {d.name for d in _sealed_under(site, name) if d.yielded}
    done = all(each.at_target or (each.wrapped and each.group in given_up) for each in groups)
    return Rotation(ring.info(name), "done" if done else "unfinished", groups)


def _rewrap(
    site: SiteBase, ring: TenantKeyring, definition: GroupDefinition, tenant: TenantKey
) -> None:
    """Replace the wrapped keys of a group, all at once."""
    blobs = []
    for text in definition.wrapped_keys:
        blob = base64.b64decode(text)
        held = inspect_wrapped(blob).tenant_key_id
        if held != tenant.key_id:
            group_id = bytes.fromhex(definition.group_id)
            data_key = unwrap_data_key(blob, ring.find(held), group_id=group_id)
            blob = data_key.wrap(tenant)
            if unwrap_data_key(blob, tenant, group_id=group_id) != data_key:
                raise TenantKeyError("the data key that was wrapped again does not come back")
        blobs.append(base64.b64encode(blob).decode("ascii"))
    site.groups.update(definition.name, wrapped_keys=tuple(blobs), tenant_key_id=tenant.key_id)
    # A session that runs opens again; what does not run reads the definition when it starts.
    with contextlib.suppress(errors.UnreachableError, errors.TimeLimitError):
        ControlClient(site.paths.socket("source")).call("reload", group=definition.name)


def _reason(site: SiteBase, definition: GroupDefinition) -> str:
    """Why a target cannot be told now; empty when it is only a matter of time."""
    if definition.yielded:
        return "given up: the site that writes it now holds its keys, and rotates its own key"
    if definition.fenced:
        return "another site took the group over: its target hears nothing from here"
    if definition.paused:
        return "paused: it is told when the group is resumed"
    if not site.running("source"):
        return "the source process does not run: it is told when 'vrep run' does"
    return ""


def _wait_told(site: SiteBase, name: str, wait_s: float) -> None:
    """Until every target that can be told has answered."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        waiting = [d for d in _sealed_under(site, name) if d.keys_at_target != d.keys_digest]
        if not any(not _reason(site, definition) for definition in waiting):
            return
        time.sleep(POLL_S)


def _told(
    site: SiteBase, definition: GroupDefinition, tenant: TenantKey, failed: dict[str, str]
) -> RotatedGroup:
    wrapped = definition.tenant_key_id == tenant.key_id
    at_target = wrapped and definition.keys_at_target == definition.keys_digest
    text = failed.get(definition.name, "")
    if not at_target and not text:
        text = _reason(site, definition) or "its target was not reached yet"
    return RotatedGroup(definition.name, wrapped, at_target, text)
