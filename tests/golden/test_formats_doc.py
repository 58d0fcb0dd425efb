"""docs/internals/formats.md says what the compiler says."""

from __future__ import annotations

import re
from pathlib import Path

from vrep._core import layout

DOCUMENT = Path(__file__).parents[2] / "docs" / "internals" / "formats.md"
NOT_STORED = {"RECORD_FOUND", "PIECE"}
TABLE = re.compile(r"^`struct vrep_(\w+)`, (\d+) bytes\n\n\|.*\n\|.*\n((?:\|.*\n)+)", re.M)
ROW = re.compile(r"^\| (\d+) \| (\d+) \| ([\w\[\]]+) \| `(\w+)` \| (.+) \|$")


def test_every_field_stands_in_the_document_where_it_is() -> None:
    seen = set()
    for name, size, body in TABLE.findall(DOCUMENT.read_text()):
        dtype = layout.STRUCTS[name.upper()]
        rows = []
        for line in body.splitlines():
            match = ROW.match(line)
            assert match is not None, line
            rows.append((match[4], int(match[1]), int(match[2])))
        fields = dtype.fields or {}
        want = [(field, fields[field][1], fields[field][0].itemsize) for field in dtype.names or ()]
        assert rows == want, name
        assert int(size) == dtype.itemsize
        seen.add(name.upper())
    assert seen == set(layout.STRUCTS) - NOT_STORED


def test_the_limits_are_those_of_the_code() -> None:
    limits = re.findall(r"^\| `VREP_(\w+)` \| (\d+) \|", DOCUMENT.read_text(), re.M)
    assert len(limits) >= 14
    for name, value in limits:
        assert layout.CONSTANTS[name] == int(value), name


def test_every_kind_and_flag_is_documented() -> None:
    text = DOCUMENT.read_text()
    for name, value in layout.CONSTANTS.items():
        if name.startswith("KIND_") and name != "KIND_LAST":
            assert re.search(rf"^\| {value} \| {name.removeprefix('KIND_')}\b", text, re.M), name
    for flag in ("FUA", "REPLAY", "HASHED", "JUMP"):
        assert re.search(rf"^\| {flag} \| {layout.CONSTANTS[f'RECORD_{flag}']} \|", text, re.M)
