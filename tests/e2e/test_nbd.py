"""The NBD front-end with the clients that people use, over a real group with its tap."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vrep._core.filter import Group
from vrep._core.serve import Server
from vrep.errors import BusyError, ExistsError, InvalidError

pytestmark = pytest.mark.e2e

MIB = 1 << 20
SIZE = 64 * MIB
REQUEST = 0x25609513
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3


def run(*command: str | Path, timeout: float = 300) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


class Site:
    """A group of two disks, and its server."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shm = Path("/dev/shm") / f"vrep-test-{os.getpid()}-{directory.name}"
        self.state = directory / "state"
        self.socket = directory / "nbd.sock"
        self.images = [directory / "root.img", directory / "data.img"]
        self.sockets: list[socket.socket] = []
        for folder in (self.shm, self.state):
            folder.mkdir()
        for image in self.images:
            with image.open("wb") as file:
                file.truncate(SIZE)
        self.open()

    def open(self) -> None:
        self.group = Group(
            [("root", f"file:{self.images[0]}"), ("data", f"file:{self.images[1]}")],
            group_id=b"g" * 16,
            epoch_id=b"e" * 16,
            shm_dir=self.shm,
            state_dir=self.state,
            ring_bytes=64 * MIB,
        )
        self.server = Server(self.group, self.socket, tcp=("127.0.0.1", 0))
        self.server.start()

    def close(self, *, drain: bool = True) -> None:
        self.server.stop(drain=drain)
        self.group.close()

    def uri(self, disk: str = "root") -> str:
        return f"nbd+unix:///{disk}?socket={self.socket}"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        for each in made.sockets:
            each.close()
        made.close()
        shutil.rmtree(made.shm)


def image(path: Path, rng: random.Random) -> Path:
    """Data, zeroes and holes."""
    with path.open("wb") as file:
        file.truncate(SIZE)
        for at in range(0, SIZE, 4 * MIB):
            file.seek(at + rng.randrange(MIB))
            file.write(rng.randbytes(rng.randrange(MIB)))
    return path


def test_nbdinfo_sees_every_field(site: Site) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", site.uri("data")))["exports"]
    assert export["export-name"] == "data"
    assert export["export-size"] == SIZE
    assert set(export["contexts"]) == {"base:allocation", "qemu:dirty-bitmap:vrep"}
    assert not export["is_read_only"]
    for name in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{name}"], name
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 32 * MIB
    listed = json.loads(run("nbdinfo", "--json", "--list", site.uri("")))["exports"]
    assert [each["export-name"] for each in listed] == ["root", "data"]
    tcp = json.loads(run("nbdinfo", "--json", f"nbd://127.0.0.1:{site.server.port}"))
    assert tcp["exports"][0]["export-size"] == SIZE


def test_copies_both_ways_are_the_same(site: Site, tmp_path: Path, rng: random.Random) -> None:
    source = image(tmp_path / "source.img", rng)
    run("nbdcopy", source, site.uri())
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, site.uri())
    back = tmp_path / "back.img"
    run("nbdcopy", site.uri(), back)
    assert back.read_bytes() == source.read_bytes()
    run("qemu-img", "convert", "-n", "-W", "-f", "raw", "-O", "raw", source, site.uri("data"))
    qcow2 = tmp_path / "out.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", site.uri("data"), qcow2)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, qcow2)
    assert site.images[0].read_bytes() == source.read_bytes()
    assert site.group.status()["head"] > 0


