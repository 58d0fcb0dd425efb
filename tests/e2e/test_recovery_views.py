"""Views and failovers as their users meet them: real clients, kills, restarts, refusals."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recovery_lab as lab_module
from sites import wait_until

from vrep import errors
from vrep._core import layout
from vrep.control import ControlServer
from vrep.recovery import export as export_module
from vrep.recovery import failover, view
from vrep.recovery.export import export
from vrep.recovery.keeper import ViewKeeper
from vrep.recovery.points import list_points
from vrep.target.epochs import EpochDoor
from vrep.target.manifest import DiskEntry, EpochState, Position
from vrep.target.reader import StoreReader
from vrep.target.segment import entry_path

DISKS = [DiskEntry("root", 2 << 20, 0), DiskEntry("data", 1 << 20, 1)]


@pytest.fixture
def lab(tmp_path: Path, rng: random.Random) -> Iterator[Any]:
    lab = lab_module.Lab(tmp_path / "site", DISKS, rng)
    lab.sync()
    for _ in range(60):
        lab.random_write()
    lab.mark("noon")
    for _ in range(30):
        lab.random_write()
    lab.commit()
    yield lab
    for each in view.view_directories(lab.paths):
        view.discard(each)
    lab.close()


def position_of(point: str) -> Position:
    return Position(*(int(part) for part in point[4:].split("/")))


def wait_dead(paths: Any, view_id: str) -> None:
    directory = view.ViewDirectory(paths, view_id)
    deadline = time.monotonic() + 120
    while directory.holder() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill(paths: Any, info: view.ViewInfo) -> None:
    assert info.pid is not None
    os.kill(info.pid, signal.SIGKILL)
    wait_dead(paths, info.id)


def read_all(info: view.ViewInfo) -> list[bytes]:
    found = []
    for disk in info.disks:
        with lab_module.Nbd(info.socket, disk.name) as nbd:
            found.append(nbd.read(0, nbd.size))
    return found


# ---- tests ------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-utils")
@pytest.mark.parametrize("at", ["latest", "noon"])
def test_real_clients_see_what_export_writes(lab: Any, at: str, tmp_path: Path) -> None:
    info = view.start_test(lab.paths, "web", at)
    raw = export(lab.paths, "web", at, tmp_path / "raw", sha256=True)
    packed = export(lab.paths, "web", at, tmp_path / "qcow2", "qcow2")
    wanted = lab.at(position_of(info.point))
    for disk, one, other, content in zip(info.disks, raw.disks, packed.disks, wanted, strict=True):
        assert Path(one.path).read_bytes() == content
        for file, kind in ((one.path, "raw"), (other.path, "qcow2")):
            command = ["qemu-img", "compare", "-f", kind, "-F", "raw", file, disk.uri]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        copied = tmp_path / f"{disk.name}.copy"
        subprocess.run(["nbdcopy", disk.uri, str(copied)], check=True)
        assert copied.read_bytes() == content
    view.stop_test(lab.paths, "web")


def test_a_killed_view_comes_back_with_its_writes(lab: Any) -> None:
    info = view.start_test(lab.paths, "web")
    with lab_module.Nbd(info.socket, "root") as nbd:
        nbd.write(5000, b"kept" * 1000)
        nbd.flush()
    kill(lab.paths, info)
    assert view.list_views(lab.paths)[0].conditions == ["not-running"]
    # the source goes on meanwhile: the view stays where it was
    for _ in range(20):
        lab.random_write()
    lab.commit()
    assert view.restart_views(lab.paths) == []
    again = view.list_views(lab.paths)[0]
    assert again.running
    assert again.pid != info.pid
    assert (again.id, again.point, again.socket) == (info.id, info.point, info.socket)
    root, data = lab.at(position_of(info.point))
    root[5000:9000] = b"kept" * 1000
    assert read_all(again) == [root, data]
    assert view.restart_views(lab.paths) == []
    assert view.list_views(lab.paths)[0].pid == again.pid


def test_a_view_that_dies_is_kept_and_one_that_is_stopped_is_not(lab: Any) -> None:
    info = view.start_test(lab.paths, "web")
    keeper = ViewKeeper(lab.paths)
    kill(lab.paths, info)
    assert keeper.tend() == []
    again = view.list_views(lab.paths)[0]
    assert (again.running, again.id) == (True, info.id)
    assert again.pid != info.pid
    os.kill(again.pid, signal.SIGTERM)  # a person
    wait_dead(lab.paths, info.id)
    for _ in range(2):
        assert keeper.tend() == []
        assert not view.list_views(lab.paths)[0].running
    # So does a shutdown: the site that starts afterwards serves it, as soon as it can.
    key = lab.root / "keys" / "acme.key"
    kept = key.read_bytes()
    key.unlink()
    now = [0.0]
    keeper = ViewKeeper(lab.paths, lambda: now[0])
    assert keeper.tend() != []
    key.write_bytes(kept)
    now[0] = 3.0
    assert keeper.tend() == []
    assert view.list_views(lab.paths)[0].running


def test_a_view_that_cannot_be_served_is_tried_with_growing_pauses(lab: Any) -> None:
    info = view.start_test(lab.paths, "web")
    kill(lab.paths, info)
    key = lab.root / "keys" / "acme.key"
    kept = key.read_bytes()
    key.unlink()
    now = [0.0]
    keeper = ViewKeeper(lab.paths, lambda: now[0])
    tries = []
    for second in range(31):
        now[0] = float(second)
        if keeper.tend():
            tries.append(second)
    assert tries == [0, 2, 6, 14, 30]
    key.write_bytes(kept)
    now[0] = 62.0
    assert keeper.tend() == []
    assert view.list_views(lab.paths)[0].running


def test_several_tests_of_a_group_and_the_end_of_one(lab: Any) -> None:
    one = view.start_test(lab.paths, "web", "noon")
    two = view.start_test(lab.paths, lab.group_id.hex())
    assert {each.id for each in view.list_views(lab.paths)} == {one.id, two.id}
    view.stop_test(lab.paths, "web", one.id)
    assert [each.id for each in view.list_views(lab.paths)] == [two.id]
    assert read_all(two) == lab.at(position_of(two.point))
    view.stop_test(lab.paths, two.id)
    assert view.list_views(lab.paths) == []
    assert [path for path in lab.paths.run.iterdir() if "view" in path.name] == []
    with pytest.raises(errors.NotFoundError):
        view.stop_test(lab.paths, "web")


def test_a_test_leaves_replication_alone(lab: Any) -> None:
    info = view.start_test(lab.paths, "web")
    with lab_module.Nbd(info.socket, "root") as nbd:
        nbd.write(0, b"scribble" * 512)
    lab.random_write()
    newest = lab.commit()
    view.stop_test(lab.paths, "web")
    found = list_points(lab.paths, "web")
    assert found.verdict.whole
    assert found.newest is not None
    assert found.newest.point == f"pos:{newest}"
    assert read_all(view.start_test(lab.paths, "web")) == lab.at(newest)


def test_a_test_that_cannot_start_leaves_nothing(lab: Any) -> None:
    for group, at, kind in (
        ("mail", "latest", errors.NotFoundError),
        ("web", "midnight", errors.PointNotFoundError),
        ("web", "pos:1/0/1", errors.GapError),
    ):
        with pytest.raises(kind):
            view.start_test(lab.paths, group, at)
    (lab.root / "keys" / "acme.key").unlink()
    for at in ("latest", "noon"):
        with pytest.raises(errors.TenantKeyError, match=lab.tenant.key_id):
            view.start_test(lab.paths, "web", at)
    assert view.list_views(lab.paths) == []
    assert not lab.paths.views.exists() or list(lab.paths.views.iterdir()) == []
    assert list(lab.paths.log.iterdir()) == []


def test_no_key_is_in_the_files_of_a_view(lab: Any) -> None:
    info = view.start_test(lab.paths, "web")
    secrets = [lab.tenant.secret, lab.key.secret]
    forms = [form for each in secrets for form in (each, each.hex().encode())]
    root = lab.paths.views / info.id
    files = [path for path in root.iterdir() if path.is_file()]
    assert root / "view.json" in files
    for path in files:
        content = path.read_bytes()
        assert not [form for form in forms if form in content], path


# ---- export -------------------------------------------------------------------------------


def test_an_export_never_replaces_a_file(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "data.raw").write_bytes(b"mine")
    with pytest.raises(errors.ExistsError, match=r"data\.raw"):
        export(lab.paths, "web", "latest", tmp_path)
    assert (tmp_path / "data.raw").read_bytes() == b"mine"
    assert not (tmp_path / "root.raw").exists()


def test_an_export_to_a_full_disk_leaves_nothing(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real, left = os.pwrite, [3]

    def full(fd: int, data: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(export_module.os, "pwrite", full)
    with pytest.raises(errors.StorageError, match="no space left"):
        export(lab.paths, "web", "latest", out)
    assert list(out.iterdir()) == []


def test_qcow2_without_qemu_img_is_refused_at_once(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(errors.UnsupportedError, match="qemu-utils"):
        export(lab.paths, "web", "latest", tmp_path / "out", "qcow2")
    assert not (tmp_path / "out").exists()


def test_an_export_is_sparse_and_tells_how_far_it_is(lab: Any, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    result = export(
        lab.paths, "web", "pos:1/0/3", tmp_path, progress=lambda *step: told.append(step)
    )
    for disk in result.disks:
        blocks = Path(disk.path).stat().st_blocks * 512
        assert blocks <= disk.data_bytes + 65536
        assert (disk.name, disk.bytes, disk.bytes) in told


# ---- failover -------------------------------------------------------------------------------


def epochs(lab: Any) -> list[tuple[int, str]]:
    door = EpochDoor(lab.paths.store, lab.paths.socket("target"), lab.group_id)
    return [(e["epoch"], e["state"]) for e in door.state()["epochs"]]


def test_a_failover_fences_fills_and_is_kept(lab: Any) -> None:
    lab.close()
    info = failover.start(lab.paths, "web", "noon", force=True)
    assert (info.kind, info.state, info.epoch) == ("failover", "serving", 2)
    assert epochs(lab) == [(1, "accepted"), (2, "provisional")]
    with pytest.raises(errors.StateError, match="not a test"):
        view.stop_test(lab.paths, "web")
    with lab_module.Nbd(info.socket, "root") as nbd:
        nbd.write(0, b"after" * 100)
        nbd.flush()
    kept = failover.commit(lab.paths, "web")
    assert kept.state == "committed"
    assert epochs(lab) == [(1, "accepted"), (2, "accepted")]
    assert failover.commit(lab.paths, "web").pid == kept.pid
    with pytest.raises(errors.StateError, match="committed"):
        failover.rollback(lab.paths, "web")
    deadline = time.monotonic() + 120
    while not view.list_views(lab.paths)[0].fill.get("done"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    lab.open()
    with pytest.raises(errors.FencedError):
        lab.random_write()
    root, data = lab.at(position_of(info.point))
    root[:500] = b"after" * 100
    assert read_all(kept) == [root, data]
    # a committed failover survives a reboot too
    kill(lab.paths, kept)
    assert view.restart_views(lab.paths) == []
    assert read_all(view.list_views(lab.paths)[0]) == [root, data]
    newest = list_points(lab.paths, "web").newest
    assert newest is not None
    assert position_of(newest.point).seq == position_of(info.point).seq


def test_a_failover_that_is_rolled_back_gives_the_group_back(lab: Any) -> None:
    lab.close()
    info = failover.start(lab.paths, "web", "noon", force=True)
    with lab_module.Nbd(info.socket, "root") as nbd:
        nbd.write(0, b"gone" * 100)
    failover.rollback(lab.paths, "web")
    assert view.list_views(lab.paths) == []
    assert epochs(lab) == [(1, "accepted"), (2, "abandoned"), (3, "accepted")]
    with pytest.raises(errors.NotFoundError):
        failover.rollback(lab.paths, "web")
    lab.open()
    entry = lab.store.manifest.current_epoch
    assert (entry.writer, entry.parent.seq) == (lab.source_id, lab.seq)
    lab.new_epoch(entry)
    lab.random_write()
    newest = lab.commit()
    again = view.start_test(lab.paths, "web")
    assert position_of(again.point) == newest
    assert read_all(again) == lab.at(newest)


def of_a_closed_segment(lab: Any, disk: int) -> tuple[Path, int]:
    """Where a piece of data stands that shows at the end: file and byte."""
    for _ in range(400):
        with StoreReader(lab.paths.store, lab.group_id) as reader:
            closed = {int(entry["segment"]): entry for entry in reader.manifest.segments}
            found = reader.extent_map(reader.durable).lookup(disk, 0, DISKS[disk].bytes)
            found = found[found["kind"] == layout.KIND_WRITE][1:]  # the first proves the key
            for extent in found[found["piece"] == 0][::-1]:
                segment, at = int(extent["segment"]), int(extent["position"])
                if segment in closed:
                    header = reader.read(segment, at, layout.RECORD.itemsize)
                    words = 4 * int(np.frombuffer(header, layout.RECORD)[0]["pieces"])
                    path = entry_path(reader.directory, closed[segment])
                    return path, at + len(header) + words
        lab.random_write()
        lab.commit()
    raise AssertionError("no segment was closed")


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_what_cannot_be_read_keeps_nothing_else_from_being_filled(lab: Any) -> None:
    """It is passed over and tried again: all is there once it can be read."""
    place = of_a_closed_segment(lab, 0)
    wanted = lab.at(lab.commit())
    lab.close()
    flip(*place)
    info = failover.start(lab.paths, "web", force=True)

    def fill() -> dict[str, Any]:
        found: dict[str, Any] = view.list_views(lab.paths)[0].fill
        return found

    wait_until(
        "the other disk is filled", lambda: fill().get("filled_to", {}).get("data") == 1 << 20
    )
    assert not fill()["done"]
    assert "unreadable" in view.list_views(lab.paths)[0].conditions[0]
    flip(*place)
    wait_until("all is filled", lambda: fill().get("done"))
    assert read_all(info) == wanted


def test_a_disk_is_whole_when_it_is_stable(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on from its blocks being there, as `reverse` does, may lose the only process
    that knows that they could not be stored."""
    wanted = lab.at(lab.commit())
    lab.close()
    monkeypatch.setenv("VREP_FAULT", "view.sync:2:io+")  # of the second disk
    info = failover.start(lab.paths, "web", force=True)
    monkeypatch.delenv("VREP_FAULT")

    def now() -> view.ViewInfo:
        return view.list_views(lab.paths)[0]

    wait_until("it is told", lambda: [c for c in now().conditions if "storage" in c])
    assert now().fill["filled_to"] == {"root": 2 << 20, "data": 1 << 20}
    assert not now().fill["done"]
    kill(lab.paths, info)
    assert view.restart_views(lab.paths) == []
    wait_until("all is filled", lambda: now().fill.get("done"))
    assert read_all(now()) == wanted


