"""Which groups a target remembers: those of which something is stored, and no others, whoever
names what, and however those who name it meet."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from target_world import CHANNEL, GROUP, WAIT_S, Client, RefusedByTarget, World, records

from vrep.target.hosts import GroupHosts
from vrep.target.receive import GroupHost, RefusedError
from vrep.wire import messages as m


def refused(world: World, **offer: Any) -> str:
    client = Client(world)
    client.offer.update(offer)
    return refused_by(client)


def refused_by(client: Client) -> str:
    with pytest.raises(RefusedByTarget) as error:
        client.open()
    return error.value.message.code


def nothing_is_known(world: World) -> bool:
    return not world.control.call("status")["groups"] and not list(world.paths.store.glob("*"))


def test_groups_that_were_refused_are_not_remembered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("invalid", {"name": "../shop"}),
        ("invalid", {"name": "shop@1"}),
        ("invalid", {"disks": [m.DiskInfo(index=0, name="../root", size=1 << 20)]}),
        ("invalid", {"disks": [m.DiskInfo(index=0, name="root", size=1000)]}),
    ]
    for number, (code, offer) in enumerate(wrong):
        group_id = bytes([number]) * 16
        assert refused(world, group_id=group_id, **offer) == code, offer
        assert nothing_is_known(world), offer
    with monkeypatch.context() as patch:
        patch.setattr("vrep.target.files.Files.write", _no_room)
        assert refused(world, group_id=b"f" * 16) == "full"
    assert nothing_is_known(world)
    # What is remembered is no more than that: the next offer of such an id is as good as any.
    Client(world, group_id=bytes(16)).open()
    assert list(world.control.call("status")["groups"]) == [bytes(16).hex()]
    assert refused(world, group_id=bytes(16), disks=[m.DiskInfo(index=0, name="x", size=4096)])
    assert list(world.control.call("status")["groups"]) == [bytes(16).hex()]


def _no_room(*_arguments: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_store_that_cannot_be_read_is_remembered(world: World) -> None:
    Client(world).open()
    world.target.close()
    (newest,) = sorted(world.paths.store.glob("*/manifest-*"))[-1:]
    newest.write_bytes(b"")
    world.restart()
    for _ in range(2):
        assert refused(world) == "damaged"
        assert world.status()["conditions"] == ["damaged"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_refusal_takes_no_host_from_another_session(
    world: World, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Two open one group at once. The one is refused `before` the store of the other is there, or
    `after` its session is open; either holds the host at that moment."""
    both = threading.Barrier(2)
    may_open, may_leave, left = (threading.Event() for _ in range(3))
    real = GroupHost.open_session
    hosts: list[GroupHost] = []

    def open_session(host: GroupHost, transport: Any, channel: int, message: m.OpenGroup) -> Any:
        hosts.append(host)
        both.wait(WAIT_S)
        if message.name == "wrong":
            assert may_leave.wait(WAIT_S)
            raise RefusedError("invalid", "that is wrong")
        assert may_open.wait(WAIT_S)
        return real(host, transport, channel, message)

    monkeypatch.setattr(GroupHost, "open_session", open_session)
    one, other = Client(world, name="a"), Client(world, name="c")
    one.offer["name"] = "wrong"
    other.transport.send(_offer(other), CHANNEL)

    def try_wrong() -> None:
        assert refused_by(one) == "invalid"
        left.set()

    thread = threading.Thread(target=try_wrong)
    thread.start()
    for event in (may_leave, may_open) if when == "before" else (may_open, may_leave):
        event.set()
        if event is may_leave:
            assert left.wait(WAIT_S)
        else:
            assert isinstance(other.transport.expect(WAIT_S).message, m.GroupOpened)
    thread.join(WAIT_S)
    assert hosts[0] is hosts[1]
    assert world.status()["source"]["connected"]
    other.announce()
    other.send(other.feed.writes(3))
    other.wait(3)
    monkeypatch.setattr(GroupHost, "open_session", real)
    assert Client(world, name="c").open().lanes[0].durable.seq == 3


def _offer(client: Client) -> m.OpenGroup:
    epoch = client.feed.epoch
    return m.OpenGroup(
        group_id=GROUP,
        name="shop",
        epoch=m.EpochInfo(counter=epoch.epoch, id=epoch.epoch_id),
        disks=[m.DiskInfo(index=0, name="root", size=records.DISK_BYTES)],
        lanes=[m.LaneOffer(durable_seq=0, oldest_seq=1, newest_seq=0)],
        wrapped_keys=[b"wrapped"],
    )


def test_who_meets_in_any_order_has_one_host_and_leaves_none() -> None:
    """Many threads use a few ids, some of which get a store: never two hosts of one id at once,
    and at the end those that have one are known."""

    class Host:
        def __init__(self, group_id: bytes) -> None:
            self.group_id, self.name, self.vacant = group_id, "", True

    hosts = GroupHosts(Host)  # type: ignore[arg-type]
    in_use: dict[bytes, list[Any]] = {}
    lock = threading.Lock()
    wrong: list[bytes] = []

    def work(number: int) -> None:
        for turn in range(400):
            group_id = bytes([(turn * 7 + number) % 3]) * 16
            with hosts.use(group_id) as host:
                with lock:
                    others = in_use.setdefault(group_id, [])
                    wrong.extend(group_id for other in others if other is not host)
                    others.append(host)
                if group_id[0] == 1 and turn > 200:
                    host.vacant = False  # type: ignore[misc]  # a store was made
                with lock:
                    others.remove(host)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert {host.group_id[0] for host in hosts.all()} == {1}
    assert not hosts._users