def test_maps_show_holes_and_the_live_change_map(site: Site) -> None:
    run("qemu-io", "-f", "raw", "-c", "write -P 1 8M 1M", "-c", "flush", site.uri())
    holes = json.loads(run("nbdinfo", "--json", "--map", site.uri()))
    assert [(e["offset"], e["length"], e["type"]) for e in holes] == [
        (0, 8 * MIB, 3),
        (8 * MIB, MIB, 0),
        (9 * MIB, SIZE - 9 * MIB, 3),
    ]
    # A new group's target holds nothing: all is dirty until it says otherwise.
    dirty = json.loads(run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:vrep", site.uri()))
    assert sum(e["length"] for e in dirty) == SIZE
    marked = sum(e["length"] for e in dirty if e["type"] == 1)
    assert marked >= MIB
    assert marked <= site.group.status()["dirty_bytes"]


def test_qemu_io_script(site: Site) -> None:
    script = [
        "write -P 17 513 70001",
        "read -P 17 513 70001",
        "write -f -P 18 1M 1M",
        "read -P 18 1M 1M",
        "write -z 1M 64k",
        "read -P 0 1M 64k",
        "write -z -u -f 1152k 128k",
        "read -P 0 1152k 128k",
        "discard 1280k 256k",
        "read -P 0 1280k 256k",
        "read -P 18 1536k 512k",
        "write -P 19 32M 32M",
        "read -P 19 32M 32M",
        "aio_write -P 20 4M 4k",
        "aio_write -P 21 4M 4k",
        "aio_flush",
        "read -P 21 4M 4k",
        "flush",
    ]
    arguments = [part for line in script for part in ("-c", line)]
    out = run("qemu-io", "-f", "raw", *arguments, site.uri())
    assert "verification failed" not in out
    assert "error" not in out.lower()
    status = site.group.status()
    assert status["zeroes"] >= 3
    assert status["flushes"] >= 1


def test_qemu_img_bench_ends(site: Site) -> None:
    out = run(
        *("qemu-img", "bench", "-f", "raw", "-w", "-c", "3000", "-d", "32", "-s", "4096"),
        *("--flush-interval=100", site.uri()),
    )
    assert "Run completed" in out
    assert site.group.status()["writes"] == 3000


@pytest.mark.parametrize("jobs", [1, 4])
def test_fio_verifies(site: Site, jobs: int) -> None:
    out = run(
        *("fio", "--name=v", "--ioengine=nbd", f"--uri={site.uri()}", "--rw=randwrite"),
        *("--bsrange=512-128k", "--blockalign=512", "--iodepth=32", f"--numjobs={jobs}"),
        *(f"--size={SIZE // jobs}", f"--offset_increment={SIZE // jobs}", "--verify=crc32c"),
        *(
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--do_verify=1",
            "--fsync=64",
            "--output-format=terse",
        ),
    )
    assert out
    assert site.server.stats["errors"] == 0


def test_a_restarted_server_is_found_again(site: Site) -> None:
    target = f"driver=nbd,server.type=unix,server.path={site.socket},export=root,reconnect-delay=90"
    client = subprocess.Popen(
        ["qemu-io", "--image-opts", target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert client.stdin is not None
    for i in range(200):
        client.stdin.write(f"write -P {i + 1} {i * 64}k 64k\n")
        if i in (50, 120):
            client.stdin.flush()
            while site.group.status()["writes"] == 0:
                pass  # it is not connected yet
            site.close(drain=i == 50)
            site.open()
    for i in range(200):
        client.stdin.write(f"read -P {i + 1} {i * 64}k 64k\n")
    out, _ = client.communicate("quit\n", timeout=300)
    assert client.returncode == 0
    assert out.count("wrote 65536/65536") == 200
    assert out.count("read 65536/65536") == 200
    assert "verification failed" not in out


class Client:
    """A raw client, that may say anything."""

    def __init__(self, site: Site) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        site.sockets.append(self.socket)
        self.socket.settimeout(60)
        self.socket.connect(str(site.socket))
        assert self.receive(18)[:16] == b"NBDMAGICIHAVEOPT"

    def receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionResetError
            data += more
        return data

    def serve(self, disk: bytes = b"root") -> Client:
        self.socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, len(disk)))
        self.socket.sendall(disk)
        self.receive(10)
        return self

    def ask(self, kind: int, offset: int, length: int, data: bytes = b"", cookie: int = 7) -> None:
        head = struct.pack(">IHHQQI", REQUEST, 0, kind, cookie, offset, length)
        self.socket.sendall(head + data)

    def reply(self) -> int:
        magic, error, _cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return int(error)

    def ended(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff" * 64,
        struct.pack(">I", 3) + b"GET / HTTP/1.1\r\n\r\n",
        struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 0xFFFFFFFF),
        struct.pack(">I", 0) + b"IHAVEOPT" + struct.pack(">II", 3, 0),
    ],
)
def test_nonsense_ends_its_connection_only(site: Site, nonsense: bytes) -> None:
    good = Client(site).serve()
    bad = Client(site)
    bad.socket.sendall(nonsense)
    assert bad.ended()
    good.ask(FLUSH, 0, 0)
    assert good.reply() == 0


