"""Signs of life that a target has of a source, and what it makes of their absence."""

from __future__ import annotations

import time
from typing import Any

import pytest
from target_world import (
    CHANNEL,
    GONE_S,
    GROUP,
    Client,
    RefusedByTarget,
    World,
    records,
)

from vrep.errors import (
    StorageError,
)
from vrep.target.receive import GroupHost
from vrep.wire import messages as m
from vrep.wire.transport import PeerRefusedError


class Ahead:
    """The target's clock, of which a test may let time pass: what it hears does not depend on how
    slow the machine is."""

    def __init__(self) -> None:
        self.by_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.by_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    ahead = Ahead()
    for module in ("receive", "session"):
        monkeypatch.setattr(f"vrep.target.{module}.time", ahead)
    return ahead


def source_of(world: World) -> dict[str, Any]:
    return dict(world.door.state()["source"])


def wait_gone(world: World, clock: Ahead) -> None:
    """Until the source was silent for long; never before it was."""
    left_s = source_of(world)["gone_in_s"]
    if left_s > GONE_S / 2:
        clock.by_s += left_s - GONE_S / 2
        assert source_of(world)["gone_in_s"] > 0
        left_s = GONE_S / 2
    clock.by_s += left_s + 0.01  # it is told in milliseconds
    assert source_of(world)["gone_in_s"] == 0


def guest(client: Client, clients: int) -> None:
    """A report, and a record behind it that shows when it has arrived."""
    client.transport.send(
        m.Status(time_ns=time.time_ns(), state="replicating", values={"clients": clients}), CHANNEL
    )
    client.send(client.feed.writes(1))
    client.wait(client.feed.seq)


def test_a_source_that_was_cut_off_is_not_gone_at_once(world: World, clock: Ahead) -> None:
    client = Client(world).start()
    guest(client, 1)
    client.transport.stream.close()
    while world.control.call("sessions"):
        time.sleep(0.005)
    cut = source_of(world)
    assert (cut["connected"], cut["guest_clients"]) == (False, 1)
    assert 0 < cut["gone_in_s"] <= GONE_S
    wait_gone(world, clock)
    assert source_of(world)["silent_s"] >= GONE_S


def test_a_target_that_has_just_started_knows_of_no_source(world: World, clock: Ahead) -> None:
    Client(world).start()
    began_s = clock.monotonic()
    world.restart()
    fresh = source_of(world)
    assert fresh["gone_in_s"] > 0
    assert (fresh["guest_clients"], fresh["silent_s"]) == (None, None)
    wait_gone(world, clock)
    assert clock.monotonic() - began_s >= GONE_S
    world.target.close()
    assert source_of(world)["gone_in_s"] is None  # nobody listens


def test_a_source_that_tries_or_reports_is_heard(world: World, clock: Ahead) -> None:
    client = Client(world).start()
    guest(client, 2)
    world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id))
    wait_gone(world, clock)
    with pytest.raises(RefusedByTarget, match="fenced"):
        Client(world, feed=records.Feed(seq=1)).open()
    refused = source_of(world)
    assert refused["gone_in_s"] > 0
    assert refused["guest_clients"] == 2  # what it said last
    wait_gone(world, clock)
    paused = {"group_id": GROUP.hex(), "state": "paused", "clients": 3}
    link = world.connect("a")
    assert link.ask("group.report", paused) == {"clients": 0}  # here, where it was taken over to
    heard = source_of(world)
    assert heard["gone_in_s"] > 0
    assert (heard["state"], heard["guest_clients"]) == ("paused", 3)
    link.ask("group.report", {**paused, "clients": None})
    assert source_of(world)["guest_clients"] is None
    with pytest.raises(PeerRefusedError, match="invalid"):
        link.ask("group.report", {**paused, "state": "replicating"})


def test_a_report_counts_beside_a_session_that_died_unnoticed(world: World, clock: Ahead) -> None:
    client = Client(world).start()
    guest(client, 1)
    wait_gone(world, clock)
    paused = {"group_id": GROUP.hex(), "state": "paused", "clients": 2}
    world.connect("a").ask("group.report", paused)
    for _ in range(2):
        heard = source_of(world)
        assert heard["gone_in_s"] > 0
        assert (heard["state"], heard["guest_clients"]) == ("paused", 2)
        client.transport.stream.close()  # now it is noticed
        while world.control.call("sessions"):
            time.sleep(0.005)


def test_a_source_that_is_refused_is_heard(
    world: World, clock: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    Client(world).start().transport.close()
    wait_gone(world, clock)
    with pytest.raises(RefusedByTarget, match="do not belong together"):
        Client(world, lanes=[m.LaneOffer(lane=1, durable_seq=0, oldest_seq=1, newest_seq=0)]).open()
    assert source_of(world)["gone_in_s"] > 0
    wait_gone(world, clock)

    def unreadable(_host: GroupHost) -> None:
        raise StorageError("Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(GroupHost, "load", unreadable)
        with pytest.raises(RefusedByTarget, match="busy"):
            Client(world).open()
    assert source_of(world)["gone_in_s"] > 0
    wait_gone(world, clock)
    report = {"group_id": GROUP.hex(), "state": "error", "clients": 1}
    world.connect("a").ask("group.report", report)
    assert source_of(world)["guest_clients"] == 1


def test_the_site_that_took_over_says_that_the_old_source_lives(world: World, clock: Ahead) -> None:
    client = Client(world).start()
    guest(client, 1)
    wait_gone(world, clock)
    assert "old-source-alive" not in world.status()["conditions"]
    raised = world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id))
    world.door.accept(raised.epoch)
    wait_gone(world, clock)
    assert "old-source-alive" not in world.status()["conditions"]  # it has not come back
    returns = Client(world, feed=records.Feed(seq=1))
    with pytest.raises(RefusedByTarget, match="fenced"):
        returns.open()
    assert "old-source-alive" in world.status()["conditions"]
    report = {"group_id": GROUP.hex(), "state": "fenced", "clients": 2}
    returns.transport.ask("group.report", report)
    status = world.status()
    assert "old-source-alive" in status["conditions"]
    assert (status["source"]["site"], status["source"]["guest_clients"]) == ("a", 2)
    wait_gone(world, clock)
    assert "old-source-alive" not in world.status()["conditions"]


def test_a_site_that_never_wrote_the_group_does_not_count(world: World, clock: Ahead) -> None:
    Client(world).start().transport.close()
    wait_gone(world, clock)
    with pytest.raises(RefusedByTarget, match="not-allowed"):
        Client(world, name="c").open()
    with pytest.raises(PeerRefusedError, match="fenced"):
        world.connect("c").ask(
            "group.report", {"group_id": GROUP.hex(), "state": "paused", "clients": 1}
        )
    assert source_of(world)["gone_in_s"] == 0
