"""The target over real TLS: sessions, acknowledgements, epochs, and who is refused."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vrep._core import layout
from vrep.control import ControlClient
from vrep.errors import (
    CorruptError,
    LockedError,
    NotFoundError,
    StateError,
    StorageError,
    UnreachableError,
    VrepError,
)
from vrep.keys import SiteIdentity
from vrep.paths import SitePaths
from vrep.settings import Config, NetworkConfig, StatusConfig, TargetConfig
from vrep.status import WELL, verdict
from vrep.target.daemon import Target
from vrep.target.epochs import EpochDoor
from vrep.target.manifest import EpochState, Position
from vrep.target.receive import GroupHost
from vrep.target.store import GroupStore, StoreReader
from vrep.wire import messages as m
from vrep.wire.peers import PeerRegistry
from vrep.wire.site import connect
from vrep.wire.transport import FrameTransport, PeerRefusedError

WAIT_S = 30.0
CHANNEL = 1
GONE_S = 1.0


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


records = load(Path(__file__).parents[1] / "oracle" / "store_records.py")
GROUP: bytes = records.GROUP


def trust(who: Path, whom: SiteIdentity) -> None:
    peers = PeerRegistry(who)
    peers.add(
        peers.check(
            name=whom.name,
            site_id=whom.site_id,
            certificate=whom.certificate_pem,
            address="",
            joined=whom.created,
        )
    )


class World:
    """A target site that runs, and source sites that may connect."""

    def __init__(self, where: Path) -> None:
        self.where = where
        self.paths = SitePaths(where / "b")
        self.b = SiteIdentity.create(self.paths.root, "b")
        self.sources: dict[str, SiteIdentity] = {}
        self.transports: list[FrameTransport] = []
        self.config = Config(
            network=NetworkConfig(listen="127.0.0.1:0"),
            target=TargetConfig(commit_s=0.004, reserve_bytes=0, source_gone_s=GONE_S),
        )
        self.target = Target(self.paths, self.config)
        self.target.start()

    def restart(self) -> None:
        self.target.close()
        self.target = Target(self.paths, self.config)
        self.target.start()

    def source(self, name: str = "a") -> SiteIdentity:
        if name not in self.sources:
            self.sources[name] = SiteIdentity.create(self.where / name, name)
            trust(self.paths.root, self.sources[name])
            trust(self.where / name, self.b)
        return self.sources[name]

    def connect(self, name: str = "a") -> FrameTransport:
        identity = self.source(name)
        peer = PeerRegistry(self.where / name).get("b")
        transport = connect(identity, peer, address=self.target.address)
        self.transports.append(transport)
        return transport

    def close(self) -> None:
        for transport in self.transports:
            transport.close()
        self.target.close()

    @property
    def control(self) -> ControlClient:
        return ControlClient(self.paths.socket("target"))

    def status(self) -> dict[str, Any]:
        return dict(self.control.call("status")["groups"][GROUP.hex()])

    @property
    def door(self) -> EpochDoor:
        return EpochDoor(self.paths.store, self.paths.socket("target"), GROUP)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    try:
        yield world
    finally:
        world.close()


class Client:
    """A source, as simple as one can be."""

    def __init__(self, world: World, name: str = "a", feed: Any = None, **offer: Any) -> None:
        self.transport = world.connect(name)
        self.feed = feed or records.Feed()
        self.ack = m.Ack(received_seq=0, durable_seq=0, credit_bytes=0)
        self.offer = offer

    def open(self) -> m.GroupOpened:
        epoch = self.feed.epoch
        fields: dict[str, Any] = {
            "group_id": GROUP,
            "name": "shop",
            "epoch": m.EpochInfo(counter=epoch.epoch, id=epoch.epoch_id),
            "disks": [m.DiskInfo(index=0, name="root", size=records.DISK_BYTES)],
            "lanes": [m.LaneOffer(durable_seq=0, oldest_seq=1, newest_seq=self.feed.seq)],
            "wrapped_keys": [b"wrapped"],
            **self.offer,
        }
        self.transport.send(m.OpenGroup(**fields), CHANNEL)
        answer = self.transport.expect(WAIT_S).message
        if isinstance(answer, m.Refused):
            raise RefusedByTarget(answer)
        assert isinstance(answer, m.GroupOpened)
        return answer

    def start(self) -> Client:
        """Open, and begin a stream where the target is."""
        opened = self.open()
        self.feed.restart(opened.lanes[0].durable.seq)
        self.announce()
        return self

    def announce(self) -> None:
        self.transport.send(
            m.StreamStart(
                stream_id=self.feed.stream_id, key_generation=1, resume_seq=self.feed.seq
            ),
            CHANNEL,
        )
        self.send(self.feed.stream())

    def send(self, data: bytes, *, more: bool = False) -> None:
        self.transport.send_data(CHANNEL, [data], more=more)

    def wait(self, durable_seq: int, limit_s: float = WAIT_S) -> m.Ack:
        deadline = time.monotonic() + limit_s
        while self.ack.durable_seq < durable_seq:
            self.take(max(0.001, deadline - time.monotonic()))
        return self.ack

    def take(self, limit_s: float = WAIT_S) -> m.Message:
        message = self.transport.expect(limit_s).message
        if isinstance(message, m.Ack):
            assert message.received_seq >= message.durable_seq
            self.ack = message
        elif isinstance(message, m.Refused):
            raise RefusedByTarget(message)
        return message


class GroupNamed(Client):
    """A source whose group has this name."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world)
        self.offer["name"] = name


