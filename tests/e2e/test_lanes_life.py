"""The recovery life of a group with several lanes: moved, filled in place, returned."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from life import Place
from sites import GROUP, KEY, MIB, WAIT_S, Client, compare, wait_until

from vrep import errors
from vrep.control import ControlClient
from vrep.recovery.view import ViewInfo
from vrep.target.epochs import EpochDoor

pytestmark = pytest.mark.e2e

DISK = 4 * MIB
CUTS = "[source]\ncut_every_s = 0.2\nlane_gone_s = 2.0\n"


class Lanes:
    """A group of `west` with two disks in two lanes, protected to `east`, and what its disks must
    hold."""

    def __init__(self, seed: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="vrep-lanes-"))
        self.rng = random.Random(seed)
        self.west, self.east = Place(self.root, "west"), Place(self.root, "east")
        self.images = {name: self.root / f"{name}.raw" for name in ("first", "second")}
        self.oracle = {name: bytearray(DISK) for name in self.images}
        for image in self.images.values():
            with image.open("wb") as file:
                file.truncate(DISK)
        for place in (self.west, self.east):
            with place.site.paths.config.open("a") as config:
                config.write(CUTS)

    def up(self) -> Lanes:
        self.west.start()
        self.east.start()
        self.west.site.join(self.east.site.invite())
        key = self.root / "acme.key"
        self.west.site.key_create(KEY)
        self.west.site.key_export(KEY, key)
        self.west.site.key_verify(KEY, key)
        self.east.site.key_import(key)
        disks = {name: f"file:{image}" for name, image in self.images.items()}
        options = self.west.site.group_options(ring_bytes=8 * MIB)
        self.west.site.protect(GROUP, disks, to="east", key=KEY, options=options, lanes=2)
        self.settle(self.west)
        return self

    def groups(self, at: Place) -> dict[str, Any]:
        found: dict[str, Any] = at.site.status(GROUP)["groups"]
        return found

    def settle(self, at: Place) -> None:
        """Until all lanes of a site are durable at the other one, without a gap."""

        def settled() -> bool:
            groups = self.groups(at)
            return len(groups) == 2 and all(
                one["role"] == "source"
                and one["state"] == "replicating"
                and one["targets"][0]["seq"] == one["targets"][0]["durable_seq"]
                and not one["targets"][0]["dirty_bytes"]
                for one in groups.values()
            )

        wait_until(f"all of {at.name} is durable", settled, every_s=0.05)

    def client(self, at: Place, disk: str, view: ViewInfo | None = None) -> Client:
        """At a view, or at the group's own socket; as a VM's reconnect-delay does."""
        uris = {each.name: each.uri for each in view.disks} if view is not None else {}

        def opened() -> Client | None:
            try:
                return Client(uris.get(disk) or at.site.disk_uri(GROUP, disk), WAIT_S)
            except OSError:
                return None

        found: Client = wait_until(f"{disk} is served at {at.name}", opened, every_s=0.05)
        return found

    def write(self, at: Place, view: ViewInfo | None = None, count: int = 8) -> None:
        """Random writes into each disk and its oracle."""
        for disk in self.images:
            with self.client(at, disk, view) as client:
                for _ in range(count):
                    length = self.rng.choice([512, 4096, 65536])
                    self.put(client, disk, self.rng.randrange(DISK - length) // 512 * 512, length)
                client.flush()

    def put(self, client: Client, disk: str, offset: int, length: int = 512) -> None:
        data = self.rng.randbytes(length)
        client.write(offset, data)
        self.oracle[disk][offset : offset + length] = data

    def check(self, at: Place, view: ViewInfo | None = None) -> None:
        for disk in self.images:
            with self.client(at, disk, view) as client:
                compare(disk, client.read_all(), bytes(self.oracle[disk]))

    def check_point(self, keeper: Place, at: str, wanted: Mapping[str, bytes]) -> None:
        view = keeper.site.test_start(GROUP, at)
        try:
            for disk in view.disks:
                with Client(disk.uri, 60.0) as client:
                    compare(f"{disk.name} at {at}", client.read_all(), wanted[disk.name])
        finally:
            keeper.site.test_stop(GROUP)

    def content(self) -> dict[str, bytes]:
        return {name: bytes(data) for name, data in self.oracle.items()}

    def close(self) -> None:
        for place in (self.west, self.east):
            place.close()
        shutil.rmtree(self.root, ignore_errors=True)


@pytest.fixture
def lanes(seed: int) -> Iterator[Lanes]:
    made = Lanes(seed)
    try:
        yield made.up()
    finally:
        made.close()


def fenced(lanes: Lanes, at: Place) -> bool:
    return all("fenced" in one["conditions"] for one in lanes.groups(at).values())


def clients(lanes: Lanes, at: Place) -> list[int]:
    """How many use the disks of each lane."""
    found = lanes.groups(at)
    return [found[f"{GROUP}@{lane}"]["clients"] for lane in (0, 1)]


def test_disks_of_several_lanes_are_filled_in_place(lanes: Lanes) -> None:
    west, east = lanes.west, lanes.east
    lanes.write(west)
    lanes.settle(west)
    west.site.checkpoint(GROUP, "last", wait_s=WAIT_S)
    wrong = lanes.root / "wrong.raw"
    wrong.write_bytes(b"\xaa" * 512)
    devices = {name: lanes.root / f"device-{name}.raw" for name in lanes.images}
    for device in devices.values():
        device.write_bytes(b"\xaa" * DISK)
    onto = {name: f"file:{device}" for name, device in devices.items()}
    for bad, kind in (
        ({"first": onto["first"], "second": f"file:{wrong}"}, errors.InvalidError),
        ({"first": onto["first"], "second": onto["first"]}, errors.BusyError),
        ({"third": onto["first"]}, errors.InvalidError),
    ):
        with pytest.raises(kind):
            east.site.failover_start(GROUP, "last", force=True, onto=bad)
        assert east.site.tests() == []  # no lane was begun
        assert not any(fenced(lanes, west) for _ in range(2))
    west.kill()
    view = east.site.failover_start(GROUP, "last", force=True, onto=onto)
    lanes.check(east, view)
    lanes.write(east, view)
    with pytest.raises(errors.StateError, match="fills"):
        east.site.failover_start(GROUP, onto={"second": f"file:{wrong}"})
    east.site.failover_commit(GROUP)
    wait_until("all is there", lambda: all(each.fill.get("done") for each in east.site.tests()))
    lanes.check(east, view)
    east.kill()
    for name, device in devices.items():
        compare(name, device.read_bytes(), bytes(lanes.oracle[name]))


def test_a_move_takes_all_lanes_or_none(lanes: Lanes) -> None:
    west, east = lanes.west, lanes.east
    lanes.write(west)
    with lanes.client(west, "second") as client:
        lanes.put(client, "second", 0)
        wait_until("who wrote before is gone", lambda: clients(lanes, west) == [0, 1])
        with pytest.raises(errors.BusyError, match="1 client"):
            east.site.move(GROUP)
        lanes.put(client, "second", 512)  # nothing has happened
    with lanes.client(west, "first") as client:  # which was halted already
        lanes.put(client, "first", 0)
    busy = lanes.client(west, "first")
    view = east.site.move(GROUP, pause=True)
    with pytest.raises((OSError, errors.VrepError)):
        busy.read(0, 512)
    busy.close()
    assert (view.state, [disk.name for disk in view.disks]) == ("committed", ["first", "second"])
    lanes.check(east, view)
    wait_until("west knows", lambda: fenced(lanes, west))
    assert all("guest-paused" in one["conditions"] for one in lanes.groups(west).values())
    assert east.site.move(GROUP).id == view.id  # asked again
    lanes.write(east, view)
    lanes.check(east, view)


@pytest.mark.parametrize("source_dies", [False, True])
def test_a_move_that_was_torn_goes_on(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch, source_dies: bool
) -> None:
    """One lane was taken, the other goes on at the old site: the same command takes all that it
    wrote since; a failover, what all had written when they were halted."""
    west, east = lanes.west, lanes.east
    lanes.write(west)
    halted = lanes.content()
    raise_moved, calls = EpochDoor.raise_moved, []

    def torn(door: EpochDoor, writer: bytes, last: Any) -> Any:
        calls.append(writer)
        if len(calls) == 2:
            raise errors.UnreachableError("on purpose")
        return raise_moved(door, writer, last)

    def heard() -> bool:
        return bool(lanes.groups(east)[f"{GROUP}@1"]["source"]["guest_clients"])

    with monkeypatch.context() as patch:
        patch.setattr(EpochDoor, "raise_moved", torn)
        with pytest.raises(errors.StateError, match=r"give 'vrep move' again.*on purpose"):
            east.site.move(GROUP, pause=True)
    with lanes.client(west, "second") as client:
        lanes.put(client, "second", 4096, 4096)
        client.flush()
    assert "guest-paused" in lanes.groups(west)[f"{GROUP}@0"]["conditions"]
    west_filter = ControlClient(west.site.paths.socket("filter"))
    with pytest.raises(errors.StateError, match="being moved"):
        west_filter.call("cut", lanes=[f"{GROUP}@0", f"{GROUP}@1"])  # it named its last change
    with pytest.raises(errors.StateError, match="has not reached lane"):
        east.site.failover_commit(GROUP)
    if source_dies:
        west.kill()
        view = east.site.failover_start(GROUP, force=True)
        lanes.oracle = {name: bytearray(data) for name, data in halted.items()}
        east.site.failover_commit(GROUP)
    else:
        with lanes.client(west, "second"):
            wait_until("east hears of the client", heard)
            with pytest.raises(errors.SourceAliveError):
                east.site.failover_start(GROUP)
        view = east.site.move(GROUP, pause=True)
    lanes.check(east, view)
    lanes.write(east, view)
    lanes.check(east, view)


def test_the_way_back_and_home_again(lanes: Lanes) -> None:
    """Twice: away by a move or a failover, protected back, home again."""
    west, east = lanes.west, lanes.east
    labels: list[tuple[Place, str, dict[str, bytes]]] = []

    def checkpoint(writer: Place, keeper: Place) -> None:
        lanes.settle(writer)
        label = f"mark-{len(labels)}"
        assert writer.site.checkpoint(GROUP, label, wait_s=WAIT_S)["absent"] == []
        labels.append((keeper, label, lanes.content()))

    for number in range(2):
        lanes.write(west)
        checkpoint(west, east)
        if number == 0:
            lanes.write(west)  # behind every cut
            view = east.site.move(GROUP, pause=True)
        else:
            west.kill()
            east.site.failover_start(GROUP, labels[-1][1], force=True)
            view = east.site.failover_commit(GROUP)
            west.start()
        lanes.check(east, view)
        lanes.write(east, view)
        made = east.site.reverse(GROUP)
        assert made.lanes == (0, 1)
        assert east.site.reverse(GROUP).epoch == made.epoch
        lanes.check(east)
        lanes.write(east)
        checkpoint(east, west)
        lanes.write(east)
        moved: list[ViewInfo] = []
        west.site.failback(GROUP, pause=True, moved=moved.append)
        assert [[disk.name for disk in each.disks] for each in moved] == [["first", "second"]]
        lanes.check(west)
        lanes.settle(west)
    assert west.site.failback(GROUP).epoch == 5  # it was done
    for keeper, label, wanted in labels:
        lanes.check_point(keeper, label, wanted)
    for place in (west, east):
        assert place.site.points(GROUP).verdict.whole
    # A cut that was void is tried again later, and shown until then.
    wait_until(
        "nothing is wrong at home",
        lambda: [one["conditions"] for one in lanes.groups(west).values()] == [[], []],
    )
    west.kill()
    for name, image in lanes.images.items():
        compare(name, image.read_bytes(), bytes(lanes.oracle[name]))


def test_what_was_not_taken_of_all_lanes(lanes: Lanes, tmp_path: Path) -> None:
    west, east = lanes.west, lanes.east
    lanes.write(west)
    lanes.settle(west)
    west.site.checkpoint(GROUP, "taken", wait_s=WAIT_S)
    taken = lanes.content()
    east.site.failover_start(GROUP, "taken", force=True)
    view = east.site.failover_commit(GROUP)
    wait_until("west knows", lambda: fenced(lanes, west))
    with lanes.client(west, "second") as client:
        lanes.put(client, "second", MIB, 4096)
        client.flush()
    stale = bytes(lanes.oracle["second"])
    lanes.oracle = {name: bytearray(data) for name, data in taken.items()}
    lanes.write(east, view)
    wait_until("it is counted", lambda: west.site.untaken(GROUP).bytes == 65536)
    wait_until("nobody uses the old disks", lambda: clients(lanes, west) == [0, 0])
    east.site.reverse(GROUP)
    lanes.settle(east)
    with pytest.raises(errors.StateError, match="--discard-untaken"):
        west.site.failback(GROUP, pause=True)
    left = west.site.export_untaken(GROUP, tmp_path / "out")
    assert {d.name: d.extents for d in left.disks} == {"first": [], "second": [(MIB, 65536)]}
    found = (tmp_path / "out" / f"{GROUP}@1-second.raw").read_bytes()
    assert found[MIB : MIB + 4096] == stale[MIB : MIB + 4096]
    west.site.failback(GROUP, pause=True)
    lanes.check(west)


def test_a_cut_that_was_made_before_a_rollback_is_made_again(lanes: Lanes) -> None:
    """It was not durable when the failover began: its marks are shipped in the epoch that the
    rollback gives back, where it does not look for them."""

    def whole() -> bool:
        cuts = lanes.east.site.points(GROUP).cuts
        return bool(cuts) and not cuts[-1].absent

    wait_until("there is a point of all disks", whole)
    lanes.east.kill()
    lanes.write(lanes.west)
    label = lanes.west.site.checkpoint(GROUP, "before")
    assert not label["durable"]
    lanes.east.site.failover_start(GROUP, force=True)
    lanes.east.site.failover_rollback(GROUP)
    lanes.east.start()
    lanes.settle(lanes.west)

    def newest() -> bool:
        """By both sites."""
        cut = lanes.east.site.points(GROUP).newest
        known = [cut.point if cut is not None else ""]
        for one in lanes.groups(lanes.west).values():
            known.append((one["targets"][0]["newest_point"] or {}).get("point", ""))
        return all(point.startswith("pos:3/") for point in known)

    wait_until("all that was written is in a cut", newest)
    lanes.check_point(lanes.east, "latest", lanes.content())
