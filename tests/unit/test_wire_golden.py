"""The bytes of every message are pinned, and read by an independent parser."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from vrep.wire import messages as m
from vrep.wire.frames import HEADER_BYTES, FrameType, decode_header

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


SAMPLES = load("wire_samples")
PARSER = load("wire_parser")


def test_every_frame_type_has_a_golden_file() -> None:
    assert {path.stem for path in (GOLDEN / "wire").glob("*.bin")} == set(SAMPLES.frames())
    kinds = {m.frame_type(message) for _, message in SAMPLES.MESSAGES.values()}
    assert kinds | {FrameType.DATA} == set(FrameType)


@pytest.mark.parametrize("name", sorted(SAMPLES.frames()))
def test_the_encoding_is_pinned(name: str) -> None:
    assert SAMPLES.frames()[name] == (GOLDEN / "wire" / f"{name}.bin").read_bytes()


def plain(value: Any) -> Any:
    """Structs as the maps that they are on the wire; bytes stay bytes."""
    return msgspec.to_builtins(value, builtin_types=(bytes,))


@pytest.mark.parametrize("name", sorted(SAMPLES.frames()))
def test_an_independent_parser_agrees(name: str) -> None:
    data = (GOLDEN / "wire" / f"{name}.bin").read_bytes()
    fields = PARSER.parse_frame(data)
    header = decode_header(data[:HEADER_BYTES])
    assert fields["version"] == header.version == 1
    assert fields["type"] == header.type.name.lower()
    assert fields["flags"] == header.flags
    assert fields["channel"] == header.channel
    assert fields["sequence"] == header.sequence
    assert header.length == len(data) - HEADER_BYTES
    if header.type is FrameType.DATA:
        assert fields["payload"] == SAMPLES.RECORDS
        assert (fields["channel"], fields["sequence"]) == (0x01020304, 0x0102030405060708)
        assert fields["flags"] == (1 if name == "data_more" else 0)
    else:
        channel, message = SAMPLES.MESSAGES[name]
        assert fields["channel"] == channel
        assert fields["payload"] == plain(message)
        assert m.decode_message(header.type, data[HEADER_BYTES:]) == message


def test_fields_of_a_later_release_are_skipped() -> None:
    for _, message in SAMPLES.MESSAGES.values():
        later = msgspec.msgpack.encode(plain(message) | {"a_later_field": [1, {"x": b"y"}]})
        assert m.decode_message(m.frame_type(message), later) == message


def test_messages_without_points_are_those_of_before() -> None:
    """A field that is not set is left out: the pinned bytes have none."""
    for name in ("ack", "group_opened"):
        payload = (GOLDEN / "wire" / f"{name}.bin").read_bytes()[HEADER_BYTES:]
        assert b"points" not in payload
        message = SAMPLES.MESSAGES[name][1]
        assert m.encode_message(message) == payload