class RefusedByTarget(Exception):
    def __init__(self, message: m.Refused) -> None:
        super().__init__(message.code, message.text)
        self.message = message


def content(world: World) -> bytes:
    with StoreReader(world.paths.store, GROUP) as reader:
        out = b""
        for span in reader.records():
            last = span.found[-1]
            end = int(last["position"]) + 64 + int(last["header"]["body_bytes"])
            out += bytes(reader.read(span.segment, span.start, end))
        return out


def test_first_contact_creates_a_store_and_records_become_durable(world: World) -> None:
    client = Client(world)
    opened = client.open()
    assert opened.empty
    assert opened.lanes[0].durable == m.Position(epoch=1, seq=0)
    client.announce()
    client.send(client.feed.writes(5) + client.feed.tally())
    ack = client.wait(5)
    assert ack.received_seq == 5
    assert ack.credit_bytes > opened.credit_bytes
    assert records.seqs(content(world)) == [1, 2, 3, 4, 5]
    status = world.status()
    assert status["durable"] == "1/0/5"
    assert status["state"] == "replicating"
    assert status["source"]["connected"]
    sessions = world.control.call("sessions")
    assert [session["site"] for session in sessions] == ["a"]


def test_bytes_are_stored_as_they_were_received(world: World) -> None:
    client = Client(world)
    client.open()
    sent = client.feed.stream()
    client.transport.send(
        m.StreamStart(stream_id=client.feed.stream_id, key_generation=1, resume_seq=0), CHANNEL
    )
    client.send(sent)
    for count, length in ((1, 512), (3, 4096), (1, 1 << 20), (2, 300_000 // 512 * 512)):
        batch = client.feed.writes(count, length)
        client.send(batch)
        sent += batch
    client.wait(client.feed.seq)
    assert content(world) == sent


def test_a_record_in_many_frames(world: World) -> None:
    client = Client(world).start()
    batch = client.feed.writes(2, 4096) + client.feed.writes(1, 1 << 20) + client.feed.writes(1)
    for at in range(0, len(batch), 50_001):
        client.send(batch[at : at + 50_001], more=at + 50_001 < len(batch))
    client.wait(4)
    assert content(world).endswith(batch)


def test_credits_come_back_and_bound_what_is_sent(world: World) -> None:
    client = Client(world)
    window = client.open().credit_bytes
    client.announce()
    sent = 0
    while sent < 2 * window:
        batch = client.feed.writes(1, 4 << 20)
        while client.transport.connection.credit(CHANNEL) < len(batch):
            client.take()
        client.send(batch)
        sent += len(batch)
    client.wait(client.feed.seq)
    while client.ack.credit_bytes < sent + window:
        client.take()


def test_duplicates_are_harmless(world: World) -> None:
    client = Client(world).start()
    first, second, third = (client.feed.writes(3) for _ in range(3))
    client.send(first + second)
    client.wait(6)
    client.send(first)
    client.send(second + third)  # straddles what is known
    client.send(third)
    client.wait(9)
    kept = content(world)
    assert kept.endswith(first + second + third)
    assert records.seqs(kept) == list(range(1, 10))


def test_a_hole_is_refused(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(2))
    client.wait(2)
    client.feed.writes(1)
    client.send(client.feed.writes(1))
    with pytest.raises(PeerRefusedError, match="protocol"):
        client.wait(4)
    assert records.seqs(content(world)) == [1, 2]


def test_a_gap_may_jump(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(2))
    client.send(client.feed.mark_gap(layout.KIND_GAP_BEGIN, jump_to=100))
    client.send(client.feed.writes(1) + client.feed.mark_gap(layout.KIND_GAP_END))
    client.wait(102)
    with StoreReader(world.paths.store, GROUP) as reader:
        assert [event.position.seq for event in reader.events()] == [100, 102]


def test_the_source_is_told_what_can_be_recovered(world: World) -> None:
    client = Client(world)
    assert client.open().lanes[0].points is m.UNSET
    client.feed.restart(0)
    client.announce()
    client.send(client.feed.mark_gap(records.layout.KIND_GAP_BEGIN))
    client.send(client.feed.writes(3))
    assert client.wait(4).points is m.UNSET
    client.send(client.feed.mark_gap(records.layout.KIND_GAP_END))
    client.send(client.feed.writes(2))
    # An acknowledgement may be ahead of the points that it carries.
    while not (told := client.wait(7).points) or told.newest.position.seq < 7:
        client.take(WAIT_S)
    assert told.oldest.position == m.Position(epoch=1, seq=5)
    assert told.newest == m.Point(position=m.Position(epoch=1, seq=7), time_ns=client.feed.wall_ns)
    assert world.status()["newest_point"] == {
        "point": "pos:1/0/7",
        "wall_ns": client.feed.wall_ns,
    }
    again = Client(world, feed=client.feed).open()
    assert again.lanes[0].points == told


def damaged(batch: bytes) -> bytes:
    """A header whose checksum is wrong."""
    return batch[:20] + bytes([batch[20] ^ 1]) + batch[21:]


def strange(feed: Any) -> bytes:
    """Of a disk that the group has not."""
    rows = feed.headers(1, layout.KIND_WRITE, 0, 4096, 0)
    rows["disk"] = 1
    return bytes(feed._seal(rows, [bytes(4096)]))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda client: damaged(client.feed.writes(2)),
        lambda client: client.feed.writes(2)[:-1],
        lambda client: strange(client.feed),
        lambda client: records.Feed(seq=client.feed.seq).stream(),
        lambda client: bytes(64),
    ],
)
def test_nonsense_ends_the_connection_and_stores_nothing(world: World, spoil: Any) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(1))
    client.wait(1)
    before = content(world)
    client.send(spoil(client))
    with pytest.raises(PeerRefusedError, match="protocol"):
        client.wait(10)
    assert content(world) == before
    again = Client(world, feed=client.feed)
    assert again.start().feed.seq == 1
    again.send(again.feed.writes(1))
    again.wait(2)


