"""One group of several hosts: sites of one tenant, each with its processes, a disk and a lane."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from life import Place
from several_hosts import NUMBER, Hosts
from sites import GROUP, Client, compare, wait_until

from vrep import errors
from vrep.control import ControlClient
from vrep.recovery.cuts import Cut
from vrep.wire import messages as m
from vrep.wire.site import connect
from vrep.wire.transport import PeerRefusedError

pytestmark = pytest.mark.e2e


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        yield made.up()
    finally:
        made.close()


class Dependent:
    """Writes n to the disk of the one host, when that is acknowledged to that of the other, and so
    on; what was cut off is done again."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._stop = threading.Event()
        self.written = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with (
                    self._hosts.client(self._hosts.north) as north,
                    self._hosts.client(self._hosts.south) as south,
                ):
                    while not self._stop.is_set():
                        n = self.written + 1
                        north.write(0, NUMBER.pack(n) + bytes(504))
                        south.write(0, NUMBER.pack(n) + bytes(504))
                        self.written = n
            except (OSError, errors.VrepError):
                time.sleep(0.05)  # a filter is gone for a moment

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.written


def assert_never_torn(found: list[tuple[Cut, dict[int, int]]]) -> None:
    """The second disk is never ahead of the first, and at most one write behind."""
    torn = [v for _cut, v in found if len(v) == 2 and not v[1] <= v[0] <= v[1] + 1]
    assert not torn


def test_dependent_writes_across_hosts_are_never_torn_apart(hosts: Hosts) -> None:
    load = Dependent(hosts)
    try:
        begun = len(hosts.cuts())
        wait_until("there are some cuts", lambda: len(hosts.cuts()) >= begun + 6)
        wait_until("there are some writes", lambda: load.written > 20)
        labels = ["by-north", "by-south"]
        for place, label in zip((hosts.north, hosts.south), labels, strict=True):
            assert hosts.checkpoint(place, label)["absent"] == []
    finally:
        written = load.stop()
    hosts.settle()
    assert hosts.checkpoint(hosts.north, "last")["absent"] == []
    found = hosts.numbers()
    print(f"{written} dependent writes, {len(found)} cuts", hosts.lane(hosts.north)["cuts"])
    assert len({tuple(v.items()) for _cut, v in found}) > 2  # they are of different instants
    assert_never_torn(found)
    assert {label for cut, _v in found if (label := cut.label)} == {*labels, "last"}
    assert [v for cut, v in found if cut.label == "last"] == [{0: written, 1: written}]
    for place in (hosts.north, hosts.south):
        assert hosts.lane(place)["filter"]["cut_hold_ns_max"] < 1_000_000_000

    # What no window may take is known of every lane, also at the site that does not lead.
    def newest_whole() -> Cut:
        """Asked for anew: a site that did not hear of the other for a while cuts once more."""
        return [cut for cut in hosts.cuts() if not cut.absent][-1]

    for place, number in ((hosts.north, 0), (hosts.south, 1)):
        control = ControlClient(place.site.paths.socket("source"))
        wait_until(
            "the newest cut is told",
            lambda c=control, n=number: (
                tuple(c.call("cut_durable", group=GROUP, lane=n)) == newest_whole().of(n)[::2]
            ),
        )
    view = hosts.vault.site.test_start(GROUP, "last")
    assert sorted(disk.name for disk in view.disks) == ["north", "south"]
    for disk in view.disks:
        with Client(disk.uri, 60.0) as client:
            compare(disk.name, client.read_all(), hosts.images[disk.name].read_bytes())
    hosts.vault.site.test_stop(GROUP)


def test_no_cut_survives_a_host_that_dies_in_it(hosts: Hosts, rng: random.Random) -> None:
    load = Dependent(hosts)
    try:
        for place in (hosts.south, hosts.north):
            begun = len(hosts.cuts())
            wait_until("there are cuts", lambda n=begun: len(hosts.cuts()) > n)
            time.sleep(rng.uniform(0.0, 0.3))
            place.kill()
            place.start()
        begun = len(hosts.cuts())
        wait_until(
            "there are whole cuts again",
            lambda: len([c for c in hosts.cuts()[begun:] if not c.absent]) >= 2,
        )
        # Cuts made before the kill may show only now. What is stopped between its two writes by a
        # kill would leave the disks one apart.
        so_far = load.written
        wait_until("the load goes on", lambda: load.written > so_far)
    finally:
        written = load.stop()
    hosts.settle()
    assert hosts.checkpoint(hosts.north, "last")["absent"] == []
    found = hosts.numbers()
    print(f"{written} dependent writes, {len(found)} cuts")
    assert_never_torn(found)
    assert [v for cut, v in found if cut.label == "last"] == [{0: written, 1: written}]


