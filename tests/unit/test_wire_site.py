"""Sites over real TLS on loopback: who gets in, who does not, and why."""

from __future__ import annotations

import datetime
import queue
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vrep.errors import (
    PeerError,
    ProtocolError,
    TimeLimitError,
    TrustError,
    UnreachableError,
    VersionError,
    VrepError,
)
from vrep.keys import SiteIdentity
from vrep.keys.identity import utc_now
from vrep.wire import messages as m
from vrep.wire.address import parse_address
from vrep.wire.invite import Invite, InviteBook, InviteError, decode_invite, encode_invite
from vrep.wire.peers import Peer, PeerRegistry
from vrep.wire.protocol import Connection, Role
from vrep.wire.site import Listener, client_context, connect, join_site
from vrep.wire.stream import SystemClock, TlsStream
from vrep.wire.transport import FrameTransport, PeerRefusedError, Timeouts

WAIT_S = 30.0
QUICK = Timeouts(connect_s=WAIT_S, handshake_s=WAIT_S, ping_after_s=0.5, dead_after_s=2.0)
"""a peer that hangs is noticed soon; whoever shakes hands may be slow"""
HASTY = Timeouts(connect_s=WAIT_S, handshake_s=2.0)
"""who says nothing is sent away soon: not as soon as a slow machine needs to shake hands"""


class Site:
    """A site in a directory of its own."""

    def __init__(
        self, where: Path, name: str, now: Callable[[], datetime.datetime] = utc_now
    ) -> None:
        self.identity = SiteIdentity.create(where / name, name, now=now)
        self.peers = PeerRegistry(where / name)
        self.invites = InviteBook(where / name)

    def trust(self, other: Site, address: str = "") -> Peer:
        peer = self.peers.check(
            name=other.identity.name,
            site_id=other.identity.site_id,
            certificate=other.identity.certificate_pem,
            address=address,
            joined=other.identity.created,
        )
        self.peers.add(peer)
        return peer


def echo(transport: FrameTransport) -> None:
    """Answers each question with its own parameters, until BYE."""
    while not isinstance((message := transport.expect(WAIT_S).message), m.Bye):
        assert isinstance(message, m.Request)
        transport.send(m.Response(id=message.id, result=message.params))


class World:
    def __init__(self, where: Path) -> None:
        self.where = where
        self.a, self.b = Site(where, "a"), Site(where, "b")
        self.listeners: list[Listener] = []

    def listen(
        self,
        handler: Callable[[FrameTransport], None] = echo,
        timeouts: Timeouts | None = None,
        versions: tuple[int, int] = (1, 1),
    ) -> Listener:
        listener = Listener(
            self.b.identity,
            self.b.peers,
            self.b.invites,
            "127.0.0.1:0",
            handler,
            timeouts=timeouts,
            versions=versions,
        )
        listener.start()
        self.listeners.append(listener)
        return listener

    def token(self, listener: Listener, **changes: str) -> str:
        invite = self.b.invites.create(
            name="b", address=listener.address, fingerprint=self.b.identity.fingerprint
        )
        return encode_invite(Invite(**(vars(invite) | changes)))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    for listener in made.listeners:
        listener.close()


def ask(transport: FrameTransport, number: int = 1) -> None:
    question = m.Request(id=number, method="echo", params={"n": number})
    transport.send(question)
    answer = transport.expect(WAIT_S).message
    assert answer == m.Response(id=number, result={"n": number})


def test_join_then_talk(world: World) -> None:
    listener = world.listen()
    peer = join_site(
        world.a.identity, world.a.peers, world.token(listener), listen_address="a.example:7001"
    )
    assert peer == world.a.peers.get("b")
    assert (peer.address, peer.fingerprint) == (listener.address, world.b.identity.fingerprint)
    assert world.b.peers.get("a").address == "a.example:7001"
    with connect(world.a.identity, peer) as transport:
        ask(transport)


def test_a_token_is_good_once(world: World) -> None:
    listener = world.listen()
    token = world.token(listener)
    join_site(world.a.identity, world.a.peers, token)
    third = Site(world.where, "third")
    with pytest.raises(PeerRefusedError, match="used already") as caught:
        join_site(third.identity, third.peers, token)
    assert caught.value.code == "invite"
    assert third.peers.list() == []
    assert [peer.name for peer in world.b.peers.list()] == ["a"]


