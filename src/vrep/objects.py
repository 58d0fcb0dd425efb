"""Objects of a protected group at its source: the VM's definition, its NVRAM, other small blobs.

``groups/<name>/objects/`` holds the newest version of each: ``<id>.object`` is the plaintext of
its OBJECT record (struct, name, blob), ``<id>.tag`` a random number by which a target sees that two
records are versions of one object, ``<id>.due`` says that no durable record of it is known. The
mark is made first and taken away last, so an object is put into the order of the writes until a
target holds it: in a gap, before a first sync, and again when the records that carried it may be
lost. That all are due is said first by taking the file ``noted`` away, which needs no room on a
full disk; it comes back when each has its mark. What is put twice is the same version. Sizes are
bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import struct
from pathlib import Path
from typing import Final, NamedTuple

from vrep.durable import make_private_directory, sync_directory, write_atomic
from vrep.errors import CorruptError, InvalidError, StorageError
from vrep.groups import check_name

__all__ = ["OBJECT_BYTES_MAX", "ObjectDirectory", "Plain", "parse", "plaintext"]

OBJECT_BYTES_MAX: Final = 4 << 20
"""of a blob: it is copied into the ring in one step, beside the guest's commands"""
VERSION: Final = 1
_HEADER: Final = struct.Struct("<QHHI")
_TAGS: Final = 1 << 63
_ID: Final = re.compile(r"[0-9a-f]{32}")


class Plain(NamedTuple):
    """What an OBJECT record holds."""

    name: str
    wall_ns: int
    data: bytes


def plaintext(name: str, data: bytes, wall_ns: int) -> bytes:
    """The plaintext of an OBJECT record."""
    text = check_name(name, "object").encode()
    return _HEADER.pack(wall_ns, VERSION, len(text), 0) + text + data


def parse(data: bytes | bytearray) -> Plain:
    """What `plaintext` made; CorruptError for anything else."""
    if len(data) < _HEADER.size:
        raise CorruptError("an object ends within its header")
    wall_ns, version, length, flags = _HEADER.unpack_from(data)
    name = bytes(data[_HEADER.size : _HEADER.size + length])
    if version != VERSION or flags or not 0 < length == len(name):
        raise CorruptError("the header of an object is wrong")
    try:
        # It becomes the name of a file where the group is recovered.
        text = check_name(name.decode(), "object")
    except (UnicodeError, InvalidError):
        raise CorruptError("the name of an object is wrong") from None
    return Plain(text, wall_ns, bytes(data[_HEADER.size + length :]))


class ObjectDirectory:
    """The objects of one group. Commands put, the filter's process publishes."""

    def __init__(self, group: Path) -> None:
        self._root = group / "objects"

    def put(self, name: str, data: bytes, wall_ns: int) -> str:
        """Keep a new version, durably, and due; its id."""
        if len(data) > OBJECT_BYTES_MAX:
            raise InvalidError(
                f"object {name!r} has {len(data)} bytes; at most {OBJECT_BYTES_MAX} are kept"
            )
        content = plaintext(name, data, wall_ns)
        one = hashlib.sha256(name.encode()).hexdigest()[:32]
        try:
            make_private_directory(self._root)
            self._mark(one)
            write_atomic(self._root / f"{one}.object", content)
            self._mark(one)  # what was published meanwhile was the version before
        except OSError as error:
            raise StorageError(f"{self._root}: {error.strerror or error}") from None
        return one

    def _mark(self, one: str) -> None:
        write_atomic(self._root / f"{one}.due", secrets.token_bytes(16))

    def ids(self) -> list[str]:
        """All that are kept."""
        if not self._root.is_dir():
            return []
        found = [path.stem for path in self._root.glob("*.object")]
        return sorted(one for one in found if _ID.fullmatch(one))

    def load(self, one: str) -> bytes:
        """The plaintext of a version."""
        try:
            return (self._root / f"{one}.object").read_bytes()
        except OSError as error:
            raise StorageError(f"{self._root}: {error.strerror or error}") from None

    def tag(self, one: str) -> int:
        """The number that all versions of an object have; it says nothing of its name."""
        path = self._root / f"{one}.tag"
        try:
            with contextlib.suppress(FileNotFoundError):
                found = int.from_bytes(path.read_bytes(), "little")
                if 0 < found < _TAGS:
                    return found
            made = 1 + secrets.randbelow(_TAGS - 1)
            write_atomic(path, made.to_bytes(8, "little"))
        except OSError as error:
            raise StorageError(f"{self._root}: {error.strerror or error}") from None
        return made

    def due(self) -> dict[str, bytes]:
        """Ids of those that no target is known to hold, each with the token of its mark."""
        found = {}
        for one in self.ids():
            try:
                found[one] = (self._root / f"{one}.due").read_bytes()
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(f"{self._root}: {error.strerror or error}") from None
        return found

    @property
    def noted(self) -> bool:
        """False while all are due and not all have their marks, as after `all_due` failed; also
        of a directory of a release that had no such file."""
        return (self._root / "noted").exists() or not self.ids()

    def all_due(self) -> None:
        """No record of any of them counts any more. When the disk is full that is known all the
        same, by `noted`, and StorageError is raised."""
        try:
            ids = self.ids()
            if not ids:
                return
            noted = self._root / "noted"
            if noted.exists():
                noted.unlink()
                sync_directory(self._root)
            for one in ids:
                self._mark(one)
            write_atomic(noted, b"")
        except OSError as error:
            raise StorageError(f"{self._root}: {error.strerror or error}") from None

    def settle(self, one: str, token: bytes) -> None:
        """A target holds the version that was due by a token, unless it is due anew."""
        path = self._root / f"{one}.due"
        try:
            if path.read_bytes() == token:
                path.unlink()
                sync_directory(self._root)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"{self._root}: {error.strerror or error}") from None
