"""TLS over a socket that takes and gives little at a time."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vrep._core.tls import TlsContext
from vrep.errors import InvalidError, StorageError, TimeLimitError
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
    client = TlsStream(here, client_context(None), clock=SystemClock())
    server = TlsStream(there, server_context(identity, []), clock=SystemClock())
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


def plain_context() -> ssl.SSLContext:
    """A client of another make."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.fixture
def foreign(identity: SiteIdentity) -> Iterator[tuple[ssl.SSLSocket, TlsStream]]:
    """A client of another make, and our server."""
    here, there = socket.socketpair()
    server = TlsStream(there, server_context(identity, []), clock=SystemClock())
    thread = threading.Thread(target=server.handshake, args=(WAIT_S,))
    thread.start()
    client = plain_context().wrap_socket(here)
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


def test_new_keys_are_answered_though_nobody_writes(identity: SiteIdentity) -> None:
    """A key update that asks for ours gets it, and is no data."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = ["openssl", "s_client", "-connect", address, "-tls1_3"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as peer:
            sock, _ = listener.accept()
            here, there = socket.socketpair()
            server = TlsStream(there, server_context(identity, []), clock=SystemClock())
            relay = Relay(sock, here)
            try:
                server.handshake(WAIT_S)
                before = relay.answers
                assert peer.stdin is not None
                assert peer.stderr is not None
                deadline = time.monotonic() + WAIT_S
                while relay.answers < before + 3:
                    assert time.monotonic() < deadline
                    peer.stdin.write(b"K\n")
                    peer.stdin.flush()
                    # Read by itself: a line that comes together with it would be dropped.
                    line = b""
                    while b"KEYUPDATE" not in line:
                        line = peer.stderr.readline()
                        assert line
                    assert server.read_into(memoryview(bytearray(16)), 0.2) is None
                peer.stdin.write(b"data\n")
                peer.stdin.flush()
                room = memoryview(bytearray(16))
                assert server.read_into(room, WAIT_S) == 5
                assert bytes(room[:5]) == b"data\n"
            finally:
                peer.kill()
                server.close()
                relay.close()


class Relay:
    """Stands between a peer and our end, and counts the pieces that our end sends."""

    def __init__(self, peer: socket.socket, ours: socket.socket) -> None:
        self.answers = 0
        self._sockets = peer, ours
        self._threads = [
            threading.Thread(target=self._pump, args=(peer, ours, False)),
            threading.Thread(target=self._pump, args=(ours, peer, True)),
        ]
        for thread in self._threads:
            thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, count: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.answers += count
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        for sock in self._sockets:
            sock.close()


def test_what_comes_and_is_no_data_does_not_hold_the_reader(
    foreign: tuple[ssl.SSLSocket, TlsStream],
) -> None:
    """A record that never gets whole, a byte at a time: the reader's time is over all the same."""
    client, server = foreign
    over = threading.Event()
    with socket.socket(fileno=os.dup(client.fileno())) as raw:
        raw.sendall(b"\x17\x03\x03\x40\x00")

        def trickle() -> None:
            while not over.wait(0.0001):
                # Nobody reads once the reader is done: what there is no room for is left out.
                with contextlib.suppress(BlockingIOError):
                    raw.send(b"x", socket.MSG_DONTWAIT)

        thread = threading.Thread(target=trickle)
        thread.start()
        got: list[int | None] = []
        reader = threading.Thread(
            target=lambda: got.append(server.read_into(memoryview(bytearray(16)), 0.2)),
            daemon=True,
        )
        reader.start()
        reader.join(5)
        over.set()
        thread.join()
    assert got == [None]


