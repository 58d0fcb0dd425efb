"""Workers: processes that play worlds and tell what happened, one line of JSON for each.

All are forked from one that has imported vrep, which takes half a second. Nobody collects what a
world leaves behind, some 10 MB of cycles: when a collector finalizes what must not depend on what
was played before, and to go through all that takes longer than to end the process. So each plays
a few worlds, and then a fresh copy goes on.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn, TextIO

BATCH: Final = 16
"""worlds of one process"""
SEED_BYTES: Final = 8
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""of mallopt(3)"""


def play_all(seeds: Iterable[int], out: TextIO, *, trace: bool = False) -> None:
    """In this process."""
    loud() if trace else quiet()
    with some_keys() as (keys, wrapped):
        without_collection()
        play_each(seeds, out, keys, wrapped, print if trace else None)


def play_each(
    seeds: Iterable[int],
    out: TextIO,
    keys: Path,
    wrapped: bytes,
    trace: Callable[[str], None] | None = None,
) -> None:
    from world import play

    for seed in seeds:
        try:
            outcome = play(seed, keys, wrapped, trace)
            events, error = outcome.events, outcome.error
        except Exception:  # noqa: BLE001 - a defect of vrep, or of the simulator: it is shown
            events, error = Counter(), traceback.format_exc()
        print(json.dumps({"seed": seed, "events": events, "error": error}), file=out, flush=True)


class Workers:
    """A process for each of some descriptors, to which it tells what it played. Who is ready takes
    the next seed: they share the place in the file where it stands."""

    def __init__(self, seeds: list[int], fds: list[int]) -> None:
        self._seeds = b"".join(seed.to_bytes(SEED_BYTES, "little") for seed in seeds)
        self._idle = list(fds)
        self._busy: dict[int, int] = {}
        """which process tells which descriptor"""
        self._stopped = False

    def run(self) -> None:
        import world  # noqa: F401 - of which each has a copy

        quiet()
        keep_memory()
        signal.signal(signal.SIGTERM, lambda *_: self._stop())
        with tempfile.TemporaryFile() as file, some_keys() as (keys, wrapped):
            file.write(self._seeds)
            file.flush()
            fd = file.fileno()
            os.lseek(fd, 0, os.SEEK_SET)
            without_collection()
            while True:
                while self._idle and not self._stopped and _are_left(fd, len(self._seeds)):
                    self._start(fd, keys, wrapped)
                if not self._busy:
                    break
                child, status = os.wait()
                told = self._busy.pop(child)
                if not status:  # else what it died of may be there for the next one, too
                    self._idle.append(told)

    def _start(self, seeds: int, keys: Path, wrapped: bytes) -> None:
        told = self._idle.pop()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        child = os.fork()
        if not child:
            _work(seeds, told, keys, wrapped)
        self._busy[child] = told
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def _stop(self) -> None:
        self._stopped = True
        for child in self._busy:
            os.kill(child, signal.SIGTERM)


def _work(seeds: int, told: int, keys: Path, wrapped: bytes) -> NoReturn:
    status = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        with os.fdopen(told, "w") as out:
            play_each(_taken(seeds), out, keys, wrapped)
        status = 0
    except BaseException:  # noqa: BLE001 - a worker ends here whatever happens
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _are_left(fd: int, size: int) -> bool:
    return os.lseek(fd, 0, os.SEEK_CUR) < size


def _taken(fd: int) -> Iterator[int]:
    for _ in range(BATCH):
        data = os.read(fd, SEED_BYTES)
        if not data:
            break
        yield int.from_bytes(data, "little")


@contextmanager
def some_keys() -> Iterator[tuple[Path, bytes]]:
    """Of every world: the directory with the tenant's key, and the wrapped data key."""
    from hosts import make_keys

    root = Path(tempfile.mkdtemp(prefix="vrep-sim-keys-"))
    try:
        wrapped = make_keys(root)
        yield root / "keys", wrapped
    finally:
        shutil.rmtree(root)


def without_collection() -> None:
    gc.disable()
    gc.freeze()


def keep_memory() -> None:
    """What is freed is not given back to the system: each world takes it again."""
    libc = ctypes.CDLL(None)
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(option, 1 << 29)


def quiet() -> None:
    import structlog

    from vrep._core import log as native_log

    native_log.setup("error")
    logging.disable(logging.CRITICAL)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


def loud() -> None:
    import structlog

    from vrep._core import log as native_log

    native_log.setup("info")
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        processors=[structlog.processors.KeyValueRenderer(key_order=["event"])],
        logger_factory=structlog.PrintLoggerFactory(),
    )
