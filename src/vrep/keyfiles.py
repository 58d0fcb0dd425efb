"""Files that carry a tenant key out of a site and into one: exports and releases."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vrep import errors

__all__ = ["read", "write_new"]

KEY_FILE_BYTES_MAX: Final = 1 << 16


def write_new(out: str | os.PathLike[str], make: Callable[[], str]) -> None:
    """Write a text into a new file that only its owner can read. It is made once the name is
    known to be free, and nothing stays of a file whose text could not be made."""
    path = Path(out)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise errors.ExistsError(f"{path}: a key never replaces a file") from None
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(make())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise


def read(file: str | os.PathLike[str]) -> str:
    """What stands in a key file; KeyFileError for bytes that are no text."""
    from vrep.keys.errors import KeyFileError

    with Path(file).open("rb") as opened:
        data = opened.read(KEY_FILE_BYTES_MAX + 1)
    if len(data) > KEY_FILE_BYTES_MAX or not data.isascii():
        raise KeyFileError(f"{os.fspath(file)} is not text that 'vrep key export' wrote")
    return data.decode("ascii")
