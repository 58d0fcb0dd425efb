"""The soak's load, and what is known of it: each writer knows what its disk holds.

A `Writer` writes one disk, one command after the other. What was cut off by a kill is sent again
until it is answered, as a VM does, so its model is exact whenever no command is on its way. A mark
that is made in such a moment recovers to the model of that moment: its hashes are kept, not its
bytes.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from dataclasses import dataclass
from typing import Final

import xxhash
from sites import GROUP, Client, Pair

from vrep import errors

CHUNK: Final = 1 << 16
LENGTHS: Final = (512, 4096, 4096, 4096, 4096, 16384, 65536)
BURST_LENGTH: Final = 1 << 20
MARKS_MAX: Final = 400


def hashes(content: bytes | bytearray | memoryview) -> list[int]:
    """One for each `CHUNK` of a disk."""
    view = memoryview(content)
    return [xxhash.xxh3_64_intdigest(view[at : at + CHUNK]) for at in range(0, len(view), CHUNK)]


@dataclass(frozen=True)
class Mark:
    """A checkpoint that was answered, and what each disk held."""

    label: str
    seq: int
    made_s: float
    content: dict[str, list[int]]


class Writer(threading.Thread):
    """Writes one disk until stopped."""

    def __init__(self, pair: Pair, disk: str, size: int, seed: str, pause_s: float) -> None:
        super().__init__(daemon=True)
        self.pair, self.disk, self.pause_s = pair, disk, pause_s
        self.rng = random.Random(seed)
        self.model = bytearray(size)
        self.still = threading.Lock()
        """held while a command is on its way"""
        self.burst = 0
        """large commands to send without a pause"""
        self.commands = self.repeated = self.bytes = 0
        self.longest_wait_s = 0.0
        """of a command that one connection answered"""
        self.failure: BaseException | None = None
        self._ending = threading.Event()
        self._client: Client | None = None

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                with self.still:
                    self._command()
                if self.burst:
                    self.burst -= 1
                else:
                    time.sleep(self.pause_s * self.rng.uniform(0.5, 1.5))
        except BaseException as error:  # noqa: BLE001 - a violation, told by `failure`
            self.failure = error
        finally:
            self._hang_up()

    def stop(self) -> None:
        self._ending.set()
        self.join(120)
        if self.is_alive() and self.failure is None:
            self.failure = AssertionError("the client hangs")

    def _command(self) -> None:
        rng = self.rng
        length = min(BURST_LENGTH if self.burst else rng.choice(LENGTHS), len(self.model))
        offset = rng.randrange(0, len(self.model) - length + 1, 512)
        kind = rng.random()
        data = rng.randbytes(length) if kind < 0.6 else bytes([rng.randrange(256)]) * length
        zeroes = kind > 0.97
        while True:
            began_s, fresh = time.monotonic(), self._client is None
            try:
                if self._client is None:
                    self._client = self.pair.client(self.disk)
                if zeroes:
                    self._client.zeroes(offset, length)
                else:
                    self._client.write(offset, data, fua=rng.random() < 0.02)
                break
            except (OSError, errors.UnreachableError):
                self._hang_up()
                self.repeated += 1
                time.sleep(0.05)
        if not fresh:
            self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - began_s)
        self.model[offset : offset + length] = bytes(length) if zeroes else data
        self.commands += 1
        self.bytes += length

    def _hang_up(self) -> None:
        if self._client is not None:
            with contextlib.suppress(OSError, errors.VrepError):
                self._client.__exit__(None, None, None)
            self._client = None


class Marks:
    """The checkpoints that were answered; the oldest are forgotten."""

    def __init__(self, pair: Pair, writers: list[Writer]) -> None:
        self.pair, self.writers = pair, writers
        self.kept: list[Mark] = []
        self.made = self.refused = 0

    def make(self, note: str = "") -> Mark | None:
        """Mark the present instant; None when that is refused: in a gap, or while the filter is
        away."""
        label = f"{note or 'soak'}-{self.made + self.refused}"
        with contextlib.ExitStack() as still:
            for writer in self.writers:
                still.enter_context(writer.still)
            try:
                seq = int(self.pair.a.checkpoint(GROUP, label)["seq"])
            except errors.VrepError:
                self.refused += 1
                return None
            content = {writer.disk: hashes(writer.model) for writer in self.writers}
        self.made += 1
        made = Mark(label, seq, time.monotonic(), content)
        self.kept = [*self.kept[-MARKS_MAX + 1 :], made]
        return self.kept[-1]


__all__ = ["Mark", "Marks", "Writer", "hashes"]
