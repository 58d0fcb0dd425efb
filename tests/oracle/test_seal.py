"""What C seals, ``cryptography`` opens, and the reverse."""

from __future__ import annotations

import gc
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vrep._core import layout, record, seal
from vrep._core.hash import hash_blocks
from vrep.errors import (
    AuthError,
    BusyError,
    CorruptError,
    FullError,
    InvalidError,
    NotFoundError,
    RangeError,
    TornError,
)

zstandard = pytest.importorskip("zstandard", reason="the oracle of compression")

KEY = bytes(range(32))
STREAM = bytes(range(100, 116))
SECRET = bytes((7 * i + 3) % 256 for i in range(192))
PIECE = 128 << 10


def change(seq: int, length: int, *, offset: int = 0, kind: int = layout.KIND_WRITE) -> np.ndarray:
    one = np.zeros(1, layout.RECORD)
    one["kind"], one["seq"], one["length"], one["offset"] = kind, seq, length, offset
    one["wall_ns"], one["mono_ns"], one["disk"] = 1_000 + seq, seq, 3
    return one


def new_sealer(
    *, level: int = 0, resume_seq: int = 0, secret: bytes | None = SECRET
) -> seal.Sealer:
    return seal.Sealer(KEY, STREAM, epoch=2, resume_seq=resume_seq, secret=secret, level=level)


def sealed(payload: bytes, *, offset: int = 0, level: int = 0) -> bytes:
    out = bytearray(record.bound(layout.KIND_WRITE, offset, len(payload)))
    written, done = new_sealer(level=level).seal(
        change(1, len(payload), offset=offset), [payload], out
    )
    assert done == 1
    return bytes(out[:written])


def nonce_and_data(header: bytes, word: int, index: int) -> tuple[bytes, bytes]:
    (seq,) = struct.unpack_from("<Q", header, 16)
    return struct.pack("<QI", seq, index), header + struct.pack("<II", word, index)


def oracle_open(raw: bytes) -> tuple[bytes, bytes]:
    """Data and hashes of one record, by the rules of layout.h and ``cryptography`` alone."""
    header, body = raw[:64], raw[64:]
    flags, pieces = struct.unpack_from("<H", header, 6)[0], struct.unpack_from("<H", header, 56)[0]
    (length,) = struct.unpack_from("<I", header, 32)
    words = struct.unpack_from(f"<{pieces}I", body)
    at, data, block_hashes = 4 * pieces, b"", b""
    for i, word in enumerate(words):
        hashed = bool(flags & 4) and i == pieces - 1
        index = 0x80000000 if hashed else i
        size = word & 0xFFFFFF
        plain = AESGCM(KEY).decrypt(
            nonce_and_data(header, word, index)[0],
            body[at : at + size],
            nonce_and_data(header, word, index)[1],
        )
        at += size
        if hashed:
            block_hashes = plain
            continue
        if word & 0x01000000:
            plain = zstandard.ZstdDecompressor().decompress(plain)
        assert len(plain) == min(PIECE, length - i * PIECE)
        data += plain
    assert at == len(body)
    return data, block_hashes


def expected_hashes(payload: bytes, offset: int) -> bytes:
    """XXH3-128 under SECRET of each covered block (the package xxhash takes no secret)."""
    first = -offset % 4096
    count = max(0, len(payload) - first) // 4096
    if count == 0:
        return b""
    return hash_blocks(payload[first : first + count * 4096], 4096, secret=SECRET)[0].tobytes()


payloads = st.one_of(
    st.binary(min_size=1, max_size=9000),
    st.builds(
        lambda size, seed: np.random.default_rng(seed).bytes(size),
        st.integers(1, 600_000),
        st.integers(0, 99),
    ),
    st.builds(lambda size: bytes(size), st.integers(1, 400_000)),
    st.builds(
        lambda size, text: (text * (size // len(text) + 1))[:size],
        st.integers(1, 400_000),
        st.binary(min_size=1, max_size=80),
    ),
)


@given(payload=payloads, offset=st.integers(0, 1 << 40), level=st.sampled_from([0, 1, 3]))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.large_base_example])
def test_the_oracle_opens_what_was_sealed(payload: bytes, offset: int, level: int) -> None:
    raw = sealed(payload, offset=offset, level=level)
    data, block_hashes = oracle_open(raw)
    assert data == payload
    assert block_hashes == expected_hashes(payload, offset)
    opener, out = seal.Opener(KEY, STREAM), bytearray(len(payload))
    assert opener.record(raw, out) == len(payload)
    assert out == payload
    if block_hashes:
        room = bytearray(len(block_hashes))
        assert opener.hashes(raw, room) == len(room)
        assert room == block_hashes
    else:
        with pytest.raises(NotFoundError):
            opener.hashes(raw, bytearray(16))
    found, consumed = record.scan(raw)
    assert (len(found), consumed) == (1, len(raw))


