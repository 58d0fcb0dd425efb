"""A thread begins, or its starter hears that it does not."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from vrep import threads


def test_a_thread_that_dies_at_birth_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that finds no memory: the interpreter drops it before its first line."""
    began: list[Any] = []

    def stillborn(*arguments: Any, **_options: Any) -> int:
        began.append(arguments)
        return 1

    for name in ("_start_new_thread", "_start_joinable_thread"):  # by Python's release
        monkeypatch.setattr(threading, name, stillborn, raising=False)
    monkeypatch.setattr(threads, "START_S", 0.05)
    with pytest.raises(RuntimeError, match="did not begin"):
        threads.start(threading.Thread(target=lambda: None))
    assert began


def test_others_run_and_can_be_waited_for() -> None:
    ran: list[str] = []
    thread = threading.Thread(target=ran.append, args=("it",))
    threads.start(thread)
    thread.join()
    assert ran == ["it"]
    assert not thread.is_alive()
    with pytest.raises(RuntimeError):
        threads.start(thread)
