"""A cut over lanes of several sites: when it is completed, and who makes it.

The filter and the other sites are played here: what each is asked, and in which order, is what
counts. Real ones are in `tests/e2e/test_hosts.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vrep import errors
from vrep.groups import VERSION, DiskDefinition, GroupDefinition, GroupDirectory
from vrep.lanes import lane_name, lane_of
from vrep.source.cutter import Cutter

SITES = ("a" * 32, "b" * 32, "c" * 32)


class Played:
    """The filter of site A, with lane 0, and the sites B and C, with a lane each."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails: dict[str, errors.VrepError] = {}
        self.heads = {0: 7, 1: 8, 2: 9}
        self.durable: dict[int, int] = {}
        self.gap_last = dict.fromkeys(self.heads, 1)
        self.gap = False
        self.completed = 101

    def _note(self, what: str) -> None:
        self.asked.append(what)
        if what in self.fails:
            raise self.fails[what]

    def call(self, method: str, timeout: float | None = None, **params: Any) -> Any:
        if method == "status":
            return {lane_name("web", 0): self.like(0)}
        self._note(method)
        if method == "cut_mark":
            return {"at": [[1, 0, 100]]}
        return {"at": params["at"], "seq": self.completed, "wall_ns": 5}

    def like(self, lane: int) -> dict[str, Any]:
        head = self.heads[lane]
        gap = self.gap and lane == 1
        return {
            "head": head, "durable": self.durable.get(lane, head), "gap": gap,
            "gap_last": self.gap_last[lane], "epoch": 1, "idle": False,
        }  # fmt: skip

    def host_of(self, site: str, tell: Callable[[], Mapping[str, Any]]) -> Any:
        return PlayedHost(self, SITES.index(site), tell)


class PlayedHost:
    error = ""

    def __init__(self, played: Played, lane: int, tell: Callable[[], Mapping[str, Any]]) -> None:
        self.played, self.lane, self.tell = played, lane, tell
        self.away = False

    def lanes(self) -> dict[str, Any]:
        like = self.played.like(self.lane)
        return {} if self.away else {lane_name("web", self.lane): like}

    def look(self) -> None:
        self.played.gap = False

    def hold(self, _group_id: str, _cut_id: bytes, lanes: list[int]) -> list[Any]:
        assert lanes == [self.lane]
        self.played._note(f"hold {self.lane}")
        return [(1, self.lane, 100 + self.lane)]

    def release(self, _group_id: str, _cut_id: bytes, lanes: list[int]) -> None:
        assert lanes == [self.lane]
        self.played._note(f"release {self.lane}")

    def stop(self) -> None: ...


@pytest.fixture
def groups(tmp_path: Path) -> GroupDirectory:
    made = GroupDirectory(tmp_path)
    definition = GroupDefinition(
        version=VERSION, group_id="1" * 28 + "0000", name="web@0",
        disks=(DiskDefinition("root", "file:/nowhere", 1 << 20, 0),),
        to_site="d" * 32, key="acme", tenant_key_id="00" * 8, epoch=1, epoch_id="2" * 32,
        wrapped_keys=(), created=0.0, lanes=(0, 1, 2), hosts=tuple(enumerate(SITES)), numbered=3,
    )  # fmt: skip
    made.store(definition)
    return made


def cutter(groups: GroupDirectory, played: Any, site: int = 0, **options: Any) -> Cutter:
    options = {"every_s": 1.0, "gone_s": 5.0, **options}
    made = Cutter("web", groups, played, site_id=SITES[site], host_of=played.host_of, **options)
    made._meet()
    return made


def test_the_others_hold_until_the_lanes_here_have_marked(groups: GroupDirectory) -> None:
    played = Played()
    made = cutter(groups, played).cut("now", try_s=0.0)
    assert sorted(played.asked[:2]) == ["hold 1", "hold 2"]
    assert played.asked[2] == "cut_mark"
    assert sorted(played.asked[3:5]) == ["release 1", "release 2"]
    assert played.asked[5:] == ["cut_complete"]
    assert sorted(made["at"]) == [(1, 0, 100), (1, 1, 101), (1, 2, 102)]
    assert made["completed"] == "web@0"


