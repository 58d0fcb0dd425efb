"""The old site's target while what its disks hold is sealed: who is told what, and who waits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from target_world import GROUP, WAIT_S, Client, RefusedByTarget, World, records

from vrep.errors import FencedError
from vrep.target.base import BaseDisk, BaseOffer
from vrep.target.daemon import Target
from vrep.target.epochs import plain
from vrep.target.manifest import EpochEntry, EpochState, Position
from vrep.wire.transport import PeerRefusedError

FORK = Position(1, 0, 10)
WAITS = "while [ ! -e {} ]; do sleep 0.02; done"


def test_nobody_sends_while_a_base_is_made(world: World) -> None:
    ours, theirs = bytes.fromhex(world.b.site_id), bytes.fromhex(world.source("a").site_id)
    one = EpochEntry(1, EpochState.ACCEPTED, b"1" * 16, ours)
    two = EpochEntry(2, EpochState.ACCEPTED, b"2" * 16, theirs, FORK)
    end, asked = world.where / "end", []

    def gives_way(site: str, _told: Mapping[str, Any]) -> BaseOffer:
        asked.append(site)
        if site != theirs.hex():
            raise FencedError("another site")
        disk = BaseDisk("root", "/dev/null", records.DISK_BYTES, 0)
        command = ["sh", "-c", WAITS.format(end)]
        return BaseOffer("shop", FORK, [disk], [b"wrapped"], 0, command)

    world.target.close()
    world.target = Target(world.paths, world.config, gives_way=gives_way)
    world.target.start()
    told = {"group_id": GROUP.hex(), "epochs": [plain(one), plain(two)]}
    transport = world.connect("a")
    for _ in range(2):
        assert set(transport.ask("group.follow", told)["base"]) == {"done", "total"}
    assert asked == [theirs.hex()]  # what gave way has nothing to give any more
    with pytest.raises(PeerRefusedError, match="another site"):
        world.connect("c").ask("group.follow", told)
    assert "sealing-base" in world.status()["conditions"]
    feed = records.Feed(epoch=two, seq=FORK.seq)
    with pytest.raises(RefusedByTarget) as refused:
        Client(world, feed=feed).open()
    assert refused.value.message.code == "busy"
    end.touch()  # it sealed nothing
    deadline = time.monotonic() + WAIT_S
    while transport.ask("group.follow", told):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    opened = Client(world, feed=feed).open()
    assert opened.epoch.counter == 2
    assert opened.empty


def test_ids_that_nobody_knows_are_not_remembered(world: World) -> None:
    theirs = bytes.fromhex(world.source("a").site_id)
    one = EpochEntry(1, EpochState.ACCEPTED, b"1" * 16, bytes.fromhex(world.b.site_id))
    epochs = [plain(one), plain(EpochEntry(2, EpochState.ACCEPTED, b"2" * 16, theirs, FORK))]
    judged = []

    def gives_way(_site: str, told: Mapping[str, Any]) -> None:
        judged.append(told["group_id"])
        if len(judged) % 2:
            raise FencedError("another site")

    world.target.close()
    world.target = Target(world.paths, world.config, gives_way=gives_way)
    world.target.start()
    transport = world.connect("a")
    for number in range(8):
        told = {"group_id": number.to_bytes(16, "big").hex(), "epochs": epochs}
        if number % 2:
            assert transport.ask("group.follow", told) == {}
        else:
            with pytest.raises(PeerRefusedError, match="another site"):
                transport.ask("group.follow", told)
    assert len(judged) == 8
    for wrong in ("", "ab" * 15, "ab" * 17, "../" * 8, "AB" * 16, b"g" * 16):
        with pytest.raises(PeerRefusedError, match="16 bytes"):
            transport.ask("group.follow", {"group_id": wrong, "epochs": epochs})
    assert len(judged) == 8
    assert world.control.call("status")["groups"] == {}
