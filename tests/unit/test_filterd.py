"""The filter process: what is wrong with one group never reaches the guests of another."""

from __future__ import annotations

import fcntl
import grp
import json
import os
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vrep.app import filterd, hosted
from vrep.app.filterd import FilterHost
from vrep.control import ControlClient
from vrep.errors import GapError, VrepError
from vrep.groups import DiskDefinition, GroupDefinition, GroupDirectory, GroupOptions
from vrep.paths import SitePaths
from vrep.settings import Config
from vrep.site import Site

MIB = 1 << 20
F_OFD_SETLK = 37


class Rig:
    """A site's directory with groups, and its filter."""

    def __init__(self, root: Path) -> None:
        self.paths = SitePaths(root)
        self.groups = GroupDirectory(root)
        self.host = FilterHost(self.paths, Config())
        self._thread = threading.Thread(target=self.host.run)

    def add(self, name: str, **options: Any) -> Path:
        image = self.paths.root / f"{name}.raw"
        with image.open("wb") as file:
            file.truncate(MIB)
        self.groups.store(
            GroupDefinition(
                version=1,
                group_id=name.encode().ljust(16, b".").hex(),
                name=name,
                disks=(DiskDefinition("root", f"file:{image}", MIB, 0),),
                to_site="11" * 16,
                key="acme",
                tenant_key_id="",
                epoch=1,
                epoch_id="22" * 16,
                wrapped_keys=(),
                created=0.0,
                options=GroupOptions(ring_bytes=4 * MIB, descriptors=1024, slots=16, **options),
            )
        )
        return self.groups.path(name) / "group.json"

    def start(self) -> None:
        self.host.start()
        self._thread.start()

    def status(self) -> dict[str, Any]:
        client = ControlClient(self.paths.socket("filter"))
        client.call("reload")
        found: dict[str, Any] = client.call("status")
        return found

    def close(self) -> None:
        self.host.request_stop()
        if self._thread.is_alive():
            self._thread.join()
        self.host.close()
        shutil.rmtree(self.paths.shm(), ignore_errors=True)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="vrep-filterd-") as name:
        rig = Rig(Path(name))
        try:
            yield rig
        finally:
            rig.close()


def spoil(definition: Path, field: str, value: Any) -> None:
    raw = json.loads(definition.read_bytes())
    raw[field] = value
    definition.write_text(json.dumps(raw))


@pytest.mark.parametrize(("field", "value"), [("group_id", "zz"), ("epoch", -1), ("to_site", "")])
def test_a_group_that_cannot_be_read_stands_alone(rig: Rig, field: str, value: Any) -> None:
    rig.add("good")
    spoil(rig.add("bad"), field, value)
    rig.start()
    status = rig.status()
    assert status["good"]["opened_as"] == "new"
    assert status["bad"]["error"]
    spoil(rig.add("late"), field, value)
    assert rig.status()["late"]["error"]
    with pytest.raises(VrepError):
        ControlClient(rig.paths.socket("filter")).call("status", group="late")
    assert rig.status()["good"]["writes"] == 0


def connects(rig: Rig, name: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        try:
            client.connect(str(rig.paths.nbd_socket(name)))
        except OSError:
            return False
        return client.recv(8) == b"NBDMAGIC"


def test_a_guest_is_paused_and_served_again(rig: Rig) -> None:
    rig.add("web", on_fence="pause")
    rig.add("other")
    rig.start()
    control = ControlClient(rig.paths.socket("filter"))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(rig.paths.nbd_socket("web")))
        assert client.recv(8) == b"NBDMAGIC"
        for _ in range(2):  # it may be said again
            control.call("pause_guest", group="web", paused=True)
        client.settimeout(10)
        while client.recv(64):
            pass  # its connection ends
    assert not connects(rig, "web")
    assert rig.status()["web"]["guest_paused"]
    assert rig.status()["web"]["clients"] == 0
    assert rig.status()["web"]["consumers"] == 0  # the group is open, and can be copied
    assert connects(rig, "other")
    for _ in range(2):
        control.call("pause_guest", group="web", paused=False)
    assert connects(rig, "web")
    assert not rig.status()["web"]["guest_paused"]


def test_a_guest_that_was_paused_still_is_after_a_restart(rig: Rig) -> None:
    rig.add("web", on_fence="pause")
    rig.add("runs")
    for name in ("web", "runs"):
        rig.groups.update(name, fenced=True)
    rig.start()
    status = rig.status()
    assert (status["web"]["guest_paused"], status["runs"]["guest_paused"]) == (True, False)
    assert not connects(rig, "web")
    assert connects(rig, "runs")


def test_a_disk_and_an_address_in_use_are_named(rig: Rig) -> None:
    rig.add("held")
    image = rig.paths.root / "held.raw"
    with image.open("r+b") as opened, socket.create_server(("127.0.0.1", 0)) as listener:
        # As QEMU holds an image that it writes: shared locks on the bytes of its permissions.
        lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 100, 101, 0)
        fcntl.fcntl(opened, F_OFD_SETLK, lock)
        definition = rig.add("listens")
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        raw = json.loads(definition.read_bytes())
        raw["options"]["tcp"] = address
        definition.write_text(json.dumps(raw))
        rig.start()
        status = rig.status()
    assert f"file:{image}" in status["held"]["error"]
    assert address in status["listens"]["error"]