def test_expired_and_foreign_tokens(world: World) -> None:
    listener = world.listen()

    class Later(SystemClock):
        def time_ns(self) -> int:
            return super().time_ns() + 48 * 3600 * 10**9

    token = world.token(listener)
    with pytest.raises(InviteError, match="expired"):
        join_site(world.a.identity, world.a.peers, token, clock=Later())
    invite = decode_invite(token)
    # A clock that is behind does not help: the inviting site has its own.
    forged = encode_invite(Invite(**(vars(invite) | {"secret": bytes(16)})))
    with pytest.raises(PeerRefusedError, match="never given out"):
        join_site(world.a.identity, world.a.peers, forged)
    elsewhere = encode_invite(Invite(**(vars(invite) | {"fingerprint": "00" * 32})))
    with pytest.raises(TrustError, match="another site"):
        join_site(world.a.identity, world.a.peers, elsewhere)
    with pytest.raises(InviteError, match="own"):
        join_site(world.b.identity, world.b.peers, token)
    assert world.b.invites.pending() == 1
    assert world.a.peers.list() == world.b.peers.list() == []


def test_a_refused_join_does_not_spend_the_token(world: World) -> None:
    listener = world.listen()
    other = Site(world.where / "elsewhere", "a")
    world.b.trust(other)
    with pytest.raises(PeerRefusedError, match="trusted already"):
        join_site(world.a.identity, world.a.peers, world.token(listener))
    assert world.b.invites.pending() == 1


def test_a_server_that_is_another(world: World) -> None:
    listener = world.listen()
    third = Site(world.where, "third")
    world.b.trust(world.a)
    peer = world.a.trust(third, listener.address)
    with pytest.raises(TrustError, match="another site"):
        connect(world.a.identity, peer)


def refused(world: World, peer: Peer) -> VrepError:
    """A refused client may learn it in its handshake or at its first read."""
    with pytest.raises((TrustError, UnreachableError)) as caught:
        connect(world.a.identity, peer)
    return caught.value


def test_an_unknown_client(world: World) -> None:
    listener = world.listen()
    peer = world.a.trust(world.b, listener.address)
    third = Site(world.where, "third")
    world.b.trust(third)
    assert isinstance(refused(world, peer), TrustError)


def test_a_removed_peer_is_refused_at_once(world: World) -> None:
    listener = world.listen()
    peer = world.a.trust(world.b, listener.address)
    world.b.trust(world.a)
    with connect(world.a.identity, peer) as transport:
        ask(transport)
        PeerRegistry(world.where / "b").remove("a")
        refused(world, peer)
        ask(transport, 2)  # an old connection ends when it is dropped
        assert listener.drop_peer(world.a.identity.site_id) == 1
        with pytest.raises((PeerError, AssertionError)):
            ask(transport, 3)
    world.b.trust(world.a)
    with connect(world.a.identity, peer) as transport:
        ask(transport)


@pytest.mark.parametrize("years", [-30, 30])
def test_dates_of_certificates_play_no_part(world: World, years: int) -> None:
    """A peer is trusted until it is removed: replication must not end with a date, nor because a
    host woke up in 1970. To each end the other's certificate is not valid yet, or not any more."""
    then = utc_now() + datetime.timedelta(days=365 * years)
    world.a, world.b = (Site(world.where, name, lambda: then) for name in ("early", "late"))
    listener = world.listen()
    peer = world.a.trust(world.b, listener.address)
    world.b.trust(world.a)
    with connect(world.a.identity, peer) as transport:
        ask(transport)
    PeerRegistry(world.where / "late").remove("early")
    assert isinstance(refused(world, peer), TrustError)


@pytest.mark.parametrize(("ours", "theirs"), [((1, 1), (1, 2)), ((1, 2), (1, 1)), ((1, 9), (1, 3))])
def test_neighbouring_releases_talk_whichever_is_upgraded_first(
    world: World, ours: tuple[int, int], theirs: tuple[int, int]
) -> None:
    listener = world.listen(versions=theirs)
    peer = world.a.trust(world.b, listener.address)
    world.b.trust(world.a)
    with connect(world.a.identity, peer, versions=ours) as transport:
        assert transport.connection.version == min(ours[1], theirs[1])
        ask(transport)