def test_random_bytes_after_the_handshake(site: Site, rng: random.Random) -> None:
    for _ in range(100):
        client = Client(site).serve()
        client.socket.settimeout(0.2)
        try:
            client.socket.sendall(rng.randbytes(rng.randrange(1, 5000)))
            head = struct.pack(">IHHQQI", REQUEST, rng.randrange(64), rng.randrange(9), 1, 0, 100)
            client.socket.sendall(head + rng.randbytes(rng.randrange(200)))
        except (BrokenPipeError, ConnectionResetError):
            pass
        client.socket.close()
    assert Client(site).serve() is not None


def test_reconnecting_under_load_never_sees_an_old_write(site: Site, rng: random.Random) -> None:
    """Each life of the client writes a larger number, and dies with writes on their way."""
    block = 4096
    for life in range(1, 60):
        client = Client(site).serve()
        client.ask(READ, 0, block)
        assert client.reply() == 0
        seen = client.receive(block)
        assert seen[0] < life or life == 1
        client.ask(WRITE, 0, block, bytes([life]) * block)
        assert client.reply() == 0
        for _ in range(rng.randrange(20)):
            client.ask(WRITE, 0, block, bytes([life]) * block)
        client.socket.close()
        check = Client(site).serve()
        check.ask(WRITE, 0, block, bytes([life]) * block)
        assert check.reply() == 0
        check.ask(READ, 0, block)
        assert check.reply() == 0
        assert check.receive(block) == bytes([life]) * block
        check.socket.close()
    assert site.server.stats["errors"] == 0


def test_a_client_that_does_not_read_blocks_itself_only(site: Site) -> None:
    deaf = Client(site).serve()
    deaf.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):
        deaf.socket.sendall(struct.pack(">IHHQQI", REQUEST, 0, READ, 7, 0, MIB) * 100000)
    other = Client(site).serve()
    for _ in range(20):
        other.ask(READ, 0, MIB)
        assert other.reply() == 0
        other.receive(MIB)
    names = [client["disk"] for client in site.server.clients()]
    assert names == ["root", "root"]


def test_a_stop_under_load_answers_what_was_written(site: Site) -> None:
    answered: list[int] = []

    def write() -> None:
        client = Client(site).serve()
        try:
            for number in range(1, 100000):
                client.ask(WRITE, 8 * MIB, 8, struct.pack(">Q", number))
                assert client.reply() == 0
                answered.append(number)
        except (ConnectionResetError, BrokenPipeError):
            return

    thread = threading.Thread(target=write)
    thread.start()
    while len(answered) < 100:
        pass
    site.close()
    thread.join()
    (found,) = struct.unpack(">Q", site.images[0].read_bytes()[8 * MIB : 8 * MIB + 8])
    assert found in (answered[-1], answered[-1] + 1)
    site.open()


def test_sockets_and_their_permissions(tmp_path: Path, site: Site) -> None:
    def server(path: Path, **options: Any) -> Server:
        return Server(group, path, **options)

    data = tmp_path / "other.img"
    data.write_bytes(bytes(MIB))
    group = Group([("d", f"file:{data}")], group_id=b"h" * 16, tap=False)
    path = tmp_path / "other.sock"
    with pytest.raises(BusyError):
        server(site.socket)
    with pytest.raises(ExistsError):
        server(data)
    with pytest.raises(InvalidError):
        Server(group, tcp=("192.0.2.1", 0))
    with pytest.raises(InvalidError):
        Server(group)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with server(path, mode=0o660, socket_gid=os.getgid()) as made:
        assert path.stat().st_mode & 0o777 == 0o660
        with pytest.raises(BusyError):
            group.close()
        with pytest.raises(BusyError):
            made.start()
    assert not path.exists()
    group.close()
