"""What clients know, and what must follow from it: the oracle of the pipeline tests.

Every command that a client gives is noted with the moments before it was sent and after it was
answered, by one clock. A command that was not answered may have happened, at any time after it
was sent, or never. From this alone follow (`Witness`):

- order: a write that was sent after another was answered has the larger seq, on any disk;
- a mark divides: what was answered before it was asked for is in it, what was sent after it was
  answered is not;
- content: each byte of an answered write is there still, unless another write that may have
  come later explains what is there.

What the journal says is replayed by `Replay`, which knows of records only.

Nobody keeps what was written: gigabytes, in a storm. A payload follows from its command's number
and is made again where it is compared (`payload`), and a record of the journal is known by the
digest of its data.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sites import Entry, digest_of

from vrep._core import layout

NEVER = math.inf
TAG_BYTES = 8
"""a write at least so long is told apart from all others by its bytes"""

PAYLOAD_MAX = 32 << 20
"""the longest that a client writes at once"""
PHASES = 1 << 20
"""noise of two commands is of different places of the pool, unless so many lie between them"""
_pool: list[np.ndarray[Any, np.dtype[np.uint8]]] = []


def noise_pool() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Random bytes, the same in every process; no payload repeats any of them."""
    if not _pool:
        rng = np.random.default_rng(0x5EED)
        _pool.append(rng.integers(0, 256, PAYLOAD_MAX + TAG_BYTES * PHASES, np.uint8))
    return _pool[0]