def test_records_need_an_announced_stream(world: World) -> None:
    client = Client(world)
    client.open()
    client.transport.send(
        m.StreamStart(stream_id=b"other stream 016", key_generation=1, resume_seq=0), CHANNEL
    )
    client.send(client.feed.stream())
    with pytest.raises(PeerRefusedError, match="announced"):
        client.take()


def test_a_stream_must_resume_where_the_store_is(world: World) -> None:
    client = Client(world)
    client.open()
    client.feed.restart(7)
    with contextlib.suppress(VrepError):
        client.announce()
    with pytest.raises(PeerRefusedError, match="resumes at 7"):
        client.take()


def test_a_new_session_replaces_the_old_one(world: World) -> None:
    """Everything that the old one sent is durable before the new one hears a position."""
    old = Client(world).start()
    old.send(old.feed.writes(40, 65536))
    new = Client(world, feed=records.Feed())
    opened = new.open()
    here = opened.lanes[0].durable.seq
    assert opened.lanes[0].received == opened.lanes[0].durable
    with StoreReader(world.paths.store, GROUP) as reader:
        assert reader.durable.seq == here
    with contextlib.suppress(VrepError):
        old.send(old.feed.writes(4))
    new.feed.restart(here)
    new.announce()
    new.send(new.feed.writes(2))
    assert new.wait(here + 2).received_seq == here + 2
    assert records.seqs(content(world)) == list(range(1, here + 3))
    while not isinstance(old.take(), m.Bye):
        pass


