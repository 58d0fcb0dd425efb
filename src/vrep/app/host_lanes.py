"""What other hosts of a group may ask of this site, over the wire (docs/internals/cuts.md).

A group may have lanes on several sites of one tenant. Who makes its cuts asks the others about
their lanes, has them hold, and lets them go on; a site that brings disks into a group, or takes
them out of it, says so. Only sites that the group's definitions here name as its hosts are heard; a
new one proves that it holds the tenant's key.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec

from vrep.control import ControlClient
from vrep.errors import (
    AuthError,
    ExistsError,
    FencedError,
    InvalidError,
    NotFoundError,
    StateError,
    UnreachableError,
)
from vrep.groups import GroupDefinition, GroupDirectory, without_lanes
from vrep.keys.identity import SiteIdentity
from vrep.keys.membership import membership_proof
from vrep.keys.tenant import TenantKeyring
from vrep.lanes import LANES_MAX, group_of, lane_of, lanes_among
from vrep.numbering import give_numbers
from vrep.paths import SitePaths
from vrep.wire import messages as m

__all__ = ["HostLanes"]

ANSWER_S: Final = 2.0
CUT_ID_BYTES: Final = 16


_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Lane = Annotated[int, msgspec.Meta(ge=0, lt=LANES_MAX)]
_SiteId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class _Newest(msgspec.Struct, frozen=True):
    point: Annotated[str, msgspec.Meta(max_length=80)]
    wall_ns: _Number


class _Said(msgspec.Struct, frozen=True):
    """What a peer says of itself when it looks."""

    hosts: Annotated[list[tuple[_Lane, _SiteId]], msgspec.Meta(max_length=LANES_MAX)]
    numbered: Annotated[int, msgspec.Meta(ge=0, le=LANES_MAX)]
    leads: bool
    whole: Annotated[list[tuple[_Number, _Lane, _Number]], msgspec.Meta(max_length=LANES_MAX)]
    newest: _Newest | None
    joining: Annotated[list[_Lane], msgspec.Meta(max_length=LANES_MAX)] = []


def _said(params: Mapping[str, Any], at_least: int) -> _Said:
    """InvalidError for what no site says. A number that was given once is not given again."""
    try:
        said = msgspec.convert(dict(params), _Said)
    except msgspec.ValidationError as error:
        raise InvalidError(f"lanes.look: {error}") from None
    if len(dict(said.hosts)) != len(said.hosts):
        raise InvalidError("lanes.look: a lane is of two sites")
    return msgspec.structs.replace(said, numbered=max(said.numbered, at_least))


class HostLanes:
    """Answers the methods `lanes.*` of peers."""

    def __init__(self, paths: SitePaths) -> None:
        self._site_id = SiteIdentity.load(paths.root).site_id
        self._groups = GroupDirectory(paths.root)
        self._keys = TenantKeyring(paths.root)
        self._filter = ControlClient(paths.socket("filter"), timeout=ANSWER_S)
        self._source = ControlClient(paths.socket("source"), timeout=ANSWER_S)

    def answer(self, site_id: str, method: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """What a peer, by its id, is told."""
        match method:
            case m.LANES_ADMIT:
                return self.admit(site_id, params)
            case m.LANES_LEAVE:
                return self.leave(site_id, params)
        mine = self._mine(site_id, str(params["group_id"]))
        if method == m.LANES_LOOK:
            return self._look(site_id, mine, params)
        asks = {m.LANES_HOLD: "cut_hold", m.LANES_RELEASE: "cut_release"}
        if method not in asks:
            raise NotFoundError(f"no method {method!r}")
        wanted = {int(lane) for lane in params["lanes"]}
        names = [one.name for one in mine if lane_of(one.name) in wanted]
        if len(names) != len(wanted):
            raise NotFoundError(f"lanes {sorted(wanted)} of the group are not all here")
        cut_id = _bytes(params["cut_id"], CUT_ID_BYTES).hex()
        return dict(self._filter.call(asks[method], lanes=names, cut_id=cut_id))

    def _mine(self, site_id: str, group_id: str) -> list[GroupDefinition]:
        """The lanes here of a group that the peer has lanes of as well."""
        found = [
            one
            for one in self._groups.readable()
            if one.group_id[:28] == group_id[:28] and site_id in dict(one.hosts).values()
        ]
        if not found:
            raise FencedError("that site has no lane of a group here")
        return sorted(found, key=lambda one: lane_of(one.name))

    def _look(
        self, site_id: str, mine: list[GroupDefinition], params: Mapping[str, Any]
    ) -> dict[str, Any]:
        said = _said(params, at_least=mine[0].numbered)
        hosts = tuple(sorted(said.hosts))
        whose = dict(hosts)
        before = min((lane for lane, site in mine[0].hosts if site == site_id), default=LANES_MAX)
        mine_stay = all(whose.get(lane_of(one.name)) == self._site_id for one in mine)
        if said.leads and before < lane_of(mine[0].name) and mine_stay:
            # Who leads knows who came and who left.
            lanes = tuple(whose)
            changes = {"hosts": hosts, "lanes": lanes, "numbered": said.numbered}
            for one in mine:
                self._groups.update(one.name, joining=tuple(said.joining), **changes)
        answer = self._source.call(
            "cut_look",
            group=group_of(mine[0].name),
            site=site_id,
            leads=said.leads,
            whole=[list(at) for at in said.whole],
            newest=msgspec.to_builtins(said.newest),
        )
        return dict(answer)

    # ---- who belongs to a group ------------------------------------------------------

    def admit(self, site_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Give a site new lanes of a group: their `lanes`, and what their definitions need. Those
        that it got before, never served and does not name as those that it `has` are withdrawn.
        AuthError: it does not hold the group's tenant key."""
        group, count = str(params["group"]), int(params["count"])
        names = lanes_among(group, self._groups.names())
        if not names:
            raise NotFoundError(
                f"no group {group!r} that others can join is protected here: 'protect --lanes'"
            )
        mine = [self._groups.load(name) for name in names]
        first = mine[0]
        if any(one.fenced or one.yielded for one in mine):
            raise FencedError(f"another site took {group!r} over")
        if first.to_site != str(params["to_site"]):
            raise StateError(
                f"group {group!r} is protected to another site: all its lanes go to one"
            )
        if first.hosts and min(first.hosts)[1] != self._site_id:
            raise StateError(f"site {min(first.hosts)[1]} has the first lane of {group!r}: ask it")
        proof = membership_proof(
            self._keys.find(first.tenant_key_id), group, site_id, self._site_id
        )
        if not hmac.compare_digest(proof, _bytes(params["proof"], len(proof))):
            raise AuthError(f"that site does not hold the tenant key of {group!r}")
        taken = {disk.name for one in mine for disk in one.disks} & set(params["names"])
        if taken:
            raise ExistsError(f"the group has a disk {min(taken)!r} already")
        has = {int(lane) for lane in params.get("has", ())}
        lanes, shared = give_numbers(
            self._groups, names, count, own=self._site_id, site=site_id, has=has
        )
        self._tell_source()
        return {
            "group_id": first.group_id[:28] + "0000",
            "lanes": lanes,
            "hosts": [list(each) for each in shared.hosts],
        }

    def leave(self, site_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """A site gives lanes up that are its own: cuts are made without them, and are whole."""
        gone = {int(lane) for lane in params["lanes"]}
        for one in self._mine(site_id, str(params["group_id"])):
            if any(dict(one.hosts).get(lane) != site_id for lane in gone):
                raise FencedError("a site gives up lanes that are its own")
            self._groups.revise(one.name, without_lanes(gone))
        self._tell_source()
        return {}

    def _tell_source(self) -> None:
        with contextlib.suppress(UnreachableError):
            self._source.call("reload")


def _bytes(given: object, count: int) -> bytes:
    if not isinstance(given, bytes) or len(given) != count:
        raise InvalidError(f"{count} bytes were expected")
    return given