@pytest.mark.parametrize("what", ["hold 1", "hold 2", "cut_mark", "release 1", "release 2"])
def test_a_cut_in_which_one_did_not_hold_is_not_completed(
    groups: GroupDirectory, what: str
) -> None:
    played = Played()
    played.fails[what] = errors.PeerError("it is too late")
    with pytest.raises(errors.VrepError, match="too late"):
        cutter(groups, played).cut("now", try_s=0.0)
    assert "cut_complete" not in played.asked
    assert {"release 1", "release 2"} <= set(played.asked)  # nobody holds for nothing


def test_a_gap_that_has_ended_is_looked_at_again(groups: GroupDirectory) -> None:
    played = Played()
    played.gap = True
    assert cutter(groups, played).cut("now", try_s=0.0)["absent"] == []


def test_a_host_that_is_gone_is_left_out_in_the_end(groups: GroupDirectory) -> None:
    played, now = Played(), [0.0]
    made = cutter(groups, played, clock=lambda: now[0])
    made._hosts[SITES[1]].away = True  # type: ignore[attr-defined]
    with pytest.raises(errors.AgainError, match="lane 1"):
        made.cut("now", try_s=-1.0)
    now[0] = 5.0
    assert made.cut("now", try_s=0.0)["absent"] == [1]
    assert "hold 1" not in played.asked


def test_a_host_that_never_came_is_not_missed_and_one_that_came_is(groups: GroupDirectory) -> None:
    played, now = Played(), [0.0]
    groups.update("web@0", joining=(2,))
    made = cutter(groups, played, clock=lambda: now[0])
    absent = made._hosts[SITES[2]]
    absent.away = True  # type: ignore[attr-defined]
    with pytest.raises(errors.AgainError, match="lane 2"):  # it may come at once
        made.cut("now", try_s=-1.0)
    now[0] = 5.0
    assert made.tend()
    assert (made.view()["absent"], made.view()["joining"]) == ([], [2])
    assert [lane for _epoch, lane, _seq in made.cut("now", try_s=0.0)["at"]] == [1, 0]
    absent.away = False  # type: ignore[attr-defined]
    assert made.tend()
    assert (groups.load("web@0").joining, made.view()["joining"]) == ((), [])
    assert made.cut("both", try_s=0.0)["absent"] == []
    absent.away = True  # type: ignore[attr-defined]
    with pytest.raises(errors.AgainError, match="lane 2"):
        made.cut("now", try_s=-1.0)


def test_one_that_is_copied_for_the_first_time_is_in_no_cut(groups: GroupDirectory) -> None:
    """And stops none: until it is whole, from which moment on its gaps count."""
    played = Played()
    groups.update("web@0", joining=(1,))
    made = cutter(groups, played)
    for each in made._hosts.values():
        each.look = lambda: None  # type: ignore[method-assign]
    played.gap = True
    assert made.tend()
    assert played.asked.count("cut_complete") == 1
    assert "hold 1" not in played.asked
    assert groups.load("web@0").joining == (1,)
    played.gap = False
    assert made.tend()
    assert groups.load("web@0").joining == ()
    assert made.cut("now", try_s=0.0)["absent"] == []
    assert "hold 1" in played.asked
    played.gap = True
    with pytest.raises(errors.GapError):
        made.cut("now", try_s=0.0)


def test_who_does_not_lead_takes_nobody_in(groups: GroupDirectory) -> None:
    groups.update("web@0", joining=(2,))
    groups.update("web@0", hosts=((0, SITES[1]), (1, SITES[0]), (2, SITES[2])))
    made = cutter(groups, Played())
    assert made.tend()
    assert groups.load("web@0").joining == (2,)


