"""The target stores and transports what it cannot read.

A client writes marks that can and marks that cannot be compressed. Neither they nor any key are
found in the target's files, on the wire, or in a core dump of the target, raw or inside a zstd
frame. The same search finds them wherever they are allowed to be, so it would find them there.
"""

from __future__ import annotations

import base64
import contextlib
import mmap
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import xxhash
import zstandard
from sites import GROUP, KEY, MIB, Pair, wait_until

from vrep._core import layout, record
from vrep.keys.datakey import DataKey, unwrap_data_key
from vrep.target.reader import StoreReader

pytestmark = [pytest.mark.e2e, pytest.mark.every_front]

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
FRAME_BYTES_MAX = 4 * MIB
STEP = 3
"""less than a frame's checksum has, so that a wrong one takes nothing with it"""
Needles = Mapping[str, bytes]


def frames(data: bytes | mmap.mmap) -> Iterator[bytes]:
    """What comes out of everything that begins like a zstd frame, however far it goes."""
    at = data.find(ZSTD_MAGIC)
    while at >= 0:
        plain = bytearray()
        with contextlib.suppress(zstandard.ZstdError):
            machine = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
            for start in range(at, min(at + MIB, len(data)), STEP):
                plain += machine.decompress(bytes(data[start : start + STEP]))
                if machine.eof or len(plain) > FRAME_BYTES_MAX:
                    break
        yield bytes(plain)
        at = data.find(ZSTD_MAGIC, at + 1)


def search(data: bytes | mmap.mmap, needles: Needles) -> dict[str, str]:
    """Which needles are found, and how."""
    found = {name: "raw" for name, needle in needles.items() if data.find(needle) >= 0}
    for plain in frames(data):
        for name, needle in needles.items():
            if name not in found and needle in plain:
                found[name] = "zstd"
    return found


def search_files(paths: Iterable[Path], needles: Needles) -> dict[str, str]:
    found = {}
    for path in paths:
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
                found.update(
                    {n: f"{how} in {path.name}" for n, how in search(data, needles).items()}
                )
    return found