@given(payload=payloads, squeeze=st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_the_oracle_sealed_is_opened(payload: bytes, squeeze: bool) -> None:
    contents, words = [], []
    for at in range(0, len(payload), PIECE):
        part = payload[at : at + PIECE]
        frame = zstandard.ZstdCompressor(level=3).compress(part)
        small = squeeze and len(frame) < len(part)
        contents.append(frame if small else part)
        words.append(len(contents[-1]) + 16 | (0x01000000 if small else 0))
    one = change(9, len(payload), offset=512)
    one["magic"], one["version"], one["epoch"] = layout.RECORD_MAGIC, 1, 2
    one["pieces"] = len(words)
    one["body_bytes"] = sum(4 + (word & 0xFFFFFF) for word in words)
    record.finish(one)
    header = one.tobytes()
    raw = header + struct.pack(f"<{len(words)}I", *words)
    for i, (word, content) in enumerate(zip(words, contents, strict=True)):
        nonce, data = nonce_and_data(header, word, i)
        raw += AESGCM(KEY).encrypt(nonce, content, data)
    out = bytearray(len(payload))
    assert seal.Opener(KEY, STREAM).record(raw, out) == len(payload)
    assert out == payload


@pytest.mark.parametrize("level", [0, 1])
def test_the_largest_write(level: int) -> None:
    size = layout.WRITE_BYTES_MAX
    payload = np.random.default_rng(5).bytes(size // 2) + bytes(size // 2)
    raw = sealed(payload, offset=4096, level=level)
    (one,) = record.scan(raw)[0]["header"]
    assert one["pieces"] == layout.PIECES_MAX
    out, hash_room = bytearray(size), bytearray(size // 256)
    opener = seal.Opener(KEY, STREAM)
    assert opener.record(raw, out) == size
    assert out == payload
    assert opener.hashes(raw, hash_room) == size // 256
    assert bytes(hash_room) == expected_hashes(payload, 4096)
    pieces = record.pieces(raw)
    part = bytearray(PIECE)
    for piece in (pieces[0], pieces[255]):
        at, stored = int(piece["at"]), int(piece["stored"])
        word, index = int(piece["word"]), int(piece["index"])
        assert opener.piece(raw[:64], index, word, raw[at : at + stored], part) == PIECE
        assert part == payload[int(piece["offset"]) :][:PIECE]


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    raw = bytearray(
        sealed(b"some text " * 900, offset=100, level=data.draw(st.sampled_from([0, 1])))
    )
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    opener = seal.Opener(KEY, STREAM)
    errors = 0
    for run, size in ((opener.record, 9000), (opener.hashes, 16)):
        try:
            run(raw, bytearray(size))
        except (AuthError, CorruptError, TornError):
            errors += 1
    assert errors >= 1


def test_another_key_stream_or_header_opens_nothing() -> None:
    raw = sealed(b"x" * 5000)
    with pytest.raises(AuthError):
        seal.Opener(bytes(32), STREAM).record(raw, bytearray(5000))
    one = np.frombuffer(raw[:64], layout.RECORD).copy()
    one["disk"] = 4
    record.finish(one)
    with pytest.raises(AuthError):
        seal.Opener(KEY, STREAM).record(one.tobytes() + raw[64:], bytearray(5000))


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16))
@settings(max_examples=20)
def test_stream_key_is_hkdf(data_key: bytes, stream_id: bytes) -> None:
    info = b"vrep stream v1" + stream_id
    want = HKDF(hashes.SHA256(), 32, None, info).derive(data_key)
    assert seal.stream_key(data_key, stream_id) == want


def test_no_nonce_is_used_twice() -> None:
    sealer, out = new_sealer(resume_seq=7), bytearray(4096)
    for seq in (7, 6, 9, 0):
        with pytest.raises(InvalidError):
            sealer.seal(change(seq, 4), [b"data"], out)
    assert sealer.seal(change(8, 4), [b"data"], out)[1] == 1
    with pytest.raises(InvalidError):
        sealer.seal(change(8, 4), [b"tada"], out)
    sealer.tally(out, wall_ns=1)
    with pytest.raises(InvalidError):
        sealer.tally(out, wall_ns=2)
    assert sealer.seq == 8


def test_a_batch_stops_at_a_full_buffer_and_goes_on() -> None:
    records = np.concatenate([change(seq, 1000) for seq in range(1, 11)])
    body = os.urandom(10_000)
    one = record.bound(layout.KIND_WRITE, 0, 1000)
    sealer, out = new_sealer(), bytearray(3 * one + 5)
    seen, done = b"", 0
    while done < 10:
        written, n = sealer.seal(records[done:], memoryview(body)[done * 1000 :], out)
        assert n == min(3, 10 - done)
        done += n
        seen += out[:written]
    found, consumed = record.scan(seen, order=record.Order())
    assert (len(found), consumed) == (10, len(seen))
    with pytest.raises(FullError):
        sealer.seal(change(11, 1000), [body[:1000]], bytearray(one - 1))


def test_payloads_must_fit_their_records() -> None:
    sealer, out = new_sealer(), bytearray(1 << 16)
    two = np.concatenate([change(1, 10), change(2, 20)])
    for wrong in (b"x" * 29, b"x" * 31, [b"x" * 10], [b"x" * 9, b"x" * 20], [None, b"x" * 20]):
        with pytest.raises(InvalidError):
            new_sealer().seal(two, wrong, out)
    assert sealer.seal(two, b"x" * 30, out)[1] == 2
    zeroes = change(3, 1 << 31, kind=layout.KIND_ZEROES)
    assert sealer.seal(zeroes, [None], out) == (64, 1)


def test_what_was_sealed_before_a_wrong_record_is_not_lost() -> None:
    sealer, out = new_sealer(), bytearray(1 << 16)
    records = np.concatenate([change(1, 10), change(2, 10), change(4, 10)])
    written, done = sealer.seal(records, b"x" * 30, out)
    assert done == 2
    assert [one["seq"] for one in record.scan(out[:written])[0]["header"]] == [1, 2]
    with pytest.raises(InvalidError):
        sealer.seal(records[2:], b"x" * 10, out)
    assert sealer.seq == 2


def test_the_ring_is_sealed_out_of_its_memory(tmp_path: Path) -> None:
    from vrep._core.ring import RingProducer, RingReader

    payloads = [os.urandom(4096), b"t" * 100, os.urandom(200_000), b""]
    with RingProducer.create(tmp_path / "ring", group_id=bytes(16), epoch_id=bytes(16)) as ring:
        for i, payload in enumerate(payloads):
            slot = ring.reserve(len(payload))
            slot.write(payload)
            kind = layout.KIND_WRITE if payload else layout.KIND_ZEROES
            slot.publish(kind, disk=1, offset=8192, length=len(payload) or 65536, wall_ns=50 + i)
        with RingReader(tmp_path / "ring") as reader:
            sealer, out = new_sealer(level=1), bytearray(1 << 20)
            written, done = sealer.seal_ring(reader, 1, 4, memoryview(out)[:10_000])
            assert done == 2
            more, done = sealer.seal_ring(reader, 3, 9, memoryview(out)[written:])
            assert done == 2
            with pytest.raises(RangeError):
                sealer.seal_ring(reader, 5, 5, out)
            with pytest.raises(FullError):
                new_sealer().seal_ring(reader, 1, 1, bytearray(100))
    found, consumed = record.scan(memoryview(out)[: written + more], order=record.Order())
    assert consumed == written + more
    assert list(found["header"]["wall_ns"]) == [50, 51, 52, 53]
    opener, room = seal.Opener(KEY, STREAM), bytearray(1 << 20)
    for at, payload in zip(found["position"], payloads, strict=True):
        assert room[: opener.record(memoryview(out)[int(at) :], room)] == payload


def test_tally_and_mark() -> None:
    sealer, out = new_sealer(level=1), bytearray(1 << 16)
    label = "before an update"
    mark = np.zeros((), layout.MARK)
    mark["version"], mark["wall_ns"], mark["label_bytes"] = 1, 99, len(label)
    body = mark.tobytes() + label.encode()
    records = np.concatenate(
        [
            change(1, 5000),
            change(2, 4096, offset=4096),
            change(3, 8192, kind=layout.KIND_ZEROES),  # nothing but its header is there to miss
            change(4, len(body), kind=layout.KIND_MARK),
        ]
    )
    records[3]["disk"] = 0
    at = sealer.stream(np.zeros((), layout.STREAM), out)
    written, _ = sealer.seal(
        records, [b"a" * 5000, os.urandom(4096), None, body], memoryview(out)[at:]
    )
    end = at + written
    last = end + sealer.tally(memoryview(out)[end:], wall_ns=5)
    view = memoryview(out)
    opener, tally = seal.Opener(KEY, STREAM), seal.Tally()
    tally.update(view[:end])
    got = opener.tally(view[end:last], tally)
    assert (int(got["records"]), int(got["first_seq"])) == (4, 1)
    assert got["stream_id"].tobytes() == STREAM
    found, _ = record.scan(view[:last], order=record.Order())
    places = [int(place) for place in found["position"]] + [last]
    assert opener.mark(view[places[4] : places[5]]) == (99, label)
    for missing in (1, 2, 3, 4):
        tally.reset()
        for i in range(5):
            if i != missing:
                tally.update(view[places[i] : places[i + 1]])
        with pytest.raises(CorruptError):
            opener.tally(view[end:last], tally)
    out[end + 90] ^= 1
    with pytest.raises(AuthError):
        opener.tally(view[end:last], tally)


def test_compression_only_when_it_pays() -> None:
    sealer, out = new_sealer(level=1, secret=None), bytearray(1 << 20)
    random = os.urandom(100_000)
    written, _ = sealer.seal(change(1, 100_000), [random], out)
    assert written == 64 + 4 + 100_000 + 16
    assert sealer.stats()["pieces_tried"] == 0
    written, _ = sealer.seal(change(2, 100_000), [bytes(100_000)], out)
    assert written < 200
    # one sixteenth or less saved: stored raw
    mixed = random[:95_000] + bytes(5_000)
    written, _ = sealer.seal(change(3, 100_000), [mixed], out)
    assert written == 64 + 4 + 100_000 + 16


def test_a_handle_serves_one_thread_at_a_time() -> None:
    sealer = new_sealer()
    payload, out = bytes(32 << 20), bytearray(40 << 20)
    start = threading.Barrier(2)

    def run(seq: int) -> str:
        start.wait()
        try:
            sealer.seal(change(seq, len(payload)), [payload], memoryview(out))
        except (BusyError, InvalidError) as error:
            return type(error).__name__
        return "sealed"

    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(run, (1, 1)))
    assert verdicts.count("sealed") == 1
    assert sealer.stats()["records"] == 1


