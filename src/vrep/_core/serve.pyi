from collections.abc import Mapping
from os import PathLike
from types import TracebackType
from typing import NamedTuple, Self, TypedDict

from vrep._core.filter import Group

CONNECTIONS_MAX: int

class Client(TypedDict):
    address: str
    disk: str
    connected_at: float
    requests: int
    read_bytes: int
    written_bytes: int
    errors: int

class Stats(TypedDict):
    connections: int
    accepted: int
    refused: int
    fenced: int
    requests: int
    read_bytes: int
    written_bytes: int
    errors: int
    stalls: int

class VhostStats(TypedDict):
    accepted: int
    refused: int
    requests: int
    read_bytes: int
    written_bytes: int
    errors: int
    resubmitted: int
    stalls: int

class Iscsi(NamedTuple):
    group_id: bytes
    disks: tuple[str, ...]
    host: str
    port: int
    target: str
    block_bytes: int = 512
    reservations: str | None = None
    chap: tuple[str, str] | None = None
    mutual: tuple[str, str] | None = None
    rules: tuple[tuple[str | None, str | None], ...] = ()
    sessions: int = 0
    removable: tuple[str, ...] = ()

class IscsiStats(TypedDict):
    connections: int
    accepted: int
    refused: int
    requests: int
    read_bytes: int
    written_bytes: int
    errors: int
    stalls: int

class Server:
    def __init__(
        self,
        group: Group,
        unix_path: str | PathLike[str] | None = None,
        mode: int = 0o600,
        socket_gid: int | None = None,
        tcp: tuple[str, int] | None = None,
        connections: int = 0,
        vhost: Mapping[str, str | PathLike[str]] | None = None,
        vhost_block: int = 512,
        iscsi: Iscsi | None = None,
    ) -> None: ...
    @property
    def group(self) -> Group: ...
    @property
    def port(self) -> int: ...
    @property
    def stats(self) -> Stats: ...
    def start(self) -> None: ...
    def stop(self, drain: bool = True, timeout_ms: int = 10000) -> None: ...
    def clients(self) -> list[Client]: ...
    @property
    def iscsi_port(self) -> int: ...
    def iscsi_stats(self) -> IscsiStats: ...
    def vhost_stats(self) -> dict[str, VhostStats]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
