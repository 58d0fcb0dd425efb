"""Connections between sites: TLS contexts, connecting, listening, joining.

Every certificate is self-signed and pinned.  A client accepts exactly the
certificate whose fingerprint it was told.  A server lets TLS refuse every
client certificate that is not a peer's, then looks the fingerprint up in the
registry, which decides; a client without a certificate may only JOIN with an
invitation.  TLS is 1.3 or nothing, and sessions are never resumed, so the
look-up is made for each connection.

Threads: `connect` and `join_site` run in the caller's; a `Listener` has one
thread that accepts and one for each connection.
"""

from __future__ import annotations

import datetime
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Final

from vrep import __version__, threads
from vrep._core.tls import TlsContext
from vrep.errors import (
    InvalidError,
    PeerError,
    ProtocolError,
    TrustError,
    UnreachableError,
    VrepError,
)
from vrep.keys.identity import SiteIdentity
from vrep.wire import messages as m
from vrep.wire.address import format_address, parse_address
from vrep.wire.door import Door, Visit, network_of
from vrep.wire.invite import Invite, InviteBook, InviteError, decode_invite
from vrep.wire.peers import Peer, PeerRegistry
from vrep.wire.protocol import (
    PROTOCOL_VERSION_MAX,
    PROTOCOL_VERSION_MIN,
    Allocate,
    Connection,
    Role,
)
from vrep.wire.stream import (
    Clock,
    ConnectionLostError,
    SystemClock,
    TlsStream,
    tune_socket,
)
from vrep.wire.transport import FrameTransport, Timeouts

__all__ = ["Handler", "Listener", "client_context", "connect", "join_site", "server_context"]

CONNECTIONS_MAX: Final = 256
GIVES_WAY_S: Final = 0.2
"""what one that gives way may take to end, before another is accepted"""
TOLD_S: Final = 60.0
"""one word in the log of those that give way, at most"""

_log = logging.getLogger("vrep.wire")
_software = f"vrep {__version__}"

ConnectSocket = Callable[[tuple[str, int], float], socket.socket]
ListenSocket = Callable[[tuple[str, int]], socket.socket]
Handler = Callable[[FrameTransport], None]


def client_context(identity: SiteIdentity | None) -> TlsContext:
    """For connecting; without an identity no certificate is shown (joining).
    OpenSSL verifies that the peer holds its certificate's key but no chain:
    there is none, and `connect` compares the fingerprint itself."""
    if identity is None:
        return TlsContext(server=False)
    return TlsContext(
        server=False, certificate_path=identity.certificate_path, key_path=identity.key_path
    )


def server_context(identity: SiteIdentity, peers: list[Peer]) -> TlsContext:
    """For accepting: trusts the peers' certificates and no other. A certificate is pinned until
    it is removed; its dates are not judged by a clock that a host may have lost."""
    return TlsContext(
        server=True,
        certificate_path=identity.certificate_path,
        key_path=identity.key_path,
        trusted="\n".join(peer.certificate for peer in peers),
    )


def _connect_tcp(address: tuple[str, int], timeout_s: float) -> socket.socket:
    return socket.create_connection(address, timeout_s)


