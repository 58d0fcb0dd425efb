"""Comparing: what a resync sends is what differs from what the target holds.

While it runs, the filter turns unshipped blocks into windows (filter/delta.h). A `Delta` takes
them, asks the target which sealed hashes it holds of them at its durable position, opens those
with the group's data keys and hands the filter what they say. The filter reads the disk,
compares under the lock of the range, and sends what differs. Nothing is skipped on a word of the
target's alone: what cannot be opened, is of another disk or place than was asked for, or is of an
epoch that this writer's line does not hold, counts as no hash, and is sent.

What begins it is a block that is unshipped: after a gap, after writes past the filter, after the
target lost what it had acknowledged, after `resync`, or because `RingHold.compare` said that a
range may differ. The owner of a session only starts and stops it, and passes on the target's
answers.

One thread. Memory: some windows of 4 MiB, with 17 bytes for each 4 KiB, and one answer.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgspec
import numpy as np
import structlog

from vrep import threads
from vrep._core import layout, record
from vrep._core.filter import DELTA_KEYS_MAX, DELTA_WINDOWS, Window
from vrep._core.seal import Opener
from vrep.errors import IntegrityError, InvalidError, PeerError, ProtocolError, VrepError
from vrep.keys.datakey import DataKey
from vrep.source.attach import RingHold
from vrep.wire import messages as m
from vrep.wire.transport import FrameTransport

__all__ = ["Delta", "DeltaCount", "HashBook", "Line"]

BLOCK: Final = layout.HASH_BLOCK_BYTES
HASH_BYTES: Final = 16
BATCH_WINDOWS: Final = DELTA_WINDOWS // 2
"""asked for at once: the filter copies one half while the other is asked for"""
IDLE_S: Final = 0.2
BUSY_S: Final = 0.005
FILL_S: Final = 0.1
ANSWER_S: Final = 20.0
"""an answer that takes longer is not waited for: its windows are sent whole"""
OPENERS_MAX: Final = 64
# magic .. seq, offset, length, body_bytes: see struct vrep_record
_FIELDS: Final = struct.Struct("<IBBHIHHQQIIQQHHI")

log = structlog.get_logger("vrep.source")


@dataclass
class DeltaCount:
    """What comparing cost on the wire since the session began; bytes."""

    hash_bytes: int = 0
    """received: sealed hashes, with their headers"""
    question_bytes: int = 0
    """sent to ask for them"""
    windows: int = 0
    refused: int = 0
    """records whose hashes could not be used"""
    on: bool = False
    """whether what is unshipped now is compared; else it is sent whole"""

    def plain(self) -> dict[str, int | bool]:
        return asdict(self)


@dataclass(frozen=True)
class Line:
    """The epochs whose records may be on the history of a writer: its own, its parent up to
    where it left it, and what is older than that."""

    epoch: int
    parent_epoch: int = 0
    parent_seq: int = 0

    def holds(self, epoch: int, seq: int, durable_seq: int) -> bool:
        """Whether a record of this position can be on the line, up to a durable seq. An epoch
        between the parent and the writer's own was abandoned."""
        if epoch == self.epoch:
            return 0 < seq <= durable_seq
        if epoch == self.parent_epoch:
            return 0 < seq <= self.parent_seq
        return 0 < epoch < self.parent_epoch


