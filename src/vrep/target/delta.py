"""What a target answers a source that compares: hash pieces of what it holds, unread.

A question names ranges of disks and a position. The answer says which record is the newest of
each whole 4 KiB block, by the ancestry that ends at the durable position, with the record's
header and its sealed hash piece: only the source can open it. Blocks of zeroes, blocks that were
never written and records without hashes are not in it, and are sent by the source.

A piece that is large beside what it can save is left out. An answer is bounded by
`HASH_ANSWER_BYTES`, and by what one range can need: half of its size.

Sizes are bytes, times seconds.
"""

from __future__ import annotations

import logging
import re
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from vrep import threads
from vrep._core import layout
from vrep._core.index import ExtentMap
from vrep.errors import AgainError, BusyError, PeerError, StateError, VrepError
from vrep.target.hashes import hash_piece, whole_blocks
from vrep.target.manifest import Position
from vrep.target.reader import StoreReader
from vrep.wire import messages as m

__all__ = ["DeltaDesk", "error_code", "look_up"]

QUESTIONS_MAX: Final = 8
DURABLE_WAIT_S: Final = 2.0
IDLE_S: Final = 2.0
"""then files are let go of"""
_HEADER: Final = layout.RECORD.itemsize

log = logging.getLogger("vrep.target")


