"""The end of a view against a process that begins to serve it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from vrep import errors
from vrep.control import ControlClient, ControlServer
from vrep.paths import SitePaths
from vrep.recovery import view
from vrep.recovery.process import View
from vrep.recovery.view import RecordedDisk, ViewDirectory, ViewRecord

WAIT_S = 20.0


@pytest.fixture
def directory(tmp_path: Path) -> ViewDirectory:
    paths = SitePaths(tmp_path / "site")
    paths.root.mkdir()
    paths.make_run()
    directory = ViewDirectory(paths, "v1")
    directory.create(
        ViewRecord(
            version=1,
            id="v1",
            kind="failover",
            group_id="33" * 16,
            group="mail",
            asked="latest",
            point=(1, 0, 1),
            wall_ns=0,
            ancestry=[],
            disks=[RecordedDisk("root", 4096, 0)],
            created_ns=0,
            state="serving",
        )
    )
    return directory


def test_a_process_that_waits_for_the_lock_finds_the_view_gone(
    directory: ViewDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, found = threading.Event(), []
    locked = view._locked

    def tried(fd: int) -> bool:
        answer = locked(fd)
        if not answer:
            waits.set()
        return answer

    def begin() -> None:
        with pytest.raises(errors.NotFoundError) as error:
            View(directory.paths, directory.id)
        found.append(error.value)

    monkeypatch.setattr(view, "LOCK_S", WAIT_S)
    monkeypatch.setattr(view, "_locked", tried)
    process = threading.Thread(target=begin)
    with view.ended(directory):
        process.start()
        assert waits.wait(WAIT_S)
        directory.remove()
    process.join(WAIT_S)
    assert "no view v1" in str(found)
    assert not directory.root.exists()


def test_what_is_rolled_back_is_not_served(directory: ViewDirectory) -> None:
    directory.change(state="rolling-back")
    with pytest.raises(errors.StateError, match="rolled back"):
        View(directory.paths, directory.id)
    assert directory.holder() is None


def test_a_process_that_does_not_listen_yet_is_told_again(
    directory: ViewDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not waited for until it would be killed."""
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("it was killed"))
    lock, asked = directory.take_lock(), threading.Event()
    stopped = threading.Event()

    def stop(_params: Any) -> dict[str, Any]:
        stopped.set()
        return {}

    call = ControlClient.call

    def ask(client: ControlClient, method: str, **params: Any) -> Any:
        try:
            return call(client, method, **params)
        finally:
            asked.set()

    monkeypatch.setattr(ControlClient, "call", ask)

    def process() -> None:
        assert asked.wait(WAIT_S)
        with ControlServer(directory.control, {"stop": stop}):
            assert stopped.wait(WAIT_S)
        os.close(lock)

    thread = threading.Thread(target=process)
    thread.start()
    with view.ended(directory, timeout_s=WAIT_S / 2):
        assert stopped.is_set()
    thread.join()
