import os
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

# NumPy declares its buffers to type checkers only from Python 3.12 on.
_BytesLike: TypeAlias = Buffer | NDArray[Any]

BLOCK_MIN: int
BLOCK_MAX: int
BLOCK_DEFAULT: int
SECRET_MIN: int
THREADS_MAX: int

class BlockHashes(NamedTuple):
    hashes: NDArray[np.uint64]
    zeros: NDArray[np.bool_]

def hash_blocks(
    buffer: _BytesLike,
    block_size: int = 4096,
    *,
    bits: int = 128,
    secret: _BytesLike | None = None,
    threads: int = 1,
    out: NDArray[np.uint64] | None = None,
    zeros: NDArray[np.bool_] | None = None,
) -> BlockHashes: ...
def hash_file(
    path_or_fd: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int,
    offset: int = 0,
    length: int | None = None,
    block_size: int = 4096,
    *,
    bits: int = 128,
    secret: _BytesLike | None = None,
    threads: int = 1,
    out: NDArray[np.uint64] | None = None,
    zeros: NDArray[np.bool_] | None = None,
) -> BlockHashes: ...
