"""Rest: the images of a VM that mirrors and is off are compared (filter/mirror.c, rule 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vrep.app.hosted import Hosted
from vrep.errors import StateError

__all__ = ["rest"]


def rest(hosted: Hosted) -> dict[str, Any]:
    """Have a group's images compared, if nobody has one open; see `Group.mirror_rest` for what is
    refused. StateError: an image is not where it was."""
    paths = [Path(disk.uri.partition(":")[2]) for disk in hosted.definition.disks]
    try:
        found = [path.stat() for path in paths]
    except OSError as error:
        raise StateError(f"an image cannot be looked at: {error}") from None
    hosted.group.mirror_rest([(one.st_dev, one.st_ino) for one in found])
    return {}