def test_the_site_with_the_lowest_lane_leads(groups: GroupDirectory) -> None:
    now = [0.0]
    first = cutter(groups, Played(), 0, clock=lambda: now[0])
    assert first._leads()
    second = cutter(groups, Played(), 1, clock=lambda: now[0])
    whole = [[1, 0, 10], [1, 1, 11], [1, 2, 12]]
    newest = {"point": "pos:1/0/10", "wall_ns": 7}
    for now[0] in (1.0, 4.0, 8.0):
        assert not second._leads()
        second.looked(SITES[0], leads=True, whole=whole, newest=newest)
        second.looked(SITES[2], leads=True, whole=[], newest=None)  # which goes after it
    assert second.durable_at(1) == (1, 11)
    assert second.view()["newest"] == newest
    second.looked(SITES[0], leads=False, whole=[], newest=None)
    now[0] = 12.9
    assert not second._leads()
    now[0] = 13.0  # not heard for so long
    assert second._leads()


@pytest.mark.parametrize(("completed", "more"), [(101, False), (102, True)])
def test_what_was_written_before_the_completion_is_cut_again(
    groups: GroupDirectory, completed: int, more: bool
) -> None:
    """The completion stands behind a write that came after the mark: that write is in no cut, and
    a guest that writes no more must not leave it so."""
    played = Played()
    played.completed = completed
    made = cutter(groups, played)
    assert made.tend()
    played.heads = {0: completed, 1: 101, 2: 102}
    played.asked.clear()
    assert made.tend()
    assert ("cut_mark" in played.asked) is more


def test_cuts_that_are_void_are_tried_ever_later(groups: GroupDirectory) -> None:
    """Each holds guests for nothing, as where a host is too far away."""
    played = Played()
    played.fails["release 1"] = errors.PeerError("it is too late")
    made = cutter(groups, played)
    pauses = []
    for head in range(10):
        played.heads[0] = head
        assert not made.tend()
        pauses.append(made._void_pause_s(1.0))
    assert pauses[:4] == [0.2, 0.4, 0.8, 1.6]
    assert pauses[-1] == 30.0
    played.fails.clear()
    assert made.tend()
    played.fails["release 1"] = errors.PeerError("it is too late")
    played.heads[0] += 1
    assert not made.tend()
    assert made._void_pause_s(1.0) == 0.2


def cut_in_vain(groups: GroupDirectory, now: list[float]) -> tuple[Played, Cutter]:
    """A cutter that could not make a cut that it wanted."""
    played = Played()
    made = cutter(groups, played, clock=lambda: now[0])
    played.fails["hold 1"] = errors.PeerError("it is too late")
    assert not made.tend()
    assert "too late" in made.view()["error"]
    played.fails.clear()
    return played, made


def test_no_cut_is_missed_once_a_checkpoint_made_it(groups: GroupDirectory) -> None:
    now = [0.0]
    played, made = cut_in_vain(groups, now)
    made.cut("now", try_s=0.0)
    played.heads = {0: 101, 1: 101, 2: 102}  # the marks, and nothing behind them
    for _ in range(20):
        now[0] += 5.0
        assert made.tend()
    view = made.view()
    assert (view["made"], view["error"], view["stale"]) == (1, "", False)


def test_a_cut_that_is_wanted_and_not_made_is_missed(groups: GroupDirectory) -> None:
    now = [0.0]
    played, made = cut_in_vain(groups, now)
    played.fails["hold 1"] = errors.PeerError("it is too late")
    for _ in range(20):
        now[0] += 5.0
        assert not made.tend()
    assert made.view()["stale"]
    assert "too late" in made.view()["error"]


