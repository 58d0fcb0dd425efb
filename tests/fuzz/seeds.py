"""Write the seeds of fuzz_record: ``python tests/fuzz/seeds.py``."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vrep._core import layout, record, seal

CORPUS = Path(__file__).parent / "corpus" / "record"
KEY = bytes(range(32))  # not the target's: as they stand, no piece is authentic to it
STREAM = bytes([2]) + bytes(15)
REPAIR, SEAL = 1, 2


def sealed(*, level: int, size: int) -> bytes:
    sealer = seal.Sealer(KEY, STREAM, epoch=1, secret=bytes(range(192)), level=level)
    out = bytearray(1 << 16)
    at = sealer.stream(np.zeros((), layout.STREAM), out)
    records = np.zeros(5, layout.RECORD)
    records["kind"] = [
        layout.KIND_WRITE,
        layout.KIND_ZEROES,
        layout.KIND_MARK,
        layout.KIND_GAP_BEGIN,
        layout.KIND_OBJECT,
    ]
    records["flags"][3] = layout.RECORD_JUMP
    records["seq"] = [1, 2, 3, 9, 10]
    records["length"] = [size, 8192, 19, 0, 40]
    mark = np.zeros((), layout.MARK)
    mark["version"], mark["label_bytes"] = 1, 3
    thing = np.zeros((), layout.OBJECT)
    thing["version"], thing["name_bytes"] = 1, 4
    payloads = [
        (b"text " * 1000)[:size],
        None,
        mark.tobytes() + b"one",
        None,
        thing.tobytes() + b"name" * 6,
    ]
    written, done = sealer.seal(records, payloads, memoryview(out)[at:])
    assert done == len(records)
    at += written
    at += sealer.tally(memoryview(out)[at:], wall_ns=1)
    found, consumed = record.scan(memoryview(out)[:at], order=record.Order())
    assert (len(found), consumed) == (7, at)
    return bytes(out[:at])


def unsealed(whole: bytes) -> bytes:
    """The same records with the content of each piece in place, for the target to seal."""
    out = bytearray(whole)
    found, _ = record.scan(whole)
    for header, position in zip(found["header"], found["position"], strict=True):
        start = int(position)
        for piece in record.pieces(whole[start:]):
            at, stored = start + int(piece["at"]), int(piece["stored"])
            nonce = struct.pack("<QI", int(header["seq"]), int(piece["index"]))
            data = header.tobytes() + struct.pack("<II", int(piece["word"]), int(piece["index"]))
            content = AESGCM(KEY).decrypt(nonce, bytes(whole[at : at + stored]), data)
            out[at : at + len(content)] = content
    return bytes(out)


def main() -> None:
    CORPUS.mkdir(parents=True, exist_ok=True)
    for level, size in ((0, 5), (1, 5000)):  # small, so that a mutation meets what matters
        whole = sealed(level=level, size=size)
        for options in (0, REPAIR, REPAIR | SEAL):
            body = unsealed(whole) if options & SEAL else whole
            (CORPUS / f"level{level}-options{options}").write_bytes(bytes([options]) + body)
    (CORPUS / "empty").write_bytes(bytes([0]))


if __name__ == "__main__":
    main()
