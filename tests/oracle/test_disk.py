"""Backing stores against a bytearray, with several requests in flight; locks against QEMU."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_device import loop_device

from vrep._core.disk import Disk, Engine, Request
from vrep.errors import LockedError, RangeError, StoreFullError, UnsupportedError

SIZE = (1 << 20) + 3 * 512
WHOLE = 1 << 20
VIEW = bytes(range(16))
BLOCK = 4096


class Store:
    """One kind of backing store, new and empty."""

    def __init__(self, kind: str, root: Path, stack: ExitStack) -> None:
        self.kind, self.path = kind, root / "disk"
        self.size = SIZE if kind in ("cached", "overlay") else WHOLE
        self.uri = f"file:{self.path}"
        if kind != "overlay":
            with self.path.open("wb") as file:
                file.truncate(self.size)
        if kind.startswith("loop"):
            # 512 bytes are unaligned.
            device = stack.enter_context(loop_device(self.path, sector_bytes=4096))
            self.uri = f"block:{device}"

    def open(self, engine: Engine) -> Disk:
        if self.kind == "overlay":
            return Disk(engine, self.path, view_id=VIEW, size=self.size, block_bytes=BLOCK)
        return Disk(engine, self.uri, direct="direct" in self.kind)


class Model:
    """Random requests on a store, those that touch one another in order, checked against bytes."""

    def __init__(self, store: Store, rng: random.Random) -> None:
        self.store, self.rng = store, rng
        self.engine = Engine(3)
        self.disk = store.open(self.engine)
        self.image = bytearray(store.size)
        self.present: set[int] = set()
        self.synced: set[int] = set()
        self.flights: list[tuple[Request, int, int, str, bytes]] = []

    def blocks(self, offset: int, length: int) -> range:
        end = offset + length
        last = -(-end // BLOCK) if end == self.store.size else end // BLOCK
        return range(-(-offset // BLOCK), last)

    def settle(self, request: Request, op: str, expected: bytes) -> None:
        self.engine.wait(request)
        result = request.result()
        if op == "read":
            assert result == expected

    def clear(self, offset: int, length: int) -> None:
        """Wait for what overlaps, as the overlap table would."""
        kept = []
        for request, start, size, op, expected in self.flights:
            if start < offset + length and offset < start + size:
                self.settle(request, op, expected)
            else:
                kept.append((request, start, size, op, expected))
        self.flights = kept

    def step(self) -> None:
        rng = self.rng
        op = rng.choices(["write", "read", "zero", "flush", "reopen"], [8, 6, 3, 1, 0.3])[0]
        if op == "reopen":
            self.reopen()
            return
        length = min(int(rng.expovariate(1 / 12000)) + 1, self.store.size)
        if rng.random() < 0.04:
            length = rng.randrange(self.store.size // 2, self.store.size + 1)
        offset = rng.randrange(self.store.size - length + 1)
        if rng.random() < 0.4:
            offset = offset // BLOCK * BLOCK
            length = min(max(length // BLOCK, 1) * BLOCK, self.store.size - offset)
        if op == "flush":
            self.clear(0, self.store.size)
            self.disk.flush()
            self.synced = set(self.present)
            return
        held, size = self.disk.widen(offset, length)
        self.clear(held, size)
        fua = rng.random() < 0.15
        skew = rng.choice([0, 0, 0, 1, 512])
        pieces = rng.choice([0, 0, 512, 4096, 1000, 65536])
        data = rng.randbytes(length) if op == "write" else bytes(length)
        expected = bytes(self.image[offset : offset + length])
        before = set(self.present)
        if op == "read":
            request = self.disk.submit(op, offset, length, skew=skew, piece_bytes=pieces)
        elif op == "write":
            request = self.disk.submit(op, offset, 0, data, fua=fua, skew=skew, piece_bytes=pieces)
        else:
            request = self.disk.submit(op, offset, length, fua=fua, no_hole=rng.random() < 0.4)
        if op != "read":
            self.image[offset : offset + length] = data
            self.present |= set(self.blocks(offset, length))
        if fua and op != "read":
            # Its own sync may also cover what completed meanwhile: only what it must cover counts.
            self.settle(request, op, expected)
            self.synced |= set(self.blocks(offset, length)) | before.intersection(self.synced)
        else:
            self.flights.append((request, held, size, op, expected))
        if len(self.flights) > 12:
            request, _, _, op, expected = self.flights.pop(rng.randrange(len(self.flights)))
            self.settle(request, op, expected)

    def reopen(self) -> None:
        self.clear(0, self.store.size)
        self.disk.close()
        self.disk = self.store.open(self.engine)
        if self.store.kind == "overlay":
            blocks = -(-self.store.size // BLOCK)
            found = {b for b in range(blocks) if self.disk.absent(b * BLOCK, 1) is None}
            assert self.synced <= found <= self.present
            self.present, self.synced = found, set(found)

    def end(self) -> None:
        self.clear(0, self.store.size)
        assert self.engine.inflight == 0
        assert self.disk.read(0, self.store.size) == self.image
        at = 0
        while at < self.store.size:
            length, hole = self.disk.extent(at)
            assert 0 < length <= self.store.size - at
            assert not hole or not any(self.image[at : at + length])
            at += length
        if self.store.kind == "overlay":
            sizes = [min(BLOCK, self.store.size - block * BLOCK) for block in self.present]
            assert self.disk.present_bytes == sum(sizes)
        self.engine.close()


@pytest.mark.parametrize("round_", range(3))
@pytest.mark.parametrize("kind", ["cached", "direct", "overlay", "loop-cached", "loop-direct"])
def test_random_requests(kind: str, round_: int, tmp_path: Path, rng: random.Random) -> None:
    with ExitStack() as stack:
        model = Model(Store(kind, tmp_path, stack), rng)
        for _ in range(250):
            model.step()
        model.end()
        assert model.store.path.stat().st_size == model.store.size


@settings(max_examples=60, deadline=None)
@given(
    direct=st.booleans(),
    changes=st.lists(
        st.tuples(
            st.sampled_from(["write", "zero"]),
            st.integers(0, 20000),
            st.integers(1, 9000),
            st.integers(0, 600),
            st.sampled_from([0, 1, 511, 512, 4096]),
        ),
        max_size=12,
    ),
)
def test_edges(
    direct: bool,
    changes: list[tuple[str, int, int, int, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("edges") / "disk"
    size = 32768
    path.write_bytes(b"\xcc" * size)
    image = bytearray(b"\xcc" * size)
    with Engine(1) as engine, Disk(engine, f"file:{path}", direct=direct) as disk:
        for op, offset, length, skew, pieces in changes:
            if op == "write":
                data = bytes((offset + i * 3) & 0xFF for i in range(length))
                disk.run("write", offset, 0, data, skew=skew, piece_bytes=pieces)
            else:
                data = bytes(length)
                disk.run("zero", offset, length, no_hole=bool(skew % 2))
            image[offset : offset + length] = data
            assert disk.run("read", offset, length, skew=skew, piece_bytes=pieces) == data
    assert path.read_bytes() == image
    shutil.rmtree(path.parent)


def fill(disk: Disk, data: bytes) -> None:
    for at in range(1 << 20, disk.info.size - len(data) + 1, len(data)):
        disk.write(at, data)


def test_a_full_filesystem_says_so_and_keeps_what_it_had(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        path = small / "disk"
        with path.open("wb") as file:
            file.truncate(4 << 20)
        with Engine(2) as engine, Disk(engine, f"file:{path}") as disk:
            disk.write(0, b"a" * 65536)
            for length in (4096, 2 << 20):
                with pytest.raises(StoreFullError):
                    fill(disk, b"b" * length)
            with pytest.raises(UnsupportedError):  # tmpfs allocates only by writing
                disk.zero(0, 4096, no_hole=True, fast=True)
            assert disk.read(0, 65536) == b"a" * 65536
            disk.zero(1 << 20, 3 << 20, fast=True)
            disk.write(1 << 20, b"c" * 4096)  # there is room again
            disk.flush()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_large_requests_and_bounds(tmp_path: Path, rng: random.Random) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(33 << 20)
    data = rng.randbytes(32 << 20)
    with Engine(2) as engine, Disk(engine, f"file:{path}", direct=True) as disk:
        for skew, pieces in ((0, 0), (0, 4096), (7, 0), (0, 100_000)):
            disk.run("write", 4096, 0, data, skew=skew, piece_bytes=pieces)
            assert disk.run("read", 4096, len(data), skew=skew, piece_bytes=pieces) == data
        with pytest.raises(RangeError):
            disk.read(33 << 20, 1)


# ---- QEMU's locks ---------------------------------------------------------------


def tool(*command: str) -> int:
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode


@contextmanager
def qemu_io(*arguments: str) -> Iterator[None]:
    """qemu-io that has an image open."""
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"read 0 512\n")
        child.stdin.flush()
        assert b"read 512/512" in child.stdout.readline()
        yield
        child.communicate(b"quit\n")


@pytest.mark.parametrize("block", [False, True])
def test_qemu_and_vrep_refuse_each_other(block: bool, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(1 << 20))
    with ExitStack() as stack:
        name = str(stack.enter_context(loop_device(path, sector_bytes=4096)) if block else path)
        uri = f"{'block' if block else 'file'}:{name}"
        engine = stack.enter_context(Engine(1))
        write = ("qemu-io", "-f", "raw", "-c", "write 0 512", name)
        with Disk(engine, uri):
            assert tool(*write) != 0
            assert tool("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", name, name) != 0
            assert tool("qemu-img", "info", "-U", name) == 0
            assert tool("qemu-io", "-r", "-U", "-f", "raw", "-c", "read 0 512", name) == 0
        with Disk(engine, uri, read_only=True):
            assert tool(*write) != 0
            assert tool("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", name) == 0
        assert tool(*write) == 0
        with qemu_io(name):
            opens: list[Callable[[], Disk]] = [
                lambda: Disk(engine, uri),
                lambda: Disk(engine, uri, read_only=True),
            ]
            for attempt in opens:
                with pytest.raises(LockedError):
                    attempt()
        with qemu_io("-r", name), Disk(engine, uri, read_only=True) as disk:
            assert disk.info.size == 1 << 20
        Disk(engine, uri).close()


HOLDER = """
import sys
from vrep._core.disk import Disk, Engine
disk = Disk(Engine(1), sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(65536))
    command = [sys.executable, "-c", HOLDER, f"file:{path}"]
    with (
        Engine(1) as engine,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child,
    ):
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(LockedError):
            Disk(engine, f"file:{path}")
        child.kill()
        child.wait()
        Disk(engine, f"file:{path}").close()
