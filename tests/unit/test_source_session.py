"""The source's session of a group: what ends an attempt never ends the session."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
from group_definition import definition

from vrep import status
from vrep.control import ControlClient
from vrep.errors import ConfigError, FencedError, NotFoundError, PeerError, StorageError
from vrep.groups import DiskDefinition, GroupDefinition, GroupDirectory, GroupOptions
from vrep.keys.identity import SiteIdentity
from vrep.keys.tenant import TenantKeyring
from vrep.paths import SitePaths
from vrep.settings import SourceConfig, load_config
from vrep.source import daemon, holder, session, spiller
from vrep.source.feed import Feed
from vrep.source.holder import SealKeys
from vrep.source.lost import ranges_lost
from vrep.source.session import BACKOFF_MAX_S, GroupSession
from vrep.source.ship import BUFFER_BYTES
from vrep.source.spill import Spill
from vrep.source.spiller import Spiller
from vrep.wire import messages as m
from vrep.wire.peers import PeerRegistry
from vrep.wire.stream import ConnectionLostError

WAIT_S = 20.0


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SitePaths:
    paths = SitePaths(tmp_path / "a")
    SiteIdentity.create(paths.root, "a")
    GroupDirectory(paths.root).store(definition())
    for name in ("BACKOFF_FIRST_S", "BACKOFF_MAX_S", "FENCED_RETRY_S"):
        monkeypatch.setattr(session, name, 0.005)
    return paths


def make_session(paths: SitePaths, **options: Any) -> GroupSession:
    return GroupSession(
        "web",
        GroupDirectory(paths.root),
        SiteIdentity.load(paths.root),
        PeerRegistry(paths.root),
        TenantKeyring(paths.root),
        ControlClient(paths.socket("filter")),
        **options,
    )


class Link:
    """A connection to the target; what it is told, in the order in which all is done."""

    def __init__(self, done: list[Any]) -> None:
        self.done = done
        self.closed = threading.Event()

    def __call__(self, *_args: Any, **_options: Any) -> Link:
        return self

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def ask(self, method: str, params: dict[str, Any]) -> None:
        self.done.append((method, params["state"], params["clients"]))

    def close(self, _reason: str = "") -> None:
        self.closed.set()


@pytest.fixture
def done(paths: SitePaths, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the filter and told the target; two clients use the disks."""
    done: list[Any] = []

    def call(_client: ControlClient, method: str, **params: Any) -> Any:
        if method == "status":
            return {name: {"clients": 2} for name in ("web",)}
        done.append((method, params))
        return {}

    monkeypatch.setattr(ControlClient, "call", call)
    monkeypatch.setattr(PeerRegistry, "get", lambda _peers, _name: None)
    return done