class Cut(Exception):
    """The command is killed here."""


@pytest.mark.parametrize("step", ["create", "raise", "change", "serve", "serving"])
def test_a_failover_that_is_cut_off_goes_on(
    lab: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Killed after any step, the same command ends in one epoch and one view."""
    lab.close()

    def cut(owner: Any, name: str, count: int = 1) -> None:
        real, left = getattr(owner, name), [count]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                raise Cut
            return result

        monkeypatch.setattr(owner, name, wrapped)

    {
        "create": lambda: cut(view.ViewDirectory, "create"),
        "raise": lambda: cut(EpochDoor, "raise_epoch"),
        "change": lambda: cut(view.ViewDirectory, "change"),
        "serve": lambda: cut(view.ViewProcess, "serve"),
        "serving": lambda: cut(view.ViewDirectory, "change", 2),
    }[step]()
    with pytest.raises(Cut):
        failover.start(lab.paths, "web", "noon", force=True)
    monkeypatch.undo()
    info = failover.start(lab.paths, "web", "noon", force=True)
    assert info.running
    assert info.state == "serving"
    assert epochs(lab) == [(1, "accepted"), (2, "provisional")]
    assert len(view.list_views(lab.paths)) == 1
    lab.open()
    assert read_all(info) == lab.at(position_of(info.point))
    lab.close()
    with pytest.raises(errors.StateError, match="under way"):
        failover.start(lab.paths, "web", "pos:1/0/5", force=True)
    failover.rollback(lab.paths, "web")
    assert epochs(lab)[1:] == [(2, "abandoned"), (3, "accepted")]


def test_a_commit_that_was_cut_off_is_no_failover_to_give_back(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its epoch was accepted: nothing gives that back, and without its view nobody could go on."""
    lab.close()
    info = failover.start(lab.paths, "web", force=True)
    change = view.ViewDirectory.change

    def cut(directory: view.ViewDirectory, **changes: Any) -> Any:
        if changes.get("state") == "committed":
            raise Cut
        return change(directory, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(view.ViewDirectory, "change", cut)
        with pytest.raises(Cut):
            failover.commit(lab.paths, "web")
    assert epochs(lab) == [(1, "accepted"), (2, "accepted")]
    assert view.list_views(lab.paths)[0].state == "serving"
    with pytest.raises(errors.StateError, match="was committed"):
        failover.rollback(lab.paths, "web")
    assert view.list_views(lab.paths)[0].running
    assert failover.commit(lab.paths, "web").id == info.id
    assert view.list_views(lab.paths)[0].state == "committed"


@pytest.mark.parametrize("step", ["end", "roll_back"])
def test_a_rollback_that_is_cut_off_goes_on(
    lab: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    lab.close()
    failover.start(lab.paths, "web", force=True)
    owner, name = {
        "end": (failover.Failover, "provisional"),
        "roll_back": (EpochDoor, "roll_back"),
    }[step]
    real = getattr(owner, name)

    def wrapped(*args: Any) -> None:
        real(*args)
        raise Cut

    monkeypatch.setattr(owner, name, wrapped)
    with pytest.raises(Cut):
        failover.rollback(lab.paths, "web")
    monkeypatch.undo()
    with pytest.raises(errors.StateError, match="rolled back"):
        failover.start(lab.paths, "web")
    failover.rollback(lab.paths, "web")
    assert epochs(lab) == [(1, "accepted"), (2, "abandoned"), (3, "accepted")]
    assert view.list_views(lab.paths) == []


def test_a_view_that_starts_during_a_rollback_serves_nothing(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer would go on beside the old one, which is heard again."""
    lab.close()
    info = failover.start(lab.paths, "web", force=True)
    kill(lab.paths, info)
    roll_back, tried = EpochDoor.roll_back, []

    def while_it_starts(door: EpochDoor, epoch: int) -> Any:
        with pytest.raises(errors.LockedError):
            view.restart(view.ViewDirectory(lab.paths, info.id))
        tried.append(epoch)
        return roll_back(door, epoch)

    monkeypatch.setattr(EpochDoor, "roll_back", while_it_starts)
    failover.rollback(lab.paths, "web")
    assert tried == [info.epoch]
    assert view.list_views(lab.paths) == []


def test_a_failover_that_is_served_meanwhile_is_described(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command was cut off; given again, it meets `vrep run`, which was faster."""
    lab.close()
    info = failover.start(lab.paths, "web", force=True)
    holder, seen = view.ViewDirectory.holder, []

    def later(directory: view.ViewDirectory) -> int | None:
        seen.append(directory.id)
        return None if len(seen) == 1 else holder(directory)

    monkeypatch.setattr(view.ViewDirectory, "holder", later)
    again = failover.start(lab.paths, "web")
    assert (again.id, again.pid, again.running) == (info.id, info.pid, True)


class Heard:
    """What the target says of the source, one answer after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any]) -> None:
        self.left = list(answers)
        real = EpochDoor.state
        monkeypatch.setattr(
            EpochDoor, "state", lambda door: {**real(door), "source": {**HEARD, **self.next()}}
        )

    def next(self) -> dict[str, Any]:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


HEARD: dict[str, Any] = {
    "connected": True,
    "site": "a",
    "silent_s": 0.3,
    "gone_in_s": 19.7,
    "guest_clients": 1,
    "seen_ns": 1,
    "state": "replicating",
}
AWAY = {"connected": False}


@pytest.mark.parametrize(
    ("heard", "words"),
    [
        ({}, "serves 1 client.*vrep move.*--force"),
        ({"guest_clients": 0}, "does not say whether"),  # no report after the question
        ({"guest_clients": None}, "does not say whether"),
        (AWAY, "1 client.*20 s more.*--force"),
        ({**AWAY, "guest_clients": 0}, "20 s more"),  # a VM may have started since
        ({**AWAY, "guest_clients": None, "state": "paused"}, "paused.*20 s more"),
        ({**AWAY, "site": "", "silent_s": None}, "just started.*20 s more"),
        ({**AWAY, "gone_in_s": None}, "does not run here"),
    ],
)
def test_a_failover_is_refused_while_the_source_lives(
    lab: Any, monkeypatch: pytest.MonkeyPatch, heard: dict[str, Any], words: str
) -> None:
    """Also when nobody can know."""
    lab.close()
    Heard(monkeypatch, heard)
    monkeypatch.setattr(failover, "REPORT_WAIT_S", 0.2)  # it says nothing else later
    monkeypatch.setattr(failover, "IDLE_REPORT_WAIT_S", 0.2)
    with pytest.raises(errors.SourceAliveError, match=words):
        failover.start(lab.paths, "web")
    assert epochs(lab) == [(1, "accepted")]
    assert view.list_views(lab.paths) == []
    info = failover.start(lab.paths, "web", force=True)
    assert info.epoch == 2


@pytest.mark.parametrize(
    "answers",
    [
        # its VM is shut down, and it says so after the question
        [{"guest_clients": 0}, {"guest_clients": 0}, {"guest_clients": 0, "seen_ns": 2}],
        # and so when it is paused
        [{**AWAY, "guest_clients": 0}] * 2 + [{**AWAY, "guest_clients": 0, "seen_ns": 2}],
        # it was silent for long, whatever it said last
        [{**AWAY, "gone_in_s": 0}],
    ],
)
def test_a_failover_needs_no_force_when_nothing_runs(
    lab: Any, monkeypatch: pytest.MonkeyPatch, answers: list[dict[str, Any]]
) -> None:
    lab.close()
    Heard(monkeypatch, *answers)
    assert failover.start(lab.paths, "web").epoch == 2


def test_latest_is_decided_when_the_old_writer_is_shut_out(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What became durable between the choice of the point and the new epoch is not lost."""
    lab.close()
    real = EpochDoor.raise_epoch
    late: list[Position] = []

    def raise_late(self: EpochDoor, **kwargs: Any) -> Any:
        if not late:
            lab.open()
            lab.start_stream()
            late.append(lab.random_write())
            lab.close()
        return real(self, **kwargs)

    monkeypatch.setattr(EpochDoor, "raise_epoch", raise_late)
    info = failover.start(lab.paths, "web", force=True)
    assert info.point == f"pos:{late[0]}"
    lab.open()
    assert read_all(info) == lab.at(late[0])


def test_latest_falls_back_when_a_gap_begins_in_that_moment(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.close()
    before = lab.seq
    real = EpochDoor.raise_epoch
    seen: list[Any] = []

    def raise_late(self: EpochDoor, **kwargs: Any) -> Any:
        if not seen:
            lab.open()
            lab.start_stream()
            lab.gap_begin()
            lab.close()
        seen.append(real(self, **kwargs))
        return seen[-1]

    monkeypatch.setattr(EpochDoor, "raise_epoch", raise_late)
    info = failover.start(lab.paths, "web", force=True)
    assert info.point == f"pos:1/0/{before}"
    assert epochs(lab)[-1] == (info.epoch, EpochState.PROVISIONAL.name.lower())


def test_a_failover_needs_its_key_before_it_fences_anybody(lab: Any) -> None:
    lab.close()
    (lab.root / "keys" / "acme.key").unlink()
    with pytest.raises(errors.TenantKeyError, match=lab.tenant.key_id):
        failover.start(lab.paths, "web", force=True)
    assert epochs(lab) == [(1, "accepted")]
    assert view.list_views(lab.paths) == []


def test_a_view_whose_process_hangs_is_killed(lab: Any) -> None:
    """A stop that is not answered ends in a kill, not in a wait without end."""
    info = view.start_test(lab.paths, "web")
    directory = view.ViewDirectory(lab.paths, info.id)
    assert info.pid is not None
    os.kill(info.pid, signal.SIGSTOP)
    with view.ended(directory, timeout_s=0.5):
        assert directory.holder() == 0
    assert directory.holder() is None


def test_a_foreign_socket_is_not_taken_for_a_view(lab: Any) -> None:
    """Whether a view runs is its lock's to say, not its socket's."""
    info = view.start_test(lab.paths, "web")
    kill(lab.paths, info)
    directory = view.ViewDirectory(lab.paths, info.id)
    directory.control.unlink()
    with ControlServer(directory.control, {"status": lambda _params: {"conditions": []}}):
        assert not view.list_views(lab.paths)[0].running
