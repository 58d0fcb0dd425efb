from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from vrep._core.ring import RingReader

# NumPy declares its buffers to type checkers only from Python 3.12 on.
_BytesLike: TypeAlias = Buffer | NDArray[Any]

def stream_key(data_key: _BytesLike, stream_id: _BytesLike) -> bytes: ...

class Sealer:
    stream_id: bytes
    level: int
    def __init__(
        self,
        key: _BytesLike,
        stream_id: _BytesLike,
        *,
        epoch: int,
        lane: int = 0,
        resume_seq: int = 0,
        secret: _BytesLike | None = None,
        level: int = 0,
    ) -> None: ...
    @property
    def seq(self) -> int: ...
    def stats(self) -> dict[str, int]: ...
    def seal(
        self,
        records: NDArray[np.void],
        payloads: _BytesLike | Sequence[_BytesLike | None],
        out: _BytesLike,
    ) -> tuple[int, int]: ...
    def seal_ring(
        self, reader: RingReader, from_seq: int, to_seq: int, out: _BytesLike
    ) -> tuple[int, int]: ...
    def stream(self, stream: Any, out: _BytesLike) -> int: ...
    def tally(self, out: _BytesLike, *, wall_ns: int, mono_ns: int = 0) -> int: ...

class Tally:
    def reset(self) -> None: ...
    def update(self, buffer: _BytesLike) -> None: ...

class Opener:
    stream_id: bytes
    def __init__(self, key: _BytesLike, stream_id: _BytesLike) -> None: ...
    def piece(
        self, header: _BytesLike, index: int, word: int, stored: _BytesLike, out: _BytesLike
    ) -> int: ...
    def record(self, record: _BytesLike, out: _BytesLike) -> int: ...
    def hashes(self, record: _BytesLike, out: _BytesLike) -> int: ...
    def mark(self, record: _BytesLike) -> tuple[int, str]: ...
    def tally(self, record: _BytesLike, tally: Tally) -> np.void: ...