def test_a_lane_is_absent_until_it_is_served_again(groups: GroupDirectory) -> None:
    """Whoever makes the next cut, and when."""
    now = [0.0]
    played = Played()
    made = cutter(groups, played, clock=lambda: now[0])
    away = made._hosts[SITES[1]]
    away.away = True  # type: ignore[attr-defined]
    assert not made.tend()
    now[0] = 5.0
    assert made.tend()
    played.heads = {0: 101, 1: 8, 2: 102}  # the marks
    played.asked.clear()
    assert made.tend()
    assert (played.asked, made.view()["absent"]) == ([], [1])
    made._leads = lambda: False  # type: ignore[method-assign]
    away.away = False  # type: ignore[attr-defined]
    assert made.tend()
    assert (played.asked, made.view()["absent"]) == ([], [])


class TwoTargets(Played):
    """The filter of a site with lanes 0, 1 and 2, which go to several targets."""

    lacks = False
    """the record of a cut cannot be put for the second target"""

    def call(self, method: str, timeout: float | None = None, **params: Any) -> Any:
        if method == "status":
            return {lane_name("web", lane): self.like(lane) for lane in self.heads}
        self._note(method)
        self.params = params
        at = [[1, lane, head + 1] for lane, head in self.heads.items()]
        also = {name: self.heads[lane_of(name)] + 2 for name in params.get("also", ())}
        if self.lacks:
            also = {}
        for lane in self.heads:
            self.heads[lane] += 1 + (lane == 0) + (lane_name("web", lane) in also)
        return {"at": at, "seq": at[0][2] + 1, "also": also, "wall_ns": 5}


def two_targets(groups: GroupDirectory) -> GroupDefinition:
    """Lanes 1 and 2 go to another target than lane 0, whose definition is returned."""
    first = groups.update("web@0", hosts=())
    for lane, target in ((1, "e"), (2, "e")):
        name = lane_name("web", lane)
        groups.store(msgspec.structs.replace(first, name=name, to_site=target * 32))
    return first


def test_each_target_learns_of_a_cut_and_none_is_made_of_its_records(
    groups: GroupDirectory,
) -> None:
    first = two_targets(groups)
    played = TwoTargets()
    made = cutter(groups, played)
    assert made.tend()
    assert played.asked == ["cut"]
    assert (played.params["lanes"], played.params["also"]) == (
        ["web@0", "web@1", "web@2"],
        ["web@1"],
    )
    assert made.tend()
    assert played.asked == ["cut"]  # nothing was written since
    played.heads[2] += 1
    assert made.tend()
    assert played.asked == ["cut", "cut"]
    for name in ("web@1", "web@2"):
        groups.update(name, to_site=first.to_site)
    played.heads[2] += 1
    assert made.tend()
    assert "also" not in played.params


def test_no_window_takes_what_stands_before_a_cut_that_a_target_does_not_learn_of(
    groups: GroupDirectory,
) -> None:
    two_targets(groups)
    played = TwoTargets()
    made = cutter(groups, played)
    assert made.tend()
    played.durable = {1: 9}  # its mark, and not the record behind it
    assert made.tend()
    assert made.durable_at(1) == (0, 0)
    played.durable = {}
    assert made.tend()
    known = made.durable_at(1)
    assert known == (1, 9)
    played.lacks = True
    for _ in range(2):
        played.heads[2] += 1
        assert made.tend()
    assert made.durable_at(1) == known
    played.lacks = False
    for _ in range(2):
        played.heads[2] += 1
        assert made.tend()
    assert made.durable_at(1) > known


def test_a_cut_is_durable_when_all_of_its_marks_are(groups: GroupDirectory) -> None:
    played = Played()
    made = cutter(groups, played)
    assert made.tend()
    played.heads = {0: 101, 1: 101, 2: 102}
    played.durable = {0: 101, 1: 100, 2: 102}
    assert made.tend()
    assert made.durable_at(0) == (0, 0)
    played.durable = {}
    assert made.tend()
    assert made.durable_at(0) == (1, 100)