def test_a_peer_cannot_pose_as_another(world: World) -> None:
    listener = world.listen()
    peer = world.a.trust(world.b, listener.address)
    world.b.trust(world.a)
    sock = socket.create_connection(parse_address(listener.address))
    stream = TlsStream(sock, client_context(world.a.identity), clock=SystemClock())
    stream.handshake(WAIT_S)
    with (
        FrameTransport(stream, Connection(Role.CLIENT), peer=peer) as transport,
        pytest.raises(PeerRefusedError, match="certificate is of site"),
    ):
        transport.greet("f" * 32, "a", "vrep")


def test_a_client_without_certificate_may_only_join(world: World) -> None:
    listener = world.listen()
    sock = socket.create_connection(parse_address(listener.address))
    stream = TlsStream(sock, client_context(None), clock=SystemClock())
    stream.handshake(WAIT_S)
    with FrameTransport(stream, Connection(Role.CLIENT)) as transport:
        transport.greet("f" * 32, "x", "vrep")
        transport.send(m.Request(id=1, method="echo"))
        with pytest.raises(PeerRefusedError, match="not known"):
            transport.expect(WAIT_S)


def test_tls_1_2_is_refused(world: World) -> None:
    listener = world.listen()
    world.b.trust(world.a)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(world.a.identity.certificate_path, world.a.identity.key_path)
    with (
        socket.create_connection(parse_address(listener.address)) as sock,
        pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"),
    ):
        context.wrap_socket(sock)


def test_releases_too_far_apart(world: World) -> None:
    listener = world.listen(versions=(2, 3))
    peer = world.a.trust(world.b, listener.address)
    world.b.trust(world.a)
    with pytest.raises(VersionError, match="older"):
        connect(world.a.identity, peer)


def test_garbage_and_half_open_connections_end_alone(world: World) -> None:
    listener = world.listen(timeouts=HASTY)
    peer = world.a.trust(world.b, listener.address)
    world.b.trust(world.a)
    choose = random.Random(7)
    mute = socket.create_connection(parse_address(listener.address))
    for _ in range(10):
        with socket.create_connection(parse_address(listener.address)) as sock:
            sock.sendall(choose.randbytes(choose.randrange(1, 3000)))
    # Said nothing after TCP, nothing after TLS, nothing after HELLO.
    sock = socket.create_connection(parse_address(listener.address))
    silent = TlsStream(sock, client_context(world.a.identity), clock=SystemClock())
    silent.handshake(WAIT_S)
    with connect(world.a.identity, peer) as transport:
        ask(transport)
    mute.settimeout(WAIT_S)
    assert mute.recv(1) == b""
    mute.close()
    buffer = memoryview(bytearray(64))
    count = silent.read_into(buffer, WAIT_S)
    assert count == 0
    silent.close()


def test_a_hung_peer_is_noticed_by_both_ends(world: World) -> None:
    faults: queue.Queue[VrepError] = queue.Queue()
    never = threading.Event()

    def hang(transport: FrameTransport) -> None:
        never.wait(WAIT_S)

    def notice(transport: FrameTransport) -> None:
        try:
            transport.receive(WAIT_S)
        except VrepError as error:
            faults.put(error)

    hung = world.listen(hang)
    peer = world.a.trust(world.b, hung.address)
    world.b.trust(world.a)
    with connect(world.a.identity, peer, timeouts=QUICK) as transport:
        with pytest.raises(TimeLimitError, match="silent"):
            transport.receive(WAIT_S)
        never.set()
    noticing = world.listen(notice, QUICK)
    # This end never reads, so it answers no ping.
    with connect(world.a.identity, peer, address=noticing.address):
        assert isinstance(faults.get(timeout=WAIT_S), TimeLimitError)


def test_nobody_listens(world: World) -> None:
    listener = world.listen()
    peer = world.a.trust(world.b, listener.address)
    listener.close()
    with pytest.raises(UnreachableError, match=peer.address):
        connect(world.a.identity, peer)
    with pytest.raises(UnreachableError, match="no address"):
        connect(world.a.identity, world.b.trust(world.a))


def test_a_fault_of_a_handler_ends_its_connection_only(world: World) -> None:
    def handler(transport: FrameTransport) -> None:
        if isinstance(transport.expect(WAIT_S).message, m.Request):
            raise ZeroDivisionError
        raise ProtocolError("not a question")

    listener = world.listen(handler)
    peer = world.a.trust(world.b, listener.address)
    world.b.trust(world.a)
    with connect(world.a.identity, peer) as one, connect(world.a.identity, peer) as two:
        one.send(m.Request(id=1, method="x"))
        assert isinstance(one.expect(WAIT_S).message, m.Bye)
        two.send(m.Status(time_ns=0, state="x"))
        with pytest.raises(PeerRefusedError, match="not a question"):
            two.expect(WAIT_S)


