"""Every byte of the formats is pinned, and read by a parser that shares no code with vrep."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec

from vrep._core import layout, record, seal
from vrep._core import segment as native
from vrep.errors import IntegrityError
from vrep.recovery import verdict
from vrep.source import shipped
from vrep.target import lost
from vrep.target.manifest import Manifest, Position

HERE = Path(__file__).parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load("build")
parse = load("parse")
VERDICT_KEY = ec.derive_private_key(build.VERDICT_SECRET, ec.SECP256R1()).public_key()
KEYS = {build.STREAM_ID: parse.stream_key(build.DATA_KEY, build.STREAM_ID)}
PARSERS: dict[str, Callable[[bytes], Any]] = {
    "records": lambda data: list(parse.parse_records(data, KEYS)),
    "records-zstd": lambda data: list(parse.parse_records(data, KEYS)),
    "cut": lambda data: list(parse.parse_records(data, KEYS)),
    "ring": parse.parse_ring,
    "control": parse.parse_control,
    "map": parse.parse_map,
    "checkpoint": parse.parse_checkpoint,
    "intent": parse.parse_intent,
    "state": parse.parse_state,
    "reservations": parse.parse_reservations,
    "segment": lambda data: parse.parse_segment(data, KEYS),
    "segment-folded": lambda data: parse.parse_segment(data, KEYS),
    "index": parse.parse_index,
    "manifest": parse.parse_manifest,
    "manifest-2": parse.parse_manifest,
    "presence": parse.parse_presence,
    "lost": parse.parse_lost,
    "shipped": parse.parse_shipped,
    "verdict": lambda data: parse.parse_verdict(data, VERDICT_KEY),
}
# structs that only memory of one process holds
NOT_STORED = {"RECORD_FOUND", "PIECE"}


def golden(name: str) -> bytes:
    return (build.FOLDER / f"{name}.bin").read_bytes()


def parsed(name: str) -> Any:
    return PARSERS[name](golden(name))


@pytest.mark.parametrize("name", sorted(build.SAMPLES))
def test_bytes_are_pinned(name: str) -> None:
    assert build.SAMPLES[name]() == golden(name)


def test_no_sample_is_without_a_parser() -> None:
    stored = {path.stem for path in build.FOLDER.iterdir()}
    assert stored == set(PARSERS) == set(build.SAMPLES | build.READ_ONLY)


@pytest.mark.parametrize("name", sorted(set(layout.STRUCTS) - NOT_STORED))
def test_the_independent_definition_is_the_compiled_one(name: str) -> None:
    dtype, at = layout.STRUCTS[name], 0
    names = []
    for token in getattr(parse, name).split():
        field = token.split(":")[0]
        names.append(field)
        assert dtype.fields[field][1] == at, field
        at += parse.size_of(token)
    assert at == dtype.itemsize
    assert tuple(names) == dtype.names


@pytest.mark.parametrize("name", ["records", "records-zstd"])
def test_records(name: str) -> None:
    found = parsed(name)
    assert [entry["header"]["name"] for entry in found] == [
        "stream", "write", "write", "write", "zeroes", "resize", "sync", "sync-zeroes", "mark",
        "gap-begin", "gap-end", "object", "tally",
    ]  # fmt: skip
    data = bytes(i * i % 251 for i in range(150_000))
    assert [found[i]["plain"] for i in (1, 2, 3, 6)] == [data[:4096], data[:1], data, data[:8192]]
    assert [len(entry.get("hashes", ())) for entry in found] == [0, 1, 0, 36, *[0] * 2, 2, *[0] * 6]
    assert found[1]["hashes"][0] == found[6]["hashes"][0]
    assert found[8]["label"] == "nightly"
    assert (found[11]["label"], found[11]["blob"]) == ("definition.xml", b"<domain/>" * 40)
    assert (found[12]["tally"]["records"], found[12]["tally"]["first_seq"]) == (11, 100)
    stream = found[0]["stream"]
    assert (stream["key_generation"], stream["resume_seq"]) == (2, 99)
    assert stream["parent"] == {"epoch": 2, "lane": 1, "reserved": 0, "seq": 99}


def test_cut() -> None:
    """The independent parser and vrep's own read the same of it."""
    raw = golden("cut")
    _stream, part, whole = parsed("cut")
    assert (part["cut"]["cut_id"], part["at"], part["label"]) == (build.SITE_ID, [], "")
    assert [(at["epoch"], at["lane"], at["seq"]) for at in whole["at"]] == [
        (3, 0, 7), (3, 1, 100), (0, 5, 0),
    ]  # fmt: skip
    assert whole["label"] == "nightly"
    found, _end = record.scan(raw)
    opener = seal.Opener(seal.stream_key(build.DATA_KEY, build.STREAM_ID), build.STREAM_ID)
    first, second = (
        raw[int(e["position"]) : int(e["position"]) + 64 + int(e["header"]["body_bytes"])]
        for e in found[1:]
    )
    assert opener.cut(first) == (build.SITE_ID, ())
    assert opener.cut(second) == (build.SITE_ID, ((3, 0, 7), (3, 1, 100), (0, 5, 0)))
    assert opener.mark(second) == (build.WALL + 6, "nightly")
    records = golden("records")
    found, _end = record.scan(records)
    (at,) = (int(e["position"]) for e in found if e["header"]["kind"] == layout.KIND_MARK)
    assert opener.cut(records[at:]) is None  # it is of its lane alone


