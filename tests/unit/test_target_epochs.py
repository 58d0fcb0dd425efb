"""Epochs at the target over real TLS: failovers, rollbacks, and writers that are replaced."""

from __future__ import annotations

import time
from typing import Any

import pytest
from target_world import (
    GROUP,
    WAIT_S,
    Client,
    RefusedByTarget,
    World,
    content,
    records,
)

from vrep.control import ControlClient
from vrep.errors import (
    LockedError,
    StateError,
    UnreachableError,
    VrepError,
)
from vrep.target.manifest import EpochState, Position
from vrep.target.store import GroupStore, StoreReader
from vrep.wire import messages as m


def test_a_failover_fences_the_source_at_once(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(3))
    client.wait(3)
    entry = world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id))
    assert (entry.epoch, entry.parent) == (2, Position(1, 0, 3))
    client.send(client.feed.writes(1))
    with pytest.raises(RefusedByTarget) as refused:
        client.wait(4)
    assert refused.value.message.code == "fenced"
    assert refused.value.message.epoch is not None
    assert refused.value.message.epoch.counter == 2
    with pytest.raises(RefusedByTarget, match="fenced"):
        Client(world, feed=records.Feed(seq=4)).open()
    assert records.seqs(content(world)) == [1, 2, 3]
    assert world.status()["state"] == "failed-over"


def test_a_rolled_back_failover_gives_the_group_back(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(5))
    client.wait(5)
    raised = world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id), parent=Position(1, 0, 2))
    back = world.door.roll_back(raised.epoch)
    assert (back.epoch, back.parent) == (3, Position(1, 0, 5))
    assert back.writer.hex() == world.sources["a"].site_id
    again = Client(world, feed=records.Feed(seq=5))
    opened = again.open()
    assert opened.epoch.counter == 3
    assert opened.lanes[0].durable == m.Position(epoch=3, seq=5)
    again.feed = records.Feed(epoch=back, seq=5)
    again.announce()
    again.send(again.feed.writes(2))
    again.wait(7)
    with StoreReader(world.paths.store, GROUP) as reader:
        assert reader.durable == Position(3, 0, 7)
        assert reader.ancestry(reader.durable) == [(3, 7), (1, 5)]


def test_a_committed_failover_stays(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(2))
    client.wait(2)
    raised = world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id))
    assert world.door.accept(raised.epoch).state is EpochState.ACCEPTED
    with pytest.raises(VrepError, match="was committed"):
        world.door.roll_back(raised.epoch)
    world.restart()
    with pytest.raises(RefusedByTarget, match="fenced"):
        Client(world, feed=records.Feed(seq=2)).open()


def dies_before_it_answers(world: World, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """The target does what `method` asks for, and ends before it answers."""
    real = ControlClient.call

    def call(self: ControlClient, name: str, **params: Any) -> Any:
        answer = real(self, name, **params)
        if name == method:
            monkeypatch.undo()
            world.target.close()
            raise UnreachableError("closed the connection")
        return answer

    monkeypatch.setattr(ControlClient, "call", call)


@pytest.mark.parametrize("parent", [None, Position(1, 0, 3)])
def test_a_target_that_dies_in_a_failover_raises_one_epoch(
    world: World, monkeypatch: pytest.MonkeyPatch, parent: Position | None
) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(5))
    client.wait(5)
    ours = bytes.fromhex(world.b.site_id)
    dies_before_it_answers(world, monkeypatch, "epoch_raise")
    raised = world.door.raise_epoch(writer=ours, parent=parent)
    assert (raised.epoch, raised.parent) == (2, parent or Position(1, 0, 5))
    assert world.door.raise_epoch(writer=ours, parent=parent) == raised
    with pytest.raises(StateError, match="not decided"):
        world.door.raise_epoch(writer=ours, parent=Position(1, 0, 1))
    world.restart()
    dies_before_it_answers(world, monkeypatch, "epoch_roll_back")
    back = world.door.roll_back(raised.epoch)
    assert (back.epoch, back.writer.hex()) == (3, world.sources["a"].site_id)
    assert world.door.roll_back(raised.epoch) == back
    assert [e["state"] for e in world.door.state()["epochs"]] == [
        "accepted",
        "abandoned",
        "accepted",
    ]
    world.restart()
    opened = Client(world, feed=records.Feed(seq=5)).open()
    assert (opened.epoch.counter, opened.lanes[0].durable.seq) == (3, 5)


