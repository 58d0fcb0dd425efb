"""A planned move: the epoch is raised behind a halted guest's last change, or not at all."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from target_world import CHANNEL, Client, RefusedByTarget, World

from vrep._core import layout
from vrep.errors import BusyError, GapError, StateError
from vrep.groups import DiskDefinition, GroupDefinition, GroupDirectory
from vrep.source.halt import Halt, go_on
from vrep.target import halts
from vrep.target.manifest import Position
from vrep.wire import messages as m

OURS = b"t" * 16
LAST = Position(1, 0, 5)
"""of a source that sent what `sending` sends"""


class Asked:
    """A command at the target, on a thread of its own."""

    def __init__(self, world: World, *, pause: bool = True) -> None:
        self.found: Any = None

        def ask() -> None:
            try:
                self.found = world.door.halt(pause=pause)
            except Exception as error:  # noqa: BLE001 - looked at by the test
                self.found = error

        self._thread = threading.Thread(target=ask)
        self._thread.start()

    def join(self) -> Any:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.found


def request(client: Client) -> m.Request:
    while not isinstance(message := client.take(), m.Request):
        pass
    return message


def halted(world: World, client: Client, head: int) -> Position:
    """Halt the guest of a source whose last change is `head`."""
    asked = Asked(world)
    question = request(client)
    assert (question.method, question.params) == ("group.halt", {"pause": True})
    client.transport.post(m.Response(id=question.id, result={"head": head}))
    found = asked.join()
    assert found == Position(1, 0, head)
    return Position(*found)


def sending(world: World, count: int = 3) -> Client:
    client = Client(world).start()
    client.send(
        client.feed.mark_gap(layout.KIND_GAP_BEGIN) + client.feed.mark_gap(layout.KIND_GAP_END)
    )
    client.send(client.feed.writes(count))
    client.wait(count + 2)
    return client


def test_an_epoch_is_raised_behind_the_last_change_or_not_at_all(world: World) -> None:
    client = sending(world)
    with pytest.raises(StateError, match="not halted"):
        world.door.raise_moved(OURS, Position(1, 0, 6))
    halted(world, client, 6)  # one change is on its way
    with pytest.raises(StateError, match="last change is 1/0/6"):
        world.door.raise_moved(OURS, Position(1, 0, 6))
    assert [e["epoch"] for e in world.door.state()["epochs"]] == [1]
    again = Client(world, feed=client.feed).start()  # its session was ended: it goes on
    with pytest.raises(StateError, match="not halted"):
        world.door.raise_moved(OURS, Position(1, 0, 6))
    again.send(again.feed.writes(1))
    again.wait(6)
    halted(world, again, 6)
    assert world.door.keep_halted() == Position(1, 0, 6)
    with pytest.raises(StateError, match="last change is 1/0/6, and not 1/0/5"):
        world.door.raise_moved(OURS, LAST)
    raised = world.door.raise_moved(OURS, Position(1, 0, 6))
    assert raised.parent == Position(1, 0, 6)
    assert world.door.raise_moved(OURS, Position(1, 0, 6)) == raised  # its answer was lost
    with pytest.raises(RefusedByTarget, match="fenced"):
        again.take()


def test_an_epoch_at_another_point_is_not_the_moves(world: World) -> None:
    """Another command took the group over at a point, while the move waited."""
    client = sending(world)
    halted(world, client, 5)
    world.door.raise_epoch(writer=OURS, parent=Position(1, 0, 4))
    with pytest.raises(StateError, match="not halted"):
        world.door.raise_moved(OURS, LAST)


def test_a_new_session_voids_a_halt(world: World) -> None:
    client = sending(world)
    halted(world, client, 5)
    Client(world, feed=client.feed).open()
    with pytest.raises(StateError, match="not halted"):
        world.door.keep_halted()
    with pytest.raises(StateError, match="not halted"):
        world.door.raise_moved(OURS, LAST)


def test_a_halt_that_nobody_renews_lapses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halts, "RENEW_S", 0.3)
    client = sending(world)
    halted(world, client, 5)
    time.sleep(0.4)
    with pytest.raises(StateError, match="not halted"):
        world.door.raise_moved(OURS, LAST)
    world.control.call("reload")  # its own look at the groups
    assert request(client).method == "group.go-on"
    halted(world, client, 5)
    world.door.go_on()
    assert request(client).method == "group.go-on"


def test_what_the_source_refuses_is_told(world: World) -> None:
    client = sending(world)
    for code, kind in (("busy-error", BusyError), ("gap-error", GapError), ("else", StateError)):
        asked = Asked(world, pause=False)
        question = request(client)
        assert question.params == {"pause": False}
        client.transport.post(m.Response(id=question.id, error=code, text="because"))
        assert isinstance(asked.join(), kind)
    with pytest.raises(StateError, match="not halted"):
        world.door.raise_moved(OURS, LAST)
    client.transport.send(m.Bye(), CHANNEL)
    while world.status()["sessions"]:
        time.sleep(0.01)
    with pytest.raises(StateError, match="not connected"):
        world.door.halt(pause=True)


# ---- at the source ---------------------------------------------------------------------


class Filter:
    """What a filter answers, and what it was told."""

    def __init__(self, groups: GroupDirectory) -> None:
        self.known = {"clients": 0, "gap": False, "unshipped_bytes": 0, "unverified": "", "head": 7}
        self.told: list[bool] = []
        self.groups = groups
        self.failure: Exception | None = None

    def call(self, method: str, **params: Any) -> Any:
        if method == "status":
            return dict(self.known)
        assert method == "pause_guest"
        if params["paused"]:
            assert self.groups.load("web").halted  # durable before the guest notices
            if self.failure is not None:
                raise self.failure
        self.told.append(params["paused"])
        return {}


@pytest.fixture
def groups(tmp_path: Path) -> GroupDirectory:
    groups = GroupDirectory(tmp_path)
    groups.store(
        GroupDefinition(
            version=1,
            group_id="11" * 16,
            name="web",
            disks=(DiskDefinition("root", "file:/srv/web.raw", 4096, 0),),
            to_site="22" * 16,
            key="acme",
            tenant_key_id="",
            epoch=1,
            epoch_id="33" * 16,
            wrapped_keys=(),
            created=0.0,
        )
    )
    return groups


def test_a_guest_is_halted_when_all_of_it_is_recorded(groups: GroupDirectory) -> None:
    control: Any = Filter(groups)
    halt = Halt("web", groups, control, None)  # type: ignore[arg-type]
    control.known["clients"] = 2
    with pytest.raises(BusyError, match="2 client"):
        halt.stop(pause=False)
    for name, value in (("gap", True), ("unshipped_bytes", 4096), ("unverified", "size")):
        before = dict(control.known)
        control.known[name] = value
        with pytest.raises(GapError):
            halt.stop(pause=True)
        control.known = before
    assert not groups.load("web").halted
    assert halt.stop(pause=True) == {"head": 7}
    assert groups.load("web").halted
    assert halt.go_on() == {}
    assert not groups.load("web").halted
    assert control.told == [True, False]
    control.failure = StateError("the filter fails")
    with pytest.raises(StateError, match="the filter fails"):
        halt.stop(pause=True)
    assert not groups.load("web").halted
    assert control.told == [True, False, False]
    halt.close()
    with pytest.raises(StateError, match="ended"):
        halt.stop(pause=True)
    assert not groups.load("web").halted


def test_a_guest_that_another_rule_pauses_stays_paused(groups: GroupDirectory) -> None:
    control: Any = Filter(groups)
    options = groups.load("web").options
    groups.update("web", halted=True, fenced=True, options=type(options)(on_fence="pause"))
    go_on(groups, control, "web")
    assert control.told == []
    assert not groups.load("web").halted
