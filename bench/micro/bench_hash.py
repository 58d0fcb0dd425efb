"""Block hash beside a raw XXH3 loop and memcpy, on this machine, in one run.

    python bench/micro/bench_hash.py [--json FILE] [--mib 128] [--runs 5]

A run calls ours and the other in turns, 25 times each, and keeps the fastest of
each: what the code can do when the scheduler leaves it alone. `ratio` is the median
over the runs, `spread` the largest less the smallest. A row whose spread is over a
quarter of its ratio is void: the machine was busy. The raw loop is C compiled here
with the same libxxhash dispatch: one call per 4 KiB block, results stored, nothing
looked at besides.
"""

from __future__ import annotations

import argparse
import ctypes
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

from vrep._core.hash import hash_blocks, hash_file

BLOCK = 4096
CALLS = 25  # of each side in one run
CACHED_BYTES = 512 << 10  # stays in L2
RAW = r"""
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>
#if defined(__x86_64__) || defined(__i386__)
#include <xxh_x86dispatch.h>
#else
#include <xxhash.h>
#endif

void raw128(const uint8_t *data, size_t blocks, size_t size, XXH128_hash_t *out)
{
    for (size_t i = 0; i < blocks; i++)
        out[i] = XXH3_128bits(data + i * size, size);
}

void raw64(const uint8_t *data, size_t blocks, size_t size, uint64_t *out)
{
    for (size_t i = 0; i < blocks; i++)
        out[i] = XXH3_64bits(data + i * size, size);
}

void raw_file(int fd, size_t bytes, size_t size, uint8_t *buffer, size_t room, XXH128_hash_t *out)
{
    for (size_t at = 0; at < bytes; at += room) {
        if (pread(fd, buffer, room, (off_t)at) != (ssize_t)room)
            return;
        raw128(buffer, room / size, size, out + at / size);
    }
}
"""


def build_raw() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "raw.c", Path(folder) / "raw.so"
        source.write_text(RAW)
        options = ["-O3", "-D_GNU_SOURCE", "-shared", "-fPIC"]
        subprocess.run(["cc", *options, source, "-o", library, "-lxxhash"], check=True)
        return ctypes.CDLL(str(library))


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
    size: int,
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
        "value": round(size / statistics.median(mine for mine, _ in pairs) / 1e9, 2),
        "unit": "GB/s",
        "against": against,
        "against_value": round(size / statistics.median(theirs for _, theirs in pairs) / 1e9, 2),
        "ratio": round(ratio, 3),
        "spread": round(spread, 3),
        "target": target,
        "met": None if target is None or void else ratio >= target,
        "void": void,
    }


def rows(mib: int = 128, runs: int = 5) -> list[dict[str, Any]]:
    raw = build_raw()
    size = mib << 20
    data = np.frombuffer(np.random.default_rng(1).bytes(size), np.uint8)
    copy = np.zeros(size, np.uint8)
    blank = np.zeros(size, np.uint8)
    blank += 0  # touch: its pages are memory, not the kernel's one zero page
    wide = np.zeros((size // BLOCK, 2), np.uint64)
    narrow = np.zeros(size // BLOCK, np.uint64)
    zeros = np.zeros(size // BLOCK, np.bool_)
    cached = CACHED_BYTES // BLOCK
    repeats = max(1, size // CACHED_BYTES)

    def address(array: np.ndarray) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    def raw128(source: np.ndarray, blocks: int) -> None:
        raw.raw128(address(source), ctypes.c_size_t(blocks), ctypes.c_size_t(BLOCK), address(wide))

    def raw64() -> None:
        raw.raw64(
            address(data), ctypes.c_size_t(len(narrow)), ctypes.c_size_t(BLOCK), address(narrow)
        )

    def ours128(source: np.ndarray, threads: int = 1) -> None:
        hash_blocks(source, BLOCK, threads=threads, out=wide, zeros=zeros)

    def cached_ours() -> None:
        for _ in range(repeats):
            hash_blocks(data[:CACHED_BYTES], BLOCK, out=wide[:cached], zeros=zeros[:cached])

    def cached_raw() -> None:
        for _ in range(repeats):
            raw128(data, cached)

    table = [
        compare(
            "block hash 128, 4 KiB blocks, from memory",
            lambda: ours128(data),
            "raw XXH3 loop",
            lambda: raw128(data, len(wide)),
            size=size,
            runs=runs,
            target=0.95,
        ),
        compare(
            "block hash 64, 4 KiB blocks, from memory",
            lambda: hash_blocks(data, BLOCK, bits=64, out=narrow, zeros=zeros),
            "raw XXH3 loop",
            raw64,
            size=size,
            runs=runs,
            target=0.95,
        ),
        compare(
            "block hash 128, 4 KiB blocks, from memory",
            lambda: ours128(data),
            "memcpy",
            lambda: np.copyto(copy, data),
            size=size,
            runs=runs,
            target=None,
        ),
        compare(
            "block hash 128, 4 KiB blocks, from cache (calls of 512 KiB)",
            cached_ours,
            "raw XXH3 loop",
            cached_raw,
            size=repeats * CACHED_BYTES,
            runs=runs,
            target=None,
        ),
        compare(
            "block hash 128, zero blocks, from memory",
            lambda: ours128(blank),
            "raw XXH3 loop",
            lambda: raw128(blank, len(wide)),
            size=size,
            runs=runs,
            target=None,
        ),
        compare(
            "block hash 128, from memory, 2 threads",
            lambda: ours128(data, 2),
            "1 thread",
            lambda: ours128(data),
            size=size,
            runs=runs,
            target=None,
        ),
    ]
    with tempfile.TemporaryFile() as file:
        file.write(data.tobytes())
        file.flush()
        room = np.zeros(256 << 10, np.uint8)
        table.append(
            compare(
                "block hash 128, page-cached file",
                lambda: hash_file(file.fileno(), out=wide, zeros=zeros),
                "raw pread and XXH3 loop",
                lambda: raw.raw_file(
                    file.fileno(),
                    ctypes.c_size_t(size),
                    ctypes.c_size_t(BLOCK),
                    address(room),
                    ctypes.c_size_t(len(room)),
                    address(wide),
                ),
                size=size,
                runs=runs,
                target=None,
            )
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--mib", type=int, default=128, help="size of the data (128)")
    parser.add_argument("--runs", type=int, default=5, help="alternating runs (5)")
    arguments = parser.parse_args()
    table = rows(arguments.mib, arguments.runs)
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for row in table:
        verdict = {True: "met", False: "MISSED", None: "-"}[row["met"]]
        print(
            f"{row['name']:<60} {row['value']:7.2f} {row['unit']}  "
            f"{row['ratio']:6.3f} x {row['against']} ({row['against_value']} {row['unit']}), "
            f"spread {row['spread']:.3f}, target {row['target'] or '-'}: "
            f"{'void' if row['void'] else verdict}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
