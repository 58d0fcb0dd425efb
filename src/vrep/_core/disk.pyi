from os import PathLike
from types import TracebackType
from typing import Literal, NamedTuple, Self

from typing_extensions import Buffer

_Op = Literal["read", "write", "flush", "zero"]

OPS: dict[str, int]
DATA_BYTES_MAX: int

class DiskInfo(NamedTuple):
    size: int
    block_bytes: int
    align_bytes: int
    zero_is_cheap: bool
    direct: bool
    block_device: bool
    read_only: bool

class Request:
    @property
    def disk(self) -> Disk: ...
    @property
    def done(self) -> bool: ...
    @property
    def inline(self) -> bool: ...
    @property
    def status(self) -> int: ...
    @property
    def sync_failed(self) -> bool: ...
    def result(self) -> bytes | None: ...

class Engine:
    def __init__(self, threads: int = 4) -> None: ...
    @property
    def inflight(self) -> int: ...
    def fileno(self) -> int: ...
    def reap(self) -> int: ...
    def wait(self, request: Request | None = None, timeout: float = 60.0) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

class Disk:
    def __init__(
        self,
        engine: Engine,
        uri: str | PathLike[str],
        *,
        direct: bool = False,
        read_only: bool = False,
        lock: bool = True,
        view_id: bytes | None = None,
        size: int = 0,
        block_bytes: int = 65536,
        onto: str | PathLike[str] | None = None,
    ) -> None: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def info(self) -> DiskInfo: ...
    @property
    def present_bytes(self) -> int: ...
    def close(self) -> None: ...
    def refresh(self) -> None: ...
    def submit(
        self,
        op: _Op,
        offset: int = 0,
        length: int = 0,
        data: Buffer | None = None,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
        skew: int = 0,
        piece_bytes: int = 0,
    ) -> Request: ...
    def run(
        self,
        op: _Op,
        offset: int = 0,
        length: int = 0,
        data: Buffer | None = None,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
        skew: int = 0,
        piece_bytes: int = 0,
    ) -> bytes | None: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None: ...
    def zero(
        self,
        offset: int,
        length: int,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> None: ...
    def flush(self) -> None: ...
    def widen(self, offset: int, length: int) -> tuple[int, int]: ...
    def extent(self, offset: int, most: int = ...) -> tuple[int, bool]: ...
    def absent(self, offset: int, length: int) -> tuple[int, int] | None: ...
    def set_present(self, offset: int, length: int) -> None: ...
    def sync(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
