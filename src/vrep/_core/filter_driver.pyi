from os import PathLike
from typing import Literal, NamedTuple

from typing_extensions import Buffer

from vrep._core.filter import Group

_Op = Literal["read", "write", "flush", "discard", "zero"]

OPS: dict[str, int]

class Record(NamedTuple):
    seq: int
    kind: int
    flags: int
    disk: int
    offset: int
    length: int
    payload: bytes | None

class Step(NamedTuple):
    kind: str
    op: int
    flags: int
    disk: int
    offset: int
    length: int

class Pending:
    buffer: bytes | None
    @property
    def done(self) -> bool: ...

class GroupDriver(Group):
    def poll(self) -> None: ...
    def submit(
        self,
        op: _Op,
        disk: int = 0,
        offset: int = 0,
        length: int = 0,
        data: Buffer | None = None,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> Pending: ...
    def result(self, pending: Pending) -> bytes | None: ...
    def run(
        self,
        op: _Op,
        disk: int = 0,
        offset: int = 0,
        length: int = 0,
        data: Buffer | None = None,
        *,
        fua: bool = False,
        no_hole: bool = False,
        fast: bool = False,
    ) -> bytes | None: ...
    def dirty(self, disk: int) -> bytes: ...
    def steps(self) -> list[Step]: ...
    def step(self, index: int = 0) -> None: ...
    def step_failing(self, index: int, error: int) -> None: ...
    def set_time(self, mono_ns: int, wall_ns: int) -> None: ...
    def kill(self) -> None: ...

class Follower:
    def __init__(self, path: str | PathLike[str], fds: tuple[int, int, int]) -> None: ...
    @property
    def head(self) -> int: ...
    @property
    def released(self) -> int: ...
    def record(self, seq: int) -> Record: ...
    def report(self, durable: int, received: int = 0) -> None: ...