def test_a_trickle_of_data_does_not_hold_the_reader(pair: Pair) -> None:
    """Bytes that come one by one are returned long before all that was asked for is there."""
    client, server = pair
    over = threading.Event()

    def trickle() -> None:
        while not over.wait(0.0005):
            client.write(b"x", WAIT_S)

    thread = threading.Thread(target=trickle)
    thread.start()
    got: list[int | None] = []
    reader = threading.Thread(
        target=lambda: got.append(server.read_into(memoryview(bytearray(1 << 20)), WAIT_S)),
        daemon=True,
    )
    reader.start()
    reader.join(5)
    over.set()
    while thread.is_alive():  # it may wait for room, which only a reader makes
        server.read_into(memoryview(bytearray(4096)), 0.02)
    thread.join()
    assert got
    assert got[0]
    assert got[0] < 1 << 19


def test_a_large_read_is_filled_in_few_calls(pair: Pair) -> None:
    """Who asks for a frame that is on its way gets it whole, not record by record."""
    client, server = pair
    data = random.Random(3).randbytes(4 << 20)
    thread = threading.Thread(target=client.write, args=(data, WAIT_S))
    thread.start()
    room, at, calls = memoryview(bytearray(len(data))), 0, 0
    while at < len(data):
        count = server.read_into(room[at:], WAIT_S)
        assert count
        at, calls = at + count, calls + 1
    thread.join(WAIT_S)
    assert bytes(room) == data
    assert calls < len(data) // 16384


def test_peers_of_another_make_agree(identity: SiteIdentity) -> None:
    """The standard library's TLS at the other end, either way round, with large writes."""
    data = random.Random(5).randbytes(3 << 20)
    for we_serve in (True, False):
        here, there = socket.socketpair()
        context = server_context(identity, []) if we_serve else client_context(None)
        ours = TlsStream(there, context, clock=SystemClock())
        thread = threading.Thread(target=ours.handshake, args=(WAIT_S,))
        thread.start()
        if we_serve:
            other = plain_context()
        else:
            other = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            other.load_cert_chain(identity.certificate_path, identity.key_path)
        peer = other.wrap_socket(here, server_side=not we_serve)
        thread.join(WAIT_S)
        assert peer.version() == "TLSv1.3"
        writer = threading.Thread(target=ours.write, args=(data, WAIT_S))
        writer.start()
        got = bytearray()
        while len(got) < len(data):
            got += peer.recv(65536)
        writer.join(WAIT_S)
        assert got == data
        writer = threading.Thread(target=peer.sendall, args=(data,))
        writer.start()
        got, room = bytearray(), memoryview(bytearray(300_000))
        while len(got) < len(data):
            got += room[: ours.read_into(room, WAIT_S) or 0]
        writer.join(WAIT_S)
        assert got == data
        if not we_serve:
            der = ssl.PEM_cert_to_DER_cert(identity.certificate_pem)
            assert ours.peer_certificate_der() == der
        else:
            assert ours.peer_certificate_der() is None
        peer.close()
        ours.close()


def test_a_context_needs_what_it_is_given(tmp_path: Path, identity: SiteIdentity) -> None:
    with pytest.raises(StorageError):
        TlsContext(server=True, certificate_path=tmp_path / "no", key_path=tmp_path / "no")
    with pytest.raises(InvalidError):
        TlsContext(
            server=True,
            certificate_path=identity.certificate_path,
            key_path=identity.certificate_path,
        )
    with pytest.raises(InvalidError):
        TlsContext(server=True, trusted="no certificate")
    with pytest.raises(InvalidError):
        TlsContext(server=True, trusted=identity.certificate_pem + identity.certificate_pem[:200])


def test_bytes_that_are_not_tls_end_it(identity: SiteIdentity) -> None:
    here, there = socket.socketpair()
    with here:
        server = TlsStream(there, server_context(identity, []), clock=SystemClock())
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
    deadline = time.monotonic() + WAIT_S
    while pair[0]._users < 2:  # who comes later is refused, and has not to be woken
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pair[0].close()
    for thread in threads:
        thread.join(WAIT_S)
    assert ends == [0, 0]
