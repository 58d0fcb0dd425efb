"""TLS over a socket that takes and gives little at a time."""

from __future__ import annotations

import os
import random
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from vrep.errors import TimeLimitError
from vrep.keys import SiteIdentity
from vrep.wire.site import client_context, server_context
from vrep.wire.stream import ConnectionLostError, SystemClock, TlsStream

WAIT_S = 30.0
TOTAL = 6 << 20

Pair = tuple[TlsStream, TlsStream]


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> SiteIdentity:
    return SiteIdentity.create(tmp_path_factory.mktemp("site"), "a")


@pytest.fixture
def pair(identity: SiteIdentity) -> Iterator[Pair]:
    here, there = socket.socketpair()
    for sock in (here, there):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    client = TlsStream(here, client_context(None), server_side=False, clock=SystemClock())
    server = TlsStream(there, server_context(identity, []), server_side=True, clock=SystemClock())
    thread = threading.Thread(target=server.handshake, args=(WAIT_S,))
    thread.start()
    client.handshake(WAIT_S)
    thread.join()
    yield client, server
    client.close()
    server.close()


def send(stream: TlsStream, data: bytes, seed: int) -> None:
    """By both ways of writing in turn; what write_some left begins the next write."""
    choose, at, left = random.Random(seed), 0, 0
    while at < len(data):
        size = max(left, choose.choice((1, 100, 16384, 65536, 65537, 400_000)))
        part = memoryview(data)[at : at + size]
        if choose.random() < 0.5:
            count = stream.write_some(part)
            at, left = at + count, len(part) - count
            assert left >= 0
        else:
            stream.write(part, WAIT_S)
            at, left = at + len(part), 0


def receive(stream: TlsStream, into: bytearray, seed: int) -> None:
    choose = random.Random(seed)
    while len(into) < TOTAL:
        room = memoryview(bytearray(choose.choice((1, 16, 1000, 16384, 300_000))))
        count = stream.read_into(room, WAIT_S)
        assert count
        into += room[:count]


