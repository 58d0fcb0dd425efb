"""A source's hold on the filter: what it waits for before a target hears of a gap."""

from __future__ import annotations

import threading
from unittest import mock

import pytest

from vrep.errors import StorageError
from vrep.source import attach
from vrep.source.attach import RingHold


def hold_of(*answers: bool) -> tuple[RingHold, mock.Mock]:
    """A hold whose filter says in turn whether marks are not stored."""
    control = mock.Mock()
    control.call.side_effect = [{"marks_unstored": each} for each in answers]
    hold = object.__new__(RingHold)
    hold._control, hold.group = control, "web"
    return hold, control


def test_marks_are_waited_for() -> None:
    hold, control = hold_of(True, True, False)
    hold.await_marks(threading.Event())
    assert control.call.call_count == 3


def test_marks_that_are_not_stored_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "STORED_WAIT_S", 0.0)
    hold, _ = hold_of(*[True] * 1000)
    with pytest.raises(StorageError, match="not stored"):
        hold.await_marks(threading.Event())


def test_who_stops_waits_for_no_marks() -> None:
    hold, control = hold_of(True)
    stopping = threading.Event()
    stopping.set()
    with pytest.raises(StorageError):
        hold.await_marks(stopping)
    assert control.call.call_count == 1
