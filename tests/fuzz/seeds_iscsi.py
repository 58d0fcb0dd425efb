"""Write the seeds of fuzz_iscsi: ``python tests/fuzz/seeds_iscsi.py``."""

from __future__ import annotations

import struct
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus" / "iscsi"
LOGGED, DIGESTS, WHOLE = 1, 2, 0x80


def pdu(
    opcode: int, flags: int = 0x80, *, tag: int = 1, word: int = 0xFFFFFFFF, sn: int = 1,
    tail: bytes = b"", data: bytes = b"", lun: int = 0,
) -> bytes:  # fmt: skip
    header = struct.pack(">BB3xB", opcode, flags, 0)[:5] + len(data).to_bytes(3, "big")
    header += struct.pack(">QIIII", lun, tag, word, sn, 0)
    return header + tail.ljust(16, b"\0") + data


def command(cdb: bytes, flags: int, expected: int, sn: int, data: bytes = b"") -> bytes:
    return pdu(1, flags, tag=sn, word=expected, sn=sn, tail=cdb, data=data)


READY = command(b"\0", 0x80, 0, 1)
NAMES = b"InitiatorName=iqn.c:d\0TargetName=iqn.a:b\0"
KEYS = b"HeaderDigest=CRC32C,None\0MaxBurstLength=65536\0ImmediateData=Yes\0InitialR2T=No\0"
SEEDS = {
    "login": bytes([WHOLE]) + pdu(0x43, 0x87, sn=1, data=NAMES + KEYS),
    "login-steps": bytes([WHOLE])
    + pdu(0x43, 0x81, sn=1, data=NAMES + b"AuthMethod=CHAP,None\0")
    + pdu(0x43, 0x44, sn=1, data=b"MaxBurst")
    + pdu(0x43, 0x87, sn=1, data=b"Length=512\0"),
    "discovery": bytes([WHOLE])
    + pdu(0x43, 0x87, sn=1, data=b"InitiatorName=iqn.c:d\0SessionType=Discovery\0")
    + pdu(4, sn=1, data=b"SendTargets=All\0")
    + pdu(0x46),
    "read": bytes([LOGGED | WHOLE]) + READY + command(b"\x28" + bytes(7) + b"\x20", 0xC0, 16384, 2),
    "write": bytes([LOGGED | WHOLE])
    + READY
    + command(b"\x2a" + bytes(7) + b"\1", 0xA0, 512, 2, b"a" * 512)
    + command(b"\x2a" + bytes(7) + b"\2", 0x20, 1024, 3, b"b" * 512)
    + pdu(5, tag=3, tail=b"\0" * 4 + struct.pack(">II", 0, 512), data=b"c" * 512),
    "digests": bytes([LOGGED | DIGESTS | WHOLE])
    + READY
    + pdu(0x40, tag=9, data=b"ping")
    + command(b"\x12\0\0\0\xff", 0xC0, 255, 2),
    "manage": bytes([LOGGED | WHOLE]) + pdu(0x42, 0x80, tag=7, word=1),
    "bytes": bytes([LOGGED]) + pdu(0x40, tag=9, data=b"ping"),
}


def main() -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    for name, data in SEEDS.items():
        (CORPUS / name).write_bytes(data)


if __name__ == "__main__":
    main()