def error_code(error: VrepError) -> str:
    """The code of an error in a Response."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()[:32]


class _Answer:
    """An answer in the making."""

    def __init__(self, reader: StoreReader, extents: ExtentMap) -> None:
        self._reader = reader
        self._streams = extents.streams
        self._numbers: dict[tuple[int, int], int] = {}
        self._known_streams: dict[int, int] = {}
        self.streams: list[m.HashStream] = []
        self.records: list[m.HashRecord] = []
        self.runs: list[m.HashRun] = []
        self.piece_bytes = 0

    def add(self, number: int, extents: Any) -> None:
        """The data of one range."""
        rows = whole_blocks(extents).tolist()
        covered: dict[tuple[int, int], int] = {}
        keyed = []
        for at, first, end in rows:
            extent = extents[at]
            key = (int(extent["segment"]), int(extent["position"]))
            covered[key] = covered.get(key, 0) + end - first
            keyed.append((key, extent, first, end))
        for key, extent, first, end in keyed:
            record = self._numbers.get(key)
            if record is None:
                record = self._numbers[key] = self._take(key, extent, covered[key])
            if record >= 0:
                self.runs.append(m.HashRun(number, first, end - first, record))

    def _take(self, key: tuple[int, int], extent: Any, covered: int) -> int:
        """The number of a record in the answer; -1: it has no hashes, or they are too many."""
        found = hash_piece(self._reader, *key, covered // 2)
        if found is None:
            return -1
        self.piece_bytes += len(found.piece) + _HEADER
        self.records.append(
            m.HashRecord(
                header=found.header,
                stream=self._stream(int(extent["stream"])),
                word=found.word,
                piece=found.piece,
            )
        )
        return len(self.records) - 1

    def _stream(self, row: int) -> int:
        number = self._known_streams.get(row)
        if number is None:
            number = self._known_streams[row] = len(self.streams)
            stream = self._streams[row]
            self.streams.append(
                m.HashStream(
                    id=stream["stream_id"].tobytes(), key_generation=int(stream["key_generation"])
                )
            )
        return number


def look_up(reader: StoreReader, position: Position, question: m.HashQuestion) -> m.HashAnswer:
    """The answer of a snapshot at a position that is durable in it. IntegrityError when the store
    is damaged where it was looked at."""
    extents = reader.extent_map(position)
    return _look_up(reader, extents, position, question)


def _look_up(
    reader: StoreReader, extents: ExtentMap, position: Position, question: m.HashQuestion
) -> m.HashAnswer:
    answer, answered = _Answer(reader, extents), 0
    for number, part in enumerate(question.ranges):
        found = extents.lookup(part.disk, part.offset, part.length)
        answer.add(number, found[found["kind"] == layout.KIND_WRITE])
        answered += 1
        if answer.piece_bytes >= m.HASH_ANSWER_BYTES:
            break
    return m.HashAnswer(
        position=m.Position(epoch=position.epoch, lane=position.lane, seq=position.seq),
        answered=answered,
        streams=answer.streams,
        records=answer.records,
        runs=answer.runs,
    )


class DeltaDesk:
    """Answers the questions of one session, on a thread of its own that runs while there are
    some: records are received meanwhile."""

    def __init__(
        self,
        stores: Path,
        group_id: bytes,
        epoch: int,
        durable_seq: Callable[[], int],
        post: Callable[[m.Response], None],
    ) -> None:
        """`durable_seq` is that of the epoch's line; `post` must not wait."""
        self._stores = stores
        self._group_id = group_id
        self._epoch = epoch
        self._durable_seq = durable_seq
        self._post = post
        self._questions: deque[tuple[int, m.HashQuestion]] = deque()
        self._asked = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = self._released = False

    def ask(self, request: m.Request) -> None:
        """Take a question. ProtocolError when it is none, BusyError when too many wait."""
        question = m.decode_hash_question(request.params)
        with self._asked:
            if self._closed or len(self._questions) >= QUESTIONS_MAX:
                raise BusyError("too many questions wait for an answer")
            self._questions.append((request.id, question))
            self._asked.notify_all()
            if self._thread is None:
                thread = threading.Thread(
                    target=self._run, name=f"delta:{self._group_id.hex()[:8]}", daemon=True
                )
                threads.start(thread)
                self._thread = thread

    def close(self) -> None:
        """Answer no more, and let go of the store's files."""
        self._closed = True
        self.release()

    def release(self) -> None:
        """Let go of the store's files; a question that comes later is answered again."""
        with self._asked:
            thread, self._released = self._thread, True
            self._asked.notify_all()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        snapshot = _Snapshot(self._stores, self._group_id, self._epoch)
        try:
            while (asked := self._next()) is not None:
                self._tell(self._answer(snapshot, *asked))
        finally:
            snapshot.close()

    def _next(self) -> tuple[int, m.HashQuestion] | None:
        """The next question; None when this thread is to end, and then it is not the desk's any
        more."""
        deadline = time.monotonic() + IDLE_S
        with self._asked:
            while not self._questions and not self._released:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                self._asked.wait(left_s)
            if self._questions:
                return self._questions.popleft()
            self._thread, self._released = None, False
            return None

    def _answer(self, snapshot: _Snapshot, number: int, question: m.HashQuestion) -> m.Response:
        try:
            if self._closed:
                raise BusyError("the session ends")
            self._wait_durable(question.at_least)
            answer = snapshot.answer(question)
        except VrepError as error:
            log.warning("group %s: no hashes: %s", self._group_id.hex(), error)
            return m.Response(id=number, error=error_code(error), text=str(error)[:4096])
        except (OSError, ValueError, struct.error) as error:
            log.exception("group %s: no hashes", self._group_id.hex())
            return m.Response(id=number, error="storage", text=str(error)[:4096])
        return m.Response(id=number, result=m.plain_part(answer))

    def _wait_durable(self, at_least: int) -> None:
        deadline = time.monotonic() + DURABLE_WAIT_S
        while self._durable_seq() < at_least:
            if self._closed or time.monotonic() > deadline:
                raise AgainError(f"{at_least} is not durable yet")
            time.sleep(0.002)

    def _tell(self, response: m.Response) -> None:
        try:
            self._post(response)
        except (PeerError, StateError) as error:
            # The connection is gone; its own thread ends the session.
            log.debug("group %s: not answered: %s", self._group_id.hex(), error)


class _Snapshot:
    """A reader of the store and its map, renewed when a question needs a later position."""

    def __init__(self, stores: Path, group_id: bytes, epoch: int) -> None:
        self._stores, self._group_id, self._epoch = stores, group_id, epoch
        self._reader: StoreReader | None = None
        self._position = Position()
        self._extents: ExtentMap | None = None

    def answer(self, question: m.HashQuestion) -> m.HashAnswer:
        if self._extents is None or self._position.seq < question.at_least:
            self._renew()
        assert self._reader is not None
        assert self._extents is not None
        if self._position.seq < question.at_least:
            raise AgainError(f"{question.at_least} is not durable yet")
        return _look_up(self._reader, self._extents, self._position, question)

    def _renew(self) -> None:
        self._extents = None
        if self._reader is None:
            self._reader = StoreReader(self._stores, self._group_id)
        else:
            self._reader.refresh()
        self._position = self._reader.durable_of(self._epoch)
        self._extents = self._reader.extent_map(self._position)

    def close(self) -> None:
        self._extents = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None