def test_a_restarted_target_goes_on_where_it_was_durable(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(10))
    client.wait(10)
    world.restart()
    again = Client(world, feed=client.feed)
    assert again.open().lanes[0].durable.seq == 10


def test_another_site_is_refused(world: World) -> None:
    Client(world).start()
    with pytest.raises(RefusedByTarget, match="not-allowed"):
        Client(world, "c").open()


def test_other_disks_are_refused_and_other_sizes_are_not(world: World) -> None:
    """A size may change in records that are to come."""
    Client(world).start()
    Client(world, disks=[m.DiskInfo(index=0, name="root", size=4096)]).open()
    with pytest.raises(RefusedByTarget, match="size-mismatch"):
        Client(world, disks=[m.DiskInfo(index=0, name="boot", size=records.DISK_BYTES)]).open()


def test_a_peer_that_was_removed_is_cut_off(world: World) -> None:
    client = Client(world).start()
    PeerRegistry(world.paths.root).remove("a")
    world.control.call("reload")
    with contextlib.suppress(VrepError):
        while not isinstance(client.take(), m.Bye):
            pass
    with pytest.raises(VrepError), world.connect("a") as link:
        link.expect(WAIT_S)
    assert not world.status()["source"]["connected"]


def test_a_site_that_never_joined_gets_nothing(world: World, tmp_path: Path) -> None:
    stranger = SiteIdentity.create(tmp_path / "stranger", "stranger")
    trust(tmp_path / "stranger", world.b)
    peer = PeerRegistry(tmp_path / "stranger").get("b")
    with pytest.raises(VrepError), connect(stranger, peer, address=world.target.address) as link:
        link.expect(WAIT_S)
    assert not world.paths.store.exists()


# ---- epochs ------------------------------------------------------------------------


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


# ---- what is kept --------------------------------------------------------------------------


def kept(world: World) -> tuple[int, int]:
    status = world.status()
    return status["window_s"], status["quota_bytes"]


def test_an_offer_says_how_much_history_is_kept(world: World) -> None:
    client = Client(world, window="86400s", quota=1 << 40).start()
    client.send(client.feed.writes(1))
    client.wait(1)
    assert kept(world) == (86400, 1 << 40)
    world.restart()
    assert kept(world) == (86400, 1 << 40)
    Client(world, feed=client.feed).open()  # as a source of an earlier release says it
    assert kept(world) == (0, 0)
    for wrong in ("24h", "-1s", "s", "999999999999s"):
        with pytest.raises(RefusedByTarget, match="window"):
            Client(world, feed=client.feed, window=wrong).open()


def test_what_is_kept_is_changed_by_the_writer_alone(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(1))
    client.wait(1)
    params = {"group_id": GROUP.hex(), "window_s": 3600, "quota": 1 << 30}
    world.connect().ask("group.keep", params)
    assert kept(world) == (3600, 1 << 30)
    with pytest.raises(PeerRefusedError, match="only the site that writes"):
        world.connect("other").ask("group.keep", params)
    for wrong in ({"window_s": -1}, {"quota": -1}, {"window_s": 1 << 40}):
        with pytest.raises(PeerRefusedError):
            world.connect().ask("group.keep", {**params, **wrong})
    assert kept(world) == (3600, 1 << 30)


