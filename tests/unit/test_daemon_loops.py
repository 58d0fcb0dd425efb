"""The loops of a site's processes: what cannot be looked at for a moment ends nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from vrep.app.filterd import FilterHost
from vrep.errors import StorageError
from vrep.source import daemon as source
from vrep.target import daemon as target


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), StorageError("gone")])
@pytest.mark.parametrize("kind", [source.Source, target.Target, FilterHost])
def test_a_scan_that_fails_ends_nothing(
    kind: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (source, target):
        monkeypatch.setattr(module, "SCAN_EVERY_S", 0.001)
    monkeypatch.setattr("vrep.app.filterd.SCAN_EVERY_S", 0.001)
    one = object.__new__(kind)
    one._stopping = threading.Event()
    scans = []

    def scan() -> None:
        scans.append(len(scans))
        if len(scans) == 3:
            one._stopping.set()
        raise error

    one._scan = scan
    one.run()
    assert scans == [0, 1, 2]
