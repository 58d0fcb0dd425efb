"""Index and extent map at scale: adding, merging, and lookups of a fresh process.

    python bench/micro/bench_index.py [--json FILE] [--records 10000000] [--folder DIR] [--keep]

Records (4 KiB writes at random places of a 1 TiB disk, one record in 50 a long range
of zeroes, one in 20 on one hot block) go through IndexBuilder in segments of 16384,
and size-tiered merges of eight make the runs. Then a fresh Python process, its files
dropped from the page cache, opens all of it at a point and looks up 1,000 random
4 KiB ranges that were written; the clock runs from exec. Warm is the same again.
Nothing is decided by these figures but what they say; a target is met or not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from vrep._core import layout, record
from vrep._core.index import Index, IndexBuilder, merge

GROUP = bytes(16)
SEGMENT_RECORDS = 16384
DISK_BLOCKS = (1 << 40) // 4096
FAN_IN = 8
PACKED = np.dtype({
    "names": ["header", "word", "piece"],
    "formats": [layout.RECORD, "<u4", "V17"],
    "offsets": [0, 64, 68],
    "itemsize": 85,
})  # fmt: skip

CHILD = r"""
import sys, time
import numpy as np
from vrep._core.index import ExtentMap, Index
folder, seq, lookups = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
places = np.load(folder + "/places.npy")
imported = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
import os
names = sorted(n for n in os.listdir(folder) if n.endswith(".index"))
extents = ExtentMap([Index.open(f"{folder}/{n}") for n in names], [(1, seq)])
opened = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
chosen = np.random.default_rng(seq).choice(places[places["seq"] <= seq], lookups)
begin = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
each = []
for place in chosen:
    rows = extents.lookup(0, int(place["offset"]), 4096)
    assert rows[0]["kind"] and rows[0]["seq"] >= place["seq"] and rows[0]["seq"] <= seq
    each.append(time.clock_gettime_ns(time.CLOCK_MONOTONIC))
end = each[-1]
each = np.diff(each)
import resource
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
print(imported, opened, begin, end, int(np.percentile(each, 50)), int(np.percentile(each, 99)),
      int(each.max()), rss, faults, len(names))
