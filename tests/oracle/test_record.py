"""Records in Python: dtypes against the header file, scans against a plain walk."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from vrep._core import layout, record
from vrep.errors import CorruptError, InvalidError, VersionError

LAYOUT_H = Path(__file__).parents[2] / "src" / "_native" / "format" / "layout.h"
STUB = Path(__file__).parents[2] / "src" / "vrep" / "_core" / "layout.pyi"
HEADER = struct.Struct("<IBBHIHHQQIIQQHHI")


def header_text() -> str:
    return re.sub(r"/\*.*?\*/", "", LAYOUT_H.read_text(), flags=re.S)


def test_every_struct_of_the_header_file_is_a_dtype_of_its_size() -> None:
    sizes = dict(re.findall(r"^VREP_LAYOUT\(struct vrep_(\w+), (\d+)\)", header_text(), re.M))
    assert len(sizes) > 25
    got = {name: layout.STRUCTS[name.upper()].itemsize for name in sizes}
    assert got == {name: int(size) for name, size in sizes.items()}


@pytest.mark.parametrize("name", sorted(layout.STRUCTS))
def test_fields_cover_a_struct_without_a_hole(name: str) -> None:
    dtype = layout.STRUCTS[name]
    at = 0
    for field in dtype.names or ():
        kind, offset = dtype.fields[field][:2]  # type: ignore[index]
        assert offset == at, field
        at += kind.itemsize
    assert at == dtype.itemsize


def test_every_constant_of_the_header_file_is_there() -> None:
    text = header_text()
    names = set(re.findall(r"^#define VREP_([A-Z0-9_]+)\s+\S", text, re.M))
    names -= {"LAYOUT", "AT", "FORMAT_LAYOUT_H"}
    for body in re.findall(r"enum \w+ \{(.*?)\}", text, re.S):
        names |= set(re.findall(r"VREP_(\w+)\s*=", body))
    assert names == set(layout.CONSTANTS)
    assert int.from_bytes(b"VEPR", "little") == layout.RECORD_MAGIC
    assert layout.WRITE_BYTES_MAX == 32 << 20


def test_the_stub_names_what_the_module_has() -> None:
    text = STUB.read_text()
    assert set(re.findall(r"^(\w+): Layout$", text, re.M)) == set(layout.STRUCTS)
    assert set(re.findall(r"^(\w+): int$", text, re.M)) == set(layout.CONSTANTS)
    for name in (*layout.STRUCTS, *layout.CONSTANTS):
        assert hasattr(layout, name)


def test_the_dtype_of_a_record_is_what_struct_says() -> None:
    fields = tuple(range(1, 17))
    one = np.frombuffer(HEADER.pack(*fields), layout.RECORD)[0]
    assert tuple(int(value) for value in one) == fields


def plain_record(kind: int, seq: int, *, epoch: int = 1, lane: int = 0, flags: int = 0) -> bytes:
    one = np.zeros(1, layout.RECORD)
    one["magic"], one["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
    one["kind"], one["seq"], one["epoch"], one["lane"] = kind, seq, epoch, lane
    one["flags"] = flags
    one["length"] = 4096 if kind == layout.KIND_ZEROES else 0
    record.finish(one)
    return one.tobytes()


def test_checksum_is_the_low_half_of_seeded_xxh3() -> None:
    raw = plain_record(layout.KIND_ZEROES, 7)
    want = xxhash.xxh3_64_intdigest(raw[:60], seed=0x76726570) & 0xFFFFFFFF
    assert int.from_bytes(raw[60:], "little") == want


Steps = st.lists(
    st.tuples(
        st.sampled_from(["next", "skip", "repeat", "jump", "jump-back", "stream", "epoch"]),
        st.integers(0, 2),
    ),
    max_size=30,
)


@given(Steps)
@settings(max_examples=200, deadline=None)
def test_order_matches_a_plain_model(steps: list[tuple[str, int]]) -> None:
    last: dict[int, tuple[int, int]] = {}
    order = record.Order()
    buffer = b""
    bad_at = None
    for step, lane in steps:
        epoch, seq = last.get(lane, (1, 5))
        known = lane in last
        good = True
        if step == "next":
            seq += 1
            one = plain_record(layout.KIND_ZEROES, seq, epoch=epoch, lane=lane)
        elif step in ("skip", "repeat"):
            seq += 2 if step == "skip" else 0
            good = not known
            one = plain_record(layout.KIND_ZEROES, seq, epoch=epoch, lane=lane)
        elif step in ("jump", "jump-back"):
            seq += 100 if step == "jump" else 0
            good = step == "jump" or not known
            one = plain_record(
                layout.KIND_GAP_BEGIN, seq, epoch=epoch, lane=lane, flags=layout.RECORD_JUMP
            )
        else:
            body = np.zeros((), layout.STREAM)
            epoch += step == "epoch"
            seq -= 3 if step == "epoch" else 0  # a new epoch may leave its parent anywhere
            seq = max(seq, 0)
            body["epoch"], body["resume_seq"] = epoch, seq
            one = record.stream_record(body, lane)
        if not good:
            bad_at = len(buffer)
            buffer += one
            break
        buffer += one
        last[lane] = (epoch, seq)
    found, consumed = record.scan(buffer, order=order, tolerant=True)
    assert consumed == (len(buffer) if bad_at is None else bad_at)
    assert order.positions() == last
    if bad_at is not None:
        with pytest.raises(CorruptError, match=f"record at byte {bad_at}"):
            record.scan(buffer, order=record.Order())
    at = 0
    for one_found in found:
        assert one_found["position"] == at
        assert one_found["header"].tobytes() == buffer[at : at + 64]
        at += 64 + int(one_found["header"]["body_bytes"])


def test_a_seeded_order_refuses_what_does_not_follow() -> None:
    order = record.Order()
    order.seed(epoch=3, seq=10)
    with pytest.raises(CorruptError):
        record.scan(plain_record(layout.KIND_ZEROES, 12, epoch=3), order=order)
    found, _ = record.scan(plain_record(layout.KIND_ZEROES, 11, epoch=3), order=order)
    assert len(found) == 1
    assert order.positions() == {0: (3, 11)}


def test_other_versions_are_named() -> None:
    raw = bytearray(plain_record(layout.KIND_ZEROES, 1))
    raw[4] = 2
    raw[60:] = (xxhash.xxh3_64_intdigest(raw[:60], seed=0x76726570) & 0xFFFFFFFF).to_bytes(
        4, "little"
    )
    with pytest.raises(VersionError, match="record at byte 0"):
        record.scan(raw)
    with pytest.raises(VersionError):
        record.check_header(raw)


def test_scan_fills_the_callers_array_and_stops_when_it_is_full() -> None:
    raw = b"".join(plain_record(layout.KIND_ZEROES, seq) for seq in range(1, 6))
    out = np.zeros(2, layout.RECORD_FOUND)
    found, consumed = record.scan(raw, out=out)
    assert len(found) == 2
    assert consumed == 128
    assert np.shares_memory(found, out)
    found, consumed = record.scan(memoryview(raw)[128:], out=np.zeros(9, layout.RECORD_FOUND))
    assert list(found["header"]["seq"]) == [3, 4, 5]
    with pytest.raises(InvalidError):
        record.scan(raw, out=np.zeros(4))


def test_streams_are_parsed_back() -> None:
    body = np.zeros((), layout.STREAM)
    body["stream_id"] = np.arange(16)
    body["epoch"], body["resume_seq"], body["key_generation"] = 4, 77, 2
    raw = record.stream_record(body, 3)
    got = record.parse_stream(raw)
    assert got["stream_id"].tobytes() == bytes(range(16))
    assert (got["epoch"], got["resume_seq"], got["key_generation"]) == (4, 77, 2)
    broken = bytearray(raw)
    broken[-10] ^= 1
    with pytest.raises(CorruptError):
        record.parse_stream(broken)
    with pytest.raises(InvalidError):
        record.parse_stream(plain_record(layout.KIND_ZEROES, 1))
    with pytest.raises(InvalidError):
        record.parse_stream(raw[:100])


@given(st.integers(0, 1 << 40), st.integers(0, 1 << 20))
def test_hash_blocks_are_the_covered_ones(offset: int, length: int) -> None:
    first = -(-offset // 4096) * 4096
    count = max(0, (offset + length) // 4096 - first // 4096)
    got, at = record.hash_blocks(offset, length)
    assert got == count
    assert offset + at == first