@pytest.mark.parametrize("name", ["records", "records-zstd"])
def test_vrep_reads_its_golden_records(name: str) -> None:
    raw = golden(name)
    found, consumed = record.scan(raw, order=record.Order())
    assert consumed == len(raw)
    opener = seal.Opener(seal.stream_key(build.DATA_KEY, build.STREAM_ID), build.STREAM_ID)
    tally, room = seal.Tally(), bytearray(1 << 20)
    for entry, want in zip(found, parsed(name), strict=True):
        at = int(entry["position"])
        whole = raw[at : at + 64 + int(entry["header"]["body_bytes"])]
        if entry["header"]["kind"] == layout.KIND_TALLY:
            assert int(opener.tally(whole, tally)["records"]) == 11
            continue
        tally.update(whole)
        if "plain" in want:
            assert room[: opener.record(whole, room)] == want["plain"]
        if "hashes" in want:
            assert room[: opener.hashes(whole, room)] == b"".join(want["hashes"])


def test_a_removed_record_breaks_order_and_tally() -> None:
    raw, found = golden("records"), parsed("records")
    ends = [entry["at"] for entry in found] + [len(raw)]
    for i in range(1, 12):
        with pytest.raises(parse.BadFormat):
            list(parse.parse_records(raw[: ends[i]] + raw[ends[i + 1] :], KEYS))


def test_ring() -> None:
    got = parsed("ring")
    assert (got["header"]["head"], got["header"]["released"]) == (101, 100)
    assert (got["slots"][0]["state"], got["slots"][0]["length"], got["slots"][1]["state"]) == (
        2,
        5000,
        0,
    )
    assert got["descs"][101 % 4]["seq"] == 101
    assert got["next"] == [{"value": 5 if i == 3 else 0xFFFFFFFF} for i in range(8)]
    assert parsed("control")["durable"] == 100


def test_maps() -> None:
    assert parsed("map")["bitmaps"] == [[[0, 99], [64], [], [], [7]]]
    assert parsed("map")["header"]["generation"][1]["state"] == 1
    assert parsed("checkpoint")["bitmaps"] == [[0, 99], [63]]
    assert parsed("intent")["extents"] == [3]
    assert parsed("state")["header"]["counter"] == 5
    kept = parsed("reservations")
    assert (kept["header"]["counter"], kept["header"]["type"]) == (7, 5)
    assert [one["key"] for one in kept["list"]] == [10, 11]
    assert parsed("presence")["blocks"] == [1, 64, 99]


