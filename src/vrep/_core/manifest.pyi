from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

Structs = NDArray[np.void]

class Parts(TypedDict):
    header: Any
    epochs: Structs
    segments: Structs
    runs: Structs
    disks: Structs
    keys: list[bytes]

def parse(buffer: Buffer) -> Parts: ...
def build(
    fields: Any,
    epochs: Structs,
    segments: Structs,
    runs: Structs,
    disks: Structs,
    keys: Sequence[bytes],
) -> bytes: ...