def _listen_tcp(address: tuple[str, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    return socket.create_server(address, family=family, backlog=64)


def _open_stream(
    address: str,
    context: TlsContext,
    fingerprint: str,
    timeouts: Timeouts,
    clock: Clock,
    connect_socket: ConnectSocket,
) -> TlsStream:
    try:
        sock = connect_socket(parse_address(address), timeouts.connect_s)
    except OSError as error:
        raise UnreachableError(f"{address}: {error.strerror or error}") from None
    try:
        tune_socket(sock, timeouts.dead_after_s)
        stream = TlsStream(sock, context, clock=clock)
    except BaseException:
        sock.close()
        raise
    try:
        stream.handshake(timeouts.handshake_s)
        shown = stream.peer_fingerprint()
        if shown != fingerprint:
            raise TrustError(
                f"{address} shows the certificate {shown}, not {fingerprint}: it is another site, "
                "or somebody stands between"
            )
    except BaseException:
        stream.close()
        raise
    return stream


def connect(
    identity: SiteIdentity,
    peer: Peer,
    *,
    address: str | None = None,
    timeouts: Timeouts | None = None,
    clock: Clock | None = None,
    connect_socket: ConnectSocket = _connect_tcp,
    versions: tuple[int, int] = (PROTOCOL_VERSION_MIN, PROTOCOL_VERSION_MAX),
    allocate: Allocate | None = None,
) -> FrameTransport:
    """A greeted connection to a peer, ready for groups and requests."""
    timeouts, clock = timeouts or Timeouts(), clock or SystemClock()
    where = address or peer.address
    if not where:
        raise UnreachableError(f"the peer {peer.name!r} has no address: it does not listen")
    stream = _open_stream(
        where, client_context(identity), peer.fingerprint, timeouts, clock, connect_socket
    )
    connection = Connection(Role.CLIENT, versions=versions, allocate=allocate)
    transport = FrameTransport(stream, connection, peer=peer, timeouts=timeouts, clock=clock)
    try:
        transport.greet(identity.site_id, identity.name, _software, m.FEATURES)
    except BaseException:
        transport.close()
        raise
    return transport


def join_site(
    identity: SiteIdentity,
    peers: PeerRegistry,
    token: str,
    *,
    listen_address: str = "",
    timeouts: Timeouts | None = None,
    clock: Clock | None = None,
    connect_socket: ConnectSocket = _connect_tcp,
) -> Peer:
    """Spend an invitation: both sites trust each other when it returns."""
    timeouts, clock = timeouts or Timeouts(), clock or SystemClock()
    invite: Invite = decode_invite(token)
    if invite.expires <= clock.time_ns() // 1_000_000_000:
        raise InviteError("it has expired: ask for a new one")
    if invite.fingerprint == identity.fingerprint:
        raise InviteError("it is this site's own: take it to the other site")
    stream = _open_stream(
        invite.address, client_context(None), invite.fingerprint, timeouts, clock, connect_socket
    )
    connection = Connection(Role.CLIENT, known=False)
    with FrameTransport(stream, connection, timeouts=timeouts, clock=clock) as transport:
        der = stream.peer_certificate_der()
        assert der is not None  # its fingerprint was compared
        transport.greet(identity.site_id, identity.name, _software)
        transport.send(
            m.Join(
                secret=invite.secret,
                site_id=identity.site_id,
                name=identity.name,
                certificate=identity.certificate_pem,
                address=listen_address,
            )
        )
        answer = transport.expect(timeouts.handshake_s).message
        if not isinstance(answer, m.Joined):
            raise ProtocolError(f"{type(answer).__name__} came in place of JOINED")
    peer = peers.check(
        name=answer.name,
        site_id=answer.site_id,
        certificate=ssl.DER_cert_to_PEM_cert(der),
        address=answer.address or invite.address,
        joined=_datetime(clock),
    )
    peers.add(peer)
    return peer


def _datetime(clock: Clock) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(clock.time_ns() / 1e9, datetime.UTC)


class Listener:
    """Accepts connections of peers and gives each, greeted, to `handler` in a
    thread of its own; the connection is closed when the handler returns."""

    def __init__(
        self,
        identity: SiteIdentity,
        peers: PeerRegistry,
        invites: InviteBook,
        address: str,
        handler: Handler,
        *,
        advertised_address: str = "",
        timeouts: Timeouts | None = None,
        clock: Clock | None = None,
        listen_socket: ListenSocket = _listen_tcp,
        versions: tuple[int, int] = (PROTOCOL_VERSION_MIN, PROTOCOL_VERSION_MAX),
        allocate: Allocate | None = None,
    ) -> None:
        self._identity = identity
        self._peers = peers
        self._invites = invites
        self._handler = handler
        self._advertised = advertised_address
        self._timeouts = timeouts or Timeouts()
        self._clock = clock or SystemClock()
        self._versions = versions
        self._allocate = allocate
        self._lock = threading.Lock()
        self._joining = threading.Lock()
        self._stopping = threading.Event()
        self._open: dict[threading.Thread, Visit] = {}
        self._door = Door()
        self._told_s: float | None = None
        self._known: dict[threading.Thread, FrameTransport] = {}
        try:
            self._socket = listen_socket(parse_address(address))
        except OSError as error:
            raise InvalidError(f"cannot listen on {address}: {error.strerror or error}") from None
        self._accepting = threading.Thread(target=self._accept, name="vrep-accept", daemon=True)

    @property
    def address(self) -> str:
        """Where it listens, with the port that was given to it."""
        name = self._socket.getsockname()
        return format_address(name[0], name[1])

    def start(self) -> None:
        self._accepting.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Accept no more, end every connection, wait for the handlers."""
        self._stopping.set()
        # Wakes accept(); a plain close would not.
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            _log.debug("the listening socket was down already: %s", error)
        if self._accepting.ident is not None:
            self._accepting.join(timeout_s)
        self._socket.close()
        with self._lock:
            threads = list(self._open)
            known = list(self._known.values())
            streams = [visit.stream for visit in self._open.values() if visit.stream is not None]
        for transport in known:
            transport.close("the site stops")
        for stream in streams:
            stream.close()
        deadline = self._clock.monotonic() + timeout_s
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - self._clock.monotonic()))

    def connected(self) -> set[str]:
        """Ids of the peers that are connected."""
        with self._lock:
            return {t.peer.site_id for t in self._known.values() if t.peer}

    def drop_peer(self, site_id: str) -> int:
        """End the connections of a peer that was removed. How many there were."""
        with self._lock:
            victims = [t for t in self._known.values() if t.peer and t.peer.site_id == site_id]
        for transport in victims:
            transport.close("the peer was removed")
        return len(victims)

    def __enter__(self) -> Listener:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                if self._stopping.is_set():
                    return
                _log.warning("cannot accept a connection: %s", error)
                self._stopping.wait(0.2)  # out of descriptors: do not spin
                continue
            visit = Visit(network_of(address[0]))
            thread = threading.Thread(
                target=self._serve, args=(sock, address, visit), name="vrep-peer", daemon=True
            )
            gone = None
            with self._lock:
                full = len(self._open) >= CONNECTIONS_MAX
                if not full:
                    gone = self._door.enter(visit)
                    self._open[thread] = visit
            if full:
                _log.warning("too many connections: %s is turned away", address[0])
                sock.close()
                continue
            if gone is not None:
                self._send_away(gone)
            try:
                threads.start(thread)
            except RuntimeError as error:
                _log.warning("cannot serve %s: %s", address[0], error)
                sock.close()
                with self._lock:
                    self._open.pop(thread, None)
                    self._door.leave(visit)

    def _send_away(self, visit: Visit) -> None:
        """End one that gives way. Who comes faster than those end waits for them: there are never
        many threads more than places."""
        with self._lock:
            thread = next((t for t, is_of in self._open.items() if is_of is visit), None)
        now = self._clock.monotonic()
        if self._told_s is None or now - self._told_s >= TOLD_S:
            self._told_s = now
            _log.warning(
                "many connections of which nobody knows the peer: the oldest of %s gives way, as "
                "others will",
                visit.network,
            )
        if visit.stream is not None:
            visit.stream.close()
        if thread is not None and thread.ident is not None:
            thread.join(GIVES_WAY_S)

    def _serve(self, sock: socket.socket, address: tuple[str, int], visit: Visit) -> None:
        thread = threading.current_thread()
        stream: TlsStream | None = None
        try:
            with sock:
                tune_socket(sock, self._timeouts.dead_after_s)
                # Made for each connection: the registry may have changed.
                context = server_context(self._identity, self._peers.list())
                stream = TlsStream(sock, context, clock=self._clock)
            with self._lock:
                visit.stream = stream
            if self._stopping.is_set() or visit.gone:
                return
            stream.handshake(self._timeouts.handshake_s)
            self._greet(stream, thread, visit)
        except (VrepError, OSError) as error:
            expected = self._stopping.is_set() or visit.gone
            level = logging.DEBUG if expected else logging.WARNING
            _log.log(level, "connection of %s ended: %s", format_address(*address[:2]), error)
        except Exception:  # noqa: BLE001
            # The edge of this thread: a fault in a handler ends its connection only.
            _log.exception("connection of %s failed", format_address(*address[:2]))
        finally:
            if stream is not None:
                stream.close()
            with self._lock:
                self._open.pop(thread, None)
                self._known.pop(thread, None)
                self._door.leave(visit)

    def _greet(self, stream: TlsStream, thread: threading.Thread, visit: Visit) -> None:
        fingerprint = stream.peer_fingerprint()
        peer = self._peers.by_fingerprint(fingerprint) if fingerprint else None
        if fingerprint and peer is None:
            raise TrustError(f"the certificate {fingerprint} is no peer's (any more)")
        if peer is not None:
            with self._lock:
                self._door.leave(visit)
        connection = Connection(
            Role.SERVER,
            known=peer is not None,
            versions=self._versions,
            allocate=self._allocate,
        )
        transport = FrameTransport(
            stream, connection, peer=peer, timeouts=self._timeouts, clock=self._clock
        )
        try:
            transport.greet(self._identity.site_id, self._identity.name, _software, m.FEATURES)
            if peer is None:
                self._join(transport, visit)
                return
            with self._lock:
                self._known[thread] = transport
            if not self._stopping.is_set():
                self._handler(transport)
        except ProtocolError as error:
            transport.refuse("protocol", error.detail)
            raise
        finally:
            transport.close()

    def _join(self, transport: FrameTransport, visit: Visit) -> None:
        message = transport.expect(self._timeouts.handshake_s).message
        if isinstance(message, m.Bye):
            return
        if not isinstance(message, m.Join):
            raise ProtocolError(f"{type(message).__name__} by a peer that is not known")
        try:
            # One at a time, and everything is checked before the invitation is spent.
            with self._joining:
                peer = self._peers.check(
                    name=message.name,
                    site_id=message.site_id,
                    certificate=message.certificate,
                    address=message.address,
                    joined=_datetime(self._clock),
                )
                if peer.fingerprint == self._identity.fingerprint:
                    raise TrustError("that is this site's own certificate")
                # Who was invited hears the answer, and does not give way any more.
                with self._lock:
                    if visit.gone:
                        raise ConnectionLostError("it gave way to others")
                    self._invites.redeem(message.secret)
                    self._door.leave(visit)
                self._peers.add(peer)
        except InviteError as error:
            transport.refuse("invite", str(error))
            raise
        except (PeerError, VrepError) as error:
            transport.refuse("join", str(error))
            raise
        _log.info("the site %s joined", peer.name)
        transport.send(
            m.Joined(
                site_id=self._identity.site_id,
                name=self._identity.name,
                address=self._advertised,
            )
        )
        # The peer closes; waiting for it keeps the answer from being cut off.
        transport.receive(self._timeouts.handshake_s)