def test_a_cut_of_which_a_gap_may_have_taken_a_mark_is_not_durable(groups: GroupDirectory) -> None:
    """A host that lost its power comes back with another ring, durable far above the mark that was
    lost with the old one. Taken for durable, that cut would let a window take the one before."""
    played = Played()
    made = cutter(groups, played)
    assert made.tend()
    played.heads = {0: 101, 1: 5001, 2: 102}
    played.durable, played.gap_last[1], played.gap = {1: 5000}, 5001, True
    played.asked.clear()
    assert made.tend()
    assert made.durable_at(0) == (0, 0)
    assert made.view()["newest"] is None
    played.gap, played.durable = False, {}
    assert made.tend()
    assert "cut_mark" in played.asked


def test_a_cut_does_not_stay_known_when_a_lane_may_have_lost_it(groups: GroupDirectory) -> None:
    """It was durable with all, and then a gap began in one lane: a target may have lost what it
    held. Told after the target was started again, it would let the windows of the other lanes
    take the older cuts, of which one may be the last that recovers."""
    played = Played()
    made = cutter(groups, played)
    assert made.tend()
    played.heads = {0: 101, 1: 101, 2: 102}
    assert made.tend()
    assert made.tend()
    assert made.durable_at(0) == (1, 100)
    played.gap, played.gap_last[1] = True, 5001
    assert made.tend()
    assert made.durable_at(0) == (0, 0)


def test_a_loss_that_is_told_of_is_heeded_at_once(groups: GroupDirectory) -> None:
    """Before the filter's gap shows it, which may be over by the next look."""
    played = Played()
    made = cutter(groups, played)
    assert made.tend()
    played.heads = {0: 101, 1: 101, 2: 102}
    assert made.tend()
    assert made.tend()
    assert made.durable_at(0) == (1, 100)
    made.forget()
    assert [made.durable_at(lane) for lane in range(3)] == [(0, 0)] * 3
    played.asked.clear()
    assert made.tend()
    assert "cut_mark" in played.asked  # though nothing was written


def test_a_cut_that_is_shipped_in_another_epoch_is_made_again(groups: GroupDirectory) -> None:
    """A failover was rolled back before it was durable: the target holds its marks in another
    epoch than it says, and so it is no point. The guest may write no more."""
    played = Played()
    made = cutter(groups, played)
    assert made.tend()
    groups.update("web@0", epoch=3)
    played.heads = {0: 101, 1: 101, 2: 102}
    played.asked.clear()
    assert made.tend()
    assert made.durable_at(0) == (0, 0)
    assert "cut_mark" in played.asked


def test_a_mark_of_a_host_that_is_out_of_touch_is_not_durable(groups: GroupDirectory) -> None:
    """It has marked, and said nothing since: its power may be lost, and the mark with it."""
    played = Played()
    played.durable = {1: 100}
    made = cutter(groups, played)
    made.tend()
    made._hosts[SITES[1]].away = True  # type: ignore[attr-defined]
    played.heads, played.durable = {0: 101, 1: 101, 2: 102}, {}
    with contextlib.suppress(errors.AgainError):
        made.tend()
    assert made.durable_at(0) == (0, 0)
    made._hosts[SITES[1]].away = False  # type: ignore[attr-defined]
    made.tend()
    assert made.durable_at(0) == (1, 100)


def test_a_window_does_not_go_up_to_a_cut_without_a_host(groups: GroupDirectory) -> None:
    played, now = Played(), [0.0]
    made = cutter(groups, played, clock=lambda: now[0])
    made._hosts[SITES[1]].away = True  # type: ignore[attr-defined]
    for now[0] in (0.0, 10.0):
        made.tend()
    assert "cut_complete" in played.asked
    played.heads = {0: 101, 1: 101, 2: 102}
    made.tend()
    assert made.view()["newest"] is not None
    assert made.durable_at(0) == (0, 0)
