"""What others on the host must not reach, and must not lead us to."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from pathlib import Path

import pytest

from vrep.control import ControlClient, ControlServer
from vrep.errors import AccessError
from vrep.paths import SitePaths


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o660])
@pytest.mark.parametrize("mask", [0o022, 0o000, 0o077])
def test_a_control_socket_has_its_mode_whatever_the_umask(mode: int, mask: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.sock"
        before = os.umask(mask)
        try:
            with ControlServer(path, {}, mode=mode):
                assert mode_of(path) == mode
                assert ControlClient(path).alive()
        finally:
            os.umask(before)


def test_control_servers_leave_the_umask_of_other_threads_alone() -> None:
    with tempfile.TemporaryDirectory() as name:
        stop = threading.Event()
        modes: set[int] = set()

        def make() -> None:
            number = 0
            while not (stop.is_set() and modes):
                each = Path(name) / f"d{number}"
                each.mkdir(mode=0o700)
                modes.add(mode_of(each))
                number += 1

        thread = threading.Thread(target=make)
        thread.start()
        for number in range(200):
            ControlServer(Path(name) / f"{number}.sock", {}).close()
        stop.set()
        thread.join()
        assert modes == {0o700}


def test_a_link_in_place_of_our_shared_memory_is_refused(tmp_path: Path) -> None:
    paths = SitePaths(tmp_path / "site")
    base, elsewhere = tmp_path / "shm", tmp_path / "elsewhere"
    base.mkdir()
    elsewhere.mkdir(mode=0o700)
    paths.shm(str(base)).symlink_to(elsewhere)
    with pytest.raises(AccessError):
        paths.make_shm("web", str(base))
    assert not list(elsewhere.iterdir())


def test_directories_of_groups_are_private(tmp_path: Path) -> None:
    paths = SitePaths(tmp_path / "site")
    (tmp_path / "shm").mkdir()
    made = paths.make_shm("web", str(tmp_path / "shm"))
    assert {mode_of(made), mode_of(made.parent)} == {0o700}
