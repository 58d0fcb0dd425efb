from collections.abc import Iterable, Sequence
from os import PathLike
from types import TracebackType
from typing import NamedTuple, Self, TypedDict

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

DELTA_KEYS_MAX: int
DELTA_WINDOWS: int
DELTA_WINDOW_BYTES: int
MISSES_MAX: int
HANDOVER: dict[int, str]
OPENED: dict[int, str]
ROLES: dict[str, int]
UNVERIFIED: dict[int, str]

_Role = str  # "target" or "observer"

class Disk(NamedTuple):
    name: str
    uri: str
    size: int = 0
    was: int = 0
    onto: str = ""

class Miss(NamedTuple):
    ticket: int
    disk: int
    offset: int
    length: int

class Window(NamedTuple):
    id: int
    disk: int
    offset: int
    length: int

class GroupStatus(TypedDict):
    head: int
    released: int
    durable: int
    received: int
    read: int
    ring_free_bytes: int
    ring_bytes: int
    dirty_bytes: int
    unshipped_bytes: int
    total_bytes: int
    gap_seq: int
    gap_last: int
    gap: bool
    unverified: str
    opened_as: str
    replayed: int
    inflight: int
    consumers: int
    oldest_ns: int
    writes: int
    write_bytes: int
    reads: int
    read_bytes: int
    flushes: int
    zeroes: int
    zero_bytes: int
    unrecorded: int
    gaps: int
    resync_bytes: int
    compared_bytes: int
    equal_bytes: int
    errors: int
    flush_failed: bool
    resync_allowed: bool
    acknowledged: int
    cuts: int
    cuts_void: int
    cut_hold_ns_max: int
    handover: str
    handover_waiting: bool
    sizes_due: int
    mirror: bool
    mirror_waits: bool
    mirror_copies: int
    mirror_losses: int
    mirror_yields: int
    mirror_rests: bool
    marks_unstored: bool
    mirror_looks: int

class Group:
    def __init__(
        self,
        disks: Iterable[Disk | tuple[str, str] | tuple[str, str, int]],
        *,
        group_id: bytes,
        target_id: bytes = ...,
        epoch_id: bytes = ...,
        epoch: int = 1,
        first_seq: int = 0,
        lane: int = 0,
        shm_dir: str | PathLike[str] | None = None,
        state_dir: str | PathLike[str] | None = None,
        tap: bool = True,
        bypass: bool = False,
        read_only: bool = False,
        direct: bool = False,
        handover: bool = False,
        mirror: bool = False,
        ring_bytes: int = ...,
        ring_descriptors: int = ...,
        slots: int = 256,
        bit_bytes: int = 65536,
        threads: int = 4,
        private_bytes: int = ...,
        resync_bytes_per_s: int = 0,
        checkpoint_ms: int = 5000,
        stepped: tuple[int, int] | None = None,
    ) -> None: ...
    @property
    def disks(self) -> list[tuple[str, int]]: ...
    def status(self) -> GroupStatus: ...
    def mark(self, label: str = "") -> int: ...
    def put_object(self, data: Buffer, tag: int = 0) -> int: ...
    def cut_complete(
        self, cut_id: bytes, lanes: Iterable[tuple[int, int, int]], label: str = ""
    ) -> int: ...
    def resync(
        self, allowed: bool = True, *, bytes_per_s: int = 0, everything: bool = False
    ) -> None: ...
    def consumer_attach(
        self, role: _Role, target_id: bytes = ..., durable: int = 0
    ) -> tuple[int, int, int]: ...
    def consumer_detach(self, role: _Role) -> None: ...
    def lose_ring(self) -> None: ...
    def compare(self, disk: int, ranges: Buffer | NDArray[np.void]) -> None: ...
    def delta_begin(self, secrets: Iterable[bytes]) -> None: ...
    def delta_end(self) -> None: ...
    def delta_take(self, most: int = ...) -> tuple[list[Window], int]: ...
    def delta_answer(self, id: int, keys: Buffer, hashes: Buffer) -> None: ...
    def since(self, name: str, changes: Iterable[Buffer | NDArray[np.void]]) -> None: ...
    def attend(self) -> None: ...
    def let_go(self) -> None: ...
    def take_back(self) -> None: ...
    def mirror_live(self) -> None: ...
    def mirror_mark(self, disk: int, ranges: Sequence[tuple[int, int]]) -> None: ...
    def mirror_distrust(self) -> None: ...
    def mirror_barrier(self, copies: int) -> None: ...
    def mirror_rest(
        self, images: Sequence[tuple[int, str | PathLike[str]]], begin: bool = True
    ) -> None: ...
    def mirror_looked(self) -> None: ...
    def misses(self, most: int = ..., timeout: float | None = None) -> list[Miss]: ...
    def fill(
        self,
        miss: Miss,
        data: Buffer | None = None,
        parts: Sequence[tuple[int, int]] | None = None,
    ) -> None: ...
    def fail(self, miss: Miss) -> None: ...
    def fill_next(self, disk: int, start: int = 0, most: int = ...) -> Miss | None: ...
    def sync_disk(self, disk: int) -> None: ...
    def close(self, clean: bool = True) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

def cut_all(groups: Iterable[Group], cut_id: bytes, limit_ms: float = 10.0) -> list[int]: ...
def cut_hold(groups: Iterable[Group], cut_id: bytes, limit_ms: float = 10.0) -> list[int]: ...
def cut_release(groups: Iterable[Group], cut_id: bytes) -> None: ...
def note_past(
    group_id: bytes, shm_dir: str | PathLike[str] | None, state_dir: str | PathLike[str]
) -> None: ...
