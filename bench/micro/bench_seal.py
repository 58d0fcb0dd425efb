"""Sealing beside raw AES-256-GCM of the same libcrypto, on this machine, in one run.

    python bench/micro/bench_seal.py [--json FILE] [--runs 5]

A run calls ours and the other in turns, 25 times each, and keeps the fastest of each.
`ratio` is the median over the runs, `spread` the largest less the smallest; a row whose
spread is over a quarter of its ratio is void: the machine was busy. The raw loop is C
compiled here: one message per payload under a key that was set once, with 72 bytes of
associated data, into one buffer; no header, no hashes, no running digest.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vrep._core import layout, record, seal

CALLS = 25  # of each side in one run
BATCH_BYTES = 2 << 20
KEY, STREAM, SECRET = bytes(range(32)), bytes(range(16)), bytes(range(192))
RAW = r"""
#include <openssl/evp.h>
#include <stddef.h>
#include <stdint.h>

static EVP_CIPHER_CTX *context;

int prepare(const uint8_t *key)
{
    context = EVP_CIPHER_CTX_new();
    return EVP_EncryptInit_ex2(context, EVP_aes_256_gcm(), key, NULL, NULL);
}

void raw_gcm(const uint8_t *data, size_t count, size_t size, uint8_t *out)
{
    uint8_t nonce[12] = {0}, associated[72] = {0};
    int len;

    for (size_t i = 0; i < count; i++) {
        uint8_t *to = out + i * (size + 16);
        EVP_EncryptInit_ex2(context, NULL, NULL, nonce, NULL);
        EVP_EncryptUpdate(context, NULL, &len, associated, sizeof associated);
        EVP_EncryptUpdate(context, to, &len, data + i * size, (int)size);
        EVP_EncryptFinal_ex(context, to + size, &len);
        EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, 16, to + size);
    }
}
"""


def build_raw() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "raw.c", Path(folder) / "raw.so"
        source.write_text(RAW)
        options = ["-O3", "-D_GNU_SOURCE", "-shared", "-fPIC"]
        subprocess.run(["cc", *options, source, "-o", library, "-lcrypto"], check=True)
        loaded = ctypes.CDLL(str(library))
        if loaded.prepare(KEY) != 1:
            raise RuntimeError("libcrypto refused AES-256-GCM")
        return loaded


class Batch:
    """A batch of writes of one size, sealed again and again by one sealer."""

    def __init__(self, payload: bytes, size: int, *, hashed: bool, level: int) -> None:
        self.size, self.count = size, max(1, len(payload) // size)
        self.payload = memoryview(payload)[: size * self.count]
        self.records = np.zeros(self.count, layout.RECORD)
        self.records["kind"], self.records["length"] = layout.KIND_WRITE, size
        self.records["offset"] = np.arange(self.count, dtype=np.uint64) * np.uint64(size)
        self.out = bytearray(self.count * record.bound(layout.KIND_WRITE, 0, size))
        self.sealer = seal.Sealer(
            KEY, STREAM, epoch=1, secret=SECRET if hashed else None, level=level
        )
        self.opener, self.plain = seal.Opener(KEY, STREAM), bytearray(size)
        self.written = 0

    def seal(self) -> None:
        self.records["seq"] = np.arange(self.sealer.seq + 1, self.sealer.seq + 1 + self.count)
        self.written, done = self.sealer.seal(self.records, self.payload, self.out)
        assert done == self.count

    def parts(self) -> list[memoryview]:
        found, _ = record.scan(memoryview(self.out)[: self.written])
        ends = [*(int(at) for at in found["position"]), self.written]
        return [memoryview(self.out)[at:end] for at, end in itertools.pairwise(ends)]


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compare(
    name: str,
    ours: Callable[[], Any],
    against: str,
    other: Callable[[], Any],
    *,
    count: int,
    runs: int,
    target: float | None,
) -> dict[str, Any]:
    ours()
    other()
    pairs = []
    for _ in range(runs):
        calls = [(seconds(ours), seconds(other)) for _ in range(CALLS)]
        pairs.append((min(mine for mine, _ in calls), min(theirs for _, theirs in calls)))
    ratios = [theirs / mine for mine, theirs in pairs]
    ratio, spread = statistics.median(ratios), max(ratios) - min(ratios)
    void = spread > ratio / 4
    return {
        "name": name,
        "value": round(statistics.median(mine for mine, _ in pairs) / count * 1e6, 3),
        "unit": "us",
        "against": against,
        "against_value": round(statistics.median(theirs for _, theirs in pairs) / count * 1e6, 3),
        "ratio": round(ratio, 3),
        "spread": round(spread, 3),
        "target": target,
        "met": None if target is None or void else ratio >= target,
        "void": void,
    }


def rows(runs: int = 5) -> list[dict[str, Any]]:
    raw = build_raw()
    random = os.urandom(BATCH_BYTES)
    text = b"".join(b"%06d a line of a log, as many are\n" % i for i in range(60_000))
    source = (ctypes.c_char * BATCH_BYTES).from_buffer_copy(random)
    room = (ctypes.c_char * (2 * BATCH_BYTES))()
    table = []
    for size, target in ((4096, None), (65536, 0.8), (1 << 20, None)):
        for hashed in (False, True):
            batch = Batch(random, size, hashed=hashed, level=0)

            def raw_gcm(batch: Batch = batch) -> None:
                raw.raw_gcm(source, ctypes.c_size_t(batch.count), ctypes.c_size_t(batch.size), room)

            table.append(
                compare(
                    f"seal {size} B{', hashes' if hashed else ''}",
                    batch.seal,
                    "raw AES-256-GCM",
                    raw_gcm,
                    count=batch.count,
                    runs=runs,
                    target=None if hashed else target,
                )
            )
    for size in (4096, 65536):
        for name, data in (("random", random), ("log lines", text[:BATCH_BYTES])):
            squeezed = Batch(data, size, hashed=True, level=1)
            plain = Batch(data, size, hashed=True, level=0)
            table.append(
                compare(
                    f"seal {size} B of {name}, hashes, zstd 1",
                    squeezed.seal,
                    "without compression",
                    plain.seal,
                    count=squeezed.count,
                    runs=runs,
                    target=None,
                )
            )
            table[-1]["stored"] = round(squeezed.written / len(squeezed.payload), 3)
    for size in (4096, 65536):
        batch = Batch(random, size, hashed=True, level=0)
        batch.seal()
        parts = batch.parts()

        def unseal(batch: Batch = batch, parts: list[memoryview] = parts) -> None:
            for part in parts:
                batch.opener.record(part, batch.plain)

        table.append(
            compare(
                f"open {size} B, a Python call each",
                unseal,
                "sealing",
                batch.seal,
                count=batch.count,
                runs=runs,
                target=None,
            )
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs (5)")
    arguments = parser.parse_args()
    table = rows(arguments.runs)
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for row in table:
        verdict = {True: "met", False: "MISSED", None: "-"}[row["met"]]
        print(
            f"{row['name']:<44} {row['value']:9.2f} {row['unit']}  "
            f"{row['ratio']:6.3f} x {row['against']} ({row['against_value']} {row['unit']}), "
            f"spread {row['spread']:.3f}, target {row['target'] or '-'}: "
            f"{'void' if row['void'] else verdict}"
            + (f", stored {row['stored']}" if "stored" in row else "")
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