def payload(number: int, noise: bool, first: int, end: int) -> bytes:
    """Bytes `first` to `end` of what command `number` writes: its number, over and over, and in
    noise all but the first of it mixed with the pool, from a place of the command's own."""
    tag = np.frombuffer(number.to_bytes(TAG_BYTES, "big"), np.uint8)
    whole = -(-end // TAG_BYTES) * TAG_BYTES
    begin = first - first % TAG_BYTES
    room = np.tile(tag, (whole - begin) // TAG_BYTES)
    mixed = max(begin, TAG_BYTES)
    if noise and whole > mixed:
        # An odd factor: numbers and phases are one to one.
        at = number * 0x9E3779B1 % PHASES * TAG_BYTES
        room[mixed - begin :] ^= noise_pool()[at + mixed : at + whole]
    return room[first - begin : end - begin].tobytes()


@dataclass(slots=True)
class Command:
    """One command of a client."""

    number: int
    disk: int
    offset: int
    length: int
    shape: str
    """noise, text, zeroes, or trim: it may zero its range, or not"""
    sent: float = 0.0
    answered: float = NEVER
    digest: bytes = b""
    """of the data of a write, else empty"""

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def writes(self) -> bool:
        return self.shape in ("noise", "text")

    @property
    def data(self) -> bytes:
        """What it writes; made anew each time."""
        assert self.writes
        return payload(self.number, self.shape == "noise", 0, self.length)

    def bytes_at(self, offset: int, end: int) -> bytes:
        if not self.writes:
            return bytes(end - offset)
        return payload(self.number, self.shape == "noise", offset - self.offset, end - self.offset)


@dataclass
class Mark:
    """A checkpoint that was answered."""

    label: str
    seq: int
    asked: float
    answered: float


@dataclass
class Witness:
    """Everything that clients did. `note` and `mark` may be called by any thread."""

    disks: list[str]
    sizes: list[int]
    commands: list[Command] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    killed: list[float] = field(default_factory=list)
    """moments at which a filter died whose successor is given again what was not answered"""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        noise_pool()  # before there are threads

    def begin(self, disk: int, offset: int, length: int, shape: str) -> Command:
        """Note a command that is about to be sent: shape is noise, text, zeroes or trim."""
        assert length <= PAYLOAD_MAX
        with self.lock:
            command = Command(len(self.commands) + 1, disk, offset, length, shape)
            self.commands.append(command)
        if command.writes:
            command.digest = digest_of(command.data)
        command.sent = time.monotonic()
        return command

    def marked(self, label: str, seq: int, asked: float) -> None:
        with self.lock:
            self.marks.append(Mark(label, seq, asked, time.monotonic()))

    @property
    def answered(self) -> int:
        return sum(1 for command in self.commands if command.answered < NEVER)

    # ---- what must hold ------------------------------------------------------------

    def recorded(self, entries: Iterable[Entry]) -> list[tuple[Entry, Command]]:
        """Writes of the journal and the commands that they are. Every one is somebody's, and
        none is there twice, unless it waited while a filter died that is given it again: then it
        was done and not told, and is done once more with the same bytes."""
        writes = [c for c in self.commands if c.writes]
        by_bytes = {
            (c.disk, c.offset, c.length, c.digest): c for c in writes if c.length >= TAG_BYTES
        }
        short = {(c.disk, c.offset, c.length, c.digest) for c in writes if c.length < TAG_BYTES}
        found: list[tuple[Entry, Command]] = []
        seen: dict[int, int] = {}
        for entry in entries:
            if entry.kind != layout.KIND_WRITE:
                continue
            key = (entry.disk, entry.offset, entry.length, entry.digest)
            if entry.length < TAG_BYTES:
                assert key in short, f"seq {entry.seq}: a write that no client sent"
                continue
            command = by_bytes.get(key)
            assert command is not None, (
                f"seq {entry.seq}: no client wrote these {entry.length} bytes at {entry.offset} of "
                f"disk {entry.disk}"
            )
            seen[command.number] = seen.get(command.number, 0) + 1
            deaths = sum(command.sent < moment < command.answered for moment in self.killed)
            assert seen[command.number] <= 1 + deaths, (
                f"command {command.number} is in the journal twice"
            )
            found.append((entry, command))
        return found

    @staticmethod
    def check_order(recorded: list[tuple[Entry, Command]]) -> None:
        """Real-time order across disks: nothing stands before what was answered before it was
        sent."""
        latest: Command | None = None
        for entry, command in recorded:
            if latest is not None and command.answered < latest.sent:
                raise AssertionError(
                    f"command {command.number} (seq {entry.seq}) was answered before command "
                    f"{latest.number} was sent, and stands after it"
                )
            if latest is None or command.sent > latest.sent:
                latest = command

    def check_marks(self, entries: list[Entry], recorded: list[tuple[Entry, Command]]) -> None:
        labels = {entry.label: entry.seq for entry in entries if entry.kind == layout.KIND_MARK}
        for mark in self.marks:
            assert labels.get(mark.label) == mark.seq, f"{mark} is not in the journal: {labels}"
            for entry, command in recorded:
                if command.answered < mark.asked:
                    assert entry.seq < mark.seq, f"{mark} lacks command {command.number}"
                if command.sent > mark.answered:
                    assert entry.seq > mark.seq, f"{mark} has command {command.number}"

    def check_content(
        self,
        disk: int,
        content: bytes,
        *,
        asked: float = NEVER,
        answered: float = NEVER,
    ) -> int:
        """Content of a disk at a moment between `asked` and `answered`: how many bytes were
        found to be right."""
        known = [
            c for c in self.commands if c.disk == disk and c.answered < asked and c.shape != "trim"
        ]
        possible = [c for c in self.commands if c.disk == disk and c.sent <= answered]
        offsets = np.array([c.offset for c in possible], np.int64)
        ends = np.array([c.end for c in possible], np.int64)
        done = np.array([c.answered for c in possible])
        there = np.frombuffer(content, np.uint8)
        right = 0
        for command in known:
            window = there[command.offset : command.end]
            mine = np.frombuffer(command.bytes_at(command.offset, command.end), np.uint8)
            wrong = window != mine
            right += len(window)
            if not wrong.any():
                continue
            # Others that touch it, and did not surely come before it.
            others = np.flatnonzero(
                (offsets < command.end) & (ends > command.offset) & ~(done < command.sent)
            )
            for index in others:
                other = possible[int(index)]
                if other is command:
                    continue
                first = max(other.offset, command.offset)
                last = min(other.end, command.end)
                theirs = np.frombuffer(other.bytes_at(first, last), np.uint8)
                part = slice(first - command.offset, last - command.offset)
                wrong[part] &= window[part] != theirs
            assert not wrong.any(), (
                f"disk {self.disks[disk]!r} at {command.offset + int(np.flatnonzero(wrong)[0])}: "
                f"what command {command.number} wrote there (answered {command.answered:.6f}) is "
                "gone, and no other command explains what is there"
            )
        return right


class Replay:
    """What every disk holds after each record."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self.disks = {index: bytearray(size) for index, size in sizes.items()}
        self._zero = (layout.KIND_ZEROES, layout.KIND_SYNC_ZEROES)

    def apply(self, entry: Entry) -> None:
        if entry.kind in (layout.KIND_WRITE, layout.KIND_SYNC):
            assert entry.data is not None
            self.disks[entry.disk][entry.offset : entry.offset + entry.length] = entry.data
        elif entry.kind in self._zero:
            end = entry.offset + entry.length
            self.disks[entry.disk][entry.offset : end] = bytes(entry.length)