def test_a_quota_is_told_to_the_source(world: World) -> None:
    client = Client(world, quota=1 << 20).start()
    client.send(client.feed.writes(210, 4096))
    while "quota-80" not in client.ack.conditions:
        client.send(client.feed.writes(1))
        client.take()
    assert "quota-80" in world.status()["conditions"]
    client.send(client.feed.writes(60, 4096))
    client.wait(client.feed.seq)
    client.send(client.feed.writes(1))
    while "target-full" not in client.ack.conditions:
        client.take()
    used = world.status()
    assert 1 << 20 < used["bytes"] < (1 << 20) + 300 * 4400
    assert "quota-95" in used["conditions"]
    params = {"group_id": GROUP.hex(), "window_s": 0, "quota": 0}
    world.connect().ask("group.keep", params)
    client.wait(client.feed.seq)


# ---- trouble with the disk ----------------------------------------------------------


def test_a_full_disk_is_told_and_passes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from vrep.target.files import Files

    client = Client(world).start()
    client.send(client.feed.writes(1))
    client.wait(1)
    monkeypatch.setattr(Files, "free_bytes", lambda _self, _path: 0)
    client.send(client.feed.writes(1))
    while "target-full" not in client.ack.conditions:
        client.take()
    assert client.ack.durable_seq == 1
    assert world.status()["conditions"] == ["target-full"]
    monkeypatch.undo()
    client.wait(2)
    while client.ack.conditions:
        client.take()


