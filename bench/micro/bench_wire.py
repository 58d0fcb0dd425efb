"""Frames over TLS beside a plain ssl loop, on loopback, in one run.

    python bench/micro/bench_wire.py [--json FILE] [--seconds 2] [--runs 3]

Each side is one process with a sending and a receiving thread, the same
certificate, cipher and write size; ours adds frames, credits and
acknowledgements. Runs alternate; `ratio` is the median of ours ÷ plain.
"""

from __future__ import annotations

import argparse
import json
import socket
import ssl
import statistics
import tempfile
import threading
import time
from pathlib import Path

from vrep.errors import VrepError
from vrep.keys import SiteIdentity
from vrep.wire import messages as m
from vrep.wire.invite import InviteBook
from vrep.wire.peers import PeerRegistry
from vrep.wire.site import Listener, connect
from vrep.wire.transport import FrameTransport

WINDOW = 16 << 20


def contexts(identity: SiteIdentity) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of the standard library: client, server."""
    client, server = (
        ssl.SSLContext(each) for each in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)
    )
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    server.load_cert_chain(identity.certificate_path, identity.key_path)
    return client, server


def plain(identity: SiteIdentity, size: int, seconds: float) -> float:
    """Bytes per second of sendall and recv_into."""
    server = socket.create_server(("127.0.0.1", 0))
    here, there = contexts(identity)
    received = 0

    def receive() -> None:
        nonlocal received
        with there.wrap_socket(server.accept()[0], server_side=True) as sock:
            buffer = memoryview(bytearray(size))
            while count := sock.recv_into(buffer):
                received += count

    thread = threading.Thread(target=receive)
    thread.start()
    raw = socket.create_connection(server.getsockname())
    payload = memoryview(bytearray(size))
    with here.wrap_socket(raw) as sock:
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            sock.sendall(payload)
        elapsed = time.perf_counter() - begin
    thread.join()
    server.close()
    return received / elapsed


def ours(where: Path, identity: SiteIdentity, size: int, seconds: float) -> float:
    """Bytes per second of DATA frames within credits."""
    peers = PeerRegistry(where)
    peer = peers.check(
        name="other",
        site_id=identity.site_id,
        certificate=identity.certificate_pem,
        address="127.0.0.1:1",
        joined=identity.created,
    )
    peers.add(peer)
    arena = memoryview(bytearray(8 << 20))

    def target(transport: FrameTransport) -> None:
        received = 0
        zero = m.Position(epoch=1, seq=0)
        while not isinstance((event := transport.expect(60)).message, m.Bye):
            if isinstance(event.message, m.OpenGroup):
                lane = m.LaneState(durable=zero, received=zero)
                opened = m.GroupOpened(
                    epoch=event.message.epoch, lanes=[lane], credit_bytes=WINDOW, empty=True
                )
                transport.send(opened, event.channel)
            elif isinstance(event.message, m.Data):
                received += len(event.message.payload)
                if transport.connection.release(event.channel, len(event.message.payload)):
                    transport.send(transport.connection.ack(event.channel, received, 0), 1)

    with Listener(
        identity,
        peers,
        InviteBook(where),
        "127.0.0.1:0",
        target,
        allocate=lambda channel, length: arena[:length],
    ) as listener:
        transport = connect(identity, peer, address=listener.address)
        opening = m.OpenGroup(
            group_id=bytes(16),
            name="bench",
            epoch=m.EpochInfo(counter=1, id=bytes(16)),
            disks=[m.DiskInfo(index=0, name="disk", size=1 << 30)],
            lanes=[m.LaneOffer(durable_seq=0, oldest_seq=1, newest_seq=0)],
            wrapped_keys=[],
        )
        transport.send(opening, 1)
        transport.expect(10)
        transport.send(m.StreamStart(stream_id=bytes(16), key_generation=1, resume_seq=0), 1)
        moved = threading.Condition()
        ended = threading.Event()

        def acknowledgements() -> None:
            while not ended.is_set():
                try:
                    transport.receive(0.2)
                except VrepError:
                    if not ended.is_set():
                        raise
                with moved:
                    moved.notify()

        reader = threading.Thread(target=acknowledgements)
        reader.start()
        payload = memoryview(bytearray(size))
        sent = 0
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            with moved:
                moved.wait_for(lambda: transport.connection.credit(1) >= size)
            transport.send_data(1, [payload])
            sent += size
        elapsed = time.perf_counter() - begin
        ended.set()
        transport.close()
        reader.join()
    return sent / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        identity = SiteIdentity.create(where, "bench")
        for size in (64 << 10, 256 << 10, 1 << 20):
            pairs = [
                (
                    plain(identity, size, options.seconds),
                    ours(where, identity, size, options.seconds),
                )
                for _ in range(options.runs)
            ]
            ratios = [mine / theirs for theirs, mine in pairs]
            value = statistics.median(mine for _, mine in pairs)
            against = statistics.median(theirs for theirs, _ in pairs)
            row = {
                "name": f"frames over TLS, {size >> 10} KiB",
                "value": value,
                "unit": "bytes/s",
                "against": against,
                "ratio": statistics.median(ratios),
                "spread": max(ratios) - min(ratios),
            }
            rows.append(row)
            print(
                f"{row['name']:28} {value / 1e9:6.2f} GB/s  plain {against / 1e9:6.2f} GB/s  "
                f"ratio {row['ratio']:.2f} ± {row['spread']:.2f}"
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
