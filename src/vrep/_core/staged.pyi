from collections.abc import Sequence

from typing_extensions import Buffer

def write_staged(
    fd: int, buffers: Sequence[Buffer], offset: int, room: Buffer
) -> tuple[int, int]: ...