"""


def segment_bytes(rng: np.random.Generator, first_seq: int, count: int) -> np.ndarray:
    header = np.zeros(count, layout.RECORD)
    header["magic"], header["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
    header["kind"], header["epoch"] = layout.KIND_WRITE, 1
    header["seq"] = np.arange(first_seq, first_seq + count)
    header["offset"] = rng.integers(0, DISK_BLOCKS, count) * 4096
    header["offset"][rng.random(count) < 0.05] = 12345 * 4096
    header["length"], header["pieces"], header["body_bytes"] = 4096, 1, 21
    header["wall_ns"] = header["seq"] * 1000
    # zeroes have no body: here they keep the stride as a mark of the same size would not
    record.finish(header)
    packed = np.zeros(count, PACKED)
    packed["header"], packed["word"] = header, layout.PIECE_ZSTD | 17
    return packed


def zeroes_bytes(rng: np.random.Generator, first_seq: int, count: int) -> np.ndarray:
    header = np.zeros(count, layout.RECORD)
    header["magic"], header["version"] = layout.RECORD_MAGIC, layout.RECORD_VERSION
    header["kind"], header["epoch"] = layout.KIND_ZEROES, 1
    header["seq"] = np.arange(first_seq, first_seq + count)
    header["offset"] = rng.integers(0, DISK_BLOCKS - (1 << 20), count) * 4096
    header["length"] = rng.integers(33, 1 << 12, count) * 4096
    record.finish(header)
    return header


def build(folder: Path, records: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    stream = np.zeros((), layout.STREAM)
    stream["epoch"], stream["stream_id"] = 1, 1
    add_s = finish_s = merge_s = 0.0
    merged_entries = 0
    levels: list[list[Path]] = [[]]
    sample = []
    row = None
    for number, first in enumerate(range(1, records + 1, SEGMENT_RECORDS), 1):
        count = min(SEGMENT_RECORDS, records + 1 - first)
        zeroes = count // 50
        raw = segment_bytes(rng, first, count - zeroes)
        tail = zeroes_bytes(rng, first + count - zeroes, zeroes)
        picked = raw["header"][:: max(1, records // 200_000)]
        sample.append(np.stack([picked["offset"], picked["seq"]]))
        builder = IndexBuilder(number, GROUP, row)
        if row is None:
            builder.add(record.stream_record(stream), 128)
            row = builder.stream
        begin = time.perf_counter()
        builder.add(raw, 1024)
        builder.add(tail, 1024 + raw.nbytes)
        added = time.perf_counter()
        builder.time(1000 * first, 1, 0, first + count - 1)
        footer = builder.finish(0)
        finish_s += time.perf_counter() - added
        add_s += added - begin
        path = folder / f"segment-{number:08x}.index"
        path.write_bytes(footer)
        levels[0].append(path)
        for level in range(32):
            if len(levels[level]) < FAN_IN:
                break
            inputs = [Index.open(one) for one in levels[level]]
            run = folder / f"run-{level + 1}-{number:08x}.index"
            begin = time.perf_counter()
            trailer = merge(inputs, run, level + 1)
            merge_s += time.perf_counter() - begin
            merged_entries += trailer["short_count"] + trailer["long_count"]
            for one in levels[level]:
                one.unlink()
            levels[level] = []
            if len(levels) == level + 1:
                levels.append([])
            levels[level + 1].append(run)
    places = np.zeros(sum(part.shape[1] for part in sample), [("offset", "<u8"), ("seq", "<u8")])
    places["offset"] = np.concatenate([part[0] for part in sample])
    places["seq"] = np.concatenate([part[1] for part in sample])
    np.save(folder / "places.npy", places)
    segments = -(-records // SEGMENT_RECORDS)
    return {
        "add_ns": add_s / records * 1e9,
        "finish_ms": finish_s / segments * 1e3,
        "merge_ns": merge_s / max(1, merged_entries) * 1e9,
        "merged": merged_entries,
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def drop_cache(folder: Path) -> None:
    for path in folder.glob("*.index"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def fresh(folder: Path, seq: int, lookups: int) -> dict[str, float]:
    begin = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(seq), str(lookups)],
        check=True,
        capture_output=True,
        text=True,
    )
    numbers = [int(word) for word in done.stdout.split()]
    imported, opened, first, end, p50, p99, most, rss, faults, files = numbers
    return {
        "total_ms": (opened - begin + end - first) / 1e6,
        "open_ms": (opened - imported) / 1e6,
        "lookups_ms": (end - first) / 1e6,
        "p50_us": p50 / 1e3,
        "p99_us": p99 / 1e3,
        "max_us": most / 1e3,
        "rss_mib": rss / 1024,
        "major_faults": faults,
        "files": files,
    }


def rows(folder: Path, records: int, lookups: int = 1000) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = []

    def put(name: str, value: float, unit: str, target: float | None = None) -> None:
        met = None if target is None else value <= target
        table.append({
            "name": name, "value": round(value, 2), "unit": unit, "against": "-", "ratio": None,
            "target": target, "met": met, "void": False,
        })  # fmt: skip
        verdict = {True: "met", False: "MISSED", None: "-"}[met]
        print(f"{name:<62} {value:10.2f} {unit:<4} target {target or '-'}: {verdict}", flush=True)

    built = build(folder, records)
    put("index: add, per record", built["add_ns"], "ns", 300)
    put(f"index: sort and footer of {SEGMENT_RECORDS} records", built["finish_ms"], "ms", 30)
    put("index: merge, per entry and level, synced", built["merge_ns"], "ns")
    put("index: peak memory of building and merging", built["rss_mib"], "MiB")
    for share in (100, 50, 10):
        seq = records * share // 100
        cold = []
        for _ in range(3):
            drop_cache(folder)
            cold.append(fresh(folder, seq, lookups))
        warm = [fresh(folder, seq, lookups) for _ in range(3)]
        for how, runs in (("cold", cold), ("warm", warm)):
            best = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            what = f"point at {share} %, {how}: "
            put(what + f"exec to {lookups} lookups", best["total_ms"], "ms", 1000)
            put(what + f"open of {best['files']:.0f} files", best["open_ms"], "ms")
            put(what + "lookup p50", best["p50_us"], "us")
            put(what + "lookup p99", best["p99_us"], "us")
            put(what + "lookup max", best["max_us"], "us")
            put(what + "major faults", best["major_faults"], "")
            put(what + "peak memory", best["rss_mib"], "MiB")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--records", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the files go (a temporary directory)")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        table = rows(Path(folder), arguments.records)
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
