"""The target over real TLS: sessions, acknowledgements, what is kept, and who is refused."""

from __future__ import annotations

import contextlib
import errno
import time
from pathlib import Path
from typing import Any

import pytest
from target_world import (
    CHANNEL,
    GROUP,
    WAIT_S,
    Client,
    GroupNamed,
    RefusedByTarget,
    World,
    content,
    records,
    trust,
)

from vrep._core import layout
from vrep.errors import (
    CorruptError,
    NotFoundError,
    StateError,
    VrepError,
)
from vrep.keys import SiteIdentity
from vrep.settings import StatusConfig
from vrep.status import WELL, verdict
from vrep.target.manifest import Position
from vrep.target.store import GroupStore, StoreReader
from vrep.wire import messages as m
from vrep.wire.peers import PeerRegistry
from vrep.wire.site import connect
from vrep.wire.transport import PeerRefusedError


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


def test_a_history_that_was_repaired_is_compared_or_not_gone_on_with(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that does not know the word would end the gap of the repair with one of its own."""
    assert Client(world).open().compare is m.UNSET
    monkeypatch.setattr(GroupStore, "salvaged", True)
    assert Client(world).open().compare is True
    monkeypatch.setattr(m, "FEATURES", (m.FEATURE_HASHES,))
    with pytest.raises(RefusedByTarget, match="version"):
        Client(world).open()


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
    # Its session ends on the thread of its connection, behind the word that the client has heard.
    deadline = time.monotonic() + WAIT_S
    while world.status()["sessions"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not world.status()["source"]["connected"]


def test_a_site_that_never_joined_gets_nothing(world: World, tmp_path: Path) -> None:
    stranger = SiteIdentity.create(tmp_path / "stranger", "stranger")
    trust(tmp_path / "stranger", world.b)
    peer = PeerRegistry(tmp_path / "stranger").get("b")
    with pytest.raises(VrepError), connect(stranger, peer, address=world.target.address) as link:
        link.expect(WAIT_S)
    assert not world.paths.store.exists()


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


@pytest.mark.parametrize("ahead_s", [400, -400, 10**8])
def test_clocks_that_differ_are_told(world: World, ahead_s: int) -> None:
    """Also while history is kept to a window, which does not depend on them."""
    client = Client(world, window="60s").start()
    client.send(client.feed.writes(1))
    client.wait(1)
    for ahead, shown in ((ahead_s, True), (1, False), (ahead_s, True)):
        now_ns = time.time_ns() + ahead * 10**9
        client.transport.send(m.Status(time_ns=now_ns, state="replicating", values={}), CHANNEL)
        deadline = time.monotonic() + 20
        while ("clocks-apart" in world.status()["conditions"]) is not shown:
            assert time.monotonic() < deadline
        client.send(client.feed.writes(1))
        client.wait(client.feed.seq)
        assert ("clocks-apart" in client.ack.conditions) is shown
        assert world.status()["oldest"] == "1/0/1"


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
    assert "0 bytes are free" in world.status()["error"]
    monkeypatch.undo()
    client.wait(2)
    while client.ack.conditions:
        client.take()
    assert world.status()["error"] == ""


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
    # A session is refused while the store is full, which it is until it has tried again.
    deadline = time.monotonic() + WAIT_S
    while world.status()["full"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
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
