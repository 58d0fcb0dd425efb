"""Recovery commands of a group: one at a time, of all its lanes, and of the group as it stands."""

from __future__ import annotations

import errno
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import recovery_lab as lab

from vrep import Site, errors
from vrep.lanes import lane_id, lane_name
from vrep.paths import SitePaths
from vrep.recovery import failover as failovers
from vrep.recovery import joined_failover
from vrep.recovery.cuts import find_lanes
from vrep.recovery.failover import Failover
from vrep.recovery.lock import group_lock
from vrep.recovery.move import move
from vrep.recovery.view import view_directories
from vrep.target.manifest import DiskEntry, Position

BYTES = 1 << 16
WAIT_S = 60.0

HOLDER = """
import sys, time
from pathlib import Path
from vrep.paths import SitePaths
from vrep.recovery.lock import group_lock
with group_lock(SitePaths(Path(sys.argv[1])), bytes.fromhex(sys.argv[2]), "web"):
    print("held", flush=True)
    time.sleep(600)
"""


class World:
    """A site that holds the group `one`, and `two` with two lanes."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.site = Site(root)
        self.paths = self.site.paths
        group_id = lane_id(secrets.token_bytes(16), 0)
        names = {"one": lane_id(secrets.token_bytes(16), 0)} | {
            lane_name("two", lane): lane_id(group_id, lane) for lane in range(2)
        }
        self.labs = {}
        for name, one_id in names.items():
            made = lab.Lab(
                root, [DiskEntry(f"disk-{name[-1]}", BYTES, 0)], rng, name=name, group_id=one_id
            )
            made.sync()
            made.write(0, 0, b"\x01" * 512)
            made.close()
            self.labs[name] = made

    def again(self, name: str) -> Position:
        """The source writes once more."""
        one = self.labs[name]
        one.open()
        one.write(0, 0, b"\x02" * 512)
        at = one.commit()
        one.close()
        return Position(*at)

    def close(self) -> None:
        for view in view_directories(self.paths):
            if view.holder() is not None:
                failovers.rollback(self.paths, view.load().group_id)


@pytest.fixture
def world(tmp_path: Path, rng: random.Random) -> Iterator[World]:
    made = World(tmp_path / "site", rng)
    yield made
    made.close()


COMMANDS: dict[str, Callable[[Site, str], Any]] = {
    "failover start": lambda site, group: site.failover_start(group, force=True),
    "failover commit": lambda site, group: site.failover_commit(group),
    "failover rollback": lambda site, group: site.failover_rollback(group),
    "move": lambda site, group: site.move(group),
    "reverse": lambda site, group: site.reverse(group),
    "failback": lambda site, group: site.failback(group),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_command_is_refused_at_once(world: World, command: str) -> None:
    for name in ("one", "two@1"):
        group = name.partition("@")[0]
        one_id = world.labs[name].group_id
        with group_lock(world.paths, one_id, group):
            for text in {group, lane_id(one_id, 0).hex()}:
                with pytest.raises(errors.LockedError, match=f"{group}.*process {os.getpid()}"):
                    COMMANDS[command](world.site, text)
        assert view_directories(world.paths) == []
        there = group if command != "failover start" else "none"
        with pytest.raises(errors.VrepError) as other:  # nothing is there to be done
            COMMANDS[command](world.site, there)
        assert not isinstance(other.value, errors.LockedError)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_lane_is_not_taken_alone(world: World, command: str) -> None:
    for lane in range(2):
        name = lane_name("two", lane)
        texts = [name]
        if lane:  # the id of lane 0 is the group's
            texts.append(world.labs[name].group_id.hex())
        for text in texts:
            with pytest.raises(errors.InvalidError, match="go together"):
                COMMANDS[command](world.site, text)
        assert len(Failover(world.paths, name).epochs()) == 1
    assert view_directories(world.paths) == []


def test_two_failovers_at_once_make_one_view(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    choose, chosen, go_on = failovers.choose, threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        chosen.set()
        assert go_on.wait(WAIT_S)
        return choose(*arguments, **options)

    monkeypatch.setattr(failovers, "choose", slow)
    found: list[Any] = []
    first = threading.Thread(
        target=lambda: found.append(world.site.failover_start("one", force=True))
    )
    first.start()
    try:
        assert chosen.wait(WAIT_S)
        monkeypatch.setattr(failovers, "choose", choose)
        with pytest.raises(errors.LockedError):
            world.site.failover_start("one", force=True)
    finally:
        go_on.set()
        first.join(WAIT_S)
    (view,) = view_directories(world.paths)
    assert view.load().epoch == found[0].epoch == 2
    world.site.failover_rollback("one")


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    paths, one_id = SitePaths(tmp_path), b"g" * 14 + b"\0\1"
    command = [sys.executable, "-c", HOLDER, str(tmp_path), one_id.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            refused = pytest.raises(errors.LockedError, match=f"process {holder.pid}")
            with refused, group_lock(paths, lane_id(one_id, 0), "web"):
                pass
            with group_lock(paths, b"h" * 16, "mail"):
                pass
        finally:
            holder.send_signal(signal.SIGKILL)
    for _ in range(2):
        raised = pytest.raises(errors.StateError, match="on purpose")
        with raised, group_lock(paths, one_id, "web"):
            raise errors.StateError("on purpose")


def test_a_full_disk_keeps_nobody_from_recovering(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = SitePaths(tmp_path)

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with group_lock(paths, b"g" * 16, "web"):
            pass
        patch.setattr(os, "open", full)
        refused = pytest.raises(errors.StorageError, match="No space left")
        with refused, group_lock(paths, b"g" * 16, "web"):
            raise AssertionError("it was not taken")


# ---- a view of what is over --------------------------------------------------------------


def test_a_view_of_an_older_epoch_is_not_gone_on_with(world: World) -> None:
    """As two commands could leave it: the epoch of the other one was rolled back since."""
    stale = failovers.choose(Failover(world.paths, "one"), "latest")
    door = Failover(world.paths, "one").door
    raised = door.raise_epoch(writer=Failover(world.paths, "one").site_id)
    door.roll_back(raised.epoch)
    with pytest.raises(errors.StateError, match=r"does not fit.*epoch 3"):
        world.site.failover_start("one", force=True)
    with pytest.raises(errors.StateError, match="failover start"):
        world.site.failover_commit("one")
    # One that was served is not any more than one that was not: nobody is refused at its point.
    stale.change(state="serving", epoch=raised.epoch, epoch_id=raised.epoch_id.hex())
    with pytest.raises(errors.StateError, match=r"does not fit.*epoch 3"):
        world.site.failover_start("one", force=True)
    assert stale.holder() is None
    world.site.failover_rollback("one")
    assert view_directories(world.paths) == []
    view = world.site.failover_start("one", force=True)
    assert view.epoch == 4
    world.site.failover_rollback("one")


def test_a_view_is_not_of_an_epoch_at_another_point(world: World) -> None:
    failover = Failover(world.paths, "one")
    first = Position(1, 0, world.labs["one"].seq)
    world.again("one")
    view = failovers.choose(failover, f"pos:{first}")
    failover.door.raise_epoch(writer=failover.site_id)  # of another command, at another point
    with pytest.raises(errors.StateError, match="does not fit"):
        world.site.failover_start("one", f"pos:{first}", force=True)
    view.change(asked=failovers.MOVED)
    with pytest.raises(errors.StateError, match="does not fit"):
        move(world.paths, "one")
    assert view.load().state == "starting"
    world.site.failover_rollback("one")


def test_what_was_cut_off_at_the_record_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The epoch was raised, and its number did not reach the view."""
    with monkeypatch.context() as patch:
        patch.setattr(failovers, "retarget", fail)
        patch.setattr("vrep.recovery.view.ViewDirectory.change", fail)
        with pytest.raises(errors.StorageError, match="on purpose"):
            world.site.failover_start("one", force=True)
    (view,) = view_directories(world.paths)
    assert (view.load().state, view.load().epoch) == ("starting", 0)
    assert world.site.failover_start("one", force=True).epoch == 2
    world.site.failover_rollback("one")


def fail(*_arguments: object, **_options: object) -> None:
    raise errors.StorageError("on purpose")


# ---- lanes that were given up -------------------------------------------------------------


def test_a_lane_that_was_given_up_does_not_go_home(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def failback_all(_paths: Any, lanes: list[str], *_rest: Any, **_options: Any) -> list[Any]:
        asked.append(list(lanes))
        return []

    monkeypatch.setattr(joined_failover, "failback_all", failback_all)
    first, second = (world.labs[lane_name("two", lane)] for lane in range(2))

    def failback() -> None:
        held = find_lanes(world.paths, "two")
        assert held is not None
        joined_failover.failback(world.paths, held, world.site.group_options())

    failback()
    second.open()
    second.store.set_unprotected(True)
    second.close()
    failback()
    assert asked == [[first.group_id.hex(), second.group_id.hex()], [first.group_id.hex()]]
    first.open()
    first.store.set_unprotected(True)
    first.close()
    with pytest.raises(errors.StateError, match="no lane"):
        failback()
    assert len(asked) == 2