def wait(test: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not test():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise error

    return fail


def test_a_disk_that_takes_nothing_does_not_end_a_fenced_session(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GroupSession, "_attempt", raising(FencedError("epoch 2 took over")))
    one = make_session(paths)
    groups = GroupDirectory(paths.root)
    with monkeypatch.context() as full:
        full.setattr("vrep.groups.write_atomic", raising(OSError(28, "No space left on device")))
        one.start()
        wait(lambda: one.view.attempts > 3)
        assert one.alive
        assert one.view.fenced
        assert "took over" in one.view.error
        assert not groups.load("web").fenced
    wait(lambda: groups.load("web").fenced)  # there is room again
    one.stop()
    assert not one.alive


def test_what_the_target_said_does_not_outlive_its_connection(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def attempt(self: GroupSession, _definition: GroupDefinition) -> None:
        if ended.is_set():
            raise StorageError("no connection")
        self.view.connected, self.view.conditions = True, ["target-full"]
        ended.set()
        raise StorageError("it was cut")

    monkeypatch.setattr(GroupSession, "_attempt", attempt)
    one = make_session(paths)
    one.start()
    wait(lambda: one.view.attempts > 1)
    assert (one.view.connected, one.view.conditions) == (False, [])
    one.stop()


def test_a_source_that_cannot_even_connect_says_that_it_lives(
    paths: SitePaths, done: list[Any]
) -> None:
    """Its key is gone, its VM writes."""
    one = make_session(paths, connect_peer=Link(done))
    one.start()
    wait(lambda: len(done) > 1)
    assert "acme" in one.view.error
    one.stop()
    assert set(done) == {("group.report", "error", 2)}


def test_a_vm_is_paused_before_the_fence_is_told(
    paths: SitePaths, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    GroupDirectory(paths.root).update("web", options=GroupOptions(on_fence="pause"))
    monkeypatch.setattr(PeerRegistry, "get", lambda _peers, _name: mock.Mock())
    monkeypatch.setattr(holder, "RingHold", mock.Mock())
    monkeypatch.setattr(SealKeys, "open", mock.Mock())
    monkeypatch.setattr(GroupSession, "_open", raising(FencedError("epoch 2 took over")))
    one = make_session(paths, connect_peer=Link(done))
    one.start()
    wait(lambda: len(done) > 1)
    one.stop()
    paused = ("pause_guest", {"group": "web", "paused": True})
    assert done[:2] == [paused, ("group.report", "fenced", 2)]
    assert GroupDirectory(paths.root).load("web").fenced


def test_a_report_that_is_not_answered_is_cut_off_by_the_end(
    paths: SitePaths, done: list[Any]
) -> None:
    class Deaf(Link):
        def ask(self, method: str, params: dict[str, Any]) -> None:
            super().ask(method, params)
            if not self.closed.wait(WAIT_S):
                raise AssertionError("nobody cut it off")
            raise StorageError("closed")

    GroupDirectory(paths.root).update("web", paused=True)
    one = make_session(paths, connect_peer=Deaf(done))
    one.start()
    wait(lambda: done)
    one.stop()
    assert not one.alive
    assert ControlClient(paths.socket("source")).timeout > session.STOP_S


def test_a_source_counts_as_gone_after_its_longest_pause(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"[target]\nsource_gone_s = {BACKOFF_MAX_S}\n")
    with pytest.raises(ConfigError, match="source_gone_s"):
        load_config(file)


def pauses(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch, attempts: list[tuple[bool, bool]]
) -> list[float]:
    """How long a session waits after each of the attempts, of which is told whether the target
    opened the group and whether it then held more than before."""
    monkeypatch.setattr(session, "BACKOFF_FIRST_S", 0.2)
    monkeypatch.setattr(session, "BACKOFF_MAX_S", 15.0)
    monkeypatch.setattr(session.random, "uniform", lambda _low, high: high)
    one, waits = make_session(paths), []
    left = list(attempts)

    def attempt(_definition: GroupDefinition) -> None:
        one._opened, one._replicated = left.pop(0)
        raise PeerError("cut")

    def wait_s(limit_s: float) -> bool:
        waits.append(limit_s)
        if not left:
            one._stopping.set()
        return True

    monkeypatch.setattr(one, "_attempt", attempt)
    monkeypatch.setattr(one._nudge, "wait", wait_s)
    one._loop()
    return waits


def test_pauses_grow_while_nobody_is_reached_and_end_with_what_was_reached(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody, opened, went_on = (False, False), (True, False), (True, True)
    assert pauses(paths, monkeypatch, [nobody] * 9) == pytest.approx(
        [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 15.0, 15.0]
    )
    # The pause after a session that got somewhere is not that of the failures before it.
    assert pauses(paths, monkeypatch, [*[nobody] * 9, went_on, nobody])[-2:] == [0.2, 0.4]
    # A target that can be reached at moments is tried often enough to be met in the next one.
    assert pauses(paths, monkeypatch, [*[nobody] * 9, opened, opened, nobody])[-3:] == [1, 1, 2]


def test_what_shipped_is_freed_with_its_attempt(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has two buffers of 33 MiB, which all attempts share, and all that a connection has: links
    that flap for hours must not pile that up until a collector of rings comes."""
    made: list[Any] = []

    class Failing:
        bytes_sent = records_sent = 0

        def __init__(self, *args: Any) -> None:
            made.append((weakref.ref(self), args[-2]))

        def open_stream(self, _stream: Any) -> None:
            pass

        def run(self) -> None:
            raise PeerError("cut")

        def stop(self) -> None:
            pass

        def join(self) -> None:
            pass

    def listen(one: GroupSession, *_args: Any) -> None:
        wait(lambda: not [t for t in threading.enumerate() if t.name == "ship:web"])
        raise ConnectionLostError("shipping failed")

    monkeypatch.setattr(session, "Shipper", Failing)
    monkeypatch.setattr(session, "Sealer", mock.Mock())
    monkeypatch.setattr(GroupSession, "_listen", listen)
    monkeypatch.setattr(GroupSession, "_settle", lambda *_, **_options: None)
    monkeypatch.setattr(session, "stream_of", lambda *_: None)
    one = make_session(paths)
    gc.disable()
    try:
        for _ in range(3):
            opened = mock.Mock(lanes=[mock.Mock(points=None, durable=mock.Mock(seq=0))])
            opened.conditions = []
            transport = mock.Mock(peer_features=frozenset())
            try:
                one._replicate(
                    transport, mock.Mock(), mock.Mock(), definition(), mock.Mock(), opened
                )
            except PeerError as error:
                assert "cut" in str(error)  # noqa: PT017 - what pytest keeps of it would live on
            else:
                raise AssertionError("it did not end")
        left = [gone() for gone, _ in made]
    finally:
        gc.enable()
    assert left == [None] * 3
    assert len({id(buffers) for _, buffers in made}) == 1
    assert [len(each) for each in made[0][1]] == [BUFFER_BYTES] * 2


class Hold:
    """A ring of a filter that may end."""

    made: ClassVar[list[Hold]] = []

    def __init__(self, *_args: Any) -> None:
        self.reader = mock.Mock(released=0)
        self.is_alive = True
        self.made.append(self)

    def alive(self) -> bool:
        return self.is_alive

    def jumps(self, _after: int) -> bool:
        return False

    def status(self) -> dict[str, int]:
        return {"acknowledged": 0, "ring_free_bytes": 1, "ring_bytes": 1}

    def close(self) -> None:
        self.is_alive = False


def test_a_filter_that_restarts_while_the_source_connects_is_held_at_once(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch, done: list[Any]
) -> None:
    """To connect may take long, and so may the pause after it: what the new ring cannot keep is
    spilled all the same, and the session then goes on with that ring."""
    connecting, go_on, used = threading.Event(), threading.Event(), []

    def connect(*_args: Any, **_options: Any) -> Link:
        connecting.set()
        go_on.wait(3 * WAIT_S)  # longer than the test waits for the other ring
        return Link(done)

    def open_group(_one: Any, _transport: Any, hold: Hold, *_args: Any) -> None:
        used.append(hold)
        raise PeerError("that is all")

    monkeypatch.setattr(Hold, "made", [])
    monkeypatch.setattr(holder, "RingHold", Hold)
    monkeypatch.setattr(
        holder,
        "Feed",
        mock.Mock(
            side_effect=lambda ring, *_: mock.Mock(
                ring=mock.Mock(head=0, released=0), floor=0, keys=mock.Mock()
            )
        ),
    )
    monkeypatch.setattr(spiller, "RENEW_EVERY_S", 0.01)
    monkeypatch.setattr(SealKeys, "open", lambda *_: mock.Mock(generation=1))
    monkeypatch.setattr(GroupSession, "_open", open_group)
    monkeypatch.setattr(PeerRegistry, "get", lambda *_: mock.Mock(site_id="22" * 16))
    spill = Spill(paths.spill("web"), b"g" * 16, quota_bytes=1 << 20, reserve_bytes=0)
    one = make_session(paths, connect_peer=connect, spiller=Spiller("web", spill))
    one.start()
    try:
        assert connecting.wait(WAIT_S)
        assert len(Hold.made) == 1
        Hold.made[0].is_alive = False
        wait(lambda: len(Hold.made) == 2)
        spilled_from = one._spiller._work.hold if one._spiller and one._spiller._work else None
        go_on.set()
        wait(lambda: used)
        assert used[0] is Hold.made[1]
        assert spilled_from in (None, Hold.made[1])
    finally:
        go_on.set()
        one.stop()
    assert not one.alive


def test_a_session_that_died_is_begun_again(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GroupSession, "_loop", lambda _self: None)
    source = daemon.Source(paths)
    source.start()
    try:
        first = source._sessions["web"]
        wait(lambda: not first.alive)
        monkeypatch.setattr(GroupSession, "_loop", lambda self: self._stopping.wait())
        source._scan()
        assert source._sessions["web"] is not first
        assert source._sessions["web"].alive
        spilling = [each for each in threading.enumerate() if each.name == "spill:web"]
        assert len(spilling) == 1  # that of the first ended with it
    finally:
        source.close()


def test_what_was_spilled_is_shipped_after_spilling_was_switched_off(paths: SitePaths) -> None:
    source = daemon.Source(paths, SourceConfig(spill_bytes=0))
    assert source._spiller("web") == (None, "")
    directory = paths.spill("web")
    directory.mkdir()
    assert source._spiller("web") == (None, "")
    (directory / "spill-00000001").touch()
    spiller, problem = source._spiller("web")
    assert spiller is not None
    assert (spiller.spill.quota_bytes, problem) == (0, "")


def test_a_spill_that_cannot_be_opened_shows(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GroupSession, "_loop", lambda self: self._stopping.wait())
    (paths.groups / "web" / "spill").write_text("no directory")
    source = daemon.Source(paths)
    source.start()
    try:
        found = source._status({"group": "web"})["web"]["spill"]
        assert "spill" in found["full"]
        assert found["bytes"] == 0
        shown = status._protected(definition(), "b", None, source._status({})["web"], 0)
        assert "spill-full" in shown["conditions"]
    finally:
        source.close()


def test_a_spill_that_can_be_opened_later_is(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk was away when the source began; nothing else is begun again for it."""
    monkeypatch.setattr(GroupSession, "_loop", lambda self: self._stopping.wait())
    monkeypatch.setattr(daemon, "SPILL_AGAIN_S", 0.0)
    directory = paths.groups / "web" / "spill"
    directory.write_text("no directory")
    source = daemon.Source(paths)
    source.start()
    try:
        first = source._sessions["web"]
        source._scan()
        assert source._sessions["web"] is first
        assert source._status({})["web"]["spill"]["full"]
        directory.unlink()
        source._scan()
        second = source._sessions["web"]
        assert second is not first
        assert not first.alive
        assert second.alive
        assert second._spiller is not None
        assert "full" not in source._status({})["web"]["spill"]
        source._scan()
        assert source._sessions["web"] is second
    finally:
        source.close()


def test_a_status_does_not_wait_for_a_large_spill(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GroupSession, "_loop", lambda self: self._stopping.wait())
    reading, go_on = threading.Event(), threading.Event()

    def slow(_source: Any, _name: str) -> tuple[None, str]:
        reading.set()
        assert go_on.wait(WAIT_S)
        return None, ""

    source = daemon.Source(paths)
    monkeypatch.setattr(daemon.Source, "_spiller", slow)
    thread = threading.Thread(target=source._scan)
    thread.start()
    try:
        assert reading.wait(WAIT_S)
        assert source._status({}) == {}
        with pytest.raises(NotFoundError):
            source._status({"group": "web"})
        source.request_stop()
    finally:
        go_on.set()
        thread.join()
        source.close()
    assert source._sessions == {}


def test_two_who_change_a_definition_lose_nothing(paths: SitePaths) -> None:
    """`vrep pause` against an epoch that the source's process adopts."""
    first, second = (GroupDirectory(paths.root) for _ in range(2))
    turns = 60

    def adopt() -> None:
        for epoch in range(1, turns + 1):
            first.update("web", epoch=epoch)

    thread = threading.Thread(target=adopt)
    thread.start()
    for turn in range(turns):
        paused = turn % 2 == 0
        assert second.update("web", paused=paused).paused is paused
        assert second.load("web").paused is paused
    thread.join()
    assert second.load("web").epoch == turns


def test_what_changes_nothing_needs_no_lock(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a source whose disk takes nothing goes on replicating."""
    groups = GroupDirectory(paths.root)
    monkeypatch.setattr("vrep.groups._locked", raising(OSError(30, "Read-only file system")))
    assert groups.update("web", fenced=False) == groups.load("web")
    with pytest.raises(StorageError, match="Read-only"):
        groups.update("web", fenced=True)


def test_a_group_that_is_forgotten_is_not_written_back(
    paths: SitePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a source that is just noting an epoch."""
    groups = GroupDirectory(paths.root)
    write, forgets = GroupDirectory._write, []

    def slow(self: GroupDirectory, changed: GroupDefinition) -> None:
        forgets.append(threading.Thread(target=groups.forget, args=("web",)))
        forgets[0].start()
        forgets[0].join(0.2)  # it waits for this one
        write(self, changed)

    monkeypatch.setattr(GroupDirectory, "_write", slow)
    groups.update("web", epoch=2)
    forgets[0].join()
    assert list(groups.names()) == []


def test_a_group_that_is_gone_is_not_made_again_by_a_change(paths: SitePaths) -> None:
    groups = GroupDirectory(paths.root)
    (groups.path("web") / "group.json").unlink()
    with pytest.raises(NotFoundError):
        groups.update("web", paused=True)
    with pytest.raises(NotFoundError):
        groups.update("other", paused=True)
    assert list(groups.names()) == []


# ---- wrapped keys ----------------------------------------------------------------------


def test_the_keys_that_were_sent_are_noted_and_no_others(
    paths: SitePaths, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are replaced while the target is asked, which also gives a newer epoch: what it holds
    then is what it was sent. The session asks again at once, with the new ones."""
    groups = GroupDirectory(paths.root)
    groups.update("web", wrapped_keys=("old",))
    old = groups.load("web").keys_digest
    sent: list[tuple[str, ...]] = []
    noted: list[str] = []
    replicated = threading.Event()

    def opened(_self: Any, _link: Any, _hold: Any, _feed: Any, one: GroupDefinition) -> Any:
        sent.append(one.wrapped_keys)
        if len(sent) == 1:
            groups.update("web", wrapped_keys=("new",))
        return mock.Mock(epoch=m.EpochInfo(counter=2, id=b"\x44" * 16))

    def replicate(self: GroupSession, *_args: Any) -> None:
        noted.append(groups.load("web").keys_at_target)
        replicated.set()
        self._stopping.wait(WAIT_S)

    note = GroupSession._note_keys

    def noting(self: GroupSession, one: GroupDefinition) -> None:
        note(self, one)
        noted.append(groups.load("web").keys_at_target)

    monkeypatch.setattr(PeerRegistry, "get", lambda _peers, _name: mock.Mock())
    monkeypatch.setattr(holder, "RingHold", mock.Mock())
    monkeypatch.setattr(SealKeys, "open", mock.Mock())
    monkeypatch.setattr(GroupSession, "_open", opened)
    monkeypatch.setattr(GroupSession, "_note_keys", noting)
    monkeypatch.setattr(GroupSession, "_replicate", replicate)
    one = make_session(paths, connect_peer=Link(done))
    one.start()
    wait(replicated.is_set)
    new = groups.load("web").keys_digest
    assert sent == [("old",), ("new",)]
    assert noted == [old, new, new]
    # Replaced while it replicates: the session ends, to open again.
    link = one._transport
    assert isinstance(link, Link)
    one.reload()
    assert not link.closed.is_set()
    groups.update("web", wrapped_keys=("newer",))
    one.reload()
    assert link.closed.is_set()
    one.stop()


@pytest.mark.parametrize(
    ("durable", "compare", "lost", "steps"),
    [
        (40, False, None, ["stored"]),
        (40, True, None, ["all is unshipped", "spill cut at 0", "the ring is lost", "stored"]),
        (
            40,
            True,
            {0: [(65536, 4096)], 2: [(0, 512)]},
            ["(0, [(65536, 4096)])", "(2, [(0, 512)])", "spill cut at 0", "the ring is lost",
             "stored"],
        ),
        (40, True, {}, ["spill cut at 0", "the ring is lost", "stored"]),
        # It does not hold all that it acknowledged, so it cannot know what is lost.
        (
            39,
            True,
            {0: [(65536, 4096)]},
            ["spill cut at 0", "all is unshipped", "spill cut at 0", "the ring is lost", "stored"],
        ),
    ],
)  # fmt: skip
def test_what_was_spilled_never_follows_a_history_that_was_repaired(
    paths: SitePaths,
    durable: int,
    compare: bool,
    lost: dict[int, list[tuple[int, int]]] | None,
    steps: list[str],
) -> None:
    """A gap-end in it would end the gap of the repair. The target holds all that was acknowledged,
    or says that it does not: then what it lost is unshipped before anything is let go of, all of
    it where that is not known; and it outlives a power loss before anything is sent."""
    done: list[str] = []
    hold, spill = mock.Mock(), mock.Mock(after=40, last=90)
    hold.reader = mock.Mock(head=100, released=60)
    hold.status.return_value = {"acknowledged": 40}
    hold.resync_all.side_effect = lambda: done.append("all is unshipped")
    hold.compare.side_effect = lambda *what: done.append(str(what))
    hold.lose_ring.side_effect = lambda: done.append("the ring is lost")
    hold.await_marks.side_effect = lambda _stopping: done.append("stored")
    spill.cut.side_effect = lambda last: done.append(f"spill cut at {last}")
    feed = Feed(hold.reader, spill, None)
    one = make_session(paths)
    one._settle(hold, feed, durable, compare=compare, lost=lost)
    assert done == steps
    assert one.view.history_lost is compare
    known = lost is not None and durable == 40
    total = sum(size for parts in (lost or {}).values() for _at, size in parts)
    assert one.view.lost_bytes == (total if known else None)


def test_ranges_are_of_the_disks_as_they_are() -> None:
    """One that was made smaller since has less to compare; of an unknown disk nothing is known."""
    disks = (DiskDefinition("root", "file:a", 100, 0), DiskDefinition("data", "file:b", 50, 1))
    definition = mock.Mock(disks=disks)

    def said(*parts: tuple[int, int, int]) -> Any:
        ranges = [m.LostRange(disk=d, offset=o, length=n) for d, o, n in parts]
        return mock.Mock(lost=ranges)

    now = {"disks": {"root": 90}}
    parts = [(0, 0, 10), (0, 80, 1000), (0, 90, 5), (1, 40, 30)]
    assert ranges_lost(said(*parts), definition, now) == {0: [(0, 10), (80, 10)], 1: [(40, 10)]}
    assert ranges_lost(said(), definition, now) == {}
    assert ranges_lost(said((2, 0, 1)), definition, now) is None
    assert ranges_lost(mock.Mock(lost=m.UNSET), definition, now) is None