def test_a_failover_does_not_wait_for_a_full_disk(
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
    assert raised.parent == Position(1, 0, 2)
    with pytest.raises(RefusedByTarget, match="fenced"):
        client.wait(3)
    monkeypatch.undo()
    back = world.door.roll_back(raised.epoch)
    again = Client(world, feed=records.Feed(epoch=back, seq=3))
    here = again.start().feed.seq
    again.send(again.feed.writes(1))
    again.wait(here + 1)
    with StoreReader(world.paths.store, GROUP) as reader:
        assert reader.durable == Position(3, 0, here + 1)
        assert reader.ancestry(reader.durable) == [(3, here + 1), (1, back.parent.seq)]


def test_a_failed_sync_ends_the_session_and_the_store_is_read_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vrep.target.files import Files

    client = Client(world).start()
    client.send(client.feed.writes(1))
    client.wait(1)

    def fail(_self: Files, _fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Files, "sync", fail)
    client.send(client.feed.writes(1))
    while not isinstance(message := client.take(), m.Error):
        pass
    assert message.code == "storage"
    assert client.ack.durable_seq == 1
    monkeypatch.undo()
    again = Client(world, feed=records.Feed())
    here = again.start().feed.seq
    assert here in (1, 2)  # what was read back from the storage, never less than acknowledged
    again.send(again.feed.writes(1))
    again.wait(here + 1)


def test_a_damaged_store_is_refused_and_named(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(1))
    client.wait(1)
    world.target.close()
    directory = world.paths.store / GROUP.hex()
    newest = max(directory.glob("manifest-*"))
    data = bytearray(newest.read_bytes())
    data[300] ^= 1
    newest.write_bytes(data)
    world.restart()
    status = world.status()
    assert status["state"] == "error"
    assert newest.name in status["error"]
    with pytest.raises(RefusedByTarget, match="damaged"):
        Client(world, feed=client.feed).open()
    data[300] ^= 1
    newest.write_bytes(data)
    world.control.call("reload")
    assert world.status()["durable"] == "1/0/1"


def test_a_group_is_deleted_by_its_writer_only(world: World) -> None:
    Client(world).start().transport.close()
    other = world.connect("c")
    with pytest.raises(PeerRefusedError, match="fenced"):
        other.ask("group.delete", {"group_id": GROUP.hex()})
    own = world.connect("a")
    assert own.ask("group.delete", {"group_id": GROUP.hex()}) == {}
    assert not (world.paths.store / GROUP.hex()).exists()
    with pytest.raises(PeerRefusedError, match="not-found"):
        own.ask("group.delete", {"group_id": GROUP.hex()})
    with pytest.raises(NotFoundError):
        world.control.call("epoch_state", group_id=GROUP.hex())


def test_a_group_that_is_given_up_is_not_missed(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(2))
    client.wait(2)
    group = {"group_id": GROUP.hex()}
    with pytest.raises(PeerRefusedError, match="fenced"):
        world.connect("c").ask("group.unprotect", group)
    with pytest.raises(StateError, match="not given it up"):
        world.control.call("delete_unprotected", **group)
    own = world.connect("a")
    assert own.ask("group.unprotect", group) == {}
    while not isinstance(client.take(), m.Bye):
        pass
    world.restart()
    status = world.status()
    assert (status["state"], status["conditions"]) == ("offline", ["unprotected"])
    answer = {"roles": {"target": True}, "groups": {"shop": {"role": "target", **status}}}
    assert verdict(answer, StatusConfig()) == (WELL, [])
    with StoreReader(world.paths.store, GROUP) as reader:
        assert reader.durable == Position(1, 0, 2)
    # Its source was cut off before it forgot the group, and goes on.
    Client(world, feed=records.Feed(seq=2)).open()
    assert world.status()["conditions"] == []
    world.connect("a").ask("group.unprotect", group)
    world.control.call("delete_unprotected", **group)
    assert not (world.paths.store / GROUP.hex()).exists()
    assert world.control.call("status")["groups"] == {}


def test_what_was_taken_over_is_not_given_up(world: World) -> None:
    client = Client(world).start()
    client.send(client.feed.writes(2))
    client.wait(2)
    group = {"group_id": GROUP.hex()}
    world.connect("a").ask("group.unprotect", group)
    ours = bytes.fromhex(world.b.site_id)
    raised = world.door.raise_epoch(writer=ours)
    with pytest.raises(StateError, match="under way"):
        world.control.call("delete_unprotected", **group)
    world.door.roll_back(raised.epoch)
    assert world.status()["conditions"] == ["unprotected"]  # as before: nobody came back
    world.door.accept(world.door.raise_epoch(writer=ours).epoch)
    with pytest.raises(StateError, match="not given it up"):
        world.control.call("delete_unprotected", **group)
    world.restart()
    assert "unprotected" not in world.status()["conditions"]
    with StoreReader(world.paths.store, GROUP) as reader:
        assert reader.durable == Position(1, 0, 2)


# ---- what a site may say, and when ------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../etc/x", "/etc/x", "..", "a/b", ".hidden", "a\nb"])
def test_names_that_could_leave_a_directory_are_refused(world: World, name: str) -> None:
    disks = [m.DiskInfo(index=0, name=name, size=records.DISK_BYTES)]
    with pytest.raises(RefusedByTarget, match="invalid"):
        Client(world, disks=disks).open()
    with pytest.raises(RefusedByTarget, match="invalid"):
        GroupNamed(world, name).open()
    assert not list(world.paths.store.glob("*/manifest-*"))


def test_a_manifest_with_such_a_name_is_damaged(world: World) -> None:
    from dataclasses import replace

    Client(world).start().transport.close()
    world.target.close()
    with GroupStore.open(world.paths.store, GROUP) as store:
        evil = replace(store.disks[0], name="../../outside")
        store._lease.publish(disks=(evil,))
    with pytest.raises(CorruptError, match="outside"):
        StoreReader(world.paths.store, GROUP)


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


# ---- signs of life -----------------------------------------------------------------------


def source_of(world: World) -> dict[str, Any]:
    return dict(world.door.state()["source"])


def wait_gone(world: World) -> None:
    """Until the source was silent for long; never before it was."""
    began = time.monotonic()
    while source_of(world)["gone_in_s"]:
        assert time.monotonic() - began < WAIT_S
        time.sleep(0.01)


def guest(client: Client, clients: int) -> None:
    """A report, and a record behind it that shows when it has arrived."""
    client.transport.send(
        m.Status(time_ns=time.time_ns(), state="replicating", values={"clients": clients}), CHANNEL
    )
    client.send(client.feed.writes(1))
    client.wait(client.feed.seq)


def test_a_source_that_was_cut_off_is_not_gone_at_once(world: World) -> None:
    client = Client(world).start()
    guest(client, 1)
    client.transport.stream.close()
    while world.control.call("sessions"):
        time.sleep(0.005)
    cut = source_of(world)
    assert (cut["connected"], cut["guest_clients"]) == (False, 1)
    assert 0 < cut["gone_in_s"] <= GONE_S
    wait_gone(world)
    assert source_of(world)["silent_s"] >= GONE_S


def test_a_target_that_has_just_started_knows_of_no_source(world: World) -> None:
    Client(world).start()
    wait_gone_since = time.monotonic()
    world.restart()
    fresh = source_of(world)
    assert fresh["gone_in_s"] > 0
    assert (fresh["guest_clients"], fresh["silent_s"]) == (None, None)
    wait_gone(world)
    assert time.monotonic() - wait_gone_since >= GONE_S
    world.target.close()
    assert source_of(world)["gone_in_s"] is None  # nobody listens


def test_a_source_that_tries_or_reports_is_heard(world: World) -> None:
    client = Client(world).start()
    guest(client, 2)
    world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id))
    wait_gone(world)
    with pytest.raises(RefusedByTarget, match="fenced"):
        Client(world, feed=records.Feed(seq=1)).open()
    refused = source_of(world)
    assert refused["gone_in_s"] > 0
    assert refused["guest_clients"] == 2  # what it said last
    wait_gone(world)
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


