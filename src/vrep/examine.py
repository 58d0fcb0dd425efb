"""What may be protected: disks and options are looked at before a group exists, so that what the
filter would refuse is refused with a clear error and leaves nothing behind. Sizes are bytes."""

from __future__ import annotations

import grp
import ipaddress
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Final

from vrep import errors
from vrep.groups import ON_FENCE, DiskDefinition, GroupOptions

SECTOR_BYTES: Final = 512
RING_BYTES_MIN: Final = 1 << 20
RING_BYTES_MAX: Final = 64 << 30
RATE_MAX: Final = 1 << 50
QCOW2_MAGIC: Final = b"QFI\xfb"
TOOL_S: Final = 60.0


def examine_disk(index: int, name: str, uri: str) -> DiskDefinition:
    """A disk as it is now; clear errors for what cannot be protected."""
    scheme, _, where = uri.partition(":")
    if scheme not in ("file", "block", "qcow2") or not where:
        known = "file:PATH, block:PATH and qcow2:PATH are supported"
        raise errors.UnsupportedError(f"the disk URI {uri!r}: {known} in this release")
    path = Path(where).absolute()
    try:
        status = path.stat()
    except OSError as error:
        raise errors.NotFoundError(f"disk {name!r}: {path}: {error.strerror}") from None
    if scheme in ("file", "qcow2") and not stat.S_ISREG(status.st_mode):
        raise errors.InvalidError(f"disk {name!r}: {path} is not a regular file")
    if scheme == "block" and not stat.S_ISBLK(status.st_mode):
        raise errors.InvalidError(f"disk {name!r}: {path} is not a block device")
    with path.open("rb") as file:
        magic = file.read(len(QCOW2_MAGIC))
        size = file.seek(0, os.SEEK_END)
    if scheme == "qcow2":
        if magic != QCOW2_MAGIC:
            raise errors.InvalidError(f"disk {name!r}: {path} is no qcow2 image")
        size = _virtual_size(name, path)
    elif magic == QCOW2_MAGIC:
        raise errors.UnsupportedError(
            f"disk {name!r}: {path} is a qcow2 image: 'qcow2:{path}' is protected in mirror mode; "
            "'qemu-img convert -O raw' makes a raw one"
        )
    if size == 0 or size % SECTOR_BYTES:
        raise errors.InvalidError(
            f"disk {name!r}: {path} has {size} bytes; a disk has a multiple of {SECTOR_BYTES}"
        )
    return DiskDefinition(name=name, uri=f"{scheme}:{path}", bytes=size, index=index)


def _virtual_size(name: str, path: Path) -> int:
    """Bytes that a guest sees of an image, which a VM may have open."""
    command = ["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TOOL_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise errors.UnsupportedError(
            f"disk {name!r}: a qcow2 image needs qemu-img (package qemu-utils): {error}"
        ) from None
    if done.returncode:
        text = done.stderr.decode(errors="replace").strip()
        raise errors.InvalidError(f"disk {name!r}: {text}")
    return int(json.loads(done.stdout)["virtual-size"])


def check_options(options: GroupOptions) -> None:
    """What the filter would refuse is refused before the group exists."""
    from vrep.wire.address import parse_address

    if not RING_BYTES_MIN <= options.ring_bytes <= RING_BYTES_MAX:
        raise errors.InvalidError(
            f"a ring of {options.ring_bytes} bytes: it has {RING_BYTES_MIN} to {RING_BYTES_MAX}"
        )
    if not 0 <= options.rate_bytes_per_s <= RATE_MAX:
        raise errors.InvalidError(
            f"a rate of {options.rate_bytes_per_s} bytes a second: at most {RATE_MAX}"
        )
    if options.on_fence not in ON_FENCE:
        raise errors.InvalidError(f"on a fence a VM's I/O may {' or '.join(ON_FENCE)}")
    if options.socket_group:
        try:
            grp.getgrnam(options.socket_group)
        except KeyError:
            raise errors.InvalidError(
                f"there is no Unix group {options.socket_group!r} for the NBD socket"
            ) from None
    if options.tcp:
        host, _ = parse_address(options.tcp)
        try:
            local = host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = False
        if not local:
            raise errors.InvalidError(
                f"NBD on {options.tcp}: TCP is for loopback addresses only, as in 127.0.0.1:10809"
            )


__all__ = ["check_options", "examine_disk"]