def test_closing_ends_every_connection(world: World) -> None:
    listener = world.listen()
    peer = world.a.trust(world.b, listener.address)
    world.b.trust(world.a)
    transports = [connect(world.a.identity, peer) for _ in range(3)]
    for transport in transports:
        ask(transport)
    listener.close()
    for transport in transports:
        assert transport.expect(WAIT_S).message == m.Bye(reason="the site stops")
        transport.close()


def test_both_directions_at_once_over_tls(world: World, rng: random.Random) -> None:
    """Records go up and acknowledgements come down through one TLS connection,
    from two threads at each end; every byte arrives, in order."""
    total = 24 << 20
    block = rng.randbytes(1 << 20)
    window = 2 << 20
    results: queue.Queue[tuple[int, bool]] = queue.Queue()

    def target(transport: FrameTransport) -> None:
        opening = transport.expect(WAIT_S)
        assert isinstance(opening.message, m.OpenGroup)
        zero = m.Position(epoch=1, seq=0)
        lane = m.LaneState(durable=zero, received=zero)
        transport.send(
            m.GroupOpened(
                epoch=opening.message.epoch, lanes=[lane], credit_bytes=window, empty=True
            ),
            opening.channel,
        )
        chatting = threading.Event()
        turns = threading.Semaphore(0)

        def chat() -> None:
            number = 0
            while turns.acquire(timeout=WAIT_S) and not chatting.is_set():
                number += 1
                transport.send(m.Status(time_ns=number, state="busy", values={"n": number}))

        chatter = threading.Thread(target=chat)
        chatter.start()
        received, right = 0, True
        try:
            while received < total:
                message = transport.expect(WAIT_S).message
                if not isinstance(message, m.Data):
                    continue
                turns.release(20)
                at = 0
                while at < len(message.payload):
                    offset = (received + at) % len(block)
                    count = min(len(block) - offset, len(message.payload) - at)
                    right &= message.payload[at : at + count] == block[offset : offset + count]
                    at += count
                received += len(message.payload)
                if transport.connection.release(1, len(message.payload)):
                    transport.send(transport.connection.ack(1, received, received), 1)
        finally:
            chatting.set()
            turns.release()
            chatter.join(WAIT_S)
        transport.send(transport.connection.ack(1, received, received), 1)
        results.put((received, right))
        assert isinstance(transport.expect(WAIT_S).message, m.Bye)

    listener = world.listen(target)
    peer = world.a.trust(world.b, listener.address)
    world.b.trust(world.a)
    with connect(world.a.identity, peer) as transport:
        transport.send(
            m.OpenGroup(
                group_id=bytes(16),
                name="g",
                epoch=m.EpochInfo(counter=1, id=bytes(16)),
                disks=[m.DiskInfo(index=0, name="d", size=1 << 30)],
                lanes=[m.LaneOffer(durable_seq=0, oldest_seq=1, newest_seq=0)],
                wrapped_keys=[b"w"],
            ),
            1,
        )
        assert isinstance(transport.expect(WAIT_S).message, m.GroupOpened)
        transport.send(m.StreamStart(stream_id=bytes(16), key_generation=1, resume_seq=0), 1)
        moved = threading.Condition()
        durable = 0

        def read() -> None:
            nonlocal durable
            while durable < total:
                message = transport.expect(WAIT_S).message
                if isinstance(message, m.Ack):
                    with moved:
                        durable = message.durable_seq
                        moved.notify()

        reader = threading.Thread(target=read)
        reader.start()
        sent = 0
        while sent < total:
            size = min(rng.choice([1, 100, 4096, 16352, 65536, 300_000]), total - sent)
            with moved:
                assert moved.wait_for(lambda: transport.connection.credit(1) >= size, WAIT_S)  # noqa: B023
            at = sent % len(block)
            first = memoryview(block)[at : at + size]
            parts = [first]
            while (missing := size - sum(map(len, parts))) > 0:
                parts.append(memoryview(block)[:missing])
            transport.send_data(1, parts)
            sent += size
        reader.join(WAIT_S)
        assert results.get(timeout=WAIT_S) == (total, True)
        assert durable == total
