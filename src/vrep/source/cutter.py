"""Cuts of a group with several lanes, made while it is replicated and for checkpoints.

One `Cutter` for each such group of this site. Every so often, when something was written, it
has the filter cut all lanes (docs/internals/cuts.md) and remembers the cut until it is durable
everywhere: the newest in which all lanes have a part is what the target is told, so that no
window takes it.
A lane that is not served is waited for, and then left out: the others' cuts go on without it.

Where other sites have lanes of the group, one of them leads: the one with the lowest lane of those
that are in touch. It cuts, and tells the others what it knows; a checkpoint is cut by the site that
it is asked of. Two that lead, since they do not hear each other, leave each other's lanes out.

Times are those of a monotonic clock, seconds, unless they end in `_ns`.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog

from vrep.control import ControlClient
from vrep.errors import (
    AgainError,
    GapError,
    NotFoundError,
    VrepError,
)
from vrep.groups import GroupDefinition, GroupDirectory
from vrep.lanes import lane_name, lane_of, lanes_among
from vrep.source.hosts import Host, may_lack

__all__ = ["Cutter"]

CUT_S: Final = 2.0
"""a filter that takes longer to answer is as good as none"""
TRY_S: Final = 20.0
"""for which a checkpoint is tried again while cuts are void"""
AGAIN_S: Final = 0.05
AGAIN_MAX_S: Final = 1.0
VOID_PAUSE_S: Final = 0.2
VOID_PAUSE_MAX_S: Final = 30.0
"""Each void cut may have held the guests of some lanes for all of 10 ms. After several in a row,
as where a host is too far away, the pauses double from the first to the second of each pair."""
PENDING_MAX: Final = 1024
STALE: Final = 10
"""intervals without a cut after which the status says so"""

log = structlog.get_logger("vrep.source")


@dataclass(frozen=True)
class _Made:
    """A completed cut that is not known to be durable yet."""

    at: tuple[tuple[int, int, int], ...]
    completed: Mapping[str, int]
    """lanes that have its record, the first one first, and where"""
    wall_ns: int

    everywhere: bool
    """whether every target gets its record"""

    @property
    def whole(self) -> bool:
        """Whether it is a point of all lanes, at every target: what a window may go up to."""
        return self.everywhere and all(seq for _epoch, _lane, seq in self.at)

    @property
    def point(self) -> str:
        return "pos:{}/{}/{}".format(*next(at for at in self.at if at[2]))


class Cutter:
    """Cuts one group until stopped."""

    def __init__(
        self,
        group: str,
        groups: GroupDirectory,
        filter_control: ControlClient,
        *,
        every_s: float,
        gone_s: float,
        site_id: str = "",
        host_of: Callable[[str, Callable[[], Mapping[str, Any]]], Host] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`every_s`: 0 for checkpoints only; `gone_s`: how long a lane is waited for. `host_of`
        gets in touch with another site, by its id and what it is to be told."""
        self.group = group
        self._groups = groups
        self._filter = filter_control
        self._every_s = every_s
        self._gone_s = gone_s
        self._clock = clock
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._missing: dict[int, float] = {}
        self._joining: list[int] = []
        self._pending: list[_Made] = []
        self._newest: _Made | None = None
        self._newest_whole: _Made | None = None
        self._heads: dict[str, int] = {}
        self._made = self._void = 0
        self._void_in_row = 0
        """cuts that held guests in vain since one stood"""
        self._absent: list[int] = []
        self._error = ""
        self._wanted_since: float | None = None
        self._site_id = site_id
        self._host_of = host_of
        self._hosts: dict[str, Host] = {}
        """the other sites that have lanes of the group, by their ids"""
        self._led_s = clock()
        """when another site that goes before this one was heard last"""
        self._told_whole: tuple[tuple[int, int, int], ...] = ()
        self._told_newest: dict[str, Any] | None = None
        self._serving = False
        """whether a lane is served here, so that this site can lead"""
        self._thread = threading.Thread(target=self._run, name=f"cuts:{group}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(2 * CUT_S)
        for host in self._hosts.values():
            host.stop()

    @property
    def alive(self) -> bool:
        """Whether its thread runs; what ended it stands in the log."""
        return self._thread.is_alive()

    def _run(self) -> None:
        often_s = self._every_s or 1.0
        pause_s = often_s
        while not self._stopping.wait(pause_s):
            try:
                pause_s = often_s if self.tend() else self._void_pause_s(often_s)
            except Exception:
                log.exception("cuts failed", group=self.group)

    def _void_pause_s(self, often_s: float) -> float:
        """A void cut cost the guests a moment: it is tried again soon, not at once, and ever later
        while none stands."""
        if self._void_in_row <= 1:
            return min(often_s, VOID_PAUSE_S)
        return min(VOID_PAUSE_S * 2.0 ** (self._void_in_row - 1), VOID_PAUSE_MAX_S)

    # ---- what is asked ---------------------------------------------------------------

    def view(self) -> dict[str, Any]:
        """What the status says."""
        since = self._wanted_since
        stale_s = max(STALE * self._every_s, self._gone_s)
        return {
            "made": self._made,
            "void": self._void,
            "absent": list(self._absent),
            "joining": list(self._joining),
            "newest": max(
                (cut for cut in (_shown(self._newest), self._told_newest) if cut),
                key=lambda cut: int(cut["wall_ns"]),
                default=None,
            ),
            "error": self._error,
            "hosts": {site: host.error for site, host in list(self._hosts.items())},
            "stale": since is not None and self._clock() - since > stale_s,
        }

    def durable_at(self, lane: int) -> tuple[int, int]:
        """Epoch and seq of the mark in a lane of the newest cut of all lanes that is durable with
        each; zeroes: none."""
        newest = self._newest_whole
        known = (*(newest.at if newest else ()), *self._told_whole)
        return max(((e, s) for e, n, s in known if n == lane), default=(0, 0))

    def cut(self, label: str, try_s: float = TRY_S) -> dict[str, Any]:
        """A checkpoint: tried again while cuts are void. AgainError when none stood, GapError in
        a gap of a lane."""
        deadline, pause_s = self._clock() + try_s, AGAIN_S
        while True:
            try:
                with self._lock:
                    made, answer = self._take(self._look(), label)
                return {
                    **answer,
                    "point": made.point,
                    "completed": next(iter(made.completed)),
                    "absent": [lane for _epoch, lane, seq in made.at if not seq],
                }
            except AgainError:
                if self._clock() > deadline or self._stopping.wait(pause_s):
                    raise
                pause_s = min(2 * pause_s, AGAIN_MAX_S)

    def tend(self) -> bool:
        """One turn: note what became durable, cut if something was written. Whether it need not
        be tried again before it is time for the next."""
        with self._lock:
            try:
                self._meet()
                status = self._look()
                self._greet(status)
                self._note(status)
                lacking = self._lacking(self._definitions(), status)
                self._absent = [lane for lane in self._absent if lane in lacking]
                taken = self._joined(status)
                if not self._every_s or not self._leads() or not self._is_due(taken):
                    # None is wanted: not any more, when a checkpoint or another site made it.
                    self._error, self._wanted_since = "", None
                    return True
                if self._wanted_since is None:
                    self._wanted_since = self._clock()
                self._take(status, "")
            except VrepError as error:
                self._fail(error)
                return not isinstance(error, AgainError)
            self._error, self._wanted_since = "", None
            return True

    def _fail(self, error: VrepError) -> None:
        text = str(error)
        if isinstance(error, AgainError):
            self._void += 1
        if text != self._error and not isinstance(error, AgainError):
            log.info("no cut", group=self.group, reason=text)
        self._error = text

    def forget(self) -> None:
        """A target lost what it had of a lane: no cut that was made is known to stand there."""
        with self._lock:
            self._pending, self._newest_whole, self._told_whole = [], None, ()
            self._heads = {}  # what was written before is in no cut, maybe

    # ---- one cut ---------------------------------------------------------------------

    def _definitions(self) -> dict[str, GroupDefinition]:
        return {one.name: one for one in self._readable()}

    def _readable(self) -> Iterator[GroupDefinition]:
        for name in lanes_among(self.group, self._groups.names()):
            with contextlib.suppress(VrepError):  # it stands in the status
                yield self._groups.load(name)

    def _look(self) -> dict[str, dict[str, Any]]:
        """What the filters say of the lanes that they serve."""
        return {**self.own_lanes(), **self._theirs()}

    def _theirs(self) -> dict[str, dict[str, Any]]:
        """What the other sites say of the lanes that are theirs."""
        found: dict[str, dict[str, Any]] = {}
        whose = dict(self._shared())
        for site, host in list(self._hosts.items()):
            said = host.lanes()
            found |= {name: one for name, one in said.items() if whose.get(lane_of(name)) == site}
        return found

    def own_lanes(self) -> dict[str, dict[str, Any]]:
        """What the filter here says of the lanes that it serves, in which epoch they are shipped,
        and whether they are not to be cut by themselves (`idle`)."""
        try:
            answer = self._filter.call("status", timeout=CUT_S)
        except VrepError:
            self._serving = False
            raise
        # Behind the status: what is durable by then was not shipped in a newer epoch.
        definitions = self._definitions()
        found = {
            name: {
                **{key: answer[name][key] for key in ("head", "durable", "gap", "gap_last")},
                "epoch": one.epoch,
                "idle": one.paused or one.fenced or one.detached or one.halted,
            }
            for name, one in definitions.items()
            if "error" not in answer.get(name, {"error": ""})
        }
        self._serving = bool(found)
        return found

    def _is_due(self, status: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether anything was written since the last cut, to lanes that are shipped."""
        if any(one["idle"] for one in status.values()):
            return False
        return {name: int(one["head"]) for name, one in status.items()} != self._heads

    def _take(
        self, status: Mapping[str, Mapping[str, Any]], label: str
    ) -> tuple[_Made, dict[str, Any]]:
        definitions, served = self._definitions(), status
        if any(one["gap"] for name, one in served.items() if name not in definitions):
            for host in self._hosts.values():
                host.look()  # it may have ended since
            served = {**served, **self._theirs()}
        status = self._joined(served)
        lanes = sorted(status, key=lane_of)
        own = [name for name in lanes if name in definitions]
        if not own and any(name in definitions for name in served):
            raise GapError(f"what is here of {self.group!r} joins it when its sync has ended")
        if not own:
            raise AgainError(f"no lane of {self.group!r} is served here")
        self._absent = self._gone(definitions, list(served))
        in_gap = [name for name in lanes if name not in status or status[name]["gap"]]
        if in_gap:
            raise GapError(
                f"{', '.join(in_gap)}: there is no recovery point until its sync has ended"
            )
        self._void_in_row += 1  # unless it stands
        record: dict[str, Any] = {"label": label}
        if also := _first_of_each_target(definitions, own)[1:]:
            record["also"] = also
        if own == lanes:
            answer = self._filter.call(
                "cut", timeout=CUT_S, lanes=lanes, absent=self._absent, **record
            )
        else:
            answer = self._cut_hosts(own, lanes, record)
        others = {name: int(seq) for name, seq in answer.get("also", {}).items()}
        made = _Made(
            at=tuple((int(e), int(lane), int(seq)) for e, lane, seq in answer["at"]),
            completed={own[0]: int(answer["seq"]), **others},
            wall_ns=int(answer["wall_ns"]),
            everywhere=set(others) == set(also),
        )
        self._made += 1
        self._void_in_row = 0
        self._pending = [*self._pending[-PENDING_MAX:], made]
        self._heads = {lane_name(self.group, lane): seq for _e, lane, seq in made.at if seq}
        for lane, seq in made.completed.items():
            if seq == self._heads.get(lane, 0) + 1:  # else what was written meanwhile is in no cut
                self._heads[lane] = seq
        return made, answer

    def _cut_hosts(
        self, own: list[str], lanes: list[str], record: Mapping[str, Any]
    ) -> dict[str, Any]:
        """A cut over lanes of several sites. The others hold and mark first, and hold until the
        lanes here have marked: only then, when each says that it has held all the while, is it
        completed."""
        whose, theirs = dict(self._shared()), {lane_of(name) for name in lanes if name not in own}
        cut_id, group_id = secrets.token_bytes(16), self._group_id()
        parts = [
            (host, part)
            for site, host in self._hosts.items()
            if (part := [lane for lane in sorted(theirs) if whose.get(lane) == site])
        ]
        release = [partial(host.release, group_id, cut_id, part) for host, part in parts]
        try:
            held = _all_of([partial(host.hold, group_id, cut_id, part) for host, part in parts])
            at = [position for positions in held for position in positions]
            if {lane for _epoch, lane, _seq in at} != theirs:
                raise AgainError("a cut is void: a host has marked other lanes than it was asked")
            made = self._filter.call("cut_mark", timeout=CUT_S, lanes=own, cut_id=cut_id.hex())
        except VrepError:
            with contextlib.suppress(VrepError):
                _all_of(release)
            raise
        _all_of(release)
        at += [(int(e), int(lane), int(seq)) for e, lane, seq in made["at"]]
        at += [(0, lane, 0) for lane in self._absent]
        answer: dict[str, Any] = self._filter.call(
            "cut_complete", timeout=CUT_S, lane=own[0], cut_id=cut_id.hex(), at=at, **record
        )
        return answer

    def _gone(self, definitions: Mapping[str, GroupDefinition], served: list[str]) -> list[int]:
        """The lanes that cuts do without, and say so; AgainError while one is waited for."""
        now, missing = self._clock(), self._lacking(definitions, served)
        self._missing = {lane: self._missing.get(lane, now) for lane in missing}
        waited = [lane for lane in missing if now - self._missing[lane] < self._gone_s]
        if waited:
            raise AgainError(f"lane {', '.join(map(str, waited))} of {self.group!r} is not served")
        joining = {lane for one in definitions.values() for lane in one.joining}
        return [lane for lane in missing if lane not in joining]

    def _lacking(
        self, definitions: Mapping[str, GroupDefinition], served: Iterable[str]
    ) -> list[int]:
        """The lanes of the group that are not served."""
        known = {lane_of(name) for name in definitions}
        known |= {lane for one in definitions.values() for lane in one.lanes}
        return sorted(known - {lane_of(name) for name in served})

    def _joined(self, status: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Without the lanes that are joining and not whole yet: cuts do without them."""
        definitions = self._definitions().values()
        joining = {lane for one in definitions for lane in one.joining}
        return {
            name: one
            for name, one in status.items()
            if not one["gap"] or lane_of(name) not in joining
        }

    def _greet(self, status: Mapping[str, Mapping[str, Any]]) -> None:
        """A lane that is served and whole for the first time has joined: from then on it is missed
        when it is not. Who leads says so to the others."""
        definitions = self._definitions()
        served = {lane_of(name) for name, one in status.items() if not one["gap"]}
        self._joining = sorted({lane for one in definitions.values() for lane in one.joining})
        if served.isdisjoint(self._joining) or not self._leads():
            return

        def joined(one: GroupDefinition) -> dict[str, Any]:
            return {"joining": tuple(lane for lane in one.joining if lane not in served)}

        for name in definitions:
            self._groups.revise(name, joined)
        self._joining = [lane for lane in self._joining if lane not in served]

    # ---- the other sites ---------------------------------------------------------------

    def _shared(self) -> tuple[tuple[int, str], ...]:
        """Whose each lane is, when several sites have some."""
        return next((one.hosts for one in self._readable()), ())

    def _first(self) -> GroupDefinition:
        for one in self._readable():
            return one
        raise NotFoundError(f"no lane of {self.group!r} is protected here any more")

    def _group_id(self) -> str:
        return self._first().group_id[:28] + "0000"

    def _meet(self) -> None:
        """Get in touch with the sites that have lanes of the group now."""
        others = {site for _lane, site in self._shared()} - {self._site_id}
        for site in set(self._hosts) - others:
            self._hosts.pop(site).stop()
        for site in others - set(self._hosts):
            assert self._host_of is not None
            self._hosts[site] = self._host_of(site, self._tell)

    def _leads(self) -> bool:
        """Whether this site makes the cuts: no other that goes before it is in touch."""
        shared = self._shared()
        rank = _rank(shared, self._site_id)
        if not any(lane < rank for lane, _site in shared):
            return True
        return self._clock() - self._led_s >= self._gone_s

    def _tell(self) -> dict[str, Any]:
        """What another site is told whenever it is asked."""
        first, newest = self._first(), self._newest_whole
        return {
            "group_id": self._group_id(),
            "hosts": [[lane, site] for lane, site in first.hosts],
            "numbered": first.numbered,
            "joining": list(first.joining),
            "leads": self._serving and self._leads(),
            "whole": [list(at) for at in newest.at] if newest else [],
            "newest": _shown(self._newest),
        }

    def looked(
        self,
        site: str,
        *,
        leads: bool,
        whole: Sequence[Sequence[int]],
        newest: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Another site looks; whether it leads, and the newest cuts that it knows to be durable,
        of all lanes and of any. What the lanes here are like."""
        shared = self._shared() if leads else ()
        if leads and _rank(shared, site) < _rank(shared, self._site_id):
            self._led_s = self._clock()
            self._told_whole = tuple((int(e), int(n), int(s)) for e, n, s in whole)
            self._told_newest = newest
        return {"lanes": self.own_lanes()}

    def lanes(self) -> dict[str, Any]:
        """What all lanes are like that are served and in touch."""
        return {"lanes": self._look()}

    # ---- what became of it -------------------------------------------------------------

    def _note(self, status: Mapping[str, Mapping[str, Any]]) -> None:
        """Forget those of which a mark may not stand where they say, find the newest that is
        durable."""
        left = []
        if self._newest_whole is not None and self._may_lack(status, self._newest_whole):
            self._newest_whole = None  # the gap may stand for what a target lost, its mark with it
        for made in self._pending:
            if self._may_lack(status, made):
                self._heads = {}  # what was written before it is in no cut, maybe
                continue
            wanted = {lane_name(self.group, lane): seq for _epoch, lane, seq in made.at if seq}
            wanted |= made.completed
            if all(
                name in status and int(status[name]["durable"]) >= seq
                for name, seq in wanted.items()
            ):
                self._newest = made
                if made.whole:
                    self._newest_whole = made
            else:
                left.append(made)
        self._pending = left

    def _may_lack(self, status: Mapping[str, Mapping[str, Any]], made: _Made) -> bool:
        """Whether the history of a lane may lack its mark in a cut."""
        marks = [(lane_name(self.group, lane), e, seq) for e, lane, seq in made.at if seq]
        return any(n in status and may_lack(status[n], e, seq) for n, e, seq in marks)


def _first_of_each_target(
    definitions: Mapping[str, GroupDefinition], lanes: Sequence[str]
) -> list[str]:
    """The lanes into which the record of a cut is put: each target that is to offer it reads its
    own stores only. There is more than one target after `vrep reverse` to several sites."""
    found: dict[str, str] = {}
    for name in lanes:
        found.setdefault(definitions[name].to_site, name)
    return list(found.values())


def _rank(shared: Sequence[tuple[int, str]], site: str) -> int:
    """The lowest lane of a site; the lower, the sooner it leads."""
    return min((lane for lane, whose in shared if whose == site), default=0)


def _shown(made: _Made | None) -> dict[str, Any] | None:
    """A cut in the status."""
    return {"point": made.point, "wall_ns": made.wall_ns} if made is not None else None


def _all_of(asks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each answers, all asked at once. AgainError when one does not: the cut is void."""
    try:
        if len(asks) <= 1:
            return [ask() for ask in asks]
        with ThreadPoolExecutor(len(asks)) as pool:
            futures = [pool.submit(ask) for ask in asks]  # one that fails stops no other
        return [future.result() for future in futures]
    except VrepError as error:
        raise AgainError(f"a cut is void: {error}") from None
