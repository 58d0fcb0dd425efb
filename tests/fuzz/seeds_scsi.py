"""Write the seeds of fuzz_scsi: ``python tests/fuzz/seeds_scsi.py``."""

from __future__ import annotations

import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus" / "scsi"


def task(cdb: bytes, out: bytes = b"", *, nexus: int = 0, attribute: int = 0) -> bytes:
    units = -(-len(out) // 64)
    return bytes([nexus | attribute << 1, units]) + cdb.ljust(16, b"\0") + out


READY = task(b"\0")
LIMITS = b"".join(
    task(bytes([0x12, page > 0, page, 0, 255])) for page in (0, 0x80, 0x83, 0xB0, 0xB2)
)
KEY = struct.pack(">QQ", 0, 0xA).ljust(24, b"\0")
HELD = struct.pack(">QQ", 0xA, 0).ljust(24, b"\0")
RANGE = struct.pack(">HH4xQL4x", 22, 16, 8, 8)
CACHING = bytes([0, 0, 0, 0, 0x08, 0x12, 0x04]).ljust(24, b"\0")
SEEDS = {
    "inquiry": READY + LIMITS + task(b"\xa0" + bytes(8) + b"\xff"),
    "capacity": READY * 2 + task(b"\x25") + task(b"\x9e\x10" + bytes(11) + b"\x20"),
    "read-write": READY
    + task(b"\x2a\0\0\0\0\4\0\0\1", b"a" * 512)
    + task(b"\x28\0\0\0\0\4\0\0\1")
    + task(b"\x89" + bytes(8) + b"\4\0\0\0\1", b"a" * 512 + b"b" * 512)
    + task(b"\x2f\2\0\0\0\4\0\0\1", b"b" * 512),
    "thin": READY
    + task(b"\x42" + bytes(7) + b"\x18", RANGE.ljust(24, b"\0"))
    + task(b"\x93\x09" + bytes(11) + b"\x08")
    + task(b"\x9e\x12" + bytes(10) + b"\1"),
    "reserve": READY
    + task(b"\x5f\0\0\0\0\0\0\0\x18", KEY)
    + task(b"\x5f\1\3\0\0\0\0\0\x18", HELD)
    + task(b"\x5e\3\0\0\0\0\0\1")
    + task(b"\0", nexus=1)
    + task(b"\x28\0\0\0\0\0\0\0\1"),
    "mode": READY + task(b"\x1a\0\x3f\0\xff") + task(b"\x15\x10\0\0\x18", CACHING),
    "opcodes": READY + task(b"\xa3\x0c" + bytes(6) + b"\xff") + task(b"\x16") + task(b"\x17"),
}


def main() -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    for name, data in SEEDS.items():
        (CORPUS / name).write_bytes(data)


if __name__ == "__main__":
    main()