def test_a_report_counts_beside_a_session_that_died_unnoticed(world: World) -> None:
    client = Client(world).start()
    guest(client, 1)
    wait_gone(world)
    paused = {"group_id": GROUP.hex(), "state": "paused", "clients": 2}
    world.connect("a").ask("group.report", paused)
    for _ in range(2):
        heard = source_of(world)
        assert heard["gone_in_s"] > 0
        assert (heard["state"], heard["guest_clients"]) == ("paused", 2)
        client.transport.stream.close()  # now it is noticed
        while world.control.call("sessions"):
            time.sleep(0.005)


def test_a_source_that_is_refused_is_heard(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    Client(world).start().transport.close()
    wait_gone(world)
    with pytest.raises(RefusedByTarget, match="do not belong together"):
        Client(world, lanes=[m.LaneOffer(lane=1, durable_seq=0, oldest_seq=1, newest_seq=0)]).open()
    assert source_of(world)["gone_in_s"] > 0
    wait_gone(world)

    def unreadable(_host: GroupHost) -> None:
        raise StorageError("Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(GroupHost, "load", unreadable)
        with pytest.raises(RefusedByTarget, match="busy"):
            Client(world).open()
    assert source_of(world)["gone_in_s"] > 0
    wait_gone(world)
    report = {"group_id": GROUP.hex(), "state": "error", "clients": 1}
    world.connect("a").ask("group.report", report)
    assert source_of(world)["guest_clients"] == 1


def test_the_site_that_took_over_says_that_the_old_source_lives(world: World) -> None:
    client = Client(world).start()
    guest(client, 1)
    wait_gone(world)
    assert "old-source-alive" not in world.status()["conditions"]
    raised = world.door.raise_epoch(writer=bytes.fromhex(world.b.site_id))
    world.door.accept(raised.epoch)
    wait_gone(world)
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
    wait_gone(world)
    assert "old-source-alive" not in world.status()["conditions"]


def test_a_site_that_never_wrote_the_group_does_not_count(world: World) -> None:
    Client(world).start().transport.close()
    wait_gone(world)
    with pytest.raises(RefusedByTarget, match="not-allowed"):
        Client(world, name="c").open()
    with pytest.raises(PeerRefusedError, match="fenced"):
        world.connect("c").ask(
            "group.report", {"group_id": GROUP.hex(), "state": "paused", "clients": 1}
        )
    assert source_of(world)["gone_in_s"] == 0
