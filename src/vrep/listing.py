"""Listing: what is in a directory, for who asks again and again.

Every process looks each second whether groups came or went, and a store lists its directory with
each fold. A `Path` for every name costs more than to read it.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def names_in(directory: Path) -> list[str]:
    """Names in a directory, in any order; none when it is not there."""
    try:
        return os.listdir(directory)  # noqa: PTH208 - no object for each
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_file(path: str) -> bool:
    """Whether a file is there, as `Path.is_file` says."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - no object for it
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return False
