from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from vrep._core.index import Index

BLOCK_BYTES: int
CHANGED: np.dtype[np.void]

class Changes:
    def __init__(
        self,
        indexes: Iterable[Index],
        since: Iterable[tuple[int, int]],
        at: Iterable[tuple[int, int]],
        *,
        group_id: Buffer | None = None,
    ) -> None: ...
    def list(self, disk: int, offset: int, length: int) -> NDArray[np.void]: ...