class HashBook:
    """Opens hash pieces with the data keys of a group, of any generation that is held here."""

    def __init__(self, keys: Iterable[DataKey]) -> None:
        found = sorted(keys, key=lambda key: key.generation, reverse=True)[:DELTA_KEYS_MAX]
        if not found:
            raise InvalidError("comparing needs a data key")
        self._numbers = {key.generation: number for number, key in enumerate(found)}
        self._keys = found
        self._openers: OrderedDict[bytes, Opener] = OrderedDict()
        self._room = bytearray(layout.WRITE_BYTES_MAX // BLOCK * HASH_BYTES)

    @property
    def secrets(self) -> list[bytes]:
        """Of the hashes, in the order in which `read` numbers them."""
        return [key.hash_secret() for key in self._keys]

    def read(
        self, answer: m.HashAnswer, windows: Mapping[int, Window], line: Line
    ) -> tuple[dict[int, tuple[bytes, bytes]], int]:
        """What an answer says of the windows that it is of, by their place in the question: keys
        and hashes as `Group.delta_answer` takes them; and how many records were of no use."""
        found = {}
        for number, window in windows.items():
            units = -(-window.length // BLOCK)
            found[number] = (np.zeros(units, np.uint8), np.zeros((units, HASH_BYTES), np.uint8))
        opened = [self._open(item, answer, line) for item in answer.records]
        for run in answer.runs:
            if run.range not in windows or run.record >= len(opened):
                continue
            piece, asked = opened[run.record], windows[run.range]
            if piece is not None and piece.disk == asked.disk:
                self._copy(run, asked, piece, *found[run.range])
        plain = {
            number: (keys.tobytes(), hashes.tobytes()) for number, (keys, hashes) in found.items()
        }
        return plain, sum(piece is None for piece in opened)

    @staticmethod
    def _copy(run: m.HashRun, window: Window, piece: _Piece, keys: Any, hashes: Any) -> None:
        at, skip = run.offset - window.offset, run.offset - piece.offset
        blocks = run.length // BLOCK
        if (
            at < 0
            or skip < 0
            or at % BLOCK
            or skip % BLOCK
            or run.length % BLOCK
            or at + run.length > window.length
            or skip // BLOCK + blocks > len(piece.hashes)
        ):
            return  # not of what was asked, or more than was sealed
        to = slice(at // BLOCK, at // BLOCK + blocks)
        hashes[to] = piece.hashes[skip // BLOCK : skip // BLOCK + blocks]
        keys[to] = piece.key

    def _open(self, item: m.HashRecord, answer: m.HashAnswer, line: Line) -> _Piece | None:
        """The hashes of a record; None when they prove nothing."""
        if item.stream >= len(answer.streams):
            return None
        stream = answer.streams[item.stream]
        number = self._numbers.get(stream.key_generation)
        if number is None:
            return None
        fields = _FIELDS.unpack(item.header)
        epoch, _lane, disk, seq, offset, length = fields[4:10]
        if not line.holds(epoch, seq, answer.position.seq):
            return None
        try:
            opener = self._opener(stream, self._keys[number])
            size = opener.piece(item.header, layout.PIECE_HASH, item.word, item.piece, self._room)
        except IntegrityError:
            return None
        blocks, first = record.hash_blocks(offset, length)
        if size != blocks * HASH_BYTES:
            return None
        # A copy of what is used: an answer has thousands of records, most of one block.
        values = np.frombuffer(self._room, np.uint8, size).reshape(blocks, HASH_BYTES).copy()
        return _Piece(disk, offset + first, values, number + 1)

    def _opener(self, stream: m.HashStream, key: DataKey) -> Opener:
        opener = self._openers.get(stream.id)
        if opener is None:
            opener = self._openers[stream.id] = Opener(key.stream_key(stream.id), stream.id)
            if len(self._openers) > OPENERS_MAX:
                self._openers.popitem(last=False)
        return opener


@dataclass(frozen=True)
class _Piece:
    """Hashes of a record's whole blocks, authentic."""

    disk: int
    offset: int
    """of the first block"""
    hashes: Any
    key: int


class Delta:
    """Compares for one session, from `start` to `stop`."""

    def __init__(
        self,
        hold: RingHold,
        transport: FrameTransport,
        book: HashBook,
        group_id: bytes,
        line: Line,
        count: DeltaCount | None = None,
        *,
        empty: bool = False,
    ) -> None:
        """`empty`: the target holds nothing yet. Then the first sync is not compared."""
        self._empty = empty
        self.count = count or DeltaCount()
        self._hold = hold
        self._transport = transport
        self._book = book
        self._group_id = group_id
        self._line = line
        self._answers: deque[m.Response] = deque()
        self._came = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"delta:{hold.group}", daemon=True)

    def start(self) -> None:
        """From now on the filter compares. After the stream was opened: what the target held of
        an older one is durable or gone then. UnsupportedError: the filter cannot."""
        if not self._empty:
            self._begin()
        threads.start(self._thread)

    def stop(self) -> None:
        """The filter sends whole blocks again."""
        self._stopping.set()
        with self._came:
            self._came.notify_all()
        self._thread.join()

    def answered(self, response: m.Response) -> None:
        """An answer came; from the thread that receives."""
        with self._came:
            self._answers.append(response)
            self._came.notify_all()

    # ---- its thread ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._let_fill()
            while not self._stopping.is_set():
                windows, at_least = self._hold.delta_take(BATCH_WINDOWS)
                if windows:
                    self._compare(windows, at_least)
                    self._stopping.wait(BUSY_S)
                else:
                    self._stopping.wait(IDLE_S)
        except (PeerError, VrepError) as error:
            # The session ends with the connection or the filter; resyncs send all until then.
            log.info("comparing ended", group=self._hold.group, error=str(error))
        except Exception:
            log.exception("comparing failed", group=self._hold.group)
        finally:
            self._end()

    def _let_fill(self) -> None:
        """Until a target that was empty has everything."""
        if not self._empty:
            return
        while self._hold.status()["gap"]:
            if self._stopping.wait(FILL_S):
                return
        self._begin()

    def _begin(self) -> None:
        self._hold.delta_begin(self._book.secrets)
        self.count.on = True

    def _end(self) -> None:
        self.count.on = False
        try:
            self._hold.delta_end()
        except VrepError as error:
            log.debug("filter not reached", group=self._hold.group, error=str(error))

    def _compare(self, windows: list[Window], at_least: int) -> None:
        """Ask for windows until all are answered, as far as the target can."""
        while windows and not self._stopping.is_set():
            response = self._ask(windows, at_least)
            if response is None or response.error is not None:
                if response is not None:
                    log.info(
                        "the target does not say what it holds: blocks are sent",
                        group=self._hold.group,
                        error=f"{response.text} ({response.error})",
                    )
                self._give_up(windows)
                return
            windows = windows[self._read(response, windows, at_least) :]

    def _ask(self, windows: list[Window], at_least: int) -> m.Response | None:
        """The target's answer; None when there is none in time."""
        question = m.plain_part(
            m.HashQuestion(
                group_id=self._group_id,
                at_least=at_least,
                ranges=[
                    m.HashRange(disk=one.disk, offset=one.offset, length=one.length)
                    for one in windows
                ],
            )
        )
        self.count.question_bytes += len(msgspec.msgpack.encode(question))
        number = self._transport.question(m.HASHES_METHOD, question)
        deadline = time.monotonic() + ANSWER_S
        with self._came:
            while not self._stopping.is_set():
                while self._answers:
                    response = self._answers.popleft()
                    if response.id == number:  # an older one came too late
                        return response
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                self._came.wait(left_s)
        return None

    def _read(self, response: m.Response, windows: list[Window], at_least: int) -> int:
        """Hand an answer to the filter; of how many windows it was."""
        self.count.hash_bytes += len(msgspec.msgpack.encode(response.result))
        answer = m.decode_hash_answer(response.result)
        if answer.position.seq < at_least or answer.answered > len(windows):
            raise ProtocolError("the target answered another question than was asked")
        asked = dict(enumerate(windows[: answer.answered]))
        found, refused = self._book.read(answer, asked, self._line)
        self.count.refused += refused
        self.count.windows += len(asked)
        self._hold.delta_answer([(asked[at].id, *said) for at, said in found.items()])
        return answer.answered

    def _give_up(self, windows: list[Window]) -> None:
        """Of these nothing is known: they are sent."""
        answers = []
        for window in windows:
            units = -(-window.length // BLOCK)
            answers.append((window.id, bytes(units), bytes(units * HASH_BYTES)))
        self._hold.delta_answer(answers)
