from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class Scan(TypedDict):
    end: int
    wrong_at: int
    proof_at: int
    records: int
    commits: int
    last: tuple[int, int]
    lane: int
    durable: tuple[int, int]

def header(fields: Any) -> bytes: ...
def parse_header(buffer: Buffer) -> np.void: ...
def fold(fields: Any) -> bytes: ...
def parse_fold(buffer: Buffer) -> np.void | None: ...
def commit(fields: Any, buffers: Sequence[Buffer]) -> bytes: ...
def scan(
    buffer: Buffer,
    group_id: Buffer,
    segment: int,
    *,
    known: tuple[int, int] | None = None,
    commits: bool = False,
) -> tuple[Scan, NDArray[np.void]]: ...