def test_lost() -> None:
    got = parsed("lost")
    assert got["ranges"] == [(0, 65536, 65536), (0, 1 << 30, 196608), (2, 0, 65536)]
    said = (golden("lost"), build.GROUP_ID, build.STORE_ID)
    at = Position(3, 0, 102)
    assert lost.decode(*said, at) == got["ranges"]
    assert lost.encode(build.GROUP_ID, build.STORE_ID, at, lost.decode(*said, at)) == said[0]
    unknown = lost.encode(build.GROUP_ID, build.STORE_ID, at, None)
    assert (parse.parse_lost(unknown)["header"]["flags"], len(unknown)) == (1, 128)
    assert lost.decode(unknown, build.GROUP_ID, build.STORE_ID, at) is None
    for other in [(said[0], b"x" * 16, said[2], at), (said[0], said[1], b"x" * 16, at),
                  (*said, Position(3, 0, 101)), (*said, Position(2, 0, 102))]:  # fmt: skip
        with pytest.raises(IntegrityError):
            lost.decode(*other)
    for place in range(len(said[0])):
        bad = bytearray(said[0])
        bad[place] ^= 1 << (place % 8)
        with pytest.raises(IntegrityError):
            lost.decode(bytes(bad), *said[1:], at)


def test_shipped() -> None:
    got = parsed("shipped")
    assert (got["epoch"], got["epoch_id"], got["seq"]) == (3, build.EPOCH_ID.hex(), 102)
    mark = shipped.decode(golden("shipped"))
    assert mark == shipped.Mark(2, 3, build.EPOCH_ID.hex(), 102)


def test_the_older_slot_serves_when_the_newer_is_torn() -> None:
    intent, state = bytearray(golden("intent")), bytearray(golden("state"))
    intent[130] ^= 1
    assert parse.parse_intent(bytes(intent))["extents"] == [3, 5]
    kept = bytearray(golden("reservations"))
    kept[24576 + 200] ^= 1
    assert parse.parse_reservations(bytes(kept))["header"]["counter"] == 6
    state[8192 + 100] ^= 1
    assert parse.parse_state(bytes(state))["header"]["counter"] == 4
    state[100] ^= 1
    with pytest.raises(parse.BadFormat):
        parse.parse_state(bytes(state))


def test_store() -> None:
    got = parsed("segment")
    assert (len(got["commits"]), len(got["records"])) == (1, 13)
    assert got["commits"][0]["durable"]["seq"] == 99
    index = parsed("index")
    assert [entry["seq"] for entry in index["short"]] == [102, 105, 100]
    assert [len(index[name]) for name in ("long", "streams", "events", "times", "nodes")] == [
        1,
        1,
        1,
        1,
        2,
    ]
    manifest = parsed("manifest")
    assert (manifest["name"], manifest["header"]["number"]) == ("web", 42)
    assert [epoch["state"] for epoch in manifest["epochs"]] == [1, 2]
    assert manifest["keys"] == b"wrapped data keys, opaque here"
    newer = parsed("manifest-2")
    assert newer["header"]["horizon"] == {"epoch": 3, "lane": 1, "reserved": 0, "seq": 150}
    assert (newer["header"]["window_s"], newer["segments"][0]["generation"]) == (86_400, 1)


def test_vrep_reads_manifests_of_both_versions() -> None:
    old, new = (Manifest.decode(lawful(golden(name))) for name in ("manifest", "manifest-2"))
    assert (old.horizon, old.window_s, old.quota_bytes) == (Position(), 0, 0)
    assert (new.horizon, new.window_s, new.quota_bytes) == (Position(3, 1, 150), 86_400, 1 << 39)
    assert (new.received_bytes, new.folded_bytes) == (1 << 33, 1 << 31)
    assert [int(m.segments[0]["generation"]) for m in (old, new)] == [0, 1]


