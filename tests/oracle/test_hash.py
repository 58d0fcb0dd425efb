"""Block hash against the xxhash package, which builds its own copy of XXH3."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vrep._core import hash as block_hash
from vrep._core.hash import hash_blocks, hash_file
from vrep.errors import InvalidError, RangeError, VrepError

LOW = 2**64 - 1


def oracle(data: bytes, block_size: int, bits: int, seed: int = 0) -> list[int]:
    """The words of ``hashes`` in order."""
    words: list[int] = []
    for at in range(0, len(data), block_size):
        block = data[at : at + block_size]
        if bits == 64:
            words.append(xxhash.xxh3_64_intdigest(block, seed))
        else:
            value = xxhash.xxh3_128_intdigest(block, seed)
            words += [value & LOW, value >> 64]
    return words


def zero_blocks(data: bytes, block_size: int) -> list[bool]:
    return [not any(data[at : at + block_size]) for at in range(0, len(data), block_size)]


def material(size: int, seed: int, zero_runs: list[tuple[float, float]]) -> bytearray:
    data = bytearray(np.random.default_rng(seed).bytes(size))
    for begin, length in zero_runs:
        at = int(begin * size)
        end = min(size, at + int(length * size))
        data[at:end] = bytes(end - at)
    return data


sizes = st.one_of(
    st.integers(0, 600),
    st.integers(0, 300_000),
    st.integers(1, 80).map(lambda n: n * 4096),
    st.integers(2, 40).map(lambda n: n * 65536 + 1),
)
runs = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.5)), max_size=3)
block_sizes = st.integers(9, 18).map(lambda shift: 1 << shift)


@settings(max_examples=150, deadline=None)
@given(
    size=sizes,
    seed=st.integers(0, 2**32),
    zero_runs=runs,
    shift=st.integers(0, 64),
    block_size=block_sizes,
    bits=st.sampled_from([64, 128]),
    threads=st.integers(1, 6),
)
@example(
    size=3 * 2**20 + 1, seed=1, zero_runs=[(0, 1)], shift=1, block_size=512, bits=128, threads=6
)
def test_buffer(
    size: int,
    seed: int,
    zero_runs: list[tuple[float, float]],
    shift: int,
    block_size: int,
    bits: int,
    threads: int,
) -> None:
    data = bytes(material(size, seed, zero_runs))
    view = memoryview(bytes(shift) + data)[shift:]
    got = hash_blocks(view, block_size, bits=bits, threads=threads)
    count = -(-size // block_size)
    assert got.hashes.shape == ((count, 2) if bits == 128 else (count,))
    assert got.hashes.dtype == np.uint64
    assert got.zeros.dtype == np.bool_
    assert got.hashes.ravel().tolist() == oracle(data, block_size, bits)
    assert got.zeros.tolist() == zero_blocks(data, block_size)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_file(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    size = data.draw(sizes)
    content = bytes(material(size, data.draw(st.integers(0, 2**32)), data.draw(runs)))
    path = tmp_path_factory.mktemp("hash") / "disk"
    with path.open("wb") as file:
        # Zero pages become holes.
        for at in range(0, size, 4096):
            page = content[at : at + 4096]
            if any(page):
                file.seek(at)
                file.write(page)
        file.truncate(size)
    offset = data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - offset))
    block_size = data.draw(block_sizes)
    bits = data.draw(st.sampled_from([64, 128]))
    got = hash_file(path, offset, length, block_size, bits=bits, threads=data.draw(threads))
    part = content[offset : offset + length]
    assert got.hashes.ravel().tolist() == oracle(part, block_size, bits)
    assert got.zeros.tolist() == zero_blocks(part, block_size)


threads = st.integers(1, 4)


def secret_of_seed(seed: int) -> bytes:
    """The secret that XXH3 derives from a seed, as it uses it for more than 240 bytes."""
    library = ctypes.CDLL(ctypes.util.find_library("xxhash") or "libxxhash.so.0")
    secret = ctypes.create_string_buffer(192)
    generate = library.XXH3_generateSecret_fromSeed
    generate.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    generate.restype = None
    generate(secret, seed)
    return secret.raw


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, LOW),
    blocks=st.integers(0, 20),
    tail=st.one_of(st.just(0), st.integers(241, 4095)),
    bits=st.sampled_from([64, 128]),
    zero_runs=runs,
)
def test_secret(
    seed: int, blocks: int, tail: int, bits: int, zero_runs: list[tuple[float, float]]
) -> None:
    data = bytes(material(blocks * 4096 + tail, seed, zero_runs))
    got = hash_blocks(data, bits=bits, secret=secret_of_seed(seed), threads=2)
    assert got.hashes.ravel().tolist() == oracle(data, 4096, bits, seed)


def test_secret_changes_every_value() -> None:
    data = material(100_000, 1, [(0.2, 0.5)])
    plain = hash_blocks(data).hashes
    one = hash_blocks(data, secret=bytes(range(136))).hashes
    longer = hash_blocks(data, secret=bytearray(range(137))).hashes
    assert (plain != one).all()
    assert (one != longer)[:-1].all()


def test_stored_form() -> None:
    data = material(8192, 2, [])
    stored = hash_blocks(data).hashes.astype("<u8").tobytes()
    # xxhash prints big-endian, high half first: the exact mirror of our bytes.
    for i in range(2):
        block = bytes(data[i * 4096 : (i + 1) * 4096])
        assert stored[i * 16 : (i + 1) * 16] == xxhash.xxh3_128_digest(block)[::-1]


def test_results_into_given_arrays() -> None:
    data = material(10_000, 3, [(0, 0.5)])
    out = np.zeros((3, 2), dtype=np.uint64)
    zeros = np.zeros(3, dtype=np.bool_)
    got = hash_blocks(data, out=out, zeros=zeros)
    assert got.hashes is out
    assert got.zeros is zeros
    assert out.ravel().tolist() == oracle(bytes(data), 4096, 128)
    assert zeros.tolist() == [True, False, False]

    table = np.zeros((5, 2), dtype=np.uint64)
    hash_blocks(data, out=table[1:4])
    assert (table[1:4] == out).all()
    assert not table[[0, 4]].any()


@pytest.mark.parametrize(
    ("out", "zeros"),
    [
        (np.zeros((2, 2), np.uint64), None),
        (np.zeros((4, 2), np.uint64), None),
        (np.zeros(6, np.uint64), None),
        (np.zeros((3, 2), np.int64), None),
        (np.zeros((3, 4), np.uint64)[:, ::2], None),
        (np.zeros((3, 2), np.dtype(np.uint64).newbyteorder()), None),
        (None, np.zeros(2, np.bool_)),
        (None, np.zeros(3, np.uint8)),
        (None, np.zeros(6, np.bool_)[::2]),
    ],
)
def test_unfit_result_arrays(
    out: np.ndarray | None, zeros: np.ndarray | None, tmp_path: Path
) -> None:
    data = bytes(10_000)
    path = tmp_path / "disk"
    path.write_bytes(data)
    with pytest.raises(InvalidError, match=r"out|zeros"):
        hash_blocks(data, out=out, zeros=zeros)
    with pytest.raises(InvalidError, match=r"out|zeros"):
        hash_file(path, out=out, zeros=zeros)


def test_read_only_and_foreign_results() -> None:
    out = np.zeros((1, 2), np.uint64)
    out.flags.writeable = False
    with pytest.raises(InvalidError, match="writeable"):
        hash_blocks(bytes(10), out=out)
    with pytest.raises(TypeError, match="NumPy"):
        hash_blocks(bytes(10), out=bytearray(16))  # type: ignore[arg-type]


def test_results_must_not_overlap() -> None:
    room = np.zeros(8192, np.uint8)
    with pytest.raises(InvalidError, match="out overlaps the buffer"):
        hash_blocks(room, out=room[:32].view(np.uint64).reshape(2, 2))
    with pytest.raises(InvalidError, match="zeros overlaps the buffer"):
        hash_blocks(room, zeros=room[8190:].view(np.bool_))
    with pytest.raises(InvalidError, match="out and zeros overlap"):
        hash_blocks(
            bytes(8192),
            out=room[:32].view(np.uint64).reshape(2, 2),
            zeros=room[31:33].view(np.bool_),
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {"block_size": 0},
        {"block_size": -4096},
        {"block_size": 256},
        {"block_size": 5000},
        {"block_size": 2**25},
        {"block_size": 2**40},
        {"block_size": 4096.0},
        {"bits": 32},
        {"threads": 0},
        {"threads": 65},
        {"threads": 2**33},
        {"secret": b""},
        {"secret": bytes(135)},
    ],
)
def test_unlawful_arguments(arguments: dict[str, object]) -> None:
    (name,) = arguments
    with pytest.raises(InvalidError, match=name):
        hash_blocks(bytes(5000), **arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidError, match=name):
        hash_file("/dev/null", **arguments)  # type: ignore[arg-type]


def test_limits_are_exported() -> None:
    assert (block_hash.BLOCK_MIN, block_hash.BLOCK_MAX) == (512, 2**24)
    assert block_hash.BLOCK_DEFAULT == 4096
    assert (block_hash.SECRET_MIN, block_hash.THREADS_MAX) == (136, 64)


def test_what_is_not_a_buffer() -> None:
    with pytest.raises(TypeError):
        hash_blocks("text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        hash_blocks(b"x", secret="text")  # type: ignore[arg-type]
    with pytest.raises((BufferError, ValueError)):
        hash_blocks(np.zeros((100, 100), np.uint8)[:, ::2])


def test_any_buffer_is_taken_as_bytes() -> None:
    numbers = np.arange(3000, dtype=np.float64).reshape(30, 100)
    assert (hash_blocks(numbers).hashes == hash_blocks(numbers.tobytes()).hashes).all()


def test_buffers_are_let_go() -> None:
    data, secret = bytearray(5000), bytearray(200)
    hash_blocks(data, secret=secret)
    with pytest.raises(InvalidError):
        hash_blocks(data, bits=7, secret=secret)
    with pytest.raises(InvalidError):
        hash_blocks(data, secret=secret, out=np.zeros(1, np.uint64))
    data.append(1)  # a held export would raise BufferError
    secret.append(1)


def test_file_by_path_and_descriptor(tmp_path: Path) -> None:
    data = bytes(material(50_000, 4, []))
    path = tmp_path / "disk"
    path.write_bytes(data)
    want = oracle(data, 4096, 128)
    assert hash_file(path).hashes.ravel().tolist() == want
    assert hash_file(str(path)).hashes.ravel().tolist() == want
    assert hash_file(os.fsencode(path)).hashes.ravel().tolist() == want
    with path.open("rb") as file:
        file.seek(123)
        assert hash_file(file.fileno()).hashes.ravel().tolist() == want
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 123
    assert hash_file(path, 40_000).hashes.ravel().tolist() == oracle(data[40_000:], 4096, 128)
    assert hash_file(path, 50_000).hashes.shape == (0, 2)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 5001), (5001, None), (4000, 1001), (-1, None), (0, -1), (2**63, 1), (0, 2**70)],
)
def test_file_range(offset: int, length: int | None, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(5000))
    with pytest.raises(RangeError, match="of a file of 5000"):
        hash_file(path, offset, length)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "absent")
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(OSError, match="seek"):
            hash_file(read_end, 0, 0)
    finally:
        os.close(read_end)
        os.close(write_end)
    path = tmp_path / "disk"
    path.write_bytes(bytes(5000))
    fd = os.open(path, os.O_WRONLY)
    try:
        with path.open("r+b") as file:
            file.write(b"x")
        with pytest.raises(VrepError):
            hash_file(fd)
    finally:
        os.close(fd)


def test_sparse_file_larger_than_one_slice(tmp_path: Path) -> None:
    """Work is cut into slices of 1 GiB, between which signals are looked at."""
    path = tmp_path / "disk"
    size, block_size = 5 * 2**30 + 12_345, 2**20
    written = [0, 2**30 - 1, 2**30, 3 * 2**30 + 77, size - 1]
    with path.open("wb") as file:
        for at in written:
            file.seek(at)
            file.write(b"v")
    got = hash_file(path, 0, None, block_size, bits=64, threads=2)
    assert len(got.hashes) == 5 * 1024 + 1
    assert np.flatnonzero(~got.zeros).tolist() == [at // block_size for at in written]
    zero = xxhash.xxh3_64_intdigest(bytes(block_size))
    assert (got.hashes[got.zeros] == zero).all()
    block = bytearray(block_size)
    block[77] = ord("v")
    assert got.hashes[3 * 1024] == xxhash.xxh3_64_intdigest(bytes(block))


def test_other_threads_run_meanwhile() -> None:
    data = np.ones(32 * 2**20, np.uint8)
    go, ran = threading.Event(), threading.Event()

    def other() -> None:
        go.wait()
        ran.set()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    try:
        # From here on a thread gets the GIL only when another gives it away.
        sys.setswitchinterval(1e6)
        go.set()
        for _ in range(2000):
            hash_blocks(data)
            if ran.is_set():
                break
        ran_meanwhile = ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert ran_meanwhile
