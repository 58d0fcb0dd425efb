"""A byte stream in memory: two ends in one process, for simulators and tests.

Behaves as a socket pair does: ordered, bounded (`capacity` bytes on their way
in each direction), an end after `close`.  Safe from several threads.
"""

from __future__ import annotations

import threading

from vrep.errors import TimeLimitError
from vrep.wire.stream import ConnectionLostError

__all__ = ["MemoryStream", "memory_pair"]


class _Pipe:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = bytearray()
        self.closed = False
        self.changed = threading.Condition()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class MemoryStream:
    """One end of a pair; a ByteStream."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._in = incoming
        self._out = outgoing

    def read_into(self, buffer: memoryview, timeout_s: float) -> int | None:
        pipe = self._in
        with pipe.changed:
            if not pipe.changed.wait_for(lambda: pipe.bytes or pipe.closed, timeout_s):
                return None
            count = min(len(buffer), len(pipe.bytes))
            buffer[:count] = pipe.bytes[:count]
            del pipe.bytes[:count]
            pipe.changed.notify_all()
            return count

    def write_some(self, data: bytes | bytearray | memoryview) -> int:
        pipe = self._out
        with pipe.changed, memoryview(data).cast("B") as view:
            if pipe.closed:
                raise ConnectionLostError("the stream in memory was closed")
            count = min(view.nbytes, pipe.capacity - len(pipe.bytes))
            pipe.bytes += view[:count]
            pipe.changed.notify_all()
            return count

    def write(self, data: bytes | bytearray | memoryview, stall_s: float) -> None:
        pipe = self._out
        with memoryview(data).cast("B") as view:
            at = 0
            while at < view.nbytes:
                count = self.write_some(view[at:])
                at += count
                if count:
                    continue
                with pipe.changed:
                    room = lambda: len(pipe.bytes) < pipe.capacity or pipe.closed  # noqa: E731
                    if not pipe.changed.wait_for(room, stall_s):
                        raise TimeLimitError(f"the peer took no bytes for {stall_s:g} s")

    def close(self) -> None:
        self._in.close()
        self._out.close()


def memory_pair(capacity: int = 1 << 20) -> tuple[MemoryStream, MemoryStream]:
    """Two connected ends."""
    one, two = _Pipe(capacity), _Pipe(capacity)
    return MemoryStream(one, two), MemoryStream(two, one)