def test_a_rollback_never_gives_the_group_to_who_gives_it_up(world: World) -> None:
    """Stores that an earlier release left with two provisional epochs are repaired by it."""
    client = Client(world).start()
    client.send(client.feed.writes(4))
    client.wait(4)
    world.target.close()
    with GroupStore.open(world.paths.store, GROUP) as store:
        for _ in range(2):
            newest = store.add_epoch(
                writer=bytes.fromhex(world.b.site_id),
                parent=Position(1, 0, 4),
                state=EpochState.PROVISIONAL,
            )
        back = store.roll_back_epoch(newest.epoch)
        assert (back.epoch, back.writer.hex()) == (4, world.sources["a"].site_id)
        assert back.parent == Position(1, 0, 4)
        states = [entry.state.name.lower() for entry in store.epochs]
    assert states == ["accepted", "abandoned", "abandoned", "accepted"]
    world.restart()
    assert Client(world, feed=records.Feed(seq=4)).open().epoch.counter == 4


def test_epochs_change_without_a_target_process(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(2))
    client.wait(2)
    world.target.close()
    assert world.door.state()["durable"] == [1, 0, 2]
    raised = world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id))
    world.restart()
    assert world.door.state()["current"] == raised.epoch
    with pytest.raises(LockedError):
        GroupStore.open(world.paths.store, GROUP)


def test_another_history_of_the_same_epoch_is_fenced(world: World) -> None:
    Client(world).start()
    offer = m.EpochInfo(counter=1, id=b"another epoch 01")
    with pytest.raises(RefusedByTarget, match="fenced"):
        Client(world, epoch=offer).open()
    with pytest.raises(RefusedByTarget, match="invalid"):
        Client(world, epoch=m.EpochInfo(counter=4, id=b"another epoch 04")).open()


def test_a_source_that_slept_through_two_failovers_goes_on(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(4))
    client.wait(4)
    client.transport.close()
    ours = bytes.fromhex(world.b.site_id)
    for _failover in range(2):
        back = world.door.roll_back(world.door.raise_epoch(writer=ours).epoch)
    assert (back.epoch, back.parent) == (5, Position(3, 0, 4))
    again = Client(world, feed=records.Feed(seq=6))
    opened = again.open()
    assert (opened.epoch.counter, opened.lanes[0].durable.seq) == (5, 4)
    again.feed = records.Feed(epoch=back, seq=4)
    again.announce()
    again.send(again.feed.writes(2))
    again.wait(6)
    with StoreReader(world.paths.store, GROUP) as reader:
        assert reader.ancestry(reader.durable) == [(5, 6), (3, 4), (1, 4)]


def test_a_source_that_missed_its_own_writes_is_fenced(world: World) -> None:
    """An older copy of the source must not go on behind what a newer one wrote."""
    client = Client(world).start()
    client.send(client.feed.writes(4))
    client.wait(4)
    ours = bytes.fromhex(world.b.site_id)
    back = world.door.roll_back(world.door.raise_epoch(writer=ours).epoch)
    newer = Client(world, feed=records.Feed(epoch=back, seq=4))
    newer.start()
    newer.send(newer.feed.writes(3))
    newer.wait(7)
    newer.transport.close()
    world.door.roll_back(world.door.raise_epoch(writer=ours).epoch)
    with pytest.raises(RefusedByTarget, match="fenced"):
        Client(world, feed=records.Feed(seq=9)).open()


def test_an_epoch_that_was_given_up_cannot_be_kept(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(2))
    client.wait(2)
    raised = world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id))
    world.door.roll_back(raised.epoch)
    with pytest.raises(VrepError, match="not the current one"):
        world.door.accept(raised.epoch)
    kept = world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id))
    assert world.door.accept(kept.epoch) == world.door.accept(kept.epoch)


def test_nothing_of_an_ended_epoch_is_written_when_there_is_room_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vrep.target.files import Files

    client = Client(world).start()
    client.send(client.feed.writes(2))
    client.wait(2)
    monkeypatch.setattr(Files, "free_bytes", lambda _self, _path: 0)
    client.send(client.feed.writes(1))
    while "target-full" not in client.ack.conditions:
        client.take()
    raised = world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id))
    world.door.accept(raised.epoch)
    monkeypatch.undo()
    deadline = time.monotonic() + WAIT_S
    while world.status()["full"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert world.status()["received_seq"] == world.status()["durable_seq"] == 2
    assert records.seqs(content(world)) == [1, 2]