def core_dump(pair: Pair, role: str) -> Path:
    """All memory of a process, its file mappings too."""
    pid = pair.processes[role].pid
    done = subprocess.run(
        ["gcore", "-a", "-o", str(pair.root / f"core-{role}"), str(pid)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    path = pair.root / f"core-{role}.{pid}"
    assert path.exists(), done.stdout + done.stderr
    return path


def data_key(pair: Pair) -> DataKey:
    """As only the source's site can."""
    with StoreReader(pair.b.paths.store, pair.group_id) as reader:
        blob = reader.wrapped_keys[-1]
    return unwrap_data_key(blob, pair.a.keys.get(KEY), group_id=pair.group_id)


def key_needles(pair: Pair) -> dict[str, bytes]:
    """Every key that there is: the tenant's, the data key, one for each stream, and pieces of
    the hash secret."""
    key = data_key(pair)
    needles = {"tenant key": pair.a.keys.get(KEY).secret, "data key": key.secret}
    for at in range(0, layout.HASH_SECRET_BYTES, 32):
        needles[f"hash secret {at}"] = key.hash_secret()[at : at + 32]
    with StoreReader(pair.b.paths.store, pair.group_id) as reader:
        for span in reader.records():
            data = reader.segment(span.segment)
            for each in span.found[span.found["header"]["kind"] == layout.KIND_STREAM]:
                at = span.start + int(each["position"])
                whole = data[at : at + layout.RECORD.itemsize + int(each["header"]["body_bytes"])]
                stream = record.parse_stream(whole)["stream_id"].tobytes()
                needles[f"key of stream {stream.hex()}"] = key.stream_key(stream)
    assert sum(name.startswith("key of stream") for name in needles) >= 2
    return needles


class Marks:
    """What the client writes, and what of it must never be seen."""

    def __init__(self, rng: random.Random) -> None:
        self.noise = rng.randbytes(4096)
        self.text = f"the secret of the client is {rng.randrange(10**30)}. ".encode()
        page = (self.text * (4096 // len(self.text) + 1))[:4096]
        self.page = page
        # A repeated text stands in a zstd frame once, as it is. Random letters are coded there.
        self.letters = bytes(rng.choices(b"abcdefgh", k=4096))
        self.needles: Needles = {
            "noise": self.noise[1000:1048],
            "text": self.text[4:52],
            "letters": self.letters[1000:1048],
            # A hash without a secret would tell a guess from a miss.
            "hash of noise": xxhash.xxh3_128_digest(self.noise)[::-1],
            "hash of text": xxhash.xxh3_128_digest(page)[::-1],
        }
        self.rounds = 0

    def write(self, pair: Pair, stop: threading.Event) -> None:
        """Single pages and long runs, again and again."""
        with pair.client() as client:
            at = 0
            while not stop.is_set():
                client.write(at % (8 * MIB), self.noise)
                client.write((at + 4096) % (8 * MIB), self.page)
                client.write((at + 8192) % (8 * MIB), self.letters)
                client.write(8 * MIB, (self.page + self.letters) * 32)
                at += 16384
                self.rounds += 1
                time.sleep(0.02)
            client.flush()

    def written(self) -> None:
        """So many more rounds that half of what the test wants on the wire comes of them, however
        fast this host is."""
        enough = self.rounds + 50
        wait_until("the client writes", lambda: self.rounds >= enough)


def test_search_finds_what_is_there(tmp_path: Path, rng: random.Random) -> None:
    """Raw, in a zstd frame with and without checksum and size, and in one that is cut off."""
    marks = Marks(rng)
    plain = rng.randbytes(5000) + marks.noise + marks.page + marks.letters + rng.randbytes(5000)
    packed = zstandard.ZstdCompressor(level=3).compress(marks.letters * 32)
    stream = zstandard.ZstdCompressor(level=1, write_checksum=True).compressobj()
    streamed = stream.compress(marks.letters * 8) + stream.flush()
    assert search(plain, marks.needles) == {"noise": "raw", "text": "raw", "letters": "raw"}
    for frame in (packed, streamed, streamed[:-4]):
        data = rng.randbytes(999) + frame + b"\0" * 99
        assert search(data, marks.needles) == {"letters": "zstd"}
    assert search(rng.randbytes(100_000) + ZSTD_MAGIC, marks.needles) == {}
    (tmp_path / "file").write_bytes(plain)
    assert search_files([tmp_path / "file"], marks.needles)["noise"] == "raw in file"


@pytest.mark.parametrize("compression", [0, 3])
def test_target_and_wire_hold_nothing_that_can_be_read(
    make_pair: Callable[..., Pair], rng: random.Random, compression: int
) -> None:
    marks = Marks(rng)
    pair = make_pair(compression=compression)
    pair.cable.recording = True
    with pair.images["root"].open("r+b") as file:  # for the first sync
        file.write(marks.noise + marks.page + marks.letters)
    pair.up(key_at_b=False)
    stop = threading.Event()
    writer = threading.Thread(target=marks.write, args=(pair, stop))
    writer.start()
    try:
        marks.written()
        pair.kill("source")  # a second stream
        pair.start("source")
        # It opens its keys when it connects.
        wait_until("the source is back", lambda: pair.status()["targets"][0]["connected"])
        marks.written()
        core = core_dump(pair, "target")
        # It stood still meanwhile, perhaps for so long that the source gave the connection up, and
        # the keys of its stream with it.
        wait_until("the source is there", lambda: pair.status()["targets"][0]["connected"])
        source_core = core_dump(pair, "source")
    finally:
        stop.set()
        writer.join()
    pair.settle()
    pair.a.checkpoint(GROUP, "a label that is nobody's business")
    pair.settle()
    keys = key_needles(pair)
    needles = {**marks.needles, **keys, "label": b"a label that is nobody"}

    # The same search where it must find something: it is not blind, and the marks were written.
    images = search_files([pair.images["root"]], marks.needles)
    assert {"noise", "text", "letters"} <= set(images)
    ring = search_files([pair.a.paths.shm() / GROUP / "ring"], needles)
    assert {"noise", "text", "letters"} <= set(ring)
    in_source = search_files([source_core], needles)
    assert {"tenant key", "data key"} & set(in_source)
    assert any(name.startswith("key of stream") for name in in_source)
    wrapped = {"wrapped key": base64.b64decode(pair.definition.wrapped_keys[-1])}
    assert search_files([core], wrapped)  # the dump has the target's own memory

    # And where it must not.
    assert search_files([core], needles) == {}
    assert search_files(sorted(pair.b.paths.root.rglob("*")), needles) == {}
    wire = b"".join(pair.cable.recorded)
    assert len(wire) > 500_000
    assert search(wire, needles) == {}

    # What was sealed is there all the same: with the key it comes back.
    stored = sum(path.stat().st_size for path in pair.store.glob("seg-*"))
    assert stored > 100_000
    pair.b.key_import(pair.exported_key)
    pair.same_as_source()
    assert set(search(pair.read_view()["root"], marks.needles)) >= {"noise", "text", "letters"}


def test_compression_is_under_the_seal(make_pair: Callable[..., Pair], rng: random.Random) -> None:
    """With compression on, less is stored: the frames that the search would open are there,
    sealed."""
    marks = Marks(rng)
    pair = make_pair(compression=3).up()
    with pair.client() as client:
        for turn in range(32):
            client.write(turn * 65536, marks.page * 16)
    pair.settle()
    sizes = sum(path.stat().st_size for path in pair.store.glob("seg-*"))
    assert sizes < MIB  # 2 MiB of text were written
    assert search_files(pair.store.glob("*"), marks.needles) == {}
