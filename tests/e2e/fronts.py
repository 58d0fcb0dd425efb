"""Clients of a disk, one for each front-end, with one interface: what a guest does to it.

`client_of` opens the disk of a URI as `Site.disk_uri` prints it. Offsets and lengths are bytes.
NBD takes any of them; the others take blocks, and a client of them does what a guest's kernel
does: it reads the edges and writes whole blocks, and cuts what is larger than a request may be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol, Self

from vrep.app.demo.nbd_client import FLUSH, NbdClient

MIB = 1 << 20
FRONTS = ("nbd", "iscsi", "vhost-user-blk")
TRIM, WRITE_ZEROES = 4, 6
FUA, NO_HOLE, FAST_ZERO = 1, 2, 16


class DiskClient(Protocol):
    """One user of a disk; one request at a time."""

    bytes: int

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None: ...
    def zeroes(self, offset: int, length: int, flags: int = 0) -> None: ...
    def trim(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...
    def read_all(self) -> bytes: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_exc: object) -> None: ...


class Client(NbdClient):
    """The demonstration's client, with the commands that it has no use for."""

    def zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        self._request(WRITE_ZEROES, offset, length, b"", flags)

    def trim(self, offset: int, length: int) -> None:
        self._request(TRIM, offset, length, b"", 0)

    def flush(self) -> None:
        self._request(FLUSH, 0, 0, b"", 0)

    def read_all(self) -> bytes:
        step = 4 * MIB
        return b"".join(
            self.read(at, min(step, self.bytes - at)) for at in range(0, self.bytes, step)
        )

    def __enter__(self) -> Self:
        return self


class BlockClient(ABC):
    """What the clients of block front-ends share. A subclass sets the three sizes, and does
    requests of whole blocks, none larger than `most`."""

    bytes: int
    block: int
    most: int

    @abstractmethod
    def read_blocks(self, offset: int, length: int) -> bytes: ...
    @abstractmethod
    def write_blocks(self, offset: int, data: bytes, fua: bool) -> None: ...
    @abstractmethod
    def zero_blocks(self, offset: int, length: int, *, hole: bool) -> None: ...
    @abstractmethod
    def trim_blocks(self, offset: int, length: int) -> None: ...
    @abstractmethod
    def flush(self) -> None: ...
    @abstractmethod
    def close(self) -> None: ...

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """The whole blocks that a range touches: from and to."""
        end = offset + length
        return offset - offset % self.block, end + -end % self.block

    def read(self, offset: int, length: int) -> bytes:
        first, end = self._whole(offset, length)
        found = b"".join(
            self.read_blocks(at, min(self.most, end - at)) for at in range(first, end, self.most)
        )
        return found[offset - first : offset - first + length]

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        first, end = self._whole(offset, len(data))
        if offset > first:
            data = self.read_blocks(first, self.block)[: offset - first] + data
        if first + len(data) < end:
            data += self.read_blocks(end - self.block, self.block)[first + len(data) - end :]
        for at in range(0, len(data), self.most):
            self.write_blocks(first + at, data[at : at + self.most], fua)

    def zeroes(self, offset: int, length: int, flags: int = 0) -> None:
        """Fast or slow is not asked for here."""
        first, end = self._whole(offset, length)
        if (first, end) != (offset, offset + length):
            self.write(offset, bytes(length))
        else:
            for at in range(first, end, self.most):
                self.zero_blocks(at, min(self.most, end - at), hole=not flags & NO_HOLE)
        if flags & FUA:
            self.flush()

    def trim(self, offset: int, length: int) -> None:
        """Edges that are no whole blocks are left alone."""
        first, end = offset + -offset % self.block, offset + length
        end -= end % self.block
        if first < end:
            self.trim_blocks(first, end - first)

    def read_all(self) -> bytes:
        return self.read(0, self.bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def client_of(uri: str, timeout_s: float = 60.0) -> DiskClient:
    """A client of a disk, by how it is served."""
    from front_iscsi import IscsiClient
    from front_vhost import VhostClient

    scheme = uri.partition(":")[0]
    if scheme == "iscsi":
        return IscsiClient(uri, timeout_s)
    if scheme == "vhost-user-blk":
        return VhostClient(uri, timeout_s)
    return Client(uri, timeout_s)
