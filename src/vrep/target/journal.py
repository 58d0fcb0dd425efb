"""Group commit: what was received waits here, and one thread makes it durable.

The receiving thread only hands batches over; it never waits for a disk. While one commit is
being synced the next one gathers, so the load itself sets how much a commit holds: a lone
write is synced at once, under load commits follow each other at most `interval_s` apart.
Memory is bounded by whoever hands over (credits); bytes given are freed when they are durable.

A full disk keeps the batch and tries again with growing pauses. A failed write or sync is
final: nothing of that commit is ever acknowledged, and the journal takes no more.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from vrep.errors import StoreFullError, TimeLimitError, VrepError
from vrep.target.segment import Batch

__all__ = ["Journal"]

COMMIT_BYTES_MAX: Final = 16 << 20
"""soft limit of one commit, so that acknowledgements keep coming"""
COMMIT_BYTES_EAGER: Final = 4 << 20
"""so much does not wait for the interval"""
IDLE_S: Final = 1.0
RETRY_FIRST_S: Final = 0.1
RETRY_MAX_S: Final = 5.0

log = logging.getLogger("vrep.target")


class Journal:
    """Commits batches in order, on a thread of its own.

    `commit` makes a list of batches durable and returns; StoreFullError means that it may be
    tried again. `idle` is called once when nothing came for a second after a commit, or when the
    journal is closed before that second is over.
    """

    def __init__(
        self,
        name: str,
        commit: Callable[[Sequence[Batch]], None],
        idle: Callable[[], None],
        changed: Callable[[], None],
        *,
        interval_s: float,
    ) -> None:
        self.failure: VrepError | None = None
        self.full = False
        self.full_why = ""
        self.pending_bytes = 0
        self._name = name
        self._commit = commit
        self._idle = idle
        self._changed = changed
        self._interval_s = interval_s
        self._pending: deque[Batch] = deque()
        self._in_commit = 0
        self._changes = threading.Condition()
        self._urgent = 0
        self._closing = False
        self._last_end_s = -1e9
        self._marked = True
        self._thread = threading.Thread(target=self._run, name=f"commit:{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, batch: Batch) -> None:
        """Hand a batch over. Raises the failure that ended the journal."""
        with self._changes:
            self._raise_failure()
            self._pending.append(batch)
            self.pending_bytes += len(batch.buffer)
            # A waiting thread wakes for the first batch, and when there is much.
            if len(self._pending) == 1 or self.pending_bytes >= COMMIT_BYTES_EAGER:
                self._changes.notify_all()

    def flush(self, timeout_s: float) -> None:
        """Wait until everything handed over is durable. StoreFullError or TimeLimitError
        when it is not in time."""
        deadline = time.monotonic() + timeout_s
        with self._changes:
            self._urgent += 1
            self._changes.notify_all()
            try:
                while self._pending or self._in_commit:
                    self._raise_failure()
                    left = deadline - time.monotonic()
                    if left <= 0 or self._closing:
                        if self.full:
                            raise StoreFullError("records wait for room")
                        raise TimeLimitError(f"not durable within {timeout_s:g} s")
                    self._changes.wait(left)
                self._raise_failure()
            finally:
                self._urgent -= 1

    def close(self) -> None:
        """End the thread. What is not durable is dropped: nobody was told that it is."""
        with self._changes:
            self._closing = True
            self._changes.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise type(self.failure)(self.failure.detail)

    # ---- the thread --------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (batches := self._take()) is not None:
                if not self._persist(batches):
                    return
            if not self._marked:
                self._idle()  # a clean end, too, says that all before it is durable
        except VrepError as error:
            self._fail(error)
        except Exception as error:
            self._fail(VrepError(f"{type(error).__name__}: {error}"))
            raise

    def _fail(self, error: VrepError) -> None:
        with self._changes:
            self.failure = error
            self._pending.clear()
            self.pending_bytes = self._in_commit = 0
            self._changes.notify_all()
        self._changed()

    def _take(self) -> list[Batch] | None:
        """The batches of the next commit, when it is time for one; None at the end."""
        while True:
            with self._changes:
                while not self._closing:
                    wait_s = self._wait_s()
                    if wait_s is not None and wait_s <= 0:
                        break
                    self._changes.wait(wait_s)
                if self._closing:
                    return None
                if self._pending:
                    return self._take_pending()
                self._marked = True
            self._idle()

    def _wait_s(self) -> float | None:
        """Seconds until there is something to do; None: until somebody says so."""
        since_s = time.monotonic() - self._last_end_s
        if self._pending:
            if self._urgent or self.pending_bytes >= COMMIT_BYTES_EAGER:
                return 0.0
            return self._interval_s - since_s
        return None if self._marked else IDLE_S - since_s

    def _take_pending(self) -> list[Batch]:
        batches: list[Batch] = []
        size = 0
        while self._pending and (not batches or size < COMMIT_BYTES_MAX):
            batch = self._pending.popleft()
            batches.append(batch)
            size += len(batch.buffer)
        self._in_commit = size
        return batches

    def _persist(self, batches: list[Batch]) -> bool:
        """Commit, and while the disk is full try again. False when closed meanwhile."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                self._commit(batches)
            except StoreFullError as error:
                self._set_full(True, str(error))
                with self._changes:
                    if self._changes.wait_for(lambda: self._closing, pause_s):
                        return False
                pause_s = min(2 * pause_s, RETRY_MAX_S)
                continue
            self._set_full(False)
            with self._changes:
                self._last_end_s = time.monotonic()
                self._marked = False
                self.pending_bytes -= self._in_commit
                self._in_commit = 0
                self._changes.notify_all()
            return True

    def _set_full(self, full: bool, why: str = "") -> None:
        self.full_why = why
        if full != self.full:
            self.full = full
            if full:
                log.warning("group %s: nothing more is acknowledged: %s", self._name, why)
            else:
                log.warning("group %s: there is room again", self._name)
            self._changed()
