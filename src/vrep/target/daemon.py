"""The target process: a listener for sources, the stores, and a control socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import structlog

from vrep.control import ControlServer
from vrep.errors import (
    FencedError,
    InvalidError,
    NotFoundError,
    ProtocolError,
    StorageError,
    VrepError,
)
from vrep.keys.identity import SiteIdentity
from vrep.paths import SitePaths
from vrep.settings import Config
from vrep.target.base import BaseOffer
from vrep.target.delta import error_code
from vrep.target.epochs import entry_of, plain, wire_epoch
from vrep.target.hosts import GROUP_ID, GroupHosts
from vrep.target.manifest import Position
from vrep.target.receive import GroupHost, RefusedError
from vrep.target.removal import finish_removals
from vrep.target.reserve import Reserve
from vrep.target.rooms import Rooms
from vrep.target.session import Session
from vrep.target.store import StoreOptions
from vrep.wire import messages as m
from vrep.wire.invite import InviteBook
from vrep.wire.peers import PeerRegistry
from vrep.wire.site import Listener
from vrep.wire.transport import FrameTransport, Timeouts

__all__ = ["Target"]

SCAN_EVERY_S: Final = 1.0
RECEIVE_S: Final = 1.0

log = structlog.get_logger("vrep.target")


def _report_of(params: Mapping[str, Any]) -> m.Status:
    """What a source that sends nothing says of itself; InvalidError for anything else."""
    state, clients = str(params["state"]), params.get("clients")
    if state not in ("paused", "fenced", "error"):
        raise InvalidError(f"a source that sends nothing is not {state[:32]!r}")
    values = {} if clients is None else {"clients": int(clients)}
    return m.Status(time_ns=time.time_ns(), state=state, values=values)


class Target:
    """The target role of the site in a directory."""

    def __init__(
        self,
        paths: SitePaths,
        config: Config,
        *,
        timeouts: Timeouts | None = None,
        held: Callable[[bytes], Sequence[Position]] = lambda _group_id: (),
        gives_way: Callable[[str, Mapping[str, Any]], BaseOffer | None] = lambda _site, _told: None,
        clients: Callable[[str], int] = lambda _group_id: 0,
        lanes: Callable[[str, str, Mapping[str, Any]], Any] | None = None,
    ) -> None:
        """`held` names the points of a group that are in use: no fold takes what they need.
        `gives_way` lets go of a group that this site wrote, for the site that took it over, and
        says what can be sealed of the old disks.
        `clients` counts who uses the disks of a group that this site took over. `lanes` answers
        the methods of sites that have lanes of a group beside this one's."""
        self._paths = paths
        self._config = config
        self._timeouts = timeouts or Timeouts()
        self._gives_way = gives_way
        self._clients = clients
        self._lanes = lanes
        self._identity = SiteIdentity.load(paths.root)
        self._peers = PeerRegistry(paths.root)
        self._invites = InviteBook(paths.root)
        settings = config.target
        self._options = StoreOptions(
            # Half of the promise: the other half is for the commit that is under way.
            commit_s=settings.commit_s / 2,
            segment_bytes=settings.segment_bytes,
            reserve=Reserve(settings.reserve_bytes, settings.group_reserve_bytes),
            fold_rate=settings.fold_rate,
            held=held,
        )
        self._hosts = GroupHosts(self._new_host)
        self._stopping = threading.Event()
        self._listener: Listener | None = None
        self._control: ControlServer | None = None

    # ---- life ------------------------------------------------------------------------

    def start(self) -> None:
        """Open the stores, then listen, then serve the control socket."""
        finish_removals(self._paths.store)
        for group_id in self._stored():
            self._load(group_id)
        listen = self._config.network.listen
        if listen:
            self._listener = Listener(
                self._identity,
                self._peers,
                self._invites,
                listen,
                self._serve,
                advertised_address=self._config.network.advertise or listen,
                timeouts=self._timeouts,
                allocate=Rooms().room,
            )
            self._listener.start()
            log.info("listening", address=self._listener.address)
        run = self._paths.make_run()
        self._control = ControlServer(
            run / "target.sock",
            {
                "status": self._status,
                "sessions": self._sessions,
                "reload": self._reload,
                "delete_unprotected": self._delete_unprotected,
                "stop": self._stop_requested,
                "fold": self._by(lambda h, p: h.fold(Position(*(int(n) for n in p["horizon"])))),
                "epoch_state": self._by(lambda h, _p: h.epoch_state()),
                "epoch_raise": self._by(lambda h, p: plain(h.open_fenced(p))),
                "halt": self._by(lambda h, p: list(h.halt(pause=bool(p["pause"])))),
                "halted": self._by(lambda h, _p: h.keep_halted()),
                "go_on": self._by(lambda h, _p: h.go_on()),
                "epoch_accept": self._by(lambda h, p: plain(h.accept_epoch(int(p["epoch"])))),
                "epoch_roll_back": self._by(lambda h, p: plain(h.roll_back_epoch(int(p["epoch"])))),
            },
        )

    @property
    def address(self) -> str:
        """Where it listens; empty when it does not."""
        return self._listener.address if self._listener is not None else ""

    def run(self) -> None:
        """Until `request_stop`. Stores that appear are opened, failed ones again. That they cannot
        be looked for, as when descriptors run out, ends nothing."""
        while not self._stopping.wait(SCAN_EVERY_S):
            try:
                self._scan()
            except (VrepError, OSError) as error:
                log.error("the stores cannot be looked at", error=str(error))

    def request_stop(self) -> None:
        self._stopping.set()

    def close(self) -> None:
        """End every session and let go of the stores."""
        self._stopping.set()
        if self._listener is not None:
            self._listener.close()
        for host in self._hosts.clear():
            host.close()
        if self._control is not None:
            self._control.close()

    # ---- groups ----------------------------------------------------------------------

    def _stored(self) -> list[bytes]:
        if not self._paths.store.is_dir():
            return []
        names = sorted(entry.name for entry in self._paths.store.iterdir())
        return [bytes.fromhex(name) for name in names if GROUP_ID.fullmatch(name)]

    def _new_host(self, group_id: bytes) -> GroupHost:
        return GroupHost(
            self._paths.store,
            group_id,
            self._options,
            self._config.target.window_bytes,
            gone_s=self._config.target.source_gone_s,
            site=bytes.fromhex(self._identity.site_id),
            all_hosts=self._hosts.all,
        )

    def _load(self, group_id: bytes) -> None:
        try:
            with self._hosts.use(group_id) as host:
                host.load()
        except VrepError as error:
            log.error("a store cannot be used", group_id=group_id.hex(), error=str(error))

    def _scan(self, *, again: bool = False) -> None:
        for group_id in self._stored():
            known = self._hosts.get(group_id)
            if known is not None:
                known.end_late_halt()
            if known is None or again or (known.failed and known.retry_due()):
                self._load(group_id)

    def _of(self, params: Mapping[str, Any]) -> AbstractContextManager[GroupHost]:
        """The host of the group that is asked for, while it is used."""
        return self._hosts.find(str(params.get("group_id") or params.get("group") or ""))

    def _by(
        self, answer: Callable[[GroupHost, Mapping[str, Any]], Any]
    ) -> Callable[[Mapping[str, Any]], Any]:
        """A method of the control socket that a group's host answers."""

        def call(params: Mapping[str, Any]) -> Any:
            with self._of(params) as host:
                return answer(host, params)

        return call

    # ---- connections -------------------------------------------------------------------

    def _serve(self, transport: FrameTransport) -> None:
        """One connection of a peer, on its thread, until it ends."""
        sessions: dict[int, tuple[GroupHost, Session]] = {}
        try:
            while True:
                event = transport.receive(RECEIVE_S)
                if event is None:
                    continue
                if isinstance(event.message, m.Bye) and event.channel == 0:
                    return
                self._handle(transport, sessions, event.channel, event.message)
        finally:
            for host, session in sessions.values():
                host.drop_session(session)

    def _handle(
        self,
        transport: FrameTransport,
        sessions: dict[int, tuple[GroupHost, Session]],
        channel: int,
        message: m.Message | m.Data,
    ) -> None:
        match message:
            case m.OpenGroup():
                self._open(transport, sessions, channel, message)
                return
            case m.Request(method=m.HASHES_METHOD):
                self._ask_hashes(transport, sessions, message)
                return
            case m.Request():
                transport.post(self._answer(transport, message))
                return
            case m.Response():
                for host, _session in sessions.values():
                    host.halts.answered(message)
                return
        if channel not in sessions:
            return  # ended by this end while it was on its way
        host, session = sessions[channel]
        try:
            match message:
                case m.Data():
                    session.take(message)
                case m.StreamStart():
                    session.start_stream(message)
                case m.Status():
                    session.note(message)
                case m.Bye() | m.Error() | m.Refused():
                    del sessions[channel]
                    host.drop_session(session)
        except FencedError as error:
            manifest = session.store.manifest
            current = wire_epoch(manifest, manifest.current_epoch)
            session.end(m.Refused(code="fenced", text=error.detail, epoch=current))
        except StorageError as error:
            session.end(m.Error(code="storage", text=str(error)[:4096]))

    def _open(
        self,
        transport: FrameTransport,
        sessions: dict[int, tuple[GroupHost, Session]],
        channel: int,
        message: m.OpenGroup,
    ) -> None:
        peer = transport.name
        try:
            with self._hosts.use(message.group_id) as host:
                session = host.open_session(transport, channel, message)
        except RefusedError as error:
            log.warning("a group is refused", group=message.name, peer=peer, reason=str(error))
            transport.send(error.message, channel)
            return
        except ProtocolError:
            raise
        except VrepError as error:
            log.warning("a group is refused", group=message.name, peer=peer, reason=str(error))
            transport.send(m.Refused(code="busy", text=str(error)[:4096]), channel)
            return
        sessions[channel] = (host, session)
        log.info("a source sends", group=message.name, peer=peer, epoch=session.epoch.epoch)

    def _ask_hashes(
        self,
        transport: FrameTransport,
        sessions: dict[int, tuple[GroupHost, Session]],
        request: m.Request,
    ) -> None:
        """Only who sends a group may ask what is held of it; the session answers when it can."""
        group_id = request.params.get("group_id")
        try:
            for host, session in sessions.values():
                if host.group_id == group_id and not session.ended:
                    session.delta.ask(request)
                    return
            raise NotFoundError("the group is not open on this connection")
        except VrepError as error:
            code, text = error_code(error), str(error)[:4096]
            transport.post(m.Response(id=request.id, error=code, text=text))

    def _answer(self, transport: FrameTransport, request: m.Request) -> m.Response:
        try:
            return m.Response(id=request.id, result=self._ask(transport, request))
        except VrepError as error:
            return m.Response(id=request.id, error=error_code(error), text=str(error)[:4096])
        except (KeyError, ValueError, TypeError) as error:
            return m.Response(id=request.id, error="invalid", text=str(error)[:4096])

    def _ask(self, transport: FrameTransport, request: m.Request) -> Any:
        assert transport.peer is not None
        site_id = bytes.fromhex(transport.peer.site_id)
        match request.method:
            case "group.report":
                status = _report_of(request.params)
                with self._of(request.params) as host:
                    host.report(site_id, transport.name, status)
                    if host.written_by(site_id):
                        return {}
                    return {"clients": self._clients(host.group_id.hex())}
            case "group.keep":
                window_s, quota = int(request.params["window_s"]), int(request.params["quota"])
                with self._of(request.params) as host:
                    host.keep(site_id, window_s, quota)
            case "group.unprotect":
                with self._of(request.params) as host:
                    host.unprotect(site_id)
            case "group.follow":
                return self._follow(site_id, request.params)
            case "group.delete":
                self._delete(transport, request, site_id)
            case method if method.startswith("lanes.") and self._lanes is not None:
                return self._lanes(transport.peer.site_id, method, request.params)
            case method:
                raise NotFoundError(f"no method {method!r}")
        return {}

    def _follow(self, site_id: bytes, params: Mapping[str, Any]) -> dict[str, Any]:
        """`vrep.target.hosts` forgets an id of which nobody is found to have anything."""
        epochs = [entry_of(raw) for raw in params["epochs"]]
        if not GROUP_ID.fullmatch(str(params["group_id"])):
            raise InvalidError("the id of a group is 16 bytes, in hexadecimal digits")
        group_id = bytes.fromhex(params["group_id"])
        known = self._hosts.get(group_id)
        under_way = known.bases.under_way(site_id) if known is not None else None
        if under_way is not None:
            return under_way  # it gave way before that began
        offer = self._gives_way(site_id.hex(), params)
        with self._hosts.use(group_id) as host:
            return host.follow(epochs, offer)

    def _delete(self, transport: FrameTransport, request: m.Request, site_id: bytes) -> None:
        with self._of(request.params) as host:
            host.delete(site_id)
            self._hosts.forget(host)
        log.warning("a group was deleted", group_id=host.group_id.hex(), peer=transport.name)

    # ---- control -----------------------------------------------------------------------

    def _delete_unprotected(self, params: Mapping[str, Any]) -> dict[str, Any]:
        with self._of(params) as host:
            host.delete_unprotected()
            self._hosts.forget(host)
        log.warning("a group that was given up was deleted", group_id=host.group_id.hex())
        return {}

    def _status(self, params: Mapping[str, Any]) -> dict[str, Any]:
        hosts = self._hosts.all()
        if params.get("group") or params.get("group_id"):
            with self._of(params) as host:
                hosts = [host]
        return {
            "address": self.address,
            "groups": {host.group_id.hex(): host.status() for host in hosts},
        }

    def _sessions(self, _params: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            {
                "group": host.name,
                "group_id": host.group_id.hex(),
                "site": session.site,
                "since_ns": session.since_ns,
                "bytes_received": session.bytes_received,
                "records_dropped": session.records_dropped,
                "round_trip_s": session.transport.round_trip_s,
            }
            for host in self._hosts.all()
            if (session := host.session) is not None
        ]

    def _reload(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        """Peers that were removed are cut off; stores that appeared, or were damaged, are
        opened."""
        listener = self._listener
        if listener is not None:
            trusted = {peer.site_id for peer in self._peers.list()}
            for site_id in listener.connected() - trusted:
                listener.drop_peer(site_id)
        self._scan(again=True)
        return {}

    def _stop_requested(self, _params: Mapping[str, Any]) -> dict[str, Any]:
        self._stopping.set()
        return {}
