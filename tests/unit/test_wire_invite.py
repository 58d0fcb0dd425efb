"""Invitations and the registry of peers, without a network."""

from __future__ import annotations

import datetime
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vrep.errors import CorruptError, ExistsError, InvalidError, NotFoundError, VersionError
from vrep.keys import IdentityError, SiteIdentity
from vrep.wire.address import format_address, parse_address
from vrep.wire.invite import Invite, InviteBook, InviteError, decode_invite, encode_invite
from vrep.wire.peers import Peer, PeerRegistry

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
INVITE = Invite("site-b", "b.example:7001", "ab" * 32, bytes(range(16)), 1_767_225_600)
PINNED = (
    "VlJJAZWmc2l0ZS1irmIuZXhhbXBsZTo3MDAxxCCrq6urq6urq6urq6urq6urq6urq6urq6"
    "urq6urq6urq8QQAAECAwQFBgcICQoLDA0OD85pVbkABqG7PQ"
)


class ManualClock:
    def __init__(self) -> None:
        self.now_s = 1_767_000_000

    def monotonic(self) -> float:
        return float(self.now_s)

    def time_ns(self) -> int:
        return self.now_s * 1_000_000_000


def test_the_token_is_pinned() -> None:
    assert encode_invite(INVITE) == PINNED
    assert decode_invite(PINNED) == INVITE
    assert decode_invite("  " + PINNED[:40] + "\n  " + PINNED[40:] + "\n") == INVITE
    assert INVITE.secret.hex() not in repr(INVITE)


@given(st.integers(0, len(PINNED) - 1), st.characters(codec="ascii"))
def test_a_mistyped_token(at: int, letter: str) -> None:
    changed = PINNED[:at] + letter + PINNED[at + 1 :]
    try:
        invite = decode_invite(changed)
    except (InviteError, VersionError):
        return
    assert invite == INVITE


@given(st.text(max_size=300) | st.binary(max_size=200).map(lambda b: b.hex()))
def test_garbage_is_no_token(text: str) -> None:
    with pytest.raises(InviteError):
        decode_invite(text)
    with pytest.raises(InviteError):
        decode_invite("VlJJ" + text)


def make(book: InviteBook, lifetime_s: int = 60) -> Invite:
    return book.create(
        name="b", address="127.0.0.1:1", fingerprint="ab" * 32, lifetime_s=lifetime_s
    )


def test_single_use(tmp_path: Path) -> None:
    clock = ManualClock()
    book = InviteBook(tmp_path, clock)
    invite = make(book)
    assert book.pending() == 1
    # Another process of the site, as after a restart.
    InviteBook(tmp_path, clock).redeem(invite.secret)
    assert book.pending() == 0
    with pytest.raises(InviteError, match="used already"):
        book.redeem(invite.secret)
    with pytest.raises(InviteError, match="never given out"):
        book.redeem(bytes(16))


def test_expiry(tmp_path: Path) -> None:
    clock = ManualClock()
    book = InviteBook(tmp_path, clock)
    invite = make(book, 60)
    clock.now_s += 59
    assert book.pending() == 1
    clock.now_s += 1
    with pytest.raises(InviteError, match="expired"):
        book.redeem(invite.secret)
    assert book.pending() == 0
    clock.now_s += 10 * 24 * 3600
    make(book)
    assert len(list((tmp_path / "invites").iterdir())) == 1


@pytest.mark.parametrize("lifetime_s", [0, -1, 366 * 86400 + 1, 9999999 * 604800])
def test_an_invitation_that_nobody_could_use_is_not_made(tmp_path: Path, lifetime_s: int) -> None:
    book = InviteBook(tmp_path)
    with pytest.raises(InvalidError, match="1 second to 366 days"):
        make(book, lifetime_s)
    assert book.pending() == 0
    longest = make(book, 366 * 86400)
    assert decode_invite(encode_invite(longest)) == longest


def test_the_secret_is_not_kept(tmp_path: Path) -> None:
    invite = make(InviteBook(tmp_path))
    (path,) = (tmp_path / "invites").iterdir()
    kept = path.name.encode() + path.read_bytes()
    assert invite.secret not in kept
    assert invite.secret.hex().encode() not in kept
    path.write_text("{")
    with pytest.raises(CorruptError, match="invitation"):
        InviteBook(tmp_path).redeem(invite.secret)


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    book = InviteBook(tmp_path)
    invite = make(book)
    start = threading.Barrier(8)
    outcomes: list[str] = []

    def redeem() -> None:
        start.wait()
        try:
            book.redeem(invite.secret)
            outcomes.append("won")
        except InviteError:
            outcomes.append("lost")

    threads = [threading.Thread(target=redeem) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 7 + ["won"]


def check(peers: PeerRegistry, site: SiteIdentity, **changes: str) -> Peer:
    fields = {
        "name": site.name,
        "site_id": site.site_id,
        "certificate": site.certificate_pem,
        "address": "",
    } | changes
    return peers.check(joined=NOW, **fields)


def test_registry(tmp_path: Path) -> None:
    a = SiteIdentity.create(tmp_path / "a", "a")
    c = SiteIdentity.create(tmp_path / "c", "c")
    peers = PeerRegistry(tmp_path / "b")
    assert peers.list() == []
    peers.add(check(peers, c))
    peers.add(check(peers, a, address="[::1]:7001"))
    again = PeerRegistry(tmp_path / "b")
    assert [peer.name for peer in again.list()] == ["a", "c"]
    found = again.by_fingerprint(a.fingerprint)
    assert found == again.get("a") == again.get(a.site_id)
    assert found is not None
    assert (found.fingerprint, found.joined) == (a.fingerprint, NOW)
    # The same site again, with a new address.
    peers.add(check(peers, a, address="a.example:1"))
    assert again.get("a").address == "a.example:1"
    assert again.remove("a").site_id == a.site_id
    assert peers.by_fingerprint(a.fingerprint) is None
    with pytest.raises(NotFoundError, match="'a'"):
        again.remove("a")


def test_what_a_registry_refuses(tmp_path: Path) -> None:
    a = SiteIdentity.create(tmp_path / "a", "a")
    c = SiteIdentity.create(tmp_path / "c", "c")
    peers = PeerRegistry(tmp_path / "b")
    peers.add(check(peers, a))
    for changes in ({"name": "a"}, {"site_id": a.site_id}, {"certificate": a.certificate_pem}):
        with pytest.raises(ExistsError, match="'a'"):
            check(peers, c, **changes)
    with pytest.raises(IdentityError):
        check(peers, c, site_id="../../etc/passwd")
    with pytest.raises(IdentityError):
        check(peers, c, name="../c")
    with pytest.raises(InvalidError):
        check(peers, c, address="nowhere")
    (path,) = (tmp_path / "b" / "peers").iterdir()
    path.write_text("[]")
    with pytest.raises(CorruptError, match=path.name):
        peers.list()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("a.example:1", "a.example", 1), ("10.0.0.1:65535", "10.0.0.1", 65535), ("[::1]:0", "::1", 0)],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert parse_address(text) == (host, port)
    assert format_address(host, port) == text


@pytest.mark.parametrize(
    "text", ["", "host", ":1", "::1:1", "h:65536", "h:-1", "h:x", "h:", "h:\u0661"]
)
def test_no_addresses(text: str) -> None:
    with pytest.raises(InvalidError, match="no address"):
        parse_address(text)