def test_a_group_that_cannot_be_served_can_be_unprotected(rig: Rig) -> None:
    rig.add("good")
    spoil(rig.add("bad"), "group_id", "zz")
    rig.start()
    assert rig.status()["bad"]["error"]
    Site(rig.paths.root).unprotect("bad")
    assert set(rig.status()) == {"good"}
    assert not rig.groups.path("bad").exists()


def test_what_was_spilled_elsewhere_ends_with_its_group(rig: Rig, tmp_path: Path) -> None:
    rig.add("good")
    rig.add("bad")
    site = Site(rig.paths.root)
    site.paths.config.write_text(f'[source]\nspill_dir = "{tmp_path / "elsewhere"}"\n')
    spills = [site.paths.spill(name, site.config.source.spill_dir) for name in ("good", "bad")]
    for spill in spills:
        spill.mkdir(parents=True)
        (spill / "spill-00000001").touch()
    Site(rig.paths.root).unprotect("bad")
    assert [spill.exists() for spill in spills] == [True, False]


def test_groups_are_served_while_their_directory_cannot_be_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.add("good")
    rig.start()
    looked = threading.Event()

    def fail(_self: GroupDirectory) -> Iterator[str]:
        looked.set()
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(GroupDirectory, "names", fail)
    assert looked.wait(10)
    monkeypatch.undo()
    rig.add("another")
    assert set(rig.status()) == {"good", "another"}
    assert rig._thread.is_alive()


def test_one_group_that_does_not_close_leaves_the_others_clean(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.add("a")
    rig.add("b")
    rig.start()
    assert set(rig.status()) == {"a", "b"}
    real = hosted.close

    def fail(one: Any) -> None:
        real(one)
        if one.definition.name == "a":
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(filterd, "close", fail)
    rig.close()
    monkeypatch.undo()
    again = Rig(rig.paths.root)
    try:
        again.start()
        assert again.status()["b"]["opened_as"] == "clean"
    finally:
        again.close()


def lets_in(path: Path, gid: int) -> bool:
    """Whether a user who is nobody but a member of a group can connect."""
    child = os.fork()
    if child == 0:
        # Only calls that a fork beside other threads may make.
        code = 1
        try:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(65534, 65534, 65534)
            with socket.socket(socket.AF_UNIX) as mine:
                mine.connect(str(path))
            code = 0
        except PermissionError:
            code = 2
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 2)
    return code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may act as another user")
def test_a_socket_lets_in_whom_its_mode_says(rig: Rig) -> None:
    other = grp.getgrnam("daemon")
    rig.add("closed")
    rig.add("open", socket_mode=0o660, socket_group=other.gr_name)
    rig.start()
    assert set(rig.status()) == {"closed", "open"}
    assert lets_in(rig.paths.nbd_socket("open"), other.gr_gid)
    assert not lets_in(rig.paths.nbd_socket("open"), 65534)
    assert not lets_in(rig.paths.nbd_socket("closed"), other.gr_gid)
    assert not lets_in(rig.paths.socket("filter"), other.gr_gid)
    # What lies beside the sockets opened no wider.
    for place in (rig.paths.root, rig.paths.run):
        assert place.stat().st_mode & 0o777 == 0o711
    assert rig.paths.groups.stat().st_mode & 0o077 == 0


class Recorded:
    """A group that remembers how it was asked to copy."""

    def __init__(self, group: Any, *, allowed: bool) -> None:
        self.group = group
        self.allowed = allowed
        self.calls: list[tuple[bool, int, bool]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.group, name)

    def status(self) -> dict[str, Any]:
        return {**self.group.status(), "resync_allowed": self.allowed}

    def resync(self, allowed: bool, *, bytes_per_s: int, everything: bool) -> None:
        self.calls.append((allowed, bytes_per_s, everything))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_resync_keeps_the_rate_and_what_is_paused(
    rig: Rig, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.add("web")
    definition = rig.groups.load("web")
    options = msgspec.structs.replace(definition.options, rate_bytes_per_s=12345)
    rig.groups.store(msgspec.structs.replace(definition, options=options))
    rig.start()
    site = Site(rig.paths.root)
    recorded = Recorded(rig.host._hosted["web"].group, allowed=allowed)
    with monkeypatch.context() as patch:
        patch.setattr(rig.host._hosted["web"], "group", recorded)
        site.resync("web")
        ControlClient(rig.paths.socket("filter")).call(
            "resync", group="web", allowed=not allowed, bytes_per_s=7, all=False
        )
    assert recorded.calls == [(allowed, 12345, True), (not allowed, 7, False)]


def test_a_resync_before_there_is_a_target_copies_nothing(rig: Rig) -> None:
    rig.add("web")
    rig.start()
    Site(rig.paths.root).resync("web")
    status = rig.status()["web"]
    assert not status["resync_allowed"]
    assert status["unshipped_bytes"] == MIB


def test_there_is_no_checkpoint_before_the_sync_has_ended(rig: Rig) -> None:
    rig.add("web")
    rig.start()
    with pytest.raises(GapError, match="no recovery point of 'web' until its sync has ended"):
        Site(rig.paths.root).checkpoint("web", "nightly")
