"""The way back of a group whose lanes came from several hosts: each to its own, or all to one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import pytest
from life import Place
from several_hosts import Hosts
from sites import GROUP, Client, compare, wait_until

from vrep import errors

pytestmark = pytest.mark.e2e

NAMES = ("north", "south")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        yield made.up()
    finally:
        made.close()


class Written:
    """What the disks must hold, each written by its VM wherever that runs."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.content = {name: bytearray(hosts.images[name].read_bytes()) for name in NAMES}

    def write(self, uris: Mapping[str, str], text: bytes, at: int) -> None:
        for name, uri in uris.items():
            data = (text + name.encode()).ljust(512, b".")
            with Client(uri, 60.0) as client:
                client.write(at, data)
                client.flush()
            self.content[name][at : at + 512] = data

    def check(self, uris: Mapping[str, str]) -> None:
        for name, uri in uris.items():
            with Client(uri, 60.0) as client:
                compare(name, client.read_all(), bytes(self.content[name]))


def uris(place: Place, *names: str) -> dict[str, str]:
    """Where the disks of the group are served at a site that protects it."""

    def served() -> dict[str, str] | None:
        found = {name: place.site.disk_uri(GROUP, name) for name in names or NAMES}
        try:
            for uri in found.values():
                Client(uri, 10.0).close()
        except (OSError, errors.VrepError):
            return None
        return found

    found: dict[str, str] = wait_until("the disks are served", served, every_s=0.05)
    return found


def moved(hosts: Hosts) -> Written:
    """All lanes are the vault's, and their VMs have written there."""
    written = Written(hosts)
    home = {place.name: place.site.disk_uri(GROUP) for place in (hosts.north, hosts.south)}
    written.write(home, b"at home: ", 0)
    hosts.settle()
    for place in (hosts.north, hosts.south):
        place.unused()
    view = hosts.vault.site.move(GROUP)
    written.write({disk.name: disk.uri for disk in view.disks}, b"at the vault: ", 4096)
    return written


def whole_point(at: Place, label: str, absent: list[int]) -> str:
    """A checkpoint, made at one site, says which lanes have no part in it; its label. Each try has
    one of its own: a site that has not heard yet of the other makes a point without it."""
    tries = itertools.count()

    def made() -> str:
        name = f"{label}-{next(tries)}"
        try:
            found = at.site.checkpoint(GROUP, name, wait_s=60)["absent"]
        except (errors.AgainError, errors.GapError):
            return ""  # a lane is synced still, or is waited for
        return name if found == absent else ""

    return str(wait_until(f"a point without {absent}", made, every_s=0.2))


def test_each_lane_goes_back_to_its_own_host_and_home(hosts: Hosts) -> None:
    """VM by VM: while one is home the other is not, and then the group is what it was."""
    written = moved(hosts)
    hosts.vault.site.reverse(GROUP)
    written.check(uris(hosts.vault))
    written.write(uris(hosts.vault), b"protected back: ", 8192)
    hosts.settle(hosts.vault)
    targets = {d.name: d.to_site for d in hosts.vault.site.groups.readable()}
    for number, place in enumerate((hosts.north, hosts.south)):
        assert targets[f"{GROUP}@{number}"] == place.site.identity.site_id
        assert place.site.groups.load(f"{GROUP}@{number}").yielded
    # No site has both lanes, and each that has one offers it when it is named, and not as whole.
    back = whole_point(hosts.vault, "back", [])
    for number, place in enumerate((hosts.north, hosts.south)):
        (info,) = (cut for cut in place.site.points(GROUP).cuts if cut.label == back)
        assert info.absent == [1 - number]
        with pytest.raises(errors.PointNotFoundError, match=f"lane {1 - number} "):
            place.site.test_start(GROUP)
        view = place.site.test_start(GROUP, back)
        written.check({disk.name: disk.uri for disk in view.disks})
        assert [disk.name for disk in view.disks] == [place.name]
        place.site.test_stop(GROUP)
    # Home, one after the other.
    for number, place in enumerate((hosts.north, hosts.south)):
        hosts.vault.unused()
        made = place.site.failback(GROUP)
        assert (made.name, made.disks[0].uri) == (
            f"{GROUP}@{number}",
            f"file:{hosts.images[place.name]}",
        )
        written.check(uris(place, place.name))
        written.write(uris(place, place.name), b"home again: ", 12288)
        if place is hosts.north:
            written.write(uris(hosts.vault, "south"), b"still there: ", 16384)
            whole_point(hosts.north, "north-alone", [1])
    hosts.settle()
    home = whole_point(hosts.north, "home", [])
    view = hosts.vault.site.test_start(GROUP, home)
    assert sorted(disk.name for disk in view.disks) == list(NAMES)
    written.check({disk.name: disk.uri for disk in view.disks})
    hosts.vault.site.test_stop(GROUP)
    # The numbers that were given are known as before: a newcomer is lane 2.
    for place in (hosts.north, hosts.south):
        for one in place.site.groups.readable():
            assert (one.lanes, one.numbered, len(one.hosts)) == ((0, 1), 2, 2)


def test_all_lanes_go_to_one_host_that_is_named(hosts: Hosts) -> None:
    written = moved(hosts)
    vault, north = hosts.vault, hosts.north
    with pytest.raises(errors.VrepError, match="nowhere"):
        vault.site.reverse(GROUP, to="nowhere")
    hosts.south.kill()  # it is not needed
    vault.site.reverse(GROUP, to="north")
    with pytest.raises(errors.StateError, match="another site"):
        vault.site.reverse(GROUP, to="south")
    written.write(uris(vault), b"protected back: ", 8192)
    hosts.settle(vault)
    back = whole_point(vault, "back", [])
    view = north.site.test_start(GROUP, back)
    assert sorted(disk.name for disk in view.disks) == list(NAMES)
    written.check({disk.name: disk.uri for disk in view.disks})
    north.site.test_stop(GROUP)
    # Only one of the disks was ever north's: the group moves there, and not home.
    with pytest.raises(errors.StateError, match="vrep move"):
        north.site.failback(GROUP)
    view = north.site.move(GROUP)
    written.check({disk.name: disk.uri for disk in view.disks})
    written.write({disk.name: disk.uri for disk in view.disks}, b"at north: ", 12288)
    north.site.reverse(GROUP)
    written.check(uris(north))
    hosts.settle(north)
    last = whole_point(north, "last", [])
    view = vault.site.test_start(GROUP, last)
    written.check({disk.name: disk.uri for disk in view.disks})
    vault.site.test_stop(GROUP)
    for one in north.site.groups.readable():
        assert (one.lanes, one.numbered, one.hosts) == ((0, 1), 2, ())
    hosts.south.start()  # it learns nothing of that, and stays shut out
    wait_until("it is fenced", lambda: "fenced" in hosts.lane(hosts.south)["conditions"])
