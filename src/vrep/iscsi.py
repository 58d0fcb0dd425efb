"""iSCSI as a group is configured for it: the target's name, who is admitted, CHAP.

A file of CHAP names and secrets has one or two lines, each a name and a secret of 12 to 255
characters with a space between: the first is what initiators prove, the second what the target
proves to them. Nobody but its owner may read or write it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vrep.errors import InvalidError

if TYPE_CHECKING:
    from vrep._core.serve import Iscsi
    from vrep.groups import GroupDefinition, GroupOptions

FRONT = "iscsi"
SECRET_MIN, SECRET_MAX = 12, 255
AUTH_BYTES_MAX = 4096

Pair = tuple[str, str]


def target_name(group: str, group_id: str) -> str:
    """The iSCSI name of a group's target, the same wherever the group is served.

    ``.invalid`` belongs to nobody (RFC 2606), so the name cannot meet another's.
    """
    return f"iqn.2026-01.invalid.vrep:{group.lower().replace('_', '-')}.{group_id[:8]}"


def uri(definition: GroupDefinition, lun: int) -> str:
    """Of a disk: ``iscsi://HOST:PORT/TARGET/LUN``."""
    name = target_name(definition.name, definition.group_id)
    return f"iscsi://{definition.options.iscsi_listen}/{name}/{lun}"


def parse_rule(text: str) -> tuple[str | None, str | None]:
    """``NAME``, ``@ADDRESS`` or ``NAME@ADDRESS`` of an initiator."""
    name, _, address = text.partition("@")
    if not name and not address:
        raise InvalidError(f"{text!r} admits nobody: write NAME, @ADDRESS or NAME@ADDRESS")
    return name or None, address or None


def read_auth(path: str) -> tuple[Pair, Pair | None]:
    """What initiators prove, and what the target proves, from a file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(fd) as file:
        if stat.S_IMODE(os.fstat(fd).st_mode) & 0o077:
            raise InvalidError(f"{path}: others may read it: give it mode 0600")
        text = file.read(AUTH_BYTES_MAX + 1)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if len(text) > AUTH_BYTES_MAX or not 1 <= len(lines) <= 2 or any(len(x) != 2 for x in lines):
        raise InvalidError(f"{path}: one or two lines of a name and a secret are needed")
    pairs = [(name, secret) for name, secret in lines]
    for name, secret in pairs:
        if not SECRET_MIN <= len(secret) <= SECRET_MAX:
            raise InvalidError(f"{path}: the secret of {name!r} needs 12 to 255 characters")
    if len(pairs) == 2 and pairs[0][1] == pairs[1][1]:
        raise InvalidError(f"{path}: both directions have one secret: each needs its own")
    return pairs[0], pairs[1] if len(pairs) == 2 else None


def check(options: GroupOptions, fronts: Sequence[str]) -> None:
    """That what is served over iSCSI can be."""
    if FRONT not in fronts:
        return
    if not options.iscsi_listen:
        raise InvalidError("iSCSI needs an address to listen on: --iscsi-listen HOST:PORT")
    from vrep.wire.address import parse_address

    _host, port = parse_address(options.iscsi_listen)
    if port == 0:
        raise InvalidError("--iscsi-listen: initiators need a port that stays")
    if options.iscsi_block_bytes not in (512, 4096):
        raise InvalidError("--iscsi-block is 512 or 4096")
    for text in options.iscsi_admit:
        parse_rule(text)
    if options.iscsi_auth:
        try:
            read_auth(options.iscsi_auth)
        except OSError as error:
            raise InvalidError(f"{options.iscsi_auth}: {error.strerror}") from None


def target(definition: GroupDefinition, state: Path) -> Iscsi | None:
    """What the filter serves of a group over iSCSI; reservations are kept in `state`."""
    options = definition.options
    disks = tuple(disk.name for disk in definition.disks if disk.front == FRONT)
    if not disks:
        return None
    # Whoever asks where a disk is does not load the filter for it.
    from vrep._core.serve import Iscsi
    from vrep.wire.address import parse_address

    host, port = parse_address(options.iscsi_listen)
    chap, mutual = read_auth(options.iscsi_auth) if options.iscsi_auth else (None, None)
    return Iscsi(
        group_id=bytes.fromhex(definition.group_id),
        disks=disks,
        host=host,
        port=port,
        target=target_name(definition.name, definition.group_id),
        block_bytes=options.iscsi_block_bytes,
        reservations=str(state),
        chap=chap,
        mutual=mutual,
        rules=tuple(parse_rule(text) for text in options.iscsi_admit),
    )
