"""Disks that are brought later into a group with lanes: only they are copied, earlier points keep
the disks that there were, and points go on meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from life import Place
from several_hosts import Hosts
from sites import GROUP, MIB, Client, compare, wait_until

from vrep import errors
from vrep.control import ControlClient
from vrep.groups import GroupDirectory

pytestmark = pytest.mark.e2e

NEW_BYTES = 8 * MIB


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        yield made.up()
    finally:
        made.close()


def add(hosts: Hosts, at: Place, name: str, content: bytes, rate: int = 0) -> None:
    image = hosts.images[name] = hosts.root / f"{name}.raw"
    image.write_bytes(content)
    if rate:
        for one in list(at.site.groups.names()):
            limited = at.site.group_options(ring_bytes=8 * MIB, rate_bytes_per_s=rate)
            at.site.groups.update(one, options=limited)
    at.site.add_disks(GROUP, {name: f"file:{image}"})


def hurry(at: Place, lane: str) -> None:
    """Let a lane be copied without a limit from now on."""
    at.site.groups.update(lane, options=at.site.group_options(ring_bytes=8 * MIB))
    control = ControlClient(at.site.paths.socket("filter"))
    wait_until(
        "it is served, and hurries",
        lambda: control.call("resync", group=lane, bytes_per_s=0) is not None,
    )


def joined(at: Place, lane: int) -> bool:
    return all(lane in one.lanes and lane not in one.joining for one in at.site.groups.readable())


def so_far(lane: dict[str, Any]) -> list[int]:
    """Gaps, and bytes that were copied."""
    return [lane["filter"]["gaps"], lane["filter"]["resync_bytes"]]


@pytest.mark.parametrize("who", ["north", "south"])
def test_a_disk_is_added_to_a_group_that_runs(hosts: Hosts, rng: random.Random, who: str) -> None:
    """By the host that has the first lane, or by another."""
    at, other = hosts.places[who], hosts.south if who == "north" else hosts.north
    content = {name: bytearray(hosts.images[name].read_bytes()) for name in ("north", "south")}
    for name in content:
        with hosts.client(hosts.places[name]) as client:
            client.write(0, name.encode().ljust(512, b"."))
            content[name][:512] = name.encode().ljust(512, b".")
    hosts.settle()
    assert hosts.checkpoint(hosts.north, "before")["absent"] == []
    before = {n: bytes(data) for n, data in content.items()}
    copied = [so_far(hosts.lane(place)) for place in (hosts.north, hosts.south)]
    content["logs"] = bytearray(rng.randbytes(NEW_BYTES))
    add(hosts, at, "logs", bytes(content["logs"]), rate=MIB // 8)
    # While it is copied, which would take a minute, points of the other disks go on.
    wait_until("it is served", lambda: at.site.disk_uri(GROUP, "logs"))
    for name in ("north", "south"):
        with hosts.client(hosts.places[name]) as client:
            client.write(512, b"meanwhile".ljust(512, b"."))
            content[name][512:1024] = b"meanwhile".ljust(512, b".")
    made = hosts.checkpoint(hosts.north, "meanwhile")
    assert (made["absent"], joined(hosts.north, 2)) == ([], False)
    meanwhile = {n: bytes(data) for n, data in content.items() if n != "logs"}
    with pytest.raises(errors.ExistsError):
        at.site.add_disks(GROUP, {"logs": f"file:{hosts.images['logs']}"})
    hurry(at, f"{GROUP}@2")
    # Who leads sees it whole, and tells the others.
    wait_until("it has joined", lambda: joined(hosts.north, 2) and joined(hosts.south, 2))
    with Client(at.site.disk_uri(GROUP, "logs"), 30.0) as client:
        client.write(4096, b"new".ljust(512, b"."))
        content["logs"][4096:4608] = b"new".ljust(512, b".")
    assert hosts.checkpoint(other, "after")["absent"] == []
    for point, disks in (("before", before), ("meanwhile", meanwhile), ("after", content)):
        view = hosts.vault.site.test_start(GROUP, point)
        assert {disk.name for disk in view.disks} == set(disks)
        for disk in view.disks:
            with Client(disk.uri, 60.0) as client:
                compare(f"{disk.name} at {point}", client.read_all(), bytes(disks[disk.name]))
        hosts.vault.site.test_stop(GROUP)
    # The others went on as they were: no gap, no copy.
    for number, place in enumerate((hosts.north, hosts.south)):
        lane = place.site.status(GROUP)["groups"][f"{GROUP}@{number}"]
        assert so_far(lane) == copied[number]
    # From here on it is missed like any.
    at.kill()
    assert other.site.groups.load(f"{GROUP}@{int(other is hosts.south)}").lanes == (0, 1, 2)
    gone = [0, 2] if who == "north" else [1, 2]
    wait_until(
        "it is missed",
        lambda: hosts.lane(other)["cuts"]["absent"] == gone,
    )


def test_what_cannot_be_added_changes_nothing(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    north = hosts.north.site
    image = hosts.root / "logs.raw"
    image.write_bytes(bytes(1 * MIB))
    for disks, kind in (
        ({"north": f"file:{image}"}, errors.ExistsError),
        ({"logs": f"file:{hosts.images['north']}"}, errors.BusyError),
        ({"logs": f"file:{hosts.root / 'nothing.raw'}"}, errors.VrepError),
        ({}, errors.InvalidError),
    ):
        with pytest.raises(kind):
            north.add_disks(GROUP, disks)
        assert north.groups.load(f"{GROUP}@0").lanes == (0, 1)
    with pytest.raises(errors.NotFoundError):
        north.add_disks("none", {"logs": f"file:{image}"})
    for dies in (errors.StoreFullError("no space left"), KeyboardInterrupt()):
        with monkeypatch.context() as patch:

            def store(*_arguments: object, why: BaseException = dies) -> None:
                raise why

            patch.setattr(GroupDirectory, "store", store)
            with pytest.raises(type(dies)):
                north.add_disks(GROUP, {"logs": f"file:{image}"})
        # What was cut off is a number that nobody has.
        assert hosts.checkpoint(hosts.north, "whole")["absent"] == []
    north.add_disks(GROUP, {"logs": f"file:{image}"})
    wait_until("it has joined", lambda: joined(hosts.north, 4))
    assert north.groups.load(f"{GROUP}@0").lanes == (0, 1, 4)
