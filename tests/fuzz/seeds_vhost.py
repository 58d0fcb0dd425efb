"""Write the seeds of fuzz_vhost: ``python tests/fuzz/seeds_vhost.py``."""

from __future__ import annotations

import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus" / "vhost"
GUEST, AVAILABLE, TABLE, KEPT, DATA = 0x10000, 256, 512, 1024, 4096
NEXT, WRITE, INDIRECT = 1, 2, 4


def descriptor(address: int, size: int, flags: int, following: int = 0) -> bytes:
    return struct.pack("<QIHH", GUEST + address, size, flags, following)


def memory(table: list[bytes], heads: list[int], parts: dict[int, bytes]) -> bytes:
    """The rest is zero: left out, so that a mutation mostly meets what means something."""
    out = bytearray(8192)
    for index, each in enumerate(table):
        out[16 * index : 16 * index + 16] = each
    struct.pack_into(f"<HH{len(heads)}H", out, AVAILABLE, 0, len(heads), *heads)
    for at, data in parts.items():
        out[at : at + len(data)] = data
    return bytes(out).rstrip(b"\0")


def message(request: int, body: bytes, fds: int = 0) -> bytes:
    return struct.pack("<BBHB", request, 0, len(body), fds) + body


def seeds() -> dict[str, bytes]:
    chain = [
        part
        for at in range(0, 15, 3)
        for part in (
            descriptor(DATA, 16, NEXT, at + 1),
            descriptor(DATA + 512, 512, NEXT, at + 2),
            descriptor(DATA + 64, 1, WRITE),
        )
    ]
    heads = [12, 0, 6, 3, 9]
    inner = b"".join(chain[:3])
    region = struct.pack("<QHHHH", 0, 1, 16, 0, 0xFFFF)  # one entry behind the used index
    region += struct.pack("<B5xHQ", 1, 0, 5) + struct.pack("<B5xHQ", 0, 0, 0) * 15
    table = struct.pack("<II", 2, 0)
    table += struct.pack("<QQQQ", 0, 4096, 0, 0) + struct.pack("<QQQQ", 8192, 4096, 8192, 0)
    lawful = [
        message(1, b""),
        message(2, struct.pack("<Q", 1 << 32)),
        message(5, table, 2),
        message(8, struct.pack("<II", 0, 128)),
        message(9, struct.pack("<IIQQQQ", 0, 0, 0, 4096, 8192, 0)),
        message(12, struct.pack("<Q", 0), 1),
        message(24, struct.pack("<III", 0, 60, 0) + bytes(60)),
        message(31, struct.pack("<QQHH", 0, 0, 2, 128)),
        message(32, struct.pack("<QQHH", 1 << 16, 0, 2, 128), 1),
        message(37, struct.pack("<Q", 0) + struct.pack("<QQQQ", 0, 4096, 0, 0), 1),
    ]
    return {
        "messages": b"\1" + b"".join(lawful),
        "chain": b"\0" + memory(chain, heads, {}),
        "event": b"\2" + memory(chain, heads, {}),
        "indirect": b"\0" + memory([descriptor(TABLE, 48, INDIRECT)], [0], {TABLE: inner}),
        "kept": b"\4" + memory(chain, [3], {KEPT: region}),
    }


def main() -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (CORPUS / name).write_bytes(data)


if __name__ == "__main__":
    main()
