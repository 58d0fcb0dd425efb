"""Programs: a process that another one starts and talks to over pipes, in simulated time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec
from kernel import Kernel, Process, Task

from vrep.errors import VrepError
from vrep.recovery.base import Batch, seal_base
from vrep.target.base import BASE_FRAME, FRAME_END, BasePlan

if TYPE_CHECKING:
    from hosts import Host
    from oracle import Oracle

Batches = Generator[Batch, None, None]
ROOM_BYTES: Final = 64 << 10
"""that a pipe holds before who writes waits"""


class Pipe:
    """What one process writes and another reads."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._data = bytearray()
        self._ended = False
        self._waiters: list[Task] = []

    def write(self, data: Any) -> None:
        self._data += data
        self._kernel.wake_all(self._waiters)
        self._kernel.wait_until(lambda: len(self._data) < ROOM_BYTES, 1e6, self._waiters)

    def read(self, size: int) -> bytes:
        """So many bytes, or fewer at the end."""
        self._kernel.wait_until(lambda: len(self._data) >= size or self._ended, 1e6, self._waiters)
        data = bytes(self._data[:size])
        del self._data[:size]
        self._kernel.wake_all(self._waiters)
        return data

    def end(self) -> None:
        self._ended = True
        self._kernel.wake_all(self._waiters)


class Input:
    """The standard input of a program that reads all of it before it begins."""

    def __init__(self, begin: Callable[[bytes], None]) -> None:
        self._data = bytearray()
        self._begin = begin

    def write(self, data: bytes) -> None:
        self._data += data

    def close(self) -> None:
        self._begin(bytes(self._data))


class BaseProgram:
    """`vrep.recovery.base`, in the place of subprocess.Popen."""

    def __init__(self, host: Host, oracle: Oracle, _command: Any, **_options: Any) -> None:
        self.returncode: int | None = None
        self._kernel = kernel = host.kernel
        self._paths = host.paths
        self._process: Process = host.process("base", oracle)
        self._process.at_kill.append(self._ended)
        self.stdin = Input(self._begin)
        self.stdout = Pipe(kernel)

    def _begin(self, data: bytes) -> None:
        plan = msgspec.json.decode(data, type=BasePlan)
        if self._kernel.rng.random() < 0.2:
            self._process.fuse = self._kernel.rng.randrange(4)

        def run() -> None:
            try:
                with contextlib.closing(cast(Batches, seal_base(self._paths, plan))) as batches:
                    for batch in batches:
                        self._process.burn()
                        head = BASE_FRAME.pack(batch.done, batch.total, len(batch.data))
                        self.stdout.write(head + bytes(batch.data))
                self.stdout.write(BASE_FRAME.pack(1, 1, FRAME_END))
                self._kernel.event("base")
            except VrepError as error:
                self._kernel.note(f"no base: {error}")
            self._kernel.kill(self._process)

        self._kernel.spawn(self._process, run, "base")

    def _ended(self) -> None:
        self.returncode = -9
        self.stdout.end()

    def kill(self) -> None:
        if not self._process.dead:
            self._kernel.kill(self._process)

    def __enter__(self) -> BaseProgram:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()
