"""Threads that begin, or say that they do not.

A new thread that finds no memory dies before its first line, without a word, and
`threading.Thread.start` waits for it for ever. Threads that are begun while a process works, one
for a connection for instance, are started by `start`.
"""

from __future__ import annotations

import threading
from typing import Any, Final

__all__ = ["start"]

START_S: Final = 10.0


class _Begun(threading.Event):
    """What a new thread sets when it runs; its starter does not wait longer than it may."""

    def wait(self, timeout: float | None = None) -> bool:
        if super().wait(START_S if timeout is None else timeout):
            return True
        if timeout is None:
            raise RuntimeError(f"a thread did not begin within {START_S:g} s: out of memory")
        return False


def start(thread: threading.Thread) -> None:
    """Start a thread. RuntimeError when there can be none, or when it does not begin."""
    made: Any = thread
    began = getattr(made, "_started", None)
    if began is not None and not began.is_set():
        made._started = _Begun()
    thread.start()
