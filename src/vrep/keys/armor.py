"""ASCII armor for key files that people print, type and carry.

A block is a BEGIN line, `Header: value` lines, an empty line, body lines, a
checksum line and an END line.  A body line holds up to 20 bytes as lower-case
base32 in groups of four letters, then a check of its own, so that a mistyped
line is named by its number.  The last line's check covers kind, headers and
body.  Sizes are bytes; a block is at most 64 KiB of text and 8 KiB of body.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from vrep.keys.errors import KeyFileError

__all__ = ["ARMOR_VERSION", "Armored", "decode", "encode"]

ARMOR_VERSION = 1
TEXT_BYTES_MAX = 64 << 10
BODY_BYTES_MAX = 8 << 10
HEADERS_MAX = 32
_LINE_BYTES = 20
_CHECK_LETTERS = 4


@dataclass(frozen=True)
class Armored:
    """A decoded block: its kind, its headers in order, its body."""

    kind: str
    headers: dict[str, str]
    body: bytes

    def __repr__(self) -> str:
        return f"Armored(kind={self.kind!r}, body=<{len(self.body)} bytes>)"

    def header(self, name: str) -> str:
        """The value of a header; KeyFileError when the block lacks it."""
        try:
            return self.headers[name]
        except KeyError:
            raise KeyFileError(f"the key file has no {name!r} line") from None


def headers_bytes(kind: str, headers: Mapping[str, str]) -> bytes:
    """Kind and headers in one byte string, as checks and AEADs cover them."""
    return "".join([kind, "\n", *(f"{k}: {v}\n" for k, v in headers.items())]).encode()


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _unbase32(text: str) -> bytes:
    return base64.b32decode(text.upper() + "=" * (-len(text) % 8))


def _line_check(number: int, letters: str) -> str:
    digest = hashlib.sha256(b"vrep armor line" + number.to_bytes(4, "little") + letters.encode())
    return _base32(digest.digest()[:3])[:_CHECK_LETTERS]


def _block_check(kind: str, headers: Mapping[str, str], body: bytes) -> str:
    head = headers_bytes(kind, headers)
    digest = hashlib.sha256(b"vrep armor" + len(head).to_bytes(4, "little") + head + body)
    return digest.hexdigest()[:16]


def encode(kind: str, headers: Mapping[str, str], body: bytes) -> str:
    """The text of a block. Headers must be single printable lines."""
    if len(body) > BODY_BYTES_MAX or len(headers) > HEADERS_MAX:
        raise ValueError("too much for one armored block")
    for name, value in headers.items():
        if not name or ":" in name or not (name + value).isprintable() or value != value.strip():
            raise ValueError(f"not an armor header: {name!r}: {value!r}")
    lines = [f"-----BEGIN {kind}-----"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append("")
    for number, at in enumerate(range(0, len(body), _LINE_BYTES), 1):
        letters = _base32(body[at : at + _LINE_BYTES])
        groups = [letters[i : i + 4] for i in range(0, len(letters), 4)]
        lines.append(f"{number}: {' '.join(groups)} = {_line_check(number, letters)}")
    lines.append(f"check: {_block_check(kind, headers, body)}")
    lines.append(f"-----END {kind}-----")
    return "\n".join(lines) + "\n"


def _decode_line(number: int, line: str) -> bytes:
    label, _, rest = line.partition(":")
    letters, equals, check = rest.partition("=")
    letters = "".join(letters.split()).lower()
    if label.strip() != str(number) or not equals:
        raise KeyFileError(f"line {number} of the key file is missing or out of order")
    if not hmac.compare_digest(
        check.strip().lower().encode(), _line_check(number, letters).encode()
    ):
        raise KeyFileError(f"line {number} of the key file is mistyped or damaged")
    try:
        return _unbase32(letters)
    except (binascii.Error, ValueError):
        raise KeyFileError(f"line {number} of the key file is not base32") from None


def decode(text: str, kind: str) -> Armored:
    """Read back a block of `kind`; text around it is ignored."""
    if len(text) > TEXT_BYTES_MAX:
        raise KeyFileError(f"a key file has at most {TEXT_BYTES_MAX} characters")
    lines = [line.strip() for line in text.splitlines()]
    begin, end = f"-----BEGIN {kind}-----", f"-----END {kind}-----"
    if begin not in lines or end not in lines[lines.index(begin) :]:
        other = next((ln[11:-5] for ln in lines if ln.startswith("-----BEGIN ")), None)
        found = f"it holds a {other}" if other and other != kind else "it is empty or cut short"
        raise KeyFileError(f"the file does not hold a whole {kind}: {found}")
    start = lines.index(begin)
    inner = lines[start + 1 : lines.index(end, start)]
    headers: dict[str, str] = {}
    while inner and inner[0]:
        name, colon, value = inner.pop(0).partition(":")
        if not colon or name in headers or len(headers) >= HEADERS_MAX:
            raise KeyFileError(f"not a header line of a key file: {name!r}")
        headers[name] = value.strip()
    rows = [line for line in inner if line]
    if not rows or not rows[-1].startswith("check:"):
        raise KeyFileError("the key file has no check line")
    body = b"".join(_decode_line(number, line) for number, line in enumerate(rows[:-1], 1))
    if len(body) > BODY_BYTES_MAX:
        raise KeyFileError(f"a key file has at most {BODY_BYTES_MAX} bytes")
    check = rows[-1].partition(":")[2].strip().lower()
    if not hmac.compare_digest(check.encode(), _block_check(kind, headers, body).encode()):
        raise KeyFileError("the key file's check does not match: a line was changed or is missing")
    return Armored(kind, headers, body)