@pytest.mark.parametrize("seed", range(4))
def test_both_directions_at_once(pair: Pair, seed: int) -> None:
    sent = [random.Random(seed + 10 * side).randbytes(TOTAL) for side in (0, 1)]
    got = [bytearray(), bytearray()]
    threads = []
    for side, stream in enumerate(pair):
        threads.append(threading.Thread(target=send, args=(stream, sent[side], seed)))
        threads.append(threading.Thread(target=receive, args=(stream, got[1 - side], seed)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert [bytes(each) for each in got] == sent


def test_what_write_some_left_begins_the_next_write(pair: Pair) -> None:
    client, server = pair
    data = random.Random(1).randbytes(1 << 20)
    count = client.write_some(data)
    assert 0 <= count < len(data)
    assert client.write_some(data[count:]) == 0  # nobody reads
    got = bytearray()
    reader = threading.Thread(
        target=lambda: [
            got.extend(room[: server.read_into(room, WAIT_S) or 0])
            for room in [memoryview(bytearray(len(data)))]
            for _ in iter(lambda: len(got) < len(data), False)
        ]
    )
    reader.start()
    client.write(data[count:], WAIT_S)
    reader.join(WAIT_S)
    assert got == data


def test_a_peer_that_takes_nothing_stalls_the_writer_for_so_long_and_no_more(pair: Pair) -> None:
    with pytest.raises(TimeLimitError, match="took no bytes"):
        pair[0].write(bytes(1 << 20), 0.1)


def test_nothing_comes_within_the_time(pair: Pair) -> None:
    assert pair[0].read_into(memoryview(bytearray(16)), 0.05) is None


def test_the_end_comes_after_all_bytes(pair: Pair) -> None:
    client, server = pair
    client.write(b"last words", WAIT_S)
    client.close()
    room = memoryview(bytearray(100))
    assert server.read_into(room, WAIT_S) == 10
    assert bytes(room[:10]) == b"last words"
    assert server.read_into(room, WAIT_S) == 0
    assert server.read_into(room, WAIT_S) == 0
    with pytest.raises(ConnectionLostError):
        server.write(bytes(1 << 20), WAIT_S)


@pytest.fixture
def foreign(identity: SiteIdentity) -> Iterator[tuple[ssl.SSLSocket, TlsStream]]:
    """A client of another make, and our server."""
    here, there = socket.socketpair()
    server = TlsStream(there, server_context(identity, []), server_side=True, clock=SystemClock())
    thread = threading.Thread(target=server.handshake, args=(WAIT_S,))
    thread.start()
    client = client_context(None).wrap_socket(here)
    thread.join()
    yield client, server
    client.close()
    server.close()


def test_a_peer_that_says_that_it_ends(foreign: tuple[ssl.SSLSocket, TlsStream]) -> None:
    client, server = foreign
    client.send(b"last words")
    client.settimeout(0.1)
    with pytest.raises(TimeoutError):  # close_notify has left; ours does not come
        client.unwrap()
    ends: list[int | None] = []
    got = bytearray(100)

    def read() -> None:
        ends.extend(server.read_into(memoryview(got), WAIT_S) for _ in range(3))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(WAIT_S)
    assert ends == [10, 0, 0]
    assert got[:10] == b"last words"


def test_a_damaged_record_is_told_to_who_sent_it(
    foreign: tuple[ssl.SSLSocket, TlsStream],
) -> None:
    client, server = foreign
    # A record of TLS 1.3 that no key opens, as a link that changes bytes would make it.
    with socket.socket(fileno=os.dup(client.fileno())) as raw:
        raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(ConnectionLostError, match=r"TLS failed: .*bad record mac"):
        server.read_into(memoryview(bytearray(100)), WAIT_S)
    server.close()
    with pytest.raises(ssl.SSLError, match=r"(?i)alert bad record mac"):
        client.recv(1)


def test_new_keys_without_end(identity: SiteIdentity) -> None:
    """A peer can ask for new keys for ever: the reader's time is over all the same, and what
    OpenSSL answers leaves, though nobody writes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = ["openssl", "s_client", "-connect", address, "-tls1_3"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as peer:
            sock, _ = listener.accept()
            server = TlsStream(
                sock, server_context(identity, []), server_side=True, clock=SystemClock()
            )
            try:
                server.handshake(WAIT_S)
                assert peer.stdin is not None
                answers = Counting(server)
                for _ in range(5):
                    peer.stdin.write(b"K\n")  # a key update that asks for ours
                    peer.stdin.flush()
                    assert server.read_into(memoryview(bytearray(16)), 0.2) is None
                assert answers.records >= 3
                answers.flood = True
                room, got = memoryview(bytearray(16)), []
                reader = threading.Thread(
                    target=lambda: got.append(server.read_into(room, 0.2)), daemon=True
                )
                reader.start()
                reader.join(5)
                assert got == [None]
            finally:
                peer.kill()
                server.close()


class Counting:
    """Stands between a stream and its socket: counts what is sent, and can make it look as if
    something that is no data arrived at every look."""

    def __init__(self, stream: TlsStream) -> None:
        self.records, self.flood = 0, False
        self._socket, self._receive = stream._sock, stream._receive
        stream._sock = cast("socket.socket", self)
        stream._receive = self.receive  # type: ignore[method-assign]

    def receive(self) -> bool:
        return self._receive() or self.flood

    def send(self, data: memoryview) -> int:
        self.records += 1
        return self._socket.send(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def test_bytes_that_are_not_tls_end_it(identity: SiteIdentity) -> None:
    here, there = socket.socketpair()
    with here:
        server = TlsStream(
            there, server_context(identity, []), server_side=True, clock=SystemClock()
        )
        here.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        here.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionLostError):
            server.handshake(WAIT_S)
        server.close()


def test_closing_wakes_both_directions(pair: Pair) -> None:
    ends: list[object] = []

    def read() -> None:
        ends.append(pair[0].read_into(memoryview(bytearray(16)), WAIT_S))

    def write() -> None:
        with pytest.raises(ConnectionLostError):
            pair[0].write(bytes(1 << 20), WAIT_S)
        ends.append(0)

    threads = [threading.Thread(target=each) for each in (read, write)]
    for thread in threads:
        thread.start()
    pair[0].close()
    for thread in threads:
        thread.join(WAIT_S)
    assert ends in ([0, 0], [None, 0]) or len(ends) == 1