@pytest.mark.parametrize(
    ("name", "hangs"),
    [
        ("north", False),
        ("south", True),
        pytest.param("south", False, marks=pytest.mark.slow),
        pytest.param("north", True, marks=pytest.mark.slow),
    ],
)
def test_a_host_that_is_gone_is_a_lane_that_ends(hosts: Hosts, name: str, hangs: bool) -> None:
    """Also the one that made the cuts: then the other makes them. One that hangs closes nothing."""
    gone, left = hosts.places[name], hosts.south if name == "north" else hosts.north
    with hosts.client(left) as client:
        client.write(0, b"1" * 512)
    assert hosts.checkpoint(left, "whole")["absent"] == []
    number = {"north": 0, "south": 1}[name]
    stopped = gone.pids() if hangs else []
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    if not hangs:
        gone.kill()
    with hosts.client(left) as client:
        client.write(0, b"2" * 512)
    wait_until("cuts go on", lambda: "lane-absent" in hosts.lane(left)["conditions"])
    wait_until("of the lane that is left", lambda: hosts.cuts()[-1].absent == (number,))
    assert hosts.checkpoint(left, "part")["absent"] == [number]
    with pytest.raises(errors.PointNotFoundError, match=f"lane {number} had no part"):
        hosts.vault.site.test_start(GROUP)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    if not hangs:
        gone.start()
    wait_until("it is back", lambda: "lane-absent" not in hosts.lane(hosts.north)["conditions"])
    hosts.settle()
    # A site that has just started says nothing of that before it is in touch with the other.
    wait_until("cuts are whole", lambda: not hosts.cuts()[-1].absent)
    assert hosts.checkpoint(hosts.north, "again")["absent"] == []
    view = hosts.vault.site.test_start(GROUP)
    assert len(view.disks) == 2
    hosts.vault.site.test_stop(GROUP)


def test_a_host_that_leaves_is_not_missed(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.BusyError, match="one group"):
        hosts.north.site.remove_peer("south")
    assert hosts.south.site.unprotect(GROUP) == ""
    with hosts.client(hosts.north) as client:
        client.write(0, b"1" * 512)
    assert hosts.checkpoint(hosts.north, "alone")["absent"] == []
    view = hosts.vault.site.test_start(GROUP)
    assert [disk.name for disk in view.disks] == ["north"]
    hosts.vault.site.test_stop(GROUP)
    with monkeypatch.context() as patch:  # its definition cannot be written: it leaves again
        patch.setattr("vrep.groups.GroupDirectory.store", _no_room)
        with pytest.raises(errors.StoreFullError):
            hosts.protect(hosts.south, beside="north")
    assert hosts.north.site.groups.load(f"{GROUP}@0").lanes == (0,)
    # A number is given once: what the vault holds of the first lane 1 stays apart.
    hosts.protect(hosts.south, beside="north")
    assert list(hosts.south.site.groups.names()) == [f"{GROUP}@3"]
    hosts.settle()
    assert hosts.checkpoint(hosts.north, "both")["absent"] == []
    # One that was lost for good is forgotten where it is missed.
    hosts.south.kill()
    wait_until("it is missed", lambda: "lane-absent" in hosts.lane(hosts.north)["conditions"])
    hosts.north.site.unprotect(f"{GROUP}@3")
    assert hosts.checkpoint(hosts.north, "alone-again")["absent"] == []


