"""The whole recovery life: failover, reverse, failback, move, round and round."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from life import Life, Place
from sites import GROUP, Client, compare, wait_until

from vrep import errors
from vrep.recovery.view import ViewDirectory, ended, restart_views
from vrep.target.epochs import EpochDoor
from vrep.target.manifest import EpochEntry, Position

pytestmark = pytest.mark.e2e


def test_a_recovered_vm_is_protected_back_to_its_old_site(
    make_life: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    life = make_life().up()
    west, east = life.west, life.east
    with life.client(west) as client:
        life.write(client)
        life.checkpoint(west, east)
    life.settle(west)
    west.kill()
    east.site.failover_start(GROUP, force=True)
    view = east.site.failover_commit(GROUP)
    with life.client(east, view) as client:
        life.check(client)
        life.write(client)
    with pytest.raises(errors.UnreachableError):
        east.site.reverse(GROUP)  # west is still down, and nothing has changed
    with life.client(east, view) as client:
        life.check(client)
    west.start()
    with monkeypatch.context() as patch:  # killed when the group is defined, and all of the host
        patch.setattr("vrep.recovery.reverse._switch", _fail)
        with pytest.raises(errors.RecoveryError, match="on purpose"):
            east.site.reverse(GROUP)
    with life.client(east, view) as client:
        life.check(client)
        life.write(client)
    east.kill()
    east.start()
    state = east.site.groups.path(GROUP) / "state"
    with ended(ViewDirectory(east.site.paths, view.id)):  # either has the disks; now the filter
        wait_until("the filter has them", state.exists)
    restart_views(east.site.paths)
    # What it wrote would be marked nowhere. One that 'vrep run' begins just now ends by itself.
    wait_until("no view serves them", lambda: not east.site.tests()[0].running)
    made = east.site.reverse(GROUP)
    assert (made.epoch, made.parent.epoch) == (2, 1)
    again = east.site.reverse(GROUP)  # the source has noted since which keys the target has
    assert msgspec.structs.replace(again, keys_at_target=made.keys_at_target) == made
    with life.client(east, view) as client:  # at the socket that its VM knows
        life.check(client)
        life.write(client)
    life.settle(east)
    with life.client(east) as client:
        life.write(client)
        life.checkpoint(east, west)
    life.settle(east)
    life.check_view(west, "latest", bytes(life.oracle))
    life.check_labels()
    for place in (west, east):
        points = place.site.points(GROUP)
        assert points.verdict.whole, points.verdict


def test_a_move_loses_nothing(make_life: Callable[..., Life]) -> None:
    life = make_life().up()
    west, east = life.west, life.east
    client = life.client(west)
    life.write(client)
    life.checkpoint(west, east)
    life.write(client)
    with pytest.raises(errors.BusyError, match="1 client"):
        east.site.move(GROUP)
    with pytest.raises(errors.SourceAliveError, match="vrep move"):
        east.site.failover_start(GROUP)
    life.write(client)  # nothing has happened
    view = east.site.move(GROUP, pause=True)
    assert (view.state, view.epoch) == ("committed", 2)
    with pytest.raises((OSError, errors.VrepError)):
        client.read(0, 512)
    client.close()
    old = wait_until("west knows", lambda: "fenced" in west.group()["conditions"] and west.group())
    assert "guest-paused" in old["conditions"]
    assert old["clients"] == 0
    assert east.site.move(GROUP).id == view.id  # asked again
    with life.client(east, view) as moved:
        life.check(moved)
        life.write(moved)
    east.site.reverse(GROUP)
    life.settle(east)
    life.check_view(west, "latest", bytes(life.oracle))
    life.check_labels()


def test_a_move_that_fails_leaves_the_source_as_it_was(
    make_life: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    life = make_life().up()
    west, east = life.west, life.east

    epochs = [1]

    def goes_on() -> None:
        """The VM is served again, by the same writer, and is replicated."""
        with life.client(west) as client:
            life.check(client)
            life.write(client)
        life.settle(west)
        assert west.group()["epoch"] == epochs[-1]
        assert east.site.tests() == []

    with monkeypatch.context() as patch:
        patch.setattr("vrep.recovery.failover.choose", _fail)
        with pytest.raises(errors.RecoveryError, match="on purpose"):
            east.site.move(GROUP, pause=True)
        goes_on()
    with monkeypatch.context() as patch:  # the command dies: nobody lets the guest go on
        patch.setattr("vrep.recovery.move._wait_durable", _fail)
        patch.setattr("vrep.target.epochs.EpochDoor.go_on", lambda _door: None)
        with pytest.raises(errors.RecoveryError, match="on purpose"):
            east.site.move(GROUP, pause=True)
        wait_until("the guest is halted", lambda: "moving" in west.group()["conditions"])
        east.kill()
        wait_until("nobody can be asked", lambda: not west.group()["targets"][0]["connected"])
        assert "guest-paused" in west.group()["conditions"]
        with pytest.raises(errors.StateError, match="is being moved"):
            west.site.resume(GROUP)
        east.start()
        goes_on()
    with monkeypatch.context() as patch:
        patch.setattr("vrep.recovery.move._wait_durable", _fail)
        patch.setattr("vrep.target.epochs.EpochDoor.go_on", lambda _door: None)
        with pytest.raises(errors.RecoveryError, match="on purpose"):
            east.site.move(GROUP, pause=True)
        with pytest.raises(errors.StateError, match="can be asked"):
            west.site.resume(GROUP, force=True)
        east.kill()
        wait_until("nobody can be asked", lambda: not west.group()["targets"][0]["connected"])
        west.site.resume(GROUP, force=True)
        with life.client(west) as client:
            life.write(client)
        east.start()
        goes_on()
    raise_moved = EpochDoor.raise_moved

    def overtaken(door: EpochDoor, writer: bytes, last: Position) -> EpochEntry:
        """The epoch is another one, whoever raised it: not at the last change."""
        door.raise_epoch(writer=writer, parent=last._replace(seq=last.seq - 1))
        return raise_moved(door, writer, last)

    with monkeypatch.context() as patch:
        patch.setattr(EpochDoor, "raise_moved", overtaken)
        with pytest.raises(errors.StateError, match="not halted"):
            east.site.move(GROUP, pause=True)
        with pytest.raises(errors.StateError, match=r"writes .* already"):
            east.site.move(GROUP, pause=True)
        assert east.site.tests() == []  # nothing of it is served, at any point
        east.site.failover_rollback(GROUP)
        epochs.append(3)
        goes_on()


def _fail(*_arguments: object, **_options: object) -> None:
    raise errors.RecoveryError("on purpose")


def away_and_home(life: Life, number: int, *, every_label: bool = False) -> None:
    """One round: to the other site by a failover or a move, protected back, and home again."""
    west, east = life.west, life.east
    with life.client(west) as client:
        life.check(client)
        life.write(client)
        life.checkpoint(west, east)
    if number % 2:
        view = east.site.move(GROUP, pause=True)
    else:
        life.settle(west)
        west.kill()
        east.site.failover_start(GROUP, force=True)
        view = east.site.failover_commit(GROUP)
        west.start()
    with life.client(east, view) as client:
        life.check(client)
        life.write(client)
    east.site.reverse(GROUP)
    with life.client(east) as client:
        life.check(client)
        life.write(client)
    life.settle(east)
    with life.client(east) as client:
        life.write(client)
        life.checkpoint(east, west)
        life.write(client, 4)
    moved: list[Any] = []
    west.site.failback(GROUP, pause=True, moved=moved.append)
    assert len(moved) == 1
    with life.client(west) as client:
        life.check(client)
    life.settle(west)
    life.check_view(east, "latest", bytes(life.oracle))
    if every_label:
        life.check_labels()


def well(target: Place) -> bool:
    found = target.group()
    return (found["state"], found["conditions"]) == ("replicating", [])


def require_home(life: Life, rounds: int) -> None:
    """After some rounds: everything is where it began, whole, and nothing was ever lost."""
    life.check_labels()
    wait_until("nothing is wrong at home", lambda: not life.west.group()["conditions"])
    west, east = life.west.group(), life.east.group()
    assert (west["role"], west["epoch"]) == ("source", 2 * rounds + 1)
    assert west["disks"][0]["uri"] == f"file:{life.image}"
    assert east["role"] == "target"
    wait_until("east hears of it", lambda: well(life.east))  # who is late is silent for a moment
    assert west["history"]["newest_point"] is not None
    for place in (life.west, life.east):
        assert place.site.points(GROUP).verdict.whole
    assert life.west.site.failback(GROUP).epoch == 2 * rounds + 1  # it was done
    life.west.kill()  # cleanly closed or not, the file has the bytes
    compare("the old disk", life.image.read_bytes(), bytes(life.oracle))


@pytest.mark.timeout(1800)  # 40 starts of processes, beside whatever else runs
def test_ten_rounds(make_life: Callable[..., Life]) -> None:
    life = make_life(disk_bytes=2 << 20).up()
    for number in range(10):
        away_and_home(life, number)
    require_home(life, 10)


def rewrite(life: Life, client: Client, at: int, data: bytes) -> None:
    client.write(at, data)
    life.oracle[at : at + len(data)] = data
    client.flush()


def sent(place: Place) -> int:
    """Bytes of records, without what comparing costs."""
    return int(place.group()["targets"][0]["bytes_sent"])


def test_the_way_back_sends_what_differs(make_life: Callable[..., Life]) -> None:
    """The first one too, to a site that was never a target: from a failover that left writes of
    the old VM behind."""
    life = make_life().up()
    west, east = life.west, life.east
    with life.client(west) as client:
        for at in range(0, 6 << 20, 1 << 20):
            rewrite(life, client, at, life.rng.randbytes(1 << 20))
    life.settle(west)
    stale = life.client(west)
    east.site.failover_start(GROUP, force=True)
    view = east.site.failover_commit(GROUP)
    for number in range(16):  # not taken, each in a block of 64 KiB of its own
        stale.write(number << 16, life.rng.randbytes(4096))
    stale.flush()
    stale.close()
    with life.client(east, view) as client:
        for number in range(32):
            rewrite(life, client, (2 << 20) + (number << 16), life.rng.randbytes(4096))
    wait_until("nobody uses the old disks", lambda: not west.group()["clients"])
    east.site.reverse(GROUP)
    newest = west.site.points(GROUP).newest
    assert newest is None or newest.point.startswith("pos:2/")  # never of what it sealed itself
    life.settle(east)
    assert sent(east) <= 1.05 * 48 * 4096 + 4096, sent(east)
    life.check_view(west, "latest", bytes(life.oracle))
    wait_until("west says so", lambda: west.group()["state"] == "replicating")
    with life.client(east) as client:
        rewrite(life, client, 4 << 20, life.rng.randbytes(4096))
    life.settle(east)
    west.site.failback(GROUP, pause=True, discard_untaken=True)
    life.settle(west)
    assert sent(west) <= 8192, sent(west)  # east had all but that
    with life.client(west) as client:
        life.check(client)
        rewrite(life, client, 5 << 20, life.rng.randbytes(4096))
    life.settle(west)
    view = east.site.move(GROUP, pause=True)
    with life.client(east, view) as client:
        rewrite(life, client, 0, life.rng.randbytes(4096))
    east.site.reverse(GROUP)
    life.settle(east)
    assert sent(east) <= 8192, sent(east)  # what west wrote itself is not sent to it
    life.check_view(west, "latest", bytes(life.oracle))
    with life.client(east) as client:
        life.check(client)
    for place in (west, east):
        assert place.site.points(GROUP).verdict.whole


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_rounds_with_every_point(make_life: Callable[..., Life]) -> None:
    life = make_life(disk_bytes=16 << 20).up()
    for number in range(10):
        away_and_home(life, number, every_label=True)
    require_home(life, 10)


def test_a_vm_runs_from_a_disk_that_is_being_filled(make_life: Callable[..., Life]) -> None:
    life = make_life().up()
    west, east = life.west, life.east
    with life.client(west) as client:
        life.write(client)
    life.settle(west)
    west.kill()
    device = life.root / "device.raw"
    device.write_bytes(b"\xaa" * len(life.oracle))
    wrong = life.root / "wrong.raw"
    wrong.write_bytes(b"\xaa" * 512)
    for onto, kind in (
        ({"root": f"file:{wrong}"}, errors.InvalidError),
        ({"data": f"file:{device}"}, errors.InvalidError),
        ({"root": f"block:{device}"}, errors.InvalidError),
        ({"root": "block:/nowhere"}, errors.NotFoundError),
        ({"root": f"qcow2:{device}"}, errors.UnsupportedError),
    ):
        with pytest.raises(kind):
            east.site.failover_start(GROUP, force=True, onto=onto)
    assert device.read_bytes() == b"\xaa" * len(life.oracle)
    config = east.site.paths.config
    usual = config.read_text()
    config.write_text(usual + "[recovery]\nfill_rate = 65536\n")  # two minutes
    onto = {"root": f"file:{device}"}
    view = east.site.failover_start(GROUP, force=True, onto=onto)
    with life.client(east, view) as client:  # while it fills
        assert not wait_until("it says how far it is", lambda: east.site.tests()[0].fill)["done"]
        life.write(client)
        life.check(client)
        pid = east.site.tests()[0].pid
        assert pid is not None
        config.write_text(usual + "[recovery]\nfill_rate = 1048576\n")  # from its next start on
        os.kill(pid, signal.SIGKILL)

    def again() -> bool:  # the one that was killed may end a moment later
        now = east.site.tests()[0]
        return now.running and now.pid != pid

    wait_until("the view is served again", again)
    with life.client(east, view) as client:
        life.check(client)
    assert east.site.failover_start(GROUP, onto=onto).id == view.id
    with pytest.raises(errors.StateError, match="fills"):
        east.site.failover_start(GROUP, onto={"root": f"file:{wrong}"})
    east.site.failover_commit(GROUP)
    wait_until("all is there", lambda: east.site.tests()[0].fill.get("done"))
    with life.client(east, view) as client:
        life.write(client)
    west.start()
    assert east.site.reverse(GROUP).disks[0].uri == f"file:{device}"
    with life.client(east) as client:
        life.write(client)
    life.settle(east)
    compare("the device", device.read_bytes(), bytes(life.oracle))
    life.check_view(west, "latest", bytes(life.oracle))


def test_both_sites_say_that_two_vms_run(make_life: Callable[..., Life], tmp_path: Path) -> None:
    life = make_life().up()
    west, east = life.west, life.east
    with life.client(west) as client:
        life.write(client)
    life.settle(west)
    taken = bytes(life.oracle)
    with pytest.raises(errors.StateError, match="written here"):
        west.site.untaken(GROUP)
    stale = life.client(west)
    view = east.site.failover_start(GROUP, force=True)
    fork = view.point
    east.site.failover_commit(GROUP)
    client = life.client(east, view)
    life.write(client)
    stale.write(1 << 20, b"s" * 4096)  # an abandoned write
    stale.flush()
    wait_until("west knows", lambda: "two-vms" in west.group()["conditions"])
    wait_until("east knows", lambda: "two-vms" in east.group()["conditions"])
    status = west.group()
    assert status["state"] == "failed-over"
    assert "untaken-writes" in status["conditions"]
    assert status["untaken"]["after"] == fork
    assert status["untaken"]["bytes"] == 65536
    assert int(status["untaken"]["to"].split("/")[2]) > int(fork.split("/")[2])
    with pytest.raises(errors.BusyError):
        east.site.reverse(GROUP)  # the stale VM has the disks
    with pytest.raises(errors.BusyError):
        west.site.export_untaken(GROUP, tmp_path)
    stale.close()
    wait_until("nobody uses them", lambda: not west.group()["clients"])
    client.close()
    east.site.reverse(GROUP)
    life.settle(east)
    left = west.site.untaken(GROUP)
    assert [(d.name, d.extents) for d in left.disks] == [("root", [(1 << 20, 65536)])]
    assert (left.after, left.known, left.exported) == (fork, True, "")
    with pytest.raises(errors.StateError, match="--discard-untaken"):
        west.site.failback(GROUP, pause=True)
    assert "untaken-writes" in west.group()["conditions"]
    assert west.site.export_untaken(GROUP, tmp_path / "out").bytes == 65536
    with pytest.raises(errors.ExistsError):
        west.site.export_untaken(GROUP, tmp_path / "out")
    found = bytearray((tmp_path / "out" / f"{GROUP}-root.raw").read_bytes())
    assert found[1 << 20 : (1 << 20) + 4096] == b"s" * 4096
    found[1 << 20 : (1 << 20) + 4096] = taken[1 << 20 : (1 << 20) + 4096]
    compare("the stale disk", bytes(found), taken)
    listed = json.loads((tmp_path / "out" / f"{GROUP}-untaken.json").read_text())
    assert listed["disks"][0]["extents"] == [[1 << 20, 65536]]
    west.site.failback(GROUP, pause=True)
    with life.client(west) as client:
        life.check(client)  # the abandoned write shows nowhere
    life.settle(west)
    wait_until("nothing is wrong at home", lambda: not west.group()["conditions"])
    life.check_view(east, "latest", bytes(life.oracle))
