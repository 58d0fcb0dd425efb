"""Reads frames by the document alone: the header field by field, the payload
by a MessagePack reader of its own. Imports nothing of vrep, so that an error
in the encoder cannot hide behind the same error in the decoder."""

from __future__ import annotations

import struct
from typing import Any

import xxhash

TYPES = {
    1: "hello",
    2: "welcome",
    3: "join",
    4: "joined",
    5: "open_group",
    6: "group_opened",
    7: "refused",
    8: "stream_start",
    9: "data",
    10: "ack",
    11: "status",
    12: "ping",
    13: "pong",
    14: "error",
    15: "bye",
    16: "request",
    17: "response",
}


def parse_frame(data: bytes) -> dict[str, Any]:
    """All fields of one whole frame."""
    if data[0:4] != b"VRWF":
        raise ValueError("magic")
    if int.from_bytes(data[24:32], "little") != xxhash.xxh3_64(data[0:24]).intdigest():
        raise ValueError("checksum")
    length = int.from_bytes(data[8:12], "little")
    if len(data) != 32 + length:
        raise ValueError("length")
    kind = TYPES[data[5]]
    payload = data[32:]
    fields: dict[str, Any] = {
        "version": data[4],
        "type": kind,
        "flags": int.from_bytes(data[6:8], "little"),
        "channel": int.from_bytes(data[12:16], "little"),
        "sequence": int.from_bytes(data[16:24], "little"),
        "payload": payload,
    }
    if kind != "data":
        value, end = parse_msgpack(payload, 0)
        if end != length:
            raise ValueError("bytes after the payload's map")
        fields["payload"] = value
    return fields


_SIZED = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_LENGTHS = {
    0xC4: 1,
    0xC5: 2,
    0xC6: 4,
    0xD9: 1,
    0xDA: 2,
    0xDB: 4,
    0xDC: 2,
    0xDD: 4,
    0xDE: 2,
    0xDF: 4,
}


def parse_msgpack(data: bytes, at: int) -> tuple[Any, int]:
    """One value, and where it ends."""
    first = data[at]
    at += 1
    if first < 0x80:
        return first, at
    if first >= 0xE0:
        return first - 256, at
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at
    if first in _SIZED:
        size = struct.calcsize(_SIZED[first])
        return struct.unpack(_SIZED[first], data[at : at + size])[0], at + size
    if first < 0xC0:
        count = first & (0x0F if first < 0xA0 else 0x1F)
        shape = "map" if first < 0x90 else "array" if first < 0xA0 else "str"
    else:
        width = _LENGTHS[first]
        count = int.from_bytes(data[at : at + width], "big")
        at += width
        shape = (
            "bin"
            if first <= 0xC6
            else "str"
            if first <= 0xDB
            else "array"
            if first <= 0xDD
            else "map"
        )
    if shape in ("str", "bin"):
        raw = data[at : at + count]
        return (raw.decode() if shape == "str" else raw), at + count
    if shape == "array":
        items = []
        for _ in range(count):
            value, at = parse_msgpack(data, at)
            items.append(value)
        return items, at
    table = {}
    for _ in range(count):
        key, at = parse_msgpack(data, at)
        table[key], at = parse_msgpack(data, at)
    return table, at