def test_a_host_that_dies_while_it_joins_is_not_missed(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It got a number, and nothing of it is on its disk; nor could it say so."""
    assert hosts.south.site.unprotect(GROUP) == ""

    def dies(*_arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vrep.groups.GroupDirectory.store", dies)
        with pytest.raises(KeyboardInterrupt):
            hosts.protect(hosts.south, beside="north")
    hosts.south.kill()
    definition = hosts.north.site.groups.load(f"{GROUP}@0")
    assert (definition.lanes, definition.joining) == ((0, 2), (2,))
    with hosts.client(hosts.north) as client:
        client.write(0, b"1" * 512)
    assert hosts.checkpoint(hosts.north, "alone")["absent"] == []
    view = hosts.vault.site.test_start(GROUP)  # the latest, which is whole
    assert [disk.name for disk in view.disks] == ["north"]
    hosts.vault.site.test_stop(GROUP)
    wait_until("it is said", lambda: hosts.lane(hosts.north)["cuts"]["joining"] == [2])
    hosts.south.start()
    hosts.protect(hosts.south, beside="north")  # again: what it never had is void
    hosts.settle()
    wait_until("it has come", lambda: not hosts.north.site.groups.load(f"{GROUP}@0").joining)
    assert hosts.north.site.groups.load(f"{GROUP}@0").lanes == (0, 3)
    assert hosts.checkpoint(hosts.north, "both")["absent"] == []
    hosts.south.kill()
    wait_until("it is missed", lambda: "lane-absent" in hosts.lane(hosts.north)["conditions"])
    hosts.south.start()


def _no_room(*_arguments: object) -> None:
    raise errors.StoreFullError("no space left")


def test_failover_of_all_hosts(hosts: Hosts) -> None:
    for place in (hosts.north, hosts.south):
        with hosts.client(place) as client:
            client.write(0, place.name.encode() + bytes(507))
    for place in (hosts.north, hosts.south):
        place.unused()
    view = hosts.vault.site.move(GROUP)
    assert sorted(disk.name for disk in view.disks) == ["north", "south"]
    for disk in view.disks:
        with Client(disk.uri, 60.0) as client:
            assert client.read(0, 5) == disk.name.encode()
    for place in (hosts.north, hosts.south):
        wait_until("it is fenced", lambda p=place: "fenced" in hosts.lane(p)["conditions"])


def test_only_hosts_of_the_group_are_heard(hosts: Hosts) -> None:
    """The vault is a peer, but no host of the group; a site without the key does not join it."""
    north, identity = hosts.north.site, hosts.south.site.identity
    definition = north.groups.load(f"{GROUP}@0")
    stranger = Place(hosts.root, "stranger")
    hosts.places["stranger"] = stranger
    stranger.site.join(north.invite())
    asked = {"group_id": definition.group_id, "cut_id": bytes(16), "lanes": [0]}
    with connect(stranger.site.identity, stranger.site.peers.get("north")) as transport:
        for method, params in (
            (m.LANES_HOLD, asked),
            (m.LANES_RELEASE, asked),
            (m.LANES_LEAVE, asked),
            (
                m.LANES_LOOK,
                {**asked, "hosts": [], "numbered": 0, "leads": True, "whole": [], "newest": None},
            ),
        ):
            with pytest.raises(PeerRefusedError, match="no lane of a group"):
                transport.ask(method, params)
        admit = {"group": GROUP, "count": 1, "names": [], "proof": bytes(32)}
        with pytest.raises(PeerRefusedError, match="another site"):
            transport.ask(m.LANES_ADMIT, {**admit, "to_site": "7" * 32})
        admit["to_site"] = definition.to_site
        with pytest.raises(PeerRefusedError, match="tenant key"):
            transport.ask(m.LANES_ADMIT, admit)
        with pytest.raises(PeerRefusedError, match="32 bytes"):
            transport.ask(m.LANES_ADMIT, {**admit, "proof": 1 << 40})
        for wrong in ({}, {"group_id": 7}, {"group_id": definition.group_id}):
            with pytest.raises(PeerRefusedError):
                transport.ask(m.LANES_HOLD, wrong)
    with connect(identity, hosts.south.site.peers.get("north")) as transport:
        for lanes in ([1], [0, 1], [7], ["x"], None):
            with pytest.raises(PeerRefusedError):
                transport.ask(m.LANES_HOLD, {**asked, "lanes": lanes})
        for lanes in ([0], [0, 1]):
            with pytest.raises(PeerRefusedError, match="its own"):
                transport.ask(m.LANES_LEAVE, {**asked, "lanes": lanes})
        look = {**asked, "hosts": [[0, definition.hosts[0][1]]], "numbered": 0, "whole": []}
        transport.ask(m.LANES_LOOK, {**look, "leads": True, "newest": None})  # it goes after
    assert north.groups.load(f"{GROUP}@0") == definition
