"""The source process: one session for each protected group of this site."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import structlog

from vrep.control import ControlClient, ControlServer
from vrep.errors import NotFoundError, VrepError
from vrep.groups import GroupDirectory
from vrep.keys.identity import SiteIdentity
from vrep.keys.tenant import TenantKeyring
from vrep.lanes import group_of, is_lane, lane_of
from vrep.paths import SitePaths
from vrep.settings import SourceConfig
from vrep.source.bandwidth import Bandwidth
from vrep.source.cutter import TRY_S, Cutter
from vrep.source.hosts import Host
from vrep.source.session import GroupSession
from vrep.source.session_view import spill_view
from vrep.source.spill import Spill, is_spilled
from vrep.source.spiller import Spiller
from vrep.source.transitions import Transitions
from vrep.wire.peers import PeerRegistry
from vrep.wire.transport import Timeouts

SCAN_EVERY_S: Final = 1.0
FILTER_ANSWERS_S: Final = 2.0
"""a filter that takes longer is said not to serve"""
SPILL_AGAIN_S: Final = 10.0
"""after which a spill that could not be opened is tried again"""

log = structlog.get_logger("vrep.source")


class Source:
    """Runs the sessions of a site; groups that come and go are noticed."""

    def __init__(
        self,
        paths: SitePaths,
        config: SourceConfig | None = None,
        *,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._paths = paths
        self._config = config or SourceConfig()
        self._bandwidth = Bandwidth(self._config.bandwidth)
        self._groups = GroupDirectory(paths.root)
        self._identity = SiteIdentity.load(paths.root)
        self._peers = PeerRegistry(paths.root)
        self._keys = TenantKeyring(paths.root)
        self._timeouts = timeouts
        self._sessions: dict[str, GroupSession] = {}
        self._unspilled: dict[str, float] = {}
        """sessions whose spill could not be opened, and when that is tried again"""
        self._transitions: dict[str, Transitions] = {}
        self._unserved: set[str] = set()
        """sessions whose group the filter did not serve when it was asked last"""
        self._filter = ControlClient(paths.socket("filter"), timeout=FILTER_ANSWERS_S)
        self._scanning = threading.Lock()
        self._cutters: dict[str, Cutter] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._control: ControlServer | None = None

    def start(self) -> None:
        """Serve the control socket and begin replicating."""
        run = self._paths.make_run()
        self._control = ControlServer(
            run / "source.sock",
            {
                "status": self._status,
                "cut": self._cut,
                "cut_look": self._cut_look,
                "cut_lanes": self._cut_lanes,
                "cut_durable": lambda p: list(self._cutter(p).durable_at(int(p["lane"]))),
                "reload": self._reload,
                "stop": self._stop_requested,
            },
        )
        self._scan()

    def run(self) -> None:
        """Until `request_stop`. That the groups cannot be looked at, as when descriptors run out,
        ends nothing."""
        while not self._stopping.wait(SCAN_EVERY_S):
            try:
                self._scan()
                self._look()
            except (VrepError, OSError) as error:
                log.error("the groups cannot be looked at", error=str(error))

    def _look(self) -> None:
        """Make an event of what became of each group."""
        with self._lock:
            sessions = dict(self._sessions)
        if not sessions:
            return
        try:
            filters = self._filter.call("status")
        except VrepError:
            filters = {}  # it is down, or hangs: no group is served
        for name in set(self._transitions) - set(sessions):
            del self._transitions[name]
        self._unserved &= set(sessions)
        for name, session in sessions.items():
            try:
                definition = self._groups.load(name)
            except VrepError:
                continue  # its session says what is wrong
            filtered = filters.get(name)
            served = filtered is not None and "error" not in filtered
            if not served:
                self._unserved.add(name)
            elif name in self._unserved:
                self._unserved.discard(name)
                session.reload()  # it waits for longer after each try
            view = session.view
            self._transitions.setdefault(name, Transitions(name)).look(
                definition,
                filtered if served else None,
                {
                    "connected": view.connected,
                    "fenced": view.fenced,
                    "spill": view.spill,
                    "rolled_back": view.rolled_back,
                },
                time.monotonic(),
                time.time_ns(),
            )

    def request_stop(self) -> None:
        self._stopping.set()

    def close(self) -> None:
        """Stop every session; the filter goes on recording."""
        self._stopping.set()
        with self._lock:
            sessions = list(self._sessions.values())
            cutters = list(self._cutters.values())
            self._sessions.clear()
            self._cutters.clear()
        for cutter in cutters:
            cutter.stop()
        for session in sessions:
            session.stop()
        if self._control is not None:
            self._control.close()

    def _scan(self) -> None:
        # To open a large spill takes long: the status is not to wait for it.
        with self._scanning:
            names = {name for name in self._groups.names() if not self._yielded(name)}
            with self._lock:
                if self._stopping.is_set():
                    return
                gone = [self._sessions.pop(name) for name in set(self._sessions) - names]
                known = dict(self._sessions)
                ended = self._scan_cutters({group_of(name) for name in names if is_lane(name)})
            for cutter in ended:
                cutter.stop()
            for session in gone:
                self._unspilled.pop(session.name, None)
                session.stop()
                log.info("group removed", group=session.name)
            for name in sorted(names):
                if self._stopping.is_set():
                    return
                self._tend(name, known.get(name))

    def _yielded(self, name: str) -> bool:
        """Whether another site writes the group, and this one is its target."""
        try:
            return self._groups.load(name).yielded
        except VrepError:
            return False  # its session says what is wrong

    def _scan_cutters(self, groups: set[str]) -> list[Cutter]:
        """Begin the cuts of groups with several lanes; those of groups that are gone, or whose
        thread is, are to be stopped."""
        ended = [
            self._cutters.pop(name)
            for name, cutter in list(self._cutters.items())
            if name not in groups or not cutter.alive
        ]
        for name in sorted(groups - set(self._cutters)):
            cutter = self._cutters[name] = Cutter(
                name,
                self._groups,
                ControlClient(self._paths.socket("filter")),
                every_s=self._config.cut_every_s,
                gone_s=self._config.lane_gone_s,
                site_id=self._identity.site_id,
                host_of=self._host,
            )
            cutter.start()
        return ended

    def _host(self, site_id: str, tell: Callable[[], Mapping[str, Any]]) -> Host:
        return Host(site_id, self._identity, self._peers, tell, self._timeouts)

    def _tend(self, name: str, session: GroupSession | None) -> None:
        """Begin a group's session; again when it died, or can have its spill now."""
        opened = None
        if session is not None:
            if not session.alive:
                log.error("session is begun again", group=name)
            elif (opened := self._open_later(name)) is None:
                return
            session.stop()  # with what runs beside it
        session = self._begin(name, opened)
        with self._lock:
            if not self._stopping.is_set():
                self._sessions[name] = session
                session.start()

    def _open_later(self, name: str) -> Spiller | None:
        """The spiller of a session that has none because its spill could not be opened: its
        disk may have been away, full or read-only."""
        if time.monotonic() < self._unspilled.get(name, math.inf):
            return None
        self._unspilled[name] = time.monotonic() + SPILL_AGAIN_S
        spiller, _problem = self._spiller(name)
        return spiller

    def _begin(self, name: str, spiller: Spiller | None = None) -> GroupSession:
        problem = ""
        if spiller is None:
            spiller, problem = self._spiller(name)
        session = GroupSession(
            name,
            self._groups,
            self._identity,
            self._peers,
            self._keys,
            ControlClient(self._paths.socket("filter")),
            timeouts=self._timeouts,
            spiller=spiller,
            bandwidth=self._bandwidth,
        )
        self._unspilled.pop(name, None)
        if is_lane(name):
            session.cut_at = partial(self._cut_at, name)
            session.history_lost = partial(self._cuts_lost, name)
        if problem:
            self._unspilled[name] = time.monotonic() + SPILL_AGAIN_S
            session.view.spill = spill_view(self._config.spill_bytes, full=problem)
        return session

    def _spiller(self, name: str) -> tuple[Spiller | None, str]:
        """The spiller of a group, or why it has none although it should. What was spilled before
        it was switched off is shipped all the same."""
        config = self._config
        directory = self._paths.spill(name, config.spill_dir)
        try:
            if not config.spill_bytes and not is_spilled(directory):
                return None, ""
            group_id = bytes.fromhex(self._groups.load(name).group_id)
            spill = Spill(
                directory,
                group_id,
                quota_bytes=config.spill_bytes,
                reserve_bytes=config.spill_reserve_bytes,
            )
        except (VrepError, OSError) as error:
            log.error("nothing can be spilled", group=name, error=str(error))
            return None, str(error)
        return Spiller(name, spill), ""

    # ---- control -----------------------------------------------------------------

    def _status(self, params: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            wanted = params.get("group")
            if wanted is not None and wanted not in self._sessions:
                raise NotFoundError(f"no group {wanted!r} is replicated here")
            return {
                name: self._view(name, session)
                for name, session in self._sessions.items()
                if wanted is None or name == wanted
            }

    def _view(self, name: str, session: GroupSession) -> dict[str, Any]:
        view = dataclasses.asdict(session.view)
        changes = self._transitions.get(name)
        view["transitions"] = changes.view if changes is not None else {}
        cutter = self._cutters.get(group_of(name)) if is_lane(name) else None
        if cutter is not None:
            view["cuts"] = cutter.view()
            view["newest_point"] = view["cuts"]["newest"]
        return view

    def _cut_at(self, name: str) -> tuple[int, int]:
        cutter = self._cutters.get(group_of(name))
        return cutter.durable_at(lane_of(name)) if cutter is not None else (0, 0)

    def _cuts_lost(self, name: str) -> None:
        cutter = self._cutters.get(group_of(name))
        if cutter is not None:
            cutter.forget()

    def _cutter(self, params: Mapping[str, Any]) -> Cutter:
        with self._lock:
            cutter = self._cutters.get(str(params["group"]))
        if cutter is None:
            raise NotFoundError(f"no group {params['group']!r} of several lanes is replicated here")
        return cutter

    def _cut_look(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return self._cutter(params).looked(
            str(params["site"]),
            leads=bool(params["leads"]),
            whole=params["whole"],
            newest=params["newest"],
        )

    def _cut_lanes(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return self._cutter(params).lanes()

    def _cut(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return self._cutter(params).cut(
            str(params.get("label", "")), float(params.get("try_s", TRY_S))
        )

    def _reload(self, params: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self._scan()
        except VrepError as error:
            log.warning("scan failed", error=str(error))
        with self._lock:
            for name, session in self._sessions.items():
                if params.get("group") in (None, name):
                    session.reload()
        return {}

    def _stop_requested(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        self._stopping.set()
        return {}


__all__ = ["Source"]
