"""Who gives way at a listener's door, and that those who are let in do not notice."""

from __future__ import annotations

import datetime
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrep.keys import SiteIdentity
from vrep.wire.address import parse_address
from vrep.wire.door import STRANGERS_MAX, Door, Visit, network_of
from vrep.wire.invite import InviteBook, encode_invite
from vrep.wire.peers import Peer, PeerRegistry
from vrep.wire.site import Listener, connect, join_site
from vrep.wire.transport import FrameTransport, Timeouts

WAIT_S = 30.0
PATIENT = Timeouts(connect_s=WAIT_S, handshake_s=WAIT_S)
"""no time limit helps whoever waits for a place"""


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:0:0:2", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_networks(host: str, network: str) -> None:
    assert network_of(host) == network


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 9)), max_size=80),
)
def test_who_gives_way_is_the_first_of_those_that_have_most(
    places: int, steps: list[tuple[int, bool, int]]
) -> None:
    door, inside = Door(places), list[Visit]()
    for network, leaves, which in steps:
        if leaves and inside:
            door.leave(inside.pop(which % len(inside)))
            continue
        visit = Visit(str(network))
        gone = door.enter(visit)
        if len(inside) < places:
            assert gone is None
        else:
            per = {v.network: [w for w in inside if w.network == v.network] for v in inside}
            most = max(map(len, per.values()))
            first = next(v for v in inside if len(per[v.network]) == most)
            assert gone is first
            assert gone.gone
            inside.remove(gone)
        inside.append(visit)
        assert not any(v.gone for v in inside)


class Home:
    """A site that listens on every loopback address, a peer of it, and silent connections."""

    def __init__(self, where: Path) -> None:
        now = lambda: datetime.datetime.now(datetime.UTC)  # noqa: E731
        self.where = where
        self.home = SiteIdentity.create(where / "home", "home", now=now)
        self.away = SiteIdentity.create(where / "away", "away", now=now)
        self.peers = PeerRegistry(where / "home")
        self.invites = InviteBook(where / "home")
        self.served = threading.Event()
        self.listener = Listener(
            self.home, self.peers, self.invites, "0.0.0.0:0", self.serve, timeouts=PATIENT
        )
        self.listener.start()
        self.port = parse_address(self.listener.address)[1]
        self.silent: list[socket.socket] = []

    def serve(self, transport: FrameTransport) -> None:
        self.served.set()
        transport.receive(WAIT_S)

    def trust(self, *, of: SiteIdentity, by: Path) -> Peer:
        registry = PeerRegistry(by)
        peer = registry.check(
            name=of.name,
            site_id=of.site_id,
            certificate=of.certificate_pem,
            address=f"127.0.0.1:{self.port}" if of is self.home else "",
            joined=of.created,
        )
        registry.add(peer)
        return peer

    def arrive(self, count: int, host: str) -> list[socket.socket]:
        """Silent connections from an address of this host."""
        made = []
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", self.port), WAIT_S, (host, 0))
            sock.settimeout(WAIT_S)
            made.append(sock)
        self.silent += made
        return made


def ended(sock: socket.socket) -> bool:
    """Whether the other side closed it: waits for that."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = Home(tmp_path)
    yield made
    for sock in made.silent:
        sock.close()
    made.listener.close()


@pytest.mark.parametrize("host", ["127.0.0.2", "127.0.0.1"], ids=["elsewhere", "same-address"])
def test_half_open_connections_do_not_keep_a_peer_out(home: Home, host: str) -> None:
    peer = home.trust(of=home.home, by=home.where / "away")
    home.trust(of=home.away, by=home.where / "home")
    home.arrive(STRANGERS_MAX, host)
    with connect(home.away, peer, timeouts=PATIENT):
        assert home.served.wait(WAIT_S)
        assert ended(home.silent[0])
        # Nor does anybody end a connection of a peer that was let in.
        home.arrive(STRANGERS_MAX + 1, host)
        assert all(ended(sock) for sock in home.silent[: STRANGERS_MAX + 1])
        assert home.listener.connected() == {home.away.site_id}


def test_a_stranger_from_elsewhere_keeps_its_place(home: Home) -> None:
    (slow,) = home.arrive(1, "127.0.0.3")
    flood = home.arrive(3 * STRANGERS_MAX, "127.0.0.2")
    gone = len(flood) - (STRANGERS_MAX - 1)
    assert all(ended(sock) for sock in flood[:gone])
    slow.setblocking(False)
    with pytest.raises(BlockingIOError):
        slow.recv(1)


def test_who_was_invited_gives_way_to_nobody(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The invitation is spent: an answer that is lost then would leave one site that trusts the
    other, and one that does not."""
    add: Callable[[PeerRegistry, Peer], None] = PeerRegistry.add

    def add_late(registry: PeerRegistry, peer: Peer) -> None:
        if registry is home.peers:
            flood = home.arrive(2 * STRANGERS_MAX, "127.0.0.1")
            assert all(ended(sock) for sock in flood[:STRANGERS_MAX])
        add(registry, peer)

    monkeypatch.setattr(PeerRegistry, "add", add_late)
    token = encode_invite(
        home.invites.create(
            name="home",
            address=f"127.0.0.1:{home.port}",
            fingerprint=home.home.fingerprint,
        )
    )
    joined = join_site(home.away, PeerRegistry(home.where / "away"), token, timeouts=PATIENT)
    assert joined.site_id == home.home.site_id
    assert [peer.site_id for peer in home.peers.list()] == [home.away.site_id]