def lawful(data: bytes) -> bytes:
    """A golden manifest with the keys left out and a size that the store could have: both are
    judged by the code alone, not by the parser."""
    head = np.frombuffer(data, layout.MANIFEST_HEADER, 1).copy()
    body = bytearray(data[256 : len(data) - int(head["key_bytes"][0])])
    segment = np.frombuffer(body, layout.MANIFEST_SEGMENT, 1, offset=128)
    segment["data_end"] -= segment["data_end"] % 64
    head["key_bytes"], head["body_bytes"] = 0, len(body)
    head["digest"] = np.frombuffer(parse.digest(bytes(body)), np.uint8)
    head["checksum"] = parse.checksum32(head.tobytes()[:252])
    return bytes(head.tobytes() + body)


def test_a_folded_segment() -> None:
    got = parsed("segment-folded")
    assert [entry["header"]["seq"] for entry in got["records"]] == [99, 100, 101, 105, 99]
    assert got["fold"]["end"]["seq"] == 202
    assert got["fold"]["tally"]["records"] == 11
    block = native.parse_fold(golden("segment-folded"))
    assert block is not None
    tally, stream = seal.Tally(), seal.stream_key(build.DATA_KEY, build.STREAM_ID)
    tally.load(block["tally"].tobytes())
    raw = golden("records")
    at = int(record.scan(raw)[0][-1]["position"])
    sealed = seal.Opener(stream, build.STREAM_ID).tally(raw[at:], tally)
    assert int(sealed["records"]) == 11
    assert native.parse_fold(golden("segment")) is None


def test_vrep_refuses_a_flipped_bit_before_the_records_of_a_folded_segment() -> None:
    raw = golden("segment-folded")
    result, _commits = native.scan(raw, build.GROUP_ID, 7)
    assert (result["end"], result["commits"]) == (len(raw), 2)
    for at in range(384):
        bad = bytearray(raw)
        bad[at] ^= 1 << (at % 8)
        with pytest.raises(IntegrityError):
            native.scan(bytes(bad), build.GROUP_ID, 7)


def test_verdict() -> None:
    got = parsed("verdict")
    assert got["header"]["at"] == {"epoch": 3, "lane": 0, "reserved": 0, "seq": 102}
    assert got["body"] == build.VERDICT
    found = verdict.decode(golden("verdict"), VERDICT_KEY)
    assert (found.group_id, found.store_id) == (build.GROUP_ID, build.STORE_ID)
    assert (found.position, found.wall_ns) == ((3, 0, 102), build.WALL + 4)
    assert msgspec.json.decode(msgspec.json.encode(found.finding)) == build.VERDICT


# Bytes of each file that its own checks do not cover: live words of shared memory, payload of
# the ring, bitmaps without a digest, padding after a slot.
GUARDED = {
    "records": (0, None), "records-zstd": (0, None), "segment": (0, None), "manifest": (0, None),
    "segment-folded": (0, None), "manifest-2": (0, None),
    "checkpoint": (0, None), "index": (0, None), "ring": (0, 512), "map": (0, 128),
    "presence": (0, 4096), "control": (0, 16), "verdict": (0, None),
    "lost": (0, None), "shipped": (0, None),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(GUARDED))
def test_a_flipped_bit_is_refused(name: str) -> None:
    raw, (start, end) = golden(name), GUARDED[name]
    places = range(start, end or len(raw))
    if name == "index":  # the padding between tables means nothing
        index = parsed("index")["trailer"]
        sizes = {"short": 40, "long": 40, "streams": 64, "events": 40, "times": 24, "nodes": 48}
        tables = [
            range(index[f"{table}_at"], index[f"{table}_at"] + size * index[f"{table}_count"])
            for table, size in sizes.items()
        ]
        places = [*[at for table in tables for at in table], *range(len(raw) - 256, len(raw))]
    chosen = places if len(places) <= 300 else random.Random(name).sample(list(places), 300)
    for at in chosen:
        bad = bytearray(raw)
        bad[at] ^= 1 << (at % 8)
        with pytest.raises((parse.BadFormat, InvalidTag)):
            PARSERS[name](bytes(bad))