def test_keys_are_not_shown() -> None:
    for handle in (new_sealer(), seal.Opener(KEY, STREAM)):
        text = repr(handle) + str(handle)
        assert KEY.hex() not in text
        assert repr(KEY) not in text
        assert STREAM.hex() in text


def test_buffers_are_given_back() -> None:
    sealer, out = new_sealer(), bytearray(1 << 16)
    payload = bytearray(b"q" * 5000)
    sealer.seal(change(1, 5000), [payload], out)
    with pytest.raises(InvalidError):
        sealer.seal(change(1, 5000), [payload], out)
    gc.collect()
    payload.append(1)  # an exported bytearray would refuse
    out.append(1)


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(InvalidError, match="a stream key has 32 bytes, not 31"):
        seal.Sealer(bytes(31), STREAM, epoch=1)
    with pytest.raises(InvalidError, match="a hash secret has 192 bytes"):
        seal.Sealer(KEY, STREAM, epoch=1, secret=bytes(100))
    with pytest.raises(InvalidError):
        seal.Sealer(KEY, STREAM, epoch=1, level=20)
    with pytest.raises(InvalidError):
        seal.Opener(KEY, b"short")
    with pytest.raises(TornError):
        seal.Opener(KEY, STREAM).record(sealed(b"abc")[:-1], bytearray(3))
